"""Recognises the second run of checkpointed code, which needs the noise of the first.

torch.utils.checkpoint drops the tensors within and runs the code again in the backward pass. With
other noise the gradient would be that of another sample. The whole batch identifies a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from climb_plugin._torch import plain, without_modes, without_transforms

if TYPE_CHECKING:
    from climb_plugin._graph.noise import Seed
    from climb_plugin._graph.sample import Sample


class Fingerprint:
    """One number for each row of a batch (..., B, D), on the batch's device."""

    def __init__(self, embedding: Tensor) -> None:
        with torch.no_grad(), without_transforms():
            rows = plain(embedding).detach().flatten(0, -2)
            # float32 at least: numpy has no bfloat16, and sums of two rows might agree.
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._rows = rows @ _direction(rows.shape[-1], rows.dtype, rows.device)
        self._content: bytes | None = None

    def content(self) -> bytes:
        """The fingerprint as bytes, the same for the same batch; waits for the device, once."""
        if self._content is None:
            with without_modes():
                self._content = self._rows.cpu().numpy().tobytes()
        return self._content


def seed_of_first_run(fingerprint: Fingerprint, firsts: Iterable[Sample]) -> Seed:
    """The seed of the one sample with this fingerprint, or a RuntimeError.

    Args:
        fingerprint: Of the second run.
        firsts: The samples that the head has drawn outside of backward passes.
    """
    content = fingerprint.content()
    seeds = {one.seed for one in firsts if one.fingerprint.content() == content}
    if len(seeds) == 1:
        return seeds.pop()
    if seeds:
        raise RuntimeError(
            f"a checkpointed GaussianHead ran again in the backward pass, and {len(seeds)} of its "
            "calls had the very same batch: they cannot be told apart, so the noise of the first "
            "run cannot be found. Take one call out of the checkpoint, or call it on both at once "
            "(torch.cat)."
        )
    raise RuntimeError(
        "a GaussianHead ran in the backward pass, as checkpointed code does, but had no first run "
        "with gradients on this batch, so there is no noise that it could repeat. Checkpoint with "
        "use_reentrant=False, make what is checkpointed deterministic, or keep the GaussianHead "
        "out of the checkpoint."
    )


@lru_cache(maxsize=16)
def _direction(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made once, so hidden from modes: selective checkpointing would miss it in a second run.
    with without_modes():
        generator = torch.Generator(device="cpu").manual_seed(0)
        direction = torch.randn(width, generator=generator, dtype=torch.float64, device="cpu")
        return direction.to(device, dtype)
