"""Every rule keeps the form: a file of its own, a documentation page, a fix that can be acted on."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from adapters import HOSTS

import ampcheck.rules
from ampcheck.rules import RULES
from ampcheck.rules.rule import Rule
from ampcheck.trace import Trace

SECTIONS = ["What it does", "Why is this bad?", "Example", "Use instead", "References"]
WRONG_ADVICE = ("inplace=False", "downgrade", "fp16 = None", "autocast(device=", "amp.autocast(device_type")
FOLDER = Path(ampcheck.rules.__file__).parent
# What a rule is, and how rules are judged, lie beside them.
MODULES = sorted({m.name for m in pkgutil.iter_modules([str(FOLDER)]) if m.name[0] != "_"} - {"rule", "judging"})

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def sections(rule: Rule) -> dict[str, str]:
    """The parts of a rule's page by heading, in order; the summary under an empty heading."""
    parts: dict[str, str] = {"": ""}
    heading = ""
    for line in rule.page.splitlines():
        if line and not line.startswith(" "):
            heading = line if parts[""] else ""
            parts.setdefault(heading, "")
        parts[heading] += line if not heading else line + "\n"
    return {name: text.removeprefix(name).strip("\n") for name, text in parts.items()}


def test_every_rule_file_is_in_the_tuple():
    assert sorted(rule.name.replace("-", "_") for rule in RULES) == MODULES


def test_codes_are_sorted_and_unique():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))


def test_tuple_is_literal():
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    (value,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign))
    assert isinstance(value, ast.Tuple)
    assert all(isinstance(element, ast.Name) for element in value.elts)


@each_rule
def test_named_as_its_file(rule):
    module = importlib.import_module(f"ampcheck.rules.{rule.name.replace('-', '_')}")
    assert getattr(module, rule.name.replace("-", "_")) is rule
    assert [value for value in vars(module).values() if isinstance(value, Rule)] == [rule]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z]+)+", rule.name)


@each_rule
def test_code(rule):
    assert re.fullmatch(r"AMP[1-69]\d\d", rule.code)


@each_rule
def test_page_has_its_sections(rule):
    parts = sections(rule)
    assert list(parts)[1:] == SECTIONS
    assert all(text.strip() for text in parts.values())
    assert re.fullmatch(r"[A-Z`].*\.", rule.summary)
    assert len(rule.summary) <= 100


@each_rule
def test_examples_are_code(rule):
    parts = sections(rule)
    for heading in ("Example", "Use instead"):
        for language, code in re.findall(r"```(\w+)\n(.*?)```", parts[heading], re.DOTALL):
            if language == "python":
                ast.parse("\n".join(line.removeprefix("    ") for line in code.splitlines()))


@each_rule
def test_references_are_links(rule):
    lines = sections(rule)["References"].splitlines()
    assert lines
    assert all(re.fullmatch(r" {4}- https://\S+", line) for line in lines)


@each_rule
def test_fix_is_one_sentence_or_two(rule):
    assert re.match(r"[A-Z]", rule.fix)
    assert rule.fix.endswith(".")
    assert "\n" not in rule.fix
    assert len(rule.fix) <= 220


@each_rule
def test_names_no_host_and_gives_no_wrong_advice(rule):
    text = f"{rule.page}\n{rule.fix}".lower()
    assert not [host for host in HOSTS if host in text]
    assert not [advice for advice in WRONG_ADVICE if advice.lower() in f"{rule.fix}\n{sections(rule)['Use instead']}"]


@each_rule
def test_needs_are_fields_of_the_trace(rule):
    assert all(hasattr(Trace(), fact) for fact in rule.needs)


@each_rule
def test_nothing_is_found_where_nothing_is_known(rule):
    nothing = Trace()
    assert rule.missing(nothing) is not None or list(rule(nothing)) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_rules_do_not_import_torch(path):
    imported = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [
        node.module if isinstance(node, ast.ImportFrom) else alias.name for node in imported for alias in node.names
    ]
    assert not [name for name in names if name and name.partition(".")[0] == "torch"]
