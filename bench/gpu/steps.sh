# Sourced by bench/gpu_gate.sh: steps that have a time limit and a log each and are not repeated
# once they passed.
#
#   begin STAGE FOLDER BUILD SECONDS   results go to FOLDER; what passed with another BUILD is void
#   step NAME SECONDS COMMAND...       exit code 77 of the command means "not available here"
#   finish                             returns 0 if every step passed or was not available
#
# FOLDER/STAGE.steps names the build and the steps that passed, FOLDER/STAGE.log has every log of
# this run. Where $OUT is set both, and FOLDER's other files of the stage, are copied there too.

begin() {
  stage=$1 results=$2 deadline=$((SECONDS + $4)) failed=0 logs=build/gate/log/$1
  mkdir -p "$results" "$logs"
  if [ "$(head -n 1 "$results/$stage.steps" 2>/dev/null)" != "build $3" ]; then
    rm -f "$results/$stage".*
    echo "build $3" >"$results/$stage.steps"
  fi
  : >"$results/$stage.log"
}

step() {
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) code
  shift 2
  if grep -qx "passed $name" "$results/$stage.steps"; then
    echo "$name: passed earlier"
    return
  fi
  if [ "$left" -le 0 ]; then
    echo "$name: FAILED, no time left; run the stage again"
    failed=1
    return
  fi
  [ "$left" -ge "$limit" ] || limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  { echo "==== $name: $*"; cat "$logs/$name.log"; echo; } >>"$results/$stage.log"
  case $code in
    0)
      echo "$name: passed ($((SECONDS - start)) s)"
      echo "passed $name" >>"$results/$stage.steps" ;;
    77) echo "$name: not available here" ;;
    124 | 137) echo "$name: FAILED, stopped after $limit s" ;;
    *) echo "$name: FAILED, exit code $code" ;;
  esac
  if [ $code != 0 ] && [ $code != 77 ]; then
    failed=1
    tail -n 5 "$logs/$name.log" | sed 's/^/    /'
  fi
  publish
}

publish() {
  if [ -n "${OUT:-}" ]; then cp "$results/facts.txt" "$results/$stage".* "$OUT/"; fi
}

finish() {
  publish
  if [ $failed = 0 ]; then echo "$stage: passed"; else echo "$stage: FAILED"; fi
  return $failed
}
