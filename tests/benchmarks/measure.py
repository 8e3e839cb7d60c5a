"""Time and memory of calls, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


class Clocks(NamedTuple):
    """Medians over the rounds, in seconds.

    Attributes:
        wall: What a watch shows.
        cpu: What the threads of this process worked: it does not count waiting for a core that
            somebody else uses.
    """

    wall: float
    cpu: float


def finished(call: Call, device: str) -> Call:
    """``call``, which returns once the device is done."""
    if device != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def alternate(
    benchmark: Any, calls: Mapping[str, Call], *, rounds: int, device: str
) -> dict[str, Clocks]:
    """Times the calls in turn, so that each meets the machine in the same mood.

    Args:
        benchmark: The fixture of pytest-benchmark; it times the first call, and the others
            before each of its rounds.
        calls: What is compared.
        rounds: How often each is timed, after one warm-up.
        device: Where they run.
    """
    ready = {name: finished(call, device) for name, call in calls.items()}
    walls: dict[str, list[float]] = {name: [] for name in ready}
    works: dict[str, list[float]] = {name: [] for name in ready}

    def timed(name: str) -> None:
        wall, work = time.perf_counter(), time.process_time()
        ready[name]()
        walls[name].append(time.perf_counter() - wall)
        works[name].append(time.process_time() - work)

    first, *others = ready

    def in_turn() -> None:
        others.append(others.pop(0))  # nobody always follows the same one
        for name in others:
            timed(name)

    for name in ready:  # compiles, fills caches; the second warm-up runs what the first made
        ready[name]()
    benchmark.pedantic(timed, args=(first,), setup=in_turn, rounds=rounds, warmup_rounds=1)
    medians = {
        name: Clocks(statistics.median(walls[name][1:]), statistics.median(works[name][1:]))
        for name in ready
    }
    benchmark.extra_info.update({name: clocks.wall for name, clocks in medians.items()})
    return medians


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that ``call`` held at a time, beyond what was held before it."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # The allocator's own events, in their order; there is no public view of them.
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
