"""ONNX graphs made simple: scans as their steps one after the other, constants folded, nothing dead, nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

#: Results of at most as many elements are folded; larger ones, such as a map for each step, are cheaper to compute once
#: when a runtime loads the file than to store.
MOST_FOLDED = 512
#: Operations that a scan is written out to at most.
MOST_NODES = 5000
#: Never folded, since it makes much of little.
COSTLY = {"Conv"}
#: Operations whose result is not decided by their inputs.
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, those of loops too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from nodes(body)


def simplify(graph: onnx.GraphProto, unroll: bool) -> None:
    """Write scans out if ``unroll``, fold what is constant, and leave each computation once and only if it is used."""
    _name_constants(graph)
    _fold(graph)
    _constant_shapes(graph)
    if unroll:
        _unroll(graph)
    _fold(graph)
    _merge_factors(graph)
    _plain_for_tools(graph)
    _share(graph)
    drop_unused(graph)
    _shorten(graph)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g


def _outer(graph: onnx.GraphProto) -> set[str]:
    """Names that a body takes from around it."""
    own = {x.name for x in (*graph.input, *graph.initializer)} | {name for node in graph.node for name in node.output}
    used = {x.name for x in graph.output}
    for node in graph.node:
        used.update(_inputs(node))
    return used - own


def _inputs(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, in its bodies too."""
    return {name for name in node.input if name}.union(*(_outer(body) for body in bodies(node)))


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let a node and its bodies read and write by other names."""
    for field in (node.input, node.output):
        for i, name in enumerate(field):
            if name in names:
                field[i] = names[name]
    for body in bodies(node):
        for inner in body.node:
            _rename(inner, names)
        for value in (*body.input, *body.output, *body.initializer):
            value.name = names.get(value.name, value.name)


def _names_within(graph: onnx.GraphProto) -> Iterator[str]:
    """All names that a graph and its bodies define."""
    yield from (x.name for x in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from (name for name in node.output if name)
        for body in bodies(node):
            yield from _names_within(body)


def _name_constants(graph: onnx.GraphProto) -> None:
    """Constants as initializers of the whole graph, in whose bodies they are known too."""

    def move(within: onnx.GraphProto) -> None:
        kept = []
        for node in within.node:
            value = next((x.t for x in node.attribute if x.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                graph.initializer.add().CopyFrom(value)
                graph.initializer[-1].name = node.output[0]
                continue
            for body in bodies(node):
                move(body)
            kept.append(node)
        if within is not graph:
            graph.initializer.extend(within.initializer)
            del within.initializer[:]
        replace_nodes(within, kept)

    move(graph)


def replace_nodes(graph: onnx.GraphProto, kept: list[onnx.NodeProto]) -> None:
    copies = []
    for node in kept:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _constant_shapes(graph: onnx.GraphProto) -> None:
    """The shape that a tensor is given is a constant where it is known but for one size, mostly the batch."""
    known: dict[str, list[int]] = {}

    def collect(within: onnx.GraphProto) -> None:
        for value in (*within.value_info, *within.input, *within.output):
            if value.type.tensor_type.HasField("shape"):
                sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
                if sizes.count(-1) <= 1 and 0 not in sizes:
                    known[value.name] = sizes
        for node in within.node:
            for body in bodies(node):
                collect(body)

    collect(graph)
    constants = {x.name: x for x in graph.initializer}
    measured: dict[str, str] = {}  # what nodes tell the shape of
    made: set[str] = set()
    for node in nodes(graph):
        if node.op_type == "Shape":
            measured[node.output[0]] = node.input[0]
        if node.op_type == "Reshape":
            sizes = known.get(node.output[0], known.get(measured.get(node.input[1], "")))
            if sizes is not None:
                known[node.output[0]] = sizes
                name = "shape/" + "x".join(map(str, sizes))
                if name not in made:
                    graph.initializer.append(numpy_helper.from_array(np.array(sizes), name))
                    made.add(name)
                node.input[1] = name
        # A factor of one or a shift of zero, such as of a normalisation without weights.
        neutral = {"Mul": 1.0, "Add": 0.0}.get(node.op_type)
        if neutral is not None and node.input[0] in known and node.input[1] in constants:
            value, sizes = numpy_helper.to_array(constants[node.input[1]]), known[node.input[0]]
            widens = value.ndim > len(sizes) or any(n not in (1, m) for n, m in zip(value.shape[::-1], sizes[::-1]))
            if not widens and bool((value == neutral).all()):
                known[node.output[0]] = sizes
                del node.input[1]
                node.op_type = "Identity"


def _unroll(graph: onnx.GraphProto) -> None:
    """Each scan over constants as its steps one after the other, if that does not take a browser minutes to load.

    onnxruntime lays out data for convolutions outside of loops only.
    """
    constants = {x.name: x for x in graph.initializer}
    read = set().union(*map(_inputs, graph.node)) | {x.name for x in graph.output}
    result: list[onnx.NodeProto] = []
    number = 0
    for node in graph.node:
        count = next((x.i for x in node.attribute if x.name == "num_scan_inputs"), 0)
        over = list(node.input)[len(node.input) - count :]
        if node.op_type != "Scan" or not count or not all(name in constants for name in over):
            result.append(node)
            continue
        (body,) = bodies(node)
        length = len(numpy_helper.to_array(constants[over[0]]))
        if length * sum(1 for _ in nodes(body)) > MOST_NODES:
            _drop_unread(node, read)
            result.append(node)
            continue
        result += _steps(graph, node, [numpy_helper.to_array(constants[name]) for name in over], f"solve{number}")
        number += 1
    replace_nodes(graph, result)


def _drop_unread(scan: onnx.NodeProto, read: set[str]) -> None:
    """Let a scan not collect what nobody reads."""
    (body,) = bodies(scan)
    carried = len(body.input) - next(x.i for x in scan.attribute if x.name == "num_scan_inputs")
    for i in reversed(range(carried, len(scan.output))):
        if scan.output[i] not in read:
            del scan.output[i], body.output[i]
            for attribute in scan.attribute:
                if attribute.name in ("scan_output_axes", "scan_output_directions") and attribute.ints:
                    del attribute.ints[i - carried]


def _steps(graph: onnx.GraphProto, scan: onnx.NodeProto, over: list[NDArray[Any]], prefix: str) -> list[onnx.NodeProto]:
    (body,) = bodies(scan)
    carried = len(scan.input) - len(over)
    state, result = list(scan.input)[:carried], list[onnx.NodeProto]()
    given = [x.name for x in body.input]
    found = [x.name for x in body.output]
    own = set(_names_within(body)) - set(given)
    stacked: list[list[str]] = [[] for _ in found[carried:]]
    axis = f"{prefix}/axis"
    graph.initializer.append(numpy_helper.from_array(np.array([0]), axis))
    for k in range(len(over[0])):
        names = {name: f"{prefix}/{k}/{name}" for name in own}
        for name, values in zip(given[carried:], over):
            names[name] = f"{prefix}/{k}/{name}"
            graph.initializer.append(numpy_helper.from_array(values[k], names[name]))
        names.update(zip(given, state))
        for original in body.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            node.name = f"{prefix}/{k}/{original.name}"
            _rename(node, names)
            result.append(node)
        state = [names.get(name, name) for name in found[:carried]]
        for parts, name in zip(stacked, found[carried:]):
            parts.append(f"{prefix}/{k}/stack/{name}")
            result.append(helper.make_node("Unsqueeze", [names.get(name, name), axis], [parts[-1]]))
    for output, name in zip(scan.output, state):
        if output:
            result.append(helper.make_node("Identity", [name], [output]))
    for output, parts in zip(list(scan.output)[carried:], stacked):
        if output:
            result.append(helper.make_node("Concat", parts, [output], axis=0))
    return result


def _fold(graph: onnx.GraphProto) -> None:
    """Compute what depends on constants alone; take out what passes its input on."""
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    for value in graph.input:  # an initializer that may be given is no constant
        constants.pop(value.name, None)
    outputs = {x.name for x in graph.output}
    made: dict[str, NDArray[Any]] = {}
    _fold_within(graph, constants, made, outputs, {})
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())


def _fold_within(
    graph: onnx.GraphProto,
    constants: dict[str, NDArray[Any]],
    made: dict[str, NDArray[Any]],
    outputs: set[str],
    names: dict[str, str],
) -> None:
    """Of a graph or a body, whose constants become those of the whole graph."""
    producers: dict[str, onnx.NodeProto] = {}
    kept = []
    for node in graph.node:
        _rename(node, names)
        _reshape_once(node, constants, producers)
        passed = _passed_on(node, constants, producers)
        if passed is not None and node.output[0] not in outputs:
            names[node.output[0]] = passed
            continue
        values = _folded(node, constants) if node.output[0] not in outputs else None
        if values is not None:
            made.update(values)
            constants.update(values)
            continue
        for body in bodies(node):
            _fold_within(body, constants, made, {x.name for x in body.output}, dict(names))
        producers.update(dict.fromkeys(node.output, node))
        kept.append(node)
    replace_nodes(graph, kept)


def _reshape_once(
    node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]], producers: Mapping[str, onnx.NodeProto]
) -> None:
    """Let a node not reshape what was reshaped, if it says all sizes."""
    before = producers.get(node.input[0]) if node.op_type == "Reshape" else None
    if before is not None and before.op_type == "Reshape" and 0 not in constants.get(node.input[1], (0,)):
        node.input[0] = before.input[0]


def _passed_on(
    node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]], producers: Mapping[str, onnx.NodeProto]
) -> str | None:
    """The name of a value that a node only hands on."""
    if node.op_type == "Identity":
        return str(node.input[0])
    if node.op_type == "Gather" and node.input[1] in constants and node.input[0] in producers:
        # One element of what was stacked for it.
        whole, index = producers[node.input[0]], constants[node.input[1]]
        if whole.op_type == "Concat" and index.ndim == 0 and _axis(whole) == _axis(node) == 0:
            parts = [producers.get(name) for name in whole.input]
            if all(x is not None and x.op_type == "Unsqueeze" and constants[x.input[1]].tolist() == [0] for x in parts):
                part = parts[int(index)]
                assert part is not None
                return str(part.input[0])
    return None


def _axis(node: onnx.NodeProto) -> int:
    return next((int(x.i) for x in node.attribute if x.name == "axis"), 0)


def _folded(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    """The outputs of a node whose inputs are constants, if they are small."""
    if node.domain or node.op_type in RANDOM | COSTLY or next(bodies(node), None) is not None:
        return None
    inputs = [name for name in node.input if name]
    if not inputs or not all(name in constants for name in inputs):
        return None
    if node.op_type in ("Expand", "ConstantOfShape"):
        shape = constants[inputs[-1]]
        if np.prod(shape) > MOST_FOLDED:
            return None
    elif max(constants[name].size for name in inputs) > MOST_FOLDED:
        return None
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    values = ReferenceEvaluator(alone).run(None, {name: constants[name] for name in inputs})
    values = [np.asarray(value) for value in values]
    if sum(value.size for value in values) > MOST_FOLDED:
        return None
    return {name: value for name, value in zip(node.output, values) if name}


def _merge_factors(graph: onnx.GraphProto) -> None:
    """(x a + b) h as x (a h) + b h, for constants a, b and h."""
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    for value in graph.input:
        constants.pop(value.name, None)
    made: dict[str, NDArray[Any]] = {}

    def within(graph: onnx.GraphProto) -> None:
        producers = {name: node for node in graph.node for name in node.output}
        uses = Counter(name for node in graph.node for name in _inputs(node))
        uses.update(x.name for x in graph.output)

        def scaled(node: onnx.NodeProto, h: NDArray[Any]) -> bool:
            """Multiply what an addition to a product gives, or the product, if nobody else reads it."""
            if node.op_type not in ("Mul", "Add") or len(node.input) != 2 or node.input[1] not in constants:
                return False
            if any(uses[name] != 1 for name in node.output):
                return False
            old = constants[node.input[1]]
            if old.size > MOST_FOLDED or old.dtype != h.dtype:
                return False
            if node.op_type == "Add" and not (node.input[0] in producers and scaled(producers[node.input[0]], h)):
                return False
            name = f"{node.input[1]}*{node.output[0]}"
            made[name] = constants[name] = old * h
            node.input[1] = name
            return True

        for node in graph.node:
            for body in bodies(node):
                within(body)
            if node.op_type == "Mul" and node.input[1] in constants and constants[node.input[1]].ndim == 0:
                before = producers.get(node.input[0])
                if before is not None and scaled(before, constants[node.input[1]]):
                    del node.input[1]
                    node.op_type = "Identity"

    within(graph)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
    _fold(graph)


def _plain_for_tools(graph: onnx.GraphProto) -> None:
    """Write what onnxruntime's tools that infer shapes, as its quantizer does, do not take in another way.

    These are loops without a limit, and the largest of a map over its places, for which a pool stands where the map is
    of a ReLU: others may be of a type that pools do not take, or hold what they take for nothing, as -inf.
    """
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    endless = "loop/endless"

    def within(graph: onnx.GraphProto) -> None:
        kept: list[onnx.NodeProto] = []
        positive = {node.output[0] for node in graph.node if node.op_type == "Relu"}
        for node in graph.node:
            for body in bodies(node):
                within(body)
            if node.op_type == "Loop" and not node.input[0]:
                constants[endless] = np.array(np.iinfo(np.int64).max)
                node.input[0] = endless
            kept.append(node)
            keeps = next((x.i for x in node.attribute if x.name == "keepdims"), 1)
            if node.op_type == "ReduceMax" and node.input[0] in positive and node.input[-1] in constants:
                axes = constants[node.input[-1]].tolist()
                if sorted(axes) == [2, 3] and floats.get(node.output[0]) == (4 if keeps else 2):
                    result = node.output[0]
                    pooled = result if keeps else f"{result}/map"
                    kept[-1] = helper.make_node("GlobalMaxPool", [node.input[0]], [pooled])
                    if not keeps:
                        kept.append(helper.make_node("Flatten", [pooled], [result], axis=1))
        replace_nodes(graph, kept)

    floats = _floats(graph)
    within(graph)
    if endless in constants:
        graph.initializer.append(numpy_helper.from_array(constants[endless], endless))


def _floats(graph: onnx.GraphProto) -> dict[str, int]:
    """How many dimensions values of 32-bit floating point have, as far as it is said."""
    found: dict[str, int] = {}
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and kind.elem_type == onnx.TensorProto.FLOAT:
            found[value.name] = len(kind.shape.dim)
    for node in graph.node:
        for body in bodies(node):
            found |= _floats(body)
    return found


def _share(graph: onnx.GraphProto) -> None:
    """Equal constants and equal computations once."""
    names: dict[str, str] = {}
    given = {x.name for x in graph.input}
    seen: dict[Any, str] = {}
    kept_constants = []
    for x in graph.initializer:
        value = numpy_helper.to_array(x)
        key = (value.dtype.str, value.shape, value.tobytes())
        if x.name not in given and key in seen:
            names[x.name] = seen[key]
            continue
        if x.name not in given:
            seen[key] = x.name
        kept_constants.append(onnx.TensorProto.FromString(x.SerializeToString()))
    del graph.initializer[:]
    graph.initializer.extend(kept_constants)
    outputs = {x.name for x in graph.output}
    computed: dict[bytes, list[str]] = {}
    kept = []
    for node in graph.node:
        _rename(node, names)
        if next(bodies(node), None) is None and node.op_type not in RANDOM and not outputs.intersection(node.output):
            key_node = onnx.NodeProto()
            key_node.CopyFrom(node)
            key_node.ClearField("name")
            key_node.ClearField("doc_string")
            del key_node.metadata_props[:], key_node.output[:]
            key = key_node.SerializeToString(deterministic=True)
            if key in computed and len(computed[key]) == len(node.output):
                names.update(zip(node.output, computed[key]))
                continue
            computed[key] = list(node.output)
        kept.append(node)
    replace_nodes(graph, kept)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Leave out what no output needs."""
    for node in graph.node:
        for body in bodies(node):
            drop_unused(body)
    needed = Counter(x.name for x in graph.output)
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(needed[name] for name in node.output if name):
            kept.insert(0, node)
            needed.update(_inputs(node))
    replace_nodes(graph, kept)
    given = {x.name for x in graph.input}
    initializers = [
        onnx.TensorProto.FromString(x.SerializeToString())
        for x in graph.initializer
        if needed[x.name] or x.name in given
    ]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _shorten(graph: onnx.GraphProto) -> None:
    """Give what is computed short names, of which a file has thousands, and constants made here plain ones."""
    kept = {x.name for x in (*graph.input, *graph.output, *graph.initializer)}

    def free(letter: str) -> Iterator[str]:
        return (name for i in count() if (name := f"{letter}{i}") not in kept)

    short, plain = free("v"), free("c")
    names: dict[str, str] = {}
    for name in _names_within(graph):
        if name not in kept and name not in names:
            names[name] = next(short)
    for i, node in enumerate(nodes(graph)):
        node.name = f"n{i}"
    for node in graph.node:
        _rename(node, names)
    constants = {x.name: next(plain) for x in graph.initializer if "/" in x.name}
    for node in graph.node:
        _rename(node, constants)
    for x in graph.initializer:
        x.name = constants.get(x.name, x.name)


def tidy(graph: onnx.GraphProto, rename: Callable[[str], str]) -> None:
    """Take out what runs nothing, such as lines of Python, and call open sizes by other names."""
    del graph.value_info[:], graph.metadata_props[:]
    for x in (*graph.input, *graph.output, *graph.initializer):
        del x.metadata_props[:]
    for node in nodes(graph):
        node.ClearField("doc_string")
        del node.metadata_props[:]
        for body in bodies(node):
            del body.value_info[:], body.metadata_props[:]
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = rename(dimension.dim_param)
