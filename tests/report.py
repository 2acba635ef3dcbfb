"""How far the music that a model writes is from held-out music, and how far held-out music is from itself.

    python tests/report.py --checkpoint pianogpt.pt --num-samples 50 --bars 32
    python tests/report.py --checkpoint pianogpt.pt --samples DIR     # MIDI files of any program instead

Held-out music: openings of pieces that were not trained on, up to 2 x --num-samples, of as many works as
possible, each as many bars long as --bars or the median sample. Ten features of an excerpt are compared:

    pitch_classes  how long each pitch class sounds, relative to the tonic of the excerpt
    transitions    pitch classes, relative to the tonic, of each note and the next, by onset and pitch
    harmony        intervals modulo octaves between a note and those of the six before it that still sound
    onsets         seconds from onset to onset; lengths: seconds of a note; both in log-spaced bins
    notes_a_bar    how many bars hold so many notes; velocity: how many notes are so loud
    polyphony      how long so many notes sound together
    structure      similarity of a bar (cosine of its pitch classes) to the most similar one that is 1 to 2, 3
                   to 8, and 9 to 16 bars before it, mean over bars (in the spirit of Wu & Yang 2020)
    key_stability  share of windows of 4 bars whose key is the excerpt's (Krumhansl & Schmuckler)

All but the last two are histograms; along an axis with an order their cumulative sums are compared, so that
a shift counts by its size. The works of held-out music are halved at random 20 times. One half is the
reference, to which as many samples and pieces of the other half (the floor) are compared. Pairs of recordings
of one work do not count. Printed for each feature, as a mean over the 20:

    distance  square root of (2 E|x-y| - E|x-x'| - E|y-y'|) / 2 E|x-y|, the energy coefficient of two sets
              (Szekely & Rizzo 2013): at most 1; for equal distributions about 1 / sqrt(pieces on a side)
    OA, KLD   overlapped area and Kullback-Leibler divergence (nats) of two densities: of distances within the
              reference, and of those between it and the samples (Yang & Lerch 2018)

Last come the longest known runs; `frechet`, the squared Frechet distance of Gaussians fitted to all features
(of equal weight, on 8 principal axes of the reference); `features_at_floor`, how many distances are within
1.5 times their floors; `distance` and its `floor`, root mean squares over the features, so that one that is
wrong is not averaged away. They are not made of OA or KLD, which hardly move if all samples are wrong in one
way: energy coefficients grow with any difference. A copy of training music is near the floor, so look at the
known runs, too. Compare only reports with equal numbers of pieces: with fewer, floors are higher.
"""

import argparse
import collections
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg  # noqa: E402

FLAGS = "checkpoint device midi_dir cache_dir seed num_samples bars temperature".split()
SECONDS, NOTES_A_BAR = np.geomspace(0.02, 8, 17), np.r_[0, np.geomspace(1, 128, 15)] - 0.01  # edges of bins
LAGS = {"short": (1, 2), "medium": (3, 8), "long": (9, 16)}  # bars
ROUNDS, AXES, SHRINKAGE = 20, 8, 0.1  # random halvings; of the Frechet distance


def parse(argv):
    """{setting: value} of the flags that are given, which are named as in pianogpt.py."""
    def refuse(message):
        raise pg.UserError(f"{message}; python tests/report.py --help lists the flags")

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    for f in [f for group in fields(pg.Options) for f in fields(group.default_factory) if f.name in FLAGS]:
        text = f.metadata["text"].replace("%", "%%")
        parser.add_argument(pg.flag(f.name), type=type(f.default), default=argparse.SUPPRESS, help=text)
    parser.add_argument("--samples", default="", help="folder of MIDI files to compare instead")
    parser.set_defaults(num_samples=50)
    return vars(parser.parse_args(argv))


def read_notes(ids, vocab):
    """(arrays (N,) of the notes by onset and pitch; how many bars); start and length are in seconds."""
    score = vocab.decode(ids)
    lines = vocab.bar_lines(pg.torch.tensor(ids))[1].numpy()  # quarter notes
    if not score.note_num():
        return {}, len(lines) - 1
    notes, seconds = (s.tracks[0].notes.numpy() for s in (score, score.to("second")))
    bar = np.searchsorted(lines, notes["time"] / score.tpq + 1e-3, side="right") - 1
    notes |= {"start": seconds["time"], "length": seconds["duration"], "bar": np.minimum(bar, len(lines) - 2)}
    order = np.lexsort((notes["pitch"], notes["start"]))
    return {key: values[order] for key, values in notes.items()}, len(lines) - 1


def find_key(notes):
    """(tonic, 1 if minor) of notes."""
    score, track = pg.Score(480), pg.Track()
    track.notes = pg.Note.from_numpy(*(notes[key] for key in ("time", "duration", "pitch", "velocity")))
    score.tracks.append(track)
    signature = pg.find_key(score)[0]
    return (7 * signature.key - 3 * signature.tonality) % 12, signature.tonality


def histogram(values, edges, weights=None):
    """Shares (bins,) of the weight of values; those outside count in the outer bins."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges, weights=weights)[0]
    return counts / (counts.sum() or 1)


def structure(notes, bars):
    """(3,): the mean similarity of a bar to the most similar one at each of LAGS; 0 in too short a piece."""
    classes = np.zeros((bars, 12))
    np.add.at(classes, (notes["bar"], notes["pitch"] % 12), 1)
    classes /= np.maximum(1, np.linalg.norm(classes, axis=1, keepdims=True))
    similar, lag = classes @ classes.T, np.subtract.outer(np.arange(bars), np.arange(bars))
    best = [((lag >= low) & (lag <= high)) * similar for low, high in LAGS.values()]
    return np.array([b[low:].max(1).mean() if bars > low else 0 for b, (low, _) in zip(best, LAGS.values())])


def key_stability(notes, bars):
    """The share of windows of 4 bars, one every 2 bars, with notes in the key of the whole."""
    windows = [(notes["bar"] >= bar) & (notes["bar"] < bar + 4) for bar in range(0, max(1, bars - 3), 2)]
    keys = [find_key({k: v[inside] for k, v in notes.items()}) for inside in windows if inside.any()]
    return keys.count(find_key(notes)) / len(keys)


def features(notes, bars):
    """{feature: vector} of an excerpt that has notes, to be compared by Euclidean distance."""
    start, length, pitch = notes["start"], notes["length"], notes["pitch"].astype(int)
    end, classes, n = start + length, (pitch - find_key(notes)[0]) % 12, len(start)
    held = [np.abs(pitch[k:] - pitch[:-k])[start[k:] < end[:-k]] % 12 for k in range(1, 7)]
    times, steps = np.r_[start, end], np.repeat((1, -1), n)
    order = np.argsort(times, kind="stable")
    sounding, seconds = steps[order].cumsum()[:-1], np.diff(times[order])
    counts = np.bincount(notes["bar"], minlength=bars)
    return {"pitch_classes": histogram(classes, np.arange(13), length),
            "transitions": histogram(12 * classes[:-1] + classes[1:], np.arange(145)),
            "harmony": histogram(np.concatenate(held), np.arange(13)),
            "onsets": histogram(np.diff(np.unique(start)), SECONDS).cumsum(),
            "lengths": histogram(length, SECONDS).cumsum(),
            "notes_a_bar": histogram(counts, NOTES_A_BAR).cumsum(),
            "polyphony": histogram(sounding, np.arange(13), seconds).cumsum(),
            "velocity": histogram(notes["velocity"], np.arange(0, 129, 8)).cumsum(),
            "structure": structure(notes, bars), "key_stability": np.array([key_stability(notes, bars)])}


def longest_runs(pieces, names, corpus):
    """The longest known run of each of the pieces, intervals like the corpus.

    Sought first in the parts of the corpus that share 6 intervals in a row with any piece, which is fast.
    """
    padded = [np.frombuffer(x + bytes([pg.PIECE_END] * 8), np.uint8) for x in (corpus, b"".join(pieces))]
    passages = [np.lib.stride_tricks.sliding_window_view(x, 8) * np.uint8([1] * 6 + [0] * 2) for x in padded]
    shared = np.isin(*(x.view(np.uint64)[:, 0] for x in passages))  # as numbers of 8 bytes
    near = np.r_[np.convolve(shared, np.ones(6, int)) > 0, False, False]  # (len(padded[0]),)
    part = np.where(near, padded[0], pg.PIECE_END)[near | np.r_[False, near[:-1]]].tobytes()
    runs = [pg.longest_known_run(piece, [""] * (len(part) + 1), part)[0] for piece in pieces]
    return [n if n > 6 else pg.longest_known_run(p, names, corpus)[0] for n, p in zip(runs, pieces)]


def describe(pieces, name, vocab, known):
    """(work, features, figures that a musician can read) of each (work, ids) that has notes."""
    intervals = [pg.pitch_intervals(np.array(ids), vocab.pitches) for _, ids in pieces]
    found, runs = [], longest_runs(intervals, *known)
    for (work, ids), run in pg.progress([*zip(pieces, runs)], desc=name, unit="piece", leave=False):
        notes, bars = read_notes(ids, vocab)
        if notes:
            row, seconds = features(notes, bars), (notes["start"] + notes["length"]).max()
            found.append((work, row, {
                "notes_per_second": len(notes["start"]) / seconds, "lowest_pitch": notes["pitch"].min(),
                "highest_pitch": notes["pitch"].max(), "silence_percent": 100 * row["polyphony"][0],
                **{f"structure_{lag}": value for lag, value in zip(LAGS, row["structure"])},
                "key_stability_percent": 100 * row["key_stability"][0], "known_run_notes": run}))
    if len(found) < len(pieces):
        print(f"left out: {len(pieces) - len(found)} {name} without notes")
    return found


def spread(works, rng):
    """A random order of pieces: one of each work, then a second of each, and so on."""
    order, seen, rank = rng.permutation(len(works)), collections.Counter(), []
    for i in order:
        rank.append(seen[works[i]])
        seen[works[i]] += 1
    return order[np.argsort(rank, kind="stable")]


def draw_sides(works, rng):
    """Indices (n,) of half of held-out music, of the other half, and of samples, whose work is -1."""
    names = rng.permutation(np.unique(works[works >= 0]))
    sides = [np.flatnonzero(np.isin(works, side)) for side in (names[::2], names[1::2], -1)]
    n = min(map(len, sides))
    return [side[spread(works[side], rng)[:n]] for side in sides]


def within(apart, works, side):
    """The distances of pairs on one side that are not of one work; each sample is a work of its own."""
    i, j = (side[k] for k in np.triu_indices(len(side), 1))
    return apart[i, j][(works[i] != works[j]) | (works[i] < 0)]


def energy(apart, works, a, b):
    """The square root of the energy coefficient of sides a and b (n,); apart: distances (P, P)."""
    own = sum(within(apart, works, side).mean() for side in (a, b)) * (1 - 1 / len(a))  # 1 of n: x = x'
    between = apart[np.ix_(a, b)].mean()
    return max(0, 1 - own / (2 * between)) ** 0.5 if between else 0.0


def density(values, grid):
    """The Gaussian kernel density at the points of a grid, with sum 1; Scott's rule, at least a grid step."""
    width = max(values.std() * len(values) ** -0.2, grid[1])
    heights = np.exp(-(((grid[:, None] - values) / width) ** 2) / 2).sum(1) + 1e-12
    return heights / heights.sum()


def overlap(apart, works, a, b):
    """OA and KLD of the distances within a and those from a to b."""
    own, between = within(apart, works, a), apart[np.ix_(a, b)].ravel()
    grid = np.linspace(0, 1.1 * max(own.max(), between.max(), 1e-9), 200)
    p, q = density(own, grid), density(between, grid)
    return np.minimum(p, q).sum(), (p * np.log(p / q)).sum()


def frechet(blocks, a, b):
    """The squared Frechet distance of a and b (n,), with shrunk covariances; blocks: (P, D) a feature."""
    x = np.concatenate([x / (x[a].var(0).sum() ** 0.5 or 1) for x in blocks], 1)
    x = x @ np.linalg.svd(x[a] - x[a].mean(0), full_matrices=False)[2][:AXES].T  # (P, AXES)
    p, q = (np.atleast_2d(np.cov(x[side].T)) for side in (a, b))
    p, q = ((1 - SHRINKAGE) * c + SHRINKAGE * np.trace(c) / len(c) * np.eye(len(c)) for c in (p, q))
    root = np.sqrt(np.maximum(0, np.linalg.eigvals(p @ q).real)).sum()  # the trace of the root of p q
    return ((x[a].mean(0) - x[b].mean(0)) ** 2).sum() + np.trace(p) + np.trace(q) - 2 * root


def compare(samples, held_out):
    """{feature: (2, 3)} distance, OA and KLD of samples and of the floor; Frechet distances (2,).

    samples, held_out: (work, features, ...) of each excerpt.
    """
    works = np.unique([work for work, *_ in held_out], return_inverse=True)[1]
    works, rng = np.r_[works, np.full(len(samples), -1)], np.random.default_rng(0)
    blocks = {k: np.array([row[k] for _, row, *_ in [*held_out, *samples]]) for k in samples[0][1]}
    apart = {k: np.array([np.linalg.norm(x - piece, axis=1) for piece in x]) for k, x in blocks.items()}
    found, gaussian = collections.defaultdict(list), []
    for _ in range(ROUNDS):
        half, other, ours = draw_sides(works, rng)
        gaussian.append([frechet(blocks.values(), half, side) for side in (ours, other)])
        for k, d in apart.items():
            sides = [(d, works, half, side) for side in (ours, other)]
            found[k].append([(energy(*side), *overlap(*side)) for side in sides])
    return {k: np.mean(rounds, 0) for k, rounds in found.items()}, np.mean(gaussian, 0)


def print_report(samples, held_out):
    """Print the means of figures, the features and their floors, and key: value lines."""
    sides = [[figures for *_, figures in side] for side in (samples, held_out)]
    runs = [np.array([row["known_run_notes"] for row in rows]) for rows in sides]
    print(f"{'mean of':24}{len(samples):6} samples{len(held_out):5} held-out")
    for key in sides[0][0]:
        print(f"{key:24}" + "".join(f"{np.mean([row[key] for row in rows]):14.2f}" for rows in sides))
    found, gaussian = compare(samples, held_out)
    print(f"\n{'feature':16}" + "".join(f"{name:>10}{'floor':>10}" for name in ("distance", "OA", "KLD")))
    for key, values in found.items():
        print(f"{key:16}" + "".join(f"{value:10.2f}" for value in values.T.ravel()))
    apart = np.array([values[:, 0] for values in found.values()])  # (features, 2)
    distance, floor = np.sqrt((apart**2).mean(0))
    print(f"\nlongest_known_run: {runs[0].max()}\nheld_out_longest_known_run: {runs[1].max()}")
    print(f"frechet: {gaussian[0]:.4f}\nfrechet_floor: {gaussian[1]:.4f}")
    print(f"features: {len(apart)}\nfeatures_at_floor: {(apart[:, 0] <= 1.5 * apart[:, 1]).sum()}")
    print(f"distance: {distance:.4f}\nfloor: {floor:.4f}")


def read_held_out(config, vocab):
    """Up to 2 x num_samples pieces that were not trained on, of as many works as possible."""
    run = config.run
    pieces = pg.usable_pieces(run.midi_dir, vocab, run.cache_dir if Path(run.cache_dir).is_dir() else "")
    pg.split_pieces(pieces, Path(run.midi_dir), config.data, vocab.pitches)
    pieces = [p for p in pieces if p.split != "train"]
    if (count := len({p.work for p in pieces})) < 4:
        raise pg.UserError(f"{count} works in {run.midi_dir} are held out, and 4 are needed: add music")
    order = spread([p.work for p in pieces], np.random.default_rng(0))
    return [pieces[i] for i in order[: 2 * config.sample.num_samples]]


def run(argv):
    """Write or read samples, compare them with held-out music, and print the report."""
    given = parse(argv)
    folder = given.pop("samples")
    checkpoint = pg.load_checkpoint(Path(given.get("checkpoint", pg.RunConfig.checkpoint)))
    config = pg.make_options({"midi_dir": checkpoint["folder"]} | given, checkpoint, training=False)
    vocab, device = pg.Vocabulary(config.music), pg.choose_device(config.run.device)
    if checkpoint["vocabulary"] != vocab.words:
        raise pg.UserError("the checkpoint's vocabulary is not this MidiTok's: install requirements.txt")
    held_out = read_held_out(config, vocab)
    if folder:
        samples = [p.ids.tolist() for p in pg.usable_pieces(folder, vocab, "")]
    else:
        model = pg.load_model(checkpoint, vocab, device)
        samples = pg.generate(model, vocab, config.sample, config.train.seed, [])
    bars = config.sample.bars or int(np.median([ids.count(vocab.bar) for ids in samples]))
    known = checkpoint["pieces"], checkpoint["intervals"].numpy().tobytes()

    def opening(ids):
        at = [i for i, token in enumerate(ids) if token == vocab.bar]
        return ids[: at[bars]] if len(at) > bars else ids

    ours = describe([(-1, opening(ids)) for ids in samples], "samples", vocab, known)
    others = describe([(p.work, opening(p.ids.tolist())) for p in held_out], "held-out pieces", vocab, known)
    if len(ours) < 2 or len({work for work, *_ in others}) < 4:
        raise pg.UserError("too few pieces have notes: train longer, or pass more --num-samples or --bars")
    print_report(ours, others)


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
