"""The deploy suite: a trained classifier in PyTorch and as every file that it exports to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nodeshape._benchmarking.cases import Case, Contender, Result
from nodeshape._benchmarking.contenders import Call, Unavailable
from nodeshape._benchmarking.targets import AtLeast, AtMost, Target
from nodeshape._benchmarking.timing import CPU
from nodeshape._benchmarking.trained import IMAGE_SIZE, checkpoint, images_of, trained_classifier
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._ode.method import get_method

METHODS = ("euler", "implicit_midpoint", "implicit_euler")
BATCHES, QUICK_BATCHES = (1, 7, 120), (1, 3)
NODESHAPE, PLAIN, BASELINE = "PyTorch, fused", "PyTorch, plain", "torch.onnx.export"
ONNX, SCRIPT, PACKAGE, FUSED_ONNX = "ONNX", "native TorchScript", "native AOTInductor", "ONNX, fused op"
NATIVE = (SCRIPT, PACKAGE, FUSED_ONNX)
INT8, HALF = f"{ONNX}, int8", f"{ONNX}, half"
#: Files of an export folder by name; other ONNX files there are called by what stands before their suffix.
NAMES = {
    "model.onnx": ONNX,
    "model.ts": "TorchScript",
    "model.pt2": "torch.export",
    "model.fused.ts": SCRIPT,
    "model.fused.pt2": PACKAGE,
    "model.fused.onnx": FUSED_ONNX,
}
#: Files that round, so that their logits are not compared: the export has judged them.
ROUNDED = ("int8", "half")
#: Calls, one of each contender in turn, that give the percentiles, and the seconds after which they are enough.
CALLS, CALL_SECONDS = 100, 20.0


def section(method: str) -> str:
    """The title of a method's table."""
    return f"Logits of a batch of images, {method}"


PLOTS = {section(method): "batch" for method in METHODS}
TARGETS: list[Target] = [
    *(AtLeast(f"euler, batch 120: {ONNX} / {name}", 2.5, section("euler"), "batch 120", ONNX, name) for name in NATIVE),
    *(AtMost(f"euler, batch 1: {name} / {ONNX}", 1.0, section("euler"), "batch 1", name, ONNX) for name in NATIVE),
    AtLeast(f"euler, batch 1: {BASELINE} / {ONNX}", 1.3, section("euler"), "batch 1", BASELINE, ONNX),
    AtLeast(f"euler, batch 120: {BASELINE} / {ONNX}", 1.3, section("euler"), "batch 120", BASELINE, ONNX),
    AtLeast(f"euler, batch 120: {BASELINE} / {INT8}", 2.0, section("euler"), "batch 120", BASELINE, INT8),
    *(
        AtMost(f"{method}, {row}: {ONNX} / euler's", most, section(method), row, ONNX, ONNX, of=section("euler"))
        for method, most in (("implicit_midpoint", 3.0), ("implicit_euler", 4.0))
        for row in ("batch 1", "batch 120")
    ),
]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Batches, for each method."""
    if device.type != "cpu":
        raise UserError(f"--suite deploy measures on the CPU, got --device {device}")
    found = []
    for method in METHODS[:1] if quick else METHODS:
        variants, most = _variants(method, quick), (QUICK_BATCHES if quick else BATCHES)[-1]
        for batch in QUICK_BATCHES if quick else BATCHES:
            calls: dict[str, Call] = {}
            contenders = {x.name: Contender(partial(_build, x, batch, calls), x.like) for x in variants}
            weighed = [x for x in variants if x.name == ONNX or not quick] if batch == most else []
            describe = partial(_describe, calls, weighed, batch, 5 if quick else CALLS)
            found.append(Case(section(method), f"batch {batch}", contenders, scale=batch, describe=describe))
    return found


@dataclass(frozen=True)
class Variant:
    """A way to run a classifier.

    Attributes:
        name: of the contender.
        path: its file; the checkpoint for PyTorch.
        method: of the solve.
        like: the contender whose logits it must give.
        why_not: the reason where there is no file.
    """

    name: str
    path: Path
    method: str
    like: str | None = NODESHAPE
    why_not: str = ""

    def load(self) -> Callable[[Tensor], Any]:
        """Read the file as a function of images; it uses torch's number of threads."""
        if self.why_not:
            raise Unavailable(self.why_not)
        if self.name in (NODESHAPE, PLAIN):
            from nodeshape import load_classifier

            return load_classifier(self.path)[0].with_solver(self.method)
        if self.path.suffix == ".onnx":
            return _load_onnx(self.path, self.name == FUSED_ONNX)
        if self.name in (SCRIPT, PACKAGE):
            import nodeshape._ode.fused  # noqa: F401  (whose library has the ops)
        if self.path.suffix == ".ts":
            from nodeshape._exporting.native import load_torchscript

            return load_torchscript(self.path)
        if self.name == PACKAGE:
            from nodeshape._exporting.native import load_package

            return load_package(self.path)
        return torch.export.load(self.path).module()


def _load_onnx(path: Path, native: bool) -> Callable[[Tensor], Any]:
    from nodeshape._exporting.custom_ops import LIBRARY
    from nodeshape._exporting.module import open_onnx

    session = open_onnx(path, torch.get_num_threads(), LIBRARY if native else None)
    name, kind = session.get_inputs()[0].name, session.get_inputs()[0].type

    def classify(images: Tensor) -> Any:
        given = images if kind == "tensor(float)" else (images * 255).round().to(torch.uint8)
        return session.run(None, {name: given.numpy()})[0]

    return classify


def _images(batch: int) -> Tensor:
    return images_of(batch).test.batch(slice(None), CPU)[0]


def _build(variant: Variant, batch: int, calls: dict[str, Call]) -> Call:
    classify, images = variant.load(), _images(batch)
    plain = variant.name == PLAIN

    def call() -> tuple[Any, ...]:
        with torch.inference_mode():
            if not plain:
                return (classify(images),)
            from nodeshape._benchmarking.contenders import without_fused

            with without_fused():
                return (classify(images),)

    calls[variant.name] = call
    return call


def _describe(calls: Mapping[str, Call], footprints: Sequence[Variant], batch: int, count: int) -> dict[str, float]:
    """The 50th and 95th percentile of single calls in seconds, and what the last case says of each contender's file."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = perf_counter()
    while len(next(iter(seconds.values()))) < count and perf_counter() - start < CALL_SECONDS:
        for name, call in calls.items():
            began = perf_counter()
            call()
            seconds[name].append(perf_counter() - began)
    figures: dict[str, float] = {}
    for name, taken in seconds.items():
        parts = quantiles([*taken, *taken], n=20, method="inclusive")
        figures |= {f"{name}: p50": parts[9], f"{name}: p95": parts[18]}
    for variant in footprints:
        if variant.name in calls:
            found = footprint(variant, batch)
            figures |= {f"{variant.name}: {what}": value for what, value in found.items()}
    return figures


# ---- files -----------------------------------------------------------------------------------------------------------


@lru_cache
def _variants(method: str, quick: bool) -> list[Variant]:
    """All there are, PyTorch's first; the files are written beside the checkpoint on first use.

    What torch's exporter makes of implicit stages by itself, sixteen evaluations of f each, takes it many minutes.
    """
    from nodeshape._exporting.native import to_native

    path = checkpoint(quick)
    out = path.parent / f"export-{method}"
    model, images = trained_classifier(quick).with_solver(method), _images(7)
    found = [Variant(NODESHAPE, path, method, None), Variant(PLAIN, path, method)]

    def add(name: str, file: Path, write: Callable[[Path], object] | None = None) -> None:
        reason = ""
        if write is not None:
            try:
                write(file)
            except Exception as error:  # of an exporter: what it could not do is a line of the report
                reason = f"cannot export: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        like = None if any(word in name for word in ROUNDED) else NODESHAPE
        found.append(Variant(name, file, method, like, reason))

    try:
        from nodeshape.export import export
    except ImportError as error:
        raise UserError(f"--suite deploy: cannot export ({error}): pip install 'nodeshape[export]'") from error
    refused: dict[str, str] = {}
    smaller = {} if quick else {"quantize": INT8, "half": HALF}
    while True:
        try:
            export(path, out, method, quantize="quantize" in smaller, half="half" in smaller)
            break
        except UserError as error:  # of a file that changes too much, or takes longer
            name = next((x for x in smaller if f"--{x}" in str(error)), None)
            if name is None:
                raise
            refused[smaller.pop(name)] = str(error).split(";")[0]
    with torch.no_grad():
        to_native(model, images, out, package=not quick)
    for file in sorted(out.iterdir()):
        if file.name in NAMES:
            add(NAMES[file.name], file)
        elif file.suffix == ".onnx":
            add(f"{ONNX}, {file.stem.removeprefix('model.').removeprefix('model-')}", file)
    found += [Variant(name, out, method, None, why) for name, why in refused.items()]
    if not quick:
        import nodeshape as ns

        add(f"{ONNX}, loop", out / "looped.onnx", lambda file: ns.to_onnx(model, images, file, loop=True))
    if get_method(method).explicit:
        add(BASELINE, out / "baseline.onnx", lambda file: _plain_export(model, images, file))
    return found


def _plain_export(model: ShapeClassifier, images: Tensor, path: Path) -> None:
    """What torch's exporter makes of the module by itself."""
    from nodeshape._exporting.module import Progress

    with Progress(path.name), torch.no_grad():
        dimensions = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=dimensions, verbose=False)


# ---- size, load time and memory --------------------------------------------------------------------------------------


def footprint(variant: Variant, batch: int) -> dict[str, float]:
    """In a process of its own: bytes of the file, seconds to load it, and bytes that loading and a batch add."""
    name, path, method = variant.name, str(variant.path), variant.method
    line = [sys.executable, "-m", __name__, name, path, method, str(batch), str(torch.get_num_threads())]
    environment = {**os.environ, "NODESHAPE_FUSED": "0"} if name == PLAIN else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(x for x in sys.path if x)
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    size = variant.path.stat().st_size + sum(
        x.stat().st_size for x in variant.path.parent.glob(variant.path.name + ".data")
    )
    return {"bytes": size, **found}


def _footprint(name: str, path: str, method: str, batch: str, threads: str) -> None:
    import onnxruntime  # noqa: F401  (as all that imports: before the count begins)

    import nodeshape._exporting.native
    import nodeshape._exporting.verify
    import nodeshape._models.classifier
    import nodeshape._ode.fused  # noqa: F401

    torch.set_num_threads(int(threads))
    torch.zeros(8, 8) @ torch.zeros(8, 8)
    before, start = _resident("VmRSS"), perf_counter()
    classify = Variant(name, Path(path), method).load()
    seconds = perf_counter() - start
    with torch.inference_mode():
        for _ in range(3):
            classify(torch.rand(int(batch), 1, IMAGE_SIZE, IMAGE_SIZE))
    print(json.dumps({"load": seconds, "memory": _resident("VmHWM") - before}))


def _resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


# ---- table -----------------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Result]) -> str:
    """A line for each way to run: size, load time, memory; of each batch p50, p95, and p50 over the baseline's."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.seconds, *row.skipped)))
    base_name = BASELINE if any(BASELINE in row.seconds for row in rows) else names[0]
    grid = [["", "MB", "load ms", "memory MB", *(f"{row.name}: p50, p95 ms, ×" for row in rows)]]
    figures = {key: value for row in rows for key, value in row.figures.items() if key[-3:] not in ("p50", "p95")}
    for name in names:
        line = [f"  {name}"]
        for what, scale in (("bytes", 1e-6), ("load", 1e3), ("memory", 1e-6)):
            value = figures.get(f"{name}: {what}")
            line.append("–" if value is None else f"{value * scale:.3g}")
        for row in rows:
            if name in row.skipped:
                line.append("–")
                continue
            p50, p95 = (1e3 * row.figures[f"{name}: {what}"] for what in ("p50", "p95"))
            base = row.time(base_name) or row.time(names[0])
            ratio = "–" if base is None else f"{row.seconds[name].median / base:.2f}"
            line.append(f"{p50:8.3g} {p95:8.3g} {ratio:>6}")
        grid.append(line)
    notes = dict.fromkeys(f"  no {name}: {why}" for row in rows for name, why in row.skipped.items())
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = [
        line[0].ljust(widths[0]) + "".join("  " + x.rjust(w) for x, w in zip(line[1:], widths[1:])) for line in grid
    ]
    return "\n".join([f"{title} (× is of {base_name}'s time)", *lines, *notes])


if __name__ == "__main__":
    _footprint(*sys.argv[1:])
