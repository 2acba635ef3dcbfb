"""Learning."""

import math

import numpy as np
import pytest
import torch
from conftest import pg

MODEL = pg.ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32)
VOCAB = pg.Vocabulary(pg.MusicConfig())
IDS = np.r_[VOCAB.bos, np.arange(499) * 7 % len(VOCAB.words)]


def make_parts(**train):
    """A trainer, batches and validation windows over a small periodic corpus."""
    config = pg.TrainConfig(**{"steps": 24, "batch_size": 4, "warmup": 5, "eval_every": 8, "seed": 1} | train)
    torch.manual_seed(config.seed)
    trainer = pg.Trainer(pg.PianoGPT(MODEL, VOCAB.says), config)
    whole = pg.Options(data=pg.DataConfig(transpose=2), model=MODEL, train=config)
    batches = pg.Batches(torch.from_numpy(IDS).short(), VOCAB, whole)
    return trainer, batches, pg.make_windows(IDS[:100], 32, 32)


def run(trainer, batches, windows, until=None, save=lambda: None):
    """Train to the end or until a step."""
    trainer.run(batches, windows, lambda: trainer.step == until, save)
    return trainer


def same(a, b):
    """Whether two weight dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_batch_can_be_overfitted():
    trainer, batches, _ = make_parts(steps=120, lr=2e-3)
    losses = [trainer.train_step(*batches[0]) for _ in range(120)]
    assert losses[0] > 5.5 and losses[-1] < 0.1


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "check_content", lambda content: None)
    whole = run(*make_parts())
    for stop in (1, 8, 13):
        first = run(*make_parts(), until=stop)
        pg.save_checkpoint(tmp_path / "m.pt", {"trainer": first.state()})
        second, *data = make_parts()
        second.load_state(pg.load_checkpoint(tmp_path / "m.pt")["trainer"])
        assert second.step == stop and same(second.state()["best"], first.state()["best"])
        run(second, *data)
        assert all(same(second.state()[key], whole.state()[key]) for key in ("weights", "average", "best"))
        one, other = ([row | {"seconds": 0} for row in t.history] for t in (second, whole))
        assert one == other and len(one) == 3


def test_another_seed_gives_other_weights():
    assert not same(*(pg.copy_weights(run(*make_parts(seed=seed), until=1).model) for seed in (1, 2)))


def test_batch_split_in_parts_leaves_the_gradient_of_the_whole():
    gradients = []
    for accumulate in (1, 4):
        trainer, batches, _ = make_parts(batch_size=8, accumulate=accumulate)
        loss = trainer.add_gradients(*batches[0])
        gradients.append(torch.cat([torch.tensor([loss]), *(p.grad.flatten() for p in trainer.model.parameters())]))
    assert gradients[0].any() and torch.allclose(*gradients, atol=1e-6)


def test_run_takes_every_batch_and_writes_checkpoints_as_often_as_asked(monkeypatch):
    saved, drawn, (trainer, *data) = [], [], make_parts(save_every=7)
    get_batch = pg.Batches.__getitem__
    monkeypatch.setattr(pg.Batches, "__getitem__", lambda self, i: drawn.append(i) or get_batch(self, i))
    run(trainer, *data, save=lambda: saved.append(trainer.step))
    assert saved == [7, 14, 21] and drawn == [*range(24)]


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    config = pg.TrainConfig(steps=1000, warmup=100)
    rates = [pg.learning_rate(step, config) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == rates[99] == 1.0 and rates[-1] == pytest.approx(1 / 900)
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_step_takes_the_scheduled_rate_and_clips_the_gradient():
    trainer, batches, _ = make_parts()
    torch.nn.init.normal_(trainer.model.head, std=10.0)
    norms, parameters = [], [*trainer.model.parameters()]
    trainer.optimizer.step = lambda: norms.append(sum(p.grad.square().sum() for p in parameters).sqrt().item())
    trainer.train_step(*batches[0])
    assert norms == pytest.approx([1.0], rel=1e-3)
    assert all(g["lr"] == pytest.approx(g["peak"] / 5) for g in trainer.optimizer.param_groups)


@pytest.mark.parametrize("n_embd, inner", [(128, 336), (512, 1360)])
def test_matrices_alone_decay_and_their_rate_falls_with_the_fan_in(n_embd, inner):
    model = pg.PianoGPT(pg.ModelConfig(n_layer=1, n_embd=n_embd), VOCAB.says)
    optimizer = pg.make_optimizer(model, pg.TrainConfig(lr=1.0))
    found = {p: (group["peak"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {"head": (1536 / n_embd, 0.5), "embedding": (120, 0), "memory": (120, 0)}
    expected |= dict.fromkeys(("recent", "norm", "norm_1", "norm_2"), (45, 0))
    for name, fan_in in (("qkv", n_embd), ("proj", n_embd), ("expand", n_embd), ("contract", inner)):
        expected[name] = (1536 / fan_in, 0.5)
    assert {name.split(".")[-1]: found[p] for name, p in model.named_parameters()} == expected


def test_step_of_a_matrix_in_the_blocks_is_orthogonal_and_of_the_scheduled_size():
    (trainer, batches, _), rate = make_parts(lr=1e-3, warmup=4, weight_decay=0.0), 1e-3 / 4 * 67
    before = pg.copy_weights(trainer.model)
    trainer.train_step(*batches[1])  # of windows that begin anywhere
    for name, weight in pg.copy_weights(trainer.model).items():
        step = weight - before[name]
        if name.startswith("blocks") and step.dim() == 2:
            sizes = torch.linalg.svdvals(step) / (rate * max(1, step.size(0) / step.size(1)) ** 0.5)
            assert 0.6 < sizes.min() and sizes.max() < 1.25
        elif name != "embedding":  # AdamW's first step: its rate, in the direction of the gradient's sign
            peak = next(g["lr"] for g, (n, _) in zip(trainer.optimizer.param_groups, trainer.model.named_parameters()) if n == name)
            assert step.abs().max() == pytest.approx(peak, rel=1e-2)


def test_matrices_of_the_blocks_decay_too():
    after = []
    for decay in (0.0, 0.5):
        trainer, batches, _ = make_parts(lr=1e-2, warmup=1, weight_decay=decay)
        before = trainer.model.blocks[0].qkv.detach().clone()
        trainer.train_step(*batches[0])
        after.append(trainer.model.blocks[0].qkv.detach())
    rate = 1e-2 * 1536 / 32
    assert torch.allclose(after[1] - after[0], -rate * 0.5 * before, atol=1e-3) and before.abs().max() * rate > 0.1


def test_average_that_validates_best_is_kept():
    trainer, batches, windows = make_parts(steps=20, lr=3e-3)
    run(trainer, batches, windows)
    good, row = trainer.best, trainer.best_row()
    torch.nn.init.normal_(trainer.average.head)
    trainer.validate(windows, batches)
    assert trainer.history[-1]["val_loss"] > row["val_loss"] and trainer.best_row() is row and trainer.best is good


def test_run_without_validation_keeps_the_last_average():
    trainer = run(*make_parts(steps=12)[:2], pg.make_windows(IDS[:0], 32, 32))
    assert same(trainer.best, pg.copy_weights(trainer.average)) and trainer.best_row() is trainer.history[-1]
    assert ["val_loss" in row for row in trainer.history] == [False, False]


def test_average_is_of_about_the_last_tenth_of_the_steps():
    trainer, batches, _ = make_parts()
    weights = []
    for n in range(40):
        trainer.train_step(*batches[n])
        weights.append(trainer.model.head.detach().clone())
    shares = torch.zeros(40)
    for n in range(40):  # what each step has in the average
        shares = shares * n / (n + 10) if n else shares
        shares[n] = 10 / (n + 10)
    expected = (shares[:, None, None] * torch.stack(weights)).sum(0)
    assert torch.allclose(trainer.average.head, expected, atol=1e-6) and shares[20:].sum() > 0.99


def test_validation_is_not_compiled_and_gives_the_loss_per_token_and_per_note():
    trainer, batches, windows = make_parts()
    trainer.loss = None  # what torch.compile would have made
    trainer.validate(windows, batches)
    row, notes = trainer.history[0], pg.is_in(IDS[1:100], VOCAB.pitches).sum()
    total = pg.evaluate(trainer.model, windows, batch_size=1)
    assert row["val_loss"] == pytest.approx(total / 99, rel=1e-5) and 0 < notes < 99
    assert row["val_nats_per_note"] == pytest.approx(total / notes, rel=1e-5)


def test_loss_that_is_no_number_stops_the_run_before_it_is_saved_or_learned():
    (trainer, *data), saved = make_parts(save_every=1), []
    torch.nn.init.constant_(trainer.model.head, math.inf)
    before = trainer.state()
    with pytest.raises(pg.UserError, match="the loss became nan after 0 steps: pass a smaller --lr"):
        run(trainer, *data, save=lambda: saved.append(1))
    assert not saved and all(same(trainer.state()[key], before[key]) for key in ("weights", "average"))


def test_average_before_the_first_validation_is_the_best_so_far():
    trainer = run(*make_parts(), until=3)
    assert not trainer.history and same(trainer.state()["best"], pg.copy_weights(trainer.average))
    resumed, *data = make_parts()
    resumed.load_state(trainer.state())
    run(resumed, *data, until=6)
    assert same(resumed.state()["best"], pg.copy_weights(resumed.average)), "not those of the step at which it was saved"


def test_validation_beats_any_row_without_one():
    trainer, *_ = make_parts()
    trainer.history = [{"step": 8}, {"step": 16}]
    assert trainer.best_row()["step"] == 16
    trainer.history.append({"step": 24, "val_loss": 9.0})
    assert trainer.best_row()["step"] == 24
