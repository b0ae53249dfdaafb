"""ONNX of an unrolled classifier: its stem, one step and its head are exported, and the step is repeated in the graph.

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

from nodeshape._exporting.unrolled import UnrolledClassifier

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
    pieces = _export(_Pieces(model), image, state)
    stem, step, head = (_Piece(pieces, *names) for names in PIECES)
    graph = _Graph(list(pieces.initializer))
    (y,) = graph.add(stem, "stem", ["image"])
    # The first predictor is the state itself; an explicit step has none.
    slope = graph.constant("no_slope", torch.tensor(0.0)) if model.step.c else ""
    states = [y]
    for k in range(model.steps):
        t = graph.constant(f"t{k}", model.times[k])
        y, slope = graph.add(step, f"step{k}", [y, slope, t])
        states.append(y)
    (logits,) = graph.add(head, "head", [y])
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


class _Pieces(nn.Module):
    """Stem, step and head side by side, so that one call of the exporter, which costs seconds, does for all."""

    def __init__(self, model: UnrolledClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, y: Tensor, slope: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.model.stem(image), *self.model.step(y, slope, t), self.model.head(y)


#: Inputs and outputs of stem, step and head.
PIECES = ((("image",), ("y0",)), (("y", "slope", "t"), ("y_next", "slope_next")), (("y",), ("logits",)))


class _Piece:
    """The nodes of a graph that lead from ``inputs`` to ``outputs``, in order."""

    def __init__(self, graph: onnx.GraphProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.inputs, self.outputs, self.nodes = inputs, outputs, list[onnx.NodeProto]()
        needed = set(outputs)
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
                self.nodes.insert(0, node)
        assert needed.isdisjoint({x.name for x in graph.input}.difference(inputs))


class _Graph:
    """A graph under construction: nodes in order, and initializers."""

    def __init__(self, initializers: list[onnx.TensorProto]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = initializers

    def constant(self, name: str, value: Tensor) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(value.numpy(), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def add(self, piece: _Piece, prefix: str, inputs: Sequence[str]) -> list[str]:
        """Append a copy of a piece, fed with ``inputs``, its weights shared; return the names of its outputs."""
        names = dict(zip(piece.inputs, inputs, strict=True))
        names.update((output, f"{prefix}/{output}") for node in piece.nodes for output in node.output if output)
        for original in piece.nodes:
            node = onnx.NodeProto()
            node.op_type, node.domain, node.name = original.op_type, original.domain, f"{prefix}/{original.name}"
            node.input.extend(names.get(x, x) for x in original.input)
            node.output.extend(names.get(x, x) for x in original.output)
            node.attribute.extend(original.attribute)
            self.nodes.append(node)
        return [names[x] for x in piece.outputs]


def _export(pieces: _Pieces, image: Tensor, state: Tensor) -> onnx.GraphProto:
    """The pieces as one ONNX graph; the first dimension of images and states is a batch, not the same one."""
    images, states = {0: torch.export.Dim("images")}, {0: torch.export.Dim("states")}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of torchvision's absence
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                pieces,
                (image, state, torch.zeros_like(state), torch.tensor(0.0)),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(images, states, states, None),
                input_names=["image", "y", "slope", "t"],
                output_names=["y0", "y_next", "slope_next", "logits"],
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    graph: onnx.GraphProto = program.model_proto.graph
    return graph
