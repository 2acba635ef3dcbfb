"""The music that a model writes beside the music that it learned from: the mean of each figure, in a table.

    python tests/report.py --checkpoint pianogpt.pt --bars 32 --min-p 0

Samples are compared with as long openings of up to 50 training and 50 validation pieces. The last row is how
far the means are from those of validation music, in its standard deviations: an average over the figures, but
not the known runs. Writes no samples; uses the cache of the music if there is one.
"""

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg  # noqa: E402

FLAGS = "checkpoint device midi_dir seed num_samples bars temperature top_k top_p min_p".split()


def parse(argv):
    """{setting: value} of the flags that are given, which are named as in pianogpt.py."""
    def refuse(message):
        raise pg.UserError(f"{message}; python tests/report.py --help lists the flags")

    about, layout = __doc__.split("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=layout)
    parser.error = refuse
    for f in [f for group in fields(pg.Config) for f in fields(group.default_factory) if f.name in FLAGS]:
        text = f.metadata["text"].replace("%", "%%")
        parser.add_argument(pg.flag(f.name), type=type(f.default), default=argparse.SUPPRESS, help=text)
    parser.set_defaults(num_samples=50)
    return vars(parser.parse_args(argv))


def describe(score):
    """The figures of a piece that has notes: density, range, silence."""
    notes = score.to("second").tracks[0].notes.numpy()  # by time
    start, end, pitch = notes["time"], notes["time"] + notes["duration"], notes["pitch"]
    sounded = np.maximum.accumulate(np.r_[0.0, end[:-1]])
    seconds, silence = float(end.max()), float(np.maximum(0, start - sounded).sum())
    return {"notes": len(start), "seconds": seconds, "notes_per_second": len(start) / seconds,
            "lowest": pitch.min(), "highest": pitch.max(), "silence_percent": 100 * silence / seconds}


def figures(ids, vocab, known):
    """The figures of a piece, none if it has no notes; known: names and intervals of training music, or ()."""
    score = vocab.decode(ids)
    if not score.note_num():
        return {}
    basic, parts = describe(score), [track.notes.numpy() for track in score.to("second").tracks]
    length, pitch, loud = (np.concatenate([p[k] for p in parts]) for k in ("duration", "pitch", "velocity"))
    sounding = basic["seconds"] * (1 - basic["silence_percent"] / 100)  # seconds in which anything sounds
    classes = np.unique(pitch % 12, return_counts=True)[1] / len(pitch)
    starts = [i for i, token in enumerate(ids) if token == vocab.bar] + [len(ids)]
    bars = [tuple(ids[a + 2 : b]) for a, b in zip(starts, starts[1:])]  # without Bar and TimeSig
    repeated = sum(bool(bar) and bar in bars[:n] for n, bar in enumerate(bars)) / len(bars)
    row = {"notes_per_second": basic["notes_per_second"], "polyphony": length.sum() / sounding,
           "lowest": basic["lowest"], "highest": basic["highest"],
           "pitch_class_entropy_bits": -(classes * np.log2(classes)).sum(),
           "length_mean_seconds": length.mean(), "length_spread_seconds": length.std(),
           "velocity_mean": loud.mean(), "velocity_spread": loud.std(),
           "silence_percent": basic["silence_percent"],
           "empty_bars_percent": 100 * bars.count(()) / len(bars), "repeated_bars_percent": 100 * repeated}
    if known:
        intervals = pg.pitch_intervals(np.array(ids), vocab.pitches)
        row["known_run_notes"] = pg.longest_known_run(intervals, *known)[0]
    return row


def openings(pieces, split, length, vocab):
    """Yield the ids of the first bars, at most `length` ids, of up to 50 pieces of a split."""
    pieces = [p for p in pieces if p.split == split]
    for piece in pieces[:: -(-len(pieces) // 50) or 1]:
        ids = piece.ids.tolist()
        bar_lines = [i for i, token in enumerate(ids) if token == vocab.bar and i <= length]
        yield ids[: bar_lines[-1]] if len(ids) > length and len(bar_lines) > 1 else ids


def distance(rows, others):
    """How far means of rows are from those of others, in standard deviations of others; mean over figures."""
    keys = [key for key in others[0] if not key.startswith("known")]
    ours, theirs = (np.array([[row[key] for key in keys] for row in side], float) for side in (rows, others))
    far, spread = np.abs(ours.mean(0) - theirs.mean(0)), theirs.std(0)
    return (far[spread > 0] / spread[spread > 0]).mean() if spread.any() else math.nan


def print_table(columns):
    """Print the means of columns, {name: the figures of each piece}."""
    table = {key: [np.mean([row[key] for row in rows]) if rows and key in rows[0] else math.nan
                   for rows in columns.values()] for key in columns["samples"][0]}
    if len(others := columns["validation"]) > 1:  # a single piece has no standard deviation
        table["distance_from_validation"] = [distance(r, others) if r else math.nan for r in columns.values()]
    pg.say(f"{'mean of':26}" + "".join(f"{f'{len(rows)} {name}':>16}" for name, rows in columns.items()))
    for key, values in table.items():
        pg.say(f"{key:26}" + "".join(f"{'-' if math.isnan(v) else f'{v:.2f}':>16}" for v in values))


def run(argv):
    """Draw samples, count in them and in music, and print the table."""
    given = parse(argv)
    checkpoint = pg.load_checkpoint(Path(given.get("checkpoint", pg.RunConfig.checkpoint)))
    config = pg.make_config(given, checkpoint, training=False)
    run, vocab, device = config.run, pg.Vocabulary(config.music), pg.choose_device(config.run.device)
    if checkpoint["vocabulary"] != vocab.words:
        raise pg.UserError("the checkpoint's vocabulary is not this MidiTok's: install requirements.txt")
    pieces = pg.usable_pieces(run.midi_dir, vocab, run.cache_dir if Path(run.cache_dir).is_dir() else "")
    pg.split_pieces(pieces, Path(run.midi_dir), config.data, vocab.pitches)
    known = checkpoint["pieces"], checkpoint["intervals"].numpy().tobytes()
    model = pg.load_model(checkpoint, vocab, device)
    samples = pg.generate(model, vocab, config.sample, config.train.seed, [])
    length, columns = int(np.median([len(ids) for ids in samples])), {}
    for name in ("samples", "train", "validation"):
        found = samples if name == "samples" else list(openings(pieces, name, length, vocab))
        bar = pg.progress(found, desc=name, unit="piece", leave=False)
        rows = [figures(ids, vocab, () if name == "train" else known) for ids in bar]
        columns[name] = [row for row in rows if row]
        if {} in rows:
            pg.say(f"left out: {rows.count({})} {name} without notes")
    if not columns["samples"]:
        raise pg.UserError("no sample has notes: train longer, or try another --seed or --temperature")
    print_table(columns)


def main(argv=None):
    """The program; 0, or 2 for what the user can mend."""
    try:
        return run(argv) or 0
    except (pg.UserError, OSError) as e:
        print(f"report: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may not be text
    sys.exit(main())
