"""Every figure of the paper, computed from the jobs' results into plain values: what ``results.json`` holds.

Accuracies are percent; a spread is the sample standard deviation over the seeds, None for a single seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from nodeshape._errors import UserError
from nodeshape._experiments.jobs import Job, Result
from nodeshape._experiments.networks import NETWORKS
from nodeshape._experiments.plan import Plan
from nodeshape._experiments.source import EXPERIMENTS, Experiment
from nodeshape._experiments.table1 import DIGITS_TEST_SIZE, IMAGES, ROWS
from nodeshape._experiments.training import Training
from nodeshape._ode.method import SOURCE_METHODS

Get = Callable[[Job], Result]
#: Accuracy after the last epoch that every method should reach, by experiment.
LEAST = {"single-2700": 99.5, "compound-2700": 99.0, "single-1350": 99.0, "single-500": 91.4}
#: The same of the recipe for few images.
LEAST_SMALL = 98.0
#: The ODE-Net against the ResNet: points it may lose, and share of the parameters it may have.
POINTS, SHARE = 0.3, 0.4
#: How much more memory the deepest reversible solve may take than the shallowest.
FLAT = 1.2
#: Images that scikit-learn's ``load_digits`` has.
DIGITS = 1797


def collect(plan: Plan, get: Get) -> dict[str, Any]:
    """All tables."""
    experiments = [_experiment(plan, get, experiment) for experiment in EXPERIMENTS]
    small = {method: _curve(get, plan.small(method)) for method in SOURCE_METHODS}
    networks = {
        task: {network: _final(get, plan.network(network, task)) for network in compared}
        for task, compared in plan.networks().items()
    }
    depth = [_depth(plan, get, *line) for line in plan.depth_lines()]
    epoch = {method: get(plan.epoch(method)) for method in SOURCE_METHODS}
    return {
        "machine": epoch["euler"]["machine"],
        "seeds": len(plan.seeds),
        "test_size": plan.test_size,
        "experiments": experiments,
        "small": small,
        "goals": _goals(experiments, small, networks, depth, epoch),
        "epoch_alone": {method: result["seconds"] for method, result in epoch.items()},
        "networks": networks,
        "table1": table1(plan, get, networks["single"]),
        "batch_size": plan.batch_size,
        "depth": depth,
        "count_images": plan.count_images,
        "evaluations": {method: get(plan.evaluations(method))["counts"] for method in SOURCE_METHODS},
        "solver_images": plan.solver_images,
        "other_solvers": _other_solvers(plan, get),
        "sweep_test_size": plan.sweep_test_size,
        "sweep": _sweep(plan, get),
    }


def _experiment(plan: Plan, get: Get, experiment: Experiment) -> dict[str, Any]:
    methods = {}
    for method in SOURCE_METHODS:
        curve = _curve(get, plan.experiment(experiment, method))
        methods[method] = {
            **curve,
            "report": list(experiment.accuracy[method][: plan.epochs]),
            "met": [ours >= theirs for ours, theirs in zip(curve["mean"], experiment.accuracy[method])],
            "report_seconds": experiment.seconds.get(method),
        }
    return {"name": experiment.name, "title": experiment.title, "methods": methods}


def _curve(get: Get, runs: Sequence[Training]) -> dict[str, Any]:
    """Accuracy after each epoch."""
    results = [_succeeded(get, run) for run in runs]
    curves = [[100 * share for share in result["accuracy"]] for result in results]
    return {
        "runs": curves,
        "mean": [fmean(epoch) for epoch in zip(*curves)],
        "spread": [_spread(epoch) for epoch in zip(*curves)],
        "seconds": fmean(s for result in results for s in result["seconds"]),
    }


def _succeeded(get: Get, run: Training) -> Result:
    result = get(run)
    if "failed" in result:
        raise UserError(f"{run.task}, {run.train_size} images, {run.method}, seed {run.seed}: {result['failed']}")
    return result


def _final(get: Get, runs: Sequence[Training]) -> dict[str, Any]:
    """Accuracy after the last epoch."""
    results = [_succeeded(get, run) for run in runs]
    last = [100 * result["accuracy"][-1] for result in results]
    seconds = fmean(s for result in results for s in result["seconds"])
    return {
        "mean": fmean(last),
        "spread": _spread(last),
        "parameters": results[0]["parameters"],
        "seconds": seconds,
    }


def table1(plan: Plan, get: Get, shapes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parent paper's table 1 by images; ``shapes``: what the comparison of networks found on Single."""
    tables = {}
    sizes = {"shapes": min(2700, plan.largest), "digits": DIGITS - DIGITS_TEST_SIZE}
    for images in IMAGES:
        rows = []
        for row in ROWS:
            results = [get(run) for run in plan.comparison(*row, images)]
            if results:
                errors = [100 - 100 * result["accuracy"] for result in results]
                cell = {"mean": fmean(errors), "spread": _spread(errors), "parameters": results[0]["parameters"]}
            else:
                known = shapes[row[0]]
                cell = {
                    "mean": 100 - known["mean"],
                    "spread": known["spread"],
                    "parameters": known["parameters"],
                }
            name, memory = ROWS[row]
            rows.append({"name": name, "memory": memory, **cell, **get(plan.footprint(*row, images))})
        tables[images] = {"train_size": sizes[images], "rows": rows}
    return tables


def _depth(plan: Plan, get: Get, network: str, adjoint: str) -> dict[str, Any]:
    results = [get(plan.depth(network, adjoint, depth)) for depth in plan.depths]
    return {
        "name": f"{NETWORKS[network]} {adjoint}".strip(),
        "depths": list(plan.depths),
        "peak_bytes": [result["peak_bytes"] for result in results],
        "seconds": [result["seconds"] for result in results],
    }


def _other_solvers(plan: Plan, get: Get) -> dict[str, Any]:
    jobs = plan.other_solvers()
    rows = [
        {
            "method": job.trained.method,
            **({"step_size": job.trained.step_size} if job.trained.rtol is None else {"rtol": job.trained.rtol}),
            "accuracy": [None if share is None else 100 * share for share in get(job)["accuracy"]],
        }
        for job in jobs
    ]
    return {"train_size": jobs[0].trained.train_size, "columns": jobs[0].settings(), "rows": rows}


def _sweep(plan: Plan, get: Get) -> list[dict[str, Any]]:
    cells = []
    for size in plan.sweep_sizes:
        for step in plan.sweep_steps:
            runs = {method: plan.sweep(size, step, method) for method in SOURCE_METHODS}
            methods = {
                method: {"mean": None, "spread": None}
                if any("failed" in get(run) for run in cell)
                else _final(get, cell)
                for method, cell in runs.items()
                if cell
            }
            if methods:
                cells.append({"train_size": size, "step_size": step, "methods": methods})
    return cells


def _goals(
    experiments: Sequence[dict[str, Any]],
    small: dict[str, Any],
    networks: dict[str, dict[str, Any]],
    depth: Sequence[dict[str, Any]],
    epoch: dict[str, Any],
) -> list[dict[str, Any]]:
    """What a run should reach, with what it reached; ``met`` is None where it could not be measured."""
    goals = []

    def goal(name: str, bound: float, measured: float | None, least: bool, unit: str) -> None:
        met = None if measured is None else measured >= bound if least else measured <= bound
        goals.append({"name": name, "bound": bound, "least": least, "unit": unit, "measured": measured, "met": met})

    for experiment in experiments:
        lowest = min(column["mean"][-1] for column in experiment["methods"].values())
        what = f"{experiment['title']}: accuracy after the last epoch, lowest of the methods"
        goal(what, LEAST[experiment["name"]], lowest, True, "%")
    lowest = min(column["mean"][-1] for column in small.values())
    goal("Single, 500 images, `--recipe small`: the same", LEAST_SMALL, lowest, True, "%")
    for task, models in networks.items():
        lost = models["resnet"]["mean"] - models["ode"]["mean"]
        goal(f"{task.capitalize()}: points that the ODE-Net loses to the ResNet", POINTS, lost, False, "")
    models = networks["single"]
    share = models["ode"]["parameters"] / models["resnet"]["parameters"]
    goal("Parameters of the ODE-Net, of the ResNet's", 100 * SHARE, 100 * share, False, "%")
    line = next(line for line in depth if line["name"].endswith("reversible"))
    shallow, deep = line["peak_bytes"][0], line["peak_bytes"][-1]
    growth = deep / shallow if shallow and deep else None
    goal(f"`reversible`: memory of {line['depths'][-1]} steps over {line['depths'][0]}", FLAT, growth, False, "×")
    report = EXPERIMENTS[0].seconds["euler"]
    what = f"Default epoch on {epoch['euler']['machine']['threads']} threads, a tenth of the report's {report:g} s"
    goal(what, report / 10, epoch["euler"]["seconds"], False, "s")
    return goals


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
