"""What turns observed points into a state: a GRU that reads them in order, with the time to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PointEncoder(nn.Module):
    """Points at each sample's own times to ``[batch, out]``, as the recognition network of Chen et al. 2018.

    Args:
        dim: numbers per point.
        hidden: of the GRU.
        out: numbers per sample.
    """

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim + 1, hidden)
        self.head = nn.Linear(hidden, out)

    def forward(self, t: Tensor, points: Tensor, end: Tensor) -> Tensor:
        """Read points ``[times, batch, dim]`` at times ``t`` ``[times, batch]`` towards the time ``end`` ``[batch]``.

        Times may increase or decrease; ``end``, the state's, is behind the last one or is it.
        """
        to_next = torch.cat([t[1:], end[None]]) - t
        return self.head(self.gru(torch.cat([points, to_next[..., None]], dim=-1))[1][0])
