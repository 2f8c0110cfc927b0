"""Checks of a user's own layer rule, loss or quantity against plain autograd, one call each; imports from `optim`,
`quantities` and below.

A check returns None, or raises an AssertionError that says which quantity is off, at which entry, and by how much.
"""

from paraboloid.testing.losses import check_loss
from paraboloid.testing.quantities import check_quantity
from paraboloid.testing.rules import check_rule

__all__ = ["check_loss", "check_quantity", "check_rule"]
