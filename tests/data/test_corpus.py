import json

import numpy as np
import pytest

from scaling.data.corpus import Corpus, CorpusError, load_array
from scaling.data.prepare import find_prepared
from scaling.files import RecordError


@pytest.fixture
def corpus(tiny_corpus):
    root = tiny_corpus()
    return find_prepared(root, root / "tiny.toml")


def test_open_find_and_verify(corpus):
    root = corpus.path.parent.parent
    again = Corpus.find(root, corpus.card.digest)
    assert again.path == corpus.path
    again.verify()
    assert corpus.services == ("books", "garden", "beauty")
    assert corpus.card.services == ("books", "garden")
    info = corpus.info()
    json.dumps(info)
    assert info["users"] == {"pretraining": corpus.card.n_users, "validation": 8, "pool": 16}
    assert info["bytes"] == sum(
        p.stat().st_size
        for p in corpus.path.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    )
    assert sum(corpus.card.tokens_per_item) == pytest.approx(1)
    with pytest.raises(CorpusError, match="no corpus aaaa; prepared: tiny-"):
        Corpus.find(root, "aaaa")
    with pytest.raises(CorpusError, match="no service of pretraining; valid: books, garden"):
        corpus.users("beauty")
    with pytest.raises(CorpusError, match="valid: pretraining, validation, pool"):
        corpus.split("test")


@pytest.mark.parametrize(
    "name",
    ["items/tokens.npy", "users/books/items.npy", "tasks/books/negatives.npy", "tokenizer.json"],
)
def test_every_damage_is_found(corpus, name):
    path = corpus.path / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(CorpusError, match=f"{path.name}: has {len(raw) - 1} bytes"):
        Corpus.open(corpus.path)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CorpusError, match=f"{path.name}: its SHA-256 is"):
        Corpus.open(corpus.path).verify()
    path.unlink()
    with pytest.raises(CorpusError, match=f"{path.name}: is missing"):
        Corpus.open(corpus.path)


def test_a_changed_manifest_is_found(corpus):
    path = corpus.path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "splits": {**manifest["splits"], "pool": 15}}))
    with pytest.raises(CorpusError, match="its content is"):
        Corpus.open(corpus.path).verify()
    path.write_text(json.dumps({**manifest, "schema_version": 2}))
    with pytest.raises(CorpusError, match="schema_version = 2; this program reads 1"):
        Corpus.open(corpus.path)
    path.write_text(json.dumps(manifest)[:-9])
    with pytest.raises(RecordError, match="not a whole JSON record"):
        Corpus.open(corpus.path)
    path.unlink()
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        Corpus.open(corpus.path)


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
