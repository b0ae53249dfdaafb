"""A user's folder of another kind of picture: the handwritten digits of scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nodeshape.train import main


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """1,797 PNG files of 8 × 8 pixels, one folder per digit."""
    loaded = pytest.importorskip("sklearn.datasets").load_digits()
    for index, (image, digit) in enumerate(zip(loaded.images, loaded.target)):
        path = tmp_path / "digits" / str(digit) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)
    return tmp_path / "digits"


@pytest.mark.slow
def test_digits_are_learned_to_98_percent(digits: Path, tmp_path: Path) -> None:
    settings = ["--image-size", "16", "--step-size", "0.25", "--epochs", "5", "--device", "cpu"]
    main(["--data", str(digits), *settings, "--out", str(tmp_path / "run")])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] >= 0.98
