"""The report: features of excerpts, distances of sets, and what it says of music and of spoiled music."""

from pathlib import Path

import numpy as np
import pytest
import report
from conftest import TINY, pg, write_midi

MUSIC = sorted((Path(__file__).parent.parent / "my_midis").glob("*.mid"))


def notes_of(path, notes, vocab, bpm=60.0):
    """What the report reads from a file of these notes: arrays of notes, and bars."""
    return report.read_notes(pg.read_piece(write_midi(path, [notes], bpm=bpm), vocab).ids.tolist(), vocab)


# ---------- One excerpt ----------


def test_notes_are_in_seconds_and_in_their_bars(tmp_path, vocab):
    tune = [(0, 2, 60, 80), (0, 1, 55, 80), (7.5, 0.5, 62, 80)]
    notes, bars = notes_of(tmp_path / "a.mid", tune, vocab, bpm=120)
    assert bars == 2 and notes["bar"].tolist() == [0, 0, 1] and notes["pitch"].tolist() == [55, 60, 62]
    assert notes["start"].tolist() == [0, 0, 3.75] and notes["length"].tolist() == [0.5, 1, 0.25]
    assert report.read_notes([vocab.bar, vocab.words.index("TimeSig_4/4")], vocab) == ({}, 1)


def test_features_are_what_one_counts_by_hand(tmp_path, vocab):
    chords = [(bar * 4, 2, pitch, 64) for bar in (0, 2) for pitch in (60, 64, 67)]  # C major, silence between
    notes, bars = notes_of(tmp_path / "a.mid", [*chords, (10, 1, 72, 112)], vocab)
    row = report.features(notes, bars)
    assert [len(vector) for vector in row.values()] == [12, 144, 12, 16, 16, 15, 12, 16, 3, 1]
    onsets, lengths, counts, loud = (np.diff(row[k], prepend=0) for k in (
        "onsets", "lengths", "notes_a_bar", "velocity"))  # these are cumulative
    assert row["pitch_classes"][[0, 4, 7]] * 13 == pytest.approx([5, 4, 4])  # of 13 seconds
    pairs = np.flatnonzero(row["transitions"])
    assert [divmod(i, 12) for i in pairs] == [(0, 4), (4, 7), (7, 0)]
    assert row["transitions"][pairs] == pytest.approx(1 / 3)
    assert row["harmony"][[3, 4, 7]] * 6 == pytest.approx([2, 2, 2])  # E-G, C-E, C-G; the last C is alone
    assert [onsets.min(), lengths.min(), counts.min(), loud.min()] == [0] * 4 and row["lengths"][-1] == 1
    assert onsets[np.searchsorted(report.SECONDS, [2, 8]) - 1] == pytest.approx([0.5, 0.5])
    assert lengths[np.searchsorted(report.SECONDS, [1, 2]) - 1] * 7 == pytest.approx([1, 6])
    assert counts[[0, 4, 5]] * 3 == pytest.approx([1, 1, 1])  # bars of 0, 3 and 4 notes
    assert row["polyphony"] * 11 == pytest.approx([6, 7, 7] + [11] * 9)  # silent, one, two, three notes
    assert loud[[7, 13]] * 7 == pytest.approx([6, 1])  # velocities 56 to 63, 104 to 111


def test_features_are_the_same_in_every_key(tmp_path, vocab):
    tune = [(i / 2, 0.5, 60 + pitch, 80) for i, pitch in enumerate((0, 2, 4, 5, 7, 11, 12, 7, 4, 0) * 4)]
    rows = [report.features(*notes_of(tmp_path / "a.mid", [(*n[:2], n[2] + up, 80) for n in tune], vocab))
            for up in (0, 5)]
    assert all(np.allclose(a, b) for a, b in zip(rows[0].values(), rows[1].values()))


def test_structure_finds_the_bar_that_comes_again(tmp_path, vocab):
    def similar(bars):
        notes = [(4 * bar, 1, pitch, 80) for bar, pitch in enumerate(bars)]
        return report.structure(*notes_of(tmp_path / "a.mid", notes, vocab)).tolist()

    assert similar([60, 61, 60, 61]) == pytest.approx([2 / 3, 0, 0])  # two of the bars 1, 2, 3
    assert similar([60, 61, 62, 60, 61, 62]) == pytest.approx([0, 1, 0])
    assert similar([*range(50, 60), 62, 51]) == pytest.approx([0, 0, 2 / 3])  # octaves do not matter
    assert similar([60]) == [0, 0, 0]


def test_key_stability_is_the_share_of_windows_in_the_key_of_the_whole(tmp_path, vocab):
    notes = [(4 * bar, 4, root, 80) for bar in range(8) for root in (60, 64, 67)]  # C major
    notes += [(4 * bar, 1, root, 80) for bar in range(8, 12) for root in (66, 70, 73)]  # F# major, shorter
    assert report.key_stability(*notes_of(tmp_path / "a.mid", notes, vocab)) == 4 / 5


def test_longest_runs_are_those_of_the_script():
    rng = np.random.default_rng(0)
    end, lengths = bytes([pg.PIECE_END]), (3000, 2000, 60, 9, 0)
    steps = [bytes(rng.integers(126, 131, n).tolist()) + end for n in lengths]
    corpus = steps[0] + steps[1]
    pieces = [*steps[2:], steps[0][500:530] + steps[1][7:90], steps[1][-12:], end, b""]
    expected = [pg.longest_known_run(piece, ["a", "b", ""], corpus)[0] for piece in pieces]
    assert report.longest_runs(pieces, ["a", "b", ""], corpus) == expected and max(expected) == 84


# ---------- Two sets ----------


def test_halves_share_no_work_and_sides_are_equally_large():
    works = np.array([0] * 9 + [1, 2, 3] + [-1] * 5)
    for seed in range(20):
        half, other, ours = report.draw_sides(works, np.random.default_rng(seed))
        assert len(half) == len(other) == len(ours) == 2 and set(works[ours]) == {-1}
        assert len(set(works[half]) | set(works[other])) == 4  # each half has pairs of different works


def test_spread_takes_one_of_each_work_first():
    works = np.array([0, 0, 0, 1, 1, 2])
    order = works[report.spread(works, np.random.default_rng(0))]
    assert sorted(order[:3]) == [0, 1, 2] and sorted(order[3:5]) == [0, 1] and order[5] == 0


def test_distances_are_what_one_computes_by_hand():
    points, works, (a, b) = np.array([0.0, 2, 4, 6]), np.array([0, 1, -1, -1]), np.array([[0, 1], [2, 3]])
    apart = np.abs(np.subtract.outer(points, points))
    assert report.energy(apart, works, a, b) == pytest.approx((1 - (2 + 2) / 2 / (2 * 4)) ** 0.5)
    assert report.energy(apart * 0, works, a, b) == 0 == report.energy(apart, works, a, a)
    assert report.overlap(np.ones((4, 4)), works, a, b) == pytest.approx((1, 0), abs=1e-6)  # all alike
    far = np.abs(np.subtract.outer(points * [1, 1, 99, 99], points * [1, 1, 99, 99]))
    assert report.overlap(far, works, a, b)[0] < 0.01 and report.overlap(far, works, a, b)[1] > 5
    assert report.within(apart, np.array([7, 7, 8]), np.arange(3)).tolist() == [4, 2]  # not 2: of one work
    block = np.array([[-1.0], [1], [2], [4], [-2], [2]])  # of variance 1, moved by 3, twice as wide
    assert report.frechet([block], a, b) == pytest.approx(9) == report.frechet([block * 10], a, b)
    assert report.frechet([block], a, np.array([4, 5])) == pytest.approx((8**0.5 - 2**0.5) ** 2)


# ---------- Music and spoiled music ----------


def split_bars(ids, vocab):
    """The ids of each bar."""
    at = [i for i, token in enumerate(ids) if token == vocab.bar] + [len(ids)]
    return [ids[a:b] for a, b in zip(at, at[1:])]


def shuffle(ids, vocab, rng):
    """The pitches of all notes in another order."""
    ids = np.array(ids)
    is_pitch = pg.is_in(ids, vocab.pitches)
    ids[is_pitch] = rng.permutation(ids[is_pitch])
    return ids.tolist()


def loop(ids, vocab, rng):
    """The third bar all the time."""
    bars = split_bars(ids, vocab)
    return bars[2] * len(bars)


def transpose_bars(ids, vocab, rng):
    """Each bar in another key."""
    keys = [(bar, int(rng.integers(-6, 6))) for bar in split_bars(ids, vocab)]
    return [i + shift * (vocab.pitches.start <= i < vocab.pitches.stop) for bar, shift in keys for i in bar]


@pytest.fixture(scope="module")
def music(vocab):
    """The ids of 48 chorales, and the report's excerpts of them."""
    pieces = [pg.read_piece(path, vocab).ids.tolist() for path in MUSIC[::7][:48]]
    known = ["x"], bytes([pg.PIECE_END])
    return pieces, report.describe(list(enumerate(pieces)), "music", vocab, known)


def score(samples, held_out):
    """(distance, floor) as printed."""
    apart = np.array([values[:, 0] for values in report.compare(samples, held_out)[0].values()])
    return np.sqrt((apart**2).mean(0))


def test_real_music_scores_at_the_floor(music, monkeypatch):
    monkeypatch.setattr(report, "ROUNDS", 8)
    samples, held_out = music[1][::2], music[1][1::2]
    distance, floor = score([(-1, *rest) for _, *rest in samples], held_out)
    assert 0.7 * floor < distance < 1.3 * floor


@pytest.mark.parametrize("spoil, features", [
    (shuffle, ["harmony"]), (loop, ["structure", "key_stability"]),
    (transpose_bars, ["pitch_classes", "key_stability"])])
def test_spoiled_music_is_far_from_the_floor(music, vocab, monkeypatch, spoil, features):
    monkeypatch.setattr(report, "ROUNDS", 8)
    rng, (pieces, described) = np.random.default_rng(0), music
    spoiled = [(-1, spoil(ids, vocab, rng)) for ids in pieces[::2]]
    samples = report.describe(spoiled, "spoiled", vocab, (["x"], bytes([pg.PIECE_END])))
    distance, floor = score(samples, described[1::2])
    assert distance > 1.5 * floor
    found = report.compare(samples, described[1::2])[0]
    assert all(found[name][0, 0] > 2 * found[name][1, 0] for name in features)


# ---------- The whole report ----------


@pytest.mark.filterwarnings("error")
def test_report_compares_what_a_model_writes_or_a_folder_with_held_out_music(here, capsys):
    for i, path in enumerate(MUSIC[:12]):
        Path("midi").mkdir(exist_ok=True)
        Path("midi", path.name).write_bytes(path.read_bytes())
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "5", "--val-percent", "60"]) == 0
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert report.parse([]) == {"num_samples": 50, "samples": ""}
    for flags in ("--num-samples 4 --bars 6 --seed 1", "--samples midi"):
        assert report.main([*flags.split(), "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        values = dict(line.split(": ") for line in lines[-8:])
        assert list(values) == ["longest_known_run", "held_out_longest_known_run", "frechet", "frechet_floor",
                                "features", "features_at_floor", "distance", "floor"]
        assert values["features"] == "10" and 0 < float(values["floor"]) < 1 and float(values["distance"]) < 1
    means = {line.split()[0]: line.split()[1:] for line in lines if len(line.split()) == 3}
    assert float(means["known_run_notes"][0]) > float(means["known_run_notes"][1])  # copies
    assert before == sorted(here.rglob("*"))


def test_report_says_what_is_wrong_in_one_line(here, folder, capsys):
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "1"]) == 0
    capsys.readouterr()
    for flags in (["--checkpoint", "no.pt"], ["--bars", "x"], ["--device", "cpu"]):
        assert report.main(flags) == 2
        assert len((err := capsys.readouterr().err).splitlines()) == 1 and err.startswith("report: "), err
    assert "are held out, and 4 are needed" in err
