"""CLIMB inside a solo-learn method, whatever the method is; imports no host.

Works on anything that has a ``projector`` or a ``head`` and lists its parameters in
``learnable_params``, as solo-learn's methods and those of its users do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from climb_plugin.adapters.solo_keys import Keys, read_keys
from climb_plugin.adapters.solo_resume import (
    adopt,
    freeze_host,
    grow,
    thaw_host,
    warn_of_changes,
    without_code,
)
from climb_plugin.attach import attach
from climb_plugin.head import GaussianHead
from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Ramp

_STATE = "climb_plugin"
_PROJECTIONS = ("projector", "head")


class ClimbMethod:
    """Goes before a method's class in the bases of a subclass: ``class X(ClimbMethod, DINO)``.

    Without ``climb_*`` keys, or with ``climb_beta=0``, every method here only passes on.

    Raises:
        TypeError: As :func:`~climb_plugin.adapters.solo_keys.read_keys`.
        ValueError: Likewise; if the method has no projection head; if the head's place cannot
            be found.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self
        keys = read_keys(model.cfg)
        self._climb_keys = keys
        # In a tuple: as a submodule the loss would add keys to the checkpoint.
        self._climb: tuple[ClimbLoss, ...] = ()
        self._climb_grown: dict[str, Any] | None = None
        self._climb_frozen: Mapping[str, Any] | None = None
        if keys is not None and keys.on:
            self._climb = (_put_in(model, keys),)
            if keys.prior == "learned":
                model.climb_prior = self._climb[0].climb_priors[0]

    @property
    def climb(self) -> ClimbLoss | None:
        """The loss that adds the bottleneck; None where CLIMB is off."""
        return self._climb[0] if self._climb else None

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The method's groups, and the parameters of CLIMB that they do not hold."""
        host: Any = super()
        groups: list[dict[str, Any]] = host.learnable_params
        if self.climb is None:
            return groups
        groups = [{**group, "params": list(group["params"])} for group in groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        for name, module in (("climb_head", self.climb.heads[0]), ("climb_prior", self.climb)):
            missing = [p for p in module.parameters() if id(p) not in held]
            if missing:
                groups.append({"name": name, "params": missing, "weight_decay": 0})
        return groups

    def configure_optimizers(self) -> Any:
        """The method's optimiser; a plain checkpoint's state is made to fit it."""
        host: Any = super()
        configured = host.configure_optimizers()
        if self._climb_grown is not None:
            grow(self._climb_grown, configured, _own_parameters(self))
            self._climb_grown = None
        return configured

    def on_train_start(self) -> None:
        """Lays the schedule over the training, and says what is in force."""
        host: Any = super()
        host.on_train_start()
        if self._climb_keys is None:
            return
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if self.climb is not None and isinstance(self.climb.schedule, Ramp):
            total = trainer.estimated_stepping_batches
            if not math.isfinite(total):
                raise ValueError(
                    f"climb_warmup={self._climb_keys.warmup!r} needs a training of finite length, "
                    f"this one has {total} steps: set max_epochs or max_steps."
                )
            self.climb.schedule = self.climb.schedule.over(int(total))
        if trainer.is_global_zero:
            print(self._climb_in_force(), flush=True)

    def on_train_epoch_start(self) -> None:
        """Goes on with the random numbers of the checkpoint, where one was resumed."""
        host: Any = super()
        # Lightning first ends the saved epoch once more; what counts is the start of the next.
        if self._climb_frozen is not None:
            thaw_host(self, self._climb_frozen)
        host.on_train_epoch_start()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The method's step, its loss with the bottleneck."""
        host: Any = super()
        self._climb_frozen = None
        outcome = host.training_step(batch, batch_idx)
        loss = self.climb
        if loss is None:
            return outcome
        model: Any = self
        loss.set_step(model.trainer.global_step)
        total = loss(outcome["loss"] if isinstance(outcome, Mapping) else outcome)
        values = {
            "climb_rate": loss.terms.rate,
            "climb_entropy": loss.terms.entropy,
            "climb_base_loss": loss.terms.base,
            "climb_beta": loss.terms.beta.float(),  # loss.beta would wait for the device
        }
        # Averaged over the epoch and then over the ranks: nothing is exchanged per step.
        model.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
        model.log("climb_rate_step", loss.terms.rate, on_step=True, on_epoch=False, prog_bar=True)
        return {**outcome, "loss": total} if isinstance(outcome, Mapping) else total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the ``climb_*`` values, and what solo-learn needs to go on to the same numbers."""
        host: Any = super()
        host.on_save_checkpoint(checkpoint)
        if self.climb is not None and self._climb_keys is not None:
            checkpoint[_STATE] = {
                "keys": self._climb_keys.named(),
                "host": freeze_host(self),
                "loss": self.climb.climb_state(),
            }
            without_code(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the ``climb_*`` values with those of the checkpoint."""
        host: Any = super()
        host.on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is None:  # loaded for evaluation, not to go on
            return
        saved = checkpoint.get(_STATE)
        now = self._climb_keys.named() if self.climb is not None and self._climb_keys else None
        warn_of_changes(None if saved is None else saved["keys"], now)
        if saved is not None and now is not None:
            self._climb_frozen = saved["host"]
            if "loss" in saved:  # not before there were target rates
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "CLIMB's .* was")  # warn_of_changes said it
                    self._climb[0].load_climb_state(saved["loss"])
        elif now is not None:
            self._climb_grown = checkpoint

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Also takes the state of a run without CLIMB; what is missing keeps its value."""
        host: Any = super()
        if self.climb is not None:
            state_dict = adopt(state_dict, host.state_dict(), _own_prefixes(self))
        return host.load_state_dict(state_dict, *args, **kwargs)

    def _climb_in_force(self) -> str:
        keys, loss = self._climb_keys, self.climb
        if loss is None or keys is None:
            return "CLIMB: off, because climb_beta=0: solo-learn's own method runs."
        count = sum(parameter.numel() for parameter in _own_parameters(self))
        free = f", {keys.free_nats} nats free" if keys.free_nats else ""
        return (
            f"CLIMB: {loss.schedule!r} in optimiser steps, alpha {keys.alpha}, prior "
            f"{keys.prior}{free}, at {keys.at} ({loss.heads[0].out_features} wide, std "
            f"{keys.init_std} at the start), {count} parameters; rates are in nats, summed over "
            "dimensions, averaged over batch and views."
        )


def _put_in(model: Any, keys: Keys) -> ClimbLoss:
    modules = {name: getattr(model, name, None) for name in _PROJECTIONS}
    student = next((m for m in modules.values() if isinstance(m, nn.Module)), None)
    if student is None:
        raise ValueError(
            f"climb_beta={keys.beta} has nothing to act on in method "
            f"{model.cfg.get('method')!r}: it has neither a projector nor a head, so no embedding "
            "whose information could be bounded. Drop the climb_* keys or choose another method."
        )
    # The pairs of solo-learn's momentum updates, which go parameter by parameter.
    pairs = getattr(model, "momentum_pairs", [])
    teacher = next((teacher for online, teacher in pairs if online is student), None)
    head = attach(student, teacher=teacher, at=keys.at, init_std=keys.init_std)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prior='learned' is learned")  # learnable_params has it
        return ClimbLoss(
            _as_it_is,
            heads=head,
            beta=keys.make_schedule(),
            alpha=keys.alpha,
            prior=keys.prior,
            free_nats=keys.free_nats,
            check_base=False,
        )


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _own_prefixes(model: Any) -> tuple[str, ...]:
    """How the keys begin that CLIMB adds to the state dict."""
    heads = [name for name, module in model.named_modules() if isinstance(module, GaussianHead)]
    return tuple(f"{name}." for name in (*heads, "climb_prior"))


def _own_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters that CLIMB adds."""
    loss: ClimbLoss = model.climb
    return [*loss.heads[0].parameters(), *loss.parameters()]
