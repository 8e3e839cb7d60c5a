"""Tables the region in which a method trains: what becomes of each cell of a grid of trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from knn_study.records import Record
from knn_study.report import (
    Row,
    below,
    described,
    failures,
    gains,
    markdown,
    rows,
    spread,
)
from knn_study.verdicts import untrained, untrained_of

GRID = ("mismatched", "momentum", "teacher_temperature")
"""The settings that make a cell."""
PINNED = 0.05
"""Nats: a base loss this close to ln K is that of a student whose answer is uniform."""

Place = tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """The runs of a contender in a cell, and the accuracy of the untrained networks by seed."""

    row: Row
    untrained: Mapping[int, float]

    @property
    def place(self) -> Place:
        """The values of ``GRID``."""
        return tuple(getattr(self.row.settings, name) for name in GRID)

    @property
    def contender(self) -> str:
        """Its regulariser."""
        return described(self.row.settings)

    @property
    def accuracy(self) -> dict[int, float]:
        """By seed; that of the untrained network if the run diverged."""
        return {**self.row.validation, **{seed: self.untrained[seed] for seed in self._diverged}}

    @property
    def collapsed(self) -> set[int]:
        """The seeds that diverged or are not above the untrained network."""
        values = self.row.validation.items()
        return self._diverged | {s for s, v in values if v <= self.untrained.get(s, -math.inf)}

    @property
    def uniform(self) -> set[int]:
        """The seeds whose base loss is that of a uniform answer."""
        log_k = math.log(self.row.settings.prototypes)
        return {s for s, loss in self.row.base_loss.items() if abs(loss - log_k) <= PINNED}

    @property
    def has_collapsed(self) -> bool:
        """With most of its seeds."""
        return 2 * len(self.collapsed) > len(self.accuracy)

    @property
    def mean(self) -> float:
        """Of the accuracy, over seeds."""
        return mean(self.accuracy.values())

    @property
    def _diverged(self) -> set[int]:
        return self.row.failed & self.untrained.keys()

    def __str__(self) -> str:
        marks = (("collapsed", self.collapsed), ("uniform", self.uniform))
        said = [f"{word} {len(seeds)} of {len(self.accuracy)}" for word, seeds in marks if seeds]
        return ", ".join([spread(self.accuracy), *said])


def gathered(
    records: Sequence[Record], *, twins: Sequence[Record] | None = None
) -> dict[tuple[Place, str], Cell]:
    """The cells by place and contender; see :func:`cells`."""
    idle = untrained(rows(records if twins is None else twins))
    found: dict[tuple[Place, str], Cell] = {}
    for row in rows(records):
        if row.settings.regulariser != "untrained":
            cell = Cell(row, idle.get(untrained_of(row.settings), {}))
            if found.setdefault((cell.place, cell.contender), cell) is not cell:
                raise ValueError(
                    f"{cell.contender} is twice in the cell {', '.join(map(str, cell.place))} of "
                    f"{', '.join(GRID)}: choose runs that differ in these and the regulariser alone"
                )
    return found


def cells(records: Sequence[Record], *, twins: Sequence[Record] | None = None) -> str:
    """Markdown: a line for each cell and a column for each contender, then the best cells.

    A run has collapsed if it diverged, or its student is not above the untrained network of its
    seed; a cell, if most of its runs have. A base loss within 0.05 of ln K ("uniform") decides
    nothing: a regulariser moves that loss by itself, and so do wrong pairs.

    Args:
        records: Runs of DINO that differ in wrong pairs, momentum, teacher temperature and
            regulariser alone.
        twins: Where to look for untrained networks; by default in ``records``.

    Raises:
        ValueError: If the runs differ in something else.
    """
    by_cell = gathered(records, twins=twins)
    places = sorted({place for place, _ in by_cell})
    contenders = list(dict.fromkeys(contender for _, contender in by_cell))
    lines = [
        [
            *(f"{value:g}" for value in place),
            *(str(by_cell.get((place, c), "")) for c in contenders),
        ]
        for place in places
    ]
    lines += _summary(by_cell, places, contenders)
    head = ["wrong pairs", "momentum", "teacher temperature", *contenders]
    best = _best(list(by_cell.values()), contenders)
    ends = below(records, [*failures(records)], who="student")
    return "\n".join([markdown(head, lines), "", best, "", *ends])


def _summary(
    by_cell: Mapping[tuple[Place, str], Cell], places: Sequence[Place], contenders: Sequence[str]
) -> list[list[str]]:
    """Of the cells that all contenders have with all seeds: others would favour who lacks them."""
    seeds = {seed for cell in by_cell.values() for seed in cell.accuracy}
    whole = [
        place
        for place in places
        if all(
            (place, c) in by_cell and by_cell[place, c].accuracy.keys() == seeds for c in contenders
        )
    ]
    if not whole:
        return []
    columns = [[by_cell[place, contender] for place in whole] for contender in contenders]
    means = [[mean(cell.accuracy.values()) for cell in column] for column in columns]
    over = f"{len(whole)} cells"
    return [
        [f"mean of {over}", "", "", *(f"{mean(values):.2f}" for values in means)],
        [f"worst of {over}", "", "", *(f"{min(values):.2f}" for values in means)],
        [
            f"collapsed of {over}",
            "",
            "",
            *(str(sum(cell.has_collapsed for cell in column)) for column in columns),
        ],
    ]


def _best(found: Sequence[Cell], contenders: Sequence[str]) -> str:
    """For each share of wrong pairs, each contender's best cell that has not collapsed."""
    lines = []
    for wrong in sorted({cell.place[0] for cell in found}):
        best = {
            name: highest(
                cell for cell in found if (cell.place[0], cell.contender) == (wrong, name)
            )
            for name in contenders
        }
        plain = best.get("plain")
        for cell in filter(None, best.values()):
            paired = gains(cell.accuracy, plain.accuracy if plain else None)
            over = f"{mean(paired):+.2f}" if paired and cell is not plain else ""
            values = (f"{value:g}" for value in cell.place[1:])
            lines.append([f"{wrong:g}", cell.contender, *values, spread(cell.accuracy), over])
    head = ["wrong pairs", "regulariser", "best momentum", "teacher temperature", "validation"]
    return markdown([*head, "over DINO's best"], lines)


def highest(found: Iterable[Cell]) -> Cell | None:
    """The cell with the highest mean of those that have not collapsed."""
    trained = [cell for cell in found if cell.accuracy and not cell.has_collapsed]
    return max(trained, key=lambda cell: cell.mean, default=None)
