"""How fast PianoGPT is, beside the textbook version of the same model, on this machine.

    python tests/benchmark.py            everything; takes some minutes
    python tests/benchmark.py --quick    fewer rounds and no table
    python tests/benchmark.py --recipe DIR --minutes 10    how much better it learns than by the plain recipe

"Plain" is what most scripts do: one Linear for each head's query, key and value, float32, no compiling, and a
generation that reads the whole window again for every token. Every ratio is the median over rounds in which both run
in turn, as machines are shared and noisy. Prints key: value lines.
"""

import argparse
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from symusic import Score
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pianogpt as pg  # noqa: E402


class PlainHead(nn.Module):
    """One head of causal attention with matrices of its own."""

    def __init__(self, n_embd, hs, block_size):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n_embd, hs, bias=False) for _ in range(3))
        self.register_buffer("seen", torch.tril(torch.ones(block_size, block_size)), persistent=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, hs)."""
        T, k = x.size(1), self.k(x)
        scores = self.q(x) @ k.transpose(1, 2) * k.size(-1) ** -0.5  # (B, T, T)
        return scores.masked_fill(self.seen[:T, :T] == 0, -math.inf).softmax(-1) @ self.v(x)


class PlainAttention(nn.Module):
    """Heads side by side."""

    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.heads = nn.ModuleList(PlainHead(n_embd, n_embd // n_head, block_size) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


class Added(nn.Sequential):
    """x plus what layers make of it."""

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        return x + super().forward(x)


class PlainGPT(nn.Module):
    """The textbook model: learned positions, heads one by one."""

    def __init__(self, config, V):
        super().__init__()
        C, self.block_size, blocks = config.n_embd, config.block_size, []
        for _ in range(config.n_layer):
            blocks += [Added(nn.LayerNorm(C), PlainAttention(C, config.n_head, config.block_size)),
                       Added(nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))]
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(config.block_size, C)
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(C), nn.Linear(C, V))

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V)."""
        return self.blocks(self.token(idx) + self.position(torch.arange(idx.size(1), device=idx.device)))


def plain_stepper(config, V, batch):
    """A function that trains the plain model by one step; batch (2, B, T) is inputs and targets."""
    model = PlainGPT(config, V).to(batch.device)
    optimizer, (x, y) = torch.optim.AdamW(model.parameters(), lr=3e-4), batch

    def step():
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_trainer(config, vocab, device, **run):
    """A new trainer, in the precision and compiled or not, as pianogpt.py makes it with these flags."""
    return pg.make_trainer(replace(config, run=pg.RunConfig(**run)), None, {}, vocab, device)


def our_stepper(model, vocab, batch, **run):
    """A function that trains PianoGPT by one step."""
    trainer = make_trainer(pg.Options(model=model), vocab, batch.device, **run)
    x, y = F.pad(batch[0], (pg.MEMORY, 0)), batch[1]
    return lambda: trainer.train_step(x, y)


def plain_tokens(model, idx):
    """Yield token after token, the whole window read for each."""
    while True:
        p = model(idx[:, -model.block_size :])[:, -1].softmax(-1)
        idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        yield idx[:, -1]


def our_tokens(model, vocab, B, seed=0):
    """Yield token after token of B sequences that never end."""
    device = model.head.device
    ids, hold = torch.full((B, 1), vocab.bos, device=device), torch.full((B,), -math.inf, device=device)
    return pg.draw_tokens(model, vocab, pg.SampleConfig(), ids, seed, hold)


def seconds(work, times=1):
    """How long one work() takes, on average over `times`."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def compare(rounds, works, times=1):
    """[{name: seconds} for each round] of works, which run in turn, each `times` times; the first round is left out."""
    return [{name: seconds(work, times) for name, work in works.items()} for _ in range(1 + rounds)][1:]


def measure_training(vocab, device, rounds):
    """Training tokens/s of both, in the precision this machine is best at and in float32."""
    config, V, B = pg.ModelConfig(), len(vocab.words), pg.TrainConfig().batch_size
    batch = torch.randint(V, (2, B, config.block_size), device=device)
    works = {"plain": plain_stepper(config, V, batch)}
    for name, float32, compiled in (("fast", False, True), ("eager", False, False), ("float32", True, True)):
        works[name] = our_stepper(config, vocab, batch, float32=float32, compile=compiled)
    rows, tokens = compare(rounds, works, times=3), B * config.block_size
    bfloat16 = make_trainer(pg.Options(), vocab, device).bfloat16
    out = {"train_precision": ("float32", "bfloat16")[bfloat16] + " compiled"}
    out |= {f"train_tokens_per_second_{name}": round(tokens / median(row[name] for row in rows)) for name in works}
    for end, name in (("", "fast"), ("_eager", "eager"), ("_float32", "float32")):
        out[f"train_speedup{end}"] = median(row["plain"] / row[name] for row in rows)
    return out


@torch.no_grad()
def measure_generation(vocab, device, rounds):
    """Tokens/s of one sequence and of 32, beside plain's one, once their windows are full; what a late token costs."""
    config, V = pg.ModelConfig(), len(vocab.words)
    size, model = config.block_size, pg.PianoGPT(config, vocab.says).to(device)
    plain = plain_tokens(PlainGPT(config, V).to(device), torch.randint(V, (1, size), device=device))
    one, many = our_tokens(model, vocab, 1), our_tokens(model, vocab, 32)
    rows = compare(rounds, {"plain": lambda: list(islice(plain, 16)), "one": lambda: list(islice(one, size)),
                            "many": lambda: list(islice(many, size))})
    rates = [{"_plain": 16 / row["plain"], "": size / row["one"], "_32": 32 * size / row["many"]} for row in rows]
    streams = [our_tokens(model, vocab, 1, seed=1) for _ in range(2)]
    each = [[seconds(lambda: next(stream)) for _ in range(5256)] for stream in streams]
    out = {f"generate_tokens_per_second{end}": round(median(rate[end] for rate in rates)) for end in rates[0]}
    return out | {"generate_speedup": median(rate[""] / rate["_plain"] for rate in rates),
                  "generate_batch_speedup": median(rate["_32"] / rate["_plain"] for rate in rates),
                  "late_token_ratio": min(sum(times[5000:]) / sum(times[256:512]) for times in each)}


def measure_reading(vocab, files):
    """Files/s of the worker processes beside one process, and a second start on a cached folder."""
    sources = sorted((ROOT / "my_midis").glob("*.mid"))
    with tempfile.TemporaryDirectory() as work:
        paths, ratios = [Path(work, f"midi/{i:04d}.mid") for i in range(files)], []
        paths[0].parent.mkdir()
        for i, path in enumerate(paths):  # all different: the later ones are transposed
            Score(sources[i % len(sources)]).shift_pitch(i // len(sources)).dump_midi(path)
        for _ in range(3):
            one = seconds(lambda: [pg.read_piece(path, vocab) for path in paths[:300]]) / min(300, files)
            ratios.append(one / (seconds(lambda: list(pg.read_in_workers(paths, vocab))) / files))
        command = [sys.executable, ROOT / "pianogpt.py", *"--midi-dir midi --steps 1 --val-percent 0 --fresh".split()]
        starts = [seconds(lambda: subprocess.run(command, cwd=work, check=True, capture_output=True)) for _ in range(4)]
    return {"tokenize_speedup": median(ratios), "tokenize_files": files, "warm_start_seconds": median(starts[1:]),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)}


def measure_growth(vocab, device):
    """A table: tokens/s of training and of generating one sequence, and the fraction of the matrix-product peak."""
    n, V = 2048 if device.type == "cpu" else 8192, len(vocab.words)
    bfloat16 = make_trainer(pg.Options(), vocab, device).bfloat16
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    peak = 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))
    print(f"matrix_product_tflops: {peak / 1e12:.2f}\nn_embd  block_size  train_tok/s  share_of_peak  generate_tok/s")
    for n_embd, block_size in product((128, 256, 512), (256, 1024)):
        config = pg.ModelConfig(n_embd=n_embd, block_size=block_size)
        batch = torch.randint(V, (2, 4096 // block_size, block_size), device=device)
        step = our_stepper(config, vocab, batch)
        taken = median([seconds(step) for _ in range(4)][1:])
        model = pg.PianoGPT(config, vocab.says).to(device)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - V * n_embd
        # 2 for a product and a sum, 3 for forward and the two gradients; the causal half of the attention scores
        share = 6 * 4096 * (matrices + config.n_layer * block_size * n_embd) / taken / peak
        stream = our_tokens(model, vocab, 1)
        next(stream)
        rate = 256 / seconds(lambda: list(islice(stream, 256)))
        print(f"{n_embd:6}  {block_size:10}  {4096 / taken:11.0f}  {share:13.2f}  {rate:14.0f}", flush=True)


class PlainRecipe(pg.PianoGPT):
    """The same blocks with learned positions instead of musical time, and nothing that mixes neighbors before them."""

    def __init__(self, config, says):
        super().__init__(config, says)
        self.positions = nn.Parameter(0.02 * torch.randn(config.block_size, config.n_embd))
        self.recent.requires_grad_(False), self.memory.requires_grad_(False)  # not used

    def embed(self, idx, cache=None):
        """idx (B, MEMORY + T) -> embeddings (B, T, C), and the cos and sin (B, 1, T, 1) of no angle: nothing rotates."""
        idx = idx[:, pg.MEMORY :]
        dtype = torch.bfloat16 if torch.is_autocast_enabled(idx.device.type) else torch.float32
        cos = torch.ones(len(idx), 1, idx.size(1), 1, dtype=dtype, device=idx.device)
        return F.embedding(idx, self.embedding), cos, torch.zeros_like(cos)

    def logits(self, x, cos, sin, cache=None):
        """What embed() gave -> the logits of the next id, (B, T, V)."""
        B, T, C = x.shape
        x = (x + self.positions[:T]).view(B * T, C)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(F.layer_norm(x, (C,), self.norm), self.head).view(B, T, -1)


class PlainTrainer(pg.Trainer):
    """A trainer whose AdamW takes its own steps, and whose weights are measured as they are."""

    def update(self, fraction):
        """Move the weights."""
        self.average = self.model
        self.optimizer.step()
        self.optimizer.zero_grad()


def train_for(minutes, trainer, batches, windows, falling):
    """[(seconds, nats per note)]: twenty validations, which cost no time, in so many minutes; falling: plan for them."""
    state, curve = trainer.state(), []  # the first steps compile, and are taken back
    taken = mean([seconds(lambda: trainer.train_step(*batches[n])) for n in range(100)][20:])
    trainer.load_state(state)
    if falling:
        trainer.config.steps = int(0.95 * 60 * minutes / taken)  # so that the learning rate falls to the end
    while trainer.step < trainer.config.steps and trainer.seconds < 60 * minutes:
        trainer.seconds += seconds(lambda: trainer.train_step(*batches[trainer.step]))
        if trainer.seconds >= 3 * minutes * (len(curve) + 1) or trainer.step == trainer.config.steps:
            trainer.validate(windows, batches)
            curve.append((trainer.seconds, trainer.history[-1]["val_nats_per_note"]))
    return curve


def seconds_to(loss, curve):
    """When a curve of (seconds, loss) first reaches a loss, on straight lines between its points; NaN if never."""
    for (start, high), (end, low) in pairwise([(0.0, math.inf), *curve]):
        if low <= loss:
            return end if math.isinf(high) else start + (end - start) * (high - loss) / (high - low)
    return math.nan


def measure_recipe(vocab, folder, minutes, device):
    """Held-out nats per note after the same minutes by the plain recipe and by ours."""
    config = pg.Options(run=pg.RunConfig(midi_dir=folder), data=pg.DataConfig(piece_is_folder=True))
    ids, windows, _ = pg.prepare_data(config, vocab)
    batches = pg.Batches(ids.to(device), vocab, config)
    ours = make_trainer(config, vocab, device, compile=True)
    torch.manual_seed(0)
    model = PlainRecipe(config.model, vocab.says).to(device)
    constant = pg.TrainConfig(steps=10**9, warmup=0)  # so early in its fall, the learning rate stands still
    plain = PlainTrainer(model, constant, ours.bfloat16, compiled=True)
    plain.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    untransposed = replace(batches, options=replace(config, data=replace(config.data, transpose=0)))
    slow = train_for(minutes, plain, untransposed, windows, falling=False)
    curve = train_for(minutes, ours, batches, windows, falling=True)
    print("seconds  plain_nats_per_note  nats_per_note")
    for (second, plain_loss), (_, loss) in zip(slow, curve):
        print(f"{second:7.0f}  {plain_loss:19.4f}  {loss:13.4f}")
    return {"minutes_each": minutes, "batch_size": config.train.batch_size, "plain_steps": plain.step,
            "plain_nats_per_note": slow[-1][1], "steps": ours.step, "steps_planned": config.train.steps,
            "nats_per_note": curve[-1][1], "gain_nats_per_note": slow[-1][1] - curve[-1][1],
            "seconds_to_plain_nats_per_note": seconds_to(slow[-1][1], curve)}


def machine(device):
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return {"machine": name, "cores": os.cpu_count(), "torch": torch.__version__}


def main():
    """Measure, and print key: value lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no table")
    parser.add_argument("--device", default="auto", help="as of pianogpt.py")
    parser.add_argument("--recipe", metavar="DIR", help="train both ways on this folder, where each folder is a work")
    parser.add_argument("--minutes", type=float, default=10, help="of training for each of the two")
    args = parser.parse_args()
    device, vocab, rounds = pg.choose_device(args.device), pg.Vocabulary(pg.MusicConfig()), 3 if args.quick else 9
    pg.print_block(machine(device))
    if args.recipe:
        return pg.print_block(measure_recipe(vocab, args.recipe, args.minutes, device))
    pg.print_block(measure_training(vocab, device, rounds))
    pg.print_block(measure_generation(vocab, device, rounds))
    pg.print_block(measure_reading(vocab, 100 if args.quick else 1000))
    if not args.quick:
        measure_growth(vocab, device)


if __name__ == "__main__":
    main()
