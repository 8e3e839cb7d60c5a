"""What `make bench` compares computes the same. It runs by hand only, so it is called here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


def test_contenders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    operations = importlib.import_module("bench_operation")
    mean, logvar = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
    for result, other in zip(
        operations.climb_operation(mean, logvar),
        operations.distributions_operation(mean, logvar),
        strict=True,
    ):
        assert result.shape == other.shape
        if result.ndim == 1:  # a sample has noise of its own
            torch.testing.assert_close(result, other)
