"""Brownian motion as a path: the same W(t) at whatever times it is asked for, in any order, by a tree of bridges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from math import isfinite, prod, sqrt
from threading import local
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


class _Words(local):
    """A counter-based generator of each thread, to be set to any key and counter, which is quicker than a new one."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = self.bits.state

    def normal(self, seed: int, node: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The first normal numbers of ``np.random.Philox(key=seed, counter=node << 128)``."""
        self.state["state"]["key"][:] = seed, 0
        self.state["state"]["counter"][:] = 0, 0, node & 2**64 - 1, node >> 64
        self.state["buffer_pos"], self.state["has_uint32"] = 4, 0
        self.bits.state = self.state
        return self.generator.standard_normal(count)


_words = _Words()


@dataclass
class _Node:
    """An interval of time, and W's change over it.

    Attributes:
        number: 1 for the root, 2n and 2n + 1 for the halves of n.
        first, last: the points of the grid that it lies between.
        start, end: its times.
        halves: known where the latest question went through it.
    """

    number: int
    first: int
    last: int
    start: float
    end: float
    change: Tensor
    halves: tuple[_Node, _Node] | None = None


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
        if not own and not isinstance(like, (tuple, list)):
            raise TypeError(f"like must be a tensor, or a shape, of one value of the path, got {like!r}")
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
        if not all(b - a > 0 for a, b in pairwise(points)):  # of which NaN is no part
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
        if not 0 <= seed < 2**63 or seed != int(seed):
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        self.seed = int(seed)
        self.portable = portable
        self._trail: tuple[_Node, ...] = ()

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
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what is kept serves any mode
                return self.increment(s, t)
        trail = list(self._trail)
        if not trail:
            change = self._normal(0).mul_(sqrt(self.t1 - self.t0))
            trail.append(_Node(1, 0, len(self._grid) - 1, self.t0, self.t1, change))
        change = self._between(trail, s, t)
        self._trail = tuple(trail)
        return change

    def _between(self, trail: list[_Node], s: float, t: float) -> Tensor:
        """W(t) − W(s) for s ≤ t.

        Args:
            trail: the nodes from the root to where the question before ended; then, to where this one ends.
        """
        snap = self._snap
        while len(trail) > 1 and not (trail[-1].start - snap <= s and t <= trail[-1].end + snap):
            trail.pop().halves = None
        while True:
            node = trail[-1]
            if s - node.start <= snap and node.end - t <= snap:
                return node.change
            if t <= s:
                return torch.zeros_like(node.change)
            if node.last - node.first == 1 and node.end - node.start <= self.resolution:
                return self._bridge(node, s, t)
            left, right = node.halves = node.halves or self._halved(node)
            middle = left.end
            s = middle if abs(s - middle) <= snap else s
            t = middle if abs(t - middle) <= snap else t
            if t <= middle:
                trail.append(left)
            elif s >= middle:
                trail.append(right)
            else:
                return self._between(trail, s, middle) + self._between(trail, middle, t)

    def _halved(self, node: _Node) -> tuple[_Node, _Node]:
        start, end, number, first, last = node.start, node.end, node.number, node.first, node.last
        if last - first == 1:
            cuts, middle = (first, last), 0.5 * (start + end)
        else:
            cut = (first + last) // 2
            cuts, middle = (cut, cut), self._grid[cut]
        part = (middle - start) / (end - start)
        change = self._normal(number).mul_(sqrt((middle - start) * (1.0 - part))).add_(node.change, alpha=part)
        left = _Node(2 * number, first, cuts[1], start, middle, change)
        return left, _Node(2 * number + 1, cuts[0], last, middle, end, node.change - change)

    def _bridge(self, node: _Node, s: float, t: float) -> Tensor:
        """W(t) − W(s) within a leaf, where one number is W's distance from its chord; each value is exact in law."""
        length = node.end - node.start
        parts = [(self._snapped(x, node) - node.start) / length for x in (s, t)]
        low, high = (sqrt(length * x * (1.0 - x)) for x in parts)
        return self._normal(node.number).mul_(high - low).add_(node.change, alpha=parts[1] - parts[0])

    def _snapped(self, x: float, node: _Node) -> float:
        """A time within a leaf, or the end that counts for it, whatever the question began with."""
        if x - node.start <= self._snap:
            return node.start
        return node.end if node.end - x <= self._snap else x

    def _normal(self, node: int) -> Tensor:
        """Standard normal numbers that belong to a node."""
        if self.device.type == "cpu" or self.portable:
            numbers = torch.from_numpy(_words.normal(self.seed, node, prod(self.shape)))
            return numbers.reshape(self.shape).to(self.device, self.dtype)
        seed = int.from_bytes(blake2b(f"{self.seed} {node}".encode(), digest_size=8).digest(), "big") >> 1
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=self.dtype, device=self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trail": ()}

    def __repr__(self) -> str:
        return f"BrownianPath({list(self.shape)}, {self.t0:g}, {self.t1:g}, seed={self.seed}, dtype={self.dtype})"
