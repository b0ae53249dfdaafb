"""The pictures of a run: of bounded size whatever the number of classes, and of names of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from matplotlib import pyplot
from matplotlib.font_manager import fontManager
from PIL import Image

from nodeshape._training import lettering as lettering_module
from nodeshape._training import plots
from nodeshape._training.lettering import lettering
from nodeshape._training.trainer import EpochMetrics


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What pictures say, and whether it is read as TeX."""
    found: list[tuple[str, bool]] = []
    close = pyplot.close

    def look(figure: Any) -> None:
        found.extend((text.get_text(), text.get_parse_math()) for text in figure.findobj(pyplot.Text))
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    return found


def confused(classes: int, images: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and predictions of which those of class 5 are mostly class 7 and a few others are wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    labels[:100] = 5
    predicted = torch.where(torch.rand(images, generator=generator) < 0.9, labels, (labels + 1) % classes)
    predicted[:100] = 7
    return labels, predicted


@pytest.mark.parametrize("classes", [2, pytest.param(150, marks=pytest.mark.slow), 1000])
def test_a_confusion_matrix_is_of_bounded_size_and_names_the_most_confused_classes(
    classes: int, tmp_path: Path, texts: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "CONFUSION_CLASSES", 8)
    labels, predicted = confused(max(classes, 8))
    names = [f"class {k}" for k in range(classes)]
    plots.confusion_matrix(labels % classes, predicted % classes, names, "title", "score", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 1000
    said = {text for text, _ in texts}
    if classes > 8:
        assert {"class 5", "class 7", "all others"} <= said
        assert len(said & set(names)) == 8 and f"title\nscore\nthe 8 most confused of {classes:,} classes" in said
    else:
        assert set(names) <= said and "all others" not in said


def test_every_image_is_counted_in_the_matrix_of_the_most_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "CONFUSION_CLASSES", 5)
    shown: list[np.ndarray[Any, Any]] = []
    monkeypatch.setattr(plots, "_brief", lambda count: shown.append(count) or str(count))
    plots.confusion_matrix(*confused(40), [str(k) for k in range(40)], "title", "score", tmp_path / "c.png")
    assert sum(map(int, shown)) == 3000


STRANGE = ["$100$", "a_b^c", "{x", "a\nb", "\x1b[31m", "\udcff", "", "very " * 20, "%s", "\\alpha"]


def test_strange_names_are_written_as_they_are_in_every_picture(tmp_path: Path, texts: list[tuple[str, bool]]) -> None:
    title = "photos of $5^$"
    labels, predicted = confused(len(STRANGE))
    probabilities = torch.nn.functional.one_hot(predicted, len(STRANGE)).float()
    plots.confusion_matrix(labels, predicted, STRANGE, title, "score", tmp_path / "c.png")

    def images(index: list[int]) -> torch.Tensor:
        return torch.zeros(len(index), 1, 8, 8, dtype=torch.uint8)

    plots.samples(images, labels, probabilities, STRANGE, title, "score", tmp_path / "s.png")
    plots.learning_curve([EpochMetrics(1, 1.0, 0.5, 1, 1, 1, 1)], title, tmp_path / "l.png")
    said = [text for text, _ in texts]
    assert not any(tex for text, tex in texts if text)
    for name in ("$100$", "a_b^c", "{x", "a\\x0ab", "\\x1b[31m", "\\udcff", "%s", "\\alpha"):
        assert name in said, name
    assert sum(title in text for text in said) == 3
    assert max(len(line) for text in said for line in text.splitlines()) < 70


def test_the_learning_curve_names_its_two_lines(tmp_path: Path, texts: list[tuple[str, bool]]) -> None:
    plots.learning_curve([EpochMetrics(k, 1 / k, 0.5, 1, 1, 1, 1) for k in (1, 2)], "title", tmp_path / "l.png")
    assert {"test accuracy", "training loss"} <= {text for text, _ in texts}


def font_with(character: str, path: Path, name: str) -> None:
    """A font of one character, a square."""
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "glyph"])
    builder.setupCharacterMap({ord(character): "glyph"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "glyph": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "glyph": (800, 50)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)


def test_a_character_is_taken_from_any_font_that_has_it_and_is_a_number_where_none_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    character = "\U00013000"  # an Egyptian hieroglyph
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if f.name.startswith("DejaVu")])
    lettering_module._say.cache_clear()
    for _ in range(2):
        with lettering("title", [f"a{character}"]) as (_, (name,)):
            assert name == "a\\U00013000"
    assert capsys.readouterr().err.count("U+13000") == 1

    font_with(character, tmp_path / "hieroglyphs.ttf", "Some Hieroglyphs")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(tmp_path / "hieroglyphs.ttf")
    with lettering("title", [f"a{character}"]) as (_, (name,)):
        assert name == f"a{character}"
        assert pyplot.rcParams["font.family"][-1] == "Some Hieroglyphs"
    plots.confusion_matrix(*confused(8), [character] * 8, "title", "score", tmp_path / "c.png")
    assert capsys.readouterr().err == ""
