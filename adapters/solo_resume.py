"""What solo-learn's checkpoints lack: random numbers, and where the momentum's update stands."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def freeze(module: Any) -> dict[str, Any]:
    """What :func:`thaw` takes, in numbers and tensors that torch loads as such."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    updater = getattr(module, "momentum_updater", None)
    return {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "python": (version, internal, gauss_next),
        "tau": getattr(updater, "cur_tau", None),
    }


def thaw(module: Any, state: Mapping[str, Any], *, step: int) -> None:
    """Goes on with the random numbers and the momentum of a checkpoint at optimiser step ``step``.

    solo-learn counts its momentum updates from 0 again, so the first batch would do one too many.
    """
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if state["tau"] is not None and hasattr(module, "momentum_updater"):
        module.momentum_updater.cur_tau = state["tau"]
        module.last_step = step
