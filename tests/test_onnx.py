"""Backbone and head, exported for inference by both of torch's exporters, run by onnxruntime."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import GaussianHead
from climb_plugin.attach import attach


class Normalised(nn.Module):
    """A projection head that ends in an L2 normalisation: its GaussianHead hangs on a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(4, 6)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features))


def attached(at: str) -> nn.Module:
    projection = Normalised()
    attach(projection, at=at)
    return projection


HEADS: dict[str, Callable[[], nn.Module]] = {
    "the embedding as the mean": lambda: GaussianHead(4),
    "a linear mean": lambda: GaussianHead(4, 6),
    "attached to a projection": lambda: attached("projection"),
    "attached to features": lambda: attached("features"),
}


def with_backbone(head: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), head).eval()


def by_dynamo(model: nn.Module, images: Tensor) -> bytes:
    batch = torch.export.Dim("batch", min=1, max=64)
    program: Any = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def by_torchscript(model: nn.Module, images: Tensor) -> bytes:
    file = io.BytesIO()
    names = {"input_names": ["images"], "output_names": ["means"]}
    axes = {"images": {0: "batch"}, "means": {0: "batch"}}
    torch.onnx.export(model, (images,), file, dynamo=False, dynamic_axes=axes, **names)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("export", [by_dynamo, by_torchscript])
@pytest.mark.parametrize("kind", HEADS)
def test_onnxruntime_gives_what_torch_gives(
    kind: str, export: Callable[[nn.Module, Tensor], bytes]
) -> None:
    torch.manual_seed(0)
    model = with_backbone(HEADS[kind]())
    exported = export(model, torch.randn(3, 3, 8, 8))
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    for size in (1, 3, 7):
        batch = torch.randn(size, 3, 8, 8)
        (means,) = session.run(None, {images.name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(means), model(batch), rtol=1e-5, atol=1e-5)
