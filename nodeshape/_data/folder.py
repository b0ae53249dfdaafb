"""A user's folder of images: which folders are classes, which files are their images, and what is left out and why."""

from __future__ import annotations

import filecmp
import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from nodeshape._data.images import CONTACT_SHEET, SUFFIXES, LabelledFile
from nodeshape._errors import UserError

#: Names of the folders of training and of test images, in any case, the first that there is.
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
#: Folders that systems make, in small letters; they hold thumbnails and leftovers, never a class.
SYSTEM = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle", "system volume information"}
#: Suffixes of pictures that are not read, which is said.
OTHER_SUFFIXES = {
    *(".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jfif", ".jxl", ".jp2", ".ico", ".tga", ".ppm", ".pgm"),
    *(".svg", ".psd", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
}
#: Bytes by which files of the same size are first compared.
HEAD = 2**16


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
    """Labelled files of a user's folder.

    Attributes:
        classes: the sorted names of the class folders; a label is an index of it.
        train: the training images.
        test: the test images, of some classes perhaps none.
        left_out: what in the folder is not used, or not as it may be meant, a line each.
    """

    classes: tuple[str, ...]
    train: Files
    test: Files
    left_out: tuple[str, ...] = ()


def scan_folder(root: Path | str, seed: int, test_fraction: float = 0.2, strict: bool = False) -> Folder:
    """List the images of ``root/train/CLASS`` and ``root/test/CLASS``, or else of ``root/CLASS``, split per class.

    The test set may be called ``val``, ``valid`` or ``validation`` too. The split depends on the seed and the names
    alone, and a file added later leaves nearly all others where they were. Hidden files and folders, and those of
    operating systems, are never looked at. What else is not used is said by ``left_out``: a class without images,
    images in subfolders of a class or beside the classes, pictures of other formats, links to nowhere, test images
    without class folders.

    Raises:
        UserError: there is no such folder, or its classes cannot be told apart, trained on and tested on; or with
            ``strict`` something is left out.
    """
    root = Path(root)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    if not root.exists():
        raise UserError(f"{root}: no such folder")
    if not root.is_dir():
        raise UserError(f"{root}: is a file; expected a folder with one folder of images per class")
    scan = _Scan(root)
    train, test = scan.part(TRAIN), scan.part(TEST)
    if (train is None) != (test is None):
        name, other = (train, "test") if test is None else (test, "train")
        raise UserError(
            f"{root}: has {name}/CLASS folders but no {other}/CLASS folders; add them, or use {root / str(name)}"
        )
    folder = scan.split(train, test) if train and test else scan.and_split(seed, test_fraction)
    if strict and folder.left_out:
        more = f" (and {len(folder.left_out) - 1} more)" if len(folder.left_out) > 1 else ""
        raise UserError(f"{root}: {folder.left_out[0]}{more}; mend this, or leave out --strict")
    return folder


def same_files(train: Files, test: Files) -> list[tuple[Path, Path]]:
    """Training files that have the same bytes as a test file, each with that file."""
    from tqdm import tqdm  # predict reads single images and need not have it

    sizes = [[_size(path) for path, _ in files] for files in (train, test)]
    common = set(sizes[0]) & set(sizes[1]) - {None, 0}
    tests: dict[tuple[int | None, bytes], list[Path]] = defaultdict(list)
    pairs = []
    with tqdm(desc="comparing", total=len(train) + len(test), unit=" images", delay=2, disable=None) as bar:
        for (path, _), size in zip(test, sizes[1]):
            bar.update()
            if size in common:
                tests[size, _head(path)].append(path)
        for (path, _), size in zip(train, sizes[0]):
            bar.update()
            if size not in common:
                continue
            for other in tests.get((size, _head(path)), ()):
                if filecmp.cmp(path, other, shallow=False):
                    pairs.append((path, other))
                    break
    return pairs


@dataclass
class _Listing:
    """What is in a folder, names sorted: folders that may be classes, images, and what cannot be used."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    nowhere: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


class _Scan:
    """One look through a folder, which collects what is left out."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, _list(root)
        self.left_out: list[str] = []
        self._others: Counter[str] = Counter()
        self._nowhere: list[str] = []

    def part(self, names: Sequence[str]) -> str | None:
        """The folder of one of ``names`` that holds class folders with images."""
        own = sorted((name for name in self.top.folders if name.lower() in names), key=lambda x: names.index(x.lower()))
        return next((name for name in own if self._has_classes(name)), None)

    def split(self, train: str, test: str) -> Folder:
        """The classes of a folder of training images, with the test images of those that have some."""
        for name in self.top.folders:
            if name not in (train, test) and self._has_images(name):
                self.left_out.append(f"{name}: left out: {train} and {test} are used")
        self._leave_out_loose(f"{train} and {test}")
        own, others = self._classes(train), self._classes(test)
        places = {name: name for name in own}
        for name in sorted(set(others) - set(own)):
            alike = [x for x in own if _look(x) == _look(name) and x not in others]
            if len(alike) == 1:
                places[alike[0]] = name
                pair = f"{name!a} as {alike[0]!a}"
                self.left_out.append(f"{test}/{name}: taken for test images of {train}/{alike[0]}, {pair}")
            else:
                self.left_out.append(f"{test}/{name}: left out: has no training images")
        tests = {x: others.get(places[x], []) for x in own}
        self.left_out += [f"{train}/{x}: has no test images" for x, images in tests.items() if not images]
        classes = self._check(own, train)
        if not any(tests.values()):
            raise UserError(f"{self.root / test}: has images of none of the classes in {self.root / train}")
        return Folder(
            classes,
            _files([self.root / train / x for x in own], list(own.values())),
            _files([self.root / test / places[x] for x in own], list(tests.values())),
            tuple(self.left_out),
        )

    def and_split(self, seed: int, test_fraction: float) -> Folder:
        """The classes of the folder itself, of each a part as test images."""
        apart = self._sets_without_classes()
        images = self._classes(".", apart)
        self._leave_out_loose("the class folders", but=CONTACT_SHEET)
        train: dict[str, list[str]] = {}
        test: dict[str, list[str]] = {}
        for name, own in images.items():
            if len(own) < 2:
                self.left_out.append(f"{name}: left out: has 1 image; a class needs 2, to train on and to test on")
                continue
            count = min(max(1, round(test_fraction * len(own))), len(own) - 1)
            drawn = set(sorted(own, key=lambda image: _lot(seed, name, image))[:count])
            train[name] = [image for image in own if image not in drawn]
            test[name] = [image for image in own if image in drawn]
        classes = self._check(train, ".")
        folders = [self.root / name for name in train]
        return Folder(
            classes, _files(folders, list(train.values())), _files(folders, list(test.values())), tuple(self.left_out)
        )

    def _sets_without_classes(self) -> set[str]:
        """Folders that are called as test sets are, and training sets beside them, and hold images, not classes."""
        names = {name.lower(): name for name in self.top.folders if _list(self.root / name).images}
        tests = {names[name] for name in TEST if name in names and not (name == "valid" and "invalid" in names)}
        if not tests:
            return set()
        apart = tests | {names[name] for name in TRAIN if name in names}
        if len(apart) == len(names):
            raise UserError(
                f"{self.root}: its images lie in {' and '.join(sorted(apart))} without a folder per class; expected"
                f" {self.root / 'train' / 'CLASS' / '*.png'} and {self.root / 'test' / 'CLASS' / '*.png'}"
            )
        self.left_out += [
            f"{name}: left out: is called as a set of images and has no class folders; rename it if it is a class"
            for name in sorted(apart)
        ]
        return apart

    def _classes(self, part: str, apart: Collection[str] = ()) -> dict[str, list[str]]:
        """The names of the images of each class of a folder in the root, both sorted; not of those in ``apart``."""
        from tqdm import tqdm  # predict reads single images and need not have it

        folder = self.root / part
        listing = self.top if part == "." else _list(folder)
        classes: dict[str, list[str]] = {}
        places: dict[str, str] = {}
        if part != ".":
            self._note(listing, Path(part))
            if listing.images:
                self.left_out.append(f"{part}: {len(listing.images)} images beside its class folders left out")
        with tqdm(desc="listing", unit=" images", delay=2, disable=None) as bar:
            for name in listing.folders:
                if name in apart:
                    continue
                own, shown = _list(folder / name), str(Path(part) / name)
                place = os.path.realpath(folder / name)
                if place in places:
                    self.left_out.append(f"{shown}: left out: is the same folder as {places[place]}")
                    continue
                places[place] = shown
                below = sum(1 for _ in images_below(folder / name)) - len(own.images) if own.folders else 0
                self._note(own, Path(shown))
                if own.images:
                    classes[name] = own.images
                where = f"{below} images in its subfolders{'' if own.images else ' only'}"
                if below:
                    self.left_out.append(f"{shown}: left out: {where}; move them up to use them")
                elif not own.images:
                    self.left_out.append(f"{shown}: left out: has no images ({', '.join(SUFFIXES)})")
                bar.update(len(own.images))
        return classes

    def _check(self, found: dict[str, list[str]], part: str) -> tuple[str, ...]:
        """The names of the classes, if they are several; adds what is to be said of names and files."""
        self._note(self.top, Path())
        if self._others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self._others.items()))
            self.left_out.append(f"left out: {kinds}: only PNG, JPEG, WebP and BMP files are read")
        if self._nowhere:
            what = f"{len(self._nowhere)} links to nowhere or no files, such as {self._nowhere[0]}"
            self.left_out.append(f"left out: {what}")
        folder = self.root / part
        why = f" ({'; '.join(self.left_out[:3])}{'; …' if len(self.left_out) > 3 else ''})" if self.left_out else ""
        if not found:
            loose = len(_list(folder).images)
            what = f"its {loose} images lie in no class folder" if loose else "it is empty of class folders"
            raise UserError(f"{folder}: {what}; expected {folder / 'CLASS' / '*.png'}, one folder per class{why}")
        if len(found) == 1:
            raise UserError(
                f"{folder}: has one class only, {next(iter(found))!r}; a classifier needs two or more folders{why}"
            )
        classes = tuple(map(_text, found))
        self.left_out += [f"class {x}: its folder's name is not UTF-8" for x, name in zip(classes, found) if x != name]
        looks: dict[str, list[str]] = defaultdict(list)
        for name in classes:
            looks[_look(name)].append(name)
        for alike in looks.values():
            if len(set(alike)) < len(alike):
                raise UserError(f"{folder}: two classes are called {alike[0]}; rename one")
            if len(alike) > 1:
                self.left_out.append(f"classes that look alike stay apart: {' and '.join(map(ascii, alike))}")
        return classes

    def _note(self, listing: _Listing, shown: Path) -> None:
        self._others += listing.others
        self._nowhere += [str(shown / name) for name in listing.nowhere]

    def _leave_out_loose(self, beside: str, but: str = "") -> None:
        loose = [name for name in self.top.images if name != but]
        if loose and self.top.folders:
            self.left_out.append(f"{len(loose)} images beside {beside} left out, such as {loose[0]}")

    def _has_classes(self, name: str) -> bool:
        return any(_list(self.root / name / inner).images for inner in _list(self.root / name).folders)

    def _has_images(self, name: str) -> bool:
        return bool(_list(self.root / name).images) or self._has_classes(name)


def images_below(folder: Path) -> Iterator[Path]:
    """The images in a folder and its subfolders, in order, hidden and system's ones apart; links are not followed.

    Raises:
        OSError: a folder may not be read.
    """
    listing = _list(folder)
    yield from (folder / name for name in listing.images)
    for name in listing.folders:
        if not (folder / name).is_symlink():
            yield from images_below(folder / name)


def _list(folder: Path) -> _Listing:
    found = _Listing()
    with os.scandir(folder) as entries:  # which knows files from folders without asking about each
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            try:
                if entry.is_dir():
                    if name.lower() not in SYSTEM:
                        found.folders.append(name)
                elif suffix in OTHER_SUFFIXES:
                    found.others[suffix] += 1
                elif entry.is_file():
                    if suffix in SUFFIXES:
                        found.images.append(name)
                elif suffix in SUFFIXES or entry.is_symlink():
                    found.nowhere.append(name)
            except OSError:  # a link to itself
                found.nowhere.append(name)
    for names in (found.folders, found.images, found.nowhere):
        names.sort()
    return found


def _lot(seed: int, class_name: str, image: str) -> bytes:
    """A number that the seed and the names of class and file decide, alike on every machine."""
    return hashlib.sha256(f"{seed}/{class_name}/{image}".encode("utf-8", "surrogateescape")).digest()


def _files(folders: Sequence[Path], names: Sequence[list[str]]) -> Files:
    labels = np.repeat(np.arange(len(names), dtype=np.int64), [len(images) for images in names])
    return Files(tuple(folders), [image for images in names for image in images], labels)


def _text(name: str) -> str:
    """A folder's name as text, with the codes of bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _look(name: str) -> str:
    """What names that look alike have in common: without case, marks of no width, and ways to write the same letter."""
    letters = unicodedata.normalize("NFKC", _text(name)).casefold()
    return " ".join("".join(c for c in letters if unicodedata.category(c) != "Cf").split())


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


def _head(path: Path) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return hashlib.sha256(file.read(HEAD)).digest()
    return b""
