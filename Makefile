# make                 build ./imap_backup with what is installed
# make test            install what the tests need, build, run them all
# make demo            a backup of a sample mailbox from a private server, step by step
# make install         to PREFIX (/usr/local), below DESTDIR; make uninstall
# make static          one static file for this machine; TARGET=mips: for another; static-all
# make bench fuzz torture test-static test-servers    the long ones
#
# For another machine with libraries of its own:
# make CROSS=mipsel-linux-musl- LDFLAGS=-static BEARSSL_LIBS=/opt/libbearssl.a CURL_LIBS=...
CROSS         =
CC            = $(CROSS)cc
CFLAGS       ?= -Os -g
PREFIX       ?= /usr/local
BEARSSL_LIBS ?= -lbearssl
CURL_LIBS    ?= -lcurl
OURS = -std=c11 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 \
	-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wmissing-prototypes \
	-Werror=implicit-function-declaration -ffunction-sections -fdata-sections \
	$(BEARSSL_CFLAGS) $(CURL_CFLAGS)
OBJ = imap_backup.o json.o mbox.o

imap_backup: $(OBJ)
	$(CC) $(CFLAGS) $(LDFLAGS) -Wl,--gc-sections -o $@ $(OBJ) $(BEARSSL_LIBS) $(CURL_LIBS) $(LDLIBS)
$(OBJ): imap_backup.h Makefile | headers
.c.o:
	$(CC) $(OURS) $(CPPFLAGS) $(CFLAGS) -c -o $@ $<

# A missing header is named together with the package that has it.
headers:
	@command -v $(firstword $(CC)) >/dev/null || \
		{ echo "missing: a C compiler ($(CC)); on Debian or Ubuntu: apt-get install gcc make" >&2; exit 1; }
	@for need in stdio.h:libc6-dev bearssl.h:libbearssl-dev curl/curl.h:libcurl4-openssl-dev; do \
		echo "#include <$${need%:*}>" | $(CC) $(OURS) $(CPPFLAGS) -E -o /dev/null - 2>/dev/null || \
		{ echo "missing: <$${need%:*}>; on Debian or Ubuntu: apt-get install $${need#*:}" >&2; \
		exit 1; }; \
	done

install: imap_backup
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	cp imap_backup $(DESTDIR)$(PREFIX)/bin/imap_backup
	chmod 755 $(DESTDIR)$(PREFIX)/bin/imap_backup
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/imap_backup

test demo:
	test/setup.sh $@
	$(MAKE) imap_backup
	test/$(if $(filter demo,$@),demo,run).py $(ARGS)
bench torture: imap_backup
	test/setup.sh $(if $(filter bench,$@),$@,test)
	test/$@.py $(ARGS)
fuzz:
	test/setup.sh fuzz
	test/fuzz.sh $(ARGS)
static:
	test/static.sh $(TARGET)
static-all:
	test/static.sh --all
test-static: imap_backup
	test/setup.sh test
	STATIC=all test/run.py $(or $(ARGS),test_static)
test-servers: imap_backup
	test/setup.sh servers $(ARGS)
	SERVERS="$(or $(ARGS),dovecot cyrus courier)" test/run.py test_at_

clean:
	rm -rf imap_backup $(OBJ) build
.PHONY: headers install uninstall test demo bench torture fuzz static static-all test-static test-servers clean
