"""Room 7: the file that is the model, and its log."""

import copy
import math
import os
import pickle
import zipfile
from dataclasses import asdict

import pytest
import torch
from conftest import alone, pg


@pytest.fixture(scope="module")
def content(vocab):
    """What a run of one step stores: two training pieces, a validation with held-out music and one without."""
    config = pg.Options(model=pg.ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
    trainer = pg.Trainer(pg.PianoGPT(config.model, vocab.says), config.train)
    ids, targets = torch.randint(len(vocab.words), (2, 2, 8))
    trainer.train_step(alone(ids), targets)
    trainer.step, trainer.best = 20, pg.copy_weights(trainer.average)
    trainer.history = [pg.ROW | {"step": 10, "val_loss": 2.5}, {k: v for k, v in pg.ROW.items() if "val" not in k} | {"step": 20}]
    return {"about": "", "config": {name: asdict(getattr(config, name)) for name in pg.STORED}, "vocabulary": vocab.words,
            "folder": "midi", "files": ["9 a.mid", "9 b.mid"], "pieces": ["a.mid", "b.mid"],
            "intervals": torch.tensor([130, 255, 130, 255], dtype=torch.uint8), "trainer": trainer.state()}


def same(a, b):
    """Whether two values are equal, tensors by their elements."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_checkpoint_comes_back_as_it_was_with_its_log_beside_it(content, tmp_path):
    path = tmp_path / "new folder" / "m.v1"
    pg.save_checkpoint(path, content)
    assert same(pg.load_checkpoint(path), {"format": pg.FORMAT, **content})
    lines = (tmp_path / "new folder" / "m.v1.csv").read_text().splitlines()
    assert lines == [",".join(pg.ROW), "10,0.0,0.0,2.5,0.0", "20,0.0,0.0,,"]


def harms(value):
    """Yield what a stranger may have put in the place of a value, and values with a harmed part."""
    yield from (None, [7], {}, torch.zeros(3))
    if isinstance(value, torch.Tensor):
        yield from (value[..., None], value.double(), value.to_sparse(), value.float() + math.inf)
    elif isinstance(value, (int, float, str)):
        yield from ("x", -1, 10**9, math.nan)
    elif isinstance(value, dict):
        tensors = [key for key in value if isinstance(value[key], torch.Tensor)]
        for key in value.keys() - tensors[1:]:  # of the weights, one stands for all
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: harm} for harm in harms(value[key]))
    elif isinstance(value, list) and len(value) < 100:
        yield from ([harm] + value[1:] for harm in harms(value[0]) if value)


@pytest.mark.filterwarnings("ignore")
def test_content_that_no_run_would_store_is_refused_whatever_key_it_is_under(content, vocab):
    pg.check_content({"format": pg.FORMAT, **copy.deepcopy(content)})
    refused, accepted = 0, []
    for harm in filter(lambda harm: isinstance(harm, dict), harms({"format": pg.FORMAT, **content})):
        try:
            pg.check_content(harm)
            accepted.append(harm)
        except Exception:  # as load_checkpoint does
            refused += 1
    for harm in accepted:  # it works, or its settings and words are compared with those in force
        config = pg.make_options({}, harm, training=False)
        pg.check_options(config)
        assert harm["vocabulary"] != vocab.words or pg.load_model(harm, vocab, "cpu")
    assert refused > 250 and len(accepted) < 60, [len(accepted), refused]


@pytest.mark.parametrize("name", ["m.csv", "m.png", "m"])
def test_log_never_takes_the_place_of_the_model(name, content, tmp_path):
    pg.save_checkpoint(tmp_path / name, content)
    assert pg.load_checkpoint(tmp_path / name)["folder"] == "midi"
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


def test_file_that_is_no_checkpoint_or_a_part_of_one_is_refused(content, tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, content)
    whole = path.read_bytes()
    for data in (b"", b"hello", b"step,seconds\n10,0.5\n", b"PK\3\4" + bytes(100), whole[:10], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(data)
        with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
            pg.load_checkpoint(path)


def test_flipped_bit_is_noticed(content, tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, content)
    whole = path.read_bytes()
    at = whole.index(content["trainer"]["best"]["head"].numpy().tobytes()) + 2002  # a weight
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(pg.UserError, match="damaged or not a PianoGPT checkpoint"):
        pg.load_checkpoint(path)


def test_file_that_would_unpack_to_more_than_it_holds_is_refused(content, tmp_path):
    path = tmp_path / "m.pt"
    pg.save_checkpoint(path, content)
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


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / "a.pt.tmp").write_bytes(b"unfinished")
    pg.write_atomically(tmp_path / "a.pt", b"new")
    assert os.listdir(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == b"new"


def test_new_file_has_the_first_number_that_no_file_has_even_while_another_run_writes(tmp_path, monkeypatch):
    def write(path, data, real=pg.write_atomically):
        if data == b"ours":
            assert pg.write_new(tmp_path, "sample", ".mid", b"theirs").name == "sample-005.mid"
        real(path, data)

    for name in ("sample-001.mid", "sample-002.wav", "sample-004.mid"):
        (tmp_path / name).touch()
    monkeypatch.setattr(pg, "write_atomically", write)
    assert pg.write_new(tmp_path, "sample", ".mid", b"ours") == tmp_path / "sample-003.mid"
    assert [(tmp_path / f"sample-00{n}.mid").read_bytes() for n in (3, 5)] == [b"ours", b"theirs"]


def test_new_file_that_cannot_be_written_leaves_none_and_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as e:
        pg.write_new(tmp_path, "sample", ".mid", b"x")
    assert e.value.filename.endswith("sample-001.mid") and os.listdir(tmp_path) == []
