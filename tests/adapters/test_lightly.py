"""wrap() on lightly's own heads and losses; its options and refusals are tested without lightly."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from toys import rows, square

from climb_plugin import GaussianHead
from climb_plugin.adapters.lightly import wrap

WIDTHS = {
    "input_dim": 12,
    "hidden_dim": 16,
    "output_dim": 10,
    "bottleneck_dim": 6,
    "num_clusters": 20,
}
# Each class in ``lightly.models.modules.heads``, found there, not listed here.
HEADS = {
    name: item
    for name, item in vars(heads).items()
    if name.endswith("ProjectionHead") and item is not heads.ProjectionHead
}
VIEWS = rows(width=12, seed=1), rows(width=12, seed=2)


def build(kind: Callable[..., nn.Module], *, seed: int = 0) -> nn.Module:
    """A head with weights that are far from 0, the same for the same seed."""
    torch.manual_seed(seed)
    known = inspect.signature(kind).parameters.keys() & WIDTHS.keys()
    head = kind(**{name: WIDTHS[name] for name in sorted(known)})
    for parameter in head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return head


def gaussian(module: nn.Module) -> GaussianHead:
    (head,) = [part for part in module.modules() if isinstance(part, GaussianHead)]
    return head


def test_heads_of_lightly_are_found() -> None:
    assert {"DINOProjectionHead", "SimCLRProjectionHead", "MSNProjectionHead"} <= HEADS.keys()


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
class TestEveryHead:
    def test_the_gaussian_is_before_the_head_or_before_its_normalisation(
        self, kind: type[nn.Module], at: str
    ) -> None:
        plain, student = build(kind), build(kind)
        criterion = wrap(square, student=student, beta=1e-3, at=at)
        seen: list[tuple[Tensor, Tensor]] = []
        gaussian(student).register_forward_hook(lambda _, args, z: seen.append((args[0], z)))
        output = student(VIEWS[0])
        ((given, sample),) = seen
        layers: nn.Module = nn.Identity()
        if at == "projection":  # which normalises the output of its MLP (CAPI's has none)
            layers, plain.layers = getattr(plain, "layers", nn.Identity()), nn.Identity()
        assert torch.equal(given, layers(VIEWS[0]))
        assert torch.equal(output, plain(sample))
        assert gaussian(student) is criterion.heads[0]
        assert 0.02 < (sample - given).detach().std() < 0.5  # init_std is 0.1

    def test_eval_is_the_plain_head_bit_for_bit(self, kind: type[nn.Module], at: str) -> None:
        plain, student = build(kind).eval(), build(kind)
        wrap(square, student=student, beta=1e-3, at=at)
        student.eval()
        expected = plain(VIEWS[0])
        assert torch.equal(student(VIEWS[0]), expected)
        assert torch.equal(student(VIEWS[0]), expected)

    def test_the_teacher_has_the_layout_of_the_student_and_stays_plain(
        self, kind: type[nn.Module], at: str
    ) -> None:
        plain, student, teacher = build(kind, seed=5), build(kind), build(kind, seed=5)
        deactivate_requires_grad(teacher)
        wrap(square, student=student, teacher=teacher, beta=1e-3, at=at)
        layouts = [[(n, p.shape) for n, p in m.named_parameters()] for m in (student, teacher)]
        assert layouts[0] == layouts[1]
        assert len(layouts[0]) == len(list(plain.parameters())) + 2
        memory = [{t.data_ptr() for t in m.state_dict().values()} for m in (student, teacher)]
        assert not memory[0] & memory[1]
        assert teacher.training
        for mode in (True, False):
            assert torch.equal(teacher.train(mode)(VIEWS[0]), plain.train(mode)(VIEWS[0]))
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_the_layers_that_were_there_keep_their_keys(
        self, kind: type[nn.Module], at: str
    ) -> None:
        plain, student = build(kind), build(kind)
        wrap(square, student=student, beta=1e-3, at=at)
        state, known = student.state_dict(), plain.state_dict()
        new = state.keys() - known.keys()
        assert list(known) == [key for key in state if key not in new]
        assert {key.rpartition("gaussian.")[2] for key in new} == {"logvar.weight", "logvar.bias"}
        other = build(kind, seed=3).state_dict()
        result = student.load_state_dict(other, strict=False)
        assert set(result.missing_keys) == new
        assert result.unexpected_keys == []
        loaded = student.state_dict()
        assert [key for key in known if not torch.equal(loaded[key], other[key])] == []


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
        criterion([teacher(v) for v in VIEWS], [student(v) for v in VIEWS], epoch=0).backward()
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
        weight = gaussian(teacher).logvar.weight
        assert torch.equal(weight, torch.full_like(weight, 0.25))
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


def test_the_centre_of_dino_is_reached_and_updated_through_the_criterion() -> None:
    plain, base = DINOLoss(10), DINOLoss(10, center_momentum=0.9)
    criterion = wrap(base, student=build(DINOProjectionHead), beta=1e-3)
    assert criterion.center is base.center
    criterion.teacher_temp = 0.5
    assert base.teacher_temp == 0.5
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
def test_state_dicts_fit_both_ways(make: Callable[[], nn.Module], prior: str) -> None:
    torch.manual_seed(0)
    plain, base, other = make(), make(), make()
    for buffer in plain.buffers():
        buffer.add_(1)
    criterion = wrap(base, student=build(DINOProjectionHead), beta=1e-3, prior=prior)
    assert list(criterion.state_dict()) == list(plain.state_dict())
    criterion.load_state_dict(plain.state_dict(), strict=True)
    other.load_state_dict(criterion.state_dict(), strict=True)
    for loaded in (base, other):
        for name, value in plain.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


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
