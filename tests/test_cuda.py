"""On a GPU everything is as on the CPU, within what the dtype allows."""

import pytest
import torch
from tiny import build

import resid_surgery as rs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPT = rs.Prompt(ids=[5, 4, 3, 2, 9], target=1, versus=[7])
ROWS = [
    rs.Zero("L1.N3"),
    rs.Scale(["L0.H1", "L2.mlp"], -1.5, positions=[2, 4]),
    rs.Zero("L1.H1<2"),
    rs.Zero("L1.H0.D2"),
    rs.Attend("L1.H1<2", 0.3, renormalise=True),
    rs.Zero("L1.K0", positions=[1]),
    rs.Steer("L1.resid_post", toward=5, away=6, times=2.0),
    rs.Patch("L0.mlp", rs.Prompt(ids=[1, 2, 3, 4, 5], target=1), positions="all"),
    rs.Cut("L0.mlp", "L2.H1", side="key"),
    rs.Cut("L0.mlp", "L2.N5", norm="frozen"),
    rs.Cut("L0.mlp", "unembed"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_rows_are_the_same_on_a_gpu(family, dtype, most):
    tables = []
    for device in ("cpu", "cuda"):
        rec = rs.record(rs.load(build(family, dtype).to(device)), PROMPT)
        table = rs.sweep(rec, ROWS, measure="all")
        for row, op in zip(table.to_dict("records"), ROWS, strict=True):
            assert rs.intervene(rec, op).table["bs_change"][0] == pytest.approx(row["bs_change_target"], abs=10 * most)
        tables.append(table)
    size = 1 + abs(tables[0].attrs["clean"]["bs_target"])
    for name in ("bs_target", "log_prob", "direct", "kl"):
        assert (tables[0][name] - tables[1][name]).abs().max() <= most * size, name


def test_an_altered_model_generates_on_a_gpu():
    model = rs.load(build("llama", torch.float32).to("cuda"))
    with rs.under(model, [rs.Zero("L1.attn", positions="all"), rs.Cut("L0.mlp", "L2.H1")]) as altered:
        assert altered.generate([5, 4, 3], max_new_tokens=3).shape == (1, 3)
