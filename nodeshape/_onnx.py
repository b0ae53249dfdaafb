"""ONNX of an unrolled classifier: stem, one step and head are exported once, and the step is repeated in the graph.

Exporting the whole unrolled classifier gives the same graph, but takes the exporter minutes where an implicit method
has a hundred steps.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from nodeshape._unrolled import UnrolledClassifier

#: The oldest opset the exporter writes, so that as many runtimes as possible read it.
OPSET = 18
IR_VERSION = 10


def to_onnx(
    model: UnrolledClassifier, image_shape: Sequence[int], metadata: Mapping[str, str], trajectory: bool
) -> onnx.ModelProto:
    """The classifier as an ONNX model, ``image`` to ``logits``, with the batch size left open.

    Args:
        model: in evaluation mode.
        image_shape: ``(channels, height, width)``.
        metadata: the model's ``metadata_props``.
        trajectory: also give the states ``[batch, steps + 1, channels, height, width]``.
    """
    image = torch.rand(2, *image_shape)
    with torch.no_grad():
        state = model.stem(image)
        classes = model.head(state).shape[1]
    graph = _Graph()
    (y,) = graph.add(graph.share(_export(model.stem, image), "stem"), "stem", ["image"])
    step = graph.share(_export(model.step, state, torch.zeros_like(state), model.times[0]), "step")
    # The first predictor is the state itself; an explicit step has none.
    slope = graph.constant("no_slope", torch.tensor(0.0)) if model.step.c else ""
    states = [y]
    for k in range(model.steps):
        t = graph.constant(f"t{k}", model.times[k])
        y, slope = graph.add(step, f"step{k}", [y, slope, t])
        states.append(y)
    (logits,) = graph.add(graph.share(_export(model.head, state), "head"), "head", [y])
    graph.node("Identity", [logits], "logits")
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])]
    if trajectory:
        axis = graph.constant("time_axis", torch.tensor([1]))
        slices = [graph.node("Unsqueeze", [y, axis], f"state{k}") for k, y in enumerate(states)]
        graph.node("Concat", slices, "trajectory", axis=1)
        shape = ["batch", model.steps + 1, *state.shape[1:]]
        outputs.append(helper.make_tensor_value_info("trajectory", TensorProto.FLOAT, shape))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *image_shape])]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "nodeshape", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="nodeshape",
        producer_version=metadata.get("nodeshape_version", ""),
    )
    helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    return proto


class _Graph:
    """A graph under construction: nodes in order, and initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Tensor) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(value.numpy(), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def share(self, piece: onnx.GraphProto, name: str) -> onnx.GraphProto:
        """Take over the initializers of a piece, under names of their own, for any number of copies of its nodes."""
        names = {tensor.name: f"{name}.{tensor.name}" for tensor in piece.initializer}
        for tensor in piece.initializer:
            tensor.name = names[tensor.name]
            self.initializers.append(tensor)
        for node in piece.node:
            node.input[:] = [names.get(x, x) for x in node.input]
        return piece

    def add(self, piece: onnx.GraphProto, prefix: str, inputs: Sequence[str]) -> list[str]:
        """Append a copy of a piece's nodes, fed with ``inputs``; return the names of its outputs."""
        names = dict(zip((x.name for x in piece.input), inputs, strict=True))
        names.update((output, f"{prefix}/{output}") for node in piece.node for output in node.output if output)
        for original in piece.node:
            node = onnx.NodeProto()
            node.op_type, node.domain, node.name = original.op_type, original.domain, f"{prefix}/{original.name}"
            node.input.extend(names.get(x, x) for x in original.input)
            node.output.extend(names.get(x, x) for x in original.output)
            node.attribute.extend(original.attribute)
            self.nodes.append(node)
        return [names[x.name] for x in piece.output]


def _export(module: nn.Module, *inputs: Tensor) -> onnx.GraphProto:
    """A module as ONNX; the first dimension of inputs that have one is the batch."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if x.dim() else None for x in inputs)
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision's absence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
            )
    finally:
        log.setLevel(level)
    assert program is not None
    graph: onnx.GraphProto = program.model_proto.graph
    return graph
