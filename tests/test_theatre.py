"""The theatre without a browser: what it shows, what is operated on, what is exported, who waits and who is let in."""

import ast
import asyncio
import itertools
import json
import math
import subprocess
import sys
import threading
import time
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import resid_surgery as rs
from resid_surgery.errors import ArgumentError, InterventionError, PromptError, SiteError
from resid_surgery.views import theatre as play
from resid_surgery.views import theatre_acts as doing
from resid_surgery.views import theatre_tables as tables
from resid_surgery.views.theatre_guard import HEADERS, LOOPBACK, Guard, loopback, new_key, refusal
from resid_surgery.views.theatre_line import Line, SupersededError
from resid_surgery.views.theatre_recipe import load_text, recipe
from resid_surgery.views.theatre_server import bound, theatre

HOSTILE = "<img src=x onerror=window.hostile=1>"
WORDS = ("[UNK]", HOSTILE, "The", " capital", " of", " France", " is", " Paris", " London", " Lyon", "Paris", " $x^2$")
TEXT = "The capital of France is"


def theatre_tokenizer() -> Any:
    """Whole words with their leading space, one of them markup that would run a script; offline."""
    words = [*WORDS, *(f" word{i}" for i in range(len(WORDS), tiny.VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<img [^>]*>| ?[^ ]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama to which one can type."""
    return rs.load(tiny.build("llama"), tokenizer=theatre_tokenizer())


@pytest.fixture(scope="module")
def stage(model: Any) -> play.Stage:
    """The prompt on it."""
    return play.read(model, TEXT, " Paris", [" London", HOSTILE])


@pytest.fixture
def still(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward may run."""
    monkeypatch.setattr(model.shadow, "forward", lambda *_, **__: pytest.fail("a forward ran"))
    monkeypatch.setattr(model.module, "forward", lambda *_, **__: pytest.fail("a forward ran"))


# -- prompts


@pytest.mark.parametrize(
    ("text", "target", "versus", "said"),
    [
        (TEXT, " Paris", [" London"], {}),
        (TEXT, "", [], {}),
        ("", "", [], {"text": "1 to 4,000 characters"}),
        ("The " * 2000, "", [], {"text": "8000 of them"}),
        ("The" + " of" * 70, "", [], {"text": "reads at most 64"}),
        (TEXT, " Paris London", [], {"target": "is 2"}),
        (TEXT, " Marseille", [], {"target": "does not know"}),
        (TEXT, "London", [], {"target": "With its leading space, ' London', it is one token."}),
        (TEXT, " Paris", [" Paris"], {"versus": "distinct"}),
        (TEXT, "", [" Lyon", " Lyon"], {"versus": "distinct"}),
        (TEXT, " Nowhere", [" Lyon", " Else"], {"target": "Nowhere", "versus": "Else"}),
        (TEXT, "", [f" word{i}" for i in range(20, 29)], {"versus": "at most 8"}),
        ("", " Nowhere", [" Else"], {"text": "characters", "target": "Nowhere", "versus": "Else"}),
    ],
)
@pytest.mark.usefixtures("still")
def test_what_is_wrong_is_said_by_field_before_any_forward(model, text, target, versus, said):
    found = play.faults(model, text, target, versus)
    assert set(found) == set(said)
    for field, why in said.items():
        assert why in found[field]
    if said:
        with pytest.raises(PromptError):
            play.read(model, text, target, versus)


def test_a_prompt_longer_than_the_theatre_takes_is_refused_even_where_the_model_would_read_it(model, monkeypatch):
    monkeypatch.setattr(play, "MOST_TOKENS", 4)
    assert "at most 4 tokens in the theatre" in play.faults(model, TEXT, "", [])["text"]
    assert not play.faults(model, "The capital of France", "", [])


def test_reading_shows_what_the_api_says(model, stage):
    rec = rs.record(model, rs.Prompt(TEXT, target=" Paris", versus=[" London", HOSTILE]), positions="all")
    pd.testing.assert_frame_equal(stage.stream, rs.stream_bs(rec))
    pd.testing.assert_frame_equal(stage.predictions, rs.predictions(rec, top=8))
    assert all(torch.equal(a, b) for a, b in zip(stage.rec.tensors(), rec.tensors(), strict=True))
    assert stage.rec.prompt == rec.prompt
    stage.rec.require_fresh()


def test_no_target_is_the_models_first_choice_that_is_no_competitor(model):
    first = play.read(model, TEXT)
    best = first.rec.logits.argsort(descending=True).tolist()
    assert first.rec.prompt.target == best[0]
    name = first.rec.prompt.names[best[0]]
    second = play.read(model, TEXT, "", [name])
    assert second.rec.prompt.target == next(i for i in best[1:] if play.writable(model, i))
    assert second.rec.prompt.versus == (best[0],)


def test_a_listed_token_is_picked_only_where_its_text_is_that_token(model):
    assert play.picked(model, 1) == HOSTILE
    for wrong in (-1, tiny.VOCAB, "1", 1.5, None):
        with pytest.raises(PromptError):
            play.picked(model, wrong)
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(_with_merge(model))))
    other = rs.load(tiny.build("llama"), tokenizer=merged)
    assert not play.writable(other, 8)
    with pytest.raises(PromptError, match="one whose text is one token"):
        play.picked(other, 8)


def _with_merge(model: Any) -> dict[str, Any]:
    """The tokenizer, but " London" is split when it is typed."""
    spec = json.loads(model.tokenizer.backend_tokenizer.to_str())
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "Lon"}, "behavior": "Isolated", "invert": False}
    return spec


# -- subvalues


@pytest.mark.parametrize("kind", play.KINDS)
def test_located_subvalues_are_those_of_locate(stage, kind):
    table = play.found(stage, kind, 6)
    located = rs.locate(stage.rec, k=6, kind=kind)
    pd.testing.assert_frame_equal(table[located.table.columns], located.table)
    tokens = rs.spectrum(stage.rec, located.sites[0], top=4)
    best = tokens[tokens["side"] == "promotes"]["token"]
    assert table["promotes"][0] == " ".join(map(repr, best))
    line = stage.stream[stage.stream["role"] == "target"].set_index("step")
    for row in table.to_dict("records"):
        state = line.loc[row["step"]]
        assert row["bs_value"] == state["bs_value"]
        layer, last = row["layer"], stage.rec.model.anatomy.n_layers - 1
        after = f"L{last}.resid_post" if layer == last else f"L{layer + 1}.resid_pre"
        assert state["site"] == (after if kind == "neuron" else f"L{layer}.resid_mid")


def test_as_many_as_there_are_and_no_other_kind(stage):
    heads = sum(size.n_heads for size in stage.rec.model.anatomy.sizes)
    assert len(play.found(stage, "head", 50)) == heads
    for kind, k in (("layer", 3), ("nonsense", 3), ("head", 0), ("head", 51), ("head", "3")):
        with pytest.raises(ArgumentError):
            play.found(stage, kind, k)


@pytest.mark.parametrize("text", ["L2.N7", "L1.H3", "L2.H1<3"])
def test_every_listed_source_can_be_cut(stage, text):
    site = doing.a_site(stage, text)
    told = play.about(stage, site)
    rows = rs.sources(stage.rec, site, top=5)
    kept = rows[~rows["kind"].isin(["remainder", "constant"])]
    assert told.sources["share"].tolist() == kept["share"].tolist()
    assert len(told.promotes) == len(told.suppresses) == 8
    for edge in dict.fromkeys(told.sources["edge"]):
        writer, _, reader = edge.partition("->")
        side = "value" if reader.endswith(".value") else "all"
        cut = doing.a_cut(stage, writer, reader.removesuffix(".value"), side)
        assert str(cut.sites[0]) == edge
        assert doing.measured(stage, [cut]).effect.table["closure"].max() < 1e-6


def test_what_cannot_be_split_is_said(stage, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise rs.UnsupportedModelError("not in this model")

    monkeypatch.setattr(play, "sources", refuse)
    told = play.about(stage, doing.a_site(stage, "L2.N7"))
    assert told.why == "not in this model"
    assert told.sources.empty
    assert tables.source_rows(told.sources) == []


# -- operations


@given(st.lists(st.tuples(st.sampled_from(["L0.N1", "L1.H2", "L2.H0<1"]), st.floats(-3, 3)), max_size=8))
def test_the_last_value_of_a_site_counts(moves):
    acts = doing.Acts()
    for name, value in moves:
        acts = acts.turned(doing.Knob(rs.parse_site(name), value=value))
    last = dict(moves)
    assert {str(knob.site): knob.value for knob in acts.knobs} == last
    assert [str(knob.site) for knob in acts.knobs] == list(dict.fromkeys(name for name, _ in moves))
    assert acts.operations == tuple(rs.Scale(name, last[name]) for name in last if last[name] != 1)
    for name in last:
        acts = acts.without(rs.parse_site(name))
    assert acts == doing.Acts()


def test_cuts_come_and_go():
    one, two = rs.Cut("L0.mlp", "L2.N7"), rs.Cut("L1.mlp", "L2.N7")
    acts = doing.Acts().cut(one).cut(two).cut(one)
    assert acts.operations == (one, two)
    assert acts.without(one).operations == (two,)


OPERATIONS = [
    [rs.Scale("L2.N7", -0.5)],
    [rs.Clamp("L1.N3", 2.0), rs.Scale("L2.H1", 3.0)],
    [rs.Scale("L2.H1<3", 0.0), rs.Cut("L0.mlp", "L2.N7"), rs.Cut("L0.attn", "L1.H0<2", side="value")],
]


@pytest.mark.parametrize("operations", OPERATIONS, ids=str)
def test_the_distribution_is_that_of_intervene(model, stage, operations):
    outcome = doing.measured(stage, operations, top=5)
    effect = rs.intervene(stage.rec, operations)
    table = outcome.distribution.set_index("token_id")
    pd.testing.assert_frame_equal(outcome.effect.table, effect.table)
    for row in effect.table.to_dict("records"):
        if row["token_id"] in table.index:
            for name in ("prob_before", "prob_after", "bs_before", "bs_after"):
                assert table.loc[row["token_id"], name] == pytest.approx(row[name], abs=1e-12)
    clean = model.module(torch.tensor([stage.rec.prompt.ids])).logits[0, -1].detach().softmax(-1)
    for i, row in table.iterrows():
        assert row["prob_before"] == pytest.approx(float(clean[i]), abs=1e-9)
    assert set(clean.topk(5).indices.tolist()) <= set(table.index)
    assert set(effect.after.logits.topk(5).indices.tolist()) <= set(table.index)
    assert table["role"].tolist()[:4] == ["target", "versus", "versus", "top"]
    assert not math.isclose(table["prob_before"].iloc[0], table["prob_after"].iloc[0])


@pytest.mark.usefixtures("still")
def test_nothing_operated_on_needs_no_forward(stage):
    outcome = doing.measured(stage, [])
    assert outcome.effect is None
    assert (outcome.distribution["prob_before"] == outcome.distribution["prob_after"]).all()
    assert "Nothing is operated on" in tables.summary(outcome)
    assert tables.split_rows(outcome) == []


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    "text",
    ["", None, 3, "L2.mlp", "L9.N1", "L2.N400", "L2.H1<5", "L*.H1", "L0.mlp->L2.N7", "os.system('x')", "L2.N7@9"],
)
def test_what_is_no_subvalue_is_refused_before_any_forward(stage, text):
    with pytest.raises(SiteError):
        doing.a_site(stage, text)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("writer", "reader", "side"),
    [("", "L2.N7", "all"), ("L0.mlp", None, "all"), ("L2.mlp", "L1.N3", "all"), ("L0.mlp", "L2.N7", "value"),
     ("L0.mlp", "L2.H1", "nonsense"), ("L0.mlp", "L2.N999", "all"), ("/etc/passwd", "L2.N7", "all")],
)  # fmt: skip
def test_what_is_no_edge_is_refused_before_any_forward(stage, writer, reader, side):
    with pytest.raises(SiteError):
        doing.a_cut(stage, writer, reader, side)


@pytest.mark.parametrize("value", [None, "2", True, math.nan, math.inf, -math.inf, 1000.1, [1.0]])
def test_what_is_no_value_is_refused(value):
    with pytest.raises(ArgumentError, match="`value` must be a number from -1000 to 1000"):
        doing.a_value(value)


def test_values_keep_five_digits_however_small_they_are():
    assert doing.a_value(0.00123456) == 0.0012346
    assert doing.a_value(-1000) == -1000.0


@pytest.mark.usefixtures("still")
def test_operations_that_contradict_each_other_or_are_too_many_are_refused_before_any_forward(stage):
    with pytest.raises(InterventionError):
        doing.checked(stage, [rs.Clamp("L2.N7", 1.0), rs.Scale("L2.N7", 2.0), rs.Clamp("L2.N7", 2.0)])
    with pytest.raises(InterventionError, match="at most 20"):
        doing.checked(stage, [rs.Scale(f"L2.N{i}", 2.0) for i in range(21)])


def test_a_mode_begins_where_nothing_changes(stage):
    site = doing.a_site(stage, "L2.N7")
    clamp = doing.in_mode(stage, site, "clamp")
    assert clamp.value == pytest.approx(doing.coefficient(stage, site), abs=5e-4)
    assert doing.coefficient(stage, site) == pytest.approx(float(rs.sources(stage.rec, site)["coefficient"][0]))
    assert doing.in_mode(stage, site, "scale").operation is None
    for knob in (clamp, doing.Knob(site), doing.Knob(site, value=9.0), doing.Knob(site, "clamp", -500.0)):
        low, high = doing.span(stage, knob)
        assert low <= knob.value <= high
        assert low < 0 < high
    for wrong, mode in ((doing.a_site(stage, "L1.H3"), "clamp"), (site, "nonsense")):
        with pytest.raises(ArgumentError):
            doing.in_mode(stage, wrong, mode)


# -- continuations


@pytest.mark.parametrize("operations", [[], *OPERATIONS], ids=str)
def test_the_continuation_is_that_of_generate(model, stage, operations):
    heard: list[str] = []
    made = doing.continued(stage, operations, 5, tell=lambda text: bool(heard.append(text)))
    ids = torch.tensor([stage.rec.prompt.ids])
    if operations:
        with rs.under(model, operations) as altered:
            assert made == altered.generate(TEXT, max_new_tokens=5)
    else:
        out = model.module.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        assert made == model.tokenizer.decode(out[0, ids.shape[1] :])
    assert heard[-1] == made
    assert len(heard) == 5
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(heard))


@pytest.mark.parametrize("operations", [[], OPERATIONS[0]], ids=str)
def test_a_continuation_stops_when_it_is_told_to(stage, operations):
    heard: list[str] = []
    doing.continued(stage, operations, 9, tell=lambda text: bool(heard.append(text)) or len(heard) == 2)
    assert len(heard) == 2
    with pytest.raises(ArgumentError, match="`new`"):
        doing.continued(stage, operations, 41)


# -- what is exported


def ran(text: str, model: Any) -> dict[str, pd.DataFrame]:
    """A recipe, run as its readers run it."""
    held: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(text, "recipe.py", "exec"), held)
    return held["main"](model)


@pytest.mark.parametrize("operations", OPERATIONS, ids=str)
def test_the_recipe_does_it_again(model, stage, operations):
    outcome = doing.measured(stage, operations)
    text = recipe(stage, tuple(operations), outcome, 4, load_text("m", None, None))
    made = ran(text, model)
    pd.testing.assert_frame_equal(made["effect"], rs.intervene(stage.rec, operations).table)
    assert made["ledger"]["closure"].max() < 1e-6
    assert made["continuation"]["continuation"][0] == doing.continued(stage, operations, 4)
    row = outcome.distribution.iloc[0]
    assert f'"{row["token"]}": logit {row["bs_before"]:.6g} -> {row["bs_after"]:.6g}' in text
    assert text.count("# %%") >= 4
    assert len(text.splitlines()) <= 80


def test_a_recipe_without_operations_reads_and_locates(model, stage):
    text = recipe(stage, (), doing.measured(stage, []), 4, load_text("m", None, None))
    made = ran(text, model)
    pd.testing.assert_frame_equal(made["stream"], stage.stream)
    assert made["neurons"]["site"].tolist() == play.found(stage, "neuron")["site"].tolist()


@pytest.mark.parametrize(
    "text", ["The' + str(1) + '", 'The """', "The\nimport os\u2028# %%", "The {load} %s", "The \\"]
)
def test_whatever_is_typed_stays_a_text_in_the_recipe(model, text):
    found = play.read(model, text, HOSTILE, [" Paris"])
    operations = (rs.Scale("L2.N7", 2.0),)
    source = recipe(found, operations, doing.measured(found, operations), 3, load_text("m'\n", "float64", None))
    made = ran(source, model)
    assert made["continuation"]["text"][0] == text
    assert made["effect"]["token"][0] == HOSTILE
    (main,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [ast.literal_eval(one) for one in main.args.defaults[1:]] == [text, HOSTILE, (" Paris",), 3]
    assert 'rs.load("m\'\\n", dtype="float64")' in source


@given(st.text())
def test_literals_are_one_plain_line(text):
    from resid_surgery.views.theatre_recipe import _literal

    shown = _literal(text)
    assert ast.literal_eval(shown) == text
    assert shown.isprintable()
    shown.encode("utf-8")


# -- who waits


def test_of_one_wish_only_the_latest_is_carried_out_and_one_at_a_time():
    done, inside = [], []

    def work(i: int) -> int:
        inside.append(threading.current_thread().name)
        time.sleep(0.02)
        done.append(i)
        return i

    async def play_it() -> list[Any]:
        line = Line()
        asked = [line.ask("a", "measure", lambda i=i: work(i)) for i in range(5)]
        asked.append(line.ask("b", "measure", lambda: work(9)))
        found = await asyncio.gather(*asked, return_exceptions=True)
        line.close()
        return found

    begun, *early, last, other = asyncio.run(play_it())
    assert (begun, last, other) == (0, 4, 9)
    assert [type(one) for one in early] == [SupersededError] * 3
    assert done == [0, 4, 9]
    assert len(set(inside)) == 1


def test_long_work_makes_way_and_begins_again():
    rounds: list[int] = []

    async def play_it() -> tuple[str, str, list[str]]:
        line, order = Line(), []

        def long(stop: Any) -> str:
            rounds.append(0)
            for _ in range(200):
                if stop():
                    return "broken off"
                time.sleep(0.001)
                rounds[-1] += 1
            order.append("long")
            return "whole"

        patient = asyncio.create_task(line.ask_patiently("a", "generate", long))
        await asyncio.sleep(0.03)
        quick = await line.ask("b", "measure", lambda: order.append("quick") or "quick")
        found = await patient
        line.close()
        return found, quick, order

    assert asyncio.run(play_it()) == ("whole", "quick", ["quick", "long"])
    assert len(rounds) == 2
    assert rounds[0] < rounds[1] == 200


def test_long_work_is_dropped_and_errors_reach_who_asked():
    async def play_it() -> list[Any]:
        line = Line()

        def forever(stop: Any) -> str:
            while not stop():
                time.sleep(0.001)
            return "stopped"

        first = asyncio.create_task(line.ask_patiently("a", "generate", forever))
        await asyncio.sleep(0.02)
        line.drop("a", "generate")
        later = asyncio.create_task(line.ask_patiently("a", "generate", lambda _: "soon", pause=0.02))
        waiting = asyncio.create_task(line.ask_patiently("c", "generate", lambda _: "never", pause=0.05))
        await asyncio.sleep(0)
        line.drop("c")
        found = await asyncio.gather(first, later, waiting, line.ask("a", "measure", lambda: 1 / 0),
                                     return_exceptions=True)  # fmt: skip
        again = await line.ask("a", "measure", lambda: "goes on")
        line.close()
        return [*found, again]

    first, later, waiting, error, again = asyncio.run(play_it())
    assert isinstance(first, SupersededError)
    assert (later, again) == ("soon", "goes on")
    assert isinstance(waiting, SupersededError)
    assert isinstance(error, ZeroDivisionError)


# -- who is let in


def scope(kind: str = "http", path: str = "/", method: str = "GET", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "path": path, "method": method, "headers": pairs}


OURS = "127.0.0.1:8420"


@pytest.mark.parametrize(
    ("given_scope", "allowed"),
    [
        (scope(host=OURS), True),
        (scope(host="localhost:8420"), True),
        (scope(host="LOCALHOST"), True),
        (scope(host="[::1]:8420", origin="http://[::1]:8420"), True),
        (scope(host=OURS, origin=f"http://{OURS}", method="POST"), True),
        (scope("websocket", host=OURS, origin=f"http://{OURS}"), True),
        (scope(host=OURS, sec_fetch_site="same-origin"), True),
        (scope(host=OURS, sec_fetch_site="none", sec_fetch_mode="navigate"), True),
        (scope(host=OURS, sec_fetch_site="cross-site", sec_fetch_mode="navigate"), True),
        (scope(), False),
        (scope(host=""), False),
        (scope(host="evil.example:8420"), False),
        (scope(host="127.0.0.1.evil.example"), False),
        (scope(host="localhost:8420@evil.example"), False),
        (scope(host="127.0.0.1:evil"), False),
        (scope(host="192.168.0.7:8420"), False),
        (scope(host=OURS, origin="http://evil.example"), False),
        (scope(host=OURS, origin="null"), False),
        (scope(host=OURS, origin=f"https://{OURS}"), False),
        (scope(host=OURS, origin="http://127.0.0.1:3000"), False),
        (scope(host=OURS, origin="http://localhost:8420"), False),
        (scope(host="evil.example", origin="http://evil.example"), False),
        (scope("websocket", host=OURS), False),
        (scope("websocket", host=OURS, origin="http://evil.example"), False),
        (scope("websocket", host="evil.example", origin="http://evil.example"), False),
        (scope(host=OURS, sec_fetch_site="cross-site", sec_fetch_mode="no-cors"), False),
        (scope(host=OURS, sec_fetch_site="same-site", sec_fetch_mode="cors"), False),
        (scope(host=OURS, sec_fetch_site="cross-site", sec_fetch_mode="navigate", path="/_nicegui_ws/x"), False),
        (scope(host=OURS, sec_fetch_site="cross-site", sec_fetch_mode="navigate", method="POST"), False),
    ],
)  # fmt: skip
def test_only_the_theatres_own_pages_are_let_in(given_scope, allowed):
    assert bool(refusal(given_scope)) is not allowed


def test_two_hosts_or_origins_are_refused():
    for name in (b"host", b"origin"):
        twice = scope(host=OURS, origin=f"http://{OURS}")
        twice["headers"].append((name, dict(twice["headers"])[name]))
        assert refusal(twice)


def test_the_guard_passes_on_marks_and_refuses():
    seen, sent = [], []

    async def inner(given_scope: Any, receive: Any, send: Any) -> None:
        seen.append(given_scope["type"])
        if given_scope["type"] == "http":
            headers = [(b"x-frame-options", b"ALLOWALL"), (b"etag", b"1")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(message: Any) -> None:
        sent.append(message)

    own = scope(host=OURS, cookie="a=1; resid-surgery-8420=secret")
    for one in (own, scope(host="evil"), scope("websocket", host="evil"), {"type": "lifespan"}):
        asyncio.run(Guard(inner, "secret")(one, None, send))
    assert seen == ["http", "lifespan"]
    told = dict(sent[0]["headers"])
    assert {name.lower().encode(): value.encode() for name, value in HEADERS.items()}.items() <= told.items()
    assert told[b"etag"] == b"1"
    assert sent[1]["status"] == 403
    assert sent[-1] == {"type": "websocket.close", "code": 1008}


@pytest.mark.parametrize(
    ("given_scope", "query", "status"),
    [
        (scope(host=OURS), b"key=secret", 303),
        (scope(host=OURS, cookie="resid-surgery-8420=secret"), b"", 200),
        (scope("websocket", host=OURS, origin=f"http://{OURS}", cookie="resid-surgery-8420=secret"), b"", "open"),
        (scope(host=OURS), b"", 403),
        (scope(host=OURS), b"key=Secret", 403),
        (scope(host=OURS), b"key=&key=secret", 303),
        (scope(host=OURS), b"key=%ff", 403),
        (scope(host=OURS, path="/_nicegui/x"), b"key=secret", 403),
        (scope(host=OURS, cookie="resid-surgery-8421=secret"), b"", 403),
        (scope(host=OURS, cookie="resid-surgery-8420=secre"), b"", 403),
        (scope(host=OURS, cookie="resid-surgery-8420=\"\\303\""), b"", 403),
        (scope(host=OURS, cookie="=;;,resid-surgery-8420"), b"", 403),
        (scope("websocket", host=OURS, origin=f"http://{OURS}"), b"key=secret", "closed"),
        (scope(host="evil.example", cookie="resid-surgery-8420=secret"), b"key=secret", 403),
    ],
)  # fmt: skip
def test_only_who_has_the_key_of_the_launch_is_let_in(given_scope, query, status):
    sent: list[Any] = []

    async def inner(given: Any, receive: Any, send: Any) -> None:
        opened = {"type": "http.response.start", "status": 200, "headers": []}
        await send(opened if given["type"] == "http" else {"type": "websocket.accept"})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(inner, "secret")(given_scope | {"query_string": query}, None, send))
    kinds = {"websocket.accept": "open", "websocket.close": "closed"}
    assert (kinds.get(sent[0]["type"]) or sent[0]["status"]) == status
    if status == 303:
        told = dict(sent[0]["headers"])
        assert told[b"location"] == b"/"
        assert told[b"set-cookie"] == b"resid-surgery-8420=secret; Path=/; HttpOnly; SameSite=Strict"
        assert told[b"x-frame-options"] == b"DENY"
    if status == 403:
        assert b"refused: " in sent[1]["body"]
        assert not any(b"secret" in repr(one).encode() for one in sent)


def test_every_launch_has_another_key():
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) >= 20


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.0.7", "evil.example", "::", "127.0.0.2", None])
def test_no_other_host_is_bound(host):
    with pytest.raises(ArgumentError, match="`host` must be one of"):
        loopback(host)
    with pytest.raises(ArgumentError, match="`host` must be one of"):
        bound(host, 0)


def test_a_port_is_bound_once():
    with bound("127.0.0.1", 0) as held:
        assert held.getsockname()[0] in LOOPBACK
        with pytest.raises(ArgumentError, match=r"`port` must be free .*Choose another"):
            bound("127.0.0.1", held.getsockname()[1])


def test_a_model_to_which_one_cannot_type_is_refused():
    with pytest.raises(ArgumentError, match="with a tokenizer"):
        theatre(tiny.shared("llama"), "rs.load('m')")


def test_what_is_not_there_or_comes_too_late_is_said(model):
    with pytest.raises(ArgumentError, match="before a model is opened"):
        theatre(model, "rs.load('m')")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "`host` must be one of"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
        (["--port", "99999"], "65535"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said):
    code = "from resid_surgery.cli import serving; from resid_surgery.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", "--no-open", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from resid_surgery.views import theatre_server

    monkeypatch.setattr(theatre_server, "find_spec", lambda name: None)
    monkeypatch.setattr(theatre_server, "_ready", [])
    with pytest.raises(ArgumentError, match=r"pip install 'resid-surgery\[theatre\]'"):
        theatre_server.prepare()


# -- what the page is given


def test_rows_and_charts_are_plain_data(stage):
    found = play.found(stage, "neuron", 5)
    outcome = doing.measured(stage, OPERATIONS[0])
    given_data = [
        tables.stream_chart(stage, found), tables.found_rows(stage, found), tables.found_columns(stage),
        tables.distribution_rows(outcome), tables.split_rows(outcome),
        tables.source_rows(play.about(stage, doing.a_site(stage, "L2.N7")).sources),
    ]  # fmt: skip
    assert json.loads(json.dumps(given_data, allow_nan=False)) == given_data
    chart = given_data[0]
    lines = [one for one in chart["series"] if one["type"] == "line"]
    assert [one["name"] for one in lines] == [repr(" Paris"), repr(" London"), repr(HOSTILE)]
    steps = stage.stream[stage.stream["role"] == "target"]
    assert [one["value"][1] for one in lines[0]["data"]] == [round(value, 4) for value in steps["bs_value"]]
    across = [one["value"][0] for one in lines[0]["data"]]
    assert across == sorted(across)
    assert len(set(across)) == len(across)
    marks = chart["series"][-1]
    assert [one["name"] for one in marks["data"]] == found["site"].tolist()
    spots = {(tuple(one["value"]), tuple(one["symbolOffset"])) for one in marks["data"]}
    assert len(spots) == len(found), "marks hide each other"
    for one in lines:
        drawn = dict(zip(across, (point["value"][1] for point in one["data"]), strict=True))
        if one is lines[0]:
            assert all(drawn[point["value"][0]] == point["value"][1] for point in marks["data"])


def test_rows_say_what_the_effect_says(stage):
    outcome = doing.measured(stage, OPERATIONS[1])
    table = outcome.effect.table
    for row, want in zip(tables.split_rows(outcome), table.to_dict("records"), strict=False):
        assert row["token"] == repr(want["token"])
        assert row["bs_change"] == tables.signed(want["bs_change"])
        assert row["rank"] == f"{want['rank_before']} → {want['rank_after']}"
    assert len(tables.split_rows(outcome)) == 3
    rows = tables.distribution_rows(outcome)
    assert rows[0]["change"] == pytest.approx(table["bs_change"][0])
    assert rows[0]["wide_after"] == pytest.approx(100 * table["prob_after"][0])
    assert tables.summary(outcome).startswith(f"{' Paris'!r}: p ")


@pytest.mark.real
def test_a_move_of_a_slider_is_answered_in_time_on_the_embedded_model(smollm2):
    found = play.read(smollm2, TEXT, " Paris", [" London", " Lyon"])
    took = []
    for i in range(6):
        begin = time.thread_time()  # of this thread: others use the machine as well
        outcome = doing.measured(found, [rs.Scale("L27.N846", i / 10)])
        tables.distribution_rows(outcome), tables.split_rows(outcome), tables.summary(outcome)
        took.append(time.thread_time() - begin)
    assert sorted(took)[1] < 0.5, took
