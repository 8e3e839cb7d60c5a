"""The closed forms against torch.distributions, finite differences and a known channel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from climb_plugin import gaussian

Pair = tuple[Tensor, Tensor]
ONE = [
    gaussian.kl_to_standard_normal,
    gaussian.conditional_entropy,
    gaussian.entropy_bound,
]
TWO = [gaussian.kl_between, gaussian.symmetric_kl]


def distribution(mean: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mean, torch.exp(logvar / 2), validate_args=False), 1)


def standard(like: Tensor) -> Independent:
    return distribution(torch.zeros_like(like), torch.zeros_like(like))


def cross_entropy(p: Independent, q: Independent) -> Tensor:
    return p.entropy() + kl_divergence(p, q)


REFERENCES: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    gaussian.kl_to_standard_normal: lambda p: kl_divergence(p, standard(p.mean)),
    gaussian.conditional_entropy: lambda p: p.entropy(),
    gaussian.entropy_bound: lambda p: cross_entropy(p, standard(p.mean)),
    gaussian.kl_between: kl_divergence,
    gaussian.symmetric_kl: lambda p, q: (kl_divergence(p, q) + kl_divergence(q, p)) / 2,
}

LOG_STD_RANGE = (math.log(1e-4), math.log(1e3))


@st.composite
def gaussians(draw: st.DrawFn, count: int) -> list[Tensor]:
    """Means up to 1e3 and stds from 1e-4 to 1e3, of one shape with one to three batch axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for _ in range(count):
        scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
        mean = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * scale
        low, high = sorted(draw(st.tuples(*[st.floats(*LOG_STD_RANGE)] * 2)))
        log_std = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        tensors += [mean, 2 * log_std]
    return tensors


@pytest.mark.parametrize("term", ONE + TWO)
@given(data=st.data())
def test_equals_torch_distributions(term: Callable[..., Tensor], data: st.DataObject) -> None:
    drawn = data.draw(gaussians(2 if term in TWO else 1))
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    expected = REFERENCES[term](*[distribution(*pair) for pair in pairs])
    result = term(*drawn)
    assert result.shape == drawn[0].shape[:-1]
    # Absolute: where the terms of a divergence cancel, torch.distributions is the less exact.
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("term", ONE + TWO)
def test_gradient_equals_finite_differences(term: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 4 if term in TWO else 2
    inputs = [
        torch.randn(3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(count)
    ]
    assert torch.autograd.gradcheck(term, inputs)


def test_reparameterize_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar, noise = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)

    def sample(mean: Tensor, logvar: Tensor) -> Tensor:
        return gaussian.reparameterize(mean, logvar, noise=noise)

    inputs = mean.requires_grad_(), logvar.requires_grad_()
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


def within_interval(draws: Tensor, expected: Tensor, *, z: float = 3.2905) -> bool:
    """Whether the mean over the first axis agrees within its two-sided 99.9 % interval."""
    error = draws.std(dim=0) / math.sqrt(len(draws))
    return bool(((draws.mean(dim=0) - expected).abs() <= z * error).all())


def test_interval_can_be_missed() -> None:
    draws = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0))
    assert within_interval(draws, torch.zeros(1))
    assert not within_interval(draws, torch.full((1,), 0.05))


def test_samples_have_the_mean_and_variance_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([[-2.0, 0.0, 3.0]]).expand(100_000, 3)
    logvar = torch.tensor([[-4.0, 0.0, 2.0]]).expand(100_000, 3)
    noise = torch.randn(100_000, 3, generator=generator)
    z = gaussian.reparameterize(mean, logvar, noise=noise)
    assert within_interval(z, mean[0])
    assert within_interval((z - mean) ** 2, logvar[0].exp())


@pytest.mark.parametrize("channel_std", [0.1, 1.0, 10.0])
def test_rate_bounds_the_information_of_a_gaussian_channel(channel_std: float) -> None:
    """v ~ N(0, 1), z = v + noise: I(z; v) = 1/2 log(1 + 1 / var) is known."""
    views = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0)).double()
    logvar = torch.full_like(views, 2 * math.log(channel_std))
    information = math.log1p(channel_std**-2) / 2
    rate = gaussian.kl_to_standard_normal(views, logvar).mean().item()
    assert rate >= information
    # The gap is KL(p(z) || r): the bound is tight when the prior is the marginal.
    marginal_logvar = torch.full_like(views, math.log(1 + channel_std**2))
    tight = gaussian.kl_between(views, logvar, torch.zeros_like(views), marginal_logvar)
    assert within_interval(tight.unsqueeze(1), torch.tensor([information], dtype=torch.float64))
    variance = 1 + channel_std**2
    gap = (variance - 1 - math.log(variance)) / 2
    assert rate == pytest.approx(information + gap, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("term", ONE + TWO)
def test_low_precision_is_computed_in_float32(
    term: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 256, generator=generator).to(dtype) for _ in range(4)]
    inputs = inputs[: 4 if term in TWO else 2]
    result = term(*inputs)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), term(*[tensor.double() for tensor in inputs]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("offset", [0.0, 1e-7, -1e-7, 1e-5, -1e-5, 1e-3])
def test_stable_and_not_negative_near_the_prior(offset: float) -> None:
    logvar = torch.full((1, 256), offset)
    rate = gaussian.kl_to_standard_normal(torch.zeros(1, 256), logvar).item()
    assert rate >= 0
    # exp(x) - 1 - x = x^2 / 2 to leading order, and 256 dimensions of half of it.
    assert rate == pytest.approx(256 * offset**2 / 4, rel=2e-2, abs=1e-10)


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bound_logvar_stays_inside_with_a_gradient(raw: float) -> None:
    tensor = torch.tensor(raw, requires_grad=True)
    bounded = gaussian.bound_logvar(tensor)
    bounded.backward()
    assert gaussian.LOGVAR_MIN - 1e-5 <= bounded.item() <= gaussian.LOGVAR_MAX + 1e-5
    if abs(raw) > 1e6:
        assert bounded.item() == pytest.approx(10.0 if raw > 0 else -20.0, abs=1e-3)
    assert tensor.grad is not None
    assert math.isfinite(tensor.grad.item())
    if abs(raw) < 1e15:
        assert tensor.grad.item() > 0


@given(st.floats(-19.9, 9.9))
def test_unbound_logvar_inverts_bound_logvar(logvar: float) -> None:
    raw = torch.tensor(gaussian.unbound_logvar(logvar), dtype=torch.float64)
    assert gaussian.bound_logvar(raw).item() == pytest.approx(logvar, abs=1e-9)


@pytest.mark.parametrize("extreme", [gaussian.LOGVAR_MIN, gaussian.LOGVAR_MAX])
@pytest.mark.parametrize("term", ONE + TWO)
def test_finite_at_the_bounds_for_large_embeddings(
    term: Callable[..., Tensor], extreme: float
) -> None:
    mean = torch.full((2, 64), 6e4, requires_grad=True)
    logvar = torch.full((2, 64), extreme, requires_grad=True)
    others = (-mean, -logvar) if term in TWO else ()
    result = term(mean, logvar, *others)
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert logvar.grad is not None
    assert torch.isfinite(logvar.grad).all()


def reparameterized(mean: Tensor, logvar: Tensor) -> Tensor:
    return gaussian.reparameterize(mean, logvar, noise=mean)


@pytest.mark.parametrize("term", [*ONE, reparameterized])
class TestWrongInput:
    def test_shapes_differ(self, term: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=r"same shape, got \(4, 3\), \(4, 2\)"):
            term(torch.zeros(4, 3), torch.zeros(4, 2))

    def test_no_batch(self, term: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=r"\(\.\.\., B, D\), got \(3,\)"):
            term(torch.zeros(3), torch.zeros(3))

    def test_integers(self, term: Callable[..., Tensor]) -> None:
        with pytest.raises(TypeError, match=r"got torch\.int64"):
            term(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))

    def test_no_tensor(self, term: Callable[..., Tensor]) -> None:
        with pytest.raises(TypeError, match="got list"):
            term([[0.0]], torch.zeros(1, 1))


def test_unbound_logvar_refuses_what_is_outside() -> None:
    with pytest.raises(ValueError, match=r"between -20\.0 and 10\.0, got 10\.0"):
        gaussian.unbound_logvar(10.0)
