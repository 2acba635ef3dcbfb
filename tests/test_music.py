"""Music: a MIDI file becomes ids, and ids become a MIDI file."""

import collections
import copy
import functools
import re

import numpy as np
import pytest
import torch
from conftest import notes_of, pg, read_piano, scale, write_midi
from symusic import Note, Score, Tempo, TimeSignature, Track

VOCABULARIES = [pg.Vocabulary(pg.MusicConfig(*music)) for music in ((24, 32), (4, 8), (12, 64))]
EVERY_GRID = pytest.mark.parametrize("vocab", VOCABULARIES, ids=["grid 24", "grid 4", "grid 12"])


def pedal(track=0, down=0, up=4, number=64):
    """The options of write_midi for a pedal that is down for a time."""
    return {"controls": [(track, down, number, 127), (track, up, number, 0)]}


READ = {  # tracks, what else is in the file, the notes that are read
    "two tracks keep both hands": ([[(0, 1, 72, 80)], [(0, 2, 40, 60)]], {}, [(0, 1, 72), (0, 2, 40)]),
    "a drum track is dropped": ([[(0, 1, 38, 90)], [(1, 1, 60, 80)]], {"drums": [0]}, [(1, 2, 60)]),
    "the pedal holds notes": ([[(0, 1, 60, 80), (4, 1, 62, 80)]], pedal(0, 0.5, 3), [(0, 3, 60), (4, 5, 62)]),
    "one hand has the pedal": ([[(0, 1, 72, 80)], [(0, 1, 40, 80)]], pedal(1), [(0, 4, 40), (0, 4, 72)]),
    "another instrument's pedal holds nothing": (
        [[(0, 1, 72, 80)], [(0, 1, 40, 80)]], pedal(1) | {"programs": (0, 48)}, [(0, 1, 72), (0, 4, 40)]),
    "what ends as the pedal goes down is not held": (
        [[(0, 1, 60, 80), (0, 1.01, 64, 80)]], pedal(0, 1, 4), [(0, 1, 60), (0, 4, 64)]),
    "the pedals of two hands are one": ([[(0, 1, 60, 80)], [(0, 1, 64, 80)]], {"controls": [
        (0, 0, 64, 127), (1, 2, 64, 127), (0, 3, 64, 0), (1, 5, 64, 0)]}, [(0, 5, 60), (0, 5, 64)]),
    "a pedal may stay down at the end": (
        [[(0, 1, 60, 80), (8, 1, 62, 80)]], {"controls": [(0, 0, 64, 127)]}, [(0, 9, 60), (8, 9, 62)]),
    "a pedal that is never lifted holds nothing": (
        [[(0, 1, 60, 80), (16, 1, 62, 80)]], {"controls": [(0, 0, 64, 127)]}, [(0, 1, 60), (16, 17, 62)]),
    "a pedal that no pianist holds so long holds nothing": (
        [[(0, 1, 60, 80), (60, 1, 62, 80)]], pedal(0, 0, 49), [(0, 1, 60), (60, 61, 62)]),
    "the left pedal holds nothing": ([[(0, 1, 60, 80)]], pedal(number=67), [(0, 1, 60)]),
    "a key struck again ends the note": ([[(0, 1, 60, 80), (2, 1, 60, 80)]], pedal(), [(0, 2, 60), (2, 4, 60)]),
    "a unison is one note of the longer length": ([[(0, 1, 60, 50)], [(0, 3, 60, 80)]], {}, [(0, 3, 60)]),
    "notes of one key do not overlap": (
        [[(0, 4, 60, 80), (5, 1, 62, 80)], [(1, 1, 60, 50)]], {}, [(0, 1, 60), (1, 2, 60), (5, 6, 62)])}


def ids_of(words, vocab):
    """The ids of words."""
    return [vocab.words.index(word) for word in words.split()]


def random_walk(vocab, length):
    """Ids drawn from the legal ones, each kind as likely as the others, and whether each id was legal at some time."""
    rng, kinds, ids = torch.Generator().manual_seed(0), vocab.says[pg.KIND].long(), [vocab.bos]
    now, seen = pg.advance(vocab.says, torch.tensor([ids]), vocab.says[:, :1])[:, :, 0], torch.zeros(len(vocab.words)).bool()
    while len(ids) < length:
        legal = vocab.legal(now)[0]
        seen |= legal
        legal[vocab.eos] = False
        chance = legal / torch.bincount(kinds[legal], minlength=len(pg.KINDS))[kinds]
        drawn = torch.multinomial(chance.nan_to_num(), 1, generator=rng)
        now = pg.advance(vocab.says, drawn[None], now)[:, :, 0]
        ids.append(drawn.item())
    return ids, seen


@functools.cache
def strict(vocab):
    """The tokenizer of a vocabulary, to which duplicated notes are errors."""
    tokenizer = copy.deepcopy(vocab.tokenizer)
    tokenizer.config.remove_duplicated_notes = True
    return tokenizer


def assert_grammar(ids, vocab):
    """MidiTok finds no error in ids, nor a key struck twice at once; no Position is outside its bar."""
    assert strict(vocab).tokens_errors([ids]) == [0.0]
    for bar in " ".join(vocab.words[i] for i in ids).split("TimeSig_")[1:]:
        positions = [int(p) for p in re.findall(r"Position_(\d+)", bar)]
        assert all(p < int(bar.split("/")[0]) * vocab.music.grid for p in positions), bar


def are_legal(ids, vocab):
    """Whether each of ids may follow those before it, from BOS on."""
    ids = torch.tensor([vocab.bos, *ids])
    now = pg.advance(vocab.says, ids[None], vocab.says[:, :1])[:, 0]
    return vocab.legal(now)[range(len(ids) - 1), ids[1:]].tolist()


@pytest.mark.parametrize("tracks, more, notes", READ.values(), ids=READ)
def test_file_is_read_as_one_piano(tracks, more, notes, tmp_path):
    path = write_midi(tmp_path / "a.mid", tracks, **more)
    piano = read_piano(path)
    assert sorted(notes_of(piano)) == sorted(notes) and {n.velocity for n in piano.tracks[0].notes} <= {50, 60, 80}


def test_of_notes_struck_together_the_loudest_velocity_and_the_longest_length_survive(tmp_path):
    path = write_midi(tmp_path / "a.mid", [[(0, 1, 60, 90), (2, 2, 60, 30)], [(0, 3, 60, 50), (2, 1, 60, 70)]])
    found = [(n.time, n.duration, n.velocity) for n in read_piano(path).tracks[0].notes]
    assert found == [(0, 960, 90), (960, 960, 70)]


@pytest.mark.parametrize("tracks, drums, problem", [
    ([[(0, 1, 38, 90)]], [0], "only drums"), ([], [], "no notes"), ([[(0, 1, 10, 90)]], [], "no notes within the"),
    ([[(0, 1, 60, 80), (2 * 60 * 60 * 25, 1, 60, 80)]], [], "longer than a day")])
def test_file_without_usable_music_says_why(tracks, drums, problem, tmp_path, vocab):
    assert pg.read_piece(write_midi(tmp_path / "a.mid", tracks, drums=drums), vocab).problem.startswith(problem)


@EVERY_GRID
def test_notes_survive_encode_and_decode_within_the_grid(vocab, tmp_path):
    rng, grid = np.random.default_rng(0), vocab.music.grid
    notes = [(i * 0.37 + rng.random() * 0.1, 0.2 + rng.random(), int(rng.integers(21, 109)), int(rng.integers(1, 128)))
             for i in range(200)]
    path = write_midi(tmp_path / "a.mid", [notes])
    before, piece = read_piano(path), pg.read_piece(path, vocab)
    after = vocab.decode([*piece.ids.tolist(), vocab.eos])
    assert piece.notes == before.note_num() == after.note_num() == 200
    assert piece.seconds == pytest.approx(before.to("second").end())
    one, two = (np.array(sorted((n.pitch, n.time / s.tpq, n.duration / s.tpq, n.velocity) for n in s.tracks[0].notes))
                for s in (before, after))
    # Starts move by half a position, lengths are at least one, loudness moves by one level.
    assert (np.abs(one - two) <= np.array([0, 0.5 / grid, 1 / grid, 128 / vocab.music.velocities]) + 1e-3).all()
    assert all(are_legal([*piece.ids, vocab.eos], vocab))


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (9, 8), (12, 8), (2, 2), (3, 2), (6, 2), (2, 1), (6, 16)])
@pytest.mark.parametrize("step", [1 / 4, 1 / 8, 1 / 3, 1 / 6], ids=["16ths", "32nds", "triplets", "16th triplets"])
def test_rhythms_come_back_exactly(step, metre, tmp_path, vocab):
    notes = [(i * step, step, 40 + i % 48, 80) for i in range(round(24 / step))]
    path = write_midi(tmp_path / "a.mid", [notes], metre=metre)
    piece = pg.read_piece(path, vocab)
    back = vocab.decode([*piece.ids.tolist(), vocab.eos])
    assert notes_of(back) == notes_of(Score(path)) and not any(piece.changes.values())
    assert back.time_signatures[0].numerator / back.time_signatures[0].denominator == metre[0] / metre[1]


def test_every_tempo_comes_back_within_one_percent_and_120_as_it_is(tmp_path, vocab):
    for bpm in (*np.geomspace(20, 300, 40), 120.0):
        ids = pg.read_piece(write_midi(tmp_path / "a.mid", scale(bars=1), bpm=bpm), vocab).ids.tolist()
        assert vocab.decode(ids).tempos[0].qpm == pytest.approx(bpm, rel=0.01 if bpm != 120 else 0)


@pytest.mark.parametrize("metre, longest", [((4, 4), 12), ((6, 8), 6), ((3, 2), 12)])
def test_notes_longer_than_twelve_beats_of_their_metre_are_counted(metre, longest, tmp_path, vocab):
    notes = [(0, longest, 60, 80), (24, longest + 0.1, 62, 80), (48, longest + 2, 64, 80), (72, 1, 65, 80), (72, 20, 110, 80)]
    path = write_midi(tmp_path / "a.mid", [notes], metre=metre)
    piece = pg.read_piece(path, vocab)
    assert piece.changes["notes longer than 12 beats shortened"] == 2
    ends = [end - start for start, end, _ in notes_of(vocab.decode([*piece.ids.tolist(), vocab.eos]))]
    assert ends == [longest, longest, longest, 1]


def test_metre_and_tempo_survive_encode_and_decode(tmp_path, vocab):
    ids = pg.read_piece(write_midi(tmp_path / "a.mid", scale(), metre=(6, 8), bpm=120), vocab).ids.tolist()
    score, faster = vocab.decode(ids), vocab.decode(ids, tempo=150)
    assert [(t.numerator, t.denominator) for t in score.time_signatures] == [(6, 8)]
    assert [[round(t.qpm, 2) for t in s.tempos] for s in (score, faster)] == [[120.0], [150.0]]
    assert notes_of(score) == notes_of(faster)


def test_last_notes_ring_on_where_a_piece_ends_and_are_cut_where_it_is(vocab):
    ids = ids_of("Bar_None TimeSig_4/4 Position_72 Tempo_120.0 Pitch_60 Velocity_67 Duration_4.0.12", vocab)
    assert notes_of(vocab.decode(ids)) == [(3, 4, 60)]
    assert notes_of(vocab.decode([*ids, vocab.eos])) == [(3, 7, 60)]


def test_vocabulary_is_that_of_one_piano_and_of_its_settings(vocab):
    assert {"Tempo_120.0", "Pitch_21", "Pitch_108"} <= {*vocab.words}
    for v, positions, levels in ((vocab, 24 * 12, 32), (VOCABULARIES[1], 4 * 12, 8)):
        count = collections.Counter(word.split("_")[0] for word in v.words)
        assert [count[k] for k in ("Pitch", "Position", "Velocity", "Chord")] == [88, positions, levels, 97]
        assert {*count} <= {*pg.KINDS} and v.words[0] == "PAD_None"
        assert v.says[pg.PITCH, v.pitches].tolist() == [*range(21, 109)], "a semitone is one id"
        assert v.says[pg.POSITION, v.positions].tolist() == [*range(1, positions)]
        assert [v.words[i].split("_")[0] for i in range(v.chords.start, v.harmonies.stop)] == ["Chord"] * 97


def test_what_tokens_cannot_say_is_counted(tmp_path, vocab):
    notes = [(0, 1, 60, 80), (0.01, 1, 60, 80), (2, 1, 62, 80), (2, 2, 62, 80), (4, 1, 110, 80), (8, 20, 50, 80)]
    path = write_midi(tmp_path / "a.mid", [notes], controls=[(0, 3, 64, 127)])  # never lifted
    score = Score(path)
    score.tempos = [Tempo(0, 120.0), Tempo(960, 12.0), Tempo(1920, 20.0), Tempo(2880, 300.0), Tempo(3840, 320.0)]
    score.time_signatures = [TimeSignature(0, 65, 4), TimeSignature(1920, 3, 4), TimeSignature(2880, 2, 4),
                             TimeSignature(1920 + 2 * 1440, 4, 4)]
    score.dump_midi(path)
    piece = pg.read_piece(path, vocab)
    assert piece.changes == {
        "notes struck together on one key merged": 1, "pedals held too long for a pianist ignored": 1,
        "notes outside the piano's range dropped": 1, "repeated notes in one grid position merged": 1,
        "notes longer than 12 beats shortened": 1, "tempos outside 20 to 300 changed": 2,
        "time signatures moved or ignored": 3, "bars of long silences cut": 0}
    assert piece.notes == 3
    assert set(pg.read_piece(write_midi(tmp_path / "b.mid", scale()), vocab).changes.values()) == {0}


@EVERY_GRID
def test_random_walk_over_legal_ids_keeps_the_grammar_and_every_word_gets_its_turn(vocab):
    ids, seen = random_walk(vocab, 2000)
    assert_grammar(ids, vocab)
    assert [vocab.words[i] for i in (~seen).nonzero()[:, 0]] == ["PAD_None", "BOS_None"]


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8), (2, 2)])
def test_real_pieces_keep_the_grammar_and_say_each_chord_where_it_begins_and_in_each_bar(metre, tmp_path, vocab):
    bar = 4 * metre[0] / metre[1]  # quarter notes
    roots = [0, 0, 5, 7, 9, 9]  # C for two bars, F, G, A for two bars
    chords = [(n * bar + part * bar / 2, bar / 2, 48 + root + above, 80)
              for n, root in enumerate(roots) for part in (0, 1) for above in (0, 16, 31)]
    later = [[(start + 6 * bar, *note) for start, *note in hand] for hand in scale()]
    piece = pg.read_piece(write_midi(tmp_path / "a.mid", [chords, *later], metre=metre), vocab)
    words = " ".join(vocab.words[i] for i in piece.ids).split("Bar_None")[1:7]
    assert [re.findall(r"Chord_(\S+)", text) for text in words] == [[f"{pg.ROOTS[root]}:maj"] for root in roots]
    assert_grammar(piece.ids.tolist(), vocab)
    assert all(are_legal([*piece.ids, vocab.eos], vocab))


def chords_of(notes, beats=(0, 24)):
    """The symbols of the chords that are found in the beats of (start, length, pitch), in 24ths of a quarter."""
    track = Track()
    track.notes.extend([Note(start, length, pitch, 80) for start, length, pitch in notes])
    return [pg.CHORDS[i] for i in pg.find_chords(track, np.array(beats), 24)]


def chord_of(pitches):
    """The symbol of the chord that is found where these pitches sound for a quarter note."""
    return chords_of([(0, 24, pitch) for pitch in pitches])[0]


@pytest.mark.parametrize("quality", pg.QUALITIES)
def test_triads_and_sevenths_are_found_in_every_key_and_inversion(quality):
    symbol, above = pg.QUALITIES[quality]
    for root in range(12):
        for inversion in range(len(above)):
            bass = root + above[inversion] if quality == "aug" else root  # its inversions have the same intervals
            pitches = [48 + root + step + 12 * (i < inversion) for i, step in enumerate(above)]
            assert chord_of(pitches) == pg.ROOTS[bass % 12] + symbol


def test_single_notes_clusters_and_what_changes_for_a_moment_are_no_chord_of_their_own():
    assert chord_of([60]) == chord_of([60, 61, 62]) == chord_of(range(60, 72)) == "N.C."
    notes = [(0, 96, 48), (0, 96, 52), (0, 96, 55), (0, 36, 72), (36, 6, 74), (42, 6, 77), (48, 48, 76), (144, 24, 50)]
    found = chords_of(notes, range(0, 169, 24))
    assert found[:4] == ["C"] * 4 and found[6] == "N.C."


def test_note_that_passes_makes_no_seventh_and_one_that_stays_does():
    for length, symbol in ((6, "C"), (24, "C7")):  # of the B flat, in a beat of 24
        assert chords_of([(0, 24, 48), (0, 24, 52), (0, 24, 55), (0, length, 70)]) == [symbol]


def test_chord_says_its_root_as_a_pitch(vocab):
    said = {word: vocab.says[pg.PITCH, i].item() for i, word in enumerate(vocab.words)}
    assert (said["Chord_C:maj"], said["Chord_G:7dom"], said["Chord_B:min"], said["Chord_none"]) == (48, 55, 59, -1)


def test_chord_symbols_are_read_as_musicians_write_them_and_a_wrong_one_is_named():
    bars = pg.parse_chords("C Am F#dim Bb7,Cmaj7 Bm7b5,E,Ebaug Dbm7 Cmaj7,Gm,Bdim,Cbm")
    names = [[pg.CHORDS[i] for i in bar] for bar in bars]
    assert names[:4] == [["C"] * 12, ["Am"] * 12, ["F#dim"] * 12, ["Bb7"] * 6 + ["Cmaj7"] * 6]
    assert names[4:6] == [["Bm7b5"] * 4 + ["E"] * 4 + ["Ebaug"] * 4, ["C#m7"] * 12]
    assert names[6] == [symbol for symbol in ("Cmaj7", "Gm", "Bdim", "Bm") for _ in range(3)]
    for wrong in ("H", "C H7", "C/G", "Cmaj13", "CM7", "am", "C,,G", "C,D,E,F,G", "#"):
        with pytest.raises(pg.UserError, match="cannot read"):
            pg.parse_chords(wrong)


@pytest.mark.parametrize("words", [
    "TimeSig_4/4",  # music before the first bar
    "Bar_None Position_0",  # a bar without a time signature
    "Bar_None TimeSig_4/4 Pitch_60",  # a note without a Position
    "Bar_None TimeSig_3/4 Position_72",  # a Position outside its bar
    "Bar_None TimeSig_4/4 Position_8 Tempo_120.0 Position_8",  # time that stands still
    "Bar_None TimeSig_4/4 Position_8 Tempo_120.0 Position_0",  # the beginning of a bar, too late
    "Bar_None TimeSig_4/4 Position_0 Tempo_120.0 Position_0",  # the beginning of a bar, twice
    "Bar_None TimeSig_4/4 Position_0 Pitch_60 Duration_1.0.24",  # a note without a Velocity
    "Bar_None TimeSig_4/4 Position_0 Pitch_60 Velocity_63 Duration_1.0.24 Pitch_60",  # a key struck twice
    "Bar_None TimeSig_4/4 Position_0 Pitch_60 Velocity_63 Duration_1.0.24 Pitch_59",  # a chord that goes down
    "Bar_None TimeSig_4/4 Position_0 Pitch_60 EOS_None",  # a piece that ends within a note
    "Bar_None TimeSig_4/4 EOS_None"])  # an empty bar at the end
def test_broken_music_is_against_the_grammar(words, vocab):
    ids = ids_of(words, vocab)
    assert are_legal(ids, vocab) == [True] * (len(ids) - 1) + [False]


@EVERY_GRID
def test_bar_lines_lie_where_miditok_plays_them_under_changing_metre(vocab):
    rng, words = np.random.default_rng(0), []
    metres, tempos = ([w for w in vocab.words if w.startswith(kind)] for kind in ("TimeSig", "Tempo"))
    for _ in range(60):  # a note on the bar line, and another tempo somewhere in the bar
        metre = rng.choice(metres)
        position = rng.integers(1, int(metre[8:].split("/")[0]) * vocab.music.grid)
        words += f"Bar_None {metre} Position_0 Pitch_60 Velocity_127 Duration_1.0.{vocab.music.grid}".split()
        words += f"Position_{position} {rng.choice(tempos)}".split()
    ids = ids_of(" ".join(words), vocab)
    score = vocab.tokenizer.decode([ids])
    at, quarters = (part.tolist() for part in vocab.bar_lines(torch.tensor(ids)))
    assert at == [i for i, word in enumerate(words) if word == "Bar_None"] and len(quarters) == 61
    assert quarters[:-1] == pytest.approx([n.time / score.tpq for n in score.tracks[0].notes], rel=1e-6)
    ends = [vocab.bar_lines(torch.tensor(ids[:i])) for i in at[1:]]
    assert [q[-1].item() for _, q in ends] == quarters[1:-1]


def prompt(path, vocab, **sample):
    """The ids of a prompt, the number of its bars, its notes."""
    ids = pg.read_prompt(pg.SampleConfig(prompt=str(path), **sample), vocab)
    return ids, ids.count(vocab.bar), notes_of(vocab.decode(ids))


LONG = [[(0, 1, 60, 80), (5, 6, 64, 80), (9, 1, 67, 80)]]
PROMPTS = {  # tracks, what else is in the file, what is asked for, the number of bars, the notes
    "it is cut on a bar line, where sounding notes end": (
        LONG, {"metre": (3, 4)}, {"prompt_bars": 2}, 2, [(0, 1, 60), (5, 6, 64)]),
    "it is the whole piece": (LONG, {"metre": (3, 4)}, {}, 4, [(0, 1, 60), (5, 11, 64), (9, 10, 67)]),
    "it keeps the silent bars at its end": (
        [[(0, 1, 60, 80), (20, 1, 62, 80)]], {}, {"prompt_bars": 4}, 4, [(0, 1, 60)]),
    "it may be shorter than what is asked for": (
        [[(0, 1, 60, 80), (28, 4, 62, 80)]], {}, {"bars": 9}, 8, [(0, 1, 60), (28, 32, 62)]),
    "it is read as any piece": ([[(0, 1, 72, 80)], [(0, 1, 38, 90)]], {"drums": [1], **pedal()}, {}, 1, [(0, 4, 72)])}


@pytest.mark.parametrize("tracks, more, sample, bars, notes", PROMPTS.values(), ids=PROMPTS)
def test_prompt_is_what_is_asked_for(tracks, more, sample, bars, notes, tmp_path, vocab):
    ids, *found = prompt(write_midi(tmp_path / "a.mid", tracks, **more), vocab, **sample)
    assert found == [bars, notes] and all(are_legal([*ids, vocab.bar], vocab))


@pytest.mark.parametrize("name, sample, sentence", [
    ("none", {}, "cannot be continued .not a file"), ("page", {}, "cannot be continued"), ("late", {"prompt_bars": 2}, "hold no notes"),
    ("scale", {"prompt_bars": 9}, "is only 8 bars: ask for less"),
    ("scale", {"bars": 8}, "the prompt alone is 8 bars: ask for a longer piece")])
def test_prompt_that_cannot_be_continued_as_asked_is_a_sentence(name, sample, sentence, tmp_path, vocab):
    (tmp_path / "page.mid").write_text("<html>")
    write_midi(tmp_path / "late.mid", [[(20, 1, 60, 80)]])
    write_midi(tmp_path / "scale.mid", scale(bars=8))
    with pytest.raises(pg.UserError, match=sentence):
        prompt(tmp_path / f"{name}.mid", vocab, **sample)
    assert prompt(tmp_path / "scale.mid", vocab, bars=9)[1] == 8


@pytest.mark.parametrize("tonic, key, sharps", [
    (0, "C major", 0), (6, "F# major", 6), (10, "Bb major", -2), (9, "A minor", 0), (3, "Eb minor", -6), (1, "C# minor", 4)])
def test_key_is_found_and_spelled_as_musicians_do(tonic, key, sharps, tmp_path):
    steps, third = ((0, 2, 4, 5, 7, 9, 11), 4) if "major" in key else ((0, 2, 3, 5, 7, 8, 11), 3)
    notes = [(i, 1, 60 + tonic + step, 80) for i, step in enumerate((0, third, 7, *steps, 7, third, 0))]
    signature, name = pg.find_key(Score(write_midi(tmp_path / "a.mid", [notes])))
    assert (name, signature.key, signature.tonality) == (key, sharps, int("minor" in key))


def intervals(pitches):
    """The intervals between MIDI pitches."""
    return pg.pitch_intervals(np.array(pitches, int), range(128))


def longest_by_hand(mine, theirs):
    """How many notes in a row are the same in any key, by trying every number and place."""
    def runs(notes, n):
        return {tuple(np.diff(notes[i : i + n])) for i in range(len(notes) - n + 1)}

    return max((n for n in range(2, len(mine) + 1) if runs(mine, n) & runs(theirs, n)), default=0)


def test_longest_known_run_is_exact_whatever_the_key():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pieces, mine = {str(i): rng.integers(60, 64, size=30) for i in range(4)}, rng.integers(70, 74, size=20)
        notes, name = pg.longest_known_run(intervals(mine), [*pieces], b"".join(map(intervals, pieces.values())))
        by_hand = {n: longest_by_hand(mine, piece) for n, piece in pieces.items()}
        assert notes == max(by_hand.values()) == by_hand[name]


def test_copied_passage_is_found_with_its_file_and_does_not_run_across_pieces():
    music = np.random.default_rng(1).integers(30, 90, size=(5, 500))
    known = [*"01234"], b"".join(map(intervals, music))
    for mine, run in ((np.r_[10, 90, music[3][100:140] + 5, 20], (40, "3")), ([60], (0, "")), ([], (0, "")),
                      (np.r_[music[1][-20:], music[2][:15]], (20, "1"))):
        assert pg.longest_known_run(intervals(mine), *known) == run
    assert pg.longest_known_run(intervals([60, 62, 64]), [], b"") == (0, "")
