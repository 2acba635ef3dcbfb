"""Convert a checkpoint of an older version, to generate with it or to pass it to --init-from.

    python tests/convert.py old new.safetensors

old: of format 10 (.pt), 11 or 12. The weights compute the same as before; training cannot be
resumed.
"""

import json
import pickle
import sys
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import pianogpt as pg

RENAMED = {
    "embedding": "embedding.weight",
    "head": "head.weight",
    "norm": "norm.weight",
    "norm_1": "norm_1.weight",
    "norm_2": "norm_2.weight",
    "qkv": "qkv.weight",
    "proj": "proj.weight",
    "expand": "expand.weight",
    "contract": "contract.weight",
}


def convert_weights(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under their new names, in the precision that they have."""
    new = {}
    for name, weight in old.items():
        block, _, part = name.rpartition(".")
        if part in RENAMED:
            new[f"{block}.{RENAMED[part]}".lstrip(".")] = weight.clone()
    new["embedding.weight"][pg.PAD] = 0
    recent = old["recent"][:, 0]
    new["recent"] = recent.clone()
    # The memory was added to each token before the mix of recent tokens; now it is added after it.
    new["memory.weight"] = (old["memory"].float() * (1 + recent.float().sum(0))).T.contiguous()
    return new


def enlarge(weight: torch.Tensor, name: str, old: list[str], new: list[str]) -> torch.Tensor:
    """A weight for the words of the new vocabulary: the old ones, longer lengths, and FILL.

    A new length is read as the longest old one. All new words are as unlikely as PAD until they
    are learned.
    """
    if name not in ("embedding.weight", "head.weight", "memory.weight"):
        return weight

    def instead(word: str) -> str:
        if name == "embedding.weight" and word != pg.FILL:
            return "Duration_12.0.12"
        return "PAD_None"

    rows = torch.tensor([old.index(word if word in old else instead(word)) for word in new])
    if name == "memory.weight":  # (C, V)
        return weight[:, rows]
    return weight[rows]


def check_format(path: str, form: str, *older: str) -> None:
    """Raise UserError if the format of a file is not one of these."""
    if form == pg.FORMAT:
        raise pg.UserError(f"{path} is of this version and needs no conversion")
    if form not in older:
        raise pg.UserError(f"{path} is not a checkpoint of a version that can be converted")


def read_10(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The values of a checkpoint and the weights that had the lowest validation loss."""
    old = torch.load(path, map_location="cpu", weights_only=True)
    check_format(path, old.get("format", ""), "pianogpt 10")
    trainer = old["trainer"]
    dtype = trainer["best"]["head"].dtype
    weights = {k: v.to(dtype) for k, v in convert_weights(trainer["best"]).items()}
    settings = {name: old["config"][name] for name in ("data", "model", "train")}
    progress = {key: trainer[key] for key in ("step", "seconds", "history")}
    values = {name: old[name] for name in ("about", "vocabulary", "folder", "pieces")}
    settings["tokens"] = old["config"]["music"]
    return values | {"settings": settings, "progress": progress}, weights | {
        "intervals": old["intervals"]
    }


def read_11(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The same of a checkpoint of format 11 or 12."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        check_format(path, metadata.get("format", ""), *pg.OLDER_FORMATS)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
    return json.loads(metadata["json"]), weights | {"intervals": tensors["intervals"]}


def convert(old: str, new: str) -> None:
    """Convert the file. Raises UserError or OSError."""
    for path in (new, f"{new}.csv"):
        if Path(path).exists():
            raise pg.UserError(f"{path} already exists: name another file")
    with open(old, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        values, weights = (read_10 if is_zip else read_11)(old)
    except (pickle.UnpicklingError, RuntimeError, safetensors.SafetensorError):
        raise pg.UserError(f"{old} is not a checkpoint") from None
    intervals = weights.pop("intervals")
    vocabulary = pg.Vocabulary(pg.TokenSettings(**values["settings"]["tokens"])).words
    tensors = {"intervals": intervals}
    for name, weight in weights.items():
        enlarged = enlarge(weight, name, values["vocabulary"], vocabulary)
        tensors[f"best/{name}"] = enlarged.clone()
    n_embd = weights["embedding.weight"].size(1)
    dtype = weights["embedding.weight"].dtype
    tensors["best/style.weight"] = torch.zeros(1, n_embd, dtype=dtype)  # no styles
    values["settings"]["data"]["gap_percent"] = 0.0  # it has not learned to fill any
    progress = values["progress"] | {"begin": 0, "losses": [], "optimizer": ""}
    values |= {"vocabulary": vocabulary, "files": [], "progress": progress}
    pg.save_checkpoint(Path(new), pg.Checkpoint(**values, tensors=tensors))


def main() -> int:
    """The program; 0, or 2 for what the user can fix."""
    try:
        if len(sys.argv) != 3:
            raise pg.UserError("write: python tests/convert.py OLD NEW")
        convert(*sys.argv[1:])
    except (pg.UserError, OSError) as e:
        print(f"convert: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
