"""lm-evaluation-harness on the base and the really edited weights: own numbers, nothing left behind."""

import importlib
import json
import logging
import os
import random

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import resid_surgery as rs
from resid_surgery.editing import harness
from resid_surgery.editing.changes import Rows
from resid_surgery.editing.edits import Edit, new_edit
from resid_surgery.editing.harness import run_lm_eval
from resid_surgery.errors import ArgumentError, InterventionError

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
generator = random.Random(0)
DOCS = [(" ".join(f"w{generator.randrange(96)}" for _ in range(3)),
         tuple("".join(f" w{generator.randrange(96)}" for _ in range(1 + i % 2)) for i in range(3)), n % 3)
        for n in range(40)]  # fmt: skip


def tokenizer():
    vocab = {f"w{i}": i for i in range(97)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w96")


def opened(seed=0, **changes):
    return rs.load(tiny.build("llama", torch.float32, seed=seed, **changes), tokenizer=tokenizer())


@pytest.fixture
def task(tmp_path):
    lines = [json.dumps({"q": q, "c": list(c), "a": a}) for q, c, a in DOCS]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(f"""task: pick_a_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/docs.jsonl
  cache_dir: {tmp_path}/cache
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
doc_to_choice: "{{{{c}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    return tmp_path


def by_hand(module, docs=DOCS):
    """Share of documents whose right choice has the highest joint log-probability, in plain PyTorch."""
    right = 0
    for question, choices, answer in docs:
        scores = []
        for choice in choices:
            ids = [int(w[1:]) for w in (question + choice).split()]
            n = len(question.split())
            with torch.no_grad():
                p = torch.log_softmax(module(torch.tensor([ids])).logits[0].double(), -1)
            scores.append(sum(float(p[i - 1, ids[i]]) for i in range(n, len(ids))))
        right += int(np.argmax(scores)) == answer
    return right / len(docs)


def changed(model, path="model.layers.1.mlp.down_proj.weight", tied=()):
    shape = tuple(model.module.state_dict()[path].shape)
    delta = torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    return new_edit(model, [Rows(path, tied, shape, (1,), torch.arange(shape[1])[:, None], delta)], method="test")


@needs_lm_eval
def test_figures_are_those_of_an_own_computation(task):
    model = opened()
    edit = changed(model)
    with edit.applied(model) as edited:
        expected = by_hand(model.module), by_hand(edited.module)
    table = run_lm_eval(model, edit, ["pick_a_word"], include_path=task, batch_size=4, bootstrap_iters=0)
    row = table.set_index("metric").loc["acc"]
    assert (row["base"], row["edited"]) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert expected[0] != expected[1]
    assert row["change"] == pytest.approx(expected[1] - expected[0])
    assert (row["task"], row["n"]) == ("pick_a_word", 40)
    short = run_lm_eval(model, edit, ["pick_a_word"], include_path=task, limit=2)
    assert short["n"].tolist() == [2]
    assert short["base"].tolist() == [pytest.approx(by_hand(model.module, DOCS[:2]))]


@needs_lm_eval
def test_an_edit_that_unties_is_not_tied_again(task):
    model = opened()
    assert model.anatomy.tied
    edit = changed(model, "lm_head.weight")
    with edit.applied(model) as edited:
        expected = by_hand(edited.module)
    table = run_lm_eval(model, edit, ["pick_a_word"], include_path=task)
    assert table["edited"].tolist() == [pytest.approx(expected)]
    assert expected != by_hand(model.module)


@needs_lm_eval
def test_nothing_is_left_behind(task):
    model = opened()
    model.module.train()
    config = model.module.config.to_dict()
    before = model.fingerprint(), model.tokenizer.pad_token, random.getstate(), torch.get_rng_state()
    numbers, environment = np.random.get_state()[1].tolist(), dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in ("", "lm_eval", "transformers", "datasets")}
    handlers = list(logging.getLogger().handlers)
    run_lm_eval(model, changed(model), ["pick_a_word"], include_path=task, seed=7)
    assert model.module.training
    assert model.module.config.to_dict() == config
    assert (model.fingerprint(), model.tokenizer.pad_token, random.getstate()) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert np.random.get_state()[1].tolist() == numbers
    assert dict(os.environ) == environment
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert logging.getLogger().handlers == handlers


@needs_lm_eval
def test_a_harness_that_changes_its_weights_is_refused(task, monkeypatch):
    model = opened()
    part = harness._lm_eval(".models.huggingface")

    class Meddling(part.HFLM):
        def __init__(self, pretrained, **options):
            super().__init__(pretrained=pretrained, **options)
            pretrained.lm_head.weight = torch.nn.Parameter(pretrained.lm_head.weight * 2, requires_grad=False)

    monkeypatch.setattr(part, "HFLM", Meddling)
    with pytest.raises(InterventionError, match="changed or tied"):
        run_lm_eval(model, changed(model), ["pick_a_word"], include_path=task)


def test_bad_input_is_named_before_anything_runs(monkeypatch, tmp_path):
    model = opened()
    edit = changed(model)
    for given, words in (("pick", "`tasks`"), ([], "`tasks`"), ([3], "`tasks`")):
        with pytest.raises(ArgumentError, match=words):
            run_lm_eval(model, edit, given)
    for options, words in (({"batch_size": 0}, "`batch_size`"), ({"limit": 0}, "`limit`"), ({"seed": -1}, "`seed`"),
                           ({"num_fewshot": -1}, "`num_fewshot`"), ({"random_seed": 3}, "`random_seed`"),
                           ({"include_path": tmp_path / "none"}, "`include_path`")):  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            run_lm_eval(model, edit, ["a"], **options)
    with pytest.raises(ArgumentError, match="works by interventions"):
        run_lm_eval(model, Edit((), (rs.Zero("L1.N1", positions="all"),)), ["a"])
    bare = rs.load(tiny.build("llama", torch.float32))
    with pytest.raises(ArgumentError, match="tokenizer"):
        run_lm_eval(bare, changed(bare), ["a"])

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(harness.importlib, "import_module", missing)
    with pytest.raises(ArgumentError, match=r'pip install "resid-surgery\[lm-eval\]"'):
        run_lm_eval(model, edit, ["a"])


@needs_lm_eval
def test_an_unknown_task_is_named(task):
    model = opened()
    with pytest.raises(ArgumentError, match="no_such_task is not among"):
        run_lm_eval(model, changed(model), ["pick_a_word", "no_such_task"], include_path=task)
