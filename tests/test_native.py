"""Files that keep the fused ops run without nodeshape but for its library, and give the module's numbers."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import nodeshape as ns
from nodeshape._exporting.native import PACKAGE, TORCHSCRIPT, load_package
from nodeshape._ode.fused import _LIBRARY

ALONE = """
import sys, json, torch
torch.set_grad_enabled(False)
folder, name, y = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
torch.ops.load_library(f"{folder}/LIBRARY")
load = torch.jit.load if name.endswith(".ts") else torch._inductor.aoti_load_package
model = load(f"{folder}/{name}")
torch.save([model(y[:n]) for n in (1, 2, 9)], sys.argv[4])
assert not any(module.startswith("nodeshape") for module in sys.modules)
""".replace("LIBRARY", _LIBRARY.name)


def alone(folder, name, y):
    """What a file gives for the first 1, 2 and 9 samples in a Python that cannot import nodeshape."""
    torch.save(y, folder / "y.pt")
    line = [sys.executable, "-I", "-c", ALONE, folder, name, folder / "y.pt", folder / "out.pt"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "out.pt")


class Own(nn.Module):
    """An f of the user's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t, y):
        return self.net(y) * t


class Twice(nn.Module):
    """A solve by a program, then one without a kernel."""

    def __init__(self):
        super().__init__()
        self.fused = ns.fuse(Own(), torch.zeros(2, 4))

    def forward(self, y0):
        t = torch.tensor([0.0, 0.5, 1.0])
        y = ns.odeint(self.fused, y0, t, method="rk4", steps=3)[-1]
        return ns.odeint(lambda t, y: torch.special.bessel_j0(y), y, t, method="euler", steps=3)[-1]


MODELS = {
    "conv": (lambda: ns.ShapeClassifier(3, image_size=16, width=8, steps=10), (1, 16, 16)),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(5, 3), ns.ODEBlock(ns.MLPDynamics(3, [8]), method="implicit_midpoint", steps=4)
        ),
        (5,),
    ),
    "own f": (Twice, (4,)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["own f", *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "mlp"))])
def test_torchscript_that_keeps_the_ops_gives_the_numbers_with_the_library_alone(name, tmp_path):
    (tmp_path / PACKAGE).write_text("another model's")
    check(name, tmp_path, package=False)
    assert not (tmp_path / PACKAGE).exists()
    extra = {"classes.txt": ""}
    torch.jit.load(tmp_path / TORCHSCRIPT, _extra_files=extra)
    assert extra["classes.txt"] == b"a\nb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_package_that_keeps_the_ops_gives_the_numbers_with_the_library_alone(name, tmp_path):
    check(name, tmp_path, package=True)
    assert load_package(tmp_path / PACKAGE).loader.get_metadata()["classes.txt"] == "a\nb"


def check(name, folder, package):
    """Compare native files with the module, here and in a Python without nodeshape."""
    torch.manual_seed(1)
    build, shape = MODELS[name]
    module, y = build().eval(), torch.rand(9, *shape)
    reports = ns.to_native(module, y[:4], folder, metadata={"classes.txt": "a\nb"}, package=package, onnx=False)
    assert [report.path.name for report in reports] == [TORCHSCRIPT, PACKAGE][: 1 + package]
    assert all(report.max_difference <= 1e-5 and report.batch_sizes == (1, 4, 9) for report in reports)
    with torch.no_grad():
        expected = [module(y[:n]) for n in (1, 2, 9)]
    file = PACKAGE if package else TORCHSCRIPT
    for x, wanted in zip(alone(folder, file, y), expected):
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


def test_a_module_without_a_kernel_is_refused(tmp_path):
    block = ns.ODEBlock(nn.Identity(), steps=2)
    block.dynamics.forward = lambda t, y: -y
    with pytest.raises(ValueError, match="no solve of the module has a kernel"):
        ns.to_native(block, torch.rand(2, 3), tmp_path)
    assert not [*tmp_path.iterdir()]
