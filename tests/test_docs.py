"""The generated pages against the rules, and the links of all pages against the disk."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ampcheck import RULES

ROOT = Path(__file__).parent.parent
MAKE = runpy.run_path(str(ROOT / "docs" / "make.py"))
FILES: dict[Path, str] = MAKE["written"]()
HINT = "run `python docs/make.py`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_written_is_current(path: Path) -> None:
    assert path.is_file(), HINT
    assert path.read_text(encoding="utf-8") == FILES[path], HINT


def test_there_is_a_page_a_rule_and_no_other() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "rules").glob("*.md")} - {"README"}
    assert pages == {rule.code for rule in RULES}, HINT


def test_links_lead_to_files() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_a_rule_that_changes_is_seen() -> None:
    rule = RULES[0]
    changed = type(rule)(rule.code, rule.name, rule.severity, "Do otherwise.", rule.needs, rule.judge)
    assert MAKE["rule_page"](changed) != MAKE["rule_page"](rule)
