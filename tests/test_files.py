"""Files and folders that are whole or not there, whatever is left of killed processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nodeshape import _cli
from nodeshape._files import partial_folder, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_partial_folder_is_gone_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), partial_folder(tmp_path / "export") as folder:
        (folder / "file").touch()
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed_and_folders_in_use_are_not(tmp_path: Path) -> None:
    for left in (".export.partial-1", ".export.partial-2"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.onnx").touch()
    for others in (".export2.partial-1", "export", "runs"):
        (tmp_path / others).mkdir()
    with partial_folder(tmp_path / "export") as one, partial_folder(tmp_path / "export") as other:
        assert one != other and one.is_dir() and other.is_dir()
        assert {path.name for path in tmp_path.iterdir()} - {one.name, other.name} == {
            ".export2.partial-1",
            "export",
            "runs",
        }


def test_the_folder_of_a_killed_process_is_a_leftover(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from nodeshape._files import partial_folder
with partial_folder(Path({str(tmp_path / "export")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    with partial_folder(tmp_path / "export") as folder:
        assert list(tmp_path.iterdir()) == [folder] and folder != left


def test_a_picture_that_fails_is_one_line_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _cli.picture(tmp_path / "a.png"):
        raise MemoryError("no room\nfor it")
    assert capsys.readouterr().err == f"{tmp_path / 'a.png'} could not be drawn: MemoryError: no room for it\n"
