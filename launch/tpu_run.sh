#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, installs this checkout on its hosts, runs one command on
# all of them, follows the log, resumes after preemptions, and deletes the slice at the end.
#
#   launch/tpu_run.sh --name=mot --zone=us-west4-a --type=v5litepod-16 --spot \
#     --config=configs/mot.py:base --workdir=gs://BUCKET/mot
#   launch/tpu_run.sh logs --name=mot --zone=us-west4-a     # follow a running job
#   launch/tpu_run.sh delete --name=mot --zone=us-west4-a   # stop it and its costs
#
# Types are v2-, v3-, v4-, v5litepod- (or v5e-), v5p- and v6e-N, or shapes: v5e:4x4. All other flags
# are passed to python -m moejax.main. Before it requests the slice, it checks here that the config
# is valid, its files exist and a step fits into memory. Buckets (gs://) that flags other than
# --workdir name are mounted on the hosts.
#   --project=P       of the slice; default: gcloud's own
#   --spot            cheaper, but may be preempted at any time
#   --keep            do not delete the slice at the end
#   --max_failures=N  give up after N in a row (default 3); preemptions do not count
#   --dry_run         check everything, and print the commands
#   --estimate        check by an estimate that it fits, without compiling (with libtpu installed)
#   --help            print this
#
# Exit codes: 0 done, 1 given up, 2 usage or config error, 65 the run fails again for certain.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PAUSE=${PAUSE:-30} # seconds between polls of the slice
readonly LONG=3600          # seconds of training that reset the count of failures

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
usage() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}
help() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' launch/tpu_run.sh
  exit 0
}

parse() {
  action=run name='' zone='' type='' project='' spot=0 keep=0 dry_run=0 estimate=0 max_failures=3 args=()
  case ${1-} in
    help) help ;;
    run | logs | delete) action=$1 && shift ;;
    [!-]*) usage "expected run, logs or delete, got '$1'." ;;
  esac
  local flag
  for flag in "$@"; do
    case $flag in
      --name=* | --zone=* | --type=* | --project=* | --max_failures=*)
        printf -v "$(cut -d= -f1 <<<"${flag#--}")" %s "${flag#*=}" ;;
      --spot) spot=1 ;;
      --keep) keep=1 ;;
      --dry_run) dry_run=1 ;;
      --estimate) estimate=1 ;;
      --help | -h) help ;;
      --*) args+=("$flag") ;;
      *) usage "unexpected argument '$flag'; flags are written --name=value." ;;
    esac
  done
  [[ $name ]] || usage '--name is missing: the name of the slice.'
  [[ $zone ]] || usage '--zone is missing, for example us-west4-a.'
  [[ $max_failures =~ ^[0-9]+$ ]] || usage "--max_failures: expected a number, got '$max_failures'."
  where=(--zone="$zone")
  if [[ $project ]]; then where+=(--project="$project"); fi
  if [[ $action == run ]]; then
    [[ $type ]] || usage '--type is missing, for example v5litepod-16.'
    [[ " ${args[*]}" == *' --workdir='* ]] ||
      usage '--workdir is missing: a folder that all hosts share, for example gs://BUCKET/run.'
  fi
}

# Exits with 2, before there are costs, on an error in a flag or the config, a missing file, or a
# model that does not fit; sets Google Cloud's name of the slice, and the image of its hosts.
preflight() {
  local python found configs=() flag
  for python in python .venv/bin/python ''; do
    [[ $python ]] || usage 'moejax is not installed here to check the config: pip install -e .'
    "$python" -c 'import ml_collections' 2>/dev/null && break
  done
  for flag in "${args[@]}"; do
    if [[ $flag == --config[.=]* ]]; then configs+=("$flag"); fi
  done
  # Buckets are not looked into here, and need no package.
  "$python" -m moejax.main "${args[@]//gs:\/\///gs/}" --only_check_args || exit 2
  if ((estimate)); then configs+=(--estimate); fi
  found=$("$python" -m moejax.preflight --topology="$type" "${configs[@]}") || exit 2
  read -r type image <<<"$found"
}

# Runs a command, or only prints it.
run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpus() { run gcloud compute tpus "$@" "${where[@]}" --quiet; }

# worker HOSTS COMMAND [ARGUMENT...]: launch/worker.sh on one host ('0') or on 'all'.
worker() {
  local arguments
  printf -v arguments ' %q' "${@:2}"
  tpus tpu-vm ssh "$name" --worker="$1" --command="bash worker.sh$arguments"
}

create() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$image")
  if ((spot)); then flags+=(--spot); fi
  tpus queued-resources create "$name" "${flags[@]}"
}

delete() { tpus queued-resources delete "$name" --force; }

# The state of the slice: NONE, ACTIVE, SUSPENDED (preempted), FAILED, or being created.
state() {
  local found error
  error=$(mktemp)
  if found=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>"$error"); then
    echo "$found"
  elif grep -qi 'not.found' "$error"; then
    echo NONE
  else
    cat "$error" >&2
    echo UNKNOWN # a network error, for example: poll again
  fi
  rm -f "$error"
}

# Counts a failure; gives up after too many.
failed() {
  say "$1"
  if ((++failures >= max_failures)); then
    say "gave up after $failures failures in a row"
    finish 1
  fi
  sleep "$PAUSE"
}

# Returns once the slice is active; creates it if needed.
acquire() {
  if ((dry_run)); then
    create
    return
  fi
  local now before=''
  while :; do
    now=$(state)
    if [[ $now != "$before" ]]; then say "slice $name: $now"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE) create || failed 'the slice could not be created' ;;
      SUSPENDED | FAILED)
        delete || failed 'the slice could not be deleted'
        installed=0
        ;;
      *) sleep "$PAUSE" ;;
    esac
  done
}

# Copies this checkout, uncommitted changes included, and installs it. Safe during a run.
install() {
  local archive=moejax.tgz folder
  folder=$(mktemp -d)
  git ls-files -z --cached --others --exclude-standard |
    tar --create --gzip --null --files-from=- --ignore-failed-read --file="$folder/$archive" ||
    return
  tpus tpu-vm scp "$folder/$archive" launch/worker.sh "$name:" --worker=all &&
    worker all install || return
  rm -r "$folder"
}

finish() {
  if ((keep)); then
    say "slice $name is kept and costs money; delete it with launch/tpu_run.sh delete"
  else
    delete || say "slice $name could not be deleted: delete it by hand, it costs money"
  fi
  exit "$1"
}

train() {
  local code started
  failures=0 installed=0
  trap 'say "left running: launch/tpu_run.sh logs, or delete, --name=$name"; exit 130' INT
  while :; do
    acquire
    if ! ((installed)); then
      install || { failed 'could not install' && continue; }
      installed=1
    fi
    worker all start "${args[@]}" || { failed 'could not start' && continue; }
    started=$SECONDS code=0
    worker 0 follow || code=$?
    if ((code == 0)); then finish 0; fi
    if ((code != 2 && code != 65)) && [[ $(state) != ACTIVE ]]; then
      say 'the slice was preempted'
      continue
    fi
    if ((SECONDS - started > LONG)); then failures=0; fi
    case $code in
      2) say 'usage or config error, see above' && finish 2 ;;
      65) say 'the run would fail again in the same way, see above' && finish 65 ;;
      75) say 'interrupted; resuming' ;;
      255) failed 'the connection broke' && continue ;; # the run may still be going
      *)
        say "the run ended with code $code; the last lines of every host:"
        worker all tail || true
        failed 'resuming from the last checkpoint'
        ;;
    esac
    worker all stop || true
  done
}

parse "$@"
case $action in
  run) preflight; train ;;
  logs) worker 0 follow ;;
  delete) delete ;;
esac
