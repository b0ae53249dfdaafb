"""Measure nodeshape beside torchdiffeq, torchode and diffrax; print the tables of docs/comparison.md.

pip install torchdiffeq torchode diffrax        # each rival that is missing is skipped
python benchmarks/comparison.py
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from nodeshape._benchmarking.memory import PeakMemory

warnings.filterwarnings("ignore")
STEPS = 20


def installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


torchdiffeq, torchode, diffrax = (installed(name) for name in ("torchdiffeq", "torchode", "diffrax"))


class Net(nn.Module):
    """16 → 32 → 16, tanh; takes a scalar time or one per sample (torchode's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(17, 32), nn.Linear(32, 16)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time = t.to(y).reshape(*t.shape, *[1] * (y.dim() - t.dim())).expand(*y.shape[:-1], 1)
        return self.last(torch.tanh(self.first(torch.cat([y, time], dim=-1))))


def problem(batch: int = 8) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().double(), torch.randn(batch, 16, dtype=torch.float64)


def euler_loop(func: nn.Module, y: Tensor, steps: int) -> Tensor:
    for k in range(steps):
        y = y + func(torch.tensor(k / steps, dtype=y.dtype), y) / steps
    return y


Solve = Callable[[nn.Module, Tensor, int], Tensor]


def torch_solvers() -> dict[str, Solve]:
    """Explicit Euler from t=0 to t=1, by library and gradient mode."""
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solvers: dict[str, Solve] = {}
    for adjoint in ("discrete", "reversible", "continuous"):
        solvers[f"nodeshape, {adjoint}"] = lambda f, y, n, adjoint=adjoint: ns.odeint(
            f, y, span, method="euler", steps=n, adjoint=adjoint
        )[-1]
    if torchdiffeq:
        for name in ("odeint", "odeint_adjoint"):
            solve = getattr(torchdiffeq, name)
            solvers[f"torchdiffeq, {name}"] = lambda f, y, n, solve=solve: solve(
                f, y, span, method="euler", options={"step_size": 1.0 / n}
            )[-1]
    if torchode:
        for name in ("AutoDiffAdjoint", "BacksolveAdjoint"):

            def run(f: nn.Module, y: Tensor, n: int, name: str = name) -> Tensor:
                term = torchode.ODETerm(f)
                parts = torchode.Euler(term), torchode.FixedStepController()
                arguments = parts if name == "AutoDiffAdjoint" else (term, *parts)
                ends = torch.zeros(len(y), dtype=y.dtype), torch.ones(len(y), dtype=y.dtype)
                value = torchode.InitialValueProblem(y0=y, t_start=ends[0], t_end=ends[1])
                dt0 = torch.full((len(y),), 1.0 / n, dtype=y.dtype)
                return getattr(torchode, name)(*arguments).solve(value, dt0=dt0).ys[:, -1]

            solvers[f"torchode, {name}"] = run
    return solvers


def torch_gradient(solve: Solve, func: nn.Module, y0: Tensor, steps: int) -> Tensor:
    grads = torch.autograd.grad(solve(func, y0, steps).square().sum(), tuple(func.parameters()))
    return torch.cat([x.flatten() for x in grads])


def diffrax_gradients() -> dict[str, Callable[[Net, Tensor, int], tuple[Tensor, int]]]:
    """The gradient, and the bytes of temporary buffers XLA plans for computing it."""
    if not diffrax:
        return {}
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    def run(net: Net, y0: Tensor, steps: int, adjoint: Any) -> tuple[Tensor, int]:
        parameters = [jnp.asarray(x.detach().numpy()) for x in net.parameters()]

        def field(t: Any, y: Any, p: Any) -> Any:
            inputs = jnp.concatenate([y, jnp.full((len(y), 1), t)], axis=1)
            return jnp.tanh(inputs @ p[0].T + p[1]) @ p[2].T + p[3]

        def loss(p: Any, y: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Euler(),
                0.0,
                1.0,
                1.0 / steps,
                y,
                p,
                adjoint=adjoint,
                max_steps=steps + 1,
            )
            return (solution.ys[-1] ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(parameters, jnp.asarray(y0.numpy())).compile()
        found = compiled(parameters, jnp.asarray(y0.numpy()))
        gradient = torch.cat([torch.tensor(x.__array__()).flatten() for x in found])
        return gradient, compiled.memory_analysis().temp_size_in_bytes

    names = ("RecursiveCheckpointAdjoint", "BacksolveAdjoint")
    return {
        f"diffrax, {name}": lambda net, y0, steps, name=name: run(net, y0, steps, getattr(diffrax, name)())
        for name in names
    }


def compare_gradients_and_memory() -> None:
    func, y0 = problem()
    exact = torch_gradient(euler_loop, func, y0, STEPS)
    few, many = 10, 300
    print(
        f"\n| library, gradient mode | gradient error | peak memory, {few} → {many} steps (KB) | ratio |"
        "\n|---|---|---|---|"
    )

    def row(name: str, gradient: Tensor, peaks: list[int]) -> None:
        error = float((gradient - exact).norm() / exact.norm())
        print(f"| {name} | {error:.1e} | {peaks[0] / 1e3:.0f} → {peaks[1] / 1e3:.0f} | {peaks[1] / peaks[0]:.1f} |")

    for name, solve in torch_solvers().items():
        peaks = []
        try:
            for steps in (few, many):
                with PeakMemory() as memory:
                    torch_gradient(solve, func, *problem(256)[1:], steps)
                peaks.append(memory.peak)
            row(name, torch_gradient(solve, func, y0, STEPS), peaks)
        except Exception as error:
            print(f"| {name} | fails: {str(error).splitlines()[0]} | – | – |")
    for name, gradient in diffrax_gradients().items():
        row(name, gradient(func, y0, STEPS)[0], [gradient(func, problem(256)[1], steps)[1] for steps in (few, many)])


def compare_statistics() -> None:
    func, y0 = problem()
    print("\n| library | statistics with the result | one per sample |\n|---|---|---|")
    _, stats = ns.odeint(func, y0, [0.0, 1.0], steps=2, return_stats=True)
    fields = ", ".join(k for k, v in vars(stats).items() if isinstance(v, Tensor))
    print(f"| nodeshape | {fields} | yes |")
    if torchdiffeq:
        solution = torchdiffeq.odeint(func, y0, torch.tensor([0.0, 1.0]).double())
        print(f"| torchdiffeq | {'none: a tensor' if isinstance(solution, Tensor) else type(solution)} | – |")
    if torchode:
        term = torchode.ODETerm(func)
        controller = torchode.IntegralController(atol=1e-6, rtol=1e-3, term=term)
        ends = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        value = torchode.InitialValueProblem(y0=y0, t_start=ends[0], t_end=ends[1])
        found = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller).solve(value).stats
        own = all(v.shape == (8,) for k, v in found.items() if k != "n_f_evals")
        print(f"| torchode | {', '.join(found)} | {'yes, but evaluations are the batch’s' if own else 'no'} |")
    if diffrax:
        import jax.numpy as jnp

        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: -y), diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.ones(3)
        ).stats
        print(f"| diffrax | {', '.join(found)} | under vmap |")


def compare_export() -> None:
    """A module that calls the plain solver, 20 Euler steps."""
    print("\n| library | torch.export | torch.onnx.export | largest difference in onnxruntime |\n|---|---|---|---|")
    logging.disable(logging.CRITICAL)
    for name, solve in torch_solvers().items():
        if "discrete" in name or "odeint" in name.split()[-1:] or "AutoDiff" in name:
            func, y0 = problem()
            print(f"| {name.split(',')[0]} | {_export(solve, func.float(), y0.float())} |")


def _export(solve: Solve, func: nn.Module, y0: Tensor) -> str:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func = func

        def forward(self, y: Tensor) -> Tensor:
            return solve(self.func, y, STEPS)

    def reason(error: Exception) -> str:
        return f"fails: {type(error).__name__}"

    model = Model().eval().requires_grad_(False)
    try:
        torch.export.export(model, (y0,))
        cells = ["works"]
    except Exception as error:
        cells = [reason(error)]
    try:
        import onnxruntime

        program = torch.onnx.export(model, (y0,), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        found = session.run(None, {session.get_inputs()[0].name: y0.numpy()})[0]
        cells += ["works", f"{float((torch.from_numpy(found) - model(y0)).abs().max()):.1e}"]
    except Exception as error:
        cells += [reason(error), "–"]
    return " | ".join(cells)


def compare_stiff() -> None:
    """Heat on an image, dy/dt = κ Δy, h |J| = 50 at 20 steps; the error is in units of the initial image."""
    size, channels, kappa = 16, 4, 125.0  # 8 κ h = 50 with h = 1/20
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).repeat(channels, 1, 1, 1)
    torch.manual_seed(0)
    image = torch.rand(4, channels, size, size, dtype=torch.float64)

    def heat(t: Tensor, y: Tensor) -> Tensor:
        shape = (-1, channels, size, size)
        out = kappa * nn.functional.conv2d(y.reshape(shape), kernel.to(y), padding=1, groups=channels)
        return out.reshape(y.shape)

    line = torch.diag(torch.ones(size - 1), 1)
    laplacian = (line + line.T - 2 * torch.eye(size)).double()
    rates, vectors = torch.linalg.eigh(laplacian)
    growth = torch.exp(kappa * rates)
    exact = vectors @ ((vectors.T @ image @ vectors) * growth[:, None] * growth) @ vectors.T
    print("\n| library, method | seconds | evaluations of f | error | note |\n|---|---|---|---|---|")

    def row(name: str, run: Callable[[], tuple[Tensor, str, str]]) -> None:
        try:
            with torch.no_grad():
                run()  # compile, warm up
                start = time.perf_counter()
                found, evaluations, note = run()
        except Exception as error:
            print(f"| {name} | – | – | – | {type(error).__name__} |")
            return
        seconds = time.perf_counter() - start
        distance = float((found.double().reshape(exact.shape) - exact).norm() / image.norm())
        print(f"| {name} | {seconds:.3f} | {evaluations} | {distance:.1e} | {note} |")

    def ours(method: str, **choice: Any) -> Callable[[], tuple[Tensor, str, str]]:
        def run() -> tuple[Tensor, str, str]:
            ys, stats = ns.odeint(heat, image, [0.0, 1.0], method=method, return_stats=True, **choice)
            return ys[-1], f"{int(stats.nfe_forward.max())}", f"{int(stats.accepted.max())} steps"

        return run

    loose: dict[str, Any] = {"stage_tolerance": 1e-6, "max_stage_iterations": 500}
    krylov = {**loose, "stage_solver": "krylov"}
    row("nodeshape, implicit_euler, 20 steps", ours("implicit_euler", steps=20, options=loose))
    row("nodeshape, implicit_euler, 20 steps, krylov", ours("implicit_euler", steps=20, options=krylov))
    newton = {"stage_solver": "newton"}
    row("nodeshape, implicit_euler, 20 steps, newton", ours("implicit_euler", steps=20, options=newton))
    row("nodeshape, kvaerno3, rtol 1e-2, krylov", ours("kvaerno3", rtol=1e-2, atol=1e-4, options=krylov))
    row("nodeshape, dopri5, rtol 1e-2", ours("dopri5", rtol=1e-2, atol=1e-4))
    row("nodeshape, tsit5, rtol 1e-2", ours("tsit5", rtol=1e-2, atol=1e-4))
    if torchdiffeq:

        def run() -> tuple[Tensor, str, str]:
            count = 0

            def counted(t: Tensor, y: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return heat(t, y)

            ys = torchdiffeq.odeint(counted, image, torch.tensor([0.0, 1.0]).double(), rtol=1e-2, atol=1e-4)
            return ys[-1], str(count), "dopri5, explicit: steps bound by stability"

        row("torchdiffeq, dopri5, rtol 1e-2", run)
    if torchode:

        def run_torchode() -> tuple[Tensor, str, str]:
            y0 = image.reshape(4, -1)
            term = torchode.ODETerm(heat)
            controller = torchode.IntegralController(atol=1e-4, rtol=1e-2, term=term)
            value = torchode.InitialValueProblem(y0=y0, t_start=torch.zeros(4).double(), t_end=torch.ones(4).double())
            solution = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller).solve(value)
            return solution.ys[:, -1], str(int(solution.stats["n_f_evals"].max())), "Dopri5, explicit"

        row("torchode, Dopri5, rtol 1e-2", run_torchode)
    if diffrax:
        import jax
        import jax.numpy as jnp

        weights = jnp.asarray(kernel.double().numpy())

        def field(t: Any, y: Any, p: Any) -> Any:
            return (
                kappa * jax.lax.conv_general_dilated(y[None], weights, (1, 1), "SAME", feature_group_count=channels)[0]
            )

        def solver(method: Any, controller: Any, dt0: Any) -> Callable[[], tuple[Tensor, str, str]]:
            def one(y: Any) -> Any:
                solution = diffrax.diffeqsolve(
                    diffrax.ODETerm(field), method, 0.0, 1.0, dt0, y, stepsize_controller=controller, max_steps=100_000
                )
                return solution.ys[-1], solution.stats["num_steps"]

            compiled = jax.jit(jax.vmap(one))

            def run() -> tuple[Tensor, str, str]:
                ys, steps = compiled(jnp.asarray(image.numpy()))
                return torch.tensor(ys.__array__()), "–", f"{int(steps.max())} steps"

            return run

        constant, adaptive = diffrax.ConstantStepSize(), diffrax.PIDController(rtol=1e-2, atol=1e-4)
        tight = diffrax.VeryChord(rtol=1e-5, atol=1e-6)
        row("diffrax, ImplicitEuler, 20 steps", solver(diffrax.ImplicitEuler(root_finder=tight), constant, 0.05))
        row("diffrax, Kvaerno3, rtol 1e-2", solver(diffrax.Kvaerno3(), adaptive, None))
        row("diffrax, Tsit5, rtol 1e-2", solver(diffrax.Tsit5(), adaptive, None))


def main() -> None:
    torch.set_num_threads(1)
    for name in ("torch", "torchdiffeq", "torchode", "diffrax", "jax"):
        try:
            print(name, version(name), end="  ")
        except PackageNotFoundError:
            print(name, "not installed: skipped", end="  ")
    print()
    compare_gradients_and_memory()
    compare_statistics()
    compare_export()
    compare_stiff()


if __name__ == "__main__":
    main()
