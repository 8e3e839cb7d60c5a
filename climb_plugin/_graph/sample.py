"""Ties each sample to its posterior: the autograd node behind the sample holds it.

A posterior so lives exactly as long as the graph of its sample. Nothing has to be cleared, a
forward whose output goes nowhere leaves nothing behind, and what is detached counts nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

from climb_plugin._graph import noise
from climb_plugin._graph.second_run import Fingerprint, seed_of_first_run
from climb_plugin._torch import (
    backward_pass,
    graph_is_kept,
    sequence_number,
    transforms_active,
    version,
)
from climb_plugin.gaussian import Posterior, reparameterize

if TYPE_CHECKING:
    from climb_plugin.head import GaussianHead

_KEY = "climb_plugin"
_numbers = itertools.count(1)
# Samples whose graph is alive and was not freed, by number and by seed.
_alive: WeakValueDictionary[int, Sample] = WeakValueDictionary()
_seeds: WeakValueDictionary[noise.Seed, Sample] = WeakValueDictionary()
# Those that the running backward pass has freed: what comes before them may still run again.
_freed: tuple[int | None, WeakSet[Sample]] = (None, WeakSet())


class Sample:
    """A draw of a head; the autograd node of the sample holds it.

    Attributes:
        head: Whose draw.
        number: Its place among all draws of this process.
        posterior: What it was drawn from; None once a backward pass has freed the graph.
        version: Of the mean, which tells whether it was changed in place since.
        fingerprint: Of the embedding, by which a second run of checkpointed code is recognised.
        is_second_run: Whether a backward pass was running when it was drawn.
        seed: Of its noise.
        thread: In which its node was made.
        sequence: The sequence number of its node.
    """

    def __init__(self, head: GaussianHead, posterior: Posterior, fingerprint: Fingerprint) -> None:
        self.head = head
        self.number = next(_numbers)
        self.posterior: Posterior | None = posterior
        self.version = version(posterior.mean)
        self.fingerprint = fingerprint
        self.is_second_run = backward_pass() is not None
        self.thread = threading.get_ident()
        self.sequence = 0
        if self.is_second_run:
            self.seed = seed_of_first_run(fingerprint, _first_runs(head))
        else:
            self.seed = noise.next_seed(_seeds)
            _seeds[self.seed] = self
        _alive[self.number] = self

    def intact_posterior(self) -> Posterior:
        """The posterior that the sample was drawn from.

        Raises:
            RuntimeError: If a backward pass has freed it, or its mean was changed in place.
        """
        if self.posterior is None:
            raise RuntimeError(
                "a posterior that this loss depends on is gone, because a backward pass has freed "
                "the graph of its sample: compute the loss before, or call "
                "backward(retain_graph=True)."
            )
        if self.version != version(self.posterior.mean):
            raise RuntimeError(
                "an embedding was changed in place after its GaussianHead had drawn a sample of "
                "it, so the posterior of the sample is gone: use the operation that is not in "
                "place."
            )
        return self.posterior

    def free(self) -> None:
        """Lets go of the posterior: a loss that is kept in a list keeps the node, but not this."""
        global _freed
        self.posterior = None
        _alive.pop(self.number, None)
        # So that a run that is repeated in one process draws the same, whatever it has kept.
        if not self.is_second_run:
            _seeds.pop(self.seed, None)
        running = backward_pass()
        if _freed[0] != running:
            _freed = running, WeakSet()
        _freed[1].add(self)


def draw(head: GaussianHead, embedding: Tensor, posterior: Posterior) -> Tensor:
    """A sample of ``posterior``, whose autograd node holds it."""
    sample = Sample(head, posterior, Fingerprint(embedding))
    mean, logvar = posterior
    normal = noise.normal(sample.seed, mean)
    if transforms_active():
        # A function would have nodes of its own for each transform; these keep their metadata.
        value = reparameterize(mean, logvar, noise=normal)
        _metadata(cast("Node", value.grad_fn))[_KEY] = sample
    else:
        value = cast("Tensor", _Sum.apply(mean, normal * torch.exp(logvar / 2), sample))
    sample.sequence = sequence_number(cast("Node", value.grad_fn))
    return value


def sample_of(node: Node) -> Sample | None:
    """The sample that a node holds, if it holds one."""
    sample: Sample | None = getattr(node, "climb_sample", None)
    if sample is None and transforms_active():
        sample = _metadata(node).get(_KEY)
    return sample


def alive(heads: set[GaussianHead]) -> Iterator[Sample]:
    """The samples of ``heads`` whose graph is alive."""
    # A copy: the garbage collector may take entries out at any moment.
    return (sample for sample in list(_alive.values()) if sample.head in heads)


def next_number() -> int:
    """A number that lies behind those of all samples so far and before those to come."""
    return next(_numbers)


def _first_runs(head: GaussianHead) -> Iterator[Sample]:
    samples = [*alive({head}), *(_freed[1] if _freed[0] == backward_pass() else ())]
    return (one for one in samples if one.head is head and not one.is_second_run)


class _Sum(Function):
    """Adds mean and deviation; the function's context, which is the node, holds the sample.

    The last step of the reparameterisation, as it needs to save nothing for its gradient: reading
    saved tensors would run checkpointed code once more.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, deviation: Tensor, sample: Sample) -> Tensor:
        ctx.climb_sample = sample
        return mean + deviation

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        if not graph_is_kept():
            ctx.climb_sample.free()
        return gradient, gradient, None


def _metadata(node: Node) -> dict[str, Any]:
    # A property that torch annotates as a method.
    return cast("dict[str, Any]", node.metadata)
