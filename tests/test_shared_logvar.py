"""A log-variance that is the same for every image: D parameters in place of D x D."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from climb_plugin import ClimbLoss, GaussianHead, TargetRate, unwrap, wrap
from climb_plugin.attach import attach


def student(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, width))


def square(*views: Tensor) -> Tensor:
    return torch.stack([view.square().mean() for view in views]).mean()


def test_it_has_one_parameter_for_each_dimension() -> None:
    head = GaussianHead(64, logvar="shared")
    assert [tuple(p.shape) for p in head.parameters()] == [(64,)]
    mean, logvar = head.posterior(torch.randn(2, 3, 64))
    assert mean.shape == logvar.shape == (2, 3, 64)
    torch.testing.assert_close(logvar, torch.full_like(logvar, 2 * math.log(0.1)))
    assert repr(head).startswith("GaussianHead(\n  64, 64, init_std=0.1, logvar='shared'")


def test_its_gradient_is_that_of_a_linear_one_without_weight() -> None:
    rows = torch.randn(6, 4)
    gradients = []
    for form in ("linear", "shared"):
        torch.manual_seed(0)
        head = GaussianHead(4, logvar=form)
        ClimbLoss(square, heads=head, beta=0.1)(head(rows)).backward()
        gradients.append(head.logvar.bias.grad)
    torch.testing.assert_close(*gradients)


def step(form: str, run: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    torch.manual_seed(0)
    model, teacher = student(), student()
    teacher.load_state_dict(model.state_dict())
    criterion = wrap(
        square, student=model, teacher=teacher, beta=TargetRate(5.0), logvar=form, prior="learned"
    )
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    call = run(model)
    before = copy.deepcopy(criterion.heads[0].logvar.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        criterion(call(torch.randn(6, 8)), call(torch.randn(6, 8))).backward()
        optimizer.step()
    assert not torch.equal(before["bias"], criterion.heads[0].logvar.bias)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in teacher.named_parameters()]
    assert unwrap(criterion) is square


@pytest.mark.filterwarnings("ignore:The .grad attribute of")  # dynamo's own
@pytest.mark.parametrize("form", ["linear", "shared"])
@pytest.mark.parametrize(
    "run",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="aot_eager"),
        lambda model: lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
    ],
    ids=["eager", "compiled", "checkpointed"],
)
def test_a_training(form: str, run: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    step(form, run)


def test_evaluation_exports() -> None:
    head = GaussianHead(8, 4, logvar="shared").eval()
    rows = torch.randn(3, 8)
    exported = torch.export.export(head, (rows,))
    torch.testing.assert_close(exported.module()(rows), head(rows))


@pytest.mark.parametrize(("saved", "built"), [("linear", "shared"), ("shared", "linear")])
def test_states_of_the_other_form_are_refused(saved: str, built: str) -> None:
    one, other = (student() for _ in range(2))
    attach(one, logvar=saved)
    attach(other, logvar=built)
    message = f"'1.gaussian' was saved with logvar='{saved}', and the model has logvar='{built}'"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(one.state_dict(), strict=strict)


@pytest.mark.parametrize("change", ["pruned", "parametrized"])
def test_a_weight_of_another_name_is_a_weight(change: str) -> None:
    def changed() -> nn.Sequential:
        net = student()
        logvar = attach(net).head.logvar
        if change == "pruned":
            prune.l1_unstructured(logvar, "weight", amount=0.5)
        else:
            spectral_norm(logvar)
        return net

    one, other = changed(), changed()
    other.load_state_dict(one.state_dict())


def test_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="logvar must be one of 'linear', 'shared', got 'full'"):
        wrap(square, student=student(), beta=0.1, logvar="full")


class TestWhatIsSaid:
    def test_of_a_wide_head(self) -> None:
        with pytest.warns(UserWarning, match=r"has 1,049,600 parameters, beside 9,288 .* 1,024"):
            wrap(square, student=student(1024), beta=0.1)

    @pytest.mark.parametrize(
        ("width", "hidden", "options"),
        [(1024, 8, {"logvar": "shared"}), (1024, 4096, {}), (512, 8, {})],
        ids=["shared", "a quarter or less", "a million or less"],
    )
    def test_nothing_of_others(self, width: int, hidden: int, options: dict[str, str]) -> None:
        net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, width))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrap(square, student=net, beta=0.1, **options)  # type: ignore[arg-type]

    def test_as_an_error_it_leaves_the_model_alone(self) -> None:
        net = student(1024)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="logvar='shared'"):
                wrap(square, student=net, beta=0.1)
        assert not any(isinstance(part, GaussianHead) for part in net.modules())
