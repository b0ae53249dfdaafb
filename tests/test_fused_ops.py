"""The fused ops as citizens of PyTorch: opcheck, compilers, modes, processes, threads; and what they refuse."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from copy import deepcopy
from itertools import product
from math import prod

import pytest
import torch
from fused_reference import ADJOINTS, random_conv
from torch import nn

import nodeshape as ns
from nodeshape._models.dynamics import conv_program, mlp_program
from nodeshape._ode import fused, program_op
from nodeshape._ode.method import METHODS as ALL_METHODS
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.program import Builder, Ref

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
TIMES = torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)
METHODS = {0.0: "euler", 0.5: "implicit_midpoint", 1.0: "implicit_euler"}
#: Where the op's arguments stand.
TABLEAU, STEPS, TOLERANCE, ITERATIONS, ADJOINT, KEPT, EVERY, DRIFT = range(5, 13)


def arguments_of(f, y0, grad, adjoint="discrete", theta=0.5, steps=(2, 3), tolerance=1e-10, iterations=50, every=0):
    weights = [x.detach().to(y0.dtype).requires_grad_(grad) for x in f.parameters()]
    program = fused.program_of(f, weights, y0)
    tableau = program_op.tableau_of(SOURCE_METHODS[METHODS[theta]])[0]
    mode = program_op.ADJOINTS.index(adjoint)
    rest = [list(steps), tolerance, iterations, mode, program.maps_kept, every, 1e-2]
    return y0.requires_grad_(grad), TIMES, weights, program.code, program.constants, tableau, *rest


def conv_arguments(grad=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return arguments_of(random_conv(4), torch.randn(2, 4, 5, 6, dtype=dtype), grad, **options)


def mlp_arguments(grad=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return arguments_of(ns.MLPDynamics(3, (5,)), torch.randn(4, 3, dtype=dtype), grad, **options)


OPS = [pytest.param(conv_arguments, id="conv"), pytest.param(mlp_arguments, id="mlp")]
solve, solve_backward = (getattr(torch.ops.nodeshape, name).default for name in ("solve", "solve_backward"))


@pytest.mark.parametrize("adjoint", ["none", *ADJOINTS])
@pytest.mark.parametrize("arguments", OPS)
def test_forward_op_passes_opcheck(arguments, adjoint):
    given = arguments(grad=adjoint != "none", adjoint=adjoint, every=2)
    torch.library.opcheck(solve, given)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("arguments", OPS)
def test_backward_op_passes_opcheck(arguments, adjoint):
    y0, t, *rest = arguments(grad=False, adjoint=adjoint, every=2)
    ys, stages, *_ = solve(y0, t, *rest)
    torch.library.opcheck(solve_backward, (torch.randn_like(ys), ys, stages, t, *rest))


@pytest.mark.parametrize("arguments", OPS)
def test_gradients_are_those_of_finite_differences(arguments):
    y0, t, weights, *rest = arguments(tolerance=1e-13)
    t = t.clone().requires_grad_()
    function = lambda y, s, *w: solve(y, s, list(w), *rest)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (y0, t, *weights), atol=1e-5, rtol=1e-4, fast_mode=True)


def network(dynamics):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = dynamics
            self.register_buffer("t", torch.tensor([0.0, 1.0], dtype=torch.float64))

        def forward(self, y):
            weights = fused.weights_for(self.block, y)
            ys, *_ = program_op.solve(
                fused.program_of(self.block, weights, y),
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
@pytest.mark.parametrize("method", ["euler", "implicit_midpoint", "rk4"])
def test_compiled_block_takes_any_batch_and_compiles_anew_for_another_map(dynamics, shape, method):
    torch.compiler.reset()  # which counts what one function was compiled for
    block = ns.ODEBlock(dynamics(), method=method, steps=3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in [shape, (2, *shape[1:]), (7, *shape[1:]), *([(2, 4, 9, 7)] if len(shape) == 4 else [])]:
        y0 = torch.randn(sizes)
        torch.testing.assert_close(compiled(y0), block(y0))


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
    def scripted(
        y0: torch.Tensor,
        t: torch.Tensor,
        weights: list[torch.Tensor],
        code: torch.Tensor,
        constants: torch.Tensor,
        tableau: torch.Tensor,
    ) -> torch.Tensor:
        scheme = ([2, 3], 1e-10, 50, 0, 1, 0, 1e-2)
        return torch.ops.nodeshape.solve(y0, t, weights, code, constants, tableau, *scheme)[0]

    arguments = mlp_arguments(grad=False, adjoint="none")
    assert torch.equal(scripted(*arguments[:6]), solve(*arguments)[0])


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
    ys = solve(y0, *rest)[0]
    (grad,) = torch.autograd.grad(ys.square().sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_gradient_of_a_solve_without_adjoint_is_refused():
    y0, *rest = mlp_arguments(adjoint="none")
    with pytest.raises(RuntimeError, match="asked for no gradient"):
        solve(y0, *rest)[0].sum().backward()


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
        (
            {0: torch.zeros(2, 3, 5, 6, dtype=torch.float64)},
            "a sample of y0 has 90 elements but the program expects 120",
        ),
        ({0: torch.zeros(2, 4, 5, 6)}, "weights.0 must have the dtype of y0"),
        ({0: torch.zeros(2, 4, 5, 6, dtype=torch.float16)}, "y0 must be float32 or float64"),
        ({1: TIMES.half()}, "t must be a one-dimensional float32 or float64 tensor"),
        ({2: []}, "it is for 10 weights, got 0"),
        ({STEPS: [1]}, "got 1 step counts for 3 observation times"),
        ({STEPS: [1, 0]}, "at least 1 step, got 0"),
        ({STEPS: [1, -3]}, "at least 1 step, got -3"),
        ({TABLEAU: torch.full((3, 1), 0.3, dtype=torch.float64)}, "theta must be 0"),
        ({TABLEAU: torch.zeros(3, 1)}, "tableau must be a dense CPU tensor of its type"),
        ({TABLEAU: torch.zeros(3, 2, dtype=torch.float64)}, "tableau must be \\[stages \\+ 2, stages\\]"),
        ({TOLERANCE: 0.0}, "tolerance must be positive"),
        ({TOLERANCE: float("inf")}, "tolerance must be positive and finite, got inf"),
        ({ITERATIONS: 0}, "max_iterations must be at least 1"),
        ({ADJOINT: 4}, "unknown adjoint 4: choose one of 0 \\(none\\), 1"),
        ({EVERY: -1}, "checkpoint_every must be"),
        ({DRIFT: 0.0}, "drift_tolerance must be positive"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = list(conv_arguments(grad=False))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=f"(solve|program): .*{message}"):
        solve(*arguments)


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
@pytest.mark.parametrize("arguments", OPS)
def test_grid_that_no_solve_can_step_through_is_refused(arguments, t, steps, message, theta):
    y0, _, *rest = arguments(grad=False, theta=theta, steps=steps)
    ys = y0.expand(len(t), *y0.shape)
    with pytest.raises(RuntimeError, match=f"^solve: .*{message}"):
        solve(y0, t, *rest)
    with pytest.raises(RuntimeError, match=f"^solve_backward: .*{message}"):
        solve_backward(ys, ys, ys[:0], t, *rest)


@pytest.mark.parametrize("arguments", OPS)
def test_sizes_that_overflow_are_refused(arguments):
    """The batch is a view of one sample, so that only what the op would make of it is large."""
    largest, rows = 2**63 - 1, 20_000_000
    y0, t, *rest = arguments(grad=False, steps=[rows // 2] * 2)
    maps = rest[KEPT - 2]
    for numbers, output, adjoint in [
        (rows * maps * y0[0].numel(), "stages", "discrete"),
        (len(t) * y0[0].numel(), "ys", "none"),
    ]:
        batch = largest // numbers  # so that the elements can be counted and the bytes cannot
        rest[ADJOINT - 2] = program_op.ADJOINTS.index(adjoint)
        y = y0[:1].expand(batch, *y0.shape[1:])
        ys = y.expand(len(t), *y.shape)
        with pytest.raises(RuntimeError, match=f"^solve: {output} of size .* more than 2\\^63 bytes"):
            solve(y, t, *rest)
        with pytest.raises(RuntimeError, match=f"^solve_backward: {output} of size .* more than 2\\^63 bytes"):
            solve_backward(ys, ys, y0[:0], t, *rest)


def test_an_empty_batch_of_samples_that_no_kernel_can_count_is_refused():
    y0, *rest = conv_arguments(grad=False)
    y = y0.new_empty(0, 4, 2**29, 2**30)
    with pytest.raises(RuntimeError, match=r"^solve: a sample of y0, \[0, 4, 536870912, .* is too large"):
        solve(y, *rest)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("arguments", OPS)
def test_backward_op_reads_no_further_than_its_tensors(arguments, adjoint):
    y0, t, *rest = arguments(grad=False, adjoint=adjoint, every=2)
    ys, stages, *_ = solve(y0, t, *rest)
    for wrong in (stages.new_empty(len(stages) + 1, *stages.shape[1:]), stages[:, :1], stages[..., :1], stages[0:0, 0]):
        with pytest.raises(RuntimeError, match=r"^solve_backward: stages is .* but must be "):
            solve_backward(ys, ys, wrong, t, *rest)
    for grad_ys in (ys[:2], ys[:, :1], ys[..., :1]):
        with pytest.raises(RuntimeError, match=r"^solve_backward: grad_ys is .* but must be "):
            solve_backward(grad_ys, ys, stages, t, *rest)
    with pytest.raises(RuntimeError, match=r"^solve_backward: ys is .* but must be "):
        solve_backward(ys[:2], ys[:2], stages, t, *rest)


def test_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("NODESHAPE_ISA", "mmx")
    with pytest.raises(RuntimeError, match="NODESHAPE_ISA=mmx is not known here: choose one of"):
        solve(*mlp_arguments(grad=False))


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


class OwnBlock(nn.Module):
    """What ConvDynamics computes, written by somebody else; or nearly."""

    def __init__(self, eps=1e-5, groups=4, activation=torch.relu, time_last=False, bias=True, kernel=3):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, 4, eps=eps) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(5, 4, kernel, padding=kernel // 2, bias=bias) for _ in range(2))
        self.activation, self.time_last = activation, time_last

    def forward(self, t, y):
        for norm, conv in zip(self.norms, self.convs):
            y = self.activation(norm(y))
            time = t.expand(y.shape[0], 1, *y.shape[2:])
            y = conv(torch.cat([y, time] if self.time_last else [time, y], dim=1))
        return self.norms[2](y)


def has_kernel_of_its_own(f, y0, method="euler"):
    """Whether a step keeps three states, as the kernel of ConvDynamics does and layers do not."""
    tableau = program_op.tableau_of(ALL_METHODS[method])[0]
    weights = [x.detach() for x in f.weights_for(y0)]
    scheme = (f.program.code, f.program.constants, tableau, [2], 1e-6, 50, program_op.ADJOINTS.index("discrete"))
    _, stages, *_ = solve(y0, TIMES[:2], weights, *scheme, 0, 0, 1e-2)
    return stages.numel() == 3 * 2 * y0.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "implicit_euler", "implicit_midpoint"])
def test_a_users_block_of_the_same_layers_has_the_kernel_of_convdynamics(method, dtype):
    torch.manual_seed(0)
    y0 = torch.randn(20, 4, 5, 6, dtype=dtype)
    own, ours = OwnBlock().to(dtype), ns.ConvDynamics(4).to(dtype)
    layers = [own.norms[0], own.convs[0], own.norms[1], own.convs[1], own.norms[2]]
    ours.load_state_dict(dict(zip(ours.state_dict(), (x for layer in layers for x in layer.parameters()))))
    fused_own = ns.fuse(own, y0)
    assert has_kernel_of_its_own(fused_own, y0, method)
    found, expected = (ns.odeint(f, y0, TIMES, method=method, steps=3) for f in (fused_own, ours))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "other",
    [
        {"eps": 1e-4},
        {"groups": 2},
        {"activation": torch.tanh},
        {"activation": torch.nn.functional.leaky_relu},
        {"time_last": True},
        {"bias": False},
        {"kernel": 1},
    ],
)
def test_a_block_of_nearly_the_same_layers_has_not(other):
    torch.manual_seed(0)
    y0 = torch.randn(3, 4, 5, 6)
    f = ns.fuse(OwnBlock(**other), y0)
    assert not has_kernel_of_its_own(f, y0)
    assert not has_kernel_of_its_own(ns.fuse(OwnBlock(), y0), y0, "rk4")
    found, expected = (ns.odeint(g, y0, TIMES, method="euler", steps=3) for g in (f, f.func))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dynamics", "shape"), [*CASES, (lambda: ns.MLPDynamics(3, (8, 5), "softplus"), (5, 3))])
def test_what_is_written_down_is_what_is_traced(dynamics, shape):
    """The programs of ConvDynamics and MLPDynamics against those that fuse makes, in any method and mode."""
    torch.manual_seed(0)
    f = dynamics().double()
    traced = ns.fuse(f, torch.randn(shape, dtype=torch.float64))
    for method, adjoint in product(("euler", "implicit_euler", "rk4", "dopri5", "trbdf2"), ("discrete", "continuous")):
        if adjoint == "continuous" and method != "euler":
            continue
        results = []
        for g in (f, traced):
            y0 = torch.linspace(-1, 2, prod(shape), dtype=torch.float64).sin().reshape(shape).requires_grad_()
            assert ns.backend(g, y0, TIMES, method=method, steps=3, adjoint=adjoint).name == "fused"
            ys = ns.odeint(g, y0, TIMES, method=method, steps=3, adjoint=adjoint)
            results.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, *f.parameters()])])
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dynamics", "shape"), CASES)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_error_control_of_ours_is_the_kernels(dynamics, shape, method):
    torch.manual_seed(0)
    rtol = 1e-4 if len(shape) == 4 else 1e-9  # a ReLU makes of other roundings other steps, when they are many
    f, results = dynamics().double(), []
    for options in ({}, {"fused": False}):
        y0 = torch.linspace(-1, 2, prod(shape), dtype=torch.float64).sin().reshape(shape).requires_grad_()
        name = "plain" if options else "fused"
        assert ns.backend(f, y0, TIMES, method=method, rtol=rtol, atol=1e-2 * rtol, options=options).name == name
        ys, stats = ns.odeint(
            f, y0, TIMES, method=method, rtol=rtol, atol=1e-2 * rtol, options=options, return_stats=True
        )
        assert stats.step_control == "per sample"
        results.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), [y0, *f.parameters()]), stats.accepted])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_weights_that_do_not_fit_the_state_are_named():
    f = ns.MLPDynamics(3, (8,))
    with pytest.raises(ValueError, match=r"y0 has 2 components, so weight and bias of layers.0 must be \[8, 3\]"):
        ns.odeint(f, torch.randn(5, 2), TIMES, steps=3)
    turned = ns.MLPDynamics(3, (8,))
    turned.layers[1].weight.data = turned.layers[1].weight.data.t().contiguous()
    with pytest.raises(ValueError, match=r"layers.1 must be \[3, 8\] and \[3\], got \[8, 3\]"):
        ns.odeint(turned, torch.randn(5, 3), TIMES, steps=3)
    with pytest.raises(ValueError, match="y0 has 3 channels, so parameter 0 of ConvDynamics must be"):
        ns.odeint(ns.ConvDynamics(4), torch.randn(2, 3, 5, 5), TIMES, steps=3)


@pytest.mark.parametrize("make", [lambda f, y0: f, ns.fuse], ids=["ours", "fused"])
@pytest.mark.parametrize("method", ["euler", "implicit_midpoint", "rk4"])
def test_times_too_coarse_for_the_state_are_refused_by_kernels_too(make, method):
    y0 = torch.zeros(2, 1)
    f = make(ns.MLPDynamics(1, ()), y0)
    with pytest.raises(ValueError, match=r"float32 times near 1e\+08 are 12 apart, too coarse for steps of 1"):
        ns.odeint(f, y0, [1e8, 1e8 + 20], method=method, steps=20)
    with pytest.raises(ValueError, match=r"too coarse for steps of 0\.5"):
        ns.odeint(f, y0, [1e8, 1e8 + 20], method=method, step_size=0.5)
    assert ns.odeint(f, y0.clone(), [1e4, 1e4 + 1], method=method, steps=2).isfinite().all()


@pytest.mark.parametrize(("dynamics", "shape"), CASES)
def test_a_program_first_made_in_inference_mode_is_trained_with_later(dynamics, shape):
    conv_program.cache_clear()
    mlp_program.cache_clear()
    torch.compiler.reset()
    block, y0 = ns.ODEBlock(dynamics(), method="euler", steps=2), torch.randn(shape)
    with torch.inference_mode():
        expected = block(y0)
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(y0.requires_grad_())
    found.sum().backward()
    assert torch.equal(found, expected) and bool(y0.grad.isfinite().all())


def test_time_by_way_of_the_buffer_that_is_still_to_be_read_is_not_taken_for_convdynamics():
    def program(own_buffer):
        c, h, w = 2, 3, 4
        builder = Builder([c * h * w, 1])
        value = builder.norm(Ref(0), (c, h, w), c, builder.weight(), builder.weight(), inner=h * w, count=c)
        for _ in range(2):
            active = builder.unary("relu", value, (c, h, w))
            joined = builder.buffer((c + 1, h, w))
            via = builder.buffer((h * w,)) if own_buffer else Ref(active.buffer)
            builder.move(Ref(1), (0,), via, (1,), (h * w,), "time")
            builder.move(via, (1,), joined, (1,), (h * w,), "time")
            builder.move(active, (1,), Ref(joined.buffer, h * w), (1,), (c * h * w,), "state")
            weights = builder.weight(), builder.weight()
            value = builder.conv(joined, (c + 1, h, w), (c, h, w), (3, 3), (1, 1), (1, 1), 1, *weights)
            weights = builder.weight(), builder.weight()
            value = builder.norm(value, (c, h, w), c, *weights, inner=h * w, count=c)
        return builder.finish(value)

    torch.manual_seed(0)
    weights = [x.detach().double() for x in random_conv(2).parameters()]
    y0, tableau = torch.randn(5, 2, 3, 4, dtype=torch.float64), program_op.tableau_of(ALL_METHODS["euler"])[0]
    for own_buffer in (True, False):
        made = program(own_buffer)
        scheme = (made.code, made.constants, tableau, [3], 1e-6, 50, 1)
        chosen, layers = (solve(y0, TIMES[:2], weights, *scheme, kept, 0, 1e-2) for kept in (0, 1))
        assert chosen[1].numel() == (3 if own_buffer else 1) * layers[1].numel() or chosen[1].dim() == 1
        torch.testing.assert_close(chosen[0], layers[0], rtol=1e-12, atol=1e-12)


def test_settings_and_weights_are_judged_by_what_computes():
    f, y0 = ns.ConvDynamics(4), torch.randn(2, 4, 5, 5)
    f.channels = 2
    for norm in (f.norm1, f.norm2, f.norm3):
        norm.num_groups = 2
    assert ns.backend(f, y0, method="euler", steps=2).reason == "the settings of a GroupNorm were changed"
    bare = ns.MLPDynamics(3, (5,))
    bare.layers[0].bias = None
    compiled = torch.compile(ns.ODEBlock(bare, method="euler", steps=2), backend="aot_eager")
    y0 = torch.randn(4, 3)
    torch.testing.assert_close(compiled(y0), ns.odeint(bare, y0, [0.0, 1.0], method="euler", steps=2)[-1])
    with pytest.raises(ValueError, match=r"empty feature map: a sample is \[2, 0, 3\]"):
        ns.odeint(ns.ConvDynamics(2), torch.zeros(2, 2, 0, 3), [0.0, 1.0], method="euler", steps=2)
    empty = ns.MLPDynamics(3)
    empty.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="MLPDynamics has no layers"):
        ns.odeint(empty, y0, [0.0, 1.0], method="euler", steps=2)
