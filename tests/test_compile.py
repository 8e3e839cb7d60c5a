"""Compiled models: no graph break, no recompilation, the numbers of eager mode."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._export.verifier import SpecViolationError
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.schedule import Linear, TargetRate

WIDTH = 8

# What the compiler itself asks of its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def holds_for_plain_torch(call: Callable[[], Any]) -> bool:
    """Whether ``call``, which has no head in it, works with this torch."""
    try:
        call()
    except (RuntimeError, SpecViolationError):
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # Inductor's C++ of torch 2.4 flushes denormals in the whole process, as -ffast-math does.
    torch.set_flush_denormal(False)


class Net(nn.Module):
    """A head between two layers; ``linear`` learns the mean."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = GaussianHead(WIDTH, WIDTH if linear else None)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, view: Tensor) -> Tensor:
        out: Tensor = self.last(self.head(self.first(view).relu()))
        return out


class Siamese(nn.Module):
    """Both views in one call of the model."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        self.net = Net(linear)

    @property
    def head(self) -> GaussianHead:
        return self.net.head

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(one), self.net(two)


def distance(one: Tensor, two: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(one), F.normalize(two)) + one.mean()


def outputs(model: Any, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    inner = getattr(model, "_orig_mod", model)
    return model(one, two) if isinstance(inner, Siamese) else (model(one), model(two))


def train(
    net: Any,
    compiled: Callable[[Any], Any] = lambda model: model,
    *,
    steps: int = 4,
    base: Callable[..., Tensor] = distance,
    compiled_loss: Callable[[Any], Any] = lambda loss: loss,
    **options: Any,
) -> list[list[Tensor]]:
    """The terms and the gradients of each step and, last, the parameters."""
    model = compiled(net)
    loss = ClimbLoss(base, heads=net.head, **{"beta": Linear(0.1, warmup=8), **options})
    criterion = compiled_loss(loss)
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
    data = torch.Generator().manual_seed(3)
    seen: list[list[Tensor]] = []
    for _ in range(steps):
        total = criterion(*outputs(model, *torch.randn(2, 6, WIDTH, generator=data)))
        optimizer.zero_grad()
        total.backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
        torch.testing.assert_close(total.detach(), loss.terms.total, rtol=0, atol=0)
        seen.append([*loss.terms, *gradients])
    return [*seen, [p.detach().clone() for p in net.parameters()]]


def make(kind: Callable[..., Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options)


ALIKE: list[dict[str, Any]] = [
    {},
    {"prior": "view", "alpha": 1.0},
    {"prior": "learned"},
    {"beta": TargetRate(2.0), "free_nats": 0.1},
]


@pytest.mark.filterwarnings("ignore:.*is learned and its parameters belong to the loss")
@pytest.mark.parametrize("kind", [Net, Siamese])
@pytest.mark.parametrize(
    ("backend", "options"), [*(("aot_eager", options) for options in ALIKE), ("inductor", ALIKE[1])]
)
def test_a_whole_graph_equals_eager(
    backend: str, kind: Callable[..., Any], options: dict[str, Any]
) -> None:
    counter = CompileCounterWithBackend(backend)
    expected = train(make(kind), **copy.deepcopy(options))
    seen = train(
        make(kind), lambda model: torch.compile(model, fullgraph=True, backend=counter), **options
    )
    for now, then in zip(seen, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("linear", [False, True])
def test_the_head_alone(linear: bool) -> None:
    def alone(net: Net) -> Net:
        net.head.compile(fullgraph=True, backend="aot_eager")
        return net

    expected = train(make(Net, linear=linear))
    for now, then in zip(train(make(Net, linear=linear), alone), expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is learned and its parameters belong to the loss")
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("part", ["loss", "base"])
@pytest.mark.parametrize(
    ("backend", "options"), [*(("aot_eager", options) for options in ALIKE), ("inductor", ALIKE[1])]
)
def test_a_compiled_loss_equals_eager_and_is_compiled_once(
    backend: str, options: dict[str, Any], part: str, with_model: bool
) -> None:
    """Of a ClimbLoss the base is compiled, and nothing is compiled anew from step to step."""
    counter = CompileCounterWithBackend(backend)

    def compiled(part: Any) -> Any:
        return torch.compile(part, backend=counter)

    expected = train(make(Net), **copy.deepcopy(options))
    model = compiled if with_model else lambda model: model
    with torch._dynamo.config.patch(error_on_recompile=True):
        if part == "loss":
            seen = train(make(Net), model, compiled_loss=compiled, **copy.deepcopy(options))
        else:
            base = torch.compile(distance, fullgraph=True, backend=counter)
            seen = train(make(Net), model, base=base, **copy.deepcopy(options))
    for now, then in zip(seen, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1 + with_model


def test_a_compiled_training_step() -> None:
    # The loss reads the autograd graph, which is made when compiled code has run: so it breaks
    # the graph, to no other effect.
    expected = train(make(Net))
    net = make(Net)
    loss = ClimbLoss(distance, heads=net.head, beta=Linear(0.1, warmup=8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    @torch.compile(backend="aot_eager")
    def step(one: Tensor, two: Tensor) -> Tensor:
        total: Tensor = loss(net(one), net(two))
        return total

    data = torch.Generator().manual_seed(3)
    for terms in expected[:-1]:
        total = step(*torch.randn(2, 6, WIDTH, generator=data))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        expected_terms = terms[: len(loss.terms)]
        torch.testing.assert_close([*loss.terms], expected_terms, rtol=1e-5, atol=1e-6)


def test_crops_of_two_sizes_alternate_without_a_recompilation() -> None:
    net = make(Net)
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(net, fullgraph=True, backend=counter, dynamic=False)
    loss = ClimbLoss(lambda *views: sum(view.mean() for view in views), heads=net.head, beta=0.1)
    for _ in range(3):
        loss(model(torch.ones(6, WIDTH)), *(model(torch.ones(2, WIDTH)) for _ in range(3)))
    assert counter.frame_count == 2
    assert net.head.noise.drawn == 12


def test_views_in_one_graph_have_noise_of_their_own() -> None:
    # As common subexpressions they would be merged.
    net = make(Siamese)
    one, two = torch.compile(net, fullgraph=True, backend="inductor")(*torch.ones(2, 6, WIDTH))
    assert not torch.equal(one, two)


def test_checkpointing_around_compiled_code_repeats_its_noise() -> None:
    def gradients(wrap: Callable[[Any], Any]) -> list[Tensor]:
        net = make(Net)
        loss = ClimbLoss(distance, heads=net.head, beta=0.1)
        model = wrap(net)
        loss(*(model(view) for view in torch.ones(2, 6, WIDTH).cumsum(0))).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    def checkpointed(net: Net) -> Callable[[Tensor], Any]:
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        return lambda view: checkpoint(compiled, view, use_reentrant=False)

    def without_a_head() -> None:
        layer = torch.compile(nn.Linear(WIDTH, WIDTH), fullgraph=True, backend="aot_eager")
        out = checkpoint(layer, torch.ones(2, WIDTH, requires_grad=True), use_reentrant=False)
        out.sum().backward()

    if not holds_for_plain_torch(without_a_head):
        pytest.skip("this torch (2.4) does not checkpoint compiled code")
    torch.testing.assert_close(gradients(checkpointed), gradients(lambda net: net))


def test_two_losses_of_the_same_views() -> None:
    net = make(Net)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    one, two = (model(view) for view in torch.randn(2, 6, WIDTH))
    first, second = loss(one, two), loss(two, one)
    (first + second).backward()
    alone = loss(model(torch.ones(6, WIDTH)), torch.ones(6, 4))
    assert torch.isfinite(alone)


def test_nothing_survives_the_backward() -> None:
    net = make(Siamese)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    alive = []
    for _ in range(3):
        one, two = model(*torch.randn(2, 6, WIDTH))
        total = loss(one, two)
        alive += [weakref.ref(record.posterior.mean) for record in net.head._kept.values()]
        assert len(net.head._kept) == 2
        total.backward()
        del one, two, total
    model(*torch.randn(2, 6, WIDTH))
    gc.collect()
    assert len(alive) == 6
    assert [tensor() for tensor in alive] == [None] * 6


def test_outputs_that_are_not_trained_on_go_with_the_step() -> None:
    net = make(Net)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        target = model(torch.ones(2, WIDTH)).detach()
        loss(model(torch.ones(2, WIDTH)), target).backward()
    net.head.collect()
    assert len(net.head._kept) <= 2


def test_more_posteriors_than_are_kept_are_an_error() -> None:
    net = make(Net)
    loss = ClimbLoss(lambda *views: torch.cat(views).mean(), heads=net.head, beta=0.1)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    views = [model(torch.ones(2, WIDTH)) for _ in range(65)]
    with pytest.raises(RuntimeError, match="64 are kept"):
        loss(*views)
    assert loss(*views[1:]) > 0


def test_a_second_loss_after_the_backward_of_the_first() -> None:
    net = make(Net)
    first, second = (ClimbLoss(torch.mean, heads=net.head, beta=beta) for beta in (0.1, 0.2))
    out = torch.compile(net, fullgraph=True, backend="aot_eager")(torch.ones(2, WIDTH))
    first(out).backward(retain_graph=True)
    second(out).backward()
    assert torch.equal(first.terms.rate, second.terms.rate)


def test_a_frozen_logvar() -> None:
    head = GaussianHead(WIDTH, 4)
    head.logvar.requires_grad_(False)
    loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
    loss(torch.compile(head, fullgraph=True, backend="aot_eager")(torch.ones(2, WIDTH))).backward()
    assert loss.terms.rate > 0


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_heads_in_a_row_each_compiled_for_itself(which: tuple[int, ...]) -> None:
    def run(compiled: tuple[int, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        heads = [GaussianHead(WIDTH) for seed in range(2)]
        parts: list[Any] = [nn.Sequential(nn.Linear(WIDTH, WIDTH), head) for head in heads]
        for index in compiled:
            parts[index] = torch.compile(parts[index], fullgraph=True, backend="aot_eager")
        loss = ClimbLoss(torch.mean, heads=heads, beta=0.1)
        loss(parts[1](parts[0](torch.ones(2, WIDTH)))).backward()
        gradients = [head.logvar.bias.grad for head in heads]
        return [loss.terms.rate, *(grad for grad in gradients if grad is not None)]

    expected = run(())
    assert len(expected) == 3
    torch.testing.assert_close(run(which), expected)


def test_outputs_that_no_loss_takes_do_not_pile_up() -> None:
    net = make(Net)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(100):
        model(torch.ones(2, WIDTH))
    assert len(net.head._kept) == 64


def test_without_gradients_nothing_is_kept() -> None:
    net = make(Net)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(torch.ones(2, WIDTH))
        model(torch.ones(2, WIDTH))
    net.head.collect()
    assert not net.head._kept
    assert net.head.noise.drawn == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_compiled_for_itself(how: str) -> None:
    net = make(Net)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    loss(*outputs(model, *torch.randn(2, 6, WIDTH))).backward()
    if how == "deepcopy":
        copied = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    drawn = net.head.noise.drawn
    again = torch.compile(copied, fullgraph=True, backend="aot_eager")
    other = ClimbLoss(distance, heads=copied.head, beta=0.1)
    other(*outputs(again, *torch.randn(2, 6, WIDTH))).backward()
    assert (net.head.noise.drawn, copied.head.noise.drawn) == (drawn, drawn + 2)
    assert other.terms.rate > 0


def test_a_head_that_was_made_on_the_meta_device_draws_its_noise() -> None:
    """As hosts make large models, before they fill them from a checkpoint."""
    plain = GaussianHead(WIDTH)
    with torch.device("meta"):
        head = GaussianHead(WIDTH)
    head.to_empty(device="cpu")
    head.load_state_dict(plain.state_dict())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    view = torch.randn(6, WIDTH)
    torch.testing.assert_close(compiled(view), plain(view))


class Autocast(nn.Module):
    """What a learned mean needs."""

    def forward(self, view: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return view + 1


def test_evaluation_exports() -> None:
    if not holds_for_plain_torch(lambda: torch.export.export(Autocast(), (torch.ones(2),))):
        pytest.skip("this torch (2.4) does not export autocast regions")
    net = make(Net, linear=True).eval()
    view = torch.randn(3, WIDTH)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(net, (view,), dynamic_shapes=({0: batch},))
    for size in (3, 5):
        view = torch.randn(size, WIDTH)
        torch.testing.assert_close(exported.module()(view), net(view))
