#!/bin/bash
# All stages of a recipe as plain SLURM jobs, each after the stages that it reads:
#
#   slurm/pipeline.sh CONFIG [key=value ...] [--replace] [-- SBATCH_OPTION ...]
#   slurm/pipeline.sh configs/demo.yaml prune.sparsity=0.5 -- --account=me --partition=gpu --time=1-0
#
# Resources come from configs/cluster/slurm.yaml (or CLUSTER=FILE.yaml), except `setup` and `environment`: jobs inherit
# this shell's. Options after -- are passed to every job and take precedence.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
recipe=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do recipe+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ ${#recipe[@]} -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }

# train.sbatch reads it, so that the jobs use the same Python as this script.
SPARSE_TRAIN_PYTHON=${SPARSE_TRAIN_PYTHON:-$(command -v python)}
export SPARSE_TRAIN_PYTHON
plan=$("$SPARSE_TRAIN_PYTHON" -P -m sparse_train.launch.cli run "${recipe[@]}" --on "${CLUSTER:-slurm}" --prepare)
run=$(head -n 1 <<<"$plan")
declare -A jobs
# One line per stage that is not current: its id, its inputs (comma-separated), options of sbatch.
while IFS=$'\t' read -r -a fields; do
    stage=${fields[0]} after=
    for input in ${fields[1]//,/ }; do
        [ -n "${jobs[$input]:-}" ] && after=$after,afterok:${jobs[$input]}
    done
    options=("${fields[@]:2}" --parsable --job-name="$(basename "$run")/$stage"
        --output="$run/logs/$stage/%j_batch_log.out" --kill-on-invalid-dep=yes)
    [ -n "$after" ] && options+=(--dependency="${after#,}")
    mkdir -p "$run/logs/$stage"
    id=$(sbatch "${options[@]}" "$@" "$here/train.sbatch" "$run" "$stage")
    jobs[$stage]=${id%%;*}  # ID;CLUSTER where there are several
    # sparse-train status, logs and cancel look for the job here.
    echo "${jobs[$stage]}" > "$run/logs/$stage/job"
    echo "$stage: job ${jobs[$stage]} ${after#,}"
done < <(tail -n +2 <<<"$plan")
