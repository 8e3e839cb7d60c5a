"""Several heads and several losses in one model: DINOv2, VICRegL, CAPI."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightly.loss
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, VICRegLLoss
from lightly.models.modules import BarlowTwinsProjectionHead, DINOv2ProjectionHead
from lightly.models.modules.heads import VicRegLLocalProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.adapters.lightly import wrap
from climb_plugin.attach import attach

BATCH, FEATURES, WIDTH, SCORES = 6, 12, 8, 24
LOCAL_VIEWS = 3
KOLEO_WEIGHT = 0.1


class Patches(nn.Module):
    """Stands for a ViT: a class token and patches of 4 x 4 pixels, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, FEATURES, 4, stride=4)
        self.mask_token = nn.Parameter(torch.randn(FEATURES))
        self.class_token = nn.Parameter(torch.randn(FEATURES))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token, tokens)
        tokens = torch.cat([self.class_token.expand(len(images), 1, -1), tokens], dim=1)
        return tokens + tokens.mean(dim=1, keepdim=True)  # stands for attention


def dinov2_head() -> nn.Module:
    head = DINOv2ProjectionHead(FEATURES, 16, WIDTH, SCORES)
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return head


class DINOv2(nn.Module):
    """The layout of lightly's dinov2 script."""

    def __init__(self, *, separate: bool) -> None:
        super().__init__()
        self.student_backbone = Patches()
        self.student_dino = dinov2_head()
        self.student_ibot = dinov2_head() if separate else self.student_dino
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_dino = dinov2_head()
        self.teacher_ibot = dinov2_head() if separate else self.teacher_dino
        for module in (self.teacher_backbone, self.teacher_dino, self.teacher_ibot):
            deactivate_requires_grad(module)
            module.eval()

    def update(self, m: float) -> None:
        for part in ("backbone", "dino", *(["ibot"] * (self.student_ibot != self.student_dino))):
            update_momentum(getattr(self, f"student_{part}"), getattr(self, f"teacher_{part}"), m)


def dinov2_steps(
    model: DINOv2,
    dino: Callable[..., Tensor],
    ibot: Callable[..., Tensor],
    *,
    steps: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each backward pass (the loss, KoLeo's part of it)."""
    koleo = KoLeoLoss()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(steps):
        images = torch.rand(2 * BATCH, 3, 16, 16)
        crops = torch.rand(LOCAL_VIEWS * BATCH, 3, 8, 8)
        block = torch.rand(2 * BATCH, 4, 4) < 0.4
        block[:, 0, 0] = True
        mask = block.flatten(1)
        with torch.no_grad():
            teacher = model.teacher_backbone(images)
            # By forward, as in lightly's script, which leaves out the hooks of a module.
            teacher_dino = model.teacher_dino.forward(teacher[:, 0])
            teacher_ibot = model.teacher_ibot(teacher[:, 1:][mask])
        student = model.student_backbone(images, mask=mask)
        local = model.student_backbone(crops)
        student_dino = torch.cat(
            [model.student_dino.forward(view[:, 0]) for view in (student, local)]
        )
        student_ibot = model.student_ibot(student[:, 1:][mask])
        dino_loss = dino(
            teacher_out=teacher_dino.chunk(2),
            student_out=student_dino.chunk(2 + LOCAL_VIEWS),
            teacher_temp=0.04,
        )
        ibot_loss = ibot(teacher_out=teacher_ibot, student_out=student_ibot, mask=block)
        spread = KOLEO_WEIGHT * sum(koleo(view) for view in student[:, 0].chunk(2))
        loss = dino_loss + ibot_loss + spread
        loss.backward()
        yield loss.detach(), spread.detach()
        optimizer.step()
        optimizer.zero_grad()
        model.update(0.9)


def wrap_both(model: DINOv2, **options: Any) -> tuple[ClimbLoss, ClimbLoss]:
    dino = wrap(
        DINOLoss(output_dim=SCORES),
        **{"student": model.student_dino, "teacher": model.teacher_dino, "beta": 0.01, **options},
    )
    if model.student_ibot is model.student_dino:
        return dino, ClimbLoss(IBOTPatchLoss(output_dim=SCORES), heads=dino.heads, beta=0.02)
    ibot = wrap(
        IBOTPatchLoss(output_dim=SCORES),
        student=model.student_ibot,
        teacher=model.teacher_ibot,
        beta=0.02,
    )
    return dino, ibot


def gaussians(module: nn.Module) -> list[GaussianHead]:
    return [part for part in module.modules() if isinstance(part, GaussianHead)]


@pytest.fixture(params=[True, False], ids=["separate heads", "one head"])
def model(request: pytest.FixtureRequest) -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(separate=request.param)


class TestDINOv2:
    def test_every_head_trains_and_the_sums_are_right(self, model: DINOv2) -> None:
        dino, ibot = wrap_both(model)
        heads = {*dino.heads, *ibot.heads}
        assert len(heads) == (1 if model.student_ibot is model.student_dino else 2)
        start = {p: p.detach().clone() for head in heads for p in head.parameters()}
        for loss, koleo in dinov2_steps(model, dino, ibot, steps=3):
            assert torch.isfinite(loss)
            for terms in (dino.terms, ibot.terms):
                assert terms.rate > 0
                expected = terms.base + float(terms.beta) * terms.rate
                torch.testing.assert_close(terms.total, expected)
            torch.testing.assert_close(loss, dino.terms.total + ibot.terms.total + koleo)
            for parameter in start:
                assert parameter.grad is not None
                assert parameter.grad.any()
        for parameter, before in start.items():
            assert not torch.equal(parameter, before)
        assert (float(dino.terms.beta), float(ibot.terms.beta)) == (0.01, 0.02)

    def test_each_loss_counts_its_own_calls_of_the_head(self, model: DINOv2) -> None:
        dino, ibot = wrap_both(model)
        seen: dict[ClimbLoss, list[tuple[int, ...]]] = {dino: [], ibot: []}
        for criterion, shapes in seen.items():
            (prior,) = criterion.climb_priors
            prior.register_forward_pre_hook(
                lambda _, args, shapes=shapes: shapes.extend(p.mean.shape for p in args[0])
            )
        next(dinov2_steps(model, dino, ibot, steps=1))
        assert seen[dino] == [(2 * BATCH, WIDTH), (LOCAL_VIEWS * BATCH, WIDTH)]
        ((masked, width),) = seen[ibot]
        assert masked not in (2 * BATCH, LOCAL_VIEWS * BATCH)
        assert width == WIDTH

    def test_the_teachers_follow_and_pass_on_the_mean(self, model: DINOv2) -> None:
        dino, ibot = wrap_both(model)
        before = [p.clone() for head in gaussians(model.teacher_dino) for p in head.parameters()]
        for _ in dinov2_steps(model, dino, ibot, steps=3):
            pass
        for student, teacher in (
            (model.student_dino, model.teacher_dino),
            (model.student_ibot, model.teacher_ibot),
        ):
            (head,) = gaussians(teacher)
            assert not any(p.requires_grad for p in head.parameters())
            assert [n for n, _ in student.named_parameters()] == [
                n for n, _ in teacher.named_parameters()
            ]
            embedding = torch.randn(4, WIDTH)
            assert torch.equal(head(embedding), embedding)
        after = [p for head in gaussians(model.teacher_dino) for p in head.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    def test_only_the_wrapped_loss_has_a_rate(self, model: DINOv2) -> None:
        dino = wrap(
            DINOLoss(output_dim=SCORES),
            student=model.student_dino,
            teacher=model.teacher_dino,
            beta=0.5,
        )
        plain: list[Tensor] = []
        ibot = IBOTPatchLoss(output_dim=SCORES)
        ibot.register_forward_hook(lambda _, args, output: plain.append(output.detach()))
        loss, koleo = next(dinov2_steps(model, dino, ibot, steps=1))
        torch.testing.assert_close(loss, dino.terms.total + plain[0] + koleo)

    def test_prior_view_is_told_of_the_views_in_each_batch(self, model: DINOv2) -> None:
        dino, ibot = wrap_both(model, prior="view", views=(2, LOCAL_VIEWS))
        for loss, _ in dinov2_steps(model, dino, ibot, steps=3):
            assert torch.isfinite(loss)
            assert dino.terms.rate > 0

    def test_prior_view_without_views_is_an_error(self, model: DINOv2) -> None:
        dino, ibot = wrap_both(model, prior="view")
        with pytest.raises(ValueError, match=r"have shapes \[\(12, 8\), \(18, 8\)\].* views="):
            next(dinov2_steps(model, dino, ibot, steps=1))


class TestVICRegL:
    """One loss of two heads."""

    @pytest.mark.parametrize("prior", ["standard", "view"])
    def test_the_rates_of_both_heads_add_up(self, prior: str) -> None:
        torch.manual_seed(0)
        head = BarlowTwinsProjectionHead(FEATURES, 16, WIDTH)
        local = VicRegLLocalProjectionHead(FEATURES, 16, WIDTH)
        loss = VICRegLLoss(num_matches=(2, 2))
        criterion = ClimbLoss(loss, heads=[attach(head), attach(local)], beta=0.1, prior=prior)
        parameters = [*head.parameters(), *local.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        rates: list[Tensor] = []
        for module in criterion.climb_priors:
            module.register_forward_hook(lambda _, args, rate: rates.append(rate.mean().detach()))
        grids = [torch.rand(BATCH, 2, 2, 2) for _ in range(2)]
        for _ in range(3):
            maps = [torch.randn(BATCH, 2, 2, FEATURES) for _ in range(2)]
            features = [(head(x.mean(dim=(1, 2))), local(x)) for x in maps]
            criterion(features, grids).backward()
            for parameter in (*criterion.heads[0].parameters(), *criterion.heads[1].parameters()):
                assert parameter.grad is not None
                assert parameter.grad.any()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(criterion.terms.rate, rates[-2] + rates[-1])
        assert all(rate > 0 for rate in rates)


@pytest.mark.skipif(not hasattr(lightly.loss, "CAPILoss"), reason="lightly 1.6 and later")
class TestCAPI:
    """One loss object for the student and for the clustering of the teacher."""

    def test_the_clustering_loss_stays_plain(self) -> None:
        from lightly.models.modules import CAPIProjectionHead

        torch.manual_seed(0)
        student = CAPIProjectionHead(FEATURES, SCORES, weight_norm=True)
        clusters = CAPIProjectionHead(FEATURES, SCORES, bias=True)
        loss = lightly.loss.CAPILoss()
        criterion = wrap(loss, student=student, beta=0.1)
        logits = clusters(torch.randn(BATCH, 4, FEATURES))
        predicted = student(torch.randn(BATCH, 2, FEATURES))
        masked = torch.tensor([1, 3]).expand(BATCH, 2)
        with pytest.raises(RuntimeError, match="depends on no sample"):
            criterion(teacher_logits=logits, student_logits=logits)
        total = criterion(teacher_logits=logits, student_logits=predicted, teacher_index=masked)
        (total + loss(teacher_logits=logits, student_logits=logits)).backward()
        for parameter in (*criterion.heads[0].parameters(), *clusters.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.any()
