# %% [markdown]
# # Ablate, and watch the model compensate
# Zero the best neurons of a prediction. The target's logit falls by less than they wrote, because later layers read a
# stream that lacks them, and write something else.
# 1. The split: direct (what was removed) + post-norm + norm scale + indirect (what the others did) = measured change.
# 2. The ledger of the change: whose attention and MLP, in later layers, gave back, and whose went along.
# 3. Does the compensation depend on who was removed? The same for as many neurons of the same layers at random.
# 4. Together against one by one: compensation is not additive.

# %%
import random
from collections import Counter
from typing import Any

import pandas as pd

import resid_surgery as rs


# %%
def main(
    model: Any = None,
    text: str = "The capital of France is",
    target: str = " Paris",
    versus: tuple[str, ...] = (" London", " Lyon"),
    k: int = 10,
    seed: int = 0,
    out: str = "out/compensation",
) -> dict[str, pd.DataFrame]:
    """The split, the ledger and who compensated, saved with the waterfall."""
    model = rs.load("smollm2-135m") if model is None else model
    rec = rs.record(model, rs.Prompt(text, target=target, versus=versus))
    best = rs.locate(rec, k=k).sites
    control, draw = [], random.Random(seed)
    for layer, count in Counter(one.layer for one in best).items():
        others = [
            rs.Neuron(layer, index) for index in range(model.anatomy.d_mlp) if rs.Neuron(layer, index) not in best
        ]
        control += draw.sample(others, count)

    # %% Both sets as rows of one forward; columns *_centred leave out what all tokens share.
    sets = {"located": best, "random": control}
    effects = dict(zip(sets, rs.intervene_each(rec, [rs.Zero(sites) for sites in sets.values()]), strict=True))
    split = pd.concat([effect.table.assign(set=name) for name, effect in effects.items()], ignore_index=True)

    # %% Who gave back: addends that were not operated on and moved against the removal.
    ledger = effects["located"].ledger()
    removed = float(ledger["direct"].sum())
    others = ledger.assign(gave_back=-ledger["indirect"] / removed if removed else 0.0)
    compensated = others.loc[others["indirect"].abs().nlargest(k).index]
    shares = compensated[["site", "kind", "layer", "bs_before", "bs_after", "indirect", "gave_back"]]

    # %% The same neurons one at a time: the sum of single effects against the joint one.
    together = rs.additivity(rec, rs.Zero(best))
    tables = {
        "split": split,
        "compensated": shares.sort_values("gave_back", ascending=False, ignore_index=True),
        "ledger": ledger,
        "together": together,
    }
    rs.save_results(out, tables, {"waterfall": rs.plot_ledger(ledger)})
    return tables


# %%
if __name__ == "__main__":
    for name, table in main().items():
        print(f"\n{name}\n{table.head(14).to_string(index=False)}")
