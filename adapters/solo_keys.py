"""The ``method_kwargs.climb_*`` keys of a solo-learn config; imports no host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from climb_plugin.attach import PLACES
from climb_plugin.prior import PRIORS
from climb_plugin.schedule import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Ramp,
    Schedule,
    TargetRate,
    checked_number,
)

PREFIX = "climb_"
RAMPS: Mapping[str, type[Ramp]] = {"linear": Linear, "cosine": Cosine, "exponential": Exponential}
SCHEDULES = ("constant", *RAMPS)


@dataclass(frozen=True)
class Keys:
    """What the ``climb_*`` keys of a run say; the field ``beta`` is the key ``climb_beta``.

    Attributes:
        beta: Weight of the rate, in units of the method's loss per nat. 0: CLIMB is off.
        alpha: Weight of the conditional entropy beside the rate.
        prior: ``"standard"``, ``"learned"`` or ``"view"``.
        at: ``"projection"`` or ``"features"``.
        warmup: Length of the ramp: an int is a number of optimiser steps, a float a fraction of
            the training.
        schedule: ``"constant"``, or the shape of the ramp.
        target_rate: Nats; beta is then adapted, from climb_beta on, until this is the rate.
        free_nats: Nats of rate per sample that cost nothing.
        init_std: Standard deviation at the start, in units of the embedding.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or a key would have no effect beside the others.
    """

    beta: float
    alpha: float = 0.0
    prior: str = "standard"
    at: str = "projection"
    warmup: int | float = 0
    schedule: str = "constant"
    target_rate: float | None = None
    free_nats: float = 0.0
    init_std: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta", "alpha", "free_nats", "init_std"):
            checked_number(PREFIX + name, getattr(self, name))
        if self.init_std == 0:
            raise ValueError("climb_init_std must be above 0, got 0.")
        for name, names in (("prior", PRIORS), ("at", PLACES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in names:
                raise ValueError(
                    f"{PREFIX}{name} must be one of {', '.join(map(repr, names))}, got "
                    f"{getattr(self, name)!r}."
                )
        if (self.warmup == 0) != (self.schedule == "constant"):
            raise ValueError(
                f"climb_warmup={self.warmup} and climb_schedule={self.schedule!r} do not fit: a "
                "ramp needs a warm-up, and a constant beta would ignore it."
            )
        if self.target_rate is not None:
            if checked_number("climb_target_rate", self.target_rate) == 0:
                raise ValueError("climb_target_rate must be above 0 nats, got 0.")
            if self.schedule != "constant":
                raise ValueError(
                    f"climb_target_rate={self.target_rate} adapts beta by itself and would ignore "
                    f"climb_warmup={self.warmup} and climb_schedule={self.schedule!r}: drop these."
                )
        if self.beta:
            self.make_schedule()

    @property
    def on(self) -> bool:
        """Whether anything is to be done at all."""
        return self.beta > 0

    def make_schedule(self) -> Schedule:
        """Beta over the optimiser steps; a fraction still wants the length of the training."""
        if self.target_rate is not None:
            return TargetRate(self.target_rate, beta=self.beta)
        if self.schedule == "constant":
            return Constant(self.beta)
        return RAMPS[self.schedule](self.beta, warmup=self.warmup)

    def named(self) -> dict[str, Any]:
        """The keys and the values that are in force, defaults included."""
        return {PREFIX + name: value for name, value in asdict(self).items()}


KEYS = tuple(Keys(beta=0.0).named())
"""All keys there are."""


def read_keys(config: Mapping[str, Any]) -> Keys | None:
    """What the ``climb_*`` keys of a solo-learn config say.

    Args:
        config: The whole config; the keys are expected under ``method_kwargs``.

    Returns:
        None if there is no such key. A key that is null counts as absent.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is unknown or would have no effect, or a value is out of range.
    """
    for key in config:
        if _ours(key):
            raise ValueError(f"{key} has no effect here: write method_kwargs.{key}.")
    section: Mapping[str, Any] = config.get("method_kwargs") or {}
    given = {key: section[key] for key in section if _ours(key) and section[key] is not None}
    if not given:
        return None
    for key in given:
        if key not in KEYS:
            nearest = get_close_matches(key, KEYS, n=1, cutoff=0)[0]
            raise ValueError(
                f"method_kwargs.{key} is no key of climb-plugin: did you mean {nearest}? There "
                f"are {', '.join(KEYS)}."
            )
    if "climb_beta" not in given:
        raise ValueError(
            f"method_kwargs.{next(iter(given))} has no effect without climb_beta: set "
            "method_kwargs.climb_beta, for example to 0.001."
        )
    if "climb_warmup" in given:
        given.setdefault("climb_schedule", "linear" if given["climb_warmup"] else "constant")
    return Keys(**{key.removeprefix(PREFIX): value for key, value in given.items()})


def differences(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> dict[str, tuple[Any, Any]]:
    """Which keys have other values: key -> (saved, now); None where a key is absent."""
    saved, now = saved or {}, now or {}
    return {
        key: (saved.get(key), now.get(key))
        for key in sorted({*saved, *now})
        if _ours(key) and saved.get(key) != now.get(key)
    }


def shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What :func:`differences` returned, for a message."""
    return ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in changed.items())


def _ours(key: object) -> bool:
    return isinstance(key, str) and key.lower().startswith("climb")
