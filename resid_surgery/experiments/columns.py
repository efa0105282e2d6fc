"""Columns: what the tables of every run have, with their types; labels and axes are called otherwise."""

import pyarrow as pa

TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()
ABOUT = {"prompt": WHOLE, "text": TEXT, "target": TEXT}
SPOT = {"operation": TEXT, "site": TEXT, "kind": TEXT, "layer": WHOLE, "head": WHOLE, "index": WHOLE, "source": WHOLE,
        "expert": WHOLE, "position": WHOLE, "token": TEXT, "size": WHOLE}  # fmt: skip
MEASURED = {
    "bs": {"direct": REAL, "frame": TEXT},
    "log_prob": {"log_prob": REAL, "log_prob_change": REAL, "prob": REAL, "kl": REAL, "direct": REAL, "frame": TEXT},
    "all": {"log_prob": REAL, "log_prob_change": REAL, "prob": REAL, "kl": REAL, "rank": WHOLE, "top": TEXT,
            "entropy": REAL, "direct": REAL, "frame": TEXT},
    "effect": {"log_prob": REAL, "log_prob_change": REAL, "prob": REAL, "kl": REAL, "rank": WHOLE, "top": TEXT,
               "entropy": REAL, "direct": REAL, "post_norm": REAL, "norm_scale": REAL, "indirect": REAL},
}  # fmt: skip
LOCATED = {"set": TEXT, "rank": WHOLE, "site": TEXT, "kind": TEXT, "layer": WHOLE, "score_name": TEXT, "value": REAL,
           "bs_target": REAL, "evaluations": WHOLE, "candidates": WHOLE, "proof": TEXT, "norm": TEXT,
           "position": WHOLE}  # fmt: skip
EFFECTS = {"row": WHOLE, "token": TEXT, "token_id": WHOLE, "role": TEXT, "bs_before": REAL, "bs_after": REAL,
           "bs_change": REAL, "direct": REAL, "post_norm": REAL, "norm_scale": REAL, "indirect": REAL, "closure": REAL,
           "bs_change_centred": REAL, "direct_centred": REAL, "post_norm_centred": REAL, "norm_scale_centred": REAL,
           "indirect_centred": REAL, "log_prob_before": REAL, "log_prob_after": REAL, "log_prob_change": REAL,
           "prob_before": REAL, "prob_after": REAL, "rank_before": WHOLE, "rank_after": WHOLE}  # fmt: skip
CLEAN = {"n_tokens": WHOLE, "position": WHOLE, "status": TEXT, "rows": WHOLE, "bs_target": REAL, "log_prob": REAL,
         "prob": REAL, "rank": WHOLE, "entropy": REAL, "top": TEXT}  # fmt: skip
FAILURES = {"stage": TEXT, "error": TEXT, "message": TEXT, "traceback": TEXT}
TAKEN = {name for some in (ABOUT, SPOT, *MEASURED.values(), LOCATED, EFFECTS, CLEAN, FAILURES) for name in some}
TAKEN |= {"row", "arm", "versus", "ids", "donors"}


def free(name: str) -> bool:
    """Whether a label or an axis may be called so."""
    return name not in TAKEN and not name.startswith("bs_")
