"""Runs a command with a limit of time, and ends what the command has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
MERCY = 20.0
"""Seconds between the interrupt, at which pytest prints its tables, and the kill."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: ``code`` is None if the limit ended the command."""

    code: int | None
    seconds: float


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    held: Sequence[int] = (),
    tick: Callable[[], None] = lambda: None,
    every: float = 2.0,
    mercy: float = MERCY,
) -> Ended:
    """Runs a command whose output goes to the end of ``log``.

    Args:
        command: Program and arguments.
        folder: The working directory.
        environment: All variables.
        log: Gets standard output and errors.
        limit: Seconds, after which the command is interrupted, then killed.
        held: File descriptors to be held as long as the command lives.
        tick: Called while the command runs, and at the end.
        every: Seconds between two ticks.
        mercy: Seconds between the interrupt and the kill.
    """
    began = time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, str(GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            pass_fds=held,
        )
    code: int | None = None
    try:
        while code is None and (left := began + limit - time.monotonic()) > 0:
            code = _waited(process, min(every, left))
            tick()
        if code is None:
            _signal(process, signal.SIGINT)
            _waited(process, mercy)
    finally:
        _signal(process, signal.SIGKILL)  # what the command left behind, too
        if process.stdin is not None:
            process.stdin.close()
        process.wait()
    tick()
    return Ended(code, time.monotonic() - began)


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
