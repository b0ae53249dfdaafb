"""Images read from disk while they are trained on, some batches ahead: a folder need not fit into memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nodeshape._cli import cores, printable
from nodeshape._data.folder import Files
from nodeshape._data.images import ImageError, load_image
from nodeshape._errors import UserError

#: Batches that are being read while one is trained on.
AHEAD = 4
#: Unreadable files that are named as they are met; the rest are counted.
NAMED = 10


class StreamedSplit:
    """Files as images uint8 ``[n, channels, size, size]`` and labels int64 ``[n]``, read when they are asked for.

    A file that cannot be read is named on stderr and passed over: the next readable one of its class, in the order of
    names and round to the first, takes its place, so that every batch is full and the same in every run.

    Args:
        files: to read.
        image_size: side in pixels.
        channels: ``"grey"`` or ``"rgb"``.
        strict: raise the ImageError of an unreadable file instead.
        readers: threads that read ahead (default: one per core).

    Attributes:
        unreadable: paths of the files passed over so far.
    """

    def __init__(
        self, files: Files, image_size: int, channels: str, strict: bool = False, readers: int | None = None
    ) -> None:
        self.readers = readers or cores()
        self.files, self.image_size, self.channels, self.strict = files, image_size, channels, strict
        self.labels = torch.from_numpy(files.labels)
        self.unreadable: set[Path] = set()
        self._passed_over: dict[int, int] = {}  # unreadable files to the next that was readable
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Images uint8 ``[len(index), channels, size, size]``."""
        return torch.from_numpy(np.stack(self._read_all(index)))

    def batch(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], and labels."""
        return next(self.batches([torch.arange(len(self))[index]], device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Generator[tuple[Tensor, Tensor], None, None]:
        """For each of the index tensors, its images as float32 in [0, 1], and its labels; threads read ahead."""
        pool = ThreadPoolExecutor(self.readers)  # Pillow decodes without holding Python's lock
        waiting: deque[tuple[Tensor, list[Future[list[NDArray[np.uint8]]]]]] = deque()

        def take() -> tuple[Tensor, Tensor]:
            index, parts = waiting.popleft()
            images = [image for part in parts for image in part.result()]
            pixels = torch.from_numpy(np.stack(images) if images else self._nothing())
            return as_float(pixels, device), self.labels[index].to(device)

        try:
            for index in indices:
                parts = [pool.submit(self._read_all, part.tolist()) for part in index.tensor_split(self.readers)]
                waiting.append((index, parts))
                if len(waiting) > AHEAD:
                    yield take()
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)

    def digest(self, digest: Any) -> None:
        """Update a hash with every name and label; the files themselves are not read."""
        digest.update("/".join(self.files.names).encode(errors="surrogateescape"))
        digest.update(self.files.labels.data)

    def _nothing(self) -> NDArray[np.uint8]:
        return np.empty((0, 1 if self.channels == "grey" else 3, self.image_size, self.image_size), np.uint8)

    def _read_all(self, index: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [self._read(i) for i in index]

    def _read(self, index: int) -> NDArray[np.uint8]:
        """The image at ``index``, or the next readable one of its class.

        Raises:
            ImageError: the file is unreadable and ``strict`` is set.
            UserError: no file of the class is readable.
        """
        label = self.files.labels[index]
        first, end = np.searchsorted(self.files.labels, [label, label + 1]).tolist()
        count, gone = end - first, 0
        tried: list[int] = []
        i = index
        while True:
            while (following := self._passed_over.get(i)) is not None:
                tried.append(i)
                gone += (following - i) % count or count
                if gone >= count:
                    raise UserError(f"{self.files.folders[label]}: none of its images is readable")
                i = following
            try:
                image = load_image(self.files[i][0], self.image_size, self.channels)
            except ImageError as error:
                if self.strict:
                    raise
                if not self.files.folders[label].is_dir():
                    raise UserError(f"{self.files.folders[label]}: is no longer there") from error
                self._report(error, i, i + 1 if i + 1 < end else first)
                continue
            if len(tried) > 1:
                self._passed_over.update(dict.fromkeys(tried, i))  # so that a row of them is gone through once
            return image

    def _report(self, error: ImageError, index: int, following: int) -> None:
        """Name an unreadable file, and pass it over from now on."""
        with self._lock:
            self._passed_over[index] = following
            new = error.path not in self.unreadable
            self.unreadable.add(error.path)
            if new and len(self.unreadable) <= NAMED:
                tqdm.write(printable(f"skipped {error}"), file=sys.stderr)


def as_float(images: Tensor, device: torch.device) -> Tensor:
    """Images uint8 as float32 in [0, 1] on ``device``."""
    return images.to(device, non_blocking=True).to(torch.float32) / 255
