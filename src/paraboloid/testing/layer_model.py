"""A call of an operation inside a small network, and every quantity of it by loops of autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.engine.reindexed_weights import STRETCHES
from paraboloid.layers import RULES, Use
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import MSE
from paraboloid.optim.layer_means import Readings
from paraboloid.quantities import KFAC, EigenScale
from paraboloid.quantities.door import statistics
from paraboloid.testing.cases import Case, first
from paraboloid.testing.comparison import check_equal
from paraboloid.testing.layer_uses import dense_right

OUTPUTS = 3
ENTRIES = 12  # of a weight whose second derivatives are compared
DENSE = 400  # elements of a weight up to which its block is compared
GRADIENTS = ("grad", "sample_grads", "square_norms", "gram", "second_moment")
LOSS = MSE(reduction="sum")


class Network(nn.Module):
    """f = head tanh(op(..)) for the samples on an axis of the call's output; with `below`, its data are scaled first.

    `split` is how that axis holds the samples among further positions: (a, N, b).
    """

    def __init__(self, case: Case, axis: int, split: tuple[int, int, int], below: Mapping[int, int]):
        super().__init__()
        self.case, self.axis, self.split = case, axis, split
        generator = torch.Generator().manual_seed(3)
        z = case.output().detach()
        self.size, self.zeros = float(z.abs().max()) or 1.0, torch.zeros_like(z)  # an attribute that counts as data
        self.places = {f"weights.{k}": slot for k, slot in enumerate(case.roots)}
        self.weights = nn.ParameterList([nn.Parameter(t.detach()) for t in case.roots.values()])
        self.scales = nn.ParameterDict()
        for slot, along in below.items():
            if split[1] == 1 and along > 0:  # of one sample axis 0 is the first that fits
                continue
            shape = [1 if i == along else d for i, d in enumerate(case.tensors[slot].shape)]
            scale = 1 + 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64)
            self.scales[str(slot)] = nn.Parameter(scale)
        width = z.numel() // split[1]
        head = torch.randn(OUTPUTS, width, generator=generator, dtype=torch.float64) * width**-0.5
        self.head = nn.Parameter(head)

    def forward(self, *data: Tensor) -> Tensor:
        tensors = dict(zip(self.case.data, data, strict=True))
        for slot, scale in self.scales.items():
            tensors[int(slot)] = tensors[int(slot)] * scale
        for w, (slot, shape) in zip(self.weights, self.case.weights.items(), strict=True):
            tensors[slot] = w.expand(shape) if w.shape != shape else w
        self.called = [tensors[i] for i in range(len(tensors))]
        z = self.z = first(self.case.call(self.called))
        if not self.case.data or self.case.op in STRETCHES:  # else nothing here is data
            z = z + self.zeros
        z = z.unflatten(self.axis, self.split).movedim(self.axis + 1, 0)
        return F.linear(torch.tanh(z.reshape(len(z), -1) / self.size), self.head)

    def label(self, name: str) -> str:
        if name in self.places:
            return f"`{self.case.labels[self.places[name]]}`"
        return "the head" if name == "head" else f"a layer below `{self.case.labels[int(name.split('.')[1])]}`"


class Comparison:
    """One network with inputs and targets: what the library finds, and what autograd does."""

    def __init__(self, case: Case, axis: int, split: tuple[int, int, int], below: Mapping[int, int], uses: bool):
        self.net, self.case, self.N = Network(case, axis, split, below), case, split[1]
        where = f"samples on axis {axis}" + (f" as {list(split)}" if split[0] * split[2] > 1 else "")
        self.title = f"{case.name}, {where}, N = {self.N}"
        self.data = tuple(case.arguments()[i] for i in case.data)
        self.params = dict(self.net.named_parameters())
        self.f = self.net(*case_data(case))
        self.y = torch.randn(self.f.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.uses = uses
        self.J = self._jacobians()

    def _jacobians(self) -> dict[str, Tensor]:
        """name -> [N, outputs, *shape], one output of one sample at a time."""
        rows = [[self._grads(e) for e in self.f[n]] for n in range(self.N)]
        return {k: torch.stack([torch.stack([g[k] for g in row]) for row in rows]) for k in self.params}

    def _grads(self, value: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(value, list(self.params.values()), retain_graph=True, allow_unused=True)
        return {
            k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(self.params.items(), found, strict=True)
        }

    def statistics(self, *quantities: Any, max_memory: int | None = None) -> Any:
        """Without the engine's own check of a rule, which says less; second derivatives alone may fall back."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if quantities == ("diag_hessian",) else "error", ".*falling back")
            try:
                batch = case_data(self.case), self.y
                return statistics(self.net, LOSS, batch, list(quantities), verify=False, max_memory=max_memory)
            except UserWarning as e:
                raise AssertionError(f"{self.title}: {e}") from None

    def check(self) -> None:
        self._check_gradients()
        self._check_second_derivatives()
        if self.uses:
            self._check_kronecker()
            self._check_means()

    def _equal(self, quantity: str, name: str, found: Tensor, expected: Tensor, by: str = "autograd") -> None:
        check_equal(found, expected, f"{self.title}: {quantity} of {self.net.label(name)}", by)

    def _check_gradients(self) -> None:
        wanted = [*GRADIENTS, *(["variance"] if self.N > 1 else []), "diag_ggn", "sample_diag_ggn"]
        residual = 2 * (self.f.detach() - self.y)
        for memory in (None, 1):  # all samples at once, and one by one
            stats = self.statistics(*wanted, max_memory=memory)
            for k, J in self.J.items():
                g = torch.einsum("no...,no->n...", J, residual)
                flat = g.flatten(1)
                squares = 2 * J.square().sum(1)
                expected = {
                    "sample_grads": g, "grad": g.sum(0), "square_norms": flat.square().sum(1), "gram": flat @ flat.T,
                    "second_moment": g.square().mean(0), "variance": g.var(0, correction=0), "sample_diag_ggn": squares,
                    "diag_ggn": squares.sum(0),
                }  # fmt: skip
                for q in sorted(wanted, key=list(expected).index):
                    self._equal(q, k, stats[q][k], expected[q])

    def _check_second_derivatives(self) -> None:
        """diag_hessian, of layers below too: curvature passes the call as the rule says."""
        try:
            expected = self._second_derivatives()
        except RuntimeError as e:
            if "not implemented" in str(e):  # torch has none for the operation
                return
            raise
        found = self.statistics("diag_hessian")["diag_hessian"]
        for k, (chosen, values) in expected.items():
            step = f" (of {len(chosen)} chosen entries)" if len(chosen) < self.params[k].numel() else ""
            self._equal(f"diag_hessian{step}", k, found[k].flatten()[chosen], values)

    def _second_derivatives(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> some entries of the parameter, and the loss's second derivatives along them."""
        params = {k: p for k, p in self.params.items() if k != "head"}
        value = (self.net(*case_data(self.case)) - self.y).square().sum()
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
        result = {}
        for (k, p), g in zip(params.items(), grads, strict=True):
            chosen = torch.arange(0, p.numel(), -(-p.numel() // ENTRIES))
            values = torch.zeros(len(chosen), dtype=torch.float64)
            for place, i in enumerate(chosen if g is not None and g.requires_grad else ()):
                (row,) = torch.autograd.grad(g.flatten()[i], p, retain_graph=True, allow_unused=True)
                values[place] = 0 if row is None else row.flatten()[i]
            result[k] = chosen, values
        return result

    # --- Kronecker factors --------------------------------------------------------------------------------------------

    def _check_kronecker(self) -> None:
        matrices = self._matrices()
        blocks: dict[str, Kron] = {}
        for sharing in ("expand", "reduce"):
            try:
                blocks = self.statistics(KFAC("exact", sharing=sharing))["kflr"]
            except NotImplementedError:
                if any(len(uses) > 1 for uses in matrices.values()):
                    return  # of several forms at once
                raise AssertionError(f"{self.title}: no Kronecker factors ({sharing}); expected some.") from None
            for k, uses in matrices.items():
                if self.params[k].numel() > DENSE:
                    continue
                J = self.J[k].flatten(2)
                exact = all(u.right is None for u in uses)
                expected = 2 * torch.einsum("noi,noj->ij", J, J) if exact else self._block(uses, sharing)
                self._equal(f"kflr ({sharing})", k, blocks[k].to_dense(), expected,
                            "autograd" if exact else "the rule's left and right")  # fmt: skip
        blocks = self.statistics("kflr")["kflr"]
        forms = {k: kron.eigenform(k) for k, kron in blocks.items()}
        scales = self.statistics(EigenScale(forms, "exact"))["eigen_scale"]
        for k, form in forms.items():
            rotated = form.rotated(self.J[k].flatten(0, 1).flatten(1))
            self._equal("the EKFAC scale", k, scales[k], 2 * rotated.square().sum(0))
        if self.N == 1:
            try:
                found = self.statistics("kfra")["kfra"]
            except NotImplementedError:  # not a chain of layers that it knows
                return
            for k in [k for k, kron in blocks.items() if kron.shape[0] <= DENSE]:
                self._equal("kfra (of one sample)", k, found[k].to_dense(), blocks[k].to_dense(), "kflr")

    def _matrices(self) -> dict[str, list[Use]]:
        tensors = self.net.called
        uses = list(self.case.call(tensors, RULES[self.case.op]))
        return {k: [u for u in uses if u.weight is tensors[slot]] for k, slot in self.net.places.items()}

    def _block(self, uses: list[Use], sharing: str) -> Tensor:
        """left (x) right with the pulled-back roots, from the definition."""
        z = self.net.z.detach().requires_grad_()
        w = z.unflatten(self.net.axis, self.net.split).movedim(self.net.axis + 1, 0)
        f = F.linear(torch.tanh(w.reshape(len(w), -1) / self.net.size), self.net.head)
        v = torch.stack([torch.autograd.grad(f[:, o].sum(), z, retain_graph=True)[0] for o in range(OUTPUTS)]) * 2**0.5
        parts = [self._positions(u, v) for u in uses]
        left, right = torch.cat([l for l, _ in parts], 3), torch.cat([r for _, r in parts], 2)  # [V N G T p], [N G T q]
        empty = (right == 0).all(-1, keepdim=True) & uses[0].lookup
        if sharing == "reduce":
            left = left.sum(3, keepdim=True)
            right = right.sum(2, keepdim=True) / (~empty).sum(2, keepdim=True).clamp(min=1)
            count = self.N
        else:
            count = int((~empty).sum()) // right.shape[1]
        L, R = torch.einsum("vngtp,vngts->gps", left, left), torch.einsum("ngtq,ngts->gqs", right, right)
        rows, columns = (R, L / max(1, count)) if uses[0].flip else (L, R / max(1, count))
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(rows, columns, strict=True)))

    def _positions(self, u: Use, v: Tensor) -> tuple[Tensor, Tensor]:
        """left [V N G T p] and right [N G T q] with the samples apart from all other rows."""
        assert u.rows is not None
        left, right = u.pull(v).detach(), dense_right(u, slice(None))
        at, (a, N, b) = list(u.rows).index(self.net.axis), self.net.split
        sizes = [self.net.z.shape[i] for i in u.rows]
        split = math.prod(sizes[:at]) * a, N, b * math.prod(sizes[at + 1 :])
        left = (
            left.unflatten(1, split).permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5)
        )  # [V a N b G T p] -> [V N G (a b T) p]
        return left, right.unflatten(0, split).permute(1, 3, 0, 2, 4, 5).flatten(2, 4)

    # --- what K-BFGS reads --------------------------------------------------------------------------------------------

    def _check_means(self) -> None:
        """The mean output must be W times the mean input plus the bias, and the mean gradient that of the bias."""
        net = self.net
        readings = Readings(net, self.params)
        with readings.evaluation(moments=True):
            f = net(*case_data(self.case))
            grads = dict(zip(self.params, torch.autograd.grad((f - self.y).square().sum(), list(self.params.values()),
                                                              allow_unused=True), strict=True))  # fmt: skip
        means = readings.means()
        for name in net.places:
            if name not in means or readings.layers[name].weight == "head":
                continue
            layer, m = readings.layers[name], means[name]
            W = self.params[name].detach()
            W = W.T if layer.flip else W.flatten(1)
            W = W if layer.bias is None else torch.cat([W, self.params[layer.bias].detach().unsqueeze(1)], 1)
            self._equal("K-BFGS's mean output", name, m.h, W @ m.a, "W times the mean input")
            if layer.bias is not None and grads[layer.bias] is not None:
                expected = grads[layer.bias] / m.positions
                self._equal("K-BFGS's mean gradient", name, m.g, expected, "the bias's gradient")


def case_data(case: Case) -> tuple[Tensor, ...]:
    tensors = case.arguments()
    return tuple(tensors[i] for i in case.data)
