"""Built-in facts as prompts, filtered on request by what a model knows."""

import torch

from resid_surgery._check import whole
from resid_surgery.models.facts import Fact, load_facts
from resid_surgery.models.opening import OpenedModel
from resid_surgery.models.prompts import BoundPrompt, Prompt, bind
from resid_surgery.models.taps import Tap
from resid_surgery.models.tracing import forward
from resid_surgery.stream.recording import need_model

ROWS = 32


def facts(kind: str, *, model: OpenedModel | None = None, top: int = 10) -> list[Prompt]:
    """Built-in facts of one type as prompts, each with same-type competitors.

    Args:
        kind: "language", "capital", "country", "colour", "number" or "month" (the paper's six).
        model: if given, only what it knows is returned: the right token is among its `top` and
            above every other answer of the type; facts whose answer or competitors are not single
            tokens in it are left out.
        top: how far down the right token may stand.

    Returns:
        Prompts in the order of the data.

    Raises:
        PromptError: unknown kind. ArgumentError: not an opened model, `top` out of range.

    Example:
        >>> facts("capital")[0].target.startswith(" ")
        True

    Source: the six knowledge types of Yu & Ananiadou, arXiv 2312.12141; prompts self-written.
    """
    found = load_facts(kind)
    top = whole("top", top, 1)
    if model is None:
        return [_prompt(fact) for fact in found]
    need_model(model)
    if model.tokenizer is None:
        # the same error that binding any text prompt gives
        bind(_prompt(found[0]), None, model)
    usable = [(_prompt(f), f) for f in found if all(_single(model, t) for t in (f.answer, *f.competitors))]
    bound = [(prompt, bind(prompt, model.tokenizer, model)) for prompt, _ in usable]
    answers = torch.tensor(sorted({b.target for _, b in bound}))
    known = _known(model, [b for _, b in bound], answers, top)
    return [prompt for (prompt, _), keep in zip(bound, known, strict=True) if keep]


def _prompt(fact: Fact) -> Prompt:
    return Prompt(fact.prompt, target=fact.answer, versus=fact.competitors)


def _single(model: OpenedModel, token: str) -> bool:
    return len(model.tokenizer.encode(token, add_special_tokens=False)) == 1


def _known(model: OpenedModel, bound: list[BoundPrompt], answers: torch.Tensor, top: int) -> list[bool]:
    """Batches of equal length, so that no prompt is padded into another's positions."""
    device = model.shadow.get_input_embeddings().weight.device  # type: ignore[operator]
    by_length: dict[int, list[int]] = {}
    for i, one in enumerate(bound):
        by_length.setdefault(len(one.ids), []).append(i)
    known = [False] * len(bound)
    for length, members in by_length.items():
        for low in range(0, len(members), ROWS):
            chunk = members[low : low + ROWS]
            ids = torch.tensor([bound[i].ids for i in chunk], device=device)
            logits = forward(model, ids, [Tap("logits")], at=length - 1)[Tap("logits")][:, 0].cpu()
            for row, i in enumerate(chunk):
                value = logits[row, bound[i].target]
                others = answers[answers != bound[i].target]
                rank = 1 + int((logits[row] > value).sum())
                known[i] = rank <= top and bool((logits[row, others] < value).all())
    return known
