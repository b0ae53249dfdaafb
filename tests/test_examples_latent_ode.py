"""examples/latent_ode.py: the data and the errors are what they say, the latent ODE learns and its decoder exports."""

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

import latent_ode
from problems import relative_error


def pieces(samples: int, points: int = 30, seed: int = 0) -> latent_ode.Pieces:
    return latent_ode.Pieces.drawn(samples, points, torch.Generator().manual_seed(seed), followed=True)


def test_the_points_seen_are_those_of_the_window_with_noise() -> None:
    drawn = pieces(500)
    assert bool((drawn.where.diff(dim=0) > 0).all()) and int(drawn.where.max()) == latent_ode.WINDOW - 1
    true = drawn.true[drawn.where, torch.arange(500)]
    assert abs(float((drawn.seen - true).std()) / latent_ode.NOISE - 1) < 0.02
    assert bool(drawn.true[: latent_ode.WINDOW].isfinite().all())


def test_both_spirals_are_drawn_and_turn_their_way() -> None:
    angle = torch.tensor([3.0, 3.01])
    for way, points, centre in zip((1, -1), latent_ode.spirals(angle), (5.0, -5.0)):
        (x, y), (x_, y_) = (points - torch.tensor([centre, 0.0])).tolist()
        assert way * (x * y_ - y * x_) > 0
    both = latent_ode.one_of_each(pieces(50))
    assert both.true.shape[1] == 2 and bool(both.true.isfinite().all())


def test_errors_are_those_of_a_coordinate_inside_and_beyond() -> None:
    drawn = pieces(300)
    assert bool(drawn.true.isfinite().all())

    class Off:
        def predicted(self, pieces: latent_ode.Pieces) -> torch.Tensor:
            return pieces.true + torch.tensor([0.1, 0.2])

    wanted = math.sqrt((0.1**2 + 0.2**2) / 2)
    assert latent_ode.errors(Off(), drawn) == pytest.approx((wanted, wanted), rel=1e-3)


def test_the_rival_continues_from_its_own_predictions() -> None:
    torch.manual_seed(0)
    rival, drawn = latent_ode.Rival(), pieces(3)
    with torch.no_grad():
        found = rival.predicted(drawn)[latent_ode.WINDOW :]
        ahead = torch.cat([drawn.where.diff(dim=0), latent_ode.WINDOW - drawn.where[-1:]])
        again, _ = rival(
            torch.cat([drawn.seen, found[:-1]]),
            torch.cat([ahead, torch.ones(latent_ode.WINDOW - 1, 3, dtype=torch.long)]),
        )
    assert len(found) == latent_ode.WINDOW and torch.allclose(again[-latent_ode.WINDOW :], found, atol=1e-5)


def test_the_rival_program_on_torchdiffeq_computes_the_same() -> None:
    pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    ours = latent_ode.LatentODE()
    theirs = latent_ode.LatentODE(latent_ode.Field(), latent_ode.on_torchdiffeq)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            other.copy_(mine)
        assert relative_error([ours.predicted(pieces(5))], [theirs.predicted(pieces(5))]) < 1e-5


@cache
def trained() -> Any:
    return latent_ode.train(0, quick=True)


def test_it_learns_in_seconds() -> None:
    figures, [(points, _, _, new)] = trained()
    torch.manual_seed(0)
    untrained = latent_ode.errors(latent_ode.LatentODE(), new)
    assert figures[f"latent ODE, {points} points, inside the window"] < 0.5 * untrained[0]


@pytest.mark.slow
def test_the_decoder_exports(tmp_path: Path) -> None:
    _, [(_, model, _, _)] = trained()
    decoder, z0 = latent_ode.Decoder(model), torch.randn(5, latent_ode.LATENT) / 4
    ns.to_onnx(decoder, z0, tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: z0.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), decoder(z0), atol=1e-3)
    assert found.shape == (5, latent_ode.WINDOW // 10, 2)
