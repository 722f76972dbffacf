"""The language that forms are written in: ``Form.parse`` reads it."""

import re
from typing import NamedTuple, NoReturn

from scaling.analysis.fitting.forms import PARTS, Factor, Form, FormError, Term

_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][\w.]*)|`(?P<column>[^`]+)`|(?P<number>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<mark>\*\*|[-+*^(),]))"
)
MOST_BREAKS = 5


class Token(NamedTuple):
    """A word of a form: a name, a column in backticks, a number, a mark, or the end."""

    kind: str
    text: str
    at: int


class Parser:
    """Recursive descent over the tokens of a form."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, at = text, list[Token](), 0
        end = len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if not found:
                at += len(text[at:]) - len(text[at:].lstrip())
                self._fail(Token("mark", text[at], at), f"{text[at]!r} has no meaning")
            kind = found.lastgroup
            assert kind is not None  # every alternative has a name
            word = found[kind].replace("**", "^") if kind == "mark" else found[kind]
            self.tokens.append(Token(kind, word, found.start(kind)))
            at = found.end()
        self.end = Token("end", "", end)

    def form(self) -> Form:
        floor, sign = False, 1
        if self._peek()[:2] == ("name", "E"):
            here = self._take()
            if not self.tokens:
                self._fail(here, "a law needs a term besides E")
            floor, sign = True, -1 if self._mark("+", "-") == "-" else 1
        here = self._peek()
        try:
            if here.text == "(":
                if sign < 0:
                    self._fail(here, "a sum to an outer power is added to E")
                form = Form(self._outer(), floor, outer=True)
            else:
                form = Form(self._sum(sign), floor)
        except FormError as error:
            if str(error).startswith("form "):
                raise
            raise FormError(f"form {self.text!r}: {error}; {_help()}") from error
        if self.tokens:
            self._fail(self.tokens[0], f"{self.tokens[0].text!r} is too much")
        return form

    def _outer(self) -> tuple[Term, ...]:
        self._mark("(")
        terms = self._sum(1)
        self._mark(")")
        self._mark("^")
        power = self._peek()
        if power.kind != "name":
            self._fail(power, "the outer power is a name, such as (a + b)^outer; fix it to a "
                       "number with fixed={'outer': ...}")  # fmt: skip
        self._take()
        return terms

    def _sum(self, sign: int) -> tuple[Term, ...]:
        terms = []
        while True:
            factors = [self._factor()]
            while self._peek().text == "*":
                self._take()
                factors.append(self._factor())
            terms.append(Term(tuple(factors), 1 if sign > 0 else -1))
            if self._peek().text not in ("+", "-"):
                return tuple(terms)
            sign = 1 if self._take().text == "+" else -1

    def _factor(self) -> Factor:
        here = self._peek()
        name = self._column("; a coefficient is not written")
        if here[:2] == ("name", "E"):
            self._fail(here, "the floor E is written first; a column of that name is `E`")
        if here.kind == "column" or self._peek().text != "(":
            return Factor("power", (name,))
        if name not in PARTS or name == "power":
            self._fail(here, f"there is no {name}(...)")
        self._take()
        columns, breaks, whole = [self._column()], 1, True
        while self._mark(",", ")") == ",":
            if name == "broken" and self._peek().kind == "number":
                number = self._take().text
                whole = whole and number.isdecimal()
                breaks = int(number) if whole else 0
            else:
                columns.append(self._column())
        if len(columns) != len(PARTS[name].columns) or not 1 <= breaks <= MOST_BREAKS:
            self._fail(here, f"it is {PARTS[name].words}"
                       + (f" with 1 to {MOST_BREAKS} breaks" if name == "broken" else "")
                       + f", not {name} of {len(columns)} columns"
                       + (f" and {breaks} breaks" if whole and breaks != 1 else ""))  # fmt: skip
        return Factor(name, tuple(columns), breaks)

    def _column(self, hint: str = "") -> str:
        here = self._peek()
        if here.kind not in ("name", "column"):
            self._unexpected(here, f"a column is expected{hint}")
        return self._take().text

    def _mark(self, *marks: str) -> str:
        here = self._peek()
        if here.kind != "mark" or here.text not in marks:
            self._unexpected(here, f"{' or '.join(marks)} is expected")
        return self._take().text

    def _peek(self) -> Token:
        return self.tokens[0] if self.tokens else self.end

    def _take(self) -> Token:
        return self.tokens.pop(0)

    def _unexpected(self, here: Token, need: str) -> NoReturn:
        found = "it ends" if here.kind == "end" else f"{here.text!r} stands"
        self._fail(here, f"{found} where {need}")

    def _fail(self, here: Token, why: str) -> NoReturn:
        raise FormError(f"form {self.text!r}, character {here.at + 1}: {why}; {_help()}")


def _help() -> str:
    parts = ", ".join(part.words for part in PARTS.values())
    return f"a form is a sum of terms, E first if there is a floor, of {parts}"
