"""The packages of Lightning, and a Trainer that says and saves nothing."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
LIGHTNINGS = [module for package, module in PACKAGES.items() if find_spec(package) is not None]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
