#!/bin/bash
# Start a real SLURM cluster on this one Debian 12 machine (as root, without systemd).
#
# The controller, its accounting database and the clients run on the machine itself. Every compute
# node is a set of namespaces with its own host name, network address and process tree, so that
# `hostname`, listening ports, killed nodes and cut networks behave as on separate machines. The
# file system is shared (as with NFS). Running the script again starts only what is not running:
# that is also how a crashed node is booted again. stop.sh undoes everything.
#
#   nodes       node1, node2, ... (SLURM_NODES of them), on a bridge without a way out
#   partitions  debug (default) and urgent, whose jobs preempt those of debug by requeueing them
#   crash       kill -9 $(cat /tmp/sparse-train-slurm/pids/node2.pid)
#   unplug      ip link set slurm-node2 down        (its processes go on running)
set -euo pipefail

STATE=${SLURM_STATE:-/tmp/sparse-train-slurm} # everything the cluster writes
NODES=${SLURM_NODES:-3}
CPUS=8 MEMORY=64000 GPUS=2               # what each node claims to have; none of it is enforced
NET=10.213.0                             # node N has $NET.N, the machine itself $NET.254
HOST=$(hostname -s)

if ! type munged slurmctld slurmd sbatch slurmdbd mariadbd my_print_defaults &>/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -qy --no-install-recommends -o DPkg::Lock::Timeout=300 \
        munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core
fi

mkdir -p "$STATE"/{etc,pids,log,munge,mysql,ctld,spool}
chmod 755 "$STATE" "$STATE/munge"

# --- Configuration -------------------------------------------------------------------------------

cat >"$STATE/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$HOST($NET.254)
SlurmUser=root
AuthInfo=socket=$STATE/munge/socket,cred_expire=5   # cred_expire: a requeued job waits this long + 1 s
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/pids/slurmctld.pid
SlurmdPidFile=$STATE/spool/%n.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/%n.log

# No cgroups: processes are found through /proc, and nothing is confined or measured.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides                   # believe the node lines below
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu

# sacct, which submitit polls, needs the accounting database.
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$NET.254
AccountingStoragePass=$STATE/munge/socket            # which munge to use towards slurmdbd

# Waits in seconds, cut for tests. SlurmdTimeout: silence after which a node is down.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdTimeout=10
MessageTimeout=5
KillWait=2
ReturnToService=2

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal        # sbatch --signal is also sent upon preemption

NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:$GPUS
$(for i in $(seq "$NODES"); do echo "NodeName=node$i NodeAddr=$NET.$i"; done)
PartitionName=DEFAULT Nodes=ALL DefMemPerCPU=100 DefaultTime=10
PartitionName=debug  Default=YES PriorityTier=1  GraceTime=5
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
CONF

# The GPUs are copies of /dev/null: jobs get CUDA_VISIBLE_DEVICES and nothing else.
for i in $(seq 0 $((GPUS - 1))); do
    [ -e "$STATE/etc/gpu$i" ] || mknod "$STATE/etc/gpu$i" c 1 3
done
echo "CgroupPlugin=cgroup/v1" >"$STATE/etc/cgroup.conf" # or else slurmd looks for one, though unused
echo "Name=gpu File=$STATE/etc/gpu[0-$((GPUS - 1))]" >"$STATE/etc/gres.conf"

cat >"$STATE/etc/slurmdbd.conf" <<CONF
DbdHost=$HOST
DbdAddr=$NET.254
SlurmUser=root
AuthInfo=socket=$STATE/munge/socket
PidFile=$STATE/pids/slurmdbd.pid
LogFile=$STATE/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageUser=root
CONF
chmod 600 "$STATE/etc/slurmdbd.conf"
ln -sf "$STATE"/etc/*.conf /etc/slurm/

for i in $(seq "$NODES"); do
    grep -q " node$i # slurm" /etc/hosts || echo "$NET.$i node$i # slurm" >>/etc/hosts
done

# --- Daemons -------------------------------------------------------------------------------------

# running NAME: whether the process recorded for NAME lives. A zombie does not (process 1 may be slow to
# reap one), nor does a stranger that got the number after a reboot.
running() { [ -s "$STATE/pids/$1.pid" ] && ps -o stat=,args= -p "$(cat "$STATE/pids/$1.pid")" | grep -q "^[^Z].*\b$1\b"; }

# until_ok SECONDS COMMAND...: repeat the command until it succeeds.
until_ok() {
    local end=$((SECONDS + $1)); shift
    until "$@" &>"$STATE/log/wait"; do
        if ((SECONDS >= end)); then echo "gave up on $*: $(cat "$STATE/log/wait")" >&2; exit 1; fi
        sleep 0.1
    done
}

if ! ip link show slurm-bridge &>/dev/null; then
    ip link add slurm-bridge type bridge
    ip addr add "$NET.254/24" dev slurm-bridge
    ip link set slurm-bridge up
fi

if ! running munged; then
    [ -s "$STATE/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$STATE/munge/key")
    munged --socket="$STATE/munge/socket" --key-file="$STATE/munge/key" \
        --pid-file="$STATE/pids/munged.pid" --seed-file="$STATE/munge/seed" --log-file="$STATE/log/munged.log"
fi

if ! running mariadbd; then
    [ -d "$STATE/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$STATE/mysql" \
        --auth-root-authentication-method=normal --skip-test-db >"$STATE/log/mariadb-install.log" 2>&1
    setsid mariadbd --no-defaults --user=root --datadir="$STATE/mysql" --socket="$STATE/mysql/socket" \
        --skip-networking --pid-file="$STATE/pids/mariadbd.pid" >"$STATE/log/mariadbd.log" 2>&1 </dev/null &
    until_ok 60 test -S "$STATE/mysql/socket"
fi

if ! running slurmdbd; then
    MYSQL_UNIX_PORT="$STATE/mysql/socket" slurmdbd
    until_ok 60 sacctmgr -n show cluster
fi

running slurmctld || slurmctld
until_ok 60 scontrol ping

for i in $(seq "$NODES"); do
    running "node$i" && continue
    scontrol update nodename="node$i" state=down reason=boot # fails what ran there before a crash
    mkdir -p "$STATE/spool/node$i"
    ip link del "slurm-node$i" 2>/dev/null || true # at once; by the next line alone, some time later
    ip netns del "node$i" 2>/dev/null || true
    ip netns add "node$i"
    ip link add "slurm-node$i" type veth peer name eth0 netns "node$i"
    ip link set "slurm-node$i" master slurm-bridge up
    ip -n "node$i" addr add "$NET.$i/24" dev eth0
    ip -n "node$i" link set eth0 up
    ip -n "node$i" link set lo up
    # The shell is the node's init: when it or slurmd is killed, so is all that runs on the node.
    setsid ip netns exec "node$i" unshare --uts --pid --fork --kill-child --mount-proc \
        bash -c "hostname node$i; slurmd -D; exit" \
        >"$STATE/log/node$i.out" 2>&1 </dev/null &
    echo $! >"$STATE/pids/node$i.pid"
done

all_up() { [ "$(sinfo -hN -p debug --responding -t idle,mix,alloc,comp | wc -l)" = "$NODES" ]; }
until_ok 60 all_up
sinfo
