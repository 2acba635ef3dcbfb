"""Room 7: the file that is the model, and its log."""

import os
import pickle
import zipfile

import pytest
import torch
from conftest import pg


def test_checkpoint_comes_back_as_it_was_with_its_log_beside_it(tmp_path):
    rows, path = [{"step": 10, "val_loss": 2.5}, {"step": 20, "val_loss": 2.0}], tmp_path / "new folder" / "m.v1"
    pg.save_checkpoint(path, {"a": "x", "t": torch.arange(5), "trainer": {"history": rows}})
    loaded = pg.load_checkpoint(path)
    assert torch.equal(loaded.pop("t"), torch.arange(5))
    assert loaded == {"format": pg.FORMAT, "a": "x", "trainer": {"history": rows}}
    assert (tmp_path / "new folder" / "m.v1.csv").read_text() == "step,val_loss\n10,2.5\n20,2.0\n"


@pytest.mark.parametrize("name", ["m.csv", "m.png", "m"])
def test_log_never_takes_the_place_of_the_model(name, tmp_path):
    pg.save_checkpoint(tmp_path / name, {"trainer": {"history": [{"step": 10}]}})
    assert pg.load_checkpoint(tmp_path / name)["trainer"]["history"] == [{"step": 10}]
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.csv"]


def test_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"format": pg.FORMAT, "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
            pg.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "was here").exists()


def test_file_that_is_no_checkpoint_or_a_part_of_one_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, {"t": torch.zeros(10_000), "trainer": {"history": []}})
    whole = path.read_bytes()
    for data in (b"", b"hello", b"step,seconds\n10,0.5\n", b"PK\3\4" + bytes(100), whole[:10], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(data)
        with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
            pg.load_checkpoint(path)


def test_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, {"t": torch.arange(1000.0), "trainer": {"history": []}})
    whole = path.read_bytes()
    at = whole.index(torch.arange(1000.0).numpy().tobytes()) + 2002  # a weight
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
        pg.load_checkpoint(path)


def test_file_that_would_unpack_to_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, {"t": torch.zeros(10_000), "trainer": {"history": []}})
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)
    with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
        pg.load_checkpoint(path)


def test_checkpoint_that_is_a_pipe_or_a_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path):
        with pytest.raises(pg.UserError, match="there is no checkpoint"):
            pg.load_checkpoint(path)


@pytest.mark.parametrize("content", [{"model": {}}, [1], {"format": "pianogpt 0"}])
def test_checkpoint_of_another_program_or_version_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(pg.UserError, match="not of this version"):
        pg.load_checkpoint(tmp_path / "m.pt")


def test_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    pg.write_atomically(tmp_path / "m.pt", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        pg.write_atomically(tmp_path / "m.pt", b"new")
    assert (tmp_path / "m.pt").read_bytes() == b"old" and os.listdir(tmp_path) == ["m.pt"]


def test_lock_removes_what_a_killed_run_left_and_nothing_else(tmp_path):
    for name in ("a.pt.1.tmp", "a.pt.csv.1.tmp", "a.v2.pt.1.tmp"):
        (tmp_path / name).touch()
    with pg.lock_checkpoint(tmp_path / "a.pt"):
        assert [path.name for path in tmp_path.glob("*.tmp")] == ["a.v2.pt.1.tmp"]


def test_new_file_that_cannot_be_written_leaves_none_and_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    assert pg.write_new(tmp_path, "sample", ".mid", b"x").name == "sample-001.mid"
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as e:
        pg.write_new(tmp_path, "sample", ".mid", b"x")
    assert e.value.filename.endswith("sample-002.mid") and os.listdir(tmp_path) == ["sample-001.mid"]
