"""The transfer law of one task: which curve of the pretraining loss predicts its metric.

Four laws are fitted by least squares of the metric itself and compared on configurations that were
held out. T is the metric, L the pretraining loss:

- ``line``: T = E + slope L.
- ``exponential``: T = E -+ k e^(-rate L): the distance to chance E shrinks with the loss (Gadre et
  al. 2024, arXiv 2403.08540, eq. 5; the sign follows the metric's direction).
- ``power``: T = E +- k (L - L0)^omega: the metric leaves its best value E at the loss L0.
- ``sigmoid``: T = E + A / (1 + e^(-rate (L - midpoint))) (Bhagia et al. 2024, arXiv 2412.04403,
  eq. 2).

A law with more parameters is taken only where it is better held out than the simplest one by more
than a standard error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import spearmanr

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.intervals import refit
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.starts import scatter
from scaling.analysis.fitting.status import FitError
from scaling.analysis.transfer_law.points import noise_floor

Array = npt.NDArray[np.float64]

LOSS, PERPLEXITY, METRIC, CELL = "pretraining", "perplexity", "downstream", "cell"
"""Columns: loss [nats], e^loss, metric, configuration. A line in the loss is one in ln e^loss."""
LEAST_SQUARES = Objective(loss="mse", scale="raw")
FEWEST_CELLS = 5
"""Configurations with different losses below which nothing is said of a task."""
FOLDS = 10
LATE = 0.25
"""Share of the configurations, those of lowest loss, that are held out together."""
FRESH_STARTS = 64
CURVE_POINTS = 56
SIGNIFICANT = 0.05
PERMUTATIONS = 2000


def forms(rises_with_loss: bool) -> dict[str, str]:
    """The four laws as forms, simplest first.

    Args:
        rises_with_loss: whether the metric gets worse by rising (a downstream loss), as the loss
            does; else it falls with it (hit rates, MRR).
    """
    down, up = ("-", "+") if rises_with_loss else ("+", "-")
    return {
        "line": f"E + line({PERPLEXITY})",
        "exponential": f"E {down} exp({LOSS})",
        "power": f"E {up} shifted({LOSS})",
        "sigmoid": f"E + sigmoid({LOSS})",
    }


@dataclass(frozen=True, eq=False)
class TaskLaw:
    """The laws of one task.

    Attributes:
        points: fitted table: ``cell``, ``pretraining``, ``perplexity``, ``downstream``.
        law: name of the chosen one; None where there are too few configurations.
        fits: every law that could be fitted, the chosen one with bootstrap draws of
            configurations; ``failed`` why one could not.
        held_out: per law, and for a ``constant``: root mean squared error of ``folds`` of
            configurations left out in turn, and of the ``late`` quarter of lowest loss. [metric]
        scales: whether the task's transfer follows the pretraining loss; ``reasons`` why not.
        rank_correlation: Spearman's, of loss and metric over configurations.
        noise: ``points.noise_floor``.
    """

    points: pd.DataFrame
    law: str | None
    fits: Mapping[str, LawFit]
    failed: Mapping[str, str]
    held_out: pd.DataFrame
    scales: bool
    reasons: tuple[str, ...]
    rank_correlation: float | None
    noise: Mapping[str, Any]

    @property
    def fit(self) -> LawFit | None:
        """The chosen law."""
        return None if self.law is None else self.fits[self.law]

    def predict(self, losses: Array) -> pd.DataFrame:
        """The chosen law at ``losses [m]`` nats, as ``LawFit.predict``."""
        if self.fit is None:
            raise FitError(f"no law of this task: {'; '.join(self.reasons)}")
        return self.fit.predict(columns(losses))

    def _curve(self) -> dict[str, list[Any]]:
        """The law and its 95 % band over the losses, and by a tenth of their range below them."""
        low, high = self.points[LOSS].min(), self.points[LOSS].max()
        losses = np.linspace(low - 0.1 * (high - low), high, CURVE_POINTS)
        band = self.predict(losses).assign(x=losses)
        return {c: [plain(v) for v in band[c]] for c in ("x", "y", "lower", "upper") if c in band}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = self.held_out.astype(object).where(self.held_out.notna(), None)
        return {
            "law": self.law,
            "scales": self.scales,
            "reasons": list(self.reasons),
            "rank_correlation": self.rank_correlation,
            "runs": len(self.points),
            "configurations": int(self.points[CELL].nunique()),
            "noise": dict(self.noise),
            "held_out": table.to_dict(orient="index"),
            "fit": None if self.fit is None else self.fit.to_dict(),
            "curve": None if self.fit is None else self._curve(),
            "others": {
                name: {"equation": fit.equation(), "status": str(fit.status)}
                for name, fit in self.fits.items()
                if name != self.law
            },
            "failed": dict(self.failed),
        }


def fit_task(
    points: pd.DataFrame,
    *,
    rises_with_loss: bool,
    objective: Objective = LEAST_SQUARES,
    n_boot: int = 1000,
    seed: int = 0,
) -> TaskLaw:
    """Fit the laws of one task and choose among them.

    Args:
        points: one row a run: ``pretraining``, ``downstream``, ``cell`` (independent units:
            configurations), and for the noise of the evaluation ``low`` and ``high``, where known.
        rises_with_loss: see ``forms``.
        objective: on the ``raw`` scale.
    """
    table = points.assign(**{PERPLEXITY: np.exp(points[LOSS].astype(np.float64))})
    noise = noise_floor(points)
    cells = table.groupby(CELL)[[LOSS, METRIC]].mean()
    different = int(cells[LOSS].nunique())
    empty = pd.DataFrame(columns=["folds", "late"], dtype=np.float64)
    if different < FEWEST_CELLS or cells[METRIC].nunique() < 2:
        reason = f"{different} configurations with different losses; {FEWEST_CELLS} are needed"
        if different >= FEWEST_CELLS:
            reason = "the metric is the same in every configuration"
        return TaskLaw(table, None, {}, {}, empty, False, (reason,), None, noise)

    def fit(form: str, draws: int) -> LawFit:
        return fit_law(
            table, form, y=METRIC, objective=objective, cluster=CELL, n_boot=draws, seed=seed
        )

    fits, failed = {}, {}
    for name, form in forms(rises_with_loss).items():
        try:
            fits[name] = fit(form, 0)
        except FitError as e:
            failed[name] = str(e)
    errors, late = _held_out(table, fits, cells, seed)
    held_out = pd.DataFrame({"folds": np.sqrt((errors**2).mean()), "late": late})
    law = _choice(errors.drop(columns="constant"))
    fits[law] = fit(forms(rises_with_loss)[law], n_boot)
    rank = float(spearmanr(cells[LOSS], cells[METRIC]).statistic)
    reasons = _against_scaling(errors, law, cells, rank, rises_with_loss, seed)
    return TaskLaw(table, law, fits, failed, held_out, not reasons, reasons, rank, noise)


def columns(losses: Array) -> pd.DataFrame:
    """The columns that the laws read, at ``losses [m]`` nats."""
    values = np.atleast_1d(np.asarray(losses, dtype=np.float64))
    return pd.DataFrame({LOSS: values, PERPLEXITY: np.exp(values)})


def values(fit: LawFit, theta: Array, losses: Array) -> Array:
    """``[S, m]`` a law of the loss at ``losses [S, m]`` (or ``[1, m]``) under ``theta [S, P]``.

    Below the loss L0 of a power law there is no metric: it stays at its value just above L0.
    """
    table = np.broadcast_to(losses, (len(theta), losses.shape[-1]))
    if any(f.kind == "shifted" for term in fit.form.terms for f in term.factors):
        origin = -fit.surface.public(theta)["shift"].to_numpy()[:, None]
        table = np.maximum(table, origin + 1e-9 * (1 + np.abs(origin)))
    x = {LOSS: table, PERPLEXITY: np.exp(table)}
    with np.errstate(all="ignore"):
        value = fit.surface.evaluate(theta, fit.surface.transform(x)).value
    return np.array(np.broadcast_to(value, table.shape))


def tangent(fit: LawFit, losses: Array) -> Array:
    """``[m, P]`` derivative of a law of the loss by its parameters, within its fitted range."""
    low, high = fit.ranges()[fit.factors[0]]
    if fit.factors[0] == PERPLEXITY:
        low, high = np.log(low), np.log(high)
    x = columns(np.clip(losses, low, high))
    return fit.surface.jacobian(fit.theta, {c: x[c].to_numpy() for c in fit.factors})


def refits(fit: LawFit, counts: Array, seed: int) -> Array:
    """``[B, P]`` optima of a law with its rows counted ``counts [B, rows]`` times."""
    scattered = scatter(fit.problem, FRESH_STARTS, np.random.default_rng(seed))
    others = [
        fit.surface.theta({str(k): float(v) for k, v in row.items()})
        for _, row in fit.basins.iloc[1:].iterrows()
    ]
    return refit(fit.problem, [fit.theta, *others], counts, None, scattered)[0]


def _held_out(
    table: pd.DataFrame, fits: Mapping[str, LawFit], cells: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, "pd.Series[float]"]:
    """Errors per held-out configuration and law, and of the configurations of lowest loss."""
    cell = cells.index.get_indexer(pd.Index(table[CELL]))
    order = np.random.default_rng(seed).permutation(len(cells))
    fold = np.empty(len(cells), dtype=np.int64)
    fold[order] = np.arange(len(cells)) % min(FOLDS, len(cells))
    last = max(1, int(LATE * len(cells)))
    is_late = cells[LOSS].rank(method="first").to_numpy() <= last
    kept = np.stack([*(fold[cell] != k for k in range(fold.max() + 1)), ~is_late[cell]]).astype(
        np.float64
    )
    y = table[METRIC].to_numpy(dtype=np.float64)
    losses = cells[LOSS].to_numpy(dtype=np.float64)
    guesses = {"constant": np.repeat((kept @ y / kept.sum(axis=1))[:, None], len(cells), 1)}
    for name, fit in fits.items():
        guesses[name] = values(fit, refits(fit, kept, seed), losses[None])
    errors, late = {}, {}
    for name, guess in guesses.items():
        away = guess - cells[METRIC].to_numpy()
        errors[name] = away[fold, np.arange(len(cells))]
        late[name] = float(np.sqrt(np.mean(away[-1, is_late] ** 2)))
    return pd.DataFrame(errors, index=cells.index), pd.Series(late)


def _choice(errors: pd.DataFrame) -> str:
    """The simplest law that is no more than a standard error worse than the best one."""
    squares = errors**2
    best = squares[squares.mean().idxmin()]
    for name in errors:
        worse = squares[name] - best
        if worse.mean() <= worse.std() / np.sqrt(len(worse)):
            return str(name)
    return str(best.name)


def _against_scaling(
    errors: pd.DataFrame, law: str, cells: pd.DataFrame, rank: float, rises: bool, seed: int
) -> tuple[str, ...]:
    """Why a task's transfer is not said to follow the loss."""
    rng = np.random.default_rng(seed)
    loss, metric = cells[LOSS].rank().to_numpy(), cells[METRIC].rank().to_numpy()
    shuffled = np.stack([rng.permutation(metric) for _ in range(PERMUTATIONS)])
    sign = 1 if rises else -1
    as_good = (
        sign * (shuffled @ (loss - loss.mean())) >= sign * (metric @ (loss - loss.mean())) - 1e-9
    )
    p = (1 + int(as_good.sum())) / (1 + PERMUTATIONS)
    gain = errors["constant"] ** 2 - errors[law] ** 2
    reasons = []
    if p > SIGNIFICANT:
        reasons.append(
            f"transfer does not rank with the loss (Spearman {rank:.2f}, one-sided p {p:.2g})"
        )
    if gain.mean() <= gain.std() / np.sqrt(len(gain)):
        reasons.append(
            f"held-out configurations are predicted no better by the law ({law}) than by their "
            "mean, or by less than a standard error"
        )
    return tuple(reasons)
