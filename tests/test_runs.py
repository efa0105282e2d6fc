"""Runs: what is refused, what is skipped, what fails and is written down, and what reading gives."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from tiny import build, shared

import resid_surgery as rs
from resid_surgery.experiments import work
from resid_surgery.experiments.folder import Folder
from resid_surgery.experiments.tables import TABLES
from resid_surgery.experiments.watching import allowed_failures

MLPS = {"intervene": {"kind": "Zero", "sites": "L*.mlp", "each": True}}
BEST = {
    "locate": {"best": {"k": 2}, "others": {"like": "best"}},
    "intervene": {"best": {"kind": "Zero", "sites": "$best"}, "others": {"kind": "Zero", "sites": "$others"}},
}
GOOD = [
    {"ids": [5, 4, 3], "target": 1, "versus": [7, 9], "relation": "a", "half": 0.5},
    {"ids": [9, 8], "target": 2, "relation": "b", "half": None},
    {"ids": [9, 8, 7], "target": 2, "versus": 3, "relation": "a", "half": 1.0},
]
BAD = {"ids": [9, 8, 7], "target": 10**6, "relation": "b"}


def model():
    return shared("llama")


def go(out, plan=MLPS, prompts=GOOD, opened=None, **options):
    return rs.run(opened or model(), prompts, plan, out=out, **{"max_failures": None, "progress": False} | options)


@pytest.fixture
def forwards(monkeypatch):
    """Counts the model's forwards."""
    count, hook = [0], model().shadow.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield lambda: count[0]
    hook.remove()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return go(tmp_path_factory.mktemp("done") / "run", BEST, [*GOOD, BAD])


def replaced(name, value):
    return [{**GOOD[0], name: value}, *GOOD[1:]]


# ---- another plan, other prompts, another model


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (MLPS | {"measure": "bs"}, r"plan\.measure: \"log_prob\" there, \"bs\" now"),
        (MLPS | {"seed": 1}, r"plan\.seed: 0 there, 1 now"),
        (MLPS | {"known": True}, r"plan\.known: false there, true now"),
        ({"intervene": {"kind": "Zero", "sites": "L0.mlp", "each": True}}, r"plan\.intervene\.main: .*L0\.mlp"),
        ({"intervene": {"other": MLPS["intervene"]}}, r"plan\.intervene\.main: .* there, nothing now; .*\.other: noth"),
        (MLPS | {"locate": {"best": {"k": 1}}}, r"plan\.locate\.best: nothing there, .* now"),
    ],
)
def test_another_plan_is_refused_by_name(tmp_path, plan, said):
    go(tmp_path / "run")
    before = rs.read_run(tmp_path / "run")
    with pytest.raises(rs.RunError, match=said):
        go(tmp_path / "run", plan)
    pd.testing.assert_frame_equal(rs.read_run(tmp_path / "run"), before)


def test_another_order_of_arms_or_axes_is_another_plan(tmp_path):
    arms = {"a": {"kind": "Zero", "sites": "L0.mlp"}, "b": {"kind": "Zero", "sites": "L1.mlp"}}
    go(tmp_path / "run", {"intervene": arms})
    with pytest.raises(rs.RunError, match=r"plan\.intervene: in the order a, b there, b, a now"):
        go(tmp_path / "run", {"intervene": dict(reversed(arms.items()))})
    go(tmp_path / "run", {"intervene": {name: dict(reversed(one.items())) for name, one in arms.items()}})


@pytest.mark.parametrize(
    "prompts",
    [GOOD[:2], GOOD[::-1], replaced("target", 4), replaced("relation", "c"), replaced("half", 0.25), [*GOOD, GOOD[0]],
     replaced("position", 1), replaced("donors", {"x": {"ids": [1], "target": 2}})],
)  # fmt: skip
def test_other_prompts_are_refused_by_name(tmp_path, prompts):
    go(tmp_path / "run")
    with pytest.raises(rs.RunError, match=r"holds another run: prompts\.(number|hash): .* there, .* now"):
        go(tmp_path / "run", prompts=prompts)


def test_another_model_is_refused_by_name(tmp_path):
    go(tmp_path / "run")
    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    for other, said in (
        (rs.load(changed), r"model\.fingerprint: "),
        (rs.load(build("llama", torch.float32)), r"model\.(fingerprint|dtype): .*; model\.dtype: \"float64\" there, "),
        (rs.load(build("gpt2")), r"model\.name: \"LlamaForCausalLM\" there, \"GPT2LMHeadModel\" now"),
    ):
        with pytest.raises(rs.RunError, match=said):
            go(tmp_path / "run", opened=other)
    assert go(tmp_path / "run", opened=rs.load(build("llama"))).status["finished"]


def test_weights_that_change_during_a_run_stop_it(tmp_path, monkeypatch):
    own = rs.load(build("llama"))
    real = work.Worker._outcome

    def outcome(self, number, case, rec):
        if number == 1:
            with torch.no_grad():
                own.module.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
        return real(self, number, case, rec)

    monkeypatch.setattr(work.Worker, "_outcome", outcome)
    with pytest.raises(rs.StaleRecordingError):
        go(tmp_path / "run", opened=own)
    assert 1 not in rs.read_run(tmp_path / "run", table="prompts")["prompt"].tolist()


def test_a_folder_with_a_run_can_be_insisted_to_be_new(tmp_path):
    go(tmp_path / "run")
    with pytest.raises(rs.RunError, match="holds a run already; leave `resume` on"):
        go(tmp_path / "run", resume=False)
    assert go(tmp_path / "new", resume=False).status["finished"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / ".eslintrc.json").write_text("{}")
    with pytest.raises(rs.RunError, match=r"is not empty and holds no run \(thesis.tex is in it\)"):
        go(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    go(tmp_path)
    go(tmp_path)
    assert (tmp_path / ".eslintrc.json").read_text() == "{}"


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"schema": 99, "what": "resid_surgery run"}'])
def test_a_manifest_of_something_else(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(rs.LoadError, match="manifest"):
        go(tmp_path)
    with pytest.raises(rs.LoadError, match="manifest"):
        rs.read_run(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resume": 1}, "resume"), ({"retry": "yes"}, "retry"), ({"save_every": -1}, "save_every"),
        ({"save_every": math.nan}, "save_every"), ({"save_every": "1"}, "save_every"), ({"executor": "loca"}, "local"),
        ({"executor": None}, "executor"), ({"max_failures": -1}, "max_failures"), ({"max_failures": 1.5}, "share"),
        ({"max_failures": True}, "max_failures"), ({"max_failures": "1"}, "max_failures"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_anything(tmp_path, forwards, options, said):
    with pytest.raises(rs.ArgumentError, match=said):
        go(tmp_path / "run", **options)
    assert forwards() == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("out", "error"), [(None, rs.ArgumentError), ("", rs.ArgumentError), (7, rs.ArgumentError)])
def test_no_folder(out, error):
    with pytest.raises(error, match="out"):
        go(out)


@pytest.mark.parametrize(
    "prompts", [[], "text", rs.Prompt(ids=[1], target=2), [7], [{"text": "x", "tagret": [1]}], None]
)
def test_no_prompts(tmp_path, prompts):
    with pytest.raises((rs.ArgumentError, rs.PromptError)):
        go(tmp_path / "run", prompts=prompts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", 1], "one kind"), ([True, 1], "one kind"), ([[1], [2]], "a number, a text"), ([2**63, 1], "a number"),
    ],
)  # fmt: skip
def test_bad_labels(tmp_path, labels, said):
    with pytest.raises((rs.ArgumentError, rs.PromptError), match=said):
        go(tmp_path / "run", prompts=[{**GOOD[i], "label": one} for i, one in enumerate(labels)])


@pytest.mark.parametrize(
    "name", ["arm", "row", "bs_target", "bs_versus_1", "bs_change_target", "log_prob", "status", "k"]
)
def test_labels_that_columns_are_called(tmp_path, name):
    plan = {"axes": {"k": [1]}, "locate": {"best": {"k": "$k"}}}
    with pytest.raises(rs.ArgumentError, match=f"labels.*{name}"):
        go(tmp_path / "run", plan, prompts=[rs.Case(rs.Prompt(ids=[1, 2], target=3), labels={name: 1.0})])


# ---- prompts that fail


def test_prompts_that_cannot_be_run_are_known_before_any_forward(tmp_path, forwards):
    with pytest.raises(rs.RunError, match=r"2 of 2 prompts failed, more than the 1 that `max_failures` allows"):
        go(tmp_path / "run", prompts=[*GOOD, BAD, BAD], max_failures=1)
    assert forwards() == 0
    failures = rs.read_run(tmp_path / "run", table="failures")
    assert failures["prompt"].tolist() == [3, 4]
    assert set(failures["stage"]) == {"prompt"}
    assert set(failures["error"]) == {"PromptError"}
    assert failures["message"].str.contains("`target` must be").all()
    assert failures["traceback"].str.contains("PromptError").all()
    assert go(tmp_path / "run", prompts=[*GOOD, BAD, BAD], max_failures=2).status["done"] == 3


def test_no_prompt_can_be_run(tmp_path, forwards):
    with pytest.raises(rs.PromptError, match=r"none of 2 prompts can be run on .*; prompt 0: `target`"):
        go(tmp_path / "run", prompts=[BAD, BAD])
    assert forwards() == 0
    assert not (tmp_path / "run").exists()


def test_a_plan_that_does_not_fit_the_model_is_refused_before_any_forward(tmp_path, forwards):
    for plan, error in (
        ({"intervene": {"kind": "Zero", "sites": "L9.mlp"}}, rs.SiteError),
        ({"intervene": {"kind": "Attend", "sites": "L0.mlp"}}, rs.ResidSurgeryError),
        ({"intervene": {"kind": "Steer", "sites": "L0.resid_pre", "vector": [1.0]}}, rs.ResidSurgeryError),
        ({"locate": {"best": {"kind": "neurone"}}}, rs.ArgumentError),
        ({"locate": {"best": {"k": 0}}}, rs.ArgumentError),
        ({"locate": {"best": {"layers": [9]}}}, rs.ArgumentError),
        ({"locate": {"best": {"score": "nice"}}}, rs.ArgumentError),
        ({"locate": {"best": {"k": 10**6}}}, rs.ArgumentError),
        ({"intervene": {"kind": "Patch", "sites": "L0.mlp", "donor": "$corrupt"}}, rs.ArgumentError),
        ({"intervene": {"kind": "Zero", "sites": "L0.mlp", "positions": [9]}}, rs.PromptError),
    ):
        with pytest.raises(error):
            go(tmp_path / "run", plan)
        assert not (tmp_path / "run").exists(), plan
    assert forwards() == 0


@pytest.mark.parametrize("stage", ["record", "locate", "operate"])
def test_a_prompt_that_fails_is_recorded_with_its_stage(tmp_path, monkeypatch, stage):
    """And the others go on; it can be run again."""
    expected = go(tmp_path / "calm", BEST)
    broken = rs.Prompt(ids=[9, 8, 7], target=2, versus=[3])
    home, name = {"record": (work, "record_bound"), "locate": (work.Finder, "table"), "operate": (work, "rows_of")}[
        stage
    ]
    real = getattr(home, name)

    def failing(*args, **options):
        seen = next(x for x in (getattr(getattr(one, "rec", one), "prompt", one) for one in args) if hasattr(x, "ids"))
        if seen.ids == broken.ids:
            raise ValueError(f"no luck\nwith {stage}")
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(home, name, failing)
        if stage == "record":
            patched.setattr(work, "record_group", lambda *_, **__: failing(None, broken))
        run = go(tmp_path / "run", BEST)
        assert run.status["failed"] == 1
        row = run.failures.iloc[0]
        assert (row["prompt"], row["stage"], row["error"]) == (2, stage, "ValueError")
        assert row["message"] == f"no luck with {stage}"
        assert f"no luck\nwith {stage}" in row["traceback"]
        assert row["relation"] == "a"
        ledger = run.read("prompts").set_index("prompt")
        assert ledger.loc[2, ["status", "rows"]].tolist() == ["failed", 0]
        assert set(run.rows["prompt"]) == {0, 1}
        assert go(tmp_path / "run", BEST).status["failed"] == 1  # it is not tried again unasked
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"WARNING prompt 2 failed ({stage}): ValueError: no luck with {stage}\n" in log
    again = go(tmp_path / "run", BEST, retry=True)
    assert again.status["failed"] == 0
    assert again.failures.empty
    for table in ("rows", "located", "prompts"):
        # a group that could not be recorded together was recorded one by one, which moves last digits
        here, there = again.read(table), expected.read(table)
        pd.testing.assert_frame_equal(here, there, **({} if stage == "record" else {"check_exact": True}))
    assert again.read("prompts", where={"status": "failed"}).empty
    assert again.read("failures", where={"error": "ValueError"}).empty


def test_a_retry_that_fails_otherwise_has_the_last_word(tmp_path, monkeypatch):
    for text, retry in (("first", False), ("second", True)):
        with monkeypatch.context() as patched:
            patched.setattr(work, "rows_of", lambda *_, text=text: (_ for _ in ()).throw(KeyError(text)))
            run = go(tmp_path / "run", prompts=GOOD[:1], retry=retry)
    assert run.failures["message"].tolist() == ["'second'"]
    assert run.read("failures", where={"message": "'first'"}).empty
    assert run.status | {"failed": 1, "left": 0, "shards": 2} == run.status


@pytest.mark.parametrize(
    ("given", "total", "allowed"),
    [(None, 10, None), (0, 10, 0), (3, 10, 3), (0.0, 10, 0), (0.1, 10, 1), (0.11, 10, 2), (1.0, 7, 7), (1, 7, 1)],
)
def test_a_budget_is_a_number_or_a_share(given, total, allowed):
    assert allowed_failures(given, total) == allowed


@pytest.mark.parametrize(("budget", "stops"), [(1, True), (2, False), (0.1, True), (0.5, False), (None, False)])
def test_a_budget_stops_a_run_and_keeps_what_is_done(tmp_path, monkeypatch, budget, stops):
    prompts = [{"ids": [n, 1, 2][: 1 + n % 3], "target": 5} for n in range(6)]
    real = work.rows_of

    def failing(plan, scene):
        if scene.prompt.ids[0] in (0, 3):
            raise ValueError("no luck")
        return real(plan, scene)

    monkeypatch.setattr(work, "rows_of", failing)
    if stops:
        with pytest.raises(rs.RunError, match=r"2 of \d prompts failed, more than the 1 that `max_failures`.*resume"):
            go(tmp_path / "run", prompts=prompts, max_failures=budget)
        held = rs.open_run(tmp_path / "run").status
        assert held["failed"] == 2
    monkeypatch.setattr(work, "rows_of", real)
    run = go(tmp_path / "run", prompts=prompts, max_failures=None, retry=True)
    assert run.status["done"] == 6
    assert sorted(set(run.rows["prompt"])) == list(range(6))


# ---- what is there


def test_a_finished_run_runs_nothing(tmp_path, forwards):
    go(tmp_path / "run")
    before, files = forwards(), sorted((tmp_path / "run").rglob("s*.parquet"))
    assert before > 0
    assert go(tmp_path / "run").status["finished"]
    assert forwards() == before
    assert sorted((tmp_path / "run").rglob("s*.parquet")) == files


def test_status_manifest_and_log(done):
    held, body = done.status, done.manifest
    assert held | {"prompts": 4, "done": 3, "failed": 1, "unknown": 0, "left": 0, "rows": 6, "running": None} == held
    assert repr(done).endswith("3 of 4 prompts done, 1 failed, 6 rows)")
    assert body["plan"] == rs.Plan.of(BEST).entry()
    assert body["plan_hash"] == rs.Plan.of(BEST).hash
    assert body["model"]["fingerprint"] == model().fingerprint()
    assert body["model"]["dtype"] == "float64"
    assert set(body["sessions"][0]["versions"]) >= {"torch", "transformers", "pyarrow"}
    assert "begun: 4 prompts" in (done.out / "run.log").read_text()
    assert rs.read_cases(done.out / "prompts.jsonl") == [rs.Case(c.prompt, c.labels) for c in map(case, [*GOOD, BAD])]


def case(given):
    labels = {name: given[name] for name in ("relation", "half") if name in given}
    versus = given.get("versus", ())
    versus = [versus] if isinstance(versus, int) else versus
    return rs.Case(rs.Prompt(ids=given["ids"], target=given["target"], versus=versus), labels)


def test_plain_parquet(done):
    """Any reader of Parquet files reads a table's folder."""
    plain = ds.dataset(str(done.out / "rows"), format="parquet").to_table().to_pandas()
    held = done.rows
    assert len(plain) == len(held)
    for name in ("prompt", "row", "log_prob", "bs_target", "relation"):
        merged = plain.sort_values(["prompt", "row"], ignore_index=True)[name]
        assert merged.tolist() == held[name].tolist()
    assert pq.read_table(done.out / "prompts" / "s000000.parquet")["prompt"].to_pylist()


def test_only_what_is_asked_for_is_read(done, monkeypatch):
    asked = []
    real = ds.Dataset.to_table

    class Spy:
        def __init__(self, inner):
            self.inner, self.schema = inner, inner.schema

        def to_table(self, **options):
            asked.append(options)
            return real(self.inner, **options)

    monkeypatch.setattr(rs.Run, "dataset", lambda self, table="rows", real=rs.Run.dataset: Spy(real(self, table)))
    table = done.read("rows", columns=["log_prob", "arm"], where={"arm": "best", "prompt": [0, 2]})
    assert table.columns.tolist() == ["log_prob", "arm"]
    assert set(asked[0]["columns"]) == {"log_prob", "arm", "prompt", "row"}
    assert asked[0]["filter"] is not None
    assert len(table) == 2
    whole = done.rows
    wanted = whole[(whole["arm"] == "best") & whole["prompt"].isin([0, 2])]["log_prob"].tolist()
    assert table["log_prob"].tolist() == wanted


def test_where(done):
    rows = done.rows
    assert len(done.read(where={"layer": None})) == rows["layer"].isna().sum()
    assert done.read("prompts", columns=["prompt"], where={"status": "failed"})["prompt"].tolist() == [3]
    assert done.read("failures", columns=["stage"], where={"error": "PromptError"})["stage"].tolist() == ["prompt"]
    assert done.read(where={"relation": ["a"]})["prompt"].unique().tolist() == [0, 2]
    assert done.read(where={"half": [0.5, None]}, columns=["prompt"])["prompt"].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"table": "row"}, {"columns": "prompt"}, {"columns": []}, {"columns": ["promt"]}, {"where": {"promt": 1}},
        {"where": {"prompt": "x"}}, {"where": ["prompt"]}, {"table": "effects"},
    ],
)  # fmt: skip
def test_bad_reading(done, options):
    with pytest.raises(rs.ArgumentError):
        rs.read_run(done.out, **options)


def test_types_of_columns(done):
    """Whole numbers stay whole where some are missing; empty texts are missing."""
    rows = done.rows
    assert rows["layer"].dtype == pd.Int64Dtype()
    assert rows["prompt"].dtype == np.int64
    assert rows["expert"].isna().all()
    assert rows["half"].dtype == np.float64
    ledger = done.read("prompts")
    assert ledger["n_tokens"].isna().tolist() == [False] * 3 + [True]


def test_reading_while_it_runs_and_when_nothing_is_there_yet(tmp_path, monkeypatch):
    seen, real = [], Folder.commit

    def commit(self, tables):
        run = rs.open_run(tmp_path / "run")
        seen.append((run.status["done"], len(run.rows), len(run.read("located")), run.status["running"] is not None))
        pieces = [run.read(table) for table in run.tables]
        assert all(
            list(one.columns) == list(run.manifest["tables"][t]) for one, t in zip(pieces, run.tables, strict=True)
        )
        return real(self, tables)

    monkeypatch.setattr(Folder, "commit", commit)
    go(tmp_path / "run", BEST, save_every=0)
    assert seen == [(0, 0, 0, True), (1, 2, 4, True), (2, 4, 8, True)]


def test_no_run(tmp_path):
    for read in (rs.open_run, rs.read_run):
        with pytest.raises(rs.LoadError, match="holds no run"):
            read(tmp_path)
    with pytest.raises(rs.ArgumentError, match="out"):
        rs.open_run(3)


def test_the_order_is_that_of_the_prompts(tmp_path):
    """Whatever the order of the work, which goes by length."""
    run = go(tmp_path / "run", save_every=0)
    rows = run.rows
    assert rows[["prompt", "row"]].values.tolist() == [[p, r] for p in range(3) for r in range(3)]
    files = [pq.read_table(file)["prompt"].to_pylist() for file in sorted((run.out / "prompts").glob("*"))]
    assert files == [[0], [2], [1]]


def test_shards_do_not_change_what_is_read(tmp_path):
    one, many = go(tmp_path / "one", BEST), go(tmp_path / "many", BEST, save_every=0)
    assert (one.status["shards"], many.status["shards"]) == (1, 3)
    for table in one.tables:
        pd.testing.assert_frame_equal(one.read(table), many.read(table), check_exact=True)


def test_a_lost_half_of_a_group_is_recorded_in_the_same_company(tmp_path):
    """A run resumed in the middle of a group gives the same last digits."""
    prompts = [{"ids": [n, 2, 3], "target": 5} for n in range(6)]
    calm = go(tmp_path / "calm", BEST, prompts, opened=shared("llama", torch.float32), save_every=0)
    shutil.copytree(calm.out, tmp_path / "run")
    for name in ("s000002", "s000004", "s000005"):
        for table in TABLES:
            (tmp_path / "run" / table / f"{name}.parquet").unlink(missing_ok=True)
    again = go(tmp_path / "run", BEST, prompts, opened=shared("llama", torch.float32))
    for table in calm.tables:
        pd.testing.assert_frame_equal(again.read(table), calm.read(table), check_exact=True)


def test_summary_is_the_bootstrap(done):
    for options in ({}, {"against": {"arm": "others"}}, {"confidence": 0.5, "resamples": 100, "seed": 3}):
        here = done.summary("arm", "bs_change_target", **options)
        there = rs.bootstrap(done.rows, "arm", "bs_change_target", **options)
        pd.testing.assert_frame_equal(here, there)
    located = done.summary(["set", "rank"], "value", table="located")
    pd.testing.assert_frame_equal(located, rs.bootstrap(done.read("located"), ["set", "rank"], "value"))


def test_broken_texts_are_written_as_escapes(tmp_path):
    label = "half \udc80 a byte \u2028 \x00 «»"
    prompts = [{**GOOD[0], "relation": label}, *GOOD[1:]]
    run = go(tmp_path / "run", prompts=prompts)
    assert run.rows["relation"].iloc[0] == label.replace("\udc80", "\\udc80")
    assert go(tmp_path / "run", prompts=prompts).status["finished"]
    assert rs.read_cases(run.out / "prompts.jsonl")[0].labels["relation"] == label
    assert json.loads((run.out / "manifest.json").read_text())["prompts"]["number"] == 3


@pytest.mark.parametrize("name", ["a.b", ".x", "_at", "at", 'quo"te', "Ünï", "kind of"])
def test_labels_of_any_name(tmp_path, name):
    run = go(tmp_path / "run", BEST, prompts=[{"ids": [1, 2], "target": 3, name: 1.5}])
    for table in run.tables:
        if table != "failures":
            assert set(run.read(table, columns=[name], where={name: 1.5})[name]) == {1.5}


def test_known_prompts_only(tmp_path):
    plain = go(tmp_path / "plain").read("prompts")
    best = [{**GOOD[0], "target": int(plain["top"][0].removeprefix("#")), "versus": [96, 95]}, *GOOD[1:]]
    run = go(tmp_path / "run", MLPS | {"known": True}, best)
    ledger = run.read("prompts")
    expected = ["done" if rank == 1 else "unknown" for rank in ledger["rank"]]
    assert ledger["status"].tolist() == expected
    assert expected[0] == "done"
    assert "unknown" in expected
    assert run.rows["prompt"].unique().tolist() == [i for i, one in enumerate(expected) if one == "done"]
    assert run.status["unknown"] == expected.count("unknown")
    assert go(tmp_path / "run", MLPS | {"known": True}, best).status["finished"]


def test_the_users_model_is_not_changed(tmp_path):
    own = build("gpt2").train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    go(tmp_path / "run", BEST, opened=rs.load(own.eval()))
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in own.modules())
    assert not own.training
