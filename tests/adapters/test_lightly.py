"""wrap(): where the Gaussian goes, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
    heads,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.adapters.lightly import wrap
from climb_plugin.schedule import Linear

WIDTHS = {
    "input_dim": 12,
    "hidden_dim": 16,
    "output_dim": 10,
    "bottleneck_dim": 6,
    "num_clusters": 20,
}

HEADS = [
    item
    for name, item in vars(heads).items()
    if name.endswith("ProjectionHead") and item is not heads.ProjectionHead
]

Factory = Callable[[], nn.Module]


def build(factory: Factory, *, seed: int = 0) -> nn.Module:
    """A head with weights that are far from 0, the same for the same seed."""
    torch.manual_seed(seed)
    if factory in HEADS:
        known = inspect.signature(factory).parameters.keys() & WIDTHS.keys()
        head = factory(**{name: WIDTHS[name] for name in sorted(known)})
    else:
        head = factory()
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return head


def rows(count: int = 8, width: int = 12, *, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def first(*outputs: Tensor) -> Tensor:
    """A loss that any head can be wrapped with."""
    return torch.stack([output.square().mean() for output in outputs]).mean()


def gaussian(module: nn.Module) -> GaussianHead:
    (head,) = [part for part in module.modules() if isinstance(part, GaussianHead)]
    return head


def traced(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what the Gaussian was given, what it returned, what the module returned)."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = gaussian(module).register_forward_hook(
        lambda _, args, output: seen.append((args[0], output))
    )
    output = module(images)
    handle.remove()
    ((given, sample),) = seen
    return given, sample, output


class TestDINOProjectionHead:
    @pytest.fixture
    def student(self) -> nn.Module:
        torch.manual_seed(0)
        return DINOProjectionHead(12, 16, 6, 20, freeze_last_layer=1)

    @pytest.fixture
    def teacher(self) -> nn.Module:
        torch.manual_seed(1)
        teacher = DINOProjectionHead(12, 16, 6, 20)
        deactivate_requires_grad(teacher)
        return teacher

    def test_cancel_last_layer_gradients(self, student: nn.Module, teacher: nn.Module) -> None:
        criterion = wrap(DINOLoss(20), student=student, teacher=teacher, beta=1e-3)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in student.last_layer.named_parameters()}
        views = rows(seed=1), rows(seed=2)
        criterion([teacher(v) for v in views], [student(v) for v in views], epoch=0).backward()
        for epoch in (2, 1):
            student.cancel_last_layer_gradients(current_epoch=epoch)
            assert student.last_layer.weight_v.grad is not None
        student.cancel_last_layer_gradients(current_epoch=0)
        assert student.last_layer.weight_v.grad is None
        assert all(p.grad is not None for p in gaussian(student).parameters())
        assert all(p.grad is not None for p in student.layers.parameters())
        optimizer.step()
        for name, parameter in student.last_layer.named_parameters():
            assert torch.equal(parameter, before[name]), name
        assert student.freeze_last_layer == 1
        assert not student.last_layer.weight_g.requires_grad

    def test_update_momentum(self, student: nn.Module, teacher: nn.Module) -> None:
        wrap(DINOLoss(20), student=student, teacher=teacher, beta=1e-3)
        nn.init.ones_(gaussian(student).logvar.weight)
        update_momentum(student, teacher, m=0.75)
        assert torch.equal(
            gaussian(teacher).logvar.weight, torch.full_like(gaussian(teacher).logvar.weight, 0.25)
        )
        update_momentum(student, teacher, m=0.0)
        for (name, one), (_, other) in zip(
            student.named_parameters(), teacher.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name

    def test_keys(self, student: nn.Module, teacher: nn.Module) -> None:
        wrap(DINOLoss(20), student=student, teacher=teacher, beta=1e-3)
        layers = [f"layers.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")]
        last = ["last_layer.weight_g", "last_layer.weight_v"]
        new = [f"layers.3.gaussian.logvar.{name}" for name in ("weight", "bias")]
        for module in (student, teacher):
            assert sorted(module.state_dict()) == sorted(layers + last + new)


class L2(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


class UserHead(nn.Module):
    """A head of the user's own, in two halves: the Gaussian belongs between them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def finish(self, z: Tensor) -> Tensor:
        return z


def halves(head: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What a plain head does before the Gaussian, and what it makes of an embedding then."""
    if isinstance(head, UserHead):
        return head.embed, head.finish
    if type(head) in HEADS:  # lightly's normalise the output of their MLP (CAPI's has none)
        layers, head.layers = getattr(head, "layers", nn.Identity()), nn.Identity()
        return layers, head
    if isinstance(head, nn.Sequential):
        ends = [i for i, part in enumerate(head) if isinstance(part, L2)] or [len(head)]
        return head[: ends[-1]], head[ends[-1] :]
    return head, nn.Identity()


class EndsNormalised(UserHead):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6))

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.mlp(x)
        return z

    def finish(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


class DividesByNorm(EndsNormalised):
    """With an epsilon that is added, so that the normalisation is not exact."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(6, 20, bias=False)

    def finish(self, z: Tensor) -> Tensor:
        logits: Tensor = self.prototypes(z / (z.norm(dim=-1, keepdim=True) + self.eps))
        return logits / 0.1


class OtherNames(UserHead):
    """DINO's head with other names, a new-style weight_norm, a bias, and parts out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.codebook = nn.utils.parametrizations.weight_norm(nn.Linear(6, 20))
        self.squeeze = nn.Linear(16, 6)
        self.unused = nn.Linear(6, 6)

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.squeeze(F.gelu(self.stem(x)))
        return z

    def finish(self, z: Tensor) -> Tensor:
        logits: Tensor = self.codebook(F.normalize(z, dim=-1))
        return logits


class NormalisesFirst(UserHead):
    """Prototypes on normalised features: the head has no MLP of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(12, 20)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def finish(self, z: Tensor) -> Tensor:
        logits: Tensor = self.prototypes(F.normalize(z, dim=-1))
        return logits


class NormalisesFirstThenMLP(EndsNormalised):
    """An MLP on normalised features: its end is the end of the projection."""

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.mlp(F.normalize(x, dim=-1))
        return z

    def finish(self, z: Tensor) -> Tensor:
        return z


class Gated(UserHead):
    """A branch that contributes nothing, or next to nothing, is not where the embedding is."""

    gate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Linear(12, 6)
        self.branch = nn.Linear(12, 6)

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.skip(x) + self.gate * self.branch(x)
        return z


class NearlyGated(Gated):
    gate = 1e-4


class OneActivation(UserHead):
    """The same module twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 16)
        self.two = nn.Linear(16, 6)
        self.activation = nn.GELU()
        self.end = nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.end(self.activation(self.two(self.activation(self.one(x)))))
        return z

    def finish(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


class OneDropout(UserHead):
    """The same module three times: a hook behind it would sample three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 6)
        self.dropout = nn.Dropout(0)

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z

    def finish(self, z: Tensor) -> Tensor:
        return F.normalize(self.dropout(self.dropout(self.dropout(z))), dim=-1)


class Residual(UserHead):
    """Adds up, then normalises: no submodule ends in between, unless one is put there."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.skip = nn.Linear(12, 6)
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
        self.end = end

    def embed(self, x: Tensor) -> Tensor:
        z: Tensor = self.skip(x) + self.mlp(x)
        return z if self.end is None else self.end(z)

    def finish(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


class ResidualWithPrototypes(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(6, 20, bias=False)

    def finish(self, z: Tensor) -> Tensor:
        logits: Tensor = self.prototypes(F.normalize(z, dim=-1))
        return logits


def mlp(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6), *behind)


USER_HEADS: dict[str, Factory] = {
    "linear": lambda: nn.Linear(12, 6),
    "sequential": mlp,
    "nested sequential": lambda: nn.Sequential(mlp(), nn.ReLU(), nn.Linear(6, 6)),
    "base class": lambda: heads.ProjectionHead([(12, 16, None, nn.ReLU()), (16, 6, None, None)]),
    "L2 module at the end": lambda: mlp(L2()),
    "L2 module and prototypes": lambda: mlp(L2(), nn.Linear(6, 20)),
    "activation before L2": lambda: mlp(nn.GELU(), L2()),
    "BatchNorm at the end": lambda: mlp(nn.BatchNorm1d(6, affine=False)),
    "BatchNorm before L2": lambda: mlp(nn.BatchNorm1d(6), L2()),
    "BatchNorm at the input": lambda: nn.Sequential(nn.BatchNorm1d(12), *mlp()),
    "hidden LayerNorm": lambda: nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 6)
    ),
    "hidden LayerNorm, no activation": lambda: nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 6)
    ),
    "LayerNorm at the end": lambda: mlp(nn.LayerNorm(6)),
    "ends normalised": EndsNormalised,
    "divides by norm": DividesByNorm,
    "other names": OtherNames,
    "normalises first": NormalisesFirst,
    "normalises first, then MLP": NormalisesFirstThenMLP,
    "gate at 0": Gated,
    "gate near 0": NearlyGated,
    "one activation": OneActivation,
    "one dropout": OneDropout,
    "residual": lambda: Residual(nn.Identity()),
}


# Each class in ``lightly.models.modules.heads``, found there, not listed here, and the user's own.
FACTORIES: dict[str, Factory] = {**{head.__name__: head for head in HEADS}, **USER_HEADS}


def test_heads_of_lightly_are_found() -> None:
    assert {"DINOProjectionHead", "SimCLRProjectionHead", "MSNProjectionHead"} <= FACTORIES.keys()


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
class TestEveryHead:
    def test_the_gaussian_is_before_the_head_or_before_its_normalisation(
        self, factory: Factory, at: str
    ) -> None:
        plain, student = build(factory), build(factory)
        criterion = wrap(first, student=student, beta=1e-3, at=at)
        given, sample, output = traced(student, rows())
        embed, finish = (nn.Identity(), plain) if at == "features" else halves(plain)
        assert torch.equal(given, embed(rows()))
        assert torch.equal(output, finish(sample))
        assert gaussian(student) is criterion.heads[0]
        assert criterion.heads[0].out_features == given.shape[-1]
        assert 0.02 < (sample - given).std() < 0.5  # init_std is 0.1

    def test_a_tiny_std_changes_the_output_by_next_to_nothing(
        self, factory: Factory, at: str
    ) -> None:
        plain, student = build(factory), build(factory)
        wrap(first, student=student, beta=1e-3, at=at, init_std=5e-5)
        expected, output = plain(rows()), student(rows())
        assert not torch.equal(output, expected)
        assert (output - expected).abs().max() < 0.01 * expected.std()

    def test_eval_is_the_plain_head_bit_for_bit(self, factory: Factory, at: str) -> None:
        plain, student = build(factory).eval(), build(factory)
        wrap(first, student=student, beta=1e-3, at=at)
        student.eval()
        expected = plain(rows())
        assert torch.equal(student(rows()), expected)
        assert torch.equal(student(rows()), expected)

    def test_the_teacher_has_the_layout_of_the_student_and_stays_plain(
        self, factory: Factory, at: str
    ) -> None:
        plain, student, teacher = build(factory, seed=5), build(factory), build(factory, seed=5)
        deactivate_requires_grad(teacher)
        wrap(first, student=student, teacher=teacher, beta=1e-3, at=at)
        layouts = [[(n, p.shape) for n, p in m.named_parameters()] for m in (student, teacher)]
        assert layouts[0] == layouts[1]
        assert len(layouts[0]) == len(list(plain.parameters())) + 2
        assert not {t.data_ptr() for t in student.state_dict().values()} & {
            t.data_ptr() for t in teacher.state_dict().values()
        }
        assert teacher.training
        for mode in (True, False):
            assert torch.equal(teacher.train(mode)(rows()), plain.train(mode)(rows()))
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_the_layers_that_were_there_keep_their_keys(self, factory: Factory, at: str) -> None:
        plain, student = build(factory), build(factory)
        wrap(first, student=student, beta=1e-3, at=at)
        state, known = student.state_dict(), plain.state_dict()
        new = state.keys() - known.keys()
        assert list(known) == [key for key in state if key not in new]
        assert {key.rpartition("gaussian.")[2] for key in new} == {
            "logvar.weight",
            "logvar.bias",
        }
        other = build(factory, seed=3).state_dict()
        result = student.load_state_dict(other, strict=False)
        assert set(result.missing_keys) == new
        assert result.unexpected_keys == []
        loaded = student.state_dict()
        assert [key for key in known if not torch.equal(loaded[key], other[key])] == []


class TestSomeHeads:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        "name", ["L2 module at the end", "hidden LayerNorm", "divides by norm"]
    )
    def test_other_dtypes_find_the_same_place(self, name: str, dtype: torch.dtype) -> None:
        plain, student = build(USER_HEADS[name]).to(dtype), build(USER_HEADS[name]).to(dtype)
        wrap(first, student=student, beta=1e-3)
        given, sample, _ = traced(student, rows().to(dtype))
        assert torch.equal(given, halves(plain)[0](rows().to(dtype)))
        assert sample.dtype == dtype
        assert {p.dtype for p in student.parameters()} == {dtype}

    def test_rows_of_tokens_are_sampled_like_rows_of_a_batch(self) -> None:
        student = build(NormalisesFirst)
        criterion = wrap(first, student=student, beta=1e-3)
        criterion(student(rows(24).reshape(4, 6, 12))).backward()
        assert criterion.terms.rate > 0

    def test_a_flattening_first_layer_comes_before_the_features(self) -> None:
        student = build(lambda: nn.Sequential(nn.Flatten(), *mlp()))
        wrap(first, student=student, beta=1e-3, at="features")
        given, _, _ = traced(student, rows().reshape(8, 12, 1, 1))
        assert torch.equal(given, rows())

    def test_two_outputs_do_for_the_features(self) -> None:
        class Both(EndsNormalised):
            def forward(self, x: Tensor) -> Any:
                z = self.embed(x)
                return z, self.finish(z)

        student = build(Both)
        criterion = wrap(lambda both: first(*both), student=student, beta=1e-3, at="features")
        criterion(student(rows())).backward()
        assert criterion.terms.rate > 0

    def test_the_search_leaves_buffers_modes_and_random_numbers_alone(self) -> None:
        class Restless(EndsNormalised):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def embed(self, x: Tensor) -> Tensor:
                self.calls += 1
                return super().embed(x + torch.randn_like(x))

        student = build(Restless)
        student.mlp[1].eval()
        modes = [part.training for part in student.modules()]
        state = torch.get_rng_state()
        wrap(first, student=student, beta=0)
        assert torch.equal(torch.get_rng_state(), state)
        assert student.calls == 0
        assert [part.training for part in student.modules()] == modes
        assert all(p.grad is None for p in student.parameters())

    def test_heads_of_one_model_draw_different_noise(self) -> None:
        def starts_alike() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 6))

        students = [build(starts_alike, seed=seed) for seed in (0, 1)]
        for student in students:
            wrap(first, student=student, beta=1e-3)
        torch.manual_seed(0)
        samples = [sample - given for given, sample, _ in (traced(s, rows()) for s in students)]
        assert not torch.allclose(samples[0], samples[1], atol=0.01)


def aliased(student: nn.Module) -> nn.Module:
    teacher = build(mlp, seed=1)
    teacher[2].bias = student[2].bias
    return teacher


def aliased_view(student: nn.Module) -> nn.Module:
    teacher = build(mlp, seed=1)
    teacher[2].weight = nn.Parameter(student[2].weight.data.view(6, 16))
    return teacher


def aliased_buffer(student: nn.Module) -> nn.Module:
    teacher = build(lambda: mlp(nn.BatchNorm1d(6, affine=False)), seed=1)
    teacher[3] = student[3]
    return teacher


class TwoArguments(EndsNormalised):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.embed(x + y)


class TwoOutputs(EndsNormalised):
    def forward(self, x: Tensor) -> Any:
        return self.embed(x), x


class Named(nn.Identity):
    gaussian = "mine"


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def wrapped() -> nn.Module:
    student = mlp()
    wrap(first, student=student, beta=1e-3)
    return student


class Refusal(NamedTuple):
    message: str
    student: Callable[[], Any]
    teacher: Callable[[Any], Any]  # of the student
    exception: type[Exception]
    options: dict[str, Any]


def refusal(
    message: str,
    *,
    student: Callable[[], Any] = mlp,
    teacher: Callable[[Any], Any] = lambda _: None,
    exception: type[Exception] = ValueError,
    **options: Any,
) -> Refusal:
    return Refusal(message, student, teacher, exception, options)


REFUSALS = {
    "same module": refusal(r"share storage \(0\.weight and 0\.weight\)", teacher=lambda s: s),
    "aliased parameter": refusal(
        r"share storage \(2\.bias and 2\.bias\).* build a second projection head", teacher=aliased
    ),
    "aliased view": refusal(r"share storage \(2\.weight and 2\.weig", teacher=aliased_view),
    "aliased buffer": refusal(
        r"share storage \(3\.running_mean and 3\.running_mean\)",
        student=lambda: mlp(nn.BatchNorm1d(6, affine=False)),
        teacher=aliased_buffer,
    ),
    "teacher of other width": refusal(
        r"same parameters in the same order.*\('2\.weight', \(6, 16\)\).*\(7, 16\).*same arguments",
        teacher=lambda _: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7)),
    ),
    "teacher in other order": refusal(
        "same parameters in the same order",
        student=lambda: nn.ModuleDict({"a": nn.Linear(12, 6), "b": nn.Linear(12, 6)}),
        teacher=lambda _: nn.ModuleDict({"b": nn.Linear(12, 6), "a": nn.Linear(12, 6)}),
    ),
    "student with a GaussianHead": refusal(
        "student holds a GaussianHead already.* ClimbLoss\\(loss, heads=first.heads, beta=.*unwrap",
        student=lambda: mlp(GaussianHead(6)),
    ),
    "teacher with a GaussianHead": refusal(
        "teacher holds a GaussianHead already", teacher=lambda _: mlp(GaussianHead(6))
    ),
    "DataParallel": refusal(
        "student is wrapped in DataParallel.* wrap the loss first, then the model",
        student=lambda: nn.DataParallel(mlp()),
    ),
    "compiled": refusal(
        "student is wrapped in OptimizedModule.* wrap the loss first, then the model",
        student=lambda: torch.compile(mlp(), backend="eager"),
    ),
    "teacher that is no module": refusal(
        "teacher must be a torch module, got OrderedDict",
        teacher=lambda s: s.state_dict(),
        exception=TypeError,
    ),
    "teacher that is a function": refusal(
        "teacher must be a torch module, got method",
        teacher=lambda s: s.forward,
        exception=TypeError,
    ),
    "unknown at": refusal(
        "at must be one of 'projection', 'features', got 'backbone'", at="backbone"
    ),
    "unknown at with beta 0": refusal("at must be one of", at="", beta=0),
    "unknown prior": refusal(
        "one of 'standard', 'learned', 'view', 'backward', got 'laplace'", prior="laplace"
    ),
    "negative beta": refusal(r"beta must be finite and not negative, got -0\.001", beta=-1e-3),
    "beta NaN": refusal("beta must be finite.*got nan", beta=float("nan")),
    "beta inf": refusal("beta must be finite.*got inf", beta=float("inf")),
    "beta str": refusal(
        "beta must be a number or a schedule, got '1e-3'", exception=TypeError, beta="1e-3"
    ),
    "beta None": refusal("beta must be a number or a schedule", exception=TypeError, beta=None),
    "beta bool": refusal("beta must be a number or a schedule", exception=TypeError, beta=True),
    "alpha": refusal("alpha must be finite and not negative", alpha=-1.0),
    "init_std 0": refusal("init_std must be a positive number", init_std=0.0),
    "init_std NaN": refusal("init_std must be a posit", init_std=float("nan")),
    "init_std tiny": refusal("init_std must lie strictly bet", init_std=1e-9),
    "init_std huge": refusal("init_std must lie strictly betw", init_std=1e9),
    "loss that is none": refusal(
        r"base must be a loss that can be called, got 0\.5", exception=TypeError, loss=0.5
    ),
    "loss wrapped twice": refusal(
        "this loss is a ClimbLoss already: wrap the plain loss, once",
        loss=ClimbLoss(first, heads=(), beta=0),
    ),
    "convolutions": refusal(
        r"Sequential could not be run on a batch of features.* put a GaussianHead\(width\)",
        student=convolutions,
    ),
    "convolutions and a linear layer": refusal(
        r"Sequential could not be run on a batch of features.*student=model\.3\..*\(4, 8\)",
        student=lambda: nn.Sequential(*convolutions(), nn.Linear(8, 6)),
    ),
    "two arguments": refusal(
        r"TwoArguments could not be run on a batch.*put a GaussianHead.*\(4, 12\).*'y'",
        student=TwoArguments,
    ),
    "two outputs": refusal(
        r"TwoOutputs must map \(B, 12\) to \(B, D\), it returned tuple", student=TwoOutputs
    ),
    "three dimensions": refusal(
        r"Sequential must map \(B, 12\) to \(B, D\), it returned \(4, 2, 3\)",
        student=lambda: mlp(nn.Unflatten(1, (2, 3))),
    ),
    "lazy": refusal(
        "is lazy: run one batch through the model first",
        student=lambda: nn.Sequential(nn.LazyLinear(6)),
    ),
    "meta": refusal("meta device", student=lambda: nn.Linear(12, 6, device="meta")),
    "an attribute with the name of the head": refusal(
        "'gaussian' is what the head is called in its place, and Named has .* rename yours",
        student=lambda: mlp(Named()),
    ),
    "normalised sum": refusal(
        r"Residual normalises its embedding.* nn\.Identity\(\) of its own right before",
        student=Residual,
    ),
    "normalised sum with prototypes": refusal(
        "ResidualWithPrototypes normalises its embedding", student=ResidualWithPrototypes
    ),
    "student that is wrapped": refusal("student holds a GaussianHead already", student=wrapped),
    "student None": refusal(
        "student must be a torch module, got NoneType", student=lambda: None, exception=TypeError
    ),
    "student str": refusal(
        "student must be a torch module, got str", student=lambda: "head", exception=TypeError
    ),
    "student list": refusal(
        "student must be a torch module, got list", student=lambda: [mlp()], exception=TypeError
    ),
}


def fingerprint(module: nn.Module) -> list[Any]:
    """All that wrap() could have changed."""
    return [
        {k: v.tolist() for k, v in module.state_dict().items() if not v.is_meta}
        if not any(isinstance(p, nn.UninitializedParameter) for p in module.parameters())
        else None,
        [
            (
                name,
                part.training,
                list(part._forward_hooks.values()),
                list(part._forward_pre_hooks.values()),
            )
            for name, part in module.named_modules()
        ],
        [p.requires_grad for p in module.parameters()],
    ]


class TestRefusals:
    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    @pytest.mark.parametrize("name", REFUSALS)
    def test_the_message_says_what_to_do_and_nothing_has_changed(self, name: str) -> None:
        refused = REFUSALS[name]
        torch.manual_seed(0)
        student = refused.student()
        teacher = refused.teacher(student)
        modules = [m for m in (student, teacher) if isinstance(m, nn.Module)]
        before = [fingerprint(module) for module in modules]
        state = torch.get_rng_state()
        options = {"loss": first, "student": student, "teacher": teacher, "beta": 1e-3}
        with pytest.raises(refused.exception, match=f"(?s){refused.message}"):
            wrap(**{**options, **refused.options})
        assert [fingerprint(module) for module in modules] == before
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.fixture
    def process_group(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("process_group")
    def test_distributed_data_parallel(self) -> None:
        student = nn.parallel.DistributedDataParallel(build(mlp))
        before = fingerprint(student)
        with pytest.raises(
            ValueError, match=r"student is wrapped in DistributedDataParallel, whic"
        ):
            wrap(first, student=student, beta=1e-3)
        assert fingerprint(student) == before
        criterion = wrap(first, student=build(mlp), teacher=None, beta=1e-3)
        assert len(criterion.heads) == 1

    def test_keyword_call_of_a_head_that_samples_its_input(self) -> None:
        student = build(SimCLRProjectionHead)
        wrap(first, student=student, beta=1e-3, at="features")
        student(x=rows()).sum().backward()
        assert gaussian(student).logvar.weight.grad is not None
        with pytest.raises(TypeError, match="its embedding as the first positional argument"):
            student(x=rows(), y=rows())

    def test_a_loss_of_tensors_that_never_saw_the_head(self) -> None:
        student = build(SimCLRProjectionHead)
        criterion = wrap(first, student=student, beta=1e-3)
        with pytest.raises(
            RuntimeError,
            match=r"depends on no sample of heads\[0\].* it was not called since the loss before",
        ):
            criterion(rows().requires_grad_())


class TestOptimiser:
    @staticmethod
    def steps(
        student: nn.Module,
        criterion: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        count: int,
        *,
        accumulate: int = 1,
    ) -> None:
        for _ in range(count):
            for micro in range(accumulate):
                criterion(student(rows(seed=micro))).backward()
            optimizer.step()
            optimizer.zero_grad()

    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("at", ["projection", "features"])
    def test_built_before_is_an_error_after_its_first_update_and_built_anew_is_none(
        self, at: str, accumulate: int
    ) -> None:
        student = build(SimCLRProjectionHead)
        optimizer = torch.optim.Adam(student.parameters())
        criterion = wrap(first, student=student, beta=1e-3, at=at)
        for _ in range(2):  # as in a notebook
            with pytest.raises(RuntimeError, match="build the optimiser after the loss was wrapp"):
                self.steps(student, criterion, optimizer, 1, accumulate=accumulate)
        optimizer = torch.optim.Adam(student.parameters())
        before = gaussian(student).logvar.bias.detach().clone()
        self.steps(student, criterion, optimizer, 3, accumulate=accumulate)
        assert not torch.equal(gaussian(student).logvar.bias, before)

    def test_without_the_head_is_an_error_after_a_plain_checkpoint_too(self) -> None:
        student = build(SimCLRProjectionHead)
        plain = build(SimCLRProjectionHead, seed=1).state_dict()
        criterion = wrap(first, student=student, beta=1e-3)
        criterion(student(rows())).backward()
        student.load_state_dict(plain, strict=False)
        criterion(student(rows())).backward()
        layers = [p for name, p in student.named_parameters() if "gaussian" not in name]
        optimizer = torch.optim.SGD(layers, lr=0.1)
        with pytest.raises(RuntimeError, match="build the optimiser after the loss was wrapped"):
            optimizer.step()

    def test_one_that_steps_the_layers_less_often_is_none(self) -> None:
        student = build(SimCLRProjectionHead)
        criterion = wrap(first, student=student, beta=1e-3)
        head = gaussian(student)
        for index in range(4):
            criterion(student(rows())).backward()
            with torch.no_grad():  # no optimiser at all
                for parameter in (
                    head.parameters() if index % 2 == 0 else student.layers.parameters()
                ):
                    parameter.add_(1e-3)
        assert criterion.step == 4

    def test_one_of_its_own_for_each_parameter_is_none(self) -> None:
        student = build(SimCLRProjectionHead)
        criterion = wrap(first, student=student, beta=1e-3)
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in student.parameters()]
        for index in range(3):
            criterion(student(rows())).backward()
            optimizers[index].step()

    def test_built_before_is_an_error_beside_one_of_another_model(self) -> None:
        other = build(SimCLRProjectionHead, seed=1)
        other_criterion = wrap(first, student=other, beta=1e-3)
        student = build(SimCLRProjectionHead)
        optimizer = torch.optim.Adam(student.parameters())
        criterion = wrap(first, student=student, beta=1e-3)
        others = torch.optim.Adam(other.parameters())
        self.steps(other, other_criterion, others, 1)
        with pytest.raises(RuntimeError, match="build the optimiser after the loss was wrapped"):
            self.steps(student, criterion, optimizer, 1)


def through_pickle(item: Any) -> Any:
    return pickle.loads(pickle.dumps(item))


def through_torch_save(item: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(item, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    """What a host may do to a model and its criterion after wrapping."""

    @staticmethod
    def setup(at: str) -> tuple[nn.ModuleDict, ClimbLoss]:
        student = build(BYOLProjectionHead)
        teacher = copy.deepcopy(student)
        deactivate_requires_grad(teacher)
        criterion = wrap(
            NegativeCosineSimilarity(), student=student, teacher=teacher, beta=1e-3, at=at
        )
        return nn.ModuleDict({"student": student, "teacher": teacher}), criterion

    @staticmethod
    def train(model: nn.ModuleDict, criterion: Callable[..., Tensor], steps: int) -> list[Tensor]:
        optimizer = torch.optim.SGD(model["student"].parameters(), lr=0.1)
        losses = []
        for _ in range(steps):
            update_momentum(model["student"], model["teacher"], m=0.9)
            loss = criterion(model["student"](rows(seed=1)), model["teacher"](rows(seed=2)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    @pytest.mark.parametrize("at", ["projection", "features"])
    @pytest.mark.parametrize("trained", [0, 1, 2])
    @pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
    def test_a_copy_trains_like_the_original_and_apart_from_it(
        self, copied: Callable[[Any], Any], trained: int, at: str
    ) -> None:
        model, criterion = self.setup(at)
        self.train(model, criterion, trained)
        other_model, other_criterion = copied((model, criterion))
        before, state = fingerprint(other_model), other_criterion.climb_state()
        losses = self.train(model, criterion, 3)
        assert fingerprint(other_model)[0] == before[0]
        other_criterion.load_climb_state(state)  # no two calls of a process share noise but so
        assert self.train(other_model, other_criterion, 3) == losses
        state, other_state = model.state_dict(), other_model.state_dict()
        assert [k for k in state if not torch.equal(state[k], other_state[k])] == []
        assert other_criterion.heads[0] is gaussian(other_model["student"])

    def test_a_copied_model_with_the_old_criterion_is_an_error(self) -> None:
        model, criterion = self.setup("projection")
        with pytest.raises(RuntimeError, match=r"depends on no sample of heads\[0\]"):
            self.train(copy.deepcopy(model), criterion, 1)

    @pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
    def test_a_copy_still_notices_an_optimiser_without_the_head(
        self, copied: Callable[[Any], Any]
    ) -> None:
        model, criterion = copied(self.setup("projection"))
        student = model["student"]
        layers = [p for name, p in student.named_parameters() if "gaussian" not in name]
        optimizer = torch.optim.SGD(layers, lr=0.1)
        criterion(student(rows()), rows(width=10)).backward()
        with pytest.raises(RuntimeError, match="build the optimiser after the loss was wrapped"):
            optimizer.step()

    @pytest.mark.parametrize("at", ["projection", "features"])
    def test_a_checkpoint_resumes_to_the_same_numbers(self, at: str) -> None:
        model, criterion = self.setup(at)
        self.train(model, criterion, 2)
        saved = through_torch_save((model.state_dict(), criterion.state_dict()))
        expected = self.train(model, criterion, 3)
        torch.manual_seed(99)
        resumed, resumed_criterion = self.setup(at)
        resumed.load_state_dict(saved[0], strict=True)
        resumed_criterion.load_state_dict(saved[1], strict=True)
        assert self.train(resumed, resumed_criterion, 3) == expected


class TestCriterion:
    """The wrapped criterion in place of lightly's."""

    @pytest.fixture
    def student(self) -> nn.Module:
        return build(DINOProjectionHead)

    def test_attributes_are_read_through_it(self, student: nn.Module) -> None:
        base = DINOLoss(10, teacher_temp=0.07, center_momentum=0.8)
        criterion = wrap(base, student=student, beta=1e-3)
        assert criterion.center is base.center
        assert criterion.teacher_temp == 0.07
        assert criterion.center_momentum == 0.8
        assert criterion.teacher_temp_schedule is base.teacher_temp_schedule
        with pytest.raises(AttributeError, match="momentum_teacher"):
            _ = criterion.momentum_teacher

    def test_attributes_are_set_through_it(self, student: nn.Module) -> None:
        base = DINOLoss(10)
        criterion = wrap(base, student=student, beta=1e-3)
        criterion.teacher_temp = 0.5
        criterion.center = torch.ones(1, 1, 10)
        assert base.teacher_temp == 0.5
        assert "teacher_temp" not in vars(criterion)
        assert torch.equal(base.center, torch.ones(1, 1, 10))
        assert list(criterion.state_dict()) == ["center"]

    def test_the_centre_is_updated_and_moves_with_it(self, student: nn.Module) -> None:
        plain = DINOLoss(10)
        criterion = wrap(DINOLoss(10), student=student, beta=1e-3)
        views = [torch.randn(8, 10) for _ in range(2)]
        plain(views, views)
        with torch.no_grad():
            criterion(views, views)
        assert criterion.center.any()
        assert torch.equal(criterion.center, plain.center)
        assert criterion.to(torch.float64).center.dtype == torch.float64

    @pytest.mark.parametrize("prior", ["standard", "view"])
    @pytest.mark.parametrize(
        "make",
        [lambda: DINOLoss(10), lambda: NTXentLoss(memory_bank_size=(32, 10)), NTXentLoss],
        ids=["dino", "bank", "stateless"],
    )
    def test_state_dicts_fit_both_ways(
        self, make: Callable[[], nn.Module], prior: str, student: nn.Module
    ) -> None:
        torch.manual_seed(0)
        plain, base = make(), make()
        for buffer in plain.buffers():
            buffer.add_(1)
        criterion = wrap(base, student=student, beta=1e-3, prior=prior)
        assert list(criterion.state_dict()) == list(plain.state_dict())
        criterion.load_state_dict(plain.state_dict(), strict=True)
        for name, value in plain.state_dict().items():
            assert torch.equal(base.state_dict()[name], value), name
        other = make()
        other.load_state_dict(criterion.state_dict(), strict=True)
        for name, value in plain.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    def test_evaluation_is_the_plain_loss(self) -> None:
        plain, student = build(SimCLRProjectionHead).eval(), build(SimCLRProjectionHead)
        criterion = wrap(NTXentLoss(), student=student, beta=1e-3)
        student.eval()
        with torch.no_grad():
            value = criterion(student(rows(seed=1)), student(rows(seed=2)))
            expected = NTXentLoss()(plain(rows(seed=1)), plain(rows(seed=2)))
        assert torch.equal(value, expected)

    def test_total_is_base_plus_beta_times_rate_and_entropy(self) -> None:
        student = build(SimCLRProjectionHead)
        criterion = wrap(NTXentLoss(), student=student, beta=0.3, alpha=0.5)
        value = criterion(student(rows(seed=1)), student(rows(seed=2)))
        terms = criterion.terms
        assert torch.equal(value.detach(), terms.total)
        assert terms.entropy != 0
        torch.testing.assert_close(
            terms.total, terms.base + 0.3 * (terms.rate + 0.5 * terms.entropy)
        )

    def test_a_schedule_advances_with_the_steps(self) -> None:
        student = build(SimCLRProjectionHead)
        criterion = wrap(NTXentLoss(), student=student, beta=Linear(1.0, warmup=4))
        betas = []
        for _ in range(5):
            criterion(student(rows(seed=1)), student(rows(seed=2))).backward()
            betas.append(float(criterion.terms.beta))
        assert betas == [0.0, 0.25, 0.5, 0.75, 1.0]

    def test_beta_0_puts_nothing_in_and_passes_everything_on(self) -> None:
        plain, student, teacher = (build(SimCLRProjectionHead, seed=s) for s in (0, 0, 1))
        before = fingerprint(student), fingerprint(teacher)
        criterion = wrap(NTXentLoss(), student=student, teacher=teacher, beta=0)
        assert (fingerprint(student), fingerprint(teacher)) == before
        assert criterion.heads == ()
        value = criterion(student(rows(seed=1)), out1=student(rows(seed=2)))
        expected = NTXentLoss()(plain(rows(seed=1)), plain(rows(seed=2)))
        assert torch.equal(value, expected)
        assert torch.equal(criterion.terms.base, expected)
        assert torch.isnan(criterion.terms.rate)


class TestMissingHost:
    BLOCK = """
import importlib.machinery as machinery, sys

class WithoutLightly(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        blocked = name.partition(".")[0] == "lightly"
        return None if blocked else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutLightly if f is machinery.PathFinder else f for f in sys.meta_path]
"""

    @staticmethod
    def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
        )

    def test_the_import_error_names_the_command(self, tmp_path: Path) -> None:
        code = self.BLOCK + "import climb_plugin\nimport climb_plugin.adapters.lightly"
        result = self.python(code, tmp_path)
        assert result.returncode == 1
        assert result.stderr.strip().splitlines()[-1] == (
            "ImportError: lightly is not installed: pip install 'climb-plugin[lightly]'"
        )

    def test_it_is_the_missing_host_that_raises(self, tmp_path: Path) -> None:
        result = self.python("import climb_plugin.adapters.lightly", tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
