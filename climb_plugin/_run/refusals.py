"""Refuses modules that cannot be given a head, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from climb_plugin._torch import is_compiled, is_compiled_in_place
from climb_plugin.head import GaussianHead


def check_module(role: str, module: nn.Module) -> None:
    """Raises if ``module`` is none, is wrapped or compiled, or holds a head; ``role`` names it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{role} must be a torch module, got {type(module).__name__}.")
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(module, parallel) or is_compiled(module):
        raise ValueError(
            f"{role} is wrapped in {type(module).__name__}, which would not see the new "
            "parameters: wrap the loss first, then the model."
        )
    if any(is_compiled_in_place(part) for part in module.modules()):
        raise ValueError(
            f"{role} was compiled in place by compile(), so what is hung on it would not run: "
            "wrap the loss first, then compile."
        )
    if any(isinstance(part, GaussianHead) for part in module.modules()):
        raise ValueError(
            f"{role} holds a GaussianHead already, so it was wrapped before (or shares a layer "
            "with a module that was). For a second loss on the same head: ClimbLoss(loss, "
            "heads=first.heads, beta=...) with the criterion of the first. To wrap anew: "
            "unwrap(first) before. Without the first criterion, as for a model that was copied or "
            "loaded: ClimbLoss(loss, heads=[m for m in model.modules() if isinstance(m, "
            "GaussianHead)], beta=...)."
        )


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raises a ValueError if momentum updates could not pair the parameters of the two."""
    storages = {t.untyped_storage().data_ptr(): name for name, t in named_tensors(student)}
    for name, tensor in named_tensors(teacher):
        address = tensor.untyped_storage().data_ptr()
        if address and address in storages:
            raise ValueError(
                f"student and teacher share storage ({storages[address]} and {name}), so the "
                "teacher would move with the student: build a second projection head and "
                "teacher.load_state_dict(student.state_dict())."
            )
    one, two = (
        [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        for module in (student, teacher)
    )
    if one != two:
        raise ValueError(
            "student and teacher must have the same parameters in the same order, because "
            "momentum updates pair them one to one; only the student has "
            f"{[entry for entry in one if entry not in two]}, only the teacher has "
            f"{[entry for entry in two if entry not in one]}. Build both with the same arguments."
        )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, with their names."""
    yield from module.named_parameters()
    yield from module.named_buffers()
