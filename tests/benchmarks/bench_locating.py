"""Locating's speed, side by side in one process: ``make bench-locating``.

Prints ratios of exact answers by certificates to the exhaustive pass over the vocabulary that they replace: the best
and the worst 100 neurons of the whole real model, bounds of all, counts of helpful and harmful; what one projection
per direction saves for attention neurons at every source position; many prompts; and peak memory above the model.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from bench_spine import exhaustive
from measuring import PROMPT, interleaved, peak, seconds

import resid_surgery as rs
from resid_surgery.attribution.searching import rank


def report(name: str, a: float, b: float, ratio: float, goal: str = "") -> None:
    line = f"{name:58}{ratio:8.1f} x    ({a:.2f} s / {b * 1e3:.0f} ms)"
    print(line + (f"  goal {goal}" if goal else ""), flush=True)


JOBS = {
    "locate, best 100": "rs.locate(rec, k=100)",
    "locate, worst 100, with its table": "rs.locate(rec, k=100, worst=True)",
    "scores of two layers, all of them": "rs.scores(rec, score='all', layers=[3, 27])",
    "attention neurons at every position": "rs.locate(rec, k=100, kind='attn_neuron_source')",
    "locate on eight prompts": "list(rs.locate_each(model, [rec.prompt.source] * 8, k=10))",
}


def naive_sources(rec: rs.Recording, layer: int) -> torch.Tensor:
    """Attention neurons at every source position, one product with the vocabulary each."""
    from resid_surgery.attribution.states import States
    from resid_surgery.stream.kinds import attn_neuron_block

    block = attn_neuron_block(rec, layer, sources=True)
    states = States.of(rec, [(layer, "attn")], own=False)
    members = torch.arange(block.count)
    return torch.cat([states.evaluate(torch.zeros(len(some), dtype=torch.long), block.vectors(some))
                      for some in torch.split(members, states.chunk)])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model = rs.load("smollm2-135m")
    rec = rs.record(model, PROMPT)
    print(f"{model!r}, {torch.get_num_threads()} threads, {len(rec.prompt.ids)}-token prompt")
    rs.locate(rec, k=100)
    with tempfile.TemporaryDirectory() as folder:
        table = seconds(lambda: with_cache(folder, lambda: rs.locate(rec, k=100, worst=True)))
    print(f"{'table of what value vectors span, once per model':58}{table:8.1f} s")
    jobs: dict[str, tuple[Callable[[], object], str]] = {
        "best 100": (lambda: rs.locate(rec, k=100), ">= 200"),
        "worst 100": (lambda: rs.locate(rec, k=100, worst=True), ">= 100"),
        "best 100, own norm": (lambda: rs.locate(rec, k=100, norm="own"), ""),
        "worst 100, own norm": (lambda: rs.locate(rec, k=100, norm="own", worst=True), ""),
        "best 100 by leave-one-out": (lambda: rs.locate(rec, k=100, score="leave_one_out"), ""),
        "bounds of all 46,080": (lambda: rs.scores(rec, bounds=True), ""),
        "counts of helpful and harmful": (lambda: rs.counts(rec, progress=False), ""),
    }
    slow, fast, values = 0.0, {name: list[float]() for name in jobs}, list[torch.Tensor]()
    for layer in range(model.anatomy.n_layers):  # in turn: a layer of the one, all of the others
        slow += seconds(lambda layer=layer: values.append(exhaustive(rec, layer)))
        for name, (job, _) in jobs.items():
            if layer % 3 == 0 or name in ("best 100", "worst 100"):
                fast[name].append(seconds(job))
    for name, (_, goal) in jobs.items():
        middle = statistics.median(fast[name])
        report(f"exhaustive pass / {name}", slow, middle, slow / middle, goal)
    for worst in (False, True):
        found = rs.locate(rec, k=100, worst=worst)
        first = {f"L{i // 1536}.N{i % 1536}" for i in rank(torch.cat(values), descending=not worst)[:100]}
        same = first == {str(site) for site in found.sites}
        print(f"   {'worst' if worst else 'best'} 100: {found.evaluations} exact evaluations; same set: {same}")
    counted, scores = rs.counts(rec, progress=False), rs.scores(rec, progress=False)
    right = (scores["log_prob_increase"] > 0).groupby(scores["layer"]).sum().tolist() == counted["helpful"].tolist()
    print(f"   counts: {counted['evaluations'].sum()} exact evaluations; same as of all exact scores: {right}")
    report("attention neurons x source, one layer: each / per row",
           *interleaved(lambda: naive_sources(rec, 20),
                        lambda: rs.scores(rec, kind="attn_neuron_source", layers=[20], progress=False), 3))  # fmt: skip
    ids = torch.tensor([rec.prompt.ids])

    def plain() -> None:
        with torch.no_grad():
            model.module(ids, use_cache=False)

    many = [PROMPT] * 8
    a, b, ratio = interleaved(lambda: list(rs.locate_each(model, many, progress=False)), plain, args.repeats)
    name = "locate_many, each prompt / plain forward"
    print(f"{name:58}{ratio / 8:8.1f} x    ({a / 8 * 1e3:.0f} ms / {b * 1e3:.0f} ms)")
    for name, job in JOBS.items():
        print(f"{'peak memory above the model: ' + name:66}{peak(job)[0]:6.0f} MB  goal <= 300", flush=True)


def with_cache(folder: str, job: Callable[[], object]) -> None:
    """Run a job with an empty cache folder."""
    import os

    before = os.environ.get("RESID_SURGERY_CACHE")
    os.environ["RESID_SURGERY_CACHE"] = folder
    try:
        job()
    finally:
        os.environ.pop("RESID_SURGERY_CACHE")
        if before is not None:
            os.environ["RESID_SURGERY_CACHE"] = before


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s in all")
