"""The language of forms, what constraints hold, and how both fail."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from planted_laws import LAWS, table

from scaling.analysis import Form, FormError, Objective, fit_law
from scaling.analysis.fitting.forms import PARTS, Factor, Term
from scaling.analysis.fitting.parameters import Constraints
from scaling.analysis.fitting.surface import Surface

# ---- the language -------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(["n_total", "E", "exp", "broken", "outer", "x.y", "_", "PF-days", "2 pi", "ü"]),
    st.text(st.characters(exclude_characters="`", exclude_categories=["Cs", "Cc"]), min_size=1)
    .filter(lambda s: s.strip() == s and s != ""),
)  # fmt: skip


@st.composite
def factors(draw: st.DrawFn) -> Factor:
    kind = draw(st.sampled_from([k for k in PARTS if k != "line"]))
    n = len(PARTS[kind].columns)
    columns = draw(st.lists(names, min_size=n, max_size=n, unique=True))
    return Factor(kind, tuple(columns), draw(st.integers(1, 5)) if kind == "broken" else 1)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    floor, outer = draw(st.booleans()), draw(st.booleans())
    terms: list[Term] = []
    for _ in range(draw(st.integers(1, 4))):
        signed = floor and not outer
        if signed and draw(st.integers(0, 4)) == 0:
            terms.append(Term((Factor("line", (draw(names),)),)))
        else:
            some = draw(st.lists(factors(), min_size=1, max_size=3, unique_by=lambda f: f.columns))
            terms.append(Term(tuple(some), draw(st.sampled_from([1, -1])) if signed else 1))
    with contextlib.suppress(FormError):  # two terms of the same columns, by chance
        return Form(tuple(terms), floor, outer)
    reject()


@settings(max_examples=100, deadline=None)
@given(forms())
def test_a_form_reads_what_it_writes(form: Form) -> None:
    assert Form.parse(str(form)) == form


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("E+a+b", "E + a + b"),
        ("  E  - exp( loss ) ", "E - exp(loss)"),
        ("a*b", "a * b"),
        ("E + a * b - c", "E + a * b - c"),
        ("(a+b)**gamma", "(a + b)^outer"),
        ("E + (a * c + b)^g", "E + (a * c + b)^outer"),
        ("broken(x, 1)", "broken(x)"),
        ("E + broken( x,3)", "E + broken(x, 3)"),
        ("`n_total`", "n_total"),
        ("E + `E`", "E + `E`"),
        ("E + `PF-days` * exp(`my loss`)", "E + `PF-days` * exp(`my loss`)"),
        ("exp", "exp"),
        ("E + line(pf_days)", "E + line(pf_days)"),
        ("repeated(u, r)+rising(r)", "repeated(u, r) + rising(r)"),
    ],
)  # fmt: skip
def test_what_is_read_is_written_one_way(text: str, written: str) -> None:
    assert str(Form.parse(text)) == written


@pytest.mark.parametrize(
    ("text", "at", "why"),
    [
        ("", 1, "it ends where a column is expected"),
        ("E", 1, "a law needs a term besides E"),
        ("E +", 4, "it ends where a column is expected"),
        ("E a", 3, "'a' stands where + or - is expected"),
        ("a + + b", 5, "'+' stands where a column is expected"),
        ("2 * a", 1, "'2' stands where a column is expected; a coefficient is not written"),
        ("a + 0.5", 5, "'0.5' stands where a column is expected"),
        ("a ? b", 3, "'?' has no meaning"),
        ("a + `b", 5, "'`' has no meaning"),
        ("a b", 3, "'b' is too much"),
        ("a^2", 2, "'^' is too much"),
        ("a + E", 5, "the floor E is written first"),
        ("E + E", 5, "the floor E is written first"),
        ("tanh(x)", 1, "there is no tanh(...)"),
        ("power(x)", 1, "there is no power(...)"),
        ("a + exp(x, y)", 5, "it is exp(x), not exp of 2 columns"),
        ("repeated(u)", 1, "it is repeated(u, r), not repeated of 1 columns"),
        ("exp(2)", 5, "'2' stands where a column is expected"),
        ("exp(x", 6, "it ends where , or ) is expected"),
        ("exp(x, 2)", 8, "'2' stands where a column is expected"),
        ("broken(x, 0)", 1, "with 1 to 5 breaks, not broken of 1 columns and 0 breaks"),
        ("broken(x, 6)", 1, "with 1 to 5 breaks, not broken of 1 columns and 6 breaks"),
        ("broken(x, 1.5)", 1, "with 1 to 5 breaks"),
        ("(a + b)", 8, "it ends where ^ is expected"),
        ("(a + b)^0.5", 9, "fix it to a number with fixed={'outer': ...}"),
        ("(a + b", 7, "it ends where ) is expected"),
        ("E - (a + b)^g", 5, "a sum to an outer power is added to E"),
        ("(a + b)^g + c", 11, "'+' is too much"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(text: str, at: int, why: str) -> None:
    with pytest.raises(FormError) as error:
        Form.parse(text)
    message = str(error.value)
    assert message.startswith(f"form {text!r}, character {at}: ")
    assert why in message
    for part in PARTS.values():  # the valid words
        assert part.words in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a + a", "two terms have the same columns"),
        ("a + exp(a)", "two terms have the same columns"),
        ("a * a", "two factors of a * a have the same parameters"),
        ("a - b", "needs the floor E"),
        ("line(a)", "needs the floor E"),
        ("E + line(a) * b", "line(x) is a term of its own"),
        ("E + b * line(a)", "line(x) is a term of its own"),
        ("E + (a - b)^g", "has only positive terms"),
        ("(a + line(b))^g", "has only positive terms"),
    ],
)
def test_laws_that_cannot_be_are_refused(text: str, why: str) -> None:
    with pytest.raises(FormError) as error:
        Form.parse(text)
    assert why in str(error.value)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("column", ["", "a`b"])
def test_a_column_that_no_form_can_hold_is_refused(column: str) -> None:
    with pytest.raises(FormError, match="cannot be the name of a column"):
        Form((Term((Factor("power", (column,)),)),))


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("a", ["coefficient", "scale", "exponent"]),
        ("E + a", ["irreducible", "coefficient", "scale", "exponent"]),
        ("E + a + b", ["irreducible", "coefficient.a", "coefficient.b", "scale.a", "scale.b",
                       "exponent.a", "exponent.b"]),
        ("a * b", ["coefficient.a*b", "exponent.a", "exponent.b"]),
        ("a * b + b", ["coefficient.a*b", "coefficient.b", "scale.b", "exponent.a",
                       "exponent.a*b.b", "exponent.b.b"]),
        ("(a + b)^g", ["outer", "coefficient.a", "coefficient.b", "exponent.a", "exponent.b"]),
        ("exp(loss)", ["coefficient", "rate"]),
        ("sigmoid(loss)", ["coefficient", "rate", "midpoint"]),
        ("shifted(loss)", ["coefficient", "exponent", "shift"]),
        ("broken(a)", ["coefficient", "exponent", "change", "break", "sharpness"]),
        ("broken(a, 2)", ["coefficient", "exponent", "change.1", "break.1", "sharpness.1",
                          "change.2", "break.2", "sharpness.2"]),
        ("saturating(a)", ["coefficient", "exponent", "midpoint", "sharpness"]),
        ("b + repeated(d, r)", ["coefficient.b", "coefficient.d", "scale.b", "scale.d",
                                "exponent.b", "exponent.d", "r_star.d"]),
        ("E + line(a)", ["irreducible", "slope"]),
        ("E + b + line(a)", ["irreducible", "coefficient.b", "scale.b", "exponent.b", "slope.a"]),
    ],
)  # fmt: skip
def test_public_names(form: str, names: list[str]) -> None:
    assert surface(form).public_names == names


def surface(form: str, constraints: Constraints | None = None, **options) -> Surface:
    df = table()
    parsed = Form.parse(form)
    columns = {c: df[c].to_numpy() for c in parsed.columns}
    y = 1.0 + (df["a"].to_numpy() / 1e7) ** -0.3
    return Surface.of(parsed, columns, y, constraints=constraints or Constraints({}, {}), **options)


def test_a_scale_or_a_coefficient_is_enough() -> None:
    bound = surface("E + a")
    by_scale = bound.theta({"irreducible": 1.0, "scale": 1e7, "exponent": 0.3})
    by_coefficient = bound.theta({"irreducible": 1.0, "coefficient": 1e7**0.3, "exponent": 0.3})
    np.testing.assert_allclose(by_scale, by_coefficient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"irreducible": 1.0, "scale": 1e7}, "parameter exponent is missing"),
        ({"irreducible": 1.0, "exponent": 0.3}, "parameter coefficient is missing"),
        ({"scale": 1e7, "exponent": 0.3}, "parameter irreducible is missing"),
        ({"irreducible": 1.0, "coefficient": -1.0, "exponent": 0.3}, "coefficient cannot be"),
    ],
)
def test_parameters_that_are_no_law_are_refused(params: dict[str, float], why: str) -> None:
    with pytest.raises(FormError, match=why):
        surface("E + a").theta(params)


# ---- constraints --------------------------------------------------------------------------------


def noisy(law_form: str, seed: int = 0):
    law = next(law for law in LAWS if law.form == law_form)
    df = table()
    df["y"] = law.y(df) * np.exp(np.random.default_rng(seed).normal(0, 0.01, len(df)))
    return law, df


SQUARES = Objective("mse")


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        ("E + a + b", "irreducible", 1.3),
        ("E + a + b", "exponent.a", 0.35),
        ("E + a + b", "coefficient.a", 200.0),
        ("E + a + b", "scale.a", 2e7),
        ("E + a", "scale", 2e7),
        ("E + a * b + c", "coefficient.a*b", 300.0),
        ("E + a * b + c", "scale.c", 2.0),
        ("(a + b)^outer", "outer", 0.2),
        ("(a + b)^outer", "coefficient.a", 1e6),
        ("E - exp(loss)", "coefficient", 3.0),
        ("E + exp(loss)", "rate", 1.0),
        ("sigmoid(loss)", "coefficient", 0.8),
        ("sigmoid(loss)", "midpoint", 3.4),
        ("E + shifted(loss)", "coefficient", 1.5),
        ("E + shifted(loss)", "shift", -1.2),
        ("broken(a)", "coefficient", 8.0),
        ("broken(a)", "break", 3e7),
        ("broken(a, 2)", "sharpness.2", 0.1),
        ("E + saturating(a)", "coefficient", 4.0),
        ("E + saturating(a)", "sharpness", 1.2),
        ("repeated(d, r)", "r_star", 10.0),
        ("repeated(d, r)", "scale", 2e6),
        ("E + a + rising(r)", "coefficient.r", 0.03),
        ("E + line(a)", "irreducible", 8.0),
        ("E + line(a)", "slope", -0.2),
        ("E + b + line(a)", "irreducible", 8.0),
    ],
)  # fmt: skip
def test_a_fixed_parameter_is_what_it_was_fixed_to(form: str, name: str, value: float) -> None:
    """And the rest is the best that the law can do with it: no neighbour of the optimum is lower
    along any free direction, and the fit is worse than the free one."""
    _, df = noisy(form)
    held = fit_law(df, form, y="y", objective=SQUARES, fixed={name: value}, n_boot=0)
    free = fit_law(df, form, y="y", objective=SQUARES, n_boot=0)
    assert held.params[name] == pytest.approx(value, rel=1e-9)
    assert name not in held.surface.names
    assert held.certificate.gradient < 1e-7
    assert free.certificate.objective <= held.certificate.objective * (1 + 1e-9)
    public = held.params.drop([n for n in held.params.index if n.startswith("scale")])
    np.testing.assert_allclose(
        held.surface.theta({str(k): float(v) for k, v in public.items()}), held.theta, rtol=1e-8,
        atol=1e-9,
    )  # fmt: skip
    # held at the value that the free fit has, nothing changes
    again = fit_law(
        df, form, y="y", objective=SQUARES, fixed={name: float(free.params[name])}, n_boot=0
    )
    assert again.certificate.objective == pytest.approx(free.certificate.objective, rel=1e-7)


def test_a_fixed_law_is_a_regression() -> None:
    """With both exponents fixed, raw least squares are linear in E, A and B."""
    law, df = noisy("E + a + b")
    fit = fit_law(
        df, law.form, y="y", objective=Objective("mse", scale="raw"), n_boot=0,
        fixed={"exponent.a": 0.3, "exponent.b": 0.6},
    )  # fmt: skip
    design = np.column_stack([np.ones(len(df)), df["a"] ** -0.3, df["b"] ** -0.6])
    exact = np.linalg.lstsq(design, df["y"])[0]
    got = fit.params[["irreducible", "coefficient.a", "coefficient.b"]]
    np.testing.assert_allclose(got, exact, rtol=1e-7)
    assert str(fit.status) == "CONVERGED"


def test_a_coefficient_of_zero_takes_its_term_away() -> None:
    _, df = noisy("E + a + b")
    without = fit_law(df, "E + a", y="y", objective=SQUARES, n_boot=0)
    zero = fit_law(
        df, "E + a + b", y="y", objective=SQUARES, n_boot=0,
        fixed={"coefficient.b": 0.0, "exponent.b": 0.5},
    )  # fmt: skip
    assert zero.params["exponent.a"] == pytest.approx(without.params["exponent"], rel=1e-6)
    assert zero.params["coefficient.b"] == 0


def test_bounds_hold_and_are_said() -> None:
    _, df = noisy("E + a + b")
    fit = fit_law(
        df, "E + a + b", y="y", objective=SQUARES, n_boot=0,
        bounds={"exponent.a": (0.4, 0.5), "coefficient.b": (1.0, 5.0), "irreducible": (1.0, 3.0)},
    )  # fmt: skip
    assert fit.params["exponent.a"] == pytest.approx(0.4, rel=1e-9)
    assert fit.params["coefficient.b"] == pytest.approx(5.0, rel=1e-9)
    assert 1.0 < fit.params["irreducible"] < 3.0
    assert str(fit.status) == "BOUND_HIT"
    assert "exponent.a" in fit.message
    assert "coefficient.b" in fit.message


def test_bounds_that_do_not_bind_change_nothing() -> None:
    _, df = noisy("E + a + b")
    free = fit_law(df, "E + a + b", y="y", objective=SQUARES, n_boot=0)
    bounded = fit_law(
        df, "E + a + b", y="y", objective=SQUARES, n_boot=0,
        bounds={"coefficient.a": (1.0, 1e6), "exponent.b": (0.0, 1.0)},
    )  # fmt: skip
    np.testing.assert_allclose(bounded.params, free.params, rtol=1e-6)


@pytest.mark.parametrize(
    ("ends", "expected"), [((0.4, None), 0.4), ((None, 0.25), 0.25), ((None, 0.9), None)]
)
def test_a_bound_may_be_of_one_side(
    ends: tuple[float | None, float | None], expected: float | None
) -> None:
    _, df = noisy("E + a + b")
    free = fit_law(df, "E + a + b", y="y", objective=SQUARES, n_boot=0)
    fit = fit_law(df, "E + a + b", y="y", objective=SQUARES, n_boot=0, bounds={"exponent.a": ends})
    expected = expected or free.params["exponent.a"]
    assert fit.params["exponent.a"] == pytest.approx(expected, rel=1e-6)
    assert fit.to_dict()["bounded"] == {"exponent.a": list(ends)}


@pytest.mark.parametrize(
    ("form", "group"),
    [
        ("E + a + b", ("exponent.a", "exponent.b")),
        ("E + a + b", ("coefficient.a", "coefficient.b")),
        ("E + a + b + c", ("exponent.a", "exponent.b", "exponent.c")),
        ("a * b", ("exponent.a", "exponent.b")),
        ("broken(a, 2)", ("sharpness.1", "sharpness.2")),
    ],
)
def test_tied_parameters_are_one(form: str, group: tuple[str, ...]) -> None:
    _, df = noisy(form)
    free = fit_law(df, form, y="y", objective=SQUARES, n_boot=0)
    tied = fit_law(df, form, y="y", objective=SQUARES, tied=[group], n_boot=0)
    assert tied.surface.n_free == free.surface.n_free - len(group) + 1
    np.testing.assert_allclose(tied.params[list(group)], tied.params[group[0]], rtol=1e-12)
    assert str(tied.status) == "CONVERGED", tied.message
    assert tied.certificate.objective >= free.certificate.objective * (1 - 1e-9)


def test_a_tied_product_is_a_power_of_the_product() -> None:
    _, df = noisy("a * b")
    df["ab"] = df["a"] * df["b"]
    tied = fit_law(df, "a * b", y="y", tied=[("exponent.a", "exponent.b")], n_boot=0)
    alone = fit_law(df, "ab", y="y", n_boot=0)
    assert tied.params["exponent.b"] == pytest.approx(alone.params["exponent"], rel=1e-7)
    assert tied.params["coefficient.a*b"] == pytest.approx(alone.params["coefficient"], rel=1e-6)


def test_bounds_of_a_tied_group_all_hold() -> None:
    pair = ("exponent.a", "exponent.b")
    bound = surface(
        "E + a + b", Constraints({}, {pair[0]: (0.1, 0.5), pair[1]: (0.2, 0.9)}, (pair,))
    )
    i = bound.names.index("exponent.a")
    assert (bound.lower[i], bound.upper[i]) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("form", "constraints", "why"),
    [
        ("E + a", Constraints({"exponent.a": 1.0}, {}), "has no parameter 'exponent.a'; it has "
         "irreducible, coefficient, exponent, scale"),
        ("E + a + b", Constraints({}, {"scale.a": (1, 2)}), "can be fixed, not bounded or tied"),
        ("E + a + b", Constraints({}, {}, (("scale.a", "scale.b"),)), "can be fixed, not bounded"),
        ("E + a", Constraints({}, {"exponent": (1, 1)}), "must rise, not 1 to 1"),
        ("E + a", Constraints({}, {"exponent": (float("nan"), 1)}), "must rise"),
        ("E + a", Constraints({"exponent": 1}, {"exponent": (0, 2)}), "is fixed and bounded"),
        ("E + a", Constraints({"scale": 1, "coefficient": 1}, {}), "say the same"),
        ("E + a", Constraints({"scale": -1}, {}), "scale must be positive, not -1"),
        ("E + a", Constraints({"coefficient": -1}, {}), "coefficient cannot be -1"),
        ("E + a", Constraints({"irreducible": float("nan")}, {}), "cannot be fixed to nan"),
        ("E + a", Constraints({"exponent": float("inf")}, {}), "cannot be fixed to inf"),
        ("broken(a)", Constraints({"break": 0.0}, {}), "cannot be"),
        ("shifted(loss)", Constraints({"shift": -4.0}, {}), "shift cannot be -4"),
        ("E + a + b", Constraints({}, {}, (("exponent.a", "coefficient.b"),)), "cannot be tied"),
        ("E + a + b", Constraints({}, {}, (("exponent.a",),)), "cannot be tied"),
        ("E + a + b", Constraints({}, {}, (("irreducible", "exponent.a"),)), "cannot be tied"),
        ("broken(a, 2)", Constraints({}, {}, (("break.1", "break.2"),)), "cannot be tied"),
        ("E + a + b", Constraints({"exponent.a": 1}, {}, (("exponent.a", "exponent.b"),)),
         "a tied parameter is fixed"),
        ("E + a + b + c",
         Constraints({}, {}, (("exponent.a", "exponent.b"), ("exponent.b", "exponent.c"))),
         "in two tied groups"),
        ("E + a + b", Constraints({}, {"exponent.a": (0.1, 0.2), "exponent.b": (0.3, 0.4)},
                                  (("exponent.a", "exponent.b"),)), "do not overlap"),
        ("E + a", Constraints({}, {"exponent": (90.0, None)}), "lie beyond the default"),
        ("E + a", Constraints({}, {"irreducible": (None, float("-inf"))}), "not -inf to -inf"),
    ],
)  # fmt: skip
def test_constraints_that_cannot_hold_are_refused(
    form: str, constraints: Constraints, why: str
) -> None:
    with pytest.raises(FormError) as error:
        surface(form, constraints)
    assert why in str(error.value)


def test_breaks_come_in_order_whatever_found_them() -> None:
    bound = surface("broken(a, 2)")
    law = next(law for law in LAWS if law.form == "broken(a, 2)")
    theta = bound.theta(law.params)
    swapped = {
        n.replace(".1", ".x").replace(".2", ".1").replace(".x", ".2"): v
        for n, v in law.params.items()
    }
    other = bound.theta(swapped)
    columns = {"a": table()["a"].to_numpy()}
    np.testing.assert_allclose(
        bound.values(other[None], columns), bound.values(theta[None], columns), rtol=1e-13
    )
    np.testing.assert_allclose(bound.ordered(np.stack([theta, other])), np.stack([theta, theta]))
    held = surface("broken(a, 2)", Constraints({}, {"break.1": (1e8, 1e9)}))
    np.testing.assert_array_equal(held.ordered(other[None])[0], other)
