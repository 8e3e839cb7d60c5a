"""ClimbCallback in real Trainers of the packages that are installed."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import LIGHTNINGS, PACKAGES, QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.adapters.lightning import ClimbCallback
from climb_plugin.schedule import Linear, Schedule, TargetRate

TERMS = ("climb_rate", "climb_entropy", "climb_beta", "climb_base_loss")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore:.*(GPU|does not have many workers|no `val_dataloader`)"),
]


class Views(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        one, two = torch.randn(2, 6, generator=torch.Generator().manual_seed(index))
        return one, two


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(6), torch.randn(6)


def data() -> DataLoader[tuple[Tensor, Tensor]]:
    # With a generator of its own it takes none of torch's random numbers for its workers' seed.
    return DataLoader(Views(), batch_size=4, generator=torch.Generator())  # six batches


def base(one: Tensor, two: Tensor) -> Tensor:
    return (one - two).square().mean() + one.mean()


def make(
    pl: Any,
    beta: float | Schedule,
    *,
    build: Callable[[Any, float | Schedule], None] | None = None,
    calls: int = 1,
) -> Any:
    """A LightningModule that notes the terms and the beta of each call."""

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Linear(6, 5)
            self.head = GaussianHead(5, 3)
            if build is None:
                self.criterion = ClimbLoss(base, heads=self.head, beta=beta)
            else:
                build(self, beta)
            self.seen: list[Any] = []

        def on_train_epoch_start(self) -> None:
            # Lightning saves no random state, and the noise follows it.
            torch.manual_seed(self.current_epoch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = []
            for _ in range(calls):
                outputs = [self.head(self.backbone(view)) for view in batch]
                losses.append(self.loss_of(*outputs))
            return torch.stack(losses).mean()

        def loss_of(self, one: Tensor, two: Tensor) -> Tensor:
            loss: Tensor = self.criterion(one, two)
            self.seen.append(self.criterion.terms)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.criterion(*(self.head(self.backbone(view)) for view in batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Model()


def trainer(pl: Any, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        **QUIET,
        "max_epochs": 1,
        "default_root_dir": folder,
        "callbacks": [ClimbCallback()],
    }
    return pl.Trainer(**{**defaults, **options})


def fitted(pl: Any, folder: Path, model: Any, **options: Any) -> Any:
    """The trainer, after a training."""
    fit = trainer(pl, folder, **options)
    fit.fit(model, data())
    return fit


def means(seen: list[Any]) -> dict[str, Tensor]:
    fields = ("rate", "entropy", "beta", "base")
    return {
        f"climb_{name}" + ("_loss" if name == "base" else ""): torch.stack(
            [getattr(terms, name).float() for terms in seen]
        ).mean()
        for name in fields
    }


def assert_logged(fit: Any, seen: list[Any]) -> None:
    for name, mean in means(seen).items():
        torch.testing.assert_close(fit.callback_metrics[name], mean)


def betas(model: Any) -> list[float]:
    return [float(terms.beta) for terms in model.seen]


@pytest.mark.parametrize("calls", [1, 2])
def test_the_means_of_the_terms_are_logged(pl: Any, tmp_path: Path, calls: int) -> None:
    model = make(pl, Linear(0.1, warmup=4), calls=calls)
    fit = trainer(pl, tmp_path)
    fit.fit(model, data(), data())  # with a validation, whose terms must not be counted
    logged = fit.callback_metrics
    assert len(model.seen) == 6 * calls
    assert_logged(fit, model.seen)
    assert logged["climb_rate"] > 0
    torch.testing.assert_close(
        fit.progress_bar_metrics["climb_rate_step"],
        float(means(model.seen[-calls:])["climb_rate"]),
    )
    assert not model.criterion.climb.observers


@pytest.mark.parametrize("how", ["an evaluation in the step", "by its forward"])
def test_however_the_loss_is_called(pl: Any, tmp_path: Path, how: str) -> None:
    """And with a short last batch."""

    def build(model: Any, beta: float | Schedule) -> None:
        loss = model.criterion = ClimbLoss(base, heads=model.head, beta=beta)

        def loss_of(*views: Tensor) -> Tensor:
            total: Tensor = (loss.forward if how == "by its forward" else loss)(*views)
            model.seen.append(loss.terms)
            if how == "an evaluation in the step":
                with torch.no_grad():
                    loss(*views)
            return total

        model.loss_of = loss_of

    model = make(pl, 0.1, build=build, calls=2)
    fit = trainer(pl, tmp_path)
    fit.fit(model, DataLoader(Views(), batch_size=10))
    assert len(model.seen) == 6
    assert_logged(fit, model.seen)


def test_a_fraction_is_laid_over_the_optimiser_steps(
    pl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(pl, Linear(0.1, warmup=1 / 3))
    fit = fitted(pl, tmp_path, model, max_epochs=4, accumulate_grad_batches=2)
    assert fit.global_step == 12
    steps = [batch // 2 for batch in range(24)]
    assert betas(model) == pytest.approx([min(0.1, 0.1 * step / 4) for step in steps])
    assert model.criterion.step == 12
    said = capsys.readouterr().out
    assert said.count("CLIMB: criterion: Ramp(beta=0.1, warmup=0.33") == 1
    assert "over 12 optimiser steps" in said
    assert "nats" in said


def test_another_fit_lays_it_anew(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(0.1, warmup=0.5))
    fitted(pl, tmp_path, model)
    model.seen.clear()
    fitted(pl, tmp_path, model, max_epochs=2)
    assert betas(model)[:7] == pytest.approx([0.1 * step / 6 for step in range(7)])


def test_another_fit_adapts_anew(pl: Any, tmp_path: Path) -> None:
    model = make(pl, TargetRate(3.0, beta=0.01))
    fitted(pl, tmp_path, model)
    fitted(pl, tmp_path, model)
    assert betas(model)[0] == betas(model)[6] == pytest.approx(0.01)
    assert betas(model)[5] != betas(model)[0]


def test_a_copy_begins_where_the_step_was_set(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(1.0, warmup=100))
    model.criterion.set_step(50)
    again = copy.deepcopy(model)
    fitted(pl, tmp_path, again)
    assert betas(again)[:2] == [0.5, 0.51]


@pytest.mark.parametrize(
    "ramp", [Linear(0.1, warmup=40), Linear(0.1, warmup=0.5, total_steps=80)], ids=str
)
def test_what_is_in_steps_stays(pl: Any, tmp_path: Path, ramp: Linear) -> None:
    model = make(pl, ramp)
    fitted(pl, tmp_path, model)
    assert model.criterion.schedule is ramp
    assert betas(model) == pytest.approx([0.1 * step / 40 for step in range(6)])


def test_a_fraction_of_an_endless_training(pl: Any, tmp_path: Path) -> None:
    endless = DataLoader(Endless(), batch_size=4)
    with pytest.raises(ValueError, match="length is not known: set max_epochs"):
        trainer(pl, tmp_path).fit(make(pl, Linear(0.1, warmup=0.5)), endless)
    model = make(pl, Linear(0.1, warmup=0.5))
    trainer(pl, tmp_path, max_epochs=-1, max_steps=4).fit(model, endless)
    assert betas(model) == pytest.approx([0.0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_goes_on(pl: Any, tmp_path: Path, accumulate: int) -> None:
    options = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    whole = make(pl, Linear(0.1, warmup=0.9))
    trainer(pl, tmp_path, **options).fit(whole, data())

    class Stop(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first = make(pl, Linear(0.1, warmup=0.9))
    fit = fitted(pl, tmp_path, first, callbacks=[ClimbCallback(), Stop()], **options)
    assert len(first.seen) == 12
    fit.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]._metadata
    assert saved["criterion"]["climb"]["step"] == fit.global_step == 12 // accumulate

    second = make(pl, Linear(0.1, warmup=0.9))
    # A warning that beta had changed would be an error here.
    trainer(pl, tmp_path, **options).fit(second, data(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert betas(first) + betas(second) == betas(whole)
    assert len(set(betas(whole))) > 8
    assert [float(t.rate) for t in second.seen] == [float(t.rate) for t in whole.seen[12:]]


@pytest.mark.filterwarnings("ignore:this state dict holds no CLIMB step")
@pytest.mark.parametrize(
    "beta", [Linear(0.1, warmup=0.9), TargetRate(3.0, beta=0.01)], ids=["ramp", "target"]
)
def test_a_checkpoint_that_has_lost_its_metadata_resumes(
    pl: Any, tmp_path: Path, beta: Schedule
) -> None:
    """As an asynchronous or a sharded one."""
    whole, first, second = (make(pl, copy.deepcopy(beta)) for _ in range(3))
    fitted(pl, tmp_path, whole, max_epochs=4)

    class Stop(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    fit = fitted(pl, tmp_path, first, max_epochs=4, callbacks=[ClimbCallback(), Stop()])
    fit.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    saved["state_dict"] = dict(saved["state_dict"])
    torch.save(saved, tmp_path / "half.ckpt")
    trainer(pl, tmp_path, max_epochs=4).fit(second, data(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert betas(first) + betas(second) == betas(whole)
    assert len(set(betas(whole))) > 8


def hidden_at(*names: str) -> Callable[[Any, float | Schedule], None]:
    """Losses that are no submodules, under ``names`` in a dict."""

    def build(model: Any, beta: float | Schedule) -> None:
        losses = [ClimbLoss(base, heads=model.head, beta=copy.copy(beta)) for _ in names]
        model.hidden = dict(zip(names, losses, strict=True))

        def loss_of(*views: Tensor) -> Tensor:
            totals = [loss(*views) for loss in losses]
            model.seen.append(losses[0].terms)
            return torch.stack(totals).sum()

        model.loss_of = loss_of

    return build


def saved_with(pl: Any, folder: Path, *names: str) -> str:
    """A checkpoint of two epochs with losses of these names."""
    fitted = trainer(pl, folder, max_epochs=2)
    fitted.fit(make(pl, TargetRate(3.0, beta=0.01), build=hidden_at(*names)), data())
    fitted.save_checkpoint(folder / "half.ckpt")
    return str(folder / "half.ckpt")


def test_the_state_of_a_loss_that_is_gone_is_an_error_or_a_warning_if_loading_is_not_strict(
    pl: Any, tmp_path: Path
) -> None:
    checkpoint = saved_with(pl, tmp_path, "old", "same")
    model = make(pl, TargetRate(3.0, beta=0.01), build=hidden_at("new", "same"))
    message = r"ClimbLoss at hidden\.old, where .* are at hidden\.new, hidden\.same"
    with pytest.raises(ValueError, match=message):
        trainer(pl, tmp_path, max_epochs=3).fit(model, data(), ckpt_path=checkpoint)
    assert not model.seen
    model = make(pl, TargetRate(3.0, beta=0.01), build=hidden_at("same"))
    model.strict_loading = False
    with pytest.warns(UserWarning, match=r"ClimbLoss at hidden\.old, where"):
        trainer(pl, tmp_path, max_epochs=3).fit(model, data(), ckpt_path=checkpoint)
    assert len(model.seen) == 6
    assert betas(model)[0] != 0.01  # the state of the other was taken


def test_a_loss_is_added_to_a_resumed_training(pl: Any, tmp_path: Path) -> None:
    checkpoint = saved_with(pl, tmp_path, "same")
    more = make(pl, TargetRate(3.0, beta=0.01), build=hidden_at("same", "new"))
    trainer(pl, tmp_path, max_epochs=3).fit(more, data(), ckpt_path=checkpoint)
    assert betas(more)[0] != 0.01


@pytest.mark.parametrize("names", [("same",), ("new",)])
def test_a_checkpoint_that_was_evaluated_is_not_resumed(
    pl: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    checkpoint = saved_with(pl, tmp_path, "same")
    callback = ClimbCallback()
    model = make(pl, TargetRate(3.0, beta=0.01), build=hidden_at(*names))
    model.validation_step = lambda *_: None
    trainer(pl, tmp_path, callbacks=[callback]).validate(model, data(), ckpt_path=checkpoint)
    trainer(pl, tmp_path, callbacks=[callback]).fit(model, data())
    assert betas(model)[0] == pytest.approx(0.01)


def test_an_evaluation_of_another_model_restores_nothing(pl: Any, tmp_path: Path) -> None:
    checkpoint = saved_with(pl, tmp_path, "criterion")
    model, other = (make(pl, TargetRate(3.0, beta=0.01)) for _ in range(2))
    other.validation_step = lambda *_: None
    fit = trainer(pl, tmp_path, callbacks=[ClimbCallback()], max_epochs=1)
    fit.fit(model, data())
    before = model.criterion.climb_state()
    fit.validate(other, data(), ckpt_path=checkpoint, verbose=False)
    assert model.criterion.climb_state() == before


def test_several_losses_have_names_of_their_own(pl: Any, tmp_path: Path) -> None:
    def two(model: Any, beta: float | Schedule) -> None:
        model.criterion = ClimbLoss(base, heads=model.head, beta=beta)
        model.kept = {"other": (other := ClimbLoss(base, heads=model.head, beta=0.3))}
        model.again = other
        model.loss_of = lambda *views: model.criterion(*views) + other(*views)

    model = make(pl, 0.1, build=two)
    fit = fitted(pl, tmp_path, model)
    names = {f"{term}_{path}" for term in TERMS for path in ("criterion", "again")}
    shown = {f"climb_rate_step_{path}" for path in ("criterion", "again")}
    assert {name for name in fit.callback_metrics if "climb" in name} == names | shown
    assert float(fit.callback_metrics["climb_beta_again"]) == pytest.approx(0.3)


def test_a_module_without_a_loss_is_refused(pl: Any, tmp_path: Path) -> None:
    def plain(model: Any, beta: float | Schedule) -> None:
        model.criterion = base

    with pytest.raises(ValueError, match="finds no ClimbLoss in Model: make it an attribute"):
        fitted(pl, tmp_path, make(pl, 0.1, build=plain))


def test_a_loss_that_no_step_calls_is_named(pl: Any, tmp_path: Path) -> None:
    def idle(model: Any, beta: float | Schedule) -> None:
        model.idle = ClimbLoss(base, heads=model.head, beta=beta)
        model.loss_of = base

    with pytest.warns(UserWarning, match="no training step has called idle"):
        fitted(pl, tmp_path, make(pl, 0.1, build=idle))


def test_beta_zero_is_said_to_be_off(
    pl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(model: Any, beta: float | Schedule) -> None:
        model.criterion = ClimbLoss(base, heads=(), beta=beta)

    fit = fitted(pl, tmp_path, make(pl, 0.0, build=off))
    assert "CLIMB: criterion is off" in capsys.readouterr().out
    assert set(TERMS) & set(fit.callback_metrics) == {"climb_beta", "climb_base_loss"}


def test_an_exception_leaves_no_hook(pl: Any, tmp_path: Path) -> None:
    def broken(model: Any, beta: float | Schedule) -> None:
        model.criterion = ClimbLoss(base, heads=model.head, beta=beta)
        model.loss_of = lambda *views: 1 / 0

    model = make(pl, 0.1, build=broken)
    with pytest.raises(ZeroDivisionError):
        fitted(pl, tmp_path, model)
    assert not model.criterion.climb.observers


def test_a_fit_that_is_restarted_goes_on(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(0.1, warmup=0.5))
    fit = trainer(pl, tmp_path, max_epochs=4)

    class Stop(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    fit.callbacks.append(Stop())
    fit.fit(model, data())
    assert model.criterion.step == fit.global_step == 6
    fit.should_stop = False
    fit.fit(model, data())
    assert betas(model) == pytest.approx([min(0.1, 0.1 * step / 12) for step in range(24)])


def test_a_validation_before_the_fit_needs_no_length(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(0.1, warmup=0.5))
    fit = trainer(pl, tmp_path)
    fit.validate(model, data(), verbose=False)
    fit.fit(model, data(), data())
    assert betas(model) == pytest.approx([0.1 * min(1, step / 3) for step in range(6)])


@pytest.mark.parametrize("scheduling", [{0: 1, 1: 3}, {0: 2}], ids=str)
def test_an_accumulation_that_changes_has_no_known_length(
    pl: Any, tmp_path: Path, scheduling: dict[int, int]
) -> None:
    def fit(ramp: Linear) -> Any:
        model = make(pl, ramp)
        scheduler = pl.callbacks.GradientAccumulationScheduler(scheduling)
        fitted = trainer(pl, tmp_path, max_epochs=2, callbacks=[scheduler, ClimbCallback()])
        fitted.fit(model, data())
        assert model.criterion.step == fitted.global_step
        return model

    with pytest.raises(ValueError, match=r"length is not known, because Grad.* total_steps"):
        fit(Linear(0.1, warmup=0.5))
    steps = 6 + 2 if len(scheduling) == 2 else 3 + 3
    model = fit(Linear(0.1, warmup=0.5, total_steps=steps))
    assert len(set(betas(model))) == steps // 2 + 1


def test_a_batch_that_uses_no_sample_leaves_the_mean_of_the_rate(pl: Any, tmp_path: Path) -> None:
    model = make(pl, 0.1)
    loss = model.criterion

    def loss_of(one: Tensor, two: Tensor) -> Tensor:
        unused = len(model.seen) % 3 == 1  # no positives in the batch
        total: Tensor = loss(*((part.detach() for part in (one, two)) if unused else (one, two)))
        model.seen.append(loss.terms)
        return total if not unused else total + 0 * one.sum()

    model.loss_of = loss_of
    fit = trainer(pl, tmp_path)
    with pytest.warns(UserWarning, match="depends on no sample"):
        fit.fit(model, data())
    rates = torch.stack([terms.rate for terms in model.seen])
    assert rates.isnan().sum() == 2
    torch.testing.assert_close(fit.callback_metrics["climb_rate"], rates.nanmean())
    bases = torch.stack([terms.base for terms in model.seen])
    torch.testing.assert_close(fit.callback_metrics["climb_base_loss"], bases.mean())
    torch.testing.assert_close(fit.callback_metrics["climb_beta"], torch.tensor(0.1))


class Clashing(nn.Module):
    """Has attributes that are called like CLIMB's."""

    alpha, beta, prior, step, schedule, heads, terms = 0.5, 0.25, "mine", 3, None, 8, ()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return base(one, two)


def test_a_longer_training_goes_on_with_the_ramp_of_the_first(pl: Any, tmp_path: Path) -> None:
    """Resumed from a checkpoint, and by the same Trainer."""
    model = make(pl, Linear(0.1, warmup=0.5))
    fit = fitted(pl, tmp_path, model)
    fit.save_checkpoint(tmp_path / "short.ckpt")
    again = make(pl, Linear(0.1, warmup=0.5))
    longer = trainer(pl, tmp_path, max_epochs=2)
    with pytest.warns(
        UserWarning, match="stays a fraction of the 6 optimiser steps of the training"
    ):
        longer.fit(again, data(), ckpt_path=str(tmp_path / "short.ckpt"))
    fit.fit_loop.max_epochs = 2
    with pytest.warns(
        UserWarning, match="stays a fraction of the 6 optimiser steps of the training"
    ):
        fit.fit(model, data())
    for seen in (again.seen, model.seen[6:]):
        assert [float(terms.beta) for terms in seen] == pytest.approx([0.1] * 6)


def test_a_state_of_another_version_is_refused(pl: Any) -> None:
    with pytest.raises(ValueError, match=r"has losses and lengths, got criterion.*other version"):
        ClimbCallback().load_state_dict({"criterion": {"step": 3}})


def test_a_step_that_is_set_before_the_fit_is_where_it_begins(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(0.1, warmup=10))
    model.criterion.set_step(5)
    fitted(pl, tmp_path, model)
    assert [float(terms.beta) for terms in model.seen][:2] == pytest.approx([0.05, 0.06])
    model.seen.clear()
    fitted(pl, tmp_path, model)  # a new training
    assert [float(terms.beta) for terms in model.seen][:2] == pytest.approx([0.0, 0.01])


@pytest.mark.filterwarnings("ignore:.*stays a fraction")
@pytest.mark.parametrize("ramp", [Linear(0.1, warmup=0.5), 0.1], ids=str)
def test_a_base_loss_whose_names_clash(
    pl: Any, tmp_path: Path, ramp: float | Schedule, capsys: pytest.CaptureFixture[str]
) -> None:
    def clashing(model: Any, beta: float | Schedule) -> None:
        loss = ClimbLoss(Clashing(), heads=model.head, beta=beta, alpha=0.2)
        model.box = [loss]  # its state travels with the callback
        model.loss_of = lambda *views: (loss(*views), model.seen.append(loss.climb.terms))[0]

    model = make(pl, ramp, build=clashing)
    fit = fitted(pl, tmp_path, model)
    fit.save_checkpoint(tmp_path / "clash.ckpt")
    assert_logged(fit, model.seen)
    assert "alpha 0.2, prior standard" in capsys.readouterr().out
    (loss,) = model.box
    assert (loss.base.alpha, loss.climb.step) == (0.5, 6)
    again = make(pl, ramp, build=clashing)
    trainer(pl, tmp_path, max_epochs=2).fit(again, data(), ckpt_path=str(tmp_path / "clash.ckpt"))
    assert again.box[0].climb.step == 12


@pytest.mark.parametrize("kind", ["accumulate", "lbfgs", "two optimisers"])
def test_manual_optimisation_has_the_beta_of_its_step(pl: Any, tmp_path: Path, kind: str) -> None:
    model = make(pl, Linear(0.1, warmup=10))
    model.automatic_optimization = False
    per_step: list[set[float]] = []

    def optimizers() -> Any:
        if kind == "lbfgs":
            return torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
        parts = [model.backbone, model.head] if kind == "two optimisers" else [model]
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]

    def training_step(batch: Any, batch_idx: int) -> None:
        first = len(model.seen)
        optimizers = model.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]

        def closure() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            for half in zip(*(view.chunk(2) for view in batch), strict=True):
                loss = model.loss_of(*(model.head(model.backbone(view)) for view in half))
                model.manual_backward(loss / 2)
            return loss.detach()

        if kind == "lbfgs":
            optimizers[0].step(closure=closure)
        else:
            closure()
            for optimizer in optimizers:
                optimizer.step()
        per_step.append({round(beta, 9) for beta in betas(model)[first:]})

    model.configure_optimizers, model.training_step = optimizers, training_step
    fit = fitted(pl, tmp_path, model)
    assert per_step == [{round(0.01 * step, 9)} for step in range(6)]
    assert len(model.seen) >= 12
    if kind != "lbfgs":  # whose steps have as many calls as they need
        assert_logged(fit, model.seen)


def test_lbfgs_in_automatic_optimisation(pl: Any, tmp_path: Path) -> None:
    model = make(pl, Linear(0.1, warmup=0.5))
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    fit = fitted(pl, tmp_path, model)
    assert model.criterion.step == fit.global_step == 6
    assert sorted(set(betas(model))) == pytest.approx([0.1 * step / 3 for step in range(4)])


def in_place(kind: str) -> Callable[[Any, float | Schedule], None]:
    """Puts the loss of :func:`make` where ``kind`` says; ``model.loss`` is a way to reach it."""

    def build(model: Any, beta: float | Schedule) -> None:
        loss = ClimbLoss(base, heads=model.head, beta=beta, prior="learned")
        model.loss = lambda: loss
        places = {
            "submodule": loss,
            "module list": nn.ModuleList([loss]),
            "list": [loss],
            "dict": {"loss": loss},
            "deep": {"losses": [(loss, 1.0)]},
        }
        if kind == "late":
            model.configure_model = lambda: setattr(model, "place", [loss])
        else:
            model.place = places[kind]

        def loss_of(*views: Tensor) -> Tensor:
            total: Tensor = loss(*views)
            model.seen.append(loss.climb.terms)
            return total

        model.loss_of = loss_of

        def optimizers() -> Any:
            parameters = {*model.parameters(), *loss.parameters()}
            return torch.optim.SGD(parameters, lr=model.lr)

        model.configure_optimizers = optimizers
        model.validation_step = lambda *_: None
        model.lr, model.batch_size = 0.05, 4
        model.train_dataloader = model.val_dataloader = lambda: DataLoader(
            Views(), batch_size=model.batch_size, generator=torch.Generator()
        )

    return build


PLACES = ["submodule", "module list", "list", "dict", "deep", "late"]


@pytest.mark.parametrize("kind", PLACES)
def test_a_search_for_a_learning_rate_is_undone(pl: Any, tmp_path: Path, kind: str) -> None:
    """By the tuner, before a fit, which then is the one without a search."""
    if kind == "late" and not hasattr(pl.LightningModule, "configure_model"):
        pytest.skip("this Lightning has no configure_model")

    def fit(search: bool) -> Any:
        model = make(pl, TargetRate(3.0, beta=0.01), build=in_place(kind))
        model.on_fit_start = lambda: states.append(model.loss().climb_state())
        states: list[Any] = []
        fitted = trainer(pl, tmp_path, max_epochs=2)
        if search:
            tuner = import_module(f"{pl.__name__}.tuner").Tuner(fitted)
            before = model.loss().climb_state()
            tuner.lr_find(model, num_training=10, max_lr=0.1, update_attr=False)
            assert len(model.seen) == 10
            after = model.loss().climb_state()
            assert {k: v for k, v in after.items() if k != "noise"} == {
                k: v for k, v in before.items() if k != "noise"
            }
            model.seen.clear()
        fitted.fit(model)
        return model

    plain, searched = fit(False), fit(True)
    assert betas(searched) == pytest.approx(betas(plain), abs=1e-12)
    assert searched.loss().climb.step == 12


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("finder", ["LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.parametrize("kind", ["submodule", "deep", "late"])
def test_a_ramp_is_laid_over_the_fit_that_follows_a_search(
    pl: Any, tmp_path: Path, kind: str, finder: str, ours_first: bool
) -> None:
    options: dict[str, Any] = {
        "LearningRateFinder": {"num_training_steps": 15, "max_lr": 0.1, "update_attr": False},
        "BatchSizeFinder": {"steps_per_trial": 2, "init_val": 2, "max_trials": 3},
    }[finder]
    search = getattr(pl.callbacks, finder)(**options)
    ours = [ClimbCallback(), search] if ours_first else [search, ClimbCallback()]
    model = make(pl, Linear(0.1, warmup=0.5), build=in_place(kind))
    model.on_train_start = lambda: model.seen.clear()
    fit = trainer(pl, tmp_path, max_epochs=2, callbacks=ours)
    fit.fit(model)
    assert (model.batch_size > 4) == (finder == "BatchSizeFinder")
    steps, total = fit.global_step, fit.estimated_stepping_batches
    assert len(betas(model)) == steps > total // 3  # Lightning 2.1 forgets an epoch of the search
    assert betas(model) == pytest.approx(
        [0.1 * min(1, step / (total // 2)) for step in range(steps)]
    )
    assert model.loss().climb.step == steps


def test_a_ramp_is_as_it_was_after_a_search_alone(pl: Any, tmp_path: Path) -> None:
    ramp = Linear(0.1, warmup=0.5)
    model = make(pl, ramp, build=in_place("dict"))
    tuner = import_module(f"{pl.__name__}.tuner").Tuner(trainer(pl, tmp_path))
    tuner.lr_find(model, num_training=5, max_lr=0.1, update_attr=False)
    assert model.loss().climb.schedule == ramp
    assert model.loss().climb.schedule.laid_over is None
    assert betas(model) == [0.1] * 5  # the learning rate of the loss that it will be


@pytest.mark.parametrize("when", ["before", "in"])
@pytest.mark.parametrize("kind", ["submodule", "list"])
def test_a_search_that_diverges_ends_as_without_climb(
    pl: Any, tmp_path: Path, kind: str, when: str
) -> None:
    def search(beta: float | Schedule, *callbacks: Any) -> Any:
        model = make(pl, beta, build=in_place(kind))
        if not callbacks:
            model.loss_of = base
        model.lr = 0.05

        class Finder(pl.callbacks.LearningRateFinder):  # type: ignore[misc, name-defined]
            """In the midst of a training, as in Lightning's own example."""

            def on_fit_start(self, *args: Any) -> None:
                if when == "before":
                    super().on_fit_start(*args)

            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if when == "in" and getattr(self, "optimal_lr", None) is None:
                    self.lr_find(trainer, pl_module)

        finder = Finder(
            num_training_steps=12, max_lr=1e30, early_stop_threshold=None, update_attr=False
        )
        fitted = trainer(pl, tmp_path, max_epochs=5, callbacks=[*callbacks, finder])
        fitted.fit(model)
        losses = torch.tensor(finder.optimal_lr.results["loss"])
        assert losses.isnan().any()
        assert len(losses) == 12
        return model

    search(0.1)
    model = search(TargetRate(3.0, beta=0.01), ClimbCallback())
    assert all(0.001 < beta < 0.1 for beta in betas(model)[-6:])
    assert all(p.isfinite().all() for p in model.parameters())
    # After it, and in a training, infinity raises.
    assert model.loss().climb.watches


@pytest.mark.parametrize(
    "beta", [Linear(0.1, warmup=12), TargetRate(3.0, beta=0.01)], ids=["ramp", "target"]
)
@pytest.mark.parametrize("kind", PLACES)
def test_a_loss_resumes_wherever_it_is(pl: Any, tmp_path: Path, kind: str, beta: Schedule) -> None:
    """With a learned prior, whose parameters the module's state lacks where it is hidden."""

    def fit(epochs: int, **options: Any) -> tuple[Any, Any]:
        model = make(pl, copy.deepcopy(beta), build=in_place(kind))
        fitted = trainer(pl, tmp_path, max_epochs=epochs)
        fitted.fit(model, **options)
        return model, fitted

    whole, _ = fit(3)
    _, fitted = fit(1)
    fitted.save_checkpoint(tmp_path / "third.ckpt")
    resumed, _ = fit(3, ckpt_path=str(tmp_path / "third.ckpt"))
    assert [tuple(t) for t in resumed.seen] == [tuple(t) for t in whole.seen[6:]]
    assert len(set(betas(whole))) == (18 if isinstance(beta, TargetRate) else 13)
    prior = list(whole.loss().climb_priors.parameters())
    assert any(p.abs().sum() > 0 for p in prior)
    again = resumed.loss().climb_priors.parameters()
    assert all(torch.equal(p, q) for p, q in zip(prior, again, strict=True))


def test_a_training_that_diverges_raises(pl: Any, tmp_path: Path) -> None:
    model = make(pl, 0.1, build=in_place("list"))
    model.lr = 1e30
    with pytest.raises(ValueError, match="not finite: "):
        trainer(pl, tmp_path).fit(model)


def test_a_copy_in_the_midst_of_a_training_is_not_logged(pl: Any, tmp_path: Path) -> None:
    model = make(pl, 0.1)
    copies: list[Any] = []

    class Copy(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            copies.append(copy.deepcopy(pl_module.criterion))

    trainer(pl, tmp_path, callbacks=[ClimbCallback(), Copy()]).fit(model, data())
    (copied,) = copies
    assert copied.climb.watches
    assert copied.climb.observers == []


def test_a_missing_host_is_an_import_error() -> None:
    code = (
        "import sys\n"
        "sys.modules.update({'lightning': None, 'pytorch_lightning': None})\n"
        "import climb_plugin.adapters.lightning"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: neither lightning nor pytorch_lightning" in run.stderr
    assert "pip install 'lightning>=2'" in run.stderr


@pytest.mark.parametrize("present", LIGHTNINGS)
def test_one_host_is_enough(present: str) -> None:
    (absent,) = set(PACKAGES) - {present.split(".")[0]}
    code = (
        "import sys\n"
        f"sys.modules[{absent!r}] = None\n"
        f"import {present} as pl\n"
        "from climb_plugin.adapters.lightning import ClimbCallback\n"
        "assert issubclass(ClimbCallback, pl.Callback)"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def distributed(rank: int, port: str, folder: str, package: str) -> None:
    """One of two processes, started as torchrun would."""
    import torch.distributed as dist

    os.environ.update(
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    torch.set_num_threads(1)
    pl = import_module(package)
    strategies = import_module(f"{package}.strategies")
    strategy = strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    in_step: list[int] = []
    reduce = dist.all_reduce

    class Count(ClimbCallback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            def count(*args: Any, **kwargs: Any) -> Any:
                in_step.append(1)
                return reduce(*args, **kwargs)

            dist.all_reduce = count
            super().on_train_batch_end(*args, **kwargs)
            dist.all_reduce = reduce

    def learned(model: Any, beta: float | Schedule) -> None:
        model.criterion = ClimbLoss(base, heads=model.head, beta=beta, prior="learned")

    warnings.filterwarnings("error", ".*each rank trains a prior of its own")
    model = make(pl, Linear(0.1, warmup=0.9), build=learned)
    start = [p.detach().clone() for p in model.parameters()]
    fit = trainer(pl, Path(folder), strategy=strategy, devices=2, callbacks=[Count()])
    fit.fit(model, data())
    result = {
        "logged": {name: fit.callback_metrics[name] for name in TERMS},
        "terms": means(model.seen),
        "betas": betas(model),
        "start": start,
        "parameters": [p.detach() for p in model.parameters()],
        "in_step": len(in_step),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo aborts at a usual exit at times, or hangs (torch 2.4)


@pytest.mark.parametrize("package", LIGHTNINGS)
def test_two_processes(tmp_path: Path, package: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), port, str(tmp_path), package],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [text.count("CLIMB: criterion") for text in said] == [1, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["betas"] == pytest.approx([0.0, 0.1 / 3, 0.2 / 3])
    assert first["betas"] == second["betas"]
    assert first["terms"]["climb_rate"] != second["terms"]["climb_rate"]
    for name in TERMS:
        mean = (first["terms"][name] + second["terms"][name]) / 2
        torch.testing.assert_close(first["logged"][name], mean)
        torch.testing.assert_close(second["logged"][name], mean)
    for start, one, two in zip(
        first["start"], first["parameters"], second["parameters"], strict=True
    ):
        assert torch.equal(one, two)
        assert not torch.equal(one, start)
    assert first["in_step"] == second["in_step"] == 0


if __name__ == "__main__":
    distributed(int(sys.argv[1]), *sys.argv[2:])
