"""Rule 7: where the Gaussian goes, found without a trace, or refused with what to do."""

from __future__ import annotations

import copy
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toys
from torch import Tensor, nn
from torch.nn import functional as F
from toys import (
    embedded,
    embedded_and_normed,
    mlp,
    normalised,
    normalised_in_training,
    same,
    scored,
    square,
    states,
    unit,
)

from climb_plugin import ClimbLoss, GaussianHead, wrap

Half = Callable[[Any, Tensor], Any]


class Net(toys.Net):
    """With more layers, and a counter."""

    def __init__(self, *halves: Half, **named: Half) -> None:
        super().__init__(*halves, **named)
        self.skip, self.wide = nn.Linear(16, 8), nn.Linear(16, 20)
        self.codebook = nn.utils.parametrizations.weight_norm(nn.Linear(8, 20))
        self.dropout, self.end, self.calls = nn.Dropout(0), nn.Identity(), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


class L2(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return unit(z)


class Place(NamedTuple):
    """A module, and its halves before and behind the Gaussian."""

    make: Callable[[], nn.Module]
    halves: Callable[[Any], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]


def net(embed: Half = embedded, finish: Half = same) -> Place:
    def halves(net: Net) -> Any:
        return lambda x: embed(net, x), lambda z: finish(net, z)

    return Place(lambda: Net(embed, finish), halves)


def layers(make: Callable[[], nn.Sequential], *, before: int | None = None) -> Place:
    """Layers, and before which the Gaussian belongs, if not at the end."""
    end = 99 if before is None else before
    return Place(make, lambda head: (head[:end], head[end:]))


def behind(*more: Callable[[], nn.Module], before: int | None = None) -> Place:
    return layers(lambda: mlp(16, 32, 8, behind=tuple(m() for m in more)), before=before)


PLACES = {
    "linear": Place(lambda: nn.Linear(16, 8), lambda head: (head, nn.Identity())),
    "sequential": behind(),
    "nested sequential": behind(nn.ReLU, lambda: mlp(8, 8, 8)),
    "L2 module at the end": behind(L2, before=3),
    "L2 module and prototypes": behind(L2, lambda: nn.Linear(8, 20), before=3),
    "activation before L2": behind(nn.GELU, L2, before=4),
    "batch norm at the end": behind(lambda: nn.BatchNorm1d(8, affine=False)),
    "batch norm before L2": behind(lambda: nn.BatchNorm1d(8), L2, before=4),
    "batch norm at the input": layers(lambda: nn.Sequential(nn.BatchNorm1d(16), *mlp(16, 32, 8))),
    "layer norm at the end": behind(lambda: nn.LayerNorm(8)),
    "hidden layer norm": layers(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    ),
    "end": net(),
    "normalised": net(finish=normalised),
    "normalised first": net(lambda net, x: x, lambda net, x: net.wide(unit(x))),
    "normalised first, then an MLP": net(lambda net, x: embedded(net, unit(x))),
    "prototypes": net(finish=scored),
    "prototypes with weight norm and bias": net(finish=lambda net, z: net.codebook(unit(z))),
    "divided by the norm and an epsilon": net(
        finish=lambda net, z: net.prototypes(z / (z.norm(dim=-1, keepdim=True) + 1e-6)) / 0.1
    ),
    "divided by the norm and a large epsilon": net(
        finish=lambda net, z: net.prototypes(z / (z.norm(dim=-1, keepdim=True) + 1e-4))
    ),
    "divided by the root of the squares and an epsilon": net(
        finish=lambda net, z: z / (z.square().sum(dim=-1, keepdim=True) + 1e-4).sqrt()
    ),
    "layer norm, as a function": net(lambda net, x: F.layer_norm(embedded(net, x), (8,))),
    "behind a batch norm": net(embedded_and_normed, normalised),
    "normalised in training alone": net(finish=normalised_in_training),
    "normalised in eval alone": net(finish=lambda net, z: z if net.training else unit(z)),
    "features in eval": net(
        lambda net, x: embedded(net, x) if net.training else net.hidden(x),
        normalised_in_training,
    ),
    "a skip path": net(lambda net, x: x[:, :8] + embedded(net, x)),
    "a skip path and an Identity": net(
        lambda net, x: net.end(net.skip(x) + embedded(net, x)), normalised
    ),
    "a gate at 0": net(lambda net, x: net.skip(x) + 0.0 * embedded(net, x)),
    "a gate near 0": net(lambda net, x: net.skip(x) + 1e-4 * embedded(net, x)),
    "one dropout thrice": net(finish=lambda net, z: unit(net.dropout(net.dropout(net.dropout(z))))),
}


def sampled(loss: ClimbLoss, head: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what the Gaussian was given, what it returned, what the module returned)."""
    seen: list[tuple[Tensor, Tensor]] = []
    loss.heads[0].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    output = head(rows)
    ((given, sample),) = seen
    return given, sample, output


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_place_is_the_embedding(place: Place, training: bool, at: str) -> None:
    head = place.make().train(training)
    plain = copy.deepcopy(head).train()
    rows = 3 * torch.randn(12, 16)
    loss = wrap(square, student=head, beta=1e-3, at=at)
    given, sample, output = sampled(loss, head.train(), rows)
    embed, finish = (nn.Identity(), plain) if at == "features" else place.halves(plain)
    assert torch.equal(given, embed(rows))
    assert torch.equal(output, finish(sample))
    assert float((sample - given).detach().std()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["normalised", "hidden layer norm", "divided by the norm and an epsilon"]
)
def test_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    head = PLACES[name].make().to(dtype)
    plain, rows = copy.deepcopy(head), torch.randn(12, 16, dtype=dtype)
    loss = wrap(square, student=head, beta=1e-3)
    given, sample, _ = sampled(loss, head, rows)
    assert torch.equal(given, PLACES[name].halves(plain)[0](rows))
    assert sample.dtype == loss.heads[0].logvar.weight.dtype == dtype


def test_looking_for_it_leaves_no_trace() -> None:
    """No hook of the user's runs, no counter or mode moves, no random number, no statistics."""
    head = Net(finish=lambda net, z: F.dropout(unit(net.norm(z)), training=net.training))
    head.end.eval()
    seen: list[str] = []
    head.last.register_forward_hook(lambda *_: seen.append("hook"))
    head.hidden.register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    before, numbers = states(head), torch.get_rng_state()
    try:
        wrap(square, student=head, beta=0)
    finally:
        everywhere.remove()
    assert seen == []
    assert head.calls == 0
    assert torch.equal(torch.get_rng_state(), numbers)
    assert states(head) == before
    assert all(p.grad is None for p in head.parameters())


def test_looking_for_it_moves_no_random_numbers_of_python_and_numpy() -> None:
    def forward(net: Net, z: Tensor) -> Tensor:
        return z * (1 + 1e-3 * random.random() + 1e-3 * np.random.rand())

    head = Net(finish=forward)
    before = random.getstate(), np.random.get_state()[1].tolist()
    wrap(square, student=head, beta=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class Hooked:
    """A user's extractor: its hook cannot be copied, as it keeps an output with a graph."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_what_deepcopy_refuses_is_in_the_way_only_if_the_module_needs_it() -> None:
    head, extractor = Net(), Hooked()
    head.last.register_forward_hook(extractor)
    head.outputs, head.generator = [], torch.Generator().manual_seed(3)
    head.outputs.append(head(torch.randn(4, 16)))
    state = head.generator.get_state()
    loss = wrap(square, student=head, beta=1e-3)
    assert len(extractor.seen) == len(head.outputs) == 1
    assert torch.equal(head.generator.get_state(), state)
    loss(head(torch.randn(4, 16))).backward()
    assert len(extractor.seen) == 2
    locked = Net()
    locked.writer = threading.Lock()
    with pytest.raises(
        ValueError, match=r"Net\.writer cannot be copied.*after the loss is wrapped"
    ):
        wrap(square, student=locked, beta=1e-3)


def forward_replaced(head: Net) -> None:
    """As precision and profiling wrappers do; a decorator in a decorator."""
    inner = head.forward

    def middle(x: Tensor) -> Tensor:
        return inner(x.float())

    head.forward = lambda x, *, scale=1.0: scale * middle(x)  # type: ignore[method-assign,misc]


def function_of_layers(head: Net) -> None:
    head.embed = lambda _, x: head.norm(head.last(head.hidden(x).relu()))


def recursive(head: Net) -> None:
    def forward(x: Tensor, times: int = 1) -> Tensor:
        return forward(x, times - 1) if times else old(x)

    old, head.forward = head.forward, forward  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [forward_replaced, function_of_layers, recursive])
def test_functions_over_the_very_module_run_the_copy(change: Callable[[Net], None]) -> None:
    """A deepcopy shares functions: the module itself would run, and its statistics would move."""
    head = Net(embedded_and_normed, scored)
    change(head)
    seen: list[object] = []
    head.last.register_forward_hook(lambda *_: seen.append(1))
    before, rows = states(head), torch.randn(12, 16)
    wrap(square, student=head, beta=0)
    loss = wrap(square, student=head, beta=1e-3)
    assert states(unwrapped := copy.deepcopy(head).requires_grad_(False)) != before  # the head
    assert not seen
    assert head.calls == 0
    given, _, _ = sampled(loss, head, rows)
    assert torch.equal(given, embedded_and_normed(unwrapped, rows))


def test_a_copy_that_would_run_the_module_itself_is_refused() -> None:
    class Called:
        """Beyond what a copy can be made to close over: as compiled code, or a weak reference."""

        def __init__(self, head: nn.Module) -> None:
            self.head = weakref.ref(head)

        def __call__(self, x: Tensor) -> Tensor:
            head: Any = self.head()
            return unit(embedded_and_normed(head, x))

    for change in (Called, lambda head: torch.compile(head.forward, backend="eager")):
        head = Net(embedded_and_normed, normalised)
        head.forward = change(head)  # type: ignore[method-assign]
        seen: list[object] = []
        head.hidden.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        before = states(head)
        with pytest.raises(ValueError, match=r"ran a Linear of the original.*Wrap the loss before"):
            wrap(square, student=head, beta=1e-3)
        assert states(head) == before
        assert not seen


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_refused() -> None:
    head = Net()
    head.hidden = torch.jit.script(head.hidden)
    before = states(head)
    with pytest.raises(ValueError, match=r"cannot be copied.*put a GaussianHead\(width\) into it"):
        wrap(square, student=head, beta=1e-3)
    assert states(head) == before


def test_a_module_of_python_may_be_an_attribute() -> None:
    head = Net()
    head.functional = F
    loss = wrap(square, student=head, beta=1e-3)
    assert loss(head(torch.randn(4, 16))).requires_grad


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 16.0], ids=["L2", "L2 and a scale"])
def test_embeddings_of_any_size(size: float, scale: float) -> None:
    """As those of a head that was trained before: under L2 nothing holds their norm."""
    head = Net(finish=lambda net, z: scale * unit(z))
    with torch.no_grad():
        for parameter in head.last.parameters():
            parameter.mul_(size)
    plain, rows = copy.deepcopy(head), torch.randn(12, 16)
    given, _, _ = sampled(wrap(square, student=head, beta=1e-3), head, rows)
    assert torch.equal(given, embedded(plain, rows))


def test_a_norm_at_the_input_with_an_epsilon_is_none_of_the_embedding() -> None:
    class RMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    head, rows = nn.Sequential(RMSNorm(), nn.Linear(16, 8)), torch.randn(12, 16)
    plain = copy.deepcopy(head)
    given, _, _ = sampled(wrap(square, student=head, beta=1e-3), head, rows)
    assert torch.equal(given, plain(rows))


def test_heads_that_look_at_their_values() -> None:
    """They may refuse the great ones that the search makes."""

    def forward(net: Net, z: Tensor) -> Tensor:
        if z.abs().max() > 100 or not z.exp().isfinite().all():
            raise AssertionError("diverged")
        return unit(z)

    head = Net(finish=forward)
    given, _, _ = sampled(wrap(square, student=head, beta=1e-3), head, torch.randn(12, 16))
    assert given.shape == (12, 8)


def test_heads_with_attributes_of_all_kinds() -> None:
    head = Net()
    for number in range(20):
        setattr(head, f"list_{number}", [number, {"a": [1, 2]}])
        setattr(head, f"dict_{number}", {"a": (number, [3])})
    head.scale = nn.Parameter(torch.tensor(2.0))  # of no dimension, and the first, as CLIP's
    head._parameters = {"scale": head.scale}
    loss = wrap(square, student=head, beta=1e-3)
    assert loss(head(torch.randn(4, 16))).requires_grad


class TestFeatures:
    def test_a_flattening_first_layer_comes_before_them(self) -> None:
        student = nn.Sequential(nn.Flatten(), *mlp(16, 32, 8))
        loss = wrap(square, student=student, beta=1e-3, at="features")
        images = torch.randn(8, 16, 1, 1)
        given, _, _ = sampled(loss, student, images)
        assert torch.equal(given, images.flatten(1))

    def test_two_outputs_do(self) -> None:
        student = Net(finish=lambda net, z: (z, unit(z)))  # type: ignore[arg-type,return-value]
        loss = wrap(lambda both: square(*both), student=student, beta=1e-3, at="features")
        loss(student(torch.randn(8, 16))).backward()
        assert loss.terms.rate > 0

    def test_they_may_come_by_name_if_nothing_else_does(self) -> None:
        class Named(nn.Linear):
            def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
                return super().forward(x)

        student = Named(16, 8)
        loss = wrap(square, student=student, beta=1e-3, at="features")
        loss(student(x=torch.randn(8, 16))).backward()
        assert loss.heads[0].logvar.weight.grad is not None
        with pytest.raises(TypeError, match="its embedding as the first positional argument"):
            student(x=torch.randn(8, 16), y=torch.randn(8, 16))


def test_rows_of_tokens_are_sampled_like_rows_of_a_batch() -> None:
    student = PLACES["normalised first"].make()
    loss = wrap(square, student=student, beta=1e-3)
    loss(student(torch.randn(4, 6, 16))).backward()
    assert loss.terms.rate > 0


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1)
        self.fc = mlp(16, 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pool(self.conv(x)).flatten(1))
        return out


class TwoArguments(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Named(nn.Identity):
    gaussian = "mine"


def head(*behind: nn.Module) -> nn.Module:
    return mlp(16, 32, 8, behind=behind)


def wrapped() -> nn.Module:
    student = head()
    wrap(square, student=student, beta=1e-3)
    return student


def sharing(name: str) -> Callable[[nn.Module], nn.Module]:
    """A teacher that has one tensor of the student, or memory of one."""

    def teacher(student: Any) -> nn.Module:
        made: Any = head(nn.BatchNorm1d(8, affine=False))
        if name == "bias":
            made[2].bias = student[2].bias
        elif name == "view":
            made[2].weight = nn.Parameter(student[2].weight.data.view(8, 32))
        else:
            made[3] = student[3]
        return made

    return teacher


class Refusal(NamedTuple):
    message: str
    student: Callable[[], Any]
    teacher: Callable[[Any], Any]
    error: type[Exception]
    options: dict[str, Any]


def refusal(
    message: str,
    *,
    student: Callable[[], Any] = head,
    teacher: Callable[[Any], Any] = lambda student: None,
    error: type[Exception] = ValueError,
    **options: Any,
) -> Refusal:
    return Refusal(message, student, teacher, error, options)


def convolutions(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *behind)


def with_norm() -> nn.Module:
    return head(nn.BatchNorm1d(8, affine=False))


REFUSALS = {
    # Students.
    "None": refusal("student must be a .* got NoneType", student=lambda: None, error=TypeError),
    "a list": refusal("student must .* got list", student=lambda: [head()], error=TypeError),
    "softmax": refusal("ends in a softmax.*logits", student=lambda: head(nn.Softmax(dim=1))),
    "log-softmax": refusal("a log-softmax.*logits", student=lambda: head(nn.LogSoftmax(dim=1))),
    "sigmoid": refusal("ends in a sigmoid.*logits", student=lambda: head(nn.Sigmoid())),
    "an encoder": refusal(r"projection head, as in student=model\.fc", student=Encoder),
    "convolutions": refusal(
        r"could not be run on a batch of features.* put a GaussianHead\(width\)",
        student=convolutions,
    ),
    "convolutions and a linear layer": refusal(
        r"could not be run on a batch of features.*student=model\.3\..*\(4, 8\)",
        student=lambda: convolutions(nn.Linear(8, 6)),
    ),
    "two arguments": refusal(
        r"TwoArguments could not be run on a batch.*put a GaussianHead.*\(4, 16\).*'y'",
        student=lambda: TwoArguments(16, 8),
    ),
    "two outputs": refusal(
        r"must map \(B, 16\) to \(B, D\), it returned tuple",
        student=lambda: Net(finish=lambda net, z: (z, z)),  # type: ignore[arg-type,return-value]
    ),
    "three dimensions": refusal(
        r"Sequential must map \(B, 16\) to \(B, D\), it returned \(4, 2, 4\)",
        student=lambda: head(nn.Unflatten(1, (2, 4))),
    ),
    "lazy": refusal(
        "run one batch through the model first", student=lambda: nn.Sequential(nn.LazyLinear(8))
    ),
    "meta": refusal("materialise it first", student=lambda: nn.Linear(16, 8, device="meta")),
    "an attribute with the name of the head": refusal(
        "'gaussian' is what the head is called in its place, and Named has .* rename yours",
        student=lambda: head(Named()),
    ),
    "no layer before the norm": refusal(
        r"Net normalises its embedding.* an nn\.Identity\(\) of its own right before",
        student=lambda: Net(lambda net, x: net.skip(x) + embedded(net, x), normalised),
    ),
    "no layer before norm and prototypes": refusal(
        "Net normalises its embedding",
        student=lambda: Net(lambda net, x: net.skip(x) + embedded(net, x), scored),
    ),
    "a head in it": refusal(
        r"student holds a GaussianHead already.* ClimbLoss\(loss, heads=first.heads, beta=.*unwrap",
        student=lambda: head(GaussianHead(8)),
    ),
    "wrapped": refusal("student holds a GaussianHead already", student=wrapped),
    "DataParallel": refusal(
        "student is wrapped in DataParallel.* wrap the loss first, then the model",
        student=lambda: nn.DataParallel(head()),
    ),
    "compiled": refusal(
        "student is wrapped in OptimizedModule.* wrap the loss first, then the model",
        student=lambda: torch.compile(head(), backend="eager"),
    ),
    # Teachers.
    "a state dict": refusal(
        "teacher must be a torch module, got OrderedDict",
        teacher=lambda student: student.state_dict(),
        error=TypeError,
    ),
    "a function": refusal(
        "teacher must be .*, got method", teacher=lambda student: student.forward, error=TypeError
    ),
    "the student": refusal(r"share storage \(0\.weight and 0\.weight\)", teacher=lambda s: s),
    "the bias of the student": refusal(
        r"share storage \(2\.bias and 2\.bias\).* build a second projection head",
        student=with_norm,
        teacher=sharing("bias"),
    ),
    "a view of the student": refusal(
        r"share storage \(2\.weight and 2\.weig", student=with_norm, teacher=sharing("view")
    ),
    "a buffer of the student": refusal(
        r"share storage \(3\.running_mean and 3\.running_mean\)",
        student=with_norm,
        teacher=sharing("buffer"),
    ),
    "another width": refusal(
        r"same parameters in the same order.*\('2\.weight', \(8, 32\)\).*\(7, 32\).*same arguments",
        teacher=lambda _: mlp(16, 32, 7),
    ),
    "another order": refusal(
        "same parameters in the same order",
        student=lambda: nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)}),
        teacher=lambda _: nn.ModuleDict({"b": nn.Linear(16, 8), "a": nn.Linear(16, 8)}),
    ),
    "a teacher with a head": refusal(
        "teacher holds a GaussianHead already", teacher=lambda _: head(GaussianHead(8))
    ),
    # Options; more of them in test_loss.py.
    "at": refusal("at must be one of 'projection', 'features', got 'end'", at="end"),
    "at with beta 0": refusal("at must be one of", at="", beta=0),
    "prior": refusal("'learned', 'view', 'backward', got 'laplace'", prior="laplace"),
    "beta": refusal("beta must be a number or a schedule, got '1'", error=TypeError, beta="1"),
    "alpha": refusal("alpha must be finite and not negative", alpha=-1.0),
    "views": refusal("views=2 is for .* has no use for it", views=2),
    "init_std": refusal("init_std must be a positive number", init_std=0.0),
    "no loss": refusal("base must .* got 0.5", error=TypeError, loss=0.5),
    "a wrapped loss": refusal(
        "this loss is a ClimbLoss already: wrap the plain loss, once",
        loss=ClimbLoss(square, heads=(), beta=0),
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("refused", REFUSALS.values(), ids=REFUSALS)
def test_refused_with_what_to_do_and_nothing_has_changed(refused: Refusal) -> None:
    student = refused.student()
    teacher = refused.teacher(student)
    modules = [m for m in (student, teacher) if isinstance(m, nn.Module)]
    before, random = [states(module) for module in modules], torch.get_rng_state()
    options = {"loss": square, "student": student, "teacher": teacher, "beta": 1e-3}
    with pytest.raises(refused.error, match=f"(?s){refused.message}"):
        wrap(**{**options, **refused.options})
    assert [states(module) for module in modules] == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_refused() -> None:
    student = nn.parallel.DistributedDataParallel(head())
    with pytest.raises(ValueError, match=r"student is wrapped in DistributedDataParallel, whic"):
        wrap(square, student=student, beta=1e-3)


def test_the_encoders_projection_works() -> None:
    model = Encoder()
    loss = wrap(square, student=model.fc, beta=1e-3)
    loss(model(torch.randn(4, 3, 8, 8))).backward()
    assert loss.terms.rate > 0


@pytest.mark.parametrize("end", [nn.ReLU(), nn.Tanh(), nn.BatchNorm1d(8), nn.Softplus()])
def test_healthy_ends_are_not_refused(end: nn.Module) -> None:
    student = head(end)
    loss = wrap(square, student=student, beta=1e-3)
    loss(student(torch.randn(12, 16))).backward()
    assert loss.terms.rate > 0
