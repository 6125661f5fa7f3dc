"""run_ranks: a function on N processes that form a gloo group; their results, or their tracebacks with rank tags."""

import multiprocessing
import os
import pickle
import queue
import time
import traceback

from sparse_train.launch.submit.processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
# The fork server imports once what every rank needs; a spawned rank would take seconds longer.
CONTEXT.set_forkserver_preload(["deepspeed", "sparse_train.training", "sparse_train.models"])


def run_ranks(function, world, *arguments, timeout_s=180, accelerator="cpu"):
    """[function(*arguments) of rank 0, of rank 1, ...]; `function` is module-level. A failed rank fails all."""
    # The fork server has already chosen the CPU.
    context = CONTEXT if accelerator == "cpu" else multiprocessing.get_context("spawn")
    port, results = free_port(), context.Queue()
    processes = [context.Process(target=_rank, args=(accelerator, function, rank, world, port, results, arguments),
                                 daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, world, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes, results, world, deadline):
    found = {}
    while len(found) < world:
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in found]
            if dead:
                raise AssertionError(f"ranks {dead} died: exit codes {[processes[r].exitcode for r in dead]}") from None
            if time.monotonic() > deadline:
                raise AssertionError(f"ranks {sorted(set(range(world)) - set(found))} did not finish") from None
            continue
        if error:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(world)]


def _rank(accelerator, function, rank, world, port, results, arguments):
    os.environ["DS_ACCELERATOR"] = accelerator
    import torch

    from sparse_train import dist
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
        dist.start(rank, world, rank, world, "127.0.0.1", port)
        results.put((rank, pickle.dumps(function(*arguments)), None))  # by value: a sent tensor dies with its process
        results.close()
        results.join_thread()
        dist.barrier()
        dist.stop()
    except BaseException:  # the parent shows it
        results.put((rank, None, f"[rank {rank}] " + traceback.format_exc().replace("\n", f"\n[rank {rank}] ")))
