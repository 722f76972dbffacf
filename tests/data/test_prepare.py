import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling.config import ConfigError
from scaling.data.build import split_users
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.logs import clean_text
from scaling.data.prepare import find_prepared, memory_of_database, prepare, read_card
from scaling.data.recipe import Users, read_corpus_file
from scaling.data.scratch import scratch_folder
from scaling.data.tasks import Task

REPOSITORY = Path(__file__).parents[2]


def edited(root, old, new):
    """Change the corpus file of a tiny corpus."""
    path = root / "tiny.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def left(root):
    """What preparation left on disk, hidden files too."""
    return sorted(p.name for p in (root / "corpora").iterdir())


def test_doing_it_again_is_a_no_op(tiny_corpus):
    root = tiny_corpus()
    path = prepare(root / "tiny.toml", root)  # the copied logs have another path: done once more
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    stages = []
    assert prepare(root / "tiny.toml", root, progress=lambda *a: stages.append(a)) == path
    assert not stages
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert left(root) == [path.name]


def test_content_decides_the_digest(tiny_corpus):
    root = tiny_corpus()
    first = find_prepared(root, root / "tiny.toml")
    lines = (root / "logs.csv").read_text().splitlines()
    header, rows = lines[0], lines[1:]
    # Rows of one time keep their order; all else may come in any.
    rows = sorted(rows, key=lambda r: r.split(",")[3])
    (root / "logs.csv").write_text("\n".join([header, *rows]) + "\n")
    assert prepare(root / "tiny.toml", root) == first.path
    (root / "logs.csv").write_text("\n".join([header, *rows[200:]]) + "\n")
    second = prepare(root / "tiny.toml", root)
    assert second != first.path
    assert len(left(root)) == 2
    # Of the two the one that was made from the source as it is now.
    assert find_prepared(root, root / "tiny.toml").path == second
    assert read_card(root / "tiny.toml", root).digest == second.name.removeprefix("tiny-")
    os.utime(root / "logs.csv", (1, 1))
    with pytest.raises(CorpusError, match=r"several states of its source.*prepare it again"):
        find_prepared(root, root / "tiny.toml")
    assert prepare(root / "tiny.toml", root) == second
    assert find_prepared(root, root / "tiny.toml").path == second
    (root / "logs.csv").unlink()
    with pytest.raises(CorpusError, match="several states of its source"):
        find_prepared(root, root / "tiny.toml")


@pytest.mark.slow
def test_threads_do_not_change_the_content(tiny_corpus):
    root = tiny_corpus()
    corpus = find_prepared(root, root / "tiny.toml")
    expected = [corpus.path.name, *corpus.manifest["tasks"].values()]
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from scaling.data.engine import DuckDB
        opened = DuckDB.__init__
        def narrow(self, *args):
            opened(self, *args)
            self.con.raw_sql(f"SET threads = {sys.argv[2]}")
        DuckDB.__init__ = narrow
        from scaling.data.corpus import read_manifest
        from scaling.data.prepare import prepare
        path = prepare(Path(sys.argv[1]) / "tiny.toml", Path(sys.argv[1]) / sys.argv[2])
        print(path.name, *read_manifest(path)["tasks"].values())
        """
    )
    for threads in ("1", "5"):
        out = subprocess.run(
            [sys.executable, "-c", program, str(root), threads],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
            capture_output=True,
            text=True,
        )
        assert sorted(out.stdout.split()) == sorted(expected)


def test_a_task_is_added_beside_the_corpus(tiny_corpus):
    root = tiny_corpus()
    first = find_prepared(root, root / "tiny.toml")
    path = edited(
        root, "[tasks.beauty]", '[tasks.garden]\nservice = "garden"\nnegatives = 3\n[tasks.beauty]'
    )
    assert prepare(path, root) == first.path
    corpus = Corpus.open(first.path)
    corpus.verify()
    assert list(corpus.manifest["tasks"]) == ["beauty", "books", "garden"]
    for task, digest in first.manifest["tasks"].items():
        assert corpus.manifest["tasks"][task] == digest
    edited(root, "negatives = 3", "negatives = 4")
    with pytest.raises(CorpusError, match="there is a task 'garden' of other content") as e:
        prepare(path, root)
    assert str(e.value).endswith(f"if no run needs it, remove the folder {first.path}")
    assert left(root) == [first.path.name]
    Corpus.open(first.path).verify()


def test_a_task_that_no_manifest_lists_is_made_anew(tiny_corpus, monkeypatch):
    root = tiny_corpus()
    first = find_prepared(root, root / "tiny.toml")
    path = edited(
        root, "[tasks.beauty]", '[tasks.garden]\nservice = "garden"\nnegatives = 3\n[tasks.beauty]'
    )

    def crash(path, record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("scaling.data.prepare.write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, root)
    assert (first.path / "tasks" / "garden" / "task.json").exists()
    assert list(Corpus.open(first.path).manifest["tasks"]) == ["beauty", "books"]
    edited(root, "negatives = 3", "negatives = 4")
    corpus = Corpus.open(prepare(path, root))
    assert Task.open(corpus, "garden").negatives.shape[2] == 4
    corpus.verify()


def test_cards(tiny_corpus):
    root = tiny_corpus()
    card = read_card(root / "tiny.toml", root)
    assert card.digest == find_prepared(root, root / "tiny.toml").card.digest
    with pytest.raises(CorpusError, match=r"not prepared below .*; run: clue-scaling prepare"):
        read_card(root / "tiny.toml", root / "elsewhere")
    assert find_prepared(root / "elsewhere", root / "tiny.toml") is None
    paper = read_card(REPOSITORY / "sweeps/corpora/paper.toml", root)
    assert paper.digest is None
    assert paper.pool is None
    assert paper.n_users == 11_294_122
    assert paper.vocab_size == 50_257
    tokens = np.dot(paper.tokens_per_item, range(33))
    assert tokens * 5_313_992_425 == pytest.approx(50_741_643_225, rel=1e-6)
    for shares in paper.items_per_user.values():
        assert len(shares) == 513
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == 0
    with pytest.raises(CorpusError, match="a nominal corpus has no logs"):
        prepare(REPOSITORY / "sweeps/corpora/paper.toml", root)


def test_the_nominal_mean_is_that_of_the_counts():
    """Sampling the same lognormal gives the paper's behaviours and the card's shares."""
    card = read_card(REPOSITORY / "sweeps/corpora/paper.toml", Path("."))
    shares = np.array(card.items_per_user["search"])
    rng = np.random.default_rng(0)
    normal = 1.2 * rng.standard_normal(400_000)
    low, high = 0.0, 10.0
    mean = 5_313_992_425 / 11_294_122 / 2
    for _ in range(50):
        middle = (low + high) / 2
        draws = np.maximum(1, np.round(np.exp(middle + normal)))
        low, high = (middle, high) if draws.mean() < mean else (low, middle)
    counts = np.bincount(np.minimum(draws, 512).astype(int), minlength=513) / len(draws)
    assert np.abs(counts.cumsum() - shares.cumsum()).max() < 0.005


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('"logs.csv"', '"gone.csv"', CorpusError, r"gone\.csv: no such file"),
        ('"what"', '"title"', CorpusError, "names no column .title.; needed: who"),
        ("pool = 16", "pool = 900", CorpusError, "users.pool = 900 leave none for pretraining"),
        ("pool = 16", "pol = 16", ConfigError, "unknown key 'users.pol'; valid keys: "),
        ('"beauty"]', '"toys"]', ConfigError, "valid services: books, garden, toys"),
        ("negatives = 5", "negatives = 900", CorpusError, "touched all but"),
        (
            'service = "beauty"',
            'service = "books"',
            ConfigError,
            "would test on logs of pretraining",
        ),
        ("downstream = 0.3", "downstream = 0.0", ConfigError, "needs users.downstream > 0"),
        (
            "[users]",
            "[logs]\nmin_rating = 4\n[users]",
            CorpusError,
            "'books' has a rating; it needs",
        ),
        ("size = 320", "size = 9999999999999", ConfigError, "less than or equal to 1048576"),
        ("size = 320", "size = 259", ConfigError, "does not cover all texts: .* are 260 entries"),
        (
            "[users]",
            "[logs]\nk_core = 99\n[users]",
            CorpusError,
            r"left \(logs.k_core = 99: \d+ -> 0",
        ),
        (
            "[users]",
            "[logs]\nmin_per_month = 9e9\n[users]",
            CorpusError,
            r"'books' has no logs left \(logs.min_per_month = 9000000000.0: [\d,]+ -> 0\)",
        ),
        ("targets = 2", "targets = 200", CorpusError, "task 'books': no user has the 200 targets"),
    ],
)
def test_bad_corpus_files(tiny_corpus, old, new, error, message):
    root = tiny_corpus()
    before = left(root)
    path = edited(root, old, new)
    with pytest.raises(error, match=message):
        prepare(path, root)
    assert left(root) == before


def test_bad_logs(tiny_corpus):
    root = tiny_corpus()
    before, path, logs = left(root), root / "tiny.toml", root / "logs.csv"
    whole = logs.read_text()
    logs.write_text(whole + "u1,books,red book,soon\nu1,,x,1\n")
    lines = whole.count("\n")
    with pytest.raises(CorpusError) as e:
        prepare(path, root)
    assert f"2 of {lines + 1:,} rows are malformed, more than logs.max_malformed = 0.0:" in str(
        e.value
    )
    said = [
        f"{logs}:{lines + 1}: not a time: text of 4 characters",
        f"{logs}:{lines + 2}: no service ('where' is empty)",
    ]
    listed = root / "corpora" / "tiny.malformed.txt"
    assert str(e.value).endswith("".join(f"\n  {s}" for s in said) + f"\nall of them: {listed}")
    assert listed.read_text().splitlines() == said
    assert left(root) == [*before, listed.name]
    edited(root, "[users]", "[logs]\nmax_malformed = 0.01\n[users]")
    counted = Corpus.open(prepare(path, root)).manifest["steps"][0]
    assert counted == {"step": "read", "logs": lines + 1, "malformed": 2}
    assert listed.read_text().splitlines() == said
    before = left(root)
    before.remove(listed.name)  # the next source has no such rows

    logs.write_text("who,where,what,when\n")
    with pytest.raises(CorpusError, match=r"logs\.csv: no rows"):
        prepare(path, root)
    logs.write_text("who,where,what,when\nu1,books,a,1\nu1,beauty,a,1\n")
    with pytest.raises(CorpusError, match=r"no log of service 'garden' .* there: beauty, books"):
        prepare(path, root)
    logs.write_text("who,where,what,when\nu1,books,a,1\nu1,beauty,a,1\nu1,garden, ,1\n")
    with pytest.raises(CorpusError, match=r"'garden' has no logs left \(no text: 1 -> 0\)"):
        prepare(path, root)
    logs.write_text("who,where,what,when\nu1,books,a,1\nu2,garden,a,1\nu3,beauty,a,1\n")
    with pytest.raises(CorpusError, match="no user has 1 or more logs in each of the services"):
        prepare(path, root)
    assert left(root) == before


def test_ratings_that_leave_a_service_nothing(tiny_corpus):
    root = tiny_corpus()
    path, logs = root / "tiny.toml", root / "logs.csv"
    edited(root, 'time = "when"', 'time = "when", rating = "stars"')
    edited(root, "[users]", "[logs]\nmin_rating = 4.0\n[users]")
    rows = "who,where,what,when,stars\nu1,books,a,1,5\nu1,beauty,a,1,5\n"
    logs.write_text(rows + "u1,garden,a,1,3\nu1,garden,b,1,\n")
    with pytest.raises(CorpusError, match=r"no logs left \(logs.min_rating = 4.0: 2 -> 0\)"):
        prepare(path, root)
    logs.write_text(rows + "u1,garden,a,1,\n")
    with pytest.raises(CorpusError, match="no log of service 'garden' has a rating"):
        prepare(path, root)


def write_logs(root, rows):
    (root / "logs.csv").write_text("\n".join(["who,where,what,when", *rows]) + "\n")


def test_untitled_logs(tiny_corpus):
    """Refused unless they shall be dropped; a log is of its item's text where it has none."""
    root = tiny_corpus()
    rows = (root / "logs.csv").read_text().splitlines()[1:]
    write_logs(root, [*rows, "u1,books,,100", "u2,garden,  ,100"])
    with pytest.raises(
        CorpusError, match=rf"2 of {len(rows) + 2:,} logs have no text; logs.drop_un"
    ):
        prepare(root / "tiny.toml", root)
    edited(root, "[users]", "[logs]\ndrop_untitled = true\n[users]")
    steps = Corpus.open(prepare(root / "tiny.toml", root)).manifest["steps"]
    assert [s["logs"] for s in steps] == [len(rows) + 2, len(rows) + 2, len(rows)]
    edited(root, 'time = "when"', 'time = "when", item = "when"')
    who, where, _, when = rows[0].split(",")
    write_logs(root, [*rows, f"{who},{where},,{when}"])
    steps = Corpus.open(prepare(root / "tiny.toml", root)).manifest["steps"]
    assert [s["logs"] for s in steps] == [len(rows) + 1] * 3


def test_one_text_on_most_items(tiny_corpus):
    root = tiny_corpus()
    edited(root, 'time = "when"', 'time = "when", item = "when"')
    rows = [r.split(",") for r in (root / "logs.csv").read_text().splitlines()[1:]]
    write_logs(root, [f"{u},{s},{'same' if s == 'books' else t},{w}" for u, s, t, w in rows])
    n = len({w for u, s, t, w in rows if s == "books"})
    message = rf"{n:,} of the {n:,} items of service 'books' have one and the same text"
    with pytest.raises(CorpusError, match=message):
        prepare(root / "tiny.toml", root)


def test_all_logs_at_one_time(tiny_corpus):
    """A task whose histories are all empty is none."""
    root = tiny_corpus()
    rows = [r.split(",") for r in (root / "logs.csv").read_text().splitlines()[1:]]
    write_logs(root, [f"{u},{s},{t},86400" for u, s, t, _ in rows])
    with pytest.raises(CorpusError, match=r"'books': no user has a log before .* times alike\?"):
        prepare(root / "tiny.toml", root)


def test_a_rate_needs_times(tiny_corpus):
    root = tiny_corpus()
    edited(root, ', time = "when"', "")
    edited(root, "[users]", "[logs]\nmin_per_month = 0.5\n[users]")
    with pytest.raises(
        CorpusError, match=r"logs.min_per_month = 0.5, but [\d,]+ logs have no time"
    ):
        prepare(root / "tiny.toml", root)


@pytest.mark.parametrize("name", ["uid=1", "user=bob", "it's [50 %] *ü"])
def test_the_root_folder_does_not_matter(tiny_corpus, name):
    root = tiny_corpus()
    expected = find_prepared(root, root / "tiny.toml").path.name
    assert prepare(root / "tiny.toml", root / name).name == expected


@pytest.mark.slow
def test_two_at_once_lose_no_task(tiny_corpus):
    """Corpora of the same content with different tasks, prepared at the same time."""
    root = tiny_corpus()
    text, both = (root / "tiny.toml").read_text(), root / "both"
    program = "import sys; from pathlib import Path; from scaling.data.prepare import prepare; "
    program += "print(prepare(*map(Path, sys.argv[1:])))"
    running = []
    for name in "abcd":
        (root / name).mkdir()
        (root / name / "tiny.toml").write_text(text.replace("tasks.books]", f"tasks.{name}]"))
        shutil.copy(root / "logs.csv", root / name)
        arguments = [sys.executable, "-c", program, str(root / name / "tiny.toml"), str(both)]
        running.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
    said = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    (path,) = said
    corpus = Corpus.open(Path(path))
    assert set(corpus.manifest["tasks"]) == {*"abcd", "beauty"}
    corpus.verify()
    assert left(both) == [corpus.path.name]


def test_a_column_that_is_no_service(tiny_corpus):
    """Its values may be people: they are counted, not shown."""
    root = tiny_corpus()
    edited(root, 'service = "where"', 'service = "who"')
    with pytest.raises(CorpusError) as e:
        prepare(root / "tiny.toml", root)
    assert "services there: 64, too many for services; is it the right column?" in str(e.value)
    assert "u1" not in str(e.value)


def test_memory_of_the_database(monkeypatch, tmp_path):
    """One GiB a core, at most half of what machine and control groups allow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr("scaling.data.prepare._limits_of_groups", lambda: iter([]))
    assert memory_of_database() == min(64 * 2**30, machine // 2)
    monkeypatch.setattr("scaling.data.prepare._limits_of_groups", lambda: iter([6 * 2**30, 2**62]))
    assert memory_of_database() == 3 * 2**30
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert memory_of_database() == 2**30


def test_memory_is_no_key_of_spark(tiny_corpus):
    root = tiny_corpus()
    with pytest.raises(CorpusError, match="Spark's is in its own configuration"):
        prepare(root / "tiny.toml", root / "other", engine="spark", memory=10**9)


def test_a_damaged_corpus_is_not_taken_for_prepared(tiny_corpus):
    root = tiny_corpus()
    path = prepare(root / "tiny.toml", root)
    keys = path / "users" / "keys.npy"
    whole = keys.read_bytes()
    keys.write_bytes(whole[:-8])
    with pytest.raises(CorpusError, match=r"keys.npy: has \d+ bytes; its manifest says"):
        prepare(root / "tiny.toml", root)
    keys.write_bytes(whole)
    (path / "manifest.json").rename(root / "manifest.json")
    with pytest.raises(CorpusError, match=rf"{path.name}: has no manifest.*remove the folder"):
        prepare(root / "tiny.toml", root)


def test_another_corpus_of_the_root_may_be_broken(tiny_corpus):
    root = tiny_corpus()
    (root / "corpora" / "other-abcdefgh").mkdir()
    (root / "corpora" / "other-abcdefgh" / "manifest.json").write_text("{")
    assert prepare(root / "tiny.toml", root).name.startswith("tiny-")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["logs", "items", "histories"])
def test_interrupted(tiny_corpus, number, stage):
    """Nothing stays behind, hidden folders with ids and titles least of all."""
    root = tiny_corpus()
    before = left(root)
    edited(root, "vocab_size = 320", "vocab_size = 321")
    program = textwrap.dedent(
        f"""
        import os, sys
        import scaling.data.build as b
        def stop(done, total, stage):
            if stage == "{stage}":
                os.kill(os.getpid(), {int(number)})
        build = b.build
        import scaling.data.prepare as p
        p.build = lambda *a: build(*a[:-1], stop)
        from scaling.cli import main
        main()
        """
    )
    arguments = ["prepare", str(root / "tiny.toml"), "--root", str(root)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert left(root) == before


def test_ctrl_c_during_a_query(tiny_corpus, monkeypatch):
    root = tiny_corpus()

    def query(*args):
        raise RuntimeError("Query interrupted")

    edited(root, "vocab_size = 320", "vocab_size = 321")
    monkeypatch.setattr("scaling.data.prepare.build", query)
    with pytest.raises(KeyboardInterrupt):
        prepare(root / "tiny.toml", root)


def test_periods(tiny_corpus):
    root = tiny_corpus()
    times = {}
    for row in (root / "logs.csv").read_text().splitlines()[1:]:
        _, where, _, when = row.split(",")
        times.setdefault(where, []).append(int(when))
    assert find_prepared(root, root / "tiny.toml").manifest["times"] == {
        s: {"first": min(t), "last": max(t), "untimed": 0} for s, t in times.items()
    }


@pytest.mark.slow
def test_a_limit_on_file_sizes(tiny_corpus):
    """A limit on the size of files, at which a write fails as on a full disk."""
    root = tiny_corpus()
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from scaling import ClueError
        from scaling.data.prepare import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        try:
            prepare(Path(sys.argv[1]) / "tiny.toml", Path(sys.argv[1]) / "full")
        except ClueError as e:
            print(e)
        else:
            print("published")
        """
    )
    said = set()
    for limit in (1_000, 30_000):
        out = subprocess.run(
            [sys.executable, "-c", program, str(root), str(limit)],
            check=True,
            capture_output=True,
            text=True,
        )
        said.add("nothing was published" in out.stdout)
        assert left(Path(root) / "full") == []
    assert said == {True}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_tmpfs(tiny_corpus, tmp_path):
    root = tiny_corpus()
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(CorpusError, match="nothing was published"):
            prepare(root / "tiny.toml", small)
        assert left(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_killed_preparation_is_cleared_away_by_the_next(tiny_corpus):
    root = tiny_corpus()
    edited(root, "vocab_size = 320", "vocab_size = 321")
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from scaling.data.prepare import prepare
        def kill(done, total, stage):
            if stage == "items":
                os.kill(os.getpid(), signal.SIGKILL)
        prepare(Path(sys.argv[1]) / "tiny.toml", Path(sys.argv[1]), progress=kill)
        """
    )
    before = left(root)
    killed = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(left(root)) == len(before) + 1
    with scratch_folder(root / "corpora") as alive:  # clears the killed one's away
        assert left(root) == sorted([*before, alive.name])
        made = prepare(root / "tiny.toml", root)
        assert left(root) == sorted({*before, alive.name, made.name})
    assert left(root) == sorted({*before, made.name})


def test_texts_that_are_not_utf8_are_told(tiny_corpus):
    """Of a database's error only what holds no value: which file and column it is of."""
    root = tiny_corpus()
    rows = [r.split(",") for r in (root / "logs.csv").read_text().splitlines()[1:]]
    who, where, what, when = (pa.array(c) for c in zip(*rows, strict=True))
    raw = [t.encode() for t in what.to_pylist()]
    raw[7] = b"caf\xe9"
    text = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw).buffers())
    table = pa.table({"who": who, "where": where, "what": text, "when": when})
    pq.write_table(table, root / "logs.parquet")
    edited(root, "logs.csv", "logs.parquet")
    with pytest.raises(CorpusError, match=r"logs.parquet: column 'what' holds text not UTF-8$"):
        prepare(root / "tiny.toml", root)


def test_an_error_of_the_database_is_told(tiny_corpus, monkeypatch):
    root = tiny_corpus()
    before = left(root)

    def broken(*args):
        raise duckdb.IOException("no space left")

    monkeypatch.setattr("scaling.data.prepare.build", broken)
    edited(root, "vocab_size = 320", "vocab_size = 321")
    with pytest.raises(CorpusError, match="no space left; nothing was published"):
        prepare(root / "tiny.toml", root)
    assert left(root) == before


def test_recipes():
    """Name and tasks are not part of what decides tokenizer, items and users."""
    path = REPOSITORY / "sweeps/corpora/food_kitchen.toml"
    file = read_corpus_file(path)
    assert file.recipe == file.model_copy(update={"name": "other", "tasks": {}}).recipe
    users = file.users.model_copy(update={"salt": "x"})
    assert file.recipe != file.model_copy(update={"users": users}).recipe
    assert file.task_recipe("food") != file.task_recipe("kitchen")
    json.dumps(file.model_dump(mode="json"))


def test_clean_text():
    assert clean_text("&amp;quot;Tea&amp;quot;\n&#9733;\t x") == '"Tea" ★ x'
    assert clean_text(" &nbsp; ") == ""


def test_held_out_users_are_like_those_of_pretraining():
    """Downstream takes eligible users only; what it leaves must not gather in the pool."""
    rng = np.random.default_rng(0)
    n = 20_000
    counts = np.where(rng.random((n, 1)) < 0.3, 1, 9) * np.ones((1, 2), dtype=np.int64)
    hashes = [rng.integers(0, 2**63, n).astype(np.uint64) for _ in range(2)]
    rules = Users(eligible_logs=4, downstream=0.5, validation=1_000, pool=1_000)
    splits = split_users(counts, *hashes, rules, ("a", "b"), "test")
    assert (counts[splits["downstream"]] == 9).all()
    light = {name: (counts[rows, 0] == 1).mean() for name, rows in splits.items()}
    expected = 0.3 / (0.3 + 0.7 / 2)
    for name in ("pretraining", "validation", "pool"):
        error = np.sqrt(expected * (1 - expected) / len(splits[name]))
        assert abs(light[name] - expected) < 4 * error, name
