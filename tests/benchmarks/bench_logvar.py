"""What the two forms of the log-variance add to a step over the width of the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Clocks, alternate, peak_bytes
from report import DEVICES, Report, sized
from table import milliseconds
from torch import Tensor, nn

from climb_plugin.attach import attach
from climb_plugin.loss import ClimbLoss

ROWS = 64
WIDTHS = sized({256: 30, 2048: 15, 8192: 5}, {8: 2})  # width: rounds


def pull(*views: Tensor) -> Tensor:
    """Stands for a loss: cheap, and depends on every view."""
    return torch.stack([view.square().mean() for view in views]).sum()


def make(width: int, form: str | None, device: str) -> tuple[nn.Module, Callable[[], None]]:
    """A projection head (512, D, D), and a step of it with two views."""
    head = nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, width)).to(device)
    loss: Callable[..., Tensor] = pull
    if form is not None:
        loss = ClimbLoss(pull, heads=attach(head, logvar=form), beta=1e-3)
    views = [torch.randn(ROWS, 512, device=device) for _ in range(2)]
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(*map(head, views)).backward()
        optimizer.step()

    return head, step


@pytest.mark.filterwarnings("ignore:CLIMB. the log-variance")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
def bench_logvar(benchmark: Any, report: Report, width: int, device: str) -> None:
    report.need(device, f"the forms of the log-variance at width {width}")
    forms = {"plain": None, "linear": "linear", "shared": "shared"}
    made = {name: make(width, form, device) for name, form in forms.items()}
    steps = {name: step for name, (_, step) in made.items()}

    def clock(clocks: Clocks) -> float:
        return clocks.wall if device == "cuda" else clocks.cpu  # the CPU only starts kernels

    times = alternate(benchmark, steps, rounds=WIDTHS[width], device=device)
    for name, (head, step) in made.items():
        parameters = sum(parameter.numel() for parameter in head.parameters())
        report.row(
            f"A step of a projection head (512, D, D), two views of {ROWS} rows, SGD",
            {
                "device": device,
                "D": str(width),
                "log-variance": name,
                "parameters": f"{parameters:,}",
                "wall time (ms)": milliseconds(times[name].wall),
                "CPU time (ms)": milliseconds(times[name].cpu),
                "over plain": f"{clock(times[name]) / clock(times['plain']):.2f}",
                "peak memory (MB)": f"{peak_bytes(step, device) / 1e6:.0f}",
                "rounds": str(WIDTHS[width]),
            },
        )
