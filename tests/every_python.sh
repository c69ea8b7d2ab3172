#!/usr/bin/env bash
# Install and train on each Python that pyproject.toml allows: in a fresh virtual environment, 5 steps of the main job on
# one rank (the README's command) and 5 on two tensor-parallel ranks, whose losses must agree (parity proper: tests/parity).
#
#     bash tests/every_python.sh [3.10 3.12 ...]      without arguments: every version
#
# Looks for python3.X on the PATH, where it really runs, and under pyenv; names the versions that it did not find. uv installs
# (it keeps each package once for all environments and needs seconds where pip needs minutes), pip where uv cannot. The
# next environment is installed while the jobs of one run. Needs up to 12 GB in $TMPDIR.
set -euo pipefail

cd "$(dirname "$0")/.."
versions=("$@")
((${#versions[@]})) || versions=(3.10 3.11 3.12 3.13)
work=$(mktemp -d)
installing='' training=''
trap 'kill $installing $training 2>/dev/null || true; wait; rm -rf "$work"' EXIT

# Prints the path of a Python that runs, is of this version and can make virtual environments; fails where there is none.
find_python() {
    local candidate
    for candidate in $(type -aP "python$1" || true) "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Runs in the background, where exec lets a signal reach pip itself.
make_environment() {
    "$2" -m venv "$work/$1"
    if ! "$work/uv/bin/uv" pip install --quiet --python "$work/$1/bin/python" --editable .; then
        exec "$work/$1/bin/pip" install -qq --no-compile -e .
    fi
}

job() {
    local version=$1 name=$2 launcher=$3 code=0
    shift 3
    timeout 900 "$work/$version/bin/$launcher" "$@" --train-iters 5 --log-dir "$work/$name" --cache-dir "$work/cache" &
    training=$!
    wait "$training" || code=$?
    training=''
    return "$code"
}

train() {
    local main_job=(peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json)
    rm -rf "$work"/one_rank "$work"/tensor_parallel
    job "$1" one_rank deepspeed --master_port $((20000 + RANDOM % 10000)) "${main_job[@]}" &&
        job "$1" tensor_parallel torchrun --standalone --nproc-per-node 2 "${main_job[@]}" --tensor-model-parallel-size 2 &&
        "$work/$1/bin/python" - "$work"/{one_rank,tensor_parallel}/metrics.jsonl <<'PYTHON'
import importlib.metadata, json, platform, sys

one, two = ([json.loads(line)["loss"] for line in open(path)] for path in sys.argv[1:])
assert len(one) == len(two) == 5, "5 steps were asked for"
# after the first update rounding may move a sampled token across its boundary: one of 1,024 tokens is 2e-4 of the loss
tolerances = [1e-6, 1e-3, 1e-3, 1e-3, 1e-3]
pairs = list(zip(one, two, tolerances))
assert all(abs(a - b) <= most * a for a, b, most in pairs), f"losses differ: {one} on one rank, {two} on two"
packages = ("torch", "deepspeed", "megatron-core", "transformers", "datasets", "numpy")
versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
print(f"Python {platform.python_version()}: 5 steps on 1 rank and on 2 (TP 2), loss {one[0]:.4f} to {one[-1]:.4f}; {versions}")
PYTHON
}

found=() pythons=() missing=() failed=()
for version in "${versions[@]}"; do
    if python=$(find_python "$version"); then
        found+=("$version") pythons+=("$python")
    else
        missing+=("$version")
    fi
done
((${#missing[@]} == 0)) || echo "not found, so not tried: Python ${missing[*]}"

if ((${#found[@]})); then
    "${pythons[0]}" -m venv "$work/uv"
    "$work/uv/bin/pip" install -qq uv || echo "no uv here; pip takes longer"
fi
export UV_CACHE_DIR="$work/uv-cache" UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" UV_NATIVE_TLS=true UV_LINK_MODE=hardlink

for ((i = 0; i <= ${#found[@]}; i++)); do
    is_installed=true
    [ -z "$installing" ] || wait "$installing" || is_installed=false
    installing=''
    if ((i < ${#found[@]})); then
        make_environment "${found[i]}" "${pythons[i]}" >"$work/install_${found[i]}.log" 2>&1 &
        installing=$!
    fi
    ((i > 0)) || continue
    version=${found[i - 1]}
    if $is_installed && train "$version" >"$work/train_$version.log" 2>&1; then
        tail -n 1 "$work/train_$version.log"
    else
        failed+=("$version")
        echo "Python $version: FAILED"
        tail -n 30 "$work/install_$version.log" "$work/train_$version.log" 2>/dev/null | cut -c 1-300 || true
    fi
    rm -rf "${work:?}/$version"
done
((${#failed[@]} == 0)) || { echo "failed on Python ${failed[*]}" >&2; exit 1; }
((${#found[@]})) || { echo "found none of Python ${versions[*]}" >&2; exit 1; }
