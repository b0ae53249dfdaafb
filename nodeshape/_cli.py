"""What every command shares: one clear line for a user's mistake, argument types that name what they expect."""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TextIO, TypeVar, cast

from nodeshape._errors import UserError

T = TypeVar("T")

#: Signals, besides Ctrl-C's, that ask a command to end; Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: The exit code of a command whose reader has gone, as of programs that SIGPIPE ends.
UNHEARD = 141
#: Characters without a width that scripts and emoji need.
JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    r"""A text as one line that shows what is in it and does nothing else to a terminal.

    Line ends, escape sequences, marks that reverse the writing and bytes that are no text are written as ``\n``,
    ``\x1b``, ``\u202e`` and ``\xff``.
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if _is_shown(c) else _escaped(c) for c in text)


def say(*lines: object, error: bool = False) -> None:
    """Print each line, whatever is in it, as one line (:func:`printable`); end the command quietly if nobody reads.

    Args:
        lines: to print at once.
        error: on stderr.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        for line in lines:
            print(printable(line), file=stream)
        stream.flush()
    except BrokenPipeError:  # as after | head -1
        _to_nowhere(stream)
        sys.exit(UNHEARD)


def shell_word(path: Path) -> str:
    """A path as one word of a command line that the user may copy."""
    text = str(path)
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + "".join(_shell_byte(byte) for byte in os.fsencode(text)) + "'"


def cores() -> int:
    """The number of cores that this process may use: those of its affinity, where the system has such a thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class _Lasting:
    """A stream that goes on when its reader has ended, its terminal has closed or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        _to_nowhere(self._stream)
        if self._stream is sys.__stdout__:
            say(f"going on without an output: {error.strerror}", error=True)


def run(main: Callable[[], None], though_unheard: bool = False) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after a user's mistake or a failed file operation, 130 after Ctrl-C.

    Args:
        main: the command.
        though_unheard: go on where what it prints can no longer be written, as after ``| head -1``.
    """
    # Pillow's warning about a large image; _data.images refuses such images with an error of its own.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal does not have
    for kind in ENDING:  # so that what is half done is undone
        if signal.getsignal(kind) == signal.SIG_DFL:  # and not ignored, as SIGHUP is under nohup
            signal.signal(kind, _interrupt)
    if though_unheard:
        sys.stdout, sys.stderr = cast("TextIO", _Lasting(sys.stdout)), cast("TextIO", _Lasting(sys.stderr))
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
        what = " ".join(str(error).splitlines())
        say(f"{path} could not be drawn: {type(error).__name__}: {what}", error=True)


@dataclass(frozen=True)
class ArgumentType(Generic[T]):
    """What a value must be: as the ``type`` of an argument it reads one, and :meth:`admits` checks one from a file.

    Attributes:
        kind: the type of the value, which makes one of a text.
        expected: what the value must be, in words.
        holds: whether a value of the type is that.
        options: all possible values, for the help, where these are a few words.
    """

    kind: Callable[[str], T]
    expected: str
    holds: Callable[[T], bool]
    options: tuple[str, ...] = ()

    def __call__(self, text: str) -> T:
        """The value that ``text`` stands for."""
        with suppress(ValueError):
            value = self.kind(text)
            if self.holds(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text!r}")

    def admits(self, value: Any) -> bool:
        """Whether ``value``, of any type, is one."""
        return type(value) is self.kind and self.holds(value)


def whole(low: int, high: int | None = None) -> ArgumentType[int]:
    """A whole number from ``low`` to ``high``, both included."""
    expected = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
    return ArgumentType(int, expected, lambda value: value >= low and (high is None or value <= high))


positive_int = whole(1)
positive_float = ArgumentType(float, "a finite number above 0", lambda value: 0 < value < math.inf)
seed = whole(0, 2**32 - 1)


def one_of(options: Collection[str]) -> ArgumentType[str]:
    """One of some words."""
    return ArgumentType(str, f"one of {', '.join(options)}", lambda value: value in options, tuple(options))


def existing_path(text: str) -> Path:
    """An argument type: a file or folder that exists."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"no such file or folder: {text!r}")
    return path


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {message}", error=True)
    sys.exit(code)


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in JOINERS


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file's name that is no text
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _shell_byte(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}"


def _to_nowhere(stream: TextIO) -> None:
    """Let what is written to a stream from now on vanish, what it still holds too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
