"""The deploy suite: a classifier in PyTorch, fused and plain, and as an exported ONNX file in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nodeshape._benchmarking.cases import Case, Contender
from nodeshape._benchmarking.contenders import Call, Unavailable, without_fused
from nodeshape._benchmarking.targets import Target
from nodeshape._benchmarking.trained import checkpoint, images_of, trained_classifier
from nodeshape._errors import UserError

NODESHAPE, PLAIN, ONNX = "PyTorch, fused", "PyTorch, plain", "onnxruntime"
SECTION = "Logits of a batch of images, Euler"
PLOTS = {SECTION: "batch"}
TARGETS: list[Target] = []


def cases(quick: bool, device: torch.device) -> list[Case]:
    """One image, and batches."""
    if device.type != "cpu":
        raise UserError(f"--suite deploy measures on the CPU, got --device {device}")
    return [
        Case(
            SECTION,
            f"batch {batch}",
            {
                NODESHAPE: Contender(_in_torch(batch, quick, fused=True)),
                PLAIN: Contender(_in_torch(batch, quick, fused=False), like=NODESHAPE),
                ONNX: Contender(_in_onnxruntime(batch, quick), like=NODESHAPE),
            },
            scale=batch,
        )
        for batch in ((1, 3) if quick else (1, 7, 120))
    ]


def _images(batch: int) -> Tensor:
    images, _ = images_of(batch).test.batch(slice(None), torch.device("cpu"))
    return images


def _in_torch(batch: int, quick: bool, fused: bool) -> Callable[[], Call]:
    def build() -> Call:
        model, images = trained_classifier(quick), _images(batch)

        def classify() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(images),)

        def classify_plain() -> tuple[Tensor, ...]:
            with without_fused():
                return classify()

        return classify if fused else classify_plain

    return build


def _in_onnxruntime(batch: int, quick: bool) -> Callable[[], Call]:
    def build() -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(_exported(quick), options, providers=["CPUExecutionProvider"])
        images = _images(batch).numpy()
        return lambda: tuple(session.run(["logits"], {"image": images}))

    return build


def _exported(quick: bool) -> Path:
    """``model.onnx`` beside the checkpoint, written on first use."""
    try:
        from nodeshape.export import export
    except ImportError as error:
        raise Unavailable(f"cannot export: {error}") from error
    path = checkpoint(quick)
    out = path.parent / "export"
    if not out.exists():
        export(path, out)
    return out / "model.onnx"
