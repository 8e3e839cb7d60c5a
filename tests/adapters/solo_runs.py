"""Small runs of solo-learn's methods through its own loop.

    python tests/adapters/solo_runs.py

prints the table of methods of the documentation. With a folder as its argument it is one of two
processes that train together and leave there what they drew and ended with.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import solo.methods
import torch
from lightning.pytorch.strategies.ddp import DDPStrategy
from omegaconf import OmegaConf
from solo.methods.base import BaseMethod
from torch import nn
from torch.utils.data import DataLoader, Dataset

from climb_plugin import GaussianHead

PREDICTOR = {"pred_hidden_dim": 32}
QUEUE = {"queue_size": 64}
METHODS: dict[str, dict[str, Any]] = {
    "all4one": {**PREDICTOR, **QUEUE, "temperature": 0.2},
    "barlow_twins": {},
    "byol": PREDICTOR,
    "deepclusterv2": {"num_prototypes": [8, 8]},
    "dino": {"num_prototypes": 32},
    "mocov2plus": {**QUEUE, "temperature": 0.2},
    "mocov3": {**PREDICTOR, "temperature": 0.2},
    "nnbyol": {**PREDICTOR, **QUEUE},
    "nnclr": {**PREDICTOR, **QUEUE, "temperature": 0.2},
    "nnsiam": {**PREDICTOR, **QUEUE},
    "ressl": {**QUEUE, "temperature_q": 0.1, "temperature_k": 0.04},
    "simclr": {"temperature": 0.2},
    "simsiam": PREDICTOR,
    "supcon": {"temperature": 0.2},
    "swav": {"temperature": 0.1, "queue_size": 0, "num_prototypes": 16},
    "vibcreg": {},
    "vicreg": {},
    "wmse": {"whitening_size": 8, "whitening_eps": 1e-3, "proj_output_dim": 4},
}


class Tiny(nn.Sequential):
    """A backbone of a few milliseconds."""

    def __init__(self, method: str, **kwargs: Any) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU()
        )
        self.num_features = 16


BaseMethod._BACKBONES["tiny"] = Tiny  # where solo-learn's users add theirs


def config(method: str, *, epochs: int = 1, backbone: str = "tiny", **changes: Any) -> Any:
    """A solo-learn config; ``changes`` are keys of method_kwargs, or dotted keys with __."""
    base = {
        "name": "test",
        "method": method,
        "backbone": {"name": backbone},
        "max_epochs": epochs,
        "data": {
            "dataset": "custom",
            "num_classes": 10,
            "num_large_crops": 2,
            "num_small_crops": 0,
        },
        "optimizer": {
            "name": "sgd",
            "batch_size": 8,
            "lr": 0.05,
            "classifier_lr": 0.05,
            "weight_decay": 1e-4,
            "kwargs": {"momentum": 0.9},
        },
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 0},
        "momentum": {"base_tau": 0.9, "final_tau": 1.0},
        "method_kwargs": {
            "proj_hidden_dim": 64,
            "proj_output_dim": 32,
            **METHODS.get(method, {}),
            **{key: value for key, value in changes.items() if "__" not in key},
        },
    }
    cfg = OmegaConf.create(base)
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        if "__" in key:
            OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


class Views(Dataset[Any]):
    """Random views of each image: augmentation draws from the host's random numbers."""

    def __init__(self, count: int, sizes: tuple[int, ...]) -> None:
        self.count, self.sizes = count, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return index, [torch.randn(3, size, size) for size in self.sizes], index % 10


class Watch(pl.Callback):
    """The loss of every step, and beta where there is one."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.betas: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        if outputs:
            self.losses.append(float(outputs["loss"]))
        if outputs and "climb" in vars(module):
            self.betas.append(float(module.climb.terms.beta))


class SaveAt(pl.Callback):
    """A checkpoint at the end of an epoch, as solo-learn's Checkpointer saves it."""

    def __init__(self, path: Path, epoch: int = 0) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def train(
    method: Any,
    cfg: Any,
    *callbacks: Any,
    batches: int = 2,
    sizes: tuple[int, ...] = (32, 32),
    resume: Path | None = None,
    **options: Any,
) -> tuple[Any, Any, Watch]:
    """Trains as main_pretrain.py does: method, Trainer, and what was seen at every step.

    Args:
        method: A name, a class, or a method that is built already.
        cfg: What it is built with.
        *callbacks: More of them.
        batches: Steps of an epoch.
        sizes: Those of the crops.
        resume: A checkpoint.
        **options: Of the Trainer.
    """
    pl.seed_everything(5)
    method = solo.methods.METHODS[method] if isinstance(method, str) else method
    model = method if isinstance(method, pl.LightningModule) else method(cfg)
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=cfg.max_epochs,
        accelerator="cpu",
        callbacks=[watch, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    data = Views(8 * batches, sizes)
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    trainer.fit(model, loader, ckpt_path=resume)
    return model, trainer, watch


def digest(module: nn.Module) -> str:
    """Of all parameters and buffers."""
    state = sorted(module.state_dict().items())
    return hashlib.sha256(b"".join(v.detach().numpy().tobytes() for _, v in state)).hexdigest()


def table() -> Iterator[str]:
    """The table of methods: place of the head, its EMA twin, rates after two batches."""
    yield "| method | head at | EMA twin | rate at `projection` (width) | rate at `features` |"
    yield "| --- | --- | --- | --- | --- |"
    for name in METHODS:
        # deepclusterv2 has no clusters in its first epoch.
        epochs = 2 if name == "deepclusterv2" else 1
        cells = []
        for at in ("projection", "features"):
            cfg = config(name, epochs=epochs, backbone="resnet18", climb_beta=1e-3, climb_at=at)
            model, _, _ = train(name, cfg)
            head = model.climb.heads[0]
            cells.append(f"{float(model.climb.terms.rate):.2f} ({head.out_features})")
            if at == "projection":
                heads = [k for k, m in model.named_modules() if isinstance(m, GaussianHead)]
                (place,) = (k for k in heads if not k.startswith("momentum_"))
                twin = "yes" if len(heads) > 1 else "-"
        yield f"| {name} | `{place}` | {twin} | {cells[0]} | {cells[1]} |"


class Report(pl.Callback):
    """What each of two processes drew and ended with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.noise: list[Any] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.climb.heads[0].register_forward_hook(
            lambda _, args, sample: self.noise.append((sample - args[0])[0].tolist())
        )

    def on_train_end(self, trainer: Any, module: Any) -> None:
        report = {
            "steps": trainer.global_step,
            "parameters": hashlib.sha256(
                b"".join(p.detach().numpy().tobytes() for p in module.parameters())
            ).hexdigest(),
            "prior": [
                float(p.detach().abs().sum()) for p in module.climb.climb_priors.parameters()
            ],
            "noise": self.noise[0],
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(report))


def main() -> None:
    """Prints the table, or trains with another process."""
    torch.set_num_threads(1)
    if len(sys.argv) < 2:
        warnings.simplefilter("ignore")
        print(*table(), sep="\n")
        return
    strategy = DDPStrategy(find_unused_parameters=False, process_group_backend="gloo")
    cfg = config("dino", climb_beta=1e-3, climb_prior="learned")
    train("dino", cfg, Report(Path(sys.argv[1])), batches=10, devices=2, strategy=strategy)


if __name__ == "__main__":
    main()
