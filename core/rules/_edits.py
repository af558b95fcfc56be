"""A line that writes to a tensor in place, rewritten without the write."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeGuard

from ampcheck.rules.rule import Edit
from ampcheck.trace import Site

# These methods have no twin without the underscore, or one that does something else.
_NO_TWIN = re.compile(
    "(apply|bernoulli|cauchy|copy|exponential|fill|fill_diagonal|geometric|index_put|log_normal|map|normal|random|resize"
    "|set|swapdims|uniform|zero|(trunc_normal|constant|ones|eye|dirac|orthogonal|(xavier|kaiming)_\\w+))_"
)
# What these return shares the memory of what they are called on.
_VIEWS = re.compile(
    "view|view_as|reshape|flatten|squeeze|unsqueeze|t|transpose|permute|movedim|swapaxes|select|narrow|diagonal|expand"
    "|unfold|as_strided|detach|contiguous|T|mT|H|mH|real|imag|data"
)
_FUNCTIONS = frozenset({"torch", "F", "nn", "functional", "init"})
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
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
                return self._without_out(call, whole=whole)
            if any(_is_inplace(keyword) for keyword in call.keywords):
                return self._without_inplace(call, whole=whole)
            if _is_ambiguous(call):
                continue
            base, through = _written(call)
            twins = not any(_NO_TWIN.fullmatch(_name(link)) for link in _chain(call))
            if through == "fresh":
                return self._replaced(call, self._without_underscores(call)) if twins else None
            if (
                through == "view"
                or not twins
                or not self._is_whole(base, whole=whole)
                or self._reads_itself(call, base)
            ):
                return self._to_copy(base)
            return self._assigned(call, base, self._without_underscores(call))
        return None

    @staticmethod
    def _is_whole(target: ast.expr, *, whole: bool) -> bool:
        """Whether a name or an item is given another tensor by an assignment, where an item of a tensor is not."""
        if isinstance(target, ast.Attribute):
            return _VIEWS.fullmatch(target.attr) is None
        if not isinstance(target, ast.Subscript):
            return isinstance(target, ast.Name)
        index = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
        return whole and not any(map(_is_slice, index)) and not _is_data(target.value)

    def _reads_itself(self, call: ast.Call, base: ast.expr) -> bool:
        """Whether a later write of a chain takes what an earlier one wrote: ``x.mul_(2).add_(x[0])``."""
        taken = [argument for link in list(_chain(call))[:-1] for argument in (*link.args, *link.keywords)]
        return any(ast.dump(node) == _loaded(base) for one in taken for node in ast.walk(one))

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
        if not self._is_whole(target, whole=whole):
            return self._to_copy(target)
        name, value = self._text(target), self._text(statement.value)
        if not _binds_tighter(statement.value, statement.op):
            value = f"({value})"
        sign = _sign(statement.op)
        return f"{name} = {name} {sign} {value}{self._after(statement)}"

    def _to_copy(self, written: ast.expr) -> str | None:
        """Two lines: make a copy, and write to it."""
        base = _without_data(written)
        # An item of an item may be of a list or of a tensor.
        if isinstance(base, ast.Subscript):
            base = _without_data(base.value)
        while isinstance(base, ast.Attribute) and _VIEWS.fullmatch(base.attr):
            base = base.value
        if not isinstance(base, (ast.Name, ast.Attribute)) or getattr(base, "id", "") in ("self", "cls"):
            return None
        name = self._text(base)
        return f"{name} = {name}.clone()\n{self._without_data_of(base)}"

    def _without_out(self, call: ast.Call, *, whole: bool) -> str | None:
        out = next(keyword for keyword in call.keywords if keyword.arg == "out")
        target = _without_data(out.value)
        if not self._is_whole(target, whole=whole):
            return self._to_copy(target)
        return self._assigned(call, target, self._dropped(call, out))

    def _without_inplace(self, call: ast.Call, *, whole: bool) -> str | None:
        keyword = next(keyword for keyword in call.keywords if _is_inplace(keyword))
        given = next((one.value for one in call.keywords if one.arg == "input"), call.args[0] if call.args else None)
        made = self._dropped(call, keyword)
        target = _without_data(given) if given is not None else None
        if not isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
            return self._replaced(call, made)
        if not self._is_whole(target, whole=whole):
            return self._to_copy(target)
        return self._assigned(call, target, made)

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
            names = [self._text(_without_data(one)) for one in statement.targets]
            if names == [name]:
                return f"{name} = {made}{self._after(statement)}"
            return self._replaced(call, f"{name} = {made}")
        if self._is_in_comprehension(call):
            return self._replaced(call, made)
        return self._replaced(call, f"({name} := {made})") if isinstance(target, ast.Name) else None

    def _is_in_comprehension(self, call: ast.Call) -> bool:
        """Where a name cannot be assigned to."""
        around = (node for node in ast.walk(self._statement) if isinstance(node, _COMPREHENSIONS))
        return any(node is call for one in around for node in ast.walk(one))

    def _without_underscores(self, call: ast.Call) -> str:
        """A chain of calls with each call replaced by its twin, without a leading ``.data``."""
        links = list(_chain(call))
        cuts = [(self._end(link.func) - 1, self._end(link.func)) for link in links]
        node = _worked_on(links[-1])
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


def _is_slice(index: ast.expr) -> bool:
    return isinstance(index, ast.Slice) or (isinstance(index, ast.Constant) and index.value is ...)


def _root(call: ast.Call) -> str:
    root: ast.expr = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    return root.id if isinstance(root, ast.Name) else ""


def _is_ambiguous(call: ast.Call) -> bool:
    """Whether ``Fn.relu_(x)`` may be a function of a module or a method of a tensor."""
    root = _root(call)
    return len(root) > 1 and root[0].isupper() and bool(call.args)


def _worked_on(call: ast.Call) -> ast.expr:
    """What a method is called on; of a function that writes to its first argument, ``F.relu_(x)``, that."""
    if _root(call) in _FUNCTIONS and call.args:
        return call.args[0]
    return call.func.value if isinstance(call.func, ast.Attribute) else call.func


def _chain(call: ast.Call) -> Iterator[ast.Call]:
    """The calls of a chain that write, ``x.mul_(2).add_(1)``, the last first."""
    node: ast.expr = call
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_in_place_name(node.func.attr):
        yield node
        node = _worked_on(node)


def _written(call: ast.Call) -> tuple[ast.expr, Literal["name", "view", "fresh"]]:
    """What a chain writes to: a name or an item, what a view is of, or a value that has no name yet."""
    links = list(_chain(call))
    node = _without_data(_worked_on(links[-1]) if links else call)
    through: Literal["name", "view"] = "name"
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _VIEWS.fullmatch(node.func.attr):
        if _root(node) in _FUNCTIONS:
            break
        node, through = _without_data(node.func.value), "view"
    return (node, through) if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) else (node, "fresh")


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
