# %% [markdown]
# # From lightly's DINO to CLIMB in one line
#
# **What you will learn:** how to turn CLIMB on in a training script that you already have, what
# it adds to your model, which new quantity it gives you to watch (the *rate*: nats of information
# that the embedding carries about a view), and how to compare the two models without fooling
# yourself: curves, k-NN, nearest neighbours, a map of the embeddings.
#
# It trains a small network twice, on the CPU, in about two minutes. The data are scikit-learn's
# 1,797 scans of handwritten digits, so nothing is downloaded; `DATA = "cifar10"` below takes
# CIFAR-10 instead. Loading, augmentation and k-NN come from [quickstart.py](quickstart.py) in this
# folder; the model and the training loop are here.

# %%
import copy
import math
import random
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.benchmarking import knn_predict
from lightly.utils.scheduler import cosine_schedule
from quickstart import (
    DEVICE,
    Labelled,
    RandomViews,
    Run,
    count_active,
    load_images,
    make_table,
    measure_knn,
)
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from climb_plugin.adapters.lightly import wrap
from climb_plugin.monitor import nats_to_bits

DATA = "digits"  # or "cifar10": torchvision downloads 170 MB into the folder datasets
LIMIT = None if DATA == "digits" else 5000  # images of each part; None: all, with time or a GPU
EPOCHS = 10
BETA = 0.01  # price of the rate, in units of DINO's loss per nat
SEED = 0

if DEVICE == "cpu":
    torch.set_num_threads(1)  # more do not help with such a small network
warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
plt.rcParams["figure.dpi"] = 90

images = load_images(DATA, Path("datasets"), LIMIT)
bank, queries = images.whole(images.train), images.whole(images.test)
print(f"{len(images.train)} images to train on, {len(images.test)} to test on")

# %% [markdown]
# ## The plain script
#
# As in lightly's own example: a student, a teacher that follows it slowly (a moving average of its
# weights), and a loss that asks the student to say about any view of an image what the teacher
# says about a large one.

# %%
FEATURES, HIDDEN, EMBEDDING, PROTOTYPES = 128, 256, 64, 256


class DINO(nn.Module):
    """A small convolutional network with DINO's projection head, and its teacher."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, FEATURES, 2)):
            layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = self.make_head()
        self.teacher_backbone = copy.deepcopy(self.backbone)
        self.teacher_head = self.make_head()
        self.teacher_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    @staticmethod
    def make_head() -> DINOProjectionHead:
        return DINOProjectionHead(
            FEATURES, HIDDEN, EMBEDDING, PROTOTYPES, batch_norm=True, freeze_last_layer=1
        )

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            teacher_out = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        return teacher_out, [self.head(self.backbone(view)) for view in views]


@torch.no_grad()
def show_images_once(model: DINO) -> None:
    """Gives the batch norm of an untrained network the statistics of the images, for k-NN."""
    for part in bank[0].split(32):
        model.backbone(part)
        model.teacher_backbone(part)


def train(name: str, model: DINO, criterion: nn.Module) -> Run:
    """Trains a model; the same for both. CLIMB's criterion has ``terms`` to write down."""
    criterion.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(
        RandomViews(images.train, images.views(local=2)),
        batch_size=64,
        shuffle=True,
        drop_last=True,
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    run = Run(name)
    show_images_once(model)
    measure_knn(run, model, bank, queries)
    for epoch in range(EPOCHS):
        momentum = cosine_schedule(epoch, EPOCHS, 0.99, 1)
        base_losses, rates = [], []
        for views in loader:
            update_momentum(model.backbone, model.teacher_backbone, momentum)
            update_momentum(model.head, model.teacher_head, momentum)
            teacher_out, student_out = model([view.to(DEVICE) for view in views])
            loss = criterion(teacher_out, student_out, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            model.head.cancel_last_layer_gradients(epoch)
            optimizer.step()
            decay.step()
            terms = getattr(criterion, "terms", None)
            base_losses.append(terms.base if terms else loss.detach())
            rates.append(terms.rate if terms else torch.tensor(math.nan))
        run.base_loss.append(float(torch.stack(base_losses).mean()))
        run.rate.append(float(torch.stack(rates).mean()))
        measure_knn(run, model, bank, queries)
    print(f"{name}: k-NN of the student {run.student[0]:.1f} % -> {run.student[-1]:.1f} %")
    return run


def fresh_model() -> DINO:
    """Also seeds what follows: both runs see the same views, in the same order."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return DINO(images.channels).to(DEVICE)


# %%
model = fresh_model()
criterion = DINOLoss(PROTOTYPES)
plain, plain_model = train("plain", model, criterion), model

# %% [markdown]
# ## The one line
#
# ```diff
# -criterion = DINOLoss(PROTOTYPES)
# +criterion = wrap(DINOLoss(PROTOTYPES), student=model.head, teacher=model.teacher_head, beta=BETA)
# ```
#
# It comes before the optimiser is built (here `train` builds it), because the Gaussian that it
# hangs on the projection head has parameters. The loop calls the new criterion as it called the
# old one.

# %%
model = fresh_model()
before = sum(parameter.numel() for parameter in model.head.parameters())
criterion = wrap(DINOLoss(PROTOTYPES), student=model.head, teacher=model.teacher_head, beta=BETA)
after = sum(parameter.numel() for parameter in model.head.parameters())
added = [name for name, _ in model.head.named_parameters() if "gaussian" in name]
print(f"added to the {before} parameters of the student's head: {after - before}, in")
print("\n".join(added), end="\n\n")
climb, climb_model = train("CLIMB", model, criterion), model

# %% [markdown]
# They read the log-variance of a Gaussian from the embedding; the mean is the embedding itself.
# While training, the head passes on a sample; in `eval()`, and in the teacher, the mean.
#
# ## The curves
#
# The two runs started from the same weights and saw the same views in the same order (CLIMB takes
# none of torch's random numbers for its noise), so what differs is due to CLIMB. How much of it
# would be the same with another seed, one seed cannot say.

# %%
figure, (loss_axes, rate_axes, knn_axes) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
figure.get_layout_engine().set(w_pad=0.12)
epochs = range(1, EPOCHS + 1)
for run, colour in ((plain, "tab:blue"), (climb, "tab:orange")):
    loss_axes.plot(epochs, run.base_loss, ".-", color=colour, label=run.name)
    knn_axes.plot([0, *epochs], run.student, ".-", color=colour, label=f"{run.name}, student")
    knn_axes.plot([0, *epochs], run.teacher, ".:", color=colour, label=f"{run.name}, teacher")
knn_axes.axhline(plain.student[0], color="0.4", ls="--", label="untrained, both")
rate_axes.plot(epochs, climb.rate, ".-", color="tab:orange", label="CLIMB")
rate_axes.set_ylim(bottom=0)
bits = rate_axes.secondary_yaxis("right", functions=(nats_to_bits, lambda b: b * math.log(2)))
bits.set_ylabel("rate (bits per view)")
for axes, label, title in (
    (loss_axes, "DINO's loss (cross-entropy, nats)", "Base loss"),
    (rate_axes, "rate (nats per view)", "Rate: what CLIMB pays for"),
    (knn_axes, "k-NN accuracy (%)", "k-NN on the backbone's features"),
):
    axes.set(xlabel="epochs of training", ylabel=label, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# The rate has a curve for CLIMB alone: the plain model has no Gaussian, and a deterministic
# embedding has no finite rate. A dimension counts as *active* if it carries more than 0.01 nats.
#
# Two columns put the accuracies in their place. *Untrained* is the same network before the first
# step, when student and teacher are still one: only what lies above that was learned. *Plain, best*
# is the plain run after the epoch at which its student was best. As this epoch was picked on the
# test images, the column flatters the plain run; a gain of CLIMB's that lies below it could have
# been had by stopping early.

# %%
climb.active = count_active(climb_model, criterion.heads[0], queries[0])
untrained = Run("untrained", [math.nan], [math.nan], plain.student[:1], plain.teacher[:1])
best = 1 + int(np.argmax(plain.student[1:]))
stopped = Run(
    "plain, best",
    plain.base_loss[best - 1 : best],
    [math.nan],
    plain.student[best : best + 1],
    plain.teacher[best : best + 1],
)
print(make_table((untrained, stopped, plain, climb), "cross-entropy, nats"))
print(f"best epoch of the plain run: {best} of {EPOCHS}")

# %% [markdown]
# The first column first: untrained, k-NN is at 92.2 %, and no student or teacher ends above that.
# The features of a random network tell digits apart well enough, so in this small example the
# accuracies say nothing about what DINO has learned, with CLIMB or without; where they differ, they
# differ in how much was lost. What this notebook can show is the workflow, base loss and rate.
# [07_wrong_pairs](07_wrong_pairs.ipynb) has a DINO that learns, over several seeds.
#
# ## Is one of them better?
#
# Both were tested on the same images, so what counts are the images that one of the two gets right
# and the other wrong. If neither were better, each of these would fall to either side as a coin
# does: the difference would have a standard deviation of the square root of their number.


# %%
@torch.no_grad()
def features(model: DINO, pixels: Tensor) -> Tensor:
    """Normalised features of the student's backbone, (N, FEATURES)."""
    model.eval()
    return F.normalize(torch.cat([model.backbone(part) for part in pixels.split(500)]), dim=1)


def is_right(model: DINO) -> Tensor:
    """Whether k-NN with 20 neighbours, as in the table, finds the class of each test image."""
    pixels, labels = bank
    ranked = knn_predict(features(model, queries[0]), features(model, pixels).T, labels, 10, 20)
    return (ranked[:, 0] == queries[1]).cpu()


known, asked = bank[1].cpu(), queries[1].cpu()
right = {"plain": is_right(plain_model), "CLIMB": is_right(climb_model)}
for name, hits in right.items():
    print(f"{name}: {int(hits.sum())} of {len(hits)} test images right")
only_plain = int((right["plain"] & ~right["CLIMB"]).sum())
only_climb = int((right["CLIMB"] & ~right["plain"]).sum())
chance = math.sqrt(only_plain + only_climb)
print(f"\nright with plain alone: {only_plain} images; with CLIMB alone: {only_climb}")
print(f"difference {only_climb - only_plain:+d}, standard deviation by chance {chance:.1f}")
if abs(only_climb - only_plain) <= 2 * chance:
    print("-> within two of these: no difference was shown.")
else:
    print("-> beyond two of these, with one seed: repeat with other seeds before you believe it.")

# %% [markdown]
# Even a difference beyond two standard deviations would speak of these two trained networks only.
# Another seed gives other networks; a gain that is smaller than the spread between seeds is none.
#
# ## Nearest neighbours
#
# Six test images, each with the six closest training images of either model. Three are drawn at
# random; three are those with the most neighbours of a wrong class, counted over both models so
# that the choice favours neither.

# %%
K = 6


def neighbours(model: DINO, k: int) -> Tensor:
    """Indices of the k training images that are closest to each test image, closest first."""
    similarity = features(model, queries[0]) @ features(model, bank[0]).T
    return similarity.topk(k, dim=1).indices.cpu()


near = {"plain": neighbours(plain_model, K), "CLIMB": neighbours(climb_model, K)}
mistakes = sum((known[index] != asked[:, None]).sum(dim=1) for index in near.values())
hardest = mistakes.argsort(descending=True, stable=True)[:3].tolist()
drawn = np.random.default_rng(SEED).permutation(len(asked))
rows = [int(i) for i in drawn if i not in hardest][:3] + hardest


def show(axes: plt.Axes, part: Labelled, index: int, frame: str) -> None:
    image, label = part[index]
    axes.imshow(np.asarray(image), cmap="gray_r" if images.channels == 1 else None)
    axes.set(xticks=[], yticks=[], title=f"{label}")
    axes.title.set(fontsize=9, color=frame)
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=3)


figure, grid = plt.subplots(
    len(rows),
    2 * K + 3,
    figsize=(13, 6.6),
    width_ratios=[1, 0.3, *[1] * K, 0.3, *[1] * K],
    gridspec_kw={"wspace": 0.12, "hspace": 0.45},
)
for row, query in zip(grid, rows, strict=True):
    row[1].axis("off")
    row[K + 2].axis("off")
    show(row[0], images.test, query, "black")
    for first, index in ((2, near["plain"]), (K + 3, near["CLIMB"])):
        for axes, neighbour in zip(row[first : first + K], index[query].tolist(), strict=True):
            same = known[neighbour] == asked[query]
            show(axes, images.train, neighbour, "tab:blue" if same else "tab:red")
for row, words in ((1, "drawn at random"), (4, "hardest for both")):
    grid[row][0].set_ylabel(words, fontsize=10, labelpad=8)
for x, words in ((0.155, "test image"), (0.38, "closest with plain"), (0.74, "closest with CLIMB")):
    figure.text(x, 0.95, words, ha="center", fontsize=12)
caption = "Class above each image. Blue frame: the class of the test image; red: another."
figure.text(0.5, 0.05, caption, ha="center")
plt.show()

# %% [markdown]
# ## A map of the embeddings
#
# t-SNE lays the test images out in the plane so that neighbours stay neighbours. Distances between
# groups, their sizes and the axes mean nothing, and the two maps are not aligned with each other:
# what can be compared is how pure the groups are.

# %%
figure, both = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
shown = slice(0, 1000)
for axes, (name, model) in zip(both, (("plain", plain_model), ("CLIMB", climb_model)), strict=True):
    vectors = features(model, queries[0][shown]).cpu().numpy()
    places = TSNE(init="pca", perplexity=30, random_state=SEED).fit_transform(vectors)
    for label in range(10):
        of_label = asked[shown].numpy() == label
        axes.scatter(*places[of_label].T, s=14, color=f"C{label}", label=str(label))
    axes.set(title=name, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    axes.set(xticks=[], yticks=[])
both[1].legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
figure.suptitle(f"Features of the {len(asked[shown])} test images")
plt.show()

# %% [markdown]
# ## What to take along
#
# - One line turns CLIMB on. What it adds sits in the projection head; the backbone, which you keep,
#   has the parameters that it had before.
# - The rate is the new number to watch; `beta` is its price. Run this again with another `BETA` and
#   see what the rate, the base loss and k-NN do.
# - Whether CLIMB helps on your data is for you to measure, over several seeds and above the
#   untrained network: `python quickstart.py --seed 1`, and so on. What our own trials showed is in
#   the [README](../README.md).
# - Next: `beta` may rise over the training, and other priors are there:
#   the [guide](README.md) has all options, [LIGHTLY.md](LIGHTLY.md) every loss and head.
