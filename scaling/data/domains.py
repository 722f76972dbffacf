"""How alike domains are: Kendall's tau-b between the token distributions of their logs.

Shin et al. 2023, Figure 5, for corpora, their services and their tasks. The paper does not say over
which tokens it ranks, and the number depends on it, so that each is stored with its variant:

- ``union``: tokens that occur in either domain; those of one alone count as 0 in the other;
- ``intersection``: tokens that occur in both;
- ``top_1000``: the 1,000 most frequent tokens of the first domain. Chosen by both, by the sum of
  their shares, say, the rare in one would be frequent in the other, and tau too low.

Ranks of tokens compare only where both domains were cut into tokens by the same rules, as the
paper's were by one tokenizer. Strings of two tokenizers' tokens do not: "kitchen" is one token here
and two there. So the first corpus's tokenizer is used for all: where another corpus has another,
its items are decoded and encoded again. Tokens of services are no text and are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data import tokenizer
from scaling.data.corpus import Corpus, Progress
from scaling.data.statistics import Texts, count_items, item_counts, text_tokens, token_counts
from scaling.data.tasks import Task

Ints = NDArray[np.int64]
VARIANTS = ("union", "intersection", "top_1000")
TOP = 1_000
"""Tokens of the last of them."""
CUT = "\ufffd"
"""What a character decodes to of which the cut at 32 tokens left some bytes only."""


@dataclass(frozen=True)
class Domain:
    """Logs whose tokens are counted."""

    name: str
    """``corpus``: all logs of its pretraining users; ``corpus/service``: those of one service;
    ``corpus/tasks/task``: logs of a task's users in its service, histories and targets."""
    behaviours: int
    counts: Ints
    """Occurrences of every token of the first corpus's vocabulary. [vocabulary]"""


def compare(corpora: Sequence[Corpus], progress: Progress | None = None) -> dict[str, Any]:
    """Tau-b between all domains of some corpora.

    Args:
        corpora: the first one's tokenizer is used for all.
        progress: told of each corpus as it begins.

    Returns:
        ``tokenizer``: the corpus it is of; ``domains``: ``domain``, ``behaviours``, ``tokens``,
        ``vocabulary`` (distinct tokens); ``pairs``, one row a pair and variant: ``a``, ``b``,
        ``variant``, ``tau_b`` (None where it is not defined: fewer than two tokens, or all of one
        count), ``vocabulary`` (tokens that were ranked).

    Raises:
        CorpusError: a task leaks.
    """
    names = [c.card.name for c in corpora]
    found: list[Domain] = []
    for i, corpus in enumerate(corpora):
        name = corpus.card.name if names.count(corpus.card.name) == 1 else corpus.path.name
        if progress:
            progress(i, len(corpora), name)
        found += domains(corpus, name, corpora[0])
    return {
        "tokenizer": corpora[0].path.name,
        "domains": [
            {
                "domain": d.name,
                "behaviours": d.behaviours,
                "tokens": int(d.counts.sum()),
                "vocabulary": int((d.counts > 0).sum()),
            }
            for d in found
        ],
        "pairs": [
            {"a": a.name, "b": b.name, "variant": v, **tau_b(a.counts, b.counts, v)}
            for a, b in combinations(found, 2)
            for v in VARIANTS
        ],
    }


def domains(corpus: Corpus, name: str, reference: Corpus) -> list[Domain]:
    """A corpus's pretraining, its services and its tasks, in tokens of ``reference``."""
    logs = {f"{name}/{s}": item_counts(corpus, s) for s in corpus.card.services}
    services = len(logs)
    logs |= {f"{name}/tasks/{t}": _task_counts(corpus, t) for t in corpus.manifest["tasks"]}
    tokens = _in_tokens_of(reference, corpus, [*logs.values()])
    parts = [Domain(n, int(logs[n].sum()), t) for n, t in zip(logs, tokens, strict=True)]
    total = sum(p.behaviours for p in parts[:services])
    return [Domain(name, total, np.sum(tokens[:services], axis=0)), *parts]


def similarity(
    corpus: Corpus, owner: Corpus, task: str, services: Sequence[str] | None = None
) -> dict[str, float | None]:
    """Tau-b between a corpus's pretraining, its services together, and one task.

    Args:
        corpus: its tokenizer is used for both.
        owner: corpus of the task: ``corpus`` itself, or another.
        services: those that are pretrained on; None: all of ``corpus``.

    Returns:
        By variant; None where it is not defined.

    Raises:
        CorpusError: there is no such task, or it leaks.
    """
    counts = [item_counts(corpus, s) for s in services or corpus.card.services]
    (pretraining,) = _in_tokens_of(corpus, corpus, [np.sum(counts, axis=0)])
    (of_task,) = _in_tokens_of(corpus, owner, [_task_counts(owner, task)])
    return {v: tau_b(pretraining, of_task, v)["tau_b"] for v in VARIANTS}


def _task_counts(corpus: Corpus, name: str) -> Ints:
    """Logs of every item by a task's users in its service, histories and targets. [items]"""
    task = Task.open(corpus, name)
    _, history = task.history(task.service)
    return count_items(corpus, history) + count_items(corpus, task.targets.reshape(-1))


def _in_tokens_of(reference: Corpus, corpus: Corpus, logs: Sequence[Ints]) -> list[Ints]:
    """Occurrences of every token of ``reference`` in logs of ``corpus``. [vocabulary] each"""
    texts = text_tokens if same_tokenizer(corpus, reference) else encoded_again(corpus, reference)
    return token_counts(corpus, logs, reference.card.vocab_size, texts)


def same_tokenizer(one: Corpus, other: Corpus) -> bool:
    """Whether two corpora's texts were cut into tokens alike: by the same file."""
    digest, another = (c.manifest["files"]["tokenizer.json"]["sha256"] for c in (one, other))
    return bool(digest == another)


def encoded_again(corpus: Corpus, reference: Corpus) -> Texts:
    """Texts of a corpus in tokens of another: what the cut at 32 tokens left of them, cut again."""
    own = tokenizer.load(corpus.path / "tokenizer.json")
    target = tokenizer.load(reference.path / "tokenizer.json")

    def texts(corpus: Corpus, block: slice) -> tuple[Ints, Ints]:
        lengths, tokens = text_tokens(corpus, block)
        ends, ids = np.cumsum(lengths).tolist(), tokens.tolist()
        decoded = own.decode_batch([ids[a:b] for a, b in pairwise([0, *ends])])
        parts = list(tokenizer.encode(target, (text.rstrip(CUT) for text in decoded)))
        return np.concatenate([n for n, _ in parts]), np.concatenate([t for _, t in parts])

    return texts


def tau_b(a: Ints, b: Ints, variant: str) -> dict[str, Any]:
    """Kendall's tau-b of two token distributions, and how many tokens were ranked.

    Tau-b counts pairs of tokens that both distributions order the same way less those that they
    order oppositely, and allows for ties (Kendall 1945, Biometrika 33, 239-251).

    Args:
        a, b: occurrences of every token. [vocabulary]
        variant: one of ``VARIANTS``.
    """
    from scipy.stats import kendalltau  # a second to import

    if variant == "top_1000":
        kept = np.argsort(-a, kind="stable")[: min(TOP, np.count_nonzero(a))]
    else:
        both = (a > 0) & (b > 0) if variant == "intersection" else (a > 0) | (b > 0)
        kept = np.flatnonzero(both)
    tau = float(kendalltau(a[kept], b[kept]).statistic) if len(kept) > 1 else np.nan
    return {"tau_b": None if np.isnan(tau) else tau, "vocabulary": len(kept)}
