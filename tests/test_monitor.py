from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from climb_plugin.gaussian import kl_to_standard_normal
from climb_plugin.monitor import (
    active_dimensions,
    effective_rank,
    measure,
    nats_to_bits,
    normalized_std,
    rate_per_dimension,
    signal_to_noise,
    teacher_entropy,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(rank: int, *, rows: int = 32, width: int = 12) -> Tensor:
    """Centred rows with ``rank`` singular values of 2, and no others."""
    left = normal(rows, rank, seed=1, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0)).Q
    right = torch.linalg.qr(normal(width, rank, seed=2, dtype=torch.float64)).Q
    return 2 * left @ right.T


def test_rates_of_the_dimensions_add_up_to_the_rate() -> None:
    mean, logvar = normal(2, 3, 16, 5)
    per_dimension = rate_per_dimension(mean, logvar)
    assert per_dimension.shape == (5,)
    torch.testing.assert_close(per_dimension.sum(), kl_to_standard_normal(mean, logvar).mean())


def test_active_dimensions_are_those_away_from_the_prior() -> None:
    mean, logvar = torch.zeros(64, 5), torch.zeros(64, 5)
    mean[:, 1] = 3.0
    logvar[:, 4] = -4.0
    assert active_dimensions(mean, logvar) == 2
    assert active_dimensions(mean, logvar, threshold=2.0) == 1


def test_bits() -> None:
    assert nats_to_bits(math.log(2)) == pytest.approx(1.0)


class TestSignalToNoise:
    def test_equals_numpy(self) -> None:
        mean, logvar = normal(2, 16, 5, dtype=torch.float64)
        expected = mean.numpy().var(axis=0) / np.exp(logvar.numpy()).mean(axis=0)
        np.testing.assert_allclose(signal_to_noise(mean, logvar).numpy(), expected)

    def test_tokens_are_pooled(self) -> None:
        mean, logvar = normal(2, 3, 16, 5, dtype=torch.float64)
        signal = mean.numpy().var(axis=1).mean(axis=0)
        expected = signal / np.exp(logvar.numpy()).mean(axis=(0, 1))
        np.testing.assert_allclose(signal_to_noise(mean, logvar).numpy(), expected)

    def test_a_difference_between_views_or_tokens_is_no_signal(self) -> None:
        mean = torch.arange(3.0)[:, None, None].expand(3, 8, 2)
        assert not signal_to_noise(mean, torch.zeros(3, 8, 2)).any()

    def test_of_one_row(self) -> None:
        assert not signal_to_noise(torch.ones(1, 3), torch.zeros(1, 3)).any()


class TestEffectiveRank:
    @pytest.mark.parametrize("rank", [1, 3, 12])
    def test_of_a_known_rank(self, rank: int) -> None:
        assert effective_rank(of_rank(rank)).item() == pytest.approx(rank)

    def test_equals_numpy(self) -> None:
        mean = normal(20, 6, dtype=torch.float64) * torch.arange(6) + 3
        values = np.linalg.svd(mean.numpy() - mean.numpy().mean(axis=0), compute_uv=False)
        shares = values / values.sum()
        shares = shares[shares > 0]
        expected = math.exp(-(shares * np.log(shares)).sum())
        assert effective_rank(mean).item() == pytest.approx(expected)

    def test_neither_offset_nor_scale_nor_grouping_counts(self) -> None:
        mean = of_rank(3)
        for same in (mean + 50, 1e-6 * mean, mean.reshape(4, 8, 12)):
            assert effective_rank(same).item() == pytest.approx(3)

    @pytest.mark.parametrize("rows", [torch.zeros(5, 4), torch.full((7, 3), 0.1), torch.ones(1, 4)])
    def test_is_0_where_all_rows_are_equal(self, rows: Tensor) -> None:
        assert effective_rank(rows) == 0

    @given(rows=st.integers(2, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
    def test_range(self, rows: int, width: int, seed: int) -> None:
        rank = effective_rank(normal(rows, width, seed=seed)).item()
        assert 1 - 1e-4 <= rank <= min(rows - 1, width) + 1e-4


class TestNormalizedStd:
    def test_is_0_for_a_constant_embedding(self) -> None:
        assert normalized_std(normal(1, 16).expand(32, 16)) == 0
        assert normalized_std(torch.zeros(4, 16)) == 0
        assert normalized_std(normal(1, 16)) == 0

    def test_only_directions_count(self) -> None:
        directions = normal(64, 8)
        lengths = torch.linspace(0.1, 9, 64).unsqueeze(1)
        torch.testing.assert_close(normalized_std(lengths * directions), normalized_std(directions))

    def test_equals_numpy(self) -> None:
        embedding = normal(10, 6, dtype=torch.float64).numpy() + 1
        unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        expected = unit.std(axis=0).mean() * math.sqrt(6)
        assert normalized_std(torch.from_numpy(embedding)).item() == pytest.approx(expected)

    def test_a_difference_between_views_or_tokens_is_no_spread(self) -> None:
        assert normalized_std(normal(3, 1, 8).expand(3, 16, 8)) == 0

    @given(
        rows=st.integers(1, 9),
        width=st.integers(1, 9),
        seed=st.integers(0, 99),
        offset=st.floats(-50, 50),
    )
    def test_range(self, rows: int, width: int, seed: int, offset: float) -> None:
        value = normalized_std(normal(rows, width, seed=seed) + offset).item()
        assert 0 <= value <= 1 + 1e-5


class TestTeacherEntropy:
    def test_equals_torch_distributions(self) -> None:
        logits, center = normal(2, 8, 6), normal(1, 1, 6, seed=3)
        entropy = teacher_entropy(logits, temperature=0.5, center=center)
        expected = Categorical(logits=(logits - center) / 0.5).entropy() / math.log(6)
        torch.testing.assert_close(entropy, expected)

    def test_uniform_is_1_and_one_class_is_0(self) -> None:
        torch.testing.assert_close(teacher_entropy(torch.full((3, 7), 4.0)), torch.ones(3))
        one = torch.full((3, 7), -math.inf)
        one[:, 2] = 0.0
        assert torch.equal(teacher_entropy(one), torch.zeros(3))

    @pytest.mark.parametrize(
        ("logits", "of_rows", "of_mean"),
        [
            (torch.zeros(8, 8), 1.0, 1.0),
            (100 * torch.eye(8), 0.0, 1.0),
            (100 * torch.eye(8)[:1].expand(8, 8), 0.0, 0.0),
        ],
        ids=["uniform", "healthy", "one class"],
    )
    def test_rows_and_their_mean_tell_both_collapses_apart(
        self, logits: Tensor, of_rows: float, of_mean: float
    ) -> None:
        mean = F.log_softmax(logits / 0.5, dim=-1).logsumexp(dim=-2)
        assert teacher_entropy(logits, temperature=0.5).mean().item() == pytest.approx(of_rows)
        assert teacher_entropy(mean).item() == pytest.approx(of_mean)

    @given(classes=st.integers(2, 9), scale=st.floats(0, 1e4), seed=st.integers(0, 99))
    def test_range(self, classes: int, scale: float, seed: int) -> None:
        entropy = teacher_entropy(scale * normal(4, classes, seed=seed))
        assert entropy.shape == (4,)
        assert (entropy >= 0).all()
        assert (entropy <= 1 + 1e-5).all()

    def test_wrong_input(self) -> None:
        with pytest.raises(ValueError, match=r"at least two classes, got \(4, 1\)"):
            teacher_entropy(torch.zeros(4, 1))
        with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
            teacher_entropy(torch.zeros(4, 2, dtype=torch.long))
        for temperature in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="temperature must be a positive number, got"):
                teacher_entropy(torch.zeros(4, 2), temperature=temperature)
        for center in (torch.zeros(3), torch.zeros(5, 4, 2)):
            with pytest.raises(ValueError, match=r"broadcast to the logits, \(4, 2\), got shape"):
                teacher_entropy(torch.zeros(4, 2), center=center)


def test_measure_is_all_of_them_detached() -> None:
    values = normal(2, 16, 5)
    values[:, :, 0] *= 0.01  # not active
    mean, logvar = values.requires_grad_().unbind()
    seen = measure(mean, logvar)
    torch.testing.assert_close(seen.rate, rate_per_dimension(mean, logvar).detach())
    assert seen.active_dimensions == active_dimensions(mean, logvar) == 4
    torch.testing.assert_close(seen.signal_to_noise, signal_to_noise(mean, logvar).detach())
    torch.testing.assert_close(seen.effective_rank, effective_rank(mean).detach())
    torch.testing.assert_close(seen.normalized_std, normalized_std(mean).detach())
    assert not any(value.requires_grad for value in seen)


@pytest.mark.parametrize(
    "monitor",
    [effective_rank, normalized_std, lambda m: signal_to_noise(m, m), lambda m: measure(m, m)],
)
def test_wrong_shapes_and_types(monitor: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(\.\.\., B, D\), got \(4,\)"):
        monitor(torch.zeros(4))
    with pytest.raises(TypeError, match=r"floating-point tensors, got torch\.int64"):
        monitor(torch.zeros(4, 2, dtype=torch.long))


@pytest.mark.parametrize("monitor", [effective_rank, normalized_std])
def test_half_precision_is_computed_in_float32(monitor: Callable[[Tensor], Tensor]) -> None:
    half = normal(64, 8).to(torch.bfloat16)
    assert monitor(half).dtype == torch.float32
    assert torch.equal(monitor(half), monitor(half.float()))
