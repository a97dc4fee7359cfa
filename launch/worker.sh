#!/usr/bin/env bash
# Called by launch/tpu_run.sh on each host of a slice. Every command is safe to repeat: gcloud
# retries interrupted ones.
#
#   worker.sh install         unpacks ~/moejax.tgz and installs it, unless a run is active
#   worker.sh start FLAGS...  starts python -m moejax.main, unless it is already running
#   worker.sh follow          prints its log until it ends; exits with its code
#   worker.sh tail            prints the end of the log
#   worker.sh stop            kills the run
set -euo pipefail

readonly CODE=~/moejax RUN=~/moejax-run BUCKETS=~/gs
export PATH=~/.local/bin:$PATH

# The run holds the lock that `start` takes for as long as any of its processes lives.
is_alive() { [[ -f $RUN/lock ]] && ! flock --nonblock "$RUN/lock" true; }

install() {
  if is_alive; then return; fi
  mkdir -p "$CODE" "$RUN"
  tar --extract --gzip --file ~/moejax.tgz --directory "$CODE"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  # Images of older generations have a Python that is too old.
  [[ -x $RUN/venv/bin/python ]] || uv venv --quiet --python 3.12 "$RUN/venv"
  uv pip install --quiet --python "$RUN/venv/bin/python" \
    --constraint "$CODE/constraints/newest.txt" --editable "${CODE}[tpu,gcs,seqio]"
}

# Mounts a bucket as a folder, without caching: the hosts must see each other's files at once.
mount_bucket() {
  local folder=$BUCKETS/$1
  if mountpoint -q "$folder"; then return; fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  mkdir -p "$folder"
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" "$folder"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install gcsfuse
}

start() {
  mkdir -p "$RUN"
  exec 9>"$RUN/lock"
  flock --nonblock 9 || return 0
  local flag flags=()
  for flag in "$@"; do
    # The program and tensorflow-datasets write and read these in buckets themselves. Other flags may
    # name several, as in gpt2:gs://BUCKET/gpt2.
    while [[ $flag =~ (^|[=:,])gs://([^/,]+) && $flag != --workdir=* &&
      $flag != --config.data.tfds_data_dir=* ]]; do
      mount_bucket "${BASH_REMATCH[2]}" 9>&- # a mount outlives the run
      flag=${flag/gs:\/\//$BUCKETS/}
    done
    flags+=("$flag")
  done
  rm -f "$RUN/code"
  cd "$CODE"
  # In its own session, so that it outlives the connection and `stop` can kill all of it.
  # shellcheck disable=SC2016  # the inner shell expands these
  setsid nohup bash -c 'code=0; "${@:2}" || code=$?; echo "$code" >"$1/code"' - "$RUN" \
    "$RUN/venv/bin/python" -u -m moejax.main "${flags[@]}" </dev/null >"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
}

follow() {
  tail --lines=+1 --follow --pid="$(<"$RUN/pid")" "$RUN/log"
  if [[ -f $RUN/code ]]; then exit "$(<"$RUN/code")"; fi
  exit 1 # killed
}

stop() {
  if is_alive; then kill -KILL -- "-$(<"$RUN/pid")"; fi
}

case ${1-} in
  install | start | follow | stop) "$@" ;;
  tail) tail --lines=10 "$RUN/log" ;;
  *)
    echo "error: expected install, start, follow, tail or stop, got '${1-}'" >&2
    exit 2
    ;;
esac
