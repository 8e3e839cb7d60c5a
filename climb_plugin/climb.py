"""Keeps CLIMB's own part of one criterion: settings, terms, step and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from climb_plugin._graph import noise
from climb_plugin._run.watch import Watch
from climb_plugin.checks import checked_number, checked_step, warn
from climb_plugin.distributed import beside, mean_over_ranks, world_size
from climb_plugin.head import GaussianHead
from climb_plugin.prior import prior_name
from climb_plugin.schedule import Schedule, as_schedule
from climb_plugin.schedule.base import beta_at
from climb_plugin.settings import Settings, is_off
from climb_plugin.state import StepRates, checked_state, copied
from climb_plugin.terms import ClimbTerms

if TYPE_CHECKING:
    from climb_plugin.attach import Attached


class Climb:
    """The bottleneck of one criterion, ``criterion.climb``.

    Attributes:
        attached: Those heads that :func:`~climb_plugin.attach.attach` hung on a module.
        observers: Functions that get the terms of every call of the loss, and whether a posterior
            was involved; for hosts that log. A copy of the criterion has none.
        watches: Whether infinite terms raise and collapses warn; False while a host searches.
        watch: The checks of the training.
    """

    def __init__(
        self,
        *,
        heads: tuple[GaussianHead, ...],
        attached: Sequence[Attached],
        settings: Settings,
        priors: nn.ModuleList,
        check_base: bool,
    ) -> None:
        self._heads = heads
        self.attached = tuple(attached)
        self._prior = prior_name(settings.prior)
        self._free_nats = settings.free_nats
        self.alpha = settings.alpha
        self._rates = StepRates()
        self.schedule = settings.schedule
        self.observers: list[Callable[[ClimbTerms, bool], None]] = []
        self.watches = True
        students = [item.student for item in attached]
        self.watch = Watch(heads, priors, students, prior=self._prior, check_base=check_base)
        self._terms: ClimbTerms | None = None

    @property
    def heads(self) -> tuple[GaussianHead, ...]:
        """The heads; they belong to the model."""
        return self._heads

    @property
    def prior(self) -> str:
        """Name of the prior."""
        return self._prior

    @property
    def free_nats(self) -> float:
        """Nats that cost nothing, per sample and head."""
        return self._free_nats

    @property
    def alpha(self) -> float:
        """Weight of the conditional entropy; can be set, to a finite number of 0 or more."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = checked_number("alpha", alpha)

    @property
    def schedule(self) -> Schedule:
        """Beta over the optimiser steps; can be set, to a number too.

        Raises:
            TypeError: If set to neither a number nor a schedule.
            ValueError: If out of range or without a head; if a target rate does not fit.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, beta: float | Schedule) -> None:
        schedule = as_schedule(beta)
        if not self.heads and not is_off(schedule):
            raise ValueError(
                f"beta={schedule!r} has nothing to act on: heads is empty. Pass the GaussianHead "
                "that is in the model."
            )
        if schedule is not self.__dict__.get("_schedule"):
            schedule.belong_to(self, free_nats=self.free_nats * len(self.heads))
            self._rates = StepRates()
        self._schedule = schedule

    def lay(self, total_steps: int | None) -> None:
        """Lays the schedule over a training: its ``over``, which may raise; the state is kept."""
        laid, rates = self.schedule.over(total_steps), self._rates
        if not isinstance(laid, Schedule):
            raise TypeError(f"over() of {self.schedule!r} must return a Schedule, got {laid!r}.")
        if laid is not self.schedule:
            laid.load_state(self.schedule.state())
            self.schedule, self._rates = laid, rates

    @property
    def terms(self) -> ClimbTerms:
        """The terms of the last call, detached; an AttributeError before the first."""
        if self._terms is None:
            raise AttributeError("there are no terms yet: call the loss first.")
        return self._terms

    def show(self, terms: ClimbTerms, *, is_regularised: bool) -> None:
        """Keeps the terms of a call, and passes them to the observers."""
        self._terms = terms
        for observer in self.observers:
            observer(terms, is_regularised)

    @property
    def beta(self) -> float:
        """The weight at this step; an AttributeError if that cannot be told. Can be set."""
        try:
            return float(self.weight())
        except ValueError as error:
            raise AttributeError(str(error)) from error

    @beta.setter
    def beta(self, beta: float | Schedule) -> None:
        self.schedule = beta

    def weight(self) -> float | Tensor:
        """As :attr:`beta`, without waiting for a device."""
        self._observe()
        return beta_at(self.schedule, self.step)

    def _observe(self) -> None:
        if seen := self._rates.take(self.step):  # the rate of a step that is over
            self.schedule.observe(*seen)

    @property
    def step(self) -> int:
        """The current optimiser step: the number of steps done."""
        return self.watch.steps.count

    def set_step(self, step: int) -> None:
        """Says where the count of optimiser steps stands, an int; the count goes on from there.

        Without an optimiser of torch's, backward passes count: then call this before each step.
        """
        self.watch.steps.set_to(checked_step(step))

    def begin(self) -> None:
        """Begins a training anew, or goes on where ``set_step`` said since the last step."""
        if not self.watch.steps.is_set:
            self.watch.steps.restore(0)
            self.schedule.belong_to(self, free_nats=self.free_nats * len(self.heads))
            self._rates = StepRates()

    def trains(self, value: Tensor, penalty: Tensor | None) -> None:
        """Notes a call that trains: the loss, and the penalty if there are posteriors."""
        if self._schedule.needs_rate and (penalty is not None or world_size() > 1):
            self._observe()
            # Averaged over the ranks at once: a checkpoint of one rank is then right for all.
            rate = self.terms.rate.detach()
            if penalty is None:  # on the base loss's device, which may be a zero of the CPU
                rate = beside(self.heads[0].logvar.bias, rate)
            self._rates.add(self.step, mean_over_ranks(rate.float()))
        self.watch.trains(value, penalty)

    def state(self) -> dict[str, Any]:
        """As :meth:`~climb_plugin.ClimbLoss.climb_state`."""
        state: dict[str, Any] = {"step": self.step, **self.config()}
        # The same keys at every step: sharded checkpoints load only keys of the present state.
        own = self.schedule.state()
        if own:
            state["schedule"] = {type(self.schedule).__name__: copied(own)}
        if self.schedule.needs_rate:
            state["rates"] = self._rates.state()
        state["noise"] = list(noise.position())
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """As :meth:`~climb_plugin.ClimbLoss.load_climb_state`."""
        config = self.config()
        step, position, rates, schedules = checked_state(state, config)
        own = schedules.get(type(self.schedule).__name__)
        if own is not None:
            self.schedule.load_state(own)
        if self.schedule.needs_rate:
            self._rates = rates
        noise.restore(position)
        self.watch.steps.restore(step)
        # Last, so that warnings which are errors leave nothing half loaded.
        for name, now in config.items():
            if state[name] != now:
                warn(
                    f"CLIMB's {name} was {state[name]} when this state was saved and is {now} "
                    "now: the run goes on with the latter."
                )
        if own is None and self.schedule.state():
            warn(
                f"what was loaded has no state of {self.schedule!r}: another schedule or an older "
                "version has saved it, and beta begins anew."
            )

    def config(self) -> dict[str, str]:
        """The settings, as a checkpoint compares them."""
        return {
            "beta": repr(self.schedule),
            "alpha": repr(self.alpha),
            "prior": self.prior,
            "free_nats": repr(self.free_nats),
        }

    def __getstate__(self) -> dict[str, Any]:
        # A host observes the original: terms of a copy would get into the original's log.
        return {**self.__dict__, "observers": [], "watches": True}
