"""The classifier: shapes, other solvers with the same weights, parent weights, and independence of batch-mates."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import nodeshape as ns
from nodeshape._training.checkpoint import load_classifier, save_checkpoint
from nodeshape._training.evaluate import calibrate_batch_norm


def warm_classifier(**settings: object) -> ns.ShapeClassifier:
    """A classifier of 16×16 images whose batch normalisation has seen some, as after training."""
    torch.manual_seed(0)
    model = ns.ShapeClassifier(3, 16, width=64, **settings)  # type: ignore[arg-type]
    calibrate_batch_norm(model, iter([torch.rand(32, 1, 16, 16)]))
    return model.eval()


@pytest.mark.parametrize(("image_size", "in_channels"), [(8, 1), (13, 3), (28, 1), (32, 1), (65, 3)])
def test_any_image_size_and_channels_give_logits(image_size: int, in_channels: int) -> None:
    model = ns.ShapeClassifier(5, image_size, in_channels, width=32, steps=2)
    assert model(torch.rand(3, in_channels, image_size, image_size)).shape == (3, 5)


def test_wrong_image_shape_names_both_shapes() -> None:
    model = ns.ShapeClassifier(3, steps=1)
    with pytest.raises(ValueError, match=r"\[batch, 1, 32, 32\], got \[2, 3, 32, 32\]"):
        model(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("method", ["euler", "implicit_euler", "implicit_midpoint"])
def test_an_image_alone_and_in_a_batch_has_the_same_logits(method: str) -> None:
    model = warm_classifier(method=method, steps=8)
    images = torch.rand(9, 1, 16, 16)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_a_training_batch_of_one_image_is_normalised_as_in_evaluation_after_pooling() -> None:
    model = ns.ShapeClassifier(3, 16, width=32, steps=2)
    norm = model.head[3]
    norm.norm.running_mean.fill_(0.5)  # type: ignore[union-attr, operator]
    pooled = torch.rand(1, 64)
    torch.testing.assert_close(norm(pooled), norm.eval()(pooled))
    assert model.train()(torch.rand(1, 1, 16, 16)).isfinite().all()
    assert norm.norm.running_mean.eq(0.5).all()  # type: ignore[union-attr, operator]


def test_the_flow_of_an_untrained_classifier_is_near_the_identity() -> None:
    model = warm_classifier(steps=8)
    with torch.inference_mode():
        before = model.stem(torch.rand(9, 1, 16, 16)).contiguous()
        moved = (model.ode(before) - before).square().mean().sqrt()
    assert 0.05 < moved / before.square().mean().sqrt() < 0.6


def test_with_solver_shares_weights_and_leaves_the_original_alone() -> None:
    model = ns.ShapeClassifier(3, 16, width=32, method="euler", steps=4)
    other = model.with_solver(method="implicit_midpoint", steps=7)
    assert (other.ode.method, other.ode.steps) == ("implicit_midpoint", 7)
    assert (model.ode.method, model.ode.steps) == ("euler", 4)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))


def test_methods_agree_as_steps_grow() -> None:
    model = warm_classifier(steps=16)
    images = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        exact = model.with_solver("implicit_midpoint", steps=128)(images)
        for method in ("euler", "implicit_euler"):
            errors = [(model.with_solver(method, steps=n)(images) - exact).abs().max() for n in (16, 64)]
            assert errors[1] < 0.5 * errors[0]


def test_conv_dynamics_loads_the_parent_papers_state_dict() -> None:
    """The network of torchdiffeq's MNIST example, written again."""

    class ConcatConv2d(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._layer = torch.nn.Conv2d(65, 64, 3, padding=1)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self._layer(torch.cat([torch.ones_like(x[:, :1, :, :]) * t, x], 1))

    class ODEfunc(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.norm3 = (torch.nn.GroupNorm(32, 64) for _ in range(3))
            self.conv1, self.conv2 = ConcatConv2d(), ConcatConv2d()

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            out = self.conv1(t, torch.relu(self.norm1(x)))
            return self.norm3(self.conv2(t, torch.relu(self.norm2(out))))

    torch.manual_seed(0)
    parent, ours = ODEfunc(), ns.ConvDynamics(64)
    ours.load_state_dict(parent.state_dict())
    t, y = torch.tensor(0.3), torch.randn(2, 64, 7, 7)
    torch.testing.assert_close(ours(t, y), parent(t, y))


def test_conv_dynamics_is_the_written_out_network() -> None:
    torch.manual_seed(0)
    f = ns.ConvDynamics(64).double()
    y, t = torch.randn(2, 64, 5, 4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    x = torch.relu(torch.nn.functional.group_norm(y, 32, f.norm1.weight, f.norm1.bias))
    weight = f.conv1._layer.weight
    x = torch.nn.functional.conv2d(x, weight[:, 1:], f.conv1._layer.bias, padding=1)
    x = x + 0.3 * torch.nn.functional.conv2d(torch.ones(1, 1, 5, 4, dtype=torch.float64), weight[:, :1], padding=1)
    x = torch.relu(torch.nn.functional.group_norm(x, 32, f.norm2.weight, f.norm2.bias))
    x = f.norm3(f.conv2(t, x))
    torch.testing.assert_close(f(t, y), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_the_same_logits(copied: object) -> None:
    model = ns.ShapeClassifier(3, 16, width=32, steps=2).eval()
    images = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        assert torch.equal(copied(model)(images), model(images))  # type: ignore[operator]


def test_a_checkpoint_gives_back_the_classifier(tmp_path: Path) -> None:
    architecture = {"num_classes": 3, "image_size": 16, "in_channels": 1, "width": 32, "step_size": 0.5}
    model = ns.ShapeClassifier(**architecture).eval()
    save_checkpoint(
        tmp_path / "best.pt", {"model": model.state_dict(), "architecture": architecture, "classes": ["a", "b", "c"]}
    )
    loaded, classes = load_classifier(tmp_path / "best.pt")
    assert classes == ["a", "b", "c"] and not loaded.training
    images = torch.rand(2, 1, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_calibrated_batch_norm_has_the_mean_statistics_of_its_batches() -> None:
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3)
    batches = [torch.randn(10, 3, 4, 4) * (i + 1) + i for i in range(4)]
    calibrate_batch_norm(layer, iter(batches))
    mean = torch.stack([b.mean(dim=(0, 2, 3)) for b in batches]).mean(dim=0)
    torch.testing.assert_close(layer.running_mean, mean)
    assert layer.momentum == 0.1


def test_backend_names_the_path_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    f, y = ns.MLPDynamics(2), torch.zeros(3, 2)
    assert ns.backend(f, y).name == "fused"
    assert (
        ns.backend(f, y, adjoint="continuous").reason
        == "gradients of error control without a record take the plain loop"
    )
    why = "adjoint='continuous' of rk4 takes the plain loop"
    assert ns.backend(f, y, method="rk4", steps=3, adjoint="continuous").reason == why
    monkeypatch.setenv("NODESHAPE_FUSED", "1")
    assert str(ns.backend(lambda t, y: y, y, steps=3)).startswith("plain: function has no fused kernel")
    assert str(ns.backend(f, y, steps=3)) == "fused: MLPDynamics has a kernel for torch.float32 on cpu"
    monkeypatch.setenv("NODESHAPE_FUSED", "0")
    assert str(ns.backend(f, y, steps=3)) == "plain: NODESHAPE_FUSED=0"


class Normalised(torch.nn.Module):
    """A dynamics with all that makes copying hard: batch norm, a parametrisation, a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3))
        self.norm = torch.nn.BatchNorm1d(3)
        self.again = self.layer

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(y))


@pytest.mark.parametrize("compiled", [False, True])
def test_another_solver_shares_weights_and_nothing_else(compiled: bool) -> None:
    f = Normalised()
    block = ns.ODEBlock(torch.compile(f, backend="eager") if compiled else f, steps=2)
    other = block.with_solver(steps=3)
    g = other.dynamics._orig_mod if compiled else other.dynamics
    assert all(a is b for a, b in zip(f.parameters(), g.parameters()))
    assert all(a is b for a, b in zip(f.buffers(), g.buffers()))
    assert block.state_dict().keys() == other.state_dict().keys() and g.again is g.layer

    other.eval()
    assert f.training and f.norm.training and not g.norm.training
    seen = int(f.norm.num_batches_tracked)
    other(torch.randn(5, 3))
    assert int(f.norm.num_batches_tracked) == seen, "the copy's evaluation mode did not reach its batch norm"
    block(torch.randn(5, 3))
    assert int(f.norm.num_batches_tracked) > seen, "the original's training mode was lost"

    g.norm = torch.nn.Identity()
    g.register_forward_hook(lambda *_: None)
    assert isinstance(f.norm, torch.nn.BatchNorm1d) and not f._forward_hooks
    block.dynamics = torch.nn.Identity()
    assert other.dynamics is not block.dynamics


def test_weights_of_both_move_when_one_is_moved() -> None:
    model = ns.ShapeClassifier(3, 16, width=32, step_size=0.5).eval()
    other = model.with_solver(steps=1)
    other.double()
    images = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    assert model(images).dtype == other(images).dtype == torch.float64
    model.float()
    assert other(images.float()).dtype == torch.float32


def test_a_classifier_under_another_solver_keeps_its_own_mode() -> None:
    model = ns.ShapeClassifier(3, 16, width=32, steps=2)
    other = model.with_solver(method="implicit_euler").eval()
    assert all(module.training for module in model.modules()) and not any(m.training for m in other.modules())
    other.head = torch.nn.Identity()
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 3)
