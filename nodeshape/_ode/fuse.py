"""``fuse``: a user's f as a program for the fused solver, traced by torch.export and checked against f."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from copy import deepcopy
from math import prod
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.traceback import preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from nodeshape._ode import fused, program_op
from nodeshape._ode.graph import leaves
from nodeshape._ode.layers import Layers, any_global_hooks, kind_of
from nodeshape._ode.lowering import RULES, FuseError, Lowered, lower, place_of_error
from nodeshape._ode.method import METHODS
from nodeshape._ode.program import Program
from nodeshape._ode.reads import MISSING, Reads, difference, recorded
from nodeshape._ode.unrolled import is_exporting, is_recording

State = Tensor | tuple[Tensor, ...]
#: Largest relative difference from f, in float64, of values and of gradients (torch has hardsigmoid's 1/6 in float32).
SAME_VALUES, SAME_GRADIENTS = 1e-11, 1e-7
#: Of values in float32 from those in float64: no more than that it is the same function.
SAME_IN_FLOAT32 = 0.05
DERIVATIVES = "take them by torch.func.vjp, which can be traced, or ns.WithDivergence, or write them out"
CHANGED = "a module of f was replaced by one of another class, or has other hooks or another forward, since fuse"
#: Layers whose f depends on whether they are trained or evaluated.
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class _Known:
    """What a fused f remembers of its modules; a class of its own, as torch.export copies tuples that it finds."""

    def __init__(self, layers: Layers, reads: Reads, places: list[tuple[dict[str, Any], str]]) -> None:
        self.layers, self.reads, self.places = layers, reads, places


class Fused(nn.Module):
    """f as a program: what :func:`fuse` returns, to call as f; ``odeint`` and ``ODEBlock`` solve it in the kernel.

    Parameters and buffers are those of f, which is the submodule ``func``; they may change between solves. What f reads
    from Python attributes is what it was when it was fused, for the kernel.

    ``print(fused)`` shows the program.
    """

    __module__ = "nodeshape"

    def __init__(self, func: Callable[..., Any], y0: State, lowered: Lowered) -> None:
        super().__init__()
        self.func = func
        owner = getattr(func, "__self__", None)
        if isinstance(owner, nn.Module):  # of a method
            self.owner = owner
        self._lowered = lowered
        self._tuple = not isinstance(y0, Tensor)
        tensors = y0 if isinstance(y0, tuple) else (y0,)
        self._batched = tensors[0].dim() >= 2
        self._shapes = [tuple(x.shape[1 if self._batched else 0 :]) for x in tensors]
        self._kind = kind_of(self)
        #: Names of attributes that f reads, by the path of their module, and what they and what is outside were.
        self._reads: dict[str, tuple[str, ...]] = {}
        self._values = Reads(self, self._reads).values
        self._weight_shapes = [own[name].shape for own, name in self._walk()]
        self.training = getattr(func, "training", True)  # its own flag: train() would set those inside f

    @property
    def program(self) -> Program:
        """What the kernel runs."""
        return self._lowered.program

    def forward(self, t: Tensor, y: Any) -> Any:
        """f itself."""
        if (
            is_exporting() and self._lowered.differentiates
        ):  # in this order: what f reads while it is fused is remembered
            written = self._written(y[0] if self._tuple else y)
            if written is not None:
                out = written(t, tuple(y) if self._tuple else (y,))
                return tuple(out) if self._tuple else out
        return self.func(t, y)

    def _written(self, like: Tensor) -> _Written | None:
        """f with the derivatives it takes as plain operations, which exporters can record, where it is as it was."""
        known: dict[Any, Any] = self.__dict__.setdefault("_plain", {})
        key = like.dtype, like.device
        if not is_recording():  # an exporter runs it before it records it
            places = self._found()
            if isinstance(places, str):
                known.pop(key, None)
            elif key not in known or known[key][0] is not places:
                lead = (3,) if self._batched else ()
                examples = tuple(torch.zeros(*lead, *shape, dtype=key[0], device=key[1]) for shape in self._shapes)
                time = torch.zeros((), dtype=key[0], device=key[1])
                known[key] = places, _Written(_Called(self.func, self._tuple), time, examples, self._batched)
        return known[key][1] if key in known else None

    def __repr__(self) -> str:
        name = type(self.func).__name__ if isinstance(self.func, nn.Module) else "function"
        state = ", ".join(str(list(shape)) for shape in self._shapes)
        program = str(self.program).replace("\n", "\n  ")
        return f"Fused({name}), a sample is {state}\n  {program}"

    def weights_for(self, y0: State) -> list[Tensor] | str:
        """The program's weights; or why the fused solver does not take a solve from ``y0``."""
        compiling = torch.compiler.is_compiling()
        if fused._turned_off(compiling):
            return "NODESHAPE_FUSED=0"
        if fused._missing is not None:
            return fused._missing
        if isinstance(y0, Tensor) == self._tuple:
            return "the state is not the tensor, or tuple, that f was fused for"
        tensors = y0 if isinstance(y0, tuple) else (y0,)
        first = tensors[0]
        dtype, device = first.dtype, first.device
        if not (first.is_cpu or first.is_cuda) or dtype not in (torch.float32, torch.float64):
            return f"the state is {dtype} on {device}"
        if first.is_cuda and fused._cuda_missing is not None:
            return fused._cuda_missing
        lead = 1 if self._batched else 0
        if [x.shape[lead:] for x in tensors] != self._shapes or (
            lead and self._tuple and any(x.shape[0] != first.shape[0] for x in tensors)
        ):
            return f"f was fused for samples {self._shapes}, the state is {[list(x.shape) for x in tensors]}"
        if not compiling:
            for x in tensors:
                if type(x) is not Tensor and type(x) is not nn.Parameter:
                    return f"the state is a {type(x).__name__}"
            if (
                torch._C._functorch.peek_interpreter_stack() is not None
                or torch.autograd.forward_ad._current_level >= 0
            ):
                return "a torch.func transform or forward-mode differentiation is active"
        if any_global_hooks():
            return "hooks of all modules are registered"
        places = self._traced() if compiling else self._found()
        if isinstance(places, str):
            return places
        try:
            weights = self._weights(places, dtype, device)
        except (KeyError, AttributeError):  # removed, or None
            return "a weight of f is gone"
        if weights is None:
            return "a weight of f has another shape than when f was fused"
        for x in weights:
            if x.dtype is not dtype or x.device != device:
                return f"a weight is {x.dtype} on {x.device}, the state {dtype} on {device}"
        return weights

    def _weights(
        self, places: list[tuple[dict[str, Any], str]], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor] | None:
        """The program's weights; None where a shape is another, which may be read otherwise and need not fail."""
        lowered = self._lowered
        tensors = [own[name] for own, name in places]
        if [x.shape for x in tensors] != self._weight_shapes:
            return None
        if lowered.prelude is None and not lowered.constants:
            return tensors  # which _walk() found in the order of the program
        named = dict(zip(lowered.paths, tensors))
        for name, x in lowered.constants.items():
            named[name] = self._constant(name, x, dtype, device)
        if lowered.prelude is None:
            return [named[name] for name in lowered.weights]  # type: ignore[index]
        made = lowered.prelude(device, *(named[name] for name in lowered.prelude_inputs))
        made = [x.to(dtype) for x in made]  # what f makes itself, such as torch.arange(3)
        return [made[name] if isinstance(name, int) else named[name] for name in lowered.weights]

    def _found(self) -> list[tuple[dict[str, Any], str]] | str:
        """What :meth:`_walk` finds, remembered for as long as f stands still; or how f is another one now."""
        known: _Known | None = self.__dict__.get("_known")
        if known is None or not (known.layers.are_those_of(self) and known.reads.still_hold()):
            if kind_of(self) != self._kind:
                return CHANGED
            reads = Reads(self, self._reads)
            why = difference(self._values, reads.values)
            if why is not None:
                return why
            known = self.__dict__["_known"] = _Known(Layers(self), reads, self._walk())
        return known.places

    def _traced(self) -> list[tuple[dict[str, Any], str]] | str:
        """The same while a compiler traces, which will trace anew where an attribute is another."""
        for path, names in self._reads.items():
            module = self._module(path.split(".") if path else [])
            if module is None:
                return CHANGED
            for name in names:
                value = self._values.get(f"{path}.{name}" if path else name)
                if type(value) in (int, float, bool, str) and value != MISSING and getattr(module, name, None) != value:
                    return f"{name} is another than when f was fused"
        return self._walk()

    def _module(self, path: Sequence[str]) -> Any:
        module: Any = self
        for part in path:
            module = None if module is None else module.__dict__["_modules"].get(part)
        return module

    def _constant(self, name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A constant of f where the state is; on a GPU it stays, as the way there would wait for the device."""
        if x.is_floating_point():
            x = x.to(dtype)
        if x.device == device:
            return x
        placed: dict[Any, Tensor] = self.__dict__.setdefault("_placed", {})
        key = name, x.dtype, device
        if key not in placed:
            placed[key] = x.to(device)
        return placed[key]

    def _walk(self) -> list[tuple[dict[str, Any], str]]:
        """The dictionary and name of each parameter and buffer of f.

        In the order of the program's weights, if those are all there is to it; else in that of the trace.
        """
        lowered = self._lowered
        direct = lowered.prelude is None and not lowered.constants
        places: list[tuple[dict[str, Any], str]] = []
        for name in lowered.weights if direct else lowered.paths:
            *path, last = lowered.paths[name]  # type: ignore[index]
            module = self._module(path)
            own: dict[str, Any] = {} if module is None else module.__dict__["_parameters"]
            places.append((own if last in own or module is None else module.__dict__["_buffers"], last))
        return places

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_known", None)
        state.pop("_placed", None)
        state.pop("_plain", None)
        return state

    def pack(self, y0: State) -> Tensor:
        """The state as the op takes it, ``[batch, ...]``."""
        if isinstance(y0, Tensor):
            return y0 if self._batched else y0[None]
        lead = y0[0].shape[0] if self._batched else 1
        return torch.cat([x.reshape(lead, prod(shape)) for x, shape in zip(y0, self._shapes)], dim=1)

    def unpack(self, ys: Tensor) -> State:
        """A solution of the op, ``[times, batch, ...]``, as the caller's."""
        if not self._tuple:
            return ys if self._batched else ys[:, 0]
        lead = ys.shape[:2] if self._batched else ys.shape[:1]
        parts = ys.split([prod(shape) for shape in self._shapes], dim=2)
        return tuple(x.reshape(*lead, *shape) for x, shape in zip(parts, self._shapes))


def fuse(f: Callable[..., Any], y0: State) -> Fused:
    """f as a module that :func:`odeint` and :class:`ODEBlock` solve in the fused kernel, weights shared with f.

    f is traced once by torch.export and lowered to a program of layers, which is compared with f at random points in
    float64, values and gradients. Linear layers, convolutions of stride 1 (any groups and dilation), layer, group and
    instance norms, the usual activations, arithmetic with broadcasting inside a sample, powers, sums and means over a
    sample, concatenation, slices, reshapes and matrix products lower; time may be a feature or a channel.

    Args:
        f: a module or function ``f(t, y) -> dy/dt`` that treats each sample by itself.
        y0: a state ``[batch, ...]``, or a tuple of such, for the shapes of a sample; any batch will do later. A tensor
            of one dimension is one sample.

    Returns:
        A module to call as f; ``print`` shows its program. Where a solve cannot take the kernel (another shape of
        samples, events), it takes the plain loop; ``nodeshape.backend`` says which and why.

    Raises:
        FuseError: an operation does not lower, with its file and line and what to write instead; or the program does
            not compute what f does.
        TypeError: ``y0`` is not made of tensors.
    """
    tensors = y0 if isinstance(y0, tuple) else (y0,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(y0).__name__}")
    if fused._missing is not None:
        raise FuseError(fused._missing)
    if isinstance(f, Fused):
        f = f.func
    batched = tensors[0].dim() >= 2
    if any((x.dim() >= 2) != batched or (batched and x.shape[0] != tensors[0].shape[0]) for x in tensors):
        raise FuseError(f"the tensors of y0 must share the batch, got {[list(x.shape) for x in tensors]}")
    _refuse_other_arguments(f)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        made = Fused(f, y0, _trace(f, tensors, isinstance(y0, tuple), batched))
        _check(made, tensors)
    return made


fuse.__module__ = "nodeshape"


def _refuse_other_arguments(f: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(f.forward if isinstance(f, nn.Module) else f)
    except (TypeError, ValueError):  # of a function that does not say what it takes
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise FuseError(f"f must take (t, y), and takes {signature}: write def forward(self, t, y)") from error


class _Called(nn.Module):
    """f, which may be a function, as a module of ``(t, *tensors)`` with one tensor per part of the state."""

    def __init__(self, func: Callable[..., Any], as_tuple: bool) -> None:
        super().__init__()
        self.func = func
        self.as_tuple = as_tuple
        owner = getattr(func, "__self__", None)
        if isinstance(owner, nn.Module):
            self.owner = owner

    def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> Any:
        out = self.func(t, tuple(y) if self.as_tuple else y[0])
        return tuple(out) if self.as_tuple else out


def _trace(f: Callable[..., Any], tensors: tuple[Tensor, ...], as_tuple: bool, batched: bool) -> Lowered:
    """The program of f.

    Raises:
        FuseError: f cannot be traced, or an operation does not lower.
    """
    _refuse_closures(f)
    called = _in_float64(_Called(f, as_tuple))
    examples = tuple(_example(x.detach().to("cpu", torch.float64), batched) for x in tensors)
    time = torch.zeros((), dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2)
    shapes = tuple({0: batch} if batched else {} for _ in examples)
    quiet = logging.getLogger("torch").level
    differentiates = False

    def exported_program() -> torch.export.ExportedProgram:
        with redirect_stderr(io.StringIO()):  # to which it prints graphs where it fails
            program = torch.export.export(called, (time, examples), dynamic_shapes=({}, shapes), strict=False)
        decomposed: torch.export.ExportedProgram = program.run_decompositions(_decompositions())
        return decomposed

    try:
        logging.getLogger("torch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with _computing_in_float64(), _NoDerivatives():
                    exported = exported_program()
            except Exception as error:  # whatever torch.export raises where torch.func is used
                if not isinstance(error, _Differentiates) and not _uses_torch_func(error):
                    raise
                differentiates = True
                with _computing_in_float64():
                    called = _Written(called, time, examples, batched, keeps_places=True)
                    exported = exported_program()
    except Exception as error:  # whatever f, or PyTorch's tracer of it, raises
        if isinstance(error, FuseError):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if isinstance(error, GuardOnDataDependentSymNode):
            raise FuseError(
                f"f cannot be traced: Python looks at the value of a tensor{place_of_error(error)}; write"
                " torch.where(condition, a, b) instead of if"
            ) from error
        advice = (
            "f must be a function of tensors whose Python does not look at their values or at the size of the batch"
        )
        if "(batch)" in first:
            advice = (
                "the size of the batch became a number: take it as y.shape[0], not len(y), and einsum of two at a time"
            )
        if differentiates:
            advice = f"f takes derivatives of itself: {DERIVATIVES}"
        where = place_of_error(error)
        raise FuseError(f"f cannot be traced: {type(error).__name__}: {first}{where}; {advice}") from error
    finally:
        logging.getLogger("torch").setLevel(quiet)
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise FuseError(
            f"f changes {changed[0].removeprefix('func.')} in place: call f.eval() if a layer does so while it trains,"
            " as BatchNorm (or use GroupNorm or LayerNorm) and spectral_norm do; else compute a new tensor"
        )
    paths: dict[str, tuple[str, ...]] = {
        **{name: tuple(path.split(".")) for name, path in signature.inputs_to_parameters.items()},
        **{name: tuple(path.split(".")) for name, path in signature.inputs_to_buffers.items()},
    }
    constants = {
        name: exported.constants[target].detach().clone()
        for name, target in signature.inputs_to_lifted_tensor_constants.items()
    }
    user = [name for name in signature.user_inputs if isinstance(name, str)]
    lowered = lower(exported.graph, {*paths}, constants, user[1:], user[0])
    lowered.paths, lowered.constants, lowered.differentiates = paths, constants, differentiates
    return lowered


def _in_float64(module: nn.Module) -> Any:
    """A copy, to be traced and checked, of which no number is rounded to float32."""
    return _in_type(module, torch.float64)


def _in_type(module: nn.Module, dtype: torch.dtype) -> Any:
    try:
        copy = deepcopy(module).to("cpu", dtype)
    except Exception as error:  # whatever a module that cannot be copied raises
        raise FuseError(
            f"f cannot be copied to be checked: {error} (of torch.nn.utils.weight_norm and spectral_norm use those of"
            " torch.nn.utils.parametrizations)"
        ) from error
    for part in copy.modules():
        for name, x in vars(part).items():
            if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64) and x.dtype != dtype:
                setattr(part, name, x.to("cpu", dtype))
    return copy


def _uses_torch_func(error: BaseException) -> bool:
    """Whether it was raised inside torch.func."""
    folder = str(Path(torch._functorch.__file__).parent)
    names = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith(folder) and Path(name).stem in ("apis", "eager_transforms", "vmap") for name in names)


class _Differentiates(Exception):
    """f calls torch.autograd.grad, which torch.export leaves out of its record."""


class _NoDerivatives(TorchFunctionMode):
    """Raises where f takes a derivative."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.autograd.grad:
            raise _Differentiates
        return function(*args, **(kwargs or {}))


class _Written(nn.Module):
    """f as the operations that it and the derivatives it takes are made of, which torch.export then can trace.

    torch.export knows no derivatives within f, but make_fx records what autograd does, with the batch left open.

    Args:
        called: to be evaluated once, at the examples.
        keeps_places: whether what records it is told where in f an operation stands.
    """

    def __init__(
        self,
        called: nn.Module,
        time: Tensor,
        examples: tuple[Tensor, ...],
        batched: bool,
        keeps_places: bool = False,
    ) -> None:
        super().__init__()
        self.keeps_places = keeps_places
        for name, child in called.named_children():
            self.add_module(name, child)
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

        def fake(x: Tensor, open_batch: bool = False) -> Tensor:
            sizes = [DimDynamic.STATIC] * x.dim()
            if open_batch:
                sizes[0] = DimDynamic.DUCK  # the same for all that have it
            return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

        def call(tensors: dict[str, Tensor], t: Tensor, y: tuple[Tensor, ...]) -> Any:
            return torch.func.functional_call(called, tensors, (t, y))

        tensors = {name: fake(x) for name, x in self._tensors().items()}
        with mode:
            graph = make_fx(call, _allow_non_fake_inputs=True, record_stack_traces=True)(
                tensors, fake(time), tuple(fake(x, batched) for x in examples)
            )
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.ones_like.default):
            value = node.meta["val"]
            if all(isinstance(size, int) for size in value.shape):  # of a sum whose derivative f takes
                with graph.graph.inserting_before(node):
                    ones = graph.graph.call_function(
                        torch.ops.aten.ones.default,
                        (list(value.shape),),
                        {"dtype": value.dtype, "device": value.device},
                    )
                node.replace_all_uses_with(ones)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        self.__dict__["_graph"] = graph  # whose constants are no buffers

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> Any:
        graph = self.__dict__["_graph"]
        if torch._C._get_tracing_state() is not None:
            return _Sized(graph).run(self._tensors(), t, y)
        if not self.keeps_places:
            return graph(self._tensors(), t, y)
        with preserve_node_meta():
            return Interpreter(graph).run(self._tensors(), t, y)


class _Sized(Interpreter):
    """Runs a graph for torch.jit.trace, which keeps the sizes of methods of tensors, and takes others for numbers."""

    def run_node(self, n: Any) -> Any:
        self.sized = any(isinstance(x.meta.get("val"), torch.SymInt) for x in n.all_input_nodes)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.sym_size.int:
            return args[0].size(args[1])
        if self.sized and isinstance(target, torch._ops.OpOverload):
            owner = Tensor if isinstance(args[0], Tensor) else torch
            target = getattr(owner, target.overloadpacket.__name__, target)
        return super().call_function(target, args, kwargs)


class _Widened(TorchFunctionMode):
    """Where float64 meets float32, such as a constant that f finds elsewhere, that becomes float64 too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {x.dtype for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        name = getattr(function, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if {torch.float32, torch.float64} <= kinds and not in_place:
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.double() if x.dtype == torch.float32 else x, (args, kwargs or {})
            )
        return function(*args, **(kwargs or {}))


@contextmanager
def _computing_in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def _example(x: Tensor, batched: bool) -> Tensor:
    """A state like ``x`` of another batch, so that nothing that is traced can take its size for granted."""
    if x.numel() == 0:
        raise FuseError(f"y0 must hold at least one sample of at least one element, got shape {list(x.shape)}")
    if not batched:
        return x.clone()
    return x[:1].expand(3, *x.shape[1:]).clone()


def _decompositions() -> Any:
    """PyTorch's, but for layers that the program has as they are."""
    table = torch.export.default_decompositions()
    for target in RULES:
        table.pop(target, None)
    return table


def _refuse_closures(f: Callable[..., Any]) -> None:
    """Raise FuseError where a function uses weights that it does not own."""
    if isinstance(f, nn.Module) or isinstance(getattr(f, "__self__", None), nn.Module):
        return
    cells = [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]
    code = getattr(f, "__code__", None)
    names = code.co_names if code is not None else ()
    used = [*cells, *(f.__globals__[name] for name in names if name in getattr(f, "__globals__", {}))]
    for x in used:
        if isinstance(x, nn.Module) and any(isinstance(m, MODAL) for m in x.modules()):
            raise FuseError(
                f"f is a function that uses a {type(x).__name__} it does not own, whose mode may change unseen: make f"
                " an nn.Module that has it as an attribute"
            )
        if isinstance(x, nn.Module) and next(x.parameters(), None) is None:
            continue
        if isinstance(x, nn.Module) or (isinstance(x, Tensor) and x.requires_grad):
            raise FuseError(
                f"f is a function that uses a {type(x).__name__} it does not own, whose weights would be frozen: make f"
                " an nn.Module that has it as an attribute"
            )


def _check(made: Fused, tensors: tuple[Tensor, ...]) -> None:
    """Raise FuseError unless one Euler step of the program is f, in values and gradients, in float64.

    With h = 1 from t, y₁ − y₀ = f(t, y₀), and a cotangent w of y₁ gives y₀ the gradient w + Jᵀw, t + h the gradient
    w · f and t, −w · f + w · ∂f/∂t.
    """
    copy = _in_float64(made)
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    batch = 5 if made._batched else 1
    points = []
    for x in tensors:
        around = x.detach().double().cpu()
        if made._batched:
            rows = torch.arange(batch) % around.shape[0]
            around = around[rows]
        points.append((around + 0.1 * noise(around)).requires_grad_())
    t = torch.tensor([0.3, 1.3], dtype=torch.float64, requires_grad=True)
    y0: Any = tuple(points) if made._tuple else points[0]
    with _computing_in_float64():
        weights = copy.weights_for(y0)
        with recorded(copy) as reads:
            slopes = copy(t[0], y0)
    if isinstance(weights, str):
        raise FuseError(f"f cannot be checked against its program: {weights}")
    own = [x for x in copy.parameters() if x.requires_grad]
    ys = copy.unpack(
        program_op.solve(
            copy.program, weights, copy.pack(y0), t, [1], METHODS["euler"], "discrete", 1e-12, 10, None, 1e-6
        )[0]
    )
    ends = [y[1] for y in ys] if isinstance(ys, tuple) else [ys[1]]
    slopes = list(slopes) if made._tuple else [slopes]
    cotangents = [noise(x) for x in slopes]
    for end, start, slope in zip(ends, points, slopes):
        _compare("values", [end - start], [slope], SAME_VALUES, float(start.detach().abs().max()))
    inputs = [*points, t, *own]
    if any(not x.is_floating_point() for x in slopes):
        raise FuseError(f"f must return floating-point tensors, got {[str(x.dtype) for x in slopes]}")
    loss = torch.stack([(w * y).sum() for w, y in zip(cotangents, ends)]).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    with torch.enable_grad():
        along = torch.stack([(w * s).sum() for w, s in zip(cotangents, slopes)]).sum()
    wanted: list[Tensor | None] = [None] * len(inputs)
    if any(x not in owned for owned in [set(inputs)] for x in leaves(along)):
        raise FuseError(
            "f uses a weight that it does not own, as in a list of modules, which would be frozen: make it an"
            " nn.Parameter, or the list an nn.ModuleList or nn.ParameterList"
        )
    if along.requires_grad:
        try:
            wanted = list(torch.autograd.grad(along, inputs, allow_unused=True))
        except RuntimeError as error:
            raise FuseError(f"f cannot be differentiated, so not be checked against its program: {error}") from error
    size = float(along.detach())
    expected = [torch.zeros_like(x) if g is None else g for g, x in zip(wanted, inputs)]
    for k, w in enumerate(cotangents):
        expected[k] = expected[k] + w
    expected[len(points)] = expected[len(points)] + torch.tensor([-size, size], dtype=torch.float64)
    _settle(made, copy, reads, t.detach()[0], tuple(x.detach() for x in points), [x.detach() for x in slopes])
    names = [
        *(f"y0[{k}]" for k in range(len(points))),
        "t",
        *(name for name, x in copy.named_parameters() if x.requires_grad),
    ]
    scale = max(float(x.abs().nan_to_num().max()) for x in expected if x.numel())
    for name, x, y in zip(names, found, expected):
        _compare(f"the gradient of {name}", [torch.zeros_like(y) if x is None else x], [y], SAME_GRADIENTS, scale)


def _settle(
    made: Fused, copy: Fused, recorded: dict[str, set[str]], t: Tensor, points: tuple[Tensor, ...], slopes: list[Tensor]
) -> None:
    """Remember what f reads, without what it only counts.

    Args:
        copy: of ``made``, in float64, whose f has been evaluated once.
        recorded: the names of what that has read.
        t, points, slopes: where, and what it gave.

    Raises:
        FuseError: f is another in its second call, where no gradient is recorded or in float32, or reads what it
            changes itself.
    """

    def value(f: Fused, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        start = tuple(x.to(dtype) for x in points)
        out = f(t.to(dtype), start if made._tuple else start[0])
        return [x.detach().double() for x in (out if made._tuple else [out])]

    def compare(found: list[Tensor], why: str, tolerance: float = SAME_VALUES) -> None:
        for x, y in zip(found, slopes):
            finite = torch.isfinite(x) & torch.isfinite(y)
            scale = float(y[finite].abs().max()) if finite.any() else 0.0
            if finite.any() and float((x - y)[finite].abs().max()) > tolerance * max(scale, 1e-300):
                raise FuseError(f"f is another {why}: solve it without fuse")

    with _computing_in_float64():
        pristine = _in_float64(made)
        before = Reads(pristine, recorded).values
        compare(value(copy), "in its second call, as it changes what it reads (random numbers, a counter, a list)")
        with torch.no_grad():
            compare(value(copy), "where no gradients are recorded")
        now = Reads(copy, recorded).values
        for path, names in recorded.items():
            for name in sorted(names):
                where = f"{path}.{name}" if path else name
                if name == "training" and not _minds_its_mode(copy, path, lambda: compare(value(copy), "")):
                    names.discard(name)
                elif where in before and before[where] != now.get(where):
                    names.discard(name)
                    module = copy.get_submodule(path)
                    count = module.__dict__.get(name)
                    if isinstance(count, (int, float)):
                        setattr(module, name, not count if isinstance(count, bool) else count + 1000)
                        compare(value(copy), f"when {where.removeprefix('func.')}, which it changes itself, is")
    in_float32: list[Tensor] = []
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError):  # of an f that takes no float32
        in_float32 = value(_in_type(made, torch.float32), torch.float32)
    compare(in_float32, "in float32 than in float64", SAME_IN_FLOAT32)
    made._reads = {path: tuple(sorted(names)) for path, names in recorded.items() if names}
    made._values = Reads(made, made._reads).values


def _minds_its_mode(copy: Fused, path: str, compare: Callable[[], None]) -> bool:
    """Whether f is another if its module at ``path`` trains that did not, or the other way round.

    Args:
        compare: f with what it was; raises FuseError if it differs.
    """
    module = copy.get_submodule(path)
    buffers = [(x, x._version) for x in copy.buffers()]
    module.training = not module.training
    try:
        with torch.no_grad():
            compare()
    except Exception:  # whatever a layer raises in a mode it was not made for
        return True
    finally:
        module.training = not module.training
    return any(x._version != version for x, version in buffers)


def _compare(what: str, found: list[Tensor], expected: list[Tensor], tolerance: float, scale: float) -> None:
    for x, y in zip(found, expected):
        x, y = x.detach(), y.detach()
        finite = torch.isfinite(y)
        largest = max(scale, float(y[finite].abs().max()) if finite.any() else 0.0, 1e-300)
        same = bool((torch.isfinite(x) == finite).all())
        error = float((x - y)[finite].abs().max()) / largest if same and finite.any() else 0.0
        if not same or not error <= tolerance:
            raise FuseError(
                f"the program does not compute what f does: {what} differ by {error:.1e} (relative; tolerance"
                f" {tolerance:.0e}) at a random point near y0: f may depend on other samples, on chance, or detach what"
                " it is differentiated by; solve it without fuse"
            )
