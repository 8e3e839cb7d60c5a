"""Hangs a Gaussian head on a module, and takes the head off again."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from climb_plugin._run.host import find_host
from climb_plugin._run.place import Place, find_place
from climb_plugin._run.refusals import check_module, check_pair
from climb_plugin._torch import backward_pass, has_hook, is_replica
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead

NAME = "gaussian"
"""Name of the submodule that holds the head's parameters."""

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]
_Inputs: TypeAlias = tuple[_Args, _Kwargs]


class Attached:
    """A head on a module: made by :func:`attach`, taken by ``ClimbLoss(heads=...)``.

    Attributes of the head can be read from this handle.

    Attributes:
        head: The student's head.
        student: The module whose output (or input) is sampled.
        teacher: The module that the frozen twin hangs on, or None.
    """

    def __init__(
        self, head: GaussianHead, student: nn.Module, teacher: nn.Module | None, hung: list[_Hung]
    ) -> None:
        self.head = head
        self.student = student
        self.teacher = teacher
        self._hung = hung

    def remove(self) -> None:
        """Takes the heads off again; student and teacher are as they were before."""
        modules = [self.student] if self.teacher is None else [self.student, self.teacher]
        for hung, module in zip(self._hung, modules, strict=True):
            hung.remove(module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "head" not in self.__dict__:  # during a copy
            raise AttributeError(name)
        return getattr(self.head, name)


def attach(
    student: nn.Module,
    *,
    teacher: nn.Module | None = None,
    at: str = "projection",
    init_std: float = 0.1,
    logvar: str = "linear",
) -> Attached:
    """Hangs a Gaussian head on ``student``, and a frozen twin on ``teacher``.

    A forward hook samples; no layer is added, so indices, ``len`` and state dict keys keep their
    meaning. One of the layers hosts the head's parameters, under ``gaussian``. Attach before the
    optimiser is built, which would miss these new parameters. The result has the head and
    ``remove()``.

    Args:
        student: The projection head that is trained.
        teacher: Its EMA copy: same layout, no shared storage.
        at: ``"projection"``: at the end of the projection MLP, before an L2 normalisation or
            prototypes inside the head. ``"features"``: before the projection head.
        init_std: Standard deviation at the start, in units of the embedding.
        logvar: ``"linear"`` or ``"shared"``, as in :class:`~climb_plugin.GaussianHead`.

    Raises:
        TypeError: If student or teacher is no module.
        ValueError: If a head is there already, student and teacher differ in layout or share
            storage, or the place cannot be found.

    Examples:
        >>> projection = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> attached = attach(projection)
        >>> attached.head.out_features, len(projection)
        (4, 3)
        >>> attached.remove()
    """
    place = checked_place(student, teacher=teacher, at=at)
    return hang(place, student, teacher, init_std=init_std, logvar=logvar)


def checked_place(student: nn.Module, *, teacher: nn.Module | None, at: str) -> Place:
    """Finds the place of the head for :func:`attach`, or raises as that; changes nothing."""
    check_module("student", student)
    if teacher is not None:
        check_module("teacher", teacher)
        check_pair(student, teacher)
    return find_place(student, at=at)


def hang(
    place: Place, student: nn.Module, teacher: nn.Module | None, *, init_std: float, logvar: str
) -> Attached:
    """Hangs a head in a given place, and a frozen twin on ``teacher``."""
    # The first may be one of integers, as in a quantised layer.
    parameters = list(student.parameters())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    with torch.device(parameters[0].device):
        head = GaussianHead(place.width, init_std=init_std, logvar=logvar).to(like.dtype)
    _say_what_is_wide(head, student)
    host = find_host(student, teacher, path=place.path)
    hung = [_Hung(head, place)]
    if teacher is not None:
        # A copy: building a second head would restart the noise.
        hung.append(_Hung(copy.deepcopy(head).requires_grad_(False), place))
        hung[1].hang(teacher, host)
    hung[0].hang(student, host)
    return Attached(head, student, teacher, hung)


@dataclass(eq=False)
class _Hung:
    """A head that hangs on a module; the hooks are methods, so a copied module has a copied head.

    This object must not refer to the module: only the garbage collector would free that cycle.
    """

    head: GaussianHead
    place: Place

    def __post_init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._inside = False

    def hang(self, module: nn.Module, path: str) -> None:
        host = module.get_submodule(path)
        if hasattr(host, NAME):
            raise ValueError(
                f"{NAME!r} is what the head is called in its place, and {type(host).__name__} has "
                "an attribute of that name: rename yours."
            )
        self.head.train(module.training)
        host.add_module(NAME, self.head)
        # First in the order of hooks, so that those of the user see the sample.
        self._handles = [
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        ]
        if not self.place.before:
            self._handles.append(self._hook(module.get_submodule(self.place.path)))
        if self.place.is_shared:
            self._handles.append(
                module.register_forward_hook(self._leave, prepend=True, always_call=True)
            )

    def remove(self, module: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for part in module.modules():
            if dict(part.named_children()).get(NAME) is self.head:
                delattr(part, NAME)

    def _hook(self, part: nn.Module) -> RemovableHandle:
        return part.register_forward_hook(self._sample_output, prepend=True)

    def _enter(self, module: nn.Module, args: _Args, kwargs: _Kwargs) -> _Inputs | None:
        if self.place.is_shared:
            self._inside = True
        # The mode is the module's: a dropout that hosts the head may be in another one.
        if not module.training and self.head.training and not torch.compiler.is_compiling():
            self.head.eval()
        # Not the head's mode: train() no longer reaches a head that was lost.
        trains = module.training and torch.is_grad_enabled()
        # A replica has the original's hooks but layers of its own; `_sampled` refuses replicas.
        if trains and not torch.compiler.is_compiling() and not is_replica(module):
            self._check(module)
        return self._sample_input(module, args, kwargs) if self.place.before else None

    def _leave(self, module: nn.Module, args: _Args, output: object) -> None:
        self._inside = False

    def _sample_output(self, part: nn.Module, args: _Args, output: Tensor) -> Tensor:
        # Other modules use the part unsampled; a backward pass may run the part alone again.
        if self.place.is_shared and not self._inside and backward_pass() is None:
            return output
        return self._sampled(part, output)

    def _sample_input(self, module: nn.Module, args: _Args, kwargs: _Kwargs) -> _Inputs:
        if args:
            return (self._sampled(module, args[0]), *args[1:]), kwargs
        if len(kwargs) != 1:
            raise TypeError(
                f"{type(module).__name__} must be given its embedding as the first positional "
                f"argument, because CLIMB samples it; got {', '.join(kwargs) or 'none'}."
            )
        ((name, embedding),) = kwargs.items()
        return args, {name: self._sampled(module, embedding)}

    def _sampled(self, module: nn.Module, embedding: Tensor) -> Tensor:
        # A replica's hooks are the original's, whose head is on another device.
        if is_replica(module):
            if not self.head.training:
                return embedding
            raise RuntimeError(
                "CLIMB cannot train in nn.DataParallel, which runs copies of the model that last "
                "for one forward. Train on one GPU, or use DistributedDataParallel."
            )
        flat = embedding.flatten(1) if self._is_flattened_within(embedding) else embedding
        sample: Tensor = self.head(flat)
        return sample if flat is embedding else sample.reshape(embedding.shape)

    def _is_flattened_within(self, embedding: object) -> bool:
        """Whether a module that begins by flattening was given a pooling layer's output."""
        width = self.head.in_features
        return (
            self.place.before
            and isinstance(embedding, Tensor)
            and embedding.ndim > 2
            and embedding.shape[-1] != width == math.prod(embedding.shape[1:])
        )

    def _check(self, module: nn.Module) -> None:
        """Raises if the layer that holds the head, or the sampled one, has been replaced.

        The head trains if the module does, whatever the layer that holds it does.
        """
        parts = module.modules()
        host = next((p for p in parts if any(c is self.head for c in p.children())), None)
        if host is None:
            raise RuntimeError(
                f"the layer of {type(module).__name__} that held the parameters of its "
                "GaussianHead was replaced or removed, so model.parameters() and checkpoints lack "
                "them: take CLIMB out before such a change (unwrap) and wrap the loss after it."
            )
        if not host.training:  # a dropout, say, that is kept in eval(): the module trains
            self.head.train()
        if self.place.before:
            return
        try:
            part = module.get_submodule(self.place.path)
        except AttributeError as error:
            raise RuntimeError(
                f"the layer {self.place.path!r} of {type(module).__name__}, whose output is "
                f"sampled, was replaced or removed ({error}): take CLIMB out before such a change "
                "(unwrap) and wrap the loss after it."
            ) from error
        if not has_hook(part, self._handles[1].id):
            # A conversion (synchronised batch norm, LoRA) replaced the layer: hook the new one.
            self._handles[1].remove()
            self._handles[1] = self._hook(part)


def _say_what_is_wide(head: GaussianHead, student: nn.Module) -> None:
    added, there = (sum(p.numel() for p in part.parameters()) for part in (head, student))
    if added > 1_000_000 and 4 * added > there:
        warn(
            f"CLIMB: the log-variance of this GaussianHead has {added:,} parameters, beside "
            f"{there:,} of the projection head. logvar='shared' has {head.out_features:,}: one "
            "for each dimension, the same for every image."
        )
