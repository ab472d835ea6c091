"""``python -m fusedrnn info``: versions, build, devices and backends."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from importlib.metadata import version

import torch

import fusedrnn
from fusedrnn.backends import Request, native, weigh
from fusedrnn.cells import LSTM


def availability(backend: str, devices: list[str]) -> str:
    """Where a backend runs an LSTM, or why it does nowhere."""
    reasons = {
        device: weigh(Request(LSTM, torch.float32, torch.device(device), 128, 0), (backend,))
        for device in devices
    }
    runs = [device for device, reason in reasons.items() if reason[backend] is None]
    return f"runs on {', '.join(runs)}" if runs else str(reasons[devices[-1]][backend])


def info() -> str:
    triton = version("triton") if importlib.util.find_spec("triton") else "not installed"
    isas = ", ".join(native.isas())
    build = f"native CPU engine on {native.isa()} (runs here: {isas})" if isas else "pure Python"
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    devices = ["cpu", *(f"cuda:{k}" for k in range(len(gpus)))]
    backends = "\n".join(f"  {n:<10} {availability(n, devices)}" for n in fusedrnn.list_backends())
    return f"""fusedrnn   {fusedrnn.__version__}: {build}
python     {platform.python_version()} on {platform.system()} {platform.machine()}
torch      {torch.__version__}, {torch.get_num_threads()} threads
triton     {triton}
GPUs       {", ".join(gpus) or "none"}
backends
{backends}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
