"""Runs on Ray: the rows of the local run, also when workers die, and nothing left behind."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from deadly import deadly
from tiny import build

import resid_surgery as rs
from resid_surgery.experiments import actors, on_ray
from resid_surgery.experiments.actors import Parcel
from resid_surgery.experiments.folder import Folder
from resid_surgery.experiments.on_ray import OnRay
from resid_surgery.experiments.work import Worker

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")

HERE = Path(__file__).parent
POISON, ONCE = 77, 88
PLAN = {
    "locate": {"best": {"kind": "neuron", "k": 2}, "others": {"like": "best"}},
    "intervene": {
        "best": {"kind": "Zero", "sites": "$best", "each": True},
        "others": {"kind": "Zero", "sites": "$others"},
    },
    "measure": "all",
}
TABLES = ("prompts", "rows", "located")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two CPUs of its own for this file, in a folder with a short name (sockets are in it)."""
    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_AUTH_MODE", raising=False)
    patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # else Ray writes one of its own into the home folder
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        object_store_memory=100 << 20, _temp_dir=folder, runtime_env={"env_vars": {"PYTHONPATH": str(HERE)}},
    )  # fmt: skip
    yield context
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    patch.undo()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(n: int = 24, poison: dict[int, int] | None = None) -> list[rs.Prompt]:
    """Of three lengths; those in `poison` end in a token that kills."""
    some = [[(number + 5 * j) % 70 for j in range(2 + number % 3)] for number in range(n)]
    for number, token in (poison or {}).items():
        some[number][-1] = token
    return [rs.Prompt(ids=ids, target=7, versus=[8]) for ids in some]


def table(out: Path, name: str = "rows") -> pd.DataFrame:
    found = rs.read_run(out, table=name)
    return found.sort_values([one for one in ("prompt", "row", "set", "rank") if one in found]).reset_index(drop=True)


def assert_same(a: Path, b: Path) -> None:
    """The same rows to the last bit."""
    for name in TABLES:
        pd.testing.assert_frame_equal(table(a, name), table(b, name), check_exact=True)


def once_each(out: Path) -> list[int]:
    """Prompts that were dealt with, from the files themselves; none twice."""
    found = Folder(out).dataset("prompts").to_table(columns=["prompt"])["prompt"].to_pylist()
    assert len(found) == len(set(found))
    return sorted(found)


def half_done(out: Path) -> None:
    """Leave a run as SIGKILL would: only half of the shards stand."""
    ledger = sorted((out / "prompts").iterdir())
    for one in ledger[len(ledger) // 2 :]:
        one.unlink()


def _actors() -> list[Any]:
    """Actors that still hold CPUs."""
    for _ in range(50):
        if ray.available_resources().get("CPU") == 2:
            return []
        time.sleep(0.1)
    return [ray.available_resources()]


def test_killed_workers_change_no_row_and_a_group_that_kills_every_worker_is_recorded(
    cluster: Any, tmp_path: Path
) -> None:
    some, flag = prompts(poison={9: ONCE, 10: POISON}), tmp_path / "died"
    model = rs.load(deadly(deadly(build("gpt2"), POISON), ONCE, flag))
    local, out = tmp_path / "local", tmp_path / "ray"
    rs.run(model, some, PLAN, out=local)
    rs.run(model, some, PLAN, out=out, executor=OnRay(workers=2), max_failures=None, save_every=0)
    assert flag.exists()
    assert once_each(out) == list(range(24))
    failed = table(out, "failures")
    assert sorted(failed.prompt) == [number for number in range(24) if number % 3 == 1], "the poisoned one's group"
    assert set(failed.stage) == {"worker"}
    assert failed.message.str.contains("2 workers died of the group of prompts 1, 4, 7, 10, 13").all()
    x, y = table(local), table(out)
    pd.testing.assert_frame_equal(x[x.prompt % 3 != 1].reset_index(drop=True), y, check_exact=True)
    assert ray.is_initialized(), "a cluster that was there stays"
    assert not _actors(), "but the run's actors are gone"
    rs.run(model, some, PLAN, out=out, retry=True)
    assert_same(local, out)


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_a_local_run_goes_on_with_a_model_read_from_its_folder(cluster: Any, tmp_path: Path) -> None:
    build("llama", torch.float32).save_pretrained(tmp_path / "model")
    model = rs.load(tmp_path / "model")
    for name in ("whole", "out"):
        rs.run(model, prompts(), PLAN, out=tmp_path / name, save_every=0)
    half_done(tmp_path / "out")
    done = once_each(tmp_path / "out")
    assert 0 < len(done) < 24
    rs.run(model, prompts(), PLAN, out=tmp_path / "out", executor=OnRay(workers=1))
    assert once_each(tmp_path / "out") == list(range(24))
    assert_same(tmp_path / "whole", tmp_path / "out")
    manifest = Folder(tmp_path / "out").manifest()
    assert "OnRay(workers=1" in manifest["sessions"][-1]["executor"]


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_workers_that_read_other_weights_are_refused(cluster: Any, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    model = rs.load(tmp_path / "model")
    build("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(rs.RunError, match=f"another model than this process holds: .*{model.fingerprint()}"):
        rs.run(model, prompts(), PLAN, out=tmp_path / "out", executor=OnRay(workers=1))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(rs.RunError, match=r"cannot open model: LoadError: .* does not exist"):
        rs.run(model, prompts(), PLAN, out=tmp_path / "out", executor=OnRay(workers=1))
    assert Folder(tmp_path / "out").statuses() == {}


def test_a_cluster_without_room_is_named_before_anything_waits(cluster: Any, tmp_path: Path) -> None:
    model = rs.load(build("llama"))
    with pytest.raises(rs.RunError, match="no machine of the Ray cluster has 1 CPUs and 1 GPUs"):
        rs.run(model, prompts(), PLAN, out=tmp_path, executor=OnRay(num_gpus=1))
    with pytest.raises(rs.RunError, match="part of a Ray cluster already"):
        rs.run(model, prompts(), PLAN, out=tmp_path, executor=OnRay(address="10.0.0.1:6379"))


def test_a_model_that_cannot_be_sent_is_refused(cluster: Any, tmp_path: Path) -> None:
    module = build("llama")
    model = rs.load(module)
    module.held = (one for one in ())
    with pytest.raises(rs.ArgumentError, match="exists in this process only and cannot be sent"):
        rs.run(model, prompts(), PLAN, out=tmp_path, executor=OnRay(workers=1))


@pytest.mark.real
def test_the_embedded_model_gives_the_local_rows(cluster: Any, smollm2: Any, tmp_path: Path) -> None:
    some = [rs.Prompt(f"The capital of {one} is", target=" Paris", versus=[" London"])
            for one in ("France", "Spain", "Italy", "Norway", "Poland", "Peru", "Chile", "Cuba", "Egypt")]  # fmt: skip
    plan = rs.Plan(intervene=[{"kind": "Zero", "sites": "L10:12.mlp", "each": True}])
    for name, executor in (("local", "local"), ("ray", OnRay(workers=2))):
        rs.run(smollm2, some, plan, out=tmp_path / name, executor=executor)
    for one in ("prompts", "rows"):
        pd.testing.assert_frame_equal(*(table(tmp_path / name, one) for name in ("local", "ray")), check_exact=True)


INTERRUPTED = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import resid_surgery as rs
from resid_surgery.experiments.on_ray import OnRay
from test_on_ray import PLAN, prompts
from tiny import build
engine = OnRay(workers=1, address="local")
rs.run(rs.load(build("llama")), prompts(5000), PLAN, out=sys.argv[1], executor=engine, save_every=0.2)
"""


def test_ctrl_c_keeps_what_is_finished_and_ends_the_cluster_that_the_run_began(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "out"
    code = INTERRUPTED.format(here=str(HERE))
    own = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env=os.environ | own)  # fmt: skip
    limit = time.monotonic() + 120
    while len(Folder(out).shards()) < 2 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    others = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in one.name() for one in others)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert stderr.rstrip().splitlines()[-1].startswith("KeyboardInterrupt: stopped: ")
    assert stdout == ""
    assert psutil.wait_procs(others, timeout=10)[1] == []
    done = once_each(out)
    assert 0 < len(done) < 5000
    assert set(table(out).prompt) == set(done)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 0}, "`workers` must be a whole number >= 1; got 0"),
        ({"workers": 1.5}, "`workers` must be a whole number"),
        ({"threads": True}, "`threads` must be a whole number"),
        ({"num_gpus": -1}, "`num_gpus` must be a whole number, or a share in 0..1; got -1"),
        ({"num_gpus": 1.5}, "`num_gpus` must be a whole number, or a share"),
        ({"num_cpus": float("nan")}, "`num_cpus` must be a finite number"),
        ({"num_cpus": 0}, "`num_cpus` must be above 0 where `num_gpus` is 0"),
        ({"address": 6379}, "`address` must be None, 'auto', 'local'"),
        ({"address": "cluster"}, "`address` must be None, 'auto', 'local', 'host:port'"),
        ({"device": ""}, "`device` must be a torch device"),
        ({"runtime_env": "numpy"}, "`runtime_env` must be a mapping"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(rs.ArgumentError) as caught:
        OnRay(**given)
    assert said in str(caught.value)


def test_without_ray_the_extra_is_named_before_anything_happens(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(rs.ArgumentError, match=r"pip install 'resid-surgery\[ray\]'"):
        rs.run("no such model", prompts(), PLAN, out=tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists()


def test_where_models_go() -> None:
    assert OnRay().place == "cpu"
    assert OnRay(num_gpus=0.5).place is None
    assert OnRay(num_gpus=1, device="cuda:0").place == "cuda:0"
    assert "secret" not in repr(OnRay(runtime_env={"env_vars": {"TOKEN": "secret"}}))


@pytest.mark.filterwarnings("ignore:.*no readable tokenizer")
def test_a_model_is_read_again_unless_it_changed_in_memory(tmp_path: Path) -> None:
    build("llama", torch.float32).save_pretrained(tmp_path / "model")
    model = rs.load(tmp_path / "model")
    worker = Worker(model, rs.Plan.of(PLAN), {})
    parcel = Parcel.of(worker, "cpu", ray.cloudpickle)
    assert parcel.body is None
    assert parcel.asked["model"] == str((tmp_path / "model").resolve())
    assert parcel.opened().weights.contents() == model.weights.contents() == model.fingerprint()
    with torch.no_grad():
        model.module.lm_head.weight[3, 2] += 1
    parcel = Parcel.of(worker, "cpu", ray.cloudpickle)
    assert parcel.body is not None
    sent = parcel.opened()
    assert sent.weights.contents() == model.fingerprint()
    assert sent.name == model.name
    assert sent.module.lm_head.weight is sent.module.get_input_embeddings().weight, "what was tied is tied"


def test_a_model_spread_over_devices_is_spread_again_unless_a_device_is_given() -> None:
    origin = {"model": "org/name", "device_map": "auto", "max_memory": {0: "20GiB"}, "dtype": "bfloat16"}
    assert actors._placed(origin, None) == origin
    alone = actors._placed(origin, "cuda:0")
    assert (alone["device"], alone["device_map"], alone["max_memory"]) == ("cuda:0", None, None)
    assert actors._placed(origin | {"device_map": None}, None)["device"] == "cuda"


def test_joining_leaves_signals_and_environment_as_they_were(monkeypatch: Any) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    before = signal.getsignal(signal.SIGTERM)
    with on_ray._ours():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        os.environ["RAY_AUTH_MODE"] = "token"
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert "RAY_AUTH_MODE" not in os.environ


def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    start = time.monotonic()
    for address in (nobody, f"ray://{nobody}"):
        with pytest.raises(rs.RunError, match=f"no Ray cluster can be used at {address}"):
            on_ray.join(OnRay(address=address))
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(rs.RunError, match="no Ray cluster can be used on this machine"):
        on_ray.join(OnRay())
    assert time.monotonic() - start < 5
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(nobody)
    assert on_ray._named("auto") == nobody
    with pytest.raises(rs.RunError, match="no Ray cluster can be used at auto"):
        on_ray.join(OnRay(address="auto"))
