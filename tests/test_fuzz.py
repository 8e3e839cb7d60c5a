"""Any order of what a training script does: the terms are those of a naive computation, no
posterior outlives its graph, and what went wrong in one step does not show in the next.

Posteriors have to go by reference counting alone: no test here asks the garbage collector first.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import sys
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._graph import noise
from climb_plugin._graph.walk import samples_behind
from climb_plugin.schedule import Constant, Cosine, Linear, TargetRate

LAYOUTS = ["identity", "linear", "chain", "pair"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PRIORS = ["standard", "learned", "view"]
WIDTH = 5


class Net(nn.Module):
    """One head, or two: one after the other, or side by side."""

    def __init__(self, layout: str, *, width: int = 6) -> None:
        super().__init__()
        self.layout = layout
        self.first = nn.Linear(WIDTH, width)
        heads = {
            "identity": [GaussianHead(width)],
            "linear": [GaussianHead(width, 4)],
            "chain": [GaussianHead(width), GaussianHead(4)],
            "pair": [GaussianHead(width), GaussianHead(width, 4)],
        }
        self.between = nn.Linear(width, 4)
        self.heads = nn.ModuleList(heads[layout])
        for head in self.heads:
            weight = 0.1 * torch.randn_like(head.logvar.weight)
            head.load_state_dict({**head.state_dict(), "logvar.weight": weight})

    def forward(self, view: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and what each head got."""
        embedding = self.first(view)
        one, two = self.heads[0], self.heads[-1]
        if self.layout == "chain":
            projected = self.between(one(embedding))
            return two(projected), [embedding, projected]
        if self.layout == "pair":
            return torch.cat([one(embedding), two(embedding)], dim=-1), [embedding, embedding]
        return one(embedding), [embedding]


class Base(nn.Module):
    """A loss with a state, which can fail in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *outputs: Tensor, fail: str = "") -> Tensor:
        self.calls += 1
        if fail == "raise":
            raise KeyError("of the base")
        value = torch.stack([out.square().mean() for out in outputs]).mean()
        return value * math.nan if fail == "nan" else value


class Seen(NamedTuple):
    """An output, and the mean and logvar of each head for it, detached, in float64."""

    out: Tensor
    posteriors: list[tuple[Tensor, Tensor]]
    refs: list[weakref.ReferenceType[Tensor]]
    updates: int


def remembered(out: Tensor, net: Net) -> list[weakref.ReferenceType[Tensor]]:
    """Of all posteriors that an output depends on."""
    posteriors = [sample.posterior for sample in samples_behind(out, set(net.heads))]
    return [weakref.ref(posterior.logvar) for posterior in posteriors if posterior is not None]


class Controller:
    """What TargetRate says it does, in plain numbers."""

    def __init__(self, target: TargetRate) -> None:
        self.target, self.log_beta = target, math.log(target.start)
        self.before: float | None = None
        self.step, self.rates = 0, list[float]()

    def beta(self, step: int) -> float:
        if self.rates and step != self.step:
            mean = sum(self.rates) / len(self.rates)
            before = mean if self.before is None else self.before
            self.before = mean
            error, change = self.error(mean), 0.0
            change = error - self.error(before)
            self.log_beta += self.target.speed * min(1.0, max(-1.0, error)) + 3 * change
            low, high = (math.log(bound) for bound in self.target.bounds)
            self.log_beta = min(high, max(low, self.log_beta))
            self.rates = []
        return math.exp(self.log_beta)

    def observe(self, step: int, rate: float) -> None:
        self.beta(step)
        self.step = step
        self.rates.append(rate)

    def error(self, rate: float) -> float:
        return math.log(max(rate, 1e-6) / self.target.nats)


# Of the nats that are free.
SCHEDULES: dict[str, Callable[[float], Any]] = {
    "none": lambda free: Constant(0.0),
    "constant": lambda free: Constant(0.1),
    "linear": lambda free: Linear(0.1, warmup=4, delay=2),
    "cosine": lambda free: Cosine(0.1, warmup=6),
    "target": lambda free: TargetRate(10.0 + free, beta=0.01, speed=0.1),
}


def ramp(name: str, step: int) -> float:
    if name == "linear":
        return 0.1 * min(1.0, max(0.0, (step - 2) / 4))
    if name == "cosine":
        return 0.1 * (1 - math.cos(math.pi * min(1.0, step / 6))) / 2
    return {"none": 0.0, "constant": 0.1}[name]


def make_loss(net: Net, **options: Any) -> ClimbLoss:
    return ClimbLoss(Base(), heads=list(net.heads), **options)


class Naive(NamedTuple):
    rate: float
    entropy: float
    penalty: float


def naive(loss: ClimbLoss, views: list[list[tuple[Tensor, Tensor]]]) -> Naive:
    """By torch.distributions; ``views`` has the posteriors of each head for each view."""
    rates: list[Tensor] = []
    entropies: list[Tensor] = []
    for head, posteriors in enumerate(zip(*views, strict=True)):
        gaussians = [Independent(Normal(m, torch.exp(v / 2)), 1) for m, v in posteriors]
        if loss.prior == "view":
            pairs = [(p, q) for i, p in enumerate(gaussians) for q in gaussians[i + 1 :]]
            rate = [(kl_divergence(p, q) + kl_divergence(q, p)) / 2 for p, q in pairs]
        else:
            rate = [kl_divergence(p, fixed(loss, head, p.mean)) for p in gaussians]
        rates.append(torch.cat(rate))
        entropies.append(torch.cat([p.entropy() for p in gaussians]))
    entropy = sum(e.mean().item() for e in entropies)
    paid = sum((r - loss.free_nats).clamp(min=0).mean().item() for r in rates)
    return Naive(sum(r.mean().item() for r in rates), entropy, paid + loss.alpha * entropy)


def fixed(loss: ClimbLoss, head: int, like: Tensor) -> Independent:
    zeros = torch.zeros_like(like)
    if loss.prior == "standard":
        return Independent(Normal(zeros, zeros + 1), 1)
    named = {
        name: p.detach().cpu().double() for name, p in loss.climb_priors[head].named_parameters()
    }
    logvar = -5 + 30 / math.pi * torch.atan((named["raw_logvar"] + 5) * math.pi / 30)
    return Independent(Normal(zeros + named["mean"], zeros + torch.exp(logvar / 2)), 1)


@contextlib.contextmanager
def raising(kind: type[Exception], words: str) -> Iterator[None]:
    """Like pytest.raises, but keeps no traceback, whose frames would keep tensors."""
    try:
        yield
    except kind as error:
        found = str(error)
        error.__traceback__ = None  # Python 3.13: contextlib's frame holds it, and it the frame
    else:
        found = "no error"
    assert words in found


batches = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))


class Training(RuleBasedStateMachine):
    device = torch.device("cpu")

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        prior=st.sampled_from(PRIORS),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        alpha=st.sampled_from([0.0, 0.5]),
        free_nats=st.sampled_from([0.0, 8.0, 11.5]),  # some samples of a head above, some below
    )
    def start(self, layout: str, prior: str, schedule: str, alpha: float, free_nats: float) -> None:
        self.layout, self.schedule = layout, schedule
        self.options: dict[str, Any] = {"prior": prior, "alpha": alpha, "free_nats": free_nats}
        self.dtype = torch.float32
        self.net, self.loss = self.build(seed=1)
        self.controller: Controller | None = None
        if schedule == "target":
            self.controller = Controller(self.loss.schedule)
        self.steps = self.updates = self.calls = 0
        self.fresh = False  # whether the loss was called since the last step
        self.sampled = False  # whether the heads were called since the loss was
        self.proven = False  # whether the loss has had samples
        self.kept: list[Seen] = []
        self.gone: list[weakref.ReferenceType[Tensor]] = []
        self.optimise()

    def build(self, seed: int) -> tuple[Net, ClimbLoss]:
        torch.manual_seed(seed)
        net = Net(self.layout)
        beta = SCHEDULES[self.schedule](self.options["free_nats"] * len(net.heads))
        loss = make_loss(net, beta=beta, **self.options)
        return net.to(self.device, self.dtype), loss.to(self.device, self.dtype)

    def optimise(self) -> None:
        parameters = [*self.net.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3)

    # What the rules are made of

    def data(self, batch: tuple[int, int, int]) -> list[Tensor]:
        views, size, seed = batch
        if self.options["prior"] == "view":
            views = max(views, 2)
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(views, size, WIDTH, generator=generator)
        return list(data.to(self.device, self.dtype))

    def view(self, data: Tensor) -> Seen:
        """One training forward; from now on its posteriors are expected to go."""
        out, embeddings = self.net(data)
        posteriors = []
        for head, embedding in zip(self.net.heads, embeddings, strict=True):
            mean, logvar = head.posterior(embedding.detach())
            posteriors.append((mean.detach().cpu().double(), logvar.detach().cpu().double()))
        self.sampled = True
        refs = remembered(out, self.net)
        assert len(refs) == len(self.net.heads)
        self.gone += refs
        return Seen(out, posteriors, refs, self.updates)

    def beta(self) -> float:
        if self.controller is not None:
            return self.controller.beta(self.steps)
        return ramp(self.schedule, self.steps)

    def check(self, seen: list[Seen]) -> Tensor:
        """Calls the loss and compares all that it says."""
        beta, outs = self.beta(), [view.out for view in seen]
        total = self.loss(*outs)
        self.calls += 1
        terms = self.loss.terms
        expected = naive(self.loss, [view.posteriors for view in seen])
        assert terms.rate.item() == pytest.approx(expected.rate, rel=1e-5, abs=1e-6)
        assert terms.rate.item() >= 0
        assert terms.entropy.item() == pytest.approx(expected.entropy, rel=1e-5, abs=1e-4)
        assert terms.beta.item() == pytest.approx(beta, rel=1e-4)
        with torch.no_grad():
            assert torch.equal(terms.base, Base()(*outs))
        whole = terms.base.item() + terms.beta.item() * expected.penalty
        assert total.item() == pytest.approx(whole, rel=1e-4, abs=1e-5)
        assert torch.equal(terms.total, total.detach())
        if self.controller is not None:
            self.controller.observe(self.steps, expected.rate)
        self.fresh = True
        self.heard()
        return total

    def heard(self) -> None:
        """The loss has looked at samples, whatever came of it."""
        self.sampled, self.proven = False, True

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.steps += self.fresh
        self.fresh = False

    def drop(self) -> None:
        """Of the outputs that a script still holds."""
        for view in self.kept:
            self.gone += view.refs
        self.kept = []

    def keep(self, seen: list[Seen]) -> None:
        self.kept = seen
        held = {id(ref) for view in seen for ref in view.refs}
        self.gone = [ref for ref in self.gone if id(ref) not in held]

    def adopt(self, net: Net, loss: ClimbLoss, batch: tuple[int, int, int]) -> None:
        """Goes on with what must be the same model and loss; the first step of both is equal."""
        self.drop()
        assert loss.step == self.steps
        assert loss.beta == self.loss.beta
        data = self.data(batch)
        results = []
        position = noise.position()
        for one, other in ((self.net, self.loss), (net, loss)):
            noise.restore(position)
            outs = [one(view)[0] for view in data]
            other(*outs)
            results.append([*(out.detach() for out in outs), *other.terms])
            del outs
        for value, again in zip(*results, strict=True):
            assert torch.equal(value, again)
        del one, other, results, value, again
        self.net, self.loss = net, loss
        self.calls += 1
        self.fresh = True
        self.heard()
        if self.controller is not None:
            self.controller.observe(self.steps, self.loss.terms.rate.item())
        self.optimise()

    # The rules

    @rule(batch=batches, update=st.booleans())
    @precondition(lambda self: self.net.training)
    def step(self, batch: tuple[int, int, int], update: bool) -> None:
        self.check([self.view(view) for view in self.data(batch)]).backward()
        if update:
            self.update()

    @rule(batch=batches, update=st.booleans())
    @precondition(lambda self: self.net.training and self.options["prior"] != "view")
    def step_with_a_call_for_each_view(self, batch: tuple[int, int, int], update: bool) -> None:
        seen = [self.view(view) for view in self.data(batch)]
        torch.stack([self.check([view]) for view in seen]).mean().backward()
        if update:
            self.update()

    @rule()
    def optimiser_step_alone(self) -> None:
        self.update()

    @rule(batch=batches)
    @precondition(lambda self: self.net.training)
    def loss_without_backward(self, batch: tuple[int, int, int]) -> None:
        self.check([self.view(view) for view in self.data(batch)])

    @rule(batch=batches, keep=st.booleans())
    @precondition(lambda self: self.net.training)
    def forward_without_loss(self, batch: tuple[int, int, int], keep: bool) -> None:
        seen = [self.view(view) for view in self.data(batch)]
        if keep:
            self.drop()
            self.keep(seen)

    @rule()
    @precondition(lambda self: self.kept and any(h.training for h in self.net.heads))
    def loss_of_what_was_kept(self) -> None:
        total = self.check(self.kept)
        if self.kept[0].updates == self.updates:
            total.backward()
        self.drop()

    @rule(training=st.booleans())
    def switch_mode(self, training: bool) -> None:
        self.net.train(training)

    @rule()
    @precondition(lambda self: not self.kept)
    def loss_without_forward(self) -> None:
        rows = torch.ones(2, 4, device=self.device, requires_grad=True)
        if self.net.training and not (self.sampled and self.proven):
            with raising(RuntimeError, "no sample of heads[0]"):
                self.loss(rows)
        else:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert torch.equal(self.loss(rows), Base()(rows))
            words = "a batch without positives" if self.net.training else "was not called for this"
            assert all(words in str(warning.message) for warning in said)
            assert math.isnan(self.loss.terms.rate)
        self.sampled = False
        self.calls += 1

    @rule(batch=batches)
    def evaluate(self, batch: tuple[int, int, int]) -> None:
        training = self.net.training
        self.net.eval()
        data = self.data(batch)
        with torch.no_grad():
            outs = [self.net(view)[0] for view in data]
            again = [self.net(view)[0] for view in data]
            assert all(torch.equal(*pair) for pair in zip(outs, again, strict=True))
            assert torch.equal(self.loss(*outs), Base()(*outs))
        self.calls += 1
        assert math.isnan(self.loss.terms.rate)
        self.net.train(training)

    @rule(batch=batches)
    @precondition(lambda self: not self.net.training)
    def gradients_in_eval_mode(self, batch: tuple[int, int, int]) -> None:
        outs = [self.net(view)[0] for view in self.data(batch)]
        total = self.loss(*outs)
        assert torch.equal(total, Base()(*outs))
        assert math.isnan(self.loss.terms.rate)
        assert self.loss.terms.beta == 0
        total.backward()
        self.optimizer.zero_grad()
        self.sampled = False
        self.calls += 1

    @rule(batch=batches, fail=st.sampled_from(["raise", "nan"]))
    @precondition(lambda self: self.net.training)
    def the_base_fails(self, batch: tuple[int, int, int], fail: str) -> None:
        seen = [self.view(view) for view in self.data(batch)]
        kind, words = {
            "raise": (KeyError, "of the base"),
            "nan": (ValueError, "not finite: base loss"),
        }[fail]
        with raising(kind, words):
            self.loss(*[view.out for view in seen], fail=fail)
        if fail == "nan":
            self.heard()
        self.calls += 1

    @rule(batch=batches)
    @precondition(lambda self: self.net.training and self.options["prior"] == "view")
    def one_view_for_a_prior_of_two(self, batch: tuple[int, int, int]) -> None:
        seen = self.view(self.data(batch)[0])
        with raising(ValueError, "saw one forward call"):
            self.loss(seen.out)
        self.heard()
        self.calls += 1

    @rule()
    @precondition(lambda self: self.net.training)
    def an_empty_batch(self) -> None:
        out, _ = self.net(torch.zeros(0, WIDTH, device=self.device, dtype=self.dtype))
        assert len(out) == 0
        self.sampled = True

    @rule(step=st.integers(0, 10))
    def say_which_step_it_is(self, step: int) -> None:
        self.loss.set_step(step)
        self.steps = step

    @rule(batch=batches)
    @precondition(lambda self: self.net.training)
    def resume_from_a_file(self, batch: tuple[int, int, int]) -> None:
        file = io.BytesIO()
        torch.save({"net": self.net.state_dict(), "loss": self.loss.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        net, loss = self.build(seed=2)
        net.load_state_dict(saved["net"])
        loss.load_state_dict(saved["loss"])
        self.adopt(net, loss, batch)

    @rule(batch=batches, how=st.sampled_from(["deepcopy", "pickle"]))
    @precondition(lambda self: self.net.training)
    def go_on_with_a_copy(self, batch: tuple[int, int, int], how: str) -> None:
        both = {"net": self.net, "loss": self.loss}
        twins = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        self.adopt(twins["net"], twins["loss"], batch)

    @rule(dtype=st.sampled_from(DTYPES))
    def move_to(self, dtype: torch.dtype) -> None:
        self.drop()
        self.dtype = dtype
        self.net.to(dtype)
        self.loss.to(dtype)
        self.optimise()

    @rule()
    @precondition(lambda self: torch.cuda.is_available())
    def move_to_the_other_device(self) -> None:
        self.drop()
        self.device = torch.device("cuda" if self.device.type == "cpu" else "cpu")
        self.net.to(self.device)
        self.loss.to(self.device)
        self.optimise()

    # What always holds

    @invariant()
    def no_posterior_outlives_its_graph(self) -> None:
        assert all(ref() is None for ref in self.gone)
        self.gone = []
        assert all(ref() is not None for view in self.kept for ref in view.refs)

    @invariant()
    def the_counts_are_right(self) -> None:
        assert self.loss.step == self.steps
        assert self.loss.base.calls == self.calls
        assert self.loss.beta == pytest.approx(self.beta(), rel=1e-4)

    @invariant()
    def parameters_stay_finite(self) -> None:
        for parameter in [*self.net.parameters(), *self.loss.parameters()]:
            assert torch.isfinite(parameter).all()


def test_any_order_of_steps() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Training, settings=settings(max_examples=40, stateful_step_count=30)
    )


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def resident_bytes(device: torch.device) -> int:
    """Of this process, C++ included; of the device, where it is not the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("layout", "checkpointed"), [("linear", True), ("chain", False)])
def test_nothing_grows_over_1000_steps(
    layout: str, checkpointed: bool, device: torch.device
) -> None:
    """From step 300 on, and of Python's memory from step 600 on: caches are full by then."""
    torch.manual_seed(0)
    net = Net(layout, width=128).to(device)
    loss = make_loss(net, beta=TargetRate(50.0), alpha=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    views = torch.randn(2, 64, WIDTH, device=device)
    tensors, python, resident = 0, 0, 0
    for step in range(1000):
        if step == 300:
            tensors, resident = live_tensors(), resident_bytes(device)
            tracemalloc.start()
        if step == 600:
            gc.collect()
            python = tracemalloc.get_traced_memory()[0]
        if checkpointed:
            outs = [checkpoint(net, view, use_reentrant=False)[0] for view in views]
        else:
            outs = [net(view)[0] for view in views]
        if step % 10 == 3:
            with raising(KeyError, "of the base"):
                loss(*outs, fail="raise")
        elif step % 10 == 6:
            with raising(ValueError, "not finite"):
                loss(*outs, fail="nan")
                if device.type == "cuda":  # known with the next call, once the device is done
                    torch.cuda.synchronize()
                    loss(*[net(view)[0] for view in views])
        elif step % 10 == 9:
            loss(*outs)
        else:
            total = loss(*outs)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            del total
        del outs
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - python
    tracemalloc.stop()
    assert loss.step == 700
    assert live_tensors() <= tensors
    assert grown < 50_000
    # One posterior of each step that was kept would be 700 times 64 kB and more.
    assert resident_bytes(device) - resident < 20e6
