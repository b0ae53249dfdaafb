"""A user's own images: a file to pixels, labelled files to arrays. Never imports torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from nodeshape._cli import cores
from nodeshape._errors import UserError

CHANNELS = {"grey": 1, "rgb": 3}
"""Number of channels of each ``channels`` setting."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

CONTACT_SHEET = "contact_sheet.png"
"""A picture of all classes beside their folders; not an image to classify."""

MAX_PIXELS = 100_000_000
"""A file that is more once decoded is refused before: a few kilobytes can ask for gigabytes of memory."""

STRIP_PIXELS = 1_000_000
"""Pixels that are converted at a time."""

CONTRAST = 8
"""A picture whose values differ by less than this, of 255, has nothing on it."""

LabelledFile = tuple[Path, int]


class ImageError(UserError):
    """A file that is not a readable image."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _Room:
    """Pixels that may be decoded at a time by all threads together: many threads need no more memory than one."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed = Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Within, ``pixels`` of them are taken; waits until they are free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(MAX_PIXELS)


@dataclass(frozen=True)
class Loaded:
    """Images ``[n, channels, size, size]`` and labels ``[n]`` of the files that could be read, in order; the others."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    unreadable: list[ImageError]


def load_image(path: Path | str, image_size: int, channels: str = "grey") -> NDArray[np.uint8]:
    """Read a PNG, JPEG, WebP or BMP file of any size as a square image.

    The picture is turned upright as its EXIF tag says, laid on white where it is transparent, scaled to fit with its
    aspect kept (anti-aliased), and centred on its border's median colour, which prolongs a plain background where black
    bars would add edges. An image of the right size keeps its pixels exactly. 16-bit grey is scaled to 8, as 12-bit
    where no value is larger. A JPEG much larger than asked for is decoded at an eighth of its size, or more; all
    threads together decode 100 megapixels at a time.

    Returns:
        ``[1 or 3, image_size, image_size]`` for ``channels`` ``"grey"`` or ``"rgb"``.

    Raises:
        ImageError: the file is missing, a pipe or device, not such an image, damaged, without pixels, or of more than
            100 megapixels.
    """
    mode = {"grey": "L", "rgb": "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"channels must be 'grey' or 'rgb', got {channels!r}")
    try:
        with open_file(path) as file:
            picture = _decode(path, file, image_size, mode)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(path, _why_unidentified(path)) from None
    except Image.DecompressionBombError:
        raise ImageError(path, f"image of more than {MAX_PIXELS // 10**6} megapixels") from None
    except OSError as error:
        raise ImageError(path, error.strerror or f"damaged image: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise ImageError(path, f"damaged image: {error}") from error
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))


def open_file(path: Path | str) -> BinaryIO:
    """Open a file, and nothing that would wait for a writer or is a device.

    Raises:
        ImageError: it is a folder, a pipe, a socket or a device.
        OSError: it is not there or may not be read.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ImageError(path, f"is {names.get(stat.S_IFMT(kind), 'a device')}, not a file")
    return open(path, "rb")


def is_empty(image: NDArray[np.uint8]) -> bool:
    """Whether an image ``[channels, height, width]`` has nothing on it: no channel has contrast."""
    low, high = image.min(axis=(1, 2)).astype(int), image.max(axis=(1, 2)).astype(int)
    return bool((high - low < CONTRAST).all())


def load_folder(files: Sequence[LabelledFile], image_size: int, channels: str = "grey", strict: bool = False) -> Loaded:
    """Read labelled files into memory with all cores, showing progress if that takes over two seconds.

    Raises:
        ImageError: a file is unreadable and ``strict`` is set.
        UserError: none of a class's files is readable.
    """
    from tqdm import tqdm  # predict reads single images and need not have it

    images = np.empty((len(files), CHANNELS[channels], image_size, image_size), np.uint8)
    readable = np.zeros(len(files), bool)
    unreadable: list[ImageError] = []

    def load(index: int) -> ImageError | None:
        try:
            images[index] = load_image(files[index][0], image_size, channels)
        except ImageError as error:
            return error
        return None

    pool = ThreadPoolExecutor(max_workers=cores())
    try:
        outcomes = pool.map(load, range(len(files)))
        for index, error in enumerate(tqdm(outcomes, "reading", len(files), unit=" images", delay=2, disable=None)):
            if error is not None and strict:
                raise error
            readable[index] = error is None
            if error is not None:
                unreadable.append(error)
    finally:
        pool.shutdown(cancel_futures=True)

    labels = np.array([label for _, label in files], np.int64)
    for label in sorted(set(labels.tolist()) - set(labels[readable].tolist())):
        own = [error for error, of in zip(unreadable, labels[~readable]) if of == label]
        raise UserError(f"{own[0].path.parent}: none of its {len(own)} images is readable, for example {own[0]}")
    if unreadable:
        images, labels = images[readable], labels[readable]
    return Loaded(images, labels, unreadable)


def _decode(path: Path | str, file: BinaryIO, image_size: int, mode: str) -> Image.Image:
    """The image in a file as a square, upright and opaque, in ``mode``."""
    jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    # Image.open refuses large JPEGs before they can be asked for at a fraction of their size.
    with JpegImageFile(file, os.fspath(path)) if jpeg else Image.open(file, formats=FORMATS) as image:
        if not image.info.get("progressive"):  # of which a decoder keeps all coefficients, at any fraction
            image.draft(None, (2 * image_size, 2 * image_size))
        _check_size(path, *image.size)
        with _ROOM.taken(image.width * image.height):
            image.draft(None, (2 * image_size, 2 * image_size))
            flat = _flat(path, image, mode)
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.close()  # its pixels are not needed twice
            if turned != 1:
                flat.getexif()[ExifTags.Base.Orientation] = turned
                flat = ImageOps.exif_transpose(flat)
            return _letterbox(flat, image_size)


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(path, f"image without pixels ({width} × {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(path, f"image of more than {MAX_PIXELS // 10**6} megapixels ({width} × {height})")


def _why_unidentified(path: Path | str) -> str:
    if Path(path).stat().st_size == 0:
        return "empty file"
    return "not a PNG, JPEG, WebP or BMP image, or one of zero width or height"


def _flat(path: Path | str, image: Image.Image, mode: str) -> Image.Image:
    """An image on white, in ``mode``: a strip at a time, so that the memory needed is that of both and little more."""
    white = _white(path, image)
    flat = Image.new(mode, image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        flat.paste(_opaque(strip, white).convert(mode), (0, top))
    return flat


def _white(path: Path | str, image: Image.Image) -> int:
    """The value of white: 255; in 16-bit grey 65535, or 4095 where no value is larger.

    Cameras and microscopes write 12-bit values into 16-bit files, which would be black otherwise.

    Raises:
        ImageError: such a file in colour, of which Pillow gives the upper 8 bits alone.
    """
    sixteen_bits = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    if image.mode.startswith("I"):
        return 65535 if np.asarray(image).max() > 4095 else 4095
    if sixteen_bits:
        highest = np.asarray(image)[..., : 1 if image.mode == "LA" else 3].max()
        if 0 < highest < 16:
            raise ImageError(path, "12-bit colour in a 16-bit file, of which only black can be read; save it in 8 bits")
    return 255


def _opaque(image: Image.Image, white: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it to 255
        values = np.asarray(image).astype(np.int64)
        eight_bit = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
        eight_bit.info = dict(image.info)
        eight_bit.info.pop("transparency", None)  # a 16-bit value
        image = eight_bit
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _letterbox(image: Image.Image, image_size: int) -> Image.Image:
    """A grey or RGB image scaled to fit a square of ``image_size`` pixels, the rest in its border's median colour."""
    scale = image_size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if width == height:
        return image
    pixels = np.asarray(image).reshape(height, width, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(int(value) for value in np.median(border, axis=0))
    square = Image.new(image.mode, (image_size, image_size), colour if len(colour) > 1 else colour[0])
    square.paste(image, ((image_size - width) // 2, (image_size - height) // 2))
    return square
