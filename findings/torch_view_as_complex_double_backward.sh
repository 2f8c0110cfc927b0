#!/usr/bin/env bash
# torch 2.13.0: second derivatives through torch.view_as_complex depend on where the vector lies in memory.
#
# The derivative of `torch.view_as_complex` is `view_as_real`, whose own derivative views the incoming vector as complex
# numbers without copying it.  A vector that starts at an odd place of its storage, as a piece of a flat vector of all
# parameters does behind a bias of odd length, ends in "Tensor must have a storage_offset divisible by 2"; a copy of the
# same numbers is taken.  First derivatives are right.
#
# Seen with Python 3.11 on a CPU:
#   2.13.0+cpu: the same vector behind an odd offset: Tensor must have a storage_offset divisible by 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

p = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
(g,) = torch.autograd.grad((torch.view_as_complex(p).abs() ** 3).sum(), p, create_graph=True)
flat = torch.randn(7, dtype=torch.float64)
even = torch.autograd.grad(g, p, flat[1:].clone().view(3, 2), retain_graph=True)[0]
try:
    torch.autograd.grad(g, p, flat[1:].view(3, 2), retain_graph=True)
    error = None
except RuntimeError as e:
    error = str(e)
print(f"{torch.__version__}: the same vector behind an odd offset: {error}")
assert even.isfinite().all()
assert error is not None and "storage_offset divisible by 2" in error, "it may be right now"
PY
