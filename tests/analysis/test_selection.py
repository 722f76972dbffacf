"""Rules as data: what each drops, how it is written, and what it does to a fit."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.rule_text import KINDS, read_rule
from scaling.analysis.fitting.rules import OPERATORS, RuleError, Where
from scaling.analysis.fitting.selection import compare_selections, select


def checkpoints() -> pd.DataFrame:
    """Three runs of four checkpoints; b ends early, c diverges; rows in no order."""
    df = pd.DataFrame(
        {
            "run_key": list("aaaabbbbcccc"),
            "step": [100, 200, 300, 400, 100, 200, 300, 350, 100, 200, 300, 400],
            "steps": 400,
            "loss": [5.0, 4.0, 3.0, 2.0, 5.5, 4.5, 3.5, 3.0, 5.0, 4.0, 7.0, 9.0],
        }
    )
    return df.sample(frac=1, random_state=3)


def kept(df: pd.DataFrame, *rules: object) -> list[tuple[str, int]]:
    rows = select(df, rules).rows  # type: ignore[arg-type]
    return sorted(zip(rows["run_key"], rows["step"], strict=True))


ALL = [(r, s) for r in "abc" for s in ((100, 200, 300, 350) if r == "b" else (100, 200, 300, 400))]


# ---- every rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("step >= 300", [k for k in ALL if k[1] >= 300]),
        ("step < 200", [k for k in ALL if k[1] < 200]),
        ("run_key == a", [k for k in ALL if k[0] == "a"]),
        ("run_key in a, c", [k for k in ALL if k[0] != "b"]),
        ("run_key not in a", [k for k in ALL if k[0] != "a"]),
        ("step in 100, 350", [k for k in ALL if k[1] in (100, 350)]),
        ("keep_last(step)", [("a", 400), ("b", 350), ("c", 400)]),
        ("keep_complete(step, steps)", [k for k in ALL if k[0] != "b"]),
        ("keep_complete(step, steps, 0.8)", ALL),
        ("drop_warmup(step, 200)", [k for k in ALL if k[1] >= 200]),
        # half of a's 400 steps are 200, half of b's 350 are 175
        ("drop_warmup(step, 0.5)", [k for k in ALL if k[1] >= 200]),
        ("drop_warmup(step, 0.27)", [k for k in ALL if k[1] >= 200 or k == ("b", 100)]),
        ("drop_diverged(loss, step)", [k for k in ALL if k[0] != "c"]),
        ("drop_diverged(loss, step, 2.5)", ALL),
        ("drop_largest(loss, 2)", [k for k in ALL if k not in (("c", 300), ("c", 400))]),
    ],
)  # fmt: skip
def test_a_rule_keeps_what_it_says(rule: str, left: list[tuple[str, int]]) -> None:
    if rule == "drop_warmup(step, 0.27)":  # 0.27 x 350 = 94.5 <= 100, 0.27 x 400 = 108 > 100
        assert ("a", 100) not in left
    assert kept(checkpoints(), rule) == left


def test_ties_with_the_last_of_the_largest_go_too() -> None:
    df = pd.DataFrame({"loss": [1.0, 5.0, 5.0, 6.0]})
    assert select(df, ["drop_largest(loss, 2)"]).rows["loss"].tolist() == [1.0]


def test_smoothing_is_a_trailing_mean_in_each_run() -> None:
    df = checkpoints()
    found = select(df, ["smooth(loss, 2, step)"]).rows.set_index(["run_key", "step"])["loss"]
    assert len(found) == len(df)
    assert found["a", 100] == 5.0
    assert found["a", 200] == 4.5
    assert found["c", 400] == 8.0
    assert found["b", 100] == 5.5  # nothing of another run


def test_outliers_are_measured_in_robust_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 60)
    noise = rng.normal(0, 0.01, 60)
    noise[[7, 50]] = 0.1, -0.3
    df = pd.DataFrame({"x": x, "loss": 5 * x**-0.1 * np.exp(noise)})
    chosen = select(df, ['drop_outliers("x", loss, 5)'])
    assert chosen.log[0].rows == (7, 50)
    spread = float(chosen.log[0].note.split()[3].rstrip(","))
    assert spread == pytest.approx(0.01, rel=0.3)
    assert len(select(df.assign(loss=5 * x**-0.1), ['drop_outliers("x", loss)']).rows) == 60


def test_rules_apply_in_order_each_to_what_is_left() -> None:
    df = checkpoints()
    chosen = select(df, ["run_key != c", "drop_largest(loss, 1)", "step >= 100"])
    assert [len(a.rows) for a in chosen.log] == [4, 1, 0]
    assert [a.before for a in chosen.log] == [12, 8, 7]
    assert chosen.log[0].ids == ("c",)
    assert chosen.log[1].ids == ("b",)
    gone = df.iloc[list(chosen.log[1].rows)]
    assert gone[["run_key", "step"]].to_numpy().tolist() == [["b", 100]]
    assert chosen.table()["left"].tolist() == [8, 7, 7]
    assert sorted(map(int, chosen.rows.index)) == [0, 1, 2, 3, 5, 6, 7]


def test_the_rules_of_a_study_of_final_losses() -> None:
    runs = pd.DataFrame(
        {
            "run_key": ["a", "b", "c", "d", "e", None],
            "status": ["done", "diverged", "done", "done", None, "done"],
            "loss": [1.0, None, 2.0, None, None, 3.0],
            "pool_digest": ["p", None, "q", "p", None, "p"],
        }
    )
    rules = ["keep_present(status)", "status != diverged", "keep_present(loss)",
             "keep_commonest(pool_digest)"]  # fmt: skip
    chosen = select(runs, rules)
    assert [a.ids for a in chosen.log] == [("e",), ("b",), ("d",), ("c",)]
    assert chosen.rows["loss"].tolist() == [1.0, 3.0]
    assert chosen.log[3].note == "pool_digest is p in 2 of 3 rows"
    report = json.loads(json.dumps(chosen.to_dict(), allow_nan=False))
    assert (report["table"], report["used"]) == (6, 2)
    assert select(runs, [r["declared"] for r in report["rules"]]).rows.equals(chosen.rows)


def test_rows_without_a_run_name_are_runs_of_their_own() -> None:
    df = checkpoints().assign(run_key=None)
    assert len(select(df, ["keep_last(step)"]).rows) == len(df)


def test_a_value_that_is_missing_is_unequal_and_neither_more_nor_less() -> None:
    df = pd.DataFrame({"loss": [1.0, np.nan, 3.0], "status": ["done", None, "diverged"]})
    assert select(df, ["status != diverged"]).rows.index.tolist() == [0, 1]
    assert select(df, ["status == done"]).rows.index.tolist() == [0]
    chosen = select(df, ["loss > 0"])
    assert chosen.rows.index.tolist() == [0, 2]
    assert chosen.log[0].note == "1 rows without a value"


def test_a_word_that_no_row_has_is_noted() -> None:
    df = pd.DataFrame({"status": ["done", "diverged"]})
    assert select(df, ["status != divergd"]).log[0].note == (
        "no row has 'divergd'; there are: done, diverged"
    )


# ---- how rules are written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "step >= 1000", "status != diverged", "service in books, garden", "flag == true",
        "x not in 1, 2.5", "keep_present(loss)", 'keep_present("Training FLOP")',
        "'N (b)' >= 3", "keep_complete(step, steps, share=0.9)", "drop_warmup(step, 0.01)",
        'drop_outliers("E + N + D", loss, limit=4)', "smooth(loss, 5, step)",
        "Model Size < 1e9", "name == 'a, b'",
    ],
)  # fmt: skip
def test_a_rule_is_read_back_from_its_string_and_from_json(text: str) -> None:
    rule = read_rule(text)
    assert read_rule(str(rule)) == rule
    assert read_rule(json.loads(json.dumps(rule.to_dict()))) == rule
    assert read_rule(rule) is rule


NAMES = st.text(
    st.characters(codec="ascii", categories=["L", "N", "P", "Zs"], exclude_characters="'\"\\"),
    min_size=1,
)


@given(
    column=NAMES.map(str.strip).filter(bool),
    operator=st.sampled_from([o for o in OPERATORS if not o.endswith("in")]),
    value=st.one_of(
        st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_any_comparison_is_read_back(column: str, operator: str, value: float) -> None:
    rule = Where(column, operator, value)
    assert read_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nonsense", r"rule 'nonsense' is neither a comparison .* nor keep_present\(column\)"),
        ("last(step)", r"no rule is called 'last'; there are keep_present\(column\), "),
        ("drop_largest(loss)", "drop_largest takes column, count"),
        ("drop_largest(loss, 2.5)", "drop_largest: count must be a int, not 2.5"),
        ("drop_largest(loss, 12)", "12 rows have a value, 12 of them go"),
        ("keep_last(step, step=step)", "keep_last takes step"),
        ("step >= many", "step >= many: >= needs a number, not 'many'"),
        ("step == many", "column step holds numbers, not words"),
        ("run_key > 3", "column run_key holds words, not numbers"),
        ("step in 1, x", "mixes numbers and words"),
        ("stp >= 3", "no column 'stp'; the table has run_key, step, steps, loss"),
        ("drop_warmup(run_key, 3)", "column run_key does not hold numbers"),
        ("smooth(loss, 1, step)", "window must be at least 2 rows"),
        ({"kind": "where", "column": "step", "operator": "~", "value": 1}, "'~' is none of =="),
        ({"column": "step"}, "no rule is called 'None'"),
    ],
)
def test_a_rule_that_cannot_be_used_says_why(rule: str, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        select(checkpoints(), [rule])


def test_rules_by_run_need_to_know_the_run() -> None:
    df = checkpoints().drop(columns="run_key")
    by_run = ["keep_last(step)", "drop_warmup(step, 0.1)", "smooth(loss, 2, step)",
              "drop_diverged(loss, step)"]  # fmt: skip
    for rule in by_run:
        with pytest.raises(RuleError, match="works run by run: name the column of the run"):
            select(df, [rule])
    with pytest.raises(RuleError, match="no column 'name' to name the run"):
        select(df, [], cluster="name")
    assert len(select(df, ["drop_warmup(step, 200)"]).rows) == 9


def test_every_rule_is_documented_in_the_language() -> None:
    import scaling.analysis.fitting.rule_text as language

    for kind in set(KINDS) - {"where"}:
        assert f"{kind}(" in str(language.__doc__)


# ---- with and without ---------------------------------------------------------------------------


def test_a_comparison_says_what_each_rule_does_to_the_fit() -> None:
    x = np.geomspace(1, 1e4, 30)
    noise = np.random.default_rng(1).normal(0, 0.003, 30)
    df = pd.DataFrame({"x": x, "loss": 5 * x**-0.1 * np.exp(noise), "status": "done"})
    df.loc[29, ["loss", "status"]] = 40.0, "diverged"
    found = compare_selections(
        df, "x", ["status == done", "x > 1.5"], y="loss", n_boot=50, objective=Objective(loss="mse")
    )
    table = found.table()
    assert list(table.index) == [
        "all rules",
        "no rules",
        "without status == done",
        "without x > 1.5",
    ]
    assert table["rows"].tolist() == [27, 30, 28, 29]
    assert table["largest_change"]["all rules"] == 0
    assert table["largest_change"]["without status == done"] > 3
    assert table["largest_change"]["without x > 1.5"] < 1
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["selections"]["no rules"]["of"] == "exponent"


def test_a_selection_that_leaves_too_little_is_reported_not_raised() -> None:
    df = pd.DataFrame({"x": [1.0, 2, 4, 8], "loss": [4.0, 3, 2.5, 2]})
    found = compare_selections(df, "x", ["x > 4"], y="loss", n_boot=0)
    assert found.fits["all rules"] is None
    assert "points" in found.failed["all rules"]
    assert found.fits["no rules"] is not None


@pytest.mark.data
def test_five_of_245_rows_decide_the_data_exponent_of_chinchilla(clue_test_data: Path) -> None:
    df = pd.read_csv(clue_test_data / "published_fits/epoch_chinchilla/svg_extracted_data.csv")
    df["N"], df["D"] = df["Model Size"], df["Training FLOP"] / 6 / df["Model Size"]
    found = compare_selections(df, "E + N + D", ["drop_largest(loss, 5)"], y="loss", n_boot=0)
    with_rule, without = found.fits["all rules"], found.fits["no rules"]
    assert with_rule is not None
    assert without is not None
    assert (with_rule.n, without.n) == (240, 245)
    # data/published_fits/epoch_chinchilla/reference_optima.json
    for fit, n, d, b in (
        (with_rule, 0.347310, 0.367172, 2143.4),
        (without, 0.34931, 0.45305, 12845.6),
    ):
        assert fit.params["exponent.N"] == pytest.approx(n, abs=2e-5)
        assert fit.params["exponent.D"] == pytest.approx(d, abs=2e-5)
        assert fit.params["coefficient.D"] == pytest.approx(b, rel=1e-3)
