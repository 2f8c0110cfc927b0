"""Outer products and their contractions, each written once for all layers; imports from `linalg` and `passes`."""
