"""The page of ``export/web`` in a real Chromium, and the model that it comes with: what people draw is recognised.

The model is trained by the page's own command, which takes minutes; NODESHAPE_WEB_PUBLIC names the ``public`` folder
that an earlier call of it filled. NODESHAPE_SCREENSHOTS names a folder for pictures of the page.
"""

import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import EXECUTABLE, Chromium
from PIL import Image
from wobbly import KINDS, clean_shape, picture, wobbly_drawings, write_pictures

from nodeshape import ShapeClassifier, predict
from nodeshape._data.images import is_empty, load_image
from nodeshape._exporting.export_folder import write_classifier_onnx

WEB = Path(__file__).parents[1] / "export" / "web"
MODULES = WEB / "node_modules"

pytestmark = pytest.mark.slow
#: A WebGPU that the CPU plays, where this Chromium has one.
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan,WebGPU")
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")
needs_modules = pytest.mark.skipif(not MODULES.is_dir(), reason="needs `npm ci` in export/web")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A copy of ``export/web`` with the model that its command makes."""
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns("node_modules", "public", "dist"))
    if earlier := os.environ.get("NODESHAPE_WEB_PUBLIC"):
        shutil.copytree(earlier, folder / "public")
    else:
        subprocess.run([sys.executable, folder / "model.py", "--run", folder / "run"], check=True)
    return folder


@pytest.fixture(scope="module")
def model(web):
    return predict.load_model(web / "public" / "model.onnx")


@pytest.fixture(scope="module")
def site(web, tmp_path_factory):
    """The built page, served: its folder and its address."""
    (web / "node_modules").symlink_to(MODULES.resolve())
    subprocess.run(["npm", "run", "--silent", "build"], cwd=web, check=True)
    with serving(web / "dist") as url:
        yield web / "dist", url


@contextmanager
def serving(folder):
    """A folder on a port of its own while the ``with`` lasts: its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.screen(1100, 1500)
        yield browser


@pytest.fixture
def page(browser, site):
    """The page with its model loaded, nothing drawn."""
    browser.screen(1100, 1500)
    open_page(browser, site[1])
    return browser


def open_page(browser, url):
    browser.open("about:blank")
    browser.open(url)
    browser.wait("document.body.dataset.state !== 'loading'")
    assert browser.run("document.body.dataset.state") == "ready", message(browser)


def message(browser):
    return browser.run("document.getElementById('message').textContent")


def verdict(browser):
    return browser.run("document.getElementById('verdict').textContent")


def paper(browser, points):
    """Points (x, y) in sides of the paper as points of the window."""
    x, y, side = browser.run("(r => [r.x, r.y, r.width])(document.getElementById('canvas').getBoundingClientRect())")
    return [(x + side * u, y + side * v) for u, v in points]


def answer(browser):
    """The class and all probabilities once what is on the paper has been classified; None if it is empty."""
    settled = "document.getElementById('answer').ariaBusy === 'false'"
    browser.wait(f"{settled} && !['', 'Nothing drawn yet'].includes(document.getElementById('status').textContent)")
    rows = browser.run(
        "[...document.querySelectorAll('#classes li')].map(li => [li.dataset.class, Number(li.dataset.probability)])"
    )
    probabilities = dict(rows)
    name = verdict(browser)
    if name == "An empty picture":
        return None
    assert name == max(probabilities, key=probabilities.get)
    return name, probabilities


def clear(browser):
    browser.run("document.getElementById('clear').click()")
    browser.wait("document.getElementById('answer').ariaBusy !== 'true'")
    assert verdict(browser) == "Nothing drawn yet"
    browser.run("document.getElementById('status').textContent = 'Nothing drawn yet'")


def draw(browser, drawing, by="draw"):
    browser.run(f"document.getElementById('pen').value = {drawing.pen}")
    browser.run("document.getElementById('pen').dispatchEvent(new Event('input'))")
    for stroke in drawing.strokes:
        getattr(browser, by)(paper(browser, stroke))


def screenshot(browser, name):
    if folder := os.environ.get("NODESHAPE_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png")


# the model


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_knows_shapes_of_every_size_filled_and_outlined(model, tmp_path, kind):
    """98% of each class in each tenth of the radii from 0.06 to 0.45 of the side."""
    rng = np.random.default_rng(1)
    edges = np.linspace(0.06, 0.45, 11)
    right = []
    for low, high in zip(edges, edges[1:]):
        images = []
        for i in range(100):
            clean_shape(kind, rng.uniform(low, high), i % 2 == 0, rng).save(tmp_path / "shape.png")
            images.append(load_image(tmp_path / "shape.png", model.image_size))
        best = model.probabilities(np.stack(images)).argmax(axis=1)
        right.append(int((best == model.classes.index(kind)).sum()))
    assert min(right) >= 98, right


def test_the_model_knows_wobbly_drawings(model, tmp_path):
    right = 0
    for drawing in wobbly_drawings():
        picture(drawing).save(tmp_path / "drawing.png")
        (found,) = model.classify([tmp_path / "drawing.png"])
        right += model.classes[int(found.probabilities.argmax())] == drawing.kind
    assert right >= 27


# the page


def in_chromium(test):
    return needs_chromium(needs_modules(test))


@in_chromium
def test_the_page_knows_wobbly_drawings(page):
    wrong = []
    for i, drawing in enumerate(wobbly_drawings()):
        draw(page, drawing)
        name, _ = answer(page)
        if name != drawing.kind:
            wrong.append((i, drawing.kind, name))
        if i == 15:
            screenshot(page, "light")
        clear(page)
    assert len(wrong) <= 3, wrong


@in_chromium
def test_the_page_loads_in_three_seconds(browser, site):
    """The better of two: the machine may have other work."""
    times = []
    for _ in range(2):
        open_page(browser, site[1])
        times.append(float(browser.run("document.body.dataset.seconds")))
    assert min(times) < 3, times


@in_chromium
def test_the_page_sees_what_predict_sees_in_images_of_every_kind(page, site, model, tmp_path):
    files = write_pictures(site[0] / "pictures")
    script = """(async () => {{
      const {{ decode, square }} = await import("./pixels.js");
      const response = await fetch("pictures/{0}");
      const bytes = square(await decode(await response.blob()), {1}, 1);
      return btoa(String.fromCharCode(...bytes));
    }})()"""
    differences, classes = {}, 0
    for file in files:
        expected = load_image(file, model.image_size)
        seen = np.frombuffer(base64.b64decode(page.run(script.format(file.name, model.image_size))), np.uint8)
        differences[file.name] = int(np.abs(seen.astype(int) - expected.reshape(-1)).max())
        page.choose("#image", file)
        found = answer(page)
        (ours,) = model.classify([file])
        if is_empty(expected):
            assert found is None and ours.empty, file.name
        else:
            name, probabilities = found
            assert name == model.classes[int(ours.probabilities.argmax())], file.name
            np.testing.assert_allclose(list(probabilities.values()), ours.probabilities, atol=0.05, err_msg=file.name)
        classes += 1
        clear(page)
    assert classes == 100
    scaled = {
        file.name for file in files if file.suffix == ".jpg" and max(Image.open(file).size) >= 4 * model.image_size
    }
    assert len(scaled) < 15
    assert max(value for name, value in differences.items() if name not in scaled) <= 1, differences
    assert max(differences.values()) <= 40, differences  # Pillow decodes a large JPEG at a fraction of its size


@in_chromium
def test_another_model_and_image_are_loaded_by_their_addresses(browser, site, tmp_path):
    torch.manual_seed(2)
    untrained = ShapeClassifier(3, width=32, steps=3).eval()
    metadata = {"classes": '["a", "b <b>", "c"]', "image_size": "32", "channels": "grey"}
    write_classifier_onnx(untrained, torch.rand(2, 1, 32, 32), site[0] / "other.onnx", metadata)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(site[0] / "noise.png")
    with torch.no_grad():
        image = torch.tensor(load_image(site[0] / "noise.png", 32))[None] / 255
        expected = untrained(image).softmax(dim=1)[0].tolist()
    open_page(browser, site[1] + "?model=other.onnx&image=noise.png")
    browser.wait("!!document.querySelector('li[data-probability]')")
    browser.wait("document.getElementById('answer').ariaBusy === 'false'")
    rows = browser.run(
        "[...document.querySelectorAll('#classes li')].map(li => [li.dataset.class, Number(li.dataset.probability)])"
    )
    assert [name for name, _ in rows] == ["a", "b <b>", "c"]
    assert [value for _, value in rows] == pytest.approx(expected, abs=1e-4)
    assert browser.run("document.getElementById('flow').hidden"), "this model gives no trajectory"
    browser.choose("#model", site[0] / "model.onnx")
    browser.wait("!!document.querySelector('li[data-class=triangle][data-probability]')")
    assert not browser.run("document.getElementById('flow').hidden")
    assert browser.run("document.getElementById('chart-figure').hidden"), "its head was not chosen"
    browser.choose("#model", site[0] / "noise.png")
    browser.wait("document.getElementById('answer').ariaBusy === 'false'")
    broken = site[0] / "broken.onnx"
    broken.write_bytes(b"not a model")
    browser.choose("#model", broken)
    browser.wait("document.getElementById('message').textContent.includes('broken.onnx')")
    assert browser.run("document.body.dataset.state") == "ready", "the model before stays"


@in_chromium
def test_bars_move_while_drawing_and_clear_takes_the_answer_away(page):
    drawing = wobbly_drawings()[2]
    points = paper(page, drawing.strokes[0])
    page.mouse("mousePressed", *points[0], button="left", clickCount=1)
    for point in points[1:]:
        page.mouse("mouseMoved", *point, button="left")
    page.wait("!!document.querySelector('li[data-probability]')")  # the button is still down
    assert page.run("document.getElementById('status').textContent") == ""
    page.mouse("mouseReleased", *points[-1], button="left", clickCount=1, buttons=0)
    assert answer(page)[0] == "circle"
    page.run("document.getElementById('clear').click()")
    page.wait("document.getElementById('status').textContent === 'Nothing drawn yet'")
    assert verdict(page) == "Nothing drawn yet"
    assert not page.run("document.querySelector('li[data-probability]')")
    assert page.run("document.getElementById('flow').hidden")
    assert page.run("document.getElementById('clear').disabled")


@in_chromium
def test_the_flow_is_shown_over_time(page):
    draw(page, wobbly_drawings()[12])
    name, probabilities = answer(page)
    assert page.run("document.querySelectorAll('#chart path').length") == 3
    assert name in page.run("document.getElementById('now').textContent")
    last = page.run("document.getElementById('maps').toDataURL()")
    page.run("(time => { time.value = 0; time.dispatchEvent(new Event('input')) })(document.getElementById('time'))")
    assert page.run("document.getElementById('now').textContent").startswith("t = 0.00")
    assert page.run("document.getElementById('maps').toDataURL()") != last
    page.run("document.getElementById('play').click()")
    page.wait("Number(document.getElementById('time').value) > 0.2")
    assert page.run("document.getElementById('play').ariaLabel") == "Pause"
    page.wait("Number(document.getElementById('time').value) === 1")
    assert page.run("document.getElementById('play').ariaLabel").startswith("Play")
    assert page.run("document.getElementById('maps').toDataURL()") == last
    words = page.run("document.getElementById('chart').getAttribute('aria-label')")
    assert f"to {round(100 * probabilities[name])}%" in words


@in_chromium
def test_the_keyboard_draws(page):
    page.run("document.getElementById('canvas').focus()")
    corner = [("ArrowUp", 6), ("ArrowLeft", 7)]
    sides = [("ArrowRight", 14), ("ArrowDown", 12), ("ArrowLeft", 14), ("ArrowUp", 12)]
    for keys in (corner, [(" ", 1)], sides, [(" ", 1)]):
        for key, times in keys:
            for _ in range(times):
                page.press(key)
    assert answer(page)[0] == "rectangle"
    assert page.run("document.getElementById('canvas').getAttribute('aria-label')")
    assert page.run("document.getElementById('status').getAttribute('aria-live')") == "polite"
    page.press("z", modifiers=2)
    page.wait("document.getElementById('verdict').textContent === 'Nothing drawn yet'")


@in_chromium
def test_a_cancelled_chooser_and_a_file_beside_the_paper_do_no_harm(page, site, tmp_path):
    page.run("document.getElementById('image').dispatchEvent(new Event('change'))")
    page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
    assert message(page) == ""
    picture(wobbly_drawings()[13]).save(tmp_path / "triangle.png")
    page.drop(1000, 30, tmp_path / "triangle.png")
    assert answer(page)[0] == "triangle"
    assert page.run("location.href") == site[1]
    (tmp_path / "notes.txt").write_text("no image")
    page.drop(1000, 30, tmp_path / "notes.txt")
    page.wait("document.getElementById('message').textContent.includes('notes.txt')")
    assert page.run("location.href") == site[1]


@in_chromium
@pytest.mark.parametrize("width", [320, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_finger_draws_on_a_small_screen(browser, site, width, dark):
    browser.screen(width, 844, dark, touch=True)
    open_page(browser, site[1])
    draw(browser, wobbly_drawings()[23], by="touch")
    assert answer(browser)[0] == "rectangle"
    assert browser.run("document.documentElement.scrollWidth") == width
    screenshot(browser, f"{width}-{'dark' if dark else 'light'}")


@in_chromium
def test_a_page_without_a_model_or_a_server_says_so(browser, site, tmp_path):
    dist = tmp_path / "dist"
    shutil.copytree(site[0], dist)
    browser.screen(1100, 1500)
    browser.open((dist / "index.html").as_uri())
    assert "http://127.0.0.1:8000" in message(browser)
    (dist / "model.onnx").unlink()
    (dist / "service-worker.js").unlink()
    with serving(dist) as url:
        browser.open(url)
        browser.wait("document.body.dataset.state === 'failed'")
        assert "model.onnx: 404" in message(browser)
        browser.draw(paper(browser, [(0.3, 0.3), (0.6, 0.6)]))
        assert verdict(browser) == "There is no model" and "404" in message(browser)


@pytest.fixture
def small(site, tmp_path):
    """A copy of the page with a small untrained model that takes uint8, and a few images of shapes."""
    dist = shutil.copytree(site[0], tmp_path / "dist")
    torch.manual_seed(3)
    untrained = ShapeClassifier(3, width=16, image_size=24, steps=2).eval()
    metadata = {"classes": '["a", "b", "c"]', "image_size": "24", "channels": "grey"}
    images = torch.randint(0, 256, (4, 1, 24, 24), dtype=torch.uint8)
    write_classifier_onnx(untrained, images, dist / "model.onnx", metadata)
    (dist / "service-worker.js").unlink()
    files = []
    for i, (kind, drawing) in enumerate(zip(KINDS, wobbly_drawings()[::10])):
        files.append(tmp_path / f"{kind}-{i}.png")
        picture(drawing).save(files[-1])
    return dist, files


def answers(browser, files):
    found = []
    for file in files:
        browser.choose("#image", file)
        found.append(answer(browser))
        clear(browser)
    return found


@in_chromium
def test_webgpu_gives_the_answers_of_webassembly(small, tmp_path):
    dist, files = small
    with serving(dist) as url, Chromium(tmp_path / "profile", *SWIFTSHADER) as browser:
        browser.open(url)
        adapter = "navigator.gpu?.requestAdapter().then(adapter => !!adapter, () => false) ?? false"
        if not browser.run(adapter):
            pytest.skip("needs an adapter for WebGPU, which this Chromium has none of")
        found = {}
        for backend in ("wasm", "webgpu"):
            open_page(browser, f"{url}?backend={backend}")
            assert browser.run("document.body.dataset.backend") == backend, about(browser)
            found[backend] = answers(browser, files)
        for (name, probabilities), (same_name, same) in zip(found["wasm"], found["webgpu"], strict=True):
            assert name == same_name and probabilities == pytest.approx(same, abs=1e-4)
        open_page(browser, url)
        assert browser.run("document.body.dataset.backend") == "wasm", (
            "a GPU that the CPU plays is taken on demand only"
        )


def about(browser):
    return browser.run("document.getElementById('about').textContent")


@in_chromium
@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("{ requestAdapter: async () => null }", ""),
        ("{ requestAdapter: () => Promise.reject(new Error('no driver')) }", ""),
        (
            "{ requestAdapter: async () => ({ features: new Set(), limits: {}, info: {},"
            " requestDevice: async () => { throw new Error('no device') } }) }",
            "does not run it",
        ),
    ],
)
def test_where_webgpu_fails_webassembly_runs_the_model(browser, small, gpu, said):
    dist, files = small
    worker = dist / "worker.js"
    stub = f"Object.defineProperty(navigator, 'gpu', {{ value: {gpu} }});"
    worker.write_text(f"{stub}\n{worker.read_text()}")
    with serving(dist) as url:
        open_page(browser, url)
        assert browser.run("document.body.dataset.backend") == "wasm"
        assert "runs on WebAssembly" in about(browser)
        assert ("WebGPU" in about(browser)) == bool(said) and said in about(browser)
        assert all(answers(browser, files))


@in_chromium
def test_where_webgpu_goes_away_webassembly_runs_the_model_from_then_on(browser, small):
    """A stand-in for onnxruntime on a GPU: it computes once, to warm up, and fails then."""
    dist, files = small
    runtime, worker = dist / "runtime", dist / "worker.js"
    stub = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => ({}) } });"
    worker.write_text(f"{stub}\n{worker.read_text()}")
    for file in runtime.glob("ort-wasm-simd-threaded.asyncify.*"):
        shutil.copy(runtime / file.name.replace(".asyncify", ""), file)
    (runtime / "ort.webgpu.min.mjs").write_text("""
        import * as ort from "./ort.wasm.min.mjs?its-own";
        export const { env, Tensor } = ort;
        export const InferenceSession = {
          async create(bytes) {
            const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
            let runs = 0;
            const run = (given) => (runs++ ? Promise.reject(new Error("the device is lost")) : session.run(given));
            const { inputMetadata, inputNames, outputNames } = session;
            return { run, inputMetadata, inputNames, outputNames };
          },
        };
    """)
    with serving(dist) as url:
        open_page(browser, url)
        assert browser.run("document.body.dataset.backend") == "webgpu"
        browser.choose("#image", files[0])
        browser.wait("document.body.dataset.backend === 'wasm'")
        browser.wait("document.getElementById('message').textContent.includes('from now on')")
        assert "the device is lost" in message(browser)
        first = answer(browser)
        clear(browser)
        assert answers(browser, files)[0] == first


@in_chromium
def test_the_page_works_without_a_network_once_visited(browser, site, tmp_path):
    browser.screen(1100, 1500, dark=True)
    with serving(site[0]) as url:
        open_page(browser, url)
        browser.run("navigator.serviceWorker.ready.then(() => true)")
        browser.wait("caches.keys().then(names => names.length === 1)")
    open_page(browser, url)
    draw(browser, wobbly_drawings()[14])
    assert answer(browser)[0] == "triangle"
    screenshot(browser, "dark")
    browser.run("document.querySelector('#examples button').click()")
    browser.wait("document.getElementById('status').textContent.includes('circle')")


@in_chromium
def test_the_build_says_what_is_missing(tmp_path):
    shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules", "public", "dist"))
    done = subprocess.run(["node", "build.js"], cwd=tmp_path / "web", capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "python model.py" in done.stderr
    assert json.loads((tmp_path / "web" / "package-lock.json").read_text())["lockfileVersion"] == 3
