"""Files run in the oldest onnxruntime that knows their opset, in an environment of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import nodeshape as ns
from nodeshape._exporting.smaller import write_half, write_int8

#: The oldest with opset 18 that pip has for a Python; it is 1.14, of the time of IR version 8.
OLDEST = {(3, 10): "1.14.0", (3, 11): "1.15.0", (3, 12): "1.17.0", (3, 13): "1.20.0"}.get(sys.version_info[:2])
RUN = """
import json, sys
import numpy, onnxruntime
answers = {}
for name in sys.argv[1:]:
    session = onnxruntime.InferenceSession(name + ".onnx", providers=["CPUExecutionProvider"])
    x = numpy.load(name + ".npy")
    answers[name] = session.run(None, {session.get_inputs()[0].name: x})[0].tolist()
json.dump({"version": onnxruntime.__version__, "answers": answers}, sys.stdout)
"""


class Own(torch.nn.Module):
    """A module of a user's, with an f that knows the time."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 6)
        )

    def forward(self, y):
        return ns.odeint(lambda t, y: self.net(y) * t.sin(), y, torch.linspace(0, 1, 4), method="rk4")[-1]


@pytest.mark.slow
def test_files_run_in_the_oldest_onnxruntime(tmp_path):
    if OLDEST is None:
        pytest.skip("no onnxruntime of that age for this Python")
    torch.manual_seed(0)
    expected = {}

    def keep(name, module, x, **how):
        ns.to_onnx(module, x, tmp_path / f"{name}.onnx", **how)
        np.save(tmp_path / f"{name}.npy", x.numpy())
        expected[name] = module(x).detach().numpy()

    images = torch.rand(5, 1, 32, 32)
    for method in ("euler", "implicit_euler", "implicit_midpoint"):
        model = ns.ShapeClassifier(3, width=32, steps=10, method=method).eval()
        for weight in model.ode.parameters():
            weight.data *= 0.2  # so that a step is not too long for stages to be solved
        for loop in (False, True):
            keep(f"{method}-{loop}", model, images, loop=loop)
    keep("own", Own().eval(), torch.randn(5, 6))
    for name, write in (("half", write_half), ("int8", lambda a, b: write_int8(a, b, images))):
        if name == "half" and OLDEST.startswith("1.14"):
            continue  # which ends in a segmentation fault there, as every float16 convolution does
        write(tmp_path / "euler-False.onnx", tmp_path / f"{name}.onnx")
        np.save(tmp_path / f"{name}.npy", images.numpy())
        expected[name] = expected["euler-False"]

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "old"], check=True)
    python = tmp_path / "old" / "bin" / "python"
    packages = [f"onnxruntime=={OLDEST}", *(["numpy<2"] if sys.version_info < (3, 13) else [])]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    printed = subprocess.run([python, "-c", RUN, *expected], cwd=tmp_path, check=True, capture_output=True).stdout
    found = json.loads(printed)
    assert found["version"] == OLDEST
    for name, answer in found["answers"].items():
        tolerance = {"half": 5e-3, "int8": 0.1}.get(name, 1e-4)
        assert np.abs(np.array(answer) - expected[name]).max() <= tolerance, name
