from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import InferenceTensor, Trace

_SAID = {
    "saved": "Autograd needs to save a tensor that was made under `inference_mode`",
    "written": "A tensor that was made under `inference_mode` was modified in place outside of it",
    "leaf": "A tensor that was made under `inference_mode` was set to require grad",
}


@rule(
    "AMP406",
    Severity.ERROR,
    fix="Use `torch.no_grad()` instead of `torch.inference_mode()`, or `.clone()` the tensor where training uses it.",
    needs=("failure",),
)
def inference_tensor_in_autograd(trace: Trace) -> Iterator[Evidence]:
    """A tensor made under `inference_mode` reached an operation that autograd records.

    What it does
        Names the line that used the tensor and, if AmpCheck saw it, the last line that made a tensor under
        `inference_mode`.

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
    if failure is None or not isinstance(failure.facts, InferenceTensor):
        return
    made = trace.graph.inference[-1] if trace.graph is not None and trace.graph.inference else None
    used = failure.sites[0] if failure.sites else None
    yield Evidence(
        f"{_SAID[failure.facts.use]}{place(used)}{f'; it was made{place(made)}' if made else ''}.",
        module=failure.module,
        sites=places((used, made)),
    )
