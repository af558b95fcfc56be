"""How messages count, list and place things."""

import ast
from collections.abc import Iterable

from ampcheck.trace import FailedOperand, Site

_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)


def count(number: int, noun: str) -> str:
    """``1 parameter``, ``2 parameters``; the noun before ``of`` gets the plural: ``2 calls of it``."""
    head, _, rest = noun.partition(" of ")
    return f"{number} {head}{'' if number == 1 else 's'}" + (f" of {rest}" if rest else "")


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def attribute(name: str) -> str:
    """``self.weight`` of ``stem.conv.weight``."""
    return f"self.{name.rpartition('.')[2]}"


def cast_of(operand: FailedOperand, method: str) -> str:
    """```x.float()``` to paste, or words for an operand whose expression in the user's line is not known."""
    known = operand.device is not None and not operand.stored and not operand.library
    return f"`{_atom(operand.name)}{method}`" if known else f"`{method}` on {operand.name}"


def _atom(expression: str) -> str:
    """The expression, in parentheses if a method call on it needs them."""
    try:
        tight = isinstance(ast.parse(expression, mode="eval").body, _ATOMS)
    except SyntaxError:
        return expression
    return expression if tight else f"({expression})"


def be(number: int) -> str:
    return "is" if number == 1 else "are"


def share(part: int, whole: int, noun: str) -> str:
    """``1 of the 7 parameters is``, ``2 of the 7 parameters are``."""
    return f"{part} of the {count(whole, noun)} {be(part)}"


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and the number of the rest: ``a, b, c and 4 more``."""
    names = list(names)
    if len(names) > limit + 1:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def place(site: Site | None) -> str:
    """`` at train.py:12``, or nothing if the site is not known."""
    return f" at {site}" if site else ""


def places(sites: Iterable[Site | None]) -> tuple[Site, ...]:
    """The known sites, each once, in order."""
    return tuple(dict.fromkeys(site for site in sites if site))
