"""Terms in every precision against float64, on every device; layouts and sizes of batches.

The reference is torch.distributions in float64, from the very embedding that the head received
and from the head's parameters as they are: how a host rounds these is the host's choice. Rate and
entropy do not depend on the noise. float32 matrix products are those of torch's default
("highest"); with TF32, which a user has to ask for, a learned linear mean is as exact as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.schedule import TargetRate

PRIORS = ["standard", "learned", "view"]
WIDTHS = [(16,), (16, 8)]
LOW = [torch.bfloat16, torch.float16]

# Relative to the float64 value. float32 carries 6e-8; the rest is matrix products and sums.
RTOL = 1e-5
RTOL_FLOAT64 = 1e-12
# Of gradients, relative to the norm of the tensor.
RTOL_GRADIENT = 1e-4

# The greatest float16 is 65504.
LARGE = 6e4


class Mode(NamedTuple):
    """``autocast``: its dtype. ``true``: the dtype of the parameters and the data."""

    autocast: torch.dtype | None = None
    true: torch.dtype = torch.float32

    @property
    def embeds_in(self) -> torch.dtype:
        return self.autocast or self.true

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


MODES = {
    "float32": Mode(),
    "bf16-mixed": Mode(autocast=torch.bfloat16),
    "16-mixed": Mode(autocast=torch.float16),
    "bf16-true": Mode(true=torch.bfloat16),
    "16-true": Mode(true=torch.float16),
    "float64": Mode(true=torch.float64),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(*views: Tensor) -> Tensor:
    """Bounded, whatever the embedding."""
    one, *others = [F.normalize(view.flatten(0, -2), dim=-1) for view in views]
    apart = [(one - other).square().mean() for other in others]  # mse_loss: not in half, torch 2.4
    return torch.stack([one.square().mean(), *apart]).mean()


def nothing(*views: Tensor) -> Tensor:
    """Depends on the views, and pulls at none of them."""
    return torch.stack([0 * view.clamp(-1, 1).sum() for view in views]).sum()


def make(
    widths: tuple[int, ...] = (16,),
    *,
    base: Callable[..., Tensor] = distance,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    init_std: float = 0.1,
    **options: object,
) -> tuple[GaussianHead, ClimbLoss]:
    """A head whose log-variance depends on its input, and a loss whose prior is not N(0, I)."""
    torch.manual_seed(1)
    head = GaussianHead(*widths, init_std=init_std)
    generator = torch.Generator().manual_seed(2)
    state = head.state_dict()
    for name in state.keys() - {"logvar.bias"}:
        state[name] = 0.2 * torch.randn(state[name].shape, generator=generator)
    head.load_state_dict(state)
    settings: dict[str, object] = {"beta": 0.1, **options}
    loss = ClimbLoss(base, heads=head, **settings)  # type: ignore[arg-type]
    for parameter in loss.climb_priors.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return head.to(device, dtype), loss.to(device, dtype)


def exact(tensor: Tensor, *, gradient: bool = False) -> Tensor:
    return tensor.detach().cpu().double().requires_grad_(gradient)


def bounded(raw: Tensor) -> Tensor:
    """Into (-20, 10), as the head says it bounds its log-variances."""
    return -5 + 30 / math.pi * torch.atan((raw + 5) * math.pi / 30)


class Reference:
    """Rate and entropy in float64, with gradients for everything that they depend on."""

    def __init__(self, head: GaussianHead, loss: ClimbLoss, *embeddings: Tensor) -> None:
        self.inputs = [exact(embedding, gradient=True) for embedding in embeddings]
        self.head = {name: exact(p, gradient=True) for name, p in head.named_parameters()}
        self.prior = {
            name: exact(p, gradient=True) for name, p in loss.climb_priors.named_parameters()
        }
        views = [self.posterior(view) for view in self.inputs]
        if loss.prior == "view":
            rates = [kl_divergence(p, q) for p in views for q in views if p is not q]
        else:
            rates = [kl_divergence(p, self.fixed(p)) for p in views]
        self.rate = torch.cat([rate.flatten() for rate in rates]).mean()
        self.entropy = torch.cat([p.entropy().flatten() for p in views]).mean()

    def posterior(self, view: Tensor) -> Independent:
        named = self.head
        logvar = bounded(view @ named["logvar.weight"].T + named["logvar.bias"])
        mean = view
        if "mean.weight" in named:
            mean = view @ named["mean.weight"].T + named["mean.bias"]
        return Independent(Normal(mean, torch.exp(logvar / 2)), 1)

    def fixed(self, like: Independent) -> Independent:
        zeros = torch.zeros_like(like.mean)
        if not self.prior:
            return Independent(Normal(zeros, zeros + 1), 1)
        std = torch.exp(bounded(self.prior["0.raw_logvar"]) / 2)
        return Independent(Normal(zeros + self.prior["0.mean"], zeros + std), 1)


def assert_terms(loss: ClimbLoss, expected: Reference, *, rtol: float = RTOL) -> None:
    for name in ("rate", "entropy"):
        term, value = getattr(loss.terms, name), getattr(expected, name)
        assert term.dtype in (torch.float32, torch.float64), name
        assert term.item() == pytest.approx(value.item(), rel=rtol), name
    assert loss.terms.rate >= 0
    penalty = expected.rate + loss.alpha * expected.entropy
    total = loss.terms.base.double() + loss.terms.beta.double() * penalty.item()
    assert loss.terms.total.item() == pytest.approx(total.item(), rel=rtol)


class Net(nn.Module):
    def __init__(self, head: GaussianHead) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.head = head
        self.last = nn.Linear(head.out_features, 5)
        self.embeddings: list[Tensor] = []

    def forward(self, view: Tensor) -> Tensor:
        embedding = self.first(view)
        self.embeddings.append(embedding)
        out: Tensor = self.last(self.head(embedding))
        return out


class TestModes:
    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    def test_terms_of_a_training_step_equal_float64(
        self, mode: Mode, prior: str, widths: tuple[int, ...], device: torch.device
    ) -> None:
        torch.manual_seed(0)
        head, loss = make(widths, device=device, dtype=mode.true, prior=prior, alpha=0.5)
        net = Net(head).to(device, mode.true)
        with mode.context(device):
            views = [normal(8, 12, seed=s).to(device, mode.true) for s in range(2)]
            total = loss(*[net(view) for view in views])
        assert {e.dtype for e in net.embeddings} == {mode.embeds_in}
        rtol = RTOL_FLOAT64 if mode.true == torch.float64 else RTOL
        assert_terms(loss, Reference(head, loss, *net.embeddings), rtol=rtol)
        total.backward()
        for name, parameter in [*net.named_parameters(), *loss.named_parameters()]:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("dtype", [torch.float32, *LOW])
    def test_gradients_of_the_terms_equal_float64(
        self, dtype: torch.dtype, prior: str, widths: tuple[int, ...], device: torch.device
    ) -> None:
        head, loss = make(widths, base=nothing, device=device, prior=prior, alpha=0.5)
        views = [normal(8, 16, seed=s).to(device, dtype).requires_grad_() for s in range(2)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            total = loss(*[head(view) for view in views])
        total.backward()
        expected = Reference(head, loss, *views)
        (loss.beta * (expected.rate + loss.alpha * expected.entropy)).backward()
        # What comes back to a low-precision embedding has been rounded to its dtype.
        rounding = torch.finfo(dtype).eps
        for view, reference in zip(views, expected.inputs, strict=True):
            assert_near(view.grad, reference.grad, rtol=RTOL_GRADIENT + rounding)
        for name, parameter in head.named_parameters():
            assert_near(parameter.grad, expected.head[name].grad, rtol=RTOL_GRADIENT)
        for name, parameter in loss.climb_priors.named_parameters():
            assert_near(parameter.grad, expected.prior[name].grad, rtol=RTOL_GRADIENT)

    @pytest.mark.parametrize("dtype", LOW)
    def test_the_terms_would_not_be_right_in_low_precision(self, dtype: torch.dtype) -> None:
        """The tolerance tells float32 from less."""
        head, loss = make()
        view = normal(8, 16).to(dtype)
        loss(head(view))
        mean, logvar = (part.to(dtype) for part in head.posterior(view))
        rate = (mean.square() + torch.expm1(logvar) - logvar).sum(-1).mean() / 2
        assert rate.item() != pytest.approx(loss.terms.rate.item(), rel=RTOL)


def assert_near(value: Tensor | None, expected: Tensor | None, *, rtol: float) -> None:
    assert value is not None
    assert expected is not None
    error = (exact(value) - expected).norm().item()
    # The bias of a mean has none in a distance of means.
    assert error <= rtol * expected.norm().item() + 1e-7


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


class TestDefaultDtype:
    """Lightning's bf16-true and 16-true set it around the training step; some scripts set it."""

    def test_a_target_rate_starts_and_resumes_as_in_float32(
        self, default_dtype: torch.dtype
    ) -> None:
        def train(loss: ClimbLoss, steps: int) -> list[float]:
            betas = []
            for step in range(steps):
                loss(loss.heads[0](normal(4, 16, seed=step).to(default_dtype))).backward()
                betas.append(loss.terms.beta.item())
            return betas

        loss = make(dtype=default_dtype, beta=TargetRate(2.0, beta=1.1e-3))[1]
        twin = make(dtype=default_dtype, beta=TargetRate(2.0))[1]
        first = train(loss, 3)
        assert first[0] == pytest.approx(1.1e-3, rel=1e-6)
        with pytest.warns(UserWarning, match="beta was TargetRate"):
            twin.load_state_dict(loss.state_dict())
        assert train(twin, 3) == train(loss, 3)


class TestLargeEmbeddings:
    """Up to 6e4, near the greatest float16."""

    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("dtype", [torch.float32, *LOW])
    def test_terms_are_right_and_gradients_finite(
        self, dtype: torch.dtype, prior: str, widths: tuple[int, ...], device: torch.device
    ) -> None:
        head, loss = make(
            widths, base=nothing, device=device, prior=prior, alpha=1.0, beta=1e-3, init_std=1.0
        )
        views = [
            (LARGE * normal(4, 16, seed=s).sign()).to(device, dtype).requires_grad_()
            for s in range(2)
        ]
        total = loss(*[head(view) for view in views])
        assert_terms(loss, Reference(head, loss, *views))
        total.backward()
        gradients = [p.grad for p in [*head.parameters(), *loss.parameters()]]
        if dtype != torch.float16:
            gradients += [view.grad for view in views]
        for gradient in gradients:
            assert gradient is not None
            assert torch.isfinite(gradient).all()

    def test_a_wide_head_does_not_overflow(self, device: torch.device) -> None:
        head = GaussianHead(1024).to(device, torch.float16)
        loss = ClimbLoss(nothing, heads=head, beta=1e-3)
        view = torch.full((2, 1024), LARGE, dtype=torch.float16, device=device)
        loss(head(view.requires_grad_())).backward()
        assert_terms(loss, Reference(head, loss, view))
        assert view.grad is not None
        assert torch.isfinite(view.grad).all()

    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize("prior", PRIORS)
    def test_a_float16_gradient_is_infinite_only_where_no_float16_could_hold_it(
        self, prior: str, widths: tuple[int, ...], device: torch.device
    ) -> None:
        """16-true has neither float32 parameters nor a scaler that could help."""
        options: dict[str, object] = {"prior": prior, "views": 2} if prior == "view" else {}
        head, loss = make(
            widths, base=nothing, device=device, dtype=torch.float16, beta=1e-3, **options
        )
        scales = torch.logspace(0, math.log10(LARGE), 4).repeat(2).unsqueeze(1)
        # In one call: autograd adds the gradients of two calls in float16, and inf - inf is NaN.
        views = (scales * normal(8, 16).sign()).to(device, torch.float16).requires_grad_()
        loss(head(views)).backward()
        expected = Reference(head, loss, *(views.chunk(2) if prior == "view" else [views]))
        (loss.beta * expected.rate).backward()
        of_views = [view.grad for view in expected.inputs if view.grad is not None]
        pairs = [(views.grad, torch.cat(of_views))]
        pairs += [(p.grad, expected.head[name].grad) for name, p in head.named_parameters()]
        greatest = torch.finfo(torch.float16).max
        for gradient, true in pairs:
            assert gradient is not None
            assert true is not None
            assert not gradient.isnan().any()
            # Near the greatest, and where large gradients cancel, rounding decides.
            slack = 1e-3 * greatest + RTOL * true.abs().max()
            assert torch.isfinite(gradient.cpu()[true.abs() < greatest - slack]).all()
            assert torch.isinf(gradient.cpu()[true.abs() > greatest + slack]).all()

    def test_a_gradient_scaler_skips_steps_until_the_gradient_fits(
        self, device: torch.device
    ) -> None:
        """The layer before sums scale * beta * mean / batch over the batch, in float16."""
        torch.manual_seed(0)
        head, loss = make(base=nothing, device=device, beta=1e-2)
        net = nn.Sequential(nn.Linear(12, 16), head).to(device)
        nn.init.constant_(net[0].weight, LARGE / 12)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        view = torch.ones(4, 12, device=device)
        skipped = 0
        for _ in range(20):
            before = [p.detach().clone() for p in net.parameters()]
            scale = scaler.get_scale()
            with torch.autocast(device.type, dtype=torch.float16):
                total = loss(net(view))
            optimizer.zero_grad()
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            after = [p.detach() for p in net.parameters()]
            fits = scale * loss.beta * LARGE < torch.finfo(torch.float16).max
            moved = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
            assert moved == fits
            assert scaler.get_scale() == (scale if fits else scale / 2)
            assert all(torch.isfinite(p).all() for p in after)
            skipped += not fits
        assert 0 < skipped < 15


class TestNeverNegative:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
    @pytest.mark.parametrize("prior", PRIORS)
    @settings(max_examples=50)
    @given(
        scale=st.sampled_from([0.0, 1e-8, 1e-4, 1e-2, 1.0, 300.0, LARGE]),
        init_std=st.floats(0.999, 1.001) | st.floats(1e-4, 100.0),
        seed=st.integers(0, 2**31),
    )
    def test_rate(
        self, prior: str, dtype: torch.dtype, scale: float, init_std: float, seed: int
    ) -> None:
        head = GaussianHead(16, init_std=init_std).to(dtype)
        loss = ClimbLoss(nothing, heads=head, beta=0.1, prior=prior).to(dtype)
        view = scale * (2 * torch.rand(2, 16, generator=torch.Generator().manual_seed(seed)) - 1)
        loss(head(view.to(dtype)), head((view * (1 + 1e-6)).to(dtype)))
        assert loss.terms.rate >= 0
        assert torch.isfinite(loss.terms.rate)


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Views (..., B, D) of other memory, with the values of a contiguous tensor."""

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    def part(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (1, 1, 1, 1))[..., 1:-1, 1:-1]

    def channels_last(tensor: Tensor) -> Tensor:
        """Of a feature map (B, D, H, W), as tokens: flatten(2).transpose(1, 2)."""
        lifted = tensor.reshape(-1, tensor.shape[-2], 1, tensor.shape[-1]).permute(0, 3, 1, 2)
        lifted = lifted.contiguous(memory_format=torch.channels_last)
        return lifted.flatten(2).transpose(1, 2).reshape(tensor.shape)

    return {
        "strided": strided,
        "transposed": transposed,
        "part": part,
        "channels_last": channels_last,
    }


class TestLayouts:
    @pytest.mark.parametrize("shape", [(6, 16), (3, 4, 16), (2, 3, 4, 16)])
    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("layout", layouts().values(), ids=layouts())
    def test_makes_no_difference(
        self,
        layout: Callable[[Tensor], Tensor],
        prior: str,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        results = []
        for change in (Tensor.contiguous, layout):
            head, loss = make((16, 8), device=device, prior=prior, alpha=1.0)
            views = [change(normal(*shape, seed=s).to(device)) for s in range(2)]
            samples = [head(view) for view in views]
            loss(*samples).backward()
            assert_terms(loss, Reference(head, loss, *views))
            results.append([*samples, *loss.terms, *[p.grad for p in head.parameters()]])
        for contiguous, other in zip(*results, strict=True):
            torch.testing.assert_close(other, contiguous, rtol=1e-5, atol=5e-6)

    def test_one_row_expanded(self, device: torch.device) -> None:
        head, loss = make(device=device)
        view = normal(1, 16).to(device).expand(5, 16)
        loss(head(view))
        assert_terms(loss, Reference(head, loss, view))


class TestSizesOfBatches:
    """Of one row, and of another size at each step: test_fuzz.py."""

    @pytest.mark.parametrize("shape", [(0, 16), (0, 5, 16), (4, 0, 16)])
    def test_an_empty_batch_says_nothing(
        self, shape: tuple[int, ...], device: torch.device
    ) -> None:
        head, loss = make(device=device)
        full, empty = normal(4, 16).to(device), torch.zeros(shape, device=device)
        assert head(empty).shape == shape
        full_terms = Reference(head, loss, full)
        loss(head(full), head(empty).sum().expand(4, 16)).backward()
        assert_terms(loss, full_terms)
        assert torch.isfinite(head.logvar.weight.grad).all()
        loss(head(empty).sum().expand(4, 16) + 0 * full).backward()
        assert math.isnan(loss.terms.rate)
        assert torch.equal(loss.terms.total, loss.terms.base)
