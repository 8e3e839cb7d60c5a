"""A lightly module in a Lightning Trainer: killed at any moment, it ends as if nothing had been."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from hosts import LIGHTNINGS, QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

pytest.importorskip("lightly")

EPOCHS, STEPS, BATCH = 6, 5, 8


class Shuffled(Sampler[int]):
    """An order of its own for every epoch, which Lightning tells it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        return iter(order.tolist())

    def __len__(self) -> int:
        return STEPS * BATCH


def make(pl: Any, setting: str) -> Any:
    """A LightningModule with everything that a checkpoint must hold."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    from climb_plugin.adapters.lightly import wrap
    from climb_plugin.schedule import Linear, TargetRate

    options: dict[str, Any] = {
        "target": {"beta": TargetRate(3.0, beta=0.01), "prior": "learned"},
        "warmup": {"beta": Linear(0.1, warmup=0.8)},
    }[setting]

    class SimCLR(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1))
            self.head = SimCLRProjectionHead(16, 16, 4)
            self.criterion = wrap(NTXentLoss(), student=self.head, **options)
            self.seen: list[tuple[float, ...]] = []

        def on_train_epoch_start(self) -> None:
            # Lightning saves no random numbers: augmentations and dropout.
            torch.manual_seed(1000 + self.current_epoch)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            views = [batch[0] + 0.3 * torch.randn_like(batch[0]) for _ in range(2)]
            loss: Tensor = self.criterion(*(self.head(self.backbone(view)) for view in views))
            self.seen.append(tuple(float(term) for term in self.criterion.terms))
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS)
            return [optimizer], [{"scheduler": decay, "interval": "step"}]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = self.seen

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["seen"]

    return SimCLR()


def newest_whole(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint with the most steps among those that load; a kill may cut one short."""
    found: dict[Path, int] = {}
    for path in folder.glob("*.ckpt"):
        try:
            found[path] = torch.load(path, weights_only=True)["global_step"]
        except Exception:
            continue
    best = max(found, key=lambda path: found[path], default=None)
    return best, 0 if best is None else found[best]


def prepare() -> None:
    """In the process of which what is killed is a fork."""
    import lightly.loss
    import lightly.models.modules  # noqa: F401

    for package in LIGHTNINGS:
        import_module(package)


def run(
    folder: Path,
    *,
    package: str,
    setting: str,
    die: list[Any] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """What is killed: in a process of its own."""
    tempfile.tempdir = str(folder)
    if die is not None:
        die_while_saving(*die)
    pl = import_module(package)
    callbacks = import_module(f"{package}.callbacks")
    from climb_plugin.adapters.lightning import ClimbCallback

    model = make(pl, setting)
    keep = callbacks.ModelCheckpoint(str(folder), save_last=True, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        default_root_dir=folder,
        callbacks=[ClimbCallback(), keep],
        **{**QUIET, "enable_checkpointing": True},
    )
    images = torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(0))
    # With a generator of its own it takes none of the random numbers seeded above: Lightning asks
    # for its iterator before on_train_epoch_start in the first epoch of a start, else after it.
    own = torch.Generator()
    data = DataLoader(TensorDataset(images), BATCH, sampler=Shuffled(), generator=own)
    best, steps_done = newest_whole(folder)
    trainer.fit(model, data, ckpt_path=ckpt_path or (best and str(best)))
    saved = torch.load(newest_whole(folder)[0], weights_only=True)
    result = {name: kills.digest(saved[name]) for name in ("state_dict", "optimizer_states")}
    result["climb"] = json.dumps(model.criterion.climb_state())
    if steps_done < EPOCHS * STEPS:  # a training that was over logs nothing
        result["logged"] = kills.digest(dict(trainer.callback_metrics))
    result["seen"] = json.dumps(model.seen)
    (folder / "result.json").write_text(json.dumps(result))


def die_while_saving(stage: str, number: int) -> None:
    """Dies at the ``number``-th file that Lightning writes: half through, or just after."""
    from fsspec.implementations.local import LocalFileOpener

    writes = itertools.count(1)

    def write(self: Any, content: bytes) -> int:
        last = next(writes) == number
        written: int = self.f.write(content[: len(content) // 2] if last else content)
        if last and stage == "half":
            self.f.flush()
            os.fsync(self.f.fileno())
            kills.die()
        return written

    LocalFileOpener.write = write


@pytest.fixture(scope="module")
def runs() -> Iterator[Any]:
    with kills.Runs(Path(__file__)) as server:
        yield server


@pytest.mark.parametrize(
    ("package", "setting"), list(zip(LIGHTNINGS, ("target", "warmup"), strict=False))
)
def test_killed_at_any_moment_it_ends_the_same(
    runs: Any, tmp_path: Path, package: str, setting: str
) -> None:
    lines = runs.tally(
        tmp_path,
        {"package": package, "setting": setting},
        done=lambda folder: newest_whole(folder)[1],
        epoch=STEPS,
        in_writing=(["half", 1], ["half", 2]),
    )
    print("\n".join(lines))
    assert len(lines) == kills.KILLS + 2


@pytest.mark.parametrize("package", LIGHTNINGS)
def test_a_truncated_checkpoint_is_refused(runs: Any, tmp_path: Path, package: str) -> None:
    """By torch, before anything is trained or written; its words depend on where it is cut."""
    options = {"package": package, "setting": "warmup"}
    assert runs.live(tmp_path, {**options, "die": ["half", 3]}).killed
    short = tmp_path / "epoch=1-step=10-short.ckpt"
    whole, _ = newest_whole(tmp_path)
    assert whole is not None
    short.write_bytes(whole.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    with pytest.raises(
        AssertionError, match=r"torch\.load\((?s:.*)(PytorchStreamReader failed|OSError)"
    ):
        runs.live(tmp_path, {**options, "ckpt_path": str(short)})
    assert {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")} == before
