"""Explains why a loss depends on no sample of a head that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from climb_plugin._graph.sample import Sample, next_number
from climb_plugin._graph.walk import foreign_samples_behind
from climb_plugin._torch import transforms_active
from climb_plugin.checks import warn

if TYPE_CHECKING:
    from climb_plugin.head import GaussianHead


class Wiring:
    """Watches whether the samples of all heads reach the loss.

    Args:
        heads: The heads of the loss.
    """

    def __init__(self, heads: Sequence[GaussianHead]) -> None:
        self._heads = tuple(heads)
        self._proven: set[int] = set()  # Indices of heads whose samples reached a loss.
        self._last = 0  # Calls since the last loss have greater numbers.
        self._warned: set[str] = set()

    def check(self, value: Tensor, found: Sequence[Sequence[Sample]]) -> None:
        """Checks the samples of a training step.

        Args:
            value: The value of the base loss.
            found: For each head the samples behind that value.

        Raises:
            RuntimeError: If a head trains and none of its samples is there, unless the head did
                sample and had samples in earlier losses: then this batch had no use for them.
        """
        last, self._last = self._last, next_number()
        self._check_reentrant(last)
        missing = [place for place, samples in enumerate(found) if not samples]
        self._proven |= {place for place, samples in enumerate(found) if samples}
        trained = [place for place in missing if _trains(self._heads[place])]
        if not trained:
            frozen = [place for place in missing if self._heads[place].training]
            if frozen and len(missing) == len(found):
                self._warn(
                    "all heads of this loss are frozen, and so is what comes before them: they "
                    "pass on their means, there is nothing to regularise, and the loss is the "
                    "base loss alone."
                )
            asleep = self._asleep(missing, last)
            if asleep and value.requires_grad:
                self._warn(
                    f"{self._names(asleep)} is in eval() and was not called for this loss, which "
                    "is therefore the base loss alone. Was the module that it hung on replaced? "
                    "Then wrap the loss of the new one."
                )
            return
        lost = [place for place in trained if not self._may_be_unused(place, last)]
        if lost:
            raise RuntimeError(self._message(value, lost, last))
        self._warn(
            f"this batch's base loss depends on no sample of {self._names(trained)}, though "
            "earlier ones did (a batch without positives? Or was it detached?): for such batches "
            "the bottleneck is left out, and terms.rate is NaN where no head is left."
        )

    def _asleep(self, missing: list[int], last: int) -> list[int]:
        """The heads that are in eval() perhaps because no module holds them any more."""
        return [
            place
            for place in missing
            if place in self._proven
            and not self._heads[place].training
            and self._heads[place].last_calls.get("eval", 0) <= last
        ]

    def _may_be_unused(self, place: int, last: int) -> bool:
        """Whether the head did sample in this step, and had samples in earlier losses."""
        sampled = self._heads[place].last_calls.get("sampled", 0)
        return place in self._proven and sampled > last

    def _check_reentrant(self, last: int) -> None:
        hidden = [
            place
            for place, head in enumerate(self._heads)
            if head.last_calls.get("function", 0) > last
        ]
        if hidden:
            raise RuntimeError(
                f"{self._names(hidden)} was called in training within an autograd function that "
                "runs its code without gradients and once more in the backward pass, as a "
                "reentrant checkpoint does: its posterior cannot be seen from here, and the rate "
                "would be another one. Use torch.utils.checkpoint(..., use_reentrant=False), or "
                "keep the GaussianHead out of the checkpoint."
            )

    def _message(self, value: Tensor, lost: list[int], last: int) -> str:
        return (
            f"this loss depends on no sample of {self._names(lost)}: "
            f"{self._cause(value, lost[0], last)} To evaluate, use torch.no_grad() or eval(). To "
            "compute the plain loss of something else (a teacher's outputs), call "
            "criterion.base(...)."
        )

    def _cause(self, value: Tensor, place: int, last: int) -> str:
        last_calls = self._heads[place].last_calls
        if foreign_samples_behind(value, set(self._heads)):
            return (
                "it depends on samples of other heads. If model or criterion is a copy "
                "(copy.deepcopy, pickle), the heads of this criterion are not those in the model: "
                "copy both together, or wrap the loss of the copied model anew. If they are a "
                "teacher's: one that is neither frozen nor under no_grad samples as well."
            )
        if last_calls.get("sampled", 0) > last:
            return (
                "it was called and did sample, but its sample does not reach the loss: it was "
                "detached, or is not used."
            )
        if last_calls.get("no_grad", 0) > last:
            return "it was called under torch.no_grad(), where a head passes on its mean."
        more = " Forward-mode differentiation alone has no samples." if transforms_active() else ""
        if last_calls.get("frozen", 0) > last:
            return (
                "it was called frozen: neither its input nor what it used requires a gradient."
                + more
            )
        return (
            "it was not called since the loss before. The module on which it hangs must be "
            "called before the loss, as module(x): module.forward(x) skips it, and so does what "
            "was compiled before the loss was wrapped, or a layer that has replaced the one it "
            f"hung on.{more}"
        )

    def _names(self, places: list[int]) -> str:
        return " and ".join(
            f"heads[{place}], GaussianHead({self._heads[place].extra_repr()})" for place in places
        )

    def _warn(self, message: str) -> None:
        kind = message[:16]
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"CLIMB: {message}")


def _trains(head: GaussianHead) -> bool:
    # Under FSDP a head's weights may be plain tensors between two forward passes.
    return head.training and (
        head.logvar.bias.requires_grad or any(p.requires_grad for p in head.parameters())
    )
