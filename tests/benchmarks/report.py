"""What the benchmarks measured, in rows of tables."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch

DEVICES = ["cpu", "cuda"]
# Every row in a second or so, to see that the code runs: the figures mean nothing.
TOY = bool(os.environ.get("CLIMB_BENCH_TOY"))
BACKEND = "aot_eager" if TOY else "inductor"
TABLES: dict[str, tuple[list[str], list[list[str]]]] = {}
NOT_RUN: list[str] = []


Size = TypeVar("Size")


def sized(full: Size, toy: Size) -> Size:
    """The second where CLIMB_BENCH_TOY is set."""
    return toy if TOY else full


class Report:
    """Where a benchmark puts what it measured."""

    def row(self, table: str, cells: dict[str, str]) -> None:
        header, rows = TABLES.setdefault(table, (list(cells), []))
        rows.append([cells[name] for name in header])

    def need(self, device: str, what: str) -> None:
        """Skips, and says so under the tables, where there is no such device."""
        if device == "cuda" and not torch.cuda.is_available():
            NOT_RUN.append(f"{what} on a GPU: CUDA is not available")
            pytest.skip("CUDA is not available")
