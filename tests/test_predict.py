"""``python -m nodeshape.predict``: classes of image files from an exported model, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from nodeshape import ShapeClassifier, _cli, predict
from nodeshape._data.images import load_image
from nodeshape._data.shapes import draw
from nodeshape._exporting.export_folder import write_classifier_onnx

CLASSES = ["circle", "a longer name", "Dreieck ∆"]


def write_model(path, channels="grey", size=24, **metadata):
    torch.manual_seed(1)
    count = 1 if channels == "grey" else 3
    model = ShapeClassifier(3, image_size=size, in_channels=count, width=8, steps=2).eval()
    metadata = {"classes": json.dumps(CLASSES), "image_size": str(size), "channels": channels, **metadata}
    write_classifier_onnx(model, torch.rand(2, count, size, size), Path(path), metadata)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``model.onnx`` and images of several sizes and formats beside it."""
    folder = tmp_path_factory.mktemp("predict")
    folder.joinpath("images", "sub").mkdir(parents=True)
    write_model(folder / "model.onnx")
    write_model(folder / "rgb.onnx", "rgb")
    for index, (name, side) in enumerate((("a.png", 24), ("b.jpg", 91), ("c.webp", 40), ("sub/d.bmp", 200))):
        Image.fromarray(draw("single", 0, index, side)[0]).save(folder / "images" / name)
    (folder / "images" / "contact_sheet.png").write_text("what `data` leaves beside the classes")
    (folder / "text.png").write_text("not an image")
    return folder


def expected(model, path, channels="grey"):
    image = torch.tensor(load_image(path, 24, channels))[None].float() / 255
    with torch.no_grad():
        return model(image).softmax(dim=1)[0].numpy()


@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_json_gives_pytorchs_probabilities_for_any_size_and_format(folder, tmp_path, capsys, channels):
    model = write_model(tmp_path / "model.onnx", channels)
    predict.main([str(tmp_path / "model.onnx"), str(folder / "images"), "--json"])
    items = json.loads(capsys.readouterr().out)
    names = ["a.png", "b.jpg", "c.webp", "sub/d.bmp"]
    assert [item["file"] for item in items] == [str(folder / "images" / name) for name in names]
    for item in items:
        probabilities = expected(model, item["file"], channels)
        np.testing.assert_allclose(list(item["probabilities"].values()), probabilities, atol=1e-5)
        assert list(item["probabilities"]) == CLASSES
        assert item["class"] == CLASSES[probabilities.argmax()]
        assert item["probability"] == max(item["probabilities"].values())


def test_the_table_is_aligned(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    predict.main(["model.onnx", "images/sub/d.bmp", "images/a.png"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "class", "probability"]
    assert [row.split()[0] for row in rows] == ["images/sub/d.bmp", "images/a.png"]
    column = header.index("class")
    assert all(row[column - 1] == " " and row[column:].startswith(tuple(CLASSES)) for row in rows)
    assert {len(row) for row in rows} == {len(header)}


def test_more_images_than_a_batch_come_out_in_order(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    names = [folder / "images" / name for name in ("a.png", "b.jpg", "c.webp")] * 3
    predict.main([str(folder / "model.onnx"), *map(str, names[:8]), "--json"])
    items = json.loads(capsys.readouterr().out)
    assert [item["file"] for item in items] == [str(name) for name in names[:8]]
    np.testing.assert_allclose(items[0]["probability"], items[3]["probability"], rtol=1e-5)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_unreadable_images_are_named_and_the_others_classified(folder, capsys, monkeypatch, arguments):
    monkeypatch.chdir(folder)
    images = ["text.png", "images/a.png", "gone.png", "images/b.jpg"]
    with pytest.raises(SystemExit) as stopped:
        predict.main(["model.onnx", *images, *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert [line.split(": ")[:2] for line in err.splitlines()] == [["error", "text.png"], ["error", "gone.png"]]
    if arguments:
        assert [item["file"] for item in json.loads(out)] == ["images/a.png", "images/b.jpg"]
    else:
        assert [line.split()[0] for line in out.splitlines()] == ["file", "images/a.png", "images/b.jpg"]


def test_no_readable_image_is_an_empty_list(folder, capsys):
    with pytest.raises(SystemExit):
        predict.main([str(folder / "model.onnx"), str(folder / "text.png"), "--json"])
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        ("gone.onnx", "images/a.png", "gone.onnx: no such file"),
        ("images", "images/a.png", "images: is a folder; name its model.onnx"),
        ("text.png", "images/a.png", "text.png: not an ONNX model"),
        ("bare.onnx", "images/a.png", "bare.onnx: lacks the metadata"),
        ("wrong.onnx", "images/a.png", "wrong.onnx: lacks the metadata"),
        ("model.onnx", "empty", "empty: a folder without images"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(folder, monkeypatch, capsys, model, image, message):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    bare = onnx.load("model.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, "bare.onnx")
    write_model("wrong.onnx", classes='["two", "names"]')
    with pytest.raises(SystemExit) as stopped:
        _cli.run(lambda: predict.main([model, image]))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {message}")


def test_neither_torch_nor_training_packages_are_imported(folder):
    code = (
        "import sys; from nodeshape import predict; predict.main(sys.argv[1:]);"
        "print(*sorted({'torch', 'tqdm', 'matplotlib', 'onnx', 'onnxscript'} & set(sys.modules)), file=sys.stderr)"
    )
    line = [sys.executable, "-c", code, str(folder / "model.onnx"), str(folder / "images" / "a.png")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert len(done.stdout.splitlines()) == 2


def test_a_picture_without_contrast_is_said_to_be_empty(folder, tmp_path, capsys):
    pale = np.full((40, 60), 200, np.uint8)
    pale[10:20, 10:20] += 7
    faint = np.full((40, 60), 200, np.uint8)
    faint[10:30, 10:40] += 8
    for name, pixels in (("white", np.full((30, 30), 255, np.uint8)), ("pale", pale), ("faint", faint)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("white", "pale", "faint")]
    predict.main([str(folder / "model.onnx"), *files])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-2:] for row in rows[:2]] == [["(empty)", "-"]] * 2
    assert 0 < float(rows[2][-1]) <= 1
    predict.main([str(folder / "model.onnx"), *files, "--json"])
    items = json.loads(capsys.readouterr().out)
    assert [item["empty"] for item in items] == [True, True, False]
    assert (
        [item["class"] is None for item in items]
        == [item["probability"] is None for item in items]
        == [True, True, False]
    )
    assert all(sum(item["probabilities"].values()) == pytest.approx(1) for item in items)
