"""Writes the README's rule table from the rules: ``python tests/readme.py``."""

from __future__ import annotations

import re
from pathlib import Path

from ampcheck import RULES

README = Path(__file__).parent.parent / "README.md"


def rule_table() -> str:
    rows = [f"| {rule.code} | {rule.name} | {rule.severity} | {rule.summary} |" for rule in RULES]
    return "\n".join(["| code | name | severity | what it says |", "| --- | --- | --- | --- |", *rows])


def with_table(text: str) -> str:
    block = f"<!-- rules -->\n{rule_table()}\n<!-- /rules -->"
    return re.sub(r"<!-- rules -->.*<!-- /rules -->", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
