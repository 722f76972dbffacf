import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from scaling import ClueError
from scaling.cli import app
from scaling.data import corpus as store
from scaling.data import verify
from scaling.data.corpus import Corpus, CorpusError, load_array
from scaling.data.tasks import Task
from scaling.files import RecordError


@pytest.fixture
def small_blocks(monkeypatch):
    """Every loop over blocks takes many turns, and one that is not whole."""
    monkeypatch.setattr(verify, "BLOCK", 32 * 3)
    monkeypatch.setattr(store.blocks, "__defaults__", (32 * 3,))


def faults(corpus: Corpus) -> list[str]:
    with pytest.raises(CorpusError) as e:
        corpus.verify()
    return str(e.value).splitlines()


def rewrite(path: Path, change: Any) -> None:
    """Change an array, in place or by giving another, and keep its type."""
    array = np.load(path)
    changed = change(array)
    np.save(path, array if changed is None else changed.astype(array.dtype))


def test_open_and_find(corpus):
    root = corpus.path.parent.parent
    again = Corpus.find(root, corpus.card.digest)
    assert again.path == corpus.path
    assert corpus.services == ("books", "garden", "beauty")
    assert corpus.card.services == ("books", "garden")
    assert sum(corpus.card.tokens_per_item) == pytest.approx(1)
    with pytest.raises(CorpusError, match="no corpus aaaa; prepared: tiny-"):
        Corpus.find(root, "aaaa")
    with pytest.raises(CorpusError, match="no service of pretraining; valid: books, garden"):
        corpus.users("beauty")
    with pytest.raises(CorpusError, match="valid: pretraining, validation, pool"):
        corpus.split("test")


# ---- files that are not what the manifest says --------------------------------------------------


def test_a_whole_corpus_is_whole(corpus, small_blocks, monkeypatch, resigned):
    told = []
    corpus.verify(lambda *what: told.append(what))
    assert told == []  # nothing large
    monkeypatch.setattr(verify, "LARGE", 0)
    corpus.verify(lambda *what: told.append(what))
    sizes = [r["bytes"] for r in corpus.manifest["files"].values()]
    assert [done for done, *_ in told] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert {total for _, total, _ in told} == {sum(sizes)}
    assert [name for *_, name in told] == list(corpus.manifest["files"])
    assert resigned(corpus.path).path == corpus.path


def test_every_damage_of_every_file_is_found(corpus):
    names = [*corpus.manifest["files"]]
    assert len(names) == sum(p.is_file() for p in corpus.path.rglob("*")) - 1
    for name in names:
        path = corpus.path / name
        raw = path.read_bytes()
        for cut in (raw[:-1], raw + b"\0", b""):
            path.write_bytes(cut)
            with pytest.raises(CorpusError, match=rf"{name}: has {len(cut)} bytes; .* {len(raw)} "):
                Corpus.open(corpus.path)
        path.unlink()
        with pytest.raises(CorpusError, match=f"{name}: is missing"):
            Corpus.open(corpus.path)
        for place in (len(raw) // 2, -1):
            flipped = bytearray(raw)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            if place == -1:  # never in a header, which opening reads
                [fault] = faults(Corpus.open(corpus.path))
            else:
                with pytest.raises(CorpusError) as e:
                    Corpus.open(corpus.path).verify()
                fault = str(e.value)
            assert str(path) in fault
        path.write_bytes(raw)
    Corpus.open(corpus.path).verify()


def test_every_fault_is_a_line(corpus):
    damaged = ["items/tokens.npy", "tasks/books/negatives.npy", "users/books/items.npy"]
    for name in damaged:
        path = corpus.path / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    lines = faults(Corpus.open(corpus.path))
    for line, name in zip(lines, damaged, strict=True):
        assert line.startswith(f"{corpus.path / name}: its SHA-256 is ")
        assert line.endswith(f"the manifest says {corpus.manifest['files'][name]['sha256']}")
    for name in damaged[:2]:
        (corpus.path / name).unlink()
    with pytest.raises(CorpusError) as e:
        Corpus.open(corpus.path)
    assert [line.split(": ")[0] for line in str(e.value).splitlines()] == [
        str(corpus.path / name) for name in damaged[:2]
    ]


def test_files_that_changed_places_are_found(corpus):
    files = corpus.manifest["files"]
    one, other = "users/books/offsets.npy", "users/garden/offsets.npy"
    assert files[one]["bytes"] == files[other]["bytes"]
    assert files[one]["sha256"] != files[other]["sha256"]
    first, second = (corpus.path / name for name in (one, other))
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    lines = faults(Corpus.open(corpus.path))
    assert [line.split(": ")[0] for line in lines] == [str(first), str(second)]


def test_verify_as_people_call_it(corpus):
    def call(*words: str) -> Any:
        return CliRunner().invoke(
            app, ["corpus", "verify", *words, "--root", str(corpus.path.parent.parent)]
        )

    whole = call("tiny")
    assert (whole.exit_code, whole.stdout) == (0, f"{corpus.path}: whole\n")
    for name in ("items/tokens.npy", "users/garden/items.npy"):
        raw = (corpus.path / name).read_bytes()
        (corpus.path / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    torn = call("tiny")
    assert (torn.exit_code, torn.stdout) == (2, "")
    assert torn.stderr.startswith(f"error: {corpus.path / 'items/tokens.npy'}: its SHA-256 is ")
    assert f"\n{corpus.path / 'users/garden/items.npy'}: its SHA-256 is " in torn.stderr


# ---- manifests ----------------------------------------------------------------------------------


def test_a_manifest_that_is_none_is_refused(corpus):
    path = corpus.path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": 2}))
    with pytest.raises(CorpusError, match="schema_version = 2; this program reads 1"):
        Corpus.open(corpus.path)
    path.write_text(json.dumps(manifest)[:-9])
    with pytest.raises(RecordError, match="not a whole JSON record"):
        Corpus.open(corpus.path)
    path.unlink()
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("key", store.MANIFEST)
def test_a_key_that_is_missing_or_of_another_kind_is_named(corpus, key):
    path = corpus.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed in (None, 7, [{}], {"x": 3}, "x"):
        if isinstance(changed, store.MANIFEST[key]):
            continue
        path.write_text(json.dumps({**manifest, key: changed}))
        with pytest.raises(CorpusError, match=rf"manifest\.json: {key} is missing or no "):
            Corpus.open(corpus.path)
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=rf"manifest\.json: {key} is missing or no "):
        Corpus.open(corpus.path)


CHANGES = {
    "name": lambda m: m.update(name="other"),
    "digest": lambda m: m.update(digest="a" * 16),
    "pool": lambda m: m["splits"].update(pool=15),
    "split": lambda m: m["splits"].pop("pool"),
    "services": lambda m: m["services"].reverse(),
    "file": lambda m: m["files"]["users/keys.npy"].update(sha256="0" * 64),
    "size": lambda m: m["files"]["users/keys.npy"].update(bytes=0),
    "record": lambda m: m["files"].update({"users/keys.npy": 7}),
    "fewer files": lambda m: m["files"].pop("users/keys.npy"),
    "task": lambda m: m["tasks"].update(books="a" * 16),
    "no such task": lambda m: m["tasks"].update(other="a" * 16),
    "file of a task": lambda m: m["files"].pop("tasks/books/keys.npy"),
    "card": lambda m: m["card"].pop("services"),
    "name in card": lambda m: m["card"].update(name="other"),
    "digest in card": lambda m: m["card"].update(digest="a" * 16),
    "n_users": lambda m: m["card"].update(n_users=m["card"]["n_users"] + 1),
    "vocab_size": lambda m: m["card"].update(vocab_size=m["card"]["vocab_size"] + 1),
    "pool in card": lambda m: m["card"]["pool"].update(digest="a" * 16),
    "items_per_user": lambda m: m["card"]["items_per_user"]["books"].reverse(),
    "tokens_per_item": lambda m: m["card"]["tokens_per_item"].reverse(),
    "services in card": lambda m: m["card"]["services"].reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_found(corpus, change):
    path = corpus.path / "manifest.json"
    manifest = json.loads(path.read_text())
    CHANGES[change](manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ClueError) as e:
        Corpus.open(corpus.path).verify()
    assert all(line.startswith(str(corpus.path)) for line in str(e.value).splitlines())
    if change in ("n_users", "items_per_user", "tokens_per_item"):
        assert str(e.value) == f"{path}: card.{change} is not that of the logs"


def test_a_folder_of_another_name_is_found(corpus):
    [fault] = faults(Corpus.open(corpus.path.rename(corpus.path.with_name("tiny-" + "a" * 16))))
    assert fault.endswith(f"its content is {corpus.path.name}, its folder says tiny-{'a' * 16}")


# ---- content that no digest can tell ------------------------------------------------------------


def put(value: int, *place: int) -> Any:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


def copied(to: int, source: int) -> Any:
    def change(array: np.ndarray) -> None:
        array[to] = array[source]

    return change


def swapped(one: int, other: int) -> Any:
    def change(array: np.ndarray) -> None:
        array[[one, other]] = array[[other, one]]

    return change


STRUCTURE = {
    "an item is empty": ("items/offsets.npy", copied(40, 41), r"row 40 is empty or of negative"),
    "items overlap": ("items/offsets.npy", swapped(40, 41), r"row 40 is empty or of negative"),
    "tokens belong to none": (
        "items/offsets.npy",
        lambda a: np.append(a[:-1], a[-1] - 1),
        r"offsets go from 0 to \d+, not from 0 to \d+",
    ),
    "the first item is cut": (
        "items/offsets.npy",
        lambda a: np.append(1, a[1:]),
        r"offsets go from 1 to",
    ),
    "a row too few": ("items/offsets.npy", lambda a: a[:-1], r"has (\d+) entries, not"),
    "no offsets": ("items/offsets.npy", lambda a: a[:0], r"has 0 entries, not"),
    "a service too few": ("items/service.npy", lambda a: a[1:], r"entries, not"),
    "an item is of another service": (
        "items/service.npy",
        put(1, 3),
        r"tokens\.npy: item 3 has no service token",
    ),
    "a service that is not": ("items/service.npy", put(9, -1), r"item \d+ has no service token"),
    "no service token": ("items/tokens.npy", put(300, 0), r"item 0 has no service token"),
    "padding": ("items/tokens.npy", put(0, -1), r"token 0 is none of a text \(4 to vocabulary\)"),
    "a service within a text": ("items/tokens.npy", put(3, -1), r"token 3 is none of a text"),
    "beyond the vocabulary": ("items/tokens.npy", put(999, -1), r"token 999 is none of a text"),
    "a user without logs": ("users/books/offsets.npy", copied(5, 4), r"row 4 is empty"),
    "logs that are nobody's": (
        "users/books/items.npy",
        lambda a: np.append(a, a[0]),
        r"users/books/offsets\.npy: its offsets go from 0",
    ),
    "a user too many": ("users/garden/offsets.npy", lambda a: np.append(a, a[-1]), r"entries, not"),
    "no such item": ("users/books/items.npy", put(60_000, -1), r"an item that is not in the table"),
    "an item of the garden": (
        "users/books/items.npy",
        "garden",
        r"an item of another service",
    ),
    "keys out of order": (
        "users/keys.npy",
        swapped(3, 4),
        r"users of pretraining do not lie in the order of their keys",
    ),
    "keys of the pool out of order": (
        "users/keys.npy",
        swapped(-2, -1),
        r"users of pool do not lie in the order of their keys",
    ),
    "a user of the pool is trained on": (
        "users/keys.npy",
        copied(0, -16),
        r"a user of validation or pool is one of pretraining",
    ),
    "a user of the pool is there twice": (
        "users/keys.npy",
        copied(-15, -16),
        r"a user is twice among those of validation and pool",
    ),
    "a user too few": ("users/keys.npy", lambda a: a[1:], r"keys\.npy: has \d+ entries, not \d+"),
    "a target among the negatives": (
        "tasks/books/negatives.npy",
        "target",
        r"tasks/books: a negative is an item the user touched",
    ),
    "a negative twice": (
        "tasks/books/negatives.npy",
        lambda a: np.repeat(a[:, :, :1], a.shape[2], axis=2),
        r"tasks/books: a negative is drawn twice",
    ),
    "a negative of another service": (
        "tasks/beauty/negatives.npy",
        put(0, 0, 0, 0),
        r"tasks/beauty: a negative is no item of 'beauty'",
    ),
    "a user of a task is trained on": (
        "tasks/books/keys.npy",
        "key",
        r"tasks/books: 1 of its users are users of pretraining",
    ),
}


@pytest.mark.parametrize("what", STRUCTURE)
def test_wrong_content_under_right_digests_is_found(corpus, small_blocks, resigned, what):
    name, change, message = STRUCTURE[what]
    if change == "target":
        change = put(Task.open(corpus, "books").targets[0, 1], 0, 0, 0)
    elif change == "key":
        trained = corpus.keys[0]
        assert trained < Task.open(corpus, "books").keys[1]  # the order of the users stays
        change = put(trained, 0)
        rewrite(corpus.path / "tasks/books/group.npy", put(int(trained % 10), 0))
    elif change == "garden":
        change = put(corpus.service_items("garden")[0], -1)
    rewrite(corpus.path / name, change)
    lines = faults(resigned(corpus.path))
    assert any(re.search(message, line) for line in lines), lines
    assert all("/corpora/tiny-" in line for line in lines)


def test_a_tokenizer_of_other_services_is_found(corpus, resigned):
    path = corpus.path / "tokenizer.json"
    path.write_text(path.read_text().replace("<service:beauty>", "<service:b>"))
    [fault] = faults(resigned(corpus.path))
    assert fault.endswith("tokenizer.json: token 3 is not that of service 'beauty'")


def test_an_item_of_too_many_tokens_is_found(corpus, resigned, small_blocks):
    """Items 0 to 20 become one; nothing else of them is wrong but the length."""
    tokens, offsets, service = (
        np.load(corpus.path / f"items/{n}.npy") for n in ("tokens", "offsets", "service")
    )
    kept = np.ones(len(tokens), bool)
    kept[offsets[1:20]] = False  # the service tokens within
    new = np.concatenate([[0], offsets[20:].astype(np.int64) - 19]).astype(offsets.dtype)
    for name, array in (("tokens", tokens[kept]), ("offsets", new), ("service", service[19:])):
        np.save(corpus.path / f"items/{name}.npy", array)
    [fault] = faults(resigned(corpus.path))
    assert fault.endswith("offsets.npy: item 0 has more than 32 tokens")


# ---- arrays -------------------------------------------------------------------------------------


def test_no_pickle_and_no_other_type(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match="not a readable npy file"):
        load_array(path)
    np.save(path, np.zeros(3))
    with pytest.raises(CorpusError, match="holds float64"):
        load_array(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(CorpusError, match="not a readable npy file"):
        load_array(path)
