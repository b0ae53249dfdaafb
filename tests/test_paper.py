"""The paper: its networks are what it says, its page follows from the figures, and nothing is computed twice."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import nodeshape.paper
from nodeshape import ShapeClassifier, _cli
from nodeshape._experiments import depth, jobs, table1, training
from nodeshape._experiments.depth import Depth
from nodeshape._experiments.jobs import Job, Result, Store, compute
from nodeshape._experiments.networks import RESIDUAL_BLOCKS, build
from nodeshape._experiments.page import _answer, headline, page
from nodeshape._experiments.plan import FULL, QUICK
from nodeshape._experiments.plots import draw
from nodeshape._experiments.results import DIGITS, collect
from nodeshape._experiments.solvers import Evaluations, OtherSolvers
from nodeshape._experiments.source import EXPERIMENTS
from nodeshape._experiments.table1 import ROWS, Comparison, Footprint, digits, network
from nodeshape._experiments.training import (
    REFUSALS,
    Epoch,
    Training,
    accuracy_on,
    drawn_test_images,
)
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._ode.options import ADJOINTS
from nodeshape._training.trainer import Stopped
from nodeshape.paper import main


def test_the_report_gives_sixty_accuracies() -> None:
    curves = [curve for experiment in EXPERIMENTS for curve in experiment.accuracy.values()]
    assert sum(map(len, curves)) == 60 and all(0 < x <= 100 for curve in curves for x in curve)
    assert all(set(experiment.accuracy) == set(SOURCE_METHODS) for experiment in EXPERIMENTS)


def test_rk_net_is_the_ode_net_differentiated_by_autograd() -> None:
    torch.manual_seed(0)
    ode, rk = build("ode", 3, 4, method="euler"), build("rknet", 3, 4)
    rk.load_state_dict(ode.state_dict())
    images, labels = torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 2])
    for model in (ode, rk):
        cross_entropy(model.eval()(images), labels).backward()
    torch.testing.assert_close(rk(images), ode(images), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(ode.parameters(), rk.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_res_net_has_a_block_s_parameters_for_each_block_and_the_same_stem_and_head() -> None:
    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    deep, shallow, ode = build("resnet", 3, RESIDUAL_BLOCKS), build("resnet", 3, 1), build("ode", 3, 20)
    time_weights = 2 * 64 * 9  # of the time channel, which the residual block lacks
    assert count(ode) - count(shallow) == time_weights
    assert count(deep) - count(shallow) == (RESIDUAL_BLOCKS - 1) * count(shallow.ode)
    assert count(ode) <= 0.4 * count(deep)


def made_up(accuracy: float = 1.0) -> Any:
    """Results that no one measured, every accuracy the same."""

    def get(job: Job) -> Result:
        if isinstance(job, Training):
            curve = [accuracy] * job.epochs
            return {
                "accuracy": curve,
                "seconds": [1.0] * job.epochs,
                "parameters": 490 if "res" in job.network else 120,
            }
        if isinstance(job, Comparison):
            return {"accuracy": accuracy, "parameters": 490 if job.network == "resnet" else 120}
        if isinstance(job, Epoch):
            machine = {"cpu": "a processor", "threads": 2, "isa": "portable", "torch": "2"}
            return {"seconds": 5.0, "machine": machine}
        if isinstance(job, (Depth, Footprint)):
            return {"peak_bytes": 2**20, "seconds": 0.1}
        if isinstance(job, Evaluations):
            return {"counts": [{"adjoint": "discrete", "steps": 5, "forward": None, "backward": None}]}
        assert isinstance(job, OtherSolvers)
        return {"accuracy": [accuracy for _ in job.settings()]}

    return get


def test_what_is_met_and_missed_follows_from_the_figures() -> None:
    perfect = {"quick": False, **collect(FULL, made_up())}
    assert headline(perfect).startswith("60 of the report's 60 accuracies")
    assert all(goal["met"] for goal in perfect["goals"]) and "✗ (" not in page(perfect)

    run = FULL.training("single", 1350, 0.025, "implicit_euler", seed=2)

    def get(job: Job) -> Result:
        return {**made_up()(job), "accuracy": [1.0, 1.0, 1.0, 1.0, 0.97]} if job == run else made_up()(job)

    paper = {"quick": False, **collect(FULL, get)}  # (100 + 100 + 97) / 3 = 99.0, below the report's 99.883
    text = page(paper)
    assert headline(paper).startswith("59 of the report's 60 accuracies")
    assert "- Single, 1,350 images, h = 0.025, implicit Euler, epoch 5: 99.00 against 99.88" in text
    assert text.count("✗ (") == 1 and "99.00 ± 1.73 ✗ (99.88)" in text


def page_with_runs(*last: float) -> str:
    """The page where one method's last accuracies of Single with 1,350 images, the report's 99.883, are these."""
    runs = FULL.experiment(EXPERIMENTS[3], "implicit_euler")

    def get(job: Job) -> Result:
        shares = [share for run, share in zip(runs, last) if run == job]
        return {**made_up()(job), "accuracy": [1.0, 1.0, 1.0, 1.0, *shares]} if shares else made_up()(job)

    return page({"quick": False, **collect(FULL, get)})


def test_a_missed_figure_is_held_against_the_seeds() -> None:
    assert "figure is" not in page_with_runs(1.0, 1.0, 1.0)
    # Spreads 0.1 and 0.01 points; one more run lies 4.303 · √(4/3) = 4.97 spreads from the mean, or nearer.
    assert "| 99.70, 99.80, 99.90 | 0.083 | 5.0 | 0.100 | 99.30 to 100.00 | within the spread |" in page_with_runs(
        0.997, 0.998, 0.999
    )
    text = page_with_runs(0.9959, 0.9969, 0.9979)
    assert "0 of these 1 lie within one spread" in text and "| within the range |" in text
    assert "| **outside** |" in page_with_runs(0.9979, 0.9980, 0.9981)


def test_table_1_has_every_row_twice_and_says_who_errs_how_much() -> None:
    def get(job: Job) -> Result:
        worse = isinstance(job, Comparison) and job.network == "mlp"
        return made_up(0.9 + 0.01 * job.seed if worse else 1.0)(job)  # type: ignore[attr-defined]

    paper = collect(FULL, get)
    assert {images: [row["name"] for row in table["rows"]] for images, table in paper["table1"].items()} == {
        images: [name for name, _ in ROWS.values()] for images in ("shapes", "digits")
    }
    text = page({"quick": False, **paper})
    assert text.count("| MLP of one hidden layer | 9.00 ± 1.00 | 120 | – | 1 |") == 2
    assert text.count("with 24% of its parameters; the perceptron errs 9.00%") == 2


def test_the_perceptron_has_the_parent_paper_s_300_hidden_units() -> None:
    perceptron = network("mlp", "", "digits")
    assert sum(p.numel() for p in perceptron.parameters()) == 256 * 300 + 300 + 300 * 10 + 10
    assert perceptron(torch.rand(2, 1, 16, 16)).shape == (2, 10)


def test_the_digits_are_divided_by_seed_and_none_is_on_both_sides() -> None:
    pytest.importorskip("sklearn")
    data, other = digits(0), digits(1)
    assert (len(data.train), len(data.test)) == (DIGITS - 360, 360)
    assert sorted([*data.train.labels.tolist(), *data.test.labels.tolist()]) == sorted(
        [*other.train.labels.tolist(), *other.test.labels.tolist()]
    )
    assert not torch.equal(data.test.labels, other.test.labels)


def test_a_perceptron_learns_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = Comparison("mlp", "", "digits", 2, 2, seed=0, epochs=3).compute(Store(tmp_path))
    assert result["accuracy"] > 0.8


@pytest.mark.slow
def test_the_reversible_ode_net_needs_less_memory_than_the_rk_net() -> None:
    reversible, rk = (
        Footprint(*row, "digits", 240).compute(Store(Path())) for row in (("ode", "reversible"), ("rknet", ""))
    )
    if rk["peak_bytes"] is None:
        pytest.skip("this system does not say how much memory a process takes")
    assert reversible["peak_bytes"] < 0.8 * rk["peak_bytes"] and rk["seconds"] > 0


def test_a_job_s_own_modules_decide_its_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Store(tmp_path), FULL.training("single", 500, 0.01, "euler", seed=0)
    own = FULL.comparison("mlp", "", "digits")[0]
    before = store.path(run, ""), store.path(own, "")
    monkeypatch.setattr(Comparison, "sources", ("_experiments.page",))
    assert store.path(run, "") == before[0] and store.path(own, "") != before[1]


def test_table_1_alone_is_added_to_kept_figures_or_refused_without_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(["--only", "table1", "--out", str(tmp_path)]))
    assert exit_.value.code == 2 and "run it without --only first" in capsys.readouterr().err
    paper = {"quick": False, **collect(FULL, made_up())}
    (tmp_path / "results.json").write_text(json.dumps({**paper, "table1": {}}))
    store = Store(tmp_path / "cache")
    store.prepare()
    trainings, timings = FULL.table1()
    for job in (*trainings, *timings):
        store.put(job, made_up(0.5)(job))
    main(["--only", "table1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["table1"]["digits"]["rows"][0]["mean"] == 50 and written["experiments"] == paper["experiments"]


def test_a_worse_ode_net_misses_its_goal() -> None:
    def get(job: Job) -> Result:
        return made_up(1.0 if isinstance(job, Training) and job.network == "resnet" else 0.996)(job)

    goals = {goal["name"]: goal for goal in collect(FULL, get)["goals"]}
    assert goals["Single: points that the ODE-Net loses to the ResNet"]["met"] is False
    assert goals["Single: points that the ODE-Net loses to the ResNet"]["measured"] == pytest.approx(0.4)


def test_a_training_that_failed_is_said_in_the_sweep_and_an_error_in_an_experiment() -> None:
    failing = FULL.sweep(250, 0.1, "implicit_euler")
    assert failing is not None

    def get(job: Job) -> Result:
        return {"failed": "no stage"} if job == failing[0] else made_up()(job)

    assert "| 250 | 0.1 | 100.00 ± 0.00 | failed | 100.00 ± 0.00 |" in page({"quick": False, **collect(FULL, get)})
    with pytest.raises(_cli.UserError, match=r"single, 2700 images, euler, seed 0: no stage"):
        collect(FULL, lambda job: {"failed": "no stage"})


def sweep_cell(images: int, step: float, *means: float | None) -> dict[str, Any]:
    columns = [{"mean": mean, "spread": None if mean is None else 1.0} for mean in means]
    return {"train_size": images, "step_size": step, "methods": dict(zip(SOURCE_METHODS, columns))}


def test_the_closing_question_is_answered_from_few_images_and_smaller_steps_alone() -> None:
    ignored = [sweep_cell(size, 0.1, 99.0, 99.0, 50.0) for size in (250, 500)]
    ignored.append(sweep_cell(2700, 0.01, 99.0, 99.0, 50.0))
    lead, rivals_failed = sweep_cell(250, 0.05, 80.0, 80.0, 90.0), sweep_cell(500, 0.05, None, None, 40.0)
    behind, ours_failed = sweep_cell(250, 0.01, 80.0, None, 70.0), sweep_cell(500, 0.01, 80.0, None, None)
    text = _answer([*ignored, lead, rivals_failed])
    assert "in 2 of 2 cells, in 2 of them" in text and text.endswith("holds here too.")
    text = _answer([*ignored, lead, behind, ours_failed])
    assert "in 1 of 3 cells, in 1 of them" in text and text.endswith("holds in part.")
    assert _answer([*ignored, sweep_cell(250, 0.05, 80.0, None, 81.0)]).endswith("do not show it.")
    assert "cannot tell" in _answer([*ignored, sweep_cell(250, 0.05, None, None, None)])


def test_models_trained_under_error_control_are_tested_at_other_tolerances() -> None:
    run, *_ = FULL.controlled()
    ode = run.model().ode
    assert (ode.rtol, ode.steps, ode.step_size) == (run.rtol, None, None)
    text = page({"quick": False, **collect(FULL, made_up())})
    assert "| implicit midpoint | rtol 1 | rtol 0.1 | rtol 0.01 |" in text
    assert "| rtol 0.1 | 100.0 | 100.0 | 100.0 |" in text


def test_a_model_whose_training_failed_is_tested_nowhere(tmp_path: Path) -> None:
    job, store = FULL.other_solvers()[0], Store(tmp_path)
    store.put(job.trained, {"failed": "no stage"})
    assert set(job.compute(store)["accuracy"]) == {None}


def test_refused_evaluations_leave_an_empty_panel(tmp_path: Path) -> None:
    draw({"quick": False, **collect(FULL, made_up())}, tmp_path)
    with Image.open(tmp_path / "evaluations.png") as picture:
        picture.verify()


def test_a_result_is_kept_for_its_job_and_its_code_alone(tmp_path: Path) -> None:
    job = FULL.training("single", 500, 0.01, "euler", seed=0)
    store = Store(tmp_path / "cache")
    store.prepare()
    assert store.get(job) is None
    store.put(job, {"accuracy": [0.5]})
    assert Store(tmp_path / "cache").get(job) == {"accuracy": [0.5]}
    assert store.get(replace(job, seed=1)) is None and store.get(replace(job, network="rknet")) is None
    store.put(FULL.epoch("euler"), {"seconds": 1.0})
    store.library = "another build"
    assert store.get(job) is not None and store.get(FULL.epoch("euler")) is None
    store.sources = "of another version"
    assert store.get(job) is None


def test_every_module_that_a_job_runs_decides_whether_its_result_is_kept() -> None:
    package = Path(nodeshape.__path__[0])

    def imported(name: str) -> Iterator[str]:
        for node in ast.walk(ast.parse((package / f"{name.replace('.', '/')}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nodeshape."):
                module = (node.module or "").removeprefix("nodeshape.")
                yield from [module, *(f"{module}.{alias.name}" for alias in node.names)]

    found, left = set(), {"_experiments.training", "_experiments.solvers", "_experiments.depth"}
    while left:
        found |= left
        names = {name for module in left for name in imported(module)}
        left = {name for name in names if (package / f"{name.replace('.', '/')}.py").exists()} - found
    deciding_nothing = {
        "_benchmarking.timing",
        "_cli",
        "_data.folder",
        "_data.images",
        "_errors",
        "_experiments.jobs",
        "_files",
        "_training.checkpoint",
    }
    assert found == {*jobs.SOURCES, *deciding_nothing}


@pytest.mark.slow
def test_a_quick_run_writes_every_table_and_a_second_one_only_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    main(["--quick", "--out", str(out)])
    assert f"open {out / 'README.md'}" in capsys.readouterr().out
    text, figures = (out / "README.md").read_text(), json.loads((out / "results.json").read_text())
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert {*pictures, "cache", "README.md", "results.json"} == {path.name for path in out.iterdir()}
    for name in pictures:
        assert (out / name).stat().st_size < 150_000
        with Image.open(out / name) as picture:
            picture.verify()
    assert "nan" not in text and figures["quick"] and len(figures["experiments"]) == 4

    kept = {path: path.stat().st_mtime_ns for path in (out / "cache").iterdir() if path.suffix in (".json", ".pt")}
    lost = next(path for path in kept if path.suffix == ".json")
    lost.unlink()
    main(["--quick", "--out", str(out)])
    assert capsys.readouterr().out.startswith("1 run on ")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.stem != lost.stem)
    main(["--quick", "--out", str(out)])
    assert capsys.readouterr().out.count("\n") == 1


def test_without_scikit_learn_nothing_is_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeshape.paper.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(["--quick", "--out", str(tmp_path)]))
    assert exit_.value.code == 2 and "pip install scikit-learn" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(["--out", str(tmp_path / "file")]))
    assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: --out")


# ---- jobs at tiny sizes ----------------------------------------------------------------------------------------------


def tiny(method: str = "euler", **changes: Any) -> Training:
    return replace(Training("single", 12, 0.5, method, seed=0, epochs=1, test_size=6), **changes)


def test_a_training_leaves_weights_that_other_jobs_test(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = tiny("implicit_midpoint")
    result = job.compute(store)
    assert len(result["accuracy"]) == len(result["seconds"]) == 1 and 0 <= result["accuracy"][0] <= 1
    assert result["parameters"] == sum(p.numel() for p in job.model().parameters())
    store.put(job, result)
    tested = OtherSolvers(job, 6, (1, 2), (0.1,))
    accuracy = tested.compute(store)["accuracy"]
    assert len(accuracy) == len(tested.settings()) == 7 and all(0 <= share <= 1 for share in accuracy)
    again = job.trained(store, method="implicit_midpoint", step_size=0.5)
    assert accuracy_on(again, drawn_test_images("single", 6, 0)) == result["accuracy"][0]


def test_evaluations_are_counted_in_every_gradient_mode(tmp_path: Path) -> None:
    store, job = Store(tmp_path), tiny()
    job.compute(store)
    counts = Evaluations(job, 2, (2, 4), (0.1,)).compute(store)["counts"]
    assert [c["adjoint"] for c in counts] == [adjoint for adjoint in ADJOINTS for _ in range(3)]
    for count in counts:
        if "steps" in count:
            assert count["forward"] == count["steps"] and count["backward"] >= count["steps"]


@pytest.mark.parametrize("error", REFUSALS)
def test_what_a_solver_refuses_has_no_figure(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error("refused here")

    monkeypatch.setattr(ShapeClassifier, "forward", refuse)
    monkeypatch.setattr(Training, "trained", lambda run, store, **solver: ShapeClassifier(3, **solver))
    store = Store(Path("nowhere"))
    counts = Evaluations(tiny(), 2, (2,), ()).compute(store)["counts"]
    assert len(counts) == len(ADJOINTS) and {(c["forward"], c["backward"]) for c in counts} == {(None, None)}
    assert OtherSolvers(tiny(), 2, (2,), (0.1,)).compute(store) == {"accuracy": [None] * 4}
    assert tiny().compute(store) == {"failed": "refused here"}
    with pytest.raises(_cli.UserError, match="single, 12 images, euler, one epoch: refused here"):
        Epoch("single", 12, 0.5, "euler").compute(store)


def test_a_first_epoch_is_timed_with_its_machine(tmp_path: Path) -> None:
    result = Epoch("single", 12, 0.5, "euler").compute(Store(tmp_path))
    assert result["seconds"] > 0 and result["machine"]["threads"] == torch.get_num_threads()


def test_a_stopped_training_ends_its_worker() -> None:
    class StoppedTrainer:
        def train(self) -> Iterator[Any]:
            yield "an event that is not the last"
            yield Stopped(interrupted=True)

    with pytest.raises(SystemExit):
        training._history(StoppedTrainer())  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [("resnet", ""), ("rknet", ""), ("ode", "reversible")])
def test_a_training_step_s_memory_and_time(line: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([5, 12])
    monkeypatch.setattr(depth, "_memory", lambda name: next(resident))
    found = depth.measure(*line, depth=2, batch_size=3)
    assert found["peak_bytes"] == 7 and found["seconds"] > 0
    resident = iter([12, 5])
    monkeypatch.setattr(table1, "_memory", lambda name: next(resident))
    found = table1.measure(*line, images="digits", batch_size=3)
    assert found["peak_bytes"] == 0 and found["seconds"] > 0


def test_a_system_that_does_not_tell_its_memory_gives_no_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(depth, "STATUS", tmp_path / "none")
    assert depth.measure("ode", "discrete", 1, 2)["peak_bytes"] is None
    assert table1.measure("mlp", "", "shapes", 2)["peak_bytes"] is None
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    12 kB\nVmRSS:\t    7 kB\n")
    monkeypatch.setattr(depth, "STATUS", tmp_path / "status")
    assert (depth._memory("VmRSS"), depth._memory("VmHWM")) == (7 * 1024, 12 * 1024)


def test_measurements_in_processes_of_their_own_give_figures_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(Path("nowhere"))
    result = Depth("ode", "discrete", 1, 2).compute(store)
    assert result.keys() == {"peak_bytes", "seconds"} and result["seconds"] > 0

    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 9, "", "out of memory\n")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(_cli.UserError, match=r"depth ode discrete 1 2 ended with code 9: out of memory"):
        Depth("ode", "discrete", 1, 2).compute(store)
    with pytest.raises(_cli.UserError, match=r"table1 mlp  digits 2 ended with code 9: out of memory"):
        Footprint("mlp", "", "digits", 2).compute(store)


def test_a_row_of_table_1_is_trained_on_shapes_too(tmp_path: Path) -> None:
    for row in (("mlp", ""), ("ode", "reversible")):
        result = Comparison(*row, "shapes", 12, 6, seed=0, epochs=1).compute(Store(tmp_path))
        assert 0 <= result["accuracy"] <= 1
        assert result["parameters"] == sum(p.numel() for p in network(*row, "shapes").parameters())


def test_the_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(_cli.UserError, match="pip install scikit-learn"):
        digits(0)


def test_costs_grow_with_what_is_computed() -> None:
    jobs_: list[tuple[Job, Job]] = [
        (tiny(), tiny("implicit_euler")),
        (tiny(), tiny(network="rknet", step_size=0.01)),
        (tiny(), tiny(rtol=0.1)),
        (tiny(), tiny(train_size=24)),
        (Depth("ode", "discrete", 2, 8), Depth("resnet", "", 2, 8)),
        (Evaluations(tiny(), 2, (2,), ()), Evaluations(tiny(), 2, (2,), (0.1,))),
        (OtherSolvers(tiny(), 2, (2,), ()), OtherSolvers(tiny(), 4, (2,), ())),
        (Comparison("mlp", "", "digits", 2, 2, 0, 1), Comparison("ode", "", "digits", 2, 2, 0, 1)),
        (Comparison("mlp", "", "shapes", 2, 2, 0, 1), Comparison("mlp", "", "shapes", 4, 2, 0, 1)),
        (Epoch("single", 2, 0.5, "euler"), Epoch("single", 2, 0.1, "euler")),
        (Footprint("mlp", "", "digits", 2), Depth("resnet", "", 100, 120)),
    ]
    assert all(0 < less.seconds < more.seconds for less, more in jobs_)


def test_the_quick_plan_s_jobs_are_the_full_plan_s_in_small() -> None:
    for plan in (FULL, QUICK):
        jobs_ = [*plan.trainings(), *plan.analyses(), *plan.timings()]
        assert len(set(jobs_)) == len(jobs_)
        assert {job.trained for job in plan.analyses()} <= set(plan.trainings())  # type: ignore[attr-defined]
        assert all(job.alone for job in plan.timings()) and not any(job.alone for job in plan.trainings())
        collect(plan, made_up_of(set(jobs_)))
    assert sum(job.seconds for job in QUICK.trainings()) < 0.01 * sum(job.seconds for job in FULL.trainings())


def made_up_of(jobs_: set[Job]) -> Any:
    """Made-up results of planned jobs, and of no others."""

    def get(job: Job) -> Result:
        assert job in jobs_
        return made_up()(job)  # type: ignore[no-any-return]

    return get


def test_a_quick_page_is_of_one_seed_and_says_that_it_means_nothing() -> None:
    text = page({"quick": True, **collect(QUICK, made_up(0.3))})
    assert "Its figures mean nothing" in text and "mean of one seed" in text and "±" not in text.split("##")[1]
    assert "figure is" not in text  # one run has no spread to hold a figure against
    assert "no such training succeeded" not in text


def test_without_memory_and_tests_that_succeeded_the_page_has_dashes(tmp_path: Path) -> None:
    def get(job: Job) -> Result:
        if isinstance(job, (Depth, Footprint)):
            return {"peak_bytes": None, "seconds": 0.1}
        if isinstance(job, OtherSolvers):
            return {"accuracy": [None for _ in job.settings()]}
        if isinstance(job, Evaluations):
            return {"counts": [{"adjoint": "discrete", "steps": 5, "forward": 5.0, "backward": 10.0}]}
        better = isinstance(job, (Training, Comparison)) and job.network == "ode"
        return made_up(1.0 if better else 0.9)(job)  # type: ignore[no-any-return]

    paper = {"quick": False, **collect(FULL, get)}
    text = page(paper)
    assert "Within a method" not in text and "Its memory, O(1)" not in text and "Refused:" not in text
    assert "| rtol 0.1 | – | – | – |" in text and "10.00 points ahead of the ResNet" in text and "| 5 / 10 |" in text
    assert "| – | not measured |" in text
    draw(paper, tmp_path)
    for name in ("depth", "evaluations", "other-solvers", "sweep"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.verify()


@pytest.mark.slow
def test_jobs_are_computed_in_workers_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = Footprint("mlp", "", "digits", 2)
    store.prepare()
    done = [kept for kept in compute([job], store, workers=2, threads=1) if kept is not None]
    assert done == [job]
    result = store.get(job)
    assert result is not None and result["seconds"] > 0


def test_a_worker_that_dies_is_told_of(tmp_path: Path) -> None:
    class Pool:
        def __init__(self, *_: object) -> None:
            self.workers = iter([[SimpleNamespace(pid=1)], [SimpleNamespace(pid=1)], [SimpleNamespace(pid=2)]])

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def imap_unordered(self, *_: object) -> Pool:
            return self

        def next(self, timeout: float) -> None:
            raise multiprocessing.TimeoutError

    pool = Pool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "active_children", lambda: next(pool.workers))
        patch.setattr(multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=lambda *_: pool))
        waiting = compute([Footprint("mlp", "", "digits", 2)], Store(tmp_path), workers=1, threads=1)
        assert next(waiting) is None
        with pytest.raises(_cli.UserError, match="a worker process was killed"):
            next(waiting)


def test_a_worker_says_nothing_and_leaves_ctrl_c_to_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ignored = []
    monkeypatch.setattr(jobs.signal, "signal", lambda *what: ignored.append(what))
    monkeypatch.setattr(jobs.tqdm, "set_lock", lambda lock: None)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    jobs._begin_worker(torch.get_num_threads())
    assert ignored == [(signal.SIGINT, signal.SIG_IGN)] and sys.stderr.name == os.devnull
    sys.stderr.close()
    store, job = Store(tmp_path), tiny("euler")
    monkeypatch.setattr(Training, "compute", lambda job, store: {"accuracy": [0.5]})
    assert jobs._compute_one((job, store)) == job and store.get(job) == {"accuracy": [0.5]}


def test_without_a_compiled_library_figures_are_kept_as_of_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_one = Store(tmp_path).path(Footprint("mlp", "", "digits", 2), "")
    monkeypatch.setattr(jobs, "_LIBRARY", tmp_path / "none.so")
    assert Store(tmp_path).library == "" and Store(tmp_path).path(Footprint("mlp", "", "digits", 2), "") != with_one


@pytest.mark.slow
def test_a_run_computes_what_is_missing_and_a_second_one_only_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Job] = []

    def stand_in(stage: list[Job], store: Store, workers: int, threads: int) -> Iterator[Job | None]:
        assert (workers, threads) == ((1, torch.get_num_threads()) if stage[0].alone else (torch.get_num_threads(), 1))
        yield None
        for job in stage:
            computed.append(job)
            store.put(job, made_up()(job))
            yield job

    monkeypatch.setattr(nodeshape.paper, "compute", stand_in)
    monkeypatch.setattr(nodeshape.paper, "slowness", lambda: 1.0)
    main(["--quick", "--out", str(tmp_path)])
    everything = [*QUICK.trainings(), *QUICK.analyses(), *QUICK.timings()]
    assert computed == everything
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{len(everything)} runs on ") and said[-1].endswith(f"open {tmp_path / 'README.md'}")
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == set(re.findall(r"!\[.+?\]\((.+?)\)", (tmp_path / "README.md").read_text()))
    main(["--quick", "--out", str(tmp_path)])
    assert computed == everything and capsys.readouterr().out.count("\n") == 1


def test_ctrl_c_says_that_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nodeshape.paper, "compute", interrupted)
    monkeypatch.setattr(nodeshape.paper, "slowness", lambda: 1.0)
    with pytest.raises(SystemExit) as exit_:
        main(["--quick", "--out", str(tmp_path)])
    assert exit_.value.code == 130 and "the same command goes on where it was" in capsys.readouterr().out


def test_slowness_is_measured_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 10.0 + 60 * (training.TRAIN_IMAGE + 20 * training.TRAIN_STEP) * 2])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(times))
    assert training.slowness() == pytest.approx(2.0)
