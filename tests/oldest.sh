#!/usr/bin/env bash
# The core with the oldest Python and torch that pyproject.toml admits, in an environment of its own and without kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${OLDEST_VENV:-.venv-oldest}
python=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
torch=$(sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
PATH=$PATH:$PWD/.venv/bin # where make puts uv

make_environment() {
    for found in "python$python" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$python".*/bin/python; do
        # what stands for it on PATH may not run
        "$found" -m venv --clear "$venv" 2> /dev/null && return
    done
    uv venv --quiet --clear --seed --python "$python" "$venv" 2> /dev/null
}

if [ ! -e "$venv/.with-$torch" ]; then
    if ! make_environment; then
        echo "test-oldest: NOT TESTED, as there is no Python $python: neither on PATH, nor by pyenv or uv" >&2
        exit 0
    fi
    install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if command -v uv > /dev/null; then install=(uv pip install --quiet --python "$venv/bin/python"); fi
    if ! "${install[@]}" "torch==$torch.*" torchvision timm numpy hypothesis pytest pytest-xdist; then
        echo "test-oldest: NOT TESTED, as torch $torch could not be installed" >&2
        exit 0
    fi
    touch "$venv/.with-$torch"
fi
"$venv/bin/python" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
PYTHONPATH=src RENORM_CPU=off "$venv/bin/python" -m pytest -q -n 2 --dist loadgroup -m "not slow" \
    tests/conversion tests/fusion/test_fused.py tests/inference/test_estimate.py tests/ops/test_aten.py \
    tests/ops/test_backends.py tests/ops/test_tracking.py tests/test_blocks.py tests/test_checkpointing.py \
    tests/test_compile.py tests/test_devices.py tests/test_functional.py tests/test_masks.py tests/test_norm.py \
    tests/test_samplers.py tests/test_skipping.py tests/test_state.py tests/test_training.py tests/test_transforms.py
