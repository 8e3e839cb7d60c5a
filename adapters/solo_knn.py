"""k-NN accuracy of a solo-learn checkpoint, on any device.

solo-learn's ``main_knn.py`` needs CUDA. The arguments here are called the same; the accuracies
come from solo-learn's own ``WeightedKNNClassifier``. Embeddings are those of ``eval()``: the means.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from climb_plugin.adapters.solo_learn import register


def main(arguments: Sequence[str]) -> None:
    """Prints the accuracies of a checkpoint.

    Args:
        arguments: Those of the command line.
    """
    from solo.data.classification_dataloader import prepare_datasets, prepare_transforms

    args = _parsed(arguments)
    model = load(Path(args.pretrained_checkpoint_dir), trusted=args.trust_checkpoint).to(
        args.device
    )
    _, transform = prepare_transforms(args.dataset)
    datasets = prepare_datasets(
        args.dataset,
        T_train=transform,
        T_val=transform,
        train_data_path=args.train_data_path,
        val_data_path=args.val_data_path,
        data_format=args.data_format,
    )
    # Every image, in order: two evaluations give the same numbers.
    train, test = (
        embed(model, DataLoader(dataset, batch_size=args.batch_size, num_workers=args.num_workers))
        for dataset in datasets
    )
    for kind, k, distance in product(args.feature_type, args.k, args.distance_function):
        for temperature in args.temperature if distance == "cosine" else [None]:
            top1, top5 = accuracy(
                train[kind], train["targets"], test[kind], test["targets"], k, distance, temperature
            )
            suffix = "" if temperature is None else f" T={temperature}"
            print(f"{kind} k={k} {distance}{suffix}: acc@1={top1:.2f} acc@5={top5:.2f}")


def load(directory: Path, *, trusted: bool = False) -> Any:
    """The model of a checkpoint directory of solo-learn, in ``eval()``.

    Args:
        directory: Where ``args.json`` and the checkpoint lie; of several the newest counts.
        trusted: Whether code in the checkpoint may run. Some of solo-learn's own hold some.

    Raises:
        FileNotFoundError: If they do not lie there.
        ValueError: If the checkpoint holds code and is not trusted.
    """
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    checkpoints = sorted(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints or not (directory / "args.json").is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} holds no .ckpt with its args.json: pass the directory of one "
            "run, as trained_models/dino/offline-ab12cd34."
        )
    register()
    config = OmegaConf.create(json.loads((directory / "args.json").read_text()))
    model = METHODS[config.method](config)
    try:
        checkpoint = torch.load(checkpoints[-1], map_location="cpu", weights_only=not trusted)
    except UnpicklingError as error:
        raise ValueError(
            f"{checkpoints[-1].name} holds more than numbers, as solo-learn's checkpoints do where "
            "a learning rate is constant (simsiam): if you trust where it comes from, add "
            "--trust_checkpoint."
        ) from error
    # Not strict, as in solo-learn: queues are made when a training starts.
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    return model.eval()


@torch.no_grad()
def embed(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Embeddings of a data set.

    Args:
        model: A solo-learn method.
        loader: Batches of images (B, 3, H, W) and labels (B,).

    Returns:
        ``backbone`` (N, features), ``targets`` (N,), and ``projector`` (N, D) where the method
        returns one.
    """
    device = next(model.parameters()).device
    columns: dict[str, list[Tensor]] = {"backbone": [], "projector": [], "targets": []}
    model.eval()
    for images, targets in loader:
        outcome = model(images.to(device))
        columns["backbone"].append(outcome["feats"])
        columns["targets"].append(targets.to(device))
        if "z" in outcome:
            columns["projector"].append(outcome["z"])
    return {name: torch.cat(parts) for name, parts in columns.items() if parts}


def accuracy(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    k: int,
    distance: str,
    temperature: float | None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent, by solo-learn's classifier."""
    from solo.utils.knn import WeightedKNNClassifier

    classifier = WeightedKNNClassifier(k=k, T=temperature, distance_fx=distance)
    classifier(
        train_features=train,
        train_targets=train_targets,
        test_features=test,
        test_targets=test_targets,
    )
    top1, top5 = classifier.compute()
    return float(top1), float(top5)


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="climb-solo knn", description=__doc__)
    parser.add_argument("--pretrained_checkpoint_dir", required=True, metavar="DIR")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=4)
    parser.add_argument("--k", type=int, nargs="+", default=[20])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.07])
    parser.add_argument(
        "--distance_function", nargs="+", default=["cosine"], choices=["cosine", "euclidean"]
    )
    parser.add_argument(
        "--feature_type", nargs="+", default=["backbone"], choices=["backbone", "projector"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dataset", required=True, help="custom: folders of images")
    parser.add_argument("--train_data_path", type=Path, required=True)
    parser.add_argument("--val_data_path", type=Path, required=True)
    parser.add_argument("--data_format", default="image_folder", choices=["image_folder", "h5"])
    parser.add_argument("--trust_checkpoint", action="store_true", help="let code in it run")
    return parser.parse_args(arguments)
