"""Tables and plots of runs: means and spreads over seeds, and the gain over the plain twin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import mean, median, stdev
from typing import Any

from knn_study.records import Record, settings_of
from knn_study.settings import REGULARISATION, Settings

_DEFAULTS = Settings()
_PLAIN = {name: getattr(_DEFAULTS, name) for name in REGULARISATION}


@dataclass
class Row:
    """The runs that differ in their seed alone; per seed, in per cent and nats."""

    settings: Settings
    validation: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)  # validation, of all epochs measured
    test: dict[int, float] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)
    base_loss: dict[int, float] = field(default_factory=dict)
    made: dict[int, tuple[str, ...]] = field(default_factory=dict)  # by data, code, torch
    failed: set[int] = field(default_factory=set)  # seeds


def twin_of(settings: Settings) -> Settings:
    """The same without a regulariser."""
    return replace(settings, **_PLAIN)


def unlike(row: Row, twin: Row) -> int:
    """The seeds whose two runs were made by other code or images."""
    return sum(made != twin.made.get(seed, made) for seed, made in row.made.items())


def rows(records: Sequence[Record], *, who: str = "student") -> list[Row]:
    """One for each setting, in an order to read them in.

    Args:
        records: As :func:`records.read` gives them.
        who: Whose features: "student", or "teacher" for the methods that have one.

    Raises:
        ValueError: If a run is there twice.
    """
    found: dict[Settings, Row] = {}
    for record in records:
        if who not in record["test"] and not record.get("error"):
            continue
        settings = settings_of(record)
        key, seed = replace(settings, seed=0), settings.seed
        row = found.setdefault(key, Row(key))
        if seed in row.validation or seed in row.failed:
            raise ValueError(f"there are two lines of {record['name']}: remove one of them")
        if record.get("error"):
            row.failed.add(seed)
            continue
        row.validation[seed] = record["validation"][who][-1]
        row.best[seed] = max(record["validation"][who])
        row.test[seed] = record["test"][who]
        row.made[seed] = (
            record.get("data", ""),
            record.get("code", ""),
            record["versions"].get("torch", ""),
        )
        if losses := record.get("base_loss"):
            row.base_loss[seed] = losses[-1]
        if record["rate"]:
            row.rate[seed] = record["rate"][-1]
    return sorted(found.values(), key=_order)


def _by_settings(records: Sequence[Record], who: str) -> dict[Settings, Row]:
    return {row.settings: row for row in rows(records, who=who)}


def _order(row: Row) -> tuple[Any, ...]:
    """By training, then regulariser, then its settings, beta last; as the choices are listed."""
    places = {}
    for entry in fields(row.settings):
        value, choices = getattr(row.settings, entry.name), entry.metadata["choices"]
        places[entry.name] = choices.index(value) if choices else value
    training = [place for name, place in places.items() if name not in REGULARISATION]
    regularisation = [places[name] for name in REGULARISATION if name != "beta"]
    return (*training, *regularisation, places["beta"])


def table(
    records: Sequence[Record], *, who: str = "student", twins: Sequence[Record] | None = None
) -> str:
    """Markdown: a line for each setting; what all have in common stands below.

    A gain is that of runs over their plain twins: the same seed, images, order and views. One that
    is not larger than its spread, the standard deviation over seeds, is called none. The best epoch
    is that of each seed on the validation images: early stopping, which knows them.

    Args:
        records: What to show.
        who: Whose features.
        twins: Where to look for plain twins; by default in ``records``.
    """
    return _table(records, who, twins, measures=("validation", "best", "test"))


def choices(
    records: Sequence[Record], *, who: str = "student", twins: Sequence[Record] | None = None
) -> str:
    """The same without the test images, which choose nothing."""
    return _table(records, who, twins, measures=("validation", "best"))


def _table(
    records: Sequence[Record],
    who: str,
    twins: Sequence[Record] | None,
    *,
    measures: tuple[str, ...],
) -> str:
    found = rows(records, who=who)
    if not found:
        return f"No runs with a {who}."
    by_settings = _by_settings(records if twins is None else twins, who)
    _, varying = in_common([row.settings for row in found])
    heads = {"validation": ["validation", "gain"], "best": ["best epoch"], "test": ["test", "gain"]}
    shown = [word for name in measures for word in heads[name]]
    head = [*map(named, varying), "regulariser", "seeds", *shown, "base loss", "rate (nats)"]
    lines, others = [], 0
    for row in found:
        plain = twin_of(row.settings)
        twin = by_settings.get(plain) if row.settings != plain else None
        if twin:
            others += unlike(row, twin)
        cells = []
        for name in measures:
            cells.append(spread(getattr(row, name)))
            if name != "best":
                cells.append(_gain(getattr(row, name), getattr(twin, name) if twin else None))
        seeds, ends = str(len(row.test)), [spread(row.base_loss), spread(row.rate)]
        lines.append([*texts(row.settings, varying), described(row.settings), seeds, *cells, *ends])
    said = [*failures(records)]
    said += [f"Runs with a twin of other code or images: {others}."] if others else []
    return "\n".join([markdown(head, lines), "", *below(records, said, who=who)])


def below(records: Sequence[Record], said: Sequence[str], *, who: str) -> list[str]:
    """The lines below a table: what its numbers are, what is to be ``said``, hours and versions."""
    common, _ = in_common([row.settings for row in rows(records, who=who)])
    seconds = [record["seconds"] for record in records]
    shared = ", ".join(f"{named(name)} {_text(value)}" for name, value in common.items())
    return [
        f"k-NN accuracy of the {who} in per cent, mean ± standard deviation over seeds; {shared}.",
        *said,
        f"{len(records)} runs, {sum(seconds) / 3600:.1f} hours in all, "
        f"median {median(seconds):.0f} s; {_listed(records)}.",
    ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def details(records: Sequence[Record]) -> str:
    """Markdown: a line for each setting with what else the last epoch measured, means over seeds.

    That is of the student's features, and of the pairs of the training. DINO's base loss, a cross
    entropy between views, is taken apart, in nats: how far the student stays behind the teacher
    (less the entropy of the teacher's rows: a KL divergence), and how much the student's answer to
    one view tells of the teacher's target for the other (the entropy of the mean target, less the
    loss: a lower bound of the mutual information; Barber and Agakov, 2003).
    """
    found: dict[Settings, dict[str, list[float]]] = {}
    seeds: Counter[Settings] = Counter()
    for record in sorted(records, key=lambda record: _order(Row(settings_of(record)))):
        if not record.get("error"):
            key = replace(settings_of(record), seed=0)
            seeds[key] += 1
            measured = found.setdefault(key, {})
            pairs = {name: values[-1] for name, values in record.get("pairs", {}).items()}
            pairs.update(_parts_of_the_loss(record, pairs))
            for name, value in {**record.get("robustness", {}), **pairs}.items():
                measured.setdefault(name, []).append(value)
    names = list(dict.fromkeys(name for measured in found.values() for name in measured))
    _, varying = in_common(list(found))
    lines = [
        [
            *texts(settings, varying),
            described(settings),
            str(seeds[settings]),
            *(f"{mean(measured[name]):.2f}" if name in measured else "" for name in names),
        ]
        for settings, measured in found.items()
    ]
    head = [*map(named, varying), "regulariser", "seeds", *names]
    return "\n".join([markdown(head, lines), *paragraph(failures(records))])


def _parts_of_the_loss(record: Record, pairs: dict[str, float]) -> dict[str, float]:
    if "teacher entropy of rows" not in pairs:
        return {}
    loss, log_k = record["base_loss"][-1], math.log(settings_of(record).prototypes)
    return {
        "student behind the teacher": loss - log_k * pairs["teacher entropy of rows"],
        "shared by the views": log_k * pairs["teacher entropy of the mean"] - loss,
    }


def paragraph(sentences: Iterable[str]) -> list[str]:
    """The lines of a paragraph below a table; none without a sentence."""
    found = list(sentences)
    return ["", *found] if found else []


def failures(records: Sequence[Record]) -> Iterator[str]:
    """A sentence for each run that did not end well."""
    for record in records:
        if record.get("error"):
            settings = settings_of(record)
            yield (
                f"Not in the table: {settings.method}, {described(settings)}, seed "
                f"{settings.seed}, which ended with {record['error']}"
            )


def described(settings: Settings) -> str:
    """A regulariser and what is not at its default."""
    words = [settings.regulariser]
    for name in REGULARISATION[1:]:
        value = getattr(settings, name)
        if value != _PLAIN[name]:
            words.append("fixed std" if name == "fixed_std" else f"{named(name)} {_text(value)}")
    return ", ".join(words)


def texts(settings: Settings, names: Sequence[str]) -> list[str]:
    """The values of some settings."""
    return [_text(getattr(settings, name)) for name in names]


def named(name: str) -> str:
    return name.replace("_", " ")


def in_common(found: Sequence[Settings]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the training that all share, and the names of the others."""
    names = [e.name for e in fields(Settings) if e.name not in (*REGULARISATION, "seed", "every")]
    values = {name: {getattr(settings, name) for settings in found} for name in names}
    varying = [name for name in names if len(values[name]) > 1]
    # Of several methods, not all have the setting: it says nothing about those.
    return {name: values[name].pop() for name in names if len(values[name]) == 1}, varying


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(values: dict[int, float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    several = f" ± {stdev(values.values()):.2f}" if len(values) > 1 else ""
    return f"{mean(values.values()):.2f}{several}"


def gains(values: dict[int, float], twin: dict[int, float] | None) -> list[float]:
    """The differences to the plain run of the same seed, where there is one."""
    return [values[seed] - twin[seed] for seed in sorted(values) if twin and seed in twin]


def _gain(values: dict[int, float], twin: dict[int, float] | None) -> str:
    paired = gains(values, twin)
    if not paired:
        return ""
    if len(paired) == 1:
        return f"{paired[0]:+.2f}"
    centre, spread = mean(paired), stdev(paired)
    verdict = ": none" if abs(centre) <= spread else ""
    return f"{centre:+.2f} ± {spread:.2f}{verdict}"


def _listed(records: Sequence[Record]) -> str:
    """Versions, revisions and machines."""
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            versions.setdefault(name, set()).add(version)
        versions.setdefault("revision", set()).add(record["revision"] or "unknown")
        versions.setdefault("on", set()).add(record["device"])
    return "; ".join(f"{name} {', '.join(sorted(seen))}" for name, seen in versions.items())
