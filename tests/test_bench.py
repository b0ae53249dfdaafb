"""The bench: its contenders agree before they are timed, and what a run leaves is complete. No test asserts a time."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from nodeshape import _cli, bench
from nodeshape._benchmarking import contenders, deploy, memory, report, solver, timing, train, trained
from nodeshape._benchmarking.cases import AGREEMENT, Case, Contender, Result, run_case
from nodeshape._benchmarking.contenders import Problem, Unavailable, nodeshape, plain_loop
from nodeshape._benchmarking.targets import AtLeast, AtMost, Limit, Target
from nodeshape._benchmarking.timing import QUICK, Effort, Timing, alternate, measure
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._models.dynamics import MLPDynamics
from nodeshape.bench import main


def problem() -> Problem:
    torch.manual_seed(0)
    return Problem(MLPDynamics(2, hidden=(16,)), torch.randn(3, 2), steps=5)


def halved() -> tuple[torch.Tensor, ...]:
    return tuple(x / 2 for x in nodeshape(problem())())


def absent() -> None:
    raise Unavailable("not installed: pip install it")


GPU = [pytest.param(suite, "cuda", marks=pytest.mark.cuda) for suite in ("solver", "train")]


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "device"), [*((suite, "cpu") for suite in ("solver", "train", "deploy")), *GPU])
def test_a_quick_run_measures_every_case_and_its_contenders_agree(
    suite: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--suite", suite, "--device", device, "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["suite"] == suite and report["quick"] and report["targets"] == []
    assert {"cpu", "isa", "threads", "sgemm_flops_by_threads", "torch"} <= report["machine"].keys()
    printed = capsys.readouterr().out
    for case in report["cases"]:
        assert case["name"] in printed and case["section"] in printed
        assert len(case["seconds"]) >= 2, case
        absent = ("not installed", "measured on the CPU only")
        assert all(any(word in reason for word in absent) for reason in case["skipped"].values()), case["skipped"]
        for contender, difference in case["difference"].items():  # undoing an Euler step divides by a small 1 + h λ
            assert difference < (AGREEMENT if contender == "reversible" else 1e-4), (case["name"], case["difference"])
        for found in case["seconds"].values():
            assert 0 < found["lower_quartile"] <= found["median"] <= found["upper_quartile"]
    with Image.open(tmp_path / "out.png") as picture:
        picture.verify()


def test_a_contender_whose_numbers_differ_is_not_timed_and_said_to_differ() -> None:
    contenders = {
        "nodeshape": Contender(lambda: nodeshape(problem())),
        "plain": Contender(lambda: plain_loop(problem()), like="nodeshape"),
        "wrong": Contender(lambda: halved, like="nodeshape"),
    }
    result = run_case(Case("section", "row", contenders), QUICK)
    assert set(result.seconds) == {"nodeshape", "plain"}
    assert result.difference["plain"] < 1e-6
    assert "differs from nodeshape by 5.0e-01" in result.skipped["wrong"]


def test_an_absent_rival_is_skipped_with_its_reason() -> None:
    contenders = {"nodeshape": Contender(lambda: nodeshape(problem())), "rival": Contender(absent)}
    result = run_case(Case("section", "row", contenders), QUICK)
    assert result.skipped == {"rival": "not installed: pip install it"}
    target = AtLeast("faster", 1, "section", "row", "rival", "nodeshape")
    assert target.measured([result]) is None


def test_contenders_take_turns_and_the_order_alternates() -> None:
    calls: list[str] = []
    measure({name: (lambda name=name: calls.append(name)) for name in "ab"}, Effort(rounds=4, sample_seconds=0.0))
    assert calls[2:] == list("abbaabba")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "nothing"],
        ["--json", "nowhere/out.json"],
        ["--json", "."],
        ["--json", "out.png"],
        ["--rounds"],
        ["--device", "tpu"],
    ],
)
def test_bad_input_is_one_line_exit_code_2_before_any_measurement(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: main(arguments))
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and output.out == ""
    assert list(tmp_path.iterdir()) == []


# ---- at tiny sizes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the calls of a test move on."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], seconds: float) -> Callable[[], None]:
    def call() -> None:
        clock[0] += seconds

    return call


def test_a_sample_repeats_short_calls_and_gives_the_seconds_of_one(clock: list[float]) -> None:
    calls = {"short": taking(clock, 0.25), "long": taking(clock, 4.0)}
    found = measure(calls, Effort(rounds=3, sample_seconds=2.0))
    assert found == {"short": Timing(0.25, 0.25, 0.25, repeats=9), "long": Timing(4.0, 4.0, 4.0, repeats=1)}


def test_a_call_that_takes_no_time_at_all_is_not_repeated_for_ever(clock: list[float]) -> None:
    assert measure({"none": lambda: None}, Effort(rounds=2, sample_seconds=1.0))["none"].repeats >= 100_000


def test_calls_in_turns_give_the_rival_s_time_over_ours(clock: list[float]) -> None:
    assert alternate(taking(clock, 2.0), taking(clock, 5.0), samples=3) == 2.5


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_a_measurement_only_where_it_was_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        measure({"x": lambda: None}, Effort(rounds=2, sample_seconds=0.0))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_machine_that_does_not_say_its_processor_is_called_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "Path", lambda path: Path("/nowhere"))
    monkeypatch.setattr(timing.platform, "processor", lambda: "")
    monkeypatch.setattr(timing.platform, "machine", lambda: "riscv64")
    monkeypatch.setenv("NODESHAPE_ISA", "portable")
    here = timing.machine(Effort(rounds=2, sample_seconds=0.0, sgemm_size=8))
    assert (here["cpu"], here["isa"]) == ("riscv64", "portable")
    assert set(here["sgemm_flops_by_threads"]) == {"1", str(torch.get_num_threads())} and "gpu" not in here


def result(row: str, scale: float, seconds: dict[str, float], **more: Any) -> Result:
    times = {name: Timing(x, 0.9 * x, 1.1 * x, 1) for name, x in seconds.items()}
    return Result("Section", row, scale, threads=1, seconds=times, **more)


RESULTS = [
    result("small", 1, {"ours": 0.001, "rival": 0.25}, direct_limit=0.0005, figures={"evaluations": 2.5}),
    result("large", 8, {"rival": 0.002}, skipped={"ours": "too large"}, difference={"rival": 1e-7}),
]


def test_a_table_gives_milliseconds_times_the_first_column_and_why_others_are_absent() -> None:
    title, small, large, *notes = report.table("Section", RESULTS).splitlines()
    assert title.split() == ["Section", "ours", "rival", "direct", "limit"]
    assert small.split() == ["small", "1", "ms", "250", "ms", "250×", "0.5", "ms", "0.5×"]
    assert large.split() == ["large", "–", "2", "ms", "–"]
    assert len(title) == len(small) == len(large)
    assert notes == ["  small: evaluations 2.50", "  large: no ours: too large"]


def test_targets_are_met_missed_or_not_measured() -> None:
    chosen: list[Target] = [
        AtLeast("faster", 3, "Section", "small", "rival", "ours"),
        AtMost("slower", 2, "Section", "small", "rival", "ours"),
        AtMost("below the limit", 2, "Section", "small", "ours", "direct limit"),
        Limit("evaluations", 2, "Section", "small", "evaluations"),
        Limit("others", 2, "Section", "small", "none"),
        Limit("elsewhere", 2, "Section", "huge", "evaluations"),
        AtLeast("elsewhere too", 2, "Section", "huge", "rival", "ours"),
        AtLeast("absent", 2, "Section", "large", "rival", "ours"),
    ]
    lines = report.targets(chosen, RESULTS)
    assert [line["measured"] for line in lines] == [250, 250, 2, 2.5, None, None, None, None]
    assert [line["met"] for line in lines] == [True, False, True, False, None, None, None, None]
    first, second, *_, last = report.target_table(lines).splitlines()
    assert first.split() == ["faster", "≥", "3×", "250", "met"] and second.split() == [
        "slower",
        "≤",
        "2×",
        "250",
        "MISSED",
    ]
    assert last.split() == ["absent", "≥", "2×", "not", "measured"]


def test_a_whole_run_prints_tables_and_targets_and_writes_figures_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Contender(lambda: nodeshape(problem())), Contender(lambda: plain_loop(problem()), like="ours")
    rows = [Case("Tiny", f"row {n}", {"ours": ours, "plain": theirs}, scale=n, direct=1.0) for n in (1, 2)]
    rows.append(Case("Other", "row", {"rival": Contender(absent)}))
    suite = SimpleNamespace(
        cases=lambda quick, device: rows,
        PLOTS={"Tiny": "size", "Not measured": "size"},
        TARGETS=[AtLeast("of ours", 0, "Tiny", "row 1", "plain", "ours")],
    )
    monkeypatch.setitem(bench.SUITES, "solver", suite)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "FULL", Effort(rounds=2, sample_seconds=0.0, sgemm_size=8))
    main(["--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "Medians of 2 alternating rounds" in printed and "row: no rival: not installed" in printed
    assert re.search(r"of ours +≥ 0× +\S+ +met", printed) and f"Wrote {tmp_path / 'out.json'}" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert [case["name"] for case in written["cases"]] == ["row 1", "row 2", "row"]
    assert written["targets"][0]["met"] and not written["quick"]
    assert all(case["direct_limit"] > 0 for case in written["cases"][:2]) and written["cases"][2]["seconds"] == {}
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > picture.height / 2
    main(["--quick"])
    assert "Targets" not in capsys.readouterr().out


def test_a_gpu_that_is_not_there_and_a_suite_without_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here"):
        main(["--device", "cuda"])
    with pytest.raises(UserError, match="measures on the CPU, got --device cuda"):
        deploy.cases(quick=True, device=torch.device("cuda"))


@pytest.mark.parametrize("training", [False, True])
def test_every_rival_solves_the_problem_it_is_given(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchdiffeq")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    given = replace(problem(), training=training)
    rivals = [plain_loop, contenders.torchdiffeq, contenders.compiled_loop, *([] if training else [contenders.op])]
    for rival in rivals:
        for ours, theirs in zip(nodeshape(given)(), rival(given)(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    implicit = replace(given, method="implicit_midpoint", tolerance=1e-7)
    for ours, theirs in zip(nodeshape(implicit)(), plain_loop(implicit)(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_torchdiffeq_s_adjoint_is_near_the_discrete_gradient_in_small_steps() -> None:
    pytest.importorskip("torchdiffeq")
    given = replace(problem(), steps=400, training=True)
    for ours, theirs in zip(nodeshape(given)(), contenders.torchdiffeq(given, adjoint=True)(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.01)


def test_rivals_that_cannot_take_part_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with contenders.without_fused():
        for solver in (nodeshape, contenders.op):
            with pytest.raises(Unavailable, match="NODESHAPE_FUSED=0"):
                solver(problem())
    for name, rival in (("torchdiffeq", contenders.torchdiffeq), ("diffrax", contenders.diffrax)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(Unavailable, match=f"not installed: pip install {name}"):
            rival(problem())
    elsewhere = replace(problem(), y0=problem().y0.to("meta"))
    with pytest.raises(Unavailable, match="measured on the CPU only"):
        contenders.diffrax(elsewhere)

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda loop, **_: broken)
    with pytest.raises(Unavailable, match=r"torch.compile failed: RuntimeError: no compiler$"):
        contenders.compiled_loop(problem())


@pytest.mark.parametrize("before", [None, "1"])
def test_the_plain_loop_is_chosen_within_and_what_was_before_returns(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NODESHAPE_FUSED", raising=False)
    if before is not None:
        monkeypatch.setenv("NODESHAPE_FUSED", before)
    with contenders.without_fused():
        assert os.environ["NODESHAPE_FUSED"] == "0"
    assert os.environ.get("NODESHAPE_FUSED") == before


def test_memory_counts_what_lives_and_at_most_lived() -> None:
    with memory.PeakMemory() as count:
        a = torch.zeros(1000, dtype=torch.float64)
        a.view(10, 100)
        assert count.live == count.peak == 8000
        b = a + 1
        assert count.live == 16_000
        del a, b
    assert (count.live, count.peak) == (0, 16_000)


@pytest.mark.parametrize("suite", [solver, train], ids=["solver", "train"])
def test_contenders_of_a_suite_agree_in_its_small_cases(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ShapeClassifier(3, width=8, steps=2).eval()
    for module in (trained, train):
        monkeypatch.setattr(module, "trained_classifier", lambda quick: model)
    cases = suite.cases(True, torch.device("cpu"))
    assert len({(case.section, case.name) for case in cases}) == len(cases)
    for case in {case.section: case for case in reversed(cases)}.values():
        found = run_case(case, Effort(rounds=2, sample_seconds=0.0, sgemm_size=8))
        absent = {"torchdiffeq", "torchdiffeq adjoint", "diffrax", "reversible"}  # an Euler step may not be undone
        assert len(found.seconds) >= 2 and not {*found.skipped} - absent
        assert found.seconds.keys() | found.skipped.keys() == case.contenders.keys()
        assert (found.direct_limit is not None) == (case.direct > 0)
        if case.section == solver.METHOD:
            assert (
                found.figures["euler evaluations per step"]
                == 1
                < found.figures["implicit_midpoint evaluations per step"]
            )


def test_threads_are_powers_of_two_and_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, counts in ((1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])):
        monkeypatch.setattr(torch, "get_num_threads", lambda most=most: most)
        assert solver._thread_counts() == counts
