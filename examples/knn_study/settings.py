"""All that the numbers of a run depend on, and its name."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

METHODS = ("dino", "simclr", "byol", "moco", "simsiam", "barlowtwins", "vicreg", "swav")
BACKBONES = ("small", "residual", "resnet18", "resnet50", "efficientnet_b0")
REGULARISERS = ("untrained", "plain", "climb", "noise", "norm", "invariance", "decay")
LOGVARS = ("linear", "shared")
PRECISIONS = ("float32", "bfloat16")


def option(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    least: float = 0,
    most: float = math.inf,
) -> Any:
    """A setting with its explanation, and what it may be."""
    bounds = {"least": least, "most": most}
    return field(default=default, metadata={"help": text, "choices": choices, **bounds})


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are those of a GPU; ``PRESETS`` holds others.

    Raises:
        ValueError: If a value is not among the choices, or too small.
    """

    method: str = option("dino", "what is trained", METHODS)
    backbone: str = option("resnet18", "the network", BACKBONES)
    seed: int = option(0, "of weights, order, views and noise")
    # The data
    images: int = option(45_000, "training images, of 45,000", least=1)
    bank: int = option(45_000, "labelled training images that the k-NN knows", least=200)
    pixels: int = option(32, "edge of a large view; a small one has half of that", least=8, most=32)
    crop: float = option(0.2, "smallest share of the image in a large view", most=1)
    local_views: int = option(4, "of DINO: small views beside the two large")
    mismatched: float = option(
        0.0, "fraction of images whose other views show another image", most=1
    )
    # The training
    epochs: int = option(100, "passes over the images", least=1)
    batch: int = option(256, "images in a step", least=2)
    optimizer: str = option("sgd", "momentum 0.9 for sgd", ("sgd", "adamw"))
    lr: float = option(0.12, "learning rate at its highest: warm-up of 5 %, then a cosine")
    weight_decay: float = option(5e-4, "of all parameters")
    momentum: float = option(0.99, "of the teacher at the start; a cosine takes it to 1", most=1)
    temperature: float = option(0.5, "of SimCLR and MoCo")
    teacher_temperature: float = option(0.04, "of DINO", least=1e-3)
    standardised: int = option(0, "1: batch norm without parameters behind the backbone", most=1)
    precision: str = option("float32", "of the networks; the loss is float32", PRECISIONS)
    hidden: int = option(2048, "width inside projection and prediction heads", least=1)
    embedding: int = option(256, "width at the end of the projection", least=2)
    prototypes: int = option(2048, "of DINO and SwAV", least=2)
    # The regulariser
    regulariser: str = option("plain", "what is added to the loss", REGULARISERS)
    beta: float = option(0.0, "its weight; of decay: added to weight_decay")
    at: str = option("projection", "where it acts", ("projection", "features"))
    prior: str = option("standard", "of climb", ("standard", "learned", "view", "backward"))
    alpha: float = option(0.0, "of climb: weight of the entropy beside the rate")
    free_nats: float = option(0.0, "of climb: rate that costs nothing")
    warmup: float = option(0.0, "of climb: fraction of the training in which beta rises from 0")
    target_rate: float = option(0.0, "of climb: nats to be held by adapting beta; 0: fixed beta")
    init_std: float = option(0.1, "of climb and noise: std at the start", least=1e-3)
    fixed_std: int = option(0, "of climb and noise: 1 keeps the std as it is at the start")
    logvar: str = option("linear", "of climb and noise: form of the log-variance", LOGVARS)
    # The measurement
    every: int = option(10, "epochs from one k-NN on the validation images to the next", least=1)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, allowed = getattr(self, entry.name), entry.metadata
            if allowed["choices"] is not None:
                if value not in allowed["choices"]:
                    known = ", ".join(allowed["choices"])
                    raise ValueError(f"{entry.name} must be one of {known}, got {value!r}")
            elif not (math.isfinite(value) and allowed["least"] <= value <= allowed["most"]):
                raise ValueError(
                    f"{entry.name} must be from {allowed['least']} to {allowed['most']}, "
                    f"got {value!r}"
                )
        if self.warmup and self.target_rate:
            raise ValueError("warmup has no effect with target_rate: leave one of them away")
        if "beta" in USED[self.regulariser] and not (self.beta or self.target_rate):
            raise ValueError(f"regulariser={self.regulariser!r} needs beta > 0, got {self.beta}")
        idle = [name for name in REGULARISATION[1:] if self._idle(name)]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} would have no effect with regulariser={self.regulariser!r}"
            )

    def _idle(self, name: str) -> bool:
        default = type(self).__dataclass_fields__[name].default
        return getattr(self, name) != default and name not in USED[self.regulariser]

    @property
    def name(self) -> str:
        """A short name that no other settings have."""
        # Only what is not at its default: a setting that is added later renames no run.
        chosen = {e.name: v for e in fields(self) if (v := getattr(self, e.name)) != e.default}
        text = json.dumps(chosen, sort_keys=True)
        return f"{self.method}-{self.regulariser}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


REGULARISATION = (
    "regulariser",
    "beta",
    "at",
    "prior",
    "alpha",
    "free_nats",
    "warmup",
    "target_rate",
    "init_std",
    "fixed_std",
    "logvar",
)
"""The settings in which a run and its plain twin differ."""

USED: dict[str, set[str]] = {
    "untrained": set(),
    "plain": set(),
    "climb": set(REGULARISATION),
    "noise": {"at", "init_std", "fixed_std", "logvar"},
    "norm": {"beta", "at"},
    "invariance": {"beta", "at"},
    "decay": {"beta"},
}
"""The settings that each regulariser looks at."""

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"precision": "bfloat16"},
    "cpu": {
        "backbone": "small",
        "images": 4_000,
        "bank": 4_000,
        "local_views": 2,
        "epochs": 20,
        "batch": 128,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 1e-4,
        "hidden": 256,
        "embedding": 64,
        "prototypes": 256,
        "every": 10,
    },
}
"""What a preset changes."""
