"""Rule 3: all posteriors of its heads that the value depends on count, and no others."""

from __future__ import annotations

import copy
import gc
import io
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from toys import mlp, rates_of, square

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin._graph.sample import alive
from climb_plugin._graph.walk import foreign_samples_behind, leaves_behind, samples_behind


class TestWhatCounts:
    def test_a_head_behind_another_that_is_also_used_directly(self) -> None:
        one, two, between = GaussianHead(6), GaussianHead(6), nn.Linear(6, 6)
        views = torch.randn(8, 6), 3 * torch.randn(8, 6)
        loss = ClimbLoss(F.mse_loss, heads=[one, two], beta=1e-3)
        projected = between(one(views[0]))
        loss(two(projected), one(views[1]))
        expected = rates_of(one, *views).mean() + rates_of(two, projected).mean()
        torch.testing.assert_close(loss.terms.rate, expected)

    @pytest.mark.parametrize("detached_after", [None, 0, 1, 3])
    def test_a_rollout(self, detached_after: int | None) -> None:
        cell, head = nn.Linear(6, 6), GaussianHead(6)
        loss = ClimbLoss(square, heads=head, beta=1e-3)
        state, seen = 8 * torch.randn(8, 6), []
        for step in range(5):
            embedding = cell(state)
            seen.append(embedding)
            state = head(embedding)
            if step == detached_after:
                state, seen = state.detach(), []
        loss(state)
        torch.testing.assert_close(loss.terms.rate, rates_of(head, *seen).mean())

    def test_a_head_of_another_loss_in_between(self) -> None:
        one, two, layer = GaussianHead(6), GaussianHead(6), nn.Linear(6, 6)
        losses = [ClimbLoss(square, heads=head, beta=1e-3) for head in (one, two)]
        first = 4 * torch.randn(8, 6)
        middle = layer(one(first))
        sample = two(middle)
        last = layer(sample)
        losses[0](one(last))
        losses[1](sample)
        torch.testing.assert_close(losses[0].terms.rate, rates_of(one, first, last).mean())
        torch.testing.assert_close(losses[1].terms.rate, rates_of(two, middle).mean())

    def test_two_losses_on_one_head_each_count_their_own_samples(self) -> None:
        """DINOv2: class tokens and patches share a head."""
        student = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))
        first = wrap(F.mse_loss, student=student, beta=1e-2)
        second = ClimbLoss(F.l1_loss, heads=first.heads, beta=1e-1)
        views = torch.randn(2, 8, 6)
        means = [student.eval()(rows) for rows in views]
        student.train()
        samples = [student(rows) for rows in views]
        total = first(samples[0], torch.zeros(8, 4)) + second(samples[1], torch.zeros(8, 4))
        (head,) = first.heads
        expected = [rates_of(head, mean).mean() for mean in means]
        torch.testing.assert_close(first.terms.rate, expected[0])
        torch.testing.assert_close(second.terms.rate, expected[1])
        value = first.terms.base + second.terms.base + 1e-2 * expected[0] + 1e-1 * expected[1]
        torch.testing.assert_close(total.detach(), value)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Everything(torch.autograd.Function):
    """Stands for a gather over ranks: other rows come in, the gradient of its own goes out."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return torch.cat([torch.randn_like(local), local])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(2)[1]


def scripted(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(1).mean()


def in_place(one: Tensor, two: Tensor) -> Tensor:
    for z in (one, two):
        z.div_(z.detach().norm(dim=-1, keepdim=True)).relu_()
    return F.mse_loss(one, two)


def queued() -> Callable[[Tensor, Tensor], Tensor]:
    queue: list[Tensor] = []

    def loss(one: Tensor, two: Tensor) -> Tensor:
        queue.append(one.detach())
        return F.cross_entropy(one @ torch.cat([two, *queue]).T, torch.arange(len(one)))

    return loss


def in_a_thread(one: Tensor, two: Tensor) -> Tensor:
    out: list[Tensor] = []
    thread = threading.Thread(target=lambda: out.append(F.mse_loss(one, two)))
    thread.start()
    thread.join()
    return out[0]


BETWEEN: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "gradient reversal": lambda: lambda a, b: F.mse_loss(Reverse.apply(a), Reverse.apply(b)),
    "gather": lambda: lambda a, b: F.mse_loss(Everything.apply(a), Everything.apply(b)),
    "gather without gradients": lambda: (
        lambda a, b: F.mse_loss(torch.cat([a.detach(), a]), torch.cat([b.detach(), b]))
    ),
    "straight-through": lambda: lambda a, b: F.mse_loss(a + (a.round() - a).detach(), b),
    "in place": lambda: in_place,
    "queue": queued,
    "script": lambda: torch.jit.script(scripted),
    "vmap": lambda: lambda a, b: vmap(lambda u, v: (u - v).square().sum())(a, b).mean(),
    "a sum over a list": lambda: lambda a, b: sum(z.square().mean() for z in (a, b)) / 2,
    "a thread": lambda: in_a_thread,
    "half precision": lambda: lambda a, b: (a.bfloat16() - b.bfloat16()).square().mean().float(),
    "one element": lambda: lambda a, b: F.mse_loss(a, b).reshape(1),
}


@pytest.mark.parametrize("make", BETWEEN.values(), ids=BETWEEN)
def test_what_lies_between_head_and_loss(make: Callable[[], Any]) -> None:
    layer, head = nn.Linear(6, 6), GaussianHead(6)
    loss = ClimbLoss(make(), heads=head, beta=1e-2)
    for _ in range(3):
        embeddings = [layer(torch.randn(8, 6)), layer(3 * torch.randn(8, 6))]
        loss(*(head(embedding) for embedding in embeddings)).backward()
        torch.testing.assert_close(loss.terms.rate, rates_of(head, *embeddings).mean())


@pytest.mark.parametrize("drawn_in_thread", [[True, True], [True, False], [False, True]])
def test_heads_that_are_called_in_other_threads(drawn_in_thread: list[bool]) -> None:
    """Each thread numbers its nodes by itself."""
    layer, head = nn.Linear(6, 6), GaussianHead(6)
    loss = ClimbLoss(F.mse_loss, heads=head, beta=1e-2)
    embeddings = [layer(view) for view in torch.randn(2, 8, 6)]
    samples: dict[int, Tensor] = {}
    for index, in_thread in enumerate(drawn_in_thread):

        def draw(index: int = index) -> None:
            samples[index] = head(embeddings[index])

        if in_thread:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        else:
            draw()
    loss(samples[0], samples[1]).backward()
    torch.testing.assert_close(loss.terms.rate, rates_of(head, *embeddings).mean())


class TestWalk:
    def test_it_finds_samples_in_the_order_of_their_draws(self) -> None:
        head, other = GaussianHead(6), GaussianHead(6)
        samples = [head(view) for view in torch.randn(3, 8, 6)]
        stranger = other(torch.randn(8, 6))
        value = torch.stack([samples[2].sum(), samples[0].sum(), stranger.sum()]).sum()
        found = samples_behind(value, {head})
        assert [one.number for one in found] == sorted(one.number for one in found)
        assert len(found) == 2
        assert [one.head for one in foreign_samples_behind(value, {head})] == [other]
        assert samples_behind(value.detach(), {head}) == []
        assert samples_behind(samples[1].sum(), {other}) == []

    def test_it_equals_a_whole_search(self) -> None:
        """Random graphs: what an exhaustive search finds, the pruned one finds."""
        generator = torch.Generator().manual_seed(0)
        heads = [GaussianHead(4) for _ in range(3)]
        for _ in range(30):
            pool = [torch.randn(2, 4, requires_grad=True)]
            for _ in range(20):
                pick = int(torch.randint(len(pool), (1,), generator=generator))
                what = int(torch.randint(5, (1,), generator=generator))
                if what < 3:
                    pool.append(heads[what](pool[pick]))
                elif what == 3:
                    pool.append(pool[pick].tanh() + pool[-1])
                else:
                    pool.append(pool[pick].detach() + 0 * pool[0])
            chosen = set(heads[:2])
            expected = set()
            nodes, seen = [pool[-1].grad_fn], set()
            while nodes:
                node = nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                sample = getattr(node, "climb_sample", None)
                expected |= {sample} if sample is not None and sample.head in chosen else set()
                nodes += [parent for parent, _ in node.next_functions]
            assert set(samples_behind(pool[-1], chosen)) == expected

    def test_leaves_are_those_of_a_backward_pass(self) -> None:
        layer, head = nn.Linear(6, 6), GaussianHead(6)
        unused = nn.Linear(6, 6)
        value = head(layer(torch.randn(8, 6))).sum() + 0 * unused.bias.detach().sum()
        found = leaves_behind(value)
        assert found == {id(p) for p in [*layer.parameters(), *head.parameters()]}


class TestLife:
    def test_kept_losses_keep_no_tensor_of_the_size_of_the_embedding(self) -> None:
        shape = (256, 64)

        def alive_after_steps(with_climb: bool) -> int:
            head = GaussianHead(64) if with_climb else nn.Identity()
            net = nn.Sequential(nn.Linear(64, 64), head, nn.Linear(64, 64))
            loss = ClimbLoss(square, heads=head, beta=1e-2) if with_climb else square
            kept = []
            for _ in range(20):
                total = loss(net(torch.randn(shape)))
                total.backward()
                kept.append(total)
            gc.collect()
            tensors = [item for item in gc.get_objects() if type(item) is Tensor]
            return sum(tensor.shape == shape for tensor in tensors)

        assert alive_after_steps(True) <= alive_after_steps(False)

    def test_a_posterior_lives_as_long_as_its_graph(self) -> None:
        head = GaussianHead(6)
        sample = head(torch.randn(8, 6))
        (one,) = samples_behind(sample, {head})
        assert one.posterior is not None
        posterior = weakref.ref(one.posterior.logvar)
        del one
        assert posterior() is not None
        total = sample.sum()
        total.backward(retain_graph=True)
        assert posterior() is not None
        total.backward()
        assert posterior() is None
        assert list(alive({head})) == []

    def test_a_loss_after_the_graph_was_freed_says_so(self) -> None:
        head = GaussianHead(6)
        loss = ClimbLoss(square, heads=head, beta=1e-3)
        sample = head(torch.randn(8, 6))
        sample.sum().backward()
        with pytest.raises(RuntimeError, match=r"posterior .* is gone.*retain_graph=True"):
            loss(sample)

    def test_an_embedding_that_was_changed_in_place_says_so(self) -> None:
        head = GaussianHead(6)
        loss = ClimbLoss(square, heads=head, beta=1e-3)
        embedding = nn.Linear(6, 6)(torch.randn(8, 6))
        sample = head(embedding)
        embedding.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place after its GaussianHead"):
            loss(sample)

    def test_a_second_loss_where_the_graph_is_kept(self) -> None:
        head = GaussianHead(6)
        first, second = (ClimbLoss(square, heads=head, beta=beta) for beta in (0.1, 0.2))
        sample = head(torch.randn(8, 6))
        first(sample).backward(retain_graph=True)
        second(sample).backward()
        assert torch.equal(first.terms.rate, second.terms.rate)


class TestHigherOrder:
    def test_a_gradient_penalty(self) -> None:
        """The gradient of the squared gradient, against finite differences in float64."""
        head = GaussianHead(4).double()
        # Each call has noise of its own, so the value must not depend on it.
        loss = ClimbLoss(lambda z: 0 * z.sum(), heads=head, beta=0.5)
        rows = torch.randn(3, 4, dtype=torch.float64)

        def penalty(bias: Tensor) -> Tensor:
            total = loss(functional_call(head, {"logvar.bias": bias}, (rows,)))
            (gradient,) = torch.autograd.grad(total, bias, create_graph=True)
            return gradient.square().sum()

        bias = head.logvar.bias.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(penalty, (bias,))

    def test_batched_gradients(self) -> None:
        head = GaussianHead(4)
        loss = ClimbLoss(lambda z: z.square().mean(), heads=head, beta=0.1)
        rows = torch.randn(6, 4, requires_grad=True)
        total = torch.stack([loss(head(rows)), 2 * loss(head(rows))])
        (batched,) = torch.autograd.grad(
            total, rows, torch.eye(2), is_grads_batched=True, retain_graph=True
        )
        for one, row in zip(batched, torch.eye(2), strict=True):
            (expected,) = torch.autograd.grad(total, rows, row, retain_graph=True)
            torch.testing.assert_close(one, expected)

    def test_func_grad_equals_backward_and_leaves_plain_terms(self) -> None:
        head = GaussianHead(6)
        net = nn.Sequential(nn.Linear(6, 6), head)
        loss = ClimbLoss(F.mse_loss, heads=head, beta=1e-2)
        views, target = torch.randn(2, 8, 6)
        weights = dict(net.named_parameters())
        GaussianHead(1)  # begins the noise anew
        gradients = grad(lambda w: loss(functional_call(net, w, views), target))(weights)
        copy.deepcopy(loss)
        torch.save(loss, io.BytesIO())
        terms = torch.stack(list(loss.terms[:4])).numpy()
        GaussianHead(1)
        loss(net(views), target).backward()
        assert (terms == torch.stack(list(loss.terms[:4])).numpy()).all()
        for name, parameter in weights.items():
            torch.testing.assert_close(gradients[name], parameter.grad)

    @pytest.mark.parametrize("way", ["loss", "head and loss", "grad of the loss"])
    def test_vmap_is_refused_in_a_sentence(self, way: str) -> None:
        head = mlp(8, 16, 4)
        loss = wrap(F.mse_loss, student=head, beta=1e-3)
        rows, target = torch.randn(3, 5, 8), torch.randn(3, 5, 4)
        weights = {name: p.detach() for name, p in head.named_parameters()}

        def of_weights(weights: dict[str, Tensor], rows: Tensor, target: Tensor) -> Tensor:
            return loss(functional_call(head, weights, (rows,)), target)

        ways: dict[str, Callable[[], object]] = {
            "loss": lambda: vmap(loss)(head(rows), target),
            "head and loss": lambda: vmap(lambda a, b: loss(head(a), b), randomness="different")(
                rows, target
            ),
            "grad of the loss": lambda: vmap(
                grad(of_weights), in_dims=(None, 0, 0), randomness="different"
            )(weights, rows, target),
        }
        with pytest.raises(RuntimeError, match=r"(GaussianHead|ClimbLoss).* under torch\.vmap"):
            ways[way]()
        loss(head(rows[0]), target[0]).backward()
        assert loss.terms.rate > 0

    def test_forward_mode_alone_is_refused_in_a_sentence(self) -> None:
        head = GaussianHead(4)
        loss = ClimbLoss(square, heads=head, beta=0.1)
        rows = torch.randn(6, 4)
        with pytest.raises(RuntimeError, match="Forward-mode differentiation alone has no samples"):
            torch.func.jvp(lambda x: loss(head(x)), (rows,), (rows,))


class TestMissing:
    """The message says which of the reasons it is."""

    target = torch.zeros(6, 4)
    scale = torch.ones((), requires_grad=True)

    @pytest.mark.parametrize(
        ("output", "said"),
        [
            (lambda _, rows: nn.Linear(8, 4)(rows), "it was not called since the loss before"),
            (
                lambda student, rows: TestMissing.scale * torch.no_grad()(student)(rows),
                r"called under torch\.no_grad\(\)",
            ),
            (lambda student, rows: copy.deepcopy(student)(rows), "copy both together"),
        ],
        ids=["not called", "under no_grad", "of a copy"],
    )
    def test_the_message_says_why(self, output: Callable[..., Tensor], said: str) -> None:
        student = mlp(8, 8, 4)
        loss = wrap(F.mse_loss, student=student, beta=1e-3)
        with pytest.raises(RuntimeError, match=r"no sample of heads\[0\]") as error:
            loss(output(student, torch.randn(6, 8)), self.target)
        assert re.search(said, str(error.value))
        assert "criterion.base(...)" in str(error.value)

    def test_a_look_at_a_model_without_gradients_is_the_base_loss(self) -> None:
        """In train(): the model ran under no_grad(), and the criterion does not."""
        student, rows = mlp(8, 8, 4), torch.randn(6, 8)
        loss = wrap(F.mse_loss, student=student, beta=1e-3)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        with torch.no_grad():
            output = student(rows)
        for _ in range(2):  # what was embedded once is looked at again
            assert torch.equal(loss(output, self.target), F.mse_loss(output, self.target))
            assert torch.isnan(loss.terms.rate)
        student(rows).mean().backward()
        optimizer.step()
        assert loss.step == 0  # a look begins no step

    def test_forward_called_directly(self) -> None:
        """Of a head that hangs on the module itself."""

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) + 1

        student = Own()
        loss = wrap(F.mse_loss, student=student, beta=1e-3)
        with pytest.raises(RuntimeError, match=r"module\.forward\(x\) skips it"):
            loss(student.forward(torch.randn(6, 8)), self.target)

    def test_a_sample_that_lives_and_does_not_reach_the_loss(self) -> None:
        student = mlp(8, 8, 4)
        loss = wrap(F.mse_loss, student=student, beta=1e-3)
        kept = student(torch.randn(6, 8))
        with pytest.raises(RuntimeError, match=r"no sample of heads\[0\].*does not reach the loss"):
            loss(self.scale * kept.detach(), self.target)

    def test_a_head_whose_module_is_no_longer_there(self) -> None:
        """It went into eval() with the model, and did not come back with it."""
        model = nn.ModuleDict({"fc": mlp(8, 8, 4)})
        loss = wrap(F.mse_loss, student=model["fc"], beta=1e-3)
        rows = torch.randn(6, 8)
        loss(model["fc"](rows), self.target).backward()
        model.eval()
        with torch.no_grad():
            loss(model["fc"](rows), self.target)
        loss(model["fc"](rows), self.target).backward()
        model["fc"] = nn.Linear(8, 4)
        model.train()
        with pytest.warns(UserWarning, match=r"in eval\(\) and was not called") as said:
            loss(model["fc"](rows), self.target).backward()
        assert [warning.filename for warning in said] == [__file__]

    def test_the_teacher_alone(self) -> None:
        """As lightly's CAPI trains its teacher's head; base is the way."""
        student, teacher = nn.Linear(8, 4), nn.Linear(8, 4)
        loss = wrap(F.mse_loss, student=student, beta=1e-3)
        rows = torch.randn(6, 8)
        loss(student(rows), teacher(rows))
        with pytest.raises(RuntimeError, match=r"\(a teacher's outputs\), call criterion\.base"):
            loss(teacher(rows), teacher(rows + 1))
        value = loss.base(teacher(rows), teacher(rows + 1))
        assert torch.equal(value, F.mse_loss(teacher(rows), teacher(rows + 1)))
