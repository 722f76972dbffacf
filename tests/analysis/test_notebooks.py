"""Notebooks run from top to bottom, on a known law and on the committed tables."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from scaling.analysis import write_study

ANALYSIS = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))


def execute(path: Path) -> tuple[list[dict], str]:
    """Pictures that a notebook shows when it is run in its folder, and what it prints."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    images = [out for out in outputs if "image/png" in out.get("data", {})]
    return images, "".join(out["text"] for out in outputs if out.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_of_compute_on_a_known_law(
    folder: Path, fits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = shutil.copytree(folder, tmp_path / "toy")
    write_study(fits, results)
    monkeypatch.setenv("CLUE_RESULTS", str(results))
    images, printed = execute(ANALYSIS / "01_compute.ipynb")
    assert len(images) == 2
    assert "loss = (pf_days / " in printed
    assert "CONVERGED" in printed


@pytest.mark.slow
def test_the_notebook_of_the_optimiser_gives_the_numbers_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUE_FIGURES", str(tmp_path))
    images, printed = execute(ANALYSIS / "02_optimizer.ipynb")
    assert len(images) == 2
    assert {p.name for p in tmp_path.glob("*.png")} == {"best_rate.png", "clip_eps.png"}
    page = (ANALYSIS.parent / "docs" / "optimizer.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    rows = re.findall(r"(-?\d\.\d+)\s+(-?\d\.\d+) to (-?\d\.\d+)", printed)
    for value, lower, upper in rows[:1] + rows[2:5] + rows[6:9]:
        assert f"{value} ({lower} to {upper})" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure", "images"),
    [("03_transfer", "transfer_vs_loss.png", 1), ("04_services_and_domains", "services.png", 2)],
)
def test_notebooks_on_transfer_give_what_the_log_says(
    name: str, figure: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUE_FIGURES", str(tmp_path))
    drawn, printed = execute(ANALYSIS / f"{name}.ipynb")
    assert len(drawn) == images
    assert (tmp_path / figure).stat().st_size > 0
    log = " ".join((ANALYSIS.parent / "docs" / "log.md").read_text(encoding="utf-8").split())
    rows = re.findall(r"([+-]?\d\.\d+) \(([+-]?\d\.\d+) to ([+-]?\d\.\d+)\)", printed)
    assert len(rows) >= 10
    assert [r for r in rows if "{} ({} to {})".format(*r) not in log] == []


@pytest.mark.slow
def test_the_notebook_of_laws_gives_what_the_log_says() -> None:
    drawn, printed = execute(ANALYSIS / "05_laws.ipynb")
    assert len(drawn) == 4
    log = " ".join((ANALYSIS.parent / "docs" / "log.md").read_text(encoding="utf-8").split())
    rows = re.findall(r"(\d\.\d+) \((\d\.\d+) to (\d\.\d+)\)", printed)
    assert len(rows) >= 15
    assert [r for r in rows if "{} ({} to {})".format(*r) not in log] == []
    survive = re.findall(r"\w+: \d+ of \d+ claims survive", printed)
    assert len(survive) == 2
    assert [line for line in survive if line not in log] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_ask_one_question_and_define_nothing(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert "**Question.**" in cells[0].source
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert "def " not in code
    assert path.stat().st_size < 500_000


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
