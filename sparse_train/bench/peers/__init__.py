"""Engines that a user would pick instead: what each needs to be installed, and to be given a model.

    linears.py       the shapes of a dense folder's linears
    environment.py   an environment of its own per peer: their dependencies are none of ours
    engine.py        a process of that environment, which runs worker.py and waits between its turns
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparse_train.bench.decode import Key
from sparse_train.bench.peers.engine import Engine
from sparse_train.bench.peers.environment import make_environment
from sparse_train.bench.peers.linears import write_linears
from sparse_train.errors import UserError
from sparse_train.exporters import export
from sparse_train.models import read_config

log = logging.getLogger(__name__)


def write_gguf(folder: str | Path, kind: str, file: Path) -> int:
    """Export as GGUF and return the bytes of the weights that a token reads: one row of an embedding, all of one that
    is the head as well."""
    export(folder, "gguf", file, kind)
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


@dataclass(frozen=True)
class Peer:
    """worker.py has its engine under the same name."""

    install: tuple[str, ...]
    """Arguments of pip install."""
    precisions: tuple[str, ...]
    families: tuple[str, ...] | None = None
    """transformers' model_type of the models that it decodes; None: any."""
    prepare: Callable[[str | Path, str, Path], int] = write_gguf
    """Writes a dense folder at a precision to a file; returns the bytes that a token reads."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of pip's environment."""
    what: str = "decode"
    """linears: the products of a token alone."""


# llama-cpp-python has no wheel for today's CPUs. What GCC 12 makes of it dies on a CPU with AMX; CC=clang CXX=clang++
# helps. ik-llama-cpp-python comes as a wheel for AVX2: the source archive of 0.1.5 lacks a file that CMake needs.
PEERS = {
    "llama.cpp": Peer(("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"), ("Q4_0", "Q4_1", "Q8_0"),
                      ("llama", "mpt"), variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}),
    "ik_llama.cpp": Peer(("ik-llama-cpp-python==0.1.5",), ("Q4_0", "Q4_1", "Q8_0"), ("llama",)),
    "openvino": Peer(("openvino-genai==2026.4.1.0",), ("Q4_0", "Q8_0"), ("llama",)),
    "onnxruntime": Peer(("onnxruntime==1.32.0", "onnx==1.23.2"), ("int4", "int8"), prepare=write_linears,
                        what="linears"),
}


@dataclass(frozen=True)
class PeerModel:
    """A model that is ready for a peer."""

    key: Key
    python: Path
    file: Path
    num_bytes: int


def prepare_peers(names: Iterable[str], dense: str, work: Path) -> list[PeerModel]:
    """Write the model of the folder `dense` for the peers, into the folder `work`, and install them.

    A peer that decodes no such model, or whose file cannot hold it, is named in a warning. Raises UserError.
    """
    models, family = [], read_config(dense).model_type
    written: dict[object, tuple[Path, int]] = {}
    for name in names:
        peer = PEERS[name]
        if peer.families and family not in peer.families:
            log.warning("%s is left out: it decodes no %s model here", name, family)
            continue
        try:  # before the installation, which may take many minutes
            for precision in peer.precisions:
                if (peer.prepare, precision) not in written:
                    file = work / f"model-{len(written)}"
                    written[peer.prepare, precision] = file, peer.prepare(dense, precision, file)
        except UserError as error:
            log.warning("%s is left out: %s", name, error)
            continue
        python = make_environment(name, peer.install, peer.variables)
        models += [PeerModel((dense, name, precision, 0.0), python, *written[peer.prepare, precision])
                   for precision in peer.precisions]
    return models


@contextmanager
def started(models: Iterable[PeerModel], threads: int, capacity: int) -> Iterator[dict[Key, Engine]]:
    """Their processes, for texts of at most `capacity` tokens; they are ended at the end."""
    with ExitStack() as stack:
        engines = {}
        for model in models:
            name = model.key[1]
            engines[model.key] = Engine(model.python, name, model.file, model.num_bytes, threads, capacity,
                                        PEERS[name].what)
            stack.callback(engines[model.key].close)
        yield engines
