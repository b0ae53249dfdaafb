"""An exported ONNX file in smaller numbers: 8-bit integers or 16-bit floating point."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nodeshape._errors import UserError
from nodeshape._exporting.graph import bodies, drop_unused, replace_nodes
from nodeshape._exporting.module import open_onnx
from nodeshape._exporting.verify import Classify, classify_all, compare, milliseconds

#: Part of the images that may be classified right no more.
MOST_LOST = 0.005
BATCH = 100
#: Weights of fewer elements stay as they are.
FEW = 16
#: Of the float32 file's time that one image may take; beyond, more than noise says that it is slower.
MOST_TIME = 1.1
#: To which stages are solved in a file of 8-bit integers. Far below it Anderson's method follows the rounding.
STAGE_TOLERANCE = 1e-2
#: The name of a constant.
ZERO = "nodeshape/zero"


def write_int8(source: Path, path: Path, images: Tensor) -> None:
    """Write ``source`` with convolutions and linear layers of 8-bit integers, whose ranges are those on ``images``.

    Of a file with loops, whose bodies onnxruntime's quantizer does not follow, the convolutions alone.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    model = onnx.load(source)
    graph = model.graph
    if _has_loops(graph):
        constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
        _convolve_bytes(graph, graph, constants, _ranges(model, images, path.name))
        drop_unused(graph)
        onnx.save(model, path)
        return
    names = {x.name for x in graph.initializer}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            bar = tqdm(images.split(BATCH), desc=f"{path.name}: ranges", delay=2, disable=None, leave=False)
            self._batches = iter(bar)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"image": batch.numpy()}

    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it recommends what is done already
    try:
        quantize_static(
            source,
            path,
            Reader(),
            op_types_to_quantize=["Conv", "Gemm"],
            nodes_to_exclude=[node.name for node in graph.node if node.op_type == "Conv" and node.input[0] in names],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        log.setLevel(level)


def _ranges(model: onnx.ModelProto, images: Tensor, name: str) -> dict[str, tuple[float, float]]:
    """Between what the inputs and outputs of a file's convolutions lie on images, and 0."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), ZERO))
    extremes = _watch(watched.graph, {x.name for x in model.graph.initializer})
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, []) for x in extremes)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges: dict[str, tuple[float, float]] = {}
    for batch in tqdm(images.split(BATCH), desc=f"{name}: ranges", delay=2, disable=None, leave=False):
        for value, (tensor, _) in zip(session.run(list(extremes), {"image": batch.numpy()}), extremes.values()):
            low, high = ranges.get(tensor, (0.0, 0.0))
            ranges[tensor] = min(low, float(value)), max(high, float(value))
    return ranges


def _watch(graph: onnx.GraphProto, constants: set[str]) -> dict[str, tuple[str, str]]:
    """Let a graph and its loops compute the extremes of what convolutions take and give.

    Returns:
        for each extreme the tensor that it is of, and the operation that finds it.
    """
    make, extremes = onnx.helper.make_node, dict[str, tuple[str, str]]()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Conv" and node.input[0] not in constants:
            for tensor in (node.input[0], node.output[0]):
                for operation in ("ReduceMin", "ReduceMax"):
                    found = f"{node.name}/{tensor}/{operation}"
                    nodes.append(make(operation, [tensor], [found], keepdims=0))
                    extremes[found] = tensor, operation
        for body in bodies(node):
            for inner, (tensor, operation) in _watch(body, constants).items():
                found, each = f"{node.name}/{inner}", f"{node.name}/{inner}/each"
                body.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, []))
                node.output.append(each)
                for attribute in node.attribute:
                    if attribute.name in ("scan_output_axes", "scan_output_directions"):
                        attribute.ints.append(0)
                # A loop may end before it begins.
                nodes.append(make("Concat", [ZERO, each], [f"{each}+0"], axis=0))
                nodes.append(make(operation, [f"{each}+0"], [found], keepdims=0))
                extremes[found] = tensor, operation
    replace_nodes(graph, nodes)
    return extremes


def _convolve_bytes(
    graph: onnx.GraphProto,
    whole: onnx.GraphProto,
    constants: Mapping[str, NDArray[Any]],
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Let the convolutions of a graph and its loops take, multiply and give bytes; what is between them stays.

    Constants become those of the ``whole`` graph. A runtime joins each convolution with the conversions around it.
    """
    nodes: list[onnx.NodeProto] = []
    known = {x.name for x in whole.initializer}

    def constant(name: str, value: Any) -> str:
        if name not in known:
            known.add(name)
            whole.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def convert(operation: str, values: str, scale: str, zero: str, result: str) -> str:
        nodes.append(onnx.helper.make_node(operation, [values, scale, zero], [result], axis=0))
        return result

    def rounded(tensor: str, result: str) -> Any:
        """Give a tensor as what bytes can hold; what one of them is worth."""
        low, high = ranges[tensor]
        worth = np.float32(max((high - low) / 255, 1e-12))
        scale = constant(f"{tensor}/scale", worth)
        zero = constant(f"{tensor}/zero", np.uint8(min(255, round(-low / float(worth)))))
        given = f"{tensor}/float" if result == tensor else tensor
        convert(
            "DequantizeLinear", convert("QuantizeLinear", given, scale, zero, f"{result}/byte"), scale, zero, result
        )
        return worth

    for node in graph.node:
        for body in bodies(node):
            _convolve_bytes(body, whole, constants, ranges)
        if node.op_type != "Conv" or node.input[0] in constants or node.input[1] not in constants:
            nodes.append(node)
            continue
        image, weight, result = node.input[0], node.input[1], node.output[0]
        if ranges[image] == (0.0, 0.0) or ranges[result] == (0.0, 0.0):  # of a loop that no image has entered
            nodes.append(node)
            continue
        worth = rounded(image, f"{node.name}/image")
        values = constants[weight]
        scales = np.maximum(np.abs(values).reshape(len(values), -1).max(axis=1) / 127, 1e-12)
        if len(node.input) > 2:  # whose whole numbers have 32 bits
            scales = np.maximum(scales, np.abs(constants[node.input[2]]) / (worth * 2.0**30))
        scales = scales.astype(np.float32)
        whole_numbers = np.rint(values / scales.reshape(-1, 1, 1, 1)).astype(np.int8)
        scale = constant(f"{weight}/scale", scales)
        zero = constant(f"{weight}/zero", np.zeros(len(values), np.int8))
        bytes_of = constant(f"{weight}/byte", whole_numbers)
        inputs = [f"{node.name}/image", convert("DequantizeLinear", bytes_of, scale, zero, f"{node.name}/weight")]
        if len(node.input) > 2:
            bias = constants[node.input[2]] / (worth * scales)
            scale = constant(f"{node.name}/bias/scale", worth * scales)
            zero = constant(f"{node.name}/bias/zero", np.zeros(len(values), np.int32))
            bytes_of = constant(f"{node.name}/bias/whole", np.rint(bias).astype(np.int32))
            inputs.append(convert("DequantizeLinear", bytes_of, scale, zero, f"{node.name}/bias"))
        new = onnx.helper.make_node("Conv", inputs, [f"{result}/float"], node.name)
        new.attribute.extend(node.attribute)
        nodes.append(new)
        rounded(result, result)
    replace_nodes(graph, nodes)


def write_half(source: Path, path: Path) -> None:
    """Write ``source`` in 16-bit floating point, with inputs and outputs of 32 bits.

    Of a file with loops, whose bodies converters do not follow, the weights alone, which are computed with in 32 bits.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    if _has_loops(model.graph):
        _halve_weights(model.graph)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that round to nothing
            model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, path)


def _has_loops(graph: onnx.GraphProto) -> bool:
    return any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)


def _halve_weights(graph: onnx.GraphProto) -> None:
    casts = []
    for weight in graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < FEW or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = f"{weight.name}.half"
        casts.append(onnx.helper.make_node("Cast", [name], [weight.name], to=onnx.TensorProto.FLOAT))
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), name))
    first = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(first)


def judge(path: Path, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, Any]:
    """Compare a file with the float32 file's logits ``reference``; figures for the report.

    Args:
        labels: of the images, -1 where no right class is known.

    Raises:
        UserError: the file classifies fewer images right, by more than ``MOST_LOST`` of those whose class is known; or
            more than that are of another class than by the float32 file, where the class of few is known.
    """
    logits = logits_of(path, images)
    agreement, known = compare(logits, reference), labels >= 0
    ours, theirs = (int((x.argmax(dim=1) == labels)[known].sum()) for x in (logits, reference))
    count, lost, what = int(known.sum()), theirs - ours, "classifies {} of {} images right no more"
    if 2 * count < len(images):
        count, lost = agreement.images, agreement.images - agreement.same_class
        what = "gives {} of {} images another class than the float32 file"
    if not lost <= MOST_LOST * count or not agreement.max_difference < float("inf"):
        raise UserError(
            f"{path.name} {what.format(lost, count)}, more than {MOST_LOST:.1%}; nothing was written: leave out"
            f" --{'quantize' if 'int8' in path.name else 'half'}"
        )
    labelled = int(known.sum())
    accuracy = {"accuracy": ours / labelled, "float32_accuracy": theirs / labelled} if labelled else {}
    return {
        "bytes": path.stat().st_size,
        "images": agreement.images,
        "max_difference": agreement.max_difference,
        "same_class": agreement.same_class,
        "ties": agreement.ties,
        **accuracy,
    }


def judge_time(path: Path, source: Path, image: Tensor, figures: dict[str, Any]) -> None:
    """Add the time of one image to the figures of a file that is to be quicker than the float32 file ``source``.

    Raises:
        UserError: it is slower.
    """
    both = [_classifier(x) for x in (path, source)]
    ours, theirs = (min(times) for times in zip(*([milliseconds(x, image, 0.1) for x in both] for _ in range(3))))
    if ours > MOST_TIME * theirs:
        raise UserError(
            f"{path.name} takes {ours:.2f} ms for one image and the float32 file {theirs:.2f} ms (and"
            f" {figures['same_class']} of {figures['images']} images are of the same class); nothing was written: leave"
            " out --quantize"
        )
    figures["latency_ms"] = ours


def _classifier(path: Path) -> Classify:
    session = open_onnx(path)
    return lambda batch: torch.from_numpy(session.run(["logits"], {"image": batch.numpy()})[0])


def logits_of(path: Path, images: Tensor) -> Tensor:
    """What an ONNX file gives for images, in onnxruntime."""
    with tqdm(total=len(images), desc=f"{path.name}'s logits", unit=" images", delay=2, disable=None) as progress:
        return classify_all(_classifier(path), images, BATCH, progress)
