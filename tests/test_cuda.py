"""A head on a GPU: compiled into CUDA graphs, captured by hand, and noise drawn on the device.

A CPU runs what has no capture and no replay in it; ``pytest -m cuda`` chooses what needs a GPU.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from climb_plugin import ClimbLoss, GaussianHead

WIDTH = 16
STEPS = 5  # torch's CUDA graphs are recorded in the second step, and replayed from then on


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def spread(*views: Tensor) -> Tensor:
    """Stands for a loss: depends on every view."""
    return torch.stack([view.square().mean() for view in views]).sum()


class Net(nn.Module):
    """A head between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = GaussianHead(WIDTH)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, view: Tensor) -> Tensor:
        out: Tensor = self.last(self.head(self.first(view).relu()))
        return out


def make(device: torch.device) -> tuple[Net, ClimbLoss]:
    torch.manual_seed(0)
    net = Net().to(device)
    return net, ClimbLoss(spread, heads=net.head, beta=0.1)


# Compilers warn of what they do not use, differently in each version.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # Code that inductor compiles for a CPU flushes subnormal numbers to 0 in the whole process
        # (torch 2.5), which hypothesis refuses in later tests.
        ("cpu", {"backend": "aot_eager"}),
        pytest.param("cuda", {"mode": "reduce-overhead"}, marks=pytest.mark.cuda),
        pytest.param("cuda", {"mode": "max-autotune"}, marks=pytest.mark.cuda),
    ],
)
def test_no_two_calls_of_a_compiled_model_share_noise(
    kind: str, options: dict[str, str], views: int
) -> None:
    """With the same weights and the same batch in each step, only the noise differs."""
    device = torch.device(kind)
    net, loss = make(device)
    model = torch.compile(net, **options)
    batch = torch.randn(8, WIDTH, device=device)
    expected = ClimbLoss(spread, heads=net.head, beta=0.1)
    expected(net(batch)).backward()
    samples: list[Tensor] = []
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        net.zero_grad()
        outputs = [model(batch) for _ in range(views)]
        samples += [output.detach().clone() for output in outputs]
        loss(*outputs).backward()
        torch.testing.assert_close(loss.terms.rate, expected.terms.rate, rtol=1e-3, atol=1e-4)
        assert all(parameter.grad is not None for parameter in net.parameters())
    assert len(samples) == STEPS * views
    for one, two in itertools.combinations(samples, 2):
        assert not torch.equal(one, two)


@pytest.mark.cuda
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_compiled_model_in_evaluation_repeats_the_mean(mode: str) -> None:
    device = torch.device("cuda")
    net, _ = make(device)
    model = torch.compile(net.eval(), mode=mode)
    batch = torch.randn(8, WIDTH, device=device)
    with torch.no_grad():
        seen = [model(batch).clone() for _ in range(STEPS)]
        expected = net(batch)
    for output in seen:
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-3)  # of TF32


CAPTURED = {"cpu": "no capture on a CPU", "cuda": "refused"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_captured_graph_refuses_a_head_that_trains(device: str) -> None:
    """A replay would repeat the noise. In a process of its own: a failed capture may break CUDA."""
    done = subprocess.run(
        [sys.executable, __file__, device],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, CAPTURED[device]), done.stderr


@pytest.mark.cuda
def test_a_captured_graph_replays_a_head_in_evaluation() -> None:
    device = torch.device("cuda")
    net, _ = make(device)
    net.eval()
    batch = torch.randn(8, WIDTH, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmed_up(lambda: net(batch))
        with torch.cuda.graph(graph):
            output = net(batch)
        batch.copy_(torch.randn(8, WIDTH, device=device))
        graph.replay()
        torch.testing.assert_close(output, net(batch))


def test_noise_follows_torchs_seed_and_moves_no_random_numbers(device: torch.device) -> None:
    def state() -> Tensor:
        return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()

    def drawn() -> list[Tensor]:
        net, _ = make(device)
        batch = torch.ones(8, WIDTH, device=device)
        torch.manual_seed(1)
        before = state()
        outputs = [net(batch).detach() for _ in range(3)]
        assert torch.equal(state(), before)
        return outputs

    first, again = drawn(), drawn()
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    for one, two in itertools.combinations(first, 2):
        assert not torch.equal(one, two)


def warmed_up(call: object) -> None:
    """Before a capture, a call on another stream, as torch's documentation asks for."""
    assert callable(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def capture(device: str) -> str:
    """Tries to capture a training step; without CUDA, takes the step only."""
    net, loss = make(torch.device(device))
    batch = torch.randn(8, WIDTH, device=device)

    def step() -> None:
        net.zero_grad(set_to_none=False)
        loss(net(batch)).backward()

    if device == "cpu":
        step()
        return CAPTURED["cpu"]
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return "refused"
    return "captured: a replay repeats the noise"


if __name__ == "__main__":
    print(capture(sys.argv[1]), flush=True)
    os._exit(0)  # a failed capture may break the end of the process, too
