"""How much of the study is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Images, angles and noise of the published protocol, in an affordable number; sizes of the other parts."""

    images: int = 2
    size: int = 28  # of the characters
    angles: tuple[int, ...] = (5, 10, 20, 30)
    noise: tuple[float, ...] = (0.05, 0.10)
    iterations: int | None = None  # of training: by the image's size
    samples: int = 64
    phantom: int = 40  # the largest round size whose evidence is formed exactly
    phantom_angles: tuple[int, ...] = (10, 24)
    phantom_noise: tuple[float, ...] = (0.02, 0.10)
    start: int = 4  # angles before any is chosen
    chosen: tuple[int, ...] = (4, 8)  # more angles at which the choices are compared
    candidates: int = 36
    characters: int = 1  # whose angles are chosen
    probes: int = 16  # of the evidence by products alone

    @staticmethod
    def full() -> Plan:
        return Plan(images=50, phantom=128, phantom_angles=(20, 60), chosen=(2, 4, 8, 12), characters=10)

    @staticmethod
    def tiny() -> Plan:
        """For tests."""
        return Plan(images=1, size=10, angles=(5,), noise=(0.05,), iterations=20, samples=8, phantom=10,
                    phantom_angles=(6,), phantom_noise=(0.05,), chosen=(2,), candidates=8, characters=1,
                    probes=4)  # fmt: skip
