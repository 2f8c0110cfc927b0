"""One answer to "which parameters are one layer", wherever it is asked."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.nn.utils import weight_norm as weight_norm_by_hook

import paraboloid as pb
from paraboloid.jobs.inspection.subject import layers
from paraboloid.logging import scalars
from paraboloid.operators.partition import resolve_blocks
from paraboloid.passes import trees
from paraboloid.passes.parameter_layers import layer_of, layers_of
from paraboloid.passes.torch_internals import WRAPPERS
from paraboloid.posteriors import load_posterior
from paraboloid.posteriors.prior_tuning.evidence import groups_of


class Gain(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((3, 1), 0.5))

    def forward(self, weight):
        return self.gain * weight


class Root(nn.Module):
    """Parameters of the model itself around nested modules, one of which uses another's weight again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.zeros(3))
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"deep": nn.Linear(3, 3)}))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.block[0].weight

    def forward(self, x):
        return self.tied(self.block[1]["deep"](self.block[0](x))) * self.scale + self.shift


class LowRank(nn.Module):
    """A linear layer with a trainable pair of thin ones beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(3, 3), nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def linear(change=lambda layer: layer):
    return nn.Sequential(change(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3))


def gained(layer):
    parametrize.register_parametrization(layer, "weight", Gain())
    return layer


def by_hook(change):
    def changed(layer):
        with pytest.warns(FutureWarning) if change is weight_norm_by_hook else torch.no_grad():
            return change(layer)

    return changed


SECOND = {"2": ["2.weight", "2.bias"]}
MODELS = {
    "plain": (linear, {"0": ["0.weight", "0.bias"], **SECOND}),
    "weight_norm": (lambda: linear(parametrizations.weight_norm),
                    {"0": ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
                     **SECOND}),
    "weight_norm by hook": (lambda: linear(by_hook(weight_norm_by_hook)),
                            {"0": ["0.bias", "0.weight_g", "0.weight_v"], **SECOND}),
    "spectral_norm": (lambda: linear(parametrizations.spectral_norm),
                      {"0": ["0.bias", "0.parametrizations.weight.original"], **SECOND}),
    "spectral_norm by hook": (lambda: linear(by_hook(spectral_norm_by_hook)),
                              {"0": ["0.bias", "0.weight_orig"], **SECOND}),
    "orthogonal": (lambda: linear(parametrizations.orthogonal),
                   {"0": ["0.bias", "0.parametrizations.weight.original"], **SECOND}),
    "a user's parametrization": (lambda: linear(gained),
                                 {"0": ["0.bias", "0.parametrizations.weight.original",
                                        "0.parametrizations.weight.0.gain"], **SECOND}),
    "two parametrizations": (lambda: linear(lambda layer: gained(parametrizations.weight_norm(layer))),
                             {"0": ["0.bias", "0.parametrizations.weight.original0",
                                    "0.parametrizations.weight.original1", "0.parametrizations.weight.1.gain"],
                              **SECOND}),
    "a layer": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
                {"bias + parametrizations.weight.original0 + parametrizations.weight.original1":
                 ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]}),
    "the model's own": (Root, {"scale + shift": ["scale", "shift"], "block.0": ["block.0.weight", "block.0.bias"],
                               "block.1.deep": ["block.1.deep.weight", "block.1.deep.bias"], "tied": ["tied.bias"]}),
    "a low-rank pair": (LowRank, {"down": ["down.weight"], "up": ["up.weight"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_operators_priors_noise_logging_and_report_are_the_same(name):
    make, expected = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double().eval()
        batch = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    parameters = trees.parameters(model)
    assert layers_of(parameters) == expected

    blocks = resolve_blocks(parameters, "layer") or []
    assert [[list(parameters)[i] for i in block] for block in blocks] == list(expected.values())
    assert groups_of(parameters, "layer") == list(expected.values())
    assert list(pb.noise.measures(model, nn.MSELoss(), batch).layers) == list(expected)
    assert {layer.name: list(layer.parameters) for layer in layers(model)} == expected
    numbers = scalars(pb.statistics(model, nn.MSELoss(), batch, "grad"))
    logged = {tag.split("/")[1] for tag in numbers if tag.count("/") == 2}
    assert logged == (set(expected) if len(expected) > 1 else set())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_no_part_of_a_layer(wrapper):
    assert layer_of(f"{wrapper}a.{wrapper}b.weight") == "a.b"
    assert layer_of(f"{wrapper}weight") == ""


def test_kinds_are_those_before_a_parametrization():
    assert [layer.kind for layer in layers(MODELS["weight_norm"][0]())] == ["Linear", "Linear"]


def test_a_saved_posterior_keeps_the_priors_that_split_a_layer(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    model, y = linear(parametrizations.weight_norm), torch.arange(8) % 3
    posterior = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), structure="diag")
    split = {name: float(i + 1) for i, name in enumerate(posterior.weights)}
    posterior.prior_precision = split
    posterior.save(tmp_path / "posterior.pt")
    loaded = load_posterior(tmp_path / "posterior.pt", model, nn.CrossEntropyLoss())
    assert loaded.prior_precision == split
    loaded.tune_prior("evidence", per="layer", steps=2)
    tuned = loaded.prior_precision
    assert len({tuned[name] for name in tuned if name.startswith("0.")}) == 1
