"""Room 7: logits become ids."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import pg


@pytest.fixture(scope="module")
def grammar(tokenizer):
    """The rules of the default tokenizer."""
    return pg.make_grammar(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    """An untrained model: it proposes everything, so the grammar has all the work."""
    torch.manual_seed(0)
    model = pg.make_model(pg.ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32), tokenizer)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def generate(model, grammar, tokenizer, seed=1, prompt=(), bars=8, **settings):
    """Six pieces of some bars."""
    config = pg.SampleConfig(num_samples=6, **settings)
    clocks = [pg.BarClock(tokenizer, bars, config.seconds, config.tempo) for _ in range(6)]
    return pg.generate(model, grammar, config, seed, list(prompt), clocks)


def inside_bars(ids, tokenizer):
    """Whether every Position lies in its bar."""
    length = 0
    for word in (pg.make_vocabulary(tokenizer)[i] for i in ids):
        kind, value = word.split("_")
        length = int(value.split("/")[0]) * 8 if kind == "TimeSig" else length
        if kind == "Position" and int(value) >= length:
            return False
    return True


FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 10.0, "min_p": 0.0},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"top_k": 5, "top_p": 0.5},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_every_sequence_has_zero_token_errors_and_no_position_outside_its_bar(filters, model, grammar, tokenizer):
    for ids in generate(model, grammar, tokenizer, bars=12, **filters):
        assert tokenizer.tokens_errors([ids]) == [0.0]
        assert inside_bars(ids, tokenizer)
        assert ids.count(grammar.bar) <= 12 and grammar.eos not in ids and grammar.bos not in ids


@pytest.mark.parametrize("filters", FILTERS)
def test_prompted_sequences_keep_the_grammar_too(filters, model, grammar, tokenizer):
    prompt = generate(model, grammar, tokenizer, seed=3, bars=3, seconds=1e4)[0]
    for ids in generate(model, grammar, tokenizer, prompt=prompt, bars=9, seconds=1e4, **filters):
        assert ids[: len(prompt)] == prompt and ids.count(grammar.bar) == 9
        assert tokenizer.tokens_errors([ids]) == [0.0] and inside_bars(ids, tokenizer)


def test_five_thousand_tokens_past_the_window_keep_the_grammar(model, grammar, tokenizer):
    ids = generate(model, grammar, tokenizer, bars=180, seconds=1e5)[0]
    assert len(ids) > 5000 + model.config.block_size
    assert tokenizer.tokens_errors([ids]) == [0.0] and inside_bars(ids, tokenizer)


@pytest.mark.parametrize("prompt_bars", [0, 3])
def test_a_piece_of_no_asked_for_length_ends_by_the_model_after_eight_new_bars(prompt_bars, model, grammar, tokenizer):
    prompt = generate(model, grammar, tokenizer, bars=prompt_bars)[0] if prompt_bars else []
    clocks = [pg.BarClock(tokenizer, prompt_bars + pg.MOST_BARS) for _ in range(24)]
    eager = copy.deepcopy(model)
    eager.head.weight.data[grammar.eos] *= 4  # ends often, and without the rule at once
    pieces = pg.generate(eager, grammar, pg.SampleConfig(), 1, prompt, clocks)
    bars = [ids.count(grammar.bar) - prompt_bars for ids in pieces]
    assert all(8 <= n <= 32 for n in bars) and min(bars) < 32


def test_notes_of_the_ids_are_all_heard(model, grammar, tokenizer):
    pitches = set(tokenizer.token_ids_of_type("Pitch"))
    for ids in generate(model, grammar, tokenizer):
        assert pg.decode_ids(ids, tokenizer).note_num() == sum(i in pitches for i in ids)


def test_same_seed_same_ids_and_another_seed_others(model, grammar, tokenizer):
    assert generate(model, grammar, tokenizer, 5) == generate(model, grammar, tokenizer, 5)
    assert generate(model, grammar, tokenizer, 5) != generate(model, grammar, tokenizer, 6)


@pytest.mark.parametrize("prompt_bars", [0, 2])
def test_cached_generation_equals_uncached_past_the_window_too(prompt_bars, model, grammar, tokenizer):
    """Greedy ids must be those of a model that reads its window anew for every token."""
    prompt = generate(model, grammar, tokenizer, bars=prompt_bars)[0] if prompt_bars else []
    fast = generate(model, grammar, tokenizer, prompt=prompt, bars=20, temperature=0.0, seconds=1e4)[0]
    assert fast[: len(prompt)] == prompt
    assert len(fast) > 10 * model.config.block_size
    ids, state, start = [grammar.bos], grammar.start, 0
    for id in fast:
        if len(ids) - start > model.config.block_size:
            start = len(ids) - model.config.block_size // 2
        if len(ids) == len(prompt) + 1:
            start = max(0, len(ids) - model.config.block_size)  # a longer prompt is seen in its last part
        logits = model(torch.tensor([ids[start:]]))[0, -1] + torch.from_numpy(grammar.rows[state]).sum(0)
        if len(ids) > len(prompt):
            logits[grammar.eos] = -math.inf  # held back until the asked-for end
            assert logits[id] >= logits.max() - 1e-4
        ids.append(id)
        state = np.where(grammar.update[id] < 0, state, grammar.update[id])


def test_top_k_top_p_and_min_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log() + torch.tensor([0, -math.inf, 0, 0])

    def kept(**filters):
        return (
            pg.filter_logits(logits, pg.SampleConfig(**{"top_k": 0, "top_p": 0.0, "min_p": 0.0} | filters))
            .isfinite()[0]
            .tolist()
        )

    assert kept() == [True, False, True, True]
    assert kept(min_p=0.3) == [True, False, True, False] and kept(min_p=0.5) == [True, False, False, False]
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.6) == [True, False, False, False]  # 0.5 / 0.8 of the legal probability
    assert kept(top_p=0.7) == [True, False, True, False]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    config, random = pg.SampleConfig(min_p=0.0), torch.Generator().manual_seed(0)
    drawn = pg.draw(p.log().repeat(20_000, 1), config, random).bincount(minlength=6) / 20_000
    assert torch.allclose(drawn, p, atol=0.02) and drawn[p == 0].sum() == 0


def test_temperature_sharpens():
    logits = torch.tensor([[1.0, 0.0]])
    cold, hot = (
        pg.filter_logits(logits, pg.SampleConfig(temperature=t, min_p=0.0)).softmax(-1)[0, 0] for t in (0.5, 2.0)
    )
    assert cold == pytest.approx(1 / (1 + math.exp(-2))) and hot == pytest.approx(1 / (1 + math.exp(-0.5)))
