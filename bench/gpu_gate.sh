#!/bin/bash
# What a machine with an NVIDIA device is for, in four stages of under 8 minutes each:
#
#   bench/gpu_gate.sh correctness   every primitive and toy kernel against the simulator's answers,
#                                   the package's GPU tests, compute-sanitizer
#   bench/gpu_gate.sh micro         microbenchmarks of what the persistent kernels stand on
#   bench/gpu_gate.sh table         fusedrnn's backend "cuda" beside torch.nn on cuDNN
#   bench/gpu_gate.sh triton        the GPU tests of the backend "triton", and its table
#
# Needs build/gate, which `make gate` builds on any machine with nvcc, and here python3 with torch;
# no nvcc, no network. Results go to bench/results/DEVICE (and to $OUT, if set). Run again, a stage
# goes on where it stopped, on another machine too if the folder is brought along. The exit code is
# 0 only if every step passed.
set -u -o pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  correctness | micro | table | triton) ;;
  *) echo "usage: bench/gpu_gate.sh correctness | micro | table | triton"; exit 2 ;;
esac
if ! device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) ||
  [ -z "$device" ]; then
  echo "no NVIDIA device here"
  exit 1
fi
if [ ! -e build/gate/built ]; then
  echo "build/gate is missing: run make gate on a machine with nvcc and bring the folder here"
  exit 1
fi

# The wheel beside the packages of python3, which may itself be of a virtual environment.
make_python() {
  local packages
  rm -rf build/gate/venv
  python3 -m venv --system-site-packages --without-pip build/gate/venv || return
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/outer.pth"
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$packages" build/gate/*.whl
}

facts() {
  echo "device: $device"
  echo "driver: $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  cat build/gate/built
  echo "date: $(date -u +%Y-%m-%d)"
  "$python" -c '
import platform, torch
print("python:", platform.python_version())
print("torch:", torch.__version__)
print("cuda:", torch.version.cuda)
print("cudnn:", torch.backends.cudnn.version())'
}

. bench/gpu/steps.sh
python=$PWD/build/gate/venv/bin/python
name=$(tr '[:upper:]' '[:lower:]' <<<"${device#NVIDIA }" | tr -cs '[:alnum:]\n' -)
build=$(find build/gate -maxdepth 1 -type f | sort | xargs cat bench/*.py bench/gpu/*.* tests/*.py |
  sha256sum | cut -c 1-16)
begin "$1" "bench/results/$name" "$build" 460
make_python >"$logs/python.log" 2>&1 || { echo "the wheel was not installed:"; cat "$logs/python.log"; }
facts >"$results/facts.txt"

# The GPU tests that an expression of pytest names. A run that skips all of them is no pass.
gpu_tests='"$0" -P -m pytest -m gpu -k "$1" -rs tests | awk "{print} /[0-9] passed/ {ok = 1} END {exit !ok}"'

correctness() {
  local check tool simulated=build/gate/simulated.txt
  step import 60 "$python" -I -m fusedrnn info
  for check in $(cut -d ' ' -f 1 "$simulated"); do
    step "$check" 20 build/gate/answers "$simulated" "$check"
  done
  step pytest 240 bash -o pipefail -c "$gpu_tests" "$python" "not triton"
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool-checks" 60 bench/gpu/sanitize.sh "$tool" build/gate/answers "$simulated"
    step "$tool-layers" 90 bench/gpu/sanitize.sh "$tool" "$python" bench/gpu/layers.py
  done
}

micro() {
  local group csv=$results/micro.csv
  [ -e "$csv" ] || echo "name,parameter,median,p10,p90,unit" >"$csv"
  for group in max_clusters cluster_barrier st_async_hop st_async_step flag_hop data_hop mma; do
    step "$group" 60 build/gate/micro "$group" "$csv"
  done
}

table() {
  local facts=$results/facts.txt
  step times 330 "$python" bench/gpu/table.py times "$results/table.csv" "$facts" 300 cuda
  step kernels 120 "$python" bench/gpu/table.py kernels "$results/table.kernels.csv" "$facts" 90
}

triton() {
  step pytest-triton 260 bash -o pipefail -c "$gpu_tests" "$python" triton
  step times-triton 180 "$python" bench/gpu/table.py times "$results/triton.csv" "$results/facts.txt" 150 triton
}

"$1"
finish
