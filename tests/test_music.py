"""Music: a MIDI file becomes tokens, what each token says, and tokens become a MIDI file."""

import collections
import copy
import functools
import re

import numpy as np
import pytest
from conftest import notes_of, pg, read_piano, scale, write_midi
from symusic import Note, Score, Tempo, TimeSignature, Track

SETTINGS = [pg.TokenSettings(24, 32), pg.TokenSettings(4, 8), pg.TokenSettings(12, 64)]
VOCABULARIES = [pg.Vocabulary(settings) for settings in SETTINGS]
EVERY_GRID = pytest.mark.parametrize("vocab", VOCABULARIES, ids=["grid 24", "grid 4", "grid 12"])
Kind = pg.Kind


def read(path, vocab):
    """A file as a piece."""
    return pg.read_piece(path.read_bytes(), vocab)


def ids_of(words, vocab):
    """The ids of BOS and of words."""
    return np.array([vocab.bos_id, *(vocab.id_of[word] for word in words.split())])


def words_of(ids, vocab):
    """Words with spaces between them."""
    return " ".join(vocab.words[i] for i in ids)


def random_walk(vocab, length):
    """Ids drawn from the legal ones, each kind as likely; which ids were ever legal."""
    rng = np.random.default_rng(0)
    ids = [vocab.bos_id]
    state = vocab.advance(None, np.array(ids))
    ever_legal = np.zeros(len(vocab.words), bool)
    while len(ids) < length:
        [legal] = vocab.legal(state)
        ever_legal |= legal
        legal[vocab.eos_id] = False
        choices = np.flatnonzero(legal)
        kinds = vocab.says.kind[choices]
        ids.append(rng.choice(choices[kinds == rng.choice(np.unique(kinds))]))
        state = vocab.advance(state, np.array(ids[-1:]))
    return np.array(ids), ever_legal


@functools.cache
def strict(vocab):
    """The tokenizer of a vocabulary, to which duplicated notes are errors."""
    tokenizer = copy.deepcopy(vocab.tokenizer)
    tokenizer.config.remove_duplicated_notes = True
    return tokenizer


def assert_grammar(ids, vocab):
    """MidiTok finds no error in ids, nor a key struck twice; no Position is outside its bar."""
    assert strict(vocab).tokens_errors([ids.tolist()]) == [0.0]
    for bar in words_of(ids, vocab).split("TimeSig_")[1:]:
        positions = [int(position) for position in re.findall(r"Position_(\d+)", bar)]
        assert all(position < int(bar.split("/")[0]) * vocab.grid for position in positions), bar


def are_legal(ids, vocab):
    """Whether each of ids, but BOS, may follow those before it."""
    legal = vocab.legal(vocab.trace(ids[:-1]))
    return legal[np.arange(len(ids) - 1), ids[1:]].tolist()


def pedal(track=0, down=0, up=4, number=64):
    """The options of write_midi for a pedal that is down for a time."""
    return {"controls": [(track, down, number, 127), (track, up, number, 0)]}


def notes_in(text):
    """(start, end, pitch) of notes that are written as start-end:pitch, in quarters."""
    numbers = re.findall(r"([\d.]+)-([\d.]+):(\d+)", text)
    return sorted((float(start), float(end), int(pitch)) for start, end, pitch in numbers)


def tracks_in(text):
    """Tracks of such notes for write_midi; a | separates two tracks."""
    tracks = []
    for part in text.split("|"):
        tracks.append([(start, end - start, pitch, 80) for start, end, pitch in notes_in(part)])
    return tracks


NEVER_LIFTED = {"controls": [(0, 0, 64, 127)]}
READ = {  # the tracks, what else is in the file, the notes that are read
    "two tracks keep both hands": ("0-1:72 | 0-2:40", {}, "0-1:72 0-2:40"),
    "a drum track is dropped": ("0-1:38 | 1-2:60", {"drums": [0]}, "1-2:60"),
    "the pedal holds notes": ("0-1:60 4-5:62", pedal(0, 0.5, 3), "0-3:60 4-5:62"),
    "another channel has it": ("0-1:72 | 0-1:40", pedal(1), "0-1:72 0-4:40"),
    "it goes down as a note ends": ("0-1:60 0-1.01:64", pedal(0, 1), "0-1:60 0-4:64"),
    "it may stay down at the end": ("0-1:60 8-9:62", NEVER_LIFTED, "0-9:60 8-9:62"),
    "it is never lifted": ("0-1:60 16-17:62", NEVER_LIFTED, "0-1:60 16-17:62"),
    "no pianist holds it so long": ("30-31:60 60-61:62", pedal(0, 0, 49), "30-31:60 60-61:62"),
    "a pianist may hold it so long": ("30-31:60 60-61:62", pedal(0, 0, 48), "30-48:60 60-61:62"),
    "the left pedal holds nothing": ("0-1:60", pedal(number=67), "0-1:60"),
    "a key struck again ends the note": ("0-1:60 2-3:60", pedal(), "0-2:60 2-4:60"),
    "a unison has the longer length": ("0-1:60 | 0-3:60", {}, "0-3:60"),
    "notes of one key do not overlap": ("0-4:60 5-6:62 | 1-2:60", {}, "0-1:60 1-2:60 5-6:62"),
}


@pytest.mark.parametrize("tracks, more, notes", READ.values(), ids=READ)
def test_file_is_read_as_one_piano(tracks, more, notes, tmp_path):
    piano = read_piano(write_midi(tmp_path / "a.mid", tracks_in(tracks), **more))
    assert notes_of(piano) == notes_in(notes)
    assert {n.velocity for n in piano.tracks[0].notes} == {80}


def test_of_notes_struck_together_the_loudest_velocity_and_the_longest_length_survive(tmp_path):
    tracks = [[(0, 1, 60, 90), (2, 2, 60, 30)], [(0, 3, 60, 50), (2, 1, 60, 70)]]
    piano = read_piano(write_midi(tmp_path / "a.mid", tracks))
    found = [(n.time, n.duration, n.velocity) for n in piano.tracks[0].notes]
    assert found == [(0, 960, 90), (960, 960, 70)]


PROBLEMS = {  # the tracks, which of them are drums
    "only drums": ("0-1:38", [0]),
    "no notes": ("", []),
    "no notes within the range of a piano": ("0-1:10", []),
    "longer than a day, or 86,400 quarter notes": ("0-1:60 180000-180001:60", []),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_file_without_usable_music_says_why(problem, tmp_path, vocab):
    tracks, drums = PROBLEMS[problem]
    path = write_midi(tmp_path / "a.mid", tracks_in(tracks), drums=drums)
    with pytest.raises(pg.UserError, match=f"^{problem}$"):
        read(path, vocab)


@EVERY_GRID
def test_notes_survive_encode_and_decode_within_the_grid(vocab, tmp_path):
    rng = np.random.default_rng(0)
    notes = []
    for i in range(200):
        start, length = i * 0.37 + rng.random() * 0.1, 0.2 + rng.random()
        notes.append((start, length, int(rng.integers(21, 109)), int(rng.integers(1, 128))))
    path = write_midi(tmp_path / "a.mid", [notes])
    before = read_piano(path)
    piece = read(path, vocab)
    after = vocab.decode(piece.ids)
    assert piece.notes == before.note_num() == after.note_num() == 200
    assert piece.seconds == pytest.approx(before.to("second").end())
    rows = []
    for score in (before, after):
        tpq = score.tpq
        found = [
            (n.pitch, n.time / tpq, n.duration / tpq, n.velocity) for n in score.tracks[0].notes
        ]
        rows.append(sorted(found))
    moved = np.abs(np.subtract(*rows))
    # Starts move by half a position, lengths are at least one, loudness moves by one level.
    levels = len(vocab.tokenizer.velocities)
    assert (moved <= np.array([0, 0.5 / vocab.grid, 1 / vocab.grid, 128 / levels]) + 1e-3).all()
    assert all(are_legal(piece.ids, vocab))


METRES = [(4, 4), (3, 4), (6, 8), (9, 8), (12, 8), (2, 2), (3, 2), (6, 2), (2, 1), (6, 16)]
STEPS = {"16ths": 1 / 4, "32nds": 1 / 8, "triplets": 1 / 3, "16th triplets": 1 / 6}


@pytest.mark.parametrize("metre", METRES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_rhythms_come_back_exactly(step, metre, tmp_path, vocab):
    notes = [(i * step, step, 40 + i % 48, 80) for i in range(round(24 / step))]
    path = write_midi(tmp_path / "a.mid", [notes], metre=metre)
    piece = read(path, vocab)
    back = vocab.decode(piece.ids)
    assert notes_of(back) == notes_of(Score(path))
    assert not any(piece.changes.values())
    [signature] = back.time_signatures
    assert signature.numerator / signature.denominator == metre[0] / metre[1]


def test_every_tempo_comes_back_within_one_percent_and_120_as_it_is(tmp_path, vocab):
    for bpm in (*np.geomspace(20, 300, 40), 120.0):
        piece = read(write_midi(tmp_path / "a.mid", scale(bars=1), bpm=bpm), vocab)
        [tempo] = vocab.decode(piece.ids).tempos
        assert tempo.qpm == pytest.approx(bpm, rel=0.01 if bpm != 120 else 0)


def test_last_notes_ring_on_where_a_piece_ends_and_are_cut_where_it_is(vocab):
    ids = ids_of(
        "Bar_None TimeSig_4/4 Position_72 Tempo_120.0 Pitch_60 Velocity_67 Duration_4.0.12", vocab
    )
    assert notes_of(vocab.decode(ids)) == [(3, 4, 60)]
    assert notes_of(vocab.decode(np.append(ids, vocab.eos_id))) == [(3, 7, 60)]


def test_vocabulary_is_that_of_one_piano_and_of_its_settings():
    for vocab, settings in zip(VOCABULARIES, SETTINGS, strict=True):
        assert {"Tempo_120.0", "Pitch_21", "Pitch_108"} <= {*vocab.words}
        kinds = [word.split("_")[0] for word in vocab.words]
        positions = 12 * settings.grid
        number = collections.Counter(kinds)
        assert (number["Pitch"], number["Chord"]) == (88, len(pg.CHORD_SYMBOLS) + 1)
        assert (number["Position"], number["Velocity"]) == (positions, settings.velocities)
        assert [pg.Kind[kind.upper()] for kind in kinds] == vocab.says.kind.tolist()
        assert vocab.words[pg.PAD] == "PAD_None"
        assert vocab.says.pitch[vocab.pitch_ids].tolist() == [*range(21, 109)]
        assert vocab.says.position[vocab.position_ids].tolist() == [*range(positions)]
        assert {*kinds[vocab.chord_ids]} == {"Chord"}
        assert vocab.words[vocab.rooted_chord_ids.stop] == "Chord_none"


def test_what_tokens_cannot_say_is_counted(tmp_path, vocab):
    notes = [(0, 1, 60, 80), (0.01, 1, 60, 80), (2, 1, 62, 80), (2, 2, 62, 80)]
    notes += [(4, 1, 110, 80), (8, 30, 50, 80)]
    path = write_midi(tmp_path / "a.mid", [notes], controls=[(0, 3, 64, 127)])  # never lifted
    score = Score(path)
    tempos = [(0, 120.0), (960, 12.0), (1920, 20.0), (2880, 300.0), (3840, 320.0)]
    score.tempos = [Tempo(*tempo) for tempo in tempos]
    metres = [(0, 65, 4), (1920, 3, 4), (2890, 2, 4), (4800, 4, 4), (6720, 4, 4)]
    score.time_signatures = [TimeSignature(*metre) for metre in metres]
    score.dump_midi(path)
    piece = read(path, vocab)
    assert piece.changes == {
        "tracks read beyond the number in the header": 0,
        "simultaneous notes on one key merged": 1,
        "implausibly long pedals ignored": 1,
        "notes outside the piano's range dropped": 1,
        "notes longer than 24 quarter notes shortened": 1,
        "tempos outside 20 to 300 changed": 2,
        "time signatures split into shorter bars": 1,
        "time signatures rounded to 16th notes": 1,
        "repeated notes in one grid position merged": 1,
        "empty bars cut from long silences": 0,
    }
    assert piece.notes == 3
    assert not any(read(write_midi(tmp_path / "b.mid", scale()), vocab).changes.values())


@EVERY_GRID
def test_random_walk_over_legal_ids_keeps_the_grammar_and_every_word_gets_its_turn(vocab):
    ids, ever_legal = random_walk(vocab, 2000)
    assert_grammar(ids[1:], vocab)
    assert all(are_legal(ids, vocab))
    assert words_of(np.flatnonzero(~ever_legal), vocab) == "PAD_None BOS_None Fill_None"


@EVERY_GRID
def test_state_token_by_token_equals_that_of_the_whole_piece_at_once(vocab, tmp_path):
    walk, _ = random_walk(vocab, 1000)
    piece = read(write_midi(tmp_path / "a.mid", scale(bars=32), metre=(6, 8)), vocab)
    both = np.stack([walk, piece.ids[:1000]])
    whole = np.stack([vocab.trace(ids) for ids in both], axis=1)  # (numbers, 2, T)
    is_bar = pg.State(*whole).kind == Kind.BAR
    assert not pg.State(*whole).chord[is_bar].any() and not pg.State(*whole).position[is_bar].any()
    state = None
    for t, ids in enumerate(both.T):
        state = vocab.advance(state, ids)
        assert np.array_equal(state, whole[:, :, t]), words_of(ids, vocab)


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8)])
@pytest.mark.parametrize("grid", [8, 24])
def test_tokens_stand_where_miditok_plays_them(metre, grid, tmp_path):
    vocab = pg.Vocabulary(pg.TokenSettings(grid=grid))
    piece = read(write_midi(tmp_path / "a.mid", scale(1), metre=metre), vocab)
    score = vocab.tokenizer.decode([piece.ids.tolist()])
    is_note = vocab.says.kind[piece.ids] == Kind.PITCH
    # What is before the first bar line counts as a bar of 4/4.
    times = piece.time[is_note] - 4 * grid
    notes = score.tracks[0].notes
    assert len(notes) == 80
    assert times.tolist() == [n.time / score.tpq * grid * metre[1] / 4 for n in notes]
    assert piece.pitch[is_note].tolist() == [n.pitch for n in notes]


def test_tokens_say_what_the_table_at_the_top_of_the_script_says(vocab):
    rows = re.findall(r"^    (\S+) +(\d+) +(\d+) +(\d+)\b", pg.__doc__, re.MULTILINE)
    assert len(rows) == 17
    words = [word if "_" in word else f"{word}_None" for word, *_ in rows]
    ids = np.array([vocab.id_of[word] for word in words])
    state = vocab.trace(ids)
    found = np.stack([ids, state.time, state.pitch], axis=1)
    assert found.tolist() == [[int(n) for n in numbers] for _, *numbers in rows]


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (2, 2)])
def test_each_chord_is_said_where_it_begins_and_in_each_bar(metre, tmp_path, vocab):
    bar = 4 * metre[0] / metre[1]  # quarter notes
    notes = []
    for half, root in enumerate([0, 0, 0, 0, 5, 5, 7, 7, 9, 9, 9, 9]):  # C, F, G, A in half bars
        for above in (0, 16, 31):
            notes.append((half * bar / 2, bar / 2, 48 + root + above, 80))
    later = []
    for hand in scale():
        later.append([(start + 6 * bar, *note) for start, *note in hand])
    piece = read(write_midi(tmp_path / "a.mid", [notes, *later], metre=metre), vocab)
    bars = words_of(piece.ids, vocab).split("Bar_None")[1:7]
    chords = [re.findall(r"Chord_(\S+)", text) for text in bars]
    assert chords == [["C:maj"], ["C:maj"], ["F:maj"], ["G:maj"], ["A:maj"], ["A:maj"]]
    changes = [(0, "C"), (2 * bar, "F"), (3 * bar, "G"), (4 * bar, "A")]
    assert vocab.chord_changes(piece.ids)[:4] == changes
    assert_grammar(piece.ids[1:-1], vocab)
    assert all(are_legal(piece.ids, vocab))


def chords_of(notes, beats=(0, 24)):
    """The symbols of the chords in the beats of (start, length, pitch), in 24ths of a quarter."""
    track = Track()
    for start, length, pitch in notes:
        track.notes.append(Note(start, length, pitch, 80))
    symbols = [*pg.CHORD_SYMBOLS, pg.NO_CHORD]
    return [symbols[i] for i in pg.find_chords(track, np.array(beats), 24)]


def chord_of(pitches):
    """The symbol of the chord that is found where these pitches sound for a quarter note."""
    [symbol] = chords_of([(0, 24, pitch) for pitch in pitches])
    return symbol


@pytest.mark.parametrize("quality", pg.CHORD_QUALITIES)
def test_triads_and_sevenths_are_found_in_every_key_and_inversion(quality):
    symbol, above = pg.CHORD_QUALITIES[quality]
    for root in range(12):
        for inversion in range(len(above)):
            pitches = [48 + root + step + 12 * (i < inversion) for i, step in enumerate(above)]
            # The inversions of an augmented triad have the same intervals.
            named = min(pitches) if quality == "aug" else root
            assert chord_of(pitches) == pg.ROOT_NAMES[named % 12] + symbol


def test_single_notes_clusters_and_what_changes_for_a_moment_are_no_chord_of_their_own():
    assert chord_of([60]) == chord_of([60, 61, 62]) == chord_of(range(60, 72)) == "N.C."
    notes = [(0, 96, 48), (0, 96, 52), (0, 96, 55), (0, 36, 72), (36, 6, 74), (42, 6, 77)]
    notes += [(48, 48, 76), (144, 24, 50)]
    found = chords_of(notes, range(0, 169, 24))
    assert found[:4] == ["C"] * 4 and found[6] == "N.C."


def test_chord_of_one_beat_is_a_chord_of_its_own():
    triads = {0: (48, 52, 55), 24: (45, 48, 52), 48: (43, 47, 50)}
    notes = []
    for start, pitches in triads.items():
        notes += [(start, 24, pitch) for pitch in pitches]
    assert chords_of(notes, range(0, 73, 24)) == ["C", "Am", "G"]


def test_note_that_passes_makes_no_seventh_and_one_that_stays_does():
    triad = [(0, 24, 48), (0, 24, 52), (0, 24, 55)]
    assert chords_of([*triad, (0, 6, 70)]) == ["C"]
    assert chords_of([*triad, (0, 24, 70)]) == ["C7"]


def test_chord_says_its_root_as_a_pitch(vocab):
    words = ("Chord_C:maj", "Chord_G:7dom", "Chord_B:min", "Chord_none")
    pitches = [vocab.says.pitch[vocab.id_of[word]] for word in words]
    assert pitches == [48, 55, 59, pg.SAYS_NOTHING]


def chord_names(text):
    """The chords of each bar, one for each twelfth of it."""
    bars, _ = pg.parse_chords(text)
    return [[pg.CHORD_SYMBOLS[i] for i in bar] for bar in bars]


def test_between_bar_lines_the_chords_share_a_bar():
    assert chord_names("| C Am | F G7 E |") == [
        ["C"] * 6 + ["Am"] * 6,
        ["F"] * 4 + ["G7"] * 4 + ["E"] * 4,
    ]
    assert chord_names("C | Am") == [["C"] * 12, ["Am"] * 12]


def test_chord_symbols_are_read_and_a_wrong_one_is_named():
    names = chord_names("C Am F#dim Bb7,Cmaj7 Bm7b5,E,Ebaug Dbm7 Cmaj7,Gm,Bdim,Cbm")
    assert names[:4] == [["C"] * 12, ["Am"] * 12, ["F#dim"] * 12, ["Bb7"] * 6 + ["Cmaj7"] * 6]
    assert names[4:6] == [["Bm7b5"] * 4 + ["E"] * 4 + ["Ebaug"] * 4, ["C#m7"] * 12]
    assert names[6] == ["Cmaj7"] * 3 + ["Gm"] * 3 + ["Bdim"] * 3 + ["Bm"] * 3
    assert chord_names("") == []
    for wrong in ("H", "C H7", "C/H", "Cmaj99", "Cx", "C,,G", "C,D,E,F,G", "#", "im"):
        with pytest.raises(pg.UserError, match="cannot read"):
            pg.parse_chords(wrong)
    for wrong in ("| C | | F |", "|", "| |"):
        with pytest.raises(pg.UserError, match="a bar is empty"):
            pg.parse_chords(wrong)


SPELLED = {  # as musicians write it: what it is; in what is not said
    "c am f g": "C Am F G", "Cmin C-": "Cm Cm", "CM7 CΔ": "Cmaj7 Cmaj7", "C♯m E♭": "C#m Eb",
    "C|Am": "C Am", "C - Am": "C Am", "| C | Am |": "C Am", "bb b": "Bb B",
    "B° Bo Cø": "Bdim Bdim Cm7b5", "C+": "Caug", "CM Cmaj": "C C", "|| C || F, G | ": "C F",
}  # fmt: skip
SIMPLER = {"Csus4": "C", "C6": "C", "C/E": "C", "C9": "C7", "Am7/G": "Am7", "Dm9": "Dm7",
           "C6/9": "C", "G13": "G7", "Bdim7": "Bdim"}  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_chord_symbols_are_read_as_musicians_write_them(text):
    assert [bar[0] for bar in chord_names(text)] == SPELLED[text].split()
    assert pg.parse_chords(text)[1] == []


@pytest.mark.parametrize("symbol", SIMPLER)
def test_chord_that_has_no_token_is_read_as_a_simpler_one_and_that_is_said(symbol):
    assert chord_names(symbol) == [[SIMPLER[symbol]] * 12]
    assert pg.parse_chords(f"{symbol} {symbol}")[1] == [f"{symbol} is read as {SIMPLER[symbol]}"]


NOTE = "Bar_None TimeSig_4/4 Position_0 Pitch_60 Velocity_63 Duration_1.0.24"
BROKEN = {  # the last word is against the grammar
    "music before the first bar": "TimeSig_4/4",
    "a bar without a time signature": "Bar_None Position_0",
    "a note without a Position": "Bar_None TimeSig_4/4 Pitch_60",
    "a Position outside its bar": "Bar_None TimeSig_3/4 Position_72",
    "time that stands still": "Bar_None TimeSig_4/4 Position_8 Tempo_120.0 Position_8",
    "the beginning of a bar, too late": "Bar_None TimeSig_4/4 Position_8 Tempo_120.0 Position_0",
    "the beginning of a bar, twice": "Bar_None TimeSig_4/4 Position_0 Tempo_120.0 Position_0",
    "no Velocity": "Bar_None TimeSig_4/4 Position_0 Pitch_60 Duration_1.0.24",
    "a key struck twice": f"{NOTE} Pitch_60",
    "a chord that goes down": f"{NOTE} Pitch_59",
    "an end within a note": "Bar_None TimeSig_4/4 Position_0 Pitch_60 EOS_None",
    "an empty bar at the end": "Bar_None TimeSig_4/4 EOS_None",
}


@pytest.mark.parametrize("words", BROKEN.values(), ids=BROKEN)
def test_broken_music_is_against_the_grammar(words, vocab):
    ids = ids_of(words, vocab)
    assert are_legal(ids, vocab) == [True] * (len(ids) - 2) + [False]


@EVERY_GRID
def test_bar_lines_and_tempos_lie_where_miditok_plays_them_under_changing_metre(vocab):
    rng = np.random.default_rng(0)
    metres = [word for word in vocab.words if word.startswith("TimeSig")]
    tempos = vocab.words[vocab.tempo_ids]
    bars = []
    for _ in range(60):  # a note on the bar line, and another tempo somewhere in the bar
        metre = rng.choice(metres)
        position = rng.integers(1, int(metre[8:].split("/")[0]) * vocab.grid)
        note = f"Pitch_60 Velocity_127 Duration_1.0.{vocab.grid}"
        tempo = f"Position_{position} {rng.choice(tempos)}"
        bars.append(f"Bar_None {metre} Position_0 {note} {tempo}")
    ids = ids_of(" ".join(bars), vocab)
    score = vocab.tokenizer.decode([ids.tolist()])
    starts, lines = vocab.bar_lines(ids)
    assert starts.tolist() == np.flatnonzero(ids == vocab.bar_id).tolist()
    played = [n.time / score.tpq for n in score.tracks[0].notes]
    assert lines[:-1] == pytest.approx(played, rel=1e-6) and len(lines) == 61
    of_miditok = [(t.time / score.tpq, round(t.qpm, 2)) for t in score.tempos[1:]]
    opening, *later = vocab.decode(ids).tempos
    assert (opening.time, opening.qpm) == (0, later[0].qpm), "a piece begins in its first tempo"
    ours = [(t.time / 480, round(t.qpm, 2)) for t in later]
    assert np.allclose(ours, of_miditok, rtol=0, atol=1 / 480)
    for bar in range(1, 60):
        _, some = vocab.bar_lines(ids[: starts[bar]])
        assert some.tolist() == lines[: bar + 1].tolist()


def read_prompt(path, vocab, **sample):
    """A prompt."""
    return pg.read_prompt(pg.SampleSettings(prompt=str(path), **sample), vocab)


THREE_FOUR = {"metre": (3, 4)}
CUT = "0-1:60 5-11:64 9-10:67"
DRUMS = {"drums": [1]} | pedal()
PROMPTS = {  # tracks, what else is in the file, what is asked for, the number of bars, the notes
    "it is cut on a bar line": (CUT, THREE_FOUR, {"prompt_bars": 2}, 2, "0-1:60 5-6:64"),
    "it is the whole piece": (CUT, THREE_FOUR, {}, 4, CUT),
    "its last bars are silent": ("0-1:60 20-21:62", {}, {"prompt_bars": 4}, 4, "0-1:60"),
    "it is shorter than the piece": ("0-1:60 28-32:62", {}, {"bars": 9}, 8, "0-1:60 28-32:62"),
    "it is read as any piece": ("0-1:72 | 0-1:38", DRUMS, {}, 1, "0-4:72"),
}


@pytest.mark.parametrize("tracks, more, sample, bars, notes", PROMPTS.values(), ids=PROMPTS)
def test_prompt_is_what_is_asked_for(tracks, more, sample, bars, notes, tmp_path, vocab):
    path = write_midi(tmp_path / "a.mid", tracks_in(tracks), **more)
    ids = read_prompt(path, vocab, **sample).ids
    assert (ids == vocab.bar_id).sum() == bars
    assert notes_of(vocab.decode(ids)) == notes_in(notes)
    assert all(are_legal(np.append(ids, vocab.bar_id), vocab))


REFUSED = {  # the file, what is asked for
    "none.mid cannot be continued .not a file": ("none", {}),
    "page.mid cannot be continued .not a MIDI file": ("page", {}),
    "the first 2 bars of .* hold no notes": ("late", {"prompt_bars": 2}),
    "has only 8 bars: ask for fewer": ("scale", {"prompt_bars": 9}),
    "the prompt alone has 8 bars: pass a larger --bars": ("scale", {"bars": 8}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_prompt_that_cannot_be_continued_as_asked_is_a_sentence(sentence, tmp_path, vocab):
    (tmp_path / "page.mid").write_text("<html>")
    write_midi(tmp_path / "late.mid", tracks_in("20-21:60"))
    write_midi(tmp_path / "scale.mid", scale(bars=8))
    name, sample = REFUSED[sentence]
    with pytest.raises(pg.UserError, match=sentence):
        read_prompt(tmp_path / f"{name}.mid", vocab, **sample)


KEYS = {  # the pitch class of the tonic, sharps
    "C major": (0, 0),
    "F# major": (6, 6),
    "Bb major": (10, -2),
    "A minor": (9, 0),
    "Eb minor": (3, -6),
    "C# minor": (1, 4),
}


@pytest.mark.parametrize("key", KEYS)
def test_key_is_found_and_spelled_as_musicians_do(key, tmp_path):
    tonic, sharps = KEYS[key]
    is_minor = "minor" in key
    steps = (0, 2, 3, 5, 7, 8, 11) if is_minor else (0, 2, 4, 5, 7, 9, 11)
    third = steps[2]
    melody = (0, third, 7, *steps, 7, third, 0)
    notes = [(i, 1, 60 + tonic + step, 80) for i, step in enumerate(melody)]
    signature, name = pg.find_key(Score(write_midi(tmp_path / "a.mid", [notes])))
    assert (name, signature.key, signature.tonality) == (key, sharps, int(is_minor))


def intervals(pitches):
    """The intervals between MIDI pitches."""
    vocab = VOCABULARIES[0]
    ids = np.array([vocab.id_of[f"Pitch_{pitch}"] for pitch in pitches], int)
    return pg.pitch_intervals(ids, vocab)


def longest_by_hand(mine, theirs):
    """How many notes in a row are the same in any key, by trying every number and place."""
    for n in range(len(mine), 1, -1):
        known = {tuple(np.diff(theirs[i : i + n])) for i in range(len(theirs) - n + 1)}
        if any(tuple(np.diff(mine[i : i + n])) in known for i in range(len(mine) - n + 1)):
            return n
    return 0


def test_longest_known_run_is_exact_whatever_the_key():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pieces = rng.integers(60, 64, size=(4, 30))
        mine = rng.integers(70, 74, size=20)
        corpus = b"".join(intervals(piece) for piece in pieces)
        notes, name = pg.longest_known_run(intervals(mine), [*"0123"], corpus)
        by_hand = [longest_by_hand(mine, piece) for piece in pieces]
        assert notes == max(by_hand) == by_hand[int(name)]


def test_copied_passage_is_found_with_its_file_and_does_not_run_across_pieces():
    music = np.random.default_rng(1).integers(30, 90, size=(5, 500))
    corpus = b"".join(intervals(piece) for piece in music)

    def known(mine):
        return pg.longest_known_run(intervals(mine), [*"01234"], corpus)

    assert known(np.r_[25, 90, music[3][100:140] + 5, 25]) == (40, "3")
    assert known(np.r_[music[1][-20:], music[2][:15]]) == (20, "1")
    assert known([60]) == known([]) == (0, "")
    assert pg.longest_known_run(intervals([60, 62, 64]), [], b"") == (0, "")
