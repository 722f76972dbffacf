"""The Complete Journey: a year's shopping of households at a grocery chain (84.51,
https://www.8451.com/area51; tables of the R package ``completejourney`` as CSV,
https://bradleyboehmke.github.io/completejourney).

Departments are services. Products have no titles; their text is category and type. Coupons redeemed
are a further service, like answers to marketing messages: the text of a coupon names the categories
of products it is for.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from scaling.config import Frozen, Name
from scaling.data.sources import Log, resolve, shown
from scaling.data.sources.delimited import csv_rows, find, parsed
from scaling.data.sources.values import known, unix_time

PRODUCTS = ("product_id", "department", "product_category", "product_type")
TRANSACTIONS = ("household_id", "product_id", "transaction_timestamp")
COUPONS = ("coupon_upc", "product_id")
REDEMPTIONS = ("household_id", "coupon_upc", "redemption_date")


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["complete_journey"]
    path: str
    """Folder of the tables, each plain or ``.gz``: ``products.csv``, ``transactions.csv`` or
    ``transactions_sample.csv``, and for coupons ``coupons.csv`` and ``coupon_redemptions.csv``."""
    items: Literal["products", "types"]
    """What an item is: a product, or all products of one text, which an encoder of texts cannot
    tell apart."""
    coupons: Name | None = None
    """Service of the coupons redeemed; None: they are not read. The others are the departments:
    ``DRUG GM`` is the service ``drug-gm``."""


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    folder = resolve(base, config.path)
    found = [
        find(folder, "products.csv"),
        find(folder, "transactions.csv", "transactions_sample.csv"),
    ]
    coupons = ("coupons.csv", "coupon_redemptions.csv") if config.coupons else ()
    return found + [find(folder, name) for name in coupons]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of what was bought, then of the coupons redeemed.

    Raises:
        CorpusError: a file is missing, torn or no table of this format.
    """
    products, transactions, *coupons = files(config, base)
    service_of: dict[str, str] = {}
    category_of: dict[str, str] = {}
    text_of: dict[str, str] = {}

    def product(line: int, product: str, department: str, category: str, kind: str) -> None:
        product = known(product, "product")
        service_of[product] = _service(department)
        category_of[product] = category
        text_of[product] = f"{category} {kind}".strip()

    def purchase(line: int, household: str, product: str, time: str) -> Log:
        if (product := known(product, "product")) not in service_of:
            raise ValueError(f"product not in {products.name}: {shown(product)}")
        return Log(
            user=known(household, "household"),
            service=service_of[product],
            item=product if config.items == "products" else None,
            text=text_of[product] or None,
            time=unix_time(time),
            position=line,
            category=category_of[product] or None,
        )

    yield from parsed(products, csv_rows(products, PRODUCTS), product)
    yield from parsed(transactions, csv_rows(transactions, TRANSACTIONS), purchase)
    if config.coupons:
        yield from _redeemed(config.coupons, coupons[0], coupons[1], category_of)


def _redeemed(
    service: str, coupons: Path, redemptions: Path, category_of: dict[str, str]
) -> Iterator[Log]:
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    seen: set[tuple[str, str]] = set()

    def coupon(line: int, coupon: str, product: str) -> None:
        pair = known(coupon, "coupon"), known(product, "product")
        if pair not in seen and (category := category_of.get(pair[1])):
            categories[pair[0]][category] += 1
        seen.add(pair)  # a coupon may be of several campaigns

    def redemption(line: int, household: str, coupon: str, day: str) -> Log:
        coupon = known(coupon, "coupon")
        counts = categories.get(coupon, Counter())
        commonest_first = sorted(counts, key=lambda c: (-counts[c], c))
        return Log(
            user=known(household, "household"),
            service=service,
            item=coupon,
            text=", ".join(commonest_first) or None,
            time=unix_time(day),
            position=line,
        )

    yield from parsed(coupons, csv_rows(coupons, COUPONS), coupon)
    yield from parsed(redemptions, csv_rows(redemptions, REDEMPTIONS), redemption)


def _service(department: str) -> str:
    """
    >>> _service("DRUG GM"), _service("COUP/STR & MFG")
    ('drug-gm', 'coup-str-mfg')
    """
    if name := re.sub(r"[^a-z0-9]+", "-", department.lower()).strip("-"):
        return name
    raise ValueError("no department")
