"""What transformers lists as causal language models: exact against autograd, parameter by parameter, or refused.

Some here; all with ``BPO_ALL_MODELS=FILE``, to which what is found is added as it comes, so that a run that was stopped
goes on. ``BPO_WRITE_DOCS=1`` then writes their table in docs/models.md.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import architectures
from architectures import LISTED, examine, examine_type
from bpo import SelectConfig, read_candidates
from bpo.data.tokens import tokenize_responses
from tiny import scored_rows

DOCS = Path(__file__).resolve().parents[3] / "docs" / "models.md"
MARK = "<!-- architectures -->"
PIECE = 12


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(scored_rows(1, 3)), tokenizer, 256)[0]


@pytest.mark.parametrize("model_type", ["mamba", "llama4_text", "phimoe", "gpt_oss", "ctrl"])
def test_unusual_architectures_are_exact(model_type, tokenizer, tokenized):
    assert examine_type(model_type, tokenizer, tokenized, torch.float32) == {"lora": "exact", "full": "exact"}


def test_nothing_vanishes_in_bfloat16(tokenizer, tokenized):
    """Jamba uses the weight of a layer that it does not call, beside layers with far larger gradients."""
    model = architectures.build("jamba", tokenizer, torch.bfloat16)
    assert examine(model, SelectConfig(features="full"), tokenized) == "exact"


def test_what_keeps_a_state_takes_the_whole_model(tokenizer, tokenized):
    model = architectures.build("recurrent_gemma", tokenizer)
    found = examine(model, SelectConfig(features="full"), tokenized)
    assert re.fullmatch(r"exact; the whole model runs again for \d+ parameters", found)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlnet", "In XLNetLMHeadModel a token sees those after it"),
        ("prophetnet", "padding acts on them"),
        ("musicgen", "MusicgenForCausalLM cannot be run"),
    ],
)
def test_what_is_no_causal_model_of_text_is_refused(model_type, reason, tokenizer, tokenized):
    found = examine(architectures.build(model_type, tokenizer), SelectConfig(), tokenized)
    assert found.startswith("refused: ")
    assert reason in found


@pytest.mark.skipif("BPO_ALL_MODELS" not in os.environ, reason="takes an hour: BPO_ALL_MODELS=FILE")
def test_all_architectures():
    path = Path(os.environ["BPO_ALL_MODELS"]).resolve()
    while left := [model_type for model_type in LISTED if model_type not in examined(path)]:
        command = [sys.executable, architectures.__file__, str(path), *left[:PIECE]]
        before = len(examined(path))
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if len(examined(path)) == before:  # it takes the process with it
            what = f"WRONG: exit status {done.returncode}"
            with path.open("a", encoding="utf-8") as file:
                both = {"lora": what, "full": what}
                file.write(json.dumps({"model_type": left[0], "float32": both, "bfloat16": both}) + "\n")
    found = examined(path)
    wrong = [line for line in found.values() if "WRONG" in json.dumps([line["float32"], unrefused(line)])]
    assert not wrong, "\n".join(map(json.dumps, wrong))
    text = table(found)
    before, _, after = DOCS.read_text(encoding="utf-8").split(MARK)
    if os.environ.get("BPO_WRITE_DOCS"):
        DOCS.write_text(f"{before}{MARK}\n{text}{MARK}{after}", encoding="utf-8")
    assert text in DOCS.read_text(encoding="utf-8"), "docs/models.md is out of date: BPO_WRITE_DOCS=1"


def examined(path):
    """What has been found, by model type."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["model_type"]: line for line in map(json.loads, lines)}


def unrefused(line):
    """What was found in bfloat16, but for what float32 shows to be none of bpo's: an effect as small as rounding."""
    refused = all(what.startswith("refused") for what in line["float32"].values())
    return line["float32"] if refused and "WRONG" in json.dumps(line["bfloat16"]) else line["bfloat16"]


def table(found):
    """The model types by what comes of them, the most frequent first."""
    results = {name: result(line["float32"]) for name, line in sorted(found.items())}
    for name, line in found.items():
        if unrefused(line) != line["bfloat16"]:
            results[name] += "; not in bfloat16, where it looks like rounding: **do not use it there**"
        elif result(line["bfloat16"]) != results[name]:
            results[name] += f"; in bfloat16 {result(line['bfloat16'])}"
    listed = [results[name] for name in LISTED]
    exact = sum("exact" in what and "refused" not in what.split("; in bfloat16")[0] for what in listed)
    built = sum(not what.startswith("not built") for what in listed)
    lines = [
        f"Of the {len(listed)} that transformers {transformers.__version__} lists, {built} could be built small, of "
        f"which {exact} are exact and {built - exact} refused. {len(results) - len(listed)} encoders were tried as "
        "decoders, too.",
        "",
        "| found | architectures |",
        "|---|---|",
    ]
    groups = {}
    for name, what in results.items():
        groups.setdefault(what, []).append(name)
    lines += [
        f"| {what} | {', '.join(f'`{name}`' for name in names)} |"
        for what, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return "\n".join(lines) + "\n"


# What differs from model to model in the sentences.
_OWN = {
    r"\b(?!Auto)\w*(For\w+|LMHead\w*|GenerationDecoder)\b": "it",
    r"is -[\d.]+ in a batch of two, but -[\d.]+ alone": "in a batch of two is not what it is alone",
    r" differ by \S+ of themselves": " differ",
    r" for \d+ parameters": " for some parameters",
}


def result(found):
    """What was found with both kinds of features, in words that are those of other models, too."""
    lora, full = found["lora"], found["full"]
    for own, common in _OWN.items():
        lora, full = re.sub(own, common, lora), re.sub(own, common, full)
    return lora if lora == full else f"fresh LoRA {lora}; every parameter {full}"
