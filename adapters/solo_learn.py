"""CLIMB inside every method of solo-learn, switched by ``method_kwargs.climb_*``.

``python main_pretrain.py ... ++method_kwargs.climb_beta=0.001`` is all that a user does: Hydra
finds the plugin, which calls :func:`register`. A script without Hydra calls it by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

try:
    import solo.methods
    from solo.methods.base import BaseMethod
    from solo.methods.linear import LinearModel
    from solo.utils.auto_resumer import AutoResumer
except ImportError as error:
    raise ImportError(
        "solo-learn cannot be imported. It is on no package index; what works is: pip install "
        "'climb-plugin[solo]', git clone https://github.com/vturrisi/solo-learn, and running its "
        "scripts from the checkout (or with the checkout in PYTHONPATH)."
    ) from error

from climb_plugin.adapters.solo_backbones import adapt_to_cifar, efficientnet_b0
from climb_plugin.adapters.solo_keys import KEYS, differences, read_keys, shown
from climb_plugin.adapters.solo_method import ClimbMethod

_CIFAR = ("cifar10", "cifar100")


def register(methods: MutableMapping[str, Any] | None = None) -> None:
    """Puts CLIMB into solo-learn's methods, for this process. Calling it again is harmless.

    Without ``climb_*`` keys, or with ``climb_beta=0``, the methods stay bit-identical.

    Args:
        methods: Name -> class, changed in place; None: solo-learn's ``METHODS``, with those
            that you added.

    Examples:
        >>> register()
        >>> issubclass(solo.methods.METHODS["dino"], ClimbMethod)
        True
    """
    table: MutableMapping[str, Any] = solo.methods.METHODS if methods is None else methods
    exported = vars(solo.methods)
    for name, method in list(table.items()):
        if method is LinearModel or issubclass(method, ClimbMethod):
            continue
        table[name] = with_climb(method)
        # from solo.methods import DINO
        for alias in [key for key, value in exported.items() if value is method]:
            if method is not BaseMethod:
                exported[alias] = table[name]
    BaseMethod._BACKBONES.setdefault("efficientnet_b0", efficientnet_b0)
    if not hasattr(AutoResumer, "_climb_plugin"):
        AutoResumer._climb_plugin = True
        AutoResumer.find_checkpoint = _minding_climb(AutoResumer.find_checkpoint)
        LinearModel.add_and_assert_specific_cfg = staticmethod(
            _refusing_climb(LinearModel.add_and_assert_specific_cfg)
        )


def with_climb(method: Any) -> Any:
    """A subclass of a method that heeds ``climb_*``; the method's name stays its own."""

    def add_and_assert_specific_cfg(cfg: Any) -> Any:
        keys = read_keys(cfg)
        if keys is not None and keys.on:
            # In full, so that args.json and the logger say what was in force.
            cfg.method_kwargs.update(keys.named())
        return method.add_and_assert_specific_cfg(cfg)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(subclass, self).__init__(*args, **kwargs)
        if self.cfg.data.dataset in _CIFAR:
            adapt_to_cifar(self)

    subclass: Any = type(
        method.__name__,
        (ClimbMethod, method),
        {
            "__init__": __init__,
            "__doc__": method.__doc__,
            "__module__": __name__,
            "add_and_assert_specific_cfg": staticmethod(add_and_assert_specific_cfg),
        },
    )
    return subclass


def __getattr__(name: str) -> Any:
    """The class of a registered method by its name: what unpickling one asks for."""
    if not name.startswith("_"):
        register()
        for method in solo.methods.METHODS.values():
            if method.__name__ == name and issubclass(method, ClimbMethod):
                return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refusing_climb(add_and_assert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(cfg: Any) -> Any:
        if read_keys(cfg) is not None:
            raise ValueError(
                "climb_* keys have no effect in linear evaluation, which trains no embedding: "
                "they belong to main_pretrain.py."
            )
        return add_and_assert(cfg)

    return checked


def _minding_climb(find_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Resumes no checkpoint with other ``climb_*`` values, and says so."""

    def find(self: Any, cfg: Any) -> Any:
        plain = AutoResumer.SHOULD_MATCH
        AutoResumer.SHOULD_MATCH = [*plain, *(f"method_kwargs.{key}" for key in KEYS)]
        try:
            found = find_checkpoint(self, cfg)
        finally:
            AutoResumer.SHOULD_MATCH = plain
        other = (None, None) if found[0] else find_checkpoint(self, cfg)
        if other[0]:
            saved = json.loads((Path(other[0]).parent / "args.json").read_text())
            changed = differences(saved.get("method_kwargs"), cfg.get("method_kwargs"))
            print(f"CLIMB: starting anew, not from {other[0]}: {shown(changed)}.", flush=True)
        return found

    return find
