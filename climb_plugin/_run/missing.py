"""Explains why a loss depends on no sample of a head that trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from climb_plugin._graph.sample import Sample, next_number
from climb_plugin._graph.walk import foreign_samples_behind
from climb_plugin._torch import transforms_active
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead, is_look


class Wiring:
    """Watches whether the samples of all heads of a loss reach the loss."""

    def __init__(self, heads: Sequence[GaussianHead]) -> None:
        self._heads = tuple(heads)
        self._proven: set[int] = set()  # Indices of heads whose samples reached a loss.
        self._last = 0  # Calls since the last loss have greater numbers.
        self._warned: set[str] = set()

    def check(self, value: Tensor, found: Sequence[Sequence[Sample]]) -> None:
        """Checks the samples of a training step, of each head those found behind the base loss.

        Raises a RuntimeError if a head trains and none of its samples is there, unless the head had
        samples in earlier losses, and did sample now or another head's are there: then this batch
        had no use for it.
        """
        last, self._last = self._last, next_number()
        hidden = self._called("function", last)
        if hidden:
            raise RuntimeError(
                f"{self._names(hidden)} was called in training within an autograd function that "
                "runs its code without gradients and once more in the backward pass, as a "
                "reentrant checkpoint does: its posterior cannot be seen from here, and the rate "
                "would be another one. Use torch.utils.checkpoint(..., use_reentrant=False), or "
                "keep the GaussianHead out of the checkpoint."
            )
        missing = [place for place, samples in enumerate(found) if not samples]
        self._proven |= set(range(len(found))).difference(missing)
        if missing and not is_look(value, self._heads):
            self._explain(value, missing, last)

    def _explain(self, value: Tensor, missing: list[int], last: int) -> None:
        trained = [place for place in missing if _trains(self._heads[place])]
        if not trained:
            self._warn_of_means(value, missing, last)
            return
        drawn = self._proven.intersection(self._called("sampled", last))
        lost = [place for place in trained if place not in drawn]
        if len(missing) < len(self._heads) and self._proven.issuperset(lost):
            lost = []  # as of a kind of image that this batch has none of
        if lost:
            raise RuntimeError(
                f"this loss depends on no sample of {self._names(lost)}: "
                f"{self._cause(value, lost[0], last)} To evaluate, use torch.no_grad() or eval(). "
                "To compute the plain loss of something else (a teacher's outputs), call "
                "criterion.base(...)."
            )
        self._warn(
            f"this batch's base loss depends on no sample of {self._names(trained)}, though "
            "earlier ones did (a batch without positives, or without that kind of image? Or was it "
            "detached, or its module replaced?): for such batches the bottleneck is left out, and "
            "terms.rate is NaN where no head is left."
        )

    def _warn_of_means(self, value: Tensor, missing: list[int], last: int) -> None:
        if len(missing) == len(self._heads) and any(self._heads[n].training for n in missing):
            self._warn(
                "all heads of this loss are frozen, and so is what comes before them: they "
                "pass on their means, there is nothing to regularise, and the loss is the "
                "base loss alone."
            )
        # In eval() and not called: perhaps no module holds the head any more.
        known = self._proven.difference(self._called("eval", last))
        asleep = [n for n in missing if n in known and not self._heads[n].training]
        if asleep and value.requires_grad:
            self._warn(
                f"{self._names(asleep)} is in eval() and was not called for this loss, which "
                "is therefore the base loss alone. Was the module that it hung on replaced? "
                "Then wrap the loss of the new one."
            )

    def _cause(self, value: Tensor, place: int, last: int) -> str:
        if foreign_samples_behind(value, set(self._heads)):
            return (
                "it depends on samples of other heads. If model or criterion is a copy "
                "(copy.deepcopy, pickle), the heads of this criterion are not those in the model: "
                "copy both together, or wrap the loss of the copied model anew. If they are a "
                "teacher's: one that is neither frozen nor under no_grad samples as well."
            )
        if place in self._called("sampled", last):
            return (
                "it was called and did sample, but its sample does not reach the loss: it was "
                "detached, or is not used."
            )
        if place in self._called("no_grad", last):
            return "it was called under torch.no_grad(), where a head passes on its mean."
        more = " Forward-mode differentiation alone has no samples." if transforms_active() else ""
        if place in self._called("frozen", last):
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

    def _called(self, outcome: str, last: int) -> list[int]:
        """The heads that were called with this outcome since the last loss."""
        calls = [head.last_calls.get(outcome, 0) for head in self._heads]
        return [place for place, number in enumerate(calls) if number > last]

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
