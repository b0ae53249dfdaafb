"""The example of tolerances: what a network keeps, and what it saves, when it is tested at another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import tolerance


@pytest.fixture(scope="module")
def trained() -> ns.ShapeClassifier:
    model = tolerance.solve_by(tolerance.network(0), 1e-1)
    tolerance.fit(model, tolerance.images("train", 900, 0), 0, 4, "rtol 0.1")
    return model


def test_a_looser_test_costs_less_and_is_as_accurate(trained: ns.ShapeClassifier) -> None:
    test = tolerance.images("test", 500, 0)
    loose, few = tolerance.tested(tolerance.solve_by(trained, 10.0), test)
    tight, many = tolerance.tested(tolerance.solve_by(trained, 1e-4), test)
    assert tight > 25 > 100 / 7 and abs(loose - tight) < 3
    assert few < many / 2


def test_one_step_of_rk4_gives_other_classes_than_many(trained: ns.ShapeClassifier) -> None:
    images = tolerance.images("test", 500, 0)[0]

    def classes(**how: float) -> torch.Tensor:
        model = tolerance.solve_by(trained, **how).eval()
        with torch.no_grad():
            return model(images).argmax(1)

    tight = classes(tolerance=1e-4)
    one, many = (float((classes(steps=steps) != tight).float().mean()) for steps in (1, 30))
    assert one > 0.2 > 0.05 > many


def test_its_training_takes_the_kernel(trained: ns.ShapeClassifier) -> None:
    features = trained.stem(torch.zeros(2, 1, tolerance.SIZE, tolerance.SIZE)).contiguous()
    how = {"method": "dopri5", "rtol": 0.1, "atol": 0.1}
    assert ns.backend(trained.ode.dynamics, features, [0.0, 1.0], **how).name == "fused"


def test_the_trained_network_runs_in_onnxruntime(trained: ns.ShapeClassifier, tmp_path: Path) -> None:
    import onnxruntime

    model, images = tolerance.solve_by(trained, steps=2).eval(), tolerance.images("test", 64, 0)[0]
    ns.to_onnx(model, images[:8], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found), model(images), atol=1e-3)
