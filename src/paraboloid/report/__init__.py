"""The report: a record of plain numbers in, JSON and one self-contained HTML page out; imports no other room."""

from paraboloid.report.page import render, render_study
from paraboloid.report.record import KEYS, Record, from_json, plain, strict_json, to_json
from paraboloid.report.writing import check_writable, write

__all__ = [
    "KEYS",
    "Record",
    "check_writable",
    "from_json",
    "plain",
    "render",
    "render_study",
    "strict_json",
    "to_json",
    "write",
]
