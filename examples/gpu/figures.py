"""Reads results out of a log: tables in Markdown, pytest's counts, and what was not checked."""

from __future__ import annotations

import re
from typing import Any

Table = list[dict[str, str]]


def figures(text: str) -> dict[str, Any]:
    """What a log says; a key is left out if the log has nothing of the kind."""
    found: dict[str, Any] = {
        "tests": counts(text),
        "failed": _starting(text, r"(?:FAILED|ERROR) (.*)"),
        "not_checked": _starting(text, r"(?:SKIPPED \[\d+\]|Not run:) (.*)"),
        "tables": tables(text),
    }
    return {name: value for name, value in found.items() if value}


def counts(text: str) -> dict[str, int]:
    """Of pytest's last line, such as '3 passed, 1 skipped in 0.12s'."""
    lines = re.findall(r"^=* ?(\d+ [a-z]+(?:, \d+ [a-z]+)* in [\d.]+s.*)$", text, flags=re.M)
    said = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    return {word: int(number) for number, word in said}


def tables(text: str) -> dict[str, Table]:
    """The tables in Markdown, by the line before each; a later one replaces one of that title."""
    found: dict[str, Table] = {}
    title = ""
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            title = line.strip() or title
        elif not header:
            header = _cells(line)
            found[title] = []
        elif set(line) - set("|-: "):
            found[title].append(dict(zip(header, _cells(line), strict=False)))
    return found


def ending(text: str, lines: int = 3) -> str:
    """The last lines that say something, joined."""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(said[-lines:])[-600:]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _starting(text: str, pattern: str) -> list[str]:
    return re.findall(f"^{pattern}$", text, flags=re.M)
