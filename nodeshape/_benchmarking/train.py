"""The train suite: a batch of the default training, fused and with ``NODESHAPE_FUSED=0``."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from nodeshape._benchmarking.cases import Case, Contender
from nodeshape._benchmarking.contenders import Call, without_fused
from nodeshape._benchmarking.targets import AtLeast, Target
from nodeshape._benchmarking.trained import images_of, trained_classifier
from nodeshape._data.datasets import DRAWN_TRAIN_SIZE
from nodeshape._ode.method import SOURCE_METHODS
from nodeshape._training.recipe import Recipe

NODESHAPE, PLAIN = "nodeshape", "plain loop"
BATCH = Recipe.batch_size
SECTION = f"Training, one batch of {BATCH} images (an epoch has {-(-DRAWN_TRAIN_SIZE // BATCH)})"
PLOTS = {SECTION: "step size"}
STEP_SIZE = 0.05


def cases(quick: bool, device: torch.device) -> list[Case]:
    """A case per method, each from weights that have been trained for an epoch."""
    step_sizes = (0.5,) if quick else (STEP_SIZE, 4 * STEP_SIZE)
    return [
        Case(
            SECTION,
            f"{method}, h={step_size:g}",
            {
                NODESHAPE: Contender(_builder(method, step_size, quick, device, fused=True)),
                PLAIN: Contender(_builder(method, step_size, quick, device, fused=False), like=NODESHAPE),
            },
            scale=step_size,
        )
        for method in SOURCE_METHODS
        for step_size in step_sizes
    ]


TARGETS: list[Target] = [
    AtLeast(f"{method}: faster than NODESHAPE_FUSED=0", 3, SECTION, f"{method}, h={STEP_SIZE:g}", PLAIN, NODESHAPE)
    for method in SOURCE_METHODS
]


def _builder(method: str, step_size: float, quick: bool, device: torch.device, fused: bool) -> Callable[[], Call]:
    def build() -> Call:
        model = deepcopy(trained_classifier(quick).with_solver(method=method, step_size=step_size)).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # all of its work, yet every step is the same
        images, labels = images_of(8 if quick else BATCH).train.batch(slice(None), device)

        def step() -> tuple[Tensor, ...]:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return tuple(x.grad for x in model.parameters() if x.grad is not None)

        def plain_step() -> tuple[Tensor, ...]:
            with without_fused():
                return step()

        return step if fused else plain_step

    return build
