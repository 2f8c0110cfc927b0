"""The report: a record of plain numbers in, `report.json` and one self-contained `report.html` out."""

from paraboloid.report.page import render, render_study
from paraboloid.report.record import KEYS, Record, from_json, to_json
from paraboloid.report.writing import check_writable, write

__all__ = ["KEYS", "Record", "check_writable", "from_json", "render", "render_study", "to_json", "write"]
