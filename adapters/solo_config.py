"""Prepares solo-learn before a method is built: keys, a backbone, auto_resume."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from climb_plugin.affine import LOGVARS
from climb_plugin.checks import checked_number
from climb_plugin.prior import PRIORS
from climb_plugin.schedule import SHAPES, Constant, Exponential, Ramp, Schedule, TargetRate
from climb_plugin.settings import PLACES, Settings

CHOICES = {
    "climb_prior": [*PRIORS],
    "climb_at": [*PLACES],
    "climb_schedule": ["constant", *SHAPES],
    "climb_logvar": [*LOGVARS],
}
DEFAULTS: Mapping[str, Any] = {
    "climb_beta": 0.0,
    "climb_alpha": Settings.alpha,
    "climb_prior": Settings.prior,
    "climb_at": Settings.at,
    "climb_warmup": 0,
    "climb_schedule": "constant",
    "climb_target_rate": None,
    "climb_free_nats": Settings.free_nats,
    "climb_init_std": Settings.init_std,
    "climb_logvar": Settings.logvar,
}
"""All keys; the documentation explains each."""


def read_keys(config: Any) -> dict[str, Any]:
    """The ``climb_*`` keys of a solo-learn config, checked, and the defaults of those not given.

    Returns:
        An empty dict if no key is given. A key that is null counts as not given.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a key is unknown, in another section than ``method_kwargs`` or without effect
            beside the others, or a value is out of range.
    """
    given: dict[str, Any] = {}
    plain = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    for section, key in _climb_keys(plain):
        (nearest,) = get_close_matches(key.lower(), DEFAULTS, n=1, cutoff=0)
        if section != "method_kwargs.":
            raise ValueError(f"{section}{key} has no effect: write method_kwargs.{nearest}.")
        if key not in DEFAULTS:
            raise ValueError(
                f"method_kwargs.{key} is no key of climb-plugin: did you mean {nearest}? There "
                f"are {', '.join(DEFAULTS)}."
            )
        given[key] = config["method_kwargs"][key]  # not from plain: this resolves interpolations
    given = {key: value for key, value in given.items() if value is not None}
    if given and "climb_beta" not in given:
        raise ValueError(f"{', '.join(given)}: no effect without climb_beta, for example 0.001.")
    if given.get("climb_warmup"):
        given.setdefault("climb_schedule", "linear")
    return _checked({**DEFAULTS, **given}) if given else {}


def _climb_keys(node: Any, section: str = "") -> Iterator[tuple[str, str]]:
    """Section and name of each key that is one of ours, or seems to be meant as one."""
    items = node.items() if isinstance(node, Mapping) else ()
    for key, value in enumerate(node) if isinstance(node, list) else items:
        name = str(key).lower()
        # Under method_kwargs nothing else begins so; other sections have climbers and climbs.
        is_ours = name.startswith("climb" if section == "method_kwargs." else "climb_")
        if is_ours or get_close_matches(name, DEFAULTS, cutoff=0.85):
            yield section, str(key)
        yield from _climb_keys(value, f"{section}{key}.")


def _checked(keys: dict[str, Any]) -> dict[str, Any]:
    for key, choices in CHOICES.items():
        if keys[key] not in choices:
            raise ValueError(f"{key} must be one of {choices}, got {keys[key]!r}.")
    target, free = keys["climb_target_rate"], keys["climb_free_nats"]
    warmup, shape = keys["climb_warmup"], keys["climb_schedule"]
    with _naming_the_key():
        # A beta of 0 is fine, but some schedules refuse one: check them with 1.
        beta = checked_number("beta", keys["climb_beta"]) or 1.0
        settings(keys, Constant(beta))
        if target is not None and checked_number("target_rate", target) <= free:
            raise ValueError(f"target_rate must be above climb_free_nats={free}, got {target}.")
    if (warmup == 0) != (shape == "constant") or (warmup and target is not None):
        raise ValueError(
            f"climb_warmup={warmup!r}, climb_schedule={shape!r} and climb_target_rate={target} do "
            "not fit: a ramp needs a warm-up, and a constant or an adapted beta would ignore it."
        )
    make_schedule({**keys, "climb_beta": beta})
    return keys


def settings(keys: Mapping[str, Any], schedule: Schedule) -> Settings:
    """The options that the keys stand for."""
    names = ("alpha", "prior", "at", "free_nats", "init_std", "logvar")
    return Settings(beta=schedule, **{name: keys[f"climb_{name}"] for name in names})


def make_schedule(keys: Mapping[str, Any]) -> Schedule:
    """Beta over the optimiser steps; a fraction still needs the length of the training."""
    beta, shape = keys["climb_beta"], keys["climb_schedule"]
    with _naming_the_key():
        if keys["climb_target_rate"] is not None:
            return TargetRate(keys["climb_target_rate"], beta=beta)
        if shape == "constant":
            return Constant(beta)
        ramp = Exponential if shape == "exponential" else Ramp
        return ramp(beta, warmup=keys["climb_warmup"], shape=shape)


@contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:  # the message begins with the argument's name
        raise type(error)(f"climb_{error}") from error


def register(methods: object = None) -> None:
    """Gives solo-learn, for this process, CLIMB's names for configs; Hydra's plugin calls this.

    These are the backbone ``efficientnet_b0``; an ``auto_resume`` that compares ``climb_*`` values;
    an error of :func:`read_keys` as soon as a method is built. CLIMB itself needs none of them.

    Args:
        methods: Not used: ``METHODS`` is left alone.
    """
    from solo.methods.base import BaseMethod
    from solo.methods.linear import LinearModel
    from solo.utils.auto_resumer import AutoResumer

    BaseMethod._BACKBONES.setdefault("efficientnet_b0", efficientnet_b0)
    compared = [f"method_kwargs.{key}" for key in DEFAULTS]
    AutoResumer.SHOULD_MATCH += [key for key in compared if key not in AutoResumer.SHOULD_MATCH]
    for kind in (BaseMethod, LinearModel):
        if not hasattr(kind.add_and_assert_specific_cfg, "__wrapped__"):
            checked = functools.partial(_checked_config, kind, kind.add_and_assert_specific_cfg)
            functools.update_wrapper(checked, kind.add_and_assert_specific_cfg)
            kind.add_and_assert_specific_cfg = staticmethod(checked)


def _checked_config(kind: Any, inner: Callable[[Any], Any], cfg: Any) -> Any:
    """The config from which solo-learn builds a method; a wrong key raises here."""
    if read_keys(cfg) and not hasattr(kind, "learnable_params"):
        raise ValueError(f"climb_* keys have no effect in {kind.__name__}: it trains no embedding.")
    cfg = inner(cfg)
    if cfg.backbone.name == "efficientnet_b0" and cfg.data.dataset in ("cifar10", "cifar100"):
        cfg.backbone.kwargs.setdefault("stem_stride", 1)  # as solo-learn does for ResNet
    return cfg


class Stem(nn.Conv2d):
    """A first convolution that saves its stride in the checkpoint, for ``main_linear.py``."""

    def get_extra_state(self) -> Tensor:
        """The stride."""
        return torch.tensor(self.stride)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the stride of the checkpoint."""
        self.stride = tuple(state.tolist())


def efficientnet_b0(method: str, *, stem_stride: int = 2, **kwargs: Any) -> Any:
    """EfficientNet-B0 of timm without its classifier, for solo-learn's table of backbones.

    Args:
        method: Name of the method, which makes no difference here.
        stem_stride: Stride of the first convolution; 1 for small images.
        **kwargs: Passed on to timm, such as ``drop_path_rate``.
    """
    import timm

    backbone: Any = timm.create_model("efficientnet_b0", num_classes=0, **kwargs)
    plain = backbone.conv_stem
    shape = plain.in_channels, plain.out_channels, plain.kernel_size
    stem = nn.utils.skip_init(Stem, *shape, stem_stride, plain.padding, bias=False)
    stem.load_state_dict(plain.state_dict(), strict=False)
    backbone.conv_stem = stem
    return backbone
