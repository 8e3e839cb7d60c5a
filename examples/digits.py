"""What the notebooks share: small images, random views made in batches, and a short training.

:func:`load` gives scikit-learn's digits (1,797 scans, nothing is downloaded) or CIFAR-10 as
tensors; :func:`train` trains lightly's SimCLR or DINO on them, plain or with CLIMB, in seconds.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss
from climb_plugin.adapters.lightly import wrap
from climb_plugin.attach import attach
from climb_plugin.schedule import Schedule

with warnings.catch_warnings():
    # In a notebook tqdm wants ipywidgets as soon as lightly imports it; nothing here uses tqdm.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from lightly.loss import DINOLoss, NTXentLoss
    from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.benchmarking import knn_predict

FEATURES = 64  # width of the backbone's output
EMBEDDING = 32  # width at the end of the projection MLP, where CLIMB's Gaussian sits
PROTOTYPES = 128  # of DINO
MOMENTUM = 0.99  # of DINO's teacher
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Views = Callable[[Tensor, torch.Generator], list[Tensor]]
"""Random views of a batch of images, drawn from the generator alone."""

# ---- Images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Labelled images: ``images`` (N, C, H, W) with pixels from 0 to 1, ``labels`` (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """The parts of a data set."""

    train: Part
    validation: Part
    test: Part


def load(name: str = "digits", *, root: str | Path = "data", limit: int | None = None) -> Data:
    """Images in three parts, which are the same whatever the seed of a training is.

    Args:
        name: ``"digits"`` or ``"cifar10"``; the latter is downloaded to ``root`` by torchvision
            unless it is there.
        root: Folder of CIFAR-10.
        limit: Use this many images of CIFAR-10's 50,000 for training and validation.

    Raises:
        ValueError: If there is no such data set.
    """
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        rest, test = _split(Part(images, labels), 450)
        return Data(*_split(rest, 300), test)
    if name == "cifar10":
        rest, test = (
            Part(torch.from_numpy(raw.data).movedim(-1, 1) / 255, torch.tensor(raw.targets))
            for train in (True, False)
            for raw in [torchvision.datasets.CIFAR10(root, train=train, download=True)]
        )
        if limit is not None:
            rest = Part(rest.images[:limit], rest.labels[:limit])
        return Data(*_split(rest, len(rest.labels) // 10), test)
    raise ValueError(f"name must be 'digits' or 'cifar10', got {name!r}.")


def _split(part: Part, size: int) -> tuple[Part, Part]:
    """Splits off ``size`` images, with the same share of every label."""
    indices = train_test_split(
        torch.arange(len(part.labels)), test_size=size, stratify=part.labels, random_state=0
    )
    first, second = (Part(part.images[chosen], part.labels[chosen]) for chosen in indices)
    return first, second


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image: turned, moved, enlarged, with other brightness and noise.

    Colour images are mirrored half of the time as well; a mirrored digit is none.
    """
    count, channels = images.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, generator=generator, device=images.device)
        return low + (high - low) * drawn

    angle, scale = uniform(-math.pi / 12, math.pi / 12), uniform(0.7, 1.0)
    shift_x, shift_y = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    mirror = uniform(-1, 1).sign() if channels == 3 else torch.ones_like(angle)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [mirror * cosine, -sine, shift_x, mirror * sine, cosine, shift_y]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).reshape(count, 2, 3), list(images.shape), align_corners=False
    )
    view = F.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(view.shape, generator=generator, device=images.device)
    return view * uniform(0.6, 1.4).reshape(count, 1, 1, 1) + 0.1 * noise


def two_views(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Two random views of each image."""
    return [random_view(images, generator), random_view(images, generator)]


# ---- Training ------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A trained backbone and head, and what was measured at every step."""

    backbone: nn.Module
    head: nn.Module
    teacher: nn.Module | None = None  # backbone of DINO's teacher
    base: list[float] = field(default_factory=list)  # base loss, in its own unit
    rate: list[float] = field(default_factory=list)  # nats; empty without CLIMB
    entropy: list[float] = field(default_factory=list)  # H(z|v), nats; empty without CLIMB
    beta: list[float] = field(default_factory=list)  # empty without CLIMB

    def features(self, images: Tensor) -> Tensor:
        """What the backbone makes of images, (N, FEATURES)."""
        return _features(self.backbone, images)

    def teacher_features(self, images: Tensor) -> Tensor:
        """The same of the teacher's backbone.

        Raises:
            ValueError: If the method has no teacher.
        """
        if self.teacher is None:
            raise ValueError("this run has no teacher: train with method='dino'.")
        return _features(self.teacher, images)

    @torch.no_grad()
    def embedding(self, images: Tensor) -> Tensor:
        """The end of the projection MLP, (N, EMBEDDING): with CLIMB, the mean of the Gaussian."""
        self.head.eval()
        layers: nn.Module = self.head.layers  # type: ignore[assignment]
        embedding: Tensor = layers(self.features(images).to(DEVICE))
        return embedding.cpu()


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    backbone.eval()
    return torch.cat([backbone(part.to(DEVICE)) for part in images.split(500)]).cpu()


Watch = Callable[[Trained, int], None]
"""Is shown the run so far and the number of its steps."""


def make_backbone(channels: int) -> nn.Sequential:
    """A small convolutional network."""
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, 16, 1), (16, 32, 2), (32, FEATURES, 2)):
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(
    images: Tensor,
    *,
    beta: float | Schedule | None = None,
    prior: str = "standard",
    alpha: float = 0.0,
    at: str = "projection",
    init_std: float = 0.1,
    method: str = "simclr",
    views: Views = two_views,
    steps: int = 300,
    batch: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    watch: Watch | None = None,
) -> Trained:
    """Trains from scratch, plain or with CLIMB.

    Two runs with one seed start from the same weights and see the same images and views, with
    CLIMB or without: it takes none of torch's random numbers. A learning rate of 0 gives the
    untrained network: its weights stay, while the batch norm sees the images.

    Args:
        images: Of shape (N, C, H, W), at least ``batch`` of them.
        beta: Weight of the rate: a number, a schedule, 0 for the noise of the Gaussian alone, or
            None for a run without CLIMB.
        prior: As in :func:`climb_plugin.adapters.lightly.wrap`, like the next three.
        alpha: Weight of the conditional entropy.
        at: Place of the Gaussian.
        init_std: Standard deviation at the start.
        method: ``"simclr"`` or ``"dino"``.
        views: Makes the views of a batch.
        steps: Optimiser steps.
        batch: Images in a step.
        learning_rate: Of AdamW, decayed to 0 along half a cosine.
        seed: Of the weights, the order of the images, the views and CLIMB's noise.
        watch: Called after every step.

    Raises:
        ValueError: If there is no such method.
    """
    torch.manual_seed(seed)
    backbone, teacher_backbone, teacher_head = make_backbone(images.shape[1]), None, None
    head: nn.Module
    if method == "simclr":
        head, criterion = SimCLRProjectionHead(FEATURES, 64, EMBEDDING), NTXentLoss()
    elif method == "dino":
        with warnings.catch_warnings():  # lightly builds its head with a deprecated weight_norm
            warnings.simplefilter("ignore", FutureWarning)
            head, teacher_head = (
                DINOProjectionHead(FEATURES, 64, EMBEDDING, PROTOTYPES, batch_norm=True)
                for _ in range(2)
            )
        criterion = DINOLoss(PROTOTYPES)
        teacher_backbone = copy.deepcopy(backbone)
        teacher_head.load_state_dict(head.state_dict())
        for module in (teacher_backbone, teacher_head):
            deactivate_requires_grad(module)
            module.to(DEVICE)
    else:
        raise ValueError(f"method must be 'simclr' or 'dino', got {method!r}.")
    for module in (backbone, head, criterion):
        module.to(DEVICE)
    if beta == 0:
        attached = attach(head, teacher=teacher_head, at=at, init_std=init_std)
        criterion = ClimbLoss(criterion, heads=attached, beta=0.0).to(DEVICE)
    elif beta is not None:
        criterion = wrap(
            criterion,
            student=head,
            teacher=teacher_head,
            beta=beta,
            prior=prior,
            alpha=alpha,
            at=at,
            init_std=init_std,
        ).to(DEVICE)

    modules = nn.ModuleList([backbone, head, criterion])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images = images.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    run = Trained(backbone, head, teacher_backbone)
    modules.train()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator, device=DEVICE)
        chosen, order = order[:batch], order[batch:]
        seen = views(images[chosen], generator)
        student_out = [head(backbone(view)) for view in seen]
        if teacher_backbone is None or teacher_head is None:
            loss = criterion(*student_out)
        else:
            update_momentum(backbone, teacher_backbone, MOMENTUM)
            update_momentum(head, teacher_head, MOMENTUM)
            with torch.no_grad():
                teacher_out = [teacher_head(teacher_backbone(view)) for view in seen]
            loss = criterion(teacher_out, student_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if isinstance(criterion, ClimbLoss):
            terms = criterion.terms
            run.rate.append(float(terms.rate))
            run.entropy.append(float(terms.entropy))
            run.beta.append(float(terms.beta))
            run.base.append(float(terms.base))
        else:
            run.base.append(loss.item())
        if watch is not None:
            watch(run, step)
            modules.train()
            if teacher_backbone is not None:
                teacher_backbone.train()
    return run


def knn_accuracy(
    known: Tensor, known_labels: Tensor, asked: Tensor, labels: Tensor, *, neighbours: int = 20
) -> float:
    """Accuracy in % of lightly's weighted k-NN on L2-normalised features."""
    ranked = knn_predict(
        F.normalize(asked, dim=1),
        F.normalize(known, dim=1).T,
        known_labels,
        num_classes=int(known_labels.max()) + 1,
        knn_k=neighbours,
    )
    return 100 * float((ranked[:, 0] == labels).float().mean())
