"""The readout against plain products in double precision: every slice, every dtype, every constant."""

import pytest
import torch
from tiny import FAMILIES, build, shared
from validation_cases import opened

import resid_surgery as rs
from resid_surgery.stream import vocabulary
from resid_surgery.stream.vocabulary import Readout, blocked_product, token_names

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11, versus=[7, 60])
HALF = torch.bfloat16


def readout_of(family, dtype=torch.float64):
    rec = rs.record(shared(family, dtype), PROMPT)
    return rec, Readout.of(rec)


def some(n, width, dtype, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_frozen_at_the_final_stream_with_all_constants(family):
    rec, readout = readout_of(family)
    norm, x = readout.norm, rec.resid_final.double()
    bare = x - x.mean() if norm.centred else x
    assert float(readout.s) == pytest.approx(float((bare.square().mean() + norm.eps).sqrt()), rel=1e-12)
    assert readout.s.shape == (1,)
    assert readout.model is rec.model
    u, bias = rec.model.unembedding.double(), rec.model.unembedding_bias
    parts = {}
    if norm.bias.any():
        parts["final_norm.bias"] = u @ norm.bias
    if bias is not None:
        parts["unembed.bias"] = bias.double()
    named = readout.named_constants()
    assert list(named) == list(parts)
    for name, wanted in parts.items():
        assert torch.allclose(named[name], wanted)
        assert named[name].shape == (97,)
        assert named[name].dtype == torch.float64
    if not parts:
        assert readout.constants is None
    else:
        assert torch.allclose(readout.constants, sum(parts.values()))


@pytest.mark.parametrize("dtype", [torch.float64, HALF])
def test_both_constants_are_added_up(dtype):
    model = build("gpt2", dtype)
    model.lm_head = torch.nn.Linear(24, 97, bias=True, dtype=dtype)
    model.config.tie_word_embeddings = False
    rec = rs.record(rs.load(model), PROMPT)
    readout = Readout.of(rec)
    named = readout.named_constants()
    assert list(named) == ["final_norm.bias", "unembed.bias"]
    assert {one.dtype for one in named.values()} == {readout.constants.dtype} == {rec.model.work_dtype}
    wanted = model.lm_head.weight.double() @ model.transformer.ln_f.bias.double() + model.lm_head.bias.double()
    assert torch.allclose(readout.constants.double(), wanted.detach(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("bytes_", [None, 1, 24 * 4 * 10, 24 * 4 * 96])
def test_products_are_plain_ones_in_any_slices(family, dtype, bytes_, monkeypatch):
    if bytes_ is not None:
        monkeypatch.setattr(vocabulary, "CHUNK_BYTES", bytes_)
    rec, readout = readout_of(family, dtype)
    work, u = rec.model.work_dtype, rec.model.unembedding.double()
    tol = 1e-10 if dtype == torch.float64 else 1e-4
    for n in (1, 2, 3, 16, 17):
        h, p = some(n, 24, work), torch.softmax(some(n, 97, work), -1)
        product, columns, mixed = readout.product(h), readout.columns(h), readout.mix(p)
        assert (product.shape, columns.shape, mixed.shape) == ((n, 97), (97, n), (n, 24))
        assert product.dtype == columns.dtype == mixed.dtype == work
        assert columns.is_contiguous()
        assert torch.allclose(product.double(), h.double() @ u.T, rtol=tol, atol=tol)
        assert torch.allclose(columns.double(), u @ h.double().T, rtol=tol, atol=tol)
        assert torch.allclose(mixed.double(), p.double() @ u, rtol=tol, atol=tol)


def test_columns_are_written_where_asked():
    _, readout = readout_of("llama")
    h, out = some(3, 24, torch.float64), torch.full((97, 3), torch.nan, dtype=torch.float64)
    given = readout.columns(h, out=out)
    assert given.data_ptr() == out.data_ptr()
    assert torch.allclose(out, readout.product(h).T)
    half = readout_of("llama", HALF)[1]
    room = torch.zeros(97, 3)
    assert torch.allclose(half.columns(h.float(), out=room), half.product(h.float()).T)


def test_a_narrow_unembedding_is_widened_a_slice_at_a_time(monkeypatch):
    _, readout = readout_of("llama", HALF)
    rows = []
    real = torch.Tensor.to
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 24 * 4 * 10)

    def widened(self, *args, **kwargs):
        if self.ndim == 2 and self.shape[1] == 24 and args and args[0] == torch.float32:
            rows.append(len(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", widened)
    h = some(2, 24, torch.float32)
    rows.clear()
    readout.product(h)
    assert rows == [10] * 9 + [7]
    rows.clear()
    readout.mix(torch.full((2, 97), 1 / 97))
    assert rows == [10] * 9 + [7]
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 1)
    rows.clear()
    readout.product(h)
    readout.mix(torch.full((2, 97), 1 / 97))
    assert rows == [1] * 194


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_states_and_the_lens_are_their_formulas(family, own):
    rec, readout = readout_of(family)
    norm, u = readout.norm, rec.model.unembedding.double()
    v = some(4, 24, torch.float64)

    def linear(x, s):
        return ((x - x.mean(-1, keepdim=True) if norm.centred else x) / s) * norm.gain

    def scale(x):
        bare = x - x.mean(-1, keepdim=True) if norm.centred else x
        return (bare.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    constants = 0.0 if readout.constants is None else readout.constants
    kept = None if readout.constants is None else readout.constants.clone()
    assert torch.allclose(readout.bs(v), linear(v, readout.s) @ u.T)
    state = linear(v, scale(v) if own else readout.s) @ u.T + constants
    assert torch.allclose(readout.state(v, own=own), state)
    if not own:
        assert torch.allclose(readout.state(v), state)
    cap = rec.model.anatomy.logit_cap
    capped = state if cap is None else cap * torch.tanh(state / cap)
    assert torch.allclose(readout.cap(state), capped)
    if own:
        assert torch.allclose(readout.lens(v), torch.log_softmax(capped, -1))
        assert torch.allclose(readout.lens(v).exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert kept is None or torch.equal(kept, readout.constants)
    assert torch.allclose(readout.directions([3, 60]) @ v.T, readout.bs(v)[:, [3, 60]].T)
    assert torch.equal(readout.rows((3, 60)), u[[3, 60]])
    assert readout_of(family, HALF)[1].rows([3]).dtype == torch.float32


@pytest.mark.parametrize(("n", "block"), [(97, 512), (97, 16), (96, 16), (97, 97), (5, 1), (16, 16), (97, 48)])
def test_blocked_products_leave_nothing_out(n, block):
    p, d = some(n, 3, torch.float64), some(n, 7, torch.float64, seed=1)
    found = blocked_product(p, d, block)
    assert found.shape == (3, 7)
    assert torch.allclose(found, p.T @ d)


def test_blocks_of_a_product_are_512_rows_and_more_where_sums_would_be_many(monkeypatch):
    n = 3 * 512 + 5
    p, d = torch.rand(n, 2), torch.rand(n, 3)
    sizes = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(tuple(a.shape)) or real(a, b))
    blocked_product(p, d)
    assert sizes == [(3, 2, 512)]
    _, readout = readout_of("llama")
    taken = []
    monkeypatch.setattr(vocabulary, "blocked_product", lambda p, d, block: taken.append(block) or p.T @ d)
    readout.mix(torch.softmax(some(2, 97, torch.float64), -1))
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 40)
    readout.mix(torch.softmax(some(2, 97, torch.float64), -1))
    assert taken == [512, 97 * 24 * 2 * 8 // 40]


def test_odd_numbers_of_columns_are_padded_to_lanes(monkeypatch):
    _, readout = readout_of("llama")
    shapes = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: shapes.append(tuple(b.shape)) or real(a, b, out=out))
    for n in (1, 16, 17, 32):
        readout.columns(some(n, 24, torch.float64))
    assert shapes == [(24, 16), (24, 16), (24, 32), (24, 32)]


def test_names_of_tokens_are_those_of_the_models_tokenizer():
    model = opened()
    assert token_names(model, [3, 4]) == [model.tokenizer.decode([3]), model.tokenizer.decode([4])]
    assert token_names(model, torch.tensor([4])) == [model.tokenizer.decode([4])]
    assert token_names(shared("llama"), [3, 4]) == ["#3", "#4"]
