"""Puts a Gaussian head into a projection head that is already there."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from climb_plugin.graph import eager
from climb_plugin.head import GaussianHead, TeacherHead

NAME = "gaussian"
"""Name of the submodule that holds the head."""

PLACES = ("projection", "features")

# Down to where the epsilon of a hidden LayerNorm shows, which an L2 normalisation survives; and
# up, where what merely does not contribute much would show.
_PROBE_FACTORS = (2.0**-10, 2.0**10)
_PROBE_TOLERANCE = 0.05


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

    The place is found by what the module does: it runs on two random rows (in ``eval()``,
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
    width = _input_width(student)
    probe = _Probe(student, width)
    if at == "features":
        path, before = _first_layer(student), True
    else:
        path, before, width = _end_of_projection(probe)
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
    """Path of what first sees the embedding; a Sequential cannot hold a head before it."""
    path: list[str] = []
    while isinstance(module, nn.Sequential) and len(module):
        parts = list(module.named_children())
        flat = [part for part in parts if not isinstance(part[1], nn.Flatten)]
        name, module = (flat or parts)[0]
        path.append(name)
    return ".".join(path)


def _end_of_projection(probe: _Probe) -> tuple[str, bool, int]:
    """(path, before, width) of the end of the projection MLP."""
    output = probe.output
    if not _is_batch(output):
        received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{type(probe.module).__name__} must map (B, {probe.rows.shape[-1]}) to (B, D), it "
            f"returned {received}: put a GaussianHead(width) into it yourself, and use "
            "ClimbLoss(loss, heads=...)."
        )
    # Of those that a normalisation follows, the last: what comes after it is the head's.
    for path in reversed(probe.widths):
        if probe.is_before_normalisation(path):
            return path, False, probe.widths[path]
    if probe.is_before_normalisation(None):
        return _first_layer(probe.module), True, probe.rows.shape[-1]
    if probe.ends_normalised():
        raise ValueError(
            f"{type(probe.module).__name__} normalises its embedding, but the embedding is the "
            "output of none of its submodules, so nothing can go in between: pass it through an "
            "nn.Identity() of its own right before it is normalised."
        )
    return "", False, output.shape[-1]


class _Probe:
    """What a module does with a few random rows, in ``eval()``; it is left as it was.

    Args:
        module: Maps (B, width) to (B, D).
        width: Width of its input.

    Attributes:
        output: Its output.
        widths: Widths of the outputs of its submodules, in the order of their completion. Those
            that ran more than once are left out: a hook could not tell the runs apart.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        parameter = next(module.parameters())
        if parameter.is_meta:
            raise ValueError("the projection head is on the meta device: materialise it first.")
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
        self.module = module
        self.rows = rows.to(parameter.device, wide)
        self.widths: dict[str, int] = {}
        self._unit_inputs: list[str] = []
        calls: Counter[str] = Counter()

        def watch(path: str, args: tuple[Any, ...], output: object) -> None:
            calls[path] += 1
            if _is_batch(output):
                self.widths[path] = output.shape[-1]
            if args and _is_batch(args[0]) and _is_unit(args[0]):
                self._unit_inputs.append(path)

        self.output = self._run(self.rows, watch=watch)
        self.widths = {path: n for path, n in self.widths.items() if calls[path] == 1}

    def is_before_normalisation(self, path: str | None) -> bool:
        """Whether an L2 normalisation and nothing but linear layers follow a submodule.

        Args:
            path: Name of the submodule; None: the input of the module.
        """
        return all(
            self._is_close(self._rescaled(path, factor), self.output) for factor in _PROBE_FACTORS
        ) and self._is_linear(self._rescaled(path, -1.0))

    def ends_normalised(self) -> bool:
        """Whether the output is normalised, or linear in something that is."""
        return _is_unit(self.output) or any(
            self._is_linear(self._rescaled(path, -1.0, before=True)) for path in self._unit_inputs
        )

    def _is_linear(self, flipped: Tensor) -> bool:
        """Whether a change of sign gave the same but for the sign, up to a bias."""
        total = flipped + self.output
        return self._is_close(total, total.mean(dim=0))

    def _is_close(self, one: Tensor, other: Tensor) -> bool:
        spread = (self.output - self.output.mean(dim=0)).norm()
        return bool((one - other).norm() <= _PROBE_TOLERANCE * spread)

    def _rescaled(self, path: str | None, factor: float, *, before: bool = False) -> Tensor:
        if path is None:
            output: Tensor = self._run(self.rows * factor)
            return output
        part = self.module.get_submodule(path)
        if before:
            handle = part.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:]))
        else:
            handle = part.register_forward_hook(lambda _, args, output: output * factor)
        try:
            output = self._run(self.rows)
        finally:
            handle.remove()
        return output

    def _run(self, rows: Tensor, *, watch: Callable[..., None] | None = None) -> Any:
        modes = {part: part.training for part in self.module.modules()}
        handles = [
            part.register_forward_hook(lambda _, *seen, path=path, do=watch: do(path, *seen))
            for path, part in self.module.named_modules()
            if path and watch is not None
        ]
        devices = [rows.device] if rows.is_cuda else []
        self.module.eval()
        try:
            # Each run draws the same numbers, should the module draw any.
            with torch.no_grad(), torch.random.fork_rng(devices):
                return torch.func.functional_call(self.module, self._state(), rows)
        except Exception as error:
            raise ValueError(
                f"{type(self.module).__name__} could not be run on a batch of shape "
                f"{tuple(rows.shape)} to find where its embedding is ({error}): put a "
                "GaussianHead(width) into it yourself, and use ClimbLoss(loss, heads=...)."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for part, mode in modes.items():
                part.training = mode

    def _state(self) -> dict[str, Tensor]:
        """Buffers as copies, and half precision as float32, which does not blur the outcome."""
        state: dict[str, Tensor] = dict(self.module.named_parameters())
        state.update((name, buffer.clone()) for name, buffer in self.module.named_buffers())
        halves = (torch.float16, torch.bfloat16)
        return {name: t.float() if t.dtype in halves else t for name, t in state.items()}


def _is_batch(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2


def _is_unit(rows: Tensor) -> bool:
    """Whether rows are L2-normalised; a row that a ReLU left without any entry stays 0."""
    norms = rows.norm(dim=-1)
    return bool(norms.any() and ((norms - norms.sign()).abs() < 1e-4).all())


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
        # A checkpoint of the plain model moves the projection head alone, and rightly so.
        head.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            self._start_anew
        )

    @eager
    def __call__(self, head: GaussianHead, args: tuple[Any, ...], output: Tensor) -> None:
        if not head.logvar.bias.requires_grad:  # frozen by the user
            return
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

    def _start_anew(self, *_: object) -> None:
        self._versions = None

    def __getstate__(self) -> dict[str, Any]:
        # The versions of a copy start anew.
        return {**self.__dict__, "_versions": None}


__all__ = ["PLACES", "Placement", "TeacherHead", "attach", "find_place"]
