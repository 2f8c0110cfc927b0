"""Numbers for loggers: each against the tensors it is made of."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.logging import scalars


def setup(groups=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=groups), nn.Flatten(), nn.Linear(16, 3)).double()
        return model, (torch.randn(5, 2, 3, 3).double(), torch.randn(5, 3).double())


@pytest.mark.parametrize("groups", [1, 2])
def test_numbers_of_layers_parameters_and_the_model(groups):
    model, batch = setup(groups)
    wanted = ["grad", "variance", "square_norms", "gram", "kfac", "kflr", "diag_ggn"]
    stats = pb.statistics(model, nn.MSELoss(), batch, wanted)
    found = {per: scalars(stats, per=per) for per in ("parameter", "layer", "model")}
    assert all(isinstance(v, float) for numbers in found.values() for v in numbers.values())
    assert set(found["model"]) < set(found["layer"]) and found["model"]["loss"] == float(stats.loss)
    members = {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"], "": list(stats["grad"])}
    for layer, names in members.items():
        at = f"/{layer}" if layer else ""
        for q in ("grad", "variance", "diag_ggn"):
            flat = torch.cat([stats[q][k].flatten() for k in names])
            assert found["layer"][f"{q}{at}/mean"] == pytest.approx(flat.mean().item())
            assert found["layer"][f"{q}{at}/norm"] == pytest.approx(flat.norm().item())
        for q in ("kfac", "kflr"):
            blocks = [stats[q][k].to_dense() for k in names]
            diagonal = torch.cat([b.diagonal() for b in blocks])
            assert found["layer"][f"{q}{at}/mean"] == pytest.approx(diagonal.mean().item())
            norm = sum(b.square().sum() for b in blocks) ** 0.5
            assert found["layer"][f"{q}{at}/norm"] == pytest.approx(norm.item())
        squares = sum(stats["square_norms"][k] for k in names)
        assert found["layer"][f"square_norms{at}/mean"] == pytest.approx(squares.mean().item())
        assert found["layer"][f"square_norms{at}/max"] == pytest.approx(squares.max().item())
        gram = sum(stats["gram"][k] for k in names)
        assert found["layer"][f"gram{at}/norm"] == pytest.approx(gram.norm().item())
    g = stats["grad"]["2.weight"]
    assert found["parameter"]["grad/2.weight/norm"] == pytest.approx(g.norm().item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_to_signal_is_the_same_for_every_reduction(reduction):
    model, batch = setup()
    stats = pb.statistics(model, nn.MSELoss(reduction=reduction), batch, ["grad", "variance", "sample_grads"])
    g = torch.cat([v.flatten(1) for v in stats["sample_grads"].values()], 1)
    expected = g.var(0).sum() / (g.mean(0).square().sum() - g.var(0).sum() / len(g))
    found = scalars(stats, per="model")
    assert found["noise_to_signal"] == pytest.approx(expected.item())
    assert set(found) == {
        "loss", "noise_to_signal", *(f"{q}/{n}" for q in ("grad", "variance", "sample_grads") for n in ("mean", "norm"))
    }  # fmt: skip


def test_a_parameter_of_the_model_itself_and_a_wrong_choice():
    stats = pb.statistics(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 1)), "grad")
    assert set(scalars(stats)) == {"loss", "grad/mean", "grad/norm"}
    with pytest.raises(ValueError, match="per is 'module'; expected one of"):
        scalars(stats, per="module")
