"""MIDI files as programs write them: what a synthesizer would play is what the tokens say."""

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import notes_of, pg
from fuzz_midi import melody, midi

Q = 480  # ticks per quarter note


def at(quarter, data):
    """An event of a track."""
    return round(quarter * Q), bytes(data)


def note(start, end, pitch=60, channel=0, velocity=80):
    """A note."""
    return [at(start, (0x90 | channel, pitch, velocity)), at(end, (0x80 | channel, pitch, 0))]


def control(quarter, number, value, channel=0):
    """A control change."""
    return [at(quarter, (0xB0 | channel, number, value))]


def pedal(down, up, channel=0):
    """The pedal, from a quarter to a quarter."""
    return control(down, 64, 127, channel) + control(up, 64, 0, channel)


def meta(quarter, kind, data):
    """A meta event."""
    return [at(quarter, (0xFF, kind, len(data), *data))]


def tempo(quarter, bpm):
    """A tempo."""
    return meta(quarter, 0x51, round(60e6 / bpm).to_bytes(3, "big"))


def metre(quarter, beats, unit):
    """A time signature."""
    return meta(quarter, 0x58, (beats, unit.bit_length() - 1, 24, 8))


def key(quarter, sharps, is_minor=0):
    """A key signature."""
    return meta(quarter, 0x59, (sharps % 256, is_minor))


def track(*parts):
    """(delta, bytes) of events in any order; those of one tick stay in theirs."""
    events = sorted((event for part in parts for event in part), key=lambda event: event[0])
    ticks = [0, *(tick for tick, _ in events)]
    return [(b - a, data) for a, b, (_, data) in zip(ticks, ticks[1:], events, strict=False)]


def played(*tracks):
    """(start, end, pitch) of the notes of a file, in quarters, as one piano."""
    piano, _ = pg.make_piano(pg.parse_midi(midi(*tracks)))
    return notes_of(piano)


LATE = note(8, 9, 72)  # keeps a piece going
PEDALS = {  # tracks; when the note of one quarter at the beginning ends
    "in the track of the notes": ([track(note(0, 1), pedal(0, 3), LATE)], 3),
    "in a track of its own": ([track(note(0, 1), LATE), track(pedal(0, 3))], 3),
    "beside another program": ([track(LATE, [at(0, (0xC0, 5))]), track(note(0, 1)),
                                track(pedal(0, 3))], 3),
    "across a change of program": ([track(note(0, 1), pedal(0, 3), [at(0.5, (0xC0, 5))], LATE)], 3),
    "of another channel": ([track(note(0, 1), pedal(0, 3, channel=1), LATE)], 1),
    "lifted by a reset": ([track(note(0, 1), control(0, 64, 127), control(2, 121, 0), LATE)], 2),
    "lifted by all notes off": ([track(note(0, 1), control(0, 64, 127), control(2, 123, 0),
                                       LATE)], 2),
    "lifted by all sound off": ([track(note(0, 1), control(0, 64, 127), control(2, 120, 0),
                                       LATE)], 2),
    "lifted in another track": ([track(note(0, 1), control(0, 64, 127), LATE),
                                 track(control(2, 64, 0))], 2),
    "half down": ([track(note(0, 1), control(0, 64, 64), control(3, 64, 63), LATE)], 3),
    "said twice": ([track(note(0, 1), pedal(0, 3), control(0.5, 64, 100), LATE)], 3),
    "down as the key goes up": ([track(note(0, 1), pedal(1, 3), LATE)], 1),
    "changed as the key goes up": ([track(note(0, 1), pedal(0, 1), pedal(1, 3), LATE)], 1),
}  # fmt: skip


@pytest.mark.parametrize("tracks, end", PEDALS.values(), ids=PEDALS)
def test_pedal_is_a_state_of_a_channel(tracks, end):
    assert played(*tracks) == [(0, end, 60), (8, 9, 72)]


KEYS = {  # events of a track; the notes that are played
    "two notes of one key end in their order": (
        [at(0, (0x90, 60, 80)), at(1, (0x90, 60, 80)), at(2, (0x80, 60, 0)), at(4, (0x80, 60, 0))],
        [(0, 1, 60), (1, 4, 60)],
    ),
    "a note off that is missing costs one note": (
        [at(0, (0x90, 60, 80)), *note(4, 5), *note(8, 9), *LATE],
        [(0, 4, 60), (4, 5, 60), (8, 9, 60), (8, 9, 72)],
    ),
    "a note on that is doubled costs nothing": (
        [at(0, (0x90, 60, 80)), *note(0, 1), *note(4, 5), *LATE],
        [(0, 1, 60), (4, 5, 60), (8, 9, 72)],
    ),
    "a note that is not lifted ends where its key was lifted before all are": (
        [at(0, (0x90, 60, 80)), *note(1, 2), *control(4, 123, 0), *LATE],
        [(0, 1, 60), (1, 2, 60), (8, 9, 72)],
    ),
    "repeated notes that overlap end one after another": (
        [*note(0, 1.2), *note(1, 2.2), *note(2, 3.2), *LATE],
        [(0, 1, 60), (1, 2, 60), (2, 3.2, 60), (8, 9, 72)],
    ),
    "a note off that is missing takes no pedal from the next note": (
        [
            at(0, (0x90, 60, 80)),
            *note(1, 2),
            *control(0.5, 64, 127),
            *control(4, 64, 0),
            *note(5, 6),
            *LATE,
        ],
        [(0, 1, 60), (1, 4, 60), (5, 6, 60), (8, 9, 72)],
    ),
    "velocity 0 ends a note": ([at(0, (0x90, 60, 80)), at(1, (0x90, 60, 0))], [(0, 1, 60)]),
    "all notes off lifts the keys": (
        [at(0, (0x90, 60, 80)), *control(2, 123, 0), *LATE],
        [(0, 2, 60), (8, 9, 72)],
    ),
    "a key that is never lifted ends with the music": (
        [at(0, (0x90, 60, 80)), *LATE],
        [(0, 9, 60), (8, 9, 72)],
    ),
    "a note without length is heard": (
        [at(1, (0x90, 60, 80)), at(1, (0x80, 60, 0)), *LATE],
        [(1, 1.002, 60), (8, 9, 72)],
    ),
    "an end without a note says nothing": ([at(0, (0x80, 61, 0)), *LATE], [(8, 9, 72)]),
}


@pytest.mark.parametrize("events, notes", KEYS.values(), ids=KEYS)
def test_keys_sound_as_long_as_they_are_down(events, notes):
    assert played(track(events)) == notes


def test_pedal_that_holds_a_note_beyond_32_bits_ends_it_there():
    wait = [(2**28 - 1, b"\xb0\x01\x00")] * 7  # the longest that one event can wait
    late = [(2**28 - 3, b"\xb0\x40\x7f"), (1, b"\x90\x3c\x50"), (2, b"\x80\x3c\x00")]
    data = midi([*wait, *late, (100_000, b"\xb0\x40\x00")], ticks=32_767)
    piano, _ = pg.make_piano(pg.parse_midi(data))
    [note] = piano.tracks[0].notes
    assert 0 < note.time < note.end == 2**31 - 2


def test_hands_on_one_channel_keep_their_own_keys():
    right = track(note(0, 4, 60), note(5, 6, 62))
    left = track(note(1, 2, 60))
    assert played(right, left) == [(0, 1, 60), (1, 2, 60), (5, 6, 62)]


def read(vocab, *tracks):
    """A file of tracks as a piece."""
    return pg.read_piece(midi(*tracks), vocab)


def bars_of(piece, vocab):
    """The bar lines of a piece, in quarters; and its metres, one for each bar."""
    starts, lines = vocab.bar_lines(piece.ids)
    metres = [vocab.words[piece.ids[start + 1]].removeprefix("TimeSig_") for start in starts]
    return lines.tolist(), metres


@pytest.mark.parametrize(
    "late", [tempo(100, 90), metre(100, 3, 4), metre(24, 3, 4), meta(100, 1, b"the end")]
)
def test_only_notes_decide_how_long_music_is(late, vocab):
    piece = read(vocab, track(note(0, 4), note(4, 8), late))
    lines, metres = bars_of(piece, vocab)
    assert lines == [0, 4, 8]
    assert metres == ["4/4", "4/4"]
    assert piece.seconds == 4
    assert not any(piece.changes.values())


METRES = {  # metres of a file of 24 quarters, (quarter, beats, unit); bar lines; metres; changes
    "15/8": ([(0, 15, 8)], [0, 6, 7.5, 13.5, 15, 21, 22.5, 28.5, 30], ["12/8", "3/8"] * 4, 1),
    "13/8": ([(0, 13, 8), (13, 4, 4)], [0, 6, 6.5, 12.5, 13, 17, 21, 25],
             ["12/8", "1/8", "12/8", "1/8", "4/4", "4/4", "4/4"], 1),
    "16/8": ([(0, 16, 8)], [0, 6, 8, 14, 16, 22, 24], ["12/8", "4/8"] * 3, 1),
    "3/32": ([(0, 6, 32), (0.75, 12, 4)], [0, 0.75, 12.75, 24.75], ["3/16", "12/4", "12/4"], 0),
    "3/2": ([(0, 3, 2)], [0, 6, 12, 18, 24], ["6/4"] * 4, 0),
    "inside a bar": ([(0, 4, 4), (6, 3, 4)], [0, 4, 6, 9, 12, 15, 18, 21, 24],
                     ["4/4", "2/4", *["3/4"] * 6], 0),
    "inside a bar by a 16th": ([(0, 12, 4), (12.25, 12, 4), (12.25, 6, 4)],
                               [0, 12, 12.25, 18.25, 24.25], ["12/4", "1/16", "6/4", "6/4"], 0),
    "said again inside a bar": ([(0, 12, 4), (5, 12, 4)], [0, 12, 24], ["12/4"] * 2, 0),
    "late": ([(10, 6, 8)], [0, 4, 8, 10, 13, 16, 19, 22, 25],
             ["4/4", "4/4", "2/4", *["6/8"] * 5], 0),
    "twice at one tick": ([(0, 3, 4), (0, 12, 4)], [0, 12, 24], ["12/4"] * 2, 0),
    "a whole piece": ([(0, 255, 1)], [0, 12, 24, *range(36, 1021, 12)], ["12/4"] * 85, 1),
}  # fmt: skip


@pytest.mark.parametrize("metres, lines, words, split", METRES.values(), ids=METRES)
def test_no_bar_line_moves(metres, lines, words, split, vocab):
    notes = [event for n in range(48) for event in note(n / 2, n / 2 + 0.5, 40 + n)]
    piece = read(vocab, track(notes, *(metre(*values) for values in metres)))
    found, metres = bars_of(piece, vocab)
    last = len(found) - 1  # silent bars at the end are not written
    assert found == lines[: last + 1]
    assert found[-1] >= 24
    assert metres == words[:last]
    assert piece.changes["time signatures split into shorter bars"] == split
    assert piece.changes["time signatures rounded to 16th notes"] == 0
    assert notes_of(vocab.decode(piece.ids)) == [(n / 2, n / 2 + 0.5, 40 + n) for n in range(48)]


def test_change_of_metre_just_before_the_end_is_written(vocab):
    piece = read(vocab, track(note(0, 1), note(4, 4.05), metre(4, 3, 4)))
    _, metres = bars_of(piece, vocab)
    assert metres == ["4/4", "3/4"]
    _, metres = bars_of(read(vocab, track(note(0, 0.05), metre(0, 3, 4))), vocab)
    assert metres == ["3/4"]


def test_metre_that_no_16th_fits_moves_its_line_a_little_and_says_so(vocab):
    piece = read(vocab, track(note(0, 1), note(12, 13), metre(4.1, 3, 4)))
    lines, metres = bars_of(piece, vocab)
    assert lines == [0, 4, 7, 10, 13]
    assert metres == ["4/4", "3/4", "3/4", "3/4"]
    assert piece.changes["time signatures rounded to 16th notes"] == 1


def test_random_changes_of_metre_lose_no_note(vocab):
    rng = random.Random(0)
    for _ in range(30):
        metres = []
        for _ in range(8):
            where = rng.randrange(200) / 8
            metres += metre(where, rng.randrange(1, 20), rng.choice((1, 2, 4, 8, 16, 32, 64)))
        notes = [event for n in range(60) for event in note(n / 2, n / 2 + 0.5, 30 + n)]
        piece = read(vocab, track(sorted(metres), notes))
        legal = vocab.legal(vocab.trace(piece.ids[:-1]))
        assert legal[np.arange(len(piece.ids) - 1), piece.ids[1:]].all()
        found = notes_of(vocab.decode(piece.ids))
        assert [pitch for _, _, pitch in found] == [30 + n for n in range(60)]
        moved = np.array([start for start, _, _ in found]) - np.arange(60) / 2
        assert np.abs(moved).max() <= 1 / 24


@pytest.mark.parametrize("beats, unit", [(4, 4), (12, 8), (6, 16), (3, 2)])
def test_longest_note_is_as_long_in_every_metre(beats, unit, vocab):
    piece = read(vocab, track(note(0, 18, 40), note(18, 43, 41), metre(0, beats, unit)))
    assert notes_of(vocab.decode(piece.ids)) == [(0, 18, 40), (18, 42, 41)]
    assert piece.changes["notes longer than 24 quarter notes shortened"] == 1


def test_of_several_tempos_at_one_tick_the_last_in_the_file_counts():
    tracks = [track(tempo(0, 120), note(0, 1)), track(tempo(0, 90)), track(tempo(0, 72))]
    [tempo_found] = pg.make_piano(pg.parse_midi(midi(*tracks)))[0].tempos
    assert tempo_found.qpm == pytest.approx(72, abs=1e-3)


PACKETS = [at(1, b"\xf0\x03\x7e\x7f\x09"), at(1.1, b"\xf7\x02\x01\xf7"), at(1.2, b"\xf7\x01\xf8")]
SYSTEM_EXCLUSIVE = {
    "in packets": track(PACKETS, note(0, 1), note(2, 3)),
    "before running status": [
        (0, b"\x90\x3c\x50"), (Q, b"\x3c\x00"), (0, b"\xf0\x02\x7e\xf7"), (Q, b"\x3c\x50"),
        (Q, b"\x3c\x00"),
    ],
    "after a text": [
        (0, b"\x90\x3c\x50"), (Q, b"\x3c\x00"), (0, b"\xff\x01\x01a"), (Q, b"\x3c\x50"),
        (Q, b"\x3c\x00"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("events", SYSTEM_EXCLUSIVE.values(), ids=SYSTEM_EXCLUSIVE)
def test_system_exclusive_messages_are_passed_over(events):
    assert played(events) == [(0, 1, 60), (2, 3, 60)]


GOOD = midi(track(note(0, 1)), track(note(2, 3, 64)))
WRAPPED = {
    "RIFF": b"RIFF" + bytes(4) + b"RMIDINFO" + bytes(12) + b"data" + bytes(4) + GOOD,
    "MacBinary": bytes(128) + GOOD,
    "a longer header": GOOD[:7] + b"\x08" + GOOD[8:14] + b"\0\0" + GOOD[14:],
    "an unknown chunk": GOOD[:14] + b"XFIH\0\0\0\2ab" + GOOD[14:],
    "bytes after the last chunk": GOOD + b"\0\0\0",
}


@pytest.mark.parametrize("data", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_file_is_opened(data):
    assert notes_of(pg.make_piano(pg.parse_midi(data))[0]) == [(0, 1, 60), (2, 3, 64)]


def test_tracks_that_the_header_does_not_count_are_read_and_counted(vocab):
    piece = pg.read_piece(GOOD[:11] + b"\1" + GOOD[12:], vocab)
    assert piece.notes == 2
    assert piece.changes["tracks read beyond the number in the header"] == 1


def broken(events):
    """A file of one track of these bytes."""
    return GOOD[:11] + b"\1" + GOOD[12:14] + b"MTrk\0\0\0" + bytes([len(events)]) + events


DAMAGED = {
    "not a MIDI file": b"MThd\0\0\0\6",
    "damaged: track 2 is cut off": GOOD[:-7],
    "damaged: only 2 tracks of 3": GOOD[:11] + b"\3" + GOOD[12:],
    "damaged: only 0 tracks of 2": GOOD[:14],
    "damaged: a value above 127": broken(b"\0\x90\x3c\x80"),
    "damaged: a message without a status byte": broken(b"\0\x3c\x50"),
    "damaged: a message 0xf5, which MIDI files do not allow": broken(b"\0\xf5"),
    "damaged: a meta event 0x90, which MIDI files do not allow": broken(b"\0\xff\x90\x02\xff\x40"),
    "damaged: a number longer than 4 bytes": broken(b"\xff\xff\xff\xff\x7f\x90\x3c\x50"),
    "damaged: track 1 is cut off": broken(b"\0\x90\x3c"),
    "zero ticks per quarter note": GOOD[:12] + b"\0\0" + GOOD[14:],
    "it is timed in film frames (SMPTE), not in beats: save it with a tempo": (
        GOOD[:12] + b"\xe7\x28" + GOOD[14:]
    ),
    "MIDI format 2, several songs in one file: save each one separately": (
        GOOD[:9] + b"\2" + GOOD[10:]
    ),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_what_no_program_should_write_is_refused_by_name(problem):
    with pytest.raises(pg.UserError) as e:
        pg.parse_midi(DAMAGED[problem])
    assert str(e.value) == problem


def test_cut_at_any_byte_a_file_is_whole_or_refused():
    rng = random.Random(0)
    data = midi(melody(rng), melody(rng, channel=3))
    whole = len(pg.parse_midi(data).events)
    for length in range(len(data)):
        try:
            assert len(pg.parse_midi(data[:length]).events) == whole
        except pg.UserError:
            continue
        assert length >= len(data) - 8, "nothing but the end of the track is lost"


def prompt_of(tmp_path, vocab, *tracks, **sample):
    """A prompt of these tracks."""
    path = Path(tmp_path, "prompt.mid")
    path.write_bytes(midi(*tracks))
    return pg.read_prompt(pg.SampleSettings(prompt=str(path), **sample), vocab)


def continued(prompt, vocab, words="Bar_None TimeSig_4/4 Position_0 Pitch_62 Velocity_63 "
              "Duration_1.0.24", **sample):  # fmt: skip
    """The score of a prompt and one more bar."""
    new = [vocab.id_of[word] for word in words.split()]
    ids = np.append(prompt.ids, new)
    return pg.make_sample(ids, prompt, vocab, pg.SampleSettings(**sample)).score


def tempos_of(score):
    """(quarter, quarter notes per minute) of the tempos of a score."""
    return [(t.time / score.tpq, round(t.qpm, 1)) for t in score.tempos]


FASTER = "Bar_None TimeSig_4/4 Position_0 Tempo_200.61 Pitch_60 Velocity_63 Duration_1.0.24"
TEMPOS = [[(0, 330), (4, 600)], [(0, 15), (2, 8)], [(0, 120), (0.011, 121)], [(0, 117.3), (7, 90)]]


@pytest.mark.parametrize("tempos", TEMPOS, ids=str)
def test_every_tempo_of_a_prompt_stands_where_it_stood(tempos, tmp_path, vocab):
    events = [event for values in tempos for event in tempo(*values)]
    prompt = prompt_of(tmp_path, vocab, track(note(0, 4), note(4, 8), note(8, 9), events))
    first = [(pytest.approx(quarter, abs=0.002), bpm) for quarter, bpm in tempos]
    assert tempos_of(continued(prompt, vocab)) == first
    faster = min(vocab.words[vocab.tempo_ids], key=lambda word: abs(float(word[6:]) - 200))
    words = f"Bar_None TimeSig_4/4 Position_0 {faster} Pitch_60 Velocity_63 Duration_1.0.24"
    new = (12, round(float(faster[6:]), 1))
    assert tempos_of(continued(prompt, vocab, words)) == [*first, new]
    alone = tempos_of(continued(prompt, vocab, continuation_only=True))
    assert alone == [(0, tempos[-1][1])], "the tempo at the cut goes on"


def test_bars_in_which_a_prompt_rings_are_those_of_its_file(tmp_path, vocab):
    sounding = track(metre(0, 3, 4), metre(6, 4, 4), note(0, 3), note(3, 14, 64))
    prompt = prompt_of(tmp_path, vocab, sounding)
    _, lines = vocab.bar_lines(prompt.ids)
    assert lines.tolist() == [0, 3, 6, 10, 14]
    assert prompt.end == 14 * pg.TPQ


def test_prompt_in_bars_shorter_than_a_tick_rings_to_its_end(tmp_path, vocab):
    path = Path(tmp_path, "prompt.mid")
    events = [(0, b"\xff\x58\4\1\4\x18\x08"), (0, b"\x90\x3c\x50"), (4, b"\x80\x3c\0")]
    path.write_bytes(midi(events, ticks=1))
    prompt = pg.read_prompt(pg.SampleSettings(prompt=str(path)), vocab)
    assert (prompt.ids == vocab.bar_id).sum() == 16


def test_note_that_no_piano_has_does_not_make_a_prompt_ring(tmp_path, vocab):
    prompt = prompt_of(tmp_path, vocab, track(note(0, 4), note(4, 8), note(100, 120, 3)))
    assert prompt.end == 8 * pg.TPQ


def test_prompt_cut_before_a_tempo_does_not_have_it(tmp_path, vocab):
    music = track(note(0, 4), note(4, 8), tempo(0, 90), tempo(4, 60))
    prompt = prompt_of(tmp_path, vocab, music, prompt_bars=1)
    assert tempos_of(continued(prompt, vocab)) == [(0, 90)]


def metres_of(score):
    """(quarter, beats, unit) of the time signatures of a score."""
    return [(t.time / score.tpq, t.numerator, t.denominator) for t in score.time_signatures]


IN_THREE = "Bar_None TimeSig_3/4 Position_0 Pitch_60 Velocity_63 Duration_1.0.24"


def test_metre_of_a_prompt_is_written_as_it_was(tmp_path, vocab):
    prompt = prompt_of(tmp_path, vocab, track(note(0, 4), note(4, 8), metre(0, 2, 2)))
    assert metres_of(continued(prompt, vocab)) == [(0, 2, 2)]
    assert metres_of(continued(prompt, vocab, IN_THREE)) == [(0, 2, 2), (8, 3, 4)]
    prompt = prompt_of(tmp_path, vocab, track(note(0, 6), note(6, 7), metre(0, 15, 8)))
    assert metres_of(continued(prompt, vocab)) == [(0, 15, 8), (7.5, 4, 4)]
    prompt = prompt_of(tmp_path, vocab, track(note(0, 4)))
    assert metres_of(continued(prompt, vocab, IN_THREE)) == [(0, 4, 4), (4, 3, 4)]


def keys_of(score):
    """(quarter, sharps) of the key signatures of a score."""
    return [(k.time / score.tpq, k.key) for k in score.key_signatures]


def test_continuation_alone_is_in_the_metre_and_the_key_of_its_prompt(tmp_path, vocab):
    flat = [note(n, n + 1, 61 + step) for n, step in enumerate((0, 2, 4, 5, 7, 9, 11, 12))]
    prompt = prompt_of(tmp_path, vocab, track(*flat, key(0, -5), metre(0, 2, 2)))
    alone = continued(prompt, vocab, continuation_only=True)
    assert (metres_of(alone), keys_of(alone)) == ([(0, 2, 2)], [(0, -5)])
    assert metres_of(continued(prompt, vocab, IN_THREE, continuation_only=True)) == [(0, 3, 4)]


def test_bars_through_which_the_last_notes_ring_belong_to_a_prompt(tmp_path, vocab):
    chord = [note(8, 16, 60), note(8, 16, 64)]
    music = track(note(0, 4), note(4, 8), *chord)
    prompt = prompt_of(tmp_path, vocab, music)
    assert prompt.end == 16 * 480
    kept = notes_of(continued(prompt, vocab))
    assert [n[:2] for n in kept if n[0] == 8] == [(8, 16)] * 2
    assert prompt_of(tmp_path, vocab, music, prompt_bars=4).end == 16 * 480
    assert prompt_of(tmp_path, vocab, music, rewrite="4").rewritten == [(4, 4)]
    assert prompt_of(tmp_path, vocab, music, prompt_bars=3).end == 12 * 480
    late = prompt_of(tmp_path, vocab, track(note(0, 4), note(4, 9)))
    assert late.end == 8 * 480, "less than half of a bar is no bar"


def test_what_comes_back_as_it_was_is_not_called_changed(tmp_path, vocab):
    music = track(note(0, 4), note(4, 8, 20), note(8, 8.01), note(8.01, 9), tempo(0, 400))
    continues = prompt_of(tmp_path, vocab, music)
    assert {k for k, n in continues.changes.items() if n} == {pg.OUT_OF_RANGE, pg.STRIKES_MERGED}
    rewrites = prompt_of(tmp_path, vocab, music, rewrite="1")
    assert not any(rewrites.changes.values())


def test_key_of_a_prompt_is_kept_and_that_of_the_whole_piece_follows(tmp_path, vocab):
    scale = [note(n / 2, n / 2 + 0.5, 62 + step) for n, step in enumerate((0, 2, 4, 5, 7, 9, 11))]
    prompt = prompt_of(tmp_path, vocab, track(*scale, key(0, 3)))
    assert keys_of(continued(prompt, vocab)) == [(0, 3), (4, 2)]
    assert keys_of(continued(prompt, vocab, continuation_only=True)) == [(0, 2)]
    flat = [
        note(n / 2, n / 2 + 0.5, 66 + step) for n, step in enumerate((0, 2, 4, 5, 7, 9, 11, 12))
    ]
    prompt = prompt_of(tmp_path, vocab, track(*flat, key(0, -6)))
    words = "Bar_None TimeSig_4/4 Position_0 Pitch_66 Velocity_63 Duration_4.0.12"
    assert keys_of(continued(prompt, vocab, words)) == [(0, -6)], "G flat is F sharp"
    prompt = prompt_of(tmp_path, vocab, track(*scale, key(0, 2)))
    assert keys_of(continued(prompt, vocab)) == [(0, 2)]
    prompt = prompt_of(tmp_path, vocab, track(*scale))
    assert keys_of(continued(prompt, vocab)) == [(0, 2)]


def test_silence_in_a_prompt_is_kept_and_what_it_loses_is_said(tmp_path, vocab, capsys):
    path = tmp_path / "a.mid"
    path.write_bytes(midi(track(note(0, 30), note(80, 81), tempo(80, 77), metre(0, 15, 8))))
    prompt = pg.find_prompt(pg.SampleSettings(prompt=str(path)), vocab)
    assert [n[:2] for n in notes_of(vocab.decode(prompt.ids))] == [(0, 24), (80, 81)]
    assert tempos_of(continued(prompt, vocab)) == [(0, 120), (80, 77)]
    assert capsys.readouterr().out == (
        "changed: notes longer than 24 quarter notes shortened: 1, "
        "time signatures split into shorter bars: 1\n"
    )
