"""Chooses the layer whose child a head becomes, so that its parameters are in the model."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from climb_plugin._run.copied import YOURSELF
from climb_plugin._run.living import are_elsewhere
from climb_plugin._run.refusals import named_tensors

_OF_NORMS, _OF_DROPOUTS = ("eps",), ("p", "drop_prob")
# These run or count whatever is in them: a head there would be a layer.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_host(student: nn.Module, teacher: nn.Module | None, *, path: str) -> str:
    """The path of the layer, which is the same in student and teacher.

    That is the last layer without parameters, such as an activation, of what runs up to the sampled
    part. A layer with parameters may be indexed, frozen, saved or cut off, and then must hold none
    of CLIMB's. (A DINO head's prototypes even lose their gradients in the first epoch.) Norms and
    dropouts come later in the choice: loops over all of a kind freeze them. A layer that another
    module has as well, as an activation that is built once for many, would put the head there too.

    Args:
        student: The projection head.
        teacher: Its twin.
        path: That of the submodule whose output is sampled; empty for the module's.

    Raises:
        ValueError: If there is no layer but containers.
    """
    choices = _choices(student, path)
    roots = [student] if teacher is None else [student, teacher]
    for choice in choices:
        try:
            hosts = [root.get_submodule(choice) for root in roots]
        except AttributeError:  # the teacher has another layer without parameters there
            continue
        if len(set(hosts)) == len(hosts) and not are_elsewhere(
            dict(zip(roots, hosts, strict=True)), but_slices=True
        ):
            return choice
    if not choices and _runs_what_it_holds(student):
        raise ValueError(
            f"{type(student).__name__} has no layer that could hold a head: {YOURSELF}."
        )
    return choices[0] if choices else ""


def _choices(module: nn.Module, path: str) -> list[str]:
    """Paths of layers that a module has only once, the best first; of a container the last too."""
    named = list(module.named_modules(remove_duplicate=False))
    parts = [part for _, part in named]
    inside = set(module.get_submodule(path).modules())
    behind = max(place for place, part in enumerate(parts) if part in inside) + 1
    lists = [f"{name}." for name, part in named if isinstance(part, ParametrizationList)]
    layers = [
        (name, part)
        for name, part in reversed(named[:behind])
        if not _runs_what_it_holds(part)
        and not any(f"{name}.".startswith(beginning) for beginning in lists)
    ]
    # Not any(children): a compiled one asks the module within for a length, as its truth.
    leaves = [
        (name, part)
        for name, part in layers
        if parts.count(part) == 1 and not list(part.children())
    ]
    free = [(name, part) for name, part in leaves if not any(True for _ in named_tensors(part))]
    kinds = [
        [one for one in free if not _has(one[1], *_OF_NORMS, *_OF_DROPOUTS)],
        [one for one in free if not _has(one[1], *_OF_NORMS)],
        [
            one
            for one in leaves
            if one[1] in inside and any(p.ndim > 1 for p in one[1].parameters())
        ],
        [one for one in leaves if one[1] in inside],
    ]
    found = [name for kind in kinds for name, _ in kind]
    if not found and _runs_what_it_holds(module):  # whatever a container has
        found = [name for name, _ in layers]
    return list(dict.fromkeys(found))


def _runs_what_it_holds(part: nn.Module) -> bool:
    """Whether a head in this container would be one of the layers that are run, or counted."""
    return isinstance(part, _CONTAINERS) and not any(True for _ in part.parameters(recurse=False))


def _has(part: nn.Module, *names: str) -> bool:
    return any(hasattr(part, name) for name in names)
