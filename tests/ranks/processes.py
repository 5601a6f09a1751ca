"""Several processes that do one command, as torchrun starts them, but forked from this one, which has imported all."""

import os
import signal
import sys
import time
import traceback

import torch

from qsvd.cli import run

SECONDS = 120  # until processes that hang are killed


def together(count, folder, *arguments, at=None):
    """Do `qsvd ARGUMENTS` in processes; return the exit code of each, and what each wrote to stdout and stderr.

    When one ends with an error the others get SIGTERM, as from torchrun.

    Args:
        at: Is called in every process before the command, with the number of the process.
    """
    return each(count, folder, lambda rank: _command(rank, arguments, at))


def _command(rank, arguments, at):
    if at is not None:
        at(rank)
    return run([str(argument) for argument in arguments])


def each(count, folder, work):
    """Call work(rank), which returns an exit code, in processes that see what torchrun sets; see `together`."""
    folder.mkdir(parents=True, exist_ok=True)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps one
    port = store.port
    processes = [_fork(rank, count, port, folder, work) for rank in range(count)]
    codes, end = {}, time.monotonic() + SECONDS
    while len(codes) < count:
        for rank, process in enumerate(processes):
            if rank not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank]:
                        _signal(processes, codes, signal.SIGTERM)
        if time.monotonic() > end:
            _signal(processes, codes, signal.SIGKILL)
        time.sleep(0.01)
    shown = [[(folder / f"{kind}-{rank}").read_text() for kind in ("out", "err")] for rank in range(count)]
    return [codes[rank] for rank in range(count)], shown


def _signal(processes, codes, number):
    for rank, process in enumerate(processes):
        if rank not in codes:
            os.kill(process, number)


def _fork(rank, count, port, folder, work):
    torch.set_num_threads(torch.get_num_threads())  # else threads of the work make torch's pool anew, at once
    process = os.fork()
    if process:
        return process
    code = 70
    torch.set_num_threads(1)  # the parent's pool is not here
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{kind}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        _forget_accelerate()
        code = work(rank)
    except BaseException:  # noqa: BLE001  # pytest must not go on in this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_accelerate():
    """Let accelerate look at the processes again: an earlier test of this process has trained alone."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def lines(shown):
    """The lines on stderr in which any of the processes says why it ends."""
    return [line for _, err in shown for line in err.splitlines() if line.startswith("qsvd: ")]
