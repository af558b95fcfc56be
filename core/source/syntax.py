"""Source code as syntax trees."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator
from typing import Any

LOOPS = (ast.For, ast.AsyncFor, ast.While)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def tree_of(file: str, names: dict[str, Any] | None = None) -> ast.Module | None:
    """The syntax tree of a file, as ``linecache`` has it, with the globals of its module for source that is not on
    disk; ``None`` without source that parses. The tree is shared."""
    return _parsed("".join(linecache.getlines(file, names)))


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text) if text else None
    except (SyntaxError, ValueError):
        return None


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements right inside a node, with those of its handlers and cases."""
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
        for item in value if isinstance(value, list) else ():
            if isinstance(item, (ast.ExceptHandler, ast.match_case)):
                yield item.body


def covers(node: ast.AST, line: int) -> bool:
    return getattr(node, "lineno", 0) <= line <= (getattr(node, "end_lineno", 0) or 0)
