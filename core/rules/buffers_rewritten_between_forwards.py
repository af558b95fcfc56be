from collections.abc import Iterator

from ampcheck.rules._stale import cause, data_of, found_by_pytorch, passed_by_pytorch, plain_op, sites_of
from ampcheck.rules._words import place, places, sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import StaleTensor, Trace


@rule(
    "AMP407",
    Severity.ERROR,
    fix="Use a copy of the buffer in the forward pass (`self.mask.clone()`), or call `backward()` after each forward.",
    needs=("graph",),
)
def buffers_rewritten_between_forwards(trace: Trace) -> Iterator[Evidence]:
    """A buffer that a forward pass saved was overwritten before its backward.

    What it does
        Names the buffer, the operation that saved it, and what overwrote it: DistributedDataParallel, which broadcasts
        the buffers of rank 0 at each forward, or the module itself in a second forward.

    Why is this bad?
        Two forward passes before one backward are common (siamese and contrastive losses, GANs). The second pass
        overwrites what the first one saved. Backward then raises, or uses the wrong values if nothing checks.

    Example
        ```python
        model = DistributedDataParallel(net)
        loss = contrast(model(a), model(b))
        loss.backward()
        ```

    Use instead
        ```python
        model = DistributedDataParallel(net, broadcast_buffers=False)
        loss = contrast(model(a), model(b))
        loss.backward()
        ```

    References
        - https://github.com/pytorch/pytorch/issues/22095
        - https://github.com/huggingface/transformers/issues/24996
    """
    crashed = found_by_pytorch(trace)
    if crashed and cause(crashed[0]) == "buffer":
        yield _evidence(crashed[0], [one for one in crashed[1:] if cause(one) == "buffer"])
    silent = [one for one in passed_by_pytorch(trace) if cause(one) == "buffer"]
    if silent:
        yield _evidence(silent[0], silent[1:])


def _evidence(stale: StaleTensor, others: list[StaleTensor]) -> Evidence:
    write = stale.writes[0] if stale.writes else None
    broadcast = write is not None and write.by == "buffer-broadcast"
    if write is not None and broadcast:
        who = f" by the buffer broadcast of DistributedDataParallel{place(write.site)}"
    else:
        who = f" by {plain_op(write.op)}{place(write.site)}" if write else ""
    silently = ", and PyTorch does not notice" if stale.silent else ""
    named = f"the buffer {stale.name}" if stale.name else "a buffer"
    attribute = f"self.{stale.name.rpartition('.')[2]}" if stale.name else "buffer"
    saves = places(one.save for one in (stale, *others) if one.name == stale.name)
    lines = list(dict.fromkeys(place(site) for site in saves))
    copy = f"Use `{attribute}.clone()`{' and'.join(lines)}"
    return Evidence(
        sentence(
            f"{named}, saved by {stale.node}{place(stale.save)}, was overwritten{who} before backward used it"
            f"{silently}."
        ),
        module=stale.name.rpartition(".")[0] if stale.name else None,
        sites=sites_of(stale),
        data=data_of(stale, others),
        fix=f"{copy}, or build DistributedDataParallel with `broadcast_buffers=False`." if broadcast else f"{copy}.",
    )
