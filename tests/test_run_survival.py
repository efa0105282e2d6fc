"""Runs that are killed, cut short, out of disk or in each other's way: what is finished stays, and nothing twice.

Processes are forked from one that has loaded everything (`serve`), so that killing and resuming costs no start-up.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import resid_surgery as rs
from resid_surgery.experiments import folder as folders
from resid_surgery.experiments.work import Worker

KILLS = int(os.environ.get("RESID_SURGERY_KILLS", "20"))
N = 26
TABLES = ("prompts", "rows", "located", "failures")
PLAN = {
    "axes": {"k": [1, 3], "draw": [0, 1]},
    "locate": {"best": {"kind": "neuron", "k": "$k"}, "others": {"like": "best", "draw": "$draw"}},
    "intervene": {
        "best": {"kind": "Zero", "sites": "$best"},
        "others": {"kind": "Zero", "sites": "$others"},
        "heads": {"kind": "Scale", "sites": "L1.H*", "factor": 0.5, "each": True},
    },
}
SMALL = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}, "measure": "bs"}
PAIR = [{"ids": [5, 4, 3], "target": 1}, {"ids": [9, 8], "target": 2}]


def many(n=N):
    """Prompts of mixed lengths; every thirteenth cannot be run."""
    rng = random.Random(7)
    made = []
    for i in range(n):
        target = 10**6 if i % 13 == 12 else rng.randrange(97)
        ids = [rng.randrange(97) for _ in range(rng.choice((2, 3, 5, 8)))]
        made.append({"ids": ids, "target": target, "versus": [(target + 1) % 97], "split": "ab"[i % 2]})
    return made


def facts():
    return [*rs.facts("capital")[:12], *rs.facts("language")[:12]]


@cache
def opened():
    return rs.load(rs.tiny("llama"))


def go(out, plan=SMALL, prompts=None, **options):
    given = {"max_failures": None, "save_every": 0.0, "progress": False} | options
    return rs.run(opened(), PAIR if prompts is None else prompts, plan, out=out, **given)


def ended(out, kind):
    """The error that stops a run, or None."""
    try:
        go(out)
    except kind as error:
        return error
    return None


# ---- a process that forks


def serve(kind):
    """Load everything; then for every line of stdin fork a run, say its pid, and how it ended."""
    torch.set_num_threads(1)
    model = opened() if kind == "tiny" else rs.load("smollm2-135m")
    prompts = many() if kind == "tiny" else facts()
    say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stdin = open(os.devnull)  # noqa: SIM115
            inject(job)
            rs.run(model, prompts, PLAN, out=job["out"], max_failures=None, save_every=job["save_every"])
            return
        say(pid)
        say(os.waitpid(pid, 0)[1])


def say(what):
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def inject(job):
    """Let a forked run die at the n-th call of a function, or stand still after its first prompt."""
    if "die" in job:
        name, at, after = job["die"]
        real, count = getattr(os, name), itertools.count(1)

        def dying(*args, **options):
            last = next(count) == at
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*args, **options)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(os, name, dying)
    if job.get("stall"):
        real_run = Worker.run

        def stalling(self, group, skip=()):
            for outcome in real_run(self, group, skip):
                yield outcome
                time.sleep(600)

        Worker.run = stalling


class Server:
    """The other end of `serve`."""

    def __init__(self, kind):
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout.readline() == "ready\n"
        self.running = None

    def start(self, out, **job):
        self.stop()
        job = {"out": str(out), "stderr": f"{out}.err", "save_every": 0.0} | job
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.running = int(self.process.stdout.readline())
        return self.running

    def stop(self):
        """End a run that a failed test has left."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.running, signal.SIGKILL)
            self.wait()

    def wait(self):
        """How the run ended: 0, or the signal that ended it."""
        status, self.running = int(self.process.stdout.readline()), None
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def whole(self, out, **job):
        self.start(out, **job)
        assert self.wait() == 0, Path(f"{out}.err").read_text()

    def close(self):
        self.stop()
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked, which this system does not do")
    made = Server("tiny")
    yield made
    made.close()


@pytest.fixture(scope="module")
def calm(server, tmp_path_factory):
    """An uninterrupted run, and how long it takes."""
    out = tmp_path_factory.mktemp("calm") / "run"
    start = time.perf_counter()
    server.whole(out, save_every=0.02)
    return out, time.perf_counter() - start


# ---- what must hold of a folder


def tables(out, names=TABLES):
    return {name: rs.read_run(out, table=name) for name in names}


def same(out, other, names=TABLES):
    for name, table in tables(out, names).items():
        there = rs.read_run(other, table=name)
        drop = ["traceback"] if name == "failures" else []
        pd.testing.assert_frame_equal(table.drop(columns=drop), there.drop(columns=drop), check_exact=True, obj=name)


def nothing_twice(out):
    seen = [n for file in sorted((out / "prompts").glob("s*")) for n in pq.read_table(file)["prompt"].to_pylist()]
    assert len(seen) == len(set(seen)), "a prompt stands twice in the shards"


def nothing_left_over(out):
    hidden = {path.name for path in out.rglob(".*")}
    assert hidden <= {".lock"}, hidden
    finished = {path.name for path in (out / "prompts").iterdir()}
    assert {path.name for path in out.glob("*/*.parquet")} == finished


def well_so_far(out):
    """A run that was cut short can be read, and everything in it is whole."""
    if (out / "manifest.json").exists():
        held = tables(out)
        nothing_twice(out)
        done = held["prompts"]
        assert done["rows"].sum() == len(held["rows"])
        assert set(held["rows"]["prompt"]) == set(done.loc[done["status"] == "done", "prompt"])


# ---- SIGKILL


def kill_at_random(server, folder, kills, longest, seed=0):
    """Kill and resume, `kills` times; how far each folder was when it was killed. Folders that are finished early are
    kept, and a new one is begun."""
    rng, outs, killed, share = random.Random(seed), [folder / "0"], 0, []
    while killed < kills:
        out = outs[-1]
        pid = server.start(out, save_every=rng.choice((0.0, 0.02)))
        time.sleep(rng.choice((0.03, 0.2, 0.5)) * rng.random() * longest)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if server.wait() == 0:
            outs.append(folder / str(len(outs)))
            continue
        killed += 1
        well_so_far(out)
        begun = (out / "manifest.json").exists()
        share.append(len(rs.read_run(out, table="prompts")) / N if begun else 0.0)
    server.whole(outs[-1])
    return outs, share


def test_killed_at_random_moments(server, calm, tmp_path):
    expected, longest = calm
    assert len(rs.read_run(expected)) > 200
    assert len(rs.read_run(expected, table="failures")) == 2
    outs, share = kill_at_random(server, tmp_path, KILLS, longest)
    for out in outs:
        same(out, expected)
        nothing_twice(out)
        nothing_left_over(out)
    assert any(0 < one < 1 for one in share), "no kill hit the middle of a run"


@pytest.mark.parametrize(("name", "calls"), [("replace", 8), ("fsync", 12)])
@pytest.mark.parametrize("after", [False, True])
def test_killed_in_a_commit(server, calm, tmp_path, name, calls, after):
    """At every step of writing the first files, then of going on."""
    out = tmp_path / "run"
    for at in range(1, calls + 1):
        server.start(out, die=[name, at, after])
        assert server.wait() == -signal.SIGKILL
        well_so_far(out)
    server.whole(out)
    same(out, calm[0])
    nothing_twice(out)
    nothing_left_over(out)


def test_a_kill_that_undoes_the_order_would_be_seen(calm, tmp_path):
    """The checks can fail: a shard twice, and a row of another value."""
    out = tmp_path / "run"
    shutil.copytree(calm[0], out)
    last = max((out / "prompts").glob("*")).name
    for name in ("prompts", "rows", "located"):
        shutil.copy(out / name / last, out / name / "s999999.parquet")
    with pytest.raises(AssertionError, match="twice"):
        nothing_twice(out)
    with pytest.raises(rs.LoadError, match="is not shard s999999 of this run"):
        same(out, calm[0])


# ---- two processes


def test_the_second_process_is_told_and_a_killed_one_frees_the_folder(server, tmp_path):
    out = tmp_path / "run"
    pid = server.start(out, stall=True)
    deadline = time.monotonic() + 60
    while not (out / "prompts" / "s000002.parquet").exists():  # two that cannot be run, and the first that can
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rs.open_run(out).status["running"]["pid"] == pid
    before = tables(out)
    with pytest.raises(rs.RunError, match=f"being written to by process {pid} on .*give another folder"):
        go(out, PLAN, many())
    for name, table in before.items():
        pd.testing.assert_frame_equal(rs.read_run(out, table=name), table)
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert rs.open_run(out).status["running"] is None
    assert go(out, PLAN, many()).status["finished"]
    nothing_left_over(out)


def test_looking_at_a_run_does_not_keep_others_from_it(tmp_path):
    """Readers that ask all the time who is running never stand in a run's way."""
    out, stop = tmp_path / "run", threading.Event()
    go(out)
    folder = folders.Folder.of(out)

    def look():
        while not stop.is_set():
            _ = folder.running
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(5):
            with folder.locked():
                assert folder.running["pid"] == os.getpid()
    finally:
        stop.set()
        watcher.join()


# ---- a full disk


class Disk:
    """Lets the n-th call among the functions that write fail."""

    def __init__(self, monkeypatch, number=errno.ENOSPC, after=False):
        self.left, self.number, self.after = 10**9, number, after
        for home, name in ((os, "fsync"), (os, "replace"), (folders.pq, "write_table"), (tempfile, "mkstemp"),
                           (Path, "write_bytes"), (Path, "mkdir"), (Path, "chmod")):  # fmt: skip
            self.guard(monkeypatch, home, name)

    def guard(self, monkeypatch, home, name):
        real = getattr(home, name)

        def failing(*args, **options):
            self.left -= 1
            if self.left == 0 and self.after:
                real(*args, **options)
            if self.left == 0:
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **options)

        monkeypatch.setattr(home, name, failing)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "run"
    go(out)
    return out


@pytest.mark.parametrize("after", [False, True])
def test_every_write_fails_in_turn(pair, tmp_path, monkeypatch, after):
    disk, finished = Disk(monkeypatch, after=after), False
    for at in itertools.count(1):
        out = tmp_path / str(at)
        disk.left = at
        error = ended(out, rs.RunError)
        finished = disk.left > 0
        assert (error is None) == finished
        assert error is None or ("disk is full" in str(error) and "resume the run" in str(error))
        assert error is None or str(out) in str(error)
        disk.left = 10**9
        if (out / "manifest.json").exists():
            well_so_far_small(out)
        if finished:
            break
        go(out)
        same(out, pair, ("prompts", "rows"))
        nothing_twice(out)
        nothing_left_over(out)
        shutil.rmtree(out)
    assert at > 30


def well_so_far_small(out):
    done, rows = rs.read_run(out, table="prompts"), rs.read_run(out)
    assert done["rows"].sum() == len(rows)
    nothing_twice(out)


def test_a_disk_that_stays_full_keeps_what_was_finished(pair, tmp_path, monkeypatch):
    out, disk = tmp_path / "run", Disk(monkeypatch)
    real, count = folders.Folder.commit, itertools.count()

    def commit(self, held):
        if next(count):
            disk.left = 1
            monkeypatch.setattr(folders.pq, "write_table", full)
        return real(self, held)

    monkeypatch.setattr(folders.Folder, "commit", commit)
    with pytest.raises(rs.RunError, match="disk is full"):
        go(out)
    assert rs.read_run(out, table="prompts")["prompt"].tolist() == [0]
    assert rs.open_run(out).status["left"] == 1
    monkeypatch.undo()
    go(out)
    same(out, pair, ("prompts", "rows"))


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_another_error_of_the_disk_is_named(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, errno.EIO)
    disk.left = 3
    with pytest.raises(rs.RunError, match=r"Input/output error.*cannot be written to"):
        go(tmp_path / "run")


def test_a_log_that_cannot_be_written_stops_nothing(pair, tmp_path, monkeypatch):
    """A folder stands where the log should be; and the device that is always full does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for number in range(2):
        out = tmp_path / str(number)
        out.mkdir()
        if number:
            monkeypatch.setattr(logging.FileHandler, "_open", lambda self: open("/dev/full", "a"))  # noqa: SIM115
        else:
            (out / "run.log").mkdir()
        assert go(out).status["finished"]
        same(out, pair, ("prompts", "rows"))


def test_a_small_file_system_that_fills_up(tmp_path, server, calm):
    place = tmp_path / "small"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only the superuser can mount a small file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        out = place / "run"
        server.start(out, stderr=str(tmp_path / "err"))
        assert server.wait() == 1
        said = (tmp_path / "err").read_text()
        assert "RunError" in said
        assert "The disk is full" in said
        well_so_far(out)
        status = rs.open_run(out).status
        assert 0 < status["done"] < N - 2
        subprocess.run(["mount", "-o", "remount,size=30m", place], check=True)
        server.whole(out, stderr=str(tmp_path / "err"))
        same(out, calm[0])
        nothing_twice(out)
        nothing_left_over(out)
    finally:
        subprocess.run(["umount", place], check=True)


# ---- Ctrl-C


def hooks(module):
    return [(name, len(one._forward_hooks), len(one._forward_pre_hooks), one.training)
            for name, one in module.named_modules()]  # fmt: skip


def in_main_thread():
    return threading.current_thread() is threading.main_thread()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the signal may hit Hypothesis's hook
def test_interrupted_at_random_moments_the_model_is_as_it_was(tmp_path):
    if not in_main_thread() or not hasattr(signal, "setitimer"):
        pytest.skip("signals reach the main thread only")
    model, rng = opened(), random.Random(3)
    prompt = rs.Prompt(ids=[5, 4, 3, 2], target=1)
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    before, hooked = rs.record(model, prompt), hooks(model.module)
    out, stopped = tmp_path / "run", 0
    handler = signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    held = signal.getsignal(signal.SIGINT)
    try:
        for number in range(30):
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.001 + rng.random() * (0.05, 0.4)[number % 2])
                go(out, PLAN, many(), save_every=rng.choice((0.0, 0.05)))
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except KeyboardInterrupt:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            assert signal.getsignal(signal.SIGINT) is held
            after = rs.record(model, prompt)
            assert torch.equal(after.logits, before.logits)
            assert hooks(model.module) == hooked
            well_so_far(out)
            if (out / "manifest.json").exists() and rs.open_run(out).status["finished"]:
                shutil.rmtree(out)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    assert stopped >= 15
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert go(out, PLAN, many()).status["finished"]
    nothing_twice(out)
    nothing_left_over(out)
    fresh = tmp_path / "fresh"
    go(fresh, PLAN, many())
    same(out, fresh)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_commit_waits_for_it(pair, tmp_path, monkeypatch, number):
    """At any step of a commit: the shard is whole, it stands there once, and then the run stops."""
    if not in_main_thread():
        pytest.skip("signals reach the main thread only")
    for at in range(10, 30, 3):
        out, count = tmp_path / str(at), itertools.count(1)
        real = os.fsync

        def fsync(handle, count=count, at=at, real=real):
            real(handle)
            if next(count) == at:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(os, "fsync", fsync)
        stop = ended(out, KeyboardInterrupt)
        assert rs.open_run(out).status["finished"] or "resid-surgery resume" in str(stop)
        monkeypatch.undo()
        well_so_far_small(out)
        go(out)
        same(out, pair, ("prompts", "rows"))
        nothing_twice(out)


def test_impatient_people_press_twice(pair, tmp_path, monkeypatch):
    """A second Ctrl-C while what is finished is written changes nothing."""
    if not in_main_thread():
        pytest.skip("signals reach the main thread only")
    out, real = tmp_path / "run", folders.Folder.commit

    def commit(self, held):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, held)

    def run(self, group, skip=(), real=Worker.run):
        yield from real(self, group, skip)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(folders.Folder, "commit", commit)
    monkeypatch.setattr(Worker, "run", run)
    with pytest.raises(KeyboardInterrupt, match="resid-surgery resume"):
        go(out, save_every=100.0)
    assert rs.read_run(out, table="prompts")["prompt"].tolist() == [0]
    monkeypatch.undo()
    go(out)
    same(out, pair, ("prompts", "rows"))


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """As under nohup, or in the background of a shell."""
    if not in_main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        assert go(tmp_path / "run").status["finished"]
        timer.join()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    failed = []

    def work():
        try:
            go(tmp_path / "run")
        except BaseException as error:  # noqa: BLE001  shown by the test
            failed.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGINT) is before
    assert rs.open_run(tmp_path / "run").status["finished"]


@pytest.fixture(scope="module")
def real_server(smollm2):
    made = Server("real")
    yield made
    made.close()


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_real_model_stops_within_a_second(real_server, tmp_path, number):
    out = tmp_path / "run"
    pid = real_server.start(out, save_every=0.5)
    deadline = time.monotonic() + 120
    while not (out / "prompts" / "s000000.parquet").exists():
        assert time.monotonic() < deadline, (tmp_path / "run.err").read_text()
        time.sleep(0.01)
    time.sleep(0.7)  # in the middle of a sweep
    start = time.perf_counter()
    os.kill(pid, number)
    while "stopped: " not in (out / "run.log").read_text():
        assert time.perf_counter() - start < 60
        time.sleep(0.005)
    took = time.perf_counter() - start  # after that, Python itself takes down what torch and transformers have set up
    real_server.wait()
    gone = time.perf_counter() - start
    said = Path(f"{out}.err").read_text()
    assert "KeyboardInterrupt: stopped:" in said
    assert f"resid-surgery resume {out}" in said
    status = rs.open_run(out).status
    assert 0 < status["done"] < 24
    assert f"({status['done']} done" in said.splitlines()[-1]
    nothing_twice(out)
    nothing_left_over(out)
    assert took < 1.0, f"it took {took:.2f} s to stop"
    assert gone < 10.0, f"it took {gone:.2f} s to end"
    sys.stdout.write(f"stopped after {took:.2f} s, gone after {gone:.2f} s\n")


if __name__ == "__main__":
    serve(sys.argv[1])
