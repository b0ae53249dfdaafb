"""What turns observed points into an initial state: a GRU that reads them backwards in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BackwardGRU(nn.Module):
    """Points at each sample's own times to ``[batch, out]``, as the recognition network of Chen et al. 2018, section 5.

    Args:
        dim: numbers per point.
        hidden: of the GRU.
        out: numbers per sample.
    """

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim + 1, hidden)
        self.head = nn.Linear(hidden, out)

    def forward(self, t: Tensor, points: Tensor) -> Tensor:
        """Read points ``[times, batch, dim]`` at times ``t`` ``[times, batch]`` that increase from 0, the state's."""
        return self.head(self.gru(torch.cat([points, gaps(t)[..., None]], dim=-1).flip(0))[1][0])


def gaps(t: Tensor) -> Tensor:
    """The time since the point before, ``[times, batch]``; of the first one since the time 0."""
    return t.diff(dim=0, prepend=torch.zeros_like(t[:1]))
