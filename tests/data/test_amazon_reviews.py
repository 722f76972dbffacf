"""The source of Amazon reviews: real files of 2018; fixtures of ours where there are none."""

import gzip
import html
import itertools
import json
import re
from codecs import BOM_UTF8
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data import tokenizer
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config, source_files
from scaling.data.sources.amazon_reviews import MAX_LINE, rows

GIFT = "amazon18_giftcards_raw/Gift_Cards_5.json.gz"
METAS = [f"amazon18_giftcards_raw/meta_Gift_Cards{x}.json.gz" for x in ("", ".older")]

# Of ours, in the format of 2014 (jmcauley.ucsd.edu/data/amazon): items are Python literals.
META_2014 = r"""
{'asin': '0000000011', 'description': "It's 3\" tall", 'title': 'Oak Puzzle', 'price': 7.5, 'salesRank': {'Toys & Games': 61}, 'imUrl': 'http://example.org/a.jpg', 'related': {'also_bought': ['0000000022']}, 'brand': 'Acorn', 'categories': [['Toys & Games', 'Puzzles', 'Jigsaw']]}
{'asin': '0000000022', 'title': "Carol's \"Best\" Tea \xe9", 'categories': [['Grocery'], ['Home & Kitchen', 'Tea']]}
{'asin': '0000000033', 'categories': [['Toys & Games']], 'brand': ''}
{'asin': '0000000044', 'title': 'title_7080', 'categories': [['Toys & Games']]}
{'title': 'Drill\d Bit &amp; Case', 'asin': '0000000055', 'categories': [], 'brand': None}
{"asin": "0000000066", "title": "In JSON", "related": null}
""".strip().split("\n")  # noqa: E501
# Of ours, in the format of 2014: reviews are JSON.
REVIEWS_2014 = [
    json.dumps(
        {
            "reviewerID": "A0000000000U1",
            "asin": f"00000000{i}{i}",
            "reviewerName": "Zelda Zyx",
            "helpful": [2, 3],
            "reviewText": "Zounds",
            "overall": 4.0,
            "summary": "Zip",
            "unixReviewTime": 1_252_800_000 + i,
            "reviewTime": "09 13, 2009",
        }
    )
    for i in range(1, 7)
]
TITLES_2014 = [
    "Oak Puzzle",
    'Carol\'s "Best" Tea é',
    None,
    None,
    "Drill\\d Bit &amp; Case",
    "In JSON",
]


def read(base, reviews, meta, release=2018, text=("title",)):
    """All logs of one service; lists of lines become files in ``base``."""
    for name, lines in (("reviews.json", reviews), ("meta.json", meta)):
        if isinstance(lines, list):
            (base / name).write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    files = {
        "reviews": "reviews.json" if isinstance(reviews, list) else str(reviews),
        "meta": "meta.json" if isinstance(meta, list) else str(meta),
    }
    table = {"kind": "amazon_reviews", "release": release, "services": {"x": files}}
    return list(rows(source_config({**table, "text": list(text)}, "test"), base))


def review(**keys):
    row = {"reviewerID": "A1", "asin": "0000000011", "overall": 5.0, "unixReviewTime": 9}
    return json.dumps({**row, **keys})


def problems(logs):
    """Their reasons, by line."""
    found = [log.problem.partition("json:")[2].partition(": ") for log in logs if log.problem]
    return {int(line): reason for line, _, reason in found}


def parsed(path):
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.mark.data
@pytest.mark.parametrize("meta", METAS)
def test_gift_cards(clue_test_data, tmp_path, meta):
    logs = read(tmp_path, clue_test_data / GIFT, clue_test_data / meta)
    titles = {row["asin"]: row["title"] for row in parsed(clue_test_data / METAS[0])}
    assert logs == [
        Log(
            r["reviewerID"], "x", r["asin"], titles[r["asin"]], r["unixReviewTime"], i, r["overall"]
        )
        for i, r in enumerate(parsed(clue_test_data / GIFT))
    ]
    assert len(logs) == 2_972
    assert len({log.user for log in logs}) == 458
    assert len({log.item for log in logs}) == 148
    assert sum(log.rating >= 4 for log in logs) == 2_906
    assert all(log.text.strip() for log in logs)


@pytest.mark.data
def test_corpus_file_of_gift_cards(clue_test_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpora = Path(__file__).parents[2] / "sweeps" / "corpora"
    corpus = Corpus.open(prepare(corpora / "giftcards.toml", tmp_path))
    counts = {s["step"]: (s["logs"], s.get("users")) for s in corpus.manifest["steps"]}
    reviews = parsed(clue_test_data / GIFT)
    good = {(r["reviewerID"], r["asin"]) for r in reviews if r["overall"] >= 4}
    assert counts["read"] == (2_972, None)
    assert counts["titled"] == (2_972, 458)
    assert counts["rated"] == (2_906, len({user for user, _ in good}))
    assert counts["deduplicated"] == (len(good), counts["rated"][1])
    assert corpus.n_items == 148
    bpe = tokenizer.load(corpus.path / "tokenizer.json")
    offsets = corpus.token_offsets.tolist()
    texts = [bpe.decode(corpus.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(offsets)]
    assert sum("&" in text for text in texts) > 0
    assert not [text for text in texts if html.unescape(text) != text]
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    told = {r[key] for r in reviews for key in ("reviewerID", "reviewText", "summary") if key in r}
    assert not [text for text in told if len(text) > 20 and text.encode() in written]
    assert not [r for r in reviews if r["reviewerID"].encode() in written]


@pytest.mark.data
def test_fashion(clue_test_data, tmp_path):
    """Without its items' file, which nobody has here: every log is there, untitled."""
    path = clue_test_data / "amazon18_giftcards_raw" / "AMAZON_FASHION_5.json.gz"
    logs = read(tmp_path, path, [])
    assert len(logs) == 3_176
    assert (len({x.user for x in logs}), len({x.item for x in logs})) == (406, 31)
    assert sum(log.rating >= 4 for log in logs) == 2_629
    pairs = Counter((log.user, log.item) for log in logs)
    assert sum(pairs.values()) - len(pairs) == 134
    assert not [log for log in logs if log.problem or log.text is not None]


@pytest.mark.data
def test_items_of_both_releases_of_meta(clue_test_data, tmp_path):
    """Every item of the files, each rated once by a csv of ours in either order."""
    rows_of = parsed(clue_test_data / METAS[0])
    for name, order in (("2014", "A1,{},4.0,7\n"), ("2018", "{},A1,4.0,7\n")):
        lines = (order.format(row["asin"]) for row in rows_of)
        (tmp_path / f"{name}.csv").write_text("".join(lines))
    logs = read(tmp_path, tmp_path / "2018.csv", clue_test_data / METAS[0])
    for meta in METAS:
        assert read(tmp_path, tmp_path / "2018.csv", clue_test_data / meta) == logs
        assert read(tmp_path, tmp_path / "2014.csv", clue_test_data / meta, release=2014) == logs
    assert [log.text for log in logs] == [row["title"] for row in rows_of]
    assert len(logs) == 1_547
    assert sum(html.unescape(log.text) != log.text for log in logs) == 178
    wide = read(
        tmp_path,
        tmp_path / "2018.csv",
        clue_test_data / METAS[1],
        text=["title", "category", "brand"],
    )
    for log, row in zip(wide, rows_of, strict=True):
        category = " ".join(c for c in row["category"] if "</span>" not in c)
        values = (row["title"], category, row["brand"])
        assert log.text == ". ".join(v for v in values if v)


@pytest.mark.filterwarnings("error")  # a warning of Python's parser would quote the line
def test_2014(tmp_path):
    logs = read(tmp_path, REVIEWS_2014, META_2014, release=2014)
    assert [log.text for log in logs] == TITLES_2014
    assert [log.time for log in logs] == [1_252_800_000 + i for i in range(1, 7)]
    assert {(log.user, log.service, log.rating, log.problem) for log in logs} == {
        ("A0000000000U1", "x", 4.0, None)
    }
    wide = read(tmp_path, REVIEWS_2014, META_2014, 2014, ["title", "category", "brand"])
    assert [log.text for log in wide[:4]] == [
        "Oak Puzzle. Toys & Games Puzzles Jigsaw. Acorn",
        'Carol\'s "Best" Tea é. Grocery Home & Kitchen Tea',
        "Toys & Games",
        "Toys & Games",
    ]


def test_python_literals_are_of_2014_only(tmp_path):
    logs = read(tmp_path, REVIEWS_2014, META_2014, release=2018)
    assert problems(logs) == dict.fromkeys(range(1, 6), "not JSON")
    assert [log.text for log in logs if not log.problem] == [None] * 5 + ["In JSON"]


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        ("Plain", False),
        ("I <3 tea, 5 < 6 > 4 <OEM>", False),
        ("Title_7080 and title_7080 inside", False),
        ("title_7080", True),
        ('<span class="a-size-medium a-color-secondary"', True),
        ("Mug </span>", True),
        ("Mug <b>blue</b>", True),
        ("<br/>", True),
        ("<a " + "=" * 300_000, False),  # an hour, if all pairs of signs are tried
        ("var aPageStart = (new Date()).getTime();", True),
        (" ", True),
        ("", True),
        (None, True),
    ],
)
def test_titles_that_are_none(tmp_path, title, missing):
    (log,) = read(tmp_path, [review()], [json.dumps({"asin": "0000000011", "title": title})])
    assert log.text == (None if missing else title)
    assert log.item == "0000000011"


def test_first_titled_row_of_an_item_counts(tmp_path):
    meta = [
        {"asin": "0000000011", "title": "<span>", "brand": "A"},
        {"asin": "0000000011", "title": "Mug", "brand": "B"},
        {"asin": "0000000011", "title": "Cup", "brand": "C"},
    ]
    meta = [json.dumps(row) for row in meta]
    for lines, text, expected in [
        (meta, ["title"], "Mug"),
        (meta, ["title", "brand"], "Mug. B"),
        (meta, ["brand"], "A"),
        (meta[:1], ["brand", "title"], "A"),
        (meta[::-1], ["title", "brand"], "Cup. C"),
    ]:
        (log,) = read(tmp_path, [review()], lines, text=text)
        assert log.text == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Zounds", "not JSON"),
        ('["Zounds"]', "not an object"),
        ('{"Zounds": NaN', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        (review(reviewerID=None), "no reviewerID"),
        (review(reviewerID=""), "no reviewerID"),
        (review(asin=7), "no asin"),
        (review(asin="Z\ud800"), "asin is not valid text"),
        (review(overall="Zounds"), "overall is no number"),
        (review(overall=True), "overall is no number"),
        (review(overall=0.5), "not a rating of 1 to 5: '0.5'"),
        (review(overall=float("nan")), "not a rating of 1 to 5: text of 3 characters"),
        (review(overall=10**400), "not a rating of 1 to 5: text of 401 characters"),
        (review(unixReviewTime="09 13, 2009"), "unixReviewTime is no whole number"),
        (review(unixReviewTime=False), "unixReviewTime is no whole number"),
        (review(unixReviewTime=-1), "not a time from 1970 to 2099: '-1'"),
        (review(unixReviewTime=10**13), "not a time from 1970 to 2099: '10000000000000'"),
        (review(x="Z" * MAX_LINE), "a line of more than 1,048,576 characters"),
    ],
)
def test_malformed_reviews(tmp_path, line, reason):
    logs = read(tmp_path, [review(), line, "", review()], [])
    assert problems(logs) == {2: reason}
    assert [log.user for log in logs if not log.problem] == ["A1", "A1"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"title": "Zounds"}', "no asin"),
        ('{"asin": "0000000011", "title": ["Zounds", 7]}', "title is no text"),
        ('{"asin": "0000000011", "title": {"Zounds": 7}}', "title is no text"),
        ('{"asin": "0000000011", "title": "\\udc00"}', "title is not valid text"),
        ("{'asin': Zounds()}", "neither JSON nor a Python literal"),
        ("{'asin': '0000000011'", "neither JSON nor a Python literal"),
        ("{[]: 'Zounds'}", "neither JSON nor a Python literal"),
        ("{'asin': '\\0'", "neither JSON nor a Python literal"),
        ("'Zounds' 'Zounds'", "not an object"),
        *[(x * 50_000 + "1", "neither JSON nor a Python literal") for x in "-([{~"],
        ("1+" * 50_000 + "1", "neither JSON nor a Python literal"),
        ("a" + ".a" * 50_000, "neither JSON nor a Python literal"),
    ],
)
def test_malformed_items(tmp_path, line, reason):
    titled = "{'asin': '0000000011', 'title': 'Mug'}"
    logs = read(tmp_path, [review()], [line, titled], release=2014)
    assert problems(logs) == {1: reason}
    assert logs[-1].text == "Mug"


def test_bytes_of_another_encoding(tmp_path):
    (tmp_path / "latin.json").write_bytes(review(x="e").replace("e", "é").encode("latin-1"))
    logs = read(tmp_path, tmp_path / "latin.json", tmp_path / "latin.json")
    reasons = [log.problem.rpartition(": ")[2] for log in logs]
    assert reasons == ["the line is not valid text"] * 2


def test_csv_of_the_other_release_is_refused(tmp_path):
    (tmp_path / "ratings.csv").write_text("A1EE2E3N7PW666,0000000011,5.0,1202256000\n")
    (log,) = read(tmp_path, tmp_path / "ratings.csv", [], release=2014)
    assert log[:3] == ("A1EE2E3N7PW666", "x", "0000000011")
    assert (log.rating, log.time) == (5.0, 1_202_256_000)
    (log,) = read(tmp_path, tmp_path / "ratings.csv", [], release=2018)
    assert "is it the other release?" in log.problem
    assert "A1EE" not in log.problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("A1,0000000011,5.0", "3 fields, not user,item,rating,time"),
        ("A1,0000000011,5.0,7,8", "5 fields, not user,item,rating,time"),
        (",0000000011,5.0,7", "no user"),
        ("A1,0000000011,Zounds,7", "rating is no number: text of 6 characters"),
        ("A1,0000000011,5.0,7.5", "time is no whole number: '7.5'"),
        ("A1,0000000011,nan,7", "rating is no number: text of 3 characters"),
        ("A1,0000000011,٣,7", "rating is no number: text of 1 characters"),
        ("A1,0000000011,5.0,1_000", "time is no whole number: text of 5 characters"),
        ("A1,0000000011,5.0,-7", "not a time from 1970 to 2099: '-7'"),
    ],
)
def test_malformed_ratings(tmp_path, line, reason):
    (tmp_path / "ratings.csv").write_text(f"{line}\n")
    (log,) = read(tmp_path, tmp_path / "ratings.csv", [], release=2014)
    assert log == Log(problem=f"{tmp_path}/ratings.csv:1: {reason}")


def test_files_that_are_not_there_or_torn(tmp_path):
    with pytest.raises(CorpusError, match=r"nope\.json: no such file"):
        read(tmp_path, tmp_path / "nope.json", [])
    (tmp_path / "plain.json.gz").write_text(review())
    with pytest.raises(CorpusError, match=r"plain\.json\.gz: cannot be read"):
        read(tmp_path, tmp_path / "plain.json.gz", [])
    whole = gzip.compress("".join(f"{review(x=i)}\n" for i in range(1_000)).encode())
    (tmp_path / "torn.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"torn\.json\.gz: cannot be read to its end"):
        read(tmp_path, tmp_path / "torn.json.gz", [])


def test_services_and_files(tmp_path):
    (tmp_path / "r.json").write_text(review())
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"asin": "0000000011", "title": name}))
    table = {
        "kind": "amazon_reviews",
        "release": 2018,
        "services": {s: {"reviews": "r.json", "meta": f"{s}.json"} for s in ("a", "b")},
    }
    config = source_config(table, "test")
    logs = list(rows(config, tmp_path))
    assert [(log.service, log.text, log.position) for log in logs] == [("a", "a", 0), ("b", "b", 1)]
    assert {p.name for p in source_files(config, tmp_path)} == {"a.json", "b.json", "r.json"}
    with pytest.raises(ConfigError, match="release"):
        source_config({**table, "release": 2016}, "test")
    with pytest.raises(ConfigError, match="text"):
        source_config({**table, "text": ["reviewText"]}, "test")


# Whatever a file holds: each line is a log or a problem, and none tells what a person wrote. What
# people write is in Greek here, which no message is.
GREEK = st.text("αβγδεζηθ", min_size=1)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | GREEK
KEYS = st.sampled_from(["asin", "title", "brand", "category", "categories", "reviewText"]) | GREEK
VALUES = st.recursive(SCALARS, lambda x: st.lists(x) | st.dictionaries(KEYS, x), max_leaves=8)
ROWS = st.fixed_dictionaries(
    {"reviewText": GREEK, "reviewerName": GREEK, "summary": GREEK},
    optional={
        "asin": st.sampled_from(["0000000011", "0000000022"]) | VALUES,
        "reviewerID": st.just("A1") | VALUES,
        "overall": st.integers(-1, 6) | VALUES,
        "unixReviewTime": st.integers(-9, 2**33) | VALUES,
        "title": GREEK | VALUES,
        "category": VALUES,
        "categories": VALUES,
    },
)
LINES = (
    st.binary().map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))
    | (ROWS | VALUES).map(lambda x: json.dumps(x).encode())
    | (ROWS | VALUES).map(lambda x: json.dumps(x, ensure_ascii=False).encode())
    | (ROWS | VALUES).map(lambda x: repr(x).encode())
    | st.lists(GREEK | st.just("0000000011") | st.integers().map(str), min_size=3, max_size=5).map(
        lambda x: ",".join(x).encode()
    )
)
SHOWN = r"('[-+0-9.:/TZeE, ]*'|text of [\d,]+ characters)"
REASON = re.compile(
    r"not JSON|neither JSON nor a Python literal|not an object|no (asin|reviewerID|user)|"
    r"(title|category|brand) is no text|"
    r"(the line|title|category|brand|asin|reviewerID) is not valid text|"
    r"overall is no number|unixReviewTime is no whole number|"
    rf"(not a rating of 1 to 5|not a time from 1970 to 2099): {SHOWN}|"
    rf"(rating is no number|time is no whole number): {SHOWN}|"
    r"\d+ fields, not (user,item|item,user),rating,time|"
    r"the item is no asin of 10 letters and digits; is it the other release\?"
)


@given(
    reviews=st.lists(LINES, max_size=4),
    meta=st.lists(LINES, max_size=4),
    release=st.sampled_from([2014, 2018]),
    suffix=st.sampled_from([".csv", ".json"]),
)
def test_any_line_is_a_log_or_a_problem(tmp_path_factory, reviews, meta, release, suffix):
    folder = tmp_path_factory.getbasetemp()
    made = folder / f"reviews{suffix}", folder / "meta.json"
    for path, lines in zip(made, (reviews, meta), strict=True):
        path.write_bytes(b"\n".join(lines))
    logs = read(folder, *made, release=release, text=["title", "category", "brand"])
    sound = [log for log in logs if not log.problem]
    of_reviews = [log for log in logs if log.problem and str(made[0]) in log.problem]
    n_reviews, n_meta = (
        sum(1 for line in path.read_bytes().removeprefix(BOM_UTF8).split(b"\n") if line)
        for path in made
    )
    assert len(sound) + len(of_reviews) == n_reviews
    assert len(logs) - len(sound) - len(of_reviews) <= n_meta
    for log in logs:
        if log.problem:
            where, _, reason = log.problem.partition(": ")
            assert where.rpartition(":")[0] in map(str, made)
            assert REASON.fullmatch(reason), reason
            assert log == Log(problem=log.problem)
        else:
            assert log.user
            assert log.item
            assert log.service == "x"
            assert 1 <= log.rating <= 5
            "".join(filter(None, log[:4])).encode()


@given(ROWS)
def test_what_a_reviewer_wrote_stays_in_the_file(tmp_path_factory, row):
    base = tmp_path_factory.getbasetemp()
    row = {**row, "asin": "0000000011", "reviewerID": "A1", "title": "Mug", "brand": "b"}
    row.pop("category", None), row.pop("categories", None)
    line = json.dumps(row)
    logs = read(base, [line], [line], text=["title", "category", "brand"])
    assert not re.search("[α-ω]", repr(logs))
