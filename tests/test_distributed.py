"""Two and four real processes over gloo, seeded alike: what they get against one process."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import distributed_ranks as ranks
import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from climb_plugin.gaussian import bound_logvar
from climb_plugin.schedule import TargetRate

WORLDS = (2, 4)
fsdp = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch before 2.6 has no FSDP2"
)


class Ranks:
    """What the ranks of one world saw."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        self.folder = folder
        done = subprocess.run(
            [sys.executable, ranks.__file__, str(folder), str(world)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.said = done.stderr
        self.results = [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    def __getitem__(self, scenario: str) -> list[Any]:
        found = [result.get(scenario, f"Traceback: {self.said}") for result in self.results]
        for result in found:
            assert "Traceback" not in result, result
        return found


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(request.param, tmp_path_factory.mktemp(f"world{request.param}"))


def noise(step: Any, views: list[Tensor], samples: list[Tensor]) -> list[Tensor]:
    """The standard normal noise of the samples of one rank."""
    with torch.no_grad():
        posteriors = [step.net.head.posterior(step.net.first(view).tanh()) for view in views]
    return [
        (sample - mean) / (logvar / 2).exp()
        for sample, (mean, logvar) in zip(samples, posteriors, strict=True)
    ]


def objective(step: Any, prior: str, views: list[Tensor], drawn: list[Tensor]) -> Tensor:
    """The loss of two views, written down once more; ``drawn`` is the noise."""
    samples, posteriors = [], []
    for view, each in zip(views, drawn, strict=True):
        mean, logvar = step.net.head.posterior(step.net.first(view).tanh())
        samples.append(mean + (logvar / 2).exp() * each)
        posteriors.append(Normal(mean, (logvar / 2).exp()))
    if prior == "view":
        one, two = posteriors
        rates = [kl_divergence(one, two), kl_divergence(two, one)]
    else:
        against = Normal(torch.zeros(4).double(), torch.ones(4).double())
        if prior == "learned":
            learned = step.loss.climb_priors[0]
            against = Normal(learned.mean, (bound_logvar(learned.raw_logvar) / 2).exp())
        rates = [kl_divergence(posterior, against) for posterior in posteriors]
    rate = torch.stack([each.sum(-1) for each in rates]).mean()
    entropy = torch.stack([each.entropy().sum(-1) for each in posteriors]).mean()
    return ranks.base(*samples) + ranks.BETA * (rate + ranks.ALPHA * entropy)


def one_process(
    prior: str, samples: list[list[Tensor]], *, batches: int = 1, sizes: str = "even"
) -> dict[str, Tensor]:
    """The gradients of the same batches in one process, with the noise of all ranks.

    Of the whole batch, but for sizes 'uneven', where DDP averages the means of the ranks.
    """
    step = ranks.build(prior)
    for batch in range(batches):
        split = ranks.views(len(samples), batch, uneven=sizes != "even")
        drawn = [
            noise(step, views, seen[2 * batch : 2 * batch + 2])
            for views, seen in zip(split, samples, strict=True)
        ]
        if sizes == "uneven":
            means = [objective(step, prior, *rank) for rank in zip(split, drawn, strict=True)]
            value = torch.stack(means).mean()
        else:
            whole = [torch.cat(view) for view in zip(*split, strict=True)]
            value = objective(step, prior, whole, [torch.cat(n) for n in zip(*drawn, strict=True)])
        (value / batches).backward()
    found: dict[str, Tensor] = ranks.grads(step)
    return found


def assert_gradients(results: list[Any], expected: dict[str, Tensor]) -> None:
    for result in results:
        assert list(result["gradients"]) == list(expected)
        for name, gradient in result["gradients"].items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def assert_equal(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)


def samples(results: list[Any]) -> list[list[Tensor]]:
    return [result["samples"] for result in results]


@pytest.mark.parametrize("sizes", ranks.SIZES)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("prior", ranks.PRIORS)
def test_gradients_are_those_of_one_process(
    world: Ranks, prior: str, batches: int, sizes: str
) -> None:
    results = world[f"{prior}, {batches}, {sizes}"]
    expected = one_process(prior, samples(results), batches=batches, sizes=sizes)
    assert_gradients(results, expected)
    assert [result["said"] for result in results] == [[]] * world.world


def test_uneven_batches_need_weights_for_the_whole_batch(world: Ranks) -> None:
    results = world["standard, 1, uneven"]
    expected = one_process("standard", samples(results), sizes="weighted")
    with pytest.raises(AssertionError):
        assert_gradients(results, expected)


@pytest.mark.parametrize("prior", ranks.PRIORS)
def test_ranks_draw_different_noise(world: Ranks, prior: str) -> None:
    results = world[f"{prior}, 2, even"]
    step = ranks.build(prior)
    drawn = []
    for batch in range(2):
        for views, seen in zip(ranks.views(world.world, batch), samples(results), strict=True):
            drawn += noise(step, views, seen[2 * batch : 2 * batch + 2])
    assert len(drawn) == 4 * world.world
    assert 0.7 < float(torch.stack(drawn).std()) < 1.3
    for one, two in combinations(drawn, 2):
        assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("wrap", ranks.WRAPS)
def test_ways_to_wrap(world: Ranks, wrap: str) -> None:
    results = world[wrap]
    assert_gradients(results, one_process("learned", samples(results)))
    assert [result["said"] for result in results] == [[]] * world.world


def test_a_learned_prior_that_nothing_averages_is_warned_of(world: Ranks) -> None:
    results = world["outside"]
    expected = one_process("learned", samples(results))
    for result in results:
        (message,) = result["said"]
        assert "each rank trains a prior of its own" in message
        for name, gradient in result["gradients"].items():
            alike = torch.allclose(gradient, expected[name], rtol=0, atol=1e-12)
            assert alike == name.startswith("net."), name


def test_a_loss_that_is_wrapped_behind_ddp_is_refused(world: Ranks) -> None:
    """DDP averages the parameters that it was built with; a second one, built later, is right."""
    (said, first), *others = world["wrapped late"]
    assert "wrap the loss first, then the model" in said
    for _, gradients in others:
        assert gradients.keys() == first.keys()
        assert all(torch.equal(gradients[name], first[name]) for name in first)


def test_one_rank_may_look_at_the_loss(world: Ranks) -> None:
    first, *others = world["look"]
    assert first["step"] == ranks.STEPS
    for other in others:
        assert other["beta"] == first["beta"]
        assert all(map(torch.equal, other["parameters"], first["parameters"]))


def test_accumulation_under_a_ramp(world: Ranks) -> None:
    first, *others = world["accumulation"]
    steps = [0, 0, 1, 1, 2, 2]
    assert first["betas"] == pytest.approx([ranks.BETA * step / 4 for step in steps])
    start = ranks.values(ranks.build())
    for begun, ended in zip(start, first["parameters"], strict=True):
        assert (begun - ended).abs().max() > 1e-4
    for other in others:
        assert other["betas"] == first["betas"]
        assert_equal(other["parameters"], first["parameters"])


def test_join_with_fewer_batches_on_some_ranks(world: Ranks) -> None:
    results = world["join"]
    step = ranks.build("learned")
    optimizer = torch.optim.SGD(step.parameters(), lr=ranks.LR)
    for batch in range(world.world):
        # As DDP has it: the sum over the ranks that still train, over the number of all.
        values = []
        for rank in range(world.world - batch):
            views = ranks.views(world.world, batch)[rank]
            seen = results[rank]["samples"][2 * batch : 2 * batch + 2]
            values.append(objective(step, "learned", views, noise(step, views, seen)))
        (torch.stack(values).sum() / world.world).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank, result in enumerate(results):
        assert len(result["samples"]) == 2 * (world.world - rank)
        for one, two in zip(result["parameters"], step.parameters(), strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=0, atol=1e-12)


def test_a_target_rate_refuses_join(world: Ranks) -> None:
    for message in world["target rate in join"]:
        assert "DistributedDataParallel.join()" in message


def test_a_target_rate_is_that_of_all_ranks(world: Ranks) -> None:
    first, *others = results = world["target rate"]
    for other in others:
        assert other["rates"] != first["rates"]
        assert other["betas"] == first["betas"]
        assert_equal(other["parameters"], first["parameters"])
    target = TargetRate(ranks.TARGET, beta=ranks.BETA)
    for step, rates in enumerate(zip(*(result["rates"] for result in results), strict=True)):
        assert first["betas"][step] == pytest.approx(float(target(step)), rel=1e-5)
        target.observe(step, torch.tensor(rates).mean())
    assert first["betas"][-1] != pytest.approx(ranks.BETA, rel=1e-3)


@pytest.mark.parametrize("schedule", ["ramp", "target rate"])
def test_ranks_whose_selection_is_empty_go_on_like_the_others(world: Ranks, schedule: str) -> None:
    first, *others = world[f"empty, {schedule}"]
    assert first["step"] == ranks.STEPS
    assert len(set(first["betas"])) >= ranks.STEPS - 1  # nothing is observed in the last step
    for other in others:
        assert (other["betas"], other["step"]) == (first["betas"], first["step"])
        assert_equal(other["parameters"], first["parameters"])


@pytest.mark.parametrize("prior", ranks.PRIORS)
def test_no_collective_more_than_without(world: Ranks, prior: str) -> None:
    plain = world["collectives, "]
    assert plain == [["c10d::allreduce_"]] * world.world
    assert world[f"collectives, {prior}"] == plain


def test_a_target_rate_costs_one_collective(world: Ranks) -> None:
    assert world["collectives, target rate"] == [["c10d::allreduce_"] * 2] * world.world


@fsdp
@pytest.mark.parametrize("prior", ranks.PRIORS)
@pytest.mark.parametrize("how", ranks.SHARDED)
def test_fsdp_gradients_are_those_of_one_process(world: Ranks, how: str, prior: str) -> None:
    results = world[f"fsdp {how}, {prior}"]
    assert_gradients(results, one_process(prior, samples(results)))
    assert [result["said"] for result in results] == [[]] * world.world


@fsdp
@pytest.mark.parametrize("how", ranks.SHARDED)
def test_fsdp_in_mixed_precision(world: Ranks, how: str) -> None:
    results = world[f"fsdp {how}, bfloat16"]
    drawn = [[sample.double() for sample in each] for each in samples(results)]
    expected = one_process("standard", drawn)
    for result in results:
        assert result["dtypes"] == [torch.bfloat16, torch.float32]
        for name, gradient in result["gradients"].items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < 0.15 * expected[name].norm(), name


@fsdp
@pytest.mark.parametrize("how", ranks.SHARDED)
def test_fsdp_trains_and_resumes(world: Ranks, how: str) -> None:
    for result in world[f"fsdp {how}, training"]:
        assert len(set(result["losses"])) == 5
        assert result["resumed"] == result["losses"][3:]
        assert result["from full"] == result["losses"][3:4]
        # Of the full state only: in a sharded one is the metadata of the model it is loaded into.
        assert ["no CLIMB step" in said for said in result["said"]] == [True]


@fsdp
@pytest.mark.parametrize("how", ranks.SHARDED)
def test_a_full_state_of_fsdp_loads_into_one_process(world: Ranks, how: str) -> None:
    step = ranks.build(seed=1)
    step.load_state_dict(torch.load(world.folder / f"{how}.pt"))
    assert_equal(ranks.values(step), world[f"fsdp {how}, training"][0]["saved"])
