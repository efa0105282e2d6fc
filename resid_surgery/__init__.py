"""resid_surgery: locate, operate on and measure what writes a prediction into the residual stream.

The public verbs and values, imported on first use (PEP 562).
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "errors": (
        "ResidSurgeryError ArgumentError SiteError PromptError LoadError UnsupportedModelError "
        "ClosureError StaleRecordingError InterventionError RunError"
    ),
    "sites": "Site Neuron ExpertNeuron SharedNeuron Head HeadSource AttnNeuron Sublayer Resid Bias Constant Projection",
    "addresses": "Slice At Edge parse_site",
    "_progress": "progress",
    "models.prompts": "Prompt",
    "models.zoo": "tiny",
    "models.layout": "BlockLayout Layout",
    "models.opening": "OpenedModel",
    "stream.recording": "Recording record",
    "stream.grouping": "record_each",
    "stream.loading": "load",
    "stream.tables": "decompose lens spectrum stream_bs predictions",
    "stream.knowing": "facts",
    "stream.everywhere": "lens_positions attention_weights",
    "attribution.catalogue": "describe_scores",
    "attribution.adding": "add_bs_values add_subvalues",
    "attribution.scores": "scores counts",
    "attribution.by_layer": "best_share separation",
    "attribution.locating": "Located locate locate_each locate_many",
    "attribution.curves": "probability_curve cumulated",
    "attribution.sources": "sources",
    "attribution.removing": "attention_sources",
    "attribution.crossing": "cross_layer",
    "attribution.weights": "HeadWeights head_weights",
    "attribution.ov_qk": "ov_tokens qk_tokens copying",
    "attribution.composing": "composition",
    "attribution.patterns": "head_patterns",
    "attribution.messages": "messages expand_message",
    "attribution.constancy": "token_constants",
    "attribution.memories": "NeuronMemory neuron_memory",
    "attribution.switching": "query_subvalues locations",
    "surgery.interventions": "Zero Scale Steer Set Clamp Patch Mean Attend Cut",
    "surgery.effects": "Effect intervene intervene_each",
    "surgery.sweeping": "sweep",
    "surgery.grids": "grid patching additivity",
    "surgery.altering": "under",
    "surgery.storing": "save_interventions load_interventions",
    "evidence.check": "check",
    "evidence.families": "check_families",
    "evidence.operating": "Operated operate",
    "evidence.graphs": "SourceGraph source_graph",
    "evidence.verifying": "Verified verify",
    "evidence.faithfulness": "faithfulness",
    "evidence.blame": "Blame blame",
    "evidence.statistics": "bootstrap",
    "evidence.trials": "addition_test ablation_test",
    "evidence.truth": "score_against_effect agreement",
    "editing.edits": "Edit read_edit",
    "editing.rewrites": "Rewrite",
    "editing.coefficients": "edit_coefficients",
    "editing.value_rows": "edit_value_rows",
    "editing.rank_one": "edit_rank_one",
    "editing.least_squares": "edit_least_squares key_cosines",
    "editing.probes": "Probe ProbeSet save_probes",
    "editing.texts": "general_probes",
    "editing.relations": "probes rewrite known_facts",
    "editing.importing": "read_probes load_probes",
    "editing.auditing": "audit cast_survival",
    "editing.exposure": "exposure exposure_probes",
    "editing.predicting": "exposure_against_kl",
    "editing.harness": "run_lm_eval",
    "editing.policy": "Policy",
    "editing.reports": "Validation diff_reports",
    "editing.budgets": "Budget",
    "editing.validating": "validate",
    "experiments.cases": "Case read_cases",
    "experiments.plans": "Plan read_plan",
    "experiments.on_ray": "OnRay",
    "experiments.reading": "Run open_run read_run",
    "experiments.runs": "run",
    "views.plots": "plot_stream plot_grid",
    "views.figures": "plot_intervals plot_layers plot_cumulated plot_probability",
    "views.profiles": "plot_layer_scores plot_counts plot_shares plot_separation plot_addition plot_study",
    "views.maps": "plot_tokens plot_head_sources plot_lens",
    "views.waterfall": "plot_ledger",
    "views.paper": "plot_paper",
    "views.circuits": "plot_sources plot_removed plot_cross_layer plot_locations plot_heads plot_graph",
    "views.edits": "plot_exposure plot_retention",
    "views.report": "write_report",
    "views.files": "save_results",
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'resid_surgery' has no attribute '{name}'")
    value = getattr(import_module(f"resid_surgery.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
