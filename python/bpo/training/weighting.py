"""DPO whose pairs, or the tokens of their responses, count by weights that the data gives, with TRL's trainer."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import DPOConfig, DPOTrainer

from bpo.choices import REFUSED_LOSSES
from bpo.config import SelectConfig
from bpo.data.columns import WEIGHT_COLUMN, pair_weight
from bpo.pairs.losses import batch_losses
from bpo.policy.softmax import score_tokens
from bpo.training.weights.batches import (
    TOKENS_KEY,
    WithTokenWeights,
    check_counts,
    check_token_weights,
    weighing_tokens,
    weight_columns,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Fields of DPOConfig and of SelectConfig that say what the loss of a pair is.
LOSS_FIELDS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "use_weighting",
)

# Where a batch holds the weights.
_BATCH_KEY = "pair_weight"


@dataclasses.dataclass
class WeightedDPOConfig(DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with the names of the columns of weights.

    Where nothing computes in bfloat16, it trains in float32 unless ``bf16``, ``fp16`` or ``use_cpu`` says otherwise;
    TRL's own refuses to begin there until it is told.

    Attributes:
        weight_column: Column of the data with the weight of each pair; None trains as TRL does.
        token_weights: Name of the weights of the tokens, which stand in the columns ``<name>_chosen`` and
            ``<name>_rejected``, a number for each token of the response, the end token included; None weighs every
            token 1, as TRL does. See :func:`bpo.estimate_token_weights`.

    Example:
        >>> import bpo
        >>> bpo.WeightedDPOConfig(output_dir="out", report_to="none", bf16=False).weight_column
        'weight'
    """

    weight_column: str | None = dataclasses.field(
        default=WEIGHT_COLUMN, metadata={"help": "Column of the data with the weight of each pair."}
    )
    token_weights: str | None = dataclasses.field(
        default=None, metadata={"help": "Name of the weights of the tokens: columns <name>_chosen, <name>_rejected."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not (self.fp16 or self.use_cpu or is_torch_bf16_gpu_available()):
            self.bf16: bool | None = is_torch_xla_available()
        super().__post_init__()


class WeightedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` where the loss of each pair counts by a weight from the data.

    The loss of a batch of n pairs is (1/n) Σ w_p ℓ_p. It is linear in the weights, so it does not depend on how a step
    is cut into batches, accumulated or spread over devices any more than TRL's own does, a weight of 2 is the pair
    twice, and weights of 1 give the steps of TRL's trainer bit for bit. Dividing by Σ w_p of a batch instead would have
    a pair count by its neighbours: alone in its batch, it would have no weight at all. The price is that weights of
    mean other than 1 scale the gradient, and with it the learning rate of optimizers that are not scale-free.

    Data sets without the column train and evaluate as in TRL. Evaluation weighs the loss likewise; rewards, margins and
    accuracies are those of the pairs, unweighted. The auxiliary loss of mixtures of experts belongs to no pair and is
    not weighted; TRL averages the ``sft`` loss over the tokens of a batch, and so it is here.

    With ``token_weights`` the log-probability of a response, under policy and reference, is Σ_t w_t log π(y_t|x, y_<t),
    as in TIS-DPO (arXiv 2410.04350), so the gradient of a pair is that of :func:`bpo.select` with the same setting.
    Rewards, margins and log-probabilities that are logged are those of the weighted sums; weights of 1 change nothing.

    With ``precompute_ref_log_probs=True`` data that has the columns ``ref_chosen_logps`` and ``ref_rejected_logps``,
    such as a selection with ``SelectConfig.reference_logps``, is compared with these; no reference runs or is loaded.

    All arguments are those of ``DPOTrainer``; ``args`` is a :class:`WeightedDPOConfig`, or a ``DPOConfig`` for the
    column ``"weight"``.

    Raises:
        ValueError: A weight that is not a finite number of at least 0 (the message names the row), weights that are all
            0, a named column that is not there, or a loss that mixes the pairs of a batch; token weights that are not
            finite, or of another number than the tokens, or of images.

    Example:
        .. code-block:: python

            rows = [{"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "weight": 0.5}, ...]
            args = bpo.WeightedDPOConfig("out")
            bpo.WeightedDPOTrainer("my-sft-model", args=args, train_dataset=Dataset.from_list(rows)).train()
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self._weight_column: str | None = getattr(args, "weight_column", WEIGHT_COLUMN)
        if self._weight_column is not None:
            splits = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            # Before TRL drops rows, so that the row named is the user's.
            weighs = {
                name: _check_weights(dataset, self._weight_column, name)
                for name, dataset in {**splits, "train_dataset": train_dataset}.items()
            }
            if not weighs["train_dataset"] and self._weight_column != WEIGHT_COLUMN:
                raise ValueError(
                    f"weight_column={self._weight_column!r} is not a column of train_dataset, which has "
                    f"{getattr(train_dataset, 'column_names', None)}."
                )
            losses = getattr(args, "loss_type", [])
            for loss in [losses] if isinstance(losses, str) else losses:
                if any(weighs.values()) and loss in REFUSED_LOSSES:
                    raise ValueError(f"loss_type {loss!r} cannot be weighted: {REFUSED_LOSSES[loss]}.")
        self._token_weights: str | None = getattr(args, "token_weights", None)
        if self._token_weights is not None:
            self._check_token_weights(train_dataset, eval_dataset)
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self._weight_column is not None:
            self.data_collator: Any = _WithWeights(self.data_collator, self._weight_column)
        self._collate_token_weights()

    def _check_token_weights(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Checks the token weights before TRL drops rows, so that the row named is the user's."""
        assert self._token_weights is not None
        splits = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in splits.items():
            check_token_weights(dataset, self._token_weights, name)
        if not check_token_weights(train_dataset, self._token_weights, "train_dataset"):
            raise ValueError(
                f"token_weights={self._token_weights!r} needs the columns "
                f"{' and '.join(weight_columns(self._token_weights))} in train_dataset, which has "
                f"{getattr(train_dataset, 'column_names', None)}."
            )

    def _collate_token_weights(self) -> None:
        """Has batches hold the weights of tokens; TRL computes log π_ref before the trainer is made."""
        if self._token_weights is not None and not isinstance(self.data_collator, WithTokenWeights):
            if getattr(self, "_is_vision_dataset", False):
                raise ValueError("token_weights are of the tokens of a text; the data has images.")
            self.data_collator = WithTokenWeights(
                self.data_collator, self._token_weights, self.args.truncation_mode == "keep_end"
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """As in TRL; each token needs a weight, where the data has any."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._token_weights is not None:
            check_counts(prepared, self._token_weights, dataset_name, processing_class)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = [] if self._token_weights is None else list(weight_columns(self._token_weights))
        if self._weight_column is not None:
            wanted.append(self._weight_column)
        self._signature_columns += [column for column in wanted if column not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """Adds log π_ref, as TRL does; of data that brings it along it is there."""
        if {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names or []):
            return dataset
        if self._token_weights is None:
            return super()._precompute_ref_logps(dataset, *args)
        self._collate_token_weights()
        # TRL keeps what it computed by data and model, whatever the tokens weigh.
        model = getattr(self, "_precompute_model_hash", None)
        self._precompute_model_hash: Any = (model, self._token_weights)
        try:
            return super()._precompute_ref_logps(dataset, *args)
        finally:
            self._precompute_model_hash = model

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As in TRL; the reference takes no weights of pairs, but those of tokens."""
        given = {key: inputs[key] for key in inputs if key not in (_BATCH_KEY, TOKENS_KEY)}
        with self._weighing_tokens(inputs):
            return super().compute_ref_log_probs(model, given)

    def _weighing_tokens(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Has policy and reference weigh the tokens of a batch, where it says how."""
        if TOKENS_KEY not in inputs:
            return contextlib.nullcontext()
        models = [model for model in (self.model, self.ref_model) if model is not None]
        return weighing_tokens([self.accelerator.unwrap_model(model) for model in models], inputs[TOKENS_KEY])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of weighted tokens, with the gradient that reaches the model from each pair times its weight."""
        if TOKENS_KEY in inputs:
            given = {key: value for key, value in inputs.items() if key != TOKENS_KEY}
            with self._weighing_tokens(inputs):
                return self.compute_loss(model, given, return_outputs, num_items_in_batch)
        weights = inputs.get(_BATCH_KEY)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {key: value for key, value in inputs.items() if key != _BATCH_KEY}
        with self._weighing(model, weights) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The value follows the gradient: Σ (w_p − 1) ℓ_p is what TRL's mean lacks, and exactly 0 for weights of 1.
        lacking = ((weights.double() - 1) * self._losses(seen, inputs)).mean()
        loss = result[0] if return_outputs else result
        loss = loss + lacking.to(loss.dtype)
        return (loss, result[1]) if return_outputs else loss

    @contextlib.contextmanager
    def _weighing(self, model: Any, weights: torch.Tensor) -> Iterator[_Seen]:
        """Scales the gradients of what the policy gives to the loss, and keeps what policy and reference give."""
        seen = _Seen()
        reference = self.ref_model if self.ref_model is not None else self.model

        def on_policy(_: Any, __: Any, outputs: Any) -> None:
            if seen.policy is None:
                name, values = _scores(outputs)
                seen.policy = outputs
                if values.requires_grad:
                    # The first half of the batch is chosen, the second rejected.
                    factors = weights.repeat(2).reshape(-1, *[1] * (values.dim() - 1))
                    values.register_hook(  # type: ignore[no-untyped-call]
                        lambda gradient: gradient * factors.to(gradient.device, gradient.dtype)
                    )
                elif torch.is_grad_enabled():
                    raise RuntimeError(f"The {name} of {type(model).__name__} have no gradient to be weighted.")

        def on_reference(_: Any, __: Any, outputs: Any) -> None:
            # TRL may run the policy once more for its logits, after the reference.
            if seen.policy is None or _scores(outputs)[0] == _scores(seen.policy)[0]:
                seen.reference = outputs

        handles = [model.register_forward_hook(on_policy), reference.register_forward_hook(on_reference)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        if seen.policy is None:
            raise RuntimeError("This version of TRL does not run the model itself with use_liger_kernel; turn it off.")

    def _losses(self, seen: _Seen, inputs: dict[str, Any]) -> torch.Tensor:
        """(n,) loss of each pair, without gradient."""
        mask = inputs["completion_mask"]
        policy, log_weights = _token_logps(seen.policy, inputs["input_ids"], mask)
        summed = self._summing(mask)
        if self.precompute_ref_logps:
            ref_logps = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)
        else:
            ref_logps = summed(_token_logps(seen.reference, inputs["input_ids"], mask)[0])
        predicted = mask[:, 1:].sum(dim=1)
        return batch_losses(
            summed(policy),
            ref_logps,
            lengths=_columns(mask.sum(dim=1).clamp(min=1)),
            predicted=_columns(predicted),
            log_weights=_columns(log_weights.sum(dim=1) / predicted.clamp(min=1)),
            sft_logps=_columns(policy.sum(dim=1)),
            config=SelectConfig(**{name: getattr(self.args, name) for name in LOSS_FIELDS}),
        )

    def _summing(self, mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns what sums log-probabilities of tokens to (n, 2).

        TRL's ``ld_alpha`` (arXiv 2409.06411) weighs the tokens by which a response is longer than its partner.
        """
        if self.ld_alpha is None:
            return lambda logps: _columns(logps.sum(dim=1))
        position = mask[:, 1:].cumsum(dim=1)
        shared = _columns(mask[:, 1:].sum(dim=1)).amin(dim=1).repeat(2)
        factors = torch.where(position <= shared[:, None], 1.0, self.ld_alpha)
        return lambda logps: _columns((logps * factors).sum(dim=1))


@dataclasses.dataclass
class _Seen:
    """What the models of a step returned."""

    policy: Any = None
    reference: Any = None


@dataclasses.dataclass
class _WithWeights:
    """A collator that adds the weights of the examples, where all have one."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if all(self.column in example for example in examples):
            # Streamed data sets are not checked before.
            weights = [pair_weight(example[self.column], "A row of the data", self.column) for example in examples]
            batch[_BATCH_KEY] = torch.tensor(weights, dtype=torch.float32)
        return batch


def _check_weights(dataset: Any, column: str, name: str) -> bool:
    """Checks the weights of a data set; returns whether it has any.

    Raises:
        ValueError: One is not a finite number of at least 0, or all are 0.
    """
    if column not in (getattr(dataset, "column_names", None) or []):
        return False
    if isinstance(dataset, datasets.Dataset):
        weights = [
            pair_weight(value, f"{name}, row {row}", column)
            for row, value in enumerate(dataset.with_format(None)[column])
        ]
        if not any(weights):
            raise ValueError(f"{name}, column '{column}': all weights are 0, so there is nothing to train on.")
    return True


def _scores(outputs: Any) -> tuple[str, torch.Tensor]:
    """Returns from what of a model's output TRL computes the loss: log-probabilities, or in older versions logits."""
    name = "log_probs" if getattr(outputs, "log_probs", None) is not None else "logits"
    return name, getattr(outputs, name)


def _token_logps(
    outputs: Any, input_ids: torch.Tensor, completion_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log π and log π − log Σ_v π_v² of the tokens of the responses, (2n, t − 1) each, 0 elsewhere.

    The second is 0 everywhere where TRL has not computed it, as without ``use_weighting``.
    """
    name, values = _scores(outputs)
    mask = completion_mask[:, 1:].bool()
    values = values.detach()
    if name == "log_probs":
        logps = values[:, -mask.shape[1] :]  # behind the virtual tokens of prompt learning
        squares = outputs.log_sum_sq_probs
        weights = torch.zeros_like(logps) if squares is None else logps - squares[:, -mask.shape[1] :].detach()
        return logps * mask, weights * mask
    scores = score_tokens(values[:, -mask.shape[1] - 1 : -1][mask], input_ids[:, 1:][mask])
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, scores[0]), zeros.masked_scatter(mask, scores[1])


def _columns(values: torch.Tensor) -> torch.Tensor:
    """(2n,) of a batch to (n, 2), chosen and rejected."""
    return values.reshape(2, -1).T
