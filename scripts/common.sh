# Sourced by the scripts beside it: a heading, a one-line failure, and the project's folder as the current one.
set -euo pipefail
script=$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s: %s\n' "$script" "$*"; }
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }
