"""Files that are broken or meant to do harm: one clear error, nothing written elsewhere, no code run, little memory.

`test_fuzz` damages good files at random; here stands what is worth naming.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import (
    CACHED,
    KEPT,
    LONGEST_MESSAGE,
    OPERATIONS,
    REMEMBERED,
    VECTORS,
    a_checkpoint,
    a_gguf,
    a_run,
    an_edit,
    cached,
    in_time,
    kept_of,
    load_quietly,
    own_cache,
    parsers,
    remembered,
    run_tables,
    saved_edit,
    scripts_kept,
)
from safetensors.torch import save as tensor_bytes
from tiny import build, shared

import resid_surgery as rs
from resid_surgery import _files
from resid_surgery.addresses import as_sites, expand
from resid_surgery.editing.edits import Edit
from resid_surgery.editing.exposure import texts_of
from resid_surgery.errors import ArgumentError, LoadError, ResidSurgeryError, RunError
from resid_surgery.experiments.cases import lines_of
from resid_surgery.experiments.folder import LARGEST_BYTES, Folder
from resid_surgery.models import checkpoints, headers, kept
from resid_surgery.models.headers import check_gguf
from resid_surgery.views import assets

SECONDS, MOST_GROWN = 20.0, 100 << 20
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "interventions": ("ops.json", rs.load_interventions),
    "edit": ("edit.safetensors", Edit.load),
    "edit, whatever made it": ("edit.safetensors", lambda path: rs.read_edit(shared("llama"), path)),
    "differences": ("delta.safetensors", lambda path: Edit.from_delta(shared("llama"), path)),
    "probes": ("probes.json", rs.read_probes),
    "own probes": ("probes.jsonl", rs.load_probes),
    "plan": ("plan.json", rs.read_plan),
    "cases": ("cases.jsonl", rs.read_cases),
    "report": ("report.json", rs.Validation.from_json),
    "gguf": ("model.gguf", rs.load),
    "manifest": ("manifest.json", lambda path: rs.open_run(path.parent)),
}


def refused(read: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...] = LoadError) -> str:
    """What a refusal says, on one line and in time."""
    with in_time(SECONDS), pytest.raises(error) as caught:
        read()
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < LONGEST_MESSAGE
    return said


# --- what is no file --------------------------------------------------------------------------------


def no_file(what: str, path: Path) -> None:
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "sparse gigabyte":
        path.touch()
        os.truncate(path, 1 << 30)
    elif what == "utf-16":
        path.write_bytes('{"a": 1}'.encode("utf-16"))
    elif what != "nothing":
        path.write_bytes({"empty": b"", "blank": b" \n\n", "no utf-8": b'{"a": "\xff"}', "a pickle": bomb()}[what])


NO_FILES = ("nothing", "folder", "pipe", "device", "link to nothing", "link to itself", "sparse gigabyte", "utf-16",
            "empty", "blank", "no utf-8", "a pickle")  # fmt: skip


class Bomb:
    """Something that a pickle could run; it must never be."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


def bomb() -> bytes:
    return pickle.dumps(Bomb())


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_refused_and_named(reader, what, tmp_path):
    name, read = READERS[reader]
    no_file(what, tmp_path / name)
    shared("llama")
    said = refused(lambda: read(tmp_path / name), (LoadError, rs.PromptError, ArgumentError))
    assert str(tmp_path) in said
    if what in ("folder", "pipe", "device") and reader not in ("gguf", "edit, whatever made it"):
        assert "no regular file" in said


def test_a_sparse_gigabyte_takes_no_memory(tmp_path):
    """All readers in a process of their own."""
    shared("llama")
    for name, _ in READERS.values():
        (tmp_path / name).mkdir(exist_ok=True)
        no_file("sparse gigabyte", tmp_path / name / name)
    pid = os.fork()
    if not pid:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        bad = 0
        for name, read in READERS.values():
            try:
                read(tmp_path / name / name)
                bad += 1
            except ResidSurgeryError:
                continue
            except BaseException:  # noqa: BLE001  (a child must not return into the suite)
                bad += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        os._exit(bad or (100 if grown > MOST_GROWN else 0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for name in ("plan", "cases", "interventions", "probes: own", "report", "texts"):
        parser = parsers()[name]
        path = tmp_path / parser.file
        path.write_bytes(b"\xef\xbb\xbf" + parser.samples[0])
        assert parser.holds(parser.read(path), path)


# --- JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 1}', "the key 'a' stands twice"),
        (b'{"b": [{"c": 1, "a": 2, "c": 3}]}', "the key 'c' stands twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1}{"a": 1}', "Extra data"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b"\x00" * 100, "holds null bytes"),
    ],
)  # fmt: skip
def test_what_readers_of_json_do_not_agree_on_is_refused(content, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with in_time(SECONDS), pytest.raises(ValueError, match=said):
        _files.read_json(path, 1 << 20)
    assert said in refused(lambda: rs.read_plan(path)) or said == "holds null bytes"


def test_sixty_four_levels_are_read():
    assert _files.parse_json(b"[" * 64 + b"]" * 64) is not None


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "target": " b"}\n' + b"x" * 100 + b"\n")
    assert len(list(_files.text_lines(path, 1000))) == 2
    with pytest.raises(OSError, match="more than 50 bytes"):
        list(_files.text_lines(path, 1000, longest=50))
    with pytest.raises(OSError, match="at most 100 bytes; it has"):
        list(_files.text_lines(path, 100))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body | {"more": 1}, "has a field 'more'"),
        (lambda body: body | {"schema": "1"}, "has schema '1', but this version reads 1"),
        (lambda body: body | {"interventions": {}}, "holds no list of interventions"),
        (lambda body: changed(body, 0, more=1), "intervention 0 .* Zero has no field 'more'"),
        (lambda body: changed(body, 0, sites="L0.N1"), "intervention 0 .*`sites` must be a list of texts"),
        (lambda body: changed(body, 0, sites={"L0.N1": 1}), "intervention 0 .*`sites` must be a list of texts"),
        (lambda body: changed(body, 0, sites=[]), "intervention 0 .*at least one site"),
        (lambda body: changed(body, 0, positions={"target": 1}), "intervention 0 .*`positions` must be"),
        (lambda body: changed(body, 1, factor=True), "intervention 1 .*`factor` must be a finite number"),
        (lambda body: changed(body, 1, factor=10**400), "intervention 1 .*`factor` must be a finite number"),
        (lambda body: changed(body, 1, kind="Recording"), "no operation is called 'Recording'"),
    ],
)
def test_fields_of_interventions_that_no_version_writes_are_refused(change, said, tmp_path):
    path = rs.save_interventions(tmp_path / "ops.json", OPERATIONS)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(LoadError, match=said):
        rs.load_interventions(path)


def changed(body: dict[str, Any], i: int, **more: Any) -> dict[str, Any]:
    entries = list(body["interventions"])
    entries[i] = entries[i] | more
    return body | {"interventions": entries}


@pytest.mark.parametrize("name", ["../ops.safetensors", "/etc/passwd", "a/ops.safetensors", "..", "", None, 5, ["a"]])
def test_vectors_are_read_from_the_own_folder_only(name, tmp_path):
    (tmp_path / "in").mkdir()
    path = rs.save_interventions(tmp_path / "in" / "ops.json", VECTORS)
    shutil.copy(path.with_suffix(".safetensors"), tmp_path / "ops.safetensors")
    body = json.loads(path.read_text())
    body["tensors"]["file"] = name
    path.write_text(json.dumps(body))
    said = refused(lambda: rs.load_interventions(path))
    assert "without folders" in said or "cannot be read" in said


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_vectors_are_floating_point_numbers(dtype, tmp_path):
    path = rs.save_interventions(tmp_path / "ops.json", VECTORS[0])
    packed = tensor_bytes({"0.vector": torch.ones(2, dtype=dtype)})
    path.with_suffix(".safetensors").write_bytes(packed)
    body = json.loads(path.read_text())
    body["tensors"]["xxh3_128"] = _files.file_hash(path.with_suffix(".safetensors"))
    path.write_text(json.dumps(body))
    assert "must hold vectors of floating-point numbers" in refused(lambda: rs.load_interventions(path))


def test_a_plan_of_too_many_combinations_is_refused_at_once(tmp_path):
    axes = {f"a{i}": list(range(1000)) for i in range(8)}
    arm = [{"kind": "Scale", "sites": "L0.mlp", "factor": f"${name}"} for name in axes]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"axes": axes, "intervene": {"main": arm}}))
    assert "at most 1,000,000 combinations" in refused(lambda: rs.read_plan(path))


def test_probes_that_multiply_are_refused(tmp_path, monkeypatch):
    """A relation of a thousand templates and as many samples would be a million prompts from a small file."""
    from resid_surgery.editing import importing

    monkeypatch.setattr(importing, "MOST", 10_000)
    samples = [{"subject": f"boat {i}", "object": "Ida"} for i in range(1000)]
    path = tmp_path / "lre.json"
    path.write_text(
        json.dumps({"name": "a", "prompt_templates": [f"{i} {{}} is" for i in range(1000)], "samples": samples})
    )
    assert "must make at most 10,000 probes" in refused(lambda: rs.read_probes(path))


# --- safetensors ------------------------------------------------------------------------------------


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def told(shape: Any, offsets: Any, dtype: str = "F32", data: bytes = b"\0" * 8) -> bytes:
    return safetensors(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode(), data)


BROKEN = {
    "a header of 2**60 bytes": safetensors(b"{}", length=2**60),
    "a header of 2**64 - 1 bytes": safetensors(b"{}", length=2**64 - 1),
    "a header of 99 MB that is not there": safetensors(b"{}", length=99_000_000),
    "a header of no bytes": safetensors(b"", length=0),
    "no header": b"\x01\x02\x03",
    "a header that is no JSON": safetensors(b"{bad"),
    "a header nested deeply": safetensors(b'{"a":' * 50_000),
    "a header that is a list": safetensors(b"[]"),
    "a shape of 10**12": told([10**12], [0, 8]),
    "a shape of 2**63": told([2**63, 4], [0, 8]),
    "a negative shape": told([-1], [0, 8]),
    "a shape that multiplies to nothing": told([2**33, 2**33], [0, 8]),
    "offsets beyond the end": told([2**40], [0, 2**42]),
    "offsets backwards": told([2], [8, 0]),
    "an unknown type": told([2], [0, 8], "F31"),
    "a pickle": bomb(),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tensors_are_refused_wherever_they_are_read(what, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[what])
    assert str(path) in refused(lambda: Edit.load(path))
    assert str(path) in refused(lambda: rs.read_edit(shared("llama"), path))
    assert str(path) in refused(lambda: Edit.from_delta(shared("llama"), path))
    with in_time(SECONDS):
        assert kept.read_kept(path) == {}
    checkpoint = shutil.copytree(a_checkpoint(), tmp_path / "checkpoint")
    min(checkpoint.glob("*.safetensors")).write_bytes(BROKEN[what])
    refused(lambda: load_quietly(checkpoint))


def test_every_cut_of_an_edit_is_refused(tmp_path):
    path, whole = tmp_path / "edit.safetensors", saved_edit()
    for at in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:at])
        refused(lambda: Edit.load(path))


def test_a_flipped_bit_anywhere_in_an_edit_is_seen(tmp_path):
    path, whole = tmp_path / "edit.safetensors", saved_edit()
    for at in range(0, len(whole), 53):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            again = Edit.load(path)
        except LoadError:
            continue
        assert again.hash == an_edit().hash, at


def rewritten(tmp_path: Path, **more: Any) -> Path:
    """An edit as a hostile writer would make it: other contents, and a hash that is theirs."""
    about, tensors = kept.read_tensors(an_edit().save(tmp_path / "one.safetensors"))
    body = json.loads(about["edit"])
    for name, value in more.items():
        if name in ("spec", "tensor"):
            continue
        body[name] = value
    if "spec" in more:
        body["changes"][0] |= more["spec"]
    tensors |= more.get("tensor", {})
    text = json.dumps(body)
    path = tmp_path / "told.safetensors"
    path.write_bytes(tensor_bytes(tensors, about | {"edit": text, "hash": kept.tensors_hash(tensors, text)}))
    return path


@pytest.mark.parametrize(
    "more",
    [
        {"spec": {"shape": [10**12, -1]}}, {"spec": {"shape": [2**40, 2**40]}}, {"spec": {"shape": "24"}},
        {"spec": {"shape": [24.0, 40]}}, {"spec": {"shape": [True, 40]}}, {"spec": {"kind": "pickle"}},
        {"spec": {"kind": ["rows"]}}, {"spec": {"axes": [7]}}, {"spec": {"axes": [1, 1]}}, {"spec": {"axes": [-1]}},
        {"spec": {"axes": "1"}}, {"spec": {"name": ""}}, {"spec": {"name": 3}}, {"spec": {"tied": ["a", 1]}},
        {"spec": {"tied": "abc"}}, {"spec": {"name": "model.norm.weight"}},
        {"tensor": {"change.0.index": torch.tensor([[3.0], [5.0]])}},
        {"tensor": {"change.0.index": torch.tensor([3, 5])}},
        {"tensor": {"change.0.index": torch.tensor([[3], [-1]])}},
        {"tensor": {"change.0.index": torch.tensor([[3], [3]])}},
        {"tensor": {"change.0.delta": torch.ones(2, 24, dtype=torch.int64)}},
        {"tensor": {"change.1.left": torch.ones(24)}}, {"tensor": {"change.0.delta": torch.tensor(1.0)}},
        {"tensor": {"operation.0.vector": torch.tensor([1, 2])}}, {"tensor": {"nothing": torch.ones(3)}},
        {"changes": {}}, {"changes": [1]}, {"interventions": "abc"}, {"interventions": [{"kind": "Zero"}]},
        {"method": 3}, {"rewrites": [3]}, {"rewrites": [{"prompt": "a"}]}, {"rewrites": {}}, {"expects": []},
        {"expects": {"a": 1}}, {"about": 3}, {"fitting": []}, {"fitting": {"columns": ["a", "a"], "data": []}},
        {"fitting": {"columns": ["a"], "data": [[1, 2]]}}, {"fitting": {"columns": ["a"], "data": 3}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_edit_that_no_version_writes_is_refused(more, tmp_path):
    path = rewritten(tmp_path, **more)
    assert str(path) in refused(lambda: Edit.load(path))


def test_the_writer_of_hostile_edits_can_also_write_good_ones(tmp_path):
    assert Edit.load(rewritten(tmp_path)).hash == an_edit().hash


def test_a_loaded_edit_does_not_hang_on_its_file(tmp_path):
    """Tensors that were mapped would change with the file, and end the process where it is cut off."""
    path = an_edit().save(tmp_path / "edit.safetensors")
    again = Edit.load(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 64)
        file.write(b"\xff" * 64)
    assert again.hash == an_edit().hash
    os.truncate(path, 8)
    assert again.hash == an_edit().hash


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(a_checkpoint(), tmp_path / "checkpoint")


def rewrite_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_shards_are_of_the_own_folder(checkpoint, name):
    index = checkpoint / "model.safetensors.index.json"
    shutil.copy(min(checkpoint.glob("*.safetensors")), checkpoint.parent / "secret.safetensors")
    rewrite_json(index, lambda body: body | {"weight_map": dict.fromkeys(body["weight_map"], name)})
    said = refused(lambda: load_quietly(checkpoint))
    assert str(index) in said
    assert "own folder" in said or "weight_map" in said


@pytest.mark.parametrize("body", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}], ids=str)
def test_an_index_of_something_else(checkpoint, body):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(body))
    assert "must have a weight_map" in refused(lambda: load_quietly(checkpoint))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 2**63}, {"num_hidden_layers": -1}, {"hidden_size": 0},
        {"num_attention_heads": 0}, {"hidden_size": 10**12}, {"vocab_size": 10**12}, {"intermediate_size": -5},
        {"num_attention_heads": 10**6}, {"hidden_act": "os.system"}, {"hidden_act": None}, {"rope_parameters": "x"},
        {"model_type": []}, {"model_type": "llama/../../x"}, {"rms_norm_eps": "a"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"},
        {"architectures": 5, "model_type": None},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_no_model_has(checkpoint, fields):
    """No code of the folder's own is run either."""
    (checkpoint / "evil.py").write_text("raise SystemExit('code was run')")
    rewrite_json(checkpoint / "config.json", lambda body: body | fields)
    refused(lambda: load_quietly(checkpoint), (LoadError, rs.UnsupportedModelError))


SIZES: tuple[dict[str, Any], ...] = (
    *({"hidden_size": 10**n} for n in (6, 7, 9)), *({"vocab_size": 10**n} for n in (7, 8, 9)),
    *({"intermediate_size": 10**n} for n in (7, 8)), {"head_dim": 10**8}, {"num_key_value_heads": 10**8},
    {"model_type": "mixtral", "num_local_experts": 10**6}, {"model_type": "gpt2", "hidden_size": 10**7},
    {"model_type": "gpt2", "max_position_embeddings": 10**9},
)  # fmt: skip


def test_sizes_that_the_files_do_not_hold_are_refused_before_anything_is_made(checkpoint):
    """In a process that may not take 2 GB more."""
    good = json.loads((checkpoint / "config.json").read_text())
    pid = os.fork()
    if not pid:
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + (2 << 30), here + (2 << 30)))
        bad = 0
        for number, fields in enumerate(SIZES, 1):
            (checkpoint / "config.json").write_text(json.dumps(good | fields))
            try:
                bad = bad or ("but its files hold" not in refused(lambda: load_quietly(checkpoint))) * number
            except BaseException:  # noqa: BLE001  (a child must not return into the suite)
                bad = bad or number
        os._exit(bad)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the number of the first that was not refused"


COUNTED: dict[str, dict[str, Any]] = {
    "labels": {"num_labels": 10**8}, "layers as a text": {"num_hidden_layers": str(10**8)},
    "layers as a fraction": {"num_hidden_layers": 1e8}, "more layers than a float holds": {"num_layers": 10**400},
    "layers far inside": {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"num_layers": 10**8}}},
    "types of layers": {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**8]], "num_layers": 4},
    "cycles": {"model_type": "hrm_text", "H_cycles": 10**8},
    "layers of an encoder": {"model_type": "bart", "encoder_layers": 10**8},
}  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", COUNTED)
def test_counts_that_a_config_would_go_through_by_itself_are_refused(checkpoint, what, whole):
    """Before transformers reads it, whether or not the weights can be read."""
    rewrite_json(checkpoint / "config.json", lambda body: body | COUNTED[what])
    if not whole:
        min(checkpoint.glob("*.safetensors")).write_bytes(b"\1\2\3")
    said = refused(lambda: load_quietly(checkpoint))
    assert said.startswith("checkpoint has a config of ")
    assert said.endswith("; it is damaged.")


def test_counts_of_real_models_are_read(checkpoint):
    rewrite_json(checkpoint / "config.json", lambda body: body | {
        "num_labels": 1000, "block_size": 65536, "max_position_embeddings": 10**7, "rope_theta": 10**11,
        "model_max_length": 10**30, "training_samples": 10**12, "label_smoothing": 0.1, "layer_norm_epsilon": "1e-5",
        "vocab_size_per_layer_input": 10**6, "id2label": {"0": "layer"}, "label2id": {"layer": 10**6},
        "num_blocks": None, "layer_types": ["full_attention"] * 3, "max_window_layers": 70,
    })  # fmt: skip
    assert load_quietly(checkpoint).anatomy.n_layers == 3


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_code_that_a_config_names_is_neither_fetched_nor_run(checkpoint, name):
    rewrite_json(checkpoint / "config.json", lambda body: body | {name: "somebody/kernel"})
    assert f"has a config that names code to be fetched and run ({name}: 'somebody/kernel')" in refused(
        lambda: load_quietly(checkpoint)
    )


def test_a_model_is_held_against_its_files_while_it_is_built(monkeypatch):
    """Also where it would never be done, and only in the thread that builds it."""
    from torch.nn.modules import module as hooks

    monkeypatch.setattr(headers, "SPARE", 1 << 22)

    def endless(part: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        held = torch.nn.ModuleList()
        while True:
            held.append(part())

    names = [name for name, one in vars(hooks).items() if name.startswith("_global_") and isinstance(one, dict)]
    before = [len(vars(hooks)[name]) for name in names]
    assert before
    for part in (torch.nn.Identity, lambda: torch.nn.LayerNorm(0), lambda: torch.nn.Linear(1 << 20, 1 << 20),
                 lambda: torch.nn.BatchNorm1d(0)):  # fmt: skip
        with in_time(SECONDS), pytest.raises(ValueError, match="but its files hold 1,000; it is damaged"), \
                torch.device("meta"), headers.no_larger_than(lambda: 1000):  # fmt: skip
            endless(part)
    with headers.no_larger_than(lambda: 0), ThreadPoolExecutor(1) as other, torch.device("cpu"):
        other.submit(lambda: torch.nn.Linear(1 << 12, 1 << 12, device="meta")).result()
        torch.nn.Linear(1 << 11, 1 << 10)  # what is there is no plan
        with pytest.raises(ValueError, match="files hold 0"):
            torch.nn.Linear(1 << 11, 1 << 10, device="meta")
    with headers.no_larger_than(lambda: None):
        torch.nn.Linear(1 << 20, 1 << 20, device="meta")
    assert [len(vars(hooks)[name]) for name in names] == before


HUB = """
import resource, sys, warnings
import resid_surgery as rs
warnings.simplefilter("ignore")
from pathlib import Path
import transformers
from transformers import AutoModelForCausalLM
here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + (2 << 30), here + (2 << 30)))
for name in sys.argv[1:]:
    try:
        print(rs.load(name).anatomy.n_layers)
    except rs.errors.LoadError as error:
        print(error)
"""


def test_what_comes_from_the_hub_is_believed_no_more(tmp_path):
    """As a folder is, from a cache of the hub's, offline."""
    changes: dict[str, dict[str, Any]] = {
        "good": {}, "labels": {"num_labels": 10**8}, "wide": {"hidden_size": 10**7},
        "code": {"_attn_implementation": "a/kernel"},
    }  # fmt: skip
    for name, fields in changes.items():
        there = tmp_path / "hub" / f"models--somebody--{name}"
        shutil.copytree(a_checkpoint(), there / "snapshots" / "0")
        (there / "refs").mkdir()
        (there / "refs" / "main").write_text("0")
        rewrite_json(there / "snapshots" / "0" / "config.json", lambda body, fields=fields: body | fields)
    done = subprocess.run(
        [sys.executable, "-c", HUB, *(f"somebody/{name}" for name in changes), "somebody/nobody"], text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}, capture_output=True, timeout=120,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[0] == "3", done.stderr[-2000:]
    assert (
        said[1] == "somebody/labels has a config of 100000000 for num_labels, more than any model has; it is damaged."
    )
    assert said[2].startswith("somebody/wide cannot be opened: its config is of a model of at least ")
    assert said[3].startswith("somebody/code has a config that names code to be fetched and run")
    assert said[4].startswith("somebody/nobody could not be opened: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "extra.safetensors"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert f"{checkpoint / name} must be a file" in refused(lambda: load_quietly(checkpoint))


def test_memory_that_runs_out_is_no_damaged_tokenizer(checkpoint, monkeypatch):
    def out(*_: Any, **__: Any) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", out)
    with pytest.raises(MemoryError, match="injected"):
        rs.load(checkpoint)


def test_a_damaged_tokenizer_is_none(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "nonsense"}}')
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.warns(UserWarning, match="has no readable tokenizer"):
        assert rs.load(checkpoint).tokenizer is None


def test_two_files_that_hold_one_tensor_are_not_guessed_between(tmp_path, monkeypatch):
    """The index says which counts; without it the folder is read as transformers reads it."""
    base = rs.load(build("llama", torch.float32))
    other = build("llama", torch.float32, seed=1)
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "zzz.safetensors")
    stale = {"model.norm.weight": torch.zeros(24)}
    (tmp_path / "zzz.safetensors").write_bytes(tensor_bytes(stale, {"format": "pt"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = Edit.from_models(base, tmp_path)
    with edit.applied(base) as edited:
        assert torch.equal(edited.shadow.model.norm.weight, other.model.norm.weight)


PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_adapters_are_never_opened(name, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (tmp_path / name).write_bytes(bomb())
    refused(lambda: Edit.from_peft(shared("llama"), tmp_path), (LoadError, ArgumentError))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"LORA"', '{"peft_type": "EVIL"}', "[" * 100_000,
                '{"peft_type": {"a": 1}}', "\x00",
                '{"peft_type": "LORA", "r": -1, "target_modules": ["q_proj"]}',
                '{"peft_type": "LORA", "r": "a", "target_modules": ["q_proj"]}',
                '{"peft_type": "LORA", "r": 1000000000000, "target_modules": ["q_proj"]}',
                '{"peft_type": "LORA", "r": 2, "target_modules": 5}',
                '{"peft_type": "LORA", "r": 2, "target_modules": "("}']
)  # fmt: skip
def test_configs_of_adapters_that_say_nothing(content, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(tensor_bytes({"a": torch.ones(2)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: Edit.from_peft(shared("llama"), tmp_path), (LoadError, ArgumentError))


# --- GGUF -------------------------------------------------------------------------------------------


def gguf(tensors: int = 0, fields: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def words(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def a_field(kind: int, value: bytes, name: bytes = b"a") -> bytes:
    return gguf(0, 1, words(name) + struct.pack("<I", kind) + value)


def a_tensor(dims: list[int], kind: int = 0, offset: int = 0, data: bytes = b"\0" * 64) -> bytes:
    body = words(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return gguf(1, 0, body + data)


BAD_GGUF = {
    "another magic": (b"GGML" + b"\0" * 40, "does not begin as GGUF"),
    "2**40 tensors": (gguf(2**40), "counts 1099511627776 tensors"),
    "2**40 fields": (gguf(0, 2**40), "counts 1099511627776 fields"),
    "a name of 2**60 bytes": (gguf(0, 1, words(b"a", 2**60)), "bytes of a text"),
    "a text of 2**64 - 1 bytes": (a_field(8, words(b"", 2**64 - 1)), "bytes of a text"),
    "a list of 2**60 numbers": (a_field(9, struct.pack("<IQ", 4, 2**60)), "items"),
    "a list of 2**20 numbers that are not there": (a_field(9, struct.pack("<IQ", 4, 2**20)), "more bytes"),
    "a list of 2**60 texts": (a_field(9, struct.pack("<IQ", 8, 2**60)), "items"),
    "a list of lists": (a_field(9, struct.pack("<IQIQ", 9, 1, 4, 1)), "unknown type 9"),
    "an unknown type": (a_field(77, b"\0" * 8), "unknown type 77"),
    "a billion layers": (a_field(4, struct.pack("<I", 10**9), b"llama.block_count"), "counts 1000000000 layers"),
    "a tensor of 2**40 dimensions": (gguf(1, 0, words(b"t") + struct.pack("<I", 2**31)), "dimensions"),
    "a tensor of 10**12 numbers": (a_tensor([10**6, 10**6]), "elements"),
    "a tensor of 2**70 numbers": (a_tensor([2**35, 2**35]), "elements"),
    "a tensor beyond the end": (a_tensor([16], offset=2**50), "bytes of a tensor"),
    "a tensor larger than the file": (a_tensor([500]), "bytes of tensors"),
    "a tensor of unknown type": (a_tensor([4], kind=99), "99"),
    "cut off behind the counts": (gguf(1, 1), "more bytes"),
    "cut off in the counts": (gguf()[:12], "more bytes"),
    "version 0": (gguf(version=0), "could not be read"),
}


@pytest.mark.parametrize("what", BAD_GGUF)
def test_gguf_headers_are_held_against_the_file(what, tmp_path):
    content, said = BAD_GGUF[what]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert said in refused(lambda: rs.load(path))


def test_gguf_lists_are_limited_together(tmp_path, monkeypatch):

    path = tmp_path / "a.gguf"
    field = words(b"%d") + struct.pack("<IIQ", 9, 0, 60) + b"\0" * 60
    known = words(b"general.architecture") + struct.pack("<I", 8) + words(b"x")
    known += words(b"x.block_count") + struct.pack("<II", 4, 0)
    path.write_bytes(gguf(0, 4, field.replace(b"%d", b"%a") + field.replace(b"%d", b"%b") + known))
    check_gguf(path)
    monkeypatch.setattr(headers, "MOST_ITEMS", 100)
    with pytest.raises(ValueError, match="counts 60 items where there can be at most 40"):
        check_gguf(path)


@pytest.mark.parametrize("old", ["llama.block_count", "general.architecture"])
def test_a_gguf_file_that_says_no_number_of_layers_is_refused(old, tmp_path):
    """Its reader would take the architecture's usual one, and spend its time on layers that are not there."""
    path, whole = tmp_path / "a.gguf", a_gguf()
    assert old.encode() in whole
    path.write_bytes(whole.replace(old.encode(), old.replace("a", "h").encode()))
    assert "how many layers its architecture has" in refused(lambda: load_quietly(path))


def test_a_good_gguf_file_loads_and_every_cut_is_refused(tmp_path):
    path, whole = tmp_path / "a.gguf", a_gguf()
    path.write_bytes(whole)
    assert load_quietly(path).anatomy.n_layers == 1
    for at in [*range(0, len(whole), 211), len(whole) - 40]:
        path.write_bytes(whole[:at])
        refused(lambda: load_quietly(path))


@pytest.mark.parametrize("name", ["embedding_length", "feed_forward_length", "vocab_size", "attention.key_length"])
def test_gguf_sizes_that_the_file_does_not_hold_are_refused(name, tmp_path):
    path, whole = tmp_path / "a.gguf", a_gguf()
    key = words(f"llama.{name}".encode()) + struct.pack("<I", 4)
    if key in whole:
        at = whole.index(key) + len(key)
        whole = whole[:at] + struct.pack("<I", 10**8) + whole[at + 4 :]
    else:  # one field more
        (tensors, fields) = struct.unpack("<QQ", whole[8:24])
        pad = -(len(key) + 4) % 32  # what comes after is aligned to 32 bytes
        more = key + struct.pack("<I", 10**8) + words(b"p" * 4) + struct.pack("<IIQ", 9, 0, pad) + b"\0" * pad
        whole = whole[:16] + struct.pack("<Q", fields + 2) + more + b"\0" * 0 + whole[24:]
        assert tensors
    path.write_bytes(whole)
    refused(lambda: load_quietly(path))


# --- run folders ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(a_run(), tmp_path / "run")


def read_all(out: Path) -> dict[str, pd.DataFrame]:
    found = rs.open_run(out)
    assert repr(found)
    return {name: found.read(name) for name in found.tables}


def test_a_good_copy_of_a_run_reads_the_same(run):
    for name, table in read_all(run).items():
        pd.testing.assert_frame_equal(table, run_tables()[name], check_exact=True)


def rewritten_shard(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file, write_page_checksum=True)


MEDDLING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rows missing": (lambda out: (out / "rows/s000000.parquet").unlink(), "cannot be read"),
    "a shard twice": (lambda out: [shutil.copy(f, f.with_stem("s000007")) for f in out.glob("*/s000000.parquet")],
                      "is not shard s000007 of this run"),
    "tables swapped": (lambda out: shutil.copy(out / "located/s000000.parquet", out / "rows/s000000.parquet"),
                       "is not what the run wrote there"),
    "no Parquet": (lambda out: (out / "rows/s000000.parquet").write_bytes(b"nothing"), "footer does not fit"),
    "a pipe": (lambda out: [(out / "rows/s000000.parquet").unlink(), os.mkfifo(out / "rows/s000000.parquet")],
               "no regular file"),
    "without a mark": (lambda out: pq.write_table(pq.read_table(out / "rows/s000000.parquet").replace_schema_metadata(),
                                                  out / "rows/s000000.parquet"), "not what the run wrote"),
    "a row less": (lambda out: rewritten_shard(out / "rows/s000000.parquet", lambda t: t.slice(1)),
                   "not what the run wrote"),
    "a row twice": (lambda out: rewritten_shard(out / "rows/s000000.parquet", lambda t: pa.concat_tables([t, t])),
                    "not what the run wrote"),
    "a column less": (lambda out: rewritten_shard(out / "rows/s000000.parquet", lambda t: t.drop_columns(["log_prob"])),
                      "not what the run wrote"),
    "a column less in the ledger": (lambda out: rewritten_shard(out / "prompts/s000000.parquet",
                                    lambda t: t.drop_columns(["n_tokens"])), "other columns or rows"),
    "a row less in the ledger": (lambda out: rewritten_shard(out / "prompts/s000000.parquet", lambda t: t.slice(1)),
                                 "other columns or rows"),
    "a column of another type": (lambda out: rewritten_shard(out / "rows/s000000.parquet", whole_numbers),
                                 "not what the run wrote"),
    "a prompt that there is not": (lambda out: rewritten_shard(out / "prompts/s000000.parquet", other_prompts),
                                   "prompts that the run does not have"),
}  # fmt: skip


def whole_numbers(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("log_prob")
    return table.set_column(at, "log_prob", pa.array([1] * len(table), pa.int64())).replace_schema_metadata(
        table.schema.metadata
    )


def other_prompts(table: pa.Table) -> pa.Table:
    return table.set_column(0, "prompt", pa.array([99] * len(table), pa.int64())).replace_schema_metadata(
        table.schema.metadata
    )


@pytest.mark.parametrize("what", MEDDLING)
def test_shards_that_are_not_what_was_written_are_named(run, what):
    meddle, said = MEDDLING[what]
    meddle(run)
    assert said in refused(lambda: read_all(run))


def test_files_that_are_no_shards_are_left_aside(run):
    (run / "prompts" / "sx.parquet").write_bytes(b"")
    (run / "prompts" / "s-1.parquet").write_bytes(b"")
    for name, table in read_all(run).items():
        pd.testing.assert_frame_equal(table, run_tables()[name], check_exact=True)


def test_a_shard_of_another_run_is_seen(run, tmp_path):
    plan = {"locate": {"best": {"k": 3}}, "intervene": {"best": {"kind": "Zero", "sites": "$best"}}}
    prompts = [{"ids": [5, 4, 3], "target": 1, "relation": "a"}, {"ids": [9, 8, 7], "target": 10**6, "relation": "b"}]
    rs.run(shared("llama"), prompts, plan, out=tmp_path / "other", max_failures=None, progress=False)
    for table in ("prompts", "rows", "located", "failures"):
        shutil.copy(tmp_path / "other" / table / "s000000.parquet", run / table / "s000000.parquet")
    assert "of this run" in refused(lambda: read_all(run))


def test_a_flipped_bit_anywhere_in_a_shard_is_seen_or_changes_nothing(run):
    """Pages have checksums; of the footer, what counts is held against the manifest."""
    wheres: dict[str, Any] = {"rows": {"prompt": [0]}, "located": {"rank": 1}, "prompts": {"status": "done"}}
    for table, where in wheres.items():
        some = rs.read_run(run, table=table, where=where)
        file = run / table / "s000000.parquet"
        whole, step = file.read_bytes(), 67
        for at in range(0, len(whole), step):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            try:
                with in_time(SECONDS):
                    found, chosen = rs.read_run(run, table=table), rs.read_run(run, table=table, where=where)
            except ResidSurgeryError:
                continue
            pd.testing.assert_frame_equal(found, run_tables()[table], check_exact=True)
            pd.testing.assert_frame_equal(chosen, some, check_exact=True)
        file.write_bytes(whole)


def test_a_flipped_bit_anywhere_in_a_mark_loses_no_row(run):
    """A table that it did not name any more would be read as one without rows."""
    file = run / "prompts" / "s000000.parquet"
    whole = file.read_bytes()
    low = whole.index(b'{"run":')
    high = whole.index(b"}}", low) + 2
    assert all(name in whole[low:high] for name in (b'"rows"', b'"failures"', b'"footers"'))
    for at in range(low, high):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        for table in run_tables():
            assert "is not shard" in refused(lambda table=table: rs.read_run(run, table=table))


def test_footers_that_lie_about_their_length_are_refused(run):
    file = run / "rows" / "s000000.parquet"
    whole = file.read_bytes()
    for length in (0, 1, 7, len(whole), 2**31 - 1, 2**32 - 1):
        file.write_bytes(whole[:-8] + struct.pack("<I", length) + b"PAR1")
        refused(lambda: rs.read_run(run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "no manifest of a run with schema 3"), ({"what": "x"}, "no manifest of a run"),
        ({"tables": {}}, "its tables are none"), ({"tables": {"rows": {"a": "string"}}}, "its tables are rows"),
        ({"tables": {"prompts": {"a": "object"}}}, "columns of no known type"), ({"tables": []}, "its tables"),
        ({"tables": {"prompts": {"a": {}}}}, "columns of no known type"),
        ({"tables": {"prompts": ["a"]}}, "columns of no known type"),
        ({"tables": {"prompts": {}, "../../etc": {}}}, "its tables are prompts, ../../etc"),
        ({"prompts": {}}, "how many"),
        ({"prompts": {"number": "3"}}, "how many"), ({"prompts": {"number": -1}}, "how many"),
        ({"prompts": 3}, "its prompts"),
        ({"sessions": []}, "who worked"), ({"sessions": [3]}, "who worked"), ({"sessions": None}, "its sessions"),
        ({"model": {"name": 3}}, "what model"), ({"origin": "x"}, "its origin"), ({"plan_hash": 1}, "its plan_hash"),
        ({"plan": None}, "its plan"), ({"prompts": {"number": 10**9, "hash": "x"}}, "of this run"),
    ],
    ids=str,
)  # fmt: skip
def test_manifests_that_no_version_writes(run, change, said):
    rewrite_json(run / "manifest.json", lambda body: body | change)
    assert said in refused(lambda: read_all(run))


@pytest.mark.parametrize("name", ["rows", "prompts", "failures", "manifest.json", "prompts.jsonl", "run.log", ".lock",
                                  ".owner.json"])  # fmt: skip
def test_a_run_writes_through_no_link(run, name, tmp_path):
    """What is written, or removed, stays in the folder."""
    outside = tmp_path / "outside"
    if (run / name).is_dir():
        outside.mkdir()
        (outside / "mine.parquet").write_bytes(b"mine")
        (outside / ".s1").write_bytes(b"mine")
        shutil.rmtree(run / name)
    else:
        outside.write_bytes(b"mine")
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.rglob("outside*/**/*") if path.is_file()}
    plan = {"locate": {"best": {"k": 2}}, "intervene": {"best": {"kind": "Zero", "sites": "$best"}}}
    prompts = [{"ids": [5, 4, 3], "target": 1, "relation": "a"}, {"ids": [9, 8, 7], "target": 10**6, "relation": "b"}]
    said = refused(lambda: rs.run(shared("llama"), prompts, plan, out=run, max_failures=None, progress=False), RunError)
    assert f"{run / name} is a symbolic link" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("outside*/**/*") if path.is_file()}
    assert outside.is_dir() or outside.read_bytes() == b"mine"
    with in_time(SECONDS):
        assert Folder.of(run).running is None


@pytest.mark.parametrize("content", [b"", b"5", b"[1]", b'{"pid": 1}', b"\xff", b"[" * 100_000])
def test_an_owner_that_says_nothing(run, content):
    """Who holds the lock is only told; a note that cannot be read is no error of its own."""
    folder = Folder.of(run)
    with folder.locked():
        (run / ".owner.json").write_bytes(content)
        said = refused(lambda: rs.run(shared("llama"), [rs.Prompt(ids=[1, 2], target=3)], rs.Plan([rs.Zero("L0.mlp")]),
                                      out=run, progress=False), RunError)  # fmt: skip
        assert "being written to by another process" in said


def test_parquet_types_that_unpickle_are_not_believed(run):
    kind = pa.field("log_prob", pa.binary(), metadata={b"ARROW:extension:name": b"arrow.py_extension_type",
                                                       b"ARROW:extension:metadata": bomb()})  # fmt: skip
    file = run / "rows" / "s000000.parquet"

    def poisoned(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("log_prob")
        schema = table.schema.set(at, kind)
        arrays = [
            pa.array([b"x"] * len(table), pa.binary()) if i == at else table.column(i) for i in range(len(schema))
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    rewritten_shard(file, poisoned)
    assert "not what the run wrote" in refused(lambda: read_all(run))


def test_prompts_beside_a_run_are_held_against_it(run):
    """What is resumed from the folder is what was begun."""
    cases = rs.read_cases(run / "prompts.jsonl")
    cases[0] = rs.Case(rs.Prompt(ids=[5, 4, 4], target=1), cases[0].labels)
    (run / "prompts.jsonl").write_bytes(lines_of(cases))
    again = rs.read_cases(run / "prompts.jsonl")
    plan = rs.Plan.of(rs.open_run(run).manifest["plan"])
    said = refused(lambda: rs.run(shared("llama"), again, plan, out=run, max_failures=None, progress=False), RunError)
    assert "prompts.hash" in said


def test_a_manifest_larger_than_any_is_refused(run):
    os.truncate(run / "manifest.json", LARGEST_BYTES + 1)
    assert "must have at most" in refused(lambda: read_all(run))


# --- caches -----------------------------------------------------------------------------------------


def test_a_cached_file_is_believed_only_whole(tmp_path):
    path, whole = tmp_path / KEPT, cached()
    kept.write_kept(path, CACHED)
    assert path.read_bytes() == whole
    assert kept.read_kept(path).keys() == CACHED.keys()
    shutil.copy(path, tmp_path / "of something else.safetensors")
    assert kept.read_kept(tmp_path / "of something else.safetensors") == {}
    for damaged in (*(whole[:at] for at in range(0, len(whole), 11)), *BROKEN.values(), b""):
        path.write_bytes(damaged)
        assert kept.read_kept(path) == {}
    path.unlink()
    for what in ("folder", "device"):
        no_file(what, tmp_path / what)
        assert kept.read_kept(tmp_path / what) == {}
    os.mkfifo(path)
    with in_time(SECONDS):
        assert kept.read_kept(path) == {}


Kept = dict[str, torch.Tensor]
FORGED: dict[str, Callable[[Kept], Kept]] = {
    "other names": lambda held: {f"{name}x": one for name, one in held.items()},
    "a name more": lambda held: held | {"more": torch.ones(1)},
    "a name less": lambda held: dict(list(held.items())[1:]),
    "nothing": lambda held: {},
}
SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shorter": lambda one: one[..., :-1].clone(),
    "longer": lambda one: torch.cat([one, one]),
    "deeper": lambda one: one[None].clone(),
    "single numbers": lambda one: one.flatten()[0].clone(),
    "truths": lambda one: torch.ones(one.shape, dtype=torch.bool),
    "halves": lambda one: one.half(),
    "eighths": lambda one: one.to(torch.float8_e4m3fn),
    "complex": lambda one: one.to(torch.complex64),
    "small": lambda one: one.int() if one.dtype == torch.long else one.half(),
    "below nothing": lambda one: -one - 10**6 if one.dtype == torch.long else one,
    "beyond all": lambda one: one + 2**62 if one.dtype == torch.long else one,
    "of the same sum": lambda one: torch.cat([one[:1] - one.sum(), one[1:2] + one.sum()]) if len(one) == 2 else one,
}


def spoilt(how: str, held: Kept) -> Iterator[Kept]:
    """What was kept, forged: all of it, or one tensor alone."""
    if how in FORGED:
        yield FORGED[how](held)
        return
    for some in (list(held), *([name] for name in held)):
        yield held | {name: SPOILT[how](held[name]) for name in some}


def same(one: Kept, other: Kept) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == t.dtype and torch.equal(one[name].nan_to_num(), t.nan_to_num()) for name, t in other.items()
    )


@pytest.mark.parametrize("how", [*FORGED, *SPOILT])
@pytest.mark.parametrize("what", REMEMBERED)
def test_what_is_kept_under_a_right_hash_must_also_fit(what, how, tmp_path):
    """A file of another shape, as by other code, is made anew and mended."""
    name, content, said = kept_of(what)
    place = tmp_path / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    held, tried = kept.read_kept(place), 0
    for forged in spoilt(how, held):
        if (what, how) == ("ranges", "of the same sum") or same(forged, held):
            continue  # numbers of the right kind: nothing tells them from others
        tried += 1
        kept.write_kept(place, forged)
        with own_cache(tmp_path), in_time(SECONDS):
            assert remembered(what) == said
            again = kept.read_kept(place)
            assert same({name: again[name] for name in held}, held)
    assert tried or what == "ranges" or how == "of the same sum"


@pytest.mark.parametrize("how", ["nothing", "folder", "pipe", "device", "link to nothing", "link to itself", "empty",
                                 "a pickle", "sparse gigabyte"])  # fmt: skip
@pytest.mark.parametrize("what", REMEMBERED)
def test_what_stands_in_the_place_of_what_is_kept_is_not_read(what, how, tmp_path):
    name, content, said = kept_of(what)
    place = tmp_path / name
    place.parent.mkdir(parents=True)
    no_file(how, place)
    with own_cache(tmp_path), in_time(SECONDS), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "what the base model says is not kept|the ranges of value vectors are not kept"
        )
        assert remembered(what) == said
    assert place.is_dir() if how == "folder" else place.read_bytes() == content


def test_what_a_page_keeps_is_believed_only_whole(tmp_path):
    text = "window.vegaEmbed = 1;"
    whole = scripts_kept(text)
    path = tmp_path / "vega.js"
    path.write_bytes(whole)
    assert assets._kept(path) == text
    for damaged in (*(whole[:at] for at in range(len(whole))), whole.replace(b"1", b"2"), whole + b" ", bomb()):
        path.write_bytes(damaged)
        assert assets._kept(path) is None
    path.unlink()
    for what in ("nothing", "folder", "pipe", "device", "link to itself"):
        no_file(what, tmp_path / what)
        with in_time(SECONDS):
            assert assets._kept(tmp_path / what) is None


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """The folder of the embedded model's copy, made of a tiny one; nothing there yet."""
    monkeypatch.setenv("RESID_SURGERY_CACHE", str(tmp_path / "cache"))

    def convert(folder: Path) -> None:
        shutil.copytree(a_checkpoint(), folder)
        (folder / "manifest.json").write_text(json.dumps(checkpoints._file_hashes(folder)))

    monkeypatch.setattr(checkpoints, "_convert_embedded", convert)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = checkpoints._embedded_folder()
    assert checkpoints._intact(folder)
    return folder


COPIES: dict[str, Callable[[Path, Path], object]] = {
    "a byte of its weights": lambda folder, _: flip(min(folder.glob("*.safetensors"))),
    "its config": lambda folder, _: (folder / "config.json").write_text("{}"),
    "a file more": lambda folder, _: (folder / "modeling.py").write_text("raise SystemExit"),
    "a file less": lambda folder, _: (folder / "config.json").unlink(),
    "no manifest": lambda folder, _: (folder / "manifest.json").unlink(),
    "a manifest that is none": lambda folder, _: (folder / "manifest.json").write_text("[" * 9000),
    "a manifest that is a pipe": lambda folder, _: swap(folder / "manifest.json", "pipe"),
    "weights that are a device": lambda folder, _: swap(min(folder.glob("*.safetensors")), "device"),
    "a folder among its files": lambda folder, _: (folder / "more").mkdir(),
    "a file in place of it": lambda folder, _: (shutil.rmtree(folder), folder.write_text("no folder")),
    "a link in place of it": lambda folder, other: (shutil.rmtree(folder), folder.symlink_to(other)),
    "a link to nothing": lambda folder, other: (shutil.rmtree(folder), folder.symlink_to(other / "none")),
    "what a killed process left": lambda folder, _: (folder / "config.json").replace(made(folder) / "config.json"),
    "a link that looks left over": lambda folder, other: (
        (folder / "config.json").unlink(), folder.with_name(f"{folder.name}.left").symlink_to(other)),
}  # fmt: skip


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def swap(path: Path, what: str) -> None:
    path.unlink()
    no_file(what, path)


def made(folder: Path) -> Path:
    found = folder.with_name(f"{folder.name}.half")
    found.mkdir()
    return found


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_of_the_embedded_model_is_believed_only_whole(converted, what, tmp_path):
    other = tmp_path / "somebody's"
    other.mkdir()
    (other / "precious").write_text("x")
    COPIES[what](converted, other)
    with pytest.warns(UserWarning, match="is damaged; rebuilding it"), in_time(SECONDS):
        assert checkpoints._embedded_folder() == converted
    assert checkpoints._intact(converted)
    assert not converted.is_symlink()
    assert [one.name for one in other.iterdir()] == ["precious"], "what a link leads to is left alone"


def test_a_cache_that_cannot_be_written_is_named(converted):
    lock = converted.with_name(converted.name + ".lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert "set RESID_SURGERY_CACHE" in refused(checkpoints._embedded_folder)


# --- corpora ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "folder", "pipe", "device", "link to itself", "sparse gigabyte",
                                  "no utf-8", "a pickle"])  # fmt: skip
@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_a_corpus_that_is_no_text_is_refused(what, name, tmp_path):
    no_file(what, tmp_path / name)
    assert str(tmp_path / name) in refused(lambda: list(texts_of(tmp_path / name)))


def test_a_corpus_is_read_line_by_line_however_it_ends(tmp_path, monkeypatch):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\r\n\n  two\u2028x \n three".encode())
    assert list(texts_of(path)) == ["one", "  two\u2028x ", " three"]
    monkeypatch.setattr(_files.text_lines, "__defaults__", (10,))
    path.write_text("short\n" + "long" * 10)
    assert "a line of it has more than 10 bytes" in refused(lambda: list(texts_of(path)))


# --- texts of sites ---------------------------------------------------------------------------------


def test_a_slice_names_each_site_once():
    """A short text must not stand for a million sites of a model that has a hundred."""
    many = ",".join(["*", "0:", "1", "-3", "*"] * 500)
    found = list(expand(as_sites(f"L{many}.N{many.replace('-3', '3')}"), shared("llama").anatomy, 3))
    assert len(found) == len(set(found)) == 3 * 40
