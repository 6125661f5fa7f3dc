#!/bin/bash
# All stages of a recipe as plain SLURM jobs, each after the stages that it reads:
#
#   slurm/pipeline.sh CONFIG [key=value ...] [-- SBATCH_OPTION ...]
#   slurm/pipeline.sh configs/demo.yaml prune.sparsity=0.5 -- --account=me --partition=gpu --time=1-0
#
# Nodes and ranks are those of configs/cluster/slurm.yaml (CLUSTER=FILE takes another); the options after -- go to every
# job. sparse-train status, logs and cancel do not see these jobs' states; squeue and scancel do.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
recipe=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do recipe+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#recipe[@]} -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

# The jobs use the Python that this script uses; train.sbatch reads it.
SPARSE_TRAIN_PYTHON=${SPARSE_TRAIN_PYTHON:-$(command -v python)}
export SPARSE_TRAIN_PYTHON
plan=$("$SPARSE_TRAIN_PYTHON" -m launch.cli run "${recipe[@]}" --on "${CLUSTER:-slurm}" --prepare)
run=$(head -n 1 <<<"$plan")
declare -A jobs
# A line per stage that is not current: its id, nodes, ranks per node, and the stages that it reads.
while IFS=$'\t' read -r stage nodes ranks inputs; do
    after=
    for input in $inputs; do
        [ -n "${jobs[$input]:-}" ] && after=$after,afterok:${jobs[$input]}
    done
    options=(--parsable --job-name="$(basename "$run")/$stage" --nodes="$nodes" --ntasks-per-node="$ranks"
        --output="$run/logs/$stage/%j_batch_log.out" --kill-on-invalid-dep=yes)
    [ -n "$after" ] && options+=(--dependency="${after#,}")
    mkdir -p "$run/logs/$stage"
    jobs[$stage]=$(sbatch "${options[@]}" "$@" "$here/train.sbatch" "$run" "$stage")
    echo "$stage: job ${jobs[$stage]} ${after#,}"
done < <(tail -n +2 <<<"$plan")
