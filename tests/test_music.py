"""Room 2: a MIDI file becomes ids and ids become a MIDI file."""

import urllib.error
import wave
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import pg, scale, write_midi
from symusic import Score


def encode(path, **music):
    """One file through the whole reading room."""
    config = pg.MusicConfig(**music)
    return pg.encode_file(path, pg.make_tokenizer(config), config)


def piano_notes(path, fold=True):
    """(start, end, pitch) in quarters of the one piano that a file is read as."""
    piano = pg.read_piano(path.read_bytes(), fold)
    return [(n.time / piano.tpq, (n.time + n.duration) / piano.tpq, n.pitch) for n in piano.tracks[0].notes]


def test_two_track_file_keeps_both_hands(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 72, 80)], [(0, 2, 40, 60)]])
    assert piano_notes(path) == [(0, 2, 40), (0, 1, 72)]


def test_drum_track_is_dropped(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 38, 90)], [(1, 1, 60, 80)]], drums=[0])
    assert piano_notes(path) == [(1, 2, 60)]


def test_file_of_only_drums_says_so(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 38, 90)]], drums=[0])
    assert encode(path).problem == "only drums"


def test_file_without_notes_says_so(tmp_path):
    assert encode(write_midi(tmp_path / "a.mid", [])).problem == "no notes"


def test_pedal_lengthens_notes_until_it_is_lifted(tmp_path):
    controls = [(0, 0.5, 64, 127), (0, 3, 64, 0)]
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (4, 1, 62, 80)]], controls=controls)
    assert piano_notes(path) == [(0, 3, 60), (4, 5, 62)]
    assert piano_notes(path, fold=False) == [(0, 1, 60), (4, 5, 62)]


def test_pedal_of_one_hand_holds_the_other(tmp_path):
    controls = [(1, 0, 64, 127), (1, 4, 64, 0)]
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 72, 80)], [(0, 1, 40, 80)]], controls=controls)
    assert piano_notes(path) == [(0, 4, 40), (0, 4, 72)]


def test_key_struck_again_under_the_pedal_ends_the_note_before(tmp_path):
    controls = [(0, 0, 64, 127), (0, 4, 64, 0)]
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (2, 1, 60, 80)]], controls=controls)
    assert piano_notes(path) == [(0, 2, 60), (2, 4, 60)]


def test_unison_of_two_hands_is_one_note_of_the_longer_length(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80)], [(0, 3, 60, 50)]])
    assert piano_notes(path) == [(0, 3, 60)]


def test_overlapping_notes_of_one_key_do_not_overlap(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 4, 60, 80), (5, 1, 62, 80)], [(1, 1, 60, 50)]])
    assert piano_notes(path) == [(0, 1, 60), (1, 2, 60), (5, 6, 62)]


def test_notes_survive_encode_and_decode_within_the_grid(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    notes = [
        (i * 0.37 + rng.random() * 0.1, 0.2 + rng.random(), int(rng.integers(21, 109)), int(rng.integers(1, 128)))
        for i in range(200)
    ]
    path = write_midi(tmp_path / "a.mid", [notes])
    before = pg.read_piano(path.read_bytes(), True)
    after = pg.decode_ids(encode(path).ids.tolist(), tokenizer)
    assert after.note_num() == before.note_num() == 200
    a = sorted((n.pitch, n.time / before.tpq, n.duration / before.tpq, n.velocity) for n in before.tracks[0].notes)
    b = sorted((n.pitch, n.time / after.tpq, n.duration / after.tpq, n.velocity) for n in after.tracks[0].notes)
    for (pitch, start, length, loud), (pitch_2, start_2, length_2, loud_2) in zip(a, b):
        assert pitch == pitch_2
        assert abs(start - start_2) <= 1 / 16 + 1e-3  # half a step of the grid of 8 a beat
        assert abs(length - length_2) <= 1 / 8 + 1e-3  # lengths are at least one step
        assert abs(loud - loud_2) <= 4  # 32 levels of 128


def test_metre_and_tempo_survive_encode_and_decode(tmp_path, tokenizer):
    path = write_midi(tmp_path / "a.mid", scale(), metre=(6, 8), bpm=120)
    score = pg.decode_ids(encode(path).ids.tolist(), tokenizer)
    assert [(t.numerator, t.denominator) for t in score.time_signatures] == [(6, 8)]
    assert [round(t.qpm, 2) for t in score.tempos] == [120.0]


def test_tempo_grid_contains_120_and_no_id_is_dead(tokenizer):
    vocabulary = pg.make_vocabulary(tokenizer)
    assert "Tempo_120.0" in vocabulary and "Pitch_21" in vocabulary and "Pitch_108" in vocabulary
    kinds = {word.split("_")[0] for word in vocabulary}
    assert kinds == {
        "PAD",
        "BOS",
        "EOS",
        "Bar",
        "TimeSig",
        "Position",
        "Tempo",
        "Chord",
        "Pitch",
        "Velocity",
        "Duration",
    }
    assert "Pitch_109" not in vocabulary


def test_grid_velocities_and_chords_are_settings():
    small = pg.make_vocabulary(pg.make_tokenizer(pg.MusicConfig(grid=4, velocities=8, chords=0)))
    assert sum(w.startswith("Velocity") for w in small) == 8
    assert sum(w.startswith("Position") for w in small) == 4 * 12
    assert not any(w.startswith("Chord") for w in small)


def test_chord_is_named_where_three_notes_make_one(tmp_path, tokenizer):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (0, 1, 64, 80), (0, 1, 67, 80)]])
    assert tokenizer.vocab["Chord_maj"] in encode(path).ids


def test_what_tokens_cannot_say_is_counted(tmp_path):
    notes = [(0, 1, 60, 80), (0.03, 1, 60, 80), (4, 1, 110, 80), (8, 20, 50, 80)]
    path = write_midi(tmp_path / "a.mid", [notes], metre=(65, 4))
    assert list(encode(path).changes.values()) == [1, 1, 1, 1]


def test_file_of_midi_names_is_found_in_any_case_and_depth(tmp_path):
    for name in ("a.mid", "b.MIDI", "deep/er/c.Mid", "._d.mid", ".hidden/e.mid", "f.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in pg.find_midi_files(tmp_path)] == [
        "a.mid",
        "b.MIDI",
        "deep/er/c.Mid",
    ]


def test_real_pieces_keep_the_grammar(tmp_path, tokenizer):
    grammar = pg.make_grammar(tokenizer)
    state = grammar.start
    for id in [*encode(write_midi(tmp_path / "a.mid", scale(), metre=(3, 4))).ids, grammar.eos]:
        assert grammar.rows[state, id].sum() == 0, pg.make_vocabulary(tokenizer)[id]
        state = np.where(grammar.update[id] < 0, state, grammar.update[id])


@pytest.mark.parametrize(
    "words",
    [
        "Bar_None Position_0",  # a bar begins with its metre
        "Bar_None TimeSig_3/4 Position_24",  # a position outside of the bar
        "Bar_None TimeSig_4/4 Position_8 Tempo_120.0 Position_8",  # time that stands still
        "Bar_None TimeSig_4/4 Position_0 Pitch_60 Duration_1.0.8",  # a note without a velocity
        "Bar_None TimeSig_4/4 Position_0 Pitch_60 Velocity_63 Duration_1.0.8 Pitch_60",  # a key struck twice
        "Bar_None TimeSig_4/4 Position_0 Pitch_60 EOS_None",  # a piece that ends within a note
    ],
)
def test_broken_music_is_against_the_grammar(words, tokenizer):
    grammar = pg.make_grammar(tokenizer)
    state, *ids = grammar.start, *(tokenizer.vocab[w] for w in words.split())
    for n, id in enumerate(ids):
        legal = grammar.rows[state, id].sum() == 0
        assert legal == (n < len(ids) - 1)
        state = np.where(grammar.update[id] < 0, state, grammar.update[id])


def test_sample_never_overwrites_a_file(tmp_path):
    paths = [pg.free_path(tmp_path / "ö ü", "sample", ".mid") for _ in range(3)]
    assert [p.name for p in paths] == ["sample-001.mid", "sample-002.mid", "sample-003.mid"]


def test_damaged_midi_is_reported_not_raised(tmp_path):
    good = write_midi(tmp_path / "a.mid", scale()).read_bytes()
    for number, data in enumerate((b"", b"<html>", good[:40], good[:12] + b"\0\0" + good[14:])):
        path = tmp_path / f"bad{number}.mid"
        path.write_bytes(data)
        assert encode(path).problem, path


def test_piece_longer_than_a_day_is_refused(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (2 * 60 * 60 * 25, 1, 60, 80)]])
    assert Score(path).end() > 0 and encode(path).problem == "longer than a day"


def prompt_ids(path, tokenizer, **sample):
    """The ids of a prompt with the default reading."""
    return pg.read_prompt(pg.SampleConfig(prompt=str(path), **sample), tokenizer, pg.MusicConfig())


def quarters(score):
    """(start, end, pitch) of every note, in quarters."""
    return [(n.time / score.tpq, (n.time + n.duration) / score.tpq, n.pitch) for t in score.tracks for n in t.notes]


def test_prompt_is_cut_on_a_bar_line_and_a_note_across_it_ends_there(tmp_path, tokenizer):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (5, 6, 64, 80), (9, 1, 67, 80)]], metre=(3, 4))
    ids = prompt_ids(path, tokenizer, prompt_bars=2)
    assert quarters(pg.decode_ids(ids, tokenizer)) == [(0, 1, 60), (5, 6, 64)]
    assert ids.count(tokenizer.vocab["Bar_None"]) == 2
    assert quarters(pg.decode_ids(prompt_ids(path, tokenizer), tokenizer)) == [(0, 1, 60), (5, 11, 64), (9, 10, 67)]


def test_prompt_seconds_end_at_the_last_bar_line_before_them(tmp_path, tokenizer):
    path = write_midi(tmp_path / "a.mid", scale(bars=8), bpm=60)  # a bar is 4 seconds
    for seconds, bars in ((1, 1), (4, 1), (7.9, 1), (8, 2), (32, 8)):
        assert prompt_ids(path, tokenizer, prompt_seconds=seconds).count(tokenizer.vocab["Bar_None"]) == bars


def test_prompt_that_ends_in_silence_keeps_its_bars(tmp_path, tokenizer):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 80), (20, 1, 62, 80)]])
    assert prompt_ids(path, tokenizer, prompt_bars=4).count(tokenizer.vocab["Bar_None"]) == 4


def test_prompt_is_read_as_any_piece_is(tmp_path, tokenizer):
    tracks = [[(0, 1, 72, 80)], [(0, 1, 40, 80)], [(0, 1, 38, 90)]]
    path = write_midi(tmp_path / "a.mid", tracks, drums=[2], controls=[(0, 0, 64, 127), (0, 4, 64, 0)])
    assert quarters(pg.decode_ids(prompt_ids(path, tokenizer), tokenizer)) == [(0, 4, 40), (0, 4, 72)]


@pytest.mark.parametrize("sample", [{"prompt_bars": 9}, {"prompt_seconds": 99.0}])
def test_prompt_shorter_than_asked_for_is_a_sentence(sample, tmp_path, tokenizer):
    with pytest.raises(pg.UserError, match="is only 8 bars, 16.0 seconds long"):
        prompt_ids(write_midi(tmp_path / "a.mid", scale(bars=8)), tokenizer, **sample)


def test_prompt_without_music_is_a_sentence(tmp_path, tokenizer):
    (tmp_path / "page.mid").write_text("<html>")
    write_midi(tmp_path / "late.mid", [[(20, 1, 60, 80)]])
    for name, sentence, sample in (
        ("none", "no MIDI file", {}),
        ("page", "cannot be continued", {}),
        ("late", "hold no notes", {"prompt_bars": 2}),
    ):
        with pytest.raises(pg.UserError, match=sentence):
            prompt_ids(tmp_path / f"{name}.mid", tokenizer, **sample)


def feed(words, tokenizer, **limits):
    """A clock that has heard these tokens."""
    return pg.BarClock(tokenizer, **limits).feed([tokenizer.vocab[word] for word in words.split()])


def test_clock_knows_bar_lines_under_changing_metre_and_tempo(tokenizer):
    words = (
        "Bar_None TimeSig_4/4 Position_0 Tempo_60.0 Bar_None TimeSig_6/8 Position_24 Tempo_120.0 Bar_None TimeSig_2/4"
    )
    clock = feed(words, tokenizer)
    clock.end()
    assert [(q, s) for _, q, s in clock.lines] == [(0, 0), (4, 4), (7, 4 + 1.5 + 0.75)]
    assert (clock.now, clock.seconds) == (9, 7.25) and clock.kept == 10


def test_clock_ends_a_piece_at_eos_at_its_bars_or_at_its_seconds(tokenizer):
    bar = "Bar_None TimeSig_4/4 Position_0 Tempo_120.0"
    assert feed(f"{bar} EOS_None PAD_None", tokenizer).kept == 4
    assert feed(" ".join([bar] * 5), tokenizer, bars=2).kept == 8
    assert feed(" ".join([bar] * 5), tokenizer, seconds=3.0).kept == 8  # a bar is 2 seconds: the line after 3 is at 4
    assert feed(" ".join([bar] * 9), tokenizer, seconds=7.0, tempo=240).kept == 28
    assert not feed(" ".join([bar] * 2), tokenizer, bars=2).over


def test_no_note_hangs_past_the_last_bar(tokenizer):
    words = "Bar_None TimeSig_4/4 Position_24 Tempo_120.0 Pitch_60 Velocity_67 Duration_4.0.4"
    assert quarters(pg.decode_ids([tokenizer.vocab[w] for w in words.split()], tokenizer)) == [(3, 4, 60)]


def test_figures_of_a_piece_are_what_one_counts_by_hand(tmp_path, tokenizer):
    notes = [(0, 2, 60, 60), (0, 2, 64, 80), (4, 1, 72, 100), (12, 2, 60, 60), (12, 2, 64, 80), (15, 1, 60, 60)]
    ids = encode(write_midi(tmp_path / "a.mid", [notes], bpm=60)).ids.tolist()
    figures = pg.describe(pg.decode_ids(ids, tokenizer), ids, pg.make_grammar(tokenizer))
    assert figures["notes_per_second"] == pytest.approx(6 / 16) and (figures["lowest"], figures["highest"]) == (60, 72)
    assert figures["polyphony"] == pytest.approx(10 / 6) and figures["silence_percent"] == pytest.approx(100 * 10 / 16)
    assert figures["length_mean_seconds"] == pytest.approx(10 / 6) and figures["empty_bars_percent"] == 25
    p = np.array([4, 2]) / 6
    assert figures["pitch_class_entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())


def test_repeated_bars_are_counted(tmp_path, tokenizer):
    notes = [(bar * 4, 1, 60 + (bar == 1), 80) for bar in range(4)]
    ids = encode(write_midi(tmp_path / "a.mid", [notes])).ids.tolist()
    figures = pg.describe(pg.decode_ids(ids, tokenizer), ids, pg.make_grammar(tokenizer))
    assert figures["repeated_bars_percent"] == 25  # the fourth; the first also holds the tempo


def longest_by_hand(mine, theirs):
    """The longest common run of intervals, in notes, by trying everything."""
    a, b = list(np.diff(mine)), list(np.diff(theirs))
    runs = [
        n
        for n in range(1, len(a) + 1)
        for i in range(len(a) - n + 1)
        for j in range(len(b) - n + 1)
        if a[i : i + n] == b[j : j + n]
    ]
    return max(runs) + 1 if runs else 0


def test_longest_known_run_is_exact_whatever_the_key():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pieces = {str(i): rng.integers(60, 64, size=30).astype(np.int16) for i in range(4)}
        mine = rng.integers(70, 74, size=20).astype(np.int16)
        notes, name = pg.KnownRuns(pieces).longest(mine)
        by_hand = {n: longest_by_hand(mine, p) for n, p in pieces.items()}
        assert notes == max(by_hand.values()) == by_hand[name]


def test_copied_passage_is_found_with_its_file_and_does_not_run_across_pieces():
    rng = np.random.default_rng(1)
    pieces = {str(i): rng.integers(30, 90, size=500).astype(np.int16) for i in range(5)}
    known = pg.KnownRuns(pieces)
    assert known.longest(np.r_[10, 90, pieces["3"][100:140] + 5, 20]) == (40, "3")
    assert known.longest(np.r_[pieces["1"][-20:], pieces["2"][:15]]) == (20, "1")
    assert known.longest(np.array([60], np.int16)) == (0, "")


def two_notes(tmp_path, tokenizer):
    """A piece with an A4 from 0 to 1 s and an A5 from 4 to 5 s, in two bars of 2 s and one of 1 s."""
    path = write_midi(tmp_path / "two.mid", [[(0, 2, 69, 100), (8, 2, 81, 100)]])
    return pg.decode_ids(pg.encode_file(path, tokenizer, pg.MusicConfig()).ids.tolist(), tokenizer)


def test_sound_is_where_the_notes_are_and_at_their_pitch(tmp_path, tokenizer, soundfont):
    pytest.importorskip("tinysoundfont")
    pg.write_wav(tmp_path / "two.wav", two_notes(tmp_path, tokenizer), soundfont)
    with wave.open(str(tmp_path / "two.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 44_100)
        assert file.getnframes() == 7 * 44_100, "five seconds of music and two to ring out"
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).mean(1)
    loud = np.sqrt((sound.reshape(-1, 4410) ** 2).mean(1))  # of each tenth of a second
    assert loud[1:9].min() > 5000 and loud[41:49].min() > 5000 and loud[20:39].max() < 50
    assert 30_000 < np.abs(sound).max() <= 32_000
    for start, hertz in ((0.25, 440), (4.25, 880)):
        part = sound[round(start * 44_100) :][:22_050]
        assert abs(np.abs(np.fft.rfft(part))[1:].argmax() * 2 + 2 - hertz) <= 4


def test_soundfont_is_the_one_asked_for_or_found_or_a_sentence(tmp_path, soundfont, monkeypatch):
    assert pg.find_soundfont(str(soundfont)) == soundfont
    monkeypatch.setattr(pg, "SOUNDFONTS", (str(tmp_path / "nowhere"), str(tmp_path)))
    assert pg.find_soundfont("") == soundfont
    with pytest.raises(pg.Unusable, match="pass another --soundfont"):
        pg.find_soundfont(str(tmp_path / "none.sf2"))
    monkeypatch.setattr(pg, "SOUNDFONTS", ())
    monkeypatch.setattr(
        pg.symusic, "BuiltInSF3", SimpleNamespace(MuseScoreGeneral=lambda: SimpleNamespace(path=no_network))
    )
    with pytest.raises(pg.Unusable, match="none could be downloaded"):
        pg.find_soundfont("")


def no_network(download):
    """A download without a network."""
    raise urllib.error.URLError("no network")


def test_file_that_is_no_soundfont_is_a_sentence(tmp_path, tokenizer):
    pytest.importorskip("tinysoundfont")
    (tmp_path / "no.sf2").write_bytes(b"RIFF no soundfont")
    with pytest.raises(pg.Unusable, match="no soundfont that can be read"):
        pg.write_wav(tmp_path / "two.wav", two_notes(tmp_path, tokenizer), tmp_path / "no.sf2")


def test_piano_roll_shows_notes_where_they_are_and_the_prompt_in_its_colour(tmp_path, tokenizer):
    image = pytest.importorskip("matplotlib.image")
    pg.draw_piano_roll(tmp_path / "two.png", two_notes(tmp_path, tokenizer), [0, 2, 4], prompt_seconds=2)
    picture = image.imread(tmp_path / "two.png")[:, :, :3]
    orange = (picture[..., 0] > picture[..., 2] + 0.3).nonzero()
    blue = (picture[..., 2] > picture[..., 0] + 0.3).nonzero()
    legend = 0.9 * len(picture)
    inside = [(rows[rows < legend], columns[rows < legend]) for rows, columns in (orange, blue)]
    assert inside[0][1].max() < inside[1][1].min(), "the prompt comes first"
    assert inside[0][0].mean() > inside[1][0].mean(), "and its note is the lower one"


def test_loss_picture_is_drawn_with_and_without_validation(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": 10 * i, "train_loss": 3 / i, "val_loss": 4 / i} for i in range(1, 5)]
    pg.draw_losses(tmp_path / "both.png", rows)
    pg.draw_losses(tmp_path / "one.png", [row | {"val_loss": None} for row in rows])
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("both", "one")]
    assert sizes[0] > sizes[1] > 5000
