"""samples/listen.py: is the sound heard, and the picture seen, where the notes are?"""

import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from conftest import pg, write_midi
from symusic import Score, Tempo, TextMeta, TimeSignature

sys.path.insert(0, str(Path(__file__).parent.parent / "samples"))

import listen  # noqa: E402

A4_THEN_A5 = [[(0, 2, 69, 100), (8, 2, 81, 100)]]  # at 120 bpm from 0 to 1 s and from 4 to 5 s


def chunk(name, data):
    """A RIFF chunk; data of an even length."""
    return name + struct.pack("<I", len(data)) + data


def words(*numbers, name=b""):
    """A record of a soundfont: its name in 20 bytes, if it has one, then 16-bit numbers."""
    return name.ljust(20 * bool(name), b"\0") + struct.pack(f"<{len(numbers)}H", *numbers)


@pytest.fixture
def soundfont(tmp_path):
    """A soundfont of two presets: 4 is an endless sine, 441 Hz on key 69 (A4), and 5 is an octave higher."""
    pytest.importorskip("tinysoundfont")
    sine = np.round(20_000 * np.sin(2 * np.pi * np.arange(4410) / 100)).astype("<i2").tobytes() + bytes(92)
    presets = words(4, 0, 0, *[0] * 6, name=b"sine") + words(5, 0, 1, *[0] * 6, name=b"high")
    sample = words(name=b"sine") + struct.pack("<IIIIIBbHH", 0, 4410, 100, 4400, 44_100, 69, 0, 0, 1)
    tables = {
        b"phdr": presets + words(0, 0, 2, *[0] * 6, name=b"EOP"),
        b"pbag": words(0, 0, 1, 0, 3, 0),
        b"pmod": bytes(10),
        b"pgen": words(41, 0, 51, 12, 41, 0, 0, 0),  # 41: instrument 0, 51: twelve semitones up
        b"inst": words(0, name=b"sine") + words(1, name=b"EOI"),
        b"ibag": words(0, 0, 2, 0),
        b"imod": bytes(10),
        b"igen": words(54, 1, 53, 0, 0, 0),  # 54: looped, 53: sample 0
        b"shdr": sample + words(*[0] * 13, name=b"EOS"),
    }
    info = chunk(b"ifil", words(2, 1)) + chunk(b"isng", b"EMU8000\0") + chunk(b"INAM", b"sine\0\0")
    lists = chunk(b"LIST", b"INFO" + info) + chunk(b"LIST", b"sdta" + chunk(b"smpl", sine))
    lists += chunk(b"LIST", b"pdta" + b"".join(chunk(name, data) for name, data in tables.items()))
    path = tmp_path / "sine.sf2"
    path.write_bytes(chunk(b"RIFF", b"sfbk" + lists))
    return path


def change(path, **lists):
    """Replace lists of the score in a .mid file by these, whose times are in quarters."""
    score = Score(path)
    for name, events in lists.items():
        for event in events:
            event.time *= score.ticks_per_quarter
        setattr(score, name, events)
    score.dump_midi(path)


def run(*arguments, soundfont=None):
    """The exit code of listen.py."""
    options = ["--soundfont", soundfont] if soundfont else []
    return listen.main([str(argument) for argument in [*arguments, *options]])


def hear(path):
    """The left and right samples of a .wav, (frames, 2), after a look at its format."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 44_100)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).astype(float)


def pitch_at(sound, second):
    """The loudest frequency in the half second of a sound that begins there, to 2 Hz."""
    return 2 * np.abs(np.fft.rfft(sound[round(second * 44_100) :][:22_050, 0])).argmax()


def see(path):
    """The pixels inside the frame of a picture, (rows, columns, 3), and masks of its orange and blue ones."""
    picture = pytest.importorskip("matplotlib.image").imread(path)[:, :, :3]
    rows, columns = (np.flatnonzero((picture.max(2) < 0.1).mean(axis) > 0.5) for axis in (1, 0))
    inside = picture[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]]
    red_less_blue = inside[..., 0] - inside[..., 2]
    return inside, red_less_blue > 0.3, red_less_blue < -0.3


def test_first_preset_sounds_where_the_notes_are_and_at_their_pitch(tmp_path, soundfont):
    score = Score(write_midi(tmp_path / "two.mid", A4_THEN_A5))
    score.tracks[0].program = 5  # asked for, not followed
    score.dump_midi(tmp_path / "two.mid")
    assert run(tmp_path / "two.mid", soundfont=soundfont) == 0
    sound = hear(tmp_path / "two.wav")
    assert len(sound) == 7 * 44_100, "five seconds of music and two to ring out"
    assert 30_000 < np.abs(sound).max(0).min() and np.abs(sound).max() < 32_767
    loud = np.sqrt((sound.reshape(70, -1) ** 2).mean(1))  # of each tenth of a second
    assert min(loud[:10].min(), loud[40:50].min()) > 5000 and max(loud[11:40].max(), loud[51:].max()) < 50
    assert abs(pitch_at(sound, 0.25) - 441) <= 2 and abs(pitch_at(sound, 4.25) - 882) <= 2


def test_note_after_a_thousand_others_and_twenty_tempos_is_on_time(tmp_path, soundfont):
    notes = [(i / 60, 1 / 120, 60 + i % 12, 80) for i in range(1000)]
    path = write_midi(tmp_path / "a.mid", [[*notes, (20, 2, 69, 100)]])
    change(path, tempos=[Tempo(i, 120 + i) for i in range(20)])
    assert run(path, soundfont=soundfont) == 0
    start = round(sum(60 / (120 + i) for i in range(20)) * 44_100)
    sound = np.abs(hear(tmp_path / "a.wav")).max(1)
    assert sound[start - 9999 : start - 88].max() < 50 and sound[start : start + 88].max() > 1000, "in 2 ms"


def test_key_that_is_struck_again_as_it_is_let_go_sounds_again(tmp_path, soundfont):
    path = write_midi(tmp_path / "a.mid", [[(start, 1, 69, 100) for start in range(3)]])
    assert run(path, soundfont=soundfont) == 0
    loud = np.abs(hear(tmp_path / "a.wav").reshape(70, -1)).max(1)  # of each twentieth of a second
    assert loud[:30].min() > 5000 and loud[31:].max() < 50


def test_piece_sounds_the_same_after_another_one(tmp_path, soundfont, monkeypatch):
    path = write_midi(tmp_path / "a.mid", A4_THEN_A5)
    assert run(path, soundfont=soundfont) == 0
    alone = hear(tmp_path / "a.wav")
    monkeypatch.setattr(listen, "RING_OUT", 0)  # leaves the last note sounding
    assert run(path, soundfont=soundfont) == 0
    monkeypatch.undo()
    assert run(path, soundfont=soundfont) == 0
    assert np.array_equal(hear(tmp_path / "a.wav"), alone)


def test_picture_shows_notes_at_their_time_and_pitch_and_the_prompt_in_orange(tmp_path):
    path = write_midi(tmp_path / "two.mid", A4_THEN_A5)
    change(path, markers=[TextMeta(8, "end of prompt")])  # where the second note begins
    run(path)
    picture, *masks = see(tmp_path / "two.png")
    for mask, (start, stop, pitch) in zip(masks, ((0, 1, 69), (4, 5, 81))):
        rows, columns = mask.nonzero()
        edges = np.array([columns.min(), columns.max()])
        assert np.allclose(edges, np.array([start, stop]) / 5 * picture.shape[1], rtol=0, atol=3)
        assert abs(rows.mean() - (82 - pitch) / (82 - 59) * len(picture)) <= 2  # from 82 down to 59


def test_without_a_prompt_everything_is_blue_and_louder_is_darker(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 4, 60, 30), (4, 4, 60, 120)]])
    change(path, markers=[TextMeta(4, "the end of prompts")])  # another text
    run(path)
    picture, orange, blue = see(tmp_path / "a.png")
    middle = picture.shape[1] // 2
    assert picture[:, :middle][blue[:, :middle]].mean() > picture[:, middle:][blue[:, middle:]].mean() + 0.2
    assert not orange.any()


def test_bar_lines_follow_metre_and_tempo_and_labels_name_bars_octaves_and_colours(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda *a, **k: (figures.append(a[0]), savefig(*a, **k)))
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 59, 90), (13, 1, 61, 90)]])
    metres = [TimeSignature(8, 3, 4), TimeSignature(11, 4, 8)]  # after 4/4, which nobody has to write
    change(path, tempos=[Tempo(0, 120), Tempo(8, 60)], time_signatures=metres)
    change(path, markers=[TextMeta(8, "end of prompt")])
    run(path)
    picture = see(tmp_path / "a.png")[0]
    grey = ((picture.max(2) < 0.9) & (np.ptp(picture, 2) < 0.02)).mean(0) > 0.8  # columns
    lines = [column for column in np.flatnonzero(grey) if column > 3]  # without the one on the frame
    assert np.allclose(np.array(lines) / picture.shape[1] * 10, [2, 4, 7, 9], rtol=0, atol=0.02)
    axes = figures[0].axes[0]
    assert dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels())))[60] == "C4"
    assert [label.get_text() for label in axes.child_axes[0].get_xticklabels()] == list("12345")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["prompt", "PianoGPT"]


def test_chord_symbols_stand_where_the_chords_are_and_texts_of_other_programs_do_not(tmp_path, monkeypatch):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], figure_class.savefig
    monkeypatch.setattr(figure_class, "savefig", lambda *a, **k: (figures.append(a[0]), savefig(*a, **k)))
    plain = write_midi(tmp_path / "a.mid", A4_THEN_A5).read_bytes()
    made = "PianoGPT " + "x" * 300
    for texts in ([(0, made), (0, "Am"), (200, "F#m7b5"), (4000, "C")], [(0, "@KMIDI"), (480, "la")], [(0, made)]):
        (tmp_path / "a.mid").write_bytes(pg.add_texts(plain, texts))
        assert run(tmp_path / "a.mid") == 0
    found = [[(round(t.get_position()[0], 3), t.get_text()) for t in f.axes[0].texts] for f in figures]
    assert found == [[(0, "Am"), (round(200 / 960, 3), "F#m7b5"), (round(4000 / 960, 3), "C")], [], []]


def test_losses_fall_in_blue_and_validation_is_a_second_curve(tmp_path):
    for name, value in (("with.csv", "{}"), ("without.csv", "")):
        rows = [f"{10 * i},{3 / i},{value.format(6 / i)}" for i in range(1, 6)]
        (tmp_path / name).write_text("\n".join(["step,train_loss,val_loss", *rows]))
    assert run(tmp_path / "with.csv", tmp_path / "without.csv") == 0
    _, orange, blue = see(tmp_path / "with.png")
    rows, columns = blue.nonzero()
    first = columns.min()
    assert rows[columns == first].mean() + 50 < rows.max(), "the curve falls"
    assert orange[:, first].nonzero()[0].mean() + 50 < rows[columns == first].mean(), "6 is above 3"
    _, orange, blue = see(tmp_path / "without.png")
    assert blue.any() and not orange.any()


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.mid", None, "is not a file"),
        ("bad.mid", b"no MIDI", "is not a MIDI file"),
        ("empty.mid", [[]], "holds no notes"),
        ("long.mid", [[(8000, 1, 60, 60)]], "does not last"),
        ("other.csv", b"name,age\nBach,65\n", "is no training log"),
        ("no-rows.csv", b"step,train_loss,val_loss\n", "is no training log"),
        ("letter.txt", b"Dear", "is neither .mid nor .csv"),
    ],
)
def test_unusable_file_is_one_sentence_and_the_next_is_done(tmp_path, capsys, name, content, sentence):
    pytest.importorskip("matplotlib")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        write_midi(tmp_path / name, content)
    assert run(tmp_path / name, write_midi(tmp_path / "good.mid", A4_THEN_A5)) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{tmp_path / name} {sentence}") and err.count("\n") == 1
    assert out.startswith(f"wrote {tmp_path / 'good.png'}\n") and (tmp_path / "good.png").exists()


@pytest.mark.parametrize(
    "missing, cure",
    [
        ("matplotlib", "pip install matplotlib"),
        ("tinysoundfont", "pip install --no-deps tinysoundfont"),
        ("sine.sf2", "pass another --soundfont"),
    ],
)
def test_missing_library_or_soundfont_is_a_sentence(tmp_path, soundfont, monkeypatch, capsys, missing, cure):
    pytest.importorskip("matplotlib")
    if missing == "sine.sf2":
        soundfont.write_bytes(b"RIFF no soundfont")
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setitem(sys.modules, f"{missing}.figure", None)
    files = [write_midi(tmp_path / name, A4_THEN_A5) for name in ("a.mid", "b.mid")]
    assert run(*files, soundfont=soundfont) == 2
    out, err = capsys.readouterr()
    assert "no sound" not in out and missing in err and err.endswith(f"{cure}\n") and err.count("\n") == 1
    made = ".wav" if missing == "matplotlib" else ".png"
    assert {path.suffix for path in tmp_path.glob("[ab].*")} == {".mid", made}


def test_without_a_soundfont_one_sentence_tells_what_to_pass(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    write_midi(tmp_path / "a.mid", A4_THEN_A5)
    monkeypatch.setattr(listen, "__file__", str(tmp_path / "listen.py"))  # the default: .mid files beside it
    assert run() == 0
    out, err = capsys.readouterr()
    assert "then --soundfont /usr/share/sounds/sf3" in out and out.count("\n") == 2 and not err
    assert {path.name for path in tmp_path.iterdir()} == {"a.mid", "a.png"}


def test_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    def fill_disk(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pytest.importorskip("matplotlib.figure").Figure, "savefig", fill_disk)
    (tmp_path / "a.png").write_bytes(b"old")
    assert run(write_midi(tmp_path / "a.mid", A4_THEN_A5)) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
