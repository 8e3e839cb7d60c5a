"""Rule 3 in compiled models: the head is left out of their graphs, and the numbers are eager's."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._export.verifier import SpecViolationError
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toys import rates, square

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin._graph.sample import alive
from climb_plugin.schedule import Linear, TargetRate

WIDTH = 8

# What the compiler itself asks of its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Watched(nn.Module):
    """A module that sees every access, as the door to a base loss does."""

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    def forward(self, view: Tensor) -> Tensor:
        return view + 1


def compiles_once_when_watched() -> bool:
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(Watched(), backend="aot_eager")
        return holds_for_plain_torch(lambda: [compiled(torch.ones(2)) for _ in range(3)])


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


@pytest.mark.parametrize(
    ("backend", "kind", "options"),
    [
        *(("aot_eager", kind, options) for kind in (Net, Siamese) for options in ALIKE),
        ("inductor", Siamese, ALIKE[1]),
    ],
)
def test_a_compiled_model_equals_eager(
    backend: str, kind: Callable[..., Any], options: dict[str, Any]
) -> None:
    expected = train(make(kind), **copy.deepcopy(options))
    seen = train(make(kind), lambda model: torch.compile(model, backend=backend), **options)
    for now, then in zip(seen, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_the_head_alone(linear: bool) -> None:
    def alone(net: Net) -> Net:
        net.head.compile(backend="aot_eager")
        return net

    expected = train(make(Net, linear=linear))
    for now, then in zip(train(make(Net, linear=linear), alone), expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["loss", "base"])
@pytest.mark.parametrize("options", ALIKE)
def test_a_compiled_loss_equals_eager_and_is_compiled_once(
    options: dict[str, Any], part: str
) -> None:
    def compiled(part: Any) -> Any:
        return torch.compile(part, backend="aot_eager")

    expected = train(make(Net), **copy.deepcopy(options))
    once = part == "base" or compiles_once_when_watched()  # torch 2.5 does not
    with torch._dynamo.config.patch(error_on_recompile=once):
        if part == "loss":
            seen = train(make(Net), compiled_loss=compiled, **copy.deepcopy(options))
        else:
            seen = train(make(Net), base=compiled(distance), **copy.deepcopy(options))
    for now, then in zip(seen, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


def test_a_compiled_training_step() -> None:
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


def test_there_are_two_graphs_around_a_head_and_no_recompilation() -> None:
    net = make(Net)
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(net, backend=counter)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    loss(*outputs(model, *torch.randn(2, 6, WIDTH))).backward()
    graphs = counter.frame_count
    assert graphs == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            loss(*outputs(model, *torch.randn(2, 6, WIDTH))).backward()
    assert counter.frame_count == graphs


def test_a_whole_graph_is_for_evaluation_alone() -> None:
    net = make(Net)
    model = torch.compile(net, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.ones(6, WIDTH))
    view = torch.randn(6, WIDTH)
    assert torch.equal(model.eval()(view), net.eval()(view))
    with torch.no_grad():
        assert torch.equal(model.train()(view), net.eval()(view))


@pytest.mark.parametrize("compiled", ["cell", "whole"])
def test_a_rollout(compiled: str) -> None:
    """The head behind itself: the rates of all four, by torch.distributions."""
    torch.manual_seed(0)
    layer, head = nn.Linear(WIDTH, WIDTH), GaussianHead(WIDTH)
    loss = ClimbLoss(lambda z: z.square().mean(), heads=head, beta=1e-3)
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))

    def cell(state: Tensor) -> Tensor:
        out: Tensor = head(layer(state))
        return out

    step = torch.compile(cell, backend="aot_eager") if compiled == "cell" else cell

    def rollout(state: Tensor) -> Tensor:
        for _ in range(4):
            state = step(state)
        return state

    whole = torch.compile(rollout, backend="aot_eager") if compiled == "whole" else rollout
    loss(whole(8 * torch.randn(8, WIDTH))).backward()
    assert len(seen) == 4
    rates = [
        kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(-1)
        for mean, logvar in map(head.posterior, seen)
    ]
    torch.testing.assert_close(loss.terms.rate, torch.cat(rates).mean().detach())


def test_views_have_noise_of_their_own() -> None:
    """In one graph common subexpressions would be merged, and a CUDA graph would replay them."""
    net = make(Siamese)
    model = torch.compile(net, backend="inductor")
    samples = [*model(*torch.ones(2, 6, WIDTH)), *model(*torch.ones(2, 6, WIDTH))]
    for one, two in itertools.combinations(samples, 2):
        assert not torch.equal(one, two)


def test_checkpointing_around_compiled_code_repeats_its_noise() -> None:
    def gradients(wrap: Callable[[Any], Any]) -> list[Tensor]:
        net = make(Net)
        loss = ClimbLoss(distance, heads=net.head, beta=0.1)
        model = wrap(net)
        loss(*(model(view) for view in torch.ones(2, 6, WIDTH).cumsum(0))).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    def checkpointed(net: Net) -> Callable[[Tensor], Any]:
        compiled = torch.compile(net, backend="aot_eager")
        return lambda view: checkpoint(compiled, view, use_reentrant=False)

    def without_a_head() -> None:
        layer = torch.compile(nn.Linear(WIDTH, WIDTH), fullgraph=True, backend="aot_eager")
        out = checkpoint(layer, torch.ones(2, WIDTH, requires_grad=True), use_reentrant=False)
        out.sum().backward()

    if not holds_for_plain_torch(without_a_head):
        pytest.skip("this torch (2.5) does not checkpoint compiled code")
    torch.testing.assert_close(gradients(checkpointed), gradients(lambda net: net))


@pytest.mark.parametrize("how", ["backward", "no loss", "no grad"])
def test_nothing_survives_a_step(how: str) -> None:
    net = make(Siamese)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    model = torch.compile(net, backend="aot_eager")
    seen = []
    for _ in range(3):
        with torch.set_grad_enabled(how != "no grad"):
            one, two = model(*torch.randn(2, 6, WIDTH))
        seen += [weakref.ref(sample) for sample in alive({net.head})]
        if how == "backward":
            loss(one, two).backward()
        del one, two
    gc.collect()
    assert len(seen) == (0 if how == "no grad" else 6)
    assert [sample() for sample in seen] == [None] * len(seen)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_is_compiled_for_itself(how: str) -> None:
    net = make(Net)
    loss = ClimbLoss(distance, heads=net.head, beta=0.1)
    model = torch.compile(net, backend="aot_eager")
    loss(*outputs(model, *torch.randn(2, 6, WIDTH))).backward()
    if how == "deepcopy":
        copied = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    again = torch.compile(copied, backend="aot_eager")
    other = ClimbLoss(distance, heads=copied.head, beta=0.1)
    other(*outputs(again, *torch.randn(2, 6, WIDTH))).backward()
    assert other.terms.rate > 0
    with pytest.raises(RuntimeError, match="is a copy"):
        loss(*outputs(again, *torch.randn(2, 6, WIDTH)))


def test_a_wrapped_projection() -> None:
    """A head on a hook; wrapped first, compiled then."""

    def gradients(compiled: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        loss = wrap(distance, student=projection, beta=0.1)
        model = compiled(projection)
        loss(*(model(view) for view in torch.randn(2, 6, WIDTH))).backward()
        assert loss.terms.rate > 0
        return [p.grad for p in projection.parameters() if p.grad is not None]

    expected = gradients(lambda model: model)
    seen = gradients(lambda model: torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run_before", [False, True])
def test_a_projection_with_a_compiled_part(run_before: bool) -> None:
    projection, rows = embedded_by_compiled_code(), torch.randn(16, WIDTH)
    if run_before:
        projection(rows)
    mean = copy.deepcopy(projection.last)(copy.deepcopy(projection.body)(rows))
    loss = wrap(square, student=projection, beta=0.1)
    loss(projection(rows)).backward()
    torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=1e-4, atol=0.0)


def embedded_by_compiled_code() -> Any:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(nn.Linear(WIDTH, WIDTH), backend="aot_eager")
            self.last = nn.Linear(WIDTH, 4)

        def forward(self, view: Tensor) -> Tensor:
            return F.normalize(self.last(self.body(view)), dim=-1)

    return Projection()


class Autocast(nn.Module):
    """What a learned mean needs."""

    def forward(self, view: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return view + 1


def test_evaluation_exports() -> None:
    if not holds_for_plain_torch(lambda: torch.export.export(Autocast(), (torch.ones(2),))):
        pytest.skip("this torch (2.5) does not export autocast regions")
    net = make(Net, linear=True).eval()
    view = torch.randn(3, WIDTH)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(net, (view,), dynamic_shapes=({0: batch},))
    for size in (3, 5):
        view = torch.randn(size, WIDTH)
        torch.testing.assert_close(exported.module()(view), net(view))
