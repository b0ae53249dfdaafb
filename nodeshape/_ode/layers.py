"""Whether the modules that a kernel computes still are what they were when it was chosen for them."""

from __future__ import annotations

from itertools import repeat
from operator import contains
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Hooks of all modules; torch changes these dictionaries, and never puts others in their place.
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(nn.modules.module, f"_global{name}") for name in HOOKS]


def any_global_hooks() -> bool:
    """Whether hooks that are called for every module, as profilers register, would miss the calls of a kernel."""
    return any(_GLOBAL_HOOKS)


def kind_of(root: nn.Module) -> list[Any]:
    """Of each module, what decides how it computes, but for its settings: class, a forward of its own, hooks."""
    return [
        (type(module), module.__dict__.get("forward"), *(dict(module.__dict__[name]) for name in HOOKS))
        for module in root.modules()
    ]


class Layers:
    """The modules below ``root`` as they are now, to be asked in each call, in a microsecond, whether they still are.

    Looking all of them over by :func:`kind_of` is most of what a small solve costs in Python.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        own = [module.__dict__ for module in self._modules]
        self._root = own[0]["_modules"]
        self._types = list(map(type, self._modules))
        self._plain = [x for x in own if "forward" not in x]
        self._patched = [x for x in own if "forward" in x]
        self._forwards = [x["forward"] for x in self._patched]
        found = [x[name] for x in own for name in ("_modules", *HOOKS)]
        self._empty = [x for x in found if not x]
        self._full = [x for x in found if x]
        self._held = [list(x.values()) for x in self._full]

    def are_those_of(self, root: nn.Module) -> bool:
        """Whether nothing below ``root`` was replaced, added, taken away, hooked or given another forward."""
        return (
            root.__dict__["_modules"] is self._root  # that of a shallow copy is not
            and not any(self._empty)
            and not any(map(contains, self._plain, repeat("forward")))
            and list(map(list, map(dict.values, self._full))) == self._held
            and list(map(type, self._modules)) == self._types
            and (not self._patched or [x.get("forward") for x in self._patched] == self._forwards)
        )
