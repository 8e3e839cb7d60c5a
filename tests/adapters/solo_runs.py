"""Tiny runs of solo-learn's methods through its own loop; two processes when run as a script."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.ddp import DDPStrategy
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

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


def config(method: str, *, epochs: int = 1, **changes: Any) -> Any:
    """A solo-learn config; ``changes`` are dotted keys with __ for the dot."""
    base = {
        "name": "test",
        "method": method,
        "backbone": {"name": "resnet18"},
        "max_epochs": epochs,
        "devices": "1",
        "accelerator": "cpu",
        "data": {
            "dataset": "custom",
            "num_classes": 10,
            "num_large_crops": 2,
            "num_small_crops": 0,
            "train_path": ".",
            "val_path": None,
            "format": "image_folder",
            "num_workers": 0,
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
            **{key: value for key, value in changes.items() if key.startswith("climb")},
        },
    }
    cfg = OmegaConf.create(base)
    for key, value in changes.items():
        if not key.startswith("climb"):
            OmegaConf.update(cfg, key.replace("__", "."), value)
    OmegaConf.set_struct(cfg, False)
    return cfg


class Views(Dataset[Any]):
    """Two random views per image: augmentation draws from the host's random numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return index, [torch.randn(3, 32, 32), torch.randn(3, 32, 32)], index % 10


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def train(
    method: Any,
    cfg: Any,
    *callbacks: Any,
    batches: int = 2,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Any, Any, list[float]]:
    """Trains as main_pretrain.py does: model, trainer, and the loss of every step."""
    pl.seed_everything(5)
    model = method(cfg)
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=cfg.max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, *callbacks],
        **{"devices": 1, **options},
    )
    loader = DataLoader(Views(8 * batches), batch_size=8, shuffle=True, drop_last=True)
    trainer.fit(model, loader, ckpt_path=resume)
    return model, trainer, losses.values


def digest(model: Any) -> str:
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(v.detach().numpy().tobytes() for _, v in state)).hexdigest()


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
        parameters = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
        report = {
            "steps": trainer.global_step,
            "parameters": hashlib.sha256(parameters).hexdigest(),
            "noise": self.noise[0],
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(report))


def main() -> None:
    import solo.methods

    from climb_plugin.adapters.solo_learn import register

    register()
    train(
        solo.methods.METHODS["dino"],
        config("dino", climb_beta=1e-3),
        Report(Path(sys.argv[1])),
        batches=10,
        devices=2,
        strategy=DDPStrategy(find_unused_parameters=False, process_group_backend="gloo"),
    )


if __name__ == "__main__":
    main()
