"""A user's own images: a file to pixels, a folder to labelled files, labelled files to arrays. Never imports torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from nodeshape._errors import UserError

CHANNELS = {"grey": 1, "rgb": 3}
"""Number of channels of each ``channels`` setting."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

CONTACT_SHEET = "contact_sheet.png"
"""A picture of all classes beside their folders; not an image to classify."""

MAX_PIXELS = 100_000_000
"""A file that claims more is refused before it is decoded: a few kilobytes can ask for gigabytes of memory."""

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


@dataclass(frozen=True, eq=False)
class Files(Sequence[LabelledFile]):
    """Labelled files, class by class, kept as names: a million take a tenth of a gigabyte, as paths five times that.

    Attributes:
        folders: of the classes, by label.
        names: of the files.
        labels: of the files, ascending, ``[n]``.
    """

    folders: tuple[Path, ...]
    names: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> LabelledFile: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> LabelledFile | Files:
        if isinstance(index, slice):
            return Files(self.folders, self.names[index], self.labels[index])
        label = int(self.labels[index])
        return self.folders[label] / self.names[index], label

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Files):
            return NotImplemented
        same = self.folders == other.folders and self.names == other.names
        return same and np.array_equal(self.labels, other.labels)

    def take(self, indices: Sequence[int]) -> Files:
        """The files at ascending ``indices``."""
        return Files(self.folders, [self.names[i] for i in indices], self.labels[list(indices)])


@dataclass(frozen=True)
class Folder:
    """Labelled files of a user's folder; a label is an index of ``classes``, the sorted names of the class folders."""

    classes: tuple[str, ...]
    train: Files
    test: Files


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
    bars would add edges. An image of the right size keeps its pixels exactly. 16-bit grey is scaled to 8.

    Returns:
        ``[1 or 3, image_size, image_size]`` for ``channels`` ``"grey"`` or ``"rgb"``.

    Raises:
        ImageError: the file is missing, not such an image, damaged, without pixels, or of more than 100 megapixels.
    """
    mode = {"grey": "L", "rgb": "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"channels must be 'grey' or 'rgb', got {channels!r}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(path, *image.size)
            image.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG is decoded at a fraction of its size
            picture = _letterbox(_upright_and_opaque(image).convert(mode), image_size)
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


def is_empty(image: NDArray[np.uint8]) -> bool:
    """Whether an image ``[channels, height, width]`` has nothing on it: no channel has contrast."""
    low, high = image.min(axis=(1, 2)).astype(int), image.max(axis=(1, 2)).astype(int)
    return bool((high - low < CONTRAST).all())


def scan_folder(root: Path | str, seed: int, test_fraction: float = 0.2) -> Folder:
    """List the images of ``root/train/CLASS`` and ``root/test/CLASS``, or else of ``root/CLASS``, split per class.

    The split depends on the seed and the names alone, and a file added later leaves nearly all others where they were.
    Hidden files, files without an image's suffix and files beside the class folders are ignored.

    Raises:
        UserError: there is no such folder, or its classes cannot be told apart, trained on and tested on.
    """
    root = Path(root)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; expected a folder with one folder of images per class")
    has_split = {name: bool(_folders(root / name)) for name in ("train", "test")}
    if all(has_split.values()):
        return _scan_split(root)
    for name, other in (("train", "test"), ("test", "train")):
        if has_split[name]:
            raise UserError(
                f"{root}: has {name}/CLASS folders but no {other}/CLASS folders; add them, or use {root / name}"
            )
    return _scan_and_split(root, seed, test_fraction)


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

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
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


def _check_size(path: Path | str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(path, f"image without pixels ({width} × {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(path, f"image of more than {MAX_PIXELS // 10**6} megapixels ({width} × {height})")


def _why_unidentified(path: Path | str) -> str:
    if Path(path).stat().st_size == 0:
        return "empty file"
    return "not a PNG, JPEG, WebP or BMP image, or one of zero width or height"


def _upright_and_opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it to 255
        values = np.asarray(image).astype(np.int64)
        eight_bit = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        eight_bit.info = dict(image.info)
        eight_bit.info.pop("transparency", None)  # a 16-bit value
        image = eight_bit
    image = ImageOps.exif_transpose(image)
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


def _scan_split(root: Path) -> Folder:
    classes = {name: set(_folders(root / name)) for name in ("train", "test")}
    for name, other in (("train", "test"), ("test", "train")):
        only = sorted(classes[name] - classes[other])
        if only:
            raise UserError(f"{root}: train and test must have the same classes; only {name} has {', '.join(only)}")
    train, test = (_scan_classes(root / part) for part in ("train", "test"))
    return Folder(tuple(train), _files(root / "train", train), _files(root / "test", test))


def _scan_and_split(root: Path, seed: int, test_fraction: float) -> Folder:
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for name, images in _scan_classes(root).items():
        if len(images) < 2:
            raise UserError(f"{root / name}: has 1 image; a class needs 2 or more, to train on and to test on")
        count = min(max(1, round(test_fraction * len(images))), len(images) - 1)
        drawn = set(sorted(images, key=lambda image: _lot(seed, name, image))[:count])
        train[name] = [image for image in images if image not in drawn]
        test[name] = [image for image in images if image in drawn]
    return Folder(tuple(train), _files(root, train), _files(root, test))


def _lot(seed: int, class_name: str, image: str) -> bytes:
    """A number that the seed and the names of class and file decide, alike on every machine."""
    return hashlib.sha256(f"{seed}/{class_name}/{image}".encode("utf-8", "surrogateescape")).digest()


def _files(folder: Path, names: dict[str, list[str]]) -> Files:
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(images) for images in names.values()])
    return Files(
        tuple(folder / name for name in names), [image for images in names.values() for image in images], labels
    )


def _scan_classes(folder: Path) -> dict[str, list[str]]:
    """The names of the images of each class, both sorted."""
    classes = _folders(folder)
    if not classes:
        loose = len(_images(folder))
        found = f"its {loose} images lie in no class folder" if loose else "it is empty of class folders"
        raise UserError(f"{folder}: {found}; expected {folder / 'CLASS' / '*.png'}, one folder per class")
    from tqdm import tqdm  # predict reads single images and need not have it

    images: dict[str, list[str]] = {}
    with tqdm(desc="listing", unit=" images", delay=2, disable=None) as bar:
        for name in classes:
            images[name] = _images(folder / name)
            bar.update(len(images[name]))
            if not images[name]:
                raise UserError(f"{folder / name}: has no images ({', '.join(SUFFIXES)})")
    if len(classes) == 1:
        raise UserError(f"{folder}: has one class only, {classes[0]!r}; a classifier needs two or more class folders")
    return images


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _images(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:  # which knows files from folders without asking about each
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )
