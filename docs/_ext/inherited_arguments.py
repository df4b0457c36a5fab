"""Lists *all* arguments of a class: what its own docstring leaves out comes from its bases' docstrings.

``NPGExt`` and its relatives document their own arguments and pass the rest on. On the site, each class shows the whole list,
in the order of its signature, with the default that holds for this class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sb3_trpo_ext import TRPOExt
from sb3_trpo_ext.algorithms.base import OnPolicyExt

PARAM = re.compile(r"^:param (?P<name>\w+): ?")
FIELD = re.compile(r"^:\w+( [^:`]*)?:( |$)")
LITERAL = re.compile(r"(``.*?``)")


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", complete)
    return {"parallel_read_safe": True}


def complete(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event: of a class with arguments, put in what its docstring does not say."""
    if what == "class" and inspect.isclass(thing) and any(PARAM.match(line) for line in lines):
        lines[:] = with_all_arguments(thing, lines)
    lines[:] = [without_substitutions(line) for line in lines]


def without_substitutions(line: str) -> str:
    """Bars in our docstrings are mathematics, |A| or π(a|s), never references."""
    return "".join(part if LITERAL.fullmatch(part) else part.replace("|", r"\|") for part in LITERAL.split(line))


def with_all_arguments(cls: type, lines: list[str]) -> list[str]:
    """The lines of a docstring, in which every argument of the constructor is described, and says its default."""
    before, own, after = split(lines)
    described = {**inherited(cls), **own}
    signature = inspect.signature(cls)
    listed: list[str] = []
    for name, parameter in signature.parameters.items():
        if name in described:
            listed += with_default(described[name], parameter)
    return [*before, *listed, *after, ""]


def without_description(cls: type) -> set[str]:
    """Arguments of a constructor of which neither the class nor its bases say anything."""
    _, own, _ = split(inspect.getdoc(cls).splitlines())
    return set(inspect.signature(cls).parameters) - {*own, *inherited(cls), "args", "kwargs"}


def inherited(cls: type) -> dict[str, list[str]]:
    """Descriptions of arguments in the docstrings of bases, the nearest first; of our algorithms, TRPOExt's too."""
    sources: list[type] = list(cls.__mro__[1:])
    if issubclass(cls, OnPolicyExt):
        sources.insert(0, TRPOExt)
    found: dict[str, list[str]] = {}
    for base in sources:
        _, described, _ = split((inspect.getdoc(base) or "").splitlines() if "__doc__" in vars(base) else [])
        found = {**described, **found}
    return found


def split(lines: list[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """What is before the arguments, the lines of each argument, and what comes after them."""
    fields = list(_fields(lines))
    first = fields[0][0] if fields else len(lines)
    arguments = {match["name"]: field for _, field in fields if (match := PARAM.match(field[0]))}
    rest = [line for _, field in fields if not PARAM.match(field[0]) for line in field]
    return lines[:first], arguments, rest


def _fields(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Each ``:field:`` with the indented lines that belong to it, and where it begins."""
    field: list[str] = []
    start = 0
    for number, line in enumerate(lines):
        if FIELD.match(line):
            if field:
                yield start, field
            field, start = [line], number
        elif field and (line.startswith(" ") or not line):
            field.append(line)
        elif field:
            yield start, field
            field = []
    if field:
        yield start, field


def with_default(field: list[str], parameter: inspect.Parameter) -> list[str]:
    if parameter.default is parameter.empty:
        return field
    *rest, last = [line for line in field if line.strip()]
    return [*rest, f"{last}. Default: ``{parameter.default!r}``"]
