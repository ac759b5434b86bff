"""A report that a person can look at, and its pictures."""

from sleb_cli.exporters.report.figures import Figures
from sleb_cli.exporters.report.report import Report

__all__ = ["Figures", "Report"]
