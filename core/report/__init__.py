"""What the checker tells: one report, as text and as JSON."""

from ampcheck.report.report import SCHEMA, Report

__all__ = ["SCHEMA", "Report"]
