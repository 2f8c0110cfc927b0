"""Operators with structure as plain dictionaries of tensors, and back: for `torch.save` and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from paraboloid.linalg.eigenform import Basis, Eigenform
from paraboloid.linalg.kronecker_product import KroneckerProduct, Side
from paraboloid.operators.algebra import Identity, Scaled, Sum
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.operators.structured.low_rank import LowRank
from paraboloid.passes import trees

State = dict[str, Any]


def state_of(A: LinearOperator) -> State:
    """The operator as a dictionary of tensors, numbers and strings; it shares the operator's tensors.

    Raises NotImplementedError for one that is known by its products alone.
    """
    state: State = {"kind": type(A).__name__, "parameters": {k: list(p.shape) for k, p in A.parameters.items()}}
    if isinstance(A, KroneckerFactored):
        found: State = {
            "factors": {k: [[s.kind, s.data] for s in (p.left, p.right)] for k, p in A.products.items()}
        }  # fmt: skip
    elif isinstance(A, Diagonalised):
        found = {"blocks": A.blocks, "forms": [_of_form(form) for form in A.forms]}
    elif isinstance(A, BlockDiagonal):
        found = {"blocks": A.blocks, "matrices": A.matrices}
    elif isinstance(A, LowRank):
        found = {"vectors": A.vectors, "values": A.values, "diagonal": A.remainder}
    elif isinstance(A, Identity):
        found = {}
    elif isinstance(A, Scaled):
        found = {"scale": A.scale, "operator": state_of(A.operator)}
    elif isinstance(A, Sum):
        found = {"terms": [state_of(term) for term in A.terms]}
    else:
        raise NotImplementedError(
            f"{type(A).__name__} is known by its products alone, so it has no state; expected an operator with "
            "structure. Save its dense matrix (to_dense()), or eigenpairs as pb.operators.LowRank.from_operator(A, k)."
        )
    return state | found


def load(state: State, model: nn.Module | Mapping[str, Tensor]) -> LinearOperator:
    """The operator that `state_dict` described, over the parameters of a model (or a dict of them by name).

    Raises ValueError where names or shapes are not those of the operator that was saved, and for an unknown kind.
    """
    parameters = trees.parameters(model) if isinstance(model, nn.Module) else model
    detached = {k: p.detach() for k, p in parameters.items()}
    expected = {k: list(p.shape) for k, p in detached.items()}
    if list(state["parameters"].items()) != list(expected.items()):
        raise ValueError(f"the state is that of an operator over {state['parameters']}; expected the model's "
                         f"parameters {expected}.")  # fmt: skip
    kind = state["kind"]
    if kind == "KroneckerFactored":
        return KroneckerFactored(detached, {
            k: KroneckerProduct(*(Side(kind, data) for kind, data in sides)) for k, sides in state["factors"].items()
        })  # fmt: skip
    if kind == "Diagonalised":
        return Diagonalised(detached, [_form(f) for f in state["forms"]], state["blocks"])
    if kind == "BlockDiagonal":
        return BlockDiagonal(detached, state["blocks"], state["matrices"])
    if kind == "LowRank":
        return LowRank(detached, state["vectors"], state["values"], state["diagonal"])
    if kind == "Identity":
        return Identity(detached)
    if kind == "Scaled":
        return Scaled(load(state["operator"], detached), state["scale"])
    if kind == "Sum":
        return Sum(*(load(term, detached) for term in state["terms"]))
    raise ValueError(f"the state is of kind {kind!r}, which is not known; expected what state_dict() returned.")


def _of_form(form: Eigenform) -> State:
    sides = {"left": [form.left.vectors, form.left.size], "right": [form.right.vectors, form.right.size]}
    return {"values": form.values, "rest": form.rest, **sides}


def _form(state: State) -> Eigenform:
    return Eigenform(Basis(*state["left"]), Basis(*state["right"]), state["values"], state["rest"])
