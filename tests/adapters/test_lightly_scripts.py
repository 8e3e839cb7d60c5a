"""Some of lightly's example scripts as short trainings; coverage_lightly.py has all losses.

Each script is a generator that takes the one changed line as ``wrap`` and yields after every
backward pass, before the optimiser's step.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightly.loss import (
    DINOLoss,
    MSNLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
)
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MaskedVisionTransformerTorchvision,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SMoGPredictionHead,
    SMoGProjectionHead,
    SMoGPrototypes,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import (
    MSNProjectionHead,
)
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, random_token_mask, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.adapters import lightly

BATCH = 8
SIZE = 16
FEATURES = 24
STEPS_PER_EPOCH = 5
EPOCHS = 20


class Step(NamedTuple):
    """A script between ``loss.backward()`` and ``optimizer.step()``."""

    loss: Tensor
    model: nn.Module
    criterion: Any
    student: nn.Module
    teacher: nn.Module | None = None
    momentum: float = 0.0


Wrap = Callable[..., Callable[..., Tensor]]
Script = Callable[..., Iterator[Step]]


def plain(loss: nn.Module, **_: object) -> nn.Module:
    return loss


def small_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, FEATURES, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    )


def batches(steps: int, *, views: int, sizes: tuple[int, ...] = ()) -> Iterator[list[Tensor]]:
    """Views of random images, from all three global generators, like a data loader's."""
    for _ in range(steps):
        images = torch.rand(BATCH, 3, SIZE, SIZE)
        if random.random() < 0.5:
            images = images.flip(-1)
        crops = []
        for view in range(views):
            size = sizes[view] if sizes else SIZE
            crop = images[..., :size, :size] * np.random.uniform(0.6, 1.4)
            crops.append(crop + 0.2 * torch.randn_like(crop))
        yield crops


def descend(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


class Projector(nn.Module):
    """Backbone and projection head; the layout of simclr."""

    def __init__(self, projection_head: nn.Module) -> None:
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = projection_head

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(images).flatten(start_dim=1))
        return z


class Predictor(Projector):
    """With a prediction head behind: simsiam."""

    def __init__(self, projection_head: nn.Module, prediction_head: nn.Module) -> None:
        super().__init__(projection_head)
        self.prediction_head = prediction_head

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self(images)
        return z.detach(), self.prediction_head(z)


class MomentumProjector(Projector):
    """With a momentum encoder beside: moco and byol."""

    def __init__(self, projection_head: nn.Module) -> None:
        super().__init__(projection_head)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward_momentum(self, images: Tensor) -> Tensor:
        y = self.backbone_momentum(images).flatten(start_dim=1)
        z: Tensor = self.projection_head_momentum(y)
        return z.detach()

    def update(self, m: float) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=m)
        update_momentum(self.projection_head, self.projection_head_momentum, m=m)


class DINO(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student_backbone = small_backbone()
        self.student_head = DINOProjectionHead(FEATURES, 32, 12, 48, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = DINOProjectionHead(FEATURES, 32, 12, 48)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.student_head(self.student_backbone(images).flatten(start_dim=1))
        return z

    def forward_teacher(self, images: Tensor) -> Tensor:
        z: Tensor = self.teacher_head(self.teacher_backbone(images).flatten(start_dim=1))
        return z


def dino(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = DINO()
    loss = DINOLoss(output_dim=48, warmup_teacher_temp_epochs=2)
    criterion = wrap(loss, student=model.student_head, teacher=model.teacher_head)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for index, views in enumerate(batches(steps, views=4, sizes=(16, 16, 8, 8))):
        epoch = index // STEPS_PER_EPOCH
        m = cosine_schedule(epoch, EPOCHS, 0.9, 1)
        update_momentum(model.student_backbone, model.teacher_backbone, m=m)
        update_momentum(model.student_head, model.teacher_head, m=m)
        teacher_out = [model.forward_teacher(view) for view in views[:2]]
        student_out = [model(view) for view in views]
        value = criterion(teacher_out, student_out, epoch=epoch)
        value.backward()
        model.student_head.cancel_last_layer_gradients(current_epoch=epoch)
        yield Step(value, model, criterion, model.student_head, model.teacher_head, m)
        descend(optimizer)


def simclr(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = Projector(SimCLRProjectionHead(FEATURES, 32, 12))
    criterion = wrap(NTXentLoss(), student=model.projection_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for x0, x1 in batches(steps, views=2):
        value = criterion(model(x0), model(x1))
        value.backward()
        yield Step(value, model, criterion, model.projection_head)
        descend(optimizer)


def byol(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = MomentumProjector(BYOLProjectionHead(FEATURES, 32, 12))
    model.prediction_head = BYOLPredictionHead(12, 32, 12)
    loss = NegativeCosineSimilarity()
    student, teacher = model.projection_head, model.projection_head_momentum
    criterion = wrap(loss, student=student, teacher=teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for index, (x0, x1) in enumerate(batches(steps, views=2)):
        m = cosine_schedule(index // STEPS_PER_EPOCH, EPOCHS, 0.9, 1)
        model.update(m)
        p0 = model.prediction_head(model(x0))
        z0 = model.forward_momentum(x0)
        p1 = model.prediction_head(model(x1))
        z1 = model.forward_momentum(x1)
        value = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        value.backward()
        yield Step(value, model, criterion, student, teacher, m)
        descend(optimizer)


def moco(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = MomentumProjector(MoCoProjectionHead(FEATURES, 32, 12))
    student, teacher = model.projection_head, model.projection_head_momentum
    criterion = wrap(NTXentLoss(memory_bank_size=(32, 12)), student=student, teacher=teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for index, (x_query, x_key) in enumerate(batches(steps, views=2)):
        m = cosine_schedule(index // STEPS_PER_EPOCH, EPOCHS, 0.9, 1)
        model.update(m)
        value = criterion(model(x_query), model.forward_momentum(x_key))
        value.backward()
        yield Step(value, model, criterion, student, teacher, m)
        descend(optimizer)


def simsiam(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = Predictor(SimSiamProjectionHead(FEATURES, 32, 12), SimSiamPredictionHead(12, 8, 12))
    criterion = wrap(NegativeCosineSimilarity(), student=model.projection_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for x0, x1 in batches(steps, views=2):
        z0, p0 = model.both(x0)
        z1, p1 = model.both(x1)
        value = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        value.backward()
        yield Step(value, model, criterion, model.projection_head)
        descend(optimizer)


class SwaV(Projector):
    def __init__(self) -> None:
        super().__init__(SwaVProjectionHead(FEATURES, 32, 12))
        self.prototypes = SwaVPrototypes(12, n_prototypes=24)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.prototypes(nn.functional.normalize(super().forward(images), dim=1))
        return logits


def swav(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = SwaV()
    criterion = wrap(SwaVLoss(), student=model.projection_head)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for views in batches(steps, views=4, sizes=(16, 16, 8, 8)):
        model.prototypes.normalize()
        logits = [model(view) for view in views]
        value = criterion(logits[:2], logits[2:])
        value.backward()
        yield Step(value, model, criterion, model.projection_head)
        descend(optimizer)


class MSN(nn.Module):
    """The student is the masked 'anchor' branch; what it is copied from is its EMA."""

    def __init__(self) -> None:
        super().__init__()
        vit = VisionTransformer(
            image_size=SIZE, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32
        )
        self.backbone = MaskedVisionTransformerTorchvision(vit=vit)
        self.projection_head = MSNProjectionHead(16, 32, 12)
        self.anchor_backbone = copy.deepcopy(self.backbone)
        self.anchor_projection_head = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone)
        deactivate_requires_grad(self.projection_head)
        self.prototypes = nn.Linear(12, 24, bias=False).weight

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(images=images))
        return z

    def forward_masked(self, images: Tensor) -> Tensor:
        tokens = (images.shape[-1] // self.anchor_backbone.vit.patch_size) ** 2
        keep, _ = random_token_mask(size=(len(images), tokens), mask_ratio=0.15)
        z: Tensor = self.anchor_projection_head(self.anchor_backbone(images=images, idx_keep=keep))
        return z


def msn(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = MSN()
    student, teacher = model.anchor_projection_head, model.projection_head
    criterion = wrap(MSNLoss(), student=student, teacher=teacher)
    trained = [*model.anchor_backbone.parameters(), *student.parameters(), model.prototypes]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for targets, anchors, *focal in batches(steps, views=4, sizes=(16, 16, 8, 8)):
        update_momentum(model.anchor_backbone, model.backbone, 0.9)
        update_momentum(student, teacher, 0.9)
        targets_out = model(targets)
        anchors_out = [model.forward_masked(anchors), model.forward_masked(torch.cat(focal))]
        value = criterion(torch.cat(anchors_out), targets_out, model.prototypes.data)
        value.backward()
        yield Step(value, model, criterion, student, teacher, 0.9)
        descend(optimizer)


def smog(wrap: Wrap, steps: int) -> Iterator[Step]:
    model = MomentumProjector(SMoGProjectionHead(FEATURES, 32, 12))
    model.prediction_head = SMoGPredictionHead(12, 32, 12)
    groups = SMoGPrototypes(torch.rand(24, 12), beta=0.99)
    bank = MemoryBankModule(size=(32, 12))
    student, teacher = model.projection_head, model.projection_head_momentum
    criterion = wrap(nn.CrossEntropyLoss(), student=student, teacher=teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for x0, x1 in batches(steps, views=2):
        model.update(0.9)
        encoded = model(x0)
        predicted = model.prediction_head(encoded)
        assignments = groups.assign_groups(model.forward_momentum(x1))
        group_features = groups.get_updated_group_features(encoded)
        logits = groups(predicted, group_features, temperature=0.1)
        groups.set_group_features(group_features)
        value = criterion(logits, assignments)
        bank(encoded, update=True)
        value.backward()
        yield Step(value, model, criterion, student, teacher, 0.9)
        descend(optimizer)


def one_batch(wrap: Wrap, steps: int) -> Iterator[Step]:
    """Both views in one forward call; the layout of directclr."""
    model = Projector(SimCLRProjectionHead(FEATURES, 32, 12))
    criterion = wrap(NTXentLoss(), student=model.projection_head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    for views in batches(steps, views=2):
        value = criterion(*model(torch.cat(views)).chunk(2))
        value.backward()
        yield Step(value, model, criterion, model.projection_head)
        descend(optimizer)


SCRIPTS: tuple[Script, ...] = (
    dino,
    simclr,
    byol,
    moco,
    simsiam,
    swav,
    msn,
    smog,
    one_batch,
)
WITH_TEACHER: tuple[Script, ...] = (dino, byol, moco, msn, smog)


def run(script: Script, wrap: Wrap, steps: int, *, seed: int = 0) -> Iterator[Step]:
    """A script from its seed on."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    yield from script(wrap, steps)


def climb(**options: Any) -> Wrap:
    return partial(lightly.wrap, **{"beta": 1e-3, **options})


def gaussian(module: nn.Module) -> GaussianHead:
    """The one GaussianHead in ``module``."""
    (head,) = [part for part in module.modules() if isinstance(part, GaussianHead)]
    return head


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, list(keys), rest


WITH_ALL_VIEWS: tuple[Script, ...] = (dino, simclr, swav)


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize(
    ("script", "options"),
    [
        *((script, {}) for script in SCRIPTS),
        *((script, {"prior": "view", "beta": 0.1}) for script in WITH_ALL_VIEWS),
        (one_batch, {"prior": "view", "beta": 0.1, "views": 2}),
        (msn, {"prior": "view", "beta": 0.1, "views": (1, 2)}),
    ],
)
def test_three_steps_train_every_parameter_of_the_head(
    script: Script, options: dict[str, Any], at: str
) -> None:
    before: dict[str, Tensor] = {}
    for step in run(script, climb(at=at, **options), 3):
        head = gaussian(step.student)
        before = before or values(head)
        assert torch.isfinite(step.loss)
        assert step.criterion.terms.rate > 0
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
    assert set(before) == {"logvar.weight", "logvar.bias"}
    for name, value in values(head).items():
        assert not torch.equal(value, before[name]), name
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_rate_is_added_once_however_often_the_criterion_is_called(script: Script) -> None:
    seen: list[Any] = []

    def watching(loss: nn.Module, **heads: nn.Module) -> ClimbLoss:
        criterion = lightly.wrap(loss, **heads, beta=0.5)
        criterion.register_forward_hook(lambda *_: seen.append(criterion.terms))
        return criterion

    (step,) = run(script, watching, 1)
    bases = torch.stack([terms.base for terms in seen])
    rates = torch.stack([terms.rate for terms in seen])
    assert len(seen) == (2 if script in (byol, simsiam) else 1)
    assert (rates > 0).all()
    loss = step.loss.detach()
    torch.testing.assert_close(loss, (bases.mean() + 0.5 * rates.mean()).reshape(loss.shape))
    assert loss.shape == next(run(script, plain, 1)).loss.shape  # swav's has one dimension


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("script", WITH_TEACHER)
def test_the_teacher_follows_by_update_momentum(script: Script, at: str) -> None:
    seen = []
    for step in run(script, climb(at=at), 4):
        assert step.teacher is not None
        student, teacher = gaussian(step.student), gaussian(step.teacher)
        layouts = [
            [(name, p.shape) for name, p in module.named_parameters()]
            for module in (step.student, step.teacher)
        ]
        assert layouts[0] == layouts[1]
        assert not any(p.requires_grad for p in step.teacher.parameters())
        seen.append((step.momentum, values(student), values(teacher)))
    for (_, _, previous), (m, students, teachers) in pairwise(seen):
        for name, value in teachers.items():
            torch.testing.assert_close(value, m * previous[name] + (1 - m) * students[name])
            assert not torch.equal(value, previous[name]), name


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("script", WITH_TEACHER)
def test_the_teacher_passes_on_the_mean_and_the_student_a_sample(script: Script, at: str) -> None:
    seen: dict[str, list[bool]] = {"student": [], "teacher": []}

    def watching(loss: nn.Module, *, student: nn.Module, teacher: nn.Module) -> ClimbLoss:
        criterion = lightly.wrap(loss, student=student, teacher=teacher, beta=1e-3, at=at)
        for role, module in (("student", student), ("teacher", teacher)):
            gaussian(module).register_forward_hook(
                lambda head, args, output, role=role: seen[role].append(
                    head.training and torch.equal(args[0], output)
                )
            )
        return criterion

    for _ in run(script, watching, 2):
        pass
    calls = {dino: (8, 4), byol: (4, 4), moco: (2, 2), msn: (4, 2), smog: (2, 2)}[script]
    assert seen == {"student": calls[0] * [False], "teacher": calls[1] * [True]}


ONE_VIEW = r"saw one forward call of the head, of shape \(8, 12\).* wrap a function that takes"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        *((script, ONE_VIEW) for script in (byol, moco, simsiam, smog)),
        (one_batch, r"of shape \(16, 12\).* say how many: views=2"),
        (msn, r"have shapes \[\(8, 12\), \(16, 12\)\].* views=\(1, 2\)"),
    ],
)
def test_prior_view_refuses_a_criterion_that_sees_one_view_or_is_not_told_of_them(
    script: Script, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(run(script, climb(prior="view"), 1))


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_beta_0_is_bit_identical_over_ten_steps(script: Script, at: str) -> None:
    outcomes = []
    for wrap in (plain, climb(beta=0, at=at)):
        *_, last = steps = list(run(script, wrap, 10))
        state = {**last.model.state_dict(), **last.criterion.state_dict(prefix="criterion.")}
        outcomes.append((torch.stack([s.loss.detach() for s in steps]), state, random_states()))
        assert isinstance(last.criterion, ClimbLoss) == (wrap is not plain)
    (losses, state, states), (other_losses, other_state, other_states) = outcomes
    assert torch.equal(losses, other_losses)
    assert list(state) == list(other_state)
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []
    assert states == other_states


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_noise_of_the_head_leaves_the_random_numbers_of_the_host_alone(script: Script) -> None:
    states = []
    losses = []
    for wrap in (plain, climb(), climb()):
        losses.append([float(step.loss.detach()) for step in run(script, wrap, 3)])
        states.append(random_states())
    assert states[0] == states[1] == states[2]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_a_forgotten_teacher_is_an_error_at_the_first_momentum_update() -> None:
    def without_teacher(loss: nn.Module, *, student: nn.Module, teacher: nn.Module) -> ClimbLoss:
        return lightly.wrap(loss, student=student, beta=1e-3)

    with pytest.raises(RuntimeError, match="lists must have the same number of tensors"):
        next(run(dino, without_teacher, 1))
