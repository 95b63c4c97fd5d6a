#!/usr/bin/env bash
# Exports two golden checkpoints in a clean environment and compares them with PyTorch.
#
#   adapters/optimum/check.sh                 by optimum-cli
#   adapters/optimum/check.sh transformers    by transformers' own exporter
#
# Exit code 0: installed, exported, passed optimum's validation and ours. PYTHON chooses the Python.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
exporter=${1:-optimum}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1

case $exporter in
optimum) pins=$here/requirements.txt ;;
transformers) pins=$here/requirements-transformers.txt ;;
*) echo "unknown exporter '$exporter'; known are optimum and transformers" >&2; exit 2 ;;
esac

"${PYTHON:-python3}" -m venv "$work/venv"
export PATH=$work/venv/bin:$PATH
pip install --quiet --disable-pip-version-check -r "$pins"
# A copy, so that no build folder is left beside the sources.
cp -r "$here" "$work/adapter"
pip install --quiet --disable-pip-version-check -e "$root" "$work/adapter"

python - "$root/tests" "$work" <<'PYTHON'
import sys

sys.path.insert(0, sys.argv[1])
import golden
from mmmamba_edge.model.checkpoints import save_model

for variant, layout in (("linear", "released"), ("hybrid", "training")):
    model = golden.model("release_plain", variant)
    save_model(model, f"{sys.argv[2]}/{variant}", layout=layout)
PYTHON

# check VARIANT TASK FLAGS...: TASK is optimum's, FLAGS are those of transformers_mmmamba_edge.onnx_command.
check() {
    local checkpoint=$work/$1 out=$work/$1-$2 log=$work/$1-$2.log
    echo "== $exporter: $1, $2"
    if [[ $exporter = optimum ]]; then
        # Values out of tolerance are a warning to optimum, hence the search for its last line.
        TRANSFORMERS_VERBOSITY=info optimum-cli export onnx --model "$checkpoint" \
            --task "$2-with-past" "$out" >"$log" 2>&1 &&
            grep "all values close" "$log" | sort | uniq -c &&
            grep -q "The ONNX export succeeded and" "$log" || { cat "$log"; exit 1; }
    else
        python -m transformers_mmmamba_edge.onnx_command "$checkpoint" "$out" "${@:3}" \
            >"$log" 2>&1 || { cat "$log"; exit 1; }
    fi
    python -m mmmamba_edge.export.verify_traced "$out" "$checkpoint"
}

check linear text-generation
check hybrid text-generation
check linear image-text-to-text --embeds
check hybrid image-text-to-text --embeds
echo "all good"
