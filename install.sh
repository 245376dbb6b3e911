#!/usr/bin/env bash
# Create a virtual environment with the pinned dependencies: ./install.sh PYTHON VENV
#
# torch and torchvision come first and as a pair, because every other package takes what is there,
# and torchvision's compiled operators load beside the build of torch that they were made for alone.
# With an NVIDIA GPU both are the ordinary builds; without one the CPU builds, a tenth of the size.
# CPU builds are looked for where pip looks anyway, then on PyTorch's own index (TORCH_CPU_INDEX
# overrides it). TORCH_BUILD=cpu|gpu decides by hand. What pip says about a try that failed is shown.
set -euo pipefail

python=$1
venv=$2
here=$(cd "$(dirname "$0")" && pwd)
torch=$(sed -n 's/^torch==//p' "$here/constraints.txt")
torchvision=$(sed -n 's/^torchvision==//p' "$here/constraints.txt")
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
build=${TORCH_BUILD:-}
said=$(mktemp)
trap 'rm -f "$said"' EXIT

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version) cannot be used; Python 3.11 to 3.13 can: make PYTHON=python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
fi

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check)

# Try to install something; if that fails, say why and go on.
try() {
    "${pip[@]}" "$@" >"$said" 2>&1 && return
    echo "${*: -1} cannot be installed, for pip says:"
    sed 's/^/    /' "$said"
    return 1
}

# Three equals signs take no local version, such as a CPU build that pip finds too.
ordinary=("torch===$torch" "torchvision===$torchvision")
cpu=("torch==$torch+cpu" "torchvision==$torchvision+cpu")

if [ -z "$build" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then build=gpu; else build=cpu; fi
fi
echo "setting up $venv with torch $torch ($build build); this takes a few minutes once"
if [ "$build" = gpu ] || [ "$(uname -s)" != Linux ]; then
    "${pip[@]}" --quiet "${ordinary[@]}"
elif ! try "${cpu[@]}" && ! try --extra-index-url "$index" --retries 1 --timeout 15 "${cpu[@]}"; then
    if try "${cpu[0]}"; then
        echo "torchvision $torchvision comes without its compiled operators, which nothing here uses"
        "${pip[@]}" --quiet --no-deps "torchvision===$torchvision"
    else
        echo "installing the ordinary builds, which do the job too"
        "${pip[@]}" --quiet "${ordinary[@]}"
    fi
fi
"${pip[@]}" --quiet --constraint "$here/constraints.txt" --editable "$here[dev]"

# A declaration instead of operators, only where they cannot load: see the file itself.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
declared=torchvision_without_operators
rm -f "$packages/$declared.pth"
if ! "$venv/bin/python" -c 'import torchvision' 2>"$said"; then
    cp "$here/install/$declared.py" "$packages/"
    echo "import $declared" >"$packages/$declared.pth"
    if ! "$venv/bin/python" -c 'import torchvision'; then
        echo "error: torchvision $torchvision cannot be imported beside this torch" >&2
        exit 1
    fi
fi
