"""Adds CLIMB to lightly: one changed line in a training script.

Nothing here depends on the class of a loss or of a projection head.
"""

from __future__ import annotations

from importlib.util import find_spec

from climb_plugin.wrap import unwrap, wrap

if find_spec("lightly") is None:
    raise ImportError("lightly is not installed: pip install 'climb-plugin[lightly]'")

__all__ = ["unwrap", "wrap"]
