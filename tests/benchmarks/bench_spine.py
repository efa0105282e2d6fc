"""The spine's speed, side by side in one process: ``make bench``.

Prints ratios, each the median over interleaved repeats of two things run in turn:
exact top-100 neurons against the exhaustive pass over the vocabulary, record against a plain
forward, import time, and the peak memory of locate above the loaded model.
"""

import argparse
import statistics
import subprocess
import sys

import torch
from measuring import PROMPT, interleaved, peak, seconds

import resid_surgery as rs
from resid_surgery.attribution.searching import rank

LOAD = """
import torch, nnsight, transformers
import resid_surgery as rs
rs.load
times = [time.perf_counter()]
for _ in range(2):
    rs.load("smollm2-135m")
    times.append(time.perf_counter())
print(times[1] - times[0], times[2] - times[1])
"""


def load_times() -> tuple[float, float]:
    """Seconds of the first load in a fresh process (transformers imports its own parts then), and of the next."""
    run = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True)
    first, again = run.stdout.split()
    return float(first), float(again)


def fresh(code: str, repeats: int = 5) -> float:
    """Median seconds that a fresh interpreter spends on some code, its own start taken off."""

    def run(text: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.DEVNULL))

    return statistics.median(run(code) - run("pass") for _ in range(repeats))


def exhaustive(rec: rs.Recording, layer: int, rows: int = 256) -> torch.Tensor:
    """What one would write today: log-softmax of every neuron's logits of a layer, in batches."""
    model, record = rec.model.module, rec.layers[layer]
    w_u, gamma, block = model.lm_head.weight, model.model.norm.weight, model.model.layers[layer]
    out = []
    with torch.no_grad():
        s = (rec.resid_final.square().mean() + model.model.norm.variance_epsilon).sqrt()
        x = record.resid_pre + record.attn_out
        before = torch.log_softmax((x / s * gamma) @ w_u.T, -1)[rec.prompt.target]
        v = record.groups[0].coefficient[:, None] * block.mlp.down_proj.weight.T
        for low in range(0, len(v), rows):
            bs = ((x + v[low : low + rows]) / s * gamma) @ w_u.T
            out.append(torch.log_softmax(bs, -1)[:, rec.prompt.target] - before)
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip-exhaustive", action="store_true", help="leave out the 20-second pass")
    args = parser.parse_args()
    model = rs.load("smollm2-135m")
    rec = rs.record(model, PROMPT)
    ids = torch.tensor([rec.prompt.ids])

    def plain() -> None:
        with torch.no_grad():
            model.module(ids, use_cache=False)

    print(f"{model!r}, {torch.get_num_threads()} threads, {len(rec.prompt.ids)}-token prompt")
    plain()
    first = seconds(lambda: rs.locate(rec, k=100))
    found = rs.locate(rec, k=100)
    report("record / plain forward", *interleaved(lambda: rs.record(model, PROMPT), plain, args.repeats), "<= 1.3")
    report("exact top-100 / plain forward", *interleaved(lambda: rs.locate(rec, k=100), plain, args.repeats), "<= 2")
    print(f"   exact evaluations {found.evaluations} of {found.candidates}; first call on a model {first * 1e3:.0f} ms")
    own = interleaved(lambda: rs.locate(rec, k=100, norm="own"), plain, args.repeats)
    report("exact top-100, own norm / plain forward", *own)
    hashed = statistics.median(seconds(model.fingerprint) for _ in range(args.repeats))
    print(f"{'full hash of the weights, at every use':42}{hashed * 1e3:8.0f} ms")
    first_load, again = load_times()
    print(
        f"{'load, already converted':42}{again:8.1f} s    ({first_load:.1f} s the first time in a process)  goal <= 3"
    )
    above, before = peak("rs.locate(rec, k=100)")
    print(f"{'peak memory of locate above the model':42}{above:8.0f} MB   (model loaded: {before:.0f} MB)  goal <= 300")
    if not args.skip_exhaustive:
        values: list[torch.Tensor] = []
        slow, fast = 0.0, []
        for layer in range(model.anatomy.n_layers):  # in turn: a layer of the one, all of the other
            slow += seconds(lambda layer=layer: values.append(exhaustive(rec, layer)))
            fast.append(seconds(lambda: rs.locate(rec, k=100)))
        located = statistics.median(fast)
        report("exhaustive pass / exact top-100", slow, located, slow / located, ">= 200")
        best = {f"L{i // 1536}.N{i % 1536}" for i in rank(torch.cat(values))[:100]}
        print(f"   same set: {best == {str(s) for s in found.sites}}")
    print(f"{'import resid_surgery':42}{fresh('import resid_surgery') * 1e3:8.0f} ms   goal <= 100")
    print(f"{'resid-surgery --help':42}{fresh(HELP) * 1e3:8.0f} ms   goal <= 500")


def report(name: str, a: float, b: float, ratio: float, goal: str = "") -> None:
    line = f"{name:42}{ratio:8.2f} x    ({a * 1e3:.0f} ms / {b * 1e3:.0f} ms)"
    print(line + (f"  goal {goal}" if goal else ""))


HELP = """
import sys
sys.argv = ["resid-surgery", "--help"]
from resid_surgery.cli.main import run
try:
    run()
except SystemExit:
    pass
"""

if __name__ == "__main__":
    main()
