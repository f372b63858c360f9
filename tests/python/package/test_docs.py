"""Every block of code in README and docs runs as printed, in the order of its page, on a machine without a GPU."""

import json
import shlex
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import bpo
import documents
import job
from tiny import TINY, scored_rows, stored, tiny_llama

BLOCKS = {path: documents.blocks(path) for path in [*documents.PAGES, *documents.NOTEBOOKS]}
# Pages that begin with a store that is there.
WITH_STORE = ("audit.md", "report.md", "results.md", "store-format.md")
# Blocks that no test can run, by page. One more is to be argued for here.
NOT_RUN = {"results.md": 1, "scaling.md": 2}


@pytest.fixture(scope="module")
def desk(tokenizer, tmp_path_factory):
    """What the pages take for granted: two models and some data, by the names that they have there."""
    desk = tmp_path_factory.mktemp("desk")
    model = tiny_llama(tokenizer, max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4  # so that responses end
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **TINY}
    judge = LlamaForSequenceClassification(LlamaConfig(**settings))
    for name, saved in (("my-sft-model", model), ("my-reward-model", judge)):
        saved.save_pretrained(desk / name)
        tokenizer.save_pretrained(desk / name)
    rows = scored_rows(16, 8)
    prompts = [{"prompt": row["prompt"]} for row in rows[:12]]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][best], "rejected": row["responses"][worst]}
        for row in rows
        for best, worst in (
            (row["scores"].index(7), row["scores"].index(0)),
            (row["scores"].index(6), row["scores"].index(1)),
        )
    ]
    completions = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": text, "overall_score": score}
                for text, score in zip(row["responses"], row["scores"], strict=True)
            ],
        }
        for row in rows
    ]
    renamed = [{"question": pair.pop("prompt"), **pair} for pair in map(dict, pairs)]
    (desk / "my-data").mkdir()
    (desk / "my-pairs").mkdir()
    (desk / "demo/output/models").mkdir(parents=True)
    (desk / "demo/output/models/SmolLM2-135M-Instruct").symlink_to(desk / "my-sft-model")
    (desk / "demo/data").symlink_to(documents.ROOT / "demo/data")
    for name, lines in (
        ("responses", rows),
        ("prompts", prompts),
        ("pairs", pairs),
        ("ultrafeedback", completions),
        ("my-data/train_prefs", renamed),
        ("my-pairs/train", pairs),
    ):
        (desk / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return desk


@pytest.fixture(scope="module")
def store(desk, tokenizer, tmp_path_factory):
    """The gradients of that data: a whole store, two of half the rows, and two shares of one."""
    path, settings = tmp_path_factory.mktemp("stores"), {"tokens_per_batch": 128, "sketch_dtype": "float16"}
    rows = [json.loads(line) for line in (desk / "responses.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(desk / "my-sft-model")
    for name, some in (("gradients", rows), ("shard-0", rows[::2]), ("shard-1", rows[1::2])):
        stored(model, some, tokenizer, path / name, **settings)
    for number in (1, 2):
        config = {"sketch_dim": 64, **settings}
        share = {"store": path / f"share-{number}", "shard": (number, 2), "config": config, "progress": False}
        bpo.collect_gradients(model, rows, processing_class=tokenizer, **share)
    return path


@pytest.mark.parametrize("path", [path for path, found in BLOCKS.items() if found], ids=lambda path: path.name)
def test_the_blocks_of_a_page_run(path, desk, request, tmp_path):
    folder = tmp_path / "desk"
    shutil.copytree(desk, folder, symlinks=True)
    if path.name in WITH_STORE:
        shutil.copytree(request.getfixturevalue("store"), folder, dirs_exist_ok=True)
    if path.name == "responses.md":  # where they are made
        (folder / "responses.jsonl").unlink()
    found = [block for block in BLOCKS[path] if block.reason is None]
    process = job.context().Process(
        target=documents.run, args=(str(folder), found, str(tmp_path / "said")), daemon=True
    )
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def test_few_blocks_are_left_out_and_these_say_why():
    marked = {}
    for path, found in BLOCKS.items():
        for block in found:
            if block.reason is not None:
                assert len(block.reason.split()) > 2, f"{block.page}:{block.line} says not why: {block.reason}"
                marked[path.name] = marked.get(path.name, 0) + 1
    assert marked == NOT_RUN


@pytest.mark.parametrize("path", documents.NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_of_nbformat_4_and_hold_no_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text


def test_every_command_that_is_printed_has_the_options_it_is_printed_with():
    seen = 0
    for path, found in BLOCKS.items():
        for block in found:
            if block.kind in ("sh", "bash"):
                for words in filter(None, map(documents.bpo_words, documents.lines(block.code))):
                    documents.check_words(words)
                    seen += 1
        for command in documents.inline(path) if path.suffix == ".md" else ():
            documents.check_options(shlex.split(command)[1:])
            seen += 1
    assert seen > 50


def test_a_printed_option_that_is_not_there_is_found():
    with pytest.raises(AssertionError, match="no such option"):
        documents.check_words(["select", "model", "data.jsonl", "--budget", "5", "--ouptut", "x"])
    with pytest.raises(AssertionError, match="no option --budgets"):
        documents.check_options(["preview", "gradients", "--budgets", "5"])
    with pytest.raises(AssertionError, match="no command verfy"):
        documents.check_options(["store", "verfy"])
