#!/bin/bash
# A real, throw-away Slurm cluster on one machine: no systemd, no database; every node is emulated.
#
#   slurmbox.sh run CMD...       start, run CMD in it, take everything down however CMD ends
#   slurmbox.sh node-crash NODE  as if its power went: the daemon and all it runs die at once
#   slurmbox.sh node-start NODE  the node comes back
#
# Needs root and, on Debian: slurmctld slurmd slurm-client munge iproute2. Commands that talk to the
# cluster need SLURM_CONF=$BOX/etc/slurm.conf and $BOX/bin first in PATH, as CMD has them.
set -euo pipefail

BOX=${BOX:?name a folder that does not exist yet}    # everything lives here
CPU_NODES=${CPU_NODES:-1}                            # emulated nodes cpu1.. of partition cpu
GPU_NODES=${GPU_NODES:-8}                            # emulated nodes gpu1.. of partition gpu
GPUS=${GPUS:-1}                                      # fake GPUs per gpu node
NODE_CPUS=${NODE_CPUS:-8}                            # may exceed the real cores
NODE_MEM=${NODE_MEM:-64000}                          # MB, may exceed the real memory
export SLURM_CONF=$BOX/etc/slurm.conf PATH=$BOX/bin:$PATH:/usr/sbin:/sbin

say() { echo "slurmbox: $*" >&2; }
die() { say "$*"; exit 1; }

free_ports() {                           # sets PORT0: the controller's, then one per node
    local p i
    for ((p = 17000 + $$ % 200 * 50; p < 30000; p += 50)); do
        for ((i = 0; i < 1 + CPU_NODES + GPU_NODES; i++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$((p + i))") 2>/dev/null; then continue 2; fi
        done
        PORT0=$p; return
    done
    die "no free ports"
}

wait_for() {                             # wait_for SECONDS WHAT CMD...
    local end=$((SECONDS + $1)) what=$2; shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || { tail -n 5 "$BOX"/log/* >&2; die "gave up waiting for $what"; }
        sleep 0.2
    done
}

nodes() {                                # name port, one line each
    local i p=$((PORT0 + 1))
    for ((i = 1; i <= CPU_NODES; i++)); do echo "cpu$i $((p++))"; done
    for ((i = 1; i <= GPU_NODES; i++)); do echo "gpu$i $((p++))"; done
}

# has PID VAR=VALUE|VAR=: is it in the process's environment?
has() {
    { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null |
        { if [[ $2 == *= ]]; then grep "^$2"; else grep -xF "$2"; fi; } >/dev/null  # -q breaks the pipe
}

# Pids of this box's processes: daemons carry SLURMBOX_MARK; step daemons write their title over
# that part of their environment, so they are known by name and SLURM_CONF; a job's own processes
# by SLURM_CONF and SLURM_JOB_ID.
ours() {
    local p comm
    for p in /proc/[0-9]*; do
        p=${p#/proc/}; [[ $p != $$ && $p != "$BASHPID" ]] || continue
        { read -r comm <"/proc/$p/comm"; } 2>/dev/null || continue
        if has "$p" "SLURMBOX_MARK=$BOX" ||
            { has "$p" "SLURM_CONF=$SLURM_CONF" && { [[ $comm == slurmstepd ]] || has "$p" SLURM_JOB_ID=; }; }
        then echo "$p"; fi
    done
}

crash() {                                # crash NODE
    local p steps='' rest=''
    stop "slurmd-$1" KILL
    for p in $(ours); do
        if [[ $(cat "/proc/$p/comm" 2>/dev/null) == slurmstepd ]]; then
            { ls -l "/proc/$p/fd" | grep -F "/log/slurmd-$1.log"; } >/dev/null 2>&1 && steps+=" $p"
        elif has "$p" "SLURMD_NODENAME=$1"; then rest+=" $p"; fi
    done
    # freeze all, then the step daemons first: none may report the others' death
    [[ -z $steps$rest ]] || { kill -STOP $steps $rest; kill -KILL $steps; kill -KILL $rest; } 2>/dev/null || :
}

daemon() {                               # daemon NAME CMD...: detached, marked, logged
    local name=$1; shift
    SLURMBOX_MARK=$BOX setsid "$@" </dev/null >"$BOX/log/$name.out" 2>&1 &
    echo $! >"$BOX/run/$name.pid"
    disown
}

# a zombie counts as gone: a container's pid 1 may take seconds to reap it
gone() { local st; { read -r st <"/proc/$1/stat"; } 2>/dev/null || return 0; [[ ${st##*) } == Z* ]]; }

stop() {                                 # stop NAME SIGNAL: and KILL where that does not end it
    local pid n=100
    [[ -s $BOX/run/$1.pid ]] || return 0
    pid=$(cat "$BOX/run/$1.pid")
    rm -f "$BOX/run/$1.pid"
    has "$pid" "SLURMBOX_MARK=$BOX" || return 0    # it ended by itself; the number may be another's
    kill -"$2" "$pid" 2>/dev/null || :
    while ((n-- > 0)) && ! gone "$pid"; do sleep 0.05; done
    gone "$pid" || kill -KILL "$pid" 2>/dev/null || :
}

write_conf() {
    {
        cat <<CONF
ClusterName=box
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$BOX/run/munge.sock
CredType=cred/munge
StateSaveLocation=$BOX/state
SlurmdSpoolDir=$BOX/spool/%n
SlurmctldPidFile=$BOX/run/slurmctld.self
SlurmdPidFile=$BOX/run/slurmd-%n.self
SlurmctldLogFile=$BOX/log/slurmctld.log
SlurmdLogFile=$BOX/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
# CPUs, memory and GPUs are all handed out and counted; jobs start within a second
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=2,batch_sched_delay=1
GresTypes=gpu
# nodes bigger than the machine
SlurmdParameters=config_overrides
# a node that was lost may come back by itself, and is missed soon
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=10
KillWait=5
InactiveLimit=0
CompleteWait=0
# every job of a session stays on record: the tests read it with scontrol
MinJobAge=86400
# a job over its memory is killed, also without cgroups: usage is polled every second
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
# CAP_SYS_RESOURCE may be missing: do not try to raise limits
PropagateResourceLimits=NONE
CONF
        local n p
        while read -r n p; do
            printf 'NodeName=%s NodeHostname=%s NodeAddr=127.0.0.1 Port=%s CPUs=%s RealMemory=%s%s State=UNKNOWN\n' \
                "$n" "$(hostname -s)" "$p" "$NODE_CPUS" "$NODE_MEM" \
                "$([[ $n == gpu* ]] && echo " Gres=gpu:fake:$GPUS")"
        done < <(nodes)
        local limits="MaxTime=60 DefaultTime=10 DefMemPerCPU=200 State=UP"
        echo "PartitionName=cpu Nodes=cpu[1-$CPU_NODES] Default=YES $limits"
        echo "PartitionName=gpu Nodes=gpu[1-$GPU_NODES] $limits"
    } >"$BOX/etc/slurm.conf"

    printf '%s\n' CgroupPlugin=cgroup/v1 ConstrainCores=no ConstrainDevices=no ConstrainRAMSpace=no \
        >"$BOX/etc/cgroup.conf"

    # fake GPUs: device nodes that are really /dev/null, so that Slurm has indices to hand out
    local i n p
    for ((i = 0; i < GPUS; i++)); do
        mknod "$BOX/dev/fakegpu$i" c 1 3 2>/dev/null || : >"$BOX/dev/fakegpu$i"
    done
    while read -r n p; do
        [[ $n == gpu* ]] || continue
        echo "NodeName=$n Name=gpu Type=fake File=$BOX/dev/fakegpu[0-$((GPUS - 1))]"
    done < <(nodes) >"$BOX/etc/gres.conf"

    # Snakemake's plugins strip every SLURM_* variable, SLURM_CONF too, from the environment of the
    # srun that they start inside a job, so the commands know the way by themselves.
    local c
    for c in srun sbatch squeue scancel scontrol sinfo; do
        printf '#!/bin/sh\nSLURM_CONF=%s exec /usr/bin/%s "$@"\n' "$SLURM_CONF" $c >"$BOX/bin/$c"
    done
    chmod 755 "$BOX"/bin/*
}

start_munge() {
    head -c 1024 /dev/urandom >"$BOX/etc/munge.key"; chmod 400 "$BOX/etc/munge.key"
    daemon munged munged --foreground --socket="$BOX/run/munge.sock" --key-file="$BOX/etc/munge.key" \
        --log-file="$BOX/log/munged.log" --pid-file="$BOX/run/munged.self" --seed-file="$BOX/run/munge.seed"
    wait_for 10 munged munge -S "$BOX/run/munge.sock" -n
}

start_node() { daemon "slurmd-$1" slurmd -D -N "$1"; }
ctld_up() { scontrol ping | grep -q 'is UP'; }
nodes_up() { ! sinfo -hN -o %T | grep -qvE '^(idle|mixed|allocated)$'; }

up() {
    [[ $(id -u) == 0 ]] || die "needs root"
    [[ ! -e $BOX ]] || die "$BOX exists"
    free_ports
    mkdir -p "$BOX"/{bin,etc,run,log,state,spool,dev}; chmod 755 "$BOX" "$BOX/run"; chmod 700 "$BOX/state"
    write_conf
    start_munge
    daemon slurmctld slurmctld -D -c
    wait_for 20 slurmctld ctld_up
    local n p
    while read -r n p; do start_node "$n"; done < <(nodes)
    wait_for 30 nodes nodes_up
}

down() {
    local f left
    [[ -d $BOX/run ]] || return 0
    # jobs outlive a slurmd by design, so take them down first
    timeout 10 scancel --full --signal=KILL --state=RUNNING 2>/dev/null || :
    for f in "$BOX"/run/slurm*.pid "$BOX/run/munged.pid"; do
        [[ ! -e $f ]] || { f=${f##*/}; stop "${f%.pid}" KILL; }
    done
    # whatever is left: step daemons, orphans of a job
    for f in 1 2 3; do
        left=$(ours)
        [[ -n $left ]] || break
        kill -KILL $left 2>/dev/null || :
        sleep 0.3
    done
    rm -rf "$BOX"
}

case ${1:-} in
    run)
        shift; child=
        trap 'trap "" HUP INT TERM; [[ -z $child ]] || kill $child 2>/dev/null || :; down' EXIT
        trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM
        up
        "$@" <&0 & child=$!              # in the background, so that a trap does not wait for it
        rc=0; wait $child || rc=$?
        child=; exit $rc ;;
    node-crash) crash "$2" ;;
    node-start) start_node "$2" ;;
    *) sed -n '2,9p' "$0"; exit 2 ;;
esac
