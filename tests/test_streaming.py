"""Streamed folders: the numbers of a folder in memory, damage passed over in a way that repeats, little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from wobbly import write_photos

from nodeshape._data import datasets, streaming
from nodeshape._data.datasets import Data, Split, folder_data
from nodeshape._data.images import ImageError, load_image
from nodeshape._data.streaming import AHEAD, StreamedSplit
from nodeshape._errors import UserError
from nodeshape._models.classifier import ShapeClassifier
from nodeshape._training.recipe import Recipe
from nodeshape._training.trainer import Trainer
from nodeshape.train import main

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty images of three classes."""
    return write_photos(tmp_path / "data", 60)


def read(folder: Path, stream: bool, strict: bool = False) -> Data:
    return folder_data(folder, None, None, 16, "grey", seed=0, strict=strict, stream=stream)


def trained(data: Data) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    trainer = Trainer(
        ShapeClassifier(3, image_size=16, step_size=0.5), data, Recipe(epochs=2, batch_size=16), torch.device("cpu")
    )
    for _ in trainer.train():
        pass
    return trainer.model.state_dict()


def test_streamed_and_in_memory_training_give_identical_weights(folder: Path) -> None:
    streamed, in_memory = read(folder, stream=True), read(folder, stream=False)
    assert isinstance(streamed.train, StreamedSplit) and isinstance(in_memory.train, Split)
    expected = trained(in_memory)
    for name, value in trained(streamed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("limit", "value"), [("MEMORY_FILES", 59), ("MEMORY_BYTES", 60 * 16 * 16 - 1)])
def test_a_large_folder_is_streamed_unasked(
    folder: Path, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, limit, value + 1)
    assert isinstance(read(folder, stream=False).train, Split)
    monkeypatch.setattr(datasets, limit, value)
    assert isinstance(read(folder, stream=False).train, StreamedSplit)


def test_no_more_images_are_read_than_the_batches_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read(folder, stream=True)
    assert isinstance(data.train, StreamedSplit)
    asked: list[int] = []
    monkeypatch.setattr(data.train, "_read", lambda i: asked.append(i) or torch.zeros(1, 16, 16).numpy())
    batches = data.train.batches((torch.tensor([i]) for i in range(40)), CPU)
    next(batches)
    batches.close()
    assert len(asked) <= AHEAD + 1


def test_an_unreadable_file_is_replaced_by_the_next_of_its_class_and_named_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = read(folder, stream=True).train
    assert isinstance(split, StreamedSplit)
    first_of_class_1 = int((split.labels == 1).nonzero()[0])
    last_of_class_1 = int((split.labels == 1).nonzero()[-1])
    split.files[last_of_class_1][0].write_text("not an image")
    expected = split.pixels([first_of_class_1])
    for _ in range(2):
        images, labels = next(split.batches([torch.tensor([last_of_class_1])], CPU))
        assert torch.equal(images, expected / 255) and labels.tolist() == [1]
    assert capsys.readouterr().err.count("skipped") == 1
    assert list(split.unreadable) == [split.files[last_of_class_1][0]]


def test_an_unreadable_file_stops_a_strict_run(folder: Path) -> None:
    split = read(folder, stream=True, strict=True).train
    assert isinstance(split, StreamedSplit)
    split.files[3][0].write_text("not an image")
    with pytest.raises(ImageError, match=split.files[3][0].name):
        list(split.batches([torch.arange(6)], CPU))


def test_a_class_without_a_readable_file_ends_the_run_in_one_line(folder: Path) -> None:
    split = read(folder, stream=True).train
    assert isinstance(split, StreamedSplit)
    for path in (folder / "class2").iterdir():
        path.write_text("not an image")
    with pytest.raises(UserError, match="class2: none of its images is readable"):
        list(split.batches(torch.arange(len(split)).split(7), CPU))


def test_a_streamed_run_is_resumed_only_with_the_same_files(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--stream", "--image-size", "16", "--step-size", "0.5", "--epochs", "1"]
    main([*arguments, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "samples.png").exists()
    main(["--resume", "--out", str(tmp_path / "run")])
    Image.new("L", (16, 16)).save(folder / "class0" / "new.png")
    with pytest.raises(UserError, match="images have changed"):
        main(["--resume", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("readable", [0, 19])
def test_a_row_of_unreadable_files_is_read_once(
    folder: Path, readable: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the readable file is the first of its class or the last; otherwise the time would be their square."""
    split = read(folder, stream=True).train
    assert isinstance(split, StreamedSplit)
    own = [i for i in range(len(split)) if split.labels[i] == 1]
    kept = own[min(readable, len(own) - 1)]
    for i in own:
        if i != kept:
            split.files[i][0].write_text("not an image")
    expected, reads = split.pixels([kept]), []
    monkeypatch.setattr(streaming, "load_image", lambda path, *how: reads.append(path) or load_image(path, *how))
    for _ in range(2):
        assert torch.equal(split.pixels(own), expected.expand(len(own), -1, -1, -1))
    assert sum(path != split.files[kept][0] for path in reads) == len(own) - 1
    split.files[kept][0].write_text("not an image")
    for i in own:
        with pytest.raises(UserError, match="none of its images is readable"):
            split.pixels([i])
