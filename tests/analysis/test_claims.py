"""Claims survive only if every choice gives the same answer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import fit_law
from scaling.analysis.studies.choices import Choice, jointly, one_at_a_time, values
from scaling.analysis.studies.claims import (
    Claim,
    Reading,
    evaluated,
    same_loss_same_transfer,
)
from scaling.analysis.studies.conclusions import conclusions
from scaling.analysis.studies.factors import additive, factors_of, joint_forms, size_forms
from scaling.analysis.studies.laws import Laws, floor_alone_is_bound
from scaling.analysis.studies.runs import runs_to_fit
from scaling.results import Tables

PLANTED = 0.06
World = Callable[..., pd.DataFrame]


def laws_of(runs: pd.DataFrame, n_boot: int = 40) -> Laws:
    return Laws(runs, n_boot=n_boot)


def claim_of(laws: Laws, name: str) -> Claim:
    (claim,) = (c for c in conclusions(laws) if c.name == name)
    return claim


def answer(laws: Laws, name: str, *axes: str) -> dict[str, Any]:
    claim = claim_of(laws, name)
    (found,) = evaluated(laws, [replace(claim, axes=axes or claim.axes)])
    return found


def test_choices_change_one_axis_at_a_time(world: World) -> None:
    runs = world({"n_total": 0.3})
    axes = ("compute", "y", "points")
    some = values(runs)
    assert some["y"] == ("loss", "loss_refit", "best_loss")
    made = one_at_a_time(runs, axes)
    assert made[0] == Choice()
    assert [c.changed() for c in made[1:]] == [
        "compute pf_days_non_embedding", "compute pf_days_exact", "y loss_refit", "y best_loss",
        "points all",
    ]  # fmt: skip
    assert len(jointly(runs, axes)) == len(set(jointly(runs, axes))) == 3 * 3 * 2
    assert Choice(compute="pf_days_exact", y="best_loss").only(("y",)) == Choice(y="best_loss")


def test_a_power_law_in_compute_survives(tables: Tables) -> None:
    """With noise of a few per cent the countings agree."""
    rng = np.random.default_rng(0)
    runs, _ = runs_to_fit(tables)
    compute = np.exp(np.log(runs[["pf_days", "pf_days_exact"]].astype(float)).mean(axis=1))
    loss = 3 * (compute / 1e-9) ** -PLANTED * np.exp(rng.normal(0, 0.03, len(runs)))
    columns = ["loss", "loss_refit", "best_loss", "loss_pool_64"]
    held = answer(laws_of(runs.assign(**dict.fromkeys(columns, loss)), 100), "compute_exponent")
    assert held["holds"], held["against"]
    assert held["statement"] == "the loss of the compute frontier falls as a power of compute"
    assert held["combinations"]["lowest"] > 0.03
    assert held["combinations"]["highest"] < 0.12
    assert held["combinations"]["n"] == 3 * 4 * 2 * 2
    rising = runs.assign(**dict.fromkeys(columns, loss.to_numpy()[::-1]))
    lost = answer(laws_of(rising, 100), "compute_exponent")
    assert not lost["holds"]
    assert lost["statement"] is None
    assert lost["against"]


def reads(answers: dict[str, Reading]) -> Claim:
    """A claim whose reading depends on the choice of y alone."""
    return Claim(
        "a", "Is it?", {"yes": "it is", "no": "it is not"}, "compute", ("y",),
        lambda fit, rows, choice: answers[choice.y], overlap=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("refit", "against"),
    [
        (Reading("yes", 0.2, 0.1, 0.3), []),
        (Reading("no", 0.2, 0.1, 0.3), ["y loss_refit: it is not"]),
        (Reading(None, reason="a reason"), ["y loss_refit: a reason"]),
        (Reading("yes", 0.5, 0.4, 0.6), ["y loss_refit: 0.5 disagrees [0.4, 0.6]"]),
    ],
)
def test_one_choice_is_enough_to_open_a_question(
    world: World, refit: Reading, against: list[str]
) -> None:
    base = Reading("yes", 0.25, 0.15, 0.35)
    claim = reads({"loss": base, "loss_refit": refit, "best_loss": base})
    (found,) = evaluated(laws_of(world({"n_total": 0.3}), 0), [claim])
    assert found["against"] == against
    assert found["holds"] == (not against)
    assert found["statement"] == (None if against else "it is")
    assert [v["choice"] for v in found["values"]] == ["base", "y loss_refit", "y best_loss"]


def test_a_law_that_cannot_be_read_is_not_asked_again(world: World) -> None:
    claim = reads({"loss": Reading(None, reason="a reason")})
    (found,) = evaluated(laws_of(world({"n_total": 0.3}), 0), [claim])
    assert len(found["values"]) == 1
    assert found["against"] == [
        "base: a reason", "other choices: not asked, as the base has no answer",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def three_factors(world: World) -> Laws:
    exponents = {
        "n_total": 0.6, "batch_size": 0.25, "items_per_user_mean": 0.3, "users_seen": 0.5,
    }  # fmt: skip
    return laws_of(world(exponents, floor=1.0, noise=0.001))


@pytest.mark.slow
def test_planted_exponents_and_their_order_survive(three_factors: Laws) -> None:
    for name in ("n_total", "batch_size", "items_per_user_mean"):
        found = answer(three_factors, f"exponent.{name}", "size", "length", "y")
        assert found["holds"], found["against"]
    order = answer(three_factors, "order.n_total.batch_size", "size", "length", "y")
    assert (order["holds"], order["answer"]) == (True, "n_total"), order["against"]
    base = order["values"][0]
    assert base["lower"] < 0.35 < base["upper"]  # 0.6 - 0.25


def test_a_floor_at_its_bound_is_the_law_without(world: World) -> None:
    """A pure power law of one factor that bends downwards wants a floor below zero."""
    runs = world({"n_total": 0.4})
    runs = runs.assign(batch_size=64, items_per_user_mean=3.0, users_seen=9e3, negatives=64)
    runs["n_total"] = np.geomspace(1e5, 1e7, len(runs))
    bent = np.log(runs["n_total"] / 1e5)
    noise = np.random.default_rng(0).normal(0, 0.01, len(runs))
    runs["loss"] = np.exp(2 - 0.1 * bent - 0.03 * bent**2 + noise)
    with_floor = fit_law(runs, "E + n_total", y="loss", n_boot=0)
    assert floor_alone_is_bound(with_floor)
    settled = Laws(runs, n_boot=0).fit("joint")
    assert str(settled.form) == "n_total"
    assert settled.certificate.objective == pytest.approx(
        with_floor.certificate.objective, rel=1e-8
    )


def test_fits_are_made_once_per_choice(world: World) -> None:
    laws = laws_of(world({"n_total": 0.3}), 0)
    assert laws.fit("compute") is laws.fit("compute", Choice(size="n_non_embedding"))
    assert laws.fit("compute") is not laws.fit("compute", Choice(compute="pf_days_exact"))


def test_factors_that_cannot_be_told_apart_are_left_out(world: World) -> None:
    runs = world({"n_total": 0.3})
    found = factors_of(runs)
    assert found.names == ("n_total", "batch_size", "items_per_user_mean", "users_seen")
    assert found.left_out == {"negatives": "equal to batch_size in every run"}
    apart = factors_of(runs.assign(negatives=np.where(runs["data"] == 1, 16, runs["batch_size"])))
    assert apart.names[-1] == "negatives"
    power = factors_of(runs.assign(users_seen=runs["n_total"] * runs["batch_size"] ** 2))
    assert power.left_out["users_seen"].startswith("a product of powers of n_total, batch_size")
    alone = factors_of(runs.assign(n_total=1e6, items_per_user_mean=3.0))
    assert alone.left_out["n_total"] == "the same in every run"


def test_forms_of_the_joint_law(world: World) -> None:
    factors = factors_of(world({"n_total": 0.3}))
    names = "n_total + batch_size + items_per_user_mean"
    assert joint_forms(factors) == {
        "additive": f"E + {names} + users_seen",
        "repeated": f"E + {names} + repeated(users_seen, repeats)",
        "rising": f"E + {names} + users_seen + rising(repeats)",
        "product": f"E + {names} + users_seen".replace(" + ", " * ").replace("E *", "E +"),
        "kaplan": f"({names} + users_seen)^outer",
    }
    assert additive(("a",), floor=False) == "a"


def test_countings_of_parameters(world: World) -> None:
    """Item and Service stacks that are powers of each other are one factor."""
    runs = world({"n_total": 0.3})
    forms, left_out = size_forms(runs, factors_of(runs))
    assert list(forms) == ["n_total", "n_non_embedding"]
    assert left_out["n_item and n_service"].startswith("n_service is a product of powers of n_item")
    apart = runs.assign(n_service=np.where(runs["data"] == 1, 1e5, 3e5))
    forms, left_out = size_forms(apart, factors_of(apart))
    assert forms["n_item and n_service"].startswith("E + n_item + n_service + batch_size")
    assert left_out == {}


def record(*conclusions_: str | None) -> dict[str, Any]:
    tests = [c and {"conclusion": c, "reasons": ["too few runs"]} for c in conclusions_]
    return {"loss": {"tasks": {f"t{i}": {"equal_loss": t} for i, t in enumerate(tests)}}}


@pytest.mark.parametrize(
    ("conclusions_", "holds", "against"),
    [
        (("equal", "equal"), True, 0),
        (("differs", "differs"), True, 0),
        (("equal", "differs"), False, 2),
        (("equal", "not decidable with this design"), False, 1),
        ((None,), False, 1),
        ((), False, 1),
    ],
)
def test_same_loss_same_transfer_needs_all_tasks(
    conclusions_: tuple[str | None, ...], holds: bool, against: int
) -> None:
    found = same_loss_same_transfer(record(*conclusions_))
    assert (found["holds"], len(found["against"])) == (holds, against)
    assert found["answer"] == (conclusions_[0] if holds else None)
