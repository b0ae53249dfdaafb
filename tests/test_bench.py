"""The bench: its contenders agree before they are timed, and what a run leaves is complete. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nodeshape import _cli
from nodeshape._benchmarking.cases import AGREEMENT, Case, Contender, run_case
from nodeshape._benchmarking.contenders import Problem, Unavailable, nodeshape, plain_loop
from nodeshape._benchmarking.targets import AtLeast
from nodeshape._benchmarking.timing import QUICK, Effort, measure
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
        for timing in case["seconds"].values():
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
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
