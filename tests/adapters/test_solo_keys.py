"""The climb_* keys of a solo-learn config."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from climb_plugin.adapters.solo_config import DEFAULTS, make_schedule, read_keys
from climb_plugin.schedule import Constant, Cosine, Exponential, Linear, TargetRate


def read(**section: Any) -> dict[str, Any]:
    return read_keys({"method": "dino", "method_kwargs": {"temperature": 0.1, **section}})


def test_no_key_is_nothing() -> None:
    assert read() == {}
    assert read_keys({"method": "dino"}) == {}
    assert read_keys({"method": "dino", "method_kwargs": None}) == {}
    assert read_keys(None) == {}
    assert read(climb_beta=None) == {}


def test_what_is_in_force_has_the_defaults_and_reads_back_as_itself() -> None:
    keys = read(climb_beta=1e-3, climb_warmup=0.2)
    assert keys == {
        **DEFAULTS,
        "climb_beta": 1e-3,
        "climb_warmup": 0.2,
        "climb_schedule": "linear",
    }
    assert read(**keys) == keys


def test_interpolations_are_resolved_and_others_are_left_alone() -> None:
    config = OmegaConf.create(
        {
            "price": 0.5,
            "name": "climb_beta=${method_kwargs.climb_beta}",
            "elsewhere": "${nowhere}",
            "data": {"train_path": "???"},
            "method_kwargs": {"climb_beta": "${price}"},
        }
    )
    assert read_keys(config)["climb_beta"] == 0.5


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("climb_bta", "climb_beta"),
        ("climb_pior", "climb_prior"),
        ("climb_warm_up", "climb_warmup"),
        ("clmb_beta", "climb_beta"),
        ("climb-beta", "climb_beta"),
        ("climbbeta", "climb_beta"),
        ("CLIMB_beta", "climb_beta"),
        ("climb", "climb_at"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"method_kwargs.{key} .* did you mean {nearest}"):
        read(climb_beta=1e-3, **{key: 1})


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"climb_beta": 1}, "climb_beta"),
        ({"method_kwarg": {"climb_beta": 1}}, r"method_kwarg\.climb_beta"),
        ({"optimizer": {"kwargs": {"climb_beta": 1}}}, r"optimizer\.kwargs\.climb_beta"),
        ({"method_kwargs": {"kwargs": {"climb_beta": 1}}}, r"method_kwargs\.kwargs\.climb_beta"),
        ({"augmentations": [{}, {"climb_beta": 1}]}, r"augmentations\.1\.climb_beta"),
        ({"momentum": {"Climb_Bta": 1}}, r"momentum\.Climb_Bta"),
    ],
)
@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_a_key_in_another_section_is_refused(make: Any, config: Any, place: str) -> None:
    with pytest.raises(ValueError, match=f"^{place} has no effect: .*method_kwargs.climb_beta"):
        read_keys(make(config))


def test_words_that_only_begin_alike_are_no_keys() -> None:
    config = {"data": {"climber_ids": 3, "climbing_path": "x"}, "climb": {"grades": [1]}}
    assert read_keys(config) == {}


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"climb_alpha": 1.0}, ValueError, "climb_alpha: no effect without climb_beta"),
        ({"climb_beta": 1, "climb_schedule": "linear"}, ValueError, "a ramp needs a warm-up"),
        (
            {"climb_beta": 1, "climb_schedule": "constant", "climb_warmup": 10},
            ValueError,
            "climb_warmup=10, climb_schedule='constant'",
        ),
        (
            {"climb_beta": 1, "climb_target_rate": 5, "climb_warmup": 0.1},
            ValueError,
            "climb_target_rate=5 do not fit",
        ),
        ({"climb_beta": -1}, ValueError, r"climb_beta must be .* got -1"),
        ({"climb_beta": math.nan}, ValueError, "climb_beta must be .* got nan"),
        ({"climb_beta": math.inf}, ValueError, "climb_beta must be .* got inf"),
        ({"climb_beta": "1e-3"}, TypeError, "climb_beta must be a number, got '1e-3'"),
        ({"climb_beta": [1e-3]}, TypeError, r"climb_beta must be a number, got \[0.001\]"),
        ({"climb_beta": True}, TypeError, "climb_beta must be a number, got True"),
        ({"climb_beta": 1, "climb_alpha": "1"}, TypeError, "climb_alpha must be a number"),
        ({"climb_beta": 1, "climb_prior": "vie"}, ValueError, "climb_prior must .* got 'vie'"),
        ({"climb_beta": 1, "climb_prior": ["view"]}, ValueError, "climb_prior must be one of"),
        ({"climb_beta": 1, "climb_prior": True}, ValueError, "climb_prior must be one of"),
        ({"climb_beta": 1, "climb_at": "logits"}, ValueError, "'projection', 'features'"),
        ({"climb_beta": 1, "climb_schedule": "cos", "climb_warmup": 1}, ValueError, "'cosine'"),
        ({"climb_beta": 1, "climb_init_std": 0}, ValueError, "climb_init_std must be a p"),
        ({"climb_beta": 1, "climb_init_std": math.inf}, ValueError, "climb_init_std must be a p"),
        ({"climb_beta": 1, "climb_warmup": "x"}, TypeError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": True}, TypeError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": [10]}, TypeError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": 1.5}, ValueError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": -5}, ValueError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_warmup": math.inf}, ValueError, "climb_warmup must be an int"),
        ({"climb_beta": 1, "climb_free_nats": -2}, ValueError, "climb_free_nats .* got -2"),
        ({"climb_beta": 1, "climb_target_rate": 0}, ValueError, "climb_target_rate must be above"),
        ({"climb_beta": 1, "climb_target_rate": "5"}, TypeError, "climb_target_rate must be a num"),
        (
            {"climb_beta": 1, "climb_target_rate": 5, "climb_free_nats": 6},
            ValueError,
            "climb_target_rate must be above climb_free_nats=6, got 5",
        ),
        ({"climb_beta": 1e3, "climb_target_rate": 5}, ValueError, "climb_beta must lie within"),
    ],
)
@pytest.mark.parametrize("beta", [None, 0])
def test_values_are_checked(
    section: dict[str, Any], error: type[Exception], message: str, beta: int | None
) -> None:
    if beta == 0:  # checked where CLIMB is off, too
        if "climb_beta" not in section or "climb_beta" in message:
            return
        section = {**section, "climb_beta": 0}
    for container in (dict, OmegaConf.create):
        with pytest.raises(error, match=message):
            read_keys({"method_kwargs": container(section)})


def test_schedules() -> None:
    def schedule(**section: Any) -> object:
        return make_schedule(read(climb_beta=0.5, **section))

    assert schedule() == Constant(0.5)
    assert schedule(climb_warmup=0) == Constant(0.5)
    assert schedule(climb_warmup=10) == Linear(0.5, warmup=10)
    assert schedule(climb_warmup=0.1, climb_schedule="cosine") == Cosine(0.5, warmup=0.1)
    assert schedule(climb_warmup=3, climb_schedule="exponential") == Exponential(0.5, warmup=3)
    assert repr(schedule(climb_target_rate=8)) == repr(TargetRate(8.0, beta=0.5))
