"""A prior and a schedule of the user's own in a Lightning training, which may be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import load
from hosts import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from climb_plugin import wrap
from climb_plugin.adapters.lightning import ClimbCallback

kinds = load(Path(__file__).parents[1] / "test_own_kinds.py")
EPOCHS, BATCHES = 4, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore:.*(GPU|does not have many workers)"),
]


def model(pl: Any) -> Any:
    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
            self.criterion = wrap(
                nn.functional.mse_loss, student=self.net, beta=kinds.Follower(), prior=kinds.Scaled
            )
            self.betas: list[float] = []

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (rows,) = batch
            loss = self.criterion(self.net(rows), self.net(rows + 0.1))
            self.betas.append(float(self.criterion.terms.beta))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    return Model()


def fit(pl: Any, trained: Any, folder: Path, *, epochs: int, checkpoint: Path | None = None) -> Any:
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        callbacks=[ClimbCallback()],
        default_root_dir=folder,
        **QUIET,
    )
    if epochs < EPOCHS:  # killed, in a training that is to be longer
        trained.on_train_epoch_end = lambda: setattr(
            trainer, "should_stop", trained.current_epoch + 1 == epochs
        )
    rows = torch.randn(4 * BATCHES, 6, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(rows), batch_size=4, generator=torch.Generator())
    trainer.fit(trained, data, ckpt_path=checkpoint)
    return trainer


def test_they_are_laid_observed_saved_and_resumed(pl: Any, tmp_path: Path) -> None:
    whole = model(pl)
    fit(pl, whole, tmp_path, epochs=EPOCHS)
    half = EPOCHS * BATCHES // 2
    assert whole.criterion.schedule.half == half
    assert whole.criterion.schedule.factor != 1.0
    assert whole.betas[0] == pytest.approx(0.1 / half)

    killed = model(pl)
    trainer = fit(pl, killed, tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "killed.ckpt")
    resumed = model(pl)
    fit(pl, resumed, tmp_path, epochs=EPOCHS, checkpoint=tmp_path / "killed.ckpt")
    assert killed.betas + resumed.betas == whole.betas
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
