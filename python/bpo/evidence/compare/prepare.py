"""What all runs of a comparison need, computed once: data, gradients, the reference, responses to compare with."""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

import bpo
from bpo.data.rows import load_alike, load_rows
from bpo.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from bpo.evidence.compare.data import ComparedPairs
from bpo.evidence.compare.files import HEADER, Costs, write
from bpo.evidence.compare.plan import Plan
from bpo.evidence.compare.reference import with_reference
from bpo.evidence.win_rates import score_start
from bpo.gradients.collect import collect_gradients
from bpo.policy.models import load_policy, model_fingerprint, window
from bpo.store.gradient_store import GradientStore, check_described
from bpo.system.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.evidence.compare.config import CompareConfig
    from bpo.evidence.compare.files import ComparisonFiles


def prepare(config: CompareConfig, files: ComparisonFiles, progress: bool) -> Plan:
    """Computes what all runs need, or takes it from an earlier call.

    Raises:
        ValueError: Unusable data, more prompts asked for than there are, or a comparison with other settings.
    """
    tokenizer = load_tokenizer(config.model, config.processing_class, config.shared)
    pool, heldout = _read(config, tokenizer)
    plan = Plan(config, files, pool, heldout)
    plan.counts()  # before any work
    policy = load_policy(config.model, config.shared)
    model = model_fingerprint(policy)
    identity = {
        "bpo": bpo.__version__,
        "model": model,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset": pool.fingerprint(),
        "heldout_data": None if heldout is None else heldout.fingerprint(),
    }
    files.check_manifest({**identity, **config.settings()})
    costs = Costs(files.costs)
    plan = dataclasses.replace(plan, costs=costs.seconds)
    if config.store is not None:
        store = GradientStore.open(expanded(config.store))
        _check_store(store, model, pool)
        plan = dataclasses.replace(plan, store=store.path)
    elif config.needs_store:
        plan = dataclasses.replace(plan, store=files.store)
        with costs.add("gradients"):
            collect_gradients(
                policy,
                pool.rows,
                processing_class=tokenizer,
                store=plan.store,
                config=config.shared,
                progress=progress,
            )
    with costs.add("reference"):
        plan = with_reference(plan, policy, tokenizer, progress)
    if config.scorer is not None:
        with costs.add("sampling"):
            _sample_start(plan, policy, tokenizer, progress)
    del policy
    gc.collect()
    return plan


def _read(config: CompareConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[ComparedPairs, ComparedPairs | None]:
    """Reads the pairs to draw from, and those of held-out data where it is given, whose prompts the others lack."""
    shared = config.shared
    longest = window(config.model, shared)
    data = load_rows(config.dataset, split=config.split, columns=config.columns)
    pool = ComparedPairs.read(data, tokenizer, longest, shared, config.more_columns)
    if config.splits:
        return pool, None
    # Weights are of training; what is measured counts every pair alike.
    apart = load_alike(config.heldout, config.columns)
    heldout = ComparedPairs.read(apart, tokenizer, longest, dataclasses.replace(shared, weight_column=None))
    return pool.without(heldout), heldout


def _check_store(store: GradientStore, model: str, pool: ComparedPairs) -> None:
    """Checks that a store that was there before is of this policy and data.

    Raises:
        ValueError: It is not.
    """
    check_described(store)
    if store.fingerprint["model"] != model:
        raise ValueError(f"store: {store.path} was made with another model.")
    missing = int((store.rows_of(pool.tokenized.sequence_ids) < 0).sum())
    if missing:
        raise ValueError(
            f"store: {store.path} lacks {missing} of the {len(pool.tokenized.ids)} responses. Complete it with "
            "bpo.collect_gradients, or leave store out."
        )


def _sample_start(plan: Plan, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool) -> None:
    """Samples the starting policy's responses to each seed's held-out prompts, and scores them."""
    config, directory = plan.config, plan.files.responses
    directory.mkdir(parents=True, exist_ok=True)
    scorer = config.scorer.build(plan.files.verdicts)
    for seed in tqdm(config.seeds, desc="Responses of the starting policy", unit="seed", disable=not progress):
        path = plan.files.start_responses(seed)
        if not path.is_file():
            prompts = plan.prompts(plan.split(seed).heldout)
            rows = config.scorer.sample(policy, prompts, tokenizer, seed, directory / f"seed{seed}-start.jsonl")
            rows = score_start(rows, scorer, directory / f"seed{seed}-scores.jsonl")
            write(path, json.dumps({**HEADER, "rows": rows}) + "\n")
