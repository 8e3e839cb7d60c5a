"""Puts a Gaussian head into a projection head that is already there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from climb_plugin.head import GaussianHead
from climb_plugin.objects import living
from climb_plugin.probe import Probe, end_of_projection, first_layer, input_width

NAME = "gaussian"
"""Name of the submodule that holds the head."""

PLACES = ("projection", "features")


@dataclass(frozen=True)
class Placement:
    """Where a head goes: behind a submodule of the student (and of its teacher), or before it.

    Attributes:
        student: The student's projection head.
        teacher: The teacher's, or None.
        path: Name of the submodule, as in ``named_modules()``.
        before: Whether the head acts on its input.
        width: Width of the embedding there.
    """

    student: nn.Module
    teacher: nn.Module | None
    path: str
    before: bool
    width: int

    def make_head(self, *, init_std: float) -> GaussianHead:
        """A head that fits, on the device and in the dtype of the student; not in place yet."""
        parameter = next(self.student.parameters())
        # Several heads of one model shall not draw the same noise. Biases start all alike.
        matrix = next((p for p in self.student.parameters() if p.ndim > 1), parameter)
        weights = matrix.detach().flatten()[:64].to("cpu", torch.float32)
        seed = torch.initial_seed() ^ zlib.crc32(weights.numpy().tobytes())
        head = GaussianHead(self.width, init_std=init_std, seed=seed)
        return head.to(parameter.device, parameter.dtype)

    def hang(self, head: GaussianHead) -> None:
        """Puts ``head`` into the student, and its twin into the teacher."""
        reference = next((p for p in self.student.parameters() if p.requires_grad), None)
        if reference is not None:
            _OptimizerWatch(reference, head)
        if self.teacher is not None:
            _hang(self.teacher.get_submodule(self.path), head.teacher(), before=self.before)
        _hang(self.student.get_submodule(self.path), head, before=self.before)


def attach(
    student: nn.Module,
    *,
    teacher: nn.Module | None = None,
    at: str = "projection",
    init_std: float = 0.1,
) -> GaussianHead:
    """Puts a Gaussian head into ``student`` in place, and its twin into ``teacher``.

    Call it before the optimiser is built: the head's parameters are new.

    Args:
        student: The projection head that is trained.
        teacher: Its EMA copy: same layout, no shared storage.
        at: ``"projection"``: at the end of the projection MLP, before an L2 normalisation or
            prototypes inside the head. ``"features"``: before the projection head.
        init_std: Standard deviation at the start, in units of the embedding.

    Returns:
        The student's head.

    Raises:
        TypeError: If student or teacher is no module.
        ValueError: If a head is there already, student and teacher differ in layout or share
            storage, or the place cannot be found.

    Examples:
        >>> projection = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> attach(projection).out_features
        4
        >>> [name for name, _ in projection.named_children()]
        ['0', '1', '2', 'gaussian']
    """
    placement = find_place(student, teacher=teacher, at=at)
    head = placement.make_head(init_std=init_std)
    placement.hang(head)
    return head


def find_place(
    student: nn.Module, *, teacher: nn.Module | None = None, at: str = "projection"
) -> Placement:
    """Finds where :func:`attach` puts its head, and changes nothing.

    The place is found by what the module does: it runs on a few random rows (in ``eval()``,
    without gradients, without touching torch's random numbers or its buffers). Where rescaling
    the output of a submodule leaves the result as it is, and changing its sign changes that of
    the result (up to a bias), an L2 normalisation follows, perhaps with prototypes, and the
    Gaussian belongs before it.

    Args:
        student: As in :func:`attach`.
        teacher: As in :func:`attach`.
        at: As in :func:`attach`.

    Raises:
        TypeError: As in :func:`attach`.
        ValueError: As in :func:`attach`.
    """
    if at not in PLACES:
        raise ValueError(f"at must be one of {', '.join(map(repr, PLACES))}, got {at!r}.")
    _check_module("student", student)
    if teacher is not None:
        _check_module("teacher", teacher)
        _check_pair(student, teacher)
    width = input_width(student)
    probe = Probe(student, width)
    if at == "features":
        path, before = first_layer(student), True
    else:
        path, before, width = end_of_projection(probe)
    if hasattr(student.get_submodule(path), NAME):
        raise ValueError(
            f"{NAME!r} is what the head is called in its place, and {path or 'student'} has an "
            "attribute of that name: rename yours."
        )
    return Placement(student, teacher, path, before, width)


def _check_module(role: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{role} must be a torch module, got {type(module).__name__}.")
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(module, parallel) or hasattr(module, "_orig_mod"):  # torch.compile's
        raise ValueError(
            f"{role} is wrapped in {type(module).__name__}, which would not see the new "
            "parameters: wrap the loss first, then the model."
        )
    if any(isinstance(part, GaussianHead) for part in module.modules()):
        raise ValueError(
            f"{role} holds a GaussianHead already, so it was wrapped before: keep the criterion "
            "of the first call, or build the model anew."
        )


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    storages = {t.untyped_storage().data_ptr(): name for name, t in _named_tensors(student)}
    for name, tensor in _named_tensors(teacher):
        address = tensor.untyped_storage().data_ptr()
        if address and address in storages:
            raise ValueError(
                f"student and teacher share storage ({storages[address]} and {name}), so the "
                "teacher would move with the student: build a second projection head and "
                "teacher.load_state_dict(student.state_dict())."
            )
    layouts = [
        [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        for module in (student, teacher)
    ]
    if layouts[0] != layouts[1]:
        only_student = [entry for entry in layouts[0] if entry not in layouts[1]]
        only_teacher = [entry for entry in layouts[1] if entry not in layouts[0]]
        raise ValueError(
            "student and teacher must have the same parameters in the same order, because "
            f"momentum updates pair them one to one; only the student has {only_student}, only "
            f"the teacher has {only_teacher}. Build both with the same arguments."
        )


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _hang(module: nn.Module, head: GaussianHead, *, before: bool) -> None:
    module.add_module(NAME, head)
    if before:
        module.register_forward_pre_hook(_sample_input)
    elif not isinstance(module, nn.Sequential):  # which runs its last child by itself
        module.register_forward_hook(_sample_output)


def _sample_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    sample: Tensor = module.get_submodule(NAME)(output)
    return sample


def _sample_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args:
        raise TypeError(
            f"{type(module).__name__} must be given its embedding as the first positional "
            "argument: CLIMB samples it."
        )
    return module.get_submodule(NAME)(args[0]), *args[1:]


class _OptimizerWatch:
    """Raises if the student is moved while no optimiser holds the head that was put into it.

    Versions tell what was moved. That the head was not says little: its optimiser may be another
    one, which steps less often. So the optimisers are looked for, once, when only the student
    was moved. One that holds the head and never steps is not told from one that will.
    """

    def __init__(self, reference: nn.Parameter, head: GaussianHead) -> None:
        self._parameters = (reference, head.logvar.bias)
        self._versions: tuple[int, ...] | None = None
        self._handle: RemovableHandle | None = None
        self._watched = head.before_draw
        # Not a forward hook, which torch.compile would have to trace.
        self._watched.append(self)
        # A checkpoint of the plain model moves the projection head alone, and rightly so.
        head.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            self._start_anew
        )

    def __call__(self) -> None:
        bias = self._parameters[1]
        if not bias.requires_grad:  # frozen by the user
            self._versions = None
            return
        if self._handle is None:
            self._handle = bias.register_hook(self._after_backward)
        if self._versions is None:
            return
        moved, moved_head = (
            parameter._version != version
            for parameter, version in zip(self._parameters, self._versions, strict=True)
        )
        if not moved and not moved_head:
            return
        if not moved_head and not _is_held(bias):
            raise RuntimeError(
                "the optimiser updates the projection head but not the GaussianHead in it, and no "
                "other one holds that: build the optimiser after the loss was wrapped, so that "
                "model.parameters() holds the new parameters, or freeze the GaussianHead with "
                "requires_grad_(False)."
            )
        self._handle.remove()
        self._watched.remove(self)

    def _after_backward(self, gradient: Tensor) -> None:
        self._versions = tuple(parameter._version for parameter in self._parameters)

    def _start_anew(self, *_: object) -> None:
        self._versions = None

    def __getstate__(self) -> dict[str, Any]:
        # The versions of a copy start anew, and a copied parameter has no hooks.
        return {**self.__dict__, "_versions": None, "_handle": None}


def _is_held(parameter: nn.Parameter) -> bool:
    """Whether an optimiser of this process, whichever it is, was given ``parameter``."""
    return any(
        parameter is held
        for optimizer in living(lambda kind: torch.optim.Optimizer in kind.__mro__)
        for group in getattr(optimizer, "param_groups", ())  # it may be half built
        for held in group["params"]
    )
