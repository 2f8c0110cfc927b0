"""paraboloid: local quadratic models of a deep-learning loss from mini-batches."""

__version__ = "0.1.0.dev0"
