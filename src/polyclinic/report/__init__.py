"""The HTML report of a run or a comparison: one file that opens offline, made only from the results folder."""

from polyclinic.report.write import write_report

__all__ = ["write_report"]
