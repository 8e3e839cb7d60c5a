"""lightly's methods as their benchmarks build them, on networks for images of 32x32 pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from knn_study.settings import Settings

Views = list[Tensor]

# ---- Networks ------------------------------------------------------------------------------------


def make_backbone(name: str) -> tuple[nn.Module, int]:
    """A network from images to features (B, N), and N; ImageNet's stems take smaller steps here."""
    if name == "small":
        return _small()
    if name == "residual":
        return _residual()
    if name == "efficientnet_b0":
        network = torchvision.models.efficientnet_b0()
        network.features[0][0].stride = (1, 1)
        features = network.classifier[1].in_features
        network.classifier = nn.Identity()
        return network, features
    network = getattr(torchvision.models, name)(zero_init_residual=True)
    features = network.fc.in_features
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = network.fc = nn.Identity()
    return network, features


def _small() -> tuple[nn.Module, int]:
    """Four convolutions: some seconds for a thousand images on one core."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers.append(nn.Conv2d(before, after, 3, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / stride, W / stride)."""
        return F.relu(self.layers(images) + self.shortcut(images))


def _residual() -> tuple[nn.Module, int]:
    """Three residual blocks behind a stem of stride 2: for images of 16 pixels on one core."""
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [_Block(32, 32, 1), _Block(32, 64, 2), _Block(64, 128, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128


# ---- Losses that see a whole step ----------------------------------------------------------------


class BothWays(nn.Module):
    """Half the sum of a loss of (student's view 0, target's view 1), and the other way round."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Views, target: Views) -> Tensor:
        """A scalar."""
        total: Tensor = self.loss(student[0], target[1]) + self.loss(student[1], target[0])
        return total / 2


class SwaV(nn.Module):
    """lightly's loss, of the prototypes' scores of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = SwaVLoss()

    def forward(self, scores: Views) -> Tensor:
        """A scalar."""
        loss: Tensor = self.loss(scores, [])
        return loss


# ---- Methods -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What tells the methods apart.

    Attributes:
        head: The projection head, for a width of features.
        loss: The criterion, which is called with what :meth:`Learner.forward` returns.
        teacher: Whether there is a momentum copy of backbone and head.
        predictor: What follows the student's projection, if something does.
    """

    head: Callable[[int, Settings], nn.Module]
    loss: Callable[[Settings], nn.Module]
    teacher: bool = False
    predictor: Callable[[Settings], nn.Module] | None = None


METHODS = {
    "dino": Method(
        lambda n, s: DINOProjectionHead(
            n, s.hidden, s.embedding, s.prototypes, batch_norm=True, freeze_last_layer=1
        ),
        lambda s: DINOLoss(
            s.prototypes,
            warmup_teacher_temp=s.teacher_temperature,
            teacher_temp=s.teacher_temperature,
        ),
        teacher=True,
    ),
    "simclr": Method(
        lambda n, s: SimCLRProjectionHead(n, s.hidden, s.embedding),
        lambda s: NTXentLoss(s.temperature),
    ),
    "byol": Method(
        lambda n, s: BYOLProjectionHead(n, s.hidden, s.embedding),
        lambda s: BothWays(NegativeCosineSimilarity()),
        teacher=True,
        predictor=lambda s: BYOLPredictionHead(s.embedding, s.hidden, s.embedding),
    ),
    "moco": Method(
        lambda n, s: MoCoProjectionHead(n, s.hidden, s.embedding),
        lambda s: BothWays(NTXentLoss(s.temperature, memory_bank_size=(4096, s.embedding))),
        teacher=True,
    ),
    "simsiam": Method(
        lambda n, s: SimSiamProjectionHead(n, s.hidden, s.embedding),
        lambda s: BothWays(NegativeCosineSimilarity()),
        predictor=lambda s: SimSiamPredictionHead(s.embedding, s.hidden // 4 or 1, s.embedding),
    ),
    "barlowtwins": Method(
        lambda n, s: BarlowTwinsProjectionHead(n, s.hidden, s.hidden), lambda s: BarlowTwinsLoss()
    ),
    "vicreg": Method(
        lambda n, s: VICRegProjectionHead(n, s.hidden, s.hidden), lambda s: VICRegLoss()
    ),
    "swav": Method(
        lambda n, s: SwaVProjectionHead(n, s.hidden, s.embedding),
        lambda s: SwaV(),
        predictor=lambda s: SwaVPrototypes(s.embedding, s.prototypes),
    ),
}


class Learner(nn.Module):
    """Backbone, projection head and what else the method trains, and its momentum copy."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        method = METHODS[settings.method]
        self.backbone, features = make_backbone(settings.backbone)
        self.norm, self.teacher_norm = (
            nn.BatchNorm1d(features, affine=False) if settings.standardised else nn.Identity()
            for _ in range(2)
        )
        self.head = method.head(features, settings)
        self.predictor = method.predictor(settings) if method.predictor else None
        self.teacher_backbone = self.teacher_head = None
        if method.teacher:
            self.teacher_backbone = copy.deepcopy(self.backbone)
            self.teacher_head = method.head(features, settings)  # DINO's cannot be deep-copied
            self.teacher_head.load_state_dict(self.head.state_dict())
            deactivate_requires_grad(self.teacher_backbone)
            deactivate_requires_grad(self.teacher_head)

    def forward(self, views: Views) -> tuple[Any, ...]:
        """What the criterion is called with."""
        method = self.settings.method
        if method == "swav":
            self.predictor.normalize()  # type: ignore[union-attr, operator]
        projected = [self.head(self.norm(self.backbone(view))) for view in views]
        if self.predictor is not None:
            # Prototypes' scores are cosines; lightly's head leaves the normalisation to us.
            inputs = [F.normalize(v) for v in projected] if method == "swav" else projected
            predicted = [self.predictor(view) for view in inputs]
        if self.teacher_backbone is not None and self.teacher_head is not None:
            with torch.no_grad():
                features = [self.teacher_norm(self.teacher_backbone(v)) for v in views[:2]]
                target = [self.teacher_head(one) for one in features]
        if method == "dino":
            return target, projected
        if method == "byol":
            return predicted, target
        if method == "moco":
            return projected, target
        if method == "simsiam":
            return predicted, [view.detach() for view in projected]
        if method == "swav":
            return (predicted,)
        return projected[0], projected[1]

    def embedding(self, features: Tensor) -> Tensor:
        """The embedding (N, D) of features (N, F): the end of the projection's layers."""
        embedded: Tensor = self.head.layers(self.norm(features))
        return embedded

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher, if there is one, towards the student; at momentum 1 it stays."""
        if self.teacher_backbone is not None:
            update_momentum(self.backbone, self.teacher_backbone, momentum)
            update_momentum(self.head, self.teacher_head, momentum)
