"""Rule 2: no two calls share noise, runs follow torch's seed, torch's numbers stay as they were."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin._graph import noise

ROWS = torch.zeros(64, 64)
# 5 standard errors of the correlation of 4,096 independent pairs.
INDEPENDENT = 5 / 4096**0.5


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), GaussianHead(64))


def noise_of(model: nn.Module, rows: Tensor = ROWS) -> Tensor:
    head = model if isinstance(model, GaussianHead) else model[1]
    mean = rows if isinstance(model, GaussianHead) else model[0](rows)
    assert isinstance(head, GaussianHead)
    return (head(mean) - mean).detach().flatten()


def assert_independent(draws: list[Tensor]) -> None:
    assert len(draws) > 1
    table = torch.corrcoef(torch.stack(draws))
    for i, j in itertools.combinations(range(len(draws)), 2):
        assert abs(table[i, j]) < INDEPENDENT, (i, j)


def two_heads() -> list[Tensor]:
    heads = [GaussianHead(64), GaussianHead(64)]
    return [noise_of(head) for _ in range(3) for head in heads]


def one_after_the_other() -> list[Tensor]:
    """The second is built when the first has drawn, and what it drew is still in use."""
    one = model()
    kept = one(ROWS)
    two = model()
    return [(kept - one[0](ROWS)).detach().flatten(), noise_of(two)]


def copies(how: Callable[[nn.Module], nn.Module], drawn: int) -> list[Tensor]:
    one = model()
    for _ in range(drawn):
        one(ROWS)
    return [noise_of(part) for part in (one, how(one), one, how(one))]


def loaded() -> list[Tensor]:
    """Co-teaching: two models start from equal weights, and both are trained."""
    one, two = model(), model()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one[0].weight, two[0].weight)
    return [noise_of(one), noise_of(two)]


def wrapped_twice() -> list[Tensor]:
    towers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(2)]
    towers[1].load_state_dict(towers[0].state_dict())
    means = [tower(ROWS).detach() for tower in towers]
    for tower in towers:
        wrap(F.mse_loss, student=tower, beta=1e-3)
    pairs = zip(towers, means, strict=True)
    return [(tower(ROWS) - mean).detach().flatten() for tower, mean in pairs]


def federated() -> list[Tensor]:
    """Each client trains a fresh copy of a model that is never trained itself."""
    whole, draws = model(), []
    for _ in range(2):
        clients = [copy.deepcopy(whole) for _ in range(2)]
        for client in clients:
            rows = torch.randn(64, 64)
            draws.append(noise_of(client, rows))
            client(rows).square().mean().backward()
        with torch.no_grad():
            for target, *parts in zip(*(m.parameters() for m in (whole, *clients)), strict=True):
                target.copy_(torch.stack(parts).mean(dim=0))
    return draws


def seeded_every_step() -> list[Tensor]:
    one, draws = model(), []
    for _ in range(5):
        torch.manual_seed(0)
        draws.append(noise_of(one, torch.randn(64, 64)))
    return draws


def built_in_forks(seeds: tuple[int | None, ...]) -> list[Tensor]:
    heads = []
    for each in seeds:
        with torch.random.fork_rng(devices=[]):
            if each is not None:
                torch.manual_seed(each)
            nn.Linear(8, 8)
            heads.append(GaussianHead(64))
    return [noise_of(head) for head in heads]


def drawn_in_forks() -> list[Tensor]:
    """One step, whose two views are each embedded within a block of its own."""
    head, samples = GaussianHead(64), []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.rand(3)
            samples.append(head(ROWS))
    return [sample.detach().flatten() for sample in samples]


WAYS: dict[str, Callable[[], list[Tensor]]] = {
    "two heads": two_heads,
    "one after the other": one_after_the_other,
    "deepcopy": lambda: copies(copy.deepcopy, 0),
    "deepcopy later": lambda: copies(copy.deepcopy, 3),
    "pickle": lambda: copies(lambda m: pickle.loads(pickle.dumps(m)), 1),
    "load_state_dict": loaded,
    "two towers": wrapped_twice,
    "federated": federated,
    "a seed every step": seeded_every_step,
    "forks with seeds": lambda: built_in_forks((1, 2)),
    "forks without": lambda: built_in_forks((None, None)),
    "draws in forks": drawn_in_forks,
    "calls of one head": lambda: [noise_of(head) for head in [GaussianHead(64)] * 6],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_two_calls_share_noise(way: Callable[[], list[Tensor]]) -> None:
    assert_independent(way())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_seed_gives_the_same_noise_also_twice_in_one_process(
    way: Callable[[], list[Tensor]],
) -> None:
    first = way()
    torch.manual_seed(0)
    for one, two in zip(first, way(), strict=True):
        assert torch.equal(one, two)
    torch.manual_seed(1)
    assert not torch.equal(first[0], way()[0])


def test_the_check_of_independence_can_fail() -> None:
    draw = torch.randn(4096)
    with pytest.raises(AssertionError):
        assert_independent([draw, 0.1 * draw + torch.randn(4096)])


def test_noise_is_standard_normal() -> None:
    draws = torch.stack([noise.normal(noise.next_seed(()), ROWS) for _ in range(25)]).flatten()
    count = len(draws)
    # 4 standard errors of the mean, the variance and the fourth moment of N(0, 1).
    assert abs(draws.mean()) < 4 / count**0.5
    assert abs(draws.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(draws.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5


def test_a_repeated_run_draws_the_same_though_its_losses_are_kept() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        net = model()
        loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
        losses = []
        for _ in range(3):  # a fixed batch: torch's state does not move
            total = loss(net(ROWS + 1))
            total.backward()
            losses.append(total)
        return losses

    first = run()
    for one, two in zip(first, run(), strict=True):
        assert torch.equal(one, two)


def test_a_repeated_run_draws_the_same_though_its_samples_are_in_use() -> None:
    """What that costs: a head that is built later in the very same state draws the same."""

    def run() -> Tensor:
        torch.manual_seed(0)
        sample: Tensor = GaussianHead(64)(ROWS)
        return sample

    kept = run()
    assert torch.equal(run(), kept)
    assert torch.equal(GaussianHead(64)(ROWS), kept)


def test_the_seed_may_be_set_after_the_model_is_built() -> None:
    def losses(before: int) -> list[float]:
        torch.manual_seed(before)
        net = model()
        net[0].load_state_dict({"weight": torch.eye(64), "bias": torch.zeros(64)})
        torch.manual_seed(42)
        return [net(torch.randn(4, 64)).square().mean().item() for _ in range(3)]

    assert losses(1111) == losses(2222)


def test_torchs_pythons_and_numpys_random_numbers_stay_where_they_were() -> None:
    random.seed(0)
    np.random.seed(0)
    linear = nn.Linear(32, 32)
    projection = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 16))
    rows = torch.randn(16, 32)

    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            str(np.random.get_state()),
        )

    def train() -> None:
        loss = ClimbLoss(F.mse_loss, heads=[head, other], beta=1e-3)
        loss(head(linear(rows)), other(linear(rows))).backward()

    before = state()
    head, other = GaussianHead(32), GaussianHead(32)
    steps: dict[str, Callable[[], object]] = {
        "building": lambda: None,
        "wrapping": lambda: wrap(F.mse_loss, student=projection, beta=1e-3),
        "copying": lambda: (copy.deepcopy(head), pickle.loads(pickle.dumps(head))),
        "loading": lambda: other.load_state_dict(head.state_dict()),
        "training": train,
        "evaluating": lambda: head.eval()(rows),
    }
    for name, step in steps.items():
        step()
        assert state() == before, name


def test_k_resumes_to_the_bit_between_two_draws_of_one_state() -> None:
    net = model()
    loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
    loss(net(ROWS + 1)).backward()
    net(ROWS)
    file = io.BytesIO()
    torch.save({"climb": loss.climb_state(), "random": torch.get_rng_state()}, file)
    expected = [noise_of(net) for _ in range(3)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    torch.manual_seed(7)
    again = model()
    again.load_state_dict(net.state_dict())
    resumed = ClimbLoss(lambda z: z.square().mean(), heads=again[1], beta=1e-3)
    torch.set_rng_state(saved["random"])
    resumed.load_climb_state(saved["climb"])
    for one, two in zip(expected, [noise_of(again) for _ in range(3)], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("drawn", [0, 3])
@pytest.mark.parametrize("into", ["itself", "another"])
def test_a_state_of_an_earlier_epoch_brings_back_no_noise(drawn: int, into: str) -> None:
    """As a roll-back or a best-so-far teacher loads one; the random state moves by the epoch."""
    net = model()
    loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
    draws = [noise_of(net) for _ in range(drawn)]
    saved = loss.climb_state()
    torch.rand(1)
    draws += [noise_of(net) for _ in range(3)]
    other = loss if into == "itself" else copy.deepcopy(loss)
    other.load_climb_state(saved)
    assert_independent([*draws, *(noise_of(net) for _ in range(3))])


@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_state_that_is_saved_anew_before_any_draw_is_the_same(loaded_first: bool) -> None:
    net = model()
    loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
    noise_of(net)
    saved, state = loss.climb_state(), torch.get_rng_state()
    expected = noise_of(net)

    torch.manual_seed(7)
    noise_of(net)
    for load in (True, False) if loaded_first else (False, True):
        loss.load_climb_state(saved) if load else torch.set_rng_state(state)
    assert loss.climb_state() == saved
    assert torch.equal(noise_of(net), expected)
    torch.rand(1)
    torch.set_rng_state(state)
    assert not torch.equal(noise_of(net), expected)  # that position has been taken up


def test_a_loaded_state_is_void_if_its_random_state_does_not_come() -> None:
    """A later run of the same seed comes by that state, and must not begin in its middle."""
    net = model()
    loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
    state, first = torch.get_rng_state(), noise_of(net)
    saved = loss.climb_state()
    torch.manual_seed(7)
    loss.load_climb_state(saved)
    noise_of(net)
    torch.set_rng_state(state)
    assert torch.equal(noise_of(net), first)


def test_a_checkpoint_saved_within_a_fork_leaves_the_noise() -> None:
    """An evaluation that keeps torch's random state, and saves the criterion."""
    net = model()
    loss = ClimbLoss(lambda z: z.square().mean(), heads=net[1], beta=1e-3)
    draws = []
    for _ in range(3):
        draws.append(noise_of(net))
        with torch.random.fork_rng(devices=[]):
            torch.rand(3)
            loss.state_dict()
    assert_independent(draws)


@pytest.mark.parametrize("saved", [[1], [1, -2], "12", [0.5, 1], [1, 2, 3]])
def test_a_damaged_position_is_refused(saved: object) -> None:
    loss = ClimbLoss(torch.mean, heads=GaussianHead(4), beta=1e-3)
    before = loss.climb_state()
    with pytest.raises(ValueError, match=r"the noise in the state .* is two ints"):
        loss.load_climb_state({**before, "noise": saved, "step": 5})
    assert loss.climb_state() == before


def hogwild(rank: int, pickled: bytes, queue: Any) -> None:
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    torch.manual_seed(1 + rank)
    queue.put((rank, noise_of(pickle.loads(pickled)).numpy().copy()))


def test_processes_that_are_seeded_apart_draw_apart() -> None:
    """As in hogwild training; forked, so that torch is imported once."""

    def launch() -> list[Tensor]:
        pickled = pickle.dumps(model())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        workers = [context.Process(target=hogwild, args=(r, pickled, queue)) for r in range(2)]
        for worker in workers:
            worker.start()
        found = dict(queue.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join()
        return [torch.from_numpy(found[rank]) for rank in range(2)]

    first = launch()
    assert_independent(first)
    torch.manual_seed(0)
    for one, two in zip(first, launch(), strict=True):
        assert torch.equal(one, two)
