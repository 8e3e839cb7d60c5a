"""All that is to be measured on a GPU, in stages that can be stopped: most valuable first.

    make gpu ARGS="--data cifar10.npz --out results"

A stage that is done is not run again, one that was stopped is taken up, and one that cannot run
says why and does not stop the next. ``--out`` gets a line for each stage at once
(``stages.jsonl``), the runs of the study (``runs.jsonl``) and a log of each stage. On a machine
without a network, ``--wheels`` holds what the machine lacks. ``--dry-run`` runs every stage on the
CPU, at toy size. GPU.md beside this file tells the stages, and what they cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import machine, records, toy
from gpu.queue import Call, Folders
from gpu.stages import EXAMPLES, ROOT, SWEEP, Stage, stages
from knn_study.lines import revision


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the queue; returns 1 if a stage is left to do or failed."""
    parser = make_parser()
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.time_limit
    if args.before is not None and not args.before.is_dir():
        parser.error(f"--before {args.before} is no folder: leave the option away in a first call")
    folders = prepared(args)
    planned = plan(args, folders)
    names = [stage.name for stage in planned]
    for name in [*args.only, *args.again]:
        if name not in names:
            parser.error(f"no stage {name}: there are {', '.join(names)}")
    site = folders.work / "site" if args.wheels else None
    if site is not None:
        try:
            if problem := machine.install(args.wheels, ROOT, site):
                print(f"not installed: {problem}", flush=True)
        except ValueError as error:
            parser.error(str(error))
    environment = machine.environment(site)
    # In a folder without climb_plugin's source, which has no adapters.
    there = machine.ask(
        [module for stage in planned for module in stage.modules], environment, EXAMPLES
    )
    print(f"{there.device or 'no GPU'}; {listed(there.versions)}", flush=True)
    call = Call(
        folders=folders,
        machine=there,
        environment=environment,
        revision=args.revision or revision(ROOT),
        dry_run=args.dry_run,
        deadline=deadline,
        again=args.again,
    )
    try:
        good = call.go([stage for stage in planned if stage.name in (args.only or names)])
    except RuntimeError as error:
        parser.error(str(error))
    return 0 if good else 1


def prepared(args: argparse.Namespace) -> Folders:
    """The folders, with what a former call left."""
    out, work = args.out.resolve(), (args.work / ("dry" if args.dry_run else "gpu")).resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    if args.before is not None:
        records.take_over(args.before, out)
    return Folders(out, work)


def plan(args: argparse.Namespace, folders: Folders) -> list[Stage]:
    """The stages; a dry run makes images, and takes the first runs of the sweep."""
    data, sweep = args.data.resolve(), SWEEP
    if args.dry_run:
        data, sweep = folders.work / "images.npz", folders.work / SWEEP.name
        if not data.exists():
            toy.write_images(data)
        sweep.write_text(toy.first_lines(SWEEP, 4))
    carried = data.suffix == ".npz" or args.wheels  # else torchvision downloads into a folder
    return stages(
        dry_run=args.dry_run,
        data=data,
        files=(data,) if carried else (),
        runs=folders.runs,
        sweep=sweep,
        jobs=args.jobs,
        epochs=args.epochs,
    )


def listed(versions: dict[str, str]) -> str:
    """Names and versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    build = ROOT / "build"
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    parser.add_argument(
        "--data", type=Path, default=Path("datasets"), help="CIFAR-10: an .npz, or a folder"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to install, with this checkout"
    )
    parser.add_argument(
        "--out", type=Path, default=build / "gpu-results", help="results: small files"
    )
    parser.add_argument("--before", type=Path, help="--out of a former call, to go on from")
    parser.add_argument(
        "--work", type=Path, default=build / "gpu-work", help="checkpoints, which are large"
    )
    parser.add_argument("--only", type=names, default=[], help="names of stages: a,b")
    parser.add_argument("--again", type=names, default=[], help="run these although done")
    parser.add_argument("--jobs", type=int, default=3, help="runs of the study at once")
    parser.add_argument("--epochs", type=int, default=100, help="of each run of the study")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds of this call")
    parser.add_argument("--revision", default="", help="of the code, where git does not tell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
