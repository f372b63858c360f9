"""Pairs of steps: Step-DPO (arXiv 2406.18629)."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpo
from bpo import SelectConfig, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from tiny import hooked, tiny_llama

TREES = [
    {
        "prompt": "red cat?",
        "steps": [
            {
                "text": " one star.",
                "steps": [
                    {"text": " two", "score": 1.0},
                    {"text": " three bird", "score": 0.5},
                    {"text": " bread", "steps": [{"text": " milk", "score": 0.0}]},
                ],
            },
            {"text": " moon tea.", "score": 0.25, "ends": False},
        ],
    },
    {"prompt": "sun?", "steps": [{"text": " north", "score": 2}, {"text": " south west", "score": 3}]},
]
EXPECTED = {  # prompt, chosen, rejected → scores, tree, step, and whether each goes on
    ("red cat?", " one star.", " moon tea."): (0.5, 0.25, 0, 0, True, True),
    ("red cat? one star.", " two", " three bird"): (1.0, 0.5, 0, 1, False, False),
    ("red cat? one star.", " two", " bread"): (1.0, 0.0, 0, 1, False, True),
    ("red cat? one star.", " three bird", " bread"): (0.5, 0.0, 0, 1, False, True),
    ("sun?", " south west", " north"): (3.0, 2.0, 1, 0, False, False),
}


@pytest.mark.parametrize("form", ["list", "file"])
def test_a_row_is_where_a_tree_branches(form, tokenizer, tmp_path):
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in TREES))
    pairs = bpo.step_pairs(TREES if form == "list" else str(tmp_path / "trees.jsonl"), tokenizer)
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs} == set(EXPECTED)
    for row in pairs:
        better, worse, tree, step, *goes_on = EXPECTED[row["prompt"], row["chosen"], row["rejected"]]
        assert (row["score_chosen"], row["score_rejected"], row["tree"], row["step"]) == (better, worse, tree, step)
        for side, on in zip(("chosen", "rejected"), goes_on, strict=True):
            length = len(tokenizer(row[side])["input_ids"])
            assert row[f"step_tokens_{side}"] == [1.0] * length + [0.0 if on else 1.0]


def logp(model, tokenizer, context, text):
    """log π(text | context), written out, with no end token."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + text)["input_ids"]
    logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    return sum(logps[at - 1, ids[at]] for at in range(start, len(ids)))


def test_gradients_and_losses_are_those_of_the_steps_alone(tokenizer, tmp_path):
    policy, reference = tiny_llama(tokenizer), tiny_llama(tokenizer, initializer_range=0.25)
    pairs = bpo.step_pairs(TREES, tokenizer, leaves_end=False, name="w")
    candidates = read_candidates(pairs, token_weights="w")
    tokenized = tokenize_responses(candidates, tokenizer, 256)[0]
    features = choose_features(policy, SelectConfig(features="full"))
    found, _ = hooked(policy, features, tokenized, np.arange(len(tokenized.ids)))
    row = pairs[int(candidates.pair_rows[0])]
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    exact = torch.autograd.grad(logp(policy, tokenizer, row["prompt"], row["chosen"]), list(policy.parameters()))
    exact = torch.cat([gradient.flatten() for gradient in exact])
    assert float((found[tokenized.pairs[0, 0]] - exact).norm() / exact.norm()) < 1e-5

    args = bpo.WeightedDPOConfig(
        str(tmp_path), token_weights="w", beta=0.3, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True
    )
    trainer = bpo.WeightedDPOTrainer(policy, reference, args, train_dataset=pairs, processing_class=tokenizer)
    for row in trainer.train_dataset:
        steps = [(row["prompt"], row["chosen"].removesuffix("<|im_end|>"))]
        steps.append((row["prompt"], row["rejected"].removesuffix("<|im_end|>")))
        ratios = [logp(policy, tokenizer, *step) - logp(reference, tokenizer, *step) for step in steps]
        expected = -F.logsigmoid(0.3 * (ratios[0] - ratios[1])).item()
        value = trainer.compute_loss(trainer.model, trainer.data_collator([row])).item()
        assert value == pytest.approx(expected, rel=1e-4)


def test_messages_become_the_text_that_the_template_makes(tokenizer):
    prompt = [{"role": "user", "content": "red cat?"}]
    pairs = bpo.step_pairs([{"prompt": prompt, "steps": TREES[1]["steps"]}], tokenizer)
    assert pairs["prompt"][0] == tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    chat = tokenize_responses(
        read_candidates(
            [
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": "one"}],
                    "rejected": [{"role": "assistant", "content": "two"}],
                }
            ]
        ),
        tokenizer,
        None,
    )[0]
    text = tokenize_responses(read_candidates([{**pairs[0], "chosen": "one", "rejected": "two"}]), tokenizer, None)[0]
    assert chat.ids[0][: len(text.ids[0])] == text.ids[0]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"prompt": "p"}], "Row 0: a tree has a prompt and steps"),
        ([{"prompt": "p", "steps": "a"}], "Row 0: steps must be a list of nodes, got str"),
        ([{"prompt": "p", "steps": [{"text": ""}]}], "Row 0, step 0: a node is a mapping with a text"),
        ([{"prompt": "p", "steps": [{"text": "a", "score": 1}]}], "nothing to compare"),
        ([{"prompt": "p", "steps": [{"text": "a", "score": 1}, {"text": "b"}]}], "step 'b': it has no score"),
        (
            [{"prompt": "p", "steps": [{"text": "a", "score": 1}, {"text": "b", "score": float("nan")}]}],
            "step 'b': .*score",
        ),
        ([{"prompt": 3, "steps": []}], "Row 0: .*prompt"),
    ],
)
def test_what_is_no_tree_is_named(rows, match, tokenizer):
    with pytest.raises(ValueError, match=match):
        bpo.step_pairs(rows, tokenizer)
