"""Folder: MIDI files become pieces, pieces a split, ids become windows and batches."""

import functools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FORKS, pg, scale, write_midi
from fuzz_midi import check, midi, note, tempo

KINDS = SimpleNamespace(bos=1, pitches=range(4, 92), chords=range(200, 224))  # 88 keys; two qualities of chord


def plain(piece, **changes):
    """A piece as a dictionary that can be compared."""
    return vars(piece) | {"ids": piece.ids.tolist()} | changes


def read(folder, vocab, cache=""):
    """The pieces of a folder as such dictionaries."""
    return [plain(p) for p in pg.read_folder(folder, vocab, str(cache))]


def problems(folder, vocab):
    """{path: problem} of the files of a folder that are skipped."""
    return {p.path: p.problem for p in pg.read_folder(folder, vocab, "") if p.problem}


def split(names, folder, **data):
    """{path: side} of pieces without music."""
    pieces = [pg.Piece(path=name) for name in names]
    pg.split_pieces(pieces, Path(folder), pg.DataConfig(**data), KINDS.pitches)
    return {p.path: p.split for p in pieces}


def piece(path, pitches):
    """A piece of these MIDI pitches."""
    return pg.Piece(np.array(pitches, np.int16), path=path, work=path)


def test_every_midi_file_in_any_case_and_depth_is_read_or_reported_by_name(folder, vocab, monkeypatch):
    for i, name in enumerate(("b.Mid", "deep/er/a.MIDI", "._c.mid", ".hidden/d.mid", "e.mp3", "f.KAR")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"piece{i:02d}.mid").rename(folder / name)
    monkeypatch.setattr(pg, "FILE_MEGABYTES", 0.005)
    (folder / "big.mid").write_bytes(b"x" * 10_000)
    (folder / "page.mid").write_text("<html>")
    (folder / "folder.mid").mkdir()
    (folder / "link.mid").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mid")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    found = {p["path"]: p["problem"].split(":")[0] for p in read(folder, vocab)}
    bad = dict.fromkeys(("folder.mid", "link.mid", "pipe.mid"), "not a file")
    bad |= {"drums.mid": "only drums", "page.mid": "not a MIDI file", "big.mid": "larger than 0.005 MB"}
    good = dict.fromkeys(["b.Mid", "deep/er/a.MIDI", "f.KAR", *(f"piece{i:02d}.mid" for i in range(6, 12))], "")
    assert list(found.items()) == sorted((good | bad).items())


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch, capsys):
    def scandir(path, real=os.scandir):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (folder / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    assert len(pg.find_files(folder)) == 12
    assert capsys.readouterr().out == f"{folder}/closed cannot be listed: Permission denied\n"


@pytest.mark.parametrize("damage, problem", [
    (lambda good: good[: good.rfind(b"MTrk")] + b"MTrk\0\0\0\4" + b"\xf5\xf5\xf5\xf5", "damaged: "),
    (lambda good: good[:-5], "damaged: "), (lambda good: b"GIF89a" + good, "not a MIDI file"),
    (lambda good: b"RIFF" + good[4:], "not a MIDI file"), (lambda good: good[:9], "damaged: "),
    (lambda good: good[:9] + b"\2" + good[10:], "MIDI format 2, several songs in one file: save each")])
def test_unreadable_file_says_in_plain_words_what_is_wrong(damage, problem, tmp_path, vocab):
    (tmp_path / "a.mid").write_bytes(damage(midi([tempo(500_000)], note(60, 480))))
    found = pg.read_piece(tmp_path / "a.mid", vocab).problem
    assert found.startswith(problem) and not found.endswith(": ")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_forked_and_spawned_workers_read_what_one_process_reads(platform, folder, vocab, monkeypatch):
    """FORKS stands for spawn: its processes too inherit nothing, so that all they get must be pickled."""
    alone = [plain(pg.read_piece(path, vocab), path=path.name) for path in sorted(folder.iterdir())]
    contexts = {"linux": {"fork": multiprocessing.get_context("fork")}, "darwin": {"spawn": FORKS}}
    monkeypatch.setattr(multiprocessing, "get_context", contexts[platform].get)
    monkeypatch.setattr(sys, "platform", platform)
    assert read(folder, vocab) == alone and not any(p["problem"] for p in alone)


def test_file_that_kills_or_hangs_its_worker_costs_only_itself(folder, vocab, monkeypatch):
    real = pg.read_piece
    harm = {"piece03.mid": lambda: os.kill(os.getpid(), signal.SIGKILL), "piece05.mid": signal.pause}
    harmful = lambda path, vocab: harm.get(path.name, bool)() or real(path, vocab)  # noqa: E731
    monkeypatch.setattr(pg, "read_piece", harmful)  # the forked workers see it too
    monkeypatch.setattr(pg, "FILE_SECONDS", 0.2)
    monkeypatch.setattr(signal, "alarm", functools.partial(signal.setitimer, signal.ITIMER_REAL))  # of parts of seconds
    assert problems(folder, vocab) == dict.fromkeys(harm, "crashed or hung the MIDI parser")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_file_that_needs_too_much_memory_costs_only_itself_and_is_tried_again(folder, tmp_path, vocab, monkeypatch):
    real, greedy = pg.parse_midi, (folder / "piece03.mid").read_bytes()
    monkeypatch.setattr(pg, "WORKER_GIGABYTES", 1)
    monkeypatch.setattr(pg, "parse_midi", lambda data: real(data * 3_000_000 if data == greedy else data))
    found = {p["path"]: p["problem"] for p in read(folder, vocab, tmp_path / "cache") if p["problem"]}
    assert found == {"piece03.mid": "not enough memory"}
    monkeypatch.setattr(pg, "parse_midi", real)
    assert not any(p["problem"] for p in read(folder, vocab, tmp_path / "cache")), "another day there may be more"


def test_failure_that_passes_is_tried_again_and_never_kept(folder, tmp_path, vocab, monkeypatch):
    real, marks = pg.read_piece, tmp_path / "marks"
    marks.mkdir()

    def read_piece(path, vocab):
        if path.name == "piece03.mid" and not (marks / "killed").exists():
            (marks / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)  # once, as the system does when memory is short
        return real(path, vocab)

    monkeypatch.setattr(pg, "read_piece", read_piece)
    assert not any(p["problem"] for p in read(folder, vocab)), "tried once more"
    read_bytes, broken = pg.read_bytes, {folder / "piece05.mid"}

    def fail(path):
        if path in broken and "worker" in marks.name:
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    marks, cache = tmp_path / "worker", tmp_path / "cache"
    monkeypatch.setattr(pg, "read_piece", real)
    monkeypatch.setattr(pg, "read_bytes", fail)
    found = {p["path"]: p["problem"] for p in read(folder, vocab, cache) if p["problem"]}
    assert found == {"piece05.mid": "Input/output error"}
    broken.clear()
    assert not any(p["problem"] for p in read(folder, vocab, cache))


def test_lone_file_whose_worker_is_killed_is_tried_again(folder, tmp_path, vocab, monkeypatch):
    real, mark = pg.read_piece, tmp_path / "mark"
    once = lambda path, vocab: mark.exists() or (mark.touch(), os.kill(os.getpid(), signal.SIGKILL))  # noqa: E731
    monkeypatch.setattr(pg, "read_piece", lambda path, vocab: once(path, vocab) and real(path, vocab))
    assert [piece.problem for _, piece in pg.read_in_workers([folder / "piece00.mid"], vocab)] == [""]


def test_stray_note_or_absurd_tempo_does_not_flood_the_corpus(tmp_path, vocab):
    notes = [(i / 2, 0.5, 60 + i % 12, 80) for i in range(25)]
    write_midi(tmp_path / "far.mid", [[*notes, (1e6, 1, 60, 80)]])
    (tmp_path / "fast.mid").write_bytes(midi([tempo(1)], [*note(60, 480), *note(62, 480, rest=2**28 - 1)]))
    write_midi(tmp_path / "slow.mid", [[(4 * i, 4, 60 + i, 80) for i in range(20)]])
    found = problems(tmp_path, vocab)
    assert {*found} == {"far.mid", "fast.mid"} and all("longer than a day" in p for p in found.values())
    stray = write_midi(tmp_path / "stray.mid", [[*notes, (36_000, 1, 72, 80), (36_040, 1, 60, 80)]])
    piece = pg.read_piece(stray, vocab)
    assert piece.notes == 27 and piece.changes["bars of long silences cut"] == 8988 + 1
    onsets = [n.time / 1920 for n in vocab.decode(piece.ids.tolist()).tracks[0].notes]
    assert onsets[24:] == [3, 12, 21], "eight empty bars are left of each silence"


def test_five_hundred_broken_files_are_used_or_reported_and_the_good_ones_used():
    counts = check(500)
    assert counts.total() == 500 + 15
    outcomes = {kind: {outcome for k, outcome in counts if k == kind} for kind, _ in counts}
    assert outcomes["a million notes.mid"] == outcomes["pedal never lifted"] == outcomes["zero length"] == {"used"}
    assert outcomes["only drums"] == {"only drums"} and outcomes["zero ticks"] == {"no ticks in a quarter note"}
    assert outcomes["a pipe.mid"] == outcomes["a link.mid"] == {"not a file"}


def test_cache_saves_reading_and_notices_changed_content_and_settings(folder, tmp_path, vocab, monkeypatch):
    real, new, cache, first = pg.read_in_workers, [], tmp_path / "cache", folder / "piece00.mid"
    monkeypatch.setattr(pg, "read_in_workers", lambda paths, vocab: new.append(len(paths)) or real(paths, vocab))
    (folder / "page.mid").write_text("<html>")
    assert read(folder, vocab, cache) == read(folder, vocab, cache) and new == [13], "problems are kept too"
    before = first.stat()
    write_midi(first, scale(40))
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(folder, vocab, cache)[1] == plain(pg.read_piece(first, vocab), path="piece00.mid") and new == [13, 1]
    first.write_bytes((folder / "piece07.mid").read_bytes())
    pieces = read(folder, vocab, cache)
    assert pieces[1]["ids"] == pieces[8]["ids"] and new == [13, 1], "the same content is known by any name"
    for kept in filter(Path.is_file, cache.rglob("*")):
        kept.write_bytes(b"damaged")
    assert read(folder, vocab, cache) == pieces and new == [13, 1, 13]
    one, other, *_ = sorted(cache.rglob("*.gz"))
    damaged = bytearray(one.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    one.write_bytes(damaged)
    other.write_bytes(sorted(cache.rglob("*.gz"))[2].read_bytes())  # what another file gave
    assert read(folder, vocab, cache) == pieces and new == [13, 1, 13, 2]
    read(folder, pg.Vocabulary(pg.MusicConfig(velocities=16)), cache)
    assert new == [13, 1, 13, 2, 13]


def test_what_a_killed_run_left_in_the_cache_is_written_over(folder, tmp_path, vocab):
    pieces = read(folder, vocab, tmp_path / "cache")
    sizes = {entry: entry.stat().st_size for entry in (tmp_path / "cache").rglob("*.gz")}
    for entry, size in sizes.items():
        os.truncate(entry, size // 2)
    assert read(folder, vocab, tmp_path / "cache") == pieces
    assert {entry: entry.stat().st_size for entry in (tmp_path / "cache").rglob("*") if entry.is_file()} == sizes


def test_split_is_the_same_in_every_process_and_moves_no_old_piece_when_a_new_one_comes(tmp_path):
    names = [f"{i}.mid" for i in range(300)]
    before, after = split(names, tmp_path), split([*names, "new.mid", "b.mid"], tmp_path)
    assert all(after[n] == before[n] for n in names)
    held_out = [name for name, side in before.items() if side == "validation"]
    assert held_out[:3] == ["6.mid", "16.mid", "18.mid"] and 15 <= len(held_out) <= 50
    assert {*split(names, tmp_path, val_percent=0.0).values()} == {"train"}


def test_folders_named_train_validation_and_test_are_honoured(tmp_path):
    names = ["train/a.mid", "validation/b.mid", "x/test/c.mid", *(f"train/{i}.mid" for i in range(50))]
    assert list(split(names, tmp_path).values()) == ["train", "validation", "test"] + ["train"] * 50


def test_csv_is_honoured_and_one_that_is_none_or_points_elsewhere_stops_nothing(tmp_path):
    (tmp_path / "m" / "maestro-folder.csv").mkdir(parents=True)
    os.mkfifo(tmp_path / "m" / "maestro-pipe.csv")
    rows = ["2004/0.mid,train", "2004/1.mid,validation", "2004/2.mid,test", "/etc/a.mid,test", "../../b.mid,test"]
    (tmp_path / "m" / "other.csv").write_text("midi_filename,split\n2004/3.mid,test")
    (tmp_path / "m" / "maestro-v3.0.0.csv").write_text("\n".join(["midi_filename,split", *rows, "2004/3.mid,train"]))
    sides = split([f"m/2004/{i}.mid" for i in range(4)], tmp_path)
    assert list(sides.values()) == ["train", "validation", "test", "train"]


def test_files_of_one_folder_are_one_work_if_asked(tmp_path):
    names = [f"{work}/{take}.mid" for work in range(60) for take in range(4)]
    for together in (True, False):
        sides = split(names, tmp_path, piece_is_folder=together)
        assert {*sides.values()} == {"train", "validation"}
        assert all(len({sides[f"{w}/{t}.mid"] for t in range(4)}) == 1 for w in range(60)) == together


def works(*music):
    """The works to which pieces of these pitches are assigned."""
    pieces = [piece(f"{i}.mid", pitches) for i, pitches in enumerate(music)]
    pg.join_recordings(pieces, range(128))
    return [p.work for p in pieces]


def test_recordings_of_the_same_music_are_found_whatever_their_key_and_mistakes():
    a, b, c = np.random.default_rng(3).integers(30, 90, (3, 200))
    wrong = a.copy()
    wrong[::40] += 1  # a wrong note every 40
    assert works(a, b, wrong + 3, c, b[100:]) == ["0.mid", "1.mid", "0.mid", "3.mid", "1.mid"]
    assert works(a, b, np.r_[b[:25], a[:25]]) == ["0.mid"] * 3, "what shares music with two joins all three"


def test_short_quotations_scales_and_trills_do_not_make_two_pieces_one():
    a, b = np.random.default_rng(4).integers(30, 90, (2, 100))
    scale, trill = 30 + np.cumsum([2, 2, 1, 2, 2, 2, 1] * 8), [60, 62] * 50
    assert works(np.r_[a, scale, trill], np.r_[b, a[:24], scale, trill]) == ["0.mid", "1.mid"]
    assert works(np.r_[a, scale, trill], np.r_[b, a[:25], scale, trill]) == ["0.mid", "0.mid"]
    assert works([], [60], [60]) == ["0.mid", "1.mid", "2.mid"]
    assert len({*works(a[:15], b[:15], a[:15], b[:15])}) == 4, "what is shared ends where a piece ends"


def test_recordings_of_the_same_music_are_never_on_two_sides(tmp_path):
    music = np.random.default_rng(5).integers(20, 80, (40, 60))
    takes = [piece(f"{take}/{n}.mid", pitches + take) for take in range(3) for n, pitches in enumerate(music)]
    pg.split_pieces(takes, tmp_path, pg.DataConfig(), range(128))
    sides = [{t.split for t in takes if t.path.endswith(f"/{n}.mid")} for n in range(40)]
    assert all(len(s) == 1 for s in sides) and set.union(*sides) == {"train", "validation"}


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_recording_without_a_given_side_goes_where_its_work_is_given(tmp_path, side):
    music = np.random.default_rng(6).integers(20, 80, (30, 60))
    given = [piece(f"{side}/{n}.mid", pitches) for n, pitches in enumerate(music)]
    loose = [piece(f"{n}.mid", pitches + 1) for n, pitches in enumerate(music)]
    pg.split_pieces([*loose, piece("validation/x.mid", []), *given], tmp_path, pg.DataConfig(), range(128))
    assert {p.split for p in loose} == {side}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("val_percent", [0.1, 99.0])
def test_few_files_still_have_a_validation_and_a_training_piece(count, val_percent, tmp_path):
    sides = split([f"{i}.mid" for i in range(count)], tmp_path, val_percent=val_percent)
    assert {*sides.values()} == {"train", "validation"}


def batches(ids=None, seed=3, transpose=5):
    """Batches over ids, or over numbers of which about half are pitches."""
    ids = torch.arange(1000).mul(7919).remainder(180).short() if ids is None else ids
    config = pg.Options(data=pg.DataConfig(transpose=transpose), model=pg.ModelConfig(block_size=32),
                       train=pg.TrainConfig(batch_size=4, seed=seed))
    return pg.Batches(ids, KINDS, config)


def test_batch_i_is_the_same_whatever_came_before():
    a, b = batches(), batches()
    for i in range(5):
        a[i]
    assert torch.equal(torch.cat(a[7], 1), torch.cat(b[7], 1))
    assert not torch.equal(a[7][0], a[8][0]) and not torch.equal(a[7][0], batches(seed=4)[7][0])


def test_shares_of_a_batch_make_the_batch(monkeypatch):
    whole, shares = batches()[3], []
    monkeypatch.setattr(pg, "PROCESSES", 2)
    for rank in range(2):
        monkeypatch.setattr(pg, "RANK", rank)
        shares.append(torch.cat(batches()[3], 1))
    assert torch.equal(torch.cat(shares), torch.cat(whole, 1))


@pytest.mark.parametrize("length", [5, 1000])
def test_targets_are_the_inputs_one_token_later_even_if_the_corpus_is_shorter(length):
    x, y = batches(torch.arange(length).short())[0]
    assert x.shape == (4, pg.MEMORY + 32) and torch.equal(x[:, pg.MEMORY + 1 :], y[:, :-1]) and y.shape == (4, 32)
    x, y = batches(torch.arange(length).short(), transpose=0)[0]
    assert torch.equal(x[:, 1:], (x[:, :-1] + 1) % length), "a short corpus begins again"
    assert torch.equal(y, (x[:, pg.MEMORY :] + 1) % length)


def test_every_token_of_the_corpus_is_drawn():
    part = batches(torch.arange(200).short(), transpose=0)
    assert {*torch.cat([part[i][1].flatten() for i in range(100)]).tolist()} == {*range(200)}


@pytest.mark.parametrize("seed", [0, 1])
def test_training_windows_are_spread_evenly_at_any_time(seed):
    part = batches(torch.arange(10_000).short(), seed=seed, transpose=0)
    part.openings = np.arange(10_000)  # as if a piece began everywhere
    starts = torch.cat([part[i][0][:, pg.MEMORY] for i in range(50)])
    for n in (len(starts) // 5, len(starts)):
        gaps = torch.cat([starts[:n], starts[:n].min()[None] + 10_000]).sort().values.diff()
        assert gaps.max() < 3 * gaps.min(), "of random numbers the largest gap is hundreds of times the smallest"


def test_every_eighth_window_begins_a_piece_all_pieces_as_often():
    ids = torch.full((3000,), 48).short()
    ids[[0, 1500, 2000, 2700]] = 1
    ids[[1, 1501, 2001, 2701]] = torch.tensor([100, 101, 102, 103]).short()
    part = batches(ids)
    x, y = (torch.cat([part[i][side][:, -32:] for i in range(160)]).view(80, 8, 32) for side in (0, 1))
    assert (x[:, 0, 0] == 1).all() and (x[:, 1:, 0] == 1).sum() < 10
    assert {*y[:, 0, 0].bincount()[100:].tolist()} <= {*range(15, 26)}


def test_transposing_moves_pitches_alone_and_never_out_of_the_piano():
    ids = torch.tensor([[3, 50, 60, 92], [4, 91, 100, 0], [80, 85, 2, 2], [6, 9, 2, 2]])
    moved = pg.transpose_ids(ids, torch.tensor([5, 5, 24, -5]), KINDS)
    assert moved.tolist() == [[3, 55, 65, 92], [4, 91, 100, 0], [86, 91, 2, 2], [4, 7, 2, 2]]


def test_transposing_moves_the_roots_of_chords_as_far_as_the_pitches():
    ids = torch.tensor([[200, 50, 211, 224], [212, 50, 223, 199], [205, 89, 217, 0]])
    moved = pg.transpose_ids(ids, torch.tensor([3, -1, 5]), KINDS)
    assert moved.tolist() == [[203, 53, 202, 224], [223, 49, 222, 199], [207, 91, 219, 0]]
    without = SimpleNamespace(pitches=KINDS.pitches, chords=slice(0, 0))
    assert pg.transpose_ids(ids, torch.tensor([3, 3, 3]), without)[0].tolist() == [200, 53, 211, 224]


def test_training_windows_are_transposed_both_ways():
    ids = torch.full((100,), 48).short()
    ids[0] = 1
    seen = torch.stack([batches(ids)[i][1][:, 5] for i in range(40)])
    seen = seen[seen != 1]
    assert {*seen.flatten().tolist()} == {*range(43, 54)}


@pytest.mark.parametrize("length", [0, 1, 2, 8, 9, 16, 17, 18, 31, 33, 100, 101])
@pytest.mark.parametrize("stride", [8, 16])
def test_windows_score_every_token_once_after_the_overlap_and_are_spread_evenly_up_to_a_limit(length, stride):
    x, y = pg.make_windows(np.arange(100, 100 + length), 16, stride)
    assert not len(x) or not x[0, : pg.MEMORY].any(), "nothing comes before the first window"
    assert all(torch.equal(row[pg.MEMORY - stride : pg.MEMORY], old[pg.MEMORY : pg.MEMORY + stride]) for old, row in zip(x, x[1:]))
    x = x[:, pg.MEMORY :]
    assert y[y != pg.IGNORE].tolist() == [*range(101, 100 + length)]
    assert ((x + 1 == y) | (y == pg.IGNORE)).all() and not (y == pg.IGNORE).all(1).any()
    assert all((y[row] != pg.IGNORE).nonzero().min() >= 16 - stride for row in range(1, len(x)))
    few, _ = pg.make_windows(np.arange(161), 16, stride, limit=4)
    assert few[:, pg.MEMORY].tolist() == [0, 48, 96, 144] and not len(pg.make_windows(np.arange(161), 16, 16, limit=0)[0])


def test_work_that_is_given_to_both_sides_is_held_out(tmp_path):
    music = np.random.default_rng(7).integers(20, 80, 60)
    takes = [piece("train/a.mid", music), piece("validation/b.mid", music + 1), piece("train/c.mid", music[::-1])]
    pg.split_pieces(takes, tmp_path, pg.DataConfig(), range(128))
    assert [p.split for p in takes] == ["validation", "validation", "train"]


def test_file_that_comes_while_others_are_read_is_not_taken_for_known(folder, vocab, monkeypatch):
    def usable_pieces(*args, real=pg.usable_pieces):
        pieces = real(*args)
        write_midi(folder / "late.mid", scale(70))
        return pieces

    monkeypatch.setattr(pg, "usable_pieces", usable_pieces)
    _, _, music = pg.prepare_data(pg.Options(run=pg.RunConfig(midi_dir=str(folder), cache_dir="")), vocab)
    assert len(music["files"]) == 12 and not any("late.mid" in file for file in music["files"])


def test_pieces_are_joined_between_bos_and_eos_and_held_out_music_is_validated_but_not_known(folder, vocab):
    config = pg.Options(run=pg.RunConfig(midi_dir=str(folder), cache_dir=""))
    train, (_, targets), music = pg.prepare_data(config, vocab)
    pieces, ids = pg.read_folder(folder, vocab, ""), {"train": [], "validation": []}
    pg.split_pieces(pieces, folder, config.data, vocab.pitches)
    for p in pieces:
        ids[p.split] += [vocab.bos, *p.ids.tolist(), vocab.eos]
    assert train.tolist() == ids["train"]
    assert targets[targets != pg.IGNORE].tolist() == ids["validation"][1:] != []
    assert music["pieces"] == [p.path for p in pieces if p.split == "train"]
    assert music["files"] == [f"{(folder / p.path).stat().st_size} {p.path}" for p in pieces]
