"""Watches the training of one loss; may warn, raise or count, and changes no number.

This is the one door to the outer ring: :mod:`climb_plugin.loss` and :mod:`climb_plugin.climb`
import nothing else of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from climb_plugin._graph.sample import Sample
from climb_plugin._run.collapse import CollapseWatch
from climb_plugin._run.finite import FiniteCheck
from climb_plugin._run.missing import Wiring
from climb_plugin._run.nesting import Nesting
from climb_plugin._run.ranks import RankCheck
from climb_plugin._run.sign import SignWatch
from climb_plugin._run.steps import Steps
from climb_plugin.gaussian import Posterior
from climb_plugin.head import GaussianHead


class Watch:
    """All checks of one loss.

    Args:
        heads: The heads of the loss.
        priors: The priors of the loss, one for each head.
        check_base: Whether the base loss must be finite.

    Attributes:
        nesting: Surrounds the call of the base loss.
        steps: Counts the optimiser steps.
    """

    def __init__(
        self, heads: Sequence[GaussianHead], priors: nn.ModuleList, *, check_base: bool
    ) -> None:
        self.nesting = Nesting(active=bool(heads))
        self.steps = Steps(heads, priors)
        self._wiring = Wiring(heads)
        self._ranks = RankCheck(priors)
        self._finite = FiniteCheck(check_base=check_base)
        self._collapse = CollapseWatch()
        self._sign = SignWatch()

    def found(self, value: Tensor, samples: Sequence[Sequence[Sample]]) -> None:
        """Checks the samples of each head that the value of a base loss depends on."""
        self._wiring.check(value, samples)

    def begins(self, prior: str, *, needs_rate: bool) -> None:
        """Checks a step that has posteriors, before their rates are computed."""
        self._ranks.check(prior, needs_rate=needs_rate)

    def terms(
        self,
        base: Tensor,
        rate: Tensor,
        entropy: Tensor,
        *,
        beta: float | Tensor,
        function: Callable[..., Tensor],
        posteriors: Sequence[Sequence[Posterior]],
        rates: Sequence[Tensor] | None,
    ) -> None:
        """Checks the terms of a step, all scalars.

        Args:
            base: The value of the base loss.
            rate: The rate.
            entropy: The conditional entropy.
            beta: Their weight.
            function: The base loss.
            posteriors: For each head its posteriors.
            rates: For each head the rates of its samples; None if the prior compares views: such
                rates do not tell the distance to a fixed prior.
        """
        self._finite.check(base, rate, entropy, posteriors)
        self._collapse.observe(
            base=function, value=base, beta=beta, rates=rates, posteriors=posteriors
        )

    def trains(self, base: Tensor, penalty: Tensor) -> None:
        """Checks a step that will have a backward pass.

        Args:
            base: The value of the base loss, with its graph.
            penalty: The term that beta multiplies, with its graph.
        """
        self.steps.loss_called(base)
        penalty.register_hook(self._after_backward)

    def _after_backward(self, gradient: Tensor) -> None:
        self.steps.backward_done()
        self._sign.check(gradient)
