"""What a classifier trains and is tested on: drawn shapes, or the images of a user's folder, as tensors in memory."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from nodeshape._cli import UserError
from nodeshape._images import CHANNELS, ImageError, load_folder, scan_folder
from nodeshape._shapes import CLASSES, draw_set

DRAWN_TRAIN_SIZE, DRAWN_TEST_SIZE = 2700, 6000


@dataclass
class Split:
    """Images uint8 ``[n, channels, size, size]`` and labels int64 ``[n]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], and labels."""
        images = self.images[index].to(device, non_blocking=True)
        return images.to(torch.float32) / 255, self.labels[index].to(device, non_blocking=True)


@dataclass
class Data:
    """Training and test images, the names of their classes, and the files that could not be read."""

    classes: list[str]
    train: Split
    test: Split
    unreadable: list[ImageError]

    def fingerprint(self) -> str:
        """A digest of every image, label and class, by which a resumed run knows its data."""
        digest = sha256("/".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(split.images.contiguous().numpy().data)
            digest.update(split.labels.numpy().data)
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
    root: Path, train_size: int | None, test_size: int | None, image_size: int, channels: str, seed: int, strict: bool
) -> Data:
    """Read a folder of images, at most ``train_size`` and ``test_size`` of them (a choice that ``seed`` fixes).

    Raises:
        UserError: the folder has no usable classes, or with ``strict`` a file is unreadable.
    """
    folder = scan_folder(root, seed)
    splits: dict[str, Split] = {}
    unreadable: list[ImageError] = []
    for name, files, size in (("train", folder.train, train_size), ("test", folder.test, test_size)):
        if size is not None and size < len(files):
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
            files = [files[i] for i in sorted(order[:size].tolist())]
        loaded = load_folder(files, image_size, channels, strict)
        splits[name] = Split(torch.from_numpy(loaded.images), torch.from_numpy(loaded.labels))
        unreadable += loaded.unreadable
    if len(splits["train"].labels.unique()) < 2:
        raise UserError(f"{root}: the training images are all of one class; raise --train-size")
    return Data(list(folder.classes), splits["train"], splits["test"], unreadable)
