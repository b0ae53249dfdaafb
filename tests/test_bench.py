"""The bench: its contenders agree before they are timed, and what a run leaves is complete. No test asserts a time."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import onnx
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
from nodeshape._training.checkpoint import save_checkpoint
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
    for parameter in model.ode.dynamics.parameters():
        parameter.data.mul_(0.3)  # as tame as after training
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


def test_cases_of_the_deploy_suite_weigh_files_in_the_last_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [deploy.Variant(name, Path(name), "euler") for name in (deploy.NODESHAPE, deploy.ONNX)]
    monkeypatch.setattr(deploy, "_variants", lambda method, quick: found)
    for quick, methods, batches, weighed in ((True, 1, (1, 3), found[1:]), (False, 3, (1, 7, 120), found)):
        cases = deploy.cases(quick, torch.device("cpu"))
        assert [case.scale for case in cases] == list(batches) * methods
        assert [case.section for case in cases[:: len(batches)]] == [
            deploy.section(method) for method in deploy.METHODS[:methods]
        ]
        for case in cases:
            assert case.describe.args[1] == (weighed if case.scale == batches[-1] else [])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "quick"), [("euler", True), ("euler", False), ("implicit_euler", False)])
def test_every_file_of_an_export_is_a_contender_and_what_cannot_be_written_is_a_reason(
    method: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nodeshape.export
    from nodeshape._exporting import native

    def export(path: Path, out: Path, method: str, quantize: bool = False, half: bool = False) -> None:
        assert half is not quick
        if quantize and method == "implicit_euler":
            raise UserError("model.int8.onnx takes longer; nothing was written: leave out --quantize")
        out.mkdir()
        integers = ["model.int8.onnx"] if quantize else []
        for name in ("model.onnx", *integers, "model-half.onnx", "model.ts", "model.pt2", "README.md"):
            (out / name).write_text("")

    def to_native(model: object, images: object, out: Path, package: bool) -> None:
        assert package is not quick
        (out / "model.fused.ts").write_text("")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an operation\nis missing")

    def speechless(*_: object, **__: object) -> None:
        raise RuntimeError

    model = ShapeClassifier(3, width=8, steps=2).eval()
    monkeypatch.setattr(deploy, "checkpoint", lambda quick: tmp_path / "best.pt")
    monkeypatch.setattr(deploy, "trained_classifier", lambda quick: model)
    monkeypatch.setattr(nodeshape.export, "export", export)
    monkeypatch.setattr(native, "to_native", to_native)
    monkeypatch.setattr(torch.onnx, "export", broken)
    monkeypatch.setattr(nodeshape, "to_onnx", speechless)
    found = {variant.name: variant for variant in deploy._variants.__wrapped__(method, quick)}
    explicit = method == "euler"
    assert list(found)[:2] == [deploy.NODESHAPE, deploy.PLAIN]
    files = {deploy.ONNX, f"{deploy.ONNX}, half", "TorchScript", "torch.export", deploy.SCRIPT}
    others = set() if quick else {deploy.INT8, f"{deploy.ONNX}, loop"}
    assert (
        found.keys() == {deploy.NODESHAPE, deploy.PLAIN} | ({deploy.BASELINE} if explicit else set()) | files | others
    )
    unlike = {deploy.NODESHAPE, f"{deploy.ONNX}, half"} | (others & {deploy.INT8})
    assert {name for name, variant in found.items() if variant.like is None} == unlike
    if explicit:
        assert list(found)[-1] == deploy.BASELINE
        assert found[deploy.BASELINE].why_not == "cannot export: an operation"
        with pytest.raises(Unavailable, match="cannot export: an operation"):
            found[deploy.BASELINE].load()
    if not quick:
        assert found[f"{deploy.ONNX}, loop"].why_not == "cannot export: RuntimeError"
        assert found[deploy.INT8].why_not == ("" if explicit else "model.int8.onnx takes longer")


def test_a_ratio_may_be_to_a_time_of_another_section() -> None:
    results = [
        Result(section, "batch 1", 1.0, 1, {"ONNX": Timing(seconds, seconds, seconds, 1)})
        for section, seconds in (("slow", 6.0), ("quick", 2.0))
    ]
    target = AtMost("slow / quick", 2.5, "slow", "batch 1", "ONNX", "ONNX", of="quick")
    assert target.measured(results) == 3.0 and not target.met(3.0)
    assert target.measured(results[:1]) is None


def test_files_are_loaded_as_what_they_are(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 32, 32)
    model = ShapeClassifier(3, width=8, steps=2).eval()
    state = {
        "model": model.state_dict(),
        "architecture": {"num_classes": 3, "width": 8, "steps": 2},
        "classes": ["a", "b", "c"],
    }
    save_checkpoint(tmp_path / "best.pt", state)
    double = torch.nn.Linear(32, 2).eval()
    torch.export.save(torch.export.export(double, (images,)), tmp_path / "model.pt2")
    torch.jit.trace(double, images).save(tmp_path / "model.ts")
    for name, dtype in (("float", onnx.TensorProto.FLOAT), ("bytes", onnx.TensorProto.UINT8)):
        given = onnx.helper.make_tensor_value_info("image", dtype, ["batch", 1, 32, 32])
        logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 1, 32, 32])
        node = onnx.helper.make_node("Cast", ["image"], ["logits"], to=onnx.TensorProto.FLOAT)
        graph = onnx.helper.make_graph([node], "graph", [given], [logits])
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / f"{name}.onnx")

    def load(name: str, file: str) -> Any:
        return deploy.Variant(name, tmp_path / file, "euler").load()

    with torch.no_grad():
        assert torch.equal(load(deploy.NODESHAPE, "best.pt")(images), model(images))
        for name in ("torch.export", "TorchScript", deploy.SCRIPT):
            file = "model.pt2" if name == "torch.export" else "model.ts"
            torch.testing.assert_close(load(name, file)(images), double(images))
    assert (load(deploy.ONNX, "float.onnx")(images) == images.numpy()).all()
    assert (load(f"{deploy.ONNX}, uint8", "bytes.onnx")(images) == (images * 255).round().numpy()).all()


def test_percentiles_are_of_calls_in_turns_and_end_after_a_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(deploy, "footprint", lambda variant, batch: {"bytes": 10.0 * batch})
    slow, fast = taking(clock, 4.0), taking(clock, 1.0)
    weighed = [deploy.Variant(name, Path(name), "euler") for name in ("fast", "absent")]
    figures = deploy._describe({"slow": slow, "fast": fast}, weighed, batch=3, count=100)  # type: ignore[dict-item]
    assert figures == {"slow: p50": 4, "slow: p95": 4, "fast: p50": 1, "fast: p95": 1, "fast: bytes": 30}
    assert clock[0] == deploy.CALL_SECONDS
    deploy._describe({"slow": slow}, [], batch=3, count=2)  # type: ignore[dict-item]
    assert clock[0] == deploy.CALL_SECONDS + 8


def test_a_footprint_counts_a_file_with_its_data_and_is_measured_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ts"
    torch.jit.trace(torch.nn.Linear(32, 2), torch.rand(2, 1, 32, 32)).save(path)
    (tmp_path / "model.ts.data").write_bytes(bytes(100))
    resident = iter([5, 12])
    monkeypatch.setattr(deploy, "_resident", lambda key: next(resident))

    def here(line: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert env.get("NODESHAPE_FUSED") == ("0" if line[3] == deploy.PLAIN else os.environ.get("NODESHAPE_FUSED"))
        deploy._footprint(*line[3:])
        return subprocess.CompletedProcess(line, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", here)
    found = deploy.footprint(deploy.Variant("TorchScript", path, "euler"), batch=2)
    assert found["bytes"] == path.stat().st_size + 100 and found["memory"] == 7 and found["load"] > 0
    monkeypatch.setattr(deploy.Variant, "load", lambda variant: torch.nn.Identity())
    resident = iter([5, 12])
    assert deploy.footprint(deploy.Variant(deploy.PLAIN, path, "euler"), batch=2)["memory"] == 7


def test_the_deploy_table_has_a_line_for_each_way_and_a_note_for_each_that_is_none() -> None:
    def times(*names: str) -> dict[str, float]:
        return {f"{name}: {what}": x for name in names for what, x in (("p50", 0.002), ("p95", 0.003))}

    sizes = {"ours: bytes": 2e6, "ours: load": 0.25, "ours: memory": 12e6}
    rows = [
        result("batch 1", 1, {"ours": 0.002, deploy.BASELINE: 0.004}, figures=times("ours", deploy.BASELINE)),
        result("batch 7", 7, {"ours": 0.002}, skipped={deploy.BASELINE: "too old"}, figures=times("ours") | sizes),
        result("batch 9", 9, {deploy.BASELINE: 1.0}, skipped={"ours": "too big"}, figures=times(deploy.BASELINE)),
    ]
    title, _, ours, theirs, *notes = deploy.table("Title", rows).splitlines()
    assert title == f"Title (× is of {deploy.BASELINE}'s time)"
    assert ours.split() == ["ours", "2", "250", "12", *("2", "3", "0.50"), *("2", "3", "1.00"), "–"]
    assert theirs.split()[1:] == ["–", "–", "–", *("2", "3", "1.00"), "–", *("2", "3", "1.00")]
    assert notes == [f"  no {deploy.BASELINE}: too old", "  no ours: too big"]
    nothing = [result("batch 1", 1, {"late": 1.0}, skipped={}, figures=times("late"))]
    nothing[0].seconds = {"first": nothing[0].seconds["late"]}
    nothing[0].figures = times("first")
    assert deploy.table("Title", nothing).splitlines()[2].split()[-1] == "1.00"


def test_images_are_those_that_the_classifier_was_trained_on() -> None:
    images, labels = trained.images_of(6).test.batch(slice(None), torch.device("cpu"))
    assert images.shape == (6, 1, trained.IMAGE_SIZE, trained.IMAGE_SIZE) and set(labels.tolist()) <= {0, 1, 2}
    assert torch.equal(deploy._images(6), images)


def test_diffrax_is_given_the_problem_that_we_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy, whose interface jax.numpy has, in jax's place, and the steps of explicit Euler in diffrax's."""

    def diffeqsolve(f: Any, solver: str, t0: float, t1: float, h: float, y: Any, weights: Any, **how: Any) -> Any:
        assert (solver, how) == ("euler", {"stepsize_controller": "constant"})
        for k in range(round((t1 - t0) / h)):
            y = y + h * f(t0 + k * h, y, weights)
        return SimpleNamespace(ys=[y])

    jax: Any = ModuleType("jax")
    jax.numpy, jax.nn = numpy, SimpleNamespace(relu=None, softplus=None, silu=None)
    jax.jit, jax.block_until_ready = lambda function: function, lambda x: x
    jax.tree = SimpleNamespace(leaves=lambda x: [x])
    diffrax: Any = ModuleType("diffrax")
    diffrax.ODETerm, diffrax.diffeqsolve = lambda f: f, diffeqsolve
    diffrax.ConstantStepSize, diffrax.Euler = lambda: "constant", lambda: "euler"
    for name, module in (("jax", jax), ("jax.numpy", numpy), ("diffrax", diffrax)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nodeshape._benchmarking.jax", raising=False)
    (theirs,) = contenders.diffrax(problem())()
    torch.testing.assert_close(torch.from_numpy(theirs), nodeshape(problem())()[0], rtol=1e-4, atol=1e-6)
    jax.vjp = lambda solve, y0, weights: (None, lambda cotangent: (solve(y0, weights), weights, cotangent))
    given = replace(problem(), training=True)
    ((y1, weights, cotangent),) = contenders.diffrax(given)()
    assert (y1 == theirs).all() and len(weights) == len(list(given.dynamics.parameters()))
    assert (cotangent == given.cotangent().numpy()).all()
    del sys.modules["nodeshape._benchmarking.jax"]
