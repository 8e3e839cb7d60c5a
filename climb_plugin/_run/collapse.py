"""Warns, once each, of a collapsed posterior and of a collapsed base method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from climb_plugin._run.deferred import DeferredFlags
from climb_plugin.checks import warn
from climb_plugin.gaussian import Posterior
from climb_plugin.monitor import nats_to_bits, normalized_std, signal_to_noise

EVERY = 50  # calls: posteriors are checked once in so many
POSTERIOR_CHECKS = 4  # in a row must find the posterior collapsed: 200 calls
BASE_CHECKS = 20  # in a row must find the base collapsed: 1000 calls; its loss may start near ln K
SIGNAL_NATS = 0.1  # Samples with less, in all dimensions together, do not tell images apart.
PRIOR_NATS = 0.1  # A posterior with a rate per dimension below is near the prior.
OFF_PRIOR_NATS = 0.5  # A rate per dimension above shows that CLIMB holds no embedding in one place.
POINT_STD = 0.05  # Below this spread (mean cosine above 0.997) the embedding is one point.
PINNED_NATS = 0.05  # A base loss that is this close to ln K is pinned there.


class CollapseWatch:
    """Checks a training now and then, without waiting for the device.

    The posterior has collapsed if its samples cannot carry ``SIGNAL_NATS`` about their views and
    its rate per dimension is below ``PRIOR_NATS``, while beta is above 0. (The rate alone would
    tell too late: the rate falls like 1 over the steps long after the samples have stopped saying
    anything.)

    The base has collapsed if the embedding is one point (``POINT_STD``) although the posterior is
    far from the prior, or if the base loss is pinned at ln K.

    With a prior that compares views there is no fixed distribution to collapse to; only the spread
    of the embedding tells the two apart.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._lasts: Tensor | None = None
        self._flags = DeferredFlags()
        self._warned: set[str] = set()

    def observe(
        self,
        *,
        base: Callable[..., Tensor],
        value: Tensor,
        beta: float | Tensor,
        rates: Sequence[Tensor] | None,
        posteriors: Sequence[Sequence[Posterior]],
    ) -> None:
        """Checks one training step; warns of a collapse that is known by now.

        ``value`` is that of ``base``; rates and posteriors are per head, the rates None if the
        prior compares views.
        """
        self._calls += 1
        if self._calls % EVERY or len(self._warned) == 2:
            return
        with torch.no_grad():
            rows = [_rows(views) for views in posteriors]
            # The variance over a single row says nothing.
            if min(len(head.mean) for head in rows) < 2:
                return
            seen = _look(base, value, beta, rates, rows)
            known = self._flags.raised(self._lasting(seen.signs))
        if 0 in known and "posterior" not in self._warned:
            self._warned.add("posterior")
            warn(_posterior_message(seen, beta))
        if (1 in known or 2 in known) and "base" not in self._warned:
            self._warned.add("base")
            warn(_base_message(seen, point=1 in known, pinned=2 in known))

    def _lasting(self, now: Tensor) -> Tensor:
        """Which of the three signs have held for long enough."""
        if self._lasts is None or self._lasts.device != now.device:
            self._lasts = torch.zeros_like(now, dtype=torch.int64)
        self._lasts = (self._lasts + 1) * now
        checks = (POSTERIOR_CHECKS, BASE_CHECKS, BASE_CHECKS)
        # One by one: to copy a tensor of the three to the device would wait for the device.
        return torch.stack([n >= least for n, least in zip(self._lasts, checks, strict=True)])

    def __reduce__(self) -> tuple[type[CollapseWatch], tuple[()]]:
        # A copy watches a run of its own.
        return CollapseWatch, ()


class _Seen(NamedTuple):
    """The result of one check, on the device: numbers of the worst head, and the signs."""

    signal: Tensor  # nats that the samples of a head carry at most
    spread: Tensor  # of the directions of that head's means
    rate: Tensor | None  # nats, summed over heads; None if the prior is no fixed one
    value: Tensor  # of the base loss
    classes: int | None  # K, if the base has one
    signs: Tensor  # posterior collapsed; embedding one point for another cause; loss at ln K


def _look(
    base: Callable[..., Tensor],
    value: Tensor,
    beta: float | Tensor,
    rates: Sequence[Tensor] | None,
    rows: Sequence[Posterior],
) -> _Seen:
    signal = torch.stack([torch.log1p(signal_to_noise(*head)).sum() / 2 for head in rows])
    spread = torch.stack([normalized_std(head.mean) for head in rows])
    collapsed, point = signal < SIGNAL_NATS, spread < POINT_STD
    rate = None
    if rates is None:
        collapsed = collapsed & ~point
    else:
        means = [values.mean() for values in rates]
        shares = torch.stack(
            [mean / head.mean.shape[-1] for mean, head in zip(means, rows, strict=True)]
        )
        collapsed = collapsed & (shares < PRIOR_NATS)
        point = point & (shares > OFF_PRIOR_NATS)
        rate = torch.stack(means).sum()
    posterior = collapsed.any() & (beta > 0)
    classes = _classes(base)
    pinned = torch.zeros_like(posterior)
    if classes is not None:
        pinned = ((value - math.log(classes)).abs() < PINNED_NATS) & ~posterior
    signs = torch.stack([posterior, point.any(), pinned])
    return _Seen(signal.min(), spread.min(), rate, value, classes, signs)


def _rows(views: Sequence[Posterior]) -> Posterior:
    """The rows of all calls of a head, (N, D): a call may hold the views of one image alone."""
    parts = zip(*views, strict=True)
    return Posterior(*(torch.cat([part.flatten(0, -2) for part in all_]) for all_ in parts))


def _classes(base: Callable[..., Tensor]) -> int | None:
    """K of a base with a centre, as DINO's: a tensor (..., K), or a module that holds one."""
    center = getattr(base, "center", None)
    if not isinstance(center, Tensor):
        center = getattr(center, "center", None)
    if not isinstance(center, Tensor) or center.ndim == 0 or center.shape[-1] < 2:
        return None
    return int(center.shape[-1])


# Each message waits for the device once, to get its numbers; nothing else here does.


def _posterior_message(seen: _Seen, beta: float | Tensor) -> str:
    rate = "" if seen.rate is None else f" The rate is {_nats(seen.rate)}."
    return (
        f"CLIMB: the posterior has collapsed: for {EVERY * POSTERIOR_CHECKS} calls of the loss its "
        f"samples have said next to nothing about their views, now {_nats(seen.signal)} at most."
        f"{rate} beta={float(beta):g} is too high: lower it, warm up longer, or hold the rate with "
        "beta=TargetRate(nats). If the run collapses with beta=0 as well, look at the base method."
    )


def _base_message(seen: _Seen, *, point: bool, pinned: bool) -> str:
    signs = []
    if point:
        signs.append(
            "the std of the normalised embedding times sqrt(D) is "
            f"{float(seen.spread):.2g} (1: healthy, 0: one point for all images)"
        )
    if pinned and seen.classes is not None:
        signs.append(
            f"the base loss is {float(seen.value):.4g}, pinned at ln K = "
            f"{math.log(seen.classes):.4g} for K = {seen.classes} (a uniform student)"
        )
    rate = "" if seen.rate is None else f" The posterior has not: the rate is {_nats(seen.rate)}."
    return (
        f"CLIMB: the base has collapsed: for {EVERY * BASE_CHECKS} calls of the loss "
        f"{' and '.join(signs)}.{rate} Look at the base method: learning rate, stop-gradient and "
        "predictor, momentum, temperature and centre of the teacher, batch norm in the projection "
        "head. If the run does not collapse with beta=0, it is CLIMB after all: lower beta."
    )


def _nats(nats: Tensor) -> str:
    value = float(nats)
    return f"{value:.3g} nats ({nats_to_bits(value):.3g} bits)"
