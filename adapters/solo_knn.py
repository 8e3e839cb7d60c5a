"""Evaluates a solo-learn checkpoint by k-NN: ``python -m climb_plugin.adapters.solo_knn``.

solo-learn's ``main_knn.py`` needs CUDA; this runs on any device. The arguments are called the same;
the accuracies come from solo-learn's own ``WeightedKNNClassifier``. Embeddings are those of
``eval()``: the means.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from climb_plugin.adapters.solo_config import register


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the accuracies of a checkpoint; the arguments are by default the command line's."""
    from solo.data.classification_dataloader import prepare_datasets, prepare_transforms
    from solo.utils.knn import WeightedKNNClassifier

    args = _parsed(arguments)
    model = load(args.pretrained_checkpoint_dir, trusted=args.trust_checkpoint).to(args.device)
    _, transform = prepare_transforms(args.dataset)
    where = args.train_data_path, args.val_data_path, args.data_format
    datasets = prepare_datasets(args.dataset, transform, transform, *where)
    # Every image, in order: two evaluations give the same numbers.
    loaders = [DataLoader(d, args.batch_size, num_workers=args.num_workers) for d in datasets]
    train, test = (embed(model, loader) for loader in loaders)
    for kind, k, distance in product(args.feature_type, args.k, args.distance_function):
        for temperature in args.temperature if distance == "cosine" else [None]:
            classifier = WeightedKNNClassifier(k=k, T=temperature, distance_fx=distance)
            classifier(train[kind], train["targets"], test[kind], test["targets"])
            top1, top5 = map(float, classifier.compute())
            suffix = "" if temperature is None else f" T={temperature}"
            print(f"{kind} k={k} {distance}{suffix}: acc@1={top1:.2f} acc@5={top5:.2f}")


def load(directory: Path, *, trusted: bool = False) -> nn.Module:
    """The model of the newest checkpoint in a directory, in ``eval()``.

    Code in a checkpoint runs only if ``trusted``: checkpoints of simsiam hold some.
    """
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    checkpoints = sorted(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints or not (directory / "args.json").is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds no .ckpt with its args.json.")
    register()  # the backbone may be one of ours
    config = OmegaConf.create(json.loads((directory / "args.json").read_text()))
    model: nn.Module = METHODS[config.method](config)
    checkpoint = torch.load(checkpoints[-1], map_location="cpu", weights_only=not trusted)
    # Not strict, as in solo-learn: queues are made when a training starts, heads are not used.
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    return model.eval()


@torch.no_grad()
def embed(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """``backbone`` (N, features), ``targets`` (N,) and, if there is one, ``projector`` (N, D)."""
    device = next(model.parameters()).device
    columns: dict[str, list[Tensor]] = {}
    for images, targets in loader:
        outcome = {"targets": targets.to(device), **model(images.to(device))}
        for name, key in (("backbone", "feats"), ("projector", "z"), ("targets", "targets")):
            if key in outcome:
                columns.setdefault(name, []).append(outcome[key])
    return {name: torch.cat(parts) for name, parts in columns.items()}


def _parsed(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser("python -m climb_plugin.adapters.solo_knn", description=__doc__)
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", type=Path, required=True, metavar="DIR")
    add("--dataset", required=True, help="custom: folders of images")
    add("--train_data_path", type=Path, required=True)
    add("--val_data_path", type=Path, required=True)
    add("--data_format", default="image_folder", choices=["image_folder", "h5"])
    add("--batch_size", type=int, default=16)
    add("--num_workers", type=int, default=4)
    add("--k", type=int, nargs="+", default=[20])
    add("--temperature", type=float, nargs="+", default=[0.07])
    add("--distance_function", nargs="+", default=["cosine"], choices=["cosine", "euclidean"])
    add("--feature_type", nargs="+", default=["backbone"], choices=["backbone", "projector"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--trust_checkpoint", action="store_true", help="let code in it run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
