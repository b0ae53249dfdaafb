"""examples/spirals.py and encoders.py: spirals and times are what they say, the Neural ODE learns and exports."""

from __future__ import annotations

import math
import sys
from pathlib import Path

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
    ways = (drawn.speed > 0).float().mean()
    assert 0.3 < float(ways) < 0.7
    t = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(-1, 100)
    radius = drawn.at(t).norm(dim=-1)
    assert torch.allclose(radius.diff(dim=0), drawn.growth.expand(2, -1), atol=1e-5)


def test_the_encoder_reads_from_the_last_point_to_the_first() -> None:
    torch.manual_seed(0)
    encoder = encoders.BackwardGRU(2, 5, 3)
    t, points = spirals.times(4, 0.0, 1.0, random())[:6], torch.randn(6, 4, 2)
    h = torch.zeros(1, 4, 5)
    for k in reversed(range(6)):
        gap = t[k] - (t[k - 1] if k else 0.0)
        h = encoder.gru(torch.cat([points[k], gap[:, None]], dim=1)[None], h)[1]
    assert torch.allclose(encoder(t, points), encoder.head(h[0]), atol=1e-6)


def test_the_rival_program_on_torchdiffeq_computes_the_same() -> None:
    pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    ours = spirals.NeuralODE()
    theirs = spirals.NeuralODE(spirals.Field(), spirals.on_torchdiffeq)
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            other.copy_(mine)
    t = spirals.times(7, 0.0, spirals.WINDOW, random())
    seen = spirals.Spirals.drawn(7, random()).at(t)
    assert relative_error([ours(t, seen, t)], [theirs(t, seen, t)]) < 1e-3
    y0, times = torch.randn(7, spirals.STATE), torch.cat([torch.zeros(1, 7), t])
    how = {"method": "rk4", "options": {"step_size": spirals.STEP}}
    assert ns.backend(ours.f, y0, times, **how).name == "fused"


def test_it_learns_in_seconds_and_the_curve_exports(tmp_path: Path) -> None:
    figures, (models, new) = spirals.train(0, quick=True)
    untrained = spirals.errors(spirals.NeuralODE(), new, random(1))
    assert figures["Neural ODE: error inside"] < 0.5 * untrained[0]
    assert figures["Neural ODE: error beyond"] < 0.7 * untrained[1]
    curve = spirals.Curve(models["Neural ODE"].f)
    y0 = torch.randn(5, spirals.STATE)
    ns.to_onnx(curve, y0, tmp_path / "spiral.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "spiral.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: y0.numpy()})
    with torch.no_grad():
        wanted = curve(y0)
    assert found.shape == (5, round(2 * spirals.WINDOW / spirals.STEP) + 1, 2)
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)
    assert math.isfinite(figures["GRU: error beyond"])
