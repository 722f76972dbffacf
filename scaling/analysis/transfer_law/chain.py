"""From a configuration to its transfer in two stages, with the error of the first carried through.

Stage 1 is a law of the pretraining loss in the factors, stage 2 a law of the metric in the loss.
The same runs are in both, so their errors are not independent: every bootstrap draw takes the same
configurations in both stages, and the spread of the composed draws is the interval of the chained
prediction. OLMo's ladder (Bhagia et al. 2024, arXiv 2412.04403) composes the two point estimates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.intervals import tail
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.status import FitError
from scaling.analysis.transfer_law.laws import (
    CELL,
    LEAST_SQUARES,
    LOSS,
    METRIC,
    PERPLEXITY,
    refits,
    values,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TransferChain:
    """A law of the loss and a law of the metric, fitted to the same runs.

    Attributes:
        stage_1: loss by the factors.
        stage_2: metric by the loss.
        draws_1, draws_2: ``[B, P1]``, ``[B, P2]`` parameters under the same resampled
            configurations.
        failed: draws with too few distinct points for a stage; they are not among the others.
        pairs: ``[runs, 2]`` residuals of loss [nats] and metric of the runs that are in both.
        n_clusters: configurations in either stage.
    """

    stage_1: LawFit
    stage_2: LawFit
    draws_1: Array
    draws_2: Array
    failed: int
    pairs: Array
    n_clusters: int

    def predict(self, x: "pd.DataFrame | Mapping[str, Any]", level: float = 0.95) -> pd.DataFrame:
        """Loss and metric at the rows of ``x``.

        Returns:
            The factors, ``loss``, ``y`` and three intervals of ``y``: ``lower``, ``upper`` of the
            law with the error of both stages; ``lower_stage_2``, ``upper_stage_2`` as if the
            predicted loss were exact; ``lower_run``, ``upper_run`` of a new run (its residuals in
            loss and metric drawn together from those of a fitted run). ``extrapolated`` says that
            a factor, or the loss, lies outside its fitted range.
        """
        first = self.stage_1.predict(x, level=None)
        loss = first["y"].to_numpy()
        share = tail(level, self.n_clusters, max(d.shape[1] for d in (self.draws_1, self.draws_2)))
        ends = [share, 1 - share]
        out = first.rename(columns={"y": "loss"})
        out["y"] = values(self.stage_2, self.stage_2.theta[None], loss[None])[0]
        drawn = self.stage_1.surface.values(self.draws_1, _arrays(self.stage_1, first))
        with np.errstate(invalid="ignore"):
            both = values(self.stage_2, self.draws_2, drawn)
            second = values(self.stage_2, self.draws_2, loss[None])
            rng = np.random.default_rng(self.stage_2.bootstrap.seed)
            noise = self.pairs[rng.integers(0, len(self.pairs), drawn.shape)]
            runs = values(self.stage_2, self.draws_2, drawn + noise[..., 0]) + noise[..., 1]
        out["lower"], out["upper"] = np.nanquantile(both, ends, axis=0)
        out["lower_stage_2"], out["upper_stage_2"] = np.nanquantile(second, ends, axis=0)
        out["lower_run"], out["upper_run"] = np.nanquantile(runs, ends, axis=0)
        low, high = self._losses
        beyond = (loss < low) | (loss > high)
        return out.assign(extrapolated=first["extrapolated"] | beyond)

    @cached_property
    def _losses(self) -> tuple[float, float]:
        column = self.stage_2.factors[0]
        low, high = self.stage_2.ranges()[column]
        return (float(np.log(low)), float(np.log(high))) if column == PERPLEXITY else (low, high)

    def to_dict(self) -> dict[str, Any]:
        """Both laws and how they were drawn together, as plain JSON values."""
        return {
            "stage_1": self.stage_1.to_dict(),
            "stage_2": self.stage_2.to_dict(),
            "bootstrap": {
                "method": "percentile, the same configurations resampled in both stages",
                "n_clusters": self.n_clusters,
                "draws": len(self.draws_1),
                "failed": self.failed,
            },
        }


def fit_chain(
    runs: pd.DataFrame,
    points: pd.DataFrame,
    stage_1: str,
    stage_2: str,
    *,
    objective_1: Objective | None = None,
    objective_2: Objective = LEAST_SQUARES,
    n_boot: int = 1000,
    seed: int = 0,
) -> TransferChain:
    """Fit both stages and draw them together.

    Args:
        runs: of stage 1: ``pretraining``, ``cell`` and the factors of ``stage_1``.
        points: of stage 2: ``pretraining``, ``downstream``, ``cell``; of one task. A run that is in
            both tables has the same ``cell``, and where both hold ``run_key`` that as well.
        stage_1: form of the loss, such as ``"E + n_total + batch_size"``.
        stage_2: form of the metric in ``pretraining`` or ``perplexity``, as in ``laws.forms``.
        objective_1: by default Huber losses of the logarithm.

    Raises:
        FitError: a stage cannot be fitted.
    """
    table = points.assign(**{PERPLEXITY: np.exp(points[LOSS].astype(np.float64))})
    first = fit_law(
        runs, stage_1, y=LOSS, objective=objective_1, cluster=CELL, n_boot=0,
        seed=seed,
    )  # fmt: skip
    second = fit_law(
        table, stage_2, y=METRIC, objective=objective_2, cluster=CELL, n_boot=0, seed=seed
    )
    for fit, rows, name in ((first, runs, "stage 1"), (second, table, "stage 2")):
        if len(fit.weights) != len(rows):
            why = "; ".join(f"{n} rows: {rule}" for rule, n in fit.dropped.items())
            raise FitError(f"{name} has rows that cannot be used ({why}); leave them out of both")
    cells = sorted({*runs[CELL], *table[CELL]}, key=str)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells)), size=n_boot)
    place = {cell: i for i, cell in enumerate(cells)}
    counts = [drawn[:, [place[c] for c in t[CELL]]].astype(np.float64) for t in (runs, table)]
    enough = np.ones(n_boot, dtype=bool)
    for fit, count in zip((first, second), counts, strict=True):
        enough &= _distinct(fit, count) >= fit.surface.n_free
    draws = [
        refits(fit, count[enough], seed) for fit, count in zip((first, second), counts, strict=True)
    ]
    return TransferChain(
        first, second, draws[0], draws[1], int((~enough).sum()),
        _pairs(first, second, runs, table), len(cells),
    )  # fmt: skip


def compare_held_out(
    points: pd.DataFrame,
    held_out: "pd.Series[bool]",
    stage_1: Mapping[str, str],
    stage_2: str,
    direct: Mapping[str, str],
    *,
    objective_1: Objective | None = None,
    objective_2: Objective = LEAST_SQUARES,
    n_boot: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Chained against direct predictions of one task's runs that were held out.

    Args:
        points: ``pretraining``, ``downstream``, ``cell`` and the columns of all forms.
        held_out: rows that are predicted and not fitted.
        stage_1: name to form of laws of the loss; each gives a chain.
        stage_2: form of the metric in the loss.
        direct: name to form of laws that give the metric straight from the configuration.

    Returns:
        A row per way: ``chain, <name>``, ``direct, <name>``, and ``measured loss``: stage 2 at the
        loss that the held-out runs really had, which is what would be left without the error of
        stage 1. Columns: ``n``, ``bias`` (mean of predicted less measured), ``rmse``, ``covered``:
        share of held-out runs within the 95 % interval of a new run (chains alone), and ``failed``:
        why a way could not be fitted.
    """
    seen, new = points[~held_out], points[held_out]
    measured = new[METRIC].to_numpy(dtype=np.float64)
    rows: dict[str, dict[str, Any]] = {}

    def row(guess: Array | None, covered: float | None = None, failed: str | None = None) -> Any:
        away = None if guess is None else guess - measured
        return {
            "n": len(new),
            "bias": None if away is None else float(away.mean()),
            "rmse": None if away is None else float(np.sqrt(np.mean(away**2))),
            "covered": covered,
            "failed": failed,
        }

    for name, form in stage_1.items():
        try:
            chain = fit_chain(
                seen, seen, form, stage_2, objective_1=objective_1, objective_2=objective_2,
                n_boot=n_boot, seed=seed,
            )  # fmt: skip
        except FitError as e:
            rows[f"chain, {name}"] = row(None, failed=str(e))
            continue
        guess = chain.predict(new)
        inside = (guess["lower_run"] <= measured) & (measured <= guess["upper_run"])
        rows[f"chain, {name}"] = row(guess["y"].to_numpy(), float(inside.mean()))
        second, losses = chain.stage_2, new[LOSS].to_numpy(dtype=np.float64)
        rows["measured loss"] = row(values(second, second.theta[None], losses[None])[0])
    for name, form in direct.items():
        try:
            fit = fit_law(
                seen, form, y=METRIC, objective=objective_2, cluster=CELL, n_boot=0, seed=seed
            )
        except FitError as e:
            rows[f"direct, {name}"] = row(None, failed=str(e))
            continue
        rows[f"direct, {name}"] = row(fit.predict(new, level=None)["y"].to_numpy())
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")


def _arrays(fit: LawFit, table: pd.DataFrame) -> dict[str, Array]:
    return {c: table[c].to_numpy(dtype=np.float64) for c in fit.factors}


def _distinct(fit: LawFit, counts: Array) -> npt.NDArray[np.intp]:
    """``[B]`` distinct points that each draw holds."""
    table = np.stack(list(fit.columns.values()), axis=1)
    point = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    member = np.eye(int(point.max()) + 1)[point]
    return np.asarray(((counts > 0).astype(np.float64) @ member > 0).sum(axis=1))


def _pairs(first: LawFit, second: LawFit, runs: pd.DataFrame, points: pd.DataFrame) -> Array:
    """Residuals of both stages by run, widened by the parameters that each stage took."""
    by_run = "run_key" if "run_key" in runs and "run_key" in points else CELL
    predicted = first.surface.values(first.theta[None], dict(first.columns))[0]
    loss = pd.Series(runs[LOSS].to_numpy(dtype=np.float64) - predicted, index=runs[by_run])
    fitted = second.surface.values(second.theta[None], dict(second.columns))[0]
    metric = pd.Series(points[METRIC].to_numpy(dtype=np.float64) - fitted, index=points[by_run])
    both = pd.concat([loss.groupby(level=0).mean(), metric.groupby(level=0).mean()], axis=1)
    both = both.dropna()
    widen = [np.sqrt(f.n / max(1, f.n - f.surface.n_free)) for f in (first, second)]
    return np.asarray(both.to_numpy() * widen) if len(both) else np.zeros((1, 2))
