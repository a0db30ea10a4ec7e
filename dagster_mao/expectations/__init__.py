"""Expectations about a batch as a whole, with Great Expectations: declared on an agent, judged before the seal.

Light at import: great_expectations, which takes seconds, is imported when a step that has a suite runs. No state, no Dagster in this room.
"""

from dagster_mao.expectations._declared import Expectation, Expectations
from dagster_mao.expectations._report import report
from dagster_mao.expectations._suite import Finding, Suite, suite_file

__all__ = ["Expectation", "Expectations", "Finding", "Suite", "report", "suite_file"]
