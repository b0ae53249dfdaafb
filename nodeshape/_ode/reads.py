"""What f reads besides its state, its time and its weights: whether that still is what it was when f was traced.

Attributes of its modules, its code, and the numbers and tensors that it finds outside. Weights and buffers are read
anew in each solve, so only that they are there, and which are tied, is part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: What every module has; hooks and submodules are watched by :mod:`nodeshape._ode.layers`.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | frozenset(vars(nn.Module)) - {"forward"}
_TENSORS = ("_parameters", "_buffers")
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
MISSING = "nothing"
#: How far into objects that f reads is looked.
_DEPTH = 3


@contextmanager
def recorded(root: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Record which attributes of ``root`` and of the modules below are read: names, by the module's path."""
    reads: dict[str, set[str]] = {path: set() for path, _ in root.named_modules()}
    before = [(module, type(module)) for module in root.modules()]
    for (module, kind), names in zip(before, reads.values()):
        try:
            module.__class__ = _recording(kind, names)
        except TypeError:  # a class of which none can be made: as if all were read
            names.update(vars(module), ("forward",))
    try:
        yield reads
    finally:
        for module, kind in before:
            module.__class__ = kind


def _recording(kind: type[nn.Module], names: set[str]) -> type[nn.Module]:
    def read(self: Any, name: str) -> Any:
        names.add(name)
        return kind.__getattribute__(self, name)

    metaclass: Any = type(kind)
    made: type[nn.Module] = metaclass(kind.__name__, (kind,), {"__getattribute__": read})
    return made


class Reads:
    """What the modules below ``root`` hold now of what was recorded, to be asked in each call.

    Args:
        names: of attributes, by the path of a module, that :func:`recorded` gave.

    Attributes:
        values: what was found, by where; of two equal ones f computes the same. It can be pickled.
    """

    def __init__(self, root: nn.Module, names: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._simple: list[Any] = []
        self._classes: list[tuple[type, str]] = []
        self._of_classes: list[Any] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        functions: list[Any] = []
        for path, module in root.named_modules():
            for name in sorted(names.get(path, ())):
                functions += self._attribute(f"{path}.{name}" if path else name, module, name)
        self._tied(root)
        seen: set[int] = set()
        for function in functions:
            self._outside(function, seen)

    def still_hold(self) -> bool:
        """Whether nothing is another than when this was made."""
        try:
            return (
                list(map(dict.get, self._owners, self._names, repeat(MISSING))) == self._simple
                and [getattr(kind, name, MISSING) for kind, name in self._classes] == self._of_classes
                and (not self._others or all(get() == value for get, value in self._others))
            )
        except (RuntimeError, ValueError, TypeError):  # of what cannot be compared, such as a number and an array
            return False

    def _add(self, where: str, get: Callable[[], Any]) -> None:
        value = _frozen(get())
        self.values[where] = value
        self._others.append((lambda: _frozen(get()), value))

    def _attribute(self, where: str, module: nn.Module, name: str) -> list[Any]:
        """Watch an attribute; the functions that are one."""
        own = module.__dict__
        if name in own and (name == "training" or name not in _OF_EVERY_MODULE):
            return self._of(where, own, name)
        if name in _OF_EVERY_MODULE or name.startswith("__") or name in own["_modules"]:
            return []
        for kind in _TENSORS:
            if name in own[kind]:
                if own[kind][name] is None:
                    self._of(where, own[kind], name)
                return []
        found = inspect.getattr_static(type(module), name, MISSING)
        if found is MISSING:  # which f may have asked for by hasattr
            self._add(
                f"whether there is {where}",
                lambda: any(name in x for x in (own, *(own[part] for part in (*_TENSORS, "_modules")))),
            )
            return []
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        if isinstance(found, FunctionType):
            if _not_the_users(found):
                return []
            if name != "forward":
                self._of(where, own, name)  # which would hide that of the class
            self._of_class(where + "()", type(module), name)
            return [found, *(vars(base)[name] for base in type(module).__mro__ if name in vars(base))]  # by super() too
        if not hasattr(found, "__get__"):
            self._of(where, own, name)
            self._of_class(where + " of the class", type(module), name)
        return []

    def _of_class(self, where: str, kind: type, name: str) -> None:
        value = getattr(kind, name, MISSING)
        if isinstance(value, (FunctionType, property, *_PLAIN)):
            self.values[where] = _frozen(value)
            self._classes.append((kind, name))
            self._of_classes.append(value)
        else:
            self._add(where, lambda: getattr(kind, name, MISSING))

    def _of(self, where: str, owner: dict[str, Any], name: str) -> list[Any]:
        value = owner.get(name, MISSING)
        if isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(x, _PLAIN) for x in value)):
            self.values[where] = value
            self._owners.append(owner)
            self._names.append(name)
            self._simple.append(value)
        elif isinstance(value, FunctionType):
            self.values[where] = _frozen(value)
            self._owners.append(owner)
            self._names.append(name)
            self._simple.append(value)
        else:
            self._add(where, lambda: owner.get(name, MISSING))
        return [value] if isinstance(value, (FunctionType, MethodType, partial)) else []

    def _tied(self, root: nn.Module) -> None:
        """Watch tensors that have several names: the trace knows one of them."""
        places: dict[int, list[tuple[str, dict[str, Any], str]]] = {}
        for path, module in root.named_modules():
            for part in _TENSORS:
                for name, x in module.__dict__[part].items():
                    if x is not None:
                        places.setdefault(id(x), []).append((f"{path}.{name}", module.__dict__[part], name))
        for (where, own, name), *others in places.values():
            for other, its, its_name in others:
                self._add(
                    f"{other}, tied to {where},",
                    partial(lambda a, x, b, y: a.get(x) is b.get(y), own, name, its, its_name),
                )

    def _outside(self, function: Any, seen: set[int]) -> None:
        """Watch numbers and tensors that a function finds in its closure and among the globals of its file."""
        if isinstance(function, partial):
            self._add("arguments of a partial function", lambda: (function.args, function.keywords))
            return self._outside(function.func, seen)
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or id(function) in seen:
            return None
        if _not_the_users(function):
            return None
        seen.add(id(function))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            if name != "__class__":
                self._found(f"{name}, which {function.__qualname__} finds outside,", cell, "cell_contents", seen)
        used = set(_names_of(function.__code__))
        for name in sorted(used & function.__globals__.keys()):
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                if value.__name__.partition(".")[0] not in ("torch", "math", "numpy"):
                    for inner in sorted(used & vars(value).keys()):
                        self._found(f"{name}.{inner}", vars(value), inner, seen)
            else:
                self._found(f"the global {name}", function.__globals__, name, seen)
        return None

    def _found(self, where: str, owner: Any, name: str, seen: set[int]) -> None:
        try:
            value = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        except ValueError:  # a cell that is empty yet
            return
        if isinstance(value, (FunctionType, partial)):
            self._outside(value, seen)
        elif isinstance(value, (type, ModuleType)) or (callable(value) and not isinstance(value, (nn.Module, Tensor))):
            return
        if isinstance(owner, dict):
            self._of(where, owner, name)
        else:
            self._add(where, lambda: getattr(owner, name))


def _not_the_users(function: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] in ("torch", "nodeshape")


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _names_of(x)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Where two :attr:`Reads.values` differ, in words; None if they do not."""
    for where in (*before, *now):
        if where not in before or where not in now or not _same(before[where], now[where]):
            if where.endswith("training"):
                return "f was fused in another mode: call train() or eval() before fuse"
            a, b = (x.get(where, MISSING) for x in (before, now))
            values = f" ({a!r}, now {b!r})" if isinstance(a, _PLAIN) and isinstance(b, _PLAIN) else ""
            return f"{where.removeprefix('func.')} is another than when f was fused{values}: fuse it anew"
    return None


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or bool(a != a and b != b)  # of numbers that are not


class _Held:
    """A tensor and its numbers, which are compared where it, or its version, is another."""

    def __init__(self, x: Tensor) -> None:
        self.tensor, self.version, self.numbers = x, _version(x), x.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        if self.tensor is other.tensor and self.version == other.version is not None:
            return True
        a, b = self.numbers, other.numbers
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())

    __hash__ = None  # type: ignore[assignment]


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _frozen(value: Any, depth: int = _DEPTH) -> Any:
    """``value`` as something that stays as it is, compares by what f could read of it and can be pickled."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _Held(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if depth == 0 or isinstance(value, (type, ModuleType)):
        return name
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_frozen(x, depth - 1) for x in value))
    if isinstance(value, Mapping):
        return (type(value).__name__, *((_frozen(k), _frozen(x, depth - 1)) for k, x in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, *sorted(map(repr, value)))
    if isinstance(value, partial):
        return (_frozen(value.func, depth), *(_frozen(x, depth - 1) for x in (value.args, value.keywords)))
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return _frozen(value.__func__, depth)
    if isinstance(value, property):
        return _frozen(value.fget, depth)
    if isinstance(value, FunctionType):
        return (name, _code(value.__code__), _frozen(value.__defaults__, depth - 1))
    if hasattr(value, "__array__"):
        return _Held(torch.as_tensor(value.__array__()))
    if hasattr(value, "__dict__"):
        return (name, *((k, _frozen(x, depth - 1)) for k, x in vars(value).items()))
    return name


def _code(code: CodeType) -> Any:
    return (code.co_code, code.co_names, *(_code(x) if isinstance(x, CodeType) else repr(x) for x in code.co_consts))
