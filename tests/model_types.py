"""Every type of model that predicts text, built tiny: the sweep behind docs/models.md.

    python -m tests.model_types      writes docs/models.md anew (some minutes; PyPI for the column of transformers 4)
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import PackedLinear
from sparse_train.models import load_model, save_model
from sparse_train.models.empty import from_config
from sparse_train.pruning import prune
from sparse_train.sparse import densify, replace_module, sparsify
from tests.environments import python_with

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES})

_SIZES = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim", "model_dim",
         "width", "embed_dim", "lru_width", "hidden_dim", "audio_embed_dim", "encoder_hidden_dim", "output_dim"),
    64: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "dense_intermediate_size", "vocab_size", "text_vocab_size", "d_inner", "dim_ff",
         "src_vocab_size", "tgt_vocab_size", "attention_hidden_size", "max_position_embeddings", "n_positions",
         "max_target_positions", "max_source_positions", "max_seq_len", "vocab_size_per_layer_input",
         "feed_forward_size", "audio_vocab_size", "speech_vocab_size"),
    2: ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "num_blocks",
        "num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num", "num_experts_per_tok",
        "num_experts_per_token", "top_k", "moe_top_k", "num_decoder_layers", "num_encoder_layers", "n_group",
        "topk_group", "num_mem_blocks", "num_global_key_value_heads"),
    4: ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_encoder_attention_heads",
        "num_decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_key_heads",
        "linear_num_value_heads", "mamba_d_state", "ssm_state_size", "state_size", "time_step_rank", "mamba_dt_rank"),
    8: ("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_d_head", "mamba_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "index_head_dim", "attention_window",
        "hidden_size_per_layer_input", "mamba_headdim", "kv_channels", "rotary_dim", "swa_head_dim"),
    16: ("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "expert_dim", "shared_expert_intermediate_size",
         "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "o_lora_rank", "index_topk",
         "num_codebooks_dim", "adapter_rank"),
    1: ("mamba_n_groups", "n_groups", "n_shared_experts", "first_k_dense_replace"),
}
_COMMON = {name: size for size, names in _SIZES.items() for name in names}
_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id",
                      "unk_token_id", "cls_token_id", "mask_token_id"), 1)
# What the rules above cannot know.
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}
_OWN: dict[str, dict] = {
    "bamba": _MAMBA_HEADS, "granitemoehybrid": _MAMBA_HEADS, "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_HEADS},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 32,
             "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 64, "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"num_key_value_heads": 2, "head_dim": 8, "num_attention_heads": 4},
    "gemma4_unified_text": {"num_key_value_heads": 2, "head_dim": 8, "num_attention_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "nemotron": {"num_key_value_heads": 2},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "prophetnet": {"num_hidden_layers": ...},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8],
                 "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
    "xlnet": {"max_position_embeddings": ...},
    "xlstm": {"hidden_size": 64},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "mamba_headdim": 8,
               "n_mamba_heads": 8, "num_mem_blocks": 1, "num_query_groups": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


def tiny(model_type: str) -> PretrainedConfig:
    """A config of `model_type` with every size that its class has made small."""
    return _tiny(CONFIG_MAPPING[model_type])


def _tiny(kind: type[PretrainedConfig]) -> PretrainedConfig:
    usual = kind()
    given = {name: size for name, size in {**_COMMON, **_IDS}.items() if _is_size(usual, name)}
    for name in usual.sub_configs:
        part = getattr(usual, name, None)
        if isinstance(part, PretrainedConfig):
            given[name] = _tiny(type(part)).to_dict()
    own = copy.deepcopy(_OWN.get(kind.model_type, {}))
    return kind(**{name: size for name, size in (given | own).items() if size is not ...})


def _is_size(config: PretrainedConfig, name: str) -> bool:
    """Whether `config` has a number of that name that its class takes."""
    try:
        settable = getattr(type(config), name, None)
        return type(getattr(config, name)) is int and not (isinstance(settable, property) and settable.fset is None)
    except Exception:  # absent, or of each layer its own
        return False


def built(model_type: str, seed: int = 0):
    """A tiny model of `model_type`, no two of its parameters alike."""
    torch.manual_seed(seed)
    model = from_config(tiny(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:  # not a table of sines
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def check(model_type: str, folder: Path) -> str:
    """"" where everything agrees to the bit, else the line that refuses the type. Raises AssertionError otherwise.

    Leaves in `folder` the dense export, and inputs and the logits that from_pretrained's model gives for them.
    """
    try:
        model = built(model_type)
    except UserError as error:
        return str(error)
    no_processor = SimpleNamespace(save_pretrained=lambda folder: None)
    theirs_in, sparse_in, dense_in = folder / "theirs", folder / "sparse", folder / "dense"
    model.save_pretrained(theirs_in)
    theirs, report = type(model).from_pretrained(theirs_in, output_loading_info=True)
    try:
        ours = load_model(theirs_in)
        _compare(ours, theirs, "read by us")
        weights = prune(ours, [], PruneConfig(method="magnitude", sparsity=0.5))
    except UserError as error:
        return str(error).replace(str(theirs_in), "the folder")
    pruned = copy.deepcopy(ours)
    save_model(sparse_in, sparsify(ours, weights), no_processor)
    again = densify(load_model(sparse_in))
    _compare(again, pruned, "read from our sparse folder")
    opened, report = type(model).from_pretrained(sparse_in, output_loading_info=True)
    assert not any(report.values()), f"from_pretrained of our sparse folder: {report}"
    _compare(_unpacked(opened), pruned, "our sparse folder read by from_pretrained")
    save_model(dense_in, again, no_processor)
    theirs, report = type(model).from_pretrained(dense_in, output_loading_info=True)
    assert not any(report.values()), f"from_pretrained of our export: {report}"
    _compare(theirs, pruned, "our export read by from_pretrained")
    twice = {"lm_head.weight"} if "scale_decoder_outputs" in theirs.config or model_type == "mt5" else set()
    assert _names(dense_in) - twice == _names(theirs_in) - twice, sorted(_names(dense_in) ^ _names(theirs_in))[:4]
    theirs_in.rename(folder / "removed")
    answer(theirs, folder)
    return ""


def answer(model, folder: Path) -> None:
    """Where the tiny model can answer at all."""
    ids = torch.arange(2, 14)[None]
    inputs = {"input_ids": ids, "use_cache": False}
    if model.config.model_type == "whisper":
        inputs = {"input_features": torch.ones(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            torch.save({"inputs": inputs, "logits": model(**inputs).logits}, folder / "answer.pt")
    except Exception as error:
        (folder / "no-answer.txt").write_text(f"{type(error).__name__}: {error}")


def _unpacked(model):
    """With dense linears in place of those that run on packed weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(module.weight.to_dense())
            linear.bias = None if module.bias is None else torch.nn.Parameter(module.bias)
            replace_module(model, name, linear)
    return model


def _compare(found, wanted, what: str) -> None:
    for kind in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (found, wanted))
        assert one.keys() == other.keys(), f"{what}: {sorted(one.keys() ^ other.keys())[:3]}"
        odd = [name for name in one if not torch.equal(one[name], other[name])]
        assert not odd, f"{what}: {len(odd)} of {len(one)} {kind[6:]} differ, such as {odd[0]}"


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


DOCS = Path(__file__).parents[1] / "docs" / "models.md"
OLDER = "4.57.6"
_TITLE = "## Types of models\n"
_HEAD = f"""{_TITLE}
Written by `python -m tests.model_types` from tiny models of every type that predicts text in transformers 5.23, and
checked by `tests/test_model_types.py` (`make test-slow`).

*works* means three things. Every parameter and buffer of a folder that save_pretrained wrote is read bit for bit as
from_pretrained reads it. So are those of our sparse folder, after pruning by magnitude, by us and by from_pretrained.
And from_pretrained reads our dense export, whose tensors have the names that save_pretrained gives them. A type that
does not work is refused with the line shown, from its config and the names of its tensors alone. For a type outside the
table of families, the linears to prune are inferred and logged. Tasks give models text, and Whisper audio.

The last column is what transformers {OLDER} does with the dense export: *same* logits, type *not known*, *no* (an
error, or other logits: read it with transformers 5), *-* (nothing to compare).

| type | here | transformers {OLDER} |
|---|---|---|
"""


def sweep(root: Path, types: list[str] = TYPES) -> dict[str, str]:
    """Type -> "works", the line that refuses it, or why no tiny model of it was made. Exports are left below `root`."""
    found = {}
    for model_type in types:
        try:
            tiny(model_type)
        except Exception as error:
            found[model_type] = f"not tried: no tiny config ({type(error).__name__})"
            continue
        (root / model_type).mkdir()
        told = check(model_type, root / model_type) or "works"
        found[model_type] = told.partition("; supported are")[0].splitlines()[0]
    return found


def older_python(folder: Path) -> Path:
    """A Python with transformers 4. Raises OSError without an index."""
    return python_with(folder, f"transformers=={OLDER}", "tokenizers>=0.22,<0.23.1", "huggingface-hub>=0.34,<1")


def read_by_older(root: Path, python: Path) -> dict[str, str]:
    subprocess.run([python, Path(__file__).with_name("read_by_older.py"), root], check=True, capture_output=True)
    return json.loads((root / "older.json").read_text())


def older_cell(told: str | None) -> str:
    return "-" if told is None else told if told in ("same", "not known") else "no"


def rows() -> dict[str, list[str]]:
    """Type -> cells of docs/models.md."""
    table = DOCS.read_text().partition(_TITLE)[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells[1:]}


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        root = Path(folder) / "types"
        root.mkdir()
        here = sweep(root, sys.argv[1:] or TYPES)
        older = read_by_older(root, older_python(Path(folder) / "older"))
    for model_type, told in older.items():
        print(model_type, told)
    before = DOCS.read_text().partition(_TITLE)[0]
    DOCS.write_text(before + _HEAD + "".join(f"| {model_type} | {told} | {older_cell(older.get(model_type))} |\n"
                                    for model_type, told in here.items()))
