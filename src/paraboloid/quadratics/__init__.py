"""Local quadratic models of a loss, and how far a batch is from the truth along its own directions;
imports from `operators` and below."""
