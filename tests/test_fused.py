"""The fused operations against the plain composition, to the second derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from climb_plugin import fused, gaussian

SHAPES = [(0, 3), (1, 1), (5, 7), (3, 2, 5), (300, 256)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


# What the tests call alike: (mean, logvar) in, one tensor out. The last takes a logvar alone.
FUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sample": lambda mean, logvar: fused.sample(mean, logvar, noise(mean, seeded())),
    "standard_rate": fused.standard_rate,
    "squash": lambda _, logvar: fused.squash(logvar, -5.0, 9.5),
}
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sample": lambda mean, logvar: fused.plain_sample(mean, logvar, noise(mean, seeded())),
    "standard_rate": fused.plain_standard_rate,
    "squash": lambda _, logvar: fused.plain_squash(logvar, -5.0, 9.5),
}
every = pytest.mark.parametrize("name", FUSED)


@pytest.fixture(params=[1, 16, fused._BLOCK], ids="block={}".format)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements per thread: one row at a time, a few, all at once."""
    monkeypatch.setattr(fused, "_BLOCK", request.param)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return mean.requires_grad_(), logvar.requires_grad_()


def value_and_gradients(
    operation: Callable[[Tensor, Tensor], Tensor], *pair: Tensor
) -> tuple[Tensor, ...]:
    value = operation(*pair)
    weights = torch.randn(value.shape, generator=seeded(), dtype=value.dtype)
    gradients = torch.autograd.grad(value, pair, weights, materialize_grads=True)
    return value, *gradients


@every
@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_plain_composition(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, rtol: float
) -> None:
    pair = inputs(*shape, dtype=dtype)
    # Rounding is relative to the largest summand, hence the absolute part.
    torch.testing.assert_close(
        value_and_gradients(FUSED[name], *pair),
        value_and_gradients(PLAIN[name], *pair),
        rtol=rtol,
        atol=rtol,
    )


@every
@pytest.mark.usefixtures("block")
def test_first_and_second_derivatives_equal_finite_differences(name: str) -> None:
    # A tiny offset of the mean: squash does not depend on it, and gradcheck wants a dependence.
    def operation(mean: Tensor, logvar: Tensor) -> Tensor:
        value = FUSED[name](mean, logvar)
        return value + mean.sum() * 1e-3 if name == "squash" else value

    pair = inputs(3, 2, 4)
    assert torch.autograd.gradcheck(operation, pair)
    assert torch.autograd.gradgradcheck(operation, pair)


@every
def test_third_derivative_of_a_directional_sum(name: str) -> None:
    def third(operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        mean, logvar = inputs(3, 4)
        value = operation(mean, logvar).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, logvar, create_graph=True)
            value = gradient.pow(2).sum()
        return value

    torch.testing.assert_close(third(FUSED[name]), third(PLAIN[name]))


@every
@pytest.mark.parametrize("which", [0, 1])
def test_one_input_alone_may_need_a_gradient(name: str, which: int) -> None:
    pair = inputs(4, 3)
    pair[1 - which].requires_grad_(False)
    value = FUSED[name](*pair)
    if name == "squash" and which == 0:
        assert not value.requires_grad
        return
    value.sum().backward()
    expected = torch.autograd.grad(PLAIN[name](*pair).sum(), pair[which])
    torch.testing.assert_close((pair[which].grad,), expected)
    assert pair[1 - which].grad is None


@every
def test_strided_and_expanded_inputs(name: str) -> None:
    mean, logvar = (tensor.detach() for tensor in inputs(6, 4))
    strided = [tensor.t().contiguous().t().requires_grad_() for tensor in (mean, logvar)]
    expanded = [tensor[:1].expand(6, 4).requires_grad_() for tensor in (mean, logvar)]
    for pair in (strided, expanded):
        torch.testing.assert_close(
            value_and_gradients(FUSED[name], *pair), value_and_gradients(PLAIN[name], *pair)
        )


@every
@pytest.mark.usefixtures("block")
def test_inputs_are_left_as_they_were(name: str) -> None:
    pair = inputs(5, 4)
    before = [tensor.detach().clone() for tensor in pair]
    value_and_gradients(FUSED[name], *pair)
    assert all(map(torch.equal, pair, before))


@every
def test_transforms_and_forward_mode_give_what_the_composition_gives(name: str) -> None:
    mean, logvar = (tensor.detach() for tensor in inputs(3, 4, 5))
    if name != "sample":  # a generator has no place under vmap
        torch.testing.assert_close(
            torch.func.vmap(FUSED[name])(mean, logvar), PLAIN[name](mean, logvar)
        )
    ones = (torch.ones_like(mean), torch.ones_like(logvar))
    jvps = [torch.func.jvp(table[name], (mean, logvar), ones) for table in (FUSED, PLAIN)]
    torch.testing.assert_close(*jvps)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(
                table[name](mean, forward_ad.make_dual(logvar, torch.ones_like(logvar)))
            ).tangent
            for table in (FUSED, PLAIN)
        ]
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, from its compiler
@every
def test_compiles_in_one_graph(name: str) -> None:
    operation = (lambda m, v: fused.sample(m, v, noise(m))) if name == "sample" else FUSED[name]
    compiled = torch.compile(operation, backend="aot_eager", fullgraph=True)
    pair = inputs(5, 4)
    results = []
    for call in (operation, compiled):
        torch.manual_seed(0)
        results.append(value_and_gradients(call, *pair))
    torch.testing.assert_close(*results)


def saved(call: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps, each tensor once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = call()
        del alive
    return list(kept.values())


def test_three_tensors_of_the_samples_size_are_saved() -> None:
    mean, logvar = inputs(64, 32, dtype=torch.float32)

    def sample_and_terms() -> object:
        return (
            gaussian.reparameterize(mean, logvar),
            gaussian.kl_to_standard_normal(mean, logvar),
            gaussian.conditional_entropy(mean, logvar),
        )

    kept = saved(sample_and_terms)
    assert sum(tensor.numel() for tensor in kept) == 3 * mean.numel()
    # Two are the inputs: the only new memory is the half deviation.
    new = {t.data_ptr() for t in kept} - {mean.data_ptr(), logvar.data_ptr()}
    assert len(new) == 1


def test_the_plain_composition_saves_more() -> None:
    mean, logvar = inputs(64, 32, dtype=torch.float32)
    plain = saved(
        lambda: (
            fused.plain_sample(mean, logvar, noise(mean)),
            fused.plain_standard_rate(mean, logvar),
        )
    )
    assert sum(tensor.numel() for tensor in plain) > 3 * mean.numel()
