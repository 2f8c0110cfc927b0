"""What a trained network does not know, on one page: `paraboloid uncertainty`."""

from paraboloid.jobs.uncertainty.job import uncertainty
from paraboloid.jobs.uncertainty.methods import METHODS
from paraboloid.jobs.uncertainty.sections import page
from paraboloid.report import strict_json as to_json

__all__ = ["METHODS", "page", "to_json", "uncertainty"]
