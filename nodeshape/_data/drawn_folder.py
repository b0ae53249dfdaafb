"""Drawn shapes as a folder on disk: one folder per class, and a contact sheet to look at. Never imports torch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nodeshape._cli import picture
from nodeshape._data.images import CONTACT_SHEET
from nodeshape._data.shapes import CLASSES, draw
from nodeshape._errors import UserError
from nodeshape._files import PARTIAL, partial_folder, write_atomically

#: The folder, within a folder that was there before, of images that are all drawn and not all in their place.
DRAWN = ".images.drawn"


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
    if out.is_dir():  # which may be the one that the user is in, or a disk's: it is filled, not replaced
        finished = _move_on(out)
        if set(out.iterdir()) - set(out.glob(PARTIAL)):
            what = "a killed call had drawn its images, which are all there now" if finished else "is not empty"
            raise UserError(f"--out {out}: {what}; name a new folder")
        with partial_folder(out / "images") as partial:
            counts = _write(partial, task, count, seed, image_size)
            partial.rename(out / DRAWN)
            _move_on(out)
        return counts
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(out) as partial:
        counts = _write(partial, task, count, seed, image_size)
        partial.rename(out)
    return counts


def _move_on(out: Path) -> bool:
    """Move what is drawn to its place in ``out``, all of it also after a kill in between; whether there was any."""
    if not (out / DRAWN).is_dir():
        return False
    for part in (out / DRAWN).iterdir():
        part.rename(out / part.name)
    (out / DRAWN).rmdir()
    return True


def contact_sheet(examples: dict[str, list[NDArray[np.uint8]]]) -> Image.Image:
    """One labelled row per class with its example images, each ``[side, side]``, shown at 96 pixels or more."""
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
    with picture(Path(CONTACT_SHEET)):
        sheet = io.BytesIO()
        contact_sheet(examples).save(sheet, "png")
        write_atomically(folder / CONTACT_SHEET, sheet.getvalue())
    return counts
