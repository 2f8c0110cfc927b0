"""Random networks, drawn by hypothesis, against loops of autograd: whatever is composed is right or refused."""

import losses_table
import oracle
import torch
from architectures import images, mixes, sequences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import close

import paraboloid as pb
from paraboloid.data.batches import call


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    drawn=st.one_of(images(), sequences()),
    n=st.integers(2, 5),
    loss_name=st.sampled_from(sorted(losses_table.LOSSES)),
    seed=st.integers(0, 99),
)
def test_random_networks(drawn, n, loss_name, seed):
    model, shape = drawn
    model = model.double().eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_(0, 0.5)
        x = torch.randn(n, *shape).double()
    f = call(model, x)
    loss_fn, y = losses_table.make(loss_name, f, seed)
    params = dict(model.named_parameters())
    wanted = ["grad", "sample_grads", "square_norms", "gram", "second_moment", "variance", "diag_ggn"]
    try:
        stats = pb.statistics(model, loss_fn, (x, y), wanted)
    except ValueError as error:
        assert mixes(model), error
        assert "does not separate" in str(error)
        return  # where dead activations stop the mixing it is accepted, and must then be right
    g = oracle.sample_grads(loss_fn, f, y, params)
    diagonal, a = oracle.sample_diag_ggn(loss_fn, f, y, params), oracle.factor(loss_fn, f, y)
    for k in params:
        flat = g[k].flatten(1)
        close(stats["sample_grads"][k], g[k], k)
        close(stats["grad"][k], a * g[k].sum(0), k)
        close(stats["square_norms"][k], flat.square().sum(1), k)
        close(stats["gram"][k], flat @ flat.T, k)
        close(stats["second_moment"][k], g[k].square().mean(0), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        close(stats["diag_ggn"][k], a * diagonal[k].sum(0), k)
