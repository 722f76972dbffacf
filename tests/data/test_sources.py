import gzip
import json
import math
import string
import tempfile
from contextlib import ExitStack, closing
from operator import itemgetter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.corpus import CorpusError
from scaling.data.engine import DuckDB, Spark
from scaling.data.sources import LOG, read_logs, resolve, source_config, source_files

COLUMNS = {"user": "u", "service": "s", "text": "t", "item": "i", "time": "w", "rating": "r"}


def table_source(*names, **keys):
    tables = [{"files": list(names), "columns": COLUMNS, **keys}]
    return source_config({"kind": "tables", "tables": tables}, "test")


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def engine(request, tmp_path_factory):
    """Each engine in turn."""
    if request.param == "spark":
        request.getfixturevalue("spark")
    kind = {"duckdb": DuckDB, "spark": Spark}[request.param]
    with closing(kind(tmp_path_factory.mktemp("scratch"))) as opened:
        yield opened


def read(config, base, engine=None):
    """Logs as a frame by position. Values are as the engine has them: missing is None."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine = engine or stack.enter_context(closing(DuckDB(Path(folder))))
        logs = read_logs(engine, config, base)
        rows = engine.rows(logs)
    assert list(logs.columns) == list(LOG)
    frame = pd.DataFrame(rows, columns=list(LOG), dtype=object)
    return frame.sort_values(["position", "problem"], ignore_index=True)


ROWS = [
    {"u": "7", "s": "a", "t": 'Tea, "green"', "i": "x1", "w": 86_400, "r": 5.0},
    {"u": "ü", "s": "b", "t": "", "i": "x2", "w": 0, "r": None},
    {"u": "7", "s": "a", "t": "two\nlines", "i": "x3", "w": 1_500_000_000, "r": 1.5},
]


def write(path, rows=ROWS):
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if ".jsonl" in path.name:
        text = "".join(json.dumps(r) + "\n" for r in rows)
    else:
        quoted = [["" if v is None else str(v) for v in r.values()] for r in rows]
        cells = [['"' + v.replace('"', '""') + '"' for v in r] for r in [list(rows[0]), *quoted]]
        tab = "\t" if ".tsv" in path.name else ","
        text = "".join(tab.join(c) + "\r\n" for c in cells)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize(
    "name", ["l.parquet", "l.csv", "l.csv.gz", "l.tsv", "l.jsonl", "l.jsonl.gz"]
)
def test_every_format_says_the_same(tmp_path, name):
    write(tmp_path / name)
    frame = read(table_source(name), tmp_path)
    assert frame.problem.isnull().all()
    assert frame.user.tolist() == ["7", "ü", "7"]
    assert frame.service.tolist() == ["a", "b", "a"]
    assert frame["item"].tolist() == ["x1", "x2", "x3"]
    assert frame.text.isnull().tolist() == [False, True, False]
    assert frame.text[0] == 'Tea, "green"'
    assert frame.text[2] == "two\nlines"
    assert frame.time.tolist() == [86_400, 0, 1_500_000_000]
    assert frame.rating.isnull().tolist() == [False, True, False]
    assert frame.rating[2] == 1.5


@pytest.mark.parametrize("name", ["l.parquet", "l.csv", "l.jsonl"])
def test_a_rating_that_is_no_finite_number_is_missing(tmp_path, name):
    ratings = [math.nan, math.inf, -math.inf, None, 4.0]
    write(tmp_path / name, [{**ROWS[0], "r": rating} for rating in ratings])
    frame = read(table_source(name), tmp_path)
    assert frame.problem.isnull().all()
    assert frame.rating.isnull().tolist() == [True, True, True, True, False]
    assert (frame.rating >= 4.0).sum() == 1  # as min_rating asks


def test_globs_several_files_and_a_fixed_service(tmp_path):
    (tmp_path / "b").mkdir()
    rows = [{k: v for k, v in r.items() if k != "s"} for r in ROWS]
    write(tmp_path / "b/1.csv", rows[:2])
    write(tmp_path / "b/2.csv", rows[2:])
    columns = {k: v for k, v in COLUMNS.items() if k != "service"}
    tables = [{"files": ["b/*.csv"], "columns": columns, "service": "food"}]
    config = source_config({"kind": "tables", "tables": tables}, "test")
    assert [p.name for p in source_files(config, tmp_path)] == ["1.csv", "2.csv"]
    frame = read(config, tmp_path)
    assert set(frame.service) == {"food"}
    assert frame["item"].tolist() == ["x1", "x2", "x3"]


@pytest.mark.parametrize(
    ("time", "unit", "seconds"),
    [
        ("1500000000", "s", 1_500_000_000),
        ("1500000000999", "ms", 1_500_000_000),
        ("1.5e9", "s", 1_500_000_000),
        ("1500000000.9", "s", 1_500_000_000),
        ("1499999999999999999", "ns", 1_499_999_999),
        ("2017-07-14", "s", 1_499_990_400),
        ("2017-07-14T02:40:00+00:00", "s", 1_500_000_000),
        ("2017-07-14 04:40:00+02:00", "s", 1_500_000_000),
        ("4102444799", "s", 4_102_444_799),
        (1_499_999_999_999_999_999, "ns", 1_499_999_999),
        (1.5e12, "ms", 1_500_000_000),
    ],
)
@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.parquet"])
def test_times(tmp_path, name, time, unit, seconds):
    write(tmp_path / name, [{**ROWS[0], "w": time}])
    assert read(table_source(name, time_unit=unit), tmp_path).time.tolist() == [seconds]


@pytest.mark.parametrize("time", ["-1", -1, 4_102_444_800, 1_500_000_000_000, 1e300, "2100-01-01"])
@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.parquet"])
def test_times_outside_1970_to_2099_are_malformed(tmp_path, name, time):
    write(tmp_path / name, [{**ROWS[0], "w": time}])
    problem = read(table_source(name), tmp_path).problem[0]
    line = 2 if name == "l.csv" else 1
    wrong = f"{tmp_path / name}:{line}: not a time from 1970 to 2099 (time_unit = 's')"
    no_value = name == "l.parquet" and isinstance(time, float)  # engines write floats in their ways
    assert problem == (wrong if no_value else f"{wrong}: {str(time)!r}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"7,a,tea,x,noon,5", "not a time: text of 4 characters"),
        (b",a,tea,x,1,5", "no user ('u' is empty)"),
        (b"7,,tea,x,1,5", "no service"),
        (b"7,a,tea,,1,5", "no item"),
        (b"7,a,tea,x,,5", "no time ('w' is empty)"),
        (b"7,a,tea,x,1,good", "not a rating: text of 4 characters"),
        (b"7,a,tea,x,1", "5 fields, the header has 6"),
        (b"7,a,t\xff\xfe,x,1,5", "'t' is not valid text"),
        (b"7,a,tea,x,99999999999999999999,5", "not a time"),
        (b"7,a," + b"x" * 200_000 + b",x,1,5", "not CSV: field larger than field limit"),
    ],
)
def test_malformed_rows_are_told_with_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "l.csv"
    path.write_bytes(b"u,s,t,i,w,r\n7,a,ok,x,1,5\n" + line + b"\n8,a,ok,x,1,5\n")
    frame = read(table_source("l.csv"), tmp_path)
    assert frame.problem.notnull().sum() == 1
    problem = frame.problem[frame.problem.notnull()].iloc[0]
    assert problem.startswith(f"{path}:3: ")
    assert reason in problem
    assert frame.user.notnull().sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.csv.gz", "l.jsonl.gz"])
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet=string.printable + '{}",:\\é\x00', max_size=200).map(str.encode),
    )
)
@settings(max_examples=20)
@example(raw=b'"')
@example(raw=b"[" * 100_000)
@example(raw=b'{"u": "\\ud800", "s": "a", "t": "", "i": 1, "w": 1}')
@example(raw=b'{"u": {}, "s": 1.5, "t": true, "w": 1e999}')
def test_arbitrary_bytes_never_break_a_parser(tmp_path_factory, name, raw):
    """Each row is sound or has a problem that names the file and a line."""
    folder = tmp_path_factory.mktemp("raw")
    header = b"u,s,t,i,w,r\n" if "csv" in name else b""
    (folder / name).write_bytes(
        raw if "gz" in name and raw[:1] == b"\x1f" else _packed(name, header + raw)
    )
    try:
        frame = read(table_source(name), folder)
    except CorpusError as error:  # nothing in it, or nothing of what is mapped
        told = str(error).startswith((f"{folder / name}: ", f"{name}: no row"))
        assert told, error  # noqa: PT017 - either outcome is right
        return
    sound = frame[frame.problem.isnull()]
    assert not sound[["user", "service", "item", "time"]].isnull().any(axis=None)
    assert all(p.startswith(f"{folder / name}:") for p in frame.problem.dropna())


def _packed(name, raw):
    return gzip.compress(raw) if name.endswith(".gz") else raw


def test_a_torn_gzip_is_told(tmp_path):
    lines = b"u,s,t,i,w,r\n" + b"".join(b"7,a,tea%d,x,1,5\n" % i for i in range(5_000))
    (tmp_path / "l.csv.gz").write_bytes(gzip.compress(lines)[:-300])
    frame = read(table_source("l.csv.gz"), tmp_path)
    assert "cannot be read further" in frame.problem.dropna().iloc[0]


def test_parquet_with_types_and_missing_values(tmp_path):
    import datetime as dt

    rows = pa.table(
        {
            "u": pa.array([1, None, 3], pa.int64()),
            "s": ["a", "a", ""],
            "t": ["x", None, "y"],
            "i": [1, 2, 3],
            "w": pa.array([dt.datetime(2017, 7, 14, 2, 40)] * 3, pa.timestamp("us")),
            "r": pa.array([1, None, 3], pa.float32()),
        }
    )
    pq.write_table(rows, tmp_path / "l.parquet")
    frame = read(table_source("l.parquet"), tmp_path)
    assert frame.user[0] == "1"
    assert frame.time[0] == 1_500_000_000
    problems = [None if p != p or p is None else p for p in frame.problem]
    path = tmp_path / "l.parquet"
    assert problems == [
        None,
        f"{path}:2: no user ('u' is empty)",
        f"{path}:3: no service ('s' is empty)",
    ]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("t", [["a", "b"]], "column 't' is of type list<element: string>; it must hold text"),
        ("t", [b"a"], "column 't' is of type binary; it must hold text or whole numbers"),
        ("u", [1.0], "column 'u' is of type double; it must hold text or whole numbers"),
        ("i", [True], "column 'i' is of type bool"),
        ("w", [True], "column 'w' is of type bool; it must hold times"),
        ("r", [[1.0]], "column 'r' is of type list<element: double>; it must hold numbers"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(tmp_path, column, values, message):
    write(tmp_path / "l.parquet", [{**ROWS[0], column: v} for v in values])
    with pytest.raises(CorpusError) as e:
        read(table_source("l.parquet"), tmp_path)
    assert str(e.value).startswith(f"{tmp_path / 'l.parquet'}: {message}")


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("w", [1.0, math.nan], "not a time from 1970 to 2099 (time_unit = 's')"),
        ("w", [1.0, math.inf], "not a time from 1970 to 2099 (time_unit = 's')"),
        (
            "w",
            [1, 2**64 - 1],
            "not a time from 1970 to 2099 (time_unit = 's'): '18446744073709551615'",
        ),
        ("w", ["1", "soon"], "not a time: text of 4 characters"),
        ("w", ["1", None], "no time ('w' is empty)"),
        ("r", ["5", "good"], "not a rating: text of 4 characters"),
    ],
)
def test_values_of_parquet_that_are_none_are_malformed_rows(tmp_path, column, values, reason):
    rows = {k: [v, v] for k, v in ROWS[0].items()}
    types = {2**64 - 1: pa.uint64()}
    table = pa.table({**rows, column: pa.array(values, types.get(values[1]))})
    pq.write_table(table, tmp_path / "l.parquet")
    frame = read(table_source("l.parquet"), tmp_path)
    assert frame.problem.isnull().tolist() == [True, False]
    assert frame.problem[1] == f"{tmp_path / 'l.parquet'}:2: {reason}"


def test_names_of_parquet_that_an_engine_cannot_tell_apart_are_refused(tmp_path):
    for name in ("file_row_number", "FILE_row_number", "T", "#path"):
        write(tmp_path / "l.parquet", [{**r, name: "same"} for r in ROWS])
        with pytest.raises(CorpusError, match=f"l.parquet: rename the columns .*{name!r}"):
            read(table_source("l.parquet"), tmp_path)


def test_parquet_columns_may_have_the_names_that_engines_use(tmp_path, engine):
    names = ("filename", "_metadata", "file_path", "file_index", "rowid", "a.b", "sel ect`")
    write(tmp_path / "l.parquet", [{**r, **dict.fromkeys(names, "same")} for r in ROWS])
    for name in names:
        source = table_source("l.parquet", columns={**COLUMNS, "item": name})
        frame = read(source, tmp_path, engine)
        assert frame["item"].tolist() == ["same"] * 3
        assert frame.position.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("l.parquet", b"hello", "cannot be read as Parquet"),
        ("l.csv.gz", b"u,s,t,i,w,r\n", "cannot be read: Not a gzipped file"),
        ("l.jsonl.gz", b"{}", "cannot be read: Not a gzipped file"),
        ("l.csv", b"u,s,t,i,w,r,t\n", "has 2 columns 't'"),
        ("l.csv", "u,s,t,i,w,r\n".encode("utf-16"), "not utf-8: it is UTF-16; set the table's key"),
        ("l.csv", "ü,s,t,i,w,r\n".encode("latin-1"), "not utf-8: its header cannot be read; set"),
        ("l.jsonl", "{}".encode("utf-16"), "not utf-8: it is UTF-16; set the table's key encoding"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CorpusError) as e:
        read(table_source(name), tmp_path)
    assert str(e.value).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize("name", ["l.parquet", "l.csv", "l.csv.gz", "l.jsonl"])
def test_a_table_without_rows_is_refused(tmp_path, name):
    write(tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    if name == "l.parquet":
        pq.write_table(pq.read_table(tmp_path / name)[:0], tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(CorpusError, match=f"{name}: no rows"):
        read(table_source(name), tmp_path)
    (tmp_path / f"more.{name}").write_bytes(raw)  # one of several may be empty
    assert len(read(table_source(name, f"more.{name}"), tmp_path)) == 3


def test_a_mapped_key_that_no_line_has_is_refused(tmp_path):
    rows = [{k: v for k, v in r.items() if k != "r"} for r in ROWS]
    write(tmp_path / "l.jsonl", rows)
    with pytest.raises(CorpusError, match=r"l\.jsonl: no row has 'r'; correct the table's columns"):
        read(table_source("l.jsonl"), tmp_path)
    write(tmp_path / "l.jsonl", [*rows, ROWS[0]])
    assert len(read(table_source("l.jsonl"), tmp_path)) == 4


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.timestamp(unit, "America/New_York") for unit in ("ms", "ns")),
    ],
    ids=str,
)
def test_timestamps_of_parquet(tmp_path, kind):
    moments = pa.array([1_500_000_000, 0, 4_102_444_799, 4_102_444_800], pa.int64())
    moments = moments.cast(pa.timestamp("s")).cast(pa.timestamp(kind.unit)).cast(kind)
    rows = {k: [v] * 4 for k, v in ROWS[0].items()}
    pq.write_table(pa.table({**rows, "w": moments}), tmp_path / "l.parquet")
    frame = read(table_source("l.parquet"), tmp_path)
    assert frame.problem.isnull().tolist() == [True, True, True, False]
    assert frame.time[:3].tolist() == [1_500_000_000, 0, 4_102_444_799]


def test_nan_that_the_statistics_of_parquet_leave_out(tmp_path, engine):
    values = pa.array([1.0, math.nan, 2.0, 1e300])
    columns = {k: [v] * 4 for k, v in ROWS[0].items()} | {"w": values, "r": values}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    logs = read_logs(engine, table_source("l.parquet"), tmp_path)
    logs = engine.store("logs", logs)
    by_position = sorted(engine.rows(logs), key=itemgetter("position"))
    assert [row["problem"] is None for row in by_position] == [True, False, True, False]
    assert engine.value(logs.filter(logs.rating > 1.5).count()) == 2


def test_wrong_sources_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"valid kinds: amazon_reviews, .*, synthetic, tables"):
        source_config({"kind": "tabels"}, "test")
    with pytest.raises(ConfigError, match=r"unknown key 'tables.0.file'; valid keys"):
        source_config({"kind": "tables", "tables": [{"file": "x"}]}, "test")
    with pytest.raises(CorpusError, match=r"gone\.csv: no such file"):
        source_files(table_source("gone.csv"), tmp_path)
    with pytest.raises(CorpusError, match=r"\*.csv: no such file"):
        source_files(table_source("*.csv"), tmp_path)
    (tmp_path / "l.csv").write_text("u,s,t,i,w\n")
    with pytest.raises(CorpusError, match="has no column 'r'; its columns: i, s, t, u, w"):
        read(table_source("l.csv"), tmp_path)
    (tmp_path / "l.xls").write_text("")
    with pytest.raises(CorpusError, match="format unknown"):
        read(table_source("l.xls"), tmp_path)
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert resolve(tmp_path, "$SOME_DATA/x") == tmp_path / "x"
    with pytest.raises(ConfigError, match=r"\$NO_SUCH_DATA is not set"):
        resolve(tmp_path, "$NO_SUCH_DATA/x")


def amazon(folder, sequences, item_map='{"A": [1, 0], "B": [2, 1]}', titles="A\tTea\nX\tno use\n"):
    (folder / "s.txt").write_text(sequences)
    (folder / "m.txt").write_text(item_map)
    (folder / "a.tsv").write_text(titles)
    (folder / "b.tsv").write_text("")
    return source_config(
        {
            "kind": "amazon_sequences",
            "sequences": "s.txt",
            "item_map": "m.txt",
            "titles": {"food": "a.tsv", "kitchen": "b.tsv"},
        },
        "test",
    )


def test_amazon_sequences(tmp_path):
    config = amazon(tmp_path, "0 1|100 2|200\n1 3|5 2|x 2\n 1|7\n", titles="A\tTea\nbroken\n")
    assert len(source_files(config, tmp_path)) == 4
    frame = read(config, tmp_path)
    sound = frame[frame.problem.isnull()]
    assert sound.user.tolist() == ["0", "0"]
    assert sound["item"].tolist() == ["A", "B"]
    assert sound.service.tolist() == ["food", "kitchen"]
    assert sound.text.isnull().tolist() == [False, True]
    assert sound.time.tolist() == [100, 200]
    where = tmp_path / "s.txt"
    assert sorted(frame.problem.dropna()) == [
        f"{tmp_path / 'a.tsv'}:2: not 'asin<TAB>title'",
        f"{where}:2: not 'item|unixtime': '2'",
        f"{where}:2: not 'item|unixtime': text of 3 characters",
        f"{where}:2: unknown item 3",
        f"{where}:3: no user",
    ]


@pytest.mark.parametrize("item_map", ["", "[]", '{"A": 1}', '{"A": [1, 2]}', '{"A": [1, -1]}'])
def test_a_wrong_item_map_is_refused(tmp_path, item_map):
    with pytest.raises(CorpusError, match="not a JSON object of asin"):
        read(amazon(tmp_path, "", item_map), tmp_path)
