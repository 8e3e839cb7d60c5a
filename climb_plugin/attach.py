"""Puts a Gaussian head into a projection head that is already there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from climb_plugin.graph import eager
from climb_plugin.head import GaussianHead, TeacherHead

NAME = "gaussian"
"""Name of the submodule that holds the head."""

PLACES = ("projection", "features")

# Far below 1, so that a normalisation with an epsilon inside a hidden layer (LayerNorm) is told
# from an L2 normalisation of the embedding; a power of two, so that the latter is exact.
_PROBE_SCALE = 2.0**-10


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
        # Several heads of one model shall not draw the same noise.
        weights = parameter.detach().flatten()[:64].to("cpu", torch.float32)
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

    The place is found by what the module does: it runs on two random rows (in ``eval()``,
    without gradients, without touching torch's random numbers). Where rescaling the output of a
    submodule leaves the result as it is, an L2 normalisation follows, and the Gaussian belongs
    before it.

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
    for role, module in (("student", student), ("teacher", teacher)):
        if module is not None:
            _check_module(role, module)
    if teacher is not None:
        _check_pair(student, teacher)
    width = _input_width(student)
    if at == "features":
        path, before = _first_layer(student), True
    else:
        path, before, width = _end_of_projection(student, width)
    return Placement(student, teacher, path, before, width)


def _check_module(role: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{role} must be a torch module, got {type(module).__name__}.")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{role} is wrapped in DistributedDataParallel, which would not see the new "
            "parameters: wrap the loss first, then the model."
        )
    if any(isinstance(part, GaussianHead) for part in module.modules()):
        raise ValueError(
            f"{role} holds a GaussianHead already, so it was wrapped before: keep the criterion "
            "of the first call, or build the model anew."
        )


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    storages = {p.untyped_storage().data_ptr(): name for name, p in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        address = parameter.untyped_storage().data_ptr()
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


def _input_width(module: nn.Module) -> int:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if part.in_features:
                return part.in_features
            raise ValueError("the projection head is lazy: run one batch through the model first.")
    raise ValueError(
        f"no linear layer tells the width of {type(module).__name__}: put a GaussianHead(width) "
        "into your module where its embedding is, and use ClimbLoss(loss, heads=...)."
    )


def _first_layer(module: nn.Module) -> str:
    """Path of what first sees the input; a Sequential itself cannot hold a head before it."""
    path: list[str] = []
    while isinstance(module, nn.Sequential) and len(module):
        name, module = next(iter(module.named_children()))
        path.append(name)
    return ".".join(path)


def _end_of_projection(module: nn.Module, input_width: int) -> tuple[str, bool, int]:
    """(path, before, width) of the end of the projection MLP."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        raise ValueError("the projection head is on the meta device: materialise it first.")
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    rows = torch.randn(2, input_width, generator=torch.Generator().manual_seed(0))
    rows = rows.to(parameter.device, wide)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), _widened(module):
            output, widths = _probe(module, rows)
            # Of those that a normalisation follows, the last: what comes after it is the head's.
            for path in reversed(widths):
                if torch.equal(_probe(module, rows, scaled=path)[0], output):
                    return path, False, widths[path]
            if torch.equal(_probe(module, rows * _PROBE_SCALE)[0], output):
                return _first_layer(module), True, input_width
            return "", False, output.shape[-1]
    finally:
        for part, mode in modes.items():
            part.training = mode


def _probe(
    module: nn.Module, rows: Tensor, *, scaled: str | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Runs ``module``; returns its output and the widths of its parts, in order of completion."""
    widths: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: object, output: object) -> object:
            if not isinstance(output, Tensor) or output.ndim != 2:
                return None
            widths[path] = output.shape[-1]
            return output * _PROBE_SCALE if path == scaled else None

        return hook

    parts = [(path, part) for path, part in module.named_modules() if path]
    handles = [part.register_forward_hook(watch(path)) for path, part in parts]
    try:
        output = module(rows)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} could not be run on a batch of shape {tuple(rows.shape)} to "
            f"find where its embedding is ({error}): put a GaussianHead(width) into it yourself, "
            "and use ClimbLoss(loss, heads=...)."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor) or output.ndim != 2:
        received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{type(module).__name__} must map (B, {rows.shape[-1]}) to (B, D), it returned "
            f"{received}: put a GaussianHead(width) into it yourself, and use "
            "ClimbLoss(loss, heads=...)."
        )
    return output, widths


@contextmanager
def _widened(module: nn.Module) -> Iterator[None]:
    """Half precision as float32 for a while: it would blur what the probe tells apart."""
    halves = [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    originals = [tensor.data for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, original in zip(halves, originals, strict=True):
            tensor.data = original


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
    """Raises if the optimiser moves the student but not the head that was put into it."""

    def __init__(self, reference: nn.Parameter, head: GaussianHead) -> None:
        self._parameters = (reference, head.logvar.bias)
        self._versions: tuple[int, ...] | None = None
        self._handle = head.register_forward_hook(self)

    @eager
    def __call__(self, head: GaussianHead, args: tuple[Any, ...], output: Tensor) -> None:
        if self._versions is None:
            if output.requires_grad:
                output.register_hook(self._after_backward)
            return
        moved, moved_head = (
            parameter._version != version
            for parameter, version in zip(self._parameters, self._versions, strict=True)
        )
        if moved and not moved_head:
            raise RuntimeError(
                "the optimiser updates the projection head but not the GaussianHead in it: build "
                "the optimiser after the loss was wrapped, so that model.parameters() holds the "
                "new parameters."
            )
        if moved:
            self._handle.remove()

    def _after_backward(self, gradient: Tensor) -> None:
        self._versions = tuple(parameter._version for parameter in self._parameters)

    def __getstate__(self) -> dict[str, Any]:
        # The versions of a copy start anew.
        return {**self.__dict__, "_versions": None}


__all__ = ["PLACES", "Placement", "TeacherHead", "attach", "find_place"]
