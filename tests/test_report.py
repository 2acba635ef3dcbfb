"""The report: features of excerpts, distances of sets, what it says of good and spoiled music."""

import re
from pathlib import Path

import numpy as np
import pytest
import report
import torch
from conftest import ROOT, TINY, pg, write_midi

MUSIC = sorted((ROOT / "my_midis").glob("*.mid"))
NOTHING_KNOWN = (["x"], bytes([pg.PIECE_END]))


def excerpt(path, notes, vocab, bpm=60.0):
    """What the report reads from a file of these notes: columns of notes, and bars."""
    path = write_midi(path / "a.mid", [notes], bpm=bpm)
    return report.read_notes(pg.read_piece(path.read_bytes(), vocab).ids, vocab)


# ---- One excerpt


def test_notes_are_in_seconds_and_in_their_bars(tmp_path, vocab):
    tune = [(0, 2, 60, 80), (0, 1, 55, 80), (7.5, 0.5, 62, 80)]
    notes, bars = excerpt(tmp_path, tune, vocab, bpm=120)
    assert bars == 2 and notes["bar"].tolist() == [0, 0, 1]
    assert notes["pitch"].tolist() == [55, 60, 62]
    assert notes["start"].tolist() == [0, 0, 3.75]
    assert notes["length"].tolist() == [0.5, 1, 0.25]
    silent_bar = np.array([vocab.bos_id, vocab.bar_id, vocab.id_of["TimeSig_4/4"]])
    assert report.read_notes(silent_bar, vocab) == ({}, 1)


def test_features_are_what_one_counts_by_hand(tmp_path, vocab):
    notes = []
    for bar in (0, 2):  # C major, and silence between
        notes += [(bar * 4, 2, pitch, 64) for pitch in (60, 64, 67)]
    row = report.measure(*excerpt(tmp_path, [*notes, (10, 1, 72, 112)], vocab))
    assert [len(vector) for vector in row.values()] == [12, 144, 12, 16, 16, 15, 12, 16, 3, 1]
    assert row["pitch_classes"][[0, 4, 7]] * 13 == pytest.approx([5, 4, 4])  # of 13 seconds
    pairs = np.flatnonzero(row["transitions"])
    assert [divmod(i, 12) for i in pairs] == [(0, 4), (4, 7), (7, 0)]
    assert row["transitions"][pairs] == pytest.approx(1 / 3)
    # E-G, C-E and C-G; the last C is alone
    assert row["harmony"][[3, 4, 7]] * 6 == pytest.approx([2, 2, 2])
    assert row["polyphony"] * 11 == pytest.approx([6, 7, 7] + [11] * 9)  # silence, one, two, three
    names = ("onsets", "lengths", "notes_a_bar", "velocity")
    onsets, lengths, counts, loud = (np.diff(row[name], prepend=0) for name in names)
    assert onsets[np.searchsorted(report.SECONDS, [2, 8]) - 1] == pytest.approx([0.5, 0.5])
    assert lengths[np.searchsorted(report.SECONDS, [1, 2]) - 1] * 7 == pytest.approx([1, 6])
    assert counts[[0, 4, 5]] * 3 == pytest.approx([1, 1, 1])  # bars of 0, 3 and 4 notes
    assert loud[[7, 13]] * 7 == pytest.approx([6, 1])  # velocities 56 to 63, 104 to 111


def test_harmony_counts_the_six_notes_after_a_long_one(tmp_path, vocab):
    tune = [(0, 4, 48, 80)] + [(i / 2, 0.25, 60 + i, 80) for i in range(8)]
    row = report.measure(*excerpt(tmp_path, tune, vocab))
    assert row["harmony"].tolist() == pytest.approx([1 / 6] * 6 + [0] * 6)


def test_features_are_the_same_in_every_key(tmp_path, vocab):
    rows = []
    for up in (60, 65):
        scale = (0, 2, 4, 5, 7, 11, 12, 7, 4, 0) * 4
        tune = [(i / 2, 0.5, up + pitch, 80) for i, pitch in enumerate(scale)]
        rows.append(report.measure(*excerpt(tmp_path, tune, vocab)))
    for name, vector in rows[0].items():
        assert np.allclose(vector, rows[1][name]), name


@pytest.mark.parametrize(
    "pitches, expected",
    [
        ([60, 61, 60, 61], [2 / 3, 0, 0]),  # two of the bars 1, 2, 3
        ([60, 61, 62, 60, 61, 62], [0, 1, 0]),
        ([*range(50, 60), 62, 51], [0, 0, 2 / 3]),  # octaves do not matter
        ([60], [0, 0, 0]),
    ],
)
def test_structure_finds_the_bar_that_comes_again(tmp_path, vocab, pitches, expected):
    notes = [(4 * bar, 1, pitch, 80) for bar, pitch in enumerate(pitches)]
    found = report.structure(*excerpt(tmp_path, notes, vocab))
    assert found.tolist() == pytest.approx(expected)


def test_key_stability_is_the_share_of_windows_in_the_key_of_the_whole(tmp_path, vocab):
    notes = []
    for bar in range(12):
        root, length = (60, 4) if bar < 7 else (66, 2)  # C major, then F# major, shorter
        notes += [(4 * bar, length, root + step, 80) for step in (0, 4, 7)]
    assert report.key_stability(*excerpt(tmp_path, notes, vocab)) == 3 / 5


def test_key_stability_sees_the_last_bar_also_of_an_odd_number(tmp_path, vocab):
    notes = [(4 * bar, 1, 60 + step, 80) for bar in range(4) for step in (0, 4, 7)]
    last = [(16 + n, 1, 66 + step, 80) for n in range(4) for step in (0, 4, 7, -12, 12)]
    assert report.key_stability(*excerpt(tmp_path, notes + last, vocab)) == 1 / 2
    assert report.key_stability(*excerpt(tmp_path, last, vocab)) == 1


def test_step_over_a_bar_line_is_that_of_the_highest_voice(tmp_path, vocab):
    tune = [(2 * n, 2, 76 + n, 80) for n in range(4)]
    alberti = [(n / 2, 0.5, 48 + n % 2, 60) for n in range(16)]
    path = write_midi(tmp_path / "tune.mid", [tune, alberti])
    ids = pg.read_piece(path.read_bytes(), vocab).ids
    assert report.step_over_bar_line(ids[:-1], 1, vocab) == 1
    assert report.step_over_bar_line(ids[:-1], 2, vocab) is None


def test_longest_runs_are_those_of_the_script():
    rng = np.random.default_rng(0)
    end = bytes([pg.PIECE_END])
    steps = [bytes(rng.integers(126, 131, n).tolist()) + end for n in (3000, 2000, 60, 9, 0)]
    corpus = steps[0] + steps[1]
    pieces = [*steps[2:], steps[0][500:530] + steps[1][7:90], steps[1][-12:], end, b""]
    expected = [pg.longest_known_run(piece, ["a", "b", ""], corpus)[0] for piece in pieces]
    assert report.longest_runs(pieces, ["a", "b", ""], corpus) == expected
    assert max(expected) == 84 and len(set(expected)) > 3


# ---- Two sets


def test_halves_share_no_work_and_sides_are_equally_large():
    works = np.array([0] * 9 + [1, 2, 3] + [-1] * 5)
    for seed in range(20):
        half, other, ours = report.draw_sides(works, np.random.default_rng(seed))
        assert len(half) == len(other) == len(ours) == 2 and set(works[ours]) == {-1}
        # Each half has pairs of different works.
        assert len(set(works[half]) | set(works[other])) == 4


def test_spread_takes_one_of_each_work_first():
    works = np.array([0, 0, 0, 1, 1, 2])
    order = works[report.spread(works, np.random.default_rng(0))]
    assert sorted(order[:3]) == [0, 1, 2] and sorted(order[3:5]) == [0, 1] and order[5] == 0


def test_distances_are_what_one_computes_by_hand():
    points = np.array([0.0, 2, 4, 6])
    works = np.array([0, 1, -1, -1])
    a, b = np.array([[0, 1], [2, 3]])
    apart = np.abs(np.subtract.outer(points, points))
    assert report.energy(apart, works, a, b) == pytest.approx((1 - (2 + 2) / 2 / (2 * 4)) ** 0.5)
    assert report.energy(apart * 0, works, a, b) == 0 == report.energy(apart, works, a, a)
    all_alike = report.overlap(np.ones((4, 4)), works, a, b)
    assert all_alike == pytest.approx((1, 0), abs=1e-6)
    points[b] *= 99
    oa, kld = report.overlap(np.abs(np.subtract.outer(points, points)), works, a, b)
    assert oa < 0.01 and kld > 5
    of_two_works = report.within(apart, np.array([7, 7, 8]), np.arange(3))
    assert of_two_works.tolist() == [4, 2]  # and not 2 within work 7
    block = np.array([[-1.0], [1], [2], [4], [-2], [2]])  # of variance 1, moved by 3, twice as wide
    assert report.frechet([block], a, b) == pytest.approx(9) == report.frechet([block * 10], a, b)
    twice_as_wide = report.frechet([block], a, np.array([4, 5]))
    assert twice_as_wide == pytest.approx((8**0.5 - 2**0.5) ** 2)


# ---- Music and spoiled music


def split_bars(ids, vocab):
    """The ids before the first bar, and those of each bar."""
    return np.split(ids, np.flatnonzero(ids == vocab.bar_id))


def shuffle(ids, vocab, rng):
    """The pitches of all notes in another order."""
    ids = ids.copy()
    is_pitch = vocab.says.kind[ids] == pg.Kind.PITCH
    ids[is_pitch] = rng.permutation(ids[is_pitch])
    return ids


def loop(ids, vocab, rng):
    """The third bar all the time."""
    bos, *bars = split_bars(ids, vocab)
    return np.concatenate([bos, *[bars[2]] * len(bars)])


def transpose_bars(ids, vocab, rng):
    """Each bar in another key."""
    bars = split_bars(ids, vocab)
    for bar in bars:
        bar[vocab.says.kind[bar] == pg.Kind.PITCH] += rng.integers(-6, 6)
    return np.concatenate(bars)


@pytest.fixture(scope="module")
def music(vocab):
    """The ids of 48 chorales, and the report's excerpts of them."""
    pieces = [pg.read_piece(path.read_bytes(), vocab).ids for path in MUSIC[::7][:48]]
    return pieces, report.describe(list(enumerate(pieces)), "music", vocab, NOTHING_KNOWN)


@pytest.fixture
def eight_rounds(monkeypatch):
    """Fewer random halvings."""
    monkeypatch.setattr(report, "ROUNDS", 8)


def score(found):
    """(distance, floor) as printed."""
    apart = np.array([values[:, 0] for values in found.values()])
    return np.sqrt((apart**2).mean(0))


def test_real_music_scores_at_the_floor(music, eight_rounds):
    _, described = music
    samples = [piece._replace(work=-1) for piece in described[::2]]
    found, _ = report.compare(samples, described[1::2])
    distance, floor = score(found)
    assert 0.7 * floor < distance < 1.3 * floor


@pytest.mark.parametrize(
    "spoil, features",
    [
        (shuffle, ["harmony"]),
        (loop, ["structure", "key_stability"]),
        (transpose_bars, ["pitch_classes", "key_stability"]),
    ],
)
def test_spoiled_music_is_far_from_the_floor(music, vocab, eight_rounds, spoil, features):
    pieces, described = music
    rng = np.random.default_rng(0)
    spoiled = [(-1, spoil(ids.copy(), vocab, rng)) for ids in pieces[::2]]
    samples = report.describe(spoiled, "spoiled", vocab, NOTHING_KNOWN)
    found, _ = report.compare(samples, described[1::2])
    distance, floor = score(found)
    assert distance > 1.4 * floor
    for name in features:
        assert found[name][0, 0] > 1.75 * found[name][1, 0], name


def test_work_of_which_one_recording_was_learned_is_not_held_out(here, vocab):
    for number in range(10):
        pitches = np.random.default_rng(number).integers(40, 90, 80).tolist()
        tune = [(n / 2, 0.5, pitch, 80) for n, pitch in enumerate(pitches)]
        write_midi(Path(f"midi/work {number // 2}/{number}.mid"), [tune])
    settings = pg.Settings()
    settings.program.midi_dir = "midi"
    settings.data.piece_is_folder = True
    [piece] = pg.read_folder(Path("midi/work 0"), vocab, "")[:1]
    intervals = pg.as_tensor(pg.pitch_intervals(piece.ids, vocab))
    checkpoint = pg.Checkpoint("", {}, [], "", [], ["0.mid"], tensors={"intervals": intervals})
    pieces = report.read_new_pieces(settings, vocab, checkpoint)
    assert sorted({Path(p.path).parts[0] for p in pieces}) == [f"work {n}" for n in range(1, 5)]
    excerpt = pg.replace(piece, ids=piece.ids[:-80])
    assert not report.is_new(excerpt, checkpoint.intervals(), np.array([pg.NO_HASH]), vocab)


def test_classes_have_equal_weight_however_many_pieces_they_have():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 2))
    y = np.repeat([0, 1], [900, 100])
    found = report.classify(x, y, rng.normal(size=(1000, 2)))
    assert 0.3 < found.mean() < 0.7, "of music that is of neither class"


# ---- The whole report


@pytest.mark.filterwarnings("error")
def test_report_compares_what_a_model_writes_or_a_folder_with_held_out_music(
    here, capsys, eight_rounds, monkeypatch
):
    monkeypatch.setattr(report, "LEAST_TO_CLASSIFY", 4)
    Path("midi").mkdir()
    for path in MUSIC[:12]:
        Path("midi", path.name).write_bytes(path.read_bytes())
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "5", "--val-percent", "60"]) == 0
    before = sorted(here.rglob("*"))
    modes = {"samples": "", "gaps": False, "styles": "", "hands": ""}
    assert report.parse([]) == {"num_samples": 50} | modes
    for flags in ("--num-samples 4 --bars 6 --seed 1", "--samples midi"):
        capsys.readouterr()
        assert report.main([*flags.split(), "--device", "cpu", "--cache-dir", "no"]) == 0
        lines = capsys.readouterr().out.splitlines()
        values = dict(line.split(": ") for line in lines[-10:])
        assert list(values) == [
            "told_apart",
            "told_apart_floor",
            "longest_known_run",
            "held_out_longest_known_run",
            "frechet",
            "frechet_floor",
            "features",
            "features_at_floor",
            "distance",
            "floor",
        ]
        assert values["features"] == "10" and 0 < float(values["floor"]) < 1
        assert float(values["distance"]) < 1
    means = dict(line.split(maxsplit=1) for line in lines if line.count(".") == 2)
    ours, held_out = map(float, means["known_run_notes"].split())
    assert ours > held_out, "the samples hold copies"
    assert before == sorted(here.rglob("*"))


def test_gaps_are_measured_beside_a_plain_continuation(here, capsys):
    Path("midi").mkdir()
    for path in MUSIC[:12]:
        Path("midi", path.name).write_bytes(path.read_bytes())
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "20", "--val-percent", "60"]) == 0
    capsys.readouterr()
    assert report.main(["--gaps", "--num-samples", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {key: float(value) for key, value in (line.split(": ") for line in lines[-10:])}
    assert values["gap_tokens"] > 100 and values["seams"] > 0
    for name in ("", "last_third_"):
        assert 1 < values[f"{name or 'nats_'}continued"] < 9
        assert 1 < values[f"{name or 'nats_'}filled"] < 9
        assert values[f"{name or 'nats_'}continued"] != values[f"{name or 'nats_'}filled"]


def test_hands_are_measured_on_files_of_two_tracks(here, capsys):
    high = [(n, 1, 72 + n % 5, 80) for n in range(20)]
    low = [(n, 1, 45 + n % 5, 80) for n in range(20)]
    write_midi(Path("midi/clear.mid"), [low, high])
    write_midi(Path("midi/one track.mid"), [low])
    crossed = [*high[:15], *[(n, 1, 30, 80) for n in range(15, 20)]]  # at the end it plays the bass
    write_midi(Path("midi/crossed.mid"), [low, crossed])
    assert report.main(["--hands", "midi"]) == 0
    block = dict(re.findall(r"(\w+): (\S+)", capsys.readouterr().out))
    assert (block["files"], block["notes"]) == ("2", "80")
    assert float(block["in_their_hand"]) == pytest.approx(70 / 80, abs=0.02)
    assert float(block["median_of_files"]) == float(block["in_their_hand"])
    assert report.main(["--hands", "none"]) == 2
    assert "there is no folder none" in capsys.readouterr().err


def test_styles_are_told_apart_by_what_they_are(here, capsys, eight_rounds):
    """Two styles that differ in every feature, and a model that has learned neither."""
    for number in range(12):
        tune = np.random.default_rng(number).integers(12, size=64).tolist()
        high = [(n / 2, 0.5, 72 + tune[n], 100) for n in range(64)]
        low = [(2 * n, 2, 40 - tune[n], 40) for n in range(32)]
        write_midi(Path(f"midi/high/{number}.mid"), [high])
        write_midi(Path(f"midi/low/{number}.mid"), [low])
    line = f"--midi-dir midi --style-from-folder --steps 2 --val-percent 60 {' '.join(TINY)}"
    assert pg.main(line.split()) == 0
    capsys.readouterr()
    flags = "--styles high,low --num-samples 4 --bars 4 --seed 1"
    assert report.main(flags.split()) == 0
    values = dict(re.findall(r"^(\w+): (\S+)$", capsys.readouterr().out, re.M))
    assert float(values["classifier_accuracy"]) > 0.9
    for name, other in (("high", "low"), ("low", "high")):
        assert int(values[f"{name}_held_out"]) >= 4
        assert 0 < float(values[f"{name}_floor"]) < float(values[f"{name}_distance"]) <= 1
        assert 0 < float(values[f"{name}_distance_of_{other}"]) <= 1
        assert 0 <= float(values[f"{name}_told"]) <= 1
    told = report.classify(np.eye(6), np.arange(6) % 3, np.eye(6))
    assert told.tolist() == [0, 1, 2, 0, 1, 2]


def test_what_differs_is_told_apart_and_what_does_not_is_not():
    rng = np.random.default_rng(0)

    def draw(n, shift):
        features = rng.standard_normal((n, 6)) + shift
        return [
            report.Excerpt(i // 2, {"a": row[:4], "b": row[4:]}, {})
            for i, row in enumerate(features)
        ]

    real = draw(200, 0.0)
    same, floor = report.tell_real_from_written(draw(200, 0.0), real)
    other, _ = report.tell_real_from_written(draw(200, 2.0), real)
    assert 0.35 < same < 0.65 and 0.35 < floor < 0.65
    assert other > 0.95
    copies = np.repeat(rng.standard_normal((50, 6)), 2, axis=0)
    halves = np.arange(100) // 2 % 2
    told = report.cross_validated_accuracy(copies, halves, np.arange(100) // 2)
    assert told < 0.65, "the other copy of a work tells nothing"


def test_losses_of_gaps_are_those_of_the_model(vocab):
    """A model that knows no order is as good with what follows as without."""
    pieces = [pg.read_piece(path.read_bytes(), vocab) for path in MUSIC[:4]]
    sizes = pg.ModelSettings(n_layer=1, n_head=2, n_embd=32, block_size=128)
    model = pg.PianoGPT(sizes, len(vocab.words), vocab.grid)
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj.weight)
    found = report.measure_gaps(model, pieces, vocab)
    assert found["nats_filled"] == pytest.approx(found["nats_continued"], abs=1e-4)
    assert found["last_third_filled"] == pytest.approx(found["last_third_continued"], abs=1e-4)
    assert found["nats_filled"] != found["last_third_filled"]


def test_music_that_the_model_learned_is_never_held_out_whatever_its_folder(here, vocab):
    Path("midi").mkdir()
    Path("all").mkdir()
    for path in MUSIC[:12]:
        Path("all", path.name).write_bytes(path.read_bytes())
    for path in MUSIC[:7]:
        Path("midi", path.name).write_bytes(path.read_bytes())
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "1", "--val-percent", "20"]) == 0
    checkpoint = pg.load_checkpoint(Path("pianogpt.safetensors"))
    settings = pg.Settings(program=pg.ProgramSettings(midi_dir="all", cache_dir=""))
    found = {piece.path for piece in report.read_new_pieces(settings, vocab, checkpoint)}
    assert len(found) >= 4
    assert not found & set(checkpoint.pieces)
    assert found & {path.name for path in MUSIC[:7]}, "held out of its own folder"


def test_report_says_what_is_wrong_in_one_line(here, folder, capsys):
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "1"]) == 0
    for flags, problem in [
        ("--checkpoint no.pt", "no.pt"),
        ("--bars x", "--bars"),
        ("--device cpu", "are new to the model, and 4 are needed"),
    ]:
        capsys.readouterr()
        assert report.main(flags.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("report: ") and problem in err and err.count("\n") == 1
