"""The stored notebooks are what their .py says, executed; and ``make notebooks`` can fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import jupytext
import nbformat
import pytest
from by_path import load

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
SOURCES = sorted(EXAMPLES.glob("0*.py"))
ONE_OF_THIS_MACHINE = re.compile(r"(?<![\w.])/(?:home|opt|work|tmp|root|usr|var|mnt|Users)/")


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    return load(HERE / "notebooks.py")


# What is stored.


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def wrong(source: Path) -> list[str]:
    """What is not as it should be with a notebook and its stored run."""
    target = source.with_suffix(".ipynb")
    if not target.exists():
        return ["it was never executed"]
    stored = nbformat.read(target, as_version=4)
    faults = []
    if cells(stored) != cells(jupytext.read(source)):
        faults.append("its cells are not those of the .py")
    opening = stored.cells[0]
    if opening.cell_type != "markdown" or "you will learn" not in opening.source.lower():
        faults.append("the first cell does not say what you will learn")
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    if any(cell.execution_count is None for cell in code):
        faults.append("a cell was not executed")
    outputs = [output for cell in code for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        faults.append("a cell failed")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        faults.append("it has no plot")
    shown = json.dumps(
        [
            output.get("text", "")
            + "".join(str(v) for k, v in output.get("data", {}).items() if k != "image/png")
            for output in outputs
        ]
    )
    if ONE_OF_THIS_MACHINE.search(shown):
        faults.append("an output names a path of the machine that made it")
    if target.stat().st_size > 2**20:
        faults.append("it is larger than 1 MB")
    return faults


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.stem))
def test_the_stored_run(source: Path) -> None:
    assert wrong(source) == []


def test_no_stored_run_without_its_source() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {path.stem for path in SOURCES}


def percent(*code: str) -> str:
    return "".join(
        ["# %% [markdown]\n# You will learn nothing.\n"] + [f"\n# %%\n{cell}\n" for cell in code]
    )


PLOT = "import matplotlib.pyplot as plt\nplt.plot([0, 1])\nplt.show()"


def test_the_check_can_fail(notebooks: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "01_tiny.py"
    source.write_text(percent("print(1)", PLOT))
    assert wrong(source) == ["it was never executed"]
    assert notebooks.main([], tmp_path) == 0
    assert wrong(source) == []

    source.write_text(percent("print(2)", PLOT))
    assert wrong(source) == ["its cells are not those of the .py"]

    source.write_text("# %%\nprint('in /home/somebody/somewhere')\n")
    assert notebooks.main([], tmp_path) == 0
    assert wrong(source) == [
        "the first cell does not say what you will learn",
        "it has no plot",
        "an output names a path of the machine that made it",
    ]

    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    stored.cells[0].execution_count = None
    stored.cells[0].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    nbformat.write(stored, source.with_suffix(".ipynb"))
    assert {"a cell was not executed", "a cell failed"} < set(wrong(source))


# How it is made.

STOP = """\
class StopNotebook(Exception):
    def _render_traceback_(self) -> list[str]:
        return []

print("solo-learn is not here")
raise StopNotebook"""


def test_two_runs_store_the_same(
    notebooks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "01_tiny.py"
    source.write_text(percent("import os\nprint(os.path.basename(os.getcwd()))", "1 + 1"))
    (tmp_path / "02_other.py").write_text(percent("1 / 0"))
    assert notebooks.main(["01"], tmp_path) == 0
    assert re.search(r"^01_tiny: \d+ s, stored\n1 notebooks, 0 failed", capsys.readouterr().out)
    first = source.with_suffix(".ipynb").read_text()
    assert notebooks.main(["01"], tmp_path) == 0
    assert source.with_suffix(".ipynb").read_text() == first

    _, here, two = nbformat.reads(first, as_version=4).cells
    assert here.outputs[0].text == f"{tmp_path.name}\n"
    assert two.outputs[0].data["text/plain"] == "2"
    assert not (tmp_path / "02_other.ipynb").exists()


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        ("1 / 0", [], "ZeroDivisionError: division by zero"),
        ("import time\ntime.sleep(60)", ["--timeout", "1"], "it takes longer than 1 s"),
        ("import os\nos._exit(1)", [], "Kernel died"),
    ],
)
def test_a_failed_run_keeps_the_stored_one(
    notebooks: ModuleType,
    code: str,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, stored = tmp_path / "01_tiny.py", tmp_path / "01_tiny.ipynb"
    source.write_text(percent("print(1)", code))
    (tmp_path / "02_fine.py").write_text(percent("print(1)"))
    stored.write_text("of the last run")
    assert notebooks.main(arguments, tmp_path) == 1
    assert stored.read_text() == "of the last run"
    printed = capsys.readouterr().out
    assert re.search(r"^01_tiny: \d+ s, FAILED", printed)
    assert said in re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert re.search(r"^02_fine: \d+ s, stored\n2 notebooks, 1 failed", printed, re.MULTILINE)
    assert {path.name for path in tmp_path.glob("*.ipynb")} == {stored.name, "02_fine.ipynb"}


def test_a_clean_stop_is_no_failure(
    notebooks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, stored = tmp_path / "01_tiny.py", tmp_path / "01_tiny.ipynb"
    source.write_text(percent(STOP, "1 / 0"))
    assert notebooks.main([], tmp_path) == 0
    assert re.search(r"^01_tiny: \d+ s, stopped", capsys.readouterr().out)
    (output,) = nbformat.read(stored, as_version=4).cells[1].outputs
    assert output.text == "solo-learn is not here\n"

    stored.write_text("of a run with all there is")
    assert notebooks.main([], tmp_path) == 0
    assert stored.read_text() == "of a run with all there is"


def test_an_unknown_name_is_refused(
    notebooks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        notebooks.main(["9"], tmp_path)
    assert "no notebook is called '9'" in capsys.readouterr().err
