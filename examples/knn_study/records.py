"""One JSON line for each finished run."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from knn_study.lines import revision
from knn_study.settings import Settings
from knn_study.training import Measured

Record = dict[str, Any]


def make_record(
    settings: Settings, measured: Measured, *, preset: str, device: str, data: str, error: str = ""
) -> Record:
    """What is known of a run; ``data`` is the fingerprint, ``error`` why it did not end well."""
    return {
        "name": settings.name,
        "preset": preset,
        "settings": asdict(settings),
        **asdict(measured),
        "data": data,
        "error": error,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("climb-plugin", "torch", "lightly", "kornia")},
        },
        "revision": revision(Path(__file__).parent),
    }


def read(path: Path) -> list[Record]:
    """The records in a file, in their order; none if it is not there.

    Raises:
        ValueError: If a line is no record; it says which.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            record = json.loads(line)
            Settings(**record["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {path} is no record of this script ({error}): remove that line"
            ) from error
        records.append(record)
    return records


def settings_of(record: Record) -> Settings:
    """The settings of a run; those that are newer than the record have their defaults."""
    known = {entry.name for entry in fields(Settings)}
    return Settings(**{name: v for name, v in record["settings"].items() if name in known})


def _processor() -> str:
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads a run"
