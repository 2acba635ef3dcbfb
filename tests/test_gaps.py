"""Bars between others are written anew, and all else stays as it is."""

import itertools

import numpy as np
import pytest
import torch
from conftest import TPQ, notes_of, pg, scale, write_midi
from symusic import Note, Score, Tempo, TimeSignature, Track
from test_music import assert_grammar
from torch.nn import functional as F

VOCAB = pg.Vocabulary(pg.TokenSettings())
V = len(VOCAB.words)
BLOCK = 256


def make_model(block_size=BLOCK, styles=0):
    """An untrained model of two layers that does not forget what it is told."""
    torch.manual_seed(0)
    sizes = pg.ModelSettings(2, n_head=2, n_embd=32, block_size=block_size)
    model = pg.PianoGPT(sizes, V, VOCAB.grid, styles)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    torch.nn.init.normal_(model.memory.weight, std=3.0)
    torch.nn.init.normal_(model.recent, std=0.5)
    torch.nn.init.normal_(model.style.weight[1:].data)
    return model


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    """Eight bars of a scale in two hands."""
    path = write_midi(tmp_path_factory.mktemp("gaps") / "a.mid", scale())
    return pg.read_piece(path.read_bytes(), VOCAB)


def lettered(text):
    """A window of one row whose ids are letters; its times are places, its pitches count down."""
    ids = torch.tensor([[ord(c) for c in text]])
    place = torch.arange(len(text))[None]
    targets = torch.cat([ids[:, 1:], torch.tensor([[ord("!")]])], dim=1)
    none = torch.zeros(1, V)
    recent = torch.zeros(1, pg.RECENT, dtype=torch.long)
    style = torch.zeros(1, dtype=torch.long)
    return pg.Window(ids, place.float(), 100 - place.float(), recent, none, style, targets)


def read(window):
    """The ids of a lettered window as text, FILL as _."""
    return "".join("_" if n == VOCAB.fill_id else chr(n) for n in window.idx[0])


def test_gap_comes_after_what_follows_it_and_each_token_keeps_its_place_and_target():
    old = lettered("abcdefgh")
    new = pg.move_gaps(old, torch.tensor([[3, 5]]), VOCAB)
    assert read(new) == "abcfg_de"
    assert new.time[0].tolist() == [0, 1, 2, 5, 6, 3, 3, 4]
    assert new.pitch[0].tolist() == [100, 99, 98, 97, 97, 97, 97, 96]
    assert "".join(chr(n) for n in new.targets[0]) == "bcdghdef", "d, not f, follows c"
    assert torch.equal(new.recent, old.recent) and torch.equal(new.before, old.before)


def test_what_follows_a_gap_does_not_tell_the_last_pitch_in_it():
    old = lettered("abcdefgh")
    old.idx[0, 6] = VOCAB.pitch_ids.start
    new = pg.move_gaps(old, torch.tensor([[3, 5]]), VOCAB)
    # f has the pitch of d, as FILL has; g is a note, with a pitch of its own.
    assert new.pitch[0].tolist() == [100, 99, 98, 97, 94, 97, 97, 96]


def test_window_without_a_gap_stays_and_padding_stays_last():
    old = lettered("abcdefgh")
    new = pg.move_gaps(old, torch.tensor([[0, 0]]), VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    old.idx[0, 6:] = pg.PAD
    old.targets[0, 5:] = pg.IGNORE
    new = pg.move_gaps(old, torch.tensor([[1, 3]]), VOCAB)
    assert read(new) == "adef_bc\0"
    assert new.targets[0].tolist() == [*b"bef", pg.IGNORE, *b"bcd", pg.IGNORE]


def test_gaps_lie_between_any_two_bar_lines_as_often(piece):
    ids = torch.from_numpy(piece.ids).long()[None].repeat(4000, 1)[:, :BLOCK]
    lines = np.flatnonzero(np.isin(piece.ids[:BLOCK], [VOCAB.bar_id, VOCAB.eos_id]))
    assert len(lines) > 4
    drawn = pg.draw_gaps(ids, 0.25, np.random.default_rng(0), VOCAB)
    has_gap = drawn[:, 1] > 0
    assert has_gap.float().mean() == pytest.approx(0.25, abs=0.03)
    pairs, times = drawn[has_gap].unique(dim=0, return_counts=True)
    inner = [line for line in lines if 0 < line < BLOCK - 1]
    assert pairs.tolist() == [[a, b] for a in inner for b in inner if a < b]
    assert times.min() > times.max() / 4
    assert not pg.draw_gaps(ids, 0.0, np.random.default_rng(0), VOCAB).any()
    one_line = ids[:, : lines[1]]
    assert not pg.draw_gaps(one_line, 1.0, np.random.default_rng(0), VOCAB).any()


def test_training_has_its_share_of_gaps(piece):
    settings = pg.Settings()
    settings.model.block_size = 128
    settings.train.batch_size = 400
    for percent in (0.0, 25.0, 100.0):
        settings.data.gap_percent = percent
        windows = pg.Batches(pg.make_corpus([piece]), VOCAB, settings)[0]
        share = (windows.idx == VOCAB.fill_id).any(1).float().mean()
        assert share == pytest.approx(percent / 100, abs=0.06)
        assert not (windows.targets == VOCAB.fill_id).any()


def test_loss_of_a_moved_window_is_that_of_a_mask_in_the_order_of_the_music(piece, monkeypatch):
    """What follows the gap does not see it, and the gap sees all; every token in its true place."""
    model = make_model()
    windows = pg.cut_windows(pg.make_corpus([piece]), torch.tensor([0, 20]), BLOCK, VOCAB)
    gaps = pg.draw_gaps(windows.idx, 1.0, np.random.default_rng(3), VOCAB)
    moved = pg.move_gaps(windows, gaps, VOCAB)
    assert (moved.idx == VOCAB.fill_id).any(1).all()
    loss = model(moved)

    order = moved.time.argsort(dim=1, stable=True)  # FILL, of the gap's time, before the gap
    rank = torch.arange(BLOCK).expand(2, -1).gather(1, order)  # of each token in the moved window
    sees = rank[:, :, None] >= rank[:, None, :]  # (2, T, T)
    assert not torch.equal(sees, torch.ones_like(sees).tril())

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None])

    def embed(window):  # of recent tokens, those read before
        return pg.PianoGPT.embed(model, moved).gather(1, order[:, :, None].expand(-1, -1, 32))

    monkeypatch.setattr(pg, "attend", attend)
    monkeypatch.setattr(model, "embed", embed)
    in_order = pg.Window(
        *(column.gather(1, order) for column in moved[:3]),
        *moved[3:6],
        targets=moved.targets.gather(1, order),
    )
    assert (in_order.time.diff(dim=1) >= 0).all()
    assert model(in_order).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("first, last", [(3, 4), (1, 2), (6, 8)])
def test_what_is_read_while_writing_is_what_is_read_while_learning(first, last, piece):
    T = len(piece.ids)
    model = make_model(block_size=2 * T)
    gap = pg.find_gap(piece.ids, first, last, VOCAB)
    learned = pg.cut_windows(pg.make_corpus([piece]), torch.tensor([0]), T + 1, VOCAB)
    learned = pg.move_gaps(learned, torch.tensor([[gap.begin, gap.end]]), VOCAB)
    window = pg.GapWriting(model, VOCAB, gap).new_window()
    n = window.idx.size(1)
    assert n == T - (gap.end - gap.begin) + 2, "all but the gap, FILL, and the gap's first Bar"
    assert window.idx[0].tolist() == learned.idx[0, :n].tolist()
    assert torch.allclose(window.time, learned.time[:, :n])
    assert torch.equal(window.pitch, learned.pitch[:, :n])
    assert torch.equal(window.recent, learned.recent)
    assert not window.before.any()


@torch.inference_mode()
def test_long_gap_in_a_long_piece_reads_both_sides_and_counts_the_rest(tmp_path):
    path = write_midi(tmp_path / "long.mid", scale(bars=24))
    ids = pg.read_piece(path.read_bytes(), VOCAB).ids
    model = make_model(block_size=64)
    gap = pg.find_gap(ids, 8, 11, VOCAB)
    writing = pg.GapWriting(model, VOCAB, gap)
    read = []

    def remember(module, inputs):
        read.append(inputs[0])

    model.register_forward_pre_hook(remember)
    settings = pg.SampleSettings(rewrite="8-11")
    request = pg.Request(VOCAB, settings, np.empty(0), 7, np.empty(0, int), gap=gap)
    [(_, written)] = pg.write_together(
        writing, request, np.random.default_rng(0), stopped=lambda: False
    )
    windows = [window for window in read if window.idx.size(1) > 1]
    assert len(windows) > 3
    for window in windows:
        assert window.idx.size(1) <= 64
        fill = window.idx[0].tolist().index(VOCAB.fill_id)
        time = window.time[0]
        if window.idx.size(1) - fill - 1 < 64 // 4:  # more is left out
            assert window.idx[0, fill + 1] == VOCAB.bar_id
            assert time[fill + 1] == time[fill]
        is_after = time[:fill] > time[fill]
        assert is_after.sum() >= 5 and (~is_after).sum() >= 5
        assert time[:fill].sort().values.tolist() == time[:fill].tolist()
        seen = window.idx.size(1) - 1  # without FILL
        counted = round(window.before.sum().item() * pg.MEMORY)
        assert counted >= len(ids) - (gap.end - gap.begin) - seen, "the more, the more is written"
    first = windows[0]
    seen = first.idx.size(1) - 2  # without FILL and the gap's Bar
    counted = first.before.sum().item() * pg.MEMORY
    assert counted == pytest.approx(len(ids) - (gap.end - gap.begin) - seen, rel=1e-4)
    whole = np.append(written, ids[gap.end :])
    assert_grammar(whole, VOCAB)
    assert (whole == VOCAB.bar_id).sum() == 24


@torch.inference_mode()
def test_what_follows_a_gap_stays_in_its_place_however_many_notes_are_new(tmp_path):
    """The old bars have one note each, the new ones as many as an untrained model writes."""
    path = write_midi(tmp_path / "sparse.mid", [[(4 * n, 4, 50 + n, 80) for n in range(16)]])
    ids = pg.read_piece(path.read_bytes(), VOCAB).ids
    model = make_model(block_size=64)
    gap = pg.find_gap(ids, 4, 14, VOCAB)
    writing = pg.GapWriting(model, VOCAB, gap)
    settings = pg.SampleSettings(rewrite="4-14")
    request = pg.Request(VOCAB, settings, np.empty(0), 3, np.empty(0, int), gap=gap)
    windows = []
    new_window = writing.new_window

    def remember():
        so_far = len(np.concatenate(writing.ids))
        windows.append((writing.state.bar.item(), so_far, new_window()))
        return windows[-1][-1]

    writing.new_window = remember
    list(pg.write_together(writing, request, np.random.default_rng(0), stopped=lambda: False))
    assert len({bar for bar, _, _ in windows}) > 5
    bars = np.flatnonzero(ids == VOCAB.bar_id)
    for bar, so_far, window in windows:
        fill = window.idx[0].tolist().index(VOCAB.fill_id)
        [after, *_] = (window.time[0, :fill] > window.time[0, fill]).nonzero()[0]
        tokens = bars[15 - 1] - bars[bar - 1]
        expected = 96 * (15 - bar) + pg.TOKEN_BEATS * 24 * tokens
        assert window.time[0, after] - window.time[0, fill] == pytest.approx(expected, abs=0.01)
        seen = window.idx.size(1) - 1  # without FILL
        left_out = so_far + len(ids) - gap.end - seen  # before the bar, of it, and after the gap
        share = left_out / max(pg.MEMORY, left_out)
        assert window.before.sum().item() == pytest.approx(share, abs=1e-4), "all is counted"


# ---- Whole pieces


def held_over():
    """Whole notes and ties: something sounds across every bar line."""
    high = [(2 + 4 * n, 4, 72 + n % 5, 80) for n in range(8)]
    low = [(3 + 6 * n, 6, 40 + n % 3, 60) for n in range(5)]
    return [high, low]


def save(path, notes, metres=((0, 4, 4),), tempos=((0, 120),), tpq=TPQ):
    """Write two tracks; metres and tempos stand at quarters."""
    score = Score(tpq)
    for hand in notes:
        track = Track()
        for start, length, pitch, velocity in hand:
            track.notes.append(Note(round(start * tpq), round(length * tpq), pitch, velocity))
        score.tracks.append(track)
    score.time_signatures = [TimeSignature(round(q * tpq), *metre) for q, *metre in metres]
    score.tempos = [Tempo(round(q * tpq), bpm) for q, bpm in tempos]
    score.dump_midi(path)
    return path


WHOLE = {  # tracks, and what else the file says; the bars that are written anew
    "4/4": ({"notes": scale()}, "3-4"),
    "3/4": ({"notes": scale(), "metres": [(0, 3, 4)]}, "3-4"),
    "6/8": ({"notes": scale(), "metres": [(0, 6, 8)]}, "2,5-6"),
    "pickup": ({"notes": scale(), "metres": [(0, 1, 4), (1, 3, 4)]}, "1,4-5"),
    "metre changes in the gap": (
        {"notes": scale(), "metres": [(0, 4, 4), (12, 3, 4), (18, 5, 8)]},
        "3-7",
    ),
    "tempos": ({"notes": scale(), "tempos": [(0, 97), (7.3, 331), (9, 60.5), (13, 71)]}, "3"),
    "held notes": ({"notes": held_over()}, "3-4,6"),
    "the first bars": ({"notes": held_over()}, "1-2"),
    "the last bars": ({"notes": held_over()}, "7-8"),
    "odd ticks": ({"notes": held_over(), "tpq": 97}, "4"),
}


def kept_and_new(score, lines, stretches):
    """The notes outside of these bars and those in them, as tuples."""
    kept, new = [], []
    for track in score.tracks:
        for n in track.notes:
            quarter = n.time / score.tpq
            inside = any(lines[a - 1] <= quarter < lines[b] for a, b in stretches)
            (new if inside else kept).append((n.time, n.duration, n.pitch, n.velocity))
    return sorted(kept), sorted(new)


def rewrite(path, rewrite, seed=1, model=None, **sample):
    """The prompt, and two pieces with bars of a file written anew: (ids, Sample)."""
    settings = pg.SampleSettings(prompt=str(path), rewrite=rewrite, num_samples=2, **sample)
    prompt = pg.read_prompt(settings, VOCAB)
    pieces = pg.generate(model or make_model(), VOCAB, settings, seed, prompt.ids)
    made = [(ids, pg.make_sample(ids, prompt, VOCAB, settings)) for _, ids in pieces]
    return prompt, made


@pytest.mark.parametrize("name", WHOLE)
def test_all_bars_but_the_gaps_stay_note_for_note(name, tmp_path):
    music, bars = WHOLE[name]
    path = save(tmp_path / "a.mid", **music)
    prompt, made = rewrite(path, bars)
    piano, _ = pg.make_piano(pg.parse_midi(path.read_bytes()))
    times = made[0][1].score.tpq // piano.tpq
    assert made[0][1].score.tpq == times * piano.tpq
    _, lines = VOCAB.bar_lines(prompt.ids)
    stretches = pg.parse_bars(bars, len(lines) - 1)
    old, replaced = kept_and_new(piano.resample(times * piano.tpq), lines, stretches)
    assert old and replaced
    results = []
    for ids, sample in made:
        assert_grammar(ids, VOCAB)
        score = sample.score
        kept, new = kept_and_new(score, lines, stretches)
        assert kept == old
        assert new and new != replaced
        results.append(new)
        for start, duration, pitch, _ in new:
            [end] = [
                round(lines[b] * score.tpq)
                for a, b in stretches
                if round(lines[a - 1] * score.tpq) <= start < round(lines[b] * score.tpq)
            ]
            assert start + duration <= end, "no new note rings over the end of its gap"
            for at, length, same, _ in kept:
                if same == pitch:
                    assert start >= at + length or start + duration <= at, "a key that is held"
        assert len(VOCAB.bar_lines(ids)[0]) == len(lines) - 1
        assert np.allclose(VOCAB.bar_lines(ids)[1], lines)
        tempos = [[(t.time / of.tpq, round(t.qpm, 3)) for t in of.tempos] for of in (score, piano)]
        assert tempos[0] == tempos[1]
        goes_on = stretches[-1][1] < len(lines) - 1
        texts = [t.text for t in score.markers if "prompt" in t.text]
        expected = ["end of prompt", "prompt goes on"] * len(stretches)
        assert [t for t in texts if "PianoGPT" not in t] == expected[: None if goes_on else -1]
        assert sample.bars == len(lines) - 1 and not sample.is_cut
    assert results[0] != results[1]


def test_kept_notes_stay_in_their_hands(tmp_path):
    """The hands cross in bars of 6/8."""
    low = [(n / 2, 0.5, 40 + n % 5, 70) for n in range(48)]
    high = [(n / 2, 0.5, 80 + n % 7, 70) for n in range(48)]
    high[20:] = [(n / 2, 0.5, 30 + n % 7, 70) for n in range(20, 48)]
    path = save(tmp_path / "a.mid", [high, low], metres=[(0, 6, 8)])
    _, made = rewrite(path, "2,5-6")
    for _, sample in made:
        for track, hand in zip(sample.score.tracks, (high, low), strict=True):
            score = Score(sample.score.tpq)
            score.tracks.append(track)
            bars = [0, 2, 3, 6, 7]  # kept
            kept = [note for note in hand if int(note[0] // 3) in bars]
            ours = [note[0] for note in notes_of(score) if int(note[0] // 3) in bars]
            assert ours == [start for start, *_ in kept]


def test_new_ids_are_those_of_the_gaps(tmp_path):
    path = save(tmp_path / "a.mid", scale())
    prompt, [(ids, sample), _] = rewrite(path, "2,5-6")
    state = VOCAB.trace(ids)
    inside = np.isin(state.bar, [2, 5, 6]) & (state.kind != pg.Kind.EOS)
    assert sample.new_ids.tolist() == ids[inside].tolist()
    of_prompt = VOCAB.trace(prompt.ids)
    assert ids[~inside][:-1].tolist() == prompt.ids[~np.isin(of_prompt.bar, [2, 5, 6])].tolist()


@pytest.mark.parametrize("begins, ends", [("8", True), ("7", False)])
def test_where_the_piece_would_end_a_gap_at_its_end_is_complete(begins, ends, tmp_path):
    path = save(tmp_path / "a.mid", scale())
    ids = pg.read_piece(path.read_bytes(), VOCAB).ids
    gap = pg.find_gap(ids, int(begins), int(begins), VOCAB)
    request = pg.Request(VOCAB, pg.SampleSettings(), np.empty(0), 7, np.empty(0, int))
    state = pg.State(*(column[gap.begin : gap.end][-1:] for column in VOCAB.trace(ids)))
    logits = np.full((1, V), pg.ILLEGAL)
    logits[0, [VOCAB.bar_id, VOCAB.eos_id, VOCAB.tempo_ids.start]] = np.log([0.1, 0.4, 0.5])
    after = pg.within_gap(logits.copy(), state, pg.replace(request, gap=gap))
    assert np.exp(after[0, VOCAB.bar_id]) == pytest.approx(0.5 if ends else 0.1)
    assert after[0, VOCAB.eos_id] == after[0, VOCAB.tempo_ids.start] == pg.ILLEGAL


def columns(*rows):
    """Notes, (time, duration, pitch, velocity) each, as columns."""
    names = ("time", "duration", "pitch", "velocity")
    return dict(zip(names, np.array(rows).T.copy(), strict=True))


def test_new_notes_leave_the_keys_of_kept_ones_alone():
    kept = columns((0, 105, 60, 80), (0, 200, 62, 80), (300, 50, 64, 80))
    new = columns(
        (100, 50, 60, 1),  # its key is lifted 5 ticks later: a difference of rounding
        (100, 150, 62, 2),  # it is held
        (250, 100, 64, 3),  # it is struck again
        (100, 50, 65, 4),
        (102, 3, 60, 5),  # over before its key is lifted
    )
    fitting = pg.fit_between(new, kept, late=10)
    found = zip(*(fitting[name].tolist() for name in fitting), strict=True)
    assert list(found) == [(105, 45, 60, 1), (250, 50, 64, 3), (100, 50, 65, 4)]


@pytest.mark.parametrize("metre, early", [((4, 4), 10), ((6, 8), 5), ((9, 16), 2)])
def test_note_that_is_played_a_little_early_belongs_to_the_next_bar(metre, early, tmp_path):
    """Half a grid position is less in eighths and 16ths."""
    bar = metre[0] * 4 / metre[1]
    ticks = 1 / TPQ
    notes = [(bar * n, bar / 2, 60 + n, 80) for n in range(8)]
    notes += [(2 * bar - (early + 2) * ticks, bar / 4, 80, 80)]  # kept: it is in bar 2
    notes += [(2 * bar - (early - 1) * ticks, bar / 4, 85, 80)]  # in the gap
    notes += [(3 * bar - (early - 1) * ticks, bar / 4, 90, 80)]  # kept: it is in bar 4
    path = save(tmp_path / "a.mid", [notes, []], metres=[(0, *metre)])
    _, made = rewrite(path, "3")
    for _, sample in made:
        notes = {(n.pitch, n.time) for track in sample.score.tracks for n in track.notes}
        assert (80, round(2 * bar * TPQ) - early - 2) in notes
        assert (85, round(2 * bar * TPQ) - early + 1) not in notes
        assert (90, round(3 * bar * TPQ) - early + 1) in notes


def test_early_note_stays_with_its_bar_where_beat_units_differ(tmp_path):
    """MidiTok rounds it first to the positions of the finer beats, here those of 6/8."""
    notes = [(n, 1, 60 + n % 12, 80) for n in range(20)]
    for early in (9, 13, 16):
        at = 8 - early / TPQ
        music = [[*notes, (at, 1, 90, 80)]]
        path = save(tmp_path / "a.mid", music, metres=[(0, 4, 4), (16, 6, 8)])
        prompt, [(_, sample), _] = rewrite(path, "2")
        in_bar_3 = VOCAB.trace(prompt.ids).bar[prompt.ids == VOCAB.id_of["Pitch_90"]] == 3
        kept = (round(at, 3), 90) in [(start, pitch) for start, _, pitch in notes_of(sample.score)]
        assert kept == in_bar_3 == (early < 15)


def test_cut_prompt_keeps_no_note_of_the_bars_that_are_left_out(tmp_path):
    """Neither what is played a little early, nor what rings on."""
    notes = [(n, 1, 60 + n % 12, 80) for n in range(30)]
    notes += [(30, 6, 40, 80), (32 - 5 / TPQ, 1, 90, 80)]
    path = save(tmp_path / "a.mid", [notes, [(40, 4, 50, 80)]])
    settings = pg.SampleSettings(prompt=str(path), rewrite="3", prompt_bars=8, num_samples=1)
    prompt = pg.read_prompt(settings, VOCAB)
    [(_, ids)] = pg.generate(make_model(), VOCAB, settings, 1, prompt.ids)
    kept = notes_of(pg.make_sample(ids, prompt, VOCAB, settings).score)
    assert max(end for _, end, _ in kept) == 32
    assert (30, 32, 40) in kept
    assert 90 not in {pitch for start, _, pitch in kept if start > 31}


@pytest.mark.parametrize("tpq", [100, 256])
def test_new_note_ends_where_its_key_is_struck_again_whatever_the_resolution(tpq, tmp_path):
    triplets = [(n / 3, 1 / 3, 60, 80) for n in range(48)]
    path = save(tmp_path / "a.mid", [triplets], tpq=tpq)
    settings = pg.SampleSettings(prompt=str(path), rewrite="2-3")
    prompt = pg.read_prompt(settings, VOCAB)
    same_again = np.append(prompt.ids, VOCAB.eos_id)
    score = pg.make_sample(same_again, prompt, VOCAB, settings).score
    notes = sorted((n.time, n.end) for track in score.tracks for n in track.notes)
    assert len(notes) == 48
    for (_, end), (start, _) in itertools.pairwise(notes):
        assert end <= start


def test_piece_whose_notes_were_all_rewritten_away_is_none():
    silent = [VOCAB.bar_id, VOCAB.id_of["TimeSig_4/4"]]
    ids = np.array([VOCAB.bos_id, *silent, *silent, VOCAB.eos_id])
    settings = pg.SampleSettings(rewrite="1")
    piano = Score(TPQ)
    prompt = pg.Prompt(piano, ids[:-1], 8 * TPQ, [], [], [], {}, [], rewritten=[(1, 1)])
    assert pg.make_sample(ids, prompt, VOCAB, settings) is None


def test_chords_are_asked_for_in_the_gap_alone(tmp_path):
    path = save(tmp_path / "a.mid", scale())
    _, made = rewrite(path, "3-4,7", chords="F#m Eb")
    for ids, _ in made:
        state = VOCAB.trace(ids)
        is_note = state.kind == pg.Kind.PITCH
        for bar, chord in ((3, "F#:min"), (4, "D#:maj"), (7, "F#:min")):
            chords = set(state.chord[is_note & (state.bar == bar)])
            assert chords <= {VOCAB.id_of[f"Chord_{chord}"]}


def test_only_a_gap_at_the_end_closes_on_the_tonic(tmp_path):
    """What comes after decides; a piece that ends with the gap ends at home."""
    path = save(tmp_path / "a.mid", scale())
    for bars, closes in (("3", False), ("8", True)):
        found = set()
        for seed in range(2):
            _, made = rewrite(path, bars, seed=seed)
            for ids, _ in made:
                state = VOCAB.trace(ids)
                in_bar = (state.bar == int(bars)) & (state.kind == pg.Kind.PITCH)
                found |= set(state.chord[in_bar])
        assert (len(found) <= 2) == closes


@pytest.mark.parametrize(
    "text, problem",
    [
        ("0-2", "the prompt only has bars 1 to 8"),
        ("7-9", "the prompt only has bars 1 to 8"),
        ("5-4", "write the first bar before the last"),
        ("9", "the prompt only has bars 1 to 8"),
        ("1-8", "all bars"),
        ("1-4,5-8", "all bars"),
        ("3-4,4-5", "in order"),
        ("5,3", "in order"),
        ("", 'cannot read ""'),
        ("a", 'cannot read "a"'),
        ("3-", 'cannot read "3-"'),
        ("1,,2", 'cannot read ""'),
        ("-3", 'cannot read "-3"'),
        ("9" * 400, "cannot read"),
    ],
)
def test_bars_that_cannot_be_rewritten_are_refused(text, problem):
    with pytest.raises(pg.UserError, match="^--rewrite.*" + problem):
        pg.parse_bars(text, 8)


def test_bars_are_read():
    assert pg.parse_bars("3-4,9", 12) == [(3, 4), (9, 9)]
    assert pg.parse_bars(" 1 , 3 - 5 ", 5) == [(1, 1), (3, 5)]
    assert pg.parse_bars("3,4", 5) == [(3, 3), (4, 4)]


# ---- Styles


def with_style(window, *styles):
    """The window with these styles."""
    return window._replace(style=torch.tensor(styles))


@torch.inference_mode()
def test_style_changes_every_logit_and_number_0_is_none(piece):
    model = make_model(styles=2)
    window = pg.cut_windows(pg.make_corpus([piece]), torch.tensor([0]), 32, VOCAB)
    window = window._replace(targets=None)
    none, one, two = (model(with_style(window, n)) for n in range(3))
    assert not torch.isclose(one, none, atol=1e-4).all(2).any(), "each token is told"
    assert not torch.isclose(two, one, atol=1e-4).all(2).any()
    plain = make_model()
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k != "style.weight"}
        | {"style.weight": torch.zeros(1, 32)}
    )
    assert torch.equal(plain(with_style(window, 0)), none), "as if there were no styles"


def test_a_tenth_of_the_windows_is_without_its_style(piece):
    other = pg.replace(piece, style="Bach")
    corpus = pg.make_corpus([other, pg.replace(piece, style="none of these")], ["Abel", "Bach"])
    assert corpus.style.tolist() == [2, 0]
    settings = pg.Settings()
    settings.model.block_size = 16
    settings.train.batch_size = 2000
    styles = pg.Batches(pg.make_corpus([other], ["Abel", "Bach"]), VOCAB, settings)[0].style
    assert sorted(set(styles.tolist())) == [0, 2]
    assert (styles == 0).float().mean() == pytest.approx(0.1, abs=0.03)


@torch.inference_mode()
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_multiplies_what_the_style_changes(guidance, piece):
    model = make_model(block_size=32, styles=2)
    opening = piece.ids[:20]
    writing = pg.Writing(model, VOCAB, opening, 3, style=2, guidance=guidance)
    plain = pg.Writing(model, VOCAB, opening, 3)
    styled = pg.Writing(model, VOCAB, opening, 3, style=2)
    rng = np.random.default_rng(0)
    for _ in range(30):  # past the end of the window
        without = plain.next_logits()
        expected = without + guidance * (styled.next_logits() - without)
        logits = writing.next_logits()
        assert np.allclose(logits, expected, atol=1e-4)
        assert not np.allclose(logits, without, atol=1e-2) or guidance == 0
        ids = pg.draw(np.where(VOCAB.legal(writing.state), logits, pg.ILLEGAL), False, rng)
        for one in (writing, plain, styled):
            one.append(ids)


def test_style_is_heard_in_a_gap_too(tmp_path):
    path = save(tmp_path / "a.mid", scale())
    settings = pg.SampleSettings(prompt=str(path), rewrite="3-4", num_samples=1)
    prompt = pg.read_prompt(settings, VOCAB)
    model = make_model(styles=2)
    found = []
    for style, guidance in ((0, 1.0), (1, 1.0), (2, 1.0), (1, 1.0), (1, 3.0), (1, 0.0)):
        settings.guidance = guidance
        [(_, ids)] = pg.generate(model, VOCAB, settings, 1, prompt.ids, style=style)
        found.append(ids.tolist())
    assert found[1] == found[3]
    assert found[0] != found[1] != found[2] != found[0]
    assert found[4] != found[1], "guidance leans further"
    assert found[5] == found[0], "guidance 0 is no style"


def test_first_folder_names_the_style():
    paths = ["Bach/a.mid", "Bach/b/c.mid", "train/Liszt/d.mid", "e.mid", "train/f.mid"]
    pieces = [pg.Piece(path=path) for path in paths]
    pg.name_styles(pieces)
    assert [piece.style for piece in pieces] == ["Bach", "Bach", "Liszt", "", ""]
    assert pg.list_styles(pieces, []) == ["Bach", "Liszt"]
    assert pg.list_styles(pieces, ["Ravel", "Liszt"]) == ["Ravel", "Liszt", "Bach"]
    decomposed = pg.Piece(path="cafe\u0301/a.mid")  # as a Mac writes it
    pg.name_styles([decomposed])
    assert pg.find_style("caf\u00e9", [decomposed.style]) == 1
    assert pg.find_style("cafe\u0301", [decomposed.style]) == 1
