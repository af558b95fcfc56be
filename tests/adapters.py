"""The hosts, as the folder of adapters has them: no test holds a list of them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
INTEGRATIONS = ROOT / "integrations"
ADAPTERS = sorted(path for path in INTEGRATIONS.glob("*.py") if path.name != "__init__.py")
HOSTS = tuple(path.stem for path in ADAPTERS)
