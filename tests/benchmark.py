"""How fast PianoGPT is and how well it learns, beside the textbook way, on this machine.

    python tests/benchmark.py            speed; takes some minutes
    python tests/benchmark.py --quick    fewer rounds and no table

    python tests/benchmark.py --recipe DIR --minutes 10
        held-out nats per note after the same minutes of training by a plain recipe and by ours
    python tests/benchmark.py --recipe DIR --minutes 10 --tuned
        and by the plain recipe with the learning rate tuned: 20 minutes more
    python tests/benchmark.py --optimizers DIR --minutes 10
        our optimizer and torch.optim.Muon, at three rates: 40 minutes in all
    python tests/benchmark.py --recipe DIR --minutes 4 --peers DIR_OF_NANOGPT
        and nanoGPT's model by its recipe for small models, on the same tokens; speed beside
        nanoGPT, and beside GPT-2 and Llama of Hugging Face if transformers is installed
    python tests/benchmark.py --scale 1000 10000 100000
        seconds and memory of folders of so many small files: reading, joining recordings, the
        first batch, and a second start; 100,000 files take 20 minutes

"Plain" speed is that of most scripts: one Linear for each head's query, key and value, float32, no
compiling, and a generation that reads the whole window again for every token. Every ratio is the
median over rounds in which both run in turn, as machines are shared and noisy. Prints key: value
lines.

All that is trained on DIR is compiled, has the same blocks, sizes, batch size, precision, clipped
gradients, held-out windows and seconds of training, and is measured twenty times; its lowest loss
counts. The plain recipe has learned positions instead of musical time, no recent tokens, no
memory, no transposition, no averaged weights, and AdamW at a constant rate of 3e-4. Tuned, it has
warmup, cosine decay to the end of its minutes, and the better of the rates 1e-3 and 3e-3.
"""

import argparse
import itertools
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from symusic import Score
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pianogpt as pg  # noqa: E402

# ---- Speed


class PlainHead(nn.Module):
    """One head of causal attention with matrices of its own."""

    def __init__(self, n_embd: int, hs: int, block_size: int):
        super().__init__()
        self.q = nn.Linear(n_embd, hs, bias=False)
        self.k = nn.Linear(n_embd, hs, bias=False)
        self.v = nn.Linear(n_embd, hs, bias=False)
        past = torch.tril(torch.ones(block_size, block_size, dtype=torch.bool))
        self.register_buffer("past", past, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, hs)."""
        T = x.size(1)
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(1, 2) * k.size(-1) ** -0.5  # (B, T, T)
        return scores.masked_fill(~self.past[:T, :T], -math.inf).softmax(-1) @ v


class PlainAttention(nn.Module):
    """Heads side by side."""

    def __init__(self, sizes: pg.ModelSettings):
        super().__init__()
        C = sizes.n_embd
        hs = C // sizes.n_head
        self.heads = nn.ModuleList(PlainHead(C, hs, sizes.block_size) for _ in range(sizes.n_head))
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


class Residual(nn.Sequential):
    """x plus what layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return x + super().forward(x)


class PlainGPT(nn.Module):
    """The textbook model: learned positions, heads one by one."""

    def __init__(self, sizes: pg.ModelSettings, vocab_size: int):
        super().__init__()
        C = sizes.n_embd
        self.block_size = sizes.block_size
        self.token = nn.Embedding(vocab_size, C)
        self.position = nn.Embedding(sizes.block_size, C)
        layers = []
        for _ in range(sizes.n_layer):
            feed_forward = (nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))
            layers.append(Residual(nn.LayerNorm(C), PlainAttention(sizes)))
            layers.append(Residual(nn.LayerNorm(C), *feed_forward))
        self.layers = nn.Sequential(*layers, nn.LayerNorm(C), nn.Linear(C, vocab_size))

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> logits (B, T, V)."""
        positions = self.position(torch.arange(idx.size(1), device=idx.device))
        return self.layers(self.token(idx) + positions)


def random_window(sizes: pg.ModelSettings, V: int, B: int, device: torch.device) -> pg.Window:
    """A batch to train on, of random tokens."""
    T = sizes.block_size
    return pg.Window(
        idx=torch.randint(V, (B, T)),
        time=torch.arange(T).float().repeat(B, 1),
        pitch=torch.randint(pg.LOWEST_KEY, pg.HIGHEST_KEY + 1, (B, T)).float(),
        recent=torch.randint(V, (B, pg.RECENT)),
        before=torch.full((B, V), 1 / V),
        style=torch.zeros(B, dtype=torch.long),
        targets=torch.randint(V, (B, T)),
    ).to(device)


def plain_stepper(sizes: pg.ModelSettings, V: int, batch: pg.Window) -> Callable[[], float]:
    """A function that trains the plain model by one step."""
    model = PlainGPT(sizes, V).to(batch.idx.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> float:
        logits = model(batch.idx)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_stepper(
    sizes: pg.ModelSettings, vocab: pg.Vocabulary, batch: pg.Window, **program
) -> Callable[[], float]:
    """A function that trains PianoGPT by one step; program: settings, as --float32."""
    settings = pg.Settings(program=pg.ProgramSettings(**program), model=sizes)
    trainer = pg.make_trainer(settings, vocab, batch.idx.device)
    return partial(trainer.train_step, batch)


def plain_tokens(model: PlainGPT, idx: Tensor) -> Iterator[Tensor]:
    """Yield token after token, the whole window read for each."""
    while True:
        p = model(idx[:, -model.block_size :])[:, -1].softmax(-1)
        idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        yield idx[:, -1]


def our_tokens(model: pg.PianoGPT, vocab: pg.Vocabulary, B: int) -> Iterator[np.ndarray]:
    """Yield token after token of B sequences that never end."""
    writing = pg.Writing(model, vocab, np.array([vocab.bos_id]), B)
    sample = pg.SampleSettings(bars=10**6)
    none = np.empty(0, int)
    request = pg.Request(vocab, sample, none, 0, np.empty(0, int), writing.tonic_chords())
    rng = np.random.default_rng(0)
    while True:
        logits = writing.next_logits()
        for rule in pg.RULES:
            logits = rule(logits, writing.state, request)
        ids = pg.draw(logits, False, rng)
        writing.append(ids)
        yield ids


def take(n: int, stream: Iterator) -> None:
    """Draw n tokens."""
    for _ in range(n):
        next(stream)


def take_ours(n: int, stream: Iterator, B: int) -> None:
    """Draw n tokens of B sequences with as many threads as pianogpt.py uses."""
    with pg.few_threads(B):
        take(n, stream)


def wait_for_device() -> None:
    """Return when a GPU has done all that it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable, times: int = 1) -> float:
    """How long one work() takes, on average over `times`."""
    wait_for_device()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait_for_device()
    return (time.perf_counter() - start) / times


def compare(rounds: int, works: dict[str, Callable], times: int = 1) -> list[dict[str, float]]:
    """{name: seconds} of works that run in turn, for each round but the first, which warms up."""
    rows = []
    for _ in range(1 + rounds):
        rows.append({name: seconds(work, times) for name, work in works.items()})
    return rows[1:]


def uses_bfloat16(vocab: pg.Vocabulary, device: torch.device) -> bool:
    """Whether pianogpt.py trains in bfloat16 on a device."""
    return pg.make_trainer(pg.Settings(), vocab, device).bfloat16


def measure_training(vocab: pg.Vocabulary, device: torch.device, rounds: int) -> dict:
    """Training tokens/s of both, in the precision this machine is best at and in float32."""
    sizes = pg.ModelSettings()
    V = len(vocab.words)
    B = pg.TrainSettings.batch_size
    batch = random_window(sizes, V, B, device)
    works = {
        "plain": plain_stepper(sizes, V, batch),
        "fast": our_stepper(sizes, vocab, batch, compile=True),
        "eager": our_stepper(sizes, vocab, batch, compile=False),
        "float32": our_stepper(sizes, vocab, batch, compile=True, float32=True),
    }
    rows = compare(rounds, works, times=3)
    precision = "bfloat16" if uses_bfloat16(vocab, device) else "float32"
    out = {"train_precision": f"{precision} compiled"}
    for name in works:
        taken = median(row[name] for row in rows)
        out[f"train_tokens_per_second_{name}"] = round(B * sizes.block_size / taken)
    for end, name in (("", "fast"), ("_eager", "eager"), ("_float32", "float32")):
        out[f"train_speedup{end}"] = median(row["plain"] / row[name] for row in rows)
    return out


@torch.inference_mode()
def measure_generation(vocab: pg.Vocabulary, device: torch.device, rounds: int) -> dict:
    """Tokens/s of one sequence and of 32, beside plain's one, and what a late token costs.

    The windows are full; late: after 5,000 tokens.
    """
    sizes = pg.ModelSettings()
    V = len(vocab.words)
    T = sizes.block_size
    model = pg.PianoGPT(sizes, V, vocab.grid).to(device)
    plain_model = PlainGPT(sizes, V).to(device)
    plain = plain_tokens(plain_model, torch.randint(V, (1, T), device=device))
    works = {
        "plain": partial(take, 16, plain),
        "one": partial(take_ours, T, our_tokens(model, vocab, 1), 1),
        "many": partial(take_ours, T, our_tokens(model, vocab, 32), 32),
    }
    rates = []
    for row in compare(rounds, works):
        plain_rate = 16 / row["plain"]
        one = T / row["one"]
        many = 32 * T / row["many"]
        rates.append((plain_rate, one, many, one / plain_rate, many / plain_rate))
    plain_rate, one, many, speedup, batch_speedup = (median(x) for x in zip(*rates, strict=True))
    late_ratios = []
    for _ in range(2):
        stream = our_tokens(model, vocab, 1)
        times = [seconds(partial(next, stream)) for _ in range(5256)]
        late_ratios.append(sum(times[5000:]) / sum(times[256:512]))
    return {
        "generate_tokens_per_second_plain": round(plain_rate),
        "generate_tokens_per_second": round(one),
        "generate_tokens_per_second_32": round(many),
        "generate_speedup": speedup,
        "generate_batch_speedup": batch_speedup,
        "late_token_ratio": min(late_ratios),
    }


def measure_reading(vocab: pg.Vocabulary, files: int) -> dict:
    """How much faster worker processes read files than one; a second start on a cached folder."""
    sources = sorted((ROOT / "my_midis").glob("*.mid"))
    with tempfile.TemporaryDirectory() as work:
        paths = [Path(work, "midi", f"{i:04d}.mid") for i in range(files)]
        paths[0].parent.mkdir()
        for i, path in enumerate(paths):  # all different: the later ones are transposed
            Score(sources[i % len(sources)]).shift_pitch(i // len(sources)).dump_midi(path)

        def read_in_one_process() -> None:
            for path in paths[:300]:
                pg.read_file(path, vocab)

        ratios = []
        for _ in range(3):
            one = seconds(read_in_one_process) / min(300, files)
            workers = seconds(lambda: list(pg.read_in_workers(paths, vocab))) / files
            ratios.append(one / workers)
        flags = ["--midi-dir", "midi", "--steps", "1", "--val-percent", "0", "--fresh"]
        command = [sys.executable, ROOT / "pianogpt.py", *flags]
        start = partial(subprocess.run, command, cwd=work, check=True, capture_output=True)
        starts = [seconds(start) for _ in range(4)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "tokenize_speedup": median(ratios),
        "tokenize_files": files,
        "warm_start_seconds": median(starts[1:]),
        "peak_memory_mb": round(peak / 1024),
    }


def make_folder(folder: Path, files: int) -> None:
    """Fill a folder with small files that are all different: chorales, shuffled and shifted."""
    sources = [Score(path) for path in sorted((ROOT / "my_midis").glob("*.mid"))]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(files):
        score = sources[number % len(sources)].copy()
        bar = 4 * score.tpq
        order = rng.permutation(1 + score.end() // bar)
        shift = int(rng.integers(-5, 6))
        for track in score.tracks:
            for note in track.notes:
                note.time = int(order[note.time // bar]) * bar + note.time % bar
                note.pitch += shift
        score.dump_midi(folder / f"{number:06d}.mid")


def time_start(folder: str) -> None:
    """Print the seconds of each part of a start on a folder, and the peak of memory."""
    settings = pg.Settings(program=pg.ProgramSettings(midi_dir=folder, cache_dir=f"{folder}-cache"))
    vocab = pg.Vocabulary(settings.tokens)
    taken = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        taken[name] = round(now - clock, 2)
        clock = now

    files = pg.find_files(Path(folder))
    lap("list_seconds")
    pieces = pg.read_folder(Path(folder), vocab, settings.program.cache_dir, files)
    lap("read_seconds")
    pg.split_pieces(pieces, Path(folder), settings.data, vocab)
    lap("join_seconds")
    corpus = pg.make_corpus([piece for piece in pieces if piece.split == "train"])
    pg.Batches(corpus, vocab, settings)[0]
    lap("batch_seconds")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    works = len({piece.work for piece in pieces})
    notes = sum(piece.notes for piece in pieces)
    pg.print_block(taken | {"peak_memory_gb": round(peak, 2), "works": works, "notes": notes})


def measure_scale(numbers: list[int]) -> None:
    """Print what a first and a second start cost on folders of so many files."""
    for number in numbers:
        with tempfile.TemporaryDirectory() as work:
            make_folder(Path(work, "midi"), number)
            for start in ("first", "second"):
                print(f"\nfiles: {number}\nstart: {start}", flush=True)
                command = [sys.executable, __file__, "--time-start", str(Path(work, "midi"))]
                subprocess.run(command, check=True)


def matrix_product_peak(vocab: pg.Vocabulary, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, as precise as training."""
    n = 2048 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if uses_bfloat16(vocab, device) else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


def measure_growth(vocab: pg.Vocabulary, device: torch.device) -> None:
    """Print a table: tokens/s of training and generating, fraction of the matrix-product peak."""
    V = len(vocab.words)
    tokens = 4096  # in a batch
    peak = matrix_product_peak(vocab, device)
    print(f"matrix_product_tflops: {peak / 1e12:.2f}")
    print("n_embd  block_size  train_tok/s  share_of_peak  generate_tok/s")
    for n_embd, block_size in itertools.product((128, 256, 512), (256, 1024)):
        sizes = pg.ModelSettings(n_embd=n_embd, block_size=block_size)
        batch = random_window(sizes, V, tokens // block_size, device)
        step = our_stepper(sizes, vocab, batch, compile=False)
        taken = median([seconds(step) for _ in range(4)][1:])
        model = pg.PianoGPT(sizes, V, vocab.grid).to(device)
        matrices = model.head.weight.numel()
        matrices += sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
        # Attention does n_layer x block_size x n_embd more multiplications for each token, as
        # half of its scores lie in the future. A multiplication has an addition, and each gradient
        # costs as much as the forward pass: 6 operations.
        operations = 6 * tokens * (matrices + sizes.n_layer * block_size * n_embd)
        with torch.inference_mode():
            stream = our_tokens(model, vocab, 1)
            next(stream)
            rate = 256 / seconds(partial(take, 256, stream))
        share = operations / taken / peak
        train_rate = tokens / taken
        print(f"{n_embd:6}  {block_size:10}  {train_rate:11.0f}  {share:13.2f}  {rate:14.0f}")


# ---- Learning

MEASUREMENTS = 20  # of the held-out loss in a training
TIMED_STEPS = 100  # steps taken to plan a training
WARM_STEPS = 20  # the first of them, whose time does not count
PLAIN_RATE = 3e-4
TUNED_RATES = (1e-3, 3e-3)
# Times the peak rates of our blocks. With match_rms_adamw the root mean square of a Muon step is
# 0.2 times its rate, so that at 5 its steps are as large as ours.
MUON_RATES = (1, 2, 5)

Curve = list[tuple[float, float]]  # (seconds of training, held-out nats per note)


class PlainRecipe(pg.PianoGPT):
    """The same blocks with learned positions, without musical time, recent tokens and memory."""

    def __init__(self, sizes: pg.ModelSettings, vocab_size: int, grid: int):
        super().__init__(sizes, vocab_size, grid)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.block_size, sizes.n_embd))
        self.recent.requires_grad_(False)  # not used
        self.memory.requires_grad_(False)

    def embed(self, window: pg.Window) -> Tensor:
        """Embeddings (B, T, C)."""
        return self.embedding(window.idx) + self.positions[: window.idx.size(1)]

    def rotation(self, window: pg.Window) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, 1, T, hs), of no angle."""
        B, T = window.idx.shape
        cos = torch.ones(1, device=window.idx.device)
        cos = cos.expand(B, 1, T, self.sizes.n_embd // self.sizes.n_head)
        return cos, torch.zeros_like(cos)


def constant(step: int, train: pg.TrainSettings) -> float:
    """The learning rate of the plain recipe as a fraction of its peak."""
    return 1.0


def cosine(step: int, train: pg.TrainSettings) -> float:
    """Linear warmup, and half a cosine down to zero."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    return (1 + math.cos(math.pi * done)) / 2


class PlainTrainer(pg.Trainer):
    """A trainer with a schedule of its own that measures the weights as they are."""

    def __init__(self, model: PlainRecipe, train: pg.TrainSettings, schedule, bfloat16: bool):
        super().__init__(model, train, bfloat16, compiled=True)
        self.schedule = schedule
        self.average = model

    def update(self, fraction: float) -> None:
        """Move the weights."""
        fraction = self.schedule(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
        self.optimizer.step()
        self.optimizer.zero_grad()


class MuonWithAdamW:
    """torch.optim.Muon for the matrices of the blocks, AdamW at our rates for the rest."""

    def __init__(self, model: pg.PianoGPT, train: pg.TrainSettings, rate: float):
        """rate: times the peak rates of our blocks."""
        blocks = []
        rest = []
        for group in pg.make_optimizer(model, train).param_groups:
            new = {key: group[key] for key in ("params", "weight_decay", "peak_lr")}
            if group["orthogonal"]:
                new["peak_lr"] *= rate
                new["weight_decay"] /= rate  # both multiply it by the rate: it decays as ours
                blocks.append(new)
            else:
                rest.append(new)
        self.muon = torch.optim.Muon(blocks, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95))
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        """Move every weight by its gradient."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.muon.zero_grad()
        self.adamw.zero_grad()


class Music(NamedTuple):
    """What all trainings of a comparison share."""

    settings: pg.Settings
    vocab: pg.Vocabulary
    batches: pg.Batches
    windows: pg.Window  # held out
    device: torch.device
    minutes: float  # of each training


def read_music(args: argparse.Namespace, folder: str, device: torch.device) -> Music:
    """The music of a folder, split. Raises UserError if nothing is held out."""
    settings = pg.Settings(
        program=pg.ProgramSettings(midi_dir=folder, cache_dir=args.cache_dir, compile=True),
        data=pg.DataSettings(piece_is_folder=args.piece_is_folder),
    )
    vocab = pg.Vocabulary(settings.tokens)
    corpus, windows, _ = pg.prepare_data(settings, vocab)
    if not len(windows.idx):
        raise pg.UserError(f"all of {folder} is one work, so nothing is held out: add music")
    batches = pg.Batches(corpus.to(device), vocab, settings)
    return Music(settings, vocab, batches, windows, device, args.minutes)


def train_for(music: Music, batches: pg.Batches, trainer: pg.Trainer, make_optimizer) -> Curve:
    """Train for the minutes of a comparison; make_optimizer() makes one of the trainer's model.

    Some steps before, which compile the model and time it, are taken back. They tell how many
    steps the schedule is planned for. Held-out losses are measured outside the minutes.
    """
    model, train = trainer.model, trainer.settings
    weights = pg.copy_weights(model)
    trainer.optimizer = make_optimizer()
    taken = [seconds(lambda: trainer.train_step(batches[trainer.step])) for _ in range(TIMED_STEPS)]
    model.load_state_dict(weights)
    trainer.average.load_state_dict(weights)
    trainer.optimizer = make_optimizer()
    trainer.step = 0
    trainer.losses = []

    limit = 60 * music.minutes  # seconds
    train.steps = max(1, int(0.95 * limit / mean(taken[WARM_STEPS:])))
    train.warmup = min(train.warmup, train.steps // 5)
    curve = []
    while trainer.step < train.steps and trainer.seconds < limit:
        trainer.seconds += seconds(lambda: trainer.train_step(batches[trainer.step]))
        is_last = trainer.step == train.steps or trainer.seconds >= limit
        if is_last or trainer.seconds >= limit / MEASUREMENTS * (len(curve) + 1):
            trainer.validate(music.windows, music.vocab)
            curve.append((trainer.seconds, trainer.history[-1]["val_nats_per_note"]))
    return curve


def train_ours(music: Music, make_optimizer) -> tuple[pg.Trainer, Curve]:
    """Our model and trainer with an optimizer, make_optimizer(model, settings)."""
    settings = replace(music.settings, train=replace(music.settings.train))  # train_for changes it
    trainer = pg.make_trainer(settings, music.vocab, music.device)
    make = partial(make_optimizer, trainer.model, settings.train)
    return trainer, train_for(music, music.batches, trainer, make)


def plain_batches(music: Music) -> pg.Batches:
    """The batches without transposition and without gaps."""
    data = replace(music.settings.data, transpose=0, gap_percent=0.0)
    return replace(music.batches, settings=replace(music.settings, data=data))


def train_plain(music: Music, rate: float, schedule, bfloat16: bool) -> tuple[pg.Trainer, Curve]:
    """The plain recipe with a peak learning rate and a schedule."""
    settings = music.settings
    torch.manual_seed(settings.train.seed)
    model = PlainRecipe(settings.model, len(music.vocab.words), music.vocab.grid)
    model.to(music.device)
    trainer = PlainTrainer(model, replace(settings.train), schedule, bfloat16)
    used = [p for p in model.parameters() if p.requires_grad]

    def make_optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": used, "peak_lr": rate}], fused=True)

    return trainer, train_for(music, plain_batches(music), trainer, make_optimizer)


def lowest(curve: Curve) -> float:
    """The lowest loss of a curve."""
    return min(loss for _, loss in curve)


def seconds_to(loss: float, curve: Curve) -> float:
    """When a curve first reaches a loss, on straight lines between its points; NaN if never."""
    for (start, high), (end, low) in itertools.pairwise([(0.0, math.inf), *curve]):
        if low <= loss:
            if math.isinf(high):
                return end
            return start + (end - start) * (high - loss) / (high - low)
    return math.nan


def print_curves(curves: dict[str, Curve]) -> None:
    """Print a table with a column of held-out nats per note for each training."""
    print("  ".join([f"{'seconds':>7}", *(f"{name:>9}" for name in curves)]))
    for row in itertools.zip_longest(*curves.values()):
        second = next(point[0] for point in row if point)
        losses = [f"{point[1]:9.4f}" if point else " " * 9 for point in row]
        print("  ".join([f"{second:7.0f}", *losses]))


def measure_recipe(music: Music, tuned: bool) -> dict:
    """Held-out nats per note after the same minutes by the plain recipe and by ours."""
    ours, our_curve = train_ours(music, pg.make_optimizer)
    plain, plain_curve = train_plain(music, PLAIN_RATE, constant, ours.bfloat16)
    curves = {"plain": plain_curve, "ours": our_curve}
    out = {
        "minutes_each": music.minutes,
        "batch_size": music.settings.train.batch_size,
        "plain_steps": plain.step,
        "plain_nats_per_note": lowest(plain_curve),
    }
    if tuned:
        of_rate = {}
        for rate in TUNED_RATES:
            _, of_rate[rate] = train_plain(music, rate, cosine, ours.bfloat16)
            out[f"tuned_{rate:g}_nats_per_note"] = lowest(of_rate[rate])
        best = min(of_rate, key=lambda rate: lowest(of_rate[rate]))
        curves = {"plain": plain_curve, "tuned": of_rate[best], "ours": our_curve}
        out["tuned_lr"] = f"{best:g}"
        out["tuned_nats_per_note"] = lowest(of_rate[best])
    print_curves(curves)
    out |= {"steps": ours.step, "nats_per_note": lowest(our_curve)}
    for name in list(curves)[:-1]:
        loss = lowest(curves[name])
        out[f"gain_on_{name}_nats_per_note"] = loss - lowest(our_curve)
        out[f"seconds_to_{name}_nats_per_note"] = seconds_to(loss, our_curve)
    return out


def measure_optimizers(music: Music) -> dict:
    """Held-out nats per note after the same minutes with our optimizer and with Muon."""
    makers = {"ours": pg.make_optimizer}
    for rate in MUON_RATES:
        makers[f"muon_x{rate}"] = partial(MuonWithAdamW, rate=rate)
    curves = {}
    out = {"minutes_each": music.minutes, "batch_size": music.settings.train.batch_size}
    for name, maker in makers.items():
        trainer, curves[name] = train_ours(music, maker)
        out[f"{name}_steps"] = trainer.step
        out[f"{name}_nats_per_note"] = lowest(curves[name])
    print_curves(curves)
    return out


# ---- Peers


class NanoGPT(nn.Module):
    """nanoGPT's model, as our trainer takes one."""

    def __init__(self, folder: Path, sizes: pg.ModelSettings, V: int):
        super().__init__()
        sys.path.insert(0, str(folder))
        from model import GPT, GPTConfig

        config = {"n_layer": sizes.n_layer, "n_head": sizes.n_head, "n_embd": sizes.n_embd}
        config |= {"block_size": sizes.block_size, "vocab_size": V, "dropout": 0.0, "bias": False}
        self.gpt = GPT(GPTConfig(**config))
        self.embedding = self.gpt.transformer.wte
        self.head = self.gpt.lm_head

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled: all of it, as nanoGPT does."""
        return [self.gpt]

    def forward(self, window: pg.Window) -> Tensor:
        """The loss, as of PianoGPT."""
        targets = window.targets.masked_fill(window.targets == pg.IGNORE, -1)  # nanoGPT's mark
        _, loss = self.gpt(window.idx, targets)
        return loss * (targets >= 0).sum()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """That of its config/train_shakespeare_char.py."""
        kind = self.head.weight.device.type
        optimizer = self.gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
        for group in optimizer.param_groups:
            group["peak_lr"] = 1e-3
        return optimizer


def to_a_tenth(step: int, train: pg.TrainSettings) -> float:
    """nanoGPT's learning rate: warmup, and half a cosine down to a tenth."""
    return min((step + 1) / train.warmup, 0.1 + 0.9 * cosine(step, train))


def train_nanogpt(music: Music, folder: Path, bfloat16: bool) -> tuple[pg.Trainer, Curve]:
    """nanoGPT by the recipe of its config/train_shakespeare_char.py, with our batches."""
    settings = music.settings
    torch.manual_seed(settings.train.seed)
    model = NanoGPT(folder, settings.model, len(music.vocab.words)).to(music.device)
    train = replace(settings.train, warmup=100)
    trainer = PlainTrainer(model, train, to_a_tenth, bfloat16)
    return trainer, train_for(music, plain_batches(music), trainer, model.make_optimizer)


def hugging_face(name: str, sizes: pg.ModelSettings, V: int) -> nn.Module:
    """A model of Hugging Face of our size."""
    import transformers

    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V,
            n_positions=sizes.block_size,
            n_embd=sizes.n_embd,
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=sizes.n_embd,
        intermediate_size=16 * round(sizes.n_embd / 6),
        num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head,
        max_position_embeddings=sizes.block_size,
    )
    return transformers.LlamaForCausalLM(config).eval()


def take_theirs(n: int, model: nn.Module, B: int) -> None:
    """Draw n tokens of B new sequences from a model of Hugging Face, with its cache."""
    idx = torch.ones(B, 1, dtype=torch.long, device=model.device)
    cache = None
    for _ in range(n):
        out = model(idx, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        idx = torch.multinomial(out.logits[:, -1].softmax(-1), 1)


def take_new(n: int, model: pg.PianoGPT, vocab: pg.Vocabulary, B: int) -> None:
    """Draw n tokens of B new sequences from ours."""
    take_ours(n, our_tokens(model, vocab, B), B)


def compare_generation(vocab: pg.Vocabulary, device: torch.device, rounds: int) -> dict:
    """Tokens/s beside Hugging Face's models, from the beginning of a window to its end."""
    sizes = pg.ModelSettings()
    V = len(vocab.words)
    n = sizes.block_size - 1
    ours = pg.PianoGPT(sizes, V, vocab.grid).to(device)
    theirs = {name: hugging_face(name, sizes, V).to(device) for name in ("gpt2", "llama")}
    out = {}
    for B in (1, 32):
        works = {"ours": partial(take_new, n, ours, vocab, B)}
        for name, model in theirs.items():
            works[name] = partial(take_theirs, n, model, B)
        with torch.inference_mode():
            rows = compare(rounds, works)
        for name in works:
            out[f"generate_{B}_{name}"] = round(B * n / median(row[name] for row in rows))
        best = [min(row["gpt2"], row["llama"]) / row["ours"] for row in rows]
        out[f"generate_{B}_speedup"] = median(best)
    return out


def compare_training(folder: Path, vocab: pg.Vocabulary, device: torch.device, rounds: int) -> dict:
    """Training tokens/s beside nanoGPT, both compiled and as precise as this machine is best at."""
    sizes = pg.ModelSettings()
    V = len(vocab.words)
    B = pg.TrainSettings.batch_size
    batch = random_window(sizes, V, B, device)
    model = NanoGPT(folder, sizes, V).to(device)
    bfloat16 = uses_bfloat16(vocab, device)
    nano = PlainTrainer(model, pg.TrainSettings(), constant, bfloat16)
    nano.optimizer = model.make_optimizer()
    works = {
        "ours": our_stepper(sizes, vocab, batch, compile=True),
        "nanogpt": partial(nano.train_step, batch),
    }
    rows = compare(rounds, works, times=3)
    out = {}
    for name in works:
        taken = median(row[name] for row in rows)
        out[f"train_tokens_per_second_{name}"] = round(B * sizes.block_size / taken)
    return out | {"train_speedup": median(row["nanogpt"] / row["ours"] for row in rows)}


def measure_peers(folder: Path, vocab: pg.Vocabulary, device: torch.device) -> None:
    """Print speeds beside other programs; what is not installed is skipped with a sentence."""
    if (folder / "model.py").exists():
        pg.print_block(compare_training(folder, vocab, device, 7))
    else:
        print(f"{folder} holds no nanoGPT (model.py): skipped")
    if find_spec("transformers"):
        pg.print_block(compare_generation(vocab, device, 7))
    else:
        print("transformers is not installed: GPT-2 and Llama are skipped")


# ---- The program


def describe_machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if models:
            name = models[0].split(":")[1].strip()
    return {"machine": name, "cores": os.cpu_count(), "torch": torch.__version__}


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no table")
    parser.add_argument("--device", default="auto", help="as of pianogpt.py")
    parser.add_argument("--recipe", metavar="DIR", help="compare recipes on this folder")
    parser.add_argument("--peers", metavar="DIR", help="compare with the nanoGPT in this folder")
    parser.add_argument("--tuned", action="store_true", help="with --recipe: also tuned AdamW")
    parser.add_argument("--optimizers", metavar="DIR", help="compare optimizers on this folder")
    parser.add_argument("--scale", metavar="N", type=int, nargs="+", help="folders of N files")
    parser.add_argument("--time-start", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=10, help="of each training (default: 10)")
    parser.add_argument("--piece-is-folder", action="store_true", help="as of pianogpt.py")
    parser.add_argument(
        "--cache-dir", default=pg.ProgramSettings.cache_dir, help="as of pianogpt.py"
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for what would fail only after minutes."""
    if args.minutes <= 0:
        raise pg.UserError("--minutes must be above 0")
    if args.tuned and not args.recipe:
        raise pg.UserError("--tuned does nothing without --recipe")
    if args.peers and args.recipe and not Path(args.peers, "model.py").exists():
        raise pg.UserError(f"{args.peers} holds no nanoGPT (model.py): name its folder")


def run(args: argparse.Namespace) -> None:
    """Measure, and print key: value lines."""
    if args.time_start:
        time_start(args.time_start)
        return
    check_flags(args)
    device = pg.choose_device(args.device)
    pg.print_block(describe_machine(device))
    if args.scale:
        measure_scale(args.scale)
        return
    if args.peers:
        measure_peers(Path(args.peers), pg.Vocabulary(pg.TokenSettings()), device)
    if args.recipe:
        music = read_music(args, args.recipe, device)
        pg.print_block(measure_recipe(music, args.tuned))
        if args.peers:
            nano, curve = train_nanogpt(music, Path(args.peers), pg.has_fast_bfloat16(device))
            print_curves({"nanogpt": curve})
            pg.print_block({"nanogpt_steps": nano.step, "nanogpt_nats_per_note": lowest(curve)})
    if args.optimizers:
        pg.print_block(measure_optimizers(read_music(args, args.optimizers, device)))
    if args.recipe or args.optimizers or args.peers:
        return
    vocab = pg.Vocabulary(pg.TokenSettings())
    rounds, files = (3, 100) if args.quick else (9, 1000)
    pg.print_block(measure_training(vocab, device, rounds))
    pg.print_block(measure_generation(vocab, device, rounds))
    pg.print_block(measure_reading(vocab, files))
    if not args.quick:
        measure_growth(vocab, device)


def main() -> int:
    """The program; 0, or 2 for what the user can fix."""
    try:
        run(make_parser().parse_args())
    except pg.UserError as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
