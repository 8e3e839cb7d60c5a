"""The Gaussian head: an embedding in, a sample out."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import fused
from climb_plugin.compiled import Noise, Shelf
from climb_plugin.gaussian import (
    LOGVAR_MAX,
    LOGVAR_MIN,
    bound_logvar,
    unbound_logvar,
)
from climb_plugin.graph import tie, tie_to_node, tied, tied_before
from climb_plugin.noise import NoiseStream
from climb_plugin.replay import Held, first_run, join

# How many forward calls back a checkpointed forward can be recognised when it runs again.
_REPLAYABLE_CALLS = 256
# How many posteriors of compiled code are kept for a loss and its backward.
_KEPT = 64


class Posterior(NamedTuple):
    """p(z | v) of a batch of views: N(mean, exp(logvar)), each of shape (..., B, D)."""

    mean: Tensor
    logvar: Tensor


class Record(NamedTuple):
    """A posterior, the head that made it, and its place among that head's posteriors.

    ``held``: of the first run of a reentrant checkpoint, where the posterior has no graph.
    """

    head: GaussianHead
    call: int
    posterior: Posterior
    held: Held | None = None


class _Claim(NamedTuple):
    """Stands for a record in the node that the record itself keeps alive."""

    head: ReferenceType[GaussianHead]
    call: int


def records_of(value: Tensor) -> list[Record]:
    """The posteriors of all samples that ``value`` depends on, up to the nearest heads."""
    return _resolved(tied(value))


def records_before(record: Record) -> list[Record]:
    """The posteriors of the samples that a posterior was computed from."""
    # All that was compiled in one piece with it is tied to one node, and known already.
    node = record.posterior.logvar.grad_fn if record.held is None else record.held.checkpoint
    return _resolved(tied_before(node))


def joined(base: Tensor, calls: list[list[Record]]) -> tuple[Tensor, list[list[Posterior]]]:
    """``base``, and the posteriors of ``calls``, such that a penalty on them trains the heads."""
    held = [r.held for records in calls for r in records if r.held is not None]
    if not held:
        return base, [[r.posterior for r in records] for records in calls]
    base, values = join(base, held)
    fresh = iter(values)
    return base, [
        [r.posterior if r.held is None else Posterior(*next(fresh)) for r in records]
        for records in calls
    ]


def _resolved(items: list[Any]) -> list[Record]:
    records = []
    for item in items:
        record = item
        if isinstance(item, _Claim):
            head = item.head()
            if head is None:
                continue
            record = head.kept(item.call)
        records.append(record)
    return records


class _Linear(nn.Linear):
    """Computes in the dtype of its input, whatever its weights have.

    A layer that is called, not a function of its weights: FSDP gathers them in the hooks.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class GaussianHead(nn.Module):
    """Turns an embedding into a sample of a Gaussian whose variance is learned.

    In training it returns a sample, in ``eval()`` the mean. Its statistics are computed in
    float32 outside autocast (float64 stays float64); what it returns has the dtype of the
    embedding. :class:`~climb_plugin.loss.ClimbLoss` finds the posteriors of the samples that
    its base loss depends on; nothing has to be passed along or cleared.

    ``GaussianHead(dim)`` takes the embedding as the mean, so the wrapped model computes what it
    did before, up to noise of ``init_std``. ``GaussianHead(in_features, out_features)`` learns
    a linear mean. Both learn the log-variance as a linear function of the embedding.

    Args:
        in_features: Width of the embedding.
        out_features: Width of the sample. None: the embedding itself is the mean.
        init_std: Standard deviation at the start, in units of the embedding.
        seed: Seed of the noise; None: ``torch.initial_seed()``. Two heads of one model want
            different seeds. The noise does not touch torch's own random numbers.

    Raises:
        ValueError: If a width is not positive or ``init_std`` is out of range.

    Shape:
        Input (..., B, in_features), output (..., B, out_features).

    Source: Alemi et al., Deep Variational Information Bottleneck, 2017. Where the Gaussian sits
    and how its variance is bounded are choices of this package, not of the CLIMB paper.

    Examples:
        >>> head = GaussianHead(256)
        >>> embedding = torch.randn(8, 256)
        >>> head(embedding).shape
        torch.Size([8, 256])
        >>> torch.equal(head.eval()(embedding), embedding)
        True
    """

    _is_replica = False  # set by torch on the copies that nn.DataParallel runs

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        init_std: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if width is not None and (not isinstance(width, int) or width < 1):
                raise ValueError(f"{name} must be a positive integer, got {width!r}.")
        if not (math.isfinite(init_std) and init_std > 0):
            raise ValueError(f"init_std must be a positive number, got {init_std!r}.")
        least, most = (math.exp(bound / 2) for bound in (LOGVAR_MIN, LOGVAR_MAX))
        if not least < init_std < most:
            raise ValueError(
                f"init_std must lie strictly between {least:.2g} and {most:.3g}, the bounds of "
                f"the learned std, got {init_std!r}."
            )
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.init_std = init_std
        self.mean = None if out_features is None else _Linear(in_features, out_features)
        # Not initialised at random: the host's random numbers stay where they were.
        self.logvar = nn.utils.skip_init(_Linear, in_features, self.out_features)
        nn.init.zeros_(self.logvar.weight)
        nn.init.constant_(self.logvar.bias, unbound_logvar(2 * math.log(init_std)))
        self.noise = NoiseStream(seed=torch.initial_seed() if seed is None else seed)
        self.before_draw: list[Callable[[], None]] = []
        self._start()

    def _start(self) -> None:
        """What only a running process needs; neither copied nor saved."""
        self._calls: deque[tuple[int, Tensor]] = deque(maxlen=_REPLAYABLE_CALLS)
        self._held: WeakValueDictionary[int, Held] = WeakValueDictionary()
        self._order = itertools.count()
        self._shelf = Shelf()
        self._kept: OrderedDict[int, Record] = OrderedDict()
        self._done = -1  # the last of these whose backward has run
        self._compiled_noise = Noise(self)

    def forward(self, embedding: Tensor) -> Tensor:
        """A sample of the posterior in training, its mean in ``eval()``."""
        return self._sample(embedding) if self.training else self.embed(embedding)

    def embed(self, embedding: Tensor) -> Tensor:
        """The mean of the posterior, in the dtype of ``embedding``."""
        self._check(embedding)
        if self.mean is None:
            return embedding
        with _no_autocast(embedding):
            return cast("Tensor", self.mean(_wide(embedding))).to(embedding.dtype)

    def posterior(self, embedding: Tensor) -> Posterior:
        """Mean and log-variance, in float32 or float64; draws nothing.

        Args:
            embedding: Of shape (..., B, in_features).

        Raises:
            TypeError: If ``embedding`` is not a floating-point tensor.
            ValueError: If its shape does not fit.
        """
        self._check(embedding)
        with _no_autocast(embedding):
            wide = _wide(embedding)
            mean = wide if self.mean is None else self.mean(wide)
            logvar = self.logvar(wide)
            # FSDP's mixed precision, where it is applied to a layer, casts what goes through it.
            return Posterior(mean.to(wide.dtype), bound_logvar(logvar.to(wide.dtype)))

    def teacher(self) -> TeacherHead:
        """A head of the same layout and values for an EMA teacher: frozen, passes on the mean."""
        with torch.random.fork_rng(devices=[]):
            teacher = TeacherHead(
                self.in_features,
                None if self.mean is None else self.out_features,
                init_std=self.init_std,
                seed=self.noise.seed,
            )
        teacher.to(self.logvar.weight.device, self.logvar.weight.dtype)
        teacher.load_state_dict(self.state_dict())
        return teacher.requires_grad_(False)

    def collect(self) -> None:
        """Takes the posteriors that compiled code has left, now that they have their graph.

        They are outputs of the node that they shall be found by, so it cannot hold them: that
        would be a cycle through C++, which nothing frees. The head does, until a forward that
        follows the backward through it or through a later one.
        """
        for posterior in self._shelf.take():
            record = self._record(posterior)
            # The mean may be what went into the compiled code, with a node of its own. Where the
            # logvar is frozen, it was computed there.
            output = posterior.mean if posterior.logvar.grad_fn is None else posterior.logvar
            node = output.grad_fn
            if node is None:
                continue
            claim = _Claim(ref(self), record.call)
            tie(claim, to=output)
            node.register_hook(lambda *_, claim=claim: _done(claim))
            self._kept[record.call] = record
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    def kept(self, call: int) -> Record:
        """A record of compiled code.

        Raises:
            RuntimeError: If it is gone.
        """
        if call not in self._kept:
            raise RuntimeError(
                f"a posterior of compiled code that this loss depends on is gone: {_KEPT} are "
                "kept, until the forward after a backward through them or later ones. Call the "
                "loss and backward after fewer calls of the head, or do not compile the head."
            )
        return self._kept[call]

    def draw(self, embedding: Tensor) -> Tensor:
        """The noise of the next sample: shape (..., B, out_features), float32 or float64."""
        return self._draw(embedding)[1]

    def _draw(self, embedding: Tensor) -> tuple[int, Tensor]:
        """The number of this call, a second run's being that of the first, and its noise."""
        self.collect()
        if not _in_backward():
            for old in [call for call in self._kept if call <= self._done]:
                del self._kept[old]
        for watch in tuple(self.before_draw):
            watch()
        call = self._replayed_call(embedding)
        if call is None:
            call = self.noise.drawn
            generator = self.noise.next(embedding.device)
            self._calls.append((call, _fingerprint(embedding)))
        else:
            generator = self.noise.at(call, embedding.device)
        noise = torch.randn(
            (*embedding.shape[:-1], self.out_features),
            generator=generator,
            dtype=torch.float64 if embedding.dtype == torch.float64 else torch.float32,
            device=embedding.device,
        )
        return call, noise

    def _sample(self, embedding: Tensor) -> Tensor:
        if self._is_replica:
            raise RuntimeError(
                "GaussianHead cannot train in nn.DataParallel, which runs copies of the model that "
                "last for one forward: the loss would not find their posteriors. Train on one GPU, "
                "or use DistributedDataParallel. In eval() nn.DataParallel works."
            )
        posterior = self.posterior(embedding)
        if embedding.numel() == 0:
            raise ValueError(
                f"GaussianHead cannot sample for an empty batch, got shape "
                f"{tuple(embedding.shape)}: skip the step or use drop_last=True."
            )
        if torch.compiler.is_compiling():
            noise = self._compiled_noise.draw(embedding, self.out_features)
            sample = fused.sample(*posterior, noise)
            if sample.requires_grad:
                self._shelf.put(posterior)
        else:
            call, noise = self._draw(embedding)
            held = self._held.get(call)
            if held is not None and torch.is_grad_enabled():
                posterior = Posterior(*held.give(posterior))
            sample = fused.sample(*posterior, noise)
            if sample.grad_fn is not None:
                tie(self._record(posterior), to=sample)
            elif not torch.is_grad_enabled() and not _in_backward():
                self._hold(call, posterior)
        return sample.to(embedding.dtype)

    def _record(self, posterior: Posterior, held: Held | None = None) -> Record:
        return Record(self, next(self._order), posterior, held)

    def _hold(self, call: int, posterior: Posterior) -> None:
        """Keeps what has no graph yet with the checkpoint that will run it again, if one will."""
        checkpoint = first_run()
        if checkpoint is not None:
            held = self._held[call] = Held(posterior, checkpoint)
            tie_to_node(self._record(Posterior(*held.values), held), checkpoint)

    def _replayed_call(self, embedding: Tensor) -> int | None:
        """The call that activation checkpointing is running again, if it is.

        A second run needs the noise of the first, or the gradient is that of another sample.
        """
        if not _in_backward():
            return None
        fingerprint = _fingerprint(embedding)
        for index in reversed(range(len(self._calls))):
            call, known = self._calls[index]
            if known.shape == fingerprint.shape and torch.equal(known, fingerprint):
                # Backward runs last calls first: of two alike, the next to run is the earlier.
                del self._calls[index]  # first: a full deque would drop its last
                self._calls.appendleft((call, known))
                return call
        raise RuntimeError(
            "a checkpointed forward ran again with another embedding than the first time, so its "
            "noise cannot be reproduced: make what is checkpointed deterministic, or keep the "
            "GaussianHead out of it."
        )

    def _check(self, embedding: Tensor) -> None:
        if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
            received = getattr(embedding, "dtype", type(embedding).__name__)
            raise TypeError(f"GaussianHead takes floating-point embeddings, got {received}.")
        # A size is a tensor then, and asking for its value warns.
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        if embedding.ndim < 2 or embedding.shape[-1] != self.in_features:
            raise ValueError(
                f"GaussianHead({self.in_features}) takes embeddings of shape "
                f"(..., B, {self.in_features}), got {tuple(embedding.shape)}."
            )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.in_features}, {self.out_features}, init_std={self.init_std}"

    def get_extra_state(self) -> Tensor:
        """The state of the noise, so that a resumed run draws what it would have drawn."""
        # Two 63-bit halves would do; four 32-bit words hold any unsigned 64-bit seed.
        numbers = (self.noise.seed, self.noise.drawn)
        return torch.tensor([word for n in numbers for word in divmod(n, 1 << 32)])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what :meth:`get_extra_state` returned.

        Raises:
            ValueError: If ``state`` is something else.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (4,):
            raise ValueError(
                f"the state of a GaussianHead's noise is four int64 numbers, got {state!r}: the "
                "state dict is damaged, was converted to another dtype, or is of something else."
            )
        seed_high, seed_low, drawn_high, drawn_low = state.tolist()
        self.noise.seed = (seed_high << 32) + seed_low
        self.noise.drawn = (drawn_high << 32) + drawn_low

    def __getstate__(self) -> dict[str, object]:
        running = ("_calls", "_held", "_order", "_shelf", "_kept", "_done", "_compiled_noise")
        return {name: value for name, value in self.__dict__.items() if name not in running}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()


def _done(claim: _Claim) -> None:
    head = claim.head()
    if head is not None:
        head._done = max(head._done, claim.call)


class TeacherHead(GaussianHead):
    """The head of an EMA teacher: parameters like the student's, but it passes on the mean."""

    def forward(self, embedding: Tensor) -> Tensor:
        """The mean of the posterior, in training too."""
        return self.embed(embedding)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _fingerprint(embedding: Tensor) -> Tensor:
    """The first row: enough to tell the views of a step apart, and small."""
    return embedding.detach().flatten(0, -2)[0].clone()


def _in_backward() -> bool:
    # What torch.utils.checkpoint itself asks; there is no public name for it.
    return torch._C._current_graph_task_id() != -1
