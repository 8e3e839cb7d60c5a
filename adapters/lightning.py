"""Logs CLIMB's terms in a LightningModule, and lays schedules over the training's length.

For ``lightning`` and ``pytorch_lightning`` 2.x alike, even if both are installed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from climb_plugin.adapters.find import find_losses
from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Schedule
from climb_plugin.terms import ClimbTerms


def _callback_classes() -> tuple[type, ...]:
    """The Callback class of each package that can be imported."""
    found, errors = [], []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(import_module(name).Callback)
        except ImportError as error:
            errors.append(str(error))
    if found:
        return tuple(found)
    raise ImportError(
        "neither lightning nor pytorch_lightning can be imported: pip install 'lightning>=2' "
        f"({'; '.join(errors)})"
    )


if TYPE_CHECKING:
    _Callback = object
else:
    # A Trainer takes only its own package's Callbacks. Both are plain classes: subclass both.
    _Callback = type("_Callback", _callback_classes(), {})


class ClimbCallback(_Callback):
    """Logs the terms of every ClimbLoss in the LightningModule and lays its schedule.

    Per epoch ``climb_rate`` and ``climb_entropy`` (nats), ``climb_beta`` and ``climb_base_loss``
    are logged: means over the steps and the ranks (over the calls, if a step calls the loss several
    times). Nothing is exchanged and no device waited for per step. The progress bar shows
    ``climb_rate_step``. If the module has several losses, each name ends in ``_`` and the loss's
    attribute path: ``climb_rate_dino_loss``.

    A loss counts optimiser steps by itself, from 0 in each new training, or from what ``set_step``
    said before. A schedule that needs the training's length (a ramp with fractions and without
    ``total_steps``) is laid over ``trainer.estimated_stepping_batches``, and stays so when the
    training is resumed. Give ``total_steps`` if a GradientAccumulationScheduler changes the length,
    or if manual optimisation has fewer steps than batches. While a learning rate or a batch size is
    sought, before the training, such a schedule is at its end, and an infinite loss does not raise.

    A loss is found as a submodule, or as an attribute (or in lists, tuples and dicts that are one)
    of the LightningModule or of a submodule. The start of the training prints the settings.
    Lightning 2.1 writes checkpoints in place: a kill may cut last.ckpt short; keep older ones
    (``save_top_k=-1``).

    Raises:
        ValueError: At the start of the training, if the module has no ClimbLoss; if a fraction
            needs a length that is not known; if a resumed checkpoint has the state of a loss whose
            attribute path is gone (a warning, with ``strict_loading = False``).

    Examples:
        >>> callback = ClimbCallback()  # Trainer(callbacks=[ClimbCallback()])
    """

    def __init__(self) -> None:
        super().__init__()
        self._module: nn.Module | None = None
        self._is_waiting = False  # From setup to the start of the training.
        self._evaluates = False
        self._records: dict[str, _Record] = {}
        self._restored: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}  # that schedules were laid over

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepares the losses for a search, or a restored state, before the training."""
        self._evaluates = stage != "fit"
        if stage == "fit":
            self._module, self._is_waiting = pl_module, True
            self._losses()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks that there is a loss."""
        if not self._losses():
            raise ValueError(
                f"ClimbCallback finds no ClimbLoss in {type(pl_module).__name__}: make it an "
                "attribute in __init__, as in self.criterion = wrap(...), or drop the callback."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lays the schedules over the training, prints the settings, begins to record."""
        losses = self._losses()
        self._restore(losses)
        self._check_restored(losses, pl_module)
        if trainer.global_step == 0:
            self._lengths = {}
        for path, loss in losses.items():
            if loss.climb.schedule.needs_length:
                total = self.length(trainer, loss.climb.schedule)
                length = self._lengths.setdefault(path, total)
                if length != total:
                    warnings.warn(
                        f"{self.named(loss.climb.schedule)} stays a fraction of the {length} "
                        f"optimiser steps of the training that is resumed, not of {total}.",
                        stacklevel=2,
                    )
                loss.climb.lay(length)
            if trainer.global_step == 0:
                loss.climb.begin()
        self._is_waiting = False
        self._records = {path: _Record(loss) for path, loss in losses.items()}
        if trainer.is_global_zero:
            for path, loss in losses.items():
                print(_in_force(path, loss, self._lengths.get(path)), flush=True)

    def named(self, schedule: Schedule) -> str:
        """A schedule's name in messages."""
        return repr(schedule)

    def length(self, trainer: Any, schedule: Schedule) -> int:
        """The number of optimiser steps of the training.

        Raises:
            ValueError: If the number is not known; the message names the schedule that needs one.
        """
        unknown = f"{schedule!r} has a fraction of the training, whose length is not known"
        total = trainer.estimated_stepping_batches
        # Lightning returns -1 for data without a length and no max_steps.
        if not math.isfinite(total) or total < 0:
            raise ValueError(
                f"{unknown}: set max_epochs (with data that has a length) or max_steps, or give "
                "the ramp total_steps."
            )
        for callback in trainer.callbacks:
            plan = getattr(callback, "scheduling", None)
            if isinstance(plan, Mapping) and {*plan.values()} != {trainer.accumulate_grad_batches}:
                raise ValueError(
                    f"{unknown}, because {type(callback).__name__} accumulates gradients over "
                    f"{dict(plan)}: give the ramp total_steps, the number of optimiser steps."
                )
        return int(total)

    def state_dict(self) -> dict[str, Any]:
        """The states of the losses, with the priors of those that are no submodules, and lengths.

        Of a submodule, the module's state dict has the step in its metadata, which asynchronous and
        sharded checkpoints drop.
        """
        modules = set() if self._module is None else set(self._module.modules())
        losses = {
            path: {
                **loss.climb_state(),
                "priors": {} if loss in modules else loss.climb_priors.state_dict(),
            }
            for path, loss in self._losses().items()
        }
        return {"losses": losses, "lengths": dict(self._lengths)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`; for losses that are unknown as yet, in on_train_start.

        A checkpoint that is evaluated may be another model's, and restores nothing.
        """
        if self._evaluates:
            return
        losses, self._lengths = _parts(state_dict)
        self._restored.update(losses)
        self._restore(self._losses())

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins the sums of a step."""
        for record in self._records.values():
            record.clear()
            # On within steps only: a search for a learning rate runs without these callbacks.
            record.loss.climb.watches = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step."""
        for path, record in self._records.items():
            record.loss.climb.watches = False
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
                "CLIMB has no effect there.",
                stacklevel=2,
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restores the losses."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restores the losses."""
        was_waiting, self._is_waiting = self._is_waiting, False
        self._restored, self._evaluates = {}, False
        for record in self._records.values():
            record.loss.climb.observers.remove(record.add)
        self._records = {}
        for loss in self._losses().values():
            loss.climb.watches = True
            if was_waiting and loss.climb.schedule.needs_length:
                loss.climb.lay(None)

    def _losses(self) -> dict[str, ClimbLoss]:
        """The losses by their paths; searched anew, since hooks of the module may make some."""
        losses = {} if self._module is None else dict(find_losses(self._module))
        for loss in losses.values() if self._is_waiting else ():
            loss.climb.watches = False
            if loss.climb.schedule.needs_length:
                loss.climb.lay(0)
        return losses

    def _restore(self, losses: Mapping[str, ClimbLoss]) -> None:
        for path in [path for path in self._restored if path in losses]:
            state = self._restored.pop(path)
            losses[path].load_climb_state(state)
            if state["priors"]:
                losses[path].climb_priors.load_state_dict(state["priors"])

    def _check_restored(self, losses: Mapping[str, ClimbLoss], pl_module: Any) -> None:
        gone, self._restored = sorted(self._restored), {}
        if gone:
            message = (
                f"the checkpoint has the state of a ClimbLoss at {' and '.join(gone)}, where "
                f"{type(pl_module).__name__} has none: its losses are at "
                f"{', '.join(losses)}. Give the loss its old place, or, to go on without "
                "that state, set strict_loading = False on the LightningModule."
            )
            if getattr(pl_module, "strict_loading", True):  # since Lightning 2.2
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    if not {"losses", "lengths"} <= state.keys():
        raise ValueError(
            f"the state of a ClimbCallback has losses and lengths, got {', '.join(state)}: resume "
            "with the other version of climb-plugin that saved it, or load the weights alone."
        )
    return dict(state["losses"]), dict(state["lengths"])


class _Record:
    """Sums the terms of the calls of a loss within one training step."""

    def __init__(self, loss: ClimbLoss) -> None:
        self.loss = loss
        self.called = False
        self.clear()
        loss.climb.observers.append(self.add)

    def clear(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, terms: ClimbTerms, is_regularised: bool) -> None:
        if not torch.is_grad_enabled():  # an evaluation, in the step or elsewhere
            return
        self.called = True
        values = {"climb_base_loss": terms.base}
        if is_regularised:
            values |= {"climb_rate": terms.rate, "climb_entropy": terms.entropy}
        if is_regularised or not self.loss.climb.heads:  # without heads CLIMB is off: 0
            # Filled in on the device: a copy from the CPU would wait for the device.
            on_host = not terms.beta.is_cuda
            beta = terms.base.new_full((), float(terms.beta)) if on_host else terms.beta
            values["climb_beta"] = beta
        for name, value in values.items():
            total, calls = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.float(), calls + 1)

    def means(self) -> dict[str, Tensor]:
        """The means over the calls by name; empty without calls."""
        return {name: total / calls for name, (total, calls) in self._sums.items()}


def _in_force(path: str, loss: ClimbLoss, length: int | None) -> str:
    climb = loss.climb
    if not climb.heads:
        return f"CLIMB: {path} is off, because beta is 0: the loss is the base loss."
    over = " in" if length is None else f" over {length}"
    free = f", {climb.free_nats} nats free" if climb.free_nats else ""
    widths = ", ".join(str(head.out_features) for head in climb.heads)
    return (
        f"CLIMB: {path}: {climb.schedule!r}{over} optimiser steps, alpha {climb.alpha}, prior "
        f"{climb.prior}{free}, heads {widths} wide; rates are in nats, summed over dimensions, "
        "averaged over batch and views."
    )
