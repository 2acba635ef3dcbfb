"""Broken MIDI files, and what becomes of them: each must be used or reported by name, and every good file used.

python tests/fuzz_midi.py N [SEED]     the test's check with N files, in a temporary folder; prints counts by outcome
"""

import collections
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg  # noqa: E402


MILLION = "0 first, for it takes longest.mid"


def variable_length(n):
    """n as MIDI writes delta times."""
    out = [n & 127]
    while n := n >> 7:
        out.append(n & 127 | 128)
    return bytes(out[::-1])


def midi(*tracks, ticks=480, kind=1):
    """A MIDI file of tracks, each a list of (delta, event bytes)."""
    body = b""
    for events in tracks:
        data = b"".join(variable_length(delta) + event for delta, event in [*events, (0, b"\xff\x2f\0")])
        body += b"MTrk" + struct.pack(">I", len(data)) + data
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks), ticks) + body


def note(pitch, length, channel=0, velocity=80, rest=0):
    """The events of one note."""
    return [(rest, bytes((0x90 | channel, pitch, velocity))), (length, bytes((0x80 | channel, pitch, 0)))]


def melody(rng, count=40, channel=0):
    """Some notes one after another."""
    pick = rng.randrange
    return [e for _ in range(count) for e in note(pick(128), pick(1, 960), channel, pick(1, 128), pick(480))]


def tempo(microseconds):
    """A tempo event."""
    return 0, b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def metre(beats, power):
    """A metre event, its beat unit as a power of two."""
    return 0, bytes((0xFF, 0x58, 4, beats, power, 24, 8))


def truncated(rng, good):
    """A file that ends too early."""
    return good[: rng.randrange(len(good))]


def flipped(rng, good):
    """A file with a few bytes changed."""
    data = bytearray(good)
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def flipped_header(rng, good):
    """A file with a byte of its header changed."""
    data = bytearray(good)
    data[rng.randrange(22)] = rng.randrange(256)
    return bytes(data)


def relabelled(rng, good, sizes):
    """A file whose first track claims one of these lengths."""
    return good[:18] + struct.pack(">I", rng.choice(sizes)) + good[22:]


KINDS = {
    "truncated": truncated,
    "flipped": flipped,
    "flipped header": flipped_header,
    "noise": lambda rng, good: rng.randbytes(rng.randrange(2000)),
    "noise in a track": lambda rng, good: midi([])[:18] + struct.pack(">I", 500) + rng.randbytes(500),
    "zero ticks": lambda rng, good: midi(melody(rng), ticks=0),
    "odd ticks": lambda rng, good: midi(melody(rng), ticks=rng.choice((1, 7, 32767, 0xE728, 0xFFFF))),
    "absurd tempo": lambda rng, good: midi([tempo(rng.choice((0, 1, 2**24 - 1))), *melody(rng)]),
    "many tempos": lambda rng, good: midi([(1, tempo(rng.randrange(1, 2**24))[1]) for _ in range(300)], melody(rng)),
    "absurd metre": lambda rng, good: midi(
        [metre(rng.choice((0, 1, 255)), rng.choice((0, 1, 7, 31, 255))), *melody(rng)]),
    "empty tracks": lambda rng, good: midi(*[[]] * rng.randrange(5)),
    "only drums": lambda rng, good: midi(melody(rng, channel=9)),
    "zero length": lambda rng, good: midi([e for _ in range(30) for e in note(60 + rng.randrange(5), 0, rest=100)]),
    "never released": lambda rng, good: midi([(10, bytes((0x90, 30 + i, 80))) for i in range(60)]),
    "one note far away": lambda rng, good: midi(note(60, 100, rest=rng.choice((2**21, 2**27, 2**28 - 1)))),
    "stray far note": lambda rng, good: midi(
        [*melody(rng), *note(60, 100, rest=rng.choice((2**21, 2**24, 2**28 - 1)))], ticks=rng.choice((24, 480))),
    "longest rests": lambda rng, good: midi([e for _ in range(40) for e in note(60, 2**28 - 1, rest=2**28 - 1)]),
    "absurd track length": lambda rng, good: relabelled(rng, good, (0, 1, 7, 2**16, 2**31, 2**32 - 1)),
    "no status": lambda rng, good: midi([(0, b"\x3c\x50"), (9, b"\x3c\0"), *melody(rng)]),
    "running status": lambda rng, good: midi([(0, b"\x90\x3c\x50"), *[(60, bytes((60, 80 * (i % 2)))) for i in range(60)]]),
    "frames a second": lambda rng, good: midi(melody(rng), ticks=rng.choice((0xE728, 0xE804, 0xE300, 0xE250, 0x8000))),
    "65,535 tracks": lambda rng, good: good[:10] + b"\xff\xff" + good[12:],
    "a thousand tracks": lambda rng, good: midi(*[note(rng.randrange(128), 100)] * 1000),
    "outside the piano": lambda rng, good: midi(
        [e for _ in range(20) for e in note(rng.choice((0, 5, 120, 127)), 100)]),
    "pedal never lifted": lambda rng, good: midi([(0, b"\xb0\x40\x7f"), *melody(rng)]),
    "page": lambda rng, good: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "empty": lambda rng, good: b"",
}


def write_files(folder, count, seed):
    """{name: kind} of `count` broken files in a folder, and of ten good ones among them."""
    rng, kinds = random.Random(seed), {}
    for i in range(10):
        kinds[f"good {i}.mid"] = "good"
        notes = [e for n in range(40) for e in note(40 + (n * 7 + i) % 40, 240)]
        (folder / f"good {i}.mid").write_bytes(midi([tempo(500_000)], notes))
    good = midi([tempo(500_000), metre(4, 2)], melody(rng), melody(rng, channel=1))
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        kinds[f"{i:05d} {kind}.mid"] = kind
        (folder / f"{i:05d} {kind}.mid").write_bytes(KINDS[kind](rng, good))
    names = {"a folder.mid": os.mkdir, "a pipe.mid": os.mkfifo, "a link.mid": lambda path: os.symlink("nowhere", path)}
    for name, make in names.items():
        make(folder / name)
    (folder / os.fsdecode(b"not \xff UTF-8.mid")).write_bytes(good)
    some = midi([e for i in range(100) for e in note(21 + i % 88, 10)])
    many = some[:22] + some[22:-4] * 10_000 + some[-4:]
    (folder / MILLION).write_bytes(relabelled(rng, many, [len(many) - 22]))
    kinds |= {name: name for name in (*names, os.fsdecode(b"not \xff UTF-8.mid"))}
    return kinds | {MILLION: "a million notes.mid"}


def check(count, seed=0):
    """Counts of (kind, outcome) over `count` broken files; asserts that none is lost and every good one used."""
    vocab = pg.Vocabulary(pg.MusicConfig())
    with tempfile.TemporaryDirectory() as work:
        kinds = write_files(Path(work), count, seed)
        pieces = pg.read_folder(Path(work), vocab, "")
    outcomes = {p.path: p.problem or "used" for p in pieces}
    assert len(pieces) == len(outcomes) and set(outcomes) == set(kinds)
    assert all(outcomes[name] == "used" for name, kind in kinds.items() if kind == "good")
    for p in pieces:
        assert p.problem or 0 <= p.seconds < pg.DAY and p.notes > 0 and p.ids.max() < len(vocab.words), p.path
    assert [p.notes for p in pieces if p.path == MILLION] == [1_000_000]
    return collections.Counter((kind, outcomes[name]) for name, kind in kinds.items())


def main():
    """Check, and print how many files of each kind ended how."""
    start, count = time.monotonic(), int(sys.argv[1])
    counts = check(count, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{number:6} {kind}: {outcome}"[:150].encode("ascii", "replace").decode())
    used = sum(n for (_, outcome), n in counts.items() if outcome == "used")
    print(f"files: {counts.total()}\nused: {used}\nseconds: {time.monotonic() - start:.1f}")


if __name__ == "__main__":
    main()
