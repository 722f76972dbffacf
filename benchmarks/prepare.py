"""Preparation against its floor: what any preparation has to do at least.

The floor is DuckDB sorting the same table of logs by user and time into Parquet, and the tokenizer
encoding the same distinct texts. Both sides run in processes of their own, in turn, with the same
threads and memory of the database; medians are given. Beside it: peak memory at this size and at a
fifth of it, bytes on disk, and what it would take for the paper's 5,313,992,425 behaviours.

    python benchmarks/prepare.py --quick
    python benchmarks/prepare.py --behaviours 50_000_000 --spark
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from scaling.data import tokenizer
from scaling.data.corpus import Corpus
from scaling.data.engine import DuckDB
from scaling.data.prepare import MEMORY_OF_CORE, memory_of_database, prepare

PAPER = 5_313_992_425
"""Behaviours of the paper's corpus (Shin et al. 2023, Section 4.1)."""
BEHAVIOURS_PER_USER = 470  # 5,313,992,425 of 11,294,122 users
BEHAVIOURS_PER_ITEM = 50  # ours: the paper gives no number of items
WORDS = 60_000
CORES = 64
BYTES_PER_ITEM, BYTES_PER_USER = 25, 80
"""Held by numpy beside the database: places of texts and tokens; hashes, counts and splits."""

CORPUS = """
name = "bench"
services = ["search", "shop"]
[source]
kind = "tables"
[[source.tables]]
files = ["logs.parquet"]
columns = { user = "user", service = "service", item = "item", text = "text", time = "time" }
[logs]
clean_text = true
deduplicate = "latest"
[users]
validation = 128
pool = 128
"""


def make_logs(folder: Path, behaviours: int) -> None:
    """Write ``logs.parquet`` and ``corpus.toml``: skewed users and items, titles of 8 words."""
    rng = np.random.default_rng(0)
    syllables = np.array([c + v for c in "bcdfghjklmnprstvz" for v in "aeiou"], dtype=object)
    lengths = rng.integers(1, 5, WORDS)
    words = ["".join(syllables[rng.integers(0, len(syllables), n)]) for n in lengths]
    (folder / "corpus.toml").write_text(CORPUS)
    users, items = behaviours // BEHAVIOURS_PER_USER, behaviours // BEHAVIOURS_PER_ITEM
    con = duckdb.connect()
    con.execute("CREATE TABLE words AS SELECT list(w) AS w FROM (SELECT unnest(?) AS w)", [words])

    def draw(seed: str, n: int, skew: float) -> str:
        return f"floor({n} * pow((hash({seed}) % 1000003) / 1000003.0, {skew}))::BIGINT"

    title = " || ' ' || ".join(f"w[1 + {draw(f'i * 8 + {k}', WORDS, 3)}]" for k in range(8))
    con.execute(
        f"""CREATE TABLE items AS SELECT i, 'item' || i AS item, {title} AS text
            FROM range({items}) r(i), words"""
    )
    con.execute(
        f"""COPY (
            SELECT 'user' || u AS "user", if(r % 2 = 0, 'search', 'shop') AS service, item, text,
                   1538352000 + (hash(r * 5 + 2) % 63072000)::BIGINT AS time
            FROM (SELECT r, {draw("r", users, 1.5)} AS u, {draw("r * 3 + 1", items, 2.5)} AS i
                  FROM range({behaviours}) t(r))
            JOIN items USING (i)) TO '{folder}/logs.parquet'"""
    )
    con.close()


# --- the two sides, each in a process of its own --------------------------------------------------


def ours(folder: Path, root: Path, engine: str, memory: int) -> None:
    """Prepare the corpus; print the seconds of every stage."""
    began: list[tuple[str, float]] = []
    start = time.perf_counter()
    path = prepare(
        folder / "corpus.toml",
        root,
        engine="spark" if engine == "spark" else "duckdb",
        memory=None if engine == "spark" else memory,
        progress=lambda done, total, stage: began.append((stage, time.perf_counter())),
    )
    end = time.perf_counter()
    ends = [t for _, t in began[1:]] + [end]
    stages = {s: e - t for (s, t), e in zip(began, ends, strict=True)}
    report(end - start, path=str(path), stages=stages)


def floor(folder: Path, root: Path, memory: int) -> None:
    """Sort the table and encode its distinct texts with the corpus's tokenizer."""
    (made,) = (root / "corpora").glob("bench-*")
    bpe = tokenizer.load(made / "tokenizer.json")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        engine = DuckDB(Path(scratch), memory)
        logs = f"read_parquet('{folder}/logs.parquet')"
        order = 'ORDER BY "user", service, time'
        engine.con.raw_sql(f"COPY (FROM {logs} {order}) TO '{scratch}/sorted.parquet'")
        sort = time.perf_counter() - start
        texts = engine.con.raw_sql(f"SELECT DISTINCT text FROM {logs}").fetchnumpy()["text"]
        engine.close()
    encoding = time.perf_counter()
    for at in range(0, len(texts), tokenizer.CHUNK):
        bpe.encode_batch(texts[at : at + tokenizer.CHUNK].tolist())
    encode = time.perf_counter() - encoding
    report(sort + encode, stages={"sort": sort, "encode": encode})


def report(seconds: float, **more: Any) -> None:
    """Print what the parent reads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"s": seconds, "cpu_s": cpu, "rss_gb": usage.ru_maxrss / 1e6, **more}))


def in_process(side: str, folder: Path, root: Path, memory: int) -> dict[str, Any]:
    """Run one side; its report, and the most that its scratch folder held on disk."""
    call = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--root", str(root)]
    call += ["--memory", str(memory)]
    submit = "--driver-memory 4g --conf spark.ui.enabled=false pyspark-shell"
    process = subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYSPARK_SUBMIT_ARGS": submit, **os.environ},
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, sum(_sizes(root)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{err[-2000:]}")
    return {**json.loads(out.splitlines()[-1]), "disk_gb": peak / 1e9}


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            yield path.stat().st_blocks * 512


# --- the comparison -------------------------------------------------------------------------------


def compare(
    folder: Path, behaviours: int, repeats: int, spark: bool, memory: int
) -> dict[str, Any]:
    """Measure both sides in turn."""
    say(f"making {behaviours:,} behaviours")
    make_logs(folder, behaviours)
    prepared, floors = [], []
    for i in range(repeats):
        root = folder / f"root{i}"
        prepared.append(in_process("duckdb", folder, root, memory))
        say(f"ours {prepared[-1]['s']:.1f} s, {prepared[-1]['rss_gb']:.2f} GB")
        floors.append(in_process("floor", folder, root, memory))
        say(f"floor {floors[-1]['s']:.1f} s {floors[-1]['stages']}")
    small = folder / "small"
    small.mkdir()
    make_logs(small, behaviours // 5)
    fifth = in_process("duckdb", small, small / "root", memory)
    corpus = Corpus.open(Path(prepared[-1]["path"]))
    middle = sorted(prepared, key=lambda r: r["s"])[len(prepared) // 2]
    found: dict[str, Any] = {
        "behaviours": behaviours,
        "cores": len(os.sched_getaffinity(0)),
        "database_gb": memory / 1e9,
        "ours_s": statistics.median(r["s"] for r in prepared),
        "floor_s": statistics.median(r["s"] for r in floors),
        "time_over_floor": statistics.median(
            p["s"] / f["s"] for p, f in zip(prepared, floors, strict=True)
        ),
        "stages_s": middle["stages"],
        "floor_stages_s": floors[-1]["stages"],
        "peak_rss_gb": max(r["rss_gb"] for r in prepared),
        "peak_rss_gb_of_a_fifth": fifth["rss_gb"],
        "peak_disk_gb": max(r["disk_gb"] for r in prepared),
        "behaviours_per_s": behaviours / statistics.median(r["s"] for r in prepared),
        **sizes(corpus),
        "paper_one_machine": project(behaviours, middle),
    }
    if spark:
        found["spark"] = on_spark(small, behaviours // 5, fifth["path"], memory)
    return found


def sizes(corpus: Corpus) -> dict[str, Any]:
    """Bytes on disk for a behaviour, without and with the items, beside tokens inline."""
    logs = [corpus.users(s) for s in corpus.card.services]
    kept = sum(len(items) for _, items in logs)
    of_users = sum(offsets.nbytes + items.nbytes for offsets, items in logs) + corpus.keys.nbytes
    of_items = sum(a.nbytes for a in (corpus.tokens, corpus.token_offsets, corpus.item_service))
    lengths = np.diff(corpus.token_offsets)
    tokens = sum(int(lengths[items].sum()) for _, items in logs)
    return {
        "kept_behaviours": kept,
        "bytes_per_behaviour": of_users / kept,
        "bytes_of_items": of_items,
        "bytes_per_behaviour_with_items": (of_users + of_items) / kept,
        "bytes_per_behaviour_inline": tokens * corpus.tokens.itemsize / kept,
        "tokens_per_behaviour": tokens / kept,
    }


def project(behaviours: int, measured: dict[str, Any]) -> dict[str, float]:
    """The paper's corpus on one machine of 64 cores: CPU time grows as n log n, half of it is lost
    to imperfect sharing, disk and corpus grow as n."""
    growth = PAPER / behaviours * np.log(PAPER) / np.log(behaviours)
    return {
        "cores": CORES,
        "cpu_hours": measured["cpu_s"] * growth / 3600,
        "hours": measured["cpu_s"] * growth / 3600 / (CORES / 2),
        "scratch_tb": measured["disk_gb"] * PAPER / behaviours / 1e3,
        "memory_gb": (
            CORES * MEMORY_OF_CORE
            + PAPER / BEHAVIOURS_PER_ITEM * BYTES_PER_ITEM
            + PAPER / BEHAVIOURS_PER_USER * BYTES_PER_USER
        )
        / 1e9,
    }


def on_spark(folder: Path, behaviours: int, expected: str, memory: int) -> dict[str, Any]:
    """The same program on Spark, all cores of this machine; what a behaviour costs is the slope
    between two sizes, since starting Spark and its jobs costs the same at any size."""
    measured = in_process("spark", folder, folder / "root_spark", memory)
    few = folder / "few"
    few.mkdir()
    make_logs(few, behaviours // 5)
    less = in_process("spark", few, few / "root", memory)
    cores = len(os.sched_getaffinity(0))
    slope = (measured["s"] - less["s"]) / (behaviours - behaviours // 5)
    return {
        "behaviours": behaviours,
        "s": measured["s"],
        "s_of_a_fifth": less["s"],
        "same_digest": Path(measured["path"]).name == Path(expected).name,
        "stages_s": measured["stages"],
        "paper_core_hours": slope * cores * PAPER / 3600,
        "paper_hours_on_640_cores": slope * cores * PAPER / 3600 / 320,
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    flat = {}
    for key, value in found.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{key}.{name}" if name else key] = number
    shown: Callable[[Any], str] = lambda v: (  # noqa: E731
        f"{v:,}" if isinstance(v, int) else f"{v:,.3g}" if v < 1e4 else f"{v:,.0f}"
    )
    flat = {k: v for k, v in flat.items() if not isinstance(v, dict)}
    return "\n".join(f"{key:<36}{shown(value):>16}" for key, value in flat.items())


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--behaviours", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 million, once: within 50 s")
    parser.add_argument("--spark", action="store_true", help="run a fifth of them on Spark, too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument(
        "--memory", type=int, default=memory_of_database(), help="of the database [bytes]"
    )
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["duckdb", "spark", "floor"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "floor":
        floor(args.folder, args.root, args.memory)
    elif args.side:
        ours(args.folder, args.root, args.side, args.memory)
    else:
        behaviours, repeats = (4_000_000, 1) if args.quick else (args.behaviours, args.repeats)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found = compare(Path(folder), behaviours, repeats, args.spark, args.memory)
        print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
