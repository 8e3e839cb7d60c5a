"""Keeps JSON lines that are whole at every moment, and names the commit and code that made them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import climb_plugin

_OF_THE_NUMBERS = ("data", "measures", "methods", "pairs", "regularisers", "settings", "training")
"""The modules of the study that a run's numbers depend on."""


def append(record: dict[str, Any], path: Path) -> None:
    """Adds a line in one write, so that several processes may: a line is there whole, or not.

    The line is on the disk when this returns; a line that a kill has cut before stays apart.
    """
    data = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def revision(checkout: Path) -> str:
    """The commit, with '+' if files differ from the commit; empty outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


@lru_cache(maxsize=1)
def code() -> str:
    """Tells versions of what makes the numbers from one another, also outside a checkout."""
    here, plugin = Path(__file__).parent, Path(climb_plugin.__file__).parent
    paths = [here / f"{name}.py" for name in _OF_THE_NUMBERS]
    digest = hashlib.sha256()
    walk = os.walk(plugin, followlinks=True)  # rglob would leave linked folders out
    found = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    for path in [*paths, *(path for path in found if path.suffix == ".py")]:
        folder = here if here in path.parents else plugin
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
