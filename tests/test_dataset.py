"""Room 3: a folder becomes pieces, pieces a split, ids become batches."""

import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, pg, scale, write_midi
from fuzz_midi import check

PITCHES = range(4, 92)


def read(folder, cache=""):
    """The pieces of a folder and what was skipped."""
    return pg.read_folder(folder, pg.MusicConfig(), str(cache))


def split(names, folder, **data):
    """The side of each of these paths."""
    pieces = [pg.Piece(name, pg.Encoded()) for name in names]
    pg.split_pieces(pieces, folder, pg.DataConfig(**data), PITCHES)
    return {p.path: p.split for p in pieces}


def test_every_file_is_read_or_reported_by_name(folder):
    (folder / "page.mid").write_text("<html>")
    (folder / "folder.mid").mkdir()
    (folder / "link.mid").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mid")
    write_midi(folder / "drums.mid", [[(0, 1, 38, 90)]], drums=[0])
    pieces, skipped = read(folder)
    assert [p.path for p in pieces] == [f"piece{i:02d}.mid" for i in range(12)]
    assert set(skipped) == {"page.mid", "folder.mid", "link.mid", "pipe.mid", "drums.mid"}
    assert skipped["pipe.mid"] == "not a file" and skipped["drums.mid"] == "only drums"


def test_parallel_reading_gives_what_one_process_gives(folder, tokenizer):
    for piece in read(folder)[0]:
        alone = pg.encode_file(folder / piece.path, tokenizer, pg.MusicConfig())
        assert np.array_equal(alone.ids, piece.encoded.ids)


def test_workers_that_are_spawned_as_elsewhere_than_on_linux_read_the_same(folder, monkeypatch):
    forked = [p.encoded.ids for p in read(folder)[0]]
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # one worker: each has to import PyTorch
    assert all(np.array_equal(a, p.encoded.ids) for a, p in zip(forked, read(folder)[0], strict=True))


def test_file_that_kills_or_hangs_its_worker_costs_that_file_alone(folder, monkeypatch):
    def encode_file(path, tokenizer, music):
        if path.name == "piece03.mid":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "piece05.mid":
            time.sleep(60)
        return real(path, tokenizer, music)

    real = pg.encode_file
    monkeypatch.setattr(pg, "encode_file", encode_file)  # the forked workers see it too
    monkeypatch.setattr(pg, "FILE_SECONDS", 2)
    pieces, skipped = read(folder)
    assert len(pieces) == 10
    assert "crashed" in skipped["piece03.mid"] and "longer than" in skipped["piece05.mid"]


def test_five_hundred_broken_files_are_used_or_reported_and_the_good_ones_used():
    counts = check(500)
    assert counts.total() == 500 + 15
    outcomes = {kind: {outcome for k, outcome in counts if k == kind} for kind, _ in counts}
    assert outcomes["a million notes.mid"] == outcomes["pedal never lifted"] == outcomes["zero length"] == {"used"}
    assert outcomes["only drums"] == {"only drums"} and outcomes["a pipe.mid"] == outcomes["a link.mid"] == {
        "not a file"
    }
    assert outcomes["zero ticks"] == {"no ticks in a quarter note"}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_file_that_needs_too_much_memory_fails_alone(folder, monkeypatch):
    def read_piano(data, fold):
        if data == greedy:
            np.ones(2**31).tolist()
        return real(data, fold)

    real, greedy = pg.read_piano, (folder / "piece03.mid").read_bytes()
    monkeypatch.setattr(pg, "read_piano", read_piano)
    pieces, skipped = read(folder)
    assert len(pieces) == 11 and "MemoryError" in skipped["piece03.mid"] or "allocate" in skipped["piece03.mid"]


def test_file_of_more_megabytes_than_music_has_is_not_opened(folder, monkeypatch):
    monkeypatch.setattr(pg, "FILE_MEGABYTES", 0.0005)
    (folder / "big.mid").write_bytes(b"x" * 1000)
    assert "larger than" in read(folder)[1]["big.mid"]


def test_cache_is_used_and_notices_a_changed_file_and_a_changed_setting(folder, tmp_path, monkeypatch):
    encoded = []
    real = pg.encode_in_workers
    monkeypatch.setattr(pg, "encode_in_workers", lambda paths, music: encoded.append(len(paths)) or real(paths, music))
    first = read(folder, tmp_path / "cache")[0]
    second = read(folder, tmp_path / "cache")[0]
    assert all(np.array_equal(a.encoded.ids, b.encoded.ids) for a, b in zip(first, second))
    old = (folder / "piece00.mid").stat()
    write_midi(folder / "piece00.mid", scale(7))
    os.utime(folder / "piece00.mid", ns=(old.st_atime_ns, old.st_mtime_ns))
    read(folder, tmp_path / "cache")
    pg.read_folder(folder, pg.MusicConfig(grid=4), str(tmp_path / "cache"))
    assert encoded == [12, 0, 0, 12], "piece00 is now the same music as piece07, which is known"


def test_split_by_hash_moves_no_old_piece_when_a_new_one_comes(tmp_path):
    names = [f"{i}.mid" for i in range(300)]
    before, after = split(names, tmp_path), split([*names, "new.mid", "b.mid"], tmp_path)
    assert all(after[n] == before[n] for n in names)
    assert 15 <= list(before.values()).count("validation") <= 50


def test_folders_named_train_validation_and_test_are_honoured(tmp_path):
    names = ["train/a.mid", "validation/b.mid", "test/c.mid", *(f"train/{i}.mid" for i in range(50))]
    sides = split(names, tmp_path)
    assert all(sides[n] == n.split("/")[0] for n in names)


def test_maestro_csv_is_honoured(tmp_path):
    (tmp_path / "m").mkdir()
    rows = [f"2004/{i}.mid,{s}" for i, s in enumerate(("train", "validation", "test", "train"))]
    (tmp_path / "m" / "maestro.csv").write_text("midi_filename,split\n" + "\n".join(rows))
    sides = split([f"m/2004/{i}.mid" for i in range(4)], tmp_path)
    assert list(sides.values()) == ["train", "validation", "test", "train"]


def test_recordings_of_one_piece_stay_on_one_side(tmp_path):
    names = [f"{piece}/{take}.mid" for piece in range(60) for take in range(4)]
    together = split(names, tmp_path, piece_is_folder=True)
    assert all(len({together[f"{p}/{t}.mid"] for t in range(4)}) == 1 for p in range(60))
    apart = split(names, tmp_path)
    assert any(len({apart[f"{p}/{t}.mid"] for t in range(4)}) == 2 for p in range(60))
    assert "validation" in together.values()


def works(*pieces):
    """The works to which these sequences of pitches are assigned."""
    pieces = [
        pg.Piece(f"{i}.mid", pg.Encoded(ids=np.array(p, np.int16)), work=f"{i}.mid") for i, p in enumerate(pieces)
    ]
    pg.join_recordings(pieces, range(0, 108))
    return [p.work for p in pieces]


def test_recordings_of_the_same_music_are_found_whatever_their_key_and_mistakes():
    rng = np.random.default_rng(3)
    a, b, c = (rng.integers(30, 90, 200) for _ in range(3))
    wrong = a.copy()
    wrong[::40] += 1  # a wrong note every 40
    assert works(a, b, wrong + 3, c, b[100:]) == ["0.mid", "1.mid", "0.mid", "3.mid", "1.mid"]
    assert works(a, b, np.r_[b[:25], a[:25]]) == ["0.mid"] * 3, "what shares music with two joins all three"


def test_short_quotations_scales_and_trills_do_not_make_two_pieces_one():
    rng = np.random.default_rng(4)
    a, b = rng.integers(30, 90, (2, 100))
    scale, trill = 30 + np.cumsum([2, 2, 1, 2, 2, 2, 1] * 8), [60, 62] * 50
    assert works(np.r_[a, scale, trill], np.r_[b, a[:24], scale, trill]) == ["0.mid", "1.mid"]
    assert works(np.r_[a, scale, trill], np.r_[b, a[:25], scale, trill]) == ["0.mid", "0.mid"]
    assert works([], [60], [60]) == ["0.mid", "1.mid", "2.mid"]


def test_recordings_of_the_same_music_are_never_on_two_sides(tmp_path):
    rng = np.random.default_rng(5)
    pieces = [rng.integers(20, 80, 60) for _ in range(40)]
    takes = [
        pg.Piece(f"{take}/{n}.mid", pg.Encoded(ids=(p + take).astype(np.int16)))
        for take in range(3)
        for n, p in enumerate(pieces)
    ]
    pg.split_pieces(takes, tmp_path, pg.DataConfig(), range(0, 108))
    sides = [{t.split for t in takes if t.path.endswith(f"/{n}.mid")} for n in range(40)]
    assert all(len(s) == 1 for s in sides) and {"train"} in sides and {"validation"} in sides


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_recording_without_a_given_side_goes_where_its_work_is_given(tmp_path, side):
    rng = np.random.default_rng(6)
    music = [rng.integers(20, 80, 60) for _ in range(30)]
    given = [pg.Piece(f"{side}/{n}.mid", pg.Encoded(ids=p.astype(np.int16))) for n, p in enumerate(music)]
    loose = [pg.Piece(f"{n}.mid", pg.Encoded(ids=(p + 1).astype(np.int16))) for n, p in enumerate(music)]
    pg.split_pieces([*loose, pg.Piece("validation/x.mid", pg.Encoded()), *given], tmp_path, pg.DataConfig(), range(108))
    assert {p.split for p in loose} == {side}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_files_still_have_a_validation_piece(count, tmp_path):
    sides = list(split([f"{i}.mid" for i in range(count)], tmp_path).values())
    assert "validation" in sides and "train" in sides


def test_piece_left_to_train_on_is_the_same_in_every_process(tmp_path):
    names = [f"{i}.mid" for i in range(6)]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pianogpt as pg\n"
        "pieces = [pg.Piece(name, pg.Encoded()) for name in sys.argv[3:]]\n"
        "pg.split_pieces(pieces, pg.Path(sys.argv[2]), pg.DataConfig(val_percent=99), range(9)); print([p.split for p in pieces])"
    )
    command = [sys.executable, "-c", code, str(Path(pg.__file__).parent), str(tmp_path), *names]
    seeds = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in (1, 2)]
    one, two = (subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for env in seeds)
    assert one == two == f"{list(split(names, tmp_path, val_percent=99).values())}\n" and one.count("'train'") == 1


def test_csv_that_is_none_or_points_elsewhere_stops_nothing(tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "out.csv").write_text("midi_filename,split\n/etc/a.mid,test\n../b.mid,test\na.mid,test\n")
    assert split(["a.mid", "b.mid", "c.mid"], tmp_path)["a.mid"] == "test"
    assert "folder.csv cannot be read as a table" in capsys.readouterr().out


def batches(ids=None, **changes):
    """Batches over random ids in which about half are pitches."""
    ids = torch.arange(1000).mul(7919).remainder(180).short() if ids is None else ids
    return pg.Batches(
        **{"ids": ids, "pitches": PITCHES, "batch_size": 4, "block_size": 32, "transpose": 5, "seed": 3} | changes
    )


def test_batch_i_is_the_same_whatever_came_before():
    a, b = batches(), batches()
    for i in range(5):
        a[i]
    assert torch.equal(torch.stack(a[7]), torch.stack(b[7]))
    assert not torch.equal(a[7][0], a[8][0])
    assert not torch.equal(a[7][0], batches(seed=4)[7][0])


def test_targets_are_the_inputs_one_token_later():
    x, y = batches(transpose=0)[0]
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])


def test_every_token_of_the_corpus_is_drawn():
    ids = torch.arange(200).short()
    drawn = torch.cat([batches(ids, transpose=0)[i][1].flatten() for i in range(100)])
    assert set(drawn.tolist()) == set(range(1, 200))


def test_transposing_moves_pitches_alone_and_never_out_of_the_piano():
    ids = torch.tensor([[3, 50, 60, 92], [4, 91, 100, 0], [80, 85, 2, 2]])
    moved = pg.transpose_ids(ids, torch.tensor([5, 5, 24]), PITCHES)
    assert moved.tolist() == [[3, 55, 65, 92], [4, 91, 100, 0], [86, 91, 2, 2]]


def test_training_windows_are_transposed_both_ways():
    ids = torch.full((100,), 48).short()
    seen = {batches(ids)[i][0][row, 0].item() for i in range(40) for row in range(4)}
    assert seen == set(range(43, 54))


def test_corpus_shorter_than_a_window_still_makes_batches():
    assert batches(torch.arange(5).short())[0][0].shape == (4, 32)


@pytest.mark.parametrize("length", [2, 8, 9, 16, 17, 18, 31, 100, 101])
def test_sliding_windows_score_every_token_once_with_half_a_window_before_it(length):
    ids, T = np.arange(100, 100 + length), 16
    x, y = pg.sliding_windows(ids, T)
    scored = y[y != pg.IGNORE]
    assert sorted(scored.tolist()) == list(range(101, 100 + length))
    for row in range(len(x)):
        at = (y[row] != pg.IGNORE).nonzero()[:, 0]
        assert torch.equal(x[row][at] + 1, y[row][at])
        assert row == 0 or at.min() >= T // 2


@pytest.mark.parametrize("length", [0, 1, 2, 17, 33, 1000])
def test_validation_windows_lie_side_by_side_and_score_no_padding(length):
    x, y = pg.validation_windows(np.arange(length), 16, limit=10_000)
    assert y[y != pg.IGNORE].tolist() == list(range(1, length))
    assert len(pg.validation_windows(np.arange(length), 16, limit=4)[0]) == min(4, len(x))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, breaking the connection after `breaks` many bytes, once for each of them."""

    content, breaks, ranges, asked = b"", [], True, []

    def do_GET(self):  # noqa: N802
        wanted = self.headers["Range"]
        Server.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted and self.ranges else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][: Server.breaks.pop(0) if Server.breaks else None])

    def log_message(self, *args):
        pass


def archive(files, **more):
    """The bytes of a zip of these files, {name: bytes}, and of more beside it."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as content:
        for name, text in {**files, **more}.items():
            content.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server on this machine that stands for MAESTRO's, with three pieces."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = [f"small-v1/2004/{i}.midi" for i in range(3)]
    table = "midi_filename,split\n" + "".join(
        f"2004/{i}.midi,{s}\n" for i, s in enumerate(("train", "validation", "test"))
    )
    data = [write_midi(tmp_path / "source" / f"{i}.mid", scale(i)).read_bytes() for i in range(3)]
    Server.files = dict(zip(names, data)) | {"small-v1/small-v1.csv": table}
    Server.content, Server.breaks, Server.ranges, Server.asked = archive(Server.files), [], True, []
    url = f"http://127.0.0.1:{server.server_port}/small.zip"
    monkeypatch.setitem(pg.COLLECTIONS, "maestro", (url, "small-v1", 3, "CC TEST"))
    monkeypatch.setattr(pg.time, "sleep", lambda seconds: None)
    yield tmp_path / "midi"
    server.shutdown()
    server.server_close()


def test_collection_is_fetched_unpacked_split_as_its_table_says_and_not_fetched_again(served, capsys):
    pg.fetch_collection("maestro", served)
    assert "CC TEST" in capsys.readouterr().out
    pieces, skipped = read(served)
    pg.split_pieces(pieces, served, pg.DataConfig(), PITCHES)
    assert [p.split for p in pieces] == ["train", "validation", "test"] and not skipped
    assert [p.name for p in served.iterdir()] == ["small-v1"], "nothing else is left behind"
    pg.fetch_collection("maestro", served)
    assert Server.asked == [None] and "CC TEST" in capsys.readouterr().out


def test_collection_is_fetched_before_a_training_that_asks_for_it(served, monkeypatch, capsys):
    monkeypatch.chdir(served.parent)
    assert pg.main(["--download", "maestro", "--midi-dir", str(served), *TINY, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("maestro: 3 files") and "(1 train, 1 validation, 1 test)" in out


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_download_goes_on_where_it_stopped_or_begins_anew(ranges, served):
    Server.breaks, Server.ranges = [100, 50], ranges
    pg.fetch_collection("maestro", served)
    assert Server.asked == [None, "bytes=100-", "bytes=150-" if ranges else "bytes=50-"]
    assert (served / "small-v1/2004/1.midi").read_bytes() == Server.files["small-v1/2004/1.midi"]


def test_download_that_always_breaks_is_a_sentence_and_the_next_command_goes_on(served):
    Server.breaks = [10] * pg.DOWNLOAD_TRIES
    with pytest.raises(pg.UserError, match="goes on with it later"):
        pg.fetch_collection("maestro", served)
    pg.fetch_collection("maestro", served)
    assert Server.asked[-1] == f"bytes={10 * pg.DOWNLOAD_TRIES}-" and (served / "small-v1").is_dir()


def test_whole_part_of_a_run_that_ended_before_it_was_renamed_is_used(served):
    served.mkdir()
    (served / "small.zip.part").write_bytes(Server.content)
    pg.fetch_collection("maestro", served)
    assert len(read(served)[0]) == 3


@pytest.mark.parametrize("damage", ["bits", "count", "cut", "folder"])
def test_damaged_archive_is_removed_and_said(damage, served):
    whole, few = Server.content, dict(list(Server.files.items())[1:])
    other = {"other/" + name: data for name, data in Server.files.items()}
    at = whole.index(b"MThd") + 30
    bits = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    Server.content = {"bits": bits, "count": archive(few), "cut": whole[:-50], "folder": archive(other)}[damage]
    with pytest.raises(pg.UserError, match="damaged"):
        pg.fetch_collection("maestro", served)
    assert not list(served.iterdir())
    Server.content = whole
    pg.fetch_collection("maestro", served)
    assert len(read(served)[0]) == 3


@pytest.mark.parametrize("name", ["../escaped.mid", "/tmp/pianogpt-escaped.mid", "small-v1/../../../escaped.mid"])
def test_archive_that_would_write_elsewhere_is_refused(name, served):
    Server.content = archive(Server.files, **{name: b""})
    with pytest.raises(pg.UserError, match="outside"):
        pg.fetch_collection("maestro", served)
    assert not list(served.parent.rglob("*escaped*")) and not (served / "small-v1").exists()
