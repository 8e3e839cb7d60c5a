"""Small parts that many tests share: a loss, rows, a projection head, rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from climb_plugin import GaussianHead


def rows(batch: int = 8, width: int = 6, *, seed: int = 0) -> Tensor:
    """The same for the same seed, whatever was drawn before."""
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


def square(*outputs: Tensor) -> Tensor:
    """A loss of any number of outputs."""
    return torch.stack([output.square().mean() for output in outputs]).mean()


def mlp(*widths: int, behind: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    """A projection head: linear, ReLU, linear."""
    first, hidden, last = widths
    return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last), *behind)


def rates(mean: Tensor, std: Tensor | float = 0.1) -> Tensor:
    """The rate to N(0, I) of each posterior; a head starts with a std of 0.1."""
    posterior = Normal(mean.detach(), torch.as_tensor(std))
    return kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1).detach()


def rates_of(head: GaussianHead, *embeddings: Tensor) -> Tensor:
    """The rate to N(0, I) of each row that a head was given."""
    mean, logvar = head.posterior(torch.cat(embeddings).detach())
    return rates(mean, (logvar / 2).exp().detach())


def states(module: nn.Module) -> list[Any]:
    """Everything that wrapping could have changed."""
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in module.parameters())
    values = {} if lazy else module.state_dict()
    return [
        {name: value.tolist() for name, value in values.items() if not value.is_meta},
        [
            (name, part.training, list(part._forward_hooks), list(part._forward_pre_hooks))
            for name, part in module.named_modules()
        ],
        [p.requires_grad for p in module.parameters()],
    ]
