from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION, Precision
from ampcheck.rules._words import place, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import OpCall, Trace


@rule(
    "AMP208",
    Severity.WARNING,
    fix="Cast the parameter or buffer where it is used: `x + self.position.to(x.dtype)`.",
    needs=("training", "uncompiled"),
)
def silent_promotion(trace: Trace) -> Iterator[Evidence]:
    """A float32 parameter or buffer turns low-precision activations back into float32.

    What it does
        Looks in the watched training step for type promotion: an addition, product, concatenation or similar of a
        low-precision tensor and a float32 parameter or buffer of the model that returned float32. Reports it only with
        autocast on, or if the whole model should be in low precision. It is information under autocast, which casts
        again for the next layer: position embeddings and layer scales of sound models do this.

    Why is this bad?
        The activations that follow take twice the memory, and operations that autocast does not cast run in float32.
        Without autocast, the next layer with low-precision weights raises a dtype error.

    Example
        ```python
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        ```

    Use instead
        ```python
        x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        ```

    References
        - https://pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc
        - https://pytorch.org/docs/stable/amp.html#autocast-op-reference
    """
    assert trace.training is not None
    promoted: dict[str, OpCall] = {}
    for call in trace.training.ops:
        for name in _promoters(call, trace.precision):
            promoted.setdefault(name, call)
    if promoted:
        calls = list(dict.fromkeys(promoted.values()))
        casts = all(call.autocast.enabled for call in calls)
        yield Evidence(
            f"{some(_spelled(name, call) for name, call in promoted.items())} turned low-precision activations back "
            "into float32.",
            module=calls[0].module if len(calls) == 1 else None,
            sites=places(call.site for call in calls),
            severity=Severity.INFO if casts else None,
            data={"tensors": {name: {"op": call.op, "module": call.module} for name, call in promoted.items()}},
            situation="autocast" if casts else None,
        )


def _promoters(call: OpCall, precision: Precision) -> list[str]:
    """The float32 parameters and buffers that made float32 of a low-precision operand."""
    without_autocast = precision.mode == "true" or precision.by == "policy"
    low_throughout = without_autocast and precision.dtype in LOW_PRECISION
    if not (call.autocast.enabled or low_throughout) or "float32" not in call.outputs:
        return []
    if not any(operand.dtype in LOW_PRECISION and operand.shape for operand in call.operands):
        return []
    return [o.name for o in call.operands if o.name is not None and o.dtype == "float32" and o.shape]


def _spelled(name: str, call: OpCall) -> str:
    return f"{name} (in {call.op}{place(call.site)})"
