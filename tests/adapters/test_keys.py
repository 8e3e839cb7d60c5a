"""The climb_* keys of a solo-learn config; needs no host."""

from __future__ import annotations

from typing import Any

import pytest

from climb_plugin.adapters.solo_keys import KEYS, Keys, differences, read_keys
from climb_plugin.schedule import Constant, Cosine, Exponential, Linear, TargetRate


def read(**section: Any) -> Keys | None:
    return read_keys({"method": "dino", "method_kwargs": {"temperature": 0.1, **section}})


def test_no_key_is_nothing() -> None:
    assert read() is None
    assert read_keys({"method": "dino"}) is None
    assert read_keys({"method": "dino", "method_kwargs": None}) is None
    assert read(climb_beta=None) is None


def test_zero_is_off_but_checked() -> None:
    keys = read(climb_beta=0, climb_alpha=1.0)
    assert keys is not None
    assert not keys.on
    with pytest.raises(ValueError, match=r"climb_prior .* got 'vie'"):
        read(climb_beta=0, climb_prior="vie")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("climb_bta", "climb_beta"), ("climb_pior", "climb_prior"), ("climb_warm_up", "climb_warmup")],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"method_kwargs.{key} .* did you mean {nearest}"):
        read(climb_beta=1e-3, **{key: 1})


@pytest.mark.parametrize("key", ["climbbeta", "CLIMB_beta", "climb"])
def test_a_misspelt_prefix_is_no_way_around(key: str) -> None:
    with pytest.raises(ValueError, match="did you mean"):
        read(**{key: 1e-3})


def test_a_key_at_the_top_of_the_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write method_kwargs\.climb_beta"):
        read_keys({"climb_beta": 1e-3, "method_kwargs": {}})


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"climb_alpha": 1.0}, ValueError, "climb_alpha has no effect without climb_beta"),
        ({"climb_beta": 1, "climb_schedule": "linear"}, ValueError, "a ramp needs a warm-up"),
        (
            {"climb_beta": 1, "climb_schedule": "constant", "climb_warmup": 10},
            ValueError,
            "a constant beta would ignore it",
        ),
        ({"climb_beta": -1}, ValueError, r"climb_beta must be .* got -1"),
        ({"climb_beta": float("nan")}, ValueError, "climb_beta must be .* got nan"),
        ({"climb_beta": "1e-3x"}, TypeError, "climb_beta must be a number, got '1e-3x'"),
        ({"climb_beta": True}, TypeError, "climb_beta must be a number, got True"),
        ({"climb_beta": 1, "climb_at": "logits"}, ValueError, "'projection', 'features'"),
        ({"climb_beta": 1, "climb_schedule": "cos"}, ValueError, "'cosine'"),
        ({"climb_beta": 1, "climb_init_std": 0}, ValueError, "climb_init_std must be above 0"),
        ({"climb_beta": 1, "climb_warmup": "x"}, TypeError, "warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": 1.5}, ValueError, "fraction"),
        ({"climb_beta": 1, "climb_free_nats": -2}, ValueError, "climb_free_nats .* got -2"),
        ({"climb_beta": 1, "climb_target_rate": 0}, ValueError, "climb_target_rate must be above"),
        ({"climb_beta": 1, "climb_target_rate": "5"}, TypeError, "climb_target_rate must be a num"),
        ({"climb_beta": 1e3, "climb_target_rate": 5}, ValueError, "beta must lie within its bou"),
        (
            {"climb_beta": 1, "climb_target_rate": 5, "climb_warmup": 0.1},
            ValueError,
            "climb_target_rate=5 adapts beta by itself",
        ),
    ],
)
def test_values_are_checked(section: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(**section)


def test_schedules() -> None:
    def schedule(**section: Any) -> object:
        keys = read(climb_beta=0.5, **section)
        assert keys is not None
        return keys.make_schedule()

    assert schedule() == Constant(0.5)
    assert schedule(climb_warmup=0) == Constant(0.5)
    assert schedule(climb_warmup=10) == Linear(0.5, warmup=10)
    assert schedule(climb_warmup=0.1, climb_schedule="cosine") == Cosine(0.5, warmup=0.1)
    assert repr(schedule(climb_target_rate=8)) == repr(TargetRate(8.0, beta=0.5))
    assert schedule(climb_warmup=3, climb_schedule="exponential") == Exponential(0.5, warmup=3)


def test_what_is_in_force_reads_back_as_itself() -> None:
    keys = read(climb_beta=1e-3, climb_warmup=0.2)
    assert keys is not None
    assert tuple(keys.named()) == KEYS
    assert read(**keys.named()) == keys


def test_differences() -> None:
    assert differences({"climb_beta": 1, "x": 1}, {"climb_beta": 1, "x": 2}) == {}
    assert differences({"climb_beta": 1}, {"climb_beta": 2}) == {"climb_beta": (1, 2)}
    assert differences(None, {"climb_beta": 2}) == {"climb_beta": (None, 2)}
