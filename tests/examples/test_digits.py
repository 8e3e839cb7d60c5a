"""examples/digits.py: the parts do not depend on a seed, twins see the same views."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from by_path import load
from torch import Tensor

SOURCE = Path(__file__).parents[2] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load(SOURCE)


def test_the_parts_are_disjoint_and_the_same_for_every_seed(digits: ModuleType) -> None:
    torch.manual_seed(1)
    one = digits.load()
    torch.manual_seed(2)
    two = digits.load()
    parts = [one.train, one.validation, one.test]
    assert [len(part.labels) for part in parts] == [1047, 300, 450]
    assert sum(float(part.images.sum()) for part in parts) == pytest.approx(
        float((digits.load_digits().images / 16).sum()), rel=1e-5
    )
    assert torch.equal(one.test.images, two.test.images)
    assert all(part.labels.bincount().min() >= 29 for part in parts)


@pytest.mark.parametrize("method", ["simclr", "dino"])
@pytest.mark.parametrize("prior", ["standard", "learned", "view"])
def test_the_twin_with_climb_sees_the_same_views(
    digits: ModuleType, method: str, prior: str
) -> None:
    images, seen = digits.load().train.images, []

    def views(batch: Tensor, generator: torch.Generator) -> list[Tensor]:
        seen.append(digits.two_views(batch, generator))
        return list(seen[-1])

    options = {"method": method, "views": views, "steps": 2, "seed": 3}
    plain = digits.train(images, **options)
    climb = digits.train(images, beta=0.1, prior=prior, **options)
    again = digits.train(images, beta=0.1, prior=prior, **options)
    for first, second in zip(seen[:2], seen[2:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert climb.base == again.base != plain.base
    assert plain.rate == []
    assert climb.beta == pytest.approx([0.1, 0.1])
    assert climb.features(images[:5]).shape == (5, digits.FEATURES)
    assert climb.embedding(images[:5]).shape == (5, digits.EMBEDDING)


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_beta_0_is_the_noise_alone(digits: ModuleType, method: str) -> None:
    images = digits.load().train.images
    plain, noise = (digits.train(images, beta=beta, method=method, steps=3) for beta in (None, 0.0))
    assert noise.base != plain.base
    assert noise.beta == [0.0] * 3
    assert all(rate > 0 for rate in noise.rate)


def test_a_learning_rate_of_0_is_the_untrained_network(digits: ModuleType) -> None:
    images = digits.load().train.images
    untrained = digits.train(images, method="dino", steps=5, learning_rate=0.0, seed=3)
    torch.manual_seed(3)
    fresh = digits.make_backbone(1)
    for name, old in fresh.state_dict().items():
        new = untrained.backbone.state_dict()[name]
        assert torch.equal(new, old) != ("running" in name or "num_batches" in name), name
    torch.testing.assert_close(untrained.teacher_features(images), untrained.features(images))


def test_to_watch_changes_nothing(digits: ModuleType) -> None:
    images, steps = digits.load().train.images, []

    def watch(run: Any, step: int) -> None:
        run.features(images[:9])
        run.teacher_features(images[:9])
        steps.append((step, len(run.base)))

    options = {"method": "dino", "beta": 0.1, "steps": 3}
    watched, alone = digits.train(images, watch=watch, **options), digits.train(images, **options)
    assert steps == [(1, 1), (2, 2), (3, 3)]
    assert watched.base == alone.base
    assert torch.equal(watched.teacher_features(images), alone.teacher_features(images))


def test_simclr_has_no_teacher_to_ask(digits: ModuleType) -> None:
    images = digits.load().train.images
    with pytest.raises(ValueError, match="no teacher: train with method='dino'"):
        digits.train(images, steps=1).teacher_features(images)


def test_the_learned_prior_is_trained(digits: ModuleType) -> None:
    images = digits.load().train.images
    runs = [
        digits.train(images, beta=1.0, prior=prior, steps=10) for prior in ("standard", "learned")
    ]
    assert runs[1].rate[0] == pytest.approx(runs[0].rate[0], rel=1e-4)
    assert runs[1].rate[-1] < runs[0].rate[-1]


def test_k_nn_recognises_the_digits(digits: ModuleType) -> None:
    data = digits.load()
    known, asked = (part.images.flatten(1) for part in (data.train, data.test))
    accuracy = digits.knn_accuracy(known, data.train.labels, asked, data.test.labels)
    assert 90 < accuracy < 100


def test_wrong_names_are_refused(digits: ModuleType) -> None:
    with pytest.raises(ValueError, match="'digits' or 'cifar10', got 'mnist'"):
        digits.load("mnist")
    with pytest.raises(ValueError, match="'simclr' or 'dino', got 'moco'"):
        digits.train(torch.zeros(1, 1, 8, 8), method="moco")
