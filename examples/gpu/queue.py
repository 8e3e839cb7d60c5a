"""Goes through the stages: which is next, what stops it, what is kept of it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu import records, runner
from gpu.figures import ending, figures
from gpu.machine import Machine
from gpu.records import Record
from gpu.stages import Stage
from knn_study.lines import append


@dataclass(frozen=True)
class Folders:
    """Where things lie.

    Attributes:
        out: Small files, to be carried away: ``stages.jsonl``, ``runs.jsonl``, a log of each stage.
        work: Large ones, which stay on the machine: checkpoints, installed wheels.
    """

    out: Path
    work: Path

    @property
    def stages(self) -> Path:
        """A line for each stage that ended."""
        return self.out / "stages.jsonl"

    @property
    def runs(self) -> Path:
        """A line for each run of the study; beside it the study puts its checkpoints."""
        return self.work / "runs.jsonl"

    def log(self, stage: Stage) -> Path:
        """Of all calls."""
        return self.out / f"{stage.name}.log"

    def join_runs(self) -> None:
        """Brings both files of runs to the same lines."""
        records.join(self.out / self.runs.name, self.runs)
        records.join(self.runs, self.out / self.runs.name)


@dataclass(frozen=True)
class Call:
    """One call of the queue.

    Attributes:
        folders: Where things lie.
        machine: What there is.
        environment: The variables of the stages.
        revision: Of the checkout.
        dry_run: On the CPU, at toy size.
        deadline: Of ``time.monotonic()``; no stage runs on.
        again: Names of stages to run although they are done.
    """

    folders: Folders
    machine: Machine
    environment: dict[str, str]
    revision: str
    dry_run: bool
    deadline: float
    again: Collection[str] = ()

    def go(self, stages: Sequence[Stage]) -> bool:
        """Runs what is not done and fits; returns whether all are done and none failed."""
        known = records.last(records.read(self.folders.stages), dry_run=self.dry_run)
        good = True
        with _alone(self.folders.work / "lock") as lock:
            self.folders.join_runs()
            for stage in stages:
                before = known.get(stage.name)
                done = before is not None and is_done(before, stage, self.revision)
                if before and done and stage.name not in self.again:
                    good &= before["status"] == "ok"
                    print(f"{stage.name}: {before['status']} in a former call", flush=True)
                    continue
                good &= self._one(stage, lock)
        return good

    def _one(self, stage: Stage, lock: int) -> bool:
        left = self.deadline - time.monotonic()
        if left < stage.least:
            print(f"{stage.name}: waits, {left:.0f} s are left of this call", flush=True)
            return False
        reason = obstacle(stage, self.machine, dry_run=self.dry_run)
        if reason:
            self._keep(stage, status="cannot", seconds=0.0, reason=reason)
            return False
        print(f"{stage.name}: {stage.measures}", flush=True)
        log = self.folders.log(stage)
        began = log.stat().st_size if log.exists() else 0
        limit = min(stage.limit, left)
        command = stage.arguments(limit)
        with log.open("a") as file:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            file.write(f"\n== {stage.name}, {now}, {self.revision}\n== {' '.join(command)}\n")
        ended = runner.run(
            command,
            folder=stage.folder,
            environment={**self.environment, **dict(stage.environment)},
            log=log,
            limit=limit,
            held=(lock,),
            tick=self.folders.join_runs,
        )
        with log.open("rb") as said:
            said.seek(began)
            text = said.read().decode(errors="replace")
        status = status_of(ended.code, text, stage)
        self._keep(
            stage,
            status=status,
            seconds=round(ended.seconds, 1),
            reason=reason_of(status, text, limit),
            cut=limit < stage.limit,
            figures=self._figures(stage, text),
        )
        return status == "ok"

    def _figures(self, stage: Stage, text: str) -> Record:
        if stage.goes_on:  # the study makes any table from the lines of its runs
            return {"runs": len(records.read(self.folders.runs))}
        return figures(text)

    def _keep(self, stage: Stage, *, status: str, reason: str, **more: Any) -> None:
        record = {
            "stage": stage.name,
            "status": status,
            "reason": reason,
            **more,
            "dry_run": self.dry_run,
            "device": "cpu" if self.dry_run else self.machine.device,
            "revision": self.revision,
            "versions": self.machine.versions,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        append(record, self.folders.stages)
        print(f"{stage.name}: {described(record)}", flush=True)


def obstacle(stage: Stage, machine: Machine, *, dry_run: bool) -> str:
    """Why a stage cannot run on a machine; empty if the stage can."""
    if machine.error:
        return machine.error
    missing = [name for name in stage.modules if name in machine.missing]
    if missing:
        return f"no module named {', '.join(missing)}: carry wheels, or install the extra gpu"
    if not dry_run and not machine.device:
        return "torch finds no CUDA device: --dry-run is for machines without one"
    absent = [str(path) for path in stage.files if not path.exists()]
    if absent:
        return f"{', '.join(absent)} is not there: --data names the images"
    return ""


def status_of(code: int | None, text: str, stage: Stage) -> str:
    """'ok', 'failed' or 'timeout'; the study's code for 'not all is done' is 1, as an error's."""
    if code is None:
        return "timeout"
    broken = "Traceback (most recent call last)" in text or "was not run:" in text
    if code == 1 and stage.goes_on and not broken:
        return "timeout"
    return "failed" if code else "ok"


def reason_of(status: str, text: str, limit: float) -> str:
    """Why a stage did not end well; empty if the stage did."""
    reasons = {"failed": ending(text), "timeout": f"at the limit of {limit:.0f} s"}
    return reasons.get(status, "")


def is_done(record: Record, stage: Stage, revision: str) -> bool:
    """Whether the next call leaves the stage alone.

    A stage that failed would fail again with the same code, and one that ran up to the stage's own
    limit would do so again, unless the work goes on from where it stopped.
    """
    if record["status"] == "ok":
        return True
    if record["status"] == "failed":
        return bool(record["revision"] == revision)
    at_limit = record["status"] == "timeout" and not record["cut"]
    return at_limit and not stage.goes_on


def described(record: Record) -> str:
    """A line for the reader."""
    known = record.get("figures", {})
    parts = [f"{record['status']}, {record.get('seconds', 0):.0f} s"]
    parts += [f"{number} {word}" for word, number in known.get("tests", {}).items()]
    parts += [f"{known['runs']} runs of the study so far"] if "runs" in known else []
    parts += [f"not checked: {line}" for line in known.get("not_checked", [])]
    parts += [record["reason"]] if record["reason"] else []
    return "\n    ".join([", ".join(parts[:1]), *parts[1:]])


@contextmanager
def _alone(path: Path, patience: float = 10.0) -> Iterator[int]:
    """Holds a lock, which a stage that outlives a killed queue holds until the stage is ended.

    Raises:
        RuntimeError: If another call holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > begin + patience:
                    raise RuntimeError(
                        f"another call is at work in {path.parent}: wait for it, or name another "
                        "--work"
                    ) from None
                time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)
