from collections.abc import Iterator

from ampcheck.rules._facts import trainable
from ampcheck.rules._words import count, place, places, sentence, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import InferenceTensor, Site, Trace

_SAID = {
    "saved": "Autograd needs to save {what}",
    "written": "{what} was modified in place outside of it",
    "leaf": "{what} was set to require grad",
}


@rule(
    "AMP406",
    Severity.ERROR,
    fix="Use `torch.no_grad()` instead of `torch.inference_mode()`, or `.clone()` the tensor where training uses it.",
    needs=(),
)
def inference_tensor_in_autograd(trace: Trace) -> Iterator[Evidence]:
    """A tensor made under `inference_mode` reached an operation that autograd records.

    What it does
        Names the line that used the tensor, what holds it and the line that put it there; if nothing does, the last
        line that made a tensor under `inference_mode`, where AmpCheck saw it. At fit start, lists the parameters
        of the optimizers that were made under `inference_mode`.

    Why is this bad?
        Inference tensors have no version counter, so autograd cannot save them. They usually come from frozen backbones
        and cached features.

    Example
        ```python
        with torch.inference_mode():
            features = backbone(images)
        loss = head(features).sum()
        ```

    Use instead
        ```python
        with torch.no_grad():
            features = backbone(images)
        loss = head(features).sum()
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.autograd.grad_mode.inference_mode.html
        - https://github.com/facebookresearch/dinov2/issues/472
    """
    failure = trace.failure
    if failure is None:
        yield from _at_start(trace)
        return
    if not isinstance(failure.facts, InferenceTensor):
        return
    facts = failure.facts
    seen = trace.graph.inference[-1] if trace.graph is not None and trace.graph.inference else None
    made = facts.made or (seen if facts.name is None else None)
    used = failure.sites[0] if failure.sites else None
    said = sentence(_SAID[facts.use].format(what=f"the tensor {facts.name}" if facts.name else _A_TENSOR))
    under = " under `inference_mode`" if facts.name else ""
    tail = f"; it was made{under}{place(made)}" if made or under else ""
    yield Evidence(
        f"{said}{place(used)}{tail}.",
        module=failure.module,
        sites=places((used, made)),
        data={"tensor": facts.name} if facts.name else {},
        fix=_OUTSIDE if facts.stored else _clone(facts, used) if facts.name else None,
        situation="parameters" if facts.stored else None,
    )


_A_TENSOR = "a tensor that was made under `inference_mode`"
_OUTSIDE = "Build or load the model outside `torch.inference_mode()`."


def _clone(facts: InferenceTensor, used: Site | None) -> str:
    again = "" if facts.use == "saved" else ", and write to the clone"
    made = f" where it is made{place(facts.made)}" if facts.made else " where it is made"
    return f"Use `{facts.name}.clone()`{place(used)}{again}, or `torch.no_grad()` instead of `inference_mode`{made}."


def _at_start(trace: Trace) -> Iterator[Evidence]:
    optimized = {name for optimizer in trace.optimizers for name in optimizer.names}
    tensors = trainable(trace.model) if trace.model is not None else []
    names = [tensor.name for tensor in tensors if tensor.inference and tensor.name in optimized]
    if names:
        were = "was" if len(names) == 1 else "were"
        yield Evidence(
            f"{count(len(names), 'optimized parameter')} {were} made under `inference_mode`, and cannot be trained: "
            f"{some(names)}.",
            data={"parameters": names},
            fix=_OUTSIDE,
            situation="parameters",
        )
