"""How fast PianoGPT is, beside the textbook version of the same model, on this machine.

    python tests/benchmark.py            all of it, some minutes
    python tests/benchmark.py --quick    fewer rounds and no table, under a minute
    python tests/benchmark.py --recipe DIR --minutes 10    how much better the same model learns than by the plain recipe

"Plain" is what most scripts do: one Linear for each head's query, key and value, float32, no compiling, and in generation
the whole window read again for every token. Every ratio is the median over rounds in which the two run in turn, because
machines are shared and noisy. Prints key: value lines.
"""

import argparse
import dataclasses
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
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


class PlainBlock(nn.Module):
    """Attention and a two-layer perceptron, each added to its input."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.attention = PlainAttention(C, config.n_head, config.block_size)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class PlainGPT(nn.Module):
    """The textbook model: learned positions, heads one by one."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.block_size = config.block_size
        self.token = nn.Embedding(vocab_size, config.n_embd)
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.n_layer)))
        self.norm, self.head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, vocab_size)

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V)."""
        x = self.token(idx) + self.position(torch.arange(idx.size(1), device=idx.device))
        return self.head(self.norm(self.blocks(x)))


def plain_stepper(config, V, batch, device):
    """A function that trains the plain model by one step."""
    model = PlainGPT(config, V).to(device)
    optimizer, (x, y) = torch.optim.AdamW(model.parameters(), lr=3e-4), batch

    def step():
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_model(config, device):
    """A new PianoGPT for the default tokenizer."""
    return pg.make_model(config, pg.make_tokenizer(pg.MusicConfig())).to(device)


def our_stepper(config, batch, bfloat16, compiled):
    """A function that trains PianoGPT by one step."""
    trainer = pg.Trainer(our_model(config, batch[0].device).train(), pg.TrainConfig(), bfloat16, compiled)
    return lambda: trainer.train_step(*batch)


def plain_tokens(model, idx):
    """Yield token after token, the whole window read for each."""
    while True:
        p = model(idx[:, -model.block_size :])[:, -1].softmax(-1)
        idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        yield idx[:, -1]


def seconds(work, times=1):
    """How long work() takes, `times` times."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(rounds, **works):
    """{name: [seconds of each round]} of works (function, times) that run in turn."""
    for work, _ in works.values():
        work()
        work()
    taken = {name: [] for name in works}
    for _ in range(rounds):
        for name, (work, times) in works.items():
            taken[name].append(seconds(work, times) / times)
    return taken


def ratio(taken, slow, fast):
    """The median over the rounds of how many times longer slow takes than fast."""
    return statistics.median(a / b for a, b in zip(taken[slow], taken[fast]))


def measure_training(device, rounds):
    """Training tokens/s of both, in the precision this machine is best at and in float32."""
    config, V, B = pg.ModelConfig(), 377, pg.TrainConfig().batch_size
    batch = tuple(torch.randint(V, (B, config.block_size), device=device) for _ in range(2))
    bfloat16, compiled = pg.choose_speed(pg.RunConfig(), device, steps=10**6)
    works = {
        "plain": (plain_stepper(config, V, batch, device), 3),
        "fast": (our_stepper(config, batch, bfloat16, compiled), 3),
        "eager": (our_stepper(config, batch, bfloat16, False), 3),
        "float32": (our_stepper(config, batch, False, compiled), 3),
    }
    taken, tokens = compare(rounds, **works), B * config.block_size
    out = {"train_precision": ("bfloat16" if bfloat16 else "float32") + (" compiled" if compiled else "")}
    out |= {f"train_tokens_per_second_{name}": round(tokens / statistics.median(t)) for name, t in taken.items()}
    return out | {
        "train_speedup": ratio(taken, "plain", "fast"),
        "train_speedup_eager": ratio(taken, "plain", "eager"),
        "train_speedup_float32": ratio(taken, "plain", "float32"),
    }


@torch.no_grad()
def measure_generation(device, rounds):
    """Tokens/s of one sequence and of 32, beside plain's one, each once its window is full; and what a late token costs."""
    config, grammar, settings = pg.ModelConfig(), pg.make_grammar(pg.make_tokenizer(pg.MusicConfig())), pg.SampleConfig()
    V = grammar.rows.shape[1]
    plain, model = PlainGPT(config, V).to(device).eval(), our_model(config, device).eval()

    def ours(B):
        ids = torch.full((B, 1), grammar.bos, device=device)
        stream = pg.draw_tokens(model, grammar, settings, ids, seed=0, wait=-math.inf)
        list(islice(stream, config.block_size))
        return lambda: list(islice(stream, config.block_size)), config.block_size

    stream = plain_tokens(plain, torch.randint(V, (1, config.block_size), device=device))
    per_token = {"plain": (lambda: list(islice(stream, 16)), 16), "one": ours(1), "many": ours(32)}
    taken = compare(rounds, **{name: (work, 1) for name, (work, _) in per_token.items()})
    taken = {name: [t / per_token[name][1] for t in times] for name, times in taken.items()}
    late = []
    for _ in range(2):
        stream = pg.draw_tokens(model, grammar, settings, torch.full((1, 1), grammar.bos, device=device), seed=1, wait=-math.inf)
        early = [seconds(lambda: next(stream)) for _ in range(5256)]
        late.append(sum(early[5000:5256]) / sum(early[256:512]))
    return {
        "generate_tokens_per_second_plain": round(1 / statistics.median(taken["plain"])),
        "generate_tokens_per_second": round(1 / statistics.median(taken["one"])),
        "generate_tokens_per_second_32": round(32 / statistics.median(taken["many"])),
        "generate_speedup": ratio(taken, "plain", "one"),
        "generate_batch_speedup": 32 * ratio(taken, "plain", "many"),
        "late_token_ratio": min(late),
    }


def copies(folder, count):
    """A folder of `count` different files made of the starter corpus, each a semitone or more from its source."""
    from symusic import Score

    sources = sorted((ROOT / "my_midis").glob("*.mid"))
    for i in range(count):
        Score(sources[i % len(sources)]).shift_pitch(i // len(sources)).dump_midi(folder / f"{i:04d}.mid")


def measure_reading(files):
    """Files/s of the worker processes beside one process, and a second start on a cached folder."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "midi")
        folder.mkdir()
        copies(folder, files)
        paths, music = sorted(folder.iterdir()), pg.MusicConfig()
        tokenizer, ratios = pg.make_tokenizer(music), []
        for _ in range(3):
            one = seconds(lambda: [pg.encode_file(p, tokenizer, music) for p in paths[:300]]) / min(300, files)
            all_cores = seconds(lambda: list(pg.encode_in_workers(paths, music))) / files
            ratios.append(one / all_cores)
        command = [
            sys.executable,
            str(ROOT / "pianogpt.py"),
            "--midi-dir",
            str(folder),
            "--steps",
            "1",
            "--val-percent",
            "0",
        ]
        starts = []
        for _ in range(4):
            starts.append(
                seconds(lambda: subprocess.run([*command, "--fresh"], cwd=work, check=True, capture_output=True))
            )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "tokenize_speedup": statistics.median(ratios),
        "tokenize_files": files,
        "warm_start_seconds": statistics.median(starts[1:]),
        "peak_memory_mb": round(peak),
    }


def measure_growth(device):
    """A table: tokens/s of training and of generating one sequence, and the share of the matrix-product peak."""
    n = 2048 if device.type == "cpu" else 8192
    bfloat16, _ = pg.choose_speed(pg.RunConfig(), device, 1)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    peak = 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))
    print(f"matrix_product_tflops: {peak / 1e12:.2f}")
    print("n_embd  block_size  train_tok/s  share_of_peak  generate_tok/s")
    grammar = pg.make_grammar(pg.make_tokenizer(pg.MusicConfig()))
    V = grammar.rows.shape[1]
    for n_embd in (128, 256, 512):
        for block_size in (256, 1024):
            config, B = pg.ModelConfig(n_embd=n_embd, block_size=block_size), 4096 // block_size
            batch = tuple(torch.randint(V, (B, block_size), device=device) for _ in range(2))
            step = our_stepper(config, batch, bfloat16, False)
            step()
            taken = statistics.median(seconds(step) for _ in range(3))
            model = our_model(config, device).eval()
            matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - V * n_embd
            # 2 for a product and a sum, 3 for forward and the two gradients; the causal half of the attention scores
            flops = 6 * 4096 * (matrices + config.n_layer * block_size * n_embd)
            ids = torch.full((1, 1), grammar.bos, device=device)
            stream = pg.draw_tokens(model, grammar, pg.SampleConfig(), ids, seed=0, wait=-math.inf)
            next(stream)
            rate = 256 / seconds(lambda: list(islice(stream, 256)))
            print(
                f"{n_embd:6}  {block_size:10}  {4096 / taken:11.0f}  {flops / taken / peak:13.2f}  {rate:14.0f}",
                flush=True,
            )


class PlainRecipe(pg.PianoGPT):
    """The same blocks with learned positions instead of musical time, and nothing that mixes neighbours before them."""

    def __init__(self, config, clock):
        super().__init__(config, clock)
        self.positions = nn.Parameter(0.02 * torch.randn(config.block_size, config.n_embd))
        self.recent.requires_grad_(False)

    def turn(self, idx):
        """The cos and sin, (2, 1), of no angle: nothing turns."""
        return torch.tensor([[1.0], [0.0]], device=idx.device)

    def hidden(self, x, turn):
        """Embedded tokens (B, T, C) -> (B, T, C)."""
        x = x + self.positions[: x.size(1)]
        for block in self.blocks:
            x = block(x, *turn)
        return self.norm(x)


def plain_trainer(model, speed):
    """A trainer of the plain recipe: AdamW at a constant 3e-4 on everything."""
    endless = pg.TrainConfig(steps=10**9, warmup=0)  # so early in its fall, the rate is constant
    trainer = pg.Trainer(model, endless, *speed)
    groups = [{"params": list(model.parameters()), "peak": 3e-4}]
    trainer.optimizers = [torch.optim.AdamW(groups, lr=3e-4, fused=True)]
    return trainer


def step_seconds(trainer, batches):
    """How long a step takes once the trainer is compiled, which then stands where it stood before."""
    state = trainer.state()
    taken = [seconds(lambda: trainer.train_step(*batches[n])) for n in range(100)]
    trainer.load_state(state)
    return statistics.mean(taken[20:])


def train_for(trainer, batches, windows, minutes):
    """Train for so many minutes; validation in nats a note, and the steps that it took."""
    start = time.perf_counter()
    while trainer.step < trainer.config.steps and time.perf_counter() - start < 60 * minutes:
        trainer.train_step(*batches[trainer.step])
    trainer.validate(windows, batches)
    return trainer.history[-1]["val_nats_per_note"], trainer.step


def measure_recipe(folder, minutes, optimizer, device):
    """Held-out nats a note after the same minutes by the plain recipe and by ours; compiling is paid before, by both."""
    config = pg.Config(data=pg.DataConfig(midi_dir=folder, piece_is_folder=True))
    config.train.optimizer = optimizer
    tokenizer = pg.make_tokenizer(config.music)
    table, speed = torch.from_numpy(pg.make_map(tokenizer)), pg.choose_speed(config.run, device, steps=10**6)
    batches, windows = pg.prepare_data(config, tokenizer, device, 0, 1)

    torch.manual_seed(0)
    plain = plain_trainer(PlainRecipe(config.model, table).to(device).train(), speed)
    as_written = dataclasses.replace(batches, transpose=0)
    step_seconds(plain, as_written)
    plain_loss, plain_steps = train_for(plain, as_written, windows, minutes)

    torch.manual_seed(0)
    ours = pg.Trainer(pg.PianoGPT(config.model, table).to(device).train(), config.train, *speed)
    config.train.steps = int(0.95 * 60 * minutes / step_seconds(ours, batches))  # so that its rate falls to the end
    loss, steps = train_for(ours, batches, windows, minutes)
    return {
        "minutes_each": minutes,
        "batch_size": batches.batch_size,
        "plain_steps": plain_steps,
        "plain_nats_per_note": plain_loss,
        "steps": steps,
        "steps_planned": config.train.steps,
        "nats_per_note": loss,
        "gain_nats_per_note": plain_loss - loss,
    }


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
    parser.add_argument(
        "--recipe", metavar="DIR", help="train on this folder, where each folder is a work, in both ways"
    )
    parser.add_argument("--minutes", type=float, default=10, help="of training for each of the two")
    parser.add_argument("--optimizer", default="adamw", help="of ours: adamw or muon")
    args = parser.parse_args()
    device = pg.choose_device(args.device)
    if args.recipe:
        pg.print_block(machine(device) | measure_recipe(args.recipe, args.minutes, args.optimizer, device))
        return
    for values in (
        lambda: machine(device),
        lambda: measure_training(device, 3 if args.quick else 9),
        lambda: measure_generation(device, 3 if args.quick else 9),
        lambda: measure_reading(100 if args.quick else 1000),
    ):
        pg.print_block(values())
    if not args.quick:
        measure_growth(device)


if __name__ == "__main__":
    main()
