"""ONNX files that keep the fused ops run in onnxruntime without torch and nodeshape, and give the module's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._exporting import custom_ops
from nodeshape._exporting.custom_ops import DOMAIN, LIBRARY
from nodeshape._exporting.module import open_onnx
from nodeshape._exporting.native import ONNX, TORCHSCRIPT
from nodeshape._models.dynamics import mlp_program
from nodeshape.export import _print

needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"needs {LIBRARY.name}, which NODESHAPE_ONNXRUNTIME has setup.py build"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

ALONE = """
import sys, numpy, onnxruntime
model, library, y, out = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
y = numpy.load(y)
numpy.savez(out, *(session.run(None, {session.get_inputs()[0].name: y[:n]})[0] for n in (1, 2, 9)))
assert not {"torch", "nodeshape"} & sys.modules.keys()
"""


class Own(nn.Module):
    """An f of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * t


class Twice(nn.Module):
    """A solve by a program, then one without a kernel."""

    def __init__(self, method: str, steps: int) -> None:
        super().__init__()
        self.fused, self.method, self.steps = ns.fuse(Own(), torch.zeros(2, 4)), method, steps

    def forward(self, y0: Tensor) -> Tensor:
        t = torch.tensor([0.0, 0.5, 1.0])
        y = ns.odeint(self.fused, y0, t, method=self.method, steps=self.steps)[-1]
        return ns.odeint(lambda t, y: torch.sin(y), y, t, method="euler", steps=3)[-1]


class Weightless(nn.Module):
    """A program without weights, in float64, whose states and evaluations are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = ns.fuse(lambda t, y: torch.sin(y) - t, torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, y0: Tensor) -> Tensor:
        t = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)
        return ns.odeint(self.fused, y0, t, method="dopri5", steps=2).transpose(0, 1)


def classifier(method: str) -> nn.Module:
    model = ns.ShapeClassifier(3, image_size=16, width=8, steps=4, method=method)
    with torch.no_grad():
        model.ode.dynamics.norm3.weight.mul_(0.1)  # so that implicit stages of an untrained one are solved
    return model


def mlp(method: str, activation: str = "tanh") -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 3), ns.ODEBlock(ns.MLPDynamics(3, [8], activation=activation), method=method, steps=4)
    )


MODELS = {
    "conv, euler": (lambda: classifier("euler"), (1, 16, 16)),
    "conv, implicit_midpoint": (lambda: classifier("implicit_midpoint"), (1, 16, 16)),
    "conv, implicit_euler": (lambda: classifier("implicit_euler"), (1, 16, 16)),
    "mlp": (lambda: mlp("implicit_midpoint"), (5,)),
    "mlp, silu": (lambda: mlp("euler", "silu"), (5,)),
    "mlp, float64": (lambda: mlp("implicit_euler").double(), (5,)),
    "program": (lambda: Twice("rk4", 3), (4,)),
    "implicit program": (lambda: Twice("kvaerno3", 2), (4,)),
    "no weights, float64": (Weightless, (3,)),
}


def written(name: str, folder: Path) -> tuple[nn.Module, Tensor]:
    """Write a model's files; the model, and nine samples."""
    torch.manual_seed(1)
    build, shape = MODELS[name]
    module = build().eval()
    dtype = torch.float64 if "float64" in name else torch.float32
    y = torch.rand(9, *shape, dtype=dtype)
    reports = ns.to_native(module, y[:4], folder, metadata={"classes": "a, b"}, package=False)
    assert [report.path.name for report in reports] == [TORCHSCRIPT, ONNX]
    assert reports[1].max_difference <= 1e-5 and reports[1].batch_sizes == (1, 4, 9)
    return module, y


@needs_library
@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_numbers_with_onnxruntime_and_the_library_alone(name: str, tmp_path: Path) -> None:
    module, y = written(name, tmp_path)
    kept = onnx.load(tmp_path / ONNX)
    assert sum(node.domain == DOMAIN for node in kept.graph.node) == 1
    assert {x.key: x.value for x in kept.metadata_props}["classes"] == "a, b"
    np.save(tmp_path / "y.npy", y.numpy())
    line = [sys.executable, "-I", "-c", ALONE, *(tmp_path / x for x in (ONNX, LIBRARY.name, "y.npy", "out.npz"))]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "out.npz") as found, torch.no_grad():
        for n, x in zip((1, 2, 9), found.values()):
            torch.testing.assert_close(torch.from_numpy(x), module(y[:n]), rtol=1e-5, atol=1e-5)


@needs_library
def test_any_number_of_threads_and_of_runs_at_a_time_gives_the_same(tmp_path: Path) -> None:
    module = ns.ODEBlock(ns.ConvDynamics(32), method="implicit_midpoint", steps=3)
    y = torch.rand(40, 32, 8, 8)
    ns.to_native(module, y[:2], tmp_path, package=False)
    alone, many = (open_onnx(tmp_path / ONNX, threads, LIBRARY) for threads in (1, 4))
    given = {alone.get_inputs()[0].name: y.numpy()}
    expected = alone.run(None, given)[0]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: many.run(None, given)[0], range(6)):
            assert np.array_equal(found, expected)


@needs_library
def test_a_sample_that_fails_is_an_error_and_the_session_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dynamics = ns.MLPDynamics(8, [16], activation="relu")
    with torch.no_grad():
        for x in dynamics.parameters():
            x.copy_(30 * torch.randn_like(x) if x.dim() == 2 else 0 * x)
        dynamics.layers[0].weight[:, -1] = 0  # of the time
    module = ns.ODEBlock(dynamics, method="implicit_euler", steps=1)
    y = torch.zeros(4, 8)  # which is where it stays
    ns.to_native(module, y, tmp_path, package=False)
    session = open_onnx(tmp_path / ONNX, 2, LIBRARY)
    name = session.get_inputs()[0].name
    bad = y.clone()
    bad[2] = 1.0
    with pytest.raises(ns.StageSolveError, match=r"1 of 4 samples \(the first is number 2\)"):
        module(bad)
    with pytest.raises(Exception, match=r"StageSolveError: 1 of 4 samples \(the first is number 2\)"):
        session.run(None, {name: bad.numpy()})
    assert not session.run(None, {name: y.numpy()})[0].any()


def handmade(shape: list[int], weights: list[list[int]], theta: float = 0.5, **attributes: object) -> bytes:
    """An ONNX file of one Solve, of a linear MLPDynamics of 3 components."""
    program = mlp_program((3,), ((3, 4), (3,)), "tanh")
    names = [f"w{i}" for i in range(len(weights))]
    constants = [helper.make_tensor(x, 1, size, np.ones(size)) for x, size in zip(names, weights)]
    for name, kind, values in (
        ("t", TensorProto.DOUBLE, np.array([0.0, 1.0])),
        ("program", TensorProto.INT64, program.code.numpy()),
        ("constants", TensorProto.DOUBLE, program.constants.numpy()),
        ("tableau", TensorProto.DOUBLE, np.array([[theta], [1.0], [theta]])),
    ):
        constants.append(helper.make_tensor(name, kind, values.shape, values.reshape(-1)))
    inputs = ["y0", "t", "program", "constants", "tableau", *names]
    node = helper.make_node("Solve", inputs, ["ys", "evaluations", "residual"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("ys", TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


GOOD = {"steps": [3], "theta": 0.5, "tolerance": 1e-6, "max_iterations": 30}


@needs_library
@pytest.mark.parametrize(
    ("shape", "weights", "changed", "message"),
    [
        ([2, 3, 4], [[3, 4], [3]], {}, "Solve: a sample of y0 has 12 elements but the program expects 3"),
        ([2, 3], [[3, 3], [3]], {}, "program: a layer's weight is of another size"),
        ([2, 3], [[3, 4], [2]], {}, "program: a layer's weight is of another size"),
        ([2, 3], [[3, 4]], {}, "program: it is for 2 weights, got 1"),
        ([2, 3], [[3, 4], [3]], {"steps": [3, 3]}, "Solve: got 2 step counts for 2 observation times"),
        ([2, 3], [[3, 4], [3]], {"theta": 0.25}, "Solve: theta must be 0"),
        ([2, 3], [[3, 4], [3]], {"tolerance": -1.0}, "Solve: tolerance must be positive"),
    ],
)
def test_wrong_arguments_are_told_of(
    shape: list[int], weights: list[list[int]], changed: dict[str, object], message: str
) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    session = onnxruntime.InferenceSession(handmade(shape, weights, **GOOD | changed), options)
    with pytest.raises(Exception, match=message):
        session.run(None, {"y0": np.zeros(shape, np.float32)})


@needs_library
def test_a_node_without_its_attributes_is_refused_when_it_is_loaded() -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    options.log_severity_level = 4
    with pytest.raises(Exception, match="max_iterations"):
        onnxruntime.InferenceSession(handmade([2, 3], [[3, 4], [3]], steps=[3], tolerance=1e-6), options)


@needs_library
def test_a_file_that_differs_from_the_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = custom_ops._schema

    def wrong(name: str, attributes: dict[str, object]) -> onnx.defs.OpSchema:
        attributes["steps"] = [7]
        return schema(name, attributes)

    monkeypatch.setattr(custom_ops, "_schema", wrong)
    with pytest.raises(ValueError, match=r"model\.fused\.onnx differs from the module by"):
        ns.to_native(mlp("euler"), torch.rand(4, 5), tmp_path, package=False)
    assert not (tmp_path / ONNX).exists()


@needs_library
def test_a_module_that_onnx_cannot_hold_is_told_of_with_the_way_out(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = mlp("euler")

        def forward(self, y: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.block(y))

    with pytest.raises(ValueError, match=r"bessel_j0.*; to_native\(\.\.\., onnx=False\) leaves model.fused.onnx out"):
        ns.to_native(Bessel(), torch.rand(4, 5), tmp_path, package=False)
    assert not (tmp_path / ONNX).exists()
    ns.to_native(Bessel(), torch.rand(4, 5), tmp_path, package=False, onnx=False)


@needs_library
def test_the_library_needs_neither_torch_nor_onnxruntime_to_be_linked() -> None:
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed and not any(name in needed for name in ("libtorch", "libc10", "libonnxruntime"))


@needs_library
def test_an_unknown_instruction_set_is_told_of() -> None:
    code = f"import onnxruntime; onnxruntime.SessionOptions().register_custom_ops_library({str(LIBRARY)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NODESHAPE_ISA": "mmx"}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "NODESHAPE_ISA=mmx is not known here" in done.stderr


def test_the_command_says_in_a_line_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"max_difference": 0.0, "same_class": 1, "images": 1, "bytes": 1, "ties": 0}
    report = {
        **{"method": "euler", "steps": 2, "images": {"source": "drawn"}, "files": {"model.onnx": figures}},
        **{"pytorch_latency_ms": 1.0, "seconds": {"total": 1.0}, "left_out": {ONNX: "no library"}},
    }
    _print(report, tmp_path / "best.pt", tmp_path)
    assert "model.fused.onnx is left out: no library\n" in capsys.readouterr().out


def test_without_the_library_the_file_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ops, "LIBRARY", tmp_path / LIBRARY.name)
    reports = ns.to_native(mlp("euler"), torch.rand(4, 5), tmp_path, package=False)
    assert [report.path.name for report in reports] == [TORCHSCRIPT] and not (tmp_path / ONNX).exists()
    assert custom_ops.why_missing() == "libnodeshape_onnxruntime.so was not built: docs/export.md says how"
