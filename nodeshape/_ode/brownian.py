"""Brownian motion as a path: the same W(t) at whatever times it is asked for, in any order, by a tree of bridges."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from math import isfinite, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The default resolution, as a part of the whole time.
RESOLUTION = 2.0**-20
#: A time closer to a node of the tree than this part of the resolution counts as the node's.
SNAP = 0.125
#: Types a path may have.
DTYPES = (torch.float32, torch.float64)


class BrownianPath:
    """One path of Brownian motion W on [t0, t1], W(t0) = 0, every element independent of the others.

    The time is halved again and again; a node of that tree is W's change over its interval, which its halves share by
    a Brownian bridge (Lévy's construction; Li et al. 2020, section 4). The random numbers of a node are those of a
    counter, the seed and the node's number, so nothing is stored, W depends on no earlier question, and a solve with
    other steps, a backward pass or another process sees the same path.

    Exact in law are the values at any times of which no two are closer than ``resolution``; times closer than an
    eighth of it to a node take the node's value. A time costs one random tensor per level of the tree that the
    question before did not go through: at the points of ``grid``, one after the other, about one.

    Args:
        like: shape of W(t), or a tensor whose shape, dtype and device W(t) has.
        t0, t1: first and last time, t0 < t1.
        seed: from 0 to 2⁶³ − 1; by default drawn from PyTorch's random numbers, see ``torch.manual_seed``.
        dtype: float32 or float64, default that of ``like``, or PyTorch's default. Both see the same path, rounded, on
            the CPU.
        device: of W(t), default that of ``like``, or the CPU.
        grid: increasing times from t0 to t1 at which the path is to be cheap. It decides where the tree is cut, so
            two paths are the same only if their grids are.
        resolution: in units of time, default (t1 − t0) / 2²⁰ or the shortest interval of ``grid``.
        portable: draw on the CPU whatever the device, so that all devices see the same path; slower on a GPU.

    Attributes:
        shape, t0, t1, seed, dtype, device, resolution, portable: as above.

    Raises:
        ValueError: an argument is out of its range.
    """

    __module__ = "nodeshape"

    def __init__(
        self,
        like: Tensor | Sequence[int],
        t0: float,
        t1: float,
        *,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grid: Sequence[float] | Tensor | None = None,
        resolution: float | None = None,
        portable: bool = False,
    ) -> None:
        own = isinstance(like, Tensor)
        self.shape = torch.Size(like.shape if isinstance(like, Tensor) else like)
        self.dtype = dtype or (like.dtype if isinstance(like, Tensor) else torch.get_default_dtype())
        self.device = torch.device(device if device is not None else like.device if own else "cpu")  # type: ignore[union-attr]
        if self.dtype not in DTYPES:
            raise ValueError(f"a Brownian path is of float32 or float64, got {self.dtype}: give dtype=torch.float32")
        self.t0, self.t1 = float(t0), float(t1)
        length = self.t1 - self.t0
        if not (isfinite(length) and length > 0):
            raise ValueError(f"t0 must be before t1, both finite, got t0={t0!r} and t1={t1!r}")
        points = [self.t0, self.t1] if grid is None else [float(x) for x in grid]
        if len(points) < 2 or points[0] != self.t0 or points[-1] != self.t1:
            raise ValueError(f"grid must go from t0={self.t0:g} to t1={self.t1:g}, got {len(points)} times")
        shortest = min(b - a for a, b in pairwise(points))
        if not shortest > 0:
            raise ValueError("grid must be strictly increasing")
        self._grid = points
        self.resolution = min(RESOLUTION * length, shortest) if resolution is None else float(resolution)
        finest = 16 * 2.0**-52 * max(abs(self.t0), abs(self.t1))
        if not finest < self.resolution:
            raise ValueError(
                f"resolution must be more than {finest:.1g}, the precision of times here, got {self.resolution:g}:"
                " count time from the start"
            )
        self._snap = SNAP * min(self.resolution, shortest)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed!r}")
        self.seed = int(seed)
        self.portable = portable
        self._kept: dict[int, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, s: Any, t: Any = None) -> Tensor:
        """W(t) − W(s), or with one argument W(s).

        Args:
            s: a time from t0 to t1; without ``t`` also several, ``[n]``.
            t: a time from t0 to t1; before s the sign changes.

        Returns:
            ``shape``, or ``[n, *shape]`` for n times.

        Raises:
            ValueError: a time is outside [t0, t1].
        """
        if t is not None:
            return self.increment(float(s), float(t)).clone()
        if (isinstance(s, Tensor) and s.dim() == 0) or not isinstance(s, (Tensor, Sequence)):
            return self.increment(self.t0, float(s)).clone()
        times = s.tolist() if isinstance(s, Tensor) else s
        found = [self.increment(self.t0, float(time)) for time in times]
        return torch.stack(found) if found else torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)

    def increment(self, s: float, t: float) -> Tensor:
        """W(t) − W(s), as a tensor that must not be changed in place."""
        if t < s:
            return -self.increment(t, s)
        for time in (s, t):
            if not self.t0 - self._snap <= time <= self.t1 + self._snap:
                raise ValueError(f"time {time:g} is outside of the path's [{self.t0:g}, {self.t1:g}]")
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves any mode
            whole = self._kept.get(-1)
            if whole is None:
                change = self._normal(0).mul_(sqrt(self.t1 - self.t0))
                self._kept[-1] = whole = (0, change, change)
            return self._within(1, 0, (0, len(self._grid) - 1), (self.t0, self.t1), whole[1], s, t)

    def _within(
        self,
        node: int,
        level: int,
        cells: tuple[int, int],
        ends: tuple[float, float],
        change: Tensor,
        s: float,
        t: float,
    ) -> Tensor:
        """W(t) − W(s) for s ≤ t within a node.

        Args:
            node, level: its number, 1 for the root, 2n and 2n + 1 for the halves of n; how far it is from the root.
            cells: the points of the grid it goes from and to.
            ends: the times it goes from and to.
            change: of W over the node.
        """
        while True:
            start, end = ends
            if s - start <= self._snap and end - t <= self._snap:
                return change
            if t - s <= 0.0:
                return torch.zeros_like(change)
            whole = cells[1] - cells[0] == 1
            if whole and end - start <= self.resolution:
                return self._bridge(node, ends, change, s, t)
            cut = (cells[0] + cells[1]) // 2
            middle = 0.5 * (start + end) if whole else self._grid[cut]
            left, right = self._halves(node, level, start, middle, end, change)
            s, t = (middle if abs(x - middle) <= self._snap else x for x in (s, t))
            first, second = (cells, cells) if whole else ((cells[0], cut), (cut, cells[1]))
            level += 1
            if t <= middle:
                node, cells, ends, change = 2 * node, first, (start, middle), left
            elif s >= middle:
                node, cells, ends, change = 2 * node + 1, second, (middle, end), right
            else:
                part = self._within(2 * node, level, first, (start, middle), left, s, middle)
                return part + self._within(2 * node + 1, level, second, (middle, end), right, middle, t)

    def _halves(
        self, node: int, level: int, start: float, middle: float, end: float, change: Tensor
    ) -> tuple[Tensor, Tensor]:
        """W's changes before and after ``middle``; those of the latest node of each level are kept."""
        kept = self._kept.get(level)
        if kept is None or kept[0] != node:
            part = (middle - start) / (end - start)
            left = self._normal(node).mul_(sqrt((middle - start) * (1.0 - part))).add_(change, alpha=part)
            self._kept[level] = kept = (node, left, change - left)
        return kept[1], kept[2]

    def _bridge(self, node: int, ends: tuple[float, float], change: Tensor, s: float, t: float) -> Tensor:
        """W(t) − W(s) within a leaf, where one number is W's distance from its chord; each value is exact in law."""
        start, end = ends
        parts = [min(max((x - start) / (end - start), 0.0), 1.0) for x in (s, t)]
        low, high = (sqrt((end - start) * x * (1.0 - x)) for x in parts)
        return self._normal(node).mul_(high - low).add_(change, alpha=parts[1] - parts[0])

    def _normal(self, node: int) -> Tensor:
        """Standard normal numbers that belong to a node."""
        if self.device.type == "cpu" or self.portable:
            words = np.random.Philox(key=self.seed, counter=node << 128)
            numbers = torch.from_numpy(np.random.Generator(words).standard_normal(prod(self.shape)))
            return numbers.reshape(self.shape).to(self.device, self.dtype)
        seed = int.from_bytes(blake2b(f"{self.seed} {node}".encode(), digest_size=8).digest(), "big") >> 1
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=self.dtype, device=self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def __repr__(self) -> str:
        return f"BrownianPath({list(self.shape)}, {self.t0:g}, {self.t1:g}, seed={self.seed}, dtype={self.dtype})"
