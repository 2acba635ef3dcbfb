"""How far the music that a model writes is from held-out music, and held-out music from itself.

    python tests/report.py --checkpoint pianogpt.safetensors --num-samples 50 --bars 32
    python tests/report.py --samples DIR     # MIDI files of any program instead
    python tests/report.py --gaps            # how well the model rewrites bars, see measure_gaps
    python tests/report.py --styles Bach,Chopin,Scarlatti    # how well it keeps to a style
    python tests/report.py --hands DIR       # how well split_hands finds the hands of scores there

Held-out music: openings of pieces that were not trained on, up to 2 x --num-samples, of as many
works as possible, each as many bars long as --bars or the median sample. Ten features of an
excerpt are compared:

    pitch_classes  how long each pitch class sounds, relative to the tonic of the excerpt
    transitions    pitch classes, relative to the tonic, of each note and the next, by onset and
                   pitch
    harmony        intervals modulo octaves between a note and those of the six before it that
                   still sound
    onsets         seconds from onset to onset; lengths: seconds of a note; both in log-spaced bins
    notes_a_bar    histogram of notes per bar; velocity: of how loud the notes are
    polyphony      share of the time in which 0, 1, 2, ... notes sound together
    structure      similarity of a bar (cosine of its pitch classes) to the most similar one that
                   is 1 to 2, 3 to 8, and 9 to 16 bars before it, mean over bars (in the spirit of
                   Wu & Yang 2020)
    key_stability  share of windows of 4 bars whose key is the excerpt's (Krumhansl & Schmuckler)

All but the last two are histograms; along an axis with an order their cumulative sums are
compared, so that a shift counts by its size. Held out is the music that shares no passage with
what the model learned. Its works are halved at random 20 times. One half is the reference, to which
as many samples and pieces of the other half (the floor) are compared. Pairs of recordings of one
work do not count. Printed for each feature, as a mean over the 20:

    distance  square root of (2 E|x-y| - E|x-x'| - E|y-y'|) / 2 E|x-y|, the energy coefficient of
              two sets (Szekely & Rizzo 2013): at most 1; for equal distributions about
              1 / sqrt(pieces on a side)
    OA, KLD   overlapped area and Kullback-Leibler divergence (nats) of two densities: of distances
              within the reference, and of those between it and the samples (Yang & Lerch 2018)

Then a small classifier tells samples from held-out pieces by all features, if there are 20 of each:
`told_apart` is the share that it classifies correctly, and 0.5 is chance (for 50 pieces on a side,
plus or minus 0.06); its floor is the same between two halves of the works.

Last come the longest known runs; `frechet`, the squared Frechet distance of Gaussians fitted to
all features (of equal weight, on 8 principal axes of the reference); `features_at_floor`, how many
distances are within 1.5 times their floors; `distance` and its `floor`, root mean squares over the
features, so that one that is wrong is not averaged away. They are not made of OA or KLD, which
hardly move if all samples are wrong in one way: energy coefficients grow with any difference. A
copy of training music is near the floor, so look at the known runs, too. Compare only reports with
equal numbers of pieces: with fewer, floors are higher.
"""

import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg

SETTINGS = (  # of pianogpt.py that are flags here
    "checkpoint",
    "device",
    "midi_dir",
    "cache_dir",
    "seed",
    "num_samples",
    "bars",
    "temperature",
)
SECONDS = np.geomspace(0.02, 8, 17)  # edges of bins
NOTES_A_BAR = np.append(0, np.geomspace(1, 128, 15)) - 0.01  # edges of bins
LAGS = {"short": (1, 2), "medium": (3, 8), "long": (9, 16)}  # bars
ROUNDS = 20  # random halvings
AXES = 8  # principal axes for the Frechet distance
SHRINKAGE = 0.1  # of its covariances
GAP_WINDOWS = 256  # of held-out music, spread evenly
GAP_BARS = 2  # that are rewritten, to look at the seam
AROUND_GAP = 6  # bars before and after them that the model may read
LEAP = 12  # semitones; more is one
STYLE_BARS = 16  # of each piece by which its style is told
RIDGE = 0.1  # of the variance, against too close a fit
FOLDS = 10  # of the works, each classified by the others
LEAST_TO_CLASSIFY = 20  # samples, and held-out pieces

Notes = dict[str, np.ndarray]  # columns (N,): those of symusic, start and length in seconds, bar


class Excerpt(NamedTuple):
    """The opening of a piece, measured."""

    work: int | str  # -1: a sample, which is a work of its own
    features: dict[str, np.ndarray]
    figures: dict[str, float]  # that a musician can read


def parse(argv: list[str] | None) -> dict:
    """{setting: value} of the flags that are given, which are named as in pianogpt.py."""

    def refuse(message: str):
        raise pg.UserError(f"{message}; python tests/report.py --help lists the flags")

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    for group in vars(pg.Settings()).values():
        for f in fields(group):
            if f.name in SETTINGS:
                text = f.metadata["text"].replace("%", "%%")
                parser.add_argument(
                    pg.flag(f.name), type=type(f.default), default=argparse.SUPPRESS, help=text
                )
    parser.add_argument("--samples", default="", help="folder of MIDI files to compare instead")
    parser.add_argument("--gaps", action="store_true", help="measure --rewrite instead")
    parser.add_argument("--styles", default="", help="measure --style instead: A,B,C")
    parser.add_argument("--hands", default="", help="measure two hands on a folder instead")
    parser.set_defaults(num_samples=50)
    return vars(parser.parse_args(argv))


def read_notes(ids: np.ndarray, vocab: pg.Vocabulary) -> tuple[Notes, int]:
    """The notes of a piece, ids (T,) from BOS on, by onset and pitch; how many bars it has."""
    score = vocab.decode(ids)
    _, lines = vocab.bar_lines(ids)  # quarter notes
    bars = len(lines) - 1
    if not score.note_num():
        return {}, bars
    notes = score.tracks[0].notes.numpy()
    seconds = score.to("second").tracks[0].notes.numpy()
    bar = np.searchsorted(lines, notes["time"] / score.tpq + 1e-3, side="right") - 1
    notes["start"] = seconds["time"]
    notes["length"] = seconds["duration"]
    notes["bar"] = np.minimum(bar, bars - 1)
    return pg.select(notes, np.lexsort((notes["pitch"], notes["start"]))), bars


def find_key(notes: Notes) -> tuple[int, int]:
    """(tonic, 1 if minor) of notes."""
    sounding = np.bincount(notes["pitch"] % 12, notes["duration"], 12)
    is_minor, tonic = divmod(int(pg.closest_keys(sounding[None])[0]), 12)
    return tonic, is_minor


def histogram(values: np.ndarray, edges: np.ndarray, weights=None) -> np.ndarray:
    """Shares (bins,) of the weight of values; those outside count in the outer bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, weights=weights)
    return counts / (counts.sum() or 1)


def structure(notes: Notes, bars: int) -> np.ndarray:
    """(3,): the mean similarity of a bar to the most similar one at each of LAGS, or 0."""
    classes = np.zeros((bars, 12))
    np.add.at(classes, (notes["bar"], notes["pitch"] % 12), 1)
    classes /= np.maximum(1, np.linalg.norm(classes, axis=1, keepdims=True))
    similar = classes @ classes.T  # (bars, bars)
    lag = np.subtract.outer(np.arange(bars), np.arange(bars))
    means = []
    for low, high in LAGS.values():
        best = np.where((lag >= low) & (lag <= high), similar, 0).max(1)
        means.append(best[low:].mean() if bars > low else 0)
    return np.array(means)


def key_stability(notes: Notes, bars: int) -> float:
    """The share of windows of 4 bars, one every 2 bars, with notes in the key of the whole."""
    keys = []
    last = max(0, bars - 4)
    for bar in [*range(0, last, 2), last]:
        inside = (notes["bar"] >= bar) & (notes["bar"] < bar + 4)
        if inside.any():
            keys.append(find_key(pg.select(notes, inside)))
    return keys.count(find_key(notes)) / len(keys)


def harmony(start: np.ndarray, end: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Intervals modulo octaves between each note and those of the six before that still sound."""
    held = []
    for k in range(1, 7):
        still_sounds = start[k:] < end[:-k]
        held.append(np.abs(pitch[k:] - pitch[:-k])[still_sounds] % 12)
    return histogram(np.concatenate(held), np.arange(13))


def polyphony(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The shares of the time in which 0, 1, ..., 11 or more notes sound together."""
    times = np.concatenate([start, end])
    steps = np.repeat((1, -1), len(start))
    order = np.argsort(times, kind="stable")
    sounding = steps[order].cumsum()[:-1]
    return histogram(sounding, np.arange(13), np.diff(times[order]))


def measure(notes: Notes, bars: int) -> dict[str, np.ndarray]:
    """{feature: vector} of an excerpt that has notes, to be compared by Euclidean distance."""
    start, length = notes["start"], notes["length"]
    end = start + length
    pitch = notes["pitch"].astype(int)
    tonic, _ = find_key(notes)
    classes = (pitch - tonic) % 12
    notes_of_bar = np.bincount(notes["bar"], minlength=bars)
    return {
        "pitch_classes": histogram(classes, np.arange(13), length),
        "transitions": histogram(12 * classes[:-1] + classes[1:], np.arange(145)),
        "harmony": harmony(start, end, pitch),
        "onsets": histogram(np.diff(np.unique(start)), SECONDS).cumsum(),
        "lengths": histogram(length, SECONDS).cumsum(),
        "notes_a_bar": histogram(notes_of_bar, NOTES_A_BAR).cumsum(),
        "polyphony": polyphony(start, end).cumsum(),
        "velocity": histogram(notes["velocity"], np.arange(0, 129, 8)).cumsum(),
        "structure": structure(notes, bars),
        "key_stability": np.array([key_stability(notes, bars)]),
    }


def passages_of_six(intervals: bytes) -> np.ndarray:
    """(N,) numbers that are equal where six intervals in a row are; the last run past the end."""
    padded = np.frombuffer(intervals + bytes([pg.PIECE_END] * 8), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 8)[: len(intervals)]
    return (windows * np.uint8([1] * 6 + [0] * 2)).view(np.uint64)[:, 0]  # numbers of 8 bytes


def longest_runs(pieces: list[bytes], names: list[str], corpus: bytes) -> list[int]:
    """The longest known run of each of the pieces, intervals like the corpus.

    Sought first in the parts of the corpus that share 6 intervals in a row with any piece, which
    is fast.
    """
    is_shared = np.isin(passages_of_six(corpus), passages_of_six(b"".join(pieces)))
    near = np.convolve(is_shared, np.ones(6, int))[: len(corpus)] > 0
    after = np.append(False, near[:-1])[: len(corpus)]
    intervals = np.frombuffer(corpus, np.uint8)
    # What lies between two parts becomes one PIECE_END.
    part = np.where(near, intervals, pg.PIECE_END)[near | after].tobytes()
    runs = []
    for piece in pieces:
        length, _ = pg.longest_known_run(piece, [""] * (len(part) + 1), part)
        if length <= 6:
            length, _ = pg.longest_known_run(piece, names, corpus)
        runs.append(length)
    return runs


def describe(pieces: list[tuple], name: str, vocab: pg.Vocabulary, known: tuple) -> list[Excerpt]:
    """Each (work, ids) that has notes, measured; known: names and intervals of known pieces."""
    runs = longest_runs([pg.pitch_intervals(ids, vocab) for _, ids in pieces], *known)
    rows = list(zip(pieces, runs, strict=True))
    found = []
    for (work, ids), run in pg.progress_bar(rows, desc=name, unit="piece", leave=False):
        notes, bars = read_notes(ids, vocab)
        if not notes:
            continue
        features = measure(notes, bars)
        figures = {
            "notes_per_second": len(notes["start"]) / (notes["start"] + notes["length"]).max(),
            "lowest_pitch": notes["pitch"].min(),
            "highest_pitch": notes["pitch"].max(),
            "silence_percent": 100 * features["polyphony"][0],
        }
        for lag, value in zip(LAGS, features["structure"], strict=True):
            figures[f"structure_{lag}"] = value
        figures["key_stability_percent"] = 100 * features["key_stability"][0]
        figures["known_run_notes"] = run
        found.append(Excerpt(work, features, figures))
    if len(found) < len(pieces):
        print(f"left out: {len(pieces) - len(found)} {name} without notes")
    return found


def spread(works: list | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of pieces: one of each work, then a second of each, and so on."""
    order = rng.permutation(len(works))
    seen = Counter()
    rank = []
    for i in order:
        rank.append(seen[works[i]])
        seen[works[i]] += 1
    return order[np.argsort(rank, kind="stable")]


def draw_sides(works: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices (n,) of half of held-out music, of its other half, and of samples."""
    names = rng.permutation(np.unique(works[works >= 0]))
    sides = [np.flatnonzero(np.isin(works, side)) for side in (names[::2], names[1::2], -1)]
    n = min(map(len, sides))
    return [side[spread(works[side], rng)[:n]] for side in sides]


def within(apart: np.ndarray, works: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The distances of pairs on one side that are not of one work."""
    first, second = np.triu_indices(len(side), 1)
    i, j = side[first], side[second]
    return apart[i, j][(works[i] != works[j]) | (works[i] < 0)]


def energy(apart: np.ndarray, works: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The square root of the energy coefficient of sides a and b (n,); apart: distances (P, P)."""
    between = apart[np.ix_(a, b)].mean()
    if between == 0:
        return 0.0
    own = within(apart, works, a).mean() + within(apart, works, b).mean()
    own *= 1 - 1 / len(a)  # one of n times, x and x' are the same piece
    return max(0, 1 - own / (2 * between)) ** 0.5


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The Gaussian kernel density at the points of a grid, with sum 1.

    The width is by Scott's rule, at least a step of the grid.
    """
    width = max(values.std() * len(values) ** -0.2, grid[1])
    heights = np.exp(-(((grid[:, None] - values) / width) ** 2) / 2).sum(1) + 1e-12
    return heights / heights.sum()


def overlap(
    apart: np.ndarray, works: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[float, float]:
    """OA and KLD of the distances within a and those from a to b."""
    own = within(apart, works, a)
    between = apart[np.ix_(a, b)].ravel()
    grid = np.linspace(0, 1.1 * max(own.max(), between.max(), 1e-9), 200)
    p, q = density(own, grid), density(between, grid)
    return np.minimum(p, q).sum(), (p * np.log(p / q)).sum()


def shrunk_covariance(x: np.ndarray) -> np.ndarray:
    """The covariance (D, D) of x (n, D), moved towards a multiple of the identity."""
    c = np.atleast_2d(np.cov(x.T))
    return (1 - SHRINKAGE) * c + SHRINKAGE * np.trace(c) / len(c) * np.eye(len(c))


def frechet(blocks: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frechet distance of sides a and b (n,); blocks: (P, D) for each feature."""
    of_equal_weight = [x / (x[a].var(0).sum() ** 0.5 or 1) for x in blocks]
    x = np.concatenate(of_equal_weight, axis=1)
    _, _, axes = np.linalg.svd(x[a] - x[a].mean(0), full_matrices=False)
    x = x @ axes[:AXES].T  # (P, AXES)
    p, q = shrunk_covariance(x[a]), shrunk_covariance(x[b])
    # The trace of the root of p q
    root = np.sqrt(np.maximum(0, np.linalg.eigvals(p @ q).real)).sum()
    return ((x[a].mean(0) - x[b].mean(0)) ** 2).sum() + np.trace(p) + np.trace(q) - 2 * root


def compare(
    samples: list[Excerpt], held_out: list[Excerpt]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{feature: (2, 3)} distance, OA, KLD of samples and of the floor; Frechet distances (2,)."""
    _, numbers = np.unique([excerpt.work for excerpt in held_out], return_inverse=True)
    works = np.append(numbers, [-1] * len(samples))
    blocks, apart = {}, {}
    for name in samples[0].features:
        x = np.array([excerpt.features[name] for excerpt in [*held_out, *samples]])
        blocks[name] = x
        apart[name] = np.array([np.linalg.norm(x - piece, axis=1) for piece in x])
    rng = np.random.default_rng(0)
    found = defaultdict(list)
    gaussian = []
    for _ in range(ROUNDS):
        half, other, ours = draw_sides(works, rng)
        gaussian.append([frechet(list(blocks.values()), half, side) for side in (ours, other)])
        for name, d in apart.items():
            rows = []
            for side in (ours, other):
                rows.append((energy(d, works, half, side), *overlap(d, works, half, side)))
            found[name].append(rows)
    return {name: np.mean(rounds, 0) for name, rounds in found.items()}, np.mean(gaussian, 0)


def distances_in(found: dict[str, np.ndarray]) -> np.ndarray:
    """The distances and floors of all features, (features, 2), in what compare found."""
    return np.array([values[:, 0] for values in found.values()])


def root_mean_square(apart: np.ndarray) -> list[float]:
    """One distance and one floor of those of all features, (features, 2)."""
    return np.sqrt((apart**2).mean(0)).tolist()


def distance_of(samples: list[Excerpt], held_out: list[Excerpt]) -> list[float]:
    """The distance of samples from held-out music over all features, and its floor."""
    found, _ = compare(samples, held_out)
    return root_mean_square(distances_in(found))


def print_report(samples: list[Excerpt], held_out: list[Excerpt]) -> None:
    """Print the means of figures, the features and their floors, and key: value lines."""
    print(f"{'mean of':24}{len(samples):6} samples{len(held_out):5} held-out")
    for key in samples[0].figures:
        means = [np.mean([e.figures[key] for e in side]) for side in (samples, held_out)]
        print(f"{key:24}{means[0]:14.2f}{means[1]:14.2f}")
    found, gaussian = compare(samples, held_out)
    titles = [f"{name:>10}{'floor':>10}" for name in ("distance", "OA", "KLD")]
    print(f"\n{'feature':16}{''.join(titles)}")
    for name, values in found.items():
        print(f"{name:16}" + "".join(f"{value:10.2f}" for value in values.T.ravel()))
    apart = distances_in(found)
    distance, floor = root_mean_square(apart)
    print()
    if min(len(samples), len(held_out)) >= LEAST_TO_CLASSIFY:
        told, told_floor = tell_real_from_written(samples, held_out)
        pg.print_block({"told_apart": told, "told_apart_floor": told_floor})
    pg.print_block(
        {
            "longest_known_run": max(e.figures["known_run_notes"] for e in samples),
            "held_out_longest_known_run": max(e.figures["known_run_notes"] for e in held_out),
            "frechet": float(gaussian[0]),
            "frechet_floor": float(gaussian[1]),
            "features": len(apart),
            "features_at_floor": int((apart[:, 0] <= 1.5 * apart[:, 1]).sum()),
            "distance": distance,
            "floor": floor,
        }
    )


def vectors(excerpts: list[Excerpt]) -> np.ndarray:
    """The features of excerpts side by side, (P, D)."""
    return np.array([np.concatenate(list(e.features.values())) for e in excerpts])


def classify(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The classes of new excerpts (n, D), by ridge regression on known ones.

    x (P, D): features; y (P,): numbers of their classes. All classes have equal weight.
    """
    share = (1 / np.bincount(y))[y]
    share /= share.sum()  # of each excerpt
    mean = share @ x
    scale = x.std(0) + 1e-6
    x = (x - mean) / scale
    targets = np.eye(y.max() + 1)[y]
    prior = share @ targets
    weighted = x.T * share
    gram = weighted @ x + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, weighted @ (targets - prior))
    scores = (new - mean) / scale @ weights + prior
    return scores.argmax(axis=1)


def cross_validated_accuracy(x: np.ndarray, y: np.ndarray, works: np.ndarray) -> float:
    """The share of excerpts that are classified correctly by others, none of the same work.

    x (P, D): features; y (P,): numbers of their classes, which count equally; works (P,).
    """
    names = np.random.default_rng(0).permutation(np.unique(works))
    right = np.zeros(len(y), bool)
    for fold in range(FOLDS):
        is_new = np.isin(works, names[fold::FOLDS])
        if is_new.any():
            right[is_new] = classify(x[~is_new], y[~is_new], x[is_new]) == y[is_new]
    return float(np.mean([right[y == style].mean() for style in np.unique(y)]))


def tell_real_from_written(samples: list[Excerpt], held_out: list[Excerpt]) -> tuple[float, float]:
    """How often samples and held-out pieces are told apart; and two halves of the held-out works.

    0.5 is chance.
    """
    n = min(len(samples), len(held_out))
    # Any of the samples: they come in the order in which they ended, the shortest first.
    chosen = np.random.default_rng(0).permutation(len(samples))[:n]
    x = vectors([*(samples[i] for i in chosen), *held_out[:n]])
    works = np.array([f"sample {i}" for i in range(n)] + [f"{e.work}" for e in held_out[:n]])
    half_of_work = np.unique(works[n:], return_inverse=True)[1] % 2
    floor = cross_validated_accuracy(x[n:], half_of_work, works[n:])
    return cross_validated_accuracy(x, np.arange(2 * n) // n, works), floor


def measure_styles(
    names: list[str],
    model: pg.PianoGPT,
    checkpoint: pg.Checkpoint,
    pieces: list[pg.Piece],
    vocab: pg.Vocabulary,
    settings: pg.Settings,
) -> None:
    """Print how often a style is told right, and how far its pieces are from real ones.

    A small classifier learns the styles of real music that the model has not read. Its own
    accuracy is on works that it has not read either. The distance of pieces of a style from real
    music of that style stands beside those of pieces without a style, and of another one.
    """
    known = (checkpoint.pieces, checkpoint.intervals())
    real = {}
    written = {}
    sample = pg.replace(settings.sample, bars=settings.sample.bars or STYLE_BARS)
    for name in ("", *names):
        number = pg.find_style(name, checkpoint.styles)
        music = pg.generate(model, vocab, sample, settings.train.seed, style=number)
        ours = [(-1, ids) for _, ids in music]
        written[name] = describe(ours, f"pieces {name}", vocab, known)
        if len(written[name]) < 2:
            raise pg.UserError("too few pieces have notes: pass more --num-samples")
        if name:
            theirs = [
                (p.work, opening(p.ids, sample.bars, vocab.bar_id))
                for p in pieces
                if p.style == name
            ]
            if len({work for work, _ in theirs}) < 4:
                raise pg.UserError(
                    f"fewer than 4 works of {name} are new to the model: name others"
                )
            real[name] = describe(theirs, f"held out {name}", vocab, known)
    x = vectors([e for name in names for e in real[name]])
    y = np.repeat(np.arange(len(names)), [len(real[name]) for name in names])
    works = np.array([str(e.work) for name in names for e in real[name]])
    found = {"classifier_accuracy": cross_validated_accuracy(x, y, works)}
    for number, name in enumerate(names):
        told = classify(x, y, vectors(written[name]))
        none = classify(x, y, vectors(written[""]))
        other = names[number - 1]
        distance, floor = distance_of(written[name], real[name])
        found |= {
            f"{name}_held_out": len(real[name]),
            f"{name}_told": float((told == number).mean()),
            f"{name}_told_without_style": float((none == number).mean()),
            f"{name}_distance": distance,
            f"{name}_distance_without_style": distance_of(written[""], real[name])[0],
            f"{name}_distance_of_{other}": distance_of(written[other], real[name])[0],
            f"{name}_floor": floor,
        }
    pg.print_block(found)


def is_new(piece: pg.Piece, learned: bytes, passages: np.ndarray, vocab: pg.Vocabulary) -> bool:
    """Whether a piece shares no passage with the music that a model learned.

    learned: its melodic intervals; passages: their hashes, sorted, and NO_HASH.
    """
    intervals = pg.pitch_intervals(piece.ids, vocab)
    hashes = pg.hash_passages(np.frombuffer(intervals, np.uint8))
    hashes = hashes[hashes < pg.NO_HASH]
    is_known = passages[np.searchsorted(passages, hashes)] == hashes
    # A piece may be too short for a passage; the end of a piece is no interval.
    return intervals[:-1] not in learned and not is_known.any()


def read_new_pieces(
    settings: pg.Settings, vocab: pg.Vocabulary, checkpoint: pg.Checkpoint
) -> list[pg.Piece]:
    """The pieces of works of which nothing was learned, of as many works as possible first."""
    program = settings.program
    folder = Path(program.midi_dir)
    cache = program.cache_dir if Path(program.cache_dir).is_dir() else ""
    pieces = pg.read_music(folder, vocab, cache)
    pg.split_pieces(pieces, folder, settings.data, vocab)  # for the works
    if settings.data.style_from_folder:
        pg.name_styles(pieces)
    learned = checkpoint.intervals()
    hashes = pg.hash_passages(np.frombuffer(learned, np.uint8))
    passages = np.unique(np.append(hashes, pg.NO_HASH))
    known = {piece.work for piece in pieces if not is_new(piece, learned, passages, vocab)}
    pieces = [piece for piece in pieces if piece.work not in known]
    works = [piece.work for piece in pieces]
    if len(set(works)) < 4:
        raise pg.UserError(
            f"{len(set(works))} works in {folder} are new to the model, and 4 are needed: add music"
        )
    return [pieces[i] for i in spread(works, np.random.default_rng(0))]


def token_losses(model: pg.PianoGPT, windows: pg.Window) -> torch.Tensor:
    """The loss of each target of windows, in nats, (B, T)."""
    rows = []
    for part in windows.groups_of(16):
        logits = model(part.to(model.head.weight.device)._replace(targets=None)).float().cpu()
        losses = F.cross_entropy(logits.transpose(1, 2), part.targets.clamp(0), reduction="none")
        rows.append(losses)
    return torch.cat(rows)


@torch.inference_mode()
def measure_gaps(model: pg.PianoGPT, pieces: list[pg.Piece], vocab: pg.Vocabulary) -> dict:
    """Nats a token of the bars of gaps in pieces, and of the same bars as a plain continuation.

    For the gap the model has read what follows it, for the continuation only what is before it.
    """
    T = model.sizes.block_size
    windows = pg.cut_all_windows(pg.make_corpus(pieces), T, T, vocab, GAP_WINDOWS)
    gaps = pg.draw_gaps(windows.idx, 1.0, np.random.default_rng(0), vocab)
    has_gap = gaps[:, 1] > 0
    if not has_gap.any():
        raise pg.UserError("no window holds two bar lines: the model's --block-size is too small")
    windows = windows.rows(has_gap)
    begin, end = gaps[has_gap].T[:, :, None]  # (B, 1) each
    moved = pg.move_gaps(windows, gaps[has_gap], vocab)
    place = torch.arange(T)
    # The Bar token that begins the gap is given, and the one that ends it is no choice.
    in_gap = (place >= begin) & (place < end - 1)
    first = (moved.idx == vocab.fill_id).int().argmax(1, keepdim=True) + 1
    in_moved = (place >= first) & (place < first + end - begin - 1)
    is_late = (place - begin >= (end - begin) * 2 / 3)[in_gap]
    plain = token_losses(model, windows)[in_gap]
    filled = token_losses(model, moved)[in_moved]
    return {
        "gap_tokens": len(plain),
        "nats_continued": plain.mean().item(),
        "nats_filled": filled.mean().item(),
        "last_third_continued": plain[is_late].mean().item(),
        "last_third_filled": filled[is_late].mean().item(),
    }


def step_over_bar_line(ids: np.ndarray, bar: int, vocab: pg.Vocabulary) -> int | None:
    """Semitones by which the highest voice moves from a bar, from 1 on, to the next.

    From the highest note that sounds at the last onset of the bar to that at the first onset of the
    next one; None if one of the bars has none.
    """
    state = vocab.trace(ids)
    notes = np.flatnonzero(state.kind == pg.Kind.PITCH)
    start = state.time[notes]
    end = start + vocab.lengths[ids[notes + 2] - vocab.duration_ids.start]  # after the velocity
    highest = []
    for number, pick in ((bar, np.max), (bar + 1, np.min)):
        here = state.bar[notes] == number
        if not here.any():
            return None
        moment = pick(start[here])
        sounds = (start <= moment) & (end > moment)
        highest.append(int(state.pitch[notes[sounds]].max()))
    return highest[1] - highest[0]


def measure_seams(
    model: pg.PianoGPT, pieces: list[pg.Piece], vocab: pg.Vocabulary, settings: pg.Settings
) -> dict:
    """How often the highest voice repeats its note, or leaps, from a rewritten bar to the next."""
    bars = 2 * AROUND_GAP + GAP_BARS
    first = AROUND_GAP + 1
    last = AROUND_GAP + GAP_BARS
    sample = pg.replace(settings.sample, rewrite=f"{first}-{last}", num_samples=1)
    steps = {"written": [], "real": []}
    for piece in pieces[: settings.sample.num_samples]:
        ids = opening(piece.ids[:-1], bars, vocab.bar_id)  # without EOS
        if (ids == vocab.bar_id).sum() < bars:
            continue
        [(_, written)] = pg.generate(model, vocab, sample, settings.train.seed, ids)
        both = [step_over_bar_line(music, last, vocab) for music in (written, ids)]
        if None not in both:
            steps["written"].append(both[0])
            steps["real"].append(both[1])
    results = {"seams": len(steps["real"])}
    if not steps["real"]:
        return results
    for name, found in steps.items():
        size = np.abs(found)
        results[f"repeats_{name}"] = float((size == 0).mean())
        results[f"leaps_{name}"] = float((size > LEAP).mean())
    return results


def opening(ids: np.ndarray, bars: int, bar_id: int) -> np.ndarray:
    """The first bars of a piece, ids (T,); all of it if it has no more."""
    at = np.flatnonzero(ids == bar_id)
    return ids[: at[bars]] if len(at) > bars else ids


def measure_hands(folder: Path) -> dict:
    """How many notes of the two-track files of a folder split_hands gives to the right hand."""
    files = []
    for path in pg.find_files(folder):
        try:
            midi = pg.parse_midi(pg.read_bytes(path))
            piano, _ = pg.make_piano(midi)
        except pg.UserError:
            continue
        hands = {
            (round(quarter * midi.tpq), pitch): is_left
            for quarter, pitch, is_left in pg.hands_of_tracks(midi)
        }
        notes = piano.tracks[0].notes.numpy()
        keys = zip(notes["time"].tolist(), notes["pitch"].tolist(), strict=True)
        known = np.array([hands.get(key, -1) for key in keys])
        if (known >= 0).any():
            found = pg.split_hands(notes, np.full(len(known), -1), midi.tpq)
            files.append((found == known)[known >= 0])
    if not files:
        raise pg.UserError(f"no file under {folder} has two tracks: name another folder")
    return {
        "files": len(files),
        "notes": sum(map(len, files)),
        "in_their_hand": float(np.concatenate(files).mean()),
        "median_of_files": float(np.median([of_file.mean() for of_file in files])),
    }


def run(argv: list[str] | None) -> None:
    """Write or read samples, compare them with held-out music, and print the report."""
    given = parse(argv)
    hands = given.pop("hands")
    if sum(bool(given[mode]) for mode in ("samples", "gaps", "styles")) + bool(hands) > 1:
        raise pg.UserError("pass one of --samples, --gaps, --styles and --hands")
    if hands:
        pg.print_block(measure_hands(Path(hands)))
        return
    folder = given.pop("samples")
    gaps = given.pop("gaps")
    styles = given.pop("styles")
    path = Path(given.get("checkpoint", pg.ProgramSettings.checkpoint))
    checkpoint = pg.load_checkpoint(path)
    given = {"midi_dir": checkpoint.folder} | given
    settings = pg.make_settings(given, checkpoint, training=False)
    pg.check_settings(settings)
    vocab = pg.Vocabulary(settings.tokens)
    if checkpoint.vocabulary != vocab.words:
        raise pg.UserError(
            "the checkpoint's vocabulary does not match this MidiTok: install requirements.txt"
        )
    device = pg.choose_device(settings.program.device)
    names = split_names(styles) if styles else []
    new_pieces = read_new_pieces(settings, vocab, checkpoint)
    held_out = new_pieces[: 2 * settings.sample.num_samples]
    model = pg.load_model(checkpoint, device)
    if names:
        measure_styles(names, model, checkpoint, new_pieces, vocab, settings)
    elif gaps:
        seams = measure_seams(model, held_out, vocab, settings)
        pg.print_block(measure_gaps(model, held_out, vocab) | seams)
    elif folder:
        samples = [piece.ids for piece in pg.read_music(Path(folder), vocab, "")]
        report_samples(samples, checkpoint, held_out, vocab, settings.sample.bars)
    else:
        sample = settings.sample
        bars = sample.bars
        if bars:  # the end is cut off, as that of held-out music is
            sample = pg.replace(sample, bars=bars + pg.LEAST_BARS)
        samples = [ids for _, ids in pg.generate(model, vocab, sample, settings.train.seed)]
        report_samples(samples, checkpoint, held_out, vocab, bars)


def split_names(styles: str) -> list[str]:
    """The names of styles in "A, B"; raises UserError if there are not two or more."""
    names = [pg.normalize("NFC", name.strip()) for name in styles.split(",")]
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise pg.UserError("--styles needs two different styles or more: A,B")
    return names


def report_samples(
    samples: list[np.ndarray],
    checkpoint: pg.Checkpoint,
    held_out: list[pg.Piece],
    vocab: pg.Vocabulary,
    bars: int,
) -> None:
    """Compare openings of samples, ids (T,) each, with those of held-out pieces.

    bars: of each opening; 0: as many as the median sample has.
    """
    if not bars:
        bars = int(np.median([(ids == vocab.bar_id).sum() for ids in samples]))
    new = [(-1, opening(ids, bars, vocab.bar_id)) for ids in samples]
    old = [(piece.work, opening(piece.ids, bars, vocab.bar_id)) for piece in held_out]
    known = (checkpoint.pieces, checkpoint.intervals())
    ours = describe(new, "samples", vocab, known)
    others = describe(old, "held-out pieces", vocab, known)
    if len(ours) < 2 or len({excerpt.work for excerpt in others}) < 4:
        raise pg.UserError(
            "too few pieces have notes: train longer, or pass more --num-samples or --bars"
        )
    print_report(ours, others)


def main(argv: list[str] | None = None) -> int:
    """The program; 0, or 2 for what the user can fix."""
    try:
        run(argv)
    except (pg.UserError, OSError) as e:
        print(f"report: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may not be text
    sys.exit(main())
