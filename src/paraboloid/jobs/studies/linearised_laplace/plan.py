"""How much of the linearised-Laplace study is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """networks    hidden sizes of 64-h-10 networks with tanh, on digits
    epochs      moments of the training at which posteriors are fitted; the first is early-stopped
    structures  of the posteriors; "full" is the exact GGN
    train, test numbers of digits
    seeds       of independent splits and networks
    factors     by which normalised weights are rescaled
    em_steps    of EM by samples and by the exact matrix, on the first network
    samples     posterior samples
    growing     (hidden units, hidden layers) of the networks on which the posteriors' costs are compared
    keep        file of finished pieces, which are not run again
    """

    networks: tuple[int, ...] = (8,)
    epochs: tuple[int, ...] = (10, 100)
    structures: tuple[str, ...] = ("full", "kron", "diag")
    train: int = 400
    test: int = 300
    seeds: int = 3
    factors: tuple[float, ...] = (0.1, 10.0)
    em_steps: int = 4
    samples: int = 16
    growing: tuple[tuple[int, int], ...] = ((130, 1), (300, 2))
    keep: str | None = None

    @classmethod
    def full(cls) -> Plan:
        """Wider networks, more structures and seeds."""
        return cls(networks=(8, 24), structures=("full", "kron", "ekfac", "diag", "functional"), seeds=5,
                   samples=32, growing=((130, 1), (300, 2), (1000, 2), (3100, 2)))  # fmt: skip
