from collections.abc import Iterator

from ampcheck.precision import FLOATING, LOW_PRECISION
from ampcheck.rules._facts import in_force
from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ModuleCall, Policy, Trace


@rule(
    "AMP111",
    Severity.WARNING,
    fix="Pass the same `mp_policy=` to every `fully_shard(...)` call. If you want float32 there, pass "
    "`MixedPrecisionPolicy(param_dtype=torch.float32)`.",
    needs=("model", "training"),
)
def module_outside_policy(trace: Trace) -> Iterator[Evidence]:
    """Modules of a sharded model did not compute in the dtype of its mixed precision policy.

    What it does
        Reads the policies passed to `fully_shard` or `FullyShardedDataParallel`, and the dtype of each module's own
        parameters when it computed in the watched training step. A policy that names float32 counts as intended. If
        autocast was on, AMP104 compares the dtypes.

    Why is this bad?
        A policy applies to the module it was passed with, but not to submodules that a call of their own shards. A
        submodule sharded without a policy computes in float32, with the memory and speed of float32, and nothing casts
        its inputs: a layer that gets low-precision activations fails.

    Example
        ```python
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model, mp_policy=policy)
        ```

    Use instead
        ```python
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        ```

    References
        - https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
        - https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html
    """
    assert trace.model is not None
    assert trace.training is not None
    asking = next((policy for policy in trace.model.policies if policy.dtype in LOW_PRECISION), None)
    if asking is None or in_force(trace.training):
        return
    outside: dict[Policy | None, list[ModuleCall]] = {}
    inside = 0
    for call in trace.training.forward:
        own = {dtype for dtype in call.parameters if dtype in FLOATING}
        policy = trace.model.policy_of(call.module)
        if own == {asking.dtype}:
            inside += call.count
        elif own and call.module is not None and (policy is None or policy.dtype in (None, *LOW_PRECISION)):
            outside.setdefault(policy, []).append(call)
    for policy, calls in outside.items():
        names = list(dict.fromkeys(call.module or "the model itself" for call in calls))
        computed = sorted({dtype for call in calls for dtype in call.parameters})
        total = sum(call.count for call in calls)
        why = _why(policy)
        yield Evidence(
            f"{asking.source} was asked for on {asking.module or 'the model itself'}, but {some(names)} computed with "
            f"{' and '.join(computed)} parameters in {count(total, 'module call')} of the training step, {why}; "
            f"{count(inside, 'call')} had {asking.dtype} parameters.",
            module=names[0] if len(names) == 1 else None,
            data={"asked": asking.dtype, "computed": computed, "modules": names, "sharded": policy and policy.module},
        )


def _why(policy: Policy | None) -> str:
    if policy is None:
        return "which no policy covers"
    name = policy.module or "the model itself"
    return f"under {policy.source} of {name}" if policy.dtype else f"because {name} is sharded without a policy"
