"""Small parts that many tests share: a loss, rows, a projection head, rates."""

from __future__ import annotations

from collections.abc import Callable
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


def embedded(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.last(net.hidden(x).relu())
    return out


def embedded_and_normed(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.norm(embedded(net, x))
    return out


def same(net: Any, z: Tensor) -> Tensor:
    return z


def unit(z: Tensor) -> Tensor:
    return nn.functional.normalize(z, dim=-1)


def normalised(net: Any, z: Tensor) -> Tensor:
    return unit(z)


def normalised_in_training(net: Any, z: Tensor) -> Tensor:
    return unit(z) if net.training else z


def scored(net: Any, z: Tensor) -> Tensor:
    """As DINO's head: a normalised bottleneck before the last layer."""
    out: Tensor = net.prototypes(unit(z))
    return out


class Net(nn.Module):
    """A head in two halves, which are given: the Gaussian belongs between them."""

    def __init__(
        self,
        embed: Callable[[Any, Tensor], Any] = embedded,
        finish: Callable[[Any, Tensor], Any] = same,
    ) -> None:
        super().__init__()
        # Registered in another order than they run, and not all of them are used.
        self.last, self.hidden = nn.Linear(32, 8), nn.Linear(16, 32)
        self.norm, self.prototypes = nn.BatchNorm1d(8), nn.Linear(8, 20, bias=False)
        self.embed, self.finish = embed, finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self, self.embed(self, x))


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
