"""Where the log-probabilities of the reference policy come from."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from bpo.policy.logprobs import check_vocabulary, look_anew
from bpo.policy.models import load_policy, model_fingerprint
from bpo.policy.sharding import no_graph
from bpo.policy.state import inference_state

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.config import SelectConfig
    from bpo.data.tokens import TokenizedResponses
    from bpo.policy.logprobs import Forward


@dataclasses.dataclass(frozen=True)
class Reference:
    """log π_ref of sequences: from the policy itself, without or with another adapter, a model, the data, or known.

    Attributes:
        source: Which of these.
        fingerprint: What identifies the reference in a store.
        model: The model that runs, None where none does.
        adapter: Name of the adapter with which it runs, where that is not the active one.
        known: (S,) float32 log-probabilities of all sequences, where they were computed before.
    """

    source: Literal["policy", "base", "adapter", "model", "columns", "known"]
    fingerprint: str
    model: PreTrainedModel | None = None
    adapter: str | None = None
    known: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, policy: PreTrainedModel, config: SelectConfig) -> Reference:
        """Returns the reference that ``SelectConfig.ref_model`` means.

        Raises:
            ValueError: ``ref_model="base"`` for a policy that has no adapter.
            FileNotFoundError: A model path that does not exist.
        """
        if config.ref_model is None:
            return cls("policy", "the policy")
        if config.reads_ref_logps:
            return cls("columns", "the data")
        if isinstance(config.ref_model, str) and config.ref_model == "base":
            if not hasattr(policy, "disable_adapter"):
                raise ValueError(
                    "SelectConfig.ref_model='base' is the policy without its adapter, but "
                    f"{type(policy).__name__} has none. Pass a PeftModel; a directory is './base'."
                )
            return cls.with_adapter(policy, None)
        return cls.by(load_policy(config.ref_model, config))

    @classmethod
    def by(cls, model: PreTrainedModel) -> Reference:
        """Returns a model as reference."""
        return cls("model", model_fingerprint(model), model)

    @classmethod
    def with_adapter(cls, policy: PreTrainedModel, adapter: str | None) -> Reference:
        """Returns a policy with another of its adapters as reference, or without any."""
        if adapter is None:
            return cls("base", "the policy without its adapter", policy)
        return cls("adapter", f"the policy with its adapter '{adapter}'", policy, adapter)

    def check_vocabulary(self, tokenized: TokenizedResponses) -> None:
        """Checks, before a run, that the reference knows every token.

        Raises:
            ValueError: It does not.
        """
        if self.model is not None:
            check_vocabulary(self.model, tokenized.ids)
            look_anew(self.model)

    def logps(
        self,
        forward: Forward,
        rows: npt.NDArray[np.int64],
        policy_logps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns log π_ref of some sequences.

        Args:
            forward: The sequences, and how a model is run over them.
            rows: (n,) which of them.
            policy_logps: (n,) their log-probabilities under the policy.

        Returns:
            (n,) float32, where they come from: on the device of a model.
        """
        if self.source == "policy":
            assert policy_logps is not None
            return policy_logps
        if self.source == "columns":
            assert forward.tokenized.ref_logps is not None
            return torch.from_numpy(forward.tokenized.ref_logps[rows].astype(np.float32))
        if self.source == "known":
            assert self.known is not None
            return torch.from_numpy(self.known[rows])
        assert self.model is not None
        with contextlib.ExitStack() as stack:
            # Outside disable_adapter, which leaves the adapter trainable.
            stack.enter_context(inference_state(self.model))
            if self.source == "base":
                stack.enter_context(self.model.disable_adapter())
            if self.source == "adapter":
                stack.callback(self.model.set_adapter, self.model.active_adapter)
                self.model.set_adapter(self.adapter)
            stack.enter_context(no_graph(self.model))
            return dataclasses.replace(forward, model=self.model).logps(rows).logps
