# shellcheck shell=bash disable=SC2154
# The body of every job script; `make slurm` puts the settings before it. It starts one launcher a node, waits for all of them,
# and asks `codetune.slurm` what to do next: be finished, start again, or end.
#
# Who gets which signal: Slurm sends USR1 (`--signal`, before the time ends) and TERM (cancelled, preempted, time up) to every
# process of the step. The ranks answer both with a checkpoint at the next step. The launchers must not: torchrun's would kill
# its ranks after 30 seconds, saved or not. So they ignore both, and the ranks, which inherit that, take their own handlers.

set -euo pipefail
cd "$root"
mkdir -p "$folder"

say() {
  printf '%s  job %s, start %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"
}

nodes=${SLURM_JOB_NUM_NODES:-1}
if [[ -z $main_address ]]; then
  main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi

command=("$python")
if [[ -n $accelerate ]]; then
  # NODE_RANK stands for the number of the node, which is known only there
  command+=(-m accelerate.commands.launch --quiet --config_file "$accelerate"
    --num_machines "$nodes" --num_processes "$((nodes * processes_per_node))" --machine_rank NODE_RANK
    --main_process_ip "$main_address" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))")
  export PET_SIGNALS_TO_HANDLE=SIGINT # torchrun's options by another door: accelerate launch does not pass this one on
fi
command+=("${training[@]}" --grace-seconds "$((lead_seconds - 15))")

# Ask what follows on the session that ended with this code, and do it; `result` is the code of the job.
follow() {
  local verdict
  verdict=$("$python" -m codetune.slurm after --run-dir "$run_dir" --folder "$folder" --job "$SLURM_JOB_ID" \
    --max-failures "$max_failures" --code "$1") || verdict="end cannot tell how the run ended (code $1)"
  say "${verdict#* }"
  case $verdict in
    finished*) result=0 ;;
    again*) result=75 ;;
    *) result=2 ;;
  esac
  if ((result != 75)); then
    return
  fi
  if [[ $ending == by_slurm ]]; then
    say "Slurm ended the job: after a requeue or a preemption it starts again by itself, after scancel it does not"
  elif ! scontrol requeue "$SLURM_JOB_ID"; then
    say "the job could not be requeued; start it again: sbatch $script"
  fi
}

# Slurm's TERM, which comes when it ends the job for whatever reason; the ranks have it too. A job whose time is up before the
# run has saved is not started again by Slurm, and there is no time left to wait for the end and say then that it should be.
# shellcheck disable=SC2317  # called by the trap
on_term() {
  if (($(date +%s) >= time_is_up)); then
    ending=time_is_up
    say "the time is up, and the run has not ended yet"
    follow time
  else
    ending=by_slurm
  fi
}
result='' ending=''
time_is_up=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e 2> /dev/null) || time_is_up=''
time_is_up=$(date -d "${time_is_up:-next year}" +%s 2> /dev/null) || time_is_up=$(date -d 'next year' +%s)
trap on_term TERM
trap ':' USR1

rm -f "$run_dir/ended.json"
say "$nodes node(s) from $main_address; each writes $folder/$SLURM_JOB_ID-<node>.log"
# shellcheck disable=SC2016  # expanded on the node
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --wait=300 \
  --output="$folder/%j-%n.log" --open-mode=append \
  bash -c 'trap "" USR1 TERM; exec "${@/#NODE_RANK/$SLURM_NODEID}"' launch "${command[@]}" &
step=$!
while true; do
  code=0
  wait "$step" || code=$?
  kill -0 "$step" 2> /dev/null || break # otherwise it was a signal that ended the waiting
done

if [[ -z $result ]]; then
  follow "$code"
fi
exit "$result"
