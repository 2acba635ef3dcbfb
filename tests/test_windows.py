"""Learning: pieces become windows, and windows batches; training music is transposed."""

import itertools

import numpy as np
import pytest
import torch
from conftest import pg, scale, write_midi

VOCAB = pg.Vocabulary(pg.TokenSettings())
V = len(VOCAB.words)
CHORDS = VOCAB.words[VOCAB.rooted_chord_ids]
ROOTS = [word.removeprefix("Chord_").split(":")[0] for word in CHORDS[:12]]
T = 32


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Pieces of music: a long one, a short one, one of one note, and a high one."""
    path = tmp_path_factory.mktemp("windows") / "a.mid"
    high = [(i / 2, 0.5, 90 + i % 16, 80) for i in range(40)]
    music = [scale(1, bars=32), scale(2, bars=1), [[(0, 1, 60, 80)]], [high]]
    found = [pg.read_piece(write_midi(path, tracks).read_bytes(), VOCAB) for tracks in music]
    assert len(found[0].ids) > pg.MEMORY + 2 * T and len(found[2].ids) < T
    return found


def numbered(*lengths):
    """A corpus of pieces of these lengths in which the ids count the tokens, modulo V."""
    total = sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    ids = torch.arange(total) % V
    columns = (ids.short(), torch.arange(total).int(), torch.full((total,), 60))
    return pg.Corpus(*columns, offsets, torch.zeros(len(lengths), dtype=torch.long))


def make_batches(corpus, transpose=0, seed=3, batch_size=8):
    """Batches of windows of T tokens."""
    settings = pg.Settings()
    settings.data.transpose = transpose
    settings.data.gap_percent = 0.0
    settings.model.block_size = T
    settings.train.batch_size = batch_size
    settings.train.seed = seed
    return pg.Batches(corpus, VOCAB, settings)


def column(ids, start, end, filler):
    """ids[start:end], with a filler before the first and after the last one."""
    return [int(ids[n]) if 0 <= n < len(ids) else filler for n in range(start, end)]


def assert_window_of(piece, at, window):
    """A window, of one row, holds what a piece holds from its token number `at` on."""
    ids = piece.ids
    here = slice(at, at + T)
    length = len(ids[here])
    assert window.idx[0].tolist() == column(ids, at, at + T, pg.PAD)
    assert window.targets[0].tolist() == column(ids, at + 1, at + 1 + T, pg.IGNORE)
    assert window.recent[0].tolist() == column(ids, at - pg.RECENT, at, pg.PAD)
    order = pg.TOKEN_BEATS * VOCAB.grid * np.arange(length)
    time = piece.time[here] - piece.time[at] + order
    assert window.time[0, :length].tolist() == pytest.approx(time.tolist())
    assert window.pitch[0, :length].tolist() == piece.pitch[here].tolist()
    counts = np.bincount(ids[max(0, at - pg.MEMORY) : at], minlength=V)
    assert np.array_equal(window.before[0] * pg.MEMORY, counts)


def test_window_holds_what_its_piece_holds_at_every_position(pieces):
    corpus = pg.make_corpus(pieces)
    windows = pg.cut_windows(corpus, torch.arange(len(corpus.ids)), T, VOCAB)
    start = 0
    for piece in pieces:
        for at in range(len(piece.ids)):
            assert_window_of(piece, at, windows.rows(slice(start + at, start + at + 1)))
        start += len(piece.ids)
    assert start == len(corpus.ids)


def test_groups_of_windows_make_the_whole(pieces):
    windows = pg.cut_all_windows(pg.make_corpus(pieces), T, T, VOCAB)
    groups = windows.groups_of(3)
    assert [len(group.idx) for group in groups[:-1]] == [3] * (len(groups) - 1)
    for whole, *parts in zip(windows, *groups, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert windows._replace(targets=None).groups_of(3)[0].targets is None


def test_batch_i_is_the_same_whatever_came_before(pieces):
    corpus = pg.make_corpus(pieces)
    one = make_batches(corpus, transpose=5)
    other = make_batches(corpus, transpose=5)
    for i in range(5):
        one[i]
    assert all(torch.equal(a, b) for a, b in zip(one[7], other[7], strict=True))
    assert not torch.equal(one[7].idx, one[8].idx)
    assert not torch.equal(one[7].idx, make_batches(corpus, transpose=5, seed=4)[7].idx)


def test_every_token_is_drawn_and_about_evenly():
    lengths = (300, 200, 370)
    batches = make_batches(numbered(*lengths))
    drawn = np.zeros(sum(lengths), int)
    for i in range(5 * pg.SHUFFLED):
        targets = batches[i].targets[1:]  # the first window of eight begins a piece
        unscored = (targets == pg.IGNORE).sum(1)
        assert set(unscored.tolist()) <= {0, 1, 2}, "after EOS, for FILL"
        drawn += np.bincount(targets[targets != pg.IGNORE], minlength=len(drawn))
    usual = np.median(drawn)
    for of_piece in np.split(drawn, np.cumsum(lengths)[:-1]):
        first, *rest = of_piece
        assert first == 0, "nothing comes before BOS that could foretell it"
        # Near the ends of a piece windows crowd; the outermost tokens are in few of them.
        assert 0.45 * usual < min(rest) and max(rest) < 1.55 * usual
        assert np.abs(of_piece[T + 1 : -T] / usual - 1).max() < 0.05
        assert abs(np.mean(rest) / usual - 1) < 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_training_windows_are_spread_evenly_at_any_time(seed):
    corpus = numbered(*[1] * 10_000)  # as if a piece began everywhere: no window moves
    batches = make_batches(corpus, seed=seed)
    parts = 2 * pg.SHUFFLED * pg.OPENING_EVERY
    starts = torch.cat([batches.starts(i) for i in range(parts // 8)])
    for n in (parts // 2, parts):
        some = starts[:n].sort().values
        gaps = torch.cat([some, some[:1] + 10_000]).diff()
        # Of random numbers the largest gap is hundreds of times the smallest.
        assert gaps.max() <= 3 * gaps.min()


def test_seeds_draw_the_same_windows_in_another_order():
    """Another offset alone would leave two seeds more alike than two shuffles are."""
    corpus = numbered(*[1] * 10_000)
    one, two = (
        torch.stack([make_batches(corpus, seed=seed).starts(i) for i in range(pg.SHUFFLED)])
        for seed in (0, 1)
    )
    steps = (one - two) % 10_000  # between windows of the same number
    assert len(steps[:, 1].unique()) > pg.SHUFFLED / 2
    again = torch.cat([make_batches(corpus, seed=1, batch_size=5).starts(i) for i in range(100)])
    assert torch.equal(again, two.flatten()[:500]), "whatever the size of the batches"


def test_every_eighth_window_begins_a_piece_all_pieces_as_often():
    lengths = (1500, 500, 700, 300)
    batches = make_batches(numbered(*lengths), batch_size=4)
    starts = torch.cat([batches.starts(i) for i in range(160)]).view(80, 8)
    begins = [0, 1500, 2000, 2700]
    openings, others = starts[:, 0], starts[:, 1:]
    for begin in begins:
        assert 15 <= (openings == begin).sum() <= 25
    assert torch.isin(others, torch.tensor(begins)).float().mean() < 0.05


def moved(word, shift):
    """A word as it is some semitones higher."""
    kind, value = word.split("_")
    if kind == "Pitch":
        return f"Pitch_{int(value) + shift}"
    if kind == "Chord" and value != "none":
        root, quality = value.split(":")
        return f"Chord_{ROOTS[(ROOTS.index(root) + shift) % 12]}:{quality}"
    return word


def moved_ids(ids, shift):
    """ids (N,) some semitones higher."""
    return [VOCAB.id_of[moved(VOCAB.words[i], shift)] for i in ids.tolist()]


def has_root(ids):
    """Which of ids are chords that have a root."""
    chords = VOCAB.rooted_chord_ids
    return (ids >= chords.start) & (ids < chords.stop)


def test_transposing_moves_notes_and_roots_of_chords_as_far_and_nothing_else():
    words = [f"Pitch_{pitch}" for pitch in range(40, 90)] + CHORDS
    words += [word for word in VOCAB.words if not word.startswith(("Pitch", "Chord_"))]
    ids = torch.tensor([VOCAB.id_of[word] for word in [*words, "Chord_none"]])
    for shift in (-12, -5, 0, 1, 7, 12):
        found, moves = pg.transpose(ids[None], torch.tensor([shift]), VOCAB)
        assert found[0].tolist() == moved_ids(ids, shift)
        is_root = has_root(ids)
        assert {*moves[0, ~is_root].tolist()} == {shift}
        pitches = torch.from_numpy(VOCAB.says.pitch)
        assert torch.equal((pitches[ids] + moves[0])[is_root], pitches[found[0, is_root]])


def test_transposing_stops_at_the_ends_of_the_piano():
    rows = (("Pitch_60", "Pitch_107", "Chord_B:min"), ("Pitch_23", "Pitch_108", "Chord_C:maj"))
    ids = torch.tensor([[VOCAB.id_of[word] for word in row] for row in rows])
    found, moves = pg.transpose(ids.repeat(2, 1), torch.tensor([5, 5, -5, -5]), VOCAB)
    assert moves[:, 0].tolist() == [1, 0, -5, -2]
    for row, shift, of_row in zip(ids.repeat(2, 1), moves[:, 0].tolist(), found, strict=True):
        assert of_row.tolist() == moved_ids(row, shift)


def test_training_moves_ids_pitches_and_counts_by_the_same_semitones(pieces):
    corpus = pg.make_corpus(pieces)
    pitches = torch.from_numpy(VOCAB.says.pitch)
    seen = set()
    for i in range(40):
        all_old = make_batches(corpus)[i]
        all_new = make_batches(corpus, transpose=5)[i]
        assert torch.equal(all_new.time, all_old.time)
        is_root = has_root(all_new.idx)
        assert torch.equal(all_new.pitch[is_root], pitches[all_new.idx[is_root]].float())
        for old, new in zip(all_old.groups_of(1), all_new.groups_of(1), strict=True):
            moves = new.pitch - old.pitch
            [shift] = {*moves[~has_root(new.idx)].int().tolist()}
            seen.add(shift)
            assert new.idx[0].tolist() == moved_ids(old.idx[0], shift)
            assert new.recent[0].tolist() == moved_ids(old.recent[0], shift)
            scored = old.targets != pg.IGNORE
            assert torch.equal(scored, new.targets != pg.IGNORE)
            assert new.targets[scored].tolist() == moved_ids(old.targets[scored], shift)
            counted = old.before[0].nonzero()[:, 0]
            expected = torch.zeros(V)
            expected[moved_ids(counted, shift)] = old.before[0, counted]
            assert torch.equal(new.before[0], expected)
    assert seen == {*range(-5, 6)}


@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 18, 31, 33, 100, 101])
@pytest.mark.parametrize("stride", [8, 16])
def test_windows_score_every_token_but_the_first_once_after_the_overlap(length, stride):
    windows = pg.cut_all_windows(numbered(length, 3, length), 16, stride, VOCAB)
    scored = windows.targets != pg.IGNORE
    expected = [*range(1, length), length + 1, length + 2, *range(length + 4, 2 * length + 3)]
    assert windows.targets[scored].tolist() == expected
    assert ((windows.idx + 1 == windows.targets) | ~scored).all()
    assert scored.any(1).all(), "each window is of use"
    is_first = torch.isin(windows.idx[:, 0], torch.tensor([0, length, length + 3]))
    assert is_first.sum() == 3 and not windows.before[is_first].any()
    assert not scored[~is_first, : 16 - stride].any(), "the window before scored these"
    for old, new in zip(windows.idx[:-1], windows.idx[1:], strict=True):
        if new[0] not in (0, length, length + 3):
            assert torch.equal(old[stride:], new[: 16 - stride])


def test_number_of_windows_may_be_limited_and_those_are_spread_evenly():
    corpus = numbered(161)
    windows = pg.cut_all_windows(corpus, 16, 16, VOCAB, limit=4)
    assert windows.idx[:, 0].tolist() == [0, 48, 96, 144]
    few = pg.cut_all_windows(corpus, 16, 8, VOCAB, limit=2)
    assert (few.targets != pg.IGNORE).sum(1).tolist() == [16, 8]
    assert len(pg.cut_all_windows(corpus, 16, 16, VOCAB, limit=0).idx) == 0
    assert len(pg.cut_all_windows(pg.make_corpus([]), 16, 16, VOCAB).idx) == 0
