"""Counts the optimiser steps of a loss, and notices parameters that no optimiser holds.

A hook of torch reports each step of any torch optimiser. A step counts if the loss was called since
the last step that counted: so several optimisers of one iteration, the closures of LBFGS, the two
passes of SAM and gradient accumulation are one step each. Optimisers that are none of torch's, or
move copies of the parameters, are not seen; then backward passes count.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from climb_plugin._graph.walk import leaves_behind
from climb_plugin._run.idle import Idle
from climb_plugin._run.living import living
from climb_plugin.checks import warn
from climb_plugin.head import GaussianHead, outside_compiled_code

_all: WeakSet[Steps] = WeakSet()


class Steps:
    """The optimiser steps of one loss; an optimiser should hold its heads and its priors.

    ``students`` are the modules on which heads were hung; other heads were put in by hand.
    """

    def __init__(
        self, heads: Sequence[GaussianHead], priors: nn.Module, students: Sequence[nn.Module]
    ) -> None:
        self._start(tuple(heads), priors, tuple(students), 0)

    def _start(
        self,
        heads: tuple[GaussianHead, ...],
        priors: nn.Module,
        students: tuple[nn.Module, ...],
        steps: int,
        is_set: bool = False,
    ) -> None:
        self._heads, self._priors, self._students, self._steps = heads, priors, students, steps
        self._was_set = is_set
        self.is_set = is_set  # Whether somebody has set the count since the last step.
        self._fresh = False  # Whether the loss was called since the last step that counted.
        self._calls = 0  # Of the loss, in training.
        self._skipped: Tensor | None = None
        self._counting: ReferenceType[Optimizer] | None = None
        self._was_held = False  # Whether an optimiser that holds a head has stepped.
        # The calls before the last step of each optimiser, and those that were looked at.
        self._seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._checked: WeakSet[Optimizer] = WeakSet()
        self._idle = Idle(heads, students)
        self._passes = 0  # Backward passes since, which may count as steps.
        self._passed = False  # Whether the last call of the loss had one.
        self._looked = False
        # Ids of what is before the heads; references would keep users from swapping tensors.
        self._leaves: set[int] | None = None
        _register()
        _all.add(self)

    @property
    def count(self) -> int:
        """The optimiser steps so far."""
        if self._skipped is not None:
            # Not counted if the scaler skipped the step. Read late: that waits for the device.
            self._steps -= int(bool(self._skipped))
            self._skipped = None
        if self._passes:
            self._settle()
        return self._steps

    def _settle(self) -> None:
        """Decides whether backward passes without an optimiser step are steps, or accumulation.

        Called only when the count is asked for, as the search for optimisers takes a while.
        """
        if not self._looked:
            self._looked = True
            self._counting = self._find(_ids(self._parameters()), self._before())
        if self._counting is None:
            self._steps += self._passes
            self._fresh = False
        self._passes = 0

    def set_to(self, step: int) -> None:
        """Says where the count stands; optimiser steps go on from there.

        Backward passes count no more: a loop that no hook sees may set every step by itself.
        """
        self.restore(step)
        self._was_set = self.is_set = True

    def restore(self, step: int) -> None:
        """Goes on from a saved count, be that of optimiser steps or of backward passes."""
        self._steps, self._skipped, self._passes, self.is_set = step, None, 0, False

    def loss_called(self, penalty: Tensor | None) -> None:
        """Notes a call that trains, by the penalty, behind which are the heads and all before."""
        self._fresh, self._passed = True, False
        self._calls += 1
        if self._leaves is None and penalty is not None:
            self._leaves = leaves_behind(penalty) - _ids(self._priors.parameters())

    def loss_seen(self, *, is_regularised: bool) -> None:
        """Notes a call of the loss with gradients enabled, and whether samples were behind it."""
        for one in list(_all):
            if not set(self._heads).isdisjoint(one._heads):
                one._idle.called(is_regularised=is_regularised)

    def backward_done(self) -> None:
        """Notes a backward pass, which counts as a step if no optimiser of torch is known."""
        if self._counting is None and self._fresh and not self._passed and not self._was_set:
            self._passed = True
            self._passes += 1

    def optimizer_stepped(self, optimizer: Optimizer) -> None:
        """Notes a step of any optimiser of the process.

        Raises a RuntimeError if the optimiser moves the projection head around a Gaussian head that
        no optimiser holds.
        """
        ids = _ids_in(optimizer)
        parameters = self._parameters()
        trained = _ids(p for p in parameters if p.requires_grad)
        is_due = self._is_due(optimizer)
        holds = bool(ids & _ids(parameters)) or (not trained and bool(ids & self._before()))
        if holds:
            self._counting = ref(optimizer)
            self._was_held = True
            self._passes = 0
            self._count(optimizer)
            self._idle.stepped()
        elif is_due and trained and ids & self._projection():
            self._check_held(trained)
        if is_due and optimizer not in self._checked:
            self._checked.add(optimizer)
            if holds:
                self._check_prior(ids)
            if len(self._students) > 1:
                self._check_each(ids)

    def stop(self) -> None:
        """Ends the count, once the heads have been taken off the model."""
        _all.discard(self)

    def _is_due(self, optimizer: Optimizer) -> bool:
        """Whether the loss was called between two steps of an optimiser, or before the first one.

        The first step of another stage may follow a call that is left of the stage before.
        """
        before = self._seen.get(optimizer, self._calls if self._was_held else 0)
        self._seen[optimizer] = self._calls
        return self._calls > before

    def _count(self, optimizer: Optimizer) -> None:
        if not self._fresh:
            return
        self._fresh = self.is_set = False
        self._steps = self.count + 1  # settles the step before
        found_inf = getattr(optimizer, "found_inf", None)  # of a scaler and a fused optimiser
        if isinstance(found_inf, Tensor):
            self._skipped = found_inf.detach().clone()

    def _check_held(self, trained: set[int]) -> None:
        holder = None if self._counting is None else self._counting()
        if holder is not None and _ids_in(holder) & trained:
            return
        found = self._find(trained)
        if found is not None:  # an optimiser that steps less often
            self._counting = found
        else:
            _say_that_none_holds_it()

    def _check_each(self, ids: set[int]) -> None:
        """Looks at each projection head that this optimiser moves, for the head that hangs on it.

        Which of the parameters are before which head is not known of heads put in by hand.
        """
        held = Counter(id(p) for student in self._students for p in set(student.parameters()))
        for student in self._students:
            # Not of a trunk that several share.
            there = {one for one in _ids(student.parameters()) if held[one] == 1}
            for head in self._heads:
                own = _ids(p for p in head.parameters() if p.requires_grad)
                is_moved = bool(own) and own <= there and bool(ids & (there - own))
                if is_moved and not ids & own and self._find(own) is None:
                    _say_that_none_holds_it()

    def _check_prior(self, ids: set[int]) -> None:
        learned = _ids(p for p in self._priors.parameters() if p.requires_grad)
        if learned and not ids & learned and self._find(learned) is None:
            warn(
                "the prior is learned, its parameters belong to the loss, and no optimiser holds "
                "them, so they stay as they are: add list(loss.parameters()) to the optimiser."
            )

    def _find(self, *wanted: set[int]) -> ReferenceType[Optimizer] | None:
        """An optimiser that holds one of these tensors; earlier arguments go first."""
        optimizers = [(one, _ids_in(one)) for one in living(lambda k: issubclass(k, Optimizer))]
        for sought in wanted:
            for optimizer, ids in optimizers:
                if ids & sought:
                    return ref(optimizer)
        return None

    def _parameters(self) -> list[nn.Parameter]:
        return [p for head in self._heads for p in head.parameters()]

    def _before(self) -> set[int]:
        """The ids of the parameters behind the samples, and of the projection heads."""
        return (self._hung() | (self._leaves or set())) - _ids(self._parameters())

    def _projection(self) -> set[int]:
        """The ids of the projection heads' parameters; of all before a head put in by hand."""
        is_by_hand = len(self._students) < len(self._heads)
        return self._before() if is_by_hand else self._hung() - _ids(self._parameters())

    def _hung(self) -> set[int]:
        return _ids(p for student in self._students for p in student.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {
            "heads": self._heads,
            "priors": self._priors,
            "students": self._students,
            "steps": self.count,
            "is_set": self.is_set,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(**state)


def _say_that_none_holds_it() -> None:
    if not gc.get_freeze_count():  # the collector does not list frozen objects
        raise RuntimeError(
            "the optimiser moves the projection head but not the GaussianHead in it, and no other "
            "optimiser holds that: build the optimiser after the loss was wrapped, so that "
            "model.parameters() holds the new parameters (groups that are made by kinds of layer "
            "need one for the GaussianHead's), or freeze the GaussianHead with "
            "requires_grad_(False)."
        )


def _ids(tensors: Iterable[Tensor]) -> set[int]:
    return {id(tensor) for tensor in tensors}


def _ids_in(optimizer: Optimizer) -> set[int]:
    # A half-built optimiser has no groups yet.
    groups = getattr(optimizer, "param_groups", ())
    return {id(parameter) for group in groups for parameter in group["params"]}


@cache
def _register() -> None:
    # Outside of compiled code: a compiled step would trace this hook.
    register_optimizer_step_post_hook(
        lambda optimizer, *_: outside_compiled_code(_after_step, optimizer)
    )


def _after_step(optimizer: Optimizer) -> None:
    for steps in list(_all):
        steps.optimizer_stepped(optimizer)
