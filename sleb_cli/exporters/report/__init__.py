"""A report that a person can look at, and its pictures."""

from sleb_cli.exporters.report.report import Figures, Report

__all__ = ["Figures", "Report"]
