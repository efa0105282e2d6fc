"""Surgery's speed, side by side in one process: ``make bench-surgery``.

1. Every neuron of the model zeroed, one row each, against one nnsight trace a neuron (a sample of them, run in turn
   with the sweep, layer by layer), and against the matrix products that such a sweep cannot do without.
2. Rows at 16, 128 and 1,024 tokens, and the peak memory above the loaded model, each in a process of its own.
3. Grids: heads, (head, source) pairs, and a clean/corrupt patching grid, against one trace a cell.

``--device cuda --model FOLDER`` runs the same elsewhere; ``--every 5`` takes every fifth layer only.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import nnsight
import torch

import resid_surgery as rs

SHORT = "The capital of France is"
LONG = (
    "Paris has been a centre of trade, learning and art since the Middle Ages, and millions of people from all over "
    "the world travel to it every year to see its museums, its bridges and its tower. Everyone who went to school "
    "knows it: the capital of France is"
)
EARLY = (
    "France is a country. It has mountains, rivers, old towns and good food, and many people travel there every year "
    "to see them. Its largest city is also the one in which its government sits. That city, the capital of the "
    "country, is called"
)
TARGET, VERSUS = " Paris", [" London", " Rome"]


def seconds(job: Callable[[], object], device: str = "cpu") -> float:
    start = time.perf_counter()
    job()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class OneByOne:
    """What one would write today: a trace per intervention, on a copy of the model's modules."""

    def __init__(self, model, rec) -> None:
        self.traced, self.rec = nnsight.NNsight(model.shadow), rec
        self.ids = torch.tensor([rec.prompt.ids], device=model.device)

    def zero(self, layer: int, neuron: int) -> torch.Tensor:
        with torch.no_grad(), self.traced.trace(input_ids=self.ids, use_cache=False, logits_to_keep=1):
            place = self.traced.model.layers[layer].mlp.down_proj
            x = place.input.clone()
            x[0, -1, neuron] = 0
            place.input = x
            logits = self.traced.output.logits.save()
        return logits[0, -1]

    def zero_head(self, layer: int, head: int, width: int) -> torch.Tensor:
        with torch.no_grad(), self.traced.trace(input_ids=self.ids, use_cache=False, logits_to_keep=1):
            place = self.traced.model.layers[layer].self_attn.o_proj
            x = place.input.clone()
            x[0, -1, head * width : (head + 1) * width] = 0
            place.input = x
            logits = self.traced.output.logits.save()
        return logits[0, -1]

    def patch(self, layer: int, position: int, value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.traced.trace(input_ids=self.ids, use_cache=False, logits_to_keep=1):
            place = self.traced.model.layers[layer]
            x = place.input.clone()
            x[0, position] = value
            place.input = x
            logits = self.traced.output.logits.save()
        return logits[0, -1]


def products(model, layers: list[int], rows: int, tokens: int, vocabulary: bool) -> Callable[[], None]:
    """The matrix products of `rows` rows from each of some layers on, `tokens` at a time, and nothing else."""
    blocks = [
        [getattr(block.self_attn, f"{x}_proj").weight for x in "qkvo"]
        + [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight]
        for block in model.shadow.model.layers
    ]
    like = {"device": model.device, "dtype": model.dtype}
    inputs = {width: torch.randn(1, tokens, width, **like) for width in {w.shape[1] for w in blocks[0]}}
    unembedding = [model.unembedding[low : low + 8192] for low in range(0, model.vocab_size, 8192)]
    turned = torch.randn(model.anatomy.d_model, tokens, **like)

    def run() -> None:
        with torch.no_grad():
            for layer in layers:
                for _ in range(-(-rows // tokens)):
                    for w in (w for block in blocks[layer:] for w in block):
                        torch.nn.functional.linear(inputs[w.shape[1]], w)
                    for w in unembedding if vocabulary else ():
                        w @ turned

    return run


def every_neuron(model, text: str, every: int, sample: int, device: str) -> None:
    rec = rs.record(model, rs.Prompt(text, target=TARGET, versus=VERSUS))
    single, n, width = OneByOne(model, rec), model.anatomy.n_layers, model.anatomy.d_mlp
    spent = {"log_prob": 0.0, "bs": 0.0, "traces": 0.0, "products": 0.0, "products_bs": 0.0}
    traces, worst = 0, 0.0
    rs.sweep(rec, rs.grid(rec, rs.Zero, f"L{n - 1}.N0:64"), progress=False)
    single.zero(0, 0)
    thirds = [list(range(0, n, every))[i::3] for i in range(3)]
    for layers in thirds:  # in turn: a third of each side
        grid = rs.grid(rec, rs.Zero, [f"L{layer}.N*" for layer in layers])
        tables: list = []
        for measure in ("log_prob", "bs"):
            spent[measure] += seconds(
                lambda m=measure, g=grid, t=tables: t.append(rs.sweep(rec, g, measure=m, progress=False)), device
            )
        tokens = 256 if device == "cpu" else 2048
        for name, vocabulary in (("products", True), ("products_bs", False)):
            spent[name] += seconds(products(model, layers, width, tokens, vocabulary), device)
        found = tables[0].set_index("site")["log_prob"]
        for i in range(sample // 3):
            layer, neuron, kept = layers[i % len(layers)], (37 * i + 11) % width, []
            spent["traces"] += seconds(lambda n=neuron, k=kept, at=layer: k.append(single.zero(at, n)), device)
            traces += 1
            log_p = float(torch.log_softmax(kept[0].float(), -1)[rec.prompt.target])
            worst = max(worst, abs(log_p - float(found[f"L{layer}.N{neuron}"])))
    each, rows = spent["traces"] / traces, sum(map(len, thirds)) * width
    print(f"every neuron, {len(rec.prompt.ids)}-token prompt: {rows} rows")
    report("one nnsight trace each / sweep", each * rows / spent["log_prob"], each * rows, spent["log_prob"], "s",
           ">= 50" if len(rec.prompt.ids) < 10 else ">= 100")  # fmt: skip
    report('the same, measure="bs"', each * rows / spent["bs"], each * rows, spent["bs"], "s")
    rates = [f"{rows / spent[measure]:.0f}" for measure in ("log_prob", "bs")]
    print(f"   {rates[0]} rows/s, {rates[1]} with bs-values only; {traces} traces timed, {each * 1e3:.0f} ms each")
    print(f"   largest difference from them: {worst:.1e} nats")
    for name, products_name in (("log_prob", "products"), ("bs", "products_bs")):
        share = spent[products_name] / spent[name]
        print(f"{f'of the rate of the products alone, {name}':46}{share * 100:7.0f} %    goal >= 75", flush=True)


def report(name: str, ratio: float, a: float, b: float, unit: str, goal: str = "") -> None:
    print(
        f"{name:46}{ratio:7.1f} x    ({a:.1f} {unit} / {b:.1f} {unit})" + (f"  goal {goal}" if goal else ""), flush=True
    )


def grids(model, text: str, other: str, device: str, cells: int = 24, only: str = "") -> None:
    rec = rs.record(model, rs.Prompt(text, target=TARGET, versus=[" Rome"]), positions="all")
    corrupt = rs.record(model, rs.Prompt(other, target=TARGET, versus=[" Rome"]), positions="all")
    single, n, width = OneByOne(model, corrupt), model.anatomy.n_layers, model.anatomy.d_head
    clean = OneByOne(model, rec)
    picked = [(7 * i % n, (5 * i) % rec.n_positions) for i in range(cells)]
    jobs = {
        "heads, one trace each / grid": (
            lambda: rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*"), progress=False),
            lambda layer, at: clean.zero_head(layer, at % model.anatomy.n_heads, width)),
        "(head, source), one trace each / grid": (
            lambda: rs.sweep(rec, rs.grid(rec, rs.Zero, "L*.H*<*"), progress=False),
            lambda layer, at: clean.zero_head(layer, at % model.anatomy.n_heads, width)),
        "patching, one trace each / layer x position": (
            lambda: rs.patching(rec, corrupt, "L*.resid_pre", progress=False),
            lambda layer, at: single.patch(layer, at, rec.stream.resid_pre[layer, at])),
    }  # fmt: skip
    print(f"grids, {rec.n_positions}-token prompts")
    for name, (grid, cell) in ((name, job) for name, job in jobs.items() if only in name):
        cell(0, 0)
        one = statistics.median(seconds(lambda c=c, cell=cell: cell(*c), device) for c in picked)
        tables: list = []
        spent = seconds(lambda grid=grid, tables=tables: tables.append(grid()), device)
        rows, idle = len(tables[0]), int((tables[0]["frame"] == "none").sum())
        goal = ">= 15" if "patching" in name else ""
        report(name, one * rows / spent, one * rows, spent, "s", goal)
        print(f"   {rows} cells, {idle} of them equal in both prompts" if idle else f"   {rows} cells", flush=True)


MEMORY = """
import ctypes, resource, sys, threading, time
import torch
import resid_surgery as rs

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

model = rs.load("smollm2-135m")
ids = (model.tokenizer.encode("The capital of France is a city on the river Seine and") * 200)[: int(sys.argv[1])]
rec = rs.record(model, rs.Prompt(ids=ids, target=" Paris"))
rs.sweep(rec, [rs.Zero("L29.N0")])
ctypes.CDLL(None).malloc_trim(0)
before, peak, done = resident(), [0.0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
rows = rs.grid(rec, rs.Zero, "L0,10,20.N0:510")
start = time.perf_counter()
rs.sweep(rec, rows)
spent = time.perf_counter() - start
done.set()
watcher.join()
print(peak[0] - before, len(rows) / spent)
"""


def memory() -> None:
    for tokens in (16, 128, 1024):
        out = subprocess.run([sys.executable, "-c", MEMORY, str(tokens)], check=True, capture_output=True, text=True)
        above, rate = out.stdout.split()
        name = f"{tokens} tokens: peak memory above the model"
        print(
            f"{name:46}{float(above):7.0f} MB   ({float(rate):.0f} rows/s from layers 0, 10, 20)  goal <= 300",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--every", type=int, default=1, help="every n-th layer only")
    parser.add_argument("--sample", type=int, default=200, help="traces timed")
    parser.add_argument("--skip-memory", action="store_true")
    args = parser.parse_args()
    model = rs.load(args.model, device=args.device, dtype=args.dtype)
    device = model.device.type
    print(f"{model!r}, {torch.get_num_threads()} threads")
    every_neuron(model, SHORT, args.every, args.sample, device)
    every_neuron(model, LONG, args.every, args.sample, device)
    grids(model, SHORT, "The capital of Italy is", device)
    grids(model, LONG, LONG.replace("of France", "of Italy"), device, cells=12)
    grids(model, EARLY, EARLY.replace("France", "Italy"), device, cells=12, only="patching")
    if not args.skip_memory:
        memory()


if __name__ == "__main__":
    main()
