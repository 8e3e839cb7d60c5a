"""Measures features by lightly's k-NN: of all labelled images, of few, of corrupted queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor

from knn_study.data import Labelled

NEIGHBOURS, TEMPERATURE = 200, 0.1  # of the k-NN: lightly's benchmarks
FEW = (5, 50)  # labelled images of each class

Encoder = Callable[[Labelled], Tensor]
"""From images to normalised features (N, F)."""


def accuracy(asked: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> float:
    """The k-NN accuracy in per cent of normalised features.

    Args:
        asked: The queries, (N, F).
        labels: Their classes, (N,).
        known: The labelled features, (M, F): of fewer than 200 all vote.
        known_labels: Their classes, (M,).
    """
    bank, neighbours = known.T.contiguous(), min(NEIGHBOURS, len(known))
    correct = 0
    for some, truth in zip(asked.split(1000), labels.split(1000), strict=True):
        ranked = knn_predict(some, bank, known_labels, 10, knn_k=neighbours, knn_t=TEMPERATURE)
        correct += int((ranked[:, 0] == truth).sum())
    return 100 * correct / len(labels)


def robustness(encode: Encoder, asked: Labelled, known: Labelled) -> dict[str, float]:
    """The accuracy with few labels, and of queries with noise or without colour.

    Args:
        encode: Whose features.
        asked: The queries.
        known: The labelled images; few of them are the first of each class.
    """
    bank, queries = encode(known), encode(asked)
    found = {}
    for count in FEW:
        chosen = torch.cat([(known.labels == k).nonzero()[:count, 0] for k in range(10)])
        found[f"{count} labels a class"] = accuracy(
            queries, asked.labels, bank[chosen], known.labels[chosen]
        )
    for name, corrupted in _corruptions(asked.images).items():
        features = encode(Labelled(corrupted, asked.labels))
        found[f"queries {name}"] = accuracy(features, asked.labels, bank, known.labels)
    return found


def _corruptions(images: Tensor) -> dict[str, Tensor]:
    """Images uint8 (N, 3, P, P) with noise of std 20 of 255, the same in every run, and grey."""
    generator = torch.Generator().manual_seed(0)
    noise = 20 * torch.randn(images.shape, generator=generator).to(images.device)
    noisy = (images + noise).round().clamp(0, 255).to(torch.uint8)
    grey = images.float().mean(1, keepdim=True).round().to(torch.uint8).expand_as(images)
    return {"noisy": noisy, "grey": grey}
