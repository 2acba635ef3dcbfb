"""PianoGPT: point it at a folder of MIDI files, and it learns to write piano music like it.

    python pianogpt.py                        train on my_midis/, or go on where the last run stopped
    python pianogpt.py --generate             write new music into samples/ (and train first, if nothing is trained yet)
    python pianogpt.py --generate --prompt X.mid --bars 32    go on from a piece of yours
    python pianogpt.py --evaluate DIR         held-out loss of the trained model on every MIDI file in DIR
    python pianogpt.py --help                 every size and knob

In:   a folder of .mid files, each read as one piano: drums dropped, tracks merged, the pedal folded into the notes.
Out:  pianogpt.pt (the model, all that is needed to go on training or to generate), samples/*.mid (with --wav and --plot
      also .wav and .png), pianogpt.csv (the validations), and .pianogpt-cache/ (the files as ids; delete it at will).

The music becomes REMI tokens (MidiTok), a causal Transformer (PyTorch) learns to predict the next one, and drawing one
token after another writes new music. The file reads in the order of the data:

    configuration -> music and ids -> dataset -> model -> checkpoint -> training -> sampling -> command line

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd channels, nh heads of size hs = C / nh, V tokens in
the vocabulary, N tokens in a corpus.

Read on: Huang & Yang, "Pop Music Transformer" (REMI), 2020. Fradet et al., "MidiTok", 2021. Vaswani et al., "Attention
is all you need", 2017. Su et al., "RoFormer" (rotary positions), 2021. Shazeer, "GLU Variants Improve Transformer",
2020. So et al., "Primer" (neighbours mixed in by channel), 2021. Yang et al., "Tensor Programs V" (one learning rate
for every width), 2022. Jordan et al., "Muon", 2024.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
import warnings
import wave
import zipfile
import zlib
from importlib.metadata import version
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import miditok
import numpy as np
import symusic
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from miditok.constants import SCORE_LOADING_EXCEPTION
from symusic import Note, Score, Track
from torch import Tensor, distributed, nn
from tqdm import tqdm


VERSION = "1.0"


class UserError(Exception):
    """A mistake of the user's, as one sentence that says what to do about it."""


def say(text: str) -> None:
    """Print one line, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Lines:
    """Where progress bars go when nobody watches, a log file say: each state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        """Write a bar's text without what moves the cursor."""
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        """Let it be seen now."""
        sys.stderr.flush()


def progress(*args, **options) -> tqdm:
    """A tqdm bar of at most 80 columns on a terminal; elsewhere a line every half minute."""
    watched = sys.stderr.isatty()
    options["ncols"] = min(80, shutil.get_terminal_size().columns - 1) if watched else 80
    return tqdm(*args, file=None if watched else Lines(), mininterval=0.5 if watched else 30, **options)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration: each field holds its default, its help and its limits; flags, --help and checkpoints read them here.
# ---------------------------------------------------------------------------------------------------------------------


def option(default, help: str, low=None, high=None, choices=None):
    """A dataclass field that becomes the flag of the same name; low and high are the least and the most it may be."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass
class MusicConfig:
    """How music becomes tokens."""

    grid: int = option(8, "positions in a beat; 8 is 62.5 ms at 120 bpm", 1, 48)
    velocities: int = option(32, "levels of loudness", 1, 127)
    chords: int = option(1, "tokens that name chords; 0: off", 0, 1)
    pedal: str = option(
        "fold", "the sustain pedal: fold it into the note lengths, or ignore it", choices=("fold", "ignore")
    )


@dataclass
class DataConfig:
    """Which music is trained on."""

    midi_dir: str = option("my_midis", "folder of .mid and .midi files, searched to any depth")
    cache_dir: str = option(".pianogpt-cache", "folder that keeps the files as tokens; empty: no cache")
    val_percent: float = option(10.0, "percent of the works held out for validation; 0: none", 0, 99)
    piece_is_folder: bool = option(False, "all files of one folder are one work, on one side of the split")
    transpose: int = option(5, "semitones up or down by which training music is moved at random; 0: off", 0, 24)


@dataclass
class ModelConfig:
    """The size of the Transformer."""

    n_layer: int = option(4, "layers", 1)
    n_head: int = option(4, "attention heads in a layer", 1)
    n_embd: int = option(128, "channels of the model", 2)
    block_size: int = option(256, "tokens of context", 8)
    dropout: float = option(
        0.0, "share of activations dropped in training: 0.1 for a small folder and 4000 steps, say; 0: off", 0, 0.9
    )


@dataclass
class TrainConfig:
    """How the model is trained."""

    steps: int = option(2000, "optimizer steps in all", 1)
    batch_size: int = option(8, "sequences in a step", 1)
    optimizer: str = option(
        "adamw", "of the blocks' matrices; the rest always learns by AdamW", choices=("adamw", "muon")
    )
    lr: float = option(
        3e-4, "peak learning rate, as for a model 1024 wide: a matrix that reads n numbers takes lr x 1024 / n", 0, 1
    )
    warmup: int = option(200, "steps in which the learning rate rises", 0)
    weight_decay: float = option(0.1, "AdamW's decay of the matrices; 0: off", 0)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit", 0)
    eval_every: int = option(250, "steps between two validations", 1)
    save_every: int = option(0, "steps between two checkpoints; 0: two minutes", 0)
    sample_every: int = option(0, "steps between two short pieces that let you hear it learn; 0: none", 0)
    accumulate: int = option(1, "parts in which a batch is worked off, to need less memory", 1)
    seed: int = option(0, "seed of everything random: the same seed gives the same bytes", 0, 2**31 - 1)


@dataclass
class SampleConfig:
    """The music that is written."""

    num_samples: int = option(3, "pieces to write", 1)
    prompt: str = option("", "a MIDI file to continue")
    prompt_bars: int = option(0, "bars of the prompt to continue from; 0: all of it", 0)
    prompt_seconds: float = option(0.0, "the same in seconds, to the last bar line before them; 0: all of it", 0)
    continuation_only: bool = option(False, "leave the prompt out of the file")
    bars: int = option(0, "length of the whole piece in bars; 0: until the model ends it, 8 to 32 new bars", 0)
    seconds: float = option(0.0, "the same in seconds, to the next bar line; 0: see --bars", 0, 86_400)
    tempo: float = option(
        0.0, "one tempo for the whole piece, in quarter notes a minute; 0: as the model wrote it", 0, 1000
    )
    temperature: float = option(1.0, "below 1 safer, above 1 wilder; 0: always the likeliest token", 0, 10)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: off", 0)
    top_p: float = option(0.0, "draw from the likeliest tokens that together reach this probability; 0: off", 0, 1)
    min_p: float = option(0.003, "drop tokens less likely than this share of the likeliest; 0: off", 0, 1)
    wav: bool = option(False, "also write each piece as sound, through a soundfont's piano (needs tinysoundfont)")
    soundfont: str = option(
        "", "the .sf2 or .sf3 file for --wav; empty: one of the system's, or else one that is downloaded"
    )
    plot: bool = option(False, "also draw each piece, and the loss of the training, as .png (needs matplotlib)")
    samples_dir: str = option("samples", "folder for the new .mid files; nothing in it is overwritten")
    report: bool = option(False, "compare the new pieces with training and validation music, in a table")


@dataclass
class RunConfig:
    """What to do, and where."""

    generate: bool = option(False, "write music after training")
    evaluate: str = option("", "folder of MIDI files on which to measure the trained model")
    checkpoint: str = option("pianogpt.pt", "the file that holds the model")
    download: str = option(
        "", "fetch a collection into the MIDI folder first; maestro is 56 MB", choices=("", "maestro")
    )
    fresh: bool = option(False, "start over; an existing checkpoint is kept under another name")
    device: str = option("auto", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps, ...")
    precision: str = option("auto", "of matrix products in training", choices=("auto", "float32", "bfloat16"))
    compile: str = option(
        "auto", "torch.compile, where the run is long enough to pay for it", choices=("auto", "on", "off")
    )


@dataclass
class Config:
    """Every setting, in the groups in which --help shows them."""

    run: RunConfig = field(default_factory=RunConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    music: MusicConfig = field(default_factory=MusicConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_options(config: Config) -> None:
    """Raise UserError for the first setting that is out of its limits or does not fit another."""
    for group in fields(config):
        for f in fields(getattr(config, group.name)):
            value, flag = getattr(getattr(config, group.name), f.name), "--" + f.name.replace("_", "-")
            low, high = f.metadata["low"], f.metadata["high"]
            if low is not None and not value >= low or high is not None and not value <= high:
                limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
                raise UserError(f"{flag} is {value} but must be {limits}")
    for one, other in (("prompt_bars", "prompt_seconds"), ("bars", "seconds")):
        if getattr(config.sample, one) and getattr(config.sample, other):
            one, other = ("--" + name.replace("_", "-") for name in (one, other))
            raise UserError(f"{one} and {other} say the same thing twice: pass one of them")
    m = config.model
    if m.n_embd % (2 * m.n_head):
        raise UserError(
            f"--n-embd {m.n_embd} must be an even multiple of --n-head {m.n_head}: heads share the channels"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Music <-> ids: from a MIDI file to a list of token ids, and back.
# ---------------------------------------------------------------------------------------------------------------------

METRES = {2: (1, 4), 4: (1, 8), 8: (1, 12), 16: (1, 12)}  # beat unit: least and most beats in a bar
LONGEST_NOTE = 12  # beats; the lengths above 4 beats are on half the grid
DAY = 86_400  # seconds
SUSTAIN = 64  # the controller number of the right pedal


class Unusable(Exception):
    """Why a file gives no music, in a few words."""


def find_midi_files(folder: Path) -> list[Path]:
    """Everything under folder named *.mid or *.midi, in any case and at any depth, dot-files left out, sorted."""
    found = []
    for root, dirs, names in os.walk(folder):
        dirs[:] = [d for d in dirs if not d.startswith(".")]
        found += [Path(root, n) for n in [*names, *dirs] if n.lower().endswith((".mid", ".midi")) and n[0] != "."]
    return sorted(found)


def make_tokenizer(music: MusicConfig) -> miditok.REMI:
    """A REMI tokenizer for one piano."""
    # 43 tempos from 40 to 250 are 5 bpm apart and hit 120; 32, MidiTok's default, would make it 121.29.
    config = miditok.TokenizerConfig(
        pitch_range=(21, 108),  # the keys of a piano: A0 to C8
        special_tokens=["PAD", "BOS", "EOS"],
        beat_res={(0, 4): music.grid, (4, LONGEST_NOTE): max(1, music.grid // 2)},
        num_velocities=music.velocities,
        use_chords=bool(music.chords),
        use_tempos=True,
        num_tempos=43,
        tempo_range=(40, 250),
        delete_equal_successive_tempo_changes=True,
        use_time_signatures=True,
        time_signature_range=METRES,
        use_pitchdrum_tokens=False,
    )
    return miditok.REMI(config)


def make_vocabulary(tokenizer: miditok.REMI) -> list[str]:
    """The tokens in the order of their ids."""
    return sorted(tokenizer.vocab, key=tokenizer.vocab.get)


def is_pitch(ids: np.ndarray | Tensor, pitches: range) -> np.ndarray | Tensor:
    """Which of the ids are Pitch tokens, whose ids are contiguous; the same shape, bool."""
    return (ids >= pitches[0]) & (ids <= pitches[-1])


def pitch_range(tokenizer: miditok.REMI) -> range:
    """The ids of the Pitch tokens; they are contiguous, so a semitone is one id."""
    ids = tokenizer.token_ids_of_type("Pitch")
    assert sorted(ids) == list(range(min(ids), max(ids) + 1)), ids
    return range(min(ids), max(ids) + 1)


def pitches_of(ids: np.ndarray, pitches: range) -> np.ndarray:
    """The Pitch ids among ids, in order of onset and then of pitch."""
    return ids[is_pitch(ids, pitches)]


def make_map(tokenizer: miditok.REMI) -> np.ndarray:
    """(4, V) int64, where each id leads: bars begun, grid step in the bar, grid steps of a bar, pitch; -1: it stays."""
    grid, words = tokenizer.config.max_num_pos_per_beat, [w.split("_") for w in make_vocabulary(tokenizer)]
    table = np.full((4, len(words)), -1, np.int64)
    table[0], table[2:, tokenizer.vocab["PAD_None"]] = 0, (4 * grid, 60)  # before the first metre: 4/4; pitch: middle C
    for i, (kind, value) in enumerate(words):
        if kind == "Bar":
            table[:2, i] = 1, 0
        if kind == "Position":
            table[1, i] = int(value)
        if kind == "TimeSig":
            table[2, i] = grid * int(value.split("/")[0])
        if kind == "Pitch":
            table[3, i] = int(value)
    return table


def pedal_intervals(track: Track, end: int) -> list[tuple[int, int]]:
    """The (down, up) ticks of the sustain pedal; one that is never lifted is lifted at end."""
    # Read from the controls: on any channel but the first, the first entry of track.pedals starts at tick 0.
    intervals, down = [], None
    for c in track.controls:
        if c.number == SUSTAIN and (c.value >= 64) != (down is not None):
            if down is not None:
                intervals.append((down, c.time))
            down = c.time if down is None else None
    return intervals + ([(down, end)] if down is not None else [])


def fold_pedal(ends: np.ndarray, intervals: list[tuple[int, int]]) -> np.ndarray:
    """Note ends, in ticks, moved to the moment the pedal is lifted where it is down at the end of the note."""
    if not intervals:
        return ends
    downs, ups = np.array(sorted(intervals)).T
    ups = np.maximum.accumulate(ups)  # one piano has one pedal, whichever track it was recorded on
    held = np.searchsorted(downs, ends, side="right") - 1
    return np.where((held >= 0) & (ups[held] > ends), ups[held], ends)


def repair_overlaps(notes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Notes sorted by time and pitch in which a key sounds once at a time: striking it again ends the note before."""
    order = np.lexsort((-notes["duration"], notes["time"], notes["pitch"]))
    notes = {key: values[order] for key, values in notes.items()}
    same_key = np.diff(notes["pitch"]) == 0
    first = np.r_[True, ~same_key | (np.diff(notes["time"]) > 0)]  # of notes struck together the longest stays
    notes = {key: values[first] for key, values in notes.items()}
    gap = np.where(np.diff(notes["pitch"]) == 0, np.diff(notes["time"]), np.iinfo(np.int32).max)
    notes["duration"][:-1] = np.minimum(notes["duration"][:-1], gap)
    order = np.lexsort((notes["pitch"], notes["time"]))
    return {key: values[order] for key, values in notes.items()}


def read_piano(data: bytes, fold: bool) -> Score:
    """The bytes of a MIDI file as a score with one piano track: no drums, all tracks merged, the pedal folded in.

    Raises Unusable for a file without notes for a piano, and what symusic raises for one that is no MIDI.
    """
    score = Score.from_midi(data)
    if score.ticks_per_quarter < 1:
        raise Unusable("no ticks in a quarter note")
    tracks = [t for t in score.tracks if not t.is_drum and t.note_num()]
    if not tracks:
        raise Unusable("only drums" if score.note_num() else "no notes")
    parts = [t.notes.numpy() for t in tracks]
    notes = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    if fold:
        end = int((notes["time"] + notes["duration"]).max())
        # A hand without notes of its own may still carry the pedal.
        intervals = [i for t in score.tracks if not t.is_drum for i in pedal_intervals(t, end)]
        notes["duration"] = fold_pedal(notes["time"] + notes["duration"], intervals) - notes["time"]
    piano = Score(score.ticks_per_quarter)
    piano.tempos, piano.time_signatures = score.tempos, score.time_signatures
    track = Track(name="Piano", program=0)
    track.notes = Note.from_numpy(**{k: v.astype(parts[0][k].dtype) for k, v in repair_overlaps(notes).items()})
    piano.tracks.append(track)
    return piano


def count_changes(piano: Score, tokenizer: miditok.REMI, written: int) -> dict[str, int]:
    """What the tokens cannot say of a piano score: how many notes and metres are lost or changed, by reason."""
    notes = piano.tracks[0].notes.numpy()
    metres = [(t.numerator, t.denominator) in tokenizer.time_signatures for t in piano.time_signatures]
    lowest, highest = tokenizer.config.pitch_range
    outside = int(((notes["pitch"] < lowest) | (notes["pitch"] > highest)).sum())
    starts = np.array([t.time for t in piano.time_signatures] or [0])
    units = np.array([t.denominator for t in piano.time_signatures] or [4])
    unit = units[np.maximum(np.searchsorted(starts, notes["time"], side="right") - 1, 0)]
    return {
        "notes outside the piano left out": outside,
        "notes struck again within one grid step joined": len(notes["time"]) - outside - written,
        f"notes longer than {LONGEST_NOTE} beats cut": int(
            (notes["duration"] * unit / 4 > LONGEST_NOTE * piano.tpq).sum()
        ),
        "rare metres read as the one before": metres.count(False),
    }


def encode_piano(piano: Score, tokenizer: miditok.REMI) -> list[int]:
    """The ids of one piano score without BOS and EOS; the notes of a position in ascending pitch, each pitch once."""
    piano = tokenizer.preprocess_score(piano)
    if not piano.tracks:
        raise Unusable("no notes within the range of a piano")
    # The grid can bring two strikes of one key together, and MidiTok leaves a chord in the order of its note lengths.
    notes = piano.tracks[0].notes.numpy()
    order = np.lexsort((-notes["duration"], notes["pitch"], notes["time"]))
    keep = np.r_[True, (np.diff(notes["time"][order]) > 0) | (np.diff(notes["pitch"][order]) > 0)]
    piano.tracks[0].notes = Note.from_numpy(**{key: values[order][keep] for key, values in notes.items()})
    return tokenizer.encode(piano, no_preprocess_score=True)[0].ids


def encode_file(path: Path, tokenizer: miditok.REMI, music: MusicConfig) -> Encoded:
    """One MIDI file as ids; a file that gives no music comes back with the reason and no ids."""
    try:
        piano = read_piano(path.read_bytes(), music.pedal == "fold")
        seconds = float(piano.to("second").end())
        if not seconds < DAY:
            raise Unusable("longer than a day")
        ids = encode_piano(piano, tokenizer)
    except Unusable as e:
        return Encoded(problem=str(e))
    except (*SCORE_LOADING_EXCEPTION, KeyError, IndexError, ZeroDivisionError, TypeError, MemoryError) as e:
        return Encoded(problem=f"unreadable: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    ids = np.array(ids, np.int16)
    notes = len(pitches_of(ids, pitch_range(tokenizer)))
    return Encoded(notes, seconds, count_changes(piano, tokenizer, notes), ids=ids)


@dataclass
class Encoded:
    """What one MIDI file gave: its ids, or the problem that kept it from giving any."""

    notes: int = 0
    seconds: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))  # without BOS and EOS

    def to_bytes(self) -> bytes:
        """One line of JSON, then the ids as little-endian int16."""
        head = {k: v for k, v in vars(self).items() if k != "ids"}
        return json.dumps(head).encode() + b"\n" + self.ids.astype("<i2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Encoded:
        """The inverse of to_bytes."""
        head, ids = data.split(b"\n", 1)
        return cls(**json.loads(head), ids=np.frombuffer(ids, "<i2"))


class BarClock:
    """Where the bar lines of a growing piece lie, in quarter notes and in seconds, and when the piece is over."""

    def __init__(self, tokenizer: miditok.REMI, bars: int = 0, seconds: float = 0.0, tempo: float = 0.0):
        self.bars, self.limit, self.fixed = bars, seconds, bool(tempo)
        self.grid, self.words = (
            tokenizer.config.max_num_pos_per_beat,
            [w.split("_") for w in make_vocabulary(tokenizer)],
        )
        self.start = self.now = self.length = 0.0  # quarters: of the bar, of the last event, from bar line to bar line
        self.seconds, self.tempo, self.unit = 0.0, tempo or 120.0, 1.0
        self.lines: list[tuple[int, float, float]] = []  # of each bar line: ids before it, quarters, seconds
        self.kept, self.over = 0, False

    def advance(self, quarters: float) -> None:
        """Move the clock on to a moment of the piece."""
        self.seconds += (quarters - self.now) * 60 / self.tempo
        self.now = quarters

    def feed(self, ids: list[int]) -> BarClock:
        """Read more ids, until the piece is over: at EOS, or at the bar line that completes its length."""
        for id in ids:
            if not self.over:
                self.hear(*self.words[id])
        return self

    def hear(self, kind: str, value: str) -> None:
        """Read one token."""
        if kind == "EOS":
            self.end()
            return
        if kind == "Bar":
            self.advance(self.start + self.length)
            self.start = self.now
            if self.bars and len(self.lines) == self.bars or self.limit and self.seconds >= self.limit:
                self.over = True
                return
            self.lines.append((self.kept, self.now, self.seconds))
        elif kind == "TimeSig":
            beats, unit = map(int, value.split("/"))
            self.unit, self.length = 4 / unit, beats * 4 / unit
        elif kind == "Position":
            self.advance(self.start + int(value) * self.unit / self.grid)
        elif kind == "Tempo" and not self.fixed:
            self.tempo = float(value)
        self.kept += 1

    def end(self) -> None:
        """The piece is over, and the clock stands at the end of its last bar."""
        self.over = True
        self.advance(self.start + self.length)


def decode_ids(ids: list[int], tokenizer: miditok.REMI, tempo: float = 0.0) -> Score:
    """The score that ids stand for, in 480 ticks a quarter note; no note hangs past the end of the last bar."""
    clock = BarClock(tokenizer).feed(ids)
    clock.end()
    score = tokenizer.decode([ids]).resample(480, min_dur=1)
    for track in score.tracks:
        track.name, notes = "Piano", repair_overlaps(track.notes.numpy())
        notes["duration"] = np.minimum(notes["duration"], round(clock.now * 480) - notes["time"])
        track.notes = Note.from_numpy(**notes)
    if tempo:
        score.tempos = score.tempos.__class__([symusic.Tempo(0, tempo)])
    return score


def read_prompt(sample: SampleConfig, tokenizer: miditok.REMI, music: MusicConfig) -> list[int]:
    """The ids of the prompt up to a bar line; a note that sounds across it ends there. Raises UserError."""
    path = Path(sample.prompt)
    if not path.is_file():
        raise UserError(f"there is no MIDI file {path}: pass another --prompt")
    encoded = encode_file(path, tokenizer, music)
    if encoded.problem:
        raise UserError(f"{path} cannot be continued ({encoded.problem}): pass another --prompt")
    clock = BarClock(tokenizer).feed(encoded.ids.tolist())
    clock.end()
    ends = [seconds for _, _, seconds in clock.lines[1:]] + [clock.seconds]
    if sample.prompt_bars > len(ends) or sample.prompt_seconds > ends[-1]:
        raise UserError(f"{path} is only {len(ends)} bars, {ends[-1]:.1f} seconds long: ask for less of it")
    bars = sample.prompt_bars or max(
        1, sum(s <= sample.prompt_seconds for s in ends) if sample.prompt_seconds else len(ends)
    )
    lines = [index for index, _, _ in clock.lines] + [len(encoded.ids)]
    score = decode_ids(encoded.ids[: lines[bars]].tolist(), tokenizer)
    if not score.note_num():
        raise UserError(f"the first {bars} bars of {path} hold no notes: ask for more of it")
    ids, bar = encode_piano(score, tokenizer), tokenizer.vocab["Bar_None"]
    last = [i for i in ids if i in tokenizer.token_ids_of_type("TimeSig")][-1]
    return ids + [bar, last] * (bars - ids.count(bar))  # bars of silence at the end count too


def bar_contents(ids: list[int], grammar: Grammar) -> list[tuple[int, ...]]:
    """The ids of each bar without the bar line and the metre."""
    starts = [i for i, id in enumerate(ids) if id == grammar.bar] + [len(ids)]
    return [tuple(ids[a + 2 : b]) for a, b in zip(starts, starts[1:])]


def describe(score: Score, ids: list[int], grammar: Grammar) -> dict[str, float]:
    """The figures of a piece: density, polyphony, range, lengths, loudness, silence and repetition."""
    second = score.to("second")
    notes = {
        k: np.concatenate([t.notes.numpy()[k] for t in second.tracks])
        for k in ("time", "duration", "pitch", "velocity")
    }
    order = np.argsort(notes["time"], kind="stable")
    start, end = notes["time"][order], (notes["time"] + notes["duration"])[order]
    reached = np.maximum.accumulate(np.r_[0.0, end[:-1]])  # when all notes before have ended
    sounding, total = float(np.maximum(0, end - np.maximum(start, reached)).sum()), float(end.max())
    classes = np.bincount(notes["pitch"] % 12, minlength=12) / len(start)
    contents = bar_contents(ids, grammar)
    repeated = sum(bool(c) and c in contents[:i] for i, c in enumerate(contents))
    return {
        "notes_per_second": len(start) / total,
        "polyphony": float(notes["duration"].sum()) / sounding,
        "lowest": int(notes["pitch"].min()),
        "highest": int(notes["pitch"].max()),
        "pitch_class_entropy_bits": float(-(classes[classes > 0] * np.log2(classes[classes > 0])).sum()),
        "length_mean_seconds": float(notes["duration"].mean()),
        "length_spread_seconds": float(notes["duration"].std()),
        "velocity_mean": float(notes["velocity"].mean()),
        "velocity_spread": float(notes["velocity"].std()),
        "silence_percent": 100 * (1 - sounding / total),
        "empty_bars_percent": 100 * contents.count(()) / len(contents),
        "repeated_bars_percent": 100 * repeated / len(contents),
    }


STRANGE = 200  # stands between two pieces among their intervals: no interval on a piano is as large


def intervals(pitches: np.ndarray) -> np.ndarray:
    """The steps in semitones from each note to the next, closed by STRANGE; (n,) for n pitches."""
    return np.append(np.diff(pitches.astype(np.int16)), np.int16(STRANGE))


def hash_parts(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of value(step i) b^i up to each i, and b^-i, from which any window's hash is one product; all uint64."""
    values = np.random.default_rng(0).integers(2**63, size=512).astype(np.uint64)[steps + 256]
    base = 0x9E3779B97F4A7C15
    powers, inverse = (np.full(len(steps), b % 2**64, np.uint64) for b in (base, pow(base, -1, 2**64)))
    powers[0] = inverse[0] = 1
    return np.r_[np.uint64(0), np.cumsum(values * np.multiply.accumulate(powers))], np.multiply.accumulate(inverse)


def window_hashes(parts: tuple[np.ndarray, np.ndarray], length: int) -> np.ndarray:
    """The polynomial hash, modulo 2**64, of each window of `length` steps, by where it begins."""
    sums, unshift = parts
    return (sums[length:] - sums[:-length]) * unshift[: max(0, len(sums) - length)]


class KnownRuns:
    """Finds the longest run of notes that also stands in a corpus, whatever the key and the timing.

    All windows of one length are compared at once by their hashes, and what agrees is compared note by note; the length
    is found by bisection, since a run holds all shorter ones.
    """

    def __init__(self, pieces: dict[str, np.ndarray]):
        self.names, steps = list(pieces), [intervals(p) for p in pieces.values()]
        self.ends, self.steps = np.cumsum([len(x) for x in steps]), np.concatenate([*steps, [STRANGE]])
        self.parts = hash_parts(self.steps)

    def find(self, steps: np.ndarray, length: int) -> int:
        """Where in the corpus any window of `length` steps stands, or -1."""
        mine, theirs = window_hashes(hash_parts(steps), length), window_hashes(self.parts, length)
        low_bits = np.zeros(2**16, bool)
        low_bits[mine & np.uint64(0xFFFF)] = True
        for at in np.flatnonzero(low_bits[theirs & np.uint64(0xFFFF)]):
            for i in np.flatnonzero(mine == theirs[at]):
                if np.array_equal(steps[i : i + length], self.steps[at : at + length]):
                    return int(at)
        return -1

    def longest(self, pitches: np.ndarray) -> tuple[int, str]:
        """How many notes the longest run of pitches has that the corpus holds, and the name of a piece with it."""
        steps, found = intervals(pitches)[:-1], (0, "")
        low, high = 0, min(len(steps), len(self.steps))
        while low < high:
            length = (low + high + 1) // 2
            at = self.find(steps, length)
            if at < 0:
                high = length - 1
            else:
                low, found = length, (length + 1, self.names[int(np.searchsorted(self.ends, at, side="right"))])
        return found


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """A new empty file folder/stem-001.suffix, or the first number of which no file is there, whatever its suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}-{number:03d}{suffix}"
        if not any(folder.glob(f"{glob.escape(path.stem)}.*")):
            try:
                path.touch(exist_ok=False)  # made here, so that nobody else gets it
                return path
            except FileExistsError:
                continue


WAV_RATE, RING_OUT = 44_100, 2.0  # samples a second; seconds after the last note
SOUNDFONTS = (
    "/usr/share/sounds",
    "/usr/share/soundfonts",
    "/usr/local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
)
SOUNDFONTS += ("~/.local/share/soundfonts", "~/Library/Audio/Sounds/Banks", "C:/soundfonts")


def find_soundfont(asked: str) -> Path:
    """The soundfont asked for, else the smallest in the usual folders, else one from the network. Raises Unusable."""
    if asked:
        if not Path(asked).is_file():
            raise Unusable(f"there is no soundfont {asked}: pass another --soundfont")
        return Path(asked)
    folders = [Path(folder).expanduser() for folder in SOUNDFONTS]
    found = [p for folder in folders for ending in ("sf2", "sf3") for p in folder.rglob(f"*.{ending}") if p.is_file()]
    if not found:
        try:
            return Path(symusic.BuiltInSF3.MuseScoreGeneral().path(download=True))
        except OSError:
            raise Unusable(
                "no soundfont is on this system and none could be downloaded: pass an .sf2 or .sf3 file as --soundfont"
            ) from None
    return min(found, key=lambda p: (p.stat().st_size, p))


def write_wav(path: Path, score: Score, soundfont: Path) -> None:
    """Play a score on the first preset of a soundfont into a .wav of 16 bits, stereo, as loud as it can be."""
    try:
        import tinysoundfont
    except ImportError:
        raise Unusable("tinysoundfont is not installed: pip install --no-deps tinysoundfont") from None
    synth = tinysoundfont.Synth(samplerate=WAV_RATE)
    try:
        synth.program_select(0, synth.sfload(str(soundfont)), 0, 0)
    except Exception:  # tinysoundfont's own, which is not exported
        raise Unusable(f"{soundfont} is no soundfont that can be read: pass another --soundfont") from None
    notes = [n for t in score.to("second").tracks for n in t.notes]
    events = [(n.time, n.pitch, n.velocity) for n in notes] + [(n.end, n.pitch, 0) for n in notes]
    events.sort(key=lambda event: (round(event[0] * WAV_RATE), event[2]))  # a key is let go before it is struck again
    chunks, now = [], 0
    for second, pitch, velocity in [*events, (score.to("second").end() + RING_OUT, 0, 0)]:
        count, now = round(second * WAV_RATE) - now, round(second * WAV_RATE)
        if count:
            chunks.append(np.frombuffer(synth.generate(count), np.float32))
        synth.noteon(0, pitch, velocity) if velocity else synth.noteoff(0, pitch)
    sound = np.concatenate(chunks)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, WAV_RATE, 0, "NONE", ""))
        file.writeframes((sound * (32_000 / max(1e-3, np.abs(sound).max()))).astype("<i2").tobytes())


def new_figure(width: float, height: float):
    """An empty matplotlib figure of so many inches, which needs no display. Raises Unusable."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unusable("matplotlib is not installed: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def draw_piano_roll(path: Path, score: Score, bars: list[float], prompt_seconds: float) -> None:
    """Draw notes over seconds and pitch, darker where louder, the prompt's in another colour. Raises Unusable."""
    notes = [n for t in score.to("second").tracks for n in t.notes]
    end = max(n.end for n in notes)
    figure = new_figure(min(60.0, max(12.0, end / 8)), 4)
    from matplotlib import colormaps

    axes = figure.add_subplot()
    for name, colours in (("prompt", "Oranges"), ("PianoGPT", "Blues")):
        part = [n for n in notes if (n.time < prompt_seconds - 1e-3) == (name == "prompt")]
        if part:
            axes.barh(
                [n.pitch for n in part],
                [n.duration for n in part],
                left=[n.time for n in part],
                height=0.9,
                color=colormaps[colours]([0.3 + 0.7 * n.velocity / 127 for n in part]),
                label=f"{name}, darker is louder",
            )
    low, high = min(n.pitch for n in notes), max(n.pitch for n in notes)
    octaves = range(low // 12 * 12, high + 13, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set(xlim=(0, end), ylim=(low - 2, high + 2), xlabel="seconds", ylabel="pitch (C4 is middle C)")
    axes.grid(axis="y", alpha=0.3)
    axes.vlines(bars, low - 2, high + 2, color="0.8", linewidth=0.6, zorder=0)
    every = -(-len(bars) // int(2 * figure.get_figwidth()))
    top = axes.secondary_xaxis("top")
    top.set_xticks(bars[::every], range(1, len(bars) + 1, every))
    top.set_xlabel("bar")
    figure.legend(loc="outside lower right", ncols=2, fontsize="small")
    figure.savefig(path)


def draw_losses(path: Path, history: list[dict]) -> None:
    """Draw the losses of a training run over its steps. Raises Unusable."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for key, label in (("train_loss", "training (transposed at random)"), ("val_loss", "validation")):
        points = [(row["step"], row[key]) for row in history if row[key] is not None]
        if points:
            axes.plot(*zip(*points), marker=".", label=f"{label}: {points[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss in nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


@dataclass
class Grammar:
    """REMI's rules as tables, so that checking every token of a batch is one look-up.

    The state of a sequence is 4 row numbers: what may follow the last token, which positions lie ahead, which are
    inside the bar, which pitches lie above the last. A token's log-probability is minus infinity if any row says so.
    """

    rows: np.ndarray  # (R, V) float32: 0 where a token is legal, -inf where not
    update: np.ndarray  # (V, 4) int64: the rows that a token moves a sequence to; -1 leaves the row as it was
    start: np.ndarray  # (4,) int64: the rows of an empty sequence
    bos: int
    eos: int
    bar: int


def make_grammar(tokenizer: miditok.REMI) -> Grammar:
    """The rules of a tokenizer: MidiTok's graph of token types, time that goes forward, chords from low to high."""
    words = [w.split("_", 1) for w in make_vocabulary(tokenizer)]
    V, kinds = len(words), [kind for kind, _ in words]
    graph = {kind: set(after) - {"PAD", "BOS", "EOS"} for kind, after in tokenizer.tokens_types_graph.items()}
    for after in graph.values():
        after.discard("TimeSig")  # a metre changes at a bar line only
        if "Bar" in after:
            after.add("EOS")
    # The three that the graph is looser about than real pieces are, and what fills a piece that ends before others.
    graph.update(BOS={"Bar"}, TimeSig={"Position", "Bar"}, Bar={"TimeSig"}, EOS={"PAD"}, PAD={"PAD"})

    number = [int(w[1].split("/")[0].split(".")[0]) if w[0] in ("Position", "Pitch", "TimeSig") else -1 for w in words]
    positions = [n if k == "Position" else -1 for k, n in zip(kinds, number)]
    pitches = [n if k == "Pitch" else -1 for k, n in zip(kinds, number)]
    beats = [n if k == "TimeSig" else -1 for k, n in zip(kinds, number)]
    grid = tokenizer.config.max_num_pos_per_beat
    follows = [[k in graph.get(kind, ()) for k in kinds] for kind in kinds]
    ahead = [[p < 0 or p > now for p in positions] for now in range(-1, max(positions) + 1)]
    inside = [[p < n * grid for p in positions] for n in range(max(beats) + 1)]
    above = [[p < 0 or p > now for p in pitches] for now in range(-1, max(pitches) + 1)]

    first = np.cumsum([0, V, len(ahead), len(inside)])  # the first row of each of the four tables
    update = np.full((V, 4), -1, np.int64)
    for i, kind in enumerate(kinds):
        update[i, 0] = i
        if kind in ("Bar", "Position"):
            update[i, 1:] = first[1] + positions[i] + 1, -1, first[3]
        if kind == "TimeSig":
            update[i, 2] = first[2] + beats[i]
        if kind == "Pitch":
            update[i, 3] = first[3] + pitches[i] + 1
    legal = np.array(follows + ahead + inside + above)
    bos, eos, bar = (tokenizer.vocab[w] for w in ("BOS_None", "EOS_None", "Bar_None"))
    return Grammar(np.where(legal, 0, -np.inf).astype(np.float32), update, first + [bos, 0, 0, 0], bos, eos, bar)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Dataset: folder -> ids per piece (in parallel, cached) -> training and validation pieces -> batch number i.
# ---------------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")
SAME_MUSIC, SAME_KINDS = 24, 8  # recordings of one work share so many intervals in a row, of so many kinds
FILE_SECONDS = 120  # a file that takes a worker longer than this is given up
FILE_MEGABYTES = 16  # an hour of dense piano is under 1 MB
WORKER_GIGABYTES = 4  # a million notes take half of one


@dataclass
class Piece:
    """One file that gave music: where it was, what it gave, which side of the split it is on."""

    path: str  # relative to the MIDI folder, with forward slashes
    encoded: Encoded
    split: str = ""
    work: str = ""  # the musical work of which it is one recording


def encode_worker(pipe: multiprocessing.connection.Connection, music: MusicConfig) -> None:
    """Answer each path that comes through the pipe with what encode_file makes of it, as long as there is a parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the workers
    if sys.platform == "linux":  # a file that needs more memory than this fails alone
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + WORKER_GIGABYTES * 2**30,) * 2)
    tokenizer = make_tokenizer(music)
    while pipe.poll(5) or multiprocessing.parent_process().is_alive():
        if pipe.poll():
            pipe.send(encode_file(pipe.recv(), tokenizer, music))


def start_worker(music: MusicConfig) -> tuple:
    """A new process that encodes files, and the pipe to it."""
    # A forked worker starts in milliseconds; elsewhere than on Linux forking is unsafe or unknown.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=encode_worker, args=(far_end, music), daemon=True)
    process.start()
    far_end.close()
    return process, pipe


def encode_in_workers(paths: list[Path], music: MusicConfig):
    """Yield (path, Encoded) for every path as it gets ready; a file that kills or hangs the parser costs itself."""
    waiting, busy = paths[::-1], {}  # busy: pipe -> (process, path, deadline)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    idle = [start_worker(music) for _ in range(min(cores, len(waiting)))]
    try:
        while busy or waiting:
            while waiting and len(busy) < cores:
                process, pipe = idle.pop() if idle else start_worker(music)
                if not process.is_alive():  # a parser that was hurt by one file can die after it
                    process, pipe = start_worker(music)
                path = waiting.pop()
                pipe.send(path)
                busy[pipe] = process, path, time.monotonic() + FILE_SECONDS
            ready = multiprocessing.connection.wait(list(busy), timeout=1)
            late = [pipe for pipe, (*_, deadline) in busy.items() if time.monotonic() > deadline and pipe not in ready]
            for pipe in ready + late:
                process, path, _ = busy.pop(pipe)
                encoded = Encoded(problem=f"longer than {FILE_SECONDS} s to read")
                try:
                    if pipe in ready:
                        encoded = pipe.recv()
                        idle.append((process, pipe))
                    else:
                        process.kill()
                except (EOFError, OSError):
                    encoded = Encoded(problem="crashed the MIDI parser")
                yield path, encoded
    finally:
        for process in [p for p, _ in idle] + [p for p, *_ in busy.values()]:
            process.kill()


def cache_folder(folder: str, music: MusicConfig) -> Path:
    """Where the cache keeps what files gave under these settings: in a file for each content that a file had."""
    tokenizer = make_tokenizer(music)
    settings = [tokenizer.config.to_dict(serialize=True), make_vocabulary(tokenizer), asdict(music)]
    versions = [version("miditok"), version("symusic"), "1"]  # raise the last where reading itself changes
    return Path(folder, hashlib.sha256(json.dumps([settings, versions], default=str).encode()).hexdigest()[:16])


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every moment path holds either all of the old bytes or all of the new ones."""
    new = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def file_key(path: Path) -> str:
    """The hash of a file's content; raises Unusable for what is no readable file of a sensible size."""
    if not path.is_file():  # a folder, a pipe or a broken link: opening a pipe would wait for ever
        raise Unusable("not a file")
    if path.stat().st_size > FILE_MEGABYTES * 2**20:
        raise Unusable(f"larger than {FILE_MEGABYTES} MB")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def read_folder(folder: Path, music: MusicConfig, cache_dir: str) -> tuple[list[Piece], dict[str, str]]:
    """Every piece of music under folder in the order of the paths, and the reason for each file that gave none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it and put .mid files there, or pass --midi-dir")
    paths = find_midi_files(folder)
    if not paths:
        raise UserError(f"no .mid or .midi file under {folder}: put some there (audio will not do), or pass --midi-dir")
    cache, kept, results = cache_folder(cache_dir, music), {}, {}
    for path in paths:
        try:
            kept[path] = cache / file_key(path)
            results[path] = Encoded.from_bytes(kept[path].read_bytes())
        except Unusable as e:
            results[path] = Encoded(problem=str(e))
        except (OSError, ValueError, TypeError):
            pass  # not in the cache, or not as this version writes it
    new = [path for path in paths if path not in results]
    bar = progress(encode_in_workers(new, music), total=len(new), desc="reading MIDI", unit="file", disable=not new)
    for path, encoded in bar:
        results[path] = encoded
        if cache_dir and path in kept:
            cache_dir = keep_encoded(kept[path], encoded) and cache_dir
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    pieces = [Piece(names[p], results[p]) for p in paths if not results[p].problem]
    return pieces, {names[p]: results[p].problem for p in paths if results[p].problem}


def keep_encoded(path: Path, encoded: Encoded) -> bool:
    """Write a result into the cache; False, with a sentence, if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encoded.to_bytes())
        return True
    except OSError as e:
        say(f"the cache {path.parent} cannot be written ({e.strerror}): files will be read again next time")
        return False


COLLECTIONS = {  # name: where it is, the folder in it, the MIDI files it holds, its licence
    "maestro": (
        "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0-midi.zip",
        "maestro-v3.0.0",
        1276,
        "CC BY-NC-SA 4.0: name the source, sell nothing made of it, share what you make under the same licence",
    )
}
DOWNLOAD_TRIES = 5


def download(url: str, path: Path) -> None:
    """Fetch url into path; a download that broke goes on where it stopped. Raises UserError if that does not help."""
    part = Path(f"{path}.part")
    for tries in range(1, DOWNLOAD_TRIES + 1):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0  # a server that cannot go on begins anew
                total = have + int(answer.headers["Content-Length"] or 0)
                bar = progress(total=total, initial=have, desc=path.name, unit="B", unit_scale=True)
                with open(part, "ab" if have else "wb") as file, bar:
                    while block := answer.read(2**16):
                        file.write(block)
                        bar.update(len(block))
            if part.stat().st_size < total:
                raise ConnectionError("the connection broke")
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            if getattr(e, "code", 0) == 416:  # nothing is left to fetch: part is whole, or of another file
                break
            if tries == DOWNLOAD_TRIES:
                raise UserError(f"{url} cannot be fetched ({e}): the same command goes on with it later") from None
            time.sleep(tries)
    part.replace(path)


def unpack(archive: Path, folder: Path, inside: str, files: int) -> None:
    """Put the folder `inside` of a zip under folder, whole or not at all, once all of the zip is found to be sound."""
    try:
        with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as new:
            names = content.namelist()
            for name in names:
                if not Path(new, name).resolve().is_relative_to(Path(new).resolve()):
                    raise UserError(f"{archive} wants to write outside of {folder} ({name}), so nothing was unpacked")
            if content.testzip() or sum(name.lower().endswith((".mid", ".midi")) for name in names) != files:
                raise zipfile.BadZipFile
            content.extractall(new)
            Path(new, inside).replace(folder / inside)
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError):
        archive.unlink()
        raise UserError(
            f"what came as {archive} was damaged and is removed: the same command fetches it again"
        ) from None


def fetch_collection(name: str, folder: Path) -> None:
    """Download a collection of MIDI files into folder, or do nothing if it is there; its licence is printed."""
    url, inside, files, licence = COLLECTIONS[name]
    if not (folder / inside).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / url.rsplit("/", 1)[1]
        if not archive.exists():
            download(url, archive)
        unpack(archive, folder, inside, files)
        archive.unlink()
    say(f"{name}: {files:,} files in {folder / inside}, {licence}")


def name_hash(piece: str) -> float:
    """A number from 0 to 1 that a name alone decides, the same on every machine."""
    return int(hashlib.sha256(piece.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32


def in_validation(piece: str, percent: float) -> bool:
    """True if this piece is held out: by its name alone, so that a new file never moves an old one."""
    return name_hash(piece) < percent / 100


def read_split_tables(folder: Path) -> dict[str, str]:
    """The split of each file that a csv of MAESTRO's kind (columns split and midi_filename) under folder names."""
    table = {}
    for path in sorted(folder.rglob("*.csv")):
        try:
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.DictReader(file):
                    if row.get("split") in SPLITS and row.get("midi_filename"):
                        name = os.path.relpath(path.parent / row["midi_filename"], folder)
                        table[Path(name).as_posix()] = row["split"]
        except (OSError, csv.Error) as e:
            say(f"{path} cannot be read as a table ({e}), so it decides no split")
    return table


def join_recordings(pieces: list[Piece], pitches: range) -> None:
    """Give pieces that are recordings of the same music, in whatever key, the same work: the first of their names."""
    steps = [intervals(pitches_of(p.encoded.ids, pitches)) for p in pieces]
    owner = np.repeat(np.arange(len(pieces)), [len(s) for s in steps])
    steps = np.concatenate([*steps, [np.int16(STRANGE)]])
    hashes = window_hashes(hash_parts(steps), SAME_MUSIC)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(hashes[order]) == 0)
    here, there = order[again], order[again + 1]
    apart = owner[here] != owner[there]
    windows = np.sort(steps[here[apart, None] + np.arange(SAME_MUSIC)], 1)
    telling = (windows[:, -1] < STRANGE) & (1 + (np.diff(windows) > 0).sum(1) >= SAME_KINDS)
    names, work = np.unique([p.work for p in pieces], return_inverse=True)
    for x, y in np.unique(np.c_[owner[here], owner[there]][apart][telling], axis=0):
        work[work == max(work[x], work[y])] = min(work[x], work[y])
    for piece, number in zip(pieces, work):
        piece.work = str(names[number])


def split_pieces(pieces: list[Piece], folder: Path, data: DataConfig, pitches: range) -> None:
    """Put each piece on its side: as a csv or a folder's name says, else as the rest of its work, else by hash."""
    table = read_split_tables(folder)
    for piece in pieces:
        piece.work = Path(piece.path).parent.as_posix() if data.piece_is_folder else piece.path
        named = [part for part in Path(piece.path).parts[:-1] if part in SPLITS]
        piece.split = table.get(piece.path) or (named[-1] if named else "")
    join_recordings(pieces, pitches)
    validation_is_given = any(p.split == "validation" for p in pieces)
    undecided = ("",) if validation_is_given else ("", "train")
    # Where a work is given to two sides, it is held out.
    given = {p.work: p.split for p in sorted(pieces, key=lambda p: p.split != "train") if p.split not in undecided}
    for piece in pieces:
        piece.split = piece.split or given.get(piece.work, "")
    open_pieces = [p for p in pieces if p.split in undecided]
    works = {p.work for p in open_pieces}
    held_out = {work for work in works if in_validation(work, data.val_percent)}
    if data.val_percent and not validation_is_given and not held_out and len(works) > 1:
        held_out = {min(works, key=name_hash)}
    if held_out and len(held_out) == len(works):
        held_out.remove(max(works, key=name_hash))  # something must be left to train on
    for piece in open_pieces:
        piece.split = "validation" if piece.work in held_out else "train"


def join_pieces(pieces: list[Piece], split: str, grammar: Grammar) -> np.ndarray:
    """(N,) int16: all pieces of one split one after another, each between BOS and EOS."""
    parts = [[[grammar.bos], p.encoded.ids, [grammar.eos]] for p in pieces if p.split == split]
    return np.concatenate([np.empty(0, np.int16), *(x for part in parts for x in part)]).astype(np.int16)


@dataclass
class Batches:
    """Training batch number i, as a pure function of the seed and i."""

    ids: Tensor  # (N,) int16, on the device of the training
    pitches: range  # the ids of the Pitch tokens, from the lowest to the highest
    batch_size: int
    block_size: int
    transpose: int
    seed: int
    rank: int = 0  # of so many processes, which each take their share of every batch
    processes: int = 1

    def __post_init__(self):
        # Music shorter than one window is repeated until a window fits.
        self.ids = self.ids.repeat(-(-(self.block_size + 2) // len(self.ids)))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """This process's share of batch i: inputs and targets (B / processes, T), from anywhere and transposed."""
        # A window may cross from one piece into the next; the EOS BOS pair between them is all the model gets told.
        random, B = np.random.default_rng((self.seed, i)), self.batch_size
        starts = torch.from_numpy(random.integers(len(self.ids) - self.block_size, size=B))
        shifts = torch.from_numpy(random.integers(-self.transpose, self.transpose + 1, size=B))
        share = slice(self.rank * B // self.processes, (self.rank + 1) * B // self.processes)
        starts, shifts = starts[share], shifts[share]
        window = torch.arange(self.block_size + 1, device=self.ids.device)
        ids = self.ids[starts.to(self.ids.device)[:, None] + window].long()  # (B, T + 1)
        ids = transpose_ids(ids, shifts.to(ids.device), self.pitches)
        return ids[:, :-1], ids[:, 1:]


def transpose_ids(ids: Tensor, shifts: Tensor, pitches: range) -> Tensor:
    """ids (B, T) with row b moved by shifts[b] semitones, or by as much of it as keeps every note on the piano."""
    movable = is_pitch(ids, pitches)
    lowest = ids.masked_fill(~movable, pitches[-1]).amin(1)
    highest = ids.masked_fill(~movable, pitches[0]).amax(1)
    shifts = torch.minimum(torch.maximum(shifts, pitches[0] - lowest), pitches[-1] - highest)
    return ids + shifts[:, None] * movable


IGNORE = -1  # a target that is not scored


def validation_windows(ids: np.ndarray, block_size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (W, T) of at most limit windows side by side, evenly spread over ids; the same every time."""
    count = max(0, -(-(len(ids) - 1) // block_size))
    padded = np.full(count * block_size + 1, IGNORE, np.int64)
    padded[: len(ids)] = ids
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)) if count else np.empty(0, int)
    at = chosen[:, None] * block_size + np.arange(block_size)
    return torch.from_numpy(np.maximum(padded[at], 0)), torch.from_numpy(padded[at + 1])


def sliding_windows(ids: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (W, T) that score each token of a piece once, with half a window before it where there is."""
    half, targets = block_size // 2, len(ids) - 1
    starts = range(0, max(1, targets - block_size + half), half) if targets > block_size else [0]
    x, y = np.zeros((len(starts), block_size), np.int64), np.full((len(starts), block_size), IGNORE, np.int64)
    for row, start in enumerate(starts):
        window = ids[start : start + block_size + 1]
        x[row, : len(window) - 1] = window[:-1]
        seen = half if row else 0  # these were targets of the window before
        y[row, seen : len(window) - 1] = window[1 + seen :]
    return torch.from_numpy(x), torch.from_numpy(y)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Model: a causal Transformer in musical time and pitch, and a decoder that keeps its keys and values.
# ---------------------------------------------------------------------------------------------------------------------


TOKEN_STEP = 0.1  # tokens at one moment of the music stand so many grid steps apart
# Semitones after which each pair of channels that turns with pitch is round; the other pairs turn with time.
PITCH_PERIODS = (12, 6, 4, 24, 48, 96)


def follow(table: Tensor, idx: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where tokens idx (B, T) stand, (2, B, T): grid steps since the first, and pitch; and the state after all, (4, B).

    table (4, V) is where each id leads. The state is the step at which the bar began, how far in it the music is, how
    long it is, and the pitch of the last note.
    """
    if state is None:
        state = table[:, :1].clamp(min=0).expand(4, len(idx))
    if idx.size(1) == 1:  # the same in a third of the operators, which is what a token costs in generation
        moves = table[:, idx[:, 0]]  # (4, B)
        steps, lengths, pitches = torch.where(moves[1:] < 0, state[1:], moves[1:])
        start = state[0] + moves[0] * state[2]
        return torch.stack([start + steps, pitches])[:, :, None], torch.stack([start, steps, lengths, pitches])
    moves, at = table[:, idx], torch.arange(idx.size(1) + 1, device=idx.device)
    said = torch.cat([state[1:, :, None], moves[1:]], 2)  # (3, B, T + 1), -1 where a token says nothing
    steps, lengths, pitches = said.gather(2, torch.where(said < 0, 0, at).cummax(2).values)  # the latest that was said
    starts = state[0][:, None] + (moves[0] * lengths[:, :-1]).cumsum(1)  # (B, T)
    end = torch.stack([x[:, -1] for x in (starts, steps, lengths, pitches)])
    return torch.stack([starts + steps[:, 1:], pitches[:, 1:]]), end


def rotary_speeds(hs: int) -> Tensor:
    """(2, hs / 2): by how many radians each pair of channels turns in a grid step, and in a semitone."""
    by_pitch = 2 * math.pi / torch.tensor(PITCH_PERIODS[: hs // 4])
    pairs = hs // 2 - len(by_pitch)
    by_time = 10_000.0 ** -(torch.arange(pairs) / pairs)
    return torch.stack([F.pad(by_time, (0, len(by_pitch))), F.pad(by_pitch, (pairs, 0))])


def rotary_angles(place: Tensor, first: int, speeds: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, hs), of the turn of tokens `first` and on, at place (2, B, T); the sine is signed."""
    time = place[0] + TOKEN_STEP * torch.arange(first, first + place.size(2), device=place.device)
    angle = time[..., None] * speeds[0] + place[1, ..., None] * speeds[1]  # (B, T, hs / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, hs) turned by its position, after which a product of two depends on their distance alone."""
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, -1) * sin.to(x.dtype)


ATTENTION_TILE = 64  # queries that are scored together, so that the scores fit into a core's cache


def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention(q, k, v, is_causal=True), all (B, nh, T, hs), without the keys that lie ahead.

    Faster than PyTorch's in bfloat16 on a CPU, whose backward pass there is slower than in float32.
    """
    q, parts = q * q.size(-1) ** -0.5, []
    for start in range(0, q.size(2), ATTENTION_TILE):
        tile = q[:, :, start : start + ATTENTION_TILE]
        end = start + tile.size(2)
        ahead = torch.full((tile.size(2), end), -math.inf, dtype=q.dtype, device=q.device).triu(start + 1)
        p = (tile @ k[:, :, :end].transpose(2, 3) + ahead).softmax(-1)  # (B, nh, tile, end)
        parts.append(p @ v[:, :, :end])
    return torch.cat(parts, 2)


class Attention(nn.Module):
    """Causal scaled dot-product attention; all heads' queries, keys and values come from one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C), where position t has looked at positions up to t."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        (q, k), v = rotate(qkv[:2], cos, sin), qkv[2]
        if self.dropout:  # of whole tokens for a head: of each of its T x T weights, it would double a step's time
            v = v * F.dropout(v.new_ones(B, self.n_head, T, 1), self.dropout, self.training)
        if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            y = tiled_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer: tokens look at each other, then each thinks for itself; both add to what was there."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        inner = 16 * max(1, round(config.n_embd / 6))  # 8/3 n_embd: as many weights as 4 n_embd without a gate
        self.expand = nn.Linear(config.n_embd, 2 * inner, bias=False)
        self.contract = nn.Linear(inner, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin))
        hidden, gate = self.expand(self.norm_2(x)).chunk(2, -1)  # 2 x (B, T, 8/3 C)
        return x + self.dropout(self.contract(hidden * F.silu(gate)))


RECENT = 3  # tokens that are mixed into the embedding of the next


def add_recent(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, C) plus the RECENT tokens before each, weighed by channel with weight (RECENT, C), newest first."""
    padded, T = F.pad(x, (0, 0, RECENT, 0)), x.size(1)
    return x + sum(padded[:, RECENT - n : RECENT - n + T] * w for n, w in enumerate(weight, 1))


class PianoGPT(nn.Module):
    """Ids in, logits of the next id out; table (4, V) is where each id leads in time and pitch (make_map)."""

    def __init__(self, config: ModelConfig, table: Tensor):
        super().__init__()
        self.config, vocab_size = config, table.size(1)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("speeds", rotary_speeds(config.n_embd // config.n_head), persistent=False)
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        # A note is three tokens: with its neighbours in it, a token is worth attending to from the first layer on.
        self.recent = nn.Parameter(torch.zeros(RECENT, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Matrices that keep the size of what passes; what writes to the residual stream, and the head, start small."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for out in (module.attention.proj, module.contract):
                nn.init.normal_(out.weight, std=(2 * self.config.n_layer * out.in_features) ** -0.5)
        if isinstance(module, PianoGPT):
            nn.init.normal_(module.head.weight, std=0.1 * self.config.n_embd**-0.5)

    def turn(self, idx: Tensor) -> Tensor:
        """The cos and sin, (2, B, 1, T, hs), by which queries and keys of tokens idx (B, T) turn."""
        return torch.stack(rotary_angles(follow(self.table, idx)[0], 0, self.speeds))[:, :, None]

    def hidden(self, x: Tensor, turn: Tensor) -> Tensor:
        """Embedded tokens (B, T, C) and their turn -> what the head reads, (B, T, C)."""
        x = self.dropout(F.layer_norm(add_recent(x, self.recent), x.shape[-1:]))
        for block in self.blocks:
            x = block(x, *turn)
        return self.norm(x)

    def loss(self, x: Tensor, turn: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy, in nats, of embedded tokens (B, T, C) and the ids (B, T) that follow them."""
        logits = self.head(self.hidden(x, turn)).float().flatten(0, 1)  # (B T, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V), or with targets (B, T) the summed loss in nats."""
        x, turn = self.embedding(idx), self.turn(idx)
        return self.head(self.hidden(x, turn)) if targets is None else self.loss(x, turn, targets)


class Decoder:
    """A model that reads token after token and keeps their keys and values, so that a new token reads only itself.

    The arithmetic of PianoGPT.forward in as few operators and look-ups as it can be: for one token, starting an
    operator costs more than what it computes.
    """

    def __init__(self, model: PianoGPT, batch_size: int):
        c, weight = model.config, model.head.weight
        self.model, self.length = model, 0
        shape = (2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)  # keys, then values
        self.store = [torch.empty(shape, device=weight.device) for _ in model.blocks]
        self.layers = [
            (b.norm_1.weight, b.norm_1.bias, b.attention.qkv.weight, b.attention.proj.weight)
            + (b.norm_2.weight, b.norm_2.bias, b.expand.weight, b.contract.weight)
            for b in model.blocks
        ]
        # Of the recent tokens, oldest first, and of the token itself: (RECENT + 1, C).
        self.taps = torch.cat([model.recent.flip(0), torch.ones_like(model.recent[:1])])

    def read(self, idx: Tensor) -> Tensor:
        """idx (B, t), one token or, at the beginning, several -> the logits of the token that follows, (B, V)."""
        (B, t), start, end = idx.shape, self.length, self.length + idx.size(1)
        C, nh = self.model.config.n_embd, self.model.config.n_head
        assert (t == 1 or start == 0) and end <= self.model.config.block_size, (t, start, end)
        self.length = end
        place, self.state = follow(self.model.table, idx, self.state if start else None)
        cos, sin = (x[:, :, None] for x in rotary_angles(place, start, self.model.speeds))  # 2 x (B, t, 1, hs)
        x = F.embedding(idx, self.model.embedding.weight)  # (B, t, C)
        seen = torch.cat([self.recent, x], 1) if start else F.pad(x, (0, 0, RECENT, 0))
        self.recent = seen[:, -RECENT:]
        x = (seen * self.taps).sum(1) if start else add_recent(x, self.model.recent).view(-1, C)  # (B t, C)
        x = F.layer_norm(x, (C,))
        for store, (w_1, b_1, qkv, proj, w_2, b_2, expand, contract) in zip(self.store, self.layers):
            h = F.linear(torch.layer_norm(x, (C,), w_1, b_1), qkv).view(B, t, 3 * nh, C // nh)
            qk, v = h.split_with_sizes([2 * nh, nh], 2)
            qk = torch.addcmul(qk * cos, qk.roll(C // nh // 2, -1), sin)  # rotate()
            q, k = qk.view(B, t, 2, nh, -1).permute(2, 0, 3, 1, 4).unbind()  # 2 x (B, nh, t, hs)
            store[0, :, :, start:end], store[1, :, :, start:end] = k, v.transpose(1, 2)
            k, v = store[:, :, :, :end].unbind()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
            x = torch.addmm(x, y.transpose(1, 2).reshape(-1, C), proj.t())
            h, gate = F.linear(torch.layer_norm(x, (C,), w_2, b_2), expand).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate).mul_(h), contract.t())
        x = F.layer_norm(x.view(B, t, C)[:, -1], (C,), self.model.norm.weight, self.model.norm.bias)
        return F.linear(x, self.model.head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Checkpoint: the one file that is the model. The only torch.save and torch.load are here.
# ---------------------------------------------------------------------------------------------------------------------

FORMAT = "pianogpt 3"


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint: plain values, lists, dicts and tensors; the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save({"format": FORMAT, **content}, file)
    write_atomically(path, file.getvalue())


def load_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote, on the CPU; nothing in the file can run. Raises UserError for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train one first, or pass --checkpoint") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise UserError(
            f"{path} is damaged or no PianoGPT checkpoint ({type(e).__name__}): pass another --checkpoint"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this version of PianoGPT: pass another --checkpoint, or train anew")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# 6. Training: optimizer, schedule, evaluation, the loop.
# ---------------------------------------------------------------------------------------------------------------------

LR_WIDTH = 1024  # a matrix that reads so many numbers learns at --lr
# Times --lr: the embedding, what is left, and the blocks' matrices under Muon.
EMBEDDING_RATE, REST_RATE, MUON_RATE = 80, 30, 64
SAVE_SECONDS = 120  # the most training that a crash can cost
TIMED_STEPS = 20  # after the first, which may compile, these tell how long the run will take


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate at a step as a share of the peak: a line up to it, then a line down to nothing."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 1 - (step - config.warmup) / max(1, config.steps - config.warmup)


def orthogonal(matrices: Tensor) -> Tensor:
    """matrices (n, r, c) with their singular values moved near 1, by the Newton-Schulz steps of Jordan et al."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, is the step of a matrix: no direction in it is neglected (Jordan et al.).

    torch.optim.Muon works in bfloat16 and matrix by matrix: twenty times as long on a processor that has no bfloat16.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix, those of one shape together."""
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                same = [p for p in group["params"] if p.shape == shape]
                for p in same:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                step = orthogonal(torch.stack([p.grad.lerp(self.state[p]["momentum"], 0.95) for p in same]))
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, step.unbind(), alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def make_optimizers(model: PianoGPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest; only matrices decay.

    Under AdamW a matrix that reads n numbers learns at lr x 1024 / n, so one lr suits every width (Yang et al.); Muon's
    step does not depend on it.
    """
    muon, inside = config.optimizer == "muon", [p for p in model.blocks.parameters() if p.dim() == 2]
    matrices = [model.head.weight] if muon else [*inside, model.head.weight]
    groups = [
        {
            "params": [p for p in matrices if p.size(1) == n],
            "peak": config.lr * LR_WIDTH / n,
            "weight_decay": config.weight_decay,
            "what": f"matrices that read {n}",
        }
        for n in sorted({p.size(1) for p in matrices})
    ]
    rest = [model.recent, *(p for p in model.parameters() if p.dim() == 1)]
    for params, rate, what in (([model.embedding.weight], EMBEDDING_RATE, "embedding"), (rest, REST_RATE, "the rest")):
        groups.append({"params": params, "peak": rate * config.lr, "weight_decay": 0.0, "what": what})
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)]
    if muon:
        group = {"params": inside, "peak": MUON_RATE * config.lr, "weight_decay": config.weight_decay, "what": "Muon"}
        optimizers.append(Muon([group], {}))
    return optimizers


@torch.no_grad()
def evaluate(model: PianoGPT, windows: tuple[Tensor, Tensor], batch_size: int = 32) -> float:
    """The summed loss, in nats, of windows (W, T) of inputs and targets; in float32, whatever the training is in."""
    device, was_training = model.head.weight.device, model.training
    model.eval()
    parts = zip(*(w.to(device).split(batch_size) for w in windows))
    # The class's loss, not the compiled one of a model in training: that would be built again for these shapes.
    total = sum(PianoGPT.loss(model, model.embedding(x), model.turn(x), y).item() for x, y in parts)
    model.train(was_training)
    return total


def sum_over_processes(value: float, device: torch.device) -> float:
    """The sum of what every process of this run passes; the value itself where there is only one."""
    if not distributed.is_initialized():
        return value
    total = torch.tensor([value], dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()


class Trainer:
    """A model in training: everything that changes from step to step, and so everything a checkpoint must hold."""

    KEPT = ("step", "seconds", "history", "loss_sum", "loss_count", "best_loss", "best")

    def __init__(self, model: PianoGPT, config: TrainConfig, bfloat16: bool = False, compiled: bool = False):
        self.model, self.config, self.bfloat16 = model, config, bfloat16
        self.device = model.head.weight.device
        if compiled:
            # The look-up in the embedding stays out: its compiled backward adds in an order that changes with each run.
            model.loss = torch.compile(model.loss)
        self.parallel = nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
        self.optimizers = make_optimizers(model, config)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict] = []  # a row for each validation
        self.loss_sum, self.loss_count = 0.0, 0  # nats and steps since the last validation
        self.best_loss, self.best = math.inf, self.weights()

    @property
    def groups(self) -> list[dict]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's weights on the CPU."""
        return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def state(self) -> dict:
        """All of the trainer that is not configuration, for load_state."""
        kept = {k: getattr(self, k) for k in self.KEPT}
        return {**kept, "weights": self.weights(), "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state(self, state: dict) -> None:
        """Go on where another trainer's state() left off; the bits of the next step are the same."""
        for key in self.KEPT:
            setattr(self, key, state[key])
        self.model.load_state_dict(state["weights"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of one batch (B, T), compiled if that works here."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            try:
                return self.parallel(idx, targets) / targets.numel()
            except torch._dynamo.exc.TorchDynamoException as e:
                say(f"torch.compile does not work here ({type(e).__name__}), so training goes on without it")
                del self.model.loss  # the compiled one, which hides the method
                return self.parallel(idx, targets) / targets.numel()

    def add_gradients(self, idx: Tensor, targets: Tensor) -> float:
        """Leave the gradient of a batch (B, T) in the parameters; the mean loss over all processes."""
        parts, total = self.config.accumulate, 0.0
        for n, (x, y) in enumerate(zip(idx.chunk(parts), targets.chunk(parts)), 1):
            wait = n < parts and self.parallel is not self.model
            with self.parallel.no_sync() if wait else contextlib.nullcontext():
                loss = self.loss(x, y) / parts
                loss.backward()
            total += loss.item()
        return sum_over_processes(total, self.device) / sum_over_processes(1, self.device)

    def train_step(self, idx: Tensor, targets: Tensor, rank: int = 0) -> float:
        """Learn from one batch (B, T); the mean loss in nats."""
        # Dropout is seeded by the step, so a resumed run drops what the uninterrupted one would have.
        torch.manual_seed((self.config.seed << 32) + (rank << 26) + self.step)
        share = learning_rate(self.step, self.config)
        for group in self.groups:
            group["lr"] = group["peak"] * share
        loss = self.add_gradients(idx, targets)
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {self.step}: train with a smaller --lr; the last good checkpoint stays"
            )
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        return loss

    def validate(self, windows: tuple[Tensor, Tensor], batches: Batches) -> None:
        """Add a row to the history, and keep the weights if they are the best so far on windows (W, T)."""
        row = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.step * batches.batch_size * batches.block_size,
        }
        row |= {
            "lr": self.config.lr * learning_rate(self.step - 1, self.config),
            "train_loss": self.loss_sum / max(1, self.loss_count),
        }
        row |= {"val_loss": None, "val_nats_per_note": None}
        self.loss_sum, self.loss_count = 0.0, 0
        if len(windows[0]):
            total, targets = evaluate(self.model, windows), windows[1]
            notes = is_pitch(targets, batches.pitches).sum().item()
            row |= {"val_loss": total / (targets != IGNORE).sum().item(), "val_nats_per_note": total / max(1, notes)}
        if row["val_loss"] is None or row["val_loss"] < self.best_loss:
            self.best_loss, self.best = row["val_loss"] or math.inf, self.weights()
        self.history.append(row)

    def run(self, batches: Batches, windows: tuple[Tensor, Tensor], stopped, save, sample) -> None:
        """Train to the last step, or until stopped() in any process; save() and sample() are called now and then."""
        self.model.train()
        first, start = self.step, time.monotonic()
        before, saved, timed = start - self.seconds, start, start
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        bar = progress(total=self.config.steps, initial=self.step, desc="training", bar_format=layout, position=0)
        while self.step < self.config.steps and not sum_over_processes(stopped(), self.device):
            loss = self.train_step(*batches[self.step], rank=batches.rank)
            self.seconds = time.monotonic() - before
            if self.step == first + TIMED_STEPS:
                left = (self.config.steps - self.step) * (time.monotonic() - timed) / (TIMED_STEPS - 1)
                say(f"time: about {left / 60:.1f} minutes to step {self.config.steps}; Ctrl-C stops and loses nothing")
            timed = time.monotonic() if self.step == first + 1 else timed
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self.validate(windows, batches)
            rate = (self.step - first) / (time.monotonic() - start) * batches.batch_size * batches.block_size
            val = self.history[-1]["val_loss"] if self.history else None
            heard = f"val {val:.3f}, " if val is not None else ""
            bar.set_postfix_str(f"loss {loss:.3f}, {heard}{rate:,.0f} tok/s", refresh=False)
            bar.update()
            every = self.config.save_every
            if self.step % every == 0 if every else time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if self.config.sample_every and self.step % self.config.sample_every == 0:
                sample()
                self.model.train()
        bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# 7. Sampling: logits -> the next id -> a sequence. It sees ids and a mask only.
# ---------------------------------------------------------------------------------------------------------------------


def filter_logits(logits: Tensor, config: SampleConfig) -> Tensor:
    """logits (B, V), already masked, divided by the temperature and minus infinity where a filter drops the token."""
    logits = logits / config.temperature
    if config.min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(config.min_p), -math.inf)
    if 0 < config.top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -math.inf)
    if 0 < config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= config.top_p  # the token that crosses top_p is kept, so one always is
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
    return logits


def draw(logits: Tensor, config: SampleConfig, random: torch.Generator) -> Tensor:
    """The next ids (B,), drawn from masked logits (B, V)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    reached = filter_logits(logits, config).softmax(-1).cumsum(-1)  # (B, V)
    # The first token whose cumulative probability reaches a number above 0 and up to the total is never an illegal one.
    u = 1 - torch.rand(len(logits), 1, generator=random, device=logits.device)
    return torch.searchsorted(reached, u * reached[:, -1:])[:, 0]


@torch.inference_mode()
def draw_tokens(model: PianoGPT, grammar: Grammar, config: SampleConfig, ids: Tensor, seed: int, wait: Tensor | float):
    """Yield the ids (B,) that follow ids (B, T), one token of every sequence at a time, without end.

    wait (B,) is minus infinity where a sequence may not end yet, else 0; it may be changed between two tokens.
    """
    device, size = ids.device, model.config.block_size
    rows = torch.from_numpy(grammar.rows).to(device)  # (R, V)
    update = torch.from_numpy(grammar.update).to(device)  # (V, 4)
    state = torch.from_numpy(grammar.start).to(device).repeat(len(ids), 1)  # (B, 4)
    random = torch.Generator(device).manual_seed(seed)
    decoder = Decoder(model, len(ids))
    recent = list(ids.unbind(1))
    for id in recent[1:]:
        state = torch.where(update[id] < 0, state, update[id])
    while True:
        if decoder.length in (0, size):
            # The window is full: read its newer half again, as a window from its start, which training showed.
            recent = recent[-(size // 2 if decoder.length else size) :]
            decoder.length = 0
            logits = decoder.read(torch.stack(recent, 1))
        else:
            logits = decoder.read(recent[-1][:, None])
        logits = logits + rows[state].sum(1)
        logits[:, grammar.eos] += wait
        id = draw(logits, config, random)
        moved = update[id]
        state = torch.where(moved < 0, state, moved)
        recent.append(id)
        yield id


LEAST_BARS, MOST_BARS = 8, 32  # in which the model ends a piece of no asked-for length, without the prompt


def generate(
    model: PianoGPT, grammar: Grammar, config: SampleConfig, seed: int, prompt: list[int], clocks: list
) -> list[list[int]]:
    """A piece for each of the clocks, drawn together after BOS and the prompt; a clock says when its piece is over.

    A clock is fed the ids of its piece; `over` tells that it has heard enough, `kept` how many of the ids belong to it.
    """
    ids = torch.tensor([[grammar.bos, *prompt]] * len(clocks), device=model.head.weight.device)
    pieces = [list(prompt) for _ in clocks]
    drawn: list[Tensor] = []
    for clock in clocks:
        clock.feed(prompt)
    begun = len(clocks[0].lines)
    wait = torch.full((len(clocks),), -math.inf, device=ids.device)
    model.eval()
    stream = draw_tokens(model, grammar, config, ids, seed, wait)
    for id in progress(stream, desc="writing", unit="token", unit_scale=len(ids), leave=False, position=0):
        drawn.append(id)
        if len(drawn) == 16:  # looking at every token would make a GPU wait
            for piece, clock, new in zip(pieces, clocks, torch.stack(drawn, 1).tolist()):
                piece += new
                clock.feed(new)
            drawn = []
            if not (config.bars or config.seconds):  # a piece of an asked-for length ends there, not before
                wait[[len(clock.lines) >= begun + LEAST_BARS for clock in clocks]] = 0
            if all(clock.over for clock in clocks):
                return [piece[: clock.kept] for piece, clock in zip(pieces, clocks)]


# ---------------------------------------------------------------------------------------------------------------------
# 8. Command line: parse, choose the device, call, print.
# ---------------------------------------------------------------------------------------------------------------------


COMPILE_STEPS = 3000  # compiling takes up to a minute and saves about a fifth of a step


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message}; python pianogpt.py --help lists the flags")


EXAMPLES = """examples:
  python pianogpt.py --midi-dir ~/Music/midi --checkpoint mine.pt --steps 5000
  python pianogpt.py --generate --checkpoint mine.pt --num-samples 10 --bars 64 --wav --plot
  python pianogpt.py --generate --prompt song.mid --prompt-bars 4 --bars 32
  python pianogpt.py --download maestro --midi-dir maestro --checkpoint maestro.pt --steps 20000 --sample-every 1000
  python pianogpt.py --n-layer 6 --n-embd 256 --n-head 8 --block-size 512 --optimizer muon"""


def make_parser() -> Parser:
    """A flag for each field of the configuration; one that is not given leaves no trace."""
    parser = Parser(
        prog="pianogpt.py",
        usage="python pianogpt.py [flags]",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "miditok", "symusic"))
    parser.add_argument("--version", action="version", version=f"pianogpt {VERSION}, {versions}")
    for group in fields(Config):
        config = group.default_factory()
        section = parser.add_argument_group(f"{group.name}: {config.__doc__.rstrip('.').lower()}")
        for f in fields(config):
            flag, text, choices = "--" + f.name.replace("_", "-"), f.metadata["help"], f.metadata["choices"]
            if isinstance(f.default, bool):
                section.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
                continue
            text += f" (default: {f.default if f.default != '' else 'none'})"
            metavar = (
                "|".join(filter(None, choices)) if choices else {int: "N", float: "X", str: "TEXT"}[type(f.default)]
            )
            kind = {"type": type(f.default), "choices": choices, "metavar": metavar}
            section.add_argument(flag, **kind, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    return parser


# What may differ between the runs that train one checkpoint: how long, from where, and how often one looks.
MAY_CHANGE = {"steps", "eval_every", "save_every", "sample_every", "accumulate", "midi_dir", "cache_dir"}
STORED = ("data", "music", "model", "train")


def make_config(given: dict, checkpoint: dict | None, training: bool) -> Config:
    """The settings in force: what the command line says, else what the checkpoint says, else the defaults."""
    config = Config()
    for group in fields(config):
        settings = getattr(config, group.name)
        if checkpoint and group.name in STORED:
            for name, value in checkpoint["config"][group.name].items():
                setattr(settings, name, value)
        for f in fields(settings):
            if f.name not in given:
                continue
            fixed = (
                checkpoint
                and f.name not in MAY_CHANGE
                and (group.name in ("music", "model") or training and group.name in STORED)
            )
            if fixed and given[f.name] != getattr(settings, f.name):
                flag = "--" + f.name.replace("_", "-")
                raise UserError(
                    f"{flag} is {given[f.name]}, but the checkpoint was made with {getattr(settings, f.name)}: "
                    "leave the flag out, pass another --checkpoint, or start over with --fresh"
                )
            setattr(settings, f.name, given[f.name])
    check_options(config)
    return config


def choose_device(name: str) -> torch.device:
    """The device of a --device flag; auto is CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name} here: pass --device auto, or cpu") from None


def choose_speed(config: RunConfig, device: torch.device, steps: int) -> tuple[bool, bool]:
    """Whether to train in bfloat16, and whether to compile, on this device for so many steps."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        # Without instructions for it bfloat16 is slower than float32.
        known = [getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = device.type == "cpu" and any(check() for check in known)
    bfloat16 = fast if config.precision == "auto" else config.precision == "bfloat16"
    able = device.type == "cuda" or device.type == "cpu" and any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
    compiled = able and steps >= COMPILE_STEPS if config.compile == "auto" else config.compile == "on"
    return bfloat16, compiled


def load_tokenizer(checkpoint: dict | None, music: MusicConfig) -> miditok.REMI:
    """The tokenizer of these settings; with a checkpoint, only if its ids mean what they meant when it was made."""
    tokenizer = make_tokenizer(music)
    if checkpoint and checkpoint["vocabulary"] != make_vocabulary(tokenizer):
        raise UserError(
            "the checkpoint's vocabulary is not what this MidiTok makes of its settings: "
            "install the versions of requirements.txt"
        )
    return tokenizer


def print_reading(folder: str, pieces: list[Piece], skipped: dict[str, str]) -> None:
    """Say what was found, what was skipped and what was changed, by name and number."""
    if skipped:
        names = {why: ", ".join(n for n, w in skipped.items() if w == why) for why in skipped.values()}
        say(f"skipped: {len(skipped)} files: " + "; ".join(f"{files} ({why})" for why, files in names.items()))
    if not pieces:
        raise UserError(
            f"none of the {len(skipped)} MIDI files under {folder} holds music for a piano: try another --midi-dir"
        )
    works = {split: len({p.work for p in pieces if p.split == split}) for split in SPLITS}
    sides = ", ".join(f"{count} {split}" for split, count in works.items() if count)
    encoded = [p.encoded for p in pieces]
    hours, notes = sum(e.seconds for e in encoded) / 3600, sum(e.notes for e in encoded)
    say(
        f"music: {len(pieces)} files{f' of {sum(works.values())} works ({sides})' if sides else ''} under {folder}, "
        f"{hours:.1f} hours, {notes:,} notes, {sum(len(e.ids) for e in encoded):,} tokens"
    )
    changes = {change: sum(e.changes[change] for e in encoded) for change in encoded[0].changes}
    if any(changes.values()):
        say("changed: " + ", ".join(f"{count:,} {change}" for change, count in changes.items() if count))


def print_block(values: dict) -> None:
    """Print key: value lines that a script can read."""
    for key, value in values.items():
        say(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")


class StopSignal:
    """Within its with-block, true once Ctrl-C or SIGTERM came; the second Ctrl-C stops at once."""

    number = 0

    def __enter__(self) -> StopSignal:
        self.old = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame) -> None:
        """Remember the signal, and let the next Ctrl-C through."""
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.number != 0


def join_processes(device: str) -> tuple[str, int, int]:
    """Under torchrun, this process's device, its rank and how many there are; else the device alone."""
    if "RANK" not in os.environ:
        return device, 0, 1
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank:  # one process speaks for all; what goes wrong in another is still shown
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return device, rank, processes


def prepare_data(
    config: Config, tokenizer: miditok.REMI, device: torch.device, rank: int, processes: int
) -> tuple[Batches, tuple]:
    """Read the MIDI folder, say what is in it, and cut it into training batches and validation windows (W, T)."""
    data, model, train = config.data, config.model, config.train
    if train.batch_size % (processes * train.accumulate):
        raise UserError(
            f"--batch-size {train.batch_size} must be a multiple of {processes} processes x "
            f"--accumulate {train.accumulate}"
        )
    if rank:
        distributed.barrier()  # the first process reads the files; the others then find them in the cache
    elif config.run.download:
        fetch_collection(config.run.download, Path(data.midi_dir))
    pieces, skipped = read_folder(Path(data.midi_dir), config.music, data.cache_dir)
    if rank == 0 and processes > 1:
        distributed.barrier()
    grammar, pitches = make_grammar(tokenizer), pitch_range(tokenizer)
    split_pieces(pieces, Path(data.midi_dir), data, pitches)
    print_reading(data.midi_dir, pieces, skipped)
    ids = {split: join_pieces(pieces, split, grammar) for split in SPLITS}
    if not len(ids["train"]):
        raise UserError(f"no piece under {data.midi_dir} is left to train on: see which are held out above")
    if not len(ids["validation"]):
        say("no piece is held out, so there is no validation loss: the last weights will be used")
    train_ids = torch.from_numpy(ids["train"]).to(device)
    batches = Batches(
        train_ids, pitches, train.batch_size, model.block_size, data.transpose, train.seed, rank, processes
    )
    return batches, validation_windows(ids["validation"], model.block_size, limit=0 if rank else 128)


def write_log(path: Path, history: list[dict]) -> None:
    """Write the history as csv beside the checkpoint: all of it, so that no row is doubled or missing after a crash."""
    file = io.StringIO()
    if history:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_atomically(path.with_suffix(".csv"), file.getvalue().encode())


def save_or_say(path: Path, content: dict) -> bool:
    """Save a checkpoint and its log; False, with a sentence, if that fails: what was there before stays whole."""
    try:
        save_checkpoint(path, content)
        write_log(path, content["trainer"]["history"])
        return True
    except OSError as e:
        say(f"cannot save {path} ({e.strerror}): training goes on and tries again")
        return False


def save_at_the_end(path: Path, content: dict) -> None:
    """Save a checkpoint, in the system's folder for temporary files if nowhere else; that is an error of its own."""
    if not save_or_say(path, content):
        elsewhere = Path(tempfile.mkdtemp(prefix="pianogpt-"), path.name)
        save_checkpoint(elsewhere, content)
        raise UserError(f"{path} cannot be written, so the model is in {elsewhere}: move it before it is cleaned away")


def lock_checkpoint(path: Path) -> FileLock:
    """Hold a checkpoint for this run alone, until the lock is released or the process ends, however it ends."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        for name in (path.name, path.with_suffix(".csv").name):
            for stale in path.parent.glob(f"{glob.escape(name)}.*.tmp"):
                stale.unlink()  # of a run that was killed while it wrote
    except Timeout:
        raise UserError(f"another run is training {path}: wait for it, or pass another --checkpoint") from None
    except OSError as e:
        raise UserError(
            f"cannot write beside {path} ({e.strerror}): pass a --checkpoint in a folder of yours"
        ) from None
    return lock


def keep_old(path: Path) -> None:
    """Give an existing checkpoint a free name beside it, and say which."""
    if path.exists():
        new = free_path(path.parent, f"{path.stem}-old", path.suffix)
        path.replace(new)
        say(f"kept the old checkpoint as {new}")


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def print_model(trainer: Trainer, compiled: str, where: str) -> None:
    """Say what is trained, in which precision, where, at which rates and from which step on."""
    rates = ", ".join(f"{group['peak']:.2g} ({group['what']})" for group in trainer.groups)
    say(
        f"model: {parameters(trainer.model):,} parameters, {'bfloat16' if trainer.bfloat16 else 'float32'}, {compiled}"
        f"on {where}, learning rates up to {rates}" + f", going on from step {trainer.step}" * (trainer.step > 0)
    )


def run_training(config: Config, checkpoint: dict | None, rank: int, processes: int, device: torch.device) -> int:
    """Train to the last step and print the result; 0, or 128 + the number of the signal that stopped it."""
    path, tokenizer = Path(config.run.checkpoint), load_tokenizer(checkpoint, config.music)
    batches, windows = prepare_data(config, tokenizer, device, rank, processes)
    torch.manual_seed(config.train.seed)
    model = make_model(config.model, tokenizer).to(device)
    bfloat16, compiled = choose_speed(config.run, device, config.train.steps)  # of all steps: resuming changes nothing
    trainer = Trainer(model, config.train, bfloat16, compiled)
    music = hashlib.sha256(batches.ids.cpu().numpy().tobytes()).hexdigest()
    if checkpoint:
        trainer.load_state(checkpoint["trainer"])
        if checkpoint["music"] != music:
            say(f"the training music under {config.data.midi_dir} has changed since")
    elif config.run.fresh and rank == 0:
        keep_old(path)
    print_model(trainer, "compiled, " * compiled, f"{device}" + f" and {processes - 1} more" * (processes > 1))
    stored = {"config": {name: asdict(getattr(config, name)) for name in STORED}, "music": music}
    stored |= {"vocabulary": make_vocabulary(tokenizer), "tokenizer": tokenizer.config.to_dict()}
    first, start = trainer.step, time.monotonic()
    with StopSignal() as stop:
        trainer.run(
            batches,
            windows,
            stop,
            save=lambda: rank or save_or_say(path, stored | {"trainer": trainer.state()}),
            sample=lambda: rank or write_step_sample(config, trainer, tokenizer),
        )
        if rank == 0:
            save_at_the_end(path, stored | {"trainer": trainer.state()})
    if trainer.step < config.train.steps:
        say(
            f"stopped at step {trainer.step} of {config.train.steps} and saved {path}: "
            "the same command goes on from there"
        )
        return 128 + (stop.number or signal.SIGTERM)
    rate = (trainer.step - first) * batches.batch_size * batches.block_size / (time.monotonic() - start)
    print_result(trainer, {"tokens_per_second": round(rate), "parameters": parameters(model), "checkpoint": path})
    return 0


def write_step_sample(config: Config, trainer: Trainer, tokenizer: miditok.REMI) -> None:
    """Write eight bars as the model in training would, named by the step."""
    clock, grammar = BarClock(tokenizer, bars=8), make_grammar(tokenizer)
    ids = generate(trainer.model, grammar, replace(config.sample, bars=8), config.train.seed, [], [clock])[0]
    score = decode_ids(ids, tokenizer)
    if score.note_num():
        path = free_path(Path(config.sample.samples_dir), f"step-{trainer.step:06d}", ".mid")
        path.write_bytes(score.dumps_midi())
        say(f"step {trainer.step}: {score.note_num()} notes, {path}")


def print_result(trainer: Trainer, more: dict) -> None:
    """Print the last block of a training run; the validation loss is the best, that of the weights that are used."""
    last, nothing = trainer.history[-1], {"val_loss": math.nan, "val_nats_per_note": math.nan}
    best = min((r for r in trainer.history if r["val_loss"]), key=lambda r: r["val_loss"], default=nothing)
    values = {
        "steps": trainer.step,
        "tokens": last["tokens"],
        "seconds": trainer.seconds,
        "train_loss": last["train_loss"],
    }
    values |= {"val_loss": best["val_loss"], "val_nats_per_note": best["val_nats_per_note"], **more}
    order = "steps tokens seconds tokens_per_second train_loss val_loss val_nats_per_note parameters checkpoint".split()
    print_block({key: values[key] for key in order})


def make_model(config: ModelConfig, tokenizer: miditok.REMI) -> PianoGPT:
    """A new model for the ids of a tokenizer."""
    return PianoGPT(config, torch.from_numpy(make_map(tokenizer)))


def load_model(checkpoint: dict, config: Config, tokenizer: miditok.REMI, device: torch.device) -> PianoGPT:
    """The model of a checkpoint, with the weights that validated best."""
    model = make_model(config.model, tokenizer)
    model.load_state_dict(checkpoint["trainer"]["best"])
    return model.to(device).eval()


def known_music(config: Config, pitches: range) -> list[Piece]:
    """The pieces on which a checkpoint was trained and validated, or none where they are out of reach."""
    folder = Path(config.data.midi_dir)
    if not find_midi_files(folder):
        say(f"the training music in {folder} is not here, so how much of a piece is known from it cannot be said")
        return []
    pieces = read_folder(folder, config.music, config.data.cache_dir)[0]
    split_pieces(pieces, folder, config.data, pitches)
    return pieces


def generate_samples(
    config: Config, checkpoint: dict, device: torch.device, tokenizer: miditok.REMI
) -> list[tuple[list[int], int]]:
    """Generate the samples: the ids of each, and how many of them are the prompt's."""
    sample, grammar = config.sample, make_grammar(tokenizer)
    prompt = read_prompt(sample, tokenizer, config.music) if sample.prompt else []
    before = BarClock(tokenizer, tempo=sample.tempo).feed(prompt)
    before.end()
    if sample.bars and sample.bars <= len(before.lines) or sample.seconds and sample.seconds <= before.seconds:
        raise UserError(
            f"the prompt alone is {len(before.lines)} bars, {before.seconds:.1f} seconds: ask for a longer piece"
        )
    bars = sample.bars or (0 if sample.seconds else len(before.lines) + MOST_BARS)
    clocks = [BarClock(tokenizer, bars, sample.seconds, sample.tempo) for _ in range(sample.num_samples)]
    model = load_model(checkpoint, config, tokenizer, device)
    start = [*prompt, grammar.bar] if prompt else []  # the continuation begins with a bar of its own
    return [(ids, len(prompt)) for ids in generate(model, grammar, sample, config.train.seed, start, clocks)]


# The settings that decide the notes of a piece, besides the checkpoint, the seed and the prompt
WHAT_MAKES_A_PIECE = "num_samples prompt_bars prompt_seconds bars seconds tempo temperature top_k top_p min_p".split()


def run_generation(config: Config, checkpoint: dict, device: torch.device) -> None:
    """Write the samples, announce each, and report on them if asked."""
    tokenizer = load_tokenizer(checkpoint, config.music)
    grammar, pitches = make_grammar(tokenizer), pitch_range(tokenizer)
    step, steps = checkpoint["trainer"]["step"], checkpoint["config"]["train"]["steps"]
    if step < steps:
        say(f"{config.run.checkpoint} is trained for {step} of {steps} steps: python pianogpt.py would finish it")
    samples = generate_samples(config, checkpoint, device, tokenizer)
    music = known_music(config, pitches)
    known = (
        KnownRuns({p.path: pitches_of(p.encoded.ids, pitches) for p in music if p.split == "train"}) if music else None
    )
    rows, problems = [], {}  # problems: an ordered set
    for number, (ids, prompt) in enumerate(samples, 1):
        written = ids[prompt:] if config.sample.continuation_only else ids
        score = decode_ids(written, tokenizer, config.sample.tempo)
        if score.note_num():
            score.markers.append(symusic.TextMeta(0, origin(config, step, number)))
            path = free_path(Path(config.sample.samples_dir), "sample", ".mid")
            path.write_bytes(score.dumps_midi())
            figures = describe(score, written, grammar)
            rows.append(figures | novelty_of(ids[prompt:], pitches, known))
            say(describe_sample(written.count(grammar.bar), score, rows[-1], path))
            clocks = [BarClock(tokenizer, tempo=config.sample.tempo).feed(part) for part in (written, ids[:prompt])]
            clocks[1].end()
            bars = [seconds for _, _, seconds in clocks[0].lines]
            prompt_seconds = 0.0 if config.sample.continuation_only else clocks[1].seconds
            problems |= dict.fromkeys(play_and_draw(config.sample, path, score, bars, prompt_seconds))
    if config.sample.report and rows:
        print_report(rows, music, [len(ids) for ids, _ in samples], known, tokenizer)
    if len(rows) < len(samples):
        empty = f"{len(samples) - len(rows)} pieces had no notes: train longer, or try another --seed or --temperature"
        problems |= {empty: None}
    if problems:
        raise UserError("; ".join(problems))


def origin(config: Config, step: int, number: int) -> str:
    """What made a piece, for a text in its file: the same files for the same seed, so no folder and no time."""
    made = {k: v for k, v in asdict(config.sample).items() if k in WHAT_MAKES_A_PIECE}
    made |= {"prompt": Path(config.sample.prompt).name, "seed": config.train.seed, "piece": number, "step": step}
    return f"PianoGPT {VERSION} " + json.dumps(made)


def play_and_draw(sample: SampleConfig, path: Path, score: Score, bars: list[float], prompt: float) -> list[str]:
    """Write the .wav and the .png beside a piece's .mid where they are asked for; what went wrong, in sentences."""
    problems = []
    for wanted, suffix in ((sample.wav, ".wav"), (sample.plot, ".png")):
        try:
            if wanted and suffix == ".wav":
                soundfont = find_soundfont(sample.soundfont)
                write_wav(path.with_suffix(suffix), score, soundfont)
                say(f"  {path.with_suffix(suffix)}, played on {soundfont}")
            elif wanted:
                draw_piano_roll(path.with_suffix(suffix), score, bars, prompt)
                say(f"  {path.with_suffix(suffix)}")
        except Unusable as e:
            problems.append(f"no {suffix} was written: {e}")
    return problems


def novelty_of(ids: list[int], pitches: range, known: KnownRuns | None) -> dict:
    """The longest run of notes of a piece that is known from the training music, and from which file."""
    if known is None:
        return {}
    notes, name = known.longest(pitches_of(np.array(ids), pitches))
    return {"known_run_notes": notes, "known_from": name}


def describe_sample(bars: int, score: Score, row: dict, path: Path) -> str:
    """The line that announces a sample."""
    known = f"longest known run {row['known_run_notes']} notes ({row['known_from']}), " if "known_from" in row else ""
    return (
        f"sample: {bars} bars, {score.note_num()} notes, {score.to('second').end():.1f} seconds, "
        f"{row['notes_per_second']:.1f} notes/s, "
        f"pitches {row['lowest']}-{row['highest']}, {row['silence_percent']:.0f}% silence, {known}{path}"
    )


def openings(pieces: list[Piece], length: int, grammar: Grammar):
    """Yield the ids of the first bars, at most `length` ids, of up to 50 pieces."""
    for piece in pieces[:: -(-len(pieces) // 50) or 1]:
        ids = piece.encoded.ids.tolist()
        lines = [i for i, id in enumerate(ids) if id == grammar.bar and i <= length]
        yield ids[: lines[-1]] if len(ids) > length and len(lines) > 1 else ids


def distance(rows: list[dict], others: list[dict]) -> float:
    """How far the means of rows lie from those of others, in standard deviations of others; averaged over figures."""
    keys = [k for k in others[0] if not k.startswith("known")]
    ours, theirs = (np.array([[row[k] for k in keys] for row in x], float) for x in (rows, others))
    varies = theirs.std(0) > 0
    return float((np.abs(ours.mean(0) - theirs.mean(0))[varies] / theirs.std(0)[varies]).mean())


def print_report(
    rows: list[dict], music: list[Piece], lengths: list[int], known: KnownRuns | None, tokenizer: miditok.REMI
) -> None:
    """Print the mean of each figure over the samples and over as long openings of up to 50 pieces of each side."""
    grammar, pitches, length = make_grammar(tokenizer), pitch_range(tokenizer), int(np.median(lengths))
    columns = {"samples": rows, "train": [], "validation": []}
    for split in ("train", "validation"):
        for ids in openings([p for p in music if p.split == split], length, grammar):
            score = decode_ids(ids, tokenizer)
            if score.note_num():
                novelty = novelty_of(ids, pitches, known) if split == "validation" else {}
                columns[split].append(describe(score, ids, grammar) | novelty)
    say(f"{'mean of':26}" + "".join(f"{f'{len(c)} {name}':>16}" for name, c in columns.items()))
    table = {
        key: [np.mean([r[key] for r in c]) if c and key in c[0] else math.nan for c in columns.values()]
        for key in rows[0]
        if key != "known_from"
    }
    held_out = columns["validation"]
    if len(held_out) > 1:  # one piece alone deviates from nothing
        table["distance_from_validation"] = [distance(c, held_out) if c else math.nan for c in columns.values()]
    for key, values in table.items():
        say(f"{key:26}" + "".join(f"{'-' if math.isnan(v) else f'{v:.2f}':>16}" for v in values))


def run_evaluation(config: Config, checkpoint: dict, device: torch.device) -> None:
    """Print the loss of a checkpoint on every piece of a folder."""
    tokenizer = load_tokenizer(checkpoint, config.music)
    model, grammar = load_model(checkpoint, config, tokenizer, device), make_grammar(tokenizer)
    pieces, skipped = read_folder(Path(config.run.evaluate), config.music, config.data.cache_dir)
    print_reading(config.run.evaluate, pieces, skipped)
    loss, tokens, notes = 0.0, 0, 0
    for piece in progress(pieces, desc="evaluating", unit="piece"):
        ids = np.r_[grammar.bos, piece.encoded.ids, grammar.eos]
        loss += evaluate(model, sliding_windows(ids, config.model.block_size))
        tokens, notes = tokens + len(ids) - 1, notes + piece.encoded.notes
    perplexity = math.exp(loss / tokens)
    print_block(
        {
            "pieces": len(pieces),
            "tokens": tokens,
            "notes": notes,
            "nats_per_token": loss / tokens,
            "nats_per_note": loss / notes,
            "perplexity": perplexity,
        }
    )


def run(argv: list[str] | None) -> int:
    """Do what the command line asks; the exit code."""
    given = vars(make_parser().parse_args(argv))
    asked = make_config(given, None, training=False).run
    path, exists = Path(asked.checkpoint), Path(asked.checkpoint).exists()
    name, rank, processes = join_processes(asked.device)
    device = choose_device(name)
    checkpoint = load_checkpoint(path) if asked.evaluate or exists and not asked.fresh else None
    done = checkpoint["trainer"]["step"] if checkpoint else 0
    wanted = given.get("steps", checkpoint["config"]["train"]["steps"]) if checkpoint else 1
    train = not asked.evaluate and done < wanted and (not asked.generate or not checkpoint or "steps" in given)
    config = make_config(given, checkpoint, training=train)
    if asked.evaluate:
        run_evaluation(config, checkpoint, device)
        return 0
    if train:
        if asked.generate and config.sample.prompt:
            tokenizer = load_tokenizer(checkpoint, config.music)
            read_prompt(config.sample, tokenizer, config.music)  # what is wrong with it is said before the training
        with contextlib.nullcontext() if rank else lock_checkpoint(path):
            code = run_training(config, checkpoint, rank, processes, device)
        if code:
            return code
    elif not asked.generate:
        say(
            f"{path} has been trained for its {done} steps: pass a larger --steps to train further, "
            "or --fresh to start over"
        )
    if asked.generate and rank == 0:
        run_generation(config, load_checkpoint(path), device)
    if config.sample.plot and rank == 0:
        try:
            draw_losses(path.with_suffix(".png"), load_checkpoint(path)["trainer"]["history"])
        except Unusable as e:
            raise UserError(f"no {path.with_suffix('.png')} was drawn: {e}") from None
        say(f"losses: {path.with_suffix('.png')}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The program; 0, or 2 for what the user can mend, or 128 + a signal's number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        return run(argv)
    except UserError as e:
        print(f"pianogpt: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"pianogpt: {e.filename or 'a file'} cannot be used: {e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pianogpt: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
