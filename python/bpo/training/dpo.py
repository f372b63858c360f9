"""Plain DPO with TRL on given pairs, of which nothing is kept but the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback
from transformers.utils import is_torch_bf16_gpu_available

from bpo.config import SelectConfig
from bpo.data.tokenizers import load_tokenizer
from bpo.system.paths import is_adapter
from bpo.training.load import adapter_to_train, load_to_train
from bpo.training.weighting import WeightedDPOConfig, WeightedDPOTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    from peft import LoraConfig
    from transformers import PreTrainedModel


def dpo_config_fields() -> list[str]:
    """Returns the names of the settings of a training."""
    return [field.name for field in dataclasses.fields(WeightedDPOConfig) if field.init]


def dpo_config(fields: Mapping[str, Any], output_dir: str, seed: int) -> WeightedDPOConfig:
    """Returns the settings of a training of which nothing is kept but the model.

    Args:
        fields: Those of ``DPOConfig``, with its defaults, but bfloat16 only on a GPU that has it; ``peft`` is left
            aside.
        output_dir: Where nothing will be written.
        seed: Of the order of the pairs and of the adapter.
    """
    accelerated = torch.accelerator.is_available()
    given = {
        "use_cpu": not accelerated,
        "bf16": is_torch_bf16_gpu_available() and not fields.get("fp16"),
        "dataloader_pin_memory": accelerated,
        "logging_strategy": "no",
        **{name: value for name, value in fields.items() if name != "peft"},
    }
    return WeightedDPOConfig(
        **given,
        output_dir=output_dir,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_ref_log_probs=True,
    )


def train_on_pairs(
    model: str,
    dataset: Any,
    args: WeightedDPOConfig,
    *,
    processing_class: Any = None,
    peft_config: LoraConfig | None = None,
    ref_logps: npt.NDArray[np.float32] | None = None,
) -> PreTrainedModel:
    """Trains a policy with TRL and returns it as a plain model, with nothing of the trainer left on it.

    Args:
        model: Path or hub id of the policy, or of an adapter, which is then trained further.
        dataset: Pairs in TRL's format.
        args: Settings, with ``precompute_ref_log_probs``.
        processing_class: The tokenizer; by default the one saved with the model.
        peft_config: The adapter to train; None trains every weight.
        ref_logps: (P, 2) log π_ref of the preferred and of the other response of each pair. None runs the reference.

    Returns:
        The trained model.
    """
    config = SelectConfig(trust_remote_code=args.trust_remote_code)
    trainer = _KnownReferenceTrainer(
        adapter_to_train(model, args) if is_adapter(model) else load_to_train(model, args, None),
        args=args,
        train_dataset=dataset,
        processing_class=load_tokenizer(model, processing_class, config),
        peft_config=peft_config,
        ref_logps=ref_logps,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # The trainer wraps the forward in its own autocast.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


class _KnownReferenceTrainer(WeightedDPOTrainer):
    """A ``DPOTrainer`` that is told log π_ref of its pairs."""

    def __init__(self, *args: Any, ref_logps: npt.NDArray[np.float32] | None, **kwargs: Any) -> None:
        self._ref_logps = ref_logps
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        if self._ref_logps is None:
            return super()._precompute_ref_logps(dataset, *args)
        if len(dataset) != len(self._ref_logps):
            # TRL sets pairs aside whose prompt fills the window; they were none when the reference ran.
            raise ValueError(f"{len(dataset)} of {len(self._ref_logps)} pairs are left of the training set.")
        for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            dataset = dataset.add_column(name, self._ref_logps[:, side])
        return dataset
