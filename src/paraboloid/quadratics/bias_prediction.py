"""The bias that a batch's own top directions must have, from the spectrum of all data and the batch size alone."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import generator_of


def predicted_bias(
    spectrum: Tensor,
    batch_size: int,
    samples: int,
    k: int = 10,
    *,
    weights: Tensor | None = None,
    weight_decay: float = 0.0,
    draws: int = 32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Ratios "same" and "other" [k] to the full data along top eigenvectors of a batch, if samples were random vectors.

    The model: sample n contributes s_n s_n^T to C = mean_n s_n s_n^T, where s_n is a Gaussian vector times the root of
    its weight, all of them turned so that C has exactly the given spectrum.  Batches drawn from such samples without
    replacement are decomposed, so the numbers are those of finite N and m and not a limit; "other" follows from
    u.C u = (m/N) u.C_B u + (1 - m/N) u.C_{rest} u.  For white spectra and large N the top "same" eigenvalue is
    (1 + sqrt(d/m))^2.

    spectrum      eigenvalues of the curvature of all data, without weight decay; the top ones do if others are small
    weights       [N], how much each sample contributes, as its quadratic forms along the top directions summed
                  (`curvature.sample_quadratic_forms(U).sum(0)`); equal ones if None.  What few samples decide a batch
                  gets wrong more often, and the spectrum does not tell
    weight_decay  is added to every eigenvalue

    No more than half as many eigenvalues are used as the weights count samples, (sum w)^2 / sum w^2.

    Raises ValueError for batches beyond N / 2, negative or no eigenvalues among the used ones, or wrong weights.
    """
    check_count("batch_size", batch_size, most=samples // 2)
    check_count("draws", draws)
    w = torch.ones(samples, dtype=torch.float64, device="cpu") if weights is None else weights.detach().double().cpu()
    if w.shape != (samples,) or not (w >= 0).all() or not w.sum() > 0:
        raise ValueError(f"the weights have shape {tuple(w.shape)} and sum {w.sum().item():.4g}; expected [{samples}] "
                         "numbers of at least 0, not all 0.")  # fmt: skip
    w = w / w.mean()
    count = samples / w.square().mean().item()  # samples that count
    values = spectrum.detach().double().cpu().flatten().sort(descending=True).values
    values = values[: max(1, int(count / 2))]
    if not len(values) or not values[0] > 0 or not (values >= -1e-6 * values[0]).all():
        raise ValueError(f"the spectrum's extremes are {values.tolist()[:1]} and {values.tolist()[-1:]}; expected "
                         "eigenvalues of at least 0, as a GGN's or a Fisher's are.")  # fmt: skip
    check_count("k", k, most=min(len(values), batch_size))
    values, generator = values.clamp(min=0), generator_of(seed, torch.device("cpu"))
    sums = torch.zeros(2, k, dtype=torch.float64, device="cpu")
    for _ in range(draws):
        A = torch.randn(
            samples, len(values), generator=generator, dtype=torch.float64, device="cpu"
        ) * w.sqrt().unsqueeze(1)
        A = torch.linalg.qr(A).Q * (samples * values).sqrt()  # now A^T A / N is the diagonal of the spectrum
        batch = A[torch.randperm(samples, generator=generator, device="cpu")[:batch_size]]
        _, found, V = torch.linalg.svd(batch, full_matrices=False)
        sums[0] += found[:k].square() / batch_size + weight_decay
        sums[1] += V[:k].square() @ values + weight_decay
    same, full = sums / draws
    share = batch_size / samples
    return {"same": same / full, "other": (full - share * same) / (1 - share) / full}
