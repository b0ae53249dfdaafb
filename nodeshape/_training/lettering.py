"""Names as they are written in pictures: in any script that a font is there for, of bounded length, never as TeX."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from nodeshape._cli import say

#: Most letters of a title, wide ones counting twice.
TITLE = 60


@contextmanager
def lettering(title: str, names: Sequence[str], longest: int = 28) -> Iterator[tuple[str, list[str]]]:
    r"""Within, pictures show text as it is; yields a title and names as they can be written.

    A character that matplotlib's own font lacks is taken from the first installed font, in the order of their names,
    that has it. One that no font has, or that is not printable, is written as its number (``\u4e2d``); what to install
    is said in a line. Names of more than ``longest`` letters, wide ones counting twice, lose their middle.
    """
    wanted = {ord(c) for text in (title, *names) for c in text if c.isprintable()}
    fonts, missing = _fonts_for(wanted)
    if missing:
        _say(frozenset(missing))
    known = wanted - missing
    with matplotlib.rc_context({"text.usetex": False, "text.parse_math": False, "font.family": fonts}):
        yield _written(title, known, TITLE), [_written(name, known, longest) for name in names]


def _fonts_for(characters: set[int]) -> tuple[list[str], set[int]]:
    """Names of fonts that together have the characters, matplotlib's own first, and the characters that none has."""
    fonts = list(matplotlib.rcParams["font.family"])
    missing = characters - set(get_font(findfont(FontProperties())).get_charmap())
    for entry in sorted(fontManager.ttflist if missing else (), key=lambda entry: entry.name):
        regular = entry.style == "normal" and entry.weight == 400
        if not regular or entry.name.startswith("Last Resort"):  # which draws any character as a box
            continue
        with suppress(OSError, RuntimeError, ValueError):  # a file that is gone, or that FreeType does not read
            found = missing & set(get_font(entry.fname).get_charmap())
            if found:
                fonts.append(entry.name)
                missing -= found
    return fonts, missing


@cache  # once for all pictures of a run
def _say(missing: frozenset[int]) -> None:
    some = " ".join(f"U+{code:04X}" for code in sorted(missing)[:5])
    say(
        f"pictures: no font has {len(missing)} characters of the names in them ({some}), written as numbers;"
        " install one that has them, such as Noto (on Debian: fonts-noto-core, fonts-noto-cjk)",
        error=True,
    )


def _written(text: str, known: set[int], longest: int) -> str:
    """A text of ``known`` characters, numbers in place of others, its middle left out if it is too long."""
    letters = [c if ord(c) in known else _number(c) for c in text]
    if _width(letters) <= longest:
        return "".join(letters)
    start: list[str] = []
    end: list[str] = []
    for first, last in zip(letters, reversed(letters)):
        if _width([*start, first, last, *end]) >= longest:
            break
        start, end = [*start, first], [last, *end]
    return "".join([*start, "…", *end])


def _width(letters: Sequence[str]) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for letter in letters for c in letter)


def _number(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )
