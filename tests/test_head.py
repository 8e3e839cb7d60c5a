from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin.attach import attach
from climb_plugin.gaussian import kl_to_standard_normal
from climb_plugin.graph import tied
from climb_plugin.head import TeacherHead


def rows(batch: int = 8, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


class TestPosterior:
    def test_identity_mean_at_the_start(self) -> None:
        embedding = rows()
        mean, logvar = GaussianHead(6, init_std=0.3).posterior(embedding)
        assert torch.equal(mean, embedding)
        torch.testing.assert_close(torch.exp(logvar / 2), torch.full_like(mean, 0.3))

    def test_linear_mean(self) -> None:
        head = GaussianHead(6, 3)
        assert head.mean is not None
        torch.testing.assert_close(head.posterior(rows()).mean, head.mean(rows()))
        assert head(rows()).shape == (8, 3)

    @pytest.mark.parametrize("init_std", [0.01, 0.1, 1.0])
    def test_samples_scatter_around_the_embedding_by_init_std(self, init_std: float) -> None:
        embedding = rows(20_000)
        residual = GaussianHead(6, init_std=init_std)(embedding) - embedding
        assert residual.std().item() == pytest.approx(init_std, rel=0.02)
        assert abs(residual.mean().item()) < 0.02 * init_std

    def test_every_parameter_gets_a_gradient(self) -> None:
        head = GaussianHead(6, 3)
        head(rows()).square().sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


class TestModes:
    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_eval_passes_on_the_mean_twice_the_same(self, widths: tuple[int, ...]) -> None:
        head = GaussianHead(*widths).eval()
        first, second = head(rows()), head(rows())
        assert torch.equal(first, second)
        assert torch.equal(first, head.posterior(rows()).mean)

    def test_training_samples_anew(self) -> None:
        head = GaussianHead(6)
        assert not torch.equal(head(rows()), head(rows()))

    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_teacher_passes_on_the_mean_in_training_too(self, widths: tuple[int, ...]) -> None:
        head = GaussianHead(*widths)
        teacher = head.teacher().train()
        assert isinstance(teacher, TeacherHead)
        assert torch.equal(teacher(rows()), head.posterior(rows()).mean)
        student_layout = [(name, p.shape) for name, p in head.named_parameters()]
        assert [(name, p.shape) for name, p in teacher.named_parameters()] == student_layout
        assert not any(p.requires_grad for p in teacher.parameters())
        assert {p.data_ptr() for p in teacher.parameters()}.isdisjoint(
            p.data_ptr() for p in head.parameters()
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_of_the_embedding_comes_back(self, dtype: torch.dtype) -> None:
        head = GaussianHead(6, 3).to(dtype)
        posterior = head.posterior(rows().to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {posterior.mean.dtype, posterior.logvar.dtype} == {wide}
        assert head(rows().to(dtype)).dtype == dtype
        assert head.eval()(rows().to(dtype)).dtype == dtype

    def test_statistics_leave_autocast(self) -> None:
        head = GaussianHead(6, 3)
        expected = head.posterior(rows())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = head.posterior(rows())
        assert torch.equal(inside.mean, expected.mean)
        assert torch.equal(inside.logvar, expected.logvar)


def replicated(module: nn.Module) -> nn.Module:
    """What nn.DataParallel runs on each GPU, as torch.nn.parallel.replicate makes it."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


class TestDataParallel:
    @pytest.mark.parametrize("place", ["alone", "in a model", "behind a hook"])
    def test_a_replica_does_not_train_and_says_why(self, place: str) -> None:
        model: nn.Module = GaussianHead(6)
        if place == "in a model":
            model = Net()
        elif place == "behind a hook":
            model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.LayerNorm(6))
            attach(model, at="features")
        replica = replicated(model)
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*use DistributedDataParallel"):
            replica(rows())
        (head,) = (part for part in model.modules() if isinstance(part, GaussianHead))
        assert head.noise.drawn == 0
        model(rows()).sum().backward()
        assert head.noise.drawn == 1

    @pytest.mark.parametrize("widths", [(6,), (6, 3)])
    def test_a_replica_passes_on_the_mean(self, widths: tuple[int, ...]) -> None:
        head = GaussianHead(*widths)
        mean = head.posterior(rows()).mean
        assert torch.equal(replicated(head.teacher())(rows()), mean)
        assert torch.equal(replicated(head.eval())(rows()), mean)

    def test_data_parallel_without_gpus_runs_the_model_itself(self) -> None:
        head = GaussianHead(6)
        loss = ClimbLoss(torch.mean, heads=head, beta=0.1)
        loss(nn.DataParallel(head)(rows())).backward()
        assert loss.terms.rate > 0


class TestHostRandomness:
    @pytest.mark.parametrize("make", [lambda: GaussianHead(6), lambda: GaussianHead(6).teacher()])
    def test_making_and_sampling_leave_torchs_random_numbers_alone(self, make: object) -> None:
        before = torch.get_rng_state()
        assert callable(make)
        make()(rows())
        assert torch.equal(torch.get_rng_state(), before)

    def test_seed_repeats_the_noise(self) -> None:
        draws = [GaussianHead(6, seed=seed)(rows()) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_torchs_seed_is_the_default(self) -> None:
        draws = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            draws.append(GaussianHead(6)(rows()))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_a_resumed_head_draws_what_it_would_have_drawn(self) -> None:
        head = GaussianHead(6, seed=2**64 - 1)
        head(rows())
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        expected = [head(rows()) for _ in range(3)]
        file.seek(0)
        resumed = GaussianHead(6, seed=0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for sample in expected:
            assert torch.equal(resumed(rows()), sample)

    @pytest.mark.parametrize(
        "state", [torch.zeros(3).long(), torch.zeros(4), torch.tensor(5), b"half a", None]
    )
    def test_another_state_is_refused(self, state: Any) -> None:
        head = GaussianHead(6, seed=2)
        full = {**head.state_dict(), "_extra_state": state}
        with pytest.raises(ValueError, match=r"noise is four int64 numbers, got .*damaged"):
            head.load_state_dict(full)
        assert (head.noise.seed, head.noise.drawn) == (2, 0)


class TestWhatIsRemembered:
    def test_found_from_what_depends_on_the_sample(self) -> None:
        head = GaussianHead(6)
        first, second = head(rows(seed=1)), head(rows(seed=2))
        (record,) = tied(second.square().mean())
        assert record.head is head
        assert torch.equal(record.posterior.mean, rows(seed=2))
        assert len(tied(first.sum() + second.sum())) == 2
        assert tied(first.detach().sum()) == []

    def test_an_unused_forward_leaves_nothing_behind(self) -> None:
        head = GaussianHead(6)
        sample = head(rows())
        mean = weakref.ref(tied(sample.sum())[0].posterior.logvar)
        assert mean() is not None
        del sample
        gc.collect()
        assert mean() is None

    def test_no_record_without_gradients(self) -> None:
        head = GaussianHead(6)
        with torch.no_grad():
            assert tied(head(rows()).sum()) == []

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_work_after_a_step(self, how: object) -> None:
        head = GaussianHead(6)
        head(rows()).sum().backward()
        assert callable(how)
        twin = how(head)
        assert torch.equal(twin(rows()), head(rows()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.head = GaussianHead(6, 5, seed=1)
        self.last = nn.Linear(5, 3)

    def forward(self, views: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.head(self.first(views))))
        return out


class TestCheckpointing:
    def test_counts_once_and_gives_the_gradient_of_the_plain_run(self) -> None:
        torch.manual_seed(0)
        plain = Net()
        replayed = copy.deepcopy(plain)
        values = []
        for net, again in ((plain, False), (replayed, True)):
            loss = ClimbLoss(lambda a, b: (a - b).square().mean(), heads=net.head, beta=0.1)
            outputs = [
                checkpoint(net, rows(seed=s), use_reentrant=False) if again else net(rows(seed=s))
                for s in (1, 2)
            ]
            loss(*outputs).backward()
            values.append([*loss.terms, *[p.grad for p in net.parameters()]])
        for expected, value in zip(*values, strict=True):
            assert torch.equal(expected, value)

    def test_nothing_leaks_into_the_next_step(self) -> None:
        net = Net()
        loss = ClimbLoss(lambda out: out.square().mean(), heads=net.head, beta=0.1)
        for seed in range(3):
            loss(checkpoint(net, rows(seed=seed), use_reentrant=False)).backward()
            expected = kl_to_standard_normal(*net.head.posterior(net.first(rows(seed=seed))))
            torch.testing.assert_close(loss.terms.rate, expected.mean())

    def test_another_embedding_the_second_time_is_an_error(self) -> None:
        net = Net()
        noise = iter([0.0, 1.0])

        def unstable(views: Tensor) -> Tensor:
            return net(views + next(noise))

        out = checkpoint(unstable, rows(), use_reentrant=False)
        with pytest.raises(RuntimeError, match="another embedding than the first time"):
            out.sum().backward()


class TestWrongInput:
    @pytest.mark.parametrize("width", [0, -1, 2.5, "8"])
    def test_width(self, width: object) -> None:
        with pytest.raises(ValueError, match="in_features must be a positive integer"):
            GaussianHead(width)  # type: ignore[arg-type]

    @pytest.mark.parametrize("init_std", [0.0, -1.0, float("nan"), float("inf")])
    def test_init_std(self, init_std: float) -> None:
        with pytest.raises(ValueError, match="init_std must be a positive number"):
            GaussianHead(6, init_std=init_std)

    def test_init_std_out_of_bounds(self) -> None:
        with pytest.raises(ValueError, match=r"between 4\.5e-05 and 148, .* got 1e-06"):
            GaussianHead(6, init_std=1e-6)

    def test_integers(self) -> None:
        with pytest.raises(TypeError, match=r"floating-point embeddings, got torch\.int64"):
            GaussianHead(6)(torch.zeros(4, 6, dtype=torch.int64))

    @pytest.mark.parametrize("shape", [(4, 5), (6,), (2, 6, 4)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"\(\.\.\., B, 6\), got"):
            GaussianHead(6)(torch.zeros(shape))

    def test_empty_batch(self) -> None:
        with pytest.raises(ValueError, match=r"empty batch, got shape \(0, 6\)"):
            GaussianHead(6)(torch.zeros(0, 6))
        assert GaussianHead(6).eval()(torch.zeros(0, 6)).shape == (0, 6)


def test_checkpointed_calls_of_one_embedding_repeat_each_its_own_noise() -> None:
    def gradient(call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        head = GaussianHead(4, seed=0)
        view = torch.ones(2, 4, requires_grad=True)
        one, two = call(head, view), call(head, view)
        (one + 2 * two).square().sum().backward()
        grad = head.logvar.bias.grad
        assert grad is not None
        return grad

    again = gradient(lambda head, view: checkpoint(head, view, use_reentrant=False))
    torch.testing.assert_close(again, gradient(lambda head, view: head(view)))
