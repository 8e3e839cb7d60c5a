"""Every private name of torch that is used, in one test each: what it says is what it does."""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import climb_plugin
from climb_plugin import _torch

PACKAGE = Path(climb_plugin.__file__).parent
FUNCTIONS = {
    name
    for name, item in inspect.getmembers(_torch, inspect.isfunction)
    if item.__module__ == _torch.__name__ and not name.startswith("_")
}
TESTED: set[str] = set()


def tests(*names: str) -> None:
    assert set(names) <= FUNCTIONS
    TESTED.update(names)


def leaf() -> Tensor:
    return torch.ones(3, requires_grad=True)


def test_graphs() -> None:
    tests("backward_pass", "graph_is_kept", "sequence_number")
    seen = []
    value = leaf() * 2
    value.register_hook(lambda _: seen.append((_torch.backward_pass(), _torch.graph_is_kept())))
    assert _torch.backward_pass() is None
    value.sum().backward(retain_graph=True)
    value.sum().backward()
    (first, kept), (second, freed) = seen
    assert first is not None
    assert first != second
    assert (kept, freed) == (True, False)
    older, younger = leaf() * 2, leaf() * 2
    assert _torch.sequence_number(older.grad_fn) < _torch.sequence_number(younger.grad_fn)
    accumulate = older.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert _torch.sequence_number(accumulate) == 2**64 - 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_the_forward_of_a_function() -> None:
    tests("in_function_forward")
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_torch.in_function_forward())
        return x * 2

    checkpoint(look, leaf(), use_reentrant=True)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            look(torch.ones(3))
    assert seen == [True, False, False, False]


def test_transforms() -> None:
    tests("transforms_active", "without_transforms", "is_batched", "plain")
    seen = []

    def look(x: Tensor) -> Tensor:
        with _torch.without_transforms():
            made = torch.zeros(())
        seen.append(
            (
                _torch.transforms_active(),
                _torch.is_batched(x),
                torch._C._functorch.is_functorch_wrapped_tensor(made),
                torch._C._functorch.is_functorch_wrapped_tensor(_torch.plain(x)),
            )
        )
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert [active for active, *_ in seen] == [False, True, True, True, True]
    assert [batched for _, batched, *_ in seen] == [False, False, True, True, False]
    assert not any(wrapped for *_, made, below in seen for wrapped in (made, below))


def test_batches_of_gradients() -> None:
    tests("is_batch_of_gradients")
    seen: list[bool] = []
    point = leaf()
    value = point * 2
    value.register_hook(lambda g: seen.append(_torch.is_batch_of_gradients(g)))
    torch.autograd.grad(value, point, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(value.sum(), point)
    assert seen == [True, False]
    assert not torch.func.vmap(lambda x: x * 0 + _torch.is_batch_of_gradients(x))(leaf()).any()


def test_modes() -> None:
    tests("without_modes")
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    point = torch.ones(3)
    with Watch():  # type: ignore[no-untyped-call]
        point.exp()
        with _torch.without_modes():
            point.sin()
        point.cos()
    assert seen == ["exp", "cos"]


def test_modules() -> None:
    tests("is_compiled", "is_compiled_in_place", "is_replica")
    layer = nn.Linear(2, 2)
    assert not _torch.is_compiled(layer)
    assert not _torch.is_compiled_in_place(layer)
    assert not _torch.is_replica(layer)
    assert _torch.is_compiled(torch.compile(layer, backend="eager"))
    assert _torch.is_replica(layer._replicate_for_data_parallel())
    layer.compile(backend="eager")
    assert _torch.is_compiled_in_place(layer)


def test_hooks() -> None:
    tests("has_hook", "without_hooks", "no_global_hooks")
    layer, seen = nn.Linear(2, 2), []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("own")),
        layer.register_forward_pre_hook(lambda *_: seen.append("own")),
    ]
    everywhere = [
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global")),
        nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append("global")),
    ]
    assert all(_torch.has_hook(layer, handle.id) for handle in handles)
    assert not _torch.has_hook(nn.Linear(2, 2), handles[0].id)
    with _torch.no_global_hooks():
        layer(torch.ones(1, 2))
    assert seen == ["own", "own"]
    layer(torch.ones(1, 2))
    assert seen.count("global") == 2
    for handle in everywhere:
        handle.remove()
    twin = copy.deepcopy(layer, _torch.without_hooks(layer))
    seen.clear()
    twin(torch.ones(1, 2))
    assert seen == []
    assert not any(_torch.has_hook(twin, handle.id) for handle in handles)
    assert all(_torch.has_hook(layer, handle.id) for handle in handles)


def test_versions() -> None:
    tests("version")
    one = torch.ones(3)
    before = _torch.version(one)
    one.sin()
    assert _torch.version(one) == before
    one.sin_()
    assert _torch.version(one) > before


def test_joining() -> None:
    """Real processes join in test_distributed.py."""
    tests("joins")
    assert not _torch.joins(nn.Linear(2, 2))


def test_averaging() -> None:
    """DistributedDataParallel goes on with the parameters that it was built with."""
    tests("averaged_in")
    layer = nn.Linear(2, 2)
    assert _torch.averaged_in(layer, {1}) == {1}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(layer)
    finally:
        dist.destroy_process_group()
    before = {id(parameter) for parameter in layer.parameters()}
    layer.late = nn.Linear(2, 2)
    assert _torch.averaged_in(wrapper, set()) == before


def test_all_functions_are_tested() -> None:
    assert FUNCTIONS == TESTED


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_torch.py" or "adapters" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names = dotted(node)
                assert names[0] != "torch" or not any(map(is_private, names)), (path, names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                imported = [*(node.module or "").split("."), *(a.name for a in node.names)]
                assert not any(map(is_private, imported)), (path, imported)


def dotted(node: ast.expr) -> list[str]:
    """The names of ``a.b.c``; nothing of what is no chain of names."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
