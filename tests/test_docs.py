"""What the docstring and README say about tokens is what the vocabulary says."""

import re
from pathlib import Path

import numpy as np
from conftest import pg

ROOT = Path(pg.__file__).parent


def spell(word):
    """A token as the documents spell it."""
    return word.removesuffix("_None")


def test_bar_in_the_docstring_has_the_ids_times_and_pitches_of_its_tokens(vocab):
    rows = re.findall(r"^    ([A-Z]\S+) +(\d+) +(\d+) +(\d+)\b", pg.__doc__, re.M)
    id_of = {spell(word): number for word, number in vocab.id_of.items()}
    ids = np.array([id_of[word] for word, *_ in rows])
    state = vocab.trace(ids)
    assert len(rows) == 17
    assert [int(row[1]) for row in rows] == ids.tolist()
    assert [int(row[2]) for row in rows] == state.time.tolist()
    assert [int(row[3]) for row in rows] == state.pitch.tolist()


def test_bar_in_readme_has_the_ids_times_and_pitches_of_its_tokens(vocab):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {}
    for line in lines:
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], cells[1:])
    ids = [vocab.bos_id]
    for word in rows["token"]:
        ids.append(vocab.id_of.get(word, vocab.id_of.get(f"{word}_None")))
    state = vocab.trace(np.array(ids))
    assert [int(cell) for cell in rows["id"]] == ids[1:]
    assert [int(cell) for cell in rows["time"]] == state.time[1:].tolist()
    assert [int(cell) for cell in rows["pitch"]] == state.pitch[1:].tolist()


def test_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
