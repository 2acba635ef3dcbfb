"""samples/listen.py: is the sound heard, and the picture seen, where the notes are?"""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
import wave
from html.parser import HTMLParser
from pathlib import Path

import listen
import numpy as np
import pytest
from conftest import write_midi
from fuzz_midi import metre, midi, note, tempo
from symusic import Score, Tempo, TextMeta, TimeSignature

# 78 bytes: a metre of 1/64, one tick and a microsecond a quarter note, and a note of 2^24 of them
MANY_BARS = midi([metre(1, 6), tempo(1), *note(60, 2**24)], ticks=1)
A4_THEN_A5 = [[(0, 2, 69, 100), (8, 2, 81, 100)]]  # at 120 bpm from 0 to 1 s and from 4 to 5 s


def test_drums_are_neither_heard_nor_seen(tmp_path):
    piano = [(n, 1, 60 + n, 80) for n in range(4)]
    kicks = [(n, 1, 36, 80) for n in range(8)]
    both = write_midi(tmp_path / "both.mid", [piano, kicks], drums=[1])
    assert sorted(n.pitch for n in listen.read_piece(both).notes) == [60, 61, 62, 63]
    drums = write_midi(tmp_path / "drums.mid", [kicks], drums=[0])
    with pytest.raises(listen.UserError, match="holds no notes"):
        listen.read_piece(drums)


def chunk(name, data):
    """A RIFF chunk; data of an even length."""
    return name + struct.pack("<I", len(data)) + data


def words(*numbers, name=b""):
    """A record of a soundfont: its name in 20 bytes, if it has one, then 16-bit numbers."""
    if name:
        name = name.ljust(20, b"\0")
    return name + struct.pack(f"<{len(numbers)}H", *numbers)


@pytest.fixture
def soundfont(tmp_path):
    """A soundfont of two presets: 4 is an endless sine, 441 Hz on A4, and 5 is an octave higher."""
    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    tone = 20_000 * np.sin(2 * np.pi * np.arange(4410) / 100)
    sine = np.round(tone).astype("<i2").tobytes() + bytes(92)
    presets = words(4, 0, 0, *[0] * 6, name=b"sine") + words(5, 0, 1, *[0] * 6, name=b"high")
    sample = words(name=b"sine")
    sample += struct.pack("<IIIIIBbHH", 0, 4410, 100, 4400, 44_100, 69, 0, 0, 1)
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
    info = chunk(b"ifil", words(2, 1)) + chunk(b"isng", b"EMU8000\0")
    lists = chunk(b"LIST", b"INFO" + info + chunk(b"INAM", b"sine\0\0"))
    lists += chunk(b"LIST", b"sdta" + chunk(b"smpl", sine))
    lists += chunk(b"LIST", b"pdta" + b"".join(chunk(*table) for table in tables.items()))
    path = tmp_path / "sine.sf2"
    path.write_bytes(chunk(b"RIFF", b"sfbk" + lists))
    return path


def change(path, texts=(), **lists):
    """Replace lists of the score in a .mid file by these, whose times are in quarters.

    texts: (quarter, text) of markers.
    """
    score = Score(path)
    for name, events in lists.items():
        for event in events:
            event.time *= score.ticks_per_quarter
        setattr(score, name, events)
    for quarter, text in texts:
        score.markers.append(TextMeta(round(quarter * score.ticks_per_quarter), text))
    score.dump_midi(path)
    return path


def run(*arguments, soundfont=None, room=False):
    """The exit code of listen.py."""
    options = ["--soundfont", soundfont] if soundfont else []
    if any(str(argument).endswith((".mid", ".midi", ".kar")) for argument in arguments):
        options += ["--overwrite"] if room else ["--overwrite", "--dry"]
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
    """The pixels inside the frame of a picture, and its orange and its blue ones."""
    picture = pytest.importorskip("matplotlib.image").imread(path)[:, :, :3]
    is_black = picture.max(2) < 0.1
    rows = np.flatnonzero(is_black.mean(1) > 0.5)
    columns = np.flatnonzero(is_black.mean(0) > 0.5)
    inside = picture[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]]
    red_less_blue = inside[..., 0] - inside[..., 2]
    return inside, red_less_blue > 0.3, red_less_blue < -0.3


@pytest.fixture
def only_sound(monkeypatch):
    """A file gets a .wav alone; other tests look at what else it gets, which takes longer."""
    monkeypatch.setattr(listen, "draw_piano_roll", lambda path, piece: None)
    monkeypatch.setattr(listen, "write_compressed", lambda path, sound: None)


@pytest.fixture
def only_picture(monkeypatch):
    """A file gets a .png alone."""
    for name in ("synthesize", "write_wav", "write_compressed"):
        monkeypatch.setattr(listen, name, lambda *args: None)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    savefig = figure_class.savefig

    def save(figure, *args, **options):
        saved.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(figure_class, "savefig", save)
    return saved


def test_first_preset_sounds_where_the_notes_are_and_at_their_pitch(tmp_path, soundfont):
    score = Score(write_midi(tmp_path / "two.mid", A4_THEN_A5))
    score.tracks[0].program = 5  # asked for, not followed
    score.dump_midi(tmp_path / "two.mid")
    assert run(tmp_path / "two.mid", soundfont=soundfont) == 0
    sound = hear(tmp_path / "two.wav")
    assert len(sound) == 7 * 44_100, "five seconds of music and two to ring out"
    assert np.abs(sound).max(0).min() > 30_000 and np.abs(sound).max() < 32_767
    loud = np.sqrt((sound.reshape(70, -1) ** 2).mean(1))  # of each tenth of a second
    assert min(loud[:10].min(), loud[40:50].min()) > 5000
    assert max(loud[11:40].max(), loud[51:].max()) < 50
    assert abs(pitch_at(sound, 0.25) - 441) <= 2 and abs(pitch_at(sound, 4.25) - 882) <= 2


def test_note_after_a_thousand_others_and_twenty_tempos_is_on_time(tmp_path, soundfont, only_sound):
    notes = [(i / 60, 1 / 120, 60 + i % 12, 80) for i in range(1000)]
    path = write_midi(tmp_path / "a.mid", [[*notes, (20, 2, 69, 100)]])
    change(path, tempos=[Tempo(i, 120 + i) for i in range(20)])
    assert run(path, soundfont=soundfont) == 0
    start = round(sum(60 / (120 + i) for i in range(20)) * 44_100)
    sound = np.abs(hear(tmp_path / "a.wav")).max(1)
    assert sound[start - 9999 : start - 88].max() < 50
    assert sound[start : start + 88].max() > 1000, "in 2 ms"


def test_key_that_is_struck_again_as_it_is_let_go_sounds_again(tmp_path, soundfont, only_sound):
    path = write_midi(tmp_path / "a.mid", [[(start, 1, 69, 100) for start in range(3)]])
    assert run(path, soundfont=soundfont) == 0
    loud = np.abs(hear(tmp_path / "a.wav").reshape(70, -1)).max(1)  # of each twentieth of a second
    assert loud[:30].min() > 5000 and loud[31:].max() < 50


def test_piece_sounds_the_same_after_another_one(tmp_path, soundfont, only_sound, monkeypatch):
    path = write_midi(tmp_path / "a.mid", A4_THEN_A5)
    assert run(path, soundfont=soundfont) == 0
    alone = hear(tmp_path / "a.wav")
    with monkeypatch.context() as patch:
        patch.setattr(listen, "RING_OUT", 0)  # leaves the last note sounding
        assert run(path, soundfont=soundfont) == 0
    assert run(path, soundfont=soundfont) == 0
    assert np.array_equal(hear(tmp_path / "a.wav"), alone)


def test_shipped_piano_plays_every_octave_in_tune_and_falls_silent(tmp_path, only_sound):
    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    keys = range(21, 109, 12)  # the A of every octave
    path = write_midi(tmp_path / "a.mid", [[(6 * i, 2, key, 100) for i, key in enumerate(keys)]])
    run(path)
    sound = hear(tmp_path / "a.wav")
    assert np.array_equal(sound[:, 0], sound[:, 1]) and np.abs(sound).max() == 32_000
    for i, key in enumerate(keys):  # a second of sound in every three
        second, rest = np.split(sound[3 * i * 44_100 : 3 * (i + 1) * 44_100, 0], [44_100])
        spectrum = np.abs(np.fft.rfft(second * np.hanning(44_100)))
        pitch = 440 * 2 ** ((key - 69) / 12)
        near = slice(round(pitch / 1.06), round(pitch * 1.06) + 1)
        off = abs(spectrum[near].argmax() + near.start - pitch)
        assert off <= 1 + pitch / 1000, "within two cents"
        assert np.abs(second).max() > 10_000 and not np.abs(rest[44_100:]).any(), "no note hangs"
        assert np.abs(np.diff(rest)).max() < np.abs(np.diff(second)).max(), "it ends in no click"


def test_ten_loud_notes_at_once_are_not_clipped(tmp_path, only_sound):
    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    run(write_midi(tmp_path / "a.mid", [[(0, 2, key, 127) for key in range(48, 68, 2)]]))
    sound = np.abs(hear(tmp_path / "a.wav"))
    assert sound.max() == 32_000 and (sound > 31_990).sum() < 10


def test_picture_shows_notes_at_their_time_and_pitch_and_the_prompt_in_orange(
    tmp_path, only_picture
):
    path = write_midi(tmp_path / "two.mid", A4_THEN_A5)
    run(change(path, [(8, "end of prompt")]))  # where the second note begins
    picture, *masks = see(tmp_path / "two.png")
    for mask, (start, stop, pitch) in zip(masks, ((0, 1, 69), (4, 5, 81)), strict=True):
        rows, columns = mask.nonzero()
        edges = np.array([columns.min(), columns.max()])
        assert np.allclose(edges, np.array([start, stop]) / 5 * picture.shape[1], rtol=0, atol=3)
        assert abs(rows.mean() - (82 - pitch) / (82 - 59) * len(picture)) <= 2  # from 82 down to 59


def test_rewritten_bars_are_blue_between_those_of_the_prompt(tmp_path, only_picture):
    path = write_midi(tmp_path / "a.mid", [[(4 * n, 3, 60, 90) for n in range(4)]])
    turns = [(4, "end of prompt"), (8, "prompt goes on"), (12, "end of prompt")]
    change(path, turns)
    run(path)
    picture, orange, blue = see(tmp_path / "a.png")
    middles = [round((4 * n + 1.5) / 15 * picture.shape[1]) for n in range(4)]
    assert [orange[:, at].any() for at in middles] == [True, False, True, False]
    assert [blue[:, at].any() for at in middles] == [False, True, False, True]
    run(tmp_path)
    page = (tmp_path / "index.html").read_text()
    kinds = re.findall(r'class="(note(?: prompt)?)" opacity[^>]* d="([^"]*)"', page)
    starts = {kind: re.findall(r"M(\d+) ", path) for kind, path in kinds}
    assert starts == {"note prompt": ["0", "4000"], "note": ["2000", "6000"]}


def test_without_a_prompt_everything_is_blue_and_louder_is_darker(tmp_path, only_picture):
    path = write_midi(tmp_path / "a.mid", [[(0, 4, 60, 30), (4, 4, 60, 120)]])
    run(change(path, [(4, "the end of prompts")]))  # another text
    picture, orange, blue = see(tmp_path / "a.png")
    middle = picture.shape[1] // 2
    soft = picture[:, :middle][blue[:, :middle]]
    loud = picture[:, middle:][blue[:, middle:]]
    assert soft.mean() > loud.mean() + 0.2
    assert not orange.any()


def test_bar_lines_follow_metre_and_tempo_and_labels_name_bars_and_colours(
    tmp_path, figures, only_picture
):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 59, 90), (13, 1, 61, 90)]])
    metres = [TimeSignature(8, 3, 4), TimeSignature(11, 4, 8)]  # 4/4 until then, which is the rule
    tempos = [Tempo(0, 120), Tempo(8, 60)]
    run(change(path, [(8, "end of prompt")], tempos=tempos, time_signatures=metres))
    picture = see(tmp_path / "a.png")[0]
    grey = ((picture.max(2) < 0.9) & (np.ptp(picture, 2) < 0.02)).mean(0) > 0.8  # columns
    lines = np.flatnonzero(grey)
    lines = lines[lines > 3]  # without the one on the frame
    assert np.allclose(lines / picture.shape[1] * 10, [2, 4, 7, 9], rtol=0, atol=0.02)
    axes = figures[0].axes[0]
    octaves = [label.get_text() for label in axes.get_yticklabels()]
    assert octaves[list(axes.get_yticks()).index(60)] == "C4"
    assert [x.get_text() for x in axes.child_axes[0].get_xticklabels()] == list("12345")
    assert [x.get_text() for x in figures[0].legends[0].get_texts()] == ["prompt", "PianoGPT"]


def test_chord_symbols_stand_where_the_chords_are_and_foreign_markers_do_not(
    tmp_path, figures, only_picture
):
    made = (0, "PianoGPT " + "x" * 300)
    ours = [made, (0, "Am"), (0.5, "F#m7b5"), (1, "end of prompt"), (8.25, "C")]
    foreign = [(0, "verse"), (1, "chorus")]
    for i, texts in enumerate((ours, foreign, [made])):
        run(change(write_midi(tmp_path / f"{i}.mid", A4_THEN_A5), texts))
    found = []
    for figure in figures:
        texts = figure.axes[0].texts
        found.append([(round(x.get_position()[0], 3), x.get_text()) for x in texts])
    assert found == [[(0, "Am"), (0.25, "F#m7b5"), (4.125, "C")], [], []]


def test_losses_fall_in_blue_and_validation_is_a_second_curve(tmp_path):
    for name, value in (("with.csv", "{}"), ("without.csv", "")):
        rows = [f"{10 * i},{3 / i},{value.format(6 / i)}" for i in range(1, 6)]
        (tmp_path / name).write_text("\n".join(["step,train_loss,val_loss", *rows]))
    assert run(tmp_path / "with.csv", tmp_path / "without.csv") == 0
    _, orange, blue = see(tmp_path / "with.png")
    rows, columns = blue.nonzero()
    first = columns.min()
    assert rows[columns == first].mean() + 50 < rows.max(), "the curve falls"
    six = orange[:, first].nonzero()[0]
    assert six.mean() + 50 < rows[columns == first].mean(), "6 is above 3"
    _, orange, blue = see(tmp_path / "without.png")
    assert blue.any() and not orange.any()


def test_each_unusable_file_is_one_sentence_and_the_next_is_done(tmp_path, capsys):
    files = [
        ("none.mid", None, "is not a file"),
        ("bad.mid", b"no MIDI", "is not a MIDI file"),
        ("empty.mid", [[]], "holds no notes"),
        ("long.mid", [[(8000, 1, 60, 60)]], "is empty or longer than an hour"),
        ("other.csv", b"name,age\nBach,65\n", "is no training log"),
        ("no-rows.csv", b"step,train_loss,val_loss\n", "is no training log"),
        ("letter.txt", b"Dear", "is neither .mid, .midi, .kar nor .csv"),
        ("bars.mid", MANY_BARS, "has more than 20,000 bars"),
    ]
    pytest.importorskip("matplotlib")
    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    for name, content, _ in files:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content:
            write_midi(tmp_path / name, content)
    bad = [tmp_path / name for name, _, _ in files]
    assert run(*bad, write_midi(tmp_path / "good.mid", A4_THEN_A5)) == 2
    out, err = capsys.readouterr()
    for path, (_, _, sentence), line in zip(bad, files, err.splitlines(), strict=True):
        assert line.startswith(f"{path} {sentence}")
    assert out.startswith(f"wrote {tmp_path / 'good.png'}\n") and (tmp_path / "good.png").exists()


@pytest.mark.parametrize(
    "missing, cure",
    [
        ("matplotlib", "pip install matplotlib"),
        ("tinysoundfont", "pip install --no-deps tinysoundfont"),
        ("soundfile", "pip install soundfile"),
        ("sine.sf2", "pass another --soundfont"),
    ],
)
def test_missing_library_or_soundfont_is_a_sentence(
    tmp_path, soundfont, monkeypatch, capsys, missing, cure
):
    pytest.importorskip("matplotlib")
    if missing == "sine.sf2":
        soundfont.write_bytes(b"RIFF no soundfont")
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setitem(sys.modules, f"{missing}.figure", None)
    files = [write_midi(tmp_path / name, A4_THEN_A5) for name in ("a.mid", "b.mid")]
    assert run(*files, soundfont=soundfont) == 2
    err = capsys.readouterr().err
    assert missing in err and err.endswith(f"{cure}\n") and err.count("\n") == 1
    made = {".png", ".wav", ".ogg", ".mp3"}
    lost = {"matplotlib": {".png"}, "soundfile": {".ogg", ".mp3"}}
    made -= lost.get(missing, {".wav", ".ogg", ".mp3"})
    assert {path.suffix for path in tmp_path.glob("[ab].*")} == {".mid", *made}


def test_compressed_sound_is_that_of_the_wav_and_small(tmp_path, soundfont):
    soundfile = pytest.importorskip("soundfile")
    assert run(write_midi(tmp_path / "a.mid", A4_THEN_A5), soundfont=soundfont) == 0
    sound = hear(tmp_path / "a.wav").mean(1) / 2**15
    for suffix in ("ogg", "mp3"):
        compressed, rate = soundfile.read(tmp_path / f"a.{suffix}")
        assert rate == 44_100 and compressed.ndim == 1
        assert abs(len(compressed) - len(sound)) < 4000
        both = [np.abs(np.fft.rfft(x, 2**19))[:100_000] for x in (sound, compressed)]
        assert np.corrcoef(*both)[0, 1] > 0.95
        assert (tmp_path / f"a.{suffix}").stat().st_size < len(sound) / 44_100 * 10_000


def test_long_sound_is_compressed(tmp_path):
    """Vorbis crashes if it gets a minute at once."""
    soundfile = pytest.importorskip("soundfile")
    sound = np.zeros((60 * 44_100, 2), "<i2")
    listen.write_compressed(tmp_path / "a.mid", sound)
    for suffix in ("ogg", "mp3"):
        assert soundfile.info(tmp_path / f"a.{suffix}").duration == pytest.approx(60, abs=0.2)


def test_room_rings_on_after_the_notes_and_can_be_left_out(tmp_path, soundfont, only_sound):
    path = write_midi(tmp_path / "a.mid", A4_THEN_A5)
    loud = []
    for room in (False, True):
        assert run(path, soundfont=soundfont, room=room) == 0
        sound = hear(tmp_path / "a.wav")
        assert np.abs(sound).max() > 30_000
        loud.append(
            [np.sqrt((sound[a : a + 4410] ** 2).mean()) for a in (44_100, 2 * 44_100 + 2000)]
        )
    (dry_note, dry_silence), (note, silence) = loud
    assert note > dry_note / 2
    assert silence > 20 * dry_silence + 1 and silence < note / 10


def test_room_is_that_of_the_whole_sound_although_it_is_made_in_parts():
    rng = np.random.default_rng(0)
    sound = rng.standard_normal((400_000, 2)).astype(np.float32)
    frames = round(listen.ROOM_SECONDS * listen.RATE)
    noise = np.random.default_rng(0).standard_normal((frames, 2))
    noise *= 10 ** (-3 * np.arange(frames) / frames)[:, None]
    noise *= listen.ROOM_LEVEL / np.sqrt((noise**2).sum(0))
    spectrum = np.fft.rfft(sound, 2**19, axis=0) * np.fft.rfft(noise, 2**19, axis=0)
    whole = sound + np.fft.irfft(spectrum, 2**19, axis=0)[: len(sound)]
    assert np.allclose(listen.add_room(sound), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["song.mp3", "song.png", "song.wav"])
def test_recording_of_the_user_beside_a_piece_is_not_replaced(tmp_path, capsys, name):
    path = write_midi(tmp_path / "song.mid", A4_THEN_A5)
    (tmp_path / name).write_bytes(b"mine")
    assert listen.main([str(path)]) == 2
    assert f"{name} is there already: move it, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_page_of_the_user_is_not_replaced(tmp_path, capsys):
    write_midi(tmp_path / "song.mid", A4_THEN_A5)
    (tmp_path / "index.html").write_text("<title>My band</title>")
    assert run(tmp_path) == 2
    assert "index.html is another page: move it, or name another folder" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "<title>My band</title>"


def test_page_of_the_user_that_only_mentions_the_program_is_not_replaced(tmp_path):
    write_midi(tmp_path / "song.mid", A4_THEN_A5)
    (tmp_path / "index.html").write_text("<title>My band</title> Music by PianoGPT")
    assert run(tmp_path) == 2


@pytest.mark.parametrize("text", ["[[1, 2]]", "[[null, 2]]", "[" * 100_000, "7"])
def test_settings_that_are_none_are_left_out(tmp_path, text):
    markers = [TextMeta(0, f"PianoGPT {text}"), TextMeta(0, "C")]
    assert listen.read_texts(markers) == ([(0, "C")], {})


def test_file_that_may_not_be_read_is_a_sentence(tmp_path, monkeypatch, capsys):
    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert run(tmp_path) == 2
    assert f"{tmp_path} cannot be used: Permission denied" in capsys.readouterr().err


def test_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    def fill_disk(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    monkeypatch.setattr(pytest.importorskip("matplotlib.figure").Figure, "savefig", fill_disk)
    (tmp_path / "a.png").write_bytes(b"old")
    assert run(write_midi(tmp_path / "a.mid", A4_THEN_A5)) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"a.{suffix}" for suffix in ("mid", "mp3", "ogg", "png", "wav")
    ]


class Page(HTMLParser):
    """A page: (tag, attributes) of its tags in order, and the texts in each kind of tag."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.texts = {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if data.strip():
            self.texts.setdefault(self.tags[-1][0], []).append(data.strip())

    def notes(self):
        """(start and length in milliseconds, pitch, velocity, class) of all notes, in order."""
        found = []
        for a in self.note_paths():
            look = (int(a["data-velocity"]), a["class"])
            for start, down, length in re.findall(r"M(\d+) (\d+)h(\d+)", a["d"]):
                found.append((int(start), int(length), 127 - int(down), *look))
        return sorted(found)

    def note_paths(self):
        """The attributes of the paths that draw notes."""
        return [a for tag, a in self.tags if tag == "path" and a["class"].startswith("note")]


def test_page_of_a_folder_shows_every_piece_with_figures_chords_and_settings(tmp_path, monkeypatch):
    for library in (
        "matplotlib",
        "matplotlib.figure",
        "soundfile",
        "tinysoundfont",
        "tinysoundfont.midi",
    ):
        monkeypatch.setitem(sys.modules, library, None)  # a page needs none of them
    path = write_midi(tmp_path / "b.mid", [[(0, 1, 69, 100), (4, 2, 34, 37)]])
    settings = {"seed": 0, "temperature": 0.9, "prompt": "", "top_k": 0, "key": "A minor"}
    settings["style"] = "J&B"
    change(path, [(0, f"PianoGPT {json.dumps(settings)}"), (2, "F#m7b5")])
    change(write_midi(tmp_path / "a.MID", A4_THEN_A5), [(8, "end of prompt")])
    monkeypatch.setattr(
        listen, "__file__", str(tmp_path / "listen.py")
    )  # the default: its own folder
    assert run() == 0
    page = Page(tmp_path / "index.html")
    assert page.texts["h2"] == ["a", "b"]
    assert [tag for tag, _ in page.tags].count("audio") == 2
    assert (
        "2 notes · 3.0 seconds · 0.7 notes/s · 2 bars · Bb1 to A4 · A minor · in the style of J&B"
        in page.texts["p"]
    )
    assert (
        "seed 0, temperature 0.9" in page.texts["p"]
        and "not stored in this file" in page.texts["p"]
    )
    labels = page.texts["text"]
    assert labels.count("F#m7b5") == 1 and labels.count("1") == 2, "bar 1 of each"
    assert page.notes() == [
        (0, 500, 69, 100, "note"),
        (0, 1000, 69, 100, "note prompt"),
        (2000, 1000, 34, 37, "note"),
        (4000, 1000, 81, 100, "note"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a.MID", "b.mid", "index.html"}


def test_page_holds_the_whole_piano_and_fetches_nothing(tmp_path):
    write_midi(tmp_path / "a.mid", A4_THEN_A5)
    assert run(tmp_path) == 0
    page = Page(tmp_path / "index.html")
    without_samples = re.sub(r'"samples": "[^"]*"', "", page.source)
    assert not re.search(r"https?:|//\w|url\(|@import", without_samples)
    for _, a in page.tags:
        assert a.get("src") is None and a.get("href", "data:,") == "data:,"
    policies = [a for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [a["content"] for a in policies] == ["default-src data: blob: 'unsafe-inline'"]
    piano = json.loads(page.texts["script"][0])
    samples = np.frombuffer(base64.b64decode(piano["samples"]), "<i2")
    last = -1
    for highest, gain, held, released, first, loop, end, rate, root in piano["zones"]:
        assert last < highest <= 127 and 0 < gain <= 1 and 0.999 < released < held < 1
        assert (
            0 <= first < loop < end < len(samples) and rate == 22_050 and abs(root - highest) < 26
        )
        last = highest
    assert last == 127 and len(page.source) < 270_000 + 2000


def test_hostile_names_and_texts_stay_texts(tmp_path):
    name = "<script>alert(1)<!--&\"'"
    text = "</script></p><img src=x onerror=alert(1)>%s \ud800"
    made = "PianoGPT " + json.dumps({"seed": text, "key": text})
    path = write_midi(tmp_path / f"{name}.mid", A4_THEN_A5)
    change(path, [(0, made), (0, "<b>C")])
    no_settings = 'PianoGPT {"seed": ', "PianoGPT {[1]", "PianoGPT ", "PianoGPT 3", '{"seed": 8}'
    for i, made in enumerate(no_settings):
        change(write_midi(tmp_path / f"{i}.mid", A4_THEN_A5), [(0, made)])
    assert run(tmp_path) == 0
    page = Page(tmp_path / "index.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and tags.count("article") == 6
    assert not {"img", "b"} & set(tags)
    assert name in page.texts["h2"] and "<b>C" in page.texts["text"]
    assert page.texts["p"].count("not stored in this file") == 5
    assert any(text[:-1] in found for found in page.texts["p"])


def test_page_is_the_same_each_time_and_old_pictures_stay(tmp_path):
    write_midi(tmp_path / "a.mid", A4_THEN_A5)
    (tmp_path / "a.png").write_bytes(b"shipped")
    assert run(tmp_path) == 0
    first = (tmp_path / "index.html").read_bytes()
    assert run(tmp_path) == 0
    assert (tmp_path / "index.html").read_bytes() == first
    assert (tmp_path / "a.png").read_bytes() == b"shipped"


def test_page_leaves_out_what_cannot_be_read_and_says_so(tmp_path, capsys):
    (tmp_path / "bad.mid").write_bytes(b"no MIDI")
    assert run(tmp_path) == 2
    assert "holds no .mid file that can be played" in capsys.readouterr().err
    assert not (tmp_path / "index.html").exists()
    write_midi(tmp_path / "good.mid", A4_THEN_A5)
    write_midi(tmp_path / "song.KAR", A4_THEN_A5)
    (tmp_path / "lost.mid").symlink_to("nowhere.mid")
    assert run(tmp_path) == 2
    assert Page(tmp_path / "index.html").texts["h2"] == ["good", "song"]
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 'bad.mid'} is not a MIDI file") and err.count("\n") == 2
    assert f"{tmp_path / 'lost.mid'} cannot be used: No such file or directory" in err


def test_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    def fill_disk(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    write_midi(tmp_path / "a.mid", A4_THEN_A5)
    (tmp_path / "index.html").write_bytes(b"old <title>Music by PianoGPT</title>")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    assert run(tmp_path) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_bytes() == b"old <title>Music by PianoGPT</title>"
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_piano_and_a_soundfont_without_pieces_are_a_sentence(tmp_path, monkeypatch, capsys):
    write_midi(tmp_path / "a.mid", A4_THEN_A5)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, soundfont="any.sf2")
    assert "are for single pieces: name .mid files" in capsys.readouterr().err
    monkeypatch.setattr(listen, "PIANO", tmp_path / "florestan-piano.sf2")
    assert run(tmp_path) == 2
    assert "florestan-piano.sf2 is missing" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_page_sounds_as_the_wav_does(tmp_path, only_sound):
    node = shutil.which("node") or pytest.skip("Node.js is not installed")
    pytest.importorskip("tinysoundfont")
    pytest.importorskip("soundfile")
    notes = [(i, 1 + i % 2, 24 + 7 * i, 20 + 8 * i) for i in range(12)]
    path = write_midi(tmp_path / "a.mid", [notes, [(14, 4, 48, 90), (14, 4, 55, 90)]])
    assert run(path, tmp_path) == 0
    page = Page(tmp_path / "index.html")
    paths = []
    for a in page.note_paths():
        paths.append({"d": a["d"], "dataset": {"velocity": a["data-velocity"]}})
    piano, program = page.texts["script"]
    script = program.partition("for (const article")[0]
    (tmp_path / "play.js").write_text(f"""
const document = {{ getElementById: () => ({{ textContent: {json.dumps(piano)} }}) }}
{script}
const paths = {json.dumps(paths)}.map(path => ({{ ...path, getAttribute: name => path[name] }}))
synthesize({{ querySelectorAll: () => paths }}, 9).then(blob => blob.arrayBuffer())
  .then(data => require("fs").writeFileSync("page.wav", Buffer.from(data)))""")
    subprocess.run([node, "play.js"], cwd=tmp_path, check=True)
    with wave.open(str(tmp_path / "page.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 44_100)
        theirs = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    ours = hear(tmp_path / "a.wav")[:, 0]
    assert len(theirs) == len(ours) == 11 * 44_100
    levels = []  # in each tenth of a second
    for sound in (ours, theirs):
        levels.append(np.sqrt((sound.reshape(110, -1) ** 2).mean(1)) + 10)
    assert np.abs(20 * np.log10(levels[0] / levels[1])).max() < 1.5
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9
