"""Random numbers of drawn images: a function of a few words, the same on every machine."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


class Stream:
    """Random numbers in [low, high), directions and noise from the raw words of PCG64."""

    def __init__(self, *words: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(words))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * ((self._bits.random_raw() >> 11) * 2.0**-53)

    def coin(self) -> bool:
        return self.uniform(0, 1) < 0.5

    def direction(self) -> tuple[float, float]:
        """A unit vector, each angle equally likely: a point of the disc, drawn by rejection, put on the circle."""
        while True:
            x, y = self.uniform(-1, 1), self.uniform(-1, 1)
            norm = math.sqrt(x * x + y * y)
            if 0.1 < norm <= 1:
                return x / norm, y / norm

    def permutation(self, n: int) -> NDArray[np.int64]:
        return np.argsort(self._bits.random_raw(n), kind="stable")

    def noise(self, side: int) -> NDArray[np.float64]:
        """Values ``[side, side]`` of mean 0 and variance 1: sums of four bytes, all but normal (Irwin–Hall)."""
        words = self._bits.random_raw((side * side + 1) // 2).astype("<u8")
        sums = words.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int64)[: side * side]
        noise: NDArray[np.float64] = (sums - 510).reshape(side, side) / math.sqrt(4 * (256**2 - 1) / 12)
        return noise
