"""Tables in, fits and figures out. Nothing here imports torch.

    from scaling.results import load
    from scaling.analysis import fit_power_law, loss_vs_compute

    tables = load("results/demo")
    fit = fit_power_law(tables.runs, x="pf_days", y="loss", frontier=True)
    loss_vs_compute(tables.runs, fit)

Names are imported on first use: a fit does not load matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.analysis.additive import AdditiveFit, FitError, FitStatus
    from scaling.analysis.figures import (
        draw,
        gain_vs_similarity,
        loss_vs_compute,
        transfer_vs_pretraining,
    )
    from scaling.analysis.fit import PowerLawFit, fit_power_law
    from scaling.analysis.frontier import compute_frontier
    from scaling.analysis.law import Identification, LawFit, fit_law
    from scaling.analysis.report import study, write_study

_HOME = {
    "AdditiveFit": "additive",
    "FitError": "additive",
    "FitStatus": "additive",
    "Identification": "law",
    "LawFit": "law",
    "PowerLawFit": "fit",
    "compute_frontier": "frontier",
    "draw": "figures",
    "fit_law": "law",
    "fit_power_law": "fit",
    "gain_vs_similarity": "figures",
    "loss_vs_compute": "figures",
    "study": "report",
    "transfer_vs_pretraining": "figures",
    "write_study": "report",
}

__all__ = [
    "AdditiveFit",
    "FitError",
    "FitStatus",
    "Identification",
    "LawFit",
    "PowerLawFit",
    "compute_frontier",
    "draw",
    "fit_law",
    "fit_power_law",
    "gain_vs_similarity",
    "loss_vs_compute",
    "study",
    "transfer_vs_pretraining",
    "write_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
