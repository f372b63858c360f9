"""Balanced Preference Optimization: choose which preference pairs to train on.

A reconstruction of arXiv 2411.10914. ``bpo.select`` compresses breadth (prompts), augments depth (pairs of each prompt)
and decides each prompt's depth by clustering the model's own DPO gradients; TRL then trains on what it returns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpo._core import (
    NoDirectionError,
    NotDefiniteError,
    NotFiniteError,
    OutOfRangeError,
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreVersionError,
    __version__,
)
from bpo.system.optional import missing as _missing
from bpo.system.optional import warn_of_namesake as _warn_of_namesake

if TYPE_CHECKING:
    from bpo._core import allocate_depth as allocate_depth
    from bpo.breadth.compress import compress_breadth as compress_breadth
    from bpo.breadth.duplicates import near_duplicates as near_duplicates
    from bpo.breadth.embed import embed_prompts as embed_prompts
    from bpo.config import SelectConfig as SelectConfig
    from bpo.data.candidates import Candidates as Candidates
    from bpo.data.candidates import InvalidDataWarning as InvalidDataWarning
    from bpo.data.read import read_candidates as read_candidates
    from bpo.evidence.audit.audit import audit as audit
    from bpo.evidence.audit.results import Audit as Audit
    from bpo.evidence.compare.compare import Comparison as Comparison
    from bpo.evidence.compare.compare import compare as compare
    from bpo.evidence.compare.config import CompareConfig as CompareConfig
    from bpo.evidence.doctor import Diagnosis as Diagnosis
    from bpo.evidence.doctor import doctor as doctor
    from bpo.evidence.evaluate import PreferenceEvaluation as PreferenceEvaluation
    from bpo.evidence.evaluate import evaluate_preferences as evaluate_preferences
    from bpo.evidence.preview.preview import preview as preview
    from bpo.evidence.preview.results import Preview as Preview
    from bpo.gradients.collect import collect_gradients as collect_gradients
    from bpo.pairs.clustering import PairClusters as PairClusters
    from bpo.pairs.clustering import cluster_pairs as cluster_pairs
    from bpo.pairs.length import LengthEffect as LengthEffect
    from bpo.pairs.length import length_effect as length_effect
    from bpo.pairs.losses import pair_coefficients as pair_coefficients
    from bpo.policy.checks import UnsupportedModelError as UnsupportedModelError
    from bpo.responses.client import ChatError as ChatError
    from bpo.responses.client import ChatServer as ChatServer
    from bpo.responses.judge import Judge as Judge
    from bpo.responses.reward import RewardModel as RewardModel
    from bpo.responses.sampling import sample_responses as sample_responses
    from bpo.responses.scorer import Score as Score
    from bpo.responses.scorer import Scorer as Scorer
    from bpo.responses.scoring import score_responses as score_responses
    from bpo.responses.summary import ResponseSummary as ResponseSummary
    from bpo.responses.summary import describe_responses as describe_responses
    from bpo.selection.saved import SelectionError as SelectionError
    from bpo.selection.select import select as select
    from bpo.selection.selection import Selection as Selection
    from bpo.selection.strategies.candidacy import Candidacy as Candidacy
    from bpo.selection.strategies.register import register_strategy as register_strategy
    from bpo.store.gradient_store import GradientStore as GradientStore
    from bpo.store.gradient_store import StoreMismatchError as StoreMismatchError
    from bpo.store.maintenance import describe_store as describe_store
    from bpo.store.maintenance import export_store as export_store
    from bpo.store.maintenance import merge_stores as merge_stores
    from bpo.store.maintenance import repair_store as repair_store
    from bpo.store.maintenance import verify_store as verify_store
    from bpo.store.shards import gather_stores as gather_stores
    from bpo.training.config import BPOConfig as BPOConfig
    from bpo.training.trainer import BPOTrainer as BPOTrainer
    from bpo.training.warmup import warm_up as warm_up
    from bpo.training.weighting import WeightedDPOConfig as WeightedDPOConfig
    from bpo.training.weighting import WeightedDPOTrainer as WeightedDPOTrainer
    from bpo.training.weights.steps import step_pairs as step_pairs
    from bpo.training.weights.tokens import estimate_token_weights as estimate_token_weights
    from bpo.world.world import alone as alone
# Imported when first used: torch, transformers and trl take seconds, `import bpo` takes milliseconds.
_LAZY = {
    "alone": "bpo.world.world",
    "allocate_depth": "bpo._core",
    "compress_breadth": "bpo.breadth.compress",
    "near_duplicates": "bpo.breadth.duplicates",
    "UnsupportedModelError": "bpo.policy.checks",
    "ChatError": "bpo.responses.client",
    "ChatServer": "bpo.responses.client",
    "PairClusters": "bpo.pairs.clustering",
    "cluster_pairs": "bpo.pairs.clustering",
    "Audit": "bpo.evidence.audit.results",
    "audit": "bpo.evidence.audit.audit",
    "Comparison": "bpo.evidence.compare.compare",
    "compare": "bpo.evidence.compare.compare",
    "CompareConfig": "bpo.evidence.compare.config",
    "SelectConfig": "bpo.config",
    "Candidates": "bpo.data.candidates",
    "InvalidDataWarning": "bpo.data.candidates",
    "read_candidates": "bpo.data.read",
    "Diagnosis": "bpo.evidence.doctor",
    "doctor": "bpo.evidence.doctor",
    "embed_prompts": "bpo.breadth.embed",
    "PreferenceEvaluation": "bpo.evidence.evaluate",
    "evaluate_preferences": "bpo.evidence.evaluate",
    "collect_gradients": "bpo.gradients.collect",
    "LengthEffect": "bpo.pairs.length",
    "length_effect": "bpo.pairs.length",
    "Judge": "bpo.responses.judge",
    "pair_coefficients": "bpo.pairs.losses",
    "describe_store": "bpo.store.maintenance",
    "export_store": "bpo.store.maintenance",
    "gather_stores": "bpo.store.shards",
    "merge_stores": "bpo.store.maintenance",
    "repair_store": "bpo.store.maintenance",
    "verify_store": "bpo.store.maintenance",
    "select": "bpo.selection.select",
    "Preview": "bpo.evidence.preview.results",
    "preview": "bpo.evidence.preview.preview",
    "ResponseSummary": "bpo.responses.summary",
    "describe_responses": "bpo.responses.summary",
    "RewardModel": "bpo.responses.reward",
    "sample_responses": "bpo.responses.sampling",
    "Score": "bpo.responses.scorer",
    "Scorer": "bpo.responses.scorer",
    "score_responses": "bpo.responses.scoring",
    "Selection": "bpo.selection.selection",
    "SelectionError": "bpo.selection.saved",
    "GradientStore": "bpo.store.gradient_store",
    "StoreMismatchError": "bpo.store.gradient_store",
    "Candidacy": "bpo.selection.strategies.candidacy",
    "register_strategy": "bpo.selection.strategies.register",
    "BPOConfig": "bpo.training.config",
    "BPOTrainer": "bpo.training.trainer",
    "warm_up": "bpo.training.warmup",
    "WeightedDPOConfig": "bpo.training.weighting",
    "WeightedDPOTrainer": "bpo.training.weighting",
    "step_pairs": "bpo.training.weights.steps",
    "estimate_token_weights": "bpo.training.weights.tokens",
}
__all__ = [
    "NoDirectionError",
    "NotDefiniteError",
    "NotFiniteError",
    "OutOfRangeError",
    "StoreDamagedError",
    "StoreError",
    "StoreLockedError",
    "StoreVersionError",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bpo' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(_missing(f"bpo.{name}", error), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_warn_of_namesake(__path__[0])
