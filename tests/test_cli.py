"""Sections 10 and 11: whole runs by the command line, most of them in-process."""

import contextlib
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    notes_of,
    pg,
    run_apart,
    run_on_two_ranks,
    scale,
    start,
    write_folder,
    write_midi,
)
from symusic import Score

MODEL = Path("pianogpt.safetensors")  # the default --checkpoint
SHIPPED = ROOT / "samples" / "piano.safetensors"
SHORT = " ".join(["--midi-dir midi", *TINY, "--steps 30 --eval-every 10 --warmup 5 --seed 1"])
REWRITE = "--generate --prompt midi/piece00.mid --rewrite 3"
CONTINUE = "--prompt 'my prompt é.mid' --prompt-bars 4 --bars 8 --num-samples 2"
multiprocessing.forkserver.ensure_running()  # it imports torch while the first tests run


def pianogpt(line):
    """The exit code of a command line."""
    return pg.main(shlex.split(line))


def train(line=""):
    """The exit code of a short training."""
    return pianogpt(f"{SHORT} {line}")


def samples(folder="samples"):
    """The files in a folder of samples."""
    return sorted(Path(folder).iterdir()) if Path(folder).exists() else []


def generate(line=""):
    """The scores of the files that a --generate with these flags wrote."""
    before = samples()
    assert pianogpt(f"--generate --seed 1 {line}") == 0
    return [Score(path) for path in samples() if path not in before]


def texts_of(score):
    """(tick, text) of a written piece, without what it says of its making, and that."""
    texts, origin = [], None
    for marker in score.markers:
        if marker.text.startswith("PianoGPT "):
            assert origin is None
            assert marker.time == 0
            origin = json.loads(marker.text.removeprefix("PianoGPT "))
        else:
            texts.append((marker.time, marker.text))
    return texts, origin


def load(path=MODEL):
    """A checkpoint."""
    return pg.load_checkpoint(Path(path))


def step_of(path=MODEL):
    """The step of a checkpoint; 0 if there is none."""
    return load(path).step if Path(path).exists() else 0


def assert_same_run(*paths):
    """Two runs ended with the same weights, bit for bit, and the same log but for the seconds."""
    a, b = map(load, paths)
    assert a.step == b.step
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    one, two = (re.sub(r"(?m)^(\w+),[^,]+", r"\1", Path(f"{p}.csv").read_text()) for p in paths)
    assert one == two
    for name in ("about", "vocabulary", "folder", "files", "pieces"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("begin", "losses", "optimizer"):
        assert a.progress[name] == b.progress[name], name


def full_disk(*args, **kwargs):
    """What a full disk does."""
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with MIDI and a checkpoint trained for 30 steps, to be copied."""
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "midi")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train() == 0
    return root


@pytest.fixture(scope="session")
def mistaken(trained_once, tmp_path_factory):
    """A folder with a checkpoint and what may be taken for one, or for music."""
    root = shutil.copytree(trained_once, tmp_path_factory.mktemp("mistaken") / "here")
    (root / "empty").mkdir()
    (root / "bad").mkdir()
    (root / "bad" / "page.mid").write_text("<html>")
    (root / "loop").symlink_to("loop")
    shifted = load(root / MODEL)
    first, *others = shifted.vocabulary  # as many words, in another order
    shifted.vocabulary = [*others, first]
    pg.save_checkpoint(root / "shifted", shifted)
    return root


@pytest.fixture
def folder(trained_once, tmp_path):
    """The same folder with MIDI in a place of its own, and the cache that knows its files."""
    for name in ("midi", ".pianogpt-cache"):
        shutil.copytree(trained_once / name, tmp_path / name)
    return tmp_path / "midi"


@pytest.fixture
def trained(trained_once, here):
    """A current folder with MIDI and a checkpoint trained for 30 steps."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return here


# ---- What a run says


def test_trains_with_a_bar_on_a_terminal_generates_and_its_loss_falls(
    folder, here, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert train("--lr 1e-3 --generate --bars 2") == 0
    out, err = capsys.readouterr()
    bars = re.split("[\r\n]", err)
    assert any(bar.startswith("training: 100%") for bar in bars)
    assert any(bar.startswith("writing: ") for bar in bars)
    assert max(map(len, bars)) <= 80

    values = dict(re.findall(r"^(\w+): (.+)$", out, re.M))
    keys = "step seconds train_loss val_loss val_nats_per_note best_step checkpoint"
    assert list(values) == ["music", "split", "model", *keys.split(), "sample"]
    assert values["step"] == "30"
    assert values["checkpoint"] == str(MODEL)
    history = load().progress["history"]
    losses = [row["val_loss"] for row in history]
    assert losses[-1] < losses[0] < 6
    assert values["val_loss"] == f"{min(losses):.4f}"
    event = r"^step (\d+) of 30: training loss ([\d.]+), validation loss ([\d.]+), \d+ seconds$"
    rows = []
    for row in history:
        rows.append((str(row["step"]), f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}"))
    assert re.findall(event, out, re.M) == rows
    lines = re.findall(r"^sample: 2 bars.*?, (\d+) notes, .*, (\S+)$", out, re.M)
    assert lines == [(str(Score(path).note_num()), str(path)) for path in samples()]
    assert len(lines) == 3


def test_block_at_the_end_has_the_loss_of_the_weights_that_write(folder, here, monkeypatch, capsys):
    evaluate, weights_at = pg.evaluate, []

    def rise_each_time(model, windows):
        weights_at.append(pg.copy_weights(model))
        return evaluate(model, windows) + 3 * windows.targets.numel() * len(weights_at)

    monkeypatch.setattr(pg, "evaluate", rise_each_time)
    assert train("--steps 20") == 0
    first, *_, last = load().progress["history"]
    block = dict(re.findall(r"^(\w+): ([\d.]+)$", capsys.readouterr().out, re.M))
    assert first["val_loss"] < last["val_loss"]
    assert block["val_loss"] == f"{first['val_loss']:.4f}"
    assert block["train_loss"] == f"{last['train_loss']:.4f}"
    for name, weight in load().weights("best").items():
        assert torch.equal(weight, weights_at[0][name]), name


def test_run_says_in_five_lines_what_it_does_and_draws_no_bar_into_a_file(folder, here, capsys):
    (folder / "page.mid").write_text("<html>")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    write_midi(folder / "high.mid", [[(i, 1, 60 + i, 80) for i in range(60)]])
    assert train("--steps 3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    before, _, _ = out.partition("\nstep ")
    names, lines = zip(*(line.split(": ", 1) for line in before.splitlines()), strict=True)
    assert names == ("skipped", "music", "changed", "split", "model")
    assert lines[0].startswith("2 files: drums.mid (only drums); page.mid (not a MIDI file)")
    music = r"13 files under midi, [\d.]+ hours, 1,009 notes, [\d,]+ tokens"
    assert re.fullmatch(music, lines[1])
    assert "notes outside the piano's range dropped: 11" in lines[2]
    assert re.fullmatch(r"13 works \(\d+ train, \d+ validation, 0 test\)", lines[3])
    model = (
        r"[\d,]+ parameters, (bfloat16|float32), not compiled for so few steps on cpu; Ctrl-C saves"
    )
    assert re.match(model, lines[4])


def test_one_file_trains_without_validation_and_names_of_files_are_made_printable(here, capsys):
    write_midi(here / "midi" / "a.mid", [[(i, 1, 60 + i % 12, 80) for i in range(64)]])
    Path(os.fsdecode(b"midi/caf\xe9.mid")).write_text("no music")
    Path("midi/x\nval_loss: 0\x1b[2J.mid").write_text("no music")
    assert train("--steps 3") == 0
    out = capsys.readouterr().out
    assert "1 work (1 train, 0 validation, 0 test)" in out
    assert "caf\\udce9.mid (not a MIDI file)" in out
    assert "x\\nval_loss: 0\\x1b[2J.mid (not a MIDI file)" in out
    assert "\nval_" not in out


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        pianogpt("--help")
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 130
    assert "python pianogpt.py --generate" in out
    text = " ".join(out.split())
    for group in vars(pg.Settings()).values():
        for f in pg.fields(group):
            assert re.search(rf"{pg.flag(f.name)}[ ,]", text)
            assert f.metadata["text"] in text, f.name
            if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
                assert f"{f.metadata['text']} (default: {f.default})" in text


# ---- Runs that stop, and go on


@contextlib.contextmanager
def signal_at_ten(monkeypatch, number):
    """Within it a training gets a signal after step 10."""
    validate = pg.Trainer.validate

    def validate_then_signal(trainer, *args):
        validate(trainer, *args)
        if trainer.step == 10:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(pg.Trainer, "validate", validate_then_signal)
        yield


def interrupt_at_ten(monkeypatch, line=""):
    """The exit code of a training with a Ctrl-C after step 10."""
    with signal_at_ten(monkeypatch, signal.SIGINT):
        return train(line)


def test_interrupted_run_equals_the_uninterrupted(trained, monkeypatch, capsys):
    assert interrupt_at_ten(monkeypatch, "--checkpoint b") == 130
    stopped = "stopped at step 10, saved b: to continue, repeat the command without --generate"
    assert stopped in capsys.readouterr().out
    assert pianogpt("--midi-dir midi --checkpoint b --device cpu") == 0, "it holds all the rest"
    assert "from step 10 on" in capsys.readouterr().out
    assert_same_run(MODEL, "b")


def test_run_goes_from_one_process_to_two_machines_and_back_and_computes_the_same(
    trained, monkeypatch
):
    """Only the first of the two has the music and the checkpoint."""
    steps = "--steps 16 --eval-every 1"
    assert train(f"{steps} --checkpoint one") == 0
    Path("rank0").mkdir()
    Path("rank1").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("rank0")
        shutil.copytree("../midi", "midi")
        assert interrupt_at_ten(monkeypatch, f"{steps} --checkpoint two") == 130
        assert step_of("two") == 10
    line = f"{SHORT} {steps} --checkpoint two --accumulate 8"
    run = start(run_on_two_ranks, trained, "train", line)
    mistake = start(run_on_two_ranks, trained, "mistake", f"{SHORT} --midi-dir nowhere")
    run.join(120)
    mistake.join(120)
    assert run.exitcode == 0, Path("train.err").read_text()[-2000:]
    out = Path("train").read_text()
    assert out.count("music: ") == 1
    assert "on cpu in 2 processes, from step 10 on" in out
    for key in ("train_loss", "val_loss"):
        one, two = (
            [row[key] for row in load(path).progress["history"]] for path in ("one", "rank0/two")
        )
        assert len(one) == 16
        assert one == pytest.approx(two, abs=1e-3)
    monkeypatch.chdir("rank0")
    assert pianogpt("--midi-dir midi --checkpoint two --steps 18") == 0
    assert step_of("two") == 18

    error = Path("../mistake.err").read_text()
    assert mistake.exitcode not in (0, None)
    assert error.count("pianogpt: there is no folder nowhere") == 1
    assert "RuntimeError" not in error
    assert os.listdir("../rank1") == []


def wait_for(text, out, process):
    """Wait until a process has printed a text, or is over."""
    while process.is_alive() and not (Path(out).exists() and text in Path(out).read_text()):
        time.sleep(0.01)


def test_signal_saves_says_how_to_continue_and_exits_with_128_and_its_number(folder, here):
    started = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        line = f"{SHORT} --steps 2000 --checkpoint {number}"
        started[number] = start(run_apart, here, f"{number}.out", line)
    for number, process in started.items():
        wait_for("\nstep 10 of", f"{number}.out", process)
        os.kill(process.pid, number)
    for number, process in started.items():
        process.join(60)
        assert process.exitcode == 128 + number
        assert "to continue, repeat the command" in Path(f"{number}.out").read_text()
        assert 10 <= step_of(f"{number}") < 1000
        error = Path(f"{number}.out.err").read_text()
        assert error == "", "no bar, no traceback, no library's warning"


def test_run_killed_in_any_write_or_moment_ends_as_the_uninterrupted(trained):
    """Writes are those of checkpoint and log in turn; the cache is warm."""
    line = f"{SHORT} --save-every 5 --checkpoint b"
    for write, step in ((1, 0), (2, 5), (3, 10)):
        process = start(run_apart, trained, f"{write}.out", line, write)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert list(trained.glob("b*.tmp")), "it was killed in a write"
        assert step_of("b") == step, "no more is lost than since the last save"
    for text in ("model: ", "step 20 "):
        process = start(run_apart, trained, f"{text}.out", line)
        wait_for(text, f"{text}.out", process)
        time.sleep(random.random() * 0.02)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert pianogpt(line) == 0
    assert_same_run(MODEL, "b")
    assert not list(trained.glob("*.tmp"))


@pytest.mark.parametrize("was_fast", [True, False])
def test_resumed_run_keeps_its_precision(was_fast, folder, here, monkeypatch, capsys):
    """It would not be equal bit for bit otherwise."""
    precision = {True: "bfloat16", False: "float32"}
    monkeypatch.setattr(pg, "has_fast_bfloat16", lambda device: was_fast)
    assert train("--steps 12") == 0
    assert interrupt_at_ten(monkeypatch, "--steps 12 --checkpoint half") == 130
    kept = load("half").machine
    assert kept["bfloat16"] is was_fast
    assert not kept["compiled"]
    monkeypatch.setattr(pg, "has_fast_bfloat16", lambda device: True)
    capsys.readouterr()
    assert train("--steps 12 --checkpoint half") == 0
    out = capsys.readouterr().out
    assert f" parameters, {precision[was_fast]}, not compiled for so few steps on cpu" in out
    assert "bit for bit" not in out
    assert_same_run(MODEL, "half")
    assert train("--steps 15") == 0
    assert load(MODEL).machine["bfloat16"], "a run that was finished begins anew"


def test_run_that_goes_on_elsewhere_says_that_it_is_not_the_same_bit_for_bit(
    folder, here, monkeypatch, capsys
):
    monkeypatch.setattr(pg, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(pg, "kind_of_device", lambda device: "CPU with wings")
    assert interrupt_at_ten(monkeypatch, "--steps 12") == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(pg, "has_fast_bfloat16", lambda device: False)
    capsys.readouterr()
    assert train("--steps 12") == 0
    out = capsys.readouterr().out
    text = r"^this is a CPU with .*, not a CPU with wings: the run continues, but not bit for bit$"
    assert re.search(text, out, re.M)
    assert " parameters, float32, " in out


class Boom(Exception):
    """What nobody expects."""


PHASES = [  # of a step: what is called, and how many calls after a start succeed
    (pg.Batches, "__getitem__", 3),
    (pg.Trainer, "add_gradients", 3),
    (torch.nn.utils, "clip_grad_norm_", 3),
    (pg, "orthogonalize", 3),
    (torch.Tensor, "lerp_", 100),  # of many a step
    (pg.Trainer, "validate", 0),
    (pg, "save_checkpoint", 1),
]


def test_run_that_fails_in_every_phase_of_a_step_saves_nothing_half_done(trained, monkeypatch):
    last = 0
    for place, name, successes in PHASES:
        real = getattr(place, name)
        calls = itertools.count()

        def fail(*args, real=real, calls=calls, successes=successes, **kwargs):
            if next(calls) == successes:
                raise Boom
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Boom):
            patch.setattr(place, name, fail)
            train("--save-every 2 --checkpoint b")
        assert last < step_of("b") < 30, name
        last = step_of("b")
    assert train("--save-every 2 --checkpoint b") == 0
    assert_same_run(MODEL, "b")


def test_diverged_weights_replace_no_good_ones_and_a_smaller_rate_goes_on(trained, capsys):
    good = MODEL.read_bytes()
    assert pianogpt("--midi-dir midi --steps 40 --lr 1 --save-every 1") == 2
    assert "the loss became" in capsys.readouterr().err
    kept = step_of()
    assert MODEL.read_bytes() == good or kept > 30
    assert pianogpt("--midi-dir midi --steps 40 --lr 1e-4") == 0
    assert len(generate("--bars 1")) == 3


def test_validation_that_is_no_number_ends_the_run(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(pg, "evaluate", lambda *args: math.nan)
    assert train() == 2
    assert "the loss became nan after 10 steps: pass a smaller --lr" in capsys.readouterr().err
    assert not MODEL.exists()


def test_wild_weight_decay_without_validation_is_a_sentence(folder, here, capsys):
    assert train("--val-percent 0 --weight-decay 1e9 --generate --bars 1") == 2
    assert "pass a smaller --lr" in capsys.readouterr().err


def test_weight_that_16_bits_cannot_hold_is_not_exported(trained, capsys):
    wide = load()
    wide.tensors["best/norm.weight"][0] = 1e5
    pg.save_checkpoint(Path("wide"), wide)
    assert pianogpt("--export small --checkpoint wide") == 2
    assert "too large for 16 bits" in capsys.readouterr().err
    assert not Path("small").exists()
    wide.tensors["best/norm.weight"][0] = math.nan
    pg.save_checkpoint(Path("wide"), wide)
    assert pianogpt("--generate --checkpoint wide") == 2
    assert "its best weights are not finite" in capsys.readouterr().err


def test_finished_run_that_gets_more_steps_rises_to_its_rate_again(trained):
    assert pianogpt("--midi-dir midi --steps 32") == 0
    progress = load().progress
    assert (progress["step"], progress["begin"]) == (32, 30)
    settings = pg.TrainSettings(steps=60, warmup=5)
    rates = [pg.learning_rate(step, settings, begin=30) for step in range(30, 60)]
    assert rates[0] == 0.2 and max(rates) == 1 and rates[-1] < 0.05


def test_run_that_is_shorter_than_its_warmup_rises_and_falls():
    settings = pg.TrainSettings(steps=100, warmup=200)
    rates = [pg.learning_rate(step, settings) for step in range(100)]
    assert (rates.index(max(rates)), max(rates)) == (19, 1)
    assert rates[-1] < 0.02


def test_cache_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    folder, here, monkeypatch, capsys
):
    Path("file").write_text("")
    assert train("--steps 3 --cache-dir file") == 0
    assert capsys.readouterr().out.count("no cache: file/") == 1
    monkeypatch.setattr(pg, "save_pieces", full_disk)
    monkeypatch.setattr(pg, "CACHE_SECONDS", 0)
    assert train("--steps 3 --checkpoint b --cache-dir new") == 0
    assert capsys.readouterr().out.count("(No space left on device)") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited there only")
def test_limit_on_memory_of_the_whole_program_is_kept_by_its_workers(folder, here):
    process = start(run_apart, here, "out", f"{SHORT} --steps 1 --cache-dir ''", 0, 3)
    process.join(60)
    assert process.exitcode == 0, Path("out.err").read_text()
    assert "music: 12 files" in Path("out").read_text()


def test_lock_that_was_deleted_while_it_was_taken_is_taken_again(here, monkeypatch):
    real = pg.FileLock.acquire
    deleted = []

    def acquire(lock, *args, **kwargs):
        taken = real(lock, *args, **kwargs)
        if not deleted:
            Path(lock.lock_file).unlink()
            deleted.append(1)
        return taken

    monkeypatch.setattr(pg.FileLock, "acquire", acquire)
    with pg.hold_lock(MODEL):
        assert Path(f"{MODEL}.lock").exists()


@pytest.mark.parametrize("given", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_several_processes_without_torchrun_are_a_sentence(given, trained, monkeypatch, capsys):
    monkeypatch.setattr(pg, "PROCESSES", 4)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(given, "1")
    assert pianogpt("--midi-dir midi --steps 40") == 2
    assert "WORLD_SIZE is 4: use torchrun to start several processes" in capsys.readouterr().err


def test_long_message_is_cut(capsys):
    assert pianogpt(f"--steps {'9' * 4000}") == 2
    assert len(capsys.readouterr().err) < 600


def test_mistakes_and_loading_a_model_do_not_wait_for_the_compiler_to_load():
    code = f"""
import sys, pathlib
import pianogpt as pg
assert pg.main(["--n-layers", "3"]) == 2
pg.load_checkpoint(pathlib.Path({str(SHIPPED)!r}))
sys.exit("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == 0, "torch._dynamo takes two seconds"


def test_mistake_that_only_another_rank_has_is_said(monkeypatch, capsys):
    monkeypatch.setattr(pg, "RANK", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert pianogpt("--n-layers 3") == 2
    assert (
        capsys.readouterr().err
        == "pianogpt: on rank 1: there is no flag --n-layers: --help lists all\n"
    )


def test_version_names_the_libraries(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        pianogpt("--version")
    assert re.match(
        r"PianoGPT [\d.]+ \(torch .*, miditok .*, symusic .*\)", capsys.readouterr().out
    )


def test_of_few_files_none_is_held_out_when_a_trained_model_learns_them(trained, capsys):
    line = f"--midi-dir midi --init-from {MODEL} --steps 3 --checkpoint"
    assert pianogpt(f"{line} a") == 0
    out = capsys.readouterr().out
    text = (
        "none are chosen to be held out (--val-percent 0), the learning rate is lower (--lr 6e-06)"
    )
    assert f"fewer than 20 files: {text}" in out
    assert load("a").settings["train"]["lr"] == 6e-6
    assert "the music has changed" not in out, "there are no losses yet"
    assert "12 train, 0 validation" in out
    assert pianogpt(f"{line} b --val-percent 10 --lr 1e-5") == 0
    out = capsys.readouterr().out
    assert "10 train, 2 validation" in out and "fewer" not in out
    assert load("b").settings["train"]["lr"] == 1e-5
    assert pianogpt(f"{line.replace('--steps 3', '--steps 5')} b") == 0
    assert "10 train, 2 validation" in capsys.readouterr().out, "as when it began"


def test_of_more_files_some_are_held_out_and_the_rate_is_higher(trained, monkeypatch, capsys):
    monkeypatch.setattr(pg, "FEW_FILES", 12)
    assert pianogpt(f"--midi-dir midi --init-from {MODEL} --steps 3 --checkpoint a") == 0
    assert "10 train, 2 validation" in capsys.readouterr().out
    assert load("a").settings["train"]["lr"] == 2.4e-5


def test_run_from_another_model_that_stopped_before_its_first_step_goes_on(
    trained, monkeypatch, capsys
):
    line = f"--midi-dir midi --init-from {MODEL} --checkpoint a"
    with monkeypatch.context() as stopped:
        stopped.setattr(pg.Trainer, "train", lambda *_: None)
        pianogpt(f"{line} --val-percent 10")
    assert load("a").step == 0
    assert pianogpt(f"{line} --batch-size 8") == 2
    advice = "the checkpoint has --batch-size 16: omit it or pass --fresh"
    assert advice in capsys.readouterr().err
    assert pianogpt(f"{line} --steps 2") == 0
    assert "none are chosen" not in capsys.readouterr().out
    assert load("a").settings["data"]["val_percent"] == 10


def test_two_runs_on_one_checkpoint_the_second_is_refused(trained, capsys):
    before = MODEL.read_bytes()
    with pg.hold_lock(MODEL):
        assert pianogpt("--midi-dir midi --steps 50") == 2
        assert len(generate("--bars 2")) == 3
    assert f"another run is training {MODEL}: wait, or pass" in capsys.readouterr().err
    assert MODEL.read_bytes() == before
    assert pianogpt("--midi-dir midi --steps 31") == 0


def test_link_to_a_checkpoint_shares_its_lock_and_stays_a_link(trained, capsys):
    Path("link").symlink_to(MODEL)
    with pg.hold_lock(MODEL.resolve()):
        assert pianogpt("--midi-dir midi --checkpoint link --steps 35") == 2
    assert "another run is training" in capsys.readouterr().err
    assert pianogpt("--midi-dir midi --checkpoint link --steps 35") == 0
    assert Path("link").is_symlink()
    assert step_of() == 35


def test_full_disk_is_said_and_training_continues_to_the_end(folder, here, monkeypatch, capsys):
    write, times = pg.write_atomically, itertools.count(1)

    def write_sometimes(path, data):
        if path == MODEL and next(times) in (1, 2, 5):  # at steps 2, 4 and 9
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(pg, "write_atomically", write_sometimes)
    monkeypatch.setattr(tempfile, "tempdir", "elsewhere")
    Path("elsewhere").mkdir()
    other = Path("elsewhere") / f"{MODEL.stem}-001{MODEL.suffix}"
    assert train("--steps 9 --save-every 2") == 2
    out, err = capsys.readouterr()
    assert out.count(f"cannot save {MODEL} (No space left on device): training goes on") == 2
    assert err == f"pianogpt: saved {other} instead: move it to {MODEL} to continue\n"
    assert (step_of(), step_of(other)) == (8, 9)


def test_disk_that_is_full_everywhere_is_said_and_no_empty_file_left(
    folder, here, monkeypatch, capsys
):
    def fail(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pg, "write_atomically", fail)
    monkeypatch.setattr(tempfile, "tempdir", "elsewhere")
    Path("elsewhere").mkdir()
    assert train("--steps 2") == 2
    assert "cannot be used: No space left on device" in capsys.readouterr().err
    assert not list(Path("elsewhere").iterdir())


def test_output_that_nobody_can_take_does_not_stop_training(folder, here, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with open("/dev/full", "wb", buffering=0) as device:
        full = io.TextIOWrapper(device, write_through=True)
        for steps, stream in ((3, full), (6, None)):
            monkeypatch.setattr(sys, "stdout", stream)
            assert train(f"--steps {steps} --generate --bars 1") == 0
            assert step_of() == steps
            assert len(samples()) == steps


def test_reader_that_stops_early_leaves_no_message_a_trained_model_and_its_pieces(trained):
    line = f"{SHORT} --steps 5 --checkpoint gone --generate --bars 1"
    command = f"{sys.executable} {pg.__file__} {line} 2>&1 | head -1"
    bash = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(bash, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"music: .*\n", done.stdout), "no library's warning comes first"
    assert step_of("gone") == 5
    assert len(samples()) == 3


def test_missing_package_is_one_sentence_that_says_what_to_do():
    run = f"runpy.run_path({pg.__file__!r}, run_name='__main__')"
    code = f"import runpy, sys; sys.modules['miditok'] = None; {run}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "miditok" in done.stderr
    assert "run pip install -r requirements.txt (Python 3.10+)" in done.stderr


def test_run_that_fails_leaves_the_last_checkpoint_as_it_was_and_no_lock(trained, monkeypatch):
    before = MODEL.read_bytes()

    def evaluate(*args):
        raise RuntimeError("a mistake of the script")

    with monkeypatch.context() as patch:
        patch.setattr(pg, "evaluate", evaluate)
        with pytest.raises(RuntimeError, match="a mistake of the script"):
            pianogpt("--midi-dir midi --steps 40")
    assert MODEL.read_bytes() == before
    assert pianogpt("--midi-dir midi --steps 40") == 0
    assert step_of() == 40


def test_model_that_does_not_fit_into_memory_is_said(folder, here):
    """For real: the process may take no more than two gigabytes beyond what it has."""
    line = "--midi-dir midi --device cpu --n-layer 1 --n-head 1 --n-embd 16384 --steps 1"
    process = start(run_apart, here, "out", line, 0, 2)
    process.join(60)
    assert process.exitcode == 2
    advice = "there is not enough memory: pass --accumulate N, or smaller sizes"
    assert Path("out.err").read_text().startswith(f"pianogpt: {advice}")
    assert not MODEL.exists()


@pytest.mark.parametrize(
    "error, advice",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "pass --accumulate N, or smaller sizes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "pass --accumulate N"),
        (torch._dynamo.exc.TorchDynamoException("no compiler"), "pass --no-compile"),
    ],
)
def test_what_this_machine_cannot_compute_is_said_and_keeps_the_last_checkpoint(
    error, advice, trained, monkeypatch, capsys
):
    before = MODEL.read_bytes()

    def add_gradients(*args):
        raise error

    monkeypatch.setattr(pg.Trainer, "add_gradients", add_gradients)
    assert pianogpt("--midi-dir midi --steps 40") == 2
    err = capsys.readouterr().err
    assert err.startswith("pianogpt: ")
    assert advice in err
    assert err.count("\n") == 1
    assert MODEL.read_bytes() == before


def test_compiler_that_fails_is_said_and_the_run_can_go_on_without_it(
    folder, here, monkeypatch, capsys
):
    def fail(*args):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    assert train("--compile --steps 3") == 2
    assert "torch.compile does not work here: pass --no-compile" in capsys.readouterr().err
    assert train("--steps 3") == 0
    assert step_of() == 3


def test_loss_that_is_no_number_says_what_helps_and_a_smaller_rate_goes_on(
    folder, here, monkeypatch, capsys
):
    add_gradients = pg.Trainer.add_gradients

    def break_at_seven(trainer, batch):
        return math.nan if trainer.step == 7 else add_gradients(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pg.Trainer, "add_gradients", break_at_seven)
        assert train("--steps 12") == 2
        advice = "the loss became nan after 7 steps: pass a smaller --lr\n"
        assert advice in capsys.readouterr().err
        assert not MODEL.exists()
        assert train("--steps 12 --save-every 5") == 2
        assert step_of() == 5, "what was good is not replaced"
    assert train("--steps 12 --save-every 5 --lr 1e-4") == 0
    assert step_of() == 12
    assert load().settings["train"]["lr"] == 1e-4


def test_log_that_cannot_be_written_is_said_and_the_model_saved_and_used(folder, here, capsys):
    Path(f"{MODEL}.csv").mkdir()
    assert train("--steps 3 --generate --bars 1") == 0
    assert f"cannot save {MODEL}.csv (Is a directory)" in capsys.readouterr().out
    assert step_of() == 3
    assert len(samples()) == 3


def start_script(line, out, **environment):
    """The script as a user starts it, its output in out and out.err."""
    with open(out, "wb") as stdout, open(f"{out}.err", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, pg.__file__, *shlex.split(line)],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def workers_of(pid):
    """The processes that a process has started and that run."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(caught[1], 16) >> (number - 1) & 1


def is_running(pid):
    """Whether a process is there, and not only its exit code."""
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_signal_ends_in_one_line_while_modules_load_and_while_workers_read(here):
    for i in range(6):
        notes = [(n / 8, 0.1, 30 + (n * (i + 1)) % 60, 80) for n in range(20_000)]
        write_midi(Path("midi", f"{i}.mid"), [notes])
    line = f"--evaluate midi --cache-dir '' --checkpoint '{SHIPPED}'"
    early = start_script(line, "early")
    late = start_script(line, "late")
    while not catches(early.pid, signal.SIGTERM):  # as the script does first
        time.sleep(0.01)
    os.kill(early.pid, signal.SIGINT)
    while late.poll() is None and not workers_of(late.pid):
        time.sleep(0.01)
    workers = workers_of(late.pid)
    os.kill(late.pid, signal.SIGTERM)
    assert early.wait(20) == 128 + signal.SIGINT
    assert late.wait(20) == 128 + signal.SIGTERM
    for out in ("early.err", "late.err"):
        assert Path(out).read_text() == "pianogpt: stopped\n"
    assert workers
    time.sleep(0.2)
    assert not any(is_running(pid) for pid in workers)


def test_hangup_that_is_ignored_stays_ignored():
    """As nohup wants it."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pg.catch_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
        assert not caught
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_first_signal_is_caught_and_the_second_has_its_old_effect():
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with pg.catch_signals() as caught:
            signal.raise_signal(signal.SIGTERM)
            assert (caught, seen) == ([signal.SIGTERM], [])
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, old)


def test_signal_ends_the_program_also_where_nothing_can_be_written(monkeypatch):
    """As when the window of the terminal was closed."""
    codes = []

    def write(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "_exit", codes.append)
    with contextlib.suppress(OSError):
        pg.stop_at_once(signal.SIGHUP, None)
    assert codes == [128 + signal.SIGHUP]


def test_ctrl_c_that_also_ends_the_compiler_is_no_failure_of_the_compiler(
    folder, here, monkeypatch, capsys
):
    def add_gradients(trainer, batch):
        signal.raise_signal(signal.SIGINT)
        raise torch._dynamo.exc.TorchDynamoException("the compiler was ended")

    monkeypatch.setattr(pg.Trainer, "add_gradients", add_gradients)
    assert train("--steps 3") == 128 + signal.SIGINT
    out, err = capsys.readouterr()
    assert out.endswith("stopped before the first step\n")
    assert not err
    assert not MODEL.exists()


def test_ctrl_c_in_the_last_save_saves_and_writes_no_music(folder, here, monkeypatch, capsys):
    save = pg.save_run

    def save_run(path, learned, trainer):
        save(path, learned, trainer)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pg, "save_run", save_run)
    assert train("--steps 3 --generate") == 128 + signal.SIGINT
    assert capsys.readouterr().out.endswith("stopped after the last step\n")
    assert step_of() == 3
    assert not list(Path("samples").glob("*"))


def test_full_memory_is_not_called_a_damaged_checkpoint(trained, monkeypatch, capsys):
    def load_tensors(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(pg, "load_tensors", load_tensors)
    assert pianogpt("--generate") == 2
    assert "there is not enough memory" in capsys.readouterr().err


def test_exported_model_does_not_take_a_folder_of_music(trained, capsys):
    assert pianogpt("--export small") == 0
    assert pianogpt("--generate --checkpoint small --midi-dir midi") == 2
    assert "small was exported and can only generate: omit --midi-dir" in capsys.readouterr().err


def test_checkpoint_that_cannot_be_set_aside_leaves_no_empty_file(trained, monkeypatch):
    def replace(old, new):
        raise PermissionError(13, "Permission denied", str(old))

    before = sorted(os.listdir())
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        pg.set_aside(MODEL)
    assert sorted(os.listdir()) == before


def test_machine_on_which_no_process_can_be_started_is_a_sentence(folder, here, monkeypatch):
    def schedule(*args, **kwargs):
        raise pg.BrokenProcessPool("no fork")

    monkeypatch.setattr(pg.ProcessPool, "map", schedule)
    with pytest.raises(pg.UserError, match="cannot start a process to read files"):
        pg.read_folder(folder, pg.Vocabulary(pg.TokenSettings()), "")


@pytest.mark.parametrize("flags, write", [("--export small", 1), ("--generate --bars 1", 1)])
def test_second_signal_deletes_the_half_of_a_file(flags, write, trained):
    """Writing catches the first one, which here is followed at once by another."""
    before = {*os.listdir()}
    process = start(run_apart, trained, "out", flags, write, 0, 1, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert Path("out.err").read_text() in ("", "pianogpt: stopped\n")
    new = {*os.listdir()} - before
    assert new <= {"out", "out.err", "samples", "small", "small.csv"}
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the cores of a process")
def test_busy_machine_does_not_make_it_many_times_slower(trained):
    """Two threads on two cores, alone and beside two busy loops."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    seconds = []
    busy = []
    try:
        for _ in range(2):
            line = "--generate --bars 30 --num-samples 3 --seed 1 --device cpu"
            began = time.monotonic()
            process = start(run_apart, trained, "out", line, 0, 0, 2)
            os.sched_setaffinity(process.pid, cores)
            process.join(60)
            assert process.exitcode == 0
            seconds.append(time.monotonic() - began)
            for core in cores:
                busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                os.sched_setaffinity(busy[-1].pid, [core])
    finally:
        for process in busy:
            process.kill()
    alone, beside = seconds
    assert beside < 4 * alone, "half of the cores are left"


# ---- Which run is meant


@pytest.mark.parametrize(
    "given, trains",  # without a checkpoint; with one at step 10 of 30; with a finished one
    [
        ({}, [True, True, False]),
        ({"steps": 40}, [True, True, True]),
        ({"steps": 10}, [True, False, False]),
        ({"generate": True}, [True, False, False]),
        ({"generate": True, "steps": 40}, [True, True, True]),
        ({"generate": True, "steps": 20}, [True, True, False]),
        ({"evaluate": "midi"}, [None, False, False]),
        ({"export": "small"}, [None, False, False]),
        ({"fresh": True}, [True, True, True]),
    ],
)
def test_mode_and_steps_decide_whether_to_train(given, trains, here, monkeypatch):
    monkeypatch.setattr(pg, "check_checkpoint", lambda checkpoint: None)
    program = pg.make_settings(given, None, training=False).program
    found = []
    for step in (None, 10, 30):
        if step:
            checkpoint = pg.Checkpoint(
                about="",
                settings={"data": {}, "tokens": {}, "model": {}, "train": {"steps": 30}},
                vocabulary=[],
                folder="midi",
                files=[],
                pieces=[],
                progress={"step": step, "history": []},
                tensors={"weights/a": torch.zeros(1)},
            )
            pg.save_checkpoint(Path("m"), checkpoint)
        with ExitStack() as stack:
            try:
                checkpoint, training = pg.open_checkpoint(Path("m"), given, program, stack)
                assert (checkpoint is None) == (step is None or program.fresh)
            except pg.UserError as e:
                assert "there is no checkpoint" in str(e)
                training = None
        found.append(training)
    assert found == trains


def test_generating_leaves_an_unfinished_run_as_it_is_unless_steps_are_given(
    folder, here, monkeypatch, capsys
):
    assert interrupt_at_ten(monkeypatch) == 130
    assert len(generate("--bars 1")) == 3
    assert step_of() == 10
    assert f"written by: {MODEL}, step 10 of 30, trained on midi\n" in capsys.readouterr().out
    for steps in (12, 11):
        assert len(generate(f"--bars 1 --steps {steps} --midi-dir midi")) == 3
        assert step_of() == 12


def test_finished_run_is_left_alone_and_says_how_to_train_further(trained, capsys):
    before = MODEL.read_bytes()
    assert pianogpt("") == 0
    advice = f"{MODEL} has done its 30 steps: pass a larger --steps to train on, or --fresh to"
    assert advice in capsys.readouterr().out
    assert MODEL.read_bytes() == before


def test_music_that_is_gone_or_named_in_another_way_does_not_stop_the_model(trained, capsys):
    write_midi(Path("midi/new.mid"), scale(99))
    assert len(generate("--bars 1 --midi-dir ./midi/")) == 3
    assert "in ./midi/ 1 file new or changed" in capsys.readouterr().out
    for path in Path("midi").iterdir():
        path.unlink()
    assert len(generate("--bars 1")) == 3


def test_each_state_is_saved_once(folder, here, monkeypatch):
    steps = []
    save_run = pg.save_run

    def remember(path, learned, trainer):
        steps.append(trainer.step)
        save_run(path, learned, trainer)

    monkeypatch.setattr(pg, "save_run", remember)
    assert train("--steps 12 --save-every 4") == 0
    assert steps == [4, 8, 12]


def test_old_log_is_kept_though_its_checkpoint_is_gone(trained):
    Path("pianogpt-old-001.safetensors.csv").write_text("old")
    assert train("--fresh --steps 3") == 0
    assert Path("pianogpt-old-001.safetensors.csv").read_text() == "old"
    assert Path("pianogpt-old-002.safetensors").exists()


def test_reason_for_not_compiling_is_said_only_if_it_is_one(trained, monkeypatch):
    monkeypatch.setattr(pg, "compiler_works", lambda: False)
    settings = pg.Settings()
    trainer = pg.make_trainer(settings, pg.Vocabulary(settings.tokens), torch.device("cpu"))
    assert ", not compiled on cpu" in pg.describe_model(trainer, settings)
    settings.train.steps = 100
    assert ", not compiled for so few steps on cpu" in pg.describe_model(trainer, settings)


def test_prompt_that_takes_too_much_memory_is_said(trained, monkeypatch, capsys):
    monkeypatch.setattr(pg, "read_prompt", lambda *args: np.empty(1 << 45))  # in the worker
    assert pianogpt("--generate --prompt midi/piece00.mid") == 2
    assert "midi/piece00.mid cannot be continued (not enough memory)" in capsys.readouterr().err


def test_larger_steps_train_a_finished_model_further_and_changed_music_is_said(trained, capsys):
    assert pianogpt("--midi-dir midi --steps 35") == 0
    assert "new or changed" not in capsys.readouterr().out
    write_midi(Path("midi/new.mid"), scale(99))
    Path("midi/piece00.mid").unlink()
    assert pianogpt("--midi-dir midi --steps 40") == 0
    changed = "learned from midi; in midi 1 file new or changed, 1 file gone: training goes on"
    assert changed in capsys.readouterr().out
    checkpoint = load()
    rows = [(row["step"], "val_loss" in row) for row in checkpoint.progress["history"]]
    assert rows == [(10, False), (20, False), (30, False), (35, False), (40, True)], (
        "the log goes on, but losses on other music do not compare"
    )
    assert Path(f"{MODEL}.csv").read_text().count("\n") == 6
    known = checkpoint.tensors["intervals"].tolist().count(pg.PIECE_END)
    assert known == len(checkpoint.pieces)
    assert 10 <= known <= 11, "what it learned before is counted once"


def test_works_stay_on_their_side_whatever_comes_into_the_folder(trained, vocab, capsys):
    """Also where the number of works or another --val-percent would hold others out."""
    trained_on = set(load().pieces)
    for n in range(30):
        write_midi(Path(f"midi/new{n:02d}.mid"), scale(n, bars=6 + n)[:1])
    assert pianogpt("--midi-dir midi --steps 31") == 0
    assert "training goes on" in capsys.readouterr().out
    assert {name for name in load().pieces if name.startswith("piece")} == trained_on
    settings = pg.Settings(program=pg.ProgramSettings(midi_dir="midi"))
    settings.data.val_percent = 90.0
    _, _, learned = pg.prepare_data(settings, vocab, None, load())
    assert trained_on <= set(learned.pieces)
    text = r"^split: \d+ works kept where the earlier training had them$"
    assert re.search(text, capsys.readouterr().out, re.M)


def test_side_of_a_file_is_that_of_its_content_whatever_it_is_called(trained, vocab):
    held_out = {path.name for path in Path("midi").iterdir()} - set(load().pieces)
    swapped = {max(held_out): min(load().pieces), min(load().pieces): max(held_out)}
    for old in swapped:
        Path("midi", old).rename(f"midi/{old}.tmp")
    for old, new in swapped.items():
        Path(f"midi/{old}.tmp").rename(Path("midi", new))
    settings = pg.Settings(program=pg.ProgramSettings(midi_dir="midi", cache_dir=""))
    _, _, learned = pg.prepare_data(settings, vocab, None, load())
    expected = {swapped.get(name, name) for name in load().pieces}
    assert set(learned.pieces) == expected
    assert sorted(learned.held_out) == sorted(load().held_out)


def test_new_music_is_said_when_its_model_writes(trained, capsys):
    write_midi(Path("my_midis/a.mid"), scale(50))
    write_midi(Path("my_midis/b.mid"), scale(51))
    assert train("--midi-dir my_midis --checkpoint m --steps 3") == 0
    assert len(generate("--checkpoint m --bars 1")) == 3
    assert "new or changed" not in capsys.readouterr().out
    write_midi(Path("my_midis/new.mid"), scale(52))
    assert len(generate("--checkpoint m --bars 1")) == 3
    changed = "learned from my_midis; in my_midis 1 file new or changed, 0 files gone: more --steps"
    assert changed in capsys.readouterr().out
    assert pianogpt("--checkpoint m") == 0
    assert "1 file new or changed" in capsys.readouterr().out
    assert len(generate("--bars 2")) == 3, "by the model of midi, whatever lies in my_midis"
    assert "new or changed" not in capsys.readouterr().out


def test_held_out_music_is_not_learned_from_another_folder(trained, capsys):
    held_out = set(load().held_out)
    for path, content in pg.find_files(Path("midi")).items():
        if content in held_out:
            Path("other").mkdir(exist_ok=True)
            shutil.copy(path, "other")
    assert pianogpt("--midi-dir other --steps 31") == 2
    assert "no piece under other is left to train on: all are held out" in capsys.readouterr().err
    assert step_of() == 30


def test_music_of_another_folder_is_used_only_if_both_folder_and_steps_say_so(
    trained, monkeypatch, capsys
):
    for name, seed in (("a", 0), ("b", 1)):
        pitches = np.random.default_rng(seed).integers(48, 84, 64).tolist()
        tune = [(n / 2, 0.5, pitch, 80) for n, pitch in enumerate(pitches)]
        write_midi(Path(f"my_midis/{name}.mid"), [tune])
    assert interrupt_at_ten(monkeypatch, "--checkpoint unfinished") == 130
    before = MODEL.read_bytes()
    differs = (
        "learned from midi; in my_midis 2 files new or changed, 12 files gone: pass --midi-dir midi"
    )
    for line, sentence in (
        ("--midi-dir my_midis --generate", differs),
        ("--midi-dir my_midis", differs),
        ("--steps 40", differs),
        ("--checkpoint unfinished", differs),
        ("--midi-dir nowhere --generate", "there is no folder nowhere"),
    ):
        assert pianogpt(line) == 2, line
        assert sentence in capsys.readouterr().err, line
    assert MODEL.read_bytes() == before
    assert step_of("unfinished") == 10
    assert pianogpt("--midi-dir my_midis --steps 31") == 0
    assert "2 files new or changed, 12 files gone: training goes on" in capsys.readouterr().out


def test_fresh_starts_over_and_keeps_the_old_file(trained, capsys):
    before = [Path(f"{MODEL}{suffix}").read_bytes() for suffix in ("", ".csv")]
    assert train("--fresh --n-embd 16 --steps 3") == 0
    old = "pianogpt-old-001.safetensors"
    assert f"kept the old checkpoint as {old}" in capsys.readouterr().out
    assert [Path(f"{old}{suffix}").read_bytes() for suffix in ("", ".csv")] == before
    assert load().settings["model"]["n_embd"] == 16


def test_music_is_looked_for_beside_the_script_where_the_current_folder_has_none(
    here, monkeypatch, capsys
):
    clone = write_folder(here / "clone" / "my_midis")
    monkeypatch.setattr(pg, "__file__", str(clone.with_name("pianogpt.py")))
    clone.with_name("pianogpt.py").write_text(Path(ROOT, "pianogpt.py").read_text())
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    line = " ".join([*TINY, "--steps 2"])
    assert pianogpt(line) == 0
    assert f"music: 12 files under {clone}" in capsys.readouterr().out
    (write_folder(Path("my_midis")) / "piece00.mid").unlink()
    assert pianogpt(f"{line} --fresh") == 0
    assert "music: 11 files under my_midis" in capsys.readouterr().out, "its own comes first"
    assert pianogpt(f"{line} --checkpoint b --midi-dir ../clone/my_midis") == 0
    assert "music: 12 files under ../clone/my_midis" in capsys.readouterr().out


# ---- Mistakes

NEW = f"{SHORT} --checkpoint new"


def times_of_files(folder):
    """{path: when it was written} of all files but the cache, and locks of what is there."""
    times = {}
    for path in folder.rglob("*"):
        is_its_lock = path.suffix == ".lock" and path.with_suffix("").exists()
        if path.is_file() and not is_its_lock and ".pianogpt-cache" not in path.parts:
            times[path] = path.stat().st_mtime_ns
    return times


@pytest.mark.parametrize(
    "line, sentence",
    [
        # the music
        (f"{SHORT} --fresh --midi-dir nowhere", "there is no folder nowhere: make it"),
        (f"{NEW} --midi-dir my_midis", "there is no folder my_midis: make it"),
        (f"{NEW} --midi-dir empty", "no MIDI file under empty"),
        (f"{NEW} --midi-dir bad", "none of the 1 MIDI files under bad"),
        # the checkpoint
        ("--checkpoint loop --steps 40", "loop is a link that leads nowhere: name a file"),
        (f"--checkpoint {'x' * 5000}", "File name too long"),
        (f"{SHORT} --checkpoint bad/page.mid/x", "bad/page.mid cannot be used: File exists"),
        ("--checkpoint bad/page.mid", "bad/page.mid is damaged or not a PianoGPT checkpoint"),
        ("--checkpoint bad --fresh", "bad is a folder: name a file"),
        ("--evaluate midi --checkpoint new", "there is no checkpoint new: name another, or train"),
        ("--export a --checkpoint new", "there is no checkpoint new: name another, or train it"),
        ("--generate --checkpoint typo", "there is no checkpoint typo: name another, or train it"),
        (
            "--generate --checkpoint shifted",
            "the checkpoint's vocabulary does not match this MidiTok",
        ),
        (f"--export {MODEL}", f"{MODEL} already exists: name another file"),
        (
            "--steps 99 --midi-dir midi --init-from shifted",
            f"{MODEL} did not start from shifted: pass another --checkpoint",
        ),
        (f"{NEW} --init-from none", "there is no checkpoint none"),
        (
            f"{NEW} --init-from {MODEL} --n-embd 64",
            "the checkpoint has --n-embd 32: omit it, as the sizes are those of --init-from",
        ),
        ("--generate --lr 1", "the checkpoint has --lr 0.0003: omit it"),
        ("--generate --n-embd 64", "the checkpoint has --n-embd 32: omit it"),
        ("--evaluate midi --batch-size 4", "--batch-size does nothing with --evaluate"),
        ("--export a --fresh", "--fresh does nothing with --export"),
        ("--grid 4", "the checkpoint has --grid 24: omit it"),
        ("--midi-dir midi --steps 99 --batch-size 9", "the checkpoint has --batch-size 4: omit it"),
        # the command line
        ("--n-layers 3", "there is no flag --n-layers: --help lists all"),
        ("--smaples-dir=x", "there is no flag --smaples-dir=x: --help lists all"),
        ("generate", "there is no flag generate: --help lists all"),
        ("--bars 8", "--bars does nothing without --generate"),
        ("--top-k 8", "--top-k does nothing without --generate"),
        ("--about mine", "--about does nothing without --export"),
        ("--generate --prompt-bars 8", "--prompt-bars does nothing without --prompt"),
        ("--generate --evaluate midi", "--generate and --evaluate cannot be combined"),
        ("--export a --evaluate midi", "--evaluate and --export cannot be combined"),
        ("--steps many", "--steps: invalid int value: 'many'"),
        ("--steps", "--steps: expected one argument"),
        ("--device tpu9", "there is no device tpu9 here: pass --device auto, or cpu"),
        ("--device meta", "there is no device meta here: pass --device auto, or cpu"),
        ("--device hpu", "there is no device hpu here: pass --device auto, or cpu"),
        # numbers
        ("--steps -5", "--steps is -5 but must be from 1 to 1,000,000,000"),
        (f"{NEW} --weight-decay nan", "--weight-decay is nan but must be from 0 to"),
        (f"{NEW} --n-embd 100 --n-head 3", "--n-embd must be a multiple of 2 x --n-head"),
        ("--generate --tempo 3.5", "--tempo is 3.5 but must be 0 or from 4 to 1,000"),
        ("--generate --temperature -1", "--temperature is -1.0 but must be 0 or from 0.01 to 10"),
        (
            "--generate --temperature 1e-300",
            "--temperature is 1e-300 but must be 0 or from 0.01 to 10",
        ),
        ("--generate --top-k -1", "--top-k is -1 but must be from 0"),
        ("--generate --top-p 1.5", "--top-p is 1.5 but must be from 0 to 1"),
        ("--generate --min-p 2", "--min-p is 2.0 but must be from 0 to 1"),
        # the pieces
        (
            f"{NEW} --generate --prompt none.mid",
            "none.mid cannot be continued (not a file): pass another --prompt",
        ),
        (
            "--generate --prompt bad/page.mid",
            "bad/page.mid cannot be continued (not a MIDI file): pass another --prompt",
        ),
        (
            "--generate --prompt midi/piece00.mid --prompt-bars 99",
            "midi/piece00.mid has only 8 bars: ask for fewer",
        ),
        (
            "--generate --prompt midi/piece00.mid --bars 5",
            "the prompt alone has 8 bars: pass a larger --bars",
        ),
        ("--generate --rewrite 3", "--rewrite does nothing without --prompt"),
        ("--generate --prompt midi/piece00.mid --rewrite ''", "--rewrite is empty: write a value"),
        ("--generate --style '' --guidance 2", "--style is empty: write a value after it, or omit"),
        ("--evaluate ''", "--evaluate is empty"),
        ("--init-from ''", "--init-from is empty"),
        ("--checkpoint ''", "--checkpoint is empty"),
        ("--generate --guidance 2", "--guidance does nothing without --style"),
        (f"{REWRITE} --bars 9", "--rewrite keeps the length of the prompt: omit --bars"),
        (f"{REWRITE} --continuation-only", "omit --continuation-only"),
        (f"{REWRITE}-9", "--rewrite 3-9: the prompt only has bars 1 to 8"),
        (f"{REWRITE} --prompt-bars 2", "--rewrite 3: the prompt only has bars 1 to 2"),
        (f"{NEW} {REWRITE} --gap-percent 0", "this model has not learned to --rewrite: train"),
        ("--generate --style Bach", "this model knows no styles: train one with --style-from-f"),
        (f"{NEW} --style-from-folder --midi-dir midi", "no file lies in a style's folder"),
        (f"{NEW} --generate --chords H", 'cannot read "H" in "H"'),
        ("--generate --chords 'C Hm'", 'cannot read "Hm" in "Hm": write C, Am,'),
        (f"{NEW} --generate --samples-dir bad/page.mid", "bad/page.mid cannot be used: File exi"),
        ("--generate --bars 2 --samples-dir bad/page.mid", "bad/page.mid cannot be used: File exi"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2_and_changes_nothing(
    line, sentence, mistaken, monkeypatch, capsys
):
    monkeypatch.chdir(mistaken)
    before = times_of_files(mistaken)
    assert pianogpt(line) == 2
    out, err = capsys.readouterr()
    assert err.startswith("pianogpt: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert "step " not in out
    assert times_of_files(mistaken) == before, "not even a lock of what is not there"
    assert not Path("samples").exists()


def test_samples_folder_that_cannot_be_written_is_said_before_training(
    folder, here, monkeypatch, capsys
):
    access = os.access

    def access_all_but_samples(path, mode):
        return str(path) != "samples" and access(path, mode)

    monkeypatch.setattr(os, "access", access_all_but_samples)
    assert train("--generate") == 2
    assert "samples cannot be written to: pass another --samples-dir" in capsys.readouterr().err
    assert not MODEL.exists()


def test_piece_that_cannot_be_written_is_named_and_leaves_no_file(trained, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", full_disk)
    assert pianogpt("--generate --bars 2") == 2
    error = "pianogpt: samples/sample-001.mid cannot be used: No space left on device\n"
    assert capsys.readouterr().err == error
    assert samples() == []


# ---- Music


def test_shipped_model_is_loaded_and_writes_music_that_it_was_not_told(here, capsys):
    shipped = ROOT / "samples" / "piano.safetensors"
    scores = generate(f"--checkpoint {shipped} --bars 2 --num-samples 4 --device cpu")
    assert len(scores) >= 2, "one without notes is left out"
    out = capsys.readouterr().out
    assert re.search(r"^written by: .*piano\.safetensors, step \d+ .*ASAP .*CC BY-NC-SA", out, re.M)
    assert len(re.findall(r"^sample: 2 bars, .* longest known run \d+ notes \(", out, re.M)) >= 2


def test_checkpoint_alone_is_enough_to_generate_and_to_name_the_longest_known_runs(
    trained, monkeypatch, capsys
):
    (trained / "another machine").mkdir()
    monkeypatch.chdir("another machine")
    shutil.copy(f"../{MODEL}", "x")
    assert len(generate("--checkpoint x --bars 6")) == 3
    line = (
        r"^sample: 6 bars(?: \(cut\))?, [A-G][b#]? (?:major|minor), (\d+) notes, [\d.]+ seconds, "
        r"longest known run (\d+) notes \(piece\d\d\.mid\), samples/sample-00\d\.mid$"
    )
    lines = re.findall(line, capsys.readouterr().out, re.M)
    assert len(lines) == 3
    assert all(0 < int(run) <= int(notes) for notes, run in lines)


def test_known_run_is_looked_for_in_so_many_notes_and_says_so(trained, monkeypatch, capsys):
    assert len(generate("--bars 6 --num-samples 1")) == 1
    assert " of the first " not in capsys.readouterr().out
    monkeypatch.setattr(pg, "SEARCHED_NOTES", 100)
    assert len(generate("--bars 6 --num-samples 1")) == 1
    out = capsys.readouterr().out
    assert re.search(r"longest known run \d+ notes? of the first 100[ ,]", out)


def test_same_seed_writes_the_same_bytes_into_new_files_and_no_seed_writes_others(trained, capsys):
    def write(line):
        assert pianogpt(f"--generate --bars 3 --num-samples 2 {line}") == 0

    for line in ("a --seed 0", "a --seed 0", "b --seed 0", "c", "d"):
        write(f"--samples-dir {line}")
    a, b, c, d = ([path.read_bytes() for path in samples(name)] for name in "abcd")
    assert a == b * 2
    assert b[0] != b[1]
    assert len({b[0], c[0], d[0]}) == 3
    seeds = re.findall(r"^seed: (\d+)", capsys.readouterr().out, re.M)
    for name, seed in zip("cd", seeds, strict=True):
        _, origin = texts_of(Score(Path(name, "sample-001.mid")))
        assert origin["seed"] == int(seed)
    write(f"--samples-dir e --seed {seeds[1]}")
    assert [path.read_bytes() for path in samples("e")] == d


def test_temperature_0_writes_one_piece_and_says_so_and_others_that_leave_no_choice_write_it(
    trained, capsys
):
    [likeliest] = generate("--temperature 0 --bars 2 --num-samples 3")
    said = "temperature 0: all pieces would be the same, so only one is written"
    assert said in capsys.readouterr().out
    assert likeliest.note_num()
    for line in ("--top-k 1", "--top-p 1e-6", "--min-p 1"):
        scores = generate(f"--temperature 1 --bars 2 --num-samples 2 {line}")
        assert [notes_of(score) for score in scores] == [notes_of(likeliest)] * 2, line
    assert said not in capsys.readouterr().out


def test_length_and_tempo_are_the_ones_that_are_asked_for(trained, capsys):
    assert len(generate("--bars 3 --num-samples 4")) == 4
    assert re.findall(r"sample: (\d+) bars", capsys.readouterr().out) == ["3"] * 4
    slow, fast = (generate(f"--bars 4 --num-samples 1 --tempo {tempo}")[0] for tempo in (60, 120))
    assert [round(t.qpm) for t in slow.tempos] == [60]
    assert [round(t.qpm) for t in fast.tempos] == [120]
    assert notes_of(slow) == notes_of(fast)
    assert slow.to("second").end() == pytest.approx(2 * fast.to("second").end(), rel=1e-3)


def test_few_pieces_without_notes_are_counted_and_none_with_notes_is_an_error(
    trained, monkeypatch, vocab, capsys
):
    good = pg.generate
    empty = np.array([vocab.bos_id, vocab.bar_id, vocab.id_of["TimeSig_4/4"]])
    monkeypatch.setattr(pg, "generate", lambda *args: [*good(*args), (3, empty)])
    assert pianogpt("--generate --bars 1 --num-samples 2 --seed 1") == 0
    out = capsys.readouterr().out
    assert "piece 3 has no notes and is left out: train longer" in out
    assert "sample: 1 bar, " in out
    assert len(samples()) == 2
    monkeypatch.setattr(pg, "generate", lambda *args: [(1, empty), (2, empty)])
    assert pianogpt("--generate") == 2
    assert "no piece has notes: train longer" in capsys.readouterr().err


def test_long_settings_leave_the_file_whole(trained):
    [score] = generate(f"--bars 1 --num-samples 1 --chords '{'C Am ' * 4000}'")
    [origin, *_] = [marker.text for marker in score.markers if marker.text.startswith("PianoGPT")]
    assert len(origin) < 2000


def test_ctrl_c_while_writing_keeps_the_finished_pieces(trained, monkeypatch, capsys):
    advance, times = pg.Vocabulary.advance, itertools.count()

    def advance_then_stop(vocab, state, ids):
        state = advance(vocab, state, ids)
        is_over = (state.bar > 12) | (state.kind == pg.Kind.EOS)
        if is_over.any() and next(times) == 0:
            signal.raise_signal(signal.SIGINT)
        return state

    monkeypatch.setattr(pg.Vocabulary, "advance", advance_then_stop)
    assert pianogpt("--generate --bars 12 --num-samples 8 --seed 1") == 130
    kept = len(samples())
    out, err = capsys.readouterr()
    assert 0 < kept < 8
    assert f"stopped: {kept} of 8 pieces were finished" in out
    assert err == ""


def test_piece_is_in_a_file_before_the_next_is_written(trained, monkeypatch):
    """Many are written a few at a time, in bounded memory."""
    monkeypatch.setattr(pg, "AT_ONCE", 2)
    sizes = []
    at_begin = []
    real = pg.Writing.__init__

    def begin(writing, model, vocab, opening, B, *style):
        sizes.append(B)
        at_begin.append(len(samples()))
        real(writing, model, vocab, opening, B, *style)

    monkeypatch.setattr(pg.Writing, "__init__", begin)
    assert len(generate("--bars 2 --num-samples 5")) == 5
    assert sizes == [2, 2, 1]
    assert at_begin == [0, 2, 4]


@pytest.fixture
def prompt(trained):
    """Six bars in 3/4 at 93.7, as 'my prompt é.mid' beside a trained model."""
    path = trained / "my prompt é.mid"
    return Score(write_midi(path, scale(5, bars=6), metre=(3, 4), bpm=93.7))


def test_sample_begins_with_the_notes_metre_and_tempo_of_a_prompt_longer_than_the_context(
    prompt, vocab
):
    settings = pg.SampleSettings(prompt="my prompt é.mid", prompt_bars=4)
    assert len(pg.read_prompt(settings, vocab).ids) > 64
    for score in generate(CONTINUE):
        first = [note for note in notes_of(score) if note[0] < 12]
        assert first == [(a, min(b, 12), p) for a, b, p in notes_of(prompt) if a < 12]
        assert len(notes_of(score)) > len(first)
        assert score.time_signatures[0].numerator == 3
        exact = prompt.tempos[0].mspq
        assert score.tempos[0].mspq == exact, "not only as the nearest token says"


def test_continuation_only_leaves_the_prompt_and_its_marker_out(prompt):
    whole, rest = generate(CONTINUE)[0], generate(f"{CONTINUE} --continuation-only")[0]
    moved = [(round(a - 12, 3), round(b - 12, 3), p) for a, b, p in notes_of(whole) if a >= 12]
    assert notes_of(rest) == moved
    texts, _ = texts_of(rest)
    assert "end of prompt" not in dict(texts).values()


def test_each_sample_says_in_itself_what_made_it_and_where_the_prompt_ends(prompt):
    scores = generate(f"{CONTINUE} --seed 7")
    assert {texts_of(score)[1]["piece"] for score in scores} == {1, 2}, "in any order"
    [second] = [score for score in scores if texts_of(score)[1]["piece"] == 2]
    texts, origin = texts_of(second)
    assert [time for time, text in texts if text == "end of prompt"] == [12 * second.tpq]
    expected = {"seed": 7, "step": 30, "piece": 2, "bars": 8, "prompt": "my prompt é.mid"}
    expected["temperature"] = pg.SampleSettings().temperature
    assert expected.items() <= origin.items()


def test_sample_says_its_key_in_three_places_and_its_chords_as_markers(trained, capsys):
    [score] = generate("--bars 8 --num-samples 1 --chords 'F#m C,G'")
    key = re.search(r"sample: 8 bars(?: \(cut\))?, ([^,]+),", capsys.readouterr().out)[1]
    texts, origin = texts_of(score)
    assert origin["key"] == key
    signatures = [(s.time, s.tonality) for s in score.key_signatures]
    assert signatures == [(0, int(key.endswith("minor")))]
    metre = score.time_signatures[0]  # the folder's is 4/4
    bar = 4 * score.tpq * metre.numerator // metre.denominator
    chords = [(tick // bar % 2, symbol) for tick, symbol in texts]
    assert len(chords) > 1
    assert {*chords} <= {(0, "F#m"), (1, "C"), (1, "G")}


def test_bars_of_a_prompt_are_rewritten_and_the_file_says_where(prompt, capsys):
    line = "--prompt 'my prompt é.mid' --rewrite 2-3,5 --num-samples 2"
    scores = generate(line)
    out = capsys.readouterr().out
    assert len(re.findall("^sample: 8 bars, ", out, re.M)) == 2
    old = [note for note in notes_of(prompt) if note[0] // 3 not in (1, 2, 4)]
    for score in scores:
        assert [note for note in notes_of(score) if note[0] // 3 not in (1, 2, 4)] == old
        assert len(notes_of(score)) > len(old)
        assert score.tempos[0].mspq == prompt.tempos[0].mspq
        texts, origin = texts_of(score)
        bar = 3 * score.tpq
        turns = [(tick / bar, text) for tick, text in texts if "prompt" in text]
        ends, goes_on = "end of prompt", "prompt goes on"
        assert turns == [(1, ends), (3, goes_on), (4, ends), (5, goes_on)]
        assert origin["rewrite"] == "2-3,5"
    again = generate(line)
    assert [notes_of(score) for score in again] == [notes_of(score) for score in scores]


def test_stopped_rewriting_keeps_what_is_finished(prompt, monkeypatch, capsys):
    fill_gaps = pg.fill_gaps

    def fill_two(*args):
        fill_two.calls += 1
        ids = fill_gaps(*args)
        if fill_two.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ids

    fill_two.calls = 0
    monkeypatch.setattr(pg, "fill_gaps", fill_two)
    line = "--generate --prompt 'my prompt é.mid' --rewrite 2 --num-samples 5"
    assert pianogpt(line) == 128 + signal.SIGINT
    assert "stopped: 1 of 5 pieces were finished" in capsys.readouterr().out
    assert len(samples()) == 1


def test_styles_are_learned_asked_for_kept_and_joined_by_new_ones(folder, here, capsys):
    for number, path in enumerate(sorted(Path("midi").iterdir())):
        style = Path("midi", ["Bach", "Liszt"][number % 2])
        style.mkdir(exist_ok=True)
        path.rename(style / path.name)
    assert train("--style-from-folder") == 0
    assert re.search(
        r"^styles: Bach \(\d files\), Liszt \(\d files\)$", capsys.readouterr().out, re.M
    )
    weights = load().weights("best")["style.weight"]
    assert not weights[0].any() and weights[1:].any(1).all()
    bach, liszt, guided, none = (
        [notes_of(score) for score in generate(f"--bars 2 --num-samples 2 {style}")]
        for style in ("--style Bach", "--style Liszt", "--style Bach --guidance 3", "")
    )
    assert len({str(pieces) for pieces in (bach, liszt, guided, none)}) == 4
    assert "\nstyles: Bach, Liszt\n" in capsys.readouterr().out
    assert pianogpt("--generate --style Ravel") == 2
    error = "there is no style Ravel in this model: pass one of Bach, Liszt\n"
    assert capsys.readouterr().err.endswith(error)

    assert train("--style-from-folder --steps 33") == 0
    assert load().styles == ["Bach", "Liszt"]
    write_midi(Path("mine/Abel/a.mid"), scale(50))
    assert (
        pianogpt(
            f"--midi-dir mine --init-from {MODEL} --style-from-folder --steps 3 --checkpoint a"
        )
        == 0
    )
    tuned = load("a")
    assert tuned.styles == ["Bach", "Liszt", "Abel"]
    of_styles = tuned.weights("weights")["style.weight"]
    assert torch.equal(of_styles[:3], load().weights("best")["style.weight"])
    assert of_styles[3].any()
    assert pianogpt("--midi-dir midi --checkpoint a --steps 6") == 0
    assert load("a").styles == tuned.styles, "also with music that has none"


def test_style_that_the_music_has_not_is_said_before_training(folder, here, capsys):
    assert train("--generate --style Bach") == 2
    assert "this model knows no styles: train one with --style-from-fold" in capsys.readouterr().err
    assert not MODEL.exists()


def test_known_pieces_are_whole_pieces_of_the_training_music(trained, capsys):
    [[right, left], shown] = scale(0), Path("shown")
    write_midi(shown / "same.mid", [right, left])
    write_midi(shown / "one note.mid", [right[:1]])
    write_midi(shown / "its end.mid", [right[-6:]])
    held_out = {path.name for path in Path("midi").iterdir()} - set(load().pieces)
    assert "piece00.mid" not in held_out
    assert pianogpt(f"--evaluate shown --checkpoint {MODEL}") == 0
    assert "pieces: 3\nknown: 1\n" in capsys.readouterr().out


def test_sizes_may_be_named_again_one_by_one(folder, here):
    assert train("--n-embd 36 --n-head 3 --steps 2") == 0
    assert pianogpt("--midi-dir midi --steps 3 --n-embd 36") == 0


def test_prompt_itself_does_not_count_as_known_nor_do_pieces_that_are_held_out(trained, capsys):
    known = load().pieces
    assert len(known) == 10, "of twelve"
    generate(f"--prompt midi/{min(known)} --bars 11 --num-samples 1")
    line = re.search(r"(\d+) notes, .*longest known run (\d+) notes", capsys.readouterr().out)
    assert 0 < int(line[2]) < int(line[1]) / 2


# ---- Evaluate, export, start from another model


def test_evaluate_prints_the_loss_of_every_token_of_a_folder_by_the_best_weights(
    trained, vocab, capsys
):
    checkpoint = load()
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(("weights/", "average/")):
            checkpoint.tensors[name] = tensor + 1
    pg.save_checkpoint(Path("harmed"), checkpoint)
    pieces = pg.read_folder(Path("midi"), vocab, "")
    tokens = sum(len(piece.ids) - 1 for piece in pieces)  # BOS is given
    notes = sum(Score(path).note_num() for path in Path("midi").iterdir())
    losses = []
    for path in (MODEL, "harmed"):
        capsys.readouterr()
        assert pianogpt(f"--evaluate midi --checkpoint {path}") == 0
        block = dict(re.findall(r"^(\w+): ([\d.]+)$", capsys.readouterr().out, re.M))
        keys = ["pieces", "known", "tokens", "notes", "nats_per_token", "nats_per_note"]
        assert list(block) == keys
        assert list(block.values())[:4] == ["12", "10", str(tokens), str(notes)]
        total = float(block["nats_per_token"]) * tokens
        assert float(block["nats_per_note"]) * notes == pytest.approx(total, rel=1e-4)
        losses.append(block["nats_per_token"])
    assert losses[0] == losses[1]
    assert float(losses[0]) < math.log(len(vocab.words))


def test_process_whose_torchrun_is_gone_does_not_wait_for_long(trained, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(pg, "PROCESSES", 2)
    monkeypatch.setattr(pg, "LONGEST_JOIN", timedelta(seconds=1))
    begin = time.monotonic()
    assert pianogpt("--midi-dir midi --steps 40") == 2
    assert time.monotonic() - begin < 20
    text = "the other processes did not answer within 1 seconds: start torchrun again"
    assert text in capsys.readouterr().err


def test_exported_model_is_small_says_its_source_and_writes_as_before(trained, capsys):
    Path("small.csv").write_text("of somebody else")
    assert pianogpt("--export small --about 'scales, public domain'") == 0
    assert Path("small.csv").read_text() == "of somebody else"
    numbers = sum(weight.numel() for weight in load().weights("best").values())
    assert Path("small").stat().st_size < 2.5 * numbers, "16 bits, and only the best weights"
    assert pianogpt("--export bare --checkpoint small --about ''") == 0
    assert (load("small").about, load("bare").about) == ("scales, public domain", "")
    losses = []
    for path in (MODEL, "small"):
        capsys.readouterr()
        assert pianogpt(f"--evaluate midi --checkpoint {path}") == 0
        losses.append(float(re.search(r"nats_per_note: (\S+)", capsys.readouterr().out)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(generate("--bars 2 --checkpoint small")) == 3
    said = "written by: small, step 30 of 30, trained on midi (scales, public domain)"
    assert said in capsys.readouterr().out
    assert pianogpt("--steps 40 --midi-dir midi --checkpoint small") == 2
    advice = "small was exported: pass --init-from small and another --checkpoint to train it"
    assert advice in capsys.readouterr().err


def test_run_that_starts_from_an_exported_model_knows_what_that_learned_and_can_stop(
    trained, monkeypatch
):
    assert pianogpt("--export small --about 'scales, public domain'") == 0
    (write_folder(Path("mine")) / "piece00.mid").unlink()
    line = "--midi-dir mine --init-from small --eval-every 5 --steps 12 --checkpoint"
    assert pianogpt(f"{line} a") == 0
    checkpoint = load("a")
    first = checkpoint.progress["history"][0]["train_loss"]
    assert first < load().progress["history"][0]["train_loss"] - 1, "it starts from what it knows"
    assert checkpoint.about == "started from small; scales, public domain"
    mine = {path.name for path in Path("mine").iterdir()}
    before = load().pieces
    assert set(before) - mine == {"piece00.mid"}, "it is not among the validation pieces"
    assert set(before) <= set(checkpoint.pieces), "what was learned before stays known"
    assert len(checkpoint.pieces) == len(set(checkpoint.pieces)), "and is counted once"
    train = pg.make_settings({}, checkpoint, training=True).train
    assert (train.lr, train.warmup, train.steps, train.batch_size) == (6e-6, 50, 12, 16)

    with signal_at_ten(monkeypatch, signal.SIGTERM):
        assert pianogpt(f"{line} b") == 128 + signal.SIGTERM
    assert pianogpt(f"{line} b") == 0
    assert_same_run("a", "b")

    assert pianogpt(f"--midi-dir mine --init-from a --steps 1 --checkpoint {MODEL} --fresh") == 0
    assert load().about == "started from a; started from small; scales, public domain"
    assert pianogpt(f"--generate --bars 1 --init-from a --checkpoint {MODEL}") == 0
    assert pianogpt(f"--generate --bars 1 --init-from small --checkpoint {MODEL}") == 2, (
        "not from it"
    )


def test_evaluation_tells_the_model_the_styles_of_the_folders(here, capsys):
    for name, seed in (("high", 0), ("low", 1)):
        for number in range(6):
            write_midi(Path(f"midi/{name}/{number}.mid"), scale(6 * seed + number))
    assert train("--style-from-folder") == 0
    checkpoint = load()
    checkpoint.tensors["best/style.weight"][1:] = torch.randn(2, 32)  # as if it had learned more
    pg.save_checkpoint(MODEL, checkpoint)
    losses = []
    for folder in ("high", "low", "none"):
        Path("new", folder).mkdir(parents=True)
        shutil.copy("midi/high/0.mid", Path("new", folder, "0.mid"))
        capsys.readouterr()
        assert pianogpt("--evaluate new --cache-dir ''") == 0
        losses.append(re.search(r"nats_per_note: (\S+)", capsys.readouterr().out)[1])
        shutil.rmtree("new")
    assert len(set(losses)) == 3


# ---- What README and the files around the script say


def commands_in(text):
    """The flags of each command line of pianogpt.py in a text."""
    found = []
    for line in text.replace("\\\n", " ").replace("`", "\n").splitlines():
        if re.match(r" *(python|uv run|torchrun .*) pianogpt\.py\b", line):
            command = re.split(r" {2,}|#", line.strip())[0]
            found.append(command.split("pianogpt.py", 1)[1])
    return found


def test_every_command_of_readme_and_help_runs_in_their_order_in_one_folder(trained):
    write_folder(Path("my_midis"))
    Path("midi").rename("DIR")
    write_midi(Path("song.mid"), scale(40, bars=12))
    shipped = "samples/piano.safetensors"
    assert pianogpt(f"--export {shipped}") == 0
    MODEL.unlink()
    commands = commands_in((ROOT / "README.md").read_text()) + commands_in(pg.__doc__)
    assert len(commands) >= 10
    for command in commands:
        flags = command.replace("~/Music/midi", "DIR")
        if "--generate" in flags:
            flags += " --num-samples 1"
            if "--rewrite" not in flags:
                flags += " --bars 13" if "--prompt" in flags else " --bars 2"
        trains = "--evaluate" not in flags and "--export" not in flags
        if trains and f"--checkpoint {shipped}" not in flags:
            flags += " ".join(["", *TINY, "--steps 6 --warmup 1"])
        if "--help" not in flags:
            assert pianogpt(flags) == 0, command
        for name in re.findall(r"--(?:checkpoint|export) (\S+)", command):
            assert Path(name).is_file(), command
    assert MODEL.exists()


def test_requirements_are_the_same_in_the_script_and_in_their_file():
    header, _, _ = Path(pg.__file__).read_text().partition('\n"""')
    assert header.startswith("# /// script\n")
    listed = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith(("#", "pytest")):
            listed.append(line)
    assert re.findall(r'^#   "(.+)",$', header, re.M) == listed
    assert len(listed) >= 8
