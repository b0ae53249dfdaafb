"""A user's own images: every kind of file read as meant, every kind of bad file or folder named in one line."""

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nodeshape._data import images
from nodeshape._data.folder import Files, scan_folder
from nodeshape._data.images import ImageError, load_folder, load_image
from nodeshape._errors import UserError


def png(width, height, bits=8, colour=0, rows=b""):
    """A PNG file written by hand: header, rows as given, end."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(side=64):
    file = io.BytesIO()
    Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side)).save(file, "JPEG")
    return file.getvalue()


def make_folder(root, counts):
    """``counts``: number of images by folder; each image is of a grey value of its own."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(root / name / f"{i:03d}.png")
    return root


# one image


@pytest.mark.parametrize(("channels", "mode"), [("grey", "L"), ("rgb", "RGB")])
def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path, channels, mode):
    shape = (32, 32) if mode == "L" else (32, 32, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 32, channels)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp"])
@pytest.mark.parametrize(("channels", "planes"), [("grey", 1), ("rgb", 3)])
def test_every_format_gives_a_square_of_the_asked_channels(tmp_path, suffix, channels, planes):
    Image.new("RGB", (90, 60), (200, 200, 200)).save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}", 24, channels)
    assert loaded.shape == (planes, 24, 24)
    assert abs(loaded.astype(int) - 200).max() <= 2


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_any_size_is_read_and_a_plain_image_stays_plain(tmp_path_factory, width, height, image_size):
    path = tmp_path_factory.getbasetemp() / "plain.png"
    Image.new("RGB", (width, height), (10, 20, 30)).save(path)
    loaded = load_image(path, image_size, "rgb")
    assert loaded.shape == (3, image_size, image_size)
    assert (loaded == np.array([10, 20, 30])[:, None, None]).all()


def test_aspect_is_kept_and_the_rest_takes_the_colour_of_the_border(tmp_path):
    wide = Image.new("L", (80, 40), 50)
    wide.paste(250, (20, 10, 60, 30))  # a bar twice as wide as high
    wide.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 40)[0]
    assert (loaded[:10] == 50).all() and (loaded[30:] == 50).all()
    rows, columns = np.nonzero(loaded > 150)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (20, 10)


def test_shrinking_does_not_alias(tmp_path):
    checks = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "a.png")
    assert abs(load_image(tmp_path / "a.png", 32).astype(int) - 128).max() <= 8


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png", 32)[0], values / 257, atol=0.5)


def test_sixteen_bit_colour_is_read(tmp_path):
    row = b"\0" + struct.pack(">3H", 65535, 0, 32768) * 8
    (tmp_path / "a.png").write_bytes(png(8, 8, bits=16, colour=2, rows=row * 8))
    assert load_image(tmp_path / "a.png", 8, "rgb")[:, 0, 0].tolist() == pytest.approx([255, 0, 128], abs=1)


def test_palette_gives_its_colours(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 250, 100, 50])
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8, "rgb")[:, 3, 3].tolist() == [250, 100, 50]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0])
        image.save(tmp_path / "a.png", transparency=0)
    else:
        Image.new(mode, (8, 8), (0,) * len(mode)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 8, "rgb") == 255).all()
    assert (load_image(tmp_path / "a.png", 8, "grey") == 255).all()


def test_half_transparent_black_becomes_grey(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert abs(load_image(tmp_path / "a.png", 8).astype(int) - 127).max() <= 1


def test_exif_orientation_is_honoured(tmp_path):
    sideways = Image.new("L", (32, 32), 0)
    sideways.paste(255, (0, 0, 32, 16))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: bright on the right
    sideways.save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg", 32)[0]
    assert loaded[:, 20:].min() > 200 and loaded[:, :12].max() < 50


def test_cmyk_is_read_as_colour(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = load_image(tmp_path / "a.jpg", 16, "rgb")[:, 8, 8].tolist()
    assert red > 200 and green < 60 and blue < 60


def test_twelve_bits_in_sixteen_are_not_black(tmp_path):
    values = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png", 32)[0], values / 4095 * 255, atol=0.5)
    row = b"\0" + struct.pack(">3H", 4095, 0, 2048) * 8
    (tmp_path / "b.png").write_bytes(png(8, 8, bits=16, colour=2, rows=row * 8))
    with pytest.raises(ImageError, match="12-bit colour in a 16-bit file"):
        load_image(tmp_path / "b.png", 8, "rgb")
    (tmp_path / "c.png").write_bytes(png(8, 8, bits=16, colour=2, rows=(b"\0" + bytes(48)) * 8))
    assert not load_image(tmp_path / "c.png", 8, "rgb").any()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_strips_change_no_pixel(tmp_path, monkeypatch, mode, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 37, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    whole = load_image(tmp_path / "a.png", 37, "rgb")
    monkeypatch.setattr(images, "STRIP_PIXELS", 100)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 37, "rgb"), whole)
    if mode == "RGB":
        expected = pixels[..., :3].transpose(2, 0, 1)
        np.testing.assert_array_equal(whole, expected if orientation == 1 else np.rot90(expected, -1, (1, 2)))


def test_a_large_jpeg_is_decoded_at_a_fraction_and_a_progressive_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    image = Image.new("L", (800, 600), 90)
    image.save(tmp_path / "a.jpg")
    assert abs(load_image(tmp_path / "a.jpg", 32).astype(int) - 90).max() <= 2
    for name, options in (("b.jpg", {"progressive": True}), ("c.png", {})):
        image.save(tmp_path / name, **options)
        with pytest.raises(ImageError, match="megapixels"):
            load_image(tmp_path / name, 32)


@pytest.mark.slow
def test_a_jpeg_of_two_hundred_megapixels_is_read(tmp_path):
    Image.new("L", (16_320, 12_240), 90).save(tmp_path / "a.jpg")
    assert abs(load_image(tmp_path / "a.jpg", 32).astype(int) - 90).max() <= 2


def test_threads_together_decode_no_more_pixels_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_ROOM", images._Room(10_000))
    taken, most, lock = 0, 0, threading.Lock()
    flat = images._flat

    def counting(path, image, mode):
        nonlocal taken, most
        with lock:
            taken += image.width * image.height
            most = max(most, taken)
        time.sleep(0.01)
        with lock:
            taken -= image.width * image.height
        return flat(path, image, mode)

    monkeypatch.setattr(images, "_flat", counting)
    for i in range(8):
        Image.new("L", (80, 60), i).save(tmp_path / f"{i}.png")
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda i: load_image(tmp_path / f"{i}.png", 8), range(8)))
    assert [int(image[0, 0, 0]) for image in loaded] == list(range(8))
    assert 4_800 < most <= 10_000


def test_a_small_file_of_many_pixels_takes_bounded_memory(tmp_path):
    """24 megapixels with transparency in 94 kB, four threads: one decoded image and one of the mode asked for."""
    rows = b"".join(b"\0" + bytes(4 * 6_000) for _ in range(4_000))
    (tmp_path / "a.png").write_bytes(png(6_000, 4_000, colour=6, rows=rows))
    code = (
        "import resource, sys; from concurrent.futures import ThreadPoolExecutor; from nodeshape._data import images\n"
        "images._ROOM = images._Room(24_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with ThreadPoolExecutor(4) as pool: list(pool.map(lambda _: images.load_image(sys.argv[1], 32), range(4)))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 24e6)"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    bytes_per_pixel = float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert bytes_per_pixel < 8


BAD = {
    "a text file": (b"hello", "not a PNG, JPEG, WebP or BMP image"),
    "an empty file": (b"", "empty file"),
    "no rows": (png(0, 0), "zero width or height"),
    "no columns": (png(0, 5), "zero width or height"),
    "400 megapixels": (png(20_000, 20_000), "more than 100 megapixels"),
    "just over 100 megapixels": (png(10_001, 10_000), "more than 100 megapixels"),
    "pixels missing": (png(50, 50, rows=b"\0" * 20), "damaged image"),
    "cut short": (jpeg()[:-300], "damaged image"),
    "header only": (png(50, 50)[:40], "not a PNG, JPEG, WebP or BMP image"),
    "another format": (b"GIF89a" + bytes(100), "not a PNG, JPEG, WebP or BMP image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_reason_in_one_line(tmp_path, name):
    data, reason = BAD[name]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path, 32)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert reason in caught.value.reason
    assert caught.value.path == path


@given(st.data())
def test_damage_never_raises_anything_but_an_image_error(tmp_path_factory, data):
    good = data.draw(st.sampled_from([jpeg(), png(16, 16, rows=(b"\0" + bytes(range(16))) * 16)]))
    damaged = bytearray(good[: data.draw(st.integers(1, len(good)))])
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(damaged)
    with contextlib.suppress(ImageError):
        assert load_image(path, 16).shape == (1, 16, 16)


def test_a_missing_file_or_a_folder_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "none.png", 32)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path, 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows")
def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="is a pipe, not a file"):
        load_image(tmp_path / "a.png", 32)
    with pytest.raises(ImageError, match="is a device, not a file"):
        load_image("/dev/zero", 32)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "b.png"))
        with pytest.raises(ImageError, match="is a socket, not a file"):
            load_image(tmp_path / "b.png", 32)


# a folder


def test_a_folder_is_split_per_class_and_reproducibly(tmp_path):
    root = make_folder(tmp_path / "a", {"cat": 50, "dog": 10, "owl": 2})
    folder = scan_folder(root, seed=0)
    assert folder.classes == ("cat", "dog", "owl")
    assert [sum(label == k for _, label in folder.test) for k in range(3)] == [10, 2, 1]
    assert len(folder.train) + len(folder.test) == 62
    assert not {path for path, _ in folder.train} & {path for path, _ in folder.test}
    assert scan_folder(root, seed=0) == folder
    assert scan_folder(root, seed=1) != folder

    elsewhere = scan_folder(make_folder(tmp_path / "b", {"owl": 2, "dog": 10, "cat": 50}), seed=0)
    assert [path.name for path, _ in elsewhere.test] == [path.name for path, _ in folder.test]


def test_the_split_is_the_same_on_every_machine(tmp_path):
    folder = scan_folder(make_folder(tmp_path, {"cat": 10, "dog": 10}), seed=0)
    names = [f"{path.parent.name}/{path.stem}" for path, _ in folder.test]
    assert names == ["cat/007", "cat/009", "dog/006", "dog/008"]


def test_an_added_file_moves_hardly_any_other(tmp_path):
    root = make_folder(tmp_path, {"cat": 50, "dog": 50})
    before = {path for path, _ in scan_folder(root, seed=0).test}
    Image.new("L", (8, 8)).save(root / "cat" / "new.png")
    after = {path for path, _ in scan_folder(root, seed=0).test}
    assert len(before ^ after) <= 2


def test_train_and_test_folders_are_used_as_they_are(tmp_path):
    root = make_folder(tmp_path, {"train/cat": 3, "train/dog": 4, "test/cat": 1, "test/dog": 2})
    folder = scan_folder(root, seed=0)
    assert folder.classes == ("cat", "dog")
    assert (len(folder.train), len(folder.test)) == (7, 3)
    assert all(path.parent.parent.name == "test" for path, _ in folder.test)


def test_train_may_be_the_name_of_a_class(tmp_path):
    folder = scan_folder(make_folder(tmp_path, {"train": 2, "car": 2, "bus": 2}), seed=0)
    assert (folder.classes, folder.left_out) == (("bus", "car", "train"), ())


def test_hidden_and_other_files_are_ignored(tmp_path):
    root = make_folder(tmp_path, {"cat": 2, "dog": 2, ".cache": 2})
    for name in ("cat/.DS_Store", "cat/._a.png", "cat/notes.txt", "contact_sheet.png", "readme.md"):
        (root / name).write_text("?")
    folder = scan_folder(root, seed=0)
    assert folder.classes == ("cat", "dog")
    assert len(folder.train) + len(folder.test) == 4


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "empty of class folders"),
        ({".": 3}, "3 images lie in no class folder"),
        ({"cat": 3}, "one class only, 'cat'"),
        ({"cat": 3, "dog": 0}, "dog: left out: has no images"),
        ({"cat": 3, "dog": 1}, "dog: left out: has 1 image"),
        ({"train/cat": 3, "train/dog": 3}, "has train/CLASS folders but no test/CLASS folders"),
        ({"test/cat": 3, "test/dog": 3}, "has test/CLASS folders but no train/CLASS folders"),
        ({"train/cat": 1, "train/dog": 1, "test/owl": 1}, "test: has images of none of the classes"),
        ({"train/cat": 1, "test/dog": 1, "test/cat": 1}, "test/dog: left out: has no training images"),
        ({"train/cat": 1, "test/cat": 1}, "one class only"),
        ({"train": 3, "test": 3}, "images lie in test and train without a folder per class"),
        ({"cat/2023": 3, "dog/2023": 3}, "cat: left out: 3 images in its subfolders only"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(tmp_path, counts, message):
    root = tmp_path / "data"
    root.mkdir()
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (8, 8)).save(root / name / f"{i}.png")
    with pytest.raises(UserError) as caught:
        scan_folder(root, seed=0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        scan_folder(tmp_path / "none", seed=0)
    (tmp_path / "file.png").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        scan_folder(tmp_path / "file.png", seed=0)


def test_a_folder_is_loaded_in_order(tmp_path):
    files = scan_folder(make_folder(tmp_path, {"cat": 20, "dog": 20}), seed=0).train
    loaded = load_folder(files, 8)
    assert loaded.images.shape == (32, 1, 8, 8)
    assert loaded.images[:, 0, 0, 0].tolist() == [int(path.stem) for path, _ in files]
    assert loaded.labels.tolist() == [label for _, label in files]
    assert loaded.unreadable == []


def test_unreadable_files_are_skipped_and_listed_or_stop_a_strict_run(tmp_path):
    root = make_folder(tmp_path, {"cat": 5, "dog": 5})
    (root / "cat" / "002.png").write_text("not an image")
    files = [(path, label) for label, name in enumerate(("cat", "dog")) for path in sorted((root / name).iterdir())]
    loaded = load_folder(files, 8, "rgb")
    assert loaded.images[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 0, 1, 2, 3, 4]
    assert loaded.labels.tolist() == [0] * 4 + [1] * 5
    assert [error.path for error in loaded.unreadable] == [root / "cat" / "002.png"]
    with pytest.raises(ImageError, match=r"002\.png"):
        load_folder(files, 8, strict=True)


def test_a_class_without_a_readable_file_is_an_error(tmp_path):
    root = make_folder(tmp_path, {"cat": 2, "dog": 2})
    for path in (root / "dog").iterdir():
        path.write_text("not an image")
    files = [(path, label) for label, name in enumerate(("cat", "dog")) for path in (root / name).iterdir()]
    with pytest.raises(UserError, match="dog: none of its 2 images is readable"):
        load_folder(files, 8)


def test_the_time_of_unreadable_files_is_that_of_their_number_not_of_its_square(tmp_path, monkeypatch):
    (tmp_path / "class").mkdir()
    names = [f"{i}.png" for i in range(60)]
    for name in names:
        (tmp_path / "class" / name).touch()
    taken = []
    take = Files.__getitem__
    monkeypatch.setattr(Files, "__getitem__", lambda self, index: taken.append(index) or take(self, index))
    with pytest.raises(UserError, match="none of its 60 images is readable"):
        load_folder(Files((tmp_path / "class",), names, np.zeros(60, np.int64)), 16)
    assert len(taken) <= 3 * len(names)
