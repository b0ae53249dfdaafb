"""The example of y = x², and the augmentation that it rests on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import quadratic


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, float], Any]:
    return quadratic.train(0, True)


def test_one_dimension_is_monotone_and_one_more_is_not(trained: tuple[dict[str, float], Any]) -> None:
    figures, models = trained
    assert figures["plain"] > quadratic.MONOTONE > 4 * figures["augmented"]
    with torch.no_grad():
        slopes = {name: model(quadratic.grid()).diff(dim=0) for name, model in models.items()}
    assert bool((slopes["plain"] > 0).all()) or bool((slopes["plain"] < 0).all())
    assert float(slopes["augmented"].min()) < 0 < float(slopes["augmented"].max())


def test_no_monotone_function_on_a_grid_is_nearer_than_the_bound() -> None:
    from sklearn.isotonic import isotonic_regression

    x = torch.linspace(-1.0, 1.0, 20_001).double()
    nearest = torch.tensor(isotonic_regression((x**2).numpy()))
    assert float((nearest - x**2).square().mean()) == pytest.approx(quadratic.MONOTONE, abs=1e-4)


def test_the_trained_flow_runs_in_onnxruntime(trained: tuple[dict[str, float], Any], tmp_path: Path) -> None:
    import onnxruntime

    model, x = trained[1]["augmented"], quadratic.grid()
    ns.to_onnx(model, x[:8], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.tensor(found), model(x), atol=1e-5)


def test_a_block_appends_zeros_to_features_and_channels() -> None:
    grow = nn.Module()
    grow.forward = lambda t, y: torch.ones_like(y)  # type: ignore[method-assign]
    for shape in ((4, 2), (4, 2, 3, 3), (4, 2, 5)):
        y = torch.randn(shape)
        out = ns.ODEBlock(grow, method="euler", steps=4, augment=3)(y)
        assert out.shape == (4, 5, *shape[2:])
        assert torch.allclose(out[:, :2], y + 1) and torch.allclose(out[:, 2:], torch.ones(()))
    assert "augment=3" in repr(ns.ODEBlock(grow, augment=3)) and "augment" not in repr(ns.ODEBlock(grow))


def test_an_augmented_block_fuses_and_shares_its_weights_with_another_solver() -> None:
    torch.manual_seed(0)
    f, x = ns.MLPDynamics(3, (8,)), torch.randn(5, 1)
    plain = ns.ODEBlock(f, method="rk4", steps=5, augment=2)
    fused = ns.ODEBlock(ns.fuse(f, torch.zeros(2, 3)), method="rk4", steps=5, augment=2)
    assert torch.allclose(plain(x), fused(x), atol=1e-6)
    assert torch.allclose(fused.with_solver("rk4", steps=10)(x), fused(x), atol=1e-4)


def test_what_cannot_be_augmented_is_said() -> None:
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"0 or more, got {wrong}"):
            ns.ODEBlock(ns.MLPDynamics(1), augment=wrong)
    with pytest.raises(ValueError, match=r"takes features \[batch, n, ...\], got shape \[2\]"):
        ns.ODEBlock(ns.MLPDynamics(3), augment=1)(torch.zeros(2))
