"""What of a user's folder is a class and what is not: used where it can be, else said in a line, and strict stops."""

import os
import sys

import pytest
from PIL import Image

from nodeshape._data.datasets import folder_data
from nodeshape._data.folder import same_files, scan_folder
from nodeshape._errors import UserError


def make(root, counts):
    """``counts``: number of images by folder, no two of the same bytes."""
    number = sum(1 for _ in root.rglob("*.png"))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number += 1
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(root / name / f"{i:03d}.png")
    return root


BASE = {"cat": 3, "dog": 3}
SPLIT = {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1}

#: Name: folders and their images, the classes, what the one line says.
LEFT_OUT = {
    "an unlabelled test set": ({**BASE, "test": 4}, "cat dog", "test: left out: is called as a set of images"),
    "an unlabelled Validation set": ({**BASE, "Validation": 4}, "cat dog", "Validation: left out"),
    "an empty class": ({**BASE, "owl": 0}, "cat dog", "owl: left out: has no images"),
    "a class of one image": ({**BASE, "owl": 1}, "cat dog", "owl: left out: has 1 image"),
    "images in subfolders": ({**BASE, "cat/2023": 2}, "cat dog", "cat: left out: 2 images in its subfolders"),
    "a class of subfolders": ({**BASE, "owl/2023": 2}, "cat dog", "owl: left out: 2 images in its subfolders only"),
    "images beside the classes": ({**BASE, ".": 2}, "cat dog", "2 images beside the class folders left out"),
    "images beside the classes of a set": (
        {**SPLIT, "train": 2},
        "cat dog",
        "train: 2 images beside its class folders",
    ),
    "a class without test images": ({**SPLIT, "train/owl": 2}, "cat dog owl", "train/owl: has no test images"),
    "a class without training images": ({**SPLIT, "test/owl": 2}, "cat dog", "test/owl: left out: has no training"),
    "val beside test": ({**SPLIT, "val/cat": 2}, "cat dog", "val: left out: train and test are used"),
    "a folder beside train and test": ({**SPLIT, "owl": 2}, "cat dog", "owl: left out: train and test are used"),
    "an unlabelled test set beside val": (
        {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test": 3},
        "cat dog",
        "test: left out: train and val are used",
    ),
    "names that differ in case": ({**BASE, "Cat": 3}, "Cat cat dog", "classes that look alike stay apart: 'Cat' and"),
    "names that differ in composition": (
        {"caf\u00e9": 2, "cafe\u0301": 2},
        "cafe\u0301 caf\u00e9",
        r"classes that look alike stay apart: 'cafe\u0301' and 'caf\xe9'",
    ),
    "one class in two cases": (
        {"train/Cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1},
        "Cat dog",
        "test/cat: taken for test images of train/Cat, 'cat' as 'Cat'",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_said_in_one_line_and_strict_stops(tmp_path, name):
    counts, classes, line = LEFT_OUT[name]
    folder = scan_folder(make(tmp_path, counts), seed=0)
    assert folder.classes == tuple(classes.split())
    assert len(folder.left_out) == 1 and line in folder.left_out[0] and "\n" not in folder.left_out[0]
    assert all(path.is_file() for path, _ in [*folder.train, *folder.test])
    with pytest.raises(UserError) as stopped:
        scan_folder(tmp_path, seed=0, strict=True)
    assert line in str(stopped.value) and "--strict" in str(stopped.value)


@pytest.mark.parametrize("test", ["test", "Test", "testing", "val", "valid", "validation"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_the_parts_have_the_names_that_people_give_them(tmp_path, train, test):
    counts = {f"{train}/cat": 2, f"{train}/dog": 2, f"{test}/cat": 1, f"{test}/dog": 1}
    folder = scan_folder(make(tmp_path, counts), seed=0, strict=True)
    assert (folder.classes, len(folder.train), len(folder.test)) == (("cat", "dog"), 4, 2)


def test_valid_is_a_class_beside_invalid(tmp_path):
    assert scan_folder(make(tmp_path, {"valid": 2, "invalid": 2}), seed=0, strict=True).classes == ("invalid", "valid")


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found", ".git", ".ipynb_checkpoints", "$RECYCLE.BIN"])
def test_folders_that_systems_make_are_no_classes_wherever_they_are(tmp_path, name):
    counts = {**BASE, name: 3, f"{name}/sub": 2, f"cat/{name}": 2}
    assert scan_folder(make(tmp_path, counts), seed=0, strict=True).classes == ("cat", "dog")


def test_pictures_of_other_formats_are_counted(tmp_path):
    make(tmp_path, BASE)
    for name in ("cat/a.tif", "cat/b.HEIC", "dog/c.gif", "dog/d.tif", "dog/notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    folder = scan_folder(tmp_path, seed=0)
    assert folder.left_out == ("left out: 1 .gif, 1 .heic, 2 .tif: only PNG, JPEG, WebP and BMP files are read",)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_links_to_nowhere_and_to_themselves_stop_nothing(tmp_path):
    make(tmp_path, {**BASE, "cat/new": 0})
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    (tmp_path / "cat" / "new" / "up").symlink_to("..")
    (tmp_path / "owl").symlink_to("owl")
    (tmp_path / "same").symlink_to("cat")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    folder = scan_folder(tmp_path, seed=0)
    assert folder.classes == ("cat", "dog") and len(folder.train) + len(folder.test) == 6
    assert folder.left_out == (
        "same: left out: is the same folder as cat",
        "left out: 4 links to nowhere or no files, such as cat/gone.png",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_class_folder_whose_name_is_no_text_is_used(tmp_path):
    make(tmp_path, BASE)
    os.rename(tmp_path / "dog", os.path.join(os.fsencode(tmp_path), b"d\xf6g"))
    data = folder_data(tmp_path, None, None, 16, "grey", seed=0, strict=False)
    assert data.classes == ["cat", r"d\xf6g"] and len(data.train) == 4
    assert data.left_out == [r"class d\xf6g: its folder's name is not UTF-8"]
    assert data.fingerprint()


def test_images_that_are_trained_on_and_tested_with_are_found(tmp_path):
    make(tmp_path, SPLIT)
    (tmp_path / "train/cat/copy.png").write_bytes((tmp_path / "test/dog/000.png").read_bytes())
    folder = scan_folder(tmp_path, seed=0)
    assert same_files(folder.train, folder.test) == [(tmp_path / "train/cat/copy.png", tmp_path / "test/dog/000.png")]
    (line,) = folder_data(tmp_path, None, None, 16, "grey", seed=0, strict=False).left_out
    assert line.startswith("1 training images are test images too, such as train/cat/copy.png = test/dog/000.png")
    with pytest.raises(UserError, match="mend this, or leave out --strict"):
        folder_data(tmp_path, None, None, 16, "grey", seed=0, strict=True)


def test_files_that_differ_late_are_not_the_same(tmp_path):
    make(tmp_path, SPLIT)
    for name, end in (("train/cat/a.png", b"1"), ("test/cat/a.png", b"2")):
        (tmp_path / name).write_bytes(bytes(100_000) + end)
    folder = scan_folder(tmp_path, seed=0)
    assert same_files(folder.train, folder.test) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_read_the_same_are_refused(tmp_path):
    make(tmp_path, {"cat": 3, "dog": 3, r"d\xf6g": 3})
    os.rename(tmp_path / "dog", os.path.join(os.fsencode(tmp_path), b"d\xf6g"))
    with pytest.raises(UserError, match=r"two classes are called d\\xf6g; rename one"):
        scan_folder(tmp_path, seed=0)


def test_a_share_of_nothing_or_all_is_no_test_set(tmp_path):
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="test_fraction must be between 0 and 1"):
            scan_folder(make(tmp_path, BASE), seed=0, test_fraction=share)


def test_files_are_those_of_equal_folders_names_and_labels(tmp_path):
    folder = scan_folder(make(tmp_path, SPLIT), seed=0)
    assert folder.train == folder.train[:] != folder.test
    assert folder.train != list(folder.train) and folder.train.take([1, 3])[0] == folder.train[1]
