"""Readers of every kind in seventeen families against slow oracles, and against what cutting their edges does.

The oracle (`slow_readers`) runs the model's own modules again with one writer left out of what one reader reads.
Families: LayerNorm and one matrix transposed (GPT-2), RMSNorm and gates (Llama), post-norms and soft-caps (Gemma-2),
post-norms alone and a norm over all queries (OLMo-2), a norm a head (Qwen3), a LayerNorm with bias a head in a parallel
block (Phi), parallel blocks (GPT-NeoX), multipliers (Granite), experts (Mixtral), latents with shared experts
(DeepSeek-V2, V3), sources picked by an indexer (V3.2), a stream that blocks multiply and a mask made of values (Doge),
sinks and clamped experts with biases (GPT-OSS), norms before W_O and before the down-projection
(BitNet), ALiBi (BLOOM, MPT).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import (
    ALL,
    FAMILIES,
    GRAINS,
    KINDS,
    PAIRS,
    TARGET,
    VERSUS,
    Case,
    T,
    case,
    loaded,
    ran,
    readings_of,
    recorded,
    written,
)
from slow_readers import Run

import resid_surgery as rs

NORMS = ("frozen", "live")


def hold(run: Run, rec: rs.Recording, one: Case, grain: str, norm: str) -> None:
    """Every row of the table of a reader, and nothing but these rows, is what the oracle says."""
    found = readings_of(rs.sources(rec, one.reader, grain=grain, norm=norm, top=ALL, **one.options))
    assert set(found) == set(one.readings)
    for key, rows in found.items():
        reading, mine = one.readings[key], written(rows)
        addends = run.seen(reading, grain)
        places = list(zip(mine["writer"], mine["position"], strict=True))
        assert sorted(places) == sorted((a.site, a.position) for a in addends)
        order = {place: i for i, place in enumerate(places)}
        mine = mine.iloc[[order[a.site, a.position] for a in addends]]
        shares, clean = run.shares(reading, addends), run.clean(reading)
        near = 2e-6 * max(abs(clean), *map(abs, shares))
        assert mine["share"].tolist() == pytest.approx(shares, abs=near, rel=0)
        assert rows["reading"].unique().tolist() == pytest.approx([clean], abs=near, rel=0)
        assert rows["share"].sum() == pytest.approx(clean, abs=near, rel=0)
        assert rows["closure"].max() <= near
        without = run.without(reading, addends, norm)
        assert mine["coefficient_without"].tolist() == pytest.approx(without, abs=2e-6, rel=2e-6)
        assert rows["coefficient"].unique().tolist() == pytest.approx([run.handed_on(reading)], abs=2e-6, rel=2e-6)


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_every_reader_of_every_family_splits_as_its_modules_say(family, kind):
    i = FAMILIES.index(family) + KINDS.index(kind)
    hold(ran(family), recorded(family), case(kind, ran(family), T, (family, kind)), GRAINS[i % 5], NORMS[i % 2])


@settings(max_examples=2 * settings.default.max_examples)
@given(
    st.sampled_from(PAIRS),
    st.lists(st.integers(0, 96), min_size=1, max_size=7),
    st.integers(0, 6),
    st.sampled_from(GRAINS),
    st.sampled_from(NORMS),
    st.integers(0, 10**6),
)
def test_any_reader_of_any_prompt_splits_as_its_modules_say(pair, ids, t, grain, norm, seed):
    (family, kind), t = pair, t % len(ids)
    run, prompt = (
        Run(family, loaded(family).module, ids),
        rs.Prompt(ids=ids, target=TARGET, versus=list(VERSUS), position=t),
    )
    rec = rs.record(loaded(family), prompt, positions="all")
    hold(run, rec, case(kind, run, t, seed), grain, norm)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2", "phi", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_remainder_and_constants_sum_to_what_the_model_computed(family, dtype):
    """In float32 to 1e-5 of the largest row; in bfloat16 to 4 eps of the sizes that are summed."""
    few = torch.finfo(dtype).eps * 4 if dtype == torch.bfloat16 else 1e-5
    run, rec = ran(family, dtype=dtype), recorded(family, dtype=dtype)
    for i, kind in enumerate(kind for one, kind in PAIRS if one == family):
        one = case(kind, run, T, (family, kind))
        table = rs.sources(rec, one.reader, grain=GRAINS[i % 5], top=1 + i, **one.options)
        for key, rows in readings_of(table).items():
            sizes = rows["share"].abs().sum() if dtype == torch.bfloat16 else rows["share"].abs().max()
            reading, near = rows["reading"].iloc[0], few * max(sizes, abs(rows["reading"].iloc[0]))
            assert rows["share"].sum() == pytest.approx(reading, abs=near, rel=0), (kind, key)
            assert rows["closure"].iloc[0] == pytest.approx(abs(rows["share"].sum() - reading), abs=1e-12)
            assert run.clean(one.readings[key]) == pytest.approx(reading, abs=2 * near, rel=0), (kind, key)
            assert len(rows) <= 1 + i + 1 + 3  # listed, a remainder, constants
