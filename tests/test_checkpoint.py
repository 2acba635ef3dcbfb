"""Section 9: the file that is the model, its log, and names that are free."""

import json
import math
import os
import pickle
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, pg, scale, write_midi

REFUSED = "damaged or not a PianoGPT checkpoint"


@pytest.fixture(scope="module")
def settings():
    """A model of one tiny layer."""
    model = pg.ModelSettings(n_layer=1, n_head=1, n_embd=8, block_size=8)
    return pg.Settings(model=model, train=pg.TrainSettings(batch_size=2))


@pytest.fixture(scope="module")
def checkpoint(settings, vocab, tmp_path_factory):
    """What a run of one step stores, after a validation with held-out music and one without."""
    path = write_midi(tmp_path_factory.mktemp("midi") / "a.mid", scale(0))
    corpus = pg.make_corpus([pg.read_piece(path.read_bytes(), vocab)])
    trainer = pg.make_trainer(settings, vocab, torch.device("cpu"))
    trainer.train_step(pg.Batches(corpus, vocab, settings)[0])
    trainer.step = 20
    trainer.best = {name: weight + 1 for name, weight in trainer.average.state_dict().items()}
    trainer.history = [
        {"step": 10, "seconds": 0.5, "train_loss": 3.0, "val_loss": 2.5, "val_nats_per_note": 9.0},
        {"step": 20, "seconds": 1.5, "train_loss": 2.0},
    ]
    intervals = torch.tensor([130, 255, 130, 255], dtype=torch.uint8)
    return pg.Checkpoint(
        about="scales",
        settings={name: asdict(getattr(settings, name)) for name in pg.STORED_GROUPS},
        vocabulary=vocab.words,
        folder="midi",
        files=["9 a.mid", "9 b.mid"],
        pieces=["a.mid", "b.mid"],
        progress=pg.trainer_progress(trainer),
        tensors=pg.trainer_tensors(trainer) | {"intervals": intervals},
    )


def forge(path, values, tensors):
    """Write a file as save_checkpoint does, its checksum right, whatever it holds."""
    text = json.dumps(values)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksum = pg.hash_tensors(text, tensors)
    metadata = {"format": pg.FORMAT, "json": text, "sha256": checksum}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def values_of(checkpoint):
    """All that a checkpoint holds but its tensors."""
    return {name: value for name, value in vars(checkpoint).items() if name != "tensors"}


def assert_refused(path, reason=REFUSED):
    """Loading says in one sentence which file cannot be used and why."""
    with pytest.raises(pg.UserError, match=reason) as e:
        pg.load_checkpoint(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_checkpoint_comes_back_as_it_was_with_its_log_beside_it(checkpoint, tmp_path):
    path = tmp_path / "new folder" / "m.v1"
    pg.save_checkpoint(path, checkpoint)
    loaded = pg.load_checkpoint(path)
    assert values_of(loaded) == values_of(checkpoint)
    assert loaded.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name
        assert loaded.tensors[name].dtype == tensor.dtype, name
    assert (tmp_path / "new folder" / "m.v1.csv").read_text().splitlines() == [
        "step,seconds,train_loss,val_loss,val_nats_per_note",
        "10,0.5,3.0,2.5,9.0",
        "20,1.5,2.0,,",
    ]


def test_trainer_that_goes_on_from_a_checkpoint_is_in_the_same_state(checkpoint, settings, vocab):
    trainer = pg.make_trainer(settings, vocab, torch.device("cpu"))
    pg.resume(trainer, checkpoint)
    assert pg.trainer_progress(trainer) == checkpoint.progress
    again = pg.trainer_tensors(trainer)
    assert again.keys() == checkpoint.tensors.keys() - {"intervals"}
    for name, weight in checkpoint.weights("average").items():
        assert torch.equal(again[f"best/{name}"], weight + 1), "the best are not the latest"
    assert all(torch.equal(again[name], checkpoint.tensors[name]) for name in again)


def test_trainer_can_be_saved_before_its_first_validation(checkpoint, settings, vocab, tmp_path):
    trainer = pg.make_trainer(settings, vocab, torch.device("cpu"))
    tensors = pg.trainer_tensors(trainer) | {"intervals": checkpoint.tensors["intervals"]}
    early = replace(checkpoint, progress=pg.trainer_progress(trainer), tensors=tensors)
    pg.save_checkpoint(tmp_path / "m", early)
    loaded = pg.load_checkpoint(tmp_path / "m")
    assert loaded.step == 0
    for name, weight in loaded.weights("average").items():
        assert torch.equal(loaded.weights("best")[name], weight), name


def harmed_values(value):
    """Yield what a stranger may have put in the place of a value, and values with a harmed part."""
    yield from (None, [7], {}, "x", -1, 10**9, 10**400, math.nan)
    if isinstance(value, dict):
        yield value | {"sample": {"samples_dir": "/"}}
        yield value | {"__dict__": {"batch_size": 16.0}}
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for harmed in harmed_values(value[key]):
                yield value | {key: harmed}
    elif isinstance(value, list) and 0 < len(value) < 100:
        for harmed in harmed_values(value[0]):
            yield [harmed, *value[1:]]


def harmed_tensors(tensors):
    """Yield tensors of which one is missing, or has another shape or type."""
    for name in ("best/head.weight", "weights/recent", "average/embedding.weight"):
        tensor = tensors[name]
        yield {k: v for k, v in tensors.items() if k != name}
        yield tensors | {name: tensor[..., None]}
        yield tensors | {name: tensor[:1]}
    yield tensors | {"optimizer.exp_avg/recent": torch.zeros(2)}
    yield tensors | {"optimizer.exp_avg/unknown": torch.zeros(2)}
    yield tensors | {"intervals": tensors["intervals"][:-1]}
    yield {k: v for k, v in tensors.items() if k != "intervals"}
    yield tensors | {"intervals": tensors["intervals"].float()}
    yield tensors | {"intervals": torch.full((3,), pg.PIECE_END, dtype=torch.uint8)}


def test_tensors_that_no_run_would_store_are_refused(checkpoint, tmp_path):
    for harmed in harmed_tensors(checkpoint.tensors):
        forge(tmp_path / "m", values_of(checkpoint), harmed)
        assert_refused(tmp_path / "m")


def test_values_that_no_run_would_store_are_refused_or_do_no_harm(checkpoint, vocab, tmp_path):
    path = tmp_path / "m"
    progress = {"progress": checkpoint.progress}
    values = {k: v for k, v in values_of(checkpoint).items() if k != "progress"}
    forgeries = [harmed | progress for harmed in harmed_values(values) if isinstance(harmed, dict)]
    exported = {k: v for k, v in checkpoint.tensors.items() if k.startswith(("best/", "int"))}
    accepted = []
    for harmed in forgeries:
        forge(path, harmed, exported)
        try:
            accepted.append(pg.load_checkpoint(path))
        except pg.UserError as e:
            assert REFUSED in str(e)
    assert len(accepted) < len(forgeries) / 4, [len(accepted), len(forgeries)]
    for forged in accepted:
        assert forged.settings.keys() == set(pg.STORED_GROUPS)
        pg.make_settings({}, forged, training=False)
        if forged.vocabulary == vocab.words:  # else it is refused for that
            pg.load_model(forged, torch.device("cpu"))


@pytest.mark.parametrize("name", ["m.csv", "m.png", "m", "m.pt", "m.safetensors"])
def test_model_may_have_any_name_and_its_log_never_takes_it(name, checkpoint, tmp_path):
    pg.save_checkpoint(tmp_path / name, checkpoint)
    assert pg.load_checkpoint(tmp_path / name).folder == "midi"
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.csv"]


def convert(monkeypatch, *arguments):
    """The exit code of tests/convert.py."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tests" / "convert.py"), run_name="__main__")
    return ended.value.code


def test_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"format": "pianogpt 10", "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    assert_refused(tmp_path / "a.pt", "was written by an older version: python tests/convert.py")
    assert_refused(tmp_path / "b.pt")
    assert convert(monkeypatch, tmp_path / "a.pt", tmp_path / "a") == 2
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def test_file_that_is_no_checkpoint_or_a_part_of_one_is_refused(checkpoint, tmp_path):
    path = tmp_path / "m"
    pg.save_checkpoint(path, checkpoint)
    whole = path.read_bytes()
    parts = [whole[:10], whole[: len(whole) // 2], whole[:-10], whole + b"\0"]
    huge = (2**50).to_bytes(8, "little") + b"{}"  # a header that claims a petabyte
    for data in (b"", b"hello", b"step,seconds\n10,0.5\n", huge, *parts):
        path.write_bytes(data)
        assert_refused(path)


def test_flipped_bit_is_noticed_in_a_weight_and_in_the_text(checkpoint, tmp_path):
    path = tmp_path / "m"
    pg.save_checkpoint(path, checkpoint)
    whole = path.read_bytes()
    weight = whole.index(checkpoint.tensors["best/head.weight"].numpy().tobytes()) + 2002
    letter = whole.index(b"scales")
    for at in (weight, letter):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert_refused(path, "its checksum is wrong")


def test_checkpoint_that_is_a_pipe_or_a_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        assert_refused(path, "there is no checkpoint")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pianogpt 0"}])
def test_checkpoint_of_another_program_or_version_is_refused(metadata, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors.torch.save({"model": torch.zeros(3)}, metadata))
    assert_refused(path, rf"{REFUSED} \(not in the format of this version\)")


@pytest.mark.parametrize("optimizer, is_refused", [("SGD", True), ("OrthogonalAdamW", False)])
def test_run_of_another_optimizer_is_not_resumed(
    optimizer, is_refused, checkpoint, settings, vocab
):
    trainer = pg.make_trainer(settings, vocab, torch.device("cpu"))
    other = replace(checkpoint, progress=checkpoint.progress | {"optimizer": optimizer})
    if is_refused:
        with pytest.raises(pg.UserError, match="was trained with SGD, not OrthogonalAdamW: pass"):
            pg.resume(trainer, other)
        assert trainer.step == 0
    else:
        pg.resume(trainer, other)
        assert trainer.step == 20


def to_old_names(weights):
    """Weights as the older version called and shaped them, in its 16 bits."""
    old = {}
    for name, weight in weights.items():
        old[name.removesuffix(".weight")] = weight.half()
    old["recent"] = old["recent"][:, None]
    old["memory"] = old["memory"].T.contiguous()
    return old


def embed_as_before(old, idx, share):
    """Embeddings (T, C) of ids (T,) that begin a piece, as the older version computed them."""
    tokens = torch.nn.functional.pad(old["embedding"].float()[idx], (0, 0, pg.RECENT, 0))
    tokens = tokens + share @ old["memory"].float()  # the memory was added to each token
    x = tokens[pg.RECENT :]
    for n in range(pg.RECENT):
        x = x + tokens[n : n + len(idx)] * old["recent"][n].float()
    return torch.layer_norm(x, x.shape[-1:])


def test_checkpoint_without_gaps_and_styles_is_converted_and_computes_the_same(
    checkpoint, vocab, here, monkeypatch
):
    """Of format 12: its vocabulary has no FILL, which is the last word, and it has no styles."""
    sizes = checkpoint.settings["model"]
    values = {k: v for k, v in values_of(checkpoint).items() if k != "styles"}
    values["vocabulary"] = vocab.words[: vocab.fill_id]
    tensors = {"intervals": checkpoint.tensors["intervals"]}
    for name, weight in checkpoint.weights("best").items():
        if name == "memory.weight":
            weight = weight[:, : vocab.fill_id]
        elif name in ("embedding.weight", "head.weight"):
            weight = weight[: vocab.fill_id]
        if name != "style.weight":
            tensors[f"best/{name}"] = weight.clone()
    monkeypatch.setattr(pg, "FORMAT", "pianogpt 12")
    forge(Path("old"), values, tensors)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert_refused(Path("old"), "python tests/convert.py old old-new.safetensors")
    assert convert(monkeypatch, "old", "old") == 2, "it would be lost"
    assert convert(monkeypatch, "old", "new") == 0
    assert convert(monkeypatch, "new", "newer") == 2, "nothing to do"
    assert convert(monkeypatch, "none", "newer") == convert(monkeypatch, "old") == 2
    for data in (b"not a checkpoint", b"PK\3\4", safetensors.torch.save({"x": torch.ones(1)})):
        Path("foreign").write_bytes(data)
        assert convert(monkeypatch, "foreign", "newer") == 2
    new = pg.load_checkpoint(Path("new"))
    assert new.settings["model"] == sizes
    assert new.vocabulary == vocab.words
    for name, weight in new.weights("best").items():
        old = tensors.get(f"best/{name}")
        if name == "style.weight":
            assert not weight.any()
        elif name == "memory.weight":
            assert torch.equal(weight[:, : vocab.fill_id], old)
        else:
            assert torch.equal(weight[: len(old)], old), name


def test_checkpoint_of_the_older_version_is_converted_and_writes_music(
    checkpoint, settings, vocab, here, monkeypatch, capsys
):
    torch.manual_seed(1)
    model = pg.PianoGPT(settings.model, len(vocab.words), vocab.grid)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    old = to_old_names(model.state_dict())
    groups = {name: asdict(getattr(settings, name)) for name in ("data", "model", "train")}
    best = {"step": 7, "seconds": 1.0, "history": [], "losses": [], "best": old}
    content = {
        "format": "pianogpt 10",
        "about": "scales, public domain",
        "config": groups | {"music": asdict(settings.tokens)},
        "vocabulary": vocab.words,
        "folder": "midi",
        "files": ["9 a.mid"],
        "pieces": checkpoint.pieces,
        "intervals": checkpoint.tensors["intervals"],
        "trainer": best | {"weights": {}, "average": {}, "optimizer": {}},
    }
    torch.save(content, "old.pt")
    assert pg.main(["--generate", "--checkpoint", "old.pt"]) == 2
    command = "python tests/convert.py old.pt old-new.safetensors converts it"
    assert command in capsys.readouterr().err
    assert convert(monkeypatch, *command.split()[2:4]) == 0

    converted = pg.load_model(pg.load_checkpoint(Path("old-new.safetensors")), torch.device("cpu"))
    idx = torch.randint(1, len(vocab.words), (1, 8))
    share = torch.rand(1, len(vocab.words)) / 100
    places = torch.zeros(1, 8)
    before = torch.zeros(1, pg.RECENT, dtype=torch.long)
    style = torch.zeros(1, dtype=torch.long)
    now = converted.embed(pg.Window(idx, places, places, before, share, style))
    assert torch.allclose(now[0], embed_as_before(old, idx[0], share[0]), atol=1e-2)
    for name, weight in model.state_dict().items():
        if name.startswith(("blocks", "head", "norm")):
            assert torch.allclose(converted.state_dict()[name], weight, atol=1e-2), name

    line = "--generate --bars 2 --seed 1 --checkpoint old-new.safetensors"
    assert pg.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "step 7 of 900, trained on midi (scales, public domain)" in out
    assert len(list(Path("samples").iterdir())) == 3


def fail(*args):
    """What a full disk does."""
    raise OSError(28, "No space left on device")


def test_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    pg.write_atomically(tmp_path / "m", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as e:
        pg.write_atomically(tmp_path / "m", b"new")
    assert e.value.filename == str(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / "a.tmp").write_bytes(b"unfinished")
    pg.write_atomically(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_new_file_has_the_first_free_number_even_while_another_run_writes(tmp_path, monkeypatch):
    write = pg.write_atomically

    def write_beside_another(path, data):
        if data == b"ours":
            theirs = pg.write_new(tmp_path, "sample", ".mid", b"theirs")
            assert theirs.name == "sample-005.mid"
        write(path, data)

    for name in ("sample-001.mid", "sample-002.wav", "sample-004.mid"):
        (tmp_path / name).touch()
    monkeypatch.setattr(pg, "write_atomically", write_beside_another)
    assert pg.write_new(tmp_path, "sample", ".mid", b"ours") == tmp_path / "sample-003.mid"
    assert (tmp_path / "sample-003.mid").read_bytes() == b"ours"
    assert (tmp_path / "sample-005.mid").read_bytes() == b"theirs"


def test_new_file_that_cannot_be_written_leaves_none_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as e:
        pg.write_new(tmp_path, "sample", ".mid", b"x")
    assert e.value.filename == str(tmp_path / "sample-001.mid")
    assert os.listdir(tmp_path) == []
