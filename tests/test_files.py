"""Files and folders that are whole or not there, whatever is left of killed processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nodeshape import _cli, _files
from nodeshape._files import locked, partial_folder, put_back, put_in_place, write_atomically


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


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    for text in ("first", "second"):
        with partial_folder(tmp_path / "export") as folder:
            (folder / "model.onnx").write_text(text)
            put_in_place(folder, tmp_path / "export")
        assert (tmp_path / "export" / "model.onnx").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_there_is_no_moment_without_a_folder_that_is_replaced(tmp_path: Path) -> None:
    """Another process looks at the file all the time that this one replaces its folder."""
    look = f"""
import os, sys
from pathlib import Path
print(flush=True)
while True:
    try:
        text = Path({str(tmp_path / "export" / "file")!r}).read_text()
    except FileNotFoundError:
        sys.exit("it was not there")
    if text == "199":
        break
"""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "file").write_text("old")
    with subprocess.Popen([sys.executable, "-c", look], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as looking:
        assert looking.stdout is not None and looking.stdout.readline()
        for number in range(200):
            with partial_folder(tmp_path / "export") as folder:
                (folder / "file").write_text(str(number))
                put_in_place(folder, tmp_path / "export")
        _, said = looking.communicate(timeout=60)
    assert looking.returncode == 0, said.decode()


def test_a_folder_that_a_kill_took_out_of_its_place_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / ".export.old-0123456789abcdef"
    aside.mkdir()
    (aside / "model.onnx").write_text("earlier")
    with partial_folder(tmp_path / "export"):
        assert aside.is_dir(), "clearing partial folders took it"
    put_back(tmp_path / "export")
    assert (tmp_path / "export" / "model.onnx").read_text() == "earlier" and not aside.exists()
    aside.mkdir()
    put_back(tmp_path / "export")
    assert (tmp_path / "export" / "model.onnx").read_text() == "earlier"


def test_a_lock_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    with locked(tmp_path) as mine, locked(tmp_path) as another:
        assert mine is True and another is False
    with locked(tmp_path) as again:
        assert again is True
    with locked(tmp_path / "nowhere") as none:
        assert none is None
