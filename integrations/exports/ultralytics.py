"""Compares what Ultralytics' exporter wrote with the model that it exported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils import LOGGER

from ampcheck import FindingsError, compare


def report_export(
    exporter: Any,
    *,
    select: str | Iterable[str],
    ignore: str | Iterable[str],
    fail_on: str,
    report: bool | str | os.PathLike[str],
    **_: Any,
) -> None:
    """Compare, with the options of a checker, and report through Ultralytics' logger and next to the file. Raises
    ``FindingsError``."""
    try:
        file, model, images = _exported(exporter)
        if file is None:
            return
        dynamic = None if getattr(exporter.args, "dynamic", False) else False
        reached = None
        try:
            # Trusted, because the exporter has just written it.
            found = compare(
                model, file, images, dynamic_batch=dynamic, trusted=True, select=select, ignore=ignore, fail_on=fail_on
            )
        except FindingsError as error:
            reached, found = error, error.report
        LOGGER.info(f"\n{found}")
        if report is not False:
            found.write(f"{file}.ampcheck.json")
    except Exception as error:  # noqa: BLE001 - the export has succeeded, whatever fails here
        LOGGER.warning(f"AmpCheck (AMP900): the export was not compared: {type(error).__name__}: {error}")
        return
    if reached is not None:
        raise reached


def _exported(exporter: Any) -> tuple[Path | None, torch.nn.Module, torch.Tensor]:
    """The file that an exporter wrote (``None``: do not compare it), the model in it (the exporter's own copy, fused
    and with its head in export mode), and the images that it was traced with."""
    model, images, args = exporter.model, exporter.im, exporter.args
    suffix = {"torchscript": ".torchscript", "onnx": ".onnx"}.get(str(args.format).lower())
    if suffix is None:
        return None, model, images
    if getattr(args, "quantize", None) not in (None, 16, 32):
        LOGGER.info("AmpCheck: an export to integers computes something else on purpose, and is not compared.")
        return None, model, images
    if getattr(args, "nms", False):
        from ultralytics.engine import exporter as engine

        # Older versions put suppression only into CoreML files.
        wrapper: Any = getattr(engine, "NMSModel", None)
        model = model if wrapper is None else wrapper(model, args).eval()
    return exporter.file.with_suffix(suffix), model, images
