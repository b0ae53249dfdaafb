"""The paper: its networks are what it says, its page follows from the figures, and nothing is computed twice."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import nodeshape
from nodeshape import _cli
from nodeshape._experiments import jobs
from nodeshape._experiments.depth import Depth
from nodeshape._experiments.jobs import Job, Result, Store
from nodeshape._experiments.networks import RESIDUAL_BLOCKS, build
from nodeshape._experiments.page import _answer, headline, page
from nodeshape._experiments.plan import FULL
from nodeshape._experiments.plots import draw
from nodeshape._experiments.results import DIGITS, collect
from nodeshape._experiments.solvers import Evaluations, OtherSolvers
from nodeshape._experiments.source import EXPERIMENTS
from nodeshape._experiments.table1 import ROWS, Comparison, Footprint, digits, network
from nodeshape._experiments.training import Epoch, Training
from nodeshape._ode.method import SOURCE_METHODS
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
