#!/usr/bin/env bash
# Create a virtual environment with the pinned dependencies: ./install.sh PYTHON VENV
#
# torch comes first, because every other package takes the torch that is there. With an NVIDIA GPU
# it is the ordinary build; without one the CPU build, which is a tenth of the size. The CPU build
# is looked for where pip looks anyway, then on PyTorch's own index (TORCH_CPU_INDEX overrides it);
# where neither has it, the ordinary build does the job too. TORCH_BUILD=cpu|gpu decides by hand.
set -euo pipefail

python=$1
venv=$2
torch=$(sed -n 's/^torch==//p' constraints.txt)
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
build=${TORCH_BUILD:-}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $("$python" --version) cannot be used; Python 3.11 to 3.13 can: make PYTHON=python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
fi

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)

if [ -z "$build" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then build=gpu; else build=cpu; fi
fi
echo "setting up $venv with torch $torch ($build build); this takes a few minutes once"
if [ "$build" = gpu ] || [ "$(uname -s)" != Linux ]; then
    "${pip[@]}" "torch==$torch"
else
    if ! "${pip[@]}" "torch==$torch+cpu" 2>/dev/null &&
        ! "${pip[@]}" --extra-index-url "$index" --retries 1 --timeout 15 "torch==$torch+cpu" 2>/dev/null; then
        echo "no CPU build of torch $torch was found, also not at $index; installing the ordinary build"
        "${pip[@]}" "torch==$torch"
    fi
fi
"${pip[@]}" --constraint constraints.txt --editable '.[dev]'
