"""The source of the Complete Journey: the real sample, and a fixture of ours in its format."""

import csv
import gzip
import re
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

import pytest

from scaling.config import ConfigError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config, source_files
from scaling.data.sources.complete_journey import rows
from scaling.data.tasks import Task

CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "complete_journey.toml"
# Of ours, in the format of the tables of bradleyboehmke.github.io/completejourney.
TABLES = {
    "products.csv": "product_id,manufacturer_id,department,brand,product_category,product_type\n"
    "1,9,DRUG GM,National,CANDY,BARS\n2,9,DRUG GM,Private,CANDY,BARS\n"
    '9e+05,9,COUP/STR & MFG,National,"WATER, STILL",\n4,9,MEAT-PCKGD,National,,\n',
    "transactions.csv": "household_id,store_id,basket_id,product_id,week,transaction_timestamp\n"
    "7,1,1,1,1,1485630413\n7,1,1,2,1,2017-01-28 19:06:53\n8,1,2,9e+05,0,2017-01-28T19:06:53Z\n"
    "8,1,2,4,1,1485630413\n",
    "coupons.csv": "coupon_upc,product_id,campaign_id\n"
    "50,9e+05,1\n50,1,1\n50,2,1\n50,1,2\n51,4,1\n52,1,1\n52,9e+05,1\n52,9e+05,2\n52,77,1\n",
    "coupon_redemptions.csv": "household_id,coupon_upc,campaign_id,redemption_date\n"
    "7,50,1,2017-01-29\n7,51,1,2017-01-30\n8,52,2,2017-01-29\n8,53,2,2017-01-29\n",
}
WHEN = 1485630413
DAY = 1485648000


def write(folder, tables):
    for name, text in tables.items():
        raw = text.encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def read(folder, **keys):
    table = {"kind": "complete_journey", "path": str(folder), "items": "products", **keys}
    return list(rows(source_config(table, "test"), folder))


PURCHASES = [
    Log("7", "drug-gm", "1", "CANDY BARS", WHEN, 2, category="CANDY"),
    Log("7", "drug-gm", "2", "CANDY BARS", WHEN, 3, category="CANDY"),
    Log("8", "coup-str-mfg", "9e+05", "WATER, STILL", WHEN, 4, category="WATER, STILL"),
    Log("8", "meat-pckgd", "4", None, WHEN, 5),
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_purchases_and_coupons(tmp_path, suffix):
    write(tmp_path, {f"{name}{suffix}": text for name, text in TABLES.items()})
    assert read(tmp_path) == PURCHASES
    assert read(tmp_path, items="types") == [log._replace(item=None) for log in PURCHASES]
    found = read(tmp_path, coupons="offers")
    assert found[4:] == [
        # A coupon of two campaigns has its products once; of equal counts, by name.
        Log("7", "offers", "50", "CANDY, WATER, STILL", DAY, 2),
        Log("7", "offers", "51", None, DAY + 86_400, 3),
        Log("8", "offers", "52", "CANDY, WATER, STILL", DAY, 4),
        Log("8", "offers", "53", None, DAY, 5),
    ]
    for keys, n in (({}, 2), ({"coupons": "offers"}, 4)):
        table = {"kind": "complete_journey", "path": ".", "items": "types", **keys}
        files = source_files(source_config(table, "test"), tmp_path)
        assert {p.name for p in files} == {f"{t}{suffix}" for t in list(TABLES)[:n]}


def test_a_sample_of_the_purchases_will_do(tmp_path):
    write(
        tmp_path, {n.replace("transactions", "transactions_sample"): t for n, t in TABLES.items()}
    )
    assert read(tmp_path) == PURCHASES


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("products.csv", "5,9,GROCERY,National,MILK", "5 fields, the header has 6"),
        ("products.csv", ",9,GROCERY,National,MILK,", "no product"),
        ("products.csv", "5,9,&,National,MILK,", "no department"),
        ("transactions.csv", "7,1,1,33,1,1485630413", "product not in products.csv: '33'"),
        ("transactions.csv", "7,1,1,Zelda,1,1485630413", "product not in products.csv: text of 5 "),
        ("transactions.csv", ",1,1,1,1,1485630413", "no household"),
        ("transactions.csv", "7,1,1,1,1,", "not a time: ''"),
        ("transactions.csv", "7,1,1,1,1,1485630413000", "not a time from 1970 to 2099: '14856304"),
        ("coupons.csv", ",1,1", "no coupon"),
        ("coupon_redemptions.csv", "7,50,1,Zelda", "not a time: text of 5 characters"),
        ("coupon_redemptions.csv", ",50,1,2017-01-29", "no household"),
    ],
)
def test_a_row_that_cannot_be_read_is_told(tmp_path, name, row, reason):
    write(tmp_path, TABLES)
    whole = read(tmp_path, coupons="coupons")
    write(tmp_path, {name: f"{TABLES[name]}{row}\n"})
    found = read(tmp_path, coupons="coupons")
    (problem,) = (log.problem for log in found if log.problem)
    assert problem.startswith(f"{tmp_path / name}:{TABLES[name].count(chr(10)) + 1}: {reason}")
    assert [log for log in found if not log.problem] == whole


def test_missing_files_and_keys_are_told(tmp_path):
    with pytest.raises(ConfigError, match="items"):
        read(tmp_path, items="titles")
    write(tmp_path, {"products.csv": TABLES["products.csv"]})
    with pytest.raises(CorpusError, match=r"no transactions\.csv or transactions_sample\.csv"):
        read(tmp_path)
    write(tmp_path, {"transactions.csv": TABLES["transactions.csv"]})
    assert read(tmp_path) == PURCHASES
    with pytest.raises(CorpusError, match=r"holds no coupons\.csv, plain or \.gz"):
        read(tmp_path, coupons="coupons")


@pytest.fixture
def real(clue_test_data):
    return clue_test_data / "complete_journey_sample"


def table(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def text_of(product):
    return " ".join(filter(None, [product["product_category"], product["product_type"]]))


@pytest.mark.data
def test_the_sample(real):
    products = {p["product_id"]: p for p in table(real / "products.csv.gz")}
    assert len(products) == 92_331
    found = read(real, coupons="coupons")
    sound = [log for log in found if not log.problem]
    assert len(found) == 75_000 + 2_102
    assert len(sound) == len(found) - 222
    raw = table(real / "transactions_sample.csv.gz")
    known = [t for t in raw if t["product_id"] in products]
    assert [(log.user, log.item, log.text or "", log.time) for log in sound[: len(known)]] == [
        (
            t["household_id"],
            t["product_id"],
            text_of(products[t["product_id"]]),
            int(t["transaction_timestamp"]),
        )
        for t in known
    ]
    counts = Counter(log.service for log in sound)
    assert (counts["grocery"], counts["drug-gm"], counts["produce"]) == (47_411, 7_942, 7_612)
    assert (counts["meat-pckgd"], counts["coupons"]) == (3_214, 2_102)
    assert len({t["household_id"] for t in raw}) == 2_377
    of = {
        service: Counter(log.user for log in sound if log.service == service)
        for service in ("grocery", "drug-gm")
    }
    assert sum(n >= 5 and of["drug-gm"][u] >= 3 for u, n in of["grocery"].items()) == 930


@pytest.mark.data
def test_coupons_name_the_categories_of_their_products(real):
    category = {p["product_id"]: p["product_category"] for p in table(real / "products.csv.gz")}
    of_coupon = defaultdict(set)
    for row in table(real / "coupons.csv.gz"):
        of_coupon[row["coupon_upc"]].add(row["product_id"])
    raw = table(real / "coupon_redemptions.csv.gz")
    found = [log for log in read(real, coupons="coupons") if log.service == "coupons"]
    assert len(found) == len(raw)
    for log, row in zip(found, raw, strict=True):
        counts = Counter(filter(None, (category.get(p) for p in of_coupon[row["coupon_upc"]])))
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        assert (log.user, log.item) == (row["household_id"], row["coupon_upc"])
        assert (log.text or "") == ", ".join(name for name, _ in ranked)
        assert (
            log.time == datetime.fromisoformat(f"{row['redemption_date']}T00:00+00:00").timestamp()
        )


@pytest.mark.data
@pytest.mark.slow
def test_the_corpus_file(clue_test_data, real, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE, tmp_path))
    steps = {s["step"]: s for s in corpus.manifest["steps"]}
    assert steps["read"] == {"step": "read", "logs": 77_102, "malformed": 222}
    products = {p["product_id"]: p for p in table(real / "products.csv.gz")}
    pairs = defaultdict(set)
    for t in table(real / "transactions_sample.csv.gz"):
        if (product := products.get(t["product_id"])) and (text := text_of(product)):
            pairs[product["department"]].add((t["household_id"], re.sub(" +", " ", text)))
    redeemed = table(real / "coupon_redemptions.csv.gz")
    coupons = {(r["household_id"], r["coupon_upc"]) for r in redeemed}
    kept = [*(pairs[d] for d in ("GROCERY", "DRUG GM", "PRODUCE")), coupons]
    assert steps["deduplicated"]["logs"] == sum(map(len, kept))
    n = {d: Counter(u for u, _ in pairs[d]) for d in ("GROCERY", "DRUG GM", "PRODUCE")}
    eligible = sum(k >= 4 and n["DRUG GM"][u] >= 4 for u, k in n["GROCERY"].items())
    both = len(n["GROCERY"].keys() & n["DRUG GM"].keys())
    assert sum(corpus.manifest["splits"].values()) == both - round(0.4 * eligible)
    assert Task.open(corpus, "produce").n_users <= sum(k >= 2 for k in n["PRODUCE"].values())
    assert Task.open(corpus, "coupons").cut == "day"
