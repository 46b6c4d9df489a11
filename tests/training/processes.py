"""Functions called in several processes, as torchrun starts them; they are forked, as importing takes longer."""

import gc
import multiprocessing
import os
import pickle
import socket
import sys

PRELOADED = [
    "tests.training.test_distributed",
    "tests.launch.test_processes",
    "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert",
]


def start(folder, function, *arguments, count=2, **options):
    """Processes that call ``function(*arguments)``; what they print goes to ``folder/said.log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [(folder, index, count, port) for index in range(count)]
    processes = [context.Process(target=_run, args=(place, function, arguments, options)) for place in places]
    for process in processes:
        process.start()
    return processes


def together(folder, function, *arguments, count=2, **options):
    """What ``function(*arguments)`` gives in each of ``count`` processes, in their order."""
    processes = start(folder, function, *arguments, count=count, **options)
    for process in processes:
        process.join(200)
    said = (folder / "said.log").read_text()
    assert [process.exitcode for process in processes] == [0] * count, said
    return [pickle.loads((folder / f"{index}.pickle").read_bytes()) for index in range(count)]


def _run(place, function, arguments, options):
    folder, index, count, port = place
    with open(folder / "said.log", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(index),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    gc.freeze()  # what was imported stays in memory shared with the process forked from
    import torch

    torch.set_num_threads(1)
    result = function(*arguments, **options)
    (folder / f"{index}.pickle").write_bytes(pickle.dumps(result))
    sys.exit(0)
