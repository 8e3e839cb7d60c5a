# %% [markdown]
# # CLIMB in solo-learn, by one config key
#
# **What you will learn:** how to turn CLIMB on in a run of solo-learn without touching its code or
# your config, where the run says what is in force, what it logs every epoch, what is in the
# checkpoint, and how to run k-NN on it without a GPU.
#
# It runs solo-learn's own `main_pretrain.py` on the CPU, in two to three minutes, on
# scikit-learn's handwritten digits, written out as a folder of images: nothing is downloaded.
# `DATA = "cifar10"` below takes CIFAR-10.
#
# **You need solo-learn**, which is on no package index:
#
# ```console
# pip install 'climb-plugin[solo]'
# git clone https://github.com/vturrisi/solo-learn
# SOLO_LEARN=$PWD/solo-learn jupyter lab
# ```
#
# A checkout in `PYTHONPATH` does as well. Without one, the notebook says so and ends here.

# %%
import csv
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


class StopNotebook(Exception):
    """Ends the notebook without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return []


if "SOLO_LEARN" in os.environ:
    sys.path.insert(0, os.environ["SOLO_LEARN"])
missing = [name for name in ("solo", "hydra", "lightning", "timm") if find_spec(name) is None]
if not missing:
    CHECKOUT = Path(find_spec("solo").origin).parents[1]
    missing = [name for name in ["main_pretrain.py"] if not (CHECKOUT / name).is_file()]
if missing:
    print(f"This notebook needs solo-learn; not found: {', '.join(missing)}.")
    print("    pip install 'climb-plugin[solo]'")
    print("    git clone https://github.com/vturrisi/solo-learn")
    print("and set SOLO_LEARN (or PYTHONPATH) to the checkout before starting Jupyter.")
    raise StopNotebook

print("solo-learn is here:", sorted(path.name for path in CHECKOUT.glob("main_*.py")))

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from climb_plugin.monitor import nats_to_bits

DATA = "digits"  # or "cifar10": solo-learn downloads 170 MB into the folder datasets
EPOCHS = 4
BETA = 0.01  # price of the rate, in units of the method's loss per nat
EXAMPLES = Path.cwd()
plt.rcParams["figure.dpi"] = 90

scratch = tempfile.TemporaryDirectory()  # goes when the notebook's process does
FOLDER = Path(scratch.name)


def write_images(split: str, chosen: np.ndarray) -> None:
    """One folder for each class, as for torchvision's ImageFolder: 32x32 PNG files."""
    for index in chosen:
        folder = FOLDER / "images" / split / str(digits.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8))
        scan.resize((32, 32)).save(folder / f"{index}.png")


if DATA == "digits":
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=450, stratify=digits.target, random_state=0
    )
    for split, chosen in (("train", train), ("val", test)):
        write_images(split, chosen)
        print(f"images/{split}: {len(chosen)} images")
    data = {
        "data.dataset": "custom",
        "data.train_path": "images/train",
        "data.val_path": "null",
        "augmentations.0.horizontal_flip.prob": 0,  # a mirrored digit is none
    }
else:
    datasets = EXAMPLES / "datasets"
    data = {
        "data.dataset": "cifar10",
        "data.train_path": datasets,
        "data.val_path": datasets,
        "++limit_train_batches": 40,  # leave these two out with time or a GPU
        "++limit_val_batches": 0,
    }

# %% [markdown]
# ## The key
#
# [solo_learn/cpu_smoke.yaml](solo_learn/cpu_smoke.yaml) is a config as solo-learn has them, for
# DINO with a ResNet-18 on the CPU. What is CLIMB's is one argument on the command line:
#
# ```console
# ++method_kwargs.climb_beta=0.01
# ```
#
# The `++` is Hydra's: it sets a key whether or not the config has it. Lightning finds the installed
# plugin by itself, whenever a Trainer is made; the checkout stays as it was cloned. (On a GPU leave
# the config's `accelerator`, `devices`, `strategy` and `precision` as yours are.)


# %%
def masked(text: str) -> str:
    """A text without the folders of this machine, which say nothing to a reader."""
    text = text.replace(str(FOLDER), ".").replace(str(CHECKOUT), "solo-learn")
    return text.replace(str(EXAMPLES), "examples")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in the scratch folder and shows the command."""
    python = [sys.executable, "-W", "ignore", *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    words = masked(" ".join(["$ python", *map(str, command)]))
    lines = textwrap.wrap(words, 90, break_long_words=False, break_on_hyphens=False)
    print(" \\\n    ".join(lines), end="\n\n")
    return subprocess.run(
        python, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )


def pretrain(overrides: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
    """A training by solo-learn's script, without the bars of its progress."""
    overrides = {**data, "max_epochs": EPOCHS, "optimizer.batch_size": 64, **overrides}
    return run(
        CHECKOUT / "main_pretrain.py",
        f"--config-path={EXAMPLES / 'solo_learn'}",
        "--config-name=cpu_smoke.yaml",
        *(f"{key}={value}" for key, value in overrides.items()),
        "++enable_progress_bar=false",
    )


done = pretrain({"++method_kwargs.climb_beta": BETA})
if done.returncode:
    raise RuntimeError(masked(done.stderr)[-2000:])
print(*re.findall(r"CLIMB: .*", done.stdout), sep="\n")

# %% [markdown]
# The line that begins with *CLIMB:* is printed once, when the training starts: the schedule of
# beta, the prior, and how wide the Gaussian is.
#
# ### A key that does not exist ends the run
#
# No key is accepted without effect, so that a slip of the pen is not taken for a result:

# %%
slip = pretrain({"++method_kwargs.climb_bta": BETA})
print(f"exit status {slip.returncode}", *re.findall(r"\w+Error: .*", slip.stderr), sep="\n")

# %% [markdown]
# ## The log
#
# Each epoch the run logs `climb_rate` and `climb_entropy` (nats), `climb_beta`, and
# `climb_base_loss`: the method's loss and that of solo-learn's online classifier, which is trained
# beside it on the labels. They go to whatever logger the run has: with `wandb.enabled=true` to
# Weights & Biases, here to Lightning's CSV file.

# %%
(metrics,) = FOLDER.glob("lightning_logs/*0/metrics.csv")
with metrics.open() as file:
    rows = [row for row in csv.DictReader(file) if row["climb_rate"]]
columns = ["dino_loss_epoch", "train_class_loss_epoch", "climb_base_loss"]
columns += ["climb_rate", "climb_entropy", "climb_beta"]
log = {name: [float(row[name]) for row in rows] for name in columns}
print("epoch" + "".join(f"{name.removesuffix('_epoch'):>18}" for name in columns))
for epoch, values in enumerate(zip(*log.values(), strict=True), start=1):
    print(f"{epoch:5}" + "".join(f"{value:18.3f}" for value in values))

# %%
figure, (loss_axes, rate_axes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
figure.get_layout_engine().set(w_pad=0.12)
epochs = range(1, EPOCHS + 1)
loss_axes.plot(epochs, log["dino_loss_epoch"], "o-", label="DINO's loss")
loss_axes.plot(epochs, log["train_class_loss_epoch"], "s--", label="online classifier's loss")
loss_axes.set(ylabel="cross-entropy (nats)", title="What solo-learn logs")
rate_axes.plot(epochs, log["climb_rate"], "o-", color="tab:orange", label="rate")
rate_axes.set(ylabel="rate (nats per view)", title="What CLIMB adds to it")
bits = rate_axes.secondary_yaxis("right", functions=(nats_to_bits, lambda b: b * np.log(2)))
bits.set_ylabel("rate (bits per view)")
for axes in (loss_axes, rate_axes):
    axes.set(xlabel="epoch (mean over its steps)", ylim=(0, 1.25 * axes.get_ylim()[1]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

first, last = log["climb_rate"][0], log["climb_rate"][-1]
print(f"The rate was {first:.1f} nats on average in the first epoch and {last:.1f} in the last.")
std, width = 0.1, 32
alone = width * (std**2 - 1 - np.log(std**2)) / 2
print(f"The std at the start, {std} in {width} dimensions, costs {alone:.1f} by itself.")

# %% [markdown]
# A real training has thousands of steps, this one fewer than a hundred: how the rate falls under
# its price in a longer one is to be seen in [01_lightly_dino](01_lightly_dino.ipynb).
#
# ## The checkpoint
#
# It lies where solo-learn puts it, and loads in its scripts with and without the plugin. The
# parameters of the head are in the state dict, for the student and for the momentum copy; beside
# it, the state of the plugin's callback has every `climb_*` value that was in force, with the
# defaults written out. A run that resumes the checkpoint with other values is refused.

# %%
(checkpoint,) = FOLDER.glob("trained_models/dino/*/*.ckpt")
saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
print("checkpoint:", checkpoint.name)
print("entries:", ", ".join(saved))
for name, value in saved["state_dict"].items():
    if "gaussian" in name:
        print(f"    {name}: {tuple(value.shape)}")
print("in force:", saved["callbacks"]["SoloCallback"]["keys"])

# %% [markdown]
# ## k-NN
#
# solo-learn's `main_knn.py` needs CUDA. `climb_plugin.adapters.solo_knn` takes the same arguments
# and runs anywhere; the accuracies come from solo-learn's own classifier. solo-learn enlarges the
# images of a folder to 224 pixels, which takes a CPU long, so this compares 100 images with 300.

# %%
command = ["--pretrained_checkpoint_dir", checkpoint.parent.relative_to(FOLDER)]
if DATA == "digits":
    write_images("few", train[:300])
    write_images("asked", test[:100])
    command += ["--dataset", "custom", "--train_data_path", "images/few"]
    command += ["--val_data_path", "images/asked"]
else:
    # All 60,000 images: on a CPU this takes long.
    command += ["--dataset", "cifar10", "--train_data_path", datasets, "--val_data_path", datasets]
command += ["--k", "5", "20", "--feature_type", "backbone", "projector", "--num_workers", "0"]
knn = run("-m", "climb_plugin.adapters.solo_knn", *command)
if knn.returncode:
    raise RuntimeError(masked(knn.stderr)[-2000:])
print(knn.stdout)

# %% [markdown]
# `backbone` is what one keeps after the training; `projector` is the mean of CLIMB's Gaussian. With
# 100 test images each accuracy has a standard error of several points.
#
# ## What to take along
#
# - `++method_kwargs.climb_beta=...` is all; `climb_beta=0`, or no key, is solo-learn bit for bit.
# - The numbers above show that the parts work together: a few epochs on digits say nothing about
#   what CLIMB does for your model. For that, run your config with the key and without, over several
#   seeds, and compare the k-NN of both.
# - The other keys (`climb_prior`, `climb_at`, `climb_warmup`, ...) and what they mean for each
#   method are in [SOLO_LEARN.md](SOLO_LEARN.md).
