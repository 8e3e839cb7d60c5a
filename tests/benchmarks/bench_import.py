"""What `import climb_plugin` adds to `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

from report import Report
from table import milliseconds

ROUNDS = 9
CODE = """
import time, torch, numpy
start = time.perf_counter()
import climb_plugin
print(time.perf_counter() - start)
"""


def bench_import(benchmark: Any, report: Report) -> None:
    added = []

    def run() -> None:
        result = subprocess.run(
            [sys.executable, "-I", "-c", CODE], capture_output=True, text=True, check=True
        )
        added.append(float(result.stdout))

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    median = statistics.median(added[1:])
    report.row(
        "Import (ms)",
        {
            "added by climb_plugin": milliseconds(median),
            "least": milliseconds(min(added)),
            "rounds": str(ROUNDS),
        },
    )
