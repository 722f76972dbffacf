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
    from scaling.analysis.allocation.approaches import compare_approaches
    from scaling.analysis.allocation.envelope import envelope
    from scaling.analysis.allocation.isoflop import isoflop
    from scaling.analysis.allocation.optimum import allocate
    from scaling.analysis.allocation.workload import Workload
    from scaling.analysis.design.audit import audit
    from scaling.analysis.design.next import propose
    from scaling.analysis.figures import (
        gain_vs_similarity,
        loss_vs_compute,
        transfer_vs_pretraining,
    )
    from scaling.analysis.fitting.comparison import compare_forms
    from scaling.analysis.fitting.fit import fit_law, fit_power_law
    from scaling.analysis.fitting.forms import Form, FormError
    from scaling.analysis.fitting.frontier import compute_frontier
    from scaling.analysis.fitting.law import LawFit
    from scaling.analysis.fitting.objective import Objective
    from scaling.analysis.fitting.predictive import predictive_interval
    from scaling.analysis.fitting.rollout import rollout
    from scaling.analysis.fitting.selection import compare_selections, select
    from scaling.analysis.fitting.status import FitError, FitStatus
    from scaling.analysis.fitting.verdicts import Identification
    from scaling.analysis.studies.draw import draw
    from scaling.analysis.studies.report import study, write_study
    from scaling.analysis.transfer_law.chain import fit_chain
    from scaling.analysis.transfer_law.equality import equal_loss_test
    from scaling.analysis.transfer_law.pooled import pooled_law
    from scaling.analysis.transfer_law.record import transfer_laws

_HOME = {
    "FitError": "fitting.status",
    "FitStatus": "fitting.status",
    "Form": "fitting.forms",
    "FormError": "fitting.forms",
    "Identification": "fitting.verdicts",
    "LawFit": "fitting.law",
    "Objective": "fitting.objective",
    "Workload": "allocation.workload",
    "allocate": "allocation.optimum",
    "audit": "design.audit",
    "compare_approaches": "allocation.approaches",
    "compare_forms": "fitting.comparison",
    "compare_selections": "fitting.selection",
    "compute_frontier": "fitting.frontier",
    "draw": "studies.draw",
    "envelope": "allocation.envelope",
    "equal_loss_test": "transfer_law.equality",
    "fit_chain": "transfer_law.chain",
    "fit_law": "fitting.fit",
    "fit_power_law": "fitting.fit",
    "gain_vs_similarity": "figures",
    "isoflop": "allocation.isoflop",
    "loss_vs_compute": "figures",
    "pooled_law": "transfer_law.pooled",
    "predictive_interval": "fitting.predictive",
    "propose": "design.next",
    "rollout": "fitting.rollout",
    "select": "fitting.selection",
    "study": "studies.report",
    "transfer_laws": "transfer_law.record",
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
    "Workload",
    "allocate",
    "audit",
    "compare_approaches",
    "compare_forms",
    "compare_selections",
    "compute_frontier",
    "draw",
    "envelope",
    "equal_loss_test",
    "fit_chain",
    "fit_law",
    "fit_power_law",
    "gain_vs_similarity",
    "isoflop",
    "loss_vs_compute",
    "pooled_law",
    "predictive_interval",
    "propose",
    "rollout",
    "select",
    "study",
    "transfer_laws",
    "transfer_vs_pretraining",
    "write_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
