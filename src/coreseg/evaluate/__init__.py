"""Evaluation: run a predictor over a split, set it beside a blind guess, print and save the figures."""

from coreseg.evaluate.baselines import BlindBaseline
from coreseg.evaluate.records import Record, summarise
from coreseg.evaluate.report import evaluate_and_report, print_table, write_summary
from coreseg.evaluate.run import Evaluation, Predictor, evaluate

__all__ = [
    "BlindBaseline",
    "Evaluation",
    "Predictor",
    "Record",
    "evaluate",
    "evaluate_and_report",
    "print_table",
    "summarise",
    "write_summary",
]
