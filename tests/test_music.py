"""Room 2: a MIDI file becomes ids and ids become a MIDI file."""

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
    notes = [(i * 0.37 + rng.random() * 0.1, 0.2 + rng.random(), int(rng.integers(21, 109)), int(rng.integers(1, 128))) for i in range(200)]
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
    assert kinds == {"PAD", "BOS", "EOS", "Bar", "TimeSig", "Position", "Tempo", "Chord", "Pitch", "Velocity", "Duration"}
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
    assert [p.relative_to(tmp_path).as_posix() for p in pg.find_midi_files(tmp_path)] == ["a.mid", "b.MIDI", "deep/er/c.Mid"]


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
