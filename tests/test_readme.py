"""The README against the code."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_commands_name_files_and_modules_that_exist():
    for path in re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.py", TEXT):
        assert (README.parent / path).is_file(), path
    for module in re.findall(r"-m ampcheck\.(\w+)\.(\w+)", TEXT):
        assert (README.parent / module[0] / f"{module[1]}.py").is_file(), module
