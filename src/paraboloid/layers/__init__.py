"""One small rule per operation: what its `left` and `right` are; imports from `passes`.

Rules know nothing of samples; the engine regroups their rows.  To teach the library a new operation, decorate a
function with ``@rule(operation)``.
"""

from paraboloid.layers import convolutions, elementwise, embeddings, matrix_products, normalization, recurrent
from paraboloid.layers.registry import EMPTY, LOWERINGS, RULES, Rule, Use, channel, lowering, matrix, rule, spread

__all__ = [
    "EMPTY", "LOWERINGS", "RULES", "Rule", "Use", "channel", "convolutions", "elementwise", "embeddings",
    "lowering", "matrix", "matrix_products", "normalization", "recurrent", "rule", "spread",
]  # fmt: skip
