"""Sums over the processes of a data-parallel job; imports from `passes`."""
