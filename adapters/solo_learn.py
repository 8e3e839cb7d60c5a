"""Adds CLIMB to the solo-learn method of a Trainer, switched by ``method_kwargs.climb_*``.

A user sets these keys and no more: Lightning adds :class:`SoloCallback` to every Trainer.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from climb_plugin.adapters.find import find_losses
from climb_plugin.adapters.solo_config import DEFAULTS, make_schedule, read_keys, settings
from climb_plugin.adapters.solo_config import register as register
from climb_plugin.adapters.solo_resume import ResumingCallback
from climb_plugin.attach import NAME
from climb_plugin.loss import ClimbLoss
from climb_plugin.schedule import Schedule
from climb_plugin.wrap import wrapped


class SoloCallback(ResumingCallback):
    """Puts CLIMB into the method that the Trainer sets up, if its config has ``climb_*`` keys.

    The head goes into the method's ``projector`` or ``head`` (and into the momentum twin) before
    the optimisers are made and before a checkpoint is loaded, in every process. While the method is
    trained, ``training_step`` returns the loss with the bottleneck; ``method.climb`` is the
    ClimbLoss. Without the keys, or with ``climb_beta=0``, the method stays unchanged.

    Raises:
        TypeError: As :func:`read_keys`, when a Trainer sets the method up.
        ValueError: Likewise; if CLIMB cannot act in the method; if a checkpoint that is resumed has
            other ``climb_*`` values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._acts = False  # until a Trainer is set up, of which this is the first such callback
        self._keys: dict[str, Any] = {}
        self._undo = ExitStack()

    @property
    def state_key(self) -> str:
        """The place in a checkpoint.

        Lightning extends the list of callbacks that the user gave. So the next Trainer that gets
        the same list has one of these callbacks more, and demands another key for it.
        """
        name = type(self).__qualname__
        return name if self._acts else f"{name}, idle, {id(self)}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the head in, and wraps the functions that the training calls."""
        self._keys = {}
        self._acts = next(c for c in trainer.callbacks if isinstance(c, SoloCallback)) is self
        if not self._acts:
            return
        self._keys = read_keys(_config_of(pl_module))
        _put_in(pl_module, self._keys, trained=stage == "fit")
        if stage == "fit":
            self._wrap(pl_module, "on_load_checkpoint", self._check_checkpoint)
        if self._on and stage == "fit":
            if trainer.global_step == 0:
                pl_module.climb.schedule = make_schedule(self._keys)
                pl_module.climb.climb.begin()
            self._wrap(pl_module, "training_step", _with_bottleneck)
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints a line if CLIMB is off."""
        if self._on:
            super().on_fit_start(trainer, pl_module)
        elif self._keys and trainer.is_global_zero:
            print("CLIMB: off, because climb_beta=0: the method is solo-learn's own.", flush=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Goes on from a resumed checkpoint, over the length of that checkpoint's training."""
        if not self._on:
            return
        try:
            super().on_train_start(trainer, pl_module)
            schedule, total = pl_module.climb.schedule, trainer.estimated_stepping_batches
            # With a warm-up in steps that is longer than the training, beta would never arrive.
            is_whole = 0 <= total < math.inf and not trainer.fast_dev_run
            if is_whole and not schedule.needs_length:
                schedule.over(int(total))
        except ValueError as error:
            raise ValueError(f"climb_warmup={self._keys['climb_warmup']}: {error}") from error

    def named(self, schedule: Schedule) -> str:
        """The key that a schedule comes from."""
        return f"climb_warmup={self._keys['climb_warmup']}"

    def state_dict(self) -> dict[str, Any]:
        """The keys in force, the length of the training, and the state of the loss."""
        return {"keys": self._keys, **super().state_dict()} if self._on else {}

    def __getstate__(self) -> dict[str, Any]:
        # The method refers to this callback; a saved or copied one is not to be undone.
        return {**self.__dict__, "_undo": ExitStack()}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restores the method's own functions."""
        self._undo.close()
        super().teardown(trainer, pl_module, stage)

    @property
    def _on(self) -> bool:
        return bool(self._keys and self._keys["climb_beta"])

    def _wrap(self, module: Any, name: str, wrapper: Callable[..., Any]) -> None:
        inner, own = getattr(module, name), vars(module)  # of whichever class
        if isinstance(inner, functools.partial) and inner.func.__name__ == wrapper.__name__:
            inner = own[name] = inner.args[1]  # of a copy that was made within a training
        self._undo.callback(own.update, {name: own[name]} if name in own else {})
        self._undo.callback(own.pop, name)  # undone in reverse
        own[name] = functools.wraps(inner)(functools.partial(wrapper, module, inner))

    def _check_checkpoint(self, module: Any, inner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume a run with other ``climb_*`` values."""
        if "optimizer_states" not in checkpoint:  # weights alone, which Lightning refuses
            inner(checkpoint)
            return
        saved = checkpoint.get("callbacks", {}).get(type(self).__qualname__, {}).get("keys", {})
        now = self._keys if self._on else {}
        changed = {
            key: f"{key} was {saved.get(key)} and is {now.get(key)}"
            for key in DEFAULTS
            if saved.get(key) != now.get(key)
        }
        if now and not saved:
            _start_from_weights(module, checkpoint)
        elif changed.keys() == {"climb_init_std"}:
            said = f"{changed['climb_init_std']}: no effect, as the head is the checkpoint's."
            warnings.warn(said, stacklevel=2)
        elif changed:
            raise ValueError(
                f"this checkpoint cannot be resumed: {', '.join(changed.values())}. Take its "
                "values, or start anew: without resume_from_checkpoint, and with another name=, "
                "which is part of what auto_resume compares."
            )
        self.resume_from(checkpoint if now else {})
        inner(checkpoint)


def _config_of(module: Any) -> Any:
    """The config of a method; other LightningModules may use our names as they like."""
    for config in (getattr(module, "cfg", None), module.hparams):
        if isinstance(config, Mapping) and "method" in config:
            # A method of solo-learn has learnable_params; its config may lack method_kwargs.
            is_method = hasattr(type(module), "learnable_params")
            return config if is_method or "method_kwargs" in config else None
    return None


def _put_in(module: Any, keys: Mapping[str, Any], *, trained: bool) -> None:
    """Makes ``module.climb``, the loss whose head is in the method's projection head."""
    own = vars(module)  # by setattr the loss would become a submodule
    if "climb" in own and "climb_keys" in own and not _is_within(own["climb"], module):
        del own["climb"], own["climb_keys"]  # unwrapped, or of a projector that was replaced
    if own.get("climb_keys", keys) != keys:
        raise ValueError(f"this model was set up with {own['climb_keys']}: build it anew.")
    if not keys or not keys["climb_beta"]:
        return
    if trained and not module.automatic_optimization:
        raise ValueError(
            f"climb_beta has no effect in {type(module).__name__}, which optimises by itself "
            "(automatic_optimization=False): drop the climb_* keys, and put a ClimbLoss where it "
            "makes its loss."
        )
    if "climb_keys" not in own:
        own.update(climb=_make_loss(module, keys), climb_keys=dict(keys))


def _is_within(loss: ClimbLoss, module: nn.Module) -> bool:
    return {*loss.heads} <= {*module.modules()}


def _make_loss(module: Any, keys: Mapping[str, Any]) -> ClimbLoss:
    method = type(module).__name__
    taken = [f"a ClimbLoss of its own, {path}" for path, _ in find_losses(module)]
    taken += ["an attribute climb of its own"] * hasattr(module, "climb")
    if taken:
        raise ValueError(f"{method} has {taken[0]}: drop the climb_* keys, or it.")
    names = [n for n in ("projector", "head") if isinstance(getattr(module, n, None), nn.Module)]
    if not names:
        raise ValueError(
            f"climb_beta has nothing to act on in {method}: it has neither a projector nor a head "
            "(module). Drop the climb_* keys or choose another method."
        )
    student = getattr(module, names[0])
    # Momentum updates pair parameters one to one, so the twin needs the same ones.
    twins = [twin for online, twin in getattr(module, "momentum_pairs", ()) if online is student]
    teacher = twins[0] if twins else getattr(module, f"momentum_{names[0]}", None)
    options = settings(keys, make_schedule(keys))
    try:
        loss = wrapped(nn.Identity(), options, student=student, teacher=teacher, check_base=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"climb_beta cannot act on {method}.{names[0]}: {error}") from error
    _hold_priors(loss, student, teacher)
    return loss


def _hold_priors(loss: ClimbLoss, student: nn.Module, teacher: nn.Module | None) -> None:
    """Makes a learned prior a part of its head, so that the head's optimiser has the prior too."""
    paths = {module: path for path, module in student.named_modules()}
    for head, prior in zip(loss.heads, loss.climb_priors, strict=True):
        if any(True for _ in prior.parameters()):
            head.add_module("climb_prior", prior)
            if teacher is not None:
                twin = copy.deepcopy(prior).requires_grad_(False)
                teacher.get_submodule(paths[head]).add_module("climb_prior", twin)


def _with_bottleneck(module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The method's training step, with the bottleneck added to the loss."""
    outcome = inner(*args, **kwargs)
    value = outcome.get("loss") if isinstance(outcome, Mapping) else outcome
    if value is None:  # Lightning skips such a batch, or complains
        return outcome
    loss: ClimbLoss = module.climb
    try:
        total = loss(value)
    except ValueError as error:
        if not any(prior.compares_views for prior in loss.climb_priors):
            raise
        said = str(error).split(". ")[0]
        raise ValueError(
            f"climb_prior={loss.prior!r} in {type(module).__name__}: {said}. If this method does "
            "not compare the views of an image, set climb_prior to 'standard' or 'learned'."
        ) from error
    return {**outcome, "loss": total} if isinstance(outcome, Mapping) else total


def _start_from_weights(module: Any, checkpoint: dict[str, Any]) -> None:
    """Strips a checkpoint without CLIMB down to the weights."""
    for key, value in module.state_dict().items():
        if f".{NAME}." in key:
            checkpoint["state_dict"].setdefault(key, value)
    checkpoint.update(optimizer_states=[], lr_schedulers=[], callbacks={}, loops=None)
    said = "CLIMB: a checkpoint without it: its weights are taken, and the training begins at "
    print(f"{said}step 0.", flush=True)
