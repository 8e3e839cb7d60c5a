"""Adds the bottleneck to a base loss: base + beta * (rate + alpha * entropy)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin._graph.sample import Sample
from climb_plugin._graph.walk import samples_behind
from climb_plugin._torch import in_function_forward, is_batched
from climb_plugin.attach import Attached
from climb_plugin.checks import checked_scalar
from climb_plugin.climb import Climb
from climb_plugin.door import Door, Short, say_what_is_the_modules
from climb_plugin.gaussian import Posterior, conditional_entropy, widened
from climb_plugin.head import GaussianHead, is_look, no_autocast, outside_compiled_code
from climb_plugin.prior import Prior, PriorLike, make_priors, per_sample
from climb_plugin.schedule import Schedule
from climb_plugin.settings import Settings
from climb_plugin.terms import detached_terms

Heads: TypeAlias = GaussianHead | Attached | Iterable[GaussianHead | Attached]


class ClimbLoss(Door):
    """``base + beta * (rate + alpha * entropy)``, called exactly like ``base``.

    Every call adds the terms of those posteriors of the loss's heads that the value of the base
    loss depends on, and of no others. So a criterion that is called once per view and averaged adds
    the rate once; an unused output and a teacher's mean add nothing. Under ``torch.no_grad()``, or
    with every head in ``eval()``, the value is that of the base loss alone.

    The criterion is the door to the base: attributes of the base (``center``, ``teacher_temp``,
    ...) are read, set and deleted through the criterion, and the state dicts of both are
    interchangeable: the keys are those of the base (plus the parameters of a prior), and the step
    of the schedule travels in the metadata. CLIMB's own attributes are in ``criterion.climb``, most
    of them with a short name (``criterion.terms``, ``criterion.beta``). A short name that the base
    has as well raises; so does a method of the base whose result depends on a sample.

    Args:
        base: A loss: any callable or module that returns a scalar tensor.
        heads: The head, or the heads, whose samples the loss is computed from; the rates of several
            heads add up. The result of :func:`~climb_plugin.attach.attach` counts as a head.
        beta: As in :class:`~climb_plugin.settings.Settings`, like the next four.
        alpha: Weight of the conditional entropy.
        prior: The distribution that the rate is measured to; for several heads a name or function.
        views: How many views each forward call of a head holds.
        free_nats: Nats that cost nothing.
        check_base: Whether a NaN or infinite base loss raises. False for a host that lives with one
            (solo-learn's deepclusterv2, in its first epoch); rate and entropy are checked anyway.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``base`` is or holds a ClimbLoss; if an option is out of range; if there is
            no head while beta is not 0; if a target rate lies within the free nats, or belongs to
            another loss.

    Source: the objective reads Li et al., Contrastive Learning via Variational Information
    Bottleneck, TPAMI 47(9), 2025 (of which only the abstract was at hand) with the bound of Alemi
    et al., Deep Variational Information Bottleneck, 2017; prior, place and beta are choices of this
    package, not the paper's.

    Examples:
        >>> head = GaussianHead(8)
        >>> loss = ClimbLoss(nn.functional.mse_loss, heads=head, beta=1e-3)
        >>> loss(head(torch.randn(4, 8)), torch.zeros(4, 8)).requires_grad
        True
        >>> loss.terms._fields
        ('total', 'base', 'rate', 'entropy', 'beta')
    """

    terms, heads, beta, step = Short(), Short(), Short(), Short()
    schedule, alpha, prior, free_nats, set_step = Short(), Short(), Short(), Short(), Short()

    def __init__(
        self,
        base: Callable[..., Tensor],
        *,
        heads: Heads,
        beta: float | Schedule,
        alpha: float = 0.0,
        prior: PriorLike = "standard",
        views: int | Sequence[int] = 1,
        free_nats: float = 0.0,
        check_base: bool = True,
    ) -> None:
        super().__init__()
        if not callable(base):
            raise TypeError(f"base must be a loss that can be called, got {base!r}.")
        if isinstance(base, nn.Module) and any(isinstance(m, ClimbLoss) for m in base.modules()):
            raise ValueError(
                "this loss is or holds a ClimbLoss already, so the rate would count twice: wrap "
                "the plain loss, once."
            )
        say_what_is_the_modules(base)
        settings = Settings(beta=beta, alpha=alpha, prior=prior, views=views, free_nats=free_nats)
        items = tuple(heads) if isinstance(heads, Iterable) else (heads,)
        checked = _checked_heads(items)
        priors = make_priors(prior, [head.out_features for head in checked], views=views)
        if not isinstance(prior, Prior):  # made here, so for where the heads are
            for one, head in zip(priors, checked, strict=True):
                devices = {tensor.device for tensor in (head.logvar.bias, *one.parameters())}
                if len(devices) > 1 and "meta" not in {device.type for device in devices}:
                    one.to(head.logvar.bias.device)
        self.climb_priors = nn.ModuleList(priors)
        self.base = base
        self.climb = Climb(
            heads=checked,
            attached=[item for item in items if isinstance(item, Attached)],
            settings=settings,
            priors=self.climb_priors,
            check_base=check_base,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base loss of these arguments, passed on verbatim, plus the bottleneck: one element.

        Raises:
            RuntimeError: If the base loss depends on no sample of a head that trains; if a target
                rate meets the ``join()`` of DistributedDataParallel; under vmap; within a reentrant
                checkpoint.
            TypeError: If the base loss returns no tensor.
            ValueError: If the base loss returns more than a scalar; if a prior that compares views
                finds views that do not pair up; if a term is NaN or infinite: the message names the
                term (on CUDA a step or so late, as the check does not wait for the device).
        """
        climb, base = self.climb, self.base
        with climb.watch.nesting:
            value = checked_scalar(base(*args, **kwargs))
        return outside_compiled_code(_with_bottleneck, climb, self.climb_priors, base, value)

    def climb_state(self) -> dict[str, Any]:
        """Step, settings and noise position for a resumed run, in numbers and strings.

        The state dict has them in its metadata, which torch.distributed.checkpoint drops: keep this
        beside such a checkpoint, or where a host saves no loss. Waits for the device if beta lives
        there. To resume to the bit, save torch's random state at the same moment.
        """
        state: dict[str, Any] = self.climb.state()
        return state

    def load_climb_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`climb_state`; warns of each setting that was another one.

        Raises:
            ValueError: If ``state`` is something else; then nothing is changed.
        """
        self.climb.load_state(state)

    def extra_repr(self) -> str:
        """The settings and the number of heads."""
        shown = {**self.climb.config(), "heads": str(len(self.climb.heads))}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class Bottleneck(NamedTuple):
    """The result of :func:`bottleneck`, with its graph.

    Attributes:
        rate: Nats, a scalar.
        entropy: The conditional entropy in nats, a scalar.
        penalty: The term that beta multiplies: the rate above the free nats + alpha * entropy.
        rates: For each head the rates of its samples, each a vector.
    """

    rate: Tensor
    entropy: Tensor
    penalty: Tensor
    rates: list[Tensor]


def bottleneck(
    priors: Sequence[Prior],
    posteriors: Sequence[Sequence[Posterior]],
    *,
    alpha: float = 0.0,
    free_nats: float = 0.0,
) -> Bottleneck:
    """R + alpha * H(z | v): means over the samples of each head, summed over the heads.

    Each head is a code of its own, and the nats that two codes carry add up.

    Args:
        priors: One for each head.
        posteriors: For each head at least one.
        alpha: Weight of the conditional entropy; with 0 the entropy has no gradient.
        free_nats: Nats of each sample and head that cost nothing.

    Raises:
        TypeError: If a prior returns no tensor.
        ValueError: If a prior returns no vector of numbers, or one without a gradient.

    Examples:
        >>> posterior = Posterior(torch.ones(2, 4), torch.zeros(2, 4))
        >>> bottleneck(make_priors("standard", [4]), [[posterior]]).rate
        tensor(2.)
    """
    rates = [_rates(prior, views) for prior, views in zip(priors, posteriors, strict=True)]
    rate = _sum_of_means(rates)
    with torch.set_grad_enabled(alpha > 0):
        entropy = _sum_of_means(
            [per_sample([conditional_entropy(*view) for view in views]) for views in posteriors]
        )
    penalty = _sum_of_means([F.relu(v - free_nats) for v in rates]) if free_nats else rate
    if alpha:
        penalty = penalty + alpha * entropy
    return Bottleneck(rate, entropy, penalty, rates)


def _sum_of_means(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack([values.mean() for values in vectors]).sum()


def _rates(prior: Prior, posteriors: Sequence[Posterior]) -> Tensor:
    values = prior(posteriors)
    name = type(prior).__name__
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must return a vector with one rate per sample, got {type(values).__name__}."
        )
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(
            f"{name} must return a vector with one rate per sample, got shape "
            f"{tuple(values.shape)} of {values.dtype}: climb_plugin.prior.per_sample makes one of "
            "tensors whose dimension D is summed over."
        )
    if (
        not values.requires_grad
        and torch.is_grad_enabled()
        and any(part.requires_grad for posterior in posteriors for part in posterior)
    ):
        raise ValueError(
            f"the rates of {name} have no gradient, so they would train nothing: compute them from "
            "the posteriors without detach() or torch.no_grad()."
        )
    return widened(values)


def _with_bottleneck(
    climb: Climb, priors: Iterable[Any], base: Callable[..., Tensor], value: Tensor
) -> Tensor:
    """The value of the base loss plus the bottleneck of the posteriors behind that value."""
    if is_batched(value):
        raise RuntimeError(
            "a ClimbLoss cannot run under torch.vmap: CLIMB could not tell the posteriors of "
            "the samples apart. Loop over what is mapped, or map criterion.base."
        )
    scalar = value.reshape(())
    found = [_posteriors(samples) for samples in _samples(value, climb)]
    used = [(prior, views) for prior, views in zip(priors, found, strict=True) if views]
    if not used:
        climb.show(detached_terms(scalar, scalar, None, None, 0.0), is_regularised=False)
        trains = torch.is_grad_enabled() and any(head.training for head in climb.heads)
        if trains and not is_look(value, climb.heads):
            climb.trains(value, None)
        return value
    used_priors, posteriors = zip(*used, strict=True)
    beta = climb.weight()
    with no_autocast(scalar):
        added = bottleneck(used_priors, posteriors, alpha=climb.alpha, free_nats=climb.free_nats)
    total = scalar + beta * added.penalty
    terms = detached_terms(total, scalar, added.rate, added.entropy, beta)
    climb.show(terms, is_regularised=True)
    if climb.watches:
        fixed = None if any(prior.compares_views for prior in used_priors) else added.rates
        climb.watch.terms(terms, posteriors, fixed, base)
    if added.penalty.requires_grad:
        climb.trains(value, added.penalty)
    # FSDP warns if a module that it shards returns a reshaped alias of another tensor.
    return total if value.ndim == 0 else total.reshape(value.shape)


def _samples(value: Tensor, climb: Climb) -> list[list[Sample]]:
    """For each head the samples behind a value; none in evaluation."""
    heads = climb.heads
    if in_function_forward() and any(head.training for head in heads):
        raise RuntimeError(
            "a ClimbLoss is called in the forward of an autograd function, as a reentrant "
            "checkpoint is one: no graph tells there which samples the loss depends on. Checkpoint "
            "with use_reentrant=False, or call the criterion outside."
        )
    if not heads or not torch.is_grad_enabled():
        return [[] for _ in heads]
    samples = samples_behind(value, set(heads))
    found = [[one for one in samples if one.head is head] for head in heads]
    climb.watch.found(value, found, climb.schedule)
    return found


def _posteriors(samples: Sequence[Sample]) -> list[Posterior]:
    """The posteriors of samples, without those of empty selections: their means would be NaN."""
    posteriors = [sample.intact_posterior() for sample in samples]
    return [posterior for posterior in posteriors if posterior.mean.numel() > 0]


def _checked_heads(items: Sequence[GaussianHead | Attached]) -> tuple[GaussianHead, ...]:
    found = tuple(item.head if isinstance(item, Attached) else item for item in items)
    for head in found:
        if not isinstance(head, GaussianHead):
            raise TypeError(f"heads must be GaussianHeads, got {type(head).__name__}.")
    if len(set(found)) < len(found):
        raise ValueError("heads holds the same head twice.")
    return found
