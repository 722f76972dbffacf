"""Imports run downhill, and what plans, watches or draws never loads torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "deepspeed")


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after running ``code``."""
    probe = f"{code}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def modules_of(*parts: str) -> list[str]:
    found = []
    for part in parts:
        path = ROOT / "scaling" / part
        files = [path.with_suffix(".py")] if not path.is_dir() else sorted(path.glob("*.py"))
        for file in files:
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            if not name.endswith("__main__"):
                found.append(name.removesuffix(".__init__"))
    return found


def test_the_import_contract_holds() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_probe_sees_torch() -> None:
    assert loaded_by("import torch") == {"torch"}


@pytest.mark.parametrize(
    "part",
    ["config", "files", "flops", "packing", "rundir", "sweeps", "results", "collect", "analysis",
     "slurm", "cli", "data", "transfer/gains"],
)  # fmt: skip
def test_no_torch_in(part: str) -> None:
    modules = modules_of(part)
    assert modules
    assert loaded_by("\n".join(f"import {m}" for m in modules)) == set()


def test_every_name_of_analysis_comes_without_torch() -> None:
    code = "import scaling.analysis as a\n[getattr(a, name) for name in a.__all__]"
    assert loaded_by(code) == set()


@pytest.mark.parametrize("folder", ["sweeps", "slurm", "results", "analysis"])
def test_content_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
