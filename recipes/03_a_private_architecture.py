# %% [markdown]
# # A private architecture
# A model that is wired like a decoder is read by what flows where, whatever its parts are called. Only
# attention that is written out by hand needs a row: where the parts are, and which operation of its
# source multiplies weights with values. The row passes the same proof as everything else.

# %%
from functools import reduce
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import resid_surgery as rs


# %%
class Config(PreTrainedConfig):
    model_type = "private"
    hidden_size, vocab_size = 12, 31


class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three, self.back = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.three(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-1, -2)) / 6**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = torch.matmul(scores.masked_fill(later, -torch.inf).softmax(-1), v)
        return self.back(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.look, self.second = nn.LayerNorm(12), Look(), nn.LayerNorm(12)
        self.wide, self.kink, self.narrow = nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.7 * self.look(self.first(x))
        return x + self.narrow(self.kink(self.wide(self.second(x))))


class Private(PreTrainedModel):
    config_class, _input_embed_layer = Config, "words"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.words, self.pile = nn.Embedding(31, 12), nn.ModuleList([Layer(), Layer()])
        self.finish, self.say = nn.LayerNorm(12), nn.Linear(12, 31, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        x = reduce(lambda state, layer: layer(state), self.pile, self.words(input_ids))
        return CausalLMOutput(logits=self.say(self.finish(x)))


# %% The row: module paths, the factor 0.7, and torch.matmul's second call as the place of mixing.
BLOCK = rs.BlockLayout(
    attn="look", attn_out="look.back", attn_norm="first", attn_scale=0.7, mix="product:torch_matmul_1",
    mlp="", mlp_out="narrow", mlp_norm="second", keys=("wide",), activation="kink",
)  # fmt: skip
ROW = rs.Layout(blocks="pile", final_norm="finish", unembed="say", block=BLOCK, family="private")


# %%
def main(model: Any = None) -> dict[str, pd.DataFrame]:
    """Load it with its row, check every line, and use it (or another model, without its row)."""
    model = rs.load(Private(Config()).eval(), anatomy=ROW) if model is None else model
    rec = rs.record(model, rs.Prompt(ids=[1, 2, 3, 4], target=5))
    return {
        "check": rs.check(model),
        "ledger": rs.decompose(rec),
        "pairs": rs.locate(rec, kind="head_source", k=5).table,
    }


if __name__ == "__main__":
    for title, table in main().items():
        print(f"\n== {title}\n{table.to_string(index=False)}")
