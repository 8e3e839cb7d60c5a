"""What the processes of test_distributed.py do; run as a script: FOLDER WORLD."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin import wrap as wrap_loss
from climb_plugin.schedule import Linear, Schedule, TargetRate

BETA, ALPHA, LR = 0.1, 0.5, 0.1
TARGET = 8.0  # nats, near the rate of the first steps
STEPS = 5
PRIORS = ("standard", "learned", "view")
SIZES = ("even", "uneven", "weighted")
WRAPS = ("apart", "unused", "static", "checkpoint")
SHARDED = ("root", "head", "layers")


class Net(nn.Module):
    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4) if plain else GaussianHead(6, 4)
        self.checkpointed = False

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.project(self.first(view).tanh()) for view in views]

    def project(self, embedding: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.head, embedding, use_reentrant=False)
        return self.head(embedding)


class Step(nn.Module):
    """Model and loss in one module: what DDP wraps so that a learned prior is averaged too."""

    def __init__(self, net: Net, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *views: Tensor) -> Tensor:
        return self.loss(*self.net(*views))


def base(one: Tensor, two: Tensor) -> Tensor:
    """A mean over samples: only such losses have the gradient of the whole batch on ranks."""
    return (one - two).square().sum(-1).mean() + one.tanh().sum(-1).mean()


def build(prior: str = "standard", beta: float | Schedule = BETA, *, seed: int = 0) -> Step:
    torch.manual_seed(seed)
    net = Net()
    loss = ClimbLoss(base, heads=net.head, beta=beta, alpha=ALPHA, prior=prior)
    step = Step(net, loss).double()
    with torch.no_grad():
        # At the start of head and prior some gradients would be zero.
        for parameter in step.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.head.load_state_dict(net.head.state_dict())  # so that it takes these for intended
    return step


def rows(world: int, uneven: bool) -> list[int]:
    """The batch size of every rank."""
    return [6 - rank if uneven else 4 for rank in range(world)]


def views(world: int, batch: int, *, uneven: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Two views of a batch, split over the ranks."""
    generator = torch.Generator().manual_seed(batch)
    sizes = rows(world, uneven)
    one, two = torch.randn(2, sum(sizes), 6, generator=generator, dtype=torch.float64)
    return list(zip(one.split(sizes), two.split(sizes), strict=True))


def record(head: nn.Module) -> list[Tensor]:
    """Filled with every sample that is drawn from now on."""
    samples: list[Tensor] = []
    head.register_forward_hook(lambda module, inputs, sample: samples.append(sample.detach()))
    return samples


def grads(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return {name: gradient.clone() for name, gradient in found.items()}


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def gradients(
    rank: int, world: int, prior: str, batches: int, uneven: bool, weighted: bool, wrap: str = ""
) -> dict[str, Any]:
    """The gradients of one optimiser step."""
    step = build(prior)
    step.net.checkpointed = wrap == "checkpoint"
    options = {
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
    }
    if wrap in ("apart", "outside"):
        net: nn.Module = DistributedDataParallel(step.net)
        loss = DistributedDataParallel(step.loss) if wrap == "apart" else step.loss
        model: Any = lambda *both: loss(*net(*both))  # noqa: E731
    else:
        model = DistributedDataParallel(step, **options.get(wrap, {}))
    sizes = rows(world, uneven)
    weight = sizes[rank] * world / sum(sizes) if weighted else 1.0
    samples = record(step.net.head)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.4's reentrant checkpoints
        for batch in range(batches):
            last = batch == batches - 1
            with nullcontext() if last else model.no_sync():
                mine = views(world, batch, uneven=uneven)[rank]
                (model(*mine) * weight / batches).backward()
    return {
        "gradients": grads(step),
        "samples": samples,
        "said": [str(warning.message) for warning in said],
    }


def accumulation(rank: int, world: int) -> dict[str, Any]:
    """Three optimiser steps of two batches each, under a ramp."""
    step = build(beta=Linear(BETA, warmup=4))
    model = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    betas = []
    for done in range(3):
        for batch in range(2):
            with nullcontext() if batch else model.no_sync():
                (model(*views(world, 2 * done + batch)[rank]) / 2).backward()
            betas.append(float(step.loss.terms.beta))
        optimizer.step()
        optimizer.zero_grad()
    return {"betas": betas, "parameters": values(step)}


def wrapped_late(rank: int, world: int) -> tuple[str, dict[str, Any]]:
    """What is said of a loss that is wrapped behind DDP, and the gradients with a second DDP."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    early = DistributedDataParallel(net)
    loss = wrap_loss(base, student=net, beta=BETA)
    said = ""
    try:
        loss(early(torch.ones(4, 6)), early(torch.ones(4, 6)))
    except RuntimeError as error:
        said = str(error)
    # The first one is still there, and another one averages the head.
    late = DistributedDataParallel(net)
    loss(late(torch.randn(4, 6)), late(torch.randn(4, 6))).backward()
    return said, grads(net)


def joined(rank: int, world: int) -> dict[str, Any]:
    """Every rank has one batch fewer than the one before."""
    step = build("learned")
    model = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    samples = record(step.net.head)
    with model.join():
        for batch in range(world - rank):
            model(*views(world, batch)[rank]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"samples": samples, "parameters": values(step)}


def joined_target(rank: int, world: int) -> str:
    step = build(beta=TargetRate(TARGET, beta=BETA))
    model = DistributedDataParallel(step)
    try:
        with model.join():
            model(*views(world, 0)[rank])
    except RuntimeError as error:
        return str(error)
    return ""


def collectives(rank: int, world: int, prior: str, target: bool) -> list[str]:
    """The names of all collectives of one step; of the loss without CLIMB if there is no prior."""
    if prior:
        step = build(prior, TargetRate(TARGET, beta=BETA) if target else BETA)
    else:
        step = Step(Net(plain=True), base).double()
    model = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def train(batch: int) -> None:
        model(*views(world, batch)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()

    # DDP arranges its buckets anew after the first steps.
    for batch in range(3):
        train(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(3)
    return sorted(event.name for event in profile.events() if event.name.startswith("c10d::"))


def look_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """Rank 0 looks at the loss of a validation batch in train(), which the others do not."""
    step = build(beta=TargetRate(TARGET, beta=BETA))
    model = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in range(STEPS):
        if rank == 0:
            with torch.no_grad():
                seen = step.net(*views(world, batch)[rank])
            step.loss(*seen)
        model(*views(world, batch)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"step": step.loss.step, "beta": float(step.loss.beta), "parameters": values(step)}


def target_rate(rank: int, world: int) -> dict[str, Any]:
    step = build(beta=TargetRate(TARGET, beta=BETA))
    model = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    terms = []
    for batch in range(STEPS):
        model(*views(world, batch)[rank]).backward()
        terms.append(step.loss.terms)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "rates": [float(term.rate) for term in terms],
        "betas": [float(term.beta) for term in terms],
        "parameters": values(step),
    }


class Selected(Step):
    """As of masked tokens: the head sees some rows of a batch, or none."""

    def forward(self, view: Tensor, chosen: Tensor) -> Tensor:
        return self.loss(self.net.project(self.net.first(view).tanh()[chosen]))


def empty_selection(rank: int, world: int, beta: float | Schedule) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    loss = ClimbLoss(lambda z: z.square().sum(), heads=net.head, beta=beta)
    model = DistributedDataParallel(Selected(net, loss).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    betas = []
    for batch in range(STEPS):
        view, _ = views(world, batch)[rank]
        # No row on rank 0 in every second step, nor on any rank in the last.
        some = (rank > 0 or batch % 2 == 1) and batch < STEPS - 1
        model(view, torch.full((len(view),), some)).backward()
        optimizer.step()
        optimizer.zero_grad()
        betas.append(float(loss.beta))
    return {"betas": betas, "step": loss.step, "parameters": values(model)}


def shard(step: Step, how: str, **options: Any) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    head = step.net.head
    units = {"root": [], "head": [head], "layers": [head.mean, head.logvar, step.net.first]}
    for unit in units[how]:
        fully_shard(unit, **options)
    fully_shard(step, **options)
    return step


def fsdp_gradients(rank: int, world: int, how: str, prior: str) -> dict[str, Any]:
    step = shard(build(prior), how)
    samples = record(step.net.head)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step(*views(world, 0)[rank]).backward()
    return {
        "gradients": grads(step),
        "samples": samples,
        "said": [str(warning.message) for warning in said],
    }


def fsdp_bfloat16(rank: int, world: int, how: str) -> dict[str, Any]:
    """Parameters in float32, computed with in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    step = shard(build().float(), how, mp_policy=policy)
    samples = record(step.net.head)
    step(*(view.float() for view in views(world, 0)[rank])).backward()
    return {
        "gradients": grads(step),
        "samples": samples,
        "dtypes": [samples[0].dtype, step.loss.terms.rate.dtype],
    }


def fsdp_training(rank: int, world: int, how: str, folder: str) -> dict[str, Any]:
    """Trains, saves twice over, trains on; loads each into another model and trains that on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    def make(seed: int) -> tuple[Step, torch.optim.Optimizer]:
        step = shard(build(beta=Linear(BETA, warmup=9), seed=seed), how)
        return step, torch.optim.SGD(step.parameters(), lr=LR, momentum=0.9)

    def train(step: Step, optimizer: torch.optim.Optimizer, *batches: int) -> list[float]:
        losses = []
        for batch in batches:
            loss = step(*views(world, batch)[rank])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def parts(step: Step, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model, optim = get_state_dict(step, optimizer)
        # The metadata of a state dict, where the schedule's step would be, is not saved.
        climb, random = step.loss.climb_state(), torch.get_rng_state()
        return {"model": model, "optim": optim, "climb": climb, "random": random}

    def resume(step: Step, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["random"])
        step.loss.load_climb_state(state["climb"])

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    step, optimizer = make(seed=0)
    first = train(step, optimizer, 0, 1, 2)
    saved = [parameter.full_tensor().detach().clone() for parameter in step.parameters()]
    state = parts(step, optimizer)
    dcp.save(state, checkpoint_id=f"{folder}/{how}")
    full = get_model_state_dict(step, options=whole)
    if rank == 0:
        torch.save(full, f"{folder}/{how}.pt")
    result: dict[str, Any] = {"saved": saved, "losses": first + train(step, optimizer, 3, 4)}

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, optimizer = make(seed=1)
        state = parts(step, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{how}")
        set_state_dict(
            step,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )
        resume(step, state)
        result["resumed"] = train(step, optimizer, 3, 4)

        dist.barrier()
        step, optimizer = make(seed=1)
        set_model_state_dict(step, torch.load(f"{folder}/{how}.pt"), options=whole)
        resume(step, state)
        result["from full"] = train(step, optimizer, 3)
    result["said"] = [str(warning.message) for warning in said]
    return result


def scenarios(rank: int, world: int, folder: str) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}

    def add(name: str, function: Callable[..., Any], *settings: Any, **options: Any) -> None:
        found[name] = lambda: function(rank, world, *settings, **options)

    for prior in PRIORS:
        for batches in (1, 2):
            for sizes in SIZES:
                uneven, weighted = sizes != "even", sizes == "weighted"
                name = f"{prior}, {batches}, {sizes}"
                add(name, gradients, prior, batches, uneven, weighted)
    add("accumulation", accumulation)
    add("target rate", target_rate)
    add("empty, ramp", empty_selection, Linear(BETA, warmup=STEPS))
    add("empty, target rate", empty_selection, TargetRate(TARGET, beta=BETA))
    for prior in ("", *PRIORS):
        add(f"collectives, {prior}", collectives, prior, False)
    add("collectives, target rate", collectives, "standard", True)
    for wrap in (*WRAPS, "outside"):
        add(wrap, gradients, "learned", 1, False, False, wrap)
    for how in SHARDED:
        for prior in PRIORS:
            add(f"fsdp {how}, {prior}", fsdp_gradients, how, prior)
        add(f"fsdp {how}, bfloat16", fsdp_bfloat16, how)
        add(f"fsdp {how}, training", fsdp_training, how, folder)
    add("join", joined)
    add("wrapped late", wrapped_late)
    add("look", look_on_one_rank)
    add("target rate in join", joined_target)
    return found


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    results: dict[str, Any] = {}
    for name, scenario in scenarios(rank, world, folder).items():
        try:
            results[name] = scenario()
        except Exception:
            # The other scenarios go on: one test fails, and says this.
            results[name] = traceback.format_exc()
        # Every time: where collectives do not match, gloo ends the process.
        torch.save(results, f"{folder}/{rank}.pt")
    os._exit(0)  # destroy_process_group() hangs at times with torch 2.4


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    torch.multiprocessing.start_processes(
        run, (int(sys.argv[2]), sys.argv[1]), nprocs=int(sys.argv[2]), start_method="fork"
    )
