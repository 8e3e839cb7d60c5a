"""Decides whether a setting gains over its plain twin, by the rule of a pre-registration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from scipy import stats

from knn_study.records import Record
from knn_study.report import Row, described, gains, markdown, rows, twin_of
from knn_study.settings import Settings

SEEDS, LEVEL = 8, 0.95
CHOOSING = frozenset({0, 1, 2})
"""Seeds that choose a setting, and so cannot confirm it."""
OF_TRAINING = (
    "epochs",
    "optimizer",
    "lr",
    "weight_decay",
    "momentum",
    "temperature",
    "teacher_temperature",
    "mismatched",
    "every",
)
"""Settings that an untrained network does not depend on."""


def verdicts(
    records: Sequence[Record], *, who: str = "student", twins: Sequence[Record] | None = None
) -> str:
    """Markdown: a line for each setting that has a plain twin, tested as one family.

    Seeds 0 to 2, which choose, are left out. A gain needs all of: at least 8 other seeds; a paired
    mean over plain above 0 with p < 0.05 after Holm's correction;
    a mean above the untrained network's, and above the plain run's at its best epoch (by validation
    k-NN, seed by seed). A loss is the same with a mean below 0, without the last two. The best
    rival is the line without CLIMB with the highest mean, of any training: what else one could do.
    A gain over that with p < 0.05, too, is one of the rate. The intervals are of single lines, at
    95 %; each p is Holm's, over all p of the table.

    Args:
        records: Of the settings to decide on.
        who: Whose features.
        twins: Where to look for plain twins and untrained networks; by default in ``records``.
    """
    known = [_confirming(row) for row in rows(records if twins is None else twins, who=who)]
    plain_runs = {row.settings: row for row in known}
    idle = {untrained_of(r.settings): r for r in known if r.settings.regulariser == "untrained"}
    shown = [_confirming(row) for row in rows(records, who=who)]
    rivals = [r for r in shown if r.settings.regulariser not in ("climb", "untrained")]
    tested: list[tuple[Row, Row, Row | None]] = []
    for row in shown:
        plain = plain_runs.get(twin_of(row.settings))
        if plain and row.settings.regulariser not in ("plain", "untrained"):
            tested.append((row, plain, idle.get(untrained_of(row.settings))))
    over_plain = [gains(row.validation, plain.validation) for row, plain, _ in tested]
    best = [_best_rival(row, rivals) or plain for row, plain, _ in tested]
    over_rival = [
        gains(row.validation, rival.validation)
        for (row, _, _), rival in zip(tested, best, strict=True)
    ]
    # The plain run as the best rival is no second test.
    second = [
        None if rival.settings == plain.settings else p_value(values)
        for (_, plain, _), rival, values in zip(tested, best, over_rival, strict=True)
    ]
    adjusted = holm([*map(p_value, over_plain), *second])
    lines = []
    for number, (row, plain, untrained) in enumerate(tested):
        p, p_rival = adjusted[number], adjusted[number + len(tested)]
        values, rival = over_plain[number], over_rival[number]
        over_best = gains(row.validation, plain.best)
        over_untrained = gains(row.validation, untrained.validation if untrained else None)
        verdict = _verdict(values, p, over_best, over_untrained)
        if verdict == "gain" and p_rival is not None:
            is_above = p_rival < 1 - LEVEL and mean(rival) > 0
            verdict = "gain, over the best rival too" if is_above else "gain, not over the rival"
        lines.append(
            [
                described(row.settings),
                str(len(values)),
                with_interval(values),
                _p(p),
                with_interval(over_best),
                with_interval(over_untrained),
                f"{with_interval(rival)}: {_rival(best[number])}",
                _p(p_rival),
                verdict,
            ]
        )
    head = ["regulariser", "seeds", "over plain", "p", "over plain's best epoch"]
    return markdown([*head, "over untrained", "over the best rival", "p", "verdict"], lines)


def _best_rival(row: Row, rivals: Sequence[Row]) -> Row | None:
    others = [one for one in rivals if one.settings != row.settings and one.validation]
    return max(others, key=lambda one: mean(one.validation.values()), default=None)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _confirming(row: Row) -> Row:
    """The row without the seeds that choose."""
    kept = {
        name: {seed: value for seed, value in getattr(row, name).items() if seed not in CHOOSING}
        for name in ("validation", "best", "test", "rate", "base_loss", "made")
    }
    return replace(row, **kept)


def untrained_of(settings: Settings) -> Settings:
    """Of a training: the settings that tell one untrained network from another."""
    plain = twin_of(settings)
    return replace(plain, **{name: getattr(Settings(), name) for name in OF_TRAINING})


def _rival(rival: Row) -> str:
    """In words, with the settings by which one plain run may be better than another."""
    own, usual = rival.settings, Settings()
    said = [
        f"{name.replace('_', ' ')} {getattr(own, name):g}"
        for name in ("lr", "momentum", "teacher_temperature", "epochs")
        if getattr(own, name) != getattr(usual, name)
    ]
    return ", ".join([described(own), *said])


def _verdict(
    values: Sequence[float],
    p: float | None,
    over_best: Sequence[float],
    over_untrained: Sequence[float],
) -> str:
    if p is None:
        return f"open: fewer than {SEEDS} seeds"
    if p >= 1 - LEVEL:
        return "none"
    if mean(values) < 0:
        return "loss"
    if not over_untrained:
        return "open: no untrained network"
    return "gain" if mean(over_best) > 0 and mean(over_untrained) > 0 else "none"


def p_value(values: Sequence[float]) -> float | None:
    """Of the two-sided paired t-test; None for fewer than 8 differences, 1 if all are 0."""
    if len(values) < SEEDS:
        return None
    return float(stats.ttest_1samp(values, 0.0).pvalue) if any(values) else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for their number (Holm, 1979), in their order; None stays and does not count.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def with_interval(values: Sequence[float]) -> str:
    """A mean and its 95 % interval by Student's t.

    >>> with_interval([1.0, 2.0, 3.0])
    '+2.00 [-0.48, 4.48]'
    """
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return f"{mean(values):+.2f} [{low:.2f}, {high:.2f}]"
