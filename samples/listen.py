# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["symusic>=0.6.0,<0.7", "numpy>=2.0,<3"]
# ///
"""Hear and see MIDI files: a page of all pieces in a folder, sound and a picture of single ones.

python samples/listen.py                write index.html beside this script: a page that shows and
                                        plays all .mid files there, in any browser, offline
python samples/listen.py FOLDER         the same in another folder
python samples/listen.py samples/a.mid  write samples/a.wav, a.ogg, a.mp3 and a.png
python samples/listen.py pianogpt.safetensors.csv
                                        draw the losses of a training run, or draw them again:
                                        pianogpt.safetensors.png

The page needs only what pianogpt.py needs. A .wav needs `pip install --no-deps tinysoundfont`, .ogg
and .mp3 also need `pip install soundfile`, a .png needs `pip install matplotlib`. The piano is
florestan-piano.sf2, beside this script; --soundfont takes another. No pedal is played.
"""

import argparse
import base64
import csv
import importlib
import json
import math
import struct
import sys
import wave
from bisect import bisect_right
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

RATE = 44_100  # samples a second
RING_OUT = 2  # seconds of sound after the last note
PEAK = 32_000  # the loudest sample of a piece; full scale is 32,767
# The room is a tail of noise: seconds in which it decays by 60 dB, and its level beside the piano's
ROOM_SECONDS = 1.2
ROOM_LEVEL = 0.12
SUFFIXES = (".mid", ".midi", ".kar")
MOST_BARS = 20_000  # one every fifth of a second for an hour
LONGEST = 3600  # seconds; an hour of sound takes 3 GB of memory while it is written
TITLE = "<title>Music by PianoGPT</title>"  # of the page
# The markers that pianogpt.py sets: what made the piece, as JSON, and where the user's prompt gives
# way to new music and comes back. Its other markers are chord symbols.
MADE_BY = "PianoGPT "
TURNS = ("end of prompt", "prompt goes on")
PIANO = Path(__file__).with_name("florestan-piano.sf2")
PITCHES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"]


class UserError(Exception):
    """A mistake that the user can fix; its text is one sentence that says how."""


@dataclass
class Piece:
    """A .mid file; all times are in seconds."""

    notes: list  # symusic's, with time, end, duration, pitch and velocity
    end: float  # of the last note
    bars: list[float]  # where they begin
    chords: list[tuple[float, str]]
    turns: list[float]  # where the prompt ends, goes on, ends again, ...; empty: there is none
    origin: dict  # the settings of pianogpt.py that wrote it

    def is_prompt(self, note) -> bool:
        """Whether a note belongs to the user's prompt."""
        return bool(self.turns) and bisect_right(self.turns, note.time) % 2 == 0


def need(module: str, options: str = ""):
    """The imported module; raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(f"{library} is not installed: run pip install {options}{library}") from None


@contextmanager
def collecting(problems: dict[str, None]):
    """A block that an error ends, after which its text is a key of problems: once for many."""
    try:
        yield
    except UserError as error:
        problems[str(error)] = None
    except OSError as error:
        name = error.filename or "a library"
        problems[f"{name} cannot be used: {error.strerror or error}"] = None


@contextmanager
def replacing(path: Path):
    """A temporary path that becomes path after the block, or is deleted if the block fails."""
    part = path.with_name(path.name + ".tmp")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another folder"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # nobody reads what is printed
        print(f"wrote {path}", flush=True)


def find_bars(score, end: int) -> list[int]:
    """The ticks before end at which bars begin; raises UserError if there are too many.

    Each time signature begins one, and without one it is 4/4.
    """
    whole = 4 * score.ticks_per_quarter
    sizes = {0: whole}
    for signature in score.time_signatures:
        sizes[signature.time] = whole * signature.numerator // (signature.denominator or 1)
    changes = [tick for tick in sorted(sizes) if tick < end]
    bars = []
    for first, next_change in pairwise([*changes, end]):
        stretch = range(first, next_change, sizes[first] or 1)
        if len(bars) + len(stretch) > MOST_BARS:
            raise UserError(f"has more than {MOST_BARS:,} bars")
        bars += stretch
    return bars


def read_texts(markers) -> tuple[list[tuple[int, str]], dict]:
    """(tick, chord symbol)s and settings in the markers of a piece; nothing if it is not ours."""
    chords = []
    made = ""
    for marker in markers:
        if marker.text.startswith(MADE_BY):
            made = marker.text
        elif marker.text not in TURNS:
            chords.append((marker.time, marker.text))
    if not made:
        return [], {}
    with suppress(ValueError, RecursionError):
        origin = json.loads(made.removeprefix(MADE_BY))
        return chords, origin if isinstance(origin, dict) else {}
    return chords, {}


def in_seconds(ticks: list[int], score) -> list[float]:
    """The same times in seconds, by the tempos of a score."""
    symusic = need("symusic")
    clock = symusic.Score(score.ticks_per_quarter)
    clock.tempos = score.tempos
    clock.markers = [symusic.TextMeta(tick, "") for tick in ticks]
    return [marker.time for marker in clock.to("second").markers]


def all_notes(score) -> list:
    """The notes of all tracks but the drums."""
    notes = []
    for track in score.tracks:
        if not track.is_drum:
            notes += track.notes
    return notes


def read_piece(path: Path) -> Piece:
    """A .mid file; raises OSError, or UserError if it is damaged or has no notes."""
    symusic = need("symusic")
    data = path.read_bytes()
    try:
        score = symusic.Score.from_midi(data)
    except Exception:  # which one depends on how the file is damaged
        raise UserError(f"{path} is not a MIDI file that can be read: export it again") from None
    notes = all_notes(score.to("second"))
    if not notes:
        raise UserError(f"{path} holds no notes: leave it out")
    end = max(note.end for note in notes)
    if not 0 < end <= LONGEST:  # also if it is NaN, from 0 ticks per quarter
        raise UserError(f"{path} is empty or longer than an hour: shorten it or fix its tempo")
    end_tick = max(note.end for note in all_notes(score))
    try:
        bars = find_bars(score, end_tick)
    except UserError as e:
        raise UserError(f"{path} {e}: fix its time signatures") from None
    chords, origin = read_texts(score.markers)
    chord_times = in_seconds([tick for tick, _ in chords], score)
    turns = [marker.time for marker in score.markers if marker.text in TURNS]
    return Piece(
        notes=notes,
        end=end,
        bars=in_seconds(bars, score),
        chords=list(zip(chord_times, (symbol for _, symbol in chords), strict=True)),
        turns=in_seconds(turns, score),
        origin=origin,
    )


@cache  # loading takes seconds
def load_soundfont(path: str):
    """A tinysoundfont.Synth and the soundfont that it plays; raises UserError."""
    synth = need("tinysoundfont", "--no-deps ").Synth(samplerate=RATE)
    try:
        return synth, synth.soundfonts[synth.sfload(path)]
    except RuntimeError:
        raise UserError(
            f"{path} is not a soundfont that can be read: pass another --soundfont"
        ) from None


def add_room(sound):
    """Sound (frames, 2) as it is heard in a small hall: with a tail of noise that dies away."""
    np = need("numpy")
    frames = round(ROOM_SECONDS * RATE)
    noise = np.random.default_rng(0).standard_normal((frames, 2))
    noise *= 10 ** (-3 * np.arange(frames) / frames)[:, None]
    noise *= ROOM_LEVEL / np.sqrt((noise**2).sum(0))
    # The tail of each part of the sound is added to what follows: all at once takes 13 GB an hour.
    size = 2 ** (2 * frames).bit_length()
    step = size - frames
    spectrum = np.fft.rfft(noise, size, axis=0)
    heard = np.zeros((len(sound) + frames, 2), np.float32)
    heard[: len(sound)] = sound
    for begin in range(0, len(sound), step):
        of_part = np.fft.rfft(sound[begin : begin + step], size, axis=0)
        tail = np.fft.irfft(of_part * spectrum, size, axis=0)
        end = min(begin + size, len(heard))
        heard[begin:end] += tail[: end - begin]
    return heard[: len(sound)]


def synthesize(notes: list, soundfont: str, has_room: bool):
    """The notes of a piece on the first preset of a soundfont: 16-bit sound (frames, 2)."""
    synth, instrument = load_soundfont(soundfont)
    np = need("numpy")
    events = need("tinysoundfont.midi")
    sequencer = need("tinysoundfont").Sequencer(synth)
    instrument.reset()  # stop what still rings of the last piece
    synth.generate_simple(RATE // 10)  # which takes it 10 ms
    instrument.channel_set_preset_index(0, 0)
    # Sequencer.midi_load would lose up to 1 ms at each change of tempo, and generate rounds its
    # steps up to whole samples, 9 ms in 700 notes: so these are symusic's times, on whole samples.
    steps = [(note.time, events.NoteOn(note.pitch, note.velocity)) for note in notes]
    steps += [(note.end, events.NoteOff(note.pitch)) for note in notes]  # of two, the older ends
    steps.sort(key=lambda step: step[0])
    on_samples = [(round(second * RATE) / RATE, action) for second, action in steps]
    sequencer.add([events.Event(action, at, persistent=False) for at, action in on_samples])
    length = round((steps[-1][0] + RING_OUT) * RATE)
    sound = np.frombuffer(synth.generate(length), np.float32).reshape(-1, 2)
    if has_room:
        sound = add_room(sound)
    return (sound * (PEAK / max(1e-9, np.abs(sound).max()))).astype("<i2")


def write_wav(midi: Path, sound) -> None:
    """Write stereo sound beside a .mid file."""
    with replacing(midi.with_suffix(".wav")) as path, wave.open(str(path), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes(sound.tobytes())


def write_compressed(midi: Path, sound) -> None:
    """Write mono .ogg and .mp3 files beside a .mid file, about 8 kB a second."""
    soundfile = need("soundfile")
    for suffix, form, kind in ((".ogg", "OGG", "VORBIS"), (".mp3", "MP3", "MPEG_LAYER_III")):
        path = midi.with_suffix(suffix)
        with replacing(path) as part, part.open("wb") as out:
            try:
                with soundfile.SoundFile(
                    out, "w", RATE, 1, kind, format=form, compression_level=0.8
                ) as file:
                    for begin in range(0, len(sound), RATE):  # all at once crashes Vorbis
                        file.write(sound[begin : begin + RATE].mean(axis=1) / 2**15)
            except soundfile.LibsndfileError as error:
                raise UserError(f"{path} cannot be written ({error.error_string})") from None


def draw_notes(axes, notes: list, label: str, colors: str) -> None:
    """Draw notes as bars over seconds and pitch, darker where louder."""
    shades = need("matplotlib").colormaps[colors]
    axes.barh(
        [note.pitch for note in notes],
        [note.duration for note in notes],
        left=[note.time for note in notes],
        height=0.9,
        color=shades([0.3 + 0.7 * note.velocity / 127 for note in notes]),
        label=label,
    )


def draw_piano_roll(midi: Path, piece: Piece) -> None:
    """Draw the notes over seconds and pitch; the prompt's are orange, the others blue."""
    width = min(60, max(12, piece.end / 8))  # inches
    figure = need("matplotlib.figure").Figure((width, 4), layout="constrained")  # on no display
    axes = figure.add_subplot(xlabel="seconds", ylabel="pitch (darker is louder)")
    prompt = [note for note in piece.notes if piece.is_prompt(note)]
    new = [note for note in piece.notes if not piece.is_prompt(note)]
    draw_notes(axes, prompt, "prompt", "Oranges")
    draw_notes(axes, new, "PianoGPT", "Blues")
    low = min(note.pitch for note in piece.notes) // 12 * 12
    high = max(note.pitch for note in piece.notes)
    octaves = range(low, high + 12, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])  # C4 is middle C
    for second, symbol in piece.chords:
        look = {"rotation": 90, "fontsize": 7, "va": "bottom", "clip_on": True}
        axes.text(second, high + 2, symbol, parse_math=False, **look)
    axes.set(xlim=(0, piece.end), ylim=(low - 1, high + (9 if piece.chords else 1)))
    axes.grid(axis="y", alpha=0.3)
    axes.vlines(piece.bars, low - 1, high + 1, color="0.75", linewidth=0.8, zorder=0)
    n = len(piece.bars)
    k = math.ceil(n / int(2 * width))  # every k-th bar has its number: at most two an inch
    axes.secondary_xaxis("top").set(
        xticks=piece.bars[::k], xticklabels=range(1, n + 1, k), xlabel="bar"
    )
    if piece.turns:
        figure.legend(loc="outside lower right", ncols=2, fontsize="small")
    with replacing(midi.with_suffix(".png")) as path:
        figure.savefig(path, format="png", dpi=100)


def draw_losses(log: Path) -> None:
    """Draw the losses in a training log over its steps; raises UserError if it is no such log."""
    figure = need("matplotlib.figure").Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss in nats a token")
    try:
        rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))
        for column in ("train_loss", "val_loss"):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points or column == "train_loss":  # a run without validation has no val_loss
                label = f"{column}: {points[-1][1]:.3f}"
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
    except (OSError, LookupError, TypeError, ValueError, OverflowError, csv.Error):
        raise UserError(
            f"{log} is no training log: it needs rows of step, train_loss and val_loss"
        ) from None
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(log.with_suffix(".png")) as path:
        figure.savefig(path, format="png", dpi=100)


def read_piano() -> dict:
    """The shipped soundfont for the page: its 16-bit samples in base64, numbers for each zone."""
    if not PIANO.exists():
        raise UserError(f"{PIANO} is missing: copy it from the project again")
    data = PIANO.read_bytes()

    def chunk(name: bytes) -> bytes:
        start = data.index(name) + 8
        return data[start : start + int.from_bytes(data[start - 4 : start], "little")]

    headers = chunk(b"shdr")
    zones = []
    zone = {}
    for number, amount in struct.iter_unpack("<Hh", chunk(b"igen")):
        zone[number] = amount
        if number == 53:  # the sample, which ends a zone of keys
            sample = struct.unpack_from("<5IBb", headers, 46 * amount + 20)
            first, _, loop, end, rate, root, cents = sample
            highest_key = zone[43] >> 8 & 127
            gain = 10 ** (-zone[48] / 200)  # 48: attenuation
            held = math.exp(-9.226 / 2 ** (zone[36] / 1200) / RATE)  # 36: decay to -80 dB
            released = math.exp(-9.226 / 2 ** (zone[38] / 1200) / RATE)
            numbers = [highest_key, gain, held, released, first, loop, end, rate]
            zones.append([*numbers, root - cents / 100])
    return {"samples": base64.b64encode(chunk(b"smpl")).decode(), "zones": zones}


def svg_paths(piece: Piece, low: int, high: int) -> list[str]:
    """The grid and the notes as SVG, x in milliseconds and y 127 - pitch.

    Notes of equal color are one path. The page plays them from here.
    """
    grid = [f"M{1000 * bar:.0f} {127 - high}v{high - low}" for bar in piece.bars]
    grid += [f"M0 {127 - c}h{1000 * piece.end:.0f}" for c in range(low + 1, high, 12)]
    paths = {'class="grid"': grid}
    for n in piece.notes:
        kind = "note prompt" if piece.is_prompt(n) else "note"
        look = f'class="{kind}" opacity=".{30 + n.velocity // 2}" data-velocity="{n.velocity}"'
        step = f"M{1000 * n.time:.0f} {127 - n.pitch}h{1000 * n.duration:.0f}"
        paths.setdefault(look, []).append(step)
    return [f'<path {look} d="{"".join(steps)}"/>' for look, steps in paths.items()]


def draw_svg(piece: Piece) -> str:
    """The piano roll, with chords above and bar numbers below."""
    pitches = [note.pitch for note in piece.notes]
    low = min(pitches) // 12 * 12 - 1
    high = max(pitches) + 1
    gap = min((b[0] - a[0] for a, b in pairwise(piece.chords)), default=1)
    scale = max(1118 / piece.end, min(50, max(20, 11 / max(gap, 0.1))))  # pixels a second
    top = 46 if piece.chords else 10
    height = 4 * (high - low)
    texts = []
    for c in range(low + 1, high, 12):
        texts.append((f"translate(2 {top + 4 * (high - c) - 2})", f"C{c // 12 - 1}"))
    for second, symbol in piece.chords:
        x = scale * second + 8
        texts.append((f"translate({x:.0f} {top - 2}) rotate(-90)", escape(symbol)))
    k = math.ceil(30 * len(piece.bars) / int(scale * piece.end))  # a number every 30 pixels
    for i in range(0, len(piece.bars), k):
        x = scale * piece.bars[i] + 2
        texts.append((f"translate({x:.0f} {top + height + 11})", i + 1))
    labels = [f'<text transform="{at}">{text}</text>' for at, text in texts]
    size = f'width="{scale * piece.end:.0f}" height="{top + height + 14}"'
    move = f"translate(0 {top}) scale({scale / 1000} 4) translate(0 {high - 127})"
    return f"""<svg role="img" aria-label="Piano roll" {size}>
<g stroke-width=".9" transform="{move}">
{"".join(svg_paths(piece, low, high))}</g>
{"".join(labels)}<rect height="100%"/></svg>"""


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch; C4 is middle C."""
    return f"{PITCHES[pitch % 12]}{pitch // 12 - 1}"


def make_article(name: str, piece: Piece) -> str:
    """The piece as HTML: its figures, its piano roll, a player and the settings that wrote it."""
    pitches = [note.pitch for note in piece.notes]
    facts = [
        f"{len(pitches)} notes",
        f"{piece.end:.1f} seconds",
        f"{len(pitches) / piece.end:.1f} notes/s",
        f"{len(piece.bars)} bars",
        f"{pitch_name(min(pitches))} to {pitch_name(max(pitches))}",
    ]
    made = []
    for key, value in piece.origin.items():
        if key == "key":
            facts.append(str(value))
        elif key == "style" and value:
            facts.append(f"in the style of {value}")
        elif value or key == "seed":  # what is off needs no mention, but seed 0 does
            made.append(f"{key.replace('_', ' ')} {value}")
    settings = ", ".join(made) or "not stored in this file"
    return f"""<article data-seconds="{piece.end}"><h2>{escape(name)}</h2>
<p>{escape(" · ".join(facts))}</p>
<div tabindex="0">{draw_svg(piece)}</div><audio controls aria-label="{escape(name)}"></audio>
<details><summary>Settings</summary><p>{escape(settings)}</p></details>
</article>"""


def write_page(folder: Path, problems: dict[str, None]) -> None:
    """Write folder/index.html, which shows and plays the .mid files there; raises UserError."""
    piano = json.dumps(read_piano() | {"rate": RATE, "ringOut": RING_OUT, "peak": PEAK})
    articles = []
    for midi in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        with collecting(problems):
            articles.append(make_article(midi.stem, read_piece(midi)))
    if not articles:
        raise UserError(
            f"{folder} holds no .mid file that can be played: name another folder, or write pieces "
            "into it"
        )
    page = PAGE % ("\n".join(articles), piano)
    place = folder / "index.html"
    if place.exists() and TITLE.encode() not in place.read_bytes():
        raise UserError(f"{place} is another page: move it, or name another folder")
    with replacing(place) as path:
        path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))


def refuse_taken(midi: Path) -> None:
    """Raise UserError if a file that would be written beside a .mid file is there."""
    for suffix in (".png", ".wav", ".ogg", ".mp3"):
        path = midi.with_suffix(suffix)
        if path.exists():
            raise UserError(f"{path} is there already: move it, or pass --overwrite")


def process(path: Path, args: argparse.Namespace, problems: dict[str, None]) -> None:
    """Write the page of a folder, the sound and picture of a piece, or the picture of a log.

    Raises UserError.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        write_page(path, problems)
    elif not path.is_file():
        raise UserError(f"{path} is not a file: check its name")
    elif suffix == ".csv":
        draw_losses(path)
    elif suffix in SUFFIXES:
        if not args.overwrite:
            refuse_taken(path)
        piece = read_piece(path)
        with collecting(problems):
            draw_piano_roll(path, piece)
        sound = synthesize(piece.notes, args.soundfont or str(PIANO), not args.dry)
        write_wav(path, sound)
        write_compressed(path, sound)
    else:
        raise UserError(
            f"{path} is neither .mid, .midi, .kar nor .csv: pass pieces or training logs"
        )


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for; 0, or 2 if there was anything for the user to fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="folder, .mid or .csv")
    parser.add_argument(
        "--soundfont", metavar="FILE", help="another .sf2 or .sf3 that plays the sound files"
    )
    parser.add_argument("--dry", action="store_true", help="no room around the piano")
    parser.add_argument("--overwrite", action="store_true", help="replace sound and pictures")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not text
    is_of_pieces = args.soundfont or args.dry or args.overwrite
    if is_of_pieces and not any(path.suffix.lower() in SUFFIXES for path in args.files):
        parser.error("--soundfont, --dry and --overwrite are for single pieces: name .mid files")
    problems: dict[str, None] = {}
    for path in args.files or [Path(__file__).parent]:
        with collecting(problems):
            process(path, args, problems)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 2 if problems else 0


PAGE = """<!doctype html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src data: blob: 'unsafe-inline'">
<title>Music by PianoGPT</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --line: #0002; --note: #1764ab; --prompt: #d9480f }
  @media (prefers-color-scheme: dark) {
    :root { --line: #fff3; --note: #6fb7ff; --prompt: #ff9a5c }
  }
  body { font: 16px/1.45 system-ui, sans-serif }
  body { max-width: 70rem; margin: 0 auto; padding: 0 1rem 3rem }
  h2 { margin: 2.5rem 0 0; font-size: 1.2rem; overflow-wrap: anywhere } p { margin: .2rem 0 .6rem }
  div { overflow-x: auto; border: 1px solid var(--line) } audio { width: 100%%; margin: .5rem 0 }
  svg { display: block; cursor: pointer } text { font-size: 10px; fill: currentColor }
  .grid { stroke: var(--line); vector-effect: non-scaling-stroke } .note { stroke: var(--note) }
  .prompt { stroke: var(--prompt); color: var(--prompt) } rect { fill: red; width: 2px }
</style>
<h1>Music by PianoGPT</h1>
<p>Click in a picture to move to that point. Stronger notes are louder;
<span class="prompt">orange</span> ones are the prompt.</p>
<noscript>Turn on JavaScript to hear the pieces.</noscript>
%s
<script type="application/json" id="piano">%s</script>
<script>
const text = document.getElementById("piano").textContent
const { rate, ringOut, peak, zones, ...piano } = JSON.parse(text)
const samples = new Int16Array(Uint8Array.from(atob(piano.samples), c => c.charCodeAt(0)).buffer)
const toSample = ms => Math.round(ms / 1000 * rate)

// Add a note, by the arithmetic of soundfont players.
function strike(sound, start, end, pitch, velocity) {
  const zone = zones.find(([top]) => pitch <= top)
  const [, gain, held, released, first, loop, loopEnd, sampleRate, root] = zone
  const step = sampleRate / rate * 2 ** ((pitch - root) / 12)
  const stop = end + rate  // a second after its end
  for (let i = start, at = first, level = gain * velocity; i < stop; i++) {
    const k = at | 0
    sound[i] += level * (samples[k] + (at - k) * (samples[k + 1] - samples[k]))
    level *= i < end ? held : released
    if ((at += step) >= loopEnd) at -= loopEnd - loop
  }
}

async function synthesize(svg, seconds) {  // the notes as a .wav file
  let due = performance.now() + 20  // ms; then the browser has its turn
  const sound = new Float32Array(Math.round((seconds + ringOut) * rate))
  const size = 2 * sound.length  // bytes
  for (const path of svg.querySelectorAll(".note"))
    for (const [, on, down, length] of path.getAttribute("d").matchAll(/M(\\d+) (\\d+)h(\\d+)/g)) {
      strike(sound, toSample(+on), toSample(+on + +length), 127 - down, path.dataset.velocity)
      if (performance.now() > due) {
        await new Promise(done => setTimeout(done))
        due = performance.now() + 20
      }
    }
  const loudest = sound.reduce((most, x) => Math.max(most, x, -x), 1)
  // "RIFF", "WAVE", "fmt ": one channel of 16 bits, "data"
  const format = [0x20746d66, 16, 0x10001, rate, 2 * rate, 0x100002]
  const head = Uint32Array.of(0x46464952, 36 + size, 0x45564157, ...format, 0x61746164, size)
  const scaled = new Int16Array(sound.map(x => x * peak / loudest))
  return new Blob([head, scaled], { type: "audio/wav" })
}

for (const article of document.querySelectorAll("article")) {
  const tags = ["div", "svg", "rect", "audio"]
  const [box, svg, cursor, audio] = tags.map(tag => article.querySelector(tag))
  const seconds = +article.dataset.seconds
  const width = svg.width.baseVal.value
  const show = () => {
    const x = Math.min(1, audio.currentTime / seconds) * width
    const left = x - box.scrollLeft
    cursor.setAttribute("x", x - 1)
    if (left < 0 || left > 0.9 * box.clientWidth) box.scrollLeft = x - 0.1 * box.clientWidth
    if (!audio.paused) requestAnimationFrame(show)
  }
  audio.onseeking = () => { if (audio.paused) show() }
  audio.onplay = () => {
    for (const other of document.querySelectorAll("audio"))
      if (other !== audio) other.pause()
    show()
  }
  svg.onclick = e => {
    const x = e.clientX - svg.getBoundingClientRect().left
    audio.currentTime = x / width * seconds
  }
  let isMade = false
  new IntersectionObserver(async changes => {
    if (isMade || !changes.at(-1).isIntersecting) return
    isMade = true
    audio.src = URL.createObjectURL(await synthesize(svg, seconds))
  }, { rootMargin: "300px" }).observe(audio)
}
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
