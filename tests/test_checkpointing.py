"""Rule 4: a second run of checkpointed code has the noise of its first, or it raises."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._graph.sample import alive
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
            out = checkpoint_sequential(layers, 3, view, use_reentrant=False)
        return out


NETS = [Net, InOne, Both, Nested, HalfOfIt, OneBranch, InSegments]


def distance(one: Tensor, two: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(one), F.normalize(two)) + one.mean()


def views(step: int = 0, size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", NETS)
def test_terms_and_gradients_are_those_of_the_plain_run(
    kind: type[Net], options: dict[str, Any]
) -> None:
    expected, seen = (train(kind(how), **copy.deepcopy(options)) for how in (plain, not_reentrant))
    for now, then in zip(seen, expected, strict=True):
        assert len(now) == len(then)
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


def a_call_per_view(loss: ClimbLoss, outs: list[Tensor]) -> None:
    ((loss(outs[0], outs[0]) + loss(outs[1], outs[1])) / 2).backward()


def two_losses_in_one_backward(loss: ClimbLoss, outs: list[Tensor]) -> None:
    (loss(*outs) + 2 * loss(*outs[::-1])).backward()


def two_losses_in_two_backwards(loss: ClimbLoss, outs: list[Tensor]) -> None:
    totals = loss(*outs), 2 * loss(*outs[::-1])
    totals[0].backward(retain_graph=True)
    totals[1].backward()


def backward_twice(loss: ClimbLoss, outs: list[Tensor]) -> None:
    total = loss(*outs)
    total.backward(retain_graph=True)
    total.backward()


def scaled_beside_another_one(loss: ClimbLoss, outs: list[Tensor]) -> None:
    (1024 * loss(*outs) + outs[0].square().sum()).backward()


BACKWARDS: list[Callable[[ClimbLoss, list[Tensor]], None]] = [
    a_call_per_view,
    two_losses_in_one_backward,
    two_losses_in_two_backwards,
    backward_twice,
    scaled_beside_another_one,
]


def a_frozen_variance(net: Net) -> None:
    net.heads.requires_grad_(False)
    make_loss(net, beta=0.3)(*outputs(net, views())).backward()


def accumulated(net: Net, in_flight: int) -> None:
    """Backward passes come in the order of the forward passes."""
    loss = make_loss(net, beta=0.3)
    for first in range(0, 3, in_flight):
        steps = range(first, min(first + in_flight, 3))
        for total in [loss(*outputs(net, views(step))) for step in steps]:
            (total / 3).backward()


def forwards_without_gradients(net: Net) -> None:
    """In training mode: a target of one's own, with and without a checkpoint of its own."""
    with torch.no_grad():
        outputs(net, views(1))
    outs = outputs(net, views())
    with torch.no_grad():
        outputs(net, views(2))
        nn.Sequential(*net.blocks)(views(3)[0])
    make_loss(net, beta=0.3)(*outs).backward()


def one_head_of_several(net: Net) -> None:
    ClimbLoss(distance, heads=net.heads[0], beta=0.3)(*outputs(net, views())).backward()


RUNS: dict[str, tuple[type[Net], Callable[[Net], object]]] = {
    **{
        backward.__name__: (
            Net,
            lambda net, backward=backward: backward(
                make_loss(net, beta=0.3), outputs(net, views())
            ),
        )
        for backward in BACKWARDS
    },
    **{f"{n} in flight": (Net, partial(accumulated, in_flight=n)) for n in (1, 2, 3)},
    **{f"one head of {kind.__name__}": (kind, one_head_of_several) for kind in NETS},
    "a frozen variance": (Net, a_frozen_variance),
    "forwards without gradients": (Net, forwards_without_gradients),
}


@pytest.mark.parametrize(("kind", "use"), RUNS.values(), ids=RUNS)
def test_gradients_are_those_of_the_plain_run(kind: type[Net], use: Callable[[Net], None]) -> None:
    found = []
    for run in (not_reentrant, plain):
        net = kind(run)
        use(net)
        found.append(gradients(net))
    assert found[1]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_gradient_by_the_outputs_alone() -> None:
    """Which does not come to the checkpoint."""

    def of_outputs(net: Net) -> tuple[Tensor, ...]:
        outs = outputs(net, views())
        return torch.autograd.grad(make_loss(net, beta=0.3)(*outs), outs)

    torch.testing.assert_close(of_outputs(Net(not_reentrant)), of_outputs(Net()))


@pytest.mark.parametrize("kind", [Net, Both])
def test_autocast(kind: type[Net]) -> None:
    def gradients_of(run: Call) -> list[Tensor]:
        net = kind(run)
        loss = make_loss(net, beta=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            outs = outputs(net, views())
        loss(*(out.float() for out in outs)).backward()
        return [loss.terms.rate, *gradients(net)]

    torch.testing.assert_close(
        gradients_of(not_reentrant), gradients_of(plain), rtol=1e-2, atol=1e-3
    )


def test_an_output_that_the_loss_does_not_take_does_not_count() -> None:
    net = Net(not_reentrant)
    outs = outputs(net, views())
    loss = make_loss(net)
    loss(outs[0], torch.ones_like(outs[1]))
    alone = loss.terms.rate
    loss(outs[1], torch.ones_like(outs[1]))
    other = loss.terms.rate
    loss(*outs)
    torch.testing.assert_close(loss.terms.rate, (alone + other) / 2)


@pytest.mark.parametrize("run", [reentrant, not_reentrant], ids=["reentrant", "not"])
def test_evaluation_is_the_base_loss_alone(run: Call) -> None:
    net = Net(run)
    loss = make_loss(net)
    for mode in (False, True):
        with torch.no_grad():
            outs = outputs(net.train(mode), views())
            assert torch.equal(loss(*outs), distance(*outs))
    other = Net(not_reentrant)  # is trained after it as if it had not been
    loss = make_loss(other)
    loss(*outputs(other, views())).backward()
    assert loss.terms.rate > 0


def shallow(run: Call, use: Callable[[nn.Module, ClimbLoss, Call], Tensor | None]) -> list[Tensor]:
    """Gradients and rate of a step through a network whose noise matters to the gradient."""
    torch.manual_seed(0)
    head = GaussianHead(6, init_std=1.0)
    net = nn.Sequential(nn.Linear(6, 6), head, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    loss = ClimbLoss(alike, heads=head, beta=1e-2)
    total = use(net, loss, run)
    if total is not None:
        total.backward()
    return [loss.terms.rate, *gradients(net)]


def alike(one: Tensor, two: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(one, two).mean()


def a_look_before_backward(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    """As online k-NN or a logged embedding: of the very batch that is checkpointed."""
    one, two = torch.randn(2, 8, 6)
    outs = run(net, one), run(net, two)
    with torch.no_grad():
        net(one)
    return loss(*outs)


def a_call_without_checkpoint_on_the_same_batch(
    net: nn.Module, loss: ClimbLoss, run: Call
) -> Tensor:
    """Whose graph is gone before the second run."""
    one, two = torch.randn(2, 8, 6)
    outs = run(net, one), run(net, two)
    net(one)
    return loss(*outs)


def many_calls(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    """A bag of image tiles, one by one."""
    bag = torch.cat([run(net, tile) for tile in torch.randn(300, 1, 6)])
    return loss(bag.mean(0, keepdim=True), torch.ones(1, 6))


def two_views_in_one_checkpoint(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    return loss(*run(lambda one, two: (net(one), net(two)), *first_row_shared()))


def a_target_beside_it(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    one, two = first_row_shared()
    online = run(net, one)
    with torch.no_grad():
        target = net(two)
    return loss(online, target)


def a_target_inside_of_it(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    one, two = torch.randn(2, 8, 6)

    def both(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = net(two)
        return net(one), target

    return loss(*run(both, one, two))


def two_backward_passes(net: nn.Module, loss: ClimbLoss, run: Call) -> None:
    for total in [loss(run(net, view), torch.ones(8, 6)) for view in first_row_shared()]:
        total.backward()


def the_same_batch_in_two_steps(net: nn.Module, loss: ClimbLoss, run: Call) -> None:
    """One after the other, each with its backward pass: by then the first is over."""
    view = torch.randn(8, 6)
    for _ in range(2):
        loss(run(net, view), torch.ones(8, 6)).backward()


def first_row_shared() -> Tensor:
    views = torch.randn(2, 8, 6)
    views[:, 0] = 0.0
    return views


def head_behind_itself(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    view = torch.randn(8, 6)
    return loss(run(net, run(net, view)), torch.ones(8, 6))


def the_same_batch_twice_in_one_call(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
    view = torch.randn(8, 6)
    return loss(*run(net, torch.cat([view, view])).chunk(2))


USES = [
    a_look_before_backward,
    a_call_without_checkpoint_on_the_same_batch,
    many_calls,
    two_views_in_one_checkpoint,
    a_target_beside_it,
    a_target_inside_of_it,
    two_backward_passes,
    the_same_batch_in_two_steps,
    head_behind_itself,
    the_same_batch_twice_in_one_call,
]


@pytest.mark.parametrize("use", USES)
def test_uses_that_are_not_ambiguous(use: Any) -> None:
    torch.testing.assert_close(shallow(not_reentrant, use), shallow(plain, use))


@pytest.mark.parametrize("backwards", [1, 2])
def test_the_same_batch_twice_in_one_step_is_refused(backwards: int) -> None:
    """Two draws for one input, as R-Drop and SimCSE have them."""

    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> None:
        view = torch.randn(8, 6)
        one, two = run(net, view), run(net, view)
        if backwards == 1:
            loss(one, two).backward()
        else:
            for total in [loss(out, torch.ones(8, 6)) for out in (one, two)]:
                total.backward()

    assert shallow(plain, use)
    with pytest.raises(RuntimeError, match=r"checkpointed GaussianHead .* the very same batch"):
        shallow(not_reentrant, use)


def test_a_forward_that_is_not_repeatable_is_refused() -> None:
    runs: list[int] = []

    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
        def changed(view: Tensor) -> Tensor:
            runs.append(1)
            out: Tensor = net(view * len(runs))
            return out

        return loss(run(changed, torch.randn(8, 6)), torch.ones(8, 6))

    with pytest.raises(RuntimeError, match=r"no first run .* on this batch.*use_reentrant=False"):
        shallow(not_reentrant, use)


MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
POLICIES = {
    "matrix products are saved": lambda operation: operation in MATRIX_PRODUCTS,
    "all is saved": lambda operation: True,
    "nothing is saved": lambda operation: False,
    "all but matrix products": lambda operation: operation not in MATRIX_PRODUCTS,
}


@pytest.mark.parametrize("saved", POLICIES.values(), ids=POLICIES)
def test_selective_checkpointing(saved: Callable[[Any], bool]) -> None:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        must, may = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return must if saved(operation) else may

    contexts = partial(create_selective_checkpoint_contexts, policy)
    selective = partial(checkpoint, use_reentrant=False, context_fn=contexts)

    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
        one, two = torch.randn(2, 8, 6)
        return loss(run(net, one), run(net, two))

    torch.testing.assert_close(shallow(selective, use), shallow(plain, use))


def offloaded(*, with_setup: bool) -> Call:
    """A checkpoint of the user's own, as offloading checkpointers have them."""

    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        view = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.forward_function(view)
        torch.autograd.backward(out, gradient)
        return None, view.grad

    def run(ctx: Any, block: Call, view: Tensor) -> Tensor:
        ctx.forward_function = block
        ctx.save_for_backward(view.cpu())
        with torch.no_grad():
            out: Tensor = block(view)
        return out

    def forward(block: Call, view: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = block(view)
        return out

    def setup_context(ctx: Any, inputs: tuple[Call, Tensor], output: Tensor) -> None:
        ctx.forward_function = inputs[0]
        ctx.save_for_backward(inputs[1].cpu())

    functions: dict[str, Any] = {"forward": run, "backward": backward}
    if with_setup:
        functions = {"forward": forward, "backward": backward, "setup_context": setup_context}
    methods = {name: staticmethod(function) for name, function in functions.items()}
    call: Call = type("Offloaded", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return call


# What runs the code in it without gradients, and once more in the backward pass.
REENTRANT = {
    "torch's": reentrant,
    "with torch's random state": partial(reentrant, preserve_rng_state=True),
    "one's own": offloaded(with_setup=False),
    "one's own, with setup_context": offloaded(with_setup=True),
}


@pytest.mark.parametrize("views_in_it", [1, 2])
@pytest.mark.parametrize("run", REENTRANT.values(), ids=REENTRANT)
def test_a_trained_head_in_a_reentrant_checkpoint_is_refused_at_the_loss(
    run: Call, views_in_it: int
) -> None:
    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
        one, two = torch.randn(2, 8, 6).requires_grad_()
        return loss(run(net, one), run(net, two) if views_in_it == 2 else net(two))

    assert shallow(plain, use)
    with pytest.raises(RuntimeError, match=r"reentrant checkpoint.*use_reentrant=False"):
        shallow(run, use)


@pytest.mark.parametrize("proven", [False, True])
def test_so_is_a_criterion_in_one(proven: bool) -> None:
    """No graph tells there what the loss depends on: it would be the base loss, without a word."""
    torch.manual_seed(0)
    net = Net()
    loss = make_loss(net)
    if proven:
        loss(*outputs(net, views())).backward()
    outs = outputs(net, views())
    expected = loss(*outs)
    assert torch.equal(not_reentrant(loss, *outs), expected)
    with pytest.raises(RuntimeError, match=r"a ClimbLoss is called in .*use_reentrant=False"):
        reentrant(loss, *outs)
    net.eval()
    value = reentrant(loss, *(out.detach().requires_grad_() for out in outs))
    assert torch.equal(value, loss.base(*outs))


def test_it_is_refused_in_backward_at_the_latest() -> None:
    """Where no criterion sees it: a loss of another kind beside it."""
    torch.manual_seed(0)
    head = GaussianHead(6)
    out = reentrant(head, torch.randn(8, 6).requires_grad_())
    with pytest.raises(RuntimeError, match=r"no first run with gradients.*use_reentrant=False"):
        out.sum().backward()


def test_a_target_of_the_student_alone_in_a_reentrant_checkpoint_is_refused() -> None:
    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
        one, two = torch.randn(2, 8, 6).requires_grad_()

        def target(view: Tensor) -> Tensor:
            with torch.no_grad():
                embedding = net[:2](view)  # type: ignore[index]
            out: Tensor = net[2:](embedding)  # type: ignore[index]
            return out

        return loss(net(one), run(target, two))

    assert shallow(plain, use)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        shallow(reentrant, use)


@pytest.mark.parametrize("where", ["trunk", "predictor", "both"])
def test_a_reentrant_checkpoint_elsewhere_goes_on_working(where: str) -> None:
    def use(net: nn.Module, loss: ClimbLoss, run: Call) -> Tensor:
        trunk, head, predictor = net[:1], net[1], net[2:]  # type: ignore[index]
        outs = []
        for view in torch.randn(2, 8, 6).requires_grad_():
            features = run(trunk, view) if where != "predictor" else trunk(view)
            sample = head(features)
            outs.append(run(predictor, sample) if where != "trunk" else predictor(sample))
        return loss(*outs)

    torch.testing.assert_close(shallow(reentrant, use), shallow(plain, use))


@pytest.mark.parametrize("run", [reentrant, not_reentrant], ids=["reentrant", "not"])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen", "eval"])
def test_a_checkpointed_teacher_passes_on_the_mean(how: str, run: Call) -> None:
    torch.manual_seed(0)
    head = GaussianHead(6)
    student = nn.Sequential(nn.Linear(6, 6), head)
    teacher = copy.deepcopy(student)
    loss = ClimbLoss(F.mse_loss, heads=head, beta=1e-2)
    view = torch.randn(8, 6)
    mean = teacher[0](view).detach()
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if how == "frozen":
        teacher.requires_grad_(False)
    if how == "eval":
        teacher.eval()
    with contexts.get(how, torch.enable_grad)():
        target = run(teacher, view)
    assert torch.equal(target, mean)
    total = loss(student(view), target.clone() if how == "inference_mode" else target.detach())
    total.backward()
    assert loss.terms.rate > 0


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
    with pytest.raises(RuntimeError, match="within an autograd function"):
        loss(Doubled.apply(head, views()[0]))


@pytest.mark.parametrize("how", ["backward", "no backward", "no loss", "an exception"])
def test_a_step_leaves_nothing_behind(how: str) -> None:
    net = Net(not_reentrant)
    loss = make_loss(net)
    seen: list[weakref.ReferenceType[Any]] = []
    for _ in range(2):
        outs = outputs(net, views())
        seen += [weakref.ref(sample) for sample in alive(set(loss.heads))]
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
    assert len(seen) == 8
    assert [sample() for sample in seen] == [None] * 8


def _fail(_: Tensor) -> Tensor:
    raise KeyError("of a hook")
