"""Trains lightly's DINO (or SimCLR, or BYOL) twice: plain, and with CLIMB.

Run it with no arguments: a small convolutional network learns scikit-learn's 1,797 scans of
handwritten digits (nothing is downloaded). Both runs start from the same weights and see the
same images, in the same order, with the same augmentations. At the end it prints a table and
draws the curves of both. With ``--checkpoint FILE`` it can be stopped at any moment: the same
command goes on from there, and ends with the same numbers (on the CPU, to the last bit).

The one line that turns CLIMB on is the call of ``wrap`` in :func:`train`. It comes before the
optimizer is built: it puts a Gaussian head into the projection head, which is trained with it.
"""

from __future__ import annotations

import argparse
import copy
import glob
import math
import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torchvision
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import knn_predict
from lightly.utils.scheduler import cosine_schedule
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.adapters.lightly import wrap
from climb_plugin.monitor import ACTIVE_NATS, active_dimensions, nats_to_bits

BATCH = 64  # images per step
FEATURES = 128  # width of the backbone's output, on which the k-NN runs
HIDDEN = 256  # width inside the projection heads
EMBEDDING = 64  # width at the end of the projection, where CLIMB's Gaussian sits
PROTOTYPES = 256  # of DINO
NEIGHBOURS = 20  # of the k-NN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---- Images --------------------------------------------------------------------------------------

_Number = TypeVar("_Number", int, float)
Labelled = list[tuple[Image.Image, int]]


@dataclass
class Images:
    """Labelled images, and how the network gets to see them."""

    train: Labelled
    test: Labelled
    size: int  # in pixels, of a large view and of a whole image
    normalize: dict[str, list[float]]  # mean and std of each channel, for pixels from 0 to 1

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return len(self.train[0][0].getbands())

    def views(self, *, local: int) -> DINOTransform:
        """The augmentation: two large random views of an image and ``local`` small ones."""
        options: dict[str, Any] = {
            "global_crop_size": self.size,
            "local_crop_size": self.size // 2,
            "n_local_views": local,
            "gaussian_blur": (0.0, 0.0, 0.0),  # such small images are blurred as they are
            "normalize": self.normalize,
        }
        if self.channels == 1:
            # A tilted digit is still one; a mirrored or an inverted one is not.
            options |= {"hf_prob": 0, "solarization_prob": 0, "rr_prob": 0.5, "rr_degrees": 15}
            options |= {"cj_prob": 0, "random_gray_scale": 0}
            # A smaller part of one may be any of several.
            options |= {"global_crop_scale": (0.7, 1.0), "local_crop_scale": (0.3, 0.6)}
        return DINOTransform(**options)

    def whole(self, part: Labelled) -> tuple[Tensor, Tensor]:
        """Images without augmentation, (N, C, size, size), and their labels, (N,)."""
        pixels = np.stack([np.asarray(image.resize((self.size, self.size))) for image, _ in part])
        scaled = torch.from_numpy(pixels).reshape(len(part), self.size, self.size, -1) / 255
        scaled -= torch.tensor(self.normalize["mean"])
        scaled /= torch.tensor(self.normalize["std"])
        labels = torch.tensor([label for _, label in part])
        return scaled.movedim(-1, 1).to(DEVICE), labels.to(DEVICE)


class RandomViews(Dataset[list[Tensor]]):
    """Views of images, drawn anew whenever an image is asked for."""

    def __init__(self, images: Labelled, transform: DINOTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        """The views of one image, each (C, H, W)."""
        views: list[Tensor] = self.transform(self.images[index][0])  # type: ignore[assignment]
        return views


def load_images(name: str, root: Path, limit: int | None) -> Images:
    """scikit-learn's digits, or CIFAR-10 through torchvision; ``limit`` images of each part."""
    if name == "digits":
        digits = load_digits()
        scans = [Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in digits.images]
        labels = [int(label) for label in digits.target]
        # The split does not depend on --seed, so that runs with several seeds compare.
        train, test = train_test_split(
            list(zip(scans, labels, strict=True)), test_size=450, stratify=labels, random_state=0
        )
        return Images(train[:limit], test[:limit], 16, {"mean": [0.3], "std": [0.38]})
    parts = [torchvision.datasets.CIFAR10(root, train=t, download=True) for t in (True, False)]
    train, test = ([part[i] for i in range(min(len(part), limit or len(part)))] for part in parts)
    return Images(train, test, 32, IMAGENET_NORMALIZE)


# ---- The three methods, as in lightly's examples -------------------------------------------------


class BYOLLoss(nn.Module):
    """lightly's negative cosine of what the student predicts and the teacher sees, both ways."""

    def forward(self, teacher_out: list[Tensor], student_out: list[Tensor]) -> Tensor:
        """A scalar between -1 (they agree) and 1."""
        loss, (t0, t1), (s0, s1) = NegativeCosineSimilarity(), teacher_out, student_out
        mean: Tensor = (loss(s0, t1) + loss(s1, t0)) / 2
        return mean


@dataclass(frozen=True)
class Method:
    """What tells the methods apart."""

    make_head: Callable[[], nn.Module]
    make_loss: Callable[[], nn.Module]
    loss_unit: str
    teacher: bool = True  # a momentum copy of the student
    local_views: int = 0  # small crops besides the two large ones


METHODS = {
    "dino": Method(
        lambda: DINOProjectionHead(
            FEATURES, HIDDEN, EMBEDDING, PROTOTYPES, batch_norm=True, freeze_last_layer=1
        ),
        lambda: DINOLoss(PROTOTYPES),
        "cross-entropy, nats",
        local_views=2,
    ),
    "simclr": Method(
        lambda: SimCLRProjectionHead(FEATURES, HIDDEN, EMBEDDING),
        NTXentLoss,
        "cross-entropy, nats",
        teacher=False,
    ),
    "byol": Method(
        lambda: BYOLProjectionHead(FEATURES, HIDDEN, EMBEDDING), BYOLLoss, "negative cosine"
    ),
}


class Learner(nn.Module):
    """Backbone and projection head of the student and, if the method has one, of the teacher."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, FEATURES, 2)):
            layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = METHODS[name].make_head()
        self.teacher_backbone = self.teacher_head = self.predictor = None
        if METHODS[name].teacher:
            self.teacher_backbone = copy.deepcopy(self.backbone)
            self.teacher_head = METHODS[name].make_head()  # DINO's cannot be deep-copied
            self.teacher_head.load_state_dict(self.head.state_dict())
            deactivate_requires_grad(self.teacher_backbone)
            deactivate_requires_grad(self.teacher_head)
        if name == "byol":
            self.predictor = BYOLPredictionHead(EMBEDDING, HIDDEN, EMBEDDING)

    def forward(self, views: list[Tensor]) -> tuple[Any, Any]:
        """What the loss of the method is called with."""
        student_out = [self.head(self.backbone(view)) for view in views]
        if self.predictor is not None:
            student_out = [self.predictor(projection) for projection in student_out]
        if self.teacher_backbone is None or self.teacher_head is None:
            return student_out[0], student_out[1]
        return [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]], student_out

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher, if there is one, towards the student; at momentum 1 it stays."""
        if self.teacher_backbone is not None:
            update_momentum(self.backbone, self.teacher_backbone, momentum)
            update_momentum(self.head, self.teacher_head, momentum)


# ---- Training ------------------------------------------------------------------------------------


@dataclass
class Run:
    """What was measured, by epoch; NaN where there is nothing to measure."""

    name: str
    base_loss: list[float] = field(default_factory=list)  # mean over the epoch
    rate: list[float] = field(default_factory=list)  # mean over the epoch, in nats
    student: list[float] = field(default_factory=list)  # k-NN accuracy, %; the first: untrained
    teacher: list[float] = field(default_factory=list)  # likewise
    active: float = math.nan  # dimensions of the embedding, at the end


def train(
    name: str,
    images: Images,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    *,
    beta: float | None,
) -> Run:
    """Trains from scratch or the checkpoint: plain if ``beta`` is None, else with CLIMB."""
    # CLIMB takes none of torch's random numbers for its noise, so these seeds give both runs the
    # same weights, order and augmentations.
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    method = METHODS[args.method]
    model = Learner(args.method, images.channels).to(DEVICE)
    criterion = method.make_loss().to(DEVICE)
    if beta is not None:
        # This line turns CLIMB on:
        criterion = wrap(criterion, student=model.head, teacher=model.teacher_head, beta=beta)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset = RandomViews(images.train, images.views(local=method.local_views))
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    steps = args.epochs * len(loader)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bank, queries = images.whole(images.train), images.whole(images.test)
    state = {"model": model, "criterion": criterion, "optimizer": optimizer, "decay": decay}
    run = checkpoint.restore(name, state)
    if not run.student:
        show_images_once(model, bank[0])
        measure_knn(run, model, bank, queries)
    done = len(run.base_loss)
    bar = tqdm(total=steps, initial=done * len(loader), desc=f"{name:>5}", unit="step")
    with bar:
        for epoch in range(done, args.epochs):
            momentum = cosine_schedule(epoch, args.epochs, 0.99, 1)
            base_losses, rates = [], []
            for views in loader:
                model.update_teacher(momentum)
                loss = criterion(*model([view.to(DEVICE) for view in views]))
                optimizer.zero_grad()
                loss.backward()
                if isinstance(model.head, DINOProjectionHead):
                    model.head.cancel_last_layer_gradients(epoch)
                optimizer.step()
                decay.step()
                if isinstance(criterion, ClimbLoss):
                    rates.append(criterion.terms.rate)
                    loss = criterion.terms.base
                base_losses.append(loss.detach())
                bar.update()
            run.base_loss.append(float(torch.stack(base_losses).mean()))
            run.rate.append(float(torch.stack(rates).mean()) if rates else math.nan)
            measure_knn(run, model, bank, queries)
            bar.set_postfix_str(f"k-NN {run.student[-1]:.1f} %")
            checkpoint.save(run, state)
    if isinstance(criterion, ClimbLoss) and criterion.heads:
        run.active = count_active(model, criterion.heads[0], queries[0])
    return run


@torch.no_grad()
def show_images_once(model: Learner, pixels: Tensor) -> None:
    """Gives the batch norm of an untrained backbone the statistics of (2,048) images, for k-NN."""
    for part in pixels[:2048].split(32):
        for backbone in (model.backbone, model.teacher_backbone):
            if backbone is not None:
                backbone(part)


@torch.no_grad()
def measure_knn(
    run: Run, model: Learner, bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
) -> None:
    """Appends the k-NN accuracy on the features of the student's and the teacher's backbone."""
    model.eval()
    for backbone, accuracies in (
        (model.backbone, run.student),
        (model.teacher_backbone, run.teacher),
    ):
        if backbone is None:
            accuracies.append(math.nan)
            continue
        known = F.normalize(torch.cat([backbone(part) for part in bank[0].split(500)]), dim=1)
        correct = 0
        for part, labels in zip(queries[0].split(500), queries[1].split(500), strict=True):
            asked = F.normalize(backbone(part), dim=1)
            ranked = knn_predict(asked, known.T, bank[1], num_classes=10, knn_k=NEIGHBOURS)
            correct += int((ranked[:, 0] == labels).sum())
        accuracies.append(100 * correct / len(queries[1]))
    model.train()


@torch.no_grad()
def count_active(model: Learner, head: GaussianHead, pixels: Tensor) -> int:
    """How many dimensions of the embedding still say something about an image."""
    embeddings: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, output: embeddings.append(inputs[0]))
    model.eval()
    for part in pixels.split(500):
        model.head(model.backbone(part))
    handle.remove()
    return active_dimensions(*head.posterior(torch.cat(embeddings)))


# ---- Checkpoints ---------------------------------------------------------------------------------


class Checkpoint:
    """The whole comparison after its last complete epoch, in a file; without a path: nothing.

    Args:
        path: The file; what it holds is loaded, if it is there.
        settings: What a run must have in common with the checkpoint that it goes on from.

    Raises:
        ValueError: If the file is not a checkpoint of this script with these settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.runs: dict[str, Run] = {}
        self.loaded: dict[str, Any] = {}
        if path is not None and path.exists():
            self._load(path)
        if path is not None:  # what a killed run has left
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
                leftover.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        try:
            self.loaded = torch.load(path, map_location="cpu", weights_only=True)
            before, _, _ = (self.loaded[key] for key in ("quickstart", "state", "random"))
            self.runs = {run["name"]: Run(**run) for run in self.loaded["runs"]}
        except Exception as error:  # of many types, if the file is something else
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise ValueError(f"it is not a whole checkpoint of this script ({reason})") from error
        changed = [
            f"{name} {before.get(name)}, not {self.settings.get(name)}"
            for name in sorted({*before, *self.settings})
            if before.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(f"it was made with {'; '.join(changed)}")

    def restore(self, name: str, state: dict[str, Any]) -> Run:
        """What run ``name`` has measured so far; ``state`` and the random numbers go back there."""
        run = self.runs.setdefault(name, Run(name))
        if run.base_loss and name == self.loaded["runs"][-1]["name"]:
            for part, values in self.loaded["state"].items():
                state[part].load_state_dict(values)
            set_random_state(self.loaded["random"])
        return run

    def save(self, run: Run, state: dict[str, Any]) -> None:
        """Replaces the file by one of now, in one step: it is whole at every moment."""
        if self.path is None:
            return
        self.runs[run.name] = run
        everything = {
            "quickstart": self.settings,
            "runs": [asdict(run) for run in self.runs.values()],
            "state": {part: owner.state_dict() for part, owner in state.items()},
            "random": get_random_state(),
        }
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(everything, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def get_random_state() -> dict[str, Any]:
    """Of weights, order and augmentations, in types that ``weights_only=True`` loads."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what :func:`get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


# ---- Results -------------------------------------------------------------------------------------


def make_table(runs: Sequence[Run], loss_unit: str) -> str:
    """One column for each run; '-' where there is nothing to measure."""
    lines = [" " * 34 + "".join(f"{run.name:>12}" for run in runs)]
    for label, decimals, values in (
        ("k-NN accuracy, student (%)", 2, [run.student[-1] for run in runs]),
        ("k-NN accuracy, teacher (%)", 2, [run.teacher[-1] for run in runs]),
        (f"base loss ({loss_unit})", 3, [run.base_loss[-1] for run in runs]),
        ("rate (nats)", 2, [run.rate[-1] for run in runs]),
        ("rate (bits)", 2, [nats_to_bits(run.rate[-1]) for run in runs]),
        (f"active dimensions (of {EMBEDDING})", 0, [run.active for run in runs]),
    ):
        cells = ["-" if math.isnan(value) else f"{value:.{decimals}f}" for value in values]
        lines.append(f"{label:34}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def compare(plain: Run, climb: Run, tested: int) -> str:
    """Which way the k-NN accuracy went, in words."""
    points = climb.student[-1] - plain.student[-1]
    way = f"{abs(points):.2f} points {'above' if points > 0 else 'below'}" if points else "equal to"
    return (
        f"k-NN accuracy of the student: CLIMB is {way} plain ({abs(points) * tested / 100:.0f} of "
        f"{tested} test images).\nOne seed proves nothing, whichever way it fell: repeat with "
        "--seed 1, 2, ... and look at the spread."
    )


def draw(runs: Sequence[Run], loss_unit: str, title: str, path: Path) -> None:
    """Draws the curves into a PNG; a file that is there stays whole until the new one is."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss_axes, rate_axes, knn_axes = figure.subplots(1, 3)
    for run, colour in zip(runs, ("tab:blue", "tab:orange"), strict=True):
        epochs = range(1, len(run.base_loss) + 1)
        loss_axes.plot(epochs, run.base_loss, ".-", color=colour, label=run.name)
        if not math.isnan(run.rate[0]):
            rate_axes.plot(epochs, run.rate, ".-", color=colour, label=run.name)
        for who, accuracies, style in (
            ("student", run.student, ".-"),
            ("teacher", run.teacher, ".:"),
        ):
            if not math.isnan(accuracies[0]):
                label = f"{run.name}, {who}"
                knn_axes.plot([0, *epochs], accuracies, style, color=colour, label=label)
    for axes, label in (
        (loss_axes, f"base loss ({loss_unit})"),
        (rate_axes, "rate (nats)"),
        (knn_axes, "k-NN accuracy (%)"),
    ):
        axes.set(xlabel="epochs of training", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=120)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- Command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> tuple[Run, Run]:
    """Runs the comparison; returns what was measured, plain and with CLIMB."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.data == "cifar10") != (args.data_root is not None):
        parser.error("--data cifar10 and --data-root DIR go together")
    if args.seed >= 2**32:
        parser.error(f"--seed must be less than 2**32, got {args.seed}")
    writable = os.access(args.out.resolve().parent, os.W_OK) and not args.out.is_dir()
    if args.out.suffix.lower() != ".png" or not writable:
        parser.error(f"--out must be a .png in a folder that can be written to, got {args.out}")
    kept = args.checkpoint
    if kept is not None and (
        not os.access(kept.resolve().parent, os.W_OK) or kept.resolve() == args.out.resolve()
    ):
        parser.error(
            f"--checkpoint must be in a folder that can be written to, and not --out, got {kept}"
        )
    try:
        checkpoint = Checkpoint(args.checkpoint, settings_of(args))
    except ValueError as error:
        parser.error(
            f"cannot go on from {kept}: {error}. It was left as it is: give --checkpoint "
            "another name, or repeat the options that it was made with"
        )
    try:
        images = load_images(args.data, args.data_root, args.images)
    except (OSError, RuntimeError) as error:
        parser.error(
            f"CIFAR-10 is not in {args.data_root} and could not be downloaded ({error}): put "
            "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there"
        )
    torch.set_num_threads(args.threads)
    # Lightly's DINO head is built with it.
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
    plain = train("plain", images, args, checkpoint, beta=None)
    climb = train("CLIMB", images, args, checkpoint, beta=args.beta)

    unit = METHODS[args.method].loss_unit
    title = f"{args.method} on {args.data}, beta {args.beta:g} per nat, seed {args.seed}"
    untrained = Run("untrained", [math.nan], [math.nan], plain.student[:1], plain.teacher[:1])
    print(
        f"\n{title}, {args.epochs} epochs of {len(images.train)} images\n\n"
        f"{make_table((untrained, plain, climb), unit)}\n\n"
        f"k-NN: {NEIGHBOURS} neighbours among the training images, in the backbone's features.\n"
        "Base loss and rate: per image and view, mean over the last epoch.\n"
        f"Active dimensions: those with a rate above {ACTIVE_NATS} nats on the test images.\n\n"
        f"{compare(plain, climb, len(images.test))}\n"
    )
    draw((plain, climb), unit, title, args.out)
    print(f"Curves: {args.out}")
    return plain, climb


def make_parser() -> argparse.ArgumentParser:
    """The options, with their units and defaults."""
    parser = argparse.ArgumentParser(
        description="Trains one of lightly's methods twice, plain and with CLIMB, and compares."
    )

    def add(name: str, text: str, **how: Any) -> None:
        default = " (default: %(default)s)" if "default" in how else ""
        parser.add_argument(name, help=text + default, **how)

    add("--method", "what is trained", choices=METHODS, default="dino")
    add(
        "--beta",
        "weight of the rate, in units of the base loss per nat; 0 leaves CLIMB out",
        type=at_least(0.0),
        default=0.01,
    )
    add("--epochs", "passes of each run over the images", type=at_least(1), default=15)
    add("--seed", "of weights, order, augmentations and noise", type=at_least(0), default=0)
    add("--data", "what it is trained on", choices=("digits", "cifar10"), default="digits")
    add("--data-root", "folder where CIFAR-10 is, or is downloaded to (170 MB)", type=Path)
    add("--images", "most images to train on, and to test on (default: all)", type=at_least(BATCH))
    add("--threads", "of the CPU; one is enough for the digits", type=at_least(1), default=1)
    add("--out", "the drawing of the curves, a PNG", type=Path, default=Path("quickstart.png"))
    add("--checkpoint", "kept after every epoch; gone on from if it is there", type=Path)
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that the numbers depend on: not where the files are."""
    sizes = {"BATCH": BATCH, "FEATURES": FEATURES, "HIDDEN": HIDDEN, "EMBEDDING": EMBEDDING}
    options = {f"--{name}": value for name, value in vars(args).items()}
    for place in ("--data_root", "--out", "--checkpoint"):
        del options[place]
    return {**options, **sizes, "PROTOTYPES": PROTOTYPES}


def at_least(least: _Number) -> Callable[[str], _Number]:
    """Reads a finite number of the type of ``least``, not below it."""

    def number(text: str) -> _Number:
        value = type(least)(text)
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be finite and at least {least}, got {text}")
        return value

    return number


if __name__ == "__main__":
    main()
