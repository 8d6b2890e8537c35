#!/bin/sh
# setup.sh [build|demo|test|bench|fuzz|servers [NAME...]|install PACKAGE...] - install what is missing on Debian or
# Ubuntu; silent if nothing is
#
#   build   what the program is built from
#   demo    and what `make demo` needs: a Dovecot of its own, python3, openssl
#   test    and what the tests need: qemu, for what was built for other machines, and exFAT and btrfs
#   bench   and what `make bench` compares with: isync
#   fuzz    and clang with libFuzzer
#   servers what `make test-servers` talks to: cyrus, courier. They and Dovecot exclude each other, so
#           their packages are not installed, but unpacked below build/servers
#   install these packages, and nothing else
#
# Nothing is installed that is there in another form: what counts is that it works.
set -eu
PATH=$PATH:/usr/sbin:/sbin
cc=${CC:-cc}

need() # PACKAGE COMMAND...: the package is missing if the command fails
{
	package=$1
	shift
	"$@" >/dev/null 2>&1 </dev/null || missing="$missing $package"
}

header() # NAME
{
	echo "#include <$1>" | $cc -E - 
}

header_of() # PACKAGE HEADER: as need, but the input is the header's
{
	header "$2" >/dev/null 2>&1 || missing="$missing $1"
}

fuzzer() # can clang link one?
{
	echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
		clang -fsanitize=fuzzer,address -x c - -o /dev/null
}

unpack() # NAME PACKAGE PATTERN...: the package and what it needs of these, unless it is there already
{
	folder=$(dirname "$0")/../build/servers/$1
	[ ! -e "$folder/whole" ] || return 0
	command -v apt-get >/dev/null || { echo "no $1 here: that takes apt-get" >&2; return 0; }
	echo "unpacking $2" >&2
	rm -rf "$folder"
	mkdir -p "$folder"
	cd "$folder"
	# shellcheck disable=SC2086
	wanted=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
		--no-replaces --no-enhances $2 | grep -E "^($3)" | sort -u | while IFS=: read -r name _; do
		dpkg-query -W -f '${db:Status-Status}\n' "$name" 2>/dev/null | grep -q '^installed' || echo "$name"
	done)
	# shellcheck disable=SC2086
	apt-get download -qq $wanted >log 2>&1 || { cat log >&2; exit 1; }
	for package in *.deb; do
		dpkg -x "$package" .
	done
	rm -f ./*.deb
	: >whole
	cd - >/dev/null
}

missing=
if [ "${1:-}" != install ]; then
	need gcc command -v "${cc%% *}"
	need make command -v make
	if [ -z "$missing" ]; then
		header_of libc6-dev stdio.h
		header_of libbearssl-dev bearssl.h
		header_of libcurl4-openssl-dev curl/curl.h
	else
		missing="$missing libc6-dev libbearssl-dev libcurl4-openssl-dev"
	fi
fi
case ${1:-build} in
build) ;;
demo|test|bench|fuzz)
	need dovecot-imapd command -v dovecot
	[ -z "$(command -v dovecot)" ] || need dovecot-imapd test -x /usr/lib/dovecot/imap -o \
		-x /usr/libexec/dovecot/imap -o -x /usr/local/libexec/dovecot/imap
	need python3 python3 -c 'import ssl, sys; sys.exit(sys.version_info < (3, 9))'
	need openssl command -v openssl
	need netbase getent hosts localhost # a bare system has no /etc/hosts; netbase makes one
	[ "$1" != bench ] || need isync command -v mbsync
	if [ "$1" = test ]; then
		command -v qemu-mips >/dev/null || need qemu-user-static command -v qemu-mips-static
		need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
		[ ! -e /dev/loop-control ] || need btrfs-progs command -v mkfs.btrfs
		[ ! -e /dev/fuse ] || need exfat-fuse command -v mount.exfat-fuse
		[ ! -e /dev/fuse ] || need exfatprogs command -v mkfs.exfat
	fi
	;;
servers)
	"$0" test
	shift
	[ $# -gt 0 ] || set -- cyrus courier
	for name; do
		case $name in
		cyrus) unpack cyrus 'cyrus-imapd libsasl2-modules' 'cyrus|lib' ;;
		courier) unpack courier courier-imap 'courier-[^m]|lib' ;;
		dovecot) ;;
		*) echo "no server $name" >&2; exit 2 ;;
		esac
	done
	exit 0
	;;
install)
	shift
	missing=" $*"
	;;
*)
	echo "usage: $0 [build|demo|test|bench|fuzz|servers [NAME...]|install PACKAGE...]" >&2
	exit 2
	;;
esac
if [ "${1:-}" = fuzz ] && command -v clang >/dev/null; then
	fuzzer >/dev/null 2>&1 || missing="$missing libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev"
elif [ "${1:-}" = fuzz ]; then
	missing="$missing clang" # and its library in a second round, when its version is known
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "missing:$missing (these are Debian's names); please install them" >&2
	exit 1
fi
root=
if [ "$(id -u)" != 0 ]; then
	root=sudo
	if ! command -v sudo >/dev/null; then
		echo "missing:$missing; as root: apt-get install$missing" >&2
		exit 1
	fi
fi
echo "installing$missing" >&2
# A Dovecot that comes along must not begin to serve this machine, now or after the next boot.
# shellcheck disable=SC2016,SC2086
$root env DEBIAN_FRONTEND=noninteractive sh -eu -c '
	exec 9>/var/cache/apt/imap_backup.lock   # tests that run side by side may install side by side
	flock 9
	policy=/usr/sbin/policy-rc.d ours= log=$(mktemp)
	trap "rm -f \"$log\"; [ -z \"\$ours\" ] || rm -f $policy" EXIT
	if [ ! -e $policy ]; then
		ours=1
		printf "#!/bin/sh\nexit 101\n" >$policy
		chmod 755 $policy
	fi
	(apt-get install -qq -y --no-install-recommends "$@" 9>&- ||
	 { apt-get update -qq && apt-get install -qq -y --no-install-recommends "$@" 9>&-; }) >"$log" 2>&1 ||
		{ cat "$log" >&2; exit 1; }
	case " $* " in
	*" dovecot-imapd "*)
		systemctl disable --now dovecot.service dovecot.socket >/dev/null 2>&1 || true ;;
	esac
' setup $missing
case $missing in *' clang') exec "$0" fuzz ;; esac
