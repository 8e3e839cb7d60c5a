"""How long the search for samples takes, what losses that are kept hold, and what a break costs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import alternate
from report import BACKEND, DEVICES, Report, sized
from table import milliseconds
from torch import Tensor, nn
from torchvision.models import resnet50

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._graph.walk import _search, samples_behind

ROUNDS = sized(30, 2)
KEPT = 20


def pull(*views: Tensor) -> Tensor:
    """Stands for a loss: cheap, and depends on every view."""
    return torch.stack([view.square().mean() for view in views]).sum()


def resnet(heads: list[GaussianHead], views: int) -> Tensor:
    """A value over a ResNet-50 that has these heads at its end."""
    net = resnet50(num_classes=64)
    return pull(*(head(net(torch.randn(2, 3, 32, 32))) for _ in range(views) for head in heads))


def rollout(heads: list[GaussianHead], calls: int) -> Tensor:
    """A value over a chain of calls of one head."""
    layer, state = nn.Linear(64, 64), torch.randn(8, 64)
    for _ in range(calls):
        state = heads[0](layer(state).relu())
    return state.square().mean()


GRAPHS: dict[str, tuple[Callable[[list[GaussianHead], int], Tensor], int, int]] = {
    "ResNet-50, 2 views, 1 head": (resnet, 1, 2),
    "ResNet-50, 2 views, 2 heads": (resnet, 2, 2),
    "ResNet-50, 10 views, 1 head": (resnet, 1, 10),
    "ResNet-50, 10 views, 2 heads": (resnet, 2, 10),
    "rollout of 50 calls": (rollout, 1, 50),
}


@pytest.mark.parametrize("name", GRAPHS)
def bench_walk(benchmark: Any, report: Report, name: str) -> None:
    make, count, size = GRAPHS[name]
    heads = [GaussianHead(64) for _ in range(count)]
    value = make(heads, size)
    found = samples_behind(value, set(heads))
    times = alternate(
        benchmark,
        {
            "walk": lambda: samples_behind(value, set(heads)),
            "whole": lambda: _search(value, oldest=0),
        },
        rounds=ROUNDS,
        device="cpu",
    )
    report.row(
        "The search for samples behind a value (ms)",
        {
            "graph": name,
            "samples": str(len(found)),
            "the search": milliseconds(times["walk"].wall),
            "through the whole graph": milliseconds(times["whole"].wall),
        },
    )


def bench_kept_losses(benchmark: Any, report: Report) -> None:
    layer, head = nn.Linear(64, 64), GaussianHead(64)
    loss = ClimbLoss(pull, heads=head, beta=1e-3)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor) and one.numel() == 8 * 64 for one in gc.get_objects())

    def steps() -> list[Tensor]:
        losses = []
        for _ in range(KEPT):
            losses.append(loss(head(layer(torch.randn(8, 64))), head(layer(torch.randn(8, 64)))))
            losses[-1].backward()
        return losses

    steps()
    before = tensors()
    losses = benchmark.pedantic(steps, rounds=1, iterations=1)
    report.row(
        "Losses that a script keeps in a list, after their backward passes",
        {"losses": str(len(losses)), "embeddings still alive": str(tensors() - before)},
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", sized([256, 2048], [8]))
def bench_break(benchmark: Any, report: Report, width: int, device: str) -> None:
    """A compiled step with a head, which breaks the graph once, against one without any break."""
    report.need(device, f"the graph break, width {width}")
    view = torch.randn(128, width, device=device)

    class Apart(nn.Module):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            return x

    def net(end: nn.Module) -> Callable[[], None]:
        layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        model = nn.Sequential(layers, end, nn.Linear(width, width)).to(device)
        compiled = torch.compile(model, backend=BACKEND)

        def step() -> None:
            model.zero_grad()
            compiled(view).square().mean().backward()

        return step

    calls = {"whole": net(nn.Identity()), "broken": net(Apart())}
    times = alternate(benchmark, calls, rounds=ROUNDS, device=device)
    report.row(
        "One graph break in a compiled step of three linear layers, batch 128 (ms)",
        {
            "device": device,
            "width": str(width),
            "whole": milliseconds(times["whole"].wall),
            "with one break": milliseconds(times["broken"].wall),
            "added": milliseconds(times["broken"].wall - times["whole"].wall),
        },
    )
