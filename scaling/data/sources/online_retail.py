"""Online Retail: the sales lines of a British gift shop, 2010-12 to 2011-12 (Chen 2015,
https://archive.ics.uci.edu/dataset/352/online+retail).

Any of its copies will do; which one it is shows in the file: UCI's xlsx, or CSV, whose dates are
``2010-12-01 08:26:00`` or, as in Kaggle's ``data.csv`` (ISO-8859-1), ``12/1/2010 8:26``. Times are
the shop's clock, read as UTC. What papers leave out is a key here, as it is said in this format's
columns; without these keys every row is a log.
"""

import importlib
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import Log, resolve, shown
from scaling.data.sources.delimited import Row, column_places, csv_rows, find, parsed
from scaling.data.sources.values import finite_number, known, unix_time, whole_number

COLUMNS = (
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
)
ZIP = b"PK\x03\x04"
KAGGLE_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d\d)", re.ASCII)


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["online_retail"]
    path: str
    """UCI's xlsx (needs openpyxl), or a CSV of it, plain or ``.gz``."""
    service: Name = "retail"
    user: Literal["invoice", "customer"]
    """Whose log a row is. UniSRec and LMRec count invoices. A row that names no customer is in
    nobody's log and left out where customers are the users."""
    described: bool = False
    """Leave out rows without a description. Else they are untitled, and preparation gives them the
    text that other rows have for their code."""
    cancellations: bool = True
    """False: leave out invoices whose number begins with C."""
    positive_quantity: bool = False
    """Leave out rows of quantity 0 or less: returns and corrections."""
    positive_price: bool = False
    """Leave out rows of price 0 or less: gifts and corrections."""
    unique: tuple[Literal["invoice", "customer", "item", "quantity", "minute"], ...] = ()
    """Of several rows equal in all of these, keep the first. None named: keep all."""


def files(config: Config, base: Path) -> list[Path]:
    """The file read."""
    path = resolve(base, config.path)
    return [find(path.parent, path.name)]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of the rows, in their order.

    Raises:
        CorpusError: the file is missing, torn or no table of this format, or is an xlsx and
            openpyxl is not installed.
    """
    (path,) = files(config, base)
    seen: set[tuple[Any, ...]] = set()

    def sale(
        line: int,
        invoice: str,
        item: str,
        text: str,
        quantity: str,
        date: str,
        price: str,
        customer: str,
    ) -> Log | None:
        customer = customer.removesuffix(".0")
        time = _time(date)
        row = {
            "invoice": known(invoice, "invoice"),
            "customer": customer,
            "item": known(item, "stock code"),
            "quantity": whole_number(quantity, "quantity"),
            "minute": time // 60,
        }
        cost = finite_number(price, "unit price")
        if (
            (config.user == "customer" and not customer.strip())
            or (config.described and not text.strip())
            or (not config.cancellations and invoice[:1] in "Cc")
            or (config.positive_quantity and int(quantity) <= 0)
            or (config.positive_price and cost <= 0)
        ):
            return None
        if config.unique:
            key = tuple(row[part] for part in config.unique)
            if key in seen:
                return None
            seen.add(key)
        user = str(row[config.user])
        return Log(user, config.service, item, text or None, time, line)

    with path.open("rb") as f:
        read = _sheet_rows if f.read(len(ZIP)) == ZIP else csv_rows
    yield from parsed(path, read(path, COLUMNS), sale, latin_1=True)


def _time(date: str) -> int:
    if match := KAGGLE_DATE.fullmatch(date):
        month, day, year, hour, minute = map(int, match.groups())
        try:
            date = datetime(year, month, day, hour, minute).isoformat()
        except ValueError:
            raise ValueError(f"not a time: {shown(date)}") from None
    return unix_time(date)


def _sheet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of the first sheet, their cells as the CSV has them."""
    try:
        openpyxl: Any = importlib.import_module("openpyxl")
    except ImportError:
        raise CorpusError(
            f"{path}: reading xlsx needs openpyxl; run: pip install 'clue-scaling[xlsx]'"
        ) from None
    try:
        with path.open("rb") as f:
            sheet = openpyxl.load_workbook(f, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # some programs note wrong ones, and rows would be cut
            table = enumerate(sheet.iter_rows(values_only=True), 1)
            header = [_cell(c) for c in next(table, (1, ()))[1]]
            places = column_places(path, header, columns)
            for line, cells in table:
                # Empty cells at the end of a row are not in the file.
                values = [_cell(cells[i]) if i < len(cells) else "" for i in places]
                if any(values):
                    yield line, values
    except CorpusError:
        raise
    except Exception as e:  # openpyxl lets through whatever zip and XML parsers raise
        raise CorpusError(f"{path}: cannot be read as xlsx ({type(e).__name__})") from None


def _cell(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)
