"""Makes a criterion the door to its base loss, for attributes, buffers and state dicts."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set, ValuesView
from types import FunctionType, GeneratorType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from climb_plugin._graph.walk import samples_behind
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead

_METADATA = "climb"
_OWN = frozenset({"base", "climb", "climb_priors"})
# Names of all torch modules (type, half, ...), by which a base may mean something else.
_OF_TORCH = frozenset(name for name in dir(nn.Module) if not name.startswith("_")) - {"forward"}

_METHODS = (
    FunctionType,
    staticmethod,
    classmethod,
    functools.partialmethod,
    functools.singledispatchmethod,
)
_LAZY = (GeneratorType, map, filter, zip)


class Short:
    """A short name for an attribute of ``criterion.climb``, if the base has no such name.

    If both have the name, nobody can tell whose is meant, so reading and setting raise.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self.__doc__ = f"``criterion.climb.{name}``."

    def __get__(self, criterion: Any, owner: type | None = None) -> Any:
        if criterion is None:
            return self
        self._check(criterion)
        return getattr(criterion.climb, self._name)

    def __set__(self, criterion: Any, value: Any) -> None:
        self._check(criterion)
        setattr(criterion.climb, self._name, value)

    def __delete__(self, criterion: Any) -> None:
        self._check(criterion)
        raise AttributeError(f"{self._name} is CLIMB's, and cannot be deleted.")

    def _check(self, criterion: Door) -> None:
        if hasattr(criterion.base, self._name):
            raise AttributeError(_clash(self._name))


def _registers(name: str) -> Any:
    """A method of nn.Module that registers on the base, if that is a module."""

    @functools.wraps(getattr(nn.Module, name))
    def register(criterion: Door, *args: Any, **kwargs: Any) -> None:
        base = _base_of(criterion)
        owner = base if isinstance(base, nn.Module) else super(Door, criterion)
        getattr(owner, name)(*args, **kwargs)

    return register


class Door(nn.Module):
    """A module around ``base`` that has a ``climb``.

    The keys of the state dict are those of the base. CLIMB's own state is in the metadata.
    """

    base: Callable[..., Any]
    climb: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_save_as_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_from_base)  # type: ignore[no-untyped-call]

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_TORCH:
            base = _base_of(self)
            if name != "training" and name in getattr(base, "__dict__", ()):
                return getattr(base, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(type(self), name, None), Short):
            # Short's AttributeError has led here; climb's own says more than "no attribute".
            if hasattr(_base_of(self), name):
                raise AttributeError(_clash(name))
            return getattr(self.__dict__["climb"], name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = _base_of(self)
            if name.startswith("__") or base is None:
                raise
        return self._guarded(name, getattr(base, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise AttributeError(
                "forward is what adds CLIMB's terms, so it cannot be replaced: set "
                "criterion.base.forward, or wrap another loss."
            )
        if self._is_own(name):
            super().__setattr__(name, value)
            if name == "training" and isinstance(_base_of(self), nn.Module):
                setattr(self.base, name, value)
        else:
            setattr(self.base, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.base, name)

    def __dir__(self) -> list[str]:
        """The names of both."""
        own: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*own, *dir(_base_of(self))})

    register_buffer, register_parameter, add_module, register_module = map(
        _registers, ("register_buffer", "register_parameter", "add_module", "register_module")
    )

    def get_buffer(self, target: str) -> Tensor:
        """A buffer of the base, or of the criterion under one of CLIMB's own names."""
        found: Tensor = _owner(self, target).get_buffer(target)
        return found

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter of the base, or of the criterion under one of CLIMB's own names."""
        found: nn.Parameter = _owner(self, target).get_parameter(target)
        return found

    def _is_own(self, name: str) -> bool:
        base = _base_of(self)
        if base is None or name in _OWN or name in self.__dict__:
            return True
        if name in _OF_TORCH and name in getattr(base, "__dict__", ()):
            return False
        if hasattr(type(self), name):
            return True
        # Not set on a function, which may be torch's and used elsewhere.
        return not isinstance(base, nn.Module) and not hasattr(base, name)

    def _guarded(self, name: str, value: Any) -> Any:
        """An attribute of the base; raises if the value depends on a sample.

        Past the criterion such a value would be trained without the rate. Of a method the result is
        checked.
        """
        heads = set(self.climb.heads)
        if not heads:
            return value
        if _depends(value, heads):
            raise AttributeError(_past_the_door(name))
        method = inspect.getattr_static(type(self.base), name, None)
        # Bound methods as well: a compiled loss has those of the loss within.
        if not isinstance(method, _METHODS) and not isinstance(value, MethodType):
            return value

        def checked(result: Any) -> Any:
            own = [] if callable(result) else list(getattr(result, "__dict__", {}).values())
            if _depends([result, own], heads):
                raise RuntimeError(_past_the_door(name, "(...)"))
            return result

        @functools.wraps(value)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return map(checked, result) if isinstance(result, _LAZY) else checked(result)

        return guarded


def say_what_is_the_modules(base: Callable[..., Tensor]) -> None:
    """Warns of methods of a base that is no module, which the criterion has for itself."""
    hidden = [] if isinstance(base, nn.Module) else [n for n in _OF_TORCH if hasattr(type(base), n)]
    if hidden:
        warn(
            f"{type(base).__name__} is no nn.Module, and has {', '.join(sorted(hidden))}: as an "
            "attribute of the criterion each of these is that of a module, which the criterion "
            f"is. Call criterion.base.{min(hidden)}(...), or make the loss an nn.Module."
        )


def _base_of(criterion: Door) -> Any:
    """The base, or None while the criterion is being built or unpickled."""
    own = criterion.__dict__
    if "climb" not in own:
        return None
    base = own.get("_modules", {}).get("base")
    return own.get("base") if base is None else base


def _owner(criterion: Door, target: str) -> Any:
    base = _base_of(criterion)
    is_bases = isinstance(base, nn.Module) and target.split(".")[0] not in _OWN
    return base if is_bases else super(Door, criterion)


def _save_as_base(
    criterion: Door, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    _rename(state, prefix + "base.", prefix)
    metadata[_METADATA] = criterion.climb.state()


def _load_from_base(
    criterion: Door, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    if isinstance(criterion.base, nn.Module):
        _rename(state, prefix, prefix + "base.", but=prefix + "climb_priors.")
    climb, saved = criterion.climb, metadata.get(_METADATA)
    if saved is not None:
        climb.load_state(saved)
    elif not climb.schedule.is_constant:
        warn(
            "this state dict holds no CLIMB step (a plain loss, or its metadata was dropped): "
            f"beta goes on from step {climb.step}; set_step(n) says otherwise."
        )


def _rename(state: dict[str, Any], old: str, new: str, *, but: str | None = None) -> None:
    """Gives keys another beginning, in place and all at once: one may become what another was."""
    keys = [key for key in state if key.startswith(old) and not (but and key.startswith(but))]
    state.update({new + key[len(old) :]: value for key, value in [(k, state.pop(k)) for k in keys]})


def _clash(name: str) -> str:
    return (
        f"both CLIMB and the base loss have {name!r}: say criterion.base.{name} for that of the "
        f"base loss, criterion.climb.{name} for CLIMB's."
    )


def _past_the_door(name: str, call: str = "") -> str:
    return (
        f"{name} of the base loss depends on a sample of a GaussianHead, and would go without its "
        f"rate: train on criterion(...). To look at it alone, for a log, take "
        f"criterion.base.{name}{call}."
    )


def _depends(value: Any, heads: set[GaussianHead]) -> bool:
    return any(samples_behind(tensor, heads) for tensor in _tensors(value))


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
        return
    if isinstance(result, Mapping):
        result = list(result.values())
    elif hasattr(result, "__dataclass_fields__") and not isinstance(result, (list, tuple)):
        result = [getattr(result, name, None) for name in result.__dataclass_fields__]
    elif hasattr(result, "__attrs_attrs__"):
        result = [getattr(result, field.name, None) for field in result.__attrs_attrs__]
    elif isinstance(result, SimpleNamespace):
        result = list(vars(result).values())
    if isinstance(result, (list, tuple, deque, Set, ValuesView)):
        for item in result:
            yield from _tensors(item)
