"""Asks what the machine has, and puts carried wheels where the stages find them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
def known(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
names = ("climb-plugin", "torch", "torchvision", "lightly", "kornia", "numpy", "pytest", "triton")
found = {"python": sys.version.split()[0], **{n: v for n in names if (v := known(n))}}
missing = [name for name in sys.argv[1:] if find_spec(name) is None]
device, error = "", ""
try:
    import torch
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
except Exception as problem:
    error = f"torch: {type(problem).__name__}: {problem}"
print(json.dumps({"device": device, "versions": found, "missing": missing, "error": error}))
"""


@dataclass(frozen=True)
class Machine:
    """What a machine has.

    Attributes:
        device: The name of the GPU; empty without one.
        versions: Of Python and packages.
        missing: Modules that Python does not find.
        error: Why torch cannot be imported.
    """

    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    error: str = ""


def ask(modules: Iterable[str], environment: Mapping[str, str], folder: Path) -> Machine:
    """Looks in a process of its own, because the environment is that of the stages."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *sorted(set(modules))],
        env=dict(environment),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return Machine(error=f"Python cannot look around: {done.stderr.strip()[-300:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Machine(answer["device"], answer["versions"], tuple(answer["missing"]), answer["error"])


def install(wheels: Path, checkout: Path, site: Path) -> str:
    """Installs the wheels of a folder without a network; returns what could not be installed.

    The package itself is built from the checkout, unless its wheel is among the others.

    Raises:
        ValueError: If there is no wheel, or the package's wheel was made of other files.
    """
    shutil.rmtree(site, ignore_errors=True)
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"{wheels} holds no wheel")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--no-compile", "--upgrade", "--target", str(site)]
    own = [] if any(path.name.startswith("climb_plugin-") for path in files) else [checkout]
    problems = []
    for what in [*files, *own]:  # one by one: a wheel that does not fit leaves the others in place
        done = subprocess.run([*pip, str(what)], capture_output=True, text=True, check=False)
        if done.returncode:
            problems.append(f"{what.name}: {done.stderr.strip().splitlines()[-1]}")
    installed = site / "climb_plugin"
    stale = _differing(checkout / "climb_plugin", installed, "**/*.py")
    # Without adapters/hydra, which is a package of another name.
    stale += _differing(checkout / "adapters", installed / "adapters", "*.py")
    if stale and not own:
        raise ValueError(
            f"climb_plugin's wheel in {wheels} was made of other files than the checkout has "
            f"({', '.join(stale)}): build the wheel again"
        )
    return "; ".join(problems)


def _differing(source: Path, installed: Path, pattern: str) -> list[str]:
    """Names of the modules that differ or are missing."""
    return [
        str(path.relative_to(source))
        for path in sorted(source.glob(pattern))
        if not (other := installed / path.relative_to(source)).exists()
        or other.read_bytes() != path.read_bytes()
    ]


def environment(site: Path | None) -> dict[str, str]:
    """The variables for stages: modules of ``site`` come first, output comes at once."""
    paths = [str(site)] if site else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if paths:
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return variables
