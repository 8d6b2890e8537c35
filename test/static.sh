#!/bin/sh
# static.sh [--all | TARGET...] - build the program as one static file; for this machine if none is named
#
# The file is build/imap_backup-TARGET; the targets are in targets.txt. What goes into it is built with
# Debian's (cross) compilers from the sources of Debian 12, on any release of Debian or Ubuntu: musl,
# BearSSL, and a libcurl that can do HTTP, and HTTPS by BearSSL, and nothing else. (Debian 12's curl is
# the smallest that still has BearSSL, and gets security fixes. curl 8.15 dropped BearSSL.) The
# libraries are kept in .cache until this recipe changes; `rm -r .cache` fetches the sources anew.
#
#   SOURCES=http://mirror.example/debian   a mirror to fetch from, instead of what apt is set up for
#   SOURCES=/some/folder                   what `apt-get source --download-only` has left there
# shellcheck disable=SC2046,SC2016,SC2181  # words split where $(...) stands bare; apt expands its own
set -eu
here=$(cd "$(dirname "$0")" && pwd)
top=$(dirname "$here")
cache=$top/.cache
src=$cache/src
targets=$here/targets.txt
jobs=$(nproc)
small='-Os -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables'

# Upstream's tarballs must be these. Debian's patches may be newer, for security, than those that were
# known here: apt has checked the archive's signature then.
pins='
102a625bd8f6155260867a50c508df8d8c3f796985dd744df1a68e5cd1a79004  bearssl_0.6+dfsg.1.orig.tar.xz
051264300dffd810e7ea08f8210d3f9f61773dcd322086c0cbd02bee8d1f73df  bearssl_0.6+dfsg.1-3.debian.tar.xz
cdb38b72e36bc5d33d5b8810f8018ece1baa29a8f215b4495e495ded82bbf3c7  curl_7.88.1.orig.tar.gz
961b78bc48492c5693e4decb352ddd176f343260a8956f48b2887874048ef23b  curl_7.88.1-10+deb12u15.debian.tar.xz
a543c02070d46ccaf866957efd13f10c924daa74c86a90a0254db09a92a708ee  glibc_2.36.orig.tar.xz
cf4ac9cd98185452cae3ef34e2e4ee12753e3d93fd0c62c61396d4a47eec902f  glibc_2.36-9+deb12u14.debian.tar.xz
7d5b0b6062521e4627e099e4c9dc8248d32a30285e959b7eecaa780cf8cfd4a4  musl_1.2.3.orig.tar.gz
8f12cc808dbec030179a25ce2645a4c0b622ee8011c2afcec53b87ec5867a8cc  musl_1.2.3-1.debian.tar.xz
'

die()
{
	echo "static.sh: $*" >&2
	exit 1
}

# apt with a list and folders of its own: the machine's are left alone, and no root is needed.
private_apt()
{
	apt-get -qq -o Dir::Etc::sourcelist="$src/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
		-o Dir::State::lists="$src/apt/lists" -o Dir::Cache="$src/apt" \
		-o APT::Sandbox::User="$(id -un)" "$@"
}

# The mirror in the machine's own apt configuration, if it is Debian's: SUFFIX is '' or -security.
mirror() # SUFFIX
{
	case ${SOURCES:-} in
	?*) echo "$SOURCES$1" ;;
	*)
		apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' \
			2>/dev/null | sed -n "s/^Debian [a-z]*$1 //p" | grep . ||
			echo "http://deb.debian.org/debian$1"
		;;
	esac | head -n 1
}

have() # PACKAGE COMMAND
{
	command -v "$2" >/dev/null || "$here/setup.sh" install "$1"
}

apt_update()
{
	[ ! -e apt/sources.list ] || return 0
	key=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -e $key ] || "$here/setup.sh" install debian-archive-keyring
	echo "static.sh: fetching the list of Debian 12's sources" >&2
	mkdir -p apt/lists/partial apt/archives/partial
	for suffix in '' -security; do
		echo "deb-src [signed-by=$key] $(mirror "$suffix") bookworm$suffix main"
	done >apt/sources.list
	private_apt update
}

# Have the source of a package in $src/PACKAGE.
source_of() # PACKAGE
(
	[ ! -d "$src/$1" ] || exit 0
	mkdir -p "$src"
	cd "$src"
	echo "static.sh: fetching the source of $1" >&2
	rm -rf "$1"_* "$1.new"
	if [ -d "${SOURCES:-}" ]; then
		cp "$SOURCES/$1"_* .
	else
		apt_update
		private_apt source --download-only "$1" >/dev/null || {
			rm apt/sources.list
			die "cannot fetch the source of $1"
		}
	fi
	for file in "$1"_*.tar.[gx]z; do
		sum=$(sha256sum "$file")
		case $pins in
		*"
$sum
"*) ;;
		*)
			case $file in
			*.debian.*) [ -d "${SOURCES:-}" ] ;;
			esac && die "$file is not the one that is known here"
			echo "static.sh: $file is newer than the one known here; Debian's archive vouches for it" >&2
			;;
		esac
	done
	# This holds the tarballs against the .dsc once more, and applies Debian's patches.
	dpkg-source --no-check -x "$1"_*.dsc "$1.new" >/dev/null
	mv "$1.new" "$1"
)

# The routines for floating point of a MIPS without FPU. Debian's libgcc has them for one with FPU
# only; ld would warn, link them, and every number would be wrong. glibc's source has the same.
soft_float()
{
	for type in sf df; do
		for f in add%3 sub%3 mul%3 div%3 neg%2 eq%2 le%2 ge%2 unord%2 fix%si fix%di fixuns%si \
			fixuns%di floatsi% floatdi% floatunsi% floatundi%; do
			echo "${f%\%*}$type${f#*%}"
		done
	done >list
	for f in $(cat list) extendsfdf2 truncdfsf2; do
		"$prefix/cc" -Os -w -ffunction-sections -include endian.h \
			-D'strong_alias(a, b)=extern __typeof(a) b __attribute__((alias(#a)))' -I"$src/glibc/soft-fp" \
			-I"$src/glibc/sysdeps/mips/mips32" -I"$src/glibc/stdlib" -c "$src/glibc/soft-fp/$f.c"
	done
	"$tools-ar" rc "$prefix/lib/libsoftfp.a" ./*.o
	sed -i 's/^libgcc.a%s/-lsoftfp libgcc.a%s/' "$prefix/lib/musl-gcc.specs"
}

# musl, BearSSL and libcurl into $prefix, with $prefix/cc to use them.
libraries()
{
	mkdir musl curl
	cd musl
	"$src/musl/configure" --prefix="$prefix" --target="$musl" --disable-shared --enable-wrapper=gcc \
		CC="$tools-gcc $flags" CROSS_COMPILE="$tools-" CFLAGS="$small"
	make -j "$jobs" install
	cd ..
	# For MIPS gcc 14 wants its own cc1, by which -EB is known, kept in what musl writes over it.
	sed -i 's/%(cc1_cpu)/%(old_cc1)/; 1i %rename cc1 old_cc1\n' "$prefix/lib/musl-gcc.specs"

	# musl's own wrapper cannot take flags. -static: so that what configure tries to link is like
	# what we link; on ARM it fails otherwise.
	printf '#!/bin/sh\nexec %s-gcc -static %s "$@" -specs %s/lib/musl-gcc.specs\n' \
		"$tools" "$flags" "$prefix" >"$prefix/cc"
	chmod +x "$prefix/cc"
	case $name in
	mips*) soft_float ;;
	esac

	# Without RDRAND, which on some CPUs gives the same number for ever; and without what nobody asks
	# for, but br_ssl_client_init_full() would link: TLS 1.0 and 1.1, 3DES, CCM, MD5, and the X.509
	# engine, for imap_backup.c sets its own also where libcurl uses BearSSL.
	cp -r "$src/bearssl" .
	sed -i -E '/BR_TLS_\w*(_3DES_|_CCM)/d; /_(des_cbc|aes_ccm|prf10)\(/d; s/&br_md5_vtable/NULL/
		s/BR_TLS10, /BR_TLS12, /; /br_x509_minimal_(init|set_ecdsa)\(/,/;/d; /br_x509_minimal_set_/d
		/br_ssl_engine_set_x509/d' bearssl/src/ssl/ssl_client_full.c
	make -C bearssl -j "$jobs" lib CC="$prefix/cc" AR="$tools-ar" CFLAGS="$small -DBR_RDRAND=0"
	cp bearssl/build/libbearssl.a "$prefix/lib"
	cp bearssl/inc/*.h "$prefix/include"

	for word in zlib brotli zstd libpsl libidn2 nghttp2 libgsasl librtmp libssh2 ca-bundle ca-path; do
		set -- "$@" "--without-$word"
	done
	for word in ares ftp file ldap ldaps rtsp dict telnet tftp pop3 imap smb smtp gopher mqtt manual \
		libcurl-option ntlm ntlm-wb crypto-auth tls-srp unix-sockets cookies doh mime dateparse netrc \
		dnsshuffle get-easy-options alt-svc hsts websockets headers-api threaded-resolver \
		progress-meter proxy verbose socketpair dependency-tracking shared; do
		set -- "$@" "--disable-$word"
	done
	cd curl
	# PKG_CONFIG: libraries of the machine that builds are none of ours.
	"$src/curl/configure" "$@" --host="$musl" --prefix="$prefix" --with-bearssl="$prefix" CC="$prefix/cc" \
		AR="$tools-ar" RANLIB="$tools-ranlib" PKG_CONFIG=false CFLAGS="$small"
	make -C lib -j "$jobs" install
	make -C include install
}

build() # TARGET
{
	row=$(grep "^$1 " "$targets") || die "unknown target $1; there are:" $(names)
	read -r name budget tools musl qemu cpu flags <<-END
		$row
	END
	: "$budget $qemu $cpu"
	prefix=$cache/$name
	mkdir -p "$cache" "$top/build"
	exec 9>"$prefix.lock"
	flock 9
	have dpkg-dev dpkg-source
	have "gcc-$(echo "$tools" | tr _ -)" "$tools-gcc"
	recipe="$prefix $tools $musl $flags $small $(sed -n '/^soft_float/,/^build/p' "$0")"
	if [ "$(cat "$prefix/recipe" 2>/dev/null)" != "$recipe" ]; then
		(
			flock 9   # targets may be built side by side, the sources are for all
			for package in musl bearssl curl $(case $name in mips*) echo glibc ;; esac); do
				source_of "$package"
			done
		) 9>"$cache/lock"
		echo "static.sh: building musl, BearSSL and libcurl for $name: this takes minutes" >&2
		rm -rf "$prefix" "$top/build/$name"
		mkdir -p "$prefix/work"
		set +e   # and no "||": inside of one, -e is ignored
		(
			set -e
			cd "$prefix/work"
			libraries
		) >"$prefix.log" 2>&1
		[ $? = 0 ] || {
			tail -n 30 "$prefix.log" | cut -c 1-200 >&2
			die "failed; more in $prefix.log"
		}
		set -e
		rm -r "$prefix/work"
		printf '%s\n' "$recipe" >"$prefix/recipe"
	fi
	echo "static.sh: building imap_backup for $name" >&2
	# In a folder of its own, where make does not find what was built for this machine.
	mkdir -p "$top/build/$name"
	ln -sf "$top/Makefile" "$top"/*.[ch] "$top/build/$name"
	# common-page-size: else ld fills up a page in the file behind the code, if that spares one in memory.
	make -s -C "$top/build/$name" CC="$prefix/cc" CFLAGS="$small" \
		LDFLAGS=-Wl,-z,norelro,-z,noseparate-code,-z,common-page-size=64 \
		CURL_CFLAGS=-DCURL_STATICLIB BEARSSL_LIBS='-lcurl -lbearssl' CURL_LIBS= imap_backup
	case $name in
	mips*) # ld would tell, but of libgcc's routines for integers too: $f0 to $f31 belong to the FPU
		! "$tools-objdump" -d "$top/build/$name/imap_backup" | grep -m 1 '\$f[0-9]' ||
			die "$name: this needs an FPU"
		;;
	esac
	# Put there in one step: a test may be about to run it.
	"$tools-strip" -o "$top/build/$name/stripped" "$top/build/$name/imap_backup"
	mv "$top/build/$name/stripped" "$top/build/imap_backup-$name"
}

names()
{
	sed -n 's/^\([a-z][^ ]*\).*/\1/p' "$targets"
}

have gcc gcc
have make make
case ${1:-} in
--all) set -- $(names) ;;
'') set -- "$(sed -n "s/^\([^ ]*\) .* $(gcc -dumpmachine) .*/\1/p" "$targets")" ;;
esac
for target; do
	build "$target"
done
for target; do
	file=build/imap_backup-$target
	printf '%-9s%8d octets  %s\n' "$target" "$(stat -c %s "$top/$file")" "$file"
done
