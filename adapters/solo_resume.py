"""Checkpoints of solo-learn runs with CLIMB: what changed, what is missing, how to go on."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from climb_plugin.adapters.solo_keys import differences, shown


def warn_of_changes(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Warns where the ``climb_*`` values of a checkpoint are not those of the run.

    Args:
        saved: The checkpoint's; None: it was trained without CLIMB.
        now: The run's; None: CLIMB is off.

    Raises:
        ValueError: If the checkpoint's parameters do not fit the run.
    """
    changed = differences(saved, now)
    if not changed:
        return
    if saved is None:
        beta = changed["climb_beta"][1]
        print(
            f"CLIMB: this checkpoint was trained without it; climb_beta={beta} from here on.",
            flush=True,
        )
        return
    learned = "learned" in changed.get("climb_prior", ())
    if now is None or "climb_at" in changed or learned:
        raise ValueError(
            f"this checkpoint cannot be resumed: {shown(changed)}, so its parameters are not "
            "those of this run. Use the values of the checkpoint, or start anew."
        )
    warnings.warn(f"this checkpoint goes on with other values: {shown(changed)}.", stacklevel=2)


def adopt(
    state: Mapping[str, Any], own: Mapping[str, Any], prefixes: tuple[str, ...]
) -> Mapping[str, Any]:
    """``state`` with what it lacks of the keys that CLIMB adds; says so in one line.

    Args:
        state: The state dict to be loaded.
        own: That of the model.
        prefixes: How the keys begin that CLIMB adds.
    """
    missing = {
        key: value for key, value in own.items() if key.startswith(prefixes) and key not in state
    }
    if not missing:
        return state
    print(f"CLIMB: not in the checkpoint, as initialised: {', '.join(missing)}.", flush=True)
    full = OrderedDict({**state, **missing})
    # Versions of the layers, which torch hangs on the dictionary.
    full._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return full


def grow(checkpoint: dict[str, Any], configured: Any, new: Sequence[nn.Parameter]) -> None:
    """Makes the optimiser state of a run without CLIMB fit an optimiser that has ``new`` too.

    Args:
        checkpoint: A Lightning checkpoint, changed in place.
        configured: What ``configure_optimizers`` returned.
        new: The parameters that the checkpoint does not know.
    """
    optimizers = configured[0] if isinstance(configured, tuple) else [configured]
    ids = {id(parameter) for parameter in new}
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        known = iter([index for group in state["param_groups"] for index in group["params"]])
        moved: dict[int, int] = {}
        place = 0
        for number, group in enumerate(optimizer.param_groups):
            if all(id(parameter) in ids for parameter in group["params"]):
                # Where the schedule has brought the first group by now.
                own = {key: group[key] for key in ("name", "weight_decay")}
                settings = {**state["param_groups"][0], **own}
                state["param_groups"].insert(number, settings)
                for scheduler in checkpoint["lr_schedulers"]:
                    scheduler["base_lrs"].insert(number, group["initial_lr"])
                    scheduler["_last_lr"].insert(number, settings["lr"])
            indices = []
            for parameter in group["params"]:
                if id(parameter) not in ids:
                    moved[next(known)] = place
                indices.append(place)
                place += 1
            state["param_groups"][number]["params"] = indices
        state["state"] = {moved[index]: value for index, value in state["state"].items()}


def without_code(checkpoint: dict[str, Any]) -> None:
    """Takes functions out of the schedulers' state, in place.

    Where a part of the model has a constant learning rate, solo-learn replaces a method of the
    scheduler, which torch would then save, and refuse to load since 2.6. A new scheduler has
    its own.

    Args:
        checkpoint: A Lightning checkpoint.
    """
    checkpoint["lr_schedulers"] = [
        {key: value for key, value in state.items() if not callable(value)}
        for state in checkpoint.get("lr_schedulers", [])
    ]


def freeze_host(model: Any) -> dict[str, Any]:
    """What solo-learn does not save: random numbers and the momentum's coefficient."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (str(kind), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "python": (version, internal, gauss_next),
        "tau": _updater_tau(model),
    }


def thaw_host(model: Any, state: Mapping[str, Any]) -> None:
    """Restores what :func:`freeze_host` returned."""
    torch.set_rng_state(_on_cpu(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_on_cpu(state["cuda"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if state["tau"] is not None and _updater_tau(model) is not None:
        model.momentum_updater.cur_tau = state["tau"]


def _updater_tau(model: Any) -> float | None:
    tau = getattr(getattr(model, "momentum_updater", None), "cur_tau", None)
    return None if tau is None else float(tau)


def _on_cpu(state: Tensor) -> Tensor:
    return state.cpu()
