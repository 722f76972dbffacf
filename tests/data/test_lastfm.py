"""The source of Last.fm 2K: the real files, and a fixture of ours in their format."""

import gzip
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config, source_files
from scaling.data.sources.lastfm import rows
from scaling.data.tasks import Task

CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "lastfm.toml"
# Of ours, in the format of the readme of hetrec2011-lastfm-2k.zip, with its ends of lines of DOS.
TABLES = {
    "artists.dat": 'id\tname\turl\tpictureURL\r\n51\tThe "Oaks\thttp://a\thttp://b\r\n52\tPine\t\t\r\n',
    "user_artists.dat": "userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n3\t99\t1\r\n",
    "tags.dat": "tagID\ttagValue\r\n13\tmüde\r\n52\tchill out\r\n",
    "user_taggedartists.dat": "userID\tartistID\ttagID\tday\tmonth\tyear\r\n"
    "2\t52\t13\t1\t4\t2009\r\n2\t51\t52\t29\t2\t2008\r\n3\t51\t7\t31\t12\t2010\r\n",
}


def write(folder, tables):
    for name, text in tables.items():
        raw = text.encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def read(folder, **keys):
    table = {"kind": "lastfm", "path": str(folder), **keys}
    return list(rows(source_config(table, "test"), folder))


def day(*date):
    return int(datetime(*date, tzinfo=UTC).timestamp())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_logs(tmp_path, suffix):
    write(tmp_path, {f"{name}{suffix}": text for name, text in TABLES.items()})
    assert read(tmp_path) == [
        Log("2", "listened", "51", 'The "Oaks', None, 2),
        Log("2", "listened", "52", "Pine", None, 3),
        Log("3", "listened", "99", None, None, 4),
        Log("2", "tagged", "13", "müde", day(2009, 4, 1), 2),
        Log("2", "tagged", "52", "chill out", day(2008, 2, 29), 3),
        Log("3", "tagged", "7", None, day(2010, 12, 31), 4),
    ]
    services = [log.service for log in read(tmp_path, listened="a", tagged="b")]
    assert services == ["a"] * 3 + ["b"] * 3
    config = source_config({"kind": "lastfm", "path": "."}, "test")
    assert {p.name for p in source_files(config, tmp_path)} == {f"{t}{suffix}" for t in TABLES}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("artists.dat", "53\tFir", "2 fields, the header has 4"),
        ("artists.dat", "Fir\t53\t\t", "id is no number: text of 3 characters"),
        ("tags.dat", "\tslow", "no id"),
        ("user_artists.dat", "12345.0\t51\t1", "user is no number"),
        ("user_taggedartists.dat", "2\t51\t13\t1\t4", "5 fields, the header has 6"),
        (
            "user_taggedartists.dat",
            "2\t51\t13\t1\t6\t1956",
            "dated 1956, before Last.fm began (2002)",
        ),
        (
            "user_taggedartists.dat",
            "2\t51\t13\t1\t5\t1979",
            "dated 1979, before Last.fm began (2002)",
        ),
        (
            "user_taggedartists.dat",
            "2\t51\t13\t1\t5\t-999",
            "dated -999, before Last.fm began (2002)",
        ),
        ("user_taggedartists.dat", "2\t51\t13\t30\t2\t2009", "not a time: '2009-02-30'"),
        ("user_taggedartists.dat", "2\t51\t13\t1\t1\t2100", "not a time from 1970 to 2099: '2100-"),
        ("user_taggedartists.dat", "2\t51\t13\t1\t1\tthen", "year is no whole number: text of 4"),
    ],
)
def test_a_row_that_cannot_be_read_is_told(tmp_path, name, row, reason):
    write(tmp_path, TABLES)
    whole = read(tmp_path)
    write(tmp_path, {name: f"{TABLES[name]}{row}\r\n"})
    found = read(tmp_path)
    (problem,) = (log.problem for log in found if log.problem)
    assert problem.startswith(f"{tmp_path / name}:{TABLES[name].count(chr(10)) + 1}: {reason}")
    assert [log for log in found if not log.problem] == whole


def test_missing_files_are_told(tmp_path):
    write(tmp_path, {name: text for name, text in TABLES.items() if name != "tags.dat"})
    with pytest.raises(CorpusError, match=r"holds no tags\.dat, plain or \.gz"):
        read(tmp_path)
    write(tmp_path, {"tags.dat": "13\tZelda\n"})
    with pytest.raises(CorpusError, match="names no column 'tagID', 'tagValue'") as e:
        read(tmp_path)
    assert "Zelda" not in str(e.value)


@pytest.fixture
def real(clue_test_data):
    return clue_test_data / "lastfm2k_hetrec"


def table(path):
    """Rows without quotes of any kind, the header left out."""
    with gzip.open(path, "rb") as f:
        return [line.decode().rstrip("\r\n").split("\t") for line in f][1:]


@pytest.mark.data
def test_hetrec(real):
    found = read(real)
    problems = [log.problem for log in found if log.problem]
    assert [p.split(": ")[1] for p in problems] == [
        f"dated {year}, before Last.fm began (2002)" for year in (1956, 1957, 1956, 1956, 1979)
    ]
    names = {row[0]: row[1] for row in table(real / "artists.dat.gz")}
    assert len(names) == 17_632
    listened = [log for log in found if log.service == "listened"]
    assert [(log.user, log.item, log.text, log.time) for log in listened] == [
        (user, artist, names[artist], None)
        for user, artist, _ in table(real / "user_artists.dat.gz")
    ]
    assert len(listened) == 92_834
    assert len({log.user for log in found} - {None}) == 1_892
    words = dict(table(real / "tags.dat.gz"))
    assert len(words) == 11_946
    tagged = [log for log in found if log.service == "tagged"]
    assert [(log.user, log.item, log.text, log.time) for log in tagged] == [
        (user, tag, words[tag], day(int(year), int(month), int(date)))
        for user, _, tag, date, month, year in table(real / "user_taggedartists.dat.gz")
        if int(year) > 2000
    ]
    assert len(tagged) == 186_479 - 5


@pytest.mark.data
@pytest.mark.slow
def test_the_corpus_file(clue_test_data, real, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE, tmp_path))
    steps = {s["step"]: s for s in corpus.manifest["steps"]}
    assert steps["read"] == {"step": "read", "logs": 92_834 + 186_479, "malformed": 5}
    assert steps["titled"]["logs"] == 92_834 + 186_479 - 5
    given = [r for r in table(real / "user_taggedartists.dat.gz") if int(r[5]) > 2000]
    assert steps["deduplicated"]["logs"] == 92_834 + len({(r[0], r[2]) for r in given})
    assert corpus.n_items == 17_632 + len({r[2] for r in given})
    tags, artists = defaultdict(set), defaultdict(set)
    for r in given:
        tags[r[0]].add(r[2])
    for user, artist, _ in table(real / "user_artists.dat.gz"):
        artists[user].add(artist)
    both = tags.keys() & artists.keys()
    eligible = sum(len(tags[u]) >= 4 and len(artists[u]) >= 4 for u in both)
    downstream = round(0.4 * eligible)
    assert sum(corpus.manifest["splits"].values()) == len(both) - downstream
    assert Task.open(corpus, "listened").n_users == downstream
    assert Task.open(corpus, "tagged").cut == "day"
