from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import rows

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.attach import attach


class TestPosterior:
    def test_identity_mean_at_the_start(self) -> None:
        embedding = rows()
        mean, logvar = GaussianHead(6, init_std=0.3).posterior(embedding)
        assert torch.equal(mean, embedding)
        torch.testing.assert_close(torch.exp(logvar / 2), torch.full_like(mean, 0.3))

    def test_linear_mean(self) -> None:
        head = GaussianHead(6, 3)
        assert head.mean is not None
        torch.testing.assert_close(head.posterior(rows()).mean, head.mean(rows()))
        assert head(rows()).shape == (8, 3)

    def test_every_parameter_gets_a_gradient(self) -> None:
        head = GaussianHead(6, 3)
        head(rows()).square().sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_of_the_embedding_comes_back(self, dtype: torch.dtype) -> None:
        head = GaussianHead(6, 3).to(dtype)
        posterior = head.posterior(rows().to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {posterior.mean.dtype, posterior.logvar.dtype} == {wide}
        assert head(rows().to(dtype)).dtype == dtype
        assert head.eval()(rows().to(dtype)).dtype == dtype

    def test_statistics_leave_autocast(self) -> None:
        head = GaussianHead(6, 3)
        expected = head.posterior(rows())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = head.posterior(rows())
        assert torch.equal(inside.mean, expected.mean)
        assert torch.equal(inside.logvar, expected.logvar)


def replicated(module: nn.Module) -> nn.Module:
    """What nn.DataParallel runs on each GPU, as torch.nn.parallel.replicate makes it."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


class TestDataParallel:
    @pytest.mark.parametrize("place", ["alone", "in a model", "behind a hook"])
    def test_a_replica_does_not_train_and_says_why(self, place: str) -> None:
        model: nn.Module = GaussianHead(6)
        if place == "in a model":
            model = Net()
        elif place == "behind a hook":
            model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.LayerNorm(6))
            attach(model, at="features")
        replica = replicated(model)
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*use DistributedDataParallel"):
            replica(rows())
        model(rows()).sum().backward()

    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_a_replica_passes_on_the_mean(self, widths: tuple[int, ...]) -> None:
        head = GaussianHead(*widths)
        mean = head.posterior(rows()).mean
        assert torch.equal(replicated(head.eval())(rows()), mean)
        with torch.no_grad():
            assert torch.equal(replicated(head.train())(rows()), mean)

    def test_data_parallel_without_gpus_runs_the_model_itself(self) -> None:
        head = GaussianHead(6)
        loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
        loss(nn.DataParallel(head)(rows())).backward()
        assert loss.terms.rate > 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = GaussianHead(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, views: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.head(self.first(views))))
        return out


class TestStart:
    """The log-variance starts at init_std, whatever is done to the model before."""

    def assert_start(self, head: GaussianHead, std: float) -> None:
        posterior = head.posterior(rows().to(head.logvar.bias.dtype))
        expected = torch.full_like(posterior.logvar, std)
        torch.testing.assert_close(torch.exp(posterior.logvar / 2), expected, rtol=0.02, atol=0.0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("init_std", [0.01, 0.1, 1.0])
    def test_another_dtype_is_no_other_start(self, dtype: torch.dtype, init_std: float) -> None:
        head = GaussianHead(6, init_std=init_std).to(dtype)
        head(rows().to(dtype))
        self.assert_start(head, init_std)

    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_reset_parameters(self, widths: tuple[int, ...]) -> None:
        head = GaussianHead(*widths, init_std=0.3)
        for parameter in head.parameters():
            nn.init.constant_(parameter, 7.0)
        head.reset_parameters()
        self.assert_start(head, 0.3)
        if head.mean is not None:
            # As torch's own linear layers do: uniform within 1 / sqrt(in_features).
            weight = head.mean.weight
            assert 0 < weight.abs().max() <= 6**-0.5
            assert weight.std().item() == pytest.approx((6 * 3) ** -0.5, rel=0.5)
        head(rows())

    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_a_head_of_the_meta_device_is_materialised(self, widths: tuple[int, ...]) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(6, 6), GaussianHead(*widths, init_std=0.3))
        model.to_empty(device="cpu")
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        head = model[1]
        assert isinstance(head, GaussianHead)
        self.assert_start(head, 0.3)
        loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
        loss(model(rows())).backward()
        assert loss.terms.rate > 0

    def test_initialisers_of_linear_layers_pass_it_by(self) -> None:
        model = Net()

        def init_weights(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        model.apply(init_weights)
        assert not model.first.bias.any()
        self.assert_start(model.head, 0.1)
        model(rows())

    @pytest.mark.parametrize("of", ["weight", "bias"])
    def test_a_loop_over_all_parameters_is_told_once(self, of: str) -> None:
        head = GaussianHead(6)
        nn.init.normal_(getattr(head.logvar, of))
        with pytest.warns(
            UserWarning, match=r"set before its first sample.*reset_parameters"
        ) as said:
            head(rows())
        assert [warning.filename for warning in said] == [__file__]
        head(rows())

    @pytest.mark.parametrize("how", ["reset", "loaded", "trained"])
    def test_what_is_meant_is_not_told(self, how: str) -> None:
        head, other = GaussianHead(6), GaussianHead(6)
        if how == "trained":
            head(rows())
        for parameter in [*head.parameters(), *other.parameters()]:
            nn.init.normal_(parameter)
        if how == "reset":
            head.reset_parameters()
        elif how == "loaded":
            head.load_state_dict(other.state_dict())
        assert head(rows()).requires_grad


class TestWrongInput:
    @pytest.mark.parametrize("width", [0, -1, 2.5, "8"])
    def test_width(self, width: object) -> None:
        with pytest.raises(ValueError, match="in_features must be a positive integer"):
            GaussianHead(width)  # type: ignore[arg-type]

    @pytest.mark.parametrize("init_std", [0.0, -1.0, float("nan"), float("inf")])
    def test_init_std(self, init_std: float) -> None:
        with pytest.raises(ValueError, match="init_std must be a positive number"):
            GaussianHead(6, init_std=init_std)

    def test_init_std_out_of_bounds(self) -> None:
        with pytest.raises(ValueError, match=r"between 4\.5e-05 and 148, .* got 1e-06"):
            GaussianHead(6, init_std=1e-6)

    def test_integers(self) -> None:
        with pytest.raises(TypeError, match=r"floating-point embeddings, got torch\.int64"):
            GaussianHead(6)(torch.zeros(4, 6, dtype=torch.int64))

    @pytest.mark.parametrize("shape", [(4, 5), (6,), (2, 6, 4)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"\(\.\.\., B, 6\), got"):
            GaussianHead(6)(torch.zeros(shape))

    def test_an_empty_batch_is_an_empty_sample(self) -> None:
        assert GaussianHead(6)(torch.zeros(0, 6)).shape == (0, 6)
        assert GaussianHead(6).eval()(torch.zeros(0, 6)).shape == (0, 6)
