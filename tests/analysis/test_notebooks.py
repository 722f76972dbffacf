"""Notebooks run from top to bottom on tables of a study with a known law."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "analysis").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_execute(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUE_RESULTS", str(folder))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    images = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(images) == 2
    printed = "".join(out["text"] for out in outputs if out.get("name") == "stdout")
    assert "loss = (pf_days / " in printed
    assert "CONVERGED" in printed


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
