#!/usr/bin/env bash
# torch 2.13.0: second derivatives through a function marked with once_differentiable are zero instead of an error.
#
# `torch.autograd.function.once_differentiable` says that a backward pass cannot be differentiated; a second derivative is
# to raise "trying to differentiate twice a function that was marked with @once_differentiable".  `backward()` does raise.
# `torch.autograd.grad` with `inputs` does not: the node that raises does not lie on a path to them, so it never runs.
# With y = 2 x behind such a function, torch.autograd.functional.jvp(y, 1, 1) gives 0, where 2 is right, and
# functional.hvp of y^2 gives 0, where 8 is right, both with strict=False, the default.
#
# Seen with Python 3.11 on a CPU:
#   2.13.0+cpu: jvp 0 (right: 2), hvp 0 (right: 8), backward() raises: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.autograd import functional


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


one = torch.ones(())
_, jvp = functional.jvp(Double.apply, one, one)
_, hvp = functional.hvp(lambda x: Double.apply(x) ** 2, one, one)
x, u = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
(g,) = torch.autograd.grad(Double.apply(x), x, u, create_graph=True)
try:
    g.backward()
    raises = False
except RuntimeError as e:
    raises = "once_differentiable" in str(e)
print(f"{torch.__version__}: jvp {jvp:g} (right: 2), hvp {hvp:g} (right: 8), backward() raises: {raises}")
assert raises, "backward() does not raise any more"
assert jvp == 0 and hvp == 0, "they may be right, or raise, now"
PY
