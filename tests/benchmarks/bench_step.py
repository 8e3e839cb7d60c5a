"""A training step of DINO with CLIMB over the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from measure import alternate, peak_bytes
from report import Report, sized
from table import milliseconds
from torch import Tensor, nn

from climb_plugin.adapters.lightly import wrap

SCORES = 2048
Crops = list[Tensor]


class Dino(nn.Module):
    """Student, teacher, criterion and optimiser, as in lightly's script."""

    def __init__(self, backbone: str, device: str, *, beta: float, autocast: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        network = torchvision.models.get_model(backbone)
        width = network.fc.in_features
        network.fc = nn.Identity()
        self.autocast = autocast
        self.backbone, self.teacher = network, copy.deepcopy(network).requires_grad_(False)
        self.head, self.teacher_head = (DINOProjectionHead(width, 512, 256, SCORES) for _ in "st")
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher_head.requires_grad_(False)
        criterion = DINOLoss(output_dim=SCORES)
        # beta 0 would leave the head out.
        self.criterion = (
            wrap(criterion, student=self.head, teacher=self.teacher_head, beta=beta)
            if beta
            else criterion
        )
        self.to(device)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def step(self, crops: Crops, large: int) -> None:
        device = crops[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                goals = [self.teacher_head(self.teacher(crop).flatten(1)) for crop in crops[:large]]
            scores = [self.head(self.backbone(crop).flatten(1)) for crop in crops]
            loss = self.criterion(goals, scores, epoch=0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update_momentum(self.backbone, self.teacher, m=0.99)
        update_momentum(self.head, self.teacher_head, m=0.99)


CASES: dict[str, dict[str, Any]] = {
    # torchvision's own stem: one with stride 1 makes the backbone, not CLIMB, dearer.
    "cpu": sized(
        {"backbone": "resnet18", "batch": 128, "sizes": [32] * 2, "large": 2, "rounds": 15},
        {"backbone": "resnet18", "batch": 8, "sizes": [32] * 3, "large": 2, "rounds": 1},
    ),
    "cuda": {
        "backbone": "resnet50",
        "batch": 64,
        "sizes": [224] * 2 + [96] * 6,
        "large": 2,
        "rounds": 40,
    },
}


@pytest.mark.parametrize("device", CASES)
def bench_dino_step(benchmark: Any, report: Report, device: str) -> None:
    case = CASES[device]
    name = f"DINO {case['backbone']}, batch {case['batch']}, crops of {case['sizes']}"
    report.need(device, name)
    crops = [torch.randn(case["batch"], 3, size, size, device=device) for size in case["sizes"]]
    climb, plain, twin = (
        Dino(case["backbone"], device, beta=beta, autocast=device == "cuda")
        for beta in (1e-3, 0.0, 0.0)
    )

    def step(dino: Dino) -> Callable[[], None]:
        return lambda: dino.step(crops, case["large"])

    times = alternate(
        benchmark,
        {"climb": step(climb), "plain": step(plain), "twin": step(twin)},
        rounds=case["rounds"],
        device=device,
    )
    memory = {dino: peak_bytes(step(dino), device) for dino in (climb, plain)}
    report.row(
        "Training step with CLIMB over the plain step",
        {
            "step": name,
            "device": device,
            "plain (ms)": milliseconds(times["plain"].wall),
            "with CLIMB (ms)": milliseconds(times["climb"].wall),
            "ratio": f"{times['climb'].wall / times['plain'].wall:.3f}",
            "ratio of CPU time": f"{times['climb'].cpu / times['plain'].cpu:.3f}",
            # What a ratio of 1 looks like in this run.
            "plain / plain": f"{times['twin'].wall / times['plain'].wall:.3f}",
            "peak memory": f"{memory[climb] / memory[plain]:.4f}",
            "rounds": str(case["rounds"]),
        },
    )
