"""``python -m nodeshape.export``: files that give PyTorch's logits, or one line and nothing written."""

import io
import json
import os
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from nodeshape import ShapeClassifier, _cli, export, odeint
from nodeshape._data.shapes import CLASSES, draw_set
from nodeshape._errors import UserError
from nodeshape._exporting import export_folder, smaller, verify
from nodeshape._exporting.graph import nodes
from nodeshape._exporting.solvers import plot_solvers, try_solvers
from nodeshape._exporting.verify import Agreement, CheckImages, check_images, compare
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._training.checkpoint import save_checkpoint

STEPS = 4


def untrained(**settings):
    """A small classifier with random weights whose batch normalisation has seen shapes."""
    torch.manual_seed(0)
    settings = {"num_classes": 3, "image_size": 24, "width": 16, "method": "euler", "steps": STEPS} | settings
    model = ShapeClassifier(**settings)
    with torch.no_grad():
        model.ode.dynamics.norm3.weight.fill_(0.05)  # untrained, the flow is stiffer than a trained one
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.momentum = None
        model(shapes(60, model.in_channels, model.image_size))
    return model.eval(), settings


def shapes(count, channels=1, image_size=24):
    images = draw_set("single", "test", count, image_size=max(24, image_size))[0]
    return torch.from_numpy(images[:, :, :image_size, :image_size]).expand(-1, channels, -1, -1).float() / 255


def load(path):
    """An exported file as a function of images."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])
    module = torch.jit.load(path) if path.suffix == ".ts" else torch.export.load(path).module()

    def classify(images):
        out = module(images)
        return out[0] if isinstance(out, tuple) else out

    return classify


FILES = ("model.onnx", "model.ts", "model.pt2")


def checkpoint(folder, **settings):
    state = {"classes": list(CLASSES["single"]), "task": "single", "channels": "grey", "data": None, "seed": 0}
    state |= {name: settings.pop(name) for name in list(settings) if name in state}
    model, architecture = untrained(**{"num_classes": len(state["classes"])} | settings)
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "best.pt", {"model": model.state_dict(), "architecture": architecture, **state})
    return folder / "best.pt", model


@pytest.fixture
def few_images(monkeypatch):
    """Verify with fewer images where the verification is not the subject."""
    monkeypatch.setattr(verify, "IMAGES", 20)
    monkeypatch.setattr(verify, "IMPLICIT_IMAGES", 20)


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=[] if x == "euler" else pytest.mark.slow) for x in SOURCE_METHODS],
)
def exported(request, tmp_path_factory):
    """A classifier of each method, its export folder, and what the command printed.

    Those of implicit methods are verified on fewer images than users get, to save time.
    """
    path, model = checkpoint(tmp_path_factory.mktemp("run"), method=request.param)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(verify, "IMPLICIT_IMAGES", 100)
        export.main([str(path), "--trajectory"])
    return model, path.parent / "export", printed.getvalue()


def test_exported_files_give_pytorchs_logits_at_any_batch_size(exported):
    model, out, _ = exported
    images = shapes(100).repeat(3, 1, 1, 1)  # of those the verification saw
    with torch.no_grad():
        expected = model(images)
        for name in FILES:
            classify = load(out / name)
            for size in (1, 7, 300):
                torch.testing.assert_close(classify(images[:size]), expected[:size], atol=1e-4, rtol=0)


def test_the_report_holds_the_verification(exported):
    model, out, printed = exported
    assert printed.splitlines()[-1] == f"python -m nodeshape.predict {out / 'model.onnx'} {out / 'example.png'}"
    assert {file.name for file in out.iterdir()} == {*FILES, "report.json", "example.png"}
    assert sorted(file.name for file in out.parent.iterdir()) == ["best.pt", "export"]
    report = json.loads((out / "report.json").read_text())
    count = 1000 if model.ode.method == "euler" else 100
    assert report["images"] == {"count": count, "source": f"{count} drawn (single)"}
    assert (report["method"], report["steps"]) == (model.ode.method, STEPS)
    assert (report["stage_iterations"] == 1) == (model.ode.method == "euler")
    for name, figures in report["files"].items():
        assert figures["bytes"] == (out / name).stat().st_size
        assert figures["max_difference"] <= 1e-4
        assert figures["same_class"] == figures["images"] == count
        assert list(figures["by_batch_size"]) == ["1", "7", "300"]
    parts = ["reference", "choice", "writing", "proof"]
    assert list(report["seconds"]) == [*parts, "total"]
    assert 0 < sum(report["seconds"][part] for part in parts) <= report["seconds"]["total"]


def test_the_trajectory_holds_every_state(exported):
    model, out, _ = exported
    images = shapes(4)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    from_onnx = map(torch.from_numpy, session.run(["logits", "trajectory"], {"image": images.numpy()}))
    times = torch.linspace(0, 1, STEPS + 1)
    with torch.no_grad():
        states = odeint(model.ode.dynamics, model.stem(images), times, method=model.ode.method, steps=1)
        expected_logits = model(images)
    for logits, trajectory in (from_onnx, torch.jit.load(out / "model.ts")(images)):
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(trajectory, states.transpose(0, 1), atol=1e-3, rtol=1e-3)


def test_metadata_says_all_that_a_consumer_needs(exported):
    model, out, _ = exported
    session = onnxruntime.InferenceSession(out / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["circle", "triangle", "rectangle"]
    assert metadata["nodeshape_version"] and "[0, 1]" in metadata["preprocessing"]
    assert {name: metadata[name] for name in ("image_size", "channels", "input", "method", "steps")} == {
        "image_size": "24",
        "channels": "grey",
        "input": "float32",
        "method": model.ode.method,
        "steps": str(STEPS),
    }
    extra = {"metadata.json": "", "classes.txt": "", **dict.fromkeys(metadata, "")}
    torch.jit.load(out / "model.ts", _extra_files=extra)
    assert json.loads(extra.pop("metadata.json")) == metadata
    assert extra.pop("classes.txt").decode().splitlines() == json.loads(metadata["classes"])
    assert {name: text.decode() for name, text in extra.items()} == metadata
    (image,), (logits, trajectory) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 1, 24, 24])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    assert (trajectory.name, trajectory.shape) == ("trajectory", ["batch", STEPS + 1, 16, 12, 12])
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    assert proto.opset_import[0].version >= 18
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert Image.open(out / "example.png").size == (24, 24)


@pytest.mark.slow
def test_another_solver_is_exported_with_the_same_weights(tmp_path, few_images):
    path, model = checkpoint(tmp_path, method="euler")
    report = export.export(path, tmp_path / "out", method="implicit_midpoint", steps=5)
    assert (report["method"], report["steps"]) == ("implicit_midpoint", 5)
    other = model.with_solver("implicit_midpoint", steps=5)
    logits = load(tmp_path / "out" / "model.onnx")(shapes(9))
    with torch.no_grad():
        torch.testing.assert_close(logits, other(shapes(9)), atol=1e-4, rtol=0)
        assert (logits - model(shapes(9))).abs().max() > 1e-3


def test_colour_and_a_users_folder_are_checked_on_the_users_images(tmp_path):
    for name in ("cat", "dog", "fish"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (30, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    settings = {"in_channels": 3, "image_size": 16, "task": None, "classes": ["cat", "dog", "fish"]}
    path, model = checkpoint(tmp_path, channels="rgb", data=str(tmp_path / "photos"), **settings)
    report = export.export(path, tmp_path / "out")
    assert report["images"] == {"count": 1000, "source": "12 of the user's own, 988 drawn (compound)"}
    assert report["channels"] == "rgb"
    assert Image.open(tmp_path / "out" / "example.png").mode == "RGB"

    state = {"task": None, "data": str(tmp_path / "photos"), "classes": ["dog", "cat", "bird"]}
    checked = check_images(model, state, 14)
    # A fifth of each class is of the test set; what was trained on, is drawn or of no class of the model has no label.
    assert checked.labels.tolist() == [1, 0, *[-1] * 12]
    assert torch.equal(check_images(model, state, 14, "train").images[9:12], checked.images[:3])
    assert checked.accuracy(torch.eye(3)[[1, 1, *[2] * 12]]) == 0.5

    checked = check_images(model, state | {"data": str(tmp_path / "gone")})
    assert checked.images.shape == (1000, 3, 16, 16) and checked.images.dtype == torch.uint8
    assert checked.accuracy(torch.eye(3)[[0] * 1000]) is None
    assert checked.source == f"none of the user's own ({tmp_path / 'gone'}: no such folder), 1000 drawn (compound)"


@pytest.mark.parametrize("exported", ["euler"], indirect=True)
def test_files_of_bytes_give_the_very_logits_of_files_of_floats(exported, tmp_path, few_images):
    model, floats, _ = exported
    export.main([str(floats.parent / "best.pt"), "--trajectory", "--input", "uint8", "--out", str(tmp_path / "bytes")])
    images = shapes(40)
    pixels = (images * 255).round().to(torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(pixels), model(images))
    for name in FILES:
        assert torch.equal(load(tmp_path / "bytes" / name)(pixels), load(floats / name)(images)), name
    session = onnxruntime.InferenceSession(tmp_path / "bytes" / "model.onnx")
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 1, 24, 24])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["input"] == "uint8" and "values as uint8," in metadata["preprocessing"]
    assert json.loads((tmp_path / "bytes" / "report.json").read_text())["input"] == "uint8"
    found = [Image.open(folder / "example.png") for folder in (tmp_path / "bytes", floats)]
    assert np.array_equal(*map(np.asarray, found))


def test_a_disagreement_leaves_nothing_behind(tmp_path, few_images, monkeypatch):
    path, _ = checkpoint(tmp_path, method="euler")
    with pytest.raises(UserError, match=r"with plain operations the outputs come within .* of the module's"):
        export.export(path, tmp_path / "deep" / "out", max_difference=1e-12)
    with pytest.raises(UserError, match="30 evaluations of f in each implicit stage the outputs come within"):
        export.export(path, tmp_path / "deep" / "out", method="implicit_euler", max_difference=1e-12)
    monkeypatch.setattr(export_folder, "compare", lambda *_: Agreement(20, 0.5, 19, 0))
    with pytest.raises(UserError, match=r"model\.onnx disagrees with PyTorch at batch size 1: logits differ by up to"):
        export.export(path, tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == ["best.pt"]


def test_stages_are_solved_as_in_the_module_where_the_images_need_it(tmp_path, few_images, monkeypatch):
    """A tolerance chosen on some images may be too large for others: then the files are written again."""
    path, _ = checkpoint(tmp_path, method="implicit_midpoint")
    tolerances = []

    def compare(logits, reference):
        tolerances.append(subjects[-1]._how.tolerance)
        wrong = tolerances[-1] > 0.0
        return Agreement(len(logits), 0.5 if wrong else 0.0, len(logits), 0)

    subjects, write = [], export_folder.write_onnx

    def written(*arguments, subject, **settings):
        subjects.append(subject)
        return write(*arguments, subject=subject, **settings)

    monkeypatch.setattr(export_folder, "write_onnx", written)
    monkeypatch.setattr(export_folder, "compare", compare)
    export.export(path, tmp_path / "out")
    assert len(subjects) == 2 and tolerances[0] > 0.0 and set(tolerances[1:]) == {0.0}
    assert subjects[1].exact() is None


def test_an_earlier_export_survives_a_failure_and_yields_to_a_success(tmp_path, few_images, monkeypatch):
    path, _ = checkpoint(tmp_path, method="euler")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("earlier")
    with pytest.raises(UserError):
        export.export(path, tmp_path / "out", method="implicit_euler", max_difference=1e-12)
    assert (tmp_path / "out" / "report.json").read_text() == "earlier"
    monkeypatch.setattr(export_folder, "_write", lambda *_: {"seconds": {}, "new": True})
    export.export(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["new"]
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "out"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    path, _ = checkpoint(tmp_path, method="euler")
    with pytest.raises(UserError, match=r"holds other files \(best\.pt\); name a new folder"):
        export.export(path, tmp_path)


def test_a_different_class_is_a_tie_only_within_the_difference():
    reference = torch.tensor([[1.0, 0.0], [1.0, 1.0 - 1e-6], [1.0, 0.5]])
    logits = torch.tensor([[1.0, 0.0], [1.0 - 2e-6, 1.0], [1.0, 0.5]])
    agreement = compare(logits, reference)
    assert (agreement.images, agreement.same_class, agreement.ties) == (3, 2, 1)
    assert agreement.max_difference == pytest.approx(2e-6, rel=0.1)
    assert agreement.holds(1e-4) and not agreement.holds(1e-6)
    agreement = compare(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert not agreement.holds(0.9)
    assert not compare(torch.tensor([[torch.nan, 1.0]]), torch.tensor([[0.0, 1.0]])).holds(1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pt"], "gone.pt: no such checkpoint"),
        (["."], ".: is a folder; name a checkpoint"),
        (["text.pt"], "text.pt: not a readable checkpoint"),
        (["best.pt", "--method", "rk4"], "'rk4'"),
        (["best.pt", "--input", "int8"], "'int8'"),
        (["best.pt", "--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["best.pt", "--max-difference", "nan"], "--max-difference: expected a finite number above 0, got 'nan'"),
        (["best.pt", "--max-difference", "0"], "--max-difference: expected a finite number above 0, got '0'"),
        (["best.pt", "--tolerance", "0.1", "--steps", "3"], "--tolerance chooses method and steps"),
        (["best.pt", "--out", "text.pt"], "is a file; name a folder"),
        ([], "checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path, method="euler")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        _cli.run(lambda: export.main(arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_smaller_files_give_nearly_the_same_logits(tmp_path, few_images, monkeypatch):
    monkeypatch.setattr(smaller, "MOST_LOST", 1.0)  # an untrained model's classes are close
    path, _ = checkpoint(tmp_path, method="euler")
    report = export.export(path, tmp_path / "out", quantize=True, half=True)
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.int8.onnx").graph.node}
    assert "DequantizeLinear" in operators
    halves = onnx.load(tmp_path / "out" / "model.half.onnx").graph
    assert onnx.TensorProto.FLOAT16 in {x.data_type for x in halves.initializer}
    images = shapes(9)
    exact = load(tmp_path / "out" / "model.onnx")(images)
    for name, closest in (("model.half.onnx", 0.02), ("model.int8.onnx", 0.5)):
        assert 0 < (load(tmp_path / "out" / name)(images) - exact).abs().max() < closest
        assert report["files"][name]["bytes"] < report["files"]["model.onnx"]["bytes"]


@pytest.mark.slow
def test_implicit_methods_are_quantized_with_stages_of_another_tolerance(tmp_path, few_images, monkeypatch):
    path, _ = checkpoint(tmp_path, method="implicit_euler")
    monkeypatch.setattr(smaller, "MOST_LOST", 1.0)
    times = iter([1.0, 2.0] * 3 + [2.0, 1.5] * 3)
    monkeypatch.setattr(smaller, "milliseconds", lambda *_: next(times))
    report = export.export(path, tmp_path / "out", quantize=True)
    assert report["files"]["model.int8.onnx"]["latency_ms"] == 1.0
    assert {x.name for x in (tmp_path / "out").iterdir()} == {*FILES, "model.int8.onnx", "report.json", "example.png"}
    with pytest.raises(UserError, match=r"takes 2.00 ms for one image and the float32 file 1.50 ms .*leave out --quan"):
        export.export(path, tmp_path / "other", quantize=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("exported", ["implicit_midpoint"], indirect=True)
def test_half_of_a_file_with_loops_is_that_of_its_weights(exported, tmp_path):
    _, out, _ = exported
    smaller.write_half(out / "model.onnx", tmp_path / "half.onnx")
    images = shapes(9)
    exact, half = (load(path)(images) for path in (out / "model.onnx", tmp_path / "half.onnx"))
    assert 0 < (half - exact).abs().max() < 0.05
    assert (tmp_path / "half.onnx").stat().st_size < 0.85 * (out / "model.onnx").stat().st_size


def test_convolutions_in_loops_take_and_give_bytes(tmp_path):
    """y becomes 0.5 conv(y), three times in one loop and never in another."""
    rng = np.random.default_rng(0)
    make, info, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    kind, shape = onnx.TensorProto.FLOAT, ["batch", 8, 6, 6]

    def loop(name, before, count):
        body = onnx.helper.make_graph(
            [
                make("Conv", [f"{name}/y", "weight", "bias"], [f"{name}/z"], f"{name}/conv", pads=[1, 1, 1, 1]),
                make("Mul", [f"{name}/z", "half"], [f"{name}/next"], f"{name}/mul"),
                make("Identity", [f"{name}/go"], [f"{name}/on"], f"{name}/identity"),
            ],
            name,
            [info(f"{name}/i", 7, []), info(f"{name}/go", 9, []), info(f"{name}/y", kind, shape)],
            [info(f"{name}/on", 9, []), info(f"{name}/next", kind, shape)],
        )
        return make("Loop", [count, "", before], [name], f"{name}/loop", body=body)

    constants = {
        "weight": rng.normal(size=(8, 8, 3, 3)).astype(np.float32) / 6,
        "bias": rng.normal(size=8),
        "half": 0.5,
    }
    constants = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    constants |= {"three": np.array(3), "none": np.array(0)}
    graph = onnx.helper.make_graph(
        [loop("first", "image", "three"), loop("logits", "first", "none")],
        "graph",
        [info("image", kind, shape)],
        [info("logits", kind, shape)],
        [tensor(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    images = torch.from_numpy(rng.normal(size=(40, 8, 6, 6)).astype(np.float32))
    smaller.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", images)

    exact, found = (load(tmp_path / name)(images) for name in ("model.onnx", "int8.onnx"))
    assert 0 < (found - exact).abs().max() < 0.03 * (exact.max() - exact.min())
    graph = onnx.load(tmp_path / "int8.onnx").graph
    makers = {name: node for node in nodes(graph) for name in node.output}
    entered, not_entered = (node for node in nodes(graph) if node.op_type == "Conv")
    assert [makers[name].op_type for name in entered.input] == 3 * ["DequantizeLinear"]
    assert {x.name: x.data_type for x in graph.initializer}["weight/byte"] == onnx.TensorProto.INT8
    assert list(not_entered.input) == ["logits/y", "weight", "bias"], "nothing is known of its range"


def test_a_smaller_file_that_classifies_fewer_images_right_is_refused(tmp_path, monkeypatch):
    path, logits, reference = tmp_path / "model.int8.onnx", torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 2, 1]]
    path.write_text("")
    monkeypatch.setattr(smaller, "logits_of", lambda *_: logits)
    unknown, right, wrong = torch.full((4,), -1), torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 0])
    message = r"model.int8.onnx gives 1 of 4 images another class than the float32 file, more than 0.5%; .*--quantize"
    with pytest.raises(UserError, match=message):
        smaller.judge(path, torch.zeros(4), unknown, reference)
    message = r"model.int8.onnx classifies 1 of 4 images right no more, more than 0.5%; .*leave out --quantize"
    with pytest.raises(UserError, match=message):
        smaller.judge(path, torch.zeros(4), right, reference)
    figures = smaller.judge(path, torch.zeros(4), wrong, reference)  # of another class, but the right one
    assert (figures["same_class"], figures["accuracy"], figures["float32_accuracy"]) == (3, 1.0, 0.75)


def test_the_quickest_solver_within_a_tolerance_is_taken(tmp_path):
    model, _ = untrained(method="implicit_midpoint")
    images = shapes(6)
    labels = model.with_solver("implicit_midpoint", 200)(images).argmax(dim=1)
    labels[0], labels[1] = -1, (labels[1] + 1) % 3  # one is not known, one of five is wrong
    checked = CheckImages((images * 255).round().to(torch.uint8), labels, "")
    tried, best = try_solvers(model, checked, 0.02)
    with torch.no_grad():
        exact = model.with_solver("implicit_midpoint", 200)(images)
        found = model.with_solver(best.method, best.steps)(images)
    assert (found - exact).abs().max() <= 0.02 * 1.2
    assert all(best.milliseconds <= x.milliseconds for x in tried if x.difference <= 0.02)
    assert any(x.difference > 0.02 for x in tried)
    assert best.accuracy == pytest.approx(0.8) and min(x.same_class for x in tried) < 1.0
    unknown = CheckImages(checked.images, torch.full((6,), -1), "")
    assert unknown.accuracy(exact) is None
    plot_solvers(tried, 0.02, tmp_path / "both.png")
    plot_solvers([replace(x, accuracy=None) for x in tried], 0.02, tmp_path / "one.png")
    assert Image.open(tmp_path / "both.png").width == 2 * Image.open(tmp_path / "one.png").width
    with pytest.raises(UserError, match=r"--tolerance 1e-09"):
        try_solvers(model, checked, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", SOURCE_METHODS)
def test_a_hundred_steps_of_the_full_width_export(tmp_path, method):
    path, _ = checkpoint(tmp_path, method=method, width=64, image_size=32)
    report = export.export(path, tmp_path / "out", steps=100)
    assert report["steps"] == 100
    assert all(figures["max_difference"] <= 1e-4 for figures in report["files"].values())
