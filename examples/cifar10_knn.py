"""k-NN accuracy on CIFAR-10 of lightly's methods, plain and with CLIMB, over settings and seeds.

One run, then a table of all that ``--out`` holds (``--data`` is a folder for torchvision's
download, or an .npz of JPEGs)::

    python examples/cifar10_knn.py --preset cpu --method simclr
    python examples/cifar10_knn.py --preset cpu --method simclr --regulariser climb --beta 1e-3
    python examples/cifar10_knn.py --summary --method simclr

Many, with a table that leaves the test images out (``--summary`` shows them): a line of FILE holds
options, ``#`` begins a comment, and values separated by commas are all run, in all combinations.
What ``--out`` holds already is not run again, and a run that was stopped goes on from its last
epoch::

    python examples/cifar10_knn.py --preset cpu --sweep FILE --jobs 2 --time-limit 3600

Tables of a report in Markdown, from the JSON lines that it names::

    python examples/cifar10_knn.py --report examples/RESULTS.md

Networks are channels_last; on a GPU they are compiled, and its preset uses bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from knn_study import data, documents, options, plots, records, report
from knn_study.lines import append
from knn_study.settings import PRESETS, Settings
from knn_study.training import Measured, OutOfTimeError, train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, or summarises; returns the exit code: 1 if not all that was asked for is done."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.report:
            documents.rewrite(args.report)
            return 0
        runs = [] if args.summary else wanted(args)
        complete = run_all(runs, args)
        known = records.read(args.out)
        if args.summary:
            shown = documents.matching(known, [options.given(args)])
        else:
            names = {run.name for run in runs}
            shown = [record for record in known if record["name"] in names]
        # A sweep may be there to choose from, which the test images must not do.
        table = report.choices if args.sweep else report.table
        for who in ("student", "teacher", "embedding"):
            if who == "student" or any(who in record["test"] for record in shown):
                print(table(shown, who=who, twins=known) + "\n")
        if args.plot:
            plots.draw(shown, args.plot, twins=known)
            print(f"Plot: {args.plot}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0 if complete else 1


def wanted(args: argparse.Namespace) -> list[Settings]:
    """The runs that are asked for, without repetitions.

    Raises:
        OSError: If there is no such sweep.
        ValueError: If a setting is wrong; with the line of the sweep.
    """
    preset = {**PRESETS[args.preset], **options.given(args)}
    if args.sweep is None:
        return [Settings(**preset)]
    runs: dict[Settings, None] = {}
    for number, line in enumerate(args.sweep.read_text().splitlines(), 1):
        if words := shlex.split(line, comments=True):
            try:
                runs.update({Settings(**{**preset, **one}): None for one in options.parse(words)})
            except ValueError as error:
                raise ValueError(f"{args.sweep}, line {number}: {error}") from error
    return list(runs)


def run_all(wanted: Sequence[Settings], args: argparse.Namespace) -> bool:
    """Runs what ``--out`` does not hold, ``--jobs`` at once; returns whether all are done."""
    known = records.read(args.out)
    finished = {record["name"] for record in known}
    runs = [run for run in wanted if run.name not in finished]
    if len(runs) < len(wanted):
        print(f"{len(wanted) - len(runs)} of {len(wanted)} runs are in {args.out} already")
    for run in wanted:
        if run.name in finished:  # a kill after its line was written has left this
            checkpoint_of(run, args.out).unlink(missing_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.time_limit
    common = (args.data, args.out, args.device, args.preset, args.threads)
    if args.jobs == 1 or len(runs) <= 1:
        alone = len(runs) <= 1
        bar = tqdm(runs, unit="run", disable=alone)
        done = [run_one(run, *common, deadline, alone) for run in bar]
        return all(done)
    # Each process decodes the images once and takes run after run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=end_with_parent) as pool:
        try:
            jobs = [pool.submit(run_one, run, *common, deadline, False) for run in runs]
            bar = tqdm(as_completed(jobs), total=len(jobs), unit="run")
            done = [job.result() for job in bar]
            return all(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """Lets this process of a pool end when the script is killed: it would go on with its run."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # checkpoints and lines are written in one step, so none is cut

    threading.Thread(target=wait, daemon=True).start()


def checkpoint_of(settings: Settings, out: Path) -> Path:
    """Where a run is kept until its line is written."""
    return out.parent / f".{out.stem}-{settings.name}.pt"


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
    if any(record["name"] == settings.name for record in records.read(out)):
        return True  # by another process, since this one was given its list
    parts = data.load(root)
    checkpoint = checkpoint_of(settings, out)
    error = ""
    try:
        measured = train(
            settings, parts, device=device, checkpoint=checkpoint, deadline=deadline, bar=bar
        )
    except OutOfTimeError:
        return False
    except ValueError as refused:  # the rest of a sweep goes on
        tqdm.write(f"{settings.name} was not run: {refused}", file=sys.stderr)
        return False
    except FloatingPointError as diverged:  # a result, too: it would be so again
        error, measured = str(diverged), Measured()
        tqdm.write(f"{settings.name} ended: {error}", file=sys.stderr)
    record = records.make_record(
        settings, measured, preset=preset, device=device, data=parts.fingerprint, error=error
    )
    append(record, out)
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
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draws the gain over beta")
    parser.add_argument("--report", type=Path, metavar="MD", help="only renews a report's tables")
    options.add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
