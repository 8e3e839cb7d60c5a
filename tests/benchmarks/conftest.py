"""Prints what the benchmarks measured as tables at the end."""

from __future__ import annotations

import platform

import pytest
import torch
from report import NOT_RUN, TABLES, Report
from table import markdown


@pytest.fixture
def report() -> Report:
    return Report()


def machine() -> str:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), {gpu}, torch "
        f"{torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    write(f"\nMachine: {machine()}. Times are medians; the calls of a row took turns in one run.")
    for name, (header, rows) in TABLES.items():
        write(f"\n{name}\n\n{markdown(header, rows)}")
    for line in NOT_RUN:
        write(f"\nNot run: {line}.")
