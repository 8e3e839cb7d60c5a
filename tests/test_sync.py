"""A training step never waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._run.deferred import DeferredFlags
from climb_plugin.schedule import TargetRate

# What makes the host wait on a device: values that are read back, shapes that depend on values.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class NoReading(TorchDispatchMode):
    """What torch.cuda.set_sync_debug_mode("error") does, for any device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"{func} waits for the device.")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode does not see all that waits
            torch.cuda.set_sync_debug_mode("error")
    try:
        with NoReading():  # type: ignore[no-untyped-call]
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def training_step(device: torch.device, **options: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    head = GaussianHead(8).to(device)
    loss = ClimbLoss(lambda *views: sum(v.square().mean() for v in views), heads=head, **options)
    loss.to(device)
    optimizer = torch.optim.SGD([*head.parameters(), *loss.parameters()], lr=0.1)
    views = [torch.randn(4, 8, device=device) for _ in range(2)]

    def step() -> None:
        optimizer.zero_grad()
        loss(*[head(view) for view in views]).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0},
        {"prior": "view"},
        {"prior": "learned"},
        {"prior": "backward"},
        {"free_nats": 1.0},
        {"beta": TargetRate(1.0)},
    ],
    ids=["default", "alpha", "view", "learned", "backward", "free_nats", "target_rate"],
)
def test_no_synchronisation_in_a_step(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # where flags are read at once, because nothing waits
        monkeypatch.setattr(DeferredFlags, "raised", lambda self, flags: [])
    step = training_step(device, **{"beta": 1e-3, **options})
    step()
    with no_synchronisation(device):
        for _ in range(3):
            step()


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero, bool])
def test_the_check_can_fail(device: torch.device, read: Callable[[Tensor], object]) -> None:
    value = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match=r"waits for the device|synchroniz"):  # noqa: SIM117
        with no_synchronisation(device):
            read(value)
