"""The operation: sample and terms, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import alternate
from report import BACKEND, DEVICES, TOY, Report, sized
from table import milliseconds
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from climb_plugin import gaussian

ROUNDS = sized({(256, 256): 100, (1024, 2048): 20, (8192, 2048): 7}, {(4, 8): 2})
# Forward: mean and logvar in, sample and what is saved for it out. Backward: the gradient of the
# sample and the three saved tensors in, two gradients out. A copy moves two.
TENSORS_MOVED = 10

Operation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def climb_operation(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The package's functions, with the entropy as a number only, as ClimbLoss(alpha=0) has it."""
    return (
        gaussian.reparameterize(mean, logvar, noise=torch.randn_like(mean)),
        gaussian.kl_to_standard_normal(mean, logvar),
        gaussian.conditional_entropy(mean.detach(), logvar.detach()),
    )


def distributions_operation(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without the validation of arguments, which is on by default and costs more."""
    posterior = Normal(mean, torch.exp(logvar / 2), validate_args=False)
    prior = Normal(mean.new_zeros(()), mean.new_ones(()), validate_args=False)
    z = posterior.rsample()
    rate = kl_divergence(posterior, prior).sum(dim=-1)
    with torch.no_grad():
        entropy = posterior.entropy().sum(dim=-1)
    return z, rate, entropy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ROUNDS)
def bench_sample_and_terms(
    benchmark: Any, report: Report, shape: tuple[int, int], device: str
) -> None:
    report.need(device, f"sample and terms {shape}")
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    mean, logvar, weights = torch.randn(3, *shape, generator=generator).to(device).unbind()
    mean = mean.clone().requires_grad_()
    logvar = (0.5 * logvar - 2).requires_grad_()
    per_row = torch.full(shape[:1], 1e-3 / shape[0], device=device)
    target = torch.empty_like(weights)

    def step(operation: Operation) -> None:
        z, rate, _ = operation(mean, logvar)
        torch.autograd.backward([z, rate], [weights, per_row])
        mean.grad = logvar.grad = None

    # Both kinds of noise: inductor's own is slow on a CPU, where it is not vectorised.
    compiled, own_noise = (
        torch.compile(
            climb_operation,
            dynamic=False,
            backend=BACKEND,
            options=None if TOY else {"fallback_random": fallback},
        )
        for fallback in (True, False)
    )
    times = {
        name: clocks.wall
        for name, clocks in alternate(
            benchmark,
            {
                "climb": lambda: step(climb_operation),
                "compiled": lambda: step(compiled),
                "own noise": lambda: step(own_noise),
                "distributions": lambda: step(distributions_operation),
                "noise": lambda: torch.randn(shape, device=device),
                "copy": lambda: target.copy_(weights),
            },
            rounds=ROUNDS[shape],
            device=device,
        ).items()
    }
    floor = TENSORS_MOVED / 2 * times["copy"] + times["noise"]
    reference = times["distributions"]
    report.row(
        "Sample and terms, forward and backward (ms)",
        {
            "device": device,
            "(B, D)": str(shape),
            "torch.distributions": milliseconds(reference),
            "climb, eager": milliseconds(times["climb"]),
            "compiled": milliseconds(times["compiled"]),
            "compiled, own noise": milliseconds(times["own noise"]),
            "noise alone": milliseconds(times["noise"]),
            "floor": milliseconds(floor),
            "distributions / climb": f"{reference / times['climb']:.2f}",
            "distributions / compiled": f"{reference / times['compiled']:.2f}",
            "climb / floor": f"{times['climb'] / floor:.2f}",
            "compiled / floor": f"{times['compiled'] / floor:.2f}",
            "rounds": str(ROUNDS[shape]),
        },
    )
