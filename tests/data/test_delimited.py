"""What the sources of public sets share: whatever bytes a file holds, rows are logs or problems."""

import gzip

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scaling.data.corpus import CorpusError
from scaling.data.sources import TIMES, Log, source_config, source_module
from scaling.data.sources.delimited import csv_rows, find
from scaling.data.sources.values import finite_number, unix_time

# Of ours: sound tables of each kind, and a sound row of each. First those that name items.
MOVIELENS_CSV = {
    "movies.csv": ("movieId,title,genres", "1,Oak (1995),Drama|War"),
    "ratings.csv": ("userId,movieId,rating,timestamp", "1,1,5.0,978300760"),
    "tags.csv": ("userId,movieId,tag,timestamp", "1,1,slow,978300760"),
}
MOVIELENS_DAT = {
    "movies.dat": ("", "1::Oak (1995)::Drama|War"),
    "ratings.dat": ("", "1::1::5::978300760"),
    "tags.dat": ("", "1::1::slow::978300760"),
}
LASTFM = {
    "artists.dat": ("id\tname\turl\tpictureURL", "1\tThe Oaks\t\t"),
    "tags.dat": ("tagID\ttagValue", "1\tslow"),
    "user_artists.dat": ("userID\tartistID\tweight", "1\t1\t7"),
    "user_taggedartists.dat": ("userID\tartistID\ttagID\tday\tmonth\tyear", "1\t1\t1\t1\t4\t2009"),
}
COMPLETE_JOURNEY = {
    "products.csv": ("product_id,department,product_category,product_type", "1,DELI,CHEESE,BRIE"),
    "coupons.csv": ("coupon_upc,product_id", "50,1"),
    "transactions.csv": ("household_id,product_id,transaction_timestamp", "7,1,1485630413"),
    "coupon_redemptions.csv": ("household_id,coupon_upc,redemption_date", "7,50,2017-01-29"),
}
ONLINE_RETAIL = {
    "data.csv": (
        "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID",
        "536365,85123A,HEART HOLDER,6,12/1/2010 8:26,2.55,17850",
    )
}
KINDS = [
    ({"kind": "movielens", "path": ".", "tags": "tags"}, MOVIELENS_CSV),
    ({"kind": "movielens", "path": ".", "tags": "tags", "genres": True}, MOVIELENS_DAT),
    ({"kind": "lastfm", "path": "."}, LASTFM),
    (
        {"kind": "complete_journey", "path": ".", "items": "types", "coupons": "coupons"},
        COMPLETE_JOURNEY,
    ),
    ({"kind": "online_retail", "path": "data.csv", "user": "invoice"}, ONLINE_RETAIL),
]
NAMES_ITEMS = {"movies.csv", "movies.dat", "artists.dat", "tags.dat", "products.csv", "coupons.csv"}
EACH_TABLE = pytest.mark.parametrize(
    ("table", "tables", "name"),
    [pytest.param(k, t, n, id=f"{k['kind']}-{n}") for k, t in KINDS for n in t],
)


@pytest.mark.parametrize("closed", [False, True])
def test_lines_in_a_stray_quote_are_lost_but_counted(tmp_path, closed):
    """One that nothing closes, and two, between which all would be one long title."""
    rows = [f"{i},tea {i}" for i in range(100)]
    rows[30] = '30,"tea 30'
    if closed:
        rows[80] = '80 tea"'
    (tmp_path / "t.csv").write_text("\n".join(["id,title", *rows]) + "\n")
    found = list(csv_rows(tmp_path / "t.csv", ("id", "title")))
    lost = range(30, 81 if closed else 100)
    assert [line for line, _ in found] == [i + 2 for i in range(100)]
    assert [values for _, values in found if not isinstance(values, str)] == [
        [str(i), f"tea {i}"] for i in range(100) if i not in lost
    ]


def names_items(table, name):
    return name in NAMES_ITEMS and not (table["kind"] == "movielens" and name == "tags.dat")


def read(folder, table, tables, name, raw):
    """Logs and problems of a source, one of whose files holds ``raw`` below its header."""
    for other, (header, row) in tables.items():
        start = f"{header}\n" if header else ""
        (folder / other).write_bytes(start.encode() + (raw if other == name else row.encode()))
    return list(source_module(table["kind"], "test").rows(source_config(table, "test"), folder))


def check(found, folder):
    for log in found:
        if log.problem is not None:
            assert log == Log(problem=log.problem)
            assert log.problem.startswith(f"{folder}/")
        else:
            assert log.user
            assert log.service
            assert log.item or log.text or log.service == "deli"
            assert log.time is None or log.time in TIMES
        "".join(v for v in log if isinstance(v, str)).encode()  # what Parquet can hold


@EACH_TABLE
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="019,:\t\"'\r\n|-/.éT \x00", max_size=200).map(str.encode),
    )
)
@example(raw=b'"')
@example(raw=b"1,1,1,1,1,1,1\r\r\n\x85\xff,\n1\t1\t\x80\n1::\xff::1\n")
def test_arbitrary_bytes_never_break_a_source(tmp_path_factory, table, tables, name, raw):
    folder = tmp_path_factory.getbasetemp() / "-".join(tables)
    folder.mkdir(exist_ok=True)
    check(read(folder, table, tables, name, raw), folder)


@EACH_TABLE
@given(data=st.data())
def test_every_row_is_a_log_or_a_problem(tmp_path_factory, table, tables, name, data):
    """Rows out of sound ones and of others, without quotes, so that a line is a row."""
    folder = tmp_path_factory.getbasetemp() / "-".join(tables)
    folder.mkdir(exist_ok=True)
    header, row = tables[name]
    row = row.encode()
    junk = st.binary(max_size=20).map(lambda raw: raw.translate(None, b'"\r\n\xef'))
    at = st.integers(0, len(row))
    mangled = st.builds(lambda i, j, t: row[:i] + t + row[j:], at, at, junk)
    lines = data.draw(st.lists(st.one_of(st.just(row), mangled, junk), max_size=8))
    found = read(folder, table, tables, name, b"\n".join(lines))
    check(found, folder)
    first = 2 if header else 1
    there = [first + i for i, line in enumerate(lines) if line]
    start = f"{folder / name}:"
    problems = [log.problem for log in found if log.problem]
    told = [int(p[len(start) :].split(":")[0]) for p in problems if p.startswith(start)]
    assert set(told) <= set(there)
    assert len(told) == len(set(told))
    sound = [first + i for i, line in enumerate(lines) if line == row]
    if names_items(table, name):
        assert not set(told) & set(sound)
        return
    others = [n for n in tables if n != name and not names_items(table, n)]
    read_lines = [log.position for log in found if log.problem is None]
    for other in others:  # each has one row, in the line below its header
        read_lines.remove(2 if tables[other][0] else 1)
    assert sorted(read_lines + told) == there
    assert set(sound) <= set(read_lines)


def test_a_file_without_its_header_is_not_quoted(tmp_path):
    (tmp_path / "t.csv").write_text("Zelda,1\n")
    with pytest.raises(CorpusError) as e:
        list(csv_rows(tmp_path / "t.csv", ("user", "time")))
    said = "its first line names no column 'user', 'time'; needed: user, time"
    assert str(e.value) == f"{tmp_path / 't.csv'}: {said}"
    (tmp_path / "t.csv").write_text("x" * 200_000)  # longer than Python's csv takes
    with pytest.raises(CorpusError, match="its first line names no column"):
        list(csv_rows(tmp_path / "t.csv", ("user", "time")))


def test_rows_of_csv(tmp_path):
    (tmp_path / "t.csv").write_text('a,b,c\n1,"x\ny",3\n\n4,5\n"6",7,"8"""\n')
    rows = [(2, ["3", "1"]), (5, "2 fields, the header has 3"), (6, ['8"', "6"])]
    assert list(csv_rows(tmp_path / "t.csv", ("c", "a"))) == rows


def test_a_torn_file_is_refused_not_cut(tmp_path):
    lines = b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(20_000))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(lines)[:-2_000])
    with pytest.raises(CorpusError, match="cannot be read to its end"):
        list(csv_rows(tmp_path / "t.csv.gz", ("a", "b")))


def test_plain_goes_before_gz_and_the_first_name_before_others(tmp_path):
    for name in ("b.csv", "b.csv.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.csv").mkdir()
    assert find(tmp_path, "a.csv", "b.csv").name == "a.csv.gz"
    assert find(tmp_path, "c.csv", "b.csv").name == "b.csv"
    with pytest.raises(CorpusError, match=r"holds no c\.csv or d\.csv, plain or \.gz"):
        find(tmp_path, "c.csv", "d.csv")


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("0", 0),
        ("1485630413", 1_485_630_413),
        ("2017-01-28 19:06:53", 1_485_630_413),
        ("2017-01-28T19:06:53Z", 1_485_630_413),
        ("2017-01-28 20:06:53.9+01:00", 1_485_630_413),
        ("2017-01-28", 1_485_561_600),
        ("4102444799", 4_102_444_799),
    ],
)
def test_times(text, time):
    assert unix_time(text) == time


@pytest.mark.parametrize(
    "text",
    ["", " 1", "1e9", "²", "-1", "4102444800", "2100-01-01", "1_000", "2017-13-01", "2017-W28-5"],
)
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="not a time"):
        unix_time(text)


@pytest.mark.parametrize("text", ["", "nan", "-inf", "1,5", "0x1", "one", "1_000", "٣"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="price is no number"):
        finite_number(text, "price")
