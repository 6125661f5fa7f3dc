"""Exports and the runtime: the compressed folder answers as the dense one, and from_pretrained sees every zero."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_train import artifacts, kernels
from sparse_train.compress import export_dense, export_sparse, quantise_groups, quantise_rows, unpruned_zeros
from sparse_train.config import PruneConfig
from sparse_train.errors import UserError, printable
from sparse_train.inference import PackedLinear, load
from sparse_train.launch.cli import main
from sparse_train.models import load_model, load_processor, open_model, own_tensors, save_model
from sparse_train.pruning import prune
from sparse_train.sparse import BitmaskTensor, TensorFolder, densify, sparse_linears, sparsify
from tests.models import tiny_model, tiny_mpt, tiny_tokenizer

_DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def _sparse_model():
    torch.manual_seed(0)
    model = tiny_mpt(d_model=64, vocab_size=300)
    return sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.75)))


def _weights(model):
    return {name: linear.weight for name, linear in sparse_linears(model).items()}


def test_int8_codes_are_within_half_a_step_and_rows_have_their_own_scale():
    torch.manual_seed(0)
    dense = torch.randn(6, 70) * torch.logspace(-3, 3, 6)[:, None]
    keep = torch.rand(6, 70) < 0.3
    keep[2] = False
    codes, scale = quantise_rows(BitmaskTensor.from_dense(dense, keep))
    assert codes.values.dtype == torch.int8 and codes.values.abs().max() == 127
    error = (codes.to_dense() * scale[:, None] - dense * keep).abs()
    assert (error <= scale[:, None] * 0.5001).all() and scale[2] == 1
    torch.testing.assert_close(scale[0], (dense * keep)[0].abs().max() / 127)


def test_int4_codes_are_within_half_a_step_of_their_group_and_use_all_16():
    torch.manual_seed(0)
    dense = torch.randn(6, 300) * torch.logspace(-30, 3, 6)[:, None]
    keep = torch.rand(6, 300) < 0.5
    keep[2, 128:256] = False
    dense[3, :128] = 0
    codes, scale = quantise_groups(BitmaskTensor.from_dense(dense, keep))
    assert scale.shape == (6, 3) and scale.dtype == torch.bfloat16 and set(codes.values.tolist()) == set(range(-8, 8))
    assert scale[2, 1] == scale[3, 0] == 1 and (scale != 0).all()
    step = kernels.scale_of_columns(scale, 300)
    error = (codes.to_dense() * step - dense * keep).abs()
    steps = dense * keep / step  # -8 for the largest of a group, but that the scale is rounded
    assert (steps.abs() <= 8.04).all()
    # Only what lies opposite to the largest value is off by more than half a step.
    assert (error <= step.abs() * (0.001 + torch.where(steps > 7.5, steps - 7, 0.5))).all()


def test_the_dense_export_is_read_by_from_pretrained_with_every_zero_in_place(tmp_path):
    model = _sparse_model()
    weights = _weights(model)
    export_dense(model, tiny_tokenizer(), tmp_path)
    assert unpruned_zeros(tmp_path, weights.items()) == []
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in weights.items():
        found = theirs.get_submodule(name).weight
        assert not found[~weight.keep].any() and torch.equal(found[weight.keep], weight.values), name


def test_config_json_names_the_format_of_a_sparse_folder_and_of_no_other(tmp_path):
    def key(folder):
        return json.loads((tmp_path / folder / "config.json").read_text()).get("quantization_config")

    model = tiny_model("t5")[0]  # whose head is a linear of its own
    model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    for precision in ("fp32", "bf16", "int8", "int4"):
        export_sparse(model, tiny_tokenizer(), precision, tmp_path / precision)
        export_sparse(model, tiny_tokenizer(), precision, tmp_path / "head", int8_head=True)
        whole = [] if precision.startswith("int") else ["lm_head"]
        assert key(precision) == {"quant_method": "sparse-train", "version": 1, "precision": precision,
                                  "weights": "sparse.safetensors", "modules_to_not_convert": ["lm_head"]}
        assert key("head") == key(precision) | {"modules_to_not_convert": whole}
    again = load_model(tmp_path / "bf16")  # FP32 values; a fine-tune starts like this
    assert not hasattr(again.config, "quantization_config")
    save_model(tmp_path / "next", again, tiny_tokenizer())
    assert key("next") == key("fp32")
    export_dense(again, tiny_tokenizer(), tmp_path / "dense")
    assert key("dense") is None


@pytest.mark.parametrize("spoil", ["alive", "changed"])
def test_the_audit_names_a_weight_that_came_back_or_changed(spoil, tmp_path):
    model = _sparse_model()
    weights = _weights(model)
    dense = densify(model)
    name = "transformer.blocks.1.ffn.up_proj"
    place = (~weights[name].keep if spoil == "alive" else weights[name].keep).nonzero()[0]
    dense.get_submodule(name).weight.data[*place] += 1
    save_model(tmp_path, dense, tiny_tokenizer())
    assert unpruned_zeros(tmp_path, weights.items()) == [name]


def test_generate_says_once_that_the_portable_kernels_run(tmp_path, capsys):
    model = _sparse_model()
    export_sparse(model, tiny_tokenizer(), "int8", tmp_path / "sparse")
    export_dense(model, tiny_tokenizer(), tmp_path / "dense")
    assert main(["run", str(_DEMO), f"dense.path={tmp_path / 'sparse'}", "--dry-run"]) == 2
    assert "is quantised; it runs" in capsys.readouterr().err
    for backend in kernels.backends():
        for folder in ("sparse", "dense"):
            with kernels.use_backend(backend):
                assert main(["generate", str(tmp_path / folder), "--prompt", "Tom", "--max-new-tokens", "2"]) == 0
            told = capsys.readouterr().err.count("dense torch may be faster")
            assert told == ((folder, backend) == ("sparse", "portable")), (folder, backend)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_an_encoder_decoder_is_measured_with_both_caches(family, tmp_path, monkeypatch, capsys):
    save_model(tmp_path, *tiny_model(family))
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 1e10)
    assert main(["bench", "decode", "--model", str(tmp_path), "--prompt-tokens", "9", "8", "--new-tokens", "3",
                 "--repeats", "1", "--kv-cache", "fp32", "bf16"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    prompts = ["a window of sound"] if family == "whisper" else ["10 prompt tokens", "9 prompt tokens"]
    assert [line.split("; ")[1] for line in table if line.startswith("threads:")] == prompts
    assert [row["precision"] for row in rows] == ["fp32", "fp32, bf16 cache"] * len(prompts)
    assert all(row["outside_products"] is not None for row in rows)  # decoded by a Decoder


def test_speech_beside_text_and_unknown_caches_are_refused(tmp_path, capsys):
    sound, text = str(tmp_path / "sound"), str(tmp_path / "text")
    save_model(Path(sound), *tiny_model("whisper"))
    save_model(Path(text), *tiny_model("llama"))
    for command, told in ((["bench", "decode", "--model", sound, text], "measure them in two runs"),
                          (["bench", "decode", "--model", text, "--device", "cuda", "--kv-cache", "bf16"],
                           "are measured on the CPU; leave them out"),
                          (["generate", text, "--prompt", "Tom", "--device", "cuda", "--kv-cache", "fp32"],
                           "on a GPU it is always bf16")):
        assert main(command) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"kv_cache='int8': .* give one of fp32, bf16"):
        load(text, kv_cache="int8")


def test_generate_streams_samples_stops_and_reads_prompts(tmp_path, monkeypatch, capsys):
    export_sparse(_sparse_model(), tiny_tokenizer(), "fp32", tmp_path / "model")
    runtime = load(tmp_path / "model")
    assert runtime.sparsity == pytest.approx(0.75, abs=1e-3)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 1e10)
    assert main(["bench", "decode", "--model", *[str(tmp_path / "model")] * 2, "--prompt-tokens", "9", "--new-tokens",
                 "3", "--repeats", "1"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["model"], row["engine"], row["precision"]) for row in measured] == [
        (str(tmp_path / "model"), "sparse", "fp32")] and measured[0]["speedup"] == 1
    arguments = ["generate", str(tmp_path / "model"), "--max-new-tokens", "12"]

    def generate(*options):
        assert main([*arguments, *options]) == 0
        out, err = capsys.readouterr()
        assert re.fullmatch(r"\d+ tokens(, [\d.]+ tokens/s)?, the first after [\d.]+ s\n", err)
        return out

    prompt = ("--prompt", "Question: Tom")
    answer = generate(*prompt)
    assert answer == printable(runtime.complete(prompt[1], 12) + "\n", keep="\n\t")
    stop = next(character for character in answer if character.isascii())
    assert generate(*prompt, "--stop", stop) == answer[:answer.index(stop) + 1] + "\n" != answer
    for command, told in (([*arguments, *prompt], "standard output cannot be written: No space left on device; send"),
                          (["inspect", str(tmp_path / "model")], "No space left on device; ")):
        with monkeypatch.context() as patch, open("/dev/full", "w") as full:  # as a disk without room
            patch.setattr(sys, "stdout", full)
            assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"sparse-train: {told}") and err.count("\n") == 1
    sampled = {generate(*prompt, "--top-p", "0.9", "--seed", seed) for seed in ("1", "1", "2")}
    assert len(sampled) == 2 and answer not in sampled
    assert generate(*prompt, "--temperature", "0", "--top-k", "5") == answer
    (tmp_path / "prompts").write_text("Tom has\n\n1\nHow many?\n")
    expected = [{"prompt": prompt, "answer": runtime.complete(prompt, 12)} for prompt in ("Tom has", "1", "How many?")]
    with open(tmp_path / "prompts") as stored:
        before = os.dup(0)
        os.dup2(stored.fileno(), 0)
        try:
            for source in (str(tmp_path / "prompts"), "-"):
                told = generate("--prompts", source, "--batch-size", "2")
                assert [json.loads(line) for line in told.splitlines()] == expected
        finally:
            os.dup2(before, 0)
            os.close(before)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 3e-2), ("int8", 6e-2), ("int4", 0.3)])
def test_the_runtime_computes_what_the_model_does(precision, tolerance, tmp_path):
    model = _sparse_model()
    export_sparse(model, tiny_tokenizer(), precision, tmp_path)
    assert artifacts.damage(tmp_path) is None
    runtime = load(tmp_path).model
    ids = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = densify(model)(input_ids=ids).logits
        # Prefill and one token at a time take different kernels.
        prefill, state, steps = runtime(input_ids=ids).logits, None, []
        for place in range(ids.shape[1]):
            out = runtime(input_ids=ids[:, place:place + 1], past_key_values=state, use_cache=True)
            state = out.past_key_values
            steps.append(out.logits)
    for found in (prefill, torch.cat(steps, 1)):
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_token_has_one_function_whatever_batch_or_prompt_it_is_in(precision, tmp_path):
    """So that what a batch scores is what one prompt is answered with."""
    export_sparse(_sparse_model(), tiny_tokenizer(), precision, tmp_path)
    layers = [module for module in load(tmp_path).model.modules() if isinstance(module, PackedLinear)]
    torch.manual_seed(0)
    for layer in layers:
        x = torch.randn(5, 1, layer.in_features) * torch.logspace(-2, 2, 5)[:, None, None]
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(layer(x), alone)  # a step of a batch
        assert layer(x[:0]).shape == alone[:0].shape
        # A dense product sums in another order: C roundings of at most the sum of magnitudes.
        bound = layer.in_features * 2.0**-23 * (x.abs() @ layer.weight.to_dense().abs().T + x.abs().amax(-1, True))
        assert ((layer(x.transpose(0, 1))[0] - alone[:, 0]).abs() <= bound[:, 0] + 1e-12).all()
        if precision != "fp32":
            unquantised = x @ layer.weight.to_dense().T
            assert ((alone - unquantised).norm(dim=-1) > 1e-4 * alone.norm(dim=-1)).all()


@pytest.mark.parametrize("family", ["mpt", "llama", "t5"])  # of which llama's head is not tied
def test_an_int8_head_leaves_the_embedding_and_the_model_as_they_are(family, tmp_path):
    model, processor = tiny_model(family)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    before, name = dict(own_tensors(model)), "lm_head"
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    for precision, int8_head in (("int8", True), ("int4", True), ("int4", False)):
        folder = tmp_path / f"{precision}-{int8_head}"
        export_sparse(model, processor, precision, folder, int8_head)
        assert {key: id(tensor) for key, tensor in own_tensors(model).items()} == \
            {key: id(tensor) for key, tensor in before.items()}
        runtime = load(folder)
        assert runtime.precision == precision
        packed = dict(runtime.model.named_modules())[name]
        assert isinstance(packed, PackedLinear) == int8_head and runtime.sparsity == pytest.approx(0.5, abs=1e-2)
        assert torch.equal(runtime.model.get_input_embeddings().weight, embedding)
        if int8_head:
            assert packed.weight.precision == "int8"
            step = head.abs().amax(1, keepdim=True) / 127
            assert ((packed.weight.to_dense() - head).abs() <= step * 0.51).all()
            assert len(runtime.complete("Question: Tom", 5)) > 0
    with pytest.raises(UserError, match="is quantised"):
        load_model(folder)


@pytest.mark.parametrize("family", ["mpt", "llama", "t5", "whisper"])
def test_a_model_that_is_read_as_it_is_written_gives_the_same_files(family, tmp_path):
    model, processor = tiny_model(family)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    save_model(tmp_path / "student", model, processor)
    for precision, int8_head in (("fp32", False), ("bf16", False), ("int8", True), ("int4", False), ("dense", False)):
        for name, (given, source) in {"whole": (model, None), "read": open_model(tmp_path / "student")}.items():
            if precision == "dense":
                export_dense(given, processor, tmp_path / f"{name}-dense", source)
            else:
                export_sparse(given, processor, precision, tmp_path / f"{name}-{precision}", int8_head, source=source)
        whole, read = ({file.name: file.read_bytes() for file in (tmp_path / f"{name}-{precision}").iterdir()}
                       for name in ("whole", "read"))
        assert read == whole, precision


@pytest.mark.parametrize("family", ["mpt", "llama", "t5", "whisper"])
def test_a_bf16_embedding_and_its_head_stay_bf16(family, tmp_path):
    model, processor = tiny_model(family)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    export_sparse(model, processor, "bf16", tmp_path)
    runtime, widened = load(tmp_path), load_model(tmp_path)
    embedding, head = runtime.model.get_input_embeddings(), runtime.model.get_output_embeddings()
    assert (embedding.weight.precision, head.weight.precision) == ("bf16", "bf16")
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (embedding.weight is head.weight) == is_tied == (family != "llama")
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(embedding(tokens), widened.get_input_embeddings()(tokens))
    inputs = {"decoder_input_ids" if model.config.is_encoder_decoder else "input_ids": tokens}
    if model.config.is_encoder_decoder:
        states = torch.randn(2, 4, model.config.d_model, generator=torch.Generator().manual_seed(0))
        inputs["encoder_outputs"] = (states,)
    with torch.no_grad():
        expected = widened.double()(**{key: (value[0].double(),) if isinstance(value, tuple) else value
                                       for key, value in inputs.items()}).logits
        error = (runtime.model(**inputs).logits - expected).norm() / expected.norm()
    assert error < 1e-5
    assert not any(parameter.shape[0] == embedding.weight.shape[0] for parameter in runtime.model.parameters())


@pytest.mark.parametrize("backend", ["portable", kernels.backend()])
def test_generation_is_that_of_the_dense_model(backend, tmp_path):
    model = _sparse_model()
    export_sparse(model, tiny_tokenizer(), "fp32", tmp_path / "sparse")
    export_dense(model, tiny_tokenizer(), tmp_path / "dense")
    with kernels.use_backend(backend):
        assert load(tmp_path / "sparse").complete("Question: Tom", 20) == \
            load(tmp_path / "dense").complete("Question: Tom", 20)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sparse_folder_trains_on(precision, tmp_path):
    model = _sparse_model()
    export_sparse(model, tiny_tokenizer(), precision, tmp_path)
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        expected = tensor if precision == "fp32" or not tensor.is_floating_point() else tensor.bfloat16().float()
        assert torch.equal(again.state_dict()[name], expected), name
    assert load_processor(tmp_path).tokenizer.encode("Tom 12") == tiny_tokenizer().encode("Tom 12")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_folder_does_not_train_and_an_empty_prompt_does_not_run(precision, tmp_path):
    export_sparse(_sparse_model(), tiny_tokenizer(), precision, tmp_path)
    with pytest.raises(UserError, match="is quantised; it runs"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="the prompt is empty"):
        load(tmp_path).complete("", 3)
    with pytest.raises(UserError, match=r"the prompt 'Tom\\udcff' is not UTF-8"):  # as argv has the byte 0xff
        load(tmp_path).complete("Tom\udcff", 3)


def test_missing_weights_are_refused_dense_and_sparse(tmp_path):
    model = _sparse_model()
    tensors = {name: tensor for name, tensor in own_tensors(model).items() if "norm_2" not in name}
    save_model(tmp_path / "sparse", model, tiny_tokenizer(), tensors.items())
    for read in (load_model, load):
        with pytest.raises(UserError, match="norm_2"):
            read(tmp_path / "sparse")
    dense = densify(model)
    save_model(tmp_path / "dense", dense, tiny_tokenizer(),
               [(name, t) for name, t in own_tensors(dense).items() if "norm_2" not in name])
    with pytest.raises(UserError, match="lacks 2 tensors of a mpt model"):
        load_model(tmp_path / "dense")


def test_sizes_follow_the_format(tmp_path, capsys):
    for precision in ("int8", "int4"):
        export_sparse(_sparse_model(), tiny_tokenizer(), precision, tmp_path / precision)
        folder = TensorFolder(tmp_path / precision)
        for name, (rows, columns) in folder.shapes.items():
            num_values, num_groups = round(rows * columns / 4), -(-columns // 128)
            assert folder.spec(f"{name}.bitmask") == ((rows, 8 * -(-columns // 64)), "U8")
            assert [folder.spec(f"{name}.{part}") for part in ("values", "scale")] == (
                [((num_values,), "I8"), ((rows,), "F32")] if precision == "int8" else
                [((num_values // 2,), "U8"), ((rows, num_groups), "BF16")])
    assert main(["inspect", str(tmp_path / "int4")]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "blocks.0.ffn.up_proj" in line)
    assert row[1:] == ["256x64", "I4", "0.7500", f"{256 * 64 // 8 + 256 * 8 + 256 * 2:,}"]


@pytest.mark.slow
def test_exporting_takes_the_memory_of_a_few_tensors(tmp_path):
    """However many there are, and of the model on disk next to nothing."""
    torch.manual_seed(0)
    model = tiny_mpt(d_model=1024, n_layers=8, vocab_size=300)
    largest, size = 4 * 4096 * 1024, sum(parameter.nbytes for parameter in model.parameters())
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "blocks" in name:
            sparsify(model, {name: BitmaskTensor.from_dense(linear.weight, torch.rand_like(linear.weight) < 0.5)})
    save_model(tmp_path / "large", model, tiny_tokenizer())
    save_model(tmp_path / "small", _sparse_model(), tiny_tokenizer())
    script = """if True:
        import sys
        from pathlib import Path
        from sparse_train.compress import export_dense, export_sparse, unpruned_zeros
        from sparse_train.models import load_processor, open_model
        from sparse_train.sparse import format
        format._FILE_BYTES = 1  # a tensor per file
        def memory(key):
            return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        for source in map(Path, sys.argv[1:]):  # the first is for what every model loads of code
            model, tensors = open_model(source)
            processor = load_processor(source)
            for precision in ("fp32", "bf16", "int8", "int4", "dense"):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
                before, made = memory("VmRSS"), source / precision
                if precision == "dense":
                    export_dense(model, processor, made, tensors)
                    assert not unpruned_zeros(made, ((name, tensors.weight(name)) for name in tensors.shapes))
                else:
                    export_sparse(model, processor, precision, made, source=tensors)
                print(precision, memory("VmHWM") - before)"""
    output = subprocess.run([sys.executable, "-c", script, tmp_path / "small", tmp_path / "large"], check=True,
                            capture_output=True, text=True).stdout
    peaks = dict(line.split() for line in output.splitlines())
    # Quantising has an index and several copies of a tensor's values in memory.
    assert len(peaks) == 5 and 10 * largest < 0.5 * size
    assert max(map(int, peaks.values())) < 10 * largest, peaks
