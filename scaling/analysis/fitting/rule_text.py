"""How rules of selection are written.

A rule is written as a string, or as a mapping (JSON, TOML) of its ``kind`` and its fields:

    step >= 1000                        rows where it is so are kept; == != < <= > >= in, not in
    service in books, garden
    keep_present(loss)                  drops rows without a value
    keep_complete(step, steps)          drops runs that ended before share x steps
    keep_last(step)                     keeps the last row of every run
    keep_commonest(pool_digest)         drops rows with another value than most
    drop_warmup(step, 0.01)             drops rows below a share of the run's last step, or a number
    drop_diverged(loss, step, 1.5)      drops runs that end above ratio x their lowest value
    drop_largest(loss, 5)               drops the rows with the largest values
    drop_outliers("E + N + D", loss, 5) drops rows far from a preliminary fit
    smooth(loss, 5, step)               trailing mean over rows of a run; drops none

Column names that are no plain words are quoted: ``keep_present("Training FLOP")``.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from scaling.analysis.fitting.rule_values import read_value, unquoted
from scaling.analysis.fitting.rules import (
    OPERATORS,
    DropDiverged,
    DropLargest,
    DropOutliers,
    DropWarmup,
    KeepCommonest,
    KeepComplete,
    KeepLast,
    KeepPresent,
    Rule,
    RuleError,
    Smooth,
    Where,
)

KINDS: dict[str, type[Rule]] = {
    rule.kind: rule
    for rule in (
        Where, KeepPresent, KeepComplete, KeepLast, KeepCommonest, DropWarmup, DropDiverged,
        DropLargest, DropOutliers, Smooth,
    )
}  # fmt: skip
"""All rules by name."""

_COLUMN = r"""^(?P<column>"[^"]+"|'[^']+'|[^(<>=!"']+?)"""
_ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]+?)\s*(?:,|$)""")
_COMPARISON = re.compile(_COLUMN + r"\s*(?P<operator>==|!=|<=|>=|<|>)\s*(?P<value>.+)$")
_MEMBERSHIP = re.compile(_COLUMN + r"\s+(?P<operator>not in|in)\s+(?P<value>.+)$")


def read_rule(rule: str | Mapping[str, Any] | Rule) -> Rule:
    """A rule from its string or mapping; a ``Rule`` is given back.

    Raises:
        RuleError: it is none; the message names it and the valid rules or fields.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping):
        fields = dict(rule)
        return _build(str(fields.pop("kind", None)), (), fields, str(dict(rule)))
    text = str(rule).strip()
    if found := _MEMBERSHIP.match(text):
        values = [read_value(v) for v in _ITEM.findall(found["value"].strip("[]"))]
        return Where(unquoted(found["column"]), found["operator"], tuple(values))
    if found := _COMPARISON.match(text):
        return Where(unquoted(found["column"]), found["operator"], read_value(found["value"]))
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        named = {str(k.arg): _argument(k.value) for k in call.keywords}
        positional = tuple(_argument(a) for a in call.args)
    except (SyntaxError, ValueError):
        raise RuleError(
            f"rule {rule!r} is neither a comparison (COLUMN {' '.join(OPERATORS)} VALUE) nor "
            f"{_signatures()}"
        ) from None
    return _build(call.func.id, positional, named, text)


def _build(kind: str, positional: tuple[Any, ...], named: Mapping[str, Any], text: str) -> Rule:
    if kind not in KINDS:
        raise RuleError(f"rule {text!r}: no rule is called {kind!r}; there are {_signatures()}")
    made = KINDS[kind]
    names = [f.name for f in dataclasses.fields(made)]
    needed = [f.name for f in dataclasses.fields(made) if f.default is dataclasses.MISSING]
    given: dict[str, Any] = dict(zip(names, positional, strict=False))
    missing = [n for n in needed if n not in given and n not in named]
    twice = set(given) & set(named)
    if len(positional) > len(names) or missing or twice or not set(named) <= set(names):
        raise RuleError(f"rule {text!r}: {kind} takes {', '.join(names)}")
    given |= {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}
    return made(**given)


def _signatures() -> str:
    made = (k for k in KINDS.values() if k is not Where)
    return ", ".join(f"{k.kind}({', '.join(f.name for f in dataclasses.fields(k))})" for k in made)


def _argument(node: ast.expr) -> Any:
    """A bare word is a name; anything else is a literal."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
