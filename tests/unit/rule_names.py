"""Every rule name that the Python layers can raise, read from their sources.

A rule is named where a violation is made: in the first argument of `QueueViolation` and its kin, or in an argument of a
function that hands it on to one. Both are followed here; what cannot be read from the source is listed as such.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VIOLATIONS = {
    "RuleViolation": 0,
    "QueueViolation": 0,
    "StatusViolation": 0,
    "MessageError": 0,
    "AnswerViolation": 0,
    "RequestViolation": 0,
}
"""The classes of `virtio_test.errors` that carry a rule, and which argument names it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Named:
    """What was found: names with the modules that raise them and the clauses they cite; places that make up a name."""

    names: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    clauses: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    made: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class _Call:
    module: str
    call: ast.Call
    function: Function | None
    owner: str

    @property
    def callee(self) -> str:
        name = self.call.func
        return name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""


def _calls(module: str, node: ast.AST, function: Function | None = None, owner: str = "") -> Iterator[_Call]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield from _calls(module, child, child, owner)
        elif isinstance(child, ast.ClassDef):
            yield from _calls(module, child, function, child.name)
        else:
            if isinstance(child, ast.Call):
                yield _Call(module, child, function, owner)
            yield from _calls(module, child, function, owner)


def _parameter(function: Function | None, name: str) -> int | None:
    """The place of a parameter among the arguments of a call, without self."""
    if function is None:
        return None
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    return names.index(name) if name in names else None


def _values(expression: ast.expr, function: Function | None) -> list[str] | None:
    """The strings that it can be; None when that cannot be read from the source."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return [expression.value]
    if isinstance(expression, ast.IfExp):
        one, other = _values(expression.body, function), _values(expression.orelse, function)
        return None if one is None or other is None else one + other
    if isinstance(expression, ast.Name) and function is not None:
        found: list[str] = []
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == expression.id for target in node.targets
            ):
                values = _values(node.value, None)
                if values is None:
                    return None
                found += values
        return found or None
    return None


def rule_names(package: Path) -> Named:
    """Read all modules of `package`."""
    calls: list[_Call] = []
    for path in sorted(package.rglob("*.py")):
        calls += _calls(str(path.relative_to(package)), ast.parse(path.read_text(), str(path)))
    # A private function hands names on in its own module only; a public one, or a class, wherever it is called.
    sinks: dict[tuple[str, str], int] = {("", name): place for name, place in VIOLATIONS.items()}
    found = Named()
    while True:
        known = len(sinks)
        for each in calls:
            place = sinks.get(("", each.callee), sinks.get((each.module, each.callee)))
            if place is not None:
                _look(each, place, sinks, found)
        if len(sinks) == known:
            return found


def _clauses(each: _Call, place: int) -> list[str]:
    """The clause stands behind the name; elsewhere there is a message, or nothing."""
    values = _values(each.call.args[place], each.function) if place < len(each.call.args) else None
    return [value for value in values or [] if value.replace(".", "").isdigit()]


def _look(each: _Call, place: int, sinks: dict[tuple[str, str], int], found: Named) -> None:
    where = f"{each.module}:{each.callee}"
    arguments = each.call.args
    if place >= len(arguments) or isinstance(arguments[place], ast.Starred):
        found.made.add(where)
        return
    argument = arguments[place]
    values = _values(argument, each.function)
    if values is not None:
        for value in values:
            found.names.setdefault(value, set()).add(each.module)
            found.clauses.setdefault(value, set()).update(_clauses(each, place + 1))
        return
    handed_on = _parameter(each.function, argument.id) if isinstance(argument, ast.Name) else None
    if handed_on is None or each.function is None:
        found.made.add(where)
        return
    name = each.owner if each.function.name == "__init__" else each.function.name
    sinks["" if not name.startswith("_") else each.module, name] = handed_on
