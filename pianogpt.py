# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   "torch>=2.9,<2.14",
#   "miditok>=3.1.0,<3.2",
#   "symusic>=0.6.0,<0.7",
#   "numpy>=2.0,<3",
#   "safetensors>=0.5,<1",
#   "pebble>=5.0.6,<6",
#   "filelock>=3.16,<5",
#   "tqdm>=4.66,<5",
# ]
# ///
"""PianoGPT learns from a folder of MIDI files and generates new piano music.

    python pianogpt.py                      train on my_midis/, or resume an unfinished run
    python pianogpt.py --generate           generate three pieces (train first if there is no model)
    python pianogpt.py --generate --prompt song.mid --bars 32      continue a piece of your own
    python pianogpt.py --generate --prompt song.mid --rewrite 9-12      rewrite only these bars
    python pianogpt.py --evaluate DIR       measure the model's loss on the MIDI files in DIR

In:   a folder of MIDI files. Each is read as a single piano part: drums are dropped, all other
      tracks are merged, and the sustain pedal is folded into the note lengths.
Out:  pianogpt.safetensors (the model), pianogpt.safetensors.csv (its log), samples/*.mid

How it works: a tokenizer (REMI, from MidiTok) turns music into tokens, a Transformer learns to
predict the next token, and sampling one token after another generates new music. For each token
the model sees an id, a time and a pitch; it also sees how often each id occurred in the 1,024
tokens before its context window. One bar:

    token               id  time  pitch
    BOS                  1     0     60   start of the piece: a silent bar of 4/4, on middle C
    Bar                  3    96     60   start of a bar
    TimeSig_4/4        927    96     60   four quarter notes to the bar
    Position_0         400    96     60   the first of the bar's 96 positions, 24 per beat
    Tempo_120.0        876    96     60   120 quarter notes per minute
    Chord_C:maj        688    96     48   the harmony; its pitch is the root's
    Pitch_60            43    96     60   a note: middle C,
    Velocity_83        112    96     60   rather loud,
    Duration_2.0.24    171    96     60   lasting 2 + 0/24 beats
    Pitch_64            47    96     64   E at the same time, as no Position comes between
    Velocity_83        112    96     64
    Duration_2.0.24    171    96     64
    Position_48        448   144     64   two beats later
    Chord_F:maj        693   144     53   the harmony changes
    Pitch_65            48   144     65   F, softer, for one beat
    Velocity_67        108   144     65
    Duration_1.0.24    147   144     65

Part I (sections 1 to 6) is the idea. Part II (sections 7 to 11) is the machinery around it.

To change ...                          look at ...
    a default, a flag                  1  Settings: every flag is a field there
    how a file is read                 2  parse_midi, make_piano
    how music becomes tokens           3  read_piece and tokenize, which call each step in order
    the tokens and what they mean      3  Tokenizer, Vocabulary
    the size or the layers             4  PianoGPT, Block
    what the model trains on           5  Batches, cut_windows
    the optimizer, the learning rate   5  make_optimizer, learning_rate
    how the next token is chosen       6  RULES
    how bars are filled in             5  move_gaps; 6  GapWriting

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of size hs = C / nh, V tokens in the
vocabulary; (B T, C) is (B, T, C) flattened to one row per token.

The checkpoint is a single safetensors file: tensors, plus a JSON string with everything else (see
Checkpoint). It contains no code. On the same CPU with the same number of threads, a resumed run
equals an uninterrupted one bit for bit: batch i depends only on the seed, i, the music and the
settings, and all other state is in the checkpoint.

References: Huang & Yang 2020 (REMI), Fradet et al. 2021 (MidiTok), Vaswani et al. 2017 (the
Transformer), Su et al. 2021 (rotary positions), Shazeer 2020 (SwiGLU), Jordan et al. 2024 (Muon).
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as WorkerTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

# ---- Handle Ctrl-C even while libraries load, which takes seconds. Feel free to skip to Part I.

unfinished: set[Path] = set()  # files to delete if a signal ends the program
main_process = 0  # its PID; forked workers inherit the handlers, but must only exit


def stop_at_once(number: int, frame) -> None:
    """Handle a signal while there is nothing to save: leave no workers or half-written files."""
    try:
        if os.getpid() == main_process:
            for worker in multiprocessing.active_children():
                worker.kill()
            for path in unfinished:
                path.unlink(missing_ok=True)
            os.write(2, b"pianogpt: stopped\n")
    finally:
        os._exit(128 + number)  # even if the terminal is gone, and nothing can be written


def signal_handlers() -> dict[int, Callable]:
    """The handlers of Ctrl-C, SIGTERM and SIGHUP by number, except for ignored signals (nohup)."""
    handlers = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.getsignal(number)
    return handlers


def handle_signals(handlers: dict[int, Callable]) -> None:
    """Install signal handlers, given by signal number."""
    global main_process
    main_process = os.getpid()
    for number, handler in handlers.items():
        signal.signal(number, handler)


if __name__ == "__main__":
    handle_signals(dict.fromkeys(signal_handlers(), stop_at_once))
elif __name__ == "__mp_main__":  # a spawned (not forked) worker: the main process stops it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

try:
    import miditok
    import numpy as np
    import safetensors.torch
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
    from pebble import ProcessExpired, ProcessPool
    from symusic import KeySignature, Note, Score, Tempo, TextMeta, TimeSignature, Track
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm
except ImportError as e:
    print(f"pianogpt: {e}: run pip install -r requirements.txt (Python 3.10+)", file=sys.stderr)
    sys.exit(2)

VERSION = "2.0"
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun sets both
RANK = int(os.environ.get("RANK") or 0) if PROCESSES > 1 else 0  # index of this process


class UserError(Exception):
    """A mistake that the user can fix; the message is one sentence that says how."""


def say(text: str, stream: str = "stdout") -> None:
    """Print one line above the progress bar, on rank 0 only."""
    if RANK != 0:
        return
    # File names may contain characters that must not reach a terminal.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    try:
        tqdm.write(text, file=getattr(sys, stream))
        getattr(sys, stream).flush()
    except OSError:  # the output pipe is closed, or the disk is full: carry on silently
        setattr(sys, stream, io.StringIO())


def count(n: int, noun: str) -> str:
    """A number with its noun: "1 file", "2 files"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def progress_bar(*args, **kwargs) -> tqdm:
    """A progress bar on rank 0; none when stderr is not a terminal."""
    return tqdm(*args, disable=None if RANK == 0 else True, **kwargs)


# ==== Part I: the idea

# ---- 1. Settings: flags, --help and checkpoints all read these fields


def setting(default, text: str, low=None, high=10**9, off=False, resumable=False):
    """A dataclass field that becomes a command-line flag.

    low, high: its limits; off: 0 is also allowed, and turns it off; resumable: a resumed run may
    change it.
    """
    metadata = {"text": text, "low": low, "high": high, "off": off, "resumable": resumable}
    return field(default=default, metadata=metadata)


@dataclass
class ProgramSettings:
    """What to do, and where."""

    generate: bool = setting(False, "generate music; train first if no pianogpt.safetensors exists")
    evaluate: str = setting("", "folder of MIDI files to evaluate the model on")
    export: str = setting("", "file to export the best weights to, in 16 bits, for sharing")
    about: str = setting("", "note to store in the export: training music, license, ...")
    checkpoint: str = setting("pianogpt.safetensors", "file that holds the model")
    midi_dir: str = setting("my_midis", "folder of MIDI files to train on, at any depth")
    cache_dir: str = setting(".pianogpt-cache", "folder for tokenized files; empty: no cache")
    init_from: str = setting("", "trained model to fine-tune on your music, in 300 small steps")
    fresh: bool = setting(False, "start over; an existing checkpoint is renamed")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...; auto: cuda or cpu")
    float32: bool = setting(False, "train in float32 even where bfloat16 is faster")
    compile: bool | None = setting(
        None, "torch.compile the model; by default only on a CPU, for runs long enough to benefit"
    )


@dataclass
class SampleSettings:
    """The music to generate."""

    num_samples: int = setting(3, "number of pieces to generate", 1, 100_000)
    prompt: str = setting("", "MIDI file to continue, or to rewrite in part")
    prompt_bars: int = setting(0, "bars of the prompt to use; 0: all of it", 0)
    continuation_only: bool = setting(False, "leave the prompt out of the output file")
    rewrite: str = setting("", "bars of the prompt to rewrite, like 9-12 or 3-4,9; others stay")
    bars: int = setting(
        0, "total bars, including the prompt; 0: the piece ends after 8 to 24 new bars", 0
    )
    chords: str = setting("", 'chords to follow, bar by bar, repeated to the end: "C Am F,G7 C"')
    style: str = setting("", 'style to write in; the "styles:" line lists those a model knows')
    guidance: float = setting(
        1.0, "how strongly to follow --style; 1: as learned; other values take twice as long", 0, 9
    )
    division: int = setting(
        0, "start notes on N-ths of a quarter (4: 16ths); 0: as in the prompt, or anywhere", 0, 48
    )
    tempo: float = setting(0.0, "quarter notes per minute; 0: the model decides", 4, 1000, off=True)
    temperature: float = setting(
        0.95,
        "randomness of pitches and chords; rhythm and loudness are sampled as learned; "
        "0: always the likeliest token, rhythm included, so only one piece",
        0.01,
        10,
        off=True,
    )
    top_k: int = setting(0, "sample from the K likeliest tokens; 0: from all", 0)
    top_p: float = setting(
        0.0, "sample from the likeliest tokens that add up to this probability; 0: from all", 0, 1
    )
    min_p: float = setting(
        0.0, "sample from tokens at least this likely relative to the likeliest; 0: from all", 0, 1
    )
    samples_dir: str = setting("samples", "folder for the generated files; nothing is overwritten")

    @property
    def pieces(self) -> int:
        """Number of pieces to generate; just one at temperature 0, where all would be the same."""
        return 1 if self.temperature == 0 else self.num_samples


@dataclass
class DataSettings:
    """The training music."""

    val_percent: float = setting(10.0, "percentage of works held out for validation", 0, 99)
    piece_is_folder: bool = setting(False, "treat all files in a folder as one work")
    transpose: int = setting(5, "transpose training music randomly by up to N semitones", 0, 24)
    style_from_folder: bool = setting(
        False, "each folder directly inside --midi-dir is the style of its files"
    )
    gap_percent: float = setting(
        25.0, "percentage of windows, of those with two bar lines, that teach --rewrite", 0, 100
    )


@dataclass
class TokenSettings:
    """How music becomes tokens."""

    grid: int = setting(24, "positions per beat; 24 fits triplets and 32nd notes exactly", 1, 48)
    velocities: int = setting(32, "loudness levels", 1, 127)


@dataclass
class ModelSettings:
    """The size of the Transformer."""

    n_layer: int = setting(4, "layers", 1, 1000)
    n_head: int = setting(4, "attention heads per layer", 1, 1000)
    n_embd: int = setting(128, "channels", 2, 65_536)
    block_size: int = setting(256, "context length in tokens", 8, 65_536)


@dataclass
class TrainSettings:
    """How the model is trained."""

    steps: int = setting(900, "optimizer steps in total", 1, resumable=True)
    batch_size: int = setting(16, "sequences per step", 1, 100_000)
    lr: float = setting(3e-4, "peak learning rate; make_optimizer scales it", 0, 1, resumable=True)
    warmup: int = setting(
        200, "steps of learning-rate warmup; capped at a fifth of all steps", 0, resumable=True
    )
    weight_decay: float = setting(1.0, "weight decay of blocks and head; 0: off", 0)
    eval_every: int = setting(250, "steps between validations", 1, resumable=True)
    save_every: int = setting(0, "steps between saves; 0: every two minutes", 0, resumable=True)
    accumulate: int = setting(1, "split each batch into N parts to save memory", 1, resumable=True)
    seed: int = setting(0, "random seed; --generate picks one if none is given", 0, 2**31 - 1)


@dataclass
class Settings:
    """All settings, grouped as in --help."""

    program: ProgramSettings = field(default_factory=ProgramSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def check_settings(settings: Settings) -> None:
    """Raise UserError for a setting that is out of range or contradicts another."""
    for group in vars(settings).values():
        for f in fields(group):
            low = f.metadata["low"]
            high = f.metadata["high"]
            value = getattr(group, f.name)
            is_off = f.metadata["off"] and value == 0
            if low is not None and not is_off and not low <= value <= high:
                lower = f"0 or from {low:,}" if f.metadata["off"] else f"from {low:,}"
                raise UserError(f"{flag(f.name)} is {value} but must be {lower} to {high:,}")
    if settings.model.n_embd % (2 * settings.model.n_head):  # a head rotates pairs of channels
        raise UserError("--n-embd must be a multiple of 2 x --n-head")


# ---- 2. Reading: from the bytes of a MIDI file to the notes of one piano

MOST_BEATS = 12  # in a bar
TIME_SIGNATURES = dict.fromkeys((4, 8, 16), (1, MOST_BEATS))  # beat unit: fewest and most beats
LONGEST_NOTE = 24  # quarter notes; in recorded performances, one note in 6,000 is longer
# 19.8 to 304 quarter notes per minute in steps of 2%, about the smallest audible change.
TEMPO_STEP = 1.02
TEMPO_RANGE = (120 / TEMPO_STEP**91, 120 * TEMPO_STEP**47)
TEMPO_STEPS = 91 + 1 + 47
LOWEST_KEY = 21  # MIDI pitches of a piano's outermost keys
HIGHEST_KEY = 108
# Kinds of MIDI message
NOTE_OFF = 0x80
NOTE_ON = 0x90  # with velocity 0, this too is a note off
CONTROL = 0xB0
# How many data bytes follow each kind; kinds without a name are skipped
DATA_BYTES = {NOTE_OFF: 2, NOTE_ON: 2, 0xA0: 2, CONTROL: 2, 0xC0: 1, 0xD0: 1, 0xE0: 2}
SYSTEM_EXCLUSIVE = (0xF0, 0xF7)  # a message, and a continuation of one
META = 0xFF
END_OF_TRACK = 0x2F  # kinds of meta event
SET_TEMPO = 0x51
TIME_SIGNATURE = 0x58
KEY_SIGNATURE = 0x59
DRUMS = 9  # the drum channel, counting from 0
SUSTAIN = 64  # controller numbers: the right pedal
RESET = 121  # reset all controllers
ALL_OFF = (123, 120)  # all notes off, all sound off
PEDAL_DOWN = 64  # controller values from here up mean the pedal is down
# Longer presses are ignored: a file that forgets to lift the pedal would smear its notes.
LONGEST_PEDAL = 48  # quarter notes
# Quarter notes, for a pedal still down at the last note: the file may simply never lift it.
LONGEST_LAST_PEDAL = 16
LONGEST_PIECE = 86_400  # seconds, i.e. a day; also the limit in quarter notes
MOST_TICKS = 2**31 - 2  # symusic stores times in 32 bits, and the shortest note needs one more
# What tokens cannot represent, as reported to the user
OUT_OF_RANGE = "notes outside the piano's range dropped"
TEMPO_CHANGED = "tempos outside 20 to 300 changed"
STRIKES_MERGED = "repeated notes in one grid position merged"

Notes = dict[str, np.ndarray]  # symusic's note columns: time, duration, pitch, velocity


class MidiEvent(NamedTuple):
    """A message in a MIDI file."""

    tick: int  # from the start of the file
    track: int
    kind: int  # NOTE_ON, NOTE_OFF, CONTROL, or the type of a meta event, which is below 0x80
    channel: int  # 0 to 15; 0 for a meta event
    data: bytes

    @property
    def strikes_key(self) -> bool:
        """Whether it begins a note: a note on with velocity 0 ends one."""
        return self.kind == NOTE_ON and self.data[1] > 0


@dataclass
class MidiFile:
    """The musical content of a MIDI file."""

    tpq: int  # ticks per quarter note
    events: list[MidiEvent]  # of all tracks, sorted by tick; ties keep the file's order
    uncounted_tracks: int  # how many more there are than the header claims

    def meta_events(self, kind: int, length: int) -> Iterator[tuple[int, bytes]]:
        """(tick, data) of each meta event of one kind with at least `length` bytes of data."""
        for event in self.events:
            if event.kind == kind and len(event.data) >= length:
                yield event.tick, event.data

    def tempos(self) -> dict[int, float]:
        """{tick: quarter notes per minute}; if a tick has several, the last one counts."""
        tempos = {}
        for tick, data in self.meta_events(SET_TEMPO, 3):
            microseconds = int.from_bytes(data[:3], "big")  # per quarter note
            if microseconds:
                tempos[tick] = 60e6 / microseconds
        return tempos

    def time_signatures(self) -> dict[int, tuple[int, int]]:
        """{tick: (beats per bar, beat unit)} of the time signatures."""
        metres = {}
        for tick, data in self.meta_events(TIME_SIGNATURE, 2):
            beats, exponent = data[:2]
            if beats and exponent < 8:
                metres[tick] = (beats, 2**exponent)
        return metres

    def key_signatures(self) -> dict[int, tuple[int, int]]:
        """{tick: (sharps, is_minor)} of the key signatures; flats count as negative sharps."""
        keys = {}
        for tick, data in self.meta_events(KEY_SIGNATURE, 2):
            sharps = int.from_bytes(data[:1], "big", signed=True)
            if abs(sharps) <= 7 and data[1] <= 1:
                keys[tick] = (sharps, data[1])
        return keys


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """Read a variable-length number, such as a time or length; returns it and where it ends.

    It has seven bits per byte. Raises UserError. Like everything that read_track calls, it raises
    IndexError if the data ends too soon.
    """
    value = 0
    for place in range(at, at + 4):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    raise UserError("damaged: a number longer than 4 bytes")


def read_values(data: bytes, at: int, kind: int) -> bytes:
    """The data bytes of a channel message. Raises UserError or IndexError."""
    if kind not in DATA_BYTES:
        raise UserError("damaged: a message without a status byte")
    values = data[at : at + DATA_BYTES[kind]]
    if len(values) < DATA_BYTES[kind]:
        raise IndexError
    if max(values) >= 0x80:
        raise UserError("damaged: a value above 127")
    return values


def read_meta(data: bytes, at: int) -> tuple[int, bytes, int]:
    """The kind and content of a meta event, and where it ends. Raises UserError or IndexError."""
    kind = data[at]
    if kind >= 0x80:
        raise UserError(f"damaged: a meta event {kind:#x}, which MIDI files do not allow")
    length, at = read_number(data, at + 1)
    return kind, data[at : at + length], at + length


def read_track(data: bytes, track: int) -> list[MidiEvent]:
    """The notes, control changes and meta events of a track.

    System exclusive messages, which are meant for one particular synthesizer, are skipped. Raises
    UserError, or IndexError if the track is cut off.
    """
    events = []
    tick = 0
    at = 0
    running = 0  # status byte of the last channel message, which the next may omit if it is equal
    while at < len(data):
        delta = data[at]
        at += 1
        if delta >= 0x80:  # most are one byte; a call for each would cost a fifth of the time
            delta, at = read_number(data, at - 1)
        tick += delta
        status = data[at]
        if status == META:
            kind, content, at = read_meta(data, at + 1)
            events.append(MidiEvent(tick, track, kind, 0, content))
            if kind == END_OF_TRACK:
                break
        elif status in SYSTEM_EXCLUSIVE:
            length, at = read_number(data, at + 1)
            at += length
        elif status > SYSTEM_EXCLUSIVE[0]:
            raise UserError(f"damaged: a message {status:#x}, which MIDI files do not allow")
        else:
            if status >= 0x80:
                running = status
                at += 1
            kind = running & 0xF0
            values = read_values(data, at, kind)
            if kind in (NOTE_OFF, NOTE_ON, CONTROL):
                events.append(MidiEvent(tick, track, kind, running & 0x0F, values))
            at += len(values)
    if at > len(data):  # the last message or meta event runs past the end
        raise IndexError
    return events


def unwrap(data: bytes) -> bytes:
    """The MIDI file inside a RIFF (.rmi) or MacBinary wrapper; other data unchanged."""
    if data[:4] == b"RIFF" and data[8:12] == b"RMID":
        return data[max(0, data.find(b"MThd")) :]
    if data[128:132] == b"MThd":
        return data[128:]
    return data


def parse_midi(data: bytes) -> MidiFile:
    """The bytes of a MIDI file as events. Raises UserError.

    A file is a series of chunks: a four-byte name, a length, and that many bytes of data. The
    header gives the number of tracks. Some programs count too few, so every track found is read;
    if there are fewer than the header says, the file was cut off.
    """
    data = unwrap(data)
    if data[:4] != b"MThd" or len(data) < 14:
        raise UserError("not a MIDI file")
    form = int.from_bytes(data[8:10], "big")
    tracks = int.from_bytes(data[10:12], "big")
    tpq = int.from_bytes(data[12:14], "big")
    if form == 2:
        raise UserError("MIDI format 2, several songs in one file: save each one separately")
    if tpq >= 0x8000:
        raise UserError("it is timed in film frames (SMPTE), not in beats: save it with a tempo")
    if tpq == 0:
        raise UserError("zero ticks per quarter note")
    events = []
    found = 0
    at = 8 + int.from_bytes(data[4:8], "big")
    while at + 8 <= len(data):
        name = data[at : at + 4]
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        chunk = data[at + 8 : at + 8 + length]
        at += 8 + length
        if name == b"MTrk":
            found += 1
            try:
                track_events = read_track(chunk, found)
                is_complete = bool(track_events) and track_events[-1].kind == END_OF_TRACK
                if len(chunk) < length and not is_complete:
                    raise IndexError
            except IndexError:
                raise UserError(f"damaged: track {found} is cut off") from None
            events += track_events
    if found < tracks:
        raise UserError(f"damaged: only {count(found, 'track')} of {tracks}")
    events.sort(key=lambda event: event.tick)
    return MidiFile(tpq, events, found - tracks)


@dataclass
class PlayedNote:
    """A note as it sounds; times in ticks."""

    start: int
    end: int
    pitch: int
    velocity: int


class Channel:
    """One of the 16 channels of a MIDI file: its keys, and the pedal that sustains their notes."""

    def __init__(self, tpq: int, unended: dict[tuple[int, int], int]):
        """unended: by (track, pitch), how many notes have no note off."""
        self.notes: list[PlayedNote] = []
        self.unended = unended
        # By (track, pitch), oldest first: two hands in two tracks may hold down the same key.
        self.keys_down: dict[tuple[int, int], list[PlayedNote]] = {}
        self.lifted_at: dict[tuple[int, int], int] = {}  # tick when each key was last lifted
        self.ringing: list[PlayedNote] = []  # their keys are up, but the pedal holds them
        self.pedal_down_at: int | None = None
        self.longest_pedal = LONGEST_PEDAL * tpq
        self.ignored_pedals = 0

    def play(self, event: MidiEvent) -> None:
        """Carry out one message."""
        first, second = event.data
        if event.kind == CONTROL:
            self.control(event.tick, number=first, value=second)
        elif event.strikes_key:
            key = (event.track, first)
            self.lift_forgotten(key)
            note = PlayedNote(event.tick, event.tick, pitch=first, velocity=second)
            self.notes.append(note)
            self.keys_down.setdefault(key, []).append(note)
        else:
            self.lift_key(event.tick, (event.track, first))

    def control(self, tick: int, number: int, value: int) -> None:
        """Carry out a control change."""
        if number in ALL_OFF:
            self.lift_all_keys(tick)
        if number == SUSTAIN and value >= PEDAL_DOWN:
            if self.pedal_down_at is None:
                self.pedal_down_at = tick
        elif number in (SUSTAIN, RESET, *ALL_OFF):
            self.lift_pedal(tick)

    def lift_all_keys(self, tick: int) -> None:
        """End the notes of all keys that are down, or let them ring."""
        for key in list(self.keys_down):
            self.lift_forgotten(key)
            while self.keys_down[key]:
                self.lift_key(tick, key)

    def lift_key(self, tick: int, key: tuple[int, int]) -> None:
        """End the oldest note of a key, or let it ring if the pedal is down."""
        if not self.keys_down.get(key):
            return
        self.lifted_at[key] = tick
        note = self.keys_down[key].pop(0)
        note.end = tick
        # A pedal that goes down at the very moment a note ends does not catch it.
        if self.pedal_down_at is not None and self.pedal_down_at < tick:
            self.ringing.append(note)

    def lift_forgotten(self, key: tuple[int, int]) -> None:
        """End unended notes of a key that were struck before it was last lifted.

        A note off ends the oldest note. If a key is struck, struck again without a note off, and
        lifted, that ends the first note, and the second would sound until the next note off, which
        is the third's. So when the key is struck a third time, the second ends where it was lifted.
        """
        down = self.keys_down.get(key, [])
        lifted_at = self.lifted_at.get(key, 0)
        while down and down[-1].start < lifted_at and self.unended.get(key, 0) > 0:
            self.unended[key] -= 1
            self.lift_key(lifted_at, key)

    def lift_pedal(self, tick: int) -> None:
        """End the ringing notes here, or with their keys if no pianist holds a pedal so long."""
        if self.pedal_down_at is None:
            return
        for key in self.unended:
            self.lift_forgotten(key)
        if tick - self.pedal_down_at <= self.longest_pedal:
            for note in self.ringing:
                note.end = tick
        else:
            self.ignored_pedals += 1
        self.ringing = []
        self.pedal_down_at = None

    def finish(self, tick: int, longest_pedal: int) -> None:
        """End the music: lift all keys that are still down, and the pedal."""
        self.longest_pedal = longest_pedal
        self.lift_all_keys(tick)
        self.lift_pedal(tick)


def select(notes: Notes, index: np.ndarray) -> Notes:
    """The notes that an index array selects."""
    return {column: values[index] for column, values in notes.items()}


def merge_unisons(notes: Notes) -> Notes:
    """Notes sorted by pitch, then time; simultaneous strikes of a key become one note.

    It gets the loudest velocity and the longest duration.
    """
    notes = select(notes, np.lexsort((notes["time"], notes["pitch"])))
    is_new = (np.diff(notes["pitch"]) > 0) | (np.diff(notes["time"]) > 0)
    first = np.flatnonzero(np.append(True, is_new))
    merged = select(notes, first)
    merged["velocity"] = np.maximum.reduceat(notes["velocity"], first)
    merged["duration"] = np.maximum.reduceat(notes["duration"], first)
    return merged


def repair_overlaps(notes: Notes) -> Notes:
    """Notes sorted by time, then pitch; striking a key that still sounds ends its old note."""
    notes = merge_unisons(notes)
    same_key = np.diff(notes["pitch"]) == 0
    until_struck_again = np.where(same_key, np.diff(notes["time"]), np.iinfo(np.int32).max)
    notes["duration"][:-1] = np.minimum(notes["duration"][:-1], until_struck_again)
    return select(notes, np.lexsort((notes["pitch"], notes["time"])))


def find_unended(events: list[MidiEvent]) -> dict[int, dict[tuple[int, int], int]]:
    """{channel: {(track, pitch): how many more note ons than note offs}}, where there are more."""
    surplus = Counter()
    for event in events:
        if event.kind in (NOTE_OFF, NOTE_ON):
            surplus[event.channel, event.track, event.data[0]] += 1 if event.strikes_key else -1
    unended = defaultdict(dict)
    for (channel, track, pitch), more in surplus.items():
        if more > 0:
            unended[channel][track, pitch] = more
    return unended


def are_on_piano(notes: Notes) -> np.ndarray:
    """Which notes a piano has keys for, (N,) bool."""
    return (notes["pitch"] >= LOWEST_KEY) & (notes["pitch"] <= HIGHEST_KEY)


def play_notes(midi: MidiFile) -> tuple[Notes, int]:
    """The notes of all channels but the drums as they sound, and how many pedals were ignored.

    Raises UserError if there are no notes, or if they go on for too long.
    """
    channels: dict[int, Channel] = {}
    unended = find_unended(midi.events)
    has_drums = False
    end = 0
    for event in midi.events:
        if event.kind not in (NOTE_OFF, NOTE_ON, CONTROL):
            continue
        if event.channel == DRUMS:
            has_drums = has_drums or event.kind == NOTE_ON
            continue
        if event.kind != CONTROL:
            end = event.tick
        if end > min(LONGEST_PIECE * midi.tpq, MOST_TICKS):
            raise UserError(f"longer than a day, or {LONGEST_PIECE:,} quarter notes")
        if event.channel not in channels:
            channels[event.channel] = Channel(midi.tpq, unended[event.channel])
        channels[event.channel].play(event)
    ignored = 0
    rows = []
    for channel in channels.values():
        channel.finish(end, LONGEST_LAST_PEDAL * midi.tpq)
        ignored += channel.ignored_pedals
        for note in channel.notes:
            duration = max(1, min(note.end, MOST_TICKS) - note.start)
            rows.append((note.start, duration, note.pitch, note.velocity))
    if not rows:
        raise UserError("only drums" if has_drums else "no notes")
    time, duration, pitch, velocity = np.array(rows).T
    return {
        "time": time.astype(np.int32),
        "duration": duration.astype(np.int32),
        "pitch": pitch.astype(np.int8),
        "velocity": velocity.astype(np.int8),
    }, ignored


def split_metre(sixteenths: int, unit: int) -> list[tuple[int, int]]:
    """A bar of `sixteenths` 16th notes as metres in the vocabulary, (beats, beat unit).

    Nearly always just one, but 15/8 becomes 12/8 and 3/8. A beat, with its 24 positions, is at
    most a quarter note, so 2/2 becomes 4/4.
    """
    unit = min(max(unit, 4), 16)
    if sixteenths * unit % 16:
        unit = 16
    beats = sixteenths * unit // 16
    metres = [(MOST_BEATS, unit)] * (beats // MOST_BEATS)
    if beats % MOST_BEATS:
        metres.append((beats % MOST_BEATS, unit))
    return metres


def list_stretches(
    metres: dict[int, tuple[int, int]], end: int
) -> list[tuple[int, tuple[int, int]]]:
    """(end tick, (beats, beat unit)) of each stretch in a single metre, up to the tick `end`.

    metres: {tick: (beats, beat unit)} as in the file; repeating a metre does not change it.
    """
    starts = {0: metres.get(0, (4, 4))}  # 4/4 applies until the first one
    for tick, metre in metres.items():
        if tick < end and metre != list(starts.values())[-1]:
            starts[tick] = metre
    ends = [*list(starts)[1:], end]
    return list(zip(ends, starts.values(), strict=True))


def list_bars(
    metres: dict[int, tuple[int, int]], end: int, tpq: int
) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    """The bars of a file, (start, length, beat unit), and {change: number of stretches}.

    metres: {tick: (beats, beat unit)}; end: of the music, in ticks. Starts and lengths are in 16th
    notes; a bar line that falls between two 16ths moves to the nearest. If the metre changes in
    the middle of a bar, the bar ends there.
    """
    bars = []
    moved = 0
    split = 0
    start = 0
    for end_tick, (beats, unit) in list_stretches(metres, end):
        is_last = end_tick == end
        length = max(1, round(16 * beats / unit))
        is_off_grid = 4 * end_tick % tpq != 0 and not is_last
        if length != 16 * beats / unit or is_off_grid:
            moved += 1
        if len(split_metre(length, unit)) > 1:
            split += 1
        until = math.ceil(4 * end_tick / tpq) if is_last else round(4 * end_tick / tpq)
        while start < until:
            is_cut = start + length > until and not is_last
            bars.append((start, until - start if is_cut else length, unit))
            start += length
        start = until
    return bars, {
        "time signatures split into shorter bars": split,
        "time signatures rounded to 16th notes": moved,
    }


def sign_bars(bars: list[tuple[int, int, int]], tpq: int) -> list[TimeSignature]:
    """The time signatures, all in the vocabulary, for bars as returned by list_bars."""
    signatures = []
    last = None
    for start, length, unit in bars:
        for metre in split_metre(length, unit):
            if metre != last:
                signatures.append(TimeSignature(round(start * tpq / 4), *metre))
            last = metre
            start += metre[0] * 16 // metre[1]
    return signatures


def make_piano(midi: MidiFile) -> tuple[Score, dict[str, int]]:
    """A MIDI file as a score for one piano, and {change: how many}. Raises UserError."""
    struck, ignored = play_notes(midi)
    notes = repair_overlaps(struck)
    too_long = notes["duration"] > LONGEST_NOTE * midi.tpq
    notes["duration"][too_long] = LONGEST_NOTE * midi.tpq

    track = Track(name="Piano", program=0)
    track.notes = Note.from_numpy(**notes)
    piano = Score(midi.tpq)
    piano.tracks.append(track)
    # The music ends with its last note: anything after that is ignored.
    end = piano.end()
    tempos = [(tick, tempo) for tick, tempo in midi.tempos().items() if tick < end]
    piano.tempos = [Tempo(tick, tempo) for tick, tempo in tempos]
    if piano.to("second").end() > LONGEST_PIECE:
        raise UserError(f"longer than a day, or {LONGEST_PIECE:,} quarter notes")
    bars, metre_changes = list_bars(midi.time_signatures(), end, midi.tpq)
    piano.time_signatures = sign_bars(bars, midi.tpq)
    changes = {
        "tracks read beyond the number in the header": midi.uncounted_tracks,
        "simultaneous notes on one key merged": len(struck["time"]) - len(notes["time"]),
        "implausibly long pedals ignored": ignored,
        OUT_OF_RANGE: int((~are_on_piano(notes)).sum()),
        f"notes longer than {LONGEST_NOTE} quarter notes shortened": int(too_long.sum()),
        TEMPO_CHANGED: sum(not TEMPO_RANGE[0] <= tempo <= TEMPO_RANGE[1] for _, tempo in tempos),
    }
    return piano, changes | metre_changes


# ---- 3. Music: what every token means, from one piano to ids and back

LONGEST_SILENCE = 32  # quarter notes; empty bars beyond that are cut
MIDDLE_C = 60
TPQ = 480  # ticks per quarter note in the output files
ROOT_OCTAVE = 48  # a chord's root is given a pitch from 48 to 59, where a left hand plays

CHORD_QUALITIES = {  # MidiTok's name: (suffix after the root, semitones above the root)
    "maj": ("", (0, 4, 7)),
    "min": ("m", (0, 3, 7)),
    "dim": ("dim", (0, 3, 6)),
    "aug": ("aug", (0, 4, 8)),
    "7dom": ("7", (0, 4, 7, 10)),
    "7maj": ("maj7", (0, 4, 7, 11)),
    "7min": ("m7", (0, 3, 7, 10)),
    "7halfdim": ("m7b5", (0, 3, 6, 10)),
}
# Other suffixes that musicians write: (for the same chord, for chords it comes closest to).
CHORD_SPELLINGS = {
    "": ("M maj major", "5 6 69 6/9 2 4 add9 sus sus2 sus4"),
    "m": ("min mi minor -", "m6 min6 madd9"),
    "dim": ("° o", "dim7 °7 o7"),
    "aug": ("+ #5", "aug7 7#5"),
    "7": ("dom7", "9 11 13 7b9 7#9 7b5 7sus4 9sus4"),
    "maj7": ("M7 ma7 Maj7 Δ Δ7", "maj9 M9 maj13"),
    "m7": ("min7 mi7 -7", "m9 min9 m11"),
    "m7b5": ("min7b5 -7b5 ø ø7", ""),
}
ROOT_NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
NATURALS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
NO_CHORD = "N.C."


def list_chords() -> tuple[list[str], np.ndarray]:
    """The symbols of all chords, and their pitch classes as unit vectors, (chords, 12)."""
    symbols = []
    templates = []
    for suffix, semitones in CHORD_QUALITIES.values():
        for root, name in enumerate(ROOT_NAMES):
            symbols.append(name + suffix)
            has_pitch_class = np.isin(np.arange(12), semitones)
            templates.append(np.roll(has_pitch_class / len(semitones) ** 0.5, root))
    return symbols, np.array(templates)


CHORD_SYMBOLS, CHORD_TEMPLATES = list_chords()  # in the order of their token ids
# Weights in find_chords. A fit is a cosine: 1 if just the chord's notes sound, all equally long.
FIT_OF_NO_CHORD = 0.75  # two notes of a triad score 0.82, one note 0.58
ROOT_IN_BASS = 0.02  # a bonus to break ties: C and E alone fit C and Am equally well
SEVENTH_COST = 0.08  # so that a passing note does not make a seventh chord
CHANGE_COST = 0.06  # so that an ornament is not a change of harmony

# How well each pitch class fits C major and C minor (Krumhansl & Kessler, 1982)
KEY_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
# The same for all 24 keys, with zero mean and unit norm: dot products rank like correlations.
KEY_TEMPLATES = np.array([np.roll(p, tonic) for p in KEY_PROFILES.values() for tonic in range(12)])
KEY_TEMPLATES -= KEY_TEMPLATES.mean(axis=1, keepdims=True)
KEY_TEMPLATES /= np.linalg.norm(KEY_TEMPLATES, axis=1, keepdims=True)
MAJOR_TONICS = ["C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
MINOR_TONICS = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"]


@dataclass
class Piece:
    """One file as tokens, or the reason it yielded none."""

    path: str = ""  # relative to the folder, with forward slashes
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))  # BOS ... EOS, (T,)
    time: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # grid positions, (T,)
    pitch: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))  # MIDI, (T,)
    notes: int = 0
    seconds: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)  # what tokens cannot represent: how often
    problem: str = ""  # why the file was skipped
    work: str = ""  # name of the musical work that this is a recording of
    style: str = ""  # its name, or empty
    split: str = ""  # "train", "validation" or "test"


def find_chords(track: Track, beats: np.ndarray, tpq: int) -> np.ndarray:
    """The harmony of each of n beats: indices into CHORD_SYMBOLS, or its length for no chord.

    beats: the ticks of their n + 1 boundaries; tpq: ticks per quarter note. Each beat is a vector:
    the square root of how long each pitch class sounds. A chord's fit is the cosine between its
    template and that vector. A sequence of chords scores the sum of its fits, weighted by beat
    length, minus CHANGE_COST per change; dynamic programming (Viterbi) finds the best one.
    """
    roll = track.pianoroll(modes=["frame"], encode_velocity=False)[0]  # (128, ticks): keys down
    # 120 is a multiple of 12 above the highest key.
    pitch_classes = roll[:120].reshape(10, 12, -1).sum(0, dtype=np.uint8)  # (12, ticks)
    sounding = np.add.reduceat(pitch_classes, beats[:-1], axis=1, dtype=int).T  # (n, 12)
    bass = np.maximum.reduceat(roll, beats[:-1], axis=1).argmax(0)  # (n,) lowest pitch

    share = sounding / np.maximum(1, sounding.sum(1, keepdims=True))
    fits = np.sqrt(share) @ CHORD_TEMPLATES.T  # (n, chords)
    roots = np.arange(len(CHORD_TEMPLATES)) % 12
    is_seventh = (CHORD_TEMPLATES > 0).sum(1) == 4
    fits[roots == bass[:, None] % 12] += ROOT_IN_BASS
    fits -= SEVENTH_COST * is_seventh
    fits = np.column_stack([fits, np.full(len(fits), FIT_OF_NO_CHORD)])
    fits *= sounding.any(1)[:, None]  # silence fits every chord equally
    fits *= np.diff(beats)[:, None] / tpq

    came_from = np.zeros(fits.shape, int)  # the best predecessor of each chord at each beat
    total = np.zeros(fits.shape[1])  # the best score of any sequence that ends in each chord
    for beat, fit in enumerate(fits):
        best = total.argmax()
        stays = total >= total[best] - CHANGE_COST
        came_from[beat] = np.where(stays, np.arange(len(total)), best)
        total = np.maximum(total, total[best] - CHANGE_COST) + fit
    path = [int(total.argmax())]
    for row in reversed(came_from[1:]):  # nothing came before the first beat
        path.append(row[path[-1]])
    return np.array(path[::-1])


# After this token the model writes the contents of a gap. It occurs only in the windows that the
# model reads (see move_gaps, GapWriting): no piece contains it, and the grammar never allows it.
FILL = "Fill_None"


class Tokenizer(miditok.REMI):
    """MidiTok's REMI, with a Chord token at the first note of each bar and each new harmony."""

    def __init__(self, settings: TokenSettings):
        coarse = max(1, settings.grid // 2)
        super().__init__(
            miditok.TokenizerConfig(
                pitch_range=(LOWEST_KEY, HIGHEST_KEY),
                special_tokens=["PAD", "BOS", "EOS"],
                num_velocities=settings.velocities,
                # In beats, of which a quarter note has four where the beat is a 16th.
                beat_res={(0, 4): settings.grid, (4, 12): coarse, (12, 4 * LONGEST_NOTE): 1},
                use_chords=True,
                chord_tokens_with_root_note=True,
                chord_maps={name: semitones for name, (_, semitones) in CHORD_QUALITIES.items()},
                use_tempos=True,
                num_tempos=TEMPO_STEPS,
                tempo_range=TEMPO_RANGE,
                log_tempos=True,
                delete_equal_successive_tempo_changes=True,
                use_time_signatures=True,
                time_signature_range=TIME_SIGNATURES,
                use_pitchdrum_tokens=False,
            )
        )
        self.add_to_vocab(FILL)
        # The vocabulary now has Chord tokens. From here on find_chords replaces MidiTok's own
        # detection, which only finds close-position chords whose notes start together.
        self.config.use_chords = False

    def _create_chords_tokens(self):
        return [*super()._create_chords_tokens(), "Chord_none"]  # in the order of CHORD_SYMBOLS

    def _create_track_events(self, track, ticks_per_beat, tpq, bars, beats, *rest):
        """The events of a track, as MidiTok asks for them, with Chord events added.

        MidiTok then sorts them by time; at equal times, the Chord comes first, as it does here.
        """
        words = self._create_chords_tokens()
        onsets = np.unique(track.notes.numpy()["time"])
        beat_ticks = np.array(beats)
        inside = beat_ticks < track.end()
        beat_ticks = np.append(beat_ticks[inside], track.end())
        chord_of_beat = find_chords(track, beat_ticks, tpq)
        chord = chord_of_beat[np.searchsorted(beat_ticks, onsets, side="right") - 1]
        bar = np.searchsorted(bars, onsets, side="right") - 1
        is_new = np.append(True, (np.diff(bar) > 0) | (np.diff(chord) != 0))
        chord_events = []
        for tick, index in zip(onsets[is_new], chord[is_new], strict=True):
            value = words[index].removeprefix("Chord_")
            chord_events.append(miditok.Event("Chord", value, tick))
        note_events = super()._create_track_events(track, ticks_per_beat, tpq, bars, beats, *rest)
        return chord_events + note_events


class Kind(IntEnum):
    """The kinds of token: what a word begins with, as in Pitch_60, in capitals."""

    PAD = 0
    BOS = 1
    EOS = 2
    BAR = 3
    TIMESIG = 4
    POSITION = 5
    TEMPO = 6
    CHORD = 7
    PITCH = 8
    VELOCITY = 9
    DURATION = 10
    FILL = 11


MAY_FOLLOW = {  # REMI's grammar: the kinds that may follow each kind
    Kind.PAD: [Kind.PAD],
    Kind.BOS: [Kind.BAR],
    Kind.EOS: [Kind.PAD],
    Kind.BAR: [Kind.TIMESIG],
    Kind.TIMESIG: [Kind.POSITION, Kind.BAR],
    Kind.POSITION: [Kind.TEMPO, Kind.CHORD, Kind.PITCH],
    Kind.TEMPO: [Kind.CHORD, Kind.PITCH, Kind.POSITION, Kind.BAR, Kind.EOS],
    Kind.CHORD: [Kind.PITCH],
    Kind.PITCH: [Kind.VELOCITY],
    Kind.VELOCITY: [Kind.DURATION],
    Kind.DURATION: [Kind.PITCH, Kind.POSITION, Kind.BAR, Kind.EOS],
}


class State(NamedTuple):
    """The state of the music after a token; int arrays (B,), one number per sequence."""

    kind: np.ndarray  # of the token, a Kind
    position: np.ndarray  # in the bar, in grid positions
    bar_length: np.ndarray  # in grid positions
    beat_unit: np.ndarray  # 4: a beat is a quarter note; 8: an eighth
    pitch: np.ndarray  # of the last note; after a Chord token, of the chord's root
    chord: np.ndarray  # id of the last Chord token in this bar; 0: none yet
    tempo: np.ndarray  # id of the last Tempo token; 0: none yet
    bar: np.ndarray  # number of Bar tokens so far
    bar_start: np.ndarray  # time at which the bar began, in grid positions

    @property
    def time(self) -> np.ndarray:
        """Grid positions since the piece began."""
        return self.bar_start + self.position


SAYS_NOTHING = -1  # in Vocabulary.says: the token leaves this number of the state unchanged


class Vocabulary:
    """What each id means, the state of the music after it, and which ids may come next.

    words (V,): the tokens as MidiTok spells them, in the order of their ids
    table (9, V): a row for each number of a State: what each token sets it to, or SAYS_NOTHING
    says: the same rows by name; says.pitch[id] is the pitch that a token sets
    may_follow (kinds, V) bool: MAY_FOLLOW, with a column for each id instead of each kind
    """

    def __init__(self, settings: TokenSettings):
        self.grid = settings.grid
        self.tokenizer = Tokenizer(settings)
        self.id_of = self.tokenizer.vocab  # {word: id}
        self.words = sorted(self.id_of, key=self.id_of.get)
        self.bos_id = self.id_of["BOS_None"]
        self.eos_id = self.id_of["EOS_None"]
        self.bar_id = self.id_of["Bar_None"]
        self.fill_id = self.id_of[FILL]
        self.pitch_ids = self.ids_of_kind("Pitch")
        self.chord_ids = self.ids_of_kind("Chord")
        self.rooted_chord_ids = slice(self.chord_ids.start, self.chord_ids.stop - 1)  # not "none"
        self.position_ids = self.ids_of_kind("Position")
        self.tempo_ids = self.ids_of_kind("Tempo")
        self.duration_ids = self.ids_of_kind("Duration")

        rows = [self.meaning(n, *word.split("_")) for n, word in enumerate(self.words)]
        self.table = np.array(rows).T.copy()
        self.says = State(*self.table)
        allowed = np.zeros((len(Kind), len(Kind)), bool)
        for kind, followers in MAY_FOLLOW.items():
            allowed[kind, followers] = True
        self.may_follow = allowed[:, self.says.kind]
        # Position_0 comes right after the time signature or not at all.
        first_position = self.position_ids.start
        self.may_follow[:, first_position] = False
        self.may_follow[Kind.TIMESIG, first_position] = True
        # What legal() compares: the positions after the first, and the pitches of the keys.
        self.later_ids = slice(first_position + 1, self.position_ids.stop)
        self.later_positions = self.says.position[self.later_ids]
        self.key_pitches = self.says.pitch[self.pitch_ids]
        self.lengths = np.array([self.length_of(word) for word in self.words[self.duration_ids]])
        self.has_key = CHORD_TEMPLATES[:, self.key_pitches % 12] > 0  # (chords, keys)

    def ids_of_kind(self, name: str) -> slice:
        """The ids of one kind of token, which are contiguous."""
        ids = self.tokenizer.token_ids_of_type(name)
        assert sorted(ids) == [*range(min(ids), max(ids) + 1)], name
        return slice(min(ids), max(ids) + 1)

    def meaning(self, token_id: int, name: str, value: str) -> State:
        """The meaning of one token, whose word is name_value, as a row of numbers."""
        row = State(Kind[name.upper()], *[SAYS_NOTHING] * (len(State._fields) - 1))
        if name == "BOS":
            # It opens a silent bar of 4/4 before the first real one, on middle C.
            return State(Kind.BOS, 0, 4 * self.grid, 4, MIDDLE_C, 0, 0, bar=0, bar_start=0)
        if name == "Bar":
            return row._replace(position=0, chord=0)
        if name == "TimeSig":
            beats, unit = self.metre_of(token_id)
            return row._replace(bar_length=beats * self.grid, beat_unit=unit)
        if name == "Position":
            return row._replace(position=int(value))
        if name == "Tempo":
            return row._replace(tempo=token_id)
        if name == "Pitch":
            return row._replace(pitch=int(value))
        if name == "Chord":
            row = row._replace(chord=token_id)
            if value != "none":
                root = (token_id - self.chord_ids.start) % 12
                row = row._replace(pitch=ROOT_OCTAVE + root)
        return row

    def advance(self, state: State | None, ids: np.ndarray) -> State:
        """The state after one more token per sequence, ids (B,); a state of None requires BOS."""
        said = self.table[:, ids]  # (numbers, B)
        if state is None:
            assert (ids == self.bos_id).all()
            return State(*said)
        new = State(*np.where(said == SAYS_NOTHING, np.array(state), said))
        is_bar = new.kind == Kind.BAR
        bar_start = state.bar_start + is_bar * state.bar_length
        return new._replace(bar=state.bar + is_bar, bar_start=bar_start)

    def trace(self, ids: np.ndarray) -> State:
        """The state after each token of a piece, ids (T,) from BOS on: advance(), all at once."""
        assert ids[0] == self.bos_id
        said = self.table[:, ids]  # (numbers, T); BOS, which comes first, sets them all
        said_at = np.where(said == SAYS_NOTHING, 0, np.arange(len(ids)))
        last_said_at = np.maximum.accumulate(said_at, axis=1)
        state = State(*np.take_along_axis(said, last_said_at, axis=1))
        is_bar = state.kind == Kind.BAR
        length_before = np.append(0, state.bar_length[:-1])
        bar_start = (is_bar * length_before).cumsum()
        return state._replace(bar=is_bar.cumsum(), bar_start=bar_start)

    def legal(self, state: State) -> np.ndarray:
        """(B, V) bool: the ids that may come next under REMI's grammar.

        Kinds follow one another as in MAY_FOLLOW, positions move forward within the bar, and
        simultaneous notes go from low to high.
        """
        legal = self.may_follow.take(state.kind, axis=0)
        at = self.later_positions
        if self.may_come(state, self.later_ids.start):  # a Position, in some sequence
            is_later = (at > state.position[:, None]) & (at < state.bar_length[:, None])
            legal[:, self.later_ids] &= is_later
        # A Duration ends a note; only a higher one may follow at the same moment.
        is_over = state.kind == Kind.DURATION
        if is_over.any():
            least = np.where(is_over, state.pitch + 1, 0)
            legal[:, self.pitch_ids] &= self.key_pitches >= least[:, None]
        return legal

    def may_come(self, state: State, token_id: int) -> bool:
        """Whether MAY_FOLLOW allows this token next in any of the sequences."""
        return self.may_follow[state.kind, token_id].any()

    def bar_lines(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the n Bar tokens of a piece, ids (T,); its n + 1 bar lines in quarters."""
        state = self.trace(np.append(ids, self.bar_id))
        bars = np.flatnonzero(state.kind == Kind.BAR)
        before = bars - 1  # the last token of each bar
        beats = state.bar_length[before] / self.grid
        quarters = beats * 4 / state.beat_unit[before]
        return bars[:-1], quarters.cumsum() - quarters[0]  # without the silent bar of BOS

    def quarters(self, ids: np.ndarray) -> np.ndarray:
        """The time of each token of a piece, ids (T,), in quarter notes from its first bar on."""
        state = self.trace(ids)
        _, lines = self.bar_lines(ids)
        beats = state.position / self.grid
        return lines[np.maximum(0, state.bar - 1)] + beats * 4 / state.beat_unit

    def chord_changes(self, ids: np.ndarray) -> list[tuple[float, str]]:
        """(time in quarter notes, symbol) of each change of harmony in a piece, ids (T,)."""
        symbols = [*CHORD_SYMBOLS, NO_CHORD]
        quarters = self.quarters(ids)
        changes = []
        last = ""
        for at in np.flatnonzero(self.says.kind[ids] == Kind.CHORD):
            symbol = symbols[ids[at] - self.chord_ids.start]
            if symbol != last:
                changes.append((float(quarters[at]), symbol))
            last = symbol
        return changes

    def length_of(self, word: str) -> float:
        """The length of a Duration token, in grid positions."""
        beats, parts, of = map(int, word.removeprefix("Duration_").split("."))
        return (beats + parts / of) * self.grid

    def metre_of(self, token_id: int) -> tuple[int, int]:
        """The beats per bar and the beat unit of a TimeSig token."""
        beats, unit = self.words[token_id].removeprefix("TimeSig_").split("/")
        return int(beats), int(unit)

    def tempo_of(self, token_id: int) -> float:
        """The tempo of a Tempo token, in quarter notes per minute."""
        return float(self.words[token_id].removeprefix("Tempo_"))

    def quantize(self, piano: Score) -> Score:
        """A one-track score rounded to what the tokens can represent. Raises UserError."""
        quantized = self.tokenizer.preprocess_score(piano)
        if not quantized.tracks:
            raise UserError("no notes within the range of a piano")
        notes = merge_unisons(quantized.tracks[0].notes.numpy())  # two strikes may now coincide
        # MidiTok orders the notes of a chord by length; the grammar wants low to high.
        notes = select(notes, np.lexsort((notes["pitch"], notes["time"])))
        quantized.tracks[0].notes = Note.from_numpy(**notes)
        return quantized

    def encode(self, quantized: Score) -> np.ndarray:
        """The ids (T,) of a quantized score, with BOS but without EOS."""
        [sequence] = self.tokenizer.encode(quantized, no_preprocess_score=True)
        return np.array([self.bos_id, *sequence.ids], np.int16)

    def decode(self, ids: np.ndarray, first_tempo: float | None = None) -> Score:
        """The score of a piece, ids (T,). Without EOS, notes are cut at the end of the last bar.

        first_tempo: the tempo before the first Tempo token; by default that token's own, or 120.
        """
        _, lines = self.bar_lines(ids)
        score = self.tokenizer.decode([ids.tolist()]).resample(TPQ, min_dur=1)
        for track in score.tracks:
            track.name = "Piano"
            notes = repair_overlaps(track.notes.numpy())
            if ids[-1] != self.eos_id:
                end = round(lines[-1] * TPQ)
                notes["duration"] = np.minimum(notes["duration"], end - notes["time"])
            track.notes = Note.from_numpy(**notes)
        quarters = self.quarters(ids)
        changes = {}
        for at in np.flatnonzero(self.says.kind[ids] == Kind.TEMPO):
            changes[round(quarters[at] * TPQ)] = self.tempo_of(int(ids[at]))
        opening = first_tempo or next(iter(changes.values()), 120.0)
        score.tempos = [Tempo(tick, tempo) for tick, tempo in ({0: opening} | changes).items()]
        return score


def cut_silence(ids: np.ndarray, vocab: Vocabulary, longest: float) -> tuple[np.ndarray, int]:
    """ids with long silences shortened, and the number of empty bars that were removed.

    longest: the longest run of empty bars to keep, in quarter notes. In an empty bar, no note
    begins and no tempo is set. Empty bars at the end are removed but not counted.
    """
    opening, *bars = np.split(ids, np.flatnonzero(ids == vocab.bar_id))
    while len(bars[-1]) == 2:  # only Bar and TimeSig
        bars.pop()
    kept = []
    silence = 0.0
    for bar in bars:
        is_empty = len(bar) == 2
        beats, unit = vocab.metre_of(bar[1])
        silence = silence + 4 * beats / unit if is_empty else 0.0
        if silence <= longest:
            kept.append(bar)
    return np.concatenate([opening, *kept]), len(bars) - len(kept)


def read_piece(data: bytes, vocab: Vocabulary) -> Piece:
    """The bytes of a MIDI file as a Piece that has no path yet. Raises UserError."""
    piano, changes = make_piano(parse_midi(data))
    return tokenize(piano, changes, vocab)


def tokenize(
    piano: Score, changes: dict[str, int], vocab: Vocabulary, silence: float = LONGEST_SILENCE
) -> Piece:
    """A one-track score as a Piece that has no path yet. Raises UserError.

    changes: see make_piano; silence: the longest run of empty bars to keep, in quarter notes.
    """
    quantized = vocab.quantize(piano)
    merged = piano.note_num() - quantized.note_num()
    merged -= changes[OUT_OF_RANGE]
    ids, bars_cut = cut_silence(vocab.encode(quantized), vocab, silence)
    ids = np.append(ids, np.int16(vocab.eos_id))
    state = vocab.trace(ids)
    changes = changes | {STRIKES_MERGED: merged, "empty bars cut from long silences": bars_cut}
    return Piece(
        ids=ids,
        time=state.time.astype(np.int32),
        pitch=state.pitch.astype(np.int16),
        notes=quantized.note_num(),
        seconds=float(piano.to("second").end()),
        changes=changes,
    )


def parse_bars(text: str, bars: int) -> list[tuple[int, int]]:
    """The bars of --rewrite, such as "3-4,9", as (first, last) pairs that count from 1.

    bars: how many the piece has. Raises UserError if there are no such bars, or none to keep.
    """
    stretches = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if not match:
            raise UserError(f'--rewrite: cannot read "{part}": write it like 9-12 or 3-4,9')
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise UserError(f"--rewrite {text}: write the first bar before the last one")
        if first < 1 or last > bars:
            raise UserError(f"--rewrite {text}: the prompt only has bars 1 to {bars}")
        if stretches and first <= stretches[-1][1]:
            raise UserError(f"--rewrite {text}: list the bars in order, each only once")
        stretches.append((first, last))
    if sum(last - first + 1 for first, last in stretches) == bars:
        raise UserError(f"--rewrite {text}: these are all bars of the prompt: leave some out")
    return stretches


def parse_chord(symbol: str) -> tuple[int | None, bool]:
    """The index in CHORD_SYMBOLS of a symbol as musicians write it, or None if it is not one.

    Also returns whether it is that chord exactly: C9 is read as C7, and C/E without its bass.
    """
    symbol = symbol.replace("♯", "#").replace("♭", "b")
    match = re.fullmatch(r"([A-Ga-g])([#b]?)(.*?)(/[A-Ga-g][#b]?)?", symbol)
    if not match:
        return None, False
    letter, accidental, suffix, bass = match.groups()
    pitch_class = NATURALS[letter.upper()] + {"": 0, "#": 1, "b": -1}[accidental]
    for number, (usual, _) in enumerate(CHORD_QUALITIES.values()):
        same, near = CHORD_SPELLINGS[usual]
        if suffix in (usual, *same.split(), *near.split()):
            return 12 * number + pitch_class % 12, not bass and suffix not in near.split()
    return None, False


def parse_chords(text: str) -> tuple[np.ndarray, list[str]]:
    """Chord symbols -> (bars, 12) indices into CHORD_SYMBOLS, one for each twelfth of a bar.

    Spaces separate bars, and commas the chords of a bar: "C F,G7". If there are bar lines, they
    separate bars, and spaces the chords: "| C | F G7 |". A dash between spaces is ignored. Also
    returns a remark for each symbol that is read as a simpler chord. Raises UserError for a symbol
    that cannot be read.
    """
    text = re.sub(r"\s-\s", " ", text)
    text = re.sub(r"\s*,\s*", ",", text)
    bars = text.split()
    if "|" in text:
        cells = re.split(r"\|+", text.strip().strip("|"))
        bars = [",".join(cell.split()) for cell in cells]
    if "" in bars:
        raise UserError("--chords: a bar is empty: write the chord of the bar before it again")
    twelfths = []  # of a bar, so that it divides into 2, 3, 4, 6 or 12 parts
    remarks = []
    for bar in bars:
        symbols = bar.split(",")
        if 12 % len(symbols):
            raise UserError(
                f'--chords: cannot read "{bar}": write 1, 2, 3, 4, 6 or 12 chords per bar'
            )
        for symbol in symbols:
            index, is_exact = parse_chord(symbol)
            if index is None:
                raise UserError(
                    f'--chords: cannot read "{symbol}" in "{bar}": write C, Am, F#dim, Eaug, '
                    "Bb7, Cmaj7, Dm7 or Bm7b5; F,G7 gives each half a bar"
                )
            if not is_exact:
                remarks.append(f"{symbol} is read as {CHORD_SYMBOLS[index]}")
            twelfths += [index] * (12 // len(symbols))
    return np.array(twelfths, int).reshape(-1, 12), list(dict.fromkeys(remarks))


def closest_keys(sounding: np.ndarray) -> np.ndarray:
    """The keys of B pieces, (B,): 0 to 11 are C to B major, 12 to 23 are C to B minor.

    sounding (B, 12): how long each pitch class sounds. The key is the one whose profile correlates
    best with that (Krumhansl & Schmuckler). For silence it is C major.
    """
    return (sounding @ KEY_TEMPLATES.T).argmax(axis=1)


def find_key(score: Score) -> tuple[KeySignature, str]:
    """The key of a non-empty one-track score, as a key signature and in words."""
    notes = score.tracks[0].notes.numpy()
    sounding = np.bincount(notes["pitch"] % 12, notes["duration"], 12)
    is_minor, tonic = divmod(int(closest_keys(sounding[None])[0]), 12)
    name = f"{MINOR_TONICS[tonic]} minor" if is_minor else f"{MAJOR_TONICS[tonic]} major"
    # Around the circle of fifths, 7 semitones a step. Sharps are positive, flats negative: from -5
    # to 6 in major, from -6 to 5 in minor.
    major_tonic = tonic + 3 * is_minor
    sharps = (7 * major_tonic + 5 + is_minor) % 12 - 5 - is_minor
    return KeySignature(0, sharps, is_minor), name


# ---- 4. Model: a causal Transformer that sees an id, a time and a pitch for each token

PITCH_PERIODS = (12, 6, 4, 24, 48, 96)  # semitones per full turn; the first three ignore octaves
RECENT = 3  # a note is three tokens, so each token also sees the three before it
MEMORY = 1024  # tokens before the window whose ids are counted, to help stay in key
MANY_PIECES = 8  # from 8 pieces at once, generating uses all threads, and a cache in 16 bits
TOKEN_BEATS = 0.0125  # see Window.time; over 256 tokens, that is 3 beats, few for so much music
PAD = 0  # id of the PAD token, which fills places that have no token
IGNORE = -100  # marks a target that is not scored
QUERY_ROWS = 256  # queries whose attention is computed at a time, see attend
LOSS_ROWS = 256  # tokens whose logits fit into the CPU cache; all at once would be slower
# The logit of the impossible. Not -inf: if all were -inf, the softmax would be undefined.
ILLEGAL = -1e9


class Window(NamedTuple):
    """What the model reads: B stretches of music, T tokens each, and what came before them."""

    idx: Tensor  # (B, T) ids, int64; PAD after the end of a piece
    # (B, T) grid positions since the window began. Each token adds TOKEN_BEATS of a beat, so that
    # simultaneous tokens have an order.
    time: Tensor
    pitch: Tensor  # (B, T) MIDI pitch of the last note; after a Chord token, of its root; float32
    recent: Tensor  # (B, RECENT) the ids just before the window; PAD before a piece
    # (B, V) how often each id occurs in the MEMORY tokens before the window, divided by MEMORY.
    # When a gap is being filled: in all that the window leaves out, on both sides, divided by its
    # length if that exceeds MEMORY.
    before: Tensor
    style: Tensor  # (B,) number of the style: 1 for the first of Checkpoint.styles, 0 for none
    targets: Tensor | None = None  # (B, T) the next ids; IGNORE where not scored

    def rows(self, part: slice) -> Window:
        """A slice of the B stretches."""
        return Window(*(None if values is None else values[part] for values in self))

    def joined(self, other: Window) -> Window:
        """These stretches followed by those of another window, without targets."""
        columns = zip(self[:-1], other[:-1], strict=True)
        return Window(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device) -> Window:
        """The same on another device."""
        return Window(*(None if values is None else values.to(device) for values in self))

    def groups_of(self, size: int) -> list[Window]:
        """The stretches in groups of at most `size`."""
        return [self.rows(slice(n, n + size)) for n in range(0, len(self.idx), size)]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 natively, which makes it faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return False


class KeyValueCache:
    """Each layer's keys and values for the tokens of a window that have been read so far.

    For many pieces, they are stored in bfloat16 where that is fast: with 32 pieces, reading them
    takes half of a step's time, and 16 bits halve that. For a few, they fit into the CPU cache.
    """

    def __init__(self, model: PianoGPT, batch_size: int):
        sizes = model.sizes
        shape = (batch_size, sizes.n_head, sizes.block_size, sizes.n_embd // sizes.n_head)
        device = model.head.weight.device
        in_half = batch_size >= MANY_PIECES and has_fast_bfloat16(device)
        dtype = torch.bfloat16 if in_half else torch.float32
        layers = torch.empty(sizes.n_layer, 2, *shape, device=device, dtype=dtype)
        self.layers = [layer.unbind() for layer in layers]  # (keys, values) of each
        self.length = 0  # tokens

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """Store k and v of new tokens, (B, nh, T, hs); return those of all the layer's tokens."""
        T = k.size(2)
        end = self.length + T
        both = []
        for stored, new in zip(self.layers[layer], (k, v), strict=True):
            stored.narrow(2, self.length, T).copy_(new)
            both.append(stored.narrow(2, 0, end))
        return both


def rotary_speeds(hs: int, grid: int) -> tuple[Tensor, Tensor]:
    """Radians that each channel turns per grid position and per semitone, (hs,) each.

    RoPE rotates queries and keys so that their dot product depends only on the offset between two
    tokens. In text, that offset is a number of tokens. Here it is what one hears, a time and an
    interval: a head can look one bar back, or an octave down. Channels i and i + hs / 2 rotate as
    a pair. By default:

        pairs 0 to 9      time     one turn per pi / 4 beats, ..., 3,100 beats
        pairs 10 to 15    pitch    one turn per 12, 6, 4, 24, 48, 96 semitones
    """
    by_pitch = 2 * math.pi / torch.tensor(PITCH_PERIODS[: hs // 4])
    pairs = hs // 2 - len(by_pitch)
    # The fastest pair turns one radian per 32nd note, as RoPE's does per token; 10,000 is RoPE's
    # base.
    by_time = 8 / grid * 10_000.0 ** -(torch.arange(pairs) / pairs)
    time_speed = torch.cat([by_time, torch.zeros_like(by_pitch)])
    pitch_speed = torch.cat([torch.zeros_like(by_time), by_pitch])
    # The first channel of each pair gets the negative sine: see rotate.
    return torch.cat([-time_speed, time_speed]), torch.cat([-pitch_speed, pitch_speed])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, hs) rotated: each pair of channels a, b -> a cos - b sin, b cos + a sin."""
    partner = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, (B, nh, T, hs), to k and v, (B, nh, S, hs); T is S or 1.

    Uses PyTorch's own attention, except when training in bfloat16 on a CPU, where its gradient
    takes three times as long as in float32. There, attention is spelled out for QUERY_ROWS queries
    at a time, so that early queries skip the scores of keys that only later ones can see.
    """
    T, hs = q.shape[-2:]
    learns_in_half = torch.is_grad_enabled() and q.dtype == torch.bfloat16
    if not (learns_in_half and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    q3, k3, v3 = (x.reshape(-1, T, hs) for x in (q, k, v))  # (B nh, T, hs)
    parts = []
    for begin in range(0, T, QUERY_ROWS):
        end = min(begin + QUERY_ROWS, T)
        future = torch.full((end - begin, end), ILLEGAL, dtype=q.dtype).triu(1 + begin)
        scores = torch.baddbmm(
            future.expand(len(q3), -1, -1), q3[:, begin:end], k3[:, :end].mT, alpha=hs**-0.5
        )  # (B nh, end - begin, end)
        parts.append(scores.softmax(-1) @ v3[:, :end])
    return torch.cat(parts, dim=1).view(q.shape)


class Block(nn.Module):
    """One layer: attention, then a feed-forward network, each with a norm and a residual."""

    def __init__(self, sizes: ModelSettings):
        super().__init__()
        self.n_head = sizes.n_head
        C = sizes.n_embd
        inner = 16 * max(1, round(C / 6))  # 8/3 C: as many weights as 4 C without a gate
        self.norm_1 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm_2 = nn.LayerNorm(C, bias=False)
        self.expand = nn.Linear(C, 2 * inner, bias=False)
        self.contract = nn.Linear(inner, C, bias=False)

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """Causal self-attention, x (B T, C) -> (B T, C); cos, sin (B, 1, T, hs): see rotation."""
        B, _, T, hs = cos.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k = rotate(qkv[:2], cos.to(qkv.dtype), sin.to(qkv.dtype))
        v = qkv[2]
        if cache is not None:
            assert T == 1 or cache.length == 0, "only an empty cache takes several tokens at once"
            k, v = cache.extend(layer, k, v)  # (B, nh, all tokens so far, hs)
        y = attend(q.to(k.dtype), k, v)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(x.shape).to(x.dtype))

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU, x (B T, C) -> (B T, C): half of the hidden channels gate the other half."""
        hidden, gate = self.expand(x).chunk(2, dim=-1)  # each (B T, 8/3 C)
        return self.contract(hidden * F.silu(gate))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """x (B T, C) -> (B T, C)."""
        x = x + self.attention(self.norm_1(x), cos, sin, layer, cache)
        return x + self.feed_forward(self.norm_2(x))


class PianoGPT(nn.Module):
    """The Transformer: a Window in, logits of the next id out."""

    def __init__(self, sizes: ModelSettings, vocab_size: int, grid: int, n_styles: int = 0):
        super().__init__()
        self.sizes = sizes
        C = sizes.n_embd
        V = vocab_size
        self.embedding = nn.Embedding(V, C, padding_idx=PAD)
        self.recent = nn.Parameter(torch.zeros(RECENT, C))  # weights of recent tokens, oldest first
        self.memory = nn.Linear(V, C, bias=False)
        self.style = nn.Embedding(1 + n_styles, C, padding_idx=0)
        self.norm_0 = nn.LayerNorm(C, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layer))
        self.norm = nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, V, bias=False)
        time_speed, pitch_speed = rotary_speeds(C // sizes.n_head, grid)
        self.register_buffer("time_speed", time_speed, persistent=False)
        self.register_buffer("pitch_speed", pitch_speed, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights that preserve the scale of what they multiply.

        The terms added to a token's embedding (recent tokens, memory and style) start at 0.
        """
        for block in self.blocks:
            for linear in (block.qkv, block.expand):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (block.proj, block.contract):
                # Each layer adds to x twice. With this scale, depth does not change the sum's size.
                residual_scale = (2 * self.sizes.n_layer) ** -0.5
                nn.init.normal_(linear.weight, std=residual_scale * linear.in_features**-0.5)
        # Small logits, so that the first loss is about ln V, that of a uniform guess.
        nn.init.normal_(self.head.weight, std=0.1 * self.head.in_features**-0.5)
        # norm_0 follows, so 0.02 (as in GPT-2) only sets how fast embeddings change at first.
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.embedding.weight[PAD] = 0
        nn.init.zeros_(self.memory.weight)
        nn.init.zeros_(self.style.weight)

    def embed(self, window: Window) -> Tensor:
        """Embeddings (B, T, C): each token's plus the RECENT before it, memory and style."""
        T = window.idx.size(1)
        idx = torch.cat([window.recent, window.idx], dim=1)
        tokens = self.embedding(idx)  # (B, RECENT + T, C)
        x = tokens[:, RECENT:]
        for n in range(RECENT):
            x = torch.addcmul(x, tokens[:, n : n + T], self.recent[n])
        of_all = self.memory(window.before) + self.style(window.style)  # (B, C)
        return self.norm_0(x + of_all[:, None])

    def rotation(self, window: Window) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, 1, T, hs), of each token's rotation angles."""
        time = window.time[:, None, :, None]  # the same for all heads and channels
        pitch = window.pitch[:, None, :, None]
        angle = torch.addcmul(time * self.time_speed, pitch, self.pitch_speed)
        return angle.cos(), angle.sin()

    def forward(self, window: Window, cache: KeyValueCache | None = None) -> Tensor:
        """Logits of the next ids, (B, T, V), or, if the window has targets, the loss.

        The loss is the cross-entropy in nats, summed over all targets except IGNORE. With a
        cache, the window's tokens continue those in the cache and are added to it.
        """
        B, T = window.idx.shape
        x = self.embed(window).flatten(0, 1)  # (B T, C): Linear is slower in three dimensions
        cos, sin = self.rotation(window)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        if window.targets is None:
            return self.head(x).view(B, T, -1)
        loss = torch.zeros((), device=x.device)
        targets = window.targets.flatten()
        for rows, goals in zip(x.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            logits = self.head(rows).float()
            loss += F.cross_entropy(logits, goals, ignore_index=IGNORE, reduction="sum")
        return loss


# ---- 5. Learning: windows, transposition, the optimizer, the trainer

OPENING_EVERY = 8  # every eighth window is the start of a piece, so that new pieces begin well
SHUFFLED = 64  # groups of windows that are shuffled together
STYLE_DROPPED = 0.1  # share of windows that hide their style, to also learn to write without one
LONGEST_VALIDATION = 128  # at most this many windows, spread evenly over the held-out music
# Peak learning rates as multiples of --lr, found by search at the default sizes. Those of blocks
# and head shrink with the fan-in (how many terms a matrix sums), so that one --lr suits any width.
BLOCK_RATE = 94  # matrices of the blocks: / sqrt(fan-in), as their steps are orthogonal
HEAD_RATE = 2150  # head: / fan-in, as AdamW's steps can all push a sum in the same direction
EMBEDDING_RATE = 168  # embedding, memory and style
REST_RATE = 63  # norms and the weights of recent tokens
# At each step, the averaged weights move 10 / (10 + step) of the way to the current weights, so
# that they average over about the last tenth of the steps so far.
AVERAGE_SPEED = 10
# Compiling takes up to 50 s the first time, and 8 s after that. A step at the default sizes is then
# 40 ms faster, so 8 s pay off after 200 steps and 50 s after 1,250. The default run has 900, and
# compiles: the first such run loses 14 s, and each later one gains 28. The unit is steps x tokens
# per batch x layers x channels.
COMPILING_PAYS = 900 * (16 * 256) * (4 * 128)
DIVERGED = 3  # times the loss of a uniform guess, which is where a new model starts
SAVE_SECONDS = 120  # between checkpoints; a crash loses at most about this much training


class Corpus(NamedTuple):
    """Pieces laid end to end, as flat arrays on the training device."""

    ids: Tensor  # (N,) integers, int16 in training: BOS ... EOS BOS ... EOS
    time: Tensor  # (N,) int32, grid positions since the piece began
    pitch: Tensor  # (N,) int16
    offsets: Tensor  # (pieces + 1,) int64: piece n is offsets[n] : offsets[n + 1]
    style: Tensor  # (pieces,) int64: see Window

    def to(self, device: torch.device) -> Corpus:
        """The same on another device."""
        return Corpus(*(values.to(device) for values in self))


def make_corpus(pieces: list[Piece], styles: list[str] | None = None) -> Corpus:
    """Pieces laid end to end; styles: their names, of which the first gets number 1."""
    numbers = {name: n for n, name in enumerate(styles or [], 1)}
    lengths = [len(piece.ids) for piece in pieces]
    empty = Piece()  # provides the dtypes if there are no pieces
    return Corpus(
        torch.from_numpy(np.concatenate([empty.ids, *(piece.ids for piece in pieces)])),
        torch.from_numpy(np.concatenate([empty.time, *(piece.time for piece in pieces)])),
        torch.from_numpy(np.concatenate([empty.pitch, *(piece.pitch for piece in pieces)])),
        torch.tensor([0, *itertools.accumulate(lengths)]),
        torch.tensor([numbers.get(piece.style, 0) for piece in pieces], dtype=torch.long),
    )


def transpose(ids: Tensor, shifts: Tensor, vocab: Vocabulary) -> tuple[Tensor, Tensor]:
    """ids (B, T) with row b transposed by shifts[b] semitones, and each token's shift, (B, T).

    A shift is reduced where it would move a note off the piano. The root of a chord wraps around
    within its octave: five semitones above G is the C below.
    """
    keys = vocab.pitch_ids
    chords = vocab.rooted_chord_ids
    is_note = (ids >= keys.start) & (ids < keys.stop)
    is_chord = (ids >= chords.start) & (ids < chords.stop)
    lowest = ids.masked_fill(~is_note, keys.stop - 1).amin(1)
    highest = ids.masked_fill(~is_note, keys.start).amax(1)
    shifts = shifts.clamp(keys.start - lowest, keys.stop - 1 - highest)[:, None]
    root = (ids - chords.start) % 12  # twelve ids in a row share one quality
    moves = torch.where(is_chord, (root + shifts) % 12 - root, shifts)  # (B, T)
    return torch.where(is_note | is_chord, ids + moves, ids), moves


def cut_windows(
    corpus: Corpus, starts: Tensor, block_size: int, vocab: Vocabulary, shifts: Tensor | None = None
) -> Window:
    """The windows that begin at starts (B,), indices into the corpus; with targets.

    A window stays inside one piece. Places after the end of the piece are PAD and not scored;
    places before its beginning are not counted. shifts (B,): semitones by which to transpose each
    window; the pitch of BOS moves too, because the model sees only its distance from the notes.
    """
    device = starts.device
    piece = torch.searchsorted(corpus.offsets, starts, right=True) - 1
    begin = corpus.offsets[piece][:, None]  # (B, 1)
    end = corpus.offsets[piece + 1][:, None]
    at = starts[:, None] + torch.arange(-MEMORY, block_size + 1, device=device)
    inside = (at >= begin) & (at < end)  # (B, MEMORY + T + 1)
    at = at.clamp(0, len(corpus.ids) - 1)
    ids = corpus.ids[at].long().masked_fill(~inside, PAD)
    here = slice(MEMORY, MEMORY + block_size)
    pitch = corpus.pitch[at[:, here]].float()
    if shifts is not None:
        ids, moves = transpose(ids, shifts, vocab)
        pitch = pitch + moves[:, here]
    time = corpus.time[at[:, here]]
    order = TOKEN_BEATS * vocab.grid * torch.arange(block_size, device=device)
    before = torch.zeros(len(starts), len(vocab.words), device=device)
    before.scatter_add_(1, ids[:, :MEMORY], inside[:, :MEMORY].float())
    return Window(
        idx=ids[:, here],
        time=(time - time[:, :1]) + order,
        pitch=pitch,
        recent=ids[:, MEMORY - RECENT : MEMORY],
        before=before / MEMORY,
        style=corpus.style[piece],
        targets=ids[:, MEMORY + 1 :].masked_fill(~inside[:, MEMORY + 1 :], IGNORE),
    )


def draw_gaps(ids: Tensor, chance: float, rng: np.random.Generator, vocab: Vocabulary) -> Tensor:
    """Draw where a gap begins and ends in each window, ids (B, T): (B, 2); 0, 0 is no gap.

    A gap runs from one bar line to a later one, with all pairs equally likely; the end of a piece
    counts as a bar line. chance: how likely a gap is, in windows with at least two bar lines.
    """
    draws = torch.from_numpy(rng.random((3, len(ids)), np.float32))  # 0 to 1
    first_draw, second_draw, gap_draw = draws.to(ids.device)
    is_line = (ids == vocab.bar_id) | (ids == vocab.eos_id)
    is_line[:, [0, -1]] = False  # leave something before the gap and something after it
    lines = is_line.sum(1)
    # The numbers of two distinct lines
    one = (first_draw * lines).long()
    two = (second_draw * (lines - 1)).long()
    two += two >= one  # skip the one already drawn
    pair = torch.stack([one, two], dim=1).sort(dim=1).values  # (B, 2)
    number = is_line.cumsum(1) - 1  # of each line
    is_chosen = is_line[:, None] & (number[:, None] == pair[:, :, None])  # (B, 2, T)
    gaps = is_chosen.int().argmax(dim=2)
    has_gap = (lines >= 2) & (gap_draw < chance)
    return gaps * has_gap[:, None]


def move_gaps(window: Window, gaps: Tensor, vocab: Vocabulary) -> Window:
    """The windows with each gap moved behind what follows it, as a fill-in exercise.

    gaps (B, 2): where each begins and ends; 0, 0 is no gap. If the gap is the tokens d e:

        tokens    a b c d e f g h         moved     a b c f g FILL d e
        targets   b c d e f g h i         targets   b c d g h d    e f

    Each token keeps its time, its pitch and its target, which is what follows it in the music: the
    target of c is still d, so the model never learns to jump from c to f. FILL has the time and the
    pitch of the gap's first token, and that token as its target. The last token (h) makes room for
    FILL. Tokens between the gap and the next note or chord have the pitch of the gap's last note;
    so as not to give that note away, they get FILL's pitch instead.
    """
    T = window.idx.size(1)
    begin = gaps[:, :1]
    end = gaps[:, 1:]
    place = torch.arange(T, device=gaps.device).expand(len(gaps), -1)
    rank = torch.zeros_like(window.idx)  # 0: before the gap
    rank[place >= end] = 1  # after it; then comes FILL, which has rank 2
    rank[(place >= begin) & (place < end)] = 3  # the gap
    rank[window.idx == PAD] = 4
    rank[:, -1] = 5  # makes room for FILL
    with_fill = torch.cat([rank, torch.full_like(begin, 2)], dim=1)  # FILL is at index T
    order = with_fill.argsort(dim=1, stable=True)[:, :T]
    order = torch.where(end > begin, order, place)  # no gap: keep the order

    says_pitch = torch.from_numpy(vocab.says.pitch != SAYS_NOTHING).to(gaps.device)[window.idx]
    is_after = place >= end
    has_said = (says_pitch & is_after).cumsum(1) > 0
    fill_pitch = window.pitch.gather(1, begin)
    pitch = torch.where(is_after & ~has_said & (end > 0), fill_pitch, window.pitch)

    def move(values: Tensor, of_fill: Tensor) -> Tensor:
        """Values (B, T), and FILL's (B, 1), in the new order."""
        return torch.cat([values, of_fill], dim=1).gather(1, order)

    return window._replace(
        idx=move(window.idx, torch.full_like(begin, vocab.fill_id)),
        time=move(window.time, window.time.gather(1, begin)),
        pitch=move(pitch, fill_pitch),
        targets=move(window.targets, window.idx.gather(1, begin)),
    )


@dataclass
class Batches:
    """Training batch number i, as a pure function of the seed and i."""

    corpus: Corpus
    vocab: Vocabulary
    settings: Settings

    def starts(self, i: int) -> Tensor:
        """Where the windows of batch i begin, (B,)."""
        offsets = self.corpus.offsets.cpu().numpy()
        train = self.settings.train
        T = self.settings.model.block_size
        # Multiples of the golden ratio, modulo 1, fill 0 to 1 evenly, so that at any time all music
        # has been read equally often. The seed shifts the starting point, and shuffles groups of
        # OPENING_EVERY windows, SHUFFLED groups at a time, so that each seed has its own order.
        number = np.arange(i * train.batch_size, (i + 1) * train.batch_size)
        group, of_group = np.divmod(number, OPENING_EVERY)
        first = group[0] // SHUFFLED
        order = []
        for part in range(first, group[-1] // SHUFFLED + 1):
            rng = np.random.default_rng((train.seed, part, 1))  # 1: other draws than in __getitem__
            order.append(part * SHUFFLED + rng.permutation(SHUFFLED))
        group = np.concatenate(order)[group - first * SHUFFLED]
        shuffled = group * OPENING_EVERY + of_group
        phase = (shuffled * (5**0.5 - 1) / 2 + train.seed * 2**0.5) % 1
        # A window surrounds a token of the corpus, but stays inside that token's piece.
        token = (phase * offsets[-1]).astype(int)
        piece = np.searchsorted(offsets, token, side="right") - 1
        begin = offsets[piece]
        end = offsets[piece + 1]
        # A window's last place never ends a gap (see draw_gaps). So the last window of a piece
        # reaches one place past EOS, for gaps that end there.
        anywhere = np.maximum(begin, np.minimum(token - T // 2, end + 1 - T))
        opening = offsets[(phase * (len(offsets) - 1)).astype(int)]
        starts = np.where(of_group == 0, opening, anywhere)
        return torch.from_numpy(starts).to(self.corpus.ids.device)

    def __getitem__(self, i: int) -> Window:
        """Batch i: randomly transposed windows, some with a gap, some without their style."""
        train = self.settings.train
        data = self.settings.data
        most = data.transpose
        rng = np.random.default_rng((train.seed, i))
        shifts = torch.from_numpy(rng.integers(-most, most + 1, size=train.batch_size))
        shifts = shifts.to(self.corpus.ids.device)
        T = self.settings.model.block_size
        windows = cut_windows(self.corpus, self.starts(i), T, self.vocab, shifts)
        gaps = draw_gaps(windows.idx, data.gap_percent / 100, rng, self.vocab)
        windows = move_gaps(windows, gaps, self.vocab)
        is_dropped = torch.from_numpy(rng.random(train.batch_size) < STYLE_DROPPED)
        is_dropped = is_dropped.to(windows.style.device)
        return windows._replace(style=windows.style.masked_fill(is_dropped, 0))


def cut_all_windows(
    corpus: Corpus, block_size: int, stride: int, vocab: Vocabulary, limit: int | None = None
) -> Window:
    """Windows that together score every token of each piece once, except BOS; not transposed.

    stride: tokens from one window to the next; the overlap is read again as context, but not
    scored again. limit: take at most so many of these windows, spread evenly over the music.
    """
    starts = []
    is_first = []
    for begin, end in itertools.pairwise(corpus.offsets.tolist()):
        last = end - 1 - block_size  # a window that begins here or later scores EOS
        of_piece = [begin, *range(begin + stride, last + stride, stride)]
        starts += of_piece
        is_first += [start == begin for start in of_piece]
    chosen = np.arange(len(starts))
    if limit is not None and len(starts) > limit:
        chosen = np.linspace(0, len(starts) - 1, limit).round().astype(int)
    windows = cut_windows(corpus, torch.tensor(starts, dtype=torch.long)[chosen], block_size, vocab)
    is_later = ~torch.tensor(is_first, dtype=torch.bool)[chosen]
    windows.targets[is_later, : block_size - stride] = IGNORE  # scored by the window before
    return windows


def learning_rate(step: int, train: TrainSettings, begin: int = 0) -> float:
    """The learning rate as a fraction of its peak: linear warmup, linear decay to zero.

    begin: the step at which it starts over from zero, if a finished run is given more steps.
    """
    steps = train.steps - begin
    warmup = min(train.warmup, steps // 5)  # short runs must decay, too
    done = step - begin
    rising = (done + 1) / max(1, warmup)
    falling = 1 - (done - warmup) / max(1, steps - warmup)
    return min(rising, falling)


def gram_polynomial(gram: Tensor) -> Tensor:
    """The polynomial 3.4445 I - 4.775 G + 2.0315 G^2 of Gram matrices G, (N, C, C)."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
    polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
    return polynomial


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices with the same singular vectors as these, but singular values near 1.

    A Newton-Schulz iteration with the coefficients of Jordan et al.: each round maps a singular
    value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Five rounds bring every one that is at least 0.01
    of the norm to between 0.68 and 1.14.

    For a matrix X with the Gram matrix G = X X^T, a round is X <- P X with P = gram_polynomial(G).
    All matrices must have the same shorter side C, so that their Gram matrices can be stacked,
    (N, C, C). As P is symmetric, the Gram matrix of P X is P G P. So only these small matrices are
    iterated, and the product of all P is applied to X at the end: half the work of iterating on
    one X after another.
    """
    wide = [x if x.size(0) <= x.size(1) else x.mT for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]  # now no singular value is above 1
    gram = torch.stack([x @ x.mT for x in wide])
    P = gram_polynomial(gram)
    product = P
    for _ in range(4):
        gram = P @ gram @ P
        P = gram_polynomial(gram)
        product = P @ product
    results = []
    for x, all_rounds, old in zip(wide, product, matrices, strict=True):
        x = all_rounds @ x
        results.append(x if old.size(0) <= old.size(1) else x.mT)
    return results


class OrthogonalAdamW(torch.optim.Optimizer):
    """AdamW, except that in groups with orthogonal=True, each matrix's step is orthogonalized.

    AdamW's step for a matrix is strong in a few directions, those of its large singular values, and
    weak in all others. An orthogonal step is equally strong in every direction. That is the idea of
    Muon, which orthogonalizes the momentum. Here, it is Adam's step that is orthogonalized: the
    momentum divided by the root of the mean squared gradients. The result is scaled so that its
    root mean square is the group's learning rate.
    """

    def __init__(self, groups: list[dict], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"orthogonal": False})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every weight from its gradient."""
        directions = {}
        matrices = defaultdict(list)  # those to orthogonalize, by shorter side
        for group in self.param_groups:
            for p in group["params"]:
                directions[p] = self.adam_direction(p, group)
                if group["orthogonal"]:
                    matrices[min(p.shape)].append(p)
        for of_one_side in matrices.values():
            orthogonal = orthogonalize([directions[p] for p in of_one_side])
            for p, direction in zip(of_one_side, orthogonal, strict=True):
                # The root mean square of an orthogonal matrix is 1 / sqrt(longer side); make it 1.
                directions[p] = direction * max(p.shape) ** 0.5
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(directions[p], alpha=-group["lr"])

    def adam_direction(self, p: Tensor, group: dict) -> Tensor:
        """Adam's step at a learning rate of 1; also updates its moments with this gradient."""
        moments = self.state[p]
        if not moments:
            moments["step"] = torch.tensor(0.0)  # a tensor, to be stored with the others
            moments["exp_avg"] = torch.zeros_like(p)
            moments["exp_avg_sq"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        moments["step"] += 1
        moments["exp_avg"].lerp_(p.grad, 1 - beta1)
        moments["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        step = moments["step"].item()
        mean = moments["exp_avg"] / (1 - beta1**step)  # both started at 0: undo that bias
        mean_square = moments["exp_avg_sq"] / (1 - beta2**step)
        return mean / (mean_square.sqrt() + group["eps"])


def make_optimizer(model: PianoGPT, train: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer, with one group per parameter, which has its own peak learning rate.

    At the default sizes, --lr 3e-4 becomes 2.5e-3 for the matrices of the blocks (1.5e-3 for
    `contract`; the root mean square of a step), 5e-3 for the head, 5e-2 for embedding, memory and
    style, and 1.9e-2 for norms and recent. Weight decay applies to the matrices of the blocks and
    to the head. For plain AdamW, change the last line to

        return torch.optim.AdamW(groups, betas=(0.9, 0.95))

    It ignores "orthogonal", and the same rates suit it.
    """
    groups = []
    for name, p in model.named_parameters():
        group = {"params": [p], "weight_decay": 0.0, "orthogonal": False}
        if name.startswith("blocks") and p.dim() == 2:
            group["orthogonal"] = True
            group["weight_decay"] = train.weight_decay
            rate = BLOCK_RATE / p.size(1) ** 0.5
        elif name == "head.weight":
            group["weight_decay"] = train.weight_decay
            rate = HEAD_RATE / p.size(1)
        elif name in ("embedding.weight", "memory.weight", "style.weight"):
            rate = EMBEDDING_RATE
        else:
            rate = REST_RATE
        group["peak_lr"] = train.lr * rate
        groups.append(group)
    return OrthogonalAdamW(groups)


@torch.no_grad()
def evaluate(model: PianoGPT, windows: Window, batch_size: int = 32) -> float:
    """The cross-entropy summed over the targets of windows, in nats, computed in float32."""
    device = model.head.weight.device
    total = 0.0
    for part in windows.groups_of(batch_size):
        total += model(part.to(device)).item()
    return total


def sum_over_ranks(value: Tensor) -> float:
    """The sum of a number over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU."""
    return {name: weight.cpu().clone() for name, weight in model.state_dict().items()}


class Trainer:
    """A model in training, with everything that changes from step to step.

    history: one row per validation; losses: those of the steps since the last row
    average: the weights averaged over about the last tenth of the steps, which validation and
        generation use; best: the average with the lowest validation loss so far
    """

    def __init__(self, model: PianoGPT, settings: TrainSettings, bfloat16=False, compiled=False):
        self.model = model
        self.settings = settings
        self.bfloat16 = bfloat16
        self.compiled = compiled
        self.device = model.head.weight.device
        self.average = copy.deepcopy(model)
        self.optimizer = make_optimizer(model, settings)
        self.step = 0
        self.begin = 0  # the step at which the learning rate starts from zero
        self.seconds = 0.0  # spent training, including validations and saves between steps
        self.history: list[dict] = []
        self.losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        if compiled:
            # Only the blocks: the gradient of a compiled embedding is not deterministic.
            for block in model.blocks:
                block.compile()
        self.parallel: nn.Module = model
        if PROCESSES > 1:
            self.parallel = DistributedDataParallel(model, broadcast_buffers=False)

    def add_gradients(self, batch: Window) -> float:
        """Put the gradient of a batch's mean loss into .grad; return that loss, in nats."""
        per_rank = len(batch.idx) // PROCESSES
        mine = batch.rows(slice(RANK * per_rank, (RANK + 1) * per_rank))
        scored = (batch.targets != IGNORE).sum().item()
        total = torch.zeros((), device=self.device)
        parts = mine.groups_of(math.ceil(per_rank / self.settings.accumulate))
        for number, part in enumerate(parts, 1):
            waits = PROCESSES > 1 and number < len(parts)  # synchronize once, in the last part
            with self.parallel.no_sync() if waits else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                    loss = self.parallel(part)
                # Times PROCESSES, as DistributedDataParallel averages gradients over processes.
                (loss * PROCESSES / scored).backward()
            total += loss.detach()
        return sum_over_ranks(total) / scored

    def check(self, batch: Window) -> None:
        """Raise UserError if the weights have diverged, before they replace good ones on disk."""
        batch = batch.rows(slice(0, 1))
        scored = (batch.targets != IGNORE).sum().item()
        with torch.compiler.set_stance("force_eager"):  # no recompilation just for this
            for model in (self.model, self.average):
                self.check_loss(evaluate(model, batch) / scored)

    def check_loss(self, loss: float) -> None:
        """Raise UserError for a loss that is NaN, or far above that of a uniform guess."""
        if not loss < DIVERGED * math.log(len(self.model.embedding.weight)):
            raise UserError(
                f"the loss became {loss:g} after {self.step} steps: pass a smaller --lr"
            )

    @torch.no_grad()
    def update(self, fraction: float) -> None:
        """Update the weights, at a fraction of the peak learning rates, and their averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
        self.optimizer.step()
        self.optimizer.zero_grad()
        newest = AVERAGE_SPEED / (AVERAGE_SPEED + self.step)  # 1 at first
        for average, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(p, newest)

    def train_step(self, batch: Window) -> float:
        """Learn from one batch; return its mean loss, in nats.

        Raises UserError if the loss is NaN or far above a guess, or if a gradient is not finite.
        """
        loss = self.add_gradients(batch)
        self.check_loss(loss)
        # Clipped, so that one unusual batch does not dominate the optimizer's moments for long.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient became {norm:g} after {self.step} steps: pass a smaller --lr"
            )
        self.update(learning_rate(self.step, self.settings, self.begin))
        self.step += 1
        self.losses.append(loss)
        return loss

    def best_row(self) -> dict:
        """The row with the lowest validation loss, or the last row if nothing is held out."""
        validated = [row for row in self.history if "val_loss" in row]
        if not validated:
            return self.history[-1]
        return min(validated, key=lambda row: row["val_loss"])

    def validate(self, windows: Window, vocab: Vocabulary) -> None:
        """Add a row to the history; keep the averaged weights if they are the best so far."""
        train_loss = sum(self.losses) / max(1, len(self.losses))
        row = {"step": self.step, "seconds": self.seconds, "train_loss": train_loss}
        text = f"training loss {train_loss:.4f}"
        is_scored = windows.targets != IGNORE
        scored = windows.targets[is_scored]
        if len(scored):
            total = evaluate(self.average, windows)
            self.check_loss(total / len(scored))
            notes = (vocab.says.kind[scored.numpy()] == Kind.PITCH).sum().item()
            row["val_loss"] = total / len(scored)
            row["val_nats_per_note"] = total / max(1, notes)
            text += f", validation loss {row['val_loss']:.4f}"
        self.history.append(row)
        self.losses = []
        if self.best_row() is row:
            self.best = copy_weights(self.average)
        say(f"step {self.step} of {self.settings.steps}: {text}, {self.seconds:.0f} seconds")

    def train(
        self,
        batches: Batches,
        windows: Window,
        stopped: Callable[[], bool],
        save: Callable[[], None],
    ) -> None:
        """Train to the last step or until stopped(), calling save() from time to time."""
        pbar = progress_bar(
            total=self.settings.steps, initial=self.step, desc="training", unit="step"
        )
        clock = time.monotonic()
        saved = clock
        while self.step < self.settings.steps:
            if sum_over_ranks(torch.tensor(float(stopped()), device=self.device)) > 0:
                break
            batch = batches[self.step]
            loss = self.train_step(batch)
            now = time.monotonic()
            self.seconds += now - clock
            clock = now
            if self.step % self.settings.eval_every == 0 or self.step == self.settings.steps:
                self.validate(windows, batches.vocab)
            pbar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            pbar.update()
            if self.settings.save_every:
                is_due = self.step % self.settings.save_every == 0
            else:
                is_due = clock - saved > SAVE_SECONDS
            if is_due and self.step < self.settings.steps:  # the caller saves the last one
                self.check(batch)
                save()
                saved = clock
        pbar.close()


# ---- 6. Writing: logits -> rules -> draw an id -> repeat until the piece ends

LEAST_BARS = 8  # without --bars, a piece may end after this many new bars
MOST_BARS = 24  # and must end after this many
# Nats added to the logit of an end on the tonic in the last bar; proportionally less in the bars
# before. A piece of music ends only once in thousands of tokens, so a model is reluctant to end
# one: without this, nine out of ten pieces ran on to the last bar and were cut off there.
END_LEAN = 12.0
CHORD_LEAN = 1.0  # nats added to the notes of the chord that is due
BASS_LEAN = 2.0  # and this much more to its root in the bass
TEMPO_LEAP = 3.0  # a new tempo may be at most three times as fast, or as slow
# Divisions of a quarter note that a prompt's notes may fall on, simplest first; 4 covers 1 and 2.
DIVISIONS = (4, 3, 8, 6, 12)
STRAIGHT = (4, 8)
ON_DIVISION = 0.98  # share of note onsets that must fall on it; a few grace notes may not
AT_ONCE = 64  # maximum number of pieces generated at once, to save memory
OPENING_OF_WINDOW = 2 / 3  # share of the first window for the prompt; the rest is room to write
KEPT_OF_WINDOW = 1 / 3  # share of a full window that is kept to start the next one


def divide_beat(division: int, grid: int) -> np.ndarray:
    """The grid positions that divide a quarter note into `division` parts."""
    return (np.arange(division) * grid / division).round().astype(int)


def find_grid(ids: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Where in a quarter note the notes of a prompt, ids (T,), begin; empty: anywhere.

    In straight rhythms, all positions of the division count: a prompt in quarters and eighths
    allows 16ths. In others, only those that the prompt uses: swing has 0 and 2/3 of a beat.
    """
    state = vocab.trace(ids)
    is_note = state.kind == Kind.PITCH
    _, first = np.unique(state.time[is_note], return_index=True)  # one note per moment
    in_quarters = state.position * 4 / state.beat_unit % vocab.grid
    offsets = in_quarters[is_note][first]
    for division in DIVISIONS:
        parts = divide_beat(min(division, vocab.grid), vocab.grid)
        on_grid = np.isin(offsets, parts)
        if on_grid.sum() >= ON_DIVISION * len(offsets):
            return parts if division in STRAIGHT else np.unique(offsets[on_grid]).astype(int)
    return np.empty(0, int)


@dataclass
class Gap:
    """Some bars of a piece, which are being rewritten while the others stay."""

    ids: np.ndarray  # (T,) the whole piece, from BOS to EOS
    first: int  # number of its first bar, counting from 1
    last: int
    begin: int  # index in ids of its first token
    end: int  # index of the first token after it
    metres: np.ndarray  # (bars,) ids of its bars' TimeSig tokens
    # (keys,) until when, as State.time, a note from before the gap holds each key. Approximate if
    # the beat unit changes in the meantime; fit_between (section 8) corrects the score.
    held: np.ndarray

    @property
    def is_end(self) -> bool:
        """Whether it reaches the end of the piece, or of the part that --prompt-bars keeps."""
        return self.end == len(self.ids) - 1


def find_gap(ids: np.ndarray, first: int, last: int, vocab: Vocabulary) -> Gap:
    """The gap at bars first to last, counting from 1, of a piece, ids (T,) from BOS to EOS."""
    state = vocab.trace(ids)
    bars = np.append(np.flatnonzero(ids == vocab.bar_id), len(ids) - 1)  # and EOS
    begin = bars[first - 1]
    held = np.zeros(len(vocab.key_pitches))
    ends = np.flatnonzero(state.kind[:begin] == Kind.DURATION)
    lengths = vocab.lengths[ids[ends] - vocab.duration_ids.start]
    np.maximum.at(held, state.pitch[ends] - LOWEST_KEY, state.time[ends] + lengths)
    metres = ids[bars[first - 1 : last] + 1]
    return Gap(ids, first, last, begin, bars[last], metres, held)


@dataclass
class Request:
    """What the rules need to know besides the state: above all, what the user asked for."""

    vocab: Vocabulary
    sample: SampleSettings
    chords: np.ndarray  # (12 x bars,) ids of Chord tokens, one per twelfth of a bar; or empty
    old_bars: int  # bars before the new ones
    positions: np.ndarray  # in a quarter note, where notes may begin; empty: anywhere
    # Not asked for but inferred: the tonic triads of the keys that the music so far suggests, as
    # ids of Chord tokens, (B,). They change only at bar lines.
    tonics: np.ndarray | None = None
    gap: Gap | None = None  # the one being filled

    @property
    def least_bars(self) -> int:
        """The number of bars that a piece must have before EOS may end it."""
        if self.gap:
            return self.gap.last
        return self.sample.bars or self.old_bars + LEAST_BARS

    @property
    def most_bars(self) -> int:
        """The number of bars after which a piece, or a gap in it, is over."""
        if self.gap:
            return self.gap.last
        return self.sample.bars or self.old_bars + MOST_BARS

    def twelfth(self, state: State) -> np.ndarray:
        """Twelfths of a bar since the first new bar began, (B,); each gap counts from 0."""
        new_bars = np.maximum(0, state.bar - 1 - self.old_bars)
        return 12 * new_bars + 12 * state.position // state.bar_length


# Each rule takes the logits of the next ids (B, V), the state of the music and the request, and
# returns the adjusted logits; it may change them in place. RULES lists the rules in order.
# Logits and state are numpy arrays: on so few numbers, a torch operation costs several times as
# much. With torch, the rules took a third of the time that it takes to write one piece.


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """The logit of N ids taken together, (B, N) -> (B, 1)."""
    most = logits.max(axis=1, keepdims=True)
    return most + np.log(np.exp(logits - most).sum(axis=1, keepdims=True))


def grammar(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Only what REMI's grammar allows."""
    return np.where(request.vocab.legal(state), logits, ILLEGAL)


def on_the_grid(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Round every Position to the nearest one on the requested grid.

    A model trained on live performances, which follow no grid, abandons a prompt's grid within a
    bar. This rule comes before the grammar: a Position that is rounded to the current moment or to
    the next bar line is then illegal, and its probability goes to whatever is legal.
    """
    vocab = request.vocab
    if not len(request.positions):
        return logits
    for unit in np.unique(state.beat_unit):
        rows = state.beat_unit == unit
        beats = unit // 4  # in a quarter note
        quarters = np.arange(0, vocab.grid * MOST_BEATS, beats * vocab.grid)
        on_grid = (quarters[:, None] + beats * request.positions).flatten()
        positions = logits[rows, vocab.position_ids]  # a copy, (rows, positions)
        logits[rows, vocab.position_ids] = round_positions(positions, on_grid)
    return logits


def round_positions(positions: np.ndarray, on_grid: np.ndarray) -> np.ndarray:
    """Logits of Positions, (B, positions), with each merged into the nearest on a grid."""
    # From halfway on, a position belongs to the next one on the grid, or to the next bar.
    first = np.append(0, (on_grid[:-1] + on_grid[1:] + 1) // 2)
    next_bar = positions.shape[1] + on_grid[0]  # where the bar after the longest one begins
    positions[:, (on_grid[-1] + next_bar + 1) // 2 :] = ILLEGAL
    most = positions.max(axis=1, keepdims=True)
    share = np.add.reduceat(np.exp(positions - most), first, axis=1)
    rounded = np.full_like(positions, ILLEGAL)
    rounded[:, on_grid] = np.log(share + 1e-30) + most  # 1e-30 avoids log(0)
    return rounded


def steady_tempo(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """No tempo leaps that music never makes, such as 117 to 23: a piece does not recover."""
    ids = request.vocab.tempo_ids
    if not request.vocab.may_come(state, ids.start):
        return logits
    steps = np.abs(np.arange(ids.start, ids.stop) - state.tempo[:, None])
    is_leap = (steps * math.log(TEMPO_STEP) > math.log(TEMPO_LEAP)) & (state.tempo[:, None] > 0)
    logits[:, ids][is_leap] = ILLEGAL
    return logits


def within_gap(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """In a gap: the old metres, no end, no key still ringing from before it, no change of tempo.

    The tempos stay those of the file: fill_score (section 8) restores them.
    """
    gap = request.gap
    if gap is None:
        return logits
    vocab = request.vocab
    if gap.is_end:  # in the last bar, EOS too means that the gap is filled: it becomes Bar
        in_last = state.bar == gap.last
        end_or_bar = np.logaddexp(logits[:, vocab.bar_id], logits[:, vocab.eos_id])
        logits[in_last, vocab.bar_id] = end_or_bar[in_last]
    logits[:, vocab.eos_id] = ILLEGAL
    logits[:, vocab.tempo_ids] = ILLEGAL
    rings_on = gap.held > state.time[:, None]  # (B, keys)
    logits[:, vocab.pitch_ids][rings_on] = ILLEGAL
    begins = np.flatnonzero((state.kind == Kind.BAR) & (state.bar <= gap.last))
    logits[begins] = ILLEGAL
    logits[begins, gap.metres[state.bar[begins] - gap.first]] = 0
    return logits


def due_chords(state: State, request: Request) -> np.ndarray:
    """The ids of the Chord tokens that are due now, (B,); 0: none.

    Without --chords, a piece closes on its tonic in the last bar that it may have.
    """
    if len(request.chords):
        return request.chords[request.twelfth(state) % len(request.chords)]
    if request.gap and not request.gap.is_end:
        return np.zeros_like(state.chord)
    return np.where(state.bar >= request.most_bars, request.tonics, 0)


def wanted_chords(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """The chord that is due, and no other, comes before the first note that it covers.

    The total probability of notes and chords goes to that chord or, once it is written, to notes.
    Other kinds of token keep theirs. Among the notes, those of the chord become likelier.
    """
    wanted = due_chords(state, request)
    rows = np.flatnonzero(wanted)
    if not len(rows):
        return logits
    vocab = request.vocab
    wanted = wanted[rows]
    is_due = state.chord[rows] != wanted
    asked = logits[rows]
    notes = asked[:, vocab.pitch_ids]  # a view, (rows, keys)
    chords = asked[:, vocab.chord_ids]
    note_or_chord = np.logaddexp(log_sum_exp(notes), log_sum_exp(chords))  # (rows, 1)
    notes += CHORD_LEAN * vocab.has_key[wanted - vocab.chord_ids.start]
    # The note right after a Chord token is the lowest at that moment: the bass.
    root = (wanted - vocab.chord_ids.start) % 12
    is_root = vocab.key_pitches % 12 == root[:, None]
    notes += BASS_LEAN * is_root * (state.kind[rows, None] == Kind.CHORD)
    notes += note_or_chord - log_sum_exp(notes)  # now their probabilities add up to note_or_chord
    notes[is_due] = ILLEGAL
    chords[:] = ILLEGAL
    asked[is_due, wanted[is_due]] = note_or_chord[is_due, 0]
    logits[rows] = asked
    return logits


def lift_at_change(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """No note that rings on into the next chord of --chords."""
    vocab = request.vocab
    if not len(request.chords) or not (state.kind == Kind.VELOCITY).any():
        return logits
    wanted = request.chords
    n = len(wanted)
    now = request.twelfth(state)  # (B,)
    later = now[:, None] + np.arange(1, n + 1)  # the next n twelfths, (B, n)
    is_other = wanted[later % n] != wanted[now % n][:, None]
    twelfths_left = np.where(is_other.any(axis=1), is_other.argmax(axis=1) + 1, math.inf)
    end = (now % 12 + twelfths_left) * state.bar_length / 12  # assuming bars of equal length
    left = np.maximum(end - state.position, vocab.lengths.min())  # keep one length legal
    logits[:, vocab.duration_ids][vocab.lengths > left[:, None]] = ILLEGAL
    return logits


def no_silent_opening(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Neither the first bar nor the piece can end before there is a note."""
    in_first = state.bar == 1
    if not in_first.any():
        return logits
    # After a note, the last token is a Duration, or a Tempo in a bar that already has a chord.
    has_no_note = np.isin(state.kind, (Kind.TIMESIG, Kind.TEMPO)) & (state.chord == 0)
    for token_id in (request.vocab.bar_id, request.vocab.eos_id):
        logits[in_first & has_no_note, token_id] = ILLEGAL
    return logits


def end_on_the_tonic(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """No end before the piece is long enough; from then on, an end on its tonic is likelier."""
    eos_id = request.vocab.eos_id
    if not request.vocab.may_come(state, eos_id):
        return logits
    logits[state.bar < request.least_bars, eos_id] = ILLEGAL
    # Above 0 from the first bar in which the piece may end, rising to 1 in the last one.
    done = (state.bar - request.least_bars + 1) / (request.most_bars - request.least_bars + 1)
    # The harmony is the tonic triad, and the last note, the highest of its moment, the tonic.
    root = (request.tonics - request.vocab.chord_ids.start) % 12
    is_home = (state.chord == request.tonics) & (state.pitch % 12 == root)
    logits[:, eos_id] += END_LEAN * np.maximum(0, done) * is_home
    return logits


def temperature(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Pitches and chords drawn more safely (below 1) or more wildly (above 1).

    The total probability of notes, and that of chords, stays the same, and so does the rhythm.
    """
    if request.sample.temperature in (0, 1):
        return logits
    for ids in (request.vocab.pitch_ids, request.vocab.chord_ids):
        if not request.vocab.may_come(state, ids.start):
            continue
        of_kind = logits[:, ids]
        scaled = of_kind / request.sample.temperature
        logits[:, ids] = scaled + (log_sum_exp(of_kind) - log_sum_exp(scaled))
    return logits


def top_k(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Only the k likeliest ids."""
    k = request.sample.top_k
    if k == 0 or k >= logits.shape[1]:
        return logits
    least = np.partition(logits, -k, axis=1)[:, -k]  # the k-th largest
    logits[logits < least[:, None]] = ILLEGAL
    return logits


def top_p(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Only the likeliest ids that together have probability p: nucleus sampling."""
    if request.sample.top_p in (0, 1):
        return logits
    order = (-logits).argsort(axis=1)  # the likeliest first
    in_order = np.take_along_axis(logits, order, axis=1)
    probability = np.exp(in_order - log_sum_exp(logits))
    likelier = probability.cumsum(axis=1) - probability  # the total of all likelier ids
    in_order[likelier >= request.sample.top_p] = ILLEGAL
    np.put_along_axis(logits, order, in_order, axis=1)
    return logits


def min_p(logits: np.ndarray, state: State, request: Request) -> np.ndarray:
    """Only ids whose probability is at least min_p times that of the likeliest one."""
    if request.sample.min_p == 0:
        return logits
    least = logits.max(axis=1, keepdims=True) + math.log(request.sample.min_p)
    logits[logits < least] = ILLEGAL
    return logits


RULES = [
    on_the_grid,
    grammar,
    no_silent_opening,
    end_on_the_tonic,
    steady_tempo,
    within_gap,
    wanted_chords,
    lift_at_change,
    temperature,
    top_k,
    top_p,
    min_p,
]


def draw(logits: np.ndarray, is_greedy: bool, rng: np.random.Generator) -> np.ndarray:
    """The next ids (B,), drawn from logits (B, V); if greedy, the likeliest ones."""
    if is_greedy:
        return logits.argmax(axis=1)
    cumulative = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
    u = rng.random((len(logits), 1), np.float32) * cumulative[:, -1:]
    return (cumulative > u).argmax(axis=1)  # the first id beyond u


class Writing:
    """B pieces being written token by token; those that have ended go on, but are ignored."""

    def __init__(
        self,
        model: PianoGPT,
        vocab: Vocabulary,
        opening: np.ndarray,
        B: int,
        style: int = 0,
        guidance: float = 1.0,
    ):
        """opening (T,): the ids that all pieces begin with, from BOS on.

        style: its number; guidance: see next_logits
        """
        self.model = model
        self.vocab = vocab
        self.style = style
        self.guidance = guidance
        trace = vocab.trace(opening)
        self.state = State(*(np.repeat(column[-1], B) for column in trace))
        # What has been written so far: one array (B,) per token.
        self.ids = [np.repeat(token, B) for token in opening]
        self.times = [np.repeat(time, B) for time in trace.time]
        self.pitches = [np.repeat(pitch, B) for pitch in trace.pitch]
        self.sounding = np.zeros((B, 12))  # how long each pitch class has sounded
        self.count_shared_notes(trace, opening)
        self.cache = KeyValueCache(model, B if guidance == 1 else 2 * B)
        self.window: Window | None = None  # what the model read last: a whole window or one token
        self.window_start = 0  # index of the token at which the window in the cache begins

    def count_shared_notes(self, trace: State, ids: np.ndarray) -> None:
        """Add the notes of music that all pieces share, ids (T,), to self.sounding."""
        ends = trace.kind == Kind.DURATION
        lengths = self.vocab.lengths[ids[ends] - self.vocab.duration_ids.start]
        self.sounding += np.bincount(trace.pitch[ends] % 12, lengths, 12)

    def append(self, ids: np.ndarray) -> None:
        """Append one token to each piece."""
        self.state = self.vocab.advance(self.state, ids)
        self.ids.append(ids)
        self.times.append(self.state.time)
        self.pitches.append(self.state.pitch)
        rows = np.flatnonzero(self.state.kind == Kind.DURATION)  # pieces that just completed a note
        if len(rows):
            lengths = self.vocab.lengths[ids[rows] - self.vocab.duration_ids.start]
            self.sounding[rows, self.state.pitch[rows] % 12] += lengths

    def tonic_chords(self) -> np.ndarray:
        """Each piece's tonic triad, as the id of its Chord token, (B,)."""
        # The first 24 chords are the major and minor triads, in the order of the keys.
        return self.vocab.chord_ids.start + closest_keys(self.sounding)

    def new_window(self) -> Window:
        """The last tokens of each piece: up to two thirds of a window at first, later a third."""
        share = OPENING_OF_WINDOW if self.window is None else KEPT_OF_WINDOW
        length = int(self.model.sizes.block_size * share)
        self.window_start = max(0, len(self.ids) - length)
        first = max(0, self.window_start - MEMORY)
        columns = []
        for rows in (self.ids, self.times, self.pitches):
            columns.append(torch.from_numpy(np.stack(rows[first:], axis=1)))  # (B, N)
        B, N = columns[0].shape
        offsets = torch.arange(B + 1) * N  # the B pieces as a corpus, for cut_windows
        style = torch.full((B,), self.style)
        corpus = Corpus(*(column.flatten() for column in columns), offsets, style)
        starts = offsets[:-1] + self.window_start - first
        window = cut_windows(corpus, starts, len(self.ids) - self.window_start, self.vocab)
        return window._replace(targets=None).to(self.model.head.weight.device)

    def last_token(self) -> Window:
        """The newest token of each piece, as a continuation of the window in the cache."""
        old = self.window
        order = TOKEN_BEATS * self.vocab.grid * (len(self.ids) - 1 - self.window_start)
        time = self.times[-1] - self.times[self.window_start] + order
        columns = torch.from_numpy(np.stack([self.ids[-1], time, self.pitches[-1]]))[:, :, None]
        idx, time, pitch = columns.to(old.idx.device, torch.float32)  # 3 x (B, 1)
        recent = torch.cat([old.recent, old.idx], dim=1)[:, -RECENT:]
        return old._replace(idx=idx.long(), time=time, pitch=pitch, recent=recent)

    def next_logits(self) -> np.ndarray:
        """The logits of the next ids, (B, V).

        When the cache is full, the newest part of its window is read again as a new window. With a
        guidance other than 1, the model reads each piece twice, with its style and without, and
        the difference that the style makes is multiplied by the guidance.
        """
        if self.window is None or self.cache.length == self.model.sizes.block_size:
            self.cache.length = 0
            self.window = self.new_window()
        else:
            self.window = self.last_token()
        if self.guidance == 1:
            logits = self.model(self.window, self.cache)[:, -1]
        else:
            without = self.window._replace(style=torch.zeros_like(self.window.style))
            both = self.window.joined(without)
            styled, plain = self.model(both, self.cache)[:, -1].chunk(2)
            logits = plain + self.guidance * (styled - plain)
        return logits.float().cpu().numpy()


class GapWriting(Writing):
    """One piece in which a gap is being filled.

    The model reads tokens in the order that it learned from move_gaps: what is before the gap, what
    is after it, FILL, and what has been written so far.
    """

    def __init__(
        self, model: PianoGPT, vocab: Vocabulary, gap: Gap, style: int = 0, guidance: float = 1.0
    ):
        opening = np.append(gap.ids[: gap.begin], vocab.bar_id)
        super().__init__(model, vocab, opening, 1, style, guidance)
        self.gap = gap
        self.trace = vocab.trace(gap.ids)
        after = slice(gap.end, None)
        self.count_shared_notes(State(*(column[after] for column in self.trace)), gap.ids[after])

    def share_window(self, begin: int) -> tuple[int, int, int]:
        """How many tokens of a new window are before the gap, after it, and newly written in it.

        begin: where the bar in progress begins. The music before and after gets equal shares; if
        one side is short, the other gets more.
        """
        T = self.model.sizes.block_size
        gap = self.gap
        written = min(len(self.ids) - begin, T // 4)
        # Leave room for about as many tokens as the old bars had.
        to_write = min(max(gap.end - gap.begin, T // 4), T // 2)
        around = T - 1 - written - to_write  # the 1 is FILL
        after = min(len(gap.ids) - gap.end, max(around // 2, around - begin))
        before = min(begin, around - after)
        return before, after, written

    def new_window(self) -> Window:
        """What is around the gap, FILL, and what has been written in the gap.

        When the window is full, finished bars of the gap become part of what is before it. If the
        bar in progress exceeds a quarter of the window, its beginning is left out.
        """
        gap = self.gap
        ids = np.concatenate(self.ids)
        bars = np.flatnonzero(ids == self.vocab.bar_id)
        begin = bars[-1]  # of the bar in progress
        old_begin = np.flatnonzero(gap.ids == self.vocab.bar_id)[len(bars) - 1]
        before, after, written = self.share_window(begin)
        self.window_start = begin - before

        # (3, N) each: ids, times, pitches
        so_far = np.stack([ids, np.concatenate(self.times), np.concatenate(self.pitches)])
        of_piece = np.stack([gap.ids, self.trace.time, self.trace.pitch])
        # As in move_gaps: what follows the gap must not give away the old bars' last pitch.
        says_pitch = self.vocab.says.pitch[gap.ids[gap.end :]] != SAYS_NOTHING
        of_piece[2, gap.end :][says_pitch.cumsum() == 0] = so_far[2, begin]
        fill = so_far[:, begin].copy()
        fill[0] = self.vocab.fill_id
        before_it = np.arange(self.window_start, begin)
        after_it = np.arange(gap.end, gap.end + after)  # places in the old piece
        newest = np.arange(len(ids) - written, len(ids))
        columns = np.concatenate(
            [so_far[:, before_it], of_piece[:, after_it], fill[:, None], so_far[:, newest]], axis=1
        )
        idx, time, pitch = torch.from_numpy(columns)[:, None]  # (1, N) each
        # As in move_gaps, each token has the order of its place in the music. This assumes that the
        # bars still to be written will have as many tokens as the old ones.
        places = np.concatenate([before_it, after_it + (begin - old_begin), [begin], newest])
        order = TOKEN_BEATS * self.vocab.grid * torch.from_numpy(places - self.window_start)
        # Everything that the window leaves out, on both sides, is counted, to stay in key.
        left_out = [ids[: self.window_start], ids[begin : newest[0]], gap.ids[gap.end + after :]]
        rest = np.concatenate(left_out)
        counts = np.bincount(rest, minlength=len(self.vocab.words)) / max(MEMORY, len(rest))
        recent = np.append(np.full(RECENT, PAD), ids[: self.window_start])[-RECENT:]
        window = Window(
            idx=idx.long(),
            time=(time - self.times[self.window_start].item() + order).float(),
            pitch=pitch.float(),
            recent=torch.from_numpy(recent)[None],
            before=torch.from_numpy(counts).float()[None],
            style=torch.tensor([self.style]),
        )
        return window.to(self.model.head.weight.device)


@contextmanager
def few_threads(pieces: int) -> Iterator[None]:
    """Use a single thread while only a few pieces are being written.

    Their steps are so small that a second thread hardly helps. On a busy machine, where threads
    keep waiting for each other, a single one is several times faster.
    """
    threads = torch.get_num_threads()
    if pieces < MANY_PIECES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_request(
    sample: SampleSettings, vocab: Vocabulary, prompt_ids: np.ndarray | None
) -> Request:
    """What the settings and the prompt, ids (T,), ask of the music."""
    old_bars = 0
    positions = np.empty(0, int)
    if prompt_ids is not None:
        old_bars = int((prompt_ids == vocab.bar_id).sum())
        positions = find_grid(prompt_ids, vocab)
    if sample.division:
        positions = divide_beat(min(sample.division, vocab.grid), vocab.grid)
    chords, _ = parse_chords(sample.chords)
    return Request(vocab, sample, chords.flatten() + vocab.chord_ids.start, old_bars, positions)


@torch.inference_mode()
def generate(
    model: PianoGPT,
    vocab: Vocabulary,
    sample: SampleSettings,
    seed: int,
    prompt_ids: np.ndarray | None = None,
    stopped: Callable[[], bool] = lambda: False,
    style: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, ids from BOS on) for --num-samples new pieces, as each ends.

    prompt_ids: (T,) from BOS on, the music to continue or, with --rewrite, to rewrite in part.
    stopped: whether to stop early. style: its number.
    """
    request = make_request(sample, vocab, prompt_ids)
    rng = np.random.default_rng(seed)
    if sample.rewrite:
        for number in range(1, sample.pieces + 1):
            ids = fill_gaps(model, prompt_ids, request, rng, stopped, style)
            if stopped():
                return
            yield number, ids
        return
    opening = np.array([vocab.bos_id])
    if prompt_ids is not None:
        opening = np.append(prompt_ids, vocab.bar_id)  # the continuation begins with a bar line
    for first in range(0, sample.pieces, AT_ONCE):
        if stopped():
            return
        B = min(AT_ONCE, sample.pieces - first)
        writing = Writing(model, vocab, opening, B, style, sample.guidance)
        for number, ids in write_together(writing, request, rng, stopped):
            yield first + number, ids


def fill_gaps(
    model: PianoGPT,
    ids: np.ndarray,
    request: Request,
    rng: np.random.Generator,
    stopped: Callable[[], bool],
    style: int,
) -> np.ndarray:
    """A piece, ids (T,) from BOS on, with the bars of --rewrite rewritten and EOS added."""
    vocab = request.vocab
    ids = np.append(ids, vocab.eos_id)
    for first, last in parse_bars(request.sample.rewrite, int((ids == vocab.bar_id).sum())):
        gap = find_gap(ids, first, last, vocab)
        of_gap = replace(request, gap=gap, old_bars=first - 1)
        writing = GapWriting(model, vocab, gap, style, request.sample.guidance)
        for _, written in write_together(writing, of_gap, rng, stopped):  # one; none if stopped
            ids = np.append(written, ids[gap.end :])
    return ids


def write_together(
    writing: Writing, request: Request, rng: np.random.Generator, stopped: Callable[[], bool]
) -> Iterator[tuple[int, np.ndarray]]:
    """Write B pieces token by token; yield each as (number from 1, ids) when it ends.

    Keeps request.tonics up to date.
    """
    request.tonics = writing.tonic_chords()
    B = len(request.tonics)
    is_running = np.full(B, True)
    pbar = progress_bar(desc="writing", unit=" tokens", unit_scale=B, leave=False)
    with few_threads(B), pbar:
        while is_running.any() and not stopped():
            logits = writing.next_logits()
            begins_bar = writing.state.kind == Kind.BAR
            if begins_bar.any():
                request.tonics = np.where(begins_bar, writing.tonic_chords(), request.tonics)
            for rule in RULES:
                logits = rule(logits, writing.state, request)
            writing.append(draw(logits, request.sample.temperature == 0, rng))
            state = writing.state
            is_cut = state.bar > request.most_bars
            ends = is_running & (is_cut | (state.kind == Kind.EOS))
            is_running &= ~ends
            pbar.update()
            for n in np.flatnonzero(ends):
                ids = np.array([tokens[n] for tokens in writing.ids])
                # A piece that was cut off has one Bar token too many.
                yield int(n) + 1, ids[:-1] if is_cut[n] else ids


# ==== You may stop here. Part II: the machinery

# ---- 7. Folder: find files, read them in worker processes, cache, join recordings, split

SPLITS = ("train", "validation", "test")
SAME_MUSIC = 24  # recordings that share a run of this many melodic intervals are one work
SAME_DIFFERENT = 8  # distinct intervals the run must have, so that scales and trills do not count
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, with random-looking bits
HASH_PART = 2**20  # intervals hashed at a time, to save memory
COMPARED_BITS = 4  # passages are compared in 2^4 batches, one after another, to save memory
NO_HASH = np.uint64(2**64 - 1)  # stands for "no passage"; sorts above every other hash
MIDI_SUFFIXES = (".mid", ".midi", ".kar", ".rmi")
FILE_SECONDS = 120  # time limit for reading a file; a million notes take 20
FILE_MEGABYTES = 16  # size limit of a file; the largest piano files have 1
WORKER_GIGABYTES = 4  # memory limit for reading a file
UNREAD = "unread"  # in place of the hash of a file that cannot be read
CACHE_FORMAT = "pianogpt cache 1"
CACHE_SECONDS = 20  # a crash loses at most this much reading


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that path always holds either all the old bytes or all the new ones."""
    new = Path(f"{path}.tmp")  # overwrites whatever a killed run left there
    unfinished.add(new)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as e:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        unfinished.discard(new)


def hash_tensors(text: str, tensors: dict[str, Tensor]) -> str:
    """A checksum over a text and the names and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().numpy())
    return digest.hexdigest()


def save_tensors(path: Path, form: str, values, tensors: dict[str, Tensor]) -> None:
    """Write tensors, plus values as JSON, to a safetensors file; form: what kind of file it is."""
    text = json.dumps(values)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": form, "json": text, "sha256": hash_tensors(text, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_tensors(path: Path, form: str) -> tuple:
    """The values and tensors that save_tensors wrote. Raises an error if the file is damaged.

    The tensors are memory-mapped: they are read once for the checksum, but take no memory.
    """
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form:
            raise ValueError("not in the format of this version")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = metadata["json"]
    if metadata["sha256"] != hash_tensors(text, tensors):
        raise ValueError("its checksum is wrong")
    return json.loads(text), tensors


def find_files(folder: Path) -> dict[Path, str]:
    """{MIDI file: hash of its content} in a folder, at any depth, sorted by path; follows links.

    The hash of a file that cannot be read is "unread". Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it, or name another")

    def say_unlisted(error: OSError) -> None:
        say(f"{error.filename} cannot be listed: {error.strerror}")

    found = []
    seen = set()
    for root, folders, names in os.walk(folder, onerror=say_unlisted, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            say(f"{root} leads to a folder that has already been read")
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders + names:  # also lists a folder called x.mid, to report it as skipped
            if Path(name).suffix.lower() in MIDI_SUFFIXES and not name.startswith("."):
                found.append(Path(root, name))
    if not found:
        raise UserError(f"no MIDI file under {folder}: put some there, or name another folder")
    contents = {}
    for path in sorted(found):
        try:
            contents[path] = hash_content(read_bytes(path))
        except (OSError, UserError):
            contents[path] = UNREAD
    return contents


def list_contents(files: dict[Path, str], folder: Path) -> list[str]:
    """ "hash name" of each file in a folder; comparing these lines shows what has changed."""
    return [f"{content} {path.relative_to(folder).as_posix()}" for path, content in files.items()]


def hash_content(data: bytes) -> str:
    """A hash that tells files apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_bytes(path: Path) -> bytes:
    """The bytes of a file of at most FILE_MEGABYTES. Raises UserError."""
    if not path.is_file():
        raise UserError("not a file")
    if path.stat().st_size > FILE_MEGABYTES * 2**20:
        raise UserError(f"larger than {FILE_MEGABYTES} MB")
    return path.read_bytes()


def read_file(path: Path, vocab: Vocabulary) -> tuple[Piece, str]:
    """A file as a piece, with its path not yet set, and a hash of its content.

    The hash is empty if the problem may be temporary, such as a lack of memory.
    """
    content = ""
    try:
        data = read_bytes(path)
        content = hash_content(data)
        return read_piece(data, vocab), content
    except UserError as e:
        return Piece(problem=str(e)), content
    except MemoryError:
        return Piece(problem="not enough memory"), ""
    except OSError as e:
        return Piece(problem=e.strerror or str(e)), ""
    except Exception as e:  # a bug in this script, which must not be blamed on the file
        raise RuntimeError(f"reading {path} failed") from e


worker_vocab: Vocabulary | None = None  # set in worker processes only


def start_worker(vocab: Vocabulary) -> None:
    """Give a worker process its vocabulary and its memory limit."""
    global worker_vocab
    worker_vocab = vocab
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of the main process's handler
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + WORKER_GIGABYTES * 2**30
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def read_in_worker(path: Path) -> tuple[Piece, str]:
    """read_file in a worker process."""
    return read_file(path, worker_vocab)


# What can go wrong in a worker, and how that is reported for its file.
WORKER_PROBLEMS = {
    WorkerTimeout: "takes too long to read",
    ProcessExpired: "crashed its reader",
    MemoryError: "not enough memory",
}


def worker_problem(error: Exception) -> str:
    """The entry of WORKER_PROBLEMS for an error; subclasses count as their base class."""
    return next(text for kind, text in WORKER_PROBLEMS.items() if isinstance(error, kind))


@contextmanager
def start_pool(workers: int, vocab: Vocabulary) -> Iterator[ProcessPool]:
    """A pool of worker processes, with a vocabulary, for the block. Raises UserError."""
    # fork starts a worker almost instantly, but it is unsafe on macOS and missing on Windows.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPool(workers, 0, start_worker, (vocab,), context) as pool:
            try:
                yield pool
            finally:
                pool.stop()  # even if some results were never collected
    except BrokenProcessPool:
        raise UserError("cannot start a process to read files: close other programs") from None


def read_in_workers(paths: list[Path], vocab: Vocabulary) -> Iterator[tuple[Path, Piece, str]]:
    """Yield (path, piece, hash) for each path; if a worker crashes or hangs, its piece says so."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with start_pool(min(cores, len(paths)), vocab) as pool:
        results = pool.map(read_in_worker, paths, timeout=FILE_SECONDS).result()
        for path in paths:
            try:
                piece, content = next(results)
                yield path, piece, content
            except tuple(WORKER_PROBLEMS) as e:
                yield path, Piece(problem=worker_problem(e)), ""


def cache_folder(cache_dir: str, vocab: Vocabulary) -> Path:
    """The cache folder for this vocabulary, this script and the installed libraries.

    Editing section 2 or 3 may change how files are read, so it also changes the folder.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    _, _, rest = source.partition("# ---- 2. Reading")
    reading, _, _ = rest.partition("# ---- 4. Model")
    versions = (version("miditok"), version("symusic"))
    key = repr((reading, vocab.words, versions))
    return Path(cache_dir, hashlib.sha256(key.encode()).hexdigest()[:16])


def save_pieces(cache: Path, pieces: dict[str, Piece]) -> None:
    """Write pieces, {hash of the file: piece}, to a new file in the cache."""
    heads = []
    for content, piece in pieces.items():
        values = {k: v for k, v in vars(piece).items() if not isinstance(v, np.ndarray)}
        heads.append(values | {"content": content})
    columns = make_corpus(list(pieces.values()))._asdict()
    name = f"{hash_content(' '.join(pieces).encode())}-{os.getpid()}"  # two runs may write at once
    save_tensors(cache / f"{name}.safetensors", CACHE_FORMAT, heads, columns)


def load_pieces(cache: Path) -> dict[str, Piece]:
    """Everything that save_pieces wrote, memory-mapped; damaged cache files are ignored."""
    pieces = {}
    for path in cache.glob("*.safetensors"):
        with suppress(Exception):
            heads, tensors = load_tensors(path, CACHE_FORMAT)
            columns = {name: tensors[name].numpy() for name in ("ids", "time", "pitch")}
            offsets = tensors["offsets"].tolist()
            of_file = {}
            for head, (begin, end) in zip(heads, itertools.pairwise(offsets), strict=True):
                arrays = {name: column[begin:end] for name, column in columns.items()}
                content = head.pop("content")
                of_file[content] = Piece(**head, **arrays)
            pieces |= of_file
    return pieces


def read_folder(
    folder: Path, vocab: Vocabulary, cache_dir: str, files: dict[Path, str] | None = None
) -> list[Piece]:
    """Every MIDI file under a folder as a piece, sorted by path; cached by content.

    files: the result of find_files(folder), if known; a file that cannot be read this time is
    marked UNREAD in it.
    """
    files = files or find_files(folder)
    cache = cache_folder(cache_dir, vocab) if cache_dir else None
    known = load_pieces(cache) if cache else {}
    # Copies, because two files may have the same content
    pieces = {path: replace(known[content]) for path, content in files.items() if content in known}
    new = [path for path in files if path not in pieces]
    unsaved = {}
    saved = time.monotonic()
    reader = read_in_workers(new, vocab) if new else []
    for path, piece, content in progress_bar(reader, total=len(new), desc="reading", unit="file"):
        pieces[path] = piece
        if content:
            unsaved[content] = piece
        else:
            files[path] = UNREAD  # its problem may be temporary; the file will count as new
        is_due = time.monotonic() - saved > CACHE_SECONDS or len(pieces) == len(files)
        if cache and unsaved and is_due:
            try:
                save_pieces(cache, unsaved)
            except OSError as e:
                say(f"no cache: {cache} cannot be written to ({e.strerror or e})")
                cache = None
            unsaved = {}
            saved = time.monotonic()
    for path in files:
        pieces[path].path = path.relative_to(folder).as_posix()
    return [pieces[path] for path in files]


def say_changes(changes: dict[str, int]) -> None:
    """Report what the tokens could not represent, and how often."""
    changed = [f"{change}: {number:,}" for change, number in changes.items() if number]
    if changed:
        say("changed: " + ", ".join(changed))


def read_music(
    folder: Path, vocab: Vocabulary, cache_dir: str, files: dict[Path, str] | None = None
) -> list[Piece]:
    """The pieces in a folder that contain music; reports what was skipped or changed."""
    found = read_folder(folder, vocab, cache_dir, files)
    pieces = [piece for piece in found if not piece.problem]
    skipped = [f"{piece.path} ({piece.problem})" for piece in found if piece.problem]
    if skipped:
        say(f"skipped: {count(len(skipped), 'file')}: {'; '.join(skipped)}")
    if not pieces:
        raise UserError(
            f"none of the {len(found)} MIDI files under {folder} holds piano music: try another"
        )
    hours = sum(piece.seconds for piece in pieces) / 3600
    notes = sum(piece.notes for piece in pieces)
    tokens = sum(len(piece.ids) for piece in pieces)
    say(
        f"music: {count(len(pieces), 'file')} under {folder}, {hours:.1f} hours, "
        f"{notes:,} notes, {tokens:,} tokens"
    )
    changes = Counter()
    for piece in pieces:
        changes.update(piece.changes)
    say_changes(changes)
    return pieces


def count_different(intervals: np.ndarray) -> np.ndarray:
    """How many distinct intervals there are among the SAME_MUSIC from each place on, (N,).

    A passage counts each distinct interval at its first occurrence. So interval n counts in the
    passages that start after its previous occurrence, and at n at the latest.
    """
    N = len(intervals)
    by_kind = np.argsort(intervals, kind="stable")
    before = by_kind[:-1]
    after = by_kind[1:]
    is_same = intervals[before] == intervals[after]
    previous = np.full(N, -1)
    previous[after[is_same]] = before[is_same]
    number = np.arange(N)
    first_passage = np.maximum(previous + 1, number - SAME_MUSIC + 1)
    more = np.bincount(first_passage, minlength=N + 1)
    less = np.bincount(number + 1, minlength=N + 1)
    return (more - less).cumsum()[:N]


def hash_passages(intervals: np.ndarray) -> np.ndarray:
    """A hash of the SAME_MUSIC intervals from each place on; (N,) uint8 -> uint64.

    It is NO_HASH where the passage would run past the end of its piece, or has fewer than
    SAME_DIFFERENT distinct intervals. The last places, where no passage fits, are left out.
    """
    N = max(0, len(intervals) - SAME_MUSIC + 1)
    hashes = np.zeros(N, np.uint64)
    for n in range(SAME_MUSIC):
        hashes = hashes * HASH_BASE + intervals[n : n + N]  # modulo 2^64
    ends = np.append(0, (intervals == PIECE_END).cumsum())
    has_end = ends[SAME_MUSIC:] > ends[:N]
    hashes[has_end | (count_different(intervals)[:N] < SAME_DIFFERENT)] = NO_HASH
    return hashes


class Groups:
    """Union-find: the numbers 0 to N - 1 in groups; each group is named by one of its members."""

    def __init__(self, N: int):
        self.same = list(range(N))  # for each number, another member of its group, or itself

    def __getitem__(self, n: int) -> int:
        """The group of a number."""
        while self.same[n] != n:
            self.same[n] = self.same[self.same[n]]  # path halving: shortens the next search
            n = self.same[n]
        return n

    def join(self, one: int, two: int) -> None:
        """Merge the groups of two numbers."""
        self.same[self[one]] = self[two]

    def numpy(self) -> np.ndarray:
        """The group of each number, (N,)."""
        return np.array([self[n] for n in range(len(self.same))], int)


def pairs_that_share(
    places: np.ndarray,
    hashes: np.ndarray,
    intervals: np.ndarray,
    piece_of: np.ndarray,
    works: np.ndarray,
) -> list[list[int]]:
    """Pairs of pieces that share one of the passages at these places; one pair per pair of works.

    piece_of: the number of the piece that each interval is in; works: each piece's work so far.
    """
    places = places[np.argsort(hashes[places])]
    is_same = hashes[places[1:]] == hashes[places[:-1]]
    both = np.stack([places[:-1][is_same], places[1:][is_same]])  # (2, passages)
    one, two = works[piece_of[both]]
    _, first = np.unique(one * len(works) + two, return_index=True)
    both = both[:, first[one[first] != two[first]]]
    # (pairs, SAME_MUSIC) each
    passage, other = intervals[both[:, :, None] + np.arange(SAME_MUSIC)]
    is_equal = (passage == other).all(axis=1)  # equal hashes may be a coincidence
    return piece_of[both[:, is_equal]].T.tolist()


def join_recordings(pieces: list[Piece], vocab: Vocabulary) -> None:
    """Assign recordings of the same music, in any key, to the same work.

    A work is named by the lowest hash of its passages. So its name, which decides whether it is
    held out, depends on its own music, not on what else is in the folder.
    """
    of_pieces = [np.frombuffer(pitch_intervals(piece.ids, vocab), np.uint8) for piece in pieces]
    intervals = np.concatenate([np.empty(0, np.uint8), *of_pieces])
    lengths = [len(one) for one in of_pieces]
    piece_of = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    hashes = np.full(len(intervals), NO_HASH)
    for begin in range(0, len(intervals), HASH_PART):
        part = hash_passages(intervals[begin : begin + HASH_PART + SAME_MUSIC - 1])
        hashes[begin : begin + len(part)] = part

    works = Groups(len(pieces))
    first_of: dict[str | bytes, int] = {}
    for n, piece in enumerate(pieces):
        works.join(n, first_of.setdefault(piece.work, n))  # as already grouped by split_pieces
        works.join(n, first_of.setdefault(piece.ids.tobytes(), n))  # exact copies, however short
    # To save memory, passages are compared in batches: those whose hashes begin with the same bits
    part_of = (hashes >> np.uint64(64 - COMPARED_BITS)).astype(np.uint8)
    for part in range(2**COMPARED_BITS):
        places = np.flatnonzero((part_of == part) & (hashes != NO_HASH))
        for pair in pairs_that_share(places, hashes, intervals, piece_of, works.numpy()):
            works.join(*pair)

    lowest = np.full(len(pieces), NO_HASH)
    begins = np.cumsum([0, *lengths])
    for n, length in enumerate(lengths):
        if length:
            of_piece = hashes[begins[n] : begins[n + 1]].min()
            lowest[works[n]] = min(lowest[works[n]], of_piece)
    names: dict[int, str] = {}
    for n, piece in enumerate(pieces):
        least = lowest[works[n]]
        name = f"music {least:016x}" if least < NO_HASH else piece.work
        piece.work = names.setdefault(works[n], name)


def read_split_tables(pieces: list[Piece], folder: Path) -> dict[Path, str]:
    """{path: split} of the files in MAESTRO's tables, found beside the pieces or above them."""
    places = {parent for piece in pieces for parent in Path(piece.path).parents}
    splits = {}
    for place in sorted(places):
        for table in sorted((folder / place).glob("maestro*.csv")):
            if table.is_file():
                text = table.read_text(encoding="utf-8", errors="replace")
                try:
                    for row in csv.DictReader(text.splitlines()):
                        splits[table.parent / (row.get("midi_filename") or "")] = row.get("split")
                except csv.Error as e:
                    raise UserError(f"{table} is not a table ({e}): fix or remove it") from None
    return splits


def given_splits(pieces: list[Piece], folder: Path) -> dict[str, str]:
    """{work: split} from MAESTRO's tables and from folders named after a split; "" if unassigned.

    A work assigned to several splits gets the last of them in SPLITS, so it is held out.
    """
    table = read_split_tables(pieces, folder)
    splits = dict.fromkeys((piece.work for piece in pieces), "")
    strength = ("", *SPLITS)
    for piece in pieces:
        said = [*Path(piece.path).parts[:-1], table.get(folder / piece.path)]
        for split in said:
            if split in SPLITS and strength.index(split) > strength.index(splits[piece.work]):
                splits[piece.work] = split
    return splits


def hold_out(works: list[str], percent: float) -> list[str]:
    """The works to validate on, a percentage of all; of two or more, at least one but never all.

    A work is chosen by a hash of its name alone, so a new work never moves an old one, unless
    there are so few that the one with the lowest hash is taken.
    """
    numbers = {work: hashlib.sha256(os.fsencode(work)).hexdigest() for work in works}
    limit = 2**32 * percent / 100
    chosen = sum(int(number[:8], 16) < limit for number in numbers.values())
    if percent > 0:
        chosen = max(1, chosen)
    by_number = sorted(works, key=numbers.get)
    return by_number[: min(chosen, len(works) - 1)]


def split_pieces(pieces: list[Piece], folder: Path, data: DataSettings, vocab: Vocabulary) -> None:
    """Set the work and the split of each piece."""
    for piece in pieces:
        piece.work = Path(piece.path).parent.as_posix() if data.piece_is_folder else piece.path
    join_recordings(pieces, vocab)
    splits = given_splits(pieces, folder)
    if "validation" not in splits.values():
        free = [work for work, split in splits.items() if split in ("", "train")]
        for work in hold_out(free, data.val_percent):
            splits[work] = "validation"
    for piece in pieces:
        piece.split = splits[piece.work] or "train"


# ---- 8. Prompts and samples: the music to continue, the files to write

# Markers at the bar lines where new music takes over from the prompt, and where the prompt resumes
PROMPT_ENDS = "end of prompt"
PROMPT_GOES_ON = "prompt goes on"
INTERVAL_ZERO = 128  # a melodic interval of n semitones is stored as the byte 128 + n
PIECE_END = 255  # the byte after the intervals of a piece
# How two hands share the notes (see split_hands), in semitones; fitted to two-staff scores
HAND_REACH = 4.5  # from a hand's middle key; beyond it the effort grows faster
HAND_SLOPE = 0.1  # effort per semitone of that distance
HAND_MOVE = 0.7  # effort per semitone that a hand moves when it has no time to move
HANDS_APART = 5  # least distance between the two middle keys
TOO_CLOSE = 1000  # effort if they are closer
LEFT_HOME = 54  # the usual place of the left hand
LEFT_AWAY = 0.03  # effort per semitone away from it


def hands_of_tracks(midi: MidiFile) -> list[tuple[float, int, bool]]:
    """(quarter note, pitch, whether the left hand plays it) of each note in a two-hand file.

    Such a file has notes in exactly two tracks, or two channels of one track; the one with the
    lower mean pitch is the left hand. For any other file the list is empty.
    """
    of_hands: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for event in midi.events:
        if event.strikes_key and event.channel != DRUMS:
            hand = of_hands.setdefault((event.track, event.channel), [])
            hand.append((event.tick / midi.tpq, event.data[0]))
    if len(of_hands) != 2:
        return []
    low, high = sorted(
        of_hands.values(), key=lambda hand: sum(pitch for _, pitch in hand) / len(hand)
    )
    return [(*note, True) for note in low] + [(*note, False) for note in high]


@dataclass
class Prompt:
    """The music to continue, or to rewrite in part, and what its file says about it.

    Times are in ticks: TPQ per quarter note, or, with --rewrite, a multiple of the file's own
    resolution, so that kept notes stay exact.
    """

    piano: Score  # as in the file, but in these ticks
    ids: np.ndarray  # (T,) from BOS on, without EOS
    end: int  # tick of the bar line where it ends
    tempos: list[Tempo]  # at least one
    time_signatures: list[TimeSignature]  # at least one
    key_signatures: list[KeySignature]
    changes: dict[str, int]  # what tokens cannot represent: how often
    hands: list[tuple[float, int, bool]]  # see hands_of_tracks
    # the bars to rewrite, as (first, last), counted from 1; if empty, the music is continued
    rewritten: list[tuple[int, int]] = field(default_factory=list)


def signs_before(end: int, signs: dict[int, tuple], make: Callable, scale: float) -> list:
    """The tempos or signatures of a file, {tick: values}, before the tick `end`, for symusic.

    make: their symusic class; scale: ticks of the result, and of `end`, per tick of the file.
    """
    made = []
    for tick, values in signs.items():
        at = round(tick * scale)
        if at < end:
            made.append(make(at, *values))
    return made


def early_limit(piano: Score, state: State, bar: int, grid: int) -> float:
    """How close to the end of a bar a note is rounded into the next bar, in quarter notes.

    Half a grid position. If the piece has a finer beat unit than the bar, MidiTok rounds twice:
    first to positions of the finer unit. bar: counted from 1; state: after each token, (T,).
    """
    last_token = np.flatnonzero(state.bar == bar)[-1]
    unit = state.beat_unit[last_token]
    finest = max([4, *(signature.denominator for signature in piano.time_signatures)])
    half = 4 / unit / grid / 2
    if finest > unit:
        half += 4 / finest / grid / 2
    return half


def cut_notes(track: Track, end: int, early: float) -> None:
    """End a track's notes at a bar line; drop those from `early` ticks before it on."""
    notes = track.notes.numpy()
    notes = select(notes, notes["time"] < end - early)
    notes["duration"] = np.minimum(notes["duration"], end - notes["time"])
    track.notes = Note.from_numpy(**notes)


def first_bars(ids: np.ndarray, bars: int, vocab: Vocabulary) -> np.ndarray:
    """The first bars of a piece, ids (T,) without EOS; empty if they hold no notes.

    They are decoded and re-encoded, so that notes end where the music is cut.
    """
    starts, _ = vocab.bar_lines(ids)
    if bars < len(starts):
        ids = ids[: starts[bars]]
    score = vocab.decode(ids)
    if not score.note_num():
        return np.empty(0, np.int16)
    ids = vocab.encode(vocab.quantize(score))
    signatures = np.flatnonzero(vocab.says.kind[ids] == Kind.TIMESIG)
    silent_bar = [vocab.bar_id, ids[signatures[-1]]]
    missing = bars - int((ids == vocab.bar_id).sum())  # restores silent bars at the end
    return np.append(ids, silent_bar * missing).astype(np.int16)


def let_ring(ids: np.ndarray, piano: Score, vocab: Vocabulary) -> np.ndarray:
    """ids (T,) of a piece, with bars added after its last onset for notes that still sound.

    piano: the score of the piece. A bar is added if more than half of it sounds.
    """
    notes = piano.tracks[0].notes.numpy()
    end = (notes["time"] + notes["duration"])[are_on_piano(notes)].max() / piano.tpq
    _, lines = vocab.bar_lines(ids)
    start = lines[-1]  # of a bar that may be added, in quarter notes
    ringing = []
    while True:
        tick = round(start * piano.tpq)
        metre = [sign for sign in piano.time_signatures if sign.time <= tick][-1]
        length = 4 * metre.numerator / metre.denominator
        if end <= start + length / 2:
            return np.append(ids, ringing).astype(ids.dtype)
        ringing += [vocab.bar_id, vocab.id_of[f"TimeSig_{metre.numerator}/{metre.denominator}"]]
        start += length


def read_prompt(sample: SampleSettings, vocab: Vocabulary) -> Prompt:
    """The prompt up to a bar line, where notes that still sound are cut. Raises UserError."""
    path = Path(sample.prompt)
    try:
        midi = parse_midi(read_bytes(path))
        piano, changes = make_piano(midi)
        piece = tokenize(piano, changes, vocab, silence=LONGEST_PIECE)
    except UserError as e:
        raise UserError(f"{path} cannot be continued ({e}): pass another --prompt") from None
    all_ids = let_ring(piece.ids[:-1], piano, vocab)  # without EOS
    starts, lines = vocab.bar_lines(all_ids)
    bars = sample.prompt_bars or len(starts)
    if bars > len(starts):
        raise UserError(f"{path} has only {count(len(starts), 'bar')}: ask for fewer")
    rewritten = parse_bars(sample.rewrite, bars) if sample.rewrite else []
    if 0 < sample.bars <= bars:
        raise UserError(f"the prompt alone has {count(bars, 'bar')}: pass a larger --bars")
    ids = first_bars(all_ids, bars, vocab)
    if not len(ids):
        raise UserError(f"the first {count(bars, 'bar')} of {path} hold no notes: ask for more")

    factor = math.ceil(TPQ / midi.tpq)  # a multiple of the file's ticks keeps its notes exact
    ticks = factor * midi.tpq if sample.rewrite else TPQ
    scale = ticks / midi.tpq
    end = round(lines[bars] * ticks)
    piano = piano.resample(ticks, min_dur=1)
    if bars < len(starts):
        early = early_limit(piano, vocab.trace(ids), bars, vocab.grid) * ticks
        cut_notes(piano.tracks[0], end, early)
    kept = {TEMPO_CHANGED}  # restored later, see restore_prompt and fill_score
    if sample.rewrite:
        kept |= {OUT_OF_RANGE, STRIKES_MERGED}
    tempos = {0: (120.0,)} | {tick: (tempo,) for tick, tempo in midi.tempos().items()}
    metres = {0: (4, 4)} | midi.time_signatures()
    return Prompt(
        piano=piano,
        ids=ids,
        end=end,
        tempos=signs_before(end, tempos, Tempo, scale),
        time_signatures=signs_before(end, metres, TimeSignature, scale),
        key_signatures=signs_before(end, midi.key_signatures(), KeySignature, scale),
        changes={change: n for change, n in piece.changes.items() if change not in kept},
        hands=hands_of_tracks(midi),
        rewritten=rewritten,
    )


def metre_goes_on(prompt: Prompt, vocab: Vocabulary, new_ids: np.ndarray) -> bool:
    """Whether new music, ids (T,) from a Bar token on, begins in the prompt's last metre."""
    old = prompt.time_signatures[-1]
    in_tokens = split_metre(round(16 * old.numerator / old.denominator), old.denominator)
    return in_tokens == [vocab.metre_of(new_ids[1])]  # after the Bar token


def restore_prompt(score: Score, prompt: Prompt, vocab: Vocabulary, new_ids: np.ndarray) -> None:
    """Restore the prompt's own tempos and signatures in its part of a score.

    Tokens round tempos, turn 2/2 into 4/4 and have no key signatures.
    """
    score.tempos = prompt.tempos + [t for t in score.tempos if t.time >= prompt.end]
    metres = list(prompt.time_signatures)
    if not metre_goes_on(prompt, vocab, new_ids):
        metres.append(TimeSignature(prompt.end, *vocab.metre_of(new_ids[1])))
    score.time_signatures = metres + [t for t in score.time_signatures if t.time > prompt.end]
    score.key_signatures = list(prompt.key_signatures)


def continue_alone(prompt: Prompt, vocab: Vocabulary, new_ids: np.ndarray) -> Score:
    """New music, ids (T,), as a score without its prompt, in the prompt's tempo, metre and key."""
    score = vocab.decode(np.append(vocab.bos_id, new_ids), prompt.tempos[-1].qpm)
    if metre_goes_on(prompt, vocab, new_ids):
        old = prompt.time_signatures[-1]
        score.time_signatures[0] = TimeSignature(0, old.numerator, old.denominator)
    for old in prompt.key_signatures[-1:]:
        score.key_signatures = [KeySignature(0, old.key, old.tonality)]
    return score


def sign_key(score: Score, new_key: KeySignature, begin: int) -> None:
    """Add the signature of the detected key, from the tick `begin` on, if it is a different key."""
    signatures = score.key_signatures
    # G flat and F sharp, 12 fifths apart, are the same key.
    if not signatures:
        signatures.append(new_key)
    elif (signatures[-1].key - new_key.key) % 12:
        new_key.time = begin
        score.key_signatures = [old for old in signatures if old.time < begin] + [new_key]


def fit_between(new: Notes, kept: Notes, late: int) -> Notes:
    """New notes that fit between the kept notes on the same key; all times in ticks.

    A new note ends when its key is struck again. It is dropped if a kept note holds its key,
    unless that note ends within `late` ticks, a rounding error: then the new note begins there.
    """
    fitting = []
    for n in range(len(new["time"])):
        same_key = kept["pitch"] == new["pitch"][n]
        start = new["time"][n]
        end = start + new["duration"][n]
        earlier = kept["time"] <= start
        lifted = (kept["time"] + kept["duration"])[same_key & earlier].max(initial=start)
        end = kept["time"][same_key & ~earlier].min(initial=end)  # or struck again before that
        if lifted <= start + late and lifted < end:
            new["time"][n] = lifted
            new["duration"][n] = end - lifted
            fitting.append(n)
    return select(new, np.array(fitting, int))


def fill_score(ids: np.ndarray, prompt: Prompt, vocab: Vocabulary) -> Score:
    """The prompt's score, with the rewritten bars taken from a piece, ids (T,)."""
    score = prompt.piano.copy()
    ticks = score.tpq
    written = vocab.decode(ids).resample(ticks, min_dur=1).tracks[0].notes.numpy()
    notes = score.tracks[0].notes.numpy()
    _, lines = vocab.bar_lines(ids)
    state = vocab.trace(ids)
    for first, last in prompt.rewritten:
        begin = round(lines[first - 1] * ticks)
        end = round(lines[last] * ticks)
        early_before = early_limit(prompt.piano, state, max(1, first - 1), vocab.grid) * ticks
        early_inside = early_limit(prompt.piano, state, last, vocab.grid) * ticks
        is_old = (notes["time"] < begin - early_before) | (notes["time"] >= end - early_inside)
        notes = select(notes, is_old)
        is_new = (written["time"] >= begin) & (written["time"] < end)
        new = select(written, is_new)
        new["duration"] = np.minimum(new["duration"], end - new["time"])
        new = fit_between(new, notes, late=round(2 * early_inside))  # both ends are rounded
        notes = {column: np.append(notes[column], new[column]) for column in notes}
        score.markers.append(TextMeta(begin, PROMPT_ENDS))
        if last < len(lines) - 1:
            score.markers.append(TextMeta(end, PROMPT_GOES_ON))
    notes = repair_overlaps(notes)  # resample rounds starts and ends separately
    score.tracks[0].notes = Note.from_numpy(**notes)
    score.tempos = list(prompt.tempos)
    score.time_signatures = list(prompt.time_signatures)
    score.key_signatures = list(prompt.key_signatures)
    return score


def reach(keys: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """The effort for a hand to play each key from each middle key, (keys, middles)."""
    distance = np.abs(keys[:, None] - middles)
    return HAND_SLOPE * distance + np.maximum(0, distance - HAND_REACH) ** 1.5


def split_hands(notes: Notes, known: np.ndarray, tpq: int) -> np.ndarray:
    """Which notes, given in order of time, the left hand plays, (N,) bool.

    known (N,): 1 for the left hand, 0 for the right, -1 where that is unknown
    tpq: ticks per quarter note

    Each hand has a place, its middle key, and plays the keys that are nearer to it than to the
    other hand. Dynamic programming (Viterbi) finds how the hands move over the keyboard with the
    least total effort. Effort is the sum of: for each key struck or held, its distance from the
    nearer hand; for each move of a hand, its distance, which costs more the less time there is;
    and for the left hand, its distance from its usual place.
    """
    left = np.arange(28, 76, 2)  # candidate middle keys of the left hand, (L,)
    right = np.arange(44, 100, 2)  # (R,)
    of_left = reach(notes["pitch"], left)  # (N, L)
    of_right = reach(notes["pitch"], right)  # (N, R)
    is_right = known == 0
    is_left = known == 1
    of_left[is_right] = math.inf
    of_right[is_left] = math.inf
    away = LEFT_AWAY * np.abs(left - LEFT_HOME)[:, None]
    too_close = np.where(right - left[:, None] < HANDS_APART, TOO_CLOSE, 0)
    effort_of_places = away + too_close  # (L, R)
    move_left = HAND_MOVE * np.abs(left[:, None] - left)  # (L from, L to)
    move_right = HAND_MOVE * np.abs(right[:, None] - right)

    onsets, first = np.unique(notes["time"], return_index=True)
    struck = np.split(np.arange(len(notes["time"])), first[1:])  # the notes of each onset
    hurry = 1 / (1 + np.diff(onsets, prepend=onsets[0]) / tpq)
    ends = notes["time"] + notes["duration"]
    down = np.empty(0, int)  # the notes that are sounding
    total = np.zeros(too_close.shape)  # the least effort to reach each pair of places
    came_from = []  # for each onset, each hand's best previous place: indices (L, R)
    # At each onset, the left hand moves first, then the right; then both play.
    for n, new in enumerate(struck):
        down = np.append(down[ends[down] > onsets[n]], new)
        effort = np.minimum(of_left[down, :, None], of_right[down, None])  # (notes, L, R)
        moved_left = total[:, None] + hurry[n] * move_left[:, :, None]  # (L from, L to, R)
        total = moved_left.min(axis=0)
        moved_right = total[:, :, None] + hurry[n] * move_right  # (L, R from, R to)
        total = moved_right.min(axis=1) + effort.sum(axis=0) + effort_of_places
        came = (moved_left.argmin(axis=0), moved_right.argmin(axis=1))
        came_from.append([place.astype(np.int8) for place in came])

    # Trace the best path backward. The left hand moved first, so here it moves last.
    plays_left = np.zeros(len(ends), bool)
    at_left, at_right = np.unravel_index(total.argmin(), total.shape)
    for n in reversed(range(len(onsets))):
        new = struck[n]
        plays_left[new] = of_left[new, at_left] < of_right[new, at_right]
        left_from, right_from = came_from[n]
        at_right = right_from[at_left, at_right]
        at_left = left_from[at_left, at_right]
    return plays_left


def match_hands(notes: Notes, prompt: Prompt, tpq: int, grid: int) -> np.ndarray:
    """Which hand plays each note in the prompt's file, (N,): the `known` of split_hands.

    Two notes are the same one if they have the same key and, in quarter notes, nearly the same
    time, because tokens round times to the grid.
    """
    known = np.full(len(notes["time"]), -1)
    by_key = defaultdict(list)
    for quarter, pitch, is_left in sorted(prompt.hands):
        by_key[pitch].append((quarter, is_left))
    for pitch, of_file in by_key.items():
        quarters, is_left = np.array(of_file).T
        mine = np.flatnonzero((notes["pitch"] == pitch) & (notes["time"] < prompt.end))
        time = notes["time"][mine] / tpq
        nearest = np.searchsorted((quarters[:-1] + quarters[1:]) / 2, time)
        # Half a grid position, plus half of one of a finer beat unit: see early_limit.
        is_same = np.abs(quarters[nearest] - time) <= 0.76 / grid
        known[mine[is_same]] = is_left[nearest[is_same]]
    return known


def two_tracks(score: Score, prompt: Prompt | None, grid: int) -> list[Track]:
    """A one-track score split into a track per hand; a prompt's notes as its file splits them."""
    notes = score.tracks[0].notes.numpy()
    known = np.full(len(notes["time"]), -1)
    if prompt:
        known = match_hands(notes, prompt, score.tpq, grid)
    plays_left = split_hands(notes, known, score.tpq)
    tracks = []
    for name, mine in (("right hand", ~plays_left), ("left hand", plays_left)):
        track = Track(name=name, program=0)
        track.notes = Note.from_numpy(**select(notes, mine))
        tracks.append(track)
    return tracks


def pitch_intervals(ids: np.ndarray, vocab: Vocabulary) -> bytes:
    """The semitones from each note of a piece to the next, one byte each, then PIECE_END.

    They are the same in every key, so transposed copies are found too: see longest_known_run.
    """
    is_pitch = vocab.says.kind[ids] == Kind.PITCH
    pitch = vocab.says.pitch[ids[is_pitch]]
    if not len(pitch):
        return b""
    return (np.diff(pitch) + INTERVAL_ZERO).astype(np.uint8).tobytes() + bytes([PIECE_END])


def longest_known_run(mine: bytes, names: list[str], corpus: bytes) -> tuple[int, str]:
    """The most notes in a row that a piece shares with the corpus, in any key; with which piece.

    mine: pitch_intervals of the piece; corpus: those of the named pieces, concatenated.
    """
    length = 0
    found_at = 0
    for start in range(len(mine)):  # only runs longer than the best so far are tried
        while start + length + 1 < len(mine):
            at = corpus.find(mine[start : start + length + 1])
            if at < 0:
                break
            length += 1
            found_at = at
    if length == 0:
        return 0, ""
    return length + 1, names[corpus[:found_at].count(PIECE_END)]  # n intervals join n + 1 notes


def new_part(ids: np.ndarray, prompt: Prompt | None, vocab: Vocabulary) -> np.ndarray:
    """The part of a piece that the model wrote, ids (T,)."""
    if not prompt:
        return ids[1:]  # without BOS
    if not prompt.rewritten:
        return ids[len(prompt.ids) :]
    parts = []
    for first, last in prompt.rewritten:
        gap = find_gap(ids, first, last, vocab)
        parts.append(ids[gap.begin : gap.end])
    return np.concatenate(parts)


@dataclass
class Sample:
    """One generated piece."""

    score: Score  # as it is saved, with its key and chords
    key: str  # in words
    bars: int
    is_cut: bool  # it reached the length limit before it ended
    new_ids: np.ndarray  # (T,) what the model wrote, without the prompt


def make_sample(
    ids: np.ndarray, prompt: Prompt | None, vocab: Vocabulary, sample: SampleSettings
) -> Sample | None:
    """A piece from generate(), decoded; None if it has no notes."""
    new_ids = new_part(ids, prompt, vocab)
    whole = vocab.decode(ids)
    if not whole.note_num():
        return None
    score = whole
    kept_prompt = prompt  # None if its notes are left out
    if sample.rewrite:
        score = fill_score(ids, prompt, vocab)
    elif sample.continuation_only:
        ids = np.append(vocab.bos_id, new_ids)
        score = continue_alone(prompt, vocab, new_ids)
        kept_prompt = None
    elif prompt:
        restore_prompt(score, prompt, vocab, new_ids)
        score.markers.append(TextMeta(prompt.end, PROMPT_ENDS))
    if not score.note_num():
        return None
    if sample.tempo:
        score.tempos = [Tempo(0, sample.tempo)]
    signature, key = find_key(whole)
    if not (sample.rewrite and score.key_signatures):
        sign_key(score, signature, begin=kept_prompt.end if kept_prompt else 0)
    score.tracks = two_tracks(score, kept_prompt, vocab.grid)
    for quarter, symbol in vocab.chord_changes(ids):
        score.markers.append(TextMeta(round(quarter * score.tpq), symbol))
    is_cut = ids[-1] != vocab.eos_id
    return Sample(score, key, int((ids == vocab.bar_id).sum()), is_cut, new_ids)


# ---- 9. Checkpoint: one file, its log, its lock; unused file names

FORMAT = "pianogpt 13"
OLDER_FORMATS = ("pianogpt 11", "pianogpt 12")
STORED_GROUPS = ("data", "tokens", "model", "train")  # groups of settings in a checkpoint
LOG_COLUMNS = ("step", "seconds", "train_loss", "val_loss", "val_nats_per_note")
# The progress of a trainer that has not started, see trainer_progress
NO_PROGRESS = {"step": 0, "begin": 0, "seconds": 0.0, "history": [], "losses": [], "optimizer": ""}


@dataclass
class Checkpoint:
    """Everything in the file of a model."""

    about: str  # what it started from, what it learned from
    settings: dict[str, dict]  # those of STORED_GROUPS
    vocabulary: list[str]  # V words in the order of their ids
    folder: str  # where the training music was
    files: list[str]  # "hash name" of the MIDI files there, to detect changes
    pieces: list[str]  # names of the pieces it learned from
    held_out: list[str] = field(default_factory=list)  # hashes of files it did not learn from
    styles: list[str] = field(default_factory=list)  # their names; the first has number 1
    # How it was computed, which a resumed run keeps: "bfloat16", "compiled" and the "device"
    machine: dict = field(default_factory=dict)
    progress: dict = field(default_factory=dict)  # see trainer_progress
    # "weights/...", "average/...", "best/..." and "optimizer.../...", see trainer_tensors, and
    # "intervals", the melodic intervals of the pieces, uint8, to find known runs
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.progress["step"]

    def intervals(self) -> bytes:
        """The melodic intervals of the pieces, to find known runs."""
        return self.tensors["intervals"].numpy().tobytes()

    def list_pieces(self) -> list[tuple[str, bytes]]:
        """(name, melodic intervals) of each piece it learned from."""
        intervals = self.intervals().split(bytes([PIECE_END]))
        return list(zip(self.pieces, intervals, strict=False))  # split adds an empty one at the end

    def add_pieces(self, pieces: list[tuple[str, bytes]]) -> None:
        """Add (name, melodic intervals) of further pieces it learned from."""
        self.pieces += [name for name, _ in pieces]
        of_pieces = [intervals + bytes([PIECE_END]) for _, intervals in pieces]
        self.tensors["intervals"] = as_tensor(b"".join([self.intervals(), *of_pieces]))

    @property
    def can_train(self) -> bool:
        """Whether it holds what training needs; an exported model does not."""
        return any(name.startswith("weights/") for name in self.tensors)

    def weights(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, by name."""
        start = f"{group}/"
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


def in_group(group: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their names in a checkpoint, the inverse of Checkpoint.weights."""
    return {f"{group}/{name}": weight for name, weight in weights.items()}


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor, (N,) uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def save_model(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint."""
    values = {k: v for k, v in vars(checkpoint).items() if k != "tensors"}
    save_tensors(path, FORMAT, values, checkpoint.tensors)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, and its full training log beside it. Only the first may raise OSError."""
    save_model(path, checkpoint)
    lines = [",".join(LOG_COLUMNS)]
    for row in checkpoint.progress["history"]:
        lines.append(",".join(str(row.get(column, "")) for column in LOG_COLUMNS))
    try:
        write_atomically(Path(f"{path}.csv"), "".join(f"{line}\n" for line in lines).encode())
    except OSError as e:
        say(f"cannot save {path}.csv ({e.strerror})")


def is_older(path: Path) -> bool:
    """Whether a file is a checkpoint of an older version."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":  # a zip file, as torch.save makes
            return True
    with suppress(Exception), safetensors.safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("format") in OLDER_FORMATS
    return False


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint loaded to the CPU; nothing in the file can run as code. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}: name another, or train it first, with --steps N"
        )
    try:
        values, mapped = load_tensors(path, FORMAT)
        tensors = {}
        for name, tensor in mapped.items():
            # A copy, as the mapped file may change. Exported weights have 16 bits.
            dtype = torch.float32 if name.startswith("best/") else tensor.dtype
            tensors[name] = tensor.to(dtype, copy=True)
        checkpoint = Checkpoint(**values, tensors=tensors)
        check_checkpoint(checkpoint)
        stored = stored_settings(checkpoint)
        checkpoint.settings = {name: asdict(getattr(stored, name)) for name in STORED_GROUPS}
    except Exception as e:
        if is_out_of_memory(e):
            raise
        if is_older(path):
            raise UserError(
                f"{path} was written by an older version: python tests/convert.py {path} "
                f"{path.with_name(f'{path.stem}-new.safetensors')} converts it to a model that can "
                "generate"
            ) from None
        reason = str(e).splitlines()[0][:80] if str(e) else type(e).__name__
        raise UserError(f"{path} is damaged or not a PianoGPT checkpoint ({reason})") from None
    return checkpoint


def stored_settings(checkpoint: Checkpoint) -> Settings:
    """The settings of a checkpoint, with defaults for those it does not hold."""
    if checkpoint.settings.keys() != set(STORED_GROUPS):
        raise ValueError("its settings are not those of a model")
    settings = Settings()
    for name in STORED_GROUPS:
        defaults = asdict(getattr(settings, name))
        for key, value in checkpoint.settings[name].items():
            if key not in defaults or type(value) is not type(defaults[key]):
                raise ValueError(f"{key} is {value!r}")
            setattr(getattr(settings, name), key, value)
    return settings


def check_values(checkpoint: Checkpoint) -> None:
    """Raise an error for a value of the wrong type."""
    names = ("files", "pieces", "held_out", "styles", "vocabulary")
    lists = [getattr(checkpoint, name) for name in names]
    progress = checkpoint.progress
    is_whole = progress.keys() == NO_PROGRESS.keys()
    if not is_whole or not all(isinstance(values, list) for values in lists):
        raise ValueError("it is incomplete")
    kinds = {name: type(value) for name, value in checkpoint.machine.items()}
    if kinds and kinds != {"bfloat16": bool, "compiled": bool, "device": str}:
        raise ValueError("it does not say how it was computed")
    for text in itertools.chain([checkpoint.about, checkpoint.folder], *lists):
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{text!r:.40} is not text")
    check_progress(progress)


def check_progress(progress: dict) -> None:
    """Raise an error for a value of trainer_progress that no training can produce."""
    numbers = [progress["step"], progress["begin"], progress["seconds"], *progress["losses"]]
    for row in progress["history"]:
        if not {"step", "seconds", "train_loss"} <= row.keys() <= set(LOG_COLUMNS):
            raise ValueError("its history is incomplete")
        numbers += row.values()
    for number in numbers:
        if type(number) not in (int, float) or not 0 <= number < 1e15:
            raise ValueError(f"{number!r:.40} is not a number that training produces")
    for number in (progress["step"], progress["begin"]):
        if type(number) is not int:
            raise ValueError(f"{number} is not a step number")


def new_model(checkpoint: Checkpoint) -> PianoGPT:
    """A new model with the sizes of a checkpoint."""
    settings = stored_settings(checkpoint)
    V = len(checkpoint.vocabulary)
    return PianoGPT(settings.model, V, settings.tokens.grid, len(checkpoint.styles))


def check_sizes(checkpoint: Checkpoint, sizes: ModelSettings) -> None:
    """Raise an error if a model of these sizes would be much larger than its weights in the file.

    This keeps an untrusted file from taking far more memory than its own size. (A model on the
    "meta" device would take no memory, but loading what that needs takes two seconds.)
    """
    C = sizes.n_embd
    expected = {"style.weight": (1 + len(checkpoint.styles), C)}
    for name in ("embedding.weight", "head.weight"):
        expected[name] = (len(checkpoint.vocabulary), C)
    for n in range(sizes.n_layer):
        expected[f"blocks.{n}.qkv.weight"] = (3 * C, C)
    weights = checkpoint.weights("best")
    for name, shape in expected.items():
        if name not in weights or weights[name].shape != shape:
            raise ValueError("its best weights do not fit its settings")


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Raise an error if the parts of a checkpoint do not fit each other."""
    settings = stored_settings(checkpoint)
    check_settings(settings)
    check_sizes(checkpoint, settings.model)
    expected = {name: weight.shape for name, weight in new_model(checkpoint).state_dict().items()}
    groups = ["best", "weights", "average"] if checkpoint.can_train else ["best"]
    for group in groups:
        found = {name: weight.shape for name, weight in checkpoint.weights(group).items()}
        if found != expected:
            raise ValueError(f"its {group} weights do not fit its settings")
        if not all(weight.isfinite().all() for weight in checkpoint.weights(group).values()):
            raise ValueError(f"its {group} weights are not finite")
    for name, tensor in checkpoint.tensors.items():
        group, _, weight = name.partition("/")
        if group.startswith("optimizer.") and tensor.shape not in (expected[weight], ()):
            raise ValueError("the state of its optimizer does not fit its settings")
    check_values(checkpoint)
    intervals = checkpoint.tensors["intervals"]
    ends = intervals == PIECE_END
    is_whole = intervals.dtype == torch.uint8 and ends[-1:].all()
    if not is_whole or ends.sum() > len(checkpoint.pieces):
        raise ValueError("its intervals do not fit its pieces")


def load_model(checkpoint: Checkpoint, device: torch.device) -> PianoGPT:
    """The model of a checkpoint, with the weights that had the lowest validation loss."""
    model = new_model(checkpoint)
    model.load_state_dict(checkpoint.weights("best"))
    return model.to(device)


def add_styles(checkpoint: Checkpoint, styles: list[str]) -> Checkpoint:
    """A checkpoint with more styles, which have no effect yet; styles: its own, then new ones."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if name.endswith("/style.weight") and tensor.dim() == 2:  # not a step count
            rows = torch.zeros(1 + len(styles), tensor.size(1))
            rows[: len(tensor)] = tensor
            tensors[name] = rows
    return replace(checkpoint, styles=styles, tensors=tensors)


def start_from(path: Path) -> Checkpoint:
    """A checkpoint at step 0 with the best weights, model sizes and token settings of another."""
    base = load_checkpoint(path)
    tensors = {"intervals": base.tensors["intervals"]}
    for group in ("weights", "average", "best"):
        tensors |= in_group(group, base.weights("best"))
    return replace(
        base,
        about="; ".join(filter(None, [f"started from {path.name}", base.about])),
        settings={
            "tokens": base.settings["tokens"],
            "model": base.settings["model"],
            "train": FINE_TUNING,
        },
        files=[],
        held_out=[],
        machine={},
        progress=copy.deepcopy(NO_PROGRESS),
        tensors=tensors,
    )


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Keep other runs from training the checkpoint at path. Raises UserError if one already is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=0)
    file = Path(lock.lock_file)
    try:
        lock.acquire()
        while not file.exists():  # the previous run just deleted it, so others would not see it
            lock.release()
            lock.acquire()
    except Timeout:
        raise UserError(
            f"another run is training {path}: wait, or pass another --checkpoint"
        ) from None
    try:
        yield
    finally:
        if not path.exists():  # nothing was saved: leave no lock file behind
            with suppress(OSError):  # Windows cannot delete an open file
                file.unlink()
        lock.release()


def unused_name(folder: Path, stem: str, suffix: str) -> Path:
    """Create an empty file, folder/stem-001.suffix or the first unused number; returns its path."""
    taken = {old.stem for old in folder.iterdir()}
    for number in itertools.count(1):
        path = folder / f"{stem}-{number:03d}{suffix}"
        if path.stem not in taken and not Path(f"{path}.csv").exists():  # a leftover log
            with suppress(FileExistsError):
                path.touch(exist_ok=False)  # now no other run can take it
                return path


@contextmanager
def reserve(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """The path of an empty file (see unused_name) to be replaced; removed if the block fails."""
    path = unused_name(folder, stem, suffix)
    try:
        yield path
    except Exception:
        path.unlink()
        raise


def write_new(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    """Write data to folder/stem-001.suffix, or the first unused number; returns the path."""
    with reserve(folder, stem, suffix) as path:
        unfinished.add(path)
        try:
            write_atomically(path, data)
        finally:
            unfinished.discard(path)
    return path


# ---- 10. Runs: train, generate, evaluate, export

SEARCHED_NOTES = 6_000_000  # searched for the longest known run, in two seconds per piece
FEW_FILES = 20  # with fewer, --init-from holds none out and learns at this rate
FEW_FILES_RATE = 6e-6
# The defaults with --init-from: a few small steps at a low rate keep what was learned before.
FINE_TUNING = {"steps": 300, "warmup": 50, "lr": 2.4e-5, "eval_every": 25}


def keep_sides(pieces: list[Piece], contents: list[str], checkpoint: Checkpoint) -> None:
    """Keep each work on its side of the checkpoint's split: trained on, or held out.

    contents: the hash of each piece's file.
    """
    held_out = set(checkpoint.held_out)
    known = {file.partition(" ")[0] for file in checkpoint.files}
    trains: dict[str, bool] = {}  # by work; True if it has known files on both sides
    for piece, content in zip(pieces, contents, strict=True):
        if content in known:
            trains[piece.work] = content not in held_out or trains.get(piece.work, False)
    moved = {}  # {work: its new split}
    for piece in pieces:
        was_trained = trains.get(piece.work, piece.split == "train")
        if was_trained != (piece.split == "train"):
            moved[piece.work] = "train" if was_trained else "validation"
    if not moved:
        return
    for piece in pieces:
        piece.split = moved.get(piece.work, piece.split)
    say(f"split: {count(len(moved), 'work')} kept where the earlier training had them")


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Only record the first Ctrl-C, SIGTERM or SIGHUP in the block; a second ends the program."""
    caught: list[int] = []

    old = signal_handlers()

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, old[number])

    handle_signals(dict.fromkeys(old, catch))
    try:
        yield caught
    finally:
        handle_signals(old)


def from_rank_0(call: Callable):
    """The result of call() on rank 0, on every rank; all ranks raise its UserError or OSError."""
    result = None
    if RANK == 0:
        try:
            with computing_errors():
                result = call()
        except (UserError, OSError) as e:
            result = e
    if PROCESSES > 1:
        box = [result]
        dist.broadcast_object_list(box)
        result = box[0]
    if isinstance(result, (UserError, OSError)):
        raise result
    return result


def print_block(values: dict) -> None:
    """Print key: value lines that a script can read."""
    for key, value in values.items():
        say(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")


def name_styles(pieces: list[Piece]) -> None:
    """Set the style of each piece: its top folder's name, not counting train and the like."""
    for piece in pieces:
        folders = [part for part in Path(piece.path).parts[:-1] if part not in SPLITS]
        piece.style = normalize("NFC", folders[0]) if folders else ""


def list_styles(pieces: list[Piece], known: list[str]) -> list[str]:
    """Style names: the known ones, then new ones in these pieces; prints those of the pieces."""
    files = Counter(piece.style for piece in pieces if piece.style)
    styles = known + sorted(files.keys() - set(known))
    if files:
        names = [f"{name} ({count(files[name], 'file')})" for name in styles if files[name]]
        say(f"styles: {', '.join(names)}")
    return styles


def prepare_data(
    settings: Settings,
    vocab: Vocabulary,
    files: dict[Path, str] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Corpus, Window, Checkpoint]:
    """The training music, the validation windows, and a checkpoint that has no weights yet.

    files: the result of find_files, if known; checkpoint: the one to continue, if any.
    """
    folder = Path(settings.program.midi_dir)
    files = files or find_files(folder)  # before reading, so that a file added later counts as new
    pieces = read_music(folder, vocab, settings.program.cache_dir, files)
    split_pieces(pieces, folder, settings.data, vocab)
    if settings.data.style_from_folder:
        name_styles(pieces)
    contents = [files[folder / piece.path] for piece in pieces]
    if checkpoint:
        keep_sides(pieces, contents, checkpoint)
    works = Counter({piece.work: piece.split for piece in pieces}.values())
    shares = ", ".join(f"{works[split]} {split}" for split in SPLITS)
    say(f"split: {count(works.total(), 'work')} ({shares})")
    training = [piece for piece in pieces if piece.split == "train"]
    validation = [piece for piece in pieces if piece.split == "validation"]
    if not training:
        raise UserError(f"no piece under {folder} is left to train on: all are held out")
    styles = list_styles(training, checkpoint.styles if checkpoint else [])
    if settings.data.style_from_folder and not styles:
        raise UserError("--style-from-folder: no file lies in a style's folder: make some")
    find_style(settings.sample.style, styles)  # reports a mistake before training
    T = settings.model.block_size
    windows = cut_all_windows(make_corpus(validation, styles), T, T, vocab, LONGEST_VALIDATION)
    intervals = b"".join(pitch_intervals(piece.ids, vocab) for piece in training)
    learned = Checkpoint(
        about="",
        settings={name: asdict(getattr(settings, name)) for name in STORED_GROUPS},
        vocabulary=vocab.words,
        folder=str(folder),
        files=list_contents(files, folder),
        pieces=[piece.path for piece in training],
        held_out=[
            content
            for piece, content in zip(pieces, contents, strict=True)
            if piece.split != "train"
        ],
        styles=styles,
        tensors={"intervals": as_tensor(intervals)},
    )
    return make_corpus(training, styles), windows, learned


def kind_of_device(device: torch.device) -> str:
    """What determines the exact results of a device: "CPU with AVX512, AMX, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    amx = ", AMX" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    threads = count(torch.get_num_threads(), "thread")
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}{amx}, {threads}"


def compiler_works() -> bool:
    """Whether torch.compile finds everything it needs, such as a C++ compiler."""
    try:
        torch.compile(F.silu)(torch.zeros(1))
    except RuntimeError:
        return False
    return True


def repays_compiling(settings: Settings, steps: int) -> bool:
    """Whether compiling saves more time over `steps` steps than it costs."""
    model = settings.model
    tokens = settings.train.batch_size * model.block_size
    return steps * tokens * model.n_layer * model.n_embd >= COMPILING_PAYS


def choose_compiling(settings: Settings, device: torch.device, steps: int) -> bool:
    """Whether to compile the blocks: as --compile says, else on a CPU if `steps` steps repay it."""
    if settings.program.compile is not None:
        return settings.program.compile
    return device.type == "cpu" and repays_compiling(settings, steps) and compiler_works()


def make_trainer(
    settings: Settings,
    vocab: Vocabulary,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    n_styles: int = 0,
) -> Trainer:
    """A new trainer, for a new run or for one that resumes a checkpoint.

    n_styles: how many the model has
    """
    done = checkpoint.step if checkpoint else 0
    used = checkpoint.machine if checkpoint and not is_finished(checkpoint) else {}
    bfloat16 = used.get("bfloat16", True) and not settings.program.float32
    compiled = used.get("compiled")
    if compiled is None or settings.program.compile is not None:
        compiled = choose_compiling(settings, device, settings.train.steps - done)
    here = kind_of_device(device)
    if used and used["device"] != here:
        say(f"this is a {here}, not a {used['device']}: the run continues, but not bit for bit")
    torch.manual_seed(settings.train.seed)
    model = PianoGPT(settings.model, len(vocab.words), vocab.grid, n_styles).to(device)
    return Trainer(model, settings.train, bfloat16 and has_fast_bfloat16(device), compiled)


def trainer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of a trainer: "weights/...", "average/...", "best/...", "optimizer.../..."."""
    groups = {"weights": copy_weights(trainer.model), "average": copy_weights(trainer.average)}
    groups["best"] = trainer.best if trainer.history else copy_weights(trainer.average)
    names = [name for name, _ in trainer.model.named_parameters()]
    for number, state in trainer.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            groups.setdefault(f"optimizer.{key}", {})[names[number]] = value.cpu()
    tensors = {}
    for group, weights in groups.items():
        tensors |= in_group(group, weights)
    return tensors


def trainer_progress(trainer: Trainer) -> dict:
    """Everything else that changes in a trainer, as plain values."""
    return {
        "step": trainer.step,
        "begin": trainer.begin,
        "seconds": trainer.seconds,
        "history": trainer.history,
        "losses": trainer.losses,
        "optimizer": type(trainer.optimizer).__name__,
    }


def resume(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Restore the state in which another trainer was saved, bit for bit.

    Raises UserError if that one used a different optimizer.
    """
    progress = checkpoint.progress
    used = type(trainer.optimizer).__name__
    if progress["optimizer"] not in (used, ""):
        raise UserError(
            f"the checkpoint was trained with {progress['optimizer']}, not {used}: pass --fresh, "
            "or --init-from it with another --checkpoint"
        )
    trainer.model.load_state_dict(checkpoint.weights("weights"))
    trainer.average.load_state_dict(checkpoint.weights("average"))
    trainer.best = checkpoint.weights("best")
    names = [name for name, _ in trainer.model.named_parameters()]
    state: dict[int, dict] = defaultdict(dict)
    for key, value in checkpoint.tensors.items():
        group, _, name = key.partition("/")
        if group.startswith("optimizer."):
            state[names.index(name)][group.removeprefix("optimizer.")] = value
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": dict(state)})
    trainer.step = progress["step"]
    trainer.begin = progress["begin"]
    trainer.seconds = progress["seconds"]
    trainer.history = progress["history"]
    trainer.losses = progress["losses"]


def is_finished(checkpoint: Checkpoint) -> bool:
    """Whether a run has made all its steps."""
    return checkpoint.step == checkpoint.settings["train"]["steps"]


def continue_from(checkpoint: Checkpoint, trainer: Trainer, learned: Checkpoint) -> None:
    """Resume a checkpoint in a new trainer; add the pieces it learned from to `learned`."""
    resume(trainer, checkpoint)
    if is_finished(checkpoint):
        trainer.begin = trainer.step
    learned.about = checkpoint.about
    if checkpoint.files == learned.files:
        learned.pieces = checkpoint.pieces  # including what it learned from earlier
        learned.tensors["intervals"] = checkpoint.tensors["intervals"]
        return
    # Include what it learned from other folders, or from files that are gone.
    known = {intervals for _, intervals in learned.list_pieces()}
    learned.add_pieces([piece for piece in checkpoint.list_pieces() if piece[1] not in known])
    if any("val_loss" in row for row in trainer.history):
        say("the music has changed: earlier validation losses are not comparable and are dropped")
    for row in trainer.history:
        row.pop("val_loss", None)
        row.pop("val_nats_per_note", None)


def set_aside(path: Path) -> None:
    """Rename a checkpoint, if it exists, and its log to an unused name."""
    if not path.exists():
        return
    with reserve(path.parent, f"{path.stem}-old", path.suffix) as old:
        os.replace(path, old)
    log = Path(f"{path}.csv")
    if log.exists():
        log.rename(f"{old}.csv")
    say(f"kept the old checkpoint as {old}")


def describe_model(trainer: Trainer, settings: Settings) -> str:
    """Size, precision and device of a model, and how it is trained."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    words = [f"{parameters:,} parameters", "bfloat16" if trainer.bfloat16 else "float32"]
    if trainer.compiled:
        words.append("compiled")
    elif settings.program.compile is None and trainer.device.type == "cpu":
        is_short = not repays_compiling(settings, settings.train.steps - trainer.step)
        words.append("not compiled for so few steps" if is_short else "not compiled")
    words[-1] += f" on {trainer.device}"
    if PROCESSES > 1:
        words[-1] += f" in {PROCESSES} processes"
    if trainer.step:
        words.append(f"from step {trainer.step} on")
    return f"model: {', '.join(words)}; Ctrl-C saves and stops"


def save_run(path: Path, learned: Checkpoint, trainer: Trainer) -> None:
    """Save a trainer with what it learned from, on rank 0. Raises OSError."""
    if RANK == 0:
        tensors = learned.tensors | trainer_tensors(trainer)
        progress = trainer_progress(trainer)
        save_checkpoint(path, replace(learned, progress=progress, tensors=tensors))


def save_last(path: Path, learned: Checkpoint, trainer: Trainer) -> None:
    """save_run; if that fails, save to the folder for temporary files and raise UserError."""
    try:
        save_run(path, learned, trainer)
    except OSError as e:
        say(f"cannot save {path} ({e.strerror})")
        with reserve(Path(tempfile.gettempdir()), path.stem, path.suffix) as other:
            save_run(other, learned, trainer)
        raise UserError(f"saved {other} instead: move it to {path} to continue") from None


def train_model(
    settings: Settings,
    checkpoint: Checkpoint | None,
    vocab: Vocabulary,
    device: torch.device,
    files: dict[Path, str],
) -> int:
    """Train and save a model; 0, or 128 + the number of the signal that stopped it.

    files: those of the music folder, see find_files
    """
    if settings.train.batch_size % PROCESSES:
        raise UserError(f"--batch-size must be a multiple of the {PROCESSES} processes")
    path = Path(settings.program.checkpoint)
    corpus, windows, learned = from_rank_0(lambda: prepare_data(settings, vocab, files, checkpoint))
    batches = Batches(corpus.to(device), vocab, settings)
    trainer = make_trainer(settings, vocab, device, checkpoint, len(learned.styles))
    learned.machine = {
        "bfloat16": trainer.bfloat16,
        "compiled": trainer.compiled,
        "device": kind_of_device(device),
    }
    if checkpoint:
        continue_from(add_styles(checkpoint, learned.styles), trainer, learned)
    if settings.program.fresh:
        from_rank_0(lambda: set_aside(path))
    say(describe_model(trainer, settings))

    def save_and_go_on() -> None:
        try:
            save_run(path, learned, trainer)
        except OSError as e:
            say(f"cannot save {path} ({e.strerror}): training goes on")

    with catch_signals() as caught:
        try:
            trainer.train(batches, windows, lambda: bool(caught), save_and_go_on)
        except RuntimeError as e:
            # Ctrl-C also ends the C++ compiler, which runs before the first step.
            if not caught or not is_failed_compiling(e):
                raise
            say("stopped before the first step")
            return 128 + caught[0]
        trainer.check(batches[trainer.step])
        save_last(path, learned, trainer)
    if trainer.step < settings.train.steps:
        say(
            f"stopped at step {trainer.step}, saved {path}: to continue, repeat the command "
            "without --generate or --fresh"
        )
        return 128 + (caught[0] if caught else signal.SIGTERM)  # or another rank was stopped
    best = trainer.best_row()
    losses = {key: value for key, value in best.items() if key.startswith("val")}
    print_block(trainer.history[-1] | losses | {"best_step": best["step"], "checkpoint": path})
    if caught:
        say("stopped after the last step")
        return 128 + caught[0]
    return 0


def read_prompt_in_worker(sample: SampleSettings) -> Prompt:
    """read_prompt in a worker process."""
    return read_prompt(sample, worker_vocab)


def find_prompt(sample: SampleSettings, vocab: Vocabulary) -> Prompt:
    """The prompt, read in a worker process; reports what tokens cannot keep. Raises UserError."""
    with start_pool(1, vocab) as pool:
        try:
            prompt = pool.schedule(read_prompt_in_worker, [sample], timeout=FILE_SECONDS).result()
        except tuple(WORKER_PROBLEMS) as e:
            raise UserError(
                f"{sample.prompt} cannot be continued ({worker_problem(e)}): pass another --prompt"
            ) from None
    say_changes(prompt.changes)
    return prompt


def write_sample(
    sample: Sample,
    settings: SampleSettings,
    origin: dict,
    checkpoint: Checkpoint,
    vocab: Vocabulary,
) -> None:
    """Save a piece, with a marker that says how it was made, and print a line about it."""
    text = json.dumps(origin | {"key": sample.key})
    sample.score.markers.insert(0, TextMeta(0, f"PianoGPT {text}"))
    data = sample.score.dumps_midi()
    path = write_new(Path(settings.samples_dir), "sample", ".mid", data)
    intervals = pitch_intervals(sample.new_ids, vocab)
    corpus = checkpoint.intervals()
    length, name = longest_known_run(intervals, checkpoint.pieces, corpus[:SEARCHED_NOTES])
    known = f"longest known run {count(length, 'note')}"
    if len(corpus) > SEARCHED_NOTES:
        known += f" of the first {SEARCHED_NOTES:,}"
    if name:
        known += f" ({name})"
    seconds = sample.score.to("second").end()
    say(
        f"sample: {count(sample.bars, 'bar')}{' (cut)' if sample.is_cut else ''}, {sample.key}, "
        f"{count(sample.score.note_num(), 'note')}, {seconds:.1f} seconds, {known}, {path}"
    )


def find_style(name: str, styles: list[str]) -> int:
    """A style's number in a model, 0 for none. Raises UserError if the model has no such style."""
    name = normalize("NFC", name)
    if not name:
        return 0
    if not styles:
        raise UserError("this model knows no styles: train one with --style-from-folder")
    if name not in styles:
        raise UserError(f"there is no style {name} in this model: pass one of {', '.join(styles)}")
    return 1 + styles.index(name)


def write_music(
    settings: Settings,
    given: dict,
    checkpoint: Checkpoint,
    vocab: Vocabulary,
    device: torch.device,
    prompt: Prompt | None,
) -> int:
    """Generate the samples; 0, or 128 + the signal that stopped it. UserError if none has notes."""
    about = f" ({checkpoint.about})" if checkpoint.about else ""
    say(
        f"written by: {settings.program.checkpoint}, step {checkpoint.step} of "
        f"{checkpoint.settings['train']['steps']}, trained on {checkpoint.folder}{about}"
    )
    if checkpoint.styles:
        say(f"styles: {', '.join(checkpoint.styles)}")
    style = find_style(settings.sample.style, checkpoint.styles)
    seed = settings.train.seed
    if "seed" not in given:
        seed = int(np.random.default_rng().integers(10**6))
        say(f"seed: {seed}; pass this --seed to get the same pieces again")
    if settings.sample.pieces < settings.sample.num_samples:
        say("temperature 0: all pieces would be the same, so only one is written")
    origin = asdict(settings.sample) | {"prompt": Path(settings.sample.prompt).name}
    origin["chords"] = origin["chords"][:LONGEST_MESSAGE]
    del origin["samples_dir"]
    origin |= {"seed": seed, "step": checkpoint.step}
    model = load_model(checkpoint, device)
    ids = prompt.ids if prompt else None
    written = 0
    with catch_signals() as caught:
        pieces = generate(model, vocab, settings.sample, seed, ids, lambda: bool(caught), style)
        for number, piece in pieces:
            sample = make_sample(piece, prompt, vocab, settings.sample)
            if sample is None:
                say(f"piece {number} has no notes and is left out: train longer")
                continue
            write_sample(sample, settings.sample, origin | {"piece": number}, checkpoint, vocab)
            written += 1
    if caught:
        say(f"stopped: {written} of {settings.sample.pieces} pieces were finished")
        return 128 + caught[0]
    if not written:
        raise UserError("no piece has notes: train longer")
    return 0


def evaluate_folder(
    settings: Settings, checkpoint: Checkpoint, vocab: Vocabulary, device: torch.device
) -> int:
    """Print the loss of a checkpoint on the music in a folder; returns 0."""
    model = load_model(checkpoint, device)
    pieces = read_music(Path(settings.program.evaluate), vocab, settings.program.cache_dir)
    if settings.data.style_from_folder:
        name_styles(pieces)  # a folder that is not one of the model's styles counts as none
    learned = {intervals for _, intervals in checkpoint.list_pieces()}
    # Pieces whose notes it was trained on, in any key and rhythm
    known = sum(pitch_intervals(piece.ids, vocab)[:-1] in learned for piece in pieces)
    T = settings.model.block_size
    loss = 0.0
    tokens = 0
    for piece in progress_bar(pieces, desc="evaluating", unit="piece"):
        # Windows overlap by half, which gives each its predecessor's second half as context.
        corpus = make_corpus([piece], checkpoint.styles)
        loss += evaluate(model, cut_all_windows(corpus, T, T // 2, vocab))
        tokens += len(piece.ids) - 1  # BOS is given
    notes = sum(piece.notes for piece in pieces)
    print_block(
        {
            "pieces": len(pieces),
            "known": known,
            "tokens": tokens,
            "notes": notes,
            "nats_per_token": loss / tokens,
            "nats_per_note": loss / notes,
        }
    )
    return 0


def export_model(path: Path, checkpoint: Checkpoint, about: str) -> int:
    """Export a checkpoint's best weights, in 16 bits, and all else that generating needs; 0."""
    if path.exists():
        raise UserError(f"{path} already exists: name another file")
    halves = {name: weight.half() for name, weight in checkpoint.weights("best").items()}
    if not all(weight.isfinite().all() for weight in halves.values()):
        raise UserError("a weight is too large for 16 bits: train with a smaller --lr")
    tensors = {"intervals": checkpoint.tensors["intervals"]} | in_group("best", halves)
    save_model(path, replace(checkpoint, about=about, files=[], held_out=[], tensors=tensors))
    say(f"exported: {path}, {path.stat().st_size / 2**20:.1f} MB")
    return 0


def compare_music(
    program: ProgramSettings,
    given: dict,
    checkpoint: Checkpoint,
    training: bool,
    files: dict[Path, str],
) -> None:
    """Report how the folder differs from what a checkpoint learned from. Raises UserError."""
    folder = program.midi_dir
    learned = checkpoint.folder
    now = set(list_contents(files, Path(folder)))
    then = set(checkpoint.files)
    if now == then:
        return
    names = {file.partition(" ")[2] for file in now}
    gone = sum(file.partition(" ")[2] not in names for file in then)
    text = (
        f"{program.checkpoint} learned from {learned}; in {folder} "
        f"{count(len(now - then), 'file')} new or changed, {count(gone, 'file')} gone"
    )
    trains_further = training and given.get("steps", 0) > checkpoint.settings["train"]["steps"]
    is_other = Path(folder).resolve() != Path(learned).resolve()
    if is_other and not ("midi_dir" in given and trains_further):
        raise UserError(f"{text}: pass --midi-dir {learned}, another --checkpoint, or more --steps")
    say(f"{text}: {'training goes on' if training else 'more --steps or --fresh would use these'}")


def open_checkpoint(
    path: Path, given: dict, program: ProgramSettings, stack: ExitStack
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint, if there is one, and whether to train it; if so, the stack holds its lock.

                              no checkpoint      unfinished     finished
        no mode               train              train on       say that it is finished
        --generate            train, then write  write          write
        with --steps N        train to N         train on to N  train on to N
        --evaluate, --export  an error           as it is       as it is

    With --fresh there is none. With --generate, a checkpoint that is named must exist, unless
    --midi-dir is given too.
    """
    may_train = program.fresh or "steps" in given
    is_named = "checkpoint" in given and "midi_dir" not in given
    only_write = program.generate and not may_train and (is_named or path.exists())
    only_read = program.evaluate or program.export or only_write
    if not only_read:
        stack.enter_context(hold_lock(path))
        if program.fresh or not path.exists():
            return (start_from(Path(program.init_from)) if program.init_from else None), True
    checkpoint = load_checkpoint(path)
    started = f"started from {Path(program.init_from).name}; "
    if program.init_from and not f"{checkpoint.about}; ".startswith(started):
        raise UserError(
            f"{path} did not start from {program.init_from}: pass another --checkpoint, or --fresh"
        )
    if only_read:
        return checkpoint, False
    if not checkpoint.can_train:
        raise UserError(
            f"{path} was exported: pass --init-from {path} and another --checkpoint to train it"
        )
    steps = given.get("steps", checkpoint.settings["train"]["steps"])
    return checkpoint, checkpoint.step < steps


def find_music(program: ProgramSettings, given: dict) -> None:
    """If there is no my_midis/ in the current folder, use the one beside the script."""
    beside = Path(__file__).parent / program.midi_dir
    if "midi_dir" not in given and not Path(program.midi_dir).exists() and beside.is_dir():
        program.midi_dir = str(beside)


def check_wishes(settings: Settings, checkpoint: Checkpoint | None, training: bool) -> None:
    """Report how chords are read. Raises UserError for requests the model cannot meet."""
    _, remarks = parse_chords(settings.sample.chords)
    if remarks:
        say(f"chords: {', '.join(remarks)}")
    if settings.sample.rewrite and settings.data.gap_percent == 0:
        raise UserError("this model has not learned to --rewrite: train one with --gap-percent 25")
    if checkpoint and not training:  # training may add styles
        find_style(settings.sample.style, checkpoint.styles)


def check_samples_folder(folder: Path) -> None:
    """Make the folder for samples. Raises UserError, or OSError, if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: pass another --samples-dir")


def adapt_to_few_files(settings: Settings, given: dict) -> None:
    """Hold nothing out and learn slowly, unless told otherwise, when a trained model learns a few.

    The loss on one held-out work of ten rises while the others are learned, so the weights of the
    first steps would be kept. With nothing held out, nothing notices that the files are being
    learned by heart. At FEW_FILES_RATE they are not.
    """
    changed = []
    if "val_percent" not in given:
        settings.data.val_percent = 0.0
        changed.append("none are chosen to be held out (--val-percent 0)")
    if "lr" not in given:
        settings.train.lr = FEW_FILES_RATE
        changed.append(f"the learning rate is lower (--lr {FEW_FILES_RATE})")
    if changed:
        say(f"fewer than {FEW_FILES} files: {', '.join(changed)}")


def look_at_folder(
    settings: Settings, given: dict, checkpoint: Checkpoint | None, training: bool
) -> dict[Path, str]:
    """The files of the music folder, as from find_files; empty if they do not matter.

    Reports how they differ from those the checkpoint learned from. Raises UserError.
    """
    program = settings.program
    folder = Path(program.midi_dir)
    knows_files = bool(checkpoint and checkpoint.files)  # an exported model does not
    if not training:
        if not knows_files:
            if "midi_dir" in given:
                raise UserError(
                    f"{program.checkpoint} was exported and can only generate: omit --midi-dir, or "
                    f"pass --init-from {program.checkpoint} and another --checkpoint to train it"
                )
            return {}
        if "midi_dir" not in given and str(folder) != checkpoint.folder:
            return {}
    try:
        files = find_files(folder)
    except UserError:
        if training or "midi_dir" in given:
            raise
        return {}  # the music is no longer there
    if knows_files:
        compare_music(program, given, checkpoint, training, files)
    return files


def train_and_write(
    settings: Settings,
    given: dict,
    checkpoint: Checkpoint | None,
    training: bool,
    vocab: Vocabulary,
    device: torch.device,
) -> int:
    """Train if needed, then generate if --generate is given; returns the exit code."""
    # Report mistakes before the work begins.
    find_music(settings.program, given)
    check_wishes(settings, checkpoint, training)
    files = from_rank_0(lambda: look_at_folder(settings, given, checkpoint, training))
    prompt = None
    if settings.sample.prompt:
        prompt = from_rank_0(lambda: find_prompt(settings.sample, vocab))
    if settings.program.generate:
        check_samples_folder(Path(settings.sample.samples_dir))

    if training:
        is_start = bool(checkpoint) and not checkpoint.files  # from start_from
        if is_start and len(files) < FEW_FILES:
            adapt_to_few_files(settings, given)
        code = train_model(settings, checkpoint, vocab, device, files)
        if code:
            return code
    elif not settings.program.generate:
        say(
            f"{settings.program.checkpoint} has done its {count(checkpoint.step, 'step')}: pass a "
            "larger --steps to train on, or --fresh to start over"
        )
    if settings.program.generate and RANK == 0:
        if training:
            checkpoint = load_checkpoint(Path(settings.program.checkpoint))
        return write_music(settings, given, checkpoint, vocab, device, prompt)
    return 0


# ---- 11. Command line: from flags to settings, the device, errors as one sentence

LONGEST_JOIN = timedelta(minutes=1)  # how long the processes of torchrun wait for all to have begun
LONGEST_WAIT = timedelta(days=1)  # how long others wait while the first one reads a folder
LONGEST_MESSAGE = 500  # characters; a file name in it may have 5,000
# The flags that --evaluate and --export accept; all else comes from the checkpoint
USED_TO_READ = ("about", "cache_dir", "checkpoint", "device")


def make_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each setting; flags not given are absent from its result."""
    parser = argparse.ArgumentParser(
        usage="python pianogpt.py [flags]",
        description=__doc__.split("\nHow it works:")[0],
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "miditok", "symusic"))
    version_text = f"PianoGPT {VERSION} ({libraries})"
    parser.add_argument("--version", action="version", version=version_text)
    metavars = {int: "N", float: "X", str: "TEXT"}
    for group in fields(Settings):
        defaults = group.default_factory()
        title = f"{group.name}: {defaults.__doc__.rstrip('.').lower()}"
        section = parser.add_argument_group(title)
        for f in fields(defaults):
            text = f.metadata["text"].replace("%", "%%")
            kind = type(f.default)
            if kind is bool:
                section.add_argument(flag(f.name), action="store_true", help=text)
            elif f.default is None:  # --compile, --no-compile, or neither
                yes_or_no = argparse.BooleanOptionalAction
                section.add_argument(flag(f.name), action=yes_or_no, help=text)
            else:
                if f.default != "":
                    text += f" (default: {f.default})"
                section.add_argument(flag(f.name), type=kind, metavar=metavars[kind], help=text)
    return parser


def parse(argv: list[str] | None) -> dict:
    """{setting: value} from a command line. Raises UserError or ArgumentError."""
    given, unknown = make_parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"there is no flag {unknown[0]}: --help lists all")
    given = vars(given)
    check_flags(given)
    return given


def check_flags(given: dict) -> None:
    """Raise UserError for flags, {setting: value}, that do nothing or contradict each other."""
    needs = {f.name: "generate" for f in fields(SampleSettings)}
    needs |= {"prompt_bars": "prompt", "continuation_only": "prompt", "rewrite": "prompt"}
    needs |= {"guidance": "style", "about": "export"}
    for name in given:
        if name in needs and needs[name] not in given:
            raise UserError(f"{flag(name)} does nothing without {flag(needs[name])}")
    modes = [name for name in ("generate", "evaluate", "export") if name in given]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(map(flag, modes))} cannot be combined")
    if modes and modes != ["generate"]:
        useless = [name for name in given if name not in (*modes, *USED_TO_READ)]
        if useless:
            raise UserError(f"{flag(useless[0])} does nothing with {flag(modes[0])}")
    for name, value in given.items():
        if value == "" and name not in ("about", "cache_dir", "chords"):
            raise UserError(f"{flag(name)} is empty: write a value after it, or omit it")
    for name in ("bars", "continuation_only"):
        if name in given and "rewrite" in given:
            raise UserError(f"--rewrite keeps the length of the prompt: omit {flag(name)}")


def make_settings(given: dict, checkpoint: Checkpoint | None, training: bool) -> Settings:
    """The settings to use: from the command line, else the checkpoint, else the defaults.

    Raises UserError for a setting that differs from the checkpoint's but must not.
    """
    settings = Settings()
    for name, group in vars(settings).items():
        saved = checkpoint.settings.get(name, {}) if checkpoint else {}
        for f in fields(group):
            value = given.get(f.name, saved.get(f.name, f.default))
            may_change = f.metadata["resumable"] if training else f.name in ("steps", "seed")
            if f.name in saved and value != saved[f.name] and not may_change:
                advice = "omit it or pass --fresh"
                if "init_from" in given and not checkpoint.files:  # from start_from
                    advice = "omit it, as the sizes are those of --init-from"
                raise UserError(f"the checkpoint has {flag(f.name)} {saved[f.name]}: {advice}")
            setattr(group, f.name, value)
    return settings


def choose_device(name: str) -> torch.device:
    """The device of that name; auto: the NVIDIA GPU if there is one, else the CPU.

    Each process of torchrun gets its own GPU. Raises UserError if there is no such device.
    """
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        number = torch.zeros(1, device=name)
        number.item()  # some devices, such as "meta", cannot compute
        device = number.device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"there is no device {name} here: pass --device auto, or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def join_processes(device: torch.device) -> None:
    """Connect to the other processes that torchrun started. Raises UserError."""
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE is {PROCESSES}: use torchrun to start several processes")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, processes = next(dist.rendezvous("env://", timeout=LONGEST_JOIN))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=processes, timeout=LONGEST_WAIT
        )
    except dist.DistError:
        raise UserError(
            f"the other processes did not answer within {LONGEST_JOIN.seconds} seconds: start "
            "torchrun again"
        ) from None
    store.set_timeout(LONGEST_WAIT)


def run_command(argv: list[str] | None, stack: ExitStack) -> int:
    """Do what the command line asks; the exit code. The stack holds the lock."""
    given = parse(argv)
    program = make_settings(given, None, training=False).program
    path = Path(program.checkpoint)
    with suppress(OSError, RuntimeError):
        path = path.resolve() if path.is_symlink() else path  # keeps the link; shares the lock
    if path.is_symlink():
        raise UserError(f"{path} is a link that leads nowhere: name a file")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    device = choose_device(program.device)
    if PROCESSES > 1:
        join_processes(device)
    checkpoint, training = from_rank_0(lambda: open_checkpoint(path, given, program, stack))
    settings = make_settings(given, checkpoint, training)
    check_settings(settings)
    settings.program.checkpoint = str(path)
    vocab = Vocabulary(settings.tokens)
    if checkpoint and checkpoint.vocabulary != vocab.words:
        raise UserError(
            "the checkpoint's vocabulary does not match this MidiTok: install requirements.txt"
        )
    if RANK != 0 and (program.export or program.evaluate):
        return 0  # rank 0 does it alone
    if program.export:
        about = given.get("about", checkpoint.about)
        return export_model(Path(program.export), checkpoint, about)
    if program.evaluate:
        return evaluate_folder(settings, checkpoint, vocab, device)
    return train_and_write(settings, given, checkpoint, training, vocab, device)


def open_streams() -> None:
    """Make print work without stdout or stderr, and with file names that are not valid text."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory has run out, on a CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On a CPU only the message tells; these are of Linux and Windows.
    texts = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_failed_compiling(error: RuntimeError) -> bool:
    """Whether an error means that torch.compile failed."""
    # Mentioned only here, because loading torch._dynamo takes two seconds.
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


@contextmanager
def computing_errors() -> Iterator[None]:
    """Turn what this machine cannot compute into a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise UserError(
                "there is not enough memory: pass --accumulate N, or smaller sizes; to generate, "
                "pass a smaller --num-samples"
            ) from None
        if is_failed_compiling(e):
            raise UserError("torch.compile does not work here: pass --no-compile") from None
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns 0, 2 for what the user can fix, or 128 + a signal's number."""
    open_streams()
    try:
        return explain_errors(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def explain_errors(argv: list[str] | None) -> int:
    """run_command; an error that the user can fix becomes one sentence and exit code 2."""
    try:
        with ExitStack() as stack, computing_errors():
            return run_command(argv, stack)
    except (UserError, argparse.ArgumentError) as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'a file'} cannot be used: {e.strerror or e}"
    if len(problem) > LONGEST_MESSAGE:
        problem = f"{problem[: LONGEST_MESSAGE // 2]} ... {problem[-LONGEST_MESSAGE // 2 :]}"
    say(f"pianogpt: {problem}", "stderr")
    if RANK != 0:
        # Gives rank 0 time to report this first; then torchrun ends all ranks, so it is said once.
        time.sleep(2)
        print(f"pianogpt: on rank {RANK}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
