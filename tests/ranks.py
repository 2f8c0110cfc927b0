"""Processes of one group, run together by the tests of data parallelism."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import paraboloid as pb


def run(script, folder, world=2):
    """What `python SCRIPT RANK WORLD FOLDER` saved as `FOLDER/RANK.pt`, for each rank.

    A rank that ends without having saved ends the others, which would wait for it; apart from that they take as long
    as they take.  What a rank found counts, not how its process ended after that: torch's threads can abort an
    interpreter that is closing (a thread of gloo that lets go of a tensor asks for the interpreter's lock).
    """
    paths = [str(Path(script).parent), str(Path(__file__).parent), str(Path(pb.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    said, saved = ([folder / f"{rank}.{kind}" for rank in range(world)] for kind in ("txt", "pt"))
    with ExitStack() as stack:
        started = []
        for rank, path in enumerate(said):
            command = [sys.executable, "-X", "faulthandler", str(script), str(rank), str(world), str(folder)]
            err = stack.enter_context(path.open("w"))
            started.append(stack.enter_context(subprocess.Popen(command, env=environment, stderr=err)))
            stack.callback(started[-1].kill)
        while not all(path.exists() for path in saved):
            codes = [process.poll() for process in started]
            if any(code is not None and not path.exists() for code, path in zip(codes, saved, strict=True)):
                texts = [path.read_text() for path in said]
                last = [text.strip().rpartition("\n")[2] for text in texts]  # first, for a summary shows one line
                raise AssertionError("\n".join([f"the ranks ended with {codes}: {last}", *texts]))
            time.sleep(0.05)
        for process in started:
            process.wait()
    return [torch.load(path, weights_only=False) for path in saved]


def leave(found, rank, world, folder):
    """Save what this rank found, and end its process once every rank has saved, without closing the interpreter.

    Gloo's last collective may end on one rank before another has read it: sockets closed then reset the connection.
    """
    torch.save(found, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    while not all((folder / f"{other}.pt").exists() for other in range(world)):
        time.sleep(0.05)
    os._exit(0)
