"""Finds where the embedding of a projection head is, by what the head does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Down to where the epsilon of a LayerNorm shows, while that of an L2 normalisation does not yet.
_FACTOR = 2.0**-10
_TOLERANCE = 0.05


def input_width(module: nn.Module) -> int:
    """Width of the embedding that a projection head takes.

    Raises:
        ValueError: If no linear layer tells it.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if part.in_features:
                return part.in_features
            raise ValueError("the projection head is lazy: run one batch through the model first.")
    raise ValueError(
        f"no linear layer tells the width of {type(module).__name__}: put a GaussianHead(width) "
        "into your module where its embedding is, and use ClimbLoss(loss, heads=...)."
    )


def first_layer(module: nn.Module) -> str:
    """Path of what first sees the embedding; a Sequential cannot hold a head before it."""
    path: list[str] = []
    while isinstance(module, nn.Sequential) and len(module):
        parts = list(module.named_children())
        flat = [part for part in parts if not isinstance(part[1], nn.Flatten)]
        name, module = (flat or parts)[0]
        path.append(name)
    return ".".join(path)


def end_of_projection(probe: Probe) -> tuple[str, bool, int]:
    """(path, before, width) of the end of the projection MLP.

    Raises:
        ValueError: If it cannot be told, or nothing can go there.
    """
    output = probe.output
    if not _is_batch(output):
        received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{type(probe.module).__name__} must map (B, {probe.rows.shape[-1]}) to (B, D), it "
            f"returned {received}: put a GaussianHead(width) into it yourself, and use "
            "ClimbLoss(loss, heads=...)."
        )
    # Of those that a normalisation follows, the last: what comes after it is the head's.
    for path in reversed(probe.widths):
        if probe.is_before_normalisation(path):
            return path, False, probe.widths[path]
    if probe.is_before_normalisation(None):
        return first_layer(probe.module), True, probe.rows.shape[-1]
    if probe.ends_normalised():
        raise ValueError(
            f"{type(probe.module).__name__} normalises its embedding, but the embedding is the "
            "output of none of its submodules, so nothing can go in between: pass it through an "
            "nn.Identity() of its own right before it is normalised."
        )
    return "", False, output.shape[-1]


class Probe:
    """What a module does with a few random rows, in ``eval()``; it is left as it was.

    Args:
        module: Maps (B, width) to (B, D).
        width: Width of its input.

    Attributes:
        output: Its output.
        widths: Widths of the outputs of its submodules, in the order of their completion. Those
            that ran more than once are left out: a hook could not tell the runs apart.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        parameter = next(module.parameters())
        if parameter.is_meta:
            raise ValueError("the projection head is on the meta device: materialise it first.")
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
        self.module = module
        self.rows = rows.to(parameter.device, wide)
        self.widths: dict[str, int] = {}
        self._unit_inputs: list[str] = []
        calls: Counter[str] = Counter()

        def watch(path: str, args: tuple[Any, ...], output: object) -> None:
            calls[path] += 1
            if _is_batch(output):
                self.widths[path] = output.shape[-1]
            if args and _is_batch(args[0]) and _is_unit(args[0]):
                self._unit_inputs.append(path)

        self.output = self._run(self.rows, watch=watch)
        self.widths = {path: n for path, n in self.widths.items() if calls[path] == 1}

    def is_before_normalisation(self, path: str | None) -> bool:
        """Whether an L2 normalisation and nothing but linear layers follow a submodule.

        Args:
            path: Name of the submodule; None: the input of the module.
        """
        small = self._rescaled(path, _FACTOR)
        return self._is_close(small, self.output) and self._is_linear(self._rescaled(path, -1.0))

    def ends_normalised(self) -> bool:
        """Whether the output is normalised, or linear in something that is."""
        return _is_unit(self.output) or any(
            self._is_linear(self._rescaled(path, -1.0, before=True)) for path in self._unit_inputs
        )

    def _is_linear(self, flipped: Tensor) -> bool:
        """Whether a change of sign gave the same but for the sign, up to a bias."""
        total = flipped + self.output
        return self._is_close(total, total.mean(dim=0))

    def _is_close(self, one: Tensor, other: Tensor) -> bool:
        spread = (self.output - self.output.mean(dim=0)).norm()
        return bool((one - other).norm() <= _TOLERANCE * spread)

    def _rescaled(self, path: str | None, factor: float, *, before: bool = False) -> Tensor:
        if path is None:
            output: Tensor = self._run(self.rows * factor)
            return output
        part = self.module.get_submodule(path)
        if before:
            handle = part.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
        else:
            handle = part.register_forward_hook(lambda _, args, output: output * factor)
        try:
            output = self._run(self.rows)
        finally:
            handle.remove()
        return output

    def _run(self, rows: Tensor, *, watch: Callable[..., None] | None = None) -> Any:
        modes = {part: part.training for part in self.module.modules()}
        handles = [
            part.register_forward_hook(lambda _, *seen, path=path, do=watch: do(path, *seen))
            for path, part in self.module.named_modules()
            if path and watch is not None
        ]
        devices = [rows.device] if rows.is_cuda else []
        self.module.eval()
        try:
            # Each run draws the same numbers, should the module draw any.
            with torch.no_grad(), torch.random.fork_rng(devices):
                return torch.func.functional_call(self.module, self._state(), rows)
        except Exception as error:
            raise ValueError(
                f"{type(self.module).__name__} could not be run on a batch of shape "
                f"{tuple(rows.shape)} to find where its embedding is ({error}): put a "
                "GaussianHead(width) into it yourself, and use ClimbLoss(loss, heads=...)."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for part, mode in modes.items():
                part.training = mode

    def _state(self) -> dict[str, Tensor]:
        """Buffers as copies, and half precision as float32, which does not blur the outcome."""
        state: dict[str, Tensor] = dict(self.module.named_parameters())
        state.update((name, buffer.clone()) for name, buffer in self.module.named_buffers())
        halves = (torch.float16, torch.bfloat16)
        return {name: t.float() if t.dtype in halves else t for name, t in state.items()}


def _is_batch(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2


def _is_unit(rows: Tensor) -> bool:
    """Whether rows are L2-normalised; a row that a ReLU left without any entry stays 0."""
    norms = rows.norm(dim=-1)
    return bool(norms.any() and ((norms - norms.sign()).abs() < 1e-4).all())
