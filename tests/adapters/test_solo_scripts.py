"""CLIMB in scripts of an untouched checkout of solo-learn, each in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import solo
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKOUT = Path(solo.__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("val", 4)):
        for label in range(5):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def start(*command: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
    )


def call(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    process = start(*command, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def pretraining(images: Path, *overrides: str) -> list[str]:
    return [
        str(CHECKOUT / "main_pretrain.py"),
        f"--config-path={ROOT / 'examples' / 'solo_learn'}",
        "--config-name=cpu_smoke.yaml",
        *overrides,
        f"data.train_path={images / 'train'}",
        "data.val_path=null",
        "++enable_progress_bar=false",
    ]


def pretrain(images: Path, cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return call(*pretraining(images, *overrides), cwd=cwd)


def logged(folder: Path) -> list[list[dict[str, str]]]:
    """metrics.csv of each run below a folder, in their order."""
    logs = sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    return [list(csv.DictReader(log.read_text().splitlines())) for log in logs]


def test_one_key_is_all(images: Path, tmp_path: Path) -> None:
    done = pretrain(images, tmp_path, "max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIMB:") == 1
    (rows,) = logged(tmp_path)
    assert float(rows[-1]["climb_rate"]) > 0
    (checkpoint,) = (tmp_path / "trained_models" / "dino").glob("*/*.ckpt")
    lines = []
    for _ in range(2):
        knn = call(
            *("-m", "climb_plugin.adapters.solo_knn"),
            *("--pretrained_checkpoint_dir", str(checkpoint.parent), "--dataset", "custom"),
            *("--train_data_path", str(images / "train"), "--val_data_path", str(images / "val")),
            *("--k", "5", "--num_workers", "0", "--feature_type", "backbone", "projector"),
            cwd=tmp_path,
        )
        lines.append(knn.stdout)
    assert lines[0].count("acc@1=") == 2, knn.stderr
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++method_kwargs.climb_bta=1", "did you mean climb_beta"),
        ("++climb_beta=1", "climb_beta has no effect: write method_kwargs.climb_beta"),
        ("++method_kwarg.climb_beta=1", "method_kwarg.climb_beta has no effect"),
    ],
)
def test_a_wrong_key_ends_the_script(
    images: Path, tmp_path: Path, override: str, message: str
) -> None:
    done = pretrain(images, tmp_path, override)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "trained_models").exists()


def test_a_killed_run_goes_on_by_auto_resume(images: Path, tmp_path: Path) -> None:
    beta = ("method_kwargs.climb_beta=0.5", "++method_kwargs.climb_warmup=0.5", "max_epochs=4")
    run = start(*pretraining(images, *beta, "name=run"), cwd=tmp_path)
    models = tmp_path / "trained_models" / "dino"
    deadline = time.monotonic() + 120
    while not any(map(zipfile.is_zipfile, models.glob("*/*ep=0.ckpt"))):  # written in full
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()

    again = pretrain(images, tmp_path, *beta, "name=run")
    assert again.returncode == 0, again.stderr
    assert "Resuming from previous checkpoint" in again.stdout
    rows = [row for row in logged(tmp_path)[-1] if row.get("climb_beta")]
    # Means of epochs of two batches, with a warm-up over the first four.
    whole = [0.0625, 0.3125, 0.5, 0.5]
    assert 1 <= len(rows) <= 3
    assert [float(row["climb_beta"]) for row in rows] == whole[-len(rows) :]

    other = pretrain(images, tmp_path, "method_kwargs.climb_beta=0.25", *beta[1:], "name=run")
    assert other.returncode == 0, other.stderr
    assert "Resuming" not in other.stdout


def test_two_processes(tmp_path: Path) -> None:
    done = call(str(HERE / "solo_runs.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 5
    assert first["parameters"] == second["parameters"]
    assert first["noise"] != second["noise"]
    assert first["prior"][0] > 0


def test_a_sweep_equals_runs_of_their_own(images: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "single").mkdir()
    off = ("auto_resume.enabled=false", "checkpoint.enabled=false", "max_epochs=1", "name=x")
    # solo-learn's logs and checkpoints know no folders of jobs, but Hydra changes into them.
    folders = ("hydra.sweep.dir=.", "hydra.sweep.subdir=.")
    betas = ("-m", "method_kwargs.climb_beta=0.001,0.01")
    swept = pretrain(images, tmp_path / "sweep", *betas, *off, *folders)
    assert swept.returncode == 0, swept.stderr
    single = pretrain(images, tmp_path / "single", *off, "method_kwargs.climb_beta=0.01")
    assert single.returncode == 0, single.stderr
    jobs, (alone,) = logged(tmp_path / "sweep"), logged(tmp_path / "single")
    assert len(jobs) == 2
    assert jobs[1] == alone != jobs[0]
    assert [row["climb_beta"] for row in alone if row["climb_beta"]]


def test_wandb_offline(images: Path, tmp_path: Path) -> None:
    wandb = ("++wandb.enabled=true", "++wandb.offline=true", "++wandb.project=climb")
    done = pretrain(images, tmp_path, "max_epochs=1", *wandb, "++log_every_n_steps=1")
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name in (b"climb_rate", b"climb_beta", b"climb_rate_step"):
        assert name in content


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from solo.methods import SimCLR  # by name, before anything of climb-plugin is loaded
import solo_runs
assert "climb_plugin.adapters.solo_learn" not in sys.modules
model, trainer, watch = solo_runs.train(SimCLR, solo_runs.config("simclr", climb_beta=0.1))
print("rate", float(model.climb.terms.rate), watch.losses)
"""


def test_a_script_without_hydra(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.format(folder=str(HERE)))
    done = call(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIMB:") == 1
    assert "rate" in done.stdout


def test_an_editable_install(images: Path, tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("climb_plugin", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # All but climb-plugin itself, which is installed from the sources.
    outer = [Path(path) for path in sys.path if path.endswith("site-packages")]
    site.mkdir()
    for package in (entry for folder in outer for entry in folder.iterdir()):
        if not package.name.startswith(("climb_plugin", "hydra_plugins", "__editable__")):
            target = site / package.name
            if not target.exists():
                target.symlink_to(package)
    (packages / "outer.pth").write_text(str(site))
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--editable"]
    subprocess.run([*install, str(source)], check=True, cwd=tmp_path)
    done = subprocess.run(
        [str(python), "-W", "ignore", *pretraining(images, "max_epochs=1")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIMB:") == 1


def test_other_hydra_programs_pay_nothing(tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "import sys, hydra\n"
        "@hydra.main(version_base='1.2')\n"
        "def main(cfg):\n"
        "    print('plugin' , 'hydra_plugins.climb_plugin' in sys.modules)\n"
        "    print([m for m in ('torch', 'solo', 'climb_plugin') if m in sys.modules])\n"
        "main()\n"
    )
    done = call(str(script), "hydra.run.dir=.", cwd=tmp_path)
    assert done.stdout.splitlines() == ["plugin True", "[]"], done.stderr


def test_other_trainers_pay_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, lightning.pytorch as pl\n"
        "trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator='cpu')\n"
        "print([type(c).__name__ for c in trainer.callbacks if 'Solo' in type(c).__name__])\n"
        "print([m for m in sys.modules if m.startswith(('climb_plugin.adapters.', 'omegaconf'))])\n"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr
