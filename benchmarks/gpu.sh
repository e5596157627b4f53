#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes: build, tests on the device, compute-sanitizer, times.
# Takes the torch and Triton that are there; PACKAGES is a folder with what else is missing (make gpu-packages fills it).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=src:lab:${PACKAGES:-build/gpu-packages}
python=${PYTHON:-python3}
failed=0

"$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' || exit 1
timeout 100 "$python" setup.py -q build_ext --inplace > "$out/build.log" 2>&1 || echo "without the C++ kernels: $out/build.log"
timeout 200 "$python" -m pytest -q -p no:cacheprovider -m "not slow" \
    tests/ops/test_triton.py tests/ops/test_aten.py tests/test_skipping.py tests/test_compile.py \
    > "$out/tests.log" 2>&1 || failed=1
tail -n 3 "$out/tests.log"
if command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q tests/ops/test_triton.py -k "output or limits" \
        > "$out/sanitizer.log" 2>&1 || failed=1
    tail -n 3 "$out/sanitizer.log"
fi
timeout 240 "$python" benchmarks/gpu.py --out "$out" > "$out/ratios.txt" 2> "$out/benchmark.log" || failed=1
cat "$out/ratios.txt"
exit $failed
