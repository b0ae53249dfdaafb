"""Timing that can be trusted: contenders take turns in every round, and medians are compared."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of each contender.
        sample_seconds: a sample repeats its call for at least this long.
        sgemm_size: of the square matrices whose product measures the machine.
    """

    rounds: int
    sample_seconds: float
    sgemm_size: int = 2048


FULL = Effort(rounds=7, sample_seconds=0.02)
QUICK = Effort(rounds=3, sample_seconds=0.002, sgemm_size=256)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over the rounds.

    Attributes:
        median, lower_quartile, upper_quartile: of the samples.
        repeats: calls in a sample.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int


def measure(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Timing]:
    """Time calls that have run before, every one once a round, in alternating order."""
    repeats = {name: _repeats(call, effort.sample_seconds) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with _no_garbage_collection():
        for _ in range(effort.rounds):
            for name in order:
                samples[name].append(_sample(calls[name], repeats[name]))
            order.reverse()
            gc.collect()
    return {name: _timing(samples[name], repeats[name]) for name in calls}


def sgemm(effort: Effort, device: torch.device = CPU) -> tuple[Callable[[], object], float]:
    """A float32 matrix product, what this machine's arithmetic can do at best, and its number of operations."""
    a, b = torch.rand(2, effort.sgemm_size, effort.sgemm_size, device=device)
    return lambda: torch.mm(a, b), 2.0 * effort.sgemm_size**3


def machine(effort: Effort, device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on; the rates of sgemm in operations per second."""
    threads = torch.get_num_threads()
    rates = {}
    product, operations = sgemm(effort)
    for count in sorted({1, threads}):
        with torch_threads(count):
            product()
            rates[str(count)] = operations / measure({"sgemm": product}, effort)["sgemm"].median
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        product, operations = sgemm(effort, device)
        product()
        rate = operations / measure({"sgemm": product}, effort)["sgemm"].median
        gpu = {"gpu": torch.cuda.get_device_name(device), "gpu_sgemm_flops": rate}
    return gpu | {
        "cpu": _cpu_model(),
        "isa": os.environ.get("NODESHAPE_ISA") or _widest_isa(),
        "threads": threads,
        "sgemm_flops_by_threads": rates,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it, torch's operators (and the fused solver) use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(ours: Callable[[], object], theirs: Callable[[], object], samples: int = 15) -> float:
    """The rival's median time over ours, of single calls in turns after two rounds that do not count.

    Above 1 is better for us. Beside :func:`measure`, a call finds the caches as the other has left them.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(samples + 2):
        for call, into in zip((ours, theirs), times):
            begin = time.perf_counter()
            call()
            if k >= 2:
                into.append(time.perf_counter() - begin)
    return statistics.median(times[1]) / statistics.median(times[0])


def _repeats(call: Callable[[], object], least: float) -> int:
    repeats = 1
    while True:
        seconds = _sample(call, repeats)
        if seconds * repeats >= least or repeats >= 100_000:
            return repeats
        repeats = max(2 * repeats, min(round(1.1 * least / max(seconds, 1e-9)), 10 * repeats))


def _sample(call: Callable[[], object], repeats: int) -> float:
    if repeats > 1:
        call()  # wakes this contender's threads and fills the caches that the previous one emptied
    _wait_for_gpu()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - start) / repeats


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _timing(samples: list[float], repeats: int) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, repeats)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that a collection between rounds looks at the garbage of the last one only
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _widest_isa() -> str:
    """What ``csrc/cpu/isa.cpp`` chooses: torch asks the processor for the same features."""
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
