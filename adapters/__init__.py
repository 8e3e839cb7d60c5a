"""Adapts CLIMB to its hosts: one module per host, which imports that host alone."""

from __future__ import annotations

import sys
from typing import Any


def solo_callbacks() -> list[Any]:
    """The callback that brings CLIMB to solo-learn's methods; empty if solo-learn is not loaded.

    Lightning finds this function by an entry point and calls it for every Trainer. So nothing may
    be imported for a program that does not use solo-learn.
    """
    if "solo.methods" not in sys.modules:
        return []
    from climb_plugin.adapters.solo_learn import SoloCallback

    return [SoloCallback()]
