"""The fused ops as citizens of PyTorch: opcheck, compilers, modes, processes, threads; and what they refuse."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from copy import deepcopy
from math import prod

import pytest
import torch
from fused_reference import ADJOINTS, random_conv
from torch import nn

import nodeshape as ns
from nodeshape._ode import fused
from nodeshape._ode.method import SOURCE_METHODS

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
TIMES = torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)
TANH = 0


def scheme(adjoint="discrete", theta=0.5, steps=(2, 3), tolerance=1e-10, iterations=50, every=0):
    return [list(steps), theta, tolerance, iterations, fused.ADJOINTS.index(adjoint), every, 1e-2]


def conv_arguments(grad=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    weights = [x.detach().to(dtype).requires_grad_(grad) for x in random_conv(4).parameters()]
    return torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=grad), TIMES, weights, *scheme(**options)


def mlp_arguments(grad=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    weights = [x.detach().to(dtype).requires_grad_(grad) for x in ns.MLPDynamics(3, (5,)).parameters()]
    return torch.randn(4, 3, dtype=dtype, requires_grad=grad), TIMES, weights, TANH, *scheme(**options)


OPS = [("conv_solve", conv_arguments), ("mlp_solve", mlp_arguments)]


def op(name):
    return getattr(torch.ops.nodeshape, name).default


@pytest.mark.parametrize("adjoint", ["none", *ADJOINTS])
@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_forward_op_passes_opcheck(name, arguments, adjoint):
    given = arguments(grad=adjoint != "none", adjoint=adjoint, every=2)
    torch.library.opcheck(op(name), given)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_backward_op_passes_opcheck(name, arguments, adjoint):
    y0, t, *rest = arguments(grad=False, adjoint=adjoint, every=2)
    ys, stages, *_ = op(name)(y0, t, *rest)
    torch.library.opcheck(op(f"{name}_backward"), (torch.randn_like(ys), ys, stages, t, *rest))


@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_gradients_are_those_of_finite_differences(name, arguments):
    y0, t, weights, *rest = arguments(tolerance=1e-13)
    t = t.clone().requires_grad_()
    function = lambda y, s, *w: op(name)(y, s, list(w), *rest)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (y0, t, *weights), atol=1e-5, rtol=1e-4, fast_mode=True)


def network(dynamics):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = dynamics
            self.register_buffer("t", torch.tensor([0.0, 1.0], dtype=torch.float64))

        def forward(self, y):
            weights = fused.weights_for(self.block, y)
            ys, *_ = fused.solve(
                self.block,
                weights,
                y,
                self.t,
                [4],
                SOURCE_METHODS["implicit_midpoint"],
                "discrete",
                1e-5,
                50,
                None,
                1e-2,
            )
            return ys[-1].relu()

    return Network()


CASES = [(lambda: random_conv(4), (3, 4, 6, 6)), (lambda: ns.MLPDynamics(3, (8,)), (5, 3))]


@pytest.mark.parametrize(("dynamics", "shape"), CASES)
def test_compiled_module_gives_the_same_numbers_and_gradients(dynamics, shape):
    torch.manual_seed(0)
    f = network(dynamics())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (f, compiled):
        y0 = torch.linspace(-1, 2, prod(shape)).sin().reshape(shape).requires_grad_()
        f.zero_grad()
        out = function(y0)
        out.square().sum().backward()
        grads.append((out.detach(), y0.grad, *(x.grad.clone() for x in f.parameters())))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dynamics", "shape"), CASES)
def test_exported_program_gives_the_same_numbers(dynamics, shape):
    f = network(dynamics())
    y0 = torch.rand(shape)
    with torch.no_grad():
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        program = torch.export.export(f, (y0,), dynamic_shapes=(batch,))
        for y in (y0, y0[:2]):
            torch.testing.assert_close(program.module()(y), f(y))


def test_scripted_function_gives_the_same_numbers():
    @torch.jit.script
    def scripted(y0: torch.Tensor, t: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.nodeshape.mlp_solve(y0, t, weights, 0, [2, 3], 0.5, 1e-10, 50, 0, 0, 1e-2)[0]

    y0, t, weights, *rest = mlp_arguments(grad=False, adjoint="none")
    assert torch.equal(scripted(y0, t, weights), op("mlp_solve")(y0, t, weights, *rest)[0])


def test_modes_do_not_change_the_numbers():
    f, y0 = random_conv(4), torch.randn(2, 4, 5, 5)
    recorded = ns.odeint(f, y0, TIMES, steps=3)
    with torch.no_grad():
        assert torch.equal(ns.odeint(f, y0, TIMES, steps=3), recorded)
    with torch.inference_mode():
        assert torch.equal(ns.odeint(f, y0, TIMES, steps=3), recorded)
    copies = (deepcopy(f), pickle.loads(pickle.dumps(f)))
    for other in copies:
        assert torch.equal(ns.odeint(other, y0, TIMES, steps=3), recorded)


def test_memory_layout_does_not_change_the_numbers():
    f, y0 = random_conv(4), torch.randn(3, 4, 6, 6)
    expected = ns.odeint(f, y0, TIMES, steps=3)
    strided = torch.randn(6, 4, 6, 12)[::2, :, :, ::2].copy_(y0)
    for y in (y0.to(memory_format=torch.channels_last), strided):
        assert not y.is_contiguous()
        assert torch.equal(ns.odeint(f, y, TIMES, steps=3), expected)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 5))

    def forward(self, t, y):
        return self.net(y) * t.cos()


@pytest.mark.parametrize("name", ["conv", "mlp", "program"])
def test_eight_threads_on_one_model_get_the_same_bits(name):
    if name == "conv":
        f, y0 = random_conv(8), torch.randn(4, 8, 8, 8)
    elif name == "mlp":
        f, y0 = ns.MLPDynamics(3, (16,)), torch.randn(70, 3)
    else:
        f, y0 = ns.fuse(Own(), torch.randn(2, 5)), torch.randn(70, 5)

    def solve():
        start = y0.clone().requires_grad_()
        ys = ns.odeint(f, start, TIMES, steps=5, method="implicit_midpoint")
        weights = [x for x in f.parameters() if x.requires_grad]
        return [ys.detach(), *torch.autograd.grad(ys.square().sum(), [start, *weights])]

    expected, results = solve(), []
    threads = [threading.Thread(target=lambda: results.append(solve())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(x, y) for found in results for x, y in zip(found, expected))


def _solve_in_child(queue, f, y0):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with torch.no_grad():
        queue.put(ns.odeint(f, y0, TIMES, steps=3).numpy())


def test_forked_process_may_solve():
    f, y0 = random_conv(4), torch.randn(2, 4, 5, 5)
    expected = ns.odeint(f, y0, TIMES, steps=3).detach().numpy()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_solve_in_child, args=(queue, f, y0))
    child.start()
    result = queue.get(timeout=300)
    child.join()
    assert (result == expected).all()


def test_second_derivative_is_refused_not_wrong():
    y0, *rest = mlp_arguments()
    ys = op("mlp_solve")(y0, *rest)[0]
    (grad,) = torch.autograd.grad(ys.square().sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_gradient_of_a_solve_without_adjoint_is_refused():
    y0, *rest = mlp_arguments(adjoint="none")
    with pytest.raises(RuntimeError, match="asked for no gradient"):
        op("mlp_solve")(y0, *rest)[0].sum().backward()


def test_unsolved_stage_is_an_error_that_says_what_to_do():
    f, y0 = random_conv(4), torch.randn(6, 4, 5, 5)
    arguments = {"method": "implicit_euler", "steps": 3, "options": {"max_stage_iterations": 2}}
    with pytest.raises(ns.StageSolveError, match=r"6 of 6 samples .* forward stage equation at t=0 .* smaller steps"):
        ns.odeint(f, y0, TIMES, **arguments)


def test_drift_of_the_reversed_trajectory_is_an_error():
    """y' = -60 y contracts by e^-60; what rounding left cannot be expanded back."""
    f = ns.MLPDynamics(2, ())
    with torch.no_grad():
        f.layers[0].weight.copy_(torch.tensor([[-60.0, 1.0, 0.0], [0.0, -50.0, 0.0]]))
    y0 = torch.randn(3, 2, requires_grad=True)
    ys = ns.odeint(f, y0, [0.0, 1.0], method="implicit_midpoint", steps=40, adjoint="reversible")
    with pytest.raises((ns.ReversalDriftError, ns.StageSolveError)):
        ys.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 5, 6, dtype=torch.float64)}, "y0 has 3 channels but conv1.weight expects 4"),
        ({0: torch.zeros(2, 4, 5, dtype=torch.float64)}, "y0 must be \\[batch, channels, height, width\\]"),
        ({0: torch.zeros(2, 4, 5, 6)}, "norm1.weight must have the dtype of y0"),
        ({0: torch.zeros(2, 4, 5, 6, dtype=torch.float16)}, "y0 must be float32 or float64"),
        ({1: TIMES.half()}, "t must be a one-dimensional float32 or float64 tensor"),
        ({2: []}, "expected the 10 parameters of ConvDynamics, got 0"),
        ({3: [1]}, "got 1 step counts for 3 observation times"),
        ({3: [1, 0]}, "at least 1 step, got 0"),
        ({3: [1, -3]}, "at least 1 step, got -3"),
        ({4: 0.3}, "theta must be 0"),
        ({5: 0.0}, "tolerance must be positive"),
        ({5: float("inf")}, "tolerance must be positive and finite, got inf"),
        ({6: 0}, "max_iterations must be at least 1"),
        ({7: 4}, "unknown adjoint 4: choose one of 0 \\(none\\), 1"),
        ({8: -1}, "checkpoint_every must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = list(conv_arguments(grad=False))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=f"conv_solve: .*{message}"):
        op("conv_solve")(*arguments)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("t", "steps", "message"),
    [
        (times(-1e308, 1e308), [1], "finite length, got -1e\\+308 to 1e\\+308"),
        (times(1e308, -1e308), [1], "finite length, got 1e\\+308 to -1e\\+308"),
        (times(0, float("inf")), [1], "t must be finite, got inf"),
        (times(float("nan"), 1), [1], "t must be finite, got -?nan"),
        (times(0, 1, 0.5), [1, 1], "strictly, got 1 and 0.5 next to each other"),
        (times(0, 0), [1], "strictly, got 0 and 0 next to each other"),
        (times(0, 5e-324), [2], "2 steps from 0 to 4.94066e-324 have length 0"),
        (times(0, 1, 2, 3, 4), [2**62] * 4, "at most 10000000 steps, got 4611686018427387904"),
        (times(0, 1), [2**63 - 1], "at most 10000000 steps, got 9223372036854775807"),
        (times(0, 1), [10_000_001], "at most 10000000 steps, got 10000001"),
    ],
)
@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_grid_that_no_solve_can_step_through_is_refused(name, arguments, t, steps, message, theta):
    y0, _, *rest = arguments(grad=False, theta=theta, steps=steps)
    ys = y0.expand(len(t), *y0.shape)
    with pytest.raises(RuntimeError, match=f"^{name}: .*{message}"):
        op(name)(y0, t, *rest)
    with pytest.raises(RuntimeError, match=f"^{name}_backward: .*{message}"):
        op(f"{name}_backward")(ys, ys, ys[:0], t, *rest)


@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_sizes_that_overflow_are_refused(name, arguments):
    """The batch is a view of one sample, so that only what the op would make of it is large."""
    largest, rows = 2**63 - 1, 20_000_000
    y0, t, *rest = arguments(grad=False, steps=[rows // 2] * 2)
    maps = 3 if name == "conv_solve" else 1
    for numbers, output, adjoint in [
        (rows * maps * y0[0].numel(), "stages", "discrete"),
        (len(t) * y0[0].numel(), "ys", "none"),
    ]:
        batch = largest // numbers  # so that the elements can be counted and the bytes cannot
        rest[-3] = fused.ADJOINTS.index(adjoint)
        y = y0[:1].expand(batch, *y0.shape[1:])
        ys = y.expand(len(t), *y.shape)
        with pytest.raises(RuntimeError, match=f"^{name}: {output} of size .* more than 2\\^63 bytes"):
            op(name)(y, t, *rest)
        with pytest.raises(RuntimeError, match=f"^{name}_backward: {output} of size .* more than 2\\^63 bytes"):
            op(f"{name}_backward")(ys, ys, y0[:0], t, *rest)


def test_an_empty_batch_of_samples_that_no_kernel_can_count_is_refused():
    y0, *rest = conv_arguments(grad=False)
    y = y0.new_empty(0, 4, 2**29, 2**30)
    with pytest.raises(RuntimeError, match=r"^conv_solve: a sample of y0, \[0, 4, 536870912, .* is too large"):
        op("conv_solve")(y, *rest)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_backward_op_reads_no_further_than_its_tensors(name, arguments, adjoint):
    y0, t, *rest = arguments(grad=False, adjoint=adjoint, every=2)
    ys, stages, *_ = op(name)(y0, t, *rest)
    for wrong in (stages.new_empty(len(stages) + 1, *stages.shape[1:]), stages[:, :1], stages[..., :1], stages[0:0, 0]):
        with pytest.raises(RuntimeError, match=f"^{name}_backward: stages is .* but must be "):
            op(f"{name}_backward")(ys, ys, wrong, t, *rest)
    for grad_ys in (ys[:2], ys[:, :1], ys[..., :1]):
        with pytest.raises(RuntimeError, match=f"^{name}_backward: grad_ys is .* but must be "):
            op(f"{name}_backward")(grad_ys, ys, stages, t, *rest)
    with pytest.raises(RuntimeError, match=f"^{name}_backward: ys is .* but must be "):
        op(f"{name}_backward")(ys[:2], ys[:2], stages, t, *rest)


def test_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("NODESHAPE_ISA", "mmx")
    with pytest.raises(RuntimeError, match="NODESHAPE_ISA=mmx is not known here: choose one of"):
        op("mlp_solve")(*mlp_arguments(grad=False))


def test_altered_modules_take_the_plain_path():
    y0 = torch.randn(2, 4, 5, 5)
    assert len(fused.weights_for(ns.ConvDynamics(4), y0)) == 10
    hooked = ns.ConvDynamics(4)
    hooked.norm2.register_forward_hook(lambda *_: None)
    replaced = ns.ConvDynamics(4)
    replaced.norm1 = nn.Identity()

    class Derived(ns.ConvDynamics):
        pass

    for f in (hooked, replaced, Derived(4)):
        assert isinstance(fused.weights_for(f, y0), str)
