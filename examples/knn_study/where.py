"""Tables where a difference to plain sits: in features or embedding, with few labels, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from knn_study.records import Record, settings_of
from knn_study.report import (
    described,
    failures,
    gains,
    in_common,
    markdown,
    named,
    paragraph,
    rows,
    texts,
    twin_of,
)
from knn_study.settings import Settings
from knn_study.verdicts import with_interval


def where(records: Sequence[Record], *, twins: Sequence[Record] | None = None) -> str:
    """Markdown: a line for each setting with a regulariser, a column for each measured accuracy.

    All are k-NN accuracies on the validation images after the last epoch: of the features of
    student and teacher and of the embedding; of the student with few labels, and of corrupted
    queries. A cell is the paired mean over plain with its 95 % interval by Student's t, not
    corrected for the number of cells.

    Args:
        records: What to show.
        twins: Where to look for plain twins; by default in ``records``.
    """
    shown = [
        row.settings
        for row in rows(records)
        if row.settings.regulariser not in ("plain", "untrained")
    ]
    known = _accuracies(records if twins is None else twins)
    measures = list(dict.fromkeys(name for s in shown for name in known.get(s, {})))
    _, varying = in_common(shown)
    lines = []
    for settings in shown:
        own, plain = known.get(settings, {}), known.get(twin_of(settings), {})
        paired = [gains(own.get(name, {}), plain.get(name)) for name in measures]
        seeds = str(max(map(len, paired), default=0))
        cells = map(with_interval, paired)
        lines.append([*texts(settings, varying), described(settings), seeds, *cells])
    head = [*map(named, varying), "regulariser", "seeds", *measures]
    return "\n".join([markdown(head, lines), *paragraph(failures(records))])


def _accuracies(records: Sequence[Record]) -> dict[Settings, dict[str, dict[int, float]]]:
    """By setting, measure and seed, in per cent."""
    found: dict[Settings, dict[str, dict[int, float]]] = {}
    for record in records:
        if record.get("error"):
            continue
        settings = settings_of(record)
        measures = found.setdefault(replace(settings, seed=0), {})
        last = {name: values[-1] for name, values in record["validation"].items()}
        for name, value in {**last, **record.get("robustness", {})}.items():
            measures.setdefault(name, {})[settings.seed] = value
    return found
