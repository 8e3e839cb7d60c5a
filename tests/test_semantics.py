"""What examples/README.md states under 'Consequences of the rules, which stay so'."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin.gaussian import kl_to_standard_normal


def projection() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def nothing(z: Tensor) -> Tensor:
    """A base loss whose gradient is 0, so that what is left is the rate's."""
    return 0 * z.sum()


def test_all_rows_of_a_call_count_also_those_that_the_loss_does_not_use() -> None:
    head = GaussianHead(4)
    tokens = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    tokens[:, 1:] *= 10

    def rate(chosen: Tensor, *, behind: bool) -> Tensor:
        criterion = ClimbLoss(nothing, heads=head, beta=1.0)
        criterion(head(chosen)[:, :1] if behind else head(chosen))
        return criterion.terms.rate

    per_row = kl_to_standard_normal(*head.posterior(tokens))
    torch.testing.assert_close(rate(tokens, behind=True), per_row.mean())
    torch.testing.assert_close(rate(tokens[:, :1], behind=False), per_row[:, :1].mean())


def test_cached_features_count_the_rate_once_per_micro_batch() -> None:
    """As GradCache and open_clip's accumulation: each micro-batch runs the loss of the batch."""
    images = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))

    def gradient(parts: int, beta: float) -> list[Tensor | None]:
        student = projection()
        criterion = wrap(nothing, student=student, beta=beta)
        with torch.no_grad():
            cached = list(student(images).chunk(parts))
        for place, part in enumerate(images.chunk(parts)):
            live = [*cached[:place], student(part), *cached[place + 1 :]]
            criterion(torch.cat(live)).backward()
        return [p.grad for p in student.parameters()]

    whole = gradient(1, 0.3)
    torch.testing.assert_close(gradient(4, 0.3), [4 * g for g in whole if g is not None])
    torch.testing.assert_close(gradient(4, 0.3 / 4), whole)


def test_a_batch_norm_behind_the_head_sees_samples_in_training_and_means_in_evaluation() -> None:
    student = projection()
    norm = nn.BatchNorm1d(4)
    wrap(nothing, student=student, beta=1.0)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(8, 6)
    norm(student(images))
    student.eval()
    norm(student(images))
    mean = projection()(images)
    assert not torch.allclose(seen[0], mean, atol=0.01)
    assert torch.equal(seen[1], mean)


def test_a_teacher_that_is_neither_frozen_nor_under_no_grad_samples() -> None:
    student, teacher, plain = projection(), projection(), projection()
    images = torch.randn(8, 6)
    wrap(nothing, student=student, teacher=teacher, beta=1.0)
    assert not torch.allclose(teacher(images), plain(images), atol=0.01)
    with torch.no_grad():
        assert torch.equal(teacher(images), plain(images))
    teacher.requires_grad_(False)
    assert torch.equal(teacher(images), plain(images))


def test_the_outer_loss_of_maml_counts_what_its_value_depends_on() -> None:
    student = projection()
    criterion = wrap(lambda z: z.square().mean(), student=student, beta=0.1)
    inner, outer = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    weights = dict(student.named_parameters())
    first = criterion(student(inner))
    inner_rate = criterion.terms.rate
    steps = torch.autograd.grad(first, list(weights.values()), create_graph=True)
    fast = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), steps, strict=True)}
    detached = {name: w.detach().requires_grad_() for name, w in fast.items()}

    criterion(functional_call(student, detached, (outer,)))
    own_rate = criterion.terms.rate
    criterion(functional_call(student, fast, (outer,))).backward()
    torch.testing.assert_close(criterion.terms.rate, (inner_rate + own_rate) / 2)
    assert inner_rate != own_rate
    assert all(w.grad is not None for w in weights.values())
