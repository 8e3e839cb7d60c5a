"""Finds where the embedding of a projection head is, by running the head."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from climb_plugin._run.copied import YOURSELF, copied
from climb_plugin._run.living import are_elsewhere
from climb_plugin._torch import no_global_hooks
from climb_plugin.checks import checked_choice
from climb_plugin.gaussian import widened
from climb_plugin.settings import PLACES

_ROWS = 4
# So large that the epsilon of a normalisation does not show; the inverses are so small that those
# of LayerNorm and RMSNorm do. Each row has another factor: a batch norm in training would cancel a
# common one.
_FACTORS = 2.0 ** torch.tensor([[10.0], [11.0], [12.0], [13.0]], device="cpu")
_FLIP = torch.tensor(-1.0, device="cpu")
_TOLERANCE = 0.05
_EXACT = 0.002  # Great factors hide what is added behind a submodule, as a bias, all but this.


@dataclass(frozen=True)
class Place:
    """The place at which a head acts."""

    path: str  # of the submodule whose output is sampled; empty: the module itself
    before: bool  # whether the input of the module is sampled instead
    width: int  # of the embedding there
    is_shared: bool = False  # whether another module uses that submodule too


def find_place(module: nn.Module, *, at: str) -> Place:
    """Finds the place of a head in a projection head, and changes nothing.

    A copy of the module, without hooks, runs on a few random rows in training mode, without
    touching torch's random numbers. If rescaling the output of a submodule leaves the result
    unchanged, and flipping the sign of that output flips the sign of the result (up to a bias), an
    L2 normalisation follows, perhaps with prototypes, and the Gaussian belongs before that. Raises
    a ValueError if the place cannot be told, or nothing can go there.
    """
    checked_choice("at", at, PLACES)
    with _not_run(module):
        probe = _probe(module)
        if at == "features":
            return Place("", True, probe.rows.shape[-1])
        return _end_of_projection(probe, module)


def _end_of_projection(probe: _Probe, module: nn.Module) -> Place:
    name, output = type(module).__name__, probe.output
    if not _is_batch(output):
        received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{name} must map (B, {probe.rows.shape[-1]}) to (B, D), it returned {received}: "
            f"{YOURSELF}."
        )
    # The last one before a normalisation: an earlier one would leave layers between.
    for path in reversed(probe.widths):
        if probe.is_before_layer_norm(path):
            break
        if probe.is_before_normalisation(path):
            is_shared = are_elsewhere({module: module.get_submodule(path)}, but_slices=False)
            return Place(path, False, probe.widths[path], is_shared)
    if probe.is_before_normalisation(None):
        return Place("", True, probe.rows.shape[-1])
    if probe.ends_normalised():
        raise ValueError(
            f"{name} normalises its embedding, but the embedding is the output of none of its "
            "submodules, so nothing can go in between: pass it through an nn.Identity() of its "
            "own right before it is normalised."
        )
    end = probe.end_that_noise_would_leave()
    if end:
        raise ValueError(
            f"{name} ends in a {end}, and a sample would leave what that maps to: give the head "
            "up to the logits, and apply the rest to what it returns; or put a "
            "GaussianHead(width) before it yourself, and use ClimbLoss(loss, heads=...)."
        )
    return Place("", False, output.shape[-1])


def _probe(module: nn.Module) -> _Probe:
    """A run of the module on rows of the first width that works."""
    name = type(module).__name__
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError(f"{name} is lazy: run one batch through the model first.")
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"{name} is on the meta device: materialise it first.")
    widths = _input_widths(module)
    if not widths:
        raise ValueError(f"{name} has no layer that tells the width of its input: {YOURSELF}.")
    stand_in = copied(module, parameters=True)
    errors = []
    for width in widths:
        try:
            return _Probe(stand_in, width)
        except _OriginalRunsError:
            raise
        except Exception as error:  # a user's module may raise anything
            errors.append(f"({_ROWS}, {width}): {error}")
    heads = [name for name, child in module.named_children() if _input_widths(child)]
    hint = f", as in student=model.{heads[-1]}" if heads else ""
    raise ValueError(
        f"{name} could not be run on a batch of features to find where its embedding is. If it is "
        f"the whole encoder, pass its projection head{hint}. Otherwise {YOURSELF}. Tried, with "
        f"what came of it: {'; '.join(errors[:2])}"
    )


def _input_widths(module: nn.Module) -> list[int]:
    """The widths that a module might take, those of linear layers first, in their order."""
    layers = [part.in_features for part in module.modules() if isinstance(part, nn.Linear)]
    matrices = [p.shape[1] for p in module.parameters() if p.ndim == 2]
    vectors = [p.shape[0] for p in module.parameters() if p.ndim == 1]
    return list(dict.fromkeys([*layers, *matrices, *vectors]))


class _OriginalRunsError(ValueError):
    """A copy of a module has run a part of the module itself."""


@contextmanager
def _not_run(original: nn.Module) -> Iterator[None]:
    """Raises before a part of the original runs, whose hooks and statistics are not to be touched.

    Not by a hook of all modules: torch warns of these in compiled code.
    """

    def refuse(part: nn.Module, _: object) -> None:
        raise _OriginalRunsError(
            "a copy of the projection head is run to find where the embedding is, and the copy ran "
            f"a {type(part).__name__} of the original: some function holds the original, as after "
            "head.forward = torch.compile(head.forward). Wrap the loss before you set that."
        )

    with ExitStack() as stack:
        for part in original.modules():
            if isinstance(part, torch.jit.ScriptModule):  # takes no hook
                continue
            handle = part.register_forward_pre_hook(refuse, prepend=True)
            stack.callback(handle.remove)
        yield


class _Probe:
    """Runs copies of a module, which share its parameters, on a few random rows.

    ``widths`` are those of the outputs of submodules, in the order of their completion, but of
    submodules that ran more than once: a hook could not tell the runs apart.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        parameter = next(module.parameters())
        generator = torch.Generator(device="cpu").manual_seed(0)
        rows = torch.randn(_ROWS, width, generator=generator, device="cpu")
        self._module = module
        self.rows = rows.to(parameter.device, widened(parameter.flatten()[:0]).dtype)
        self.widths: dict[str, int] = {}
        self._unit_inputs: list[str] = []
        calls: Counter[str] = Counter()

        def watch(path: str, args: tuple[Any, ...], output: object) -> None:
            calls[path] += 1
            if _is_batch(output):
                self.widths[path] = output.shape[-1]
            if args and _is_batch(args[0]) and _is_unit(args[0]):
                self._unit_inputs.append(path)

        watched = copied(self._module, parameters=False)
        for name, part in watched.named_modules():
            if name:
                part.register_forward_hook(lambda _, *seen, path=name: watch(path, *seen))
        self.output = _run(watched, self.rows)
        self.widths = {path: n for path, n in self.widths.items() if calls[path] == 1}

    def is_before_normalisation(self, path: str | None) -> bool:
        """Whether an L2 normalisation and nothing but linear layers follow a submodule or input.

        At the input, a normalisation whose epsilon shows (RMSNorm) is none of the embedding.
        """
        return self._is_odd(path) and (
            self._is_close(self._rescaled(path, 1 / _FACTORS), self.output)
            or (path is not None and self._is_invariant(path))
        )

    def is_before_layer_norm(self, path: str) -> bool:
        """Whether the mean of a row is taken off too, so that a common offset is lost."""
        if not self._is_invariant(path) or self.ends_normalised():
            return False
        offset = self._changed(path, lambda rows: rows + 1 + 8 * rows.abs().amax())
        return self._is_close(offset, self.output)

    def _is_invariant(self, path: str) -> bool:
        return self._is_close(self._rescaled(path, _FACTORS), self.output, _EXACT)

    def ends_normalised(self) -> bool:
        """Whether the output is normalised, or linear in something that is."""
        return _is_unit(self.output) or any(
            self._is_odd(path, before=True) for path in self._unit_inputs
        )

    def end_that_noise_would_leave(self) -> str:
        """The name of a last function whose values are bound to a simplex or an interval."""
        rows = self.output
        if rows.shape[-1] > 1 and _is_one(rows.sum(dim=-1)) and bool((rows >= 0).all()):
            return "softmax (its rows are probabilities)"
        if rows.shape[-1] > 1 and _is_one(rows.exp().sum(dim=-1)):
            return "log-softmax (its rows are logarithms of probabilities)"
        if bool(((rows > 0) & (rows < 1)).all()) and any(
            map(self._saturates, reversed(self.widths))
        ):
            return "sigmoid (its entries are probabilities)"
        return ""

    def _saturates(self, path: str) -> bool:
        """Whether a great output of a submodule drives all entries to 0 or 1."""
        great = self._rescaled(path, _FACTORS)
        inside = bool(((great >= 0) & (great <= 1)).all())
        return inside and bool(torch.minimum(great, 1 - great).mean() < _TOLERANCE)

    def _is_odd(self, path: str | None, *, before: bool = False) -> bool:
        """Whether a change of sign changes the result in sign only, up to a bias."""
        total = self._rescaled(path, _FLIP, before=before) + self.output
        return self._is_close(total, total.mean(dim=0))

    def _is_close(self, one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
        spread = (self.output - self.output.mean(dim=0)).norm()
        return bool((one - other).norm() <= tolerance * spread)

    def _rescaled(self, path: str | None, factor: Tensor, *, before: bool = False) -> Any:
        """The result if the output (or the input) of a submodule is multiplied by a factor."""
        return self._changed(path, lambda rows: rows * factor.to(rows), before=before)

    def _changed(
        self, path: str | None, change: Callable[[Tensor], Tensor], *, before: bool = False
    ) -> Any:
        """The result if the output (or the input) of a submodule is changed; NaN if that raises."""
        module = copied(self._module, parameters=False)
        if path is None:
            return self._outcome(module, change(self.rows))
        part = module.get_submodule(path)
        if before:
            part.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        else:
            part.register_forward_hook(lambda _, args, output: change(output))
        return self._outcome(module, self.rows)

    def _outcome(self, module: nn.Module, rows: Tensor) -> Any:
        try:
            return _run(module, rows)
        except Exception:  # a user's module may refuse such values
            return torch.full_like(self.output, torch.nan)


def _run(module: nn.Module, rows: Tensor) -> Any:
    # Each run draws the same numbers, should the module draw any.
    forked = torch.random.fork_rng([rows.device] if rows.is_cuda else [])
    states = random.getstate(), np.random.get_state()
    try:
        with torch.no_grad(), forked, no_global_hooks():
            return module(rows)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _is_batch(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == _ROWS


def _is_one(values: Tensor) -> bool:
    return bool(((values - 1).abs() < 1e-3).all())


def _is_unit(rows: Tensor) -> bool:
    """Whether rows are L2-normalised; a row that a ReLU left without any entry stays 0."""
    norms = rows.norm(dim=-1)
    return bool(norms.any() and ((norms - norms.sign()).abs() < 1e-4).all())
