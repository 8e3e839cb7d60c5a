from __future__ import annotations

import math

import pytest
import torch

from climb_plugin.gaussian import kl_to_standard_normal
from climb_plugin.monitor import active_dimensions, nats_to_bits, rate_per_dimension


def test_rates_of_the_dimensions_add_up_to_the_rate() -> None:
    mean, logvar = torch.randn(2, 3, 16, 5, generator=torch.Generator().manual_seed(0))
    per_dimension = rate_per_dimension(mean, logvar)
    assert per_dimension.shape == (5,)
    torch.testing.assert_close(per_dimension.sum(), kl_to_standard_normal(mean, logvar).mean())


def test_active_dimensions_are_those_away_from_the_prior() -> None:
    mean, logvar = torch.zeros(64, 5), torch.zeros(64, 5)
    mean[:, 1] = 3.0
    logvar[:, 4] = -4.0
    assert active_dimensions(mean, logvar) == 2
    assert active_dimensions(mean, logvar, threshold=2.0) == 1


def test_bits() -> None:
    assert nats_to_bits(math.log(2)) == pytest.approx(1.0)
