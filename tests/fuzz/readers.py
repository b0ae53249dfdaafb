"""Any bytes for what reads files, and for the ops as Python calls them, by atheris (libFuzzer for Python).

    python tests/fuzz/readers.py TARGET [options of libFuzzer]     or through tests/fuzz/run.sh

A target may raise the error that tells the user what is wrong, in one line, and nothing else; and it may not crash.
"""

from __future__ import annotations

import io
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nodeshape"]):
    import numpy as np
    import torch
    from PIL import Image

    import nodeshape as ns
    from nodeshape._data.images import ImageError, load_image
    from nodeshape._errors import UserError
    from nodeshape._ode import adaptive_op
    from nodeshape._ode.method import METHODS
    from nodeshape._ode.program_op import tableau_of
    from nodeshape._training.checkpoint import load_classifier, save_checkpoint
    from nodeshape.predict import load_model

FOLDER = Path(tempfile.mkdtemp(prefix="nodeshape-fuzz-"))
Target = Callable[[bytes], None]


def one_line(error: BaseException) -> None:
    """Fail unless what the user is told is one line."""
    assert "\n" not in str(error), error


def image(data: bytes) -> None:
    path = FOLDER / "picture"
    path.write_bytes(data)
    for channels, size in (("grey", 1), ("rgb", 3)):
        try:
            pixels = load_image(path, 16, channels)
        except ImageError as error:
            one_line(error)
        else:
            assert pixels.shape == (size, 16, 16) and pixels.dtype == np.uint8


def checkpoint(data: bytes) -> None:
    """The file as it is; or, where the first byte is odd, its description in an archive whose sums are right."""
    path = FOLDER / "best.pt"
    if data[:1] and data[0] % 2:
        whole = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seed_checkpoint())) as archive, zipfile.ZipFile(whole, "w") as anew:
            for record in archive.infolist():
                own = data[1:] if record.filename.endswith("data.pkl") else archive.read(record)
                anew.writestr(record.filename, own)
        data = whole.getvalue()
    path.write_bytes(data)
    try:
        model, classes = load_classifier(path)
    except UserError as error:
        one_line(error)
    else:
        assert model.num_classes == len(classes)


def model(data: bytes) -> None:
    path = FOLDER / "model.onnx"
    path.write_bytes(data)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            load_model(path, threads=1)
    except UserError as error:
        one_line(error)
    assert not printed.getvalue()


@atheris.instrument_func
def ops(data: bytes) -> None:
    """Tensors of other shapes, types and strides than the ops expect, and numbers out of their range."""
    given = atheris.FuzzedDataProvider(data)
    program, weights = seed_program()

    def tensor(x: torch.Tensor) -> torch.Tensor:
        kind = given.ConsumeIntInRange(0, 79)
        if kind == 0:
            return x.to(given.PickValueInList([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool]))
        if kind == 1:
            return x[: given.ConsumeIntInRange(0, 3)] if x.dim() else x
        if kind == 2:
            return x[..., : given.ConsumeIntInRange(0, 3)] if x.dim() else x
        if kind == 3:
            return x.reshape(-1)
        if kind == 4:
            return x[None]
        if kind == 5:
            return x.mT if x.dim() == 2 else x
        if kind == 6:
            return torch.cat([x, x]) if x.dim() else x
        if kind == 7 and x.numel():
            x = x.clone()
            at = given.ConsumeIntInRange(0, x.numel() - 1)
            whole = x.dtype == torch.int64
            value = given.ConsumeInt(8) if whole else given.ConsumeFloat()
            x.view(-1)[at] = torch.tensor(value, dtype=torch.int64 if whole else torch.float64)
        return x

    def number(x: float) -> float:
        if given.ConsumeIntInRange(0, 39):
            return x
        return given.ConsumeFloat() if isinstance(x, float) else given.ConsumeInt(8)

    def some(method: str, tableau: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del method
        return tuple(map(tensor, (program.code, program.constants, tableau)))

    y0, t = tensor(torch.full((3, 2), 0.25)), tensor(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    own = [tensor(x) for x in weights]
    try:
        if given.ConsumeBool():
            method = given.PickValueInList(["euler", "implicit_midpoint", "rk4", "trbdf2"])
            scheme = some(method, tableau_of(METHODS[method])[0])
            rest = [number(1e-3), number(20), number(1), number(0), number(1), number(1e-2)]
            steps = [int(number(2)) for _ in range(given.ConsumeIntInRange(1, 3))]
            if max(steps) > 1000 or rest[1] > 1000:  # which would be long, not wrong
                return
            ys, stages, *_ = torch.ops.nodeshape.solve(y0, t, own, *scheme, steps, *rest)
            arguments = (tensor(torch.ones_like(ys)), tensor(ys), tensor(stages), t, own, *scheme, steps, *rest)
            torch.ops.nodeshape.solve_backward(*arguments)
        else:
            method = given.PickValueInList(["dopri5", "bosh3"])
            scheme = some(method, adaptive_op._embedded[method])
            rest = [number(x) for x in (1e-3, 1e-3, 0.0, 0.0, 1e300, 0.9, 10.0, 0.2)]
            counts = [number(5), min(int(number(100)), 1000)]
            found = torch.ops.nodeshape.solve_adaptive(y0, t, own, *scheme, *rest, *counts, True)
            ys, *record = found[:5]
            arguments = (tensor(torch.ones_like(ys)), *map(tensor, record), t, own, *scheme)
            torch.ops.nodeshape.solve_adaptive_backward(*arguments)
    except (RuntimeError, OverflowError) as error:  # the dispatcher's own are of several lines
        assert "INTERNAL ASSERT" not in str(error), error
    except (TypeError, MemoryError):  # of a program with a buffer that fits nowhere
        pass


@cache
def seed_program() -> tuple[ns._ode.program.Program, list[torch.Tensor]]:
    torch.manual_seed(0)
    f = ns.fuse(ns.MLPDynamics(2, (3,)), torch.zeros(3, 2))
    return f.program, [x.detach() for x in f.weights_for(torch.zeros(3, 2))]


@cache
def seed_checkpoint() -> bytes:
    torch.manual_seed(0)
    architecture = {"num_classes": 2, "image_size": 16, "width": 4, "method": "euler", "step_size": 0.5}
    network = ns.ShapeClassifier(**architecture)
    path = FOLDER / "seed.pt"
    save_checkpoint(path, {"model": network.state_dict(), "architecture": architecture, "classes": ["a", "b"]})
    return path.read_bytes()


def seeds(name: str) -> list[bytes]:
    """What a target begins with."""
    if name == "image":
        picture = Image.fromarray(np.arange(20 * 14, dtype=np.uint8).reshape(20, 14))
        found = []
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
            for mode in ("L", "RGB"):
                buffer = io.BytesIO()
                picture.convert(mode).save(buffer, kind)
                found.append(buffer.getvalue())
        return found
    if name == "checkpoint":
        with zipfile.ZipFile(io.BytesIO(seed_checkpoint())) as archive:
            description = next(archive.read(x) for x in archive.namelist() if x.endswith("data.pkl"))
        return [seed_checkpoint(), b"\x01" + description]
    if name == "model":
        from onnx import TensorProto, helper

        nodes = [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ]
        shapes = [("image", ["batch", 1, 2, 2]), ("logits", ["batch", 2])]
        ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x, shape in shapes]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [helper.make_tensor("w", 1, [4, 2], [0.5] * 8)])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        helper.set_model_props(made, {"classes": '["a", "b"]', "image_size": "2", "channels": "grey"})
        return [made.SerializeToString()]
    return [bytes(64), bytes(range(256))]


TARGETS: dict[str, Target] = {"image": image, "checkpoint": checkpoint, "model": model, "ops": ops}


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        sys.stdout.write("\n".join(TARGETS) + "\n")
        return
    name = sys.argv.pop(1)
    corpus = FOLDER / "seeds"
    corpus.mkdir()
    for k, data in enumerate(seeds(name)):
        (corpus / str(k)).write_bytes(data)
    torch.set_num_threads(1)
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
