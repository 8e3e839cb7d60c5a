"""Any base loss plus the bottleneck."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin._graph import noise
from climb_plugin._graph.sample import Sample
from climb_plugin._graph.walk import samples_behind
from climb_plugin._run.missing import Wiring
from climb_plugin._run.nesting import Nesting
from climb_plugin._run.sign import SignWatch
from climb_plugin._run.steps import Steps
from climb_plugin._torch import is_batched, plain, version, without_transforms
from climb_plugin.attach import Attached
from climb_plugin.collapse import CollapseWatch
from climb_plugin.door import Door, Short
from climb_plugin.finite import FiniteCheck
from climb_plugin.gaussian import Posterior, conditional_entropy
from climb_plugin.head import GaussianHead, outside_compiled_code
from climb_plugin.prior import make_priors, per_sample
from climb_plugin.ranks import averaged, joining, several
from climb_plugin.schedule import (
    Constant,
    Schedule,
    TargetRate,
    as_schedule,
    checked_beta,
    checked_number,
    checked_step,
)

_METADATA = "climb"
Heads = GaussianHead | Attached | Sequence[GaussianHead | Attached]


class ClimbTerms(NamedTuple):
    """The terms of the last step, detached scalars.

    Attributes:
        total: What the loss returned: base + beta * (rate + alpha * entropy), where only the
            rate above ``free_nats`` counts.
        base: The value of the base loss, in its own unit.
        rate: Nats, summed over dimensions, averaged over samples and views; NaN where no
            posterior was involved (beta 0 without heads, evaluation).
        entropy: The conditional entropy H(z | v), in nats, likewise.
        beta: The weight that was in force; 0 where no posterior was involved.
    """

    total: Tensor
    base: Tensor
    rate: Tensor
    entropy: Tensor
    beta: Tensor


class ClimbLoss(Door):
    """``base + beta * (rate + alpha * entropy)``, called exactly like ``base``.

    Every call adds the terms of all posteriors of its heads that the value of the base loss
    depends on, and of no others. So a criterion that is called once per view and averaged adds
    the rate once, an output that is not used adds nothing, and a teacher's mean adds nothing.

    Under ``torch.no_grad()``, or with every head in ``eval()``, it is the base loss alone.

    It is the door to the base: attributes of the base (``center``, ``teacher_temp``, ...) are
    read, set and deleted through it, and their state dicts are interchangeable: its keys are
    those of the base (plus the parameters of a learned prior), and the step of the schedule
    travels in the metadata. What is CLIMB's is in ``criterion.climb``; for most of it there is a
    short name (``criterion.terms``, ``criterion.beta``). A short name that the base has as well
    raises. So does a method of the base whose result depends on a sample.

    Args:
        base: A loss: any callable or module that returns a scalar tensor.
        heads: The head, or the heads, whose samples the loss is computed from; the rates of
            several heads add up. What :func:`~climb_plugin.attach.attach` returns is a head.
        beta: Weight of the bottleneck in units of the base loss per nat: a number, or a
            schedule over optimiser steps (:mod:`climb_plugin.schedule`).
        alpha: Weight of the conditional entropy. 0: information bottleneck. 1: the whole bound
            on the entropy H(z).
        prior: ``"standard"`` N(0, I), ``"learned"`` (a diagonal Gaussian, whose parameters belong
            to this loss: give them to the optimiser) or ``"view"`` (the posteriors of the other
            views of the same image).
        views: For ``prior="view"``: how many views each forward call of the head holds, one after
            the other as ``torch.cat`` puts them; a sequence, in the order of the calls, where
            they differ.
        free_nats: Nats that cost nothing, per sample and head, over all dimensions: a sample
            whose rate is below has no gradient from it.
        check_base: Whether a NaN or infinite base loss raises. False where the host lives with
            one (solo-learn's deepclusterv2, in its first epoch); rate and entropy are checked.

    Raises:
        TypeError: If ``base`` is not callable or ``heads`` are not heads.
        ValueError: If ``base`` is or holds a ClimbLoss; if beta, alpha or free_nats is negative
            or not finite, if the prior is unknown or has no use for ``views``, if there is no
            head while beta is not 0, if a target rate lies within the free nats, or belongs to
            another loss.

    Source: the objective reads Li et al., Contrastive Learning via Variational Information
    Bottleneck, TPAMI 47(9), 2025 (of which only the abstract was at hand) with the bound of
    Alemi et al., Deep Variational Information Bottleneck, 2017; prior, place and beta are
    choices of this package, not the paper's.

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
        prior: str = "standard",
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
        checked = _checked_heads(heads)
        widths = [head.out_features for head in checked]
        self.climb_priors = nn.ModuleList(make_priors(prior, widths, views=views))
        self.base = base
        self.climb = Climb(
            heads=checked,
            schedule=as_schedule(beta),
            alpha=alpha,
            prior=prior,
            priors=self.climb_priors,
            free_nats=free_nats,
            check_base=check_base,
        )
        self.climb.attached = _attached(heads)
        self.register_state_dict_post_hook(_save_as_base)
        self.register_load_state_dict_pre_hook(_load_from_base)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base loss of these arguments, passed on verbatim, plus the bottleneck.

        Returns:
            A scalar tensor; a tensor with one element if that is what the base returns.

        Raises:
            RuntimeError: If a head that trains has no sample that the base loss depends on; if
                a target rate meets the ``join()`` of DistributedDataParallel; under vmap.
            TypeError: If the base loss returns no tensor.
            ValueError: If the base loss returns more than a scalar; if ``prior="view"`` finds
                views that do not pair up; if a term is NaN or infinite: the message
                names it. On CUDA that comes a step or so late, because the check does not wait
                for the device.
        """
        with self.climb.nesting:
            value = self.base(*args, **kwargs)
        total: Tensor = self.climb.added_to(_checked_scalar(value), self.base)
        return total

    def climb_state(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers and strings; part of the state dict's metadata.

        For hosts that keep a loss out of their checkpoints. Waits for the device if beta lives
        there. To resume to the bit, save torch's random state at the same moment.
        """
        state: dict[str, Any] = self.climb.state()
        return state

    def load_climb_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`climb_state` returned.

        Warns of each setting that was another one.

        Raises:
            ValueError: If ``state`` is something else; then nothing is changed.
        """
        self.climb.load_state(state)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        shown = {**self.climb.config(), "heads": str(len(self.climb.heads))}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class Climb:
    """The bottleneck of one criterion: what :class:`ClimbLoss` adds to its base.

    Attributes:
        attached: Where the heads hang, as far as :func:`~climb_plugin.attach.attach` hung them.
        observers: Called with the terms of every call of the loss, and whether a posterior was
            involved; for hosts that log them. A copy has none.
        watches: Whether terms that are not finite raise and collapses warn. A host's search for a
            learning rate, which may run into infinity, sets it to False.
    """

    def __init__(
        self,
        *,
        heads: tuple[GaussianHead, ...],
        schedule: Schedule,
        alpha: float,
        prior: str,
        priors: nn.ModuleList,
        free_nats: float,
        check_base: bool,
    ) -> None:
        self._heads = heads
        self._prior = prior
        self.alpha = alpha
        self._free_nats = checked_number("free_nats", free_nats)
        self.schedule = schedule
        self.attached: tuple[Attached, ...] = ()
        self.observers: list[Callable[[ClimbTerms, bool], None]] = []
        self.watches = True
        self._priors = priors
        self._terms: ClimbTerms | None = None
        self.nesting = Nesting(active=bool(heads))
        self._steps = Steps(heads, priors)
        self._wiring = Wiring(heads)
        self._finite = FiniteCheck(check_base=check_base)
        self._collapse = CollapseWatch()
        self._sign = SignWatch()
        self._ranks_checked = False

    @property
    def heads(self) -> tuple[GaussianHead, ...]:
        """The heads; they belong to the model."""
        return self._heads

    @property
    def prior(self) -> str:
        """Name of the prior."""
        return self._prior

    @property
    def alpha(self) -> float:
        """Weight of the conditional entropy; can be set.

        Raises:
            TypeError: If it is set to no number.
            ValueError: If it is negative or not finite.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = checked_number("alpha", alpha)

    @property
    def free_nats(self) -> float:
        """Nats that cost nothing, per sample and head."""
        return self._free_nats

    @property
    def schedule(self) -> Schedule:
        """Beta over the optimiser steps; can be set, to a number too.

        Raises:
            TypeError: If it is set to neither a number nor a schedule.
            ValueError: If a number is out of range, or nothing is there to act on; if a target
                rate lies within the free nats or belongs to another loss.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, beta: float | Schedule) -> None:
        schedule = as_schedule(beta)
        self._check_schedule(schedule)
        if isinstance(schedule, TargetRate) and schedule is not self.__dict__.get("_schedule"):
            schedule.belong_to(self)
        self._schedule = schedule

    @property
    def terms(self) -> ClimbTerms:
        """The terms of the last call, detached.

        Raises:
            AttributeError: If the loss has not been called yet.
        """
        if self._terms is None:
            raise AttributeError("there are no terms yet: call the loss first.")
        return self._terms

    @property
    def beta(self) -> float:
        """The weight of the bottleneck at the current step.

        Raises:
            AttributeError: If it cannot be told yet.
        """
        try:
            return float(self._beta())
        except ValueError as error:
            raise AttributeError(str(error)) from error

    @property
    def step(self) -> int:
        """The current optimiser step, which is the number of those done."""
        return self._steps.count

    def set_step(self, step: int) -> None:
        """Says where the count of optimiser steps stands; it goes on from there.

        Raises:
            ValueError: If ``step`` is not an int of 0 or more.
        """
        self._steps.set_to(checked_step(step))

    def remove(self) -> None:
        """Takes the heads off the model.

        Raises:
            ValueError: If it is not known where they are.
        """
        if len(self.attached) < len(self.heads):
            raise ValueError(
                "heads of this ClimbLoss were put into the model by hand: take these out by hand "
                "as well; the base loss is criterion.base."
            )
        self._steps.stop()
        for attached in self.attached:
            attached.remove()

    def added_to(self, value: Tensor, base: Callable[..., Tensor]) -> Tensor:
        """The value of the base loss plus the bottleneck.

        Args:
            value: Of the base loss.
            base: The base loss, whose centre tells how it collapses.
        """
        return outside_compiled_code(self._added_to)(value, base)

    def _added_to(self, value: Tensor, base: Callable[..., Tensor]) -> Tensor:
        if is_batched(value):
            raise RuntimeError(
                "a ClimbLoss cannot run under torch.vmap: CLIMB could not tell the posteriors of "
                "the samples apart. Loop over what is mapped, or map criterion.base."
            )
        found = self._found(value)
        scalar = value.reshape(())
        posteriors = [[_posterior(one) for one in samples if _has_rows(one)] for samples in found]
        chosen = [(p, views) for p, views in zip(self._priors, posteriors, strict=True) if views]
        if not chosen:
            self._show(_detached(scalar, scalar, None, None, 0.0), is_regularised=False)
            return value
        beta = self._beta()
        self._check_ranks()
        # One sum over heads: each head is a code of its own, and what they carry adds up.
        rates = [prior(views) for prior, views in chosen]
        rate = torch.stack([values.mean() for values in rates]).sum()
        with torch.set_grad_enabled(self.alpha > 0):
            entropies = [
                per_sample([conditional_entropy(*view) for view in views]) for _, views in chosen
            ]
            entropy = torch.stack([values.mean() for values in entropies]).sum()
        penalty = rate
        if self.free_nats:
            penalty = torch.stack([F.relu(v - self.free_nats).mean() for v in rates]).sum()
        if self.alpha:
            penalty = penalty + self.alpha * entropy
        total = scalar + beta * penalty
        self._show(_detached(total, scalar, rate, entropy, beta), is_regularised=True)
        self._observe(scalar, beta, rates, [views for _, views in chosen], penalty, base)
        # A view as the output of a module that FSDP shards would make it warn.
        return total if value.ndim == 0 else total.reshape(value.shape)

    def _show(self, terms: ClimbTerms, *, is_regularised: bool) -> None:
        self._terms = terms
        for observer in self.observers:
            observer(terms, is_regularised)

    def _found(self, value: Tensor) -> list[list[Sample]]:
        """For each head its samples that count, or nothing in evaluation."""
        if not self.heads or not torch.is_grad_enabled():
            return [[] for _ in self.heads]
        samples = samples_behind(value, set(self.heads))
        found = [[one for one in samples if one.head is head] for head in self.heads]
        self._wiring.check(value, found)
        return found

    def _observe(
        self,
        base: Tensor,
        beta: float | Tensor,
        rates: list[Tensor],
        posteriors: list[list[Posterior]],
        penalty: Tensor,
        function: Callable[..., Tensor],
    ) -> None:
        """Lets everything look at a step that may warn, raise or count, and changes no number."""
        terms = self.terms
        if self.watches:
            self._finite.check(terms.base, terms.rate, terms.entropy, posteriors)
            # The rate to another view says nothing about how near to a prior the posterior is.
            fixed = None if self.prior == "view" else rates
            self._collapse.observe(
                base=function, value=base, beta=beta, rates=fixed, calls=posteriors
            )
        if not penalty.requires_grad:
            return
        if isinstance(self.schedule, TargetRate):
            self.schedule.observe(self.step, terms.rate)
        self._steps.loss_called(base)
        penalty.register_hook(self._after_backward)

    def _after_backward(self, gradient: Tensor) -> None:
        self._steps.backward_done()
        self._sign.check(gradient)

    def _beta(self) -> float | Tensor:
        beta = self.schedule(self.step)
        return beta if isinstance(beta, Tensor) else checked_beta("the schedule's beta", beta)

    def _check_schedule(self, schedule: Schedule) -> None:
        if not self.heads and schedule != Constant(0.0):
            raise ValueError(
                f"beta={schedule!r} has nothing to act on: heads is empty. Pass the GaussianHead "
                "that is in the model."
            )
        free = self.free_nats * len(self.heads)
        if isinstance(schedule, TargetRate) and schedule.nats <= free:
            raise ValueError(
                f"a target rate of {schedule.nats} nats cannot be held while {free} nats are "
                "free: below these no beta has an effect. Lower free_nats or raise the target."
            )

    def _check_ranks(self) -> None:
        if self._ranks_checked or not several():
            return
        self._ranks_checked = True
        if any(True for _ in self._priors.parameters()) and not averaged(self._priors):
            warnings.warn(
                f"prior={self.prior!r} is learned, and no DistributedDataParallel or FSDP module "
                "holds this loss: each rank trains a prior of its own. Put model and loss into "
                "one module that returns the loss, and wrap and call that.",
                stacklevel=8,
            )
        if isinstance(self.schedule, TargetRate) and joining():
            raise RuntimeError(
                "a target rate is averaged over all ranks in every step, and within "
                "DistributedDataParallel.join() a rank may run out of steps: use a beta or a "
                "schedule, or drop_last=True and as many batches on every rank instead of join()."
            )

    def state(self) -> dict[str, Any]:
        """As :meth:`ClimbLoss.climb_state`."""
        state: dict[str, Any] = {"step": self.step, **self.config()}
        if isinstance(self.schedule, TargetRate):
            state["target_rate"] = self.schedule.state()
        # Always there: sharded checkpoints load the keys that a state has before, and no others.
        state["noise"] = list(noise.position() or (0, 0))
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As :meth:`ClimbLoss.load_climb_state`."""
        config = self.config()
        if not isinstance(state, Mapping) or not {"step", *config} <= state.keys():
            raise ValueError(
                f"the state of a ClimbLoss has step, {', '.join(config)}, got {state!r}: it is "
                "damaged, or of something else."
            )
        step = checked_step(state["step"])
        position = _checked_position(state.get("noise"))
        if isinstance(self.schedule, TargetRate) and "target_rate" in state:
            self.schedule.load_state(state["target_rate"])
        for name, now in config.items():
            if state[name] != now:
                warnings.warn(
                    f"CLIMB's {name} was {state[name]} when this state was saved and is {now} "
                    "now: the run goes on with the latter.",
                    stacklevel=3,
                )
        noise.restore(position)
        self._steps.restore(step)

    def __getstate__(self) -> dict[str, Any]:
        # Who watches the original in a training of a host knows nothing of a copy.
        return {**self.__dict__, "observers": [], "watches": True}

    def config(self) -> dict[str, str]:
        """The settings, as a checkpoint compares them."""
        shown = repr(self.schedule)
        if " at 0x" in shown:  # the address of a function is another one in the next run
            shown = type(self.schedule).__name__
        return {
            "beta": shown,
            "alpha": repr(self.alpha),
            "prior": self.prior,
            "free_nats": repr(self.free_nats),
        }


def _attached(heads: Heads) -> tuple[Attached, ...]:
    items = heads if isinstance(heads, Sequence) else [heads]
    return tuple(item for item in items if isinstance(item, Attached))


def _checked_heads(heads: Heads) -> tuple[GaussianHead, ...]:
    items = tuple(heads) if isinstance(heads, Sequence) else (heads,)
    found = tuple(item.head if isinstance(item, Attached) else item for item in items)
    for head in found:
        if not isinstance(head, GaussianHead):
            raise TypeError(f"heads must be GaussianHeads, got {type(head).__name__}.")
    if len(set(found)) < len(found):
        raise ValueError("heads holds the same head twice.")
    return found


def _checked_position(saved: Any) -> tuple[int, int] | None:
    if saved is None:
        return None
    if not (
        isinstance(saved, Sequence)
        and len(saved) == 2
        and all(isinstance(number, int) and number >= 0 for number in saved)
    ):
        raise ValueError(
            f"the noise in the state of a ClimbLoss is two ints of 0 or more, got {saved!r}."
        )
    return (saved[0], saved[1]) if saved[1] else None


def _checked_scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the base loss must return a scalar tensor, got {type(value).__name__}: wrap a "
            "function that picks the scalar."
        )
    if value.numel() != 1:
        raise ValueError(
            f"the base loss must return a scalar tensor, got shape {tuple(value.shape)}: use its "
            "reduction='mean', or wrap a function that reduces it."
        )
    return value


def _has_rows(sample: Sample) -> bool:
    # An empty selection says nothing, and its mean would be NaN.
    return sample.posterior is None or sample.posterior.mean.numel() > 0


def _posterior(sample: Sample) -> Posterior:
    if sample.posterior is None:
        raise RuntimeError(
            "a posterior that this loss depends on is gone, because a backward pass has freed the "
            "graph of its sample: compute the loss before, or call backward(retain_graph=True)."
        )
    if sample.version != version(sample.posterior.mean):
        raise RuntimeError(
            "an embedding was changed in place after its GaussianHead had drawn a sample of it, so "
            "the posterior of the sample is gone: use the operation that is not in place."
        )
    return sample.posterior


def _detached(
    total: Tensor,
    base: Tensor,
    rate: Tensor | None,
    entropy: Tensor | None,
    beta: float | Tensor,
) -> ClimbTerms:
    with without_transforms():
        base = plain(base).detach()
        nan = base.new_full((), math.nan)
        return ClimbTerms(
            # Copies: what the caller does to the value in place is not done to these.
            plain(total).detach().clone(),
            base.clone(),
            nan if rate is None else plain(rate).detach(),
            nan if entropy is None else plain(entropy).detach(),
            beta
            if isinstance(beta, Tensor)
            else torch.tensor(beta, dtype=torch.float64, device="cpu"),
        )


def _save_as_base(
    loss: ClimbLoss, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for key in [key for key in state if key.startswith(prefix + "base.")]:
        state[prefix + key[len(prefix + "base.") :]] = state.pop(key)
    metadata[_METADATA] = loss.climb_state()


def _load_from_base(
    loss: ClimbLoss, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    own = prefix + "climb_priors."
    if isinstance(loss.base, nn.Module):
        for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
            state[prefix + "base." + key[len(prefix) :]] = state.pop(key)
    saved = metadata.get(_METADATA)
    if saved is None:
        if not isinstance(loss.climb.schedule, Constant):
            warnings.warn(
                "this state dict holds no CLIMB step (a plain loss, or its metadata was dropped): "
                f"beta goes on from step {loss.climb.step}; set_step(n) says otherwise.",
                stacklevel=2,
            )
        return
    loss.load_climb_state(saved)
