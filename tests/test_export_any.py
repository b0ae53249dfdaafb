"""``to_onnx``, ``to_torchscript`` and ``to_pt2``: any module with solves in it, as a file that gives its numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nodeshape as ns
from nodeshape._exporting.graph import nodes

#: At most, on outputs.
CLOSE = 1e-4


class TimeMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([y, t.expand(y.shape[0], 1)], dim=1))
        return out


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.conv(y)) * t


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.a(y[0])) + y[1].sum(dim=1, keepdim=True), torch.sin(self.b(y[1])) * t


class Around(nn.Module):
    """Two observations of a solve, as users write it."""

    def __init__(self, f: nn.Module, **how: object) -> None:
        super().__init__()
        self.f, self.how = f, how

    def forward(self, *y: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = ns.odeint(self.f, y if len(y) > 1 else y[0], torch.tensor([0.0, 0.4, 1.0]), **self.how)
        return out[-1] if isinstance(out, Tensor) else tuple(x[-1] for x in out)


def states(shape: tuple[int, ...]) -> Tensor:
    return torch.sin(torch.arange(float(torch.Size(shape).numel()))).reshape(shape)


def gentle() -> nn.Module:
    """Untrained, but not so steep that a stage takes twenty evaluations, all of which a trace would hold."""
    f = ns.ConvDynamics(4)
    with torch.no_grad():
        f.norm3.weight.mul_(0.2)
    return f


F: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "mlp": (TimeMLP, [(3,)]),
    "conv": (Conv, [(2, 4, 4)]),
    "tuple": (Pair, [(3,), (2,)]),
    "MLPDynamics": (lambda: ns.MLPDynamics(3, (8,)), [(3,)]),
    "ConvDynamics": (gentle, [(4, 4, 4)]),
    "fused": (lambda: ns.fuse(TimeMLP(), states((3, 3))), [(3,)]),
}
METHODS = ("euler", "implicit_euler", "implicit_midpoint", "rk4")


def around(f: str, **how: object) -> tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    """A module with a solve in it, and its inputs by batch size."""
    torch.manual_seed(0)
    make, shapes = F[f]
    return Around(make(), **how).eval(), lambda batch: tuple(0.5 * states((batch, *shape)) for shape in shapes)


def by_onnx(path: Path, inputs: Sequence[Tensor], **named: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    given = dict(zip([x.name for x in session.get_inputs()], inputs)) | named
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in given.items()})]


def listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def exported(how: str, module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], path: Path) -> Callable:
    """The exported module as a function of inputs."""
    example = inputs(3)
    if how in ("to_onnx", "loop"):
        ns.to_onnx(module, example, path, loop=how == "loop")
        return lambda *x: by_onnx(path, x)
    if how == "torch.onnx.export":
        batch = ({0: torch.export.Dim("batch")},) * len(example)
        program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=(batch,), verbose=False)
        program.save(path)
        return lambda *x: by_onnx(path, x)
    if how == "torch.export":
        batch = ({0: torch.export.Dim("batch")},) * len(example)
        return torch.export.export(module, example, dynamic_shapes=(batch,)).module()
    if how == "to_torchscript":
        ns.to_torchscript(module, example, path)
        return torch.jit.load(path)
    if how == "to_pt2":
        ns.to_pt2(module, example, path)
        return torch.export.load(path).module()
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)


#: What a quick run takes of all combinations; TorchScript, most of which is written in no time, besides.
QUICK = {
    ("to_onnx", "mlp", "implicit_euler"),
    ("to_onnx", "ConvDynamics", "euler"),
    ("loop", "tuple", "euler"),
    ("torch.onnx.export", "fused", "euler"),
    ("torch.export", "MLPDynamics", "rk4"),
    ("to_pt2", "conv", "euler"),
    ("compile", "mlp", "rk4"),
}
EXPORTERS = ("to_onnx", "loop", "torch.onnx.export", "torch.export", "to_torchscript", "to_pt2", "compile")
COMBINATIONS = [
    pytest.param(
        *case,
        marks=() if case in QUICK or (case[0] == "to_torchscript" and case[1] != "ConvDynamics") else pytest.mark.slow,
    )
    for case in ((how, f, method) for how in EXPORTERS for f in F for method in METHODS)
]


@pytest.mark.parametrize(("how", "f", "method"), COMBINATIONS)
def test_every_f_and_method_gives_the_modules_numbers(how: str, f: str, method: str, tmp_path: Path) -> None:
    # Its stages are traced in as many evaluations as any f may need where nobody says how many.
    few = {"options": {"max_stage_iterations": 12}} if how in ("torch.export", "torch.onnx.export", "compile") else {}
    module, inputs = around(f, method=method, steps=2, **(few if method.startswith("implicit") else {}))
    found = exported(how, module, inputs, tmp_path / "model")
    for batch in (1, 3, 8):
        for x, y in zip(listed(found(*inputs(batch))), listed(module(*inputs(batch))), strict=True):
            torch.testing.assert_close(x, y, atol=CLOSE, rtol=0)


def test_a_torchdiffeq_users_module_exports_with_equal_steps(tmp_path: Path) -> None:
    module, inputs = around("mlp")
    report = ns.to_torchscript(module, inputs(3), tmp_path / "model.ts")
    assert report.steps is not None and f"{report.steps} equal steps" in str(report)
    torch.testing.assert_close(torch.jit.load(report.path)(*inputs(5)), module(*inputs(5)), atol=CLOSE, rtol=0)
    with pytest.raises(ValueError, match=r"error control cannot be exported.*steps=\.\.\..*ns\.to_onnx"):
        torch.export.export(module, inputs(3))


@torch.no_grad()
def test_a_looped_file_takes_other_steps(tmp_path: Path) -> None:
    module, inputs = around("mlp", method="euler", steps=2)
    report = ns.to_onnx(module, inputs(3), tmp_path / "model.onnx", loop=True)
    (found,) = by_onnx(report.path, inputs(5), steps=torch.tensor(5))
    other = Around(module.f, method="euler", steps=5)
    torch.testing.assert_close(found, other(*inputs(5)), atol=1e-6, rtol=0)
    assert (found - module(*inputs(5))).abs().max() > 1e-3
    assert "Loop" in {node.op_type for node in onnx.load(report.path).graph.node}


class Classifier(nn.Module):
    """Several inputs and outputs, one of them in a dictionary; in training mode, with what that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.block = ns.ODEBlock(TimeMLP(), method="implicit_midpoint", steps=2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, shift: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        y = self.block(self.stem(x) + shift[0] * shift[1])
        return {"logits": self.head(y), "features": y}


def test_names_shapes_and_trajectory_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classifier()
    x, shift, scale = torch.randn(1, 4), torch.randn(1, 3), torch.tensor([0.1, 0.2, 0.3])
    report = ns.to_onnx(module, (x, (shift, scale)), tmp_path / "model.onnx", trajectory=module.head)
    assert module.stem.training and report.batch_sizes == (1, 3) and report.stage_iterations
    session = onnxruntime.InferenceSession(report.path)
    names = {"x": ["batch", 4], "shift_0": ["batch", 3], "shift_1": [3]}
    assert {x.name: x.shape for x in session.get_inputs()} == names
    outputs = {x.name: x.shape for x in session.get_outputs()}
    assert outputs == {"logits": ["batch", 2], "features": ["batch", 3], "trajectory": ["batch", 3, 2]}
    logits, _, trajectory = by_onnx(report.path, (x.repeat(4, 1), shift.repeat(4, 1), scale))
    torch.testing.assert_close(trajectory[:, -1], logits, atol=1e-6, rtol=0)
    proto = onnx.load(report.path)
    assert proto.ir_version == 8 and proto.opset_import[0].version == 18
    assert report.bytes == report.path.stat().st_size and report.nodes == sum(1 for _ in nodes(proto.graph))


def test_a_torchscript_file_loads_without_nodeshape_and_scripts(tmp_path: Path) -> None:
    module, inputs = around("ConvDynamics", method="euler", steps=2)
    path = ns.to_torchscript(module, inputs(3), tmp_path / "model.ts").path
    torch.save(inputs(7), tmp_path / "inputs.pt")
    code = (
        "import sys, torch; from torch import nn\n"
        "class Within(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.inner = torch.jit.load({str(path)!r})\n"
        "    def forward(self, y: torch.Tensor) -> torch.Tensor:\n"
        "        return self.inner(y)\n"
        f"out = torch.jit.script(Within())(*torch.load({str(tmp_path / 'inputs.pt')!r}))\n"
        f"torch.save(out, {str(tmp_path / 'out.pt')!r}); sys.exit('nodeshape' in sys.modules)\n"
    )
    (tmp_path / "run.py").write_text(code)
    assert subprocess.run([sys.executable, tmp_path / "run.py"]).returncode == 0
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), module(*inputs(7)), atol=CLOSE, rtol=0)


def test_scripting_a_block_says_what_to_use() -> None:
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot take an ODEBlock.*: use ns.to_torchscript"):
        torch.jit.script(nn.Sequential(ns.ODEBlock(TimeMLP())))


class Stiff(nn.Module):
    """More fast rates than Anderson acceleration keeps differences."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -torch.logspace(0, 5, 40) * (y - 1 - t)


class Branching(nn.Module):
    """What a trace cannot follow: it depends on the numbers."""

    def forward(self, y: Tensor) -> Tensor:
        return y * 2 if len(y) > 2 else y


def test_steps_that_follow_from_times_that_nobody_knows_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return ns.odeint(lambda t, y: self.layer(y), x, torch.linspace(0, 1, 3), method="rk4", step_size=0.5)[-1]

    # to_onnx and the like have seen the times; PyTorch's own exporters have not.
    with pytest.raises(ValueError, match=r"give steps=\.\.\. instead of step_size=\.\.\., or t as a list of numbers"):
        torch.export.export(Model(), (torch.randn(2, 3),))


def test_what_differs_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    path.write_text("earlier")
    with pytest.raises(
        ValueError, match=r"model.ts differs from the module by .* at batch size [13], tolerance 0.0001"
    ):
        ns.to_torchscript(Branching(), torch.ones(3, 2), path)
    stiff = Around(Stiff(), method="implicit_euler", steps=2, options={"stage_solver": "newton"})
    with pytest.raises(ValueError, match="with 30 evaluations of f in each implicit stage the outputs come within"):
        ns.to_torchscript(stiff, torch.ones(3, 40), path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (torch.sin, torch.ones(2, 2), r"module must be an nn.Module, got builtin_function_or_method"),
        (nn.Tanh(), (torch.ones(2, 2), torch.ones(1)), r"example_inputs are 2 arguments, but forward"),
        (nn.Tanh(), (3,), r"the input input is int 3, but a file takes tensors only"),
        (nn.Tanh(), np.ones((9, 9)), r"the input input is ndarray array.* \.\.\., but a file takes tensors only"),
        (nn.Tanh(), torch.ones(2, 2).to_sparse(), r"the input input is sparse.*to_dense"),
        (nn.Tanh(), torch.ones(0, 2), r"example_inputs hold no sample"),
        (nn.Tanh(), torch.ones(2, 2, device="meta"), r"the input input is on meta: export on the CPU"),
    ],
)
def test_inputs_that_a_file_cannot_have_get_one_line(
    module: nn.Module, inputs: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ns.to_torchscript(module, inputs, tmp_path / "model.ts")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="there is no folder"):
        ns.to_torchscript(nn.Tanh(), torch.ones(2, 2), tmp_path / "gone" / "model.ts")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        ns.to_torchscript(nn.Tanh(), torch.ones(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"trajectory must be True or a module.*got str"):
        ns.to_torchscript(nn.Tanh(), torch.ones(2, 2), tmp_path / "model.ts", trajectory="head")


class Rows(nn.Module):
    """A batch normalisation of channels before a linear layer over rows, which is not the layer of its channels."""

    def __init__(self, channels: int, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(kind(channels), nn.Linear(width, width))
        self.block = ns.ODEBlock(TimeMLP(), method="euler", steps=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.layers(x).flatten(1)[:, :3])


@pytest.mark.parametrize(
    ("kind", "channels", "shape"),
    [(nn.BatchNorm2d, 4, (4, 3, 4)), (nn.BatchNorm2d, 2, (2, 3, 5)), (nn.BatchNorm1d, 4, (4, 4))],
)
def test_layers_that_follow_each_other_in_another_way_are_left_as_they_are(
    kind: type[nn.Module], channels: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Rows(channels, shape[-1], kind)
    module(torch.randn(9, *shape))  # which leaves statistics of its own to every channel
    module = module.eval()
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.linspace(0.5, 2.0, channels))
    assert ns.to_onnx(module, torch.randn(3, *shape), tmp_path / "model.onnx").max_difference < 1e-5


@pytest.mark.parametrize("fused", [True, False])
def test_times_between_the_points_of_a_grid_are_exported(fused: bool, tmp_path: Path) -> None:
    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f: nn.Module = ns.MLPDynamics(2, [4])
            if fused:
                self.f = ns.fuse(self.f, torch.zeros(3, 2))

        def forward(self, y: Tensor) -> Tensor:
            times = [1.0, 0.87, 0.4, 0.0]
            return ns.odeint(self.f, y, times, method="rk4", options={"step_size": 0.3}).transpose(0, 1)

    report = ns.to_onnx(Observed(), torch.randn(3, 2), tmp_path / "model.onnx")
    assert report.max_difference < 1e-5 and report.batch_sizes == (1, 3, 7)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        normal = nn.functional.group_norm(self.conv(y), 2)
        return normal.flatten(1).reshape(-1, 4, 5, 5) * t


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_file_holds_no_factor_of_one_no_sum_with_zero_and_no_shape_of_a_shape(shift: float, tmp_path: Path) -> None:
    module = Around(lambda t, y: f(t, y) + torch.full((4, 1, 1), shift), method="euler", steps=4)  # type: ignore[arg-type]
    f = module.kept = Normalised()
    ns.to_onnx(module, states((3, 4, 5, 5)), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    count = {op: sum(node.op_type == op for node in graph.node) for op in ("Mul", "Add", "Reshape", "Shape")}
    # In each of eight steps: times t and h (the first alone at t = 0), the sum of the step, with the shift where there
    # is one, and in and out of groups.
    assert count["Mul"] <= 16 and count["Add"] == (16 if shift else 8)
    assert count["Reshape"] == 16 and count["Shape"] == 0


class Picture(nn.Module):
    """A map that is solved for and read by its largest and mean."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.block = ns.ODEBlock(Conv(), method=method, steps=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.block(x))
        return torch.cat([y.amax(dim=(2, 3)), y.mean(dim=(2, 3)), y.amax(dim=(2, 3), keepdim=True).flatten(1)], dim=1)


@pytest.mark.parametrize("method", ["rk4", "implicit_midpoint"])
def test_tools_that_infer_shapes_take_a_file(method: str, tmp_path: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = ns.to_onnx(Picture(method), states((3, 2, 4, 4)), tmp_path / "model.onnx").path
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    quant_pre_process(path, tmp_path / "prepared.onnx")
    x = states((5, 2, 4, 4))
    torch.testing.assert_close(by_onnx(tmp_path / "prepared.onnx", (x,)), by_onnx(path, (x,)), atol=1e-5, rtol=0)


class Reading(nn.Module):
    """What a trace would hold as it was: a number out of the inputs."""

    def __init__(self, read: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, object]]]) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(2, 2), read

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        y, how = self.read(y, t)
        f = lambda t, y: self.layer(y) * (1 + t)  # noqa: E731
        return ns.odeint(f, y, **{"t": t, "method": "euler", "steps": 2, **how})[-1]


READERS = {
    "from zero": lambda y, t: (y, {"t": torch.stack([t[0], t[0] + 1]), "steps": None, "step_size": 0.25}),
    "normalised": lambda y, t: (y, {"t": (t - t[0]) / (t[-1] - t[0]), "steps": None, "step_size": 0.25}),
    "by an int": lambda y, t: (y * int(t[0]), {}),
    "a scalar of zero": lambda y, t: (y + float(t[0]), {}),
    "large": lambda y, t: (y if y.abs().max() < 10 else -y, {}),
    "equal": lambda y, t: (y if torch.equal(y, y.abs()) else -y, {}),
    "close": lambda y, t: (-y if torch.allclose(y, torch.ones_like(y)) else y, {}),
    "contains": lambda y, t: (-y if 1.0 in y else y, {}),
    "step_size": lambda y, t: (y, {"steps": None, "step_size": 0.25}),
    "item": lambda y, t: (y * y.max().item(), {}),
    "branch": lambda y, t: (y if y.sum() > 0 else y + 1, {}),
    "steps": lambda y, t: (y, {"steps": int(t[-1])}),
}


@pytest.mark.parametrize("kind", READERS)
def test_numbers_read_out_of_inputs_are_refused_and_named(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, examples = Reading(READERS[kind]), (torch.rand(3, 2), torch.tensor([0.0, 0.5, 1.0, 2.0]))
    message = r"test_export_any.py:\d+ reads a number out of the inputs.*compute with tensors.*steps=\.\.\."
    with pytest.raises(ValueError, match=message) as caught:
        ns.to_torchscript(module, examples, tmp_path / "model.ts")
    assert "\n" not in str(caught.value)
    if kind in ("branch", "steps", "step_size", "from zero", "normalised"):  # the other has a message of its own
        with pytest.raises(ValueError, match=message):
            ns.to_pt2(module, examples, tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


def test_numbers_read_out_of_weights_and_checks_of_inputs_are_traced(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end = nn.Parameter(torch.tensor(1.5))

        def forward(self, y: Tensor) -> Tensor:
            if y.isnan().any():
                raise ValueError("not a number")
            return ns.odeint(lambda t, y: -y, y, [0.0, float(self.end)], method="euler", steps=2)[-1]

    assert ns.to_torchscript(Model(), torch.rand(3, 2), tmp_path / "model.ts").max_difference < 1e-6
    with pytest.raises(ValueError, match=r"test_export_any.py:\d+ reads a number out of"):
        ns.to_pt2(Model(), torch.rand(3, 2), tmp_path / "model.pt2")


def test_what_shares_the_batch_by_accident_is_named(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return ns.odeint(lambda t, y: -y, y, t, method="euler", steps=2)[-1]

    message = r"forward takes the examples, but not a batch of 7.*first dimension of y, t;.*another|none of their other"
    with pytest.raises(ValueError, match=message):
        ns.to_torchscript(Model(), (torch.rand(3, 2), torch.tensor([0.0, 0.5, 1.0])), tmp_path / "model.ts")
    report = ns.to_torchscript(Model(), (torch.rand(4, 2), torch.tensor([0.0, 0.5, 1.0])), tmp_path / "model.ts")
    assert report.max_difference < 1e-6


def test_dictionaries_of_several_types_are_refused_by_torchscript_alone(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, y: Tensor) -> dict[str, object]:
            end = ns.odeint(lambda t, y: -y, y, [0.0, 1.0], method="euler", steps=2)[-1]
            return {"end": end, "parts": (end + 1, end - 1)}

    with pytest.raises(ValueError, match=r"TorchScript's dictionaries hold values of one type only.*tensors alone"):
        ns.to_torchscript(Model(), torch.rand(3, 2), tmp_path / "model.ts")
    assert ns.to_pt2(Model(), torch.rand(3, 2), tmp_path / "model.pt2").max_difference < 1e-6


def test_pytorchs_transformer_is_written_as_plain_operations(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, y: Tensor) -> Tensor:
            return ns.odeint(lambda t, y: self.layer(y), y, [0.0, 1.0], method="euler", steps=2)[-1]

    torch.manual_seed(0)
    assert ns.to_onnx(Model(), torch.randn(2, 3, 4), tmp_path / "model.onnx").max_difference < 1e-5
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "how",
    [
        {"adjoint": "continuous"},
        {"adjoint": "reversible"},
        {"options": {"recompute": True}},
        {"options": {"on_failure": "nan"}},
    ],
)
def test_how_gradients_and_failures_are_treated_does_not_keep_a_solve_from_a_file(
    how: dict[str, object], tmp_path: Path
) -> None:
    module, inputs = around("mlp", method="euler", steps=2, **how)
    assert ns.to_pt2(module, inputs(3), tmp_path / "model.pt2").max_difference < 1e-6


def test_an_implicit_solve_without_a_batch_is_recorded(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return ns.odeint(lambda t, y: torch.sin(y), y, [0.0, 1.0], method="implicit_euler", steps=2)[-1]

    assert ns.to_pt2(Model(), torch.rand(6), tmp_path / "model.pt2").max_difference < CLOSE


def test_a_grid_has_a_trajectory(tmp_path: Path) -> None:
    module, inputs = around("mlp", method="euler", options={"step_size": 0.3})
    ns.to_torchscript(module, inputs(3), tmp_path / "model.ts", trajectory=True)
    end, trajectory = torch.jit.load(tmp_path / "model.ts")(*inputs(5))
    assert trajectory.shape == (5, 5, 3)  # 0, 0.3, 0.6, 0.9 and 1
    torch.testing.assert_close(trajectory[:, -1], end)


def test_outputs_named_like_inputs_or_each_other_get_names_of_their_own(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, y: Tensor) -> dict[str, object]:
            end = ns.odeint(lambda t, y: -y, y, [0.0, 1.0], method="euler", steps=2)[-1]
            return {"y": end, "a_b": end + 1, "a": {"b": end + 2}}

    report = ns.to_onnx(Model(), torch.ones(3, 2), tmp_path / "model.onnx")
    names = [x.name for x in onnxruntime.InferenceSession(report.path).get_outputs()]
    assert names == ["output_y", "a_b", "output_a_b"]


def test_a_batch_size_made_a_number_is_explained(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.ones(1, 2))

        def forward(self, y: Tensor) -> Tensor:
            start = self.start.expand(len(y), -1)
            return y + ns.odeint(lambda t, y: -y, start, [0.0, 1.0], method="euler", steps=2)[-1]

    for write in (ns.to_torchscript, ns.to_pt2):
        with pytest.raises(ValueError, match=r"x\.shape\[0\].*len\(x\)"):
            write(Model(), torch.ones(3, 2), tmp_path / "model")


class Own(nn.Module):
    """Solves as users of torchdiffeq write them."""

    def __init__(self, solve: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.solve = nn.Linear(3, 3), solve
        self.start = nn.Parameter(torch.tensor([[0.5, -0.5, 0.2]]))
        self.times: Tensor
        self.register_buffer("times", torch.tensor([0.0, 0.3, 0.5, 1.0]))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * t

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(self, x)


def coupled(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y - y.mean(dim=0, keepdim=True)) * t - y


def with_density(m: Own, x: Tensor) -> Tensor:
    def f(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return m.f(t, state[0]), -state[0].sum(dim=1)

    y, density = ns.odeint(f, (x, torch.zeros(x.shape[0])), [0.0, 1.0], method="implicit_midpoint", steps=2)
    return torch.cat([y[-1], density[-1][:, None]], dim=1)


NEWTON = {"stage_solver": "newton"}
SOLVES: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "step_size": lambda m, x: ns.odeint(
        m.f, x, torch.tensor([0.0, 0.25, 1.0]), method="rk4", options={"step_size": 0.1}
    )[-1],
    "two solves": lambda m, x: ns.odeint(
        m.f, ns.odeint(m.f, x, m.times, step_size=0.25)[-1], torch.tensor([1.0, 0.5]), method="euler", step_size=0.1
    )[-1],
    "irregular": lambda m, x: ns.odeint(m.f, x, m.times, method="implicit_midpoint", steps=2).sum(dim=0),
    "coupled": lambda m, x: ns.odeint(coupled, x, [0.0, 1.0], method="implicit_midpoint", steps=3)[-1],
    "density": with_density,
    "constant start": lambda m, x: x + ns.odeint(m.f, m.start, [0.0, 1.0], method="implicit_euler", steps=2)[-1],
}


@pytest.mark.parametrize("write", [ns.to_onnx, ns.to_torchscript, ns.to_pt2])
@pytest.mark.parametrize("solve", SOLVES)
def test_solves_as_users_of_torchdiffeq_write_them(solve: str, write: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Own(SOLVES[solve])
    path = write(module, torch.randn(5, 3), tmp_path / "model.pt2").path
    for batch in (1, 5, 9):
        x = torch.randn(batch, 3)
        if write is ns.to_onnx:
            (found,) = by_onnx(path, (x,))
        else:
            found = (torch.jit.load(path) if write is ns.to_torchscript else torch.export.load(path).module())(x)
        torch.testing.assert_close(found, module(x), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("write", [ns.to_onnx, ns.to_torchscript, ns.to_pt2])
def test_a_stage_that_was_harder_than_in_the_examples_is_close_or_nan(write: Callable, tmp_path: Path) -> None:
    class Cubic(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return ns.odeint(lambda t, y: -(y**3), y, [0.0, 1.0], method="implicit_euler", steps=4)[-1]

    torch.manual_seed(0)
    path = write(Cubic(), 0.1 * torch.randn(5, 4), tmp_path / "model.pt2").path
    x = torch.cat([0.1 * torch.randn(3, 4), torch.randn(3, 4), 50.0 * torch.randn(3, 4)])
    exact = ns.odeint(lambda t, y: -(y**3), x, [0.0, 1.0], method="implicit_euler", steps=4, options=NEWTON)[-1]
    if write is ns.to_onnx:
        (found,) = by_onnx(path, (x,))
    else:
        found = (torch.jit.load(path) if write is ns.to_torchscript else torch.export.load(path).module())(x)
    lost = found.isnan().any(dim=1)
    torch.testing.assert_close(found[:3], exact[:3], atol=CLOSE, rtol=0)
    torch.testing.assert_close(found[~lost], exact[~lost], atol=5e-3, rtol=0)
    assert lost[6:].all() or write is not ns.to_torchscript, "a trace takes as many evaluations as the examples"


def test_the_largest_of_a_map_is_right_for_every_type_and_for_masked_places(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, kept: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = ns.odeint(lambda t, y: -y, x, [0.0, 1.0], method="rk4", steps=2)[-1]
            top = y.masked_fill(~kept, -torch.inf).amax(dim=(2, 3))
            return torch.where(top == -torch.inf, 0.0, top), whole.amax(dim=(2, 3)), y.double().amax(dim=(2, 3))

    torch.manual_seed(0)
    x, kept, whole = (
        torch.randn(3, 2, 4, 4),
        torch.ones(3, 2, 4, 4, dtype=torch.bool),
        torch.arange(96).reshape(3, 2, 4, 4),
    )
    path = ns.to_onnx(Masked(), (x, kept, whole), tmp_path / "model.onnx").path
    kept = kept.clone()
    kept[1, 0] = False
    for found, expected in zip(by_onnx(path, (x, kept, whole)), Masked()(x, kept, whole), strict=True):
        torch.testing.assert_close(found, expected)


def test_names_of_users_are_kept_apart_from_those_that_are_made(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v0, self.c0 = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x0: Tensor, v1: Tensor, endless: Tensor, steps: Tensor) -> dict[str, Tensor]:
            f = lambda t, y: self.v0 - torch.sin(y) * self.c0  # noqa: E731
            y = ns.odeint(f, x0 + v1 + endless * steps, [0.0, 1.0], method="implicit_euler", steps=2)[-1]
            return {"v2": y, "steps": y + v1, "c1": y.reshape(-1, 1, 3).reshape(-1, 3)}

    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 3) for _ in range(4))
    path = ns.to_onnx(Named(), inputs, tmp_path / "model.onnx").path
    assert [x.name for x in onnx.load(path).graph.output] == ["v2", "output_steps", "c1"]
    for found, expected in zip(by_onnx(path, inputs), Named()(*inputs).values(), strict=True):
        torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    with pytest.raises(ValueError, match=r"loop=True gives the file an input steps.*rename it"):
        ns.to_onnx(Named(), inputs, tmp_path / "looped.onnx", loop=True)


def test_a_loop_with_steps_of_its_own_and_reads_in_a_loop_are_told_apart(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self, branches: bool) -> None:
            super().__init__()
            self.branches = branches

        def forward(self, x: Tensor) -> Tensor:
            if self.branches and x.sum() > 0:
                x = x + 1
            y = ns.odeint(lambda t, y: -y, x, [0.0, 1.0], method="euler", steps=4)[-1]
            return ns.odeint(lambda t, y: -y, y, torch.tensor([0.0, 1.0]), method="euler", step_size=0.25)[-1]

    x = torch.rand(3, 2)
    path = ns.to_onnx(Two(False), x, tmp_path / "model.onnx", loop=True).path
    torch.testing.assert_close(by_onnx(path, (x[:1],))[0], Two(False)(x[:1]), atol=CLOSE, rtol=0)
    with pytest.raises(ValueError, match=r"test_export_any.py:\d+ reads a number out of the inputs"):
        ns.to_onnx(Two(True), x, tmp_path / "other.onnx", loop=True)


def test_another_threads_solve_is_none_of_an_exports_business() -> None:
    from threading import Thread

    from nodeshape._ode.unrolled import Unrolled, unrolled

    found = []

    def solve() -> None:
        y = torch.full((2, 2), 3.0)
        found.append(ns.odeint(lambda t, y: -(y**3), y, [0.0, 1.0], method="implicit_euler", steps=2)[-1])

    solve()
    how = Unrolled(iterations=2, steps=1)
    with unrolled(how):
        thread = Thread(target=solve)
        thread.start()
        thread.join()
    assert torch.equal(found[0], found[1]) and not how.times and not how.implicit


@pytest.mark.parametrize("scale", [1e-23, 3e-22, 1e19])
def test_a_traced_stage_whose_squares_overflow_or_underflow_is_right_or_nan(scale: float) -> None:
    class Stiffer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            f = lambda t, y: -0.5 * y * (1 + 0.1 * torch.tanh(t))  # noqa: E731
            return ns.odeint(f, x, [0.0, 1.0], method="implicit_midpoint", steps=2)[-1]

    x = torch.linspace(0.5, 1.0, 6).reshape(3, 2) * scale
    found, expected = torch.jit.trace(Stiffer(), x, check_trace=False)(x), Stiffer()(x)
    good = ~found.isnan()
    torch.testing.assert_close(found[good] / scale, expected[good] / scale, atol=1e-4, rtol=0)


def test_a_module_that_is_first_solved_while_it_is_exported_is_what_it_was_afterwards() -> None:
    lines = (
        "import torch, nodeshape as ns",
        "block = ns.ODEBlock(ns.MLPDynamics(3, (8,)), method='rk4', steps=2)",
        "torch.export.export(block, (torch.ones(2, 3),))",
        "print(type(block(torch.ones(2, 3))).__name__)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Tensor"]
