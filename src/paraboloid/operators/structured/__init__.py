"""Curvature that is stored in a structure, and so can be inverted, rooted and sampled;
imports from `quantities` and below."""
