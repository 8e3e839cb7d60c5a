"""One module per host; each imports its host, and only its host."""

from __future__ import annotations

import sys
from typing import Any


def solo_callbacks() -> list[Any]:
    """The callback that brings CLIMB to solo-learn's methods; empty where that is not loaded.

    Lightning finds this function by an entry point and calls it for every Trainer, so it imports
    nothing for a program that has nothing to do with solo-learn.
    """
    if "solo.methods" not in sys.modules:
        return []
    from climb_plugin.adapters.solo_learn import SoloCallback

    return [SoloCallback()]
