"""PianoGPT: point it at a folder of MIDI files, and it learns to write piano music like theirs.

    python pianogpt.py                      train on my_midis/, or continue where the last run stopped
    python pianogpt.py --generate           write new music into samples/ (train first if nothing is trained)
    python pianogpt.py --generate --prompt X.mid --bars 32    continue a piece of yours
    python pianogpt.py --evaluate DIR       loss of the trained model on every MIDI file in DIR

In:   a folder of MIDI files, each read as one piano: drums dropped, tracks merged, the pedal folded in.
Out:  pianogpt.pt (the model), pianogpt.pt.csv (its log), samples/*.mid, .pianogpt-cache/.

The idea: music is written as tokens (REMI, made by MidiTok), a causal Transformer learns to predict the next
token, and drawing one token after another writes new music. This bar has 16 tokens:

    Bar  TimeSig_4/4                          a bar begins, with its time signature
    Position_0  Tempo_100.41  Chord_C:maj     on the first of its 96 positions, 24 per beat; tempo and harmony
    Pitch_60  Velocity_83  Duration_2.0.24    C4, rather loud, for 2 beats and 0/24
    Pitch_64  Velocity_83  Duration_2.0.24    E4 sounds with it: no Position lies between
    Position_48  Chord_F:maj                  two beats later, and the harmony changes
    Pitch_65  Velocity_67  Duration_1.0.24    F4, softer, for one beat

Part I, sections 1 to 5, is the idea; Part II is the machinery.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of size hs = C / nh, V tokens in the vocabulary.

The checkpoint, pianogpt.pt, is one dictionary of plain values and tensors:
    format       "pianogpt 10"; other formats are refused
    about        a note: what it started from, what it learned from
    config       the settings of the groups data, music, model and train
    vocabulary   the V tokens in the order of their ids; must be what this MidiTok makes
    folder       where the MIDI files were; files: "size name" of each, to see what has changed
    pieces       names of the training pieces; intervals: their melodic intervals, to find known runs
    trainer      step, seconds, history (a row per validation), losses since the last row, optimizer, weights,
                 average (of the weights), best (the average that validated best, used to generate; all that
                 --export leaves of the weights)

A resumed run equals an uninterrupted one bit for bit, on the same CPU, threads and precision: batch i is made
from (seed, i) alone, and all other state is in the checkpoint.

References: Huang & Yang 2020 (REMI), Fradet et al. 2021 (MidiTok), Vaswani et al. 2017 (the Transformer), Su
et al. 2021 (RoPE), Shazeer 2020 (SwiGLU), Yang et al. 2022 (learning rates), Jordan et al. 2024 (Muon).
"""

import argparse
import copy
import csv
import difflib
import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

try:
    import miditok
    import numpy as np
    import torch
    import torch.nn.functional as F
    from filelock import FileLock, Timeout
    from miditok.constants import SCORE_LOADING_EXCEPTION
    from symusic import KeySignature, Note, Score, Tempo, TextMeta, TimeSignature, Track
    from torch import Tensor, distributed as dist, nn
    from tqdm import tqdm
except ImportError as e:
    print(f"pianogpt: {e}: pip install -r requirements.txt, with Python 3.10 or newer", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    print("pianogpt: stopped", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class UserError(Exception):
    """A mistake of the user, and what to do; or, in a few words, why a file is skipped."""


def say(text, stream="stdout"):
    """Print one line above the progress bar, on rank 0."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)  # as in file names
    try:
        if RANK == 0:
            tqdm.write(text, file=getattr(sys, stream))
            getattr(sys, stream).flush()
    except OSError:  # nobody reads it, or a full disk
        setattr(sys, stream, open(os.devnull, "w"))


def count(n, noun):
    """A number with its noun: 1 file, 2 files."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def progress(*args, **more):
    """A tqdm bar; none when stderr is not a terminal."""
    return tqdm(*args, disable=True if RANK else None, **more)


# ==== Part I: the idea

# ---- 1. Settings: flags, --help and checkpoints all read these fields


def option(default, text, low=None, high=10**9, **more):
    """A field that becomes a flag; more: off: 0 is allowed; resumable: a later run may change it."""
    return field(default=default, metadata=dict(text=text, low=low, high=high, **more))


@dataclass
class RunConfig:
    """What to do, and where."""
    generate: bool = option(False, "write music (train first if there is no checkpoint)")
    evaluate: str = option("", "folder of MIDI files to measure the model on")
    checkpoint: str = option("pianogpt.pt", "file that holds the model")
    midi_dir: str = option("my_midis", "folder of MIDI files to train on, at any depth")
    cache_dir: str = option(".pianogpt-cache", "folder for tokenized files; empty: no cache")
    init_from: str = option("", "trained model to start from: its sizes and tokens, your music")
    export: str = option("", "file to write the best weights to, in 16 bits, to share")
    about: str = option("", "note to export with the weights: training music, license")
    fresh: bool = option(False, "start over; an existing checkpoint is renamed")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    float32: bool = option(False, "no bfloat16, even on a GPU that has it")
    compile: bool = option(False, "torch.compile the model: long runs train faster")


@dataclass
class SampleConfig:
    """The music that is written."""
    num_samples: int = option(3, "pieces to write", 1, 100_000)
    prompt: str = option("", "MIDI file to continue")
    prompt_bars: int = option(0, "bars of the prompt to use; 0: all of it", 0)
    continuation_only: bool = option(False, "leave the prompt out of the file")
    bars: int = option(0, "bars of the whole piece; 0: the model ends it after 8 to 24 new bars", 0)
    chords: str = option("", 'chords to follow, one per bar, over and over: "C Am F,G7 C"')
    tempo: float = option(0.0, "quarter notes per minute; 0: the model's choice", 4, 1000, off=True)
    temperature: float = option(0.85, "of pitches and chords; low is safe, 0: greedy", 0.01, 10, off=True)
    samples_dir: str = option("samples", "folder for the new files; nothing is overwritten")


@dataclass
class DataConfig:
    """The training music."""
    val_percent: float = option(10.0, "percent of the works (pieces, all recordings) held out", 0, 99)
    piece_is_folder: bool = option(False, "all files of one folder are one work")
    transpose: int = option(5, "transpose training music by up to N semitones at random", 0, 24)


@dataclass
class MusicConfig:
    """How music becomes tokens."""
    grid: int = option(24, "positions per beat; 24 holds triplets and 32nd notes exactly", 1, 48)
    velocities: int = option(32, "levels of loudness", 1, 127)


@dataclass
class ModelConfig:
    """The size of the Transformer."""
    n_layer: int = option(4, "layers", 1, 1000)
    n_head: int = option(4, "attention heads per layer", 1, 1000)
    n_embd: int = option(128, "channels", 2, 65_536)
    block_size: int = option(256, "context in tokens", 8, 65_536)


@dataclass
class TrainConfig:
    """How the model is trained."""
    steps: int = option(1500, "optimizer steps in total", 1, resumable=True)
    batch_size: int = option(8, "sequences per step", 1, 100_000)
    lr: float = option(3e-4, "peak learning rate at width 1536, scaled by fan-in", 0, 1, resumable=True)
    warmup: int = option(200, "steps of learning rate warmup", 0, resumable=True)
    weight_decay: float = option(0.5, "weight decay of the matrices; 0: off", 0)
    eval_every: int = option(250, "steps between validations", 1, resumable=True)
    save_every: int = option(0, "steps between checkpoints; 0: every two minutes", 0, resumable=True)
    accumulate: int = option(1, "split each batch into N parts to save memory", 1, resumable=True)
    seed: int = option(0, "random seed; --generate draws one if none is given", 0, 2**31 - 1)


@dataclass
class Options:
    """Every setting, in the groups of --help."""
    run: RunConfig = field(default_factory=RunConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    music: MusicConfig = field(default_factory=MusicConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def check_options(options):
    """Raise UserError for a setting that is out of its limits or contradicts another."""
    for config in vars(options).values():
        for f in fields(config):
            value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
            off = "0 or " if "off" in f.metadata else ""
            if low is not None and not (low <= value <= high or off and value == 0):
                raise UserError(f"{flag(f.name)} is {value} but must be {off}from {low:,} to {high:,}")
    if options.train.batch_size % (PROCESSES * options.train.accumulate):
        raise UserError(f"--batch-size must be a multiple of {PROCESSES} processes x --accumulate")
    if options.model.n_embd % (2 * options.model.n_head):
        raise UserError("--n-embd must be a multiple of 2 x --n-head")


# ---- 2. Music: one score read as one piano, and what every token id means

TIME_SIGNATURES = {4: (1, 12), 8: (1, 12), 16: (1, 12)}  # beat unit: least and most beats in a bar
LONGEST_NOTE = 12  # beats; lengths above 4 beats are on half the grid
TEMPO_RANGE, TEMPO_STEPS = (120 / 1.02**91, 120 * 1.02**47), 139  # 19.8 to 304, in steps of 2 %, with 120
PIANO, SUSTAIN = (21, 108), 64  # MIDI pitches of the outer keys; controller number
LONGEST_PEDAL, NEVER_LIFTED = 48, 16  # quarter notes; held longer, or longer and never lifted, it is ignored
QUALITIES = {  # of chords: the symbol after the root, semitones above the root
    "maj": ("", (0, 4, 7)), "min": ("m", (0, 3, 7)), "dim": ("dim", (0, 3, 6)), "aug": ("aug", (0, 4, 8)),
    "7dom": ("7", (0, 4, 7, 10)), "7maj": ("maj7", (0, 4, 7, 11)), "7min": ("m7", (0, 3, 7, 10)),
    "7halfdim": ("m7b5", (0, 3, 6, 10))}
ROOTS = "C C# D Eb E F F# G Ab A Bb B".split()
CHORDS = [root + symbol for symbol, _ in QUALITIES.values() for root in ROOTS] + ["N.C."]
CHORD_VECTORS = np.array([  # (chords, 12), length 1
    np.roll(np.isin(np.arange(12), above) / len(above) ** 0.5, root)
    for _, above in QUALITIES.values() for root in range(12)])
SYMBOLS = {
    letter + sign + symbol: 12 * number + (step + shift) % 12  # the index in CHORDS
    for number, (symbol, _) in enumerate(QUALITIES.values())
    for letter, step in zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11))
    for shift, sign in ((-1, "b"), (0, ""), (1, "#"))}
NO_CHORD, ROOT_IN_BASS, SEVENTH, CHORD_CHANGE = 0.75, 0.02, 0.08, 0.06  # see find_chords


def fold_pedal(parts, controls, tpq):
    """Let notes that end while the pedal is down ring until it is lifted; how many presses were too long.

    parts, controls: arrays of the tracks of one instrument; tpq: ticks per quarter note.
    """
    end = max((part["time"] + part["duration"]).max() for part in parts)
    times, steps = [], []
    for track in controls:  # Track.pedals is wrong: its first entry may start at tick 0
        is_pedal = track["number"] == SUSTAIN
        times.append(np.r_[track["time"][is_pedal], end])  # if still down, lifted at the end
        steps.append(np.diff(np.r_[False, track["value"][is_pedal] >= 64, False].astype(int)))
    order = np.argsort(np.concatenate(times), kind="stable")
    time, step = np.concatenate(times)[order], np.concatenate(steps)[order]  # 1: pressed, -1: lifted
    downs, ups = time[(step == 1) & (step.cumsum() == 1)], time[(step == -1) & (step.cumsum() == 0)]
    played = ups - downs <= tpq * np.where(ups == end, NEVER_LIFTED, LONGEST_PEDAL)
    downs, ups = np.r_[-1, downs[played]], np.r_[-1, ups[played]]
    for part in parts:
        ends = part["time"] + part["duration"]
        held = np.maximum(ends, ups[np.searchsorted(downs, ends) - 1])
        part["duration"] = (held - part["time"]).astype(np.int32)
    return int((~played).sum())


def take(notes, index):
    """Notes, a dictionary of arrays, at an index."""
    return {key: values[index] for key, values in notes.items()}


def merge_unisons(notes):
    """Notes by pitch, then time; a key struck twice at once: the loudest velocity, the longest length."""
    notes = take(notes, np.lexsort((notes["time"], notes["pitch"])))
    first = np.flatnonzero(np.r_[True, (np.diff(notes["pitch"]) > 0) | (np.diff(notes["time"]) > 0)])
    return take(notes, first) | {k: np.maximum.reduceat(notes[k], first) for k in ("velocity", "duration")}


def repair_overlaps(notes):
    """Notes by time and pitch; striking a key that still sounds ends its note."""
    notes = merge_unisons(notes)
    gap = np.where(np.diff(notes["pitch"]) == 0, np.diff(notes["time"]), np.iinfo(np.int32).max)
    notes["duration"][:-1] = np.minimum(notes["duration"][:-1], gap)
    return take(notes, np.lexsort((notes["pitch"], notes["time"])))


def make_piano(score):
    """A score as one piano track, and {change: how many}. Raises UserError."""
    tracks = [t for t in score.tracks if not t.is_drum]  # one without notes may still carry the pedal
    hands, too_long = [], 0
    for program in dict.fromkeys(t.program for t in tracks):  # tracks of one instrument share its pedal
        same = [t for t in tracks if t.program == program]
        parts = [t.notes.numpy() for t in same if t.note_num()]
        if parts:
            too_long += fold_pedal(parts, [t.controls.numpy() for t in same], score.tpq)
        hands += parts
    if not hands:
        raise UserError("only drums" if score.note_num() else "no notes")
    notes = {key: np.concatenate([hand[key] for hand in hands]) for key in hands[0]}
    struck, notes = len(notes["time"]), repair_overlaps(notes)
    piano, track = Score(score.tpq), Track(name="Piano", program=0)
    track.notes, piano.tempos = Note.from_numpy(**notes), score.tempos
    piano.tracks.append(track)
    for t in score.time_signatures:
        n = max(1, 4 // (t.denominator or 4))  # 2/2 is read as 4/4: both deserve the same grid
        piano.time_signatures.append(TimeSignature(t.time, n * t.numerator, n * t.denominator))
    return piano, {"notes struck together on one key merged": struck - len(notes["time"]),
                   "pedals held too long for a pianist ignored": too_long}


def find_chords(track, beats, tpq):
    """The harmony of each of n beats as an index in CHORDS; beats: n + 1 ticks.

    A beat is a vector: the square root of how long each pitch class sounds. A chord fits by its cosine with
    it, plus ROOT_IN_BASS if its root is lowest, minus SEVENTH if it has four notes; "N.C." scores NO_CHORD. A
    sequence scores the sum over its quarter notes, minus CHORD_CHANGE per change; Viterbi finds the best.
    """
    roll = track.pianoroll(modes=["frame"], encode_velocity=False)[0]  # (128, ticks): keys that are down
    classes = roll[:120].reshape(10, 12, -1).sum(0, dtype=np.uint8)  # (12, ticks): over all octaves
    sounding = np.add.reduceat(classes, beats[:-1], axis=1, dtype=int).T  # (n, 12)
    bass = np.maximum.reduceat(roll, beats[:-1], axis=1).argmax(0)
    fits = np.sqrt(sounding / np.maximum(1, sounding.sum(1, keepdims=True))) @ CHORD_VECTORS.T  # (n, chords)
    fits += ROOT_IN_BASS * (np.arange(len(CHORD_VECTORS)) % 12 == bass[:, None] % 12)
    fits -= SEVENTH * ((CHORD_VECTORS > 0).sum(1) == 4)
    fits = np.c_[fits, np.full(len(fits), NO_CHORD)] * sounding.any(1)[:, None]  # silence fits every chord
    fits *= np.diff(beats)[:, None] / tpq
    before, total = np.zeros(fits.shape, int), np.zeros(len(CHORDS))
    for i, fit in enumerate(fits):
        best = total.argmax()
        before[i] = np.where(total >= total[best] - CHORD_CHANGE, np.arange(len(total)), best)
        total = np.maximum(total, total[best] - CHORD_CHANGE) + fit
    path = itertools.accumulate(before[:0:-1], lambda i, row: row[i], initial=total.argmax())
    return np.array([*path])[::-1]


class Tokenizer(miditok.REMI):
    """REMI, with a Chord token at the first note of each bar and of each harmony."""

    def __init__(self, music):
        super().__init__(miditok.TokenizerConfig(
            pitch_range=PIANO, special_tokens=["PAD", "BOS", "EOS"], num_velocities=music.velocities,
            beat_res={(0, 4): music.grid, (4, LONGEST_NOTE): max(1, music.grid // 2)},
            use_chords=True, chord_tokens_with_root_note=True,
            chord_maps={quality: above for quality, (_, above) in QUALITIES.items()},
            use_tempos=True, num_tempos=TEMPO_STEPS, tempo_range=TEMPO_RANGE, log_tempos=True,
            delete_equal_successive_tempo_changes=True, use_time_signatures=True,
            time_signature_range=TIME_SIGNATURES, use_pitchdrum_tokens=False))
        self.config.use_chords = False  # now that it has the words: MidiTok's finder is slow

    def _create_chords_tokens(self):
        return [*super()._create_chords_tokens(), "Chord_none"]  # in the order of CHORDS

    def _create_track_events(self, track, ticks_per_beat, tpq, bars, beats, *rest):
        words, onsets = self._create_chords_tokens(), np.unique(track.notes.numpy()["time"])
        within = np.r_[np.array(beats)[np.array(beats) < track.end()], track.end()]
        bar, beat = (np.searchsorted(ticks, onsets, side="right") - 1 for ticks in (bars, within))
        chord = find_chords(track, within, tpq)[beat]
        new = np.r_[True, (np.diff(bar) > 0) | (np.diff(chord) != 0)]
        found = [miditok.Event("Chord", words[i][6:], tick) for i, tick in zip(chord[new], onsets[new])]
        return found + super()._create_track_events(track, ticks_per_beat, tpq, bars, beats, *rest)


def parse_chords(text):
    """Chord symbols, spaces between bars -> (bars, 12): index in CHORDS in each twelfth. Raises UserError."""
    twelfths = []
    for bar in text.split():
        symbols = bar.split(",")
        for symbol in symbols:
            if symbol not in SYMBOLS or 12 % len(symbols):
                raise UserError(f'--chords: cannot read "{symbol}" in "{bar}": write C, Am, F#dim, Eaug, '
                                "Bb7, Cmaj7, Dm7 or Bm7b5; F,G7 is half a bar each")
            twelfths += [SYMBOLS[symbol]] * (12 // len(symbols))
    return np.array(twelfths, int).reshape(-1, 12)


def is_in(ids, span):
    """Which of ids, an array or tensor, are in a slice of the vocabulary."""
    return (ids >= span.start) & (ids < span.stop)


KIND, POSITION, BAR_LENGTH, UNIT, TEMPO, PITCH, CHORD = range(7)  # the rows of Vocabulary.says
FOLLOWS = {  # the kinds of token that may follow a kind
    "PAD": "PAD", "BOS": "Bar", "EOS": "PAD", "Bar": "TimeSig", "TimeSig": "Position Bar",
    "Position": "Tempo Chord Pitch", "Tempo": "Chord Pitch Position Bar EOS", "Chord": "Pitch",
    "Pitch": "Velocity", "Velocity": "Duration", "Duration": "Pitch Position Bar EOS"}
KINDS = list(FOLLOWS)
BOS, BAR, TIME_SIGNATURE, DURATION = map(KINDS.index, ("BOS", "Bar", "TimeSig", "Duration"))  # in row KIND


def advance(says, idx, before):
    """(7, B, T): the state of the music after each of tokens idx (B, T), from state `before` (7, B)."""
    if idx.size(1) == 1:  # in a third of the operators
        said = says.index_select(1, idx[:, 0])
        return torch.where(said < 0, before, said)[:, :, None]
    said = torch.cat([before[:, :, None], says[:, idx]], 2)  # (7, B, T + 1)
    at = torch.arange(said.size(2), device=idx.device)
    latest = torch.where(said < 0, 0, at).cummax(2).values  # the last token that said something
    return said.gather(2, latest)[:, :, 1:]


class Vocabulary:
    """What every id means: its word, what it says of the music, which ids may follow it.

    The rows of says (7, V): kind of token, position in the bar, positions in a bar, beat unit (8: an eighth),
    quarter notes per minute, MIDI pitch (of a chord, its root), id of the chord (0 in a new bar); -1: says
    nothing, the last value stays. PAD, id 0, says what holds at first: 4/4 at 120, middle C, no chord.
    """

    def __init__(self, music):
        self.music, self.tokenizer = music, Tokenizer(music)
        ids = self.tokenizer.vocab
        self.words = sorted(ids, key=ids.get)
        self.bos, self.eos, self.bar = (ids[f"{kind}_None"] for kind in KINDS[1:4])
        of_types = map(self.tokenizer.token_ids_of_type, ("Pitch", "Position", "Chord"))
        self.pitches, positions, self.harmonies = (slice(min(of), max(of) + 1) for of in of_types)
        self.positions = slice(positions.start + 1, positions.stop)  # all but the first
        self.chords = slice(self.harmonies.start, self.harmonies.stop - 1)  # 12 roots of each quality
        self.says = torch.tensor([self.meaning(*word.split("_")) for word in self.words]).T.contiguous()
        follows = torch.tensor([[after in FOLLOWS[before].split() for after in KINDS] for before in KINDS])
        self.follows = follows[:, self.says[KIND].long()]  # (kinds, V)
        self.follows[:, positions.start] = torch.arange(len(KINDS)) == TIME_SIGNATURE  # only after TimeSig

    def meaning(self, kind, value):
        """The seven numbers of one token."""
        said, grid = [KINDS.index(kind), -1.0, -1, -1, -1, -1, -1], self.music.grid
        if kind == "PAD":
            said[POSITION:] = 0, 4 * grid, 4, 120, 60, 0
        elif kind == "Bar":
            said[POSITION] = said[CHORD] = 0
        elif kind == "Chord":
            i = said[CHORD] = self.tokenizer.vocab[f"Chord_{value}"]
            said[PITCH] = 48 + (i - self.chords.start) % 12 if i < self.chords.stop else -1
        elif kind == "TimeSig":
            beats, said[UNIT] = map(int, value.split("/"))
            said[BAR_LENGTH] = beats * grid
        elif kind in ("Position", "Tempo", "Pitch"):
            said[{"Position": POSITION, "Tempo": TEMPO, "Pitch": PITCH}[kind]] = float(value)
        return said

    def legal(self, now, wanted=None):
        """(B, V) bool: the ids that keep REMI's rules where now (7, B) holds.

        Kinds follow as in FOLLOWS, positions go forward, simultaneous notes from low to high. If chords are
        wanted, ids (B,), they are written before the next note, and no others.
        """
        kind, position, length, _, _, pitch, chord = now[:, :, None].unbind()  # (B, 1) each
        at, height = self.says[POSITION, self.positions], self.says[PITCH, self.pitches]
        legal = self.follows.index_select(0, kind[:, 0].long())
        legal[:, self.positions].logical_and_((at > position) & (at < length))
        legal[:, self.pitches].logical_and_(height > pitch * (kind == DURATION))  # after a note a higher one
        if wanted is not None:
            due, said = chord != wanted[:, None], self.says[CHORD, self.harmonies]
            legal[:, self.pitches].logical_and_(~due)
            legal[:, self.harmonies].logical_and_(due & (said == wanted[:, None]))
        return legal

    def tempo_id(self, tempo):
        """The id of the Tempo token nearest to a tempo."""
        return self.tokenizer.vocab[f"Tempo_{min(self.tokenizer.tempos, key=lambda t: abs(t - tempo))}"]

    def timeline(self, ids):
        """The state (7, T) after each of ids (T,), and its time in quarter notes (T,)."""
        now = advance(self.says, ids[None], self.says[:, :1])[:, 0].double()
        bars = ((now[KIND] == BAR) * now[BAR_LENGTH] / now[UNIT]).cumsum(0)
        quarters = 4 * (bars + now[POSITION] / now[UNIT]) / self.music.grid
        return now, quarters - quarters[:1]

    def bar_lines(self, ids):
        """Where ids (T,) have their n Bar tokens, and the n + 1 bar lines in quarter notes."""
        now, quarters = self.timeline(torch.cat([ids, ids.new_tensor([self.bar])]))
        at = (now[KIND] == BAR).nonzero()[:, 0]
        return at[:-1], quarters[at] - quarters[at[0]]

    def quantize(self, piano):
        """A one-track score on the grid, as the tokens can represent it. Raises UserError."""
        piano = self.tokenizer.preprocess_score(piano)
        if not piano.tracks:
            raise UserError("no notes within the range of a piano")
        notes = merge_unisons(piano.tracks[0].notes.numpy())  # the grid can merge two strikes of one key
        notes = take(notes, np.lexsort((notes["pitch"], notes["time"])))  # MidiTok orders a chord by length
        piano.tracks[0].notes = Note.from_numpy(**notes)
        return piano

    def encode(self, piano):
        """The ids of a quantized score, without BOS and EOS; simultaneous notes from low to high."""
        return self.tokenizer.encode(piano, no_preprocess_score=True)[0].ids

    def decode(self, ids, tempo=0.0):
        """The score of ids; no note sounds past the last bar, unless ids end with EOS."""
        end = round(self.bar_lines(torch.tensor(ids))[1][-1].item() * 480)
        score = self.tokenizer.decode([ids]).resample(480, min_dur=1)
        for track in score.tracks:
            track.name, notes = "Piano", repair_overlaps(track.notes.numpy())
            if ids[-1] != self.eos:
                notes["duration"] = np.minimum(notes["duration"], end - notes["time"])
            track.notes = Note.from_numpy(**notes)
        said = [Tempo(t.time, self.says[TEMPO, self.tempo_id(t.qpm)].item()) for t in score.tempos]
        score.tempos = [Tempo(0, tempo)] if tempo else said
        return score


# ---- 3. Model: a causal Transformer in musical time and pitch

TOKEN_TIME = 0.0125  # beats that each token adds to time, so that no two coincide
PITCH_PERIODS = (12, 6, 4, 24, 48, 96)  # semitones a turn
RECENT = 3  # preceding tokens that are mixed into each embedding
MEMORY = 1024  # tokens before the window: how often each occurs tells the key, the range, the pace
IGNORE = -100  # a target that is not scored: padding, or scored in the window before


def place(says, idx, now, bar_start):
    """Time, in positions, and pitch of tokens idx (B, T); then `now` (7, B) and bar_start (B,) after them."""
    after = advance(says, idx, now)  # (7, B, T)
    starts = bar_start[:, None] + ((after[KIND] == BAR) * after[BAR_LENGTH]).cumsum(1)  # (B, T)
    return starts + after[POSITION], after[PITCH], after[:, :, -1], starts[:, -1]


def rotary_speeds(hs, grid):
    """(2, hs): radians per position of time and per semitone; the first half of hs negated, for the sine.

    RoPE: the dot product of two rotated vectors depends only on their offset, in text a number of tokens.
    Here it is what one hears, time and interval, so a head can look one bar back or an octave down. Channels
    i and i + hs / 2 rotate as a pair. By default:

        pairs 0 to 9      time     one turn in pi / 4 beats, ..., in 3,100 beats
        pairs 10 to 15    pitch    one turn in 12, 6, 4, 24, 48, 96 semitones: the first three ignore octaves
    """
    by_pitch = 2 * math.pi / torch.tensor(PITCH_PERIODS[: hs // 4])
    pairs = hs // 2 - len(by_pitch)
    by_time = 8 / grid * 10_000.0 ** -(torch.arange(pairs) / pairs)
    speeds = torch.stack([F.pad(by_time, (0, len(by_pitch))), F.pad(by_pitch, (pairs, 0))])  # (2, hs / 2)
    return torch.cat([-speeds, speeds], 1)


def matrix(rows, columns, scale=1.0):
    """Random weights that keep the size of the vectors they multiply, times `scale`."""
    return nn.Parameter(torch.randn(rows, columns) * scale * columns**-0.5)


class Block(nn.Module):
    """One layer: attention, then a SwiGLU feed-forward network, each with a residual."""

    def __init__(self, config):
        super().__init__()
        self.n_head, C = config.n_head, config.n_embd
        inner = 16 * max(1, round(C / 6))  # 8/3 C: as many weights as 4 C without a gate
        small = (2 * config.n_layer) ** -0.5  # so that the sum over all layers keeps its size
        self.norm_1, self.norm_2 = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        self.qkv, self.proj = matrix(3 * C, C), matrix(C, C, small)
        self.expand, self.contract = matrix(2 * inner, C), matrix(C, inner, small)
        vars(self).update(self._parameters)  # nn.Module is slow to find them

    def attention(self, x, cos, sin, past, n_past):
        """Causal attention, also to past tokens: x (B T, C) -> what the heads read, (B T, C)."""
        B, T, C = cos.size(0), cos.size(2), x.size(1)
        qkv = F.linear(x, self.qkv).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        qk, v = qkv[:2], qkv[2]
        q, k = torch.addcmul(qk * cos, qk.roll(qk.size(-1) // 2, -1), sin)  # rotated; each (B, nh, T, hs)
        if past is not None:
            past = past[:, :, :, : n_past + T]
            past[0, :, :, n_past:], past[1, :, :, n_past:] = k, v
            k, v = past.unbind()  # 2 x (B, nh, n_past + T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, nh, T, hs)
        return y.transpose(1, 2).reshape(B * T, C)

    def add(self, x, y, weight):
        """The residual connection: x plus y times a matrix."""
        if y.dtype != x.dtype:  # autocast
            return x + F.linear(y, weight)  # the sum stays in float32
        return torch.addmm(x, y, weight.mT)  # the same, faster

    def forward(self, x, cos, sin, past=None, n_past=0):
        """x (B T, C) -> (B T, C); past (2, B, nh, block, hs): keys, values of n_past tokens, to extend."""
        y = torch.layer_norm(x, x.shape[-1:], self.norm_1)
        x = self.add(x, self.attention(y, cos, sin, past, n_past), self.proj)
        y = torch.layer_norm(x, x.shape[-1:], self.norm_2)
        hidden, gate = F.linear(y, self.expand).chunk(2, -1)  # each (B T, 8/3 C)
        return self.add(x, hidden * F.silu(gate), self.contract)


class PianoGPT(nn.Module):
    """Ids in, logits of the next id out; says (7, V): see Vocabulary."""

    def __init__(self, config, says):
        super().__init__()
        self.config, C, V = config, config.n_embd, says.size(1)
        grid = says[BAR_LENGTH, 0].item() / 4  # positions per beat
        self.register_buffer("says", says, persistent=False)
        self.register_buffer("speeds", rotary_speeds(C // config.n_head, grid), persistent=False)
        self.register_buffer("times", TOKEN_TIME * grid * torch.arange(config.block_size), persistent=False)
        self.embedding = nn.Parameter(0.02 * torch.randn(V, C))
        # A note is three tokens; mixing in the ones before, oldest first, makes each informative.
        self.recent = nn.Parameter(torch.zeros(RECENT, 1, C))
        self.memory = nn.Parameter(torch.zeros(V, C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.head = nn.Parameter(torch.ones(C)), matrix(V, C, 0.1)

    def embed(self, idx, cache=None):
        """idx (B, T) -> embeddings (B, RECENT + T, C), RECENT of them old; cos, sin (B, 1, T, hs).

        Where a window begins, MEMORY ids come first: the ones before it, or PAD.
        """
        cache = cache or Cache(self, idx, keep=False)
        idx = idx if cache.length else idx[:, MEMORY:]
        first, cache.length = cache.length, cache.length + idx.size(1)
        time, pitch, cache.now, cache.bar_start = place(self.says, idx, cache.now, cache.bar_start)
        x = torch.cat([cache.latest, F.embedding(idx, self.embedding)], 1)
        cache.latest, time = x[:, -RECENT:], time + self.times[first : cache.length]
        angle = time[:, None, :, None] * self.speeds[0] + pitch[:, None, :, None] * self.speeds[1]
        x, cache.memory = x + cache.memory, cache.memory[:, -1:]
        return x, angle.cos(), angle.sin()

    def logits(self, x, cos, sin, cache=None):
        """What embed() gave -> the logits of the next id, (B, T, V)."""
        padded, x, T = x, x[:, RECENT:], cos.size(2)
        if torch.is_autocast_enabled(x.device.type):
            cos, sin = cos.bfloat16(), sin.bfloat16()
        for n, weight in enumerate(self.recent):
            x = torch.addcmul(x, padded[:, n : n + T], weight)
        x = torch.layer_norm(x, x.shape[-1:]).flatten(0, 1)  # (B T, C)
        for n, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache.keys_values[n], cache.length - T) if cache else block(x, cos, sin)
        return F.linear(torch.layer_norm(x, x.shape[-1:], self.norm), self.head).unflatten(0, (-1, T))

    def loss(self, x, cos, sin, targets):
        """The summed cross-entropy, in nats, of embed()'s output and the ids that follow, (B, T)."""
        logits = self.logits(x, cos, sin).float().flatten(0, 1)  # (B T, V)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    def forward(self, idx, cache=None):
        """idx, see embed() -> logits (B, T, V); T must be 1 once the cache holds tokens."""
        return self.logits(*self.embed(idx, cache), cache)


class Cache:
    """What embed() carries through a window; idx begins it. To generate (keep), also keys and values."""

    def __init__(self, model, idx, keep=True):
        c, self.length = model.config, 0
        shape = (c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        self.keys_values = torch.empty(shape, device=idx.device).unbind() if keep else ()  # for each layer
        begins = model.says[KIND, idx] == BOS  # Then nothing before it is remembered.
        old = idx[:, :MEMORY] * (begins[:, :MEMORY].flip(1).cumsum(1).flip(1) == 0)
        self.now = advance(model.says, old, model.says[:, :1].expand(-1, len(old)))[:, :, -1]
        counts = torch.zeros(len(old), len(model.memory), device=old.device)
        counts.scatter_add_(1, old, (old > 0).float())  # not PAD
        memory = (counts @ model.memory)[:, None] / MEMORY
        self.memory = memory * (begins[:, MEMORY - RECENT :, None].cumsum(1) == 0)  # (B, RECENT + T, C)
        self.latest = torch.zeros_like(self.memory[:, :RECENT])
        self.bar_start = torch.zeros_like(self.now[0])


# ---- 4. Learning: batch number i, transposition, learning rates, the trainer

LR_WIDTH = 1536  # fan-in at which a matrix learns at --lr
EMBEDDING_RATE, REST_RATE = 120, 45  # x --lr: embedding and memory; norms and recent
STEP_SIZE = 67  # x --lr: singular values of the step of a matrix in the blocks


def transpose_ids(ids, shifts, vocab):
    """ids (B, T) with row b moved by shifts[b] semitones, as far as the piano allows; chords too."""
    pitches, movable, is_chord = vocab.pitches, is_in(ids, vocab.pitches), is_in(ids, vocab.chords)
    lowest = ids.masked_fill(~movable, pitches.stop - 1).amin(1)
    highest = ids.masked_fill(~movable, pitches.start).amax(1)
    shifts = shifts.clamp(pitches.start - lowest, pitches.stop - 1 - highest)[:, None]
    root = (ids - vocab.chords.start) % 12  # twelve ids in a row have one quality
    return ids + shifts * movable + ((root + shifts) % 12 - root) * is_chord


@dataclass
class Batches:
    """Training batch number i, as a pure function of the seed and i."""
    ids: Tensor  # (N,) int16, on the training device
    vocab: Vocabulary
    options: Options

    def __post_init__(self):
        self.openings = (self.ids == self.vocab.bos).nonzero()[:, 0].cpu().numpy()  # where pieces begin

    def __getitem__(self, i):
        """This rank's part of batch i: inputs (B / PROCESSES, MEMORY + T) and targets, transposed."""
        train, T = self.options.train, self.options.model.block_size
        N, device = len(self.ids), self.ids.device
        rng, B, most = np.random.default_rng((train.seed, i)), train.batch_size, self.options.data.transpose
        # Multiples of the golden ratio spread evenly: no music is read again before the rest. Every eighth
        # window begins a piece, as all that is written does.
        n = np.arange(i * B, (i + 1) * B)
        share = ((5**0.5 - 1) / 2 * n + 2**0.5 * train.seed) % 1
        starts = np.where(n % 8, share * N, self.openings[(share * len(self.openings)).astype(int)])
        shifts = torch.from_numpy(rng.integers(-most, most + 1, size=B)).to(device)
        part = slice(RANK * B // PROCESSES, (RANK + 1) * B // PROCESSES)
        window = (starts[part, None].astype(int) + np.arange(-MEMORY, T + 1)) % N  # goes round
        ids = self.ids[torch.from_numpy(window).to(device)].long()  # (B, MEMORY + T + 1)
        ids = transpose_ids(ids, shifts[part], self.vocab)
        return ids[:, :-1], ids[:, MEMORY + 1 :]


def learning_rate(step, config):
    """The learning rate as a fraction of its peak: linear warmup, linear decay to zero."""
    fallen = (step - config.warmup) / max(1, config.steps - config.warmup)
    return min((step + 1) / max(1, config.warmup), 1 - fallen)


def orthogonalize(x):
    """The matrix of the singular vectors of x with singular values near 1 (Newton-Schulz iteration)."""
    if x.size(0) > x.size(1):
        return orthogonalize(x.mT).mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x


def make_optimizer(model, config):
    """AdamW, with a group for each parameter, and in it its "peak" learning rate. Only matrices decay.

    AdamW moves every weight by about the learning rate, and a matrix sums over its fan-in: so the rate falls
    with the fan-in (Yang et al.), and one --lr fits every width. By default: 3e-4 x 1536 / 128 = 3.6e-3 for
    matrices that read 128 numbers, 3.6e-2 for embeddings, 1.35e-2 for norms and recent. In the blocks it
    only sets the decay: see Trainer.update.
    """
    groups = []
    for name, p in model.named_parameters():
        orthogonal = "blocks" in name and p.dim() == 2
        is_matrix = orthogonal or name == "head"
        rate = LR_WIDTH / p.size(1) if is_matrix else EMBEDDING_RATE if p.dim() == 2 else REST_RATE
        groups.append(dict(params=[p], peak=config.lr * rate, weight_decay=config.weight_decay * is_matrix,
                           orthogonal=orthogonal))
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model, windows, batch_size=32):
    """The summed loss, in nats, of windows: inputs (W, MEMORY + T), targets (W, T); in float32."""
    parts = zip(*(w.to(model.head.device).split(batch_size) for w in windows))
    return sum(model.loss(*model.embed(x), y).item() for x, y in parts)


def mean_over_ranks(values):
    """values, averaged over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / PROCESSES
    return values


def copy_weights(model):
    """A copy of a model's weights on the CPU."""
    return {k: v.cpu().clone() for k, v in model.state_dict().items()}


class Trainer:
    """A model in training: all that changes with each step, and so is in checkpoints."""
    KEPT = ("step", "seconds", "history", "losses", "best")

    def __init__(self, model, config, bfloat16=False, compiled=False):
        self.model, self.config, self.bfloat16, self.device = model, config, bfloat16, model.head.device
        self.average = copy.deepcopy(model)  # of the weights over about the last tenth of the steps
        # Only this is compiled. The backward pass of a compiled embedding is not deterministic.
        self.loss = torch.compile(model.loss) if compiled else model.loss
        self.optimizer = make_optimizer(model, config)
        self.step, self.seconds, self.best = 0, 0.0, {}  # the average that validated best
        self.history, self.losses = [], []  # a row for each validation; the losses since the last

    def state(self):
        """All of the trainer but its settings, for load_state."""
        average, weights = copy_weights(self.average), copy_weights(self.model)
        state = {k: vars(self)[k] for k in self.KEPT} | {"average": average, "weights": weights}
        state["optimizer"] = self.optimizer.state_dict()["state"]
        return state if self.history else state | {"best": average}

    def load_state(self, state):
        """Continue where another trainer's state() was taken, with the same bits."""
        vars(self).update({k: state[k] for k in self.KEPT})
        self.model.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})

    def add_gradients(self, idx, targets):
        """Put the gradient of a batch into .grad; its mean loss, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y in zip(idx.chunk(self.config.accumulate), targets.chunk(self.config.accumulate)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                loss = self.loss(*self.model.embed(x), y) / targets.numel()
            loss.backward()
            total += loss.detach()
        for p in self.model.parameters():
            p.grad = mean_over_ranks(p.grad)
        return mean_over_ranks(total).item()

    @torch.no_grad()
    def update(self, fraction):
        """Move the weights, at a fraction of the peak rates, and their averages.

        AdamW's step of a matrix has few strong directions; in the blocks, as in Muon, all become strong.
        """
        before, size = [], STEP_SIZE * self.config.lr * fraction
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * fraction
            before.append(group["params"][0] * (1 - group["lr"] * group["weight_decay"]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, old in zip(self.optimizer.param_groups, before):
            if group["orthogonal"]:
                [p] = group["params"]
                p.copy_(old + size * max(1, p.size(0) / p.size(1)) ** 0.5 * orthogonalize(p - old))
        for average, p in zip(self.average.parameters(), self.model.parameters()):
            average.lerp_(p, 10 / (10 + self.step))

    def train_step(self, idx, targets):
        """Learn from one batch; the mean loss in nats. Raises UserError."""
        loss = self.add_gradients(idx, targets)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        if not math.isfinite(loss + norm):
            raise UserError(f"the loss became {loss:g} after {self.step} steps: pass a smaller --lr")
        self.update(learning_rate(self.step, self.config))
        self.step += 1
        self.losses.append(loss)
        return loss

    def best_row(self):
        """The row of the best validation; where nothing is held out, the last row."""
        return min(self.history, key=lambda row: row.get("val_loss", 1e9 - row["step"]))

    def validate(self, windows, batches):
        """Add a row to the history; keep the average if it is the best so far."""
        row = {"step": self.step, "seconds": self.seconds,
               "train_loss": sum(self.losses) / max(1, len(self.losses))}
        text, self.losses = f"training loss {row['train_loss']:.4f}", []
        if len(windows[0]):
            total, targets = evaluate(self.average, windows), windows[1]
            row["val_loss"] = total / (targets != IGNORE).sum().item()
            row["val_nats_per_note"] = total / max(1, is_in(targets, batches.vocab.pitches).sum().item())
            text += f", validation loss {row['val_loss']:.4f}"
        self.history.append(row)
        if self.best_row() is row:
            self.best = copy_weights(self.average)
        say(f"step {self.step} of {self.config.steps}: {text}, {self.seconds:.0f} seconds")

    def run(self, batches, windows, stopped, save):
        """Train to the last step or until stopped(); save() is called periodically."""
        pbar = progress(total=self.config.steps, initial=self.step, desc="training", unit="step")
        every = self.config.save_every
        saved = clock = time.monotonic()
        while self.step < self.config.steps:
            if mean_over_ranks(torch.tensor(float(stopped()), device=self.device)):
                break
            loss = self.train_step(*batches[self.step])
            self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self.validate(windows, batches)
            pbar.set_postfix_str(f"loss {loss:.3f}", False)
            pbar.update()
            if self.step % every == 0 if every else clock - saved > 120:  # seconds
                save()
                saved = clock
        pbar.close()


# ---- 5. Writing: logits -> legal -> drawn -> a piece

LEAST_BARS, MOST_BARS = 8, 24  # new bars after which a piece without a given length may and must end
CHECK_EVERY = 32  # tokens between checks for finished pieces
ILLEGAL = -1e9  # logit of an id that may not follow


def draw(logits, vocab, temperature, rng):
    """The next ids (B,), drawn from logits (B, V); temperature is for pitches and chords alone."""
    if temperature == 0:
        return logits.argmax(-1)
    p = logits.softmax(-1)  # (B, V)
    for span in (vocab.pitches, vocab.harmonies):  # their totals stay
        p[:, span] = (logits[:, span] / temperature).softmax(-1) * p[:, span].sum(-1, keepdim=True)
    cumulative = p.cumsum(-1)
    u = torch.rand(len(logits), 1, generator=rng, device=logits.device)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]  # never one with p = 0


@torch.inference_mode()
def draw_tokens(model, vocab, config, ids, seed, hold):
    """Yield ids (B,) that continue ids (B, T); the caller keeps hold (B,) at -inf to forbid EOS."""
    vocab, size, window = copy.copy(vocab), model.config.block_size, [*F.pad(ids, (MEMORY, 0)).unbind(1)]
    vocab.says, vocab.follows = model.says, vocab.follows.to(ids.device)
    asked = torch.from_numpy(parse_chords(config.chords)).to(ids.device) + vocab.chords.start  # (bars, 12)
    bar = torch.full_like(ids[:, 0], -1)  # number of the bar among the new ones
    rng, cache = torch.Generator(ids.device).manual_seed(seed), None
    while True:
        new = window[-1][:, None]
        if not cache or cache.length == size:  # First read what fits; when full, the newer third.
            new = torch.stack(window[-MEMORY - (size // 3 if cache else size) :], 1)
            cache = Cache(model, new)
        logits = model(new, cache)[:, -1]  # (B, V)
        logits[:, vocab.eos].add_(hold)
        wanted = None
        if len(asked):
            bar += window[-1] == vocab.bar
            twelfth = (12 * cache.now[POSITION] // cache.now[BAR_LENGTH]).long()
            wanted = asked[bar % len(asked), twelfth]
        legal = vocab.legal(cache.now, wanted)
        window.append(draw(torch.where(legal, logits, ILLEGAL), vocab, config.temperature, rng))
        yield window[-1]


def find_end(ids, vocab, config):
    """The length of a finished piece in ids (T,): with EOS or up to its last bar line; None if not over."""
    ends, bars = ((ids == token).nonzero()[:, 0].tolist() for token in (vocab.eos, vocab.bar))
    ends = [i + 1 for i in ends[:1]] + bars[config.bars :][:1]
    return min(ends, default=None)


def generate(model, vocab, config, seed, prompt, stopped=lambda: False):
    """config.num_samples pieces, or if stopped() the finished ones: lists of ids, the prompt first."""
    old_bars, open_end = prompt.count(vocab.bar), not config.bars
    if open_end:
        config = replace(config, bars=old_bars + MOST_BARS)
    opening = [vocab.bos, *prompt] + [vocab.bar] * bool(prompt)  # the continuation begins with a bar line
    ids = torch.tensor([opening] * config.num_samples, device=model.head.device)
    hold = torch.full((len(ids),), -math.inf, device=ids.device)
    stream, pieces, ends = draw_tokens(model, vocab, config, ids, seed, hold), [], [None] * len(ids)
    with progress(desc="writing", unit=" tokens", unit_scale=len(ids), leave=False) as pbar:
        while None in ends and not stopped():
            ids = torch.cat([ids, torch.stack(list(itertools.islice(stream, CHECK_EVERY)), 1)], 1)
            pieces = ids[:, 1:].cpu()
            ends = [find_end(piece, vocab, config) for piece in pieces]
            if open_end:  # a piece with a given length ends there, not before
                hold[(ids == vocab.bar).sum(1) >= old_bars + LEAST_BARS] = 0
            pbar.update(CHECK_EVERY)
    return [piece[:end].tolist() for piece, end in zip(pieces, ends) if end]


# ==== You may stop here. Part II: the machinery

# ---- 6. Folder: find, read in worker processes, cache, split, cut into windows

SPLITS = "train", "validation", "test"
SAME_MUSIC, SAME_KINDS = 24, 8  # recordings of one work share 24 intervals in a row, of 8 kinds
PIECE_END = 255  # ends the intervals of a piece
FILE_SECONDS, FILE_MEGABYTES, WORKER_GIGABYTES, DAY = 120, 16, 4, 86_400  # limits of a file
LONGEST_SILENCE = 8  # empty bars in a row


@dataclass
class Piece:
    """One file as ids, or why it gave none."""
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))  # without BOS and EOS
    notes: int = 0
    seconds: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    content: str = ""  # hash of what was read; none if the problem may pass
    path: str = ""  # relative to the folder, with forward slashes
    work: str = ""  # of which this is one recording
    split: str = ""  # one of SPLITS


def write_atomically(path, data):
    """Write a file so that path always holds all of the old bytes or all new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(f"{path}.tmp")  # what a killed run left is overwritten
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from None


def read_bytes(path):
    """The bytes of a file of at most FILE_MEGABYTES. Raises UserError."""
    if not path.is_file():
        raise UserError("not a file")
    if path.stat().st_size > FILE_MEGABYTES * 2**20:
        raise UserError(f"larger than {FILE_MEGABYTES} MB")
    return path.read_bytes()


def parse_midi(data):
    """The bytes of a MIDI file as a score. Raises UserError or an error of symusic."""
    if data[:4] != b"MThd":
        raise UserError("not a MIDI file")
    if data[12:14] == b"\0\0":
        raise UserError("no ticks in a quarter note")
    if data[8:10] == b"\0\2":
        raise UserError("MIDI format 2, several songs in one file: save each by itself")
    return Score.from_midi(data)


def count_changes(piano, quantized):
    """{change: how many} of what the tokens represent differently, beyond the rounding to the grid."""
    notes, signatures = piano.tracks[0].notes.numpy(), piano.time_signatures.numpy()
    inside = (notes["pitch"] >= PIANO[0]) & (notes["pitch"] <= PIANO[1])
    signature = np.searchsorted(signatures["time"], notes["time"], side="right")
    beats = notes["duration"] / piano.tpq * np.r_[4, signatures["denominator"]][signature] / 4
    metres, kept = ([(round(8 * t.time / s.tpq), t.numerator, t.denominator) for t in s.time_signatures]
                    for s in (piano, quantized))  # bar lines are multiples of a sixteenth
    changed = {new for old, new in itertools.pairwise([(0, 4, 4), *metres]) if old[1:] != new[1:]}
    return {"notes outside the piano's range dropped": int((~inside).sum()),
            "repeated notes in one grid position merged": int(inside.sum()) - quantized.note_num(),
            f"notes longer than {LONGEST_NOTE} beats shortened": int((inside & (beats > LONGEST_NOTE)).sum()),
            "tempos outside 20 to 300 changed": sum(not 20 <= tempo.qpm <= 300 for tempo in piano.tempos),
            "time signatures moved or ignored": len(changed - {*kept})}


def cut_silence(ids, bar):
    """ids without the empty bars that follow LONGEST_SILENCE others, and how many those are."""
    bars = np.split(ids, np.flatnonzero(ids == bar)[1:])
    silence = itertools.accumulate(bars, lambda n, part: n + 1 if len(part) == 2 else 0, initial=0)
    kept = [part for part, n in zip(bars, itertools.islice(silence, 1, None)) if n <= LONGEST_SILENCE]
    return np.concatenate(kept), len(bars) - len(kept)


def read_piece(path, vocab):
    """One file as a piece, without a path."""
    content = ""
    try:
        data = read_bytes(path)
        content = hashlib.sha256(data).hexdigest()
        piano, changes = make_piano(parse_midi(data))
        seconds = float(piano.to("second").end())
        if not (seconds < DAY and piano.end() < DAY * piano.tpq):
            raise UserError(f"longer than a day, or {DAY:,} quarter notes")
        quantized = vocab.quantize(piano)
        ids, cut = cut_silence(np.array(vocab.encode(quantized), np.int16), vocab.bar)
        changes |= count_changes(piano, quantized) | {"bars of long silences cut": cut}
        return Piece(ids, quantized.note_num(), seconds, changes, content=content)
    except UserError as e:
        problem = str(e)
    except (OSError, MemoryError) as e:  # may pass
        problem, content = getattr(e, "strerror", "") or "not enough memory", ""
    except (*SCORE_LOADING_EXCEPTION, LookupError, ZeroDivisionError, TypeError) as e:
        problem = f"damaged: {(str(e) or type(e).__name__).splitlines()[0]}"
    return Piece(problem=problem, content=content)


def start_worker(vocab):
    """Give a worker its vocabulary and its limits; it ends on Ctrl-C and with its parent."""
    torch.set_num_threads(1)  # the others do not survive a fork
    gc.disable()  # its searches cost a quarter of the time
    start_worker.vocab, parent = vocab, mp.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if sys.platform == "linux":  # a file that needs more memory than this fails alone
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + WORKER_GIGABYTES * 2**30,) * 2)


def read_in_worker(path):
    """read_piece in a worker process, which dies if the parser hangs."""
    alarm = getattr(signal, "alarm", bool)  # Windows has none
    alarm(FILE_SECONDS)
    piece = read_piece(path, start_worker.vocab)
    alarm(0)
    return piece


def read_in_workers(paths, vocab, alone=False):
    """Yield (path, Piece) as they are read; one that crashes or hangs the parser has a problem."""
    context = mp.get_context("fork" if sys.platform == "linux" else "spawn")
    cores = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count()))(0)
    pool = ProcessPoolExecutor(min(len(cores), len(paths)), context, start_worker, (vocab,))
    unread = []
    try:
        jobs = {pool.submit(read_in_worker, path): path for path in paths}
        for job in as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except BrokenExecutor:
                unread.append(jobs[job])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if unread and alone:
        yield paths[0], Piece(problem="crashed or hung the MIDI parser")
    else:  # a crash breaks a pool: two more read the rest, until the culprit is alone
        for half in filter(None, (unread[::2], unread[1::2])):
            yield from read_in_workers(half, vocab, alone=len(half) == 1)


def find_files(folder):
    """{path: "size name"} of the MIDI files in a folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it, or name another")
    tree = os.walk(folder, onerror=lambda e: say(f"{e.filename} cannot be listed: {e.strerror}"))
    paths = sorted(Path(root, name) for root, folders, names in tree for name in folders + names)
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    found = {path: f"{path.stat().st_size if path.is_file() else 0} {name}" for path, name in names.items()
             if path.suffix.lower() in (".mid", ".midi", ".kar") and "/." not in f"/{name}"}
    if not found:
        raise UserError(f"no MIDI file under {folder}: put some there, or name another")
    return found


def read_folder(folder, vocab, cache_dir):
    """Every MIDI file under folder as a piece, by path; cached by content."""
    paths, pieces = find_files(folder), {}
    # All that decides what a file gives; the number counts changes of this script.
    key = repr((vocab.words, version("miditok"), version("symusic"), 8))
    cache = Path(cache_dir, hashlib.sha256(key.encode()).hexdigest()[:16])
    for path in paths:
        with suppress(Exception):  # not there, damaged, or of another version
            content = hashlib.sha256(read_bytes(path)).hexdigest()
            entry = json.loads(gzip.decompress((cache / f"{content}.gz").read_bytes()))  # with a checksum
            if entry["content"] == content:
                pieces[path] = Piece(**entry | {"ids": np.array(entry["ids"], np.int16)})
    new = [path for path in paths if path not in pieces]
    found = read_in_workers(new, vocab) if new else []
    for path, piece in progress(found, total=len(new), desc="reading", unit="file"):
        pieces[path] = piece
        if cache_dir and piece.content:
            entry = json.dumps(vars(piece) | {"ids": piece.ids.tolist()})
            cache.mkdir(parents=True, exist_ok=True)
            (cache / f"{piece.content}.gz").write_bytes(gzip.compress(entry.encode(), 1))
    for path in paths:
        pieces[path].path = path.relative_to(folder).as_posix()
    return [pieces[path] for path in paths]


def pitch_intervals(ids, pitches):
    """The semitones from each note to the next, plus 128; PIECE_END follows the last."""
    notes = ids[is_in(ids, pitches)].astype(int)
    return bytes((np.diff(notes) + 128).astype(np.uint8)) + bytes([PIECE_END] * bool(len(notes)))


def join_recordings(pieces, pitches):
    """Give recordings of the same music, in any key, the same work."""
    found_in = {}  # {passage: the piece where it stood first}
    for piece in pieces:
        intervals = pitch_intervals(piece.ids, pitches)
        for at in range(len(intervals) - SAME_MUSIC):
            passage = intervals[at : at + SAME_MUSIC]
            if len(set(passage)) >= SAME_KINDS:  # scales and trills prove nothing
                works = {piece.work, found_in.setdefault(passage, piece).work}
                for other in pieces if len(works) > 1 else ():
                    other.work = min(works) if other.work in works else other.work


def split_pieces(pieces, folder, data, pitches):
    """Set each piece's split: its work's, by MAESTRO's table or folder, else by hash."""
    table = {path.parent / (row.get("midi_filename") or ""): row.get("split")
             for path in sorted(folder.rglob("maestro*.csv")) if path.is_file()
             for row in csv.DictReader(path.read_text(errors="replace").splitlines())}
    named = defaultdict(set)
    for piece in pieces:
        piece.work = Path(piece.path).parent.as_posix() if data.piece_is_folder else piece.path
    join_recordings(pieces, pitches)
    for piece in pieces:
        said = [*Path(piece.path).parts[:-1], table.get(folder / piece.path)]
        named[piece.work].add(["", *(split for split in said if split in SPLITS)][-1])
    # A work assigned to both sides is held out entirely.
    splits = {work: max(names, key=("", *SPLITS).index) for work, names in named.items()}
    if "validation" not in splits.values():
        # By a hash of its name alone: a new work moves no old one.
        rest = sorted((hashlib.sha256(os.fsencode(work)).hexdigest(), work) for work, split in splits.items()
                      if split in ("", "train"))
        held_out = sum(int(number[:8], 16) < 2**32 * data.val_percent / 100 for number, _ in rest)
        held_out = min(max(held_out, data.val_percent > 0), len(rest) - 1)  # one is left to train on
        splits |= {work: "validation" for _, work in rest[:held_out]}
    for piece in pieces:
        piece.split = splits[piece.work] or "train"


def make_windows(ids, block_size, stride, limit=10**9):
    """Inputs (W, MEMORY + T), targets (W, T) that score each token but the first once; spread if limited."""
    ids, missing = torch.from_numpy(ids.astype(np.int64)), block_size + 1 - len(ids)
    padded = F.pad(ids, (MEMORY, max(missing, missing % stride)), value=IGNORE)
    windows = padded.unfold(0, MEMORY + block_size + 1, stride)
    W = len(windows) * (len(ids) > 1)
    chosen = torch.linspace(0, W - 1, min(W, limit)).round().long().unique()
    x, y = windows[chosen, :-1].clamp(min=0), windows[chosen, MEMORY + 1 :]
    y[1:, : block_size - stride] = IGNORE  # the window before scores these
    return x, y


# ---- 7. Files: the checkpoint, its log, its lock, names that are free

FORMAT = "pianogpt 10"
STORED = "data", "music", "model", "train"  # groups of settings in a checkpoint
ROW = {"step": 0, "seconds": 0.0, "train_loss": 0.0,  # of the history; these only if pieces are held out:
       "val_loss": 0.0, "val_nats_per_note": 0.0}


def save_checkpoint(path, content):
    """Write a checkpoint, and beside it the whole training log."""
    file = io.BytesIO()
    torch.save({"format": FORMAT, **content}, file)
    write_atomically(path, file.getvalue())
    log = [ROW, *([row.get(key, "") for key in ROW] for row in content["trainer"]["history"])]
    write_atomically(Path(f"{path}.csv"), "".join(",".join(map(str, row)) + "\n" for row in log).encode())


def is_like(value, example):
    """Whether a value has the types, keys and shapes of an example, and finite numbers."""
    if isinstance(example, dict):
        return value.keys() == example.keys() and all(is_like(value[key], example[key]) for key in example)
    if isinstance(example, list):
        return isinstance(value, list) and all(is_like(part, example[0]) for part in value)
    if isinstance(example, Tensor):
        same = (value.shape, value.dtype, value.layout) == (example.shape, example.dtype, example.layout)
        return same and bool(value.isfinite().all())
    return type(value) is type(example) and (isinstance(example, str) or math.isfinite(value))


def check_content(content):
    """Raise an error unless a checkpoint is as a run with its settings makes it."""
    options, intervals, trainer = Options(), content["intervals"], content["trainer"]
    config = {name: asdict(getattr(options, name)) for name in STORED}
    for name in STORED:
        vars(getattr(options, name)).update(content["config"][name])
    check_options(options)
    c, V, stored = options.model, len(content["vocabulary"]), sum(w.numel() for w in trainer["best"].values())
    if c.n_embd * max(V, c.n_layer * c.n_embd) > stored:
        raise ValueError("its weights do not fit")  # before memory is taken for them
    best, step, rows = PianoGPT(c, torch.ones(7, V)).state_dict(), trainer["step"], trainer["history"]
    weights = best if trainer["weights"] else {}  # export leaves them out
    moments = {i: {"step": torch.tensor(0.0), "exp_avg": w, "exp_avg_sq": w}
               for i, w in enumerate(weights.values()) if step}
    state = {"step": 0, "seconds": 0.0, "losses": [0.0], "weights": weights, "average": weights, "best": best,
             "optimizer": moments, "history": [ROW]}
    example = {"format": "", "about": "", "config": config, "vocabulary": [""], "folder": "", "files": [""],
               "pieces": [""], "intervals": torch.empty(len(intervals), dtype=torch.uint8), "trainer": state}
    fits = is_like(content | {"trainer": trainer | {"history": [ROW | row for row in rows]}}, example)
    steps = [0, *(row["step"] for row in rows), step + 1]
    if not fits or steps != sorted(set(steps)) or (intervals == PIECE_END).sum() > len(content["pieces"]):
        raise ValueError("its parts do not fit")


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU; nothing in the file can run or grow. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: name another, or train it first, with --steps N")
    try:
        with zipfile.ZipFile(path) as file:
            if sum(part.file_size for part in file.infolist()) > path.stat().st_size or file.testzip():
                raise ValueError("its parts do not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("not of this version")
        content["trainer"]["best"] = {k: v.float() for k, v in content["trainer"]["best"].items()}
        check_content(content)
        return content
    except Exception as e:
        raise UserError(f"{path} is damaged or not a PianoGPT checkpoint ({str(e)[:60]})") from None


def export_checkpoint(path, content, about):
    """Write a checkpoint's best weights, in 16 bits, and what generating needs; 0."""
    if path.exists():
        raise UserError(f"{path} is there already: name another file")
    best = {k: v.half() for k, v in content["trainer"]["best"].items()}
    state = content["trainer"] | {"best": best, "weights": {}, "average": {}, "optimizer": {}, "losses": []}
    save_checkpoint(path, content | {"about": about or content["about"], "files": [], "trainer": state})
    say(f"exported: {path}, {path.stat().st_size / 2**20:.1f} MB")
    return 0


def start_from(path, about):
    """A checkpoint at step 0 with the best weights, sizes and tokens of another."""
    base = load_checkpoint(path)
    weights = base["trainer"]["best"]
    state = {"step": 0, "seconds": 0.0, "history": [], "losses": [], "best": {}, "optimizer": {},
             "weights": weights, "average": weights}
    config = {"music": base["config"]["music"], "model": base["config"]["model"], "train": FINE_TUNING}
    return base | {"about": about + base["about"], "config": config, "files": [], "trainer": state}


def lock_checkpoint(path):
    """The lock that holds a checkpoint for this run alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(f"{path}.lock", timeout=0).acquire().lock
    except Timeout:
        raise UserError(f"another run is training {path}: wait, or pass another --checkpoint") from None


def write_new(folder, stem, suffix, data):
    """Write data to folder/stem-001.suffix, or the first number without a file of any suffix; its path."""
    for number in itertools.count(1):
        path = folder / f"{stem}-{number:03d}{suffix}"
        if all(old.stem != path.stem for old in folder.iterdir()):
            with suppress(FileExistsError):
                path.touch(exist_ok=False)  # no other run gets it
                break
    try:
        write_atomically(path, data)
    except BaseException:
        path.unlink()
        raise
    return path


def add_texts(data, texts):
    """The bytes of a MIDI file with one more track, of text events: (tick, text)."""
    score = Score()
    score.markers = [TextMeta(*text) for text in texts]
    track = score.dumps_midi()[14:].replace(b"\xff\6", b"\xff\1")  # symusic writes no texts
    return data[:10] + (1 + int.from_bytes(data[10:12], "big")).to_bytes(2, "big") + data[12:] + track


# ---- 8. Copies and figures

# How well each pitch class fits C major and C minor (Krumhansl & Kessler, 1982)
KEY_NAMES = "C Db D Eb E F F# G Ab A Bb B".split(), "C C# D Eb E F F# G G# A Bb B".split()
KEY_PROFILES = ((6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
                (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17))


def longest_known_run(intervals, names, corpus):
    """How many notes in a row stand in the corpus, intervals of pieces; and in which."""
    length, found = 0, 0
    for start in range(len(intervals)):
        while (end := start + length + 1) < len(intervals) and (at := corpus.find(intervals[start:end])) >= 0:
            length, found = length + 1, at
    return (length + 1, names[corpus[:found].count(PIECE_END)]) if length else (0, "")


def chord_symbols(ids, vocab):
    """(quarter note, symbol) of each change of the chord in ids."""
    now, quarters = vocab.timeline(torch.tensor(ids))
    found = [(q, CHORDS[int(i) - vocab.chords.start]) for q, i in zip(quarters.tolist(), now[CHORD]) if i > 0]
    return [new for old, new in itertools.pairwise([(0, ""), *found]) if old[1] != new[1]]


def find_key(score):
    """The key of a piece that has notes, as a key signature and in words (Krumhansl & Schmuckler)."""
    notes = score.tracks[0].notes.numpy()
    sounding = np.bincount(notes["pitch"] % 12, notes["duration"], 12)
    keys = [np.roll(profile, tonic) for profile in KEY_PROFILES for tonic in range(12)]
    minor, tonic = divmod(int(np.argmax([np.corrcoef(sounding, key)[0, 1] for key in keys])), 12)
    sharps = (7 * (tonic + 3 * minor) + 5 + minor) % 12 - 5 - minor  # flats are negative
    return KeySignature(0, sharps, minor), f"{KEY_NAMES[minor][tonic]} {('major', 'minor')[minor]}"


# ---- 9. Command line: parse, choose the device, call, print

FINE_TUNING = {"steps": 300, "warmup": 50, "lr": 3.3e-5, "eval_every": 25}  # the defaults with --init-from


def make_parser():
    """A flag for each setting; those not given leave no trace."""
    parser = argparse.ArgumentParser(
        usage="python pianogpt.py [flags]", description=__doc__.split("\nThe idea:")[0], allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in fields(Options):
        config = group.default_factory()
        section = parser.add_argument_group(f"{group.name}: {config.__doc__.rstrip('.').lower()}")
        for f in fields(config):
            kind, text = type(f.default), f.metadata["text"]
            if kind is bool:
                section.add_argument(flag(f.name), action="store_true", help=text)
            else:
                name = {int: "N", float: "X", str: "TEXT"}[kind]
                text += f" (default: {f.default})" * (f.default != "")
                section.add_argument(flag(f.name), type=kind, metavar=name, help=text)
    return parser


def parse(argv):
    """{setting: value} of a command line. Raises UserError or ArgumentError."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser.format_help().split(), cutoff=0)[0]
        raise UserError(f"there is no flag {unknown[0]}: do you mean {near}? --help lists all")
    needs = dict.fromkeys(vars(SampleConfig()), "generate") | {
        "prompt_bars": "prompt", "continuation_only": "prompt", "about": "export"}
    for name in vars(given):
        if (needed := needs.get(name, name)) not in given:
            raise UserError(f"{flag(name)} does nothing without {flag(needed)}")
    modes = [flag(name) for name in ("generate", "evaluate", "export") if name in given]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} cannot be done at once")
    return vars(given)


def make_options(given, checkpoint, training):
    """The settings in force: the command line's, else the checkpoint's, else the defaults."""
    options = Options()
    for name, config in vars(options).items():
        saved = checkpoint["config"].get(name, {}) if checkpoint else {}
        for f in fields(config):
            value = given.get(f.name, saved.get(f.name, f.default))
            free = f.metadata.get("resumable") if training else f.name in ("steps", "seed")
            if f.name in saved and not free and value != saved[f.name]:
                raise UserError(f"the checkpoint has {flag(f.name)} {saved[f.name]}: omit it or pass --fresh")
            setattr(config, f.name, value)
    check_options(options)
    return options


def choose_device(name):
    """The device of that name; auto: the GPU if there is one, else the CPU."""
    try:
        if name == "auto":
            gpu = torch.accelerator.current_accelerator(check_available=True)
            name = f"{gpu}:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no device {name} here: pass --device auto, or cpu") from None


@contextmanager
def catch_signals():
    """Within it the first Ctrl-C, SIGTERM or SIGHUP only joins a list."""
    def catch(number, frame):
        caught.append(number)
        signal.signal(number, old[number])  # a second one ends the program
    caught, numbers = [], {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    old = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def load_model(checkpoint, vocab, device):
    """The model of a checkpoint, with the weights that validated best."""
    model = PianoGPT(ModelConfig(**checkpoint["config"]["model"]), vocab.says)
    model.load_state_dict(checkpoint["trainer"]["best"])
    return model.to(device)


def print_block(values):
    """Print key: value lines that a script can read."""
    for key, value in values.items():
        say(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")


def usable_pieces(folder, vocab, cache_dir):
    """The pieces of a folder that have music; prints what was skipped and changed."""
    found = read_folder(Path(folder), vocab, cache_dir)
    pieces, bad = [p for p in found if not p.problem], [p for p in found if p.problem]
    if bad:
        say(f"skipped: {count(len(bad), 'file')}: {'; '.join(f'{p.path} ({p.problem})' for p in bad)}")
    if not pieces:
        raise UserError(f"none of the {len(found)} MIDI files under {folder} holds piano music: try another")
    hours, notes = sum(p.seconds for p in pieces) / 3600, sum(p.notes for p in pieces)
    say(f"music: {count(len(pieces), 'file')} under {folder}, {hours:.1f} hours, {notes:,} notes, "
        f"{sum(len(p.ids) for p in pieces):,} tokens")
    changes = sum((Counter(p.changes) for p in pieces), Counter())
    if changes:
        say("changed: " + ", ".join(f"{change}: {number:,}" for change, number in changes.items()))
    return pieces


def compare_music(run, given, checkpoint, training):
    """Say how the folder differs from what a checkpoint learned. Raises UserError."""
    folder, learned, named = run.midi_dir, checkpoint["folder"], "midi_dir" in given
    now = then = set(checkpoint["files"])
    if training or named or folder == learned and Path(folder).is_dir():
        now = set(find_files(Path(folder)).values())
    if now != then:
        new, gone = len(now - then), len(then - now)
        what = f"{run.checkpoint} learned from {learned}; in {folder} {new} files are new and {gone} gone"
        more = training and given.get("steps", 0) > checkpoint["config"]["train"]["steps"]
        if folder != learned and not (named and more):
            raise UserError(f"{what}: pass --midi-dir {learned}, another --checkpoint, or more --steps")
        say(what + (": training goes on" if training else ": more --steps or --fresh would use these"))


def from_rank_0(call):
    """What call() gives on rank 0, for every rank; its UserError ends them all."""
    try:
        result = [RANK or call()]
    except UserError as e:
        result = [e]
    if PROCESSES > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def prepare_data(options, vocab):
    """Training ids (N,), validation windows, and what the checkpoint keeps beside the trainer."""
    folder, T = Path(options.run.midi_dir), options.model.block_size
    files = [*find_files(folder).values()]  # before reading
    pieces = usable_pieces(folder, vocab, options.run.cache_dir)
    split_pieces(pieces, folder, options.data, vocab.pitches)
    works = Counter({p.work: p.split for p in pieces}.values())
    say(f"split: {count(works.total(), 'work')} ({', '.join(f'{works[s]} {s}' for s in SPLITS)})")
    seen, held_out = ([p for p in pieces if p.split == split] for split in SPLITS[:2])
    if not seen:
        raise UserError(f"no piece under {folder} is left to train on: all are held out")
    ids, val_ids = (np.concatenate([[], *(np.r_[vocab.bos, p.ids, vocab.eos] for p in side)]).astype(np.int16)
                    for side in (seen, held_out))
    intervals = bytearray().join(pitch_intervals(p.ids, vocab.pitches) for p in seen)
    kept = {"about": "", "config": {name: asdict(getattr(options, name)) for name in STORED},
            "vocabulary": vocab.words, "folder": str(folder), "files": files,
            "pieces": [p.path for p in seen],
            "intervals": torch.frombuffer(intervals, dtype=torch.uint8)}
    return torch.from_numpy(ids), make_windows(val_ids, T, T, 128), kept


def read_prompt(config, vocab):
    """The ids of the prompt up to a bar line, where sounding notes end; vocab gets its tempos."""
    path = Path(config.prompt)
    [(_, piece)] = read_in_workers([path], vocab)
    if piece.problem:
        raise UserError(f"{path} cannot be continued ({piece.problem}): pass another --prompt")
    ids = piece.ids.tolist()
    for tempo in parse_midi(path.read_bytes()).tempos:  # a continuation keeps them exactly
        vocab.says[TEMPO, vocab.tempo_id(tempo.qpm)] = tempo.qpm
    at = vocab.bar_lines(torch.tensor(ids))[0].tolist()
    bars = config.prompt_bars or len(at)
    if bars > len(at):
        raise UserError(f"{path} is only {count(len(at), 'bar')}: ask for less")
    if 0 < config.bars <= bars:
        raise UserError(f"the prompt alone is {count(bars, 'bar')}: ask for a longer piece")
    score = vocab.decode(ids[: [*at, len(ids)][bars]])
    if not score.note_num():
        raise UserError(f"the first {count(bars, 'bar')} of {path} hold no notes: ask for more")
    ids = vocab.encode(vocab.quantize(score))
    signature = next(i for i in reversed(ids) if vocab.words[i].startswith("TimeSig"))
    ids += [vocab.bar, signature] * (bars - ids.count(vocab.bar))  # silent bars count
    return ids


def write_sample(ids, old, config, origin, vocab, known):
    """Write a piece, its first `old` ids the prompt, with origin, key and chords; whether it has notes."""
    shown = ids[old:] if config.continuation_only else ids
    score = vocab.decode(shown, config.tempo)
    if not score.note_num():
        say(f"piece {origin['piece']} has no notes and is left out: train longer")
        return False
    signature, key = find_key(score)
    score.key_signatures.append(signature)
    if old and not config.continuation_only:
        end = vocab.bar_lines(torch.tensor(ids[:old]))[1][-1].item()
        score.markers.append(TextMeta(round(end * score.tpq), "end of prompt"))
    texts = [(0, f"PianoGPT {json.dumps(origin | {'key': key})}")]
    texts += [(round(quarter * score.tpq), symbol) for quarter, symbol in chord_symbols(shown, vocab)]
    path = write_new(Path(config.samples_dir), "sample", ".mid", add_texts(score.dumps_midi(), texts))
    run, name = longest_known_run(pitch_intervals(np.array(ids[old:]), vocab.pitches), *known)
    bars, seconds = shown.count(vocab.bar), score.to("second").end()
    say(f"sample: {count(bars, 'bar')}, {key}, {count(score.note_num(), 'note')}, {seconds:.1f} seconds, "
        f"longest known run {count(run, 'note')}{f' ({name})' * bool(name)}, {path}")
    return True


def make_trainer(options, checkpoint, kept, vocab, device):
    """A new trainer, or one where a checkpoint left off; then `kept` gets what was learned before."""
    c, V, parts = options.model, len(vocab.words), PROCESSES * options.train.accumulate
    weights = 3 * V * c.n_embd + 12 * c.n_layer * c.n_embd**2  # kept seven times: gradient, moments, copies
    activations = options.train.batch_size // parts * c.block_size * (24 * c.n_layer * c.n_embd + 3 * V)
    try:
        torch.empty(7 * weights + activations, device=device)  # asks for it, and gives it back
    except RuntimeError:
        needed = f"{(7 * weights + activations) / 2**28:,.0f} GB"
        raise UserError(f"training needs about {needed}: pass --accumulate N, or smaller sizes") from None
    torch.manual_seed(options.train.seed)
    model = PianoGPT(options.model, vocab.says).to(device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()  # few CPUs are faster in it
    bfloat16 = fast and not options.run.float32
    trainer = Trainer(model, options.train, bfloat16, options.run.compile)
    if checkpoint:
        trainer.load_state(checkpoint["trainer"])
        kept["about"] = checkpoint["about"]
        if checkpoint["files"] != kept["files"]:
            trainer.history = [{k: v for k, v in row.items() if "val" not in k} for row in trainer.history]
            kept["pieces"] += checkpoint["pieces"]
            kept["intervals"] = torch.cat([kept["intervals"], checkpoint["intervals"]])
    return trainer


def run_training(options, checkpoint, vocab, device):
    """Train and save a model; 0 or 128 + the signal that stopped it."""
    path, train = Path(options.run.checkpoint), options.train
    ids, windows, kept = from_rank_0(lambda: prepare_data(options, vocab))
    batches = Batches(ids.to(device), vocab, options)
    trainer = make_trainer(options, checkpoint, kept, vocab, device)
    if options.run.fresh and path.exists() and not RANK:
        old = write_new(path.parent, f"{path.stem}-old", path.suffix, path.read_bytes())
        path.unlink()
        os.path.exists(f"{path}.csv") and os.rename(f"{path}.csv", f"{old}.csv")
        say(f"kept the old checkpoint as {old}")
    parameters = f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters"
    how = ("float32", "bfloat16")[trainer.bfloat16] + ", compiled" * options.run.compile
    say(f"model: {parameters}, {how} on {device}{f' in {PROCESSES} processes' * (PROCESSES > 1)}"
        f"{f', from step {trainer.step} on' * bool(trainer.step)}, peak learning rate {train.lr:g} at width "
        f"{LR_WIDTH}, scaled by fan-in; Ctrl-C saves and stops")

    def save(last=False):
        try:
            RANK or save_checkpoint(path, kept | {"trainer": trainer.state()})
        except OSError as e:
            if last and e.filename == str(path):  # its log alone may fail
                raise
            say(f"cannot save {e.filename} ({e.strerror}): training goes on")

    with catch_signals() as caught:
        try:
            trainer.run(batches, windows, lambda: bool(caught), save)
        except Exception as e:
            isinstance(e, UserError) or save()
            if isinstance(e, torch._dynamo.exc.TorchDynamoException):
                raise UserError("torch.compile does not work here: leave out --compile") from None
            raise
        save(last=True)
    if trainer.step < train.steps:
        say(f"stopped at step {trainer.step}, saved {path}: the same command continues, without --generate")
        return 128 + (caught or [signal.SIGTERM])[0]
    best = {key: value for key, value in trainer.best_row().items() if "val" in key}
    print_block(trainer.history[-1] | best | {"checkpoint": path})
    return 0


def run_evaluation(options, checkpoint, vocab, device):
    """Print the loss of a checkpoint on a folder; 0."""
    model, T = load_model(checkpoint, vocab, device), options.model.block_size
    pieces = usable_pieces(options.run.evaluate, vocab, options.run.cache_dir)
    learned = checkpoint["intervals"].numpy().tobytes()
    known = sum(pitch_intervals(p.ids, vocab.pitches) in learned for p in pieces)
    loss, tokens, notes = 0.0, sum(len(p.ids) + 1 for p in pieces), sum(p.notes for p in pieces)
    for piece in progress(pieces, desc="evaluating", unit="piece"):
        loss += evaluate(model, make_windows(np.r_[vocab.bos, piece.ids, vocab.eos], T, stride=T // 2))
    print_block({"pieces": len(pieces), "known": known, "tokens": tokens, "notes": notes,
                 "nats_per_token": loss / tokens, "nats_per_note": loss / notes})
    return 0


def open_checkpoint(path, given, run, stack):
    """The checkpoint, if there is one, and whether to train; then the stack holds its lock.

                              no checkpoint      unfinished     finished
        no mode               train              train on       say that it is finished
        --generate            train, then write  write          write
        with --steps N        train to N         train on to N  train on to N
        --evaluate, --export  an error           as it is       as it is

    With --fresh there is none. One that is named must be there to generate, unless its music is named too.
    """
    there = path.exists() or "checkpoint" in given and "midi_dir" not in given
    if run.evaluate or run.export or run.generate and there and not (run.fresh or "steps" in given):
        return load_checkpoint(path), False
    lock = lock_checkpoint(path)
    stack.callback(lambda: (path.exists() or Path(lock.lock_file).unlink(missing_ok=True), lock.release()))
    about = f"started from {Path(run.init_from).name}; " * bool(run.init_from)
    if run.fresh or not path.exists():
        return start_from(Path(run.init_from), about) if run.init_from else None, True
    checkpoint = load_checkpoint(path)
    if not checkpoint["about"].startswith(about):
        raise UserError(f"{path} did not start from {run.init_from}: pass another --checkpoint, or --fresh")
    if not checkpoint["trainer"]["weights"]:
        raise UserError(f"{path} was exported: pass --init-from {path} and another --checkpoint to train it")
    steps = given.get("steps", checkpoint["config"]["train"]["steps"])
    return checkpoint, checkpoint["trainer"]["step"] < steps


def run_generation(options, given, vocab, device, prompt):
    """Write the samples; 0 or 128 + the signal that stopped it. Raises UserError if none has notes."""
    checkpoint, config = load_checkpoint(Path(options.run.checkpoint)), options.sample
    step, about = checkpoint["trainer"]["step"], checkpoint["about"]
    say(f"written by: {options.run.checkpoint}, step {step} of {checkpoint['config']['train']['steps']}, "
        f"trained on {checkpoint['folder']}{f' ({about})' * bool(about)}")
    if "seed" not in given:
        options.train.seed = int(np.random.default_rng().integers(10**6))
        say(f"seed: {options.train.seed}; with this --seed the pieces come again")
    model, origin = load_model(checkpoint, vocab, device), asdict(config) | {"samples_dir": ""}
    origin |= {"prompt": Path(config.prompt).name, "seed": options.train.seed, "step": step}
    known = checkpoint["pieces"], checkpoint["intervals"].numpy().tobytes()
    with catch_signals() as caught:
        pieces = generate(model, vocab, config, options.train.seed, prompt, lambda: bool(caught))
        written = sum(write_sample(ids, len(prompt), config, origin | {"piece": n}, vocab, known)
                      for n, ids in enumerate(pieces, 1))
    if caught:
        say(f"stopped: {written} of {config.num_samples} pieces were finished")
    elif not written:
        raise UserError("no piece has notes: train longer")
    return 128 + caught[0] if caught else 0


def check_plan(options, given, checkpoint, training, vocab):
    """Find what is missing before the work begins; the prompt's ids. Raises UserError."""
    beside, sample = Path(__file__).parent / options.run.midi_dir, options.sample
    if "midi_dir" not in given and not Path(options.run.midi_dir).exists() and beside.is_dir():
        options.run.midi_dir = str(beside)
    if checkpoint and checkpoint["files"]:  # those of an exported model are not known
        from_rank_0(lambda: compare_music(options.run, given, checkpoint, training))
    parse_chords(sample.chords)
    prompt = read_prompt(sample, vocab) if sample.prompt and not RANK else []
    if options.run.generate:
        Path(sample.samples_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(sample.samples_dir, os.W_OK):
            raise UserError(f"{sample.samples_dir} cannot be written to: pass another --samples-dir")
    return prompt


def run(argv, stack):
    """Do what the command line asks; the exit code. The stack holds the lock."""
    given = parse(argv)
    asked = make_options(given, None, training=False).run
    path, device = Path(asked.checkpoint), choose_device(asked.device)
    path = path.resolve() if path.is_symlink() else path
    if PROCESSES > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    checkpoint, training = from_rank_0(lambda: open_checkpoint(path, given, asked, stack))
    options = make_options(given, checkpoint, training)
    vocab, options.run.checkpoint = Vocabulary(options.music), str(path)
    if checkpoint and checkpoint["vocabulary"] != vocab.words:
        raise UserError("the checkpoint's vocabulary is not this MidiTok's: install requirements.txt")
    if asked.export:
        return export_checkpoint(Path(asked.export), checkpoint, asked.about)
    if asked.evaluate:
        return run_evaluation(options, checkpoint, vocab, device)
    prompt, code = check_plan(options, given, checkpoint, training, vocab), 0
    if training:
        code = run_training(options, checkpoint, vocab, device)
    elif not asked.generate:
        say(f"{path} is finished: pass a larger --steps to train on, or --fresh to start over")
    if code or RANK or not asked.generate:
        return code
    return run_generation(options, given, vocab, device, prompt)


def main(argv=None):
    """0, or 2 for what the user can mend, or 128 + a signal's number."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with ExitStack() as stack:
            return run(argv, stack)
    except (UserError, argparse.ArgumentError) as e:
        problem, code = str(e), 2
    except OSError as e:
        problem, code = f"{e.filename or 'a file'} cannot be used: {e.strerror or e}", 2
    except KeyboardInterrupt:
        problem, code = "stopped", 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    say(f"pianogpt: {problem}", "stderr")
    time.sleep(2 * bool(RANK))  # or torchrun ends rank 0
    return code


if __name__ == "__main__":
    sys.exit(main())
