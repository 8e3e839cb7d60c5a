"""Trainings that are killed and started again: what the tests of checkpoints share.

``python kills.py SCRIPT`` imports SCRIPT once and forks for every training that it is asked for,
because the imports take longer than the trainings. SCRIPT has a function ``prepare()``, which does
the imports, and ``run(folder, **options)``, which goes on from what it finds in the folder and
leaves ``result.json`` there at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from by_path import load

# At random moments, of each training. CLIMB_TEST_KILLS=10 pytest -s -k killed prints a long tally.
KILLS = int(os.environ.get("CLIMB_TEST_KILLS", "3"))


@dataclass(frozen=True)
class Life:
    """A training from its start to its end or its death."""

    status: int
    steps: int  # of the optimiser
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Runs:
    """Starts trainings of a script, one at a time."""

    def __init__(self, script: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.communicate()

    def live(
        self, folder: Path, options: Mapping[str, Any], *, moment: float | None = None
    ) -> Life:
        """Trains in ``folder``; SIGKILL after ``moment`` seconds, if it is still at it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir(exist_ok=True)
        request = {"folder": str(folder), "options": options, "moment": moment}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        life = Life(**json.loads(self.process.stdout.readline()))
        said = (folder / "output.txt").read_text()
        assert life.status in (0, -signal.SIGKILL), said
        return life

    def tally(
        self,
        folder: Path,
        options: Mapping[str, Any],
        *,
        done: Callable[[Path], int],
        epoch: int,
        in_writing: tuple[Any, ...],
        kills: int = KILLS,
        seed: int = 0,
    ) -> list[str]:
        """Kills trainings at random moments and in the middle of writing; each must end the same.

        Args:
            folder: Where the trainings get folders.
            options: Of the training.
            done: How many optimiser steps are in what the next start goes on from.
            epoch: Steps between two checkpoints.
            in_writing: Values of the option ``die``, each of which must kill the training while
                it writes a checkpoint; the first is the first kill, the others come among the rest.
            kills: How many at random moments, besides these.
            seed: Of the moments.

        Returns:
            One line per kill.
        """
        whole = self.live(folder / "whole", options)
        assert not whole.killed
        expected = json.loads((folder / "whole" / "result.json").read_text())
        lines: list[str] = []
        # Told apart from the others so that a chain of lives has some of both.
        drawn = random.Random(seed)
        planned: list[Any] = [None] * kills + list(in_writing[1:])
        drawn.shuffle(planned)
        planned.insert(0, in_writing[0])
        for chain in itertools.count():
            here = folder / f"chain{chain}"
            here.mkdir()
            while True:
                before = done(here)
                left = 1 - before / whole.steps
                die = moment = None
                if planned and left:
                    die = planned[0]
                    # A start costs some of the time, however little is left to do.
                    moment = None if die else drawn.uniform(0, whole.seconds * (0.3 + 0.7 * left))
                life = self.live(here, {**options, "die": die}, moment=moment)
                if not life.killed:
                    break
                planned.pop(0)
                reached, after = before + life.steps, done(here)
                lines.append(
                    f"{die or f'{moment:.2f} s'}: from step {before}, killed after {reached}, "
                    f"goes on from {after} of {whole.steps}"
                )
                # After the last epoch, or the one before if its checkpoint is not yet written.
                late = reached % epoch == 0
                assert after in {reached // epoch * epoch, reached - epoch if late else -1}, lines
            assert before + life.steps == whole.steps, lines
            result = json.loads((here / "result.json").read_text())
            differing = [name for name in result if result[name] != expected[name]]
            assert not differing, (differing, lines)
            if not planned:
                return lines
            assert chain < 10 * len(lines) + 10, lines
        raise AssertionError


def digest(value: Any) -> str:
    """Of every bit of nested tensors, numbers and strings."""
    hashed = hashlib.sha256()

    def add(item: Any) -> None:
        hashed.update(type(item).__name__.encode())
        if hasattr(item, "numpy"):
            item = item.detach().numpy()
            hashed.update(f"{item.dtype} {item.shape}".encode() + item.tobytes())
        elif isinstance(item, Mapping):
            for key, member in item.items():
                add(key)
                add(member)
            add(list(getattr(item, "_metadata", {}).items()))
        elif isinstance(item, (list, tuple)):
            hashed.update(str(len(item)).encode())
            for member in item:
                add(member)
        elif isinstance(item, float):
            hashed.update(struct.pack("d", item))
        else:
            assert item is None or isinstance(item, (bool, int, str)), type(item)
            hashed.update(repr(item).encode())

    add(value)
    return hashed.hexdigest()


def die() -> None:
    """At once: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def serve(script: Path) -> None:
    module = load(script)
    module.prepare()
    for line in sys.stdin:
        request = json.loads(line)
        steps = Path(request["folder"], "steps")
        steps.write_bytes(b"")
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            train(module, steps, request)
        status = wait(child, None if request["moment"] is None else start + request["moment"])
        seconds = time.monotonic() - start
        life = {"status": status, "steps": steps.stat().st_size, "seconds": seconds}
        print(json.dumps(life), flush=True)


def wait(child: int, deadline: float | None) -> int:
    """Its exit status, as ``subprocess`` has it; killed at the deadline."""
    while deadline is not None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(module: ModuleType, steps: Path, request: dict[str, Any]) -> None:
    """In the forked process, which it ends."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    output = os.open(steps.with_name("output.txt"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    counted = os.open(steps, os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    register_optimizer_step_post_hook(lambda *_: os.write(counted, b".") and None)
    try:
        module.run(steps.parent, **request["options"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
