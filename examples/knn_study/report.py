"""A table of runs."""

from __future__ import annotations

from knn_study.records import Record


def table(records: list[Record]) -> str:
    """A line for each run."""
    return "\n".join(f"{r['name']} {r['validation']} {r['test']}" for r in records)
