"""report.html: what a run's routing looks like, in one file that opens without a network."""

from taskmoe.train.track.report.html import write_report

__all__ = ["write_report"]
