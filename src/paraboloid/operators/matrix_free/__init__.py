"""Curvature that is known by its products with vectors alone; imports from `quantities`, `graph` and below."""
