"""CLIMB in solo-learn's own methods, loops and scripts."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import solo.methods
import torch
from omegaconf import OmegaConf
from PIL import Image
from solo.methods.base import BaseMethod
from solo.methods.linear import LinearModel
from solo.utils.auto_resumer import AutoResumer

from climb_plugin.adapters.solo_knn import load
from climb_plugin.adapters.solo_learn import register, with_climb
from climb_plugin.adapters.solo_method import ClimbMethod

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent
CHECKOUT = Path(solo.methods.__file__).parents[2]
SMOKE = HERE.parents[1] / "examples" / "solo_learn"


def load_runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("solo_runs", HERE / "solo_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load_runs()


@pytest.fixture(autouse=True)
def methods() -> Iterator[dict[str, Any]]:
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield solo.methods.METHODS
    torch.set_num_threads(threads)


def plain(method: Any) -> Any:
    """solo-learn's own class."""
    return method.__mro__[method.__mro__.index(ClimbMethod) + 1]


@pytest.mark.parametrize("name", sorted(runs.METHODS))
def test_every_method_trains_with_climb(methods: dict[str, Any], name: str) -> None:
    # deepclusterv2 has no clusters in its first epoch: its own loss is NaN there.
    epochs = 2 if name == "deepclusterv2" else 1
    cfg = runs.config(name, epochs=epochs, climb_beta=1e-3)
    model, trainer, losses = runs.train(methods[name], cfg)
    head = model.climb.heads[0]
    assert all(map(math.isfinite, losses[-2:]))
    assert len(losses) == 2 * epochs
    listed = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(parameter) for parameter in head.parameters()} <= listed
    assert head.logvar.weight.abs().sum() > 0  # zero at the start
    for metric in ("climb_rate", "climb_entropy", "climb_beta", "climb_base_loss"):
        assert metric in trainer.callback_metrics
    assert trainer.callback_metrics["climb_rate"] > 0
    for online, momentum in getattr(model, "momentum_pairs", []):
        shapes = [[p.shape for p in module.parameters()] for module in (online, momentum)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["dino", "simclr", "byol", "mocov3"])
def test_off_is_bit_identical(methods: dict[str, Any], name: str) -> None:
    def run(method: Any, **section: Any) -> Any:
        model, _, losses = runs.train(method, runs.config(name, epochs=2, **section), batches=5)
        assert len(losses) == 10
        return losses, runs.digest(model), torch.get_rng_state().tolist()

    expected = run(plain(methods[name]))
    assert run(methods[name]) == expected
    assert run(methods[name], climb_beta=0) == expected
    assert run(methods[name], climb_beta=1e-6) != expected


def test_features_place_and_view_prior_and_ramp(methods: dict[str, Any]) -> None:
    cfg = runs.config(
        "dino",
        climb_beta=1e-3,
        climb_at="features",
        climb_prior="view",
        climb_warmup=0.5,
        climb_free_nats=1.0,
    )
    model, _, losses = runs.train(methods["dino"], cfg)
    assert model.climb.heads[0].out_features == 512
    assert model.climb.schedule.total_steps == 2
    assert all(map(math.isfinite, losses))


class SaveFirst:
    """A checkpoint at the end of the first epoch, as solo-learn's Checkpointer saves it."""

    def __new__(cls, path: Path) -> Any:
        import lightning.pytorch as pl

        class Save(pl.Callback):
            def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
                if trainer.current_epoch == 0 and not path.exists():
                    trainer.save_checkpoint(path)

        return Save()


@pytest.mark.parametrize(
    ("name", "prior"), [("dino", "standard"), ("dino", "learned"), ("simsiam", "standard")]
)
def test_resuming_repeats_the_uninterrupted_run(
    methods: dict[str, Any], tmp_path: Path, name: str, prior: str
) -> None:
    def cfg() -> Any:
        return runs.config(name, epochs=3, climb_beta=0.1, climb_prior=prior, climb_warmup=0.5)

    path = tmp_path / "first.ckpt"
    _, _, whole = runs.train(methods[name], cfg(), SaveFirst(path))
    _, _, rest = runs.train(methods[name], cfg(), resume=path)
    assert rest == whole[2:]
    assert whole[2:4] != whole[4:]


def test_resuming_goes_on_to_a_target_rate(methods: dict[str, Any], tmp_path: Path) -> None:
    def cfg() -> Any:
        return runs.config("dino", epochs=3, climb_beta=0.1, climb_target_rate=20)

    path = tmp_path / "first.ckpt"
    model, _, whole = runs.train(methods["dino"], cfg(), SaveFirst(path))
    resumed, _, rest = runs.train(methods["dino"], cfg(), resume=path)
    assert rest == whole[2:]
    assert model.climb.terms.beta == resumed.climb.terms.beta != 0.1
    assert model.climb.climb_state() == resumed.climb.climb_state()


def test_a_checkpoint_from_before_target_rates_goes_on(
    methods: dict[str, Any], tmp_path: Path
) -> None:
    def cfg() -> Any:
        return runs.config("dino", epochs=2, climb_beta=0.1)

    path = tmp_path / "first.ckpt"
    _, _, whole = runs.train(methods["dino"], cfg(), SaveFirst(path))
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["climb_plugin"]["loss"]
    del checkpoint["climb_plugin"]["keys"]["climb_target_rate"]
    torch.save(checkpoint, path)
    _, _, rest = runs.train(methods["dino"], cfg(), resume=path)
    assert rest == whole[2:]


def test_a_plain_checkpoint_goes_on_with_climb(
    methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "first.ckpt"
    runs.train(methods["dino"], runs.config("dino"), SaveFirst(path))
    cfg = runs.config("dino", epochs=2, climb_beta=1e-3, climb_prior="learned")
    _, trainer, losses = runs.train(methods["dino"], cfg, resume=path)
    assert len(losses) == 2
    assert trainer.global_step == 4
    said = capsys.readouterr().out
    assert said.count("not in the checkpoint") == 1
    assert "head.mlp.gaussian.logvar.weight" in said


@pytest.mark.parametrize("at", ["projection", "features"])
def test_checkpoints_load_with_and_without_the_plugin(
    methods: dict[str, Any], tmp_path: Path, at: str
) -> None:
    path = tmp_path / "first.ckpt"
    cfg = runs.config("dino", climb_beta=1e-3, climb_at=at)
    model, _, _ = runs.train(methods["dino"], cfg, SaveFirst(path))
    images = torch.randn(4, 3, 32, 32)
    expected = model.eval()(images)["feats"]
    for method in (methods["dino"], plain(methods["dino"])):
        # As main_knn.py and main_umap.py do; args.json holds the effective keys.
        loaded = method.load_from_checkpoint(path, strict=False, cfg=cfg).eval()
        assert torch.equal(loaded(images)["feats"], expected)
        assert torch.equal(loaded(images)["z"], model(images)["z"])
    assert {key for key in model.state_dict() if key.startswith("backbone.")} == {
        key for key in plain(methods["dino"])(cfg).state_dict() if key.startswith("backbone.")
    }


def test_knn_asks_before_it_runs_code(methods: dict[str, Any], tmp_path: Path) -> None:
    cfg = runs.config("simsiam")
    runs.train(methods["simsiam"], cfg, SaveFirst(tmp_path / "first.ckpt"))
    (tmp_path / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg)))
    with pytest.raises(ValueError, match="--trust_checkpoint"):
        load(tmp_path)
    assert not load(tmp_path, trusted=True).training
    with pytest.raises(FileNotFoundError, match=r"args\.json"):
        load(tmp_path / "nowhere")


def args_json(folder: Path, **section: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "x-ep=0.ckpt").touch()
    (folder / "args.json").write_text(json.dumps({"name": "x", "method_kwargs": section}))


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
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    saved: dict[str, Any],
    now: dict[str, Any],
    resumes: bool,
) -> None:
    before = list(AutoResumer.SHOULD_MATCH)
    args_json(tmp_path / "run", **saved)
    cfg = OmegaConf.create({"name": "x", "method_kwargs": now})
    found, _ = AutoResumer(tmp_path).find_checkpoint(cfg)
    assert (found is not None) == resumes
    said = capsys.readouterr().out
    if resumes:
        assert said == ""
    else:
        assert f"climb_beta was {saved.get('climb_beta')} and is {now.get('climb_beta')}" in said
    assert before == AutoResumer.SHOULD_MATCH


def test_linear_evaluation_refuses_the_keys() -> None:
    cfg = OmegaConf.create({"method_kwargs": {"climb_beta": 1.0}})
    with pytest.raises(ValueError, match="no effect in linear evaluation"):
        LinearModel(torch.nn.Linear(1, 1), cfg=cfg)


def test_base_and_mae_refuse_the_keys(methods: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="neither a projector nor a head"):
        methods["base"](runs.config("base", climb_beta=1.0))
    mae = runs.config(
        "mae",
        climb_beta=1.0,
        backbone__name="vit_tiny",
        backbone__kwargs={"img_size": 32, "patch_size": 8},
    )
    mae.method_kwargs.update(
        {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, "mask_ratio": 0.5}
    )
    with pytest.raises(ValueError, match="'mae': it has neither a projector nor a head"):
        methods["mae"](mae)


def test_a_method_of_the_user_works(methods: dict[str, Any]) -> None:
    class Mine(plain(methods["simclr"])):  # type: ignore[misc]
        pass

    table = {"mine": Mine}
    register(table)
    model, _, losses = runs.train(table["mine"], runs.config("simclr", climb_beta=1e-3))
    assert type(model).__name__ == "Mine"
    assert model.climb is not None
    assert math.isfinite(losses[-1])


def test_names_stay_and_registering_twice_is_harmless(methods: dict[str, Any]) -> None:
    before = dict(methods)
    register()
    assert methods == before
    assert all(
        method.__name__ == plain(method).__name__
        for name, method in methods.items()
        if name != "linear"
    )
    assert solo.methods.DINO is methods["dino"]
    assert solo.methods.BaseMethod is BaseMethod
    assert pickle.loads(pickle.dumps(methods["dino"])) is methods["dino"]
    assert with_climb(plain(methods["dino"])) is not methods["dino"]


def test_efficientnet_with_the_stem_of_cifar(methods: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "first.ckpt"
    cfg = runs.config(
        "simclr", climb_beta=1e-3, backbone__name="efficientnet_b0", data__dataset="cifar10"
    )
    model, _, losses = runs.train(methods["simclr"], cfg, SaveFirst(path))
    assert math.isfinite(losses[-1])
    assert model.features_dim == 1280
    assert model.backbone.conv_stem.stride == (1, 1)
    large = runs.config("simclr", backbone__name="efficientnet_b0")
    assert methods["simclr"](large).backbone.conv_stem.stride == (2, 2)
    # As main_linear.py builds and fills it.
    backbone = BaseMethod._BACKBONES["efficientnet_b0"](method="simclr")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {k.replace("backbone.", ""): v for k, v in state.items() if "backbone" in k}
    backbone.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(images), model.eval().backbone(images))


# Scripts of the untouched checkout, each in a process of its own.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(5):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def call(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)},
    )


def pretrain(images: Path, cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return call(
        str(CHECKOUT / "main_pretrain.py"),
        "--config-path",
        str(SMOKE),
        "--config-name",
        "cpu_smoke.yaml",
        f"data.train_path={images / 'train'}",
        "data.val_path=null",
        "max_epochs=1",
        *overrides,
        cwd=cwd,
    )


def test_hydra_finds_the_plugin(images: Path, tmp_path: Path) -> None:
    done = pretrain(images, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIMB: Constant(beta=0.001)") == 1
    (checkpoint,) = (tmp_path / "trained_models" / "dino").glob("*/*.ckpt")
    (metrics,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["climb_rate"]) > 0
    saved = json.loads((checkpoint.parent / "args.json").read_text())["method_kwargs"]
    assert saved["climb_prior"] == "standard"

    lines = []
    for _ in range(2):
        knn = call(
            *("-m", "climb_plugin.adapters.solo_cli", "knn"),
            *("--pretrained_checkpoint_dir", str(checkpoint.parent), "--dataset", "custom"),
            *("--train_data_path", str(images / "train"), "--val_data_path", str(images / "val")),
            *("--k", "5", "--num_workers", "0", "--feature_type", "backbone", "projector"),
            cwd=tmp_path,
        )
        lines.append(knn.stdout)
    assert lines[0].count("acc@1=") == 2, knn.stderr
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++method_kwargs.climb_bta=1", "did you mean climb_beta"),
        ("++climb_beta=1", "write method_kwargs.climb_beta"),
    ],
)
def test_a_wrong_key_ends_the_script(
    images: Path, tmp_path: Path, override: str, message: str
) -> None:
    done = pretrain(images, tmp_path, override)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "trained_models").exists()


def test_climb_solo_registers_and_runs_a_script(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\nfrom solo.methods import METHODS, DINO\n"
        "print(__name__, sys.argv[1:], METHODS['dino'].__mro__[1].__name__, DINO.__module__)\n"
    )
    done = call("-m", "climb_plugin.adapters.solo_cli", str(script), "--k", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == (
        "__main__ ['--k', '5'] ClimbMethod climb_plugin.adapters.solo_learn"
    )
    missing = call("-m", "climb_plugin.adapters.solo_cli", "nowhere.py", cwd=tmp_path)
    assert missing.returncode != 0
    assert "nowhere.py" in missing.stderr


def test_two_processes(tmp_path: Path) -> None:
    done = call(str(HERE / "solo_runs.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 5
    assert first["parameters"] == second["parameters"]
    assert first["noise"] != second["noise"]


def test_other_hydra_programs_pay_nothing(tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "import sys, hydra\n"
        "@hydra.main(version_base='1.2')\n"
        "def main(cfg):\n"
        "    print('plugin' , 'hydra_plugins.climb_plugin' in sys.modules)\n"
        "    print([m for m in ('torch', 'solo', 'climb_plugin') if m in sys.modules])\n"
        "main()\n"
    )
    done = call(str(script), "hydra.run.dir=.", cwd=tmp_path)
    assert done.stdout.splitlines() == ["plugin True", "[]"], done.stderr
