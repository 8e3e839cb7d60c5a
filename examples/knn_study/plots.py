"""Draws gains over beta, differences to plain, and accuracy over the epochs and in a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from knn_study.records import Record, settings_of
from knn_study.report import described, gains, in_common, named, rows, texts, twin_of
from knn_study.verdicts import interval


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
    by_settings = {row.settings: row for row in rows(records if twins is None else twins, who=who)}
    methods = sorted({row.settings.method for row in found})
    figure, axes = plt.subplots(
        1, len(methods), figsize=(4.5 * len(methods), 3.6), sharey=True, squeeze=False
    )
    for axis, method in zip(axes[0], methods, strict=True):
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for row in found:
            twin = by_settings.get(twin_of(row.settings))
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


def differences(
    records: Sequence[Record],
    path: Path,
    *,
    who: str = "student",
    twins: Sequence[Record] | None = None,
) -> None:
    """Validation accuracy minus that of the plain twin: seeds, mean and its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [
        row
        for row in rows(records, who=who)
        if row.settings.regulariser not in ("plain", "untrained")
    ]
    by_settings = {row.settings: row for row in rows(records if twins is None else twins, who=who)}
    _, varying = in_common([row.settings for row in found])
    figure, axis = plt.subplots(figsize=(6, 1.2 + 0.45 * len(found)))
    labels = []
    for place, row in enumerate(found):
        values = texts(row.settings, varying)
        words = [f"{named(n)} {value}" for n, value in zip(varying, values, strict=True)]
        labels.append(", ".join([described(row.settings), *words]))
        twin = by_settings.get(twin_of(row.settings))
        paired = gains(row.validation, twin.validation if twin else None)
        axis.plot(paired, [place] * len(paired), "o", color="0.3", markersize=3, zorder=3)
        if len(paired) > 1:
            axis.hlines(place, *interval(paired), color="C0", linewidth=2)
            axis.plot(mean(paired), place, "D", color="C0", markersize=6)
    axis.axvline(0, color="0.5", linewidth=1, zorder=0)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(f"k-NN of the {who}, validation: points over plain")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def curves(records: Sequence[Record], path: Path, *, who: str = "student") -> None:
    """The validation accuracy of each setting over its epochs, mean and range over seeds.

    The untrained network, which has one epoch, is a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found: dict[str, dict[int, list[float]]] = {}
    untrained: dict[str, list[float]] = {}
    for record in records:
        settings = settings_of(record)
        values = record["validation"].get(who, [])
        if record.get("error") or not values:
            continue
        if settings.regulariser == "untrained":
            untrained.setdefault(settings.method, []).append(values[-1])
            continue
        wrong = f", {settings.mismatched:.0%} wrong pairs" if settings.mismatched else ""
        points = found.setdefault(f"{settings.method}, {described(settings)}{wrong}", {})
        for epoch, value in zip(record["epoch"], values, strict=True):
            points.setdefault(epoch, []).append(value)
    figure, axis = plt.subplots(figsize=(6, 4))
    for label, points in sorted(found.items()):
        epochs = sorted(points)
        axis.plot(epochs, [mean(points[e]) for e in epochs], marker="o", markersize=3, label=label)
        low, high = ([limit(points[e]) for e in epochs] for limit in (min, max))
        axis.fill_between(epochs, low, high, alpha=0.15)
    for method, values in sorted(untrained.items()):
        axis.axhline(mean(values), linestyle="--", color="0.5", linewidth=1)
        axis.annotate(
            f"{method}, untrained", (0.02, mean(values)), xycoords=("axes fraction", "data")
        )
    axis.set(xlabel="epoch", ylabel=f"k-NN of the {who}, validation (%)")
    axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def region(records: Sequence[Record], path: Path, *, who: str = "student") -> None:
    """The validation accuracy over teacher momentum: mean and range over seeds.

    A panel for each share of wrong pairs (across) and teacher temperature (down). The untrained
    network is a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = rows(records, who=who)
    trained = [row for row in found if row.settings.regulariser != "untrained" and row.validation]
    idle = [row for row in found if row.settings.regulariser == "untrained"]
    untrained = [value for row in idle for value in row.validation.values()]
    shares = sorted({row.settings.mismatched for row in trained})
    temperatures = sorted({row.settings.teacher_temperature for row in trained})
    momenta = sorted({row.settings.momentum for row in trained})
    contenders = list(dict.fromkeys(described(row.settings) for row in trained))
    size = (1 + 3 * len(shares), 1 + 2.5 * len(temperatures))
    figure, axes = plt.subplots(
        len(temperatures), len(shares), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for row in trained:
        own = row.settings
        axis = axes[temperatures.index(own.teacher_temperature)][shares.index(own.mismatched)]
        place = contenders.index(described(own))
        values = row.validation.values()
        x = momenta.index(own.momentum) + 0.12 * (place - (len(contenders) - 1) / 2)
        axis.vlines(x, min(values), max(values), color=f"C{place}", linewidth=2)
        axis.plot(x, mean(values), "o", color=f"C{place}", markersize=4)
        axis.set_xticks(range(len(momenta)), [f"{value:g}" for value in momenta])
    for temperature, across in zip(temperatures, axes, strict=True):
        across[0].set_ylabel(f"teacher temperature {temperature:g}")
        for share, axis in zip(shares, across, strict=True):
            if untrained:
                axis.axhline(mean(untrained), linestyle="--", color="0.5", linewidth=1)
            axis.set_title(f"{share:.0%} wrong pairs", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("teacher momentum")
    handles = [
        plt.Line2D([], [], color=f"C{place}", marker="o", markersize=4, label=label)
        for place, label in enumerate(contenders)
    ]
    figure.suptitle(f"k-NN of the {who}, validation (%); dashed: untrained", fontsize="medium")
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize="x-small")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
