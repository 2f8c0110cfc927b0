#!/usr/bin/env bash
# torch 2.13.0: the double backward of binary_cross_entropy is wrong for probabilities near zero and one.
#
# Behind a sigmoid the second derivative of the loss in the logit is p (1 - p) for either target.  At a logit of 15 with
# target 0 that is 3.1e-7; autograd's is -6.2e-6 in double and -5.1e-6 in single precision: the Hessian of a convex
# function with the wrong sign.  The error is that of a guard of about 1e-12 in a denominator, which outweighs p (1 - p)
# from a logit of 14 on.  In single precision the second derivative of -log p at p = sigmoid(10) is 0 instead of 1.0001.
# BCEWithLogitsLoss is not affected.
#
# Seen with Python 3.11 on a CPU:
#   2.13.0+cpu: logit 15, target 0: float32 -5.1e-06, float64 -6.2e-06, right 3.1e-07; -log p at sigmoid(10): float32 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F


def second(function, at):
    at = at.clone().requires_grad_()
    (g,) = torch.autograd.grad(function(at), at, create_graph=True)
    return float(torch.autograd.grad(g, at)[0])


found = {}
for dtype in (torch.float32, torch.float64):
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    p = torch.tensor(10.0, dtype=dtype).sigmoid()
    found[dtype] = (
        second(lambda p: F.binary_cross_entropy(p, one), p),
        second(lambda z: F.binary_cross_entropy(z.sigmoid(), zero), torch.tensor(15.0, dtype=dtype)),
    )
single, double = found[torch.float32], found[torch.float64]
p = torch.tensor(15.0).double().sigmoid()
right = float(p * (1 - p))
print(f"{torch.__version__}: logit 15, target 0: float32 {single[1]:.1e}, float64 {double[1]:.1e}, right {right:.1e}; "
      f"-log p at sigmoid(10): float32 {single[0]:g}")
assert right > 0 and single[1] < 0 and double[1] < 0, "the sign may be right now"
assert single[0] == 0, "the second derivative of -log p has changed"
PY
