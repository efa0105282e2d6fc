"""Tracing: the only file that imports nnsight. One forward, with reads and writes in forward order.

A `Tap` names a place in the forward; `forward` sorts the taps that are wanted into the order in
which the model reaches them, and runs one nnsight trace over the model's shadow. Reads are returned
detached and cloned. A write is a function of the value found there and of the values read so far.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, final

import nnsight
import torch
from nnsight.tracing.tracer import dec, inc
from torch import Tensor

from resid_surgery.errors import ArgumentError, RunError, UnsupportedModelError
from resid_surgery.models.attention import AttentionCall, attention_call
from resid_surgery.models.envoys import Values, Write, envoy_at, place_of
from resid_surgery.models.freezing import FrozenNorm, freeze_norms
from resid_surgery.models.modes import GradKept
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.passes import Notes, Pass, explained, keeps_logits, refused
from resid_surgery.models.remoting import asked, hub_name, no_tokenizer, refuse_remote, shipping
from resid_surgery.models.taps import Tap

_trace_lock = threading.RLock()


@final
class Restored(GradKept):
    """`GradKept` that also ends what nnsight counts as begun traces of this thread, and forgets what they saved.

    nnsight does so itself, in Python, where Ctrl-C can come between; a trace after it would be taken for an inner one.
    """

    def __enter__(self) -> None:
        super().__enter__()
        self._inside = _inside_a_trace()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self._inside:
            _end_traces()


def _inside_a_trace() -> bool:
    """Whether nnsight takes this thread to be inside the body of a trace."""
    try:
        nnsight.save(None)
    except ValueError:
        return False
    return True


def unwrap(source: Any) -> tuple[Any, Any]:
    """(module, tokenizer) inside an nnsight model; anything else is passed through."""
    if isinstance(source, nnsight.Envoy):
        return source._module, getattr(source, "tokenizer", None)
    return source, None


def forward(
    model: OpenedModel,
    ids: Tensor,
    reads: Sequence[Tap],
    writes: Mapping[Tap, Write] | None = None,
    *,
    at: int | Sequence[int] | None = None,
    everywhere: Collection[Tap] = (),
    logits_at: Sequence[int] | None = None,
    given: Mapping[str, Any] | None = None,
    resume: tuple[int, Tensor] | None = None,
    notes: Notes | None = None,
) -> Values:
    """One forward of (row, position) `ids` with reads and writes.

    Args:
        model: the opened model; its shadow runs, so the user's module is not touched.
        ids: (row, position) token ids.
        reads: taps to return. Values at a tap with a write are those after the write.
        writes: tap -> function(value found, values read so far) -> value to leave. Values are (row,
            position, width) tensors, and `AttentionCall`s at ``attn_call``.
        at: if given, reads keep these positions only (keys and values keep all), and logits are
            computed for them alone where the model can.
        everywhere: reads that keep all positions all the same.
        logits_at: positions of logits, if other than `at`.
        given: more keywords for the model's forward: a cache, a mask, position ids.
        resume: (layer, (row, position, d_model)): blocks below that layer do not run; their output is this.
        notes: what writes note for after the run; it comes back filled where the forward runs elsewhere.

    Returns:
        Tap -> detached (row, position, width) tensor of its own storage (`AttentionCall` for
        ``attn_call``).

    Raises:
        UnsupportedModelError: the model's forward does not pass a tap.
        ResidSurgeryError: whatever a write raised.
    """
    kwargs: dict[str, Any] = {"use_cache": False, **(given or {})}
    kept = [at] if isinstance(at, int) else None if at is None else list(at)
    tail = kept if logits_at is None else list(logits_at)
    sliced = tail is not None and keeps_logits(model)
    if sliced:
        kwargs["logits_to_keep"] = torch.tensor(tail, device=ids.device)
    job = Pass.of(model, reads, writes or {}, rows=int(ids.shape[0]), kept=kept, everywhere=frozenset(everywhere),
                  ends=None if sliced else tail, resume=resume, notes=notes,
                  cache=kwargs.get("past_key_values"))  # fmt: skip
    with model.lock, _trace_lock, Restored(), torch.no_grad():
        place = asked()
        if place is not None:
            return _away(model, job, ids, kwargs, place)
        traced = _traced(model)
        job.places = model.cache["paths"]
        a, failed = model.anatomy, f"one traced forward of {model.name} failed"
        why = f" Its layout ({a.layout.family}, {a.matched}) does not describe its forward."
        with explained(job, UnsupportedModelError, failed, why), traced.trace(input_ids=ids, **kwargs):
            seen = nnsight.save(job.run(traced))
        return seen  # type: ignore[no-any-return]  # noqa: RET504


def _away(model: OpenedModel, job: Pass, ids: Tensor, kwargs: dict[str, Any], place: bool | str) -> Values:
    """`forward` where `place` says: what it needs is shipped; what it read and noted comes back as plain data."""
    if place is True and not nnsight.CONFIG.API.APIKEY:
        raise ArgumentError(
            "`remote` True needs a key of the National Deep Inference Fabric: set NDIF_API_KEY, or call "
            'nnsight.login(). Give the address of a server of your own instead, or remote="local" to rehearse.'
        )
    traced, failed = _remotable(model), f"a forward of {model.name} with remote={place!r} failed"
    with (
        shipping(model, traced._module),
        explained(job, RunError, failed),
        traced.trace(input_ids=ids, remote=place, **kwargs),
    ):
        report = nnsight.save(job.report(traced))
    return job.take(report)


def _remotable(model: OpenedModel) -> Any:
    """The model's tree on detached views of its parameters, as a model that has a name on the hub; what of this
    library a request needs travels by value."""
    key = _tensors_of(model)
    kept = model.cache.get("remotable")
    if kept is None or kept[0] != key:
        nnsight.register("resid_surgery")
        tree = model.detached_copy()
        placed = {} if hasattr(tree, "hf_device_map") else {"device": model.device}
        traced = nnsight.TransformersModel(tree, tokenizer=no_tokenizer(), task="text-generation", **placed)
        traced.repo_id = hub_name(model)
        kept = key, traced
        model.cache["remotable"] = kept
    return kept[1]


def gradients(model: OpenedModel, ids: Tensor, taps: Sequence[Tap], *, at: int, token: int) -> dict[Tap, Tensor]:
    """d log p(token at `at`) / d what stands at some taps, by one backward pass.

    Runs on a copy of the module tree whose parameters are detached views of the user's: no gradient is
    accumulated in them, and none is computed for them.

    Args:
        model: the opened model. ids: (1, position). taps: module outputs, in any order.
        at: the predicting position. token: whose log-probability.

    Returns:
        Tap -> (position, width) in the model's dtype.

    Raises:
        UnsupportedModelError: a part of the model cannot be differentiated, or does not lead to the logits.
    """
    refuse_remote(model, "a backward pass", "it runs on tensors of this process; choose scores without gradients")
    plan = sorted(set(taps), key=lambda tap: tap.when(model))
    with model.lock, _trace_lock, Restored(), torch.inference_mode(False), torch.enable_grad():
        traced, ids = _differentiable(model), ids.clone()
        places = [place_of(traced, model, tap) for tap in plan]
        start = place_of(traced, model, Tap("block_in", 0))[0]
        why = ": a part of it cannot be differentiated. Use another score."
        with refused(f"the backward pass of {model.name} failed", why):
            with traced.trace(input_ids=ids, use_cache=False):
                start.input = start.input.detach().requires_grad_().clone()
                held: list[Any] = []
                for place, field in places:
                    value = getattr(place, field)
                    held.append(value[0] if isinstance(value, tuple) else value)
                log_p = torch.log_softmax(traced.output.logits[0, at].to(model.work_dtype), -1)[token]
                found = nnsight.save([log_p, *held])
            grads = torch.autograd.grad(found[0], found[1:])  # nnsight's own would change `grad` for every thread
    return {tap: grad.reshape(ids.shape[1], -1) for tap, grad in zip(plan, grads, strict=True)}


def _differentiable(model: OpenedModel) -> Any:
    """The model's tree on detached views of its parameters, traced; made anew when they are others."""
    key = _tensors_of(model)
    kept = model.cache.get("differentiable")
    if kept is None or kept[0] != key:
        kept = key, nnsight.NNsight(model.detached_copy())
        model.cache["differentiable"] = kept
    return kept[1]


def pushed(
    model: OpenedModel, ids: Tensor, layer: int, push: Tensor, *, keep: Sequence[int], stream: Tensor | None = None
) -> Tensor:
    """Logits when something is added to what a layer's down-projection writes, with the graph that leads back to it.

    Args:
        model: the opened model, run as by `gradients`. ids: (row, position). layer: with a dense MLP.
        push: (row, position, d_model) or what broadcasts to it, added before a post-norm; what is differentiated.
        keep: positions of logits. stream: (row, position, d_model) before the layer; blocks below do not run.

    Returns:
        (row, kept, vocabulary) logits in the working dtype.

    Raises:
        UnsupportedModelError: the model's forward cannot be traced so.
    """
    refuse_remote(model, "a forward that is differentiated", "its graph stays in this process")
    kwargs = {"logits_to_keep": torch.tensor(keep, device=ids.device)} if keeps_logits(model) else {}
    with model.lock, _trace_lock, Restored(), torch.inference_mode(False), torch.enable_grad():
        traced, ids, start = _differentiable(model), ids.clone(), None if stream is None else stream.clone()
        skipped = range(0 if start is None or not resumable(model) else layer)
        below = [place_of(traced, model, Tap("block_out", i))[0] for i in skipped]
        place, field = place_of(traced, model, Tap("mlp_raw", layer))
        with refused(f"a forward of {model.name} failed", "."), traced.trace(ids, use_cache=False, **kwargs):
            for block in below:
                block.skip(start)
            value = getattr(place, field)
            setattr(place, field, value + push.to(value).expand(*ids.shape, -1).reshape(value.shape))
            found = nnsight.save([traced.output.logits])
        return (found[0] if kwargs else found[0][:, list(keep)]).to(model.work_dtype)  # type: ignore[no-any-return]


def projected(
    model: OpenedModel, layer: int, x: Tensor, ids: Tensor, *, frozen: bool = True, unit: bool = False
) -> tuple[AttentionCall, Tensor]:
    """What a layer's attention makes of inputs: its queries, keys and values, with the graph that leads to them.

    Nothing but this layer's attention runs, up to the point where weights meet values.

    Args:
        model: the opened model. layer: with attention. x: (row, position, d_model) what attention reads.
        ids: (row, position) token ids, for masks and the like.
        frozen: norms inside attention keep the scale that they have in row 0 (see `freezing`), so that queries,
            keys and values are affine in x. unit: their scale is 1 (weights alone).

    Returns:
        (call, x): x is the leaf that the call's tensors lead back to.

    Raises:
        UnsupportedModelError: its attention cannot be traced alone.
    """
    with model.lock, _trace_lock, Restored(), torch.inference_mode(False), torch.set_grad_enabled(frozen):
        traced, norms = _affine(model) if frozen else (_traced(model), {})
        for norm in norms.get(layer, ()):
            norm.parts, norm.unit = len(x), unit
        leaf = x.detach().clone().to(model.dtype).requires_grad_(frozen)
        found = _attention_alone(traced, model, Tap("attn_call", layer), leaf, ids)
        kind = model.block(layer).mix.partition(":")[0]
        return attention_call(kind, found, len(x), None, attached=frozen), leaf


def attended(model: OpenedModel, layer: int, x: Tensor, ids: Tensor) -> Tensor:
    """(row, position, head * d_head) W_O's input, as a layer's attention makes it of inputs (see `projected`)."""
    with model.lock, _trace_lock, Restored(), torch.no_grad():
        found = _attention_alone(_traced(model), model, Tap("attn_z", layer), x.to(model.dtype), ids)
        return found.detach().clone()  # type: ignore[no-any-return]


def _attention_alone(traced: Any, model: OpenedModel, tap: Tap, x: Tensor, ids: Tensor) -> Any:
    """What stands at a tap when a layer's attention reads x; blocks below are skipped where they give nothing but the
    stream, and what comes after is not run."""
    refuse_remote(model, f"attention of layer {tap.layer} alone", "its inputs and their graph are of this process")
    layer, nothing = tap.layer, torch.zeros_like(x, requires_grad=False)
    below = [place_of(traced, model, Tap("block_out", i))[0] for i in range(layer)] if resumable(model) else []
    read = place_of(traced, model, Tap("attn_read", layer))
    place, field = place_of(traced, model, tap)
    why = ", so what its queries, keys and values read cannot be split."
    what, ids = f"attention of layer {layer} of {model.name} cannot be run alone", ids.clone()
    with refused(what, why), traced.trace(input_ids=ids, use_cache=False) as tracer:
        for block in below:
            block.skip(nothing)
        setattr(*read, x)
        found = nnsight.save([getattr(place, field)])
        tracer.stop()
    return found[0]


def resumable(model: OpenedModel) -> bool:
    """Whether a forward can start at a block from a recorded stream: a block gives the stream and nothing else."""
    if "skippable" not in model.cache:
        with model.lock, _trace_lock, Restored(), torch.no_grad():
            traced = _traced(model)
            block = place_of(traced, model, Tap("block_out", 0))[0]
            with traced.trace(input_ids=model.probe_ids(), use_cache=False) as tracer:
                found = nnsight.save([block.output])
                tracer.stop()
        model.cache["skippable"] = isinstance(found[0], Tensor)
    return bool(model.cache["skippable"])


def _affine(model: OpenedModel) -> tuple[Any, dict[int, list[FrozenNorm]]]:
    """The model's tree on detached views of its parameters, with the norms inside attention frozen; traced."""
    key = _tensors_of(model)
    kept = model.cache.get("affine")
    if kept is None or kept[0] != key:
        tree = model.detached_copy()
        layers = [i for i in range(model.anatomy.n_layers) if model.block(i).attn_kind == "attention"]
        norms = {i: freeze_norms(tree.get_submodule(model.path(i, "attn"))) for i in layers}
        kept = key, (nnsight.NNsight(tree), norms)
        model.cache["affine"] = kept
    return kept[1]


def _tensors_of(model: OpenedModel) -> tuple[Any, ...]:
    """Changes when the module tree or any tensor in it is another."""
    return (model.weights.structure(), *(tensor.data_ptr() for tensor in model.weights.tensors()))


def routing(model: OpenedModel, layer: int, read: Tensor) -> tuple[Tensor, Tensor]:
    """(index, weight), each (n, k): how a mixture's router routes (n, d_model) states that its MLP would read."""
    with model.lock, _trace_lock, Restored(), torch.no_grad():
        traced, envoys = _mlp_alone(model, layer)
        with traced.trace(read[None].to(model.dtype)):
            called = nnsight.save(envoys["routed"].inputs)
    args, kwargs = called
    index, weight = [*args, *kwargs.values()][1:]
    return index.reshape(len(read), -1), weight.reshape(len(read), -1).to(read.dtype)


def mixing(model: OpenedModel, layer: int, read: Tensor) -> tuple[list[float], list[float]]:
    """(routed, shared): what multiplies the routed experts' sum and the shared expert's output, a state each.

    Measured by moving each of the two in a run of the MLP alone, so that neither needs to be other than
    zero and nothing that an intervention left in them counts.

    Args:
        model: the opened model. layer: a mixture of experts. read: (n, d_model) what its MLP reads.
    """
    row, n = model.block(layer), len(read)
    if row.mlp_with is not None:  # the outputs of two modules, added
        return [1.0] * n, [1.0] * n
    states = read.to(model.dtype).repeat(3, 1)
    with model.lock, _trace_lock, Restored(), torch.no_grad():
        traced, envoys = _mlp_alone(model, layer)
        order = sorted(envoys, key=lambda name: (name == "shared") != row.shared_first)
        with traced.trace(states[None]):
            moved: dict[str, Any] = {}
            for name in order:
                value = envoys[name].output
                step = 4 * value.abs().max() + (value.abs().max() == 0)
                left = value.clone()
                at = n if name == "routed" else 2 * n
                left.view(3 * n, -1)[at : at + n] += step
                envoys[name].output = left
                moved[name] = step
            moved["out"] = traced.output
            nnsight.save(moved)
    out = moved["out"]
    out = (out[0] if isinstance(out, tuple) else out).reshape(3, n, -1).double()
    near = torch.finfo(model.dtype).eps / 4 if model.dtype in (torch.bfloat16, torch.float16) else 1e-6
    found = {}
    for name, at in (("routed", 1), ("shared", 2)):
        step = float(moved.get(name, 1.0))
        factors = ((out[at] - out[0]).mean(-1) / step).tolist()
        found[name] = [1.0 if abs(factor - 1) <= near else factor for factor in factors]
    return found["routed"], found["shared"]


def _mlp_alone(model: OpenedModel, layer: int) -> tuple[Any, dict[str, Any]]:
    """A layer's mixture as a model of its own, and its routed and shared experts in it."""
    _traced(model)  # a new shadow forgets what stands on the old one
    kept = model.cache["mlps"]
    if layer not in kept:
        mlp, places = model.path(layer, "mlp"), {"routed": "experts"}
        if model.block(layer).shared_out is not None and model.block(layer).mlp_with is None:
            places["shared"] = "shared_out"
        traced = nnsight.NNsight(model.shadow.get_submodule(mlp))
        inside = {name: model.path(layer, part).removeprefix(mlp + ".") for name, part in places.items()}
        kept[layer] = traced, {name: envoy_at(traced, path) for name, path in inside.items()}
    return kept[layer]  # type: ignore[no-any-return]


def _traced(model: OpenedModel) -> Any:
    shadow = model.shadow
    model.prove()
    if "traced" not in model.cache:
        model.cache |= {"traced": nnsight.NNsight(shadow), "paths": {}, "mlps": {}}
    return model.cache["traced"]


def _end_traces() -> None:
    """Have nnsight take this thread to be outside of every trace, with nothing saved."""
    try:
        inc()
        dec()  # forgets what was saved
    finally:  # an interrupt comes but once
        while _inside_a_trace():
            dec()
