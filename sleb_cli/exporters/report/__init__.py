"""A report that a person can look at."""

from sleb_cli.exporters.report.report import Report

__all__ = ["Report"]
