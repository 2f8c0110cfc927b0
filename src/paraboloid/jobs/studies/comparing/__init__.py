"""Optimisers side by side: trainings over a grid of settings, summaries, figures and tables."""
