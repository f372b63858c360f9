"""Sampling from a model: each response has random numbers of its own, and interrupted runs go on."""

import json

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import bpo
from bpo.responses.generation import draw_tokens
from bpo.responses.prompts import read_responses
from bpo.responses.sampling import is_refusal
from bpo.responses.sources import random_stream
from tiny import scored_rows, tiny_gpt2, tiny_llama

PROMPTS = [f"{index} red {'cat dog ' * (index % 4)}?" for index in range(7)]
SETTINGS = {"max_new_tokens": 12, "keep": ["truncated"], "progress": False}


def sample(model, tokenizer, prompts=PROMPTS, n_responses=3, **changes):
    return bpo.sample_responses(model, prompts, n_responses, processing_class=tokenizer, **{**SETTINGS, **changes})


def by_prompt(dataset):
    return {json.dumps(row["prompt"]): row["responses"] for row in dataset}


def test_responses_depend_on_neither_batch_order_nor_the_other_prompts(model, tokenizer):
    responses = by_prompt(sample(model, tokenizer))
    assert len({response for texts in responses.values() for response in texts}) > 18
    for changes in ({"batch_size": 1}, {"batch_size": 7}, {"prompts": PROMPTS[::-1]}):
        assert by_prompt(sample(model, tokenizer, **changes)) == responses
    some = by_prompt(sample(model, tokenizer, PROMPTS[2:4]))
    assert some == {prompt: responses[prompt] for prompt in some}
    more = by_prompt(sample(model, tokenizer, n_responses=5))
    assert all(more[prompt][: len(texts)] == texts for prompt, texts in responses.items())
    assert by_prompt(sample(model, tokenizer, seed=1)) != responses


def test_tokens_follow_the_distribution():
    """The shares of many draws against softmax and nucleus, within four standard errors."""
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 2.0])
    draws = 20000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(draws))
    for temperature, top_p, kept in ((1.0, 1.0, [0, 1, 2, 3, 4]), (0.7, 0.9, [0, 2, 4])):
        expected = torch.softmax(logits / temperature, 0)
        expected = torch.where(torch.isin(torch.arange(5), torch.tensor(kept)), expected, 0.0)
        expected /= expected.sum()
        tokens = draw_tokens(logits.expand(draws, 5), uniforms, temperature, top_p)
        shares = torch.bincount(tokens, minlength=5) / draws
        assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all()
    # The nucleus may be larger than what is sorted first, and the extremes of the distribution are never left.
    flat = torch.zeros(3, 5000)
    chosen = draw_tokens(flat, torch.tensor([0.0, 0.50001, 1 - 2**-53], dtype=torch.float64), 1.0, 0.99)
    assert chosen.tolist() == [0, 2500, 4999]
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw_tokens(torch.full((1, 4), torch.nan), torch.tensor([0.5], dtype=torch.float64), 1.0, 0.9)


def test_greedy_limit_is_what_generate_gives(model, tokenizer):
    dataset = sample(model, tokenizer, PROMPTS[:3], 2, temperature=1e-6)
    for row in dataset:
        assert len(row["responses"]) == 1 and row["dropped"]["duplicate"] == 1
        ids = tokenizer(row["prompt"], return_tensors="pt")
        tokens = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        assert row["responses"] == [tokenizer.decode(tokens, skip_special_tokens=True)]


def test_streams_are_prefixes_and_differ():
    assert np.array_equal(random_stream(0, b"prompt", 1, 5), random_stream(0, b"prompt", 1, 9)[:5])
    streams = [random_stream(*key, 4)[0] for key in ((0, b"a", 0), (0, b"a", 1), (1, b"a", 0), (0, b"b", 0))]
    assert len(set(streams)) == 4


def test_memory_that_does_not_suffice_halves_the_batches(tokenizer):
    model = tiny_llama(tokenizer)
    expected = by_prompt(sample(model, tokenizer))
    generate, sizes = model.generate, []

    def scarce(**keywords):
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return generate(**keywords)

    model.generate = scarce
    limit = 9
    with pytest.warns(UserWarning, match="does not suffice for 5 prompts at once; going on with 2"):
        assert by_prompt(sample(model, tokenizer, batch_size=15)) == expected
    assert sizes == [15, 6, 6, 3, 6]
    limit = 2
    with pytest.raises(MemoryError, match=r"3 responses to one prompt \(row 3\)"), pytest.warns(UserWarning):
        sample(model, tokenizer)


class StopError(Exception):
    pass


def test_interrupted_run_goes_on_to_the_same_file(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    settings = {"batch_size": 6}  # two prompts
    expected = sample(model, tokenizer, output=whole, **settings)
    generate, calls = model.generate, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise StopError
        return generate(*arguments, **keywords)

    model.generate = failing
    with pytest.raises(StopError):
        sample(model, tokenizer, output=part, **settings)
    done = part.read_bytes()
    assert done.count(b"\n") == 4
    # A kill in the middle of a write: in the middle of the last line, which is made again.
    part.write_bytes(done[:-20])
    assert sample(model, tokenizer, output=part, **settings).to_list() == expected.to_list()
    assert part.read_bytes() == whole.read_bytes() and len(calls) == 6
    assert [json.loads(line)["prompt"] for line in part.read_text().splitlines()] == PROMPTS
    del model.generate
    assert sample(model, tokenizer, output=part, **settings).to_list() == expected.to_list()

    with pytest.raises(ValueError, match=r"other settings: temperature \(1.0 there, 0.5 now\)"):
        sample(model, tokenizer, output=part, temperature=0.5)
    with pytest.raises(ValueError, match=r"other settings: model\.weights"):
        sample(tiny_llama(tokenizer, num_hidden_layers=1), tokenizer, output=part)
    with pytest.raises(ValueError, match="holds 1 rows that were made from other prompts"):
        sample(model, tokenizer, PROMPTS[1:], output=part)
    empty = tmp_path / "empty.jsonl"
    model.generate = lambda **_: calls[99]
    with pytest.raises(IndexError):
        sample(model, tokenizer, output=empty, temperature=0.5)
    del model.generate
    sample(model, tokenizer, PROMPTS[:1], output=empty)  # nothing was written with the other temperature

    more = sample(model, tokenizer, [*PROMPTS, "bird"], output=part)
    assert len(more) == 8 and more.to_list()[:7] == expected.to_list()
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match=r"without other\.manifest\.json"):
        sample(model, tokenizer, output=tmp_path / "other.jsonl")


def test_model_in_training_is_left_as_it_was(tokenizer):
    base = tiny_llama(tokenizer)
    base.generation_config.repetition_penalty = 5.0
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    before = by_prompt(sample(model, tokenizer))
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = torch.get_rng_state()
    assert by_prompt(sample(model, tokenizer)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert before != by_prompt(sample(tiny_llama(tokenizer), tokenizer)), "the adapter must have had a say"
    assert model.training and model.config.use_cache is False and model.active_adapters == ["default"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert base.generation_config.repetition_penalty == 5.0 and base.model.gradient_checkpointing
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    # Penalties saved with the model are not applied: its own distribution is sampled from.
    base.generation_config.repetition_penalty = 1.0
    assert by_prompt(sample(model, tokenizer)) == before


def test_conversations_go_through_the_template_and_end_at_the_end_token(model, model_path, tokenizer):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    # At this temperature the tiny model is near to uniform over its 300 tokens, so that some responses end.
    settings = {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 150, "n_responses": 6}
    kept = sample(model, tokenizer, chats, **settings)
    dropped = sample(model_path, None, chats, **{**settings, "keep": []})
    assert sum(row["dropped"]["truncated"] for row in kept) == 0
    assert 0 < sum(row["dropped"]["truncated"] for row in dropped) < 18
    for row, all_of_it in zip(dropped, kept, strict=True):
        assert row["prompt"] == all_of_it["prompt"] and set(row["responses"]) < set(all_of_it["responses"])
        assert len(row["responses"]) + sum(row["dropped"].values()) == 6
    summary = bpo.describe_responses(dropped)
    assert summary.n_responses == sum(map(len, dropped["responses"])) and "truncated" in str(summary)


def test_prompts_come_in_every_format_with_their_columns(model, tokenizer):
    rows = [
        {"prompt": "one", "chosen": " cat", "rejected": " dog", "score_chosen": 2.0, "score_rejected": 1.0, "id": "a"},
        {"prompt": "two", "chosen": " red", "rejected": " blue", "score_chosen": 1.0, "score_rejected": 0.0, "id": "b"},
        {"prompt": "one", "chosen": " sun", "rejected": " dog", "score_chosen": 3.0, "score_rejected": 1.0, "id": "c"},
    ]
    new = sample(model, tokenizer, datasets.Dataset.from_list(rows))
    assert new["prompt"][:] == ["one", "two"] and new["id"][:] == ["a", "b"] and "scores" not in new.column_names
    assert by_prompt(sample(model, tokenizer, datasets.Dataset.from_list(rows)["prompt"])) == by_prompt(new)
    both = sample(model, tokenizer, rows, keep_existing=True)
    assert both[0]["responses"] == [" cat", " dog", " sun", *new[0]["responses"]]
    assert both[0]["scores"] == [2.0, 1.0, 3.0, None, None, None]
    feedback = [{"instruction": "one", "completions": [{"response": " cat", "overall_score": 1.0}]}]
    assert by_prompt(sample(model, tokenizer, feedback)) == {'"one"': new[0]["responses"]}
    chat = scored_rows(2, 2, conversational=True)
    two_turns = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    chat[1]["responses"][0] = [*two_turns, {"role": "assistant", "content": "three"}]
    mixed = sample(model, tokenizer, chat, keep_existing=True)
    assert mixed[1]["responses"][0][2]["content"] == "three"
    assert mixed[0]["responses"][2][0]["role"] == "assistant"
    scored = bpo.score_responses(mixed, lambda prompt, response: len(str(response)), progress=False)
    assert len(bpo.read_candidates(scored).responses) == 10 and scored[0]["dropped"] == mixed[0]["dropped"]
    with pytest.raises(ValueError, match="'promt' looks like 'prompt'"):
        sample(model, tokenizer, [{"promt": "one"}])
    with pytest.warns(bpo.InvalidDataWarning, match=r"some prompts are text and some are messages.*\(row 1\)"):
        assert sample(model, tokenizer, ["one", [{"role": "user", "content": "two"}]])["prompt"][:] == ["one"]


def test_prompts_that_leave_no_room_are_set_aside(tokenizer):
    model = tiny_gpt2(tokenizer)  # learned positions, 256 of them
    with pytest.warns(bpo.InvalidDataWarning, match=r"leaves no 12 tokens of 256 to respond \(row 1\)"):
        dataset = sample(model, tokenizer, ["cat", "dog " * 250, "bird"])
    assert dataset["prompt"][:] == ["cat", "bird"]
    assert by_prompt(sample(model, tokenizer, ["cat", "bird"], batch_size=1)) == by_prompt(dataset)


def test_settings_out_of_range_are_refused_by_name(model, tokenizer):
    for changes, message in (
        ({"n_responses": 0}, "n_responses must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"keep": ["everything"]}, "keep must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"prompts": []}, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, tokenizer, **changes)
    with pytest.raises(ValueError, match=r"Not one response is left.*19 truncated.*larger max_new_tokens"):
        sample(model, tokenizer, keep=(), max_new_tokens=1)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I can’t help with that.", True),
        ("I cannot assist with this request", True),
        ("**I'm sorry, but as an AI language model, I can't write that.**", True),
        ("Unfortunately, I am unable to answer.", True),
        ("Je suis désolé, mais je ne peux pas vous aider.", True),
        ("Lo siento, pero no puedo ayudarte con eso.", True),
        ("Извините, я не могу помочь с этим.", True),
        ("很抱歉，我不能提供这些信息。", True),
        ("申し訳ありませんが、そのご質問にはお答えできません。", True),
        ("I'm sorry to hear that your dog is ill. First, call a vet.", False),
        ("As an AI, I have no feelings, but people say it tastes sweet.", False),
        ("Sorry is what one says after a mistake.", False),
        ("You cannot help but smile.", False),
        ("Ich kann dir das Buch empfehlen.", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text, refusal):
    assert is_refusal(text) is refusal


def test_tool_calls_and_template_settings_are_part_of_a_prompt():
    question = [{"role": "user", "content": "one"}]
    rows = [
        {"prompt": question, "chat_template_kwargs": {"thinking": True}},
        {"prompt": question, "chat_template_kwargs": {"thinking": False}},
    ]
    read = read_responses(rows, prompts_only=True)
    assert [row.template_kwargs for row in read] == [{"thinking": True}, {"thinking": False}]
    assert read[0].key != read[1].key and read[0].columns == {"chat_template_kwargs": {"thinking": True}}


def test_a_bad_output_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"responses.json: output must be a file that ends in \.jsonl"):
        bpo.sample_responses("./no-such-model", ["2+2?"], output=tmp_path / "responses.json")
