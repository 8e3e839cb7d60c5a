"""The outer ring may only warn, raise or count: without it every number is the same, to the bit."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import climb_plugin
from climb_plugin import ClimbLoss, wrap
from climb_plugin import climb as engine
from climb_plugin._run.watch import Watch

PACKAGE = Path(climb_plugin.__file__).parent
PUBLIC_OF_WATCH = {name for name in vars(Watch) if not name.startswith("_")}


class Nobody:
    """Looks on at nothing, and counts no step."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nesting = contextlib.nullcontext()
        self.steps = SimpleNamespace(count=0)

    def ignore(self, *_: Any, **__: Any) -> None:
        pass

    found = begins = terms = trains = ignore


def distance(*views: Tensor) -> Tensor:
    return torch.stack([(view - views[0].detach()).square().mean() for view in views]).mean()


def student(normalised: bool = False) -> nn.Sequential:
    end = [nn.BatchNorm1d(6)] if normalised else []
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), *end)


Call = Callable[[nn.Module, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "called": lambda net, view: net(view),
    "checkpointed": lambda net, view: checkpoint(net, view, use_reentrant=False),
    "compiled": lambda net, view: torch.compile(net, backend="aot_eager")(view),
    "autocast": lambda net, view: autocast(net, view),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "learned": {"prior": "learned"},
    "view": {"prior": "view"},
    "backward": {"prior": "backward"},
    "alpha": {"alpha": 0.5},
    "free nats": {"free_nats": 3.0},
    "features": {"at": "features"},
}


def autocast(net: nn.Module, view: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(view)


def numbers(call: Call, options: dict[str, Any], *, steps: int = 3) -> list[Tensor]:
    """Terms, gradients and weights of a training."""
    torch.manual_seed(0)
    net = student(normalised=True)
    teacher = copy.deepcopy(net)
    criterion = wrap(distance, student=net, teacher=teacher, beta=0.1, **options)
    optimizer = torch.optim.SGD([*net.parameters(), *criterion.parameters()], lr=0.1)
    found: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(torch.randn(5, 8))
        loss = criterion(target, *(call(net, torch.randn(5, 8)) for _ in range(2)))
        loss.backward()
        optimizer.step()
        found += [*criterion.terms, *(p.grad.clone() for p in net.parameters() if p.requires_grad)]
    return [*found, *net.parameters(), *criterion.parameters(), torch.get_rng_state()]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_numbers_are_the_same_without_the_outer_ring(
    call: Call, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = numbers(call, options)
    monkeypatch.setattr(engine, "Watch", Nobody)
    alone = numbers(call, options)
    assert len(watched) == len(alone)
    for one, two in zip(watched, alone, strict=True):
        assert torch.equal(one, two) or (one.isnan().all() and two.isnan().all())


def test_the_stand_in_leaves_nothing_out() -> None:
    assert set(vars(Nobody)) >= PUBLIC_OF_WATCH
    loss = ClimbLoss(distance, heads=(), beta=0.0)
    assert {"nesting", "steps"} == {n for n in vars(loss.climb.watch) if not n.startswith("_")}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, but for types."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {
        f"{n.module}.{alias.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module
        for alias in n.names
    }
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    known = set(MODULES)
    return {name for name in names if name in known}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["climb_plugin", *(part for part in parts if part != "__init__")])


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
INNER = {"gaussian", "prior", "head", "affine", "_graph", "_torch", "checks", "distributed"}
MAY_USE_RUN = {"climb", "attach", "_run"}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def test_arrows_run_one_way() -> None:
    arrows = {name: imports(path) for name, path in MODULES.items()}
    assert "climb_plugin._run.watch" in arrows["climb_plugin.climb"]
    for name, targets in arrows.items():
        for target in targets:
            outer = room(target) == "_run" and room(name) not in MAY_USE_RUN
            assert not outer, f"{name} may not know {target}"
            inwards = room(name) in INNER and room(target) not in INNER
            assert not inwards, f"{name} is inside of {target}"
            underscore = room(name) == "adapters" and room(target).startswith("_")
            assert not underscore, f"{name} may not know {target}"
            foreign = room(name) != "adapters" and room(target) == "adapters"
            assert not foreign, f"{name} may not know {target}"


def test_no_imports_run_in_a_circle() -> None:
    left = {
        name: {target for target in imports(path) if target != name and name != "climb_plugin"}
        for name, path in MODULES.items()
    }
    while left:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        assert free, f"these import each other: {left}"
        left = {name: targets for name, targets in left.items() if name not in free}
