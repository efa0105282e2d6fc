"""Edits and their validation, side by side in one process: ``make bench-validating``.

1. How long each method takes to fit one fact, in plain forwards of its prompt.
2. A validation with the smoke budget (goal: 2 minutes on 2 cores) and, with ``--standard``, the standard one (15
minutes):
   seconds and tokens of each part, and how many tokens a second that makes against plain forwards of the same texts.
3. What resuming at the first changed block saves, against comparing two whole forwards.
4. A second validation, for which the base's figures are remembered, against the first one.
5. With ``--calibrate``, where edits of known harm stand beside the limits.
6. Peak memory above the model.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import torch
from measuring import interleaved, peak, seconds

import resid_surgery as rs
from resid_surgery.editing.controls import NullSubject
from resid_surgery.editing.running import Passage, WeightsSubject, compared, first_block

WANTED = rs.Rewrite("The capital of {} is", subject="France", new=" Rome", old=" Paris")
MEMORY = (
    "edit = rs.edit_coefficients(model, rs.locate(rec, k=10).sites, 0.0)\n"
    "rs.validate(model, edit, budget='smoke', progress=False)"
)


def methods(model: rs.OpenedModel, forward: float) -> dict[str, rs.Edit]:
    neurons = rs.locate(rs.record(model, rs.Prompt(WANTED.text, target=" Paris")), k=20).sites
    makers = {
        "rank-one": lambda: rs.edit_rank_one(model, WANTED),
        "least squares": lambda: rs.edit_least_squares(model, [WANTED]),
        "value rows": lambda: rs.edit_value_rows(model, neurons, old=" Paris", new=" Rome", rewrites=[WANTED]),
        "coefficients": lambda: rs.edit_coefficients(model, neurons, 0.0),
    }
    made = {}
    for name, make in makers.items():
        start = time.perf_counter()
        made[name] = make()
        took = time.perf_counter() - start
        print(f"{name:14s} {took:7.2f} s  {took / forward:6.0f} plain forwards")
    return made


def validated(model: rs.OpenedModel, edit: rs.Edit, budget: str) -> float:
    done = []
    took = seconds(lambda: done.append(rs.validate(model, edit, budget=budget)))
    cost = done[0].tables["cost"]
    print(f"{budget}: {took:.0f} s, {int(cost['tokens'].sum()):,} tokens, {done[0].verdict}")
    for row in cost.itertuples():
        print(f"    {row.axis:24s} {row.probes:5d} probes {row.tokens:7,d} tokens {row.seconds:7.1f} s")
    return took


def resuming(model: rs.OpenedModel, edit: rs.Edit) -> None:
    texts = [p.text for p in rs.general_probes(texts=4).of("text")]
    ids = [tuple(model.tokenizer.encode(text))[:64] for text in texts]
    passages = [Passage(one, tuple(range(len(one)))) for one in ids]
    base = WeightsSubject(model, "base")
    with edit.applied(model) as handle:
        low, whole = (WeightsSubject(handle, "edited", n) for n in (first_block(model, edit), 0))
        a, b, ratio = interleaved(lambda: compared(base, [low], passages), lambda: compared(base, [whole], passages), 3)
    print(f"comparing from block {low.first}: {a:.2f} s, whole forwards {b:.2f} s, ratio {ratio:.2f}")


def calibration(model: rs.OpenedModel, made: dict[str, rs.Edit]) -> None:
    """Where edits of known harm stand beside the limits."""
    edits = {
        "nothing but other batches": None,
        "one random neuron zeroed": rs.edit_coefficients(model, ["L12.N700"], 0.0),
        "the 20 neurons that write Paris zeroed": made["coefficients"],
        "rank-one": made["rank-one"],
        "value rows, l2 = 8": made["value rows"],
        "a whole MLP zeroed": rs.edit_coefficients(model, ["L20.mlp"], 0.0),
    }
    columns = ["kl: unrelated text", "top-1 flips: unrelated text", "perplexity drift"]
    print(f"{'':40s} {'KL unrelated':>13s} {'flips':>7s} {'perplexity':>11s}  verdict")
    for name, edit in edits.items():
        given = other_batches(model) if edit is None else edit
        done = rs.validate(model, given, budget="smoke")
        value = done.gates.set_index("gate")["value"].reindex(columns)
        print(f"{name:40s} {value.iloc[0]:13.2e} {value.iloc[1]:7.3f} {value.iloc[2]:+11.2e}  {done.verdict}")


def other_batches(model: rs.OpenedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The base itself, a row at a time beside copies of it: the null control as if it were an edit."""
    subject = NullSubject(model)
    return lambda ids: subject.logits(ids, range(ids.shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--standard", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    model = rs.load("smollm2-135m")
    print(f"{torch.get_num_threads()} threads")
    prompt = rs.Prompt(WANTED.text, target=" Paris")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RESID_SURGERY_CACHE"] = folder  # nothing is remembered from earlier runs
        ids = torch.tensor([model.tokenizer.encode(prompt.text)])
        with torch.no_grad():
            model.shadow(ids)
            forward = min(seconds(lambda: model.shadow(ids)) for _ in range(5))
        print(f"plain forward  {1000 * forward:7.0f} ms")
        made = methods(model, forward)
        first = validated(model, made["rank-one"], "smoke")
        again = seconds(lambda: rs.validate(model, made["rank-one"], budget="smoke"))
        print(f"smoke again, with the base's figures remembered: {again:.0f} s, ratio {again / first:.2f}")
        resuming(model, rs.edit_coefficients(model, ["L27.N846"], 0.0))
        if given.calibrate:
            calibration(model, made)
        if given.standard:
            validated(model, made["rank-one"], "standard")
        if given.memory:
            above, before = peak(MEMORY)
            print(f"peak memory of a smoke validation: {above:.0f} MB above the model ({before:.0f} MB)")


if __name__ == "__main__":
    main()
