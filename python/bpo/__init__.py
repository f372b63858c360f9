"""Balanced Preference Optimization: choose which preference pairs to train on.

A reconstruction of arXiv 2411.10914. ``bpo.select`` compresses breadth (prompts), augments depth (pairs of each prompt)
and decides each prompt's depth by clustering the model's own DPO gradients; TRL then trains on what it returns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpo._core import StoreDamagedError, StoreError, StoreLockedError, StoreVersionError, __version__

if TYPE_CHECKING:
    from bpo._core import allocate_depth as allocate_depth
    from bpo.breadth import compress_breadth as compress_breadth
    from bpo.breadth import near_duplicates as near_duplicates
    from bpo.capture import UnsupportedModelError as UnsupportedModelError
    from bpo.client import ChatError as ChatError
    from bpo.client import ChatServer as ChatServer
    from bpo.clustering import PairClusters as PairClusters
    from bpo.clustering import cluster_pairs as cluster_pairs
    from bpo.comparison import Comparison as Comparison
    from bpo.comparison import compare as compare
    from bpo.comparison_config import CompareConfig as CompareConfig
    from bpo.config import SelectConfig as SelectConfig
    from bpo.data import InvalidDataWarning as InvalidDataWarning
    from bpo.data import read_candidates as read_candidates
    from bpo.diagnosis import Diagnosis as Diagnosis
    from bpo.diagnosis import doctor as doctor
    from bpo.embeddings import embed_prompts as embed_prompts
    from bpo.evaluate import PreferenceEvaluation as PreferenceEvaluation
    from bpo.evaluate import evaluate_preferences as evaluate_preferences
    from bpo.gradients import collect_gradients as collect_gradients
    from bpo.judge import Judge as Judge
    from bpo.length import LengthEffect as LengthEffect
    from bpo.length import length_effect as length_effect
    from bpo.linearised import Preview as Preview
    from bpo.linearised import preview as preview
    from bpo.losses import pair_coefficients as pair_coefficients
    from bpo.maintenance import describe_store as describe_store
    from bpo.maintenance import export_store as export_store
    from bpo.maintenance import merge_stores as merge_stores
    from bpo.maintenance import repair_store as repair_store
    from bpo.maintenance import verify_store as verify_store
    from bpo.pipeline import select as select
    from bpo.responses import ResponseSummary as ResponseSummary
    from bpo.responses import describe_responses as describe_responses
    from bpo.reward import RewardModel as RewardModel
    from bpo.sampling import sample_responses as sample_responses
    from bpo.scoring import Scorer as Scorer
    from bpo.scoring import score_responses as score_responses
    from bpo.selection import Selection as Selection
    from bpo.selection import SelectionError as SelectionError
    from bpo.store import GradientStore as GradientStore
    from bpo.store import StoreMismatchError as StoreMismatchError
    from bpo.strategies import Candidacy as Candidacy
    from bpo.strategies import register_strategy as register_strategy
    from bpo.train import BPOConfig as BPOConfig
    from bpo.train import BPOTrainer as BPOTrainer
    from bpo.warmup import warm_up as warm_up
    from bpo.weighting import WeightedDPOConfig as WeightedDPOConfig
    from bpo.weighting import WeightedDPOTrainer as WeightedDPOTrainer

# Imported when first used: torch, transformers and trl take seconds, `import bpo` takes milliseconds.
_LAZY = {
    "allocate_depth": "bpo._core",
    "compress_breadth": "bpo.breadth",
    "near_duplicates": "bpo.breadth",
    "UnsupportedModelError": "bpo.capture",
    "ChatError": "bpo.client",
    "ChatServer": "bpo.client",
    "PairClusters": "bpo.clustering",
    "cluster_pairs": "bpo.clustering",
    "Comparison": "bpo.comparison",
    "compare": "bpo.comparison",
    "CompareConfig": "bpo.comparison_config",
    "SelectConfig": "bpo.config",
    "InvalidDataWarning": "bpo.data",
    "read_candidates": "bpo.data",
    "Diagnosis": "bpo.diagnosis",
    "doctor": "bpo.diagnosis",
    "embed_prompts": "bpo.embeddings",
    "PreferenceEvaluation": "bpo.evaluate",
    "evaluate_preferences": "bpo.evaluate",
    "collect_gradients": "bpo.gradients",
    "LengthEffect": "bpo.length",
    "length_effect": "bpo.length",
    "Judge": "bpo.judge",
    "pair_coefficients": "bpo.losses",
    "describe_store": "bpo.maintenance",
    "export_store": "bpo.maintenance",
    "merge_stores": "bpo.maintenance",
    "repair_store": "bpo.maintenance",
    "verify_store": "bpo.maintenance",
    "select": "bpo.pipeline",
    "Preview": "bpo.linearised",
    "preview": "bpo.linearised",
    "ResponseSummary": "bpo.responses",
    "describe_responses": "bpo.responses",
    "RewardModel": "bpo.reward",
    "sample_responses": "bpo.sampling",
    "Scorer": "bpo.scoring",
    "score_responses": "bpo.scoring",
    "Selection": "bpo.selection",
    "SelectionError": "bpo.selection",
    "GradientStore": "bpo.store",
    "StoreMismatchError": "bpo.store",
    "Candidacy": "bpo.strategies",
    "register_strategy": "bpo.strategies",
    "BPOConfig": "bpo.train",
    "BPOTrainer": "bpo.train",
    "warm_up": "bpo.warmup",
    "WeightedDPOConfig": "bpo.weighting",
    "WeightedDPOTrainer": "bpo.weighting",
}

__all__ = ["StoreDamagedError", "StoreError", "StoreLockedError", "StoreVersionError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
