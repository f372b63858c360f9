"""The policy's last hidden states in place of gradients: the control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bpo.gradients.capture import Plan
from bpo.gradients.features import Features
from bpo.policy.checks import UnsupportedModelError, base_of
from bpo.policy.logprobs import predicting_positions
from bpo.policy.sharding import no_graph
from bpo.policy.transfer import sent
from bpo.store.gradient_store import EMBEDDED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.gradients.layers import Consumer
    from bpo.policy.logprobs import CompletionLogps, Forward


class ResponseEmbeddings(Features):
    """The mean of the policy's last hidden states over the positions that predict the response, without a backward.

    Those are the inputs of the output head, so what the decoder says of each token of the response just before it
    comes. Hidden states share one large direction; it cancels in the difference of two responses, which is the feature
    of a pair under every loss that depends on this difference alone *(ours)*. Token weights weigh log π only.

    Args:
        model: A causal language model, with or without an adapter.

    Raises:
        UnsupportedModelError: A model that does not say which module lies below its output head.
    """

    noun = "embeddings"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        base = base_of(model)
        self._decoder: nn.Module = base.base_model
        if self._decoder is base:
            raise UnsupportedModelError(
                f"{type(base).__name__} has no decoder apart from its output head (base_model_prefix="
                f"{base.base_model_prefix!r} names no module), so its last hidden states cannot be had. Use "
                "features='lora' or 'full'."
            )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies these features in a store."""
        return {"kind": EMBEDDED}

    def learn_shapes(self, forward: Forward, rows: npt.NDArray[np.int64]) -> None:
        """Learns from some responses how many numbers an embedding has."""
        if not self.slots:
            with no_graph(forward.model):
                forward.logps(rows)  # what is found out once about a model may take a second run of it
            sizes: list[int] = []
            self.catch(forward, Plan(), rows, lambda _, embeddings, __: sizes.append(embeddings.shape[1]))
            self._slot("last hidden state", sizes[:1])

    def catch(self, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], consume: Consumer) -> CompletionLogps:
        """Hands the embeddings of a batch of responses to ``consume``, in one forward."""
        predicting = predicting_positions(forward.tokenized, rows)
        width = predicting.shape[1] + 1
        caught: list[torch.Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0]
            if hidden.shape[:-1] != (len(rows), width):
                raise UnsupportedModelError(
                    f"{type(self._decoder).__name__}: its output has shape {tuple(hidden.shape)}, in which {len(rows)} "
                    f"samples of {width} tokens cannot be told apart."
                )
            mask = sent(predicting, hidden.device)[..., None]
            # Filled, not multiplied: padding may be NaN.
            total = hidden[:, :-1].float().masked_fill(~mask, 0).sum(dim=1)
            caught.append(total / mask.sum(dim=1).clamp(min=1))

        handle = self._decoder.register_forward_hook(hook)
        try:
            with no_graph(forward.model):
                logps = forward.logps(rows)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise UnsupportedModelError(
                f"{type(forward.model).__name__} ran its {type(self._decoder).__name__} {len(caught)} times in one "
                "forward, so its last hidden states cannot be told."
            )
        consume(0, caught[0], slice(0, len(rows)))
        return logps

    def refusal(self, errors: Mapping[str, float]) -> str:
        """Says that an embedding is another one alone."""
        return (
            "The embedding of a response depends on the other responses of its batch (relative difference "
            f"{max(errors.values()):.1e})."
        )
