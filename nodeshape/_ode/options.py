"""What a solve may be told: the options of ``odeint``, their checks, and the names of what is not offered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from nodeshape._ode.method import get_method

ADJOINTS = ("discrete", "reversible", "continuous")
#: Steps in an interval beyond which a step size is taken for a mistake.
MOST_STEPS = 10_000_000
#: Largest count that an option takes; beyond, it is taken for a mistake.
MOST_ITERATIONS = 2**31 - 1
#: A rebuilt trajectory may be this many times further off than a stage.
DRIFT_PER_STAGE_TOLERANCE = 1e3
#: Attributes of f that are told of steps.
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
STAGE_SOLVERS = ("anderson", "newton", "krylov")


def count(name: str, value: Any, most: int = MOST_ITERATIONS) -> int:
    """``value`` as an int from 1 to ``most``."""
    value = value.item() if isinstance(value, Tensor) else value
    whole = isinstance(value, int) or (isinstance(value, float) and isfinite(value) and value == int(value))
    if not whole or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return int(value)


def positive(name: str, value: Any) -> float:
    """``value`` as a finite float above 0."""
    if not (isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def _not_negative(name: str, value: Any) -> float:
    if isnan(value) or value < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)


def _one_of(*choices: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in choices:
            quoted = [repr(choice) for choice in choices]
            listed = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            raise ValueError(f"unknown {name.removeprefix('option ')} {value!r}: choose {listed}")
        return value

    return check


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {value!r}")
    return value


def _times(name: str, value: Any) -> Any:
    found = value.tolist() if isinstance(value, Tensor) else list(value)
    if not all(isinstance(x, (int, float)) and isfinite(x) for x in found):
        raise ValueError(f"{name} must be finite times, [n], got {value!r}")
    return value


#: Each option's check, which returns the value to use.
OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    # of given steps
    "step_size": positive,
    "grid_constructor": _callable,
    "interp": _one_of("linear", "cubic"),
    "perturb": _truth,
    # of error control
    "first_step": positive,
    "min_step": _not_negative,
    "max_step": _not_negative,
    "max_num_steps": count,
    "max_steps": count,
    "safety": positive,
    "ifactor": positive,
    "dfactor": positive,
    "norm": lambda name, value: value if value == "seminorm" else _callable(name, value),
    "step_t": _times,
    "jump_t": _times,
    "grid_points": _times,
    "step_control": _one_of("shared", "per_sample"),
    "on_failure": _one_of("raise", "nan"),
    # of implicit stages
    "stage_solver": _one_of(*STAGE_SOLVERS),
    "stage_tolerance": positive,
    "max_stage_iterations": count,
    # of gradients
    "recompute": _truth,
    "checkpoint_every": count,
    "drift_tolerance": positive,
    "adjoint_step_size": positive,
    "adjoint_rtol": positive,
    "adjoint_atol": positive,
    "adjoint_method": lambda name, value: get_method(value).name,
    "adjoint_options": lambda name, value: read_options(value),
    # of the path
    "compile": _truth,
    "fused": _truth,
}


def read_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that are given (None is not given), checked; raises ValueError for one that is unknown or wrong."""
    settings: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}: known are {', '.join(OPTIONS)}")
        if value is not None:
            settings[name] = OPTIONS[name](f"option {name!r}" if OPTIONS[name] is count else name, value)
    return settings


def check_steps(steps: int | None, step_size: float | None) -> None:
    """Raise ValueError unless at most one of the two is given, and it is positive."""
    if steps is not None and step_size is not None:
        raise ValueError(f"give steps or step_size, not both: got steps={steps!r} and step_size={step_size!r}")
    if steps is not None:
        count("steps", steps, MOST_STEPS)
    if step_size is not None:
        positive("step_size", step_size)


def steps_of(length: float, step_size: float) -> int:
    """How many equal steps of at most ``step_size`` cover an interval of signed length ``length``."""
    # A length that is a multiple of the size up to rounding (of float32 times) takes that multiple.
    count = abs(length) / step_size * (1.0 - 1e-6)
    if count > MOST_STEPS:
        raise ValueError(
            f"step_size {step_size:g} cuts an interval into more than {MOST_STEPS} steps: take a larger one"
        )
    return max(1, ceil(count))


@dataclass(frozen=True)
class UniformGrid:
    """A grid: steps of ``step_size`` from the first time on, the last one shorter, as in torchdiffeq."""

    step_size: float

    def __call__(self, func: Any, y0: Any, t: Tensor) -> Tensor:
        start, end = t[0], t[-1]
        count, size = self._steps(float(start.detach()), float(end.detach()))
        inner = torch.arange(count, dtype=t.dtype, device=t.device) * size + start
        return torch.cat([inner, end[None]])

    def points(self, times: Sequence[float]) -> list[float]:
        """The same for times that are numbers."""
        count, size = self._steps(times[0], times[-1])
        return [*(k * size + times[0] for k in range(count)), times[-1]]

    def _steps(self, start: float, end: float) -> tuple[int, float]:
        return steps_of(end - start, self.step_size), self.step_size if end > start else -self.step_size
