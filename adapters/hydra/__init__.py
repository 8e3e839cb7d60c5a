"""How Hydra finds climb-plugin.

Every Hydra program imports this module, so it imports nothing but Hydra's base class.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hydra.plugins.search_path_plugin import SearchPathPlugin

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath


class ClimbPlugin(SearchPathPlugin):  # type: ignore[misc]
    """Tells solo-learn what a config may name, where a script has imported solo-learn.

    The search path of configs stays as it is; Hydra asks for it after the script's imports and
    before its main function, which is the moment for it. CLIMB itself comes with the Trainer.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Registers, in a program that uses solo-learn."""
        if "solo.methods" in sys.modules:
            from climb_plugin.adapters.solo_learn import register

            register()
