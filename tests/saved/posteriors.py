"""Posteriors to save, and what is asked of them once they are loaded again."""

from __future__ import annotations

from typing import Any

import torch
from saved import settings
from saved.comparing import plain

import paraboloid as pb

STRUCTURES = ("full", "diag", "kron", "ekfac", "lowrank", "functional")
LINKS = {"classes": ("probit", "bridge", "mc", "weights"), "binary": ("probit", "mc")}
DICT = {"0.weight": 2.0, "0.bias": 0.5, "2.weight": 3.0, "2.bias": 1.5}

# name -> setting, options of `pb.laplace`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{s: ("classes", {"structure": s}) for s in STRUCTURES},
    **{f"{s}-last-layer": ("classes", {"structure": s, "weights": "last_layer"}) for s in STRUCTURES},
    **{f"{s}-regression": ("regression", {"structure": s, "noise_variance": 0.3}) for s in STRUCTURES},
    "kron-debiased": ("classes", {"structure": "kron", "debias": True}),
    "ekfac-debiased": ("classes", {"structure": "ekfac", "debias": True}),
    "kron-debiased-regression": ("regression", {"structure": "kron", "debias": True, "noise_variance": 0.3}),
    "kron-images": ("images", {"structure": "kron"}),
    "ekfac-images": ("images", {"structure": "ekfac"}),
    "kron-words": ("words", {"structure": "kron"}),
    "kron-few": ("few", {"structure": "kron"}),
    "ekfac-few": ("few", {"structure": "ekfac"}),
    "kron-sampled": ("classes", {"structure": "kron", "fisher": "mc", "samples": 2, "seed": 3}),
    "functional-subset": ("classes", {"structure": "functional", "subset": 5, "seed": 3}),
    "lowrank-3": ("classes", {"structure": "lowrank", "rank": 3}),
    "diag-binary": ("binary", {"structure": "diag", "prior_precision": DICT}),
    "kron-uneven": ("uneven", {"structure": "kron", "prior_precision": DICT}),
    "full-counts": ("counts", {"structure": "full"}),
    "kron-spread": ("spread", {"structure": "kron"}),
    "full-subnetwork": ("classes", {"structure": "full", "weights": ["0.bias", "2"], "temperature": 0.5}),
    "diag-precisions": ("classes", {"structure": "diag", "prior_precision": torch.linspace(0.5, 2, 31).double()}),
    "kron-tuned": ("classes", {"structure": "kron"}),
    "diag-tuned-regression": ("regression", {"structure": "diag"}),
    "kron-float32": ("classes", {"structure": "kron"}),
    "full-float32-regression": ("regression", {"structure": "full", "noise_variance": 0.3}),
}


def setting_of(name: str) -> settings.Setting:
    return settings.load(CASES[name][0], torch.float32 if "float32" in name else settings.F64)


def fit(name: str) -> Any:
    """The posterior to be saved."""
    s = setting_of(name)
    posterior = pb.laplace(s.model, s.loss_fn, s.batch, **CASES[name][1])
    if name == "kron-tuned":
        posterior.tune_prior(per="layer").match_confidence()
    if name == "diag-tuned-regression":
        posterior.tune_prior("evidence", noise=True)
    return posterior


def answers(name: str, posterior: Any) -> dict[str, Any]:
    """All that a user may ask of a loaded posterior; adds more data to it in the end."""
    s = setting_of(name)
    mean, covariance = posterior.functional(s.new)
    links = LINKS.get(CASES[name][0], ("mc", "weights"))
    return plain({
        "prior precision": posterior.prior_precision,
        "noise variance": posterior.noise_variance,
        "evidence": posterior.log_evidence(),
        "effective dimension": posterior.effective_dimension(),
        "mean": mean,
        "covariance": covariance,
        "variances": posterior.functional(s.new, diagonal=True)[1],
        "joint covariance": posterior.functional(s.new, joint=True)[1],
        "samples": torch.cat([w.flatten(1) for w in posterior.sample(3, seed=5).values()], 1),
        "functions": posterior.functional_samples(s.new, 2, seed=5),
        "predictions": {"default": posterior.predict(s.new)} | {
            link: posterior.predict(s.new, link, samples=8, seed=5) for link in links
        },
        "evidence of more data": posterior.update((s.x[:6], s.y[:6])).log_evidence(),
    })  # fmt: skip
