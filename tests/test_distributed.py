"""Two real processes over gloo, seeded alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.schedule import TargetRate

STEPS = 5
TARGET = 8.0  # nats, near the rate of the first steps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = GaussianHead(6, 4)

    def forward(self, view: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(view))
        return out


def views(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    one, two = torch.randn(2, 8, 6, generator=generator)
    return one, two


def train(rank: int, world: int, folder: str, prior: str, target: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    net = Net()
    model = DistributedDataParallel(net, find_unused_parameters=False)
    loss = ClimbLoss(
        lambda a, b: (a - b).square().mean() + a.mean(),
        heads=net.head,
        beta=TargetRate(TARGET, beta=0.1) if target else 0.1,
        prior=prior,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = torch.zeros(8, 6)
    noise = net.head(probe) - net.head.posterior(probe).mean
    collectives = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal collectives
        collectives += 1
        return reduce(*args, **kwargs)

    reduce, dist.all_reduce = dist.all_reduce, count
    terms = []
    for step in range(STEPS):
        one, two = views(rank, step)
        loss(model(one), model(two)).backward()
        terms.append(loss.terms)
        optimizer.step()
        optimizer.zero_grad()
    result = {
        "noise": noise.detach(),
        "parameters": [p.detach() for p in net.parameters()],
        "collectives": collectives,
        "rates": [float(step.rate) for step in terms],
        "betas": [float(step.beta) for step in terms],
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    command = [sys.executable, "-P", __file__]
    ranks = [subprocess.Popen([*command, str(r), "2", str(folder), *settings]) for r in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_target_rate_is_that_of_all_ranks(tmp_path: Path) -> None:
    first, second = run(tmp_path, "standard", "target")
    assert first["rates"] != second["rates"]
    assert first["betas"] == second["betas"]
    target = TargetRate(TARGET, beta=0.1)
    for step, rates in enumerate(zip(first["rates"], second["rates"], strict=True)):
        assert first["betas"][step] == pytest.approx(float(target(step)), rel=1e-5)
        target.observe(step, torch.tensor(rates).mean())
    assert first["betas"][-1] != pytest.approx(0.1, rel=1e-3)
    assert first["collectives"] == second["collectives"] == STEPS


@pytest.mark.parametrize("prior", ["standard", "view"])
def test_ranks_stay_equal_and_draw_different_noise(tmp_path: Path, prior: str) -> None:
    first, second = run(tmp_path, prior, "constant")
    assert not torch.equal(first["noise"], second["noise"])
    for one, two in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(one, two)
    torch.manual_seed(0)
    for start, end in zip(Net().parameters(), first["parameters"], strict=True):
        assert not torch.equal(start, end)
    assert first["collectives"] == second["collectives"] == 0


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "target")
