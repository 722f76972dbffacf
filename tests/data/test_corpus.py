from scaling.data.prepare import find_prepared


def test_tiny(tiny_corpus):
    root = tiny_corpus()
    corpus = find_prepared(root, root / "tiny.toml")
    corpus.verify()
    print(corpus.info())
