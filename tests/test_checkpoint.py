"""Room 5: the file that is the model."""

import os
import pickle

import pytest
import torch
from conftest import pg


def test_checkpoint_comes_back_as_it_was(tmp_path):
    content = {"a": 1, "b": [None, "x"], "t": torch.arange(5)}
    pg.save_checkpoint(tmp_path / "new folder" / "m.pt", content)
    loaded = pg.load_checkpoint(tmp_path / "new folder" / "m.pt")
    assert torch.equal(loaded.pop("t"), content.pop("t")) and loaded == content | {"format": pg.FORMAT}


def test_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"format": pg.FORMAT, "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(pg.UserError, match="damaged or no PianoGPT checkpoint"):
            pg.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\3\4" + b"\0" * 100])
def test_file_that_is_no_checkpoint_is_refused(data, tmp_path):
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(pg.UserError, match="damaged or no PianoGPT checkpoint"):
        pg.load_checkpoint(tmp_path / "m.pt")


def test_truncated_checkpoint_is_refused(tmp_path):
    pg.save_checkpoint(tmp_path / "m.pt", {"t": torch.zeros(10_000)})
    whole = (tmp_path / "m.pt").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "m.pt").write_bytes(whole[:length])
        with pytest.raises(pg.UserError):
            pg.load_checkpoint(tmp_path / "m.pt")


def test_checkpoint_of_another_program_or_version_is_refused(tmp_path):
    for content in ({"model": {}}, [1], {"format": "pianogpt 0"}):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(pg.UserError, match="not written by this version"):
            pg.load_checkpoint(tmp_path / "m.pt")


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(pg.UserError, match="train one first"):
        pg.load_checkpoint(tmp_path / "none.pt")


def test_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    pg.write_atomically(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        pg.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.pt"]
