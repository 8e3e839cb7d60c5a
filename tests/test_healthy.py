"""Rule 8: a healthy run is not stopped, and nothing is said in it: warnings are errors here."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import mlp, rates, square

from climb_plugin import ClimbLoss, GaussianHead, TargetRate, wrap
from climb_plugin.schedule import Constant, Linear


def sequential() -> nn.Sequential:
    return mlp(8, 16, 4)


def pairs(z: Tensor, labels: Tensor) -> Tensor:
    """A zero without a graph where there is no positive, as metric-learning losses return it."""
    same = torch.triu(labels[:, None] == labels[None], diagonal=1)
    if not same.any():
        return torch.tensor(0.0, requires_grad=True)
    return torch.cdist(z, z)[same].mean()


def test_batches_without_positives_are_said_once() -> None:
    student, rows = sequential(), torch.randn(6, 8)
    loss = wrap(pairs, student=student, beta=1e-3)
    mean = copy.deepcopy(student).eval()(rows)
    expected = rates(mean).mean()
    some, none = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for labels in (some, some, none, none, some):
            total = loss(student(rows), labels)
            total.backward()
            if labels is none:
                assert total == 0
                assert loss.terms.rate.isnan()
            else:
                torch.testing.assert_close(loss.terms.rate, expected, rtol=1e-4, atol=0.0)
    (warning,) = said
    assert "a batch without positives" in str(warning.message)
    assert warning.filename == __file__


def test_a_zero_of_integers_is_a_batch_without_positives() -> None:
    student, rows = sequential(), torch.randn(6, 8)
    loss = wrap(
        lambda z, some: pairs(z, some) if some is not None else torch.tensor(0),
        student=student,
        beta=1e-3,
    )
    loss(student(rows), torch.zeros(6)).backward()
    with pytest.warns(UserWarning, match="a batch without positives"):
        assert loss(student(rows), None) == 0
    assert loss.terms.rate.isnan()


def test_a_batch_without_one_kind_of_image() -> None:
    """Two heads, as of two kinds: one is not called, the other is."""
    heads = [GaussianHead(4), GaussianHead(4)]
    loss = ClimbLoss(lambda *z: sum(one.square().mean() for one in z), heads=heads, beta=1e-3)
    embedding = torch.randn(6, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no sample of heads\[1\].*not called"):
        loss(heads[0](embedding))  # not proven yet
    both = float(rates(embedding).mean())
    loss(*(head(embedding) for head in heads))
    assert float(loss.terms.rate) == pytest.approx(2 * both, rel=1e-5)
    with pytest.warns(UserWarning, match="without that kind of image"):
        loss(heads[0](embedding))
    assert float(loss.terms.rate) == pytest.approx(both, rel=1e-5)
    with pytest.raises(RuntimeError, match="not called"):
        loss(embedding.sum())  # none at all


# torch 2.5 said so once of a tensor of its own, in the backward pass of one of the threads.
@pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject references")
def test_two_trainings_in_two_threads() -> None:
    """Each is within its base loss at the same moment, and draws noise of its own."""
    both, noises = threading.Barrier(2, timeout=60), []

    def base(z: Tensor) -> Tensor:
        both.wait()
        return z.square().mean()

    def training(head: GaussianHead) -> None:
        loss = ClimbLoss(base, heads=head, beta=1e-3)
        for _ in range(20):
            sample = head(torch.zeros(4, 4, requires_grad=True))
            noises.append(sample.detach())
            loss(sample).backward()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(training, head) for head in (GaussianHead(4), GaussianHead(4))]:
            done.result()
    assert len({tuple(one.flatten().tolist()) for one in noises}) == 40


def test_before_the_wiring_is_proven_it_is_an_error() -> None:
    student = sequential()
    loss = wrap(pairs, student=student, beta=1e-3)
    with pytest.raises(RuntimeError, match="does not reach the loss"):
        loss(student(torch.randn(6, 8)), torch.arange(6))


def test_an_empty_selection_counts_nothing() -> None:
    head, other = GaussianHead(4), GaussianHead(4)
    loss = ClimbLoss(lambda a, b: a.sum() + b.square().mean(), heads=[head, other], beta=1e-3)
    rows = torch.randn(6, 4)
    loss(head(rows[:0]), other(rows)).backward()
    both = loss.terms.rate
    alone = ClimbLoss(square, heads=other, beta=1e-3)
    alone(other(rows))
    assert torch.equal(both, alone.terms.rate)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_needs_no_length_of_the_training(context: Callable[[], Any]) -> None:
    student, rows = sequential().eval(), torch.randn(6, 8)
    loss = wrap(F.mse_loss, student=student, beta=Linear(1e-3, warmup=0.1))
    with context():
        value = loss(student(rows), rows[:, :4])
        assert torch.equal(value, F.mse_loss(student(rows), rows[:, :4]))
    assert loss.terms.beta == 0
    assert repr(loss)
    assert not hasattr(loss, "beta")
    student.train()
    with pytest.raises(ValueError, match="whose length is not known"):
        loss(student(rows), rows[:, :4])


@pytest.mark.parametrize("trained", [False, True])
def test_a_loss_of_outputs_that_an_evaluation_collected(trained: bool) -> None:
    """The helper that collects them puts the model back into training mode before the loss."""
    student, rows = sequential(), torch.randn(6, 8)
    loss = wrap(square, student=student, beta=1e-3)
    if trained:
        loss(student(rows)).backward()
    student.eval()
    with torch.no_grad():
        collected = student(rows)
    student.train()
    assert torch.equal(loss(collected), square(collected))
    loss(student(rows)).backward()
    assert loss.terms.rate > 0


def test_forward_may_be_called_directly() -> None:
    """The criterion's, and that of a module whose layer is sampled, as lightly's DINOv2 has it."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.layer(x), dim=-1)

    student = Normalised()
    loss = wrap(F.mse_loss, student=student, beta=1e-3)
    loss.forward(student.forward(torch.randn(6, 8)), torch.zeros(6, 4)).backward()
    assert loss.terms.rate > 0


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def run_once() -> list[float]:
    torch.manual_seed(0)
    student = sequential().to_empty(device="cpu")
    for index, parameter in enumerate(student.parameters()):
        nn.init.constant_(parameter, 0.1 * (index + 1))
    rows = torch.arange(40.0, device="cpu").reshape(5, 8) / 40
    loss = wrap(F.mse_loss, student=student, beta=1e-3)
    loss(student(rows), rows[:, :4]).backward()
    state = {name: value.clone() for name, value in student.state_dict().items()}
    assert {value.device.type for value in state.values()} == {"cpu"}
    student.load_state_dict(state)
    again = loss(student(rows), rows[:, :4])
    return [float(loss.terms.rate), float(again.detach())]


def test_a_default_device_captures_nothing(request: pytest.FixtureRequest) -> None:
    expected = run_once()[0]
    request.getfixturevalue("default_device")
    assert run_once()[0] == expected


@pytest.mark.parametrize("make", [sequential, lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh())])
@pytest.mark.parametrize("training", [True, False])
def test_fx_tracing_follows_the_mean(make: Callable[[], nn.Module], training: bool) -> None:
    student, rows = make(), torch.randn(5, 8)
    expected = student(rows).detach()
    wrap(F.mse_loss, student=student, beta=1e-3)
    traced = torch.fx.symbolic_trace(student.train(training))
    assert torch.equal(traced.eval()(rows), expected)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_works_by_tracing_in_eval_or_says_unwrap() -> None:
    student, rows = sequential(), torch.randn(5, 8)
    wrap(F.mse_loss, student=student, beta=1e-3)
    with pytest.raises(RuntimeError, match=r"climb_plugin\.unwrap\(criterion\)"):
        torch.jit.script(student)
    with pytest.raises(RuntimeError, match=r"trace the eval\(\) model"):
        torch.jit.trace(student, rows)
    assert torch.equal(torch.jit.trace(student.eval(), rows)(rows), student(rows))


NUMPY: dict[str, tuple[Callable[[], object], object]] = {
    "in_features": (lambda: GaussianHead(np.int64(8)).out_features, 8),
    "out_features": (lambda: GaussianHead(8, np.prod((2, 2))).out_features, 4),
    "init_std": (lambda: GaussianHead(8, init_std=np.float32(0.5)).init_std, 0.5),
    "warmup": (lambda: Linear(1e-3, warmup=np.int64(10))(5), 5e-4),
    "total_steps": (lambda: Linear(1e-3, warmup=0.1, total_steps=np.int64(100))(5), 5e-4),
    "beta": (lambda: Constant(np.float32(0.5))(0), 0.5),
    "nats": (lambda: TargetRate(np.int64(20)).nats, 20.0),
    "alpha": (lambda: numbers().alpha, 1.0),
    "free_nats": (lambda: numbers().free_nats, 2.0),
    "views": (lambda: numbers(prior="view", views=np.int64(2)).climb_priors[0].views, 2),
    "step": (lambda: (made := numbers(), made.set_step(np.int64(3))) and made.step, 3),
}


def numbers(**options: Any) -> ClimbLoss:
    settings: dict[str, Any] = {"alpha": np.float32(1), "free_nats": np.int64(2), **options}
    return ClimbLoss(F.mse_loss, heads=GaussianHead(8), beta=np.float64(1e-3), **settings)


@pytest.mark.parametrize("case", NUMPY.values(), ids=NUMPY)
def test_numpys_numbers_are_numbers(case: tuple[Callable[[], object], object]) -> None:
    make, expected = case
    assert make() == expected
    assert isinstance(make(), int | float)


@pytest.mark.parametrize("shape", [(64, 2, 8), (2, 64, 8), (16, 2, 4, 8)])
def test_views_beside_their_image_are_no_collapse(shape: tuple[int, ...]) -> None:
    """The views of an image agree nearly, the images differ: a converged run."""
    head = GaussianHead(8, init_std=1.0)
    loss = ClimbLoss(square, heads=head, beta=1e-3)
    images = 0.4 * torch.randn(shape[0], *[1] * (len(shape) - 2), 8)
    if shape[0] == 2:
        images = 0.4 * torch.randn(1, 64, 8)
    for _ in range(210):
        views = (images + 1e-4 * torch.randn(shape)).requires_grad_()
        loss(head(views)).backward()


def test_a_view_prior_of_views_beside_their_image_says_how() -> None:
    head = GaussianHead(8)
    loss = ClimbLoss(square, heads=head, beta=1e-3, prior="view", views=2)
    with pytest.raises(ValueError, match=r"call the head once per view, as in head\(x\[:, i\]\)"):
        loss(head(torch.randn(64, 2, 8)))
