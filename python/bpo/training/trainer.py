"""Training with TRL on the pairs that were selected for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from bpo.data.rows import load_alike, load_rows
from bpo.data.tokenizers import load_tokenizer
from bpo.policy.models import window
from bpo.policy.reference import Reference
from bpo.selection.saved import PAPER
from bpo.selection.select import select, select_again, select_at_most
from bpo.selection.selection import add_ref_logps, has_ref_logps
from bpo.store.gradient_store import StoreMismatchError
from bpo.store.mirror import remove_store
from bpo.system.paths import check_not_within
from bpo.training.card import figures, tell_of_pairs
from bpo.training.checks import check_origin, check_progress, check_resampling, check_rounds, check_target
from bpo.training.config import BPOConfig, count_or_fraction
from bpo.training.load import load_to_train
from bpo.training.loop import RowNumbers, collate_rows, untouched_training
from bpo.training.resampling import kept_rows, resample
from bpo.training.rounds import SavedRounds, file_of, last_whole_checkpoint, load_rounds, save_round, store_of
from bpo.training.settings import select_settings
from bpo.training.weighting import WeightedDPOTrainer
from bpo.training.weights.progress import by_progress, learning_progress
from bpo.world.world import world

if TYPE_CHECKING:
    from bpo.config import SelectConfig
    from bpo.selection.selection import Selection


class BPOTrainer(WeightedDPOTrainer):
    """A ``DPOTrainer`` that first selects its training pairs with :func:`bpo.select`.

    All arguments but ``scorer`` and ``target`` are those of TRL's ``DPOTrainer``; ``train_dataset`` is any format that
    :func:`bpo.select` takes, and ``args`` is a :class:`BPOConfig` with a budget. The gradients are those of a fresh
    adapter on every linear layer, of the rank of ``peft_config`` where one is given, or of the adapter that the model
    has. Several processes fill the store together, so a ``store`` on a disk that all see is required.

    Selection is for the loss of ``args``. The auxiliary loss that TRL adds for mixtures of experts
    (``router_aux_loss_coef``) belongs to a batch, not to a pair, and takes no part in it.

    The selection is saved in ``output_dir/_selection``, which is not pushed to the hub, and the model card tells of it.

    With ``precompute_ref_log_probs=True`` the reference does not run a second time: training uses the log-probabilities
    that selection computed, in the precision of the model as it was loaded.

    **Rounds.** The direction of optimization moves as the policy does. With ``reselect_strategy`` the trainer selects
    again, from the same candidates and as many pairs, with the policy as it then is: its own gradients and log π(y|x),
    against log π_ref of the reference as before. An adapter that has been trained gives the gradients of its A and B,
    where a fresh one gives those of B alone, so the first round and later ones cluster different features; a model
    without an adapter gives those of a fresh one each time. Breadth is decided once, in the first round *(ours)*.
    Strategies that draw at random draw anew, with the seed plus the number of the round.

    With ``resample=m`` each later round samples m responses to each prompt from the policy as it is
    (:func:`bpo.sample_responses`), has the ``scorer`` score them (:func:`bpo.score_responses`) and selects among the
    pairs that they form, as many as before if there are so many; the reference runs over the new responses. They are in
    ``output_dir/_rounds``, too, where a training that was interrupted finds them.

    Whatever ``report_to`` names, such as TensorBoard, Trackio or Weights & Biases, gets figures of the selection with
    the first log of the training and of each round: ``selection/pairs``, ``selection/prompts``,
    ``selection/mean_depth``, ``selection/longer_share`` and, where they are known, ``selection/clusters``,
    ``selection/centrality`` and ``selection/score_gap``.

    Steps, learning rates, random states and callbacks stay as they would have been. A round of fewer pairs than the
    first is gone through more than once in what was an epoch, evenly; a round within an epoch takes over the rest of
    it. The selections are saved in ``output_dir/_rounds/round-001`` and so on, which checkpoints name with a checksum:
    resuming goes on with the very pairs. Gradients are in ``store/round-001``, a store for each round. What changed is
    logged as ``selection/round`` and ``selection/kept``, the part of the pairs that the round before had, too, and with
    ``learning_progress`` as ``selection/learning_progress``, its mean.

    Args:
        scorer: What :func:`bpo.score_responses` takes: a function, a :class:`bpo.RewardModel` or a :class:`bpo.Judge`.
        target: As for :func:`bpo.select`: a few pairs that say where to go, which ``strategy="less"`` needs. In later
            rounds the reference runs again, over its responses and the others.

    Attributes:
        selection: The :class:`bpo.Selection` that is trained on.
        selections: Those of all rounds so far, the first one's before any training.

    Raises:
        ValueError: No budget, a setting of the loss that selection does not know, or whatever :func:`bpo.select`
            refuses.
        TypeError: A reference given by path.

    Example:
        .. code-block:: python

            args = bpo.BPOConfig("out", budget=5000, reselect_strategy="epoch", resample=4)
            judge = bpo.RewardModel("my-reward-model")
            trainer = bpo.BPOTrainer("my-sft-model", args=args, train_dataset=data, scorer=judge)
            trainer.train()
            print([selection.summary() for selection in trainer.selections])
    """

    _tag_names = ("trl", "dpo", "bpo")
    _name = "BPO"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        scorer: Any = None,
        target: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, BPOConfig) or args.budget is None:
            raise ValueError("BPOTrainer needs args=bpo.BPOConfig(budget=...): how many pairs to keep.")
        if isinstance(ref_model, (str, Path)):
            raise TypeError("ref_model must be a model object, as in TRL's DPOTrainer.")
        model = str(model) if isinstance(model, Path) else model
        peft_config = kwargs.get("peft_config")
        check_origin(model, ref_model, args, peft_config)
        self._settings = select_settings(args, ref_model, peft_config)
        self._reselects = args.reselect_strategy != "no"
        if self._reselects:
            check_rounds(args, self._settings)
        fixed_reference = peft_config is not None or hasattr(model, "peft_config") or ref_model is not None
        assert not isinstance(args.columns, str)  # read by __post_init__
        self._columns: dict[str, str] = args.columns or {}
        self._candidates = load_rows(train_dataset, split=args.split, columns=self._columns)
        check_resampling(args, scorer, self._candidates, fixed_reference=fixed_reference)
        if self._reselects:
            check_target(args, target, fixed_reference=fixed_reference)
        if args.store is not None:
            check_not_within("output_dir", Path(args.output_dir), {"store": args.store})
        self._scorer = scorer
        self._target = None if target is None else load_alike(target, self._columns)
        processing_class = load_tokenizer(model, processing_class, self._settings)
        eval_dataset = self._pairs_to_evaluate(eval_dataset)
        self._window = window(model, self._settings)
        first = self._select_first(model, args, kwargs.get("quantization_config"), processing_class)
        if not self._reselects:
            del self._candidates  # whose memory the training may need
        check_progress(args, first)
        self._rounds = [(0, first)]
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            first.dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )
        if self._reselects:
            self.train_dataset: Any
            self._rows_of_epoch = len(self.train_dataset)
            self.add_callback(SavedRounds())

    def _select_first(self, model: Any, args: BPOConfig, quantization_config: Any, processing_class: Any) -> Selection:
        """Selects with the policy before any training; several processes fill the store together."""
        if PartialState().num_processes > 1 and args.store is None:
            raise ValueError(
                "With several processes BPOTrainer needs BPOConfig.store, a directory that all of them see, or an "
                "address."
            )
        assert args.budget is not None
        return select(
            load_to_train(model, args, quantization_config),
            self._candidates,
            budget=count_or_fraction(args.budget),
            breadth=None if args.breadth is None else count_or_fraction(args.breadth),
            processing_class=processing_class,
            strategy=args.strategy,
            target=self._target,
            store=store_of(0, args.store) if args.store and self._reselects else args.store,
            config=self._settings,
            seed=args.seed,
            progress=not args.disable_tqdm,
        )

    def _pairs_to_evaluate(self, dataset: Any) -> Any:
        """Returns every pair of what is to be evaluated, as TRL takes it; the name of a data set stays."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, dict):  # a DatasetDict is one, too
            return {name: _all_pairs(part, self._settings, self._columns) for name, part in dataset.items()}
        return _all_pairs(dataset, self._settings, self._columns)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in TRL, of data in any format of :func:`bpo.select`, or of a mapping of names to such data."""
        metrics: dict[str, float] = super().evaluate(
            self._pairs_to_evaluate(eval_dataset), ignore_keys, metric_key_prefix
        )
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As in TRL, of data in any format of :func:`bpo.select`."""
        prepared = self._prepare_dataset(
            self._pairs_to_evaluate(test_dataset), self.processing_class, self.args, metric_key_prefix
        )
        if self.precompute_ref_logps:
            if self.ref_model is None and not hasattr(self.model, "peft_config") and self.state.global_step > 0:
                raise ValueError(
                    "precompute_ref_log_probs takes the model before its training for the reference, which is gone: "
                    "pass the data as eval_dataset, pass ref_model, or turn precompute_ref_log_probs off."
                )
            size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            prepared = self._precompute_ref_logps(prepared, metric_key_prefix, size)
        return super().predict(prepared, ignore_keys, metric_key_prefix)

    @property
    def selections(self) -> list[Selection]:
        """The selections of all rounds so far."""
        return [selection for _, selection in self._rounds]

    @property
    def selection(self) -> Selection:
        """The selection that is trained on."""
        return self._rounds[-1][1]

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; resuming goes on from the last checkpoint that is whole, with the pairs of its round."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir) or True
        if self._reselects:
            self._restore_rounds(None if resume_from_checkpoint is True else resume_from_checkpoint)
        elif self.is_world_process_zero():
            self.selection.save(Path(self.args.output_dir) / "_selection")
        if not resume_from_checkpoint:
            self._log_selection()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card, with how the pairs were chosen."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            tell_of_pairs(Path(self.args.output_dir) / "README.md", self.selections)

    def get_train_dataloader(self) -> Any:
        """As in TRL; where rounds change the pairs, of row numbers, which become pairs when their step begins."""
        if not self._reselects:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = RowNumbers(self._rows_of_epoch), collate_rows
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As in TRL, after selecting again where it is time."""
        if self._reselects:
            self._select_again_if_due()
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._reselects:
            batches = [self._pairs_of(batch["row"]) for batch in batches]
        return batches, n_items

    def _pairs_of(self, rows: Any) -> dict[str, Any]:
        """Returns the batch of some row numbers of an epoch, over which a round of another size is spread evenly."""
        indices = [row * len(self._round_rows) // self._rows_of_epoch for row in rows.tolist()]
        batch: dict[str, Any] = self.data_collator([self._round_rows[index] for index in indices])
        return batch

    def _select_again_if_due(self) -> None:
        args, state = self.args, self.state
        if args.reselect_strategy == "epoch":
            due = int(state.epoch or 0) // int(args.reselect_epochs)
        else:
            steps = args.reselect_steps
            due = state.global_step // (math.ceil(state.max_steps * steps) if steps < 1 else int(steps))
        if due < self._rounds[-1][0]:  # the loop started over, as it does to find a batch size
            self._train_on([(number, selection) for number, selection in self._rounds if number <= due])
        elif due > self._rounds[-1][0]:
            self._select_again(due)

    def _select_again(self, number: int) -> None:
        """Selects with the policy as it is, and trains on that from now on."""
        args = self.args
        first = self._rounds[0][1]
        reference = None if args.resample is None and self._target is None else self._reference()
        settings: dict[str, Any] = {
            "processing_class": self.processing_class,
            "strategy": args.strategy,
            "target": self._target,
            "store": None if args.store is None else store_of(number, args.store),
            "config": self._settings,
            "seed": args.seed + number,
            "progress": not args.disable_tqdm,
        }
        with contextlib.ExitStack() as stack:
            for model in (self.model, self.ref_model):
                if model is not None:
                    stack.enter_context(untouched_training(model, args.device))
            rows = None if args.resample is None else self._resampled(number, settings["seed"], settings["progress"])

            def select_now() -> Selection:
                if rows is None or reference is None:
                    return select_again(self.model, self._candidates, first, reference=reference, **settings)
                return select_at_most(self.model, rows, first.budget, reference, **settings)

            try:
                selection = select_now()
            except StoreMismatchError:
                # Left by a training whose policy became another one. It is of no use to any other.
                world().from_main(lambda: remove_store(settings["store"]))
                selection = select_now()
        before = _contents(self.selection)
        kept = [pair in before for pair in _contents(selection)]
        self._train_on([*self._rounds, (number, selection)])
        self._keep_round(number, selection)
        self._log_selection(**{"selection/round": number, "selection/kept": sum(kept) / len(kept)})

    def _log_selection(self, **more: float) -> None:
        """Has the next log say what is trained on, whatever ``report_to`` names; the last of several rounds."""
        for name, value in {**figures(self.selection), **more}.items():
            self._metrics["train"][name] = [value]

    def _resampled(self, number: int, seed: int, progress: bool) -> list[dict[str, Any]]:
        """Returns new responses to the prompts of the first round, with their scores; all processes make them."""
        return resample(
            self.model,
            kept_rows(self._candidates, self._rounds[0][1]),
            self._scorer,
            n_responses=self.args.resample,
            file=file_of(number, self.args.output_dir),
            processing_class=self.processing_class,
            seed=seed,
            progress=progress,
            **(self.args.resample_config or {}),
        )

    def _reference(self) -> Reference:
        """Returns what TRL compares the policy with, as it is to run over new responses."""
        if self.ref_model is not None:
            return Reference.by(self.accelerator.unwrap_model(self.ref_model))
        adapters = getattr(self.model, "peft_config", {})
        return Reference.with_adapter(self.model, "ref" if "ref" in adapters else None)

    def _restore_rounds(self, checkpoint: str | None) -> None:
        """Goes back to the rounds of a checkpoint, or to the first one."""
        loaded = load_rounds(checkpoint) if checkpoint else []
        self._train_on([(number, selection) for number, selection, _ in loaded] or self._rounds[:1])
        self._record.saved = [[number, checksum] for number, _, checksum in loaded]
        if not loaded or Path(str(checkpoint)).resolve().parent != Path(self.args.output_dir).resolve():
            for number, selection in self._rounds:
                self._keep_round(number, selection)

    def _train_on(self, rounds: list[tuple[int, Selection]]) -> None:
        """Trains on the last of some rounds."""
        if rounds[-1][1] is not self.selection:
            with untouched_training(self.model, self.args.device):
                dataset = self._prepare_dataset(self._weighed(rounds), self.processing_class, self.args, "train")
                if self.precompute_ref_logps:
                    self.train_dataset = dataset  # which tells it from other data
                    size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
                    dataset = self._precompute_ref_logps(dataset, "train", size)
            self.train_dataset = dataset
        self._round_rows = self._remove_unused_columns(self.train_dataset, description="training")
        self._rounds = rounds

    def _weighed(self, rounds: list[tuple[int, Selection]]) -> Any:
        """Returns the pairs of the last of some rounds, weighted by learning progress if asked for."""
        dataset, args = rounds[-1][1].dataset, self.args
        if args.learning_progress is None or len(rounds) == 1:
            return dataset
        progress = learning_progress([selection for _, selection in rounds], args.learning_progress_decay)
        self._metrics["train"]["selection/learning_progress"] = [float(progress.mean())]
        return by_progress(dataset, progress, args.learning_progress, args.weight_column)

    def _keep_round(self, number: int, selection: Selection) -> None:
        """Saves a round for whoever resumes."""
        if self.args.should_save:
            checksum = save_round(selection, number, self.args.output_dir)
            earlier = [saved for saved in self._record.saved if saved[0] < number]
            self._record.saved = [*earlier, [number, checksum]]

    @property
    def _record(self) -> SavedRounds:
        """What checkpoints note of the rounds; Trainer may put another object in its place when it resumes."""
        record: SavedRounds = next(
            callback for callback in self.callback_handler.callbacks if isinstance(callback, SavedRounds)
        )
        return record

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """Adds log π_ref of the selected pairs, which selecting computed; TRL computes that of other data."""
        if dataset is self.train_dataset and has_ref_logps(dataset) and self._cuts_as_selected(dataset):
            return add_ref_logps(dataset)
        frozen = self.ref_model is not None or hasattr(self.model, "peft_config")
        if self._reselects and dataset is self.train_dataset and not frozen:
            raise ValueError(
                "precompute_ref_log_probs takes the model before its training for the reference, which rounds need "
                f"later, too: strategy={self.args.strategy!r} computes no log-probabilities, or a sequence is longer "
                f"than the {self._window} tokens of the model. Pass ref_model, or turn precompute_ref_log_probs off."
            )
        return super()._precompute_ref_logps(dataset, *args)

    def _cuts_as_selected(self, dataset: Any) -> bool:
        """Whether no sequence is longer than what the model was made for, where selection cuts and TRL does not."""
        if self._window in (None, self.args.max_length):
            return True
        return all(
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= self._window
            for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        )


def _contents(selection: Selection) -> set[str]:
    """What the pairs of a selection say."""
    columns = (selection.dataset[name] for name in ("prompt", "chosen", "rejected"))
    return {json.dumps(pair) for pair in zip(*columns, strict=True)}


def _all_pairs(dataset: Any, settings: SelectConfig, columns: dict[str, str]) -> Any:
    """Returns preference rows as they are, and every pair of scored responses or of columns with other names."""
    there = set(getattr(dataset, "column_names", None) or [])
    if {"chosen", "rejected"} <= there and not there & set(columns.values()):
        return dataset
    # Without what belongs to training.
    rows = load_alike(dataset, columns)
    names, tokens = set(rows.column_names), settings.token_weights
    # What is evaluated may have no weights; those of records are found when they are read.
    weighed = not {"scores", "chosen"} & names or bool({tokens, f"{tokens}_chosen"} & names)
    every = dataclasses.replace(
        settings,
        max_depth=None,
        length_control=None,
        reference_logps=False,
        token_weights=tokens if weighed else None,
    )
    return select(None, rows, budget=1.0, strategy="random", config=every, progress=False, evidence=False).dataset
