"""Every operation that PyTorch lists, in a watched step: outputs and gradients to the bit, or the same exception.

``python every_op.py N`` takes the first N samples of each and prints the operations that differ, as JSON. It is a
process of its own, since PyTorch's list, when imported, sets flags for all of it:
https://github.com/pytorch/pytorch/wiki/Writing-tests-using-OpInfo
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

from ampcheck import AmpChecker

# Uninitialised memory.
UNSTABLE = ("empty", "new_empty", "empty_like", "empty_strided", "empty_permuted", "new_empty_strided")
OPS = [op for op in op_db if op.name not in UNSTABLE and torch.float32 in op.supported_dtypes("cpu")]


def call(op: Any, sample: Any, *, watched: bool) -> tuple[list[Tensor | None], str | None]:
    torch.manual_seed(0)
    values = tree_leaves((sample.input, sample.args, sample.kwargs))
    leaves = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    checker = AmpChecker(report=False)
    checker.attach(nn.Linear(1, 1), emit=lambda _: None)
    try:
        step = checker.training_step() if watched else contextlib.nullcontext()
        with step, torch.autocast("cpu", dtype=torch.bfloat16):
            result = op(sample.input, *sample.args, **sample.kwargs)
            outputs = [output for output in tree_leaves(result) if isinstance(output, Tensor)]
            roots = [output.abs().sum() for output in outputs if output.requires_grad]
            gradients = torch.autograd.grad(roots, leaves, allow_unused=True) if roots and leaves else ()
    except Exception as error:  # noqa: BLE001 - it is looked at
        return [], f"{type(error).__name__}: {error}"
    finally:
        checker.detach()
        if any(finding.code == "AMP900" for finding in checker.report.findings):
            raise RuntimeError(f"AMP900 at {op.formatted_name}")
    return [*(output.detach() for output in outputs), *gradients], None


def laid_out(samples: Iterable[Any]) -> Iterator[Any]:
    """The samples, and after each the same with its first tensor's memory transposed, as in channels-last models."""
    for sample in samples:
        yield sample
        first = sample.input
        if isinstance(first, Tensor) and first.layout == torch.strided and first.dim() > 1:
            turned = first.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
            sample.input = turned.requires_grad_(first.requires_grad)
            yield sample


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout == torch.strided and one.stride() != other.stride():
        return False
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    wide = torch.complex128 if one.is_complex() else torch.float64
    return torch.allclose(one.to(wide), other.to(wide), 0, 0, equal_nan=True)


def all_same(ones: list[Tensor | None], others: list[Tensor | None]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


def main(most: int) -> None:
    differing: dict[str, str] = {}
    compared = 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for op, learned in itertools.product(OPS, (True, False)):
        samples = op.sample_inputs("cpu", torch.float32, requires_grad=learned and op.supports_autograd)
        for sample in laid_out(itertools.islice(samples, most)):
            plain, error = call(op, sample, watched=False)
            seen, error_seen = call(op, sample, watched=True)
            compared += 1
            if error != error_seen:
                differing[op.formatted_name] = f"{error} became {error_seen}"
            # Some operations give another result each time they are called.
            elif not all_same(plain, seen) and all_same(plain, call(op, sample, watched=False)[0]):
                differing[op.formatted_name] = "another result"
    print(json.dumps({"operations": len(OPS), "compared": compared, "differing": differing}))


if __name__ == "__main__":
    main(int(sys.argv.pop()))
