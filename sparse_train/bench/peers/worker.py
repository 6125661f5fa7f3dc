"""Runs in a peer's environment, without this package: an engine that decodes one model, a request per line.

    argument   {"engine": NAME, "model": FILE, "threads": N, "capacity": N}
    stdin      {"prompt": [ids], "new_tokens": N}, N 0: the logits behind the prompt instead
    stdout     {} when the model is loaded; then {"tokens": [ids], "first_seconds": S, "later_seconds": S}
               or {"logits": [...]}; what the engine itself prints goes to stderr

An engine is a function of the argument that returns feed(tokens, start): the logits behind `tokens`, which are at
positions `start`, ...; 0 begins another text.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Feed = Callable[[list[int], int], np.ndarray]


def llama_cpp(spec: dict[str, Any]) -> Feed:
    import llama_cpp as api

    return _llama(api, spec, lambda context: api.llama_memory_clear(api.llama_get_memory(context), True))


def ik_llama_cpp(spec: dict[str, Any]) -> Feed:
    from ik_llama_cpp import _ctypes_api as api

    return _llama(api, spec, api.llama_kv_cache_clear)


def _llama(api: Any, spec: dict[str, Any], clear: Callable[[Any], None]) -> Feed:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(spec["model"].encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = spec["capacity"]
    settings.n_threads = settings.n_threads_batch = spec["threads"]
    context = api.llama_init_from_model(model, settings) if model else None
    if not context:
        raise RuntimeError(f"cannot load {spec['model']}")
    num_logits = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(spec["capacity"], 0, 1)

    def feed(tokens: list[int], start: int) -> np.ndarray:
        if not start:
            clear(context)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if api.llama_decode(context, batch):
            raise RuntimeError(f"cannot decode {len(tokens)} tokens at {start}")
        logits = api.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (num_logits,))

    return feed


def openvino(spec: dict[str, Any]) -> Feed:
    """The graph that openvino-genai makes of a GGUF file, run by OpenVINO itself, so that all engines share a loop."""
    import openvino as api
    import openvino_genai

    core, file = api.Core(), spec["model"]
    threads = {"INFERENCE_NUM_THREADS": spec["threads"]}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(file)) as folder:
        link = os.path.join(folder, "model.gguf")
        os.symlink(file, link)
        with contextlib.suppress(RuntimeError):  # it saves the graph, and may then fail to compile it in memory
            openvino_genai.LLMPipeline(link, "CPU", enable_save_ov_model=True, **threads)
        request = core.compile_model(os.path.join(folder, "openvino_model.xml"), "CPU", threads).create_infer_request()

    def feed(tokens: list[int], start: int) -> np.ndarray:
        if not start:
            request.reset_state()
        stop = start + len(tokens)
        request.infer({"input_ids": np.array([tokens]), "attention_mask": np.ones((1, stop), np.int64),
                       "position_ids": np.arange(start, stop)[None], "beam_idx": np.zeros(1, np.int32)})
        return request.get_tensor("logits").data[0, -1]

    return feed


def onnxruntime(spec: dict[str, Any]) -> Feed:
    """The linears of the JSON file alone, with random weights, each of ones: INT8 as ONNX Runtime's own dynamic
    quantisation makes it, INT4 in blocks of 32 that share a scale. The last one, the head, takes one row."""
    import onnxruntime as api
    from onnx import TensorProto, helper, numpy_helper

    with open(spec["model"], encoding="utf-8") as file:
        precision, shapes = json.load(file)
    random, nodes, weights, inputs, outputs = np.random.default_rng(0), [], [], {}, []
    for i, (rows, columns) in enumerate(shapes):
        x = "head" if i == len(shapes) - 1 else f"x{columns}"
        inputs[x] = columns
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [None, rows]))
        if precision == "int4":
            num_blocks = columns // 32
            weights += [(f"w{i}", random.integers(0, 256, (rows, num_blocks, 16), np.uint8)),
                        (f"s{i}", random.random(rows * num_blocks, np.float32))]
            nodes.append(helper.make_node("MatMulNBits", [x, f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
                                          K=columns, N=rows, bits=4, block_size=32, accuracy_level=4))
        else:
            weights.append((f"w{i}", random.integers(-127, 128, (columns, rows), np.int8)))
            nodes += [helper.make_node("DynamicQuantizeLinear", [x], [f"q{i}", f"s{i}", f"z{i}"]),
                      helper.make_node("MatMulInteger", [f"q{i}", f"w{i}", f"z{i}"], [f"i{i}"]),
                      helper.make_node("Cast", [f"i{i}"], [f"f{i}"], to=TensorProto.FLOAT),
                      helper.make_node("Mul", [f"f{i}", f"s{i}"], [f"y{i}"])]
    graph = helper.make_graph(
        nodes, "linears", [helper.make_tensor_value_info(x, TensorProto.FLOAT, [None, columns])
                           for x, columns in inputs.items()],
        outputs, [numpy_helper.from_array(array, name) for name, array in weights])
    model = helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    options = api.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    session = api.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def feed(tokens: list[int], start: int) -> np.ndarray:
        session.run(None, {x: np.ones((1 if x == "head" else len(tokens), columns), np.float32)
                           for x, columns in inputs.items()})
        return np.zeros(1)

    return feed


ENGINES: dict[str, Callable[[dict[str, Any]], Feed]] = {
    "llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama_cpp, "openvino": openvino, "onnxruntime": onnxruntime}


def answer(feed: Feed, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """What is printed for a request."""
    start = time.perf_counter()
    logits = feed(prompt, 0)
    if not new_tokens:
        return {"logits": logits.tolist()}
    tokens = [int(logits.argmax())]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        tokens.append(int(feed(tokens[-1:], len(prompt) + len(tokens) - 1).argmax()))
    return {"tokens": tokens, "first_seconds": first - start, "later_seconds": time.perf_counter() - first}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    feed = ENGINES[spec["engine"]](spec)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(feed, request["prompt"], request["new_tokens"])), file=replies, flush=True)


if __name__ == "__main__":
    main()
