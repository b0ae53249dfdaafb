"""What every command shares: one clear line for a user's mistake, argument types that name what they expect."""

from __future__ import annotations

import argparse
import io
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from nodeshape._errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser of ``python -m nodeshape.<command>`` whose errors are one line."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"python -m nodeshape.{command}",
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (usage: {self.prog} --help)")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after a user's mistake or a failed file operation, 130 after Ctrl-C."""
    # Pillow's warning about a large image; _data.images refuses such images with an error of its own.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names that are not text
    signal.signal(signal.SIGTERM, _interrupt)  # so that what is half done is undone
    try:
        main()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror}", 2)
    sys.exit(0)


@contextmanager
def user_input() -> Iterator[None]:
    """Around code that checks what the user asked for: its ``ValueError`` is the user's mistake, not a bug."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def picture(path: Path) -> Iterator[None]:
    """Around code that draws ``path`` from finished results: what fails is one line on stderr, and they stand."""
    try:
        yield
    except Exception as error:  # matplotlib, fonts, memory, the disk: nothing here may fail what was computed
        print(f"{path} could not be drawn: {type(error).__name__}: {_one_line(str(error))}", file=sys.stderr)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number from ``low`` to ``high``, both included."""
    expected = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive_int = whole(1)
seed = whole(0, 2**32 - 1)


def positive_float(text: str) -> float:
    """An argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # also false for nan
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def existing_path(text: str) -> Path:
    """An argument type: a file or folder that exists."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such file or folder: {text!r}")
    return path


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    sys.exit(code)


def _one_line(message: str) -> str:
    return " ".join(message.splitlines())
