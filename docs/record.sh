#!/usr/bin/env bash
# Makes docs/demo.svg from a real run of `shoal demo`: asciinema records a terminal, svg-term draws what it recorded.
#
# Needs what `make demo` leaves behind, and Node.js.  The tools go into a folder of their own, which is removed.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/python"
"$tools/python/bin/pip" install --quiet --disable-pip-version-check asciinema==2.4.0
PATH="$PWD/.venv/bin:$PATH" "$tools/python/bin/asciinema" rec --quiet --cols 110 --rows "${ROWS:-40}" --idle-time-limit 2 \
  --command "echo '$ shoal demo'; exec shoal demo" "$tools/demo.cast"
npx --yes svg-term-cli@2.1.1 --in "$tools/demo.cast" --out docs/demo.svg --window --no-cursor
