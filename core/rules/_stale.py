"""What the rules about saved tensors share: the tensor in words, its sites and the fixes."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from ampcheck.rules._edits import copied_argument, out_of_place
from ampcheck.rules._words import be, count, place, places, some
from ampcheck.rules.rule import Edit
from ampcheck.trace import SavedTensorModified, Site, StaleTensor, Trace, Write

Cause = Literal["write", "optimizer", "buffer"]

_COMMENT = re.compile(r"\s+#[^'\"]*$")


def found_by_pytorch(trace: Trace) -> tuple[StaleTensor, ...]:
    """The stale tensors behind the failure, first the one that PyTorch raised for."""
    found = trace.failure is not None and isinstance(trace.failure.facts, SavedTensorModified)
    if not found or trace.graph is None:
        return ()
    return tuple(stale for stale in trace.graph.stale if stale.silent is None)


def passed_by_pytorch(trace: Trace) -> tuple[StaleTensor, ...]:
    """The stale tensors that backward used without an error."""
    return tuple(stale for stale in trace.graph.stale if stale.silent is not None) if trace.graph else ()


def cause(stale: StaleTensor) -> Cause:
    """What kind of write it was: an optimizer's, one to a buffer of the model, or any other."""
    if any(write.by == "optimizer" for write in stale.writes):
        return "optimizer"
    if stale.name and not stale.buffer and not stale.writes:
        # Who wrote to a parameter was not seen, and is seldom anybody else.
        return "optimizer"
    if stale.buffer or any(write.by == "buffer-broadcast" for write in stale.writes):
        return "buffer"
    return "write"


def plain_op(name: str | None) -> str:
    """``relu_`` of ``aten::relu_``."""
    return (name or "an operation").rpartition("::")[2]


def saved_by(stale: StaleTensor) -> str:
    """The op of the forward pass that saved it, by the name that users know."""
    custom = re.fullmatch(r"(\w+)Backward", stale.node)
    if custom or stale.op is None:
        return custom[1] if custom else re.sub(r"Backward\d+$", "", stale.node)
    return plain_op(stale.op).removeprefix("_").removesuffix("_")


def is_output(stale: StaleTensor) -> bool:
    return (stale.slot or "").startswith(("result", "output"))


def what(stale: StaleTensor) -> str:
    """The tensor in words: ``the output of relu``, ``the buffer mask, saved by mul``."""
    if stale.name:
        return f"the {'buffer' if stale.buffer else 'parameter'} {stale.name}, saved by {saved_by(stale)},"
    if is_output(stale):
        return f"the output of {saved_by(stale)}"
    return f"a tensor saved by {saved_by(stale)}"


def sites_of(stale: StaleTensor) -> tuple[Site, ...]:
    """The first three lines that wrote, each once, and the save site."""
    lines: dict[tuple[str, int], Site] = {}
    for site in places(write.site for write in stale.writes):
        lines.setdefault((site.file, site.line), site)
    return places([*tuple(lines.values())[:3], stale.shared, stale.save])


def data_of(stale: StaleTensor, others: Iterable[StaleTensor] = ()) -> dict[str, Any]:
    """The evidence as JSON values, with all other stale tensors."""
    data: dict[str, Any] = {
        "dtype": stale.dtype,
        "shape": list(stale.shape),
        "version_saved": stale.version_saved,
        "version_found": stale.version_found,
        "node": stale.node,
        "slot": stale.slot,
    }
    if stale.name:
        data["tensor"] = stale.name
    if stale.library:
        data["saved_in"] = f"{stale.library.file}:{stale.library.line}"
    library = next((write.library for write in stale.writes if write.library), None)
    if library:
        data["written_in"] = f"{library.file}:{library.line}"
    rest = [
        {
            "node": other.node,
            "slot": other.slot,
            "module": other.save.module if other.save else None,
            "saved_at": str(other.save) if other.save else None,
            "written_at": [str(site) for site in places(write.site for write in other.writes)],
        }
        for other in others
    ]
    if rest:
        data["also_stale"] = rest
    return data


def others_in_words(others: Iterable[StaleTensor]) -> str:
    """`` 2 more saved tensors are stale: ...``, or nothing."""
    told = list(
        dict.fromkeys(f"{stale.name or stale.slot or 'one'} of {stale.node}{place(stale.save)}" for stale in others)
    )
    return f" {count(len(told), 'more saved tensor')} {be(len(told))} stale: {some(told)}." if told else ""


def module_of(stale: StaleTensor) -> str | None:
    """The module that wrote, else the one that saved."""
    write = next((write.site for write in stale.writes if write.site), None)
    if write is not None and write.module is not None:
        return write.module
    return stale.save.module if stale.save else None


def written(write: Write) -> str:
    """``by mul_ at model.py:41``."""
    return f"by {plain_op(write.op)}{place(write.site)}"


def as_write(site: Site) -> Site:
    """The line that raised, as the line that writes."""
    return replace(site, role="write")


def library_line(sites: Iterable[Site]) -> Site | None:
    """The innermost line of a library other than PyTorch."""
    paths = ((site, site.file.replace("\\", "/")) for site in sites)
    return next((site for site, path in paths if "-packages/" in path and "/torch/" not in path), None)


def statement(site: Site) -> str:
    """The line's code without its comment."""
    return _COMMENT.sub("", site.code).rstrip(";, ")


class Remedy(NamedTuple):
    """A fix in words, and as an edited line if it is one."""

    fix: str | None = None
    edit: Edit | None = None


def remedy(trace: Trace, stale: StaleTensor) -> Remedy:
    """What to change in the line that overwrote a saved tensor."""
    write = stale.writes[0] if stale.writes else None
    if write is None or write.site is None:
        return Remedy()
    if stale.name:
        # A write to a parameter is intended.
        again = f", or run the forward pass{place(stale.save)} again after the write" if stale.save else ""
        return Remedy(
            f"Move the write to {stale.name} at {write.site} after the `backward()` that uses it, inside `with "
            f"torch.no_grad():`{again}."
        )
    # `levels[i] += x` writes to a whole tensor of a list, `x[i] += y` to a part of a tensor.
    whole = write.shape == stale.shape
    return without_write(trace, write.site, plain_op(write.op), write.library, whole=whole)


def without_write(
    trace: Trace, site: Site, op: str = "", library: Site | None = None, *, whole: bool = False
) -> Remedy:
    """How to rewrite the line of ``site`` without the write."""
    after = out_of_place(site.code, op, whole=whole) if site.code else None
    if after is not None:
        first, _, second = after.partition("\n")
        fix = f"Write `{_COMMENT.sub('', first)}` at {site}."
        if second:
            fix = f"Write to a copy: insert the line `{first}` before {site}."
        return Remedy(fix, Edit(site.file, site.line, site.code, after))
    kind = inplace_type(trace, site.module)
    if kind is None or site.module is None:
        return Remedy(f"Use the out-of-place operation at {site}, or write to a copy: `.clone()`.")
    fix = f"Build the {kind} `{site.module}`{f' ({library})' if library else ''} with `inplace=False`"
    after = copied_argument(site.code, site.module.rpartition(".")[2]) if site.code else None
    if after is None:
        return Remedy(f"{fix}.")
    return Remedy(
        f"{fix}, or write `{_COMMENT.sub('', after)}` at {site}.", Edit(site.file, site.line, site.code, after)
    )


def detaching(trace: Trace) -> Remedy:
    """How to keep the failing step from taking over a graph from the one before, if it does."""
    if trace.graph is None or trace.graph.carried is None:
        return Remedy()
    if not trace.graph.carried:
        return Remedy("Detach what the step takes over from the one before it, by `.detach()`.")
    first, *others = trace.graph.carried
    lines = " and ".join(f"`{one.detached}` after {one.after}" for one in trace.graph.carried)
    fix = f"Detach what the step takes over from the one before it: insert {lines}."
    after = f"{_COMMENT.sub('', first.after.code)}\n{first.detached}"
    edit = None if others else Edit(first.after.file, first.after.line, first.after.code, after)
    return Remedy(fix, edit)


# The types of modules, PyTorch's and others', that take `inplace=`.
_INPLACE = re.compile(r"(?i)(relu|elu|silu|swish|mish|hard(sigmoid|tanh)|threshold|drop(out|path)|activation)")


def inplace_type(trace: Trace, module: str | None) -> str | None:
    """The type of a module that may have been built with ``inplace=True``."""
    modules = trace.model.modules if trace.model is not None else ()
    kind = next((one.type for one in modules if module and one.name == module), None)
    return kind if kind is not None and _INPLACE.search(kind) else None
