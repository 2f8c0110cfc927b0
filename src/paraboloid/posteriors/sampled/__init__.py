"""Posteriors kept as samples: sample-then-optimise at any size; imports from `prior_tuning`, `prediction` and below."""
