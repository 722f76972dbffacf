"""Sides of fit.py: the tables that are fitted, the objective, and the peers.

Every side fits ``ln y = ln(E + sum_k A_k x_k^-p_k)`` under the same sum of Huber losses; what it
found is scored by ``value``, whatever it says itself. Parameters are
``[ln E, ln A_1 .. ln A_K, p_1 .. p_K]`` of the columns in their own units.
"""

import contextlib
import functools
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmfit
import numpy as np
import pandas as pd
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
EMBEDDINGS = 50_304
"""Rows of Gemstones' token embedding, which its laws "no_embeds" do not count."""
FAR = 1e9
"""Stands for an objective that does not exist."""


@dataclass(frozen=True, eq=False)
class Table:
    """What is fitted: the column ``loss`` of ``frame`` by its columns ``factors``.

    Attributes:
        weights: ``[rows]`` of the losses.
    """

    name: str
    frame: pd.DataFrame
    factors: tuple[str, ...]
    delta: float = 1e-3
    weights: Array | float = 1.0

    @property
    def form(self) -> str:
        return " + ".join(("E", *self.factors))

    @functools.cached_property
    def x(self) -> Array:
        """``[K, rows]`` logarithms of the factors."""
        return np.log(self.frame[list(self.factors)].to_numpy(dtype=np.float64)).T

    @functools.cached_property
    def target(self) -> Array:
        return np.log(self.frame["loss"].to_numpy(dtype=np.float64))

    def weighted(self, weights: Array) -> "Table":
        """The table of a bootstrap draw."""
        return replace(self, weights=weights)


# --- tables ---------------------------------------------------------------------------------------


def draw(seed: int, n: int, ranges: dict[str, tuple[float, float]], law: Array) -> pd.DataFrame:
    """Points at random on a law, with Laplacian noise of 0.5 % on y."""
    rng = np.random.default_rng(seed)
    columns = {name: np.exp(rng.uniform(*np.log(ends), n)) for name, ends in ranges.items()}
    frame = pd.DataFrame(columns)
    y = predicted(law, np.log(frame.to_numpy()).T)
    return frame.assign(loss=np.exp(y + rng.laplace(0, 0.005, n)))


def synthetic() -> tuple[Table, Table]:
    """240 rows of a law in 2 factors, 200 of a law in 4."""
    two = np.array([np.log(1.8172), np.log(482.01), np.log(2085.43), 0.3478, 0.3658])
    four = np.array([0.1, *np.log([60.0, 6.0, 2.0, 30.0]), 0.3, 0.35, 0.5, 0.4])
    of_two = draw(0, 240, {"N": (4e7, 2e10), "D": (3e8, 5e11)}, two)
    ranges = {"n": (4e6, 2e8), "batch": (128, 8192), "items": (16, 1024), "users": (1e4, 1e7)}
    return (
        Table("synthetic, 2 terms", of_two, ("N", "D")),
        Table("synthetic, 4 terms", draw(1, 200, ranges, four), tuple(ranges)),
    )


def epoch(data: Path) -> Table:
    """Epoch's table of Chinchilla's runs, without the 5 highest losses (arXiv 2404.10102)."""
    read = pd.read_csv(data / "published_fits/epoch_chinchilla/svg_extracted_data.csv")
    read = read[read["loss"] < read["loss"].nlargest(5).iloc[-1]]
    n = read["Model Size"]
    frame = pd.DataFrame({"N": n, "D": read["Training FLOP"] / 6 / n, "loss": read["loss"]})
    return Table("Epoch's Chinchilla", frame, ("N", "D"))


def gemstones(data: Path) -> Iterator[tuple[Table, Array]]:
    """The fits of arXiv 2502.06857 whose runs are at hand, with the published parameters."""
    folder = data / "published_fits/gemstones"
    rename = {"params_active_precise": "params", "final_loss": "loss"}
    for delta, path in sorted(
        (float(f"1e{p.parent.name[-2:]}"), p)
        for p in folder.glob("published_fits/parameters_delta-*/*.json")
    ):
        prefix, _, runs = path.stem.removeprefix("approach_3_").partition("_grid_search_0_")
        source = folder / f"wandb_df_for_fitting_{runs.removesuffix('_no_embeds')}.jsonl"
        if not source.exists():
            continue
        frame = pd.read_json(source, lines=True).rename(columns=rename)
        if runs.endswith("_no_embeds"):
            frame["params"] -= EMBEDDINGS * frame["width"]
        factors = (*prefix.split("_"), "tokens")
        factors = tuple("params" if f == "parameters" else f for f in factors)
        told = json.loads(path.read_text())
        e, c, p = (told[k]["0"] for k in ("irreducible_error", "coefficients", "exponents"))
        published = np.array([e, *c, *p])
        name = f"Gemstones {runs}, {len(factors)} terms, delta {delta:g}"
        yield Table(name, frame, factors, delta), published


def datablations(data: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Runs on repeated data (arXiv 2305.16264), and the parameters that its fit holds.

    Columns are unique parameters ``n`` and tokens ``d``, and passes beyond the first; a model's
    parameters are unique up to what is optimal for its unique tokens.
    """
    read = pd.read_csv(data / "published_fits/datablations/c4_runs_182.csv")
    a, b, e, p = 6.255414, 7.3049974, 0.6254804, 0.3526596
    d = np.minimum(read["unique_tokens"], read["tokens"])
    n = np.minimum(read["params"], d * np.exp((a - b) / p))
    frame = pd.DataFrame({
        "n": n, "n_repeats": read["params"] / n - 1, "d": d, "d_repeats": read["tokens"] / d - 1,
        "loss": read["loss"],
    })  # fmt: skip
    held = {"irreducible": e, "coefficient.n": a, "coefficient.d": b}
    fixed = {name: float(np.exp(v)) for name, v in held.items()}
    return frame, fixed | {"exponent.n": p, "exponent.d": p}


def repeated(n_star: float, d_star: float, frame: pd.DataFrame, fixed: dict[str, float]) -> float:
    """The objective of ``datablations`` at R_N* and R_D*."""
    y = fixed["irreducible"]
    for name, star in (("n", n_star), ("d", d_star)):
        # expm1: at a large R*, 1 - exp is rounding
        more = 1 - star * np.expm1(-frame[f"{name}_repeats"] / star)
        y = y + fixed[f"coefficient.{name}"] * (frame[name] * more) ** -fixed[f"exponent.{name}"]
    return float(huber(np.asarray(np.log(y) - np.log(frame["loss"])), 1e-3).sum())


# --- the objective, and its derivatives -----------------------------------------------------------


def terms(theta: Array, x: Array) -> Array:
    """``[K + 1, rows]`` logarithms of E and the terms."""
    k = len(x)
    each = theta[1 : k + 1, None] - theta[k + 1 :, None] * x
    return np.concatenate([np.full((1, x.shape[1]), theta[0]), each])


def predicted(theta: Array, x: Array) -> Array:
    """``[rows]`` ln y."""
    return np.asarray(np.logaddexp.reduce(terms(theta, x), axis=0))


def huber(r: Array, delta: float) -> Array:
    size = np.abs(r)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def value(theta: Array, table: Table) -> float:
    """Sum of the Huber losses."""
    with np.errstate(all="ignore"):
        losses = huber(predicted(theta, table.x) - table.target, table.delta)
        total = float((table.weights * losses).sum())
    return total if np.isfinite(total) else FAR


def derivatives(theta: Array, table: Table) -> tuple[float, Array, Array]:
    """The objective, its gradient ``[P]`` and Hessian ``[P, P]``."""
    k, x = len(table.x), table.x
    z = terms(theta, x)
    y = np.logaddexp.reduce(z, axis=0)
    share = np.exp(z - y)
    r = y - table.target
    pull = table.weights * np.clip(r, -table.delta, table.delta)
    inside = table.weights * (np.abs(r) <= table.delta)
    by = np.concatenate([share, -share[1:] * x])
    hessian = (by * (inside - pull)) @ by.T
    own = np.zeros((k, len(y)))
    curve = np.concatenate([share, own])
    np.fill_diagonal(hessian, hessian.diagonal() + (curve * pull).sum(1))
    cross = (share[1:] * x * pull).sum(1)
    square = (share[1:] * x**2 * pull).sum(1)
    for i in range(k):
        hessian[1 + i, 1 + k + i] -= cross[i]
        hessian[1 + k + i, 1 + i] -= cross[i]
        hessian[1 + k + i, 1 + k + i] += square[i]
    return float((table.weights * huber(r, table.delta)).sum()), by @ pull, hessian


def centred(table: Table) -> tuple[Table, Callable[[Array], Array], Callable[[Array], Array]]:
    """The table with ln x less its mean, and how parameters go there and back."""
    k, middle = len(table.x), table.x.mean(axis=1)
    moved = replace(table)
    moved.__dict__["x"] = table.x - middle[:, None]

    def shift(theta: Array, sign: int) -> Array:
        out = theta.copy()
        out[1 : k + 1] += sign * theta[k + 1 :] * middle
        return out

    return moved, lambda t: shift(t, -1), lambda t: shift(t, 1)


# --- peers: starts, table -> parameters -----------------------------------------------------------


def chinchilla_grid(values: int) -> dict[str, Array]:
    """The grid of its README, ``values`` per parameter (there 5)."""
    return {
        "E": np.linspace(1, 2, values), "a": np.linspace(1, 10, values),
        "b": np.linspace(1, 10, values), "alpha": np.linspace(0.1, 0.7, values),
        "beta": np.linspace(0.1, 0.7, values),
    }  # fmt: skip


def chinchilla(table: Table, values: int) -> Array:
    """The PyPI package under log-Huber losses, in this process; it draws no figures here."""
    loss = functools.partial(log_huber, delta=table.delta)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        it = Chinchilla(
            folder, param_grid=chinchilla_grid(values), loss_fn=loss, log_level=logging.CRITICAL,
            weight_fn=lambda c: table.weights * np.ones_like(c),
        )  # fmt: skip
        it.database.df = table.frame.assign(C=6 * table.frame["N"] * table.frame["D"])
        it.visualizer.optim = lambda *_, **__: None
        with np.errstate(all="ignore"):
            it.fit(parallel=False)
    found = [float(v) for v in (it.E, it.A, it.B, it.alpha, it.beta)]
    with np.errstate(all="ignore"):
        return np.array([*np.log(found[:3]), *found[3:]])


def epoch_starts(k: int) -> Array:
    """Epoch's grid: 4,500 starts for 2 terms, as Gemstones uses for 3 and more."""
    exponents = [0.0, 0.5, 1.0, 1.5, 2.0]
    coefficients = [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    e = [-1.0, -0.5, 0.0, 0.5, 1.0]
    return np.array(list(itertools.product(e, *[coefficients] * k, *[exponents] * k)))


def epoch_style(table: Table, starts: Array) -> Array:
    """L-BFGS-B with finite differences and scipy's own tolerances."""
    found = [minimize(value, s, args=(table,), method="L-BFGS-B") for s in starts]
    return np.asarray(min(found, key=lambda f: float(f.fun)).x)


def epoch_bootstrap(table: Table, theta: Array) -> Array:
    """One BFGS from the fit, by gradient."""

    def both(t: Array) -> tuple[float, Array]:
        with np.errstate(all="ignore"):
            return derivatives(t, table)[:2]

    return np.asarray(minimize(both, theta, jac=True, method="BFGS").x)


def olmo_starts(table: Table, values: int = 4) -> Array:
    """OLMo-core's grid (pull request 554): 4 values per parameter, ``E, A, B, alpha, beta``."""
    floor = np.linspace(0, table.frame["loss"].min(), values)
    coefficient, exponent = np.linspace(1, 20, values), np.linspace(0.2, 0.8, values)
    return np.array(list(itertools.product(floor, *[coefficient] * 2, *[exponent] * 2)))


def olmo_style(table: Table, starts: Array) -> Array:
    """L-BFGS-B with finite differences on E, A, B themselves, bounded."""
    low = float(table.frame["loss"].min())
    bounds = [(0.0, low), *[(1e-10, 1e10)] * 2, *[(0.01, 2.0)] * 2]

    def raw(t: Array) -> float:
        with np.errstate(all="ignore"):
            return value(np.array([*np.log(t[:3]), *t[3:]]), table)

    found = [
        minimize(raw, s, method="L-BFGS-B", bounds=bounds, options={"maxiter": 10_000})
        for s in starts
    ]
    best = min(found, key=lambda f: float(f.fun)).x
    with np.errstate(all="ignore"):
        return np.array([*np.log(best[:3]), *best[3:]])


def scattered(table: Table, n: int, seed: int = 0) -> Array:
    """Starts at the data's own scale: terms and floor share the mean y at random."""
    k, rng = len(table.x), np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(k + 1), n)
    p = rng.uniform(0.05, 1.0, (n, k))
    levels = np.log(np.maximum(shares, 1e-4)) + table.target.mean()
    levels[:, 1:] += p * table.x.mean(axis=1)
    return np.concatenate([levels, p], axis=1)


def by_lmfit(table: Table, starts: Array) -> Array:
    """lmfit's ``least_squares``, whose Huber loss is this one, with its Jacobian by differences."""

    def weighted(z: Array) -> Array:
        """scipy's Huber loss and its two derivatives by z = (r / delta)^2, times the weights."""
        inside, root = z <= 1, np.sqrt(np.maximum(z, 1))
        return table.weights * np.array([
            np.where(inside, z, 2 * root - 1), np.where(inside, 1, 1 / root),
            np.where(inside, 0, -0.5 / root**3),
        ])  # fmt: skip

    found = []
    for start in starts:
        params = lmfit.Parameters()
        for i, v in enumerate(start):
            params.add(f"t{i}", value=v)

        def residual(params: lmfit.Parameters) -> Array:
            theta = np.array([p.value for p in params.values()])
            return predicted(theta, table.x) - table.target

        with contextlib.suppress(ValueError), np.errstate(all="ignore"):
            got = lmfit.minimize(
                residual, params, method="least_squares", loss=weighted, f_scale=table.delta,
                x_scale="jac", calc_covar=False,
            )  # fmt: skip
            found.append(np.array([p.value for p in got.params.values()]))
    return min(found, key=lambda t: value(t, table))


def by_scipy(table: Table, starts: Array) -> Array:
    """The best we could make of scipy: centred columns, L-BFGS-B by the analytic gradient on an
    objective near 1, the best of the starts polished by a trust-region Newton method."""
    moved, there, back = centred(table)

    def both(t: Array, unit: float) -> tuple[float, Array]:
        with np.errstate(all="ignore"):
            f, g, _ = derivatives(t, moved)
        return (f / unit, g / unit) if np.isfinite(f) else (FAR, np.zeros_like(t))

    found = []
    for start in starts:
        first = there(start)
        unit = value(first, moved)
        options = {"maxiter": 5_000, "maxfun": 20_000, "ftol": 1e-12, "gtol": 1e-9}
        got = minimize(both, first, (unit,), method="L-BFGS-B", jac=True, options=options)
        found.append((float(got.fun) * unit, got.x))
    best, theta = min(found, key=lambda f: f[0])
    with np.errstate(all="ignore"):
        polished = minimize(
            lambda t: derivatives(t, moved)[0] / best, theta, method="trust-exact",
            jac=lambda t: derivatives(t, moved)[1] / best,
            hess=lambda t: derivatives(t, moved)[2] / best, options={"gtol": 1e-11},
        )  # fmt: skip
    return back(min(polished.x, theta, key=lambda t: value(t, moved)))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, which others on the machine stretch less, and the result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result
