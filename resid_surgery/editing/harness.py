"""Harness: tasks of EleutherAI's lm-evaluation-harness on the base and on the really edited weights, same settings.

Both models run as copies of the module tree on the opened models' own tensors, so that whatever the harness does to a
module (evaluation mode, tying weights, pad tokens) touches neither the user's module nor its tokenizer; afterwards
both copies are required to hold the very weights that they were made of.
"""

import copy
import importlib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from resid_surgery._check import finite, message, whole
from resid_surgery._check import path as as_path
from resid_surgery._check import seed as as_seed
from resid_surgery.editing.auditing import need_weights_edit
from resid_surgery.editing.edits import Edit
from resid_surgery.errors import ArgumentError, InterventionError
from resid_surgery.models.fingerprint import Weights
from resid_surgery.models.opening import OpenedModel

EXTRA = "lm-eval"
COLUMNS = ("task", "metric", "base", "base_stderr", "edited", "edited_stderr", "change", "n")
OURS = ("model", "model_args", "tasks", "device", "log_samples", "random_seed", "numpy_random_seed",
        "torch_random_seed", "fewshot_random_seed", "task_manager")  # fmt: skip


def run_lm_eval(
    model: OpenedModel,
    edit: Edit,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Benchmark figures before and after an edit, by lm-evaluation-harness (extra "lm-eval").

    Args:
        model: the base, with a tokenizer. edit: changes of weights; the edited copy is what is evaluated.
        tasks: names of tasks or groups. limit: documents a task (below 1: a share). num_fewshot: examples in front.
        include_path: folder with task files (YAML) of one's own; most others need their data sets from the hub.
        batch_size: sequences a forward. seed: of every random choice, the same for both models.
        options: of ``lm_eval.simple_evaluate`` (bootstrap_iters, apply_chat_template, ...).

    Returns:
        One row a task and metric: task, metric (with its filter where that is not "none"), base, base_stderr, edited,
        edited_stderr (the harness's own), change (edited - base), n (documents).

    Raises:
        ArgumentError: the extra is not installed, an unknown task, no tokenizer, an edit without weights, or an option
            that is set here.
        InterventionError: the harness changed the weights that it was given.

    Source: https://github.com/EleutherAI/lm-evaluation-harness
    """
    need_weights_edit(model, edit)
    settings = _settings(model, edit, limit, num_fewshot, batch_size, seed, options)
    names = _names(tasks)
    with _as_it_was():
        settings |= {"tasks": names, "task_manager": _manager(include_path, names), "batch_size": batch_size}
        base = _evaluated(model, settings)
        with edit.applied(model) as edited:
            after = _evaluated(edited, settings)
    return _table(base, after)


def _settings(
    model: OpenedModel, edit: Edit, limit: Any, num_fewshot: Any, batch_size: Any, seed: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Keywords of ``simple_evaluate``, checked."""
    if edit.interventions:
        raise ArgumentError(f"`edit` must be baked into weights for lm-eval; {edit!r} works by interventions.")
    if model.tokenizer is None:
        raise ArgumentError(f"`model` must have a tokenizer for lm-eval; {model.name} was opened without one.")
    wrong = sorted(set(options) & set(OURS))
    if wrong:
        raise ArgumentError(f"`{wrong[0]}` must be left out: run_lm_eval sets it, the same for both models.")
    batch_size = whole("batch_size", batch_size, 1)
    seed = as_seed(seed)
    if limit is not None and finite("limit", limit) <= 0:
        raise ArgumentError(message("limit", "a number of documents (below 1: a share of them)", limit))
    few = {} if num_fewshot is None else {"num_fewshot": whole("num_fewshot", num_fewshot, 0)}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    return {"limit": limit, "log_samples": False, **few, **seeds, **options}


def _names(tasks: Any) -> list[str]:
    listed = [] if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Sequence) else list(tasks)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ArgumentError(message("tasks", "a list of names of lm-eval tasks", tasks))
    return listed


def _lm_eval(part: str) -> Any:
    """A module of lm-eval, imported only when it is asked for."""
    try:
        return importlib.import_module(f"lm_eval{part}")
    except ImportError as error:
        raise ArgumentError(
            f"`run_lm_eval` must have lm-evaluation-harness: {error}. Install it with "
            f'pip install "resid-surgery[{EXTRA}]".'
        ) from error


def _manager(include_path: Any, names: Sequence[str]) -> Any:
    """What finds the tasks; lm-eval's own thousands are read (for some seconds) only where they are needed.

    Raises:
        ArgumentError: no such folder, or no such task.
    """
    if include_path is not None and not as_path("include_path", include_path, "a folder with task files").is_dir():
        raise ArgumentError(message("include_path", "a folder with task files", include_path))
    made = _lm_eval(".tasks").TaskManager
    if include_path is not None:
        own = made(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = made(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ArgumentError(
            f"`tasks` must name tasks of lm-eval or of `include_path`; {', '.join(unknown)} "
            f"{'is' if len(unknown) == 1 else 'are'} not among {len(manager.all_tasks):,}."
        )
    return manager


def _evaluated(model: OpenedModel, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Results of one model: a copy of its tree, on its own tensors, with a copy of its tokenizer."""
    module = model.detached_copy()
    config: Any = module.config
    if not _tied(module):
        config.tie_word_embeddings = False  # the harness ties weights again, which would undo an edit of one of them
    before = Weights(module).fingerprint()
    language_model = _lm_eval(".models.huggingface").HFLM(
        pretrained=module, tokenizer=copy.deepcopy(model.tokenizer), batch_size=settings["batch_size"]
    )
    found: Mapping[str, Any] = _lm_eval("").simple_evaluate(model=language_model, **settings)
    if Weights(module).fingerprint() != before or before != model.fingerprint():
        raise InterventionError(
            f"the weights of {model.name} that lm-eval ran on are not those that it was given: it changed or tied them."
        )
    return found


def _tied(module: Any) -> bool:
    """Whether embedding and unembedding are one tensor."""
    out = module.get_output_embeddings()
    return out is not None and out.weight is module.get_input_embeddings().weight


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Random states, determinism, logging levels and handlers and the environment as they were before."""
    states = random.getstate(), np.random.get_state()
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    environment = dict(os.environ)
    loggers = [(one, one.level, list(one.handlers)) for one in _loggers()]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        for one, level, handlers in loggers:
            one.setLevel(level)
            one.handlers[:] = handlers


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]


def _table(base: Mapping[str, Any], edited: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for task, figures in base["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or not kind or metric.endswith("_stderr"):
                continue
            after = edited["results"][task]
            error = f"{metric}_stderr,{kind}"
            rows.append((task, metric if kind == "none" else f"{metric} ({kind})", float(value),
                         _number(figures.get(error)), float(after[key]), _number(after.get(error)),
                         float(after[key]) - float(value), _documents(base, task)))  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _number(value: Any) -> float:
    """A standard error; NaN where the harness gives none ("N/A")."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _documents(found: Mapping[str, Any], task: str) -> int | None:
    """How many documents of a task counted; None for a group of tasks."""
    counts = found.get("n-samples", {}).get(task)
    return None if counts is None else int(counts["effective"])
