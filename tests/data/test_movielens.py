"""The source of MovieLens: the real ml-latest-small; fixtures of ours for the older formats."""

import csv
import gzip
from collections import Counter
from pathlib import Path

import pytest

from scaling.config import ConfigError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config, source_files
from scaling.data.sources.movielens import rows

CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "movielens.toml"
# Of ours, in the format of ml-1m (https://files.grouplens.org/datasets/movielens/ml-1m-README.txt).
DAT = {
    "movies.dat": "1::Oak, The: A Story (1995)::Animation|Children's\n7::Misérable (1995)::Drama\n",
    "ratings.dat": "1::7::5::978300760\n1::1::3::978302109\n22::9::4::978301968\n",
}
# Of ours, in that of ml-latest (https://files.grouplens.org/datasets/movielens/ml-latest-README.html).
CSV = {
    "movies.csv": 'movieId,title,genres\n1,"Oak, The: A Story (1995)",Animation|Children\'s\n'
    "7,Misérable (1995),Drama\n8,Pine Road,(no genres listed)\n",
    "ratings.csv": "userId,movieId,rating,timestamp\n"
    "1,7,5.0,978300760\n1,1,3.0,978302109\n22,9,4.0,978301968\n",
    "tags.csv": "userId,movieId,tag,timestamp\n22,8,\"slow, 'good'\",978301970\n",
}


def write(folder, tables, encoding="utf-8"):
    for name, text in tables.items():
        raw = text.encode(encoding)
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def read(folder, **keys):
    table = {"kind": "movielens", "path": str(folder), **keys}
    return list(rows(source_config(table, "test"), folder))


def expected(line):
    return [
        Log("1", "ratings", "7", "Misérable (1995)", 978300760, line, 5.0, "Drama"),
        Log(
            "1",
            "ratings",
            "1",
            "Oak, The: A Story (1995)",
            978302109,
            line + 1,
            3.0,
            "Animation|Children's",
        ),
        Log("22", "ratings", "9", None, 978301968, line + 2, 4.0),
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])  # ml-1m; ml-10m
def test_dat(tmp_path, encoding):
    write(tmp_path, DAT, encoding)
    assert read(tmp_path) == expected(1)
    write(tmp_path, {"tags.dat": "15::4973::excellent: really!::1215184630\n"})  # ml-10m
    *_, tag = read(tmp_path, tags="words")
    assert tag == Log("15", "words", None, "excellent: really!", 1215184630, 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv(tmp_path, suffix):
    write(tmp_path, {f"{name}{suffix}": text for name, text in CSV.items()})
    assert read(tmp_path) == expected(2)
    found = read(tmp_path, ratings="films", tags="words")
    assert [log.service for log in found] == ["films"] * 3 + ["words"]
    assert found[3] == Log("22", "words", None, "slow, 'good'", 978301970, 2)
    config = source_config({"kind": "movielens", "path": ".", "tags": "words"}, "test")
    names = [f"{table}.csv{suffix}" for table in ("movies", "ratings", "tags")]
    assert [p.name for p in source_files(config, tmp_path)] == names


def test_genres_join_the_title(tmp_path):
    tables = {**CSV, "ratings.csv": CSV["ratings.csv"] + "22,8,1.5,978301970\n"}
    write(tmp_path, tables)
    texts = ["Misérable (1995) Drama", "Oak, The: A Story (1995) Animation Children's", None]
    assert [log.text for log in read(tmp_path, genres=True)] == [*texts, "Pine Road"]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("ratings.csv", "1,7,5.0", "3 fields, the header has 4"),
        ("ratings.csv", "+49 30 1234,7,5.0,978300760", "user is no number"),
        ("ratings.csv", "1,,5.0,978300760", "no film"),
        ("ratings.csv", "1,7,good,978300760", "rating is no number: text of 4 characters"),
        ("ratings.csv", "1,7,inf,978300760", "rating is no number: text of 3 characters"),
        ("ratings.csv", "1,7,5.0,978300760000", "not a time from 1970 to 2099: '978300760000'"),
        ("ratings.csv", "1,7,5.0,-1", "not a time from 1970 to 2099: '-1'"),
        ("movies.csv", "7", "1 fields, the header has 3"),
        ("movies.csv", "seven,Oak,Drama", "film is no number: text of 5 characters"),
        ("tags.csv", "1,7, ,978300760", "no tag"),
        ("ratings.dat", "1::7::5", "3 fields parted by '::' instead of 4"),
        ("movies.dat", "7::Oak::Pine::Drama", "4 fields parted by '::' instead of 3"),
        ("tags.dat", "1::7::Zelda::then", "not a time: text of 4 characters"),
    ],
)
def test_a_row_that_cannot_be_read_is_told(tmp_path, name, row, reason):
    dat = {**DAT, "tags.dat": "15::4973::slow::1215184630\n"}
    tables = dat if name.endswith(".dat") else CSV
    write(tmp_path, tables)
    whole = read(tmp_path, tags="words")
    write(tmp_path, {name: f"{tables[name]}\n{row}\n"})  # after a blank line
    found = read(tmp_path, tags="words")
    line = tables[name].count("\n") + 2
    assert [log.problem for log in found if log.problem] == [f"{tmp_path / name}:{line}: {reason}"]
    assert [log for log in found if not log.problem] == whole


def test_a_csv_that_is_not_utf_8_is_told_row_by_row(tmp_path):
    write(tmp_path, CSV, "latin-1")
    problem, *logs = read(tmp_path)
    assert problem.problem == f"{tmp_path / 'movies.csv'}:3: the line is not valid text"
    assert [log.text for log in logs] == [None, "Oak, The: A Story (1995)", None]


def test_missing_files_and_keys_are_told(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no ratings\.csv or ratings\.dat, plain or \.gz"):
        read(tmp_path)
    write(tmp_path, DAT)
    with pytest.raises(CorpusError, match=r"holds no tags\.csv or tags\.dat"):
        read(tmp_path, tags="tags")
    write(tmp_path, {"ratings.csv": "7,1,Zelda\n"})
    with pytest.raises(CorpusError, match="names no column 'userId', 'movieId'") as e:
        read(tmp_path)
    assert "Zelda" not in str(e.value)
    with pytest.raises(ConfigError, match="unknown key 'tag'"):
        read(tmp_path, tag="tags")


@pytest.fixture
def real(clue_test_data):
    return clue_test_data / "movielens_latest_small_2016"


def table(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.data
def test_ml_latest_small(real):
    found = read(real, tags="tags", genres=True)
    assert not any(log.problem for log in found)
    titles = {
        m["movieId"]: " ".join([m["title"], *m["genres"].split("|")])
        for m in table(real / "movies.csv.gz")
    }
    titles = {k: v.removesuffix(" (no genres listed)") for k, v in titles.items()}
    assert len(titles) == 9_125
    ratings, tags = found[:100_004], found[100_004:]
    assert [(r.user, r.item, r.text, r.rating, r.time) for r in ratings] == [
        (r["userId"], r["movieId"], titles[r["movieId"]], float(r["rating"]), int(r["timestamp"]))
        for r in table(real / "ratings.csv.gz")
    ]
    assert len({r.user for r in ratings}) == 671
    assert [(t.user, t.text, t.time) for t in tags] == [
        (t["userId"], t["tag"], int(t["timestamp"])) for t in table(real / "tags.csv.gz")
    ]
    assert len(tags) == 1_296


@pytest.mark.data
@pytest.mark.slow
def test_the_corpus_file(clue_test_data, real, tmp_path, monkeypatch):
    """Counts of a rating of 4 or more, by plain Python over the raw rows."""
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE, tmp_path))
    liked = [
        (r["userId"], r["movieId"])
        for r in table(real / "ratings.csv.gz")
        if float(r["rating"]) >= 4
    ]
    steps = {s["step"]: s for s in corpus.manifest["steps"]}
    assert steps["read"] == {"step": "read", "logs": 100_004, "malformed": 0}
    assert steps["rated"]["logs"] == steps["deduplicated"]["logs"] == len(set(liked)) == len(liked)
    assert corpus.n_items == len({m for _, m in liked})
    able = sum(n >= 4 for n in Counter(u for u, _ in liked).values())
    n_users = len({u for u, _ in liked})
    held = corpus.manifest["splits"]
    assert held["pretraining"] + held["validation"] + held["pool"] == n_users - round(0.4 * able)
