import numpy as np
import pytest

from bpo import read_candidates
from bpo.tokens import batches_by_tokens, check_tokenizer, tokenize_responses
from conftest import scored_rows


@pytest.mark.parametrize("conversational", [False, True])
def test_same_tokens_as_dpo_trainer(tokenizer, model_path, tmp_path, conversational):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    candidates = read_candidates(scored_rows(4, 3, conversational=conversational))
    tokenized, fits, _ = tokenize_responses(candidates, tokenizer, 1024)
    assert fits.all()
    rows = [
        {
            "prompt": candidates.prompts[prompt],
            "chosen": candidates.responses[chosen],
            "rejected": candidates.responses[rejected],
        }
        for prompt, (chosen, rejected) in zip(candidates.prompt_of_pair, candidates.pairs, strict=True)
    ]
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    trainer = DPOTrainer(model_path, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for (chosen, rejected), row in zip(candidates.pairs, trainer.train_dataset, strict=True):
        for side, index in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            boundary = tokenized.prompt_lengths[index]
            assert tokenized.ids[index][:boundary] == row["prompt_ids"]
            assert tokenized.ids[index][boundary:] == row[side]


def test_a_prompt_that_is_no_token_prefix_is_counted(tokenizer):
    rows = [{"prompt": "re", "responses": ["d green", "gg"], "scores": [1, 0]}]
    with pytest.warns(UserWarning, match="not a prefix"):
        tokenize_responses(read_candidates(rows), tokenizer, 100)


def test_prompts_that_fill_the_window_are_named(tokenizer):
    rows = [
        {"prompt": "red " * 60, "responses": ["cat", "dog"], "scores": [1, 0]},
        {"prompt": "red", "responses": ["cat " * 60, "dog"], "scores": [1, 0]},
    ]
    tokenized, fits, skipped = tokenize_responses(read_candidates(rows), tokenizer, 20)
    assert fits.tolist() == [False, True]
    assert skipped.describe().startswith("1 × prompt fills the window of 20 tokens (row 0, ")
    assert tokenized.truncated == 1
    assert max(tokenized.lengths) == 20


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('no system role') }}", "Row 0: the chat template fails on the roles .*no system role"),
        ("{{ messages[0]['content'] + 3 }}", "Row 0: the chat template fails"),
        ("{{ messages[0]['content'] }}", "Row 0: no token of a response follows the prompt"),
        ("", "Row 0: the tokenizer gives no tokens"),
    ],
)
def test_templates_that_fail_name_the_row(tokenizer, template, expected):
    import copy

    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(ValueError, match=expected):
        tokenize_responses(read_candidates(scored_rows(1, 2, conversational=True)), broken, 100)


def test_tokenizers_that_cannot_serve_are_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_tokenizer(bare, conversational=True)
    check_tokenizer(bare, conversational=False)
    bare.pad_token = None
    check_tokenizer(bare, conversational=False)  # padded with the end token, as TRL does
    bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        check_tokenizer(bare, conversational=False)


def test_batches_cover_everything_in_one_order():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    orders = [np.concatenate(batches_by_tokens(lengths, budget)) for budget in (1, 64, 1000)]
    assert sorted(orders[0]) == list(range(200))
    for order in orders[1:]:
        np.testing.assert_array_equal(order, orders[0])
    for batch in batches_by_tokens(lengths, 64):
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 64
