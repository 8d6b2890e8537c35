#!/bin/sh
# fuzz.sh [-s SECONDS] [TARGET...] - build the fuzz targets and run each for so long (60 s)
#
# With clang and libFuzzer, under ASan and UBSan, from test/corpus/TARGET; what is found on the way is
# kept in build/fuzz/TARGET, what breaks a target in build/fuzz/. Without them the corpus is merely
# replayed, by gcc and its sanitizers. TARGET is json, mbox, name, imap or inflate.
set -eu
cd "$(dirname "$0")/.."
seconds=60
if [ "${1:-}" = -s ]; then
	seconds=$2
	shift 2
fi
[ $# -gt 0 ] || set -- json mbox name imap inflate
mkdir -p build/fuzz
[ ! -w /dev/shm ] || TMPDIR=/dev/shm
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/fuzz-XXXXXX") # where the targets keep their archives
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 1' INT TERM
flags='-std=c11 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE -D_FILE_OFFSET_BITS=64 -g -O1 -fno-sanitize-recover=undefined'
engine=fuzz
echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
	clang -fsanitize=fuzzer,address -x c - -o "$TMPDIR/probe" 2>/dev/null || engine=replay

zlib= # what we inflate is compared with what zlib makes of it, where that is there
! echo '#include <zlib.h>' | "${CC:-cc}" -E -o /dev/null - 2>/dev/null || zlib='-DZLIB -lz'

for target; do
	unit=test/fuzz_$target.c
	binary=build/fuzz/$engine-$target
	found=build/fuzz/$target
	[ "$seconds" -gt 10 ] || found=$TMPDIR/$target # a test goes by the seeds alone
	mkdir -p "$found"
	sources=$unit
	for source in json.c mbox.c; do
		grep -q "\"../$source\"" "$unit" || sources="$sources $source"
	done
	# shellcheck disable=SC2086
	if [ -z "$(find "$binary" -newer imap_backup.c -newer mbox.c -newer json.c -newer imap_backup.h \
		-newer "$unit" -newer test/unit.h -newer test/fuzz.sh 2>/dev/null)" ]; then
		if [ $engine = fuzz ]; then
			clang $flags -fsanitize=fuzzer,address,undefined $sources -o "$binary" -lbearssl -lcurl $zlib
		else
			"${CC:-cc}" $flags -fsanitize=address,undefined $sources test/replay.c -o "$binary" \
				-lbearssl -lcurl $zlib
		fi
	fi
	if [ $engine = replay ]; then
		"$binary" "test/corpus/$target"/*
		continue
	fi
	echo "$target: $seconds s" >&2
	"$binary" -max_total_time="$seconds" -max_len=8192 -timeout=20 -rss_limit_mb=1500 \
		-malloc_limit_mb=200 -artifact_prefix="$binary-" -print_final_stats=1 -verbosity=0 \
		"$found" "test/corpus/$target"
done
