"""Files that are whole or not there: written beside their place and moved into it. Imports nothing of the package."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers stay
    fcntl = None  # type: ignore[assignment]

#: Names of files and folders that are being written, or that a kill left half written.
PARTIAL = ".*.partial-*"


def partial_path(path: Path) -> Path:
    """A name beside ``path`` to write it under; no two processes, on any machine, get the same."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a kill, sees the old file or the new one."""
    temporary = partial_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to be filled and moved to it; what is left of it at the end is removed.

    Leftovers of killed processes for the same ``path`` are removed too. Each folder is locked as long as its process
    lives, so one that is being filled by another process is known from a leftover.
    """
    for left in path.parent.glob(f".{escape(path.name)}.partial-*"):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    folder = partial_path(path)
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder within; False if another process holds it, or where folders have none."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        held = False
        if handle is not None:
            with suppress(OSError):  # held by another, or a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
        yield held
    finally:
        if handle is not None:
            os.close(handle)
