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
    from scaling.analysis.figures import (
        gain_vs_similarity,
        loss_vs_compute,
        transfer_vs_pretraining,
    )
    from scaling.analysis.fitting.fit import fit_law, fit_power_law
    from scaling.analysis.fitting.forms import Form, FormError
    from scaling.analysis.fitting.frontier import compute_frontier
    from scaling.analysis.fitting.law import LawFit
    from scaling.analysis.fitting.objective import Objective
    from scaling.analysis.fitting.status import FitError, FitStatus
    from scaling.analysis.fitting.verdicts import Identification
    from scaling.analysis.studies.draw import draw
    from scaling.analysis.studies.report import study, write_study

_HOME = {
    "FitError": "fitting.status",
    "FitStatus": "fitting.status",
    "Form": "fitting.forms",
    "FormError": "fitting.forms",
    "Identification": "fitting.verdicts",
    "LawFit": "fitting.law",
    "Objective": "fitting.objective",
    "compute_frontier": "fitting.frontier",
    "draw": "studies.draw",
    "fit_law": "fitting.fit",
    "fit_power_law": "fitting.fit",
    "gain_vs_similarity": "figures",
    "loss_vs_compute": "figures",
    "study": "studies.report",
    "transfer_vs_pretraining": "figures",
    "write_study": "studies.report",
}

__all__ = [
    "FitError",
    "FitStatus",
    "Form",
    "FormError",
    "Identification",
    "LawFit",
    "Objective",
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
