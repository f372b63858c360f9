"""A model that FSDP2 shares out over processes gives the gradients of one that is whole, or is refused by name."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bpo
import job
from bpo.policy.models import model_fingerprint
from bpo.policy.sharding import is_sharded
from tiny import build_tokenizer, tiny_llama

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")
SETTINGS = {**job.SETTINGS, "sketch_dtype": "float32"}
LINEAR = ["*.mlp.*"]


def meet():
    """Accelerate shares nothing out among CPUs unless it is told that they are another kind of device."""
    from accelerate import DistributedType, PartialState

    PartialState().distributed_type = DistributedType.MULTI_GPU


def with_adapter(tokenizer):
    """An adapter that has been trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def sharded(model):
    """Its layers, and the rest in a unit of its own."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model)


def prepared(model, **plugin):
    """As accelerate prepares it for a training."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        **plugin,
    )
    optimizer = torch.optim.SGD(model.parameters())  # without one it prepares none
    model, _ = Accelerator(fsdp_plugin=plugin, cpu=True).prepare(model, optimizer)
    assert is_sharded(model)
    return model


def collect(model, tokenizer, store, **settings):
    config = bpo.SelectConfig(**{**SETTINGS, **settings})
    return bpo.collect_gradients(
        model, job.ROWS, processing_class=tokenizer, store=store, config=config, progress=False
    )


def extracting(rank, directory):
    """Each kind of features of each kind of model."""
    meet()
    tokenizer = build_tokenizer()
    model = prepared(tiny_llama(tokenizer, tie_word_embeddings=True))
    collect(model, tokenizer, directory / "tied")
    model = sharded(tiny_llama(tokenizer).train())
    before = {name: (parameter.requires_grad, parameter.is_meta) for name, parameter in model.named_parameters()}
    collect(model, tokenizer, directory / "fresh")
    collect(model, tokenizer, directory / "again")
    collect(model, tokenizer, directory / "embeddings", features="embeddings")
    collect(model, tokenizer, directory / "some", features="full", parameters=LINEAR)
    assert before == {
        name: (parameter.requires_grad, parameter.is_meta) for name, parameter in model.named_parameters()
    }
    evaluated = bpo.evaluate_preferences(model, job.ROWS, processing_class=tokenizer, progress=False).logps.tolist()
    said = {"evaluated": evaluated}
    refused = {
        "full": lambda: collect(model, tokenizer, directory / "full", features="full"),
        "sample": lambda: bpo.sample_responses(
            model, ["one"], processing_class=tokenizer, max_new_tokens=4, progress=False
        ),
        "doctor": lambda: bpo.doctor(model, job.ROWS, processing_class=tokenizer),
        "breadth": lambda: bpo.select(
            model, job.ROWS, budget=30, breadth=9, processing_class=tokenizer, store=directory / "b", config=SETTINGS
        ),
    }
    for what, call in refused.items():
        with pytest.raises(bpo.UnsupportedModelError) as error:
            call()
        said[what] = str(error.value)
    adapter = sharded(with_adapter(tokenizer))
    collect(adapter, tokenizer, directory / "adapter", ref_model="base")
    (directory / f"{rank}.json").write_text(json.dumps(said))
    # And can be trained as before.
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    whole = tiny_llama(tokenizer)
    whole(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad)
    assert model_fingerprint(model) == model_fingerprint(whole)


def assert_same(store, whole):
    found = bpo.GradientStore.open(store)
    np.testing.assert_array_equal(found.records["response_id"], whole.records["response_id"])
    errors = np.linalg.norm(found.sketches() - whole.sketches(), axis=1) / np.linalg.norm(whole.sketches(), axis=1)
    assert errors.max() < 1e-5
    for column in ("logp", "ref_logp", "log_weight"):
        np.testing.assert_allclose(found.records[column], whole.records[column], rtol=1e-5, atol=1e-6)
    assert {**found.fingerprint, "created": 0} == {**whole.fingerprint, "created": 0}


def test_the_gradients_are_those_of_a_whole_model(tmp_path):
    job.finish(job.start(2, tmp_path, extracting, tmp_path), tmp_path)
    tokenizer = build_tokenizer()
    model = tiny_llama(tokenizer)
    for name, given, settings in (
        ("fresh", model, {}),
        ("again", model, {}),
        ("tied", tiny_llama(tokenizer, tie_word_embeddings=True), {}),
        ("embeddings", model, {"features": "embeddings"}),
        ("some", model, {"features": "full", "parameters": LINEAR}),
        ("adapter", with_adapter(tokenizer), {"ref_model": "base"}),
    ):
        assert_same(tmp_path / name, collect(given, tokenizer, tmp_path / f"{name}-one", **settings))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    evaluated = bpo.evaluate_preferences(model, job.ROWS, processing_class=tokenizer, progress=False).logps
    np.testing.assert_allclose(first["evaluated"], evaluated, rtol=1e-5)
    assert "input_layernorm.weight: its gradient takes a pass of its own" in first["full"]
    for name in ("sample", "doctor", "breadth"):
        assert "shared out by FSDP2 over 2 processes, all of which must run it together" in first[name]


def dying(rank, store, after):
    """As a launcher starts it; the second process is killed over one of its batches, and says which it ran."""
    import bpo.gradients.extract
    import bpo.store.writer

    meet()
    tokenizer = build_tokenizer()
    run = bpo.gradients.extract.Extraction.run_one
    bpo.store.writer._COMMIT_SECONDS = 0

    def counted(self, rows):
        with (store.parent / f"ran-{rank}").open("a") as file:
            file.write(f"{rows.tolist()}\n")
        if rank == 1 and len((store.parent / "ran-1").read_text().splitlines()) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, rows)

    bpo.gradients.extract.Extraction.run_one = counted
    collect(sharded(tiny_llama(tokenizer)), tokenizer, store)


def test_one_that_dies_ends_all_and_the_next_start_goes_on(tmp_path):
    store = tmp_path / "store"
    members = job.start(2, tmp_path, dying, store, 5)
    for member in members:
        member.join(600)
    assert [member.exitcode for member in members] == [1, -signal.SIGKILL]
    assert "ConnectionError: Process 0 (" in job.said(tmp_path, 0) and "lost another one" in job.said(tmp_path, 0)
    before = len(bpo.GradientStore.open(store))
    assert before > 0
    for rank in range(2):
        (tmp_path / f"ran-{rank}").unlink()
    job.finish(job.start(2, tmp_path, dying, store, -1), tmp_path)
    tokenizer = build_tokenizer()
    assert_same(store, collect(tiny_llama(tokenizer), tokenizer, tmp_path / "one"))
    ran = [[json.loads(line) for line in (tmp_path / f"ran-{rank}").read_text().splitlines()] for rank in range(2)]
    assert len(ran[0]) == len(ran[1]) > 2
    assert len({row for batches in ran for rows in batches for row in rows}) == 70 - before
    assert sum(a == b for a, b in zip(*ran, strict=True)) <= 1, "each has its own batches, but for the last"


def training(rank, directory):
    """BPOTrainer under what accelerate launch sets for FSDP2."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_RESHARD_AFTER_FORWARD="true",
    )
    tokenizer = build_tokenizer()
    args = bpo.BPOConfig(
        output_dir=str(directory / "out"),
        budget=30,
        store=str(directory / "store"),
        select_config=SETTINGS,
        precompute_ref_log_probs=True,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
    )
    assert args.device.type == "cpu"
    meet()
    with pytest.raises(ValueError, match=r"by path or whole.* bpo\.select"):
        bpo.BPOTrainer(sharded(tiny_llama(tokenizer)), args=args, train_dataset=job.ROWS, processing_class=tokenizer)
    path = str(directory / "model")
    trainer = bpo.BPOTrainer(path, args=args, train_dataset=job.ROWS, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    assert is_sharded(trainer.model)
    (directory / f"{rank}.json").write_text(json.dumps(trainer.selection.dataset.to_list()))


def test_the_trainer_selects_before_accelerate_shares_the_model_out(tmp_path):
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    job.finish(job.start(2, tmp_path, training, tmp_path), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 30
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(tmp_path / "store", collect(model, tokenizer, tmp_path / "one"))
