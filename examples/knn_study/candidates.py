"""Chooses for each share of wrong pairs the cell of CLIMB to confirm, and decides on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from knn_study.cells import GRID, Cell, gathered, highest
from knn_study.records import Record
from knn_study.report import Row, gains, markdown, named, spread, texts, unlike
from knn_study.settings import Settings
from knn_study.verdicts import (
    CHOOSING,
    CONFIRMING,
    LEVEL,
    holm,
    of_seeds,
    p_text,
    p_value,
    with_interval,
)


def candidates(records: Sequence[Record], *, twins: Sequence[Record] | None = None) -> str:
    """Markdown: a line for each share of wrong pairs; they are one family.

    Seeds 0 to 2 choose. DINO's best is plain's cell with the highest mean that has not collapsed.
    A cell of CLIMB is a candidate if none of its runs has collapsed, and its mean is above DINO's
    best and above the noise's. That with the highest mean is confirmed on seeds 3 to 10: it beats
    DINO if its paired mean over DINO's best is above 0, with p < 0.05 by the two-sided t-test after
    Holm's correction over the shares, those without a candidate too. The intervals are those of
    single lines.

    Args:
        records: As for :func:`cells.cells`, of all seeds.
        twins: Where to look for untrained networks; by default in ``records``.

    Raises:
        ValueError: If the runs differ in more than the cell and the regulariser.
    """
    found = list(gathered(records, twins=twins).values())
    shares = [
        _Share([cell for cell in found if cell.place[0] == wrong])
        for wrong in sorted({cell.place[0] for cell in found})
    ]
    p_values = holm([p_value(share.over_best) for share in shares])
    lines = [
        [
            *texts(share.cells[0].row.settings, ["mismatched"]),
            *map(_told, (share.best, share.noise, share.candidate)),
            str(len(share.over_best)),
            with_interval(share.over_best),
            p_text(p),
            share.verdict(p),
        ]
        for share, p in zip(shares, p_values, strict=True)
    ]
    head = ["wrong pairs", "DINO's best", "the noise's best", "candidate"]
    return markdown([*head, "seeds", "over DINO's best", "p (Holm)", "verdict"], lines)


class _Share:
    """The cells of a share of wrong pairs: what the choosing seeds chose, and how it ended."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.best = highest(self._choosing("plain"))
        self.noise = highest(self._choosing("noise"))
        top = highest(cell for cell in self._choosing("climb") if not cell.collapsed)
        rivals = [rival.mean for rival in (self.best, self.noise) if rival]
        self.candidate = top if top and all(top.mean > rival for rival in rivals) else None
        self.row, self.rival = self._confirming(self.candidate), self._confirming(self.best)
        self.over_best = gains(self.row.validation, self.rival.validation)

    def verdict(self, p: float | None) -> str:
        """By the p over DINO's best."""
        if not self._is_whole():
            return "open: runs that choose are missing"
        if self.candidate is None:
            return "no candidate"
        if self.best is None:
            return "open: no cell of plain trains"
        if self.row.failed:
            return f"none: seed {min(self.row.failed)} diverged"
        if self.rival.failed:
            return f"open: DINO's best diverged with seed {min(self.rival.failed)}"
        if p is None:
            return f"open: fewer than {len(CONFIRMING)} seeds"
        if unlike(self.row, self.rival):
            return "open: DINO's best has other code or images"
        if p >= 1 - LEVEL:
            return "none"
        return "beats DINO" if mean(self.over_best) > 0 else "loss"

    def _choosing(self, regulariser: str) -> list[Cell]:
        of_it = (cell for cell in self.cells if cell.row.settings.regulariser == regulariser)
        return [replace(cell, row=of_seeds(cell.row, CHOOSING)) for cell in of_it]

    def _confirming(self, chosen: Cell | None) -> Row:
        if chosen is None:
            return Row(Settings())
        settings = chosen.row.settings
        (whole,) = (cell.row for cell in self.cells if cell.row.settings == settings)
        return of_seeds(whole, CONFIRMING)

    def _is_whole(self) -> bool:
        """Each contender in each place, with each seed."""
        there = {
            (cell.place, cell.contender, seed)
            for cell in self.cells
            for seed in cell.accuracy.keys() & CHOOSING
        }
        places = {cell.place for cell in self.cells}
        contenders = {cell.contender for cell in self.cells}
        return len(there) == len(places) * len(contenders) * len(CHOOSING)


def _told(cell: Cell | None) -> str:
    """What the cell is within its share, and its mean."""
    if cell is None:
        return "none"
    settings = cell.row.settings
    names = GRID[1:]
    values = zip(map(named, names), texts(settings, names), strict=True)
    words = ", ".join([cell.contender, *(f"{name} {value}" for name, value in values)])
    return f"{words}: {spread(cell.accuracy)}"
