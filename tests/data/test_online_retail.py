"""The source of Online Retail: real rows, also rewritten in the formats of other copies."""

import csv
import gzip
import io
import sys
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config
from scaling.data.sources.online_retail import rows
from scaling.data.tasks import Task

CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "online_retail.toml"
HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
# Of ours, as the copy at hand is written: UTF-8, dates of ISO, customers as fractions.
SALES = '''
536365,85123A,WHITE HEART HOLDER ,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom
536365,85123A,WHITE HEART HOLDER ,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom
536365,85123A,WHITE HEART HOLDER ,2,2010-12-01 08:26:00,2.55,17850.0,United Kingdom
C536379,D,Discount,-1,2010-12-01 09:41:00,27.5,14527.0,United Kingdom
536414,22139,,56,2010-12-01 11:52:00,0.0,,United Kingdom
536415,22139,"TEA SET, ""GREEN""",1,2010-12-01 11:53:00,4.95,,EIRE
537000,gift_0001_40,Gift Voucher £40.00,1,2011-01-04 07:03:00,34.04,13047.0,EIRE
537000,20713,20713,12,2011-12-09 23:59:00,1.0,13047.0,France
A563185,B,Adjust bad debt,1,2011-08-12 14:50:00,-11062.06,,United Kingdom
'''.strip().split("\n")


def read(path, **keys):
    table = {"kind": "online_retail", "path": str(path), "user": "invoice", **keys}
    return list(rows(source_config(table, "test"), path.parent))


def write_kaggle(path, sales):
    """As Kaggle's data.csv: ISO-8859-1, American dates, whole customers, ends of lines of DOS
    (https://www.kaggle.com/datasets/carrie1/ecommerce-data)."""
    with open(path, "w", encoding="iso-8859-1", newline="") as f:
        out = csv.writer(f)
        out.writerow(HEADER.split(","))
        for *start, date, price, customer, country in csv.reader(sales):
            t = datetime.fromisoformat(date)
            american = f"{t.month}/{t.day}/{t.year} {t.hour}:{t.minute:02}"
            out.writerow([*start, american, price, customer.removesuffix(".0"), country])


def write_xlsx(path, sales):
    """As UCI's Online Retail.xlsx: cells are numbers and dates where they can be."""

    def cell(text, kind):
        if kind is datetime:
            return datetime.fromisoformat(text)
        try:
            return kind(text) if text else None
        except ValueError:
            return text

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Online Retail")
    sheet.append(HEADER.split(","))
    kinds = (int, int, int, int, datetime, float, float, str)
    for row in csv.reader(sales):
        sheet.append([cell(t, k) for t, k in zip(row, kinds, strict=True)])
    book.save(path)


def write_copies(folder, sales):
    """The same sales in each format."""
    plain = "\n".join([HEADER, *sales]) + "\n"
    (folder / "iso.csv").write_text(plain, encoding="utf-8")
    (folder / "bom.csv.gz").write_bytes(gzip.compress(plain.encode("utf-8-sig")))
    write_kaggle(folder / "kaggle.csv", sales)
    write_xlsx(folder / "uci.xlsx", sales)
    return [folder / name for name in ("iso.csv", "bom.csv.gz", "kaggle.csv", "uci.xlsx")]


def unix(*moment):
    return int(datetime(*moment, tzinfo=UTC).timestamp())


def test_every_row_is_a_log_whatever_the_copy(tmp_path):
    first = Log("536365", "retail", "85123A", "WHITE HEART HOLDER ", unix(2010, 12, 1, 8, 26), 2)
    expected = [
        first,
        first._replace(position=3),
        first._replace(position=4),
        Log("C536379", "retail", "D", "Discount", unix(2010, 12, 1, 9, 41), 5),
        Log("536414", "retail", "22139", None, unix(2010, 12, 1, 11, 52), 6),
        Log("536415", "retail", "22139", 'TEA SET, "GREEN"', unix(2010, 12, 1, 11, 53), 7),
        Log("537000", "retail", "gift_0001_40", "Gift Voucher £40.00", unix(2011, 1, 4, 7, 3), 8),
        Log("537000", "retail", "20713", "20713", unix(2011, 12, 9, 23, 59), 9),
        Log("A563185", "retail", "B", "Adjust bad debt", unix(2011, 8, 12, 14, 50), 10),
    ]
    for path in write_copies(tmp_path, SALES):
        assert read(path) == expected, path.name
    assert read(tmp_path / "bom.csv") == expected  # the .gz is found
    assert {log.service for log in read(tmp_path / "iso.csv", service="shop")} == {"shop"}


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({"user": "customer"}, [2, 3, 4, 5, 8, 9]),
        ({"described": True}, [2, 3, 4, 5, 7, 8, 9, 10]),
        ({"cancellations": False}, [2, 3, 4, 6, 7, 8, 9, 10]),
        ({"positive_quantity": True}, [2, 3, 4, 6, 7, 8, 9, 10]),
        ({"positive_price": True}, [2, 3, 4, 5, 7, 8, 9]),
        ({"unique": ["invoice", "item", "quantity", "minute"]}, [2, 4, 5, 6, 7, 8, 9, 10]),
        ({"unique": ["customer", "item", "minute"]}, [2, 5, 6, 7, 8, 9, 10]),
        ({"unique": ["item"]}, [2, 5, 6, 8, 9, 10]),
        ({"unique": ["item"], "described": True}, [2, 5, 7, 8, 9, 10]),
    ],
)
def test_each_key_leaves_out_its_rows(tmp_path, keys, lines):
    for path in write_copies(tmp_path, SALES):
        assert [log.position for log in read(path, **keys)] == lines, path.name


def test_customers_are_whole_numbers(tmp_path):
    for path in write_copies(tmp_path, SALES):
        users = [log.user for log in read(path, user="customer")]
        assert users == ["17850"] * 3 + ["14527"] + ["13047"] * 2, path.name


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,2,PRIVATE,6,2010-12-01 08:26:00,2.55,7", "7 fields, the header has 8"),
        (",2,t,6,2010-12-01 08:26:00,2.55,7,UK", "no invoice"),
        ("1, ,t,6,2010-12-01 08:26:00,2.55,7,UK", "no stock code"),
        ("1,2,t,many,2010-12-01 08:26:00,2.55,7,UK", "quantity is no whole number: text of 4"),
        ("1,2,t,1.5,2010-12-01 08:26:00,2.55,7,UK", "quantity is no whole number: '1.5'"),
        ("1,2,t,6,2010-12-01 08:26:00,nan,7,UK", "unit price is no number: text of 3 characters"),
        ("1,2,t,6,01-12-2010 08:26,2.55,7,UK", "not a time: '01-12-2010 08:26'"),
        ("1,2,t,6,13/1/2010 8:26,2.55,7,UK", "not a time: '13/1/2010 8:26'"),
        ("1,2,t,6,PRIVATE,2.55,7,UK", "not a time: text of 7 characters"),
        ("1,2,t,6,1910-12-01 08:26:00,2.55,7,UK", "not a time from 1970 to 2099: '1910-12-01"),
        (f"1,2,{'t' * 200_000},6,2010-12-01 08:26:00,2.55,7,UK", "no row: field larger than"),
    ],
)
def test_a_row_that_cannot_be_read_is_told(tmp_path, row, reason):
    path = tmp_path / "data.csv"
    path.write_text("\n".join([HEADER, SALES[0], row, SALES[1]]))
    found = read(path)
    assert [log.position for log in found] == [2, None, 4]
    assert found[1].problem.startswith(f"{path}:3: {reason}")
    assert "PRIVATE" not in found[1].problem


def torn(raw):
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("gone.csv", None, "holds no gone.csv, plain or .gz"),
        ("l.csv", b"", "its first line names no column 'InvoiceNo', 'StockCode'"),
        ("l.csv", SALES[0].encode(), "its first line names no column 'InvoiceNo', 'StockCode'"),
        ("l.csv", HEADER.encode("utf-16"), "its first line names no column 'InvoiceNo'"),
        ("l.csv", HEADER.replace(",UnitPrice", "").encode(), "names no column 'UnitPrice'"),
        ("l.csv.gz", HEADER.encode(), "cannot be read: Not a gzipped file"),
        ("l.csv.gz", torn(gzip.compress("\n".join([HEADER, *SALES]).encode())), "cannot be read"),
        ("l.xlsx", b"PK\x03\x04", "cannot be read as xlsx (BadZipFile)"),
    ],
)
def test_what_is_no_file_of_this_kind_is_refused(tmp_path, name, raw, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(CorpusError) as e:
        read(tmp_path / name)
    assert message in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert "HEART" not in str(e.value)


def test_a_sheet_of_something_else_is_refused(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["Zelda", 5])
    book.save(tmp_path / "l.xlsx")
    with pytest.raises(CorpusError, match="its first line names no column 'InvoiceNo'") as e:
        read(tmp_path / "l.xlsx")
    assert "Zelda" not in str(e.value)


def test_a_sheet_that_notes_a_wrong_size_is_read_whole(tmp_path):
    *_, path = write_copies(tmp_path, SALES)
    other = tmp_path / "other.xlsx"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name.endswith("sheet1.xml"):
                raw = raw.replace(b"<sheetData>", b'<dimension ref="A1:A1"/><sheetData>')
            new.writestr(name, raw)
    assert read(other) == read(path)


def test_cells_that_a_sheet_leaves_out_are_empty(tmp_path):
    book = openpyxl.Workbook()
    book.active.append([*HEADER.split(","), None, "more"])
    date = datetime(2010, 12, 1, 8, 26)
    for row in (
        ["536365", 22139, "TEA", 1, date, 2],
        [],
        [536366, 22139, None, 1.0, date, 0],
        [1, 2],
    ):
        book.active.append(row)
    book.save(tmp_path / "l.xlsx")
    time = unix(2010, 12, 1, 8, 26)
    assert read(tmp_path / "l.xlsx") == [
        Log("536365", "retail", "22139", "TEA", time, 2),
        Log("536366", "retail", "22139", None, time, 4),
        Log(problem=f"{tmp_path / 'l.xlsx'}:5: not a time: ''"),
    ]
    assert read(tmp_path / "l.xlsx", user="customer")[0].problem


def test_xlsx_without_openpyxl_tells_what_to_install(tmp_path, monkeypatch):
    *_, path = write_copies(tmp_path, SALES)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(CorpusError, match=r"pip install 'clue-scaling\[xlsx\]'"):
        read(path)
    assert len(read(tmp_path / "iso.csv")) == len(SALES)


def test_wrong_keys_are_refused():
    with pytest.raises(ConfigError, match="key 'user' is missing"):
        source_config({"kind": "online_retail", "path": "x"}, "test")
    keys = {"user": "invoice", "unique": ["price"]}
    with pytest.raises(ConfigError, match="unique"):
        source_config({"kind": "online_retail", "path": "x", **keys}, "test")


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_sheet_never_breaks_the_source(tmp_path_factory, data):
    """Bytes of the sheet's table and of the archive are changed: logs, problems or a refusal."""
    folder = tmp_path_factory.getbasetemp()
    source = folder / "sound.xlsx"
    if not source.exists():
        write_xlsx(source, SALES)
    path = folder / "damaged.xlsx"
    if data.draw(st.booleans()):
        path.write_bytes(damaged(data, source.read_bytes()[4:], b"PK\x03\x04"))
    else:
        made = io.BytesIO()
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w") as new:
            chosen = data.draw(st.sampled_from(sorted(old.namelist())))
            for name in old.namelist():
                raw = old.read(name)
                new.writestr(name, damaged(data, raw) if name == chosen else raw)
        path.write_bytes(made.getvalue())
    try:
        logs = read(path)
    except CorpusError as e:
        assert str(e).startswith(f"{path}: ")  # noqa: PT017 - either outcome is right
        return
    for log in logs:
        if log.problem is None:
            "".join([log.user, log.item, log.text or ""]).encode()
            assert 0 <= log.time < unix(2100, 1, 1)
        else:
            assert log.problem.startswith(f"{path}:")


def damaged(data, raw, start=b""):
    at = data.draw(st.integers(0, len(raw)))
    cut = data.draw(st.integers(0, 20))
    return start + raw[:at] + data.draw(st.binary(max_size=20)) + raw[at + cut :]


@pytest.fixture(scope="module")
def real(request):
    """Path and raw rows of the real file."""
    path = request.getfixturevalue("clue_test_data") / "online_retail" / "online_retail.csv"
    with gzip.open(f"{path}.gz", "rt", encoding="utf-8", newline="") as f:
        return path, list(csv.DictReader(f))


@pytest.mark.data
@pytest.mark.slow
def test_real_rows_are_the_same_in_every_copy(real, tmp_path):
    """Every 40th row, and all whose text is not ASCII."""
    _, table = real
    chosen = [r for i, r in enumerate(table) if i % 40 == 0 or not r["Description"].isascii()]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(r.values() for r in chosen)
    expected = [
        (
            r["InvoiceNo"],
            r["StockCode"],
            r["Description"] or None,
            int(datetime.fromisoformat(r["InvoiceDate"] + "+00:00").timestamp()),
        )
        for r in chosen
    ]
    assert sum(not r["Description"].isascii() for r in chosen) > 10
    for path in write_copies(tmp_path, out.getvalue().splitlines()):
        found = [(log.user, log.item, log.text, log.time) for log in read(path)]
        assert found == expected, path.name


def k_core(pairs, k=5):
    """Pairs of users and items, without those of fewer than k pairs, until there are none."""
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = [(u, i) for u, i in pairs if users[u] >= k and items[i] >= k]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


INVOICES = {"described": True, "unique": ["invoice", "item", "quantity", "minute"]}
CUSTOMERS = {
    "user": "customer",
    "cancellations": False,
    "positive_quantity": True,
    "positive_price": True,
    "unique": ["customer", "item", "minute"],
}


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "core"),
    # UniSRec (Hou et al. 2022) and LMRec (Shin et al. 2022) print the first row.
    [(INVOICES, (16_520, 3_469, 519_906)), (CUSTOMERS, (4_109, 3_184, 386_186))],
)
def test_published_counts(real, keys, core):
    path, _ = real
    logs = read(path, **keys)
    assert not any(log.problem for log in logs)
    pairs = k_core([(log.user, log.item) for log in logs])
    assert (len({u for u, _ in pairs}), len({i for _, i in pairs}), len(pairs)) == core
    if keys is CUSTOMERS:
        assert len(set(pairs)) == 265_306


@pytest.mark.data
@pytest.mark.slow
def test_every_real_row_is_a_log(real):
    path, table = real
    logs = read(path)
    assert len(logs) == len(table) == 541_909
    assert not any(log.problem for log in logs)
    assert len({log.user for log in logs}) == 25_900
    assert len({log.item for log in logs}) == 4_070
    assert sum(log.text is None for log in logs) == 1_454
    assert sum(log.user.startswith("C") for log in logs) == 9_288
    customers = read(path, user="customer")
    assert len(customers) == 541_909 - 135_080
    assert len({log.user for log in customers}) == 4_372


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("keys", [INVOICES, CUSTOMERS])
def test_the_corpus_file_gives_the_published_counts(clue_test_data, tmp_path, monkeypatch, keys):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    toml = CORPUS_FILE.read_text(encoding="utf-8")
    if keys is CUSTOMERS:  # as the comment in the file says
        for old, new in (
            ('user = "invoice"', 'user = "customer"'),
            ("described = true", "cancellations = false"),
            ("unique = [", "positive_quantity = true\npositive_price = true\nunique = ["),
            ('["invoice", "item", "quantity", "minute"]', '["customer", "item", "minute"]'),
        ):
            comment, source = toml.split("[source]")
            assert source.count(old) == 1
            toml = "[source]".join([comment, source.replace(old, new)])
    (tmp_path / "retail.toml").write_text(toml, encoding="utf-8")
    corpus = Corpus.open(prepare(tmp_path / "retail.toml", tmp_path))
    last = corpus.manifest["steps"][-1]
    users, items, logs = (16_520, 3_469, 519_906) if keys is INVOICES else (4_109, 3_184, 386_186)
    assert (last["step"], last["users"], last["logs"]) == ("k_core", users, logs)
    assert corpus.n_items == items
    assert Task.open(corpus, "lmrec").n_users == users  # who has five logs has three
