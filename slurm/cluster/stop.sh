#!/bin/bash
# Stop what start.sh started, by the recorded process ids, and remove its traces from the
# machine, jobs and accounting included. Only the packages and the logs stay.
set -uo pipefail
STATE=${SLURM_STATE:-/tmp/sparse-train-slurm}

# alive PID NAME: whether this process is NAME and runs (see start.sh).
alive() { ps -o stat=,args= -p "$1" | grep -q "^[^Z].*\b$2\b"; }

# stop NAME SIGNAL: end the process recorded for NAME, with force after ten seconds.
stop() {
    local file="$STATE/pids/$1.pid" pid
    pid=$(cat "$file" 2>/dev/null) || return 0
    alive "$pid" "$1" && kill "$2" "$pid"
    for _ in $(seq 100); do
        alive "$pid" "$1" || break
        sleep 0.1
    done
    alive "$pid" "$1" && kill -KILL "$pid"
    rm -f "$file"
}

for file in "$STATE"/pids/node*.pid; do
    [ -e "$file" ] || continue
    node=$(basename "$file" .pid)
    stop "$node" -KILL # takes the node's slurmd and jobs along
    ip link del "slurm-$node" # both ends of its cable
    ip netns del "$node"
    hosts=$(grep -v " $node # slurm\$" /etc/hosts) && echo "$hosts" >/etc/hosts
done
for daemon in slurmctld slurmdbd mariadbd munged; do stop $daemon -TERM; done
ip link del slurm-bridge 2>/dev/null
rm -f /etc/slurm/{slurm,slurmdbd,gres,cgroup}.conf
rm -rf "$STATE"/{etc,pids,munge,mysql,ctld,spool}
