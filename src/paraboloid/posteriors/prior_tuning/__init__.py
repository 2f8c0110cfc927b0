"""Choosing the prior: evidence, linearised optimum, validation; imports from `prediction` and below."""
