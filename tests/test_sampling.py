"""Writing: logits become legal ids, ids a piece."""

import copy
import itertools
import math

import pytest
import torch
from conftest import alone, pg
from test_music import assert_grammar, ids_of, random_walk


def make_model(vocab, n_layer=1):
    """An untrained model: it proposes everything, so the grammar has all the work."""
    torch.manual_seed(0)
    model = pg.PianoGPT(pg.ModelConfig(n_layer, n_head=2, n_embd=32, block_size=32), vocab.says)
    torch.nn.init.normal_(model.head, std=0.2)
    torch.nn.init.normal_(model.memory, std=0.2 * pg.MEMORY**0.5)
    return model


@pytest.fixture(scope="module")
def model(vocab):
    """An untrained model of one layer."""
    return make_model(vocab)


def write(model, vocab, seed=1, prompt=(), **settings):
    """Six pieces of eight bars, if the settings do not say otherwise."""
    settings = pg.SampleConfig(**{"num_samples": 6, "bars": 8} | settings)
    return pg.generate(model, vocab, settings, seed, list(prompt))


@pytest.fixture(scope="module")
def prompt_and_as_learned(model, vocab):
    """A prompt of three bars, and pieces of six bars that are drawn as learned."""
    return write(model, vocab, seed=3, bars=3, num_samples=1)[0], write(model, vocab, bars=6, temperature=1.0)


@pytest.mark.parametrize("temperature", [0.85, 0.0, 0.01, 10.0])
def test_pieces_and_continuations_have_their_bars_keep_the_grammar_and_are_heard_whole_at_every_temperature(
        temperature, prompt_and_as_learned, model, vocab):
    prompt, as_learned = prompt_and_as_learned
    for start in ([], prompt):
        pieces = write(model, vocab, prompt=start, bars=6, temperature=temperature)
        assert len(pieces) == 6 and pieces != as_learned
        for ids in pieces:
            assert ids[: len(start)] == start and ids.count(vocab.bar) == 6 and vocab.eos not in ids
            assert_grammar(ids, vocab)
            assert vocab.decode(ids).note_num() == pg.is_in(torch.tensor(ids), vocab.pitches).sum()


@pytest.mark.parametrize("with_prompt", [False, True])
def test_chords_that_are_asked_for_are_written_and_no_others(with_prompt, model, vocab):
    prompt = write(model, vocab, seed=3, bars=2, num_samples=1)[0] if with_prompt else []
    for ids in write(model, vocab, prompt=prompt, bars=24, chords="C Am F,G7"):
        assert_grammar(ids, vocab)
        words = [vocab.words[i] for i in ids[len(prompt):]]
        bars, position, length, chord, heard = -1, 0, 0, None, 0
        for kind, value in (word.split("_") for word in words):
            if kind == "Bar":
                bars, position, chord = bars + 1, 0, None
            elif kind == "TimeSig":
                length = int(value.split("/")[0]) * vocab.music.grid
            elif kind == "Position":
                position = int(value)
            wanted = ["C:maj", "A:min", "F:maj" if 2 * position < length else "G:7dom"][bars % 3]
            if kind == "Chord":
                assert chord != value == wanted
                chord = value
            elif kind == "Pitch":
                heard += 1
                assert chord == wanted, "every note is under its chord"
        assert heard > 10


def test_five_thousand_tokens_past_the_window_keep_the_grammar(model, vocab):
    ids = write(model, vocab, bars=160, num_samples=1)[0]
    assert len(ids) > 5000 + model.config.block_size
    assert_grammar(ids, vocab)


@pytest.mark.parametrize("prompt_bars", [0, 3])
def test_piece_of_no_asked_for_length_is_ended_by_the_model_after_8_to_24_new_bars(prompt_bars, model, vocab):
    prompt = write(model, vocab, bars=prompt_bars)[0] if prompt_bars else []
    eager, never = copy.deepcopy(model), copy.copy(vocab)
    eager.head.data[[vocab.bar, vocab.eos]] *= 8  # short bars; ends often, and without the rule at once
    never.follows = vocab.follows.clone()
    never.follows[:, vocab.eos] = False
    pieces = [write(eager, words, prompt=prompt, bars=0, num_samples=n) for words, n in ((vocab, 16), (never, 2))]
    one, other = ([ids.count(vocab.bar) - prompt_bars for ids in group] for group in pieces)
    assert min(one) == 8 and max(one) <= 24 and other == [24, 24]
    assert all(ids[-1] == vocab.eos and ids.count(vocab.eos) == 1 for ids in pieces[0] if ids.count(vocab.bar) < 24 + prompt_bars)
    assert not any(0 in ids for group in pieces for ids in group)


def test_piece_is_over_at_eos_or_at_its_bars(vocab):
    def end(words, bars=24):
        return pg.find_end(torch.tensor(ids_of(words, vocab)), vocab, pg.SampleConfig(bars=bars))

    bar = "Bar_None TimeSig_4/4 Position_0 Tempo_120.0 "
    assert end(bar + "EOS_None PAD_None") == 5
    assert end(bar * 5) is None and end(bar * 2, bars=2) is None
    assert end(bar * 5, bars=2) == 8 and end(bar * 2 + "EOS_None", bars=3) == 9


def test_same_seed_same_ids_and_another_seed_others(model, vocab):
    one, same, other = (write(model, vocab, seed, bars=3) for seed in (5, 5, 6))
    assert one == same != other and len({tuple(ids) for ids in one}) == 6


@pytest.mark.parametrize("length", [1, 20, 32, 50])
@torch.inference_mode()
def test_cached_generation_equals_uncached_past_the_window(length, vocab):
    """Greedy ids of three sequences must be those of a model that reads its window anew for every token."""
    model, walk, size = make_model(vocab, n_layer=2), random_walk(vocab, 200)[0], 32
    ids = torch.tensor([walk[i * 3 : i * 3 + length] for i in range(3)])
    hold, start = torch.tensor([-math.inf, 0.0, -math.inf]), max(0, length - size)
    stream = pg.draw_tokens(model, vocab, pg.SampleConfig(temperature=0.0), ids, 0, hold)
    for drawn in itertools.islice(stream, 4 * size):
        if ids.size(1) - start > size:
            start = ids.size(1) - size // 3
        legal = vocab.legal(pg.advance(vocab.says, ids, vocab.says[:, :1].expand(7, 3))[:, :, -1])
        logits = model(alone(ids)[:, start:])[:, -1]
        logits[:, vocab.eos] += hold
        logits = logits.masked_fill(~legal, pg.ILLEGAL)
        assert (logits.gather(1, drawn[:, None]) >= logits.amax(1, keepdim=True) - 1e-4).all()
        ids = torch.cat([ids, drawn[:, None]], 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_decides_which_pitch_and_chord_is_drawn_but_not_how_often_one_is(temperature, vocab):
    """Of three kinds of token two of each: only inside pitches and chords the shares depend on the temperature."""
    p, rng = torch.zeros(len(vocab.words)), torch.Generator().manual_seed(0)
    pairs = torch.tensor([[kind.start, kind.stop - 1] for kind in (vocab.pitches, vocab.chords)] + [[0, vocab.bar]])
    p[pairs] = torch.tensor([[0.3, 0.1], [0.02, 0.18], [0.25, 0.15]])
    share = pg.draw(p.log().repeat(20_000, 1), vocab, temperature, rng).bincount(minlength=len(p)) / 20_000
    sharp = p[pairs[:2]] ** (1 / temperature)
    expected = torch.cat([sharp * (p[pairs[:2]].sum(1) / sharp.sum(1))[:, None], p[pairs[2:]]])
    assert torch.allclose(share[pairs], expected, atol=0.02) and not share[p == 0].any()


def test_temperature_changes_nothing_where_no_pitch_or_chord_is_legal(vocab):
    logits = torch.full((4, len(vocab.words)), pg.ILLEGAL)
    logits[:, vocab.bar] = 0.0
    assert pg.draw(logits, vocab, 0.85, torch.Generator()).tolist() == [vocab.bar] * 4


def test_token_without_probability_is_not_drawn_at_the_edges_of_chance(vocab, monkeypatch):
    logits = torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    logits[:, :9] = logits[:, 300:] = pg.ILLEGAL
    for u in (0.0, 1 - 2**-24):  # the least and the most that torch.rand can give
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **options: torch.full(shape, u))
        drawn = pg.draw(logits, vocab, 1.0, None)
        assert drawn.min() >= 9 and drawn.max() < 300
