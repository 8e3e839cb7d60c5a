"""Writes the API reference, unless a docstring refers to something that is not there.

    python tests/reference.py build/docs

is ``make docs``. The pages are made by pdoc from the docstrings of the installed package. pdoc
turns a reference, such as ``:func:`~climb_plugin.attach.attach```, into a link if pdoc finds the
target, and into plain text if not; so the targets are checked here first.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import climb_plugin

REFERENCE = re.compile(r":(?:py:)?(\w+):`~?([^`]*)`")
KINDS: dict[str, Callable[[object], bool]] = {
    "attr": lambda target: True,
    "class": inspect.isclass,
    "data": lambda target: True,
    "exc": inspect.isclass,
    "func": callable,
    "meth": callable,
    "mod": inspect.ismodule,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def names() -> list[str]:
    """All modules of the package, without importing more than packages."""
    found = pkgutil.walk_packages(climb_plugin.__path__, climb_plugin.__name__ + ".")
    return [climb_plugin.__name__, *sorted(info.name for info in found)]


def broken(module: ModuleType) -> list[str]:
    """The references in a module's docstrings whose target is not there, or of another kind."""
    return [
        f"{module.__name__}:{line}: {role} `{target}`"
        for line, scope, text in _docstrings(ast.parse(inspect.getsource(module)))
        for role, target in REFERENCE.findall(text)
        if not _resolves(role, target, module, scope)
    ]


def _docstrings(node: ast.AST, scope: str = "") -> Iterator[tuple[int, str, str]]:
    """Line, enclosing class and text of each docstring, those below variables too."""
    for child in ast.iter_child_nodes(node):
        inner = f"{scope}.{child.name}".lstrip(".") if isinstance(child, ast.ClassDef) else scope
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            if isinstance(child.value.value, str):
                yield child.lineno, scope, child.value.value
        elif isinstance(child, DOCUMENTED):
            yield from _docstrings(child, inner)


def _resolves(role: str, target: str, module: ModuleType, scope: str) -> bool:
    """Whether a target is found from its class, from its module, or by its full name."""
    if role not in KINDS:
        return False
    places = [f"{module.__name__}.{scope}", module.__name__] if scope else [module.__name__]
    candidates = [f"{place}.{target}" for place in places] + [target]
    return any(KINDS[role](found) for name in candidates for found in _found(name))


def _found(name: str) -> Iterator[object]:
    """What a dotted name may mean: a module, or an attribute of one (both, for a few)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            item: object = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                item = getattr(item, part)
        except (ImportError, AttributeError, ValueError):
            continue
        yield item


def write(folder: Path) -> None:
    """Writes the pages of all public modules; what pdoc cannot make sense of is an error."""
    import pdoc

    # pdoc takes __all__ of a package for the list of its modules, too.
    modules = {name.split(".")[1] for name in names()[1:]} - {*climb_plugin.__all__}
    climb_plugin.__all__ += sorted(name for name in modules if not name.startswith("_"))
    pdoc.render.configure(
        docformat="google", footer_text=f"climb-plugin {climb_plugin.__version__}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # In the root of a checkout: the installed package is the one that is meant.
        warnings.filterwarnings("ignore", "'climb_plugin' may refer to either the installed")
        # Of the methods that a NamedTuple is given: they know nothing of the module's imports.
        warnings.filterwarnings("ignore", "Error parsing type annotation .* for .*init__")
        pdoc.pdoc(climb_plugin.__name__, output_directory=folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks the references, and writes the pages if all are right."""
    parser = argparse.ArgumentParser(description="Writes the API reference as HTML.")
    parser.add_argument("folder", type=Path, help="where to")
    folder = parser.parse_args(arguments).folder
    if faults := [fault for name in names() for fault in broken(importlib.import_module(name))]:
        sys.exit("references to what is not there:\n" + "\n".join(faults))
    write(folder)
    print(f"API reference: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
