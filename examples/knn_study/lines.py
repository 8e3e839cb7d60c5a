"""Keeps JSON lines that are whole at every moment, and names the commit that made them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


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
