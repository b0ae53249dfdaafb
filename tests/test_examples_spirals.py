"""examples/spirals.py and encoders.py: spirals and times are what they say, the Neural ODE learns and exports."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import nodeshape as ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import encoders
import spirals
from problems import relative_error


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times_are_each_samples_own_and_increase_inside_their_window() -> None:
    t = spirals.times(50, 1.0, 3.0, random())
    assert t.shape == (spirals.POINTS, 50) and bool((t.diff(dim=0) > 0).all())
    assert float(t.min()) > 1.0 and float(t.max()) < 3.0
    assert not torch.equal(t[:, 0], t[:, 1])


def test_spirals_turn_both_ways_and_grow_linearly() -> None:
    drawn = spirals.Spirals.drawn(100, random())
    assert 0.3 < float((drawn.way > 0).float().mean()) < 0.7
    t = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(-1, 100)
    points = drawn.at(t)
    assert torch.allclose(points.norm(dim=-1).diff(dim=0), torch.tensor(0.08), atol=1e-5)
    (x, y), (x_, y_) = points[0].T, points[1].T
    assert torch.equal(torch.sign(x * y_ - y * x_), drawn.way)


def test_the_encoder_reads_each_point_with_the_time_to_the_next() -> None:
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(2, 5, 3)
    t, points = torch.tensor([[0.1, 0.2], [0.4, 0.7]]), torch.randn(2, 2, 2)
    h = torch.zeros(1, 2, 5)
    for x, wait in zip(points, ([0.3, 0.5], [0.6, 0.3])):
        h = encoder.gru(torch.cat([x, torch.tensor(wait)[:, None]], dim=1)[None], h)[1]
    assert torch.allclose(encoder(t, points, torch.tensor([1.0, 1.0])), encoder.head(h[0]), atol=1e-6)


def test_each_samples_own_times_are_read_before_and_after_the_last_point_seen() -> None:
    class Turning(torch.nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.stack([-y[:, 1], y[:, 0], *(0 * y[:, 0] for _ in range(4))], dim=1)

    model = spirals.NeuralODE(Turning())
    del model.encoder  # which may only be another module
    model.encoder = lambda t, points, end: torch.eye(6)[:1].expand(3, -1)
    seen_at = torch.tensor([[0.5, 1.0, 1.5], [2.0, 2.3, 3.1]])
    t = torch.tensor([[0.0, 0.2, 0.3], [2.0, 2.1, 2.2], [4.0, 5.0, 7.5]])
    found, angle = model(seen_at, torch.zeros(2, 3, 2), t), t - seen_at[-1]
    assert torch.allclose(found, torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1), atol=2e-3)


def test_the_rival_program_on_torchdiffeq_computes_the_same() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    ours, theirs = spirals.NeuralODE(), spirals.NeuralODE(spirals.Field(), torchdiffeq.odeint)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            other.copy_(mine)
    t = spirals.times(7, 0.0, spirals.WINDOW, random())
    seen = spirals.Spirals.drawn(7, random()).at(t)
    assert relative_error([ours(t, seen, t)], [theirs(t, seen, t)]) < 1e-3
    y, grid = torch.randn(7, spirals.STATE), torch.arange(3) * -spirals.STEP
    assert ns.backend(ours.f, y, grid, method="rk4").name == "fused"


@cache
def trained() -> Any:
    return spirals.train(0, quick=True)


def test_it_learns_in_seconds() -> None:
    figures, (_, new) = trained()
    untrained = spirals.errors(spirals.NeuralODE(), new, random(1))
    assert figures["Neural ODE: error inside"] < 0.5 * untrained[0]
    assert figures["Neural ODE: error beyond"] < 0.7 * untrained[1]
    assert math.isfinite(figures["GRU: error beyond"])


@pytest.mark.slow
def test_the_curve_exports(tmp_path: Path) -> None:
    _, (models, _) = trained()
    curve = spirals.Curve(models["Neural ODE"].f)
    y0 = torch.randn(5, spirals.STATE)
    ns.to_onnx(curve, y0, tmp_path / "spiral.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "spiral.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: y0.numpy()})
    with torch.no_grad():
        wanted = curve(y0)
    assert found.shape == (5, round(spirals.WINDOW / spirals.STEP) // 4 + 1, 2)
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)
