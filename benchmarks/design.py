"""Which runs next? Regret of ``clue-scaling next`` and of rivals on worlds with known truth.

A method buys runs from a pool of 240 configurations (5 sizes x 4 batches x 4 lengths x 3 data
fractions, 100,000 steps) for at most BUDGET PF-days and at most MAX_RUNS runs; losses come with
noise of 0.5 to 1 %. The project's solver fits what it bought (least squares of ln loss, for all
methods alike), and the law is asked how to spend ten times the budget on one run: size x batch x
length. The regret is the true loss there over the true optimum's, less 1; also shown are the rms
error of the prediction at the true optimum and the median rms relative error of the exponents.

    next         ours: D-optimality mixed with targets (decision and prediction at ten times the
                 budget), averaged over 16 assumed laws; all runs at once
    next, 2 x    the same in two rounds: a third of the budget, then the rest given the first losses
    D-optimal    locally, at the assumed law, by the same greedy and exchange algorithm
    random       affordable configurations, uniformly
    one factor   the dearest base that one-factor-at-a-time can afford
    active       budgeted active selection of Li et al. 2026 (arXiv:2604.22753): run by run
                 (design_rivals.py)

The worlds' exponents and shares are not those that ours and D-optimal assume; in the last two the
fitted form is wrong.

    python benchmarks/design.py --quick
    python benchmarks/design.py --studies 24
    python benchmarks/design.py --max-runs 240            # PF-days alone limit
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from design_rivals import active

from scaling.analysis.design.belief import Assumption, believe, columns_of, update
from scaling.analysis.design.criteria import choose
from scaling.analysis.design.next import Goal, problem_of
from scaling.analysis.design.targets import GROUPS, Space
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.solver import Problem, minimise
from scaling.analysis.fitting.starts import best, scatter
from scaling.analysis.fitting.surface import Surface

STEPS, USERS = 100_000, 11_294_122
BUDGET, MAX_RUNS, AHEAD = 0.15, 36, 10.0
"""PF-days, runs, and the compute decided about over the budget."""
FACTORS = ("n_total", "batch_size", "items_per_user_mean", "users_seen")
ADDITIVE = "E + n_total + batch_size + items_per_user_mean + users_seen"
REPEATED = "E + n_total + batch_size + items_per_user_mean + repeated(users_seen, repeats)"
Array = np.ndarray[Any, Any]


def pool() -> pd.DataFrame:
    """The configurations on offer and their prices."""
    rows = [
        {
            "n_total": n, "batch_size": b, "items_per_user_mean": s,
            "users_seen": min(round(f * USERS), STEPS * b),
            "repeats": max(0.0, STEPS * b / round(f * USERS) - 1),
            "pf_days": 6.0 * n * b * s * STEPS / 8.64e19,
        }
        for n, b, s, f in itertools.product(
            (4.06e6, 8.12e6, 31.3e6, 61.8e6, 162.2e6), (64, 128, 256, 1024), (16, 64, 128, 512),
            (0.01, 0.1, 1.0),
        )
    ]  # fmt: skip
    return pd.DataFrame(rows)


POOL = pool()
CENTRE = np.log(POOL[list(FACTORS)]).mean()
Truth = Callable[[pd.DataFrame], Array]


@dataclass(frozen=True)
class World:
    """A truth, the form that is fitted to it, and the exponents where the form has them."""

    name: str
    truth: Truth
    form: str
    noise: float
    exponents: tuple[float, ...] | None = None


def terms(df: pd.DataFrame, shares: Sequence[float], exponents: Sequence[float]) -> Array:
    """``[m, 4]`` power terms with their sizes at the pool's centre."""
    logs = np.log(df[list(FACTORS)].to_numpy(dtype=float)) - CENTRE.to_numpy()
    return np.asarray(np.array(shares) * np.exp(-np.array(exponents) * logs))


def additive(floor: float, shares: Sequence[float], exponents: Sequence[float]) -> Truth:
    return lambda df: floor + terms(df, shares, exponents).sum(axis=1)


def repetition(df: pd.DataFrame) -> Array:
    """Data of which repetition is worth less and less (Muennighoff et al. 2023, eq. 5)."""
    worth = df["users_seen"] * (1 + 6.0 * (1 - np.exp(-df["repeats"] / 6.0)))
    law = additive(1.6, (0.7, 0.5, 0.7, 0.6), (0.36, 0.22, 0.42, 0.33))
    return law(df.assign(users_seen=worth))


def product(df: pd.DataFrame) -> Array:
    """One term: every factor multiplies."""
    return np.asarray(1.2 + terms(df, (2.5, 1, 1, 1), (0.12, 0.1, 0.13, 0.08)).prod(axis=1))


def kaplan(df: pd.DataFrame) -> Array:
    """A sum to an outer power (Kaplan et al. 2020, eq. 1.5), above a floor."""
    inner = terms(df, (0.8, 0.6, 0.6, 0.5), (0.5, 0.42, 0.58, 0.42)).sum(axis=1)
    return np.asarray(1.3 + 1.1 * inner**0.6)


WORLDS = [
    World("additive", additive(1.5, (0.8, 0.6, 0.6, 0.5), (0.34, 0.28, 0.4, 0.3)), ADDITIVE, 0.007,
          (0.34, 0.28, 0.4, 0.3)),
    World("steep", additive(2.2, (0.5, 0.5, 0.8, 0.3), (0.6, 0.45, 0.7, 0.5)), ADDITIVE, 0.01,
          (0.6, 0.45, 0.7, 0.5)),
    World("batch hardly matters", additive(1.5, (0.9, 0.06, 0.8, 0.5), (0.34, 0.28, 0.4, 0.3)),
          ADDITIVE, 0.005, (0.34, 0.28, 0.4, 0.3)),
    World("repetition", repetition, REPEATED, 0.007),
    World("kaplan, fitted additive", kaplan, ADDITIVE, 0.007),
    World("product, fitted additive", product, ADDITIVE, 0.007),
]  # fmt: skip


def space() -> Space:
    """What is decided about: around the middle of the pool, as far as ten times its ends."""
    reference = {c: float(np.exp(CENTRE[c])) for c in FACTORS} | {"repeats": 0.0}
    columns = (FACTORS[0], FACTORS[1], FACTORS[2])
    logs = np.log(POOL[list(columns)]).to_numpy() - np.log([reference[c] for c in columns])
    reach = np.log(10.0)
    return Space(reference, GROUPS, logs.min(axis=0) - reach, logs.max(axis=0) + reach,
                 float(USERS), float(STEPS))  # fmt: skip


SPACE = space()
AT_REFERENCE = 6.0 * STEPS * float(np.exp(CENTRE[:3].sum())) / 8.64e19
FACTOR = AHEAD * BUDGET / AT_REFERENCE
OPTIONS = pd.DataFrame(SPACE.columns(SPACE.equal_compute(FACTOR, 121)))
"""Ways to spend ten times the budget, 8 % apart in size and batch."""
REGION = pd.DataFrame(SPACE.columns(SPACE.equal_compute(FACTOR, 15)))
"""The same, coarser: the target region of active selection."""
PRICE = POOL["pf_days"].to_numpy()
Look = Callable[[Sequence[int]], Array]
Method = Callable[[World, Look, int], list[int]]


# --- the methods ----------------------------------------------------------------------------------


def ours(world: World, look: Look, seed: int) -> list[int]:
    belief = believe(world.form, POOL, Assumption())
    return choose(problem_of(belief, POOL, PRICE, world.noise, Goal(SPACE, FACTOR), seed=seed),
                  BUDGET, MAX_RUNS)  # fmt: skip


def ours_in_rounds(world: World, look: Look, seed: int) -> list[int]:
    goal, prior = Goal(SPACE, FACTOR), believe(world.form, POOL, Assumption())
    first = choose(problem_of(prior, POOL, PRICE, world.noise, goal, seed=seed), BUDGET / 3,
                   MAX_RUNS // 2)  # fmt: skip
    done = POOL.iloc[first].assign(loss=look(first))
    left = np.setdiff1d(np.arange(len(POOL)), first)
    problem = problem_of(update(prior, done, world.noise), POOL.iloc[left], PRICE[left],
                         world.noise, goal, finished=done, seed=seed)  # fmt: skip
    then = choose(problem, BUDGET - PRICE[first].sum(), MAX_RUNS - len(first))
    return [*first, *(int(i) for i in left[then])]


def d_optimal(world: World, look: Look, seed: int) -> list[int]:
    belief = believe(world.form, POOL, Assumption())
    return choose(problem_of(belief, POOL, PRICE, world.noise, None, laws=1), BUDGET, MAX_RUNS)


def at_random(world: World, look: Look, seed: int) -> list[int]:
    rng, chosen, left = np.random.default_rng(seed), list[int](), BUDGET
    while len(chosen) < MAX_RUNS:
        free = np.setdiff1d(np.flatnonzero(left >= PRICE), chosen)
        if not len(free):
            break
        chosen.append(int(rng.choice(free)))
        left -= PRICE[chosen[-1]]
    return chosen


def one_factor(world: World, look: Look, seed: int) -> list[int]:
    """Every value of every factor with the others at the base; the dearest base that fits."""
    levels = np.stack(np.unravel_index(np.arange(len(POOL)), (5, 4, 4, 3)), axis=1)
    best, spent = list[int](), 0.0
    for base in levels:
        rows = np.flatnonzero((levels != base).sum(axis=1) <= 1)
        if spent < PRICE[rows].sum() <= BUDGET:
            best, spent = [int(i) for i in rows], float(PRICE[rows].sum())
    return best


def active_selection(world: World, look: Look, seed: int) -> list[int]:
    """Its price of a run is the PF-days and a run's share of MAX_RUNS, or it would spend all runs
    on the cheapest and leave most of the budget."""
    return active(POOL, PRICE, world.form, REGION, look, BUDGET, MAX_RUNS,
                  PRICE + BUDGET / MAX_RUNS, seed)  # fmt: skip


ONE_DESIGN = ("next", "D-optimal", "one factor")
"""Methods that see no losses."""
NOISES, SCORED, POLISHED = 200, 300, 4
"""Noise draws for one design; starts scored and polished of a fit."""
METHODS: dict[str, Method] = {
    "next": ours,
    "next, 2 x": ours_in_rounds,
    "D-optimal": d_optimal,
    "random": at_random,
    "one factor": one_factor,
    "active": active_selection,
}


# --- judging --------------------------------------------------------------------------------------


def laws(form: str, rows: pd.DataFrame, losses: Array, seed: int) -> tuple[Surface, Array]:
    """Least squares of ln loss by the project's solver: ``[R, P]`` for ``losses [R, n]``."""
    law, rng = Form.parse(form), np.random.default_rng([seed, 2])
    x = columns_of(law, rows)
    surface = Surface.of(law, x, losses.mean(axis=0))
    problem = Problem(surface, surface.transform(x), np.log(losses[0]))
    ones, starts = np.ones(len(rows)), []
    scattered = scatter(problem, SCORED, rng)
    for row in losses:
        starts.append(best(replace(problem, target=np.log(row)), scattered, POLISHED, ones))
    minima = minimise(problem, np.concatenate(starts), ones,
                      np.repeat(np.log(losses), POLISHED, axis=0), tolerance=1e-8)  # fmt: skip
    lowest = minima.objective.reshape(len(losses), POLISHED).argmin(axis=1)
    return surface, minima.theta.reshape(len(losses), POLISHED, -1)[np.arange(len(losses)), lowest]


def judge(world: World, name: str, studies: int) -> dict[str, Any]:
    """So many studies by one method: what it bought, and what the laws are worth."""
    truth, true = world.truth(POOL), world.truth(OPTIONS)
    best_option = int(np.argmin(true))
    groups: dict[tuple[int, ...], list[Array]] = {}
    designs = 1 if name in ONE_DESIGN else studies
    start = time.perf_counter()
    for seed in range(designs):
        look = Losses(truth, world.noise, seed)
        groups.setdefault(tuple(METHODS[name](world, look, seed)), []).append(look.all)
    seconds = (time.perf_counter() - start) / designs
    found: dict[str, list[float]] = {"regret": [], "target": [], "exponent": []}
    for chosen, seen in groups.items():
        rows = list(chosen)
        assert PRICE[rows].sum() <= BUDGET * (1 + 1e-6), f"{name}: {PRICE[rows].sum()} PF-days"
        assert len(set(rows)) == len(rows) <= MAX_RUNS, name
        if name in ONE_DESIGN:  # its design knows nothing of the losses: as many as are cheap
            seen = [Losses(truth, world.noise, seed).all for seed in range(NOISES)]
        surface, theta = laws(world.form, POOL.iloc[rows], np.stack(seen)[:, rows], 0)
        law = surface.values(theta, columns_of(surface.form, OPTIONS))
        found["regret"] += list(true[law.argmin(axis=1)] / true[best_option] - 1)
        found["target"] += list(np.log(law[:, best_option] / true[best_option]))
        if world.exponents:
            public = surface.public(theta)[[f"exponent.{c}" for c in FACTORS]].to_numpy()
            error = public / np.array(world.exponents) - 1
            found["exponent"] += list(np.sqrt((error**2).mean(axis=1)))
    return {
        "world": world.name,
        "method": name,
        "regret": statistics.median(found["regret"]),
        "regret_mean": statistics.fmean(found["regret"]),
        "regret_mean_se": float(np.std(found["regret"]) / np.sqrt(len(found["regret"]))),
        "target_rms": float(np.sqrt(np.mean(np.square(found["target"])))),
        "exponent_error": statistics.median(found["exponent"]) if world.exponents else None,
        "runs": statistics.fmean(len(c) for c in groups for _ in groups[c]),
        "pf_days": statistics.fmean(PRICE[list(c)].sum() for c in groups for _ in groups[c]),
        "studies": len(found["regret"]),
        "seconds": seconds,
    }


class Losses:
    """Losses of the pool with noise, as a method may look at them."""

    def __init__(self, truth: Array, noise: float, seed: int) -> None:
        self.all = truth * np.exp(noise * np.random.default_rng([seed, 1]).normal(size=len(truth)))

    def __call__(self, rows: Sequence[int]) -> Array:
        return np.asarray(self.all[list(rows)])


def summary(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Medians over worlds, by method."""
    keys = ("regret", "regret_mean", "target_rms", "exponent_error", "runs", "seconds")
    out = []
    for name in methods:
        own = [r for r in rows if r["method"] == name]
        out.append(
            {"method": name}
            | {k: statistics.median(r[k] for r in own if r[k] is not None) for k in keys}
        )
    return out


def main() -> None:
    global MAX_RUNS, NOISES
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three worlds, few studies")
    parser.add_argument("--studies", type=int, default=16, help="of methods that see losses")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--max-runs", type=int, default=MAX_RUNS, help="240: no limit")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    MAX_RUNS = args.max_runs
    NOISES = 60 if args.quick else NOISES
    worlds = [WORLDS[0], WORLDS[3], WORLDS[4]] if args.quick else WORLDS
    rows = []
    for world in worlds:
        for name in args.methods:
            studies = 2 if args.quick else args.studies
            rows.append(judge(world, name, NOISES // 2 if name == "random" else studies))
            if not args.json:
                show(rows[-1])
    medians = summary(rows, args.methods)
    if args.json:
        print(json.dumps({"rows": rows, "medians": medians}, indent=2))
        return
    print("\nmedian over the worlds")
    for row in medians:
        show(row | {"world": ""})


def show(row: dict[str, Any]) -> None:
    """One line; the first with a head above it."""
    if not show.__dict__.setdefault("head", False):
        show.__dict__["head"] = True
        print(f"{'':26s}{'':12s}{'regret':>9s}{'mean':>9s}{'+-':>8s}{'target':>9s}{'exponent':>9s}"
              f"{'runs':>6s}{'PF-days':>9s}{'s':>7s}")  # fmt: skip
    exponent = "-" if row["exponent_error"] is None else f"{row['exponent_error']:.1%}"
    se = f"{row['regret_mean_se']:.3%}" if "regret_mean_se" in row else ""
    days = f"{row['pf_days']:.3f}" if "pf_days" in row else ""
    print(
        f"{row['world']:26s}{row['method']:12s}{row['regret']:9.3%}{row['regret_mean']:9.3%}{se:>8s}"
        f"{row['target_rms']:9.2%}{exponent:>9s}{row['runs']:6.0f}{days:>9s}{row['seconds']:7.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
