# Sourced by the scripts beside it: a heading, a one-line failure, what --help shows, and the project's folder as the current one.
set -euo pipefail
script=$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s: %s\n' "$script" "$*"; }
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }
# The comment that the script begins with: for --help, or for an argument that it does not take.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/$script"
    [ "${1---help}" != --help ] || exit 0
    printf '%s: unknown argument %s\n' "$script" "$1" >&2
    exit 2
}
