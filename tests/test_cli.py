"""Room 8: the command line, run in-process in a temporary folder."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, pg, scale, write_folder, write_midi
from symusic import Score

SHORT = ["--midi-dir", "midi", *TINY, "--steps", "30", "--eval-every", "10", "--warmup", "5", "--seed", "1"]
SCRIPT = str(Path(pg.__file__))


def block(text):
    """The key: value lines of an output."""
    return dict(re.findall(r"^(\w+): (.+)$", text, re.M))


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with MIDI and a checkpoint trained for 30 steps, to be copied."""
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "midi")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert pg.main(SHORT) == 0
    return root


@pytest.fixture
def trained(trained_once, here):
    """A current folder with MIDI and a checkpoint trained for 30 steps."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return here


def test_trains_generates_and_its_loss_falls(folder, here, capsys):
    assert pg.main([*SHORT, "--lr", "1e-3", "--steps", "60", "--generate", "--bars", "4"]) == 0
    out = capsys.readouterr().out
    keys = [
        "steps",
        "tokens",
        "seconds",
        "tokens_per_second",
        "train_loss",
        "val_loss",
        "val_nats_per_note",
        "parameters",
        "checkpoint",
    ]
    values = block(out)
    assert [k for k in values if k in keys] == keys
    assert values["steps"] == "60" and values["tokens"] == str(60 * 4 * 64)
    history = pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]["history"]
    assert history[-1]["val_loss"] < history[0]["val_loss"] < 6
    assert float(values["val_loss"]) == pytest.approx(min(r["val_loss"] for r in history), abs=1e-4)
    samples = sorted(Path("samples").glob("*.mid"))
    assert len(samples) == 3 and all(Score(p).note_num() for p in samples)
    lines = re.findall(r"^sample: (\d+) bars, (\d+) notes, ([\d.]+) seconds, .*, (\S+)$", out, re.M)
    assert [line[3] for line in lines] == [str(p) for p in samples]
    assert [int(line[1]) for line in lines] == [Score(p).note_num() for p in samples]


def test_interrupted_training_goes_on_and_equals_the_uninterrupted(trained, capsys, monkeypatch):
    whole = pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]

    class StopAtTen(pg.StopSignal):
        def __call__(self):
            self.count = getattr(self, "count", 0) + 1
            self.number = 2 if self.count > 10 else 0
            return self.number != 0

    with monkeypatch.context() as patch:
        patch.setattr(pg, "StopSignal", StopAtTen)
        assert pg.main([*SHORT, "--checkpoint", "b.pt"]) == 130
    assert "stopped at step 10 of 30" in capsys.readouterr().out
    assert pg.main(["--checkpoint", "b.pt", "--device", "cpu"]) == 0, (
        "what the command line does not say, the checkpoint says"
    )
    assert "going on from step 10\n" in capsys.readouterr().out
    again = pg.load_checkpoint(Path("b.pt"))["trainer"]
    assert all(torch.equal(again["weights"][k], v) for k, v in whole["weights"].items())


def start(*argv):
    """A training process of its own."""
    command = [sys.executable, "-u", SCRIPT, *SHORT, "--compile", "off", *argv]
    return subprocess.Popen(command, stdout=open("out", "w"), stderr=open("err", "w"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_says_how_to_go_on_and_exits_with_128_and_its_number(number, folder, here):
    process = start("--steps", "100000")
    while "time:" not in Path("out").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert "the same command goes on from there" in Path("out").read_text()
    assert pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]["step"] > 0


def same_weights(a, b):
    """Whether two checkpoints hold the same last and best weights bit for bit."""
    a, b = (pg.load_checkpoint(Path(p))["trainer"] for p in (a, b))
    return all(torch.equal(a[which][k], b[which][k]) for which in ("weights", "best") for k in a[which])


def test_run_killed_at_any_moment_ends_with_the_weights_of_the_uninterrupted(folder, here):
    argv = ["--steps", "120", "--save-every", "3", "--dropout", "0.1", "--compile", "off"]
    assert pg.main([*SHORT, *argv, "--checkpoint", "whole.pt"]) == 0
    rng, kills = random.Random(0), 0
    while True:
        process = start(*argv)
        while process.poll() is None and "time:" not in Path("out").read_text():
            time.sleep(0.01)
        if kills < 3 and process.poll() is None:
            time.sleep(rng.random() * 0.3)
            process.kill()
            kills += 1
        if process.wait(60) == 0:
            break
    assert kills == 3 and same_weights("whole.pt", "pianogpt.pt")
    columns = [[line.split(",")[0] for line in Path(n).read_text().splitlines()] for n in ("whole.csv", "pianogpt.csv")]
    assert columns[0] == columns[1] == ["step", *(str(n) for n in range(10, 121, 10))]


@pytest.mark.parametrize("write, step", [(1, None), (3, 5), (4, 10)])
def test_run_killed_while_it_writes_loses_nothing(write, step, folder, here):
    """With a warm cache the writes are those of checkpoint and log in turn."""
    assert pg.main([*SHORT, "--save-every", "5", "--checkpoint", "whole.pt"]) == 0
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import pianogpt as pg; writes = []\n"
        "def die(handle): writes.append(1); len(writes) == int(sys.argv[2]) and os.kill(os.getpid(), 9)\n"
        "os.fsync = die; pg.main(sys.argv[3:])"
    )
    argv = [str(Path(SCRIPT).parent), str(write), *SHORT, "--save-every", "5"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True)
    assert done.returncode == -9 and list(here.glob("pianogpt*.tmp"))
    assert (
        not step
        and not Path("pianogpt.pt").exists()
        or pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]["step"] == step
    )
    assert pg.main([*SHORT, "--save-every", "5"]) == 0
    assert same_weights("whole.pt", "pianogpt.pt") and not list(here.glob("*.tmp"))


def test_two_runs_on_one_checkpoint_the_second_is_refused(trained, capsys):
    before = Path("pianogpt.pt").read_bytes()
    with pg.lock_checkpoint(Path("pianogpt.pt")):
        assert pg.main(["--steps", "50"]) == 2
    assert "another run is training pianogpt.pt" in capsys.readouterr().err
    assert Path("pianogpt.pt").read_bytes() == before


def full_disk(monkeypatch, failing):
    """Make every write_atomically to a path for which failing(path) is true fail as on a full disk."""

    def write(path, data):
        if failing(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    real = pg.write_atomically
    monkeypatch.setattr(pg, "write_atomically", write)


def test_full_disk_is_said_and_training_goes_on(folder, here, monkeypatch, capsys):
    times = []
    full_disk(monkeypatch, lambda path: path.suffix == ".pt" and (times.append(1) or len(times) <= 2))
    assert pg.main([*SHORT, "--save-every", "5"]) == 0
    assert capsys.readouterr().out.count("cannot save pianogpt.pt (No space left on device)") == 2
    assert pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]["step"] == 30


def test_model_that_cannot_be_saved_at_the_end_is_saved_elsewhere(trained, monkeypatch, capsys):
    before = Path("pianogpt.pt").read_bytes()
    full_disk(monkeypatch, lambda path: path == Path("pianogpt.pt"))
    assert pg.main(["--steps", "40"]) == 2
    elsewhere = re.search(r"the model is in (.+?): move it", capsys.readouterr().err)[1]
    assert pg.load_checkpoint(Path(elsewhere))["trainer"]["step"] == 40 and Path("pianogpt.pt").read_bytes() == before
    shutil.rmtree(Path(elsewhere).parent)


def test_folder_that_cannot_be_written_is_said_before_training(folder, here, monkeypatch, capsys):
    Path("file").touch()
    assert pg.main([*SHORT, "--checkpoint", "file/x.pt"]) == 2
    assert "pass a --checkpoint in a folder of yours" in capsys.readouterr().err


def test_changed_music_is_said_and_training_goes_on(trained, capsys):
    assert pg.main(["--steps", "35"]) == 0
    assert "has changed" not in capsys.readouterr().out
    write_midi(Path("midi/new.mid"), scale(99))
    assert pg.main(["--steps", "40"]) == 0
    assert "the training music under midi has changed" in capsys.readouterr().out


def torchrun(processes, *argv):
    """Train with several processes on the CPU; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", SCRIPT]
    done = subprocess.run([*command, *SHORT, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_train_as_one_and_their_run_resumes_with_one(folder, here, capsys):
    argv = ["--eval-every", "1", "--precision", "float32"]
    assert pg.main([*SHORT, *argv, "--checkpoint", "one.pt"]) == 0
    out = torchrun(2, *argv, "--checkpoint", "two.pt")
    assert out.count("music: ") == 1 and "on cpu and 1 more" in out
    one, two = (pg.load_checkpoint(Path(n))["trainer"] for n in ("one.pt", "two.pt"))
    assert len(one["history"]) == len(two["history"]) == 30
    for a, b in zip(one["history"], two["history"]):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-3 and abs(a["val_loss"] - b["val_loss"]) < 1e-3
    assert pg.main(["--checkpoint", "two.pt", "--steps", "35"]) == 0
    assert pg.load_checkpoint(Path("two.pt"))["trainer"]["step"] == 35


def test_finished_run_is_left_alone_and_says_how_to_train_further(trained, capsys):
    before = Path("pianogpt.pt").read_bytes()
    assert pg.main([]) == 0
    out = capsys.readouterr().out
    assert "--steps" in out and "--fresh" in out and Path("pianogpt.pt").read_bytes() == before


def test_larger_steps_train_a_finished_model_further(trained):
    assert pg.main(["--steps", "40", "--device", "cpu"]) == 0
    assert pg.load_checkpoint(Path("pianogpt.pt"))["trainer"]["step"] == 40


def test_fresh_starts_over_and_keeps_the_old_file(trained, capsys):
    before = Path("pianogpt.pt").read_bytes()
    assert pg.main([*SHORT, "--fresh", "--n-embd", "16"]) == 0
    assert Path("pianogpt-old-001.pt").read_bytes() == before
    assert pg.load_checkpoint(Path("pianogpt.pt"))["config"]["model"]["n_embd"] == 16


def test_fresh_run_that_cannot_start_leaves_the_old_file_in_place(trained):
    assert pg.main([*SHORT, "--fresh", "--midi-dir", "nowhere"]) == 2
    assert Path("pianogpt.pt").exists() and not Path("pianogpt-old-001.pt").exists()


def test_checkpoint_alone_is_enough_to_generate(trained, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("another machine")
    (elsewhere / "x.pt").write_bytes(Path("pianogpt.pt").read_bytes())
    monkeypatch.chdir(elsewhere)
    assert pg.main(["--generate", "--checkpoint", "x.pt", "--num-samples", "2", "--bars", "2", "--seed", "9"]) == 0
    assert len(list(Path("samples").iterdir())) == 2


def test_same_seed_and_checkpoint_write_the_same_bytes_into_new_files(trained):
    for name in ("a", "a", "b"):
        assert pg.main(["--generate", "--samples-dir", name, "--bars", "3", "--num-samples", "2"]) == 0
    files = [sorted(Path(n).iterdir()) for n in ("a", "b")]
    assert len(files[0]) == 4
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]] * 2
    assert pg.main(["--generate", "--samples-dir", "c", "--bars", "3", "--num-samples", "2", "--seed", "8"]) == 0
    assert sorted(Path("c").iterdir())[0].read_bytes() != files[1][0].read_bytes()


def test_evaluate_prints_the_loss_of_every_token_of_a_folder(trained, capsys):
    assert pg.main(["--evaluate", "midi", "--device", "cpu"]) == 0
    values = block(capsys.readouterr().out)
    assert list(values)[-6:] == ["pieces", "tokens", "notes", "nats_per_token", "nats_per_note", "perplexity"]
    pieces = pg.read_folder(Path("midi"), pg.MusicConfig(), "")[0]
    assert int(values["tokens"]) == sum(len(p.encoded.ids) + 1 for p in pieces)
    assert int(values["notes"]) == sum(Score(p).note_num() for p in Path("midi").iterdir())
    per_token, per_note = float(values["nats_per_token"]), float(values["nats_per_note"])
    assert per_note == pytest.approx(per_token * int(values["tokens"]) / int(values["notes"]), rel=1e-3)
    assert float(values["perplexity"]) == pytest.approx(2.718281828**per_token, rel=1e-3)


MISTAKES = {
    "no folder": (["--midi-dir", "nowhere"], "there is no folder nowhere"),
    "no MIDI": (["--midi-dir", "empty"], "no .mid or .midi file under empty"),
    "only bad MIDI": (["--midi-dir", "bad"], "none of the 1 MIDI files under bad"),
    "unknown flag": (["--n-layers", "3"], "--n-layers"),
    "no number": (["--steps", "many"], "--steps"),
    "shape": (["--n-embd", "100", "--n-head", "3"], "--n-embd 100 must be an even multiple of --n-head 3"),
    "device": (["--device", "tpu9"], "there is no device tpu9"),
    "negative": (["--steps", "-5"], "--steps is -5 but must be at least 1"),
    "no temperature": (["--temperature", "-1"], "--temperature is -1.0 but must be from 0 to 10"),
    "not a number": (["--lr", "nan"], "--lr is nan"),
    "not a checkpoint": (["--checkpoint", "bad/page.mid"], "bad/page.mid is damaged or no PianoGPT checkpoint"),
    "nothing to evaluate": (["--evaluate", "midi", "--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
    "other sizes": (["--n-embd", "64"], "--n-embd is 64, but the checkpoint was made with 32"),
    "other sizes to generate": (["--generate", "--n-layer", "5"], "--n-layer is 5, but the checkpoint was made with 2"),
    "other tokens": (["--grid", "4"], "--grid is 4, but the checkpoint was made with 8"),
    "shares": (["--accumulate", "3"], "--batch-size 4 must be a multiple of 1 processes x --accumulate 3"),
    "other training": (["--steps", "99", "--batch-size", "9"], "--batch-size is 9, but the checkpoint was made with 4"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_sentence_and_exit_code_2(name, trained, capsys):
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/page.mid").write_text("<html>")
    before = Path("pianogpt.pt").read_bytes()
    argv, sentence = MISTAKES[name]
    argv = [*argv, *SHORT] if name == "shares" else argv
    checkpoint = [] if name.startswith("other") or "--checkpoint" in argv else ["--checkpoint", "new.pt"]
    assert pg.main([*argv, *checkpoint]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pianogpt: ") and sentence in error
    assert Path("pianogpt.pt").read_bytes() == before and not Path("new.pt").exists()


def test_checkpoint_of_another_vocabulary_is_refused(trained, capsys):
    content = pg.load_checkpoint(Path("pianogpt.pt"))
    content["vocabulary"] = content["vocabulary"][1:] + content["vocabulary"][:1]  # as many, in another order
    pg.save_checkpoint(Path("shifted.pt"), content)
    assert pg.main(["--generate", "--checkpoint", "shifted.pt"]) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_one_file_trains_without_validation_and_says_so(here, capsys):
    write_midi(here / "midi" / "a.mid", [[(i, 1, 60 + i % 12, 80) for i in range(64)]])
    assert pg.main(SHORT) == 0
    assert "no piece is held out" in capsys.readouterr().out


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        pg.main(["--help"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 100 and "examples:" in out, "two screens of fifty lines"
    text = " ".join(out.split())
    for group in pg.fields(pg.Config):
        for f in pg.fields(group.default_factory):
            assert "--" + f.name.replace("_", "-") in text
            assert isinstance(f.default, bool) or f"(default: {f.default if f.default != '' else 'none'})" in text


def test_unprintable_names_are_skipped_by_a_name_that_prints(here, capsys):
    Path("midi").mkdir()
    with open(os.fsencode("midi/") + b"caf\xe9.mid", "wb") as file:
        file.write(b"no music")
    assert pg.main(SHORT) == 2
    assert "caf" in capsys.readouterr().out


@pytest.fixture
def prompt(trained):
    """A prompt of eight bars in 3/4 at 90, besides a trained model."""
    return str(write_midi(trained / "my prompt é.mid", scale(5, bars=6), metre=(3, 4), bpm=90))


def generate(*argv):
    """The scores of the files that a --generate with these flags wrote."""
    before = set(Path("samples").glob("*"))
    assert pg.main(["--generate", *argv]) == 0
    return [Score(p) for p in sorted(set(Path("samples").glob("*")) - before)]


def notes_of(score):
    """(start, end, pitch) in quarters."""
    return sorted(
        (round(n.time / score.tpq, 3), round((n.time + n.duration) / score.tpq, 3), n.pitch)
        for t in score.tracks
        for n in t.notes
    )


def test_sample_begins_with_the_prompts_notes_metre_and_tempo(prompt):
    source = Score(prompt)
    for score in generate("--prompt", prompt, "--prompt-bars", "4", "--bars", "8"):
        start = [n for n in notes_of(score) if n[0] < 12]
        assert start == [(a, min(b, 12), p) for a, b, p in notes_of(source) if a < 12]
        assert len(notes_of(score)) > len(start)
        assert (score.time_signatures[0].numerator, round(score.tempos[0].qpm)) == (3, 90)


def test_continuation_only_leaves_the_prompt_out(prompt):
    flags = ["--prompt", prompt, "--prompt-bars", "4", "--bars", "8", "--num-samples", "1"]
    whole, rest = generate(*flags)[0], generate(*flags, "--continuation-only")[0]
    assert notes_of(rest) == [(round(a - 12, 3), round(b - 12, 3), p) for a, b, p in notes_of(whole) if a >= 12]


def test_missing_prompt_is_said_before_the_training(folder, here, capsys):
    assert pg.main([*SHORT, "--generate", "--prompt", "none.mid"]) == 2
    assert "there is no MIDI file none.mid" in capsys.readouterr().err and not Path("pianogpt.pt").exists()


def test_prompt_longer_than_the_context_is_written_whole(prompt):
    long = str(write_midi(Path("long.mid"), scale(5, bars=40)))
    notes = notes_of(generate("--prompt", long, "--bars", "44", "--num-samples", "1")[0])
    assert [n for n in notes if n[0] < 160] == notes_of(Score(long))


def test_bars_are_the_length_of_the_whole_piece(trained, capsys):
    assert len(generate("--bars", "7", "--num-samples", "4")) == 4
    assert re.findall(r"sample: (\d+) bars", capsys.readouterr().out) == ["7"] * 4


def test_seconds_are_reached_and_ended_at_a_bar_line(trained):
    for score in generate("--seconds", "20", "--num-samples", "4"):
        assert 14 < score.to("second").end() < 30


def test_tempo_is_the_one_that_is_written(trained):
    flags = ["--bars", "6", "--num-samples", "1"]
    slow, fast = generate(*flags, "--tempo", "60")[0], generate(*flags, "--tempo", "120")[0]
    assert [t.qpm for t in slow.tempos] == [60] and [round(t.qpm) for t in fast.tempos] == [120]
    assert slow.to("second").end() == pytest.approx(2 * fast.to("second").end(), rel=1e-3)
    assert notes_of(slow) == notes_of(fast)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--prompt", "none.mid"], "there is no MIDI file none.mid"),
        (["--prompt", "midi/piece00.mid", "--prompt-bars", "99"], "midi/piece00.mid is only 8 bars"),
        (["--prompt", "midi/piece00.mid", "--bars", "5"], "the prompt alone is 8 bars"),
        (["--bars", "5", "--seconds", "5"], "--bars and --seconds say the same thing twice"),
        (["--prompt-bars", "5", "--prompt-seconds", "5"], "--prompt-bars and --prompt-seconds say the same"),
    ],
)
def test_prompt_mistake_is_one_sentence_and_exit_code_2(argv, sentence, trained, capsys):
    assert pg.main(["--generate", *argv]) == 2
    assert sentence in capsys.readouterr().err and not Path("samples").exists()


def test_every_filter_changes_what_is_drawn(trained):
    def drawn(*argv):
        return notes_of(generate("--bars", "6", "--num-samples", "1", "--min-p", "0", *argv)[0])

    plain = drawn()
    for flags in (["--temperature", "0.5"], ["--top-k", "3"], ["--top-p", "0.5"], ["--min-p", "0.5"], ["--seed", "4"]):
        assert drawn(*flags) != plain, flags


def test_each_sample_is_described_and_its_longest_known_run_named(trained, capsys):
    generate("--bars", "6")
    lines = re.findall(
        r"sample: 6 bars, (\d+) notes, [\d.]+ seconds, [\d.]+ notes/s, pitches (\d+)-(\d+), \d+% silence, "
        r"longest known run (\d+) notes \((piece\d\d\.mid)\), samples/sample-00\d\.mid",
        capsys.readouterr().out,
    )
    assert len(lines) == 3 and all(0 < int(run) <= int(notes) for notes, _, _, run, _ in lines)


def test_prompt_itself_does_not_count_as_known(trained, tokenizer, capsys):
    config = pg.make_config({}, pg.load_checkpoint(Path("pianogpt.pt")), False)
    train = next(p.path for p in pg.known_music(config, pg.pitch_range(tokenizer)) if p.split == "train")
    generate("--prompt", f"midi/{train}", "--bars", "9", "--num-samples", "1")
    line = re.search(r"(\d+) notes, .*longest known run (\d+) notes", capsys.readouterr().out)
    assert int(line[2]) < int(line[1]) / 2


def test_report_shows_samples_beside_training_and_validation_music(trained, capsys):
    generate("--bars", "6", "--report")
    table = capsys.readouterr().out.split("mean of")[1].splitlines()
    assert table[0].split()[0] == "3" and "train" in table[0] and "validation" in table[0]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert {
        "notes_per_second",
        "polyphony",
        "pitch_class_entropy_bits",
        "repeated_bars_percent",
        "known_run_notes",
    } <= set(rows)
    assert (
        all(len(r) == 3 for r in rows.values())
        and rows["known_run_notes"][1] == "-"
        and float(rows["known_run_notes"][2]) > 0
    )
    samples, _, itself = map(float, rows["distance_from_validation"])
    assert samples > 0 and itself == 0


@pytest.mark.filterwarnings("error")
def test_report_gives_no_distance_from_a_single_held_out_piece(trained, capsys):
    for split, number in (("train", 1), ("validation", 2)):
        write_midi(Path("two", split, "piece.mid"), scale(number))
    generate("--bars", "6", "--report", "--midi-dir", "two")
    table = capsys.readouterr().out.split("mean of")[1]
    assert "1 validation" in table and "known_run_notes" in table and "distance" not in table


def test_distance_counts_in_standard_deviations_and_leaves_out_what_does_not_vary():
    others = [{"a": 0.0, "b": 5.0, "c": 1, "known_from": "x"}, {"a": 2.0, "b": 5.0, "c": 3, "known_from": "y"}]
    rows = [{"a": 4.0, "b": 7.0, "c": 2, "known_from": "z"}]  # 3 deviations of 1 away, any, none
    assert pg.distance(rows, others) == 1.5
    assert pg.distance(others, others) == 0


def test_samples_folder_that_cannot_be_made_is_one_sentence(trained, capsys):
    Path("samples").touch()
    assert pg.main(["--generate", "--bars", "2"]) == 2
    assert "samples cannot be used" in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_outside_of_training_is_no_traceback(trained, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pg, "generate", interrupt)
    assert pg.main(["--generate"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "pianogpt: stopped"


def test_compiler_that_fails_is_said_and_training_goes_on(folder, here, monkeypatch, capsys):
    def compile(function):
        def fail(*args):
            raise torch._dynamo.exc.TorchDynamoException("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    assert pg.main([*SHORT, "--compile", "on"]) == 0
    out = capsys.readouterr().out
    assert out.count("torch.compile does not work here") == 1 and block(out)["steps"] == "30"


def test_resumed_run_decides_on_speed_as_the_uninterrupted_did(trained, monkeypatch):
    """By all steps of the run, never by those that are left: a compiled step has other bits."""
    seen = []
    monkeypatch.setattr(pg, "choose_speed", lambda run, device, steps: seen.append(steps) or (False, False))
    assert pg.main(["--steps", "34"]) == 0 and seen == [34]


def test_generating_without_the_training_music_says_that_novelty_is_unknown(trained, capsys):
    Path("midi").rename("away")
    assert len(generate("--bars", "3")) == 3
    out = capsys.readouterr().out
    assert "cannot be said" in out and "longest known run" not in out


def test_run_says_in_five_lines_at_most_what_it_does_and_how_long_it_takes(folder, here, capsys):
    (folder / "page.mid").write_text("<html>")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    write_midi(folder / "high.mid", [[(i, 1, 60 + i, 80) for i in range(60)]])
    assert pg.main(SHORT) == 0
    out, err = capsys.readouterr()
    lines = out.split("\nsteps:")[0].splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped", "music", "changed", "model", "time"]
    assert "page.mid (unreadable" in lines[0] and "drums.mid (only drums)" in lines[0]
    assert re.search(
        r"13 files of \d+ works \(\d+ train, \d+ validation\) under midi, [\d.]+ hours, [\d,]+ notes", lines[1]
    )
    assert "11 notes outside the piano" in lines[2]
    assert "learning rates up to 0.0096 (matrices that read 32), 0.0038 (matrices that read 80), 0.024" in lines[3]
    assert "on cpu" in lines[3]
    assert re.match(r"time: about [\d.]+ minutes to step 30", lines[4])
    assert "warning" not in err.lower(), "of a library"
    assert "\r" not in err and all(len(line) <= 80 for line in err.splitlines()), "a log file gets whole lines"


def test_pieces_written_while_training_change_no_bit_of_it(trained):
    assert pg.main([*SHORT, "--checkpoint", "heard.pt", "--sample-every", "10"]) == 0
    assert sorted(p.name for p in Path("samples").iterdir()) == [f"step-0000{s}-001.mid" for s in (10, 20, 30)]
    one, two = (pg.load_checkpoint(Path(name))["trainer"]["weights"] for name in ("pianogpt.pt", "heard.pt"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_each_sample_says_in_itself_what_made_it(trained):
    assert (
        pg.main(["--generate", "--num-samples", "2", "--bars", "3", "--seed", "7", "--prompt", "midi/piece01.mid"]) == 2
    )
    assert (
        pg.main(["--generate", "--num-samples", "2", "--bars", "12", "--seed", "7", "--prompt", "midi/piece01.mid"])
        == 0
    )
    texts = [Score(path).markers[0].text for path in sorted(Path("samples").glob("*.mid"))]
    name, made = texts[1].split(" {")[0], json.loads("{" + texts[1].split(" {")[1])
    assert name == f"PianoGPT {pg.VERSION}" and made["seed"] == 7 and made["step"] == 30 and made["piece"] == 2
    assert made["prompt"] == "piece01.mid" and made["bars"] == 12 and made["min_p"] == pg.SampleConfig().min_p


def test_pictures_and_sound_lie_beside_each_sample_and_nothing_is_overwritten(trained, soundfont, capsys):
    pytest.importorskip("matplotlib"), pytest.importorskip("tinysoundfont")
    Path("samples").mkdir()
    Path("samples/sample-001.wav").write_bytes(b"mine")
    argv = ["--generate", "--num-samples", "2", "--bars", "3", "--wav", "--plot", "--soundfont", str(soundfont)]
    assert pg.main(argv) == 0
    names = sorted(p.name for p in Path("samples").iterdir())
    assert names[1:] == [f"sample-00{i}.{kind}" for i in (2, 3) for kind in ("mid", "png", "wav")]
    assert Path("samples/sample-001.wav").read_bytes() == b"mine"
    assert str(soundfont) in capsys.readouterr().out and Path("pianogpt.png").stat().st_size > 5000


@pytest.mark.parametrize("flag, module", [("--wav", "tinysoundfont"), ("--plot", "matplotlib.figure")])
def test_missing_library_is_one_sentence_and_the_midi_files_are_there(
    flag, module, trained, soundfont, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, module, None)
    argv = ["--generate", "--num-samples", "2", "--bars", "3", flag, "--soundfont", str(soundfont)]
    assert pg.main(argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.count("pip install") == 1 and len(list(Path("samples").glob("*.mid"))) == 2


def test_version_names_what_matters(capsys):
    with pytest.raises(SystemExit) as end:
        pg.main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"pianogpt [\d.]+, torch \S+, miditok \S+, symusic \S+\n", capsys.readouterr().out)
