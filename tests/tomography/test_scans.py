"""Scans from files written by the field's own libraries: every axis order, unit and field, and what is missing said."""

import math
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from paraboloid.tomography import read_scan

ANGLES, SLICES, DETECTORS = 4, 3, 5
DATA = np.random.default_rng(0).uniform(0.1, 2.0, (SLICES, ANGLES, DETECTORS))
DEGREES = np.array([0.0, 40.0, 95.0, 170.0])
GIVEN = {"log": False, "centre": "middle", "angles": DEGREES, "unit": "degrees"}


def check(scan, expected=DATA, centre=0.0):
    torch.testing.assert_close(scan.sinogram, torch.from_numpy(expected).float())
    torch.testing.assert_close(scan.angles, torch.deg2rad(torch.from_numpy(DEGREES)))
    assert scan.centre == centre
    assert (scan.beam(6) @ torch.zeros(6, 6)).shape == (ANGLES, DETECTORS)


@pytest.mark.parametrize("axes", ["slices angles detectors", "angles slices detectors", "detectors, angles, slices"])
def test_numpy_in_any_order_of_axes(tmp_path, axes):
    names = axes.replace(",", "").split()
    np.save(tmp_path / "a.npy", DATA.transpose([("slices", "angles", "detectors").index(n) for n in names]))
    check(read_scan(tmp_path / "a.npy", axes=axes, **GIVEN))
    np.save(tmp_path / "one.npy", DATA[0].T)
    check(read_scan(tmp_path / "one.npy", axes="detectors angles", **GIVEN), DATA[0])
    np.savez(tmp_path / "a.npz", sinogram=DATA[0], theta=np.deg2rad(DEGREES), other=1.0)
    found = read_scan(tmp_path / "a.npz", axes="angles detectors", key="sinogram", angles="theta", unit="radians",
                      log=False, centre=1.5)  # fmt: skip
    check(found, DATA[0], -0.5)
    np.savez(tmp_path / "c.npz", sinogram=DATA[0], axis=[[2.5]], two=[1.0, 2.0], far=9, word="a")
    given = {"axes": "angles detectors", "key": "sinogram"}
    check(read_scan(tmp_path / "c.npz", **given, **GIVEN | {"centre": "axis"}), DATA[0], 0.5)
    for name, said in (("two", r"'two' has shape \[2\]"), ("far", r"centre is 'far', 9.0 in the file; expected a detector"),
                       ("word", "the numbers 'word' are .* expected real numbers"), ("left", "has no array 'left'")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read_scan(tmp_path / "c.npz", **given, **GIVEN | {"centre": name})
    assert read_scan(tmp_path / "a.npy", axes=axes, dtype=torch.float64, **GIVEN).sinogram.dtype == torch.float64


def test_intensities_with_fields_become_line_integrals(tmp_path):
    dark, flat = np.array([1.0, 2.0, 0.0, 1.0, 3.0]), np.array([100.0, 90.0, 110.0, 95.0, 99.0])
    counts = dark + (flat - dark) * np.exp(-DATA[0])
    np.savez(tmp_path / "a.npz", data=counts, white=np.stack([flat - 1, flat + 1]), black=dark)
    given = {k: v for k, v in GIVEN.items() if k != "log"}
    found = read_scan(tmp_path / "a.npz", axes="angles detectors", key="data", flat="white", dark="black", **given)
    check(found, DATA[0])
    np.save(tmp_path / "share.npy", np.exp(-DATA))
    check(read_scan(tmp_path / "share.npy", axes="slices angles detectors", log=True, **given))
    counts[2, 3] = 0.0
    np.save(tmp_path / "bad.npy", counts)
    options = {"axes": "angles detectors", "flat": flat, "dark": dark, **given}
    with pytest.raises(ValueError, match=r"1 of 20 transmissions are not positive .* Give least="):
        read_scan(tmp_path / "bad.npy", **options)
    assert read_scan(tmp_path / "bad.npy", least=1e-3, **options).sinogram[2, 3] == pytest.approx(math.log(1e3))


def test_matlab_of_both_kinds(tmp_path):
    scipy.io.savemat(tmp_path / "five.mat", {"sino": DATA[0], "theta": DEGREES})
    given = {"axes": "angles detectors", "key": "sino", "angles": "theta", "unit": "degrees", "log": False, "centre": 2}
    check(read_scan(tmp_path / "five.mat", **given), DATA[0])
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "seven.mat", "w", userblock_size=512) as file:
        file["sino"], file["theta"] = DATA[0].T, DEGREES[:, None]  # as MATLAB writes them
    with open(tmp_path / "seven.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(128))
    check(read_scan(tmp_path / "seven.mat", **given), DATA[0])
    scipy.io.savemat(tmp_path / "sparse.mat", {"sino": scipy.sparse.csc_matrix(DATA[0]), "theta": DEGREES})
    check(read_scan(tmp_path / "sparse.mat", **given), DATA[0])


def test_tiff_stacks(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "stack.tif", DATA.transpose(1, 0, 2).astype(np.float32), photometric="minisblack")
    check(read_scan(tmp_path / "stack.tif", axes="angles slices detectors", **GIVEN))
    folder = tmp_path / "views"
    folder.mkdir()
    for i in range(ANGLES):
        tifffile.imwrite(folder / f"view_{i:03}.tiff", DATA[:, i].astype(np.float32), photometric="minisblack")
    check(read_scan(folder, axes="angles slices detectors", **GIVEN))
    tifffile.imwrite(folder / "view_009.tiff", DATA[:2, 0].astype(np.float32), photometric="minisblack")
    with pytest.raises(ValueError, match=r"'view_009.tiff' has shape \(2, 5\) and 'view_000.tiff' \(3, 5\)"):
        read_scan(folder, axes="angles slices detectors", **GIVEN)
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, number in enumerate((0, 2, 9, 10)):  # by value, not as words
        tifffile.imwrite(plain / f"v{number}.tif", DATA[:, i].astype(np.float32), photometric="minisblack")
    check(read_scan(plain, axes="angles slices detectors", **GIVEN))
    (plain / "v10.tif").rename(plain / "v10\u00b21.tif")  # a digit, but no number
    check(read_scan(plain, axes="angles slices detectors", **GIVEN))
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((4, 5, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match="has 3 numbers a pixel, such as colours"):
        read_scan(tmp_path / "rgb.tif", axes="angles detectors slices", **GIVEN)
    (tmp_path / "junk.tif").write_bytes(b"junk")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "stack.tif").read_bytes()[:450])
    for name in ("junk.tif", "cut.tif"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_scan(tmp_path / name, axes="angles slices detectors", **GIVEN)


def test_data_exchange_knows_its_own_fields(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "scan.h5"
    flat, dark = np.full((2, SLICES, DETECTORS), 1000.0), np.full((3, SLICES, DETECTORS), 10.0)
    with h5py.File(path, "w") as file:
        exchange = file.create_group("exchange")
        exchange["data"] = (10 + 990 * np.exp(-DATA)).transpose(1, 0, 2)
        exchange["data_white"], exchange["data_dark"], exchange["theta"] = flat, dark, DEGREES
        exchange["theta"].attrs["units"] = "degrees"
    check(read_scan(path, centre="middle"))
    check(read_scan(path, centre=2.25), centre=0.25)
    with h5py.File(path, "a") as file:
        del file["exchange/theta"].attrs["units"]
    with pytest.raises(ValueError, match="does not say the unit of the angles, which reach 170"):
        read_scan(path, centre="middle")
    with pytest.raises(ValueError, match="log=False with a flat field"):
        read_scan(path, centre="middle", unit="degrees", log=False)
    assert read_scan(path, centre="middle", unit="degrees").sinogram.shape == (SLICES, ANGLES, DETECTORS)
    for unit in (b"deg", np.array(["degrees"], dtype=object), "°"):
        with h5py.File(path, "a") as file:
            file["exchange/theta"].attrs["units"] = unit
        check(read_scan(path, centre="middle", key="/exchange/data"))
    for said, given in (("radians", None), ("degrees", "radians")):
        with h5py.File(path, "a") as file:
            file["exchange/theta"].attrs["units"] = said
        with pytest.raises(ValueError, match="angles reach 170; expected radians"):
            read_scan(path, centre="middle", unit=given)
    with h5py.File(path, "a") as file:
        file["exchange/theta"].attrs["units"] = "degrees"
        del file["exchange/data_dark"]
        file["exchange/data_dark"] = np.zeros((0, SLICES, DETECTORS))
    with pytest.raises(ValueError, match=r"has shape \[0, 3, 5\], no exposure; expected some: give flat= or dark="):
        read_scan(path, centre="middle")
    assert read_scan(path, centre="middle", dark=0.0).sinogram.isfinite().all()


def test_data_exchange_may_say_another_order(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        exchange = file.create_group("exchange")
        exchange["data"], exchange["theta"] = 1000 * np.exp(-DATA), DEGREES
        exchange["data_white"] = np.full((SLICES, 1, DETECTORS), 1000.0)
        exchange["theta"].attrs["units"], exchange["data"].attrs["axes"] = "degrees", "y:theta:x"
    check(read_scan(path, centre="middle"))
    with h5py.File(path, "a") as file:
        file["exchange/data"].attrs["axes"] = "a:b:c"
    with pytest.raises(ValueError, match="does not say what the axes of its"):
        read_scan(path, centre="middle")
    check(read_scan(path, centre="middle", axes="slices angles detectors"))


@pytest.mark.parametrize("package, name", [("h5py", "a.h5"), ("tifffile", "a.tif")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"are read by the package {package}, which is not installed. Install it"):
        read_scan(tmp_path / name, axes="angles detectors", **GIVEN)


ERRORS = [
    ({"axes": None}, r"does not say what the axes of its \[4, 5\] numbers are"),
    ({"axes": "angles rows"}, "axes is 'angles rows' for data of shape"),
    ({"axes": "slices angles detectors"}, "expected 2 of the names"),
    ({"unit": "radians"}, "angles reach 170; expected radians. Say unit='degrees'"),
    ({"log": None}, "does not say whether it holds intensities"),
    ({"centre": None}, "does not say the detector of the axis of rotation"),
    ({"centre": 9}, r"centre is 9; expected a detector in 0..4, or 'middle'"),
    ({"centre": "left"}, r"has no array 'left'; expected one of \['data'\]"),
    ({"angles": None}, "does not say the 4 angles; expected angles="),
    ({"unit": None}, "does not say the unit of the angles"),
    ({"unit": "turns"}, "unit is 'turns'"),
    ({"angles": DEGREES[:3]}, "there are 3 angles and 4 views in the data"),
    ({"angles": [0, 1, 2, math.nan]}, "the angles hold NaN or infinity"),
    ({"axes": 3}, "axes is 3; expected a str"),
    ({"key": ["data"]}, r"key is \['data'\]; expected a str"),
    ({"log": 1}, "log is 1; expected a bool"),
    ({"dtype": "float32"}, "dtype is 'float32'; expected a real floating-point type"),
    ({"dtype": torch.int32}, "dtype is torch.int32; expected a real floating-point type"),
    ({"angles": {}}, "the angles are a dict of object; expected real numbers"),
    ({"angles": [0, [1]]}, "the angles are a list of object; expected real numbers"),
    ({"log": True, "flat": 1j}, "the flat field are a complex of complex128; expected real numbers"),
    ({"log": True, "least": "a"}, "least is 'a'"),
    ({"centre": np.zeros(2)}, "centre is array"),
    ({"key": "b"}, r"has no array 'b'; expected one of \['data'\]"),
    ({"log": True, "least": 2.0}, "least is 2.0"),
    ({"log": True, "flat": np.zeros(5)}, "the flat field less the dark one is 0 at its least"),
    ({"log": True, "flat": np.ones(4)}, "expected the same slices and detectors"),
    ({"log": True, "flat": np.ones((2, 2, 5))}, "has 3 axes; expected 1"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", ERRORS, ids=[m for _, m in ERRORS])
def test_nothing_is_guessed(tmp_path, changes, message):
    np.save(tmp_path / "a.npy", DATA[0])
    with pytest.raises(ValueError, match=message):
        read_scan(tmp_path / "a.npy", **({"axes": "angles detectors", **GIVEN} | changes))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_scan(tmp_path / "none.npy")
    (tmp_path / "half.npy").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes(b"PK")
    (tmp_path / "half.mat").write_bytes(b"")
    (tmp_path / "other.mat").write_bytes(b"no file of MATLAB" * 20)
    np.savez(tmp_path / "objects.npz", np.array([None], dtype=object))
    for name in ("half.npy", "half.npz", "half.mat", "other.mat", "objects.npz"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            read_scan(tmp_path / name, axes="angles detectors", **GIVEN)
    np.save(tmp_path / "line.npy", DATA[0, 0])
    with pytest.raises(ValueError, match=r"the data have shape \[5\]; expected 2 axes, or 3 with slices"):
        read_scan(tmp_path / "line.npy", axes="detectors", **GIVEN)
    with pytest.raises(ValueError, match="path is a NoneType"):
        read_scan(None)
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(ValueError, match=r"ends in '.txt'; expected one of"):
        read_scan(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="has no TIFF images"):
        read_scan(tmp_path)
    np.savez(tmp_path / "a.npz", a=DATA, b=DATA)
    with pytest.raises(ValueError, match=r"has the arrays \['a', 'b'\]; say which is the sinogram by key="):
        read_scan(tmp_path / "a.npz")
    np.save(tmp_path / "nan.npy", np.full((4, 5), np.nan))
    with pytest.raises(ValueError, match="hold 20 numbers that are not finite"):
        read_scan(tmp_path / "nan.npy", axes="angles detectors", **GIVEN)
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    with pytest.raises(ValueError, match="the data have the type <U1"):
        read_scan(tmp_path / "text.npy", axes="angles detectors", **GIVEN)
