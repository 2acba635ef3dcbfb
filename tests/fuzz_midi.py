"""Broken MIDI files: each must be used or reported by name, and every good file used.

python tests/fuzz_midi.py N [SEED]     reads N such files and prints counts by outcome
"""

import argparse
import collections
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg

LONG = "0 first, for it takes longest.mid"
NOT_UTF_8 = os.fsdecode(b"not \xff UTF-8.mid")


def variable_length(n):
    """n as MIDI writes delta times."""
    out = [n & 127]
    while n > 127:
        n >>= 7
        out.append(n & 127 | 128)
    return bytes(reversed(out))


def midi(*tracks, ticks=480, kind=1):
    """A MIDI file of tracks, each a list of (delta, event bytes)."""
    body = b""
    for events in tracks:
        data = b""
        for delta, event in [*events, (0, b"\xff\x2f\0")]:
            data += variable_length(delta) + event
        body += b"MTrk" + struct.pack(">I", len(data)) + data
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks), ticks) + body


def note(pitch, length, channel=0, velocity=80, rest=0):
    """The events of one note."""
    struck = bytes((0x90 | channel, pitch, velocity))
    released = bytes((0x80 | channel, pitch, 0))
    return [(rest, struck), (length, released)]


def melody(rng, channel=0):
    """Some notes one after another."""
    events = []
    for _ in range(40):
        pitch, length = rng.randrange(128), rng.randrange(1, 960)
        events += note(pitch, length, channel, rng.randrange(1, 128), rng.randrange(480))
    return events


def tempo(microseconds, rest=0):
    """A tempo event."""
    return rest, b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def metre(beats, power):
    """A metre event, its beat unit as a power of two."""
    return 0, bytes((0xFF, 0x58, 4, beats, power, 24, 8))


def relabelled(good, size):
    """A file whose first track claims to have so many bytes."""
    return good[:18] + struct.pack(">I", size) + good[22:]


# Each kind of file is made from a random generator and a good file.


def truncated(rng, good):
    return good[: rng.randrange(len(good))]


def flipped(rng, good):
    data = bytearray(good)
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def flipped_header(rng, good):
    data = bytearray(good)
    data[rng.randrange(22)] = rng.randrange(256)
    return bytes(data)


def noise(rng, good):
    return rng.randbytes(rng.randrange(2000))


def noise_in_a_track(rng, good):
    return relabelled(midi([])[:22], 500) + rng.randbytes(500)


def zero_ticks(rng, good):
    return midi(melody(rng), ticks=0)


def odd_ticks(rng, good):
    return midi(melody(rng), ticks=rng.choice((1, 7, 32767, 0xE728, 0xFFFF)))


def frames_a_second(rng, good):
    return midi(melody(rng), ticks=rng.choice((0xE728, 0xE804, 0xE300, 0xE250, 0x8000)))


def absurd_tempo(rng, good):
    return midi([tempo(rng.choice((0, 1, 2**24 - 1))), *melody(rng)])


def many_tempos(rng, good):
    return midi([tempo(rng.randrange(1, 2**24), rest=1) for _ in range(300)], melody(rng))


def absurd_metre(rng, good):
    return midi([metre(rng.choice((0, 1, 255)), rng.choice((0, 1, 7, 31, 255))), *melody(rng)])


def many_metres(rng, good):
    events = []
    for event in melody(rng):
        events += [metre(rng.randrange(1, 20), rng.randrange(7)), event]
    return midi(events)


def empty_tracks(rng, good):
    return midi(*[[]] * rng.randrange(5))


def only_drums(rng, good):
    return midi(melody(rng, channel=9))


def zero_length(rng, good):
    events = []
    for _ in range(30):
        events += note(60 + rng.randrange(5), 0, rest=100)
    return midi(events)


def never_released(rng, good):
    return midi([(10, bytes((0x90, 30 + i, 80))) for i in range(60)])


def one_note_far_away(rng, good):
    return midi(note(60, 100, rest=rng.choice((2**21, 2**27, 2**28 - 1))))


def stray_far_note(rng, good):
    stray = note(60, 100, rest=rng.choice((2**21, 2**24, 2**28 - 1)))
    return midi([*melody(rng), *stray], ticks=rng.choice((24, 480)))


def longest_rests(rng, good):
    return midi(note(60, 2**28 - 1, rest=2**28 - 1) * 40)


def absurd_track_length(rng, good):
    return relabelled(good, rng.choice((0, 1, 7, 2**16, 2**31, 2**32 - 1)))


def no_status(rng, good):
    return midi([(0, b"\x3c\x50"), (9, b"\x3c\0"), *melody(rng)])


def running_status(rng, good):
    return midi([(0, b"\x90\x3c\x50"), *[(60, bytes((60, 80 * (i % 2)))) for i in range(60)]])


def too_many_tracks(rng, good):
    return good[:10] + b"\xff\xff" + good[12:]


def a_thousand_tracks(rng, good):
    return midi(*[note(rng.randrange(128), 100)] * 1000)


def outside_the_piano(rng, good):
    return midi(note(rng.choice((0, 5, 120, 127)), 100) * 20)


def pedal_never_lifted(rng, good):
    return midi([(0, b"\xb0\x40\x7f"), *melody(rng)])


def page(rng, good):
    return b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def empty(rng, good):
    return b""


KINDS = [
    truncated,
    flipped,
    flipped_header,
    noise,
    noise_in_a_track,
    zero_ticks,
    odd_ticks,
    frames_a_second,
    absurd_tempo,
    many_tempos,
    absurd_metre,
    many_metres,
    empty_tracks,
    only_drums,
    zero_length,
    never_released,
    one_note_far_away,
    stray_far_note,
    longest_rests,
    absurd_track_length,
    no_status,
    running_status,
    too_many_tracks,
    a_thousand_tracks,
    outside_the_piano,
    pedal_never_lifted,
    page,
    empty,
]


def write_files(folder, count, seed, long_notes):
    """{name: kind} of `count` broken files in a folder, and of ten good ones among them."""
    rng = random.Random(seed)
    kinds = {}

    def write(name, kind, data):
        (folder / name).write_bytes(data)
        kinds[name] = kind

    for i in range(10):
        notes = []
        for n in range(40):
            notes += note(40 + (n * 7 + i) % 40, 240)
        write(f"good {i}.mid", "good", midi([tempo(500_000)], notes))
    good = midi([tempo(500_000), metre(4, 2)], melody(rng), melody(rng, channel=1))
    write(NOT_UTF_8, "not UTF-8", good)
    for i in range(count):
        make = KINDS[i % len(KINDS)]
        kind = make.__name__.replace("_", " ")
        write(f"{i:05d} {kind}.mid", kind, make(rng, good))
    hundred = []
    for i in range(100):
        hundred += note(21 + i % 88, 10)
    some = midi(hundred)
    events = some[22:-4] * (long_notes // 100)
    write(LONG, "long", relabelled(some[:22], len(events) + 4) + events + some[-4:])
    os.mkdir(folder / "a folder.mid")
    os.mkfifo(folder / "a pipe.mid")
    os.symlink("nowhere", folder / "a link.mid")
    return kinds | {f"{name}.mid": name for name in ("a folder", "a pipe", "a link")}


def check_piece(piece, vocab):
    """Assert that the tokens of a piece keep the grammar, and that its numbers fit each other."""
    assert 0 <= piece.seconds < pg.LONGEST_PIECE
    assert piece.notes == (vocab.says.kind[piece.ids] == pg.Kind.PITCH).sum() > 0
    assert len(piece.ids) == len(piece.time) == len(piece.pitch)
    assert piece.ids[0] == vocab.bos_id and piece.ids[-1] == vocab.eos_id
    assert (np.diff(piece.time) >= 0).all()
    assert piece.pitch.min() >= pg.LOWEST_KEY and piece.pitch.max() <= pg.HIGHEST_KEY
    some = piece.ids[:5000]
    legal = vocab.legal(vocab.trace(some[:-1]))
    illegal = np.flatnonzero(~legal[np.arange(len(some) - 1), some[1:]])
    assert not len(illegal), [vocab.words[i] for i in some[max(0, illegal[0] - 8) : illegal[0] + 2]]


def check(count, seed=0, long_notes=1_000_000):
    """Counts of (kind, outcome) over broken files; asserts that none is lost.

    long_notes: how many notes the longest file has.
    """
    vocab = pg.Vocabulary(pg.TokenSettings())
    with tempfile.TemporaryDirectory() as work:
        kinds = write_files(Path(work), count, seed, long_notes)
        pieces = pg.read_folder(Path(work), vocab, "")
    assert [piece.path for piece in pieces] == sorted(kinds)
    outcomes = collections.Counter()
    for piece in pieces:
        kind = kinds[piece.path]
        outcomes[kind, piece.problem or "used"] += 1
        if not piece.problem:
            check_piece(piece, vocab)
        if kind == "long":
            assert piece.notes == long_notes
    assert outcomes["good", "used"] == 10
    return outcomes


def main():
    """Check, and print how many files of each kind ended how."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=int, metavar="N", help="broken files to read")
    parser.add_argument("seed", type=int, nargs="?", default=0, metavar="SEED")
    args = parser.parse_args()
    start = time.monotonic()
    outcomes = check(args.files, args.seed)
    for (kind, outcome), number in sorted(outcomes.items()):
        print(f"{number:6} {kind}: {outcome}"[:150].encode("ascii", "replace").decode())
    used = sum(number for (_, outcome), number in outcomes.items() if outcome == "used")
    print(f"files: {outcomes.total()}")
    print(f"used: {used}")
    print(f"seconds: {time.monotonic() - start:.1f}")


if __name__ == "__main__":
    main()
