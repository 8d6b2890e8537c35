#!/bin/sh
# lint.sh [--all] - what compilers and other programs that read sources say of ours
#
# Each is asked if it is there, and must find nothing: gcc and clang, also for 32 bits where a compiler
# for that is installed; cppcheck; shellcheck. With --all also what takes minutes: gcc -fanalyzer,
# clang-tidy.
set -eu
cd "$(dirname "$0")/.."
sources='imap_backup.c json.c mbox.c'
defines='-std=c11 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE -D_FILE_OFFSET_BITS=64'
warnings='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wmissing-prototypes -Werror'
failed=0

have() # PROGRAM
{
	command -v "$1" >/dev/null || { echo "not here: $1"; return 1; }
}

run() # COMMAND...
{
	echo "$*"
	"$@" || failed=1
}

# Ours stands in the tests as program_main, which has no prototype.
# shellcheck disable=SC2086
for compiler in gcc clang; do
	have $compiler || continue
	run $compiler $defines -D_TIME_BITS=64 $warnings -Os -fsyntax-only $sources
	run $compiler $defines $warnings -Wno-missing-prototypes -fsyntax-only test/*.c
done
# A char without a sign, and types of other sizes; with the headers of this machine behind its own.
for target in i686-linux-gnu arm-linux-gnueabihf; do
	# The C library's headers for it are needed as well, or gnu/stubs.h is this machine's.
	echo '#include <stdio.h>' | $target-gcc -E -o /dev/null - 2>/dev/null ||
		{ echo "not here: $target-gcc with a C library"; continue; }
	# shellcheck disable=SC2086
	run $target-gcc $defines -D_TIME_BITS=64 $warnings -Os -fsyntax-only -idirafter /usr/include \
		-idirafter "/usr/include/$(gcc -print-multiarch)" $sources
done
# shellcheck disable=SC2086
! have cppcheck || run cppcheck --quiet --std=c11 --enable=warning,performance,portability \
	--suppress=missingIncludeSystem --error-exitcode=1 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE $sources
! have shellcheck || run shellcheck test/*.sh .ci/run

[ "${1:-}" = --all ] || exit $failed
# shellcheck disable=SC2086
for source in $sources; do
	! have gcc || run gcc $defines $warnings -O1 -fanalyzer -c -o /dev/null $source
done
# Passed over, and why:
#   easily-swappable-parameters  offsets and lengths stand side by side everywhere
#   implicit-widening            products of record numbers (at most MBOX_MAILS_MAX) and record sizes
#   narrowing-conversions        -Wconversion says it better; these are values below 128
#   not-null-terminated-result   memchr() in an alphabet of 64 digits
#   suspicious-memory-comparison struct state: a difference in the padding costs a write, no more
#   no-recursion                 JSON values, JSON_DEPTH_MAX deep
#   no-int-to-ptr                takes const from BearSSL's argument
#   insecureAPI                  memcpy() and the like: their _s forms are in no C library that we use
#   core.*, unix.Malloc          it does not know that a pointer belongs to a count (boxes and n_boxes,
#                                ranges and n) or that an error ends a loop: -fanalyzer, ASan and the
#                                fuzz targets watch what these would
# shellcheck disable=SC2086
! have clang-tidy || run clang-tidy --quiet --warnings-as-errors='*' --checks='-*,bugprone-*,misc-*,
	performance-*,portability-*,clang-analyzer-*,-bugprone-easily-swappable-parameters,
	-bugprone-implicit-widening-of-multiplication-result,-bugprone-narrowing-conversions,
	-bugprone-not-null-terminated-result,-bugprone-suspicious-memory-comparison,-misc-no-recursion,
	-performance-no-int-to-ptr,-clang-analyzer-security.insecureAPI.*,-clang-analyzer-core.*,
	-clang-analyzer-unix.Malloc,-bugprone-reserved-identifier,-misc-include-cleaner' $sources -- $defines
exit $failed
