"""Room 9: the command line, run in-process in a temporary folder."""

import contextlib
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
import subprocess
import sys
import time
from pathlib import Path

import listen
import pytest
import torch
from conftest import TINY, notes_of, pg, run_apart, run_on_two_ranks, scale, start, write_folder, write_midi
from symusic import Score

SHORT = " ".join(["--midi-dir midi", *TINY, "--steps 30 --eval-every 10 --warmup 5 --seed 1"])
CONTINUE = "--prompt 'my prompt é.mid' --prompt-bars 4 --bars 8 --num-samples 2"
multiprocessing.forkserver.ensure_running()  # it imports torch while the first tests run


def pianogpt(line):
    """The exit code of a command line."""
    return pg.main(shlex.split(line))


def train(line=""):
    """The exit code of a short training."""
    return pianogpt(f"{SHORT} {line}")


def generate(line=""):
    """The scores of the files that a --generate with these flags wrote."""
    before = set(Path("samples").glob("*"))
    assert pianogpt(f"--generate --seed 1 {line}") == 0
    return [Score(p) for p in sorted(set(Path("samples").glob("*")) - before)]


def origin(path):
    """What a written piece says of its making, in a text event at time 0 that begins a track."""
    start, data = rb"MTrk.{4}\x00\xff\x01[^P]{1,2}PianoGPT ", path.read_bytes().decode("latin-1")
    text = data[re.search(start.decode("latin-1"), data, re.S).end():].encode("latin-1").decode("utf-8", "replace")
    return json.JSONDecoder().raw_decode(text)[0]


def state(path="pianogpt.pt"):
    """The trainer's state in a checkpoint."""
    return pg.load_checkpoint(Path(path))["trainer"]


def same_run(*paths):
    """Whether two runs ended with the same weights, bit for bit, and the same log but for the seconds."""
    a, b = map(state, paths)
    one, two = (re.sub(r"(?m)^(\w+),[^,]+", r"\1", Path(f"{p}.csv").read_text()) for p in paths)
    return one == two and all(torch.equal(a[which][k], b[which][k]) for which in ("weights", "average", "best") for k in a[which])


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
    shifted = pg.load_checkpoint(root / "pianogpt.pt")
    shifted["vocabulary"] = shifted["vocabulary"][1:] + shifted["vocabulary"][:1]  # as many words, in another order
    pg.save_checkpoint(root / "shifted.pt", shifted)
    return root


@pytest.fixture
def trained(trained_once, here):
    """A current folder with MIDI and a checkpoint trained for 30 steps."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return here


def test_trains_with_a_bar_on_a_terminal_generates_and_its_loss_falls(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert train("--lr 1e-3 --steps 60 --generate --bars 4") == 0
    (out, err), history = capsys.readouterr(), state()["history"]
    bars = re.split("[\r\n]", err)
    assert any(bar.startswith("training: 100%") for bar in bars) and max(map(len, bars)) <= 80
    values = dict(re.findall(r"^(\w+): (.+)$", out, re.M))
    keys = "step seconds train_loss val_loss val_nats_per_note checkpoint"
    assert list(values) == ["music", "split", "model", *keys.split(), "sample"]
    assert values["step"] == "60" and values["checkpoint"] == "pianogpt.pt"
    losses = [row["val_loss"] for row in history]
    assert losses[-1] < losses[0] < 6 and values["val_loss"] == f"{min(losses):.4f}"
    steps = re.findall(r"^step (\d+) of 60: training loss ([\d.]+), validation loss ([\d.]+), \d+ seconds$", out, re.M)
    assert steps == [(str(r["step"]), f"{r['train_loss']:.4f}", f"{r['val_loss']:.4f}") for r in history]
    lines = re.findall(r"^sample: 4 bars, .*?, (\d+) notes, .*, (\S+)$", out, re.M)
    assert lines == [(str(Score(p).note_num()), str(p)) for p in sorted(Path("samples").iterdir())] and len(lines) == 3


def test_run_says_in_five_lines_at_most_what_it_does(folder, here, capsys):
    (folder / "page.mid").write_text("<html>")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    write_midi(folder / "high.mid", [[(i, 1, 60 + i, 80) for i in range(60)]])
    assert train() == 0
    out, err = capsys.readouterr()
    names, lines = zip(*(line.split(": ", 1) for line in out.split("\nstep ")[0].splitlines()))
    assert names == ("skipped", "music", "changed", "split", "model") and err == ""
    assert lines[0].startswith("2 files") and "page.mid (not a MIDI file" in lines[0] and "drums.mid (only drum" in lines[0]
    assert re.fullmatch(r"13 files under midi, [\d.]+ hours, 1,009 notes, [\d,]+ tokens", lines[1])
    assert "notes outside the piano's range dropped: 11" in lines[2]
    assert re.fullmatch(r"13 works \(\d+ train, \d+ validation, 0 test\)", lines[3])
    assert re.match(r"[\d,]+ parameters, b?float\d+ on cpu, peak learning rate 0.0003 at width 1536", lines[4])


def test_one_file_trains_without_validation_and_another_is_skipped_by_a_name_that_prints(here, capsys):
    write_midi(here / "midi" / "a.mid", [[(i, 1, 60 + i % 12, 80) for i in range(64)]])
    Path(os.fsdecode(b"midi/caf\xe9.mid")).write_text("no music")
    Path("midi/x\nval_loss: 0\x1b[2J.mid").write_text("no music")
    assert train() == 0
    out = capsys.readouterr().out
    assert "1 work (1 train, 0 validation, 0 test)" in out and "caf\\udce9.mid (not a MIDI file" in out
    assert "x\\nval_loss: 0\\x1b[2J.mid (not a MIDI file" in out and "\nval_" not in out


def test_compiler_that_fails_is_said_and_the_run_can_go_on_without_it(folder, here, monkeypatch, capsys):
    def fail(*args):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    assert train("--compile --steps 3") == 2
    assert "torch.compile does not work here: leave out --compile" in capsys.readouterr().err
    assert train("--steps 3") == 0 and state()["step"] == 3


def interrupt_at_ten(monkeypatch, line=""):
    """The exit code of a training with a Ctrl-C after step 10."""
    def validate(*args, real=pg.Trainer.validate):
        real(*args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(pg.Trainer, "validate", validate)
        return train(line)


def test_interrupted_run_equals_the_uninterrupted(trained, monkeypatch, capsys):
    assert interrupt_at_ten(monkeypatch, "--checkpoint b.pt") == 130
    assert re.search("stopped at step 10, saved b.pt: the same command continues", capsys.readouterr().out)
    assert pianogpt("--midi-dir midi --checkpoint b.pt --device cpu") == 0, "the checkpoint says all the rest"
    assert "from step 10" in capsys.readouterr().out and same_run("pianogpt.pt", "b.pt")


def test_two_machines_with_the_music_on_one_train_as_one_process_does_and_say_a_mistake_once(trained, monkeypatch):
    alike = "--eval-every 1 --float32"
    assert train(f"{alike} --checkpoint one.pt") == 0
    Path("rank0").mkdir()
    Path("rank1").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("rank0")
        shutil.copytree("../midi", "midi")
        patch.setattr(pg.Trainer, "validate", lambda self, *args, real=pg.Trainer.validate: (
            real(self, *args), self.step == 10 and signal.raise_signal(signal.SIGINT)))
        assert train(f"{alike} --checkpoint two.pt") == 130 and state("two.pt")["step"] == 10
    runs = [start(run_on_two_ranks, trained, name, f"{SHORT} {line}") for name, line in (
        ("train", f"{alike} --checkpoint two.pt"), ("mistake", "--midi-dir nowhere"))]
    for process in runs:
        process.join(120)
    assert runs[0].exitcode == 0, Path("train.err").read_text()[-2000:]
    out, mistake = Path("train").read_text(), Path("mistake.err").read_text()
    assert out.count("music: ") == 1 and "on cpu in 2 processes" in out and "from step 10 on" in out
    assert runs[1].exitcode not in (0, None) and mistake.count("pianogpt: there is no folder nowhere") == 1
    assert "RuntimeError" not in mistake and os.listdir("rank1") == []
    for key in ("train_loss", "val_loss"):
        one, two = ([row[key] for row in state(path)["history"]] for path in ("one.pt", "rank0/two.pt"))
        assert len(one) == 30 and one == pytest.approx(two, abs=1e-3)
    assert pianogpt("--midi-dir midi --checkpoint rank0/two.pt --steps 35") == 0 and state("rank0/two.pt")["step"] == 35


def wait_for(text, out, process):
    """Wait until a process has printed a text, or is over."""
    while process.is_alive() and not (Path(out).exists() and text in Path(out).read_text()):
        time.sleep(0.01)


def test_signal_saves_says_how_to_continue_and_exits_with_128_and_its_number(folder, here):
    started = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        line = f"{SHORT} --steps 2000 --checkpoint {number}.pt"
        started[number] = start(run_apart, here, f"{number}.out", line)
    for number, process in started.items():
        wait_for("\nstep 10 of", f"{number}.out", process)
        os.kill(process.pid, number)
    for number, process in started.items():
        process.join(60)
        assert process.exitcode == 128 + number and "the same command continues" in Path(f"{number}.out").read_text()
        assert 10 <= state(f"{number}.pt")["step"] < 1000
        assert Path(f"{number}.out.err").read_text() == "", "no bar, no traceback, no library's warning"


def test_run_killed_in_any_write_or_moment_loses_no_more_than_that_and_ends_as_the_uninterrupted(trained):
    """Writes are those of checkpoint and log in turn, the cache being warm; a moment is where a text is printed."""
    line = f"{SHORT} --save-every 5 --checkpoint b.pt"
    for number, (write, moment, step) in enumerate((
            (1, "", 0), (2, "", 5), (3, "", 10), (0, "model: ", None), (0, "step 20 ", None))):
        process = start(run_apart, trained, f"{number}.out", line, write)
        if moment:
            wait_for(moment, f"{number}.out", process)
            time.sleep(random.random() * 0.02)
            process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL and (moment or [*trained.glob("b.*.tmp")])
        assert moment or (state("b.pt")["step"] if Path("b.pt").exists() else 0) == step
    assert pianogpt(line) == 0 and same_run("pianogpt.pt", "b.pt") and not [*trained.glob("*.tmp")]


def test_two_runs_on_one_checkpoint_the_second_is_refused(trained, capsys):
    before = Path("pianogpt.pt").read_bytes()
    with pg.lock_checkpoint(Path("pianogpt.pt")):
        assert pianogpt("--midi-dir midi --steps 50") == 2 and len(generate("--bars 2")) == 3
    assert "another run is training pianogpt.pt" in capsys.readouterr().err
    assert Path("pianogpt.pt").read_bytes() == before


def test_full_disk_is_said_and_training_continues_to_the_end(folder, here, monkeypatch, capsys):
    def write(path, data, real=pg.write_atomically, times=itertools.count(1)):
        if path == Path("pianogpt.pt") and next(times) in (1, 2, 5):  # at steps 7, 14 and 30
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(pg, "write_atomically", write)
    assert train("--save-every 7") == 2
    out, err = capsys.readouterr()
    assert out.count("cannot save pianogpt.pt (No space left on device)") == 2
    assert err == "pianogpt: pianogpt.pt cannot be used: No space left on device\n" and state()["step"] == 28


@pytest.mark.parametrize("stream", ["full", "closed"])
def test_output_that_nobody_can_take_does_not_stop_training(stream, folder, here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w") if stream == "full" else None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train("--steps 3 --generate --bars 2") == 0 and state()["step"] == 3 and len([*Path("samples").iterdir()]) == 3


def test_reader_that_stops_early_leaves_no_message_a_trained_model_and_its_pieces(trained):
    command = f"{sys.executable} {pg.__file__} {SHORT} --checkpoint gone.pt --generate --bars 2 2>&1 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr, state("gone.pt")["step"], len([*Path("samples").iterdir()])) == (0, "", 30, 3)
    assert re.fullmatch(r"music: .*\n", done.stdout), "no library's warning comes first"


def test_missing_package_is_one_sentence_that_says_what_to_do():
    code = f"import runpy, sys; sys.modules['miditok'] = None; runpy.run_path({pg.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "miditok" in done.stderr and "pip install -r requirements.txt, with Python 3.10 or newer" in done.stderr


def test_link_to_a_checkpoint_shares_its_lock_and_stays_a_link(trained, capsys):
    Path("link.pt").symlink_to("pianogpt.pt")
    with pg.lock_checkpoint(Path("pianogpt.pt").resolve()):
        assert pianogpt("--midi-dir midi --checkpoint link.pt --steps 35") == 2
    assert "another run is training" in capsys.readouterr().err
    assert pianogpt("--midi-dir midi --checkpoint link.pt --steps 35") == 0
    assert Path("link.pt").is_symlink() and state("pianogpt.pt")["step"] == 35


def test_run_that_fails_is_saved_first(folder, here, monkeypatch):
    def evaluate(*args, real=pg.evaluate, calls=itertools.count(1)):
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(pg, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    assert state()["step"] == 20


def test_loss_that_is_no_number_says_how_to_continue_and_a_smaller_rate_does(folder, here, monkeypatch, capsys):
    def add_gradients(self, *args, real=pg.Trainer.add_gradients):
        return math.nan if self.step == 7 else real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pg.Trainer, "add_gradients", add_gradients)
        assert train() == 2
        assert "the loss became nan after 7 steps: pass a smaller --lr\n" in capsys.readouterr().err
        assert not Path("pianogpt.pt").exists() and train("--save-every 5") == 2
        assert state()["step"] == 5, "what was good is not replaced"
    assert train("--save-every 5 --lr 1e-4") == 0 and state()["step"] == 30
    assert pg.load_checkpoint(Path("pianogpt.pt"))["config"]["train"]["lr"] == 1e-4


def test_few_pieces_without_notes_are_counted_and_none_with_notes_is_an_error(trained, monkeypatch, capsys):
    good, empty = pg.generate, [3, pg.Vocabulary(pg.MusicConfig()).words.index("TimeSig_4/4")]
    monkeypatch.setattr(pg, "generate", lambda *args: [*good(*args), empty])
    assert pianogpt("--generate --bars 1 --num-samples 2 --seed 1") == 0
    out = capsys.readouterr().out
    assert "piece 3 has no notes and is left out" in out and "sample: 1 bar, " in out and len([*Path("samples").iterdir()]) == 2
    monkeypatch.setattr(pg, "generate", lambda *args: [empty] * 2)
    assert pianogpt("--generate") == 2 and "no piece has notes" in capsys.readouterr().err


def test_log_that_cannot_be_written_is_said_and_the_model_saved_and_used(folder, here, capsys):
    Path("pianogpt.pt.csv").mkdir()
    assert train("--generate --bars 2") == 0 and state()["step"] == 30 and len([*Path("samples").iterdir()]) == 3
    assert "cannot save pianogpt.pt.csv (Is a directory)" in capsys.readouterr().out


def test_samples_folder_that_cannot_be_written_is_said_before_training(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode, real=os.access: path != "samples" and real(path, mode))
    assert train("--generate") == 2 and not Path("pianogpt.pt").exists()
    assert "samples cannot be written to: pass another --samples-dir" in capsys.readouterr().err


def test_piece_that_cannot_be_written_is_named_and_leaves_no_file(trained, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert pianogpt("--generate --bars 2") == 2 and not [*Path("samples").iterdir()]
    assert capsys.readouterr().err == "pianogpt: samples/sample-001.mid cannot be used: No space left on device\n"


def test_ctrl_c_outside_of_training_is_no_traceback(trained, monkeypatch, capsys):
    monkeypatch.setattr(pg, "usable_pieces", lambda *args: signal.raise_signal(signal.SIGINT))
    assert pianogpt("--evaluate midi") == 130 and capsys.readouterr().err == "pianogpt: stopped\n"


def test_ctrl_c_while_writing_keeps_the_finished_pieces(trained, monkeypatch, capsys):
    def find_end(*args, real=pg.find_end, calls=itertools.count()):
        end = real(*args)
        if end and next(calls) == 0:
            signal.raise_signal(signal.SIGINT)
        return end

    monkeypatch.setattr(pg, "find_end", find_end)
    assert pianogpt("--generate --bars 12 --num-samples 8 --seed 1") == 130
    kept, (out, err) = len([*Path("samples").iterdir()]), capsys.readouterr()
    assert 0 < kept < 8 and f"stopped: {kept} of 8 pieces were finished" in out and err == ""


@pytest.mark.parametrize("given, trains", [  # without a checkpoint; with one at step 10 of 30; with a finished one
    ({}, [True, True, False]),
    ({"steps": 40}, [True, True, True]),
    ({"steps": 10}, [True, False, False]),
    ({"generate": True}, [True, False, False]),
    ({"generate": True, "steps": 40}, [True, True, True]),
    ({"generate": True, "steps": 20}, [True, True, False]),
    ({"evaluate": "midi"}, [None, False, False]),
    ({"fresh": True}, [True, True, True]),
])
def test_mode_and_steps_decide_whether_to_train(given, trains, here, monkeypatch):
    monkeypatch.setattr(pg, "check_content", lambda content: None)
    run, found = pg.make_options(given, None, False).run, []
    for step in (None, 10, 30):
        if step:
            trainer = {"step": step, "history": [], "weights": {"a": torch.zeros(1)}, "best": {}}
            content = {"about": "", "config": {"train": {"steps": 30}}, "trainer": trainer}
            pg.save_checkpoint(Path("m.pt"), content)
        with contextlib.ExitStack() as stack:
            try:
                checkpoint, training = pg.open_checkpoint(Path("m.pt"), given, run, stack)
                assert (checkpoint is None) == (step is None or run.fresh)
            except pg.UserError as e:
                assert "there is no checkpoint" in str(e)
                training = None
        found.append(training)
    assert found == trains


def test_generating_leaves_an_unfinished_run_as_it_is_unless_steps_are_given(folder, here, monkeypatch, capsys):
    assert interrupt_at_ten(monkeypatch) == 130
    assert len(generate("--bars 2")) == 3 and state()["step"] == 10
    assert "written by: pianogpt.pt, step 10 of 30, trained on midi\n" in capsys.readouterr().out
    assert len(generate("--bars 2 --steps 20 --midi-dir midi")) == 3 and state()["step"] == 20
    assert len(generate("--bars 2 --steps 15 --midi-dir midi")) == 3 and state()["step"] == 20


def test_finished_run_is_left_alone_and_says_how_to_train_further(trained, capsys):
    before = Path("pianogpt.pt").read_bytes()
    assert pianogpt("") == 0
    out = capsys.readouterr().out
    assert "larger --steps" in out and "--fresh" in out and Path("pianogpt.pt").read_bytes() == before


def test_larger_steps_train_a_finished_model_further_and_changed_music_is_said(trained, capsys):
    assert pianogpt("--midi-dir midi --steps 35") == 0 and "are new" not in capsys.readouterr().out
    write_midi(Path("midi/new.mid"), scale(99))
    Path("midi/piece00.mid").unlink()
    assert pianogpt("--midi-dir midi --steps 40") == 0 and state()["step"] == 40
    assert "learned from midi; in midi 1 files are new and 1 gone: training goes on" in capsys.readouterr().out
    history, known = state()["history"], pg.load_checkpoint(Path("pianogpt.pt"))
    assert [(row["step"], "val_loss" in row) for row in history] == [(10, False), (20, False), (30, False), (35, False), (40, True)]
    assert Path("pianogpt.pt.csv").read_text().count("\n") == 6, "the log goes on, but losses on other music do not compare"
    assert known["intervals"].tolist().count(pg.PIECE_END) == len(known["pieces"]) == 10 + 11


def test_music_that_the_model_never_saw_is_never_passed_over_in_silence(trained, monkeypatch, capsys):
    write_midi(Path("my_midis/a.mid"), scale(50))
    write_midi(Path("my_midis/b.mid"), scale(51))
    assert train("--midi-dir my_midis --checkpoint m.pt") == 0 and len(generate("--checkpoint m.pt --bars 2")) == 3
    assert "are new" not in capsys.readouterr().out
    write_midi(Path("my_midis/new.mid"), scale(52))
    assert len(generate("--checkpoint m.pt --bars 2")) == 3
    assert "learned from my_midis; in my_midis 1 files are new and 0 gone: more --steps" in capsys.readouterr().out
    assert pianogpt("--checkpoint m.pt") == 0 and "1 files are new" in capsys.readouterr().out
    assert len(generate("--bars 2")) == 3, "of midi, whatever lies in my_midis"
    before = Path("pianogpt.pt").read_bytes()
    for line, sentence in (("--midi-dir my_midis --generate", "learned from midi; in my_midis 3 files are new and 12 gone"),
                           ("--midi-dir nowhere --generate", "there is no folder nowhere"),
                           ("--midi-dir my_midis", "in my_midis 3 files are new and 12 gone: pass --midi-dir midi"),
                           ("--steps 40", "in my_midis 3 files are new and 12 gone: pass --midi-dir midi")):
        assert pianogpt(line) == 2 and sentence in capsys.readouterr().err
    interrupt_at_ten(monkeypatch, "--checkpoint u.pt")
    assert pianogpt("--checkpoint u.pt") == 2 and "pass --midi-dir midi" in capsys.readouterr().err, "of another folder"
    assert Path("pianogpt.pt").read_bytes() == before and state("u.pt")["step"] == 10
    assert pianogpt("--midi-dir my_midis --steps 40") == 0 and "12 gone: training goes on" in capsys.readouterr().out


def test_fresh_starts_over_and_keeps_the_old_file(trained):
    before = [Path(f"pianogpt.pt{suffix}").read_bytes() for suffix in ("", ".csv")]
    assert train("--fresh --n-embd 16") == 0
    assert [Path(f"pianogpt-old-001.pt{suffix}").read_bytes() for suffix in ("", ".csv")] == before
    assert pg.load_checkpoint(Path("pianogpt.pt"))["config"]["model"]["n_embd"] == 16


def test_evaluate_prints_the_loss_of_every_token_of_a_folder_by_the_best_weights(trained, vocab, capsys):
    content = pg.load_checkpoint(Path("pianogpt.pt"))
    content["trainer"] |= dict.fromkeys(("weights", "average"), {k: v + 1 for k, v in content["trainer"]["weights"].items()})
    pg.save_checkpoint(Path("pianogpt.pt"), content)
    assert pianogpt("--evaluate midi") == 0
    keys, numbers = zip(*re.findall(r"^(\w+): ([\d.]+)$", capsys.readouterr().out, re.M))
    assert keys == ("pieces", "known", "tokens", "notes", "nats_per_token", "nats_per_note")
    tokens = sum(len(piece.ids) + 1 for piece in pg.read_folder(Path("midi"), vocab, ""))
    notes, nats = sum(Score(path).note_num() for path in Path("midi").iterdir()), float(numbers[4])
    expected = [12, 10, tokens, notes, nats, nats * tokens / notes]
    assert [float(n) for n in numbers] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("line, sentence", [
    (f"{SHORT} --fresh --midi-dir nowhere", "there is no folder nowhere: make it"),
    (f"{SHORT} --checkpoint new.pt --midi-dir empty", "no MIDI file under empty"),
    (f"{SHORT} --checkpoint new.pt --midi-dir bad", "none of the 1 MIDI files under bad"),
    (f"{SHORT} --checkpoint new.pt --accumulate 3", "--batch-size must be a multiple of 1 processes x --acc"),
    (f"{SHORT} --checkpoint new.pt --generate --prompt none.mid", "none.mid cannot be continued (not a file): pass another --prompt"),
    (f"{SHORT} --checkpoint bad/page.mid/x.pt", "bad/page.mid cannot be used: File exists"),
    ("--checkpoint bad/page.mid", "bad/page.mid is damaged or not a PianoGPT checkpoint"),
    ("--evaluate midi --checkpoint new.pt", "there is no checkpoint new.pt: name another, or train it first"),
    ("--generate --checkpoint shifted.pt", "vocabulary"),
    ("--n-layers 3", "there is no flag --n-layers: do you mean --n-layer? --help lists"),
    ("--smaples-dir=x", "do you mean --samples-dir?"),
    ("--bars 8", "--bars does nothing without --generate"),
    ("--about mine", "--about does nothing without --export"),
    ("--generate --prompt-bars 8", "--prompt-bars does nothing without --prompt"),
    ("--generate --evaluate midi", "--generate and --evaluate cannot be done at once"),
    ("--export pianogpt.pt", "pianogpt.pt is there already: name another file"),
    ("--export a.pt --evaluate midi", "--evaluate and --export cannot be done at once"),
    ("--steps 99 --midi-dir midi --init-from shifted.pt", "pianogpt.pt did not start from shifted.pt: pass another --checkpoint"),
    ("--midi-dir midi --checkpoint new.pt --cache-dir pianogpt.pt", "cannot be used: Not a directory"),
    (f"{SHORT} --checkpoint new.pt --init-from none.pt", "there is no checkpoint none.pt"),
    (f"{SHORT} --checkpoint new.pt --init-from pianogpt.pt --n-embd 64", "the checkpoint has --n-embd 32: omit it"),
    ("--generate --checkpoint typo.pt", "there is no checkpoint typo.pt: name another, or train it first"),
    (f"{SHORT} --checkpoint new.pt --generate --samples-dir bad/page.mid", "bad/page.mid cannot be used: File exists"),
    (f"{SHORT} --checkpoint new.pt --generate --chords H", 'cannot read "H"'),
    ("--generate --tempo 3.5", "--tempo is 3.5 but must be 0 or from 4 to 1,000"),
    ("--generate --temperature 1e-300", "--temperature is 1e-300 but must be 0 or from 0.01 to 10"),
    ("--generate --lr 1", "the checkpoint has --lr 0.0003: omit it"),
    ("--evaluate midi --batch-size 8", "the checkpoint has --batch-size 4: omit it"),
    (f"{SHORT} --checkpoint new.pt --n-layer 900 --n-embd 20000", "training needs about 113,066 GB"),
    ("--steps many", "--steps"),
    ("--steps -5", "--steps is -5 but must be from 1 to 1,000,000,000"),
    ("--n-embd 100 --n-head 3", "--n-embd must be a multiple of 2 x --n-head"),
    ("--device tpu9", "there is no device tpu9"),
    ("--generate --temperature -1", "--temperature is -1.0 but must be 0 or from 0.01 to 10"),
    ("--weight-decay nan", "--weight-decay is nan"),
    ("--generate --n-embd 64", "the checkpoint has --n-embd 32: omit it"),
    ("--grid 4", "the checkpoint has --grid 24: omit it"),
    ("--midi-dir midi --steps 99 --batch-size 9", "the checkpoint has --batch-size 4: omit it"),
    ("--generate --prompt bad/page.mid", "bad/page.mid cannot be continued (not a MIDI file"),
    ("--generate --prompt midi/piece00.mid --prompt-bars 99", "midi/piece00.mid is only 8 bars"),
    ("--generate --prompt midi/piece00.mid --bars 5", "the prompt alone is 8 bars"),
    ("--generate --chords 'C Hm'", 'cannot read "Hm" in "Hm": write C, Am,'),
    ("--generate --bars 2 --samples-dir bad/page.mid", "bad/page.mid cannot be used: File exists"),
])
def test_mistake_is_one_sentence_and_exit_code_2_and_changes_nothing(line, sentence, mistaken, here, capsys):
    shutil.copytree(mistaken, here, dirs_exist_ok=True)
    before = Path("pianogpt.pt").read_bytes()
    assert pianogpt(line) == 2
    out, err = capsys.readouterr()
    assert err.startswith("pianogpt: ") and sentence in err and err.count("\n") == 1 and "step " not in out
    assert Path("pianogpt.pt").read_bytes() == before and not Path("samples").exists()
    assert not list(here.glob("new.pt*")), "not even a lock"


def test_every_command_of_readme_and_help_runs_in_their_order_in_one_folder(here, monkeypatch, capsys):
    write_folder(here / "my_midis")
    write_folder(here / "X")
    write_midi(here / "X.mid", scale(40))
    assert pianogpt(" ".join([*TINY, "--steps 1 --checkpoint a.pt"])) == pianogpt("--checkpoint a.pt --export samples/piano.pt") == 0
    Path("a.pt").unlink()
    blocks = re.findall(r"```\n(.*?)```", Path(pg.__file__).with_name("README.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()] + pg.__doc__.splitlines()
    commands = [re.split(r" {2,}|#", line.strip())[0] for line in lines if re.match(r" *(python|torchrun .*) pianogpt.py", line)]
    assert len(commands) == 17
    for command in commands:
        flags = re.sub(r"~/Music/midi|\bDIR\b", "X", command.split("pianogpt.py")[1]).replace("song.mid", "X.mid")
        tiny = " --bars 12 --num-samples 1 " * ("--generate" in flags)
        tiny += " ".join([*TINY, " --steps 3 --warmup 1"]) * ("--checkpoint samples/piano.pt" not in flags)
        assert pianogpt(f"{flags} {tiny}") == 0, command
    assert {path.name for path in here.glob("*.pt")} == {f"{name}.pt" for name in ("pianogpt", "mine", "small", "new", "large", "two", "many")}


def test_music_is_looked_for_beside_the_script_where_the_current_folder_has_none(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(pg, "__file__", str(write_folder(here / "clone" / "my_midis").with_name("pianogpt.py")))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert pianogpt(" ".join([*TINY, "--steps 2"])) == 0
    assert f"music: 12 files under {here}/clone/my_midis" in capsys.readouterr().out
    write_folder(Path("my_midis")).joinpath("piece00.mid").unlink()
    assert pianogpt(" ".join([*TINY, "--steps 2 --fresh"])) == 0
    assert "music: 11 files under my_midis" in capsys.readouterr().out, "the current folder's own comes first"
    assert pianogpt(" ".join([*TINY, "--steps 2 --checkpoint b.pt --midi-dir ../clone/my_midis"])) == 0
    assert "music: 12 files under ../clone/my_midis" in capsys.readouterr().out


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        pianogpt("--help")
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 110 and "python pianogpt.py --generate" in out
    text = " ".join(out.split())
    for f in (f for group in vars(pg.Options()).values() for f in pg.fields(group)):
        default = "" if f.default == "" or isinstance(f.default, bool) else f" (default: {f.default})"
        assert f"{pg.flag(f.name)} " in text and f"{f.metadata['text']}{default}" in text


def test_checkpoint_alone_is_enough_to_generate_and_to_name_the_longest_known_runs(trained, monkeypatch, capsys):
    (trained / "another machine").mkdir()
    monkeypatch.chdir("another machine")
    shutil.copy("../pianogpt.pt", "x.pt")
    assert len(generate("--checkpoint x.pt --bars 6")) == 3
    lines = re.findall(
        r"^sample: 6 bars, [A-G][b#]? m[aj|in]+or, (\d+) notes, [\d.]+ seconds, "
        r"longest known run (\d+) notes \(piece\d\d\.mid\), samples/sample-00\d\.mid$", capsys.readouterr().out, re.M)
    assert len(lines) == 3 and all(0 < int(run) <= int(notes) for notes, run in lines)


def test_same_seed_and_checkpoint_write_the_same_bytes_into_new_files_and_no_seed_writes_others(trained, capsys):
    lines = "--samples-dir a --seed 0", "--samples-dir a --seed 0", "--samples-dir b --seed 0", "--samples-dir c", "--samples-dir d"
    for line in lines:
        assert pianogpt(f"--generate --bars 3 --num-samples 2 {line}") == 0
    a, b, c, d = ([p.read_bytes() for p in sorted(Path(name).iterdir())] for name in "abcd")
    assert a == b * 2 and b[0] != b[1] and len({b[0], c[0], d[0]}) == 3
    seeds = re.findall(r"^seed: (\d+)", capsys.readouterr().out, re.M)
    assert seeds == [str(origin(Path(name, "sample-001.mid"))["seed"]) for name in "cd"]
    assert pianogpt(f"--generate --bars 3 --num-samples 2 --samples-dir e --seed {seeds[1]}") == 0
    assert [p.read_bytes() for p in sorted(Path("e").iterdir())] == d


def test_length_and_tempo_are_the_ones_that_are_asked_for(trained, capsys):
    assert len(generate("--bars 7 --num-samples 4")) == 4
    assert re.findall(r"sample: (\d+) bars", capsys.readouterr().out) == ["7"] * 4
    slow, fast = (generate(f"--bars 6 --num-samples 1 --tempo {tempo}")[0] for tempo in (60, 120))
    assert [round(t.qpm) for t in [*slow.tempos, *fast.tempos]] == [60, 120] and notes_of(slow) == notes_of(fast)
    assert slow.to("second").end() == pytest.approx(2 * fast.to("second").end(), rel=1e-3)


def test_prompt_itself_does_not_count_as_known_nor_do_pieces_that_are_held_out(trained, capsys):
    known = pg.load_checkpoint(Path("pianogpt.pt"))["pieces"]
    assert len(known) == 10, "of twelve"
    generate(f"--prompt midi/{min(known)} --bars 11 --num-samples 1")
    line = re.search(r"(\d+) notes, .*longest known run (\d+) notes", capsys.readouterr().out)
    assert 0 < int(line[2]) < int(line[1]) / 2


@pytest.fixture
def prompt(trained):
    """Six bars in 3/4 at 93.7, as 'my prompt é.mid' beside a trained model."""
    return Score(write_midi(trained / "my prompt é.mid", scale(5, bars=6), metre=(3, 4), bpm=93.7))


def test_sample_begins_with_the_notes_metre_and_tempo_of_a_prompt_longer_than_the_context(prompt, vocab):
    assert len(pg.read_prompt(pg.SampleConfig(prompt="my prompt é.mid", prompt_bars=4), vocab)) > 64
    for score in generate(CONTINUE):
        first = [n for n in notes_of(score) if n[0] < 12]
        assert first == [(a, min(b, 12), p) for a, b, p in notes_of(prompt) if a < 12]
        assert len(notes_of(score)) > len(first)
        assert score.time_signatures[0].numerator == 3
        assert score.tempos[0].mspq == prompt.tempos[0].mspq, "exactly, not only as the nearest token says"


def test_each_sample_says_in_itself_what_made_it_and_where_the_prompt_ends(prompt):
    second = generate(f"{CONTINUE} --seed 7")[1]
    made, ends = origin(Path("samples/sample-002.mid")), [m.time for m in second.markers if m.text == "end of prompt"]
    assert ends == [12 * second.tpq] and (made["seed"], made["step"], made["piece"], made["bars"]) == (7, 30, 2, 8)
    assert made["prompt"] == "my prompt é.mid" and made["temperature"] == pg.SampleConfig().temperature


def test_sample_says_its_key_in_its_line_and_as_a_key_signature_and_its_chords_as_text(trained, capsys):
    score = generate("--bars 24 --num-samples 1 --chords 'F#m C,G'")[0]
    key = re.search("sample: 24 bars, ([^,]+),", capsys.readouterr().out)[1]
    assert origin(Path("samples/sample-001.mid"))["key"] == key
    assert [(s.time, s.tonality) for s in score.key_signatures] == [(0, int(key.endswith("minor")))]
    texts, _ = listen.read_texts(Path("samples/sample-001.mid").read_bytes())
    metre = score.time_signatures[0]  # the folder's is 4/4
    bars = [(tick // (4 * score.tpq * metre.numerator // metre.denominator) % 2, symbol) for tick, symbol in texts]
    assert len(bars) > 1 and {*bars} <= {(0, "F#m"), (1, "C"), (1, "G")}


def test_model_is_handed_on_writes_the_same_music_and_starts_another_run(trained, capsys):
    assert pianogpt("--export small.pt --about 'scales, public domain'") == 0
    assert Path("small.pt").stat().st_size < Path("pianogpt.pt").stat().st_size / 4
    assert [pianogpt(f"--evaluate midi --checkpoint {name}.pt") for name in ("pianogpt", "small")] == [0, 0]
    whole, small = (float(x) for x in re.findall(r"nats_per_note: ([\d.]+)", capsys.readouterr().out))
    assert whole == pytest.approx(small, rel=1e-3) and len(generate("--bars 2 --checkpoint small.pt")) == 3
    assert "step 30 of 30, trained on midi (scales, public domain)" in capsys.readouterr().out
    assert pianogpt("--steps 40 --midi-dir midi --checkpoint small.pt") == 2
    assert "small.pt was exported: pass --init-from small.pt" in capsys.readouterr().err
    write_folder(Path("mine")).joinpath("piece00.mid").unlink()
    lines = [f"--midi-dir mine --init-from small.pt --checkpoint {name}.pt --eval-every 5" for name in "ab"]
    assert pianogpt(f"{lines[0]} --steps 20") == 0
    first = state("a.pt")["history"][0]
    assert first["train_loss"] < state()["history"][0]["train_loss"] - 1, "it starts from what was learned"
    assert pianogpt(f"{lines[1]} --steps 20 --save-every 5") == 0 and same_run("a.pt", "b.pt")
    content = pg.load_checkpoint(Path("a.pt"))
    assert content["about"] == "started from small.pt; scales, public domain"
    assert len(content["pieces"]) > 11, "what was learned before stays known"
    config = pg.make_options({}, content, training=True).train
    assert (config.lr, config.warmup, config.steps, config.batch_size) == (3.3e-5, 50, 20, 8)


def test_continuation_only_leaves_the_prompt_and_its_marker_out(prompt):
    whole, rest = generate(CONTINUE)[0], generate(f"{CONTINUE} --continuation-only")[0]
    assert notes_of(rest) == [(round(a - 12, 3), round(b - 12, 3), p) for a, b, p in notes_of(whole) if a >= 12]
    assert not rest.markers
