"""A pretended CUDA device: the numbers are the CPU's, and operations that mix devices are refused.

A machine without a GPU then notices what was made on the wrong device, and what waits for the
device. Tensors of this device are of "meta" to C++, which has a device guard for that, and say
"cuda:0" in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from climb_plugin._graph import noise

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class Pretended(Tensor):
    """A tensor on the pretended device; ``held`` is that of the CPU."""

    held: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[Pretended], real: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device("meta"),
        )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes tensors for the pretended device within; counts what waits for it."""

    waits = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Pretended) for leaf in leaves):
            to_cpu = device is not None and torch.device(device).type == "cpu"
            self.waits += to_cpu or function is _aten._local_scalar_dense.default
        return _run(function, args, kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(one.held): one for one in tensors if isinstance(one, Pretended)}
    if there and function not in _COPIES:
        for tensor in tensors:
            if not isinstance(tensor, Pretended) and tensor.ndim:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {function} got cuda:0 and "
                    f"{tensor.device}, {tuple(tensor.shape)}"
                )
    args, kwargs = tree_map(_real, (args, kwargs))
    kwargs.pop("pin_memory", None)
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type != "cpu"
        kwargs["device"] = torch.device("cpu")
    made = function(*args, **kwargs)
    return tree_map(lambda one: _pretended(one, there), made) if goes_there else made


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _pretended(value: Any, there: dict[int, Pretended]) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, Pretended):
        return value
    known = there.get(id(value))  # of an operation in place: the same tensor
    return Pretended(value) if known is None else known


class _Event:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


_Generator = torch.Generator


class _OfTheCpu(_Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator.__new__(cls, device="cpu")


@contextmanager
def pretended_cuda() -> Iterator[Device]:
    """Within, the device "cuda:0" is there; take ``moved`` for ``module.to("cuda")``."""
    state: Callable[..., Any] = lambda *_: torch.get_rng_state()  # noqa: E731
    with (
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(torch.cuda, "get_rng_state", state),
        patch.object(torch.cuda, "set_rng_state", lambda new, *_: torch.set_rng_state(new)),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(torch.cuda, "Event", _Event),
        patch.object(torch, "Generator", _OfTheCpu),
        patch.object(noise, "without_modes", nullcontext),
        Device() as device,
    ):
        yield device


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers moved; other tensors stay, as with ``to``."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            there = Pretended(parameter.detach().clone())
            setattr(part, name, nn.Parameter(there, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, Pretended(buffer.detach().clone()))
    return module
