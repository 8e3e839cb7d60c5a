"""CLIMB inside a method that only looks like solo-learn's; needs no host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from climb_plugin.adapters.solo_backbones import Stem, adapt_to_cifar
from climb_plugin.adapters.solo_method import ClimbMethod


def projector() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Base(nn.Module):
    """The hooks of Lightning and solo-learn that CLIMB takes part in."""

    projects = True

    def __init__(self, **section: Any) -> None:
        super().__init__()
        self.cfg = {"method": "plain", "method_kwargs": section}
        self.backbone = nn.Linear(3, 6)
        if self.projects:
            self.projector = projector()
        self.logged: dict[str, dict[str, Any]] = {}
        self.trainer = SimpleNamespace(
            global_step=0, estimated_stepping_batches=10, is_global_zero=True
        )

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [
            {"name": "backbone", "params": self.backbone.parameters()},
            {"name": "projector", "params": self.projector.parameters()},
        ]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.learnable_params, lr=0.1)

    def on_train_start(self) -> None: ...

    def on_train_epoch_start(self) -> None: ...

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def log_dict(self, values: dict[str, Any], **options: Any) -> None:
        for name, value in values.items():
            self.log(name, value, **options)

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.logged[name] = {"value": float(value), **options}

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.projector(self.backbone(batch)).square().mean()


class Momentum(Base):
    def __init__(self, **section: Any) -> None:
        super().__init__(**section)
        self.momentum_projector = projector().requires_grad_(False)
        self.momentum_projector.load_state_dict(self.projector.state_dict())

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.projector, self.momentum_projector)]


class Method(ClimbMethod, Base): ...


class MomentumMethod(ClimbMethod, Momentum): ...


@pytest.mark.parametrize("section", [{}, {"climb_beta": 0}])
def test_off_is_the_method_itself(section: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = Base()
    torch.manual_seed(0)
    method = Method(**section)
    batch = torch.randn(5, 3)
    assert method.climb is None
    assert method.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(method.training_step(batch, 0), plain.training_step(batch, 0))
    assert method.logged == {}


def test_building_draws_no_random_number_of_the_host() -> None:
    torch.manual_seed(0)
    Base()
    expected = torch.rand(1)
    torch.manual_seed(0)
    Method(climb_beta=1e-3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_everything_new_is_in_the_optimiser(prior: str) -> None:
    method = Method(climb_beta=1e-3, climb_prior=prior)
    groups = method.configure_optimizers().param_groups
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in method.parameters())
    assert ("climb_prior.mean" in method.state_dict()) == (prior == "learned")


def test_a_head_that_the_method_does_not_list_is_added() -> None:
    class Narrow(ClimbMethod, Base):
        @property
        def learnable_params(self) -> list[dict[str, Any]]:
            return super().learnable_params

    class Forgetful(Base):
        @property
        def learnable_params(self) -> list[dict[str, Any]]:
            return [{"name": "first", "params": self.projector[0].parameters()}]

    class Forgetting(ClimbMethod, Forgetful): ...

    for kind, names in ((Narrow, ["backbone", "projector"]), (Forgetting, ["first", "climb_head"])):
        assert [group["name"] for group in kind(climb_beta=1e-3).learnable_params] == names


@pytest.mark.parametrize("at", ["projection", "features"])
def test_pairs_of_the_momentum_update_stay_aligned(at: str) -> None:
    method = MomentumMethod(climb_beta=1e-3, climb_at=at)
    ((online, momentum),) = method.momentum_pairs
    for (name, one), (other_name, other) in zip(
        online.named_parameters(), momentum.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
        assert one.requires_grad
        assert not other.requires_grad
        assert one.data_ptr() != other.data_ptr()
    embedding = torch.randn(5, 6)
    assert torch.equal(momentum(embedding), momentum(embedding))
    assert not torch.equal(online(embedding), online(embedding))


@pytest.mark.parametrize("kind", [Method, MomentumMethod])
def test_the_loss_gains_the_rate_and_says_so(kind: type[Any]) -> None:
    method = kind(climb_beta=0.5)
    total = method.training_step(torch.randn(5, 3), 0)
    logged = method.logged
    assert float(total.detach()) == pytest.approx(
        logged["climb_base_loss"]["value"] + 0.5 * logged["climb_rate"]["value"]
    )
    for name in ("climb_rate", "climb_entropy", "climb_beta", "climb_base_loss"):
        assert logged[name]["sync_dist"]
    assert logged["climb_rate_step"]["prog_bar"]
    total.backward()
    assert method.climb.heads[0].logvar.bias.grad.abs().sum() > 0


def test_a_dictionary_of_outcomes_keeps_its_other_entries() -> None:
    class Dictionary(Base):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "feats": batch}

    class Wrapped(ClimbMethod, Dictionary): ...

    outcome = Wrapped(climb_beta=0.5).training_step(torch.randn(5, 3), 0)
    assert outcome["loss"].requires_grad
    assert outcome["feats"].shape == (5, 3)


def test_a_method_without_an_embedding_is_refused() -> None:
    class Bare(ClimbMethod, Base):
        projects = False

    Bare()
    with pytest.raises(ValueError, match="'plain': it has neither a projector nor a head"):
        Bare(climb_beta=1e-3)


def test_the_schedule_runs_over_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    method = Method(climb_beta=1.0, climb_warmup=0.5)
    method.on_train_start()
    seen = []
    for step in (0, 1, 5, 9):
        method.trainer.global_step = step
        method.training_step(torch.randn(5, 3), 0)
        seen.append(method.logged["climb_beta"]["value"])
    assert seen == pytest.approx([0.0, 0.2, 1.0, 1.0])
    said = capsys.readouterr().out
    assert said.count("CLIMB:") == 1
    for part in ("Linear", "warmup=0.5", "total_steps=10", "standard", "projection", "20 param"):
        assert part in said


def test_a_training_without_end_has_no_fractions() -> None:
    method = Method(climb_beta=1.0, climb_warmup=0.5)
    method.trainer.estimated_stepping_batches = float("inf")
    with pytest.raises(ValueError, match="finite length"):
        method.on_train_start()


def test_off_by_a_key_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Method(climb_beta=0).on_train_start()
    assert "off" in capsys.readouterr().out
    Method().on_train_start()
    assert capsys.readouterr().out == ""


def test_a_plain_state_loads_and_names_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    plain, method = Base(), Method(climb_beta=1e-3)
    method.load_state_dict(plain.state_dict())
    assert torch.equal(method.projector[0].weight, plain.projector[0].weight)
    (line,) = capsys.readouterr().out.splitlines()
    assert "projector.gaussian.logvar.weight" in line
    del (state := plain.state_dict())["backbone.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.weight"):
        method.load_state_dict(state)


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_the_optimiser_of_a_plain_run_goes_on(prior: str) -> None:
    plain = Base()
    optimizer = torch.optim.SGD(plain.learnable_params, lr=0.1, momentum=0.9)
    plain.training_step(torch.randn(5, 3), 0).backward()
    optimizer.step()
    checkpoint = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}

    class WithMomentum(Base):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.learnable_params, lr=0.1, momentum=0.9)

    class Wrapped(ClimbMethod, WithMomentum): ...

    method = Wrapped(climb_beta=1e-3, climb_prior=prior)
    method._trainer = method.trainer
    method.on_load_checkpoint(checkpoint)
    grown = method.configure_optimizers()
    grown.load_state_dict(checkpoint["optimizer_states"][0])
    theirs = dict(plain.named_parameters())
    for name, parameter in method.named_parameters():
        if name in theirs:
            expected = optimizer.state[theirs[name]]["momentum_buffer"]
            assert torch.equal(grown.state[parameter]["momentum_buffer"], expected)
        else:
            assert parameter not in grown.state


def saved(**section: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    Method(**section).on_save_checkpoint(checkpoint)
    return checkpoint


def resumed(checkpoint: dict[str, Any], **section: Any) -> Method:
    method = Method(**section)
    method._trainer = method.trainer
    method.on_load_checkpoint(checkpoint)
    return method


def test_other_values_on_resume_are_a_warning_with_both() -> None:
    with pytest.warns(UserWarning, match=r"climb_beta was 0\.5 and is 0\.25"):
        resumed(saved(climb_beta=0.5), climb_beta=0.25)
    resumed(saved(climb_beta=0.5), climb_beta=0.5)  # warnings are errors here


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"climb_beta": 0.5, "climb_at": "features"},
        {"climb_beta": 0.5, "climb_prior": "learned"},
    ],
)
def test_other_parameters_on_resume_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be resumed: climb_"):
        resumed(saved(climb_beta=0.5), **section)


def test_a_resumed_run_draws_what_the_first_would_have_drawn() -> None:
    checkpoint = saved(climb_beta=0.5)
    expected = torch.rand(3)
    method = resumed(checkpoint, climb_beta=0.5)
    for _ in range(2):  # Lightning starts the saved epoch, then the next
        torch.rand(7)
        method.on_train_epoch_start()
    assert torch.equal(torch.rand(3), expected)
    method.training_step(torch.randn(5, 3), 0)
    method.on_train_epoch_start()
    assert not torch.equal(torch.rand(3), expected)


def test_the_checkpoint_holds_nothing_that_safe_loading_refuses(tmp_path: Any) -> None:
    torch.save(saved(climb_beta=0.5, climb_prior="learned"), tmp_path / "x.ckpt")
    assert "climb_plugin" in torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_the_stem_of_cifar_travels_in_the_state() -> None:
    stem = nn.Sequential(Stem(3, 4, kernel_size=3, stride=2, padding=1, bias=False))
    images = torch.randn(1, 3, 32, 32)
    assert stem(images).shape[-1] == 16
    adapt_to_cifar(stem)
    assert stem(images).shape[-1] == 32
    other = nn.Sequential(Stem(3, 4, kernel_size=3, stride=2, padding=1, bias=False))
    other.load_state_dict(stem.state_dict())
    assert torch.equal(other(images), stem(images))
