from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP900",
    Severity.WARNING,
    fix="Report it with the traceback and the output of `ampcheck doctor`. The training itself is not affected.",
)
def internal_error(trace: Trace) -> Iterator[Evidence]:
    """AmpCheck itself failed and switched itself off.

    What it does
        Reports an exception raised inside AmpCheck. AmpCheck removes all its probes, and training goes on without it.

    Why is this bad?
        From then on nothing is checked: the absence of other findings means nothing.

    Example
        ```text
        warning[AMP900] internal-error: AmpCheck switched itself off: AttributeError: ...
        ```

    Use instead
        Reproduce it with `ampcheck run` on a short script, and send that script with the report.

    References
        - https://docs.python.org/3/library/traceback.html
    """
    if trace.internal_error is not None:
        yield Evidence(
            f"AmpCheck switched itself off, and training goes on unchecked: {trace.internal_error}.",
            data={"exception": trace.internal_error},
        )
