"""Registers climb-plugin with solo-learn at the start of a Hydra program.

Every Hydra program imports this module; so nothing but Hydra's base class is imported here.
"""

from __future__ import annotations

import sys
from typing import Any

from hydra.plugins.search_path_plugin import SearchPathPlugin


class ClimbPlugin(SearchPathPlugin):  # type: ignore[misc]
    """Registers names for configs, in a script that has imported solo-learn.

    The search path of configs stays unchanged. Hydra asks for it after the script's imports and
    before the main function: solo-learn is there, and no method is built. CLIMB itself comes with
    the Trainer.
    """

    def manipulate_search_path(self, search_path: Any) -> None:
        """Registers, in a program that uses solo-learn."""
        if "solo.methods" in sys.modules:
            from climb_plugin.adapters.solo_learn import register

            register()
