# shellcheck shell=bash
# Shared by all launchers. A launcher states its program, the flags of its knobs and their defaults, and sources this:
#
#   SCRIPT=stage1/train_stage1.py
#   FLAGS="CFG:--cfg DATA_PATH:--data-path OUTPUT:--output BATCH_SIZE:--batch-size"
#   : "${CFG=stage1/configs/es_rv_m.yaml}" "${MASTER_PORT=29502}"
#   . "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
#
# A knob is set by a KEY=VALUE argument, else by the environment variable of that name, else by the default; an empty
# one leaves its flag out. Everything else goes to the program in the order given; the words that follow --opts, up to
# the next flag, are never knobs.
#
#   GPUS=8             processes on this machine, one per GPU; 0 is one CPU process without torchrun
#   DEVICE=            cpu with GPUS=N runs N CPU processes, which share the cores evenly (else OMP_NUM_THREADS each)
#   MASTER_PORT=0      on one machine: any free port
#   NNODES=1 NODE_RANK=0 RDZV_BACKEND=c10d RDZV_ENDPOINT=localhost:$MASTER_PORT     for several machines
#   PYTHON=            interpreter; default .venv/bin/python of the repository, else python3, else python
#   --print-command    print the command and end
#   --dry-run          print the command, then run the program with --dry-run as one process, which prints its plan
#
# The launcher of a program that needs no device says LAUNCH_PLAIN=1: one process, and of these settings PYTHON only.
#
# Works with bash 3.2 (macOS).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${GPUS=8}" "${DEVICE=}" "${NNODES=1}" "${NODE_RANK=0}" "${RDZV_BACKEND=c10d}" "${RDZV_ENDPOINT=}"
: "${MASTER_PORT=29500}" "${PYTHON=}"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

# Names of all knobs, with a space around each.
knobs=" "
for pair in $FLAGS; do
    knobs="$knobs${pair%%:*} "
done
if [ "${LAUNCH_PLAIN:-0}" = 1 ]; then
    GPUS=0 NNODES=1 DEVICE=""
    knobs="${knobs}PYTHON "
else
    knobs="${knobs}GPUS DEVICE NNODES NODE_RANK RDZV_BACKEND RDZV_ENDPOINT MASTER_PORT PYTHON "
fi

extras=()
dry_run=0
print_only=0
in_opts=0
previous=""
for argument in "$@"; do
    key=${argument%%=*}
    if [[ "$argument" == --* ]]; then in_opts=0; fi
    if [ "$in_opts" = 1 ]; then
        extras+=("$argument")
    elif [[ "$argument" =~ ^[A-Z][A-Z0-9_]*= ]]; then
        if [[ "$knobs" == *" $key "* ]]; then
            printf -v "$key" '%s' "${argument#*=}"
        elif [[ "$previous" == --* && "$previous" != *=* ]]; then
            extras+=("$argument") # the value of the flag before it
        else
            fail "$key is not a setting of this launcher; known:${knobs% }"
        fi
    elif [ "$argument" = --dry-run ]; then
        dry_run=1
    elif [ "$argument" = --print-command ]; then
        print_only=1
    else
        if [ "$argument" = --opts ]; then in_opts=1; fi
        if [ "$argument" = --only-cpu ]; then DEVICE=cpu; fi
        extras+=("$argument")
    fi
    previous=$argument
done

for key in GPUS NNODES NODE_RANK MASTER_PORT; do
    [[ "${!key}" =~ ^[0-9]+$ ]] || fail "$key must be a whole number, got '${!key}'"
done
[ "$NNODES" -ge 1 ] || fail "NNODES must be at least 1, got $NNODES"
if [ "$GPUS" = 0 ]; then
    [ "$NNODES" = 1 ] || fail "GPUS=0 is one process on one machine; for CPU processes on $NNODES machines give DEVICE=cpu GPUS=1"
    if [ "${LAUNCH_PLAIN:-0}" != 1 ]; then DEVICE=cpu; fi
fi
if [ "$NNODES" -gt 1 ] && [ "$MASTER_PORT" = 0 ] && [ -z "$RDZV_ENDPOINT" ]; then
    fail "MASTER_PORT=0 is for one machine; give RDZV_ENDPOINT=host:port"
fi
: "${RDZV_ENDPOINT:=localhost:$MASTER_PORT}"

if [ -z "$PYTHON" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then
        PYTHON=$ROOT/.venv/bin/python
    else
        PYTHON=$(command -v python3 || command -v python || true)
        [ -n "$PYTHON" ] || fail "no Python found; install Python 3.10 or later, or give PYTHON=/path/to/python" 1
    fi
fi

# From another folder the program and the shipped config files are named by their full paths.
prefix=""
if [ "$PWD" != "$ROOT" ]; then prefix="$ROOT/"; fi
if [ -n "${CFG:-}" ] && [ ! -e "$CFG" ] && [ -e "$ROOT/$CFG" ]; then CFG="$ROOT/$CFG"; fi

program=("$prefix$SCRIPT")
for pair in $FLAGS; do
    key=${pair%%:*}
    if [ -n "${!key:-}" ]; then program+=("${pair#*:}" "${!key}"); fi
done
if [ -n "$DEVICE" ]; then program+=(--device "$DEVICE"); fi
program+=(${extras[@]+"${extras[@]}"})

torchrun=(-m torch.distributed.run --nproc_per_node "$GPUS")
if [ "$NNODES" -gt 1 ]; then
    torchrun+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
    torchrun+=(--rdzv_backend "$RDZV_BACKEND" --rdzv_endpoint "$RDZV_ENDPOINT")
elif [ "$MASTER_PORT" = 0 ]; then
    torchrun+=(--standalone --local_addr 127.0.0.1)
else
    torchrun+=(--nnodes 1 --master_port "$MASTER_PORT")
fi
if [ "$GPUS" = 0 ]; then
    command=("$PYTHON" "${program[@]}")
else
    command=("$PYTHON" "${torchrun[@]}" "${program[@]}")
fi

export PYTHONPATH="$ROOT/sam3:$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# torchrun passes these on to the processes; SIGUSR1 is what Slurm sends before it takes a machine back.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

if [ "$DEVICE" = cpu ] && [ "$GPUS" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo "$GPUS") # macOS has no nproc
    export OMP_NUM_THREADS=$((cores > GPUS ? cores / GPUS : 1))
fi

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
if [ "$print_only" = 1 ]; then exit 0; fi

if [ "$dry_run" = 1 ]; then
    if [ "$GPUS" != 0 ]; then export SAM3_PLANNED_WORLD_SIZE=$((GPUS * NNODES)); fi
    exec "$PYTHON" "${program[@]}" --dry-run
fi

if [ "$GPUS" != 0 ] && [ "$DEVICE" != cpu ]; then
    count='import torch; print(torch.cuda.device_count() or int(torch.backends.mps.is_available()))'
    visible=$("$PYTHON" -c "$count") || fail "torch cannot be imported by $PYTHON; install the project first" 1
    if [ "$visible" -lt "$GPUS" ]; then
        fail "GPUS=$GPUS, but $visible are visible here; give GPUS=$visible (0 is one CPU process), or DEVICE=cpu for $GPUS CPU processes" 1
    fi
fi
exec "${command[@]}"
