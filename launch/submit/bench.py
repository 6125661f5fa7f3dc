"""sparse-train bench: measurements without a run. Each prints a table, and JSON as its last line."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import log
from sparse_train.errors import StageFailed, UserError, first_line
from sparse_train.registry import PRUNERS
from sparse_train.tables import print_table

_GPU_VARIANTS = [("bf16", 0.5), ("bf16", 0.6), ("bf16", 0.7), ("bf16", 0.8), ("int8", 0.75), ("int4", 0.5),
                 ("int4", 0.75)]


def add_bench(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser("bench", help="measure kernels, training steps and losses on this machine")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")

    layers = kinds.add_parser("layers", help="the linears of one MPT-7B block, one token at a time, and an MLP for "
                               "prompts of 128 and 512 rows, dense and sparse")
    layers.add_argument("--sparsity", type=_sparsity, nargs="+", help="default: 0.5 0.75 0.9; on a GPU 0.5 to 0.8 in "
                        "BF16, 0.75 in INT8, 0.5 and 0.75 in INT4")
    layers.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: of a block of an 8B Llama as "
                        "well, and its prompts with 2:4 weights")
    layers.add_argument("--repeats", type=_positive, default=15)
    layers.set_defaults(command=_layers)

    decode = kinds.add_parser("decode", help="tokens per second of models and of other engines, at batch 1")
    models = decode.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", metavar="FOLDER", nargs="+",
                        help="dense or sparse; the others are compared with the first")
    models.add_argument("--shape", metavar="NAME", help="random weights of this size, dense and sparse in every "
                        "precision: mpt-506m, or one block: mpt-7b-block, llama-8b-block")
    decode.add_argument("--sparsity", type=_sparsity, nargs="+", help="of --shape (default: 0.5 0.75)")
    decode.add_argument("--peers", type=lambda names: names.split(","), default=[], metavar="NAME,...",
                        help="other engines, on the first model, which is dense: all, or some of torch-bf16, "
                        "llama.cpp, ik_llama.cpp, openvino, onnxruntime; each is installed once, in an environment of "
                        "its own")
    decode.add_argument("--threads", type=_positive, nargs="+", help="one measurement for each (default: all CPUs)")
    decode.add_argument("--prompt-tokens", type=_positive, nargs="+", default=[128], help="one measurement for each")
    decode.add_argument("--new-tokens", type=_positive, default=64)
    decode.add_argument("--kv-cache", choices=("fp32", "bf16"), nargs="+",
                        help="of our models on the CPU, one row for each (default: fp32)")
    decode.add_argument("--repeats", type=_positive, default=7)
    decode.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the models as CUDA graphs in "
                        "BF16, for batches of 1 and 16 answers; --shape may also be mpt-7b or llama-8b")
    decode.add_argument("--json", action="store_true", help="only the last line")
    decode.set_defaults(command=_decode)

    serve = kinds.add_parser("serve", help="tokens per second of vLLM's server, dense and sparse, for several requests "
                             "at a time")
    serve.add_argument("--model", metavar="FOLDER", nargs="+", required=True,
                       help="dense or sparse; the others are compared with the first")
    serve.add_argument("--python", type=Path, default=Path("build/serve/bin/python"), metavar="FILE",
                       help="of an environment with vllm and sparse-train (default: that of make serve)")
    serve.add_argument("--concurrent", type=_positive, nargs="+", default=[1, 8, 32], metavar="N",
                       help="requests at a time, one measurement for each (default: 1 8 32)")
    serve.add_argument("--prompt-tokens", type=_positive, default=64)
    serve.add_argument("--new-tokens", type=_positive, default=64)
    serve.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of vLLM")
    serve.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes as vLLM starts")
    serve.add_argument("--repeats", type=_positive, default=5)
    serve.add_argument("--json", action="store_true", help="only the last line")
    serve.set_defaults(command=_serve)

    moves = kinds.add_parser("moves", help="expanding and compacting a 4096 x 4096 weight against copying it")
    moves.add_argument("--sparsity", type=_sparsity, nargs="+", default=[0.5, 0.75, 0.9])
    moves.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    moves.add_argument("--repeats", type=_positive, default=30)
    moves.set_defaults(command=_moves)

    train = kinds.add_parser("train", help="a training step: ours and the usual masked way, relative to dense")
    train.add_argument("--on", default="local", metavar="CLUSTER", help="a file of configs/cluster (default: local)")
    train.add_argument("--ranks", type=_positive, help="number of processes (default: that of the cluster file)")
    train.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs where there are any")
    train.add_argument("--sparsity", type=_sparsity, default=0.75)
    train.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    train.add_argument("--model", metavar="FOLDER", help="a decoder's folder or hub name (default: an MPT, untrained)")
    train.add_argument("--d-model", type=_width, help="of the MPT: a multiple of 64 (default: 768)")
    train.add_argument("--n-layers", type=_positive, help="of the MPT (default: 6)")
    train.add_argument("--num-tokens", type=_positive, default=512, help="per rank and step")
    train.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    train.add_argument("--repeats", type=_positive, default=7)
    train.add_argument("--json", action="store_true", help="only the last line")
    train.set_defaults(command=_train)

    prune = kinds.add_parser("prune", help="one block of MPT-7B by phase and method, and what whole models would take")
    prune.add_argument("--methods", type=_methods, metavar="NAME,...", help="of prune.method (default: all but obert)")
    prune.add_argument("--width", type=_width, default=4096, help="of the block: a multiple of 64 (default: 4096)")
    prune.add_argument("--tokens", type=_positive, default=16384, help="of calibration (default: 16384)")
    prune.add_argument("--sparsity", type=_sparsity, default=0.5)
    prune.add_argument("--json", action="store_true", help="only the last line")
    prune.set_defaults(command=_prune)

    losses = kinds.add_parser("losses", help="what each loss makes of a pruned model's gradient, and weights that make "
                              "these gradients alike")
    losses.add_argument("config", help="a recipe, for its task")
    losses.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as task.path=FOLDER")
    losses.add_argument("--student", required=True, metavar="FOLDER", help="the pruned model")
    losses.add_argument("--teacher", required=True, metavar="FOLDER", help="the dense one, or a name on the hub")
    losses.add_argument("--batches", type=_positive, default=4, help="of the first training examples (default: 4)")
    losses.add_argument("--batch-size", type=_positive, default=2, help="examples of a batch (default: 2)")
    losses.set_defaults(command=_losses)
    for kind in (layers, decode, serve, moves, train, prune, losses):
        log.add_options(kind)


def _sparsity(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _width(text: str) -> int:
    value = _positive(text)
    if value % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 64")
    return value


def _methods(text: str) -> list[str]:
    try:
        return [PRUNERS.check(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _layers(options, console: Console) -> None:
    import torch

    from sparse_train import kernels
    from sparse_train.bench.layers import MLP_2048, MPT_7B_BLOCK, PROMPT_ROWS, layer_rows, random_weights
    from sparse_train.bench.shapes import PRECISIONS
    from sparse_train.bench.tables import SPEED_HEADER, print_measured, speed_cells
    from sparse_train.cpus import set_threads

    set_threads()
    if options.device == "cuda":
        _device_layers(options, console)
        return
    bandwidth, rows, sparsities = kernels.read_bandwidth(), [], options.sparsity or [0.5, 0.75, 0.9]
    for sparsity in sparsities:
        rows += layer_rows("mpt-7b block", random_weights(MPT_7B_BLOCK, sparsity), options.repeats, bandwidth)
    for sparsity in sparsities:
        for num_rows in PROMPT_ROWS:
            rows += layer_rows("mlp 2048-8192-2048", random_weights(MLP_2048, sparsity), options.repeats, bandwidth,
                               num_rows=num_rows)
    print_measured(console, SPEED_HEADER, map(speed_cells, rows), [kernels.backend()], num_left=3)
    break_even = {precision: {num_rows: kernels.break_even(num_rows, precision)
                              for num_rows in (2, 4, 8, 16, 32, 64, 128)} for precision in PRECISIONS}
    console.print("zeros are skipped up to a density of, by the number of rows:", highlight=False)
    print_table(console, ("precision", *map(str, break_even[PRECISIONS[0]])), [
        [precision, *(f"{density:.2f}" for density in of_rows.values())] for precision, of_rows in break_even.items()])
    print(json.dumps({"backend": kernels.backend(), "threads": torch.get_num_threads(), "bandwidth": bandwidth,
                      "break_even": break_even, "rows": rows}))


def _device_layers(options, console: Console) -> None:
    import torch

    from sparse_train.bench.gpu import LLAMA_8B_BLOCK, device_bandwidth, device_layer_rows, weights_2_of_4
    from sparse_train.bench.layers import MPT_7B_BLOCK, PROMPT_ROWS, random_weights
    from sparse_train.bench.tables import SPEED_HEADER, print_measured, speed_cells
    from sparse_train.inference.gpu import find_gpu

    device = find_gpu()
    bandwidth, rows = device_bandwidth(device), []
    variants = ([(precision, sparsity) for precision in ("bf16", "int8", "int4") for sparsity in options.sparsity]
                if options.sparsity else _GPU_VARIANTS)
    for name, shapes in (("llama-8b block", LLAMA_8B_BLOCK), ("mpt-7b block", MPT_7B_BLOCK)):
        by_sparsity = {sparsity: random_weights(shapes, sparsity, device=device) for _, sparsity in variants}
        rows += device_layer_rows(name, {variant: by_sparsity[variant[1]] for variant in variants}, options.repeats,
                                  bandwidth, device)
    try:
        for num_rows in PROMPT_ROWS:
            rows += device_layer_rows("llama-8b block, 2:4", {("bf16", 0.5): weights_2_of_4(LLAMA_8B_BLOCK, device)},
                                      options.repeats, bandwidth, device, num_rows=num_rows)
    except RuntimeError as error:  # cuSPARSELt may leave the device unusable; the rows above are there
        console.print(f"prompts are left out: {first_line(error)}", highlight=False, markup=False, soft_wrap=True)
    print_measured(console, SPEED_HEADER, map(speed_cells, rows), num_left=3)
    print(json.dumps({"device": torch.cuda.get_device_name(device), "bandwidth": bandwidth, "rows": rows}))


def _decode(options, console: Console) -> None:
    import torch

    from sparse_train import kernels
    from sparse_train.bench.compare import compare
    from sparse_train.bench.tables import SPEED_HEADER, print_measured, speed_cells
    from sparse_train.cpus import cpu_name, set_threads

    if options.sparsity and options.model:
        raise UserError("--sparsity is of --shape's random weights, and a folder has its own; leave out --sparsity")
    set_threads()
    if options.device == "cuda":
        _device_decode(options, console)
        return
    rows = []
    for run in compare(options.model or [], options.shape, options.sparsity or [0.5, 0.75], options.peers,
                       options.threads or [torch.get_num_threads()], options.prompt_tokens, options.new_tokens,
                       options.repeats, options.kv_cache or ["fp32"]):
        rows += run
        if not options.json:
            first = run[0]
            prompt = f"{first['prompt_tokens']} prompt tokens" if first["prompt_tokens"] else "a window of sound"
            console.print(f"threads: {first['threads']}; {prompt}; memory is read at "
                          f"{first['bandwidth'] / 1e9:.1f} GB/s", highlight=False)
            print_measured(console, (*SPEED_HEADER, "tokens/s", "outside", "first ms", "MB", "off"), [
                [*speed_cells(row), f"{row['tokens_per_second']:.1f}",
                 "-" if row["outside_products"] is None else f"{row['outside_products']:.0%}",
                 f"{row['first_token_milliseconds']:.0f}", f"{row['bytes'] / 1e6:.0f}",
                 "-" if row["logit_error"] is None else f"{row['logit_error']:.3f}"] for row in run],
                [kernels.backend()], num_left=3)
    print(json.dumps({"backend": kernels.backend(), "device": cpu_name(), "rows": rows}))


def _device_decode(options, console: Console) -> None:
    import functools

    import torch

    from sparse_train.bench.decode import example_of_length
    from sparse_train.bench.gpu import WHOLE, device_bandwidth, device_decode_rows, random_runtime
    from sparse_train.bench.shapes import shape_tokenizer
    from sparse_train.bench.tables import SPEED_HEADER, print_measured, speed_cells
    from sparse_train.inference import load
    from sparse_train.inference.gpu import find_gpu
    from sparse_train.models import load_processor

    if options.peers or options.threads or options.kv_cache or len(options.prompt_tokens) > 1:
        raise UserError("--peers, --threads, --kv-cache and several --prompt-tokens are measured on the CPU; leave "
                        "them out")
    if options.shape and options.shape not in WHOLE:
        raise UserError(f"--shape {options.shape}: a GPU is measured with one of {', '.join(WHOLE)}")
    device = find_gpu()
    variants = ([(precision, sparsity) for precision in ("bf16", "int8", "int4") for sparsity in options.sparsity]
                if options.sparsity else [("bf16", 0.5), ("bf16", 0.75), ("int8", 0.75), ("int4", 0.75)])
    tokenizer = shape_tokenizer() if options.shape else load_processor(options.model[0]).tokenizer
    example = example_of_length(tokenizer, options.prompt_tokens[0])
    bandwidth, rows = device_bandwidth(device), []
    for batch in (1, 16):
        loads = ([functools.partial(random_runtime, WHOLE[options.shape], variant, batch, device)
                  for variant in (None, *variants)] if options.shape else
                 [functools.partial(load, folder, device="cuda", batch_size=batch) for folder in options.model])
        rows += device_decode_rows(loads, options.shape or options.model[0], example, options.new_tokens,
                                   options.repeats, bandwidth, device, batch)
    if not options.json:
        print_measured(console, (*SPEED_HEADER, "tokens/s", "MB"), [
            [*speed_cells(row), f"{row['tokens_per_second']:.1f}", f"{row['memory'] / 1e6:.0f}"] for row in rows],
            num_left=3)
    print(json.dumps({"device": torch.cuda.get_device_name(device), "bandwidth": bandwidth, "rows": rows}))


def _serve(options, console: Console) -> None:
    from sparse_train.bench.serve import serve_rows
    from sparse_train.bench.tables import print_measured, spread_cell
    from sparse_train.cpus import available_cpus, cpu_name
    from sparse_train.stopping import handle_signals

    handle_signals()
    rows = serve_rows(options.python, options.model, options.concurrent, options.prompt_tokens, options.new_tokens,
                      options.repeats, options.dtype, options.eager)
    if not options.json:
        print_measured(console, ("model", "at a time", "tokens/s", "spread", "to the first", "quartiles"), [
            [row["model"], str(row["concurrent"]), f"{row['tokens_per_second']:.1f}",
             spread_cell(row["low"], row["tokens_per_second"], row["high"]),
             f"{row['speedup']:.2f}x" if row["gains"] or row["model"] == options.model[0] else
             f"{row['speedup']:.2f}x, no gain", f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"]
            for row in rows])
    print(json.dumps({"device": cpu_name(), "threads": available_cpus(), "prompt_tokens": options.prompt_tokens,
                      "new_tokens": options.new_tokens, "dtype": options.dtype, "eager": options.eager, "rows": rows}))


def _moves(options, console: Console) -> None:
    import torch

    from sparse_train.bench.moves import move_rows
    from sparse_train.bench.tables import print_measured, spread_cell
    from sparse_train.cpus import cpu_name, set_threads
    from sparse_train.inference.gpu import find_gpu

    if options.device == "cuda":
        find_gpu()
    set_threads()
    rows = move_rows(options.sparsity, options.repeats, torch.device(options.device))
    keys = ("kernel", "dtype", "backend", "sparsity", "milliseconds", "fraction_of_copy")
    print_measured(console, (*keys, "spread"), [
        [*(row[key] if isinstance(row[key], str) else f"{row[key]:.2f}" for key in keys),
         spread_cell(row["low"], row["milliseconds"], row["high"])] for row in rows])
    name = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    print(json.dumps({"device": name, "rows": rows}))


def _prune(options, console: Console) -> None:
    import torch

    from sparse_train import dist
    from sparse_train.bench.prune import ASSUMPTIONS, PHASES, prune_rows
    from sparse_train.cpus import cpu_name, set_threads

    set_threads()
    rows = prune_rows(options.methods, options.width, options.tokens, options.sparsity)
    if not options.json:
        console.print(f"a block of MPT, {options.width} wide, {rows[0]['num_tokens']:,} tokens, on "
                      f"{torch.get_num_threads()} threads; seconds", highlight=False)
        print_table(console, ("method", *PHASES, "all"), [
            [row["method"], *(f"{row['seconds'][phase]:.2f}" for phase in PHASES),
             f"{sum(row['seconds'].values()):.2f}"] for row in rows])
        print_table(console, ("hours", *(f"{name} on {count}" for name, count, _ in rows[0]["models"])), [
            [row["method"], *(f"{seconds / 3600:.2f}" for _, _, seconds in row["models"])] for row in rows])
        console.print("assumed: " + "; ".join(ASSUMPTIONS), highlight=False, soft_wrap=True)
    name = cpu_name() if dist.device().type == "cpu" else torch.cuda.get_device_name()
    print(json.dumps({"device": name, "threads": torch.get_num_threads(), "assumptions": ASSUMPTIONS,
                      "rows": rows}))


def _losses(options, console: Console) -> None:
    from sparse_train import dist
    from sparse_train.bench.losses import measure_losses
    from sparse_train.compat.transformers import to_device
    from sparse_train.config import RunConfig
    from sparse_train.config.load import load_config
    from sparse_train.cpus import set_threads
    from sparse_train.launch.run.recipes import find_recipe
    from sparse_train.models import load_model, load_processor
    from sparse_train.sparse import sparse_linears
    from sparse_train.tasks import build_task, training_examples

    set_threads()
    spec = load_config(RunConfig, find_recipe(options.config), options.overrides).task
    student, teacher = (to_device(load_model(path), dist.device()) for path in (options.student, options.teacher))
    if not sparse_linears(student):
        raise UserError(f"--student {options.student} has no sparse layer; give the folder of a pruned model")
    processor, task = load_processor(options.student, spec.language), build_task(spec)
    size = options.batch_size
    examples = list(training_examples(task, processor, options.batches * size)[0])
    result = measure_losses(student, teacher, (task.batch(examples[start:start + size], processor).to(dist.device())
                                               for start in range(0, len(examples), size)))
    print_table(console, list(result["rows"][0]), [
        [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row.values()] for row in result["rows"]], 3)
    largest = ", ".join(f"{ratio:.3g}" for ratio in result["largest_tokens"].values())
    console.print(f"the largest norm of a token over the median token's, block after block of the teacher: {largest}",
                  highlight=False, soft_wrap=True)
    print(json.dumps(result))


def _train(options, console: Console) -> int:
    from sparse_train.launch.run.cluster import load_cluster
    from sparse_train.launch.submit.processes import free_port, start_processes, stop_processes
    from sparse_train.stopping import handle_signals

    if options.device == "cuda":
        from sparse_train.inference.gpu import find_gpu

        find_gpu()
    elif options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    cluster = load_cluster(options.on)
    measurement = _model_to_measure(options) | {
        key: getattr(options, key) for key in ("sparsity", "precision", "num_tokens", "checkpointing", "repeats")}
    handle_signals()
    with tempfile.TemporaryDirectory() as logs:
        job = start_processes(cluster, options.ranks or cluster.ranks, Path(logs), _train_rank, measurement, cluster,
                              free_port())
        try:
            result = job.results()[0]
        except Exception as error:
            raise StageFailed(f"bench train failed: {str(error).strip().splitlines()[-1]}") from error
        except KeyboardInterrupt:
            stop_processes(job, 0)
            raise
    if not options.json:
        _print_train(result, console)
    print(json.dumps(result))
    return 0


def _model_to_measure(options) -> dict[str, Any]:
    """The fields of TrainBench that say which model it is. Raises UserError for one that cannot be measured."""
    size = {key: getattr(options, key) for key in ("d_model", "n_layers") if getattr(options, key)}
    if options.model is None:
        return size
    if size:
        raise UserError("--d-model and --n-layers are the size of an untrained MPT; leave out these or --model")
    from sparse_train.models import read_config
    from sparse_train.models.positions import decoder_positions

    config = read_config(options.model)
    if config.is_encoder_decoder:
        raise UserError(f"{options.model} has an encoder, and bench train measures decoders; give a decoder's folder")
    positions = decoder_positions(config)
    if positions and options.num_tokens > positions:
        raise UserError(f"--num-tokens={options.num_tokens}: {options.model} has {positions} positions; give fewer")
    is_folder = Path(options.model).is_dir()
    return {"path": str(Path(options.model).resolve()) if is_folder else options.model,
            "vocab_size": config.get_text_config().vocab_size}


def _train_rank(measurement: dict[str, Any], cluster, port: int) -> dict[str, Any]:
    from sparse_train import dist
    from sparse_train.bench.train import TrainBench, train_bench
    from sparse_train.launch.worker.process_info import current_process
    from sparse_train.launch.worker.ranks import join_ranks

    heartbeat = join_ranks(current_process(), cluster, port)
    try:
        return train_bench(TrainBench(**measurement))
    finally:
        heartbeat.stop()
        dist.stop()


def _print_train(result: dict[str, Any], console: Console) -> None:
    from sparse_train.bench.tables import print_measured, spread_cell

    measured = result["measured"]
    console.print(f"{result['products_flops_per_second']['median'] / 1e9:.0f} GFLOP/s in products of the linears' "
                  "shapes on one rank; of products: a step's rate relative to that", highlight=False)
    arithmetic = measured["ours"]["flops"] / measured["dense"]["flops"]
    console.print(f"{result['ranks']} ranks on {result['device']}, ZeRO-3; relative to the dense step; "
                  f"arithmetic alone makes ours {arithmetic:.2f}", highlight=False)
    rows = []
    for name, values in measured.items():
        seconds = values["seconds"]
        step = result["step_time"].get(name, {"median": 1.0, "low": 1.0, "high": 1.0})
        rows.append([name, f"{1e3 * seconds['median']:.0f}",
                     f"{step['median']:.2f} ({step['low']:.2f}-{step['high']:.2f})",
                     spread_cell(seconds["low"], seconds["median"], seconds["high"]),
                     "{median:.2f} ({low:.2f}-{high:.2f})".format(**values["fraction_of_products"]),
                     *(f"{values[key] / 1e6:.0f} ({values[key] / measured['dense'][key]:.2f})"
                       for key in ("peak_memory", "traffic_bytes", "state_bytes"))])
    header = ("step", "ms", "time (quartiles)", "spread", "of products", "peak MB", "moved MB", "state MB per rank")
    print_measured(console, header, rows, [result["backend"]])
    groups = list(measured["dense"]["milliseconds_of"])
    print_table(console, ("where it goes, ms", *measured), [
        [group, *(f"{values['milliseconds_of'][group]:.0f}" for values in measured.values())] for group in groups])
