"""A loss against autograd in output space, and against draws from its own predictive distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paraboloid.losses import Loss
from paraboloid.testing.comparison import RTOL, check_equal

ERRORS = 5.0  # standard errors within which an expectation must lie


def check_loss(loss: Loss | nn.Module, outputs: Tensor, targets: Tensor, *, draws: int = 2000, seed: int = 0) -> None:
    """Check a `pb.Loss` in everything that it gives, against double backward passes through its `sample_losses`.

        pb.testing.check_loss(Dice(), torch.randn(3, 1, 4, 4), masks)

    outputs  f [N, ...], as a model would return them, with N >= 2; few elements suffice
    targets  y, one for each sample
    draws    labels drawn to check `sample_targets`; 0 leaves that out, where the labels are only approximately those of
             the loss
    seed     of these draws

    In float64: one number for each sample, which stays the same alone and in a batch; the value as their sum over
    `normalizer`, which adds up over batches; `gradient`; `hessian_product` for several vectors; `hessian_root`, whose
    squares add up to the Hessian (with psd = "clip", to the Hessian without its negative eigenvalues; or where it is
    indefinite, to the Fisher information that the labels show), `curvature_product` and `curvature_at` to match;
    multiples and sums.
    Of sampled labels: that they follow the generator alone; that their gradients have mean zero and a mean square equal
    to the mean Hessian at these labels (or, where the class gives `sampled_gradients`, to the root's squares), all
    within 5 standard errors.  What raises NotImplementedError is left out.

    Raises AssertionError, which says what is off, at which entry, and by how much.
    """
    if isinstance(loss, nn.Module):
        torch_value = loss(outputs.double(), _double(targets))
        loss = Loss.from_torch(loss)
        check_equal(loss.value(outputs.double(), _double(targets)), torch_value, "the value", "the module itself")
    if len(outputs) < 2:
        raise ValueError(f"outputs has {len(outputs)} samples; expected at least 2, to see that they are separate.")
    check = _Check(loss, outputs.detach().double(), _double(targets))
    check.samples()
    check.value()
    check.gradient()
    check.hessian()
    check.root()
    check.algebra()
    if draws:
        check.labels(draws, seed)


class _Check:
    def __init__(self, loss: Loss, f: Tensor, y: Tensor):
        self.loss, self.f, self.y, self.name = loss, f, y, type(loss).__name__
        try:
            loss.check(f, y)
        except ValueError as e:
            raise AssertionError(str(e)) from e
        self.a = 1 / loss.normalizer(f, y)
        self.H = _hessians(loss, f, y)  # [N, C, C]
        self.squares: Tensor | None = None  # of the root

    def _equal(self, found: Tensor, expected: Tensor, what: str, by: str = "autograd") -> None:
        check_equal(found, expected, f"{self.name}.{what}", by)

    def samples(self) -> None:
        for term in self.loss.terms:  # of a sum, whose weights may depend on the number of samples
            each = term.sample_losses(self.f, self.y)
            alone = torch.cat([term.sample_losses(self.f[n : n + 1], self.y[n : n + 1]) for n in range(len(self.f))])
            self._equal(each, alone, "sample_losses of the batch", "the samples one by one")

    def value(self) -> None:
        loss, f, y = self.loss, self.f, self.y
        self._equal(loss.value(f, y), self.a * loss.sample_losses(f, y).sum(), "value", "sample_losses and normalizer")
        if loss.reduction != "sum" and len(loss.terms) == 1:
            parts = sum(loss.normalizer(f[s], y[s]) for s in (slice(None, 1), slice(1, None)))
            self._equal(torch.tensor(loss.normalizer(f, y)), torch.tensor(parts), "normalizer",
                        "adding up those of two parts of the batch")  # fmt: skip
        leaf = f.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf, y), leaf)
        self._equal(self.a * loss.gradient(f, y), g, "gradient over the normalizer", "a backward pass of the loss")

    def gradient(self) -> None:
        leaf = self.f.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss.sample_losses(leaf, self.y).sum(), leaf)
        self._equal(self.loss.gradient(self.f, self.y), g, "gradient")
        single = self.loss.gradient(self.f.float(), self.y.float() if self.y.is_floating_point() else self.y)
        if single.dtype != torch.float32:
            raise AssertionError(f"{self.name}.gradient is {single.dtype} for float32 outputs; expected float32.")

    def hessian(self) -> None:
        u = _normal(2, *self.f.shape)
        expected = torch.einsum("ncd,knd->knc", self.H, _flat(u)).reshape(u.shape)
        self._equal(self.loss.hessian_product(self.f, self.y, u), expected, "hessian_product, [vectors, *outputs],")

    def root(self) -> None:
        loss, f = self.loss, self.f
        indefinite = torch.linalg.eigvalsh(self.H).amin() < -1e-9 * self.H.abs().max()
        try:
            root = torch.stack(list(loss.hessian_root(f, self.y)))
        except NotImplementedError:
            return
        except ValueError:
            if indefinite and loss.psd == "raise":
                return  # as it should
            raise
        if len(root) != loss.root_columns(f) or root.shape[1:] != f.shape:
            raise AssertionError(f"{self.name}.hessian_root yields {len(root)} vectors {list(root.shape[1:])}; "
                                 f"expected root_columns(f) = {loss.root_columns(f)} like the outputs.")  # fmt: skip
        rows = _flat(root)
        self.squares = torch.einsum("vnc,vnd->ncd", rows, rows)
        expected, what = self.H, "hessian_root: the sum of its squares"
        if indefinite:
            values, vectors = torch.linalg.eigh(self.H)
            clipped = vectors @ (values.clamp(min=0).unsqueeze(2) * vectors.mT)
            expected = self.squares if self._near(self._fisher()) else clipped
            what = f"{what} (of an indefinite Hessian, the negative eigenvalues are zero)"
        self._equal(self.squares, expected, what)
        u = _normal(2, *f.shape)
        product = torch.einsum("ncd,knd->knc", self.squares, _flat(u)).reshape(u.shape)
        self._equal(loss.curvature_product(f, self.y, u), product, "curvature_product, [vectors, *outputs],",
                    "hessian_root")  # fmt: skip
        again = loss.curvature_at(f, self.y)
        for what, v, expected in (("one vector", u[0], product[0]), ("[vectors, *outputs]", u, product)):
            self._equal(again(v), expected, f"curvature_at, {what},", "hessian_root")

    def _near(self, moments: tuple[Tensor, Tensor] | None) -> bool:
        if moments is None or self.squares is None:
            return False
        mean, error = moments
        return bool(((mean - self.squares).abs() <= ERRORS * error + 1e-9 * self.squares.abs().max()).all())

    def _fisher(self) -> tuple[Tensor, Tensor] | None:
        """E[s s^T] of sampled gradients and its standard error; None where no labels can be drawn."""
        try:
            rows = torch.stack(list(self.loss.sampled_gradients(self.f, self.y, 2000, _generator(1))))
        except NotImplementedError:
            return None
        return _moments(_squares(rows) * len(rows))

    def algebra(self) -> None:
        f, y, loss = self.f, self.y, self.loss
        for combined, scale, words in ((2 * loss, 2.0, "2 * loss"), (loss + loss, 2.0, "loss + loss")):
            by = f"{scale:g} times the loss's own"
            if combined.normalizer(f, y) != loss.normalizer(f, y):
                raise AssertionError(f"{self.name}: {words} has the normalizer {combined.normalizer(f, y)}; expected "
                                     f"the loss's own, {loss.normalizer(f, y)}.")  # fmt: skip
            self._equal(combined.value(f, y), scale * loss.value(f, y), f"value of {words}", by)
            self._equal(combined.gradient(f, y), scale * loss.gradient(f, y), f"gradient of {words}", by)
            self._equal(combined.hessian_product(f, y, f), scale * loss.hessian_product(f, y, f),
                        f"hessian_product of {words}", by)  # fmt: skip

    def labels(self, draws: int, seed: int) -> None:
        loss, f, y = self.loss, self.f, self.y
        state = torch.get_rng_state()
        try:
            one, two = (torch.stack(list(loss.sampled_gradients(f, y, 2, _generator(seed)))) for _ in range(2))
        except NotImplementedError:
            return
        if not torch.equal(one, two) or not torch.equal(state, torch.get_rng_state()):
            raise AssertionError(f"{self.name}: sampled labels differ for the same generator, or move torch's global "
                                 "one; expected that they come from the given generator alone.")  # fmt: skip
        if type(loss).sampled_gradients is not Loss.sampled_gradients:
            if self.squares is not None:
                rows = torch.stack(list(loss.sampled_gradients(f, y, draws, _generator(seed)))) * draws**0.5
                self._expect("sampled_gradients: the mean of their squares", _moments(_squares(rows)), self.squares,
                             "hessian_root")  # fmt: skip
            return
        generator = _generator(seed)
        drawn = [loss.sample_targets(f, generator) for _ in range(draws)]
        loss.check(f, drawn[0])
        rows = torch.stack([loss.gradient(f, t) for t in drawn])
        self._expect("gradient: its mean over labels of sample_targets", _moments(rows), torch.zeros_like(f),
                     "any likelihood (the mean score)")  # fmt: skip
        hessians = _hessians(loss, f.repeat(draws, *[1] * (f.dim() - 1)), torch.cat(drawn))  # samples are separate
        differences = _squares(rows) - hessians.unflatten(0, (draws, len(f)))
        self._expect("gradient: over labels of sample_targets, the mean of its squares less the Hessian",
                     _moments(differences), 0 * self.H, "any likelihood (the information identity)")  # fmt: skip

    def _expect(self, what: str, moments: tuple[Tensor, Tensor], expected: Tensor, by: str) -> None:
        mean, error = moments
        off = (mean - expected).abs()
        bound = ERRORS * error + RTOL * (1 + expected.abs().max())
        if (off <= bound).all():
            return
        at = tuple(int(i) for i in torch.unravel_index((off - bound).argmax(), off.shape))
        raise AssertionError(
            f"{self.name}.{what}: entry {list(at)} is {float(mean[at]):.5g}, expected {float(expected[at]):.5g} by "
            f"{by}: off by {float(off[at] / error[at].clamp(min=1e-300)):.3g} standard errors of {float(error[at]):.2g}"
            f"; expected at most {ERRORS:g}."
        )


def _hessians(loss: Loss, f: Tensor, y: Tensor) -> Tensor:
    """Second derivatives of each sample's loss, [N, C, C], one row at a time."""
    leaf = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss.sample_losses(leaf, y).sum(), leaf, create_graph=True)
    g = g.reshape(len(f), -1)
    if not g.requires_grad:
        return f.new_zeros(len(f), g.shape[1], g.shape[1])
    rows = [
        torch.autograd.grad(g[:, c].sum(), leaf, retain_graph=True, allow_unused=True)[0] for c in range(g.shape[1])
    ]
    return torch.stack([f.new_zeros(g.shape) if r is None else r.reshape(len(f), -1) for r in rows], 1)


def _flat(rows: Tensor) -> Tensor:
    """[V N ...] -> [V N C]."""
    return rows.reshape(*rows.shape[:2], -1)


def _squares(rows: Tensor) -> Tensor:
    """s s^T per sample and vector, [V N C C]."""
    rows = _flat(rows)
    return rows.unsqueeze(3) * rows.unsqueeze(2)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over axis 0 and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(2), dtype=torch.float64)


def _double(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t
