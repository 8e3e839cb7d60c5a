"""Any base loss plus the bottleneck."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin.collapse import CollapseWatch
from climb_plugin.compiled import eager
from climb_plugin.finite import FiniteCheck
from climb_plugin.gaussian import conditional_entropy
from climb_plugin.head import (
    GaussianHead,
    Posterior,
    Record,
    TeacherHead,
    joined,
    records_before,
    records_of,
)
from climb_plugin.prior import make_priors, per_sample
from climb_plugin.ranks import averaged, joining, several
from climb_plugin.schedule import (
    Constant,
    Schedule,
    TargetRate,
    as_schedule,
    checked_beta,
    checked_number,
)

_METADATA = "climb"
_MODULE_SLOTS = frozenset({"base", "climb_priors"})


class ClimbTerms(NamedTuple):
    """The terms of the last step, detached scalars.

    Attributes:
        total: What the loss returned: base + beta * (rate + alpha * entropy), where only the
            rate above ``free_nats`` counts.
        base: The value of the base loss, in its own unit.
        rate: Nats, summed over dimensions, averaged over samples and views; NaN where no
            posterior was involved (beta 0 without heads, evaluation).
        entropy: The conditional entropy H(z | v), in nats, likewise.
        beta: The weight that was in force.
    """

    total: Tensor
    base: Tensor
    rate: Tensor
    entropy: Tensor
    beta: Tensor


class ClimbLoss(nn.Module):
    """``base + beta * (rate + alpha * entropy)``, called exactly like ``base``.

    Every call adds the terms of the posteriors that the value of the base loss depends on. So a
    criterion that is called once per view and averaged adds the rate once, an output that is
    not used adds nothing, and a teacher's detached output adds nothing.

    Under ``torch.no_grad()``, or with every head in ``eval()``, it is the base loss alone.
    Attributes of the base (``center``, ``teacher_temp``, ...) are read and set through it, and
    their state dicts are interchangeable: its keys are those of the base (plus the parameters
    of a learned prior), and the step of the schedule travels in the metadata.

    Args:
        base: A loss: any callable or module that returns a scalar tensor.
        heads: The head, or the heads, whose samples the loss is computed from; the rates of
            several heads add up.
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
        ValueError: If beta, alpha or free_nats is negative or not finite, if the prior is
            unknown or has no use for ``views``, if there is no head while beta is not 0, or if
            a target rate lies within the free nats.

    Source: the objective reads Li et al., Contrastive Learning via Variational Information
    Bottleneck, TPAMI 47(9), 2025 (of which only the abstract was at hand) with the bound of
    Alemi et al., Deep Variational Information Bottleneck, 2017; Prior, place and
    beta are choices of this package, not the paper's.

    Examples:
        >>> head = GaussianHead(8)
        >>> loss = ClimbLoss(nn.functional.mse_loss, heads=head, beta=1e-3)
        >>> loss(head(torch.zeros(4, 8)), torch.zeros(4, 8)).requires_grad
        True
        >>> loss.terms._fields
        ('total', 'base', 'rate', 'entropy', 'beta')
    """

    def __init__(
        self,
        base: Callable[..., Tensor],
        *,
        heads: GaussianHead | Sequence[GaussianHead],
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
        self._heads = _checked_heads(heads)
        self.schedule = as_schedule(beta)
        if not self._heads and self.schedule != Constant(0.0):
            raise ValueError(
                f"beta={beta} has nothing to act on: heads is empty. Pass the GaussianHead that "
                "is in the model."
            )
        self.alpha = checked_number("alpha", alpha)
        self.free_nats = checked_number("free_nats", free_nats)
        free = self.free_nats * len(self._heads)
        if isinstance(self.schedule, TargetRate) and self.schedule.nats <= free:
            raise ValueError(
                f"a target rate of {self.schedule.nats} nats cannot be held while {free} nats are "
                "free: below these no beta has an effect. Lower free_nats or raise the target."
            )
        self.check_base = check_base
        self.prior = prior
        widths = [head.out_features for head in self._heads]
        self.climb_priors = nn.ModuleList(make_priors(prior, widths, views=views))
        if any(True for _ in self.climb_priors.parameters()):
            warnings.warn(
                f"prior={prior!r} is learned and its parameters belong to the loss: add "
                "list(loss.parameters()) to the optimiser, or it stays at N(0, I).",
                stacklevel=2,
            )
        self._step = 0
        self._terms: ClimbTerms | None = None
        self._finite = FiniteCheck()
        self._ranks_checked = False
        self._collapse = CollapseWatch()
        self.base = base
        self._register_state_dict_hook(_save_as_base)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _load_from_base, with_module=True
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base loss of these arguments, passed on verbatim, plus the bottleneck.

        Returns:
            A scalar tensor; a tensor with one element if that is what the base returns.

        Raises:
            RuntimeError: If a head is in training, but the base loss depends on none of its
                samples; if a target rate meets the ``join()`` of DistributedDataParallel.
            TypeError: If the base loss returns no tensor.
            ValueError: If the base loss returns more than a scalar; if ``prior="view"`` finds
                views that do not pair up; if a term is NaN or infinite: the message
                names it. On CUDA that comes a step or so late, because the check does not wait
                for the device.
        """
        return self._plus_bottleneck(_checked_scalar(self.base(*args, **kwargs)))

    @eager
    def _plus_bottleneck(self, value: Tensor) -> Tensor:
        base = value.reshape(())
        beta = self._beta()
        base, calls = joined(base, self._calls(base))
        if not calls:
            nan = base.new_full((), math.nan)
            self._terms = _detached(base, base, nan, nan, beta)
            return value
        if not self._ranks_checked and several():
            self._check_ranks()
        # One sum over heads: each head is a code of its own, and what they carry adds up.
        rates = [prior(views) for prior, views in zip(self.climb_priors, calls, strict=True)]
        rate = torch.stack([values.mean() for values in rates]).sum()
        with torch.set_grad_enabled(self.alpha > 0):
            entropies = [per_sample([conditional_entropy(*v) for v in views]) for views in calls]
            entropy = torch.stack([values.mean() for values in entropies]).sum()
        penalty = rate
        if self.free_nats:
            penalty = torch.stack([F.relu(v - self.free_nats).mean() for v in rates]).sum()
        if self.alpha:
            penalty = penalty + self.alpha * entropy
        self._check_finite(base, rate, entropy, calls)
        # The rate to another view says nothing about how near to a prior the posterior is.
        fixed = None if self.prior == "view" else rates
        self._collapse.observe(base=self.base, value=base, beta=beta, rates=fixed, calls=calls)
        if penalty.requires_grad:
            penalty.register_hook(_StepDone(self))
            if isinstance(self.schedule, TargetRate):
                self.schedule.observe(self._step, rate)
        total = base + beta * penalty
        self._terms = _detached(total, base, rate, entropy, beta)
        # A view as the output of a module that FSDP shards would make it warn.
        return total if value.ndim == 0 else total.reshape(value.shape)

    @property
    def heads(self) -> tuple[GaussianHead, ...]:
        """The heads; they belong to the model."""
        return self._heads

    @property
    def terms(self) -> ClimbTerms:
        """The terms of the last call, detached.

        Raises:
            RuntimeError: If the loss has not been called yet.
        """
        if self._terms is None:
            raise RuntimeError("there are no terms yet: call the loss first.")
        return self._terms

    @property
    def beta(self) -> float:
        """The weight of the bottleneck at the current step."""
        return float(self._beta())

    @property
    def step(self) -> int:
        """The current optimiser step: the number of backward passes through this loss so far."""
        return self._step

    def set_step(self, step: int) -> None:
        """Says which optimiser step comes next, where it is not the number of backward passes.

        With gradient accumulation, call it before each loss with the number of optimiser steps
        done.

        Raises:
            ValueError: If ``step`` is not an int of 0 or more.
        """
        self._step = _checked_step(step)

    def _beta(self) -> float | Tensor:
        beta = self.schedule(self._step)
        return beta if isinstance(beta, Tensor) else checked_beta("the schedule's beta", beta)

    def _calls(self, base: Tensor) -> list[list[Record]]:
        """For each head its records that ``base`` depends on, or nothing in evaluation."""
        if not self._heads or not torch.is_grad_enabled():
            return []
        records = self._records(base)
        calls = [[r for r in records if r.head is head] for head in self._heads]
        missing = [index for index, views in enumerate(calls) if not views]
        if not missing:
            return calls
        if not any(head.training for head in self._heads):
            if base.requires_grad:
                raise RuntimeError(
                    "every GaussianHead of this loss is in eval mode, so there is nothing to "
                    "regularise: call model.train() before training, or evaluate under "
                    "torch.no_grad()."
                )
            return []
        raise RuntimeError(
            "this loss depends on no sample of "
            + " and ".join(
                f"heads[{i}], GaussianHead({self._heads[i].extra_repr()})" for i in missing
            )
            + ": in a training step the model's forward must call it before the loss, with "
            "gradients enabled, and its output must reach the loss undetached. Call the module "
            "that holds it as module(x): module.forward(x) may skip it. Compiled code inside "
            "torch.utils.checkpoint needs use_reentrant=False. To evaluate, use torch.no_grad()."
        )

    def _records(self, base: Tensor) -> list[Record]:
        """The records of this loss's heads that ``base`` depends on, in the order of the calls."""
        for head in self._heads:
            head.collect()
        found: dict[tuple[int, int], Record] = {}
        frontier = records_of(base)
        while frontier:
            found.update({(id(record.head), record.call): record for record in frontier})
            # A head may sit upstream of another one (features and projection). All heads of a
            # checkpoint lie on its one node, and say nothing of the views that are in none.
            complete = {id(head) for head in self._heads} <= {head for head, _ in found}
            if complete and not any(record.held for record in found.values()):
                break
            upstream = [r for record in frontier for r in records_before(record)]
            frontier = [r for r in upstream if (id(r.head), r.call) not in found]
        return sorted(found.values(), key=lambda record: record.call)

    def _check_ranks(self) -> None:
        self._ranks_checked = True
        if any(True for _ in self.climb_priors.parameters()) and not averaged(self.climb_priors):
            warnings.warn(
                f"prior={self.prior!r} is learned, and no DistributedDataParallel or FSDP module "
                "holds this loss: each rank trains a prior of its own. Put model and loss into "
                "one module that returns the loss, and wrap and call that.",
                stacklevel=3,
            )
        if isinstance(self.schedule, TargetRate) and joining():
            raise RuntimeError(
                "a target rate is averaged over all ranks in every step, and within "
                "DistributedDataParallel.join() a rank may run out of steps: use a beta or a "
                "schedule, or drop_last=True and as many batches on every rank instead of join()."
            )

    def _check_finite(
        self, base: Tensor, rate: Tensor, entropy: Tensor, calls: list[list[Posterior]]
    ) -> None:
        terms = {"rate": rate, "entropy": entropy}
        if self.check_base:
            terms = {"base loss": base, **terms}
        values = torch.stack([term.detach().to(rate) for term in terms.values()])
        bad = self._finite.non_finite(values)
        if not bad:
            return
        causes = [
            f"the {name} of heads[{i}], view {j}, has {count} non-finite values"
            for i, views in enumerate(calls)
            for j, view in enumerate(views)
            for name, tensor in (("embedding or its mean", view.mean), ("logvar", view.logvar))
            if (count := int((~torch.isfinite(tensor)).sum()))
        ]
        names = list(terms)
        raise ValueError(
            "not finite: "
            + ", ".join(f"{names[i]} (now {float(values[i])})" for i in bad)
            + (f"; {'; '.join(causes)}" if causes else "")
            + ". Lower the learning rate, leave float16, or look for the first NaN with "
            "torch.autograd.set_detect_anomaly(True)."
        )

    def climb_state(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers and strings; part of the state dict's metadata.

        For hosts that keep a loss out of their checkpoints. Waits for the device if beta lives
        there.
        """
        state: dict[str, Any] = {"step": self.step, **self._config()}
        if isinstance(self.schedule, TargetRate):
            state["target_rate"] = self.schedule.state()
        return state

    def load_climb_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`climb_state` returned.

        Warns of each setting that was another one.

        Raises:
            ValueError: If ``state`` is something else; then nothing is changed.
        """
        config = self._config()
        if not isinstance(state, Mapping) or not {"step", *config} <= state.keys():
            raise ValueError(
                f"the state of a ClimbLoss has step, {', '.join(config)}, got {state!r}: it is "
                "damaged, or of something else."
            )
        _checked_step(state["step"])
        if isinstance(self.schedule, TargetRate) and "target_rate" in state:
            self.schedule.load_state(state["target_rate"])
        for name, now in config.items():
            if state[name] != now:
                warnings.warn(
                    f"CLIMB's {name} was {state[name]} when this state was saved and is {now} "
                    "now: the run goes on with the latter.",
                    stacklevel=2,
                )
        self.set_step(state["step"])

    def _config(self) -> dict[str, str]:
        shown = repr(self.schedule)
        if " at 0x" in shown:  # the address of a function is another one in the next run
            shown = type(self.schedule).__name__
        return {
            "beta": shown,
            "alpha": repr(self.alpha),
            "prior": self.prior,
            "free_nats": repr(self.free_nats),
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or not hasattr(_base_of(self), name):
                raise
            return getattr(_base_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or name in _MODULE_SLOTS or hasattr(type(self), name)
        if not own and hasattr(_base_of(self), name):
            setattr(_base_of(self), name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        shown = {**self._config(), "heads": str(len(self._heads))}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def _base_of(loss: ClimbLoss) -> Callable[..., Tensor] | None:
    """The base, or None while the loss is being built or unpickled."""
    base: Callable[..., Tensor] | None = loss.__dict__.get("_modules", {}).get("base")
    return loss.__dict__.get("base") if base is None else base


class _StepDone:
    """Counts a step once its backward has come through, however many losses it had."""

    def __init__(self, loss: ClimbLoss) -> None:
        self._loss = loss
        self._next = loss.step + 1

    def __call__(self, gradient: Tensor) -> None:
        self._loss.set_step(max(self._loss.step, self._next))


def _checked_heads(heads: GaussianHead | Sequence[GaussianHead]) -> tuple[GaussianHead, ...]:
    several = (heads,) if isinstance(heads, nn.Module) else tuple(heads)
    for head in several:
        if isinstance(head, TeacherHead):
            raise TypeError("heads holds the head of a teacher: pass the student's.")
        if not isinstance(head, GaussianHead):
            raise TypeError(f"heads must be GaussianHeads, got {type(head).__name__}.")
    if len(set(several)) < len(several):
        raise ValueError("heads holds the same head twice.")
    return several


def _checked_step(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an int of 0 or more, got {step!r}.")
    return step


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


def _detached(
    total: Tensor, base: Tensor, rate: Tensor, entropy: Tensor, beta: float | Tensor
) -> ClimbTerms:
    return ClimbTerms(
        # Copies: what the caller does to the value in place is not done to these.
        total.detach().clone(),
        base.detach().clone(),
        rate.detach(),
        entropy.detach(),
        beta if isinstance(beta, Tensor) else torch.tensor(beta, dtype=torch.float64),
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
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[prefix + "base." + key[len(prefix) :]] = state.pop(key)
    saved = metadata.get(_METADATA)
    if saved is None:
        if not isinstance(loss.schedule, Constant):
            warnings.warn(
                "this state dict holds no CLIMB step (a plain loss, or its metadata was dropped): "
                f"beta goes on from step {loss.step}; set_step(n) says otherwise.",
                stacklevel=2,
            )
        return
    loss.load_climb_state(saved)
