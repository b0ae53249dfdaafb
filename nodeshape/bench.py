"""``python -m nodeshape.bench``: the fused solver, training and deployment against their rivals, measured here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from nodeshape._benchmarking import deploy, report, solver, train
from nodeshape._benchmarking.cases import Result, run_case
from nodeshape._benchmarking.timing import FULL, QUICK, machine
from nodeshape._cli import Parser, picture, run, say
from nodeshape._errors import UserError

SUITES = {"solver": solver, "train": train, "deploy": deploy}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a suite, print its tables and targets, and write what was asked for."""
    parser = Parser("bench", "Measure nodeshape against its rivals: alternating rounds, medians.")
    parser.add_argument("--suite", choices=tuple(SUITES), default="solver", help="what to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every figure to FILE, and the plot beside it (FILE's name, .png)",
    )
    parser.add_argument("--quick", action="store_true", help="small problems, few rounds: shows that it works, no more")
    args = parser.parse_args(argv)
    _check(args.json)

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here (torch.cuda.is_available() is False)")

    device = torch.device(args.device)
    suite, effort = SUITES[args.suite], QUICK if args.quick else FULL
    here = machine(effort, device)
    say(*report.describe_machine(here).splitlines())
    say(f"Medians of {effort.rounds} alternating rounds, and times the first column")
    results: list[Result] = []
    with tqdm(desc="preparing", unit="case", disable=None, leave=False) as bar:
        cases = suite.cases(args.quick, device)
        bar.reset(len(cases))
        for section, rows in groupby(cases, key=lambda case: case.section):
            done = []
            for case in rows:
                bar.set_description(f"{case.section}, {case.name}")
                done.append(run_case(case, effort))
                bar.update()
            bar.clear()
            table = getattr(suite, "table", report.table)
            say("", *table(section, done).splitlines())
            results += done
    lines = [] if args.quick or args.device != "cpu" else report.targets(suite.TARGETS, results)
    if lines:
        say("", "Targets", *report.target_table(lines).splitlines())
    if args.json is not None:
        report.write_json(args.json, args.suite, args.quick, here, results, lines)
        name = here.get("gpu", f"{here['cpu']}, {here['threads']} threads, {here['isa']}")
        plot = args.json.with_suffix(".png")
        say("", f"Wrote {args.json}, and its plot {plot}")
        with picture(plot):
            measured = {result.section for result in results}
            axes = {section: label for section, label in suite.PLOTS.items() if section in measured}
            report.plot(plot, axes, results, name)


def _check(path: Path | None) -> None:
    """Refuse a file that could not be written after minutes of measuring."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file, such as {path / 'bench.json'}")
    if path.suffix == ".png":
        raise UserError(f"--json {path}: the plot gets that name; name a file that ends in .json")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: no such folder as {path.parent}")


if __name__ == "__main__":
    run(main)
