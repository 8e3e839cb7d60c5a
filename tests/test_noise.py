from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from climb_plugin.noise import NoiseStream


def draw(stream: NoiseStream) -> torch.Tensor:
    return torch.randn(1000, generator=stream.next("cpu"))


def test_draws_of_a_stream_and_of_its_neighbours_are_uncorrelated() -> None:
    draws = []
    for seed in range(3):
        stream = NoiseStream(seed=seed)
        draws += [draw(stream) for _ in range(20)]
    for one, two in itertools.combinations(draws, 2):
        # 6 standard errors of the correlation of 1,000 independent pairs.
        assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 6 / 1000**0.5


def test_a_draw_can_be_had_again() -> None:
    stream = NoiseStream(seed=1)
    draws = [draw(stream) for _ in range(3)]
    assert stream.drawn == 3
    for index, expected in enumerate(draws):
        assert torch.equal(torch.randn(1000, generator=stream.at(index, "cpu")), expected)


def test_ranks_seeded_alike_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real process groups are in test_distributed.py; here each rank's stream is compared."""
    draws = [draw(NoiseStream(seed=1))]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        draws.append(draw(NoiseStream(seed=1)))
    assert torch.equal(draws[0], draws[1])
    for one, two in itertools.combinations(draws[1:], 2):
        assert not torch.equal(one, two)
