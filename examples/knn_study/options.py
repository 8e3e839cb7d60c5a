"""Settings as options of a command line, of a line of a sweep, and of a table in a report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from knn_study.settings import Settings

NAMES = [entry.name for entry in fields(Settings)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting; None where it is not given."""
    group = parser.add_argument_group("a run (defaults depend on the preset)")
    for entry in fields(Settings):
        group.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=type(entry.default),
            choices=entry.metadata["choices"],
            help=entry.metadata["help"].replace("%", "%%"),  # argparse formats it
        )


def given(values: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    return {name: v for name, v in vars(values).items() if name in NAMES and v is not None}


def parse(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Settings from options whose values may be several, separated by commas: all combinations.

    Args:
        words: Options and values in turns.

    Raises:
        ValueError: If a word is no setting, or a value not of its type.

    >>> list(parse(["--seed", "0,1", "--beta", "1e-3"]))
    [{'seed': 0, 'beta': 0.001}, {'seed': 1, 'beta': 0.001}]
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser)
    for chosen in itertools.product(*(word.split(",") for word in words)):
        try:
            values, unknown = parser.parse_known_args(chosen)
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error
        if unknown:
            raise ValueError(f"not a setting: {' '.join(unknown)}")
        yield given(values)
