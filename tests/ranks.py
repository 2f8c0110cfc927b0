"""Processes of one group, run together by the tests of data parallelism."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

import paraboloid as pb


def run(script, folder, world=2):
    """What `python SCRIPT RANK WORLD FOLDER` saved as `FOLDER/RANK.pt`, for each rank.

    A rank that fails ends the others, which would wait for it; apart from that they take as long as they take.
    """
    paths = [str(Path(script).parent), str(Path(__file__).parent), str(Path(pb.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    said = [folder / f"{rank}.txt" for rank in range(world)]
    with ExitStack() as stack:
        started = []
        for rank, path in enumerate(said):
            command = [sys.executable, str(script), str(rank), str(world), str(folder)]
            err = stack.enter_context(path.open("w"))
            started.append(stack.enter_context(subprocess.Popen(command, env=environment, stderr=err)))
            stack.callback(started[-1].kill)
        while any(process.poll() is None for process in started) and not any(process.returncode for process in started):
            time.sleep(0.05)
        codes = [process.returncode for process in started]
    texts = [path.read_text() for path in said]
    last = [text.strip().rpartition("\n")[2] for text in texts]  # first, for a summary shows one line
    assert codes == [0] * world, "\n".join([f"the ranks ended with {codes}: {last}", *texts])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def leave(found, rank, world, folder):
    """Save what this rank found, and end its process group once every rank has saved.

    Gloo's last collective may end on one rank before another has read it: sockets closed then reset the connection.
    """
    torch.save(found, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    while not all((folder / f"{other}.pt").exists() for other in range(world)):
        time.sleep(0.05)
    dist.destroy_process_group()
