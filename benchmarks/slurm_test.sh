#!/usr/bin/env bash
# Stops, kills and requeues small runs under a real SLURM of two nodes on this machine, and compares their final states
# with that of an undisturbed run. Prints a table; exits with 0 if every case passed. Takes about ten minutes.
#
#   bash benchmarks/slurm_test.sh [WORK [CASE...]]
#
# WORK: a new folder for everything it writes (default: a temporary one, removed if every case passed). CASE: the cases to
# run, by their names at the end of this file (default: all).
#
# Needs root and Debian's or Ubuntu's packages slurmctld, slurmd, slurm-client and munge, which it installs if they are
# missing. The daemons listen on the loopback interface alone, on ports of their own, and end with this script.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
port=17810 # and the next two
stop() {
    echo "slurm_test.sh: $*" >&2
    exit 2
}

install_slurm() {
    local missing=() program packages=(slurmctld slurmd slurm-client munge) policy=/usr/sbin/policy-rc.d
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if ((!${#missing[@]})); then return; fi
    command -v apt-get >/dev/null || stop "no ${missing[*]}, and no apt-get to install them: install SLURM and munge"
    echo "slurm_test.sh: installing SLURM (no ${missing[*]})" >&2
    (
        if [[ ! -e $policy ]]; then # Debian's way to keep packages from starting their services
            trap 'rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod +x "$policy"
        fi
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"
    ) >"$work/apt.log" 2>&1 || stop "SLURM can't be installed, see $work/apt.log"
}

write_configuration() {
    local host
    host=$(hostname -s)
    dd if=/dev/urandom of="$work/munge.key" bs=128 count=1 status=none
    chmod 600 "$work/munge.key"
    mkdir "$work/state" "$work/n1" "$work/n2"
    # A GPU here is a name without a device; cred_expire is how long SLURM holds a requeued job back (default: 120 s).
    echo "NodeName=n[1-2] Name=gpu File=/dev/null" >"$work/gres.conf"
    cat >"$work/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
SlurmctldPort=$port
SlurmctldPidFile=$work/slurmctld.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdPidFile=$work/%n.pid
SlurmdLogFile=$work/%n.log
SlurmdSpoolDir=$work/%n
StateSaveLocation=$work/state
CommunicationParameters=NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=2 Gres=gpu:1
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=60 State=UP
END
}

end_cluster() {
    local name
    set +e
    scancel --user=root 2>/dev/null && sleep 3
    for name in n1 n2 slurmctld munged; do
        if [[ -f $work/$name.pid ]]; then kill "$(<"$work/$name.pid")" 2>/dev/null; fi
    done
    if [[ -n ${all_passed:-} && -n $temporary ]]; then
        sleep 2
        rm -rf "$work"
    else
        echo "slurm_test.sh: everything is in $work" >&3
    fi
}

start_cluster() {
    exec 3>&2 # a case's output goes to a file
    trap end_cluster EXIT
    trap 'exit 130' INT TERM
    export SLURM_CONF=$work/slurm.conf
    munged --force --socket="$work/munge.socket" --key-file="$work/munge.key" --pid-file="$work/munged.pid" \
        --log-file="$work/munged.log" --seed-file="$work/munge.seed" || stop "munged did not start"
    slurmctld -c && slurmd -N n1 && slurmd -N n2 || stop "SLURM's daemons did not start, see $work/*.log"
    for _ in {1..30}; do
        if [[ $(sinfo --noheader --format=%T%D 2>/dev/null) == idle2 ]]; then return; fi
        sleep 1
    done
    stop "the two nodes did not come up, see $work/*.log"
}

# A copy of the code in a path with spaces, with two recipes of its own, since runs write into output/ beside the code.
copy_code() {
    local name
    code="$work/the code"
    mkdir "$code"
    (cd "$root" && tar -c --exclude=./output --exclude=./.git --exclude=./.venv .) | tar -x -C "$code"
    ln -s "$root/.venv" "$code/.venv"
    mkdir "$code/scripts/tiny runs"
    for name in adaptive tube; do
        cat >"$code/scripts/tiny runs/pretrain_$name.sh" <<END
source "\$(dirname "\${BASH_SOURCE[0]}")/../launch.sh"
TOTAL_BATCH=4 BATCH_SIZE=2
pretrain --model pretrain_videomae_tiny_patch8_64 --input_size 32 --decoder_depth 1 --mask_type $name --amp off \\
    --mask_ratio 0.85 --sampling_rate 1 --epochs 2 --warmup_epochs 1 --save_ckpt_freq 1 --save_ckpt_minutes 0 \\
    --vis_freq 0 --log_freq 4 --num_workers 1 --device cpu --dist_timeout 120 "\$@"
END
    done
    "$root/.venv/bin/python" "$root/tools/make_demo_videos.py" --output "$work/the videos" --num_train 128 --num_val 1 \
        --num_test 1 --size 32 --workers 2 2>/dev/null
    cd "$code"
}

# --- cases ------------------------------------------------------------------------------------------------------

# submit [OPTIONS of slurm.sh] RECIPE...: sets `job`; the recipes' names resolve nowhere, hence MASTER_ADDR.
submit() {
    DATA_PATH="$work/the videos/train.csv" MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1 \
        bash scripts/slurm.sh --nodes 2 --gpus 1 --cpus 1 "$@" >"$work/submitted" 2>&1 || stop "$(<"$work/submitted")"
    job=$(sed -n 's/^Submitted batch job //p' "$work/submitted")
}
field() { scontrol --oneliner show job "$1" | grep -o "\b$2=[^ ]*" | cut -d= -f2- | head -n 1; }
restarts() { field "$job" Restarts; }
state() { field "$job" JobState; }

# wait_until SECONDS COMMAND...
wait_until() {
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        if ((SECONDS > end)); then return 1; fi
        sleep 0.5
    done
}
logged() { grep -qs "$2" *-"$1".log; } # JOB TEXT

# The process ids of the job's ranks, in their order.
ranks() {
    local pid variables
    for pid in $(pgrep -f run_mae_pretraining.py); do
        if [[ $(ps -o comm= -p "$(ps -o ppid= -p "$pid" | tr -d ' ')") != slurmstepd ]]; then continue; fi # a data worker
        variables=$(tr '\0' '\n' <"/proc/$pid/environ")
        if grep -qx "SLURM_JOB_ID=$job" <<<"$variables"; then
            echo "$(sed -n 's/^SLURM_PROCID=//p' <<<"$variables") $pid"
        fi
    done 2>/dev/null | sort -n | cut -d' ' -f2 # meanwhile some processes end
}
has_usr1() { # has_usr1 PID SigIgn|ShdPnd: whether the process ignores USR1, or has yet to take it
    local mask
    mask=$(sed -n "s/^$2:\s*//p" "/proc/$1/status" 2>/dev/null)
    ((0x${mask:-0} >> 9 & 1))
}
both_import() {
    local pids pid
    pids=$(ranks)
    [[ $(wc -w <<<"$pids") == 2 ]] || return 1
    for pid in $pids; do has_usr1 "$pid" SigIgn || return 1; done
}
warned() { logged "$job" "finishing the step" || has_usr1 "$1" ShdPnd; }
is() { [[ $(state) == "$1" ]]; }
began() { logged "$job" "step 20/"; }
completes() { wait_until 300 is COMPLETED; }

start() { OUTPUT_DIR="$work/runs/$1" submit "${@:2}" "$adaptive"; } # start CASE [OPTIONS]
begin() { start "$@" && wait_until 180 began; }                      # up to the 20th step

straight() { begin straight && completes; }

time_limit() { # the ranks stand still until SLURM warns them, so that a short run suffices
    local pids
    begin time_limit --time=2 --signal=USR1@45 || return 1
    pids=$(ranks)
    kill -STOP $pids
    wait_until 100 warned "${pids%%$'\n'*}"
    kill -CONT $pids
    completes && (($(restarts) > 0)) && logged "$job" "status 75 after a signal; requeueing" &&
        [[ $(cat *-"$job".log | grep -c "finishing the step") == $(restarts) ]]
}

requeued() { # as after a preemption or the failure of a node
    begin requeued && scontrol requeue "$job" && completes && [[ $(restarts) == 1 ]] && logged "$job" "saved in"
}

early_and_late_signal() {
    start early_and_late_signal
    wait_until 100 both_import && scancel --signal=USR1 "$job" &&
        wait_until 200 logged "$job" "step 64/64" && scancel --signal=USR1 "$job"
    completes && [[ $(restarts) == 0 ]]
}

cancelled() {
    begin cancelled && scancel "$job" && wait_until 60 is CANCELLED && sleep 15 &&
        is CANCELLED && [[ $(restarts) == 0 ]] && logged "$job" "saved in" && start cancelled && completes
}

killed_rank() {
    begin killed_rank && killed_job=$job && kill -KILL "$(ranks | tail -n 1)" && wait_until 60 is FAILED && sleep 15 &&
        is FAILED && [[ $(restarts) == 0 ]] && logged "$job" "rank 1 on host .* is gone" &&
        start killed_rank && completes
}

array() { # two recipes with two seeds each; the second task is asked to stop
    local task array names=(adaptive-seed0 adaptive-seed1 tube-seed0 tube-seed1)
    submit --array --seeds 0,1 "$adaptive" "scripts/tiny runs/pretrain_tube.sh"
    array=$job job=${job}_1
    wait_until 300 began || return 1
    scancel --signal=USR1 "$job" || true # for a task of an array it may fail after the signal has been sent
    for task in 0 1 2 3; do
        job=${array}_$task
        completes && [[ $(restarts) == $((task == 1)) ]] || return 1
        grep -q "step 64/64" "tiny runs-pretrain_${names[task]}-$job.log" || return 1
    done
    ! compgen -G "video-mae-*.log" && cp -r "output/tiny runs/pretrain_adaptive-seed0" "$work/runs/array"
}

# Prints "identical" or what differs between the final state of a case and that of the undisturbed run.
compare() {
    .venv/bin/python - "$work/runs/straight" "$work/runs/$1" <<END
import sys
from pathlib import Path
from runs.checkpoints import read_checkpoint
from tools.kill_test import differences
states = [read_checkpoint(Path(folder) / "checkpoint-1.pth") for folder in sys.argv[1:]]
found = sum((differences(*(state[key] for state in states), key) for key in ("model", "optimizer")), [])
print(", ".join(found) or "identical")
END
}

cases=(
    "straight|nothing|ends well"
    "time_limit|the time limit nears|saves and is requeued, ends well; one rank speaks"
    "requeued|\`scontrol requeue\`, as by a preemption|saves and starts again by itself, ends well"
    "early_and_late_signal|SIGUSR1 during the imports and after the last step|ends well, not requeued"
    "cancelled|\`scancel\`|saves, is not requeued; submitted again it ends well"
    "killed_rank|SIGKILL to rank 1|fails at once and names the rank, is not requeued; submitted again it ends well"
    "array|SIGUSR1 to one task of 2 recipes x 2 seeds|only that task is requeued; each has its own name and log"
)

main() {
    local case name trouble expected passed result failed=0 only=("${@:2}")
    all_passed="" adaptive="scripts/tiny runs/pretrain_adaptive.sh"
    [[ $(id -u) == 0 ]] || stop "SLURM's daemons need root here"
    [[ -x $root/.venv/bin/python ]] || stop "run scripts/env.sh first"
    temporary=""
    if [[ -z ${1:-} ]]; then
        temporary=1
        set -- "$(mktemp -d)"
    fi
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
    [[ $work != *" "* && -z $(ls "$work") ]] || stop "$work: name a new folder without spaces in its path"
    install_slurm
    write_configuration
    start_cluster
    copy_code
    echo "| what happens to the run | what must follow | seen | final state |"
    echo "|---|---|---|---|"
    for case in "${cases[@]}"; do
        IFS='|' read -r name trouble expected <<<"$case"
        if ((${#only[@]})) && [[ " straight ${only[*]} " != *" $name "* ]]; then continue; fi
        passed=yes result=-
        "$name" >>"$work/cases.log" 2>&1 || passed=NO
        if [[ $name != straight && $passed == yes ]]; then result=$(compare "$name"); fi
        echo "| $trouble | $expected | $passed | $result |"
        if [[ $passed == NO || $result != [-i]* ]]; then failed=1; fi
    done
    if grep -l "Broken pipe" ./*.log | grep -v -- "-${killed_job:-none}.log"; then failed=1; fi
    if ((!failed)); then all_passed=1; fi
    exit "$failed"
}
main "$@"
