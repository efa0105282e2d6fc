"""Altering: a model under interventions, for plain forwards and generation; the base stays as it is.

Every forward of the altered model is one trace. What interventions leave at prompt positions stays in the cache
of keys and values, as it would in an altered model.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from resid_surgery._check import message
from resid_surgery.addresses import At, Edge, Slice, expand
from resid_surgery.errors import ArgumentError, InterventionError, PromptError
from resid_surgery.models.envoys import Values, Write
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind, token_text
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import Restored, forward
from resid_surgery.sites import Constant, Head, HeadSource, Sublayer
from resid_surgery.stream.recording import need_model
from resid_surgery.surgery.batches import Rows
from resid_surgery.surgery.conflicts import Operation
from resid_surgery.surgery.cutting import Cutting
from resid_surgery.surgery.engine import device_of
from resid_surgery.surgery.interventions import Intervention, as_interventions
from resid_surgery.surgery.reading import Known, fetch
from resid_surgery.surgery.resolving import Resolver, Scene
from resid_surgery.surgery.writing import Writing

MOVING = ("target", "all", "generated")


@contextmanager
def under(model: OpenedModel, interventions: Any) -> Iterator["Altered"]:
    """A model under interventions: ``with rs.under(model, ops) as altered: altered.generate("...")``.

    Positions mean, here: "target": every predicting position, the prompt's last and each generated one; "all": every
    position of the prompt and every generated one; "generated": the generated ones only; indices and token texts:
    the prompt's.

    Args:
        model: from `resid_surgery.load`. interventions: one, or a list; values from donors are read once.

    Yields:
        `Altered`, which works inside the block; the model itself stays usable and untouched.

    Raises:
        InterventionError, SiteError: no interventions, or sites that do not exist. Positions, and interventions
            that contradict each other there, are looked at with each prompt.
    """
    need_model(model)
    altered = Altered(model, as_interventions(interventions))
    try:
        yield altered
    finally:
        altered.closed = True


@final
class Altered:
    """A model under interventions; made by `resid_surgery.under`.

    Attributes:
        model: the base. interventions: what is done. closed: whether the block has been left.
    """

    def __init__(self, model: OpenedModel, interventions: tuple[Intervention, ...]) -> None:
        self.model, self.interventions, self.closed = model, interventions, False
        self._known: Known = {}
        self._made_of = model.known_fingerprint(), model.trees
        for one in interventions:
            bare = [site.site if isinstance(site, At) else site for site in one.sites]
            known = [site for site in bare if not (isinstance(site, Slice) and "<" in str(site))]  # else by the prompt
            for site in expand(known, model.anatomy, 0):
                site.resolve(model.anatomy)
            attends = [s for s in one.sites if isinstance(s, Edge) and s.side != "query" and _reads_back(s)]
            if attends and one.positions == "generated":
                raise InterventionError(
                    f"{one.brief}: keys and values of the prompt are read before anything is generated. Use positions "
                    "'target' or 'all', or the side 'query'."
                )

    def __repr__(self) -> str:
        return f"Altered({self.model.name} under {', '.join(one.brief for one in self.interventions)})"

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt under the interventions.

        Args:
            prompt: text, a `Prompt`, token ids, or a (row, position) tensor of them.
            options: of transformers' ``generate`` (max_new_tokens, do_sample, ...). Greedy unless they say otherwise.

        Returns:
            The continuation: text for text, else (row, position) token ids of what was generated.

        Raises:
            PromptError: the prompt cannot be used, or a position does not exist in it.
            InterventionError: an intervention cannot act; the handle was left.
        """
        ids, text = self._ids(prompt)
        self._require_room(ids, options)
        shell = self._shell()
        if not hasattr(shell, "generate"):
            raise ArgumentError(f"{self.model.name} has no `generate`; use altered.forward.")
        self._require_plain_steps(shell, options)
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
        if getattr(shell.generation_config, "pad_token_id", None) is None and "pad_token_id" not in options:
            options["pad_token_id"] = 0
        with self.model.lock, Restored(), torch.no_grad():
            out = shell.generate(ids, **options)
        sequences = out if isinstance(out, Tensor) else out.sequences
        new = sequences[:, ids.shape[1] :]
        if not text:
            return new if isinstance(out, Tensor) else out
        return str(self.model.tokenizer.decode(new[0], skip_special_tokens=True))

    def forward(self, prompt: Any, **keywords: Any) -> Any:
        """A plain forward of the model under the interventions: what its own forward returns.

        Args:
            prompt: as for `generate`. keywords: of the model's forward (a cache with ``past_key_values``, ...).
        """
        ids, _ = self._ids(prompt)
        return self._run(_Session(), ids, keywords)

    __call__ = forward

    def _require_room(self, ids: Tensor, options: dict[str, Any]) -> None:
        """Refuse to generate beyond the positions that the model has."""
        most, new = self.model.context, options.get("max_new_tokens")
        if most is not None and isinstance(new, int) and ids.shape[1] + new - 1 > most:
            raise PromptError(
                f"the prompt has {ids.shape[1]} tokens and max_new_tokens is {new}, but {self.model.name} reads at "
                f"most {most}. Give fewer."
            )

    def _require_plain_steps(self, shell: Any, options: dict[str, Any]) -> None:
        """Refuse ways of generating whose forwards are not the prompt and then one token each."""
        config = options.get("generation_config") or shell.generation_config
        asked = {name: options.get(name, getattr(config, name, None))
                 for name in ("use_cache", "prefill_chunk_size", "prompt_lookup_num_tokens", "num_beams")}  # fmt: skip
        wrong = [name for name in ("prefill_chunk_size", "prompt_lookup_num_tokens") if asked[name]]
        wrong += ["use_cache"] * (asked["use_cache"] is False) + ["assistant_model"] * ("assistant_model" in options)
        if wrong:
            raise ArgumentError(
                f"`{wrong[0]}` must be left as it is under interventions, whose positions are counted by forwards of "
                "the prompt and then of one token each."
            )
        if self._has_edges and asked["num_beams"] not in (None, 1):
            raise ArgumentError("`num_beams` must be 1 with edges, whose auxiliary rows beams would mix up.")

    @property
    def _has_edges(self) -> bool:
        return any(isinstance(site, Edge) for one in self.interventions for site in one.sites)

    def _ids(self, prompt: Any) -> tuple[Tensor, bool]:
        """((row, position) ids, whether it was text)."""
        if self.closed:
            raise InterventionError("this altered model was left: use it inside its `with rs.under(...)` block.")
        if isinstance(prompt, Tensor):
            ids = prompt if prompt.ndim == 2 else prompt[None]
            if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
                raise PromptError(message("prompt", "(row, position) token ids", f"shape {tuple(prompt.shape)}"))
            for row in ids.tolist():
                bind(Prompt(ids=row, target=0), None, self.model)
        elif isinstance(prompt, (str, Prompt)):
            given = prompt if isinstance(prompt, Prompt) else Prompt(prompt, target=0)
            ids = torch.tensor([bind(given, self.model.tokenizer, self.model).ids])
        else:
            ids = torch.tensor([bind(Prompt(ids=prompt, target=0), None, self.model).ids])
        return ids.to(device_of(self.model)), isinstance(prompt, str)

    def _shell(self) -> Any:
        """A copy of the shadow whose forward runs through a trace with the writes."""
        shadow, session = self.model.shadow, _Session()
        shell = copy.copy(shadow)
        shell.__dict__ = dict(shadow.__dict__)
        plain = type(shadow).forward

        @functools.wraps(plain)
        def traced(input_ids: Any = None, **keywords: Any) -> Any:
            return self._run(session, input_ids, keywords)

        traced.__signature__ = inspect.signature(functools.partial(plain, shadow))  # type: ignore[attr-defined]
        shell.__dict__["forward"] = traced
        return shell

    def _run(self, session: "_Session", ids: Tensor, keywords: dict[str, Any]) -> Any:
        """One forward: new tokens behind what the cache holds."""
        cache, rows = keywords.get("past_key_values"), len(ids)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if seen == 0:
            session.ids = ids
        elif session.ids is None:
            raise ArgumentError("`past_key_values` must be empty at first: an altered model makes its own cache.")
        else:
            session.ids = torch.cat([session.ids[:, :seen], ids], 1)
        grid = Rows(seen, ids.shape[1])
        writing = Writing(self.model, grid, ())
        named = seen == 0 or any(getattr(one, "align", None) is not None for one in self.interventions)
        ops = [self._ops(_bound(self.model, tuple(row.tolist()), named), grid) for row in session.ids]
        cutting = Cutting.of(writing, ops, session.aux)
        self._reserve(session, cutting, ops, rows)
        total = max(cutting.rows, rows + len(session.aux))
        for reader in cutting.readers:
            if isinstance(reader.site, Constant):
                writing.also(Tap("unembed_in"), self._unembed(cutting, reader, grid))
        order = list(range(rows)) + [key[0] for key in session.aux]  # an auxiliary row is a copy of its own row
        if total > rows:
            more = [name for name in ("labels", "output_hidden_states", "output_attentions")
                    if keywords.get(name) is not None and keywords[name] is not False]  # fmt: skip
            more += ["return_dict"] * (keywords.get("return_dict") is False)
            if more:
                raise ArgumentError(f"`{more[0]}` does not go with edges, which run rows beside the prompt's.")
            spread = {
                name
                for name, value in keywords.items()
                if isinstance(value, Tensor) and value.ndim and len(value) == rows
            }
            keywords = {name: value[order] if name in spread else value for name, value in keywords.items()}
        reads = [Tap("output"), *writing.everywhere]
        given = {"use_cache": cache is not None} | keywords
        values = forward(self.model, ids[order], reads, writing.writes(), given=given, notes=writing)
        output = values[Tap("output")]
        for tap, placed in writing.placed.items():
            if tap.name != "attn_call" and tap not in writing.left:
                raise InterventionError(f"{placed[0][1].origin.brief} did not take effect.")
        if total > rows:
            output["logits"] = output["logits"][:rows]
        if cache is not None:
            self._keep(writing, cache)
        return output

    def _keep(self, writing: Writing, cache: Any) -> None:
        """Keys and values that were operated on go on in the cache, which took them in before."""
        for layer, call in writing.calls.items():
            held = cache.layers[layer]
            if call.key is None or held.keys.shape != call.key.shape or held.values.shape != call.value.shape:
                raise InterventionError(
                    f"keys and values of layer {layer} of {self.model.name} cannot be kept: its cache holds them in "
                    "another form."
                )
            held.keys, held.values = call.key, call.value

    def _reserve(self, session: "_Session", cutting: Cutting, ops: list[tuple[Operation, ...]], rows: int) -> None:
        """All auxiliary rows must be there from the first forward on, as the cache is theirs too."""
        if session.rows is None:
            session.rows = rows + len(session.aux)
        elif rows + len(session.aux) > session.rows:
            raise InterventionError(
                "edges that begin to act after the prompt have no auxiliary rows in the cache. Use positions 'target' "
                "or 'all'."
            )

    def _unembed(self, cutting: Cutting, reader: Any, grid: Rows) -> Write:
        scale = self.model.anatomy.layout.logit_scale

        def write(value: Tensor, seen: Values) -> Tensor:
            for target in reader.targets:
                at = value.shape[1] - (grid.keys - target)  # the last positions may be all there are
                if at >= 0:
                    value[reader.row, at] += (cutting.moved(reader, target, seen) / scale).to(value)
            return value

        return write

    def _ops(self, prompt: BoundPrompt, grid: Rows) -> tuple[Operation, ...]:
        """The operations of one forward, of positions from grid.first on."""
        here = tuple(range(grid.first, grid.keys))
        placed: list[Intervention] = []
        origin: dict[int, Intervention] = {}
        for one in self.interventions:
            if isinstance(one.positions, str) and one.positions in MOVING:
                first = grid.first == 0
                if one.positions == "generated" and first:
                    continue
                at = here[-1:] if one.positions == "target" else here
            elif grid.first:
                continue
            else:
                at = prompt.positions(one.positions)
            sites = tuple(site for site in one.sites if not (grid.first and isinstance(site, At)))
            if not sites:
                continue
            moved = copy.copy(one)
            object.__setattr__(moved, "sites", sites)
            object.__setattr__(moved, "positions", "all" if at == here and grid.first == 0 else at)
            placed.append(moved)
            origin[id(moved)] = one
        if not placed:
            return ()
        self.model.shadow  # noqa: B018  (made anew if need be, and counted)
        now = self.model.fingerprint() if self._known else self.model.known_fingerprint(), self.model.trees
        if now != self._made_of:
            self._known.clear()  # values of donors are of other weights, modules, hooks or settings
            self._made_of = now
        resolver = Resolver(Scene(self.model, prompt))
        ops = resolver.resolve(placed)
        for op in ops:
            op.origin = origin[id(op.origin)]
        fetch(self.model, resolver.wants, self._known)
        return ops


@final
class _Session:
    """What the forwards of one generation share: the tokens so far and the auxiliary rows."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.aux: dict[Any, int] = {}
        self.rows: int | None = None


def _reads_back(edge: Edge) -> bool:
    reader = edge.reader
    return isinstance(reader, (Head, HeadSource)) or (isinstance(reader, Sublayer) and reader.part == "attn")


def _bound(model: OpenedModel, ids: tuple[int, ...], named: bool) -> BoundPrompt:
    """Tokens so far as a bound prompt; token texts are looked up where positions may be named by them."""
    tokens = tuple(token_text(i, model.tokenizer) for i in ids) if named else tuple("" for _ in ids)
    return BoundPrompt(ids, tokens, len(ids) - 1, 0, (), {}, Prompt(ids=ids, target=0))
