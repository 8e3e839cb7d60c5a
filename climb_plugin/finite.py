"""Finds non-finite terms without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteCheck:
    """Tells which entries of a vector have been NaN or infinite in any step so far.

    On the CPU it knows at once. On CUDA the flags travel in the background and are known a step
    or so later: a synchronisation per step would cost more than the whole regulariser.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def non_finite(self, values: Tensor) -> list[int]:
        """The entries that are known by now to have been non-finite.

        Args:
            values: A vector, of the same length at every call.
        """
        flags = ~torch.isfinite(values.detach())
        if not flags.is_cuda:
            return _indices(flags)
        if self._flags is not None and self._flags.device == flags.device:
            flags = flags | self._flags
        self._flags = flags
        known: list[int] = []
        if self._copied is not None and self._copy is not None and self._copied.query():
            known = _indices(self._copy)
            self._copied = None
        if self._copied is None:
            self._copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._copy.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return known

    def __reduce__(self) -> tuple[type[FiniteCheck], tuple[()]]:
        # A copy watches a run of its own.
        return FiniteCheck, ()


def _indices(flags: Tensor) -> list[int]:
    return [index for index, flag in enumerate(flags.tolist()) if flag]
