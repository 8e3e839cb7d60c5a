"""examples/quickstart.py --checkpoint: killed at any moment, it goes on as if nothing had been."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kills
import torch

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples" / "quickstart.py"
EPOCHS, STEPS = 3, 2  # steps of an epoch


def arguments(folder: Path, *more: str) -> list[str]:
    short = ["--epochs", str(EPOCHS), "--images", str(64 * STEPS)]
    return [*short, "--out", str(folder / "o.png"), "--checkpoint", str(folder / "c.pt"), *more]


def prepare() -> None:
    """In the process of which what is killed is a fork."""
    kills.load(SCRIPT)


def run(folder: Path, *, method: str, die: list[Any] | None = None) -> None:
    """What is killed: in a process of its own."""
    if die is not None:
        die_while_saving(*die)
    runs = sys.modules[SCRIPT.stem].main(arguments(folder, "--method", method))
    saved = torch.load(folder / "c.pt", weights_only=True)
    del saved["runs"]
    result = {run.name: json.dumps(asdict(run)) for run in runs}
    result |= {key: kills.digest(value) for key, value in saved.items()}
    result |= {key: kills.digest(value) for key, value in saved["state"].items()}
    (folder / "result.json").write_text(json.dumps(result))


def die_while_saving(stage: str, number: int) -> None:
    """Dies at the ``number``-th checkpoint: half through, before or after it takes its place."""
    save, replace = torch.save, os.replace
    saves, replaces = itertools.count(1), itertools.count(1)

    def half(content: Any, file: Any) -> None:
        if stage == "half" and next(saves) == number:
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            kills.die()
        save(content, file)

    def around(source: Any, target: Any) -> None:
        last = stage != "half" and next(replaces) == number
        if last and stage == "before":
            kills.die()
        replace(source, target)
        if last:
            kills.die()

    torch.save, os.replace = half, around


def steps_done(folder: Path) -> int:
    """Whatever happened, the file is a whole one, or there has been none yet."""
    if not (folder / "c.pt").exists():
        return 0
    runs = torch.load(folder / "c.pt", weights_only=True)["runs"]
    return STEPS * sum(len(run["base_loss"]) for run in runs)


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    with kills.Runs(Path(__file__)) as runs:
        lines = runs.tally(
            tmp_path,
            {"method": "dino"},
            done=steps_done,
            epoch=STEPS,
            # After the fourth: within the run with CLIMB.
            in_writing=(["after", 4], ["half", 1], ["half", 2], ["before", 1]),
        )
    print("\n".join(lines))
    assert len(lines) == kills.KILLS + 4
    for folder in tmp_path.iterdir():
        # A kill in the middle of drawing leaves half a drawing beside the whole one.
        left = {p.name for p in folder.iterdir() if not p.name.startswith(".o.png.")}
        assert left == {"c.pt", "o.png", "output.txt", "result.json", "steps"}
