"""examples/quickstart.py: what it measures, what it leaves behind, what it refuses."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from by_path import load
from PIL import Image
from torchvision.datasets import CIFAR10

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"
SHORT = ["--epochs", "1", "--images", "128"]
RATES = ("rate (nats)", "rate (bits)", "active dimensions (of 64)")


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load(SCRIPT)


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cells(table: str) -> dict[str, list[str]]:
    """Rows of the printed table by label; untrained, plain, CLIMB."""
    rows = [line.rsplit(maxsplit=3) for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 4 and row[0].endswith(")")}


@pytest.mark.parametrize("method", ["dino", "simclr", "byol"])
def test_measures_both_runs(
    quickstart: ModuleType, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.png"
    plain, climb = quickstart.main([*SHORT, "--method", method, "--out", str(out)])

    for run in (plain, climb):
        assert len(run.base_loss) == 1
        assert math.isfinite(run.base_loss[0])
        assert len(run.student) == len(run.teacher) == 2
        assert all(0 <= accuracy <= 100 for accuracy in run.student)
        assert all(math.isnan(accuracy) == (method == "simclr") for accuracy in run.teacher)
    assert math.isnan(plain.rate[0])
    assert math.isnan(plain.active)
    assert math.isfinite(climb.rate[0])
    assert climb.rate[0] > 0
    assert 0 < climb.active <= 64

    printed = capsys.readouterr().out
    table = cells(printed)
    assert len(table) == 6, table
    assert table["k-NN accuracy, student (%)"] == [
        f"{value:.2f}" for value in (plain.student[0], plain.student[1], climb.student[1])
    ]
    assert [table[label][:2] for label in RATES] == [["-", "-"]] * 3
    nats, bits = (float(table[label][2]) for label in RATES[:2])
    assert bits == pytest.approx(nats / math.log(2), abs=0.02)
    assert "One seed proves nothing" in printed
    with Image.open(out) as drawing:
        assert drawing.format == "PNG"
        drawing.verify()


def test_the_runs_are_twins(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str, str]] = []
    forward = quickstart.Learner.forward

    def spy(model: torch.nn.Module, views: list[torch.Tensor]) -> Any:
        weights = [t for name, t in model.state_dict().items() if "gaussian" not in name]
        seen.append((id(model), digest(weights), digest(views)))
        return forward(model, views)

    monkeypatch.setattr(quickstart.Learner, "forward", spy)
    arguments = ["--epochs", "2", "--images", "128", "--out", str(tmp_path / "curves.png")]
    quickstart.main(arguments)

    plain, climb = seen[:4], seen[4:]
    assert len(climb) == 4
    assert plain[0][1] == climb[0][1]  # the weights before the first step
    assert plain[3][1] != climb[3][1]  # CLIMB does something
    assert [views for _, _, views in plain] == [views for _, _, views in climb]
    assert len({views for _, _, views in plain}) == 4

    seen.clear()
    quickstart.main([*arguments, "--seed", "1"])
    assert seen[0][1:] != plain[0][1:]


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def test_without_beta_the_runs_are_one(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SHORT, "--beta", "0", "--out", str(tmp_path / "curves.png")]
    plain, climb = quickstart.main(arguments)
    assert climb.base_loss == plain.base_loss
    assert climb.student == plain.student
    assert climb.teacher == plain.teacher
    printed = capsys.readouterr().out
    assert [cells(printed)[label] for label in RATES] == [["-", "-", "-"]] * 3
    assert "CLIMB is equal to plain (0 of 128 test images)" in printed


@pytest.mark.parametrize("owner", ["Learner.update_teacher", "Figure.savefig"])
def test_an_interrupted_run_leaves_the_drawing(
    quickstart: ModuleType, owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "curves.png"
    out.write_bytes(b"the drawing of the last run")

    def interrupted(self: Any, target: Any, **_: Any) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"half a drawi")
        raise KeyboardInterrupt

    name, method = owner.split(".")
    monkeypatch.setattr(getattr(quickstart, name), method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.main([*SHORT, "--method", "byol", "--out", str(out)])
    assert out.read_bytes() == b"the drawing of the last run"
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def checkpoint(quickstart: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    file = folder / "run.pt"
    quickstart.main([*SHORT, "--out", str(folder / "curves.png"), "--checkpoint", str(file)])
    return file.read_bytes()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda whole: whole, ["--seed", "1"], "it was made with --seed 0, not 1. It was left"),
        (
            lambda whole: whole,
            ["--beta", "0.1", "--method", "byol"],
            "it was made with --beta 0.01, not 0.1; --method dino, not byol. It",
        ),
        (lambda whole: whole[: len(whole) // 2], [], "not a whole checkpoint of this script"),
        (lambda whole: whole[:-1], [], "not a whole checkpoint of this script"),
        (lambda whole: b"", [], "not a whole checkpoint of this script (EOFError"),
        (lambda whole: b"notes of mine", [], "not a whole checkpoint of this script (Unpickling"),
        (lambda whole: saved([1, 2]), [], "not a whole checkpoint of this script (TypeError"),
        (
            lambda whole: saved({"state_dict": {}}),
            [],
            "not a whole checkpoint of this script (KeyError: 'quickstart')",
        ),
        (lambda whole: saved(Code()), [], "not a whole checkpoint of this script (Unpickling"),
    ],
)
def test_refuses_a_foreign_checkpoint(
    quickstart: ModuleType,
    checkpoint: bytes,
    change: Callable[[bytes], bytes],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "load_images", lambda *_: pytest.fail("it went on"))
    file = tmp_path / "run.pt"
    file.write_bytes(change(checkpoint))
    before = file.read_bytes()
    with pytest.raises(SystemExit) as stop:
        quickstart.main([*SHORT, "--checkpoint", str(file), *arguments])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"cannot go on from {file}: it" in said
    assert message in said
    assert "It was left as it is: give --checkpoint another name" in said
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


class Code:
    """What a checkpoint must not be able to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the checkpoint was executed",)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_an_error_while_saving_leaves_the_checkpoint(
    quickstart: ModuleType, checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.pt"
    arguments = ["--epochs", "2", *SHORT[2:], "--checkpoint", str(file)]
    save, seen = torch.save, []

    def full(content: Any, target: Any) -> None:
        if seen:
            target.write(b"half a check")
            raise OSError("no space left")
        save(content, target)
        seen.append(content)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        quickstart.main([*arguments, "--out", str(tmp_path / "curves.png")])
    left = torch.load(file, weights_only=True)["runs"]
    assert str(left) == str(seen[0]["runs"])  # there is a NaN in it
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_kill_has_left_is_removed(
    quickstart: ModuleType, checkpoint: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "run[1].pt"
    file.write_bytes(checkpoint)
    others = [tmp_path / ".run1.pt.7.unfinished", tmp_path / ".run[1].pt.of_mine"]
    leftover = tmp_path / ".run[1].pt.7.unfinished"
    for path in (*others, leftover):
        path.write_bytes(b"half a check")
    out = tmp_path / "curves.png"
    quickstart.main([*SHORT, "--out", str(out), "--checkpoint", str(file)])
    assert set(tmp_path.iterdir()) == {file, out, *others}
    assert file.read_bytes() == checkpoint  # nothing was left to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "moco"], "--method: invalid choice: 'moco' (choose from"),
        (["--beta", "-1"], "--beta: must be finite and at least 0.0, got -1"),
        (["--beta", "nan"], "--beta: must be finite and at least 0.0, got nan"),
        (["--beta", "much"], "--beta: invalid number value: 'much'"),
        (["--epochs", "0"], "--epochs: must be finite and at least 1, got 0"),
        (["--epochs", "2.5"], "--epochs: invalid number value: '2.5'"),
        (["--seed", "-1"], "--seed: must be finite and at least 0, got -1"),
        (["--seed", str(2**32)], "--seed must be less than 2**32, got 4294967296"),
        (["--images", "10"], "--images: must be finite and at least 64, got 10"),
        (["--threads", "0"], "--threads: must be finite and at least 1, got 0"),
        (["--data", "mnist"], "--data: invalid choice: 'mnist'"),
        (["--data", "cifar10"], "--data cifar10 and --data-root DIR go together"),
        (["--data-root", "here"], "--data cifar10 and --data-root DIR go together"),
        (["--out", "curves.pdf"], "--out must be a .png in a folder that can be written to"),
        (["--out", "no/such/folder/curves.png"], "--out must be a .png in a folder that can"),
        (["--checkpoint", "no/such/folder/run.pt"], "--checkpoint must be in a folder that can"),
        (["--checkpoint", "quickstart.png"], "and not --out, got quickstart.png"),
        (["--gamma", "1"], "unrecognized arguments: --gamma 1"),
    ],
)
def test_refuses_before_training(
    quickstart: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "load_images", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        quickstart.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_trains_on_cifar10(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar10(tmp_path, monkeypatch)
    arguments = ["--data", "cifar10", "--data-root", str(tmp_path), "--method", "simclr"]
    _, climb = quickstart.main([*SHORT, *arguments, "--out", str(tmp_path / "curves.png")])
    assert climb.rate[0] > 0

    images = quickstart.load_images("cifar10", tmp_path, None)
    assert (len(images.train), len(images.test), images.channels) == (160, 64, 3)
    pixels, labels = images.whole(images.train[:3])
    assert pixels.shape == (3, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2]
    assert [view.shape[-1] for view in images.views(local=2)(images.train[0][0])] == [
        32,
        32,
        16,
        16,
    ]


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the layout of CIFAR-10, of which torchvision takes the checksums from us."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(count: int) -> dict[str, Any]:
        pixels = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return {"data": pixels, "labels": [index % 10 for index in range(count)]}

    train = [[name, write(name, batch(32))] for name, _ in CIFAR10.train_list]
    test = [[name, write(name, batch(64))] for name, _ in CIFAR10.test_list]
    labels = write("batches.meta", {"label_names": [str(index) for index in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": labels})


def test_says_what_to_do_without_cifar10(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_network(self: CIFAR10) -> None:
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--data", "cifar10", "--data-root", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"CIFAR-10 is not in {tmp_path} and could not be downloaded (no network)" in message
    assert "put cifar-10-python.tar.gz from" in message


def test_help_says_every_default() -> None:
    asked = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    # argparse breaks lines anywhere; --data-root and --checkpoint have no default.
    assert " ".join(asked.stdout.split()).count("(default: ") == 8
    assert "in units of the base loss per nat" in " ".join(asked.stdout.split())


@pytest.mark.parametrize(
    ("climb", "words"),
    [
        (92.0, "CLIMB is 2.00 points above plain (9 of 450 test images)"),
        (88.0, "CLIMB is 2.00 points below plain (9 of 450 test images)"),
        (90.0, "CLIMB is equal to plain (0 of 450 test images)"),
    ],
)
def test_says_which_way_it_fell(quickstart: ModuleType, climb: float, words: str) -> None:
    runs = [quickstart.Run("", student=[accuracy]) for accuracy in (90.0, climb)]
    assert words in quickstart.compare(*runs, 450)
