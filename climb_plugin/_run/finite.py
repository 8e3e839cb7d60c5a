"""Finds non-finite terms without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from climb_plugin._run.deferred import DeferredFlags
from climb_plugin.gaussian import Posterior


class FiniteCheck:
    """Raises if a term has been NaN or infinite: at once on the CPU, on CUDA a call or so late.

    Args:
        check_base: Whether the base loss is checked too.
    """

    def __init__(self, *, check_base: bool) -> None:
        self._check_base = check_base
        self._flags = DeferredFlags()

    def check(
        self,
        base: Tensor,
        rate: Tensor,
        entropy: Tensor,
        posteriors: Sequence[Sequence[Posterior]],
    ) -> None:
        """Checks the terms of a step, detached scalars.

        Raises:
            ValueError: If one is known by now not to be finite.
        """
        terms = {"rate": rate, "entropy": entropy}
        if self._check_base:
            terms = {"base loss": base, **terms}
        values = torch.stack([term.to(rate) for term in terms.values()])
        bad = self._flags.raised(~torch.isfinite(values))
        if bad:
            raise ValueError(_message(list(terms), values, bad, posteriors))


def _message(
    names: list[str],
    values: Tensor,
    bad: list[int],
    posteriors: Sequence[Sequence[Posterior]],
) -> str:
    causes = [
        f"the {name} of heads[{i}], view {j}, has {count} non-finite values"
        for i, views in enumerate(posteriors)
        for j, view in enumerate(views)
        for name, tensor in (("embedding or its mean", view.mean), ("logvar", view.logvar))
        if (count := int((~torch.isfinite(tensor)).sum()))
    ]
    return (
        "not finite: "
        + ", ".join(f"{names[i]} (now {float(values[i])})" for i in bad)
        + (f"; {'; '.join(causes)}" if causes else "")
        + ". Lower the learning rate, leave float16, or look for the first NaN with "
        "torch.autograd.set_detect_anomaly(True)."
    )
