"""What the CUDA kernels should take on a GPU: operations, bytes, occupancy and the time they allow, kernel by kernel.

    python .ci/compile_cuda.py --json report.json
    python benchmarks/cuda_roofline.py report.json [--markdown]

A kernel's time is that of its busiest resource on the busiest multiprocessor (SM), plus the barriers, which overlap
with nothing in a block: a bound, to be compared with ``python -m nodeshape.bench --device cuda``. Counts follow the
loops of csrc/cuda/conv.cuh; registers are ptxas' own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path

WARP, PACK, SEGMENT, BORDERS = 32, 4, 4, 16
MOST_THREADS, MOST_BLOCKS, HEADER, SCRATCH = 256, 8, 16, 8
FLOAT = 4
BARRIER_CYCLES = 40  # of a block of eight warps
TEAM_BARRIER_CYCLES = 2500  # of several blocks, through L2: what others have measured of a whole grid


@dataclass(frozen=True)
class Gpu:
    """Rates are the vendor's; bandwidths of the second-level cache are measured ones that others have published."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    fma: int  # float32, a cycle and multiprocessor
    l1_bytes: int  # shared memory and first-level cache, a cycle and multiprocessor
    l2_rate: float  # bytes per second, all together
    memory_rate: float
    shared_per_block: int  # most bytes
    shared: int  # bytes a multiprocessor
    threads: int  # a multiprocessor
    blocks: int
    registers: int = 65536
    architecture: str = "sm_90"


GPUS = (
    Gpu("H100 SXM", 132, 1.755e9, 128, 128, 5.5e12, 3.35e12, 232448, 233472, 2048, 32),
    Gpu("RTX 4090", 128, 2.52e9, 128, 128, 5.0e12, 1.01e12, 101376, 102400, 1536, 24, architecture="sm_80"),
)


@dataclass
class Work:
    """What one team of blocks does for one sample.

    Attributes:
        fma: fused multiply-adds and other float32 operations, one each.
        l1: bytes through the multiprocessor's load unit, 128 for each wavefront of a warp.
        state: bytes of maps that each loop touches, once: in shared memory, or in L2 if they do not fit.
        l2: bytes from and to the second-level cache, by each block.
        memory: bytes that leave the chip.
        barriers: one after another.
        latency: cycles of loops that hang on their own results.
    """

    fma: float = 0
    l1: float = 0
    state: float = 0
    l2: float = 0
    memory: float = 0
    barriers: float = 0
    latency: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.__dict__.values(), other.__dict__.values())))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in self.__dict__.values()))


@dataclass(frozen=True)
class Kernel:
    """A kernel on a problem: ``samples`` of ``work`` each."""

    name: str
    ptxas: str  # its name there
    samples: int
    tasks: int  # elements that a team works on side by side
    dynamics: tuple[int, ...]  # bytes of the pieces that its dynamics take from the arena, in order
    others: tuple[int, ...]  # and that its stages take then
    work: Work

    @property
    def threads(self) -> int:
        """Of a block."""
        return min(MOST_THREADS, ceil(self.tasks / WARP) * WARP)


@dataclass(frozen=True)
class Launch:
    """How ``plan`` in csrc/cuda/solve.cuh launches a kernel."""

    blocks: int  # of a team
    resident: int  # blocks that a multiprocessor runs at a time
    shared: int  # bytes a block
    spilled: float  # share of its working memory that is not there


# ---- ConvDynamics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    channels: int
    side: int

    @property
    def width(self) -> int:
        return ceil(self.channels / PACK) * PACK

    @property
    def pixels(self) -> int:
        return self.side**2

    @property
    def elements(self) -> int:
        return self.pixels * self.width

    @property
    def segments(self) -> int:
        return self.side * ceil(self.side / SEGMENT)

    @property
    def tasks(self) -> int:
        return self.segments * self.width // PACK

    def elementwise(self, reads: int, writes: int, operations: int) -> Work:
        touched = (reads + writes) * FLOAT * self.elements
        return Work(fma=operations * self.elements, l1=touched, state=touched, barriers=1)

    def convolution(self) -> Work:
        """One 3x3 convolution.

        Per warp, pack of input channels and row of taps: 6 loads from shared memory that all threads of a segment
        share, 12 of weights, 192 multiply-adds per thread.
        """
        packs = self.width // PACK
        warps = ceil(self.segments * packs / WARP)
        steps = 3 * packs * warps
        distinct = min(WARP, packs) * PACK * FLOAT  # bytes of weights a warp loads at once
        wavefronts = 6 + 12 * ceil(distinct / 128)
        return Work(
            fma=9.0 * self.width**2 * self.segments * SEGMENT,
            l1=128.0 * wavefronts * steps,
            state=self.map,
            l2=9.0 * self.width**2 * FLOAT,
        ) + self.elementwise(2, 1, 2)

    def norm(self) -> Work:
        """Statistics: two passes over the map."""
        return self.elementwise(3, 0, 3) + Work(barriers=6)

    def evaluation(self) -> Work:
        framed = self.norm() + self.elementwise(2, 1, 3)
        return (framed + self.convolution()) * 2 + framed

    def pull(self) -> Work:
        return self.elementwise(4, 0, 4) + self.elementwise(3, 1, 4) + Work(barriers=7)

    def product(self) -> Work:
        """A vector-Jacobian product."""
        return (self.elementwise(1, 1, 0) + self.convolution() + self.pull()) * 2 + self.pull()

    def accumulation(self) -> Work:
        """The parameters' gradient of a step: per thread and pixel three taps of 4 x 4 channels."""
        packs = self.width // PACK
        tasks = 3 * packs**2
        loads = self.pixels * (1 + ceil(min(WARP, packs) * PACK * FLOAT / 128))
        filters = Work(
            fma=tasks * 48.0 * self.pixels,
            l1=128.0 * loads * ceil(tasks / WARP),
            state=2 * self.map,
            l2=2 * 9.0 * self.width**2 * FLOAT,
            barriers=1,
        )
        borders = Work(fma=self.elements, l1=FLOAT * self.elements, l2=4.0 * BORDERS * self.width * FLOAT, barriers=6)
        return (self.elementwise(2, 1, 3) + filters + borders) * 2

    @property
    def map(self) -> int:
        """Bytes."""
        return FLOAT * self.elements

    def base(self) -> tuple[int, ...]:
        framed = (self.side + 2) * (ceil(self.side / SEGMENT) * SEGMENT + 2) * self.width
        return (FLOAT * framed, *[FLOAT * 8 * self.width] * 3, self.map, self.map)

    def forward(self, batch: int, steps: int) -> Kernel:
        step = self.evaluation() + self.elementwise(2, 1, 1)
        return Kernel(
            f"conv {self.channels}×{self.side}×{self.side} forward, euler, {steps} steps, batch {batch}",
            "forward_kernel<ConvDynamics<float>, ThetaSteps>",
            batch,
            self.tasks,
            self.base(),
            (self.map,) * 2,
            step * steps,
        )

    def backward(self, batch: int, steps: int) -> Kernel:
        """Discrete: what a stage is linearised about comes from memory."""
        recalled = (self.norm() + self.elementwise(0, 1, 0)) * 3 + self.elementwise(2, 1, 1)
        read = Work(l2=3.0 * FLOAT * self.elements, memory=3.0 * FLOAT * self.elements)
        step = recalled + read + self.product() + self.accumulation() + self.elementwise(4, 1, 2)
        return Kernel(
            f"conv {self.channels}×{self.side}×{self.side} backward, discrete, {steps} steps, batch {batch}",
            "backward_kernel<ConvDynamics<float>, ThetaSteps>",
            batch,
            self.tasks,
            (*self.base(), self.map, self.map, FLOAT * BORDERS * self.width),
            (self.map,) * 6,
            step * steps,
        )


# ---- the bound -------------------------------------------------------------------------------------------------------


def blocks_per_multiprocessor(kernel: Kernel, gpu: Gpu, registers: int, shared: int) -> int:
    """The occupancy formula.

    Registers are given to warps in units of 256, shared memory in units of 128 bytes, and 1 KiB a block to the system.
    """
    warps = kernel.threads // WARP
    by_registers = gpu.registers // (warps * ceil(registers * WARP / 256) * 256)
    by_shared = gpu.shared // (ceil(shared / 128) * 128 + 1024)
    return min(by_registers, by_shared, gpu.threads // kernel.threads, gpu.blocks)


def fitting(pieces: tuple[int, ...], room: int) -> int:
    """Bytes that an Arena finds room for in shared memory: each piece as a whole, in turn."""
    used = 0
    for piece in pieces:
        if used + piece <= room:
            used += piece
    return used


def plan(kernel: Kernel, gpu: Gpu, registers: int) -> Launch:
    parts, blocks = min(MOST_BLOCKS, ceil(kernel.tasks / kernel.threads)), 1
    besides = HEADER + SCRATCH * parts * kernel.threads
    room = gpu.shared_per_block - besides
    if parts > 1 and fitting(kernel.dynamics, room) < sum(kernel.dynamics):
        resident = blocks_per_multiprocessor(kernel, gpu, registers, HEADER)
        spare = min(max(resident * gpu.multiprocessors // kernel.samples, 1), parts)
        blocks = ceil(parts / ceil(parts / spare))
    if blocks > 1:
        return Launch(blocks, resident, HEADER, 1.0)
    pieces = kernel.dynamics + kernel.others
    shared = fitting(pieces, room)
    resident = blocks_per_multiprocessor(kernel, gpu, registers, besides + shared)
    return Launch(1, resident, besides + shared, 1 - shared / sum(pieces))


def row(kernel: Kernel, gpu: Gpu, registers: int) -> dict[str, str]:
    work, how = kernel.work, plan(kernel, gpu, registers)
    teams = gpu.multiprocessors * how.resident // how.blocks
    turns = ceil(kernel.samples / teams)
    # Blocks, each with its share of a sample, that the busiest multiprocessor runs.
    busiest = ceil(kernel.samples * how.blocks / gpu.multiprocessors)
    l1, l2 = work.l1 / how.blocks, work.l2 * how.blocks + work.state * how.spilled
    seconds = {
        "arithmetic": busiest * work.fma / how.blocks / gpu.fma / gpu.clock,
        "shared memory" if how.blocks == 1 else "L1": busiest * l1 / gpu.l1_bytes / gpu.clock,
        "L2": kernel.samples * l2 / gpu.l2_rate,
        "memory": kernel.samples * work.memory / gpu.memory_rate,
    }
    barrier = BARRIER_CYCLES if how.blocks == 1 else TEAM_BARRIER_CYCLES
    waiting = turns * (work.barriers * barrier + work.latency) / gpu.clock
    limit = max(seconds, key=lambda name: seconds[name])
    if waiting > seconds[limit]:
        limit = "waiting"
    total = max(seconds.values()) + waiting
    return {
        "GPU": gpu.name,
        "kernel": kernel.name,
        "operations": f"{2e-9 * kernel.samples * work.fma:.2f} GFLOP",
        "shared memory, L1": f"{1e-6 * kernel.samples * work.l1:.0f} MB",
        "L2": f"{1e-6 * kernel.samples * l2:.0f} MB",
        "registers": str(registers),
        "blocks a sample": str(how.blocks),
        "shared a block": "none: L2"
        if how.spilled == 1
        else f"{how.shared / 1024:.3g} KiB" + " and L2" * (how.spilled > 0),
        "blocks an SM": str(how.resident),
        "occupancy": f"{100 * how.resident * kernel.threads / gpu.threads:.0f}%",
        "bound": limit,
        "predicted": f"{1e3 * total:.3f} ms",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what .ci/compile_cuda.py --json wrote")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/cuda.md")
    arguments = parser.parse_args()
    report = {(k["kernel"], k["architecture"]): k["registers"] for k in json.loads(arguments.report.read_text())}
    conv, large = Conv(64, 8), Conv(128, 14)
    kernels = [conv.forward(1, 20), conv.forward(120, 20), conv.forward(1024, 20), conv.backward(120, 20)]
    kernels += [large.forward(1, 20), large.forward(120, 20), large.backward(120, 20)]
    rows = [row(kernel, gpu, report[kernel.ptxas, gpu.architecture]) for gpu in GPUS for kernel in kernels]
    names = list(rows[0])
    if arguments.markdown:
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
        for line in rows:
            print(f"| {' | '.join(line.values())} |")
        return
    widths = [max(len(name), *(len(line[name]) for line in rows)) for name in names]
    for line in [dict(zip(names, names)), *rows]:
        print("  ".join(line[name].ljust(width) for name, width in zip(names, widths)).rstrip())


if __name__ == "__main__":
    main()
