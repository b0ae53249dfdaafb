"""The programs in ``export/`` give PyTorch's class and probability."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from wobbly import write_pictures

from nodeshape import ShapeClassifier
from nodeshape._data.images import load_image
from nodeshape._data.shapes import CLASSES, draw
from nodeshape._exporting.export_folder import save_torchscript
from nodeshape._exporting.onnx import to_onnx
from nodeshape._exporting.unrolled import UnrolledClassifier

ROOT = Path(__file__).parents[1] / "export"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with an untrained model, an image of its size, and PyTorch's probabilities."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("consumers")
    model = ShapeClassifier(3, width=32, steps=3).eval()
    unrolled = UnrolledClassifier(model)
    metadata = {"classes": '["circle", "triangle", "rectangle"]', "image_size": "32", "channels": "grey"}
    (folder / "model.onnx").write_bytes(to_onnx(unrolled, (1, 32, 32), metadata, False).SerializeToString())
    save_torchscript(unrolled, metadata, folder / "model.ts")
    for suffix in ("png", "pgm"):
        Image.fromarray(draw("single", 0, 0)[0]).save(folder / f"example.{suffix}")
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


def test_the_python_program_needs_no_nodeshape_and_agrees(exported):
    folder, probabilities = exported
    code = ROOT / "python" / "classify.py"
    expect(run(sys.executable, "-I", code, folder / "model.onnx", folder / "example.png"), probabilities)


def test_the_python_program_sees_images_of_every_kind_as_predict_does(tmp_path):
    spec = importlib.util.spec_from_file_location("classify", ROOT / "python" / "classify.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for file in write_pictures(tmp_path / "pictures", 28):
        for mode, channels in (("L", "grey"), ("RGB", "rgb")):
            np.testing.assert_array_equal(
                program.load(file, 32, mode), load_image(file, 32, channels), err_msg=file.name
            )


def test_the_python_program_says_that_a_picture_is_empty(exported, tmp_path):
    Image.new("RGB", (90, 40), "white").save(tmp_path / "white.png")
    code = ROOT / "python" / "classify.py"
    assert run(sys.executable, code, exported[0] / "model.onnx", tmp_path / "white.png").split()[1:] == ["(empty)", "-"]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler")
def test_the_cpp_program_agrees(exported, tmp_path):
    folder, probabilities = exported
    run("cmake", "-S", ROOT / "cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run("cmake", "--build", tmp_path)
    expect(run(tmp_path / "classify", folder / "model.ts", folder / "example.pgm"), probabilities)
    bad = subprocess.run([tmp_path / "classify", "gone.ts", "gone.pgm"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
