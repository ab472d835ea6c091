"""Builds the native engine, fusedrnn/_C.so, with CMake and Ninja; pyproject.toml has all metadata.

The engine needs torch's headers, at build time only. They are looked up where pip installs to,
never imported and never fetched, so the build works with and without build isolation. Without a
C++20 compiler the package is installed without the engine.
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


def torch_include() -> Path:
    """The headers' folder. An isolated build hides torch from sys.path but not from `site`."""
    places = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        places.append(site.getusersitepackages())
    for torch in importlib.metadata.distributions(name="torch", path=places):
        if tuple(map(int, torch.version.split(".")[:2])) >= (2, 10):
            return Path(str(torch.locate_file("torch/include")))
    sys.exit("fusedrnn needs torch >= 2.10 installed first: pip install torch")


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
        }
        options = [f"-D{name}={value}" for name, value in configure.items()]
        env = os.environ | {"PATH": path, "CXX": COMPILER}
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], env=env)
        subprocess.check_call(["cmake", "--build", build], env=env)


class Wheel(bdist_wheel):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_number = None if COMPILER else "0_pure_no_cpp20_compiler"

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


COMPILER = cxx20_compiler()
if not COMPILER and {"bdist_wheel", "editable_wheel"} & {*sys.argv}:
    say("fusedrnn: no C++20 compiler found; installing without the CPU engine, pure Python only")

setup(
    ext_modules=[Extension("fusedrnn._C", sources=[])] if COMPILER else [],
    cmdclass={"build_ext": BuildEngine, "bdist_wheel": Wheel, "dist_info": Metadata},
)
