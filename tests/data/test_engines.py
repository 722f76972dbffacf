"""One program, two engines: the same bytes from both."""

import shutil
from pathlib import Path

import pytest

from scaling.data.corpus import Corpus, CorpusError, read_manifest
from scaling.data.engine import Spark
from scaling.data.prepare import prepare

CORPORA = Path(__file__).parents[2] / "sweeps" / "corpora"
pytestmark = pytest.mark.slow


def same(corpus_file: Path, folder: Path) -> Corpus:
    """Prepare a corpus on both engines and compare all of it; the one that Spark made."""
    made = {name: prepare(corpus_file, folder / name, engine=name) for name in ("duckdb", "spark")}
    ours, theirs = (read_manifest(path) for path in made.values())
    assert made["duckdb"].name == made["spark"].name
    for key in ("digest", "tasks", "files", "splits", "steps", "card"):
        assert ours[key] == theirs[key], key
    corpus = Corpus.open(made["spark"])
    assert sorted(p.name for p in made["spark"].parent.iterdir()) == [made["spark"].name]
    return corpus


@pytest.mark.data
def test_real_logs(spark, tmp_path, clue_test_data, monkeypatch):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = same(CORPORA / "food_kitchen.toml", tmp_path)
    assert corpus.n_items == 23_357
    assert {s["step"]: s["logs"] for s in corpus.manifest["steps"]}["titled"] == 165_229


def test_synthetic_logs(spark, tmp_path):
    text = (CORPORA / "demo.toml").read_text()
    assert "users = 20_000" in text
    (tmp_path / "demo.toml").write_text(text.replace("users = 20_000", "users = 3_000"))
    corpus = same(tmp_path / "demo.toml", tmp_path)
    assert sum(corpus.manifest["splits"].values()) > 2_500


def test_every_step(spark, tiny_corpus, tmp_path):
    """All keys of [logs] at once, on rows that are short of nothing that can be wrong with one."""
    root = tiny_corpus(400, downstream=0.2)
    logs = (root / "logs.csv").read_text().splitlines()
    header, rows = logs[0] + ",stars,id", logs[1:]
    texts: dict[str, int] = {}
    changed = []
    for number, row in enumerate(rows):
        who, where, what, when = row.split(",")
        item = texts.setdefault(what, len(texts))
        stars = ("", "5", "4", "nan", "3.5")[number % 5] if number % 7 == 0 else "5"
        what = "" if number % 11 == 0 else what.replace(" ", " &amp;amp;\t") if number % 3 else what
        changed.append(f"{who},{where},{what},{when},{stars},{item}")
    changed += [changed[0], "u1,books,x,never,5,1", ",books,x,1,5,1"]
    (tmp_path / "logs.csv").write_text("\n".join([header, *changed]) + "\n")
    file = (root / "tiny.toml").read_text()
    file = file.replace('time = "when"', 'time = "when", rating = "stars", item = "id"')
    keys = [
        "max_malformed = 0.1",
        "clean_text = true",
        "drop_untitled = true",
        "min_rating = 4.0",
        'deduplicate = "latest"',
        "min_per_month = 0.01",
        "k_core = 2",
    ]
    assert "[logs]" not in file
    file = file.replace("[users]", "\n".join(["[logs]", *keys, "[users]"]))
    (tmp_path / "tiny.toml").write_text(file)
    made = {}
    for name in ("duckdb", "spark"):
        path = prepare(tmp_path / "tiny.toml", tmp_path / name, engine=name)
        made[name] = read_manifest(path)
        listed = (path.parent / "tiny.malformed.txt").read_text().splitlines()
        n = len(changed)
        assert (
            sorted(line.partition("logs.csv:")[2] for line in listed)
            == [
                f"{n + 1}: no user ('who' is empty)",
                f"{n}: not a time: text of 5 characters",
            ][:: 1 if str(n + 1) < str(n) else -1]
        )
    steps = [s["step"] for s in made["spark"]["steps"]]
    assert steps == ["read", "services", "titled", "rated", "deduplicated", "active", "k_core"]
    logs_left = [s["logs"] for s in made["spark"]["steps"]]
    assert logs_left == sorted(logs_left, reverse=True)
    assert len(set(logs_left)) >= 4
    for key in ("digest", "tasks", "files", "steps"):
        assert made["duckdb"][key] == made["spark"][key], key


def test_spark_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyspark.sql", None)
    with pytest.raises(CorpusError, match=r"PySpark is not installed; run: pip install 'clue-sc"):
        Spark(tmp_path)


def test_an_error_of_spark_is_told(spark, tiny_corpus, monkeypatch):
    """What goes wrong inside the engine is one message, and nothing is published."""
    root = tiny_corpus()
    written = Spark.write

    def broken(self, table, path):
        if path.name == "rows.parquet":
            shutil.rmtree(self.folder)
        written(self, table, path)

    monkeypatch.setattr(Spark, "write", broken)
    with pytest.raises(CorpusError, match=r"^engine spark: java.io.\w+: .*nothing was published$"):
        prepare(root / "tiny.toml", root / "other", engine="spark")
    assert [p.name for p in (root / "other" / "corpora").iterdir()] == []
