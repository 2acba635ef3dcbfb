"""The Transformer in musical time and pitch."""

import itertools
import math

import benchmark
import pytest
import torch
from conftest import pg
from convert import convert_weights
from torch import nn
from torch.nn import functional as F

SIZES = pg.ModelSettings(n_layer=2, n_head=4, n_embd=32, block_size=96)
VOCAB = pg.Vocabulary(pg.TokenSettings())
V = len(VOCAB.words)


@pytest.fixture
def model():
    """A small model; nothing in it is near zero, so that logits differ."""
    torch.manual_seed(0)
    model = pg.PianoGPT(SIZES, V, VOCAB.grid, n_styles=2)
    nn.init.normal_(model.embedding.weight[1:].data)
    nn.init.normal_(model.style.weight[1:].data)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.recent)
    nn.init.normal_(model.memory.weight, std=3.0)
    return model


def random_window(B=2, T=96):
    """Random ids at random moments and pitches; see scored for one with targets."""
    ids = torch.randint(1, V, (B, pg.RECENT + T + 1))
    before = torch.rand(B, V) ** 9
    return pg.Window(
        idx=ids[:, pg.RECENT : -1].clone(),
        time=torch.randint(6, (B, T)).cumsum(1).float(),
        pitch=torch.randint(pg.LOWEST_KEY, pg.HIGHEST_KEY + 1, (B, T)).float(),
        recent=ids[:, : pg.RECENT],
        before=before / before.sum(1, keepdim=True),
        style=torch.arange(B) % 3,
    )


def scored(window):
    """The window with random targets: the model returns their loss."""
    return window._replace(targets=torch.randint(1, V, window.idx.shape))


def part_of(window, first, last):
    """Some tokens of a window, as a window that follows those before them."""
    ids = torch.cat([window.recent, window.idx], dim=1)
    return pg.Window(
        idx=window.idx[:, first:last],
        time=window.time[:, first:last],
        pitch=window.pitch[:, first:last],
        recent=ids[:, first : first + pg.RECENT],
        before=window.before,
        style=window.style,
    )


def test_first_loss_is_near_ln_v():
    torch.manual_seed(0)
    loss = pg.PianoGPT(SIZES, V, VOCAB.grid, n_styles=2)(scored(random_window(8)))
    assert loss.item() / (8 * 96) == pytest.approx(math.log(V), abs=0.05)


def test_weights_keep_sizes_and_those_that_add_to_the_residual_are_smaller_in_deep_models():
    torch.manual_seed(0)
    model = pg.PianoGPT(pg.ModelSettings(n_layer=8, n_embd=64), V, VOCAB.grid)
    gains = {"qkv": 1, "expand": 1, "proj": 1 / 4, "contract": 1 / 4, "head": 0.1}
    for name, linear in model.named_modules():
        gain = gains.get(name.split(".")[-1])
        if gain:
            size = linear.weight.std().item() * linear.in_features**0.5
            assert size == pytest.approx(gain, rel=0.1), name
    assert not model.recent.any()
    assert not model.memory.weight.any()


def test_loss_is_summed_over_the_targets_that_are_scored(model):
    window = random_window(6)  # more tokens than are scored at once
    logits = model(window)
    window = scored(window)
    window.targets[:, 10:60] = pg.IGNORE
    loss = model(window)
    expected = 0.0
    for row, t in itertools.product(range(6), [*range(10), *range(60, 96)]):
        expected -= logits[row, t].log_softmax(0)[window.targets[row, t]]
    assert torch.allclose(loss, expected)


def test_future_tokens_do_not_change_past_logits(model):
    window = random_window()
    changed = window._replace(
        idx=window.idx.clone(), time=window.time.clone(), pitch=window.pitch.clone()
    )
    changed.idx[:, 50] = window.idx[:, 50] % (V - 1) + 1
    changed.time[:, 50] += 1
    changed.pitch[:, 50] += 1
    a = model(window)
    b = model(changed)
    assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.allclose(a[:, 50], b[:, 50])
    assert not torch.allclose(a[:, 95], b[:, 95])


@torch.inference_mode()
def test_cached_logits_equal_uncached(model):
    window = random_window(3)
    whole = model(window)
    cache = pg.KeyValueCache(model, 3)
    for n in (60, 1):  # a cache of length 0 is as good as new
        cache.length = 0
        logits = model(part_of(window, 0, n), cache)
        assert torch.allclose(logits, whole[:, :n], atol=1e-4)
        for t in range(n, 96):
            logits = model(part_of(window, t, t + 1), cache)
            assert torch.allclose(logits[:, 0], whole[:, t], atol=1e-4)
    cache.length = 1
    with pytest.raises(AssertionError, match="only an empty cache takes"):
        model(part_of(window, 1, 3), cache)


def test_attention_equals_the_textbook_head_by_head():
    torch.manual_seed(0)
    block = pg.Block(SIZES)
    x = torch.randn(3, 20, 32)
    angle = torch.randn(3, 20, 4)
    turned = torch.polar(torch.ones_like(angle), angle)

    def rotated(vectors):
        pairs = torch.complex(vectors[..., :4], vectors[..., 4:]) * turned
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    expected = 0
    for head in torch.arange(32).split(8):
        q, k, v = (x @ block.qkv.weight[part + head].T for part in (0, 32, 64))
        future = torch.ones(20, 20).triu(1).bool()
        scores = rotated(q) @ rotated(k).mT / 8**0.5
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        expected = expected + weights @ v @ block.proj.weight[:, head].T
    angle = torch.cat([-angle, angle], dim=-1)[:, None]
    y = block.attention(x.flatten(0, 1), angle.cos(), angle.sin(), 0, None)
    assert torch.allclose(y.view(3, 20, 32), expected, atol=1e-5)


def test_feed_forward_is_gated():
    block = pg.Block(SIZES)
    x = torch.randn(7, 32)
    hidden, gate = (x @ block.expand.weight.T).split(block.contract.in_features, dim=1)
    expected = (hidden * gate * gate.sigmoid()) @ block.contract.weight.T
    assert torch.allclose(block.feed_forward(x), expected, atol=1e-5)


@pytest.mark.parametrize("what, shift", [("time", 7.0), ("pitch", 5.0)])
def test_logits_depend_on_distances_in_time_and_pitch_alone(what, shift, model):
    window = random_window(T=50)
    values = getattr(window, what)
    later = torch.arange(50) >= 25
    logits = model(window)
    all_moved = model(window._replace(**{what: values + shift}))
    half_moved = model(window._replace(**{what: values + shift * later}))
    assert torch.allclose(all_moved, logits, atol=1e-3)
    assert torch.equal(half_moved[:, :25], logits[:, :25])
    assert not torch.allclose(half_moved[:, 25:], logits[:, 25:], atol=0.1)


def test_time_turns_some_channels_and_pitch_the_others():
    time, pitch = pg.rotary_speeds(32, 8)
    assert torch.equal(time != 0, pitch == 0)
    assert torch.equal(time[16:].sign() + pitch[16:].sign(), torch.ones(16))
    octave = [1, 1, 1, -1, 0, 0.5**0.5]  # a whole turn of the periods that divide it
    assert torch.allclose((12 * pitch[10:16]).cos(), torch.tensor(octave), atol=1e-5)
    finer, _ = pg.rotary_speeds(32, 24)
    assert torch.allclose(24 * finer, 8 * time), "a beat turns as far on every grid"


def test_the_benchmarks_plain_recipe_sees_places_in_the_window_but_no_time(model):
    plain = benchmark.PlainRecipe(SIZES, V, VOCAB.grid)
    nn.init.normal_(plain.embedding.weight)
    nn.init.normal_(plain.head.weight)
    window = random_window()
    later = window._replace(time=3 * window.time)
    before = plain(window)
    assert torch.equal(plain(later), before)
    assert not torch.allclose(model(later), model(window))
    plain.positions.data[5:] = 0
    after = plain(window)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5], before[:, 5])


def test_tokens_of_one_moment_are_told_apart(model):
    nowhere = torch.zeros(10, dtype=torch.long)
    corpus = pg.Corpus(nowhere, nowhere, nowhere + 60, torch.tensor([0, 10]), nowhere[:1])
    still = pg.cut_windows(corpus, torch.tensor([2, 5]), 3, VOCAB)
    cos, sin = model.rotation(still)
    assert cos.shape == (2, 1, 3, 8)
    assert len(sin[0, 0].unique(dim=0)) == 3
    assert torch.equal(sin[0], sin[1]), "in each window they are counted from its first one"


def test_each_token_is_told_the_three_before_it_all_the_counts_and_the_style(model):
    window = random_window()
    x = model.embed(window)
    ids = torch.cat([window.recent, window.idx], dim=1)
    of_id = model.embedding.weight
    of_all = window.before @ model.memory.weight.T + model.style.weight[window.style]
    for t in range(96):
        oldest, middle, newest, own = of_id[ids[:, t : t + 4]].unbind(1)
        mix = own + oldest * model.recent[0] + middle * model.recent[1] + newest * model.recent[2]
        assert torch.allclose(x[:, t], F.layer_norm(mix + of_all, (32,)), atol=1e-4)
    assert torch.allclose(model.embed(part_of(window, 40, 96)), x[:, 40:], atol=1e-5)


def test_tokens_before_the_window_change_logits_by_how_often_they_occur(model):
    def logits_after(old):
        ids = torch.cat([old, new])
        nowhere = torch.zeros_like(ids)
        corpus = pg.Corpus(ids, nowhere, nowhere, torch.tensor([0, len(ids)]), nowhere[:1])
        window = pg.cut_windows(corpus, torch.tensor([len(old) + pg.RECENT]), 20, VOCAB)
        logits = model(window)
        return logits

    old = torch.randint(1, V, (pg.MEMORY - pg.RECENT,))
    new = torch.randint(1, V, (pg.RECENT + 21,))
    logits = logits_after(old)
    other = old.clone()
    other[5:300] = 50
    assert torch.allclose(logits_after(old[torch.randperm(len(old))]), logits, atol=1e-4)
    assert not torch.allclose(logits_after(other), logits, atol=1e-2)


def test_padding_is_zero_and_learns_nothing(model):
    window = scored(random_window())
    window.idx[:, 50:] = pg.PAD
    window.recent[:] = pg.PAD
    loss = model(window)
    loss.backward()
    gradient = model.embedding.weight.grad
    assert not pg.PianoGPT(SIZES, V, VOCAB.grid).embedding.weight[pg.PAD].any()
    assert not gradient[pg.PAD].any()
    assert gradient[window.idx[:, :50]].any(-1).all()


def test_functional_call_computes_with_the_weights_it_is_given(model):
    window = random_window()
    logits = model(window)
    for name, weight in model.named_parameters():
        other = torch.func.functional_call(model, {name: weight + 1}, (window,))
        assert not torch.allclose(other, logits), name


def test_bfloat16_loss_and_gradient_are_near_those_of_float32(model):
    """In bfloat16 on a CPU, attention is written out."""
    window = scored(random_window(4))
    exact = model(window)
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = []
    model.blocks[0].register_forward_hook(lambda block, inputs, x: outputs.append(x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(window)
    loss.backward()
    assert outputs == [torch.float32], "only products are rounded, not their sum"
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert loss.item() != exact.item()
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() < 0.03 * gradients[name].norm(), name


@pytest.mark.parametrize("T", [1, 7, pg.QUERY_ROWS, 2 * pg.QUERY_ROWS + 5])
def test_attention_written_out_is_that_of_pytorch(T):
    q, k, v = torch.randn(3, 2, 4, T, 16).bfloat16().requires_grad_()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.allclose(pg.attend(q, k, v).float(), expected, atol=0.03)


def test_weights_of_the_older_version_compute_the_same(model):
    old = {"recent": torch.randn(pg.RECENT, 1, 32), "memory": torch.randn(V, 32)}
    for name, weight in model.state_dict().items():
        if name not in ("recent", "memory.weight", "style.weight"):
            old[name.removesuffix(".weight")] = torch.randn(weight.shape)
    nn.init.zeros_(model.style.weight)
    model.load_state_dict(model.state_dict() | convert_weights(old))
    assert torch.equal(model.blocks[1].qkv.weight, old["blocks.1.qkv"])
    window = random_window()
    ids = torch.cat([window.recent, window.idx], dim=1)
    # It added the memory to each token, and then mixed in the tokens before.
    tokens = old["embedding"][ids] + (window.before @ old["memory"])[:, None]
    expected = tokens[:, pg.RECENT :].clone()
    for n in range(pg.RECENT):
        expected += tokens[:, n : n + 96] * old["recent"][n]
    assert torch.allclose(model.embed(window), F.layer_norm(expected, (32,)), atol=1e-4)
