"""Built-in problems, on data that ships with a dependency or is generated, and how to load and train one."""

from paraboloid.data import take as read
from paraboloid.problems.problem import Problem, Training
from paraboloid.problems.registry import load, names
from paraboloid.problems.training import evaluate, step_count, train

__all__ = ["Problem", "Training", "evaluate", "load", "names", "read", "step_count", "train"]
