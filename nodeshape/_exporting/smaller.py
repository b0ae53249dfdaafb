"""An exported ONNX file in smaller numbers: 8-bit integers or 16-bit floating point."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from tqdm import tqdm

from nodeshape._errors import UserError
from nodeshape._exporting.module import open_onnx
from nodeshape._exporting.verify import classify_all, compare

#: Part of the images that may be of another class than by the float32 file, so that no accuracy differs by more.
MOST_CHANGED = 0.005
BATCH = 100
#: Weights of fewer elements stay as they are.
FEW = 16


def write_int8(source: Path, path: Path, images: Tensor) -> None:
    """Write ``source`` with convolutions and linear layers of 8-bit integers, whose ranges are those on ``images``.

    Raises:
        UserError: the file has loops, in which no ranges can be seen.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    graph = onnx.load(source).graph
    if _has_loops(graph):
        raise UserError(
            "--quantize takes explicit methods, whose steps are written out; this file's stages are loops: add --method"
            " euler, with more --steps if need be"
        )
    constants = {x.name for x in graph.initializer}

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
            nodes_to_exclude=[
                node.name for node in graph.node if node.op_type == "Conv" and node.input[0] in constants
            ],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        log.setLevel(level)


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


def judge(path: Path, images: Tensor, reference: Tensor) -> dict[str, Any]:
    """Compare a file with the float32 file's logits ``reference``; figures for the report.

    Raises:
        UserError: more images than ``MOST_CHANGED`` allows are of another class.
    """
    agreement = compare(logits_of(path, images), reference)
    changed = agreement.images - agreement.same_class
    if not changed <= MOST_CHANGED * agreement.images or not agreement.max_difference < float("inf"):
        raise UserError(
            f"{path.name} gives {changed} of {agreement.images} images another class than the float32 file, more than"
            f" {MOST_CHANGED:.1%}; nothing was written: leave out --{'quantize' if 'int8' in path.name else 'half'}"
        )
    return {
        "bytes": path.stat().st_size,
        "images": agreement.images,
        "max_difference": agreement.max_difference,
        "same_class": agreement.same_class,
        "ties": agreement.ties,
    }


def logits_of(path: Path, images: Tensor) -> Tensor:
    """What an ONNX file gives for images, in onnxruntime."""
    session = open_onnx(path)

    def classify(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])

    with tqdm(total=len(images), desc=f"{path.name}'s logits", unit=" images", delay=2, disable=None) as progress:
        return classify_all(classify, images, BATCH, progress)
