"""Keeps what is known of stages and runs: JSON lines, whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records in a file, without lines that were cut; none if there is no such file."""
    return [json.loads(line) for line in _whole_lines(path)]


def last(records: Iterable[Record], *, dry_run: bool) -> dict[str, Record]:
    """The newest record of each stage."""
    return {one["stage"]: one for one in records if one["dry_run"] == dry_run}


def join(source: Path, target: Path) -> None:
    """Adds to ``target`` the lines of ``source`` that ``target`` lacks, in one step."""
    known = _whole_lines(target)
    lines = known + [line for line in _whole_lines(source) if line not in known]
    if lines != known:
        replace(target, "".join(f"{line}\n" for line in lines))


def replace(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def take_over(before: Path, out: Path) -> None:
    """Copies the files of a former call that ``out`` lacks; only their content, not their modes."""
    for path in sorted(before.iterdir()):
        if path.is_file() and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if _is_whole(line)]


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
