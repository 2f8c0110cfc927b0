"""Built-in problems, how to load and train one; imports from `losses`, `data` and `passes` alone."""

from paraboloid.data.batches import take as read
from paraboloid.problems.problem import Problem, Training
from paraboloid.problems.registry import load, names
from paraboloid.problems.training import evaluate, step_count, train

__all__ = ["Problem", "Training", "evaluate", "load", "names", "read", "step_count", "train"]
