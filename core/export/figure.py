"""Plot the error as it grows along the network."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ampcheck.trace import Comparison

_NAMED = 40


def draw_errors(comparison: Comparison, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Plot the relative error of every module in execution order, on a log scale, and mark the modules that differ.

    Saves a PNG, and an SVG beside it, whatever suffix ``path`` has; returns both paths. Raises ``ValueError`` if
    matplotlib is not installed, if no module was compared, or if the file cannot be written.
    """
    if not comparison.modules:
        raise ValueError(f"there is nothing to draw: {comparison.unseen or 'no module was compared'}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError('matplotlib is not installed: pip install "ampcheck[export]"') from error
    modules = comparison.modules
    finite = [m.relative for m in modules if 0 < m.relative < math.inf]
    # Zero and infinity have no place on a log scale: put them at its ends.
    low, high = (min(finite) / 10, max(finite) * 10) if finite else (1e-9, 1.0)
    heights = [low if m.relative == 0 else min(m.relative, high) for m in modules]
    figure = Figure(figsize=(min(4 + 0.18 * len(modules), 20), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(len(modules)), heights, color="0.6", linewidth=1, zorder=1)
    for equal, color, label in ((True, "tab:green", "within tolerance"), (False, "tab:red", "differs")):
        places = [i for i, module in enumerate(modules) if module.equal is equal]
        if places:
            axes.scatter(places, [heights[i] for i in places], color=color, s=18, label=label, zorder=2)
    first = comparison.first_module
    if first is not None:
        axes.axvline(modules.index(first), color="tab:red", linestyle=":", linewidth=1)
    step = max(1, math.ceil(len(modules) / _NAMED))
    axes.set_xticks(range(0, len(modules), step))
    axes.set_xticklabels([m.module or m.type or "model" for m in modules[::step]], rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title(f"{comparison.first} against {comparison.second}", fontsize=10)
    axes.legend(fontsize=8)
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix.lower() in (".png", ".svg") else stem
    saved = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    try:
        for file in saved:
            figure.savefig(file, dpi=150)
    except OSError as error:
        raise ValueError(f"the figure cannot be written to {str(error.filename or saved[0])!r}") from error
    return saved
