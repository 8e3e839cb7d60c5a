"""examples/cifar10_knn.py, on a few synthetic images."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "cifar10_knn.py"

# A run of a second.
TINY = {
    "backbone": "small",
    "images": 96,
    "bank": 200,
    "local_views": 1,
    "epochs": 2,
    "batch": 32,
    "optimizer": "adamw",
    "lr": 1e-3,
    "hidden": 16,
    "embedding": 8,
    "prototypes": 12,
    "every": 1,
}


@pytest.fixture(scope="module", autouse=True)
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import cifar10_knn

        yield cifar10_knn


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz as ../shared/data/README.md of the project describes it: JPEGs, one after another."""
    generator = np.random.default_rng(0)
    stored: dict[str, Any] = {}
    for part, count in (("train", 300), ("test", 40)):
        jpegs = []
        for _ in range(count):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            out = io.BytesIO()
            Image.fromarray(coarse).resize((32, 32)).save(out, "JPEG")
            jpegs.append(out.getvalue())
        stored[f"{part}_bytes"] = np.frombuffer(b"".join(jpegs), np.uint8)
        stored[f"{part}_offsets"] = np.cumsum([0, *map(len, jpegs)])
        stored[f"{part}_labels"] = np.arange(count) * 10 // count  # by class, as the real file
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **stored)
    return path


def settings(**values: Any) -> Any:
    from knn_study.settings import Settings

    return Settings(**{**TINY, **values})


@pytest.fixture
def run(file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Trains; keywords are settings, or ``deadline``."""
    from knn_study.data import load
    from knn_study.training import train

    def run(*, deadline: float = math.inf, checkpoint: str = "c.pt", **values: Any) -> Any:
        return train(
            settings(**values),
            load(file),
            device="cpu",
            checkpoint=tmp_path / checkpoint,
            deadline=deadline,
            bar=False,
        )

    return run


def measured(result: Any) -> dict[str, Any]:
    """All but the times."""
    return {k: v for k, v in asdict(result).items() if k not in ("seconds", "images_per_second")}


class TestSettings:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"method": "dinov3"}, "method must be one of dino, simclr.*got 'dinov3'"),
            ({"epochs": 0}, "epochs must be from 1 to inf, got 0"),
            ({"lr": math.nan}, "lr must be from 0 to inf, got nan"),
            ({"crop": 1.5}, "crop must be from 0 to 1, got 1.5"),
            (
                {"regulariser": "climb", "warmup": 0.2, "target_rate": 9.0},
                "warmup has no effect with target_rate",
            ),
            ({"beta": 0.1}, "beta would have no effect with regulariser='plain'"),
            ({"regulariser": "norm", "beta": 0.1, "prior": "view"}, "prior would have no effect"),
            ({"regulariser": "climb"}, "regulariser='climb' needs beta > 0"),
        ],
    )
    def test_wrong_and_idle_ones_are_refused(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            settings(**wrong)

    def test_every_setting_is_in_the_name(self) -> None:
        from knn_study.settings import Settings

        base = {"regulariser": "climb", "beta": 0.25}
        names = {Settings(**base).name}
        for entry in fields(Settings):
            choices = entry.metadata["choices"]
            other = (
                next(
                    c
                    for c in choices
                    if c not in (entry.default, "untrained", "plain", "climb", "noise")
                )
                if choices
                else min(entry.default + 1, entry.metadata["most"])
                if entry.default < entry.metadata["most"]
                else entry.default - 1
            )
            changed = {**base, entry.name: other}
            if entry.name == "regulariser":
                changed = {"regulariser": other, "beta": 0.25}
            names.add(Settings(**changed).name)
        assert len(names) == 1 + len(fields(Settings))

    def test_help_has_every_setting(self, study: ModuleType) -> None:
        from knn_study.settings import Settings

        shown = study.make_parser().format_help()
        assert all(f"--{entry.name.replace('_', '-')} " in shown for entry in fields(Settings))

    def test_the_lines_of_a_sweep(self, study: ModuleType, tmp_path: Path) -> None:
        sweep = tmp_path / "sweep.txt"
        sweep.write_text("# all\n--method simclr,byol --seed 0,1\n\n--seed 1 --method byol\n")
        args = study.make_parser().parse_args(["--sweep", str(sweep), "--epochs", "7"])
        runs = study.wanted(args)
        assert [(run.method, run.seed) for run in runs] == [
            ("simclr", 0),
            ("simclr", 1),
            ("byol", 0),
            ("byol", 1),
        ]
        assert {run.epochs for run in runs} == {7}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--beta 1", "line 2: beta would have no effect"),
            ("--betta 1", "line 2: not a setting: --betta 1"),
            ("--method dino,x", "line 2: .*invalid choice: 'x'"),
        ],
    )
    def test_a_wrong_line_of_a_sweep_is_named(
        self, study: ModuleType, tmp_path: Path, line: str, message: str
    ) -> None:
        sweep = tmp_path / "sweep.txt"
        sweep.write_text(f"--method simclr\n{line}\n")
        with pytest.raises(ValueError, match=message):
            study.wanted(study.make_parser().parse_args(["--sweep", str(sweep)]))


class TestData:
    def test_the_parts_are_disjoint_mixed_and_all_there(self, file: Path) -> None:
        from knn_study.data import load

        parts = load(file)
        sizes = [len(part.images) for part in (parts.train, parts.validation, parts.test)]
        assert sizes == [270, 30, 40]
        known = {image.numpy().tobytes() for image in parts.train.images}
        assert len(known) == 270
        assert not known & {image.numpy().tobytes() for image in parts.validation.images}
        assert len(parts.validation.labels.unique()) > 5

    def test_views_of_one_seed_are_the_same(self) -> None:
        from knn_study.data import RandomViews

        images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        draw = RandomViews(settings(), local=2)
        seen = []
        for _ in range(2):
            torch.manual_seed(3)
            seen.append(draw(images))
        assert [tuple(view.shape) for view in seen[0]] == [(6, 3, 32, 32)] * 2 + [
            (6, 3, 16, 16)
        ] * 2
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        assert not torch.equal(seen[0][0], seen[0][1])

    @pytest.mark.parametrize("pixels", [16, 24])
    def test_smaller_images(self, pixels: int) -> None:
        """Views and the images of the k-NN; the average of what falls together is kept."""
        from knn_study.data import Labelled, RandomViews

        images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        large, *_, small = RandomViews(settings(pixels=pixels), local=1)(images)
        assert large.shape == (6, 3, pixels, pixels)
        assert small.shape == (6, 3, pixels // 2, pixels // 2)
        resized = Labelled(images, torch.zeros(6)).resized(pixels).images
        assert resized.shape == (6, 3, pixels, pixels)
        means = [one.float().mean((2, 3)) for one in (images, resized)]
        torch.testing.assert_close(*means, atol=3.0, rtol=0.0)

    def test_each_image_of_a_batch_has_its_own_augmentation(self) -> None:
        from knn_study.data import RandomViews

        image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        view = RandomViews(settings(), local=0)(image.expand(8, -1, -1, -1))[0]
        assert len({one.numpy().tobytes() for one in view}) == 8

    @pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
    def test_mismatched_pairs(self, fraction: float) -> None:
        """Images of one colour each: a view keeps its mean red, of 200 levels, within a jitter."""
        from knn_study.data import RandomViews

        torch.manual_seed(0)
        draw = RandomViews(settings(mismatched=fraction), local=1)
        draw.large = draw.small = torch.nn.Identity()
        images = torch.arange(2000, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        first, *others = draw(images)
        for view in others:
            other = view[:, 0, 0, 0] != first[:, 0, 0, 0]
            assert torch.equal(other, draw.wrong)
            share = other.float().mean().item()
            assert share == pytest.approx(fraction, abs=3 * math.sqrt(0.25 / 2000))


BACKBONES = {
    "small": 128,
    "residual": 128,
    "resnet18": 512,
    "resnet50": 2048,
    "efficientnet_b0": 1280,
}


@pytest.mark.parametrize(("name", "width"), BACKBONES.items())
def test_backbones_take_small_images(name: str, width: int) -> None:
    from knn_study.methods import make_backbone

    network, features = make_backbone(name)
    assert features == width
    for size in (32, 16):
        assert network(torch.randn(2, 3, size, size)).shape == (2, width)


METHODS = ("dino", "simclr", "byol", "moco", "simsiam", "barlowtwins", "vicreg", "swav")
TEACHERS = {method: {"teacher"} for method in ("dino", "byol", "moco")}
REGULARISED: dict[str, dict[str, Any]] = {
    "plain": {},
    "projection": {"regulariser": "climb", "beta": 1e-2, "alpha": 0.5},
    "features": {"regulariser": "climb", "beta": 1e-2, "at": "features", "prior": "view"},
}


@pytest.mark.parametrize("regularised", REGULARISED.values(), ids=REGULARISED)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(
    run: Callable[..., Any], method: str, regularised: dict[str, Any]
) -> None:
    result = run(method=method, **regularised)
    accuracies = [result.test, *({w: v[-1] for w, v in result.validation.items()},)]
    for known in accuracies:
        assert set(known) == {"student", "embedding"} | TEACHERS.get(method, set())
        assert all(0 <= accuracy <= 100 for accuracy in known.values())
    assert len(result.base_loss) == 2
    assert all(map(math.isfinite, result.base_loss))
    assert len(result.rate) == (2 if regularised else 0)
    assert all(rate > 0 for rate in result.rate)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_networks(
    precision: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knn_study import training
    from knn_study.data import load

    values = {"regulariser": "climb", "beta": 1e-3, "precision": precision}
    run = training._Run(settings(**values), load(file), "cpu")
    seen: dict[str, set[torch.dtype]] = {"networks": set(), "loss": set()}
    for network in (run.learner.backbone, run.learner.teacher_backbone):
        network.register_forward_hook(lambda *call: seen["networks"].add(call[-1].dtype))
    run.criterion.register_forward_pre_hook(
        lambda _, args: seen["loss"].update(view.dtype for views in args for view in views)
    )
    with training.tqdm(disable=True) as progress:
        run.epoch(0, progress)
    assert seen == {"networks": {getattr(torch, precision)}, "loss": {torch.float32}}
    assert all(p.dtype == torch.float32 for p in run.learner.parameters())


@pytest.mark.parametrize("options", [{}, {"regulariser": "climb", "beta": 1e-3}], ids=str)
@pytest.mark.parametrize("method", ["dino", "simclr"])
def test_twins_begin_alike_and_see_the_same_views(
    method: str, options: dict[str, Any], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knn_study import training
    from knn_study.data import load

    def trained(**values: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        run = training._Run(settings(method=method, **values), load(file), "cpu")
        start = {name: value.clone() for name, value in run.learner.state_dict().items()}
        seen: list[Tensor] = []
        run.learner.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with training.tqdm(disable=True) as progress:
            run.epoch(0, progress)
        return seen, start

    monkeypatch.setattr(training._Run, "_knn", lambda self, asked: {"student": 0.0})
    monkeypatch.setattr(training, "robustness", lambda *_: {})
    plain, before = trained()
    views, start = trained(**options)
    assert len(plain) == 3 * (3 if method == "dino" else 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, views, strict=True))
    assert all(torch.equal(value, start[name]) for name, value in before.items())
    assert (start.keys() != before.keys()) == bool(options)


def test_the_untrained_network_is_the_twin_before_its_first_step(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """All but the statistics of the batch norms is as it was drawn."""
    run(method="dino", regulariser="untrained")
    from knn_study.methods import Learner

    torch.manual_seed(0)
    before = Learner(settings(method="dino"))
    after = torch.load(tmp_path / "c.pt")["learner"]
    for name, value in before.named_parameters():
        torch.testing.assert_close(
            value.data, after[name], rtol=1e-5, atol=1e-7
        )  # teacher: m + 1-m
    moved = [name for name, value in before.named_buffers() if not torch.equal(value, after[name])]
    assert any(name.endswith("running_mean") for name in moved)


def test_a_standardised_feature_has_no_scale_of_its_own(file: Path) -> None:
    from knn_study.methods import Learner

    learner = Learner(settings(method="simclr", standardised=1, regulariser="plain"))
    seen: list[Tensor] = []
    learner.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    learner([100 * torch.randn(64, 3, 32, 32) for _ in range(2)])
    torch.testing.assert_close(seen[0].detach().mean(0), torch.zeros(128), atol=1e-5, rtol=0.0)
    assert seen[0].detach().std(0).median() == pytest.approx(1.0, abs=0.05)


class TestMeasures:
    def test_the_nearest_neighbours_vote(self) -> None:
        from knn_study.measures import accuracy

        axes = torch.eye(10)
        labels = torch.arange(10)
        assert accuracy(axes, labels, axes.repeat(5, 1), labels.repeat(5)) == 100
        assert accuracy(axes, labels, axes.repeat(5, 1), (labels + 1).repeat(5) % 10) == 0

    def test_few_labels_are_of_each_class_and_noise_is_the_same_in_every_run(self) -> None:
        from knn_study.data import Labelled
        from knn_study.measures import robustness

        part = Labelled(
            torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8), torch.arange(600) % 10
        )
        seen: list[Tensor] = []

        def encode(images: Labelled) -> Tensor:
            seen.append(images.images)
            return torch.nn.functional.one_hot(images.labels, 10).float()

        for _ in range(2):
            found = robustness(encode, part, part)
            assert found == {
                "5 labels a class": 100,
                "50 labels a class": 100,
                "queries noisy": 100,
                "queries grey": 100,
            }
        assert torch.equal(seen[2], seen[6])
        noise = (seen[2].float() - part.images.float()).abs().mean()
        assert 5 < noise < 20
        assert (seen[3].float().std(1) == 0).all()


class TestPairs:
    def test_right_and_wrong_pairs_against_a_loop(self) -> None:
        """DINO with a head, whose rates and choices are computed here image by image."""
        from lightly.loss import DINOLoss

        from climb_plugin import ClimbLoss, GaussianHead
        from climb_plugin.gaussian import kl_to_standard_normal
        from knn_study.pairs import Pairs

        torch.manual_seed(0)
        head, loss = GaussianHead(4), DINOLoss(4, teacher_temp=0.1)
        criterion = ClimbLoss(loss, heads=head, beta=1e-2)
        pairs = Pairs(criterion, loss)
        wrong = torch.tensor([True, False, False, True, False])
        expected: dict[str, list[float]] = {}
        for _ in range(3):
            with torch.no_grad():
                head(torch.randn(5, 4))  # an evaluation between the steps
            inputs = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
            student = [head(one) for one in inputs]
            teacher = [torch.randn(5, 4) for _ in range(2)]
            target = [one - loss.center.flatten() for one in teacher]
            criterion(teacher, student)
            pairs.step((teacher, student), wrong, 0.1)
            rates = [kl_to_standard_normal(*head.posterior(one.detach())) for one in inputs[:2]]
            for i, kind in enumerate("right" if not one else "wrong" for one in wrong):
                expected.setdefault(f"rate {kind}", []).append(
                    (rates[0][i] + rates[1][i]).item() / 2
                )
                agree = [int(target[a][i].argmax() == student[1 - a][i].argmax()) for a in (0, 1)]
                expected.setdefault(f"agreement {kind}", []).append(sum(agree) / 2)
        found = pairs.means()
        for name, values in expected.items():
            assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert 0 < found["teacher entropy of rows"] <= found["teacher entropy of the mean"] <= 1
        assert pairs.means() == {}


def test_scores_of_swav_are_cosines() -> None:
    from knn_study.methods import Learner

    torch.manual_seed(0)
    learner = Learner(settings(method="swav"))
    with torch.no_grad():
        learner.head.layers[-1].weight.mul_(100)
    (scores,) = learner([torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)])
    # But for the bias that the prototypes have, below 1 / sqrt(8).
    assert all(score.abs().max() <= 1.36 for score in scores)


class TestRegularisers:
    def losses(self, **values: Any) -> tuple[Any, Any, list[Tensor]]:
        from knn_study.methods import METHODS, Learner
        from knn_study.regularisers import regularised

        torch.manual_seed(0)
        chosen = settings(method="simclr", **values)
        learner = Learner(chosen)
        loss = METHODS["simclr"].loss(chosen)
        criterion = regularised(loss, learner, chosen, steps=4)
        images = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return criterion, learner, list(images)

    @pytest.mark.parametrize("at", ["projection", "features"])
    def test_norm_and_invariance(self, at: str) -> None:
        """Against the embeddings that are computed here."""
        for name in ("norm", "invariance"):
            criterion, learner, views = self.losses(regulariser=name, beta=0.5, at=at)
            for step in ([view**3 for view in views], views):  # the first must be forgotten
                outputs = learner(step)
                total = criterion(*outputs)
            one, two = [
                learner.backbone(v) if at == "features" else learner.head(learner.backbone(v))
                for v in views
            ]
            expected = {
                "norm": (one.square().sum(1) + two.square().sum(1)).mean() / 4,
                "invariance": (one - two).square().sum(1).mean(),
            }[name]
            torch.testing.assert_close(total, criterion.loss(*outputs) + 0.5 * expected)

    def test_noise_has_no_term(self) -> None:
        criterion, learner, views = self.losses(regulariser="noise", init_std=0.3)
        total = criterion(*learner(views))
        assert torch.equal(total, criterion.terms.base)
        assert criterion.terms.rate > 0
        assert criterion.terms.beta == 0
        total.backward()
        assert criterion.heads[0].logvar.weight.grad is not None

    @pytest.mark.parametrize("regulariser", ["noise", "climb"])
    def test_a_fixed_std_stays(
        self, run: Callable[..., Any], regulariser: str, tmp_path: Path
    ) -> None:
        options = {"beta": 0.01} if regulariser == "climb" else {}
        moved = []
        for fixed in (0, 1):
            path = tmp_path / f"{fixed}.pt"
            run(
                method="simclr",
                regulariser=regulariser,
                fixed_std=fixed,
                checkpoint=path,
                **options,
            )
            learner = torch.load(path)["learner"]
            (weight,) = (value for key, value in learner.items() if key.endswith("logvar.weight"))
            moved.append(weight.abs().sum().item())  # zero at the start
        assert moved[0] > 0
        assert moved[1] == 0

    def test_decay_is_that_of_the_optimiser(self, file: Path) -> None:
        from knn_study.data import load
        from knn_study.training import _Run

        for more in (0.0, 0.25):
            options = {"regulariser": "decay", "beta": more} if more else {}
            run = _Run(settings(method="simclr", weight_decay=0.5, **options), load(file), "cpu")
            assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.5 + more}


def test_a_look_at_the_accuracy_changes_no_training(run: Callable[..., Any]) -> None:
    """With every regulariser; with looks after the first epoch, and with none."""
    for options in (
        {},
        {"regulariser": "climb", "beta": 1e-2},
        {"regulariser": "noise"},
        {"regulariser": "norm", "beta": 0.1},
        {"regulariser": "invariance", "beta": 0.1},
        {"regulariser": "decay", "beta": 0.1},
    ):
        looked, blind = (
            run(method="dino", **options, epochs=3, every=every, checkpoint=f"{every}-{options}.pt")
            for every in (1, 3)
        )
        assert looked.base_loss == blind.base_loss, options
        assert looked.test == blind.test, options


def code() -> str:
    from knn_study import lines

    return lines.code()


def test_the_fingerprint_of_the_code_follows_linked_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knn_study import lines

    real, linked = tmp_path / "real", tmp_path / "linked"
    for folder in (real / "inner", linked):
        folder.mkdir(parents=True)
    for path in (real / "__init__.py", real / "inner" / "some.py"):
        path.write_text("x = 1")
    for name in ("__init__.py", "inner"):
        (linked / name).symlink_to(real / name)
    seen = []
    for change in ("x = 1", "x = 2"):
        (real / "inner" / "some.py").write_text(change)
        for folder in (real, linked):
            package = SimpleNamespace(__file__=str(folder / "__init__.py"))
            monkeypatch.setattr(lines, "climb_plugin", package)
            seen.append(lines.code.__wrapped__())
    assert seen[0] == seen[1] != seen[2] == seen[3]


STOPPED = {"method": "moco", "regulariser": "climb", "beta": 1e-2, "epochs": 3}


class TestResume:
    def test_a_stopped_run_goes_on_as_if_it_had_not_been(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """MoCo has a memory bank, a teacher, and a momentum that depends on the step."""
        from knn_study import training

        whole = run(**STOPPED, checkpoint="whole.pt")
        for done in (1, 2):
            times = iter([0.0] * done + [2.0])
            with monkeypatch.context() as patch:
                patch.setattr(training.time, "monotonic", times.__next__)
                with pytest.raises(training.OutOfTimeError):
                    run(**STOPPED, deadline=1.0, checkpoint=f"{done}.pt")
            again = run(**STOPPED, checkpoint=f"{done}.pt")
            assert measured(again) == measured(whole)

    @pytest.mark.parametrize("damage", ["cut", "other", "empty"])
    def test_a_damaged_checkpoint_is_refused_and_left(
        self, run: Callable[..., Any], tmp_path: Path, damage: str
    ) -> None:
        path = tmp_path / "c.pt"
        run(method="simclr")
        whole = path.read_bytes()
        if damage == "other":
            torch.save({"epoch": 3}, path)
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is not a whole checkpoint of this script"):
            run(method="simclr")
        assert path.read_bytes() == before

    def test_a_checkpoint_of_other_settings_or_images_is_refused(
        self, run: Callable[..., Any], file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from knn_study.data import load

        run(method="simclr")
        with pytest.raises(ValueError, match="was made with other settings"):
            run(method="simclr", seed=1)
        monkeypatch.setitem(vars(load(file)), "fingerprint", "other")
        with pytest.raises(ValueError, match=r"was made on .*: use another --out"):
            run(method="simclr")

    def test_a_run_that_goes_on_with_other_code_names_both(
        self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from knn_study import training

        times = iter([0.0, 2.0])
        with monkeypatch.context() as patch:
            patch.setattr(training.time, "monotonic", times.__next__)
            with pytest.raises(training.OutOfTimeError):
                run(**STOPPED, deadline=1.0)
        monkeypatch.setattr(training, "code", lambda: "other")
        assert run(**STOPPED).code == f"{code()}+other"

    def test_a_killed_process(self, file: Path, tmp_path: Path) -> None:
        """SIGKILL between the first checkpoint and the end; the next start ends with the same."""
        lines = []
        for name in ("whole", "killed"):
            out = tmp_path / name / "runs.jsonl"
            command = [sys.executable, str(SCRIPT), *words(data=file, out=out), *words(**TINY)]
            command += words(method="simclr", epochs=6, regulariser="climb", beta=0.01)
            if name == "killed":
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                while not list(out.parent.glob(".*.pt")):
                    assert process.poll() is None, process.communicate()[1].decode()
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                assert process.returncode == -signal.SIGKILL
                assert not out.exists()
            subprocess.run(command, check=True, capture_output=True)
            lines.append(json.loads(out.read_text()))
            assert os.listdir(out.parent) == ["runs.jsonl"]
        for line in lines:
            del line["seconds"], line["images_per_second"]
        assert lines[0] == lines[1]


def sweep_of(lines: str, folder: Path, file: Path, **options: Any) -> tuple[Path, list[str]]:
    """Where the runs of a sweep come to, and the arguments that start it."""
    sweep, out = folder / "sweep.txt", folder / "runs.jsonl"
    sweep.write_text(lines)
    return out, words(data=file, out=out, sweep=sweep, **{**TINY, **options})


def words(**options: Any) -> list[str]:
    found = []
    for name, value in options.items():
        found += ["--" + name.replace("_", "-"), str(value)]
    return found


class TestRuns:
    def test_a_sweep_stops_at_its_time_and_goes_on(
        self, study: ModuleType, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = "--method simclr --seed 0,1\n--regulariser norm --beta 0.1\n"
        out, common = sweep_of(lines, tmp_path, file, method="byol")
        assert study.main([*common, "--time-limit", "0"]) == 1
        assert not out.exists()
        assert study.main(common) == 0
        assert len(out.read_text().splitlines()) == 3
        capsys.readouterr()
        # As a kill leaves it between the line and the end of the run.
        left = out.parent / f".{out.stem}-{json.loads(out.read_text().splitlines()[1])['name']}.pt"
        left.touch()
        assert study.main(common) == 0
        assert not left.exists()
        said = capsys.readouterr().out
        assert "3 of 3 runs are in" in said
        assert "| byol | norm, beta 0.1 | 1 |" in said
        assert "k-NN accuracy of the teacher" in said
        assert len(out.read_text().splitlines()) == 3

    def test_several_at_once_write_whole_lines(
        self, study: ModuleType, file: Path, tmp_path: Path
    ) -> None:
        from knn_study.records import read

        out, arguments = sweep_of("--method simclr,simsiam --seed 0,1\n", tmp_path, file, jobs=2)
        assert study.main(arguments) == 0
        assert len({record["name"] for record in read(out)}) == 4

    def test_a_killed_script_leaves_no_process_behind(self, file: Path, tmp_path: Path) -> None:
        """Which would write into the checkpoints of the next one."""
        lines = "--method simclr --epochs 10000 --seed 0,1\n"
        _, arguments = sweep_of(lines, tmp_path, file, jobs=2)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while len(list(tmp_path.glob(".*.pt"))) < 2:
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
            # Read to its end, which is when the last process that has it is gone.
            process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def test_more_images_than_there_are(self, run: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match="images=96 and bank=271, but there are 270 images"):
            run(method="simclr", bank=271)

    @pytest.mark.parametrize("options", [{}, {"regulariser": "climb", "beta": 1e-3}], ids=str)
    def test_a_run_that_diverges_is_a_result_and_the_sweep_goes_on(
        self,
        study: ModuleType,
        file: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: dict[str, Any],
    ) -> None:
        lines = "--lr 1e30,1e-3\n"
        out, arguments = sweep_of(lines, tmp_path, file, method="simclr", **options)
        for _ in range(2):
            assert study.main(arguments) == 0
            said = capsys.readouterr()
            assert len(out.read_text().splitlines()) == 2
            assert "Not in the table: simclr," in said.out
            assert "| 1 |" in said.out
        assert not list(tmp_path.glob(".*"))

    def test_a_run_that_is_refused_leaves_the_rest_of_the_sweep(
        self, study: ModuleType, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, arguments = sweep_of("--bank 271,200\n", tmp_path, file, method="simclr")
        assert study.main(arguments) == 1
        assert "was not run: images=96 and bank=271" in capsys.readouterr().err
        assert len(out.read_text().splitlines()) == 1

    def test_a_line_that_was_cut_short(self, tmp_path: Path) -> None:
        from knn_study import lines, records

        path = tmp_path / "runs.jsonl"
        lines.append(line(seed=0), path)
        with path.open("a") as file:
            file.write('{"name": "cut')
        lines.append(line(seed=1), path)
        with pytest.raises(ValueError, match=r"line 2 of .* is no record .* remove that line"):
            records.read(path)
        whole = path.read_text().splitlines()
        path.write_text("\n".join([whole[0], whole[2]]))
        assert [record["settings"]["seed"] for record in records.read(path)] == [0, 1]


def line(
    validation: float = 50.0, test: float = 50.0, rate: float = 3.0, **values: Any
) -> dict[str, Any]:
    """A record."""
    chosen = settings(**{"method": "simclr", **values})
    return {
        "name": chosen.name,
        "settings": asdict(chosen),
        "epoch": [1, 2],
        "validation": {"student": [0.0, validation]},
        "test": {"student": test},
        "rate": [] if chosen.regulariser == "plain" else [rate],
        "seconds": 10.0,
        "device": "CPU",
        "versions": {"torch": "2"},
        "revision": "abc",
    }


CLIMB = {"regulariser": "climb", "beta": 0.01}


class TestReport:
    def cells(self, *records: dict[str, Any]) -> dict[str, list[str]]:
        from knn_study.report import table

        rows = [row.strip("| ").split(" | ") for row in table(records).splitlines() if "|" in row]
        return {row[0]: row[1:] for row in rows[2:]}

    def test_a_gain_is_paired_by_seed(self) -> None:
        """Means 50, 51 and 42, 52: the gain is of seeds 0 and 1 alone, whatever the order."""
        known = [
            line(50, 60, seed=0),
            line(54, 62, seed=1),
            line(54.5, 62.5, seed=1, **CLIMB),
            line(51.5, 61.5, seed=0, **CLIMB),
            line(10, 10, seed=2, **CLIMB),
        ]
        climb = self.cells(*known)["climb, beta 0.01"]
        assert climb[:2] == ["3", "38.67 ± 24.87"]
        assert climb[2] == "+1.00 ± 0.71"
        assert climb[5] == "+1.00 ± 0.71"
        assert climb[7] == "3.00 ± 0.00"

    @pytest.mark.parametrize(
        ("gains", "said"),
        [
            ((2.0, 0.0), "+1.00 ± 1.41: none"),
            ((-3.0, -2.0), "-2.50 ± 0.71"),
            ((2.0,), "+2.00"),  # one seed has no spread
        ],
    )
    def test_a_gain_is_one_beyond_its_spread(self, gains: tuple[float, ...], said: str) -> None:
        known = [line(50, seed=seed) for seed in range(len(gains))]
        known += [line(50 + gain, seed=seed, **CLIMB) for seed, gain in enumerate(gains)]
        assert self.cells(*known)["climb, beta 0.01"][2] == said

    def test_a_twin_has_the_same_training(self) -> None:
        known = self.cells(line(50, lr=1e-3), line(52, lr=2e-3, **CLIMB))
        assert known["0.002"][3] == ""

    def test_the_best_epoch_is_that_of_each_seed(self) -> None:
        early = {**line(seed=0), "validation": {"student": [60.0, 50.0]}}
        late = {**line(seed=1), "validation": {"student": [40.0, 52.0]}}
        assert self.cells(early, late)["plain"][1] == "51.00 ± 1.41"
        assert self.cells(early, late)["plain"][3] == "56.00 ± 5.66"

    def test_choices_are_made_without_the_test_images(self) -> None:
        from knn_study.report import choices

        shown = choices([line(50), line(52, **CLIMB)]).splitlines()
        assert "test" not in shown[0]
        assert "| climb, beta 0.01 | 1 | 52.00 | +2.00 | 52.00 |" in shown[3]

    def test_a_twin_of_other_code_or_images_is_said(self) -> None:
        from knn_study.report import table

        said = "Runs with a twin of other code or images: 1."
        plain, climb = line(50), line(52, **CLIMB)
        assert said not in table([plain, climb])
        for name in ("code", "data"):
            assert said in table([plain, {**climb, name: "other"}])

    def test_a_run_that_is_there_twice_is_refused(self) -> None:
        from knn_study.report import table

        with pytest.raises(ValueError, match=r"two lines of simclr-plain-.*: remove one"):
            table([line(50), line(51)])

    def test_nothing_is_measured(self) -> None:
        from knn_study.report import table

        assert table([]) == "No runs with a student."

    def test_tables_of_a_report(self, study: ModuleType, tmp_path: Path) -> None:
        from knn_study import lines

        for record in (line(50), line(52, **CLIMB), line(40, method="byol")):
            lines.append(record, tmp_path / "runs.jsonl")
        path = tmp_path / "report.md"
        path.write_text(
            "# A\n<!-- table: runs.jsonl --method simclr -->\nold\n<!-- end -->\nB\n"
            "<!-- table: runs.jsonl --method byol ; --beta 0.01 -->\n<!-- end -->\n"
            "<!-- plot: plot.png runs.jsonl -->\n<!-- curves: curves.png runs.jsonl -->\n"
            "<!-- differences: over.png runs.jsonl -->\n<!-- region: region.png runs.jsonl -->\n"
        )
        assert study.main(["--report", str(path)]) == 0
        text = path.read_text()
        assert text.startswith("# A\n<!-- table: runs.jsonl --method simclr -->\n| regulariser |")
        assert "\n<!-- end -->\n<!-- plot: plot.png runs.jsonl -->\n" in text
        assert "old" not in text
        first, second = text.split("\nB\n")
        assert "byol" not in first
        assert "| climb, beta 0.01 | 1 | 52.00 | +2.00 |" in first
        # Twins are looked for in the whole file.
        assert "| simclr | climb, beta 0.01 | 1 | 52.00 | +2.00 |" in second
        assert "| byol | plain | 1 | 40.00 |  |" in second
        for name in ("plot.png", "curves.png", "over.png", "region.png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.width > 400
        assert study.main(["--report", str(path)]) == 0
        assert path.read_text() == text

    def test_a_report_of_a_file_that_is_not_there(self, study: ModuleType, tmp_path: Path) -> None:
        path = tmp_path / "report.md"
        path.write_text("<!-- table: runs.jsonl -->\n<!-- end -->\n")
        with pytest.raises(SystemExit):
            study.main(["--report", str(path)])
        assert path.read_text() == "<!-- table: runs.jsonl -->\n<!-- end -->\n"


class TestVerdicts:
    SPREAD = (-0.3, 0.1, 0.2, -0.1, 0.3, 0.0, -0.2, 0.1)

    def runs(self, accuracy: float, sign: int = 1, **values: Any) -> list[dict[str, Any]]:
        """A record for each of the seeds 3 to 10, with one spread over them."""
        return [
            line(accuracy + sign * noise, accuracy + sign * noise, seed=seed, **values)
            for seed, noise in enumerate(self.SPREAD, 3)
        ]

    def known(
        self, gain: float, *, best: float = 0.0, untrained: float = 20.0, test: float = 0.0
    ) -> list[dict[str, Any]]:
        plain = self.runs(50.0, 0)
        for one in plain:
            one["validation"] = {"student": [50.0 + best, 50.0]}
        climb = self.runs(50.0 + gain, **CLIMB)
        for one in climb:
            one["test"]["student"] += test
        return [*plain, *self.runs(untrained, 0, regulariser="untrained"), *climb]

    def rows(self, known: list[dict[str, Any]], name: str = "climb") -> list[list[str]]:
        from knn_study.verdicts import verdicts

        rows = [row.strip("| ").split(" | ") for row in verdicts(known).splitlines()]
        return [row for row in rows if any(cell.startswith(name) for cell in row)]

    def verdict(self, known: list[dict[str, Any]], name: str = "climb") -> str:
        (row,) = self.rows(known, name)
        return row[-1].strip(" |")

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"gain": 1.0}, "gain, no rival"),
            ({"gain": -1.0}, "loss"),
            ({"gain": 0.05}, "none"),
            ({"gain": 1.0, "best": 1.5}, "none: not over plain's best epoch"),
            ({"gain": 1.0, "untrained": 52.0}, "none: not over the untrained network"),
            ({"gain": 1.0, "test": -2.0}, "none: not on the test images"),
        ],
    )
    def test_a_gain_is_one_over_all(self, values: dict[str, Any], said: str) -> None:
        assert self.verdict(self.known(**values)) == said

    def test_what_is_not_finished_has_no_verdict(self) -> None:
        known = self.known(1.0)
        assert self.verdict(known[:-1]) == "open: fewer than 8 seeds"
        assert self.verdict(known[8:]) == "open: no plain twin"
        assert self.verdict(known[:8] + known[9:]) == "open: fewer than 8 untrained networks"
        other = {**known[-1], "code": "other"}
        assert self.verdict([*known[:-1], other]) == "open: plain has other code or images"

    def test_there_are_no_runs_yet(self) -> None:
        from knn_study.verdicts import verdicts

        chosen = [line(52.0, seed=seed, **CLIMB) for seed in range(3)]
        assert verdicts([]) == verdicts(chosen) == "No runs to decide on yet."

    def test_runs_that_diverged(self) -> None:
        known = self.known(1.0)
        failed = {"error": "the loss is nan", "test": {}, "validation": {}, "rate": []}
        assert self.verdict([*known[:-1], {**known[-1], **failed}]) == "none: seed 10 diverged"
        diverged = [{**known[0], **failed}, *known[1:]]
        assert self.verdict(diverged) == "open: plain diverged with seed 3"

    def test_seeds_that_choose_or_are_added_do_not_count(self) -> None:
        more = [line(90.0 * c, seed=s, **(CLIMB if c else {})) for s in (2, 11) for c in (0, 1)]
        assert self.rows(self.known(1.0)) == self.rows(self.known(1.0) + more)

    def test_a_plain_twin_may_be_looked_at_more_often(self) -> None:
        known = self.known(1.0)
        for one in known[-8:]:
            one["settings"]["every"] = 2
        assert self.verdict(known) == "gain, no rival"

    @pytest.mark.parametrize(
        ("noise", "said"),
        [
            (50.2, "gain of the rate"),
            (49.0, "gain of the rate"),  # though plain is above it
            (53.0, "gain, not over the rival"),
        ],
    )
    def test_a_gain_of_the_rate_is_one_over_the_best_rival(self, noise: float, said: str) -> None:
        """The rival here is the noise alone."""
        known = self.known(2.0) + self.runs(noise, -1, regulariser="noise")
        assert self.verdict(known) == said
        (row,) = self.rows(known)
        assert row[-3].endswith(": noise")
        (row,) = self.rows(known, "noise")
        assert row[-3:-1] == ["", ""]  # no second test of a control

    def test_a_rival_has_to_be_finished(self) -> None:
        known = self.known(2.0) + self.runs(50.2, -1, regulariser="noise")[:3]
        assert self.verdict(known) == "gain, rivals open"

    def test_a_rival_has_the_same_pairs(self) -> None:
        """DINO with another temperature is a rival; DINO with more right pairs is none."""
        known = self.known(2.0)
        easier = self.runs(60.0, mismatched=0.2, teacher_temperature=0.07)
        assert self.verdict(known + easier) == "gain, no rival"
        remedy = self.runs(52.5, -1, teacher_temperature=0.07)
        assert self.verdict(known + remedy) == "gain, not over the rival"
        (row,) = self.rows(known + remedy)
        assert row[-3].endswith(": plain, teacher temperature 0.07")

    def test_holm_looks_at_the_lines_over_plain(self) -> None:
        """A p of 0.03 is below 0.05 alone, and not beside another line, finished or not."""
        from knn_study.verdicts import holm, p_value

        values = [x + 0.17 for x in self.SPREAD]
        assert p_value(values) < 0.05
        assert holm([p_value(values), 0.9])[0] == pytest.approx(2 * p_value(values))
        known = self.known(0.17)
        assert self.verdict(known) == "gain, no rival"
        noise = self.runs(50.0, -1, regulariser="noise")
        for runs in (noise, noise[:2]):
            assert self.verdict(known + runs) == "none"

    def test_the_interval_against_scipy(self) -> None:
        from scipy import stats

        (cells,) = self.rows(self.known(1.0))
        values = np.array(self.SPREAD) + 1
        half = stats.t.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)
        low, high = values.mean() - half, values.mean() + half
        assert cells[2] == f"{values.mean():+.2f} [{low:.2f}, {high:.2f}]"


class TestCells:
    """What became of the cells of a grid: here teacher momentum 0.9 and 0.99."""

    def run(self, accuracy: float, seed: int = 0, loss: float = 1.0, **values: Any) -> Any:
        made = line(accuracy, seed=seed, method="dino", **values)
        return {**made, "base_loss": [9.0, loss]}

    def cells(self, records: list[Any]) -> dict[str, list[str]]:
        """The lines, by their first cells; the second table's begin with the contender."""
        from knn_study.cells import cells

        rows = [r.strip("|").split("|") for r in cells(records).splitlines() if r]
        return {" ".join(map(str.strip, row[:2])): [*map(str.strip, row[2:])] for row in rows}

    def grid(self) -> list[Any]:
        uniform = math.log(TINY["prototypes"]) - 0.04
        known = []
        for seed in (0, 1):
            known += [
                self.run(30, seed, regulariser="untrained"),
                self.run(40 + seed, seed, momentum=0.99),
                self.run(31, seed, uniform, momentum=0.9),
                self.run(29, seed, momentum=0.99, **CLIMB),
                self.run(42, seed, momentum=0.9, **CLIMB),
            ]
        return known

    def test_each_says_how_it_ended(self) -> None:
        shown = self.cells(self.grid())
        assert shown["wrong pairs momentum"] == ["teacher temperature", "plain", "climb, beta 0.01"]
        assert shown["0 0.9"] == ["0.04", "31.00 ± 0.00, uniform 2 of 2", "42.00 ± 0.00"]
        assert shown["0 0.99"] == ["0.04", "40.50 ± 0.71", "29.00 ± 0.00, collapsed 2 of 2"]

    def test_hours_stand_below(self) -> None:
        from knn_study.cells import cells

        assert (
            cells(self.grid()).splitlines()[-1].startswith("10 runs, 0.0 hours in all, median 10 s")
        )

    def test_mean_worst_and_number(self) -> None:
        shown = self.cells(self.grid())
        assert shown["mean of 2 cells "] == ["", "35.75", "35.50"]
        assert shown["worst of 2 cells "] == ["", "31.00", "29.00"]
        assert shown["collapsed of 2 cells "] == ["", "0", "1"]

    def test_a_run_that_diverged_is_as_good_as_the_untrained_network(self) -> None:
        known = self.grid()
        for one in known:
            if one["settings"]["regulariser"] == "plain" and one["settings"]["momentum"] == 0.99:
                one.update(error="the loss is nan", test={}, validation={}, base_loss=[])
        shown = self.cells(known)
        assert shown["0 0.99"][1] == "30.00 ± 0.00, collapsed 2 of 2"
        assert shown["mean of 2 cells "] == ["", "30.50", "35.50"]

    def test_a_loss_above_ln_k_is_not_uniform(self) -> None:
        known = [self.run(40, loss=math.log(TINY["prototypes"]) + 0.06)]
        assert self.cells(known)["0 0.99"] == ["0.04", "40.00"]

    def test_other_differences_are_refused(self) -> None:
        with pytest.raises(ValueError, match="plain is twice in the cell 0"):
            self.cells([*self.grid(), self.run(40, momentum=0.99, hidden=8)])

    def test_cells_that_a_contender_lacks_are_in_no_mean(self) -> None:
        known = [one for one in self.grid() if one["settings"]["regulariser"] != "climb"]
        known += [self.run(42, momentum=0.9, **CLIMB)]
        shown = self.cells(known)
        assert shown["0 0.99"] == ["0.04", "40.50 ± 0.71", ""]
        # One seed of two is not enough.
        assert "mean of 1 cells " not in shown
        known += [self.run(42, 1, momentum=0.9, **CLIMB)]
        assert self.cells(known)["mean of 1 cells "] == ["", "31.00", "42.00"]

    def test_the_best_is_compared_with_the_best_of_dinos_own(self) -> None:
        shown = self.cells(self.grid())
        assert shown["0 plain"] == ["0.99", "0.04", "40.50 ± 0.71", ""]
        assert shown["0 climb, beta 0.01"] == ["0.9", "0.04", "42.00 ± 0.00", "+1.50"]


class TestCandidates:
    """Which cells of CLIMB are confirmed over DINO's best one: here two momenta, 20 % wrong."""

    CONFIRMED = (2.0, 1.4, 2.2, 1.8, 2.3, 1.9, 2.1, 1.6)  # seeds 3 to 10, over DINO's best

    def grid(self, climb: float = 44.0) -> list[Any]:
        """DINO's best at momentum 0.99, CLIMB's at 0.9."""

        def of(accuracy: float, momentum: float, **values: Any) -> dict[str, Any]:
            return {"validation": accuracy, "momentum": momentum, **values}

        grid = [
            of(30.0, 0.99, regulariser="untrained"),
            of(40.0, 0.99),
            of(20.0, 0.9),
            of(41.0, 0.99, regulariser="noise"),
            of(31.0, 0.9, regulariser="noise"),
            of(39.0, 0.99, **CLIMB),
            of(climb, 0.9, **CLIMB),
        ]
        common = {"method": "dino", "mismatched": 0.2}
        return [line(seed=seed, **common, **values) for seed in range(3) for values in grid]

    def confirmed(self) -> list[Any]:
        common = {"method": "dino", "mismatched": 0.2}
        best = [line(40.0, seed=seed, momentum=0.99, **common) for seed in range(3, 11)]
        return best + [
            line(40.0 + over, seed=seed, momentum=0.9, **common, **CLIMB)
            for seed, over in enumerate(self.CONFIRMED, start=3)
        ]

    def row(self, records: list[Any]) -> list[str]:
        from knn_study.candidates import candidates

        *_, last = candidates(records).splitlines()
        return last.strip("| ").replace("|  |", "| - |").split(" | ")

    def test_the_choosing_seeds_choose(self) -> None:
        told = self.row(self.grid())
        assert told[:4] == [
            "0.2",
            "plain, momentum 0.99, teacher temperature 0.04: 40.00 ± 0.00",
            "noise, momentum 0.99, teacher temperature 0.04: 41.00 ± 0.00",
            "climb, beta 0.01, momentum 0.9, teacher temperature 0.04: 44.00 ± 0.00",
        ]
        assert told[-1] == "open: fewer than 8 seeds"

    @pytest.mark.parametrize("climb", [39.5, 40.5, 41.0])
    def test_a_candidate_is_above_dinos_best_and_above_the_noises(self, climb: float) -> None:
        told = self.row(self.grid(climb))
        assert (told[3], told[-1]) == ("none", "no candidate")

    def test_a_candidate_has_collapsed_with_no_seed(self) -> None:
        known = self.grid(60.0)
        known[6]["validation"] = {"student": [29.0]}  # seed 0: below the untrained network
        assert self.row(known)[-1] == "no candidate"

    def test_the_others_confirm(self) -> None:
        from knn_study.verdicts import with_interval

        told = self.row(self.grid() + self.confirmed())
        assert told[3].endswith("44.00 ± 0.00")  # of the seeds that choose alone
        assert told[4:6] == ["8", with_interval(self.CONFIRMED)]
        assert told[-1] == "beats DINO"

    def test_holms_correction_is_over_the_shares(self) -> None:
        from knn_study.candidates import candidates
        from knn_study.verdicts import p_value

        values = [x - 1.63 for x in self.CONFIRMED]
        assert 0.025 < p_value(values) < 0.05
        known = self.grid() + self.confirmed()
        for one in known[len(self.grid()) + 8 :]:
            one["validation"]["student"][-1] -= 1.63
        assert self.row(known)[-1] == "beats DINO"
        other = [{**one, "settings": {**one["settings"], "mismatched": 0.0}} for one in self.grid()]
        first, second = candidates(known + other).splitlines()[2:]
        assert first.startswith("| 0 | ")
        assert first.endswith("| open: fewer than 8 seeds |")
        assert second.endswith("| none |")

    def test_what_is_open(self) -> None:
        known, confirmed = self.grid(), self.confirmed()
        assert self.row(known[:-1] + confirmed)[-1] == "open: runs that choose are missing"
        other = {**confirmed[-1], "code": "other"}
        said = "open: DINO's best has other code or images"
        assert self.row([*known, *confirmed[:-1], other])[-1] == said
        failed = {"error": "the loss is nan", "test": {}, "validation": {}, "rate": []}
        first, *others = confirmed
        diverged = [*known, {**first, **failed}, *others]
        assert self.row(diverged)[-1] == "open: DINO's best diverged with seed 3"
        *others, last = confirmed
        assert self.row([*known, *others, {**last, **failed}])[-1] == "none: seed 10 diverged"


def test_details_are_of_the_last_epoch() -> None:
    from knn_study.report import details

    known = [
        {
            **line(seed=seed, mismatched=wrong, **CLIMB),
            "pairs": {"rate right": [9.0, 3.0 + seed]},
            "robustness": {"queries grey": 40.0},
        }
        for wrong in (0.0, 0.2)
        for seed in (0, 1)
    ]
    head, _, _, last = details(known).splitlines()
    assert head == "| mismatched | regulariser | seeds | queries grey | rate right |"
    assert last == "| 0.2 | climb, beta 0.01 | 2 | 40.00 | 3.50 |"


def test_where_a_difference_sits() -> None:
    from knn_study.where import where

    known = [
        {
            **line(accuracy, seed=seed, **values),
            "validation": {"student": [0.0, accuracy], "embedding": [0.0, 90 - accuracy]},
            "robustness": {"queries grey": 40.0 - 2 * seed * len(values)},
        }
        for seed, accuracy, values in (
            (0, 50.0, {}),
            (1, 50.0, {}),
            (0, 51.0, CLIMB),
            (1, 52.0, CLIMB),
        )
    ]
    alone = line(60.0, seed=7, regulariser="noise", init_std=0.3)  # plain has no seed 7
    diverged = {**line(seed=0, regulariser="climb", beta=0.1), "error": "nan"}
    head, _, climb, *others, _, said = where([*known, alone, diverged], twins=known).splitlines()
    assert head == "| regulariser | seeds | student | embedding | queries grey |"
    assert climb.strip(" |").split(" | ") == [
        "climb, beta 0.01",
        "2",
        "+1.50 [-4.85, 7.85]",
        "-1.50 [-7.85, 4.85]",
        "-2.00 [-27.41, 23.41]",
    ]
    assert others == ["| climb, beta 0.1 | 0 |  |  |  |", "| noise, init std 0.3 | 0 |  |  |  |"]
    assert "seed 0, which ended with nan" in said


def test_the_base_loss_is_taken_apart() -> None:
    """Of a teacher that answers by one prototype in two, each as often, and a student behind it."""
    from knn_study.report import details

    teacher = torch.eye(2, dtype=torch.float64)
    student = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    record = {
        **line(method="dino", prototypes=2),
        "base_loss": [9.0, -(teacher * student.log()).sum(1).mean().item()],
        "pairs": {"teacher entropy of rows": [0.0], "teacher entropy of the mean": [1.0]},
    }
    head, _, last = details([record]).splitlines()
    told = dict(zip(head.split(" | "), last.split(" | "), strict=True))
    divergence = torch.nn.functional.kl_div(student.log(), teacher, reduction="batchmean").item()
    assert told["student behind the teacher"] == f"{divergence:.2f}"
    assert told["shared by the views |"] == f"{math.log(2) - record['base_loss'][-1]:.2f} |"


@pytest.mark.parametrize("name", ["RESULTS.md", "RESULTS_2.md"])
def test_the_stored_report_is_made_of_the_stored_lines(name: str) -> None:
    from knn_study.documents import rewritten

    text = (EXAMPLES / name).read_text()
    assert rewritten(EXAMPLES / name) == text
    assert (
        len(re.findall("<!-- (?:table|choices|verdicts|details|cells|candidates|where): ", text))
        == text.count("<!-- end -->")
        >= 3
    )


@pytest.mark.parametrize("sweep", sorted((EXAMPLES / "sweeps").glob("*.txt")), ids=lambda p: p.name)
def test_the_stored_sweeps_are_sound(study: ModuleType, sweep: Path) -> None:
    args = study.make_parser().parse_args(["--preset", "cpu", "--sweep", str(sweep)])
    assert len(study.wanted(args)) > 1
