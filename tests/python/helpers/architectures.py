"""Tiny models of every architecture that transformers lists as a causal language model, by shrinking configurations.

``python architectures.py FILE TYPE ...`` examines some of them, and adds what it finds to a file.
"""

import json
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from bpo import SelectConfig, UnsupportedModelError, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan
from bpo.policy.checks import check_policy
from bpo.policy.logprobs import Forward
from bpo.policy.state import inference_state
from tiny import caught, scored_rows

LISTED = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MASKED = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)

_SPARE = 8  # token ids beyond those of the tokenizer, for images and the like

# The small value of each setting, by its name; settings without an entry keep what the configuration has.
_SMALL = {
    value: names.split()
    for value, names in {
        32: "hidden_size d_model n_embd dim emb_dim embedding_dim embed_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim lru_width attention_hidden_size hidden_size_global "
        "projector_output_dim",
        48: "intermediate_size d_ff ffn_dim n_inner dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "feed_forward_size intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size dense_intermediate_size mlp_dim",
        4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
        "index_n_heads zero_expert_num num_query_groups",
        2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_hidden_layers n_layer n_layers "
        "num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers num_blocks num_experts_per_tok "
        "num_experts_per_token moe_top_k moe_topk moe_k linear_num_key_heads num_layers_per_stack n_group depth",
        1: "topk_group num_expert_group num_random_blocks n_input_layers n_output_layers n_recurrent_layers",
        8: "head_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim d_head d_kv dim_head attention_head_size "
        "swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state "
        "state_size ssm_state_size mamba_d_head mamba_head_dim mamba_headdim mamba_n_heads n_mamba_heads "
        "mamba_num_heads time_step_rank mamba_dt_rank rotary_dim query_pre_attn_scalar gated_norm_rank laurel_rank "
        "adapter_rank router_hidden_size hidden_size_per_layer_input loop_gate_rank hc_lowrank d_rel",
        16: "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim",
        256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length rel_extent "
        "model_max_length encoder_hash_byte_group_vocab",
        64: "mamba_d_ssm sliding_window attention_window_size local_attention sliding_window_size",
    }.items()
}
_VALUE_OF = {name: value for value, names in _SMALL.items() for name in names}

_VOCABULARIES = (
    "vocab_size",
    "vocab_size_per_layer_input",
    "decoder_vocab_size",
    "unpadded_vocab_size",
    "shape_vocab_size",
    "pronunciation_vocab_size",
)

# Where settings of this kind would not fit one another.
_GEMMA_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 8,
}
_LAYERS_OF_TWO_KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_DOTS_3_NOTE = {
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN_4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_CHANGES = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "n_recurrent_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS_3_NOTE,
    "dots3_note_vision_encoder": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QWEN_4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _LAYERS_OF_TWO_KINDS,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _LAYERS_OF_TWO_KINDS,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
# Listed under the configuration of a model that they are the decoder of.
_DECODERS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def build(model_type, tokenizer, dtype=torch.float32, **changes):
    """A tiny model of a model type, with weights whose every part matters."""
    torch.manual_seed(0)
    config = shrunk(model_type, len(tokenizer) + _SPARE, **changes)
    if model_type in _DECODERS:
        model = getattr(transformers, LISTED[model_type])(getattr(config, _DECODERS[model_type])).eval()
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # ones and zeros would hide what multiplies and what adds
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def shrunk(model_type, vocabulary, **changes):
    """The configuration of a model type with everything made small."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_small(config_class, vocabulary), **changes})


def _small(config_class, vocabulary):
    default = config_class()
    aliases = set(config_class.attribute_map or {})
    small = {}
    for name, value in default.to_dict().items():
        if name in aliases or isinstance(value, bool):
            continue
        if name in config_class.sub_configs and isinstance(getattr(default, name), PretrainedConfig):
            small[name] = _small(type(getattr(default, name)), vocabulary)
        elif name in _VOCABULARIES:
            small[name] = vocabulary
        elif name == "pad_token_id":
            small[name] = 0
        elif name.endswith(("token_id", "token_index")) and isinstance(value, (int, list)):
            small[name] = 2 if name[:3] in ("bos", "eos") else vocabulary - 1
        elif name in _VALUE_OF and isinstance(value, int) and value > _VALUE_OF[name]:
            small[name] = _VALUE_OF[name]
    if small.get("kv_lora_rank"):  # multi-head latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    _kinds_of_layers(default, small)
    return {**small, **_CHANGES.get(config_class.model_type, {})}


def _kinds_of_layers(default, small):
    """As many layers as there are kinds of them, at least two."""
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or []))
    if kinds and "num_hidden_layers" in small:
        small["num_hidden_layers"] = max(2, len(kinds))
        small["layer_types"] = (kinds * 2)[: small["num_hidden_layers"]]


def examine(model, config, tokenized):
    """What comes of the per-sample gradients of a model, in words; asserts that they are right where they come.

    Every parameter is compared by itself with autograd on each response alone: in float32 to 1e-4 of its own gradient,
    in bfloat16, where that may be rounding altogether, to a fifth and to a fiftieth of the whole; none may vanish.
    """
    single = model.dtype == torch.float32
    rows = np.arange(len(tokenized.ids))
    forward = Forward(model, tokenized, 0)
    try:
        check_policy(model)
        features = choose_features(model, config)
        with inference_state(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = find_plan(features, forward)
            gradients, _ = caught(forward, features, plan, rows)
    except UnsupportedModelError as error:
        return f"refused: {error}"
    with inference_state(model):
        for row in rows:
            wanted = autograd(forward, features, row)
            whole = torch.cat(list(wanted.values())).norm()
            for name, slot in features.slots.items():
                found = gradients[row, slot.offset : slot.offset + slot.size]
                norm, error = wanted[name].norm(), (found - wanted[name]).norm()
                bound = 1e-4 * norm + 2e-6 * whole if single else 0.2 * norm + 0.02 * whole
                assert error <= bound, f"{name}: {float(error):.2e} of {float(norm):.2e}, {float(whole):.2e} in all"
                assert found.any() or norm <= 1e-6 * whole, f"{name} has vanished, {float(norm):.2e}"
    return "exact" + (f"; the whole model runs again for {len(plan.whole)} parameters" if plan.whole else "")


def autograd(forward, features, row):
    """What is kept of the gradient of every parameter, by autograd on a response alone."""
    parameters = [forward.model.get_parameter(name) for name in features.slots]
    for parameter in parameters:
        parameter.requires_grad_(True)
    logp = forward.logps(np.array([row])).logps.sum()
    found = torch.autograd.grad(logp, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return {
        name: torch.zeros(slot.size) if gradient is None else slot.keep(gradient)[0]
        for (name, slot), gradient in zip(features.slots.items(), found, strict=True)
    }


def examine_type(model_type, tokenizer, tokenized, dtype, **changes):
    """What comes of a model type, by the name of the features; "not built" where no tiny model can be made."""
    found = {}
    for features in ("lora", "full"):
        try:
            model = build(model_type, tokenizer, dtype, **changes)
        except Exception as error:  # whatever transformers finds to say
            reason = f"not built: {type(error).__name__}: {' '.join(str(error).split())}"
            return {"lora": reason, "full": reason}
        try:
            found[features] = examine(model, SelectConfig(features=features, lora_rank=4), tokenized)
        except Exception as error:
            found[features] = f"WRONG: {type(error).__name__}: {error}"
    return found


def main(path, model_types):
    """Examines some model types and adds a line of JSON for each to a file."""
    from tiny import build_tokenizer

    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = build_tokenizer()
    tokenized = tokenize_responses(read_candidates(scored_rows(2, 3)), tokenizer, 256)[0]
    for model_type in model_types:
        variants = {model_type: {}}
        if model_type in MASKED and "is_decoder" in vars(CONFIG_MAPPING[model_type]()):
            variants[f"{model_type}, is_decoder=True"] = {"is_decoder": True}
        for name, changes in variants.items():
            found = {
                str(dtype).removeprefix("torch."): examine_type(model_type, tokenizer, tokenized, dtype, **changes)
                for dtype in (torch.float32, torch.bfloat16)
            }
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"model_type": name, **found}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
