"""k-NN accuracy on CIFAR-10 of lightly's methods, plain and with CLIMB, over settings and seeds.

One run, then a table of all that ``--out`` holds (``--data`` is a folder for torchvision's
download, or an .npz of JPEGs)::

    python examples/cifar10_knn.py --preset cpu --method simclr
    python examples/cifar10_knn.py --preset cpu --method simclr --regulariser climb --beta 1e-3
    python examples/cifar10_knn.py --summary

Many: a line of FILE holds options, ``#`` begins a comment, and values separated by commas are all
run, in all combinations. What ``--out`` holds already is not run again, and a run that was stopped
goes on from its last epoch::

    python examples/cifar10_knn.py --preset cpu --sweep FILE --jobs 2 --time-limit 3600

On a GPU, runs use bfloat16 autocast, channels_last and a compiled backbone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path

import torch
from knn_study import data, records, report
from knn_study.settings import PRESETS, Settings
from knn_study.training import OutOfTimeError, train
from tqdm import tqdm


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, or summarises; returns the exit code: 1 if the time was up before all was done."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        known = records.read(args.out)
        runs = [] if args.summary else list(wanted(args, parser))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if runs:
        finished = {record["name"] for record in known}
        open_runs = [run for run in runs if run.name not in finished]
        print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {args.out} already")
        try:
            complete = run_all(open_runs, args)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        known = records.read(args.out)
        names = {run.name for run in runs}
        known = [record for record in known if record["name"] in names]
    print(report.table(known))
    return 0 if not runs or complete else 1


def wanted(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[Settings]:
    """The runs that are asked for, without repetitions."""
    given = {key: value for key, value in vars(args).items() if key in NAMES and value is not None}
    preset = {**PRESETS[args.preset], **given}
    lines = [""] if args.sweep is None else args.sweep.read_text().splitlines()
    seen = set()
    for number, line in enumerate(lines, 1):
        words = shlex.split(line, comments=True)
        if not words and args.sweep is not None:
            continue
        try:
            for options in combinations(words):
                values = vars(line_parser().parse_args(options))
                known = {key: value for key, value in values.items() if value is not None}
                settings = Settings(**{**preset, **known})
                if settings not in seen:
                    seen.add(settings)
                    yield settings
        except (ValueError, argparse.ArgumentError) as error:
            where = f"{args.sweep}, line {number}: " if args.sweep else ""
            raise ValueError(f"{where}{error}") from error


def combinations(words: Sequence[str]) -> Iterator[list[str]]:
    """Option lists with one of each option's values, which are separated by commas.

    >>> list(combinations(["--seed", "0,1", "--beta", "1e-3"]))
    [['--seed', '0', '--beta', '1e-3'], ['--seed', '1', '--beta', '1e-3']]
    """
    for chosen in itertools.product(*(word.split(",") for word in words)):
        yield list(chosen)


def run_all(runs: Sequence[Settings], args: argparse.Namespace) -> bool:
    """Runs them, ``--jobs`` at once; returns whether all are done."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.time_limit
    common = (args.data, args.out, args.device, args.preset, args.threads)
    if args.jobs == 1 or len(runs) == 1:
        alone = len(runs) == 1
        bar = tqdm(runs, unit="run", disable=alone)
        done = [run_one(run, *common, deadline, alone) for run in bar]
        return all(done)
    # Each process decodes the images once and takes run after run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        try:
            jobs = [pool.submit(run_one, run, *common, deadline, False) for run in runs]
            bar = tqdm(as_completed(jobs), total=len(jobs), unit="run")
            done = [job.result() for job in bar]
            return all(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_one(
    settings: Settings,
    root: Path,
    out: Path,
    device: str,
    preset: str,
    threads: int,
    deadline: float,
    bar: bool,
) -> bool:
    """Runs one and appends its line; returns whether it was done before the deadline."""
    if time.monotonic() > deadline:
        return False
    torch.set_num_threads(threads)
    # Lightly's DINO head is built with it.
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    parts = data.load(root)
    checkpoint = out.parent / f".{settings.name}.pt"
    try:
        measured = train(
            settings, parts, device=device, checkpoint=checkpoint, deadline=deadline, bar=bar
        )
    except OutOfTimeError:
        return False
    except FloatingPointError as error:
        tqdm.write(f"{settings.name} ended: {error}", file=sys.stderr)
        return False
    records.append(records.make_record(settings, measured, preset=preset, device=device), out)
    checkpoint.unlink(missing_ok=True)
    return True


def make_parser() -> argparse.ArgumentParser:
    """The options of the script and those of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    preset = "gpu" if cuda else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="defaults of a run")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="where CIFAR-10 is")
    parser.add_argument("--out", type=Path, default=Path("cifar10_knn.jsonl"), help="JSON lines")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds; then stop")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a line of options for each run")
    parser.add_argument("--summary", action="store_true", help="only the table of --out")
    add_run_options(parser)
    return parser


def line_parser() -> argparse.ArgumentParser:
    """The options of a line of a sweep."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_run_options(parser)
    return parser


NAMES = [entry.name for entry in fields(Settings)]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting; None where it is not given."""
    group = parser.add_argument_group("a run (defaults depend on the preset)")
    for entry in fields(Settings):
        group.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=type(entry.default),
            choices=entry.metadata["choices"],
            help=entry.metadata["help"],
        )


if __name__ == "__main__":
    sys.exit(main())
