"""Ranking metrics of 100,000 users x 101 candidates: beside torchmetrics and ranx.

All sides get the same scores, the positive's in the first column, and give HR@1, HR@10, NDCG@10 and
MRR; sides take turns, medians are given. Peers that are slow get fewer users, and their seconds are
multiplied up: theirs grow at least as fast as the number of users.

    ours               scaling.transfer.metrics: ranks, the four means, and the tie gap
    ranx, arrays       sorted by numpy for it, then compiled loops over [users, candidates, 2]
    ranx, dicts        Qrels and Run made of dictionaries, as its documents have it; not with
                       --quick, since compiling this alone takes half a minute the first time
    torchmetrics       one Retrieval object for each metric, all users in one update

Before anything is timed the sides must agree on scores without ties. torchmetrics' MRR does not: it
drops positives with a score of 0 or less (its pull request 3104), so that is what it must equal.
What each makes of ties (scores that are counts) is shown. Two more comparisons: intervals over
users beside scipy.stats.bootstrap, and full rankings beside sorting every row.

    python benchmarks/metrics.py --quick
    pip install 'ranx>=0.3.20' 'torchmetrics>=1.4'
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ranx
import scipy.stats
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from scaling.transfer.intervals import bootstrap
from scaling.transfer.metrics import METRICS, per_target, rank, rank_all, summarise

CANDIDATES = 101
RANX = ["hit_rate@1", "hit_rate@10", "ndcg@10", "mrr"]
"""Its names, in the order of METRICS."""
Scores = np.ndarray[Any, Any]
Values = dict[str, float]


# --- the sides ------------------------------------------------------------------------------------


def ours(scores: Scores) -> Values:
    """Ranks, means and tie gap."""
    row = summarise(rank(scores))
    return {name: row[name] for name in METRICS}


def ranx_arrays(scores: Scores) -> Values:
    """Sorted arrays of (item, score), positives as (item, relevance)."""
    order = np.argsort(-scores, axis=1)
    run = np.stack([order, np.take_along_axis(scores, order, axis=1)], axis=2, dtype=np.float64)
    qrels = np.tile([0.0, 1.0], (len(scores), 1, 1))
    found = ranx.evaluate(qrels, run, RANX)
    return dict(zip(METRICS, map(float, found.values()), strict=True))


def ranx_dicts(scores: Scores) -> Values:
    """Dictionaries of names, in which the positive's place says nothing."""
    names = [f"d{i}" for i in np.random.default_rng(0).permutation(scores.shape[1])]
    qrels = ranx.Qrels({f"q{user}": {names[0]: 1} for user in range(len(scores))})
    rows = enumerate(scores.tolist())
    run = ranx.Run({f"q{user}": dict(zip(names, row, strict=True)) for user, row in rows})
    found = ranx.evaluate(qrels, run, RANX)
    return dict(zip(METRICS, map(float, found.values()), strict=True))


def torchmetrics(scores: Scores) -> Values:
    """Flat predictions, targets and users' numbers."""
    preds = torch.from_numpy(scores).flatten()
    target = torch.zeros(scores.shape, dtype=torch.bool)
    target[:, 0] = True
    users = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    found = {}
    each = RetrievalHitRate(top_k=1), RetrievalHitRate(top_k=10), RetrievalNormalizedDCG(top_k=10)
    for name, metric in zip(METRICS, (*each, RetrievalMRR()), strict=True):
        metric.update(preds, target.flatten(), indexes=users)
        found[name] = float(metric.compute())
    return found


SIDES: dict[str, Callable[[Scores], Values]] = {
    "ours": ours,
    "ranx, arrays": ranx_arrays,
    "ranx, dicts": ranx_dicts,
    "torchmetrics": torchmetrics,
}


def logits(users: int) -> Scores:
    """Scores without ties, a fifth of the positives' not above 0. [users, candidates]"""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((users, CANDIDATES)).astype(np.float32)
    scores[:, 0] += 0.8
    while (tied := (scores[:, :1] == scores[:, 1:]).any(axis=1)).any():
        scores[tied, 0] = np.nextafter(scores[tied, 0], np.float32(9))
    return scores


def counts(users: int) -> Scores:
    """Scores as popularity has them: small numbers, many of them alike. [users, candidates]"""
    rng = np.random.default_rng(1)
    scores = rng.poisson(1.0, (users, CANDIDATES))
    scores[:, 0] += rng.poisson(2.0, users)
    return scores.astype(np.float32)


def same(found: dict[str, Values], expected: Values, dropped: float) -> None:
    """Stop unless every side gives these values, and torchmetrics this MRR."""
    for side, values in found.items():
        wanted = {**expected, "mrr": dropped} if side == "torchmetrics" else expected
        for name, value in wanted.items():
            if not abs(values[name] - value) < 1e-5:
                raise SystemExit(f"{side}: {name} is {values[name]:.6f}, not {value:.6f}")


# --- what is measured -----------------------------------------------------------------------------


def agreement(sides: list[str], users: int) -> dict[str, dict[str, Values]]:
    """What every side says of the same scores, without and with ties."""
    scores = logits(users)
    place = 1 + np.argmax(np.argsort(-scores, axis=1) == 0, axis=1)
    near = np.where(place <= 10, 1 / np.log2(place + 1), 0.0)
    each = {"hr_1": place == 1, "hr_10": place <= 10, "ndcg_10": near, "mrr": 1 / place}
    expected = {name: float(values.mean()) for name, values in each.items()}
    found = {name: SIDES[name](scores) for name in sides}
    same(found, expected, dropped=float(np.where(scores[:, 0] > 0, 1 / place, 0.0).mean()))
    tied = counts(users)
    return {"logits": found, "counts": {name: SIDES[name](tied) for name in sides}}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    sizes: dict[str, int], turns: int, agree: int, catalogue: tuple[int, int]
) -> dict[str, Any]:
    """Measure all sides in turn.

    Args:
        sizes: users by side; one that is not there is left out.
        agree: users whose values are compared.
        catalogue: users and items of a full ranking.
    """
    say("comparing what the sides say, and compiling ranx")
    values = agreement(list(sizes), agree)
    scores = logits(max(sizes.values()))
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    alone, ranking, sorting, boot, scipys = [], [], [], [], []
    hits = per_target("hr_10", rank(scores))
    every = np.random.default_rng(2).standard_normal(catalogue, dtype=np.float32)
    targets = np.tile(np.arange(3), (len(every), 1))
    for turn in range(turns):
        for name, users in sizes.items():
            seconds[name].append(timed(lambda side=SIDES[name], n=users: side(scores[:n])))
        alone.append(timed(lambda: rank(scores[: sizes["ours"]])))
        ranking.append(timed(lambda: rank_all(every, targets)))
        sorting.append(timed(lambda: [np.argsort(-row) for row in every]))
        boot.append(timed(lambda: bootstrap(hits, 1000)))
        scipys.append(timed(lambda: scipys_bootstrap(hits, 100)) * 10)
        say(f"turn {turn + 1} of {turns}: ours {seconds['ours'][-1]:.3f} s")
    per_user = {name: [s / sizes[name] for s in all_s] for name, all_s in seconds.items()}
    over = {
        name: statistics.median(t / o for t, o in zip(theirs, per_user["ours"], strict=True))
        for name, theirs in per_user.items()
    }
    return {
        "ranks_100k_s": statistics.median(per_user["ours"]) * 100_000,
        "over_torchmetrics": over["torchmetrics"],
        "over_ranx": over["ranx, arrays"],
        "over_ranx_dicts": over.get("ranx, dicts"),
        "rank_share": statistics.median(r / o for r, o in zip(alone, seconds["ours"], strict=True)),
        "seconds_100k": {n: statistics.median(s) * 100_000 for n, s in per_user.items()},
        "users": sizes,
        "values": values,
        "values_users": agree,
        "bootstrap_1000_s": statistics.median(boot),
        "bootstrap_over_scipy": statistics.median(t / o for t, o in zip(scipys, boot, strict=True)),
        "bootstrap_users": len(hits),
        "full_ranking_s": statistics.median(ranking),
        "full_ranking_over_argsort": statistics.median(
            t / o for t, o in zip(sorting, ranking, strict=True)
        ),
        "full_ranking": {"users": len(every), "items": every.shape[1], "targets": 3},
        "turns": turns,
        "cores": len(os.sched_getaffinity(0)),
    }


def scipys_bootstrap(values: Scores, n_boot: int) -> object:
    """The same interval by scipy, a few draws at once."""
    return scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=n_boot, batch=10, method="percentile", rng=0
    )


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':<16}{'users':>9}{'s per 100,000 users':>22}{'/ ours':>10}"]
    mine = found["seconds_100k"]["ours"]
    for name, users in found["users"].items():
        took = found["seconds_100k"][name]
        lines.append(f"{name:<16}{users:>9,}{took:>22.3f}{took / mine:>10.1f}")
    for kind, sides in found["values"].items():
        lines += ["", f"{kind + ':':<16}" + "".join(f"{k:>9}" for k in METRICS) + "   agrees"]
        for name, values in sides.items():
            gap = {k: abs(values[k] - sides["ours"][k]) for k in METRICS}
            said = ", ".join(f"{k} by {d:.4f}" for k, d in gap.items() if d > 1e-5)
            row = f"{name:<16}" + "".join(f"{values[k]:>9.4f}" for k in METRICS)
            lines.append(f"{row}   {'no: ' + said if said else 'yes'}")
    full = found["full_ranking"]
    lines += [
        "",
        f"values over {found['values_users']:,} users; torchmetrics' MRR drops positives with a "
        "score <= 0 (its pull request 3104).",
        f"{found['rank_share']:.0%} of ours is ranking, the rest four means at three tie rules.",
        f"interval over {found['bootstrap_users']:,} users, 1,000 draws: "
        f"{found['bootstrap_1000_s']:.2f} s; scipy / ours {found['bootstrap_over_scipy']:.1f}",
        f"{full['targets']} targets of {full['users']:,} users among {full['items']:,} items: "
        f"{found['full_ranking_s']:.2f} s; argsort / ours {found['full_ranking_over_argsort']:.1f}",
        f"{found['turns']} turns, {found['cores']} cores",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--quick", action="store_true", help="slow peers smaller, within 50 s")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    most = args.users
    sizes = {"ours": most, "ranx, arrays": most}
    if not args.quick:
        sizes["ranx, dicts"] = min(most, 10_000)
    sizes["torchmetrics"] = min(most, 100 if args.quick else 2_000)
    turns = args.turns or (3 if args.quick else 7)
    agree = min(most, 500 if args.quick else 5_000)
    with contextlib.redirect_stdout(sys.stderr):
        found = compare(sizes, turns, agree, (500 if args.quick else 10_000, 12_000))
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
