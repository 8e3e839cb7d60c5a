"""Defines the stages of the queue: commands, limits and needs, as data."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[1]
ROOT = EXAMPLES.parent
TESTS = ROOT / "tests"
SWEEP = EXAMPLES / "sweeps" / "gpu-pairs.txt"
BACKBONES = ("resnet18", "efficientnet_b0", "resnet50")

SECONDS = "{seconds}"
"""Stands in a command for the seconds that the command may take."""
SPARE = 45
"""Seconds that a command that watches the time has for imports, the images and the last k-NN."""

STUDY = ("climb_plugin", "kornia", "lightly", "matplotlib", "PIL", "scipy", "torchvision", "tqdm")
# A training of a second or so.
TOY = "--preset cpu --device cpu --backbone small --images 32 --bank 200 --batch 16 --local-views 1"
TOY += " --epochs 1 --every 1 --hidden 16 --embedding 8 --prototypes 12"


@dataclass(frozen=True)
class Stage:
    """One command of the queue.

    Attributes:
        name: Names the stage, and the log.
        measures: One line for the reader.
        command: Program and arguments; ``SECONDS`` in an argument becomes a number.
        folder: The working directory of the command.
        limit: Seconds after which the stage is ended; infinite where the work goes on later.
        least: Seconds without which the stage is not begun.
        modules: Python modules that the command imports.
        environment: Variables beside those of the queue.
        files: What must exist.
        goes_on: Whether the command takes up the work of a former one that was ended.
    """

    name: str
    measures: str
    command: tuple[str, ...]
    folder: Path
    limit: float
    least: float
    modules: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    files: tuple[Path, ...] = ()
    goes_on: bool = False

    def arguments(self, seconds: float) -> list[str]:
        """The command, for a time."""
        left = str(max(1, int(seconds - SPARE)))
        return [word.replace(SECONDS, left) for word in self.command]


def stages(
    *,
    dry_run: bool,
    data: Path,
    files: tuple[Path, ...],
    runs: Path,
    sweep: Path,
    jobs: int,
    epochs: int,
) -> list[Stage]:
    """All stages, the most valuable first.

    Args:
        dry_run: On the CPU, at toy size.
        data: CIFAR-10, as ``cifar10_knn.py`` takes it.
        files: What must exist for the study.
        runs: Where the study puts the lines of its runs.
        sweep: The runs of the study.
        jobs: Runs of the study at once; of a dry run two, and then one.
        epochs: Of each run; a dry run has one.
    """
    device = "cpu" if dry_run else "cuda"
    common = ("--data", str(data), "--out", str(runs), "--sweep", str(sweep))
    studies = [
        _study(name, _toy(name) if dry_run else _full(name, jobs, epochs), common, files)
        for name in BACKBONES
    ]
    return [_tests(dry_run), _bench(device, dry_run), _speed(device, dry_run), *studies]


def _pytest(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--tb=short", *words)


def _tests(dry_run: bool) -> Stage:
    # Without a GPU: the files that hold the tests of CUDA alone, on the CPU.
    chosen = (
        ("test_cuda.py", "test_sync.py")
        if dry_run
        # The others have no test of CUDA, and import more.
        else ("-m", "cuda", "--ignore=adapters", "--ignore=examples")
    )
    return Stage(
        "tests",
        "every test marked CUDA: compiled heads, captured graphs, synchronisation, precision",
        _pytest("-q", *chosen),
        TESTS,
        limit=480,
        least=200,
        modules=("climb_plugin", "hypothesis", "pytest"),
        environment=(("CLIMB_TEST_DEVICES", "cpu" if dry_run else "cuda"),),
    )


def _bench(device: str, dry_run: bool) -> Stage:
    return Stage(
        "bench",
        "the GPU rows of make bench: step, peak memory, operation, log-variances, graph break",
        # The step first: an interrupted pytest prints the tables of what has run.
        _pytest(
            "-q",
            "--show-capture=no",
            "-k",
            device,
            *(f"benchmarks/bench_{name}.py" for name in ("step", "operation", "logvar")),
            *(f"benchmarks/bench_{name}.py" for name in ("walk", "cost")),
        ),
        TESTS,
        limit=480,
        least=200,
        modules=("climb_plugin", "lightly", "pytest", "pytest_benchmark", "torchvision"),
        environment=(("CLIMB_BENCH_TOY", "1"),) if dry_run else (),
    )


def _speed(device: str, dry_run: bool) -> Stage:
    size = ("--toy",) if dry_run else ()
    return Stage(
        "speed",
        "images per second of the study, plain and CLIMB, by parts of a step and by processes",
        (sys.executable, "-m", "gpu.speed", "--device", device, *size),
        EXAMPLES,
        limit=400,
        least=150,
        modules=STUDY,
    )


def _full(name: str, jobs: int, epochs: int) -> list[str]:
    words = ["--preset", "gpu", "--device", "cuda", "--backbone", name]
    return [*words, "--epochs", str(epochs), "--jobs", str(jobs)]


def _toy(name: str) -> list[str]:
    number = BACKBONES.index(name)
    own = ["--temperature", f"0.{5 + number}"]  # else the stages would ask for the same runs
    return [*TOY.split(), *own, "--jobs", "1" if number else "2"]  # several at once are tried once


def _study(name: str, size: list[str], common: tuple[str, ...], files: tuple[Path, ...]) -> Stage:
    script = str(EXAMPLES / "cifar10_knn.py")
    return Stage(
        name,
        f"k-NN accuracy of DINO on CIFAR-10 with {name}: the runs of {SWEEP.name}",
        (sys.executable, script, *size, *common, "--time-limit", SECONDS),
        ROOT,
        limit=math.inf,
        least=150,
        modules=STUDY,
        files=files,
        goes_on=True,
    )
