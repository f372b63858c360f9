"""Log-probabilities of the reference for a comparison: from the store, from an earlier call, or computed."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from bpo.evidence.compare.files import read_logps, write_logps
from bpo.evidence.evaluate import policy_logps
from bpo.store.gradient_store import GradientStore
from bpo.training.dpo import dpo_config

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.evidence.compare.data import ComparedPairs
    from bpo.evidence.compare.plan import Plan


def with_reference(plan: Plan, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool) -> Plan:
    """Returns the plan with log π_ref of all held-out pairs, and of the training pairs where training can take it.

    Raises:
        ValueError: One is not finite.
    """
    args = dpo_config(plan.config.training, ".", 0)
    # One reference serves training and evaluation where both compute alike.
    shares = not args.fp16 and bool(args.bf16) == plan.config.eval_bf16
    evaluated = [plan.split(seed).heldout for seed in plan.config.seeds]
    known = functools.partial(_with_ref_logps, plan, policy, tokenizer, progress)
    pool, heldout = plan.pool, plan.heldout
    everything = np.arange(len(pool.rows))
    if heldout is None:
        pool = known(pool, everything if shares else np.unique(np.concatenate(evaluated)))
    else:
        pool = known(pool, everything) if shares else pool
        heldout = known(heldout, evaluated[0])
    train_ref_logps = None
    if shares:
        train_ref_logps = pool.ref_logps
    elif plan.store is not None and not args.fp16:
        train_ref_logps = _stored_logps(GradientStore.open(plan.store), pool, bool(args.bf16))
    return dataclasses.replace(plan, pool=pool, heldout=heldout, train_ref_logps=train_ref_logps)


def _with_ref_logps(
    plan: Plan,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
    data: ComparedPairs,
    pairs: npt.NDArray[np.int64],
) -> ComparedPairs:
    """Returns data with log π_ref of the responses of some pairs, in the precision of evaluation."""
    config = plan.config.evaluation
    if plan.store is not None:
        stored = _stored_logps(GradientStore.open(plan.store), data, config.bf16)
        if stored is not None:
            return dataclasses.replace(data, ref_logps=stored)
    known = read_logps(plan.files.reference)
    ids = [bytes(identity) for identity in data.tokenized.sequence_ids]
    wanted = np.unique(data.tokenized.pairs[pairs])
    missing = np.array([row for row in wanted if ids[row] not in known], dtype=np.int64)
    if len(missing):
        computed = policy_logps(
            policy, data.tokenized.take(missing), tokenizer, config, stage="Reference", progress=progress
        )
        if not np.isfinite(computed).all():
            raise ValueError(
                f"The starting policy gives {int((~np.isfinite(computed)).sum())} responses no finite log π."
            )
        known.update(zip((ids[row] for row in missing), computed.tolist(), strict=True))
        write_logps(plan.files.reference, known)
    logps = np.array([known.get(identity, np.nan) for identity in ids], dtype=np.float32)
    return dataclasses.replace(data, ref_logps=logps)


def _stored_logps(store: GradientStore, data: ComparedPairs, bf16: bool) -> npt.NDArray[np.float32] | None:
    """Returns the log-probabilities that a store holds, if they were computed in the precision asked for."""
    precision = "float32" + (" under bfloat16 autocast" if bf16 else "")
    if (store.fingerprint["dtype"], store.fingerprint["max_length"]) != (precision, data.tokenized.max_length):
        return None
    rows = store.rows_of(data.tokenized.sequence_ids)
    if (rows < 0).any():
        return None
    logps: npt.NDArray[np.float32] = store.records["logp"][rows].astype(np.float32)
    return logps
