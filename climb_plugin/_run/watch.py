"""Watches the training of one loss; may warn, raise or count, and changes no number.

This is the one door to the outer ring: :mod:`climb_plugin.loss` and :mod:`climb_plugin.climb`
import nothing else of this folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from climb_plugin._graph.sample import Sample
from climb_plugin._run.collapse import CollapseWatch
from climb_plugin._run.deferred import DeferredFlags
from climb_plugin._run.living import living
from climb_plugin._run.missing import Wiring
from climb_plugin._run.steps import Steps
from climb_plugin._torch import (
    averaged_in,
    is_batch_of_gradients,
    joins,
    plain,
    transforms_active,
    without_transforms,
)
from climb_plugin.checks import warn
from climb_plugin.distributed import world_size
from climb_plugin.gaussian import Posterior
from climb_plugin.head import GaussianHead, is_look
from climb_plugin.schedule import Schedule
from climb_plugin.terms import ClimbTerms

# By name: importing torch's FSDP takes time, which a run without FSDP need not spend.
_AVERAGING = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})
# The losses whose base is being called: two trainings may run in two threads.
_running = threading.local()


class Watch:
    """All checks of one loss: ``nesting`` surrounds the call of the base, ``steps`` counts."""

    def __init__(
        self,
        heads: Sequence[GaussianHead],
        priors: nn.ModuleList,
        students: Sequence[nn.Module],
        *,
        prior: str,
        check_base: bool,
    ) -> None:
        self.nesting = _Nesting(active=bool(heads))
        self.steps = Steps(heads, priors, students)
        self._wiring = Wiring(heads)
        self._heads, self._priors = heads, priors
        self._prior, self._check_base = prior, check_base
        self._knows_ranks = False
        self._finite = DeferredFlags()
        self._collapse = CollapseWatch()
        self._signs = DeferredFlags()
        self._warned_of_sign = False

    def found(self, value: Tensor, samples: Sequence[Sequence[Sample]], schedule: Schedule) -> None:
        """Checks a step, by the samples of each head behind the base loss, before the numbers."""
        self._wiring.check(value, samples)
        if not is_look(value, self._heads):
            self.steps.loss_seen(is_regularised=any(samples))
        if not self._knows_ranks and any(samples) and world_size() > 1:
            self._knows_ranks = True
            _check_ranks(self._heads, self._priors, self._prior, needs_rate=schedule.needs_rate)

    def terms(
        self,
        terms: ClimbTerms,
        posteriors: Sequence[Sequence[Posterior]],
        rates: Sequence[Tensor] | None,
        base: Callable[..., Tensor],
    ) -> None:
        """Checks the terms of a step, its posteriors per head, and the rates of their samples.

        The rates are None if the prior compares views: these tell no distance to a fixed prior.
        """
        named = {"rate": terms.rate, "entropy": terms.entropy}
        if self._check_base:
            named = {"base loss": terms.base, **named}
        _check_finite(self._finite, named, posteriors)
        self._collapse.observe(
            base=base, value=terms.base, beta=terms.beta, rates=rates, posteriors=posteriors
        )

    def trains(self, value: Tensor, penalty: Tensor | None) -> None:
        """Notes a call that trains: the loss, and the penalty in it, with their graph."""
        self.steps.loss_called(penalty)
        if penalty is not None:
            penalty.register_hook(self._after_backward)
        elif value.grad_fn is not None and not transforms_active():
            value.register_hook(lambda _: self.steps.backward_done())

    def _after_backward(self, gradient: Tensor) -> None:
        self.steps.backward_done()
        if self._warned_of_sign or is_batch_of_gradients(gradient):
            return
        try:
            with without_transforms(), torch.no_grad():
                negative = (plain(gradient) < 0).reshape(1)
                self._warned_of_sign = bool(self._signs.raised(negative))
        except RuntimeError:  # batched gradients (is_grads_batched) have no value to look at
            return
        if self._warned_of_sign:
            warn(
                "the gradient that reaches CLIMB's terms is negative, so the training maximises "
                "the rate: the criterion stands behind a minus sign, as a similarity that is "
                "negated. Wrap the loss that is minimised: wrap(lambda *a: -similarity(*a), ...)."
            )


class _Nesting:
    """Raises if a loss with heads is called within another one: the rate would count twice."""

    def __init__(self, *, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        if not self._active or torch.compiler.is_compiling():
            return
        if getattr(_running, "any", False):
            raise RuntimeError(
                "this ClimbLoss is called within the base loss of another ClimbLoss, so the rate "
                "would count twice: wrap the whole loss once, or add up two criteria outside."
            )
        _running.any = True

    def __exit__(self, *_: object) -> None:
        if self._active and not torch.compiler.is_compiling():
            _running.any = False


def _check_finite(
    flags: DeferredFlags, terms: Mapping[str, Tensor], posteriors: Sequence[Sequence[Posterior]]
) -> None:
    """Raises if a term is known by now not to be finite: on CUDA a call or so late."""
    values = torch.stack([term.to(terms["rate"]) for term in terms.values()])
    bad = flags.raised(~torch.isfinite(values))
    if not bad:
        return
    names = list(terms)
    causes = [
        f"the {name} of heads[{i}], view {j}, has {count} non-finite values"
        for i, views in enumerate(posteriors)
        for j, view in enumerate(views)
        for name, tensor in (("embedding or its mean", view.mean), ("logvar", view.logvar))
        if (count := int((~torch.isfinite(tensor)).sum()))
    ]
    said = ", ".join(f"{names[i]} (now {float(values[i])})" for i in bad)
    raise ValueError(
        f"not finite: {'; '.join([said, *causes])}. Lower the learning rate, leave float16, or "
        "look for the first NaN with torch.autograd.set_detect_anomaly(True)."
    )


def _check_ranks(
    heads: Sequence[GaussianHead], priors: nn.Module, name: str, *, needs_rate: bool
) -> None:
    """Finds heads and priors whose gradients nothing averages, and ranks that may stop early."""
    learned = {id(parameter) for parameter in priors.parameters()}
    added = {id(p) for head in heads for p in head.parameters() if p.requires_grad}
    # Nothing but the garbage collector lists the modules that average gradients over the ranks.
    wrappers = living(lambda kind: any(base.__name__ in _AVERAGING for base in kind.__mro__))
    held: set[int] = set()
    averaged: set[int] = set()
    for wrapper in wrappers:
        there = {id(p) for p in wrapper.parameters()}
        held |= there
        averaged |= averaged_in(wrapper, there)
    if (added & held) - averaged:
        raise RuntimeError(
            "DistributedDataParallel was built before the loss was wrapped, so it does not average "
            "the gradients of the GaussianHead, and each rank would train its own: wrap the loss "
            "first, then the model."
        )
    if learned and not learned <= held:
        warn(
            f"prior={name!r} is learned, and no DistributedDataParallel or FSDP module holds this "
            "loss: each rank trains a prior of its own. Put model and loss into one module that "
            "returns the loss, and wrap and call that."
        )
    if needs_rate and any(joins(wrapper) for wrapper in wrappers):
        raise RuntimeError(
            "a target rate is averaged over all ranks in every step, and within "
            "DistributedDataParallel.join() a rank may run out of steps: use a beta or a "
            "schedule, or drop_last=True and as many batches on every rank instead of join()."
        )
