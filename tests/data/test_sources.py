import csv
import datetime as dt
import gzip
import json
import math
import os
import string
import tempfile
from contextlib import ExitStack, closing
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from zoneinfo import ZoneInfo

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.corpus import CorpusError
from scaling.data.engine import DuckDB
from scaling.data.sources import (
    LOG,
    SCHEMA,
    read_logs,
    refuse_foreign,
    resolve,
    source_config,
    source_files,
    texts,
)
from scaling.data.sources.delimited import MOST_LINES
from scaling.data.sources.layout import Columns, LogTable
from scaling.data.sources.text_rows import TextFile

COLUMNS = {"user": "u", "service": "s", "text": "t", "item": "i", "time": "w", "rating": "r"}


def table_source(*names, **keys):
    tables = [{"files": list(names), "columns": COLUMNS, **keys}]
    return source_config({"kind": "tables", "tables": tables}, "test")


def read(config, base, engine=None):
    """Logs as a frame by position. Values are as the engine has them: missing is None."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine = engine or stack.enter_context(closing(DuckDB(Path(folder))))
        logs = read_logs(engine, config, base)
        engine.write(logs, Path(folder) / "logs.parquet")
        table = pq.read_table(Path(folder) / "logs.parquet")
    assert table.schema.types == SCHEMA.types
    rows = table.to_pylist()
    assert list(logs.columns) == list(LOG)
    frame = pd.DataFrame(rows, columns=list(LOG), dtype=object)
    return frame.sort_values(["position", "problem", "user"], ignore_index=True)


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


@pytest.mark.parametrize("header", [b"1500000000,alice@example.org,a,mug", b"u,1,2,i"])
def test_the_first_line_of_a_csv_without_header_is_not_shown(tmp_path, header):
    (tmp_path / "l.csv").write_bytes(header + b"\n")
    with pytest.raises(CorpusError) as e:
        read(table_source("l.csv"), tmp_path)
    missing = "'s', 't', 'w', 'r'" if header[:1] == b"u" else "'u', 's', 't', 'i', 'w', 'r'"
    assert str(e.value) == (
        f"{tmp_path / 'l.csv'}: its first line names no column {missing}; needed: u, s, t, i, w, r"
    )


def test_users_are_not_shown(tmp_path):
    write(tmp_path / "l.jsonl", [{**ROWS[0], "u": user} for user in (12_345.0, [7], 30.5, True)])
    frame = read(table_source("l.jsonl"), tmp_path)
    assert frame.problem.tolist() == [
        f"{tmp_path / 'l.jsonl'}:{n}: 'u' is no text or whole number" for n in range(1, 5)
    ]


def test_a_torn_gzip_is_told(tmp_path):
    lines = b"u,s,t,i,w,r\n" + b"".join(b"7,a,tea%d,x,1,5\n" % i for i in range(5_000))
    (tmp_path / "l.csv.gz").write_bytes(gzip.compress(lines)[:-300])
    with pytest.raises(CorpusError, match=r"l.csv.gz: cannot be read to its end: Compressed file"):
        read(table_source("l.csv.gz"), tmp_path)


@pytest.mark.parametrize("closed", [False, True])
def test_lines_in_a_stray_quote_are_lost_but_counted(tmp_path, closed):
    """One that nothing closes, and two, between which all would be one long title."""
    rows = [f"u{i},a,tea {i},x{i},1,5" for i in range(1_000)]
    rows[300] = 'u300,a,"tea 300,x300,1,5'
    if closed:
        rows[800] = 'u800,a,tea 800",x800,1,5'
    (tmp_path / "l.csv").write_text("\n".join(["u,s,t,i,w,r", *rows]) + "\n")
    frame = read(table_source("l.csv"), tmp_path)
    lost = range(300, 801 if closed else 1_000)
    assert frame.user.dropna().tolist() == [f"u{i}" for i in range(1_000) if i not in lost]
    assert len(frame.problem.dropna()) == len(lost)


def test_parquet_with_types_and_missing_values(tmp_path):
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


@pytest.mark.parametrize("dictionary", [True, False])
def test_texts_of_parquet_that_are_not_utf8(tmp_path, engine, dictionary):
    """As written by programs that do not look at what they call text."""
    raw = ["tea", "caf\udce9", None]
    raw = pa.array([t and t.encode(errors="surrogateescape") for t in raw])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    rows = {k: [v] * 3 for k, v in ROWS[0].items()}
    write(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({**rows, "t": texts}), tmp_path / "b.parquet", use_dictionary=dictionary
    )
    source = table_source("*.parquet")
    with pytest.raises((CorpusError, duckdb.InvalidInputException)) as told:
        read(source, tmp_path, engine)
    with pytest.raises(CorpusError) as e:
        refuse_foreign(source, tmp_path)
    assert isinstance(told.value, duckdb.Error) or str(told.value) == str(e.value)
    assert str(e.value) == f"{tmp_path / 'b.parquet'}: column 't' holds text not UTF-8"


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


# --- both engines, and Python, say the same -------------------------------------------------------

NUMBERS = (
    *("0", "5", "+5", "-1", "-0", "007", "1500000000", "4102444799", "4102444800", "1499999999999"),
    *(
        "1.5",
        "5.",
        ".5",
        "-.5",
        "+1.5E9",
        "1e400",
        "-1e400",
        "1e-400",
        "9" * 25,
        "9" * 400,
        "1_000",
    ),
    *(
        " 5 ",
        "\t5",
        "5\n",
        "5 5",
        "5d",
        "5f",
        "0x10",
        "1e",
        "e1",
        "--5",
        "+",
        ".",
        "٣",
        "1,5",
        "5%",
    ),
    *(
        "nan",
        "NaN",
        "-nan",
        "inf",
        "+Infinity",
        "infinit",
        "null",
        "true",
        "five",
        "it's",
        "\\",
        "${x}",
    ),
    *(
        "1500000000.9",
        "4102444799.9",
        "-0.5",
        "1" + "0" * 17,
        "1" + "0" * 18,
        "9223372036854775808",
    ),
    *(
        "x" * 30,
        "x" * 999,
        "x" * 1_000,
        "ü" * 31,
        "x" * 1_234_567,
        "1" * 31,
        "2018-13-01 25:00",
        "😀",
    ),
)
MOMENTS = (
    *(
        "2017-07-14",
        "2017-02-29",
        "2016-02-29",
        "2017-02-30",
        "2017-7-14",
        "20170714",
        "2100-01-01",
    ),
    *("2017-07-14T02:40:00", "2017-07-14 02:40", "2017-07-14 02:40Z", "2017-07-14T02:40:00Z"),
    *("2017-07-14T02:40:00+00:00", "2017-07-14 04:40:00+02", "2017-07-14 04:40:00.9+0200"),
    *("2017-07-14T02:40:00.123456789-05:30", "2017-07-14T02:40:00,5", "2017-07-14T24:00:00"),
    *("2017-07-14T02:60:00", "2017-07-14T02:40:60", "2017-07-14t02:40:00z", "2017-07-14T02"),
    *("2017-07-14T02:40:00 +02:00", "2017-07-14T02:40:00 UTC", " 2017-07-14", "2017-07-14T"),
    *("1970-01-01T01:00:00+01:00", "1970-01-01T00:59:59+01:00", "2099-12-31T23:59:59.9"),
    *("2099-12-31T23:59:59-00:01", "0000-01-01", "9999-12-31", "12017-01-01", "epoch", "now"),
    *("today", "infinity", "2017-W28-5", "2017-07-14T02:40:00+23:59", "2017-07-14T02:40:00+24:00"),
)


def outcomes(name, rows, folder, engine=None, **keys):
    """What each row is read as: its time and rating, or what is said of it."""
    folder.mkdir(exist_ok=True)
    rows = [{**ROWS[0], "i": str(n), **row} for n, row in enumerate(rows)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=7)
    else:
        write(folder / name, rows)
    frame = read(table_source(name, **keys), folder, engine)
    found = {}
    for item, time, rating, problem in zip(
        frame["item"], frame.time, frame.rating, frame.problem, strict=True
    ):
        if problem is None:
            found[int(item)] = (time, rating)
        else:
            line, _, reason = problem.removeprefix(f"{folder / name}:").partition(": ")
            found[int(line) - 1] = reason
    assert sorted(found) == list(range(len(rows)))
    return [found[n] for n in range(len(rows))]


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_texts_are_the_same_numbers_and_times_for_engines_and_for_python(tmp_path, engine, unit):
    texts = NUMBERS + MOMENTS
    rows = [{"w": v, "r": "5"} for v in texts] + [{"w": "5", "r": v} for v in texts]
    ours = outcomes("l.parquet", rows, tmp_path / "engine", engine, time_unit=unit)
    theirs = outcomes("l.jsonl", rows, tmp_path / "python", time_unit=unit)
    assert dict(zip(map(str, rows), ours, strict=True)) == dict(
        zip(map(str, rows), theirs, strict=True)
    )
    assert "not a rating: text of 1,234,567 characters" in ours
    if unit == "s":
        known = dict(zip(texts, ours, strict=False))
        assert known["2017-07-14 02:40Z"] == known["2017-07-14 04:40:00+02"] == (1_500_000_000, 5)
        assert known["2017-07-14T02:40:00.123456789-05:30"] == (1_500_000_000 + 19_800, 5)
        assert known["2017-07-14T02:40:00+23:59"] == (1_500_000_000 - 86_340, 5)
        assert known["1500000000.9"] == (1_500_000_000, 5)
        assert known["2017-02-30"] == "not a time: '2017-02-30'"
        assert known["2099-12-31T23:59:59-00:01"].startswith("not a time from 1970 to 2099")


@pytest.mark.slow
@given(texts=st.lists(st.from_regex(r"[0-9]{0,4}[-+.:eTZ 0-9]{0,12}", fullmatch=True), max_size=50))
@settings(max_examples=30)
def test_any_texts_are_the_same_numbers_and_times(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"w": v, "r": "5"} for v in ["", *texts]] + [{"w": "5", "r": v} for v in texts]
    ours = outcomes("l.parquet", rows, folder / "engine")
    assert ours == outcomes("l.jsonl", rows, folder / "python")


S = 1_500_000_000
UTC, NEW_YORK = dt.UTC, ZoneInfo("America/New_York")
FAR = dt.datetime(2100, 1, 1)
TYPED = [
    (pa.int8(), "s", [5, -1, None], [5, None, "no"]),
    (pa.uint32(), "s", [S, 2**32 - 1], [S, None]),
    (pa.int64(), "ns", [S * 10**9 - 1, -1, 2**63 - 1, -(2**63)], [S - 1, None, None, None]),
    (pa.uint64(), "ns", [S * 10**9 - 1, 2**64 - 1], [S - 1, None]),
    (pa.float32(), "s", [2.0**24, math.nan, math.inf], [2**24, None, None]),
    (pa.float64(), "ms", [S * 1e3 + 999.9, -0.1, math.nan, -math.inf, 1e300, 0.0],
     [S, None, None, None, None, 0]),
    (pa.decimal128(38, 10), "s", [Decimal("1500000000.9999999999"), Decimal("-0.1"),
     Decimal("9" * 28)], [S, None, None]),
    (pa.decimal128(20, 0), "ns", [Decimal(S * 10**9 - 1), Decimal("9" * 20)], [S - 1, None]),
    (pa.date32(), "s", [dt.date(2017, 7, 14), dt.date(1969, 12, 31), FAR.date()],
     [1_499_990_400, None, None]),
    (pa.date32(), "s", [47_481, 47_482, 2**31 - 2, 2**31 - 1, -(2**31), -(2**31) + 1],
     [4_102_358_400, None, "far", "far", "far", "far"]),
    (pa.timestamp("us"), "s", [dt.datetime(2017, 7, 14, 2, 39, 59, 999_999), FAR,
     dt.datetime(1, 1, 1)], [S - 1, None, None]),
    (pa.timestamp("us"), "s", [4_102_444_799_999_999, 4_102_444_800_000_000, -1, 2**63 - 1,
     2**63 - 2, -(2**63), -(2**63) + 1], [4_102_444_799, *[None] * 6]),
    (pa.timestamp("us", "Asia/Tokyo"), "s", [4_102_444_799_999_999, 2**63 - 1, 2**63 - 2],
     [4_102_444_799, None, None]),
    (pa.timestamp("ns"), "s", [S * 10**9 - 1, -1, 2**63 - 1], [S - 1, None, None]),
    (pa.timestamp("ns", "UTC"), "s", [S * 10**9 - 1, S * 10**9], [S - 1, S]),
    (pa.timestamp("ms", "America/New_York"), "s",
     [dt.datetime(2017, 7, 13, 22, 40, tzinfo=NEW_YORK), FAR.replace(tzinfo=UTC)], [S, None]),
    (pa.string(), "s", ["", None, str(S)], ["no", "no", S]),
    (pa.large_string(), "s", ["2017-07-14 02:40"], [S]),
    (pa.dictionary(pa.int32(), pa.string()), "s", ["2017-07-14", None, "x"],
     [1_499_990_400, "no", None]),
]  # fmt: skip
"""Types of times, their units, values, and the seconds they are; None: not one of 1970 to 2099."""


def test_times_of_every_type_are_the_same_for_engines(tmp_path, engine):
    tables = []
    for n, (kind, unit, values, _) in enumerate(TYPED):
        days = pa.types.is_date(kind) and isinstance(values[0], int)
        times = pa.array(values, pa.int32() if days else kind).cast(kind)
        columns = {k: [v] * len(times) for k, v in ROWS[0].items()} | {"w": times}
        columns["i"] = [f"{n}/{i}" for i in range(len(times))]
        pq.write_table(pa.table(columns), tmp_path / f"{n}.parquet")
        tables.append({"files": [f"{n}.parquet"], "columns": COLUMNS, "time_unit": unit})
    config = source_config({"kind": "tables", "tables": tables}, "test")
    frame = read(config, tmp_path, engine).set_index("item")
    for n, (kind, unit, values, seconds) in enumerate(TYPED):
        for i, (value, second) in enumerate(zip(values, seconds, strict=True)):
            row, what = frame.loc[f"{n}/{i}"], (kind, value)
            assert row.position == (n << 40) + i
            if isinstance(second, int):
                assert (row.time, row.problem) == (second, None), what
                continue
            where = f"{tmp_path / f'{n}.parquet'}:{i + 1}: "
            outside = f"{where}not a time from 1970 to 2099 (time_unit = {unit!r})"
            told = pa.types.is_integer(kind) or pa.types.is_date(kind) or kind == pa.decimal128(20)
            value = dt.date(2100, 1, 1) if value == 47_482 else value
            expected = {
                "no": f"{where}no time ('w' is empty)",
                "far": outside,
                "x": f"{where}not a time: text of 1 characters",
            }
            assert row.problem == expected.get(
                second or value, f"{outside}: '{value}'" if told else outside
            ), what


def test_ratings_and_ids_of_every_type_are_the_same_for_engines(tmp_path, engine):
    ratings = {
        pa.float32(): [0.1, math.nan, -math.inf, None],
        pa.float64(): [0.1, math.nan, math.inf, None],
        pa.int16(): [-3, 5, 0, None],
        pa.uint64(): [2**64 - 1, 2**53 + 1, 0, None],
        pa.decimal128(38, 20): [Decimal("0.1"), Decimal("123456789012345678.12345678901234567890"),
                                Decimal(0), None],
        pa.dictionary(pa.int8(), pa.string()): ["0.1", "nan", "-Infinity", ""],
        pa.null(): [None] * 4,
    }  # fmt: skip
    ids = {
        pa.uint64(): ([2**64 - 1, 0, 7, None], ["18446744073709551615", "0", "7", None]),
        pa.decimal128(38, 0): ([Decimal("9" * 38), Decimal(0), Decimal(-7), None],
                               ["9" * 38, "0", "-7", None]),
        pa.int8(): ([-128, 0, 7, None], ["-128", "0", "7", None]),
        pa.dictionary(pa.int8(), pa.large_string()): (["", "ä", "'\\", None],
                                                      [None, "ä", "'\\", None]),
    }  # fmt: skip
    expected = {}
    tables = []
    for n, (kind, values) in enumerate(ratings.items()):
        columns = {k: [v] * 4 for k, v in ROWS[0].items()} | {"r": pa.array(values, kind)}
        pq.write_table(pa.table(columns), tmp_path / f"r{n}.parquet")
        numbers = [None if v in (None, "") else float(np.float32(v) if kind == pa.float32() else v)
                   for v in values]  # fmt: skip
        expected[len(tables)] = [v if v is None or math.isfinite(v) else None for v in numbers]
        tables.append({"files": [f"r{n}.parquet"], "columns": COLUMNS})
    for n, (kind, (values, _)) in enumerate(ids.items()):
        columns = {k: [v] * 4 for k, v in ROWS[0].items()} | {"i": pa.array(values, kind)}
        pq.write_table(pa.table(columns), tmp_path / f"i{n}.parquet")
        tables.append({"files": [f"i{n}.parquet"], "columns": COLUMNS})
    config = source_config({"kind": "tables", "tables": tables}, "test")
    frame = read(config, tmp_path, engine)
    for n in range(len(tables)):
        rows = frame[frame.position.map(lambda p, n=n: p >> 40 == n)]
        if n in expected:
            assert rows.rating.tolist() == expected[n], tables[n]
            assert rows.problem.isnull().all()
        else:
            _, texts = list(ids.values())[n - len(expected)]
            assert rows["item"].tolist() == texts
            assert rows.problem.isnull().tolist() == [text is not None for text in texts]


def test_positions_of_a_column(tmp_path, engine):
    columns = {**COLUMNS, "position": "p"}
    values = [3, -(2**63), 2**63 - 1, None]
    write(
        tmp_path / "l.jsonl", [{**ROWS[0], "p": p} for p in [*values, 2**63, "7", "1.5", 2.5, 4.0]]
    )
    frame = read(table_source("l.jsonl", columns=columns), tmp_path)
    where = f"{tmp_path / 'l.jsonl'}:"
    assert set(frame.problem.dropna()) == {
        f"{where}5: not a position: '9223372036854775808'",
        f"{where}7: not a position: '1.5'",
        f"{where}8: not a position: '2.5'",
    }
    assert sorted(frame.position.dropna()) == [-(2**63), 3, 4, 7, 2**63 - 1]
    for kind in (pa.int64(), pa.string(), pa.uint64(), pa.decimal128(38, 0)):
        given = pa.array([None if v is None else str(v) for v in [5, *values[2:]]]).cast(kind)
        rows = {k: [v] * 3 for k, v in ROWS[0].items()}
        pq.write_table(pa.table({**rows, "p": given}), tmp_path / "l.parquet")
        frame = read(table_source("l.parquet", columns=columns), tmp_path, engine)
        assert frame.problem.isnull().all()
        assert frame.position.tolist() == [5, 2**63 - 1, None]
    pq.write_table(
        pa.table({**rows, "p": pa.array([1, 2**63, 2], pa.uint64())}), tmp_path / "l.parquet"
    )
    frame = read(table_source("l.parquet", columns=columns), tmp_path, engine)
    where = f"{tmp_path / 'l.parquet'}:"
    assert frame.problem.dropna().tolist() == [f"{where}2: not a position: '9223372036854775808'"]


def test_order_without_times_asks_for_positions(tmp_path, engine):
    columns = {k: v for k, v in COLUMNS.items() if k != "time"} | {"position": "p"}
    for name in ("l.jsonl", "l.parquet", "t.parquet"):
        given = ["3", None, ""] if name != "l.parquet" else [3, None, None]
        write(tmp_path / name, [{**ROWS[0], "p": p} for p in given])
        frame = read(table_source(name, columns=columns), tmp_path, engine)
        assert frame.position.dropna().tolist() == [3]
        assert sorted(frame.problem.dropna()) == [
            f"{tmp_path / name}:{n}: no position ('p' is empty)" for n in (2, 3)
        ]


# --- folders of many files ------------------------------------------------------------------------


def test_a_folder_of_2000_parts(tmp_path, engine):
    folder = tmp_path / "logs"
    folder.mkdir()
    for n in range(2_000):
        columns = {k: [v] * 2 for k, v in ROWS[0].items()} | {"i": [f"{n}/0", f"{n}/1"]}
        pq.write_table(
            pa.table({**columns, "w": [n, -1 if n == 1_234 else n]}), folder / f"{n:04}.parquet"
        )
    (folder / "_SUCCESS").write_text("")
    frame = read(table_source("logs"), tmp_path, engine)
    assert frame["item"].tolist() == [f"{n}/{i}" for n in range(2_000) for i in (0, 1)]
    assert frame.position.tolist() == [(n << 40) + i for n in range(2_000) for i in (0, 1)]
    assert frame.problem.dropna().tolist() == [
        f"{folder / '1234.parquet'}:2: not a time from 1970 to 2099 (time_unit = 's'): '-1'"
    ]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
def test_values_in_names_of_folders(tmp_path, engine, kind):
    """Folders as Spark writes them: ``SparkSession.write.partitionBy``."""
    parts = {
        "s=food/w=2017-07-14": ("food", 1_499_990_400, None),
        "s=a%20b%3D%2Fc/w=5": ("a b=/c", 5, None),
        "s=ü+[1]{x}*?/w=5": ("ü+[1]{x}*?", 5, None),
        "s=__HIVE_DEFAULT_PARTITION__/w=5": (None, 5, "no service ('s' is empty)"),
        "s=x/w=soon": ("x", None, "not a time: text of 4 characters"),
    }
    left = {k: v for k, v in ROWS[0].items() if k not in "sw"}
    for n, name in enumerate(parts):
        (tmp_path / "logs" / name).mkdir(parents=True)
        write(tmp_path / "logs" / name / f"part {n}.{kind}", [{**left, "i": str(n)}])
    (tmp_path / "logs" / "_temporary" / "s=y" / "w=1").mkdir(parents=True)
    (tmp_path / "logs" / "_temporary" / "s=y" / "w=1" / f"part.{kind}").write_bytes(b"torn")
    for pattern in ("logs", "logs/s=*/**/*." + kind):
        frame = read(table_source(pattern), tmp_path, engine)
        said = [p and p.partition(f".{kind}:")[2].partition(": ")[2] for p in frame.problem]
        if kind == "parquet":
            rows = zip(frame["item"], frame.service, frame.time, said, strict=True)
            assert {i: row for i, *row in rows} == {
                str(n): list(value) for n, value in enumerate(parts.values())
            }
        else:
            sound = [(service, time) for service, time, why in parts.values() if why is None]
            found = zip(frame.service, frame.time, frame.problem, strict=True)
            assert sorted((s, t) for s, t, p in found if p is None) == sorted(sound)
            assert sorted(filter(None, said)) == sorted(why for *_, why in parts.values() if why)


def test_what_a_folder_holds(tmp_path):
    (tmp_path / "logs.parquet").mkdir()
    with pytest.raises(CorpusError, match=r"logs\.parquet: holds no file of a known format"):
        source_files(table_source("logs.parquet"), tmp_path)
    write(tmp_path / "logs.parquet" / "part-0.parquet")
    (tmp_path / "logs.parquet" / ".part-0.parquet.crc").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "_SUCCESS").write_text("")
    part = tmp_path / "logs.parquet" / "part-0.parquet"
    for names in (["logs.parquet"], ["*.parquet"], ["**/*.parquet"], ["logs.parquet", "l*/p*"]):
        assert source_files(table_source(*names), tmp_path) == [part]
    with pytest.raises(CorpusError, match=r"notes\.txt: format unknown"):
        source_files(table_source("*"), tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_file_by_two_names_is_read_once(tmp_path, engine, kind):
    write(tmp_path / f"l.{kind}")
    (tmp_path / f"latest.{kind}").symlink_to(f"l.{kind}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "here").symlink_to(tmp_path)
    first = tmp_path / f"l.{kind}"
    for names in (
        [f"*.{kind}"],
        [f"l.{kind}", f"latest.{kind}", f"sub/../l.{kind}"],
        [f"l.{kind}", f"here/l.{kind}"],
    ):
        source = table_source(*names)
        assert source_files(source, tmp_path) == [first]
        frame = read(source, tmp_path, engine)
        assert frame["item"].tolist() == ["x1", "x2", "x3"]
        assert frame.problem.isnull().all()
    left = {k: v for k, v in ROWS[0].items() if k != "s"}
    for service in ("s=a", "s=b"):
        (tmp_path / "logs" / service).mkdir(parents=True)
    write(tmp_path / "logs" / "s=a" / f"l.{kind}", [left])
    other = tmp_path / "logs" / "s=b" / f"l.{kind}"
    other.symlink_to(tmp_path / "logs" / "s=a" / f"l.{kind}")
    with pytest.raises(CorpusError, match=f"{other}: the same file as .*, in folders of other val"):
        source_files(table_source("logs"), tmp_path)


# --- text files in blocks -------------------------------------------------------------------------


CELLS = st.text(alphabet='ab",\n\r\0é', max_size=6)


@given(
    rows=st.lists(
        st.tuples(CELLS, CELLS, st.booleans(), st.sampled_from(["\n", "\r\n", "\r"])), max_size=30
    ),
    size=st.integers(1, 40),
)
@example(rows=[('"', "a", False, "\n"), ("b", "\n" * 6, True, "\n"), ("", "c", True, "\n")], size=3)
@settings(max_examples=300)
def test_blocks_of_csv_are_one_file(tmp_path_factory, rows, size):
    """However a file is cut, and whatever quotes it has: as by one parser over the whole file."""
    path = tmp_path_factory.mktemp("blocks") / "l.csv"
    text = "u,t\r\n"
    for a, b, quoted, end in rows:
        cells = ['"' + c.replace('"', '""') + '"' if quoted else c for c in (a, b)]
        text += ",".join(cells) + end
    path.write_bytes(text.encode())
    expected = []
    with open(path, newline="", encoding="utf-8") as f:
        reader = csv.reader(f, strict=True)
        header = next(reader)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error:
                fields = None
            if fields is None or reader.line_num - line >= MOST_LINES:
                expected += range(line, reader.line_num + 1)
            elif len(fields) != len(header) or not fields[0]:
                expected += [line] if fields else []
            else:
                expected.append((fields[0], fields[1] or None))
    table = LogTable(files=("l.csv",), columns=Columns(user="u", text="t"), service="s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BLOCK", size)
        patch.setattr(texts, "PIECE", max(1, size // 3))
        found = {5: texts.Found(table)}
        batches = list(texts.text_batches([TextFile(5, path, "csv", table)], found))
    logs = [row for batch in batches for row in batch.to_pylist()]
    sound = [(n, e) for n, e in enumerate(expected) if not isinstance(e, int)]
    assert [(r["position"] - 5 * 2**40, (r["user"], r["text"])) for r in logs if r["user"]] == sound
    lines = [r["problem"].removeprefix(f"{path}:").partition(":")[0] for r in logs if r["problem"]]
    assert sorted(map(int, lines)) == [e for e in expected if isinstance(e, int)]
    assert found[5].rows == len(expected)


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.csv.gz"])
def test_blocks_of_many_files_in_processes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(texts, "ALONE", 0)
    monkeypatch.setattr(texts, "BLOCK", 2_000)
    monkeypatch.setattr(texts.os, "sched_getaffinity", lambda _: {0, 1})
    for n in range(3):
        rows = [{**ROWS[2], "i": f"{n}/{i}", "w": -1 if i == 250 else i} for i in range(300)]
        write(tmp_path / f"{n}{name}", rows)
    frame = read(table_source(f"*{name}"), tmp_path)
    sound = frame[frame.problem.isnull()]
    kept = [(n, i) for n in range(3) for i in range(300) if i != 250]
    assert sound["item"].tolist() == [f"{n}/{i}" for n, i in kept]
    assert sound.position.tolist() == [(n << 40) + i for n, i in kept]
    assert set(sound.text) == {ROWS[2]["t"]}
    line = 251 if "jsonl" in name else 2 + 2 * 250  # each row of CSV here is two lines
    assert sorted(frame.problem.dropna()) == [
        f"{tmp_path / f'{n}{name}'}:{line}: not a time from 1970 to 2099 (time_unit = 's'): '-1'"
        for n in range(3)
    ]


def ends(block):
    os._exit(1)


def test_a_process_that_ends_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ALONE", 0)
    monkeypatch.setattr(texts.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(texts, "parse", ends)
    write(tmp_path / "l.csv")
    with pytest.raises(CorpusError, match="a process that parsed text files ended"):
        read(table_source("l.csv"), tmp_path)


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl"])
def test_a_file_of_another_encoding_is_refused_once(tmp_path, name):
    rows = [{**ROWS[0], "t": text} for text in ["plain", *["Thé für zwei"] * 20]]
    lines = [",".join(map(str, {**r, "t": r["t"]}.values())) for r in rows]
    text = "\n".join(["u,s,t,i,w,r", *lines]).replace('Tea, "green"', "Tea")
    if name == "l.jsonl":
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorpusError, match=r'set the table.s key encoding = "latin-1"') as e:
        read(table_source(name), tmp_path)
    assert str(e.value).startswith(f"{tmp_path / name}: not utf-8: ")
    frame = read(table_source(name, encoding="latin-1"), tmp_path)
    assert frame.text.tolist() == ["plain", *["Thé für zwei"] * 20]
    # Some rows of another encoding among those of the right one are theirs alone.
    mixed = text.encode() + b"\n" + b"\n".join(text.encode("latin-1").split(b"\n")[-12:])
    (tmp_path / name).write_bytes(mixed)
    frame = read(table_source(name), tmp_path)
    assert frame.problem.notnull().sum() == 12
    assert all("'t' is not valid text" in p for p in frame.problem.dropna())


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
    with pytest.raises(CorpusError, match="its first line names no column 'r'; needed: u, s, t"):
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


def joined(folder, **changes):
    """Two sets of which users 1 and 0 are one person, and each has another one."""
    amazon(folder, "0 1|100\n1 2|200\n")
    (folder / "u.txt").write_text('{"ANN": 0, "BEA": 1}')
    (folder / "s2.txt").write_text("0 1|150\n1 1|300\n2 1|400\n")
    (folder / "m2.txt").write_text('{"C": [1, 0], "A": [2, 1]}')
    (folder / "u2.txt").write_text('{"BEA": 0, "CAT": 1}')
    second = {
        "sequences": "s2.txt", "item_map": "m2.txt", "user_map": "u2.txt",
        "titles": {"beauty": "a.tsv", "garden": "b.tsv"},
    }  # fmt: skip
    source = {
        "kind": "amazon_sequences", "sequences": "s.txt", "item_map": "m.txt", "user_map": "u.txt",
        "titles": {"food": "a.tsv", "kitchen": "b.tsv"}, "joined": [{**second, **changes}],
    }  # fmt: skip
    return source_config(source, "test")


def test_sets_of_sequences_are_joined_by_raw_ids(tmp_path):
    config = joined(tmp_path)
    assert len(set(source_files(config, tmp_path))) == 8
    frame = read(config, tmp_path)
    sound = frame[frame.problem.isnull()].sort_values(["user", "time"])
    found = sound[["user", "service", "item", "time"]].to_numpy().tolist()
    assert found == [
        ["ANN", "food", "A", 100],
        ["BEA", "beauty", "C", 150],
        ["BEA", "kitchen", "B", 200],
        ["CAT", "beauty", "C", 300],
    ]
    assert frame.problem.dropna().tolist() == [f"{tmp_path / 's2.txt'}:3: unknown user '2'"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_map": None}, "give each a user_map"),
        ({"titles": {"food": "a.tsv"}}, "service 'food' is in more than one set"),
        ({"users": "u2.txt"}, "unknown key 'joined.0.users'; valid keys: item_map, sequences"),
    ],
)
def test_sets_that_cannot_be_joined_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        joined(tmp_path, **changes)


@pytest.mark.parametrize(
    ("user_map", "message"),
    [
        ("[]", "not a JSON object of raw id: user"),
        ('{"BEA": "x"}', "not a JSON object of raw id: user"),
        ('{"BEA": 0, "CAT": 0}', "1 raw ids have a number of another"),
    ],
)
def test_a_wrong_user_map_is_refused(tmp_path, user_map, message):
    config = joined(tmp_path)
    (tmp_path / "u2.txt").write_text(user_map)
    with pytest.raises(CorpusError, match=f"u2.txt: {message}"):
        read(config, tmp_path)


def test_a_source_of_one_set_has_the_digest_it_had(tmp_path):
    alone = amazon(tmp_path, "")
    assert set(alone.model_dump()) == {"kind", "sequences", "item_map", "titles"}
    assert {"user_map", "joined"} < set(joined(tmp_path).model_dump())
    assert "joined" not in joined(tmp_path).model_dump()["joined"][0]


@pytest.mark.parametrize(
    "item_map",
    ["", "[]", '{"A": 1}', '{"A": [1, 2]}', '{"A": [1, -1]}', '{"\\ud800": [1, 0]}'],
)
def test_a_wrong_item_map_is_refused(tmp_path, item_map):
    with pytest.raises(CorpusError, match="not a JSON object of asin"):
        read(amazon(tmp_path, "", item_map), tmp_path)
