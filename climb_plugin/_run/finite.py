"""Finds non-finite terms without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from climb_plugin._run.deferred import DeferredFlags
from climb_plugin.gaussian import Posterior


def check_finite(
    flags: DeferredFlags,
    terms: Mapping[str, Tensor],
    posteriors: Sequence[Sequence[Posterior]],
) -> None:
    """Raises a ValueError if a term is known by now not to be finite: on CUDA a call or so late.

    Args:
        flags: Of one loss, for all of its calls.
        terms: Detached scalars by name, the same names at every call.
        posteriors: For each head its posteriors; the message tells which are not finite.
    """
    values = torch.stack([term.to(terms["rate"]) for term in terms.values()])
    bad = flags.raised(~torch.isfinite(values))
    if not bad:
        return
    names = list(terms)
    causes = [
        f"the {name} of heads[{i}], view {j}, has {count} non-finite values"
        for i, views in enumerate(posteriors)
        for j, view in enumerate(views)
        for name, tensor in (("embedding or its mean", view.mean), ("logvar", view.logvar))
        if (count := int((~torch.isfinite(tensor)).sum()))
    ]
    said = ", ".join(f"{names[i]} (now {float(values[i])})" for i in bad)
    raise ValueError(
        f"not finite: {'; '.join([said, *causes])}. Lower the learning rate, leave float16, or "
        "look for the first NaN with torch.autograd.set_detect_anomaly(True)."
    )
