"""CLIMB in solo-learn's methods, through their own training loop."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import by_path
import lightning.pytorch as pl
import pytest
import solo.methods
import torch
from omegaconf import OmegaConf
from solo.losses.simclr import simclr_loss_func
from solo.methods import SimCLR
from solo.methods.base import BaseMethod
from solo.methods.linear import LinearModel
from solo.utils.auto_resumer import AutoResumer
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader

from climb_plugin import ClimbLoss, GaussianHead, unwrap
from climb_plugin.adapters import solo_callbacks, solo_learn
from climb_plugin.adapters.lightning import ClimbCallback
from climb_plugin.adapters.solo_config import DEFAULTS, register
from climb_plugin.adapters.solo_knn import load

# Lightning and solo-learn warn of much; a test that is about warnings collects them itself.
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ["dino", "simclr", "byol", "mocov3"]


runs = by_path.load(Path(__file__).with_name("solo_runs.py"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def heads_in(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, GaussianHead)]


def held_by(trainer: Any) -> set[int]:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}


# Every method.


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("name", sorted(runs.METHODS))
def test_every_method_trains_with_climb(name: str, at: str) -> None:
    # deepclusterv2 has no clusters in its first epoch: its own loss is NaN there.
    epochs = 2 if name == "deepclusterv2" else 1
    cfg = runs.config(name, epochs=epochs, climb_beta=1e-3, climb_prior="learned", climb_at=at)
    model, trainer, watch = runs.train(name, cfg)
    head = model.climb.heads[0]
    assert all(map(math.isfinite, watch.losses[-2:]))
    assert len(watch.losses) == 2 * epochs
    new = [*head.parameters(), *model.climb.climb_priors.parameters()]
    assert {id(parameter) for parameter in new} <= held_by(trainer)
    assert head.logvar.weight.abs().sum() > 0  # zero at the start
    assert model.climb.climb_priors[0].mean.abs().sum() > 0
    for metric in ("climb_rate", "climb_entropy", "climb_beta", "climb_base_loss"):
        assert metric in trainer.callback_metrics
    assert trainer.callback_metrics["climb_rate"] > 0
    assert "climb_rate_step" in trainer.progress_bar_metrics
    for online, momentum in getattr(model, "momentum_pairs", []):
        pairs = [[(n, p.shape) for n, p in m.named_parameters()] for m in (online, momentum)]
        assert pairs[0] == pairs[1]
        assert not any(parameter.requires_grad for parameter in momentum.parameters())


def test_the_documented_table_is_what_its_command_prints() -> None:
    page = (Path(__file__).parents[2] / "examples" / "SOLO_LEARN.md").read_text()
    written = [line for line in page.splitlines() if line.startswith("| ") and "gaussian`" in line]
    printed = list(runs.table())[2:]
    assert len(printed) == len(runs.METHODS)
    for one, other in zip(written, printed, strict=True):
        assert words(one)[0] == words(other)[0], "run: python tests/adapters/solo_runs.py"
        assert words(one)[1] == pytest.approx(words(other)[1], rel=0.02)


def words(row: str) -> tuple[str, list[float]]:
    """A row without its rates, and these, which differ a little between machines."""
    rates = re.findall(r"\d+\.\d+", row)
    return re.sub(r"\d+\.\d+", "", row), [float(rate) for rate in rates]


@pytest.mark.parametrize("name", METHODS)
def test_off_is_bit_identical(name: str) -> None:
    connector = importlib.import_module("lightning.pytorch.trainer.connectors.callback_connector")
    with pytest.MonkeyPatch.context() as patch:
        # A Trainer as in an environment without climb-plugin.
        patch.setattr(connector, "_load_external_callbacks", lambda group: [])
        plain = outcome(name)
        assert outcome(name, climb_beta=1) == plain  # nothing is there that could heed it
    assert outcome(name) == plain
    assert outcome(name, climb_beta=0) == plain
    assert outcome(name, climb_beta=1e-6) != plain


def outcome(name: str, **section: Any) -> Any:
    """The losses of ten steps, what they ended with, and the random numbers that come next."""
    model, _, watch = runs.train(name, runs.config(name, epochs=2, **section), batches=5)
    assert len(watch.losses) == 10
    return watch.losses, runs.digest(model), torch.get_rng_state().tolist()


def test_the_rate_is_the_mean_over_all_crops() -> None:
    for name in ("swav", "simclr", "byol", "supcon"):
        rates: list[float] = []

        class Reference(pl.Callback):
            def on_fit_start(self, trainer: Any, module: Any, rates: Any = rates) -> None:
                module.climb.heads[0].register_forward_hook(functools.partial(see, rates))

        cfg = runs.config(name, climb_beta=0.01, data__num_small_crops=2)
        model, _, _ = runs.train(name, cfg, Reference(), batches=1, sizes=(32, 32, 16, 16))
        assert len(rates) == 4
        assert float(model.climb.terms.rate) == pytest.approx(sum(rates) / 4, abs=1e-3)


def see(rates: list[float], head: Any, args: Any, output: Any) -> None:
    mean, logvar = head.posterior(args[0].detach())
    posterior = Normal(mean, (logvar / 2).exp())
    rates.append(float(kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1).mean()))


# Methods of users.


class Own(SimCLR):  # type: ignore[misc]
    """Leaves the loss of its parent out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = BaseMethod.training_step(self, batch, batch_idx)
        indexes = batch[0].repeat(2)
        return simclr_loss_func(torch.cat(out["z"]), indexes=indexes, temperature=0.2) + out["loss"]


class Dictionary(SimCLR):  # type: ignore[misc]
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}


class Skipping(SimCLR):  # type: ignore[misc]
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 0 else loss


def simclr(**section: Any) -> Any:
    return runs.config("simclr", **section)


@pytest.mark.parametrize("method", [SimCLR, Own, Dictionary, functools.partial(SimCLR)])
def test_climb_acts_whichever_class_the_method_is(method: Any) -> None:
    _, _, plain = runs.train(method, simclr())
    model, _, watch = runs.train(method, simclr(climb_beta=10.0))
    assert plain.losses[0] + 300 < watch.losses[0] < plain.losses[0] + 900  # once, not twice
    (place,) = heads_in(model)
    assert re.fullmatch(r"projector\.\d\.gaussian", place)
    assert solo.methods.METHODS["simclr"] is SimCLR


def test_a_step_that_returns_none_is_skipped() -> None:
    steps = []
    for section in ({}, {"climb_beta": 0.1}):
        model, trainer, watch = runs.train(Skipping, simclr(**section), batches=3)
        steps.append((trainer.global_step, len(watch.losses)))
    assert steps[0] == steps[1]
    assert model.climb.terms.rate > 0


class Plain(pl.LightningModule):
    """No method, though somebody made it an entry of METHODS."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[1][0].mean((2, 3))).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoMethod(SimCLR):  # type: ignore[misc]
    """Of a project with names of its own that are like ours."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(simclr())
        self.cfg = {"climb_beta": 0.1, "training": {"climb_rate": 5}}


class NoMethodOfSolo(Plain):
    """With a name of solo-learn's, and hyperparameters that are like ours."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.save_hyperparameters({"method": "simclr", "climb_beta": 0.1})


@pytest.mark.parametrize("kind", [Plain, NoMethod, NoMethodOfSolo])
def test_what_is_no_method_is_left_alone(kind: Any) -> None:
    model, _, watch = runs.train(kind, simclr(climb_beta=0.1))
    assert len(watch.losses) == 2
    assert "climb" not in vars(model)
    assert heads_in(model) == []


class NoConfig(SimCLR):  # type: ignore[misc]
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.save_hyperparameters(cfg)
        del self.cfg


def test_a_method_may_keep_its_config_as_hyperparameters() -> None:
    model, _, _ = runs.train(NoConfig, simclr(climb_beta=0.1))
    assert model.climb.terms.rate > 0


class OwnOptimizer(SimCLR):  # type: ignore[misc]
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.backbone.parameters(), *self.projector.parameters()], lr=0.1)


def test_an_optimiser_of_its_own_has_head_and_prior() -> None:
    cfg = simclr(epochs=2, climb_beta=0.1, climb_prior="learned")
    model, trainer, _ = runs.train(OwnOptimizer, cfg)
    prior = model.climb.climb_priors[0]
    assert {id(p) for p in (*prior.parameters(), *model.climb.heads[0].parameters())} <= held_by(
        trainer
    )
    assert prior.mean.abs().sum() > 0


class Frozen(SimCLR):  # type: ignore[misc]
    """Lists its parameters before a Trainer sets it up."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.listed = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.listed, lr=0.1)


def test_an_optimiser_without_the_head_is_told() -> None:
    runs.train(Frozen, simclr())
    with pytest.raises(RuntimeError, match="the optimiser moves the projection head"):
        runs.train(Frozen, simclr(climb_beta=0.1))


class Manual(SimCLR):  # type: ignore[misc]
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))


def changed(name: str, change: Callable[[Any], object]) -> Any:
    """A method that is changed as soon as it is built."""

    def __init__(self: Any, cfg: Any) -> None:  # noqa: N807
        SimCLR.__init__(self, cfg)
        change(self)

    return type(name, (SimCLR,), {"__init__": __init__})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Manual, "climb_beta has no effect in Manual.*automatic_optimization=False"),
        (
            changed("Bare", lambda model: delattr(model, "projector")),
            "climb_beta has nothing to act on in Bare: it has neither a projector nor a head",
        ),
        (
            changed(
                "Wrapped",
                lambda model: setattr(model, "criterion", ClimbLoss(torch.mean, heads=[], beta=0)),
            ),
            "Wrapped has a ClimbLoss of its own, criterion",
        ),
        (
            changed("Taken", lambda model: setattr(model, "climb", nn.Linear(1, 1))),
            "Taken has an attribute climb of its own",
        ),
        (
            changed("Odd", lambda model: setattr(model, "projector", nn.Identity())),
            r"climb_beta cannot act on Odd\.projector",
        ),
        (BaseMethod, "neither a projector nor a head"),
    ],
)
def test_where_climb_cannot_act_the_method_is_refused(method: Any, message: str) -> None:
    model = method(simclr(climb_beta=0.1))  # building says nothing
    with pytest.raises(ValueError, match=message):
        runs.train(model, model.cfg)


@pytest.mark.parametrize("prior", ["view", "backward"])
def test_a_prior_of_views_needs_views(prior: str) -> None:
    with pytest.raises(
        ValueError, match=rf"climb_prior='{prior}' in ReSSL: .*'standard'"
    ) as caught:
        runs.train("ressl", runs.config("ressl", climb_beta=0.1, climb_prior=prior))
    assert "views=" not in str(caught.value)
    _, _, watch = runs.train("simclr", simclr(climb_beta=0.1, climb_prior=prior))
    assert all(map(math.isfinite, watch.losses))


# Keys.


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data__climb_beta", r"^data\.climb_beta has no effect"),
        ("climb_bta", "did you mean climb_beta"),
    ],
)
def test_a_wrong_key_ends_the_run(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.train("byol", runs.config("byol", **{key: 0.1}))


def test_the_run_says_what_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    runs.train("simclr", simclr(climb_beta=0.1, climb_alpha=0.5))
    said = capsys.readouterr().out
    assert said.count("CLIMB:") == 1
    for part in ("0.1", "alpha 0.5", "standard", "32 wide"):
        assert part in said
    runs.train("simclr", simclr(climb_beta=0))
    assert capsys.readouterr().out.count("CLIMB: off, because climb_beta=0") == 1
    runs.train("simclr", simclr())
    assert "CLIMB" not in capsys.readouterr().out


def test_a_ramp_is_laid_over_the_training() -> None:
    cfg = simclr(epochs=2, climb_beta=1.0, climb_warmup=0.5)
    _, _, watch = runs.train("simclr", cfg, batches=5)
    assert watch.betas == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])
    accumulated = simclr(epochs=2, climb_beta=1.0, climb_warmup=2)
    _, _, watch = runs.train("simclr", accumulated, batches=4, accumulate_grad_batches=2)
    assert watch.betas == pytest.approx([0, 0, 0.5, 0.5, 1, 1, 1, 1])


def test_a_ramp_that_does_not_fit_names_its_key() -> None:
    with pytest.raises(ValueError, match="climb_warmup=100: "):
        runs.train("simclr", simclr(climb_beta=1.0, climb_warmup=100))


# On and off again.


@pytest.mark.usefixtures("_registered")
def test_registering_leaves_the_methods_alone() -> None:
    assert solo.methods.METHODS["simclr"] is SimCLR
    with pytest.raises(TypeError):
        register(module=solo.methods)  # type: ignore[call-arg]


def test_looking_changes_nothing() -> None:
    def state() -> Any:
        table = {name: id(entry) for name, entry in solo.methods.METHODS.items()}
        return table, id(solo.methods.DINO), dict(vars(BaseMethod)), sorted(BaseMethod._BACKBONES)

    before = state()
    assert not hasattr(solo_learn, "wrap")
    [callback] = solo_callbacks()
    assert isinstance(callback, ClimbCallback)
    assert state() == before


def test_after_the_training_the_method_is_its_own_again() -> None:
    cfg = simclr(climb_beta=0.1, backbone="resnet18")  # a class that pickle finds
    model, trainer, _ = runs.train("simclr", cfg)
    assert not {"training_step", "on_load_checkpoint"} & vars(model).keys()
    assert model.climb.heads[0] is model.get_submodule(heads_in(model)[0])
    assert "climb" not in dict(model.named_modules())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert runs.digest(twin) == runs.digest(model)
    [callback] = [c for c in trainer.callbacks if isinstance(c, solo_learn.SoloCallback)]
    assert pickle.loads(pickle.dumps(callback)).state_dict() == callback.state_dict()


class Broken(SimCLR):  # type: ignore[misc]
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("broken")


def test_an_error_in_the_training_leaves_no_wrapper() -> None:
    model = Broken(simclr(climb_beta=0.1))
    with pytest.raises(RuntimeError, match="broken"):
        runs.train(model, model.cfg)
    assert "training_step" not in vars(model)


def test_a_second_training_of_the_same_model() -> None:
    cfg = simclr(climb_beta=1.0, climb_warmup=0.5)
    model, _, first = runs.train("simclr", cfg)
    _, _, second = runs.train(model, cfg, batches=4)
    assert first.betas == [0.0, 1.0]
    assert second.betas == [0.0, 0.5, 1.0, 1.0]
    assert len(heads_in(model)) == 1
    model.cfg.method_kwargs.climb_alpha = 1.0
    with pytest.raises(ValueError, match="build it anew"):
        runs.train(model, cfg)
    del model.cfg.method_kwargs.climb_alpha, model.cfg.method_kwargs.climb_beta
    del model.cfg.method_kwargs.climb_warmup
    with pytest.raises(ValueError, match="build it anew"):
        runs.train(model, cfg)


def unwrapped(model: Any) -> None:
    unwrap(model.climb)


def with_a_new_projector(model: Any) -> None:
    model.projector = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("change", [unwrapped, with_a_new_projector])
def test_a_second_training_puts_a_head_in_that_is_gone(change: Callable[[Any], None]) -> None:
    cfg = simclr(climb_beta=1.0)
    model, _, _ = runs.train("simclr", cfg)
    change(model)
    assert heads_in(model) == []
    _, _, second = runs.train(model, cfg)
    assert len(heads_in(model)) == 1
    assert second.betas == [1.0, 1.0]
    assert model.climb.terms.rate > 0


def test_before_a_callback_that_copies_the_method() -> None:
    first, average = solo_learn.SoloCallback(), pl.callbacks.StochasticWeightAveraging(0.05, 1)
    model, _, watch = runs.train("simclr", simclr(climb_beta=0.1, epochs=3), first, average)
    assert len(heads_in(average._average_model)) == len(heads_in(model)) == 1
    assert {*watch.betas} == {0.1}
    assert average.n_averaged > 0


def test_trainers_that_share_a_list_of_callbacks() -> None:
    kept: list[Any] = []  # as in the user's list, which Lightning extends
    for section in ({}, {"climb_beta": 0.1}, {}, {"climb_beta": 0.1}):
        model, trainer, watch = runs.train("simclr", simclr(**section), *kept)
        kept = [c for c in trainer.callbacks if isinstance(c, solo_learn.SoloCallback)]
        assert len(heads_in(model)) == len(section)
        assert watch.betas == [0.1, 0.1] * len(section)
    assert len(kept) == 4


def test_a_second_training_adapts_beta_anew() -> None:
    cfg = simclr(climb_beta=0.1, climb_target_rate=20)
    model, _, first = runs.train("simclr", cfg, batches=4)
    _, _, second = runs.train(model, cfg, batches=4)
    assert first.betas[-1] > 0.104
    assert second.betas[0] == first.betas[0] == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{"climb_warmup": 0.75}, {"climb_target_rate": 20}], ids=str)
def test_the_same_trainer_goes_on(options: dict[str, Any]) -> None:
    """As after an interrupt in a notebook."""

    def betas(*, stop: bool) -> list[float]:
        class Stop(pl.Callback):
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                trainer.should_stop = stop and trainer.current_epoch == 0

        cfg = simclr(epochs=3, climb_beta=0.1, **options)
        model, trainer, watch = runs.train("simclr", cfg, Stop(), batches=4)
        if stop:
            assert len(watch.betas) == 4
            trainer.should_stop = False
            trainer.fit(model, DataLoader(runs.Views(32, (32, 32)), batch_size=8))
        return list(watch.betas)

    whole, parts = betas(stop=False), betas(stop=True)
    assert len(parts) == 12
    if "climb_warmup" in options:
        assert parts == whole
    else:
        assert parts[4] != parts[0]


@pytest.mark.parametrize("options", [{"climb_warmup": 0.75}, {"climb_target_rate": 20}], ids=str)
def test_an_evaluation_within_the_training_changes_nothing(options: dict[str, Any]) -> None:
    class Evaluates(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            state = torch.get_rng_state()
            silent = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
            other = pl.Trainer(devices=1, limit_predict_batches=0, **silent)
            other.predict(module, DataLoader(runs.Views(8, (32, 32)), batch_size=8))
            module.trainer = trainer
            torch.set_rng_state(state)

    cfg = {"epochs": 3, "climb_beta": 0.1, **options}
    _, _, alone = runs.train("simclr", simclr(**cfg))
    _, _, watch = runs.train("simclr", simclr(**cfg), Evaluates())
    assert (watch.betas, watch.losses) == (alone.betas, alone.losses)


def test_a_copy_that_was_made_within_a_training_is_trained() -> None:
    """Its rate counts once, as that of a copy made afterwards."""

    class Keeps(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.model = copy.deepcopy(module)

    keeps = Keeps()
    model, _, _ = runs.train("simclr", simclr(climb_beta=0.1), keeps)
    after = copy.deepcopy(model)
    assert "training_step" in vars(keeps.model)
    losses = [runs.train(one, one.cfg)[-1].losses for one in (keeps.model, after)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("section", [{}, {"climb_beta": 0.1}], ids=str)
def test_a_method_is_saved_whole_within_a_training(section: Any, tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.save(module, tmp_path / "whole.pt")

    model, _, _ = runs.train("simclr", simclr(**section), Saves())
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert runs.digest(loaded) == runs.digest(model)


def test_a_search_for_the_learning_rate() -> None:
    steps = []
    for section in ({}, {"climb_beta": 0.1, "climb_warmup": 1}):
        cfg = simclr(scheduler__name="none", **section)
        finder = pl.callbacks.LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
        model, trainer, watch = runs.train("simclr", cfg, finder, batches=6)
        steps.append((trainer.global_step, len(watch.losses)))
    assert steps[0] == steps[1]
    assert model.climb.step == trainer.global_step
    assert watch.betas[0] == 0.0  # what the search has counted does not count


def test_beside_a_callback_of_the_users() -> None:
    _, trainer, alone = runs.train("simclr", simclr(climb_beta=0.1))
    _, both, watch = runs.train("simclr", simclr(climb_beta=0.1), ClimbCallback())
    assert watch.losses == alone.losses
    assert both.callback_metrics["climb_rate"] == trainer.callback_metrics["climb_rate"]


# Checkpoints.


def resumed(path: Path, cfg: Any, **options: Any) -> Any:
    """Method, Trainer, what was seen, and the warnings that speak of CLIMB."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = runs.train(cfg.method, cfg, resume=path, **options)
    return *result, [str(w.message) for w in said if "climb" in str(w.message)]


@pytest.mark.parametrize(
    "options",
    [
        {"climb_prior": "standard", "climb_warmup": 0.9},
        {"climb_prior": "learned", "climb_warmup": 0.9},
        {"climb_prior": "standard", "climb_target_rate": 20},
    ],
    ids=str,
)
def test_resuming_goes_on_with_beta_step_and_prior(tmp_path: Path, options: dict[str, Any]) -> None:
    def cfg() -> Any:
        return runs.config("dino", epochs=3, climb_beta=0.1, **options)

    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.digest, self.step = runs.digest(module), module.climb.step

    path, start = tmp_path / "first.ckpt", Start()
    _, _, whole = runs.train("dino", cfg(), runs.SaveAt(path))
    _, trainer, rest, said = resumed(path, cfg())
    assert rest.betas == whole.betas[2:]
    assert len(set(whole.betas)) > 4
    assert (said, trainer.global_step) == ([], 6)
    runs.train("dino", cfg(), start, resume=path)
    saved = torch.load(path, weights_only=True)
    parts = sorted(saved["state_dict"].items())
    content = b"".join(value.numpy().tobytes() for _, value in parts)
    assert start.digest == runs.hashlib.sha256(content).hexdigest()
    has_prior = any(key.endswith("climb_prior.mean") for key, _ in parts)
    assert has_prior == (options["climb_prior"] == "learned")


@pytest.mark.parametrize("name", ["barlow_twins", "dino", "simclr", "vicreg"])
def test_the_backward_prior_and_a_shared_variance_resume(tmp_path: Path, name: str) -> None:
    cfg = {"epochs": 3, "climb_beta": 0.01, "climb_prior": "backward", "climb_logvar": "shared"}
    path = tmp_path / "first.ckpt"
    model, _, whole = runs.train(name, runs.config(name, **cfg), runs.SaveAt(path))
    (head,), (prior,) = model.climb.heads, model.climb.climb_priors
    assert [tuple(p.shape) for p in head.logvar.parameters()] == [(32,)]
    assert not torch.equal(prior.gain, torch.ones(32))
    _, _, rest, said = resumed(path, runs.config(name, **cfg))
    assert rest.losses == whole.losses[2:]
    assert said == []
    with pytest.raises(ValueError, match="climb_logvar was shared and is linear"):
        resumed(path, runs.config(name, **{**cfg, "climb_logvar": "linear"}))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["byol", "simclr"])
def test_resuming_repeats_the_uninterrupted_run(
    tmp_path: Path, name: str, accumulated: int
) -> None:
    def train(**options: Any) -> list[float]:
        cfg = runs.config(name, epochs=3, climb_beta=0.1)
        options["accumulate_grad_batches"] = accumulated
        _, _, watch = runs.train(name, cfg, runs.SaveAt(path), batches=4, **options)
        return list(watch.losses)

    path = tmp_path / "first.ckpt"
    whole = train()
    assert train(resume=path) == whole[4:]


def test_a_longer_training_keeps_its_warm_up(tmp_path: Path) -> None:
    path, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    cfg = {"climb_beta": 0.01, "climb_warmup": 0.5}
    _, _, short = runs.train("simclr", simclr(epochs=2, **cfg), runs.SaveAt(path, 1))
    assert short.betas[-1] == 0.01
    _, _, long, said = resumed(path, simclr(epochs=8, **cfg))
    assert set(long.betas) == {0.01}
    (message,) = said
    assert "climb_warmup=0.5 stays a fraction of the 4 optimiser steps" in message
    assert "not of 16" in message
    # The checkpoint of that training still knows the length that counts.
    runs.train("simclr", simclr(epochs=4, **cfg), runs.SaveAt(second, 2), resume=path)
    _, _, _, said = resumed(second, simclr(epochs=8, **cfg))
    assert "of the 4 optimiser steps" in said[0]
    steps = {"climb_beta": 0.01, "climb_warmup": 2}
    runs.train("simclr", simclr(epochs=2, **steps), runs.SaveAt(path, 1))
    assert resumed(path, simclr(epochs=8, **steps))[-1] == []


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ({"climb_beta": 0.5}, {"climb_beta": 0.25}, r"climb_beta was 0\.5 and is 0\.25"),
        ({"climb_beta": 0.5}, {}, r"climb_beta was 0\.5 and is None"),
        ({"climb_beta": 0.5}, {"climb_beta": 0}, r"climb_beta was 0\.5 and is None"),
        (
            {"climb_beta": 0.5},
            {"climb_beta": 0.5, "climb_at": "features"},
            "climb_at was projection and is features",
        ),
        (
            {"climb_beta": 0.5},
            {"climb_beta": 0.5, "climb_prior": "learned"},
            "climb_prior was standard and is learned",
        ),
        (
            {"climb_beta": 0.5, "climb_init_std": 0.2},
            {"climb_beta": 0.5, "climb_free_nats": 1},
            "climb_free_nats was 0.0 and is 1, climb_init_std was 0.2 and is 0.1",
        ),
    ],
)
def test_other_values_on_resume_are_refused(
    tmp_path: Path, saved: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    path = tmp_path / "first.ckpt"
    runs.train("simclr", simclr(**saved), runs.SaveAt(path))
    with pytest.raises(ValueError, match=f"cannot be resumed: {message}.*name="):
        resumed(path, simclr(epochs=2, **now))


def test_another_std_at_the_start_has_no_effect_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    runs.train("simclr", simclr(climb_beta=0.5), runs.SaveAt(path))
    *_, said = resumed(path, simclr(epochs=2, climb_beta=0.5, climb_init_std=0.3))
    assert said == [
        "climb_init_std was 0.1 and is 0.3: no effect, as the head is the checkpoint's."
    ]


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_a_plain_checkpoint_gives_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prior: str
) -> None:
    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.state = copy.deepcopy(module.state_dict())

    path, start = tmp_path / "first.ckpt", Start()
    runs.train("dino", runs.config("dino"), runs.SaveAt(path))
    cfg = runs.config("dino", epochs=2, climb_beta=1e-3, climb_prior=prior)
    _, trainer, watch = runs.train("dino", cfg, start, resume=path)
    assert (len(watch.losses), trainer.global_step) == (4, 4)
    assert capsys.readouterr().out.count("its weights are taken") == 1
    saved = torch.load(path, weights_only=True)["state_dict"]
    new = {key for key in start.state if key not in saved}
    assert all(torch.equal(start.state[key], value) for key, value in saved.items())
    assert all(".gaussian." in key for key in new)


def test_a_plain_run_leaves_nothing_in_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    runs.train("dino", runs.config("dino"), runs.SaveAt(path))
    assert "climb" not in str(torch.load(path, weights_only=True)).lower()
    _, trainer, _, said = resumed(path, runs.config("dino", epochs=2))
    assert (trainer.global_step, said) == (4, [])


@pytest.mark.parametrize("at", ["projection", "features"])
def test_evaluation_needs_no_plugin(tmp_path: Path, at: str) -> None:
    path = tmp_path / "first.ckpt"
    cfg = runs.config("dino", climb_beta=1e-3, climb_at=at)
    model, _, _ = runs.train("dino", cfg, runs.SaveAt(path))
    images = torch.randn(4, 3, 32, 32)
    expected = model.eval()(images)
    # As main_knn.py and main_umap.py do.
    loaded = solo.methods.DINO.load_from_checkpoint(path, strict=False, cfg=cfg).eval()
    assert heads_in(loaded) == []
    for name in ("feats", "z"):
        assert torch.equal(loaded(images)[name], expected[name])


def test_a_trainer_evaluates_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    cfg = runs.config("dino", climb_beta=1e-3)
    runs.train("dino", cfg, runs.SaveAt(path))
    model = solo.methods.DINO(cfg)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    images = DataLoader([(torch.randn(8, 3, 32, 32), torch.arange(8))], batch_size=None)
    first = trainer.validate(model, images, ckpt_path=path, verbose=False)
    assert first == trainer.validate(model, images, ckpt_path=path, verbose=False)


def test_knn_asks_before_it_runs_code(tmp_path: Path) -> None:
    cfg = runs.config("simsiam", climb_beta=0.1)
    runs.train("simsiam", cfg, runs.SaveAt(tmp_path / "first.ckpt"))
    (tmp_path / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg)))
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path)
    assert not load(tmp_path, trusted=True).training
    with pytest.raises(FileNotFoundError, match=r"args\.json"):
        load(tmp_path / "nowhere")


# What is there before a method is built.


@pytest.fixture
def _registered() -> Iterator[None]:
    classes = (BaseMethod, LinearModel)
    before = [kind.add_and_assert_specific_cfg for kind in classes]
    compared = list(AutoResumer.SHOULD_MATCH)
    register()
    register()  # a second time is harmless
    ours = [key for key in AutoResumer.SHOULD_MATCH if key.startswith("method_kwargs.climb")]
    assert len(ours) == len(DEFAULTS)
    yield
    for kind, checked in zip(classes, before, strict=True):
        kind.add_and_assert_specific_cfg = staticmethod(checked)
    AutoResumer.SHOULD_MATCH = compared
    del BaseMethod._BACKBONES["efficientnet_b0"]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("saved", "now", "resumes"),
    [
        ({"climb_beta": 0.1}, {"climb_beta": 0.1}, True),
        ({"climb_beta": 0.1}, {"climb_beta": 0.2}, False),
        ({"climb_beta": 0.1}, {}, False),
        ({}, {"climb_beta": 0.1}, False),
        ({"temperature": 1}, {"temperature": 2}, True),  # solo-learn's own business
    ],
)
def test_auto_resume_minds_the_keys(
    tmp_path: Path, saved: dict[str, Any], now: dict[str, Any], resumes: bool
) -> None:
    (tmp_path / "x-ep=0.ckpt").touch()
    (tmp_path / "args.json").write_text(json.dumps({"name": "x", "method_kwargs": saved}))
    cfg = OmegaConf.create({"name": "x", "method_kwargs": now})
    found, _ = AutoResumer(tmp_path).find_checkpoint(cfg)
    assert (found is not None) == resumes


@pytest.mark.usefixtures("_registered")
def test_linear_evaluation_refuses_the_keys() -> None:
    cfg = simclr(climb_beta=1.0)
    with pytest.raises(ValueError, match="no effect in LinearModel"):
        LinearModel(runs.Tiny("simclr"), cfg=cfg)


@pytest.mark.usefixtures("_registered")
def test_a_wrong_key_is_told_when_the_method_is_built() -> None:
    for method in (SimCLR, Own):
        with pytest.raises(ValueError, match="did you mean climb_beta"):
            method(simclr(climb_bta=0.1))


@pytest.mark.usefixtures("_registered")
def test_efficientnet_with_the_stem_of_cifar(tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    cfg = simclr(climb_beta=1e-3, backbone="efficientnet_b0", data__dataset="cifar10")
    model, _, watch = runs.train("simclr", cfg, runs.SaveAt(path))
    assert all(map(math.isfinite, watch.losses))
    assert model.features_dim == 1280
    assert model.backbone.conv_stem.stride == (1, 1)
    assert SimCLR(simclr(backbone="efficientnet_b0")).backbone.conv_stem.stride == (2, 2)
    # As main_linear.py builds and fills it.
    backbone = BaseMethod._BACKBONES["efficientnet_b0"](method="simclr")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {k.replace("backbone.", ""): v for k, v in state.items() if "backbone" in k}
    backbone.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), model.eval().backbone(images))
