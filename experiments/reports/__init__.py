"""Tables and plots, made from the metrics files alone."""

from experiments.reports.plots import save_plots
from experiments.reports.reading import RunRecords, read_runs
from experiments.reports.table import make_table

__all__ = ["RunRecords", "make_table", "read_runs", "save_plots"]
