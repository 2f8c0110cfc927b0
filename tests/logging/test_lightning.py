"""Lightning: the callback in a real training, next to one without it."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb
from paraboloid.logging import scalars


@pytest.fixture(scope="module")
def pl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip("lightning.pytorch", reason="install it with: pip install 'paraboloid[lightning]'")


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 4, generator=generator), torch.randint(3, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def train(pl, callbacks, norm=False, **options):
    """(the trained module, what was logged: (step, metrics))."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)]
            self.net = nn.Sequential(*layers)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Logger(pl.loggers.Logger):
        name, version = "list", 0

        def __init__(self):
            super().__init__()
            self.found = []

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.found.append((step, dict(metrics)))

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of Lightning's advice
        torch.manual_seed(0)
        module, logger = Module(), Logger()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=logger, callbacks=callbacks, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1000, **options,
        )  # fmt: skip
        trainer.fit(module, data())
    return module, logger.found


def test_numbers_are_logged_and_the_training_does_not_notice(pl):
    plain, _ = train(pl, [])
    callback = pb.logging.LightningCallback(nn.CrossEntropyLoss(), ["grad", "variance", "diag_ggn_mc"], every=2)
    module, logged = train(pl, [callback])
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [step for step, _ in logged] == [0, 2, 4]
    numbers = logged[0][1]
    assert {"paraboloid/loss", "paraboloid/variance/net.0/norm", "paraboloid/noise_to_signal/net.3"} < set(numbers)
    assert all(isinstance(v, float) for v in numbers.values())


def test_the_numbers_are_those_of_the_batch(pl):
    """Of the first one, in eval mode, as the comparison is; the modes are put back."""
    options = {"every": 1, "eval_mode": True, "prefix": "p", "per": "model", "model": lambda module: module.net}
    callback = pb.logging.LightningCallback(nn.CrossEntropyLoss(), "variance", **options)
    with torch.random.fork_rng():
        module, logged = train(pl, [callback], norm=True, limit_train_batches=1)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = type(module)().net.eval()  # as it was before its first step
    expected = scalars(pb.statistics(net, nn.CrossEntropyLoss(), next(iter(data())), "variance"), per="model")
    assert logged == [(0, {f"p/{k}": pytest.approx(v) for k, v in expected.items()})]
    assert all(m.training for m in module.net.modules())


def test_once_per_step_under_accumulation_and_in_the_trainers_precision(pl):
    seen = []

    def pick(f):
        seen.append(f.dtype)
        return f

    callback = pb.logging.LightningCallback(nn.CrossEntropyLoss(), "grad", every=1, batch=tuple, output=pick)
    _, logged = train(pl, [callback], accumulate_grad_batches=2, precision="bf16-mixed")
    assert [step for step, _ in logged] == [0, 1, 2] and seen == 3 * [torch.bfloat16]
    assert 0 < logged[0][1]["paraboloid/loss"] < 3


def test_a_wrong_interval_is_refused(pl):
    with pytest.raises(ValueError, match="every is 0; expected an integer >= 1"):
        pb.logging.LightningCallback(nn.CrossEntropyLoss(), every=0)


def test_lightning_is_not_imported_unless_used_and_the_error_says_what_to_install():
    code = """
import sys
import paraboloid as pb
pb.logging.scalars
assert not {"lightning", "pytorch_lightning", "tensorboard"} & set(sys.modules)
sys.modules["lightning.pytorch"] = None
try:
    pb.logging.LightningCallback
except ImportError as e:
    assert "pip install 'paraboloid[lightning]'" in str(e), e
else:
    raise AssertionError
try:
    pb.logging.Callback
except AttributeError as e:
    assert "has no attribute 'Callback'; expected one of" in str(e), e
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
