"""Posterior precisions, one file for each structure of the curvature; imports from `operators` and below."""
