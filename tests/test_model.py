"""The Transformer in musical time and pitch."""

import math

import pytest
import torch
from conftest import alone, pg, scale, write_midi

CONFIG = pg.ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=96)
VOCAB = pg.Vocabulary(pg.MusicConfig())
V = len(VOCAB.words)


@pytest.fixture
def model():
    """A small model; nothing that counts is near zero, so that logits differ."""
    torch.manual_seed(0)
    model = pg.PianoGPT(CONFIG, VOCAB.says)
    torch.nn.init.normal_(model.head)
    torch.nn.init.normal_(model.recent)
    torch.nn.init.normal_(model.memory, std=100.0)
    return model


def test_initial_loss_is_near_ln_v():
    torch.manual_seed(0)
    model, ids = pg.PianoGPT(CONFIG, VOCAB.says), torch.randint(V, (8, 65))
    loss = model.loss(*model.embed(alone(ids[:, :-1])), ids[:, 1:]) / (8 * 64)
    assert abs(loss.item() - math.log(V)) < 0.1


def test_future_tokens_do_not_change_past_logits(model):
    ids = torch.randint(V, (2, 96))
    changed = ids.clone()
    changed[:, 50] = (ids[:, 50] + 1) % V
    a, b = model(alone(ids)), model(alone(changed))
    assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.allclose(a[:, 50], b[:, 50]) and not torch.allclose(a[:, 95], b[:, 95])


def test_recent_tokens_are_added_newest_last(model):
    x, cos, sin = model.embed(alone(torch.randint(V, (2, 9))))
    expected, mixed = model.logits(x, cos, sin), x.clone()
    for t in range(pg.RECENT, x.size(1)):
        mixed[:, t] += sum(model.recent[-1 - n] * x[:, t - 1 - n] for n in range(pg.RECENT))
    assert not x[:, : pg.RECENT].any(), "nothing comes before the first token"
    torch.nn.init.zeros_(model.recent)
    assert torch.allclose(model.logits(mixed, cos, sin), expected, atol=1e-4)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_attention_equals_the_textbook_head_by_head(dtype, error):
    torch.manual_seed(0)
    block, x, expected = pg.Block(CONFIG).to(dtype), torch.randn(3, 20, 32, dtype=dtype), 0
    unturned = torch.ones(3, 1, 20, 8, dtype=dtype), torch.zeros(3, 1, 20, 8, dtype=dtype)
    for head in torch.arange(32).split(8):
        q, k, v = (x @ block.qkv[part * 32 + head].T for part in range(3))
        future = torch.ones(20, 20).triu(1).bool()
        weights = (q @ k.mT / 8**0.5).masked_fill(future, -math.inf).softmax(-1)
        expected = expected + weights @ v @ block.proj[:, head].T
    y = block.attention(x.flatten(0, 1), *unturned, None, 0) @ block.proj.T
    assert y.dtype == dtype and torch.allclose(y.view(3, 20, 32), expected, atol=error)


@pytest.mark.parametrize("metre", [(4, 4), (3, 4), (6, 8)])
@pytest.mark.parametrize("grid", [8, 24])
def test_tokens_stand_where_miditok_plays_them(metre, grid, tmp_path):
    vocab = pg.Vocabulary(pg.MusicConfig(grid=grid))
    ids = torch.from_numpy(pg.read_piece(write_midi(tmp_path / "x.mid", scale(1), metre=metre), vocab).ids).long()
    score = vocab.tokenizer.decode([ids.tolist()])
    time, pitch, _, _ = pg.place(vocab.says, ids[None], vocab.says[:, :1], torch.zeros(1))
    is_note = pg.is_in(ids, vocab.pitches)
    steps = time[0, is_note] - 4 * grid  # what is before the first bar line counts as a bar of 4/4
    notes = score.tracks[0].notes
    assert steps.tolist() == [n.time / score.tpq * grid * metre[1] / 4 for n in notes] and len(notes) == 80
    assert pitch[0, is_note].tolist() == [n.pitch for n in notes]


def test_follow_and_place_token_by_token_equal_all_at_once():
    def walk(ids, now, bar_start):
        held, (time, pitch, *after) = pg.advance(VOCAB.says, ids, now), pg.place(VOCAB.says, ids, now, bar_start)
        assert torch.equal(after[0], held[:, :, -1])
        return torch.cat([held, time[None], pitch[None]]), after

    ids, after, parts = torch.randint(V, (3, 60)), (VOCAB.says[:, :1].expand(7, 3), torch.zeros(3)), []
    ids[:, ::4] = VOCAB.bar
    whole, end = walk(ids, *after)
    for part in ids.split([17, 23, *[1] * 20], 1):
        places, after = walk(part, *after)
        parts.append(places)
    assert torch.equal(torch.cat(parts, 2), whole) and all(map(torch.equal, after, end))


def test_logits_depend_on_distances_in_time_and_pitch_alone(model):
    x, cos, sin = model.embed(alone(torch.randint(V, (2, 50))))
    turn = (7 * model.speeds[0] + 5 * model.speeds[1]).expand(50, 8)  # seven positions later, five semitones higher
    some = turn * (torch.arange(50) >= 25)[:, None]
    all_moved, some_moved = (model.logits(x, cos * turn.cos() - sin * turn.sin(), sin * turn.cos() + cos * turn.sin())
                             for turn in (turn, some))
    assert torch.allclose(all_moved, model.logits(x, cos, sin), atol=1e-3)
    assert torch.allclose(some_moved[:, :25], all_moved[:, :25], atol=1e-3)
    assert not torch.allclose(some_moved[:, 25:], all_moved[:, 25:], atol=0.1)


def test_octaves_and_moments_turn_the_channels_differently(model):
    time, pitch = pg.rotary_speeds(32, 8)
    assert torch.equal(time != 0, pitch == 0) and time.any()
    octave = [1, 1, 1, -1, 0, 0.5**0.5]  # a whole turn of the periods that divide it
    assert torch.allclose((12 * pitch[10:16]).cos(), torch.tensor(octave), atol=1e-5)
    cos = model.embed(alone(torch.zeros(1, 3, dtype=torch.long)))[1][0, 0]
    assert not torch.equal(cos[0], cos[1]) and not torch.equal(cos[0], cos[2]), "tokens of one moment are told apart"


@torch.inference_mode()
def test_cached_logits_equal_uncached(model):
    ids = torch.randint(V, (3, pg.MEMORY + 96))
    ids[0, -50] = VOCAB.bos
    start = ids[:, : pg.MEMORY + 60]
    cache, window, whole = pg.Cache(model, start), ids[:, pg.MEMORY :], model(ids)
    assert torch.allclose(model(start, cache), whole[:, :60], atol=1e-4)
    for t in range(60, 96):
        assert torch.allclose(model(window[:, t : t + 1], cache)[:, 0], whole[:, t], atol=1e-4)


def test_of_the_tokens_before_the_window_counts_how_often_they_occur_in_this_piece(model):
    ids = torch.randint(VOCAB.bar + 1, V, (2, pg.MEMORY + 20))
    state = [VOCAB.pitches.start, VOCAB.bar, VOCAB.words.index("TimeSig_3/4")]  # the same in all
    ids[:, pg.MEMORY - 3 : pg.MEMORY] = torch.tensor(state)
    old, new = ids[:, : pg.MEMORY - 3], ids[:, pg.MEMORY - 3 :]
    shuffled = torch.cat([old[:, torch.randperm(old.size(1))], new], 1)
    other, begun = ids.clone(), ids.clone()
    other[:, 5:50] = VOCAB.pitches.start
    begun[:, 200] = VOCAB.bos
    unknown = begun.clone()
    unknown[:, :200] = 0
    logits, x = model(ids), model.embed(ids)[0]
    assert torch.allclose(model(shuffled), logits, atol=1e-3)
    assert not torch.allclose(model(other), logits, atol=1e-2)
    assert torch.equal(model(begun), model(unknown)) and not torch.allclose(model(begun), logits, atol=1e-2)
    added = x[:, -1] - model.embedding[ids[:, -1]]
    assert torch.allclose(added, model.memory[ids[:, : pg.MEMORY]].mean(1), atol=1e-3)
    ids[:, -10] = VOCAB.bos
    begun = model.embed(ids)[0][:, pg.RECENT :] - model.embedding[ids[:, pg.MEMORY :]]
    assert torch.allclose(begun[:, :10], added[:, None], atol=1e-3) and not begun[:, 10:].any(), "a piece ends, one begins"


def test_window_knows_the_state_of_the_music_before_it(model):
    signatures = torch.tensor([[VOCAB.words.index(f"TimeSig_{n}/4")] for n in (3, 4)])
    ids = torch.cat([torch.full((2, pg.MEMORY - 1), VOCAB.bar), signatures, torch.full((2, 3), VOCAB.bar)], 1)
    angles = model.embed(ids)[1]
    assert not torch.allclose(angles[0], angles[1], atol=0.01), "bars of 3/4 are shorter"


def test_bfloat16_loss_is_near_float32(model):
    ids = torch.randint(V, (4, 97))
    embedded = model.embed(alone(ids[:, :-1]))
    exact = model.loss(*embedded, ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model.loss(*embedded, ids[:, 1:]) / exact - 1) < 0.01
        x, block = torch.randn(5, 32), model.blocks[0]
        assert block.add(x, x.bfloat16(), block.proj).dtype == torch.float32, "only products are rounded, not their sum"
