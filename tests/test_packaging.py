"""Wheel, sdist and editable install hold what they should, each in a folder of its own."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

import climb_plugin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "climb_plugin"
CORE = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
ADAPTERS = {path.name for path in (ROOT / "adapters").glob("*.py")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is shipped, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "climb-plugin"
    copy.mkdir()
    for name in ("climb_plugin", "adapters", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def importable(names: Iterable[str]) -> set[str]:
    names = set(names)
    core = {name.removeprefix("climb_plugin/") for name in names}
    of_the_core = {name for name in core if not name.startswith("adapters/")}
    assert {name for name in of_the_core if name.endswith(".py")} == CORE
    adapters = {n.removeprefix("adapters/") for n in core if n.startswith("adapters/")}
    assert {name for name in adapters if "/" not in name} == ADAPTERS
    return names


def test_wheel_and_sdist(source: Path, tmp_path: Path) -> None:
    run("-m", "build", "--outdir", str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("climb_plugin-*.whl")
    (sdist,) = tmp_path.glob("climb_plugin-*.tar.gz")
    assert wheel.name.split("-")[1] == climb_plugin.__version__

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(metadata_name))
    importable(
        name for name in names if name.startswith("climb_plugin/") and "py.typed" not in name
    )
    assert "climb_plugin/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not any(name.startswith(("adapters/", "tests/", "examples/")) for name in names)

    requires = metadata.get_all("Requires-Dist") or []
    core = {line.split(">")[0] for line in requires if "extra ==" not in line}
    assert core == {"torch", "numpy"}
    extras = {"lightly", "solo", "examples", "gpu", "notebooks", "study", "bench", "docs", "test"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    assert metadata["Requires-Python"] == ">=3.10"

    with tarfile.open(sdist) as archive:
        members = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"climb_plugin/{name}" for name in CORE} < members
    assert {f"adapters/{name}" for name in ADAPTERS} < members
    assert {"climb_plugin/py.typed", "LICENSE", "README.md", "setup.cfg"} < members


def test_editable_install_sees_the_sources(source: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run("-m", "venv", str(environment), cwd=tmp_path)
    python = environment / "bin" / "python"
    # What this environment has, so that nothing is downloaded twice.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if "packages" in path))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(source)],
        check=True,
        cwd=tmp_path,
    )
    # The outer environment may hold a wheel of this package, which path order would prefer.
    code = (
        "import sys; sys.meta_path.sort(key=lambda f: 'editable' not in repr(f).lower())\n"
        "import climb_plugin.adapters as a; print(a.__file__)"
    )
    found = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == source / "adapters" / "__init__.py"


def test_the_reference_has_a_page_for_each_public_module(tmp_path: Path) -> None:
    # In a process of its own: pdoc is shown a longer __all__.
    run(str(ROOT / "tests" / "reference.py"), str(tmp_path), cwd=tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    public = {name for name in CORE if "/" not in name and not name.startswith("_")}
    adapters = {f"adapters/{name}" for name in ADAPTERS - {"__init__.py"}}
    expected = {
        f"climb_plugin/{name[:-3]}.html" for name in public | adapters | {"prior.py", "schedule.py"}
    }
    assert expected | {"climb_plugin.html", "climb_plugin/adapters.html"} <= pages
    page = (tmp_path / "climb_plugin" / "gaussian.html").read_text()
    assert '<a href="#bound_logvar">' in page  # a reference is a link
    assert "Args:" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)  # and a section a list
