"""The report: figures of pieces, and the table of their means."""

from pathlib import Path

import numpy as np
import pytest
import report
from conftest import TINY, pg, scale, write_midi


def figures(path, notes, vocab, bpm=120.0, known=()):
    """The figures of a file of these notes."""
    return report.figures(pg.read_piece(write_midi(path, [notes], bpm=bpm), vocab).ids.tolist(), vocab, known)


def test_density_range_and_silence_are_what_one_counts_by_hand(tmp_path, vocab):
    notes = [(0, 6, 60, 60), (0, 2, 64, 80), (4, 1, 72, 100), (12, 2, 60, 60), (12, 2, 64, 80), (15, 1, 60, 60)]
    ids = pg.read_piece(write_midi(tmp_path / "a.mid", [notes], bpm=60), vocab).ids.tolist()
    assert report.describe(vocab.decode(ids)) == pytest.approx({
        "notes": 6, "seconds": 16, "notes_per_second": 6 / 16, "lowest": 60, "highest": 72,
        "silence_percent": 100 * 7 / 16})


def test_figures_of_a_piece_are_what_one_counts_by_hand(tmp_path, vocab):
    chord = [(0, 2, 60, 60), (0, 2, 64, 80)]
    notes = [*chord, (4, 1, 72, 100), *((start + 12, *rest) for start, *rest in chord), (15, 1, 60, 60)]
    row = figures(tmp_path / "a.mid", notes, vocab, bpm=60)
    lengths, p, loud = [2, 2, 1, 2, 2, 1], np.array([4, 2]) / 6, [59, 79, 99, 59, 79, 59]  # of 32 levels
    assert list(row.values()) == pytest.approx([
        6 / 16, 10 / 6, 60, 72, -(p * np.log2(p)).sum(), np.mean(lengths), np.std(lengths), np.mean(loud),
        np.std(loud), 100 * 10 / 16, 25, 0])


def test_repeated_bars_are_counted(tmp_path, vocab):
    row = figures(tmp_path / "a.mid", [(bar * 4, 1, 60 + (bar == 1), 80) for bar in range(4)], vocab)
    assert row["repeated_bars_percent"] == 25  # the fourth; the first also holds the tempo


def test_known_run_counts_notes_in_any_key_and_a_piece_without_notes_has_no_figures(tmp_path, vocab):
    notes = [(i, 1, pitch, 80) for i, pitch in enumerate((50, 60, 62, 66, 64, 40))]
    known = ["x"], bytes(128 + step for step in (7, 2, 4, -2, 9)) + bytes([pg.PIECE_END])
    assert figures(tmp_path / "a.mid", notes, vocab, known=known)["known_run_notes"] == 4
    assert report.figures([vocab.bar, vocab.words.index("TimeSig_4/4")], vocab, ()) == {}


def test_openings_end_at_the_last_bar_line_within_the_length(vocab):
    bar = [vocab.bar, 9, 9]
    pieces = [pg.Piece(np.array(bar * 4), split=split) for split in ("train", "test")]
    for length, bars in ((5, 1), (6, 2), (99, 4)):
        assert list(report.openings(pieces, "train", length, vocab)) == [bar * bars]
    counts = [len(list(report.openings(pieces * n, "train", 5, vocab))) for n in (50, 51)]
    assert counts == [50, 26]  # all, every other one


def test_distance_counts_in_standard_deviations_and_leaves_out_what_does_not_vary():
    others = [{"a": 0.0, "b": 5.0, "c": 1, "known_run": 1}, {"a": 2.0, "b": 5.0, "c": 3, "known_run": 9}]
    rows = [{"a": 4.0, "b": 7.0, "c": 2, "known_run": 99}]  # 3 deviations of 1, no deviation, 0
    assert report.distance(rows, others) == 1.5 and report.distance(others, others) == 0


@pytest.mark.filterwarnings("error")
def test_report_shows_samples_beside_music_but_no_distance_from_a_single_piece(here, folder, capsys):
    assert pg.main(["--midi-dir", "midi", *TINY, "--steps", "5"]) == 0
    before = sorted(here.rglob("*"))
    assert report.parse([]) == {"num_samples": 50}
    assert report.main("--midi-dir midi --num-samples 3 --bars 6 --device cpu".split()) == 0
    header, *table = capsys.readouterr().out.split("mean of")[1].splitlines()
    assert header.split()[:2] == ["3", "samples"] and header.split()[3::2] == ["train", "validation"]
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert rows["known_run_notes"][1] == "-" and float(rows["known_run_notes"][2]) > 0
    assert float(rows["distance_from_validation"][0]) > 0 == float(rows["distance_from_validation"][2])
    assert report.main(["--checkpoint", "no.pt"]) == report.main(["--bars", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2 and before == sorted(here.rglob("*"))
    for split, number in (("train", 1), ("validation", 2)):
        write_midi(Path("two", split, "piece.mid"), scale(number))
    assert report.main("--num-samples 2 --bars 6 --device cpu --midi-dir two".split()) == 0
    assert "1 validation" in (out := capsys.readouterr().out) and "distance" not in out
