"""The library of the fused solver: what it takes of the dynamics it knows, calls of its ops, their gradients.

``libnodeshape_cpu.so`` registers the ops under ``torch.ops.nodeshape``, and ``libnodeshape_cuda.so`` registers them
again for tensors on a GPU, where torch has CUDA; :mod:`nodeshape._ode.program_op` says what they take and give. No
argument is a string: torch's stable ABI leaks those. On the CPU, a sample that fails raises from its op. On CUDA, where
nothing waits for the device, it gives NaN, and the same error comes from the next op that finds it;
``torch.ops.nodeshape.raise_failures()`` does nothing but look, and raises a RuntimeError whose message begins with the
error's name, as all ops do.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nodeshape._ode.layers import any_global_hooks
from nodeshape._ode.program import Program

_LIBRARY = Path(__file__).with_name("libnodeshape_cpu.so")
_CUDA_LIBRARY = Path(__file__).with_name("libnodeshape_cuda.so")
# Why a library is not there:
_missing: str | None = None
_cuda_missing: str | None = None


@dataclass(frozen=True)
class Kernel:
    """What the fused solver must know of a class of dynamics that need not be traced.

    Attributes:
        dimensions: of the state.
        weights: the parameters of a module in state_dict order; or why it may not compute what its class does. Called
            with the module and whether torch.compile is tracing.
        program: what it is for these weights and this state; raises ValueError if they do not fit together.
    """

    dimensions: int
    weights: Callable[[Any, bool], list[Tensor] | str]
    program: Callable[[Any, list[Tensor], Tensor], Program]


#: By the exact class of a dynamics, which registers itself.
KERNELS: dict[type, Kernel] = {}


def weights_for(dynamics: Any, y0: Any) -> list[Tensor] | str:
    """The parameters to solve with, in state_dict order; or why the fused solver does not take this solve."""
    compiling = torch.compiler.is_compiling()
    if _turned_off(compiling):
        return "NODESHAPE_FUSED=0"
    kernel = KERNELS.get(type(dynamics))
    if kernel is None:
        return f"{type(dynamics).__name__} has no fused kernel (what nodeshape.fuse returns has one)"
    if not isinstance(y0, Tensor):
        return "the state is a tuple"
    if not (y0.is_cpu or y0.is_cuda):
        return f"the state is on {y0.device}"
    if y0.dtype not in (torch.float32, torch.float64):
        return f"the state is {y0.dtype}"
    if y0.dim() != kernel.dimensions:
        return f"the state has {y0.dim()} dimensions, the kernel takes {kernel.dimensions}"
    if not compiling:
        if type(y0) not in (Tensor, nn.Parameter):
            return f"the state is a {type(y0).__name__}"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            return "a torch.func transform or forward-mode differentiation is active"
    if any_global_hooks():
        return "hooks of all modules are registered"
    missing = _missing or (_cuda_missing if y0.is_cuda else None)
    return missing or kernel.weights(dynamics, compiling)


def program_of(dynamics: Any, weights: list[Tensor], y0: Tensor) -> Program:
    """The program of a dynamics whose weights :func:`weights_for` gave."""
    return KERNELS[type(dynamics)].program(dynamics, weights, y0)


def _turned_off(compiling: bool) -> bool:
    """Whether NODESHAPE_FUSED is 0: of os.environ's dictionary, as its own lookup takes a tenth of a small solve."""
    # Compilers know os.environ alone, and a test may have put a plain dictionary in its place.
    environment = None if compiling else getattr(os.environ, "_data", None)
    if environment is None:
        return os.environ.get("NODESHAPE_FUSED") == "0"
    return bool(environment.get(b"NODESHAPE_FUSED") == b"0")


def _load() -> str | None:
    if not _LIBRARY.exists():
        return _told(f"{_LIBRARY.name} is not built: reinstall with a C++ compiler")
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return _told(f"{_LIBRARY.name} does not load: {error}")
    ctypes.CDLL(str(_LIBRARY)).nodeshape_let_signals_end_solves()
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not _CUDA_LIBRARY.exists():
        return f"{_CUDA_LIBRARY.name} is not built: reinstall with FORCE_CUDA=1 where nvcc is"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return _told(f"{_CUDA_LIBRARY.name} does not load: {error}")
    return None


def _told(reason: str) -> str:
    """Say, in one line, that solves will take the plain loop where this library's kernels were meant for them."""
    message = f"{reason}; solves take the plain loop, which is slower"
    warnings.warn_explicit(message, RuntimeWarning, "nodeshape", 0)  # of no line, which would be a second one
    return reason


_missing = _load()
_cuda_missing = _missing or _load_cuda()
