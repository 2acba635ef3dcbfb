"""Room 7: logits become ids."""

import dataclasses
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
    model = pg.PianoGPT(pg.ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32), len(tokenizer))
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def inside_bars(ids, tokenizer):
    """Whether every Position lies in its bar."""
    length = 0
    for word in (pg.make_vocabulary(tokenizer)[i] for i in ids):
        kind, value = word.split("_")
        length = int(value.split("/")[0]) * 8 if kind == "TimeSig" else length
        if kind == "Position" and int(value) >= length:
            return False
    return True


FILTERS = [{}, {"temperature": 0.0}, {"temperature": 10.0, "min_p": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"top_k": 5, "top_p": 0.5}]


@pytest.mark.parametrize("filters", FILTERS)
def test_every_sequence_has_zero_token_errors_and_no_position_outside_its_bar(filters, model, grammar, tokenizer):
    for ids in pg.generate(model, grammar, pg.SampleConfig(num_samples=6, bars=12, **filters), seed=1):
        assert tokenizer.tokens_errors([ids]) == [0.0]
        assert inside_bars(ids, tokenizer)
        assert ids.count(grammar.bar) <= 12 and grammar.eos not in ids and grammar.bos not in ids


def test_notes_of_the_ids_are_all_heard(model, grammar, tokenizer):
    pitches = set(tokenizer.token_ids_of_type("Pitch"))
    for ids in pg.generate(model, grammar, pg.SampleConfig(num_samples=4, bars=8), seed=2):
        assert pg.decode_ids(ids, tokenizer).note_num() == sum(i in pitches for i in ids)


def test_same_seed_same_ids_and_another_seed_others(model, grammar):
    config = pg.SampleConfig(num_samples=2, bars=8)
    assert pg.generate(model, grammar, config, 5) == pg.generate(model, grammar, config, 5)
    assert pg.generate(model, grammar, config, 5) != pg.generate(model, grammar, config, 6)


def test_cached_generation_equals_uncached_past_the_window_too(model, grammar):
    """Greedy ids must be those of a model that reads its window anew for every token."""
    config = pg.SampleConfig(num_samples=1, bars=40, temperature=0.0)
    endless = grammar.rows.copy()
    endless[:, grammar.eos] = -np.inf
    grammar = dataclasses.replace(grammar, rows=endless)
    fast = pg.generate(model, grammar, config, 0)[0]
    assert len(fast) > 3 * model.config.block_size
    ids, state, start = [grammar.bos], grammar.start, 0
    for id in fast:
        if len(ids) - start > model.config.block_size:
            start = len(ids) - model.config.block_size // 2
        logits = model(torch.tensor([ids[start:]]))[0, -1] + torch.from_numpy(grammar.rows[state]).sum(0)
        assert logits[id] >= logits.max() - 1e-4
        ids.append(id)
        state = np.where(grammar.update[id] < 0, state, grammar.update[id])


def test_piece_ends_at_its_eos_or_after_its_last_bar(grammar):
    bar, eos, x = grammar.bar, grammar.eos, 50
    assert pg.cut_piece([bar, x, bar, x, x, eos, 0, 0], grammar, 9) == [bar, x, bar, x, x]
    assert pg.cut_piece([bar, x, bar, x, x, bar, x], grammar, 2) == [bar, x, bar, x, x]


def test_top_k_top_p_and_min_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log() + torch.tensor([0, -math.inf, 0, 0])

    def kept(**filters):
        return pg.filter_logits(logits, pg.SampleConfig(**{"top_k": 0, "top_p": 0.0, "min_p": 0.0} | filters)).isfinite()[0].tolist()

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
    cold, hot = (pg.filter_logits(logits, pg.SampleConfig(temperature=t, min_p=0.0)).softmax(-1)[0, 0] for t in (0.5, 2.0))
    assert cold == pytest.approx(1 / (1 + math.exp(-2))) and hot == pytest.approx(1 / (1 + math.exp(-0.5)))
