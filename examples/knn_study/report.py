"""Tables and plots of runs: means and spreads over seeds, and the gain over the plain twin."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from knn_study import options
from knn_study.records import Record, read, settings_of
from knn_study.settings import REGULARISATION, Settings

_DEFAULTS = Settings()
_PLAIN = {name: getattr(_DEFAULTS, name) for name in REGULARISATION}


@dataclass
class Row:
    """The runs that differ in their seed alone; per seed, in per cent and nats."""

    settings: Settings
    validation: dict[int, float] = field(default_factory=dict)
    test: dict[int, float] = field(default_factory=dict)
    rate: dict[int, float] = field(default_factory=dict)

    @property
    def twin(self) -> Settings:
        """The same without a regulariser."""
        return replace(self.settings, **_PLAIN)


def rows(records: Sequence[Record], *, who: str = "student") -> list[Row]:
    """One for each setting, in an order to read them in.

    Args:
        records: As :func:`records.read` gives them.
        who: Whose features: "student", or "teacher" for the methods that have one.
    """
    found: dict[Settings, Row] = {}
    for record in records:
        if who not in record["test"] or record.get("error"):
            continue
        settings = settings_of(record)
        key = replace(settings, seed=0)
        row = found.setdefault(key, Row(key))
        row.validation[settings.seed] = record["validation"][who][-1]
        row.test[settings.seed] = record["test"][who]
        if record["rate"]:
            row.rate[settings.seed] = record["rate"][-1]
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
    is not larger than its spread, the standard deviation over seeds, is called none.

    Args:
        records: What to show.
        who: Whose features.
        twins: Where to look for plain twins; by default in ``records``.
    """
    found = rows(records, who=who)
    if not found:
        return f"No runs with a {who}."
    by_settings = _by_settings(records if twins is None else twins, who)
    common, varying = _common(found)
    head = [
        *map(_named, varying),
        "regulariser",
        "seeds",
        "validation",
        "gain",
        "test",
        "gain",
        "rate (nats)",
    ]
    lines = [head, ["---"] * len(head)]
    for row in found:
        twin = by_settings.get(row.twin) if row.settings != row.twin else None
        lines.append(
            [
                *(_text(getattr(row.settings, name)) for name in varying),
                described(row.settings),
                str(len(row.test)),
                _spread(row.validation),
                _gain(row.validation, twin.validation if twin else None),
                _spread(row.test),
                _gain(row.test, twin.test if twin else None),
                _spread(row.rate),
            ]
        )
    seconds = median(record["seconds"] for record in records)
    below = ", ".join(f"{_named(name)} {_text(value)}" for name, value in common.items())
    of_all = [
        f"k-NN accuracy of the {who} in per cent, mean ± standard deviation over seeds; {below}.",
        *_failures(records),
        f"{len(records)} runs, median {seconds:.0f} s; {_listed(records)}.",
    ]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *of_all])


def _failures(records: Sequence[Record]) -> Iterator[str]:
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
            words.append("fixed std" if name == "fixed_std" else f"{_named(name)} {_text(value)}")
    return ", ".join(words)


def _named(name: str) -> str:
    return name.replace("_", " ")


def _common(found: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the training that all rows share, and the names of the others."""
    names = [e.name for e in fields(Settings) if e.name not in (*REGULARISATION, "seed", "every")]
    values = {name: {getattr(row.settings, name) for row in found} for name in names}
    varying = [name for name in names if len(values[name]) > 1]
    # Of several methods, not all have the setting: it says nothing about those.
    return {name: values[name].pop() for name in names if name not in varying}, varying


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spread(values: dict[int, float]) -> str:
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


# ---- Plot ----------------------------------------------------------------------------------------


def draw(
    records: Sequence[Record],
    path: Path,
    *,
    who: str = "student",
    twins: Sequence[Record] | None = None,
) -> None:
    """The gain on the validation images over beta, a panel for each method, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = rows(records, who=who)
    by_settings = _by_settings(records if twins is None else twins, who)
    methods = sorted({row.settings.method for row in found})
    figure, axes = plt.subplots(
        1, len(methods), figsize=(4.5 * len(methods), 3.6), sharey=True, squeeze=False
    )
    for axis, method in zip(axes[0], methods, strict=True):
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for row in found:
            twin = by_settings.get(row.twin)
            if row.settings.method != method or not row.settings.beta or twin is None:
                continue
            paired = gains(row.validation, twin.validation)
            if paired:
                label = described(replace(row.settings, beta=1.0)).replace(", beta 1", "")
                curves.setdefault(label, []).append((row.settings.beta, paired))
        for label, points in curves.items():
            points.sort()
            axis.errorbar(
                [beta for beta, _ in points],
                [mean(paired) for _, paired in points],
                [stdev(paired) if len(paired) > 1 else 0.0 for _, paired in points],
                marker="o",
                markersize=4,
                capsize=3,
                label=label,
            )
        axis.axhline(0, color="0.6", linewidth=1, zorder=0)
        axis.set(xscale="log", xlabel="beta", title=method)
        if curves:
            axis.legend(fontsize="x-small")
    axes[0][0].set_ylabel("gain in validation k-NN (points)")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


# ---- Reports -------------------------------------------------------------------------------------

_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_PLOT = re.compile(r"<!-- plot: (\S+) (.+?) -->")


def rewritten(path: Path) -> str:
    """A report in Markdown with its tables made anew.

    Between ``<!-- table: FILE OPTIONS -->`` and ``<!-- end -->`` stands the table of the runs in
    FILE, a path from the report, whose settings are among those of OPTIONS, or of one of several
    OPTIONS between semicolons; ``--who teacher`` in front takes the teacher's accuracy.
    """

    def renewed(match: re.Match[str]) -> str:
        chosen, twins, who = _chosen(path.parent, match[2])
        return f"{match[1]}{table(chosen, who=who, twins=twins)}\n{match[3]}"

    return _TABLE.sub(renewed, path.read_text())


def rewrite(path: Path) -> None:
    """Makes the tables of a report anew, and draws the PNG of each ``<!-- plot: PNG FILE ... -->``.

    Raises:
        OSError: If one of the files is not there.
        ValueError: If a line of one is no record, or an option is none.
    """
    text = rewritten(path)
    for target, words in _PLOT.findall(text):
        chosen, twins, who = _chosen(path.parent, words)
        draw(chosen, path.parent / target, who=who, twins=twins)
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
