"""Ties each sample to its posterior: the autograd node of the sample holds the posterior.

So a posterior lives exactly as long as the graph of the sample. Nothing has to be cleared, a
forward with an unused output leaves nothing behind, and a detached sample counts nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

from climb_plugin._graph import noise
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
_seeding = threading.Lock()  # Two threads must not find the same seed free.
# Those freed by the running backward pass, which may start their second run only after that.
_freed: tuple[int | None, WeakSet[Sample]] = (None, WeakSet())


class Sample:
    """A draw of a head; the autograd node of the sample holds this object."""

    def __init__(
        self, head: GaussianHead, posterior: Posterior, fingerprint: noise.Fingerprint
    ) -> None:
        self.head = head
        self.number = next(_numbers)  # Place among all draws of this process.
        self.posterior: Posterior | None = posterior  # None once a backward pass freed the graph.
        self.version = version(posterior.mean)  # Later versions tell of a change in place.
        self.fingerprint = fingerprint  # Of the embedding.
        self.is_second_run = backward_pass() is not None
        self.thread = threading.get_ident()
        self.sequence = 0  # The sequence number of the node, which numbers the thread's nodes.
        if self.is_second_run:
            self.seed = noise.seed_of_first_run(fingerprint, _first_runs(head))
        else:
            with _seeding:
                self.seed = noise.next_seed(_seeds)
                _seeds[self.seed] = self
        _alive[self.number] = self

    def intact_posterior(self) -> Posterior:
        """The posterior that was drawn from; a RuntimeError if freed, or changed in place."""
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

    def note_gradient(self) -> None:
        """Notes at the head that a gradient came through this sample."""
        if not self.is_second_run:
            calls = self.head.last_calls
            calls["trained"] = max(calls.get("trained", 0), self.number)

    def free(self) -> None:
        """Drops the posterior, which a loss kept in a list would else keep alive with the node."""
        global _freed
        self.posterior = None
        _alive.pop(self.number, None)
        # Else a run repeated in one process would skip the seeds of losses that were kept.
        if not self.is_second_run:
            _seeds.pop(self.seed, None)
        running = backward_pass()
        if _freed[0] != running:
            _freed = running, WeakSet()
        _freed[1].add(self)


def draw(head: GaussianHead, embedding: Tensor, posterior: Posterior) -> Tensor:
    """Draws a sample of ``posterior``; the autograd node of the sample holds the posterior."""
    sample = Sample(head, posterior, noise.Fingerprint(embedding))
    mean, logvar = posterior
    normal = noise.normal(sample.seed, mean)
    if transforms_active():
        # A Function would have a node per transform; ordinary nodes keep their metadata.
        value = reparameterize(mean, logvar, noise=normal)
        _metadata(cast("Node", value.grad_fn))[_KEY] = sample
    else:
        value = cast("Tensor", _Sum.apply(mean, normal * torch.exp(logvar / 2), sample))
    sample.sequence = sequence_number(cast("Node", value.grad_fn))
    return value


def samples_at(nodes: Sequence[Node]) -> list[Sample]:
    """The samples that nodes hold."""
    held: list[Sample | None] = [getattr(node, "climb_sample", None) for node in nodes]
    if transforms_active():
        held += [_metadata(node).get(_KEY) for node in nodes]
    return [sample for sample in held if sample is not None]


def alive(heads: set[GaussianHead]) -> list[Sample]:
    """The samples of ``heads`` whose graph is alive."""
    # A copy: the garbage collector may take entries out at any moment.
    return [sample for sample in list(_alive.values()) if sample.head in heads]


def next_number() -> int:
    """A number above those of all samples so far and below those to come."""
    return next(_numbers)


def _first_runs(head: GaussianHead) -> list[Sample]:
    samples = [*alive({head}), *(_freed[1] if _freed[0] == backward_pass() else ())]
    return [one for one in samples if one.head is head and not one.is_second_run]


class _Sum(Function):
    """Adds mean and deviation; the function's context, which is the node, holds the sample.

    Only this last step of the reparameterisation is a Function: a sum saves no tensors for the
    gradient, and reading saved tensors would run checkpointed code once more.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, deviation: Tensor, sample: Sample) -> Tensor:
        ctx.climb_sample = sample
        return mean + deviation

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.climb_sample.note_gradient()
        if not graph_is_kept():
            ctx.climb_sample.free()
        return gradient, gradient, None


def _metadata(node: Node) -> dict[str, Any]:
    # torch annotates this property as a method.
    return cast("dict[str, Any]", node.metadata)
