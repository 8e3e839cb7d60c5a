"""Gets flags from the device without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from climb_plugin._torch import plain, without_transforms


class DeferredFlags:
    """Tells which entries of a vector of flags are known to have been raised.

    On the CPU the flags of a call are known at once. On CUDA the flags of all calls so far travel
    in the background and are known a call or so later: a synchronisation per step would cost more
    than the whole regulariser.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def raised(self, flags: Tensor) -> list[int]:
        """The entries known by now; ``flags`` is a vector of bools, of one length at all calls."""
        if not flags.is_cuda:
            return _indices(flags)
        known: list[int] = []
        if self._copied is not None and self._copy is not None and self._copied.query():
            known = _indices(self._copy)
            self._copied = None
            if known:  # said once: a host may skip the batch and go on
                self._flags = None
        if self._flags is not None and self._flags.device == flags.device:
            flags = flags | self._flags
        self._flags = flags
        if self._copied is None:
            self._copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._copy.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return known

    def __reduce__(self) -> tuple[type[DeferredFlags], tuple[()]]:
        # A copy watches a run of its own.
        return DeferredFlags, ()


def _indices(flags: Tensor) -> list[int]:
    with without_transforms():
        return [index for index, flag in enumerate(plain(flags).tolist()) if flag]
