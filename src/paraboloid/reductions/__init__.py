"""Contractions of outer products, each written once for all layers; imports from `engine`, `linalg` and below."""
