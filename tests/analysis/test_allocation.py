"""Optimal allocation: closed forms, brute force on exact FLOPs, limits, region, configurations."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.contour import ContourSet
from scipy.optimize import brentq

from scaling.analysis.allocation import (
    Allocation,
    AllocationError,
    Family,
    Limits,
    ProductSpace,
    Workload,
    allocate,
    between,
    frontier,
    growing,
    isoflop,
    snap,
)
from scaling.analysis.allocation.figures import flat_region, isoflop_slices, optimum_vs_compute
from scaling.analysis.allocation.minimise import Axis, minimise
from scaling.analysis.allocation.shapes import shape_numbers
from scaling.analysis.allocation.space import largest
from scaling.config import CorpusCard, ModelConfig, PoolConfig
from scaling.data.prepare import read_card
from scaling.flops import expected_flops, mean_items
from scaling.sweeps import Grid, load_sizes

matplotlib.use("Agg")
ROOT = Path(__file__).parents[2]
STUDY = {"n_total": (50.0, 0.3), "batch_size": (5.0, 0.5), "items_per_user_mean": (3.0, 0.4)}
CENTRE = {"n_total": 3e7, "batch_size": 256.0, "items_per_user_mean": 60.0, "users_seen": 1e6}


class Planted:
    """E + sum a x^-p, in draws turned about the centre of a study; ``rising`` adds r repeats^q."""

    def __init__(
        self,
        terms: Mapping[str, tuple[float, float]],
        floor: float = 1.0,
        rising: tuple[float, float] | None = None,
        draws: int = 0,
        centre: Mapping[str, float] = CENTRE,
    ) -> None:
        self.names, self.floor, self.rising = list(terms), floor, rising
        a, p = np.array(list(terms.values())).T
        log_x = np.log([centre.get(name, 1.0) for name in self.names])
        every = p * np.exp(np.random.default_rng(0).normal(0, 0.05, (draws, len(p))))
        self.p = np.vstack([p, every])
        self.log_a = np.vstack([np.log(a), np.log(a) + (every - p) * log_x])

    def one(self, draw: int) -> "Planted":
        """The law of a draw alone."""
        law = Planted(dict.fromkeys(self.names, (1.0, 1.0)), self.floor, self.rising)
        law.p, law.log_a = self.p[[draw + 1]], self.log_a[[draw + 1]]
        return law

    def values(self, rows: slice, x: pd.DataFrame) -> np.ndarray:
        log_x = np.log(x[self.names].to_numpy(float))
        y = self.floor + np.exp(self.log_a[rows, None] - self.p[rows, None] * log_x).sum(axis=2)
        if self.rising:
            y = y + self.rising[0] * x["repeats"].to_numpy(float) ** self.rising[1]
        return y

    def predict(self, x: pd.DataFrame, level: float | None = None) -> pd.DataFrame:
        return x.assign(y=self.values(slice(0, 1), x)[0])

    def predict_draws(self, x: pd.DataFrame) -> np.ndarray:
        return self.values(slice(1, None), x)


@pytest.fixture(scope="module")
def card() -> CorpusCard:
    return read_card(ROOT / "sweeps" / "corpora" / "paper.toml", ROOT)


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelConfig]:
    return load_sizes(ROOT / "sweeps" / "models.toml")


@pytest.fixture(scope="module")
def shapes(sizes: dict[str, ModelConfig]) -> list[ModelConfig]:
    return [size for size in sizes.values() if size.system == "clue"]


# ---- the search ----------------------------------------------------------------------------------


def test_minima_of_many_tilted_bowls_are_exact() -> None:
    rng = np.random.default_rng(0)
    for d in (1, 2, 3):
        middle = rng.uniform(-2, 3, (30, d))
        skew = rng.normal(size=(30, d, d)) * 0.4 + np.eye(d)

        def value(
            at: np.ndarray, middle: np.ndarray = middle, skew: np.ndarray = skew
        ) -> np.ndarray:
            z = np.einsum("sij,smj->smi", skew, at - middle[:, None])
            return np.cosh(0.3 * z).sum(axis=2)

        at, low = minimise(value, [Axis(str(k), (-3.0, 4.0)) for k in range(d)])
        np.testing.assert_allclose(at, middle, atol=1e-5)
        np.testing.assert_allclose(low, d, atol=1e-9)


def test_a_minimum_at_a_kink_or_at_an_end_is_found() -> None:
    def value(at: np.ndarray) -> np.ndarray:
        x, y = at.T
        return (3 * np.abs(x - 0.7) + x + (y + 9) ** 2)[None]

    at, low = minimise(value, [Axis("x", (-2.0, 0.7, 5.0)), Axis("y", (-1.0, 1.0))])
    np.testing.assert_allclose(at, [[0.7, -1.0]], atol=1e-12)
    assert low[0] == pytest.approx(64.7)


def test_a_search_without_a_finite_value_is_refused() -> None:
    with pytest.raises(AllocationError, match="costs as little"):
        minimise(lambda at: np.full((2, len(at)), np.inf), [Axis("x", (0.0, 1.0))])
    with pytest.raises(AllocationError, match="not a number"):
        minimise(lambda at: np.full((2, len(at)), np.nan), [Axis("x", (0.0, 1.0))])


def test_the_largest_affordable_is_a_root() -> None:
    low, high = np.zeros(4), np.full(4, 20.0)
    power = np.array([0.5, 1.0, 2.0, 9.0])

    def cost(x: np.ndarray) -> np.ndarray:
        return np.exp(power * x) + np.exp(0.1 * x)

    found, possible = largest(cost, low, high, 1e3)
    want = [brentq(lambda x, p=p: np.exp(p * x) + np.exp(0.1 * x) - 1e3, 0, 20) for p in power]
    np.testing.assert_allclose(found, want, rtol=1e-10)
    assert possible.all()
    assert not largest(cost, low, high, 1.0)[1].any()
    np.testing.assert_array_equal(largest(cost, low, high, 1e99)[0], high)


# ---- compute is a product ------------------------------------------------------------------------


THREE = {"n": (50.0, 0.3), "b": (5.0, 0.5), "s": (3.0, 0.4)}


def product_space() -> ProductSpace:
    return ProductSpace({"n": (1e2, 1e12), "b": (1e-2, 1e8), "s": (1e-2, 1e7)}, unit=6e5)


def lagrange(a: np.ndarray, p: np.ndarray, c: float) -> np.ndarray:
    """x_k = (a_k p_k / lambda)^(1 / p_k) with lambda such that prod x_k = c."""

    def off(log_lambda: float) -> float:
        return float(((np.log(a * p) - log_lambda) / p).sum() - np.log(c))

    log_lambda = brentq(off, -200, 200, xtol=1e-13)
    return np.exp((np.log(a * p) - log_lambda) / p)


def test_the_optimum_and_every_draw_are_lagranges() -> None:
    law = Planted(THREE, draws=60, centre={"n": 3e7, "b": 300.0, "s": 60.0})
    found = allocate(law, product_space(), 1e19, draws=60)
    a, p = np.array(list(THREE.values())).T
    want = lagrange(a, p, 1e19 / 6e5)
    np.testing.assert_allclose(found.point[["n", "b", "s"]].to_numpy(float), want, rtol=1e-6)
    assert found.point["flops"] == pytest.approx(1e19)
    for i in range(60):
        each = lagrange(np.exp(law.log_a[i + 1]), law.p[i + 1], 1e19 / 6e5)
        np.testing.assert_allclose(
            found.draws.loc[i, ["n", "b", "s"]].to_numpy(float), each, rtol=1e-5
        )
    table = found.summary()
    for name, want_ in zip(("n", "b", "s"), want, strict=True):
        assert table["lower"][name] < want_ < table["upper"][name]
    assert (table["at_limit"].dropna() == 0).all()
    assert found.warnings == ()


def test_the_region_is_where_the_loss_is_a_hundredth_above() -> None:
    law = Planted({"n": (50.0, 0.3), "b": (5.0, 0.5)}, floor=0.5)
    space = ProductSpace({"n": (1e2, 1e12), "b": (1e-2, 1e8)}, unit=1.0)
    found = allocate(law, space, 1e10, draws=0)

    def excess(log_n: float) -> float:
        n = np.exp(log_n)
        loss = 0.5 + 50 * n**-0.3 + 5 * (1e10 / n) ** -0.5
        return float(loss / found.point["loss"] - 1.01)

    middle = np.log(found.point["n"])
    ends = [np.exp(brentq(excess, middle - 5, middle)), np.exp(brentq(excess, middle, middle + 5))]
    np.testing.assert_allclose(found.region.loc["n"], ends, rtol=0.01)
    np.testing.assert_allclose(found.region.loc["b"], 1e10 / np.array(ends[::-1]), rtol=0.01)

    def lowest(c: float) -> float:
        x = lagrange(np.array([50.0, 5.0]), np.array([0.3, 0.5]), c)
        return float(0.5 + 50 * x[0] ** -0.3 + 5 * x[1] ** -0.5)

    share = brentq(lambda k: lowest(k * 1e10) - 1.01 * lowest(1e10), 0.02, 1)
    assert found.cheapest == pytest.approx(share, rel=2e-3)


def test_limits_are_kept_and_told() -> None:
    law = Planted(THREE)
    space = ProductSpace({"n": (1e2, 1e12), "b": (1e-2, 40.0), "s": (30.0, 30.0)}, unit=6e5)
    found = allocate(law, space, 1e19, draws=0)
    assert found.point["b"] == pytest.approx(40)
    assert found.point["s"] == pytest.approx(30)
    assert found.point["n"] == pytest.approx(1e19 / 6e5 / 1200)
    assert found.warnings == ("b is at its upper limit, 40",)
    small = ProductSpace({"n": (1e2, 1e4), "b": (1e-2, 40.0), "s": (1.0, 30.0)}, unit=6e5)
    spent = allocate(law, small, 1e19, draws=0)
    assert spent.point["flops"] == pytest.approx(6e5 * 1e4 * 40 * 30)
    assert spent.warnings[-1] == "0.0% of the budget is spent: no use of the rest helps"


def test_the_frontier_has_the_closed_forms_exponents() -> None:
    law = Planted(THREE, draws=20, centre={"n": 3e7, "b": 300.0, "s": 60.0})
    found = frontier(law, product_space(), [1e18, 1e19, 1e20], draws=20)
    inverse = 1 / law.p
    want = inverse / inverse.sum(axis=1, keepdims=True)
    for k, name in enumerate(("n", "b", "s")):
        trend = found.trends[name]
        assert trend.exponent == pytest.approx(want[0, k], abs=1e-6)
        np.testing.assert_allclose(trend.exponents, want[1:, k], atol=1e-5)
        assert (found.table[f"{name}_lower"] < found.table[name]).all()
    json.dumps(found.to_dict(), allow_nan=False)


# ---- exact FLOPs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": ["single-235m", "single-4x720"], "batch_size": [16], "items_per_user": [7, 512]},
        {"services": ["search"], "items_per_user": [1, 33]},
        {"negatives": [64], "feature_dim": [32]},
    ],
    ids=["plain", "single", "one service", "negatives, reduction"],
)
def test_columns_are_those_of_the_plan(
    settings: dict[str, list[object]], card: CorpusCard, sizes: dict[str, ModelConfig]
) -> None:
    if settings.get("services"):  # halves of a single log need users of two items or more
        logs = {s: (0.0, 0.0, *np.full(60, 1 / 60)) for s in card.services}
        card = card.model_copy(update={"items_per_user": logs})
    plain = {
        "model": ["clue-4m", "clue-60m"],
        "batch_size": [64, 4096],
        "items_per_user": [16, 512],
    }
    grid = Grid(
        name="g", figure="f", source="s", corpus=Path("c"), sizes=sizes,
        grid={**plain, "data_fraction": [0.001, 1.0], **settings},
    )  # fmt: skip
    pool = PoolConfig(size=256, digest="ponmlkjihgfedcba")  # as if it were prepared
    card = card.model_copy(update={"digest": "abcdefghijklmnop", "pool": pool})
    for run in grid.runs(card):
        row, config = run.row, run.config
        assert config is not None
        space = Workload(
            card, [config.model], services=config.data.services,
            negatives=None if config.negatives == config.batch_size else config.negatives,
            limits=Limits(n_users=row["n_users"]),
        )  # fmt: skip
        quantities = np.array([[row["n_total"], row["batch_size"], row["items_per_user"]]], float)
        found = space.columns(quantities).iloc[0]
        for name, value in found.items():
            tolerance = 1e-4 if name == "data_fraction" else 1e-12  # a fraction of whole users
            assert value == pytest.approx(row[str(name)], rel=tolerance), name


def test_exact_flops_are_minimised_as_by_brute_force(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted(STUDY)
    shape, budget, steps = shapes[3], 0.02, 100_000
    best = (np.inf, 0.0, 0)
    for cap in range(1, 513):
        # what a step costs is linear and, by the similarities, quadratic in the batch
        one, two = (expected_flops(shape, card, b, steps, cap, b).total / 8.64e19 for b in (1, 2))
        square = (two - 2 * one) / 2
        linear = one - square
        batch = 2 * budget / (linear + np.sqrt(linear**2 + 4 * square * budget))
        loss = 1 + 50 * 31257921**-0.3 + 5 * batch**-0.5 + 3 * mean_items(card, cap) ** -0.4
        best = min(best, (loss, batch, cap))
    space = Workload(card, [shape], limits=Limits(batch_size=(1, 65_536)))
    found = allocate(law, space, budget, draws=0)
    assert found.point["loss"] == pytest.approx(best[0], abs=2e-6)
    assert found.point["loss"] <= best[0] + 1e-9
    assert found.point["items_per_user"] == pytest.approx(best[2], abs=1)
    assert found.point["batch_size"] == pytest.approx(best[1], rel=0.01)
    assert found.point["pf_days_exact"] == pytest.approx(budget, rel=1e-9)


@pytest.mark.parametrize("counting", ["exact", "paper"])
def test_no_random_allocation_of_the_budget_is_better(
    counting: str, card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted(STUDY)
    space = Workload(card, shapes, counting=counting)  # type: ignore[arg-type]
    found = allocate(law, space, 0.05, draws=0)
    rng = np.random.default_rng(0)
    bounds = np.log(list(space.bounds().values()))
    every = np.exp(rng.uniform(bounds[:, 0], bounds[:, 1], (60_000, 3)))
    rows = space.columns(every)
    loss = law.predict(rows)["y"].to_numpy()[rows[space.compute] <= 0.05]
    assert len(loss) > 10_000
    assert found.point["loss"] <= loss.min()
    assert loss.min() < 1.01 * found.point["loss"]
    assert found.point[space.compute] == pytest.approx(0.05, rel=1e-9)
    inside = rows[
        (rows[space.compute] <= 0.05) & (law.predict(rows)["y"] <= 1.01 * found.point["loss"])
    ]
    for name in space.names:  # what spends less is in the region only if more would be, too
        low, high = found.region.loc[name]
        assert low <= inside[name].min() * 1.03
        assert high >= inside[name].max() / 1.03


def test_every_draw_is_the_optimum_of_its_own_law(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted({**STUDY, "users_seen": (30.0, 0.4)}, draws=25)
    space = Workload(card, shapes)
    found = allocate(law, space, 0.05, draws=25)
    for i in (0, 7, 24):
        alone = allocate(law.one(i), space, 0.05, draws=0)
        np.testing.assert_allclose(
            found.draws.loc[i, list(space.names)], alone.point[list(space.names)], rtol=2e-3
        )
        assert found.draws.loc[i, "loss"] == pytest.approx(alone.point["loss"], rel=1e-8)


def test_repetition_holds_the_batch_where_users_run_out(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted(STUDY, rising=(0.3, 0.8))
    space = Workload(card, shapes)
    found = allocate(law, space, 0.05, draws=0)
    once = card.n_users / 100_000
    assert found.point["batch_size"] == pytest.approx(once, rel=1e-6)
    assert found.point["repeats"] == pytest.approx(0, abs=1e-6)
    free = allocate(Planted(STUDY), space, 0.05, draws=0)
    assert free.point["batch_size"] > 2 * once
    capped = Workload(card, shapes, limits=Limits(max_repeats=0.0))
    held = allocate(Planted(STUDY), capped, 0.05, draws=0)
    assert held.point["batch_size"] == pytest.approx(once, rel=1e-9)
    assert any(said.startswith("batch_size is at its upper limit") for said in held.warnings)


def test_where_more_compute_harms_less_is_spent(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted({"batch_size": (5.0, 0.5)}, rising=(1.0, 1.0))
    limits = Limits(n_total=(31257921.0, 31257921.0), items_per_user=(64, 64), n_users=1e6)
    found = allocate(law, Workload(card, shapes, limits=limits), 1.0, draws=0)
    b = np.geomspace(8, 1e4, 400_001)
    loss = 1 + 5 * b**-0.5 + np.maximum(0, b * 1e5 / 1e6 - 1)
    assert found.point["batch_size"] == pytest.approx(b[loss.argmin()], rel=2e-4)
    assert found.point["pf_days_exact"] < 0.5
    assert "of the budget is spent: no use of the rest helps" in found.warnings[-1]


def test_users_at_a_price_are_bought_as_far_as_they_help(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law = Planted({**STUDY, "users_seen": (300.0, 0.5)})
    price, budget = 2e-8, 0.05
    space = Workload(card, shapes, limits=Limits(user_price=price))
    found = allocate(law, space, budget, draws=0)
    point = found.point
    assert point["pf_days_exact"] + price * point["n_users"] == pytest.approx(budget, rel=1e-8)
    assert point["n_users"] < 0.9 * point["batch_size"] * 1e5, "some users are met again"

    rng = np.random.default_rng(0)
    start = point[list(space.names)].to_numpy(float)
    for spread in (0.3, 0.03, 0.003):
        near = start * np.exp(rng.normal(0, spread, (40_000, 4)))
        bounds = np.array(list(space.bounds().values()))
        near = np.clip(near, bounds[:, 0], bounds[:, 1])
        near[:, 3] = np.minimum(near[:, 3], near[:, 1] * 1e5)
        rows = space.columns(near)
        allowed = space.cost(rows) <= budget
        assert allowed.sum() > 1000
        assert point["loss"] <= law.predict(rows)["y"].to_numpy()[allowed].min() + 1e-9
    cheap = allocate(law, Workload(card, shapes, limits=Limits(user_price=1e-12)), budget, draws=0)
    assert cheap.point["users_seen"] > 5 * point["users_seen"]
    with pytest.raises(AllocationError, match="with a price of users"):
        snap(found, law, space, shapes)


def test_a_quantity_that_is_alone_takes_the_budget(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    for fixed, free in (
        ({"batch_size": (256, 256), "items_per_user": (64, 64)}, "n_total"),
        ({"n_total": (15172801.0, 15172801.0), "items_per_user": (64, 64)}, "batch_size"),
        ({"n_total": (15172801.0, 15172801.0), "batch_size": (256, 256)}, "items_per_user"),
    ):
        space = Workload(card, shapes, limits=Limits(**fixed))  # type: ignore[arg-type]
        found = allocate(Planted(STUDY), space, 0.004, draws=0)
        low, high = space.bounds()[free]
        assert low < found.point[free] < high
        assert found.point["pf_days_exact"] == pytest.approx(0.004, rel=1e-6)


# ---- shapes --------------------------------------------------------------------------------------


def test_a_family_goes_through_its_shapes_and_grows(shapes: list[ModelConfig]) -> None:
    family = Family(shapes[::-1], 50_257, 2)
    exact = shape_numbers(family.shapes, 50_257, 2)
    found = family.at(np.log(exact.counts[:, 0]))
    np.testing.assert_allclose(found.counts, exact.counts, rtol=1e-12)
    np.testing.assert_allclose(found.costs, exact.costs, rtol=1e-12)
    fine = family.at(np.linspace(*np.log(family.ends), 500))
    assert (np.diff(fine.counts, axis=0) > 0).all()
    assert (np.diff(fine.costs, axis=0) >= 0).all()


def test_shapes_that_make_no_family_are_refused() -> None:
    wide = ModelConfig(layers=1, d_model=96, heads=1)
    deep = ModelConfig(layers=12, d_model=64, heads=1)
    with pytest.raises(AllocationError, match="1x96 has more parameters than 12x64 but not more"):
        Family([wide, deep], 50_257, 2)
    with pytest.raises(AllocationError, match="at least one"):
        Family([], 50_257, 2)
    single = ModelConfig(system="single", layers=2, d_model=64, heads=1)
    with pytest.raises(AllocationError, match="either of system clue or of single"):
        Family([wide, single], 50_257, 2)
    mid = ModelConfig(layers=12, d_model=128, heads=2)
    assert growing([mid, wide, deep], 50_257) in ([wide, mid], [deep, mid])


def test_shapes_between_can_be_built(shapes: list[ModelConfig]) -> None:
    found = between(growing(shapes, 50_257))
    assert set(growing(shapes, 50_257)) <= set(found)
    assert len({(s.layers, s.d_model) for s in found}) == len(found) > 20
    for shape in found:
        assert ModelConfig.parse(shape.model_dump(), "shape") == shape  # heads divide the width
        assert 4 <= shape.layers <= 10
        assert 64 <= shape.d_model <= 720


# ---- real configurations -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapped_study(
    card: CorpusCard, shapes: list[ModelConfig], sizes: dict[str, ModelConfig]
) -> tuple[Planted, Workload, Allocation, pd.DataFrame]:
    law = Planted(STUDY, draws=30)
    space = Workload(card, shapes, limits=Limits(batch_size=(32, 2048)))
    chosen = allocate(law, space, 0.05, draws=30)
    real = between(growing(shapes, card.vocab_size))
    found = snap(chosen, law, space, real, batch_step=64, items_step=32, sizes=sizes)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.best["loss"] == found.table["loss"].min()
    assert len(found.region) == (found.table["excess"] <= 0.01).sum()
    return law, space, chosen, found.table


def test_configurations_can_be_run_and_fit_the_budget(
    snapped_study: tuple[Planted, Workload, Allocation, pd.DataFrame], card: CorpusCard
) -> None:
    law, _, chosen, table = snapped_study
    assert "clue-8m" in set(table["model"]), "named sizes have their names"
    for row in table.iloc[:: len(table) // 15].to_dict("records"):
        model = ModelConfig(layers=row["layers"], d_model=row["d_model"], heads=row["heads"])
        batch, cap = row["batch_size"], row["items_per_user"]
        cost = expected_flops(model, card, batch, 100_000, cap, batch).total / 8.64e19
        assert (batch % 64, cap % 32) == (0, 0)
        assert cost == pytest.approx(row["pf_days_exact"], rel=1e-12)
        assert cost <= 0.05
        assert row["spent"] == pytest.approx(cost / 0.05)
        more = expected_flops(model, card, batch, 100_000, cap + 32, batch).total / 8.64e19
        assert more > 0.05 or cap == 512
        x = pd.DataFrame([row])
        assert row["loss"] == pytest.approx(law.predict(x)["y"].iloc[0])
        assert row["excess"] == pytest.approx(row["loss"] / chosen.point["loss"] - 1)
        within = [
            law.one(i).predict(x)["y"].iloc[0] <= 1.01 * chosen.draws["loss"][i] for i in range(30)
        ]
        assert row["share_within"] == pytest.approx(np.mean(within))


def test_the_best_configuration_is_the_best_of_all(
    snapped_study: tuple[Planted, Workload, Allocation, pd.DataFrame],
    card: CorpusCard,
    shapes: list[ModelConfig],
) -> None:
    law, space, _, table = snapped_study
    best = np.inf
    for shape in between(growing(shapes, card.vocab_size)):
        numbers = shape_numbers([shape], card.vocab_size, 2)
        b, s = (m.ravel() for m in np.meshgrid(np.arange(64, 2049, 64.0), np.arange(32, 513, 32.0)))
        rows = space.rows(numbers.take(np.zeros(len(b), dtype=np.intp)), b, s)
        loss = law.predict(rows)["y"].to_numpy()
        best = min(best, loss[rows["pf_days_exact"].to_numpy() <= 0.05].min())
    assert table["loss"].iloc[0] == pytest.approx(best, rel=1e-12)


def test_nothing_real_within_the_budget_is_refused(
    card: CorpusCard, shapes: list[ModelConfig]
) -> None:
    law, space = Planted(STUDY), Workload(card, shapes)
    chosen = allocate(law, space, 2e-5, draws=0)
    with pytest.raises(AllocationError, match="none of 1 shapes"):
        snap(chosen, law, space, [shapes[-2]])


# ---- refusals ------------------------------------------------------------------------------------


def test_wrong_limits_and_budgets_are_named(card: CorpusCard, shapes: list[ModelConfig]) -> None:
    with pytest.raises(AllocationError, match=r"batch_size: limits 64 to 8 are not 0 < lower"):
        Limits(batch_size=(64, 8))
    with pytest.raises(AllocationError, match=r"max_repeats = -1; valid: finite, at least 0"):
        Limits(max_repeats=-1)
    with pytest.raises(AllocationError, match="nothing is left between"):
        Workload(card, shapes, limits=Limits(batch_size=(4096, 8192), max_repeats=0.0))
    fixed = Limits(items_per_user=(8, 8), n_total=(4e7, 4e7), user_price=1e-9)
    with pytest.raises(AllocationError, match="must be free to use up the rest"):
        Workload(card, shapes, limits=fixed)
    space = Workload(card, shapes)
    with pytest.raises(AllocationError, match="budget = -1; valid: positive and finite"):
        allocate(Planted(STUDY), space, -1)
    with pytest.raises(AllocationError, match="costs as little as the budget"):
        allocate(Planted(STUDY), space, 1e-9, draws=0)
    with pytest.raises(AllocationError, match="a loss of -"):
        allocate(Planted(STUDY, floor=-9.0), space, 0.05, draws=0)
    with pytest.raises(AllocationError, match="at least two factors"):
        ProductSpace({"n": (1, 2)})


# ---- figures -------------------------------------------------------------------------------------


def test_figures_show_the_numbers(
    snapped_study: tuple[Planted, Workload, Allocation, pd.DataFrame],
) -> None:
    law, space, chosen, _ = snapped_study
    ax = flat_region(law, space, chosen)
    star = next(line for line in ax.lines if line.get_label() == "optimum")
    assert star.get_xdata()[0] == chosen.point["batch_size"]
    assert star.get_ydata()[0] == chosen.point["n_total"]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "batch size [users]")

    product = product_space()
    three = Planted(THREE)
    chosen = allocate(three, product, 1e19, draws=0)
    ax = flat_region(three, product, chosen, x="b", y="n")
    (map_,) = (c for c in ax.collections if isinstance(c, ContourSet))
    n, b, s = (chosen.point[name] for name in ("n", "b", "s"))
    for level, paths in zip(map_.levels[1:], map_.get_paths(), strict=False):
        outline = paths.vertices  # the outer end of this band, and the inner one
        assert len(outline) > 20
        left = 1e19 / 6e5 / outline[:, 0] / outline[:, 1]
        loss = 1 + sum(a * v**-p for (a, p), v in zip(
            THREE.values(), (outline[:, 1], outline[:, 0], left), strict=True))  # fmt: skip
        optimum = 1 + sum(a * v**-p for (a, p), v in zip(THREE.values(), (n, b, s), strict=True))
        assert (loss / optimum - 1).max() == pytest.approx(level, rel=0.05)

    budgets = [1e18, 1e19, 1e20]
    three = Planted(THREE, draws=5, centre={"n": 3e7, "b": 300.0, "s": 60.0})
    front = frontier(three, product, budgets, draws=5)
    ax = optimum_vs_compute(front, "n", others=[front.trends["n"]])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), front.table["n"])
    assert len(ax.collections) == 1, "a band"

    x, c = (m.ravel() for m in np.meshgrid(np.geomspace(1, 100, 9), [25.0, 100.0, 400.0, 9e6]))
    df = pd.DataFrame({"x": x, "c": c, "loss": (np.log(x) - 0.5 * np.log(c)) ** 2 + 1})
    found = isoflop(df, factor="x", compute="c", n_boot=0)
    ax = isoflop_slices(found)
    stars = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(stars, [5, 10, 20])
    matplotlib.pyplot.close("all")
    line = ProductSpace({"n": (1e2, 1e12), "b": (1e-2, 1e8), "s": (9.0, 9.0)}, unit=6e5)
    with pytest.raises(AllocationError, match="three quantities that vary, and here 2 do: n, b"):
        flat_region(three, line, allocate(three, line, 1e19, draws=0), x="b", y="n")
