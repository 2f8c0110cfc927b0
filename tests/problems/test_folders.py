"""Files of MNIST, CIFAR and ImageNet, written here in their own formats, are read as they are."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from idx_files import idx, pixels, write_mnist

import paraboloid as pb
from paraboloid import problems
from paraboloid.problems import networks
from paraboloid.problems.folders import Pictures, cifar10, cifar100, mnist


def write_cifar10(folder, N=4):
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        x, y = pixels(N, seed=i), [(i + n) % 10 for n in range(N)]
        (folder / name).write_bytes(pickle.dumps({b"data": x.reshape(N, -1), b"labels": y}, protocol=2))
        found.append((x, y))
    return found


def write_pictures(folder, classes=("cat", "dog"), each=2):
    from PIL import Image

    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                image = np.full((40, 60, 3), 40 * c + 10 * i, np.uint8)
                Image.fromarray(image).save(folder / split / name / f"{i}.png")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sub", ["", "MNIST/raw"])
def test_mnist(tmp_path, zipped, sub):
    written = write_mnist(tmp_path / sub, zipped)
    for (x, y), (want, labels) in zip(mnist(tmp_path), written, strict=True):
        assert x.shape == (6, 1, 28, 28) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert np.array_equal(x[:, 0], want) and np.array_equal(y, labels)


def test_cifar10_python_and_binary(tmp_path):
    written = write_cifar10(tmp_path / "a" / "cifar-10-batches-py")
    (train, labels), (test, _) = cifar10(tmp_path / "a")
    assert train.shape == (20, 3, 32, 32) and test.shape == (4, 3, 32, 32)
    assert np.array_equal(train, np.concatenate([x for x, _ in written[:5]]))
    assert labels.tolist() == [y for _, ys in written[:5] for y in ys]
    (tmp_path / "b").mkdir()
    for name, (x, y) in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], written, strict=True):
        records = np.concatenate([np.array(y, np.uint8)[:, None], x.reshape(4, -1)], 1)
        records.tofile(tmp_path / "b" / f"{name}.bin")
    for ours, theirs in zip(cifar10(tmp_path / "b"), cifar10(tmp_path / "a"), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_cifar100_python_and_binary(tmp_path):
    for i, name in enumerate(("train", "test")):
        x, y = pixels(3, seed=i), [5, 99, i]
        found = {b"data": x.reshape(3, -1), b"fine_labels": y, b"coarse_labels": [0, 0, 0]}
        (tmp_path / name).write_bytes(pickle.dumps(found))
        (tmp_path / "cifar-100-binary").mkdir(exist_ok=True)
        two = np.stack([np.zeros(3, np.uint8), np.array(y, np.uint8)], 1)
        np.concatenate([two, x.reshape(3, -1)], 1).tofile(tmp_path / "cifar-100-binary" / f"{name}.bin")
    (x, y), _ = cifar100(tmp_path)
    (z, w), _ = cifar100(tmp_path / "cifar-100-binary")
    assert torch.equal(x, z) and y.tolist() == w.tolist() == [5, 99, 0]


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    write_cifar10(tmp_path)

    class Evil:
        def __reduce__(self):
            return (print, ("gotcha",))

    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_3 is not a file.*builtins.print"):
        cifar10(tmp_path)


DATA = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize("written, said", [
    (b"\x8c\x04\xff\xff\xff\xff.", "is not a file of the Python version of CIFAR"),
    (b"\x8d" + 8 * b"\xff", "is not a file of the Python version of CIFAR"),
    (pickle.dumps({b"data": DATA[:, :3000], b"labels": [1, 2]}), r"its data are \[2, 3000\] of uint8 for 2 labels"),
    (pickle.dumps({b"data": DATA / 2, b"labels": [1, 2]}), r"its data are \[2, 3072\] of float64"),
    (pickle.dumps({b"data": DATA, b"labels": ["a", "b"]}), "is not a file of the Python version of CIFAR"),
    (pickle.dumps({b"data": DATA, b"labels": [1, -100]}), "hold labels from -100 to 9; expected 0 to 9"),
])  # fmt: skip
def test_damaged_pickles(tmp_path, written, said):
    write_cifar10(tmp_path, N=10)
    (tmp_path / "data_batch_2").write_bytes(written)
    with pytest.raises(ValueError, match=said):
        cifar10(tmp_path)


def test_pictures(tmp_path):
    write_pictures(tmp_path)
    dataset = Pictures(tmp_path / "train", size=28)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 4
    image, label = dataset[3]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32 and label == 1
    mean, spread = torch.tensor(Pictures.MEAN), torch.tensor(Pictures.SPREAD)
    torch.testing.assert_close(image[:, 0, 0], (50 / 255 - mean) / spread)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0.png is no picture that can be read"):
        dataset[0]
    header = (tmp_path / "train" / "cat" / "1.png").read_bytes()
    (tmp_path / "train" / "cat" / "1.bmp").write_bytes(
        b"BM" + bytes(12) + b"(\0\0\0" + b"\0\0\4\0" * 2 + b"\1\0\x18\0" + bytes(24)
    )
    (tmp_path / "train" / "cat" / "1.png").write_bytes(header[:60])
    for i in (1, 2):  # too large to be opened, and cut off
        with pytest.raises(ValueError, match=r"1.(bmp|png) is no picture that can be read"):
            Pictures(tmp_path / "train", size=28)[i]
    (tmp_path / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"has the classes \['emu'\]"):
        Pictures(tmp_path / "val", classes=dataset.classes)
    with pytest.raises(FileNotFoundError, match="has no subfolders"):
        Pictures(tmp_path / "nowhere")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="have no pictures"):
        Pictures(tmp_path / "empty")


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no train-images-idx3-ubyte in"):
        mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found neither data_batch_1 nor data_batch_1.bin"):
        cifar10(tmp_path)
    write_mnist(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"holds 4699 bytes of data; expected 4704"):
        mnist(tmp_path)
    path.write_bytes(idx(np.zeros(3, np.uint8), 2049))
    with pytest.raises(ValueError, match="magic number 2049; expected 2051, that of an idx file of images"):
        mnist(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8), 2049))
    with pytest.raises(ValueError, match="train files hold 6 images and 3 labels"):
        mnist(tmp_path)
    path.write_bytes(whole[:9])
    with pytest.raises(ValueError, match="has 9 bytes; expected at least the 16 of an idx file's header"):
        mnist(tmp_path)
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(whole)[:-40])
    with pytest.raises(ValueError, match=r"ubyte.gz cannot be decompressed .*; expected a whole file of gzip"):
        mnist(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"has 3 bytes; expected a multiple of 3074"):
        cifar100(tmp_path)
    with pytest.raises(ValueError, match="the data of MNIST is not shipped; expected --data DIR"):
        problems.load("mnist-mlp")


@pytest.mark.parametrize("name", ["mnist-mlp", "mnist-cnn", "mnist-autoencoder"])
def test_problems_on_mnist(tmp_path, name):
    write_mnist(tmp_path)
    problem = problems.load(name, data=str(tmp_path))
    x, y = problem.train[:]
    loss = problem.loss_fn(problem.model(x), y)
    assert loss.isfinite() and len(problem.test) == 6
    if name != "mnist-autoencoder":
        torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["cifar10-resnet8", "cifar10-resnet32", "cifar10-allcnnc"])
def test_problems_on_cifar10(tmp_path, name):
    write_cifar10(tmp_path)
    problem = problems.load(name, data=str(tmp_path))
    assert problem.loss_fn(problem.model(problem.train[:4][0]), problem.train[:4][1]).isfinite()


@pytest.mark.parametrize("name", ["imagenet-resnet18", "imagenet-resnet50"])
def test_problems_on_pictures(tmp_path, name):
    write_pictures(tmp_path)
    problem = problems.load(name, data=str(tmp_path))
    x, y = problems.read(problem.train, torch.tensor([0, 3]), torch.device("cpu"))
    assert problem.model(x).shape == (2, 2) and y.tolist() == [0, 1]


def test_posterior_samples_from_a_loader_of_pictures(tmp_path):
    """ImageNet's format, read again on every pass."""
    write_pictures(tmp_path)
    loader = torch.utils.data.DataLoader(Pictures(tmp_path / "train", size=16), batch_size=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 2, 3, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2)
        )
    with pytest.warns(RuntimeWarning, match="the relative residual of a sample is .* 2 epochs of descent did not do"):
        streamed = pb.sampled_laplace(
            model, torch.nn.CrossEntropyLoss(), loader, 2, em_steps=0, solver="sgd", epochs=2, max_memory=1
        )
    kept = pb.sampled_laplace(model, torch.nn.CrossEntropyLoss(), list(loader), 2, em_steps=0)
    assert kept.history[-1].residual < streamed.history[-1].residual < 10
    assert streamed.predict(next(iter(loader))[0]).sum(1).allclose(torch.ones(2))


def test_networks_have_their_published_sizes():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(networks.all_cnn_c(100)) == 1_387_108
    assert count(networks.resnet18(1000)) == 11_689_512
    assert 8.9e6 < count(networks.wide_resnet(40, 4, 100)) < 9.0e6
    assert 77_000 < count(networks.small_resnet(8)) < 79_000 and 460_000 < count(networks.small_resnet(32)) < 470_000
    x = torch.randn(2, 3, 32, 32)
    for net in (networks.all_cnn_c(7), networks.wide_resnet(10, 1, 7), networks.small_resnet(8, 7)):
        assert net(x).shape == (2, 7)
    with pytest.raises(ValueError, match=r"depth is 12; expected 6 n \+ 4"):
        networks.wide_resnet(12)
    with pytest.raises(ValueError, match=r"depth is 12; expected 6 n \+ 2"):
        networks.small_resnet(12)
