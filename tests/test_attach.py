"""Rule 7: the Gaussian acts on the output of the module that was wrapped, and comes off again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from toys import (
    Net,
    embedded,
    embedded_and_normed,
    mlp,
    normalised,
    normalised_in_training,
    rates,
    same,
    scored,
    square,
)

from climb_plugin import ClimbLoss, GaussianHead, unwrap, wrap
from climb_plugin.attach import attach


def sequential() -> nn.Sequential:
    return mlp(16, 32, 8)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def tied() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(layer, nn.ReLU(), layer)


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "sequential": sequential,
    "nested": lambda: nn.Sequential(sequential(), nn.Sequential(nn.Linear(8, 8))),
    "net": Net,
    "normalised": lambda: Net(finish=normalised),
    "normalised in training": lambda: Net(finish=normalised_in_training),
    "batch norm": lambda: Net(embedded_and_normed, normalised),
    "prototypes": lambda: Net(finish=scored),
    "residual": lambda: Residual(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
    "tied": tied,
    "linear": lambda: nn.Linear(16, 8),
}


def photograph(module: nn.Module, rows: Tensor) -> dict[str, Any]:
    """What is the same before wrapping and after unwrapping."""
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), len(vars(part)))
        for part in module.modules()
    ]
    last = list(module.children())[-1:] or [module]
    return {
        "keys": list(module.state_dict()),
        "parameters": [(name, id(p)) for name, p in module.named_parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "repr": repr(module),
        "len": len(list(module.children())),
        "last": id(last[0]),
        "hooks": hooks,
        "output": copy.deepcopy(module).eval()(rows).detach().numpy().tobytes(),
    }


class TestUndo:
    @pytest.mark.parametrize("at", ["projection", "features"])
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
    def test_unwrap_leaves_what_was_there(
        self, make: Callable[[], nn.Module], trained: bool, at: str
    ) -> None:
        student, rows = make(), torch.randn(12, 16)
        next(student.parameters()).requires_grad_(False)
        teacher = copy.deepcopy(student).requires_grad_(False)
        before = photograph(student, rows), photograph(teacher, rows)
        loss = wrap(square, student=student, teacher=teacher, beta=1e-3, at=at)
        assert photograph(student, rows)["keys"] != before[0]["keys"]
        if trained:
            loss(student(rows)).backward()
            before[0].pop("output")
            for part in (student, teacher):  # batch norm has moved
                part.eval()
        assert unwrap(loss) is square
        after = photograph(student, rows), photograph(teacher, rows)
        for one, two in zip(before, after, strict=True):
            for name, value in one.items():
                assert two[name] == value, name
        student.train()
        assert torch.equal(student(rows), student(rows))
        # And it may be wrapped anew.
        wrap(square, student=student, beta=1e-3)(student(rows)).backward()

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    @pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
    def test_of_a_copy_that_was_made_with_the_model(
        self, make: Callable[[], nn.Module], how: Callable[[Any], Any]
    ) -> None:
        student, rows = make(), torch.randn(12, 16)
        before = photograph(student, rows)
        loss = wrap(nn.MSELoss(), student=student, beta=1e-3)
        twin, twins_loss = how((student, loss))
        unwrap(twins_loss)
        after = photograph(twin, rows)
        for name in ("keys", "requires_grad", "repr", "len", "hooks", "output"):
            assert after[name] == before[name], name
        # The original still has its own.
        out = student(rows)
        loss(out, torch.zeros_like(out)).backward()
        assert loss.terms.rate > 0

    def test_the_handle(self) -> None:
        student = sequential()
        before = photograph(student, torch.ones(2, 16))
        attached = attach(student)
        assert isinstance(attached.head, GaussianHead)
        assert attached.out_features == 8
        assert attached.head in student.modules()
        attached.remove()
        assert photograph(student, torch.ones(2, 16)) == before

    def test_a_head_that_was_put_in_by_hand_is_not_taken_out(self) -> None:
        loss = ClimbLoss(square, heads=GaussianHead(4), beta=1e-3)
        with pytest.raises(ValueError, match="by hand"):
            unwrap(loss)
        with pytest.raises(TypeError, match="takes what wrap returned, got function"):
            unwrap(square)  # type: ignore[arg-type]

    def test_beta_0_hangs_nothing_on(self) -> None:
        student, rows = sequential(), torch.ones(2, 16)
        before = photograph(student, rows)
        loss = wrap(square, student=student, beta=0)
        assert photograph(student, rows) == before
        assert torch.equal(loss(student(rows)), square(student(rows)))
        assert unwrap(loss) is square


class TestTheHostMeansWhatItMeant:
    def test_indexing(self) -> None:
        student, rows = sequential(), torch.randn(4, 16)
        layers, penultimate = list(student), student[:-1](rows)
        wrap(square, student=student, beta=1e-3)
        assert len(student) == 3
        assert list(student) == list(student.children()) == layers
        assert student[-1] is layers[-1]
        assert torch.equal(student[:-1](rows), penultimate)

    @pytest.mark.parametrize(
        "take_off",
        [
            lambda p: nn.Sequential(*list(p.children())[:-1]),
            lambda p: p[:-1],
            lambda p: p.__setitem__(-1, nn.Identity()) or p,
            lambda p: p.__delitem__(-1) or p,
        ],
        ids=["children", "slice", "Identity", "del"],
    )
    def test_the_last_layer_is_taken_off(self, take_off: Callable[[Any], nn.Module]) -> None:
        student = sequential()
        plain, rows = copy.deepcopy(student), torch.randn(4, 16)
        wrap(square, student=student, beta=1e-3)(student(rows)).backward()
        assert torch.equal(take_off(student.eval())(rows), take_off(plain)(rows))

    @pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
    def test_keys(self, make: Callable[[], nn.Module]) -> None:
        student = make()
        plain = student.state_dict()
        wrap(square, student=student, beta=1e-3)
        wrapped = student.state_dict()
        assert [key for key in wrapped if "gaussian." not in key] == list(plain)
        # What is added is floating-point parameters: they can be averaged and cast.
        added = {key: value for key, value in wrapped.items() if key not in plain}
        assert added
        assert added.keys() <= dict(student.named_parameters()).keys()
        assert all(value.is_floating_point() for value in added.values())
        # The parameters of the host come in the order that they had.
        named = [name for name, _ in student.named_parameters() if "gaussian." not in name]
        assert named == [name for name, _ in make().named_parameters()]
        missing, unexpected = student.load_state_dict(plain, strict=False)
        assert all(key.split(".")[-3] == "gaussian" for key in missing)
        assert unexpected == []

    def test_the_head_has_the_training_of_its_host(self) -> None:
        student = sequential().eval()
        (head,) = wrap(square, student=student, beta=1e-3).heads
        assert not head.training
        student.train()
        assert head.training

    @pytest.mark.parametrize("make", [sequential, Net])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_hook_of_the_user_sees_the_sample(
        self, make: Callable[[], nn.Module], when: str
    ) -> None:
        student, rows, saved = make(), torch.randn(6, 16), {}
        mean = student(rows).detach()
        if when == "before":
            student.register_forward_hook(lambda *seen: saved.update(z=seen[2]))
        loss = wrap(square, student=student, beta=1e-3)
        if when == "after":
            student.register_forward_hook(lambda *seen: saved.update(z=seen[2]))
        student(rows)
        loss(saved["z"]).backward()
        torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=1e-4, atol=0.0)

    def test_a_pre_hook_of_the_user_sees_the_sample_of_the_features(self) -> None:
        student, rows, saved = sequential(), torch.randn(6, 16), {}
        student.register_forward_pre_hook(lambda _, args: saved.update(z=args[0]))
        loss = wrap(square, student=student, beta=1e-3, at="features")
        student(rows)
        loss(saved["z"]).backward()
        torch.testing.assert_close(loss.terms.rate, rates(rows).mean(), rtol=1e-4, atol=0.0)


def assert_rate(loss: ClimbLoss, student: nn.Module, rows: Tensor, mean: Tensor) -> None:
    loss(student(rows)).backward()
    torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=1e-3, atol=0.0)


def gaussian_in(module: nn.Module) -> set[str]:
    """Paths of the layers that hold a head."""
    return {
        name.removesuffix(".gaussian") for name, _ in module.named_modules() if "gauss" in name[-8:]
    }


class Prototypes(nn.Module):
    """As DINO's head, with whatever maps the normalised embedding to scores."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.mlp, self.last = mlp(16, 32, 8), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


class Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class WithEmpty(nn.Module):
    """A residual block without an activation of its own, whose shortcut or whose norms are none."""

    def __init__(self, empty: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.empty = empty

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if isinstance(self.empty, nn.Sequential):
            return out.relu() + self.empty(x)
        parts = self.empty.values() if isinstance(self.empty, nn.ModuleDict) else self.empty
        for part in parts:
            out = out + part(out)
        return out


class TestTheLayerThatHoldsTheHead:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Sequential(nn.Linear(16, 32), nn.Dropout(0), nn.Linear(32, 8)),
            lambda: nn.Sequential(nn.Linear(16, 8), nn.Dropout(0)),
            lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Dropout(0)),
        ],
        ids=["within", "end", "behind an activation"],
    )
    def test_dropouts_that_are_kept_in_eval(self, make: Callable[[], nn.Sequential]) -> None:
        student, rows = make(), torch.randn(4, 16)
        loss = wrap(square, student=student, beta=1e-3)
        for part in student.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
        assert_rate(loss, student, rows, copy.deepcopy(student).eval()(rows))
        student.eval()
        assert torch.equal(student(rows), student(rows))

    def test_a_head_in_eval_stays_in_eval(self) -> None:
        student, rows = sequential(), torch.randn(4, 16)
        (head,) = wrap(square, student=student, beta=1e-3).heads
        head.eval()
        assert torch.equal(student(rows), student(rows))

    def test_norms_that_are_frozen(self) -> None:
        student = Net(embedded_and_normed)
        (head,) = wrap(square, student=student, beta=1e-3).heads
        student.norm.requires_grad_(False)
        assert all(p.requires_grad for p in head.parameters())

    @pytest.mark.parametrize(
        "last",
        [
            lambda: parametrizations.weight_norm(nn.Linear(8, 20, bias=False)),
            lambda: nn.Sequential(nn.Dropout(0), nn.Linear(8, 20)),
        ],
        ids=["parametrized", "dropout"],
    )
    def test_prototypes_hold_none(self, last: Callable[[], nn.Module]) -> None:
        """Their gradients are cancelled by name, they are frozen, and replaced."""
        student = Prototypes(last())
        wrap(square, student=student, beta=1e-3)
        assert gaussian_in(student) == {"mlp.1"}

    def test_a_dropout_that_is_on_in_evaluation(self) -> None:
        """Monte Carlo dropout: the head has the mode of the module, not of its host."""
        dropout = nn.Dropout(0)
        student, rows = nn.Sequential(nn.Linear(16, 8), dropout), torch.randn(64, 16)
        mean = student(rows)
        loss = wrap(square, student=student, beta=1e-3)
        assert gaussian_in(student) == {"1"}
        student.eval()
        dropout.train()
        assert torch.equal(student(rows), mean)
        assert_rate(loss, student.train(), rows, mean)

    def test_an_activation_that_the_backbone_has_too(self) -> None:
        act = nn.ReLU()
        backbone = nn.Sequential(nn.Linear(16, 16), act)
        student = nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 8))
        keys, rows = list(backbone.state_dict()), torch.randn(4, 16)
        loss = wrap(square, student=student, beta=1e-3)
        assert list(backbone.state_dict()) == keys
        backbone.eval().requires_grad_(False)  # locked
        features = backbone(rows)
        assert_rate(loss, student, features, copy.deepcopy(student).eval()(features))
        assert all(p.requires_grad for p in loss.heads[0].parameters())

    def test_an_activation_that_student_and_teacher_share(self) -> None:
        """As a default argument that is built once; their parameters still pair one to one."""
        act = nn.ReLU()
        student, teacher = (
            nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 8)) for _ in range(2)
        )
        loss = wrap(square, student=student, teacher=teacher, beta=1e-3)
        assert gaussian_in(student) == gaussian_in(teacher) != {"1"}
        teacher.load_state_dict(student.state_dict())
        rows = torch.randn(4, 16)
        assert torch.equal(teacher.requires_grad_(False)(rows), teacher(rows))
        unwrap(loss)
        assert gaussian_in(student) == gaussian_in(teacher) == set()

    def test_an_activation_that_a_slice_has_too(self) -> None:
        """One rank may keep one, for its k-NN: the order of parameters must not hang on that."""
        student = sequential()
        slices = student[:2], nn.Sequential(*list(student.children())[:-1])
        wrap(square, student=student, beta=1e-3)
        assert gaussian_in(student) == {"1"}
        assert all(len(one) == 2 for one in slices)

    def test_an_activation_that_garbage_has_too(self) -> None:
        """The place must not hang on when the collector ran."""
        student = sequential()
        garbage = nn.Sequential(student[1])
        garbage.itself = [garbage]
        del garbage
        wrap(square, student=student, beta=1e-3)
        assert gaussian_in(student) == {"1"}

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8))),
            lambda: nn.Sequential(*[nn.Linear(16, 16)] * 2),
            lambda: WithEmpty(nn.Sequential()),
            lambda: WithEmpty(nn.ModuleList()),
            lambda: WithEmpty(nn.ModuleDict()),
        ],
        ids=[
            "weight_norm",
            "twice",
            "empty Sequential",
            "empty list",
            "empty dict",
        ],
    )
    def test_no_container_runs_it(self, make: Callable[[], nn.Module]) -> None:
        """An empty shortcut, or an optional norm; and a Sequential of parametrised layers."""
        student, rows = make(), torch.randn(4, 16)
        mean = copy.deepcopy(student).eval()(rows).detach()
        lengths = [len(part) for part in student.modules() if hasattr(part, "__len__")]
        loss = wrap(square, student=student, beta=1e-3)
        assert [len(p) for p in student.modules() if hasattr(p, "__len__")] == lengths
        assert_rate(loss, student, rows, mean)
        assert torch.equal(student.eval()(rows), mean)

    def test_an_optional_norm_before_the_normalisation(self) -> None:
        layer, rows = nn.Linear(16, 8), torch.randn(4, 16)
        student = nn.Sequential(layer, nn.Sequential(), Normalised())
        embedding = layer(rows).detach()
        loss = wrap(square, student=student, beta=1e-3)
        assert gaussian_in(student) == {"0"}
        assert_rate(loss, student, rows, embedding)

    def test_containers_alone_are_refused(self) -> None:
        student = nn.Sequential(nn.Sequential(nn.ParameterList([torch.ones(3)])))
        with pytest.raises(ValueError, match="GaussianHead"):
            wrap(square, student=student, beta=1e-3)

    def test_a_first_parameter_of_integers(self) -> None:
        student = sequential()
        packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        student.packed = packed
        student._parameters = {"packed": packed}
        (head,) = wrap(square, student=student, beta=1e-3).heads
        assert head.logvar.weight.dtype == torch.float32


class TestStateIsFloatingPointParameters:
    @pytest.mark.parametrize(
        "change",
        [
            lambda old, new: (old + new) / 2,
            lambda old, new: old / 3 + old / 3 + new / 3,
            lambda old, new: new.half(),
            lambda old, new: new.double(),
            lambda old, new: 0.9 * old + 0.1 * new,
        ],
        ids=["mean", "soup", "half", "double", "ema"],
    )
    def test_averaged_and_cast(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        student = nn.Sequential(*sequential(), nn.LayerNorm(8))
        wrap(square, student=student, beta=1e-3)
        teacher = copy.deepcopy(student).requires_grad_(False)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
        old, new = teacher.state_dict(), student.state_dict()
        expected = {key: change(old[key], new[key]).float() for key in old}
        teacher.load_state_dict({key: change(old[key], new[key]) for key in old})
        for key, value in teacher.state_dict().items():
            assert torch.equal(value, expected[key])
        rows = torch.randn(6, 16)
        assert torch.equal(teacher(rows), teacher.eval()(rows))


class TestTheHostIsTakenApartAfterwards:
    """The head still acts on what the module gives, or the next step says what was lost."""

    def test_a_layer_is_appended(self) -> None:
        student, rows = sequential(), torch.randn(64, 16)
        mean = F.batch_norm(student(rows), None, None, training=True)
        loss = wrap(square, student=student, beta=1e-3)
        student.append(nn.BatchNorm1d(8, affine=False))
        assert_rate(loss, student, rows, mean)

    @pytest.mark.parametrize("finish", [same, normalised])
    def test_forward_hooks_are_cleared(self, finish: Any) -> None:
        student, rows = Net(finish=finish), torch.randn(64, 16)
        mean = embedded(student, rows)
        loss = wrap(square, student=student, beta=1e-3)
        for part in student.modules():
            part._forward_hooks.clear()
        assert_rate(loss, student, rows, mean)

    @pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
    def test_norms_on_every_linear_layer(self, norm: str) -> None:
        student, rows = sequential(), torch.randn(6, 16)
        loss = wrap(lambda z: z[:, 0].mean(), student=student, beta=1e-3)
        for part in list(student.modules()):
            if isinstance(part, nn.Linear):
                getattr(parametrizations, norm)(part)
        mean = student.eval()(rows)
        loss(student.train()(rows)).backward()
        torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=0.05, atol=0.0)

    def test_pruning_of_all_linear_layers(self) -> None:
        def pruned(model: nn.Module) -> list[Tensor]:
            chosen = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
            prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.4)
            return [model[0].weight_mask, model[2].weight_mask]

        student = sequential()
        plain = copy.deepcopy(student)
        wrap(square, student=student, beta=1e-3)
        for one, two in zip(pruned(plain), pruned(student), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize("finish", [same, normalised])
    @pytest.mark.filterwarnings("ignore:.*deprecated")
    def test_dynamic_quantisation(self, finish: Any) -> None:
        student, rows = Net(finish=finish), torch.randn(8, 16)
        plain = copy.deepcopy(student)
        loss = wrap(square, student=student, beta=1e-3)
        loss(student(rows)).backward()
        quantise = torch.ao.quantization.quantize_dynamic
        try:
            expected = quantise(plain.eval(), {nn.Linear}, dtype=torch.qint8)(rows)
        except RuntimeError:
            pytest.skip("this torch has no quantisation on this machine")
        small = quantise(student.eval(), {nn.Linear}, dtype=torch.qint8)
        torch.testing.assert_close(small(rows), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("at", ["projection", "features"])
    def test_synchronised_batch_norm(self, at: str) -> None:
        """The layer whose output is sampled becomes another one; in eval(), as there is no GPU."""
        student, rows = (
            nn.ModuleDict({"head": Net(embedded_and_normed, normalised)}),
            torch.randn(8, 16),
        )
        head = student["head"]
        mean = rows if at == "features" else copy.deepcopy(head.norm).eval()(embedded(head, rows))
        loss = wrap(square, student=head, beta=1e-3, at=at)
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        for part in student.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.training = False
        for _ in range(2):
            loss(student["head"](rows)).backward()
            torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=1e-3, atol=0.0)

    def test_the_last_layer_is_replaced(self) -> None:
        student, rows = sequential(), torch.randn(8, 16)
        loss = wrap(square, student=student, beta=1e-3)
        loss(student(rows)).backward()
        student[-1] = nn.Linear(32, 8)
        assert_rate(loss, student, rows, copy.deepcopy(student).eval()(rows))

    @pytest.mark.parametrize(
        ("make", "layer"), [(sequential, "1"), (lambda: Net(finish=normalised), "last")]
    )
    def test_the_layer_that_holds_the_head_is_replaced(
        self, make: Callable[[], nn.Module], layer: str
    ) -> None:
        student, rows = make(), torch.randn(8, 16)
        loss = wrap(square, student=student, beta=1e-3)
        loss(student(rows)).backward()
        setattr(student, layer, nn.GELU() if layer == "1" else nn.Linear(32, 8))
        with pytest.raises(RuntimeError, match=r"replaced or removed.*\(unwrap\)"):
            student(rows)
        with torch.no_grad():
            student(rows)

    def test_the_whole_projection_is_replaced(self) -> None:
        model = nn.ModuleDict({"fc": sequential()})
        loss = wrap(square, student=model["fc"], beta=1e-3)
        model["fc"] = sequential()
        with pytest.raises(RuntimeError, match="a layer that has replaced the one"):
            loss(model["fc"](torch.randn(8, 16)))

    def test_a_wider_layer_before_it(self) -> None:
        head = nn.Sequential(nn.Linear(16, 8), GaussianHead(8))
        head[0] = nn.Linear(16, 10)
        with pytest.raises(ValueError, match="was replaced since the head was built"):
            head(torch.randn(4, 16))


def test_a_module_that_was_compiled_in_place_is_refused() -> None:
    student = sequential()
    student[2].compile(backend="eager")
    with pytest.raises(ValueError, match="wrap the loss first, then compile"):
        wrap(square, student=student, beta=1e-3)


def test_a_layer_that_is_tied_to_another_head_samples_for_the_wrapped_one_alone() -> None:
    one, other = Net(finish=normalised), Net(finish=normalised)
    other.last = one.last
    rows = torch.randn(64, 16)
    expected = other(rows).detach()
    loss = wrap(square, student=one, beta=1e-3)
    assert torch.equal(other(rows), expected)
    loss(one(rows)).backward()
    assert loss.terms.rate > 0
    assert torch.equal(other(rows), expected)
