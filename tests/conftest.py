"""Tiny MIDI files, a vocabulary and processes apart: what the tests need is made here."""

import itertools
import multiprocessing
import os
import resource
import runpy
import shlex
import signal
import sys
from pathlib import Path

# In models as tiny as these, threads cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "samples")]

import pianogpt as pg  # noqa: E402

TPQ = 480  # ticks per quarter note of the files written here
TINY = shlex.split("--n-layer 1 --n-head 2 --n-embd 32 --block-size 64 --batch-size 4 --device cpu")
FORKS = multiprocessing.get_context("forkserver")  # its processes do not import torch again
PRELOADED = [
    "miditok",
    "pebble",
    "pianogpt",
    "pytest",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "tqdm",
]
FORKS.set_forkserver_preload(PRELOADED)


def write_midi(path, tracks, metre=(4, 4), bpm=120.0, controls=(), drums=(), programs=()):
    """Write tracks, lists of (start in quarters, length in quarters, pitch, velocity).

    controls: (track, quarter, number, value); drums: numbers of the tracks that are drums;
    programs: the instruments of the tracks.
    """
    score = Score(TPQ)
    score.tempos.append(Tempo(0, bpm))
    score.time_signatures.append(TimeSignature(0, *metre))
    for number, notes in enumerate(tracks):
        track = Track(is_drum=number in drums, program=dict(enumerate(programs)).get(number, 0))
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
    right = []
    for i in range(bars * 8):
        right.append((i / 2, 0.5, 60 + (i * (1 + seed % 3) + seed) % 24, 70 + i % 20))
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
def vocab():
    """The default vocabulary."""
    return pg.Vocabulary(pg.TokenSettings())


def read_piano(path):
    """A file as one piano."""
    piano, _ = pg.make_piano(pg.parse_midi(path.read_bytes()))
    return piano


def notes_of(score):
    """(start, end, pitch) of every note, in quarters, sorted."""
    notes = []
    for track in score.tracks:
        for n in track.notes:
            end = (n.time + n.duration) / score.tpq
            notes.append((round(n.time / score.tpq, 3), round(end, 3), n.pitch))
    return sorted(notes)


def start(function, *args):
    """A process that calls a function of this file."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    return process


def print_into(out):
    """Let this process print into a file, and what goes to stderr into out.err."""
    for handle, name in ((1, out), (2, f"{out}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)


def limit_memory(gigabytes):
    """Let this process and its children take no more than so much memory beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_apart(folder, out, line, write=0, gigabytes=0, threads=1, number=signal.SIGKILL):
    """Run a command line in a folder, its output in out; killed in its write of that number.

    gigabytes: of memory that it may take; 0: as much as there is. number: the signal that kills.
    """
    writes = itertools.count(1)

    def fsync(handle):
        if next(writes) == write:
            os.kill(os.getpid(), number)

    pg.handle_signals(dict.fromkeys(pg.signal_handlers(), pg.stop_at_once))
    pg.torch.set_num_threads(threads)
    os.fsync = fsync
    os.chdir(folder)
    print_into(out)
    if gigabytes:
        limit_memory(gigabytes)
    sys.exit(pg.main(shlex.split(line)))


def run_on_rank(line):
    """Run a command line as the process of a rank, in a folder of its own."""
    os.chdir(f"rank{os.environ['RANK']}")
    sys.argv[1:] = shlex.split(line)
    try:
        runpy.run_path(pg.__file__, run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise


def run_on_two_ranks(folder, out, line):
    """Run a command line in two processes as torchrun does, by its launcher, but forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    print_into(out)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=out,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_on_rank)(line)
