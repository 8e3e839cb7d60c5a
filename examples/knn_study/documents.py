"""Renews the tables and plots of a report in Markdown from the stored runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knn_study import options
from knn_study.candidates import candidates
from knn_study.cells import cells
from knn_study.plots import curves, differences, draw, region
from knn_study.records import Record, read, settings_of
from knn_study.report import choices, details, table
from knn_study.verdicts import verdicts
from knn_study.where import where

_TABLE = re.compile(
    r"(<!-- (table|choices|verdicts|details|cells|candidates|where): (.+?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
_OF_ANYONE = {"table": table, "choices": choices, "verdicts": verdicts}
_OF_THE_STUDENT = {"cells": cells, "candidates": candidates, "where": where}
_PLOT = re.compile(r"<!-- (plot|curves|differences|region): (\S+) (.+?) -->")
_ALONE = {"curves": curves, "region": region}
_OVER_PLAIN = {"plot": draw, "differences": differences}


def rewritten(path: Path) -> str:
    """A report in Markdown with its tables made anew.

    Between ``<!-- table: FILE OPTIONS -->`` and ``<!-- end -->`` stands the table of the runs in
    FILE, a path from the report, whose settings are among those of OPTIONS, or of one of several
    OPTIONS between semicolons; ``--who teacher`` or ``--who embedding`` in front takes that
    accuracy. ``choices``, ``verdicts``, ``details``, ``cells``, ``candidates`` and ``where`` in
    place of ``table`` make the tables of those names.
    """

    def renewed(match: re.Match[str]) -> str:
        chosen, twins, who = _chosen(path.parent, match[3])
        if match[2] in _OF_ANYONE:
            made = _OF_ANYONE[match[2]](chosen, who=who, twins=twins)
        elif who != "student":
            raise ValueError(f"{match[2]} are of the student: leave --who {who} away")
        elif match[2] == "details":
            made = details(chosen)
        else:
            made = _OF_THE_STUDENT[match[2]](chosen, twins=twins)
        return f"{match[1]}{made}\n{match[4]}"

    return _TABLE.sub(renewed, path.read_text())


def rewrite(path: Path) -> None:
    """Makes the tables of a report anew, and draws the PNG of each ``<!-- plot: PNG FILE ... -->``.

    ``curves`` in place of ``plot`` draws the accuracy over epochs, ``differences`` those to plain
    with their intervals, ``region`` the accuracy in each cell of a grid.

    Raises:
        OSError: If one of the files is not there.
        ValueError: If a line of one is no record, or an option is none.
    """
    text = rewritten(path)
    for kind, target, words in _PLOT.findall(text):
        chosen, twins, who = _chosen(path.parent, words)
        if kind in _ALONE:
            _ALONE[kind](chosen, path.parent / target, who=who)
        else:
            _OVER_PLAIN[kind](chosen, path.parent / target, who=who, twins=twins)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _chosen(folder: Path, words: str) -> tuple[list[Record], list[Record], str]:
    """The runs to show, all runs of the file, and whose accuracy."""
    file, *rest = shlex.split(words)
    who = "student"
    if rest[:1] == ["--who"]:
        who, rest = rest[1], rest[2:]
    if not (folder / file).exists():
        raise FileNotFoundError(f"{folder / file} is not there")
    known = read(folder / file)
    wanted = [one for part in " ".join(rest).split(";") for one in options.parse(part.split())]
    return matching(known, wanted), known, who


def matching(records: Sequence[Record], wanted: Sequence[dict[str, Any]]) -> list[Record]:
    """The records that have all the values of one of ``wanted``."""
    return [
        record
        for record, known in ((record, asdict(settings_of(record))) for record in records)
        if any(all(known[name] == value for name, value in one.items()) for one in wanted)
    ]
