#!/bin/bash
# sanitize.sh TOOL COMMAND...: the command's kernels of fusedrnn under a tool of compute-sanitizer.
# Exit code 77 where there is no compute-sanitizer or it refuses the device.
set -u
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ ! -x "$sanitizer" ]; then
  echo "no compute-sanitizer"
  exit 77
fi
tool=$1
shift
output=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  "$sanitizer" --tool "$tool" --kernel-name kns=frnn --error-exitcode 1 "$@" 2>&1)
code=$?
echo "$output"
if grep -q "Device not supported" <<<"$output"; then exit 77; fi
# A tool that ended early reports nothing.
grep -q "SUMMARY: 0 " <<<"$output" || exit 1
exit $code
