"""The programs in ``export/`` give PyTorch's class and probability."""

import functools
import html
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from nodeshape import ShapeClassifier
from nodeshape._data.images import load_image
from nodeshape._data.shapes import CLASSES, draw
from nodeshape._exporting.export_folder import write_classifier_onnx, write_classifier_torchscript

ROOT = Path(__file__).parents[1] / "export"
MODULES = ROOT / "web" / "node_modules"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with an untrained model, an image of its size, and PyTorch's probabilities."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("consumers")
    model = ShapeClassifier(3, width=32, steps=3).eval()
    metadata = {"classes": '["circle", "triangle", "rectangle"]', "image_size": "32", "channels": "grey"}
    for write, name in ((write_classifier_onnx, "model.onnx"), (write_classifier_torchscript, "model.ts")):
        write(model, torch.rand(2, 1, 32, 32), folder / name, metadata)
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


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler")
def test_the_cpp_program_agrees(exported, tmp_path):
    folder, probabilities = exported
    run("cmake", "-S", ROOT / "cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run("cmake", "--build", tmp_path)
    expect(run(tmp_path / "classify", folder / "model.ts", folder / "example.pgm"), probabilities)
    bad = subprocess.run([tmp_path / "classify", "gone.ts", "gone.pgm"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. The page's load event waits for ``/hold``, and that for ``/done``."""

    done = threading.Event()

    def do_GET(self):
        if self.path.startswith("/done"):
            self.done.set()
        if self.path.startswith("/hold"):
            self.done.wait(120)
        super().do_GET()

    def log_message(self, *_):
        pass


HOLD = """<img src="/hold" hidden><script>
new MutationObserver(() => fetch("/done")).observe(document.getElementById("result"), {childList: true, subtree: true});
setTimeout(() => fetch("/done"), 100000);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.skipif(not MODULES.is_dir(), reason="needs `npm install` in export/web")
def test_the_web_page_agrees(exported, tmp_path):
    folder, probabilities = exported
    site = tmp_path / "site"
    shutil.copytree(ROOT / "web", site, ignore=shutil.ignore_patterns("node_modules"))
    os.symlink(MODULES.resolve(), site / "node_modules")
    for name in ("model.onnx", "example.png"):
        shutil.copy(folder / name, site)
    page = (site / "index.html").read_text()
    (site / "test.html").write_text(page.replace("</main>", "</main>" + HOLD))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
        f" --disable-sync --no-first-run --user-data-dir={tmp_path / 'profile'} --timeout=120000"
    ).split()
    url = f"http://127.0.0.1:{server.server_port}/test.html?model=model.onnx&image=example.png"
    try:
        dom = run(CHROMIUM, *flags, "--dump-dom", url)
        if "NODESHAPE_SCREENSHOT" in os.environ:
            shot = f"--screenshot={os.environ['NODESHAPE_SCREENSHOT']}"
            Handler.done.clear()
            run(CHROMIUM, *flags, "--window-size=900,640", shot, url)
    finally:
        server.shutdown()
    rows = re.findall(r"<dt>(.*?)</dt><dd>.*?</dd><dd>(.*?)</dd>", dom)
    shown = {html.unescape(name): float(number) for name, number in rows}
    assert shown == pytest.approx(probabilities, abs=1e-4), re.findall(r'id="status".*?>(.*?)<', dom)
