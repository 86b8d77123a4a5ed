#!/usr/bin/env bash
# Collects what a machine without a network lacks, for set_up.sh there: a cluster's node with a torch of its own.
#   bash launch/wheels.sh [FOLDER] [PYTHON_VERSION]      default: wheels, 3.12
# Copy the checkout with the folder in it to the machine. WHEELS=wheels bash launch/quickstart.sh (or test.sh) there
# installs from it and asks no network. torch, NumPy and OpenCV are left out: they are large, and the torch of a cluster comes with them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/set_up.sh
folder=${1:-wheels} version=${2:-3.12}
set_up '[test]'
mkdir -p "$folder"
python -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$(grep '^deepspeed==' launch/constraints.txt)"

platforms=()  # pip takes each name as it stands
for name in manylinux_2_{17,24,27,28,31,34,35}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$name")
done
grep -vE '^(torch|deepspeed|numpy|opencv-python|onnx|onnxscript|onnxruntime|mypy|ruff)==' launch/constraints.txt |
    sed 's/;.*//' > "$folder/packages.txt"
cat >> "$folder/packages.txt" << 'NEEDED'
absl-py
annotated-types
braceexpand
docstring_parser
einops
execnet
grpcio
hjson
iniconfig
markdown
MarkupSafe
msgpack
ninja
packaging
pluggy
protobuf
py-cpuinfo
pydantic
pydantic-core
setuptools
sortedcontainers
tensorboard-data-server
typeguard
typing-inspection
typing_extensions
werkzeug
NEEDED
python -m pip freeze --all > "$folder/here.txt"
while read -r package; do  # the version that is installed here, where the constraints name none
    case $package in *==*) echo "$package" ;; *) grep -i "^${package//_/[-_]}==" "$folder/here.txt" || echo "$package" ;; esac
done < "$folder/packages.txt" > "$folder/pinned.txt"
python -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$folder" --requirement "$folder/pinned.txt"
rm "$folder"/*.txt
du --summarize --human-readable "$folder"
