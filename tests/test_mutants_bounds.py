"""Certificates by the letter of their formulas: every term of a bound, its slack too, written out a second time."""

import math

import pytest
import torch
from tiny import FAMILIES, build, shared

import resid_surgery as rs
from resid_surgery.attribution.bounds import FAR, MOST_DOUBT, Bounds, over_mean, unembedding_row_norms
from resid_surgery.attribution.ranges import Ranges
from resid_surgery.attribution.states import States
from resid_surgery.stream.blocks import stored
from resid_surgery.stream.subvalues import candidates

PROMPT = rs.Prompt(ids=[5, 41, 30, 2, 9], target=11)
EPS = torch.finfo(torch.float64).eps
CASES = [(family, own, removed) for family in FAMILIES for own in (False, True) for removed in (False, True)]


def made(family, *, own, removed, kinds=("neuron", "head_source", "layer"), layers=(1, 2), model=None):
    """A recording, its bounds and [(block, state, vectors, exact states)]."""
    rec = rs.record(model or shared(family), PROMPT)
    places = [(i, part, b) for i in layers for kind in kinds for part, b in candidates(rec, kind, i)]
    states = States.of(rec, [(i, part) for i, part, _ in places], own=own)
    bounds = Bounds(rec, states, removed=removed)
    bounds.ranges.prepare([b for _, _, b in places], shown=False)
    return rec, bounds, [(b, states.index[i, part], b.all_vectors() * (-1 if removed else 1)) for i, part, b in places]


class Plain:
    """Everything that a bound is made of, for one state and all vectors of a block."""

    def __init__(self, rec, states, state, v):
        readout = states.readout
        norm, x, self.w, u = readout.norm, states.x[state], rec.prompt.target, rec.model.unembedding
        self.cap, self.u, self.d = rec.model.anatomy.logit_cap, u, x.shape[-1]
        moved, before = norm.scale(x + v), norm.scale(x)
        if not states.own:
            moved = before = readout.s.expand(len(v), 1)
        self.e = norm.linear(x + v, moved) - norm.linear(x, before)
        self.moved, self.before = moved[:, 0], before.expand(len(v), 1)[:, 0]
        self.length = self.e.norm(dim=-1)
        self.changes = self.e @ u.T  # D
        bs = norm.linear(x, norm.scale(x) if states.own else readout.s) @ u.T
        self.bs = bs if readout.constants is None else bs + readout.constants
        z = self.bs if self.cap is None else self.cap * torch.tanh(self.bs / self.cap)
        self.p = torch.softmax(z, -1)
        self.longest = float(u.norm(dim=-1).max())

    def capped(self, token):
        before = self.bs[token]
        return self.cap * (torch.tanh((before + self.changes[:, token]) / self.cap) - torch.tanh(before / self.cap))

    def mean(self):
        """Of D, or of its slope under a cap: what a bound takes away from the target's own gain."""
        if self.cap is None:
            return self.changes @ self.p
        return self.changes @ (self.p * (1 - torch.tanh(self.bs / self.cap) ** 2))

    def bend(self):
        most = 4 / (3 * math.sqrt(3) * self.cap)
        return most / 2 * (self.u.square().sum(-1) @ self.p) * self.length**2

    def chord(self, low, high, mean):
        low, high = torch.minimum(low, mean), torch.maximum(high, mean)
        wide = high > low
        width = torch.where(wide, high - low, 1.0)
        over = ((high - mean) * low.exp() + (mean - low) * high.exp()) / width
        return torch.where(wide, over.log(), mean)


@pytest.mark.parametrize(("family", "own", "removed"), CASES)
def test_bounds_are_their_formulas(family, own, removed):
    rec, bounds, places = made(family, own=own, removed=removed)
    for block, state, v in places:
        plain = Plain(rec, bounds.states, state, v)
        gain = plain.changes[:, plain.w] if plain.cap is None else plain.capped(plain.w)
        mean, bend = plain.mean(), 0.0 if plain.cap is None else plain.bend()
        upper, lower = bounds.upper(block, state), bounds.lower(block, state)
        assert torch.allclose(upper, gain - mean + bend, rtol=1e-6, atol=1e-6)
        low, high = plain.changes.amin(-1), plain.changes.amax(-1)
        spans = bounds.ranges.of(block)
        if spans is None or (own and plain.cap is None) or block.mixed is not None or own:
            continue
        if plain.cap is not None:
            low, high = low.clamp(-2 * plain.cap, 0), high.clamp(0, 2 * plain.cap)
        expected = gain - plain.chord(low, high, mean + bend)
        assert torch.allclose(lower, expected, rtol=1e-6, atol=1e-6)


def test_under_a_low_cap_a_change_is_at_most_two_caps():
    cap = 0.05
    model = rs.load(build("gemma2", final_logit_softcapping=cap))
    rec, bounds, places = made("gemma2", own=False, removed=False, kinds=("neuron",), layers=(2,), model=model)
    reached = 0
    for block, state, v in places:
        plain = Plain(rec, bounds.states, state, v)
        low, high = plain.changes.amin(-1), plain.changes.amax(-1)
        reached += int((low < -2 * cap).sum()) + int((high > 2 * cap).sum())
        mean = plain.mean() + plain.bend()
        expected = plain.capped(plain.w) - plain.chord(low.clamp(-2 * cap, 0), high.clamp(0, 2 * cap), mean)
        assert torch.allclose(bounds.lower(block, state), expected, rtol=1e-6, atol=1e-6)
    assert reached


def test_what_cannot_be_bounded_is_hopeless_from_both_sides(monkeypatch):
    for family in ("llama", "gemma2"):
        _, bounds, places = made(family, own=False, removed=False, kinds=("neuron",), layers=(1,))
        monkeypatch.setattr(bounds, "_slack", lambda moved: moved.length * torch.nan)
        for block, state, _ in places:
            assert bool((bounds.upper(block, state) == torch.inf).all())
            assert bool((bounds.lower(block, state) == -torch.inf).all())


@pytest.mark.parametrize(("family", "own", "removed"), CASES)
def test_what_bounds_know_of_a_move_is_what_it_is(family, own, removed):
    rec, bounds, places = made(family, own=own, removed=removed)
    for block, state, v in places:
        plain = Plain(rec, bounds.states, state, v)
        directions = rec.model.unembedding[[3, 60, 7]]
        moved, alone = (bounds._moved(block, state, directions[:n]) for n in (3, 1))
        assert torch.allclose(alone.dots[0], moved.dots[0], rtol=1e-9, atol=1e-10)
        assert torch.allclose(moved.dots, (plain.e @ directions.T).T, rtol=1e-8, atol=1e-9)
        assert torch.allclose(moved.length, plain.length, rtol=1e-6, atol=1e-6)
        assert torch.allclose(moved.s.expand(len(v)), plain.moved, rtol=1e-8)
        if not own:
            assert not moved.rounding.any()
            assert not moved.doubt.any()
            assert not moved.relative.any()
            continue
        self_doubt(bounds, state, v, directions, plain, moved)


def self_doubt(bounds, state, v, g, plain, moved):
    """What rounding can hide under the own norm, written out again."""
    norm, x, eps = bounds.readout.norm, bounds.states.x[state], 8 * EPS
    cx, cv = norm.centre(x), norm.centre(v)
    big = (cx @ cx + 2 * (cv @ cx).abs() + cv.square().sum(-1)) / plain.d
    relative = eps * big / plain.moved**2
    assert torch.allclose(moved.relative, relative, rtol=1e-6, atol=0)
    nx, nv = cx * norm.gain, cv * norm.gain
    terms = [
        (nx + nv).square().sum(-1) / plain.moved**2,
        2 * (nx @ nx + nv @ nx).abs() / (plain.moved * plain.before),
        (nx @ nx) / plain.before**2,
    ]
    assert torch.allclose(moved.rounding, ((eps + relative) * sum(terms)).sqrt(), rtol=1e-6, atol=0)
    gx, gv = (norm.gain * g) @ cx, (norm.gain * g) @ cv.T
    if norm.centred:
        gx, gv = norm.centre(norm.gain * g) @ x, norm.centre(norm.gain * g) @ v.T
    doubt = relative * (gx[:, None] + gv).abs() / plain.moved
    doubt = doubt + eps * ((gx.abs()[:, None] + gv.abs()) / plain.moved + gx.abs()[:, None] / plain.before)
    assert torch.allclose(moved.doubt, doubt.amax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "own", "removed"), CASES[:2] + CASES[4:5] + CASES[16:])
def test_slack_is_its_formula(family, own, removed):
    rec, bounds, places = made(family, own=own, removed=removed)
    longest = float(rec.model.unembedding.norm(dim=-1).max())
    size = 8 * EPS * float(bounds.states.bs.abs().max())
    per_length = 8 * EPS * math.sqrt(24) * longest
    flat = 8 * EPS * (1 + math.log(97)) + size
    near = lambda value: pytest.approx(value, rel=1e-9)  # noqa: E731
    assert (bounds.longest, bounds.per_length, bounds.size, bounds.flat) == (
        near(longest), near(per_length), near(size), near(flat))  # fmt: skip
    assert bounds.sign == (-1.0 if removed else 1.0)
    for block, state, _ in places:
        moved = bounds._moved(block, state, bounds.g[state][None])
        length = moved.length + moved.rounding
        apart = bounds.cap is None and not own
        shrunk = flat * (length * longest).clamp_max(1) if apart else flat
        assert torch.allclose(bounds._slack(moved), per_length * length + shrunk + 2 * moved.doubt, rtol=1e-9, atol=0)
        if bounds.cap is not None:
            assert torch.allclose(bounds._bend(moved, state), bounds.curve[state] * length**2, rtol=1e-12, atol=0)
        upper, bare = bounds.upper(block, state), moved.dots[0]
        if bounds.cap is None:
            settled = block.zero is None or ~block.zero
            assert torch.equal(upper[settled], (bare + bounds._slack(moved))[settled])


@pytest.mark.parametrize(("family", "own"), [(f, own) for f in ("llama", "gpt2", "gemma2") for own in (False, True)])
def test_the_span_of_a_change_is_that_of_its_value_vector_with_room(family, own):
    rec, bounds, places = made(family, own=own, removed=False, kinds=("neuron", "head", "head_source", "layer"))
    for block, state, v in places:
        moved = bounds._moved(block, state, bounds.g[state][None])
        low, high = bounds._spread(block, state, moved)
        most = (moved.length + moved.rounding) * bounds.longest
        if bounds.ranges.of(block) is None:
            assert torch.equal(high, most)
            assert torch.equal(low, -most)
            continue
        norm, u = bounds.readout.norm, rec.model.unembedding
        bare = (norm.linear(v, moved.s.reshape(-1, 1) if moved.s.numel() > 1 else moved.s)) @ u.T
        room = bounds.per_length * (moved.length + moved.rounding) + bounds.size + moved.doubt
        apart = bounds.ranges.of(block)
        c = 1.0 if block.coefficient is None else block.coefficient
        ends = torch.stack([one.repeat_interleave(block.per_row) * c for one in apart]) / moved.s
        unsure, around = moved.relative * ends.abs().amax(0), torch.zeros_like(ends)
        if own:
            bs = bounds.states.bs[:, state]
            bs = bs if bounds.readout.constants is None else bs - bounds.readout.constants
            ratio = norm.scale(bounds.states.x[state]) / moved.s
            around = torch.stack([bs.min(), bs.max()])[:, None] * (ratio - 1)
            unsure = unsure + moved.relative * ratio * bs.abs().max()
        if block.mixed is None:
            assert torch.allclose(ends.amin(0), bare.amin(-1), rtol=1e-6, atol=1e-6)
            assert torch.allclose(ends.amax(0), bare.amax(-1), rtol=1e-6, atol=1e-6)
        room = room + 2 * unsure
        wanted = torch.minimum(high * 0 + most, ends.amax(0) + around.amax(0) + room)
        assert torch.allclose(high - ends.amax(0), wanted - ends.amax(0), rtol=1e-6, atol=1e-15)
        wanted = torch.maximum(-most, ends.amin(0) + around.amin(0) - room)
        assert torch.allclose(low - ends.amin(0), wanted - ends.amin(0), rtol=1e-6, atol=1e-15)


def test_a_move_that_nearly_cancels_the_state_is_hopeless_and_one_that_does_not_is_not():
    rec = rs.record(shared("llama", torch.float32), PROMPT)
    states = States.of(rec, [(1, "mlp")], own=True)
    bounds, x = Bounds(rec, states), states.x[0]
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * x.norm()
    steps = torch.logspace(-6, 0, 13)
    block = stored("mlp", 1, torch.stack([-x + step * noise for step in steps]), [rs.Sublayer(1, "mlp")] * 13)
    moved = bounds._moved(block, 0, bounds.g[0][None])
    assert MOST_DOUBT == 0.05
    assert torch.equal(torch.isinf(moved.doubt), moved.relative > MOST_DOUBT)
    assert 0 < int(torch.isinf(moved.doubt).sum()) < 13
    assert bool(torch.isinf(bounds.upper(block, 0)[torch.isinf(moved.doubt)]).all())
    assert bool((bounds.lower(block, 0)[torch.isinf(moved.doubt)] == -torch.inf).all())


def test_what_comes_out_as_no_number_is_hopeless_and_an_addend_of_zero_scores_zero():
    rec = rs.record(shared("llama"), PROMPT)
    bounds = Bounds(rec, States.of(rec, [(1, "mlp")], own=False))
    plain = stored("mlp", 1, torch.ones(4, 24, dtype=torch.float64), [rs.Sublayer(1, "mlp")] * 4)
    given = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0], dtype=torch.float64)
    assert bounds._settled(plain, given, torch.inf).tolist() == [torch.inf, torch.inf, -torch.inf, 2.0]
    assert bounds._settled(plain, given, -torch.inf).tolist() == [-torch.inf, torch.inf, -torch.inf, 2.0]
    ((_, dead),) = candidates(rs.record(shared("opt"), PROMPT), "neuron", 1)
    zero = dead.zero
    assert zero is not None
    assert bool(zero.any())
    settled = bounds._settled(dead, torch.full((40,), 3.0, dtype=torch.float64), torch.inf)
    assert torch.equal(settled == 0.0, zero)
    assert bool((settled[~zero] == 3.0).all())


def test_the_chord_over_its_mean_is_exact_near_and_far():
    low = torch.tensor([-1.0, -2.0, -0.5, -700.0, -5.0, 0.0, -1e-12, -3.0, 1.0], dtype=torch.float64)
    high = torch.tensor([1.0, 0.5, 3.0, 900.0, 29.0, 0.0, 1e-12, 40.0, 2.0], dtype=torch.float64)
    mean = torch.tensor([0.25, -1.0, 2.5, -100.0, 1.0, 0.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    found = over_mean(low.clone(), high.clone(), mean)
    assert FAR == 30.0
    for a, b, m, value in zip(low.tolist(), high.tolist(), mean.tolist(), found.tolist(), strict=True):
        a, b = min(a, m), max(b, m)
        if a == b:
            assert value == 0.0
            continue
        t = (m - a) / (b - a)
        top = b - m
        expected = top + math.log((1 - t) * math.exp(a - b) + t)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert value >= 0.0
    tiny = over_mean(torch.tensor([-1e-9]).double(), torch.tensor([1e-9]).double(), torch.tensor([0.0]).double())
    assert float(tiny) == pytest.approx(0.5e-18, rel=1e-6)  # where a logarithm of a sum would be 0


def test_norms_of_rows_are_kept_for_one_state_of_the_weights():
    model = rs.load(build("llama"))
    readout = States.of(rs.record(model, PROMPT), [(1, "mlp")], own=False).readout
    rec = rs.record(model, PROMPT)
    norms = unembedding_row_norms(rec, readout)
    assert torch.allclose(norms, model.unembedding.square().sum(-1).sqrt())
    assert norms.shape == (97,)
    assert unembedding_row_norms(rec, readout) is norms
    assert list(model.cache["row_norms"]) == [rec.fingerprint]
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2)
    again = rs.record(model, PROMPT)
    assert torch.allclose(unembedding_row_norms(again, readout), 2 * norms)
    assert list(model.cache["row_norms"]) == [again.fingerprint]


def test_norms_of_many_rows_are_those_of_all():
    model = rs.load(build("llama", vocab_size=(1 << 14) + 7, tie_word_embeddings=False))
    rec = rs.record(model, PROMPT)
    bounds = Bounds(rec, States.of(rec, [(1, "mlp")], own=False))
    assert bounds.row_norms.shape == ((1 << 14) + 7,)
    assert torch.allclose(bounds.row_norms, model.unembedding.norm(dim=-1))
    assert bounds.row_norms.dtype == torch.float64
    half = rs.record(rs.load(build("llama", torch.bfloat16)), PROMPT)
    assert Bounds(half, States.of(half, [(1, "mlp")], own=False)).row_norms.dtype == torch.float32


def test_bounds_hold_what_they_were_given():
    rec = rs.record(shared("llama"), PROMPT)
    states = States.of(rec, [(1, "mlp")], own=False)
    bounds = Bounds(rec, states)
    assert (bounds.states, bounds.rec, bounds.readout, bounds.cap) == (states, rec, states.readout, None)
    assert bounds.sign == 1.0
    assert isinstance(bounds.ranges, Ranges)
    assert bounds.ranges.readout is states.readout
