"""The user's f(t, y) on the state as the loops hold it: one tensor, of the type that is computed in."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from nodeshape._ode.unrolled import is_tracing

State = Tensor | tuple[Tensor, ...]

#: Types that are too coarse to add steps up in: such a state is carried in float32, f sees its own type.
LOW_PRECISION = (torch.bfloat16, torch.float16)

#: The type of the real part, of complex types.
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
#: A repeated evaluation of f may differ from the first by this much, relative to the largest slope, by rounding.
SAME = {torch.float32: 1e-4, torch.float64: 1e-9}


class Field:
    """dy/dt = f(t, y) for a state of one tensor; a tuple is laid out as ``[samples, size]``, or ``[size]``.

    The first dimension of the state is its batch of samples if every tensor has at least two dimensions and the same
    first size; otherwise the whole state is one sample. f always sees the whole state, in the shape and type it has.

    Attributes:
        func: f as the user gave it.
        batched: whether the first dimension is that of samples.
        samples, size: of the batch, and elements of each sample.
        rows: the shape of a state as rows of samples.
        dtype: of the state in the loops.
        time_dtype: of the times that f sees: real, and as fine as the state.
        device: of the state.
        evaluations: of f so far.
        coarse: whether f computes in a type of low precision.
        takes_columns: whether f takes times ``[n, 1, ...]`` of n samples.
        frozen: samples whose slope is taken for 0, ``[samples]``; None for none.
        remembers: whether the latest evaluation is kept, for :meth:`check`.
        before: called before each evaluation, if not None.
    """

    def __init__(self, func: Callable[[Tensor, Any], Any], y0: State) -> None:
        self.func = func
        self._tuple = not isinstance(y0, Tensor)
        tensors = y0 if isinstance(y0, tuple) else (y0,)
        first = tensors[0]
        self._shapes = [x.shape for x in tensors]
        batched = all(x.dim() >= 2 and x.shape[0] == first.shape[0] for x in tensors)
        self.samples = first.shape[0] if batched else 1
        self.batched = batched
        self._lead = (self.samples,) if batched else ()
        # A tracer's batch has any size, and what it records may hold no number of its own.
        self._any = (-1,) if batched and is_tracing() else self._lead
        self._as = [(*self._any, *shape[len(self._lead) :]) for shape in self._shapes]
        self._sizes = [prod(shape[len(self._lead) :]) for shape in self._shapes]
        self.size = sum(self._sizes)
        self.rows = (*self._any, self.size) if batched else (1, -1)
        self._seen_as = first.dtype
        self.coarse = first.dtype in LOW_PRECISION
        self.dtype = torch.float32 if first.dtype in LOW_PRECISION else first.dtype
        self.time_dtype = REAL.get(self.dtype, self.dtype)
        self.device = first.device
        self.evaluations = 0
        self.takes_columns = False
        self.frozen: Tensor | None = None
        self.before: Callable[[], Any] | None = None
        # f may work in place; watched by the version of what it gets, which compilers and inference mode do not have.
        tracing = is_tracing()
        self._watch = not tracing
        self._copy = tracing or torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors)
        self._last: tuple[ref[Tensor], int] | None = None
        self._first = True
        self._start: tuple[Tensor, Tensor, Tensor] | None = None
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None
        self.remembers = False

    @property
    def layout(self) -> tuple[Any, ...]:
        """What is asked of f: shapes and type of its state."""
        return self._tuple, tuple(self._shapes), self._seen_as

    def pack(self, state: State) -> Tensor:
        """The state as the loops hold it."""
        if isinstance(state, Tensor):
            return state if state.dtype is self.dtype else state.to(self.dtype)
        return torch.cat([x.reshape((*self._any, size)) for x, size in zip(state, self._sizes)], dim=-1).to(self.dtype)

    def unpack(self, y: Tensor, lead: tuple[int, ...] = ()) -> State:
        """Undo :meth:`pack` for a tensor with ``lead`` dimensions before the state's, in the caller's type."""
        if y.dtype is not self._seen_as:
            y = y.to(self._seen_as)
        if not self._tuple:
            return y
        parts = y.split(self._sizes, dim=-1)
        return tuple(x.reshape((*lead, *shape)) for x, shape in zip(parts, self._as))

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """f at time ``t`` (a scalar tensor) and state ``y``; or of some samples at times of their own, ``[n]``.

        Raises:
            TypeError, ValueError: f returns no tensor, or one of another shape.
            RuntimeError: f changes its state in place now, and did not when it was first called.
        """
        if self.before is not None:
            self.before()
        self.evaluations += 1
        if t.dim() > 0:
            return self._each(t, y)
        if self._first or self._copy:
            out = self._guarded(t, y)
        else:
            version = y._version
            out = self.evaluate(t, y)
            if y._version != version:
                raise RuntimeError(
                    "func changed its state in place, which it did not in its first call, so the solution would be"
                    " wrong: let func compute a new tensor (y * 2, not y.mul_(2))"
                )
        if self._watch and not out.is_inference():
            last = None if self._last is None else self._last[0]()
            if last is not None and self._last is not None and last._version != self._last[1]:
                raise RuntimeError(
                    "func wrote into the tensor that it had returned before, which the solver still needs: let func"
                    " return a new tensor (torch.matmul(y, a), not torch.matmul(y, a, out=buffer))"
                )
            self._last = ref(out), out._version  # weakly: its graph may lead back here
        if self.remembers:
            self._latest = t.detach(), y.detach(), out.detach()
        return out

    def _each(self, t: Tensor, y: Tensor) -> Tensor:
        """f of samples ``y`` ``[n, ...]`` at times ``t`` ``[n]``."""
        if self.takes_columns:
            return self.evaluate(t.reshape(-1, *(1,) * (y.dim() - 1)), y)
        # f sees each sample as a batch of one; of a copy, which it may change.
        try:
            each: Tensor = torch.func.vmap(self._of_one, randomness="different")(t, y.clone())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise RuntimeError(
                f"func cannot be evaluated sample by sample ({reason}): use options={{'step_control': 'shared'}}"
            ) from error
        return each

    def _of_one(self, t: Tensor, y: Tensor) -> Tensor:
        """f of one sample, ``y`` without the batch's dimension."""
        shapes = [torch.Size((1, *shape[1:])) for shape in self._shapes]
        seen = y.to(self._seen_as)
        if self.coarse:
            t = t.to(self._seen_as)
        state = (
            tuple(x.reshape(s) for x, s in zip(seen.split(self._sizes, dim=-1), shapes)) if self._tuple else seen[None]
        )
        out = self.func(t, state)
        found = [x.shape for x in out] if self._tuple else [out.shape]
        if found != shapes:
            raise ValueError(
                f"func must return the shape of its state: of one sample it got {_shown(shapes)} and returned"
                f" {_shown(found)}; if it needs the whole batch, use options={{'step_control': 'shared'}}"
            )
        flat = torch.cat([x.reshape(-1) for x in out]) if self._tuple else out[0]
        return flat.to(self.dtype)

    def _guarded(self, t: Tensor, y: Tensor) -> Tensor:
        """f of a copy of the state, which it may change; whether it does is remembered."""
        first, self._first = self._first, False
        copy = y.clone()
        version = None if self._copy else copy._version
        out = self.evaluate(t, copy)
        if version is not None and copy._version != version:
            self._copy = True
        if first:
            self._start = t.detach(), y.detach(), out.detach()
        return out

    def alone(self, t: Tensor, y: Tensor) -> Tensor:
        """f of a state that it may change, neither counted nor remembered: for the body of a loop that is recorded."""
        return self.evaluate(t, y.clone())

    def check(self) -> None:
        """Raise RuntimeError if f is no longer what it was in its first call and its latest."""
        for call in (self._start, self._latest):
            if call is None:
                continue
            t, y, before = call
            now = self.evaluate(t, y.clone()).detach()
            tolerance = SAME[self.time_dtype] * float(before.abs().max() if before.numel() else 0.0)
            if not bool(((now - before).abs() <= tolerance).all() | ~torch.isfinite(before).all()):
                raise RuntimeError(
                    "func is not what it was in the forward pass, so the gradient would be wrong: the backward pass"
                    " evaluates it again, and its weights, attributes or random numbers have changed since; call"
                    " backward() before changing it, or use adjoint='discrete', which keeps what it needs"
                )

    def evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        """f, neither counted nor guarded."""
        if self.frozen is None:
            return self._of_state(t, y)
        return self._of_state(t, self.without_frozen(y)).masked_fill(self.column(self.frozen, y), 0.0)

    def without_frozen(self, y: Tensor) -> Tensor:
        """A state with another's, or zeros, for frozen samples: f of what is not finite has no finite gradient."""
        assert self.frozen is not None
        good = (~self.frozen).nonzero()[:, 0].tolist() if self.batched else []
        harmless = y.detach()[good[0]] if good else torch.zeros_like(y.detach())
        return torch.where(self.column(self.frozen, y), harmless, y)

    def column(self, x: Tensor, y: Tensor) -> Tensor:
        """One number per sample ``[samples]`` as it goes with a state."""
        return x.reshape(-1, *(1,) * (y.dim() - 1)) if self.batched else x.reshape(())

    def _of_state(self, t: Tensor, y: Tensor) -> Tensor:
        if self.coarse:
            t = t.to(self._seen_as)
        if self._tuple:
            state = self.unpack(y)
            got: list[Any] = [x.shape for x in state]
            out = self.func(t, state)
            shapes = [getattr(x, "shape", type(x).__name__) for x in out] if isinstance(out, (tuple, list)) else None
            if shapes != got:
                raise ValueError(
                    f"func must return the shape of its state: it got {_shown(got)} and returned"
                    f" {_shown(shapes) if shapes is not None else type(out).__name__}"
                )
            if not self.dtype.is_complex:
                for x in out:
                    self._refuse_complex(x)
            return self.pack(tuple(out))
        out = self.func(t, y if y.dtype is self._seen_as else y.to(self._seen_as))
        if not isinstance(out, Tensor):
            raise TypeError(f"func must return a tensor as its state is one, got {type(out).__name__}")
        if out.shape != y.shape:
            got, returned = _shown([y.shape]), _shown([out.shape])
            raise ValueError(f"func must return the shape of its state: it got {got} and returned {returned}")
        return out if out.dtype is self.dtype else self._cast(out)

    def _cast(self, out: Tensor) -> Tensor:
        if not self.dtype.is_complex:
            self._refuse_complex(out)
        return out.to(self.dtype)

    def _refuse_complex(self, out: Tensor) -> None:
        if out.is_complex():
            raise ValueError(f"func returned {out.dtype} for a state of {self.dtype}: give a complex y0")


def _shown(shapes: list[Any]) -> list[Any]:
    return [tuple(x) if isinstance(x, torch.Size) else x for x in shapes]
