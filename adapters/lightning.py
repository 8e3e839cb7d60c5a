"""CLIMB in a LightningModule: the terms in the log, the schedule on the trainer's steps.

For ``lightning`` and ``pytorch_lightning`` 2.x alike, also where both are installed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Ramp, Schedule

_HOSTS = ("lightning.pytorch", "pytorch_lightning")
# Submodules are walked as such; hyperparameters may hold a copy of the loss.
_NO_ATTRIBUTES = frozenset({"_modules", "_hparams", "_hparams_initial"})


def _callback_classes() -> tuple[type, ...]:
    """The Callback class of each package that can be imported."""
    found: list[type] = []
    errors: list[str] = []
    for name in _HOSTS:
        try:
            found.append(import_module(name).Callback)
        except ImportError as error:
            errors.append(str(error))
    if not found:
        raise ImportError(
            "neither lightning nor pytorch_lightning can be imported: pip install 'lightning>=2' "
            f"({'; '.join(errors)})"
        )
    return tuple(found)


if TYPE_CHECKING:
    _Callback = object
else:
    # A Trainer takes only subclasses of its own package's Callback; both are plain classes.
    _Callback = type("_Callback", _callback_classes(), {})


class ClimbCallback(_Callback):
    """Logs the terms of every ClimbLoss in the LightningModule and drives its schedule.

    Per epoch ``climb_rate`` and ``climb_entropy`` (nats), ``climb_beta`` and
    ``climb_base_loss`` are logged: means over the steps and the ranks (over the calls, where a
    step calls the loss several times). Nothing is exchanged and no device waited for per step.
    The progress bar shows ``climb_rate_step``. Where the module has several losses, each name
    ends in ``_`` and the loss's attribute path: ``climb_rate_dino_loss``.

    Schedules follow ``trainer.global_step``, with gradient accumulation as well. A warm-up or
    delay that is a fraction is laid over ``trainer.estimated_stepping_batches``, unless the ramp
    has ``total_steps``. With manual optimisation Lightning estimates one step per batch, but
    counts those of every optimiser: give ``total_steps`` there.

    A loss is found as a submodule, or as an attribute (or in a list, tuple or dict that is one)
    of the LightningModule or of a submodule. The start of the training says what is in force.

    Raises:
        ValueError: At the start of the training, if there is no ClimbLoss in the module; if a
            fraction is to be laid over a training of unknown length; if the checkpoint that is
            resumed has the state of a loss whose attribute path is gone (a warning, where the
            LightningModule has ``strict_loading = False``).

    Examples:
        >>> callback = ClimbCallback()  # Trainer(callbacks=[ClimbCallback()])
    """

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[str, _Record] = {}
        self._restored: Mapping[str, Any] = {}
        self._ended: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the losses, lays their schedules over the training, says what is in force."""
        losses = dict(_find_losses(pl_module))
        if not losses:
            raise ValueError(
                f"ClimbCallback finds no ClimbLoss in {type(pl_module).__name__}: make it an "
                "attribute in __init__, as in self.criterion = wrap(...), or drop the callback."
            )
        for loss in losses.values():
            loss.schedule = _laid(loss.schedule, trainer)
        self._stop()
        modules = set(pl_module.modules())
        self._ended = {}
        self._records = {path: _Record(loss, loss in modules) for path, loss in losses.items()}
        if trainer.is_global_zero:
            print("\n".join(_in_force(*item) for item in losses.items()), flush=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets the losses go on from the checkpoint that is resumed, if one is."""
        restored, self._restored = self._restored, {}
        gone = sorted(restored.keys() - self._records.keys())
        if gone:
            message = (
                f"the checkpoint has the state of a ClimbLoss at {' and '.join(gone)}, where "
                f"{type(pl_module).__name__} has none: its losses are at "
                f"{', '.join(self._records)}. Give the loss its old place, or, to go on without "
                "that state, set strict_loading = False on the LightningModule."
            )
            if getattr(pl_module, "strict_loading", True):  # Lightning has it since 2.2
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        for path, state in restored.items():
            if path in self._records:
                self._records[path].loss.load_climb_state(state)

    def state_dict(self) -> dict[str, Any]:
        """What the module's own state lacks: the state of losses that are no submodules."""
        return self._ended | {
            path: record.loss.climb_state()
            for path, record in self._records.items()
            if not record.is_submodule
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps what :meth:`state_dict` returned until the training starts."""
        self._restored = dict(state_dict)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tells the losses which optimiser step comes next."""
        for record in self._records.values():
            record.loss.set_step(trainer.global_step)
            record.clear()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step."""
        for path, record in self._records.items():
            suffix = f"_{path}" if len(self._records) > 1 else ""
            values = {f"{name}{suffix}": value for name, value in record.means().items()}
            # Averaged over the epoch and then over the ranks: nothing is exchanged per step.
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
            rate = values.get(f"climb_rate{suffix}")
            if rate is not None:
                pl_module.log(
                    f"climb_rate_step{suffix}", rate, on_step=True, on_epoch=False, prog_bar=True
                )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warns of losses that no training step has called."""
        idle = [path for path, record in self._records.items() if not record.called]
        if idle:
            warnings.warn(
                f"no training step has called {' and '.join(idle)}: there is nothing to log, and "
                "CLIMB has no effect there. Call it as loss(...), not loss.forward(...).",
                stacklevel=2,
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the losses."""
        self._stop()
        self._restored = {}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of the losses."""
        self._stop()
        self._restored = {}  # an evaluation loads what is not its own, too

    def _stop(self) -> None:
        self._ended = self.state_dict()  # for a checkpoint that is saved after the training
        for record in self._records.values():
            record.remove()
        self._records = {}


class _Record:
    """Sums the terms of the calls of a loss within one training step."""

    def __init__(self, loss: ClimbLoss, is_submodule: bool) -> None:
        self.loss = loss
        self.is_submodule = is_submodule
        self.called = False
        self.clear()
        self.remove = loss.register_forward_hook(self._add).remove

    def clear(self) -> None:
        self._sums: Tensor | None = None
        self._calls = 0

    def _add(self, loss: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():  # an evaluation, in the step or elsewhere
            return
        terms = self.loss.terms
        rate = terms.rate.float()
        beta = terms.beta
        if not beta.is_cuda:  # filled in on the device: a copy from the host would wait for it
            beta = rate.new_full((), float(beta))
        values = torch.stack([rate, terms.entropy.float(), beta.float(), terms.base.float()])
        self._sums = values if self._sums is None else self._sums + values
        self._calls += 1
        self.called = True

    def means(self) -> dict[str, Tensor]:
        """The means over the calls by name; empty if there were none."""
        if self._sums is None:
            return {}
        names = ("climb_rate", "climb_entropy", "climb_beta", "climb_base_loss")
        values = dict(zip(names, (self._sums / self._calls).unbind(), strict=True))
        if not self.loss.heads:  # wrapped with beta=0: there is no posterior
            del values["climb_rate"], values["climb_entropy"]
        return values


@dataclass(frozen=True, repr=False)
class _Laid:
    """A ramp over the steps of one training; its repr, which checkpoints compare, is the ramp's."""

    ramp: Ramp
    total_steps: int

    def __post_init__(self) -> None:
        self.ramp.over(self.total_steps)

    def __call__(self, step: int) -> float:
        return self.ramp.over(self.total_steps)(step)

    def __repr__(self) -> str:
        return repr(self.ramp)


def _laid(schedule: Schedule, trainer: Any) -> Schedule:
    """The schedule over the length of this training, if it depends on that."""
    ramp = schedule.ramp if isinstance(schedule, _Laid) else schedule
    if not isinstance(ramp, Ramp) or ramp.total_steps is not None:
        return ramp
    if not any(isinstance(duration, float) for duration in (ramp.warmup, ramp.delay)):
        return ramp
    total = trainer.estimated_stepping_batches
    # -1 is what Lightning returns for data without a length and no max_steps.
    if not math.isfinite(total) or total < 0:
        raise ValueError(
            f"{ramp!r} has a fraction of the training, whose length is not known: set max_epochs "
            "(with data that has a length) or max_steps, or give the ramp total_steps."
        )
    return _Laid(ramp, int(total))


def _find_losses(model: nn.Module) -> Iterator[tuple[str, ClimbLoss]]:
    """Every loss once, with its attribute path; submodules first."""
    seen: set[int] = set()
    modules = list(model.named_modules())
    for path, value in (*modules, *_plain_attributes(modules)):
        if isinstance(value, ClimbLoss) and id(value) not in seen:
            seen.add(id(value))
            yield path, value


def _plain_attributes(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    for prefix, module in modules:
        for name, value in vars(module).items():
            if name in _NO_ATTRIBUTES:
                continue
            path = f"{prefix}.{name}" if prefix else name
            yield path, value
            items: Iterable[tuple[Any, Any]] = ()
            if isinstance(value, Mapping):
                items = value.items()
            elif isinstance(value, (list, tuple)):
                items = enumerate(value)
            yield from ((f"{path}.{key}", item) for key, item in items)


def _in_force(path: str, loss: ClimbLoss) -> str:
    if not loss.heads:
        return f"CLIMB: {path} is off, because beta is 0: the loss is the base loss."
    schedule = loss.schedule
    over = f" over {schedule.total_steps}" if isinstance(schedule, _Laid) else " in"
    free = f", {loss.free_nats} nats free" if loss.free_nats else ""
    widths = ", ".join(str(head.out_features) for head in loss.heads)
    return (
        f"CLIMB: {path}: {schedule!r}{over} optimiser steps, alpha {loss.alpha}, prior "
        f"{loss.prior}{free}, heads {widths} wide; rates are in nats, summed over dimensions, "
        "averaged over batch and views."
    )
