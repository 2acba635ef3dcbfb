"""Make music heard and seen: a page of all pieces in a folder, and a .wav and a .png of single pieces.

python samples/listen.py                   write index.html beside this script: a page that shows and plays
                                           all .mid files there, in any browser, without a network
python samples/listen.py FOLDER            the same in another folder
python samples/listen.py samples/a.mid     write samples/a.wav and samples/a.png
python samples/listen.py pianogpt.pt.csv   draw the losses of a training run: pianogpt.pt.png

The page needs only what pianogpt.py needs. A .wav needs `pip install --no-deps tinysoundfont`, a .png needs
`pip install matplotlib`. The piano is florestan-piano.sf2, beside this script. No pedal is played.
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
from contextlib import contextmanager, suppress
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

RATE = 44_100  # samples a second
RING_OUT = 2  # seconds of sound after the last note
PEAK = 32_000  # the loudest sample of a piece; full scale is 32,767
LONGEST = 3600  # seconds; an hour of sound takes 3 GB of memory while it is written
END_OF_PROMPT = "end of prompt"  # text of the MIDI marker that pianogpt.py sets where the user's prompt ends
PIANO = Path(__file__).with_name("florestan-piano.sf2")
PITCHES = "C C# D Eb E F F# G G# A Bb B".split()


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


def read_texts(data: bytes) -> tuple[list[tuple[int, str]], dict]:
    """What pianogpt.py writes as text events into the last track: (tick, chord symbol)s, and its settings."""
    track = data.rfind(b"MTrk")
    data = data[:track] + data[track:].replace(b"\xff\x01", b"\xff\x06")  # symusic reads markers but no texts
    markers = need("symusic").Score.from_midi(data).markers
    (_, made), *chords = [(m.time, m.text) for m in markers if m.text != END_OF_PROMPT] or [(0, "")]
    ours = made.startswith("PianoGPT ")
    with suppress(ValueError, TypeError):
        return chords * ours, dict(json.loads(made[made.find("{") :] if ours else "{}"))
    return chords * ours, {}


def read_piece(path: Path) -> tuple[list, float, list[float], list, float, dict]:
    """Notes, their end, starts of bars, chords, the prompt's end (0: none), all in seconds; settings."""
    symusic = need("symusic")
    try:
        data = path.read_bytes()
        score, (chords, origin) = symusic.Score.from_midi(data), read_texts(data)
    except Exception:  # which one depends on how the file is damaged
        raise UserError(f"{path} is not a MIDI file that can be read: export it again") from None
    if not score.note_num():
        raise UserError(f"{path} holds no notes: leave it out")
    bars = find_bars(score, max(note.end for track in score.tracks for note in track.notes))
    prompt_end = next((marker.time for marker in score.markers if marker.text == END_OF_PROMPT), 0)
    score.markers = [symusic.TextMeta(tick, "") for tick in [*(t for t, _ in chords), *bars, prompt_end]]
    score = score.to("second")  # also the markers
    notes = [note for track in score.tracks for note in track.notes]
    end = max(note.end for note in notes)
    if not 0 < end <= LONGEST:  # also if it is NaN, from 0 ticks per quarter
        raise UserError(f"{path} does not last between 0 and {LONGEST} seconds: cut it or mend its tempo")
    *times, prompt_end = [marker.time for marker in score.markers]
    chords = [(time, symbol) for time, (_, symbol) in zip(times, chords)]
    return notes, end, times[len(chords) :], chords, prompt_end, origin


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


def draw_piano_roll(midi: Path, piece: tuple) -> None:
    """Draw notes over seconds and pitch, darker where louder; the prompt's are orange, the others blue."""
    notes, end, bars, chords, prompt_end, _ = piece
    width = min(60, max(12, end / 8))  # inches
    figure = need("matplotlib.figure").Figure((width, 4), layout="constrained")  # needs no display
    axes = figure.add_subplot(xlabel="seconds", ylabel="pitch (darker is louder)")
    for label, colors in (("prompt", "Oranges"), ("PianoGPT", "Blues")):
        half = [note for note in notes if (note.time < prompt_end) == (label == "prompt")]
        shades = need("matplotlib").colormaps[colors]([0.3 + 0.7 * note.velocity / 127 for note in half])
        left, widths = [note.time for note in half], [note.duration for note in half]
        axes.barh([note.pitch for note in half], widths, left=left, height=0.9, color=shades, label=label)
    low, high = min(note.pitch for note in notes) // 12 * 12, max(note.pitch for note in notes)
    octaves = range(low, high + 12, 12)
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])  # C4 is middle C
    for second, symbol in chords:
        axes.text(second, high + 2, symbol, rotation=90, fontsize=7, va="bottom", clip_on=True)
    axes.set(xlim=(0, end), ylim=(low - 1, high + (9 if chords else 1)))
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


def read_piano() -> dict:
    """The shipped soundfont for the page: its 16-bit samples in base64, and numbers for each zone of keys."""
    if not PIANO.exists():
        raise UserError(f"{PIANO} is missing: copy it from the project again")
    data, zones, zone = PIANO.read_bytes(), [], {}
    starts = [data.index(name) + 8 for name in (b"smpl", b"igen", b"shdr")]
    samples, generators, headers = (data[i : i + int.from_bytes(data[i - 4 : i], "little")] for i in starts)
    for number, amount in struct.iter_unpack("<Hh", generators):
        zone[number] = amount
        if number == 53:  # the sample, the last of a zone; 43: keys, 48: attenuation, 36: decay, 38: release
            first, _, loop, end, rate, root, cents = struct.unpack_from("<5IBb", headers, 46 * amount + 20)
            fades = [math.exp(-9.226 / 2 ** (zone[n] / 1200) / RATE) for n in (36, 38)]  # to -80 dB
            numbers = [*fades, first, loop, end, rate, root - cents / 100]
            zones.append([zone[43] >> 8 & 127, 10 ** (-zone[48] / 200), *numbers])
    return {"samples": base64.b64encode(samples).decode(), "zones": zones}


def draw_svg(piece: tuple) -> str:
    """The piano roll, with chords above and bar numbers below; the page plays the notes that it draws."""
    notes, end, bars, chords, prompt_end, _ = piece
    pitches = [note.pitch for note in notes]
    low, high = min(pitches) // 12 * 12 - 1, max(pitches) + 1
    gap = min((b[0] - a[0] for a, b in pairwise(chords)), default=1)
    scale = max(1118 / end, min(50, max(20, 11 / max(gap, 0.1))))  # pixels a second
    top, height = 46 if chords else 10, 4 * (high - low)
    grid = [f"M{1000 * bar:.0f} {127 - high}v{high - low}" for bar in bars]  # milliseconds; 127 - pitch
    paths = {'class="grid"': grid + [f"M0 {127 - c}h{1000 * end:.0f}" for c in range(low + 1, high, 12)]}
    for n in notes:
        kind = f'class="note{" prompt" * (n.time < prompt_end)}" opacity=".{30 + n.velocity // 2}"'
        path = f"M{1000 * n.time:.0f} {127 - n.pitch}h{1000 * n.duration:.0f}"
        paths.setdefault(f'{kind} data-velocity="{n.velocity}"', []).append(path)
    texts = [(f"2 {top + 4 * (high - c) - 2}", f"C{c // 12 - 1}") for c in range(low + 1, high, 12)]
    texts += [(f"{scale * time + 8:.0f} {top - 2})rotate(-90", escape(symbol)) for time, symbol in chords]
    k = -(-30 * len(bars) // int(scale * end))  # every k-th bar has its number: one every 30 pixels
    texts += [(f"{scale * bar + 2:.0f} {top + height + 11}", 1 + i * k) for i, bar in enumerate(bars[::k])]
    return f"""<svg role="img" aria-label="Piano roll" width="{scale * end:.0f}" height="{top + height + 14}">
<g stroke-width=".9" transform="translate(0 {top}) scale({scale / 1000} 4) translate(0 {high - 127})">
{"".join(f'<path {kind} d="{"".join(path)}"/>' for kind, path in paths.items())}</g>
{"".join(f'<text transform="translate({at})">{t}</text>' for at, t in texts)}<rect height="100%"/></svg>"""


def make_article(name: str, piece: tuple) -> str:
    """The piece as HTML: its figures, its piano roll, a player and the settings that wrote it."""
    notes, end, bars, *_, origin = piece
    pitches = [pick(note.pitch for note in notes) for pick in (min, max)]
    facts = f"{len(notes)} notes · {end:.1f} seconds · {len(notes) / end:.1f} notes/s · {len(bars)} bars · "
    facts += " to ".join(f"{PITCHES[pitch % 12]}{pitch // 12 - 1}" for pitch in pitches)
    facts += f" · {origin['key']}" if "key" in origin else ""
    made = [f"{k.replace('_', ' ')} {v}" for k, v in origin.items() if k == "seed" or v and k != "key"]
    return f"""<article data-seconds="{end}"><h2>{escape(name)}</h2><p>{escape(facts)}</p>
<div tabindex="0">{draw_svg(piece)}</div><audio controls aria-label="{escape(name)}"></audio>
<details><summary>Settings</summary><p>{escape(", ".join(made)) or "not in it"}</p></details></article>"""


def write_page(folder: Path, problems: dict[str, None]) -> None:
    """Write folder/index.html, which shows and plays the .mid files of the folder; raises UserError."""
    articles, piano = [], json.dumps(read_piano() | {"rate": RATE, "ringOut": RING_OUT, "peak": PEAK})
    for midi in sorted(folder.glob("*.[Mm][Ii][Dd]")):
        with collecting(problems):
            articles.append(make_article(midi.stem, read_piece(midi)))
    if not articles:
        raise UserError(f"{folder} holds no .mid file to play: name another folder, or write pieces into it")
    with replacing(folder / "index.html") as path:
        path.write_bytes((PAGE % ("\n".join(articles), piano)).encode("utf-8", "xmlcharrefreplace"))


def main(argv: list[str] | None = None) -> int:
    """Write what the command line asks for; 0, or 2 if there was anything that the user must mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="folder, .mid or .csv")
    parser.add_argument("--soundfont", metavar="FILE", help="another .sf2 or .sf3 that plays the .wav files")
    args = parser.parse_args(argv)
    if args.soundfont and not any(path.suffix.lower() == ".mid" for path in args.files):
        parser.error("--soundfont plays single pieces into .wav files: name the .mid files")
    problems: dict[str, None] = {}
    for path in args.files or [Path(__file__).parent]:
        with collecting(problems):
            if path.is_dir():
                write_page(path, problems)
            elif not path.is_file():
                raise UserError(f"{path} is not a file: check its name")
            elif path.suffix.lower() == ".csv":
                draw_losses(path)
            elif path.suffix.lower() == ".mid":
                piece = read_piece(path)
                with collecting(problems):
                    draw_piano_roll(path, piece)
                write_wav(path, piece[0], args.soundfont or str(PIANO))
            else:
                raise UserError(f"{path} is neither .mid nor .csv: pass pieces or training logs")
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 2 if problems else 0


PAGE = """<!doctype html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src data: blob: 'unsafe-inline'">
<title>Music by PianoGPT</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --line: #0002; --note: #1764ab; --prompt: #d9480f }
  @media (prefers-color-scheme: dark) { :root { --line: #fff3; --note: #6fb7ff; --prompt: #ff9a5c } }
  body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 0 1rem 3rem }
  h2 { margin: 2.5rem 0 0; font-size: 1.2rem; overflow-wrap: anywhere } p { margin: .2rem 0 .6rem }
  div { overflow-x: auto; border: 1px solid var(--line) } audio { width: 100%%; margin: .5rem 0 }
  svg { display: block; cursor: pointer } text { font-size: 10px; fill: currentColor }
  .grid { stroke: var(--line); vector-effect: non-scaling-stroke } .note { stroke: var(--note) }
  .prompt { stroke: var(--prompt); color: var(--prompt) } rect { fill: red; width: 2px }
</style>
<h1>Music by PianoGPT</h1>
<p>Click in a picture to go there. Strong color is loud, <span class="prompt">orange</span> the prompt.</p>
<noscript>JavaScript is off, and it plays the notes.</noscript>
%s
<script type="application/json" id="piano">%s</script>
<script>
const { rate, ringOut, peak, zones, ...piano } = JSON.parse(document.getElementById("piano").textContent)
const samples = new Int16Array(Uint8Array.from(atob(piano.samples), c => c.charCodeAt(0)).buffer)
const toSample = ms => Math.round(ms / 1000 * rate)

function strike(sound, start, end, pitch, velocity) {  // add a note, by the arithmetic of soundfont players
  const [, gain, held, released, first, loop, loopEnd, sampleRate, root] = zones.find(([top]) => pitch <= top)
  const step = sampleRate / rate * 2 ** ((pitch - root) / 12), stop = end + rate  // a second after its end
  for (let i = start, at = first, level = gain * velocity; i < stop; i++) {
    const k = at | 0
    sound[i] += level * (samples[k] + (at - k) * (samples[k + 1] - samples[k]))
    level *= i < end ? held : released
    if ((at += step) >= loopEnd) at -= loopEnd - loop
  }
}

function play(svg, seconds) {  // the notes as a .wav file
  const sound = new Float32Array(Math.round((seconds + ringOut) * rate)), size = 2 * sound.length
  for (const path of svg.querySelectorAll(".note"))
    for (const [, on, down, length] of path.getAttribute("d").matchAll(/M(\\d+) (\\d+)h(\\d+)/g))
      strike(sound, toSample(+on), toSample(+on + +length), 127 - down, path.dataset.velocity)
  const loudest = sound.reduce((most, x) => Math.max(most, x, -x), 1)
  const format = [0x20746d66, 16, 0x10001, rate, 2 * rate, 0x100002]  // "fmt ", one channel, 16 bits
  const head = Uint32Array.of(0x46464952, 36 + size, 0x45564157, ...format, 0x61746164, size)  // "RIFF"
  return new Blob([head, new Int16Array(sound.map(x => x * peak / loudest))], { type: "audio/wav" })
}

for (const article of document.querySelectorAll("article")) {
  const [box, svg, cursor, audio] = ["div", "svg", "rect", "audio"].map(tag => article.querySelector(tag))
  const seconds = +article.dataset.seconds, width = svg.width.baseVal.value
  const show = () => {
    const x = Math.min(1, audio.currentTime / seconds) * width, left = x - box.scrollLeft
    cursor.setAttribute("x", x - 1)
    if (left < 0 || left > 0.9 * box.clientWidth) box.scrollLeft = x - 0.1 * box.clientWidth
    if (!audio.paused) requestAnimationFrame(show)
  }
  audio.onseeking = () => audio.paused && show()
  audio.onplay = () => { document.querySelectorAll("audio").forEach(a => a === audio || a.pause()); show() }
  svg.onclick = e => { audio.currentTime = (e.clientX - svg.getBoundingClientRect().left) / width * seconds }
  new IntersectionObserver(([{ isIntersecting }]) => {
    if (isIntersecting && !audio.src) audio.src = URL.createObjectURL(play(svg, seconds))
  }, { rootMargin: "300px" }).observe(audio)
}
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
