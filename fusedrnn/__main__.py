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


def info() -> str:
    triton = version("triton") if importlib.util.find_spec("triton") else "not installed"
    isas = ", ".join(native.isas())
    build = f"native CPU engine on {native.isa()} (runs here: {isas})" if isas else "pure Python"
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    request = Request(LSTM, torch.float32, "cpu", 128, 0)
    backends = "\n".join(
        f"  {name:<10} {'float32 on the CPU: yes' if reason is None else reason}"
        for name, reason in weigh(request, tuple(fusedrnn.list_backends())).items()
    )
    return f"""fusedrnn   {fusedrnn.__version__}: {build}
python     {platform.python_version()} on {platform.system()} {platform.machine()}
torch      {torch.__version__}, {torch.get_num_threads()} threads
triton     {triton}
GPUs       {", ".join(gpus) or "none"} (fusedrnn has no GPU kernels yet)
backends
{backends}"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
