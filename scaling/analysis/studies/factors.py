"""The factors of the joint law, and the forms that it could have."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

FACTORS = ("n_total", "batch_size", "items_per_user_mean", "users_seen", "negatives")
"""Factors of the joint law, each a power. The effective length of a log is the realised mean of
min(n, S), not the cap S."""
SIZES = {
    "n_total": ("n_total",),
    "n_non_embedding": ("n_non_embedding",),
    "n_item and n_service": ("n_item", "n_service"),
}
"""Countings of parameters that may stand for model size, by name."""
USERS, REPEATS = "users_seen", "repeats"
SAME = 1e-9
"""Unexplained share of the variance of a logarithm below which a column is a product of powers of
others."""


@dataclass(frozen=True)
class Factors:
    """The factors that a sweep varies.

    Attributes:
        names: in the order of ``FACTORS``.
        left_out: of the others, why.
        repeats: whether runs differ in passes over their users.
    """

    names: tuple[str, ...]
    left_out: dict[str, str]
    repeats: bool

    def replaced(self, old: str, new: tuple[str, ...]) -> "Factors":
        """With other columns in a factor's place."""
        at = self.names.index(old)
        return Factors(
            self.names[:at] + new + self.names[at + 1 :], self.left_out, self.repeats
        )  # fmt: skip


def factors_of(runs: pd.DataFrame) -> Factors:
    """The factors that vary in these runs, each apart from those before it.

    A factor that is a product of powers of earlier ones in every run (negatives = batch size, most
    often) is left out: no law in both has one optimum.
    """
    names: list[str] = []
    left_out = {}
    for name in FACTORS:
        if runs[name].nunique() < 2:
            left_out[name] = "the same in every run"
        elif name == "negatives" and (runs[name] == runs["batch_size"]).all():
            left_out[name] = "equal to batch_size in every run"
        elif names and unexplained(runs, name, names) < SAME:
            left_out[name] = f"a product of powers of {', '.join(names)} in every run"
        else:
            names.append(name)
    return Factors(tuple(names), left_out, runs[REPEATS].nunique() > 1)


def unexplained(runs: pd.DataFrame, name: str, others: list[str]) -> float:
    """Share of the variance of ln(name) that the logarithms of others leave, by least squares."""
    y = np.log(runs[name].to_numpy(dtype=np.float64))
    x = np.log(runs[others].to_numpy(dtype=np.float64))
    y, x = y - y.mean(), x - x.mean(axis=0)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(rest @ rest / (y @ y))


def additive(names: tuple[str, ...], *, floor: bool = True) -> str:
    """E + a + b + ... of powers."""
    return " + ".join([*["E"] * floor, *names])


def joint_forms(factors: Factors) -> dict[str, str]:
    """Forms of the joint law by name.

    ``additive`` (Hoffmann et al. 2022, eq. 2); ``repeated``, where repeated users are worth less
    than new ones (Muennighoff et al. 2023, eq. 5); ``rising``, where passes beyond the first add
    to the loss, as memorised users do; ``product``; ``kaplan`` (Kaplan et al. 2020, eq. 1.5, any
    number of factors).
    """
    names = factors.names
    forms = {"additive": additive(names)}
    if factors.repeats:
        if USERS in names:
            worth = f"repeated({USERS}, {REPEATS})"
            forms["repeated"] = additive(tuple(worth if n == USERS else n for n in names))
        forms["rising"] = f"{additive(names)} + rising({REPEATS})"
    if len(names) > 1:
        forms["product"] = f"E + {' * '.join(names)}"
        forms["kaplan"] = f"({additive(names, floor=False)})^outer"
    return forms


def size_forms(runs: pd.DataFrame, factors: Factors) -> tuple[dict[str, str], dict[str, str]]:
    """The additive law under each counting of parameters, and the countings left out with the
    reason."""
    forms: dict[str, str] = {}
    left_out: dict[str, str] = {}
    if "n_total" not in factors.names:
        return forms, dict.fromkeys(SIZES, factors.left_out["n_total"])
    for name, columns in SIZES.items():
        others = [n for n in factors.names if n != "n_total"]
        for i, column in enumerate(columns):
            before = [*columns[:i], *others]
            if runs[column].nunique() < 2:
                left_out[name] = f"{column} is the same in every run"
            elif i and (runs[column] == runs[columns[0]]).all():
                left_out[name] = f"{column} equals {columns[0]} in every run"
            elif before and unexplained(runs, column, before) < SAME:
                left_out[name] = f"{column} is a product of powers of {', '.join(before)}"
        if name not in left_out:
            forms[name] = additive(factors.replaced("n_total", columns).names)
    return forms, left_out
