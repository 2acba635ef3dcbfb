"""Room 4: the Transformer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark import PlainAttention
from conftest import pg, scale, table, write_midi

V = 100
CONFIG = pg.ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=96)


@pytest.fixture
def model():
    """A small model whose head and mixture of recent tokens are not near zero, so that its logits differ."""
    torch.manual_seed(0)
    model = pg.PianoGPT(CONFIG, table(V)).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.recent)
    return model


def test_initial_loss_is_near_ln_v():
    torch.manual_seed(0)
    model, ids = pg.PianoGPT(CONFIG, table(V)), torch.randint(V, (8, 65))
    loss = model(ids[:, :-1], ids[:, 1:]) / (8 * 64)
    assert abs(loss.item() - math.log(V)) < 0.1


def test_future_tokens_do_not_change_past_logits(model):
    ids = torch.randint(V, (2, 96))
    changed = ids.clone()
    changed[:, 50] = (ids[:, 50] + 1) % V
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.allclose(a[:, 50], b[:, 50]) and not torch.allclose(a[:, 95], b[:, 95])


def test_recent_tokens_are_added_newest_first():
    x, weight = torch.randn(2, 9, 8), torch.randn(pg.RECENT, 8)
    y = pg.add_recent(x, weight)
    for t in range(9):
        expected = x[:, t] + sum(weight[n - 1] * x[:, t - n] for n in (1, 2, 3) if t >= n)
        assert torch.allclose(y[:, t], expected, atol=1e-6)


def test_fused_attention_equals_the_textbook_head_by_head(model):
    """Without rotation (cos 1, sin 0) it is what the benchmark's plain attention computes from the same matrices."""
    attention, plain, x = model.blocks[0].attention, PlainAttention(32, 4, 20), torch.randn(3, 20, 32)
    plain.proj.weight = attention.proj.weight
    for h, head in enumerate(plain.heads):
        for part, linear in enumerate((head.q, head.k, head.v)):
            linear.weight.data = attention.qkv.weight.split(32)[part][h * 8 : h * 8 + 8]
    assert torch.allclose(attention(x, torch.ones(20, 8), torch.zeros(20, 8)), plain(x), atol=1e-5)
    turn = pg.rotary_angles(torch.arange(20).expand(2, 1, 20), 0, pg.rotary_speeds(8))
    turned = attention(x, *(part[:, None] for part in turn))  # (1, 1, T, hs): the same for every head
    assert not torch.allclose(turned, plain(x), atol=1e-2)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 96, 200])
def test_tiled_attention_equals_pytorchs(T):
    q, k, v = (torch.randn(2, 4, T, 8, requires_grad=True) for _ in range(3))
    a, b = pg.tiled_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(a, b, atol=1e-5)
    weight = torch.randn_like(a)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (a, b))):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8)])
def test_tokens_stand_where_the_music_is(tokenizer, tmp_path, metre):
    path = write_midi(tmp_path / "x.mid", scale(1), metre=metre)
    ids = pg.encode_file(path, tokenizer, pg.MusicConfig()).ids.astype(np.int64)
    time, pitch = pg.follow(torch.from_numpy(pg.make_map(tokenizer)), torch.from_numpy(ids)[None])[0][:, 0]
    listener, words, quarters, pitches = pg.BarClock(tokenizer), pg.make_vocabulary(tokenizer), [], [60]
    for id in ids.tolist():
        quarters.append(listener.feed([id]).now)
        pitches.append(int(words[id].split("_")[1]) if words[id].startswith("Pitch_") else pitches[-1])
    steps = np.array(quarters) * 8 * metre[1] / 4 + 32  # what is before the first bar line is taken for a bar of 4/4
    assert len(set(quarters)) > 50 and time.tolist() == steps.tolist()
    assert len(set(pitches)) > 5 and pitch.tolist() == pitches[1:]


def test_place_goes_on_from_a_state():
    ids = torch.randint(V, (3, 60))
    whole, end = pg.follow(table(V), ids)
    parts, state = [], None
    for part in ids.split([17, 1, 1, 41], 1):
        places, state = pg.follow(table(V), part, state)
        parts.append(places)
    assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(state, end)


def test_rotary_products_depend_on_the_distance_in_time_and_pitch_alone():
    at = torch.arange(50)
    cos, sin = (x[0] for x in pg.rotary_angles(torch.stack([3 * at, 2 * at])[:, None], 0, pg.rotary_speeds(32)))
    q, k = torch.randn(32), torch.randn(32)
    products = [(pg.rotate(q, cos[t], sin[t]) * pg.rotate(k, cos[t - 7], sin[t - 7])).sum() for t in range(7, 50)]
    assert torch.allclose(torch.stack(products), products[0], atol=1e-4)
    assert not torch.allclose(
        (pg.rotate(q, cos[9], sin[9]) * pg.rotate(k, cos[3], sin[3])).sum(), products[0], atol=1e-3
    )


def test_octaves_and_moments_turn_the_channels_differently():
    place = torch.tensor([[[0], [0], [5]], [[60], [72], [60]]])  # three sequences of one token
    cos = pg.rotary_angles(place, 0, pg.rotary_speeds(32))[0][:, 0]
    time, pitch = cos[:, :10], cos[:, 10:16]
    assert torch.equal(time[0], time[1]) and not torch.equal(time[0], time[2])
    assert torch.equal(pitch[0], pitch[2])
    same = [math.isclose(a, b, abs_tol=1e-4) for a, b in zip(pitch[0].tolist(), pitch[1].tolist())]
    assert same == [True, True, True, False, False, False], "an octave is a whole turn of the periods that divide it"


def test_cached_logits_equal_uncached(model):
    ids, decoder = torch.randint(V, (3, 96)), pg.Decoder(model, 3)
    whole = model(ids)
    assert torch.allclose(decoder.read(ids[:, :10]), whole[:, 9], atol=1e-4)
    for t in range(10, 96):
        assert torch.allclose(decoder.read(ids[:, t : t + 1]), whole[:, t], atol=1e-4)


def test_bfloat16_loss_is_near_float32(model):
    ids = torch.randint(V, (4, 97))
    x = model.embedding(ids[:, :-1]), model.turn(ids[:, :-1])
    exact = model.loss(*x, ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model.loss(*x, ids[:, 1:]) / exact - 1) < 0.01


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, ids = pg.PianoGPT(pg.ModelConfig(2, 4, 32, 96, dropout=0.5), table(V)), torch.randint(V, (2, 96))
    torch.nn.init.normal_(model.head.weight)
    assert not torch.allclose(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_a_head_misses_whole_tokens_in_training():
    """With queries and keys of zero, position t is the mean of the values up to t, so they can be told from the means."""
    attention, x = pg.Attention(pg.ModelConfig(2, 4, 32, 96, dropout=0.5)), torch.randn(64, 5, 32)
    attention.qkv.weight.data[:64], attention.proj.weight.data = 0, torch.eye(32)

    def values():
        mean = attention(x, torch.ones(5, 8), torch.zeros(5, 8))
        return (mean * torch.arange(1, 6)[:, None]).diff(dim=1, prepend=torch.zeros(64, 1, 32)).view(64, 5, 4, 8)

    heads, whole = values(), attention.eval() and values()
    missing = heads.abs().amax(-1, keepdim=True) < 1e-5
    assert torch.allclose(heads, 2 * whole * ~missing, atol=1e-5) and 0.4 < missing.float().mean() < 0.6
    assert not torch.equal(missing[:, :, 0], missing[:, :, 1]), "each head misses others"
