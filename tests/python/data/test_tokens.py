import copy
import json
import warnings

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BloomConfig, BloomModel, ByT5Tokenizer, PreTrainedTokenizerFast

import bpo
from bpo import SelectConfig, read_candidates
from bpo.data.tokenizers import check_tokenizer
from bpo.data.tokens import tokenize_candidates, tokenize_responses
from bpo.gradients.parameters import FreshAdapter
from bpo.policy.batches import batches_by_tokens, first_batch, storage_order
from bpo.policy.logprobs import Forward, response_logps
from bpo.policy.models import window
from tiny import CHAT_TEMPLATE, WORDS, hooked, scored_rows, tiny_llama


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "red green blue"}
LONG = "star tea milk " * 30
STANDARD = [
    {"prompt": "red cat?", "chosen": " blue dog", "rejected": " one"},
    # "re" + "d" is one token: the responses start at other places in other pairs of the prompt.
    {"prompt": "one re", "chosen": "d green", "rejected": " two"},
    {"prompt": "one re", "chosen": " blue", "rejected": " two"},
    {"prompt": "one re", "chosen": " blue", "rejected": "d green"},
    {"prompt": "three b", "chosen": "read", "rejected": "ird two"},
    {"prompt": "dog ", "chosen": "cat", "rejected": " cat"},  # a space at the end
    {"prompt": "", "chosen": "moon star", "rejected": "sun"},
    {"prompt": "sun 🙂", "chosen": "🙃 tea", "rejected": "🙂 é漢"},
    {"prompt": "sun\n", "chosen": "tea<|im_end|>", "rejected": "<|im_start|>tea<|im_end|> milk"},
    {"prompt": LONG, "chosen": "north", "rejected": "south " + LONG},
    {"prompt": "west?", "chosen": LONG, "rejected": "east"},
]
IMPLICIT = [
    {"chosen": "red cat? blue dog", "rejected": "red cat? one"},
    {"chosen": "red cat?  blue", "rejected": "red cat?  one"},
    {"chosen": "one red green", "rejected": "one reg"},
    {"chosen": "a b", "rejected": "a c"},
    {"chosen": "sun 🙂🙃 tea", "rejected": "sun 🙂é"},
    {"chosen": "tea milk bread", "rejected": "tea milk"},  # one is the beginning of the other
    {"chosen": LONG + "north", "rejected": LONG + "south " + LONG},
]
CONVERSATIONS = [
    {"prompt": [user("red cat?")], "chosen": [assistant("blue dog")], "rejected": [assistant("one")]},
    {"prompt": [SYSTEM, user("red?")], "chosen": [assistant(" blue")], "rejected": [assistant(" ")]},
    {
        "prompt": [user("red?"), assistant("blue"), user("two 🙂")],
        "chosen": [assistant("one"), user("two"), assistant("three")],
        "rejected": [assistant("one <|im_end|>\n")],
    },
    {"prompt": [user(LONG)], "chosen": [assistant("north")], "rejected": [assistant(LONG)]},
]
IMPLICIT_CONVERSATIONS = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CONVERSATIONS
] + [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c"), assistant("d")]}]
# Renders the prompt alone, but not the whole conversation, with an empty thought.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def trainer(tokenizer, model_path, tmp_path_factory):
    """One of TRL's own, for its tokenization."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(tmp_path_factory.mktemp("out")), report_to="none", bf16=False, use_cpu=True)
    rows = datasets.Dataset.from_list(STANDARD[:1])
    return DPOTrainer(model_path, args=args, train_dataset=rows, processing_class=copy.deepcopy(tokenizer))


def sequences_of_trl(trainer, rows, tokenizer, max_length, truncation_mode):
    """Row → token ids and completion masks of chosen and rejected, as the model gets them."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer._tokenizer = tokenizer
    args = copy.copy(trainer.args)
    args.max_length, args.truncation_mode = max_length, truncation_mode
    prepared = trainer._prepare_dataset(rows.add_column("row", range(len(rows))), tokenizer, args, "train")
    collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length, truncation_mode)
    sequences = {}
    for row in prepared:
        batch = collator([row])
        sequences[row["row"]] = [
            (ids[attended.bool()].tolist(), completion[attended.bool()].tolist())
            for ids, attended, completion in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
    return sequences


def sequences_of_bpo(rows, tokenizer, max_length, truncation_mode, by_pair=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        candidates, tokenized = tokenize_candidates(
            read_candidates(rows), tokenizer, max_length, truncation_mode=truncation_mode, on_invalid="skip"
        )
    return {
        row: [
            (ids, [0] * start + [1] * (len(ids) - start))
            for ids, start in ((tokenized.ids[side], int(tokenized.prompt_lengths[side])) for side in pair)
        ]
        for row, pair in zip(
            range(len(tokenized.pairs)) if by_pair else candidates.pair_rows.tolist(), tokenized.pairs, strict=True
        )
    }


def with_special_tokens(tokenizer, template):
    """A copy that adds a first, or a last token to plain text."""
    changed = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return changed


def metaspace(_):
    """As of SentencePiece: a space before everything, and tokens that reach across spaces."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    raw.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<unk>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(
    params=[
        lambda plain: plain,
        lambda plain: with_special_tokens(plain, "<|im_start|> $A"),
        lambda plain: with_special_tokens(plain, "<|im_start|> $A <|im_end|>"),
        metaspace,
        lambda _: ByT5Tokenizer(),  # in Python; ends a text unless it has an end
    ],
    ids=["bytes", "bos", "bos and eos", "metaspace", "slow"],
)
def any_tokenizer(request, tokenizer):
    return request.param(tokenizer)


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("rows", [STANDARD, IMPLICIT], ids=["explicit", "implicit"])
def test_same_tokens_as_dpo_trainer_for_plain_text(trainer, any_tokenizer, rows, truncation_mode):
    rows = datasets.Dataset.from_list(rows)
    for max_length in (None, 1024, 40, 7, 4):
        expected = sequences_of_trl(trainer, rows, any_tokenizer, max_length, truncation_mode)
        assert sequences_of_bpo(rows, any_tokenizer, max_length, truncation_mode) == expected
        assert len(expected) == len(rows) or (truncation_mode == "keep_start" and max_length <= 40)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING], ids=["chatml", "thinking"])
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("rows", [CONVERSATIONS, IMPLICIT_CONVERSATIONS], ids=["explicit", "implicit"])
def test_same_tokens_as_dpo_trainer_for_conversations(trainer, tokenizer, rows, truncation_mode, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    rows = datasets.Dataset.from_list(rows)
    for max_length in (None, 1024, 60, 30):
        expected = sequences_of_trl(trainer, rows, changed, max_length, truncation_mode)
        assert sequences_of_bpo(rows, changed, max_length, truncation_mode) == expected


# Shows everything that it is given, and tells None from nothing.
CURIOUS = (
    "{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}"
    "{% if style is defined %}style {{ style }}{% endif %}"
    "{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>{"content": {% endif %}'
)


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": properties}}


def call(**arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


TOOLS = [
    {"tools": [tool("f", x={"type": "int"})]},
    {
        "tools": [tool("g", y={"type": "str", "enum": ["é", "b"]}), tool("h")],
        "chat_template_kwargs": {"style": "short"},
    },
    {"chat_template_kwargs": {"documents": [{"title": "t", "text": "u"}]}},
    {},
]


@pytest.mark.parametrize("as_json", [False, True])
def test_same_tokens_as_dpo_trainer_with_tools(trainer, tokenizer, as_json):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CURIOUS
    rows = [{**row, **settings} for row, settings in zip(CONVERSATIONS, TOOLS, strict=True)]
    rows += [{**CONVERSATIONS[0], **settings} for settings in TOOLS[1:]]  # the same prompt with other tools
    for row in rows:
        row.setdefault("chat_template_kwargs", {})  # TRL fails on None
        if as_json and "tools" in row:
            row["tools"] = json.dumps(row["tools"])
    dataset = datasets.Dataset.from_list(rows)
    for name in ("prompt", "chosen", "rejected"):  # older versions of Arrow sort the keys, which this template prints
        dataset = dataset.cast_column(name, datasets.List(dict.fromkeys(("role", "content"), datasets.Value("string"))))
    expected = sequences_of_trl(trainer, dataset, changed, 1024, "keep_start")
    assert sequences_of_bpo(dataset, changed, 1024, "keep_start") == expected
    assert len(read_candidates(dataset).prompts) == 7
    selected = bpo.select(None, dataset, budget=7, strategy="random", progress=False).dataset
    assert sequences_of_trl(trainer, selected, changed, 1024, "keep_start") == expected
    if as_json:  # else Arrow fills the tools of a list of rows, too
        assert sequences_of_bpo(rows, changed, 1024, "keep_start") == expected


@pytest.mark.parametrize("scored", [False, True])
def test_tool_calls_reach_the_trainer_as_they_were_tokenized(trainer, tokenizer, tmp_path, scored):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CURIOUS
    answers = [[call(x=1)], [call(y="a", z=[None, 2.5])], [assistant("no tool")]]
    prompts = [[user("red?")], [user("red?"), call(q=[]), {"role": "tool", "content": "7"}]]
    rows = [
        {"prompt": prompt, "responses": answers, "scores": [2, 1, 0], "tools": [tool("f"), tool("g", x=1)]}
        for prompt in prompts
    ]
    if not scored:
        rows = [
            {"prompt": prompt, "chosen": answers[0], "rejected": answers[2], "chat_template_kwargs": settings}
            for prompt, settings in zip(prompts, ({}, {"style": None}), strict=True)
        ]
    selection = bpo.select(None, rows, budget=1.0, strategy="random", progress=False)
    selection.save(tmp_path)
    for dataset in (selection.dataset, bpo.Selection.load(tmp_path).dataset):
        expected = sequences_of_trl(trainer, dataset, changed, 1024, "keep_start")
        ours = sequences_of_bpo(rows, changed, 1024, "keep_start", by_pair=True)
        assert list(ours.values()) == list(expected.values())
        assert len(expected) == (6 if scored else 2)


def test_a_response_is_a_sequence_for_each_place_where_it_starts(tokenizer):
    """ "one re" + "d green" starts a token earlier than "one re" + " two", and so does what it is paired with."""
    candidates = read_candidates(STANDARD[1:4])
    with pytest.warns(UserWarning, match="1 of 1 tokenized prompts are not a prefix .* in 2 of 3 pairs"):
        tokenized, fits, _ = tokenize_responses(candidates, tokenizer, 100)
    responses = [candidates.responses[response] for response in tokenized.response_of]
    assert fits.all() and responses == ["d green", " two", " two", " blue", " blue"]
    assert tokenized.pairs.tolist() == [[0, 1], [4, 2], [3, 0]]
    starts = tokenized.prompt_lengths
    assert starts[0] == starts[1] == starts[3] == starts[2] - 1 == starts[4] - 1
    same = (tokenized.sequence_ids == candidates.response_ids[tokenized.response_of]).all(axis=1)
    assert same.tolist() == [True, False, True, False, True]
    assert len(np.unique(tokenized.sequence_ids, axis=0)) == 5

    kept, pairs, responses = candidates.keep_pairs(np.array([False, True, True]))
    some = tokenized.keep_pairs(pairs, responses)
    assert some.pairs.tolist() == [[3, 1], [2, 0]] and len(some.ids) == 4
    np.testing.assert_array_equal(some.response_of[some.pairs], kept.pairs)


def test_take_keeps_the_pairs_that_it_can(tokenizer):
    tokenized, _, _ = tokenize_responses(read_candidates(scored_rows(2, 3)), tokenizer, 100)
    assert tokenized.response_of.tolist() == list(range(6))
    some = tokenized.take(np.array([5, 0, 3]))
    assert some.response_of.tolist() == [5, 0, 3]
    expected = [pair for pair in tokenized.pairs.tolist() if set(pair) <= {5, 0, 3}]
    assert some.pairs.tolist() == [[[5, 0, 3].index(side) for side in pair] for pair in expected] != []


def test_the_first_token_of_a_sequence_is_not_predicted(tokenizer, model):
    rows = read_candidates([{"prompt": "red cat?", "chosen": " blue dog star", "rejected": " one"}])
    tokenized, fits, _ = tokenize_responses(rows, tokenizer, 3, truncation_mode="keep_end")
    assert fits.all() and tokenized.truncated == 2
    assert tokenized.prompt_lengths.tolist() == [0, 1]
    assert tokenized.response_lengths.tolist() == [3, 2]
    assert tokenized.predicted_lengths.tolist() == [2, 2]
    logps = response_logps(Forward(model, tokenized, 0))
    whole = torch.log_softmax(model(torch.tensor([tokenized.ids[0]])).logits, dim=-1)[0]
    expected = whole[0, tokenized.ids[0][1]] + whole[1, tokenized.ids[0][2]]
    assert logps[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_sequence_of_which_nothing_is_predicted(tokenizer, model):
    rows = read_candidates([{"prompt": "", "chosen": "blue", "rejected": "one"}])
    for truncation_mode in ("keep_start", "keep_end"):
        tokenized = tokenize_responses(rows, tokenizer, 1, truncation_mode=truncation_mode)[0]
        assert tokenized.predicted_lengths.tolist() == [0, 0]
        gradients, logps = hooked(model, FreshAdapter(model, 2, 0), tokenized, np.arange(2))
        assert not logps.any() and not gradients.any()


def test_the_model_and_its_reference_limit_the_window(tokenizer):
    model = tiny_llama(tokenizer)  # of 256 positions
    narrow = tiny_llama(tokenizer, max_position_embeddings=24)
    boundless = BloomModel(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    for settings, given, expected in (
        ({}, model, 256),
        ({"max_length": None}, model, 256),
        ({"max_length": 30}, model, 30),
        ({"max_length": None, "ref_model": narrow}, model, 24),
        ({"max_length": None, "ref_model": "columns"}, model, 256),
        ({"max_length": None}, boundless, None),
        ({}, boundless, 1024),
    ):
        assert window(given, SelectConfig(**settings)) == expected


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
        ("{{ messages[0]['content'] }}", "Row 0, response 0: no token of the response follows the prompt"),
        ("", "Row 0: the tokenizer gives no tokens"),
    ],
)
def test_templates_that_fail_name_the_row(tokenizer, template, expected):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(ValueError, match=expected):
        tokenize_responses(read_candidates(scored_rows(1, 2, conversational=True)), broken, 100)


def test_tokenizers_that_cannot_serve_are_refused(tokenizer):
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


def test_a_store_is_in_the_order_of_the_prompts_a_neighbourhood_at_a_time():
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(300), generator.integers(1, 9, 300))
    lengths = generator.integers(1, 100, len(prompts))
    lengths[700] = 200
    order = storage_order(lengths, prompts, 128)
    assert sorted(order.tolist()) == list(range(len(prompts)))
    assert order[0] == 700  # memory that does not suffice is found out at once
    place = np.argsort(order)
    for prompt in range(300):
        rows = place[prompts == prompt]
        assert rows.max() - rows.min() < 128 + 8
    # But for the one that goes first, neighbourhoods follow one another.
    firsts = np.array([place[prompts == prompt].min() for prompt in range(300) if abs(prompt - prompts[700]) > 60])
    assert np.corrcoef(firsts, np.arange(len(firsts)))[0, 1] > 0.95
    # All in one, the longest come first.
    assert storage_order(lengths, prompts).tolist() == np.argsort(-lengths, kind="stable").tolist()


def test_batches_of_any_order_keep_to_the_budget():
    generator = np.random.default_rng(1)
    for _ in range(200):
        lengths, budget = generator.integers(1, 60, generator.integers(1, 30)), int(generator.integers(1, 400))
        size = first_batch(lengths, budget)
        assert size == 1 or lengths[:size].max() * size <= budget
        # One more would not fit, or would be more than if none were longer than the first.
        assert size == len(lengths) or lengths[: size + 1].max() * (size + 1) > budget
