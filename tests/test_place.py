"""Rule 7: where the Gaussian goes, found without a trace, or refused with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from climb_plugin import wrap


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def square(z: Tensor) -> Tensor:
    return z.square().mean()


class Net(nn.Module):
    """``forward`` is given; it sees the layers."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(16, 32), nn.Linear(32, width)
        self.norm, self.prototypes = nn.BatchNorm1d(width), nn.Linear(width, 20, bias=False)
        self.function, self.calls = forward, 0

    def embedded(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.hidden(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self, x)


def unit(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1)


# forward, and the embedding that is sampled.
PLACES: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]]] = {
    "end": (lambda net, x: net.embedded(x), lambda net, x: net.embedded(x)),
    "before a normalisation": (lambda net, x: unit(net.embedded(x)), Net.embedded),
    "before prototypes": (lambda net, x: net.prototypes(unit(net.embedded(x))), Net.embedded),
    "behind a batch norm": (
        lambda net, x: unit(net.norm(net.embedded(x))),
        lambda net, x: net.norm(net.embedded(x)),
    ),
    "normalised in training alone": (
        lambda net, x: unit(net.embedded(x)) if net.training else net.embedded(x),
        Net.embedded,
    ),
    "normalised in eval alone": (
        lambda net, x: net.embedded(x) if net.training else unit(net.embedded(x)),
        Net.embedded,
    ),
    "features in eval": (
        lambda net, x: unit(net.embedded(x)) if net.training else net.hidden(x),
        Net.embedded,
    ),
    "a skip path": (
        lambda net, x: x[:, :8] + net.embedded(x),
        lambda net, x: x[:, :8] + net.embedded(x),
    ),
    "a hidden normalisation": (
        lambda net, x: net.last(F.layer_norm(net.hidden(x), (32,))),
        lambda net, x: net.last(F.layer_norm(net.hidden(x), (32,))),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_place_is_the_embedding(
    place: tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]], training: bool
) -> None:
    forward, embedded = place
    net = Net(forward).train(training)
    rows = 3 * torch.randn(12, 16)
    mean = embedded(copy.deepcopy(net).train(), rows).detach()
    loss = wrap(square, student=net, beta=1e-3)
    loss(net.train()(rows)).backward()
    expected = kl_divergence(Normal(mean, torch.tensor(0.1)), Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(loss.terms.rate, expected, rtol=1e-3, atol=0.0)


def test_looking_for_it_leaves_no_trace() -> None:
    """No hook of the user's runs, no counter moves, no random number, no statistics."""
    net = Net(lambda net, x: F.dropout(unit(net.norm(net.embedded(x))), training=net.training))
    seen: list[str] = []
    net.last.register_forward_hook(lambda *_: seen.append("hook"))
    net.hidden.register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    try:
        wrap(square, student=net, beta=1e-3)
    finally:
        everywhere.remove()
    assert seen == []
    assert net.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    net = Net(lambda net, x: unit(net.embedded(x))).to(dtype)
    loss = wrap(square, student=net, beta=1e-3)
    assert loss.heads[0].logvar.weight.dtype == dtype
    norms = net(torch.randn(12, 16, dtype=dtype)).detach().float().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(12), rtol=0.01, atol=0.0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pool(self.conv(x)).flatten(1))
        return out


def ending(end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10), end)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(16, 8)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax": (lambda: ending(nn.Softmax(dim=1)), r"ends in a softmax.*up to the logits"),
    "log-softmax": (lambda: ending(nn.LogSoftmax(dim=1)), r"ends in a log-softmax.*logits"),
    "sigmoid": (lambda: ending(nn.Sigmoid()), r"ends in a sigmoid.*logits"),
    "a whole encoder": (Encoder, r"pass its projection head, as in student=model\.fc"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), "run one batch through the model first"),
    "meta": (on_meta, "materialise it first"),
    "two outputs": (
        lambda: Net(lambda net, x: (net.hidden(x), net.embedded(x))),  # type: ignore[arg-type,return-value]
        r"must map \(B, 16\) to \(B, D\), it returned tuple",
    ),
    "no layer in between": (
        lambda: Net(lambda net, x: unit(net.embedded(x) + x[:, :8])),
        r"pass it through an nn\.Identity\(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_with_what_to_do(case: tuple[Callable[[], nn.Module], str]) -> None:
    make, message = case
    student = make()
    keys = list(student.state_dict())
    with pytest.raises(ValueError, match=message):
        wrap(square, student=student, beta=1e-3)
    assert list(student.state_dict()) == keys


def test_the_encoders_projection_works() -> None:
    model = Encoder()
    loss = wrap(square, student=model.fc, beta=1e-3)
    loss(model(torch.randn(4, 3, 8, 8))).backward()
    assert loss.terms.rate > 0


@pytest.mark.parametrize("end", [nn.ReLU(), nn.Tanh(), nn.BatchNorm1d(10), nn.Softplus()])
def test_healthy_ends_are_not_refused(end: nn.Module) -> None:
    student = ending(end)
    loss = wrap(square, student=student, beta=1e-3)
    loss(student(torch.randn(12, 16))).backward()
    assert loss.terms.rate > 0


def test_student_and_teacher_must_be_pairs() -> None:
    student = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="must have the same parameters in the same order"):
        wrap(square, student=student, teacher=nn.Linear(16, 4), beta=1e-3)
    with pytest.raises(ValueError, match="share storage"):
        wrap(square, student=student, teacher=student, beta=1e-3)
    with pytest.raises(TypeError, match="teacher must be a torch module, got int"):
        wrap(square, student=student, teacher=3, beta=1e-3)  # type: ignore[arg-type]
