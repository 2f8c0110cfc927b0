"""Copy or sort a sequence of symbols with a small transformer encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from paraboloid.problems.problem import Problem, Training, halves

SYMBOLS = 16


class Transformer(nn.Module):
    """Tokens [N, 1 + T], the first being the command, to logits [N, C, T] of the T symbols."""

    def __init__(self, length: int, d: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 2, d)
        self.position = nn.Parameter(torch.empty(1 + length, d))
        layer = nn.TransformerEncoderLayer(d, heads, dim_feedforward=4 * d, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, SYMBOLS)
        # The encoder copies one layer: draw every matrix anew, so that its layers start out different.
        for parameter in (p for p in self.encoder.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.position, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.embedding(tokens) + self.position)
        return self.head(h[:, 1:]).transpose(1, 2)


def transformer(seed: int = 0, samples: int = 10_000, length: int = 15) -> Problem:
    """Two encoder layers, d = 64, 4 heads; cross-entropy at every position. Tests on a fifth as many samples."""
    tokens, targets = draw_sequences(samples + samples // 5, length, seed)
    x, y = torch.from_numpy(tokens), torch.from_numpy(targets)
    return Problem(
        Transformer(length),
        nn.CrossEntropyLoss(),
        *halves(samples, x, y),
        title="Copy or sort, transformer",
        description=(
            f"{samples:,} generated sequences of {length} symbols, to be copied or sorted as the first token says; two "
            "transformer encoder layers of width 64."
        ),
        training=Training("adam", lr=1e-3, batch_size=64, epochs=10),
    )


def draw_sequences(samples: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, 1 + T] and targets [N, T], int64: symbols 0..15 after token 16 (copy) or 17 (sort ascending)."""
    rng = np.random.default_rng(seed)
    symbols = rng.integers(SYMBOLS, size=(samples, length))
    sort = rng.integers(2, size=(samples, 1))
    targets = np.where(sort == 1, np.sort(symbols, axis=1), symbols)
    return np.concatenate([SYMBOLS + sort, symbols], axis=1), targets
