"""Builds the native libraries with CMake and Ninja; pyproject.toml has all metadata.

fusedrnn/_C.so is the CPU engine, fusedrnn/_C_cuda.so the CUDA kernels, built if nvcc is found and
torch is not its CPU build; FUSEDRNN_CUDA=0 leaves them out, FUSEDRNN_CUDA=1 insists on them. Both
need torch's headers, at build time only. They are looked up where pip installs to, never imported
and never fetched, so the build works with and without build isolation. Without a C++20 compiler the
package is installed without either.
"""

import importlib.metadata
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

TOOLS = "without build isolation fusedrnn needs: pip install -U setuptools cmake ninja"
try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an older setuptools, which cannot read pyproject.toml either
    sys.exit(TOOLS)

ROOT = Path(__file__).parent.resolve()


def find_torch() -> importlib.metadata.Distribution | None:
    """An isolated build hides torch from sys.path but not from `site`."""
    places = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        places.append(site.getusersitepackages())
    for torch in importlib.metadata.distributions(name="torch", path=places):
        if tuple(map(int, torch.version.split(".")[:2])) >= (2, 10):
            return torch
    return None


def torch_include() -> Path:
    if not TORCH:
        sys.exit("fusedrnn needs torch >= 2.10 installed first: pip install torch")
    return Path(str(TORCH.locate_file("torch/include")))


def cxx20_compiler() -> str | None:
    """The compiler command, $CXX or the first of the usual names, if it knows C++20."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in commands:
        check = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        if not shutil.which(check[0]):
            continue
        if subprocess.run(check, input=b"#include <concepts>", capture_output=True).returncode == 0:
            return command
    return None


def cuda_compiler() -> str | None:
    """The path of nvcc, $CUDACXX or where CUDA is usually installed, as FUSEDRNN_CUDA wishes."""
    wish = os.environ.get("FUSEDRNN_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA is {wish!r}, expected 0 or 1")
    if wish == "0" or (wish == "" and TORCH and TORCH.version.endswith("+cpu")):
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc", path=os.pathsep.join(places))
    if nvcc:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
        if "compute_120" in listed.stdout:
            return nvcc
    if wish == "1":
        sys.exit("FUSEDRNN_CUDA=1 needs nvcc of CUDA 12.8 or later on PATH or in CUDA_HOME")
    return None


def say(sentence: str) -> None:
    """To the terminal, as pip shows nothing that a successful build prints."""
    try:
        with open("/dev/tty", "w") as terminal:
            print(sentence, file=terminal)
    except OSError:
        print(sentence, file=sys.stderr)


class Metadata(dist_info):
    """pip asks for the metadata before it fetches any dependency: without torch, stop here."""

    def run(self) -> None:
        torch_include()
        super().run()


class BuildEngine(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python C API, hence no Python version

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / "engine"
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        ninja = shutil.which("ninja", path=path)
        if not ninja or not shutil.which("cmake", path=path):
            sys.exit(TOOLS)
        configure = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "FUSEDRNN_TORCH_INCLUDE": torch_include(),
            "FUSEDRNN_OUTPUT_DIR": output,
            "FUSEDRNN_CUDA": "ON" if NVCC else "OFF",
        }
        if NVCC:
            configure |= {"CMAKE_CUDA_COMPILER": NVCC, "CMAKE_CUDA_FLAGS": "--threads=4"}
        options = [f"-D{name}={value}" for name, value in configure.items()]
        env = os.environ | {"PATH": path, "CXX": COMPILER}
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], env=env)
        target = ext.name.removeprefix("fusedrnn.")
        subprocess.check_call(["cmake", "--build", build, "--target", target], env=env)


class Wheel(bdist_wheel):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_number = None if COMPILER else "0_pure_no_cpp20_compiler"

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


TORCH = find_torch()
COMPILER = cxx20_compiler()
NVCC = cuda_compiler() if COMPILER else None
if not COMPILER and {"bdist_wheel", "editable_wheel"} & {*sys.argv}:
    say("fusedrnn: no C++20 compiler found; installing without the CPU engine, pure Python only")

if NVCC and {"bdist_wheel", "editable_wheel"} & {*sys.argv}:
    say("fusedrnn: compiling the CUDA kernels, some minutes; FUSEDRNN_CUDA=0 leaves them out")

LIBRARIES = ["fusedrnn._C"] * bool(COMPILER) + ["fusedrnn._C_cuda"] * bool(NVCC)

setup(
    ext_modules=[Extension(name, sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": Wheel, "dist_info": Metadata},
)
