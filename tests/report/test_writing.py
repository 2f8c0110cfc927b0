import pytest

from paraboloid.report import check_writable, write


def test_writes_every_file_and_leaves_nothing_else(tmp_path):
    paths = write({"a.json": "{}", "b.html": "é"}, tmp_path / "new" / "deep")
    assert [path.read_text(encoding="utf-8") for path in paths] == ["{}", "é"]
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == ["a.json", "b.html"]


def test_replaces_an_older_report_and_keeps_what_else_is_there(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    write({"a.json": "new"}, tmp_path)
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_older_report(tmp_path, monkeypatch, interruption):
    (tmp_path / "a.json").write_text("old")

    def stop(_):
        raise interruption

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(interruption):
        write({"a.json": "new", "b.html": "new"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_an_interruption_removes_the_folders_it_made(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write({"a.json": "new"}, tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "deep")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file; expected a directory"):
        check_writable(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot be written: (Not a directory|File exists)"):
        check_writable(tmp_path / "file" / "below")


def test_a_place_that_takes_no_files_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match="cannot be written: Permission denied"):
        check_writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
