"""Turn a checkpoint of the older version (.pt) into one to generate with, or to start from.

    python tests/convert.py old.pt new.safetensors

The weights compute the same as before; training cannot be resumed. For one version only.
"""

import sys
from pathlib import Path

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


def main() -> None:
    """Convert the file."""
    old = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    assert old["format"] == "pianogpt 10", old["format"]
    trainer = old["trainer"]
    settings = {name: old["config"][name] for name in ("data", "model", "train")}
    tensors = {"intervals": old["intervals"]}
    dtype = trainer["best"]["head"].dtype
    for name, weight in convert_weights(trainer["best"]).items():
        tensors[f"best/{name}"] = weight.to(dtype)
    checkpoint = pg.Checkpoint(
        about=old["about"],
        settings=settings | {"tokens": old["config"]["music"]},
        vocabulary=old["vocabulary"],
        folder=old["folder"],
        files=[],
        pieces=old["pieces"],
        progress={
            "step": trainer["step"],
            "seconds": trainer["seconds"],
            "history": trainer["history"],
            "losses": [],
            "optimizer": "",
        },
        tensors=tensors,
    )
    pg.save_checkpoint(Path(sys.argv[2]), checkpoint)


if __name__ == "__main__":
    main()
