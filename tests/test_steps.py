"""Rules 5 and 9: a step is an optimiser step, and tells of a head that no optimiser holds."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer
from toys import square

from climb_plugin import ClimbLoss, GaussianHead, unwrap, wrap
from climb_plugin.attach import attach
from climb_plugin.schedule import Linear

Make = Callable[[Iterable[nn.Parameter]], Any]


@pytest.fixture(autouse=True)
def few_optimisers() -> None:
    gc.collect(1)  # hardly an optimiser of another test is alive; of all objects it takes seconds


def make_student(*before: nn.Module) -> nn.Sequential:
    return nn.Sequential(*before, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def sgd(parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.01)


class OldSGD(optim.Optimizer):
    """Writes p.data, as older implementations do."""

    def __init__(self, parameters: Iterable[nn.Parameter], assign: bool) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.assign = assign

    def step(self, closure: Any = None) -> Any:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.assign:
                    p.data = p.data - group["lr"] * p.grad.data
                else:
                    p.data.add_(p.grad.data, alpha=-group["lr"])
        return value


class Lookahead(optim.Optimizer):
    """Around another one, with slow weights of its own."""

    def __init__(self, inner: optim.Optimizer) -> None:
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})
        self.inner, self.count = inner, 0
        self.slow = {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}

    def step(self, closure: Any = None) -> Any:
        value = self.inner.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            with torch.no_grad():
                for p, slow in self.slow.items():
                    p.copy_(slow.lerp_(p, 0.5))
        return value


class InBackward:
    """One optimiser for each parameter, which steps inside of the backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            one = sgd([p])
            p.register_post_accumulate_grad_hook(lambda p, one=one: one.step() and None)

    def zero_grad(self) -> None:
        pass

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()


class Compiled:
    """A step that was compiled, without the closure."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.made = sgd(parameters)
        self.compiled = torch.compile(self.made.step, backend="eager")

    def zero_grad(self) -> None:
        self.made.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()
        self.compiled()


def made(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(optim, name)(parameters, lr=1e-2, **options)


LOOPS = ("ASGD", "Adadelta", "Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop")
# Adafactor came with torch 2.5.
OPTIMISERS: dict[str, Make] = {name: made(name) for name in LOOPS if hasattr(optim, name)}
for _name in ("SGD", "Adam", "AdamW", "Adagrad"):
    for _kind in ("loop", "foreach", "fused"):
        _options = {"foreach": False} if _kind == "loop" else {_kind: True}
        OPTIMISERS[f"{_name}, {_kind}"] = made(_name, **_options)
OPTIMISERS |= {
    "p.data.add_": lambda parameters: OldSGD(parameters, False),
    "p.data =": lambda parameters: OldSGD(parameters, True),
    "lookahead": lambda parameters: Lookahead(sgd(parameters)),
    "compiled": Compiled,
    "in backward": InBackward,
}


def train(student: nn.Module, loss: ClimbLoss, optimizer: Any, steps: int = 5) -> list[list[float]]:
    """The betas of each step, of each call in it."""
    seen: list[list[float]] = []
    for _ in range(steps):
        seen.append([])

        def closure() -> Tensor:
            optimizer.zero_grad()
            total: Tensor = loss(student(torch.randn(16, 8)))
            total.backward()
            seen[-1].append(round(float(loss.terms.beta), 6))
            return total

        optimizer.step(closure)
    return seen


NOT_HELD = "build the optimiser after the loss was wrapped"


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
class TestEveryOptimiser:
    def test_built_before_the_wrapping_it_is_found_at_its_first_step(self, make: Make) -> None:
        student = make_student()
        optimizer = make(list(student.parameters()))
        loss = wrap(square, student=student, beta=1e-3)
        start = [p.detach().clone() for p in loss.heads[0].parameters()]
        with pytest.raises(RuntimeError, match=NOT_HELD):
            train(student, loss, optimizer, steps=1)
        for one, two in zip(start, loss.heads[0].parameters(), strict=True):
            assert torch.equal(one, two)

    def test_built_after_it_each_step_counts_once(self, make: Make) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=Linear(1.0, warmup=10))
        betas = train(student, loss, make(student.parameters()))
        assert [set(calls) for calls in betas] == [{step / 10} for step in range(5)]
        assert loss.step == 5


@contextmanager
def process_group(folder: Path) -> Any:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_optimiser(tmp_path: Path) -> None:
    with process_group(tmp_path):
        student = make_student()
        loss = wrap(square, student=student, beta=Linear(1.0, warmup=10))
        optimizer = ZeroRedundancyOptimizer(student.parameters(), optim.SGD, lr=0.01)
        assert train(student, loss, optimizer) == [[step / 10] for step in range(5)]


class TestNobodyHoldsTheHead:
    def test_matrices_alone_behind_a_norm(self) -> None:
        """The projection's first parameter is a vector, which such an optimiser leaves out."""
        student = make_student(nn.LayerNorm(8))
        optimizer = sgd([p for p in student.parameters() if p.ndim == 2])
        loss = wrap(square, student=student, beta=1e-3)
        with pytest.raises(RuntimeError, match=NOT_HELD):
            train(student, loss, optimizer)

    def test_at_features(self) -> None:
        """What the optimiser moves lies behind the head."""
        student = make_student()
        optimizer = sgd(student.parameters())
        loss = wrap(square, student=student, beta=1e-3, at="features")
        with pytest.raises(RuntimeError, match=NOT_HELD):
            train(student, loss, optimizer)

    def test_one_of_two_heads(self) -> None:
        """The optimiser was built between the two: it holds the first."""
        one, other = make_student(), make_student()
        heads = [attach(one)]
        optimizer = sgd([*one.parameters(), *other.parameters()])
        heads.append(attach(other))
        loss = ClimbLoss(nn.functional.mse_loss, heads=heads, beta=1e-3)
        rows = torch.randn(16, 8)
        loss(one(rows), other(rows)).backward()
        with pytest.raises(RuntimeError, match=NOT_HELD):
            optimizer.step()

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_one_of_two_heads_of_two_optimisers(self, stage: int, order: tuple[int, int]) -> None:
        students = make_student(), make_student()
        plain = [list(one.parameters()) for one in students]
        loss = ClimbLoss(nn.functional.mse_loss, heads=[attach(one) for one in students], beta=1e-3)

        def steps(optimizers: list[optim.Optimizer]) -> None:
            for _ in range(2):
                rows = torch.randn(16, 8)
                loss(*(one(rows) for one in students)).backward()
                for place in order:
                    optimizers[place].step()

        if stage == 2:
            steps([sgd(one.parameters()) for one in students])
            gc.collect()
        optimizers = [sgd(students[0].parameters()), sgd(plain[1])]
        with pytest.raises(RuntimeError, match=NOT_HELD):
            steps(optimizers)

    def test_a_learned_prior_in_a_second_stage(self) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3, prior="learned")
        train(student, loss, sgd([*student.parameters(), *loss.parameters()]))
        gc.collect()
        with pytest.warns(UserWarning, match=r"add list\(loss\.parameters\(\)\)"):
            train(student, loss, sgd(student.parameters()), steps=2)

    @pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
    def test_in_a_second_stage(self, how: str) -> None:
        """Its optimiser is built anew from names, and the head's are not among them."""
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        train(student, loss, sgd(student.parameters()))
        gc.collect()
        if how != "itself":
            both = student, loss
            student, loss = (
                copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
            )
        optimizer = sgd(student[0].parameters())
        for _ in range(2):  # as in a notebook
            with pytest.raises(RuntimeError, match=NOT_HELD):
                train(student, loss, optimizer)

    def test_beside_an_optimiser_of_another_model(self) -> None:
        other, student = make_student(), make_student()
        others_loss = wrap(square, student=other, beta=1e-3)
        optimizer = sgd(student.parameters())
        loss = wrap(square, student=student, beta=1e-3)
        train(other, others_loss, sgd(other.parameters()), steps=1)
        with pytest.raises(RuntimeError, match=NOT_HELD):
            train(student, loss, optimizer)

    def test_a_learned_prior_that_nobody_holds_is_told_at_the_first_step(self) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3, prior="learned")
        optimizer = sgd(student.parameters())
        loss(student(torch.randn(16, 8))).backward()
        with pytest.warns(UserWarning, match=r"add list\(loss\.parameters\(\)\)") as said:
            optimizer.step()
        assert [warning.filename for warning in said] == [__file__]
        train(student, loss, optimizer)

    @pytest.mark.parametrize("apart", [False, True])
    def test_a_learned_prior_that_somebody_holds_is_not(self, apart: bool) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3, prior="learned")
        if apart:
            others = [sgd(loss.parameters())]
            train(student, loss, sgd(student.parameters()))
            assert others
        else:
            train(student, loss, sgd([*student.parameters(), *loss.parameters()]))


class PlainSGD:
    """None of torch's optimisers."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.sub_(self.lr * p.grad)


class TestHealthy:
    """Nothing is said: warnings are errors here."""

    @pytest.mark.parametrize("freeze", [False, True])
    @pytest.mark.parametrize("every", [1, 2, 5, 99])
    def test_the_heads_optimiser_steps_less_often(self, every: int, freeze: bool) -> None:
        student = make_student()
        layers = list(student.parameters())
        attached = attach(student)
        loss = ClimbLoss(square, heads=attached, beta=1e-3)
        fast, slow = sgd(layers), sgd(attached.head.parameters())
        before = attached.head.logvar.bias.detach().clone()
        if freeze:
            gc.collect()
            gc.freeze()
        try:
            for step in range(1, 11):
                loss(student(torch.randn(16, 8))).backward()
                fast.step()
                if step % every == 0:
                    slow.step()
        finally:
            gc.unfreeze()
        assert torch.equal(attached.head.logvar.bias, before) == (every == 99)

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_another_stage_after_a_batch_that_was_not_stepped(self, by_hand: bool) -> None:
        """The rest of an accumulation; then a part of the projection head is tuned alone."""
        student = make_student()
        if by_hand:
            head = GaussianHead(4)
            loss = ClimbLoss(square, heads=head, beta=1e-3)
            student.append(head)
        else:
            loss = wrap(square, student=student, beta=1e-3)
        train(student, loss, sgd(student.parameters()))
        gc.collect()
        loss(student(torch.randn(16, 8))).backward()
        tuned = student[0]
        optimizer = sgd(tuned.parameters())
        for _ in range(3):
            tuned(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()

    def test_two_heads_of_two_optimisers(self) -> None:
        students = make_student(), make_student()
        loss = ClimbLoss(nn.functional.mse_loss, heads=[attach(one) for one in students], beta=1e-3)
        optimizers = [sgd(one.parameters()) for one in students]
        for _ in range(3):
            rows = torch.randn(16, 8)
            loss(*(one(rows) for one in students)).backward()
            for optimizer in optimizers:
                optimizer.step()
        assert loss.step == 3

    @pytest.mark.parametrize("rest", [sgd, PlainSGD, None], ids=["slower", "not torch's", "none"])
    def test_matrices_alone(self, rest: Make | None) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        matrices = sgd([p for p in student.parameters() if p.ndim == 2])
        others = rest([p for p in student.parameters() if p.ndim != 2]) if rest else None
        start = loss.heads[0].logvar.weight.detach().clone()
        for step in range(8):
            student.zero_grad()
            loss(student(torch.randn(16, 8))).backward()
            matrices.step()
            if others is not None and step % 4 == 3:
                others.step()
        assert not torch.equal(start, loss.heads[0].logvar.weight)
        assert loss.step == 8

    def test_a_frozen_head_that_is_unfrozen_later(self) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        (head,) = loss.heads
        head.requires_grad_(False)
        optimizer = sgd([p for p in student.parameters() if p.requires_grad])
        train(student, loss, optimizer)
        assert loss.step == 5
        head.requires_grad_(True)
        optimizer.add_param_group({"params": list(head.parameters())})
        train(student, loss, optimizer)
        assert loss.step == 10

    @pytest.mark.parametrize("moved", ["predictor", "input", "the loss's own"])
    def test_an_optimiser_of_what_is_not_the_projection(self, moved: str) -> None:
        """As in a warm-up of the predictor, in prompt tuning, in a search for a temperature."""
        student, predictor, rows = make_student(), nn.Linear(4, 4), torch.randn(4, 8)
        own = nn.Parameter(torch.ones(()))
        rows.requires_grad_(moved == "input")
        loss = wrap(lambda z: own * predictor(z).square().mean(), student=student, beta=1e-3)
        of = {"predictor": [*predictor.parameters()], "input": [rows], "the loss's own": [own]}
        optimizer = sgd(of[moved])
        for _ in range(2):
            loss(student(rows)).backward()
            optimizer.step()

    def test_a_loss_of_before_on_the_same_backbone(self) -> None:
        """A dry run before the projection head is built anew, as in a notebook."""
        backbone, first, second = nn.Linear(8, 8), make_student(), make_student()
        stale = wrap(square, student=first, beta=1e-3)
        stale(first(backbone(torch.randn(4, 8)))).backward()
        loss = wrap(square, student=second, beta=1e-3)
        model = nn.Sequential(backbone, second)
        train(model, loss, sgd(model.parameters()))
        assert loss.step > 0

    def test_weights_can_be_swapped(self) -> None:
        """torch refuses that for tensors that somebody refers to weakly."""
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        train(student, loss, sgd(student.parameters()))
        torch.utils.swap_tensors(student[0].weight, nn.Parameter(torch.zeros(8, 8)))
        assert not student[0].weight.any()

    def test_an_optimiser_of_another_model(self) -> None:
        student, other = make_student(), make_student()
        strange = sgd(other.parameters())
        loss = wrap(square, student=student, beta=Linear(1.0, warmup=10))
        optimizer = sgd(student.parameters())
        for _ in range(3):
            loss(student(torch.randn(16, 8))).backward()
            other(torch.randn(16, 8)).sum().backward()
            strange.step()
            optimizer.step()
            strange.step()
        assert loss.step == 3

    def test_weights_that_are_swapped_for_an_average(self) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        optimizer = sgd(student.parameters())
        average = copy.deepcopy(student.state_dict())
        for _ in range(3):
            train(student, loss, optimizer, steps=1)
            trained = copy.deepcopy(student.state_dict())
            student.load_state_dict(average)
            student.load_state_dict(trained)

    def test_after_unwrap_nothing_is_watched(self) -> None:
        student = make_student()
        optimizer = sgd(student.parameters())
        loss = wrap(square, student=student, beta=1e-3)
        loss(student(torch.randn(16, 8))).backward()
        unwrap(loss)
        optimizer.step()


class TestOneStepOfMany:
    def betas(self, loop: Callable[[nn.Module, ClimbLoss, list[float]], None]) -> list[float]:
        student = make_student()
        loss = wrap(square, student=student, beta=Linear(1.0, warmup=100))
        seen: list[float] = []
        loop(student, loss, seen)
        return seen

    def call(self, student: nn.Module, loss: ClimbLoss, seen: list[float]) -> Tensor:
        total: Tensor = loss(student(torch.randn(16, 8)))
        seen.append(round(float(loss.terms.beta) * 100))
        return total

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_accumulation(self, by_hand: bool) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = sgd(student.parameters())
            for step in range(3):
                if by_hand:
                    loss.set_step(step)
                for _ in range(4):
                    (self.call(student, loss, seen) / 4).backward()
                optimizer.step()
                optimizer.zero_grad()

        assert self.betas(loop) == [0] * 4 + [1] * 4 + [2] * 4

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_sam(self, by_hand: bool) -> None:
        """Two passes: at the weights, and at the weights moved along the gradient."""

        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer, parameters = sgd(student.parameters()), list(student.parameters())
            for step in range(3):
                if by_hand:
                    loss.set_step(step)
                optimizer.zero_grad()
                self.call(student, loss, seen).backward()
                moves = [0.05 * p.grad.sign() for p in parameters if p.grad is not None]
                with torch.no_grad():
                    torch._foreach_add_(parameters, moves)
                optimizer.zero_grad()
                self.call(student, loss, seen).backward()
                with torch.no_grad():
                    torch._foreach_sub_(parameters, moves)
                optimizer.step()

        assert self.betas(loop) == [0, 0, 1, 1, 2, 2]

    def test_several_optimisers_of_one_iteration(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            named = list(student.named_parameters())
            optimizers = [
                sgd([p for name, p in named if name.endswith(kind)]) for kind in ("weight", "bias")
            ]
            for _ in range(3):
                self.call(student, loss, seen).backward()
                for optimizer in optimizers:
                    optimizer.step()

        assert self.betas(loop) == [0, 1, 2]

    def test_a_step_without_a_call_of_the_loss(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = sgd(student.parameters())
            for _ in range(3):
                self.call(student, loss, seen).backward()
                optimizer.step()
                optimizer.step()  # of another loss, in between

        assert self.betas(loop) == [0, 1, 2]

    def test_evaluation_counts_nothing(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = sgd(student.parameters())
            for _ in range(3):
                self.call(student, loss, seen).backward()
                optimizer.step()
                with torch.no_grad():
                    loss(student(torch.randn(16, 8)))
                student.eval()
                loss(student(torch.randn(16, 8)))
                student.train()
                optimizer.step()

        assert self.betas(loop) == [0, 1, 2]

    @pytest.mark.parametrize("fused", [False, True])
    def test_steps_that_a_scaler_skips(self, fused: bool) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=Linear(1.0, warmup=100))
        optimizer = optim.SGD(student.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        moved = 0
        for step in range(6):
            before = student[0].weight.detach().clone()
            scaler.scale(loss(student(torch.randn(16, 8)))).backward()
            if step in (1, 4):
                student[0].weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved += not torch.equal(before, student[0].weight)
            assert loss.step == moved
        assert moved == 4

    def test_backward_passes_count_where_torch_has_no_optimiser(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = PlainSGD(student.parameters())
            for step in range(6):
                student.zero_grad()
                self.call(student, loss, seen).backward()
                optimizer.step()
                if step == 3:
                    state = loss.climb_state()
                    loss.load_climb_state({**state, "step": 20})  # a resume

        assert self.betas(loop) == [0, 1, 2, 3, 20, 21]

    def test_steps_on_batches_without_positives_count(self) -> None:
        student = make_student()
        loss = wrap(
            lambda z, some: z.square().mean() if some else 0 * student[0].weight.sum(),
            student=student,
            beta=Linear(1.0, warmup=10),
        )
        optimizer = sgd(student.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a batch without positives")
            for step in range(6):
                loss(student(torch.randn(4, 8)), step % 2 == 0).backward()
                optimizer.step()
                assert loss.step == step + 1

    def test_where_somebody_sets_the_step_they_do_not(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = PlainSGD(student.parameters())
            for step in range(3):
                loss.set_step(step)
                for _ in range(2):
                    (self.call(student, loss, seen) / 2).backward()
                optimizer.step()

        assert self.betas(loop) == [0, 0, 1, 1, 2, 2]

    def test_set_step_moves_the_base_of_the_count(self) -> None:
        def loop(student: nn.Module, loss: ClimbLoss, seen: list[float]) -> None:
            optimizer = sgd(student.parameters())
            for step in range(6):
                if step in (0, 3):
                    loss.set_step(10 * step)
                self.call(student, loss, seen).backward()
                optimizer.step()

        assert self.betas(loop) == [0, 1, 2, 30, 31, 32]


class TestIdle:
    """Optimiser steps that move a head while its loss adds nothing."""

    def steps(self, called: Any, student: nn.Module, count: int) -> None:
        optimizer = sgd(student.parameters())
        for _ in range(count):
            called(student(torch.randn(16, 8))).backward()
            optimizer.step()

    def test_the_plain_loss_is_called_by_mistake(self) -> None:
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        self.steps(square, student, 99)
        with pytest.warns(UserWarning, match="its loss was never called") as said:
            self.steps(square, student, 5)
        assert len(said) == 1
        assert loss.step == 0

    def test_the_model_stays_in_eval(self) -> None:
        student = make_student().eval()
        loss = wrap(square, student=student, beta=1e-3)
        self.steps(loss, student, 99)
        with pytest.warns(UserWarning, match=r"was in eval\(\)") as said:
            self.steps(loss, student, 5)
        assert len(said) == 1

    def test_nothing_is_said_of_what_is_meant(self) -> None:
        """Plain epochs between, another loss of the same head, another stage in eval()."""
        student = make_student()
        loss = wrap(square, student=student, beta=1e-3)
        self.steps(square, student, 50)
        other = ClimbLoss(square, heads=loss.heads, beta=1e-3)
        self.steps(other, student, 120)
        self.steps(square, student, 120)
        self.steps(square, student.eval(), 120)
        student.train()
        loss.heads[0].eval()  # a warm-up without noise
        self.steps(loss, student, 120)

    def test_nothing_is_said_of_samples_without_a_gradient(self) -> None:
        """A model returns the projection too, and its loss joins after a warm-up."""
        student, other = make_student(), nn.Linear(8, 3)
        loss = wrap(square, student=student, beta=1e-3)
        optimizer = sgd([*student.parameters(), *other.parameters()])
        for step in range(120):
            rows = torch.randn(16, 8)
            projected = student(rows)
            value = square(other(rows)) + (loss(projected) if step == 119 else 0)
            value.backward()
            optimizer.step()


def test_the_hook_is_gone_with_the_loss() -> None:
    from climb_plugin._run import steps

    gc.collect()
    before = len(steps._all)
    loss = ClimbLoss(square, heads=GaussianHead(4), beta=1e-3)
    assert len(steps._all) == before + 1
    del loss
    gc.collect()
    assert len(steps._all) == before


@pytest.mark.parametrize("how", ["forward", "negated", "sum"])
def test_a_criterion_that_is_negated_outside_is_noticed(how: str) -> None:
    """SimSiam's line: loss = -(criterion(p1, z2) + criterion(p2, z1)) * 0.5."""

    def similarity(p: Tensor, z: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(p, z.detach(), dim=-1).mean()

    student, predictor = make_student(), nn.Linear(4, 4)
    loss = wrap(similarity, student=student, beta=1.0)
    one, two = (student(view) for view in torch.randn(2, 16, 8))
    total = (loss(predictor(one), two) + loss(predictor(two), one)) * 0.5
    if how == "negated":
        with pytest.warns(UserWarning, match="the training maximises the rate") as said:
            (-total).backward()
        assert [warning.filename for warning in said] == [__file__]
    else:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            (total.square() if how == "sum" else total).backward()
        assert [str(w.message) for w in said] == []
