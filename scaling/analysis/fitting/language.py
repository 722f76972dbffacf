"""The language that forms are written in: ``Form.parse`` reads it."""

import re

from scaling.analysis.fitting.forms import PARTS, Factor, Form, FormError, Term

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w.]*)|`([^`]+)`|(\d+)|(\*\*|[-+*^(),]))")


class Parser:
    """Recursive descent over the tokens of a form."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, at = text, list[tuple[str, str]](), 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            if not found:
                raise FormError(f"{text!r}: {text[at:].strip()[:1]!r} has no meaning; {_help()}")
            name, quoted, number, mark = found.groups()
            kind = "name" if name or quoted else "number" if number else "mark"
            self.tokens.append((kind, name or quoted or number or mark.replace("**", "^")))
            at = found.end()

    def form(self) -> Form:
        floor, sign = False, 1
        if self._peek() == ("name", "E"):
            self._take()
            if not self.tokens:
                self._fail("a law needs a term besides E")
            floor, sign = True, -1 if self._mark("+", "-") == "-" else 1
        if self._peek() == ("mark", "("):
            self._take()
            terms = self._sum(1)
            self._mark(")")
            self._mark("^")
            if self._take()[0] != "name":
                self._fail("the outer power is a name, such as (a + b)^outer; fix it to a number "
                           "with fixed={'outer': ...}")  # fmt: skip
            if sign < 0:
                self._fail("a sum to an outer power is added to E")
            form = Form(terms, floor, outer=True)
        else:
            form = Form(self._sum(sign), floor)
        if self.tokens:
            self._fail(f"{self.tokens[0][1]!r} is too much")
        return form

    def _sum(self, sign: int) -> tuple[Term, ...]:
        terms = []
        while True:
            factors = [self._factor()]
            while self._peek() == ("mark", "*"):
                self._take()
                factors.append(self._factor())
            terms.append(Term(tuple(factors), 1 if sign > 0 else -1))
            if self._peek() not in (("mark", "+"), ("mark", "-")):
                return tuple(terms)
            sign = 1 if self._take()[1] == "+" else -1

    def _factor(self) -> Factor:
        kind, name = self._take()
        if kind != "name":
            self._fail(f"{name!r} stands where a column is expected; a coefficient is not written")
        if self._peek() != ("mark", "("):
            return Factor("power", (name,))
        if name not in PARTS or name == "power":
            self._fail(f"there is no {name}(...)")
        self._take()
        columns, breaks = [self._column()], 1
        while self._mark(",", ")") == ",":
            if name == "broken" and self._peek()[0] == "number":
                breaks = int(self._take()[1])
            else:
                columns.append(self._column())
        if len(columns) != len(PARTS[name].columns) or not 1 <= breaks <= 5:
            self._fail(f"it is {PARTS[name].words}, not {name} of {len(columns)} columns"
                       + (f" and {breaks} breaks" if name == "broken" else ""))  # fmt: skip
        return Factor(name, tuple(columns), breaks)

    def _column(self) -> str:
        kind, name = self._take()
        if kind != "name":
            self._fail(f"{name!r} stands where a column is expected")
        return name

    def _mark(self, *marks: str) -> str:
        kind, mark = self._take()
        if kind != "mark" or mark not in marks:
            self._fail(f"{mark!r} stands where {' or '.join(marks)} is expected")
        return mark

    def _peek(self) -> tuple[str, str]:
        return self.tokens[0] if self.tokens else ("end", "")

    def _take(self) -> tuple[str, str]:
        if not self.tokens:
            self._fail("it ends too early")
        return self.tokens.pop(0)

    def _fail(self, why: str) -> None:
        raise FormError(f"form {self.text!r}: {why}; {_help()}")


def _help() -> str:
    parts = ", ".join(part.words for part in PARTS.values())
    return f"a form is a sum of terms, E first if there is a floor, of {parts}"
