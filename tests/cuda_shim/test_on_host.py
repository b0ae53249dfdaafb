"""What only the CUDA kernels are asked, on their build for the CPU. Run by tests/test_cuda_kernels.py."""

from __future__ import annotations

import pytest
import torch
from fused_reference import ON_HOST, random_conv, solve
from test_fuse import MLP, ConcatConv

import nodeshape as ns
from nodeshape._ode import program_op
from nodeshape._ode.method import METHODS
from nodeshape._ode.program import Builder, Ref

TIMES = torch.tensor([0.0, 0.5, 0.75], dtype=torch.float64)


pytestmark = pytest.mark.skipif(not ON_HOST, reason="run by tests/test_cuda_kernels.py")


@pytest.mark.parametrize("machine", ["cuda:threads=96", "cuda:threads=32,shared=4096"])
def test_groups_of_two_channels_agree_with_the_plain_loop(machine, monkeypatch):
    monkeypatch.setenv("NODESHAPE_ISA", machine)
    torch.manual_seed(0)
    f, y0 = random_conv(64), torch.randn(1, 64, 6, 3, dtype=torch.float64)
    arguments = {"method": "implicit_midpoint", "steps": 1}
    fused = solve(f, y0, TIMES, fused=True, dtype=torch.float64, **arguments)
    assert max(fused.distance(solve(f, y0, TIMES, fused=False, dtype=torch.float64, **arguments))) < 1e-10


@pytest.mark.parametrize("method", ["implicit_euler", "rk4"])
@pytest.mark.parametrize("machine", ["cuda:threads=64", "cuda:threads=32,shared=4096"])
def test_the_order_of_threads_does_not_change_a_bit(machine, method, monkeypatch):
    torch.manual_seed(0)
    if method == "rk4":
        y0 = torch.randn(3, 6, 7, 9)
        f = ns.fuse(ConcatConv(6), y0)
    else:
        f, y0 = random_conv(5), torch.randn(3, 5, 7, 9)
    results = []
    for seed in (1, 2, 3):
        monkeypatch.setenv("NODESHAPE_ISA", f"{machine},seed={seed}")
        results.append(solve(f, y0, TIMES, fused=True, dtype=torch.float32, method=method, steps=2))
    for other in results[1:]:
        assert other.distance(results[0]) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("adjoint", ["discrete", "reversible", "continuous"])
def test_a_sample_is_carried_by_as_many_blocks_as_have_work(adjoint, monkeypatch):
    """Two to six of them for one sample; a batch keeps the GPU busy with one each, and not a bit changes."""
    monkeypatch.setenv("NODESHAPE_ISA", "cuda:threads=64,shared=4096")
    torch.manual_seed(0)
    cases = [
        (random_conv(20), torch.randn(7, 20, 6, 9, dtype=torch.float64)),
        (ns.MLPDynamics(5, (90, 130)), torch.randn(6, 5, dtype=torch.float64)),
    ]
    for program, shape in ((ConcatConv(12), (6, 12, 9, 9)), (MLP(5, 130), (6, 5))):
        y0 = torch.randn(shape, dtype=torch.float64)
        cases.append((ns.fuse(program.double(), y0), y0))
    for f, y0 in cases:
        several = adjoint == "discrete" and not isinstance(f, (ns.ConvDynamics, ns.MLPDynamics))
        arguments = {"method": "rk4" if several else "implicit_midpoint", "steps": 1, "adjoint": adjoint}
        for batch in (y0[:1], y0):
            fused = solve(f, batch, TIMES, fused=True, dtype=torch.float64, **arguments)
            assert max(fused.distance(solve(f, batch, TIMES, fused=False, dtype=torch.float64, **arguments))) < 1e-10
            if len(batch) == 1:
                alone = fused.ys
        assert torch.equal(fused.ys[:, :1], alone)


def test_a_zero_state_is_solved():
    """Norms of what is all zero, tiny or huge are found in another way."""
    for scale in (0.0, 1e-30, 1e30):
        f, y0 = ns.MLPDynamics(3, (4,)), torch.full((2, 3), scale)
        fused, plain = (
            solve(f, y0, TIMES, fused=fused, dtype=torch.float32, method="implicit_midpoint", steps=2)
            for fused in (True, False)
        )
        assert torch.allclose(fused.ys, plain.ys, rtol=1e-5)


def test_unsolved_stage_is_nan_and_an_error_of_the_next_op():
    f, y0 = random_conv(4), torch.randn(6, 4, 5, 5)
    with torch.no_grad():
        ys = ns.odeint(f, y0, TIMES, method="implicit_euler", steps=3, options={"max_stage_iterations": 2})
        assert ys[1:].isnan().all()
        with pytest.raises(
            ns.StageSolveError, match=r"6 of 6 samples .* forward stage equation at t=0 .* smaller steps"
        ):
            ns.odeint(f, y0, TIMES, method="euler", steps=3)
        ns.odeint(f, y0, TIMES, method="euler", steps=3)  # raised once


def test_a_program_whose_stage_is_not_solved_is_nan_and_an_error_of_the_next_op():
    y0 = torch.randn(3, 8)
    f = ns.fuse(MLP(), y0)
    for method in ("implicit_euler", "kvaerno3"):
        options = {"max_stage_iterations": 2, "stage_tolerance": 1e-12}
        with torch.no_grad():
            ys = ns.odeint(f, y0, TIMES, method=method, steps=1, options=options)
        assert ys[0].isfinite().all() and ys[1:].isnan().all()
        with pytest.raises(RuntimeError, match=r"StageSolveError: 3 of 3 samples .* forward stage equation at t=0"):
            torch.ops.nodeshape.raise_failures()


def test_a_program_whose_places_overlap_is_refused():
    """A move of three elements to two places, of which threads side by side would write one."""
    builder = Builder([3, 1])
    out = builder.buffer((3,))
    builder.move(Ref(0), (1,), out, (1,), (3,), "copy")
    good = builder.finish(out)
    builder.move(Ref(0), (1, 1), out, (1, 1), (2, 2), "copy")
    bad = builder.finish(out)
    y0, t = torch.ones(2, 3), torch.tensor([0.0, 1.0])
    rest = (program_op.tableau_of(METHODS["euler"])[0], [1], 1e-6, 10, 0, 1, 0, 1e-3)
    assert torch.equal(torch.ops.nodeshape.solve(y0, t, [], good.code, good.constants, *rest)[0][1], 2 * y0)
    with pytest.raises(RuntimeError, match="strides overlap"):
        torch.ops.nodeshape.solve(y0, t, [], bad.code, bad.constants, *rest)


def test_drift_of_the_reversed_trajectory_is_nan_and_an_error_of_the_next_op():
    """y' = -20 y contracts by e^-20; what rounding left cannot be expanded back."""
    f = ns.MLPDynamics(2, ())
    with torch.no_grad():
        f.layers[0].weight.copy_(torch.tensor([[-20.0, 1.0, 0.0], [0.0, -15.0, 0.0]]))
    y0 = torch.randn(3, 2, requires_grad=True)
    ys = ns.odeint(f, y0, [0.0, 1.0], method="implicit_midpoint", steps=40, adjoint="reversible")
    ys.sum().backward()
    assert y0.grad.isnan().all()
    assert all(x.grad.isnan().all() for x in f.parameters())
    with pytest.raises(RuntimeError, match=r"ReversalDriftError: 3 of 3 samples drifted"):
        torch.ops.nodeshape.raise_failures()
