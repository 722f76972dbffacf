"""What a study found: every fit with the choices behind it, as one JSON value (``fits.json``).

Only what survives every choice that a reader could have made otherwise is stated as a conclusion
(``claims``); every fit behind it is in the result.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import scaling
from scaling.analysis.fitting.status import FitError
from scaling.analysis.studies.aliasing import aliasing
from scaling.analysis.studies.choices import COMPUTE
from scaling.analysis.studies.claims import RULE, evaluated, same_loss_same_transfer
from scaling.analysis.studies.compute import compute_laws, rank_correlation
from scaling.analysis.studies.conclusions import conclusions
from scaling.analysis.studies.downstream import downstream_report
from scaling.analysis.studies.extrapolation import approaches, rollouts
from scaling.analysis.studies.gains import gains_report
from scaling.analysis.studies.joint import joint
from scaling.analysis.studies.laws import Laws
from scaling.analysis.studies.limits import limits
from scaling.analysis.studies.losses import losses
from scaling.analysis.studies.runs import run_key, runs_to_fit
from scaling.analysis.transfer_law.record import transfer_laws
from scaling.files import write_json
from scaling.results import Tables

Progress = Callable[[int, int, str], None]
"""Called with the parts done, the parts in all, and the one that begins."""
FITS_VERSION = 2
"""Version of ``fits.json``; it rises when a reader of an older one would misread it."""
TRANSFER_DRAWS = 400
"""At most so many bootstrap draws for the laws of transfer."""


def study(
    tables: Tables, *, n_boot: int = 1000, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Fit everything the tables allow; a fit that cannot be made says why in its place.

    Args:
        n_boot: bootstrap draws of the laws in compute; the joint law takes fewer
            (``laws.JOINT_DRAWS``).
        seed: of starts, draws and folds.
        progress: told of each part as it begins.

    Returns:
        JSON-able; its keys are described in docs/formats.md.
    """
    runs, rows = runs_to_fit(tables)
    laws = Laws(runs, n_boot=n_boot, seed=seed)
    parts: dict[str, Callable[[], Any]] = {
        "claims": lambda: evaluated(laws, conclusions(laws)),
        "outliers": laws.outliers,
        "rank_correlation": lambda: {x: rank_correlation(runs, x) for x in COMPUTE},
        "compute": lambda: compute_laws(laws),
        "joint": lambda: joint(laws),
        "limits": lambda: _limits(laws),
        "approaches": lambda: approaches(laws),
        "rollouts": lambda: rollouts(laws),
        "aliasing": lambda: aliasing(runs),
        "repetition": lambda: repetition(runs),
        "losses": lambda: losses(runs, min(n_boot, 200), seed),
        "transfer": lambda: downstream_report(tables.transfer, tables.runs),
        "transfer_laws": lambda: _transfer_laws(tables, n_boot, seed),
        "gains": lambda: gains_report(tables.gains),
    }
    found = {}
    for done, (name, make) in enumerate(parts.items()):
        if progress:
            progress(done, len(parts), name.replace("_", " "))
        found[name] = make()
    if progress:
        progress(len(parts), len(parts), "done")
    claims, outliers = found.pop("claims"), found.pop("outliers")
    if found["transfer_laws"] is not None:
        claims.append(same_loss_same_transfer(found["transfer_laws"]))
    return {
        "schema_version": FITS_VERSION,
        "program": f"clue-scaling {scaling.__version__}",
        "sweep": tables.collected.get("sweep"),
        "y": "loss: contrastive loss on the fixed pool at the final step [nats]",
        "counting": COMPUTE,
        "rows": rows | {"outliers": outliers},
        "claims": {"rule": RULE, "claims": claims},
        **found,
    }


def write_study(fits: Mapping[str, Any], folder: Path) -> Path:
    """Write ``fits.json`` into ``results/<sweep>`` and return its path."""
    path = folder / "fits.json"
    write_json(path, fits)
    return path


def repetition(runs: pd.DataFrame) -> dict[str, Any]:
    """Runs whose loss ended above its lowest by more than its standard error, with their passes:
    what memorisation looks like without any law."""
    rose = runs[(runs["loss"] - runs["best_loss"] > runs["loss_se"]).fillna(False)]
    return {
        "rule": "final loss above the lowest evaluation by more than its standard error",
        "runs": len(runs),
        "most_repeats": float(runs["repeats"].max()) if len(runs) else None,
        "rose": [
            {
                "run_key": run_key(row["run_key"]),
                "repeats": float(row["repeats"]),
                "best_step": int(row["best_step"]),
                "rise": float(row["loss"] - row["best_loss"]),
                "loss_se": float(row["loss_se"]),
            }
            for row in rose.to_dict("records")
        ],
    }


def _transfer_laws(tables: Tables, n_boot: int, seed: int) -> dict[str, Any] | None:
    if not len(tables.transfer):
        return None
    return transfer_laws(tables, n_boot=min(n_boot, TRANSFER_DRAWS), seed=seed)


def _limits(laws: Laws) -> dict[str, Any]:
    try:
        return {**limits(laws.fit("joint"), laws.runs), "failed": None}
    except FitError as e:
        return {"cells": [], "failed": str(e)}
