"""The pages name what there is: files, anchors, commands, options; and docstrings refer to it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for folder in (".", ".github", "climb_plugin", "examples", "tests/benchmarks")
    for path in (ROOT / folder).glob("*.md")
)
SHOWN = [str(path.relative_to(ROOT)) for path in PAGES]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FOLDERS = r"(?:climb_plugin|adapters|examples|tests|\.github|\.ci)/"
FENCE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    dead = []
    for link in links:
        name, _, anchor = link.partition("#")
        if name.startswith(("http://", "https://")):
            continue
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            dead.append(link)
    return dead


def test_the_pages_are_there() -> None:
    assert {"README.md", "examples/SOLO_LEARN.md", ".github/CONTRIBUTING.md"} < set(SHOWN)


@pytest.mark.parametrize("page", PAGES, ids=SHOWN)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=SHOWN)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w/]){FOLDERS}[\w./-]+\.\w+", page.read_text(encoding="utf-8"))
    assert {name for name in named if not (ROOT / name.rstrip(".")).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=SHOWN)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)(?:[A-Z_]+=\S+ )*make ([a-z]+)", text, flags=re.MULTILINE))
    assert named <= targets
    if page.name == "CONTRIBUTING.md":
        assert named == targets


@pytest.mark.parametrize("page", PAGES, ids=SHOWN)
def test_environments_and_hosts_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for names in re.findall(r"\bENV=([\w,]+)", text):
        for name in names.split(","):
            assert f"[tool.tox.env.{name}]" in pyproject
    for names in re.findall(r"CLIMB_TEST_HOSTS=([\w,]+)", text):
        for name in names.split(","):
            assert f'"{name}": ((' in conftest
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert f"\n{extra} = [" in pyproject


def test_the_readme_is_short_and_its_picture_small() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
    assert (ROOT / picture).stat().st_size < 60_000


def test_every_key_of_solo_learn_is_in_its_table() -> None:
    source = (ROOT / "adapters" / "solo_config.py").read_text(encoding="utf-8")
    keys = set(re.findall(r'^    "(climb_\w+)":', source, flags=re.MULTILINE))
    page = (ROOT / "examples" / "SOLO_LEARN.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(climb_\w+)` \|", page, flags=re.MULTILINE))
    assert rows == keys


# References in docstrings, which `make docs` turns into links.


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests"))
        return importlib.import_module("reference")


# In a process of its own: where a host is missing, pytest's search for doctests leaves halves of
# the adapters' modules behind.
CHECK = """
import importlib, reference
checked = 0
for name in reference.names():
    try:
        module = importlib.import_module(name)
    except ImportError:  # an adapter, and no host
        assert name.startswith("climb_plugin.adapters."), name
        continue
    checked += 1
    print(*reference.broken(module), sep="\\n", end="")
assert checked > 10, checked
"""


def test_every_reference_in_a_docstring_is_to_something() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


PAGE = '''
"""To :class:`Here`, :mod:`json` and :func:`~json.dumps`."""

number = 1
""":func:`nowhere`"""

class Here:
    """:meth:`method`, :meth:`Here.method`, :class:`method`."""

    def method(self):
        """:func:`json.nothing`, :clas:`Here`, :mod:`Here`."""
'''


def test_a_reference_to_nothing_is_found(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page_with_references.py").write_text(PAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = reference.broken(importlib.import_module("page_with_references"))
    del sys.modules["page_with_references"]
    assert [fault.partition(": ")[2] for fault in found] == [
        "func `nowhere`",
        "class `method`",
        "func `json.nothing`",
        "clas `Here`",
        "mod `Here`",
    ]
