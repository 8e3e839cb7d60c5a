"""Finds the living objects of a kind through the garbage collector; slow, not for every step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any

from torch import nn


def living(chosen: Callable[[type], bool]) -> list[Any]:
    """All objects of this process whose type is chosen, but those that gc.freeze() hides."""
    objects = gc.get_objects()
    # Types, not isinstance, which asks objects for their __class__ and so runs a proxy's code.
    kinds = {kind for kind in set(map(type, objects)) if chosen(kind)}
    return list(compress(objects, map(kinds.__contains__, map(type, objects))))


def are_elsewhere(parts: Mapping[nn.Module, nn.Module], *, but_slices: bool) -> bool:
    """Whether a module outside of one of these modules has the part of that as a layer, too.

    Args:
        parts: The part of each module.
        but_slices: Without modules that have nothing but layers of that module, as a slice has.
    """
    if not _outside(parts, but_slices):
        return False
    gc.collect()  # so that the answer does not hang on garbage
    return _outside(parts, but_slices)


def _outside(parts: Mapping[nn.Module, nn.Module], but_slices: bool) -> bool:
    modules = living(lambda kind: issubclass(kind, nn.Module))
    own = [(part, set(module.modules())) for module, part in parts.items()]
    return any(
        part is child and other not in modules_of_its_own
        for other in modules
        if "_modules" in vars(other)  # else one that is half built
        for child in other.children()
        for part, modules_of_its_own in own
        if not (but_slices and modules_of_its_own.issuperset(other.children()))
    )
