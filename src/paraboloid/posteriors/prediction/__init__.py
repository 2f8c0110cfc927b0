"""From weights to outputs: Jacobians, moments, predictive distributions; imports from `structures` and below."""
