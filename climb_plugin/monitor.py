"""Measures posteriors and embeddings, for logs.

Means, log-variances and embeddings have shape (..., B, D), and are refused as in
:mod:`climb_plugin.gaussian`. All but :func:`active_dimensions` and :func:`nats_to_bits` return
tensors on the device of their arguments. No function changes a random number or a gradient.
Healthy and collapsed values: examples/README.md, 'Quantities to watch'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from climb_plugin.gaussian import checked, kl_to_standard_normal, widened

ACTIVE_NATS = 0.01
"""A dimension counts as active if its mean rate is above this many nats."""


def nats_to_bits(nats: float) -> float:
    """Converts nats to bits.

    Examples:
        >>> round(nats_to_bits(math.log(8)), 6)
        3.0
    """
    return nats / math.log(2)


def rate_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """The rate to N(0, I) of each dimension, averaged over everything else.

    Returns:
        Rates in nats, of shape (D,); their sum is the rate.

    Examples:
        >>> rate_per_dimension(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
        tensor([0., 2.])
    """
    mean, logvar = checked(mean, logvar)
    per_sample = kl_to_standard_normal(mean.unsqueeze(-1), logvar.unsqueeze(-1))
    return per_sample.flatten(0, -2).mean(dim=0)


def active_dimensions(mean: Tensor, logvar: Tensor, *, threshold: float = ACTIVE_NATS) -> int:
    """How many dimensions carry a rate above ``threshold`` nats; waits for the device.

    In a training step take :func:`measure`, or compare :func:`rate_per_dimension` yourself.

    Source: the active units of Burda et al., Importance Weighted Autoencoders, 2016, with the
    rate of a dimension in place of the variance of its mean.

    Examples:
        >>> active_dimensions(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
        1
    """
    return int((rate_per_dimension(mean, logvar) > threshold).sum())


def signal_to_noise(mean: Tensor, logvar: Tensor) -> Tensor:
    """For each dimension, the variance of the mean over the batch by the mean variance.

    Well below 1 the noise drowns the information of a sample on its view: a Gaussian channel with
    this ratio carries 1/2 ln(1 + ratio) nats (Shannon, 1948).

    Returns:
        Ratios, of shape (D,): variances over B (divided by B) and exp(logvar), each averaged over
        everything else, then divided. 0 for a constant mean, also for B = 1.

    Examples:
        >>> signal_to_noise(torch.tensor([[-3.0, 1.0], [3.0, 1.0]]), torch.zeros(2, 2))
        tensor([9., 0.])
    """
    mean, logvar = checked(mean, logvar)
    signal = mean.var(dim=-2, correction=0)
    noise = torch.exp(logvar).mean(dim=-2)
    return _rows(signal).mean(dim=0) / _rows(noise).mean(dim=0)


def effective_rank(mean: Tensor) -> Tensor:
    """How many directions the means spread over: exp of the entropy of the singular values.

    The means are centred and taken as one matrix of rows: the common offset of all embeddings says
    nothing about an image, and would hide the other singular values. On CUDA torch.linalg.svdvals
    waits for the device: not for every training step.

    Returns:
        A scalar from 1 to min(rows - 1, D); 0 if all rows are equal.

    Raises:
        torch.linalg.LinAlgError: If ``mean`` is not finite.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO
    2007; that the rows are centred, and the 0, are choices of this package.

    Examples:
        >>> effective_rank(torch.tensor([[1.0, 0, 5], [-1, 0, 5], [0, 1, 5], [0, -1, 5]]))
        tensor(2.)
        >>> effective_rank(torch.full((4, 3), 0.1))
        tensor(0.)
    """
    (mean,) = checked(mean)
    rows = _rows(mean)
    # Less the first row: equal rows are then exactly 0, however their mean is rounded.
    rows = rows - rows[:1]
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    total = values.sum()
    # entr(0) is 0; the smallest number keeps 0 / 0 away.
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.exp(torch.special.entr(shares).sum()) * (total > 0)
    return rank


def normalized_std(embedding: Tensor) -> Tensor:
    """The spread of the directions of the embeddings: about 1 is healthy, 0 is collapsed.

    The standard deviation over the batch of each dimension of the L2-normalised embedding, averaged
    over dimensions, times sqrt(D).

    Returns:
        A scalar from 0 to 1, averaged over leading dimensions; 0 for B = 1.

    Source: Chen and He, Exploring Simple Siamese Representation Learning, 2021, figure 2. The
    variance is divided by B here, not B - 1, so that 1 is the maximum.

    Examples:
        >>> normalized_std(torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -1.0]]))
        tensor(1.0000)
    """
    (embedding,) = checked(embedding)
    directions = F.normalize(embedding, dim=-1)
    return directions.std(dim=-2, correction=0).mean() * math.sqrt(embedding.shape[-1])


def teacher_entropy(
    logits: Tensor, *, temperature: float = 1.0, center: Tensor | None = None
) -> Tensor:
    """Entropy of each row's softmax((logits - center) / temperature), over ln K.

    A teacher like DINO's collapses in two ways. Uniform: every row is at 1. One class for all:
    every row is at 0, and so is the entropy of the rows' mean. Rows at 0 alone are only confident:
    the entropy of their mean decides, which is this function of the logits ``log_softmax((logits -
    center) / temperature, dim=-1).logsumexp(dim=-2)``.

    Args:
        logits: The teacher's outputs, of shape (..., K).
        temperature: The teacher's.
        center: Subtracted first; must broadcast against the shape of ``logits``.

    Returns:
        Numbers from 0 (one class) to 1 (uniform), of shape (...).

    Raises:
        TypeError: If ``logits`` is not a floating-point tensor.
        ValueError: If there are fewer than two classes, the temperature is not a positive number or
            the shape of ``center`` does not fit.

    Examples:
        >>> teacher_entropy(torch.tensor([[1.0, 1.0, 1.0], [90.0, 0.0, 0.0]]), temperature=0.04)
        tensor([1., 0.])
        >>> confident = torch.log_softmax(200 * torch.eye(3), dim=-1)
        >>> teacher_entropy(confident), teacher_entropy(confident.logsumexp(dim=-2))
        (tensor([0., 0., 0.]), tensor(1.))
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        received = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits must be a floating-point tensor, got {received}.")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must have shape (..., K) with at least two classes, got {tuple(logits.shape)}."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}.")
    wide = widened(logits)
    if center is not None:
        _check_center(center, logits)
        wide = wide - center
    probabilities = torch.softmax(wide / temperature, dim=-1)
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy / math.log(logits.shape[-1])


def _check_center(center: Tensor, logits: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(center.shape, logits.shape) == logits.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"center must broadcast to the logits, {tuple(logits.shape)}, got shape "
            f"{tuple(center.shape)}."
        )


class Measurements(NamedTuple):
    """The result of :func:`measure`, detached."""

    rate: Tensor
    """Nats per dimension to N(0, I), of shape (D,): :func:`rate_per_dimension`."""
    active_dimensions: Tensor
    """How many of them are above ``ACTIVE_NATS``; a scalar tensor."""
    signal_to_noise: Tensor
    """Of shape (D,): :func:`signal_to_noise`."""
    effective_rank: Tensor
    """Of the means; a scalar: :func:`effective_rank`."""
    normalized_std: Tensor
    """Of the means; a scalar: :func:`normalized_std`."""


@torch.no_grad()
def measure(mean: Tensor, logvar: Tensor) -> Measurements:
    """All monitors of a posterior at once, for a log; like :func:`effective_rank`, not every step.

    Examples:
        >>> measure(torch.eye(4, 3), torch.zeros(4, 3)).active_dimensions
        tensor(3)
    """
    rate = rate_per_dimension(mean, logvar)
    active = (rate > ACTIVE_NATS).sum()
    return Measurements(
        rate, active, signal_to_noise(mean, logvar), effective_rank(mean), normalized_std(mean)
    )


def _rows(values: Tensor) -> Tensor:
    """(..., B, D) as (rows, D)."""
    return values.flatten(0, -2) if values.ndim > 1 else values.unsqueeze(0)
