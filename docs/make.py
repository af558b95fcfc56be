"""Generates ``docs/rules`` from the rules: a page for each, and their index. Run ``python docs/make.py``."""

from __future__ import annotations

import re
from pathlib import Path

from ampcheck import RULES, Rule
from ampcheck.cli import page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "rules"
SEVERITIES = """\
An `error` means that training will crash, or compute something other than what was asked; a `warning` is worth a look;
an `info` is worth knowing. Codes are permanent. `ampcheck explain CODE` shows a page in the terminal."""


def index() -> str:
    rows = [f"| [{r.code}]({r.code}.md) | {r.name} | {r.severity} | {r.summary} |" for r in RULES]
    table = "\n".join(["| code | name | severity | what it says |", "| --- | --- | --- | --- |", *rows])
    return f"# Rules\n\n{SEVERITIES}\n\n{table}\n"


def rule_page(rule: Rule) -> str:
    """What ``ampcheck explain`` shows, with headings one level up and a link to the index."""
    text = re.sub(r"(?m)^#(?=#)", "", page(rule))
    facts = f"\n## Judged from\n\n{_facts(rule)}\n" if rule.needs else ""
    return f"{text}{facts}\n[All rules](README.md)\n"


def _facts(rule: Rule) -> str:
    return "; ".join(_FACTS[fact] for fact in rule.needs) + "."


_FACTS = {
    "averaged": "the averaged copy of the model",
    "comparison": "a comparison of the exported model with the eager one",
    "evaluation": "the watched evaluation step",
    "export_failure": "an exception that ended an export",
    "failure": "an exception that ended the run",
    "graph": "the autograd graph of the watched step, or of a replay of the failing batch",
    "internal_error": "AmpCheck itself",
    "model": "the model at fit start",
    "numbers": "a replay of a step whose loss or gradients were not finite",
    "scaler": "the gradient scaler",
    "skips": "the steps that the optimizer counted, and the loss scale",
    "training": "the watched training step",
    "uncompiled": "a model that is not compiled",
}


def written() -> dict[Path, str]:
    """The text of each generated file, by path."""
    return {PAGES / "README.md": index(), **{PAGES / f"{rule.code}.md": rule_page(rule) for rule in RULES}}


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    files = written()
    for path in set(PAGES.glob("*.md")) - files.keys():
        path.unlink()
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
