"""Writing: logits become legal ids, ids a piece."""

import copy

import numpy as np
import pytest
import torch
from conftest import pg, scale, write_midi
from symusic import Tempo, TimeSignature
from test_music import assert_grammar

SIZE = 32  # tokens of a window
NO_STATE = pg.State(*[np.zeros(1, int)] * len(pg.State._fields))


def make_model(vocab, n_layer=1):
    """An untrained model: it proposes everything, so the grammar has all the work."""
    torch.manual_seed(0)
    sizes = pg.ModelSettings(n_layer, n_head=2, n_embd=32, block_size=SIZE)
    model = pg.PianoGPT(sizes, len(vocab.words), vocab.grid)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    torch.nn.init.normal_(model.memory.weight, std=3.0)
    torch.nn.init.normal_(model.recent, std=0.5)
    return model


@pytest.fixture(scope="module")
def model(vocab):
    """An untrained model of one layer."""
    return make_model(vocab)


def write(model, vocab, seed=1, prompt=None, stopped=lambda: False, **sample):
    """Six pieces of eight bars, as lists of ids, if the settings do not say otherwise."""
    settings = pg.SampleSettings(**{"num_samples": 6, "bars": 8} | sample)
    prompt = None if prompt is None else np.array(prompt)
    pieces = pg.generate(model, vocab, settings, seed, prompt, stopped)
    return [ids.tolist() for _, ids in sorted(pieces, key=lambda piece: piece[0])]


@pytest.fixture(scope="module")
def prompt(model, vocab):
    """The ids of three bars."""
    [ids] = write(model, vocab, seed=3, bars=3, num_samples=1)
    return [i for i in ids if i != vocab.eos_id]


def make_request(vocab, old_bars=0, grid=(), **sample):
    """What the rules are told."""
    sample = pg.SampleSettings(**sample)
    chords, _ = pg.parse_chords(sample.chords)
    chords = chords.flatten() + vocab.chord_ids.start
    c_major = np.array([vocab.id_of["Chord_C:maj"]])
    return pg.Request(vocab, sample, chords, old_bars, np.array(grid, int), c_major)


def random_logits(seed, *shape):
    """float32, as a model's."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def log(p):
    """Logits of probabilities."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(p), pg.ILLEGAL)


def softmax(logits):
    """Probabilities of logits (B, V)."""
    return np.exp(logits - pg.log_sum_exp(logits))


def kinds_of(ids, vocab):
    """The kinds of tokens."""
    return vocab.says.kind[np.array(ids)]


@pytest.mark.parametrize("temperature", [0.85, 0.0, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_pieces_have_their_bars_keep_the_grammar_and_are_heard_whole_at_every_temperature(
    temperature, with_prompt, prompt, model, vocab
):
    opening = prompt if with_prompt else None
    pieces = write(model, vocab, prompt=opening, bars=5, temperature=temperature)
    assert len({tuple(ids) for ids in pieces}) == (1 if temperature == 0 else 6)
    for ids in pieces:
        assert ids[0] == vocab.bos_id
        assert opening is None or ids[: len(opening)] == opening
        assert ids.count(vocab.bar_id) == 5
        assert vocab.eos_id not in ids[:-1]
        assert_grammar(np.array(ids), vocab)
        notes = (kinds_of(ids, vocab) == pg.Kind.PITCH).sum()
        assert vocab.decode(np.array(ids)).note_num() == notes


@pytest.mark.parametrize("with_prompt", [False, True])
def test_chords_that_are_asked_for_are_written_and_no_others(with_prompt, prompt, model, vocab):
    opening = prompt if with_prompt else [vocab.bos_id]
    old_bars = opening.count(vocab.bar_id)
    bars = old_bars + 8  # all chords, twice
    asked = {"bars": bars, "num_samples": 3, "chords": "C Am F,G7 Em"}
    for ids in write(model, vocab, prompt=opening, **asked):
        assert_grammar(np.array(ids), vocab)
        state = vocab.trace(np.array(ids))
        written = set()
        for t in range(len(opening), len(ids)):
            in_first_half = 2 * state.position[t] < state.bar_length[t]
            third = "F:maj" if in_first_half else "G:7dom"
            wanted = ["C:maj", "A:min", third, "E:min"][(state.bar[t] - 1 - old_bars) % 4]
            if state.kind[t] in (pg.Kind.CHORD, pg.Kind.PITCH):
                assert vocab.words[state.chord[t]] == f"Chord_{wanted}", "notes are under it"
                written.add(wanted)
            if state.kind[t] == pg.Kind.CHORD:
                assert state.chord[t] != state.chord[t - 1], "it is written once"
        assert len(written) > 3


def test_wanted_chords_take_the_share_of_notes_and_chords_alone(model, vocab):
    [ids] = write(model, vocab, bars=12, num_samples=1, chords="C Am F,G7")
    state = vocab.trace(np.array(ids))
    request = make_request(vocab, chords="C Am F,G7")
    logits = pg.grammar(random_logits(0, len(ids), len(vocab.words)), state, request)
    before = softmax(logits)
    after = softmax(pg.wanted_chords(logits.copy(), state, request))
    kinds = vocab.says.kind
    others = (kinds != pg.Kind.PITCH) & (kinds != pg.Kind.CHORD)
    assert np.allclose(after[:, others], before[:, others], atol=1e-5)
    may_change = np.isin(state.kind, (pg.Kind.POSITION, pg.Kind.TEMPO))
    chords = after[:, vocab.chord_ids].sum(axis=1)[may_change]
    pitches = after[:, vocab.pitch_ids].sum(axis=1)[may_change]
    is_due = chords > pitches
    assert 0 < is_due.sum() < len(is_due)
    assert not pitches[is_due].any()
    assert not chords[~is_due].any()


def test_asked_chords_make_no_tempo_likelier(model, vocab):
    """Over 50 pieces, by the share of tokens."""
    shares = []
    for chords in ("", "C Am F,G7 C"):
        pieces = write(model, vocab, num_samples=50, bars=2, chords=chords)
        kinds = np.concatenate([kinds_of(ids, vocab) for ids in pieces])
        after = kinds[1:][kinds[:-1] == pg.Kind.POSITION]
        shares.append((after == pg.Kind.TEMPO).mean())
    assert shares[1] == pytest.approx(shares[0], abs=0.04)
    assert shares[0] > 0.1


def test_notes_of_an_asked_chord_are_likelier(vocab):
    request = make_request(vocab, chords="Am")
    state = NO_STATE._replace(
        kind=np.array([pg.Kind.POSITION]),
        bar=np.array([1]),
        bar_length=np.array([96]),
        chord=np.array([vocab.id_of["Chord_A:min"]]),
    )
    p = softmax(pg.wanted_chords(np.zeros((1, len(vocab.words))), state, request))[0]
    keys = p[vocab.pitch_ids]
    in_chord = np.isin(np.arange(21, 109) % 12, (9, 0, 4))
    assert keys[in_chord] / keys[~in_chord].mean() == pytest.approx(np.exp(pg.CHORD_LEAN))
    assert p[vocab.tempo_ids].sum() / p.sum() == pytest.approx(
        (vocab.tempo_ids.stop - vocab.tempo_ids.start) / len(vocab.words)
    ), "notes take the place of chords, and of nothing else"


def test_without_chords_the_model_writes_its_own(model, vocab):
    logits = random_logits(0, 1, len(vocab.words))
    after = pg.wanted_chords(logits.copy(), NO_STATE, make_request(vocab))
    assert (after == logits).all()
    [ids] = write(model, vocab, bars=4, num_samples=1)
    assert len(set(ids) & {*range(vocab.chord_ids.start, vocab.chord_ids.stop)}) > 3


def test_tokens_far_past_the_window_keep_the_grammar(model, vocab):
    [ids] = write(model, vocab, bars=12, num_samples=1)
    assert len(ids) > 10 * SIZE
    assert_grammar(np.array(ids), vocab)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_piece_of_no_asked_for_length_ends_after_8_to_24_new_bars(
    with_prompt, prompt, model, vocab
):
    opening = prompt if with_prompt else None
    old_bars = 3 if with_prompt else 0
    eager = copy.deepcopy(model)  # writes short bars, and without the rule it would end at once
    eager.head.weight.data[[vocab.bar_id, vocab.eos_id]] *= 8
    eager.memory.weight.data.zero_()
    never = copy.copy(vocab)
    never.may_follow = vocab.may_follow.copy()
    never.may_follow[:, vocab.eos_id] = False
    ended = write(eager, vocab, prompt=opening, bars=0, num_samples=8)
    cut = write(eager, never, prompt=opening, bars=0, num_samples=1)
    assert min(ids.count(vocab.bar_id) for ids in ended) == old_bars + 8
    for ids in ended + cut:
        assert ids.count(vocab.bar_id) <= old_bars + 24
        assert pg.PAD not in ids
        if ids.count(vocab.bar_id) < old_bars + 24:
            assert ids.index(vocab.eos_id) == len(ids) - 1
    assert [ids.count(vocab.bar_id) for ids in cut] == [old_bars + 24]
    assert not any(vocab.eos_id in ids for ids in cut)


def test_stopped_pieces_are_left_out_and_finished_ones_kept(model, vocab):
    tokens = []

    def stopped():
        tokens.append(1)
        return len(tokens) > middle

    middle = 10**6
    whole = write(model, vocab, seed=2, bars=2)
    lengths = sorted(len(ids) for ids in whole)
    tokens.clear()
    middle = lengths[3]  # the last token of a piece is the bar line that is left out
    assert lengths[2] < lengths[3]
    kept = write(model, vocab, seed=2, bars=2, stopped=stopped)
    assert kept == [ids for ids in whole if len(ids) <= lengths[3]]
    assert 0 < len(kept) < 6


def test_same_seed_same_ids_and_another_seed_others(model, vocab):
    one = write(model, vocab, 5, bars=3)
    assert one == write(model, vocab, 5, bars=3)
    assert one != write(model, vocab, 6, bars=3)


@pytest.mark.parametrize("length", [1, 32, 50])
@torch.inference_mode()
def test_cached_generation_equals_uncached_past_the_window(length, vocab, monkeypatch):
    monkeypatch.setattr(pg, "MEMORY", 60)
    model = make_model(vocab, n_layer=2)
    [opening] = write(model, vocab, num_samples=1, bars=3)
    assert len(opening) >= 50
    writing = pg.Writing(model, vocab, np.array(opening[:length]), 3)
    rng = np.random.default_rng(0)
    start = max(0, length - int(SIZE * 2 / 3))
    for _ in range(2 * SIZE):
        logits = writing.next_logits()
        ids = np.stack(writing.ids, axis=1)
        T = ids.shape[1]
        if T - start > SIZE:
            start = T - SIZE // 3
        pieces = []
        for row in ids:
            state = vocab.trace(row)
            pieces.append(pg.Piece(ids=row, time=state.time, pitch=state.pitch))
        corpus = pg.make_corpus(pieces)
        window = pg.cut_windows(corpus, corpus.offsets[:-1] + start, T - start, vocab)
        expected = model(window._replace(targets=None))
        assert np.allclose(logits, expected[:, -1], atol=1e-4)
        legal = pg.grammar(logits, writing.state, make_request(vocab))
        legal[:, vocab.eos_id] = pg.ILLEGAL
        writing.append(pg.draw(legal, False, rng))
    assert len({tuple(row) for row in ids}) == 3


@torch.inference_mode()
def test_greedy_piece_is_of_the_likeliest_ids_whatever_the_seed(model, vocab):
    [ids] = write(model, vocab, 1, bars=3, temperature=0.0)
    assert [ids] == write(model, vocab, 2, bars=3, temperature=0.0)
    writing = pg.Writing(model, vocab, np.array([vocab.bos_id]), 1)
    request = make_request(vocab, bars=3)
    for expected in ids[1:]:
        if writing.state.bar == 3:
            break  # here it closes on its tonic
        logits = writing.next_logits()
        for rule in (pg.grammar, pg.no_silent_opening, pg.end_on_the_tonic, pg.steady_tempo):
            logits = rule(logits, writing.state, request)
        assert logits.argmax() == expected
        writing.append(np.array([expected]))


STRAIGHT = [0, 6, 12, 18]
GRIDS = {  # positions in a bar of 96, and those of a beat on which new notes may begin
    "quarters": ([0, 24, 48], STRAIGHT),
    "sixteenths": ([0, 6, 12, 18, 24], STRAIGHT),
    "swing": ([0, 16, 24, 40, 48], [0, 16]),
    "swing and sixteenths": ([0, 16, 24, 30, 40], [0, 6, 16]),
    "32nd notes": ([0, 3, 6, 9], [*range(0, 24, 3)]),
    "a performance": ([0, 5, 23, 31, 50], []),
}


def bar_of(positions, vocab):
    """The ids of a bar with a note at each position."""
    note = "Pitch_60 Velocity_63 Duration_0.6.24"
    words = " ".join(f"Position_{position} {note}" for position in positions)
    return [vocab.id_of[word] for word in f"Bar_None TimeSig_4/4 {words}".split()]


def in_quarters(state):
    """Where in a quarter note each token stands, in grid positions."""
    return state.position * 4 / state.beat_unit % 24


def test_tempos_between_the_notes_of_a_prompt_do_not_hide_its_grid(vocab):
    ritardando = " ".join(f"Position_{n} {vocab.words[vocab.tempo_ids.start + n]}" for n in (1, 5))
    words = f"Bar_None TimeSig_4/4 {ritardando} Position_6 Pitch_60 Velocity_63 Duration_0.6.24"
    ids = [vocab.bos_id, *(vocab.id_of[word] for word in words.split())]
    assert pg.find_grid(np.array(ids), vocab).tolist() == STRAIGHT


def test_grid_is_one_of_quarter_notes_in_every_metre(vocab):
    eighths = bar_of([0, 24, 48], vocab)  # of 24 positions each
    eighths[1] = vocab.id_of["TimeSig_6/8"]
    found = pg.find_grid(np.array([vocab.bos_id, *eighths]), vocab)
    assert found.tolist() == STRAIGHT
    state = NO_STATE._replace(beat_unit=np.array([8]))
    logits = np.zeros((1, len(vocab.words)))
    request = make_request(vocab, grid=found)
    allowed = pg.on_the_grid(logits, state, request)[0, vocab.position_ids] > pg.ILLEGAL
    assert np.flatnonzero(allowed).tolist() == list(range(0, 288, 12)), "16th notes"


@pytest.mark.parametrize("positions, grid", GRIDS.values(), ids=GRIDS)
def test_grid_of_a_prompt_is_found_and_kept(positions, grid, model, vocab):
    opening = [vocab.bos_id, *bar_of(positions, vocab) * 2]
    assert pg.find_grid(np.array(opening), vocab).tolist() == grid
    new = set()
    for ids in write(model, vocab, prompt=opening, bars=6):
        state = vocab.trace(np.array(ids))
        new |= set(in_quarters(state)[len(opening) :])
    if grid:
        assert new <= set(grid) and len(new) > 1
    else:
        assert len(new) > 12


def test_notes_lie_on_the_division_that_is_asked_for(model, vocab):
    for ids in write(model, vocab, bars=4, division=3):
        assert set(vocab.trace(np.array(ids)).position % 24) <= {0, 8, 16}


@pytest.mark.parametrize("division", [1, 5, 23, 24, 48])
def test_any_division_can_be_asked_for(division, model, vocab):
    for ids in write(model, vocab, bars=2, division=division):
        steps = in_quarters(vocab.trace(np.array(ids))) * division / 24
        assert (np.abs(steps - steps.round()) * 24 / division <= 0.5).all()


def test_position_off_the_grid_gives_its_probability_to_the_nearest_on_it(vocab):
    logits = random_logits(0, 2, len(vocab.words))
    request = make_request(vocab, grid=STRAIGHT)
    before = np.exp(logits)[:, vocab.position_ids]
    state = NO_STATE._replace(beat_unit=np.array([4, 4]))
    after = np.exp(pg.on_the_grid(logits.copy(), state, request))[:, vocab.position_ids]
    assert np.allclose(after[:, 6], before[:, 3:9].sum(axis=1))
    assert np.allclose(after[:, 0], before[:, :3].sum(axis=1))
    assert np.allclose(after[:, 282], before[:, 279:285].sum(axis=1))
    assert np.allclose(after.sum(axis=1), before[:, :285].sum(axis=1)), "not what is next bar's"
    assert not after[:, np.arange(288) % 6 > 0].any()


def test_tempo_does_not_leap(model, vocab):
    for ids in write(model, vocab, bars=6):
        tempos = [vocab.tempo_of(i) for i in ids if vocab.words[i].startswith("Tempo")]
        ratios = np.array(tempos[1:]) / tempos[:-1]
        assert len(ratios) > 2
        assert (ratios < 3.01).all() and (ratios > 1 / 3.01).all()


def test_no_piece_begins_with_a_silent_bar(model, vocab):
    eager = copy.deepcopy(model)
    eager.head.weight.data[vocab.tempo_ids] *= 4
    kinds = []
    for ids in write(eager, vocab, bars=2, num_samples=40):
        state = vocab.trace(np.array(ids))
        assert (state.kind[state.bar == 1] == pg.Kind.PITCH).any()
        kinds.append(state.kind[4])
    assert pg.Kind.TEMPO in kinds, "also where it begins with a tempo"


def test_no_piece_ends_before_its_first_note(vocab):
    words = ["BOS_None", "Bar_None", "TimeSig_4/4", "Position_0", "Tempo_120.0"]
    trace = vocab.trace(np.array([vocab.id_of[word] for word in words]))
    state = pg.State(*(column[-1:] for column in trace))
    logits = np.zeros((1, len(vocab.words)))
    logits[0, [vocab.eos_id, vocab.bar_id]] = 50
    for rule in pg.RULES:
        logits = rule(logits, state, make_request(vocab, bars=1))
    assert vocab.says.kind[logits.argmax()] in (pg.Kind.CHORD, pg.Kind.PITCH, pg.Kind.POSITION)


def lean_to_the_end(bar, chord, pitch, vocab):
    """The logit of EOS after a C or another note in a bar, by the rule; it was 0."""
    state = NO_STATE._replace(
        kind=np.array([pg.Kind.DURATION]),
        bar=np.array([bar]),
        chord=np.array([vocab.id_of[f"Chord_{chord}"]]),
        pitch=np.array([pitch]),
    )
    logits = np.zeros((1, len(vocab.words)))
    return pg.end_on_the_tonic(logits, state, make_request(vocab, old_bars=3))[0, vocab.eos_id]


def test_end_on_the_tonic_becomes_likelier_bar_by_bar(vocab):
    leans = [lean_to_the_end(bar, "C:maj", 60, vocab) for bar in (10, 11, 20, 27)]
    assert leans[0] == pg.ILLEGAL, "a piece of 3 + 8 bars may end in its 11th bar"
    assert 0 < leans[1] < leans[2] < leans[3] == pg.END_LEAN
    assert lean_to_the_end(27, "F:maj", 60, vocab) == 0
    assert lean_to_the_end(27, "C:maj", 64, vocab) == 0


def test_longest_piece_closes_on_its_tonic(model, vocab):
    for ids in write(model, vocab, bars=4, num_samples=20):
        state = vocab.trace(np.array(ids))
        start = np.flatnonzero(state.bar == 4)[0]
        sounding = np.zeros((1, 12))
        for t in np.flatnonzero(state.kind[:start] == pg.Kind.DURATION):
            length = vocab.lengths[ids[t] - vocab.duration_ids.start]
            sounding[0, state.pitch[t] % 12] += length
        tonic = vocab.chord_ids.start + pg.closest_keys(sounding)[0]
        last = state.chord[start:][state.kind[start:] == pg.Kind.PITCH]
        assert set(last) <= {tonic}


def test_writing_leaves_no_graph(model, vocab):
    found = []
    hook = model.register_forward_hook(lambda m, inputs, out: found.append(out[0].requires_grad))
    write(model, vocab, bars=1, num_samples=1)
    hook.remove()
    assert set(found) == {False}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_decides_which_pitch_and_chord_is_drawn_but_not_how_often_one_is(
    temperature, vocab
):
    p = np.zeros((1, len(vocab.words)))
    pitches = [vocab.pitch_ids.start, vocab.pitch_ids.stop - 1]
    chords = [vocab.chord_ids.start, vocab.chord_ids.stop - 1]
    others = [vocab.tempo_ids.start, vocab.bar_id]
    for ids, shares in ((pitches, [0.3, 0.1]), (chords, [0.02, 0.18]), (others, [0.25, 0.15])):
        p[0, ids] = shares
    state = NO_STATE._replace(kind=np.array([pg.Kind.POSITION]))
    request = make_request(vocab, temperature=temperature)
    after = softmax(pg.temperature(log(p), state, request))
    expected = p.copy()
    for ids in (pitches, chords):
        sharp = p[0, ids] ** (1 / temperature)
        expected[0, ids] = sharp / sharp.sum() * p[0, ids].sum()
    assert np.allclose(after, expected, atol=1e-5)


ONLY = [  # settings, and which of the probabilities 0.1, 0.4, 0.04, 0.3, 0.16 are left
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 4}, [0, 1, 3, 4]),
    ({"top_k": 10**6}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.01}, [1]),
    ({"top_p": 0.5}, [1, 3]),
    ({"top_p": 0.75}, [1, 3, 4]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"min_p": 0.2}, [0, 1, 3, 4]),
    ({"min_p": 0.5}, [1, 3]),
    ({"min_p": 1.0}, [1]),
    ({}, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize("settings, kept", ONLY, ids=str)
def test_rules_keep_exactly_the_likely_ids(settings, kept, vocab):
    p = np.array([[0.1, 0.4, 0.04, 0.3, 0.16], [0.3, 0.1, 0.16, 0.4, 0.04]])
    logits = np.full((2, len(vocab.words)), pg.ILLEGAL)
    logits[:, 5:10] = np.log(p) + 3
    after = logits.copy()
    for rule in (pg.top_k, pg.top_p, pg.min_p):
        after = rule(after, NO_STATE, make_request(vocab, **settings))
    first, second = (np.flatnonzero(row) for row in after > pg.ILLEGAL / 2)
    assert (first - 5).tolist() == kept
    assert sorted(p[1, second - 5].tolist()) == sorted(p[0, kept].tolist())
    assert (after[0, first] == logits[0, first]).all()


def test_rules_are_applied_in_writing(model, vocab):
    [greedy] = write(model, vocab, bars=2, temperature=0.0)
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        pieces = write(model, vocab, bars=2, temperature=1.0, num_samples=2, **setting)
        assert pieces == [greedy] * 2


def test_ids_are_drawn_as_often_as_their_probability_says():
    p = np.array([0.0, 0.5, 0.3, 0.0, 0.2])
    logits = log(p)[None].repeat(20_000, axis=0)
    drawn = pg.draw(logits, False, np.random.default_rng(0))
    assert np.bincount(drawn, minlength=5) / 20_000 == pytest.approx(p, abs=0.02)


class Chance:
    """A generator that always draws the same number."""

    def __init__(self, u):
        self.u = u

    def random(self, shape, dtype):
        """As of a numpy Generator."""
        return np.full(shape, self.u, dtype)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])  # the least and the most that can be drawn
def test_id_without_probability_is_never_drawn_at_the_edges_of_chance(u):
    logits = random_logits(0, 64, 400)
    logits[:, :9] = pg.ILLEGAL
    logits[:, 300:] = pg.ILLEGAL
    drawn = pg.draw(logits, False, Chance(u))
    assert drawn.min() >= 9
    assert drawn.max() < 300


def test_sample_has_its_key_its_chords_and_the_end_of_its_prompt(prompt, model, vocab):
    _, lines = vocab.bar_lines(np.array(prompt))
    bar_line = round(480 * lines[3])
    piano = vocab.decode(np.array(prompt))
    metre = [TimeSignature(0, 4, 4)]
    given = pg.Prompt(piano, np.array(prompt), bar_line, [Tempo(0, 99)], metre, [], {}, [])
    [ids] = write(model, vocab, prompt=prompt, bars=5, num_samples=1, chords="C")
    ids = [i for i in ids if i != vocab.eos_id]
    _, lines = vocab.bar_lines(np.array(ids))
    sample = pg.make_sample(np.array(ids), given, vocab, pg.SampleSettings(tempo=77.0))
    assert (sample.bars, sample.is_cut) == (5, True)
    ended = np.append(ids, vocab.eos_id)
    assert not pg.make_sample(ended, given, vocab, pg.SampleSettings()).is_cut
    assert sample.new_ids.tolist() == ids[len(prompt) :]
    assert [(t.time, round(t.qpm)) for t in sample.score.tempos] == [(0, 77)]
    assert len(sample.score.key_signatures) == 1
    texts = {marker.text: marker.time for marker in sample.score.markers}
    assert texts["end of prompt"] == round(480 * lines[3])
    assert texts["C"] >= texts["end of prompt"]
    settings = pg.SampleSettings(continuation_only=True)
    rest = pg.make_sample(np.array(ids), given, vocab, settings)
    assert rest.bars == 2
    assert {marker.text for marker in rest.score.markers} == {"C"}
    assert rest.score.end() <= round(480 * (lines[5] - lines[3]))


def hands_of(score):
    """The notes of the right hand and of the left one, (start in quarters, pitch)."""
    assert [track.name for track in score.tracks] == ["right hand", "left hand"]
    return [sorted((n.time / score.tpq, n.pitch) for n in track.notes) for track in score.tracks]


def played_by(hands):
    """(start, pitch) of the notes that write_midi writes, for each of its tracks."""
    return [sorted((start, pitch) for start, _, pitch, _ in hand) for hand in hands]


def read_sample(path, vocab):
    """A file as if the model had written it."""
    ids = pg.read_piece(path.read_bytes(), vocab).ids
    return pg.make_sample(ids, None, vocab, pg.SampleSettings()).score


WALTZ = [[], []]  # a tune that comes down into the chords below it, over leaps of the left hand
for bar in range(8):
    WALTZ[0] += [(3 * bar + beat, 1, 84 - 2 * bar + beat, 80) for beat in range(3)]
    WALTZ[1] += [(3 * bar, 1, 36 + bar, 70)]
    WALTZ[1] += [(3 * bar + beat, 1, key, 60) for beat in (1, 2) for key in (52, 55, 60)]


@pytest.mark.parametrize("hands", [scale(), WALTZ], ids=["scale", "waltz"])
def test_hands_are_two_tracks_by_nearness(hands, tmp_path, vocab):
    path = write_midi(tmp_path / "a.mid", [[*hands[0], *hands[1]]], metre=(3, 4))
    assert hands_of(read_sample(path, vocab)) == played_by(hands)


def test_hands_of_a_prompt_are_its_own(tmp_path, model, vocab):
    right = [(n, 1, 84 + n % 3, 80) for n in range(8)]
    right += [(n, 1, 48, 80) for n in range(8, 12)]  # in the last bar it plays the bass
    left = [(n, 1, 60, 80) for n in range(12)]
    path = write_midi(tmp_path / "a.mid", [left, right])
    settings = pg.SampleSettings(prompt=str(path), bars=5, num_samples=2)
    prompt = pg.read_prompt(settings, vocab)
    for ids in write(model, vocab, prompt=prompt.ids, bars=5, num_samples=2):
        score = pg.make_sample(np.array(ids), prompt, vocab, settings).score
        old = [[note for note in hand if note[0] < 12] for hand in hands_of(score)]
        assert old == played_by([right, left])
        assert score.note_num() > 24


def test_hands_are_found_again_on_any_grid(vocab):
    """Rounding moves a note by up to half a position; another note of its key may be near."""
    hands = [(0.0, 60, True), (0.05, 62, True), (0.5, 62, False), (3.0, 62, True), (1.0, 99, True)]
    prompt = pg.Prompt(None, None, 4 * 480, [], [], [], {}, hands)
    times = np.array([0, 120, 240, 1440, 1500, 2400])
    notes = {"time": times, "pitch": np.array([60, 62, 62, 62, 62, 62])}
    assert pg.match_hands(notes, prompt, 480, 4).tolist() == [1, -1, 0, 1, 1, -1]
    twice_rounded = {"time": np.array([1455]), "pitch": np.array([62])}
    assert pg.match_hands(twice_rounded, prompt, 480, 24).tolist() == [1]
    assert pg.match_hands(notes, prompt, 480, 2).tolist() == [1, 1, 0, 1, 1, -1]
    assert pg.match_hands(notes, prompt, 480, 24).tolist() == [1, -1, 0, 1, -1, -1]


def test_three_tracks_or_one_are_no_hands(tmp_path):
    for tracks, expected in ((scale(), 80), (scale()[:1], 0), ([*scale(), scale(1)[0]], 0)):
        path = write_midi(tmp_path / "a.mid", tracks)
        hands = pg.hands_of_tracks(pg.parse_midi(path.read_bytes()))
        assert len(hands) == expected
        assert {is_left for _, pitch, is_left in hands if pitch < 50} <= {True}


def test_sample_without_notes_is_none(vocab):
    ids = np.array([vocab.bos_id, vocab.bar_id, vocab.id_of["TimeSig_4/4"]])
    assert pg.make_sample(ids, None, vocab, pg.SampleSettings()) is None
