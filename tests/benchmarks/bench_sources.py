"""Query sources and source graphs, side by side in one process: ``make bench-sources``.

1. One-hop sources of the 100 best neurons at neuron grain, against plain forwards, and against what one would write
   today: a loop over readers and writers with one product each.
2. A source graph of 200 nodes, its verification by cutting 50 edges, and how faithful its nodes are.
3. What feeds a head by both ways, against one nnsight trace for each lower vector.
4. Blame of India's capital; peak memory above the model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import nnsight
import torch
from measuring import PROMPT, interleaved, peak, seconds

import resid_surgery as rs

JOBS = {
    "sources of the 100 best neurons": "rs.sources(rec, rs.locate(rec, k=100).sites, grain='neuron')",
    "a verified graph of 200 nodes": "rs.verify(rs.source_graph(rec, readout='difference'))",
    "faithfulness of it": "rs.faithfulness(rs.source_graph(rec, readout='difference'))",
}


def naive_sources(rec: rs.Recording, readers: list[rs.Neuron]) -> list[torch.Tensor]:
    """Every neuron below a reader, vector by vector of a layer, through both keys."""
    model, found = rec.model.module, []
    with torch.no_grad():
        for one in readers:
            block = model.model.layers[one.layer]
            norm = block.post_attention_layernorm
            r = rec.layers[one.layer].resid_pre + rec.layers[one.layer].attn_out
            s = (r.square().mean() + norm.variance_epsilon).sqrt()
            for projection in (block.mlp.gate_proj, block.mlp.up_proj):
                key = projection.weight[one.index] * norm.weight / s
                shares = []
                for layer in range(one.layer):
                    vectors = (
                        rec.layers[layer].groups[0].coefficient[:, None]
                        * model.model.layers[layer].mlp.down_proj.weight.T
                    )
                    shares.append(vectors @ key)
                found.append(torch.cat(shares).topk(10).values if shares else torch.zeros(0))
    return found


def naive_removed(rec: rs.Recording, layer: int) -> int:
    """A trace for each lower vector, its addend taken out of what one layer's attention reads."""
    traced, ids = nnsight.NNsight(rec.model.shadow), torch.tensor([rec.prompt.ids])
    assert rec.stream is not None
    state, norm = rec.stream.resid_pre[layer], rec.model.module.model.layers[layer].input_layernorm
    lower = [u[i] for i in range(layer) for u in (rec.stream.attn_out, rec.stream.mlp_out)]
    kept = []
    with torch.no_grad():
        for u in lower:
            with traced.trace(input_ids=ids, use_cache=False):
                traced.model.layers[layer].self_attn.input = norm(state - u)[None]
                kept.append(traced.model.layers[layer].self_attn.o_proj.input.save())
    return len(kept)


def line(name: str, text: str, goal: str = "") -> None:
    print(f"{name:64}{text}" + (f"  goal {goal}" if goal else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    model = rs.load("smollm2-135m")
    rec = rs.record(model, PROMPT, positions="all")
    print(f"{model!r}, {torch.get_num_threads()} threads, {len(rec.prompt.ids)}-token prompt")
    ids = torch.tensor([rec.prompt.ids])

    def plain() -> None:
        with torch.no_grad():
            model.module(ids, use_cache=False)

    best = rs.locate(rec, k=100).sites
    ours: Callable[[], object] = lambda: rs.sources(rec, best, grain="neuron")  # noqa: E731
    a, b, ratio = interleaved(ours, plain, repeats)
    line(
        "sources of the 100 best neurons, neuron grain / plain forward",
        f"{ratio:8.1f} x    ({a * 1e3:.0f} ms / {b * 1e3:.0f} ms)",
        "<= 5",
    )
    a, b, ratio = interleaved(lambda: naive_sources(rec, list(best)), ours, 3)  # type: ignore[arg-type]
    line("a loop over readers and layers / the same sources", f"{ratio:8.1f} x    ({a:.1f} s / {b * 1e3:.0f} ms)")
    graphs = []
    grown = statistics.median(
        seconds(lambda: graphs.append(rs.source_graph(rec, readout="difference"))) for _ in range(3)
    )
    checked = []
    spent = statistics.median(seconds(lambda: checked.append(rs.verify(graphs[0]))) for _ in range(3))
    line(
        "a graph of 200 nodes, verified by cutting 50 edges",
        f"{grown + spent:8.1f} s    ({grown:.1f} s grown, {spent:.1f} s cut)",
        "<= 15",
    )
    found = checked[0]
    said = f"correlation {found.correlation:.7f}, slope {found.slope:.6f}, worst {found.worst:.1e}"
    print(f"   {len(graphs[0].edges)} edges; {said}")
    kept: list[object] = []
    line(
        "its faithfulness, five runs with up to 47,430 subvalues zeroed",
        f"{seconds(lambda: kept.append(rs.faithfulness(graphs[0]))):8.1f} s",
    )
    print(kept[0][["run", "operated", "readout", "of_clean", "top"]].to_string(index=False))  # type: ignore[index]
    a, b, ratio = interleaved(lambda: naive_removed(rec, 23), lambda: rs.attention_sources(rec, "L23.attn"), 3)
    line(
        "a trace for each lower vector / what feeds a layer's heads, both ways",
        f"{ratio:8.1f} x    ({a:.1f} s / {b * 1e3:.0f} ms)",
    )
    india = rs.record(model, rs.Prompt("The capital of India is", target=" Delhi", versus=[" Mumbai"]))
    why: list[rs.Blame] = []
    spent = seconds(lambda: why.append(rs.blame(india, " Mumbai", " Delhi")))
    line("blame: a minimal set that restores Delhi", f"{spent:8.1f} s    ({why[0].measured} rows measured)")
    for name, job in JOBS.items():
        line("peak memory above the model: " + name, f"{peak(job, 'all')[0]:8.0f} MB", "<= 300")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s in all")
