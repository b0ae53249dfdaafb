"""The programs in ``export/`` give PyTorch's class and probability."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nodeshape import ShapeClassifier, load_classifier
from nodeshape._benchmarking.trained import checkpoint
from nodeshape._data.images import load_image
from nodeshape._data.shapes import CLASSES, draw
from nodeshape._exporting.export_folder import write_classifier_onnx
from nodeshape.export import export

ROOT = Path(__file__).parents[1] / "export"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with an untrained model, an image of its size, and PyTorch's probabilities."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("consumers")
    model = ShapeClassifier(3, width=32, steps=3).eval()
    metadata = {"classes": '["circle", "triangle", "rectangle"]', "image_size": "32", "channels": "grey"}
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    write_classifier_onnx(model, images / 255, folder / "model.onnx", metadata)
    write_classifier_onnx(model, images, folder / "bytes.onnx", metadata)
    Image.fromarray(draw("single", 0, 0)[0]).save(folder / "example.png")
    image = torch.tensor(load_image(folder / "example.png", 32))[None] / 255
    with torch.no_grad():
        probabilities = model(image).softmax(dim=1)[0].tolist()
    return folder, dict(zip(CLASSES["single"], probabilities))


def run(*line):
    return subprocess.run([*map(str, line)], capture_output=True, text=True, check=True).stdout


def expect(line, probabilities):
    _, name, probability = line.split()
    assert name == max(probabilities, key=probabilities.get)
    assert float(probability) == pytest.approx(probabilities[name], abs=1e-4)


@pytest.mark.parametrize("name", ["model.onnx", "bytes.onnx"])
def test_the_python_program_needs_no_nodeshape_and_agrees(exported, name):
    folder, probabilities = exported
    code = ROOT / "python" / "classify.py"
    expect(run(sys.executable, "-I", code, folder / name, folder / "example.png"), probabilities)


def test_the_python_program_says_that_a_picture_is_empty(exported, tmp_path):
    Image.new("RGB", (90, 40), "white").save(tmp_path / "white.png")
    code = ROOT / "python" / "classify.py"
    assert run(sys.executable, code, exported[0] / "model.onnx", tmp_path / "white.png").split()[1:] == ["(empty)", "-"]


def picture(number, path):
    """An image of one of ten kinds, of any size: grey and RGB, alpha, palette, 16 bits, EXIF, JPEG, BMP."""
    random = np.random.default_rng(number)
    width, height = (int(side) for side in random.integers(20, 300, 2))
    ground, colour = random.integers(0, 256, (2, 4))
    image = Image.new("RGBA", (width, height), (*map(int, ground[:3]), 255))
    centre, radius = (width / 2, height / 2), min(width, height) * random.uniform(0.2, 0.45)
    corners = int(random.choice([3, 4, 40]))
    ImageDraw.Draw(image).regular_polygon((centre, radius), corners, random.uniform(0, 90), tuple(map(int, colour)))
    options = {}
    kind = ("L", "RGB", "RGBA", "LA", "I;16", "P", "jpeg", "bmp", "turned", "turned jpeg")[number % 10]
    if "turned" in kind:
        exif = Image.Exif()
        exif[0x0112] = 1 + number // 10 % 8
        options["exif"] = exif
    if kind == "I;16":
        values = np.asarray(image.convert("L")).astype(np.uint16)
        deep = values * 257 + random.integers(0, 256, values.shape).astype(np.uint16)
        image = Image.fromarray(deep if number // 10 % 2 else deep >> 4)  # 12 bits in a file of 16
    elif kind == "P":
        image, options["transparency"] = image.convert("RGB").quantize(8), 1
    else:
        image = image.convert(kind if kind in ("L", "RGBA", "LA") else "RGB")
    path = path.with_suffix(".jpg" if "jpeg" in kind else ".bmp" if kind == "bmp" else ".png")
    image.save(path, **options)
    return path


def test_the_python_program_sees_what_predict_sees(tmp_path):
    spec = importlib.util.spec_from_file_location("classify", ROOT / "python" / "classify.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for number in range(100):
        path = picture(number, tmp_path / str(number))
        for channels, mode in (("grey", "L"), ("rgb", "RGB")):
            assert np.array_equal(program.read_picture(path, 32, mode), load_image(path, 32, channels)), path


CPP = shutil.which("cmake") and shutil.which("c++")
STB = Path("/usr/include/stb/stb_image.h").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (CPP and STB), reason="needs CMake, a C++ compiler and libstb-dev")
def test_the_cpp_program_agrees_on_images_of_every_kind(tmp_path):
    # A torch for CUDA has a TorchConfig.cmake that asks for the toolkit.
    torch_folder = tmp_path / "torch"
    (torch_folder / "share/cmake/Torch").mkdir(parents=True)
    (torch_folder / "share/cmake/Torch/TorchConfig.cmake").write_text('message(FATAL_ERROR "asks for CUDA")')
    for name in ("include", "lib"):
        (torch_folder / name).symlink_to(Path(torch.__path__[0]) / name)
    build = tmp_path / "build"
    run("cmake", "-S", ROOT / "cpp", "-B", build, f"-DTORCH={torch_folder}", f"-DCMAKE_PREFIX_PATH={torch_folder}")
    run("cmake", "--build", build)

    for kind in ("float32", "uint8"):
        export(checkpoint(quick=True), tmp_path / kind, native=True, input_type=kind)
    out = tmp_path / "float32"
    model, classes = load_classifier(checkpoint(quick=True))
    (tmp_path / "images").mkdir()
    files = [picture(number, tmp_path / "images" / str(number)) for number in range(100)]
    images = torch.tensor(np.stack([load_image(file, model.image_size) for file in files])) / 255
    with torch.no_grad():
        expected = model(images).softmax(dim=1)
    names = ("model.ts", "model.fused.ts", "model.fused.pt2")
    for name in (tmp_path / kind / name for kind in ("float32", "uint8") for name in names):
        lines = run(build / "classify", name, *files).splitlines()
        for file, line, row in zip(files, lines, expected, strict=True):
            allowed = 0.05 if file.suffix == ".jpg" else 1e-3  # JPEG leaves a decoder some freedom
            best, second = row.topk(2).values.tolist()
            _, found, probability = line.split()
            assert found == classes[row.argmax()] or best - second < allowed, (name, file)
            assert float(probability) == pytest.approx(best, abs=allowed), (name, file)

    bad = tmp_path / "bad.png"
    bad.write_bytes(files[0].read_bytes()[:60])
    for line in (["gone.ts", files[0]], [out / "model.ts", "gone.png"], [out / "model.ts", bad]):
        done = subprocess.run([build / "classify", *line], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
