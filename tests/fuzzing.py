"""Fuzzing: for every file format and text that the project reads, valid samples, ways to damage them, and what reading
them may come to. Shared by `test_fuzz` (a few hundred cases) and `benchmarks/bench_fuzz` (10,000 a parser).

Reading any content must give a value or a `ResidSurgeryError` of one line, in bounded time; a value must come back from
being written again, and what is protected by a hash must be what was written.
"""

import atexit
import json
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
import xxhash
from hypothesis import strategies as st
from safetensors.torch import save as tensor_bytes
from test_importing import NESTED, PATTERNS, SAMPLES, TRIPLES, WIKIBIO
from tiny import build, shared

import resid_surgery as rs
from resid_surgery._files import parse_json
from resid_surgery.addresses import expand, parse_site
from resid_surgery.attribution import ranges
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.exposure import texts_of
from resid_surgery.editing.gating import Measured, judge, verdict
from resid_surgery.editing.importing import read_probes
from resid_surgery.editing.policy import Policy
from resid_surgery.editing.remembering import Remembered
from resid_surgery.editing.running import Passage
from resid_surgery.errors import ResidSurgeryError
from resid_surgery.experiments.cases import lines_of
from resid_surgery.models import checkpoints, kept
from resid_surgery.models.headers import check_gguf
from resid_surgery.models.prompts import bind
from resid_surgery.stream.loading import load
from resid_surgery.views import assets

SECONDS = 10  # no content may take longer
LONGEST_MESSAGE = 500


@dataclass(frozen=True, eq=False)
class Parser:
    """One reader of files or texts.

    Attributes:
        name: of the parser. file: what the content is called in the folder of a case. read: the reader of that file.
        made: gives `samples`, valid contents. holds: whether what was read is well: it comes back from being written,
            or is what was written. repaired: makes hashes right again after damage, as a hostile writer would.
        lines: it is JSON lines. binary: it is no JSON. share: of CI's cases, for what is slow.
    """

    name: str
    file: str
    read: Callable[[Path], Any]
    made: Callable[[], tuple[bytes, ...]]
    holds: Callable[[Any, Path], bool] = field(default=lambda value, path: True)
    repaired: Callable[[bytes], bytes] | None = None
    lines: bool = False
    binary: bool = False
    share: float = 1.0

    @cached_property
    def samples(self) -> tuple[bytes, ...]:
        return self.made()


# --- damage -----------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324,
    "", " ", "\x00", "a" * 3000, "../../etc/passwd", "/dev/zero", "\ud800", "é\u2028", "L0.mlp", "L0.N1", "$x", "$$x",
    "target", "all", "each", "{}", "Infinity", [], {}, [[]], [None], {"": ""}, [1, 2, 3], ["a", 1], [0.5, -2.0],
    {"a": {"b": [{}]}}, nested(30), nested(70), [0] * 3000, {"$float": "Infinity"}, "int64", "float64",
    "datetime64[ns]", "category",
)  # fmt: skip
RAW = (b"NaN", b"-Infinity", b"1e999", b"0x10", b"1" * 5000, b"[" * 3000, b'{"a":' * 3000, b'{"a":1,"a":2}',
       b"\xff\xfe", b"\xef\xbb\xbf{}", b"{,}", b"'a'", b'"\\ud800"', b"")  # fmt: skip
FLAG = "@@raw@@"


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside plain data."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inside for path in places(one, (*at, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def damaged_data(rng: Random, sample: Any) -> Any:
    """Plain data with one to three places changed: another value, one less, one more, two swapped, a key renamed."""
    value = deepcopy(sample)
    for _ in range(rng.randint(1, 3)):
        there = places(value)[1:]
        if not there:
            return deepcopy(rng.choice(NASTY))
        path = rng.choice(there)
        inside, key = at(value, path[:-1]), path[-1]
        how = rng.choice(["nasty"] * 4 + ["raw", "drop", "swap", "wrap", "more", "rename"])
        if how == "nasty":
            inside[key] = deepcopy(rng.choice(NASTY))
        elif how == "raw":
            inside[key] = FLAG + str(rng.randrange(len(RAW)))
        elif how == "drop":
            del inside[key]
        elif how == "swap":
            inside[key] = deepcopy(at(value, rng.choice(there)))
        elif how == "wrap":
            inside[key] = rng.choice([[inside[key]], {"a": inside[key]}])
        elif isinstance(inside, list):
            inside.insert(key, deepcopy(inside[key]))
        else:
            held = inside.pop(key) if how == "rename" else inside[key]
            inside[rng.choice(["a", "", key + "x", key.upper(), "é"])] = held
    return value


def as_bytes(value: Any) -> bytes:
    """Data as JSON, with raw pieces where `damaged_data` left room for them."""
    text = json.dumps(value).encode()
    for number, piece in reversed(list(enumerate(RAW))):
        text = text.replace(f'"{FLAG}{number}"'.encode(), piece)
    return text


def damaged_bytes(rng: Random, sample: bytes) -> bytes:
    """Bytes cut off, flipped, taken out, doubled, overwritten or followed by others; half of it near the beginning."""
    for _ in range(rng.randint(1, 2)):
        last = max(0, len(sample) - 1)
        low = rng.randint(0, rng.choice([last, min(64, last)]))
        high = min(len(sample), low + rng.randint(1, 40))
        how = rng.choice(["cut", "flip", "flip", "flip", "out", "twice", "over", "behind", "number"])
        if how == "cut":
            sample = sample[:low]
        elif how == "flip" and sample:
            sample = sample[:low] + bytes([sample[low] ^ 1 << rng.randrange(8)]) + sample[low + 1 :]
        elif how == "out":
            sample = sample[:low] + sample[high:]
        elif how == "twice":
            sample = sample[:high] + sample[low:]
        elif how == "behind":
            sample = sample + rng.randbytes(rng.randint(0, 20))
        elif how == "number":
            size = rng.choice([1, 2, 4, 8])
            number = rng.choice([0, 1, 2**7, 2**31 - 1, 2**40, 2**60, 2**63, 2**64 - 1]) % 2 ** (8 * size)
            sample = sample[:low] + number.to_bytes(size, "little") + sample[low + size :]
        else:
            sample = sample[:low] + rng.randbytes(rng.randint(1, 8)) + sample[high:]
    return sample


def content_for(rng: Random, parser: Parser) -> bytes:
    """Content for a parser: mostly valid content that was damaged, now and then valid or any bytes."""
    sample, how = rng.choice(parser.samples), rng.randrange(20)
    if how == 0:
        return rng.randbytes(rng.randint(0, 200))
    if how == 1:
        return sample
    if parser.binary or how >= 14:
        found = damaged_bytes(rng, sample)
    elif parser.lines:
        data = damaged_data(rng, [json.loads(line) for line in sample.splitlines()])
        found = b"\n".join(as_bytes(one) for one in (data if isinstance(data, list) else [data]))
    else:
        found = as_bytes(damaged_data(rng, json.loads(sample)))
    return parser.repaired(found) if parser.repaired and rng.randrange(5) else found


def contents(parser: Parser) -> st.SearchStrategy[bytes]:
    """`content_for`, by dice that hypothesis throws."""
    return st.randoms(use_true_random=True).map(lambda rng: content_for(rng, parser))


# --- outcomes ---------------------------------------------------------------------------------------


class Hang(BaseException):
    """A parser took longer than it may."""


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Hang` in the main thread once a block takes too long."""

    def late(*_: Any) -> None:
        raise Hang(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(parser: Parser, content: bytes, folder: Path) -> str:
    """ "accepted" or "refused"; anything else that a parser does is an error of the test."""
    path = folder / parser.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with in_time():
        try:
            value = parser.read(path)
        except ResidSurgeryError as error:
            said = str(error)
            assert said.strip(), "an error must say something"
            assert "\n" not in said, said[:300]
            assert len(said) < LONGEST_MESSAGE, said[:300]
            return "refused"
        assert parser.holds(value, path), f"{value!r:.500} does not come back"
    return "accepted"


# --- parsers ----------------------------------------------------------------------------------------


def written(write: Callable[[Path], Any], name: str) -> bytes:
    """What a writer writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def kept_folder(name: str) -> Path:
    """A folder that stays as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


def listed(names: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(name.encode() for name in names)


SITE_TEXTS = ("L20.N1297", "L3.E5.N17", "L3.shared.N17", "L12.H4", "L12.H4<3", "L3.H4.D7", "L3.H4.D7<2", "L3.Q4",
              "L-1.K0", "L12.attn", "L12.mlp", "L3.resid_pre", "L3.attn.bias", "L3.E1.bias", "embed", "unembed.bias",
              "L20:24.N*", "L*.H*<3", "L3.H0,2", "L3.mlp@2", "L12.H4@-1", "L3.mlp->L5.N7", "L3.H2->L9.H4.query",
              "embed->unembed:frozen", "L0.N1->L2.H1<3.value:frozen", "L0,1,-1.N1:5,7")  # fmt: skip


def site_back(value: Any, path: Path) -> bool:
    return parse_site(str(value)) == value and repr(parse_site(str(value))) == repr(value)


def expanded(path: Path) -> Any:
    """A slice with all its sites in a tiny model."""
    return list(expand([parse_site(text(path))], shared("llama").anatomy, 5))


def positions(path: Path) -> Any:
    """Positions of an operation, and what they are in a prompt."""
    one = rs.Zero("L0.mlp", positions=_json(path))
    return one, bind(rs.Prompt(ids=[5, 4, 3, 2], target=1), None, shared("llama")).positions(one.positions)


def _json(path: Path) -> Any:
    """Data of a JSON file, or a refusal: what a caller would hand on."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise rs.ArgumentError(str(error)) from None


OPERATIONS = [
    rs.Zero(["L0.N3", "L1.H2<1"], positions=[0, 2]), rs.Scale("L*.mlp", 2.0, positions="all"),
    rs.Clamp("L1.N3", 0.5), rs.Attend("L2.H1<0", 0.25, renormalise=True), rs.Cut("L0.mlp", "L2.H1", side="query"),
    rs.Steer("L1.mlp", toward=" Paris", away=5, times=2.0),
]  # fmt: skip
VECTORS = [rs.Steer("L1.mlp", [1.0, 2.0]), rs.Set(["L0.N1", "L0.N2"], [[1.5], [2.0]]),
           rs.Set("L1.H0<1", [[[1.0, 2.0], [3.0, 4.0]]], positions=[1, 2])]  # fmt: skip


@cache
def saved_json() -> bytes:
    return written(lambda path: rs.save_interventions(path, OPERATIONS), "ops.json")


def operations_back(value: Any, path: Path) -> bool:
    return bool(rs.load_interventions(rs.save_interventions(path.with_name("again.json"), value)) == value)


@cache
def saved_operations() -> tuple[bytes, bytes]:
    """JSON and tensors of operations with vectors."""
    folder = kept_folder("vectors")
    path = rs.save_interventions(folder / "ops.json", VECTORS)
    return path.read_bytes(), path.with_suffix(".safetensors").read_bytes()


def read_vectors(path: Path) -> Any:
    """The tensors beside a good file, whose hash is made to be theirs."""
    said, _ = saved_operations()
    body = json.loads(said)
    body["tensors"] = {"file": path.name, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    beside = path.with_name("ops.json")
    beside.write_text(json.dumps(body))
    return rs.load_interventions(beside)


@cache
def an_edit() -> Edit:
    """An edit with every kind of change, operations with vectors, rewrites, a table and keys."""
    from resid_surgery.editing.changes import Dense, LowRank, Rows

    model, g = shared("llama"), torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    down = "model.layers.{}.mlp.down_proj.weight".format
    changes = [Rows(down(0), (), (24, 40), (1,), torch.tensor([[3], [5]]), some(2, 24)),
               LowRank(down(1), (), (24, 40), (), some(24, 1), some(1, 40)),
               Dense("model.norm.weight", (), (24,), some(24))]  # fmt: skip
    return new_edit(
        model, changes, method="by hand", settings={"layer": 1, "most": float("inf")}, interventions=VECTORS[:2],
        rewrites=[rs.Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris")],
        fitting=pd.DataFrame({"fact": ["France", None], "loss": [0.1, 1 / 3]}), keys={"L1": some(2, 3)},
    )  # fmt: skip


@cache
def saved_edit() -> bytes:
    return written(an_edit().save, "one.safetensors")


@cache
def edit_parts() -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    path = kept_folder("edit") / "one.safetensors"
    path.write_bytes(saved_edit())
    return kept.read_tensors(path)


def same_edit(value: Edit, path: Path) -> bool:
    return value.hash == an_edit().hash and dict(value.about) == dict(an_edit().about)


def read_told_edit(path: Path) -> Edit:
    """An edit whose JSON is the content and whose hash is right: as a hostile writer would make it."""
    about, tensors = edit_parts()
    said = text(path)
    told = said.encode("utf-8", "replace").decode("utf-8")
    held = about | {"edit": told, "hash": kept.tensors_hash(tensors, told)}
    file = path.with_name("told.safetensors")
    file.write_bytes(tensor_bytes(tensors, held))
    return Edit.load(file)


def edit_back(value: Edit, path: Path) -> bool:
    again = Edit.load(value.save(path.with_name("again.safetensors")))
    return again.hash == value.hash and dict(again.about) == dict(value.about) and again.rewrites == value.rewrites


def probes_back(value: Any, path: Path) -> bool:
    again = rs.load_probes(rs.save_probes(path.with_name("again.jsonl"), value))
    return bool(again == value)


def own_probes() -> bytes:
    probes = rs.ProbeSet(
        (rs.Probe("ripple", "A is", "f", "", "one hop", " B", " C", conditions=(("D is", " E"),), others=(" F",)),
         rs.Probe("choice", "A is", target=" B", wrong=(" C",)), rs.Probe("locality", "G is", stratum="unrelated")),
        "mine", (rs.Rewrite("A {} is", "b", " c"),),
    )  # fmt: skip
    return written(lambda path: rs.save_probes(path, probes), "own.jsonl")


def rehashed_probes(content: bytes) -> bytes:
    """Without the hash: as by a writer that knows no better."""
    lines = content.split(b"\n")
    try:
        head = json.loads(lines[0])
        head.pop("hash", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return content
    return b"\n".join([json.dumps(head).encode(), *lines[1:]])


PLAN = {
    "schema": 1, "what": "resid_surgery plan",
    "axes": {"k": [1, 10], "factor": [0.0, 2.0], "side": ["query", None]},
    "locate": {"best": {"kind": "neuron", "k": "$k", "score": "log_prob_increase", "layers": [0, 1]},
               "others": {"like": "best", "draw": 0}, "mine": {"sites": ["L0.N1", "L1.H0"]}},
    "intervene": {"best": [{"kind": "Scale", "sites": "$best", "factor": "$factor"}], "none": [{"kind": "Zero", "sites":
                  "$others", "positions": "each"}, {"kind": "Patch", "sites": "L0.mlp", "donor": "$corrupt"}],
                  "more": [{"kind": "Steer", "sites": ["L1.mlp"], "toward": "$target", "away": "$versus", "times": 2.0},
                           {"kind": "Set", "sites": ["L0.N1"], "values": [[0.5]]}],
                  "cut": [{"kind": "Cut", "sites": ["L0.mlp->L1.mlp"], "each": True}, {"kind": "Mean", "sites": "$mine",
                           "over": [{"text": "A", "target": " B"}], "align": {"0": 1}},
                          {"kind": "Clamp", "sites": "L0.N3", "value": 1.5, "positions": "$side"}]},
    "measure": "log_prob", "known": False, "seed": 3, "model": "smollm2-135m", "prompts": {"facts": ["capital"]},
}  # fmt: skip
CASES = [
    {"text": "The capital of France is", "target": " Paris", "versus": [" Rome"], "relation": "capital", "half": 0.5},
    {"ids": [5, 4, 3], "target": 1, "position": 1, "donors": {"corrupt": [{"ids": [5, 4, 2], "target": 1}]}, "x": None},
]  # fmt: skip


def plan_back(value: Any, path: Path) -> bool:
    plan, _ = value
    again, _ = rs.read_plan(plan.save(path.with_name("again.json")))
    return bool(again == plan and again.cells == plan.cells)


def cases_back(value: Any, path: Path) -> bool:
    file = path.with_name("again.jsonl")
    file.write_bytes(lines_of(value))
    return bool(rs.read_cases(file) == value)


@cache
def a_run() -> Path:
    """A small finished run with every table but the effects, in a folder that stays as long as the process."""
    folder = kept_folder("run")
    plan = {"locate": {"best": {"k": 2}}, "intervene": {"best": {"kind": "Zero", "sites": "$best"}}}
    prompts = [{"ids": [5, 4, 3], "target": 1, "relation": "a"}, {"ids": [9, 8, 7], "target": 10**6, "relation": "b"}]
    rs.run(shared("llama"), prompts, plan, out=folder / "run", max_failures=None, progress=False)
    return folder / "run"


@cache
def run_tables() -> dict[str, pd.DataFrame]:
    found = rs.open_run(a_run())
    return {name: found.read(name) for name in found.tables}


def read_run_folder(path: Path, name: str = "") -> Any:
    """Everything of the run, one of whose files is the content."""
    out = path.parent / "run"
    if not out.exists():
        shutil.copytree(a_run(), out)
    place = out / name
    good = place.read_bytes()
    place.write_bytes(path.read_bytes())
    try:
        found = rs.open_run(out)
        assert repr(found)
        return {table: found.read(table) for table in found.tables}
    finally:
        place.write_bytes(good)


def same_run(value: Any, path: Path) -> bool:
    return value.keys() == run_tables().keys() and all(value[name].equals(one) for name, one in run_tables().items())


@cache
def a_gguf() -> bytes:
    """A llama of one layer as a GGUF file, with its tokenizer."""
    from gguf import GGUFWriter

    sizes = {
        "token_embd": (33, 8),
        "output": (33, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (8, 8),
        "blk.0.ffn_up": (8, 8),
        "blk.0.ffn_down": (8, 8),
    }
    numbers = np.random.default_rng(0)

    def write(path: Path) -> None:
        writer = GGUFWriter(path, "llama")
        for name, number in {"context_length": 64, "embedding_length": 8, "feed_forward_length": 8, "block_count": 1,
                             "head_count": 2, "head_count_kv": 1, "vocab_size": 33, "rope_dimension_count": 4,
                             "bos_token_id": 32, "eos_token_id": 32}.items():  # fmt: skip
            getattr(writer, f"add_{name}")(number)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(1e4)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*map(chr, range(97, 123)), "ab", "cd", "ef", "gh", "ij", "kl", "<s>"])
        writer.add_token_types([1] * 32 + [3])
        writer.add_token_merges(["a b", "c d", "e f", "g h", "i j", "k l"])
        for name, shape in sizes.items():
            writer.add_tensor(f"{name}.weight", numbers.normal(size=shape).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return written(write, "tiny.gguf")


def load_quietly(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path)


def read_gguf_header(path: Path) -> Any:
    """What the library checks, and then what the reader that it hands the file on to makes of it."""
    from gguf import GGUFReader

    try:
        check_gguf(path)
    except ValueError as error:
        raise rs.LoadError(str(error)) from None
    try:
        return len(GGUFReader(path).tensors)
    except Exception as error:  # noqa: BLE001  (as `load` has it: the reader raises many kinds)
        raise rs.LoadError(type(error).__name__) from None


@cache
def a_checkpoint() -> Path:
    """A folder of a tiny model in shards."""
    folder = kept_folder("checkpoint")
    build("llama", torch.float32).save_pretrained(folder, max_shard_size="40KB")  # type: ignore[operator]
    return folder


def load_folder(path: Path, name: str = "") -> Any:
    """A checkpoint, one of whose files is the content."""
    return in_checkpoint(path, name, load_quietly)


def check_folder(path: Path, name: str) -> Any:
    """This library's own look at a checkpoint, before transformers reads it."""
    return in_checkpoint(path, name, checkpoints._check_folder)


def in_checkpoint(path: Path, name: str, read: Callable[[Path], Any]) -> Any:
    folder = path.parent / "checkpoint"
    if not folder.exists():
        shutil.copytree(a_checkpoint(), folder)
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(path.read_bytes())
    try:
        return read(folder)
    finally:
        (folder / name).write_bytes(good)


def read_cached(path: Path) -> Any:
    return kept.read_kept(path)


KEPT = "kept.safetensors"
CACHED = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def nothing_or_the_same(value: Any, path: Path) -> bool:
    return value == {} or (value.keys() == CACHED.keys() and all(torch.equal(value[n], t) for n, t in CACHED.items()))


def cached() -> bytes:
    return tensor_bytes(CACHED, {"hash": kept.tensors_hash(CACHED, KEPT)})


@contextmanager
def own_cache(folder: Path) -> Iterator[Path]:
    """A cache folder of its own, in which everything is worth keeping."""
    before, worth = os.environ.get("RESID_SURGERY_CACHE"), ranges.WORTH_KEEPING
    os.environ["RESID_SURGERY_CACHE"], ranges.WORTH_KEEPING = str(folder), 0
    try:
        yield folder
    finally:
        ranges.WORTH_KEEPING = worth
        os.environ.pop("RESID_SURGERY_CACHE")
        os.environ.update({} if before is None else {"RESID_SURGERY_CACHE": before})


def remembered(what: str) -> list[Any]:
    """What a library that keeps things says of a tiny model, from its cache folder or by itself; as numbers."""
    model = shared("llama", torch.float32)
    if what == "figures":
        found = Remembered(model).figures([Passage((5, 4, 3, 2), (1, 3)), Passage((9, 8, 7), (0,))])
        return [[one.nll.nan_to_num(-1).tolist(), one.top.tolist(), one.entropy.tolist()] for one in found]
    if what == "continuations":
        return Remembered(model).continued([[5, 4], [3, 2, 1]], 3)
    model.cache.pop("ranges", None)
    rec = rs.record(model, rs.Prompt(ids=[5, 4, 3], target=1))
    return list(rs.scores(rec, bounds=True)["log_prob_increase_lower"])


REMEMBERED = ("figures", "continuations", "ranges")


@cache
def kept_of(what: str) -> tuple[Path, bytes, list[Any]]:
    """The file that is kept of it, as its place in a cache folder and its content, and what is in it."""
    with tempfile.TemporaryDirectory() as folder, own_cache(Path(folder)):
        value = remembered(what)
        (file,) = Path(folder).rglob("*.safetensors")
        return file.relative_to(folder), file.read_bytes(), value


def read_remembered(path: Path, what: str) -> Any:
    """What is said where the content stands in the cache folder."""
    place = path.parent / "cache" / kept_of(what)[0]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(path.read_bytes())
    with own_cache(path.parent / "cache"):
        return remembered(what)


def as_ever(value: Any, path: Path, what: str) -> bool:
    return bool(value == kept_of(what)[2])


SCRIPT = "window.vegaEmbed = 1;"


def scripts_kept(text: str) -> bytes:
    return f"{sha256(text.encode()).hexdigest()}\n{text}".encode()


def no_other_script(value: Any, path: Path) -> bool:
    return value is None or value == SCRIPT


def read_delta(path: Path) -> Any:
    return Edit.from_delta(shared("llama"), path)


def delta() -> bytes:
    down = "model.layers.0.mlp.down_proj.weight"
    return tensor_bytes({"model.norm.weight": torch.ones(24), f"{down}.left": torch.ones(24, 1),
                         f"{down}.right": torch.ones(1, 40)})  # fmt: skip


def read_policy(path: Path) -> Any:
    said = _json(path)
    if not isinstance(said, dict):
        raise rs.ArgumentError("gate -> [warn, fail]")
    return Policy().but(said)


def report() -> bytes:
    """A validation's report with tables of every type."""
    values = pd.DataFrame({"fact": ["a", "b", "c"], "prompt": ["x", "y", "z"], "value": [0.001, 0.002, 0.0015]})
    gates = judge([Measured("kl: unrelated text", values)], stream=False, resamples=100)
    tables = {"worst": pd.DataFrame({"text": ["a", None], "n": [1, 2], "x": [0.5, float("inf")], "t": [True, False]})}
    return rs.Validation(verdict(gates), gates, tables, {"seed": 3, "most": float("inf")}).to_json().encode()


def report_back(value: Any, path: Path) -> bool:
    for face in (value.markdown, value.junit, value._repr_html_, lambda: value.headline):
        face()
    return bool(rs.Validation.from_json(value.to_json()).to_json() == value.to_json())


def dumped(*many: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(one).encode() for one in many)


def jsonl(many: list[Any]) -> bytes:
    return b"\n".join(json.dumps(one).encode() for one in many)


def texts() -> Iterator[Parser]:
    """Sites and positions."""
    inside = ("L0:2.N*", "L*.H*<3", "L0.H0,2", "L1.mlp@2", "L-1.H*.D0:2", "L*.N0,3", "embed", "L0.mlp->L2.H1.value")
    yield Parser(
        "site", "site.txt", lambda path: parse_site(text(path)), lambda: listed(SITE_TEXTS), site_back, binary=True
    )
    yield Parser("sites of a slice", "site.txt", expanded, lambda: listed(inside), binary=True)
    yield Parser("positions", "where.json", positions, lambda: dumped("target", "all", 2, -1, [0, 1]))


def operations() -> Iterator[Parser]:
    """Interventions and edits."""
    yield Parser("interventions", "ops.json", rs.load_interventions, lambda: (saved_json(),), operations_back)
    made, name = (lambda: (saved_operations()[1],)), "interventions' vectors"
    yield Parser(name, "vectors.safetensors", read_vectors, made, operations_back, binary=True)
    yield Parser("edit", "edit.safetensors", Edit.load, lambda: (saved_edit(),), same_edit, binary=True)
    made = lambda: (edit_parts()[0]["edit"].encode(),)  # noqa: E731
    yield Parser("edit's JSON", "told.json", read_told_edit, made, edit_back)
    yield Parser("differences", "delta.safetensors", read_delta, lambda: (delta(),), binary=True)
    yield Parser("cached tensors", KEPT, read_cached, lambda: (cached(),), nothing_or_the_same, binary=True)


def probes() -> Iterator[Parser]:
    """The library's own probes, and the public formats."""
    yield Parser(
        "probes: own", "own.jsonl", rs.load_probes, lambda: (own_probes(),), probes_back, rehashed_probes, lines=True
    )
    for kind, sample in {**SAMPLES, "nested": NESTED, "biography": WIKIBIO}.items():
        read = partial(read_probes, format={"nested": "easyedit", "biography": "knowedit"}.get(kind, kind))
        yield Parser(f"probes: {kind}", "probes.json", read, partial(dumped, [sample, sample]), probes_back)
    read = partial(read_probes, format="pararel")
    yield Parser("probes: pararel", "pararel.json", read, partial(dumped, [*PATTERNS, *TRIPLES]), probes_back)
    some = partial(dumped, *([one] for one in SAMPLES.values()))
    yield Parser("probes: any", "any.json", read_probes, some, probes_back)


def plans() -> Iterator[Parser]:
    """Plans, prompts, texts, limits and reports."""
    limits = {"retention": [0.9, 0.8], "kl: unrelated text": {"single": [None, 0.5], "stream": [0.1, 0.2]}}
    some = lambda: (jsonl([{"text": "a b"}, "c"]),)  # noqa: E731
    yield Parser("plan", "plan.json", rs.read_plan, partial(dumped, PLAN), plan_back)
    yield Parser("cases", "cases.jsonl", rs.read_cases, lambda: (jsonl(CASES),), cases_back, lines=True)
    yield Parser("texts", "texts.jsonl", lambda path: list(texts_of(path)), some, lines=True)
    yield Parser("policy", "policy.json", read_policy, partial(dumped, limits))
    yield Parser("report", "report.json", rs.Validation.from_json, lambda: (report(),), report_back)


def folders() -> Iterator[Parser]:
    """Run folders, GGUF files and checkpoints."""
    shards = (f"{table}/s000000.parquet" for table in ("prompts", "rows", "located", "failures"))
    for name in ("manifest.json", *shards):
        made, plain = partial(content_of, a_run, name), name.endswith(".json")
        read = partial(read_run_folder, name=name)
        yield Parser(f"run: {name}", "file", read, made, same_run, binary=not plain, share=0.3)
    for what in REMEMBERED:
        made = lambda what=what: (kept_of(what)[1],)  # noqa: E731
        yield Parser(f"cached {what}", KEPT, partial(read_remembered, what=what), made, partial(as_ever, what=what),
                     binary=True, share=0.3)  # fmt: skip
    yield Parser(
        "cached scripts", "vega.js", assets._kept, lambda: (scripts_kept(SCRIPT),), no_other_script, binary=True
    )
    made = partial(content_of, a_checkpoint, "config.json")
    yield Parser("checkpoint's own checks: config", "file", partial(check_folder, name="config.json"), made)
    index = "model.safetensors.index.json"
    yield Parser("checkpoint's own checks: index", "file", partial(check_folder, name=index),
                 partial(content_of, a_checkpoint, index))  # fmt: skip
    yield Parser("GGUF header", "tiny.gguf", read_gguf_header, lambda: (a_gguf(),), binary=True)
    yield Parser("GGUF through load", "tiny.gguf", load_quietly, lambda: (a_gguf(),), binary=True, share=0.1)
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        made, plain = partial(content_of, a_checkpoint, name), name.endswith(".json")
        yield Parser(f"checkpoint: {name}", "file", partial(load_folder, name=name), made, binary=not plain, share=0.05)


def content_of(folder: Callable[[], Path], name: str) -> tuple[bytes, ...]:
    return ((folder() / name).read_bytes(),)


@cache
def parsers() -> dict[str, Parser]:
    """Every parser by its name."""
    return {one.name: one for some in (texts, operations, probes, plans, folders) for one in some()}
