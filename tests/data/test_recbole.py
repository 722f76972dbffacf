"""The source of RecBole's atomic files: UniSRec's Scientific; fixtures of ours for the rest."""

import gzip
import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.sources import Log, source_config, source_files
from scaling.data.sources.recbole import rows
from scaling.data.tasks import Task

SPLITS = ("train", "valid", "test")
SEQUENCES = "user_id:token\titem_id_list:token_seq\titem_id:token"
# Of ours, in the format of recbole.io/docs/user_guide/data/atomic_files.html.
INTER = """
user_id:token	item_id:token	rating:float	timestamp:float
u1	i2	4	978300760
u1	i1	3.5	978302109.0
u2	i9		978301968.75
""".strip()
ITEM = """
item_id:token	title:token_seq	year:float	class:token_seq
i1	Toy 7" Drum	1995	Wood Noise
i2		1996	Wood
i3
""".strip()


def read(base, service, text=("title",), **more):
    """All logs of the service ``x``; texts become files in ``base``."""
    services = {"x": service, **more}
    table = {"kind": "recbole", "text": list(text), "services": services}
    return list(rows(source_config(table, "test"), base))


def write(base, **texts):
    """Write files, ``_`` in a name standing for its dot."""
    for name, text in texts.items():
        (base / name.replace("_", ".")).write_text(text, encoding="utf-8")


def sequences(logs):
    """Items of each user in the order of the source."""
    assert [log.position for log in logs] == sorted(log.position for log in logs)
    found = defaultdict(list)
    for log in logs:
        assert log.problem is None
        found[log.user].append(log.item)
    return dict(found)


def unisrec(logs, cap=50, newest_first=True):
    """The three files that UniSRec (dataset/preprocessing/process_amazon.py) makes of sequences:
    the last item is for test, the one before for validation, and each item of the rest but the
    first is a training target."""
    lines = {split: [SEQUENCES] for split in SPLITS}

    def add(split, user, log, place):
        before = log[:place][-cap:]
        lines[split].append(f"{user}\t{' '.join(before)}\t{log[place]}")

    for user, log in logs.items():
        targets = range(1, len(log) - 2)
        for place in reversed(targets) if newest_first else targets:
            add("train", user, log, place)
        add("valid", user, log, len(log) - 2)
        add("test", user, log, len(log) - 1)
    return lines


@pytest.mark.data
def test_scientific(clue_test_data):
    folder = clue_test_data / "amazon18_scientific_unisrec"

    def lines(name):
        with gzip.open(folder / f"Scientific.{name}.gz", "rt", encoding="utf-8") as f:
            return [line.rstrip("\n").split("\t") for line in f]

    names = [f"Scientific.{split}.inter.gz" for split in SPLITS]
    service = {
        "inter": names,
        "items": "Scientific.text.gz",
        "item_index": "Scientific.item2index.gz",
        "user_index": "Scientific.user2index.gz",
    }
    logs = read(folder, service, ["text"])
    made = sequences(logs)
    assert (len(made), len({log.item for log in logs}), len(logs)) == (8_442, 4_385, 59_427)
    texts = dict(lines("text")[1:])
    assert all(log.text == texts[log.item] for log in logs)
    assert {log[4:] for log in logs} == {(None, i, None, None, None) for i in range(59_427)}
    assert {log.service for log in logs} == {"x"}
    # A row of the test file holds a user's last 51 items. Train has a row for each item of the log
    # but the first and the last two.
    items = {number: asin for asin, number in lines("item2index")}
    users = {number: raw for raw, number in lines("user2index")}
    rows_of = defaultdict(int)
    for user, _, _ in lines("train.inter")[1:]:
        rows_of[users[user]] += 1
    for user, before, item in lines("test.inter")[1:]:
        log = made[users[user]]
        assert log[-51:] == [items[i] for i in (*before.split(" "), item)]
        assert len(log) == 3 + rows_of[users[user]]


@pytest.mark.data
def test_corpus_file_of_scientific(clue_test_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpora = Path(__file__).parents[2] / "sweeps" / "corpora"
    corpus = Corpus.open(prepare(corpora / "scientific.toml", tmp_path))
    steps = corpus.manifest["steps"]
    assert steps[0] == {"step": "read", "logs": 59_427, "malformed": 0}
    assert {(s["logs"], s["users"]) for s in steps[1:]} == {(59_427, 8_442)}
    assert corpus.n_items == 4_385
    task = Task.open(corpus, "lmrec")
    assert (task.n_users, task.cut) == (8_442, "order")
    for place, split in enumerate(("valid", "test")):  # how often each item is the target
        path = clue_test_data / "amazon18_scientific_unisrec" / f"Scientific.{split}.inter.gz"
        with gzip.open(path, "rt") as f:
            targets = Counter(line.split("\t")[2] for line in list(f)[1:])
        assert Counter(Counter(task.targets[:, place].tolist()).values()) == Counter(
            targets.values()
        )


def test_interactions(tmp_path):
    write(tmp_path, a_inter=INTER, a_item=ITEM)
    service = {"inter": ["a.inter"], "items": "a.item"}
    assert read(tmp_path, service) == [
        Log("u1", "x", "i2", None, 978_300_760, 0, 4.0),
        Log("u1", "x", "i1", 'Toy 7" Drum', 978_302_109, 1, 3.5),
        Log("u2", "x", "i9", None, 978_301_968, 2, None),
    ]
    texts = [log.text for log in read(tmp_path, service, ["title", "class"])]
    assert texts == ["Wood", 'Toy 7" Drum. Wood Noise', None]


def test_interactions_without_times_and_ratings(tmp_path):
    write(tmp_path, a_inter="item_id:token\tuser_id:token\ni1\tu1\ni2\tu1\n", a_item=ITEM)
    logs = read(tmp_path, {"inter": ["a.inter", "a.inter"], "items": "a.item"})
    assert sequences(logs) == {"u1": ["i1", "i2"] * 2}
    assert {(log.time, log.rating) for log in logs} == {(None, None)}


def test_texts_as_unisrec_writes_them(tmp_path):
    items = "item_id:token\ttext:token_seq\nA\tMug.\tblue. \nB\t. . . \nC\t\nD\nA\tother\n"
    write(
        tmp_path,
        a_inter="user_id:token\titem_id:token\n" + "u\tA\nu\tB\nu\tC\nu\tD\n",
        a_text=items,
    )
    logs = read(tmp_path, {"inter": ["a.inter"], "items": "a.text"}, ["text"])
    assert [log.text for log in logs] == ["Mug.\tblue. ", None, None, None]


def test_order_of_columns_is_free_and_so_is_a_byte_order_mark(tmp_path):
    write(tmp_path, a_inter=INTER, a_item="\ufefftitle:token_seq\titem_id:token\nMug\ti1\nCup\n")
    problem, _, log, _ = read(tmp_path, {"inter": ["a.inter"], "items": "a.item"})
    assert problem == Log(problem=f"{tmp_path}/a.item:3: no item_id")
    assert (log.item, log.text) == ("i1", "Mug")


LOGS = st.dictionaries(
    st.sampled_from(["0", "1", "2"]),
    st.lists(st.sampled_from("abcd"), min_size=3, max_size=12),
    min_size=1,
)


@given(logs=LOGS, cap=st.integers(2, 6) | st.just(50), newest_first=st.booleans(), data=st.data())
def test_sequences_are_rebuilt(tmp_path_factory, logs, cap, newest_first, data):
    """Each behaviour once and in order, in whatever order the files have the users."""
    base = tmp_path_factory.getbasetemp()
    for split, (header, *lines) in unisrec(logs, cap, newest_first).items():
        users = data.draw(st.permutations(sorted(logs)))
        lines.sort(key=lambda line: users.index(line[0]))  # stable
        write(base, **{f"{split}_inter": "\n".join([header, *lines])})
    write(base, items_text="item_id:token\ttext:token_seq\n")
    names = [f"{split}.inter" for split in SPLITS]
    assert sequences(read(base, {"inter": names, "items": "items.text"}, ["text"])) == logs
    # Without train, a user's log begins where the row of validation begins.
    short = {user: log[max(0, len(log) - 2 - cap) :] for user, log in logs.items()}
    assert sequences(read(base, {"inter": names[1:], "items": "items.text"}, ["text"])) == short


def test_sequences_with_faults(tmp_path):
    """A row that is damaged, lost, twice, or out of order is told; the others still count."""
    log = [f"i{n}" for n in range(8)]
    whole = unisrec({"u": log})
    write(tmp_path, items_text="item_id:token\ttext:token_seq\n")
    service = {"inter": [f"{split}.inter" for split in SPLITS], "items": "items.text"}
    lost = "the row does not continue its user's sequence"

    def told(split, change):
        lines = {name: list(rows) for name, rows in whole.items()}
        change(lines[split])
        write(tmp_path, **{f"{name}_inter": "\n".join(rows) for name, rows in lines.items()})
        logs = read(tmp_path, service, ["text"])
        problems = [x.problem.removeprefix(f"{tmp_path}/") for x in logs if x.problem]
        return [x.item for x in logs if not x.problem], problems

    assert told("train", lambda rows: None) == (log, [])
    # Rows of train, from line 2 on: targets i5, i4, i3, i2, i1.
    assert told("train", lambda rows: rows.pop(2)) == (
        ["i0", "i1", "i2", "i3", "i6", "i7"],
        [f"train.inter:2: {lost}"],
    )
    assert told("train", lambda rows: rows.insert(2, rows[2])) == (log, [f"train.inter:3: {lost}"])
    assert told("train", lambda rows: rows.pop(1)) == (
        ["i0", "i1", "i2", "i3", "i4", "i7"],
        [f"valid.inter:2: {lost}"],
    )
    assert told("valid", lambda rows: rows.append(rows[1])) == (log, [f"valid.inter:2: {lost}"])
    kept, problems = told("train", lambda rows: rows.__setitem__(5, "u\ti0"))
    assert (kept, problems) == (log, ["train.inter:6: 2 fields, not 3"])  # i0 is in the next row
    kept, problems = told("test", lambda rows: rows.__setitem__(1, "u\t\ti7"))
    assert (kept, problems) == (log[:-1], [f"test.inter:2: {lost}"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("u1\ti1\t3", "3 fields, not 4"),
        ("u1\ti1\t3\t7\tZyx", "5 fields, not 4"),
        ("\ti1\t3\t7", "no user_id"),
        ("u1\t\t3\t7", "no item_id"),
        ("u1\ti1\tZyx\t7", "rating is no number: text of 3 characters"),
        ("u1\ti1\tinf\t7", "rating is no number: text of 3 characters"),
        ("u1\ti1\t3\t", "timestamp is no number: ''"),
        ("u1\ti1\t3\t1e300", "not a time from 1970 to 2099: '1e300'"),
        ("u1\ti1\t3\t-1", "not a time from 1970 to 2099: '-1'"),
        ("Zyx\udcff\ti1\t3\t7", "the line is not valid text"),
    ],
)
def test_malformed_interactions(tmp_path, line, reason):
    header, *lines = INTER.split("\n")
    text = "\n".join([header, line, *lines]).encode(errors="surrogateescape")
    (tmp_path / "a.inter").write_bytes(text)
    write(tmp_path, a_item=ITEM)
    first, *others = read(tmp_path, {"inter": ["a.inter"], "items": "a.item"})
    assert first == Log(problem=f"{tmp_path}/a.inter:2: {reason}")
    assert len(others) == 3
    assert not [log for log in others if log.problem]


def test_malformed_items_and_indices(tmp_path):
    write(
        tmp_path,
        a_inter="user_id:token\titem_id:token\n0\t0\n0\t1\n1\t0\n",
        a_item=ITEM + "\n\tNameless\n",
        a_item2index="i1\t0\ni2\t0\n\t1\ni3\n",
        a_user2index="Raw\t0\n",
    )
    service = {
        "inter": ["a.inter"],
        "items": "a.item",
        "item_index": "a.item2index",
        "user_index": "a.user2index",
    }
    logs = read(tmp_path, service)
    assert [log.problem.removeprefix(f"{tmp_path}/") for log in logs if log.problem] == [
        "a.item:5: no item_id",
        "a.item2index:2: its number is there twice",
        "a.item2index:3: no raw id",
        "a.item2index:4: 1 fields, not 2",
        "a.inter:3: not in item_index",
        "a.inter:4: not in user_index",
    ]
    assert [log[:4] for log in logs if not log.problem] == [("Raw", "x", "i1", 'Toy 7" Drum')]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "no header"),
        ("u1\ti1\t3\t7", "no header"),
        ("user_id\titem_id", "no header"),
        ("user_id:token\tproduct_id:token", "has not one column 'item_id'; .*user_id, product_id"),
        ("user_id:token\tuser_id:token\titem_id:token", "has not one column 'user_id'"),
    ],
)
def test_wrong_headers(tmp_path, header, message):
    write(tmp_path, a_inter=f"{header}\nu1\ti1\n", a_item=ITEM)
    with pytest.raises(CorpusError, match=rf"a\.inter: .*{message}"):
        read(tmp_path, {"inter": ["a.inter"], "items": "a.item"})
    write(tmp_path, a_inter=INTER)
    with pytest.raises(CorpusError, match=r"a\.item: .*'text'; its columns: item_id, title, year"):
        read(tmp_path, {"inter": ["a.inter"], "items": "a.item"}, ["text"])


def test_torn_file(tmp_path):
    write(tmp_path, a_item=ITEM)
    whole = gzip.compress(INTER.encode() + b"".join(b"\nu%d\ti1\t3\t7" % i for i in range(9_999)))
    (tmp_path / "a.inter.gz").write_bytes(whole[:-999])
    with pytest.raises(CorpusError, match=r"a\.inter\.gz: cannot be read to its end"):
        read(tmp_path, {"inter": ["a.inter.gz"], "items": "a.item"})


def test_services(tmp_path):
    """Users with one name are one user; numbers of UniSRec's are no names."""
    write(tmp_path, a_inter=INTER, a_item=ITEM)
    plain = {"inter": ["a.inter"], "items": "a.item"}
    logs = read(tmp_path, plain, y=plain)
    assert [log.service for log in logs] == ["x"] * 3 + ["y"] * 3
    assert [log.position for log in logs] == list(range(6))
    numbered = {**plain, "item_index": "a.item2index"}
    with pytest.raises(ConfigError, match=r"services\.y\.user_index is missing"):
        read(tmp_path, plain, y=numbered)
    one = source_config(
        {"kind": "recbole", "services": {"x": {**numbered, "user_index": "u"}}}, "test"
    )
    names = [path.name for path in source_files(one, tmp_path)]
    assert names == ["a.inter", "a.item", "a.item2index", "u"]


SHOWN = r"('[-+0-9.:/TZeE, ]*'|text of [\d,]+ characters)"
REASON = re.compile(
    r"the line is not valid text|\d+ fields, not \d|no (user_id|item_id|raw id|number)|"
    r"the row does not continue its user's sequence|"
    rf"((rating|timestamp) is no number|not a time from 1970 to 2099): {SHOWN}|"
    r"not in (user|item)_index|its number is there twice"
)
CELL = st.sampled_from(["u", "7", "i1", "i1 i2", "i1 i2 i1", ""]) | st.text("αβ 1", max_size=3)
LINE = st.lists(CELL, min_size=1, max_size=5).map(lambda x: "\t".join(x).encode()) | st.binary()
BLOCK = st.lists(LINE, max_size=6).map(lambda x: b"\n" + b"\n".join(x))


@given(
    inter=st.tuples(st.sampled_from([SEQUENCES, INTER.split("\n")[0]]), BLOCK),
    items=BLOCK,
    indices=st.none() | st.tuples(BLOCK, BLOCK),
)
def test_any_row_is_logs_or_a_problem(tmp_path_factory, inter, items, indices):
    base = tmp_path_factory.getbasetemp()
    (base / "a.inter").write_bytes(inter[0].encode() + inter[1])
    (base / "a.item").write_bytes(ITEM.split("\n")[0].encode() + items)
    service = {"inter": ["a.inter"], "items": "a.item"}
    for name, block in zip(("item_index", "user_index"), indices or (), strict=False):
        (base / name).write_bytes(block)
        service[name] = name
    logs = read(base, service)
    problems = [log.problem for log in logs if log.problem]
    for problem in problems:
        assert REASON.fullmatch(problem.partition(": ")[2]), problem
    sound = [log for log in logs if not log.problem]
    assert all(log.user and log.service == "x" for log in sound)
    "".join(itertools.chain.from_iterable(filter(None, log[:4]) for log in sound)).encode()
    n_rows = sum(1 for line in re.split(rb"\r\n|\r|\n", inter[1]) if line)
    n_told = sum("a.inter:" in problem for problem in problems)
    if inter[0] == SEQUENCES:
        assert n_rows <= n_told + len(sound)
    else:
        assert n_rows == n_told + len(sound)
