"""Several processes that compute one thing together, forked from a server that has imported what
they need.
"""

import json
import multiprocessing
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lab.core.distributed import Team

_PRELOADED = ["preloaded"]
_PATIENCE_S = 150.0

Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


def together(size, function, *arguments, folder, bare=False):
    """``function(team, *arguments)`` of every process, in the order of ranks.

    With ``bare``, ``function(*arguments)``, which finds the environment that accelerate would set
    and joins by itself.

    A raised exception is returned as values ``{"raised": name of its class, "message": text}``.
    """
    folder = folder / f"{function.__name__}-{size}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    # the place where processes meet belongs to the parent, as it belongs to accelerate in a real
    # run
    meeting = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if bare else None
    )
    port = meeting.port if meeting is not None else None
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, before])
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        processes = [
            context.Process(
                target=_one, args=(rank, size, folder, function, arguments, port), daemon=True
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
    finally:
        os.environ["PYTHONPATH"] = before
    for process in processes:
        process.join(_PATIENCE_S)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging, f"processes {hanging} of {size} did not end within {_PATIENCE_S} s"
    codes = [process.exitcode for process in processes]
    assert codes == [0] * size, f"exit codes {codes}"
    return [
        (
            load_file(folder / f"{rank}.safetensors"),
            json.loads((folder / f"{rank}.json").read_text()),
        )
        for rank in range(size)
    ]


def _one(
    rank,
    size,
    folder,
    function,
    arguments,
    port,
):
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")
    if port is not None:
        place = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        os.environ |= {name: str(value) for name, value in place.items()} | {
            "MASTER_ADDR": "127.0.0.1"
        }
    elif size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
        )
        arguments = (Team(size, rank), *arguments)
    else:
        arguments = (Team(), *arguments)
    try:
        tensors, values = function(*arguments)
    except Exception as error:
        tensors, values = {}, {"raised": type(error).__name__, "message": str(error)}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / f"{rank}.safetensors",
    )
    (folder / f"{rank}.json").write_text(json.dumps(values))
    if port is not None:
        os._exit(0)  # as `lab.runner.worker` does: others may still wait for this one
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
