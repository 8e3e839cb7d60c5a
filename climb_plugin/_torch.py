"""Holds every private name of torch that this package uses, with the reason for each.

None has a public twin. Nothing else in the package may use a name of torch that begins with an
underscore. One test calls all functions here: a release of torch without a name is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.modules import module as _module
from torch.utils import _python_dispatch


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread; torch.utils.checkpoint asks too."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def graph_is_kept() -> bool:
    """Whether the running backward pass leaves the graph alive (retain_graph, create_graph).

    Without this one, a hook on the saved tensors would have to tell.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def sequence_number(node: Node) -> int:
    """The place of a node among those of its thread, as in profiles; 2**64 - 1: AccumulateGrad."""
    return node._sequence_nr()


def in_function_forward() -> bool:
    """Whether the code runs in the forward of an autograd function, as reentrant checkpoints do.

    There torch switches forward-mode gradients off too, which ``torch.no_grad()`` leaves on. (In
    inference mode both are off as well.) Nothing public tells the two apart.
    """
    return not (
        torch.is_grad_enabled()
        or torch._C._is_fwd_grad_enabled()
        or torch.is_inference_mode_enabled()
    )


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; autograd.Function asks too."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def without_transforms() -> AbstractContextManager[Any]:
    """Makes all tensors created within plain, even under a transform of torch.func."""
    return torch._C._DisableFuncTorch()


def without_modes() -> AbstractContextManager[Any]:
    """Hides the operations within from the modes that watch every operation.

    Selective checkpointing is such a mode, and refuses operations of the second run that the first
    did not have.
    """
    return _python_dispatch._disable_current_modes()


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` is at work on this tensor, under any other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_batch_of_gradients(tensor: Tensor) -> bool:
    """Whether the tensor comes from ``torch.autograd.grad(..., is_grads_batched=True)``.

    That uses an older vmap, which torch.func does not know; few functions take such tensors.
    """
    batched = torch._C._dispatch_key_parse("Batched")
    return bool(torch._C._dispatch_keys(tensor).has(batched))


def plain(tensor: Tensor) -> Tensor:
    """The tensor below all wrappers of torch.func, which are dead when the transform is over."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; autograd compares the same for saved tensors."""
    return plain(tensor)._version


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: the compiled code would not run later hooks."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made this copy, which lasts for one forward."""
    return bool(getattr(module, "_is_replica", False))


def has_hook(module: nn.Module, number: int) -> bool:
    """Whether the forward (pre-)hook with this ``RemovableHandle.id`` is still on the module.

    Conversions make a new module and drop the hooks; a handle does not tell.
    """
    return number in module._forward_hooks or number in module._forward_pre_hooks


def without_hooks(module: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` with which the copy of the module has none of a user's hooks.

    Handles take off one hook at a time only; and what the hooks belong to may be beyond copying.
    Those of torch.nn.utils stay (weight_norm, spectral_norm, pruning): they compute a weight before
    each forward, which until then is of another device or precision than a module that was moved.
    """
    return {
        id(hooks): type(hooks)(
            (number, hook)
            for number, hook in hooks.items()
            if name == "_forward_pre_hooks" and type(hook).__module__.startswith("torch.nn.utils.")
        )
        for part in module.modules()
        for name, hooks in vars(part).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    }


@contextmanager
def no_global_hooks() -> Iterator[None]:
    """Keeps hooks that were registered for all modules from running."""
    tables = [_module._global_forward_hooks, _module._global_forward_pre_hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made this module around another one."""
    return hasattr(module, "_orig_mod")


def joins(wrapper: nn.Module) -> bool:
    """Whether a DistributedDataParallel trains in its ``join()`` context."""
    return bool(getattr(getattr(wrapper, "_join_config", None), "enable", False))


def averaged_in(wrapper: nn.Module, otherwise: set[int]) -> set[int]:
    """The ids of the parameters that a DistributedDataParallel was built to average, or to leave.

    Of other wrappers nothing is known: ``otherwise``.
    """
    averaged: list[nn.Parameter] | None = getattr(wrapper, "_module_parameters", None)
    module: nn.Module | None = getattr(wrapper, "module", None)
    if averaged is None or module is None:  # of another kind, or half built
        return otherwise
    ignored: set[str] = getattr(wrapper, "parameters_to_ignore", set())
    later: list[nn.Parameter] = getattr(wrapper, "_delay_all_reduce_params", [])
    left = [parameter for name, parameter in module.named_parameters() if name in ignored]
    return {id(parameter) for parameter in (*averaged, *later, *left)}
