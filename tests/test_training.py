"""Learning."""

import copy
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import pg

MODEL = pg.ModelSettings(n_layer=2, n_head=2, n_embd=32, block_size=32)
VOCAB = pg.Vocabulary(pg.TokenSettings())
V = len(VOCAB.words)


def make_piece(length):
    """A piece that repeats itself; it need not be music."""
    ids = np.append(VOCAB.bos_id, np.arange(length - 1) * 7 % V).astype(np.int16)
    state = VOCAB.trace(ids)
    time = state.time.astype(np.int32)
    return pg.Piece(ids=ids, time=time, pitch=state.pitch.astype(np.int16))


LONG = pg.make_corpus([make_piece(500)])
MIXED = pg.make_corpus([make_piece(length) for length in (90, 30, 12, 20, 9)])  # most are padded
WINDOWS = pg.cut_all_windows(pg.make_corpus([make_piece(100)]), 32, 32, VOCAB)
NO_WINDOWS = pg.cut_all_windows(pg.make_corpus([]), 32, 32, VOCAB)


def make_trainer(bfloat16=False, compiled=False, **train):
    """A trainer of a small model."""
    defaults = {"steps": 24, "batch_size": 4, "warmup": 5, "eval_every": 8, "seed": 1}
    settings = pg.TrainSettings(**defaults | train)
    torch.manual_seed(settings.seed)
    model = pg.PianoGPT(MODEL, V, VOCAB.grid)
    return pg.Trainer(model, settings, bfloat16, compiled)


def batches_of(trainer, corpus=LONG):
    """The batches of a trainer over a corpus."""
    data = pg.DataSettings(transpose=2)
    return pg.Batches(corpus, VOCAB, pg.Settings(model=MODEL, train=trainer.settings, data=data))


def run(trainer, until=None, windows=WINDOWS, save=lambda: None):
    """Train to the end, or until a step; returns the trainer."""
    trainer.train(batches_of(trainer), windows, lambda: trainer.step == until, save)
    return trainer


def checkpoint_of(trainer):
    """A checkpoint of a trainer."""
    train = asdict(trainer.settings)
    settings = {"data": {}, "tokens": {}, "model": asdict(MODEL), "train": train}
    return pg.Checkpoint(
        about="",
        settings=settings,
        vocabulary=VOCAB.words,
        folder="",
        files=[],
        pieces=[],
        progress=pg.trainer_progress(trainer),
        tensors={"intervals": torch.zeros(0, dtype=torch.uint8)} | pg.trainer_tensors(trainer),
    )


def same(a, b):
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradient_of(model):
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_one_batch_can_be_overfitted():
    trainer = make_trainer(steps=30, lr=2e-3)
    batch = batches_of(trainer)[0]
    losses = [trainer.train_step(batch) for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert losses[-1] < 0.1


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path):
    path = tmp_path / "m.safetensors"
    short = {"steps": 12, "eval_every": 4}
    whole = run(make_trainer(**short))
    for stop in (1, 4, 7):
        pg.save_checkpoint(path, checkpoint_of(run(make_trainer(**short), until=stop)))
        resumed = make_trainer(seed=2)
        resumed.settings = whole.settings
        pg.resume(resumed, pg.load_checkpoint(path))
        assert same(pg.load_checkpoint(path).tensors, checkpoint_of(resumed).tensors)
        assert resumed.step == stop
        run(resumed)
        assert same(pg.trainer_tensors(resumed), pg.trainer_tensors(whole))
        one, other = ([row | {"seconds": 0} for row in t.history] for t in (resumed, whole))
        assert one == other
        assert len(one) == 3


def test_another_seed_gives_other_weights_and_the_same_seed_the_same():
    one, again, other = (run(make_trainer(seed=seed), until=1) for seed in (1, 1, 2))
    weights = pg.copy_weights(one.model)
    assert same(pg.copy_weights(again.model), weights)
    assert not same(pg.copy_weights(other.model), weights)


@pytest.fixture(params=[LONG, MIXED], ids=["full", "padded"])
def batch_and_gradient(request):
    """A batch of eight windows, its mean loss, and the gradient of that, computed at once."""
    trainer = make_trainer(batch_size=8)
    batch = batches_of(trainer, request.param)[0]
    total = trainer.model(batch)
    mean = total / (batch.targets != pg.IGNORE).sum()
    mean.backward()
    return batch, mean.item(), gradient_of(trainer.model)


@pytest.mark.parametrize(
    "accumulate, parts", [(1, [8]), (3, [3, 3, 2]), (4, [2] * 4), (9, [1] * 8)]
)
def test_batch_split_in_parts_has_the_gradient_of_the_whole(accumulate, parts, batch_and_gradient):
    batch, mean, gradient = batch_and_gradient
    trainer = make_trainer(batch_size=8, accumulate=accumulate)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0].idx)))
    assert trainer.add_gradients(batch) == pytest.approx(mean)
    assert torch.allclose(gradient_of(trainer.model), gradient, atol=1e-6)
    assert sizes == parts


def test_shares_of_the_ranks_add_up_to_the_whole(batch_and_gradient, monkeypatch):
    batch, mean, gradient = batch_and_gradient
    losses = []
    gradients = []
    for rank in range(2):
        trainer = make_trainer(batch_size=8)
        with monkeypatch.context() as patch:
            patch.setattr(pg, "PROCESSES", 2)
            patch.setattr(pg, "RANK", rank)
            losses.append(trainer.add_gradients(batch))
        gradients.append(gradient_of(trainer.model))
    assert sum(losses) == pytest.approx(mean)
    assert torch.allclose(sum(gradients) / 2, gradient, atol=1e-6), "they will be averaged"


def test_run_takes_every_batch_and_saves_as_often_as_asked(monkeypatch):
    drawn = []
    saved = []
    get_batch = pg.Batches.__getitem__

    def count(batches, i):
        drawn.append(i)
        return get_batch(batches, i)

    monkeypatch.setattr(pg.Batches, "__getitem__", count)
    trainer = make_trainer(save_every=7)
    run(trainer, save=lambda: saved.append(trainer.step))
    assert saved == [7, 14, 21]
    assert drawn == [*range(24)]
    assert [row["step"] for row in trainer.history] == [8, 16, 24]
    monkeypatch.setattr(pg, "SAVE_SECONDS", 0)
    trainer = make_trainer(steps=2)
    run(trainer, save=lambda: saved.append(trainer.step))
    assert saved[3:] == [1], "who called it saves the last state"


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    settings = pg.TrainSettings(steps=1000, warmup=100)
    rates = [pg.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == 1.0
    assert rates[-1] == pytest.approx(1 / 900)
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert pg.learning_rate(0, pg.TrainSettings(steps=10, warmup=0)) == 1.0


def test_step_takes_the_scheduled_rate_and_clips_the_gradient():
    trainer = make_trainer()
    torch.nn.init.normal_(trainer.model.head.weight, std=1.0)
    norms = []
    trainer.optimizer.step = lambda: norms.append(gradient_of(trainer.model).norm().item())
    trainer.train_step(batches_of(trainer)[0])
    assert norms == pytest.approx([1.0], rel=1e-3)
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["peak_lr"] / 4), "a fifth of 20 steps"
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("n_embd, inner", [(128, 336), (512, 1360)])
def test_matrices_alone_decay_and_their_rate_falls_with_the_fan_in(n_embd, inner):
    model = pg.PianoGPT(pg.ModelSettings(n_layer=1, n_embd=n_embd), V, VOCAB.grid)
    optimizer = pg.make_optimizer(model, pg.TrainSettings(lr=1.0, weight_decay=0.3))
    expected = {"head.weight": (2150 / n_embd, 0.3, False), "recent": (63, 0.0, False)}
    for name in ("embedding", "memory", "style"):
        expected[f"{name}.weight"] = (168, 0.0, False)
    for name in ("norm", "blocks.0.norm_1", "blocks.0.norm_2"):
        expected[f"{name}.weight"] = (63, 0.0, False)
    for name, fan_in in (
        ("qkv", n_embd),
        ("proj", n_embd),
        ("expand", n_embd),
        ("contract", inner),
    ):
        expected[f"blocks.0.{name}.weight"] = (94 / fan_in**0.5, 0.3, True)
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        [p] = group["params"]
        found[names[p]] = (group["peak_lr"], group["weight_decay"], group["orthogonal"])
    assert found == expected


def test_steps_are_those_of_adamw_and_in_the_blocks_orthogonal():
    trainer = make_trainer(lr=1e-3)
    plain = copy.deepcopy(trainer.model)
    groups = []
    for group, p in zip(trainer.optimizer.param_groups, plain.parameters(), strict=True):
        group["lr"] = group["peak_lr"]
        groups.append({"params": [p], "lr": group["lr"], "weight_decay": group["weight_decay"]})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    torch.manual_seed(0)
    for _ in range(5):
        size = 10.0 ** -torch.randint(2, 10, ()).item()  # some are as small as epsilon
        old = pg.copy_weights(trainer.model)
        for p, q in zip(trainer.model.parameters(), plain.parameters(), strict=True):
            p.grad = size * torch.randn(p.shape)
            q.grad = p.grad.clone()
        trainer.optimizer.step()
        adamw.step()
    theirs = dict(plain.named_parameters())
    groups = trainer.optimizer.param_groups
    for (name, p), group in zip(trainer.model.named_parameters(), groups, strict=True):
        if group["orthogonal"]:
            decay = 1 - group["lr"] * group["weight_decay"]
            step = (p.detach() - decay * old[name]) / group["lr"]
            values = torch.linalg.svdvals(step) / max(p.shape) ** 0.5
            # The smallest value of a random square matrix may be near 0, and stays below 1.
            assert values[-2] > 0.6, name
            assert values[0] < 1.25, name
            assert step.square().mean() ** 0.5 == pytest.approx(0.9, abs=0.2), "the rate"
            moved = adamw.state[theirs[name]]["exp_avg"]
            assert (step * moved).sum() < 0, "downhill"
        else:
            assert torch.allclose(p, theirs[name], rtol=1e-4, atol=1e-6), name


def test_orthogonalize_keeps_the_singular_vectors_and_makes_their_values_near_1():
    torch.manual_seed(0)
    matrices = [1e-3 * torch.randn(shape) for shape in ((20, 20), (20, 50), (50, 20))]
    for x, result in zip(matrices, pg.orthogonalize(matrices), strict=True):
        u, values, v = torch.linalg.svd(x, full_matrices=False)
        y = u.T @ result @ v.T
        assert (y - y.diag().diag()).abs().max() < 1e-3
        is_large = values > 0.01 * x.norm()
        assert is_large.sum() >= 18
        assert y.diag()[is_large].min() > 0.6
        assert y.diag().max() < 1.25


def test_stack_of_gram_matrices_gives_what_one_matrix_after_another_gives():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((128, 128), (128, 336), (672, 128))]
    for x, result in zip(matrices, pg.orthogonalize(matrices), strict=True):
        expected = x / x.norm()
        for _ in range(5):
            square = expected @ expected.mT
            polynomial = 2.0315 * square @ square - 4.775 * square
            expected = 3.4445 * expected + polynomial @ expected
        assert torch.allclose(result, expected, rtol=0, atol=1e-5)


def test_matrices_whose_shorter_sides_differ_are_made_orthogonal_too():
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (6, 9), (12, 8))]
    groups = [{"params": weights, "lr": 1.0, "orthogonal": True}]
    optimizer = pg.OrthogonalAdamW(groups)
    for p in weights:
        p.grad = torch.randn(p.shape)
    old = [p.detach().clone() for p in weights]
    optimizer.step()
    for p, before in zip(weights, old, strict=True):
        values = torch.linalg.svdvals(before - p.detach()) / max(p.shape) ** 0.5
        assert values[0] < 1.25
        assert values[-2] > 0.6


def test_orthogonal_step_of_nothing_is_nothing():
    [step] = pg.orthogonalize([torch.zeros(4, 6)])
    assert torch.equal(step, torch.zeros(4, 6))


def test_average_is_of_about_the_last_tenth_of_the_steps():
    trainer = make_trainer(steps=40)
    batches = batches_of(trainer)
    expected = torch.zeros(V, 32)
    for n in range(12):
        trainer.train_step(batches[n])
        expected.lerp_(trainer.model.head.weight.detach(), 10 / (10 + n))
    assert torch.allclose(trainer.average.head.weight, expected, atol=1e-6)
    share_of_last_half = 0.0
    for n in range(40):
        share_of_last_half += (float(n >= 20) - share_of_last_half) * 10 / (10 + n)
    assert share_of_last_half > 0.99


def test_average_that_validates_best_is_kept():
    trainer = run(make_trainer(steps=20, lr=3e-3))
    best = trainer.best
    row = trainer.best_row()
    assert same(best, pg.copy_weights(trainer.average))
    torch.nn.init.normal_(trainer.average.head.weight, std=0.3)
    trainer.validate(WINDOWS, VOCAB)
    assert trainer.history[-1]["val_loss"] > row["val_loss"]
    assert trainer.best_row() is row
    assert trainer.best is best


def test_run_without_validation_keeps_the_last_average():
    trainer = run(make_trainer(steps=12), windows=NO_WINDOWS)
    assert same(trainer.best, pg.copy_weights(trainer.average))
    assert trainer.best_row() is trainer.history[-1]
    assert ["val_loss" in row for row in trainer.history] == [False, False]


def test_average_before_the_first_validation_is_the_best_so_far():
    trainer = run(make_trainer(), until=3)
    resumed = make_trainer()
    pg.resume(resumed, checkpoint_of(trainer))
    run(resumed, until=6)
    assert not resumed.history
    best = checkpoint_of(resumed).weights("best")
    assert same(best, pg.copy_weights(resumed.average)), "not those of the step that was saved"


def test_validation_beats_any_row_without_one():
    trainer = make_trainer()
    trainer.history = [{"step": 8}, {"step": 16}]
    assert trainer.best_row()["step"] == 16
    trainer.history.append({"step": 24, "val_loss": 9.0})
    assert trainer.best_row()["step"] == 24


def test_validation_gives_the_loss_of_the_average_per_token_and_per_note():
    trainer = make_trainer()
    trainer.losses = [2.0, 4.0]
    torch.nn.init.normal_(trainer.average.head.weight, std=0.3)
    trainer.validate(WINDOWS, VOCAB)
    [row] = trainer.history
    total = pg.evaluate(trainer.average, WINDOWS, batch_size=1)
    notes = (VOCAB.says.kind[make_piece(100).ids[1:]] == pg.Kind.PITCH).sum()
    assert 0 < notes < 99
    assert row["train_loss"] == 3.0
    assert row["val_loss"] == pytest.approx(total / 99, rel=1e-5)
    assert row["val_nats_per_note"] == pytest.approx(total / notes, rel=1e-5)
    assert not trainer.losses, "the next row is of later steps"


def test_loss_that_is_no_number_stops_the_run_before_it_is_saved_or_learned():
    trainer = make_trainer(save_every=1)
    torch.nn.init.constant_(trainer.model.head.weight, math.inf)
    before = pg.trainer_tensors(trainer)
    saved = []
    with pytest.raises(pg.UserError, match="became nan after 0 steps: pass a smaller --lr"):
        run(trainer, save=lambda: saved.append(1))
    assert not saved
    assert same(pg.trainer_tensors(trainer), before)


def test_checkpoint_of_another_optimizer_is_refused_but_a_new_one_may_have_none():
    checkpoint = checkpoint_of(run(make_trainer(), until=1))
    checkpoint.progress["optimizer"] = "Adagrad"
    with pytest.raises(pg.UserError, match="with Adagrad, not OrthogonalAdamW: pass --fresh"):
        pg.resume(make_trainer(), checkpoint)
    checkpoint.progress["optimizer"] = ""
    pg.resume(make_trainer(), checkpoint)


def test_bfloat16_multiplies_in_bfloat16_and_learns():
    trainer = make_trainer(bfloat16=True, steps=20, lr=2e-3)
    batch = batches_of(trainer)[0]
    dtypes = set()
    for block in trainer.model.blocks:
        block.qkv.register_forward_hook(lambda m, inputs, out: dtypes.add(out.dtype))
    losses = [trainer.train_step(batch) for _ in range(20)]
    assert dtypes == {torch.bfloat16}
    assert losses[-1] < losses[0] / 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.average.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "compile, steps, works, expected",
    [
        (None, 100_000, True, True),
        (None, 100_000, False, False),
        (None, 100, True, False),
        (True, 1, False, True),
        (False, 100_000, True, False),
    ],
)
def test_long_runs_are_compiled_where_it_works(compile, steps, works, expected, monkeypatch):
    monkeypatch.setattr(pg, "compiler_works", lambda: works)
    settings = pg.Settings(program=pg.ProgramSettings(compile=compile))
    assert pg.choose_compiling(settings, torch.device("cpu"), steps) == expected
    if compile is None:
        assert not pg.choose_compiling(settings, torch.device("cuda"), steps), "not measured there"


def test_compiler_that_is_missing_is_noticed(monkeypatch):
    def fail(*args):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    assert not pg.compiler_works()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_runs_learn_like_an_eager_one_and_are_equal_bit_for_bit():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    eager = run(make_trainer(steps=4, eval_every=2))
    one = run(make_trainer(steps=4, eval_every=2, compiled=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "it was compiled"
    assert one.average.blocks[0]._compiled_call_impl is None, "validation is not compiled"
    assert one.history[-1]["val_loss"] == pytest.approx(eager.history[-1]["val_loss"], rel=1e-3)
    torch.compiler.reset()
    two = run(make_trainer(steps=4, eval_every=2, compiled=True))
    assert same(pg.trainer_tensors(one), pg.trainer_tensors(two))
