"""Jobs of the paper: each a value whose result is computed once, in a worker process, and kept as a JSON file."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

import nodeshape
from nodeshape import __version__
from nodeshape._errors import UserError
from nodeshape._files import write_atomically
from nodeshape._ode.fused import _LIBRARY

Result = dict[str, Any]

#: Modules that decide a result: a kept one counts only while their code is the same, comments and layout apart.
SOURCES = (
    "_data.augment",
    "_data.datasets",
    "_data.hand",
    "_data.random_stream",
    "_data.shapes",
    "_data.streaming",
    "_experiments.depth",
    "_experiments.networks",
    "_experiments.solvers",
    "_experiments.training",
    "_models.block",
    "_models.classifier",
    "_models.dynamics",
    "_models.norm",
    "_ode.adjoint",
    "_ode.backend",
    "_ode.compiled",
    "_ode.control",
    "_ode.event",
    "_ode.field",
    "_ode.fuse",
    "_ode.fused",
    "_ode.graph",
    "_ode.implicit",
    "_ode.interpolation",
    "_ode.layers",
    "_ode.loop",
    "_ode.lowering",
    "_ode.method",
    "_ode.odeint",
    "_ode.options",
    "_ode.per_sample",
    "_ode.program",
    "_ode.program_op",
    "_ode.adaptive_op",
    "_ode.reads",
    "_ode.recompute",
    "_ode.root",
    "_ode.solver",
    "_ode.stage",
    "_ode.stats",
    "_ode.step",
    "_ode.surroundings",
    "_ode.unrolled",
    "_training.evaluate",
    "_training.processes",
    "_training.recipe",
    "_training.trainer",
)


@dataclass(frozen=True)
class Job:
    """What a subclass's fields describe.

    Attributes:
        alone: to be run by itself with one thread per core; others run side by side with one thread each.
        compiled: whether another build of the compiled library may give another result, as a time.
        sources: modules besides :data:`SOURCES` that decide this kind of job's result, and no other's.
    """

    alone: ClassVar[bool] = False
    compiled: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ()

    @property
    def seconds(self) -> float:
        """A rough cost on one core of the machine that the coefficients were measured on."""
        raise NotImplementedError

    def compute(self, store: Store) -> Result:
        """Plain values, as JSON holds them. ``store`` is for what another job left and for what this one leaves."""
        raise NotImplementedError


class Store:
    """A folder of results.

    Args:
        folder: made if need be, with a file that keeps it out of git.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sources, self.library = folder, _digest(SOURCES), _library()

    def prepare(self) -> None:
        """Create the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ".gitignore", b"*\n")

    def path(self, job: Job, suffix: str) -> Path:
        """Where something of a job is kept: the name is a digest of its fields and of the code that decides it."""
        code = [__version__, self.sources, *([self.library] if job.compiled else [])]
        code += [_digest(job.sources)] if job.sources else []
        identity = json.dumps([type(job).__name__, asdict(job), *code], sort_keys=True)
        return self.folder / f"{sha256(identity.encode()).hexdigest()[:20]}{suffix}"

    def get(self, job: Job) -> Result | None:
        """The result of a job, None if there is none yet."""
        try:
            kept: Result = json.loads(self.path(job, ".json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return kept["result"]  # type: ignore[no-any-return]

    def put(self, job: Job, result: Result) -> None:
        """Keep a result, with what it is the result of."""
        content = {"job": type(job).__name__, **asdict(job), "result": result}
        write_atomically(self.path(job, ".json"), (json.dumps(content, indent=1) + "\n").encode())


def compute(jobs: Sequence[Job], store: Store, workers: int, threads: int) -> Iterator[Job | None]:
    """Compute jobs in ``workers`` processes of ``threads`` threads, the longest first; yield each when it is kept.

    Every second without one it yields None, so that the caller can show that time passes.

    Raises:
        UserError: a worker died, which is what an operating system short of memory does to it.
    """
    longest_first = sorted(jobs, key=lambda job: -job.seconds)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), _begin_worker, (threads,)) as pool:  # terminated on the way out
        processes = {process.pid for process in multiprocessing.active_children()}
        done = pool.imap_unordered(_compute_one, [(job, store) for job in longest_first])
        while True:
            try:
                yield done.next(timeout=1)
            except StopIteration:
                return
            except multiprocessing.TimeoutError:
                if {process.pid for process in multiprocessing.active_children()} != processes:
                    raise UserError("a worker process was killed, perhaps for lack of memory; run it again") from None
                yield None


def _begin_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # no bars below the one bar; errors travel to the parent
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is terminated would leak
    torch.set_num_threads(threads)


def _compute_one(work: tuple[Job, Store]) -> Job:
    job, store = work
    store.put(job, job.compute(store))
    return job


def _digest(sources: Sequence[str]) -> str:
    """A digest of the code of modules."""
    digest = sha256()
    for name in sources:
        path = Path(nodeshape.__path__[0], *name.split(".")).with_suffix(".py")
        digest.update(ast.dump(ast.parse(path.read_text("utf-8"))).encode())
    return digest.hexdigest()


def _library() -> str:
    """A digest of the compiled library; without one, solves take the plain path."""
    return sha256(_LIBRARY.read_bytes()).hexdigest() if _LIBRARY.exists() else ""
