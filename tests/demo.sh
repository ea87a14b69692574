#!/usr/bin/env bash
# Shows a move as it happens: a VM that runs under KVM leaves one process and goes on in another, and its memory
# follows. Exits 0 only when every check at the end holds.
#
#   tests/demo.sh PATH_TO_LAZYVM
set -euo pipefail

lazyvm=${1:?usage: demo.sh PATH_TO_LAZYVM}
memory=256M
# Slower than loopback can, so that there is something to see.
push_limit=500mbit

dir=$(mktemp --directory --tmpdir lazyvm-demo.XXXXXX)
declare -A pids=()

# Every process that is left ends with this script, and so does what it wrote.
clean_up() {
    local status=$?
    trap - EXIT INT TERM
    # A command that warned at the first signal ends at the second.
    for signal in TERM TERM KILL; do
        for pid in "${pids[@]}"; do
            kill -"$signal" "$pid" 2> /dev/null || true
        done
        for _ in {1..20}; do
            [[ -n $(jobs -r) ]] || break 2
            sleep 0.1
        done
    done
    rm -rf "$dir"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold='' green='' red='' plain=''
if [[ -t 1 ]]; then
    bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
fi

started_us=${EPOCHREALTIME/./}

say() {
    local ms=$(((${EPOCHREALTIME/./} - started_us) / 1000))
    printf '%2d.%03d s  %s\n' $((ms / 1000)) $((ms % 1000)) "$*"
}

headline() {
    printf '\n%s%s%s\n' "$bold" "$*" "$plain"
}

fail() {
    printf '\n%sThe demo failed: %s%s\n' "$red" "$*" "$plain" >&2
    for log in "$dir"/*.err; do
        [[ -s $log ]] && { echo "--- ${log##*/}"; tail -n 15 "$log"; } >&2
    done
    exit 1
}

# start NAME COMMAND...: in a process of its own, which takes no signal that the terminal sends to this script.
start() {
    local name=$1
    shift
    "$@" < /dev/null > "$dir/$name.out" 2> "$dir/$name.err" &
    pids[$name]=$!
}

runs() {
    kill -0 "${pids[$1]}" 2> /dev/null
}

# wait_until SECONDS WHAT NAME COMMAND...: until the command succeeds, for as long as process NAME runs.
wait_until() {
    local deadline=$((SECONDS + $1)) what=$2 name=$3
    shift 3
    until "$@"; do
        runs "$name" || "$@" || fail "$name ended before $what"
        ((SECONDS < deadline)) || fail "$what did not happen in time"
        sleep 0.02
    done
}

has_tick() {
    grep -q '^tick .*errors' "$1" 2> /dev/null
}

last_tick() {
    grep '^tick .*errors' "$1" | tail -n 1
}

# ended NAME: its exit code, once it has ended.
ended() {
    local code=0
    wait "${pids[$1]}" || code=$?
    unset "pids[$1]"
    return "$code"
}

# figure NAME: of the report.
figure() {
    sed -n "s/^ *\"$1\": \"\\?\\([^\",]*\\)\"\\?,\\?\$/\\1/p" "$dir/report.json"
}

ms() {
    awk -v us="$1" 'BEGIN { printf "%.2f ms", us / 1000 }'
}

[[ -r /dev/kvm && -w /dev/kvm ]] || fail "/dev/kvm can't be opened; it needs hardware virtualization, and root or the group kvm"

headline "1. A virtual machine under KVM, with $memory of memory that it checks word by word"
start run "$lazyvm" run --memory "$memory" --control "$dir/source.sock" --serial "$dir/source.serial"
wait_until 30 "the guest's first tick" run has_tick "$dir/source.serial"
say "lazyvm run, process ${pids[run]}"
for _ in 1 2 3; do
    sleep 0.4
    say "source       $(last_tick "$dir/source.serial")"
done

headline "2. lazyvm serve offers it, in a process of its own"
start serve "$lazyvm" serve --mode postcopy --vm "$dir/source.sock" --listen 127.0.0.1:0 --ticket-file "$dir/ticket" \
    --max-bandwidth "$push_limit"
wait_until 10 "the ticket" serve test -s "$dir/ticket"
say "lazyvm serve, process ${pids[serve]}"
say "ticket       $(head -c 28 "$dir/ticket")...   (the rest is a secret)"
say "source       $(last_tick "$dir/source.serial")"

headline "3. lazyvm resume takes it over: a third process, which has the ticket and a UDP socket"
moved_at_us=${EPOCHREALTIME/./}
start resume "$lazyvm" resume "@$dir/ticket" --verify --stay --report "$dir/report.json" \
    --control "$dir/destination.sock" --serial "$dir/destination.serial" --log-format json
say "lazyvm resume, process ${pids[resume]}"
wait_until 30 "a tick at the destination" resume has_tick "$dir/destination.serial"
say "source       $(last_tick "$dir/source.serial")   <- its last"
say "destination  $(grep -m 1 '^tick .*errors' "$dir/destination.serial")   <- its first"
say "first tick at the destination $(ms $((${EPOCHREALTIME/./} - moved_at_us))) after lazyvm resume was started"

headline "4. The memory follows (the push is held at $push_limit), and the guest runs on"
shown=
until [[ -s $dir/report.json ]]; do
    runs resume || [[ -s $dir/report.json ]] || fail "lazyvm resume ended before all memory was there"
    progress=$(grep -o '"pages_here":[0-9]*,"pages_total":[0-9]*,"pages_demand":[0-9]*' "$dir/resume.err" | tail -n 1) || true
    if [[ $progress != "$shown" ]]; then
        shown=$progress
        IFS=',:' read -r _ here _ total _ demand <<< "$progress"
        say "destination  $(last_tick "$dir/destination.serial")   memory $((100 * here / total))%, $demand pages on demand"
    fi
    sleep 0.05
done
say "all memory is at the destination"

wait_until 30 "the end of lazyvm serve" resume bash -c "! kill -0 ${pids[serve]} 2> /dev/null"
serve_code=0 run_code=0 resume_code=0
serve_pid=${pids[serve]} run_pid=${pids[run]}
ended serve || serve_code=$?
say "lazyvm serve, process $serve_pid, has ended with exit code $serve_code"
wait_until 10 "the end of lazyvm run" resume bash -c "! kill -0 ${pids[run]} 2> /dev/null"
ended run || run_code=$?
say "lazyvm run, process $run_pid, has ended with exit code $run_code"

headline "5. Only the destination is left"
for _ in 1 2; do
    sleep 0.4
    say "destination  $(last_tick "$dir/destination.serial")"
done
kill -TERM "${pids[resume]}"
ended resume || resume_code=$?

# The two serial logs, one behind the other, are what the guest wrote: a tick that is missing or there twice shows.
ticks=$(cat "$dir/source.serial" "$dir/destination.serial" | awk '
    /^tick / { if ($2 != last + 1 && last) gaps++; last = $2; errors = $6 }
    /^error / { reported++ }
    END { printf "%d %d %d %d", last, gaps, errors, reported }')
read -r tick_count tick_gaps guest_errors guest_reports <<< "$ticks"

headline "The move"
row() {
    printf '  %-34s %s\n' "$1" "$2"
}
row "memory" "$(($(figure memory_bytes) >> 20)) MiB, $(figure pages_total) pages"
row "pages that went before the pause" "$(figure pages_precopied)"
row "pages on demand" "$(figure pages_demand)"
row "pages pushed behind them" "$(figure pages_pushed)"
row "zero pages, not sent" "$(figure pages_zero)"
row "faults" "$(figure faults), p50 $(figure p50) us, p99 $(figure p99) us"
row "downtime (no vCPU ran anywhere)" "$(ms "$(figure downtime_us)")"
row "the VM ran at the destination after" "$(ms "$(figure resumed_at_us)")"
row "all memory was there after" "$(ms "$(figure complete_at_us)")"

headline "Checks"
bad=0
check() {
    local what=$1
    shift
    if "$@"; then
        printf '  %sok%s      %s\n' "$green" "$plain" "$what"
    else
        printf '  %sFAILED%s  %s\n' "$red" "$plain" "$what"
        bad=1
    fi
}
check "every page is the source's, compared by hash (verified: $(figure verified))" test "$(figure verified)" = true
check "errors that the guest saw: $guest_errors" test "$guest_errors$guest_reports" = 00
check "ticks of the guest, none missing and none twice: $tick_count" test "$tick_count" -gt 0 -a "$tick_gaps" -eq 0
check "pages came on demand" test "$(figure pages_demand)" -gt 0
check "both processes of the source have ended well" test "$run_code$serve_code" = 00
check "the destination has ended well when it was told to" test "$resume_code" = 0
echo
((bad == 0)) || fail "not all checks hold"
echo "The VM moved."
