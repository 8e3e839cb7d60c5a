"""Tables the region in which a method trains: what becomes of each cell of a grid of trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from knn_study.records import Record
from knn_study.report import Row, described, gains, markdown, rows, spread, twin_of
from knn_study.settings import Settings
from knn_study.verdicts import untrained_of

GRID = ("mismatched", "momentum", "teacher_temperature")
"""The settings that make a cell."""
PINNED = 0.05
"""Nats: a base loss this close to ln K is that of a uniform student."""


def cells(records: Sequence[Record], *, twins: Sequence[Record] | None = None) -> str:
    """Markdown: a line for each cell and a column for each contender, then the best settings.

    A cell has collapsed if, in the mean over its seeds, the base loss is within 0.05 of ln K at the
    end ("uniform"), or the student not above the untrained network ("nothing learned").

    Args:
        records: Runs of DINO that differ in wrong pairs, momentum, teacher temperature and
            regulariser alone.
        twins: Where to look for untrained networks; by default in ``records``.
    """
    known = rows(records if twins is None else twins)
    idle = {untrained_of(r.settings): r for r in known if r.settings.regulariser == "untrained"}
    found = [row for row in rows(records) if row.settings.regulariser != "untrained"]
    contenders = list(dict.fromkeys(described(row.settings) for row in found))
    places = sorted({_place(row.settings) for row in found})
    by_cell = {(_place(row.settings), described(row.settings)): row for row in found}
    ends = {cell: _end(row, idle.get(untrained_of(row.settings))) for cell, row in by_cell.items()}
    lines = [
        [
            *(f"{value:g}" for value in place),
            *(_cell(by_cell, ends, (place, c)) for c in contenders),
        ]
        for place in places
    ]
    # Cells that not all contenders have would favour those that lack them.
    whole = [place for place in places if all((place, c) in by_cell for c in contenders)]
    if whole:
        means = {c: [mean(by_cell[p, c].validation.values()) for p in whole] for c in contenders}
        over = f"{len(whole)} cells"
        collapsed = (str(sum(bool(ends[p, c]) for p in whole)) for c in contenders)
        lines += [
            [f"mean of {over}", "", "", *(f"{mean(means[c]):.2f}" for c in contenders)],
            [f"worst of {over}", "", "", *(f"{min(means[c]):.2f}" for c in contenders)],
            [f"collapsed of {over}", "", "", *collapsed],
        ]
    head = ["wrong pairs", "momentum", "teacher temperature", *contenders]
    return "\n".join([markdown(head, lines), "", _best(found, contenders)])


def _place(settings: Settings) -> tuple[float, ...]:
    return tuple(getattr(settings, name) for name in GRID)


def _end(row: Row, untrained: Row | None) -> str:
    """How the trainings of a row collapsed; "" if not."""
    if row.base_loss and math.log(row.settings.prototypes) - PINNED < mean(row.base_loss.values()):
        return "uniform"
    over = gains(row.validation, untrained.validation if untrained else None)
    return "nothing learned" if over and mean(over) <= 0 else ""


def _cell(
    by_cell: dict[tuple[tuple[float, ...], str], Row],
    ends: dict[tuple[tuple[float, ...], str], str],
    cell: tuple[tuple[float, ...], str],
) -> str:
    if cell not in by_cell:
        return ""
    return ", ".join(filter(None, [spread(by_cell[cell].validation), ends[cell]]))


def _best(found: Sequence[Row], contenders: Sequence[str]) -> str:
    """For each share of wrong pairs, the best cell of each contender."""
    lines = []
    for wrong in sorted({row.settings.mismatched for row in found}):
        there = [row for row in found if row.settings.mismatched == wrong]
        plain = _highest([row for row in there if row.settings == twin_of(row.settings)])
        for name in contenders:
            best = _highest([row for row in there if described(row.settings) == name])
            if best is not None:
                paired = gains(best.validation, plain.validation if plain else None)
                over = f"{mean(paired):+.2f}" if paired and best is not plain else ""
                values = (f"{value:g}" for value in _place(best.settings)[1:])
                lines.append([f"{wrong:g}", name, *values, spread(best.validation), over])
    head = ["wrong pairs", "regulariser", "best momentum", "teacher temperature", "validation"]
    return markdown([*head, "over DINO's best"], lines)


def _highest(candidates: Sequence[Row]) -> Row | None:
    return max(candidates, key=lambda row: mean(row.validation.values()), default=None)
