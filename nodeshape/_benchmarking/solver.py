"""The solver suite: the fused solver against its rivals, and how it scales with steps, batch and threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nodeshape._benchmarking import contenders as contenders
from nodeshape._benchmarking.cases import Case, Contender, direct_operations
from nodeshape._benchmarking.contenders import Problem
from nodeshape._benchmarking.targets import AtLeast, AtMost, Limit, Target
from nodeshape._benchmarking.trained import trained_dynamics
from nodeshape._models.dynamics import ConvDynamics, MLPDynamics
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.odeint import odeint
from nodeshape._ode.options import ADJOINTS

NODESHAPE, OP, PLAIN, COMPILED = "nodeshape", "op alone", "plain loop", "torch.compile"
TORCHDIFFEQ, ADJOINT, DIFFRAX = "torchdiffeq", "torchdiffeq adjoint", "diffrax"
BATCH, SIZES, STEPS = (
    "Conv forward, Euler: batch",
    "Conv forward, Euler: channels and maps",
    "Conv forward, Euler: steps",
)
THREADS, CONV_TRAINING = "Conv forward, Euler: threads", "Conv training step, Euler"
METHOD, GRADIENT = "Methods, forward, trained weights", "Gradient modes, training step, trained weights"
MLP, MLP_TRAINING = "MLP forward, Euler: batch", "MLP training step, Euler"
STAGE_TOLERANCE = 1e-5
#: The sections a plot shows, and the name of its horizontal axis.
PLOTS = {BATCH: "batch", STEPS: "steps", THREADS: "threads", MLP: "batch"}


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The suite's cases; ``quick`` makes every problem small and leaves torch.compile out."""
    rivals = [PLAIN, TORCHDIFFEQ]
    some = rivals if quick else [PLAIN, COMPILED, TORCHDIFFEQ]
    channels, side, batch = (32, 4, 4) if quick else (64, 8, 120)
    conv = partial(_conv, channels=channels, side=side, device=device)
    found = []
    for n in (1, 2) if quick else (1, 16, 120, 1024):
        chosen = some if n in (1, batch) else rivals if n < batch else [TORCHDIFFEQ]
        found.append(_case(BATCH, conv(n), chosen, scale=n))
    for c, s in ((64, 4), (32, 6)) if quick else ((32, 8), (128, 8), (64, 14)):
        found.append(_case(SIZES, _conv(batch, c, s, device=device), rivals))
    for steps in (1, 4) if quick else (1, 4, 16, 64):
        found.append(_case(STEPS, conv(2 if quick else 16, steps=steps), rivals, scale=steps))
    for threads in _thread_counts() if device.type == "cpu" else ():
        found.append(_case(THREADS, conv(batch), rivals, scale=threads, threads=threads))
    found.append(_case(CONV_TRAINING, conv(batch, training=True), [*some, ADJOINT]))
    found += _methods(quick, device)
    for n in (1, 8) if quick else (1, 128, 4096):
        found.append(_case(MLP, _mlp(n, device), [OP, *some, DIFFRAX], scale=n))
    found.append(_case(MLP_TRAINING, _mlp(128, device, training=True), [*some, ADJOINT, DIFFRAX]))
    return found


def _conv_row(batch: int) -> str:
    return f"64×8×8, batch {batch}, 20 steps"


def _mlp_row(batch: int) -> str:
    return f"2→16→2, batch {batch}, 20 steps"


TARGETS: list[Target] = [
    AtLeast("conv 64×8×8, batch 120: faster than torchdiffeq", 4, BATCH, _conv_row(120), TORCHDIFFEQ, NODESHAPE),
    AtLeast(
        "conv 64×8×8, batch 120: faster than the direct limit", 1.8, BATCH, _conv_row(120), "direct limit", NODESHAPE
    ),
    AtLeast("conv 64×8×8, batch 1: faster than torchdiffeq", 8, BATCH, _conv_row(1), TORCHDIFFEQ, NODESHAPE),
    AtLeast("training step: faster than torchdiffeq's adjoint", 4, CONV_TRAINING, _conv_row(120), ADJOINT, NODESHAPE),
    AtLeast(
        "training step: faster than torchdiffeq's backprop", 3, CONV_TRAINING, _conv_row(120), TORCHDIFFEQ, NODESHAPE
    ),
    AtLeast("training step: faster than the compiled loop", 3, CONV_TRAINING, _conv_row(120), COMPILED, NODESHAPE),
    AtMost("reversible, euler: time of discrete", 2.5, GRADIENT, "euler", "reversible", "discrete"),
    AtMost("reversible, implicit_euler: time of discrete", 1.1, GRADIENT, "implicit_euler", "reversible", "discrete"),
    AtMost(
        "reversible, implicit_midpoint: time of discrete", 1.6, GRADIENT, "implicit_midpoint", "reversible", "discrete"
    ),
    Limit("implicit_midpoint: evaluations per step", 4, METHOD, NODESHAPE, "implicit_midpoint evaluations per step"),
    AtMost("implicit_midpoint: time of euler", 5, METHOD, NODESHAPE, "implicit_midpoint", "euler"),
    AtLeast("MLP, batch 1: faster than torchdiffeq", 50, MLP, _mlp_row(1), TORCHDIFFEQ, NODESHAPE),
    AtLeast("MLP, batch 128: faster than torchdiffeq", 50, MLP, _mlp_row(128), TORCHDIFFEQ, NODESHAPE),
    AtLeast("MLP op, batch 1: faster than diffrax", 1, MLP, _mlp_row(1), DIFFRAX, OP),
    AtLeast("MLP op, batch 128: faster than diffrax", 1, MLP, _mlp_row(128), DIFFRAX, OP),
    AtLeast("MLP op, batch 4096: faster than diffrax", 1, MLP, _mlp_row(4096), DIFFRAX, OP),
    AtLeast("MLP training step: faster than torchdiffeq", 20, MLP_TRAINING, _mlp_row(128), TORCHDIFFEQ, NODESHAPE),
]


def _case(
    section: str, problem: Problem, rivals: list[str], scale: float | None = None, threads: int | None = None
) -> Case:
    ways = {
        OP: Contender(partial(contenders.op, problem), like=NODESHAPE),
        PLAIN: Contender(partial(contenders.plain_loop, problem), like=NODESHAPE),
        COMPILED: Contender(partial(contenders.compiled_loop, problem), like=NODESHAPE),
        TORCHDIFFEQ: Contender(partial(contenders.torchdiffeq, problem), like=NODESHAPE),
        ADJOINT: Contender(partial(contenders.torchdiffeq, problem, adjoint=True)),
        DIFFRAX: Contender(partial(contenders.diffrax, problem), like=NODESHAPE),
    }
    chosen = {NODESHAPE: Contender(partial(contenders.nodeshape, problem))} | {rival: ways[rival] for rival in rivals}
    conv = isinstance(problem.dynamics, ConvDynamics)
    batch, *shape = problem.y0.shape
    row = f"{'×'.join(map(str, shape)) if conv else '2→16→2'}, batch {batch}, {problem.steps} steps"
    if threads is not None:
        row += f", {threads} threads"
    direct = direct_operations(problem) if conv and not problem.training else 0.0
    return Case(section, row, chosen, scale, direct, threads, problem.y0.device)


def _methods(quick: bool, device: torch.device) -> list[Case]:
    """Every method and gradient mode, on the ODE of a classifier that has been trained for an epoch."""
    batch, steps = 4 if quick else 120, 20
    dynamics, y0 = trained_dynamics(batch, quick, device)
    problems = {
        name: Problem(
            dynamics, y0, steps, method=name, tolerance=STAGE_TOLERANCE if SOURCE_METHODS[name].theta else None
        )
        for name in SOURCE_METHODS
    }

    def evaluations() -> dict[str, float]:
        return {f"{name} evaluations per step": _evaluations(problem) for name, problem in problems.items()}

    fused = {name: Contender(partial(contenders.nodeshape, problem)) for name, problem in problems.items()}
    plain = {name: Contender(partial(contenders.plain_loop, problem)) for name, problem in problems.items()}
    found = [Case(METHOD, NODESHAPE, fused, describe=evaluations), Case(METHOD, PLAIN, plain)]
    for name in SOURCE_METHODS:
        training = Problem(dynamics, y0, steps, training=True, method=name)
        modes = {
            adjoint: Contender(
                partial(contenders.nodeshape, training, adjoint), like="discrete" if adjoint == "reversible" else None
            )
            for adjoint in ADJOINTS
        }
        found.append(Case(GRADIENT, name, modes))
    return found


def _evaluations(problem: Problem) -> float:
    options = None if problem.tolerance is None else {"stage_tolerance": problem.tolerance}
    with torch.no_grad():
        _, stats = odeint(
            problem.dynamics,
            problem.y0,
            (0.0, 1.0),
            method=problem.method,
            steps=problem.steps,
            options=options,
            return_stats=True,
        )
    return float(stats.nfe_forward.double().mean()) / problem.steps


def _conv(
    batch: int, channels: int, side: int, steps: int = 20, training: bool = False, *, device: torch.device
) -> Problem:
    torch.manual_seed(0)
    dynamics = ConvDynamics(channels).to(device)
    return Problem(dynamics, _features(batch, channels, side, side).to(device), steps, training)


def _mlp(batch: int, device: torch.device, training: bool = False) -> Problem:
    torch.manual_seed(0)
    return Problem(MLPDynamics(2, hidden=(16,)).to(device), _features(batch, 2).to(device), training=training)


def _features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _thread_counts() -> list[int]:
    most = torch.get_num_threads()
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)})
