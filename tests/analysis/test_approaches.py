"""Approaches 1, 2 and 3: closed forms, brute force, published values, and what each refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.spatial import ConvexHull

from scaling.analysis import fit_law
from scaling.analysis.allocation import (
    AllocationError,
    closed_form,
    compare_approaches,
    envelope,
    isoflop,
)
from scaling.analysis.allocation.parametric import parametric
from scaling.analysis.allocation.trend import cluster_weights, fit_lines

A, B, ALPHA, BETA, E = 406.4, 410.7, 0.34, 0.28, 1.69
"""Hoffmann et al. 2022, eq. 10."""


class Law:
    """L(n, d) without noise; its draws have other exponents."""

    def __init__(self, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.exponents = np.array([[alpha, beta]])
        self.draws = self.exponents * np.exp(np.random.default_rng(1).normal(0, 0.02, (50, 2)))

    def values(self, exponents: np.ndarray, x: pd.DataFrame) -> np.ndarray:
        n, d = x["n"].to_numpy(float), x["d"].to_numpy(float)
        return E + A * n ** -exponents[:, :1] + B * d ** -exponents[:, 1:]

    def predict(self, x: pd.DataFrame, level: float | None = None) -> pd.DataFrame:
        return x.assign(y=self.values(self.exponents, x)[0])

    def predict_draws(self, x: pd.DataFrame) -> np.ndarray:
        return self.values(self.draws, x)

    def optimum(self, c: float) -> float:
        """n at the minimum for c = 6 n d (Hoffmann et al. 2022, eq. 4)."""
        alpha, beta = self.exponents[0]
        g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        return g * (c / 6) ** (beta / (alpha + beta))


def profiles(
    law: Law, shift: float = 0.0, drift: float = 0.0, noise: float = 0.0, half: float = 1.5
) -> pd.DataFrame:
    """Five IsoFLOP profiles of 7 sizes, off their minimum by ``shift``, ever more by ``drift``."""
    rows = []
    for i, c in enumerate(np.geomspace(1e18, 1e22, 5)):
        n = law.optimum(c) * np.exp(np.linspace(-half, half, 7) + shift + i * drift)
        rows.append(pd.DataFrame({"c": c, "n": n, "d": c / 6 / n}))
    df = pd.concat(rows, ignore_index=True)
    rng = np.random.default_rng(0)
    return df.assign(loss=law.predict(df)["y"] * np.exp(rng.normal(0, noise, len(df))))


# ---- closed form ---------------------------------------------------------------------------------


def test_the_closed_form_is_where_a_numerical_minimum_moves() -> None:
    p, m, a = np.array([0.3, 0.5, 0.8]), np.array([1.0, 1.0, 2.0]), np.array([50.0, 5.0, 3.0])

    def best(log_c: float) -> np.ndarray:
        def loss(rest: np.ndarray) -> float:
            x = np.append((log_c - m[1:] @ rest) / m[0], rest)
            return float((a * np.exp(-p * x)).sum())

        rest = minimize(loss, np.full(2, log_c / 4), tol=1e-14, method="Nelder-Mead",
                        options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-16}).x  # fmt: skip
        return np.append((log_c - m[1:] @ rest) / m[0], rest)

    slopes = (best(32.0) - best(28.0)) / 4
    np.testing.assert_allclose(closed_form(p, m), slopes, atol=1e-5)
    assert closed_form(p, m) @ m == pytest.approx(1)


def test_two_factors_are_hoffmanns_a_and_b() -> None:
    draws = closed_form(np.array([[ALPHA, BETA], [0.5, 0.5]]))
    np.testing.assert_allclose(draws[0], [BETA / (ALPHA + BETA), ALPHA / (ALPHA + BETA)])
    np.testing.assert_allclose(draws[1], [0.5, 0.5])


def test_a_fitted_law_and_a_searched_one_have_the_closed_form() -> None:
    law = Law()
    df = profiles(law)
    want = closed_form(law.exponents[0])
    searched = parametric(df, ["n", "d"], law, compute="c", draws=20)
    fit = fit_law(df.assign(loss=law.predict(df)["y"]), "E + n + d", y="loss", n_boot=20)
    fitted = parametric(df, ["n", "d"], fit, compute="c")
    for k, name in enumerate(("n", "d")):
        assert searched[name].exponent == pytest.approx(want[k], abs=1e-7)
        np.testing.assert_allclose(
            searched[name].exponents, closed_form(law.draws[:20])[:, k], atol=1e-6
        )
        assert fitted[name].exponent == pytest.approx(want[k], abs=1e-5)
        assert len(fitted[name].exponents) == 20
    n = searched["n"].predict([1e20, 1e21])["n"]
    np.testing.assert_allclose(n, [law.optimum(1e20), law.optimum(1e21)], rtol=1e-6)
    np.testing.assert_allclose(fitted["n"].predict([1e20])["n"], law.optimum(1e20), rtol=1e-3)


# ---- approach 2 ----------------------------------------------------------------------------------


def test_centred_profiles_of_equal_exponents_have_no_bias() -> None:
    law = Law(0.3, 0.3)  # then a profile is symmetric about its minimum
    trend = isoflop(profiles(law), factor="n", compute="c", n_boot=0)
    np.testing.assert_allclose(
        trend.points["n"], [law.optimum(c) for c in trend.points["c"]], rtol=1e-9
    )
    assert trend.exponent == pytest.approx(0.5, abs=1e-9)


def test_the_bias_of_drifting_profiles_is_that_of_parabolas_fitted_one_by_one() -> None:
    law = Law(0.5, 0.2)
    df = profiles(law, shift=-0.8, drift=0.4, half=3.0)
    vertices, levels = [], []
    for c, part in df.groupby("c"):
        c2, c1, _ = np.polyfit(np.log(part["n"]), part["loss"], 2)
        vertices.append(-c1 / (2 * c2))
        levels.append(np.log(c))
    slope = np.polyfit(levels, vertices, 1)[0]
    found = compare_approaches(df, ["n", "d"], compute="c", law=law, n_boot=0, draws=0)
    truth = 0.2 / 0.7
    assert abs(slope - truth) > 0.005, "the grid is to be biased"
    assert found.of(2, "n").exponent == pytest.approx(slope, abs=1e-8)
    assert found.bias[2, "n"] == pytest.approx(slope - truth, abs=1e-6)
    apart = found.disagreement().set_index(["factor", "approaches"]).loc[("n", "2 - 3")]
    assert apart["difference"] == pytest.approx(apart["of_bias"], abs=1e-9)


def test_every_bootstrap_draw_is_a_fit_of_its_own_rows() -> None:
    df = profiles(Law(), noise=0.0005)
    weights, _ = cluster_weights(df, "auto", 40, seed=3)
    trend = isoflop(df, factor="n", compute="c", n_boot=40, seed=3)
    assert trend.draws_failed == 0
    for draw, exponent in zip(weights[1:11], trend.exponents[:10], strict=True):
        levels, vertices = [], []
        for c in np.unique(df["c"]):
            own = (df["c"] == c).to_numpy() & (draw > 0)
            x, y = np.log(df["n"][own].to_numpy()), df["loss"][own].to_numpy()
            if own.sum() < 3 or y.argmin() in (0, len(y) - 1):
                continue
            c2, c1, _ = np.polyfit(x - x.mean(), y, 2, w=np.sqrt(draw[own]))
            vertex = x.mean() - c1 / (2 * c2)
            if c2 > 0 and x[0] < vertex < x[-1]:
                levels.append(np.log(c))
                vertices.append(vertex)
        assert exponent == pytest.approx(np.polyfit(levels, vertices, 1)[0], rel=1e-6)


def test_replicates_are_averaged_and_other_factors_are_free() -> None:
    x, c = (m.ravel() for m in np.meshgrid(np.geomspace(1, 100, 9), [25.0, 100.0, 400.0]))
    best = (np.log(x) - 0.5 * np.log(c)) ** 2 + 1
    good = pd.DataFrame({"x": x, "c": c, "b": 1.0, "loss": best})
    noisy = [good.assign(loss=best + 0.1), good.assign(loss=best - 0.1)]
    worse = good.assign(b=2.0, loss=best + np.abs(np.sin(7 * x)) + 0.01)
    df = pd.concat([*noisy, worse])
    trend = isoflop(df, factor="x", compute="c", others=["b"], n_boot=0)
    assert trend.exponent == pytest.approx(0.5, abs=1e-9)
    assert trend.slices[0].profile["rows"].tolist() == [2] * 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shift": 2.0}, "its lowest row has its smallest n: the minimum may lie below"),
        ({"shift": -2.0}, "its lowest row has its largest n: the minimum may lie above"),
    ],
)
def test_minima_at_an_edge_are_refused(change: dict[str, float], reason: str) -> None:
    trend = isoflop(profiles(Law(), **change), factor="n", compute="c", n_boot=10)
    assert trend.exponent is None
    assert trend.ci() is None
    assert set(trend.points["reason"]) == {reason}
    assert trend.refused == (
        f"0 of 5 IsoFLOP profiles have a minimum, needs at least 3; 5 refused: {reason}"
    )
    with pytest.raises(AllocationError, match="0 of 5 IsoFLOP profiles"):
        trend.predict([1e20])


def test_what_is_no_profile_is_refused() -> None:
    df = profiles(Law())
    thin = isoflop(df.groupby("c").head(2), factor="n", compute="c", n_boot=0)
    assert set(thin.points["reason"]) == {"2 levels of n, a parabola needs 3"}
    bent = df.assign(loss=10 - df["loss"])
    assert set(isoflop(bent, factor="n", compute="c", n_boot=0).points["reason"]) <= {
        "it curves downwards",
        "its lowest row has its smallest n: the minimum may lie below",
        "its lowest row has its largest n: the minimum may lie above",
    }


def test_levels_of_compute_are_declared_or_found() -> None:
    df = profiles(Law())
    jitter = df.assign(c=df["c"] * np.linspace(1, 1.08, len(df)))
    assert len(isoflop(jitter, factor="n", compute="c", n_boot=0).slices) == 5
    assert len(isoflop(jitter, factor="n", compute="c", tolerance=1e-4, n_boot=0).slices) == 35
    chosen = isoflop(jitter, factor="n", compute="c", budgets=[1e19, 1e20, 1e21], n_boot=0)
    assert len(chosen.slices) == 3
    assert chosen.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.01)


# ---- approach 1 ----------------------------------------------------------------------------------


def curves(law: Law, sizes: int = 60) -> pd.DataFrame:
    """Training curves of many sizes, 60 points each."""
    n = np.geomspace(1e7, 1e11, sizes)
    rows = [
        pd.DataFrame({"run_key": f"r{i}", "n": size, "c": 6 * size * np.geomspace(1e8, 1e13, 60)})
        for i, size in enumerate(n)
    ]
    df = pd.concat(rows, ignore_index=True)
    df["d"] = df["c"] / 6 / df["n"]
    return df.assign(loss=law.predict(df)["y"])


def test_the_envelope_of_dense_curves_has_the_optimal_exponent() -> None:
    law = Law()
    df = curves(law)
    inside = df[(df["c"] > 1e18) & (df["c"] < 1e22)]
    want = BETA / (ALPHA + BETA)
    for kind in ("curves", "rows", "hull"):
        trend = envelope(inside, factor="n", compute="c", kind=kind, n_boot=40)
        assert trend.exponent == pytest.approx(want, abs=0.01), kind
        low, high = trend.ci() or (0, 0)
        assert low < want < high
        assert high - low < 0.2
    tokens = envelope(inside, factor="d", compute="c", kind="curves", n_boot=0)
    assert tokens.exponent == pytest.approx(1 - want, abs=0.01)


def test_the_best_curve_at_every_level_is_found_for_every_draw() -> None:
    df = curves(Law(), sizes=6)
    weights, _ = cluster_weights(df, "run_key", 15, seed=5)
    trend = envelope(df, factor="n", compute="c", kind="curves", n_boot=15, seed=5)
    levels = np.linspace(np.log(df["c"]).min(), np.log(df["c"]).max(), 1500)
    for draw, exponent in zip(weights[1:], trend.exponents, strict=True):
        best_n, count = np.empty(1500), np.zeros(1500)
        lowest = np.full(1500, np.inf)
        for _, run in df.groupby("run_key"):
            w = draw[run.index[0]]
            y = np.interp(levels, np.log(run["c"]), run["loss"], left=np.inf, right=np.inf)
            won = (w > 0) & (y < lowest)
            lowest[won], best_n[won], count[won] = y[won], np.log(run["n"].iloc[0]), w
        some = count > 0
        slope = np.polyfit(levels[some], best_n[some], 1, w=np.sqrt(count[some]))[0]
        assert exponent == pytest.approx(slope, rel=1e-6)


def test_the_hull_is_the_lower_hull_of_scipy() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        c = rng.uniform(0, 4, 40)
        df = pd.DataFrame({"c": np.exp(c), "x": np.exp(rng.normal(size=40))})
        df["loss"] = np.exp(-0.3 * c + rng.uniform(0, 1, 40))
        points = np.log(df[["c", "loss"]].to_numpy())
        far = np.array(
            [[9.0, 9.0]]
        )  # McLeish et al. 2025: a point above, so that the lower edge is left
        hull = ConvexHull(np.vstack([far, points])).vertices
        rows = df.iloc[hull[hull != 0] - 1].sort_values("c")
        lower = rows[(rows["loss"] <= np.minimum.accumulate(rows["loss"]))]
        found = envelope(df, factor="x", compute="c", kind="hull", n_boot=0).points
        np.testing.assert_allclose(found["c"], lower["c"])


def test_an_envelope_at_the_end_of_a_factor_is_warned_of() -> None:
    df = curves(Law(), sizes=3)
    said = " ".join(envelope(df, factor="n", compute="c", n_boot=0).warnings)
    assert "of the frontier has the smallest n, 1e+07" in said


def test_what_gives_no_exponent_says_why() -> None:
    df = curves(Law(), sizes=3)
    same = envelope(df.assign(n=7.0), factor="n", compute="c", n_boot=5)
    assert (same.exponent, same.refused) == (None, "n is the same in every row")
    few = envelope(df.head(2), factor="d", compute="c", n_boot=0)
    assert few.refused == "optima at 2 levels of c, needs at least 3"
    json.dumps([same.to_dict(), few.to_dict()], allow_nan=False)


# ---- side by side --------------------------------------------------------------------------------


def test_the_three_stand_side_by_side() -> None:
    law = Law()
    found = compare_approaches(
        profiles(law, noise=0.0003), ["n", "d"], compute="c", law=law, n_boot=100, draws=50
    )
    table = found.summary()
    assert table["approach"].tolist() == [1, 2, 3] * 2
    assert table["factor"].tolist() == ["d"] * 3 + ["n"] * 3
    assert (table["exponent"].notna()).all()
    assert ((table["lower"] < table["exponent"]) & (table["exponent"] < table["upper"])).all()
    apart = found.disagreement()
    assert apart["approaches"].tolist() == ["1 - 2", "1 - 3", "2 - 3"] * 2
    assert apart["agree"].all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_compute_that_is_no_product_is_refused_by_the_law_alone() -> None:
    df = profiles(Law())
    df["c"] = df["c"] * (1 + df["n"] / 1e9)
    found = compare_approaches(df, ["n", "d"], compute="c", law=Law(), n_boot=0, draws=0)
    said = found.of(3, "n").refused or ""
    assert "c is not proportional to n x d" in said
    with pytest.raises(KeyError, match="approach 4, n"):
        found.of(4, "n")


def test_a_law_that_reads_other_columns_is_refused_by_name() -> None:
    df = profiles(Law())
    df["e"] = np.arange(len(df)) + 1.0
    fit = fit_law(df, "E + n + e", y="loss", n_boot=0)
    found = parametric(df, ["n", "d"], fit, compute="c")
    assert found["d"].refused == "no column e to predict from"


def test_tables_without_what_is_needed() -> None:
    df = profiles(Law())
    with pytest.raises(AllocationError, match="no column 'pf_days'; its columns: c, n, d, loss"):
        envelope(df, factor="n")
    with pytest.raises(AllocationError, match="no column 'run'"):
        isoflop(df, factor="n", compute="c", cluster="run")
    with pytest.raises(AllocationError, match="tells the curves apart"):
        envelope(df, factor="n", compute="c", kind="curves")
    with pytest.raises(AllocationError, match="is null in 35 rows"):
        envelope(df.assign(run_key=None), factor="n", compute="c")
    with pytest.raises(AllocationError, match="no row has positive"):
        envelope(df.assign(loss=-1.0), factor="n", compute="c")
    with pytest.raises(AllocationError, match="not numbers"):
        envelope(df.assign(loss="low"), factor="n", compute="c")


def test_lines_are_numpys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    w = rng.integers(0, 3, (6, 9)).astype(float)
    slope, intercept = fit_lines(x, np.where(w > 0, y, np.nan), w)
    for i in range(6):
        own = w[i] > 0
        want = np.polyfit(x[i][own], y[i][own], 1, w=np.sqrt(w[i][own]))
        np.testing.assert_allclose([slope[i], intercept[i]], want, rtol=1e-9)


# ---- published -----------------------------------------------------------------------------------


@pytest.mark.data
def test_epochs_allocation_of_the_chinchilla_runs(clue_test_data: Path) -> None:
    """a = .513 +- .020 (Besiroglu et al. 2024); under delta = 1e-3 it is .5139 +- .0193."""
    df = pd.read_csv(clue_test_data / "published_fits/epoch_chinchilla/svg_extracted_data.csv")
    df = df.dropna(subset=["loss", "Model Size", "Training FLOP"])
    df = df.rename(columns={"Model Size": "n", "Training FLOP": "c"})
    df = df[df["loss"] < df["loss"].nlargest(5).iloc[-1]].assign(d=lambda t: t["c"] / 6 / t["n"])
    fit = fit_law(df, "E + n + d", y="loss", n_boot=1000)
    trend = parametric(df, ["n", "d"], fit, compute="c")["n"]
    assert trend.exponent == pytest.approx(0.367172 / (0.347310 + 0.367172), abs=2e-4)
    assert trend.exponent == pytest.approx(0.513, abs=0.0015)
    assert np.std(trend.exponents) == pytest.approx(0.0193, rel=0.15)


@pytest.mark.data
def test_gemstones_hull(clue_test_data: Path) -> None:
    """Approach 1 of McLeish et al. 2025 on the cooled-down runs: plotters/approach_1.py at commit
    5f42047, whose FLOPs a token count grouped-query attention, GEGLU and the logits."""
    folder = clue_test_data / "published_fits/gemstones"
    df = pd.read_json(folder / "wandb_df_for_fitting_cool_end.jsonl", lines=True)
    s, head, vocab = 2048.0, 128.0, 50304.0
    w, depth = df["width"].astype(float), df["depth"].astype(float)
    q = w / head
    project = 2 * s * (2 * q) * w * head + 3.5 * s * (1.5 * q) * head
    scores = s * s * head * q + 3 * s * s * q + 2 * s * s * head * q
    out = 2 * s * w * head * q
    block = 6 * s * w * 4 * w + 40 * s * w + 2 * s * w + 14 * s * w
    ends = 7 * w * s + 2 * s * w * vocab
    forward = depth * (project + scores + out + block) + ends
    backward = depth * (2 * project + 2.5 * scores + 2 * out) + 2 * (depth * block + ends)
    df["flops"] = (forward + backward) / s * df["tokens"]
    for factor, name in (("params_active_precise", "params"), ("tokens", "tokens")):
        trend = envelope(
            df, factor=factor, compute="flops", y="final_loss", kind="hull", n_boot=20,
            cluster="run_name",
        )  # fmt: skip
        file = folder / f"published_fits/approach_1_linear_regression_{name}_cooldown.json"
        want = json.loads(file.read_text())
        assert trend.exponent == pytest.approx(want["coef"][0], abs=1e-9)
        assert trend.intercept == pytest.approx(want["intercept"], abs=1e-6)
