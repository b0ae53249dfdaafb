"""``python -m nodeshape.export``: files that give PyTorch's logits, or one line and nothing written."""

import io
import json
import os
from contextlib import redirect_stdout

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from nodeshape import ShapeClassifier, _cli, export, odeint
from nodeshape._data.shapes import CLASSES, draw_set
from nodeshape._errors import UserError
from nodeshape._exporting import export_folder, verify
from nodeshape._exporting.unrolled import UnrolledClassifier
from nodeshape._exporting.verify import check_images, compare, load_onnx, load_torchscript
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


@pytest.fixture(scope="module", params=SOURCE_METHODS)
def exported(request, tmp_path_factory):
    """A classifier of each method, its export folder, and what the command printed.

    Those of implicit methods are verified on fewer images than users get, to save time.
    """
    path, model = checkpoint(tmp_path_factory.mktemp("run"), method=request.param)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(verify, "IMAGES", 1000 if request.param == "euler" else 100)
        export.main([str(path), "--trajectory"])
    return model, path.parent / "export", printed.getvalue()


def test_exported_files_give_pytorchs_logits_at_any_batch_size(exported):
    model, out, _ = exported
    images = shapes(100).repeat(3, 1, 1, 1)  # of those the verification saw
    with torch.no_grad():
        expected = model(images)
        for name, load in (("model.onnx", load_onnx), ("model.ts", load_torchscript)):
            classify = load(out / name)
            for size in (1, 7, 300):
                torch.testing.assert_close(classify(images[:size]), expected[:size], atol=1e-4, rtol=0)


def test_the_report_holds_the_verification(exported):
    model, out, printed = exported
    assert printed.splitlines()[-1] == f"python -m nodeshape.predict {out / 'model.onnx'} {out / 'example.png'}"
    assert {file.name for file in out.iterdir()} == {"model.onnx", "model.ts", "report.json", "example.png"}
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
    parts = ["reference", "choosing_iterations", "writing", "proof"]
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


@pytest.mark.parametrize("method", SOURCE_METHODS)
def test_an_images_logits_do_not_depend_on_its_batch(method):
    model, _ = untrained(method=method)
    unrolled = UnrolledClassifier(model, 1 if method == "euler" else 8)
    images = shapes(4)
    wild = torch.cat([images[:1], 1e3 * images[1:3], torch.full_like(images[:1], torch.nan)])
    torch.testing.assert_close(unrolled(wild)[:1], unrolled(images)[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["implicit_euler", "implicit_midpoint"])
def test_iterations_beyond_convergence_change_nothing(method):
    model, _ = untrained(method=method)
    images = shapes(6)
    expected = model(images)
    for iterations in (16, 30):
        torch.testing.assert_close(UnrolledClassifier(model, iterations)(images), expected, atol=2e-5, rtol=0)


def test_a_blank_image_whose_flow_rests_is_no_division_by_zero():
    model, _ = untrained(method="implicit_euler")
    torch.nn.init.zeros_(model.ode.dynamics.norm3.weight)
    torch.nn.init.zeros_(model.ode.dynamics.norm3.bias)
    image = torch.zeros(1, 1, 24, 24)
    torch.testing.assert_close(UnrolledClassifier(model, 4)(image), model(image))


def test_the_whole_classifier_exports_to_the_same_function():
    model, _ = untrained(method="implicit_midpoint", steps=2)
    unrolled = UnrolledClassifier(model, iterations=2)
    images = shapes(5)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(unrolled, (images[:2],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), unrolled(images), atol=1e-5, rtol=0)


def test_metadata_says_all_that_a_consumer_needs(exported):
    model, out, _ = exported
    session = onnxruntime.InferenceSession(out / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["circle", "triangle", "rectangle"]
    assert metadata["nodeshape_version"] and "[0, 1]" in metadata["preprocessing"]
    assert {name: metadata[name] for name in ("image_size", "channels", "method", "steps")} == {
        "image_size": "24",
        "channels": "grey",
        "method": model.ode.method,
        "steps": str(STEPS),
    }
    extra = {"metadata.json": ""}
    torch.jit.load(out / "model.ts", _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == metadata
    (image,), (logits, trajectory) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 1, 24, 24])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    assert (trajectory.name, trajectory.shape) == ("trajectory", ["batch", STEPS + 1, 16, 12, 12])
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    assert proto.opset_import[0].version >= 18
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert Image.open(out / "example.png").size == (24, 24)


def test_another_solver_is_exported_with_the_same_weights(tmp_path, few_images):
    path, model = checkpoint(tmp_path, method="euler")
    report = export.export(path, tmp_path / "out", method="implicit_midpoint", steps=5)
    assert (report["method"], report["steps"]) == ("implicit_midpoint", 5)
    other = model.with_solver("implicit_midpoint", steps=5)
    logits = load_onnx(tmp_path / "out" / "model.onnx")(shapes(9))
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

    images, source = check_images(model, {"task": None, "data": str(tmp_path / "gone")})
    assert images.shape == (1000, 3, 16, 16) and 0 <= images.min() < images.max() <= 1
    assert source == f"none of the user's own ({tmp_path / 'gone'}: no such folder), 1000 drawn (compound)"


def test_a_disagreement_leaves_nothing_behind(tmp_path, few_images):
    path, _ = checkpoint(tmp_path, method="euler")
    with pytest.raises(UserError, match=r"model\.onnx disagrees with PyTorch at batch size 1: logits differ by up to"):
        export.export(path, tmp_path / "deep" / "out", tolerance=1e-12)
    with pytest.raises(UserError, match="unrolled stages of implicit_euler come within"):
        export.export(path, tmp_path / "deep" / "out", method="implicit_euler", tolerance=1e-12)
    assert os.listdir(tmp_path) == ["best.pt"]


def test_an_earlier_export_survives_a_failure_and_yields_to_a_success(tmp_path, few_images, monkeypatch):
    path, _ = checkpoint(tmp_path, method="euler")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("earlier")
    with pytest.raises(UserError):
        export.export(path, tmp_path / "out", method="implicit_euler", tolerance=1e-12)
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
        (["best.pt", "--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["best.pt", "--tolerance", "nan"], "--tolerance: expected a finite number above 0, got 'nan'"),
        (["best.pt", "--tolerance", "0"], "--tolerance: expected a finite number above 0, got '0'"),
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
@pytest.mark.parametrize("method", SOURCE_METHODS)
def test_a_hundred_steps_of_the_full_width_export(tmp_path, method):
    path, _ = checkpoint(tmp_path, method=method, width=64, image_size=32)
    report = export.export(path, tmp_path / "out", steps=100)
    assert report["steps"] == 100
    assert all(figures["max_difference"] <= 1e-4 for figures in report["files"].values())
