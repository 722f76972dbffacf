"""Values in rules of selection: how they are read, written and told apart."""

from keyword import iskeyword
from typing import TypeGuard

import numpy as np

Value = bool | int | float | str


def unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def read_value(text: str) -> Value:
    """A number, ``true``, ``false``, or a word; quotes make anything a word."""
    text = text.strip()
    if (word := unquoted(text)) != text:
        return word
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def kind_of(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "true or false"
    return "numbers" if isinstance(value, int | float | np.number) else "words"


def is_number(value: object) -> TypeGuard[int | float]:
    return kind_of(value) == "numbers"


def write_value(value: object, bare: bool = False) -> str:
    """As ``read_rule`` reads it back; ``bare``: as the value of a comparison."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if bare:
        plain = (
            read_value(value) == value
            and not set(value) & set(",()<>=!\"'")
            and " in " not in value
        )
        return value if plain and value == value.strip() else repr(value)
    return value if value.isidentifier() and not iskeyword(value) else repr(value)
