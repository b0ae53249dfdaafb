"""``python -m nodeshape.data``: write drawn shapes to disk, one folder a class, and a contact sheet to look at."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nodeshape._cli import Parser, positive_int, run, seed, whole
from nodeshape._data.images import CONTACT_SHEET
from nodeshape._data.shapes import CLASSES, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, draw
from nodeshape._errors import UserError
from nodeshape._files import partial_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the images that the command line asks for and say what to type next."""
    parser = Parser("data", "Draw images of shapes as PNG files, one folder a class.")
    parser.add_argument("--task", choices=tuple(CLASSES), default="single", help="one shape, or up to two")
    parser.add_argument("--count", type=positive_int, default=700, help="number of images")
    parser.add_argument("--seed", type=seed, default=0, help="another seed gives other images")
    size = whole(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
    parser.add_argument("--image-size", type=size, default=32, help="pixels a side")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)

    counts = write_folder(args.out, args.task, args.count, args.seed, args.image_size)
    print(f"Wrote {args.count} images of {len(counts)} classes to {args.out}")
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"Look at them: {args.out / CONTACT_SHEET}")
    if min(counts.values()) < 2:
        print(f"Too few to train on: --count {2 * len(counts)} or more gives each class two.")
    else:
        print(f"Next: python -m nodeshape.train --data {shlex.quote(str(args.out))}")


def write_folder(out: Path, task: str, count: int, seed: int, image_size: int) -> dict[str, int]:
    """Write ``out/CLASS/000123.png`` for images 0 to ``count − 1``, and ``out/contact_sheet.png``: all, or nothing.

    Returns:
        the number of images of each class.

    Raises:
        UserError: ``out`` is a file or holds something already.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(out) as partial:
        counts = _write(partial, task, count, seed, image_size)
        _move(partial, out)
    return counts


def contact_sheet(examples: dict[str, list[NDArray[np.uint8]]]) -> Image.Image:
    """One labelled row a class of its example images, each ``[side, side]``, shown at 96 pixels or more."""
    side = next(len(image) for images in examples.values() for image in images)
    scale = max(1, round(96 / side))
    tile, gap = side * scale, 8
    font = ImageFont.load_default(16)
    label_width = gap + max(int(font.getlength(name)) for name in examples) + 2 * gap
    columns = max(len(images) for images in examples.values())
    sheet = Image.new("L", (label_width + columns * (tile + gap), gap + len(examples) * (tile + gap)), 255)
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(examples.items()):
        top = gap + row * (tile + gap)
        pen.text((2 * gap, top + tile // 2), name, fill=40, font=font, anchor="lm")
        for column, image in enumerate(images):
            shown = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(shown, (label_width + column * (tile + gap), top))
    return sheet


def _write(folder: Path, task: str, count: int, seed: int, image_size: int) -> dict[str, int]:
    from tqdm import tqdm

    names = CLASSES[task]
    counts = dict.fromkeys(names, 0)
    examples: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in names}
    for name in names:
        (folder / name).mkdir()
    for index in tqdm(range(count), "drawing", unit=" images", disable=None):
        image, label = draw(task, seed, index, image_size, split="files")
        name = names[label]
        Image.fromarray(image).save(folder / name / f"{index:06d}.png")
        counts[name] += 1
        if len(examples[name]) < 10:
            examples[name].append(image)
    contact_sheet(examples).save(folder / CONTACT_SHEET)
    return counts


def _move(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    for part in folder.iterdir():  # into the empty folder, which may be the one the user is in
        part.rename(out / part.name)


if __name__ == "__main__":
    run(main)
