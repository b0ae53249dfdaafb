"""What a classifier trains and is tested on: drawn shapes, or the images of a user's folder, in memory or streamed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nodeshape._data.folder import Files, same_files, scan_folder
from nodeshape._data.images import CHANNELS, ImageError, load_folder
from nodeshape._data.shapes import CLASSES, draw_set
from nodeshape._data.streaming import StreamedSplit, as_float
from nodeshape._errors import UserError

DRAWN_TRAIN_SIZE, DRAWN_TEST_SIZE = 2700, 6000
#: A folder of more images, or of more bytes once decoded, is streamed: alike on every machine, so that a run can move.
MEMORY_FILES, MEMORY_BYTES = 100_000, 2 * 2**30


@dataclass
class Split:
    """Images uint8 ``[n, channels, size, size]`` and labels int64 ``[n]`` in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Images uint8 ``[len(index), channels, size, size]``."""
        return self.images[list(index)]

    def batch(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], and labels."""
        return as_float(self.images[index], device), self.labels[index].to(device, non_blocking=True)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Generator[tuple[Tensor, Tensor], None, None]:
        """For each of the index tensors, its :meth:`batch`."""
        return (self.batch(index, device) for index in indices)

    def digest(self, digest: Any) -> None:
        """Update a hash with every image and label."""
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.numpy().data)


@dataclass
class Data:
    """Training and test images, the names of their classes, and what of the user's folder is not used.

    Attributes:
        unreadable: files that could not be read into memory.
        left_out: what else is not used, or not as it may be meant, a line each.
    """

    classes: list[str]
    train: Split | StreamedSplit
    test: Split | StreamedSplit
    unreadable: list[ImageError]
    left_out: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A digest of classes, labels and images (of a streamed split: its files' names), to know the data by."""
        digest = sha256("/".join(self.classes).encode())
        for split in (self.train, self.test):
            split.digest(digest)
        return digest.hexdigest()


def drawn_data(task: str, train_size: int, test_size: int, image_size: int, channels: str, seed: int) -> Data:
    """Draw ``train_size`` and ``test_size`` images of a task; no image is in both."""
    splits: dict[str, Split] = {}
    for name, count in (("train", train_size), ("test", test_size)):
        images, labels = draw_set(task, name, count, seed, image_size)
        colours = torch.from_numpy(images).expand(-1, CHANNELS[channels], -1, -1)
        splits[name] = Split(colours, torch.from_numpy(labels))
    return Data(list(CLASSES[task]), splits["train"], splits["test"], unreadable=[])


def folder_data(
    root: Path,
    train_size: int | None,
    test_size: int | None,
    image_size: int,
    channels: str,
    seed: int,
    strict: bool,
    stream: bool = False,
    readers: int | None = None,
) -> Data:
    """Read a folder of images, at most ``train_size`` and ``test_size`` of them (a choice that ``seed`` fixes).

    With ``stream``, or if there are many (``MEMORY_FILES``, ``MEMORY_BYTES``), they are read while training,
    by ``readers`` threads (default: one per core).

    Raises:
        UserError: the folder has no usable classes, or with ``strict`` a file is unreadable, or something left out.
    """
    folder = scan_folder(root, seed, strict=strict)
    chosen = [_choose(folder.train, train_size, seed), _choose(folder.test, test_size, seed)]
    if len(set(chosen[0].labels.tolist())) < 2:
        raise UserError(f"{root}: the training images are all of one class; raise --train-size")
    count = sum(map(len, chosen))
    left_out = [*folder.left_out, *(_shared(root, chosen[0], chosen[1], strict) if count <= MEMORY_FILES else ())]
    if stream or count > MEMORY_FILES or count * CHANNELS[channels] * image_size**2 > MEMORY_BYTES:
        train, test = (StreamedSplit(files, image_size, channels, strict, readers) for files in chosen)
        return Data(list(folder.classes), train, test, [], left_out)
    loaded = [load_folder(files, image_size, channels, strict) for files in chosen]
    own, other = (Split(torch.from_numpy(x.images), torch.from_numpy(x.labels)) for x in loaded)
    return Data(list(folder.classes), own, other, loaded[0].unreadable + loaded[1].unreadable, left_out)


def _shared(root: Path, train: Files, test: Files, strict: bool) -> list[str]:
    """A line on training files that are test files too, if there are some."""
    pairs = same_files(train, test)
    if not pairs:
        return []
    own, other = (path.relative_to(root) for path in pairs[0])
    line = f"{len(pairs)} training images are test images too, such as {own} = {other}: the test accuracy is too high"
    if strict:
        raise UserError(f"{root}: {line}; mend this, or leave out --strict")
    return [line]


def _choose(files: Files, size: int | None, seed: int) -> Files:
    if size is None or size >= len(files):
        return files
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return files.take(sorted(order[:size].tolist()))
