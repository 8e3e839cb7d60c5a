"""Measures images per second of the study's training step, and what the step waits for.

    python -m gpu.speed --device cuda

in ``examples/`` prints three tables: whole steps, plain and CLIMB; the parts of a step, each with
the device waited for; and several processes on one device. A device that is busy for less than the
whole time is starved by the host, which more processes can use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from knn_study.data import RandomViews
from knn_study.methods import METHODS, Learner
from knn_study.regularisers import regularised
from knn_study.settings import PRESETS, Settings
from knn_study.training import autocast

Call = Callable[[], object]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CLIMB": {"regulariser": "climb", "beta": 1e-3},
}
TOY = {"backbone": "small", "batch": 16, "hidden": 16, "embedding": 8, "prototypes": 12}


class Step:
    """A training step of DINO as the study takes it, in parts.

    Args:
        settings: Of a run.
        device: As torch names it.
        compiled: Whether the backbone is compiled.
    """

    def __init__(self, settings: Settings, device: str, *, compiled: bool) -> None:
        torch.manual_seed(0)
        torch.compiler.reset()
        self.settings, self.device = settings, device
        self.cuda = device == "cuda"
        self.batch = settings.batch
        self.learner = Learner(settings).to(device).to(memory_format=torch.channels_last)
        loss = METHODS[settings.method].loss(settings).to(device)
        self.criterion = regularised(loss, self.learner, settings, steps=10_000)
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 1e-3, momentum=0.9)
        self.draw = RandomViews(settings, local=settings.local_views)
        if compiled:
            self.learner.backbone.compile(dynamic=False)
        shape = (settings.batch, 3, 32, 32)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.drawn: list[Tensor] = []
        self.loss = torch.zeros(())

    def views(self) -> None:
        """Draws the views of a batch."""
        self.drawn = [
            view.contiguous(memory_format=torch.channels_last) for view in self.draw(self.images)
        ]

    def forward(self) -> None:
        """Student, teacher and criterion."""
        with autocast(self.settings, self.device):
            target, projected = self.learner(self.drawn)
        target, projected = ([view.float() for view in views] for views in (target, projected))
        self.loss = self.criterion(target, projected, epoch=0)

    def backward(self) -> None:
        """The gradients."""
        self.optimizer.zero_grad()
        self.loss.backward()

    def update(self) -> None:
        """Optimiser and teacher."""
        self.optimizer.step()
        self.learner.update_teacher(0.99)

    @property
    def parts(self) -> dict[str, Call]:
        """In their order."""
        return {
            "views": self.views,
            "forward": self.forward,
            "backward": self.backward,
            "update": self.update,
        }

    def whole(self) -> None:
        """All parts, without waiting for the device in between."""
        for part in self.parts.values():
            part()

    def wait(self) -> None:
        """Until the device is done."""
        if self.cuda:
            torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="a small network, few steps")
    parser.add_argument("--worker", action="store_true", help="one of several processes")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    preset = {**PRESETS["cpu"], **TOY} if args.toy else PRESETS["gpu"]
    rounds, seconds = (2, 0.5) if args.toy else (50, 15.0)
    cuda = args.device == "cuda"
    if args.worker:
        return worker(Step(Settings(**preset), args.device, compiled=cuda), seconds)
    made = {
        (kind, how): Step(Settings(**preset, **options), args.device, compiled=how == "compiled")
        for kind, options in KINDS.items()
        for how in (("compiled", "eager") if cuda else ("eager",))
    }
    steps = {f"{kind}, {how}": step for (kind, how), step in made.items()}
    whole = table("A step of the study: DINO, whole", WHOLE)
    for name, step in steps.items():
        whole(name, *whole_step(step, rounds))
    parts = table("A step of the study, by parts (ms), each waited for", ["step", *step.parts])
    for name, step in steps.items():
        parts(name, *(f"{1e3 * seconds:.3g}" for seconds in by_parts(step, rounds)))
    if not cuda:
        print("\nNot run: the share of time in which the device is busy: CUDA is not available.")
    del steps, made, step
    together = table("Several processes on one device, plain", ["processes", "images/s in all"])
    for count in (2,) if args.toy else (1, 2, 3):
        words = ["--device", args.device, *(["--toy"] if args.toy else [])]
        together(str(count), f"{several(count, words):.0f}")
    return 0


WHOLE = ["step", "images/s", "ms", "host works (ms)", "device works (ms)", "device busy"]


def table(title: str, header: Sequence[str]) -> Callable[..., None]:
    """Begins a table in Markdown; returns what prints a row, at once."""

    def row(*cells: str) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)

    print(f"\n{title}\n")
    row(*header)
    row(*(["---"] * len(header)))
    return row


def whole_step(step: Step, rounds: int) -> list[str]:
    """The cells of a row: speed, times of host and device."""
    for _ in range(3):  # compiles
        step.whole()
    step.wait()
    wall, work = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        step.whole()
    work = (time.process_time() - work) / rounds
    step.wait()
    wall = (time.perf_counter() - wall) / rounds
    device = device_seconds(step) if step.cuda else None
    cells = [f"{step.batch / wall:.0f}", f"{1e3 * wall:.3g}", f"{1e3 * work:.3g}"]
    if device is None:
        return [*cells, "-", "-"]
    return [*cells, f"{1e3 * device:.3g}", f"{device / wall:.2f}"]


def device_seconds(step: Step, rounds: int = 5) -> float:
    """How long the kernels of a step take, added up."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(rounds):
            step.whole()
        step.wait()
    microseconds = sum(event.self_device_time_total for event in recorded.key_averages())
    return float(microseconds) / 1e6 / rounds


def by_parts(step: Step, rounds: int) -> list[float]:
    """Medians in seconds, with the device waited for after each part."""
    seconds: list[list[float]] = [[] for _ in step.parts]
    for _ in range(rounds):
        for part, taken in zip(step.parts.values(), seconds, strict=True):
            began = time.perf_counter()
            part()
            step.wait()
            taken.append(time.perf_counter() - began)
    return [median(taken) for taken in seconds]


def worker(step: Step, seconds: float) -> int:
    """Gets ready, waits for a line, and prints images per second."""
    for _ in range(3):
        step.whole()
    step.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(2):
            step.whole()
        step.wait()
        steps += 2
    print(step.batch * steps / (time.perf_counter() - began), flush=True)
    return 0


def several(count: int, words: Sequence[str]) -> float:
    """Images per second of several processes at the same time, in all.

    Raises:
        RuntimeError: If one of them ends early.
    """
    command = [sys.executable, "-m", "gpu.speed", "--worker", *words]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for process in processes:
        if not process.stdout or process.stdout.readline() != "ready\n":
            raise RuntimeError("a process of several ended early; its messages stand above.")
    for process in processes:
        print("go", file=process.stdin, flush=True)
    return sum(float(process.communicate()[0]) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
