from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from climb_plugin.schedule import Constant, Cosine, Exponential, Linear, Ramp, as_schedule

RAMPS = [Linear, Cosine, Exponential]


@pytest.mark.parametrize("ramp", RAMPS)
@given(beta=st.floats(1e-5, 10), warmup=st.integers(1, 500), delay=st.integers(0, 500))
def test_starts_at_start_rises_and_stays_at_beta(
    ramp: type[Ramp], beta: float, warmup: int, delay: int
) -> None:
    schedule = ramp(beta, warmup=warmup, delay=delay, start=1e-6)
    values = [schedule(step) for step in range(delay + warmup + 10)]
    assert values[: delay + 1] == pytest.approx([1e-6] * (delay + 1))
    assert values[delay + warmup :] == [beta] * 10
    assert all(one <= two * (1 + 1e-9) for one, two in itertools.pairwise(values))


def test_a_delay_without_a_warmup_is_a_jump() -> None:
    assert [Linear(1.0, warmup=0, delay=2)(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    # Of a short training the warm-up rounds to nothing.
    short = Linear(1.0, warmup=0.01, delay=0.1, total_steps=20)
    assert [short(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("ramp", "half"),
    [(Linear, 0.505), (Cosine, 0.505), (Exponential, 0.1)],
)
def test_half_way(ramp: type[Ramp], half: float) -> None:
    assert ramp(1.0, warmup=100, start=0.01)(50) == pytest.approx(half)


def test_quarter_of_a_cosine() -> None:
    assert Cosine(1.0, warmup=100)(25) == pytest.approx((1 - math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("ramp", RAMPS)
def test_fraction_of_the_total_equals_steps(ramp: type[Ramp]) -> None:
    by_fraction = ramp(1.0, warmup=0.2, delay=0.1, start=1e-3, total_steps=1000)
    by_steps = ramp(1.0, warmup=200, delay=100, start=1e-3)
    assert [by_fraction(s) for s in range(400)] == [by_steps(s) for s in range(400)]
    unlaid = ramp(1.0, warmup=0.2, delay=0.1, start=1e-3)
    assert [unlaid.over(1000)(s) for s in range(400)] == [by_steps(s) for s in range(400)]
    assert unlaid.over(0)(0) == 1.0  # the end of every training
    assert ramp(1.0, warmup=0.2, delay=100, start=1e-3).over(0)(0) == 1.0
    assert repr(unlaid.over(1000)) == repr(unlaid)
    assert (unlaid.needs_length, by_steps.needs_length) == (True, False)


def test_no_warmup_is_constant() -> None:
    assert Linear(0.5, warmup=0)(0) == Constant(0.5)(0) == 0.5


def test_numbers_become_constants_and_schedules_stay() -> None:
    ramp = Linear(1.0, warmup=5)
    assert as_schedule(1) == Constant(1.0)
    assert as_schedule(ramp) is ramp


class TestWrongInput:
    @pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("make", [Constant, lambda b: Linear(b, warmup=3), as_schedule])
    def test_beta(self, make: type, beta: float) -> None:
        with pytest.raises(ValueError, match="beta must be finite and not negative, got"):
            make(beta)

    @pytest.mark.parametrize("beta", ["0.1", None, True])
    def test_beta_is_no_number(self, beta: object) -> None:
        with pytest.raises(TypeError, match="beta must be a number or a schedule, got"):
            as_schedule(beta)  # type: ignore[arg-type]

    @pytest.mark.parametrize("warmup", [-1, 1.0, 100.0, -0.1, math.nan])
    def test_warmup(self, warmup: float) -> None:
        with pytest.raises(ValueError, match=r"warmup must be .* a fraction in \[0, 1\), got"):
            Linear(1.0, warmup=warmup)

    def test_fraction_without_a_total(self) -> None:
        with pytest.raises(ValueError, match=r"warmup=0\.1 is a fraction .* total_steps="):
            Linear(1.0, warmup=0.1)(0)

    def test_warmup_longer_than_the_training(self) -> None:
        with pytest.raises(ValueError, match="ends at step 110, after the 100 steps"):
            Linear(1.0, warmup=100, delay=0.1, total_steps=100)

    def test_exponential_from_zero(self) -> None:
        with pytest.raises(ValueError, match=r"above 0, got start=0\.0"):
            Exponential(1.0, warmup=10, start=0.0)
