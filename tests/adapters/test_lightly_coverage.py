"""examples/LIGHTLY.md is what its command writes, and no public loss or head is missing."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import lightly.loss
import lightly.models.modules
import pytest
import torch
from by_path import load
from torch import Tensor, nn

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "examples" / "LIGHTLY.md"
RELEASE = "1.6"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    return load(HERE / "coverage_lightly.py")


@pytest.fixture(scope="module")
def rows(coverage: ModuleType) -> tuple[list[Any], list[Any]]:
    return coverage.loss_rows(), coverage.head_rows()


class Unknown(nn.Module):
    """A loss or head that lightly adds one day."""

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return (z0 - z1).square().mean()


def test_every_public_loss_and_head_has_an_outcome(rows: tuple[list[Any], list[Any]]) -> None:
    losses, heads = rows
    assert [row.cells for row in (*losses, *heads) if not row.covered] == []
    trained = [row.outcome == "trains" for row in losses].count(True)
    assert trained >= 31
    assert [row.outcome == "trains" for row in heads].count(True) >= 23


def test_the_page_is_what_the_command_writes(
    coverage: ModuleType, rows: tuple[list[Any], list[Any]]
) -> None:
    if not version("lightly").startswith(RELEASE + "."):
        pytest.skip(f"the page is that of lightly {RELEASE}")
    written = coverage.markdown(*rows)
    assert written == PAGE.read_text(), (
        "run: python tests/adapters/coverage_lightly.py > examples/LIGHTLY.md"
    )


def test_the_lists_hold_what_lightly_documents(coverage: ModuleType) -> None:
    losses, heads = coverage.discovered_losses(), coverage.discovered_heads()
    assert {"DINOLoss", "HypersphereLoss", "KoLeoLoss", "CO2Regularizer"} <= losses.keys()
    assert {"DINOProjectionHead", "MSNProjectionHead", "SwaVPrototypes"} <= heads.keys()
    assert {"AIMPredictionHead"} <= heads.keys(), coverage.not_importable()
    assert not {"MemoryBankModule", "NNMemoryBankModule", "Center"} & (losses.keys() | heads.keys())


@pytest.mark.parametrize(
    ("listed", "package", "module"),
    [
        ("discovered_losses", lightly.loss, "lightly.loss.new_loss"),
        ("discovered_losses", lightly.loss.ntx_ent_loss, "lightly.loss.ntx_ent_loss"),
        ("discovered_heads", lightly.models.modules, "lightly.models.modules.new"),
        ("discovered_heads", lightly.models.modules.heads, "lightly.models.modules.heads"),
    ],
)
def test_a_new_name_without_a_case_is_not_covered(
    coverage: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    listed: str,
    package: ModuleType,
    module: str,
) -> None:
    unknown = type("BrandNewHead", (Unknown,), {"__module__": module})
    monkeypatch.setattr(package, "BrandNewHead", unknown, raising=False)
    found = getattr(coverage, listed)()
    # The rows of all others are tested above.
    monkeypatch.setattr(coverage, "discovered_losses", dict)
    monkeypatch.setattr(coverage, "discovered_heads", dict)
    monkeypatch.setattr(coverage, listed, lambda: {"BrandNewHead": found["BrandNewHead"]})
    with pytest.raises(SystemExit, match="not covered: `BrandNewHead`"):
        coverage.main()
    assert "0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        ("criterion(head(x0), head(x1))", "trains"),
        ("criterion(head(x0).detach(), head(x1).detach())", "FAILS.* depends on no sample"),
        ("criterion(head(x0), torch.nan * head(x1))", "FAILS.* not finite"),
        ("0 * criterion(head(x0), head(x1))", "FAILS.* the gradient of .* is not 0"),
        ("criterion(x0)", "FAILS.* TypeError"),
    ],
)
def test_a_case_that_does_not_train_is_a_row_that_says_so(
    coverage: ModuleType, call: str, outcome: str
) -> None:
    base = "lambda z0, z1: (z0 - z1).square().mean()"
    row = coverage.loss_row("SomeLoss", coverage.LossCase(call, base=base))
    assert row.covered == (outcome == "trains")
    assert re.fullmatch(f"(?s){outcome}.*", row.outcome), row.outcome


def test_the_trainings_leave_the_random_numbers_alone(coverage: ModuleType) -> None:
    state = torch.get_rng_state()
    coverage.loss_row("NTXentLoss", coverage.LossCase())
    assert torch.equal(torch.get_rng_state(), state)


def test_co2_by_itself_is_refused(coverage: ModuleType) -> None:
    row = coverage.loss_row("CO2Regularizer", coverage.LossCase())
    assert "depends on no sample" in row.outcome
