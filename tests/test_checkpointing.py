"""Activation checkpointing: the numbers of the run without it, each posterior counted once."""

from __future__ import annotations

import copy
import gc
import tracemalloc
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.schedule import Linear, TargetRate

WIDTH = 8

# Of a checkpoint that runs without gradients, as those within another do at first.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")

Call = Callable[..., Any]


def plain(function: Call, *args: Tensor) -> Any:
    return function(*args)


reentrant = partial(checkpoint, use_reentrant=True)
not_reentrant = partial(checkpoint, use_reentrant=False)


class Net(nn.Module):
    """Three blocks, of which the second has a head in its middle and the last at its end."""

    def __init__(self, run: Call = plain) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.heads = nn.ModuleList([GaussianHead(WIDTH, 6), GaussianHead(4)])
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
                nn.Sequential(nn.Linear(WIDTH, WIDTH), self.heads[0], nn.Linear(6, 6), nn.Tanh()),
                nn.Sequential(nn.Linear(6, 4), self.heads[1]),
            ]
        )

    def forward(self, view: Tensor) -> Tensor:
        for block in self.blocks:
            view = self.run(block, view)
        return view


class InOne(Net):
    """All blocks in one checkpoint."""

    def forward(self, view: Tensor) -> Tensor:
        out: Tensor = self.run(nn.Sequential(*self.blocks), view)
        return out


class Both(Net):
    """Both views in one checkpoint."""

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        blocks = nn.Sequential(*self.blocks)
        outs: tuple[Tensor, Tensor] = self.run(
            lambda one, two: (blocks(one), blocks(two)), one, two
        )
        return outs


class Nested(Net):
    """A checkpoint in a checkpoint."""

    def forward(self, view: Tensor) -> Tensor:
        out: Tensor = self.run(super().forward, view)
        return out


class HalfOfIt(Net):
    """A head in a checkpoint upstream of a head in none."""

    def forward(self, view: Tensor) -> Tensor:
        view = self.run(self.blocks[1], self.run(self.blocks[0], view))
        out: Tensor = self.blocks[2](view)
        return out


class OneBranch(Net):
    """A checkpointed view and one that is not."""

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        blocks = nn.Sequential(*self.blocks)
        return self.run(blocks, one), blocks(two)


class InSegments(Net):
    """torch's own way to checkpoint a Sequential."""

    def forward(self, view: Tensor) -> Tensor:
        layers = [layer for block in self.blocks for layer in block.children()]
        if self.run is plain:
            out: Tensor = nn.Sequential(*layers)(view)
        else:
            out = checkpoint_sequential(layers, 3, view, use_reentrant=self.run is reentrant)
        return out


NETS = [Net, InOne, Both, Nested, HalfOfIt, OneBranch, InSegments]


def distance(one: Tensor, two: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(one), F.normalize(two)) + one.mean()


def views(step: int = 0, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    # Reentrant checkpoints need an input that requires a gradient.
    return [torch.randn(size, WIDTH, generator=generator).requires_grad_() for _ in range(2)]


def outputs(net: Net, pair: list[Tensor]) -> list[Tensor]:
    return list(net(*pair)) if isinstance(net, Both | OneBranch) else [net(view) for view in pair]


def make_loss(net: Net, **options: Any) -> ClimbLoss:
    options = {"beta": Linear(0.3, warmup=4), **options}
    return ClimbLoss(distance, heads=list(net.heads), **options)  # type: ignore[arg-type]


def gradients(*modules: nn.Module) -> list[Tensor]:
    found = [p.grad for module in modules for p in module.parameters()]
    return [gradient.clone() for gradient in found if gradient is not None]


def train(net: Net, *, steps: int = 3, **options: Any) -> list[list[Tensor]]:
    """Terms and gradients of each step."""
    loss = make_loss(net, **options)
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
    seen = []
    for step in range(steps):
        pair = views(step)
        total = loss(*outputs(net, pair))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        grads = [view.grad for view in pair if view.grad is not None]
        seen.append([*loss.terms, *gradients(net, loss), *grads])
    return seen


OPTIONS: list[dict[str, Any]] = [
    {},
    {"prior": "view", "alpha": 1.0},
    {"prior": "learned", "free_nats": 0.1},
    {"beta": TargetRate(2.0)},
]


@pytest.mark.filterwarnings("ignore:.*is learned and its parameters belong to the loss")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("run", [reentrant, not_reentrant], ids=["reentrant", "not"])
def test_terms_and_gradients_are_those_of_the_plain_run(
    run: Call, kind: type[Net], options: dict[str, Any]
) -> None:
    expected, seen = (train(kind(how), **copy.deepcopy(options)) for how in (plain, run))
    for now, then in zip(seen, expected, strict=True):
        assert len(now) == len(then)
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


def once(net: Net, backward: Callable[[ClimbLoss, list[Tensor]], None]) -> list[Tensor]:
    loss = make_loss(net, beta=0.3)
    backward(loss, outputs(net, views()))
    return gradients(net)


def same(backward: Callable[[ClimbLoss, list[Tensor]], None], kind: type[Net] = Net) -> None:
    """That ``backward`` of a loss and outputs leaves what it leaves in the plain run."""
    expected = once(kind(plain), backward)
    assert expected
    torch.testing.assert_close(once(kind(reentrant), backward), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", [reentrant, not_reentrant], ids=["reentrant", "not"])
def test_after_more_calls_than_a_head_knows(run: Call) -> None:
    def train(net: Net) -> list[Tensor]:
        for _ in range(300):
            net.heads[0](torch.ones(1, WIDTH))
        make_loss(net, beta=0.3)(*outputs(net, views())).backward()
        return gradients(net)

    torch.testing.assert_close(train(Net(run)), train(Net()), rtol=1e-5, atol=1e-6)


def test_accumulated_gradients() -> None:
    def train(net: Net) -> list[Tensor]:
        loss = make_loss(net, beta=0.3)
        for step in range(3):
            (loss(*outputs(net, views(step))) / 3).backward()
        return gradients(net)

    torch.testing.assert_close(train(Net(reentrant)), train(Net()), rtol=1e-5, atol=1e-6)


def test_two_steps_in_flight() -> None:
    """Whose backward passes come in the order of the forward passes."""

    def train(net: Net) -> list[Tensor]:
        loss = make_loss(net, beta=0.3)
        for total in [loss(*outputs(net, views(step))) for step in range(2)]:
            total.backward()
        return gradients(net)

    torch.testing.assert_close(train(Net(reentrant)), train(Net()), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_called_once_per_view() -> None:
    def backward(loss: ClimbLoss, outs: list[Tensor]) -> None:
        ((loss(outs[0], outs[0]) + loss(outs[1], outs[1])) / 2).backward()

    same(backward)


def test_two_losses_of_the_same_views_in_one_backward() -> None:
    same(lambda loss, outs: (loss(*outs) + 2 * loss(*outs[::-1])).backward())


def test_two_losses_of_the_same_views_in_two_backwards() -> None:
    def backward(loss: ClimbLoss, outs: list[Tensor]) -> None:
        totals = loss(*outs), 2 * loss(*outs[::-1])
        totals[0].backward(retain_graph=True)
        totals[1].backward()

    same(backward)


def test_backward_twice() -> None:
    def backward(loss: ClimbLoss, outs: list[Tensor]) -> None:
        total = loss(*outs)
        total.backward(retain_graph=True)
        total.backward()

    same(backward)


def test_a_scaled_loss_beside_another_one() -> None:
    same(lambda loss, outs: (1024 * loss(*outs) + outs[0].square().sum()).backward())


def test_a_frozen_variance() -> None:
    def backward(loss: ClimbLoss, outs: list[Tensor]) -> None:
        loss(*outs).backward()

    def frozen(run: Call) -> Net:
        net = Net(run)
        for head in net.heads:
            head.logvar.requires_grad_(False)
        return net

    expected, seen = (once(frozen(run), backward) for run in (plain, reentrant))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


def with_an_input(function: Call, run: Call) -> Tensor:
    """``function()``, checkpointed; the input is what a reentrant checkpoint wants."""
    out: Tensor = run(lambda one: function() * one, torch.ones((), requires_grad=True))
    return out


@pytest.mark.parametrize("what", ["mean", "logvar"])
def test_a_leaf_and_a_constant_as_embedding(what: str) -> None:
    """The head's mean is a parameter of somebody else's, or nothing that is trained."""

    def gradients_of(run: Call) -> list[Tensor]:
        head = GaussianHead(WIDTH, None if what == "mean" else 4)
        if head.mean is not None:
            head.mean.load_state_dict({"weight": torch.ones(4, WIDTH), "bias": torch.ones(4)})
            head.mean.requires_grad_(False)
        embedding = nn.Parameter(views()[0].detach(), requires_grad=what == "mean")
        loss = ClimbLoss(torch.mean, heads=head, beta=0.3)
        for _ in range(3):
            loss(with_an_input(lambda: head(embedding), run)).backward()
        return [p.grad for p in (embedding, *head.parameters()) if p.grad is not None]

    torch.testing.assert_close(gradients_of(reentrant), gradients_of(plain))


@pytest.mark.parametrize("kind", [Net, Both])
def test_autocast(kind: type[Net]) -> None:
    def gradients_of(run: Call) -> list[Tensor]:
        net = kind(run)
        loss = make_loss(net, beta=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            outs = outputs(net, views())
        loss(*(out.float() for out in outs)).backward()
        return [loss.terms.rate, *gradients(net)]

    torch.testing.assert_close(gradients_of(reentrant), gradients_of(plain), rtol=1e-2, atol=1e-3)


def test_forwards_without_gradients_do_not_count() -> None:
    """In training mode: a target of one's own, with and without a checkpoint of its own."""

    def train(net: Net) -> list[Tensor]:
        loss = make_loss(net, beta=0.3)
        with torch.no_grad():
            outputs(net, views(1))
        outs = outputs(net, views())
        with torch.no_grad():
            outputs(net, views(2))
            nn.Sequential(*net.blocks)(views(3)[0])
        loss(*outs).backward()
        return [*loss.terms, *gradients(net)]

    torch.testing.assert_close(train(Net(reentrant)), train(Net()), rtol=1e-5, atol=1e-6)


def test_an_output_that_the_loss_does_not_take_does_not_count() -> None:
    net = Net(reentrant)
    outs = outputs(net, views())
    loss = make_loss(net)
    loss(outs[0], torch.ones_like(outs[1]))
    alone = loss.terms.rate
    loss(outs[1], torch.ones_like(outs[1]))
    other = loss.terms.rate
    loss(*outs)
    torch.testing.assert_close(loss.terms.rate, (alone + other) / 2)


def test_evaluation_is_the_base_loss_alone() -> None:
    net = Net(reentrant)
    loss = make_loss(net)
    with torch.no_grad():
        outs = outputs(net.eval(), views())
        assert torch.equal(loss(*outs), distance(*outs))
        outs = outputs(net.train(), views())
        assert torch.equal(loss(*outs), distance(*outs))


def test_one_head_of_several() -> None:
    def gradients_of(net: Net) -> list[Tensor]:
        head = net.heads[0]
        assert isinstance(head, GaussianHead)
        loss = ClimbLoss(distance, heads=head, beta=0.3)
        loss(*outputs(net, views())).backward()
        return [loss.terms.rate, *gradients(net)]

    for kind in NETS:
        torch.testing.assert_close(gradients_of(kind(reentrant)), gradients_of(kind()))


def target_inside(head: nn.Module, view: Tensor) -> Tensor:
    with torch.no_grad():
        target = head(view)
    out: Tensor = head(view + 1) - target
    return out


def test_a_target_inside_of_a_checkpoint_is_an_error() -> None:
    """Its first run does not tell what will have a gradient."""
    head = GaussianHead(WIDTH)
    loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
    total = loss(reentrant(partial(target_inside, head), views()[0]))
    with pytest.raises(RuntimeError, match=r"the gradient of 1 posteriors is lost.* use_reentrant"):
        total.backward()
    loss(not_reentrant(partial(target_inside, head), views()[0])).backward()


def test_a_gradient_by_the_outputs_alone() -> None:
    """Which does not come to the checkpoint."""

    def of_outputs(net: Net) -> tuple[Tensor, ...]:
        outs = outputs(net, views())
        return torch.autograd.grad(make_loss(net, beta=0.3)(*outs), outs)

    torch.testing.assert_close(of_outputs(Net(reentrant)), of_outputs(Net()))


def test_a_forward_that_is_not_repeatable_is_an_error() -> None:
    net = Net()
    runs: list[int] = []

    def changed(view: Tensor) -> Tensor:
        runs.append(1)
        out: Tensor = nn.Sequential(*net.blocks)(view * len(runs))
        return out

    out = reentrant(changed, views()[0])
    total = make_loss(net)(out, out.detach())
    with pytest.raises(RuntimeError, match="with another embedding than the first time"):
        total.backward()


class Doubled(torch.autograd.Function):
    """Runs what it is given without gradients, and never again."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, view: Tensor) -> Tensor:
        out: Tensor = 2 * view + 0 * head(view)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, 2 * gradient


def test_a_function_that_is_no_checkpoint_has_no_posteriors() -> None:
    head = GaussianHead(WIDTH)
    loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
    with pytest.raises(RuntimeError, match="depends on no sample"):
        loss(Doubled.apply(head, views()[0]))


def test_compiled_code_in_it_is_refused() -> None:
    head = GaussianHead(WIDTH)
    out = reentrant(torch.compile(head, backend="eager", fullgraph=True), views()[0])
    loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
    with pytest.raises(RuntimeError, match=r"Compiled code inside .* needs use_reentrant=False"):
        loss(out)


@pytest.mark.parametrize("how", ["backward", "no backward", "no loss", "an exception"])
def test_a_step_leaves_nothing_behind(how: str) -> None:
    net = Net(reentrant)
    loss = make_loss(net)
    alive: list[weakref.ReferenceType[Any]] = []
    for _ in range(2):
        outs = outputs(net, views())
        alive += [weakref.ref(held) for head in loss.heads for held in head._held.values()]
        if how == "an exception":
            outs[0].register_hook(_fail)
            with pytest.raises(KeyError):
                loss(*outs).backward()
        elif how != "no loss":
            total = loss(*outs)
            if how == "backward":
                total.backward()
            del total
        del outs
    gc.collect()
    assert len(alive) == 8
    assert [held() for held in alive] == [None] * 8


def _fail(_: Tensor) -> Tensor:
    raise KeyError("of a hook")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def test_nothing_grows_over_1000_steps() -> None:
    """From step 300 on, as in test_fuzz: the heads have seen the 256 calls that they know."""
    net = Net(reentrant)
    loss = make_loss(net, beta=1e-3)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    tensors, marks = 0, []
    for step in range(1000):
        if step == 300:
            tensors = live_tensors()
            tracemalloc.start()
        if step in (600, 999):
            gc.collect()
            marks.append(tracemalloc.get_traced_memory()[0])
        total = loss(*outputs(net, views()))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        del total
    tracemalloc.stop()
    assert live_tensors() == tensors
    assert all(after - before < 50_000 for before, after in pairwise(marks))
