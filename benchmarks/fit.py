"""Scaling-law fits on one core: seconds, and how far above the best known optimum.

Every side minimises the same sum of Huber losses of ln y; what it found is scored here. Sides take
turns; medians are given. Seconds are CPU seconds of one process on one core. A slow peer runs some
of its starts and bootstraps, and its seconds are multiplied up to all of them.

    ours        scaling.analysis.fit_law, bootstrap over rows by random weights, which all sides get
    chinchilla  PyPI: BFGS by finite differences in extended precision, 5^5 starts as in its README;
                a bootstrap is the fit again
    Epoch       its grid of 4,500 starts, L-BFGS-B by finite differences; a bootstrap is one BFGS
                from the fit, by gradient
    OLMo-core   settings of its pull request 554: 1,024 bounded starts, L-BFGS-B by finite
                differences; a bootstrap is the fit again
    lmfit       least_squares with Huber loss, 24 starts; a bootstrap is one from the fit
    scipy       the best we could make of it: centred columns, 24 starts at the data's scale,
                L-BFGS-B by gradient, a Newton polish; a bootstrap is one from the fit

Tables: Epoch's 240 rows for the laws in 2 terms (or as many synthetic ones), 200 synthetic rows for
4 terms; then Gemstones' 27 fits and datablations', each against the lowest objective known.

    python benchmarks/fit.py --quick
    python benchmarks/fit.py --data DATA        # a folder with published_fits/
    pip install 'chinchilla>=0.2' 'lmfit>=1.3'
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fit_sides as sides
import numpy as np
import pandas as pd
from fit_sides import Array, Table, timed, value

from scaling.analysis import LawFit, Objective, fit_law
from scaling.analysis.fitting.intervals import resampled_weights

DRAWS = 1000
README_STARTS, EPOCH_STARTS, OLMO_STARTS, STARTS = 5**5, 4_500, 1_024, 24
BEST = {
    "Epoch's Chinchilla": 1.0182740178006e-03,
    "synthetic, 2 terms": 9.7023549251743e-04,
    "synthetic, 4 terms": 9.3470204412642e-04,
    "Gemstones cool_end, 2 terms, delta 0.0001": 2.0477906755137e-04,
    "Gemstones cool_end_no_embeds, 2 terms, delta 0.0001": 1.7971930867310e-04,
    "Gemstones hot, 2 terms, delta 0.0001": 2.0750515560080e-04,
    "Gemstones hot_100b+, 2 terms, delta 0.0001": 6.9232890791736e-04,
    "Gemstones hot_100b+_no_embeds, 2 terms, delta 0.0001": 5.7193743985505e-04,
    "Gemstones hot_no_embeds, 2 terms, delta 0.0001": 1.8385637565477e-04,
    "Gemstones lr_ablation_hot, 2 terms, delta 0.0001": 2.0584208244574e-04,
    "Gemstones lr_ablation_hot_no_embeds, 2 terms, delta 0.0001": 1.8885983030041e-04,
    "Gemstones slim_chinchilla, 2 terms, delta 0.0001": 1.3036380282467e-05,
    "Gemstones hot_100b+, 3 terms, delta 0.0001": 4.1994617213086e-04,
    "Gemstones cool_end, 4 terms, delta 0.0001": 8.9273598234026e-05,
    "Gemstones hot, 4 terms, delta 0.0001": 1.1140379409569e-04,
    "Gemstones hot_100b+, 4 terms, delta 0.0001": 2.9480527637503e-04,
    "Gemstones lr_ablation_hot, 4 terms, delta 0.0001": 1.0918523610310e-04,
    "Gemstones cool_end, 2 terms, delta 0.001": 1.9640864311854e-03,
    "Gemstones cool_end_no_embeds, 2 terms, delta 0.001": 1.7132418337357e-03,
    "Gemstones hot, 2 terms, delta 0.001": 1.9816128088067e-03,
    "Gemstones hot_100b+, 2 terms, delta 0.001": 6.5925341645156e-03,
    "Gemstones hot_100b+_no_embeds, 2 terms, delta 0.001": 5.3939491254242e-03,
    "Gemstones hot_no_embeds, 2 terms, delta 0.001": 1.7466696231355e-03,
    "Gemstones lr_ablation_hot, 2 terms, delta 0.001": 1.9728623965400e-03,
    "Gemstones lr_ablation_hot_no_embeds, 2 terms, delta 0.001": 1.8048407315320e-03,
    "Gemstones slim_chinchilla, 2 terms, delta 0.001": 1.2043603790120e-04,
    "Gemstones hot_100b+, 3 terms, delta 0.001": 3.8782173809079e-03,
    "Gemstones cool_end, 4 terms, delta 0.001": 8.1065943897986e-04,
    "Gemstones hot_100b+, 4 terms, delta 0.001": 2.6427290883578e-03,
    "Gemstones lr_ablation_hot, 4 terms, delta 0.001": 1.0088809788745e-03,
    "datablations": 1.5804662474002e-02,
}
"""Lowest objective of every table that any side has found: scipy's too, from 60 starts and the
published parameters."""


@dataclass(frozen=True)
class Side:
    """A peer.

    Attributes:
        starts, of: starts that are run, and that its own settings ask for.
        fit: table to parameters.
        bootstrap: reweighted table and the fit's parameters to parameters.
        draws: bootstraps that are run.
        again: whether a bootstrap runs all starts of a fit.
    """

    starts: int
    of: int
    fit: Callable[[Table], Array]
    bootstrap: Callable[[Table, Array], Array]
    draws: int
    again: bool = False


def ours(table: Table, n_boot: int) -> LawFit:
    """Our fit, as people call it."""
    objective = Objective(delta=table.delta)
    return fit_law(
        table.frame, table.form, y="loss", objective=objective, cluster=None, n_boot=n_boot
    )


def parameters(found: "pd.Series[float]", factors: tuple[str, ...]) -> Array:
    """Public parameters of a law as the sides have them."""
    with np.errstate(divide="ignore"):
        levels = [found["irreducible"], *(found[f"coefficient.{f}"] for f in factors)]
        return np.array([*np.log(levels), *(found[f"exponent.{f}"] for f in factors)])


def peers(table: Table, quick: bool, grid: int) -> dict[str, Side]:
    """Those that can fit the table's number of terms."""
    k, rng = len(table.factors), np.random.default_rng(0)
    few, boots = (40, 5) if quick else (200, 50)
    scattered = sides.scattered(table, STARTS)
    found = {
        "lmfit": Side(
            STARTS, STARTS, lambda t: sides.by_lmfit(t, scattered),
            lambda t, theta: sides.by_lmfit(t, theta[None]), boots,
        ),
        "scipy": Side(
            STARTS, STARTS, lambda t: sides.by_scipy(t, scattered),
            lambda t, theta: sides.by_scipy(t, theta[None]), boots,
        ),
    }  # fmt: skip
    if k > 2:  # its grid would have millions
        chosen = sides.scattered(table, few // 4)
        plain = Side(
            len(chosen), EPOCH_STARTS, lambda t: sides.epoch_style(t, chosen),
            sides.epoch_bootstrap, boots,
        )  # fmt: skip
        return {"Epoch": plain, **found}
    of_epoch = rng.permutation(sides.epoch_starts(k))[:few]
    of_olmo = rng.permutation(sides.olmo_starts(table))[:few]
    return {
        "chinchilla": Side(
            grid**5, README_STARTS, lambda t: sides.chinchilla(t, grid),
            lambda t, _: sides.chinchilla(t, grid), 0 if quick else 2, again=True,
        ),
        "Epoch": Side(
            few, EPOCH_STARTS, lambda t: sides.epoch_style(t, of_epoch), sides.epoch_bootstrap,
            boots,
        ),
        "OLMo-core": Side(
            few, OLMO_STARTS, lambda t: sides.olmo_style(t, of_olmo),
            lambda t, _: sides.olmo_style(t, of_olmo), 0 if quick else 2, again=True,
        ),
        **found,
    }  # fmt: skip


def compare(table: Table, turns: int, quick: bool, grid: int) -> dict[str, Any]:
    """Fit and bootstrap one table by all sides in turn."""
    n = len(table.frame)
    # fit_law's draws over rows, which are the first that it takes from its generator
    weights = resampled_weights(np.arange(n), DRAWS, np.random.default_rng(0))
    others = peers(table, quick, grid)
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    boots: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    theta: dict[str, Array] = {}
    drawn: dict[str, list[Array]] = {}
    for turn in range(turns):
        alone, fit = timed(lambda: ours(table, 0))
        both, fit = timed(lambda: ours(table, DRAWS))
        seconds["ours"].append(alone)
        boots["ours"].append(both - alone)
        theta["ours"] = parameters(fit.params, table.factors)
        drawn["ours"] = [parameters(row, table.factors) for _, row in fit.draws.iterrows()]
        for name, side in others.items():
            took, theta[name] = timed(lambda side=side: side.fit(table))
            whole = side.of / side.starts
            seconds[name].append(took * whole)
            again = [
                timed(lambda side=side, i=i, name=name: side.bootstrap(
                    table.weighted(weights[i]), theta[name]))
                for i in range(side.draws)
            ]  # fmt: skip
            drawn[name] = [t for _, t in again]
            each = sum(s for s, _ in again) / side.draws if side.draws else took
            boots[name].append(each * DRAWS * (whole if side.again else 1))
        say(f"{table.name}, turn {turn + 1} of {turns}: ours {alone:.2f} s, {both - alone:.2f} s")
    values = {name: value(t, table) for name, t in theta.items()}
    best = min(BEST.get(table.name, np.inf), *values.values())
    resampled = [
        table.weighted(w) for w in weights[: max(len(d) for d in list(drawn.values())[1:])]
    ]
    scores = {
        name: np.array([value(t, r) for t, r in zip(found, resampled, strict=False)])
        for name, found in drawn.items()
    }
    lowest = np.array([
        min(s[i] for s in scores.values() if len(s) > i) for i in range(len(resampled))
    ])  # fmt: skip
    return {
        "table": table.name, "rows": n, "terms": len(table.factors), "best": best,
        "sides": {
            name: {
                "starts": others[name].starts if name in others else None,
                "of": others[name].of if name in others else None,
                "fit_s": statistics.median(seconds[name]),
                "over_ours": statistics.median(
                    t / o for t, o in zip(seconds[name], seconds["ours"], strict=True)
                ),
                "excess": values[name] / best - 1,
                "bootstraps": others[name].draws if name in others else DRAWS,
                "bootstrap_1000_s": statistics.median(boots[name]),
                "bootstrap_over_ours": statistics.median(
                    t / o for t, o in zip(boots[name], boots["ours"], strict=True)
                ),
                "bootstrap_excess": excesses(scores[name], lowest),
            }
            for name in ("ours", *others)
        },
    }  # fmt: skip


def excesses(scores: Array, lowest: Array) -> dict[str, float] | None:
    """Median and largest of what bootstraps end above the lowest of all sides."""
    if not len(scores):
        return None
    above = scores / lowest[: len(scores)] - 1
    return {"median": float(np.median(above)), "largest": float(above.max())}


def everywhere(data: Path, quick: bool) -> list[dict[str, Any]]:
    """Our fit, and scipy's where there is time, of every published table."""
    rows = []
    for table, published in sides.gemstones(data):
        took, fit = timed(lambda table=table: ours(table, 0))
        mine = value(parameters(fit.params, table.factors), table)
        told = value(published, table)
        row = {
            "table": table.name, "rows": len(table.frame), "fit_s": took, "objective": mine,
            "published": told, "status": fit.status.value, "agree": fit.certificate.agree,
        }  # fmt: skip
        least = [mine, told, BEST.get(table.name, np.inf)]
        if not quick:
            starts = np.vstack([published, sides.scattered(table, STARTS)])
            row["scipy_s"], found = timed(lambda t=table, s=starts: sides.by_scipy(t, s))
            row["scipy"] = value(found, table)
            least.append(row["scipy"])
        row["best"] = min(least)
        rows.append(row)
        say(f"{table.name}: {mine / row['best'] - 1:.1e} above the best, {took:.2f} s")
    rows.append(repetition(data))
    return rows


def repetition(data: Path) -> dict[str, Any]:
    """The law of repeated data (arXiv 2305.16264) with all but its two decays fixed."""
    frame, fixed = sides.datablations(data)
    form = "E + repeated(n, n_repeats) + repeated(d, d_repeats)"
    took, fit = timed(lambda: fit_law(frame, form, y="loss", fixed=fixed, cluster=None, n_boot=0))
    mine = sides.repeated(fit.params["r_star.n"], fit.params["r_star.d"], frame, fixed)
    name = "datablations"
    return {
        "table": name, "rows": len(frame), "fit_s": took, "objective": mine,
        "published": sides.repeated(5.309743, 15.387756, frame, fixed),
        "status": fit.status.value, "agree": fit.certificate.agree,
        "best": min(mine, BEST.get(name, np.inf)),
    }  # fmt: skip


# --- what is printed ------------------------------------------------------------------------------


def side_lines(found: dict[str, Any]) -> list[str]:
    """One line per side."""
    lines = [
        f"{found['table']}: {found['rows']} rows, best {found['best']:.10g}",
        f"{'':<12}{'starts':>15}{'fit s':>10}{'/ ours':>9}{'excess':>10}{'draws':>7}"
        f"{'1,000 s':>12}{'/ ours':>9}{'excess: median':>16}{'largest':>9}",
    ]
    for name, side in found["sides"].items():
        starts = f"{side['starts']:,} of {side['of']:,}" if side["of"] else ""
        above = side["bootstrap_excess"]
        ends = f"{above['median']:>16.0e}{above['largest']:>9.0e}" if above else f"{'':>16}"
        lines.append(
            f"{name:<12}{starts:>15}{side['fit_s']:>10.2f}{side['over_ours']:>9.1f}"
            f"{side['excess']:>10.0e}{side['bootstraps']:>7}{side['bootstrap_1000_s']:>12.1f}"
            f"{side['bootstrap_over_ours']:>9.1f}{ends}"
        )
    return lines


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line per published table."""
    lines = [f"{'':<58}{'rows':>5}{'fit s':>8}{'excess':>10}{'published':>11}  status"]
    for row in rows:
        mine, told = (row[k] / row["best"] - 1 for k in ("objective", "published"))
        lines.append(
            f"{row['table']:<58}{row['rows']:>5}{row['fit_s']:>8.2f}{mine:>10.0e}{told:>11.0e}"
            f"  {row['status']}, {row['agree']:.0%} of the starts agree"
        )
    return lines


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with published_fits/; CLUE_TEST_DATA")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--grid", type=int, help="values per parameter of chinchilla's starts")
    parser.add_argument("--quick", action="store_true", help="fewer starts and turns, within 50 s")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    data = args.data or (Path(told) if (told := os.environ.get("CLUE_TEST_DATA")) else None)
    of_two, of_four = sides.synthetic()
    turns = args.turns or (1 if args.quick else 3)
    grid = args.grid or (2 if args.quick else 3)
    ours(of_two, 2)  # imports
    two = compare(sides.epoch(data) if data else of_two, turns, args.quick, grid)
    four = compare(of_four, turns, args.quick, grid)
    tables = everywhere(data, args.quick) if data else []
    mine, mine4 = two["sides"]["ours"], four["sides"]["ours"]
    found = {
        "fit_s": mine["fit_s"],
        "bootstrap_1000_s": mine["bootstrap_1000_s"],
        "fit4_s": mine4["fit_s"],
        "bootstrap4_1000_s": mine4["bootstrap_1000_s"],
        "excess_objective": max(
            mine["excess"], mine4["excess"], *(r["objective"] / r["best"] - 1 for r in tables)
        ),
        "over_chinchilla": two["sides"]["chinchilla"]["over_ours"],
        "two": two, "four": four, "tables": tables, "turns": turns,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("chinchilla", "lmfit", "numpy", "scipy")
        },
    }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    lines = [*side_lines(two), "", *side_lines(four)]
    print("\n".join([*lines, "", *table_lines(tables)] if tables else lines))


if __name__ == "__main__":
    main()
