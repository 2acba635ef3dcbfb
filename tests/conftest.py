"""Tiny MIDI files, written with symusic, and a tiny model: everything the tests read is made here."""

import os
import struct
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in models as tiny as these, threads cost more than they save

import numpy as np
import pytest
import torch
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg  # noqa: E402

TPQ = 480
TINY = [
    "--n-layer",
    "2",
    "--n-head",
    "2",
    "--n-embd",
    "32",
    "--block-size",
    "64",
    "--batch-size",
    "4",
    "--device",
    "cpu",
]


def write_midi(path, tracks, metre=(4, 4), bpm=120.0, controls=(), drums=()):
    """Write tracks, lists of (start in quarters, length in quarters, pitch, velocity); those numbered in drums are drums.

    controls are (track, quarter, number, value).
    """
    score = Score(TPQ)
    score.tempos.append(Tempo(0, bpm))
    score.time_signatures.append(TimeSignature(0, *metre))
    for number, notes in enumerate(tracks):
        track = Track(is_drum=number in drums)
        for start, length, pitch, velocity in notes:
            track.notes.append(Note(round(start * TPQ), round(length * TPQ), pitch, velocity))
        for t, quarter, control, value in controls:
            if t == number:
                track.controls.append(ControlChange(round(quarter * TPQ), control, value))
        score.tracks.append(track)
    path.parent.mkdir(parents=True, exist_ok=True)
    score.dump_midi(path)
    return path


def scale(seed=0, bars=8):
    """Two hands that run up and down, a little different for each seed."""
    right = [(i / 2, 0.5, 60 + (i * (1 + seed % 3) + seed) % 24, 70 + i % 20) for i in range(bars * 8)]
    left = [(i * 2, 2, 36 + (i * 5 + seed) % 12, 60) for i in range(bars * 2)]
    return [right, left]


def write_folder(path):
    """Write twelve small two-track pieces."""
    for i in range(12):
        write_midi(path / f"piece{i:02d}.mid", scale(i))
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of twelve small two-track pieces."""
    return write_folder(tmp_path / "midi")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer():
    """The default tokenizer."""
    return pg.make_tokenizer(pg.MusicConfig())


def table(V):
    """Where V made-up ids lead: two begin bars, ten are steps in a bar, two are metres, twenty pitches, the rest nowhere."""
    table = torch.full((4, V), -1)
    table[0] = 0
    table[2, 0], table[3, 0] = 16, 60  # before the first metre and the first pitch
    table[0, 1:3], table[1, 1:3] = 1, 0
    table[1, 3:13] = torch.arange(10)
    table[2, 13:15] = torch.tensor([12, 24])
    table[3, 20:40] = torch.arange(50, 70)
    return table


def chunk(name, data):
    """A RIFF chunk, padded to an even length."""
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


@pytest.fixture
def soundfont(tmp_path):
    """A soundfont whose only preset is an endless sine: 441 Hz, said to be an A4 (key 69)."""
    rate, key = 44_100, 69
    wave = np.round(20_000 * np.sin(2 * np.pi * np.arange(4410) / 100)).astype("<i2").tobytes() + b"\0" * 92
    name = lambda text: text.encode().ljust(20, b"\0")  # noqa: E731
    pairs = lambda *values: b"".join(struct.pack("<HH", *v) for v in values)  # noqa: E731
    info = chunk(b"ifil", struct.pack("<HH", 2, 1)) + chunk(b"isng", b"EMU8000\0") + chunk(b"INAM", b"sine\0\0")
    preset = b"".join(name(n) + struct.pack("<HHHIII", 0, 0, bag, 0, 0, 0) for n, bag in (("sine", 0), ("EOP", 1)))
    header = name("sine") + struct.pack("<IIIIIBbHH", 0, 4410, 100, 4400, rate, key, 0, 0, 1)
    pdta = chunk(b"phdr", preset) + chunk(b"pbag", pairs((0, 0), (1, 0))) + chunk(b"pmod", bytes(10))
    pdta += chunk(b"pgen", pairs((41, 0), (0, 0)))  # 41: the instrument
    pdta += chunk(b"inst", name("sine") + struct.pack("<H", 0) + name("EOI") + struct.pack("<H", 1))
    pdta += chunk(b"ibag", pairs((0, 0), (2, 0))) + chunk(b"imod", bytes(10))
    pdta += chunk(b"igen", pairs((54, 1), (53, 0), (0, 0)))  # 54: looped, 53: the sample
    pdta += chunk(b"shdr", header + name("EOS") + bytes(26))
    lists = [(b"INFO", info), (b"sdta", chunk(b"smpl", wave)), (b"pdta", pdta)]
    path = tmp_path / "sine.sf2"
    path.write_bytes(chunk(b"RIFF", b"sfbk" + b"".join(chunk(b"LIST", kind + data) for kind, data in lists)))
    return path
