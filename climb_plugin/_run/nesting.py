"""Notices a ClimbLoss that is called within another one, which would count the rate twice."""

from __future__ import annotations

from types import TracebackType

import torch

_calls = 0


class Nesting:
    """Surrounds the call of a base loss.

    Args:
        active: Whether the criterion has heads; without any, nesting counts nothing twice.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        global _calls
        if not self._active or torch.compiler.is_compiling():
            return
        if _calls:
            raise RuntimeError(
                "this ClimbLoss is called within the base loss of another ClimbLoss, so the rate "
                "would count twice: wrap the whole loss once, or add up two criteria outside."
            )
        _calls += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _calls
        if self._active and _calls and not torch.compiler.is_compiling():
            _calls -= 1
