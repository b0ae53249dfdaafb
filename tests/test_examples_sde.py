"""The example of stochastic equations: it learns in seconds, and what it trains exports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import sde


@pytest.fixture(scope="module")
def trained() -> Any:
    return sde.fit_classifier("noise on features", 0, True)


@pytest.fixture(scope="module")
def shapes() -> tuple[torch.Tensor, torch.Tensor]:
    test = sde.drawn_data("compound", 1, 200, sde.SIZE, "grey", 0).test
    return test.batch(slice(None), torch.device("cpu"))


def test_the_sde_learns_the_spread_that_the_ode_cannot() -> None:
    figures, _ = sde.learn_equation(0, True)
    assert figures["deviation off by, SDE"] < 0.3
    assert figures["deviation off by, ODE"] > 0.5
    assert figures["mean off by, SDE"] < 0.3


def test_the_truth_has_its_exact_moments() -> None:
    random = torch.Generator().manual_seed(0)
    for ours, exact in zip(sde.moments(sde.truth(sde.start(20_000, random), random)), sde.exact_moments()):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)


def test_the_noisy_classifier_learns(trained: Any, shapes: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    untrained = sde.Classifier("features", 0.4)
    assert sde.accuracy(trained, *shapes) > sde.accuracy(untrained, *shapes) + 20


def test_its_mean_model_exports(trained: Any, shapes: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    images = shapes[0][:5]
    with pytest.raises(ValueError, match="export the drift alone"):
        ns.to_onnx(trained, images, tmp_path / "noisy.onnx")
    trained.block.noisy = False
    ns.to_onnx(trained, images, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), trained(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(sde.STRENGTHS))
def test_corruptions_change_what_they_say(kind: str, shapes: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, random = shapes[0][:4], torch.Generator().manual_seed(0)
    changes = [float((sde.corrupted(images, kind, s, random) - images).abs().mean()) for s in sde.STRENGTHS[kind]]
    assert changes[0] == 0 and changes == sorted(changes) and changes[1] > 0
    if kind == "cover":
        grey = sde.corrupted(torch.zeros(1, 1, sde.SIZE, sde.SIZE), kind, 0.5, random)
        assert int((grey == 0.5).sum()) == (sde.SIZE // 2) ** 2
