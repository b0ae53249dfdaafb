"""What a solve cost: counts kept per sample, because samples take their own steps and iterations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SolverStats:
    """Statistics of one ``odeint`` call. Counts are int64 ``[samples]`` (one sample if the state has no batch).

    Attributes:
        nfe_forward: evaluations of f in the forward solve. The kernel evaluates the slope at the end of a step of
            ``adaptive_heun`` and ``fehlberg2`` in each attempt, rejected ones too; the plain loop after kept ones only.
        nfe_backward: evaluations of f or of its vector–Jacobian product in the last backward pass; zero before it.
            Under error control the kernel takes steps of several samples together: where a time lies inside the step
            of one, all of them take the products that its dense output needs, and count them.
        accepted: steps that make up the solution.
        rejected: step attempts that error control threw away.
        stage_iterations: evaluations spent on implicit stages; zero for explicit methods.
        residual: largest relative residual of a stage, floating point ``[samples]``.
        step_control: ``"fixed"``, ``"per sample"`` or ``"shared"`` (error control with one step for the whole batch,
            as f may couple samples).
        failures: of ``options={"on_failure": "nan"}``: why a sample failed, by its number.
    """

    __module__ = "nodeshape"

    nfe_forward: Tensor
    nfe_backward: Tensor
    accepted: Tensor
    rejected: Tensor
    stage_iterations: Tensor
    residual: Tensor
    step_control: str = "fixed"
    failures: dict[int, str] = field(default_factory=dict)

    @classmethod
    def zeros(cls, samples: int, device: torch.device) -> SolverStats:
        """Statistics of a solve that has not started."""
        nfe_forward, nfe_backward, accepted, rejected, stage_iterations = torch.zeros(
            5, samples, dtype=torch.long, device=device
        )
        residual = torch.zeros(samples, dtype=torch.float64, device=device)
        return cls(nfe_forward, nfe_backward, accepted, rejected, stage_iterations, residual)
