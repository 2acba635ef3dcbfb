"""Folder: MIDI files become pieces; pieces become works, and works are split."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FORKS, pg, scale, write_midi
from fuzz_midi import check, midi, note, tempo

VOCAB = pg.Vocabulary(pg.TokenSettings())


def plain(piece, **changes):
    """A piece as a dictionary that can be compared."""
    columns = {"ids": piece.ids.tolist(), "time": piece.time.tolist()}
    return vars(piece) | columns | {"pitch": piece.pitch.tolist()} | changes


def read(folder, cache="", vocab=VOCAB):
    """The pieces of a folder as such dictionaries."""
    return [plain(piece) for piece in pg.read_folder(folder, vocab, str(cache))]


def problems(folder, cache=""):
    """{path: problem} of the files of a folder that are skipped."""
    pieces = pg.read_folder(folder, VOCAB, str(cache))
    return {piece.path: piece.problem for piece in pieces if piece.problem}


def test_every_midi_file_in_any_case_and_depth_is_read_or_reported_by_name(folder, monkeypatch):
    names = ("b.Mid", "deep/er/a.MIDI", "._c.mid", ".hidden/d.mid", "e.mp3", "f.KAR")
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"piece{i:02d}.mid").rename(folder / name)
    monkeypatch.setattr(pg, "FILE_MEGABYTES", 0.005)
    (folder / "big.mid").write_bytes(b"x" * 10_000)
    (folder / "page.mid").write_text("<html>")
    (folder / "folder.mid").mkdir()
    (folder / "link.mid").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mid")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    expected = dict.fromkeys(("folder.mid", "link.mid", "pipe.mid"), "not a file")
    expected |= {"drums.mid": "only drums", "page.mid": "not a MIDI file"}
    expected |= {"big.mid": "larger than 0.005 MB"}
    good = ["b.Mid", "deep/er/a.MIDI", "f.KAR", *(f"piece{i:02d}.mid" for i in range(6, 12))]
    expected |= dict.fromkeys(good, "")
    found = [(piece["path"], piece["problem"]) for piece in read(folder)]
    assert found == sorted(expected.items())


def test_links_to_folders_are_followed_once_and_loops_noticed(folder, tmp_path, capsys):
    write_midi(tmp_path / "elsewhere" / "far.mid", scale(30))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in pg.find_files(folder)]
    assert len(found) == 13
    assert found[0] in ("link/far.mid", "same/far.mid")
    assert capsys.readouterr().out.count("leads to a folder that has already been read") == 2


def test_hidden_link_to_a_folder_does_not_hide_it(folder, tmp_path, capsys):
    (folder / ".cache").symlink_to(folder / "music")
    (folder / "music").mkdir()
    write_midi(folder / "music" / "a.mid", scale(30))
    assert folder / "music" / "a.mid" in pg.find_files(folder)
    assert capsys.readouterr().out == ""


def test_folder_that_cannot_be_listed_is_named(folder, monkeypatch, capsys):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (folder / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    assert len(pg.find_files(folder)) == 12
    assert capsys.readouterr().out == f"{folder}/closed cannot be listed: Permission denied\n"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_forked_and_spawned_workers_read_what_one_process_reads(platform, folder, monkeypatch):
    """FORKS stands for spawn: its processes inherit nothing either, all they get is pickled."""
    alone = []
    for path in sorted(folder.iterdir()):
        alone.append(plain(pg.read_piece(path.read_bytes(), VOCAB), path=path.name))
    real = multiprocessing.get_context
    contexts = {"linux": {"fork": real("fork")}, "darwin": {"spawn": FORKS}}
    monkeypatch.setattr(multiprocessing, "get_context", contexts[platform].__getitem__)
    monkeypatch.setattr(sys, "platform", platform)
    assert read(folder) == alone


def harm(monkeypatch, path, function, act):
    """Let a function of the script, in workers too, act before it gets the bytes of a file."""
    real = getattr(pg, function)
    content = path.read_bytes()

    def harmed(data, *args):
        if data == content:
            act()
        return real(data, *args)

    monkeypatch.setattr(pg, function, harmed)


def kill_worker():
    """End this process as a crash of the parser does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory():
    """Ask for twice as much memory as a worker gets."""
    bytearray(2 * pg.WORKER_GIGABYTES * 2**30)


def fail_to_read():
    """Fail as a disk does."""
    raise OSError(5, "Input/output error")


def test_file_that_harms_its_worker_costs_only_itself_and_another_day_is_tried_again(
    folder, tmp_path
):
    acts = {
        "piece03.mid": (kill_worker, "crashed its reader"),
        "piece05.mid": (signal.pause, "takes too long to read"),
        "piece07.mid": (fail_to_read, "Input/output error"),
    }
    if sys.platform == "linux":  # memory is limited there only
        acts["piece09.mid"] = (run_out_of_memory, "not enough memory")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pg, "FILE_SECONDS", 2)
        for name, (act, _) in acts.items():
            harm(monkeypatch, folder / name, "parse_midi", act)
        expected = {name: problem for name, (_, problem) in acts.items()}
        assert problems(folder, tmp_path / "cache") == expected
    assert not problems(folder, tmp_path / "cache")


def test_lone_file_that_kills_its_worker_is_reported(folder, monkeypatch):
    path = folder / "piece00.mid"
    harm(monkeypatch, path, "read_piece", kill_worker)
    [(_, piece, content)] = pg.read_in_workers([path], VOCAB)
    assert (piece.problem, content) == ("crashed its reader", "")


def test_file_whose_problem_may_pass_counts_as_unread_and_not_as_learned(folder, monkeypatch):
    files = pg.find_files(folder)
    harm(monkeypatch, folder / "piece00.mid", "read_piece", run_out_of_memory)
    pg.read_folder(folder, VOCAB, "", files)
    unread = [path.name for path, content in files.items() if content == pg.UNREAD]
    assert unread == ["piece00.mid"]


def test_damaged_table_of_splits_is_a_sentence(folder, tmp_path):
    (tmp_path / "maestro.csv").write_text('midi_filename,split\n"' + "x" * 200_000)
    with pytest.raises(pg.UserError, match=r"maestro\.csv is not a table"):
        pg.read_split_tables([pg.Piece(path="piece00.mid")], tmp_path)


def test_mistake_of_the_script_is_not_taken_for_a_damaged_file(folder, tmp_path):
    def blunder():
        raise IndexError("list index out of range")

    with pytest.MonkeyPatch.context() as monkeypatch:
        harm(monkeypatch, folder / "piece03.mid", "read_piece", blunder)
        with pytest.raises(RuntimeError, match=r"^reading .*/piece03\.mid failed$"):
            read(folder, tmp_path / "cache")
    assert not problems(folder, tmp_path / "cache")


def test_stray_note_or_absurd_tempo_does_not_flood_the_corpus(tmp_path):
    notes = [(i / 2, 0.5, 60 + i % 12, 80) for i in range(25)]
    write_midi(tmp_path / "far.mid", [[*notes, (1e6, 1, 60, 80)]])
    fast = midi([tempo(1)], [*note(60, 480), *note(62, 480, rest=2**28 - 1)])
    (tmp_path / "fast.mid").write_bytes(fast)
    write_midi(tmp_path / "slow.mid", [[(4 * i, 4, 60 + i, 80) for i in range(20)]])
    too_long = "longer than a day, or 86,400 quarter notes"
    assert problems(tmp_path) == {"far.mid": too_long, "fast.mid": too_long}
    stray = [[*notes, (3600, 1, 72, 80), (3640, 1, 60, 80)]]
    piece = pg.read_piece(write_midi(tmp_path / "stray.mid", stray).read_bytes(), VOCAB)
    assert piece.notes == 27
    assert piece.changes["empty bars cut from long silences"] == 888 + 1
    onsets = [n.time / 1920 for n in VOCAB.decode(piece.ids).tracks[0].notes]
    assert onsets[24:] == [3, 12, 21], "eight empty bars are left of each silence"


def test_broken_files_are_used_or_reported_and_the_good_ones_used():
    counts = check(140, long_notes=10_000)
    assert counts.total() == 140 + 15
    outcomes = {}
    for kind, outcome in counts:
        outcomes.setdefault(kind, set()).add(outcome)
    for kind in ("long", "pedal never lifted", "zero length", "many metres", "not UTF-8"):
        assert outcomes[kind] == {"used"}
    assert outcomes["only drums"] == {"only drums"}
    assert outcomes["zero ticks"] == {"zero ticks per quarter note"}
    assert outcomes["a folder"] == outcomes["a pipe"] == outcomes["a link"] == {"not a file"}


@pytest.fixture
def newly_read(monkeypatch):
    """A list that gets the number of files each time that some are read, not cached."""
    numbers = []
    real = pg.read_in_workers

    def read_in_workers(paths, vocab):
        numbers.append(len(paths))
        return real(paths, vocab)

    monkeypatch.setattr(pg, "read_in_workers", read_in_workers)
    return numbers


def test_cache_saves_reading_and_notices_changed_content_and_settings(folder, tmp_path, newly_read):
    cache = tmp_path / "cache"
    first = folder / "piece00.mid"
    (folder / "page.mid").write_text("<html>")
    assert read(folder, cache) == read(folder, cache) == read(folder)
    assert newly_read == [13, 13], "problems are kept too"
    before = first.stat()
    write_midi(first, scale(40))
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = plain(pg.read_piece(first.read_bytes(), VOCAB), path="piece00.mid")
    assert read(folder, cache)[1] == changed
    assert newly_read == [13, 13, 1]
    first.write_bytes((folder / "piece07.mid").read_bytes())
    pieces = read(folder, cache)
    assert pieces[1]["ids"] == pieces[8]["ids"]
    assert newly_read == [13, 13, 1], "the same content is known by any name"
    read(folder, cache, pg.Vocabulary(pg.TokenSettings(velocities=16)))
    assert newly_read == [13, 13, 1, 13]


def test_damaged_entries_of_the_cache_are_read_again_and_written_over(folder, tmp_path, newly_read):
    cache = tmp_path / "cache"
    pieces = read(folder, cache)
    [entry] = cache.rglob("*.safetensors")
    good = entry.read_bytes()
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (b"damaged", good[: len(good) // 2], flipped):
        entry.write_bytes(damaged)
        assert read(folder, cache) == pieces
        assert len(entry.read_bytes()) == len(good)
    assert newly_read == [12] * 4
    assert read(folder, cache) == pieces
    assert newly_read == [12] * 4, "the last was written over"


def test_reading_that_is_killed_loses_no_more_than_since_the_last_save(
    folder, tmp_path, newly_read, monkeypatch
):
    monkeypatch.setattr(pg, "CACHE_SECONDS", 0)
    pieces = read(folder, tmp_path / "cache")
    entries = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(entries) == 12
    for entry in entries[:5]:
        entry.unlink()
    assert read(folder, tmp_path / "cache") == pieces
    assert newly_read == [12, 5]


def test_only_an_edit_of_how_music_is_read_makes_a_new_cache(tmp_path, monkeypatch):
    source = Path(pg.__file__).read_text()
    edited = tmp_path / "edited.py"
    monkeypatch.setattr(pg, "__file__", str(edited))
    edited.write_text(source)
    folder = pg.cache_folder("cache", VOCAB)
    for old, is_music in (("CHANGE_COST = ", True), ("FILE_SECONDS = ", False)):
        assert source.count(old) == 1
        edited.write_text(source.replace(old, f"{old}1 + "))
        assert (pg.cache_folder("cache", VOCAB) != folder) == is_music


def piece(path, pitches=()):
    """A piece of these MIDI pitches; without any, of tokens that are no music but its own."""
    ids = [VOCAB.id_of[f"Pitch_{pitch}"] for pitch in pitches]
    if not ids:
        ids = [VOCAB.duration_ids.start + byte for byte in path.encode()]
    return pg.Piece(path=path, work=path, ids=np.array(ids, np.int16))


def split(pieces, folder, **data):
    """{path: split} of pieces, or of the names of pieces without music."""
    pieces = [piece(one) if isinstance(one, str) else one for one in pieces]
    pg.split_pieces(pieces, Path(folder), pg.DataSettings(**data), VOCAB)
    return {piece.path: piece.split for piece in pieces}


def test_split_is_the_same_in_every_process_and_moves_no_old_piece_when_a_new_one_comes(tmp_path):
    names = [f"{i}.mid" for i in range(300)]
    before = split(names, tmp_path)
    after = split([*names, "new.mid", "b.mid"], tmp_path)
    assert before.items() <= after.items()
    held_out = [name for name, side in before.items() if side == "validation"]
    assert held_out[:3] == ["6.mid", "16.mid", "18.mid"] and 15 <= len(held_out) <= 50
    assert {*split(names, tmp_path, val_percent=0.0).values()} == {"train"}


def test_folders_named_train_validation_and_test_are_honoured(tmp_path):
    names = ["validation/b.mid", "x/test/c.mid", *(f"train/{i}.mid" for i in range(50))]
    assert [*split(names, tmp_path).values()] == ["validation", "test"] + ["train"] * 50


def test_csv_is_honoured_and_one_that_is_none_or_points_elsewhere_stops_nothing(tmp_path):
    (tmp_path / "m" / "maestro-folder.csv").mkdir(parents=True)
    os.mkfifo(tmp_path / "m" / "maestro-pipe.csv")
    rows = ["midi_filename,split", "2004/0.mid,train", "2004/1.mid,validation", "2004/2.mid,test"]
    rows += ["/etc/a.mid,test", "../../b.mid,test", "2004/3.mid,train"]
    (tmp_path / "m" / "maestro-v3.0.0.csv").write_text("\n".join(rows))
    (tmp_path / "m" / "other.csv").write_text("midi_filename,split\n2004/3.mid,test")
    sides = split([f"m/2004/{i}.mid" for i in range(4)], tmp_path)
    assert [*sides.values()] == ["train", "validation", "test", "train"]


def test_csv_in_a_linked_folder_is_honoured(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "midi").mkdir()
    (tmp_path / "midi" / "maestro").symlink_to(tmp_path / "data")
    rows = ["midi_filename,split", "a.mid,test", "b.mid,validation", "c.mid,train"]
    (tmp_path / "data" / "maestro-v3.0.0.csv").write_text("\n".join(rows))
    sides = split([f"maestro/{name}.mid" for name in "abc"], tmp_path / "midi")
    assert [*sides.values()] == ["test", "validation", "train"]


def test_files_of_one_folder_are_one_work_if_asked(tmp_path):
    names = [f"{work}/{take}.mid" for work in range(60) for take in range(4)]
    for together in (True, False):
        sides = [*split(names, tmp_path, piece_is_folder=together).values()]
        assert {*sides} == {"train", "validation"}
        of_works = [sides[n : n + 4] for n in range(0, 240, 4)]
        assert all(len({*side}) == 1 for side in of_works) == together


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("val_percent", [0.1, 99.0])
def test_few_files_still_have_a_validation_and_a_training_piece(number, val_percent, tmp_path):
    sides = split([f"{i}.mid" for i in range(number)], tmp_path, val_percent=val_percent)
    assert {*sides.values()} == {"train", "validation"}


def works(*music):
    """The works to which pieces of these pitches are assigned."""
    pieces = [piece(f"{i}.mid", pitches) for i, pitches in enumerate(music)]
    pg.join_recordings(pieces, VOCAB)
    first = {}  # {work: its first piece}
    return [first.setdefault(piece.work, piece.path) for piece in pieces]


def test_recordings_of_the_same_music_are_found_whatever_their_key_and_mistakes():
    a, b, c = np.random.default_rng(3).integers(30, 90, (3, 200))
    wrong = a.copy()
    wrong[::40] += 1  # a wrong note every 40
    found = works(a, b, wrong + 3, c, b[100:])
    assert found == ["0.mid", "1.mid", "0.mid", "3.mid", "1.mid"]
    joins = np.r_[b[:25], a[:25]]
    assert works(a, b, joins) == ["0.mid"] * 3, "what shares music with two joins all three"


def test_short_quotations_scales_and_trills_do_not_make_two_pieces_one():
    a, b = np.random.default_rng(4).integers(30, 90, (2, 100))
    common = np.r_[30 + np.cumsum([2, 2, 1, 2, 2, 2, 1] * 6), [60, 62] * 50]  # scale, trill
    assert works(np.r_[a, common], np.r_[b, a[:24], common]) == ["0.mid", "1.mid"]
    assert works(np.r_[a, common], np.r_[b, a[:25], common]) == ["0.mid", "0.mid"]
    assert works([60, 61], [60], [60]) == ["0.mid", "1.mid", "1.mid"], "copies are one work"
    ends = works(a[:15], b[:15], a[:15] + 1, b[:15] + 1)
    assert len({*ends}) == 4, "what is shared ends where a piece ends"


def test_hashes_of_passages_are_equal_where_the_passages_are():
    rng = np.random.default_rng(8)
    intervals = rng.integers(120, 136, 5000).astype(np.uint8)
    intervals[rng.integers(0, 5000, 40)] = pg.PIECE_END
    intervals[1000:1100] = intervals[3000:3100]
    intervals[200:300:2] = 130
    hashes = pg.hash_passages(intervals)
    assert len(hashes) == 5000 - pg.SAME_MUSIC + 1
    of_passage = {}
    for at, found in enumerate(hashes.tolist()):
        passage = intervals[at : at + pg.SAME_MUSIC].tobytes()
        tells = pg.PIECE_END not in passage and len(set(passage)) >= pg.SAME_DIFFERENT
        assert (found != pg.NO_HASH) == tells
        if tells:
            of_passage.setdefault(passage, set()).add(found)
    hashes = [found for [found] in of_passage.values()]
    assert len(set(hashes)) == len(hashes) > 2000
    assert len(pg.hash_passages(intervals[:5])) == 0


def test_equal_hashes_of_different_passages_join_nothing():
    intervals = np.random.default_rng(9).integers(100, 140, 100).astype(np.uint8)
    intervals[60:100] = intervals[10:50]
    hashes = np.zeros(100, np.uint64)
    for places in ([0, 30], [10, 60]):
        hashes[places] = 7 + places[0]
    piece_of = np.repeat([0, 1, 2], [25, 25, 50])
    places = np.flatnonzero(hashes)
    pairs = pg.pairs_that_share(places, hashes, intervals, piece_of, np.arange(3))
    assert pairs == [[0, 2]]
    assert pg.pairs_that_share(places, hashes, intervals, piece_of, np.array([0, 1, 0])) == []


def test_music_in_parts_is_joined_as_in_one(monkeypatch):
    a, b, c = np.random.default_rng(10).integers(30, 90, (3, 300))
    monkeypatch.setattr(pg, "HASH_PART", 50)
    found = works(a, b, np.r_[c[:100], a[130:155]], np.r_[c[100:], b[40:64]])
    assert found == ["0.mid", "1.mid", "0.mid", "3.mid"]


def test_new_files_neither_move_nor_rename_a_work(tmp_path):
    music = np.random.default_rng(11).integers(21, 80, (400, 60))
    old = [piece(f"m{n}.mid", pitches) for n, pitches in enumerate(music[:200])]
    before = split(old, tmp_path)
    names = [one.work for one in old]
    new = [piece(f"a{n}.mid", pitches) for n, pitches in enumerate(music[200:])]
    after = split([*new, *old], tmp_path)
    assert before.items() <= after.items()
    assert [one.work for one in old] == names
    renamed = [piece(f"z{n}.mid", pitches) for n, pitches in enumerate(music[:200])]
    assert [*split(renamed, tmp_path).values()] == [*before.values()]


def test_recordings_of_the_same_music_are_never_on_two_sides(tmp_path):
    music = np.random.default_rng(5).integers(21, 80, (40, 60))
    takes = []
    for take in range(3):
        takes += [piece(f"{take}/{n}.mid", pitches + take) for n, pitches in enumerate(music)]
    sides = [*split(takes, tmp_path).values()]
    assert sides[:40] == sides[40:80] == sides[80:]
    assert {*sides} == {"train", "validation"}


@pytest.mark.parametrize("side", pg.SPLITS)
def test_recording_without_a_given_side_goes_where_its_work_is_given(tmp_path, side):
    music = np.random.default_rng(6).integers(21, 80, (30, 60))
    given = [piece(f"{side}/{n}.mid", pitches) for n, pitches in enumerate(music)]
    loose = [piece(f"{n}.mid", pitches + 1) for n, pitches in enumerate(music)]
    other = {"train": "validation", "validation": "train", "test": "train"}[side]
    sides = split([*given, *loose, piece(f"{other}/x.mid")], tmp_path)
    assert {sides[piece.path] for piece in loose} == {side}


def test_work_that_is_given_to_both_sides_is_held_out(tmp_path):
    music = np.random.default_rng(7).integers(21, 80, 60)
    names = ("train/a.mid", "validation/b.mid", "train/c.mid")
    takes = [piece(name, music + n) for n, name in enumerate(names)]
    sides = split([*takes, piece("train/d.mid", music[::-1])], tmp_path)
    assert [*sides.values()] == ["validation"] * 3 + ["train"]


def settings_of(folder):
    """The default settings for a folder, without a cache."""
    return pg.Settings(program=pg.ProgramSettings(midi_dir=str(folder), cache_dir=""))


def test_file_that_comes_while_others_are_read_is_not_taken_for_known(folder, monkeypatch):
    real = pg.read_music

    def read_music(*args):
        pieces = real(*args)
        write_midi(folder / "late.mid", scale(70))
        return pieces

    monkeypatch.setattr(pg, "read_music", read_music)
    _, _, learned = pg.prepare_data(settings_of(folder), VOCAB)
    assert len(learned.files) == 12 and not any("late.mid" in file for file in learned.files)


def test_held_out_music_is_validated_but_neither_trained_on_nor_known(folder):
    corpus, windows, learned = pg.prepare_data(settings_of(folder), VOCAB)
    pieces = pg.read_folder(folder, VOCAB, "")
    pg.split_pieces(pieces, folder, pg.DataSettings(), VOCAB)
    train = [piece for piece in pieces if piece.split == "train"]
    held_out = [piece for piece in pieces if piece.split == "validation"]
    assert 0 < len(held_out) < 12
    assert corpus.ids.tolist() == np.concatenate([piece.ids for piece in train]).tolist()
    scored = windows.targets[windows.targets != pg.IGNORE]
    assert scored.tolist() == np.concatenate([piece.ids[1:] for piece in held_out]).tolist()
    assert learned.pieces == [piece.path for piece in train]
    known = b"".join(pg.pitch_intervals(piece.ids, VOCAB) for piece in train)
    assert bytes(learned.tensors["intervals"].tolist()) == known
    assert learned.files == pg.list_contents(pg.find_files(folder), folder)
    assert [file.split(" ")[1] for file in learned.files] == [piece.path for piece in pieces]
