"""A two-layer model with hand-set weights that does induction: what each head does is known.

The stream holds three parts: the token (one-hot), the position (one-hot), and room for the previous token.

    L0.H0  previous token: from position p to p - 1; copies that token into the room
    L0.H1  duplicates: from a token to the same token
    L1.H0  induction: from a token to where the room holds it; copies the token there
    L1.H1  sink: from everywhere to position 0
"""

from typing import Any

import torch

import resid_surgery as rs

VOCAB, PLACES, HEAD = 24, 32, 40
TOKEN, PLACE, ROOM = 0, VOCAB, VOCAB + PLACES
WIDTH = 2 * HEAD
SHARP = 40.0


def induction_model(offset: int | None = None) -> Any:
    """The model, loaded; with `offset`, L1.H0 looks that many positions back instead."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=PLACES, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=4,
                        bos_token_id=0, eos_token_id=0, attn_implementation="eager")  # fmt: skip
    module = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        module.transformer.wte.weight[:, TOKEN : TOKEN + VOCAB] = torch.eye(VOCAB)
        module.transformer.wpe.weight[:, PLACE : PLACE + PLACES] = torch.eye(PLACES)
        first, second = (block.attn for block in module.transformer.h)
        looks(first, 0, {PLACE + p: PLACE + max(p - 1, 0) for p in range(PLACES)})
        moves(first, 0, {TOKEN + a: ROOM + a for a in range(VOCAB)})
        looks(first, 1, {TOKEN + a: TOKEN + a for a in range(VOCAB)})
        looks(second, 0, {TOKEN + a: ROOM + a for a in range(VOCAB)})
        if offset is not None:
            looks(second, 0, {PLACE + p: PLACE + max(p - offset, 0) for p in range(PLACES)})
        moves(second, 0, {TOKEN + a: TOKEN + a for a in range(VOCAB)})
        second.c_attn.bias[HEAD] = SHARP  # one query, whatever is read
        second.c_attn.weight[PLACE, WIDTH + HEAD] = SHARP
    return rs.load(module)


def looks(attn: Any, head: int, to: dict[int, int]) -> None:
    """A query coordinate of the stream matches a key coordinate."""
    weight, low = attn.c_attn.weight, head * HEAD
    weight[:, low : low + HEAD] = 0
    weight[:, WIDTH + low : WIDTH + low + HEAD] = 0
    keys = {key: i for i, key in enumerate(dict.fromkeys(to.values()))}
    for query, key in to.items():
        weight[query, low + keys[key]] = SHARP
        weight[key, WIDTH + low + keys[key]] = SHARP


def moves(attn: Any, head: int, to: dict[int, int]) -> None:
    """A coordinate of the stream at the source is written into another."""
    low = head * HEAD
    for i, (read, written) in enumerate(to.items()):
        attn.c_attn.weight[read, 2 * WIDTH + low + i] = 1.0
        attn.c_proj.weight[low + i, written] = 1.0
