"""What the documents promise exists: links, anchors, paths, commands, options, versions."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main

from scaling.analysis.studies.report import FITS_VERSION
from scaling.cli import app
from scaling.config import ModelConfig, PoolConfig, RunConfig
from scaling.data.corpus import SCHEMA_VERSION as CORPUS_VERSION
from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare, read_card
from scaling.data.recipe import read_corpus_file
from scaling.files import read_json
from scaling.results import TABLES_VERSION
from scaling.rundir import RunDir
from scaling.sweeps import PLAN_SCHEMA_VERSION, Grid
from scaling.train.export import SCHEMA_VERSION as EXPORT_VERSION

ROOT = Path(__file__).parent.parent
UNTRACKED = {".venv", "work", "node_modules"}
DOCUMENTS = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not UNTRACKED & set(p.relative_to(ROOT).parts) and ".pytest_cache" not in p.parts
)
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    """A document without its fenced and indented blocks."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """Anchors that a Markdown renderer gives the headings of a document."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(path), re.M):
        text = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(text.strip().replace(" ", "-"))
    return found


def broken(document: Path) -> list[str]:
    """Links of a document to files or headings that are not there."""
    missing = []
    for target in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# A b\n[1](a.md) [2](none.md) [3](#a-b) [4](#c) [5](https://x.org/y)\n")
    assert broken(document) == ["none.md", "#c"]


# ---- commands -----------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every verb; ``corpus info`` and the like under two words."""
    found: dict[str, Any] = {}

    def walk(group: Any, prefix: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{prefix}{name} ")
            else:
                found[prefix + name] = command

    walk(typer.main.get_command(app), "")
    return found


def examples(document: Path) -> Iterator[list[str]]:
    """Words of every line of a code block that calls ``clue-scaling``, comments left out."""
    for line in document.read_text(encoding="utf-8").splitlines():
        words = line.strip().removeprefix("$ ")
        if re.match(r"(\S+/)?clue-scaling +[a-z]", words):
            yield shlex.split(words, comments=True)[1:]


EXAMPLES = [(d, words) for d in DOCUMENTS for words in examples(d)]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize(
    ("document", "words"), EXAMPLES, ids=[f"{d.stem}: {' '.join(w)[:50]}" for d, w in EXAMPLES]
)
def test_examples_use_verbs_and_options_that_exist(document: Path, words: list[str]) -> None:
    known = commands()
    verb = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    assert verb in known, f"{document}: no such verb: {verb}"
    options = {o for p in known[verb].params for o in (*p.opts, *p.secondary_opts)}
    used = {w.partition("=")[0] for w in words if w.startswith("-")}
    assert used <= options | {"--help"}


def test_the_readme_names_every_verb_and_no_other() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    table = table[table.index("| verb |") :]
    rows = table[: table.index("\n\n")].splitlines()[2:]
    named = {verb for row in rows for verb in re.findall(r"`([a-z]+)`", row.split("|")[1])}
    assert named == {name.split()[0] for name in commands()}


def test_every_verb_shows_an_example() -> None:
    for name, command in commands().items():
        assert f"clue-scaling {name}" in (command.help or ""), name


# ---- paths and targets --------------------------------------------------------------------------


def test_the_readme_shows_the_demo_and_its_targets_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert "make demo" in readme
    for document in DOCUMENTS:
        blocks = document.read_text(encoding="utf-8")
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", blocks, re.M)
        assert set(named) <= targets, document


def test_figures_are_drawn_of_studies_that_have_fits(tmp_path: Path) -> None:
    made = tmp_path / "bin" / "clue-scaling"
    for name in (".installed", "bin/python"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made.write_text('#!/bin/sh\necho "$@"\n')
    made.chmod(0o755)
    call = ["make", "-s", "-f", ROOT / "Makefile", "figures", f"VENV={tmp_path}"]
    call += ["-o", tmp_path / ".installed"]
    for study, file, drawn in (
        (None, None, ""),
        ("unfitted", "runs.parquet", ""),
        ("mine", "fits.json", "figures sweeps/mine.toml\n"),
    ):
        if study:
            (tmp_path / "results" / study).mkdir(parents=True)
            (tmp_path / "results" / study / file).touch()
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == drawn


def test_paths_named_in_the_readme_and_the_tour_exist() -> None:
    content = "sweeps|slurm|results|analysis|scaling|docs|tests"
    for name in ("README.md", "CONTRIBUTING.md"):
        text = prose(ROOT / name)
        for path in re.findall(rf"`((?:{content})/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_files_of_the_guide_are_valid(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    corpus, sweep, transfer = re.findall(r"^```toml\n(.*?)^```", guide, re.M | re.S)
    (tmp_path / "mine.toml").write_text(corpus)
    head, grid = sweep.split("[base]")
    (tmp_path / "sweep.toml").write_text(f"{head}{transfer}[base]{grid}")
    shutil.copy(ROOT / "sweeps" / "models.toml", tmp_path)
    assert read_corpus_file(tmp_path / "mine.toml").services == ("search", "shop")
    grid = Grid.read(tmp_path / "sweep.toml")
    card = read_card(ROOT / "sweeps" / "corpora" / "paper.toml", tmp_path)
    assert len(grid.runs(card)) == 9
    assert grid.transfer is not None
    assert grid.transfer.tasks == ("flights", "scientific:lmrec")


@pytest.mark.slow
def test_the_corpus_of_the_guide_can_be_prepared(tmp_path: Path) -> None:
    """On logs of the layout it describes: searches without ratings, orders with them."""
    searches, orders = [], ["customer,site,sku,title,at,stars"]
    for user in range(2_400):
        for log in range(4):
            word, day = (user * 7 + log) % 50, f"2024-01-{log + 1:02}"
            time = 1_700_000_000_000 + user * 1_000 + log
            searches.append({"uid": f"u{user}", "query": f"query {word}", "ts": time})
            for site in ("shop", "travel"):
                # An item for every user and log: negatives are drawn from 100 others.
                sku = (user + log * 31) % 200
                orders.append(f"u{user},{site},{site}{sku},{site} {sku},{day}T10:00:00,{log + 1}")
    pq.write_table(pa.Table.from_pylist(searches), tmp_path / "search-1.parquet")
    (tmp_path / "orders.csv.gz").write_bytes(gzip.compress("\n".join(orders).encode()))
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    corpus = re.findall(r"^```toml\n(.*?)^```", guide, re.M | re.S)[0]
    assert corpus.count('"/data/logs/') == 2
    (tmp_path / "mine.toml").write_text(corpus.replace("/data/logs/", f"{tmp_path}/"))
    card = Corpus.open(prepare(tmp_path / "mine.toml", tmp_path)).card
    assert card.services == ("search", "shop")
    assert card.n_users == 2_400 - 240 - 2 * 1_024


# ---- formats ------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """Text of every second-level section by its heading."""
    parts = re.split(r"^## +(.*)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_index_of_formats_names_every_section() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    index = re.findall(r"^- \[([^\]]+)\]\(#", text, re.M)
    assert index == list(sections(text))


def written_versions(root: Path) -> dict[str, int]:
    """The version that the code gives each format."""
    config = RunConfig(
        model=ModelConfig(layers=1, d_model=8, heads=1),
        data={"corpus_digest": "a" * 16, "vocab_size": 300},
        batch_size=2,
        negatives=2,
        steps=1,
        evaluations=1,
        pool=PoolConfig(size=2, digest="a" * 16),
    )
    run = RunDir.create(root, config, "none")
    run.record(1, "intent", {})
    generation = run.start_generation({"resumed_from": 0})
    run.write_result(generation, {})
    (start,) = run.metrics_path(generation).read_text().splitlines()
    return {
        "Run directory": read_json(run.path / "spec.json")["schema_version"],
        "Metrics": json.loads(start)["schema_version"],
        "Result": read_json(run.path / "result.json")["schema_version"],
        "Attempts and cluster profiles": run.attempts()[0].intent["schema_version"],
        "Corpus": CORPUS_VERSION,
        "Sweep": PLAN_SCHEMA_VERSION,
        "Export": EXPORT_VERSION,
        "Tables": TABLES_VERSION,
        "Fits": FITS_VERSION,
    }


def test_formats_state_the_versions_that_the_code_writes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    stated = {
        name: int(found[1])
        for name, body in sections(text).items()
        if (found := re.search(r"^Version (\d+) \(", body, re.M))
    }
    assert stated.keys() == sections(text).keys()
    written = written_versions(tmp_path)
    assert {name: stated[name] for name in written} == written
