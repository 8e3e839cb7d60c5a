"""Maps embeddings to means and log-variances: the layers of a Gaussian head.

These are no ``nn.Linear``, so that an initialiser or tool that goes through all linear layers of a
model finds those of the host alone. Each is called as a module: FSDP gathers weights in its hooks.
All map (..., B, in_features) to (..., B, out_features).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin._torch import without_modes
from climb_plugin.checks import is_number
from climb_plugin.gaussian import LOGVAR_MAX, LOGVAR_MIN, unbound_logvar


class Affine(nn.Module):
    """weight @ x + bias, in the dtype of x, whatever dtype the weights have."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, embedding: Tensor) -> Tensor:
        """Maps the embedding."""
        _check_gathered(self.bias, embedding)
        return F.linear(embedding, self.weight.to(embedding.dtype), self.bias.to(embedding.dtype))


class Mean(Affine):
    """A learned mean; starts as torch's linear layers do."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters; draws random numbers."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class Logvar(Affine):
    """A log-variance without bounds; starts as that of ``init_std`` for every embedding."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float) -> None:
        super().__init__(in_features, out_features)
        self._start = unbound_logvar(2 * math.log(init_std))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters; draws no random numbers."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self._start)

    def is_at_start(self) -> bool:
        """Whether the weights are those of the start; waits for the device."""
        return _is_near(self.weight, 0, 0) and _is_near(self.bias, self._start, 0.05)


class SharedLogvar(nn.Module):
    """One learned log-variance for each dimension, without bounds; the same for every image."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out_features))
        self._start = unbound_logvar(2 * math.log(init_std))
        self.reset_parameters()

    def forward(self, embedding: Tensor) -> Tensor:
        """The bias, in the shape and dtype of the embedding."""
        _check_gathered(self.bias, embedding)
        return self.bias.to(embedding.dtype).expand(*embedding.shape[:-1], -1)

    def reset_parameters(self) -> None:
        """Initialises the parameters; draws no random numbers."""
        nn.init.constant_(self.bias, self._start)

    def is_at_start(self) -> bool:
        """Whether the parameters are those of the start; waits for the device."""
        return _is_near(self.bias, self._start, 0.05)


LOGVARS: dict[str, type[Logvar] | type[SharedLogvar]] = {"linear": Logvar, "shared": SharedLogvar}
"""What a log-variance can be: a linear function of the embedding, or the same for every image."""


def _is_near(values: Tensor, start: float, tolerance: float) -> bool:
    """Whether all values are near the start; half precision rounds, and .double() keeps that."""
    # Modes that record operations compare a second run of checkpointed code with the first.
    # They must not see this check, which the second run does not repeat.
    with torch.no_grad(), without_modes():
        return bool(((values - start).abs() <= tolerance).all())


def _check_gathered(bias: Tensor, embedding: Tensor) -> None:
    if hasattr(bias, "device_mesh") and not hasattr(embedding, "device_mesh"):
        raise RuntimeError(
            "the parameters of a GaussianHead are sharded while it runs, because the layer "
            "that hosts them was sharded by itself: call fully_shard(criterion.heads[0]) "
            "before that."
        )


def checked_std(init_std: float) -> float:
    """``init_std`` as a float; a ValueError if a learned std cannot start there."""
    if not (is_number(init_std) and math.isfinite(init_std) and init_std > 0):
        raise ValueError(f"init_std must be a positive number, got {init_std!r}.")
    least, most = (math.exp(bound / 2) for bound in (LOGVAR_MIN, LOGVAR_MAX))
    if not least < init_std < most:
        raise ValueError(
            f"init_std must lie strictly between {least:.2g} and {most:.3g}, the bounds of "
            f"the learned std, got {init_std!r}."
        )
    return float(init_std)
