from collections.abc import Iterator

from ampcheck.precision import FLOATING, LOW_PRECISION
from ampcheck.rules._facts import in_force
from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ModuleCall, Policy, Trace


@rule(
    "AMP111",
    Severity.WARNING,
    fix="Hand the same `mp_policy=` to every `fully_shard(...)` call, and where float32 is meant say so: "
    "`MixedPrecisionPolicy(param_dtype=torch.float32)`.",
    needs=("model", "training"),
)
def module_outside_policy(trace: Trace) -> Iterator[Evidence]:
    """Modules of a sharded model computed in another dtype than its mixed precision policy names.

    What it does
        Reads the policies that `fully_shard` or `FullyShardedDataParallel` was given, and the dtype that the own
        parameters of each module had when it computed in the watched training step. Modules under a policy that
        names float32 are taken as meant. Where autocast was on, AMP104 compares the dtypes.

    Why is this bad?
        A policy holds for the module it was given with, without the modules in it that are sharded by a call of
        their own. One that was sharded without a policy computes in float32, at the memory and speed of float32, and
        gets its inputs as they come: a layer that is given low-precision activations dies of them.

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
            f"{count(inside, 'call')} had {asking.dtype} ones.",
            module=names[0] if len(names) == 1 else None,
            data={"asked": asking.dtype, "computed": computed, "modules": names, "sharded": policy and policy.module},
        )


def _why(policy: Policy | None) -> str:
    if policy is None:
        return "which no policy covers"
    name = policy.module or "the model itself"
    return f"under {policy.source} of {name}" if policy.dtype else f"since {name} is sharded without a policy"
