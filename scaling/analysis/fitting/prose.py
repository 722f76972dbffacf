"""Laws in words."""

from collections.abc import Mapping

from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.parameters import (
    FLOOR,
    OUTER,
    factors_of,
    is_coefficient,
    scale_names,
    slots,
)


def equation(form: Form, y: str, params: Mapping[str, float]) -> str:
    """The law with its numbers, to six significant digits."""
    every, scales = slots(form), scale_names(form)
    said = {key: f"{params[key]:.6g}" for key in params}
    terms = []
    for t, term in enumerate(form.terms):
        product = []
        if t in scales and term.factors[0].kind == "power":
            exponent = next(s.name for s in every if s.term == t and s.factor == 0)
            text = f"({term.factors[0].columns[0]} / {said[scales[t]]})^-{said[exponent]}"
            terms.append((term.sign, text))
            continue
        if not term.is_line:
            product.append(said[next(s.name for s in every if s.term == t and is_coefficient(s))])
        for at, f, factor in factors_of(form):
            if at != t:
                continue
            own = [said[s.name] for s in every if (s.term, s.factor) == (t, f)]
            first, *rest = factor.part.parameters
            values = dict(zip((p.stem for p in (first, *rest)), own, strict=False))
            names = dict(zip("xr", factor.columns, strict=False))
            text = factor.part.formula.format(**names, **values)
            for b in range(1, factor.breaks):
                values = dict(zip((p.stem for p in rest), own[1 + 3 * b : 4 + 3 * b], strict=True))
                text += " " + factor.part.formula.partition(" ")[2].format(**names, **values)
            product.append(text)
        terms.append((term.sign, " ".join(product)))
    text = terms[0][1] + "".join(f" {'+' if s > 0 else '-'} {words}" for s, words in terms[1:])
    if form.outer:
        text = f"({text})^{said[OUTER]}"
    if form.floor:
        text = f"{said[FLOOR]} {'+' if terms[0][0] > 0 else '-'} {text}"
    return f"{y} = {text}".replace("--", "")  # minus a negative number
