"""Decides whether a setting gains over its plain twin, by the rule of a pre-registration."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from statistics import mean

from scipy import stats

from knn_study.records import Record
from knn_study.report import (
    Row,
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
    unlike,
)
from knn_study.settings import Settings

LEVEL = 0.95
CHOOSING = frozenset(range(3))
"""Seeds that choose a setting."""
CONFIRMING = frozenset(range(3, 11))
"""Seeds that confirm it; others have been added to a result."""
REMEDIES = ("epochs", "lr", "momentum", "teacher_temperature")
"""Settings in which a plain rival may differ: what else one could do to the same data."""
OF_TRAINING = (*REMEDIES, "optimizer", "weight_decay", "temperature", "mismatched", "every")
"""Settings that an untrained network does not depend on."""


def verdicts(
    records: Sequence[Record], *, who: str = "student", twins: Sequence[Record] | None = None
) -> str:
    """Markdown: a line for each setting with a regulariser; those of a table are one family.

    Seeds 3 to 10 alone count. A gain is all of: a paired mean over plain above 0, with p < 0.05 by
    the two-sided t-test after Holm's correction over the lines of the table; means above the plain
    run's best epoch (by validation k-NN, seed by seed) and above the untrained network; a mean over
    plain above 0 on the test images, too. A loss is a mean below 0 with p < 0.05. A line that is
    not finished counts in Holm's correction as p = 1, which no later result makes worse.

    The best rival of CLIMB is the line without CLIMB with the highest mean, of the same images and
    pairs, but for CLIMB's own plain twin: another regulariser, or plain with other ``REMEDIES``. A
    gain of the rate is a gain whose paired mean over that rival is above 0 with p < 0.05, by
    Holm's correction over the table's lines of CLIMB. The intervals are those of single lines.

    Args:
        records: Of the settings to decide on.
        who: Whose features.
        twins: Where to look for plain twins and untrained networks; by default in ``records``.
    """
    everyone = rows(records if twins is None else twins, who=who)
    known = [of_seeds(row, CONFIRMING) for row in everyone]
    shown = [of_seeds(row, CONFIRMING) for row in rows(records, who=who)]
    plain_runs = {_any_looks(r.settings): r for r in known if r.settings.regulariser == "plain"}
    idle = untrained(known)
    tested = [
        _Tested(
            row,
            plain_runs.get(_any_looks(twin_of(row.settings)), Row(row.settings)),
            idle.get(untrained_of(row.settings), {}),
            _rivals(row, shown),
        )
        for row in shown
        if row.settings.regulariser not in ("plain", "untrained") and (row.validation or row.failed)
    ]
    if not tested:
        return "No runs to decide on yet."
    of_climb = [one for one in tested if one.row.settings.regulariser == "climb"]
    p_plain = holm([p_value(one.over_plain) for one in tested])
    p_rival = dict(
        zip(map(id, of_climb), holm([p_value(one.over_rival) for one in of_climb]), strict=True)
    )
    _, varying = in_common([one.row.settings for one in tested])
    lines = []
    for one, p in zip(tested, p_plain, strict=True):
        over = (one.over_best, one.over_untrained, one.over_test)
        against, verdict = ["", ""], one.verdict(p)
        if one in of_climb:
            against = [one.against(), p_text(p_rival[id(one)])]
            verdict += one.of_the_rate(p_rival[id(one)]) if verdict == "gain" else ""
        lines.append(
            [
                *texts(one.row.settings, varying),
                described(one.row.settings),
                str(len(one.over_plain)),
                with_interval(one.over_plain),
                p_text(p),
                *map(with_interval, over),
                *against,
                verdict,
            ]
        )
    head = [*map(named, varying), "regulariser", "seeds", "over plain", "p (Holm)"]
    head += ["over plain's best epoch", "over untrained", "over plain, test"]
    head += ["over the best rival", "p over the rival (Holm)", "verdict"]
    return "\n".join([markdown(head, lines), *paragraph(failures(records))])


@dataclass(eq=False)
class _Tested:
    """A line of the table: a setting, and what it is compared with."""

    row: Row
    plain: Row
    untrained: dict[int, float]
    rivals: list[Row]

    def __post_init__(self) -> None:
        row, plain = self.row, self.plain
        finished = [one for one in self.rivals if len(one.validation) == len(CONFIRMING)]
        self.rival = max(finished, key=lambda one: mean(one.validation.values()), default=None)
        self.over_plain = gains(row.validation, plain.validation)
        self.over_best = gains(row.validation, plain.best)
        self.over_test = gains(row.test, plain.test)
        self.over_untrained = gains(row.validation, self.untrained)
        self.over_rival = gains(row.validation, self.rival.validation if self.rival else None)

    def verdict(self, p: float | None) -> str:
        """By the p over plain."""
        if self.row.failed:
            return f"none: seed {min(self.row.failed)} diverged"
        if self.plain.failed:
            return f"open: plain diverged with seed {min(self.plain.failed)}"
        if not self.plain.validation:
            return "open: no plain twin"
        if p is None:
            return f"open: fewer than {len(CONFIRMING)} seeds"
        if unlike(self.row, self.plain):
            return "open: plain has other code or images"
        if p >= 1 - LEVEL:
            return "none"
        if mean(self.over_plain) < 0:
            return "loss"
        if len(self.over_untrained) < len(CONFIRMING):
            return f"open: fewer than {len(CONFIRMING)} untrained networks"
        if mean(self.over_untrained) <= 0:
            return "none: not over the untrained network"
        if mean(self.over_best) <= 0:
            return "none: not over plain's best epoch"
        return "gain" if mean(self.over_test) > 0 else "none: not on the test images"

    def of_the_rate(self, p: float | None) -> str:
        """What a gain of CLIMB is over the best rival, by the p over it."""
        if any(len(one.validation) < len(CONFIRMING) and not one.failed for one in self.rivals):
            return ", rivals open"
        if self.rival is None or p is None:
            return ", no rival"
        if unlike(self.row, self.rival):
            return ", the rival has other code or images"
        is_above = p < 1 - LEVEL and mean(self.over_rival) > 0
        return " of the rate" if is_above else ", not over the rival"

    def against(self) -> str:
        """The difference to the best rival, with the settings of what is the best remedy."""
        if self.rival is None:
            return ""
        own, usual = self.rival.settings, self.row.settings
        differ = [name for name in REMEDIES if getattr(own, name) != getattr(usual, name)]
        values = zip(map(named, differ), texts(own, differ), strict=True)
        words = [described(own), *(f"{name} {value}" for name, value in values)]
        return f"{with_interval(self.over_rival)}: {', '.join(words)}"


def untrained(known: Sequence[Row]) -> dict[Settings, dict[int, float]]:
    """The accuracy of untrained networks by seed, for each ``untrained_of``."""
    found: dict[Settings, dict[int, float]] = {}
    for row in known:
        if row.settings.regulariser == "untrained":
            by_seed = found.setdefault(untrained_of(row.settings), {})
            # Views that show other pairs change its batch statistics a little: the first counts.
            by_seed.update({s: v for s, v in row.validation.items() if s not in by_seed})
    return found


def untrained_of(settings: Settings) -> Settings:
    """Of a training: the settings that tell one untrained network from another."""
    plain = twin_of(settings)
    return replace(plain, **{name: getattr(Settings(), name) for name in OF_TRAINING})


def _any_looks(settings: Settings) -> Settings:
    """The settings without how often the accuracy is looked at, which changes no training."""
    return replace(settings, every=Settings().every)


def of_seeds(row: Row, seeds: Set[int]) -> Row:
    """The row of some seeds alone."""
    kept = {
        name: {seed: value for seed, value in getattr(row, name).items() if seed in seeds}
        for name in ("validation", "best", "test", "rate", "base_loss", "made")
    }
    return replace(row, **kept, failed=row.failed & seeds)


def _rivals(row: Row, shown: Sequence[Row]) -> list[Row]:
    own = _any_looks(twin_of(row.settings))
    return [
        one
        for one in shown
        if one.settings.regulariser not in ("climb", "untrained")
        and (one.validation or one.failed)
        and _any_looks(one.settings) != own
        and _of_the_same(one.settings) == _of_the_same(row.settings)
    ]


def _of_the_same(settings: Settings) -> Settings:
    """The settings but for regularisers and remedies."""
    plain = _any_looks(twin_of(settings))
    return replace(plain, **{name: getattr(Settings(), name) for name in REMEDIES})


def p_text(value: float | None) -> str:
    """A p to print, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def p_value(values: Sequence[float]) -> float | None:
    """Of the two-sided paired t-test; None for fewer than 8 differences, 1 if all are 0."""
    if len(values) < len(CONFIRMING):
        return None
    return float(stats.ttest_1samp(values, 0.0).pvalue) if any(values) else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for their number (Holm, 1979), in their order; None stays, and counts as 1.

    >>> holm([0.01, 0.03, None])
    [0.03, 0.06, None]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
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
    low, high = interval(values)
    return f"{mean(values):+.2f} [{low:.2f}, {high:.2f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of a mean by Student's t, of two values or more."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return float(low), float(high)
