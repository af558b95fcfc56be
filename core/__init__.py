"""AmpCheck: is PyTorch mixed precision really on and sound, and if training died of it, where and why."""

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.export import Setting, compare, compare_settings, draw_errors, plain_kernels
from ampcheck.loops.launch import run_module, run_script, show_exception
from ampcheck.loops.watch import watch
from ampcheck.observe.replay import backward_without_hooks
from ampcheck.observe.walk import unwrapped
from ampcheck.precision import Precision
from ampcheck.report import Report
from ampcheck.rules import RULES
from ampcheck.rules.rule import Evidence, Finding, Rule, Severity, rule
from ampcheck.session import Session, Shadow, contained, shadow, variables
from ampcheck.trace import Host, Site, Trace
from ampcheck.version import __version__

__all__ = [
    "RULES",
    "AmpChecker",
    "Evidence",
    "Finding",
    "FindingsError",
    "Host",
    "Precision",
    "Report",
    "Rule",
    "Session",
    "Setting",
    "Severity",
    "Shadow",
    "Site",
    "Trace",
    "__version__",
    "backward_without_hooks",
    "compare",
    "compare_settings",
    "contained",
    "draw_errors",
    "plain_kernels",
    "rule",
    "run_module",
    "run_script",
    "shadow",
    "show_exception",
    "unwrapped",
    "variables",
    "watch",
]
