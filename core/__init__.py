"""AmpCheck: is PyTorch mixed precision really on and sound, and if training died of it, where and why."""

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.export import Setting, compare, compare_settings, draw_errors, plain_kernels
from ampcheck.launch import run_module, run_script, show_exception
from ampcheck.plain import watch
from ampcheck.precision import Precision
from ampcheck.replay import backward_without_hooks
from ampcheck.report import Report
from ampcheck.rule import Evidence, Finding, Rule, Severity, rule
from ampcheck.rules import RULES
from ampcheck.trace import Host, Site, Trace
from ampcheck.walk import unwrapped

__version__ = "0.1.0"

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
    "Setting",
    "Severity",
    "Site",
    "Trace",
    "backward_without_hooks",
    "compare",
    "compare_settings",
    "draw_errors",
    "plain_kernels",
    "rule",
    "run_module",
    "run_script",
    "show_exception",
    "unwrapped",
    "watch",
]
