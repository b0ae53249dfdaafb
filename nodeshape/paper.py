"""``python -m nodeshape.paper``: every table of the report and of its parent paper, measured and set side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nodeshape import __version__
from nodeshape._cli import Parser, picture, run, say
from nodeshape._errors import UserError
from nodeshape._experiments.jobs import Job, Result, Store, compute
from nodeshape._experiments.plan import FULL, QUICK, Plan
from nodeshape._experiments.results import collect, table1
from nodeshape._experiments.training import slowness
from nodeshape._files import write_atomically

#: A run takes so many times as long while every core has one as it does alone.
CROWDED = 1.25
RESULTS, QUICK_RESULTS = Path("docs/results"), Path("runs/paper-quick")


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the page, its pictures and its figures."""
    parser = Parser("paper", "Repeat every experiment of the report; interrupted, it goes on where it was.")
    parser.add_argument("--quick", action="store_true", help="a miniature, in a minute: shows that it works, no more")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the page (default: {RESULTS}, or {QUICK_RESULTS})"
    )
    parser.add_argument(
        "--only", choices=("table1",), help="the parent paper's table 1 alone; the rest of the page stays as it is"
    )
    args = parser.parse_args(argv)
    out = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    kept = _kept(out) if args.only else None
    plan = QUICK if args.quick else FULL
    store = Store(out / "cache")
    store.prepare()
    try:
        _compute_missing(plan, store, args.only)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it was")
        sys.exit(130)
    _write(plan, store, out, args.quick, kept)


def _kept(out: Path) -> dict[str, Any]:
    """The figures of an earlier run."""
    try:
        paper: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--only adds to the figures in {out / 'results.json'}: run it without --only first") from None
    return paper


def _compute_missing(plan: Plan, store: Store, only: str | None) -> None:
    """Trainings first, then what is measured on trained models, then what needs the machine to itself."""
    cores = torch.get_num_threads()
    every = plan.table1() if only else (plan.trainings(), plan.analyses(), plan.timings())
    stages = [[job for job in jobs if store.get(job) is None] for jobs in every]
    missing = sum(map(len, stages))
    if not missing:
        return
    if find_spec("sklearn") is None:
        raise UserError("the digits of the parent paper's table 1 are scikit-learn's; run: pip install scikit-learn")
    seconds_per_unit = slowness() * CROWDED / cores
    minutes = seconds_per_unit * sum(job.seconds for stage in stages for job in stage) / 60
    runs, duration = f"{missing} run{'s' * (missing > 1)}", f"{max(1, round(minutes))} min"
    say(f"{runs} on {cores} cores, about {duration}; each is kept as it ends")
    with tqdm(
        total=minutes * 60, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}", disable=None
    ) as bar:
        ended = 0
        for stage in stages:
            if stage:
                workers, threads = (1, cores) if stage[0].alone else (cores, 1)
                for job in compute(stage, store, workers, threads):
                    if job is not None:
                        ended += 1
                        bar.update(seconds_per_unit * job.seconds)
                    bar.set_description(f"{ended} of {missing} runs ")


def _write(plan: Plan, store: Store, out: Path, quick: bool, kept: dict[str, Any] | None) -> None:
    from nodeshape._experiments.page import headline, page

    def get(job: Job) -> Result:
        result = store.get(job)
        assert result is not None
        return result

    if kept is None:
        paper = {"nodeshape_version": __version__, "quick": quick, **collect(plan, get)}
    else:
        paper = {**kept, "table1": table1(plan, get, kept["networks"]["single"])}
    write_atomically(out / "results.json", (json.dumps(paper, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "README.md", page(paper).encode())
    with picture(out):
        from nodeshape._experiments.plots import draw  # matplotlib takes a second to import

        draw(paper, out)
    say(f"{headline(paper)}; open {out / 'README.md'}")


if __name__ == "__main__":
    run(main)
