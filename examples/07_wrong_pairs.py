# %% [markdown]
# # Pairs that show two images
#
# Self-supervised training believes that two views show one image. Here 40 % of the pairs show two
# different ones, as pairs of neighbouring video frames, of near duplicates or of an image and a
# caption may. **What you will learn:**
#
# 1. what such pairs do to lightly's DINO: does it still learn anything, or does it *collapse* to
#    the uniform answer, the same for every image?
# 2. whether CLIMB helps, with clean pairs and with wrong ones, and how a gain is told from a
#    collapse that was prevented,
# 3. which rows a table needs for that: the untrained network, the best moment of the plain run, the
#    noise of CLIMB's Gaussian alone, and several seeds.
#
# The data are scikit-learn's digits, so nothing is downloaded; `DATA = "cifar10"` takes CIFAR-10.
# Loading, augmentation, training and k-NN come from [digits.py](digits.py) in this folder.

# %%
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.stats import t as student_t

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, under lightly
from digits import DEVICE, PROTOTYPES, knn_accuracy, load, random_view, train

DATA = "digits"  # or "cifar10": torchvision downloads 170 MB into the folder data
SHARES = {"clean pairs": 0.0, "40 % wrong pairs": 0.4}
# Weights of the rate, in units of DINO's loss per nat. None: without CLIMB; 0: the noise alone.
SETTINGS = {"plain": None, "noise alone": 0.0, "CLIMB, beta 0.001": 1e-3, "CLIMB, beta 0.01": 1e-2}
SEEDS = range(1, 6)  # 0 was looked at while this was written
STEPS, BATCH, EVERY = 300, 64, 60  # k-NN is measured every so many steps

plt.rcParams.update(
    {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 90}
)

data = load(DATA, limit=None if DATA == "digits" else 10_000)
print(f"{len(data.train.labels)} images to train on and for the k-NN to look among,")
print(f"{len(data.validation.labels)} to pick a step on, {len(data.test.labels)} for the tables")


# %% [markdown]
# ## The runs
#
# In a batch of 64 the second views of the first 26 images are handed on by one place. The other
# pairs stay as they are, and no random number more is drawn: with wrong pairs as with clean ones,
# all runs of a seed start from the same weights and draw the same views. So each run has a *plain
# twin*, and what counts is the difference to it.
#
# Betas, steps and seeds were fixed after a look at seed 0, which is left out, and no row was chosen
# by its result. The one choice is made for the plain run: *plain, best step* is the plain run at
# the step at which k-NN of its student was best on the validation images. To stop early is the
# cheapest remedy there is; that choice needs labels.
#
# The untrained network has the weights of the plain run before its first step, and batch norm that
# has seen the images (a learning rate of 0). Student and teacher are then one network.


# %%
def make_views(share):
    """Two views of each image; ``share`` of the pairs show two images."""

    def views(images, generator):
        wrong = round(share * len(images))
        other = torch.arange(len(images), device=images.device)
        other[:wrong] = other[:wrong].roll(1)
        return [random_view(images, generator), random_view(images[other], generator)]

    return views


def accuracies(run):
    """k-NN in %, on the validation images, and by three networks on the test images."""

    def knn(embed, part):
        return knn_accuracy(
            embed(data.train.images), data.train.labels, embed(part.images), part.labels
        )

    return {
        "validation": knn(run.features, data.validation),
        "student": knn(run.features, data.test),
        "teacher": knn(run.teacher_features, data.test),
        "embedding": knn(run.embedding, data.test),
    }


def measure(share, beta, seed, **options):
    """Trains once; what was measured on the way, by step."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    curve = {}

    def watch(run, step):
        if step % EVERY == 0:
            curve[step] = {
                **accuracies(run),
                "base": np.mean(run.base[-EVERY:]),
                "rate": np.mean(run.rate[-EVERY:]) if run.rate else math.nan,
            }

    options = {"steps": STEPS, "batch": BATCH, **options}
    views = make_views(share)
    train(
        data.train.images, beta=beta, method="dino", views=views, seed=seed, watch=watch, **options
    )
    return curve


def side_by_side(jobs):
    """Two runs at a time, each with a core of its own."""
    return Parallel(n_jobs=2 if DEVICE == "cpu" else 1)(
        delayed(measure)(*job, **options) for job, options in jobs
    )


UNTRAINED, BEST = "untrained", "plain, best step"
curves = {}
for pairs, share in SHARES.items():
    still = [((share, None, seed), {"steps": EVERY, "learning_rate": 0.0}) for seed in SEEDS]
    curves[pairs, UNTRAINED] = side_by_side(still)
    for name, beta in SETTINGS.items():
        curves[pairs, name] = side_by_side([((share, beta, seed), {}) for seed in SEEDS])


# %% [markdown]
# ## The tables
#
# Mean over the seeds, on the test images, at the last step. *- plain* is the paired difference to
# the plain twin with its 95 % t-interval: an interval that holds 0 shows nothing. *Base loss* is
# DINO's, in nats, over the last 60 steps. The uniform answer over K prototypes has a base loss of
# ln K, whatever the images are; a run that ends within 0.05 of ln K, above or below, counts as
# collapsed. (Further above, the answers are worse than the uniform one, not yet a better network.)

# %%
ROWS = (UNTRAINED, BEST, *SETTINGS)
PLACES = ("student", "teacher", "embedding")
UNIFORM = math.log(PROTOTYPES)


def best_step(curve):
    """The step at which the student was best on the validation images."""
    return max(curve, key=lambda step: curve[step]["validation"])


def ends(pairs, name):
    """What each seed came to: at the last step, or at the best one of the plain run."""
    if name == BEST:
        return [curve[best_step(curve)] for curve in curves[pairs, "plain"]]
    return [curve[max(curve)] for curve in curves[pairs, name]]


def column(pairs, name, key):
    """One value for each seed."""
    return np.array([end[key] for end in ends(pairs, name)])


def interval(differences):
    """Half the width of the 95 % t-interval of a mean."""
    critical = student_t.ppf(0.975, len(differences) - 1)
    return critical * differences.std(ddof=1) / math.sqrt(len(differences))


for pairs in SHARES:
    print(f"{pairs}, {len(SEEDS)} seeds: k-NN accuracy in % (test images)")
    print(f"{'':18}" + "".join(f"{place:>10}{'- plain':>14}" for place in PLACES), end="")
    print(f"{'base loss':>11}{'- ln K':>8}{'collapsed':>11}{'rate (nats)':>13}")
    for name in ROWS:
        line = f"{name:18}"
        for place in PLACES:
            values = column(pairs, name, place)
            change = values - column(pairs, "plain", place)
            shown = "" if name == "plain" else f"{change.mean():+.1f} ± {interval(change):.1f}"
            line += f"{values.mean():10.1f}{shown:>14}"
        base, rate = column(pairs, name, "base"), column(pairs, name, "rate")
        collapsed = f"{(abs(base - UNIFORM) < 0.05).sum()} of {len(base)}"
        line += f"{base.mean():11.3f}{base.mean() - UNIFORM:+8.3f}{collapsed:>11}"
        print(line + f"{'-' if np.isnan(rate).any() else f'{rate.mean():.1f}':>13}")
    print()
print(f"ln K = ln {PROTOTYPES} = {UNIFORM:.3f} nats")
chosen = {pairs: [best_step(curve) for curve in curves[pairs, "plain"]] for pairs in SHARES}
for pairs, steps in chosen.items():
    print(f"best steps of the plain runs, {pairs}: {', '.join(map(str, steps))}")

# %% [markdown]
# ## Over the steps
#
# The dashed line is the untrained network: what lies below it was unlearned. Bars are 95 %
# t-intervals of the mean over the seeds. They hold the spread between seeds, which the paired
# differences above do not have: two curves whose bars overlap may still differ.

# %%
COLOURS = dict(zip(SETTINGS, ("k", "tab:green", "tab:blue", "tab:orange"), strict=True))
figure, panels = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True, sharey="col")
for row, pairs in zip(panels, SHARES, strict=True):
    for axes, key in zip(row, ("student", "embedding", "base"), strict=True):
        for number, (name, colour) in enumerate(COLOURS.items()):
            runs = curves[pairs, name]
            steps = np.array(list(runs[0]))
            values = np.array([[at[key] for at in curve.values()] for curve in runs])
            bars = [interval(at) for at in values.T]
            axes.errorbar(
                steps + 3 * number, values.mean(0), bars, color=colour, capsize=2, label=name
            )
        if key == "base":
            axes.axhline(UNIFORM, color="tab:red", ls=":", label="ln K: the uniform answer")
            axes.set_ylabel("DINO's loss (nats)")
        else:
            level = column(pairs, UNTRAINED, key).mean()
            axes.axhline(level, color="0.4", ls="--", label="untrained")
            axes.set_ylabel("k-NN accuracy (%)")
    row[0].set_title(f"{pairs}: features of the student")
    row[1].set_title(f"{pairs}: embedding")
    row[2].set_title(f"{pairs}: base loss")
for axes in panels[1]:
    axes.set_xlabel("optimiser steps")
handles, labels = panels[0, 0].get_legend_handles_labels()
more, words = panels[0, 2].get_legend_handles_labels()
figure.legend(
    [*handles, *more[:1]], [*labels, *words[:1]], loc="outside lower center", ncols=len(labels) + 1
)
plt.show()

# %% [markdown]
# ## What is found
#
# On the digits, with five seeds:
#
# - **Clean pairs: DINO learns, CLIMB gains nothing that can be told from chance.** Plain DINO ends
#   3.9 ± 1.2 points above the untrained network (features of the student), 14 points in the
#   embedding. CLIMB is 0.6 points above its plain twins, with intervals of 1.5 points and more. The
#   noise alone is 0.8 ± 1.7 above, so if there is a gain, it does not come from the rate.
# - **40 % wrong pairs: DINO collapses.** All five plain runs end within 0.05 of ln K. Of the 3.9
#   points above the untrained network 0.8 ± 0.6 are left; k-NN of the embedding keeps half of the
#   gain (7 of 14 points, ± 5.6), so a base loss at ln K does not mean that nothing was learned. The
#   best step is no remedy (-0.3 ± 0.6): there was no better moment to stop at.
# - **CLIMB does not prevent it.** The noise alone and beta 0.001 end at ln K as well. Beta 0.01
#   ends 0.14 above it: by the rule that is no collapse, but such answers (given with the noise on)
#   are worse than the uniform one. k-NN of the student is 0.4 to 0.5 points above plain with all
#   three, with intervals of 1.0 to 1.8 points.
#
# So there is no gain here to be explained. Had there been one with wrong pairs, the base loss would
# have been the first thing to look at: where the twin sits at ln K and CLIMB does not, the gain is
# a collapse that was prevented, and a slower teacher, another temperature or fewer wrong pairs
# might prevent it as well. The second is the untrained network: the best student with wrong pairs
# lies 1.4 points above a network that never saw a gradient.
#
# What this does not show: gains of less than about 1.5 points, which five seeds and 450 test images
# cannot see; longer training, other shares and betas, or CIFAR-10 (`DATA`). The tables follow such
# changes; this text does not.
