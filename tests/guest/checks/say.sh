# Sourced by the checks that run in a guest: one line for each check, the count at the end.

n_checks=0
n_failed=0

# check NAME COMMAND...: runs it; what it says is shown only if it fails.
check() {
    local name=$1 said
    shift
    n_checks=$((n_checks + 1))
    if said=$("$@" 2>&1); then
        echo "ok   $((SECONDS))s $name"
    else
        n_failed=$((n_failed + 1))
        echo "FAIL $((SECONDS))s $name"
        printf '%s\n' "$said" | tail -25 | sed 's/^/     | /'
    fi
}

# within SECONDS COMMAND...: tries until it works.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || { echo "in vain: $*"; "$@"; return 1; }
        sleep 0.2
    done
}

finish() {
    echo "$n_checks checks, $n_failed failed, $SECONDS s"
    [ "$n_failed" = 0 ]
}
