#!/usr/bin/env bash
# Submits any recipe as a SLURM job, one task per GPU. The variables of scripts/launch.sh apply here too:
#
#   DATA_PATH=... bash scripts/slurm.sh --nodes 8 --partition gpu --time 24:00:00 RECIPE [FLAGS of the program]
#   DATA_PATH=... bash scripts/slurm.sh --nodes 4 --array scripts/ssv2/pretrain_*.sh
#   DATA_PATH=... MODEL=... bash scripts/slurm.sh --nodes 1 --seeds 0,1,2 RECIPE
#   DATA_PATH=... sbatch scripts/slurm.sh RECIPE [FLAGS]       the same, with the #SBATCH settings below
#
#   --nodes N, --gpus N (per node), --cpus N (per GPU)     8, 8 and 12
#   --partition P, --account A, --time T                   default: the cluster's
#   --array             several recipes, each a task of one array job with its own name and log; leave OUTPUT_DIR unset
#   --seeds 0,1,2       each recipe with each of these seeds, also as tasks of an array job; of one recipe, OUTPUT_DIR
#                       and MODEL may name a folder for each seed with {seed}
#   --at_once N         maximum number of array tasks running at the same time
#   --name=value        any other option of sbatch, e.g. --constraint=a100; with --dependency MODEL need not exist yet
#   --dry_run           prints the command, the job script and the command of each task; submits nothing
#
# 120 seconds before the time limit SLURM sends USR1 to the program's processes, which save and exit with status 75;
# the job is then requeued, which takes about two minutes, and resumes. So is a job that USR1 ended (status 138), up to
# 20 restarts. After a preemption or a node failure SLURM requeues it by itself; after any other failure nothing does.
#SBATCH --job-name=video-mae
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

name_of() { echo "$(basename "$(dirname "$1")")-$(basename "$1" .sh)${SEED:+-seed$SEED}"; } # of a recipe's job

# rename JOB NAME: renames a task of an array and its log, which SLURM opens under the new name after a requeue.
rename() {
    local log=${SLURM_JOB_NAME:-}-$1.log
    if [[ ${SLURM_JOB_NAME:-} != "$2" ]] && scontrol update "jobid=$1" "jobname=$2" && [[ -f $log ]]; then
        mv "$log" "$2-$1.log"
    fi
}

# run_job [--seeds LIST] RECIPE... [FLAGS...]: runs the recipe and seed of this array task.
run_job() {
    local seeds=("") recipes=() task=${SLURM_ARRAY_TASK_ID:-0} job=$SLURM_JOB_ID recipe status=0
    trap '' USR1 # for the program, not for this script
    if [[ ${1:-} == --seeds ]]; then
        IFS=, read -ra seeds <<<"$2"
        shift 2
    fi
    while [[ ${1:-} == *.sh ]]; do
        recipes+=("$1")
        shift
    done
    ((${#recipes[@]})) || fail "name the recipe to run, for instance scripts/ssv2/pretrain_adamae_base_800e.sh"
    ((task < ${#recipes[@]} * ${#seeds[@]})) || fail "no recipe for task $task of the array"
    if [[ -n ${seeds[task % ${#seeds[@]}]} ]]; then export SEED=${seeds[task % ${#seeds[@]}]}; fi
    recipe=${recipes[task / ${#seeds[@]}]}
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$task # for the last task of an array, SLURM_JOB_ID is the ID of the whole array
        rename "$job" "$(name_of "$recipe")" || true
    fi

    bash "$recipe" "$@" || status=$?
    if ((status == 75 || (status == 138 && ${SLURM_RESTART_COUNT:-0} < 20))); then
        echo "slurm.sh: status $status after a signal; requeueing job $job" >&2
        scontrol requeue "$job"
    fi
    exit "$status"
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    run_job "$@"
fi

# --- from here on: submitting ---------------------------------------------------------------------------------

# Prints the commands of all tasks, as the job will compute them; exits with a recipe's error about a missing setting.
show_tasks() {
    local task
    for ((task = 0; task < tasks; task++)); do
        SLURM_JOB_ID=0 SLURM_NTASKS=$((nodes * gpus)) SLURM_CPUS_PER_TASK=$cpus SLURM_ARRAY_TASK_ID=$task DRY_RUN=1 \
            MODEL_MAY_COME=$waits bash "$0" "${arguments[@]}" || exit 1
    done
}

root=$(dirname "$0")/..
nodes=8 gpus=8 cpus=12 at_once="" array="" dry_run="" waits=""
options=() arguments=() seeds=() recipes=()
while [[ ${1:-} == -* ]]; do
    case $1 in
        --dry_run | --array)
            declare "${1#--}=1"
            shift
            continue
            ;;
        --nodes=* | --gpus=* | --cpus=* | --at_once=* | --seeds=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            ;;
        --array=* | --ntasks*) fail "$1 is worked out here: use --nodes, --gpus, --array and --seeds" ;;
        --?*=*)
            options+=("$1")
            if [[ $1 == --dependency=* ]]; then waits=1; fi
            shift
            continue
            ;;
        --nodes | --gpus | --cpus | --at_once | --partition | --account | --time | --seeds) ;;
        *) fail "unknown option $1; write other sbatch options as --name=value" ;;
    esac
    [[ -n ${2:-} ]] || fail "$1 needs a value"
    case $1 in
        --partition | --account | --time) options+=("$1=$2") ;;
        --seeds)
            [[ $2 =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds $2: write whole numbers with commas between, such as 0,1,2"
            IFS=, read -ra seeds <<<"$2"
            arguments=(--seeds "$2")
            ;;
        *)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: it is a number of at least 1"
            declare "${1#--}=$2"
            ;;
    esac
    shift 2
done
arguments+=("$@")
while [[ ${1:-} == *.sh ]]; do
    [[ -f $1 ]] || fail "no such recipe: $1"
    recipes+=("$1")
    shift
done

((${#recipes[@]})) || fail "name the recipe to run, for instance scripts/ssv2/pretrain_adamae_base_800e.sh"
for word in "$@"; do
    [[ $word != -[a-zA-Z-]* ]] || grep -qF -- "\"${word%%=*}\"" "$root"/run_*.py "$root/runs/flags.py" ||
        fail "$word is no flag of the programs; options of slurm.sh and sbatch stand before the recipe"
done
((${#recipes[@]} == 1)) || [[ -n $array ]] || fail "${#recipes[@]} recipes: --array makes them tasks of one job"
tasks=$((${#recipes[@]} * (${#seeds[@]} ? ${#seeds[@]} : 1)))
((tasks == 1)) || [[ -z ${OUTPUT_DIR:-} || (${#recipes[@]} == 1 && $OUTPUT_DIR == *{seed}*) ]] ||
    fail "OUTPUT_DIR=$OUTPUT_DIR would be one folder for $tasks runs: unset it, since each recipe has its own"

[[ -n $dry_run ]] || command -v sbatch >/dev/null ||
    fail "there is no sbatch: submit on a machine of the cluster, or look at the job with --dry_run"

name=video-mae # of several recipes, until each is renamed in its job
if ((${#recipes[@]} == 1)); then name=$(name_of "${recipes[0]}"); fi
command=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus")
command+=("--cpus-per-task=$cpus")
if [[ -n $array ]] || ((tasks > 1)); then
    command+=("--array=0-$((tasks - 1))${at_once:+%$at_once}" "--output=%x-%A_%a.log")
fi
command+=("${options[@]}" "$0" "${arguments[@]}")

shown=$(show_tasks) # also before submitting, so that a missing setting is reported now, not when the job starts
if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    printf '\n\n# The job script:\n'
    sed '/^# --- from here on/,$d' "$0"
    printf '# What its tasks run:\n%s\n' "$shown"
else
    "${command[@]}"
fi
