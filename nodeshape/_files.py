"""Files that are whole or not there: written beside their place and moved into it. Imports nothing of the package."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers stay
    fcntl = None  # type: ignore[assignment]

#: Names of files and folders that are being written, or that a kill left half written.
PARTIAL = ".*.partial-*"
#: Arguments of renameat2, as in <fcntl.h> and <linux/fs.h>.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


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
        with locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as lock:
        while True:
            folder = partial_path(path)
            folder.mkdir()
            lock.enter_context(locked(folder))
            if folder.exists():  # no other process took it for a leftover before it was locked
                break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Move a finished partial folder to ``path``; a folder there is replaced in one moment, and removed.

    Its files are on disk before, so that a power cut leaves one or the other too. Where a system cannot exchange two
    folders, the old one is put aside first: :func:`put_back` undoes that after a kill.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        folder.rename(path)
    elif not _exchange(folder, path):
        old = path.with_name(f".{path.name}.old-{secrets.token_hex(8)}")  # not a partial folder, which may be cleared
        path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> None:
    """Put a folder back in its place if a kill took it out of there and put nothing in."""
    aside = sorted(path.parent.glob(f".{escape(path.name)}.old-*"), key=lambda old: old.stat().st_mtime)
    if aside and not path.exists():
        aside[-1].rename(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one moment (renameat2 of Linux); False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold the lock of a folder within; False if another holds it, None where folders have no locks.

    The system lets go of it when the process ends, however it ends. Nothing is written.
    """
    if fcntl is None:
        yield None
        return
    handle = None
    held: bool | None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    except OSError:  # a file system without locks
        held = None
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)
