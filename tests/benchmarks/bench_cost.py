"""What CLIMB adds to a step over number of views, dimension and ranks: head, terms, gradients."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import alternate
from report import DEVICES, Report, sized
from table import milliseconds
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from climb_plugin import ClimbLoss, GaussianHead

BATCH = 128
ROUNDS = sized(30, 2)
# (views, dimension, ranks); one of the three varies.
CASES = [(2, 256, 1), (4, 256, 1), (8, 256, 1), (2, 64, 1), (2, 1024, 1), (2, 2048, 1)]
CASES += [(2, 256, 2)]
CASES = sized(CASES, [(2, 8, 1)])


def pull(*views: Tensor) -> Tensor:
    """Stands for a loss: cheap, and depends on every view."""
    return torch.stack([view.square().mean() for view in views]).sum()


def steps(views: int, width: int, device: str) -> dict[str, Callable[[], None]]:
    """A step through a linear layer with CLIMB after it, and without."""
    inputs = [torch.randn(BATCH, width, device=device) for _ in range(views)]
    head = GaussianHead(width)
    models: list[nn.Module] = [
        nn.Sequential(nn.Linear(width, width), end).to(device) for end in (head, nn.Identity())
    ]
    if dist.is_initialized():
        models = [DistributedDataParallel(model) for model in models]
    losses = [ClimbLoss(pull, heads=head, beta=1e-3), pull]

    def step(model: nn.Module, loss: Callable[..., Tensor]) -> None:
        model.zero_grad()
        loss(*[model(view) for view in inputs]).backward()

    return {
        name: lambda model=model, loss=loss: step(model, loss)  # type: ignore[misc]
        for name, model, loss in zip(("climb", "plain"), models, losses, strict=True)
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("views", "width", "ranks"), CASES)
def bench_cost(
    benchmark: Any, report: Report, views: int, width: int, ranks: int, device: str
) -> None:
    report.need(device, f"cost of {views} views, width {width}, {ranks} rank(s)")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    if ranks == 1:
        times = alternate(benchmark, steps(views, width, device), rounds=ROUNDS, device=device)
        climb, plain = (times[name].wall for name in ("climb", "plain"))
    else:
        climb, plain = benchmark.pedantic(
            in_ranks, args=(views, width, ranks, device), rounds=1, iterations=1
        )
    report.row(
        f"What CLIMB adds to a step, batch {BATCH} per view and rank (ms)",
        {
            "device": device,
            "views": str(views),
            "dimension": str(width),
            "ranks": str(ranks),
            "plain: a linear layer": milliseconds(plain),
            "with CLIMB": milliseconds(climb),
            "added": milliseconds(climb - plain),
            "rounds": str(ROUNDS),
        },
    )


def in_ranks(views: int, width: int, ranks: int, device: str) -> list[float]:
    """Medians with CLIMB and without on rank 0 of several processes, in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(views), str(width), device],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank failed: {[process.returncode for process in processes]}.")
    medians: list[float] = json.loads(outputs[0].splitlines()[-1])
    return medians


class InTurn:
    """Stands for the fixture of pytest-benchmark in a process of its own."""

    def __init__(self) -> None:
        self.extra_info: dict[str, float] = {}

    def pedantic(
        self,
        call: Callable[..., None],
        *,
        args: tuple[Any, ...],
        setup: Callable[[], None],
        rounds: int,
        warmup_rounds: int,
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            call(*args)


def main(views: int, width: int, device: str) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    times = alternate(InTurn(), steps(views, width, device), rounds=ROUNDS, device=device)
    print(json.dumps([times[name].wall for name in ("climb", "plain")]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
