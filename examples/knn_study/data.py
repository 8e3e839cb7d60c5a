"""CIFAR-10 as tensors, and random views of it made on the device, a batch at a time."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
import torchvision
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from knn_study.settings import Settings


@dataclass(frozen=True)
class Labelled:
    """Images, uint8 of shape (N, 3, 32, 32), and their labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor

    def part(self, start: int, stop: int) -> Labelled:
        """A slice of them."""
        return Labelled(self.images[start:stop], self.labels[start:stop])

    def resized(self, pixels: int) -> Labelled:
        """The same with images of another size."""
        return Labelled(resized(self.images, pixels), self.labels)

    def to(self, device: str) -> Labelled:
        """The same on a device."""
        return Labelled(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Parts:
    """To train on, to choose by, and to report; the same for every seed."""

    train: Labelled
    validation: Labelled
    test: Labelled

    @cached_property
    def fingerprint(self) -> str:
        """Of all images and labels in their order; JPEGs have other pixels than the download."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
        return digest.hexdigest()[:12]


@lru_cache(maxsize=1)
def load(root: Path) -> Parts:
    """CIFAR-10 from an .npz file of JPEGs, or from (or into) a folder through torchvision.

    The 50,000 for training are put into a fixed random order (a file may have them by class); the
    last tenth are the validation images.

    Raises:
        OSError: If it is not there and cannot be downloaded.
    """
    if root.suffix == ".npz":
        train, test = (_from_jpegs(root, part) for part in ("train", "test"))
    else:
        train, test = (_from_torchvision(root, train) for train in (True, False))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train.labels)))
    train = Labelled(train.images[order], train.labels[order])
    everything = len(train.labels)
    split = everything - everything // 10
    return Parts(train.part(0, split), train.part(split, everything), test)


def _from_torchvision(root: Path, train: bool) -> Labelled:
    try:
        known = torchvision.datasets.CIFAR10(root, train=train, download=True)
    except RuntimeError as error:  # a damaged download
        raise OSError(f"{root} holds no whole CIFAR-10: {error}") from error
    pixels = torch.from_numpy(known.data).movedim(-1, 1).contiguous()
    return Labelled(pixels, torch.tensor(known.targets))


def _from_jpegs(path: Path, part: str) -> Labelled:
    with np.load(path) as stored:
        data, offsets = stored[f"{part}_bytes"].tobytes(), stored[f"{part}_offsets"]
        labels = torch.from_numpy(stored[f"{part}_labels"].astype(np.int64))
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:stop]))) for start, stop in pairwise(offsets)
    ]
    return Labelled(torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous(), labels)


def resized(images: Tensor, pixels: int) -> Tensor:
    """Images as uint8 (N, 3, P, P), averaged over the pixels that fall together."""
    if images.shape[-1] == pixels:
        return images
    smaller = [
        F.interpolate(some.float(), (pixels, pixels), mode="bilinear", antialias=True)
        for some in images.split(1000)
    ]
    return torch.cat(smaller).round().clamp(0, 255).to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    """Pixels from 0 to 255 as the network takes them."""
    mean, std = (
        torch.tensor(IMAGENET_NORMALIZE[key], device=images.device).view(3, 1, 1)
        for key in ("mean", "std")
    )
    return (images.float() / 255 - mean) / std


class RandomViews:
    """Draws the views of a batch: two large ones, then ``local`` small ones.

    The augmentation is that of SimCLR for CIFAR-10: crop, flip, colour jitter of strength 0.5,
    grey; no blur. Every image of the batch gets parameters of its own.

    Attributes:
        wrong: Of the last call: whether the other views show another image, (B,).
    """

    wrong: Tensor

    def __init__(self, settings: Settings, *, local: int) -> None:
        self.mismatched = settings.mismatched
        self.local = local
        self.large = _augmentation(settings.pixels, (settings.crop, 1.0))
        self.small = _augmentation(settings.pixels // 2, (0.05, max(settings.crop, 0.1)))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Views of images (B, 3, 32, 32), uint8: (B, 3, P, P), the small ones (B, 3, P/2, P/2)."""
        pixels = images.float() / 255
        others = pixels
        self.wrong = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        if self.mismatched:
            self.wrong = torch.rand(len(pixels), device=pixels.device) < self.mismatched
            others = torch.where(self.wrong.view(-1, 1, 1, 1), pixels.roll(1, 0), pixels)
        views = [self.large(pixels), self.large(others)]
        views += [self.small(others) for _ in range(self.local)]
        return [normalised(255 * view) for view in views]


def _augmentation(size: int, scale: tuple[float, float]) -> K.AugmentationSequential:
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=scale, cropping_mode="resample"),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        data_keys=["input"],
    )
