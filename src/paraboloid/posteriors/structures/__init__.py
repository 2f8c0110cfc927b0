"""Curvatures of a posterior, one file for each structure; imports from `operators` and below."""
