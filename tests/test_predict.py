"""``python -m nodeshape.predict``: classes of image files from an exported model, without torch."""

import json
import os
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


def write_model(path, channels="grey", size=24, dtype=torch.float32, **metadata):
    torch.manual_seed(1)
    count = 1 if channels == "grey" else 3
    model = ShapeClassifier(3, image_size=size, in_channels=count, width=8, steps=2).eval()
    metadata = {"classes": json.dumps(CLASSES), "image_size": str(size), "channels": channels, **metadata}
    images = (255 * torch.rand(2, count, size, size)).to(dtype)
    write_classifier_onnx(model, images if dtype == torch.uint8 else images / 255, Path(path), metadata)
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


@pytest.mark.parametrize(("channels", "dtype"), [("grey", "float32"), ("rgb", "float32"), ("grey", "uint8")])
def test_json_gives_pytorchs_probabilities_for_any_size_and_format(folder, tmp_path, capsys, channels, dtype):
    model = write_model(tmp_path / "model.onnx", channels, dtype=getattr(torch, dtype))
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
        ("wrong.onnx", "images/a.png", "wrong.onnx: not a model of nodeshape's: expected an output logits [batch, 2]"),
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


HOSTILE = {
    "nested JSON": ({"classes": "[" * 100_000}, "its classes are not JSON"),
    "classes as a string": ({"classes": '"abc"'}, "not a list of names"),
    "classes as a dict": ({"classes": '{"a": 1, "b": 2, "c": 3}'}, "not a list of names"),
    "classes as numbers": ({"classes": "[1, 2, 3]"}, "not a list of names"),
    "doubled names": ({"classes": '["a", "b", "a"]'}, "two of its classes are called 'a'"),
    "too few classes": ({"classes": '["a", "b"]'}, "expected an output logits [batch, 2]"),
    "a large image": ({"image_size": "20000"}, "expected an image size of 1 to 1024 pixels, got '20000'"),
    "another image": ({"image_size": "25"}, "expected the one input image [batch, 1, 25, 25]"),
    "no image": ({"image_size": "-1"}, "expected an image size"),
    "digits of another script": ({"image_size": "\u0968\u096a"}, "expected an image size"),
    "other channels": ({"channels": "cmyk"}, "expected channels to be one of grey, rgb, got 'cmyk'"),
    "an escape sequence": ({"channels": "\x1b[2J\nerror"}, r"got '\\x1b[2J\\nerror'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_model_is_believed(folder, tmp_path, capsys, name):
    metadata, message = HOSTILE[name]
    model = onnx.load(folder / "model.onnx")
    for entry in model.metadata_props:
        entry.value = metadata.get(entry.key, entry.value)
    onnx.save(model, tmp_path / "bad.onnx")
    assert mistake(capsys, tmp_path / "bad.onnx", folder / "images" / "a.png").count(message.replace("\\\\", "\\")) == 1


@pytest.mark.parametrize("part", ["input", "output"])
def test_inputs_and_outputs_of_other_names_are_refused(folder, tmp_path, capsys, part):
    model = onnx.load(folder / "model.onnx")
    own = getattr(model.graph, part)[0]
    old, own.name = own.name, "other"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = "other"
    onnx.save(model, tmp_path / "bad.onnx")
    expected = {"input": "expected the one input image", "output": "expected an output logits"}[part]
    assert expected in mistake(capsys, tmp_path / "bad.onnx", folder / "images" / "a.png")


@pytest.mark.parametrize("name", [b"image", b"batch", b"classes"])
def test_a_model_whose_names_are_not_utf8_is_refused_in_one_line(folder, tmp_path, capsys, name):
    data = (folder / "model.onnx").read_bytes()
    assert name in data
    wrong = tmp_path / "model.onnx"
    wrong.write_bytes(data.replace(name, b"\xff" * len(name)))
    line = mistake(capsys, wrong, folder / "images" / "a.png")
    assert "not an ONNX model" in line or "metadata" in line


def mistake(capsys, *arguments):
    """What a command line that ends in exit code 2 says, one line of it."""
    with pytest.raises(SystemExit) as stopped:
        _cli.run(lambda: predict.main([*map(str, arguments)]))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, len(err.splitlines())) == (2, "", 1)
    return err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_said_and_leave_json_whole(folder, tmp_path, capsys, value):
    model = onnx.load(folder / "model.onnx")
    weights = next(x for x in model.graph.initializer if onnx.numpy_helper.to_array(x).shape == (3,))
    weights.CopyFrom(onnx.numpy_helper.from_array(np.full(3, value, np.float32), weights.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(tmp_path / "nan.onnx"), str(folder / "images" / "a.png"), "--json"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, json.loads(out)) == (2, [])
    assert err == f"error: {folder / 'images' / 'a.png'}: the model's logits of this image are not finite\n"


def test_threads_are_those_asked_for_or_those_of_the_affinity(folder, monkeypatch):
    monkeypatch.setattr(predict, "cores", lambda: 3)
    threads = [predict.load_model(folder / "model.onnx", n).session for n in (None, 1)]
    assert [session.get_session_options().intra_op_num_threads for session in threads] == [3, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_of_the_affinity():
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"import os; from nodeshape._cli import cores; {one}; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows")
def test_pipes_are_not_waited_for_as_images_or_models(folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is a pipe, not a file" in mistake(capsys, tmp_path / "pipe", folder / "images" / "a.png")
    with pytest.raises(SystemExit) as stopped:
        predict.main([str(folder / "model.onnx"), str(tmp_path / "pipe"), "--json"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'pipe'}: is a pipe, not a file\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes of this kind there")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_goes_ends_the_command_quietly(folder, arguments):
    images = [str(folder / "images" / "a.png")] * 300
    line = [sys.executable, "-m", "nodeshape.predict", str(folder / "model.onnx"), *images, *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == _cli.UNHEARD


NASTY = "a\x1b[31m\nerror: forged\x9b2J\u202e.png"


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_names_cannot_forge_lines_or_reach_the_terminal(folder, tmp_path, capsys):
    Image.open(folder / "images" / "a.png").save(tmp_path / NASTY)
    (tmp_path / ("b" + NASTY)).write_text("no image")
    model = write_model(tmp_path / "model.onnx", classes=json.dumps([NASTY, "\x1b]0;x\x07", "c\r"]))
    del model
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit):
            predict.main([str(tmp_path / "model.onnx"), str(tmp_path), *arguments])
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in [*out.split("\n"), *err.split("\n")])
        assert len(err.splitlines()) == 1 and r"ba\x1b[31m\nerror: forged\x9b2J\u202e.png: not a PNG" in err
        if arguments:
            (item,) = json.loads(out)
            assert item["file"] == str(tmp_path / NASTY) and NASTY in item["probabilities"]
        else:
            header, row = out.splitlines()
            assert len(header) == len(row)
