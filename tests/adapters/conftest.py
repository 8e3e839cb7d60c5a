"""Each package of Lightning that is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from hosts import LIGHTNINGS


@pytest.fixture(params=LIGHTNINGS)
def pl(request: pytest.FixtureRequest) -> Any:
    return import_module(request.param)
