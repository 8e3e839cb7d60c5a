"""Saves the random numbers and the momentum, which solo-learn's checkpoints lack."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from climb_plugin.adapters.lightning import ClimbCallback

_KEY = "climb_host"


class ResumingCallback(ClimbCallback):
    """A callback whose checkpoints let a method of solo-learn go on to the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._host: Mapping[str, Any] | None = None

    @property
    def _on(self) -> bool:
        """Whether CLIMB acts in the method."""
        return False

    def resume_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Keeps the host's state of a checkpoint until the training goes on."""
        self._host = checkpoint.get(_KEY)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Adds the state that solo-learn needs and does not save, if CLIMB is on."""
        if self._on:
            checkpoint[_KEY] = freeze(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Restores that state until the first batch: Lightning first ends the saved epoch again."""
        if self._host is not None:
            thaw(pl_module, self._host, step=trainer.global_step)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drops that state: from here on the numbers are the training's own."""
        self._host = None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def freeze(module: Any) -> dict[str, Any]:
    """The state for :func:`thaw`, in numbers and tensors, which torch loads as such."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
        "tau": getattr(getattr(module, "momentum_updater", None), "cur_tau", None),
    }


def thaw(module: Any, state: Mapping[str, Any], *, step: int) -> None:
    """Goes on with the random numbers and the momentum of a checkpoint at optimiser step ``step``.

    solo-learn counts momentum updates from 0 again, so the first batch would do one too many.
    """
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(state["numpy"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if state["tau"] is not None and hasattr(module, "momentum_updater"):
        module.momentum_updater.cur_tau = state["tau"]
        module.last_step = step
