"""The report of a run, as text and as JSON."""

from ampcheck.report.report import SCHEMA, Report

__all__ = ["SCHEMA", "Report"]
