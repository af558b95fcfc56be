"""A line that writes to a tensor in place, rewritten without the write."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import TypeGuard

from ampcheck.rules.rule import Edit
from ampcheck.trace import Site

# The result of these methods does not depend on what they overwrite: they have no twin without the underscore.
_NO_TWIN = re.compile(
    "(bernoulli|cauchy|copy|exponential|fill|geometric|index_put|log_normal|normal|random|set|uniform|zero)_"
)
_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
_TIGHT = (ast.Mult, ast.Div, ast.MatMult, ast.FloorDiv, ast.Mod, ast.Pow)


def out_of_place(code: str, op: str, *, whole: bool) -> str | None:
    """The statement ``code`` without its write by ``op`` (``mul_``; empty: any), or ``None`` if the line alone does not
    say how. It becomes two lines if the write goes to a copy. ``whole``: it writes to the whole tensor, not to an
    indexed part."""
    line = _Line.of(code)
    return line.out_of_place(op, whole=whole) if line is not None else None


def replacing(sites: Iterable[Site], call: str | None, corrected: str | None) -> Edit | None:
    """The edit of the first of ``sites`` that holds ``call``, as ``ast.unparse`` spells it, to ``corrected``."""
    for site in sites:
        after = _with_call(site.code, call, corrected) if call is not None and corrected is not None else None
        if after is not None:
            return Edit(site.file, site.line, site.code, after)
    return None


def _with_call(code: str, call: str, corrected: str) -> str | None:
    for whole in (code, f"{code} pass", f"{code}\n    pass\ndef f(): pass"):
        try:
            tree = ast.parse(whole)
        except (SyntaxError, ValueError):
            continue
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == call]
        if len(found) != 1 or found[0].end_lineno != 1:
            return None
        line = code.encode()
        start, end = found[0].col_offset, found[0].end_col_offset or 0
        return (line[:start] + corrected.encode() + line[end:]).decode()
    return None


def copied_argument(code: str, called: str) -> str | None:
    """The statement ``code``, which calls ``called`` on a name, on a copy instead: ``self.act(x.clone())``."""
    line = _Line.of(code)
    return line.copied_argument(called) if line is not None else None


class _Line:
    """One statement on one line, with its syntax tree."""

    def __init__(self, code: str, statement: ast.stmt) -> None:
        self._code = code.encode()
        self._statement = statement

    @classmethod
    def of(cls, code: str) -> _Line | None:
        code = code.strip()
        try:
            (statement,) = ast.parse(code).body
        except (SyntaxError, ValueError):
            return None
        simple = isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return))
        return cls(code, statement) if simple else None

    def out_of_place(self, op: str, *, whole: bool) -> str | None:
        statement = self._statement
        if isinstance(statement, ast.AugAssign):
            return self._augmented(statement, whole=whole)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript):
            return self._to_copy(statement.targets[0])
        for call in self._writing_calls(op):
            if any(keyword.arg == "out" for keyword in call.keywords):
                return self._without_out(call)
            if any(_is_inplace(keyword) for keyword in call.keywords):
                return self._without_inplace(call)
            written = _written(call)
            part = isinstance(written, ast.Subscript) and not whole
            if written is None or part or any(_NO_TWIN.fullmatch(_name(link)) for link in _chain(call)):
                return self._to_copy(_begins_with(call) if written is None else written)
            return self._assigned(call, written, self._without_underscores(call))
        return None

    def copied_argument(self, called: str) -> str | None:
        calls = [node for node in ast.walk(self._statement) if isinstance(node, ast.Call) and _name(node) == called]
        if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].keywords:
            return None
        argument = calls[0].args[0]
        named = isinstance(argument, (ast.Name, ast.Attribute))
        return self._replaced(argument, f"{self._text(argument)}.clone()") if named else None

    def _writing_calls(self, op: str) -> Iterator[ast.Call]:
        """The calls that write, those of ``op`` first; of a chain, the outermost call."""
        calls = [node for node in ast.walk(self._statement) if isinstance(node, ast.Call) and _writes(node)]
        inner = {id(link) for call in calls for link in _chain(call) if link is not call}
        outer = [call for call in calls if id(call) not in inner]
        yield from sorted(outer, key=lambda call: all(op != _name(link) for link in _chain(call)))

    def _augmented(self, statement: ast.AugAssign, *, whole: bool) -> str | None:
        target = _without_data(statement.target)
        if isinstance(target, ast.Subscript) and (not whole or _is_data(target.value)):
            return self._to_copy(target)
        if not isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
            return None
        name, value = self._text(target), self._text(statement.value)
        if not _binds_tighter(statement.value, statement.op):
            value = f"({value})"
        sign = _sign(statement.op)
        return f"{name} = {name} {sign} {value}{self._after(statement)}"

    def _to_copy(self, written: ast.expr) -> str | None:
        """Two lines: make a copy, and write to it."""
        base = _without_data(written)
        while isinstance(base, ast.Subscript):
            base = _without_data(base.value)
        if not isinstance(base, (ast.Name, ast.Attribute)):
            return None
        name = self._text(base)
        return f"{name} = {name}.clone()\n{self._without_data_of(base)}"

    def _without_out(self, call: ast.Call) -> str | None:
        out = next(keyword for keyword in call.keywords if keyword.arg == "out")
        target = _without_data(out.value)
        return self._assigned(call, target, self._dropped(call, out))

    def _without_inplace(self, call: ast.Call) -> str | None:
        keyword = next(keyword for keyword in call.keywords if _is_inplace(keyword))
        given = _without_data(call.args[0]) if call.args else None
        made = self._dropped(call, keyword)
        named = isinstance(given, (ast.Name, ast.Attribute, ast.Subscript))
        return self._assigned(call, given, made) if given is not None and named else self._replaced(call, made)

    def _assigned(self, call: ast.Call, target: ast.expr, made: str) -> str | None:
        """The statement with ``made`` in place of ``call``, and its result assigned to ``target``."""
        statement = self._statement
        if not isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
            return None
        name = self._text(target)
        if isinstance(statement, ast.Return) and call is statement.value:
            return self._replaced(call, made)
        if isinstance(statement, ast.Expr) and call is statement.value:
            return self._replaced(call, f"{name} = {made}")
        if isinstance(statement, ast.Assign) and call is statement.value:
            same = [self._text(one) for one in statement.targets] == [name]
            return self._replaced(call, made if same else f"{name} = {made}")
        return self._replaced(call, f"({name} := {made})") if isinstance(target, ast.Name) else None

    def _without_underscores(self, call: ast.Call) -> str:
        """A chain of calls with each call replaced by its twin, without a leading ``.data``."""
        cuts: list[tuple[int, int]] = []
        for link in _chain(call):
            end = self._end(link.func)
            if _is_in_place_name(_name(link)):
                cuts.append((end - 1, end))
        node = _begins_with(call)
        if _is_data(node):
            cuts.append((self._end(node.value), self._end(node)))
        return self._cut(self._start(call), self._end(call), cuts)

    def _without_data_of(self, base: ast.expr) -> str:
        found = [
            (self._end(node.value), self._end(node))
            for node in ast.walk(self._statement)
            if isinstance(node, ast.Attribute) and node.attr == "data" and ast.dump(node.value) == _loaded(base)
        ]
        return self._cut(0, len(self._code), found)

    def _dropped(self, call: ast.Call, keyword: ast.keyword) -> str:
        """``call`` without one of its keywords and the comma before or after it."""
        first, last = self._start(keyword), self._end(keyword)
        ahead = self._code[:first].rstrip()
        if ahead.endswith(b","):
            first = len(ahead) - 1
        else:
            behind = self._code[last:]
            last += len(behind) - len(behind.lstrip(b", "))
        return self._cut(self._start(call), self._end(call), [(first, last)])

    def _replaced(self, call: ast.expr, made: str) -> str:
        code = self._code
        return code[: self._start(call)].decode() + made + code[self._end(call) :].decode()

    def _cut(self, start: int, end: int, cuts: list[tuple[int, int]]) -> str:
        kept = b""
        for first, last in sorted(cuts):
            kept += self._code[start:first]
            start = last
        return (kept + self._code[start:end]).decode()

    def _after(self, node: ast.AST) -> str:
        return self._code[self._end(node) :].decode()

    def _text(self, node: ast.AST) -> str:
        return self._code[self._start(node) : self._end(node)].decode()

    def _start(self, node: ast.AST) -> int:
        return int(getattr(node, "col_offset", 0))

    def _end(self, node: ast.AST) -> int:
        return int(getattr(node, "end_col_offset", 0) or 0)


def _writes(call: ast.Call) -> bool:
    if any(_is_inplace(keyword) or keyword.arg == "out" for keyword in call.keywords):
        return True
    return isinstance(call.func, ast.Attribute) and _is_in_place_name(call.func.attr)


def _is_in_place_name(name: str) -> bool:
    private = name.startswith("_") and not name.startswith("_foreach_")
    return name.endswith("_") and not private and name != "requires_grad_"


def _is_inplace(keyword: ast.keyword) -> bool:
    return keyword.arg == "inplace" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _worked_on(call: ast.Call) -> ast.expr:
    """What a method is called on, or the first argument of a function that writes to it, such as ``F.relu_(x)``."""
    root: ast.expr = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    if isinstance(root, ast.Name) and root.id in ("torch", "F", "nn", "functional") and call.args:
        return call.args[0]
    return call.func.value if isinstance(call.func, ast.Attribute) else call.func


def _chain(call: ast.Call) -> Iterator[ast.Call]:
    """The calls of a chain, ``x.mul_(2).add_(1)``, the last first."""
    node: ast.expr = call
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield node
        node = _worked_on(node)


def _begins_with(call: ast.Call) -> ast.expr:
    """What a chain of calls begins with: ``x`` of ``x.view(-1).mul_(2)``."""
    return _worked_on(list(_chain(call))[-1])


def _written(call: ast.Call) -> ast.expr | None:
    """What a chain begins with, if all its calls write to it."""
    base = _without_data(_begins_with(call))
    named = isinstance(base, (ast.Name, ast.Attribute, ast.Subscript))
    return base if named and all(_is_in_place_name(_name(link)) for link in _chain(call)) else None


def _without_data(node: ast.expr) -> ast.expr:
    """``x`` of ``x.data``: a write through ``.data`` is a write to the tensor itself."""
    while _is_data(node):
        node = node.value
    return node


def _is_data(node: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == "data"


def _loaded(node: ast.expr) -> str:
    return ast.dump(ast.parse(ast.unparse(node), mode="eval").body)


def _binds_tighter(value: ast.expr, around: ast.operator) -> bool:
    if isinstance(value, _ATOMS):
        return True
    tight = isinstance(value, ast.BinOp) and isinstance(value.op, _TIGHT)
    return tight and isinstance(around, (ast.Add, ast.Sub))


def _sign(operator: ast.operator) -> str:
    return ast.unparse(ast.BinOp(ast.Name("a"), operator, ast.Name("b"))).split()[1]
