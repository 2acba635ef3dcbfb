"""Make music heard and seen: a .wav and a .png of each .mid file, and a .png of the losses in a training log.

python samples/listen.py                                       draw every .mid file in this script's folder
python samples/listen.py --soundfont piano.sf2 samples/a.mid   write samples/a.wav and samples/a.png
python samples/listen.py pianogpt.pt.csv                       draw the losses of a training run: pianogpt.pt.png

Pictures need `pip install matplotlib`, sound needs `pip install --no-deps tinysoundfont`. No pedal is played.
"""

import argparse
import csv
import importlib
import sys
import wave
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

RATE = 44_100  # samples a second
RING_OUT = 2  # seconds of sound after the last note
PEAK = 32_000  # the loudest sample of a .wav; full scale is 32,767
LONGEST = 3600  # seconds; an hour of sound takes 3 GB of memory while it is written
END_OF_PROMPT = "end of prompt"  # text of the MIDI marker that pianogpt.py sets where the user's prompt ends
NO_SOUND = (
    "no sound was made: pass a soundfont, on Debian or Ubuntu apt install musescore-general-soundfont-small,"
    " then --soundfont /usr/share/sounds/sf3/MuseScore_General_Lite.sf3"
)


class UserError(Exception):
    """A mistake that the user can mend; its text is one sentence that says how."""


def need(module: str, options: str = ""):
    """The imported module; raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(f"{library} is not installed: run pip install {options}{library}") from None


@contextmanager
def collecting(problems: dict[str, None]):
    """A block that a UserError ends, after which its text is a key of problems: once for many files."""
    try:
        yield
    except UserError as error:
        problems[str(error)] = None


@contextmanager
def replacing(path: Path):
    """A temporary path that becomes path at the end of the block, or is deleted if the block fails."""
    part = path.with_name(path.name + ".tmp")
    try:
        yield part
        part.replace(path)
        print(f"wrote {path}")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
    finally:
        part.unlink(missing_ok=True)


def find_bars(score, end: int) -> list[int]:
    """The ticks before end at which bars begin: each time signature begins one, and without one it is 4/4."""
    whole = 4 * score.ticks_per_quarter
    size = {0: whole} | {s.time: whole * s.numerator // (s.denominator or 1) for s in score.time_signatures}
    changes = [tick for tick in sorted(size) if tick < end]
    return [tick for a, b in pairwise([*changes, end]) for tick in range(a, b, size[a] or 1)]


def read_chords(data: bytes) -> list[tuple[int, str]]:
    """(tick, symbol) of the chords that pianogpt.py writes as text events into the last track of a .mid file."""
    track = data.rfind(b"MTrk")
    data = data[:track] + data[track:].replace(b"\xff\x01", b"\xff\x06")  # symusic reads markers but no texts
    markers = need("symusic").Score.from_midi(data).markers
    texts = [(marker.time, marker.text) for marker in markers if marker.text != END_OF_PROMPT]
    return texts[1:] if texts and texts[0][1].startswith("PianoGPT ") else []


def read_piece(path: Path) -> tuple[list, list[float], list, float]:
    """The notes, the starts of bars, the chords (second, symbol), the end of the prompt in seconds (0: none)."""
    symusic = need("symusic")
    try:
        data = path.read_bytes()
        score, chords = symusic.Score.from_midi(data), read_chords(data)
    except Exception:  # which one depends on how the file is damaged
        raise UserError(f"{path} is not a MIDI file that can be read: export it again") from None
    if not score.note_num():
        raise UserError(f"{path} holds no notes: leave it out")
    bars = find_bars(score, max(note.end for track in score.tracks for note in track.notes))
    prompt_end = next((marker.time for marker in score.markers if marker.text == END_OF_PROMPT), 0)
    score.markers = [symusic.TextMeta(tick, "") for tick in [*(t for t, _ in chords), *bars, prompt_end]]
    score = score.to("second")  # also the markers
    notes = [note for track in score.tracks for note in track.notes]
    if not 0 < max(note.end for note in notes) <= LONGEST:  # also if it is NaN, from 0 ticks per quarter
        raise UserError(f"{path} does not last between 0 and {LONGEST} seconds: cut it or mend its tempo")
    *times, prompt_end = [marker.time for marker in score.markers]
    chords = [(time, symbol) for time, (_, symbol) in zip(times, chords)]
    return notes, times[len(chords) :], chords, prompt_end


@cache  # loading takes seconds
def load_soundfont(path: str):
    """A tinysoundfont.Synth and the soundfont that it plays; raises UserError."""
    synth = need("tinysoundfont", "--no-deps ").Synth(samplerate=RATE)
    try:
        return synth, synth.soundfonts[synth.sfload(path)]
    except RuntimeError:
        raise UserError(f"{path} is not a soundfont that can be read: pass another --soundfont") from None


def write_wav(midi: Path, notes: list, soundfont: str) -> None:
    """Play the notes of a .mid file on the first preset of a soundfont into a 16-bit stereo .wav."""
    synth, instrument = load_soundfont(soundfont)
    np, sequencer, events = need("numpy"), need("tinysoundfont").Sequencer(synth), need("tinysoundfont.midi")
    instrument.reset()  # stop what still rings of the last piece
    synth.generate_simple(RATE // 10)  # which takes it 10 ms
    instrument.channel_set_preset_index(0, 0)
    # Sequencer.midi_load would lose up to 1 ms at each change of tempo, and generate rounds its steps up to
    # whole samples, 9 ms in 700 notes: so these are symusic's times, on whole samples.
    steps = [(note.time, events.NoteOn(note.pitch, note.velocity)) for note in notes]
    steps += [(note.end, events.NoteOff(note.pitch)) for note in notes]  # ends the older of two on a key
    steps.sort(key=lambda step: step[0])
    sequencer.add([events.Event(action, round(t * RATE) / RATE, persistent=False) for t, action in steps])
    sound = np.frombuffer(synth.generate(round((steps[-1][0] + RING_OUT) * RATE)), np.float32)
    with replacing(midi.with_suffix(".wav")) as path, wave.open(str(path), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes((sound * (PEAK / max(1e-9, np.abs(sound).max()))).astype("<i2").tobytes())


def draw_piano_roll(midi: Path, notes: list, bars: list[float], chords: list, prompt_end: float) -> None:
    """Draw notes over seconds and pitch, darker where louder; the prompt's are orange, the others blue."""
    end = max(note.end for note in notes)
    width = min(60, max(12, end / 8))  # inches
    figure = need("matplotlib.figure").Figure((width, 4), layout="constrained")  # needs no display
    axes = figure.add_subplot()
    for label, colours in (("prompt", "Oranges"), ("PianoGPT", "Blues")):
        half = [note for note in notes if (note.time < prompt_end) == (label == "prompt")]
        shades = need("matplotlib").colormaps[colours]([0.3 + 0.7 * note.velocity / 127 for note in half])
        left, widths = [note.time for note in half], [note.duration for note in half]
        axes.barh([note.pitch for note in half], widths, left=left, height=0.9, color=shades, label=label)
    low, high = min(note.pitch for note in notes) // 12 * 12, max(note.pitch for note in notes)
    octaves = range(low, high + 12, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])  # C4 is middle C
    for second, symbol in chords:
        axes.text(second, high + 2, symbol, rotation=90, fontsize=7, va="bottom", clip_on=True)
    axes.set(xlim=(0, end), ylim=(low - 1, high + (9 if chords else 1)), xlabel="seconds", ylabel="pitch (darker is louder)")
    axes.grid(axis="y", alpha=0.3)
    axes.vlines(bars, low - 1, high + 1, color="0.75", linewidth=0.8, zorder=0)
    k = -(-len(bars) // int(2 * width))  # every k-th bar has its number: at most two an inch
    axes.secondary_xaxis("top").set(xticks=bars[::k], xticklabels=range(1, len(bars) + 1, k), xlabel="bar")
    if prompt_end:
        figure.legend(loc="outside lower right", ncols=2, fontsize="small")
    with replacing(midi.with_suffix(".png")) as path:
        figure.savefig(path, format="png", dpi=100)


def draw_losses(log: Path) -> None:
    """Draw the losses in a training log over its steps; raises UserError if it is another kind of .csv."""
    figure = need("matplotlib.figure").Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss in nats a token")
    try:
        rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))
        for column in ("train_loss", "val_loss"):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points or column == "train_loss":  # there is no val_loss in a run without validation
                axes.plot(*zip(*points), marker=".", label=f"{column}: {points[-1][1]:.3f}")
    except (OSError, LookupError, TypeError, ValueError, csv.Error):
        raise UserError(f"{log} is no training log: it needs rows of step, train_loss and val_loss") from None
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(log.with_suffix(".png")) as path:
        figure.savefig(path, format="png", dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for; 0, or 2 if there was anything that the user must mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="a piece (.mid) or a log (.csv)")
    parser.add_argument("--soundfont", metavar="FILE", help="the .sf2 or .sf3 that plays; default: no sound")
    args = parser.parse_args(argv)
    files = args.files or sorted(Path(__file__).parent.glob("*.mid"))
    if not files:
        parser.error("there is no .mid file in this script's folder: name the files")
    problems: dict[str, None] = {}
    for path in files:
        with collecting(problems):
            if not path.is_file():
                raise UserError(f"{path} is not a file: check its name")
            if path.suffix.lower() == ".csv":
                draw_losses(path)
            elif path.suffix.lower() == ".mid":
                notes, *rest = read_piece(path)
                with collecting(problems):
                    draw_piano_roll(path, notes, *rest)
                if args.soundfont:
                    write_wav(path, notes, args.soundfont)
            else:
                raise UserError(f"{path} is neither .mid nor .csv: pass pieces or training logs")
    if not args.soundfont and any(path.suffix.lower() == ".mid" for path in files):
        print(NO_SOUND)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
