"""One shape of the transfer law for all tasks, with levels of each task's own.

Every task has ``T_j = E_j + k_j * e^(-rate_j * L)`` (Gadre et al. 2024, arXiv 2403.08540, eq. 5,
with either sign of k and of the rate; at rate 0 a line). Few runs tell little of a curvature, many
tasks together more: the rates of the tasks are taken as drawn from a normal distribution, whose
mean and spread all tasks together decide. A spread of zero is the joint fit with one rate for all.
Only the rate is borrowed; E_j and k_j never are.

Levels and noise of a task are integrated out exactly (flat in E and k, standardised over the
losses; 1/sigma in the noise), so that with n points a rate has the likelihood
``RSS(rate) ^ -((n - 2) / 2)`` whatever the unit of the metric. Rates, mean and spread lie on grids
and are integrated over, with equal prior weight on every mean and every spread of the grid;
nothing is approximated by a normal and nothing plugged in. What a task borrows is decided by the
other tasks alone, so the same code predicts a task that is held out. Errors of two tasks that
evaluate the same runs are taken as independent; ``interval`` alone does without that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import logsumexp
from scipy.stats import chi2

Array = npt.NDArray[np.float64]

FEWEST_POINTS = 5
"""Points with different losses that a task needs to say anything of its rate."""
MAX_BEND = 8.0
"""Largest |rate| * range of the losses: beyond, the curve is a step at one end."""
GRID = 241
SPREADS = 13
EARLY = 0.6
"""Share of a held-out task's points, those of highest loss, that its prediction may use."""


@dataclass(frozen=True, eq=False)
class PooledLaw:
    """Rates of all tasks, apart and together.

    Attributes:
        rates: grid of rates. [1 / nat]
        likelihood: ``[tasks, grid]`` log likelihood of each task's rate.
        priors: ``[tasks, grid]`` log density of a task's rate by all other tasks.
        mean, spread: of the distribution of rates over tasks, at their likelihood's maximum.
        interval: 95 % interval of ``mean``: tasks resampled, and configurations, those that tasks
            share together (Owen 2007, the pigeonhole bootstrap).
        p_same: of the hypothesis that all tasks have one rate (likelihood ratio; half the weight
            on zero, as the spread cannot be negative).
        points: per task the table ``x``, ``y``: mean loss and metric of each configuration.
    """

    rates: Array
    likelihood: Array
    priors: Array
    mean: float
    spread: float
    interval: tuple[float, float] | None
    p_same: float
    points: Mapping[str, pd.DataFrame]

    @cached_property
    def tasks(self) -> pd.DataFrame:
        """Per task: ``alone``, ``pooled`` rate with ``lower``, ``upper``, and ``borrowed``.

        ``alone`` is the task's own best rate, ``pooled`` its posterior mean with a 95 % interval;
        ``borrowed`` the share of the variance of the rate that the other tasks take away (0: the
        task stands alone).
        """
        rows = []
        for own, prior in zip(self.likelihood, self.priors, strict=True):
            alone, pooled = _weights(own), _weights(own + prior)
            low, high = np.searchsorted(np.cumsum(pooled), [0.025, 0.975])
            rows.append(
                {
                    "alone": float(self.rates[int(np.argmax(own))]),
                    "pooled": float(pooled @ self.rates),
                    "lower": float(self.rates[low]),
                    "upper": float(self.rates[min(high, GRID - 1)]),
                    "borrowed": max(0.0, 1 - self._variance(pooled) / self._variance(alone)),
                }
            )
        return pd.DataFrame(rows, index=pd.Index(list(self.points), name="task"))

    @property
    def identified(self) -> bool:
        """Whether the tasks decide ``mean``: its interval ends inside the grid on both sides."""
        step = float(self.rates[1] - self.rates[0])
        return self.interval is not None and bool(
            self.interval[0] > self.rates[0] + step and self.interval[1] < self.rates[-1] - step
        )

    def _variance(self, weights: Array) -> float:
        return float(weights @ (self.rates - weights @ self.rates) ** 2)

    def predict(self, task: str, losses: Array) -> Array:
        """T of a task at ``losses [m]`` nats, averaged over the posterior of its rate."""
        i = list(self.points).index(task)
        weights = _weights(self.likelihood[i] + self.priors[i])
        return _predict(self.points[task], self.rates, weights, losses)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "form": "T_j = E_j + k_j * exp(-rate_j * L), rate_j ~ normal(mean, spread)",
            "borrowed": "the rate alone; E_j, k_j and the noise are each task's own",
            "mean": self.mean,
            "spread": self.spread,
            "ci95": None if self.interval is None else list(self.interval),
            "identified": self.identified,
            "p_same": self.p_same,
            "tasks": self.tasks.to_dict(orient="index"),
        }


def pooled_law(
    points: pd.DataFrame,
    *,
    x: str = "pretraining",
    y: str = "downstream",
    cluster: str = "cell",
    n_boot: int = 200,
    seed: int = 0,
) -> PooledLaw:
    """Fit the rates of all tasks together.

    Args:
        points: ``task``, ``x`` loss [nats], ``y`` metric and ``cluster``: configurations, whose
            runs are averaged first. Tasks with fewer than five different losses are left out.
        n_boot: bootstrap draws for ``interval``; 0 for none.

    Raises:
        ValueError: fewer than two tasks have enough points.
    """
    tables = {
        str(task): of_task.groupby(cluster, sort=True)[[x, y]].mean()
        for task, of_task in points.groupby("task", sort=True)
    }
    tables = {
        task: table.rename(columns={x: "x", y: "y"}).astype(np.float64)
        for task, table in tables.items()
        if table[x].nunique() >= FEWEST_POINTS and table[y].nunique() > 1
    }
    if len(tables) < 2:
        raise ValueError(
            f"{len(tables)} tasks have {FEWEST_POINTS} configurations with different losses; "
            "two are needed"
        )
    widest = max(float(np.ptp(t["x"])) for t in tables.values())
    rates = np.linspace(-MAX_BEND, MAX_BEND, GRID) / widest
    likelihood = np.stack([_likelihood(t, rates, np.ones((1, len(t))))[0] for t in tables.values()])
    kernels = _kernels(rates)
    marginal = _marginal(likelihood, kernels)
    total = marginal.sum(axis=2)
    at_spread, at_mean = np.unravel_index(int(np.argmax(total)), total.shape)
    ratio = 2 * float(total.max() - total[0].max())
    interval = None
    if n_boot:
        names = sorted(set().union(*(t.index for t in tables.values())))
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)
        by_name = pd.DataFrame(draws.T.astype(np.float64), index=names)
        drawn = np.stack(
            [_likelihood(t, rates, by_name.loc[t.index].to_numpy().T) for t in tables.values()], 1
        )
        chosen = rng.integers(0, len(tables), size=(n_boot, len(tables)))
        means = []
        for one, some in zip(drawn, chosen, strict=True):
            over_means = _marginal(one[some], kernels).sum(axis=2).max(axis=0)
            means.append(rates[int(np.argmax(over_means))])
        low, high = np.quantile(means, [0.025, 0.975])
        interval = float(low), float(high)
    return PooledLaw(
        rates=rates,
        likelihood=likelihood,
        priors=_mixtures(total[:, :, None] - marginal, kernels),
        mean=float(rates[at_mean]),
        spread=0.0 if at_spread == 0 else float(kernels[at_spread - 1][0]),
        interval=interval,
        p_same=float(0.5 * chi2.sf(ratio, 1)) if ratio > 0 else 1.0,
        points=tables,
    )


def held_out_tasks(law: PooledLaw) -> pd.DataFrame:
    """Predict the runs of lowest loss of each task from its others, with the pool and without.

    The pool is fitted to the other tasks. Columns: ``early`` and ``late`` points; root mean
    squared error of the late ones, in the metric's unit: ``pooled``, ``alone`` (own rate, flat
    prior), ``line`` (rate 0).
    """
    rows = {}
    line = np.where(np.arange(GRID) == GRID // 2, 0.0, -np.inf)
    for (task, table), prior in zip(law.points.items(), law.priors, strict=True):
        ordered = table.sort_values("x", ascending=False)
        early = max(FEWEST_POINTS, int(EARLY * len(ordered)))
        if len(ordered) == early or ordered["y"][:early].nunique() < 2:
            continue
        seen, late = ordered.iloc[:early], ordered.iloc[early:]
        own = _likelihood(seen, law.rates, np.ones((1, early)))[0]
        errors = {}
        for name, log in {"pooled": own + prior, "alone": own, "line": line}.items():
            guess = _predict(seen, law.rates, _weights(log), late["x"].to_numpy())
            errors[name] = float(np.sqrt(np.mean((guess - late["y"].to_numpy()) ** 2)))
        rows[task] = {"early": early, "late": len(late), **errors}
    columns = ["early", "late", "pooled", "alone", "line"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("task")


def _curve(losses: Array, rates: Array, centre: float) -> Array:
    """``[grid, m]`` (1 - e^(-rate (L - centre))) / rate: the law's shape, a line at rate 0."""
    u = losses - centre
    r = np.where(rates == 0, 1.0, rates)[:, None]
    return np.where(rates[:, None] == 0, u[None], -np.expm1(-r * u[None]) / r)


def _likelihood(table: pd.DataFrame, rates: Array, weights: Array) -> Array:
    """``[B, grid]`` log likelihood of the rates under row weights ``[B, n]``."""
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    y = (y - y.mean()) / y.std()
    shape = _curve(x, rates, float(x.mean()))
    total = weights.sum(axis=1, keepdims=True)
    total = np.where(total > 0, total, 1.0)
    mean_y, mean_g = (weights @ y[:, None]) / total, (weights @ shape.T) / total
    s_yy = weights @ (y**2)[:, None] / total - mean_y**2
    s_gg = weights @ (shape**2).T / total - mean_g**2
    s_gy = weights @ (shape * y).T / total - mean_g * mean_y
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.where(s_gg > 1e-12 * mean_g**2 + 1e-300, s_gy**2 / s_gg, 0.0)
    # the floor keeps noise-free data from an infinite likelihood
    rss = np.maximum(s_yy - explained, 1e-12 * np.maximum(s_yy, 1e-12))
    return np.asarray(-0.5 * np.maximum(total - 2, 0) * np.log(rss))


def _weights(log: Array) -> Array:
    return np.asarray(np.exp(log - logsumexp(log)))


def _kernels(rates: Array) -> list[tuple[float, Array]]:
    """Spreads over tasks, and ``[mean, rate]`` densities on the grid at each."""
    step = float(rates[1] - rates[0])
    found = []
    for spread in np.geomspace(2 * step, rates[-1], SPREADS):
        kernel = np.exp(-0.5 * ((rates[:, None] - rates[None]) / spread) ** 2)
        found.append((float(spread), kernel / kernel.sum(axis=1, keepdims=True)))
    return found


def _marginal(likelihood: Array, kernels: list[tuple[float, Array]]) -> Array:
    """``[1 + spreads, means, tasks]`` log marginal likelihood of each task; spread 0 first."""
    highest = likelihood.max(axis=1)
    scaled = np.exp(likelihood - highest[:, None]).T
    whole = np.stack([scaled, *(kernel @ scaled for _, kernel in kernels)])
    return np.asarray(np.log(whole + 1e-300) + highest)


def _mixtures(log_weights: Array, kernels: list[tuple[float, Array]]) -> Array:
    """``[tasks, grid]`` log density of a rate, means and spreads weighted ``[s, mean, task]``."""
    weights = np.exp(log_weights - log_weights.max(axis=(0, 1)))
    density = weights[0].T + sum(weights[1 + i].T @ k for i, (_, k) in enumerate(kernels))
    return np.asarray(np.log(density / density.sum(axis=1, keepdims=True) + 1e-300))


def _predict(table: pd.DataFrame, rates: Array, weights: Array, losses: Array) -> Array:
    """Least-squares levels at every rate, averaged with the rates' weights."""
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    kept = weights > 1e-12
    centre = float(x.mean())
    seen, new = _curve(x, rates[kept], centre), _curve(losses, rates[kept], centre)
    g = seen - seen.mean(axis=1, keepdims=True)
    slope = (g @ (y - y.mean())) / np.maximum((g**2).sum(axis=1), 1e-300)
    values = y.mean() + slope[:, None] * (new - seen.mean(axis=1, keepdims=True))
    return np.asarray(weights[kept] @ values / weights[kept].sum())
