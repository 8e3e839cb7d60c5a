import copy
import gc
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.schedule import TargetRate


def info_nce(one: Tensor, two: Tensor) -> Tensor:
    one, two = nn.functional.normalize(one), nn.functional.normalize(two)
    return nn.functional.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))


class Run:
    """A training of which views share 16 numbers, each with noise of its own."""

    def __init__(self, target: TargetRate, calls: int = 1) -> None:
        torch.manual_seed(0)
        self.head = GaussianHead(32, 16)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), self.head)
        self.loss = ClimbLoss(info_nce, heads=self.head, beta=target)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.data = torch.Generator().manual_seed(1)
        self.calls = calls

    def step(self) -> tuple[float, float]:
        shared, *noise = torch.randn(3, 64, 16, generator=self.data)
        one, two = (self.model(shared + 0.3 * own) for own in noise)
        total = torch.stack([self.loss(one, two) for _ in range(self.calls)]).mean()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return float(self.loss.terms.rate), float(self.loss.terms.beta)

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "loss": self.loss, "optimizer": self.optimizer}
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, "data": self.data.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.data.set_state(state["data"])


def test_steps_in_which_no_rank_had_a_posterior_move_nothing() -> None:
    """Their rate is NaN, also in the first step."""
    holes, whole = TargetRate(10.0, beta=1e-2), TargetRate(10.0, beta=1e-2)
    holes.observe(0, torch.tensor(math.nan))
    assert float(holes(1)) == pytest.approx(1e-2)
    assert holes.state()["before"] is None
    again = TargetRate(10.0, beta=1e-2)
    again.load_state(holes.state())
    for step in range(3):
        for schedule in (holes, whole, again):
            schedule.observe(step, torch.tensor(20.0 + step))
    assert float(holes(3)) == float(whole(3)) == float(again(3)) > 1.01e-2


@pytest.mark.parametrize("beta", [1e-5, 1e-1])
def test_the_rate_arrives_and_stays(beta: float) -> None:
    run = Run(TargetRate(8.0, beta=beta))
    smoothed, seen = None, []
    for _ in range(2000):
        rate, _ = run.step()
        smoothed = rate if smoothed is None else 0.9 * smoothed + 0.1 * rate
        seen.append(smoothed)
    assert not 7.6 < seen[0] < 8.4
    assert all(7.6 < rate < 8.4 for rate in seen[-500:])


@pytest.mark.parametrize("calls", [1, 2])
def test_a_resumed_run_goes_on_to_the_same_numbers(calls: int) -> None:
    run = Run(TargetRate(8.0), calls)
    for _ in range(5):
        run.step()
    file = io.BytesIO()
    torch.save(run.state(), file)
    rest = [run.step() for _ in range(5)]
    file.seek(0)
    resumed = Run(TargetRate(8.0), calls)
    resumed.load(torch.load(file, weights_only=True))
    assert [resumed.step() for _ in range(5)] == rest
    assert len({beta for _, beta in rest}) == 5


def test_another_target_on_resume_is_warned_of() -> None:
    run, other = Run(TargetRate(8.0)), Run(TargetRate(9.0))
    run.step()
    with pytest.warns(UserWarning, match=r"beta was TargetRate\(8.0.* is TargetRate\(9.0"):
        other.loss.load_state_dict(run.loss.state_dict())


@pytest.mark.parametrize("how", ["reused", "copied"])
def test_with_the_next_loss_it_begins_anew(how: str) -> None:
    target = TargetRate(8.0)
    run = Run(target)
    for _ in range(3):
        run.step()
    assert run.loss.beta != pytest.approx(1e-3, rel=1e-3)
    if how == "copied":
        target = copy.deepcopy(target)
    else:
        del run
        gc.collect()
    again = Run(target)
    assert again.loss.beta == pytest.approx(1e-3)
    assert again.loss.step == 0


def test_two_losses_cannot_share_one() -> None:
    target = TargetRate(40.0)
    first = ClimbLoss(info_nce, heads=GaussianHead(4), beta=target)
    with pytest.raises(ValueError, match="this TargetRate belongs to another loss"):
        ClimbLoss(info_nce, heads=GaussianHead(4), beta=target)
    # A copy of a loss has a copy of it, which is its own.
    twin = copy.deepcopy(first)
    assert twin.schedule is not target
    assert twin.beta == first.beta


def betas(target: TargetRate, rates: list[float]) -> list[float]:
    seen = []
    for step, rate in enumerate(rates):
        seen.append(float(target(step)))
        target.observe(step, torch.tensor(rate))
    return seen


def test_beta_stays_within_its_bounds_and_leaves_them_at_once() -> None:
    bounds = (1e-4, 1e-2)
    # So long above the target that without the bound log beta would be 8 above it.
    seen = betas(TargetRate(10.0, bounds=bounds), [12.0] * 2000 + [9.0] * 2000)
    assert seen[1999] == pytest.approx(1e-2)
    assert seen[2020] < 0.5e-2
    assert seen[-1] == pytest.approx(1e-4)
    assert all(1e-4 * (1 - 1e-5) <= beta <= 1e-2 * (1 + 1e-5) for beta in seen)


@pytest.mark.parametrize("outlier", [0.0, 1e-3, 200.0, 1e6])
def test_a_batch_of_another_kind_leaves_no_trace(outlier: float) -> None:
    seen = betas(TargetRate(10.0), [10.0, 10.0, outlier, 10.0, 10.0])
    assert 1e-3 / 5 < seen[3] < 1e-3 * 5
    assert seen[4] == pytest.approx(1e-3, rel=0.03)


def test_the_law_of_the_controller() -> None:
    # At a constant rate the change of the error is 0: log beta moves by speed * error.
    target = TargetRate(10.0, beta=1e-3, speed=0.1)
    seen = betas(target, [10.0 * math.exp(0.5)] * 12)
    assert math.log(seen[11] / seen[10]) == pytest.approx(0.1 * 0.5, rel=1e-4)
    far = betas(TargetRate(10.0, beta=1e-3, speed=0.1), [10.0 * math.exp(3.0)] * 12)
    assert math.log(far[11] / far[10]) == pytest.approx(0.1, rel=1e-4)
    at_target = betas(TargetRate(10.0, beta=1e-3), [10.0] * 5)
    assert at_target == pytest.approx([1e-3] * 5)


def test_a_rate_of_zero_is_no_error() -> None:
    assert betas(TargetRate(10.0, beta=1e-3), [0.0] * 50)[-1] < 1e-3


def test_it_takes_effect_at_the_next_step() -> None:
    target = TargetRate(10.0)
    assert float(target(0)) == pytest.approx(1e-3)
    target.observe(0, torch.tensor(40.0))
    assert float(target(1)) > 1e-3


def test_a_checkpoint_without_its_state_is_told() -> None:
    """As an older version saved it; the rest is loaded, though the warning is an error."""
    saved = ClimbLoss(info_nce, heads=GaussianHead(4), beta=TargetRate(5.0)).climb_state()
    del saved["schedule"], saved["rates"]
    loss = ClimbLoss(info_nce, heads=GaussianHead(4), beta=TargetRate(5.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"no state of TargetRate\(5\.0.* beta begins anew"):
            loss.load_climb_state({**saved, "step": 7})
    assert loss.step == 7
    with pytest.warns(UserWarning, match="begins anew") as said:
        loss.load_climb_state(saved)
    assert [warning.filename for warning in said] == [__file__]


def test_no_step_waits_for_the_device() -> None:
    # A fake tensor has no value: to ask for one, as a synchronisation would, raises. (Of "cuda"
    # only where torch was built for it.)
    with FakeTensorMode():
        target = TargetRate(10.0)
        for step in range(3):
            target.observe(step, torch.empty((), device="meta"))
            assert target(step).device.type == "meta"
        with pytest.raises(DataDependentOutputException):
            target.state()


def test_a_target_within_the_free_nats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target rate of 5\.0 nats .* while 6\.0 nats are free"):
        ClimbLoss(info_nce, heads=GaussianHead(4), beta=TargetRate(5.0), free_nats=6.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nats": 0}, ValueError, "nats must be above 0, got 0"),
        ({"nats": -1.0}, ValueError, "nats must be finite and not negative, got -1.0"),
        ({"nats": "8"}, TypeError, "nats must be a number, got '8'"),
        ({"beta": 0.0}, ValueError, "beta must be above 0"),
        ({"beta": 1e3}, ValueError, r"beta must lie within its bounds, got 1000.0"),
        ({"speed": 0.0}, ValueError, "speed must be above 0"),
        ({"bounds": (0.0, 1.0)}, ValueError, "bounds must be above 0"),
        ({"bounds": (1e-4, math.inf)}, ValueError, "bounds must be finite"),
    ],
)
def test_wrong_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TargetRate(**{"nats": 8.0, **options})
