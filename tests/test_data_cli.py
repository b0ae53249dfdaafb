"""``python -m nodeshape.data`` and what all commands share: a usable folder, and mistakes that take one line."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nodeshape import __main__, _cli, data
from nodeshape._data import drawn_folder
from nodeshape._data.folder import scan_folder
from nodeshape._data.shapes import CLASSES, draw


def command(*arguments, cwd=None):
    line = [sys.executable, "-m", "nodeshape.data", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("task", CLASSES)
def test_the_folder_holds_the_drawn_images_and_can_be_trained_on(tmp_path, capsys, task):
    out = tmp_path / "new" / "shapes"
    data.main(["--task", task, "--count", "70", "--seed", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Next: python -m nodeshape.train --data {out}"

    folder = scan_folder(out, seed=0)
    assert folder.classes == tuple(sorted(CLASSES[task]))
    assert len(folder.train) + len(folder.test) == 70
    for path, label in folder.train[:10]:
        image, drawn_label = draw(task, 4, int(path.stem), split="files")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
        assert CLASSES[task][drawn_label] == folder.classes[label] == path.parent.name
    assert Image.open(out / "contact_sheet.png").size[0] > 500
    assert [path.name for path in out.parent.iterdir()] == ["shapes"]


def test_an_empty_folder_is_filled(tmp_path):
    data.main(["--count", "6", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == 6


def test_a_single_image_is_drawn_but_no_training_promised(tmp_path, capsys):
    data.main(["--count", "1", "--task", "compound", "--out", str(tmp_path / "one")])
    assert "--count 14 or more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count: expected a whole number of at least 1, got '0'"),
        (["--count", "-1"], "--count: expected a whole number of at least 1, got '-1'"),
        (["--count", "many"], "--count: expected a whole number of at least 1, got 'many'"),
        (["--image-size", "0"], "--image-size: expected a whole number from 8 to 1024, got '0'"),
        (["--image-size", "20000"], "--image-size: expected a whole number from 8 to 1024"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295"),
        (["--task", "triple"], "'triple'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_argument_is_one_line_exit_code_two_and_no_folder(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        _cli.run(lambda: data.main([*arguments, "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_or_a_file_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    for out in (tmp_path, tmp_path / "mine.txt"):
        done = command("--out", out)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: --out ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_is_stopped_leaves_nothing_behind(tmp_path, monkeypatch, failure, exists):
    def stop(*_, **__):
        raise failure

    out = tmp_path / "out"
    if exists:
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(failure):
        data.main(["--count", "5", "--out", str(out)])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_contact_sheet_that_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(drawn_folder, "contact_sheet", fail)
    data.main(["--count", "5", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 5
    assert capsys.readouterr().err.splitlines()[-1].startswith("contact_sheet.png could not be drawn: ImportError")


def test_images_that_a_kill_left_on_the_way_to_their_place_are_all_brought_there(tmp_path, monkeypatch, capsys):
    moves = 0
    rename = Path.rename

    def stop_at_the_third(self, target):
        nonlocal moves
        moves += 1
        if moves == 3:
            raise OSError
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "rename", stop_at_the_third)
        data.main(["--count", "12", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) < 12
    with pytest.raises(_cli.UserError, match="are all there now"):
        data.main(["--count", "12", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == 12 and not list(tmp_path.glob(".*"))


def test_relative_folders_and_the_current_one_work(tmp_path):
    assert command("--count", 6, "--out", "shapes", cwd=tmp_path).returncode == 0
    assert (tmp_path / "shapes" / "contact_sheet.png").exists()
    here = tmp_path / "here"
    here.mkdir()
    assert command("--count", 6, "--out", ".", cwd=here).returncode == 0
    assert (here / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (_cli.UserError("two\nlines"), 2, "error: two\\nlines\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: x: No such file or directory\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(capsys, raised, code, line):
    def main():
        raise raised

    with pytest.raises(SystemExit) as caught:
        _cli.run(main)
    assert (caught.value.code, capsys.readouterr().err) == (code, line)


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), RuntimeError("x"), OSError("without an errno")])
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        _cli.run(main)


def test_a_value_error_about_user_input_is_the_users_mistake():
    with pytest.raises(_cli.UserError, match="48 channels"), _cli.user_input():
        raise ValueError("48 channels")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "one", ""])
def test_a_step_size_must_be_finite_and_positive(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a finite number above 0"):
        _cli.positive_float(text)


def test_numbers_and_paths_are_read(tmp_path):
    assert _cli.positive_float("0.05") == 0.05
    assert _cli.positive_int("7") == 7
    assert _cli.existing_path(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match="no such file or folder"):
        _cli.existing_path(str(tmp_path / "none"))


def test_the_package_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nodeshape"])
    __main__.main()
    listed = {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed == {f"nodeshape.{path.stem}" for path in Path(data.__file__).parent.glob("[!_]*.py")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["train", "--epochs", "3"], "python -m nodeshape.train --epochs 3"), (["bogus"], "no command 'bogus'")],
)
def test_a_command_after_the_package_is_a_mistake_and_says_how_it_is_written(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["nodeshape", *arguments])
    with pytest.raises(SystemExit) as caught:
        _cli.run(__main__.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_a_command_that_goes_on_unheard_says_so_once(tmp_path):
    """Its output is a pipe whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    code = (
        "from nodeshape import _cli\n"
        "def main():\n"
        "    for _ in range(3): print('x' * 9000, flush=True)\n"
        "    open('done', 'w')\n"
        "_cli.run(main, though_unheard={})"
    )
    for unheard in (False, True):
        line = [sys.executable, "-c", code.format(unheard)]
        done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path)
        assert (done.returncode == 0) == (tmp_path / "done").exists() == unheard
    assert done.stderr == b"going on without an output: Broken pipe\n"


def test_a_command_whose_output_is_no_stream_of_bytes_ends_as_others(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    with pytest.raises(SystemExit) as exit_:
        _cli.run(lambda: _cli.say("done"))
    assert exit_.value.code == 0 and said.getvalue() == "done\n"


@pytest.mark.parametrize("lost", ["write", "flush"])
def test_errors_that_nobody_can_read_are_lost_in_silence(lost, tmp_path, capsys):
    class Closed:
        def __init__(self, file):
            self.file = file

        def fileno(self):
            return self.file.fileno()

        def write(self, text):
            return self.fail("write")

        def flush(self):
            self.fail("flush")

        def fail(self, what):
            if what == lost:
                raise OSError(5, "Input/output error")

    with open(tmp_path / "terminal", "w") as file:
        lasting = _cli._Lasting(Closed(file))
        wrote, _ = lasting.write("12345"), lasting.flush()
        assert wrote == (5 if lost == "write" else None) and lasting.fileno() == file.fileno()
        file.write("into nothing")
    assert (tmp_path / "terminal").read_text() == "" and capsys.readouterr().err == ""
