"""Room 6: learning."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import pg, table

V = 60
MODEL = pg.ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1)
PITCHES = range(10, 50)


def parts(ids=None, **train):
    """A trainer, batches and validation windows over a small periodic corpus."""
    config = pg.TrainConfig(**{"steps": 40, "batch_size": 4, "warmup": 5, "eval_every": 10, "seed": 1} | train)
    ids = np.arange(500) * 7 % V if ids is None else ids
    torch.manual_seed(config.seed)
    trainer = pg.Trainer(pg.PianoGPT(MODEL, table(V)), config)
    batches = pg.Batches(torch.from_numpy(ids).short(), PITCHES, config.batch_size, MODEL.block_size, 2, config.seed)
    return trainer, batches, pg.validation_windows(ids[:100], MODEL.block_size, 8)


def run(trainer, batches, windows, until=None):
    """Train to the end or until a step."""
    trainer.run(batches, windows, stopped=lambda: trainer.step == until, save=lambda: None, sample=lambda: None)
    return trainer


def same(a, b):
    """Whether two weight dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer, steps", [("adamw", 200), ("muon", 100)])
def test_one_batch_can_be_overfitted(optimizer, steps):
    trainer, batches, _ = parts(steps=steps, lr=1e-3, optimizer=optimizer)
    trainer.model.train()
    trainer.model.dropout.p = 0
    losses = [trainer.train_step(*batches[0]) for _ in range(steps)]
    assert losses[0] > 3.5 and losses[-1] < 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(optimizer, tmp_path):
    whole = run(*parts(optimizer=optimizer))
    for stop in (1, 17, 30):
        first = run(*parts(optimizer=optimizer), until=stop)
        pg.save_checkpoint(tmp_path / "m.pt", first.state())
        second, *data = parts(optimizer=optimizer)
        second.load_state(pg.load_checkpoint(tmp_path / "m.pt"))
        assert second.step == stop
        run(second, *data)
        assert same(second.weights(), whole.weights()) and same(second.best, whole.best)
        keep = [[{k: v for k, v in row.items() if k != "seconds"} for row in t.history] for t in (second, whole)]
        assert keep[0] == keep[1]


def test_another_seed_gives_other_weights():
    assert not same(run(*parts(seed=1)).weights(), run(*parts(seed=2)).weights())


def test_batch_worked_off_in_parts_leaves_the_gradient_of_the_whole():
    gradients = []
    for accumulate in (1, 4):
        trainer, batches, _ = parts(batch_size=8, accumulate=accumulate)
        trainer.model.eval()  # without dropout, which would differ
        loss = trainer.add_gradients(*batches[0])
        gradients.append([loss, *(p.grad for p in trainer.model.parameters())])
    for whole, summed in zip(*gradients):
        assert torch.allclose(torch.as_tensor(whole), torch.as_tensor(summed), atol=1e-6)


def test_shares_of_a_batch_make_the_batch():
    _, batches, _ = parts()
    shares = [dataclasses.replace(batches, rank=r, processes=2)[3] for r in range(2)]
    assert all(torch.equal(torch.cat(x), whole) for x, whole in zip(zip(*shares), batches[3]))


def test_checkpoints_are_written_as_often_as_asked():
    saved = []
    trainer, batches, windows = parts(save_every=7)
    trainer.run(batches, windows, stopped=lambda: False, save=lambda: saved.append(trainer.step), sample=lambda: None)
    assert saved == [7, 14, 21, 28, 35]


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    config = pg.TrainConfig(steps=1000, warmup=100)
    rates = [pg.learning_rate(s, config) for s in range(1000)]
    assert rates[0] == 0.01 and max(rates) == rates[99] == 1.0 and rates[-1] == pytest.approx(1 / 900)
    assert all(a < b for a, b in zip(rates[:99], rates[1:])) and all(a >= b for a, b in zip(rates[100:], rates[101:]))


def test_matrices_alone_decay_and_their_rate_falls_with_the_width():
    def groups(n_embd, optimizer="adamw"):
        model = pg.PianoGPT(pg.ModelConfig(n_embd=n_embd), table(V))
        optimizers = pg.make_optimizers(model, pg.TrainConfig(optimizer=optimizer))
        of = {id(p): g for o in optimizers for g in o.param_groups for p in g["params"]}
        return {name: of[id(p)] for name, p in model.named_parameters()}

    narrow, wide = groups(128), groups(512)
    assert narrow["blocks.0.expand.weight"]["peak"] == pytest.approx(3e-4 * 8)
    assert wide["blocks.0.expand.weight"]["peak"] == pytest.approx(3e-4 * 2)
    assert narrow["blocks.0.contract.weight"]["peak"] == pytest.approx(3e-4 * 1024 / 336)
    assert narrow["recent"]["peak"] == wide["norm.weight"]["peak"] == pytest.approx(3e-4 * 30)
    assert narrow["embedding.weight"]["peak"] == wide["embedding.weight"]["peak"]
    muon = groups(128, "muon")
    assert muon["head.weight"] == groups(128)["head.weight"] | {"params": muon["head.weight"]["params"]}
    assert {n for n in muon if muon[n]["what"] == "Muon"} == {
        n for n in narrow if n.endswith("weight") and "blocks" in n and "norm" not in n
    }
    for named in (narrow, muon):
        assert {n for n, g in named.items() if g["weight_decay"]} == {
            n for n in narrow if "norm" not in n and n not in ("embedding.weight", "recent")
        }


def test_muon_steps_as_pytorchs_does():
    torch.manual_seed(0)
    ours = [torch.randn(*shape) for shape in [(64, 32), (32, 64), (64, 32)]]
    theirs = [p.clone() for p in ours]
    optimizers = pg.Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.1}], {}), torch.optim.Muon(theirs, lr=0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=0.01)  # theirs is in bfloat16; a step is 0.1 long


def test_best_validation_weights_are_kept():
    trainer, batches, windows = parts(steps=20, lr=3e-3)
    run(trainer, batches, windows)
    good, best_loss = trainer.best, trainer.best_loss
    with torch.no_grad():
        trainer.model.head.weight.normal_()
    trainer.validate(windows, batches)
    assert trainer.history[-1]["val_loss"] > best_loss and trainer.best_loss == best_loss and trainer.best is good


def test_validation_loss_per_note_is_the_same_loss_over_fewer_counts():
    trainer, batches, windows = parts()
    trainer.validate(windows, batches)
    row, targets = trainer.history[0], np.arange(1, 100) * 7 % V
    notes = ((targets >= 10) & (targets < 50)).sum()
    assert row["val_nats_per_note"] == pytest.approx(row["val_loss"] * 99 / notes)


def test_evaluation_does_not_go_through_the_compiled_loss():
    trainer, batches, windows = parts()
    plain = pg.evaluate(trainer.model, windows)
    trainer.model.loss = lambda *x: 1 / 0
    assert pg.evaluate(trainer.model, windows) == plain


def test_evaluation_does_not_depend_on_how_windows_are_batched():
    trainer, _, windows = parts()
    assert pg.evaluate(trainer.model, windows, 1) == pytest.approx(pg.evaluate(trainer.model, windows), rel=1e-5)


def test_run_without_validation_keeps_the_last_weights():
    trainer, batches, _ = parts(steps=20)
    run(trainer, batches, pg.validation_windows(np.arange(0), 32, 8))
    assert same(trainer.best, trainer.weights()) and trainer.history[-1]["val_loss"] is None


def test_loss_that_is_no_number_stops_the_run_before_it_is_saved():
    trainer, batches, windows = parts()
    with torch.no_grad():
        trainer.model.head.weight.fill_(math.inf)
    saved = []
    with pytest.raises(pg.UserError, match="smaller --lr"):
        trainer.run(batches, windows, stopped=lambda: False, save=lambda: saved.append(1), sample=lambda: None)
    assert not saved
