"""``make notebooks``: executes ``examples/0*.py`` and stores the result as ``.ipynb`` beside them.

The notebooks are written as Python files in jupytext's percent format. One that lacks something
which it cannot install itself says so and raises an exception of a class called
``StopNotebook``: that is no failure, and a stored run stays as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STOP = "StopNotebook"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(source: Path, seconds: float) -> str:
    """Executes a notebook in its folder, and stores it if it ran through.

    Args:
        source: The ``.py``.
        seconds: Time limit for all its cells together.

    Returns:
        How it ended: "stored" or "stopped".

    Raises:
        CellExecutionError: If a cell failed; what is stored stays.
        CellTimeoutError: If it took too long; what is stored stays.
        DeadKernelError: If its process ended; what is stored stays.
    """
    notebook = jupytext.read(source)
    # Numbered, not random, so that a run changes what it changed and no more.
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    # This interpreter, whatever kernel the user registered as python3.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    deadline = time.monotonic() + seconds
    client = NotebookClient(
        notebook,
        km=kernel,
        resources={"metadata": {"path": str(source.parent)}},
        timeout_func=lambda _: max(1, round(deadline - time.monotonic())),
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # it warns of its own connection, which is local
    )
    stopped = False
    try:
        client.execute(
            cleanup_kc=True,  # the process ends, though the manager is ours
            # tqdm's, on being imported without ipywidgets; it shows where it is installed.
            env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"},
        )
    except CellExecutionError as error:
        if error.ename != STOP:
            raise
        stopped = True
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [out for out in cell.outputs if out.get("ename") != STOP]
    notebook.metadata = nbformat.from_dict(METADATA)
    target = source.with_suffix(".ipynb")
    if not (stopped and target.exists()):
        store(notebook, target)
    return "stopped" if stopped else "stored"


def store(notebook: nbformat.NotebookNode, target: Path) -> None:
    """Writes a notebook; what was there stays whole until the new one is."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None, folder: Path = EXAMPLES) -> int:
    """Executes the notebooks that are named; returns how many failed."""
    parser = argparse.ArgumentParser(description="Executes the notebooks in examples/.")
    parser.add_argument("names", nargs="*", help="beginnings, as 01 (default: all)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each notebook")
    args = parser.parse_args(argv)
    sources = sorted(folder.glob("0*.py"))
    for name in args.names:
        if not any(source.name.startswith(name) for source in sources):
            parser.error(f"no notebook is called {name!r}: {[path.stem for path in sources]}")
    if args.names:
        sources = [path for path in sources if path.name.startswith(tuple(args.names))]

    failed, begun = 0, time.monotonic()
    for source in sources:
        start = time.monotonic()
        try:
            ended = execute(source, args.timeout)
        except CellTimeoutError:
            ended = f"FAILED: it takes longer than {args.timeout:g} s"
        except (CellExecutionError, DeadKernelError) as error:
            ended = f"FAILED\n{error}"
        failed += ended.startswith("FAILED")
        print(f"{source.stem}: {time.monotonic() - start:.0f} s, {ended}", flush=True)
    print(f"{len(sources)} notebooks, {failed} failed: {time.monotonic() - begun:.0f} s in all")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
