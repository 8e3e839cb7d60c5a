"""Trains one setting and measures it; stopped at any moment, it goes on from its last epoch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightly.models.modules import DINOProjectionHead
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from climb_plugin import ClimbLoss
from knn_study.data import Labelled, Parts, RandomViews, normalised
from knn_study.lines import code
from knn_study.measures import accuracy, robustness
from knn_study.methods import METHODS, Learner
from knn_study.pairs import Pairs
from knn_study.regularisers import Penalised, regularised
from knn_study.settings import Settings


class OutOfTimeError(Exception):
    """The time is up; the run's checkpoint holds what was done."""


@dataclass
class Measured:
    """What a run measured: by epoch, or at the epochs in ``epoch``; k-NN in per cent."""

    epoch: list[int] = field(default_factory=list)
    validation: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    base_loss: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)  # nats; empty without posteriors
    beta: list[float] = field(default_factory=list)
    pairs: dict[str, list[float]] = field(default_factory=dict)  # of pairs.Pairs, by epoch
    robustness: dict[str, float] = field(default_factory=dict)  # of the student, validation
    seconds: float = 0.0
    images_per_second: float = 0.0  # of training, each counted once whatever its views
    code: str = field(default_factory=code)  # several, joined by +, if it changed between epochs


def train(
    settings: Settings,
    parts: Parts,
    *,
    device: str,
    checkpoint: Path,
    deadline: float = math.inf,
    bar: bool = True,
) -> Measured:
    """Trains from scratch, or from ``checkpoint`` if it is there.

    Args:
        settings: All that the numbers depend on.
        parts: The images.
        device: As torch names it.
        checkpoint: Replaced after every epoch.
        deadline: Value of ``time.monotonic()`` by which the last epoch should have ended.
        bar: Whether to show progress.

    Raises:
        OutOfTimeError: At the deadline.
        FloatingPointError: If the loss is not finite any more.
        ValueError: If ``checkpoint`` is damaged, or of other settings, images or device.
    """
    run = _Run(settings, parts, device)
    done = run.load(checkpoint)
    steps = run.epochs * run.steps
    with tqdm(
        total=steps, initial=done * run.steps, desc=settings.name, unit="step", disable=not bar
    ) as progress:
        before, longest = math.inf, 0.0
        for epoch in range(done, run.epochs):
            now = time.monotonic()
            before, longest = now, max(longest, now - before)
            if now + longest > deadline:
                raise OutOfTimeError
            run.epoch(epoch, progress)
            run.save(checkpoint, epoch + 1)
    return run.measured


class _Run:
    def __init__(self, settings: Settings, parts: Parts, device: str) -> None:
        self.settings, self.device = settings, device
        there = len(parts.train.labels)
        if max(settings.images, settings.bank) > there:
            raise ValueError(
                f"images={settings.images} and bank={settings.bank}, but there are {there} images "
                "to train on (without those for validation)"
            )
        self.cuda = device.startswith("cuda")
        self.made_on = {"data": parts.fingerprint, "device": device.split(":")[0]}
        self.train = parts.train.part(0, settings.images).to(device)
        self.bank, self.validation, self.test = (
            part.resized(settings.pixels).to(device)
            for part in (parts.train.part(0, settings.bank), parts.validation, parts.test)
        )
        # The untrained network needs its batch statistics only.
        self.epochs = 1 if settings.regulariser == "untrained" else settings.epochs
        self.steps = len(self.train.labels) // settings.batch
        if not self.steps:
            raise ValueError(f"batch={settings.batch} is more than the {settings.images} images")
        # CLIMB takes none of torch's random numbers: twins start with the same weights.
        torch.manual_seed(settings.seed)
        method = METHODS[settings.method]
        self.learner = Learner(settings).to(device).to(memory_format=torch.channels_last)
        loss = method.loss(settings).to(device)
        self.criterion = regularised(loss, self.learner, settings, steps=self.steps * self.epochs)
        self.pairs = Pairs(self.criterion, loss)
        self.optimizer = _make_optimizer(settings, [*self._trained()])
        total = self.steps * self.epochs
        self.decay = CosineWarmupScheduler(self.optimizer, max(1, total // 20), total)
        self.views = RandomViews(
            settings, local=settings.local_views if settings.method == "dino" else 0
        )
        if self.cuda:
            # Runs of one process would share what is compiled, until there is too much of it.
            torch.compiler.reset()
            self.learner.backbone.compile(dynamic=False)
        self.measured = Measured()

    def _trained(self) -> Iterator[nn.Parameter]:
        yield from (p for p in self.learner.parameters() if p.requires_grad)
        yield from self.criterion.parameters()  # of a learned prior

    def epoch(self, epoch: int, progress: tqdm[Any]) -> None:
        settings, measured = self.settings, self.measured
        # Twins see the same images in the same order, also after a resume.
        torch.manual_seed(1_000_003 * (settings.seed + 1) + epoch)
        began = time.perf_counter()
        self.learner.train()
        logs: list[Tensor] = []
        order = torch.randperm(len(self.train.labels), device=self.device)
        for step, chosen in enumerate(order[: self.steps * settings.batch].split(settings.batch)):
            done = epoch * self.steps + step
            self.learner.update_teacher(
                cosine_schedule(done, self.epochs * self.steps, settings.momentum, 1)
            )
            logs.append(self._step(self.train.images[chosen], epoch))
            progress.update()
        means = torch.stack(logs).mean(0).tolist()  # waits for the device, once an epoch
        took = time.perf_counter() - began
        measured.base_loss.append(means[0])
        if isinstance(self.criterion, ClimbLoss):
            measured.rate.append(means[1])
            measured.beta.append(float(self.criterion.terms.beta))
        for name, value in self.pairs.means().items():
            measured.pairs.setdefault(name, []).append(value)
        if not math.isfinite(means[0]):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {means[0]}")
        last = epoch + 1 == self.epochs
        if last or (epoch + 1) % settings.every == 0:
            measured.epoch.append(epoch + 1)
            for who, accuracy in self._knn(self.validation).items():
                measured.validation.setdefault(who, []).append(accuracy)
            shown = max(values[-1] for values in measured.validation.values())
            progress.set_postfix_str(f"k-NN {shown:.1f} %")
        if last:
            measured.test = self._knn(self.test)
            measured.robustness = robustness(self._student, self.validation, self.bank)
        measured.seconds += time.perf_counter() - began
        speed = self.steps * settings.batch / took
        before = measured.images_per_second
        measured.images_per_second = max(before, speed)  # the first epoch compiles

    def _step(self, images: Tensor, epoch: int) -> Tensor:
        """Trains on a batch; returns the base loss and, with posteriors, the rate."""
        views = [v.contiguous(memory_format=torch.channels_last) for v in self.views(images)]
        with autocast(self.settings, self.device):
            outputs = self.learner(views)
        outputs = tuple(_in_float32(output) for output in outputs)
        settings = self.settings
        more = {"epoch": epoch} if settings.method == "dino" else {}
        try:
            loss: Tensor = self.criterion(*outputs, **more)
        except ValueError as error:  # ClimbLoss looks at each value
            raise FloatingPointError(str(error)) from error
        self.pairs.step(outputs, self.views.wrong, settings.teacher_temperature)
        if settings.regulariser == "untrained":
            return loss.detach().view(1)
        self.optimizer.zero_grad()
        loss.backward()
        if isinstance(self.learner.head, DINOProjectionHead):
            self.learner.head.cancel_last_layer_gradients(epoch)
        self.optimizer.step()
        self.decay.step()
        if isinstance(self.criterion, ClimbLoss):
            return torch.stack([self.criterion.terms.base, self.criterion.terms.rate])
        if isinstance(self.criterion, Penalised):
            return self.criterion.base.view(1)
        return loss.detach().view(1)

    @torch.no_grad()
    def _knn(self, asked: Labelled) -> dict[str, float]:
        """Of the features of student and teacher, and of the student's embedding (its mean)."""
        self.learner.eval()
        queries, known = self._encoded(asked), self._encoded(self.bank)
        return {
            who: accuracy(queries[who], asked.labels, known[who], self.bank.labels) for who in known
        }

    def _encoded(self, part: Labelled) -> dict[str, Tensor]:
        """Normalised features, each (N, F)."""
        student = self._features(self.learner.backbone, part)
        found = {"student": student, "embedding": self.learner.embedding(student)}
        if self.learner.teacher_backbone is not None:
            found["teacher"] = self._features(self.learner.teacher_backbone, part)
        return {who: F.normalize(features, dim=1) for who, features in found.items()}

    def _student(self, part: Labelled) -> Tensor:
        return F.normalize(self._features(self.learner.backbone, part), dim=1)

    @torch.no_grad()
    def _features(self, backbone: nn.Module, part: Labelled) -> Tensor:
        """(N, F), in float32."""
        with autocast(self.settings, self.device):
            return torch.cat(
                [
                    backbone(normalised(some).contiguous(memory_format=torch.channels_last)).float()
                    for some in part.images.split(500)
                ]
            )

    # ---- Checkpoints -----------------------------------------------------------------------------

    def _owners(self) -> dict[str, Any]:
        owners = (self.learner, self.criterion, self.optimizer, self.decay)
        return dict(zip(("learner", "criterion", "optimizer", "decay"), owners, strict=True))

    def save(self, path: Path, epochs: int) -> None:
        """Replaces the file in one step: it is whole at every moment."""
        state = {
            "settings": asdict(self.settings),
            "made_on": self.made_on,
            "epochs": epochs,
            "measured": asdict(self.measured),
            # MoCo's memory bank is in no state dict.
            "buffers": dict(self.criterion.named_buffers()),
            **{name: owner.state_dict() for name, owner in self._owners().items()},
        }
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, path: Path) -> int:
        """The epochs done so far."""
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = state["settings"]
        except Exception as error:  # of many types, if the file is something else
            raise ValueError(
                f"{path} is not a whole checkpoint of this script ({type(error).__name__}): it "
                "was left as it is; remove it to begin this run anew"
            ) from error
        if before != asdict(self.settings):
            now = asdict(self.settings)
            differ = {name: before.get(name) for name in now if before.get(name) != now[name]}
            raise ValueError(
                f"{path} was made with other settings, of this or an older version of the script "
                f"({differ}): use another --out, or remove that file to begin this run anew"
            )
        if state["made_on"] != self.made_on:
            raise ValueError(
                f"{path} was made on {state['made_on']}, this is {self.made_on}: use another --out"
            )
        for name, owner in self._owners().items():
            owner.load_state_dict(state[name])
        for name, buffer in self.criterion.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.measured = Measured(**state["measured"])
        if code() not in self.measured.code.split("+"):
            self.measured.code += f"+{code()}"
        done: int = state["epochs"]
        return done


def autocast(settings: Settings, device: str) -> AbstractContextManager[Any]:
    """What the networks run in."""
    if settings.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _make_optimizer(settings: Settings, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if settings.regulariser == "decay":
        decay += settings.beta
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trained, settings.lr, weight_decay=decay)
    return torch.optim.SGD(trained, settings.lr, momentum=0.9, weight_decay=decay)


def _in_float32(output: Any) -> Any:
    return [view.float() for view in output] if isinstance(output, list) else output.float()
