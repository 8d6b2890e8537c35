/*
 * imap_backup - backs up all mailboxes of many IMAP accounts into mbox files
 *
 * To be read from top to bottom; a chapter calls only functions of the chapters above it:
 *
 *     base          messages to the person, clocks, memory, texts, signals
 *     config        the configuration file, and the quick form that stands for one
 *     inflate       decompresses what a server compresses
 *     certificates  decides whether a server is the one that was meant
 *     stream        moves octets to and from one server: TCP, TLS by BearSSL, timeouts
 *     sets          keeps UIDs as ranges
 *     imap          sends commands and reads responses (RFC 3501 and extensions)
 *     login         begins and ends a connection: greeting, STARTTLS, SASL
 *     http          calls the URLs that are told of a run, and posts OAuth's forms
 *     oauth         signs in once, and keeps a fresh access token from then on
 *     mailboxes     names, files, and which mailboxes have news
 *     archives      verifies and exports what is on disk, without a server
 *     sync          makes one archive match its mailbox, or compares it
 *     session       brings mailbox after mailbox over one connection
 *     restore       puts archived mail back on a server
 *     workers       one process for each connection; the parent hands out mailboxes
 *     command line  options, exit status
 *
 * A mail goes from the socket through a TLS record and a chunk of a literal to the mbox writer and its
 * file. It is never held in memory as a whole.
 *
 * The server is never changed by a backup: EXAMINE, BODY.PEEK. RFC 3501 (IMAP4rev1) with, where the
 * server offers them, 2595 (STARTTLS), 2971 (ID), 4731 (ESEARCH), 4959
 * (SASL-IR), 4978 (COMPRESS, with 1951), 5530 (response codes), 5819 (LIST-STATUS), 6154 (SPECIAL-USE),
 * 7162 (CONDSTORE), 7628 (OAUTHBEARER, with 6749, 7636 and 8628), 7888 (LITERAL+), 7889 (APPENDLIMIT),
 * 8438 (STATUS=SIZE), 9738 (MESSAGELIMIT); of 9051 (IMAP4rev2) what a server speaks that speaks no other.
 *
 * What it does not do, and why: QRESYNC (a missed VANISHED loses for good, a full set heals),
 * IDLE (it is run by cron), UTF8=ACCEPT (renames mailboxes on the wire), sequence numbers (they
 * shift), POP3.
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <bearssl.h>
#include <curl/curl.h>

#include "imap_backup.h"

#define VERSION "1.0"

/*
 * Limits. What a server or a file contains never decides how much memory is taken: it is decided
 * here (and, for the archive, by MBOX_MAILS_MAX).
 */
enum {
	CONFIG_ACCOUNTS_MAX = 1000,
	CONFIG_PROCESSES_MAX = 64,
	CONFIG_PINS_MAX = 8,          /* fingerprints of one account */
	CONFIG_NAMES_MAX = 10000,     /* mailboxes in a list */
	QUICK_OCTETS_MAX = 64 << 10,  /* of the configuration that the quick form stands for */
	PATH_MAX_OCTETS = 3900,       /* mbox.c adds a suffix to it */
	CA_FILE_MAX = 4 << 20,        /* octets of a CA bundle */
	CHAIN_OCTETS = 32 << 10,      /* of the certificates that a server sends */
	CHAIN_DEPTH = 8,              /* issuers of its own */
	CHAIN_SIGNATURES = 32,        /* checked, of all that a chain could be made to cost */
	CONNECT_SEC = 15,             /* for an address of a host, unless it is the last one */
	STREAM_RAW_OCTETS = 16 << 10, /* read from the socket at once */
	DRIP_RATE = 16,               /* octets a second: what comes more slowly ... */
	DRIP_TIMEOUTS = 30,           /* ... for so many times "timeout" comes for ever */
	COMPRESS_RATE = 6000,         /* octets a ms, 50 Mbit/s: a slower line is worth it */
	COMPRESS_OCTETS = 1 << 20,    /* that show it; fewer are not worth a round trip */
	COMPRESS_CONNECT_MS = 5,      /* the round trip of a LAN is shorter */
	STOP_MS = 3000,               /* for what is on the way when the run is to stop */
	COMPRESS_STARTS = 16,         /* round trips that show a line's latency, not its rate */
	HTTP_ANSWER_MAX = 64 << 10,   /* octets of an answer to a form */
	FORM_MAX = 192 << 10,         /* of a form: a token of an answer with each octet as %XX */
	OAUTH_FILE_MAX = 256 << 10,   /* of a token file */
	OAUTH_MORE = 8 << 10,         /* by which it may grow: there has to be room for them */
	OAUTH_LEFT_SEC = 300,         /* a token that is good for less is replaced */
	TOKEN_MAX = 32 << 10,         /* octets of an access token that can be logged in with */
	IMAP_ATOM_MAX = 128,          /* an atom we look at; longer ones are cut */
	IMAP_LINE_MAX = 1000,         /* octets of a command (RFC 2683 3.2.1.5) */
	IMAP_FLIGHT_MAX = 104,        /* commands without an answer */
	IMAP_RING = 264,              /* the same, in a restore */
	RESTORE_REFUSED_MAX = 1000,   /* mails that a server may refuse in a restore */
	RESTORE_BADS_MAX = 9,         /* on one connection; the tenth ends it at Exchange */
	APPEND_AHEAD_MAX = 64 << 10,  /* octets of a mail that is sent before the server takes it */
	IMAP_FLIGHT_OCTETS = 8 << 10, /* and octets: more could block both sides */
	STATUS_OCTETS = 3 << 10,      /* without an answer: then no STATUS follows yet */
	IMAP_NOISE_MAX = 16 << 20,    /* octets without anything that we asked for */
	SET_RANGES_MAX = MBOX_MAILS_MAX,
	SET_TEXT_OCTETS = IMAP_LINE_MAX - 100, /* of a command are its UIDs */
	BATCH_RANGES = 128,                    /* of UIDs in one command */
	RECORD_MAX = 4096,                     /* octets of what a process reports at once: PIPE_BUF */
	REPORT_MAX = 4 << 20,                  /* of what --json tells of an account */
	SESSION_BOXES_MAX = 24,                /* mailboxes on the wire at a time */
	AHEAD_MAILS = 20000,                   /* of archives that are opened while another is open ... */
	AHEAD_MAIL_OCTETS = 1000, /* ... guessed by this size of a mail where there is no index */
	SHARE_MAILS = 100,        /* new ones: fewer are not worth a round trip to be shared by workers */
	MAILBOXES_MAX = 20000,    /* of one account */
	MAILBOX_NAMES_MAX = 3 << 20, /* octets of their names */
	BLAME_MAX = 64,              /* mailboxes that a process died with */
	ALERTS_MAX = 8,              /* shown, of one connection */
	WINDOWS_MAX = 2000,          /* MESSAGELIMITs that are followed, of one mailbox */
	APART_MAX = 64,              /* mails of which something came apart from them: a batch and more */
	POISON_MAX = 32,             /* mails of one mailbox that break the connection */
	POISON_ROW = 4,              /* of these one after the other: it is not the mails */
	SAMPLE_PART = 100,           /* one mail of so many is compared with the server's, ... */
	SAMPLE_MIN = 20,             /* ... but so many at least, of each mailbox */
	VAGUE_SEC = 5,               /* where a server is unavailable, but does not say for how long */
	VAGUE_MAX = 8,               /* single mails one after the other that are so: it is not the mails */
	SILENT_SEC = 10,             /* without a greeting in the clear, a hint is given */
	BACKOFF_SEC = 60,            /* the longest pause of our own making */
	WAIT_SEC = 900,              /* the longest that a server can ask for */
	PLACE_SEC = 10               /* a worker that must wait longer gives its place back */
};

/* The compiler is to check a function's arguments: its format, and the first behind it. */
#define PRINTF(text, first) __attribute__((format(printf, text, first)))

/* ======== base: messages to the person, clocks, memory, texts, signals ======== */

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DETAIL, LOG_TRACE };

/* JSON values with commas between them, for --json. What is more than REPORT_MAX is left out. */
struct pile {
	char *text; /* owned */
	size_t n, room;
};

static struct {
	enum log_level level; /* the most talkative that is shown */
	struct pile *errors;  /* the parent's with --json, else NULL */
	bool records;         /* with --json in other processes: they go to standard output, a line each */
	bool terminal, color; /* stderr is one; it may be coloured */
	char context[200];    /* "account: mailbox: ", in front of each line */
} log_to = { .level = LOG_INFO };

/*
 * Make a text fit for the terminal: what controls it, is broken, or is not seen (zero-width and
 * bidirectional marks, tags) becomes \xNN, octet by octet. Returns out.
 */
static char *log_visible(char *out, size_t size, const char *text, size_t n)
{
	static const struct {
		uint32_t low, high;
	} hidden[] = {
		{ 0, 0x1F },        { 0x7F, 0x9F },     { 0xAD, 0xAD },       { 0x61C, 0x61C },
		{ 0x180E, 0x180E }, { 0x200B, 0x200F }, { 0x2028, 0x202E },   { 0x2060, 0x206F },
		{ 0xFEFF, 0xFEFF }, { 0xFFF9, 0xFFFB }, { 0xE0000, 0xE0FFF },
	};
	size_t length = 0, octets;

	for (size_t i = 0; i < n && length + 5 < size; i += octets) {
		uint32_t code = 0;

		octets = utf8_char((const uint8_t *)text + i, n - i, &code);
		for (size_t k = 0; k < sizeof hidden / sizeof *hidden; k++)
			if (code >= hidden[k].low && code <= hidden[k].high)
				octets = 0; /* so that its octets are told one by one */
		if (octets == 0) {
			length += (size_t)snprintf(out + length, 5, "\\x%02x", (uint8_t)text[i]);
			octets = 1;
		} else {
			memcpy(out + length, text + i, octets);
			length += octets;
		}
	}
	out[length] = '\0';
	return out;
}

/* Return the octets of a text's first character; 1 if they are no UTF-8. The text is not empty. */
static size_t text_step(const char *text)
{
	size_t octets = utf8_char((const uint8_t *)text, strlen(text), NULL);

	return octets > 0 ? octets : 1;
}

/* Return how many octets of a text fit into so many columns; *used receives how many columns these take. */
static size_t log_fit(const char *text, unsigned columns, unsigned *used)
{
	size_t at = 0;

	for (*used = 0; text[at] != '\0'; at += text_step(text + at)) {
		unsigned width = (uint8_t)text[at] > 0xE2 ? 2 : 1; /* East Asian, and emoji; roughly */

		if (width > columns - *used)
			break;
		*used += width;
	}
	return at;
}

/* An amount of octets for a person: "512 B", "13 kB", "1.3 MB". Returns out. */
static char *log_octets(char out[16], uint64_t octets)
{
	static const char units[] = "BkMGTPE";
	double amount = (double)octets;
	unsigned unit = 0;

	for (; amount >= 999.5 && unit < 6; unit++)
		amount /= 1000;
	snprintf(out, 16, "%.*f %c%s", unit > 1 && amount < 99.5, amount, units[unit], unit == 0 ? "" : "B");
	return out;
}

static void pile_add(struct pile *pile, const char *json, size_t n)
{
	char *more = pile->text;

	if (pile->n + n + 2 > pile->room) {
		if (pile->n + n + 2 > REPORT_MAX || (more = realloc(more, 2 * (pile->n + n + 2))) == NULL)
			return;
		pile->text = more;
		pile->room = 2 * (pile->n + n + 2);
	}
	if (pile->n > 0)
		more[pile->n++] = ',';
	memcpy(more + pile->n, json, n);
	pile->n += n;
}

/* Hand a record of this kind to the parent: at most PIPE_BUF octets, so that they do not mix. */
static void report_record(char kind, const char *json)
{
	char line[RECORD_MAX];
	ssize_t ignored = 0;
	int n = snprintf(line, sizeof line, "%c%s\n", kind, json);

	if (log_to.records && n > 0 && (size_t)n < sizeof line)
		ignored = write(STDOUT_FILENO, line, (size_t)n);
	(void)ignored;
}

/* One message is one line and one write(), so that workers do not mix theirs. */
PRINTF(2, 3) static void log_write(enum log_level level, const char *format, ...)
{
	static const char *const words[] = { "error: ", "warning: ", "", "", "" };
	static const char *const colors[] = { "\033[1;31m", "\033[1;33m", "", "", "" };
	char text[1200], visible[1600], line[2000];
	bool color = log_to.color && *colors[level] != '\0';
	ssize_t ignored;
	va_list arguments;
	int n;

	if (level > log_to.level)
		return;
	va_start(arguments, format);
	n = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	log_visible(visible, sizeof visible, text, n < (int)sizeof text ? (size_t)n : sizeof text - 1);
	n = snprintf(line, sizeof line, "%s%s%s%s%s%s\n", log_to.terminal ? "\r\033[K" : "",
		     color ? colors[level] : "", words[level], color ? "\033[m" : "", log_to.context,
		     visible);
	ignored = write(STDERR_FILENO, line, (size_t)n);
	(void)ignored; /* if stderr is gone there is nobody to tell */
	if (level == LOG_ERROR && (log_to.errors != NULL || log_to.records)) {
		char json[RECORD_MAX - 8];

		snprintf(line, sizeof line, "%s%s", log_to.context, visible);
		json_escape(json, sizeof json, line);
		if (log_to.errors != NULL)
			pile_add(log_to.errors, json, strlen(json));
		report_record('E', json);
	}
}

#define log_error(...) log_write(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_write(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_write(LOG_INFO, __VA_ARGS__)
#define log_detail(...) log_write(LOG_DETAIL, __VA_ARGS__)

static void log_context(const char *account, const char *mailbox)
{
	char visible[150];

	log_visible(visible, sizeof visible, mailbox, strlen(mailbox));
	snprintf(log_to.context, sizeof log_to.context, "%s%s%s%s", account, *account != '\0' ? ": " : "",
		 visible, *mailbox != '\0' ? ": " : "");
}

/*
 * The clock by which certificates are judged. A router without a battery wakes up in 1970: then the
 * latest date that is known to be past serves.
 */
static int64_t clock_sec;
static bool clock_wrong;

/* When this program was built; SOURCE_DATE_EPOCH counts. */
static int64_t build_sec(void)
{
	static const char date[] = __DATE__; /* "Nov 24 2026" */

	return days_of(strtol(date + 7, NULL, 10), month_of(date), (unsigned)strtoul(date + 4, NULL, 10)) *
	       86400;
}

/* Memory for a handful of small things; without it there is no going on. */
static void *allocate(size_t n)
{
	void *p = calloc(1, n > 0 ? n : 1);

	if (p == NULL) {
		log_error("out of memory");
		_exit(1);
	}
	return p;
}

/* Memory that is shared with the processes forked later, zeroed. */
static void *allocate_shared(size_t n)
{
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		log_error("out of memory");
		_exit(1);
	}
	return p;
}

/* RFC 4648. The last two are "+/", but "-_" in a URL, and "+," in a mailbox's name. */
static const char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_+,";

/* Decode a text up to its end, "=" or "-"; out may be the text. Returns how many octets it has. */
static size_t base64_decode(uint8_t *out, const char *text)
{
	uint32_t bits = 0;
	size_t n = 0;

	for (unsigned digits = 0; *text != '\0' && *text != '=' && *text != '-'; text++) {
		const char *digit = strchr(base64_digits, *text);

		if (digit == NULL)
			continue;
		bits = bits << 6 | (uint32_t)(digit - base64_digits < 64 ? digit - base64_digits : 63);
		if (digits++ % 4 != 0)
			out[n++] = (uint8_t)(bits >> (6 - 2 * ((digits - 1) % 4)));
	}
	return n;
}

static void sha256(uint8_t out[32], const void *octets, size_t n)
{
	br_sha256_context context;

	br_sha256_init(&context);
	br_sha256_update(&context, octets, n);
	br_sha256_out(&context, out);
}

static char *copy_text(const char *text)
{
	char *copy = allocate(strlen(text) + 1);

	return strcpy(copy, text);
}

/*
 * Return the place of a word in a list ("one two" or "one, two"), from 0, in any case of letters; -1 if it is
 * none of them.
 */
static int word_place(const char *list, const char *word)
{
	size_t n;

	for (int i = 0; (n = strcspn(list, ", ")) > 0; i++, list += n, list += strspn(list, ", "))
		if (strlen(word) == n && strncasecmp(list, word, n) == 0)
			return i;
	return -1;
}

/* The same as a bit: 1 for the first word, 2 for the second; 0 for none. */
static unsigned word_bit(const char *list, const char *word)
{
	int place = word_place(list, word);

	return place >= 0 ? 1u << place : 0;
}

struct string {   /* grows up to its size; what it holds may be a secret */
	char *at; /* owned, closed with NUL */
	size_t n, size;
	bool full; /* something did not fit */
};

static struct string string_new(size_t size)
{
	return (struct string){ .at = allocate(size), .size = size };
}

static void string_free(struct string *t)
{
	wipe(t->at, t->size);
	free(t->at);
}

/* Hide a secret, or show it again. It remains a string: its octets go round from 1 to 255. */
static void secret_turn(char *text, bool hide)
{
	static uint8_t pad[64];
	static bool known;

	if (!known)
		random_octets(pad, sizeof pad); /* without them nothing is hidden, and TLS will tell why */
	known = true;
	for (size_t i = 0; text[i] != '\0'; i++) {
		unsigned by = pad[i % sizeof pad] % 255u;

		text[i] = (char)(1 + ((uint8_t)text[i] - 1 + (hide ? by : 255 - by)) % 255);
	}
}

/*
 * Take a secret away from where it stands. What is kept of it, until it is wanted, is hidden, as a core dump
 * may go to people who are not to have it. Returns what is kept; the caller may free it.
 */
static char *secret_take(const char *text)
{
	char *hidden = copy_text(text);

	secret_turn(hidden, true);
	wipe((void *)(uintptr_t)text, strlen(text));
	return hidden;
}

/* Return a secret in clear, for the moment in which it is sent; string_free() ends that. */
static struct string secret_show(const char *hidden)
{
	struct string clear = { .at = copy_text(hidden), .size = strlen(hidden) + 1 };

	secret_turn(clear.at, false);
	return clear;
}

/* Overwrite a secret, unless it is NULL, in a text, in any case of letters, also where the text cuts it. */
static void text_scrub(char *text, const char *secret)
{
	for (; secret != NULL && *secret != '\0' && *text != '\0'; text++) {
		size_t n = 0;

		while (secret[n] != '\0' &&
		       tolower((unsigned char)text[n]) == tolower((unsigned char)secret[n]))
			n++;
		if (secret[n] == '\0' || (text[n] == '\0' && n >= 4))
			memset(text, '*', n);
	}
}

static void string_octet(struct string *t, char octet, bool plain)
{
	if (t->size - t->n < 4)
		t->full = true;
	else
		t->n += (size_t)snprintf(t->at + t->n, 4, plain ? "%c" : "%%%02X", (unsigned char)octet);
}

/* In the format %s is a string, %f a value in a form or query, %j a JSON string; all else is itself. */
static void string_list(struct string *t, const char *format, va_list values)
{
	for (; *format != '\0'; format++) {
		const char *value = *format == '%' ? va_arg(values, const char *) : "";

		if (*format != '%') {
			string_octet(t, *format, true);
		} else if (*++format == 'j') {
			size_t n = t->size - t->n > 3 ? json_escape(t->at + t->n, t->size - t->n, value)
						      : 0;

			t->full = t->full || n == 0;
			t->n += n;
		}
		for (; *value != '\0' && *format != 'j'; value++)
			string_octet(t, *value,
				     *format == 's' || isalnum((unsigned char)*value) ||
					     strchr("-._~", *value));
	}
}

static void string_add(struct string *t, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	string_list(t, format, values);
	va_end(values);
}

/* Return an exit status, or that of a failure, which is told, if not all that was printed could be written. */
static int output_end(int status)
{
	errno = EIO; /* unless it says what */
	if (fflush(stdout) == 0 && !ferror(stdout))
		return status;
	log_error("standard output: %s", strerror(errno));
	return status == 2 ? status : 1;
}

/* A signal asks to end the run; where nothing would be lost, and something may take long, it does so at once. */
static volatile sig_atomic_t stop_asked, stop_at_once;

static void on_stop_signal(int number)
{
	stop_asked = number;
	if (stop_at_once)
		_exit(0);
}

static pid_t parent_pid; /* the process whose end is ours too; 0: none */

/* Return true if the run is to end: a signal has come, or the parent process is gone. */
static bool stop_due(void)
{
	return stop_asked || (parent_pid != 0 && getppid() != parent_pid);
}

/* ======== config: the configuration file, and the quick form that stands for one ======== */

/*
 * Turns JSON into struct config, with every default and every complaint; it contacts nobody and
 * writes nothing. Strings are borrowed from the JSON tree, which lives as long as the config. Secrets are
 * hidden there: secret_show().
 */
enum ssl_mode { SSL_UNSET, SSL_OFF, SSL_ON };
enum compress_mode { COMPRESS_IF_SLOW, COMPRESS_OFF, COMPRESS_ON };
enum oauth_type { OAUTH_O365, OAUTH_GOOGLE, OAUTH_CUSTOM };

struct oauth { /* a text that is NULL does not stand in the configuration */
	const char *name;
	unsigned type;               /* enum oauth_type */
	unsigned client_credentials; /* 1: the program signs in as itself; 0: for a person */
	const char *client_id, *tenant_id, *client_secret, *email;
	const char *auth_url, *token_url, *device_url, *scope, *redirect; /* "": the provider has none */
	char standard[5][300]; /* owned: what these point to where the configuration has none */
};

struct account {
	const char *email, *host, *username, *ca_file;
	const char *password, *password_command; /* of these three one is given at most, ... */
	const struct oauth *oauth;               /* ... and with none a person is asked */
	unsigned ssl, compress;                  /* enum ssl_mode, enum compress_mode */
	bool never_clear;                        /* without TLS from the start: STARTTLS or nothing */
	bool wanted;                             /* -a names it, or nothing is named */
	unsigned port, processes;
	unsigned pins; /* SHA-256 fingerprints of the certificate; 0: use the CAs */
	uint8_t pin[CONFIG_PINS_MAX][32];
	const struct json *ignore, *mailboxes; /* arrays of names, or NULL */
	const struct trust *trust;             /* what its servers are judged by: see run_prepare() */
};

struct config {
	const char *path;   /* of the file, for messages */
	const char *folder; /* that it lies in: relative paths begin there */
	struct json *root;  /* owned */
	const char *destination, *start_url, *success_url, *failure_url, *ca_file, *oauth2_cache;
	unsigned total_processes, processes_per_account, timeout_sec, retries;
	unsigned header_batch, email_batch, compress;
	unsigned keep_duplicates, require_mount; /* 0 or 1 */
	bool secret, quick; /* the file holds a secret; there is no file, it is the quick form */
	const struct json *ignore, *mailboxes; /* arrays of names, or NULL */
	const struct json *oauth_list, *account_list;
	struct oauth *oauths;
	struct account *accounts;
	unsigned n_oauths, n_accounts, complaints;
	char where[80]; /* the path of the object at hand: "accounts[1]" */
};

enum config_place { IN_TOP, IN_ACCOUNT, IN_OAUTH };
enum config_kind {
	KEY_TEXT,   /* const char *; an empty one counts as none; a URL if it has 'words': how it begins */
	KEY_PATH,   /* the same, relative to the configuration's folder */
	KEY_WORD,   /* unsigned: the word's number in 'words' */
	KEY_OAUTH,  /* const struct oauth *, by its name */
	KEY_NUMBER, /* unsigned, from 'low' to 'high' */
	KEY_BOOL,   /* unsigned: 'low' if it is false, one more if it is true */
	KEY_ARRAY,  /* const struct json *, with 'low' to 'high' entries */
	KEY_NAMES,  /* the same, of names of mailboxes */
	KEY_PINS,   /* struct account: the same, of fingerprints, or one alone */
	KEY_OBJECT  /* const struct json * */
};
/* It has to be there; nobody may leave it out by a typo; the file is nobody else's business. */
enum { KEY_MUST = 1, KEY_GUARDS = 2, KEY_SECRET = 4 };

/* A row goes on behind it with flags, standard, low, high; what is left out is 0. */
#define AT(type, field) .at = offsetof(struct type, field)

static const struct config_key {
	enum config_place in;
	enum config_kind kind;
	const char *name;
	size_t at; /* where the value goes in struct config, account or oauth */
	unsigned flags, standard, low, high;
	const char *words;
} config_keys[] = {
	{ IN_TOP, KEY_PATH, "destination", AT(config, destination), KEY_MUST },
	{ IN_TOP, KEY_NUMBER, "total_processes", AT(config, total_processes), 0, 4, 1,
	  CONFIG_PROCESSES_MAX },
	{ IN_TOP, KEY_NUMBER, "processes_per_account", AT(config, processes_per_account), 0, 2, 1,
	  CONFIG_PROCESSES_MAX },
	{ IN_TOP, KEY_TEXT, "start_url", AT(config, start_url), .words = "http" },
	{ IN_TOP, KEY_TEXT, "success_url", AT(config, success_url), .words = "http" },
	{ IN_TOP, KEY_TEXT, "failure_url", AT(config, failure_url), .words = "http" },
	{ IN_TOP, KEY_NAMES, "mailboxes", AT(config, mailboxes), KEY_GUARDS, 0, 1, CONFIG_NAMES_MAX },
	{ IN_TOP, KEY_NAMES, "ignore_mailboxes", AT(config, ignore), KEY_GUARDS, 0, 0, CONFIG_NAMES_MAX },
	{ IN_TOP, KEY_NUMBER, "timeout", AT(config, timeout_sec), 0, 120, 1, 3600 },
	{ IN_TOP, KEY_NUMBER, "retries", AT(config, retries), 0, 6, 0, 100 },
	{ IN_TOP, KEY_NUMBER, "header_batch_size", AT(config, header_batch), 0, 500, 1, 100000 },
	{ IN_TOP, KEY_NUMBER, "email_batch_size", AT(config, email_batch), 0, 50, 1, 100000 },
	{ IN_TOP, KEY_BOOL, "keep_duplicates", AT(config, keep_duplicates) },
	{ IN_TOP, KEY_BOOL, "require_mount", AT(config, require_mount), KEY_GUARDS },
	{ IN_TOP, KEY_BOOL, "compress", AT(config, compress), .low = COMPRESS_OFF },
	{ IN_TOP, KEY_PATH, "ca_file", AT(config, ca_file), KEY_GUARDS },
	{ IN_TOP, KEY_PATH, "oauth2_cache", AT(config, oauth2_cache) },
	{ IN_TOP, KEY_OBJECT, "oauth2", AT(config, oauth_list) },
	{ IN_TOP, KEY_ARRAY, "accounts", AT(config, account_list), KEY_MUST, 0, 1, CONFIG_ACCOUNTS_MAX },

	{ IN_ACCOUNT, KEY_TEXT, "email", AT(account, email), KEY_MUST },
	{ IN_ACCOUNT, KEY_TEXT, "host", AT(account, host), KEY_MUST },
	{ IN_ACCOUNT, KEY_TEXT, "username", AT(account, username) },
	{ IN_ACCOUNT, KEY_TEXT, "password", AT(account, password), KEY_SECRET },
	{ IN_ACCOUNT, KEY_TEXT, "password_command", AT(account, password_command) },
	{ IN_ACCOUNT, KEY_OAUTH, "oauth2", AT(account, oauth) },
	{ IN_ACCOUNT, KEY_BOOL, "ssl", AT(account, ssl), KEY_GUARDS, 0, SSL_OFF },
	{ IN_ACCOUNT, KEY_NUMBER, "port", AT(account, port), 0, 0, 1, 65535 },
	{ IN_ACCOUNT, KEY_PATH, "ca_file", AT(account, ca_file), KEY_GUARDS },
	{ IN_ACCOUNT, KEY_PINS, "tls_fingerprint", AT(account, pins), KEY_GUARDS, 0, 1, CONFIG_PINS_MAX },
	{ IN_ACCOUNT, KEY_NUMBER, "processes_per_account", AT(account, processes), 0, 0, 1,
	  CONFIG_PROCESSES_MAX },
	{ IN_ACCOUNT, KEY_NAMES, "mailboxes", AT(account, mailboxes), KEY_GUARDS, 0, 1, CONFIG_NAMES_MAX },
	{ IN_ACCOUNT, KEY_NAMES, "ignore_mailboxes", AT(account, ignore), KEY_GUARDS, 0, 0,
	  CONFIG_NAMES_MAX },
	{ IN_ACCOUNT, KEY_BOOL, "compress", AT(account, compress), .low = COMPRESS_OFF },

	{ IN_OAUTH, KEY_WORD, "type", AT(oauth, type), KEY_MUST, .words = "o365, google, custom" },
	{ IN_OAUTH, KEY_WORD, "grant", AT(oauth, client_credentials), .words = "user, client_credentials" },
	{ IN_OAUTH, KEY_TEXT, "client_id", AT(oauth, client_id), KEY_MUST },
	{ IN_OAUTH, KEY_TEXT, "tenant_id", AT(oauth, tenant_id) },
	{ IN_OAUTH, KEY_TEXT, "client_secret", AT(oauth, client_secret), KEY_SECRET },
	{ IN_OAUTH, KEY_TEXT, "email", AT(oauth, email) },
	{ IN_OAUTH, KEY_TEXT, "auth_url", AT(oauth, auth_url), .words = "https" },
	{ IN_OAUTH, KEY_TEXT, "token_url", AT(oauth, token_url), .words = "https" },
	{ IN_OAUTH, KEY_TEXT, "device_url", AT(oauth, device_url), .words = "https" },
	{ IN_OAUTH, KEY_TEXT, "scope", AT(oauth, scope) },
	{ IN_OAUTH, KEY_TEXT, "redirect", AT(oauth, redirect), .words = "http" },
};

/* Tell what is wrong with the value 'at' of a key of the object at hand. */
PRINTF(5, 6)
static void config_say(struct config *c, enum log_level level, const struct json *at, const char *key,
		       const char *format, ...)
{
	char text[600], line[24] = "";
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (!c->quick)
		snprintf(line, sizeof line, ":%u:%u", at->line, at->column);
	log_write(level, "%s%s: %s%s%s%s%s", c->path, line, c->where,
		  c->where[0] != '\0' && *key != '\0' ? "." : "", key,
		  c->where[0] != '\0' || *key != '\0' ? ": " : "", text);
	c->complaints += level == LOG_ERROR;
}

#define config_bad(c, ...) config_say(c, LOG_ERROR, __VA_ARGS__)

/* Read a fingerprint: 64 hex digits, with or without colons between octets. Returns false if it is none. */
static bool config_pin(uint8_t pin[32], const char *p)
{
	unsigned i;

	for (i = 0; i < 32 && isxdigit((unsigned char)p[0]) && isxdigit((unsigned char)p[1]); i++) {
		char octet[3] = { p[0], p[1] };

		pin[i] = (uint8_t)strtoul(octet, NULL, 16);
		p += p[2] == ':' ? 3 : 2;
	}
	return i == 32 && *p == '\0';
}

/* What a mailbox may be there for (RFC 6154), whatever it is called. */
static const char special_uses[] = "\\All, \\Archive, \\Drafts, \\Junk, \\Sent, \\Trash";

/* Check a list, and each entry: an entry for a mailbox may be one of special_uses instead of its name. */
static void config_list(struct config *c, const struct json *list, const struct config_key *key, void *into)
{
	const struct json *entry = list->type == JSON_ARRAY ? list->child : list;
	unsigned n = list->type == JSON_ARRAY ? list->count : 1;
	struct account *account = into;
	char place[40];

	if (n < key->low || n > key->high) {
		config_bad(c, list, key->name, "found %u entries, expected %u to %u", n, key->low,
			   key->high);
		return;
	}
	for (unsigned i = 0; i < n && key->kind != KEY_ARRAY; entry = entry->next, i++) {
		snprintf(place, sizeof place, "%s[%u]", key->name, i);
		if (entry->type != JSON_STRING)
			config_bad(c, entry, place, "found %s, expected a string",
				   json_type_name(entry->type));
		else if (key->kind == KEY_PINS && !config_pin(account->pin[i], entry->text))
			config_bad(c, entry, place,
				   "found \"%.8s\", expected the certificate's SHA-256: 64 hex digits",
				   entry->text);
		else if (key->kind == KEY_NAMES && *entry->text == '\\' &&
			 word_place(special_uses, entry->text) < 0)
			config_bad(c, entry, place, "found \"%s\", expected a name or one of %s",
				   entry->text, special_uses);
	}
	if (key->kind == KEY_PINS)
		account->pins = n;
}

/* Return a path that does not depend on the folder in which the program was started. */
static const char *config_path(const struct config *c, const char *text)
{
	size_t n = strlen(c->folder) + strlen(text) + 2;
	char *path;

	if (text[0] == '/' || strcmp(c->folder, ".") == 0)
		return text;
	path = allocate(n);
	snprintf(path, n, "%s/%s", c->folder, text);
	return path;
}

/* Return the entry of "oauth2" with this name, or NULL. */
static const struct oauth *config_oauth(const struct config *c, const char *name)
{
	for (unsigned i = 0; i < c->n_oauths; i++)
		if (strcmp(c->oauths[i].name, name) == 0)
			return &c->oauths[i];
	return NULL;
}

/* Check and store what an object has for a key. */
static void config_store(struct config *c, const struct json *object, const struct config_key *key,
			 void *into)
{
	static const enum json_type types[] = {
		JSON_STRING, JSON_STRING, JSON_STRING, JSON_STRING, JSON_NUMBER,
		JSON_BOOL,   JSON_ARRAY,  JSON_ARRAY,  JSON_ARRAY,  JSON_OBJECT,
	};
	static const char *const expected[] = {
		"a URL that begins with ",
		"a path in full (~ is not expanded), not so long",
		"one of: ",
		"a name of the top-level \"oauth2\"",
		"a whole number ",
	};
	const struct json *value = json_get(object, key->name);
	const char *text = value != NULL ? value->text : NULL, *words = key->words, *quote;
	enum json_type type = types[key->kind];
	void *to = (char *)into + key->at;
	char range[40];
	bool bad = false;
	int word;

	if (key->kind == KEY_NUMBER) {
		*(unsigned *)to = key->standard;
		snprintf(range, sizeof range, "from %u to %u", key->low, key->high);
		words = range;
	}
	if (value == NULL || value->type == JSON_NULL ||
	    (type == JSON_STRING && value->type == JSON_STRING && *text == '\0')) {
		if (key->flags & KEY_MUST)
			config_bad(c, value != NULL ? value : object, key->name,
				   "missing or empty; expected %s", json_type_name(type));
		return;
	}
	if (value->type != type && (key->kind != KEY_PINS || value->type != JSON_STRING)) {
		config_bad(c, value, key->name, "found %s, expected %s", json_type_name(value->type),
			   json_type_name(type));
		return;
	}
	c->secret = c->secret || key->flags & KEY_SECRET;
	switch (key->kind) {
	case KEY_TEXT:
		*(const char **)to = text;
		if (key->flags & KEY_SECRET)
			secret_turn((char *)(uintptr_t)text, true);
		bad = words != NULL &&
		      (strncasecmp(text, words, strlen(words)) != 0 || strstr(text, "://") == NULL);
		break;
	case KEY_PATH:
		*(const char **)to = config_path(c, text);
		bad = *text == '~' || strlen(*(const char **)to) > PATH_MAX_OCTETS / 2;
		break;
	case KEY_WORD:
		word = word_place(words, text);
		bad = word < 0;
		*(unsigned *)to = bad ? 0 : (unsigned)word;
		break;
	case KEY_OAUTH:
		*(const struct oauth **)to = config_oauth(c, text);
		bad = config_oauth(c, text) == NULL;
		break;
	case KEY_NUMBER:
		bad = !value->integral || value->number < key->low || value->number > key->high;
		*(unsigned *)to = bad ? 0 : (unsigned)value->number;
		break;
	case KEY_BOOL:
		*(unsigned *)to = key->low + (unsigned)value->number;
		break;
	default:
		if (key->kind != KEY_PINS)
			*(const struct json **)to = value;
		if (key->kind != KEY_OBJECT)
			config_list(c, value, key, into);
	}
	quote = type == JSON_STRING ? "\"" : "";
	if (bad) /* of a URL no more is shown than how it begins */
		config_bad(c, value, key->name, "found %s%.*s%s, expected %s%s", quote,
			   key->kind == KEY_TEXT ? 8 : 300, text, quote, expected[key->kind],
			   words != NULL ? words : "");
}

/* Return true if so many letters, put in, taken out or changed, make one word of the other, in any case. */
static bool config_near(const char *word, const char *known, unsigned letters)
{
	for (; tolower((unsigned char)*word) == *known; word++, known++)
		if (*known == '\0')
			return true;
	return letters > 0 &&
	       ((*known != '\0' && config_near(word, known + 1, letters - 1)) ||
		(*word != '\0' && config_near(word + 1, known, letters - 1)) ||
		(*word != '\0' && *known != '\0' && config_near(word + 1, known + 1, letters - 1)));
}

/* Tell of a key that is not known at this place, and of one that may have been meant. */
static void config_unknown(struct config *c, const struct json *value, enum config_place in)
{
	static const char *const places[] = { "at the top level", "in an account",
					      "in an entry of \"oauth2\"" };
	const struct config_key *near = NULL;
	bool guards = false;
	unsigned best = 6;
	char hint[100] = "";

	for (unsigned letters = 0; letters < 3 && letters < strlen(value->key); letters++)
		for (size_t i = 0; i < sizeof config_keys / sizeof *config_keys; i++) {
			const struct config_key *key = &config_keys[i];
			unsigned far = 2 * letters + (key->in != in);

			if (key->in == in && strcmp(value->key, key->name) == 0)
				return;
			if (!config_near(value->key, key->name, letters) ||
			    (key->in != in && !(key->flags & KEY_GUARDS)))
				continue;
			guards = guards || key->flags & KEY_GUARDS;
			near = far < best ? key : near;
			best = far < best ? far : best;
		}
	if (near != NULL)
		snprintf(hint, sizeof hint, "; did you mean \"%s\" %s?", near->name, places[near->in]);
	config_say(c, guards ? LOG_ERROR : LOG_WARN, value, value->key, "unknown key%s", hint);
}

static void config_object(struct config *c, const struct json *object, enum config_place in, void *into)
{
	if (object->type != JSON_OBJECT) {
		config_bad(c, object, "", "found %s, expected an object", json_type_name(object->type));
		return;
	}
	for (size_t i = 0; i < sizeof config_keys / sizeof *config_keys; i++)
		if (config_keys[i].in == in)
			config_store(c, object, &config_keys[i], into);
	for (const struct json *value = object->child; value != NULL; value = value->next)
		config_unknown(c, value, in);
}

/* Check that a name can be a file's, or a part of its name, and can be shown as it is. */
static void config_file_name(struct config *c, const struct json *at, const char *key, const char *name)
{
	size_t n = strlen(name);
	char visible[1000];

	if (n == 0 || n > 200 || name[0] == '.' || name[n - 1] == '.' || name[n - 1] == ' ' ||
	    strpbrk(name, "/\\:*?\"<>|") != NULL ||
	    strcmp(log_visible(visible, sizeof visible, name, n), name) != 0)
		config_bad(c, at, key,
			   "\"%s\" cannot name a file; expected 1 to 200 octets that can be seen, "
			   "none of / \\ : * ? \" < > |, and no dot at either end",
			   name);
}

/* Take an entry of "oauth2". What it does not say of its provider is built in. */
static void config_sign_in(struct config *c, const struct json *object, struct oauth *o)
{
#define MICROSOFT "https://login.microsoftonline.com/"
	static const char *const standards[][5] = {
		[OAUTH_O365] = { MICROSOFT "%s/oauth2/v2.0/authorize", MICROSOFT "%s/oauth2/v2.0/token",
				 MICROSOFT "%s/oauth2/v2.0/devicecode",
				 "https://outlook.office.com/IMAP.AccessAsUser.All offline_access",
				 MICROSOFT "common/oauth2/nativeclient" },
		[OAUTH_GOOGLE] = { "https://accounts.google.com/o/oauth2/v2/auth",
				   "https://oauth2.googleapis.com/token", "", "https://mail.google.com/",
				   "http://127.0.0.1/" },
		[OAUTH_CUSTOM] = { "", "", "", "", "http://127.0.0.1/" },
	};
	const char **const own[] = { &o->auth_url, &o->token_url, &o->device_url, &o->scope, &o->redirect };

	snprintf(c->where, sizeof c->where, "oauth2.%.60s", object->key);
	o->name = object->key;
	config_object(c, object, IN_OAUTH, o);
	config_file_name(c, object, "", o->name);
	if (o->device_url == NULL && o->token_url != NULL) /* a cloud of its own */
		o->device_url = "";
	if (o->scope == NULL && o->type == OAUTH_O365 && o->client_credentials)
		o->scope = "https://outlook.office365.com/.default";
	for (int i = 0; i < 5; i++) {
		snprintf(o->standard[i], sizeof o->standard[i], standards[o->type][i],
			 o->tenant_id != NULL ? o->tenant_id : "common");
		if (*own[i] == NULL)
			*own[i] = o->standard[i];
	}
	if (*o->auth_url == '\0' || *o->token_url == '\0' || *o->scope == '\0')
		config_bad(c, object, "",
			   "expected \"auth_url\", \"token_url\" and \"scope\" with \"type\": \"custom\"");
	if (o->client_credentials && o->client_secret == NULL)
		config_bad(c, object, "",
			   "expected a \"client_secret\" with \"grant\": \"client_credentials\"");
}

static void config_account(struct config *c, const struct json *object, unsigned number)
{
	struct account *account = &c->accounts[number];
	const char *host;

	snprintf(c->where, sizeof c->where, "accounts[%u]", number);
	config_object(c, object, IN_ACCOUNT, account);
	if (account->username == NULL)
		account->username = account->email;
	if (account->ca_file == NULL)
		account->ca_file = c->ca_file;
	if (account->compress == COMPRESS_IF_SLOW)
		account->compress = c->compress;
	if (account->processes == 0 || account->processes > c->processes_per_account)
		account->processes = c->processes_per_account;
	if (account->ssl == SSL_UNSET && (account->oauth != NULL || account->port == 993))
		account->ssl = SSL_ON;
	account->never_clear = account->pins > 0;
	if (account->port == 0)
		account->port = account->ssl == SSL_ON ? 993 : 143;
	if ((account->password != NULL) + (account->password_command != NULL) + (account->oauth != NULL) >
	    1)
		config_bad(c, object, "",
			   "expected only one of \"password\", \"password_command\" and \"oauth2\"");
	host = account->host != NULL ? account->host : "";
	if (strpbrk(host, "/@[] \t") != NULL ||
	    (strchr(host, ':') != NULL && strchr(host, ':') == strrchr(host, ':')))
		config_bad(c, json_get(object, "host"), "host",
			   "found \"%s\", expected a name or an address alone; a port goes into \"port\", "
			   "imaps:// is \"ssl\": true",
			   host);
	if (account->email == NULL)
		return;
	config_file_name(c, json_get(object, "email"), "email", account->email);
	for (unsigned i = 0; i < number; i++)
		if (c->accounts[i].email != NULL && strcasecmp(c->accounts[i].email, account->email) == 0)
			config_bad(c, json_get(object, "email"), "email",
				   "\"%s\" has the same folder as accounts[%u].email", account->email, i);
}

/* Take a configuration's text. Returns 0, or -1 after each complaint has been printed. */
static int config_take(struct config *c, const char *text, size_t n)
{
	struct err e = { 0 };

	c->root = json_parse(text, n, &e);
	if (c->root == NULL) {
		log_error("%s:%s", c->path, e.text);
		return -1;
	}
	config_object(c, c->root, IN_TOP, c);
	if (c->oauth2_cache == NULL)
		c->oauth2_cache = c->folder;
	if (c->oauth_list != NULL) {
		c->oauths = allocate(c->oauth_list->count * sizeof *c->oauths);
		for (const struct json *at = c->oauth_list->child; at != NULL; at = at->next)
			config_sign_in(c, at, &c->oauths[c->n_oauths++]);
	}
	if (c->account_list != NULL && c->account_list->count <= CONFIG_ACCOUNTS_MAX) {
		c->accounts = allocate(c->account_list->count * sizeof *c->accounts);
		for (const struct json *at = c->account_list->child; at != NULL; at = at->next)
			config_account(c, at, c->n_accounts++);
	}
	return c->complaints > 0 ? -1 : 0;
}

/* Read a file, at most 'size' octets, and close it. Returns 0, or -1; the caller frees *t in any case. */
static int file_text(int fd, size_t size, struct string *t)
{
	ssize_t got;

	*t = string_new(size); /* of which the system gives what is used */
	while ((got = read(fd, t->at + t->n, size - t->n)) > 0)
		t->n += (size_t)got;
	close(fd);
	t->size = t->n;
	return (int)got;
}

/* Read and check the configuration file. Returns 0, or -1 after each complaint has been printed. */
static int config_load(struct config *c, const char *path)
{
	int result, fd = open(path, O_RDONLY | O_CLOEXEC);
	struct string t;
	struct stat st;

	*c = (struct config){ .path = path };
	c->folder = strchr(path, '/') != NULL ? dirname(copy_text(path)) : ".";
	if (fd < 0 || fstat(fd, &st) != 0 || file_text(fd, JSON_OCTETS_MAX + 1, &t) != 0) {
		log_error("%s: cannot read the configuration: %s%s", path, strerror(errno),
			  errno == ENOENT ? " (copy config.json.example and fill it in)" : "");
		return -1;
	}
	result = config_take(c, t.at, t.n);
	string_free(&t);
	if (c->secret && st.st_mode & (S_IRGRP | S_IROTH))
		log_warn("%s holds a secret and others may read it; try: chmod 600 %s", path, path);
	return result;
}

/* What the command line asks for. Flags are int, as getopt_long() sets them. */
enum run_mode {
	RUN_BACKUP, RUN_LIST, RUN_CHECK, RUN_VERIFY, RUN_RESTORE, RUN_EXPORT, RUN_EXPORT_ALL, RUN_AUTHORIZE
};

struct options {
	enum run_mode mode;
	int dry, json, online, yes, include_gone, paste;
	int gone;                /* RUN_EXPORT_ALL: only mails that left the server */
	const char *what;        /* RUN_EXPORT: a Message-ID; RUN_AUTHORIZE: a name in "oauth2" */
	const char *into;        /* RUN_RESTORE: the mailbox above all, or NULL */
	const char *config_path; /* NULL: the quick form, which has these: */
	const char *host, *port, *user, *to, *password_command;
	const struct json *accounts, *mailboxes; /* -a, -m (patterns): lists, or NULL */
};

/* Return the configuration that the quick form stands for; the caller frees it. */
static struct string quick_text(const struct options *o, const char *to, const char *command)
{
	const char *port = o->port != NULL ? o->port : "993";
	struct string t = string_new(QUICK_OCTETS_MAX);

	string_add(&t,
		   "{\n  \"destination\": %j,\n  \"accounts\": [{\n    \"email\": %j,\n    \"host\": %j,\n",
		   to, o->user, o->host);
	if (command != NULL)
		string_add(&t, "    \"password_command\": %j,\n", command);
	string_add(&t, "    \"port\": %s%s\n  }]\n}\n", port,
		   strtoul(port, NULL, 10) == 143 ? "" : ",\n    \"ssl\": true");
	return t;
}

/*
 * Make the configuration of a quick run. Its password is in the environment, where it is wiped, as others
 * could read it, else printed by the command, else asked. Returns 0, or -1 after each complaint.
 */
static int quick_load(struct config *c, const struct options *o)
{
	const char *password = getenv("IMAP_BACKUP_PASSWORD");
	const bool given = password != NULL && *password != '\0';
	struct string t = quick_text(o, o->to, given ? NULL : o->password_command);
	int result = -1;

	*c = (struct config){ .path = "command line", .folder = ".", .quick = true };
	if (strstr(t.at, "\\ufffd") != NULL) /* what json_escape() puts for it would be another folder */
		log_error("command line: found octets that are no UTF-8 in --to, --user, --host or "
			  "--password-command, expected UTF-8");
	else
		result = config_take(c, t.at, t.n);
	string_free(&t);
	if (result == 0) {
		c->accounts[0].never_clear = true;
		c->accounts[0].password = given ? secret_take(password) : NULL;
	}
	return result;
}

/* Show the configuration with which a quick run can go on. */
static void quick_hint(const struct options *o)
{
	char folder[PATH_MAX_OCTETS / 2] = "", to[PATH_MAX_OCTETS];
	struct string t;

	if (log_to.level < LOG_INFO || (*o->to != '/' && getcwd(folder, sizeof folder) == NULL))
		return;
	snprintf(to, sizeof to, "%s%s%s", folder, *o->to != '/' ? "/" : "", o->to);
	log_info("to go on with it, say every night, run imap_backup with a file that holds:");
	t = quick_text(o, to,
		       o->password_command != NULL ? o->password_command : "cat FILE-WITH-THE-PASSWORD");
	fputs(t.at, stderr);
	string_free(&t);
}

/* Read the line that a person types or pastes, unless a signal ends the run. Returns its octets. */
static size_t line_read(int fd, char *text, size_t size)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	ssize_t got = 1;
	size_t n = 0;

	*text = '\0';
	while (got > 0 && n < size - 1 && memchr(text, '\n', n) == NULL && !stop_asked) {
		if (poll(&ready, 1, 1000) <= 0)
			continue;
		got = read(fd, text + n, size - 1 - n);
		n += got > 0 ? (size_t)got : 0;
		text[n] = '\0';
	}
	text[stop_asked ? 0 : strcspn(text, "\n")] = '\0';
	return strlen(text);
}

/*
 * Ask for an account's password on the terminal, without echo. Returns the password, hidden,
 * or NULL if there is no terminal or no answer.
 */
static char *password_prompt(const char *email)
{
	int fd = open("/dev/tty", O_RDWR | O_NOCTTY | O_CLOEXEC);
	char text[1024], *password = NULL;
	struct termios shown, hidden;

	if (fd >= 0 && tcgetattr(fd, &shown) == 0) {
		hidden = shown;
		hidden.c_lflag = (hidden.c_lflag & ~(tcflag_t)ECHO) | ECHONL | ICANON;
		hidden.c_cc[VQUIT] = hidden.c_cc[VSUSP] = _POSIX_VDISABLE; /* nor may these leave it so */
		tcsetattr(fd, TCSAFLUSH, &hidden);
		dprintf(fd, "password of %s: ", email);
		if (line_read(fd, text, sizeof text) > 0)
			password = secret_take(text);
		else
			dprintf(fd, "\n"); /* what is said next is to begin a line */
		tcsetattr(fd, TCSAFLUSH, &shown);
		wipe(text, sizeof text);
	}
	if (fd >= 0)
		close(fd);
	return password;
}

/* Return true if a pattern with * and ? fits the text. A '?' stands for a whole UTF-8 character. */
static bool match(const char *pattern, const char *text)
{
	const char *star = NULL, *back = NULL;

	while (*text != '\0') {
		if (*pattern == '*') {
			star = ++pattern;
			back = text;
		} else if (*pattern == '?' || *pattern == *text) {
			text += *pattern++ == '?' ? text_step(text) : 1;
		} else if (star != NULL) {
			pattern = star;
			text = back += text_step(back);
		} else {
			return false;
		}
	}
	while (*pattern == '*')
		pattern++;
	return *pattern == '\0';
}

/* ======== inflate: decompresses what a server compresses ======== */

/*
 * Decodes RFC 1951. Knows octets and nothing else: it asks for compressed ones when it needs them, and
 * lends what they stand for from its window, uncopied. The window is a ring of 32 KB: a distance
 * reaches no further back, so what is overwritten is not needed any more. Whatever has been decoded is
 * given out before more is asked for, since the rest may never come. The compressed data decides about
 * no memory, and every call ends at the latest when the ring is full.
 */
enum {
	INFLATE_WINDOW = 32 << 10,
	INFLATE_FAST = 9,      /* a code of so many bits is found at one look */
	INFLATE_SYMBOLS = 288, /* of the largest code, the fixed one (3.2.6) */
	INFLATE_END = 256,     /* the symbol that ends a block; those above it are lengths */
	INFLATE_PAIR = 6       /* octets that surely hold a length with its distance (48 bits) */
};

struct huffman {                          /* a code (3.2.2) */
	uint16_t fast[1 << INFLATE_FAST]; /* by the next bits: symbol << 4 | its bits; 0: has more */
	uint16_t count[16];               /* how many symbols have so many bits */
	uint16_t symbol[INFLATE_SYMBOLS]; /* by the number of bits, then by value */
};

struct bits {       /* octets that have come, and are not looked at yet */
	size_t all; /* the next bit is the lowest, and 0 follows the last */
	unsigned n; /* of a register: 64 would be slow where it has 32 */
};

struct inflate {
	int (*ask)(struct inflate *f); /* sets 'in' and 'end' to at least one octet; or returns -1 */
	void *context;                 /* of ask() */
	const uint8_t *in, *end;       /* what is not looked at yet */
	struct bits bits;              /* what is */
	const char *wrong;             /* with the compressed data, in words; sticks */
	enum { INFLATE_BLOCK, INFLATE_STORED, INFLATE_DATA } state;
	bool last;         /* the block read now, or just read, is */
	bool full;         /* the ring has been written round */
	unsigned at;       /* where in the ring the next octet belongs */
	unsigned left;     /* octets of the stored block, or of the match in hand */
	unsigned distance; /* of that match */
	uint8_t lengths[INFLATE_SYMBOLS + 32];
	struct huffman literal, far;
	uint8_t window[INFLATE_WINDOW];
};

/*
 * Make the tables of a code. Returns 0; 1 where bits are left without a meaning, as is allowed for a
 * code of no symbol, or of one with one bit (3.2.7); -1 if no code has these lengths.
 */
static int huffman_make(struct huffman *h, const uint8_t *lengths, unsigned n)
{
	uint16_t next[16] = { 0 }, place[16] = { 0 };
	int left = 1 << 15; /* of the codes with 15 bits */

	memset(h, 0, sizeof *h);
	for (unsigned i = 0; i < n; i++)
		h->count[lengths[i]]++;
	n -= h->count[0];
	h->count[0] = 0;
	for (unsigned k = 1; k < 16; k++) {
		left -= h->count[k] << (15 - k);
		next[k] = (uint16_t)((next[k - 1] + h->count[k - 1]) << 1);
		place[k] = (uint16_t)(place[k - 1] + h->count[k - 1]);
	}
	if (left < 0 || (left > 0 && n != h->count[1]))
		return -1;
	for (unsigned i = 0; n > 0; i++) {
		unsigned length = lengths[i], code, mirrored = 0;

		if (length == 0)
			continue;
		n--;
		h->symbol[place[length]++] = (uint16_t)i;
		code = next[length]++;
		for (unsigned k = 0; k < length; k++) /* a code comes highest bit first, all else lowest */
			mirrored |= (code >> k & 1) << (length - 1 - k);
		for (; length <= INFLATE_FAST && mirrored < 1 << INFLATE_FAST; mirrored += 1u << length)
			h->fast[mirrored] = (uint16_t)(i << 4 | length);
	}
	for (unsigned i = 0; left > 0 && i < 1 << INFLATE_FAST; i++)
		if (h->fast[i] == 0)
			h->fast[i] = 0xFFF1; /* a symbol outside of every range */
	return left > 0;
}

/* A symbol whose code is longer. This ends, for a code that leaves no bits without a meaning. */
static unsigned huffman_find_long(const struct huffman *h, size_t bits, unsigned *length)
{
	unsigned code = 0, first = 0, place = 0;

	for (*length = 1;; ++*length, bits >>= 1) {
		unsigned count = h->count[*length];

		code = code << 1 | (bits & 1);
		if (code - first < count)
			return h->symbol[place + code - first];
		place += count;
		first = (first + count) << 1;
	}
}

/*
 * Take n bits, at most 25, or a symbol. 'b' is f's register, or the caller's own copy of it. No more octets
 * are asked for than it takes. Both return false if they cannot be had. Inline also where size counts
 * (-Os): it is a quarter of the time on a MIPS.
 */
static inline bool __attribute__((always_inline))
inflate_bits(struct inflate *f, struct bits *b, unsigned n, unsigned *value)
{
	for (; b->n < n; b->n += 8) {
		if (f->in == f->end && f->ask(f) != 0)
			return false;
		b->all |= (size_t)*f->in++ << b->n;
	}
	*value = (unsigned)b->all & ((1u << n) - 1);
	b->all >>= n;
	b->n -= n;
	return true;
}

static inline bool __attribute__((always_inline))
inflate_symbol(struct inflate *f, struct bits *b, const struct huffman *h, unsigned *symbol)
{
	unsigned found, length;

	for (;;) {
		for (; b->n < 25 && f->in < f->end; b->n += 8)
			b->all |= (size_t)*f->in++ << b->n;
		found = h->fast[b->all & ((1 << INFLATE_FAST) - 1)];
		length = found & 15;
		*symbol = found != 0 ? found >> 4 : huffman_find_long(h, b->all, &length);
		if (length <= b->n) /* else it is another one */
			break;
		if (f->ask(f) != 0)
			return false;
	}
	b->all >>= length;
	b->n -= length;
	return true;
}

static bool inflate_take(struct inflate *f, unsigned n, unsigned *value)
{
	return inflate_bits(f, &f->bits, n, value);
}

static bool inflate_fail(struct inflate *f, const char *wrong)
{
	f->wrong = wrong;
	return false;
}

/* One step for each state. Returns false where it ends: f->wrong says why, or no input can be had. */

/* Read the lengths of a dynamic block's codes, and make these (3.2.7). */
static bool inflate_codes(struct inflate *f)
{
	static const uint8_t order[] = { 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15 };
	static const struct {
		uint8_t bits, least;
	} repeat[] = { { 2, 3 }, { 3, 3 }, { 7, 11 } };
	unsigned literals, distances, orders, symbol, v;

	if (!inflate_take(f, 14, &v))
		return false;
	literals = (v & 31) + 257;
	distances = (v >> 5 & 31) + 1;
	orders = (v >> 10) + 4;
	if (literals > 286 || distances > 30)
		return inflate_fail(f, "a block with more symbols than there are");
	memset(f->lengths, 0, sizeof f->lengths);
	for (unsigned i = 0; i < orders; i++) { /* of the code in which the other lengths are written */
		if (!inflate_take(f, 3, &v))
			return false;
		f->lengths[order[i]] = (uint8_t)v;
	}
	if (huffman_make(&f->far, f->lengths, sizeof order) != 0)
		return inflate_fail(f, "code lengths without a code");
	for (unsigned known = 0, times; known < literals + distances; known += times) {
		times = 1;
		if (!inflate_symbol(f, &f->bits, &f->far, &symbol))
			return false;
		if (symbol >= 16) {
			if (!inflate_take(f, repeat[symbol - 16].bits, &v))
				return false;
			times = repeat[symbol - 16].least + v;
			if ((symbol == 16 && known == 0) || known + times > literals + distances)
				return inflate_fail(f, "a length repeated too early or too often");
			symbol = symbol == 16 ? f->lengths[known - 1] : 0;
		}
		memset(f->lengths + known, (int)symbol, times);
	}
	if (f->lengths[INFLATE_END] == 0 || huffman_make(&f->literal, f->lengths, literals) < 0 ||
	    huffman_make(&f->far, f->lengths + literals, distances) < 0)
		return inflate_fail(f, "lengths without a code");
	f->state = INFLATE_DATA;
	return true;
}

static bool inflate_block(struct inflate *f)
{
	unsigned v, check;

	if (f->last) /* the other bits of its last octet mean nothing */
		return inflate_take(f, f->bits.n % 8, &v) && inflate_take(f, 8, &v) &&
		       inflate_fail(f, "octets after its end");
	if (!inflate_take(f, 3, &v))
		return false;
	f->last = v & 1;
	switch (v >> 1) {
	case 0:
		if (!inflate_take(f, f->bits.n % 8, &v) || !inflate_take(f, 16, &v) ||
		    !inflate_take(f, 16, &check))
			return false;
		f->left = v;
		f->state = INFLATE_STORED;
		return v == (check ^ 0xFFFF) || inflate_fail(f, "a stored block whose length is in doubt");
	case 1:
		for (unsigned i = 0; i < INFLATE_SYMBOLS; i++)
			f->lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
		memset(f->lengths + INFLATE_SYMBOLS, 5, 32);
		huffman_make(&f->literal, f->lengths, INFLATE_SYMBOLS);
		huffman_make(&f->far, f->lengths + INFLATE_SYMBOLS, 32);
		f->state = INFLATE_DATA;
		return true;
	case 2:
		return inflate_codes(f);
	default:
		return inflate_fail(f, "a block of no known type");
	}
}

static bool inflate_stored(struct inflate *f)
{
	unsigned v;

	for (bool any = false; f->left > 0; any = true) {
		if (f->at == INFLATE_WINDOW || (any && f->bits.n == 0 && f->in == f->end))
			return true; /* it goes out first */
		if (!inflate_take(f, 8, &v))
			return false;
		f->window[f->at++] = (uint8_t)v;
		f->left--;
	}
	f->state = INFLATE_BLOCK;
	return true;
}

/* The part of a match that fits into the ring's end: it may overlap itself. Returns its octets. */
static unsigned inflate_match(uint8_t *window, unsigned at, unsigned distance, unsigned n)
{
	unsigned from = (at - distance) % INFLATE_WINDOW;

	n = n < INFLATE_WINDOW - at ? n : INFLATE_WINDOW - at;
	n = n < INFLATE_WINDOW - from ? n : INFLATE_WINDOW - from;
	for (unsigned i = 0; i < n; i++)
		window[at + i] = window[from + i];
	return n;
}

/*
 * Where the values of a length or distance begin, counted from its least one, and how many bits behind
 * the symbol tell which it is (3.2.5): from the second group of symbols on, one more for each group.
 */
static inline unsigned inflate_base(unsigned symbol, unsigned log_group, unsigned *more)
{
	unsigned group = 1u << log_group;

	*more = symbol < 2 * group ? 0 : (symbol >> log_group) - 1;
	return *more == 0 ? symbol : (group | (symbol & (group - 1))) << *more;
}

/* The rest of a match whose length begins with this symbol (3.2.5). */
static inline bool __attribute__((always_inline))
inflate_pair(struct inflate *f, struct bits *b, unsigned symbol, unsigned *n, unsigned *distance)
{
	unsigned more, v;

	if (symbol > 285)
		return inflate_fail(f, "a symbol without a meaning");
	*n = inflate_base(symbol - INFLATE_END - 1, 2, &more) + 3;
	if (symbol == 285) { /* the longest has a symbol for itself */
		*n = 258;
		more = 0;
	}
	if (!inflate_bits(f, b, more, &v) || !inflate_symbol(f, b, &f->far, &symbol))
		return false;
	*n += v;
	if (symbol > 29)
		return inflate_fail(f, "a symbol without a meaning");
	*distance = inflate_base(symbol, 1, &more) + 1;
	if (!inflate_bits(f, b, more, &v))
		return false;
	*distance += v;
	return true;
}

/* Literals and matches: here the time goes, so what is in hand is kept in variables of its own. */
static bool inflate_data(struct inflate *f)
{
	struct bits b = f->bits;
	unsigned at = f->at, left = f->left, distance = f->distance, symbol, n;
	bool on = true;

	/* Near the input's end, what is decoded goes out first: from there on more may be asked for. */
	while (at < INFLATE_WINDOW && (f->end - f->in >= INFLATE_PAIR || at == f->at)) {
		if (left == 0) {
			on = inflate_symbol(f, &b, &f->literal, &symbol);
			if (on && symbol < INFLATE_END) {
				f->window[at++] = (uint8_t)symbol;
				continue;
			}
			if (on && symbol == INFLATE_END) {
				f->state = INFLATE_BLOCK;
				break;
			}
			on = on && inflate_pair(f, &b, symbol, &left, &distance);
			if (on && distance > (f->full ? INFLATE_WINDOW : at))
				on = inflate_fail(f, "a distance to before its beginning");
			if (!on)
				break;
		}
		n = inflate_match(f->window, at, distance, left);
		at += n;
		left -= n;
	}
	f->bits = b;
	f->at = at;
	f->left = left;
	f->distance = distance;
	return on;
}

/*
 * Decode until there is something to give out. *out and *n receive it: at least one octet, lent until
 * the next call. Returns 0, or -1 if f->wrong says what is wrong, or else ask() had nothing.
 */
static int inflate_run(struct inflate *f, const uint8_t **out, size_t *n)
{
	static bool (*const steps[])(struct inflate *) = { inflate_block, inflate_stored, inflate_data };
	unsigned from;

	if (f->at == INFLATE_WINDOW) {
		f->full = true;
		f->at = 0;
	}
	from = f->at;
	while (f->at == from && f->wrong == NULL && steps[f->state](f)) /* a step for each state */
		;
	*out = f->window + from;
	*n = f->at - from;
	return f->at > from ? 0 : -1;
}

/* ======== certificates: decides whether a server is the one that was meant ======== */

/*
 * Judges the chain of certificates that a server sends (RFC 5280 6.1), as an X.509 engine for BearSSL.
 * BearSSL's own wants a chain in order and knows no name constraints, so it only takes keys and dates
 * out of certificates here, and checks signatures. The chain is kept, as far as CHAIN_OCTETS go, and
 * its issuers are looked for by name; what does not belong to it is of no importance. A host is found in
 * subjectAltName alone. Revocation and policies are not looked at.
 */
struct der { /* octets in DER: the inside of an element, or elements in a row; borrowed */
	const uint8_t *at, *end;
};

enum { DER_INTEGER = 0x02, DER_BITS = 0x03, DER_OCTETS = 0x04, DER_OID = 0x06, DER_SEQUENCE = 0x30 };
enum { NAME_DNS = 0x82, NAME_DIRECTORY = 0xA4, NAME_ADDRESS = 0x87 }; /* tags of a GeneralName */
enum { X_USAGE = 15, X_NAMES = 17, X_BASIC = 19, X_CONSTRAINTS = 30, X_PURPOSES = 37, X_END = 64 };
enum { NAME_INSIDE, NAME_OUTSIDE, NAME_UNCLEAR }; /* what comes of judging names; both: 3 */

#define CERT_1970 INT64_C(719528) /* BearSSL's number of the day: it counts from year 0 */

struct cert {
	const struct cert *below; /* borrowed: what it has signed; NULL: it is the server's own */
	struct der whole, tbs, issuer, subject, signature;
	struct der extension[X_END]; /* the inside of 2.5.29.N; 'at' is NULL: it has none */
	bool unknown;                /* it has a critical extension that we do not know */
	bool old;                    /* it is of version 1, which has no extensions */
	const br_x509_pkey *key;     /* in 'decoder', once that has run; NULL: BearSSL cannot use it */
	br_x509_decoder_context decoder;
};

struct trust {                      /* what a server's certificate is checked against */
	struct der anchors;         /* certificates in a row; owned */
	const char *named;          /* "ca_file" of the config, NULL: the system's */
	char path[PATH_MAX_OCTETS]; /* of the CA bundle; "": there is none */
	struct err err;             /* why it could not be loaded */
};

struct verifier {
	const br_x509_class *vtable;
	const struct trust *trust;     /* borrowed; NULL: none but the pins */
	const struct account *account; /* borrowed: its pins; NULL: it has none */
	char host[256];
	uint8_t address[16];
	unsigned tag;         /* of what is to stand in the certificate: NAME_DNS or NAME_ADDRESS ... */
	struct der name;      /* ... and it, in 'host' or 'address' */
	struct cert leaf;     /* the server's own certificate */
	char fingerprint[65]; /* its SHA-256 */
	unsigned usages;      /* of its key, as BearSSL wants to know them */
	unsigned signatures;  /* that have been checked */
	struct err err;       /* what is wrong with the chain */
	struct der chain;     /* what came, in 'octets' */
	uint8_t octets[CHAIN_OCTETS];
};

/* Take the next element out of *in if it has this tag; 0: any. Returns false if there is none. */
static bool der_next(struct der *in, unsigned tag, struct der *value)
{
	const uint8_t *p = in->at;
	size_t n;

	if (in->end - p < 2 || (tag != 0 && *p != tag))
		return false;
	n = p[1];
	p += 2;
	if (n >= 0x80) {
		unsigned lengths = n & 0x7F;

		if (lengths < 1 || lengths > 3 || in->end - p < (ptrdiff_t)lengths)
			return false;
		for (n = 0; lengths > 0; lengths--)
			n = n << 8 | *p++;
	}
	if (n > (size_t)(in->end - p))
		return false;
	in->at = p + n;
	*value = (struct der){ p, p + n }; /* which may be *in */
	return true;
}

static size_t der_octets(struct der v)
{
	return (size_t)(v.end - v.at);
}

/* Return octet i of a value, 0 if it has not so many. */
static unsigned der_octet(struct der v, size_t i)
{
	return i < der_octets(v) ? v.at[i] : 0;
}

static bool der_same(struct der a, struct der b)
{
	return der_octets(a) == der_octets(b) && memcmp(a.at, b.at, der_octets(a)) == 0;
}

/*
 * Read the next certificate of a list. Returns false at the list's end, or if it is none in form; what
 * is not looked at here, br_x509_decoder looks at.
 */
static bool cert_next(struct der *list, struct cert *c)
{
	/* Of 2.5.29.N these N are known, or of no importance. */
	static const uint8_t known[] = { 9, 14, 15, 17, 18, 19, 30, 31, 32, 33, 35, 36, 37, 46, 54 };
	struct der all, tbs, extensions = { 0 }, extension, oid, algorithm, v;

	memset(c, 0, sizeof *c);
	c->whole.at = list->at;
	if (!der_next(list, DER_SEQUENCE, &all))
		return false;
	c->whole.end = list->at;
	c->tbs.at = all.at;
	if (!der_next(&all, DER_SEQUENCE, &tbs))
		return false;
	c->tbs.end = all.at;
	c->old = !der_next(&tbs, 0xA0, &v);
	if (!der_next(&all, DER_SEQUENCE, &algorithm) || !der_next(&all, DER_BITS, &c->signature) ||
	    !der_next(&tbs, DER_INTEGER, &v) || !der_next(&tbs, DER_SEQUENCE, &v) ||
	    !der_same(algorithm, v) || !der_next(&tbs, DER_SEQUENCE, &c->issuer) ||
	    !der_next(&tbs, DER_SEQUENCE, &v) || !der_next(&tbs, DER_SEQUENCE, &c->subject) ||
	    !der_next(&tbs, DER_SEQUENCE, &v))
		return false;
	der_next(&tbs, 0x81, &v); /* unique identifiers */
	der_next(&tbs, 0x82, &v);
	if (der_next(&tbs, 0xA3, &v) && !der_next(&v, DER_SEQUENCE, &extensions))
		return false;
	while (der_octets(extensions) > 0) {
		bool critical;
		unsigned n;

		if (!der_next(&extensions, DER_SEQUENCE, &extension) ||
		    !der_next(&extension, DER_OID, &oid))
			return false;
		critical = der_next(&extension, 0x01, &v) && der_octet(v, 0) != 0;
		n = der_octets(oid) == 3 && memcmp(oid.at, "\x55\x1D", 2) == 0 ? oid.at[2] : 0;
		if (memchr(known, (int)n, sizeof known) == NULL)
			c->unknown = c->unknown || critical;
		else if (c->extension[n].at != NULL || !der_next(&extension, DER_OCTETS, &v) ||
			 !der_next(&v, 0, &c->extension[n]))
			return false;
	}
	return true;
}

/* Decode key, dates and what it is signed with. Returns false if BearSSL cannot use the key. */
static bool cert_decode(struct cert *c)
{
	br_x509_decoder_init(&c->decoder, NULL, NULL);
	br_x509_decoder_push(&c->decoder, c->whole.at, der_octets(c->whole));
	c->key = br_x509_decoder_get_pkey(&c->decoder);
	return c->key != NULL;
}

/* Write a distinguished name's values for a person, as far as they fit. Returns out. */
static char *cert_name(struct der name, char *out, size_t size)
{
	struct der set, pair, value;
	char text[100];
	size_t n = 0;

	for (*out = '\0'; der_next(&name, 0x31, &set) && der_next(&set, DER_SEQUENCE, &pair) &&
			  der_next(&pair, DER_OID, &value) && der_next(&pair, 0, &value);
	     n = strlen(out))
		snprintf(out + n, size - n, "%s%s", n > 0 ? ", " : "",
			 log_visible(text, sizeof text, (const char *)value.at, der_octets(value)));
	return out;
}

/* A day, counted from 1970, as a date. */
static const char *cert_date(char out[16], int64_t days)
{
	time_t sec = (time_t)(days * 86400);
	struct tm tm;

	if (gmtime_r(&sec, &tm) == NULL || strftime(out, 16, "%Y-%m-%d", &tm) == 0)
		strcpy(out, "an odd date");
	return out;
}

/* Return true if the signature on a certificate, which is decoded, was made with this key. */
static bool cert_signed(const struct cert *c, const br_x509_pkey *key)
{
	static const struct {
		const br_hash_class *class;
		const unsigned char *oid;
	} hashes[] = { { &br_sha256_vtable, BR_HASH_OID_SHA256 },
		       { &br_sha384_vtable, BR_HASH_OID_SHA384 },
		       { &br_sha512_vtable, BR_HASH_OID_SHA512 } };
	const int hash = c->decoder.signer_hash_id - br_sha256_ID;
	const unsigned char *signature = c->signature.at + 1; /* behind the number of unused bits */
	const size_t m = der_octets(c->signature) - 1;
	br_hash_compat_context context;
	uint8_t sum[64], signed_sum[64];
	size_t n;

	if (hash < 0 || hash > 2 || c->decoder.signer_key_type != key->key_type ||
	    der_octets(c->signature) == 0)
		return false;
	hashes[hash].class->init(&context.vtable);
	context.vtable->update(&context.vtable, c->tbs.at, der_octets(c->tbs));
	context.vtable->out(&context.vtable, sum);
	n = context.vtable->desc >> BR_HASHDESC_OUT_OFF & BR_HASHDESC_OUT_MASK;
	if (key->key_type == BR_KEYTYPE_EC)
		return br_ecdsa_vrfy_asn1_get_default()(br_ec_get_default(), sum, n, &key->key.ec,
							signature, m) == 1;
	return br_rsa_pkcs1_vrfy_get_default()(signature, m, hashes[hash].oid, n, &key->key.rsa,
					       signed_sum) == 1 &&
	       memcmp(sum, signed_sum, n) == 0;
}

/* Return true if a name of a certificate stands for the host: "*" for its first part, if two follow. */
static bool name_is_host(const struct verifier *v, unsigned tag, struct der name)
{
	struct der host = v->name;

	if (tag == NAME_DNS && der_octets(name) > 2 && memcmp(name.at, "*.", 2) == 0 &&
	    memchr(name.at + 2, '.', der_octets(name) - 2) != NULL) {
		name.at++;
		while (host.at < host.end && *host.at != '.')
			host.at++;
	}
	if (tag != v->tag || der_octets(name) != der_octets(host) || der_octets(host) == 0)
		return false;
	return tag == NAME_DNS
		       ? strncasecmp((const char *)name.at, (const char *)host.at, der_octets(host)) == 0
		       : memcmp(name.at, host.at, der_octets(host)) == 0;
}

/* Judge whether the server's certificate is for the host. */
static int host_judge(const struct verifier *v, struct err *e)
{
	struct der names = v->leaf.extension[X_NAMES], name;
	char text[91] = "";

	for (unsigned tag; (tag = der_octet(names, 0)) != 0 && der_next(&names, tag, &name);) {
		if (name_is_host(v, tag, name))
			return 0;
		if (tag == NAME_DNS && *text == '\0')
			snprintf(text, sizeof text, "%.*s", (int)der_octets(name), (const char *)name.at);
	}
	return err_set(e, E_ACCOUNT, "the certificate is for %s, not for %.90s",
		       *text != '\0' ? text : "another name", v->host);
}

/* Return true if a name lies within the base of a name constraint. */
static bool name_in_base(unsigned tag, struct der name, struct der base)
{
	size_t n = der_octets(name), m = der_octets(base);

	if (tag == NAME_DNS) /* the base, or with parts in front; with a dot in front only the latter */
		return n >= m && strncasecmp((const char *)name.end - m, (const char *)base.at, m) == 0 &&
		       (n == m || m == 0 || *base.at == '.' || name.at[n - m - 1] == '.');
	if (tag == NAME_DIRECTORY)
		return der_next(&base, DER_SEQUENCE, &base) && n >= (m = der_octets(base)) &&
		       memcmp(name.at, base.at, m) == 0;
	for (size_t i = 0; i < n; i++) /* of an address; the base has a mask behind it */
		if (((name.at[i] ^ der_octet(base, i)) & der_octet(base, n + i)) != 0)
			return false;
	return m == 2 * n;
}

/* Judge one name by the name constraints of an issuer (RFC 5280 4.2.1.10); it may have none. */
static int name_judge(struct der constraints, unsigned tag, struct der name)
{
	bool limited = false, permitted = false;
	struct der trees, tree, base;

	for (unsigned list = 0xA0; list <= 0xA1; list++) { /* permitted, excluded */
		if (!der_next(&constraints, list, &trees))
			continue;
		while (der_octets(trees) > 0) {
			bool inside;

			if (!der_next(&trees, DER_SEQUENCE, &tree))
				return NAME_UNCLEAR;
			if (der_octet(tree, 0) != tag)
				continue;
			/* A minimum may follow; a directory that is excluded may be spelt otherwise. */
			if (!der_next(&tree, tag, &base) || der_octets(tree) > 0 ||
			    !(tag == NAME_DNS || (tag == NAME_DIRECTORY && list == 0xA0) ||
			      (tag == NAME_ADDRESS && (der_octets(base) == 8 || der_octets(base) == 32))))
				return NAME_UNCLEAR;
			inside = name_in_base(tag, name, base);
			if (list == 0xA1 && inside)
				return NAME_OUTSIDE;
			limited = limited || list == 0xA0;
			permitted = permitted || inside;
		}
	}
	if (der_octets(constraints) > 0)
		return NAME_UNCLEAR;
	return limited && !permitted ? NAME_OUTSIDE : NAME_INSIDE;
}

/* Judge all names of a certificate by what an issuer above it may certify. */
static int names_judge(struct der constraints, const struct cert *c)
{
	struct der names = c->extension[X_NAMES], name;
	int result = der_octets(c->subject) > 0 ? name_judge(constraints, NAME_DIRECTORY, c->subject)
						: NAME_INSIDE;

	for (unsigned tag; (tag = der_octet(names, 0)) != 0 && der_next(&names, tag, &name);)
		result |= name_judge(constraints, tag, name);
	return der_octets(names) > 0 ? NAME_UNCLEAR : result;
}

/* Judge an issuer by what it may sign, with regard to every certificate below it. */
static int issuer_judge(const struct verifier *v, const struct cert *c, bool anchor, struct err *e)
{
	struct der usage = c->extension[X_USAGE], basic = c->extension[X_BASIC], value;
	bool ca = basic.at == NULL ? anchor && c->old
				   : der_next(&basic, 0x01, &value) && der_octet(value, 0) != 0;
	int place = name_judge(c->extension[X_CONSTRAINTS], v->tag, v->name); /* "*" may stand for it */
	unsigned all = 0, between = 0;
	char name[100];

	for (const struct cert *b = c->below; b != NULL; b = b->below) {
		all++;
		if (b->below != NULL && der_same(b->subject, b->issuer))
			continue; /* the same CA with another key (6.1.4) */
		between += b->below != NULL;
		place |= names_judge(c->extension[X_CONSTRAINTS], b);
	}
	if (all > CHAIN_DEPTH)
		return err_set(e, E_ACCOUNT, "the certificate has more than %d issuers", CHAIN_DEPTH);
	if ((usage.at != NULL && (der_octet(usage, 1) & 0x04) == 0) || !ca ||
	    (der_next(&basic, DER_INTEGER, &value) &&
	     (der_octets(value) != 1 || *value.at < between || *value.at > 127)))
		return err_set(e, E_ACCOUNT, "an issuer's certificate is no CA's, or not for this");
	if (place != NAME_INSIDE)
		return err_set(e, E_ACCOUNT, "%s may %s (name constraints)",
			       cert_name(c->subject, name, sizeof name),
			       place == NAME_OUTSIDE ? "not certify this name"
						     : "only certify what cannot be judged");
	return 0;
}

/* Judge what holds for every certificate of a chain, which has been decoded. */
static int cert_judge(const struct cert *c, int64_t now_sec, struct err *e)
{
	const char *whose = c->below == NULL ? "the certificate" : "an issuer's certificate";
	const br_x509_decoder_context *d = &c->decoder;
	int64_t now = now_sec + CERT_1970 * 86400; /* as BearSSL counts */
	bool early = now < (int64_t)d->notbefore_days * 86400 + d->notbefore_seconds;
	struct der purposes = c->extension[X_PURPOSES], purpose;
	bool serves = purposes.at == NULL;
	char date[16], today[16];

	while (der_next(&purposes, DER_OID, &purpose)) /* serverAuth, or any */
		serves = serves ||
			 (der_octets(purpose) == 8 && memcmp(purpose.at, "\x2B\6\1\5\5\7\3\1", 8) == 0) ||
			 (der_octets(purpose) == 4 && memcmp(purpose.at, "\x55\x1D\x25\0", 4) == 0);
	if (c->key->key_type == BR_KEYTYPE_RSA && c->key->key.rsa.nlen < 256)
		return err_set(e, E_ACCOUNT, "%s has an RSA key of less than 2048 bits", whose);
	if (c->unknown)
		return err_set(e, E_ACCOUNT, "%s has a restriction that cannot be judged here", whose);
	if (!serves)
		return err_set(e, E_ACCOUNT, "%s is not meant for servers (its extended key usage)", whose);
	if (early || now > (int64_t)d->notafter_days * 86400 + d->notafter_seconds)
		return err_set(e, E_ACCOUNT, "%s %s %s, and this device's clock says %s", whose,
			       early ? "is not valid before" : "expired on",
			       cert_date(date, (early ? d->notbefore_days : d->notafter_days) - CERT_1970),
			       cert_date(today, now_sec / 86400));
	return 0;
}

/*
 * Judge a certificate, and look for a way from it to an anchor by issuers that are well. Where several have
 * an issuer's name and key (certificates that were renewed, or signed by two CAs), every way is tried,
 * until CHAIN_SIGNATURES have been checked.
 */
static int chain_judge(struct verifier *v, const struct cert *c, bool anchor, int64_t now_sec,
		       struct err *e)
{
	struct der anchors = v->trust->anchors, chain = v->chain;
	struct cert issuer;
	char name[100];

	if ((c->below != NULL && issuer_judge(v, c, anchor, e) != 0) || cert_judge(c, now_sec, e) != 0)
		return -1;
	if (anchor)
		return 0;
	while ((anchor = cert_next(&anchors, &issuer)) || cert_next(&chain, &issuer)) {
		bool itself = der_same(issuer.whole, c->whole);

		issuer.below = c;
		if (itself && anchor)
			return 0;
		if (!itself && der_same(issuer.subject, c->issuer) && v->signatures < CHAIN_SIGNATURES &&
		    cert_decode(&issuer) && ++v->signatures && cert_signed(c, issuer.key) &&
		    chain_judge(v, &issuer, anchor, now_sec, e) == 0)
			return 0;
	}
	if (c->decoder.signer_hash_id < br_sha256_ID)
		return err_set(e, E_ACCOUNT,
			       "the certificate has a signature that is weak, or unknown to BearSSL "
			       "(SHA-1, RSA-PSS, Ed25519)");
	return err_set(e, E_ACCOUNT, "the certificate is signed by nobody whom the CA bundle knows (%s%s)",
		       cert_name(c->issuer, name, sizeof name),
		       der_same(c->subject, c->issuer) ? ""
						       : ", whose certificate the server does not send");
}

/*
 * Judge what has come, unless the server's certificate is pinned. A clock that is wrong follows a
 * certificate that is well otherwise.
 */
static int verifier_judge(struct verifier *v, struct err *e)
{
	const unsigned pins = v->account != NULL ? v->account->pins : 0;
	struct der list = v->chain, usage;
	struct err other = { 0 };
	bool pinned = false;
	uint8_t hash[32];
	int64_t first_sec;
	char date[16];

	if (!cert_next(&list, &v->leaf))
		return err_set(e, E_ACCOUNT,
			       "what the server sends as its certificate is none, or of more than %d kB",
			       CHAIN_OCTETS >> 10);
	sha256(hash, v->leaf.whole.at, der_octets(v->leaf.whole));
	for (int i = 0; i < 32; i++)
		snprintf(v->fingerprint + 2 * i, 3, "%02x", hash[i]);
	for (unsigned i = 0; i < pins; i++)
		pinned = pinned || memcmp(v->account->pin[i], hash, sizeof hash) == 0;
	if (!cert_decode(&v->leaf))
		return err_set(e, E_ACCOUNT,
			       "the certificate has a kind of key that BearSSL cannot use (RSA-PSS, "
			       "Ed25519, RSA of more than 4096 bits)");
	v->usages = BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN;
	if (pinned)
		return 0;
	if (pins > 0)
		return err_set(e, E_ACCOUNT,
			       "the certificate's SHA-256 is %s, which is not \"tls_fingerprint\"",
			       v->fingerprint);
	usage = v->leaf.extension[X_USAGE];
	if (usage.at != NULL) /* keyEncipherment or keyAgreement; digitalSignature */
		v->usages = ((der_octet(usage, 1) & 0x28) != 0 ? BR_KEYTYPE_KEYX : 0) |
			    ((der_octet(usage, 1) & 0x80) != 0 ? BR_KEYTYPE_SIGN : 0);
	if (host_judge(v, e) != 0)
		return -1;
	first_sec = (v->leaf.decoder.notbefore_days - CERT_1970 + 1) * 86400;
	if (chain_judge(v, &v->leaf, false, clock_sec, e) != 0) {
		if (!clock_wrong || first_sec <= clock_sec ||
		    chain_judge(v, &v->leaf, false, first_sec, &other) != 0)
			return -1;
		log_warn("%s: the certificate is not valid before %s, and this device's clock is wrong: "
			 "taking the day after as today",
			 v->host, cert_date(date, first_sec / 86400 - 1));
		clock_sec = first_sec;
	}
	*e = (struct err){ 0 }; /* of another way to an anchor, or another day */
	return 0;
}

/* Say for which host the certificate is to be. DNS may want a dot at a name's end, TLS must not have it. */
static void verifier_host(struct verifier *v, const char *host)
{
	const uint8_t *name = (const uint8_t *)v->host;
	size_t n = strlen(host);

	n = n > 0 && host[n - 1] == '.' ? n - 1 : n;
	snprintf(v->host, sizeof v->host, "%.*s", (int)n, host);
	v->tag = NAME_ADDRESS;
	v->name = (struct der){ v->address, v->address + 4 };
	if (inet_pton(AF_INET6, v->host, v->address) == 1) {
		v->name.end += 12;
	} else if (inet_pton(AF_INET, v->host, v->address) != 1) {
		v->tag = NAME_DNS;
		v->name = (struct der){ name, name + strlen(v->host) };
	}
}

static void verifier_start_chain(const br_x509_class **self, const char *name)
{
	struct verifier *v = (struct verifier *)(void *)self;

	if (name != NULL && *name != '\0')
		verifier_host(v, name);
	v->err = (struct err){ 0 };
	v->signatures = 0;
	v->chain = (struct der){ v->octets, v->octets };
}

/* Where one certificate ends is told by its own length. */
static void verifier_start_cert(const br_x509_class **self, uint32_t n)
{
	(void)self;
	(void)n;
}

static void verifier_append(const br_x509_class **self, const unsigned char *octets, size_t n)
{
	struct verifier *v = (struct verifier *)(void *)self;
	size_t used = der_octets(v->chain), room = sizeof v->octets - used;

	n = n < room ? n : room;
	memcpy(v->octets + used, octets, n);
	v->chain.end += n;
}

static void verifier_end_cert(const br_x509_class **self)
{
	(void)self;
}

static unsigned verifier_end_chain(const br_x509_class **self)
{
	struct verifier *v = (struct verifier *)(void *)self;

	return verifier_judge(v, &v->err) == 0 ? 0 : BR_ERR_X509_NOT_TRUSTED;
}

static const br_x509_pkey *verifier_get_pkey(const br_x509_class *const *self, unsigned *usages)
{
	const struct verifier *v = (const struct verifier *)(const void *)self;

	if (usages != NULL)
		*usages = v->usages;
	return v->leaf.key;
}

static const br_x509_class verifier_class = { sizeof(struct verifier), verifier_start_chain,
					      verifier_start_cert,     verifier_append,
					      verifier_end_cert,       verifier_end_chain,
					      verifier_get_pkey };

/*
 * Read the certificates of a PEM file (RFC 7468) that BearSSL can use, or say in t->err why not. Our own
 * reader: BearSSL's loses a certificate without a final line end, and all of them in a file with CRLF.
 */
static void trust_read(struct trust *t, const char *path)
{
	FILE *file = fopen(path, "re");
	struct stat st;
	size_t room;
	char *text;

	if (file == NULL || fstat(fileno(file), &st) != 0) {
		err_errno(&t->err, E_ACCOUNT, "%s: cannot read the CA bundle", path);
		return;
	}
	room = st.st_size < CA_FILE_MAX ? (size_t)st.st_size : CA_FILE_MAX;
	text = allocate(room + 2);
	t->anchors.at = t->anchors.end = (uint8_t *)text;
	text[fread(text, 1, room, file)] = '\0';
	fclose(file);
	snprintf(t->path, sizeof t->path, "%s", path);
	while ((text = strstr(text, "-----BEGIN ")) != NULL) {
		char *label = text, *body = text + strcspn(text, "\r\n");
		uint8_t *to = (uint8_t *)(uintptr_t)t->anchors.end; /* in front of what is read */
		struct der list;
		struct cert c;

		*body++ = '\0';
		text = body + strcspn(body, "-");
		if (strstr(label, "CERTIFICATE-----") == NULL)
			continue;
		list = (struct der){ to, to + base64_decode(to, body) };
		if (cert_next(&list, &c) && der_octets(list) == 0 && cert_decode(&c))
			t->anchors.end = list.end;
	}
	if (der_octets(t->anchors) == 0)
		err_set(&t->err, E_ACCOUNT,
			"%s: no certificate in it that could be used; expected a PEM file", path);
}

/* Load a CA bundle: the file named, else SSL_CERT_FILE, else the first usual place that has one. */
static void trust_load(struct trust *t, const char *path)
{
	static const char *const places[] = {
		"/etc/ssl/certs/ca-certificates.crt", /* Debian, Alpine, Arch, OpenWrt, Synology */
		"/etc/pki/tls/certs/ca-bundle.crt",   /* Fedora, RHEL */
		"/etc/ssl/ca-bundle.pem",             /* openSUSE */
		"/etc/ssl/cert.pem",                  /* Alpine, OpenWrt, BSD, macOS */
		"/usr/local/etc/ssl/cert.pem",        /* FreeBSD */
		"/usr/local/share/certs/ca-root-nss.crt",
		"/etc/openssl/certs/ca-certificates.crt", /* NetBSD */
		"/opt/etc/ssl/certs/ca-certificates.crt", /* Entware: QNAP, Synology, Asus */
		"/etc/config/ssl/ca-bundle.crt",          /* QNAP */
	};

	t->named = path;
	path = path != NULL ? path : getenv("SSL_CERT_FILE");
	for (size_t i = 0; path == NULL && i < sizeof places / sizeof *places; i++)
		path = access(places[i], R_OK) == 0 ? places[i] : NULL;
	if (path != NULL)
		trust_read(t, path);
	else
		err_set(&t->err, E_ACCOUNT,
			"this device has no CA bundle (looked for SSL_CERT_FILE, %s, %s and others); copy "
			"cacert.pem from curl.se and name it as \"ca_file\", or set \"tls_fingerprint\" "
			"(--check prints it)",
			places[0], places[3]);
}

/* ======== stream: moves octets to and from one server ======== */

/*
 * TCP, TLS, timeouts and counters; it knows no IMAP. Everything sticks: after an error each call
 * fails and s->err says why. What arrives is lent from the TLS engine's own buffer, or without TLS from
 * ours, uncopied.
 */
struct tls {
	br_ssl_client_context client;
	br_x509_minimal_context unused; /* BearSSL's own engine, which comes with the other defaults */
	struct verifier verifier;
	uint8_t buffer[BR_SSL_BUFSIZE_BIDI];
};

struct stream {
	int fd;
	const struct account *account; /* borrowed */
	unsigned timeout_sec;
	struct tls *tls;         /* owned; NULL: in the clear */
	struct err err;          /* the first error; sticks */
	const uint8_t *at, *end; /* what has arrived and is not consumed */
	size_t lent;             /* octets of the TLS engine's that 'end' ends */
	size_t raw_at, raw_end;  /* octets of 'raw' that were not taken yet */
	struct inflate *inflate; /* owned; NULL: nothing is compressed */
	uint64_t in, out;        /* octets of payload, as they are on the line */
	unsigned waits;          /* how often it was our turn to wait for an answer */
	int64_t waited_ms;       /* how long, for that and for what followed */
	int64_t owed_ms;         /* of that, what came too slowly for DRIP_RATE */
	int64_t until_ms;        /* the clock when what is under way has failed ... */
	unsigned given_sec;      /* ... for it was given so long */
	int64_t stop_ms;         /* when it was first seen that the run is to end; 0: not yet */
	bool sent;               /* something was sent since the last wait */
	int64_t connect_ms;      /* what the TCP handshake took: one round trip */
	uint8_t raw[STREAM_RAW_OCTETS]; /* as read from the socket */
};

PRINTF(3, 4) static int stream_fail(struct stream *s, enum err_code code, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	err_fill(&s->err, code, format, arguments);
	va_end(arguments);
	s->at = s->end;
	return -1;
}

/* Give the server so many seconds from now on to take what is sent, or to send anything of use. */
static void stream_give(struct stream *s, unsigned seconds)
{
	s->given_sec = seconds;
	s->until_ms = now_ms() + (int64_t)seconds * 1000;
}

/*
 * Return -1 if the run is to end or the time is over, else 0; also while data never ceases, since records
 * without content could come for ever. A signal leaves STOP_MS to the mail that is on its way, as long as
 * the line is not silent.
 */
static int stream_look(struct stream *s, bool silent, const char *what)
{
	const bool stop = stop_due(), asked = stop_asked;
	const int64_t now = now_ms();

	if (stop && s->stop_ms == 0)
		s->stop_ms = now;
	if (stop && (!asked || silent || now - s->stop_ms >= STOP_MS))
		return stream_fail(s, E_STOPPED,
				   asked ? "stopped by a signal" : "the parent process is gone");
	return now < s->until_ms ? 0
				 : stream_fail(s, E_NET, "%s: nothing for %u seconds", what, s->given_sec);
}

/*
 * Wait until the socket can be read (POLLIN) or written (POLLOUT). A server that is silent in the clear may be
 * waiting for TLS: that is told early, and it is waited for all the same.
 */
static int stream_wait(struct stream *s, short events, const char *what)
{
	const int64_t began = now_ms();
	struct pollfd fd = { .fd = s->fd, .events = events };
	unsigned sec = 0;
	int n;

	if (events == POLLIN && s->sent) {
		s->waits++;
		s->sent = false;
	}
	do {
		n = poll(&fd, 1, 1000);
		if (n < 0 && errno != EINTR)
			return stream_fail(s, E_NET, "poll: %s", strerror(errno));
		if (stream_look(s, n == 0, what) != 0)
			return -1;
		if (n == 0 && ++sec == SILENT_SEC && events == POLLIN && s->in == 0 && s->tls == NULL)
			log_warn("%s, port %u, is silent; perhaps it wants \"ssl\": true", s->account->host,
				 s->account->port);
	} while (n <= 0);
	s->waited_ms += now_ms() - began;
	s->owed_ms += now_ms() - began;
	return 0;
}

/*
 * Have octets from the socket in s->raw. Servers send small records, and BearSSL would read each in two
 * parts: on a PC as many calls of the system cost more than to decrypt.
 */
static int stream_receive(struct stream *s)
{
	static const char what[] = "waiting for the server";
	ssize_t got;

	if (s->raw_at < s->raw_end)
		return 0;
	if (s->owed_ms > (int64_t)s->timeout_sec * 1000 * DRIP_TIMEOUTS)
		return stream_fail(s, E_NET, "the server sends less than %d octets a second", DRIP_RATE);
	if (stream_look(s, false, what) != 0)
		return -1;
	while ((got = recv(s->fd, s->raw, sizeof s->raw, 0)) < 0) {
		if (errno != EAGAIN && errno != EINTR)
			return stream_fail(s, E_NET, "connection lost: %s", strerror(errno));
		if (stream_wait(s, POLLIN, what) != 0)
			return -1;
	}
	if (got == 0)
		return stream_fail(s, E_NET,
				   s->tls != NULL ? "connection cut without a TLS close"
						  : "connection closed by the server");
	s->raw_at = 0;
	s->raw_end = (size_t)got;
	return 0;
}

static ssize_t stream_transmit(struct stream *s, const void *from, size_t n)
{
	ssize_t put;

	while ((put = send(s->fd, from, n, MSG_NOSIGNAL)) < 0) {
		if (errno == EPIPE || errno == ECONNRESET)
			return (ssize_t)n; /* it is in vain, but reading tells more: a BYE may be there */
		if (errno != EAGAIN && errno != EINTR)
			return stream_fail(s, E_NET, "connection lost: %s", strerror(errno));
		if (stream_wait(s, POLLOUT, "sending to the server") != 0)
			return -1;
	}
	s->sent = true;
	return put;
}

#define SUITE(name) BR_TLS_##name, #name

/* In the order for a CPU without AES. */
static const struct {
	uint16_t id;
	const char *name;
} tls_suites[] = {
	{ SUITE(ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256) },
	{ SUITE(ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256) },
	{ SUITE(ECDHE_ECDSA_WITH_AES_128_GCM_SHA256) },
	{ SUITE(ECDHE_RSA_WITH_AES_128_GCM_SHA256) },
	{ SUITE(ECDHE_ECDSA_WITH_AES_256_GCM_SHA384) },
	{ SUITE(ECDHE_RSA_WITH_AES_256_GCM_SHA384) },
	{ SUITE(ECDHE_RSA_WITH_AES_128_CBC_SHA256) },
	{ SUITE(ECDHE_RSA_WITH_AES_256_CBC_SHA384) },
	{ SUITE(RSA_WITH_AES_128_GCM_SHA256) },
	{ SUITE(RSA_WITH_AES_256_GCM_SHA384) },
};

enum { N_SUITES = sizeof tls_suites / sizeof *tls_suites };

/* Why the handshake or the connection failed, in words. */
static int tls_fail(struct stream *s)
{
	static const char no_tls[] =
		"no TLS is spoken here (143 is the port for \"ssl\": false, 993 for true; or a proxy?)";
	static const struct {
		int code;
		enum err_code grade;
		const char *text;
	} words[] = {
		{ BR_ERR_BAD_VERSION, E_ACCOUNT, no_tls },
		{ BR_ERR_UNKNOWN_TYPE, E_NET, no_tls },
		{ BR_ERR_UNSUPPORTED_VERSION, E_ACCOUNT,
		  "the server speaks only TLS 1.0 or 1.1; BearSSL speaks 1.2" },
		{ BR_ERR_BAD_MAC, E_NET, "data damaged on the way" },
		{ BR_ERR_NO_RANDOM, E_ACCOUNT, "no random numbers: /dev/urandom cannot be read" },
		{ BR_ERR_WRONG_KEY_USAGE, E_ACCOUNT,
		  "the certificate's key usage does not allow this cipher" },
		{ BR_ERR_RECV_FATAL_ALERT + 40, E_ACCOUNT,
		  "no cipher in common with the server (it may speak only TLS 1.0 or 1.1, have an "
		  "RSA-PSS or Ed25519 key, or want a certificate of ours)" },
		{ BR_ERR_RECV_FATAL_ALERT + 70, E_ACCOUNT,
		  "the server speaks only TLS 1.3, or only something older than 1.2; BearSSL speaks 1.2" },
		{ BR_ERR_RECV_FATAL_ALERT + 80, E_NET, "the server has an internal error" },
		{ BR_ERR_RECV_FATAL_ALERT + 112, E_ACCOUNT, "the server does not know this host name" },
	};
	const struct verifier *v = &s->tls->verifier;
	const char *host = s->account->host;
	const char *pin = s->account->pins == 0 && v->leaf.key != NULL ? v->fingerprint : "";
	int code = br_ssl_engine_last_error(&s->tls->client.eng);

	if (code == BR_ERR_OK)
		return stream_fail(s, E_NET, "connection closed by the server");
	if (v->err.code != E_NONE)
		return stream_fail(s, E_ACCOUNT, "%.60s: %s%s%s%s", host, v->err.text,
				   *pin != '\0' ? "; to trust it alone: \"tls_fingerprint\": \"" : "", pin,
				   *pin != '\0' ? "\"" : "");
	if (code == BR_ERR_UNSUPPORTED_VERSION && s->tls->client.eng.version_in == 0)
		code = BR_ERR_BAD_VERSION; /* nothing like a record has come */
	for (size_t i = 0; i < sizeof words / sizeof *words; i++)
		if (words[i].code == code)
			return stream_fail(s, words[i].grade, "%s: TLS: %s", host, words[i].text);
	return stream_fail(s, code < 64 ? E_ACCOUNT : E_NET, "%s: TLS failed: %s %d", host,
			   code < BR_ERR_RECV_FATAL_ALERT ? "BearSSL's error" : "the server's alert",
			   code % 256);
}

/* Say how the line is protected, and by whose certificate. */
static void tls_describe(const struct stream *s, char *out, size_t size)
{
	const struct cert *leaf;
	const char *suite = "";
	char subject[100], issuer[100], date[16];
	int64_t until;

	if (s->tls == NULL) {
		snprintf(out, size, "NOT encrypted");
		return;
	}
	leaf = &s->tls->verifier.leaf;
	until = leaf->decoder.notafter_days - CERT_1970;
	for (size_t i = 0; i < N_SUITES; i++)
		if (tls_suites[i].id == s->tls->client.eng.session.cipher_suite)
			suite = tls_suites[i].name;
	snprintf(out, size,
		 "TLS 1.2, %s; certificate of %s, issued by %s, valid until %s (%lld days)\n"
		 "    \"tls_fingerprint\": \"%s\"",
		 suite, cert_name(leaf->subject, subject, sizeof subject),
		 cert_name(leaf->issuer, issuer, sizeof issuer), cert_date(date, until),
		 (long long)(until - clock_sec / 86400), s->tls->verifier.fingerprint);
}

/* Run the TLS engine until it has what is wanted: BR_SSL_SENDAPP or BR_SSL_RECVAPP. */
static int tls_run(struct stream *s, unsigned wanted)
{
	br_ssl_engine_context *engine = &s->tls->client.eng;

	for (;;) {
		unsigned state = br_ssl_engine_current_state(engine);
		unsigned char *octets;
		ssize_t n;
		size_t room;

		if (state & BR_SSL_CLOSED)
			return tls_fail(s);
		if (state & BR_SSL_SENDREC) {
			octets = br_ssl_engine_sendrec_buf(engine, &room);
			if ((n = stream_transmit(s, octets, room)) < 0)
				return -1;
			br_ssl_engine_sendrec_ack(engine, (size_t)n);
		} else if (state & wanted) {
			return 0;
		} else if (state & BR_SSL_RECVREC) {
			octets = br_ssl_engine_recvrec_buf(engine, &room);
			if (stream_receive(s) != 0)
				return -1;
			room = room < s->raw_end - s->raw_at ? room : s->raw_end - s->raw_at;
			memcpy(octets, s->raw + s->raw_at, room);
			s->raw_at += room;
			br_ssl_engine_recvrec_ack(engine, room);
		} else {
			return stream_fail(s, E_PROTO, "the server talks while TLS cannot listen");
		}
	}
}

/*
 * Begin TLS. Everything that arrived before is refused: whoever sits on the line may have sent it, to be taken
 * for the server's once we trust it (RFC 3501 11.1). 'trust' is NULL where fingerprints alone decide.
 */
static int stream_start_tls(struct stream *s, const struct trust *trust)
{
	uint16_t order[N_SUITES];
	struct verifier *v;
	struct tls *t;
	uint8_t seed[32];

	if (s->at < s->end)
		return stream_fail(s, E_PROTO, "the server talked before the TLS handshake");
	t = allocate(sizeof *t);
	v = &t->verifier;
	s->tls = t;
	stream_give(s, s->timeout_sec);
	br_ssl_client_init_full(&t->client, &t->unused, NULL, 0);
	br_ssl_engine_set_versions(&t->client.eng, BR_TLS12, BR_TLS12);
	br_ssl_engine_add_flags(&t->client.eng, BR_OPT_NO_RENEGOTIATION);
	for (unsigned i = 0; i < N_SUITES; i++) /* with AES the first two pairs change places */
		order[i] = tls_suites[br_aes_x86ni_ctr_get_vtable() != NULL && i < 4 ? i ^ 2 : i].id;
	br_ssl_engine_set_suites(&t->client.eng, order, N_SUITES);
	v->vtable = &verifier_class;
	v->account = s->account;
	v->trust = trust;
	verifier_host(v, s->account->host);
	br_ssl_engine_set_x509(&t->client.eng, &v->vtable);
	br_ssl_engine_set_buffer(&t->client.eng, t->buffer, sizeof t->buffer, 1);
	/* On top of BearSSL's own seed, which may come from RDRAND alone. */
	if (random_octets(seed, sizeof seed))
		br_ssl_engine_inject_entropy(&t->client.eng, seed, sizeof seed);
	if (!br_ssl_client_reset(&t->client, v->tag == NAME_DNS ? v->host : NULL, 0))
		return tls_fail(s);
	return tls_run(s, BR_SSL_SENDAPP);
}

/* Connect a socket to one address. 'where' is it in words. */
static int stream_connect(struct stream *s, const struct addrinfo *address, unsigned seconds,
			  const char *where)
{
	const int64_t began = now_ms();
	int on = 1, error;
	socklen_t n = sizeof error;

	s->fd = socket(address->ai_family, address->ai_socktype, address->ai_protocol);
	if (s->fd < 0)
		return stream_fail(s, E_NET, "socket: %s", strerror(errno));
	fcntl(s->fd, F_SETFL, O_NONBLOCK);
	fcntl(s->fd, F_SETFD, FD_CLOEXEC);
	setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	setsockopt(s->fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
	s->sent = true;
	error = connect(s->fd, address->ai_addr, address->ai_addrlen) == 0 ? 0 : errno;
	if (error == EINPROGRESS) {
		s->waits++;
		stream_give(s, seconds);
		if (stream_wait(s, POLLOUT, where) != 0)
			return -1;
		if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &n) != 0)
			error = errno;
	}
	s->connect_ms = now_ms() - began;
	return error == 0 ? 0 : stream_fail(s, E_NET, "%s: %s", where, strerror(error));
}

static void stream_close(struct stream *s)
{
	if (s->fd >= 0)
		close(s->fd);
	if (s->tls != NULL)
		wipe(s->tls, sizeof *s->tls);
	wipe(s->raw, sizeof s->raw);
	free(s->tls);
	free(s->inflate);
	s->fd = -1;
	s->tls = NULL;
	s->inflate = NULL;
}

/*
 * Connect to the account's host, trying its addresses in turn (IPv6 and IPv4, as the system orders
 * them). With SSL_ON TLS begins at once.
 */
static int stream_open(struct stream *s, const struct account *account, const struct trust *trust,
		       unsigned timeout_sec)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG }, *list = NULL;
	bool hint = account->ssl == SSL_UNSET && account->port == 143;
	char port[8], where[200];
	int error;

	*s = (struct stream){ .fd = -1, .account = account, .timeout_sec = timeout_sec };
	snprintf(port, sizeof port, "%u", account->port);
	snprintf(where, sizeof where, "%.100s, port %s%s", account->host, port,
		 hint ? " (\"ssl\": true uses port 993)" : "");
	stop_at_once = true;
	error = getaddrinfo(account->host, port, &hints, &list);
	if (error == EAI_BADFLAGS || error == EAI_NONAME) { /* ADDRCONFIG hides the loopback's address */
		hints.ai_flags = 0;
		error = getaddrinfo(account->host, port, &hints, &list);
	}
	stop_at_once = false;
	if (error != 0)
		return stream_fail(s, E_NET, "%s: the name cannot be looked up: %s", account->host,
				   error == EAI_SYSTEM ? strerror(errno) : gai_strerror(error));
	for (const struct addrinfo *address = list; address != NULL; address = address->ai_next) {
		bool whole = address->ai_next == NULL || timeout_sec < CONNECT_SEC;

		s->err = (struct err){ 0 };
		if (s->fd >= 0)
			close(s->fd);
		if (stream_connect(s, address, whole ? timeout_sec : CONNECT_SEC, where) == 0 ||
		    s->err.code == E_STOPPED)
			break;
	}
	freeaddrinfo(list);
	return s->err.code != E_NONE ? -1 : account->ssl == SSL_ON ? stream_start_tls(s, trust) : 0;
}

/* Return true if the server is on this machine, so that nobody can listen on the way. */
static bool stream_is_local(const struct stream *s)
{
	char ends[2][64];

	for (int i = 0; i < 2; i++) {
		struct sockaddr_storage at;
		struct sockaddr *address = (struct sockaddr *)&at;
		socklen_t n = sizeof at;

		if ((i == 0 ? getsockname : getpeername)(s->fd, address, &n) != 0 ||
		    getnameinfo(address, n, ends[i], sizeof ends[i], NULL, 0, NI_NUMERICHOST) != 0)
			return false;
	}
	return strcmp(ends[0], ends[1]) == 0;
}

/* At least one octet as it comes over the line, lent until the next call. */
static int stream_take(struct stream *s, const uint8_t **at, const uint8_t **end)
{
	size_t n;

	if (s->tls != NULL) {
		br_ssl_engine_context *engine = &s->tls->client.eng;

		if (s->lent > 0)
			br_ssl_engine_recvapp_ack(engine, s->lent);
		s->lent = 0;
		if (tls_run(s, BR_SSL_RECVAPP) != 0)
			return -1;
		*at = br_ssl_engine_recvapp_buf(engine, &n);
		s->lent = n;
	} else {
		if (stream_receive(s) != 0)
			return -1;
		*at = s->raw + s->raw_at;
		n = s->raw_end - s->raw_at;
		s->raw_at = s->raw_end;
	}
	*end = *at + n;
	s->in += n;
	s->owed_ms -= (int64_t)n * 1000 / DRIP_RATE;
	if (s->owed_ms < 0)
		s->owed_ms = 0;
	return 0;
}

/* What inflate asks for: compressed octets as they come over the line. */
static int stream_feed(struct inflate *f)
{
	struct stream *s = f->context;

	return stream_take(s, &f->in, &f->end);
}

/* Have at least one octet between s->at and s->end. Pointers into what was there before die. */
static int stream_fill(struct stream *s)
{
	size_t n;

	if (s->err.code != E_NONE)
		return -1;
	if (s->at < s->end)
		return 0;
	stream_give(s, s->timeout_sec);
	if (s->inflate == NULL)
		return stream_take(s, &s->at, &s->end);
	if (inflate_run(s->inflate, &s->at, &n) == 0) {
		s->end = s->at + n;
		return 0;
	}
	return stream_fail(s, E_PROTO, "the server's compressed data is wrong: %s",
			   s->inflate->wrong != NULL ? s->inflate->wrong : "it ends"); /* told already */
}

/*
 * Is the line so slow that compressing pays? A server deflates some 10 to 30 MB/s, and mail becomes half
 * to three quarters of itself: on a line that brings more, deflating is what takes the time. So the
 * connect time alone says too little; but it says how long TCP's slow start makes a fast line wait,
 * and whether this is a LAN, where the server is slow and not the line.
 */
static bool stream_is_slow(const struct stream *s)
{
	return s->connect_ms >= COMPRESS_CONNECT_MS && s->in >= COMPRESS_OCTETS &&
	       s->waited_ms - COMPRESS_STARTS * s->connect_ms >= (int64_t)(s->in / COMPRESS_RATE);
}

/*
 * From here on both sides compress (RFC 4978), what has arrived included. Ours only stores: that needs
 * no memory, and the length of what we send tells nothing of it (CRIME). What the server sends, it
 * sends once: nobody can try one guess after the other beside it.
 */
static void stream_compress(struct stream *s)
{
	s->inflate = allocate(sizeof *s->inflate);
	s->inflate->ask = stream_feed;
	s->inflate->context = s;
	s->inflate->in = s->at;
	s->inflate->end = s->end;
	s->at = s->end;
}

static int stream_put(struct stream *s, const uint8_t *p, size_t n)
{
	if (s->err.code != E_NONE)
		return -1;
	s->out += n;
	for (size_t part; n > 0; p += part, n -= part) {
		stream_give(s, s->timeout_sec);
		if (s->tls != NULL) {
			uint8_t *to;

			if (tls_run(s, BR_SSL_SENDAPP) != 0)
				return -1;
			to = br_ssl_engine_sendapp_buf(&s->tls->client.eng, &part);
			part = part < n ? part : n;
			memcpy(to, p, part);
			br_ssl_engine_sendapp_ack(&s->tls->client.eng, part);
		} else {
			ssize_t put = stream_transmit(s, p, n);

			if (put < 0)
				return -1;
			part = (size_t)put;
		}
	}
	return 0;
}

/* Write; with TLS it is kept until the buffer is full or stream_flush(). */
static int stream_write(struct stream *s, const void *octets, size_t n)
{
	const uint8_t *p = octets;

	while (s->inflate != NULL && n > 0) { /* stored blocks end with an octet, so need no flush */
		size_t part = n < UINT16_MAX ? n : UINT16_MAX;
		uint8_t block[5] = { 0, (uint8_t)part, (uint8_t)(part >> 8), (uint8_t)~part,
				     (uint8_t)(~part >> 8) };

		if (stream_put(s, block, sizeof block) != 0 || stream_put(s, p, part) != 0)
			return -1;
		p += part;
		n -= part;
	}
	return stream_put(s, p, n);
}

static int stream_flush(struct stream *s)
{
	if (s->err.code != E_NONE)
		return -1;
	if (s->tls == NULL)
		return 0;
	stream_give(s, s->timeout_sec);
	br_ssl_engine_flush(&s->tls->client.eng, 0);
	return tls_run(s, BR_SSL_SENDAPP);
}

/* ======== sets: of UIDs, as ranges ======== */

struct range {
	uint32_t low, high; /* both are in it */
};

/* 8 octets a range: a mailbox without gaps needs one. */
struct set {
	struct range *ranges; /* owned */
	size_t n, room;
	size_t taken;  /* ranges before this one have been taken out by set_take() */
	bool unsorted; /* they are to be put in order before anybody looks at them */
};

static void set_clear(struct set *set)
{
	set->n = set->taken = 0;
	set->unsorted = false;
}

static void set_free(struct set *set)
{
	free(set->ranges);
	*set = (struct set){ 0 };
}

/* Add a range. False: SET_RANGES_MAX is reached, or memory is out. */
static bool set_add(struct set *set, uint32_t low, uint32_t high)
{
	struct range *last = set->n > set->taken ? &set->ranges[set->n - 1] : NULL;

	if (last != NULL && low >= last->low && low - 1 <= last->high) {
		last->high = high > last->high ? high : last->high;
		return true;
	}
	set->unsorted = set->unsorted || (last != NULL && low < last->low);
	if (set->n == set->room) {
		size_t room = set->room + set->room / 4 + 64;
		struct range *ranges = realloc(set->ranges, room * sizeof *ranges);

		if (ranges == NULL)
			return false;
		set->ranges = ranges;
		set->room = room;
	}
	if (set->n == SET_RANGES_MAX)
		return false;
	set->ranges[set->n++] = (struct range){ low, high };
	return true;
}

static int range_compare(const void *a, const void *b)
{
	const struct range *first = a, *second = b;

	return (first->low > second->low) - (first->low < second->low);
}

/* Put the ranges in order and join those that touch. */
static void set_sort(struct set *set)
{
	struct set sorted = { .ranges = set->ranges, .room = set->room };

	if (!set->unsorted)
		return;
	qsort(set->ranges + set->taken, set->n - set->taken, sizeof *set->ranges, range_compare);
	for (size_t i = set->taken; i < set->n; i++) /* never grows past where it reads */
		set_add(&sorted, set->ranges[i].low, set->ranges[i].high);
	*set = sorted;
}

static uint64_t set_count(struct set *set)
{
	uint64_t count = 0;

	set_sort(set);
	for (size_t i = set->taken; i < set->n; i++)
		count += (uint64_t)set->ranges[i].high - set->ranges[i].low + 1;
	return count;
}

/* Return the smallest UID in a set that is at least 'uid', or 0. */
static uint32_t set_next(struct set *set, uint32_t uid)
{
	size_t low, high;

	set_sort(set);
	low = set->taken;
	high = set->n;
	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (set->ranges[middle].high < uid)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == set->n)
		return 0;
	return set->ranges[low].low > uid ? set->ranges[low].low : uid;
}

/*
 * Take up to 'count' UIDs out of a set, lowest first, as many as a command's line holds. They are given as ranges,
 * and as text (RFC 3501 9, sequence-set). Returns how many ranges they are.
 */
static unsigned set_take(struct set *set, unsigned count, struct range out[BATCH_RANGES],
			 char text[SET_TEXT_OCTETS])
{
	unsigned n = 0;
	size_t octets = 0;

	set_sort(set);
	while (n < BATCH_RANGES && count > 0 && set->taken < set->n && octets < SET_TEXT_OCTETS - 24) {
		struct range *from = &set->ranges[set->taken];
		uint32_t most = from->high - from->low,
			 high = from->low + (most < count - 1 ? most : count - 1);

		out[n++] = (struct range){ from->low, high };
		octets += (size_t)sprintf(text + octets, "%s%lu", n > 1 ? "," : "",
					  (unsigned long)from->low);
		if (high > from->low)
			octets += (size_t)sprintf(text + octets, ":%lu", (unsigned long)high);
		count -= high - from->low + 1;
		if (high == from->high)
			set->taken++;
		else
			from->low = high + 1;
	}
	if (set->taken == set->n)
		set_clear(set);
	return n;
}

/* ======== imap: sends commands and reads responses ======== */

/*
 * An IMAP4rev1 client over a stream. It reads by token, never by line; keeps nothing of what a server sends but
 * what its fields say; and hands literals on in chunks. Commands may run ahead of their answers: imap_send()
 * returns a tag, imap_wait() reads until that tag's command is done. Responses that belong to no command go to
 * the same place as all others, the struct's callbacks. An error sticks, in im->s.err.
 */

/* What a server can do, in the order of capability_words. */
enum { CAP_STARTTLS = 1, CAP_LOGINDISABLED = 2, CAP_AUTH_PLAIN = 4, CAP_SASL_IR = 8 };
enum { CAP_LIST_STATUS = 1 << 4, CAP_ESEARCH = 1 << 5, CAP_CONDSTORE = 1 << 6, CAP_LITERAL_PLUS = 1 << 7 };
enum { CAP_ID = 1 << 8, CAP_STATUS_SIZE = 1 << 9, CAP_COMPRESS = 1 << 10, CAP_LITERAL_MINUS = 1 << 11 };
enum { CAP_SPECIAL_USE = 1 << 12, CAP_NAMESPACE = 1 << 13, CAP_UNSELECT = 1 << 14, CAP_XOAUTH2 = 1 << 15 };
enum { CAP_OAUTHBEARER = 1 << 16, CAP_QRESYNC = 1 << 17, CAP_REV1 = 1 << 18, CAP_REV2 = 1 << 19 };
enum { /* RFC 9051 appendix E */
       CAP_IN_REV2 = CAP_SASL_IR | CAP_LIST_STATUS | CAP_ESEARCH | CAP_LITERAL_MINUS | CAP_SPECIAL_USE |
		     CAP_NAMESPACE | CAP_STATUS_SIZE | CAP_UNSELECT
};

enum imap_condition { IMAP_PENDING, IMAP_OK, IMAP_NO, IMAP_BAD };

struct imap_result { /* of a command */
	enum imap_condition condition;
	char code[32];  /* the response code's name, upper case, or "" (RFC 5530) */
	uint32_t below; /* UIDs below this one were not looked at (MESSAGELIMIT, RFC 9738); or 0 */
	char text[200];
};

/* A command on the wire, or answered and not yet looked at. */
struct command {
	struct imap_result result;
	unsigned octets;
	bool ahead;    /* it was sent before an earlier one had its answer */
	bool examines; /* it is EXAMINE: what comes right before its answer is of its owner's mailbox */
	void *owner;   /* the mailbox that asks, NULL: the connection itself; with: */
	unsigned kind; /* what is asked, in the owner's words */
	unsigned n;
	struct range *ranges; /* the UIDs; room for BATCH_RANGES */
};

struct imap_status { /* of a mailbox; 0 is unknown but for messages */
	uint32_t messages, uidnext, uidvalidity;
	uint32_t unseen; /* UINT32_MAX: unknown */
	uint64_t highestmodseq, octets;
	bool known;
};

enum imap_section { SECTION_NONE, SECTION_MAIL, SECTION_ID, SECTION_MADE };

struct imap_fetch {   /* what a FETCH response has told so far */
	uint32_t uid; /* 0: not yet */
	bool has_flags, has_date, has_size;
	unsigned flags; /* MBOX_SEEN ... */
	int64_t date_sec;
	uint64_t size;             /* RFC822.SIZE */
	enum imap_section section; /* of the literal */
	uint64_t octets;           /* it has */
};

struct imap {
	struct stream s;
	unsigned capabilities; /* CAP_STARTTLS ... */
	bool capabilities_known, preauth;
	const char *mechanism; /* by which the login went: of SASL, or LOGIN */
	unsigned flight;       /* commands at a time; 1: none before the last one's answer */
	unsigned tag;          /* the last one given out */
	unsigned done, taken;  /* all up to these have been answered; and looked at */
	unsigned turned;       /* the one that imap_turn() looked at last */
	unsigned compress_tag; /* of COMPRESS without an answer: nothing may follow it; or 0 */
	struct command ring[IMAP_RING];
	unsigned in_flight; /* octets of commands without an answer */
	bool pipelines;     /* a command that was sent ahead of an answer got its own */
	unsigned alerts;    /* shown to the person */
	uint64_t noise;     /* octets since something that we asked for came */
	bool trace;
	char line[300]; /* of the response in hand, for -vv */
	size_t line_octets;
	const char *secret[3]; /* borrowed during the login: what is sent, in the forms that are */
	char challenge[200];   /* the text of the last continuation request */
	bool refused; /* the access token was, or is not taken any more */
	uint64_t depth;        /* of lists, in the response in hand: a line end within one may be a blank */
	bool over;             /* the response in hand has ended within a list: its line end is consumed */
	bool takes_forwarded;  /* $Forwarded, says PERMANENTFLAGS */
	char prefix[200], delimiter; /* of the personal namespace (RFC 2342) */
	uint64_t append_limit;       /* octets of a mail (RFC 7889); 0: not told */
	uint32_t below;              /* as in the result of the next command that is answered */

	void *wire;             /* the owner of the last EXAMINE that was sent */
	bool selected;          /* a mailbox is; then, as EXAMINE and what came since said: */
	uint32_t exists;        /* UINT32_MAX: unknown */
	struct imap_status box; /* UIDVALIDITY, UIDNEXT, HIGHESTMODSEQ */

	/* For the callbacks; each returns -1 to give up the connection. With EXAMINE, its owner. */
	void *context;
	int (*on_list)(void *context, const char *name, size_t n, char delimiter, bool selectable,
		       unsigned attributes /* bits of special_uses */);
	int (*on_status)(void *context, const char *name, const struct imap_status *status);
	int (*on_uids)(void *context, uint32_t from, uint32_t to); /* the lower one may come last */
	/* A literal begins (returns 1 if it is wanted), comes, and the response that it stands in ends.
	 * Which mail it is may only be known then. Responses without a literal have only the end. */
	int (*on_literal)(void *context, const struct imap_fetch *fetch);
	int (*on_octets)(void *context, const struct imap_fetch *fetch, const void *octets, size_t n);
	int (*on_fetch)(void *context, const struct imap_fetch *fetch);

	/* The UIDs of the last commands. At the end, as no memory is taken for those that were never asked for. */
	struct range ranges[IMAP_FLIGHT_MAX][BATCH_RANGES];
};

static int imap_proto(struct imap *im, const char *found, const char *expected)
{
	return stream_fail(&im->s, E_PROTO, "the server sent %s where %s was expected", found, expected);
}

/* -- reading tokens -- */

/*
 * What servers get wrong is forgiven here, for all responses alike. Blanks are passed over in front of every
 * token, wherever they stand and however many there are; a carriage return is one, so that a bare line feed
 * ends a line as well. In a list (im->depth) a line end is one too, if more of the list follows: some servers
 * send an empty line behind a literal. What a word is made of depends on where it stands. Errors stick: after
 * one there are no more octets, so that whoever reads asks only at the end.
 */
enum { BLANK = 1, ENDS_KEYWORD = 2, ENDS_NAME = 4, ENDS_ATOM = 8, ENDS_WORD = 14, ENDS_TEXT = 16 };
static const uint8_t octet_class[256] = { [' '] = BLANK | ENDS_WORD,  ['\t'] = BLANK | ENDS_WORD,
					  ['\r'] = BLANK | ENDS_WORD, ['\n'] = ENDS_WORD | ENDS_TEXT,
					  [')'] = ENDS_WORD,          ['('] = ENDS_NAME | ENDS_ATOM,
					  ['['] = ENDS_ATOM,          [']'] = ENDS_ATOM,
					  ['{'] = ENDS_ATOM,          ['}'] = ENDS_ATOM,
					  ['"'] = ENDS_ATOM,          [','] = ENDS_ATOM };

/* Count octets that nobody may have asked for. Whoever finds an answer of use sets im->noise back to 0. */
static int imap_noise(struct imap *im, uint64_t octets)
{
	im->noise += octets;
	if (im->noise <= IMAP_NOISE_MAX)
		return 0;
	return stream_fail(&im->s, E_PROTO, "the server sends more than %d octets that nobody asked for",
			   IMAP_NOISE_MAX);
}

/* Take octets that were of use off the noise. */
static void imap_useful(struct imap *im, uint64_t octets)
{
	im->noise -= octets < im->noise ? octets : im->noise;
}

/* A callback has returned this: an error of the line wins, else the callback's is in its own hands. */
static void imap_called(struct imap *im, int result)
{
	if (result < 0)
		stream_fail(&im->s, E_NET, "the connection was given up within an answer");
}

/* Wait for octets. Returns the first, as imap_peek() does. */
static int imap_fill(struct imap *im)
{
	if (stream_fill(&im->s) != 0 || imap_noise(im, (uint64_t)(im->s.end - im->s.at)) != 0)
		return -1;
	return *im->s.at;
}

/* Return the next octet without consuming it; -1 if there is none any more. */
static inline __attribute__((always_inline)) int imap_peek(struct imap *im)
{
	return im->s.at < im->s.end ? *im->s.at : imap_fill(im);
}

/* Consume the octet that imap_peek() has shown. */
static void imap_next(struct imap *im)
{
	int c = *im->s.at++;

	if (im->trace && im->line_octets < sizeof im->line - 1 && c != '\n' && c != '\r')
		im->line[im->line_octets++] = (char)c;
}

/*
 * Return the first octet of the next token, or the line feed that ends the response, without consuming it;
 * -1 at an error. Where the line ends within a list, what the next one begins with tells if it goes on.
 */
static int imap_blanks(struct imap *im)
{
	bool line_end = false;
	int c = '\n';

	if (im->over)
		return c;
	while ((c = imap_peek(im)) >= 0 && (octet_class[c] & BLANK || (c == '\n' && im->depth > 0))) {
		line_end = line_end || c == '\n';
		imap_next(im);
	}
	im->over = line_end && c >= 0 && strchr("*+Aa", c) != NULL;
	return im->over ? '\n' : c;
}

/* Consume the octet c if the next token begins with it. */
static bool imap_is(struct imap *im, int c)
{
	if (imap_blanks(im) != c)
		return false;
	imap_next(im);
	return true;
}

/* Return true at the end of a response, or at an error. */
static bool imap_at_end(struct imap *im)
{
	int c = imap_blanks(im);

	return c == '\n' || c < 0;
}

/*
 * Read up to an octet that ends such words, atoms and keywords in upper case. What is too long is read, but
 * cut at size - 1; it is closed with NUL. Returns the length that it really has.
 */
static size_t imap_word(struct imap *im, unsigned ends, char *out, size_t size)
{
	bool upper = (ends & (ENDS_ATOM | ENDS_KEYWORD)) != 0;
	size_t n = 0;

	for (int c = imap_blanks(im); c >= 0 && !(octet_class[c] & ends); n++) {
		imap_next(im);
		if (n < size - 1)
			out[n] = (char)(upper && c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
		c = imap_peek(im);
	}
	out[n < size - 1 ? n : size - 1] = '\0';
	return n;
}

static size_t imap_atom(struct imap *im, char out[IMAP_ATOM_MAX])
{
	return imap_word(im, ENDS_ATOM, out, IMAP_ATOM_MAX);
}

/* Read a number; one that is none (mail.ru prints 9.37e+06, Zoho -1) or exceeds 'most' is 0, "unknown". */
static uint64_t imap_number(struct imap *im, uint64_t most)
{
	char text[IMAP_ATOM_MAX], *end;
	uint64_t number;

	imap_atom(im, text);
	number = strtoumax(text, &end, 10);
	return isdigit((unsigned char)text[0]) && *end == '\0' && number <= most ? number : 0;
}

/*
 * Read "{n}" or "{n+}" with the line end behind it, the length of a literal; the next octet is '{'. Returns
 * false if there is none, but something that begins like one: that is passed over.
 */
static bool imap_literal(struct imap *im, uint64_t *octets)
{
	char text[IMAP_ATOM_MAX], *end;
	bool closed;
	int c;

	imap_next(im);
	imap_atom(im, text);
	closed = imap_is(im, '}');
	for (c = imap_peek(im); c >= 0 && octet_class[c] & BLANK; c = imap_peek(im))
		imap_next(im);
	*octets = strtoumax(text, &end, 10);
	if (!closed || c != '\n' || !isdigit((unsigned char)text[0]) ||
	    (*end != '\0' && strcmp(end, "+") != 0)) {
		*octets = 0;
		return false;
	}
	imap_next(im);
	if (*octets > UINT32_MAX)
		stream_fail(&im->s, E_PROTO,
			    "the server announces a literal of %.*s octets, more than a mail may have",
			    (int)(end - text), text);
	return true;
}

/* Hand a literal's octets, as they arrive, to the callback, or to nobody. */
static void imap_pour(struct imap *im, uint64_t octets, const struct imap_fetch *fetch)
{
	if (fetch == NULL && im->noise + octets > IMAP_NOISE_MAX)
		imap_noise(im, octets);
	while (octets > 0 && imap_peek(im) >= 0) {
		size_t n = (size_t)(im->s.end - im->s.at);

		n = n < octets ? n : (size_t)octets;
		if (fetch != NULL) {
			imap_called(im, im->on_octets(im->context, fetch, im->s.at, n));
			imap_useful(im, n);
		}
		im->s.at += n;
		octets -= n;
	}
}

/* Read a string in any form (word, quoted, literal) into out, as imap_word() does. */
static uint64_t imap_string(struct imap *im, char *out, size_t size)
{
	uint64_t n = 0, octets = 0;
	int c = imap_blanks(im);
	bool quoted = c == '"';

	if (!quoted && c != '{')
		return imap_word(im, ENDS_NAME, out, size);
	if (quoted)
		imap_next(im);
	else if (imap_literal(im, &octets) && octets > IMAP_NOISE_MAX)
		imap_noise(im, octets); /* do not even wait for it */
	for (; (quoted || n < octets) && (c = imap_peek(im)) >= 0; n++) {
		if (quoted && (c == '\r' || c == '\n')) /* it is not closed */
			break;
		imap_next(im);
		if (quoted && c == '"')
			break;
		if (quoted && c == '\\' && (c = imap_peek(im)) >= 0)
			imap_next(im);
		if (n < size - 1)
			out[n] = (char)c;
	}
	out[n < size - 1 ? n : size - 1] = '\0';
	return n;
}

/* Pass over an octet, or a string with all that is in it. */
static void imap_pass(struct imap *im)
{
	char ignored[8];
	int c = imap_peek(im);

	if (c == '"' || c == '{')
		imap_string(im, ignored, sizeof ignored);
	else if (c >= 0)
		imap_next(im);
}

/*
 * Read the next word of a list, upper case; what is no word, and lists within it, are passed over. Returns
 * false behind the parenthesis that closes the list, and at the end of the response.
 */
static bool imap_item(struct imap *im, char word[IMAP_ATOM_MAX])
{
	int c;

	while (!imap_at_end(im)) {
		if (im->depth <= 1 && imap_atom(im, word) > 0)
			return true;
		c = imap_blanks(im);
		im->depth += c == '(';
		im->depth -= c == ')' && im->depth > 0;
		imap_pass(im);
		if (c == ')' && im->depth == 0)
			return false;
	}
	return false;
}

/* Overwrite what a server echoes of the login. */
static void imap_scrub(const struct imap *im, char *text)
{
	for (int i = 0; i < 3; i++)
		text_scrub(text, im->secret[i]);
}

/* Pass over what is left of a response. */
static void imap_line_end(struct imap *im)
{
	char visible[sizeof im->line + 100];

	im->depth = 0;
	while (!imap_at_end(im))
		imap_pass(im);
	if (!im->over)
		imap_is(im, '\n');
	if (im->trace && im->line_octets > 0) {
		im->line[im->line_octets] = '\0';
		imap_scrub(im, im->line);
		if (im->secret[0] != NULL && im->line[0] == '+') /* base64 of an echo would be no match */
			im->line_octets = 1;
		log_visible(visible, sizeof visible, im->line, im->line_octets);
		log_write(LOG_TRACE, "S: %s", visible);
	}
	im->line_octets = 0;
}

/* -- reading responses -- */

static const char capability_words[] =
	"STARTTLS LOGINDISABLED AUTH=PLAIN SASL-IR LIST-STATUS ESEARCH CONDSTORE LITERAL+ ID STATUS=SIZE "
	"COMPRESS=DEFLATE LITERAL- SPECIAL-USE NAMESPACE UNSELECT AUTH=XOAUTH2 AUTH=OAUTHBEARER QRESYNC "
	"IMAP4REV1 IMAP4REV2";

static void imap_capabilities(struct imap *im)
{
	char word[IMAP_ATOM_MAX];

	im->capabilities = 0;
	im->append_limit = 0;
	im->capabilities_known = true;
	while (imap_atom(im, word) > 0) {
		im->capabilities |= word_bit(capability_words, word);
		if (strncmp(word, "APPENDLIMIT=", 12) == 0)
			im->append_limit = strtoumax(word + 12, NULL, 10);
	}
	if (im->capabilities & CAP_QRESYNC)
		im->capabilities |= CAP_CONDSTORE;
	/* A server of both speaks IMAP4rev1 until the other is enabled, and says itself what it can. */
	if ((im->capabilities & (CAP_REV1 | CAP_REV2)) == CAP_REV2)
		im->capabilities |= CAP_IN_REV2;
}

static const char status_words[] = "MESSAGES UIDNEXT UIDVALIDITY UNSEEN HIGHESTMODSEQ SIZE";

/* Note what the server tells under one of these words, in STATUS or in a response code. */
static void status_note(struct imap_status *s, const char *word, uint64_t number)
{
	uint32_t *const small[] = { &s->messages, &s->uidnext, &s->uidvalidity, &s->unseen };
	int place = word_place(status_words, word);

	if (place >= 4)
		*(place == 4 ? &s->highestmodseq : &s->octets) = number;
	else if (place >= 0)
		*small[place] = number <= UINT32_MAX ? (uint32_t)number : 0;
}

/* Read the text behind OK, NO, BAD, BYE, "[CODE numbers] words", and take in what the code tells. */
static void imap_text(struct imap *im, struct imap_result *result)
{
	uint64_t numbers[2] = { 0, 0 };
	char word[IMAP_ATOM_MAX];
	unsigned n = 0;
	int c;

	result->code[0] = '\0';
	if (imap_is(im, '[')) {
		imap_atom(im, word);
		snprintf(result->code, sizeof result->code, "%.31s", word);
		if (strcmp(word, "CAPABILITY") == 0)
			imap_capabilities(im);
		while (!imap_at_end(im) && (c = imap_blanks(im)) != ']')
			if (isdigit(c) && n < 2)
				numbers[n++] = imap_number(im, INT64_MAX);
			else if (c != '(' || strcmp(result->code, "PERMANENTFLAGS") != 0)
				imap_pass(im);
			else /* "(a] \*)": brackets in it count for nothing */
				while (imap_is(im, '(') ||
				       imap_word(im, ENDS_KEYWORD, word, sizeof word) > 0)
					im->takes_forwarded |= word_place("$Forwarded \\*", word) >= 0;
		imap_is(im, ']');
	}
	imap_word(im, ENDS_TEXT, result->text, sizeof result->text);
	result->text[strcspn(result->text, "\r")] = '\0';
	imap_scrub(im, result->text);
	imap_scrub(im, result->code);
	status_note(&im->box, result->code, numbers[0]);
	if (strcmp(result->code, "MESSAGELIMIT") == 0 && numbers[1] > 1 && numbers[1] <= UINT32_MAX)
		im->below = (uint32_t)numbers[1];
	if (strcmp(result->code, "ALERT") == 0 && im->alerts++ < ALERTS_MAX)
		log_info("the server says: %s", result->text);
	if (strstr(result->text, "AccessTokenExpired") != NULL && im->secret[0] == NULL) { /* Exchange */
		im->refused = true;
		stream_fail(&im->s, E_NET, "the session ended: its access token has expired");
	}
	imap_line_end(im);
}

/*
 * Return for how many seconds the server asks to be left alone; 0 if it does not.
 * Sources of the wordings: Exchange, Gmail, Dovecot, Cyrus, Yahoo; codes: RFC 5530.
 */
static unsigned imap_wait_asked(const struct imap_result *result)
{
	static const char *const words[] = { "Too many ",
					     "Maximum number of connections",
					     "Rate limit",
					     "is throttled",
					     "exceeded command or bandwidth",
					     "Server Unavailable",
					     "service busy",
					     "try again later" };
	const char *backoff = strstr(result->text, "Backoff Time: ");

	if (backoff != NULL) {
		unsigned long ms = strtoul(backoff + 14, NULL, 10);

		return ms / 900 < WAIT_SEC ? (unsigned)(ms / 900) + 1 : WAIT_SEC; /* and a tenth */
	}
	if (strcmp(result->code, "OVERQUOTA") == 0)
		return 60;
	if (word_place("THROTTLED LIMIT UNAVAILABLE INUSE SERVERBUG", result->code) >= 0)
		return VAGUE_SEC;
	for (size_t i = 0; i < sizeof words / sizeof *words; i++)
		if (strstr(result->text, words[i]) != NULL)
			return VAGUE_SEC;
	return 0;
}

/* Pass over octets of 'skip' and read a number of so many digits at most. Returns -1 if there is none. */
static int date_number(const char **p, const char *skip, int digits)
{
	int n = -1;

	for (*p += strspn(*p, skip); digits > 0 && isdigit((unsigned char)**p); digits--, ++*p)
		n = (n < 0 ? 0 : n * 10) + **p - '0';
	return n;
}

/*
 * Read a date: "17-Jul-1996 02:44:25 -0700" (INTERNALDATE, RFC 3501 9) or "Wed, 17 Jul 96 02:44 PDT"
 * (RFC 5322 3.3 and 4.3, without comments in it). False if there is no such time.
 */
static bool parse_date(const char *text, int64_t *sec)
{
	static const char between[] = " ,-\t\r\n"; /* which of these does not matter */
	const char *p = text + strspn(text, between), *name;
	int day, year, hour, minute = -1, second = 0, zone = 0, sign = 1, place;
	unsigned month;
	char word[4];

	if (isalpha((unsigned char)*p)) /* the day of the week */
		p += strcspn(p, between);
	day = date_number(&p, between, 2);
	name = p += strspn(p, between);
	while (isalpha((unsigned char)*p))
		p++;
	month = month_of(name);
	year = date_number(&p, between, 4);
	hour = date_number(&p, between, 2);
	if (*p == ':' && p++)
		minute = date_number(&p, " ", 2);
	if (*p == ':' && p++)
		second = date_number(&p, " ", 2);
	p += strspn(p, " \t\r\n");
	if (*p == '-' || *p == '+') {
		sign = *p++ == '-' ? -1 : 1;
		zone = date_number(&p, " ", 4);
	} else {
		snprintf(word, sizeof word, "%s", p);
		place = word_place("EDT EST CDT CST MDT MST PDT PST", word);
		sign = -1; /* other names tell nothing, and count as UTC */
		zone = place >= 0 ? 100 * (4 + (place + 1) / 2) : 0;
	}
	if ((day | year | hour | minute | second | zone) < 0) /* one is missing */
		return false;
	year += year >= 1000 ? 0 : year < 50 ? 2000 : 1900;
	if (month == 0 || day < 1 || year < 1900 || hour > 23 || minute > 59 || second > 60 || zone > 1400 ||
	    zone % 100 > 59 ||
	    days_of(year, month, (unsigned)day) >= days_of(year + (month == 12), month % 12 + 1, 1))
		return false;
	*sec = days_of(year, month, (unsigned)day) * 86400 + hour * 3600 + minute * 60 + second -
	       sign * (zone / 100 * 3600 + zone % 100 * 60);
	return true;
}

/* Return what a flag is to us: MBOX_SEEN ..., or 0. */
static unsigned imap_flag(const char *word)
{
	unsigned bit = word_bit("\\Seen \\Answered \\Flagged $Forwarded", word);

	return bit < 8 ? bit : MBOX_FORWARDED; /* the first three are MBOX_SEEN, _ANSWERED, _FLAGGED */
}

/* Read what stands in the brackets of BODY[...]: which literal is this? */
static enum imap_section imap_section(struct imap *im)
{
	enum imap_section section = SECTION_MAIL;
	char word[IMAP_ATOM_MAX];

	while (!imap_at_end(im) &&
	       !imap_is(im, ']')) { /* "<0>" may follow, a part: that is no value to us */
		if (imap_peek(im) == '"' || imap_peek(im) == '{')
			imap_string(im, word, sizeof word);
		else if (imap_atom(im, word) == 0)
			imap_next(im);
		else if (section == SECTION_MAIL)
			section = SECTION_NONE;
		if (strcasecmp(word, "MESSAGE-ID") == 0)
			section = SECTION_ID;
		else if (strcasecmp(word, "SUBJECT") == 0)
			section = SECTION_MADE;
	}
	return section;
}

/*
 * Read the value of BODY[...]: a literal, a quoted string, NIL, or (Yandex) nothing at all. Returns true for
 * a literal. NIL is as good as an empty one, but not to make a Message-ID of.
 */
static bool imap_body(struct imap *im, struct imap_fetch *fetch, enum imap_section section)
{
	char text[IMAP_LINE_MAX];
	uint64_t octets = 0;
	int c, wanted = 0;

	imap_is(im, '~');
	c = imap_blanks(im);
	if (c == '{' && !imap_literal(im, &octets))
		imap_proto(im, "a literal without a length", "{number}");
	if (c == '"' &&
	    (octets = imap_string(im, text, sizeof text)) >= sizeof text) /* short ones may come so */
		imap_proto(im, "a mail as a long quoted string", "a literal");
	if (toupper(c) == 'N' && section != SECTION_MADE && imap_atom(im, text) == 3 &&
	    strcmp(text, "NIL") == 0)
		c = '"';
	if ((c != '{' && c != '"') || im->s.err.code != E_NONE)
		return false;
	if (section != SECTION_NONE && fetch->section == SECTION_NONE) {
		fetch->section = section;
		fetch->octets = octets;
		wanted = im->on_literal(im->context, fetch);
		imap_called(im, wanted);
	}
	if (c == '{')
		imap_pour(im, octets, wanted > 0 ? fetch : NULL);
	else if (wanted > 0 && octets > 0)
		imap_called(im, im->on_octets(im->context, fetch, text, (size_t)octets));
	return c == '{';
}

/*
 * Read "* 12 FETCH (UID 5 FLAGS (\Seen) BODY[] {3}...)". What follows a parenthesis that closes too early,
 * because a keyword contains it or the server is wrong, belongs to the same response. But a literal must be
 * followed by an item that we know, or by the end: else its length was wrong, and what follows is its rest.
 */
static void imap_fetch_response(struct imap *im, uint32_t uid)
{
	static const char end[] = "the end of FETCH behind a literal";
	struct imap_fetch fetch = { .uid = uid };
	char word[IMAP_ATOM_MAX], text[64];
	bool doubtful = false; /* nothing that we know has followed the literal yet */

	im->depth = 1;
	im->depth = imap_is(im, '(');
	while (!imap_at_end(im)) {
		bool literal = false;

		if (doubtful && imap_peek(im) != ')' && !isalpha(imap_peek(im)))
			imap_proto(im, "something else", end);
		if (!imap_item(im, word))
			continue;
		if (imap_is(im, '[')) {
			enum imap_section section = imap_section(im);

			if (word_place("BODY BODY.PEEK", word) < 0)
				section = SECTION_NONE;
			literal = imap_body(im, &fetch, section);
		} else if (strcmp(word, "UID") == 0) {
			fetch.uid = (uint32_t)imap_number(im, UINT32_MAX);
		} else if (strcmp(word, "FLAGS") == 0 && imap_is(im, '(')) {
			fetch.has_flags = true;
			while (imap_word(im, ENDS_KEYWORD, word, sizeof word) > 0)
				fetch.flags |= imap_flag(word);
			imap_is(im, ')');
		} else if (strcmp(word, "RFC822.SIZE") == 0) {
			fetch.size = imap_number(im, INT64_MAX);
			fetch.has_size = true;
		} else if (strcmp(word, "INTERNALDATE") == 0) {
			imap_string(im, text, sizeof text);
			/* RFC 5322's form is nobody's INTERNALDATE: the Date header tells more then. */
			fetch.has_date = strlen(text) >= 25 &&
					 strcspn(text, "-") - strspn(text, " ") <= 2 &&
					 parse_date(text, &fetch.date_sec);
		} else if (doubtful && strcmp(word, "MODSEQ") != 0) {
			imap_proto(im, word, end);
		} else {
			fetch.flags |= imap_flag(word); /* behind a keyword that closed the flags */
		}
		doubtful = literal;
	}
	if (doubtful && im->over)
		imap_proto(im, "the next response", end);
	if (im->s.err.code == E_NONE)
		imap_called(im, im->on_fetch(im->context, &fetch));
	imap_line_end(im);
}

/*
 * Read "* SEARCH 1 2 5", where a CONDSTORE server may add (MODSEQ n), or if 'extended'
 * "* ESEARCH (TAG "A7") UID ALL 1:5,9" (RFC 4731). What is no UID is passed over (some list 0 in an empty
 * mailbox): how many mails there are tells whether one is missing.
 */
static void imap_search(struct imap *im, bool extended)
{
	char word[IMAP_ATOM_MAX], *end;
	bool all = !extended; /* the numbers that come are UIDs */

	im->depth = 1; /* the lists are within this one */
	while (!imap_at_end(im)) {
		uintmax_t low, high;

		if (!imap_item(im, word))
			continue;
		if (extended && !isdigit((unsigned char)word[0])) {
			all = strcmp(word, "ALL") == 0;
			continue;
		}
		if (!all)
			continue;
		low = high = strtoumax(word, &end, 10);
		if (*end == ':')
			high = strtoumax(end + 1, &end, 10);
		if (low > 0 && high > 0 && low <= UINT32_MAX && high <= UINT32_MAX && *end == '\0')
			imap_called(im, im->on_uids(im->context, (uint32_t)low, (uint32_t)high));
	}
	imap_line_end(im);
}

/* Read "* LIST (\HasNoChildren) "/" INBOX". */
static void imap_list_response(struct imap *im)
{
	char name[MBOX_NAME_MAX + 2], word[IMAP_ATOM_MAX], delimiter[4], *end;
	bool selectable = true, list;
	unsigned attributes = 0;
	uint64_t n;
	int c;

	im->depth = 1;
	list = imap_is(im, '(');
	while (list && imap_word(im, ENDS_KEYWORD, word, sizeof word) > 0) {
		selectable = selectable && word_place("\\Noselect \\NonExistent", word) < 0;
		attributes |= word_bit(special_uses, word);
	}
	if (list ? !imap_is(im, ')') : imap_atom(im, word) == 0) /* or NIL */
		imap_proto(im, "something else", "a list of attributes");
	imap_string(im, delimiter, sizeof delimiter);
	if (strcasecmp(delimiter, "NIL") == 0)
		delimiter[0] = '\0'; /* there is no hierarchy */
	c = imap_blanks(im);
	if (c == '"' || c == '{') {
		n = imap_string(im, name, sizeof name);
	} else { /* whatever it may be made of; RFC 5258 adds ("THINGS" ...) behind a name */
		n = imap_word(im, ENDS_TEXT, name, sizeof name);
		if ((end = strstr(name, " (\"")) == NULL)
			end = name + strlen(name);
		while (end > name && (end[-1] == ' ' || end[-1] == '\r'))
			end--;
		if (strlen(name) == n)
			n = (size_t)(end - name);
		*end = '\0';
	}
	if (im->s.err.code == E_NONE)
		imap_called(im, im->on_list(im->context, name, (size_t)n, delimiter[0], selectable,
					    attributes));
	imap_line_end(im);
}

/*
 * Read "* STATUS INBOX (MESSAGES 231 UIDNEXT 44292)". It only saves work: a STATUS that makes no sense, as
 * that of an unquoted name with blanks, is passed over, and the mailbox will be opened.
 */
static void imap_status_response(struct imap *im)
{
	struct imap_status status = { .unseen = UINT32_MAX, .known = true };
	char name[MBOX_NAME_MAX + 2], word[IMAP_ATOM_MAX];
	bool list;

	im->depth = 1;
	imap_string(im, name, sizeof name);
	list = imap_is(im, '(');
	while (list && imap_item(im, word))
		if (word_place(status_words, word) >= 0)
			status_note(&status, word, imap_number(im, INT64_MAX));
	if (list && imap_at_end(im) && im->s.err.code == E_NONE && im->on_status != NULL)
		imap_called(im, im->on_status(im->context, name, &status));
	imap_line_end(im);
}

/* Read "* OK text" and its like. */
static void imap_condition(struct imap *im, const char *word)
{
	const bool greeting = im->tag == 0; /* no command was sent yet */
	struct imap_result result;
	bool refused;
	unsigned sec;

	imap_text(im, &result);
	im->preauth = im->preauth || (word[0] == 'P' && greeting);
	/* Exchange gives up on pipelines; Zimbra on a command that is repeated 25 times. */
	if (greeting && strstr(result.text, "Microsoft Exchange") != NULL)
		im->flight = 1;
	if (greeting && strstr(result.text, "Zimbra") != NULL)
		im->flight = 20;
	if (strcmp(word, "BYE") != 0 || im->s.err.code != E_NONE)
		return;
	/* A refusal, a reason to wait, or merely the end of this connection. */
	sec = imap_wait_asked(&result);
	refused = strcmp(result.code, "AUTHENTICATIONFAILED") == 0;
	stream_fail(&im->s, refused ? E_ACCOUNT : sec > 0 ? E_WAIT : E_NET,
		    "the server ended the connection: %s",
		    result.text[0] != '\0' ? result.text : "no reason given");
	im->s.err.wait_sec = sec;
}

static void imap_untagged(struct imap *im)
{
	uint32_t number = isdigit(imap_blanks(im)) ? (uint32_t)imap_number(im, UINT32_MAX) : 0;
	char word[IMAP_ATOM_MAX], delimiter[4];

	imap_atom(im, word); /* "": home.pl: "* [COPYUID ...]" */
	if (word_place("OK NO BAD PREAUTH BYE", word) >= 0 || *word == '\0') {
		imap_condition(im, word);
	} else if (word_place("FETCH UIDFETCH", word) >= 0 && im->on_fetch != NULL) {
		imap_fetch_response(im, word[0] == 'U' ? number : 0);
	} else if (strcmp(word, "LIST") == 0 && im->on_list != NULL) {
		imap_list_response(im);
	} else if (strcmp(word, "STATUS") == 0) {
		imap_status_response(im);
	} else if (word_place("SEARCH ESEARCH", word) >= 0 && im->on_uids != NULL) {
		imap_search(im, word[0] == 'E');
	} else if (strcmp(word, "NAMESPACE") == 0 && imap_is(im, '(') && imap_is(im, '(')) {
		imap_string(im, im->prefix, sizeof im->prefix);
		imap_string(im, delimiter, sizeof delimiter);
		im->delimiter = strcasecmp(delimiter, "NIL") == 0 ? '\0' : delimiter[0];
		imap_line_end(im);
	} else {
		if (strcmp(word, "EXISTS") == 0)
			im->exists = number;
		else if (strcmp(word, "EXPUNGE") == 0 && im->exists > 0 && im->exists != UINT32_MAX)
			im->exists--;
		else if (strcmp(word, "CAPABILITY") == 0)
			imap_capabilities(im);
		imap_line_end(im);
	}
}

/*
 * If the oldest command without an answer is EXAMINE, untagged data from here on is of its owner's mailbox:
 * a server opens it only behind all that came before.
 */
static void imap_turn(struct imap *im)
{
	const struct command *oldest = &im->ring[(im->done + 1) % IMAP_RING];

	if (im->turned == im->done + 1)
		return;
	im->turned = im->done + 1;
	if (im->done == im->tag || !oldest->examines)
		return;
	im->context = oldest->owner;
	im->selected = false;
	im->exists = UINT32_MAX;
	im->box = (struct imap_status){ 0 };
}

/* Take in the answer to a command, whose tag this is. */
static void imap_tagged(struct imap *im, const char *word)
{
	char *end = NULL, found[IMAP_ATOM_MAX + 30], condition[IMAP_ATOM_MAX];
	unsigned long tag = word[0] == 'A' && isdigit((unsigned char)word[1]) ? strtoul(word + 1, &end, 10)
									      : 0;
	struct command *command = &im->ring[tag % IMAP_RING];
	struct imap_result *result = &command->result;

	if (tag == 0 || *end != '\0' || tag > im->tag || tag + IMAP_RING <= im->tag ||
	    result->condition != IMAP_PENDING) {
		snprintf(found, sizeof found, "a line that begins with \"%.30s\"", word);
		imap_proto(im, found, "\"*\", \"+\" or the tag of a command");
		return;
	}
	imap_atom(im, condition);
	imap_text(im, result);
	if (im->s.err.code == E_NONE && word_place("OK NO BAD", condition) < 0)
		imap_proto(im, condition, "OK, NO or BAD");
	if (im->s.err.code != E_NONE)
		return;
	result->condition = (enum imap_condition)(IMAP_OK + word_place("OK NO BAD", condition));
	result->below = im->below;
	im->below = 0;
	im->in_flight -= command->octets;
	im->pipelines = im->pipelines || command->ahead;
	im->noise = 0;
	if (command->examines)
		im->selected = result->condition == IMAP_OK;
	while (im->done < im->tag &&
	       im->ring[(im->done + 1) % IMAP_RING].result.condition != IMAP_PENDING)
		im->done++;
	if (tag != im->compress_tag)
		return;
	im->compress_tag = 0;
	if (result->condition == IMAP_OK)
		stream_compress(&im->s);
	else
		log_detail("the server does not compress: %s", result->text);
}

/* Read one response. Returns 0, 1 if it was a continuation request, -1 at an error. */
static int imap_response(struct imap *im)
{
	struct imap_result challenge;
	char word[IMAP_ATOM_MAX];
	bool asks = false;

	im->over = false;
	imap_turn(im);
	while (imap_is(im, '\n')) /* an empty line */
		;
	if (imap_is(im, '*')) {
		imap_untagged(im);
	} else if ((asks = imap_is(im, '+')) ||
		   imap_blanks(im) == '[') { /* Office 365: a code without a status */
		imap_text(im, &challenge);
		memcpy(im->challenge, challenge.text, sizeof im->challenge);
	} else {
		imap_atom(im, word);
		imap_tagged(im, word);
	}
	return im->s.err.code != E_NONE ? -1 : asks;
}

/* -- sending commands -- */

/*
 * Wait for the answer to the oldest command that nobody has looked at. Returns the command, which stays
 * as it is until the next one is sent; NULL if there is none, or at an error.
 */
static struct command *imap_answer(struct imap *im)
{
	struct command *oldest = &im->ring[(im->taken + 1) % IMAP_RING];

	if (im->taken == im->tag)
		return NULL;
	while (oldest->result.condition == IMAP_PENDING) {
		if (imap_response(im) > 0)
			imap_proto(im, "a continuation request", "an answer");
		if (im->s.err.code != E_NONE)
			return NULL;
	}
	im->taken++;
	return oldest;
}

/* Look at all answers up to a command's. Returns its result, or NULL at an error. */
static const struct imap_result *imap_wait(struct imap *im, unsigned tag)
{
	const struct command *command = NULL;

	while (tag > 0 && im->taken < tag)
		if ((command = imap_answer(im)) == NULL)
			return NULL;
	return command != NULL ? &command->result : NULL;
}

/* Return true if one of many commands may be sent now. Some room is left for those that do not ask. */
static bool imap_may_send(const struct imap *im)
{
	return im->compress_tag == 0 && im->tag - im->taken < im->flight &&
	       im->in_flight < IMAP_FLIGHT_OCTETS - IMAP_LINE_MAX;
}

/*
 * Send a command; the format takes what printf() takes. 'shown', if not NULL, is what the trace
 * may see of it. Returns its tag, 0 at an error.
 */
PRINTF(3, 4) static unsigned imap_send(struct imap *im, const char *shown, const char *format, ...)
{
	char line[IMAP_LINE_MAX * 5];
	unsigned tag = ++im->tag;
	struct command *command = &im->ring[tag % IMAP_RING];
	va_list arguments;
	int n, prefix;

	prefix = snprintf(line, sizeof line, "A%u ", tag);
	va_start(arguments, format);
	n = vsnprintf(line + prefix, sizeof line - (size_t)prefix - 2, format, arguments);
	va_end(arguments);
	if (n < 0 || (size_t)n >= sizeof line - (size_t)prefix - 2) {
		stream_fail(&im->s, E_REFUSED, "a command to the server would be too long");
		return 0;
	}
	n += prefix;
	if (im->trace)
		log_write(LOG_TRACE, "C: A%u %s", tag, shown != NULL ? shown : line + prefix);
	memcpy(line + n, "\r\n", 2);
	*command = (struct command){ .octets = (unsigned)n + 2, .ranges = im->ranges[tag % IMAP_FLIGHT_MAX] };
	command->ahead = im->done + 1 < tag;
	im->in_flight += command->octets;
	if (stream_write(&im->s, line, (size_t)n + 2) != 0 || stream_flush(&im->s) != 0)
		tag = 0;
	if (shown != NULL) /* it was a secret */
		wipe(line, sizeof line);
	return tag;
}

/* Return true if the line was cut while a command was on it that an answer had not made room for. */
static bool imap_was_cut_ahead(const struct imap *im)
{
	return !im->pipelines && im->done < im->tag && im->ring[im->tag % IMAP_RING].ahead;
}

/*
 * Return true if a string must not be quoted (RFC 3501 4.3), or, unless 'strictly', if it had better not: some
 * servers do not take a backslash in what is quoted.
 */
static bool imap_needs_literal(const char *text, bool strictly)
{
	for (; *text != '\0'; text++)
		if ((unsigned char)*text >= 0x80 || strchr(strictly ? "\r\n" : "\r\n\"\\", *text) != NULL)
			return true;
	return false;
}

/* A string as a quoted string, or as a non-synchronising literal where it should be one and may. */
static const char *imap_quote(const struct imap *im, char *out, size_t size, const char *text)
{
	size_t n = 0;

	if (imap_needs_literal(text, false) && im->capabilities & (CAP_LITERAL_PLUS | CAP_LITERAL_MINUS)) {
		snprintf(out, size, "{%zu+}\r\n%s", strlen(text), text);
		return out;
	}
	out[n++] = '"';
	for (; *text != '\0' && n < size - 3; text++) {
		if (*text == '"' || *text == '\\')
			out[n++] = '\\';
		out[n++] = *text;
	}
	out[n++] = '"';
	out[n] = '\0';
	return out;
}

/* Tell of a command that was refused as an error: E_WAIT, or E_REFUSED. Returns 0 if it was not refused. */
static int imap_refused(struct err *e, const struct imap_result *result, const char *what)
{
	unsigned sec;

	if (result == NULL || result->condition == IMAP_OK)
		return 0;
	sec = imap_wait_asked(result);
	if (e->code == E_NONE)
		e->wait_sec = sec;
	return err_set(e, sec > 0 ? E_WAIT : E_REFUSED, "%s: the server says %s %s%s%s%s", what,
		       result->condition == IMAP_BAD ? "BAD" : "NO", result->code[0] != '\0' ? "[" : "",
		       result->code, result->code[0] != '\0' ? "] " : "", result->text);
}

/* What the server can do. Where it refuses to say, what its greeting told counts. */
static int imap_know_capabilities(struct imap *im)
{
	if (im->capabilities_known)
		return 0;
	im->capabilities_known = true; /* refused: what the server told unasked counts */
	return imap_wait(im, imap_send(im, NULL, "CAPABILITY")) != NULL ? 0 : -1;
}

/* Wait for "+ ", then send a line. The command's own answer may come instead. */
static void imap_continue(struct imap *im, unsigned tag, const char *line)
{
	const struct imap_result *result = &im->ring[tag % IMAP_RING].result;
	int got = 0;

	while (im->s.err.code == E_NONE && result->condition == IMAP_PENDING &&
	       (got = imap_response(im)) == 0)
		;
	if (got > 0 && stream_write(&im->s, line, strlen(line)) == 0 &&
	    stream_write(&im->s, "\r\n", 2) == 0)
		stream_flush(&im->s);
}

/* Return true if the server can compress, was not asked yet, and the config does not say no. */
static bool imap_may_compress(const struct imap *im)
{
	return (im->capabilities & CAP_COMPRESS) != 0 && im->flight > 1 &&
	       im->s.account->compress != COMPRESS_OFF;
}

/* Ask the server to compress (RFC 4978). Nothing is sent before its answer. Returns the tag. */
static unsigned imap_compress(struct imap *im)
{
	im->capabilities &= ~(unsigned)CAP_COMPRESS; /* one NO is enough */
	return im->compress_tag = imap_send(im, NULL, "COMPRESS DEFLATE");
}

/* ======== login: begins and ends a connection ======== */

/* From the greeting through STARTTLS and SASL to where mailboxes can be opened, and the goodbye. */

/* Encode n octets: 4 for each 3, and NUL; without padding where the last digits are not "+/". Returns out. */
static char *base64(char *out, const void *octets, size_t n, const char *last)
{
	const uint8_t *p = octets;
	size_t length = 0;

	for (size_t bit = 0; bit < 8 * n; bit += 6) {
		size_t i = bit / 8;
		unsigned two = (unsigned)p[i] << 8 | (i + 1 < n ? p[i + 1] : 0u);
		unsigned digit = two >> (10 - bit % 8) & 63;

		out[length++] = digit < 62 ? base64_digits[digit] : last[digit - 62];
	}
	while (strcmp(last, "+/") == 0 && length % 4 != 0)
		out[length++] = '=';
	out[length] = '\0';
	return out;
}

/* How to log in, the best first. */
static const struct mechanism {
	const char *name;
	unsigned capability;
	const char *reply; /* to the error that comes before a token is refused; NULL: it takes passwords */
} mechanisms[] = {
	{ "XOAUTH2", CAP_XOAUTH2, "" }, /* all that Exchange takes */
	{ "OAUTHBEARER", CAP_OAUTHBEARER, "AQ==" },
	{ "PLAIN", CAP_AUTH_PLAIN, NULL },
	{ "LOGIN", 0, NULL }, /* the command: needs no capability, but may be disabled */
};

/*
 * Return what a SASL mechanism wants to hear, in base64: PLAIN (RFC 4616), OAUTHBEARER (RFC 7628), where
 * the name is a "saslname" (RFC 5801 4). The caller frees it.
 */
static struct string sasl_response(const struct mechanism *m, const struct account *account,
				   const char *user, const char *secret)
{
	struct string t = string_new(3 * strlen(user) + strlen(account->host) + strlen(secret) + 100);
	struct string coded = string_new(t.size / 3 * 4 + 8);
	char port[8];

	snprintf(port, sizeof port, "%u", account->port);
	if (m->capability == CAP_XOAUTH2) {
		string_add(&t, "user=%s\1auth=Bearer %s\1\1", user, secret);
	} else if (m->capability == CAP_OAUTHBEARER) {
		string_add(&t, "n,a=");
		for (const char *p = user; *p != '\0'; p++)
			string_add(&t, *p == ',' ? "=2C" : *p == '=' ? "=3D" : "%s", (char[]){ *p, '\0' });
		string_add(&t, ",\1host=%s\1port=%s\1auth=Bearer %s\1\1", account->host, port, secret);
	} else {
		t.n = (size_t)snprintf(t.at, t.size, "%c%s%c%s", 0, user, 0, secret);
	}
	base64(coded.at, t.at, t.n, "+/");
	string_free(&t);
	return coded;
}

/* Send LOGIN, with literals for what cannot be quoted. Returns the tag, 0 at an error. */
static unsigned imap_login_plainly(struct imap *im, const char *user, const char *password,
				   char quoted[1510])
{
	char first[1510];
	unsigned tag;

	if (!imap_needs_literal(user, true) && !imap_needs_literal(password, true))
		return imap_send(im, "LOGIN ***", "LOGIN %s %s", imap_quote(im, first, sizeof first, user),
				 imap_quote(im, quoted, 1510, password));
	tag = imap_send(im, NULL, "LOGIN {%zu}", strlen(user));
	snprintf(first, sizeof first, "%s {%zu}", user, strlen(password));
	imap_continue(im, tag, first);
	imap_continue(im, tag, password);
	return tag;
}

/* Begin SASL, with the response at once where that may be (RFC 4959). Returns the tag, 0 at an error. */
static unsigned imap_authenticate(struct imap *im, const struct mechanism *m, const char *response)
{
	char shown[40];
	unsigned tag;

	snprintf(shown, sizeof shown, "AUTHENTICATE %s ***", m->name);
	if (im->capabilities & CAP_SASL_IR && strlen(response) < IMAP_LINE_MAX * 4) {
		tag = imap_send(im, shown, "AUTHENTICATE %s %s", m->name, response);
	} else {
		tag = imap_send(im, NULL, "AUTHENTICATE %s", m->name);
		imap_continue(im, tag, response);
	}
	/* Asked once more: for the reply to an error, or the server has not looked at what came first. */
	imap_continue(im, tag, m->reply != NULL ? m->reply : response);
	return tag;
}

/* Return true if AUTHENTICATE was refused for another reason than the password, so that LOGIN may do. */
static bool imap_is_unwilling(const struct imap *im, const struct imap_result *result)
{
	return result->condition != IMAP_OK && !(im->capabilities & CAP_LOGINDISABLED) &&
	       imap_wait_asked(result) == 0 &&
	       (result->condition == IMAP_BAD || word_place("CANNOT", result->code) == 0 ||
		*result->code == '\0');
}

/* Tell that the login was refused, and what helps where it is known. */
static void imap_login_refused(struct imap *im, const struct imap_result *result, bool token)
{
	struct err *e = &im->s.err;
	const char *status;
	size_t used;

	imap_refused(e, result, "login");
	if (e->code == E_REFUSED || strcmp(result->code, "AUTHENTICATIONFAILED") == 0)
		e->code = E_ACCOUNT; /* also where the text says "try again later" */
	im->refused = token && e->code == E_ACCOUNT;
	used = strlen(e->text);
	im->challenge[base64_decode((uint8_t *)im->challenge, im->challenge)] = '\0';
	imap_scrub(im, im->challenge);
	if (token && (status = strstr(im->challenge, "\"status\"")) != NULL) {
		status += 8 + strspn(status + 8, ": \"");
		snprintf(e->text + used, sizeof e->text - used, " (status %.*s)",
			 (int)strcspn(status, "\",}"), status);
	} else if (!token && e->code == E_ACCOUNT) {
		snprintf(e->text + used, sizeof e->text - used,
			 "; perhaps it wants an app password, or another \"username\"");
	}
}

/*
 * Log in with a password, or an access token, by the best mechanism that the server has. Where PLAIN is refused for
 * another reason than the password, LOGIN is tried. A refusal is E_ACCOUNT unless it asks to wait.
 */
static int imap_login(struct imap *im, const char *user, const char *secret, bool token)
{
	const struct mechanism *m = mechanisms, *login = &mechanisms[3];
	const struct imap_result *result;
	struct imap_result first = { .condition = IMAP_PENDING };
	struct err *e = &im->s.err;
	char quoted[1510] = "";
	struct string coded;

	while (m < login && ((m->reply != NULL) != token || !(im->capabilities & m->capability)))
		m++;
	if (m == login && token)
		return stream_fail(&im->s, E_ACCOUNT,
				   "the server takes no login by OAuth (it offers neither "
				   "XOAUTH2 nor OAUTHBEARER)");
	if (m == login && im->capabilities & CAP_LOGINDISABLED)
		return stream_fail(&im->s, E_ACCOUNT,
				   "the server allows no login with a password here (LOGINDISABLED)");
	if (strlen(user) > 500 || strlen(secret) > (token ? TOKEN_MAX : 500))
		return stream_fail(&im->s, E_ACCOUNT, "user name or %s is longer than %d octets",
				   token ? "token" : "password", token ? TOKEN_MAX : 500);
	coded = sasl_response(m, im->s.account, user, secret);
	im->capabilities_known = false; /* others will hold; many servers tell them at once */
	im->secret[0] = secret;
	im->secret[1] = coded.at;
	im->secret[2] = token ? NULL : quoted;
	for (;; m = login) {
		im->mechanism = m->name;
		result = imap_wait(im, m < login ? imap_authenticate(im, m, coded.at)
						 : imap_login_plainly(im, user, secret, quoted));
		if (result == NULL || m == login || token || !imap_is_unwilling(im, result))
			break;
		first = *result;
	}
	if (result == NULL && first.condition != IMAP_PENDING && e->code == E_NET) {
		*e = (struct err){ 0 }; /* it had enough: the first answer counts */
		result = &first;
	}
	if (result == NULL)
		imap_scrub(im, e->text);
	else if (result->condition != IMAP_OK)
		imap_login_refused(im, result, token);
	memset(im->secret, 0, sizeof im->secret);
	string_free(&coded);
	wipe(quoted, sizeof quoted);
	return e->code != E_NONE ? -1 : imap_know_capabilities(im);
}

/* The greeting, and STARTTLS where it is to be had; else refuse to talk in the clear unasked. */
static int imap_greet(struct imap *im, const struct trust *trust)
{
	const struct account *account = im->s.account;
	bool local = stream_is_local(&im->s) && !account->never_clear;
	const struct imap_result *result;

	if (imap_response(im) > 0)
		return imap_proto(im, "a continuation request", "a greeting");
	if (im->s.err.code != E_NONE)
		return -1;
	if (account->ssl != SSL_ON && im->preauth && !local)
		return stream_fail(&im->s, E_ACCOUNT,
				   "the server wants neither login nor TLS (PREAUTH): it cannot "
				   "be trusted; try \"ssl\": true");
	if (imap_know_capabilities(im) != 0)
		return -1;
	if (account->ssl == SSL_ON)
		return 0;
	if (!im->preauth && im->capabilities & CAP_STARTTLS) {
		result = imap_wait(im, imap_send(im, NULL, "STARTTLS"));
		if (result == NULL || imap_refused(&im->s.err, result, "STARTTLS") != 0 ||
		    stream_start_tls(&im->s, trust) != 0)
			return -1;
		im->capabilities = 0; /* nothing that was said in the clear counts any more */
		im->capabilities_known = false;
		return imap_know_capabilities(im);
	}
	if (!local && (account->never_clear || account->ssl != SSL_OFF))
		return stream_fail(&im->s, E_ACCOUNT, "%s, port %u, offers no STARTTLS; %s", account->host,
				   account->port,
				   account->never_clear
					   ? "nothing is sent in the clear; port 993 speaks TLS at once"
					   : "set \"ssl\": true for TLS on port 993, or \"ssl\": false to "
					     "send the password in the clear");
	if (!local)
		log_warn(
			"%s offers no STARTTLS: the password goes over the line in the clear, as \"ssl\": false says",
			account->host);
	return 0;
}

/* Connect, greet, log in with a password or token that is hidden, and say who we are (NetEase wants that before EXAMINE). */
static int imap_open(struct imap *im, const struct account *account, unsigned flight,
		     const char *password, const struct trust *trust, unsigned timeout_sec)
{
	struct string secret;
	unsigned tag;
	int result;

	memset(im, 0, offsetof(struct imap, ranges));
	im->trace = log_to.level >= LOG_TRACE;
	im->mechanism = "PREAUTH";
	im->flight = flight;
	if (stream_open(&im->s, account, trust, timeout_sec) != 0)
		return -1;
	if (imap_greet(im, trust) != 0)
		return -1;
	if (!im->preauth) {
		secret = secret_show(password);
		result = imap_login(im, account->username, secret.at, account->oauth != NULL);
		string_free(&secret);
		if (result != 0)
			return -1;
	}
	if (im->capabilities & CAP_ID) {
		tag = imap_send(im, NULL, "ID (\"name\" \"imap_backup\" \"version\" \"" VERSION "\")");
		/* Its answer comes with that of the next command, unless there is to be only one at a time. */
		if (tag == 0 || (im->flight == 1 && imap_wait(im, tag) == NULL))
			return -1;
	}
	if (account->compress == COMPRESS_ON && imap_may_compress(im))
		return imap_wait(im, imap_compress(im)) == NULL ? -1 : 0;
	return 0;
}

/* Say goodbye and close. What the server answers is of no use to anybody. */
static void imap_close(struct imap *im)
{
	if (im->s.fd >= 0 && im->s.err.code == E_NONE)
		imap_send(im, NULL, "LOGOUT");
	stream_close(&im->s);
}

/* ======== http: URLs that are told of a run, and what OAuth asks ======== */

/*
 * libcurl, one request at a time. A URL that is told something (GET) may redirect, and what it answers is
 * passed over. A form (POST) goes by https to that address and no other, and its answer is bounded.
 */
struct http {
	const char *form; /* what is posted; NULL: a GET */
	const struct trust *trust;
	struct verifier verifier; /* what a libcurl that uses BearSSL too judges certificates by */
	struct err err;           /* nobody answered; else: */
	long status;              /* of HTTP */
	size_t octets;            /* of the answer to a form, with secrets */
	char text[HTTP_ANSWER_MAX + 1];
};

static size_t http_keep(char *octets, size_t size, size_t n, void *context)
{
	struct http *h = context;

	n *= size;
	if (n > HTTP_ANSWER_MAX - h->octets)
		return 0;
	memcpy(h->text + h->octets, octets, n);
	h->octets += h->form != NULL ? n : 0;
	return n;
}

/* It is given our anchors and our clock: its own loader fails on the first root that it cannot use. */
static CURLcode http_tls(CURL *curl, void *client, void *context)
{
	struct http *h = context;

	(void)curl;
	h->verifier.vtable = &verifier_class;
	h->verifier.trust = h->trust;
	br_ssl_engine_set_x509(&((br_ssl_client_context *)client)->eng, &h->verifier.vtable);
	return CURLE_OK;
}

/* What may be shown of a URL: scheme, host and port; the rest may be a secret. Returns out. */
static char *http_site(char out[300], const char *url)
{
	const char *host = strstr(url, "://") + 3, *end = host + strcspn(host, "/?#"), *from = host;

	for (const char *p = host; p < end; p++)
		if (*p == '@')
			from = p + 1;
	snprintf(out, 300, "%.*s%.*s", (int)(host - url), url, (int)(end - from), from);
	return out;
}

/* Make the request; h->err tells if that failed. What is told to a URL is tried a few times; a form goes once. */
static int http_run(struct http *h, const char *url)
{
	const char *library = curl_version_info(CURLVERSION_NOW)->ssl_version;
	const bool post = h->form != NULL, secure = strncasecmp(url, "https:", 6) == 0;
	char reason[CURL_ERROR_SIZE] = "", site[300];
	CURL *curl;
	CURLcode code = CURLE_FAILED_INIT;

	http_site(site, url);
	if (secure && h->trust->err.code != E_NONE)
		return err_set(&h->err, E_ACCOUNT, "%s: %s", site, h->trust->err.text);
	curl = curl_easy_init();
	curl_easy_setopt(curl, CURLOPT_URL, url);
	curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, post ? 0L : 1L);
	curl_easy_setopt(curl, CURLOPT_FAILONERROR, post ? 0L : 1L);
	curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, post ? "https" : "http,https");
	curl_easy_setopt(curl, CURLOPT_REDIR_PROTOCOLS_STR, secure ? "https" : "http,https");
	curl_easy_setopt(curl, CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
	curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, 15L);
	curl_easy_setopt(curl, CURLOPT_TIMEOUT, 30L);
	curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(curl, CURLOPT_USERAGENT, "imap_backup/" VERSION);
	curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, http_keep);
	curl_easy_setopt(curl, CURLOPT_WRITEDATA, h);
	curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, reason);
	curl_easy_setopt(curl, CURLOPT_CAPATH, NULL);
	curl_easy_setopt(curl, CURLOPT_CAINFO, h->trust->path);
	if (post)
		curl_easy_setopt(curl, CURLOPT_POSTFIELDS, h->form);
	if (library != NULL && strncmp(library, "BearSSL", 7) == 0) {
		curl_easy_setopt(curl, CURLOPT_CAINFO, NULL);
		curl_easy_setopt(curl, CURLOPT_SSL_CTX_FUNCTION, http_tls);
		curl_easy_setopt(curl, CURLOPT_SSL_CTX_DATA, h);
	}
	for (int attempt = 0; attempt < (post ? 1 : 3) && code != CURLE_OK && !stop_asked; attempt++) {
		poll(NULL, 0, attempt * 2000);
		code = curl_easy_perform(curl);
	}
	curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &h->status);
	curl_easy_cleanup(curl);
	if (code == CURLE_OK)
		return 0;
	if (h->verifier.err.code != E_NONE)
		return err_set(&h->err, h->verifier.err.code, "%s: %s", site, h->verifier.err.text);
	if (code == CURLE_WRITE_ERROR)
		return err_set(&h->err, E_ACCOUNT, "%s: the answer has more than %d octets", site,
			       HTTP_ANSWER_MAX);
	return err_set(&h->err, code == CURLE_PEER_FAILED_VERIFICATION ? E_ACCOUNT : E_NET, "%s: %s", site,
		       *reason != '\0' ? reason : curl_easy_strerror(code));
}

/*
 * POST a form, or GET (form NULL), which a signal ends. A process of its own does it: the memory that libcurl and
 * its TLS library take, and the secrets that they leave behind, end with it. The caller wipes and unmaps the result.
 */
static struct http *http_ask(const char *url, const char *form, const struct trust *trust)
{
	struct http *h = allocate_shared(sizeof *h);
	int status = -1;
	char site[300];
	pid_t child;

	h->form = form;
	h->trust = trust;
	child = fork();
	if (child == 0) {
		http_run(h, url);
		_exit(0);
	}
	while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
		if (form == NULL)
			kill(child, SIGKILL);
	if (status != 0)
		err_set(&h->err, E_NET, "%s: the request was broken off", http_site(site, url));
	return h;
}

/* ======== oauth: signs in once, and keeps a fresh access token from then on ======== */

/*
 * RFC 6749 with 7636 (PKCE) and 8628 (the device flow). The tokens of one "oauth2" entry are in one file,
 * in the form of MSAL's token cache, so that the file of the Python original serves both programs. A
 * refresh token is only ever replaced, never thrown away, whatever a provider says.
 */
struct oauth_job { /* what all functions here work on */
	const struct config *config;
	const struct oauth *oauth;
	const struct trust *trust;
	struct err *e;
	char error[40]; /* the provider's word for what was wrong with the last request, or "" */
	char path[PATH_MAX_OCTETS], aside[PATH_MAX_OCTETS + 8]; /* of the token file */
	int lock, fd;                        /* -1: not locked; what is written aside is not open */
	bool waited;                         /* for another process, until it was locked */
	size_t octets;                       /* of the file */
	struct json *root;                   /* owned; of the file, or an empty object */
	const struct json *refresh, *access; /* its newest tokens of our client, or NULL */
};

/* SHA-256 of the access token that this process was given last. */
static uint8_t oauth_given[32];

/* The text of a member that is a string or a number; "" where it is neither, or 'object' is NULL. */
static const char *oauth_text(const struct json *object, const char *key)
{
	const struct json *value = object != NULL ? json_get(object, key) : NULL;

	return value != NULL && value->text != NULL ? value->text : "";
}

/* -- talking to the provider -- */

/*
 * The provider says no, by the word in k->error and in words of its own, which begin with a number if it is
 * Microsoft. What may pass is E_NET, all else E_ACCOUNT.
 */
static int oauth_refused(struct oauth_job *k, const char *words, long status)
{
	static const char *const hints[][2] = {
		{ "65001 90094 90095", "sign in again, or let an administrator approve the app" },
		{ "50105", "an administrator must assign this person to the app" },
		{ "50074 50076 50078 50079", "a second factor is wanted: sign in again" },
		{ "70043", "the tenant wants frequent sign-ins; an administrator can exempt the app" },
		{ "700082 70008", "not used for too long: sign in again" },
		{ "50173 50132 50133", "password changed or sign-in revoked: sign in again" },
		{ "70000", "it is of another \"client_id\" or \"tenant_id\", or was used already" },
		{ "53003 530036", "a rule of the tenant, perhaps against device codes: try --paste" },
		{ "50097 53000 53001 530084", "a rule of the tenant; only an administrator can lift it" },
		{ "7000218", "allow public client flows for the app, or set \"client_secret\"" },
		{ "700025", "this app has no secret: remove \"client_secret\"" },
		{ "7000215 7000222", "\"client_secret\" is wrong (its ID?) or has expired" },
		{ "50011 redirect_uri_mismatch", "register this \"redirect\", or set another" },
		{ "7000112 70001 700011 700016", "check \"client_id\"" },
		{ "50194 9002332 9001023 50020 500208",
		  "set \"tenant_id\": directory, consumers, organizations" },
		{ "70011 65005 650057 invalid_scope", "the app's registration must allow the scope" },
		{ "70018 70019 expired_token bad_verification_code", "too old or mistyped: begin again" },
		{ "65004 access_denied authorization_declined", "it was declined" },
		{ "invalid_client unauthorized_client", "check \"client_id\" and \"client_secret\"" },
	};
	const char *at = strstr(words, "AADSTS"), *trace = strstr(words, " Trace ID:"), *hint = "";
	char digits[12] = "", own[160];
	enum err_code code = E_ACCOUNT;

	if (at != NULL)
		snprintf(digits, sizeof digits, "%.*s", (int)strspn(at + 6, "0123456789"), at + 6);
	if (k->oauth->type == OAUTH_GOOGLE && strcmp(k->error, "invalid_grant") == 0)
		hint = "status \"Testing\" ends after 7 days: publish the app, then sign in again";
	for (size_t i = 0; i < sizeof hints / sizeof *hints && *hint == '\0'; i++)
		if (word_place(hints[i][0], digits) >= 0 || word_place(hints[i][0], k->error) >= 0)
			hint = hints[i][1];
	snprintf(own, sizeof own, "%.*s", trace != NULL ? (int)(trace - words) : 999, words);
	own[strcspn(own, "\r\n")] = '\0';
	if (status >= 500 || status == 429 || status == 408 ||
	    word_place("temporarily_unavailable server_error slow_down authorization_pending", k->error) >=
		    0)
		code = E_NET;
	if (*k->error == '\0')
		snprintf(k->error, sizeof k->error, "HTTP status %ld%s", status,
			 status == 200 ? " and no more" : "");
	return err_set(k->e, code, "the provider says %s%s%s%s%s", k->error, *own != '\0' ? ": " : "", own,
		       *hint != '\0' ? "; " : "", hint);
}

/*
 * POST a form: what the format says (one of its values is this secret, if it is not NULL), and what every
 * form has. Returns the answer (caller frees), or NULL with E_ACCOUNT; with E_NET if it may do better later.
 * Where the provider itself refused, k->error says how.
 */
static struct json *oauth_ask(struct oauth_job *k, const char *url, const char *secret, const char *format,
			      ...)
{
	const struct oauth *o = k->oauth;
	struct string form = string_new(FORM_MAX), own = { 0 };
	struct json *answer = NULL;
	struct err no_json = { 0 };
	struct http *h;
	char *words;
	va_list values;

	va_start(values, format);
	string_list(&form, format, values);
	va_end(values);
	string_add(&form, "&client_id=%f", o->client_id);
	if (o->client_secret != NULL) {
		own = secret_show(o->client_secret);
		string_add(&form, "&client_secret=%f", own.at);
	}
	*k->error = '\0';
	h = http_ask(url, form.at, k->trust);
	if (h->err.code != E_NONE) {
		*k->e = h->err;
	} else {
		answer = json_parse(h->text, h->octets, &no_json);
		if (h->status != 200 ||
		    *oauth_text(answer, url == o->device_url ? "device_code" : "access_token") == '\0') {
			snprintf(k->error, sizeof k->error, "%s", oauth_text(answer, "error"));
			words = (char *)(uintptr_t)oauth_text(answer, "error_description");
			text_scrub(words, secret);
			text_scrub(words, own.at);
			oauth_refused(k, words, h->status);
			json_free(answer);
			answer = NULL;
		}
	}
	wipe(h, sizeof *h);
	munmap(h, sizeof *h);
	string_free(&form);
	string_free(&own);
	return answer;
}

/* Ask for an access token by what there is: the client's own secret, or the refresh token. */
static struct json *oauth_refresh(struct oauth_job *k)
{
	const char *refresh = oauth_text(k->refresh, "secret");

	if (k->oauth->client_credentials)
		return oauth_ask(k, k->oauth->token_url, NULL, "grant_type=client_credentials&scope=%f",
				 k->oauth->scope);
	return oauth_ask(k, k->oauth->token_url, refresh, "grant_type=refresh_token&refresh_token=%f",
			 refresh);
}

/* -- the token file -- */

/* Of the tokens of a kind those of our client count, and of these the one with the highest number. */
static const struct json *oauth_newest(const struct oauth_job *k, const char *kind, const char *number)
{
	const struct json *list = json_get(k->root, kind), *best = NULL;

	if (list == NULL || list->type != JSON_OBJECT)
		return NULL;
	for (const struct json *v = list->child; v != NULL; v = v->next)
		if (strcmp(oauth_text(v, "client_id"), k->oauth->client_id) == 0 &&
		    *oauth_text(v, "secret") != '\0' &&
		    strtoll(oauth_text(v, number), NULL, 10) >= strtoll(oauth_text(best, number), NULL, 10))
			best = v;
	return best;
}

static void oauth_close(struct oauth_job *k)
{
	json_free(k->root);
	if (k->fd >= 0) {
		close(k->fd);
		unlink(k->aside); /* it is not there if it was kept */
	}
	if (k->lock >= 0)
		close(k->lock);
	k->root = NULL;
	k->refresh = k->access = NULL; /* which were in there */
	k->fd = k->lock = -1;
}

/* Lock the token file of an entry, and read it if there is one. Whatever it returns, close it. */
static int oauth_open(struct oauth_job *k)
{
	static const char *const types[] = { "o365", "google", "custom" };
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct err wrong = { .text = " no object" };
	struct string t = { 0 };
	int fd;

	snprintf(k->path, sizeof k->path, "%.3600s/oauth2_%s_%.200s.json", k->config->oauth2_cache,
		 types[k->oauth->type], k->oauth->name);
	snprintf(k->aside, sizeof k->aside, "%s.lock", k->path);
	mkdir(k->config->oauth2_cache, 0700);
	k->lock = open(k->aside, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (k->lock < 0)
		return err_errno(k->e, E_ACCOUNT, "%s: cannot open", k->aside);
	while (fcntl(k->lock, k->waited ? F_SETLKW : F_SETLK, &lock) != 0) {
		if (stop_asked)
			return err_set(k->e, E_STOPPED, "stopped by a signal");
		if (k->waited && errno != EINTR)
			return err_errno(k->e, E_ACCOUNT, "%s: cannot lock", k->aside);
		k->waited = true;
	}
	fd = open(k->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0 ? file_text(fd, OAUTH_FILE_MAX, &t) != 0 : errno != ENOENT)
		err_errno(k->e, E_ACCOUNT, "%s: cannot read", k->path);
	k->octets = t.n;
	k->root = t.n > 0 ? json_parse(t.at, t.n, &wrong) : json_parse("{}", 2, &wrong);
	string_free(&t);
	if (k->root == NULL || k->root->type != JSON_OBJECT)
		return err_set(k->e, E_ACCOUNT, "%s:%s; move it away and sign in again", k->path,
			       wrong.text);
	k->refresh = oauth_newest(k, "RefreshToken", "last_modification_time");
	k->access = oauth_newest(k, "AccessToken", "expires_on");
	return k->e->code == E_NONE ? 0 : -1;
}

/*
 * Write the file anew, aside, and free the text. An empty one only sees to it that there is room, before
 * anything is asked for: a token that a provider has given and that cannot be kept may be the last one.
 */
static int oauth_write(struct oauth_job *k, struct string t)
{
	size_t n = t.n > 0 ? t.n : t.size;

	snprintf(k->aside, sizeof k->aside, "%s.new", k->path);
	if (k->fd < 0) {
		unlink(k->aside);
		k->fd = open(k->aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
	}
	errno = k->fd >= 0 ? ENOSPC : errno; /* where fewer octets are written than were to be */
	if (k->fd < 0 || pwrite(k->fd, t.at, n, 0) != (ssize_t)n || ftruncate(k->fd, (off_t)n) != 0)
		err_errno(k->e, E_ACCOUNT, "%s: cannot write", k->aside);
	string_free(&t);
	return k->e->code == E_NONE ? 0 : -1;
}

/*
 * Write what an array or object has (NULL: nothing), each with a comma in front, the first with this one.
 * 'but' and 'nor': it is an object, and members with these names are left out.
 */
static void oauth_print(struct string *t, const char *comma, const struct json *in, const char *but,
			const char *nor)
{
	for (const struct json *v = in != NULL ? in->child : NULL; v != NULL; v = v->next, comma = ",") {
		if (but != NULL && (v->key == NULL || strcmp(v->key, but) == 0 || strcmp(v->key, nor) == 0))
			continue;
		string_add(t, v->key != NULL ? "%s%j:" : "%s", comma, v->key);
		if (v->type == JSON_ARRAY || v->type == JSON_OBJECT) {
			string_add(t, v->type == JSON_ARRAY ? "[" : "{");
			oauth_print(t, "", v, NULL, NULL);
			string_add(t, v->type == JSON_ARRAY ? "]" : "}");
		} else {
			string_add(t, v->type == JSON_STRING ? "%j" : "%s",
				   v->text != NULL        ? v->text
				   : v->type == JSON_NULL ? "null"
				   : v->number != 0       ? "true"
							  : "false");
		}
	}
}

/*
 * Write the file anew with the tokens of an answer. All else stays as it is, but for other access tokens, which
 * are only kept to save a question. MSAL reads the fields of the entries, not the names of these.
 */
static void oauth_merge(const struct oauth_job *k, const struct json *answer, struct string *t)
{
	static const char entry[] = "%j:{\"credential_type\":%j,\"secret\":%j,%j:%j,\"home_account_id\":%j,"
				    "\"environment\":%j,\"client_id\":%j,\"target\":%j}";
	const char *refresh = oauth_text(answer, "refresh_token"), *client = k->oauth->client_id;
	const char *home = oauth_text(k->refresh, "home_account_id");
	const char *where = oauth_text(k->refresh, "environment"), *scope = oauth_text(answer, "scope");
	const char *key = k->refresh != NULL ? k->refresh->key : client;
	long long now = (long long)time(NULL), life = strtoll(oauth_text(answer, "expires_in"), NULL, 10);
	char begin[24], end[24], site[300];

	snprintf(begin, sizeof begin, "%lld", now);
	snprintf(end, sizeof end, "%lld", now + (life > 0 && life < INT32_MAX ? life : 600)); /* as MSAL */
	if (*where == '\0')
		where = http_site(site, k->oauth->token_url) + strlen("https://");
	if (*scope == '\0')
		scope = k->oauth->scope;
	string_add(t, "{\"AccessToken\":{");
	string_add(t, entry, client, "AccessToken", oauth_text(answer, "access_token"), "expires_on", end,
		   home, where, client, scope);
	string_add(t, "}");
	if (*refresh != '\0') {
		string_add(t, ",\"RefreshToken\":{");
		string_add(t, entry, key, "RefreshToken", refresh, "last_modification_time", begin, home,
			   where, client, scope);
		oauth_print(t, ",", json_get(k->root, "RefreshToken"), key, "");
		string_add(t, "}");
	}
	oauth_print(t, ",", k->root, "AccessToken", *refresh != '\0' ? "RefreshToken" : "");
	string_add(t, "}");
}

/* Put the tokens of an answer on disk; only then the access token may be used. It must be locked. */
static int oauth_keep(struct oauth_job *k, const struct json *answer)
{
	struct string t = string_new(k->octets + 4 * HTTP_ANSWER_MAX);

	oauth_merge(k, answer, &t);
	if (t.full)
		err_set(k->e, E_ACCOUNT, "%s: the tokens are too long", k->path);
	if (oauth_write(k, t) == 0 && (fsync(k->fd) != 0 || rename(k->aside, k->path) != 0))
		err_errno(k->e, E_ACCOUNT, "%s: cannot write", k->path);
	folder_sync(k->config->oauth2_cache);
	return k->e->code == E_NONE ? 0 : -1;
}

/*
 * Get an access token that is good for 5 minutes at least, from the file or from the provider.
 *
 *   refused   the server does not take the token that this process was given last, or not any more
 *   token     receives the token, hidden; the caller frees it
 *
 * However many processes want one, one of them asks the provider; the others wait for its lock and find
 * the new token in the file. E_NET: it may do better later. Where a person must sign in, the
 * text of E_ACCOUNT ends with the command for it.
 */
static int oauth_token(const struct config *c, const struct oauth *o, const struct trust *trust,
		       bool refused, char **token, struct err *e)
{
	struct oauth_job k = { .config = c, .oauth = o, .trust = trust, .e = e, .fd = -1, .lock = -1 };
	struct json *answer = NULL;
	const char *found = NULL, *known;
	char command[200];
	uint8_t hash[32];
	int64_t left;

	if (oauth_open(&k) == 0) {
		known = oauth_text(k.access, "secret");
		left = strtoll(oauth_text(k.access, "expires_on"), NULL, 10) - (int64_t)time(NULL);
		sha256(hash, known, strlen(known));
		/* Whom we waited for has just got a token, or found that this one will do. */
		if (left > 0 && (refused ? memcmp(hash, oauth_given, sizeof hash) != 0
					 : k.waited || left >= OAUTH_LEFT_SEC)) {
			found = known;
		} else if (k.refresh == NULL && !o->client_credentials) {
			strcpy(k.error, "none");
			err_set(e, E_ACCOUNT, "nobody has signed in yet for \"oauth2\": \"%.60s\"",
				o->name);
		} else if (oauth_write(&k, string_new(k.octets + OAUTH_MORE)) == 0 &&
			   (answer = oauth_refresh(&k)) != NULL && oauth_keep(&k, answer) == 0) {
			found = oauth_text(answer, "access_token");
		}
	}
	if (found != NULL) {
		sha256(oauth_given, found, strlen(found));
		*token = secret_take(found);
	}
	json_free(answer);
	oauth_close(&k);
	if (e->code == E_ACCOUNT && *k.error != '\0') {
		snprintf(command, sizeof command, "; run: imap_backup --authorize %.60s %.100s", o->name,
			 c->path);
		e->text[sizeof e->text -
			sizeof command] = '\0'; /* the whole command, not the whole reason */
		strcat(e->text, command);
	}
	return found != NULL ? 0 : -1;
}

/* -- signing in -- */

/* The device flow: the person types a code elsewhere, and we ask until that is done. */
static struct json *oauth_device(struct oauth_job *k)
{
	struct json *answer = NULL,
		    *codes = oauth_ask(k, k->oauth->device_url, NULL, "scope=%f", k->oauth->scope);
	long sec = strtol(oauth_text(codes, "interval"), NULL, 10);
	long limit_sec = strtol(oauth_text(codes, "expires_in"), NULL, 10);
	const char *code = oauth_text(codes, "device_code");
	int64_t began = now_ms();

	sec = sec > 0 && sec < 300 ? sec : 5; /* the standard of the RFC */
	limit_sec = limit_sec > 0 && limit_sec < 86400 ? limit_sec : 900;
	if (codes != NULL)
		log_info("open %s on any device and enter the code %s there, within %ld minutes",
			 oauth_text(codes, "verification_uri"), oauth_text(codes, "user_code"),
			 (limit_sec + 59) / 60);
	while (answer == NULL && k->e->code == E_NONE) {
		poll(NULL, 0, (int)sec * 1000);
		*k->error = '\0'; /* it is over if we say so: there is no other way then */
		if (stop_asked)
			err_set(k->e, E_STOPPED, "stopped by a signal");
		else if ((now_ms() - began) / 1000 >= limit_sec)
			err_set(k->e, E_ACCOUNT, "the code was not entered in time");
		else
			answer = oauth_ask(
				k, k->oauth->token_url, code,
				"grant_type=urn:ietf:params:oauth:grant-type:device_code&device_code=%f",
				code);
		if (strcmp(k->error, "slow_down") == 0)
			sec += 5;
		if (k->e->code == E_NET) {
			log_detail("%s", k->e->text);
			*k->e = (struct err){ 0 };
		}
	}
	json_free(codes);
	return answer;
}

/* Have a parameter of an address that is decoded, wherever it stands. Returns false if it has none. */
static bool oauth_parameter(const char *address, const char *name, char *out, size_t size)
{
	const size_t n = strlen(name);

	for (const char *p = address; (p = strstr(p, name)) != NULL; p += n) {
		if (p[n] != '=' ||
		    (p > address && (isalnum((unsigned char)p[-1]) || strchr("_-", p[-1]) != NULL)))
			continue;
		snprintf(out, size, "%.*s", (int)strcspn(p + n + 1, "&#\"'<> \t\r\n"), p + n + 1);
		return true;
	}
	return false;
}

/*
 * Find the code in what a person has pasted: an address, where it may stand within another parameter and
 * be encoded once more, or the code alone. Both texts are overwritten.
 */
static int oauth_code(struct oauth_job *k, char *pasted, const char *state, char *code, size_t size)
{
	char other[160], words[160] = "", *plain;

	for (int level = 0; level < 4 && (plain = curl_easy_unescape(NULL, pasted, 0, NULL)) != NULL;
	     level++) {
		strcpy(pasted, plain);
		wipe(plain, strlen(plain));
		curl_free(plain);
	}
	if (oauth_parameter(pasted, "error", k->error, sizeof k->error)) {
		oauth_parameter(pasted, "error_description", words, sizeof words);
		for (char *p = words; (p = strchr(p, '+')) != NULL;)
			*p = ' ';
		return oauth_refused(k, words, 0);
	}
	if (oauth_parameter(pasted, "code", code, size)) {
		if (!oauth_parameter(pasted, "state", other, sizeof other) || strcmp(other, state) == 0)
			return 0;
		return err_set(k->e, E_ACCOUNT,
			       "this address is of another sign-in (its \"state\" is not ours)");
	}
	pasted += strspn(pasted, " \t\r\n");
	snprintf(code, size, "%.*s", (int)strcspn(pasted, " \t\r\n"), pasted);
	if (*code != '\0' && strstr(code, "://") == NULL)
		return 0;
	return err_set(k->e, E_ACCOUNT, "no code in what was pasted; expected an address with code= in it");
}

/* The authorization code flow; it comes back by the hands of the person. */
static struct json *oauth_paste(struct oauth_job *k)
{
	const struct oauth *o = k->oauth;
	struct string t;
	struct json *answer = NULL;
	char verifier[44], challenge[44], state[44], code[8000];
	uint8_t random[48], hash[32];

	if (!random_octets(random, sizeof random)) {
		err_errno(k->e, E_SYSTEM, "no random numbers: /dev/urandom");
		return NULL;
	}
	base64(verifier, random, 32, "-_");
	base64(state, random + 32, 16, "-_");
	sha256(hash, verifier, strlen(verifier));
	base64(challenge, hash, sizeof hash, "-_");
	t = string_new(FORM_MAX);
	string_add(&t, "%s%sclient_id=%f&response_type=code&redirect_uri=%f&scope=%f&state=%f", o->auth_url,
		   strchr(o->auth_url, '?') != NULL ? "&" : "?", o->client_id, o->redirect, o->scope,
		   state);
	string_add(&t, "&code_challenge=%f&code_challenge_method=S256", challenge);
	if (o->email != NULL)
		string_add(&t, "&login_hint=%f", o->email);
	if (o->type == OAUTH_GOOGLE)
		string_add(&t, "&access_type=offline&prompt=consent");
	log_info("open this address in a browser on any device, and sign in:");
	fprintf(stderr, "%s\n", t.at); /* a line of the log may be too short for it */
	log_info("it ends on a page that is empty or cannot be shown: paste the page's whole address here, "
		 "and press Enter");
	line_read(STDIN_FILENO, t.at, t.size);
	if (stop_asked)
		err_set(k->e, E_STOPPED, "stopped by a signal");
	if (k->e->code == E_NONE && oauth_code(k, t.at, state, code, sizeof code) == 0)
		answer = oauth_ask(k, o->token_url, code,
				   "grant_type=authorization_code&code=%f&redirect_uri=%f&code_verifier=%f",
				   code, o->redirect, verifier);
	string_free(&t);
	wipe(code, sizeof code);
	wipe(verifier, sizeof verifier);
	wipe(random, sizeof random);
	return answer;
}

/*
 * Sign in: by the device flow where the provider has one, else, or if 'paste', by an address that the
 * person pastes into our standard input. With client_credentials there is only something to try.
 */
static int oauth_authorize(const struct config *c, const struct oauth *o, const struct trust *trust,
			   bool paste, struct err *e)
{
	static const char
		over[] = "access_denied authorization_declined expired_token bad_verification_code";
	struct oauth_job k = { .config = c, .oauth = o, .trust = trust, .e = e, .fd = -1, .lock = -1 };
	struct json *answer = NULL;

	if (log_to.level < LOG_INFO) /* -q: there is something that must be said */
		log_to.level = LOG_INFO;
	if (oauth_open(&k) == 0)
		oauth_write(&k, string_new(k.octets + OAUTH_MORE)); /* could a token be kept? */
	oauth_close(&k);
	if (e->code == E_NONE && o->client_credentials) {
		answer = oauth_refresh(&k);
	} else if (e->code == E_NONE && !paste && *o->device_url != '\0') {
		answer = oauth_device(&k);
		if (e->code == E_ACCOUNT && *k.error != '\0' && word_place(over, k.error) < 0) {
			log_warn("no sign-in by a code: %s", e->text);
			*e = (struct err){ 0 };
		}
	}
	if (answer == NULL && e->code == E_NONE)
		answer = oauth_paste(&k);
	if (answer != NULL && oauth_open(&k) == 0 && oauth_keep(&k, answer) == 0) {
		log_info("%s; the token is in %s", o->client_credentials ? "it works" : "signed in",
			 k.path);
		if (!o->client_credentials && *oauth_text(answer, "refresh_token") == '\0')
			log_warn("without a refresh token this sign-in ends soon; does \"scope\" lack "
				 "offline_access?");
	}
	json_free(answer);
	oauth_close(&k);
	return e->code == E_NONE ? 0 : -1;
}

/* ======== mailboxes: names, files, and which of them have news ======== */

/*
 * What an account's mailboxes are called, on the wire, to a person, and on disk; and the listing of them,
 * with what STATUS tells: no mailbox without news is opened.
 */

/* What a run has done, for the summary. */
struct counts {
	union { /* of a type that printf() has a letter for */
		struct {
			unsigned long long mailboxes, unchanged, stored, gone, back, octets, failures;
			unsigned long long others, others_new; /* left out: in all; first by this run */
			unsigned long long compared;           /* with the server's, octet by octet */
			unsigned long long mails, received;    /* that came, and their octets */
			unsigned long long connections, waits, in, out; /* octets on the wire */
		};
		unsigned long long all[16];
	};
};
_Static_assert(sizeof(struct counts) == 16 * sizeof(unsigned long long), "all of them are in 'all'");

/* One mailbox of an account, as the server lists it. */
struct mailbox {
	char *name;       /* on the wire; owned */
	char delimiter;   /* '\0': none */
	unsigned special; /* bits of special_uses */
	size_t prefix;    /* octets of the name that are the account's namespace prefix */
	bool selectable, wanted, has_news;
	bool alike; /* another one spells the same name differently: see mailbox_file() */
	struct imap_status status;
	uint32_t weight; /* mails that are probably new */
	uint32_t held;   /* and in its archive */
};

/* -- names -- */

enum { NAME_OCTETS = MBOX_NAME_MAX * 3 + 4 }; /* room for a decoded, or an escaped name */

/*
 * Write a part of a mailbox's name in modified UTF-7 (RFC 3501 5.1.3): what is not printable ASCII as UTF-16
 * in base64 between '&' and '-'. 'delimiter' becomes '_'.
 */
static size_t mutf7_encode(char *out, size_t size, const char *part, size_t n, char delimiter)
{
	uint8_t wide[NAME_OCTETS];
	char coded[2 * NAME_OCTETS];
	size_t length = 0, m = 0, octets;

	for (size_t i = 0; i <= n && length + 2 * m + 16 < size && m + 4 < sizeof wide;
	     i += octets > 0 ? octets : 1) {
		uint32_t code = '_';

		octets = i < n ? utf8_char((const uint8_t *)part + i, n - i, &code) : 0;
		if (code < 0x20 || code > 0x7E) {
			if (code > 0xFFFF) {
				wide[m++] = (uint8_t)((0xD7C0 + (code >> 10)) >> 8);
				wide[m++] = (uint8_t)(0xD7C0 + (code >> 10));
				code = 0xDC00 | (code & 0x3FF);
			}
			wide[m++] = (uint8_t)(code >> 8);
			wide[m++] = (uint8_t)code;
			continue;
		}
		if (m > 0)
			length += (size_t)sprintf(out + length, "&%s-", base64(coded, wide, m, "+,"));
		m = 0;
		if (i < n)
			out[length++] = code == (uint8_t)delimiter ? '_' : (char)code;
		if (i < n && code == '&')
			out[length++] = '-';
	}
	out[length] = '\0';
	return length;
}

/*
 * Decode modified UTF-7. Returns the length, or 0 if it is no such text, which encodes to itself: then the
 * raw octets are the name.
 */
static size_t mutf7_decode(char *out, size_t size, const char *text, size_t n)
{
	char copy[NAME_OCTETS], again[NAME_OCTETS];
	uint8_t wide[NAME_OCTETS];
	uint32_t high = 0;
	size_t length = 0, octets;

	snprintf(copy, sizeof copy, "%.*s", (int)n, text);
	for (const char *p = copy, *end; *p != '\0' && length + 5 <= size; p++) {
		if (*p != '&' || p[1] == '-') {
			out[length++] = *p;
			p += *p == '&';
			continue;
		}
		if ((end = strchr(p, '-')) == NULL)
			return 0;
		octets = base64_decode(wide, p + 1);
		for (size_t i = 0; i + 1 < octets && length + 5 <= size; i += 2) {
			uint32_t code = (uint32_t)wide[i] << 8 | wide[i + 1];

			if (code >= 0xDC00 && code <= 0xDFFF)
				code = 0x10000 + ((high & 0x3FF) << 10 | (code & 0x3FF));
			high = code;
			if (code < 0xD800 || code > 0xDBFF)
				length += utf8_put(out + length, code);
		}
		p = end;
	}
	return mutf7_encode(again, sizeof again, out, length, '\0') == n && memcmp(again, text, n) == 0 ? length
														 : 0;
}

/* The parts of a mailbox's name, one after the other. */
struct name {
	const char *rest; /* what follows, or NULL */
	char delimiter;
	bool raw;       /* the part is no modified UTF-7, so it stands here as it is on the wire */
	unsigned parts; /* so far */
	size_t n;       /* octets of the part; INBOX is in capitals where it comes first */
	char part[NAME_OCTETS];
};

/* Return true if there is another part. */
static bool name_next(struct name *w)
{
	size_t octets;

	if (w->rest == NULL)
		return false;
	octets = strcspn(w->rest, (char[2]){ w->delimiter });
	w->n = mutf7_decode(w->part, sizeof w->part, w->rest, octets);
	w->raw = w->n == 0;
	if (w->raw) {
		w->n = octets < sizeof w->part ? octets : sizeof w->part - 1;
		memcpy(w->part, w->rest, w->n);
	}
	w->part[w->n] = '\0';
	if (w->parts++ == 0 && strcasecmp(w->part, "INBOX") == 0)
		memcpy(w->part, "INBOX", 5);
	w->rest = w->rest[octets] != '\0' ? w->rest + octets + 1 : NULL;
	return true;
}

/* The name as a person writes it: UTF-8, with '/' between the parts. */
static void name_text(char out[NAME_OCTETS], const char *name, char delimiter)
{
	struct name w = { .rest = name, .delimiter = delimiter };
	size_t length = 0;

	*out = '\0';
	while (length < NAME_OCTETS && name_next(&w))
		length += (size_t)snprintf(out + length, NAME_OCTETS - length, "%s%s", w.parts > 1 ? "/" : "",
					   w.part);
}

/*
 * The archive's file name by the rule of DESIGN section 5, with ".mbox". Where another mailbox spells the same
 * name differently, a hash of the spelling keeps them apart, as it does where a name is too long.
 */
static void mailbox_file(const struct mailbox *box, char out[MBOX_FILE_MAX + 8])
{
	struct name w = { .rest = box->name, .delimiter = box->delimiter };
	char escaped[NAME_OCTETS * 3] = "";
	size_t length = 0, cut = 0;

	while (name_next(&w)) {
		if (w.parts > 1) /* after an empty part it would hide the file */
			length += (size_t)sprintf(escaped + length, length > 0 ? "." : "%%2E");
		length += mbox_escape(escaped + length, sizeof escaped - length, w.part, w.n,
				      (char[3]){ w.delimiter != '\0' ? '.' : '/', w.raw ? '&' : '/' });
	}
	if (length > MBOX_FILE_MAX || box->alike) {
		uint8_t hash[br_sha256_SIZE];

		sha256(hash, box->alike ? box->name : escaped, box->alike ? strlen(box->name) : length);
		/* at a character, or an escape */
		for (size_t i = 0; i <= MBOX_FILE_MAX - 9 && i <= length;
		     i += escaped[i] == '%' ? 3 : text_step(escaped + i))
			cut = i;
		length = cut + (size_t)snprintf(escaped + cut, 10, "~%02x%02x%02x%02x", hash[0], hash[1],
						hash[2], hash[3]);
	}
	memcpy(out, escaped, length);
	memcpy(out + length, ".mbox", 6);
}

/* Where the Python original put it: octets outside [a-zA-Z0-9._ -] dropped from the raw name. */
static void name_file_original(char out[MBOX_NAME_MAX + 8], const char *name, char delimiter)
{
	size_t length = 0;

	for (; *name != '\0' && length < MBOX_NAME_MAX; name++)
		if (delimiter != '\0' && *name == delimiter)
			out[length++] = '.';
		else if (isalnum((unsigned char)*name) || strchr("._ -", *name) != NULL)
			out[length++] = *name;
	memcpy(out + length, ".mbox", 6);
}

/*
 * Return true if one of the patterns matches the whole name, or any one part of it (INBOX in any case), or
 * is a special use that the mailbox has.
 */
static bool name_matches(const struct json *patterns, const struct mailbox *box)
{
	char text[NAME_OCTETS];

	if (patterns == NULL)
		return false;
	name_text(text, box->name, box->delimiter);
	for (const struct json *p = patterns->child; p != NULL; p = p->next) {
		struct name w = { .rest = box->name, .delimiter = box->delimiter };
		const bool inbox = strcasecmp(p->text, "INBOX") == 0;

		if (box->special & word_bit(special_uses, p->text) || match(p->text, text))
			return true;
		while (name_next(&w))
			if (match(p->text, w.part) || (inbox && strcasecmp(w.part, "INBOX") == 0))
				return true;
	}
	return false;
}

/* -- the mailboxes of an account -- */

/* All mailboxes that a server lists, and what is to be done with each. */
struct mailboxes {
	const struct config *config;
	const struct account *account;
	const struct json *only; /* -m: patterns, or NULL */
	const char *folder;      /* of the archives */
	struct imap *im;         /* while it lists */
	bool all;                /* whatever STATUS says, each is opened */
	bool folds;              /* the file system takes "a" and "A" for the same name */
	struct mailbox *boxes;   /* owned; planned: those with work first, largest first */
	uint32_t n, todo;
	uint32_t listed; /* LIST responses */
	unsigned broken[2]; /* how often the line broke while it listed, and at NAMESPACE: see mailboxes_list() */
	size_t name_octets;
	uint32_t *table[2]; /* owned: of MAILBOX_PLACES each, by enum mailbox_key */
	struct err odd;  /* the first mailbox that cannot be backed up for its name */
};

enum { MAILBOX_PLACES = 2 * MAILBOXES_MAX };

/* Make the list empty. There is room for all that it may hold: of this the system gives what is used. */
static void mailboxes_clear(struct mailboxes *l)
{
	for (uint32_t i = 0; i < l->n; i++)
		free(l->boxes[i].name);
	free(l->boxes);
	l->boxes = allocate(MAILBOXES_MAX * sizeof *l->boxes);
	for (int i = 0; i < 2; i++) {
		free(l->table[i]);
		l->table[i] = allocate(MAILBOX_PLACES * sizeof **l->table);
	}
	l->n = l->todo = l->listed = 0;
	l->name_octets = 0;
}

static void mailbox_path(const struct mailboxes *l, const char *file, char out[PATH_MAX_OCTETS + 300])
{
	snprintf(out, PATH_MAX_OCTETS + 300, "%s/%s", l->folder, file);
}

/* What a mailbox can be found by: its name on the wire, and its file. */
enum mailbox_key { BY_NAME, BY_FILE };

/* FNV-1a, in any case of letters. */
static uint32_t name_hash(const char *name)
{
	uint32_t hash = 2166136261u;

	for (; *name != '\0'; name++)
		hash = (hash ^ (uint8_t)tolower((unsigned char)*name)) * 16777619u;
	return hash;
}

/* Return true if that is the mailbox's name, or its file. */
static bool mailbox_is(const struct mailboxes *l, const struct mailbox *box, enum mailbox_key key,
		       const char *text)
{
	char file[MBOX_FILE_MAX + 8];

	if (key == BY_NAME)
		return (strcasecmp(text, "INBOX") == 0 ? strcasecmp : strcmp)(box->name, text) == 0;
	mailbox_file(box, file);
	return (l->folds ? strcasecmp : strcmp)(file, text) == 0;
}

/*
 * Look a mailbox up. Returns the place in the table: its number from 1 stands there, or 0 if there is none;
 * then one may be put there.
 */
static uint32_t *mailboxes_find(const struct mailboxes *l, enum mailbox_key key, const char *text)
{
	uint32_t *table = l->table[key], at = name_hash(text) % MAILBOX_PLACES;

	while (table[at] != 0 && !mailbox_is(l, &l->boxes[table[at] - 1], key, text))
		at = (at + 1) % MAILBOX_PLACES;
	return &table[at];
}

static int on_list(void *context, const char *name, size_t n, char delimiter, bool selectable,
		   unsigned special /* bits of special_uses */)
{
	struct mailboxes *l = context;
	uint32_t *place;

	if (l->listed++ < MAILBOXES_MAX) /* what is too much of them costs no connection yet */
		l->im->noise = 0;
	if (n > MBOX_NAME_MAX || n == 0 || strlen(name) != n || strpbrk(name, "\r\n") != NULL) {
		err_set(&l->odd, E_REFUSED,
			"the server lists a mailbox whose name is empty, has NUL octets or line ends, or "
			"more than %d octets: \"%.100s\"",
			MBOX_NAME_MAX, name);
		return 0;
	}
	place = mailboxes_find(l, BY_NAME, name);
	if (*place > 0) { /* old Couriers list one twice */
		l->boxes[*place - 1].selectable |= selectable;
		l->boxes[*place - 1].special |= special;
		return 0;
	}
	if (l->n == MAILBOXES_MAX || l->name_octets + n > MAILBOX_NAMES_MAX) {
		err_set(&l->odd, E_REFUSED,
			"the server lists more than %d mailboxes, or more than %d octets of their names",
			MAILBOXES_MAX, MAILBOX_NAMES_MAX);
		return 0;
	}
	l->name_octets += n;
	l->boxes[l->n++] = (struct mailbox){ .name = copy_text(name),
					     .delimiter = delimiter,
					     .selectable = selectable,
					     .special = special };
	*place = l->n;
	return 0;
}

static int on_status(void *context, const char *name, const struct imap_status *status)
{
	struct mailboxes *l = context;
	uint32_t i = *mailboxes_find(l, BY_NAME, name);

	if (i > 0 && !l->boxes[i - 1].status.known)
		l->im->noise = 0;
	if (i > 0)
		l->boxes[i - 1].status = *status;
	return 0;
}

/* Mark the mailboxes that are to be backed up. Returns how many they are. */
static uint32_t mailboxes_select(struct mailboxes *l)
{
	const struct json *only = l->account->mailboxes != NULL ? l->account->mailboxes
								: l->config->mailboxes;
	uint32_t n = 0;

	for (uint32_t i = 0; i < l->n; i++) {
		struct mailbox *box = &l->boxes[i];

		box->wanted = box->selectable && (l->only == NULL || name_matches(l->only, box)) &&
			      (only == NULL || name_matches(only, box)) &&
			      !name_matches(l->config->ignore, box) &&
			      !name_matches(l->account->ignore, box);
		n += box->wanted;
	}
	return n;
}

/*
 * List the account's mailboxes with their STATUS, in one command where the server can. 'sizes': ask for
 * octets, too. STATUS only saves work: where it is refused, or the line breaks at it, the mailbox will be
 * opened. Without NAMESPACE a prefix would be taken for a part of the names: it must break the line twice.
 */
static int mailboxes_list(struct mailboxes *l, struct imap *im, bool sizes, struct err *e)
{
	char items[100], quoted[2 * MBOX_NAME_MAX + 20];
	const bool extended = (im->capabilities & CAP_LIST_STATUS) != 0;
	bool with_status = extended && l->broken[0] == 0;
	/* "mailboxes" may name special uses, and the indexes keep them: what breaks the line is hardly this. */
	const char *uses = extended && im->capabilities & CAP_SPECIAL_USE && l->broken[0] > 0 && l->broken[0] < 3
				   ? " RETURN (SPECIAL-USE)"
				   : "";
	const struct imap_result *result;
	unsigned tag = 0;

	mailboxes_clear(l);
	l->im = im;
	im->context = l;
	im->on_list = on_list;
	im->on_status = on_status;
	if (im->capabilities & CAP_NAMESPACE && l->broken[1] < 2) {
		tag = imap_send(im, NULL, "NAMESPACE");
		if (im->flight == 1)
			imap_wait(im, tag);
	}
	snprintf(items, sizeof items, "(MESSAGES UIDNEXT UIDVALIDITY %s%s)",
		 im->capabilities & CAP_CONDSTORE ? "HIGHESTMODSEQ" : "UNSEEN",
		 sizes && im->capabilities & CAP_STATUS_SIZE ? " SIZE" : "");
	if (with_status) {
		result = imap_wait(im, imap_send(im, NULL, "LIST \"\" \"*\" RETURN (%sSTATUS %s)",
						 im->capabilities & CAP_SPECIAL_USE ? "SPECIAL-USE " : "",
						 items));
		/* strato.de lists nothing this way */
		with_status = result != NULL && result->condition == IMAP_OK &&
			      *mailboxes_find(l, BY_NAME, "INBOX") > 0;
	}
	if (!with_status && im->s.err.code == E_NONE)
		imap_refused(e, imap_wait(im, imap_send(im, NULL, "LIST \"\" \"*\"%s", uses)),
			     "listing the mailboxes");
	for (uint32_t i = 0; i < l->n; i++)
		if (strncasecmp(l->boxes[i].name, im->prefix, strlen(im->prefix)) == 0)
			l->boxes[i].prefix = strlen(im->prefix);
	mailboxes_select(l);
	for (uint32_t i = 0; !with_status && l->broken[0] < 3 && i < l->n && im->s.err.code == E_NONE; i++) {
		if (!l->boxes[i].wanted)
			continue;
		while (im->in_flight > STATUS_OCTETS || !imap_may_send(im))
			if (imap_answer(im) == NULL)
				break;
		imap_quote(im, quoted, sizeof quoted, l->boxes[i].name);
		imap_send(im, NULL, "STATUS %s %s", quoted, items);
	}
	imap_wait(im, im->tag);
	im->on_list = NULL;
	im->on_status = NULL;
	im->context = NULL;
	if (im->s.err.code == E_NET)
		l->broken[im->done + 1 == tag]++;
	if (e->code == E_NONE)
		*e = im->s.err;
	return e->code == E_NONE ? 0 : -1;
}

/*
 * What its index keeps of a mailbox for a restore to another server: the special uses, the delimiter, and
 * how much of the name is the prefix that this server puts before all names.
 */
static uint32_t mailbox_traits(const struct mailbox *box)
{
	return (uint32_t)box->prefix << 16 | (uint32_t)(uint8_t)box->delimiter << 8 | box->special;
}

/* Return true if the server says anything that the archive does not know. What is unknown is news. */
static bool mailbox_has_news(const struct mailbox *box, const struct mbox_info *info, bool keep_duplicates)
{
	const struct imap_status *status = &box->status;
	const struct mbox_claim *claim = &info->claim;

	if (!info->fits || !status->known || claim->traits != mailbox_traits(box) ||
	    status->uidvalidity == 0 || status->uidnext == 0 || status->uidvalidity != claim->uidvalidity ||
	    status->uidnext != claim->uidnext || status->messages != claim->messages ||
	    (keep_duplicates && info->others > 0))
		return true;
	if (status->highestmodseq != 0 || claim->highestmodseq != 0)
		return status->highestmodseq != claim->highestmodseq;
	return status->unseen == UINT32_MAX || status->unseen != claim->unseen;
}

/*
 * An archive of the Python original may stand under another name: give it ours, if it surely is
 * one, is nobody else's, and there is none yet.
 */
static void mailbox_adopt_original(const struct mailboxes *l, const struct mailbox *box)
{
	char original[MBOX_NAME_MAX + 8], other[MBOX_NAME_MAX + 8], own[MBOX_FILE_MAX + 8], head[12] = "";
	char from[PATH_MAX_OCTETS + 300], to[PATH_MAX_OCTETS + 300], index[PATH_MAX_OCTETS + 320];
	uint32_t owner;
	bool shared;
	ssize_t got;
	int fd;

	mailbox_file(box, own);
	name_file_original(original, box->name, box->delimiter);
	if (strcmp(original, own) == 0 || strlen(original) > 250)
		return;
	mailbox_path(l, original, from);
	mailbox_path(l, own, to);
	snprintf(index, sizeof index, "%s.index", from);
	if (access(to, F_OK) == 0 || access(index, F_OK) == 0 ||
	    (fd = open(from, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)) < 0)
		return;
	got = read(fd, head, sizeof head);
	close(fd);
	if (got != sizeof head || memcmp(head, "From nobody ", 12) != 0)
		return;
	owner = *mailboxes_find(l, BY_FILE, original);
	shared = owner > 0 && &l->boxes[owner - 1] != box;
	for (uint32_t i = 0; i < l->n; i++) {
		name_file_original(other, l->boxes[i].name, l->boxes[i].delimiter);
		shared = shared || (&l->boxes[i] != box && strcmp(other, original) == 0);
	}
	if (shared)
		log_warn("%s may be the archive of \"%s\" or of another mailbox: left alone", from, box->name);
	else if (rename(from, to) == 0)
		log_info("%s: renamed, it is now %s", from, own);
	else
		log_error("%s: cannot rename it to %s: %s", from, own, strerror(errno));
}

/* Return true if a folder's entry is an archive. */
static int is_archive(const struct dirent *entry)
{
	size_t n = strlen(entry->d_name);

	return n > 5 && strcmp(entry->d_name + n - 5, ".mbox") == 0;
}

/* Tell of archives in the folder that no mailbox has. */
static void mailboxes_tell_left(const struct mailboxes *l)
{
	DIR *folder = opendir(l->folder);
	struct dirent *entry;

	while (folder != NULL && (entry = readdir(folder)) != NULL)
		if (is_archive(entry) && *mailboxes_find(l, BY_FILE, entry->d_name) == 0)
			log_info("%s: the server has no such mailbox any more; the archive stays as it is",
				 entry->d_name);
	if (folder != NULL)
		closedir(folder);
}

static int mailbox_compare(const void *a, const void *b)
{
	const struct mailbox *first = a, *second = b;

	if (first->has_news != second->has_news)
		return first->has_news ? -1 : 1;
	if (first->weight != second->weight)
		return first->weight > second->weight ? -1 : 1;
	return strcmp(first->name, second->name);
}

/*
 * Enter a mailbox into the table by its file. Where two spell the same name differently, one gets a file
 * with a hash: the one whose archive the file is not, else the later one. Returns false, and complains,
 * if they would share an archive all the same.
 */
static bool mailbox_claim_file(struct mailboxes *l, uint32_t i)
{
	struct mailbox *box = &l->boxes[i], *other;
	char file[MBOX_FILE_MAX + 8], taken[MBOX_FILE_MAX + 8], path[PATH_MAX_OCTETS + 300];
	uint32_t *place;
	struct mbox_info info;

	mailbox_file(box, file);
	place = mailboxes_find(l, BY_FILE, file);
	if (*place == 0) {
		*place = i + 1;
		return true;
	}
	other = &l->boxes[*place - 1];
	mailbox_file(other, taken);
	if (!box->alike && !other->alike && strcmp(file, taken) == 0) {
		mailbox_path(l, file, path);
		mbox_peek(path, box->name, &info);
		if (info.stored > 0) {
			*place = i + 1;
			box = other;
		}
		box->alike = true;
		return mailbox_claim_file(l, (uint32_t)(box - l->boxes));
	}
	if (!box->wanted || !other->wanted) {
		*place = box->wanted ? i + 1 : *place;
		return true;
	}
	log_error("the mailboxes \"%s\" and \"%s\" would share the archive %s: the second is not backed up",
		  other->name, box->name, file);
	return false;
}

/*
 * Find out which of the mailboxes have news, and put these first, the largest first. Mailboxes that
 * would share an archive are counted as failures. 'dry': nothing is renamed.
 */
static void mailboxes_plan(struct mailboxes *l, bool dry, struct counts *counts)
{
	for (uint32_t i = 0; i < l->n; i++) {
		if (mailbox_claim_file(l, i))
			continue;
		counts->failures++;
		counts->mailboxes++;
		l->boxes[i].wanted = false;
	}
	for (uint32_t i = 0; i < l->n; i++) {
		struct mailbox *box = &l->boxes[i];
		char path[PATH_MAX_OCTETS + 300], file[MBOX_FILE_MAX + 8];
		struct mbox_info info;
		uint32_t live;

		if (!box->wanted)
			continue;
		if (!dry)
			mailbox_adopt_original(l, box);
		counts->mailboxes++;
		mailbox_file(box, file);
		mailbox_path(l, file, path);
		mbox_peek(path, box->name, &info);
		if (!l->all && !mailbox_has_news(box, &info, l->config->keep_duplicates)) {
			counts->unchanged++;
			counts->others += info.others;
			continue;
		}
		box->held = info.fits ? info.stored : (uint32_t)(info.octets / AHEAD_MAIL_OCTETS);
		live = info.stored - info.gone;
		box->weight = box->status.messages > live ? box->status.messages - live : 0;
		box->has_news = true;
		l->todo++;
	}
	if (!dry && l->only == NULL)
		mailboxes_tell_left(l);
	qsort(l->boxes, l->n, sizeof *l->boxes, mailbox_compare);
}

/* ======== archives: what is on disk, without a server ======== */

/* One archive of an account, and the mailbox that it is of. */
struct archive {
	const struct account *account;
	char path[PATH_MAX_OCTETS + 300];
	struct mailbox box;     /* as the index tells, or the file name */
	char name[NAME_OCTETS]; /* that is the box's */
	char text[NAME_OCTETS]; /* the same for a person */
	struct mbox *m;
	struct err err; /* what went wrong with it, if that is not told yet */
};

/* Say which mailbox the archive is of: what the index keeps, or the name that mailbox_file() made a file's of. */
static void archive_name(struct archive *a, const char *file)
{
	struct mbox_info info = { 0 };
	uint32_t traits;
	size_t n = 0, end = strlen(file) - 5; /* without .mbox */
	char text[NAME_OCTETS];

	if (a->m != NULL)
		mbox_tally(a->m, &info);
	traits = info.claim.traits;
	a->box = (struct mailbox){ .name = a->name,
				   .delimiter = traits != 0 ? (char)(traits >> 8 & 0xFF) : '/',
				   .special = traits & 0xFF,
				   .prefix = traits >> 16 };
	for (size_t i = 0; i < end && n < sizeof text; i++) {
		unsigned octet = file[i] == '.' ? '/' : (uint8_t)file[i];

		if (octet == '%' && i + 2 < end && sscanf(file + i + 1, "%2X", &octet) == 1) {
			octet = octet == '/' ? '_' : octet; /* within a part */
			i += 2;
		}
		text[n++] = (char)octet;
	}
	mutf7_encode(a->name, sizeof a->name, text, n, '\0');
	if (traits != 0)
		snprintf(a->name, sizeof a->name, "%s", info.name);
	name_text(a->text, a->name, a->box.delimiter);
}

/*
 * Open each archive of an account that -m does not exclude, in the order of their names, and hand it to
 * take(). Returns the status: 1 if one cannot be read, or take() returned it, 3 if one is locked.
 */
static int archives_walk(const struct config *c, const struct options *o, const struct account *account,
			 int (*take)(void *context, struct archive *a), void *context)
{
	struct archive *a = allocate(sizeof *a);
	char folder[PATH_MAX_OCTETS];
	struct dirent **files = NULL;
	int status = 0, one, n;
	bool any = o->mailboxes == NULL || o->what != NULL; /* one mail may be in any account */

	a->account = account;
	snprintf(folder, sizeof folder, "%s/%s", c->destination, account->email);
	log_context(account->email, "");
	if ((n = scandir(folder, &files, is_archive, alphasort)) < 0) {
		log_error("%s: %s", folder, strerror(errno));
		status = 1;
	}
	for (int i = 0; i < n; i++) {
		a->err = (struct err){ 0 };
		snprintf(a->path, sizeof a->path, "%s/%s", folder, files[i]->d_name);
		mbox_open(&a->m, a->path, "", MBOX_READ, &a->err);
		archive_name(a, files[i]->d_name);
		free(files[i]);
		one = stop_due();
		if (one == 0 && (o->mailboxes == NULL || name_matches(o->mailboxes, &a->box))) {
			any = true;
			log_context(account->email, a->text);
			one = a->err.code == E_LOCKED ? 3 : 1;
			if (a->m != NULL || o->mode == RUN_LIST)
				one = take(context, a);
		}
		if (mbox_close(a->m, NULL, NULL, &a->err) != 0)
			one = 1;
		if (one != 0 && a->err.code != E_NONE)
			log_write(a->err.code == E_LOCKED ? LOG_INFO : LOG_ERROR, "%s", a->err.text);
		status = status == 1 || one == 0 ? status : one;
	}
	free(files);
	free(a);
	if (n >= 0 && !any && !stop_due()) {
		log_error("no archive matches -m");
		status = 1;
	}
	return status;
}

/*
 * Hand the parent, for --json, a record of a mailbox: its name, its archive's file, and what the format says.
 * One that is too long for a record, as a name of a thousand quotes makes it, is left out.
 */
PRINTF(3, 4) static void report_box(const char *name, const char *file, const char *format, ...)
{
	struct string t = string_new(RECORD_MAX - 8);
	char more[RECORD_MAX];
	va_list arguments;
	int n;

	va_start(arguments, format);
	n = vsnprintf(more, sizeof more, format, arguments);
	va_end(arguments);
	string_add(&t, "{\"name\":%j,\"file\":%j%s}", name, file, more);
	if (!t.full && n < (int)sizeof more)
		report_record('B', t.at);
	string_free(&t);
}

/* -- verify -- */

static void on_finding(bool damage, off_t at, const char *id, const char *what)
{
	if (damage)
		log_error("damaged: at %lld%s%s: %s", (long long)at, id[0] != '\0' ? ", " : "", id, what);
	else
		log_info("at %lld: %s", (long long)at, what);
}

static int archive_verify(void *context, struct archive *a)
{
	char visible[NAME_OCTETS], octets[16];
	struct mbox_verify sum = { .tell = on_finding, .stop = stop_due };

	if (mbox_verify(a->m, &sum, &a->err) != 0)
		return 1;
	((struct counts *)context)->failures += sum.damaged;
	log_visible(visible, sizeof visible, a->text, strlen(a->text));
	if (!log_to.records)
		printf("%s %s: %lu mails, %lu gone, %s, %lu damaged\n", a->account->email, visible, sum.mails,
		       sum.gone, log_octets(octets, (uint64_t)sum.octets), sum.damaged);
	report_box(a->text, strrchr(a->path, '/') + 1,
		   ",\"mails\":%lu,\"gone\":%lu,\"octets\":%llu,\"damaged\":%lu", sum.mails, sum.gone,
		   (unsigned long long)sum.octets, sum.damaged);
	return 0;
}

/* -- export -- */

struct export {
	const struct options *o;
	struct mbox_id id[2]; /* of the one mail, without and with brackets */
	char name[2][1200];   /* its Message-ID likewise, which tells those without one of their own apart */
	struct mbox_mail mail; /* the first that was found, ... */
	struct mbox *m;        /* ... and its archive, left open to write it at the end. Owned */
	bool differs;          /* another one that was found */
	char place[PATH_MAX_OCTETS + 400]; /* of the first, or "" */
};

static int take_output(void *context, const void *octets, size_t n)
{
	(void)context;
	return fwrite(octets, 1, n, stdout) == n ? 0 : -1;
}

static bool export_wants(const struct export *x, const struct mbox_mail *mail)
{
	for (int i = 0; i < 2; i++)
		if (memcmp(&mail->id, &x->id[i], sizeof mail->id) == 0)
			return !mail->made || strcmp(mail->name, x->name[i]) == 0;
	return false;
}

/* Take in that the mail was found here: is it the same as elsewhere? */
static void export_compare(struct export *x, const struct archive *a, const struct mbox_mail *mail)
{
	char place[sizeof x->place];

	snprintf(place, sizeof place, "%s at %lld", a->path, (long long)mail->offset);
	if (x->place[0] == '\0') {
		x->mail = *mail;
		memcpy(x->place, place, sizeof place);
	} else if (mail->sum != x->mail.sum) {
		if (!x->differs)
			log_error("mails with this Message-ID differ: %s", x->place);
		log_error("and: %s", place);
		x->differs = true;
	}
}

static int archive_export(void *context, struct archive *a)
{
	struct export *x = context;
	struct mbox_mail mail;
	off_t at = 0;
	int failed = 0;

	while (failed == 0 && mbox_walk(a->m, &at, &mail, &a->err) > 0)
		if (x->o->mode == RUN_EXPORT && export_wants(x, &mail))
			export_compare(x, a, &mail);
		else if (x->o->mode == RUN_EXPORT_ALL && (!x->o->gone || mail.state & MBOX_GONE))
			failed = mbox_read(a->m, &mail, MBOX_AS_STORED, take_output, NULL, &a->err);
	if (x->m == NULL && x->place[0] != '\0') {
		x->m = a->m;
		a->m = NULL;
	}
	return failed != 0 || a->err.code != E_NONE;
}

/* Export. Returns the exit status. */
static int archives_export(const struct config *c, const struct options *o)
{
	struct export x = { .o = o };
	struct mbox_header header;
	struct err e = { 0 };
	char field[1300];
	int status = 0, one;

	for (int i = 0; i < 2 && o->what != NULL; i++) {
		snprintf(x.name[i], sizeof x.name[i], "%s%.1100s%s", i > 0 ? "<" : "", o->what,
			 i > 0 ? ">" : "");
		snprintf(field, sizeof field, "Message-ID: %s\n\n", x.name[i]);
		mbox_header_init(&header);
		mbox_header_feed(&header, field, strlen(field));
		mbox_header_end(&header, &x.id[i]);
	}
	for (unsigned i = 0; i < c->n_accounts; i++) {
		if (!c->accounts[i].wanted)
			continue;
		one = archives_walk(c, o, &c->accounts[i], archive_export, &x);
		status = status == 1 || one == 0 ? status : one;
	}
	log_context("", "");
	if (o->what != NULL && x.m == NULL)
		err_set(&e, E_FORMAT, "%s: not found", o->what);
	else if (o->what != NULL && !x.differs)
		mbox_read(x.m, &x.mail, MBOX_LF, take_output, NULL, &e);
	mbox_close(x.m, NULL, NULL, &e);
	if (e.code != E_NONE)
		log_error("%s", e.text);
	return output_end(e.code != E_NONE || x.differs ? 1 : status);
}

/* ======== sync: makes one archive match its mailbox ======== */

/*
 * As many mailboxes as the wire takes are in hand at a time. Each is a struct sync, with an archive, sets
 * of UIDs and a stage; it only ever says what it has to send (sync_due), sends it, and looks at the answers
 * to its own commands (sync_answered). When, the next chapter decides.
 *
 * A server answers a connection's commands one mailbox after the other. When a mailbox has something to
 * ask after the next one was opened, its EXAMINE goes in front once more.
 */
enum sync_kind {
	KIND_NONE, /* nothing to be sent */
	KIND_EXAMINE,
	KIND_LISTING, /* which UIDs are there? */
	KIND_FLAGS,
	KIND_IDS,      /* Message-IDs of UIDs */
	KIND_MADE_IDS, /* what made Message-IDs are made of */
	KIND_MAILS,
	KIND_MAIL,         /* a single one, as it did not come with others, or may break the line */
	KIND_STILL_LISTED, /* which of the mails that did not come are there? */
	KIND_AGAIN,        /* both kinds of IDs: asked as KIND_IDS, once all are bound whose sizes fit */
	KIND_UNFIT,        /* never asked: those of the batch in hand for KIND_AGAIN */
	KINDS
};

/* What is asked of UIDs, and what is to be asked of those that it leaves undone. */
static const struct {
	const char *items;
	enum sync_kind then;
} fetches[KINDS] = {
	[KIND_FLAGS] = { "(FLAGS)", KIND_NONE },
	[KIND_IDS] = { "(UID FLAGS RFC822.SIZE BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])", KIND_MAILS },
	[KIND_MADE_IDS] = { "(UID FLAGS RFC822.SIZE BODY.PEEK[HEADER.FIELDS (From To Cc Date Subject)])",
			    KIND_MAILS },
	[KIND_MAILS] = { "(UID FLAGS INTERNALDATE BODY.PEEK[])", KIND_MAIL },
	[KIND_MAIL] = { "(UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])", KIND_STILL_LISTED },
	[KIND_AGAIN] = { "(UID FLAGS RFC822.SIZE BODY.PEEK[HEADER.FIELDS "
			 "(Message-ID From To Cc Date Subject)])",
			 KIND_MAILS },
};

enum sync_stage {
	SYNC_CLOSED,  /* its turn has not come, or the line broke */
	SYNC_LIST,    /* listing, flags, and what STATUS lets expect: the answers decide how it goes on */
	SYNC_FETCH,   /* what is not known is asked for, and told by its Message-ID or stored */
	SYNC_RECHECK, /* is what did not come still there? Then what the server has no more is marked */
	SYNC_OVER
};

/* How to ask for the listing: ever more simply, where the server fails. */
enum listing_way { LISTING_ESEARCH, LISTING_SEARCH, LISTING_FETCH };

/* What is remembered of a mailbox from one connection to the next, within a worker. */
struct attempt {
	uint32_t careful_uid;        /* the line broke: one mail at a time now, up to this one; or 0 */
	bool careful_asks;           /* it broke at a header: those too */
	uint32_t broken_uid;         /* the mail that was asked for alone when it broke, or 0 */
	bool doubtful;               /* mails were refused with a request to wait; it may be one of them */
	bool reopened;               /* the archive did not fit, and was put in order */
	bool literal;                /* the server does not take the name as a quoted string ... */
	bool plain;                  /* ... or EXAMINE with (CONDSTORE), or the line broke there */
	enum listing_way way;        /* the first that did not break the line */
	unsigned rekeys;             /* how often UIDVALIDITY was new */
	unsigned vague;              /* single mails in a row that were refused with a request to wait */
	struct set poison;           /* owned: mails that broke the line twice, not asked for again */
	unsigned row;                /* how many of them since a mail came */
};

/* What a FETCH response has brought so far, and how it is taken in. */
struct incoming {
	enum { GETS_NOTHING, GETS_LITERAL, GOT_MAIL } gets;
	struct mbox_header header; /* of the literal in hand */
	struct imap_fetch apart[APART_MAX]; /* by UID, of responses without a mail: all else may come so */
	struct imap_fetch mail;    /* GOT_MAIL: it is whole, but its INTERNALDATE may yet come */
	uint32_t told;             /* flags of known mails */
};

struct sync {
	struct session *session;   /* borrowed */
	const struct mailbox *box; /* borrowed */
	struct sync *next;         /* begun after this one */
	struct attempt attempt;
	struct counts counts;
	struct err err; /* why it cannot go on */
	enum sync_stage stage;
	struct mbox *m;
	bool empty;                   /* the archive was: nothing can be known already */
	bool unfit;                   /* what is bound now may be of another size than what is stored */
	bool sampled;                 /* what is fetched now is compared with what is stored */
	bool complete;                /* the listing was: what is not in it has gone */
	struct mbox_claim old, claim; /* of the last complete pass; and, once EXAMINE told, of this one */
	uint64_t since;               /* HIGHESTMODSEQ for CHANGEDSINCE, while it lists; 0: all flags are */
	unsigned pending, awaited;    /* commands on the wire; of these listings and flags */
	unsigned windows;             /* how often not all was looked at: MESSAGELIMIT */
	uint32_t foresee;             /* the next UID to be asked for before the listing is known, or 0 */
	struct set listing, todo[KINDS]; /* UIDs: which there are, and of which each kind is to be asked */
	struct incoming in;
};

/* A connection, and the mailboxes in hand on it. */
struct session {
	const struct config *config;
	struct mailboxes *list; /* for the archives' places */
	struct imap *im;
	bool dry;           /* say what would be done */
	bool alone;         /* only one mailbox at a time is in hand: see sync_examined() */
	bool compare;       /* dry, and all mails are told by their Message-IDs, some octet by octet */
	uint64_t mails, octets; /* that came over it, to guess the size of a batch */
	uint64_t steps;         /* mails told by their Message-IDs, or found to break the line: progress */
	struct sync *first;     /* the mailboxes in hand, in the order in which they were begun. Owned */
	/* Another mailbox to begin, closed; NULL: there is none, or not now. 'ahead': others are in hand. */
	struct sync *(*begin)(void *context, bool ahead);
	void (*progress)(void *context, uint64_t mails, uint64_t octets); /* that came */
	/* This one is over, for good or with y->err; it is unlinked, and freed behind this. */
	void (*over)(void *context, struct sync *y);
	void *context;
};

static int sync_fail(struct sync *y, const struct err *e)
{
	if (y->err.code == E_NONE)
		y->err = *e;
	return -1;
}

static int sync_out_of_room(struct sync *y)
{
	return err_set(&y->err, E_FORMAT,
		       "more than %d mails, or gaps between them: the most that one mailbox may have",
		       MBOX_MAILS_MAX);
}

static int sync_add(struct sync *y, struct set *set, uint32_t low, uint32_t high)
{
	return set_add(set, low, high) ? 0 : sync_out_of_room(y);
}

/* -- what comes -- */

/* Return the oldest command without an answer if it asks for a listing of the mailbox, else NULL. */
static const struct command *sync_listing(const struct sync *y)
{
	const struct imap *im = y->session->im;
	const struct command *c = &im->ring[(im->done + 1) % IMAP_RING];
	bool lists = c->kind == KIND_LISTING || c->kind == KIND_STILL_LISTED;

	return im->done < im->tag && c->owner == y && lists ? c : NULL;
}

/* Return true if a command on the wire asks for this UID, its header or its mail. */
static bool sync_asked(const struct sync *y, uint32_t uid)
{
	const struct imap *im = y->session->im;

	for (unsigned tag = im->taken + 1; y->pending > 0 && tag <= im->tag; tag++) {
		const struct command *c = &im->ring[tag % IMAP_RING];

		for (unsigned k = 0; c->owner == y && c->kind > KIND_FLAGS && k < c->n; k++)
			if (uid >= c->ranges[k].low && uid <= c->ranges[k].high)
				return true;
	}
	return false;
}

static int on_uids(void *context, uint32_t from, uint32_t to)
{
	struct sync *y = context;
	uint32_t low = from < to ? from : to, high = from < to ? to : from;
	const struct command *c = y != NULL ? sync_listing(y) : NULL;

	if (c == NULL)
		return 0;
	if (high - low >= MBOX_MAILS_MAX)
		return sync_out_of_room(y);
	if (c->kind == KIND_LISTING)
		return sync_add(y, &y->listing, low, high);
	for (unsigned k = 0; k < c->n; k++) { /* some list all, whatever they are asked for */
		uint32_t first = low > c->ranges[k].low ? low : c->ranges[k].low,
			 last = high < c->ranges[k].high ? high : c->ranges[k].high;

		if (first <= last && sync_add(y, &y->listing, first, last) != 0)
			return -1;
	}
	return 0;
}

static bool sync_wants(const struct sync *y, uint32_t uid)
{
	return uid != 0 && (y->sampled ? mbox_place(y->m, uid) >= 0 : mbox_next_uid(y->m, uid) != uid) &&
	       sync_asked(y, uid);
}

/* A mail, or its header, has come: the line is not broken by it, nor by those before it. */
static void sync_passed(struct sync *y, uint32_t uid, bool mail)
{
	y->session->im->noise = 0;
	y->attempt.row = mail ? 0 : y->attempt.row;
	if (uid >= y->attempt.careful_uid && (mail || y->attempt.careful_asks))
		y->attempt.careful_uid = 0;
}

/* What one response tells of a mail, and another does not. */
static void fetch_merge(struct imap_fetch *to, const struct imap_fetch *from)
{
	if (from->uid != to->uid)
		return;
	to->date_sec = to->has_date ? to->date_sec : from->date_sec;
	to->flags = to->has_flags ? to->flags : from->flags;
	to->size = to->has_size ? to->size : from->size;
	to->has_date = to->has_date || from->has_date;
	to->has_flags = to->has_flags || from->has_flags;
	to->has_size = to->has_size || from->has_size;
}

/* A mail of the sample has come: is it what is stored? */
static int sample_end(struct sync *y, uint32_t uid, bool differs)
{
	off_t at = mbox_place(y->m, uid);
	struct err unnoted = { 0 };
	struct mbox_mail mail = { .made = false };

	if (differs && mbox_walk(y->m, &at, &mail, &y->err) < 0)
		return -1;
	y->counts.compared += !mail.made;
	y->counts.failures += differs && !mail.made;
	if (!differs || mail.made) /* the original put one in front of an ID that it overlooked */
		return 0;
	log_error("damaged: at %lld, %s: it differs from the server's, UID %lu", (long long)mail.offset,
		  mail.name, (unsigned long)uid);
	if (mbox_note(y->m, mail.offset, &unnoted) != 0)
		log_warn("%s: the next backup will not heal it", unnoted.text);
	return 0;
}

/* Store the mail that has come as a whole, if there is one, or compare it. */
static int sync_store(struct sync *y)
{
	struct imap_fetch *mail = &y->in.mail;
	int stored;

	if (y->in.gets != GOT_MAIL)
		return 0;
	y->in.gets = GETS_NOTHING;
	if (!mail->has_date && !parse_date(mbox_date(y->m), &mail->date_sec))
		mail->date_sec = 0;
	stored = mbox_end(y->m, mail->uid, mail->date_sec, mail->flags, &y->err);
	if (stored < 0 || (y->sampled && sample_end(y, mail->uid, stored > 0) != 0))
		return -1;
	y->session->mails++;
	if ((!mail->has_flags && sync_add(y, &y->todo[KIND_FLAGS], mail->uid, mail->uid) != 0) ||
	    (stored == 0 && mail->has_flags && mbox_set_flags(y->m, mail->uid, mail->flags, &y->err) != 0))
		return -1;
	sync_passed(y, mail->uid, true);
	y->attempt.vague = 0;
	y->session->progress(y->session->context, (unsigned)stored, 0);
	return stop_due() ? err_set(&y->err, E_STOPPED, "stopped by a signal") : 0;
}

static int on_literal(void *context, const struct imap_fetch *fetch)
{
	struct sync *y = context;

	if (y == NULL || !y->session->im->selected || y->err.code != E_NONE)
		return 0;
	if (sync_store(y) != 0)
		return -1;
	if (fetch->uid != 0 ? !sync_wants(y, fetch->uid) : y->pending == 0)
		return 0; /* nobody asked for it */
	if (fetch->section != SECTION_MAIL)
		mbox_header_init(&y->in.header);
	else if (y->session->dry && !y->sampled)
		return 0;
	else if (mbox_begin(y->m, &y->err) != 0)
		return -1;
	y->in.gets = GETS_LITERAL;
	return 1;
}

static int on_octets(void *context, const struct imap_fetch *fetch, const void *octets, size_t n)
{
	struct sync *y = context;

	if (fetch->section == SECTION_MAIL) {
		y->counts.octets += n;
		y->session->octets += n;
		y->session->progress(y->session->context, 0, n);
		return mbox_write(y->m, octets, n, &y->err);
	}
	mbox_header_feed(&y->in.header, octets, n);
	return 0;
}

/*
 * The answer to a question for a header has come: is the mail stored already? Then these are its
 * flags; whatever told them before it was known went past.
 */
static int sync_bind(struct sync *y, const struct imap_fetch *fetch)
{
	struct mbox_id id;
	int known;

	y->in.gets = GETS_NOTHING;
	if (!sync_wants(y, fetch->uid))
		return imap_noise(y->session->im, fetch->octets);
	sync_passed(y, fetch->uid, false);
	if (!mbox_header_end(&y->in.header, &id) && fetch->section != SECTION_MADE)
		return sync_add(y, &y->todo[KIND_MADE_IDS], fetch->uid, fetch->uid);
	known = mbox_bind(y->m, fetch->uid, &id, fetch->size, y->unfit, &y->err);
	if (known > 1)
		return sync_add(y, &y->todo[KIND_UNFIT], fetch->uid, fetch->uid);
	if (known == 0 && y->session->dry)
		y->counts.octets += fetch->size;
	/* That is progress, if it lasts. */
	y->session->steps += known > 0 && !y->session->dry && y->attempt.rekeys <= 1;
	if (known <= 0)
		return known;
	return fetch->has_flags ? mbox_set_flags(y->m, fetch->uid, fetch->flags, &y->err)
				: sync_add(y, &y->todo[KIND_FLAGS], fetch->uid, fetch->uid);
}

static int on_fetch(void *context, const struct imap_fetch *fetch)
{
	struct sync *y = context;
	struct imap_fetch all = *fetch; /* that has been told of the mail */
	bool lists, whole;

	if (y == NULL || !y->session->im->selected || y->err.code != E_NONE)
		return 0;
	fetch_merge(&all, &y->in.apart[fetch->uid % APART_MAX]);
	if (y->in.gets == GETS_LITERAL && fetch->section != SECTION_MAIL)
		return sync_bind(y, &all);
	if (y->in.gets == GETS_LITERAL) {
		/* One that is really empty has a size that says so: else it will be asked for by itself. */
		whole = all.octets > 0 || (all.has_size && all.size == 0);
		y->in.gets = whole && sync_wants(y, fetch->uid) ? GOT_MAIL : GETS_NOTHING;
		if (y->in.gets == GETS_NOTHING) {
			mbox_abort(y->m);
			return imap_noise(y->session->im, fetch->octets);
		}
		y->in.mail = all;
		return all.has_date ? sync_store(y) : 0;
	}
	if (y->in.gets == GOT_MAIL) {
		fetch_merge(&y->in.mail, fetch);
		if (sync_store(y) != 0)
			return -1;
	}
	if (fetch->uid == 0)
		return 0;
	y->in.apart[fetch->uid % APART_MAX] = all;
	lists = y->attempt.way == LISTING_FETCH && sync_listing(y) != NULL;
	if (lists && on_uids(y, fetch->uid, fetch->uid) != 0)
		return -1;
	if ((lists || mbox_next_uid(y->m, fetch->uid) == fetch->uid) &&
	    y->in.told++ < 2 * MBOX_MAILS_MAX) /* the listing, and once more if UIDVALIDITY is new */
		imap_useful(y->session->im, IMAP_LINE_MAX);
	return fetch->has_flags ? mbox_set_flags(y->m, fetch->uid, fetch->flags, &y->err) : 0;
}

/* -- what is asked -- */

/* A command of the mailbox's is on the wire, unless its tag is 0. */
static int sync_sent(struct sync *y, enum sync_kind kind, unsigned tag)
{
	struct imap *im = y->session->im;
	struct command *c = &im->ring[tag % IMAP_RING];

	if (tag == 0)
		return sync_fail(y, &im->s.err);
	c->owner = y;
	c->kind = kind;
	y->pending++;
	y->awaited += kind == KIND_LISTING || kind == KIND_FLAGS;
	c->examines = kind == KIND_EXAMINE;
	im->wire = y;
	return 0;
}

/* Only so asked does each server tell HIGHESTMODSEQ of each mailbox (RFC 7162 3.1.8). */
static int sync_send_examine(struct sync *y)
{
	struct imap *im = y->session->im;
	const char *condstore = im->capabilities & CAP_CONDSTORE && !y->attempt.plain ? " (CONDSTORE)" : "";
	char quoted[2 * MBOX_NAME_MAX + 20];
	unsigned tag;

	if (!y->attempt.literal)
		return sync_sent(y, KIND_EXAMINE,
				 imap_send(im, NULL, "EXAMINE %s%s",
					   imap_quote(im, quoted, sizeof quoted, y->box->name), condstore));
	snprintf(quoted, sizeof quoted, "%s%s", y->box->name, condstore);
	tag = imap_send(im, NULL, "EXAMINE {%zu}", strlen(y->box->name));
	if (sync_sent(y, KIND_EXAMINE, tag) != 0)
		return -1;
	imap_continue(im, tag, quoted);
	return im->s.err.code != E_NONE ? sync_fail(y, &im->s.err) : 0;
}

/* Ask which of these UIDs, a sequence set, the mailbox has. Returns the tag. */
static unsigned sync_send_listing(struct sync *y, const char *uids)
{
	struct imap *im = y->session->im;
	bool esearch = y->attempt.way == LISTING_ESEARCH && im->capabilities & CAP_ESEARCH;
	bool all = strcmp(uids, "1:4294967295") == 0;

	if (y->attempt.way == LISTING_FETCH)
		return imap_send(im, NULL, "UID FETCH %s (UID)", all ? "1:*" : uids);
	return imap_send(im, NULL, "UID SEARCH%s %s%s", esearch ? " RETURN (ALL)" : "", all ? "" : "UID ",
			 all ? "ALL" : uids);
}

/*
 * Return true if enough mails are on their way for now. They come before the answer to COMPRESS would:
 * as long as the line may turn out to be slow, they are two batches, or more if these are small.
 */
static bool sync_holds_back(const struct sync *y)
{
	const struct session *s = y->session;
	const struct imap *im = s->im;
	uint64_t batch = s->mails > 0 ? s->octets / s->mails * s->config->email_batch : COMPRESS_OCTETS;
	unsigned batches = 0;

	for (unsigned tag = im->taken + 1; tag <= im->tag; tag++)
		batches += im->ring[tag % IMAP_RING].kind == KIND_MAILS;
	return batches >= 2 && batches * batch >= COMPRESS_OCTETS &&
	       im->s.connect_ms >= COMPRESS_CONNECT_MS && im->s.in < 4 * COMPRESS_OCTETS &&
	       imap_may_compress(im);
}

/* Where STATUS is to be believed, the first UID that it lets expect: new, or of an archive without UIDs. */
static uint32_t sync_foresees(const struct sync *y)
{
	const struct imap_status *status = &y->box->status;

	if (!status->known || status->messages == 0 || y->session->im->flight == 1 ||
	    y->attempt.careful_uid != 0 || y->attempt.poison.n > 0)
		return 0;
	if (!y->empty && y->old.uidvalidity == status->uidvalidity)
		return y->old.uidnext < status->uidnext ? y->old.uidnext : 0;
	return status->uidnext > 1;
}

/* Return true once EXAMINE has told of the mailbox. */
static bool sync_is_open(const struct sync *y)
{
	return y->claim.when_sec != 0;
}

/* Return true if no mail can be stored already, so that nothing is gained by asking for Message-IDs. */
static bool sync_fetches_all(const struct sync *y)
{
	return y->empty && !y->session->dry;
}

/* Return true if the server shows only the newest mails, as it seems: some show no more than these. */
static bool sync_has_window(const struct sync *y)
{
	uint32_t n = y->claim.messages;

	return n == 1000 || n == 2000 || n == 5000 || n == 10000;
}

/* mbox_drop_uids()' question. Below a window that the server shows nothing is proved. */
static bool sync_lives(void *context, uint32_t uid)
{
	struct sync *y = context;

	return set_next(&y->listing, uid) == uid || (sync_has_window(y) && uid < set_next(&y->listing, 1));
}

/* The listing and the flags are known: what is not stored is to be asked about, or at once to be fetched. */
static int sync_plan(struct sync *y)
{
	enum sync_kind unknown = sync_fetches_all(y) ? KIND_MAILS : KIND_IDS, kind;

	y->foresee = 0;
	if (y->complete)
		mbox_drop_uids(y->m, sync_lives, y);
	for (size_t i = 0; i < y->listing.n; i++)
		for (uint64_t u = y->listing.ranges[i].low; u <= y->listing.ranges[i].high; u++) {
			uint32_t uid = (uint32_t)u;

			if (mbox_next_uid(y->m, uid) == uid || sync_asked(y, uid))
				continue;
			kind = set_next(&y->attempt.poison, uid) == uid ? KIND_STILL_LISTED : unknown;
			if (sync_add(y, &y->todo[kind], uid, uid) != 0)
				return -1;
		}
	y->stage = SYNC_FETCH;
	return 0;
}

/*
 * All that is stored was found at the server by its Message-ID, or is gone; what only the server has is due as a mail.
 * Of that, what the last complete backup should have is damage. Then choose at random what to compare.
 */
static int sync_sample(struct sync *y)
{
	const uint32_t should = y->claim.uidvalidity == y->old.uidvalidity ? y->old.uidnext : 0;
	uint32_t left = 0, due, uid;

	for (uid = 1; (uid = set_next(&y->todo[KIND_MAILS], uid)) != 0 && uid < UINT32_MAX; uid++) {
		y->counts.stored += uid >= should;
		if (uid < should && sync_add(y, &y->todo[KIND_STILL_LISTED], uid, uid) != 0)
			return -1;
	}
	set_clear(&y->todo[KIND_MAILS]);
	y->sampled = true;
	for (uid = 1; (uid = mbox_next_uid(y->m, uid)) != 0 && uid < UINT32_MAX; uid++)
		left += mbox_place(y->m, uid) >= 0;
	due = left / SAMPLE_PART > SAMPLE_MIN ? left / SAMPLE_PART : SAMPLE_MIN;
	for (uid = 1; due > 0 && (uid = mbox_next_uid(y->m, uid)) != 0 && uid < UINT32_MAX; uid++) {
		if (mbox_place(y->m, uid) < 0 || (uint32_t)rand() % left-- >= due)
			continue;
		due--;
		if (sync_add(y, &y->todo[KIND_MAILS], uid, uid) != 0)
			return -1;
	}
	return 0;
}

/* All that did not come was asked about again: those that are still listed are failures. */
static void sync_count_failures(struct sync *y)
{
	uint64_t n;
	struct range ranges[BATCH_RANGES];
	char uids[SET_TEXT_OCTETS];

	if ((n = set_count(&y->listing)) == 0)
		return;
	y->counts.failures += n;
	set_take(&y->listing, UINT_MAX, ranges, uids);
	set_clear(&y->listing); /* once, also if this stage is begun again */
	log_error("%llu mails listed that %s: UID %.100s", (unsigned long long)n,
		  y->session->compare ? "the last backup should have, and has not" : "could not be fetched", uids);
}

/* Everything that is listed is stored, known, or failed: mark what has gone. */
static int sync_mark(struct sync *y)
{
	struct mbox_info info;
	uint32_t live, gone, moved[2];

	mbox_tally(y->m, &info);
	y->stage = SYNC_OVER;
	if (y->claim.uidnext <= mbox_last_uid(y->m)) /* mail came meanwhile, or it never tells the truth */
		y->claim.uidnext = 0;
	/* Of a mail that had no UID yet nobody knows if it lies in the window, or is one that failed. */
	if (y->complete && (info.unbound == 0 || (!sync_has_window(y) && y->counts.failures == 0))) {
		if (mbox_mark_gone(y->m, &live, &gone, moved, &y->err) != 0)
			return -1;
		y->counts.gone += gone;
		if (live >= 100 && gone > live / 2)
			log_warn("%lu of %lu mails have gone from the server at once", (unsigned long)gone,
				 (unsigned long)live);
		if (moved[1] != 0) { /* these live on under another UID, and get its flags */
			y->since = 0;
			y->stage = SYNC_RECHECK;
			return sync_add(y, &y->todo[KIND_FLAGS], moved[0], moved[1]);
		}
	}
	return 0;
}

/* Return the first of the kinds, up to one of them, of which there is something to be asked. */
static enum sync_kind sync_first_todo(const struct sync *y, enum sync_kind last)
{
	for (unsigned kind = KIND_NONE; kind <= last; kind++)
		if (y->todo[kind].n > 0)
			return kind;
	return KIND_NONE;
}

/* No command of the stage is left, sent or to be sent: begin the next one. */
static void sync_next_stage(struct sync *y)
{
	if (y->stage == SYNC_RECHECK) {
		sync_count_failures(y);
		sync_mark(y);
	} else if (y->todo[KIND_AGAIN].n > 0) {
		y->unfit = true;
		set_free(&y->todo[KIND_IDS]);
		y->todo[KIND_IDS] = y->todo[KIND_AGAIN];
		y->todo[KIND_AGAIN] = (struct set){ 0 };
	} else if (y->session->compare && !y->sampled) {
		sync_sample(y);
	} else {
		y->counts.stored += y->session->dry ? set_count(&y->todo[KIND_MAILS]) : 0;
		set_clear(&y->listing);
		y->stage = SYNC_RECHECK;
	}
}

/*
 * Go on as far as no command is needed, and say what to send next: KIND_NONE if the answers must come
 * first, or if the mailbox is over, or fails (y->err).
 */
static enum sync_kind sync_due(struct sync *y)
{
	static const enum sync_kind last[] = { [SYNC_LIST] = KIND_FLAGS,
					       [SYNC_FETCH] = KIND_MAIL,
					       [SYNC_RECHECK] = KIND_STILL_LISTED };
	const struct session *s = y->session;
	const bool careful = y->attempt.careful_uid != 0;

	while (y->err.code == E_NONE && y->stage != SYNC_CLOSED && y->stage != SYNC_OVER) {
		enum sync_kind most = s->dry && !y->sampled && last[y->stage] > KIND_MADE_IDS
						      ? KIND_MADE_IDS
						      : last[y->stage];
		enum sync_kind kind = sync_first_todo(y, most);

		if (y->stage == SYNC_LIST) {
			/* Without STATUS the mailbox itself must first tell of itself. */
			if (!sync_is_open(y) && !y->box->status.known)
				return s->im->wire != y ? KIND_EXAMINE : KIND_NONE;
			if (kind != KIND_NONE || y->foresee == 0 || y->awaited == 0)
				return kind;
			if (sync_fetches_all(y))
				return sync_holds_back(y) ? KIND_NONE : KIND_MAILS;
			return KIND_IDS;
		}
		if (careful && y->pending > 0)
			return KIND_NONE;
		/* Mails wait for all Message-IDs, unless they are many. */
		if (most == KIND_MAIL && kind != KIND_NONE && kind != KIND_MAIL &&
		    set_count(&y->todo[KIND_MAILS]) >=
			    (kind < KIND_MAILS ? 2 * s->config->email_batch : 1) &&
		    !sync_holds_back(y))
			return careful ? KIND_MAIL : KIND_MAILS;
		if (kind == KIND_MAILS || (kind == KIND_MAIL && y->pending > 0))
			return KIND_NONE;
		if (kind != KIND_NONE || y->pending > 0)
			return kind;
		sync_next_stage(y);
	}
	return KIND_NONE;
}

/* Have UIDs that STATUS lets expect asked for: a batch, or, unless most are gaps, as many as the wire takes. */
static int sync_foresee(struct sync *y, enum sync_kind kind, unsigned most)
{
	const struct imap_status *status = &y->box->status;
	uint32_t first = y->foresee, left = status->uidnext - first;
	bool all = (y->empty || y->old.uidvalidity != status->uidvalidity) &&
		   status->messages >= status->uidnext / 2;

	y->foresee = all && left > most ? first + most : 0;
	return sync_add(y, &y->todo[kind], first, first + (left < most ? left : most) - 1);
}

/* Send what is due, or EXAMINE in front of it. */
static int sync_ask(struct sync *y, enum sync_kind kind)
{
	const struct config *config = y->session->config;
	struct imap *im = y->session->im;
	bool few = kind == KIND_IDS || kind == KIND_MADE_IDS || kind == KIND_MAILS;
	unsigned most = !few ? UINT_MAX : kind == KIND_MAILS ? config->email_batch : config->header_batch;
	struct range ranges[BATCH_RANGES];
	char uids[SET_TEXT_OCTETS], changed[48] = "";
	enum sync_kind from;
	struct command *c;
	unsigned n, tag;

	if (im->wire != y)
		return sync_send_examine(y);
	if (few && y->stage == SYNC_LIST && sync_foresee(y, kind, most) != 0)
		return -1;
	if (kind == KIND_MAIL || (few && y->attempt.careful_uid != 0 && y->attempt.careful_asks))
		most = 1;
	from = kind == KIND_MAIL && y->todo[KIND_MAILS].n > 0 ? KIND_MAILS : kind;
	n = set_take(&y->todo[from], most, ranges, uids);
	if (kind == KIND_FLAGS && y->since > 0 && y->stage == SYNC_LIST)
		snprintf(changed, sizeof changed, " (CHANGEDSINCE %llu)", (unsigned long long)y->since);
	if (kind == KIND_LISTING || kind == KIND_STILL_LISTED)
		tag = sync_send_listing(y, uids);
	else
		tag = imap_send(im, NULL, "UID FETCH %s %s%s", uids,
				fetches[y->unfit && kind == KIND_IDS ? KIND_AGAIN : kind].items, changed);
	if (sync_sent(y, kind, tag) != 0)
		return -1;
	c = &im->ring[tag % IMAP_RING];
	c->n = n;
	memcpy(c->ranges, ranges, n * sizeof *ranges);
	return 0;
}

/* -- what was answered -- */

/* EXAMINE was answered: take in what the mailbox says of itself. */
static int sync_examined(struct sync *y, const struct imap_result *result)
{
	const struct imap *im = y->session->im;
	const struct imap_status *status = &y->box->status;
	/* What it does not tell now (RFC 3501 wants it before the answer), STATUS has told. */
	uint32_t uidnext = im->box.uidnext != 0 ? im->box.uidnext : status->uidnext;
	uint32_t uidvalidity = im->box.uidvalidity != 0 ? im->box.uidvalidity : status->uidvalidity;

	if (result->condition == IMAP_BAD &&
	    !y->attempt.reopened) { /* as it stands: is there another way? */
		y->attempt.literal = imap_needs_literal(y->box->name, false);
		y->attempt.plain = !y->attempt.literal;
		return err_set(&y->err, E_FORMAT, "the server does not take EXAMINE so: %s", result->text);
	}
	if (imap_refused(&y->err, result, "opening the mailbox") != 0)
		return -1;
	if (sync_is_open(y)) {
		const uint32_t new = y->claim.uidnext != 0 ? uidnext - y->claim.uidnext : 0;

		/* As many new UIDs as there are mails: some servers give others at each EXAMINE. */
		if (uidvalidity == y->claim.uidvalidity && (new == 0 || new < im->exists))
			return 0;
		y->session->alone = true;
		return err_set(&y->err, E_NET, "the UIDs changed in the middle");
	}
	y->claim = (struct mbox_claim){ .uidvalidity = uidvalidity,
					.uidnext = uidnext,
					.messages = im->exists,
					.unseen = status->unseen,
					.highestmodseq = im->box.highestmodseq,
					.when_sec = time(NULL),
					.traits = mailbox_traits(y->box) };
	/* A UIDNEXT that went back is a mailbox made anew, or a server restored from its backup. */
	if (uidvalidity == 0 || uidvalidity != y->old.uidvalidity ||
	    (uidnext != 0 && (uidnext < y->old.uidnext || uidnext <= mbox_last_uid(y->m)))) {
		/* What is bound or stored from here on is of the new UIDVALIDITY, also if the line breaks soon. */
		mbox_forget_uids(y->m, &(struct mbox_claim){ .uidvalidity = uidvalidity,
							     .unseen = UINT32_MAX,
							     .traits = y->claim.traits });
		if (y->old.uidvalidity != 0 && !y->empty && !y->session->compare)
			log_info("UIDVALIDITY is new: the mails are told by their Message-IDs");
		y->since = 0;
		y->attempt.rekeys++;
		set_clear(&y->todo[KIND_FLAGS]);
	}
	return 0;
}

/* Not all was looked at (MESSAGELIMIT, RFC 9738): ask for the rest, unless just that was asked for. */
static int sync_go_below(struct sync *y, const struct command *c)
{
	const uint32_t below = c->result.below;

	if (below > c->ranges[c->n - 1].high || ++y->windows > WINDOWS_MAX)
		return err_set(&y->err, E_REFUSED, "the server tells nothing of UIDs below %lu",
			       (unsigned long)below);
	return sync_add(y, &y->todo[c->kind], 1, below - 1);
}

/* The listing has come. It is asked for again, more simply, where it cannot be right. */
static int sync_listed(struct sync *y, const struct command *c)
{
	const struct imap_result *result = &c->result;
	const struct imap *im = y->session->im;
	bool refused = result->condition != IMAP_OK;

	/* Some take no command that lists an empty mailbox: that is no failure, but no proof either. */
	if (refused && im->exists == 0 && imap_wait_asked(result) == 0 &&
	    (y->empty || y->attempt.way == LISTING_FETCH)) {
		y->claim.messages = y->empty ? 0 : UINT32_MAX;
		return 0;
	}
	if (refused && (imap_wait_asked(result) > 0 || y->attempt.way == LISTING_FETCH))
		return imap_refused(&y->err, result, "listing the mails");
	if (!refused && result->below > 0) /* go on below them, keeping what we have */
		return sync_go_below(y, c);
	if (set_count(&y->listing) > MBOX_MAILS_MAX)
		return sync_out_of_room(y);
	y->complete = !refused && set_count(&y->listing) == im->exists;
	/* Mail came or went meanwhile, or what is offered does not work (iCloud). */
	if (refused || (!y->complete && im->exists != UINT32_MAX && y->attempt.way < LISTING_FETCH)) {
		y->attempt.way++;
		set_clear(&y->listing);
		return sync_add(y, &y->todo[KIND_LISTING], 1, UINT32_MAX);
	}
	if (!y->complete && im->exists != UINT32_MAX) {
		log_error("the server has %lu mails but lists %llu: none is marked as gone",
			  (unsigned long)im->exists, (unsigned long long)set_count(&y->listing));
		y->counts.failures++;
	}
	return 0;
}

/*
 * Flags have come: all of them, or the new HIGHESTMODSEQ would be a lie. One that went back began anew, and
 * does not tell what changed.
 */
static int sync_flagged(struct sync *y, const struct command *c)
{
	const struct imap_result *result = &c->result;
	const bool refused = result->condition != IMAP_OK;

	if (!refused && y->since <= y->claim.highestmodseq)
		return result->below > 0 ? sync_go_below(y, c) : 0;
	if (y->session->im->exists == 0 || mbox_last_uid(y->m) == 0)
		return 0; /* some take no UIDs of an empty mailbox; where UIDVALIDITY is new, none is known */
	if (refused && (y->since == 0 || imap_wait_asked(result) > 0))
		return imap_refused(&y->err, result, "asking for flags");
	y->since = 0; /* what it offers, it does not have */
	return sync_add(y, &y->todo[KIND_FLAGS], 1, mbox_last_uid(y->m));
}

/* A batch was answered: what it left undone is asked for again. */
static int sync_batch_done(struct sync *y, const struct command *c)
{
	const struct imap_result *result = &c->result;
	unsigned sec = result->condition != IMAP_OK ? imap_wait_asked(result) : 0;
	bool single = c->kind == KIND_MAIL;
	uint32_t low = c->ranges[c->n - 1].high >= result->below ? result->below : 0; /* by MESSAGELIMIT */

	if (sec == VAGUE_SEC && single)
		y->attempt.vague++;
	/* Yahoo is "unavailable" for ever to a batch that holds a broken mail: wait once, then ask singly. */
	if (sec > 0 &&
	    (sec != VAGUE_SEC || (single ? y->attempt.vague > VAGUE_MAX : !y->attempt.doubtful))) {
		y->attempt.doubtful = true;
		return imap_refused(&y->err, result, "fetching mails");
	}
	if (result->condition == IMAP_BAD)
		y->session->im->flight = 1;
	for (unsigned i = 0; i < c->n; i++)
		for (uint32_t uid = set_next(&y->listing, c->ranges[i].low);
		     uid != 0 && uid <= c->ranges[i].high;
		     uid = uid < UINT32_MAX ? set_next(&y->listing, uid + 1) : 0)
			if (mbox_next_uid(y->m, uid) != uid && !sync_asked(y, uid) &&
			    set_next(&y->todo[KIND_MADE_IDS], uid) != uid) {
				enum sync_kind then = uid < low ? c->kind : fetches[c->kind].then;

				if (set_next(&y->todo[KIND_UNFIT], uid) == uid)
					then = KIND_AGAIN;
				if (sync_add(y, &y->todo[then], uid, uid) != 0)
					return -1;
			}
	set_clear(&y->todo[KIND_UNFIT]);
	if (single && result->condition != IMAP_OK)
		log_detail("mail with UID %lu: %s %s", (unsigned long)c->ranges[0].low,
			   result->condition == IMAP_NO ? "NO" : "BAD", result->text);
	return 0;
}

/* One of the mailbox's commands was answered. Returns 0, or -1 with y->err. */
static int sync_answered(struct sync *y, const struct command *c)
{
	const struct imap *im = y->session->im;

	y->pending--;
	y->awaited -= c->kind == KIND_LISTING || c->kind == KIND_FLAGS;
	if (y->err.code != E_NONE || sync_store(y) != 0)
		return -1;
	if (c->kind != KIND_EXAMINE && im->selected && im->box.uidvalidity != 0 &&
	    im->box.uidvalidity != y->claim.uidvalidity)
		return err_set(&y->err, E_NET, "UIDVALIDITY changed in the middle");
	switch (c->kind) {
	case KIND_EXAMINE:
		return sync_examined(y, &c->result);
	case KIND_LISTING:
	case KIND_FLAGS:
		if ((c->kind == KIND_LISTING ? sync_listed(y, c) : sync_flagged(y, c)) != 0)
			return -1;
		/* Before the batches that were foreseen are looked at: what these leave undone is then known. */
		if (y->stage == SYNC_LIST && y->awaited == 0 && sync_first_todo(y, KIND_FLAGS) == KIND_NONE)
			return sync_plan(y);
		return 0;
	case KIND_STILL_LISTED:
		y->claim.uidnext = 0; /* the next run looks again, whatever is said now */
		y->counts.failures += c->result.below > 0; /* there may be more of them */
		return imap_refused(&y->err, &c->result, "listing the mails");
	default:
		return sync_batch_done(y, c);
	}
}

/*
 * The line broke at this command of the mailbox's. A line may break at any place; the mail that breaks
 * it twice, alone, is left out.
 */
static void sync_broken(struct sync *y, const struct command *c)
{
	struct attempt *a = &y->attempt;
	uint32_t low, high;

	if (c->kind == KIND_LISTING && a->way < LISTING_FETCH)
		a->way++;
	a->plain = a->plain || c->kind == KIND_EXAMINE || c->kind == KIND_FLAGS;
	if (fetches[c->kind].then == KIND_NONE)
		return;
	low = c->ranges[0].low;
	high = c->ranges[c->n - 1].high;
	if (low == high && low == a->broken_uid && y->session->mails == 0 &&
	    set_count(&a->poison) < POISON_MAX) { /* as the first mail of its connection, too */
		log_error(
			"the mail with UID %lu breaks the connection again and again: left out in this run",
			(unsigned long)low);
		set_add(&a->poison, low, low);
		y->session->steps += !y->session->dry && ++a->row <= POISON_ROW;
	} else {
		a->careful_uid = high;
		a->careful_asks = fetches[c->kind].then == KIND_MAILS;
		a->broken_uid = low == high ? low : 0;
	}
}

/* -- opening and closing -- */

/* Return true if the server lists the mailbox, but has never let us open it. INBOX is everybody's own. */
static bool sync_is_barred(const struct sync *y)
{
	return y->err.code == E_REFUSED && y->empty && y->old.uidvalidity == 0 && !sync_is_open(y) &&
	       strcasecmp(y->box->name, "INBOX") != 0;
}

/* Close the mailbox's archive, if it is open: with the claim of a complete pass, or as it is. */
static void sync_close(struct sync *y, bool complete)
{
	char path[PATH_MAX_OCTETS + 300], file[MBOX_FILE_MAX + 16];
	struct err closing = { 0 };
	struct mbox_info info;

	if (y->m != NULL) {
		if (mbox_close(y->m,
			       complete && !y->session->dry && y->counts.failures == 0 ? &y->claim : NULL,
			       &info, &closing) != 0)
			sync_fail(y, &closing);
		y->counts.stored += info.came;
		y->counts.back += complete || !y->session->dry ? info.came_back : 0;
		y->counts.others_new += info.others > y->counts.others ? info.others - y->counts.others : 0;
		y->counts.others = info.others;
		if (complete && info.different > 0 && !y->session->compare)
			log_warn("mails left out although they differ from those whose Message-ID they have: %lu; "
				 "\"keep_duplicates\": true stores them",
				 (unsigned long)info.different);
		else if (complete && info.all_different > 0)
			log_detail("%lu mails are left out that have the Message-ID of another mail",
				   (unsigned long)info.all_different);
	}
	if (sync_is_barred(y) && !y->session->dry) { /* it leaves no archive */
		mailbox_file(y->box, file);
		mailbox_path(y->session->list, file, path);
		unlink(path);
		strcat(path, ".index");
		unlink(path);
	}
	set_free(&y->listing);
	for (unsigned i = 0; i < KINDS; i++)
		set_free(&y->todo[i]);
	y->m = NULL;
	y->stage = SYNC_CLOSED;
	y->pending = y->awaited = 0;
	memset(&y->in, 0, sizeof y->in);
	if (!complete) /* it will be counted yet */
		y->counts.failures = 0;
}

/* Open the mailbox's archive. Returns 0, or -1 with y->err. */
static int sync_open(struct sync *y)
{
	struct session *s = y->session;
	unsigned how = (s->dry ? MBOX_LOOK : 0) | (s->config->keep_duplicates ? MBOX_DUPLICATES : 0);
	char path[PATH_MAX_OCTETS + 300], file[MBOX_FILE_MAX + 8];
	struct mbox_info info;
	int healed;

	mailbox_file(y->box, file);
	mailbox_path(s->list, file, path);
	y->complete = false;
	y->windows = 0;
	y->claim.when_sec = 0;
	if (mbox_open(&y->m, path, y->box->name, how, &y->err) != 0)
		return -1;
	if (*mbox_mended(y->m) != '\0' && !s->dry)
		log_info("%s", mbox_mended(y->m));
	if (!s->dry && (healed = mbox_heal(y->m, &y->err)) != 0) {
		if (healed < 0)
			return -1;
		log_warn("%d damaged mails are marked as gone; what the server still has is fetched anew", healed);
	}
	mbox_tally(y->m, &info);
	y->old = info.claim;
	if (info.lost > 0)
		log_warn("%lu of the archived mails are not in the file any more", (unsigned long)info.lost);
	y->counts.others = info.others;
	y->empty = mbox_count(y->m) == 0;
	y->since = s->im->capabilities & CAP_CONDSTORE && !y->attempt.plain ? y->old.highestmodseq : 0;
	y->foresee = s->compare ? 0 : sync_foresees(y);
	y->unfit = y->sampled = false;
	if (s->compare) {
		mbox_forget_uids(y->m, NULL);
		y->counts = (struct counts){ 0 };
	}
	y->stage = SYNC_LIST;
	if (y->old.uidvalidity != 0 && mbox_last_uid(y->m) > 0 &&
	    sync_add(y, &y->todo[KIND_FLAGS], 1, mbox_last_uid(y->m)) != 0)
		return -1;
	return sync_add(y, &y->todo[KIND_LISTING], 1, UINT32_MAX);
}

/* ======== session: brings mailbox after mailbox over one connection ======== */

/*
 * The engine: it asks the mailboxes in hand in turn what they have to send, has the server's answers handed
 * to their owners, begins others while the wire has room, and closes those that are over. It alone decides
 * what a broken line means.
 */

/* What is said from here on is of this mailbox, or, with NULL, of none. */
static void session_speak(const struct session *s, const struct sync *y)
{
	char name[NAME_OCTETS] = "";

	if (y != NULL)
		name_text(name, y->box->name, y->box->delimiter);
	log_context(s->list->account->email, name);
}

/* Return true if there is no error, or one of one mailbox only, so that the others can go on. */
static bool err_is_local(const struct err *e)
{
	return e->code <= E_REFUSED;
}

/* Take a mailbox out of the session; whoever gave it is told. An archive that was put in order is tried again. */
static void session_finish(struct session *s, struct sync *y)
{
	struct sync **link = &s->first;
	struct imap *im = s->im;

	session_speak(s, y);
	sync_close(y, y->err.code == E_NONE);
	im->wire = im->wire == y ? NULL : im->wire;
	im->context = im->context == y ? NULL : im->context;
	if (y->err.code == E_FORMAT && !y->attempt.reopened && !s->dry) {
		log_info("%s; trying again", y->err.text);
		y->attempt.reopened = true;
		y->err = (struct err){ 0 };
		return;
	}
	while (*link != y)
		link = &(*link)->next;
	*link = y->next;
	s->over(s->context, y);
	session_speak(s, NULL);
	set_free(&y->attempt.poison);
	free(y);
}

/* Have every mailbox send what it can, the first one first; begin others as long as the wire has room. */
static void session_send(struct session *s)
{
	struct imap *im = s->im;
	struct sync **link = &s->first;

	while (imap_may_send(im)) {
		struct sync *y = *link;
		enum sync_kind kind;

		if (y != s->first && (s->alone || im->flight == 1))
			return;
		if (y == NULL && (y = *link = s->begin(s->context, s->first != NULL)) == NULL)
			return;
		if (y->stage == SYNC_CLOSED && y->err.code == E_NONE) {
			session_speak(s, y);
			sync_open(y);
		}
		if (y->todo[KIND_MAILS].n > 0 && stream_is_slow(&im->s) && imap_may_compress(im)) {
			imap_compress(im);
			return;
		}
		kind = sync_due(y);
		if (y->pending == 0 && (y->err.code != E_NONE || y->stage == SYNC_OVER))
			return;
		if (kind != KIND_NONE && y->attempt.literal && im->wire != y && im->taken != im->tag)
			return; /* EXAMINE will wait for a continuation: nothing else may come then */
		if (kind != KIND_NONE && sync_ask(y, kind) != 0)
			return;
		if (kind != KIND_NONE)
			continue;
		if (y->err.code == E_NONE && (y->attempt.careful_uid != 0 || y->foresee != 0 ||
					      sync_first_todo(y, KINDS - 1) != KIND_NONE))
			return; /* it has more to ask for, after the answers to come */
		link = &y->next;
	}
}

/*
 * The line is dead, or a mailbox gave it up: close all archives. What was stored stays stored. The
 * mailboxes stay in hand, but for one that failed by itself; then the line is nobody's fault, and e->code
 * is E_NONE.
 */
static void session_break(struct session *s, struct err *e)
{
	struct imap *im = s->im;
	struct command *oldest = &im->ring[(im->taken + 1) % IMAP_RING];
	struct sync *y, *next;
	bool blamed = false;

	*e = im->s.err;
	for (y = s->first; y != NULL; y = y->next)
		blamed = blamed || y->err.code != E_NONE;
	if (!blamed && im->taken < im->tag && oldest->owner != NULL &&
	    (e->code == E_NET || e->code == E_PROTO))
		sync_broken(oldest->owner, oldest);
	for (y = s->first; y != NULL; y = next) {
		next = y->next;
		if (!err_is_local(&y->err)) {
			*e = y->err;
			y->err = (struct err){ 0 };
		}
		if (y->err.code == E_NONE) {
			session_speak(s, y);
			sync_close(y, false);
		}
		if (y->err.code != E_NONE) {
			session_finish(s, y);
			if (e->code == E_NET)
				*e = (struct err){ 0 };
		}
	}
	session_speak(s, NULL);
}

/*
 * Bring mailbox after mailbox into its archive, until begin() has none any more. Returns 0; or -1 if the
 * line cannot be used any longer: see session_break().
 */
static int session_run(struct session *s, struct err *e)
{
	struct imap *im = s->im;

	im->on_uids = on_uids;
	im->on_literal = on_literal;
	im->on_octets = on_octets;
	im->on_fetch = on_fetch;
	for (bool usable = true; usable;) {
		struct sync *over = NULL;
		struct command *c;

		session_send(s);
		for (struct sync *y = s->first; y != NULL; y = y->next) {
			usable = usable && err_is_local(&y->err);
			if (over == NULL && y->pending == 0 &&
			    (y->stage == SYNC_OVER || y->err.code != E_NONE))
				over = y;
		}
		usable = usable && im->s.err.code == E_NONE;
		if (usable && over != NULL) {
			session_finish(s, over);
		} else if (usable && s->first == NULL) {
			return 0;
		} else if (!usable || (c = imap_answer(im)) == NULL) {
			usable = false;
		} else if (c->owner != NULL) {
			session_speak(s, c->owner);
			sync_answered(c->owner, c);
		}
	}
	session_break(s, e);
	return -1;
}

/* ======== restore: puts archived mail back on a server ======== */

/*
 * One archive after the other. A mail is sent if the mailbox has fewer of its identity than the archive, so
 * whatever breaks a restore, it is simply run again. Nothing is written but by CREATE, SUBSCRIBE and APPEND.
 */
struct restore {
	const struct session *session; /* of the target */
	const struct options *options;
	struct imap *im;               /* the session's */
	struct counts *counts, before; /* now; and when the archive in hand was begun */
	struct err err;      /* why the archive in hand, or the whole, cannot go on: see err_is_local() */
	char delimiter;      /* the target's */
	bool strip;          /* every archive but INBOX's lay below INBOX: the source's prefix */
	struct holding *held; /* owned: what the target's mailbox has, sorted */
	size_t n, room;
	struct mbox_header header;
	bool created;
	unsigned done, at; /* archives that are over, also on connections before; the one in hand */
	unsigned bads;     /* on this connection */
	bool last;         /* no further try follows: what keeps failing is blamed, ... */
	uint64_t began, blamed; /* ... if no more were put back than at its begin; at which number a mail was */
	struct archive *a; /* in hand; of its mails: */
	off_t sent[IMAP_RING];  /* on the wire, by their tags */
	off_t refused[RESTORE_REFUSED_MAX]; /* or breaking the line: not sent again */
	unsigned n_refused;
	off_t broke;      /* the oldest on the wire when it broke, or -1 */
	unsigned careful; /* it broke: as many as were on it are sent one by one, to know which does it */
	char target[2 * NAME_OCTETS], quoted[2 * MBOX_NAME_MAX + 20];
};

/* Tell why a mail is not put back, and do not send it again. */
static int restore_refuse(struct restore *r, off_t at, const char *why)
{
	struct mbox_mail mail = { .name = "" };
	off_t next = at;

	if (mbox_walk(r->a->m, &next, &mail, &r->err) < 0)
		return -1;
	log_error("at %lld, %s: %s", (long long)at, mail.name, why);
	r->counts->failures++;
	r->last = false; /* the others may go */
	if (r->n_refused == RESTORE_REFUSED_MAX)
		return err_set(&r->err, E_ACCOUNT, "more than %d mails are refused", RESTORE_REFUSED_MAX);
	r->refused[r->n_refused++] = at;
	return 0;
}

static bool restore_is_refused(const struct restore *r, off_t at)
{
	for (unsigned i = 0; i < r->n_refused; i++)
		if (r->refused[i] == at)
			return true;
	return false;
}

/* -- what the target has -- */

struct holding { /* compared by what stands first */
	struct mbox_id id;
	uint32_t mails; /* that have it, but for those that mails of ours have met */
};

static int restore_on_literal(void *context, const struct imap_fetch *fetch)
{
	struct restore *r = context;

	mbox_header_init(&r->header);
	return fetch->section != SECTION_MAIL;
}

static int restore_on_octets(void *context, const struct imap_fetch *fetch, const void *octets, size_t n)
{
	struct restore *r = context;

	(void)fetch;
	mbox_header_feed(&r->header, octets, n);
	return 0;
}

static int restore_on_fetch(void *context, const struct imap_fetch *fetch)
{
	struct restore *r = context;

	if (fetch->section == SECTION_NONE || fetch->section == SECTION_MAIL || r->n == r->room)
		return 0;
	r->im->noise = 0;
	mbox_header_end(&r->header, &r->held[r->n].id);
	r->held[r->n++].mails = 1;
	return 0;
}

static int holding_compare(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct mbox_id));
}

/* Put what the target's mailbox has in order, a holding for each identity. */
static void restore_sort(struct restore *r)
{
	size_t n = 0;

	qsort(r->held, r->n, sizeof *r->held, holding_compare);
	for (size_t i = 0; i < r->n; i++)
		if (n > 0 && holding_compare(&r->held[n - 1], &r->held[i]) == 0)
			r->held[n - 1].mails++;
		else
			r->held[n++] = r->held[i];
	r->n = n;
}

/* Return true if the target's mailbox has this mail; it is used up then, as there may be several. */
static bool restore_has(struct restore *r, const struct mbox_id *id)
{
	struct holding *held = r->n > 0 ? bsearch(id, r->held, r->n, sizeof *held, holding_compare) : NULL;

	return held != NULL && held->mails > 0 && held->mails-- > 0;
}

/*
 * Take the answer to a question for Message-IDs. If one of them is refused, r->err tells it, and nothing may be
 * sent: what the target has would be put there again.
 */
static int restore_listed(struct restore *r)
{
	const struct command *c = imap_answer(r->im);

	if (c == NULL)
		return -1;
	if (c->result.below > 0)
		err_set(&r->err, E_REFUSED,
			"the server does not tell of all mails; a smaller \"header_batch_size\" may help: %s",
			c->result.text);
	if (strcmp(c->result.code, "EXPUNGEISSUED") != 0) /* the others were told (RFC 5530) */
		imap_refused(&r->err, &c->result, "listing the mails");
	return 0;
}

/* Open the target's mailbox and list what it has. */
static int restore_look(struct restore *r)
{
	static const char fields[] = "Message-ID From To Cc Date Subject"; /* spelt as in a backup */
	struct imap *im = r->im;
	const struct imap_result *result;
	const size_t most = r->session->config->header_batch;
	unsigned tag;

	im->takes_forwarded = false;
	im->context = r;
	im->on_literal = restore_on_literal;
	im->on_octets = restore_on_octets;
	im->on_fetch = restore_on_fetch;
	tag = imap_send(im, NULL, "SELECT %s", r->quoted);
	im->ring[tag % IMAP_RING].examines = true;
	im->ring[tag % IMAP_RING].owner = r;
	if ((result = imap_wait(im, tag)) == NULL || result->condition == IMAP_OK)
		r->err = (struct err){ 0 }; /* whatever it tells of CREATE */
	if (result == NULL || imap_refused(&r->err, result, "opening the mailbox") != 0)
		return -1;
	if (im->exists > MBOX_MAILS_MAX)
		return err_set(&r->err, E_FORMAT, "the mailbox has more than %d mails", MBOX_MAILS_MAX);
	r->room = im->exists;
	free(r->held);
	r->held = allocate(r->room * sizeof *r->held);
	/* By numbers: nobody shifts them between two commands that are FETCH. */
	for (size_t first = 1, last; first <= r->room; first = last + 1) {
		last = r->room - first < most ? r->room : first + most - 1;
		while (!imap_may_send(im))
			if (restore_listed(r) != 0)
				return -1;
		if (imap_send(im, NULL, "FETCH %zu:%zu (BODY.PEEK[HEADER.FIELDS (%s)])", first, last, fields) ==
		    0)
			return -1;
	}
	while (im->taken < im->tag)
		if (restore_listed(r) != 0)
			return -1;
	if (r->err.code != E_NONE)
		return -1;
	restore_sort(r);
	/* GNU's imap4d says OK to what is appended to the mailbox that is selected, and drops it in the end. */
	return r->session->dry || !(im->capabilities & CAP_UNSELECT) ||
	       imap_wait(im, imap_send(im, NULL, "UNSELECT")) != NULL ? 0 : -1;
}

/* -- what is sent -- */

/* Return true if it has failed here as often as it may. */
static bool restore_is_stuck(const struct restore *r)
{
	return r->last && r->counts->stored == r->began;
}

/* Of a quota that is used up nothing but room helps: that ends the account. */
static int restore_quota(struct restore *r, const struct imap_result *result)
{
	if (strcmp(result->code, "OVERQUOTA") != 0)
		return 0;
	return err_set(&r->err, E_ACCOUNT, "the server has no room left for this account: %s", result->text);
}

/* Take the answer to the oldest command: a refusal is of one mail. */
static int restore_answered(struct restore *r)
{
	const struct command *c = imap_answer(r->im);
	off_t at = r->sent[r->im->taken % IMAP_RING];
	const struct imap_result *result;
	struct err e = { 0 };

	if (c == NULL)
		return -1;
	result = &c->result;
	r->careful -= r->careful > 0;
	if (result->condition == IMAP_OK) {
		r->counts->stored++;
		r->session->progress(r->session->context, 1, 0);
		return 0;
	}
	if (strcmp(result->code, "TRYCREATE") == 0 && !r->created)
		return err_set(&r->err, E_NET, "the mailbox has gone: %s", result->text);
	if (restore_quota(r, result) != 0)
		return -1;
	imap_refused(&e, result, "a mail");
	if (e.code == E_WAIT && (!restore_is_stuck(r) || r->blamed == r->began))
		return r->err = e, -1;
	r->blamed = e.code == E_WAIT ? r->began : r->blamed;
	if (restore_refuse(r, at, e.text) != 0)
		return -1;
	r->bads += result->condition == IMAP_BAD;
	return r->bads < RESTORE_BADS_MAX ? 0 : err_set(&r->err, E_NET, "another BAD could end the session");
}

static int take_length(void *context, const void *octets, size_t n)
{
	(void)octets;
	*(uint64_t *)context += n;
	return 0;
}

static int take_stream(void *context, const void *octets, size_t n)
{
	return stream_write(context, octets, n);
}

/* Send one mail. */
static int restore_append(struct restore *r, const struct mbox_mail *mail)
{
	struct imap *im = r->im;
	uint64_t limit = im->capabilities & CAP_LITERAL_PLUS    ? APPEND_AHEAD_MAX
			 : im->capabilities & CAP_LITERAL_MINUS ? 4096
								: 0;
	int64_t when_sec = mail->when_sec;
	unsigned tag, state = mail->state;
	uint64_t octets = 0;
	char flags[80], date[40] = "", why[80];
	time_t sec;
	struct tm tm;
	int got = 1;

	if (mbox_read(r->a->m, mail, MBOX_CRLF, take_length, &octets, &r->err) != 0)
		return -1;
	if (im->append_limit > 0 && octets > im->append_limit) {
		snprintf(why, sizeof why, "%llu octets, and the server takes %llu",
			 (unsigned long long)octets, (unsigned long long)im->append_limit);
		return restore_refuse(r, mail->offset, why);
	}
	snprintf(flags, sizeof flags, "%s%s%s%s", state & MBOX_SEEN ? " \\Seen" : "",
		 state & MBOX_ANSWERED ? " \\Answered" : "", state & MBOX_FLAGGED ? " \\Flagged" : "",
		 state & MBOX_FORWARDED && im->takes_forwarded ? " $Forwarded" : "");
	if (when_sec == INT64_MIN && !parse_date(mail->date, &when_sec))
		when_sec = INT64_MIN;
	sec = (time_t)when_sec;
	if (when_sec != INT64_MIN && sec == when_sec && gmtime_r(&sec, &tm) != NULL && tm.tm_year <= 8099)
		snprintf(date, sizeof date, " \"%02d-%.3s-%04d %02d:%02d:%02d +0000\"", tm.tm_mday,
			 month_names + 3 * tm.tm_mon, tm.tm_year + 1900, tm.tm_hour, tm.tm_min, tm.tm_sec);
	while (im->taken < im->tag && (!imap_may_send(im) || r->careful > 0))
		if (restore_answered(r) != 0)
			return -1;
	tag = imap_send(im, NULL, "APPEND %s (%s)%s {%llu%s}", r->quoted, flags[0] != '\0' ? flags + 1 : "",
			date, (unsigned long long)octets, octets <= limit ? "+" : "");
	if (tag == 0)
		return -1;
	r->sent[tag % IMAP_RING] = mail->offset;
	im->in_flight -= im->ring[tag % IMAP_RING].octets; /* its answer is short, and blocks nobody */
	im->ring[tag % IMAP_RING].octets = 0;
	while (octets > limit && im->ring[tag % IMAP_RING].result.condition == IMAP_PENDING &&
	       (got = imap_response(im)) == 0)
		;
	if (got <= 0) /* 0: it was refused, which will be looked at in its turn */
		return got;
	if (mbox_read(r->a->m, mail, MBOX_CRLF, take_stream, &im->s, &r->err) != 0)
		stream_fail(&im->s, E_NET, "a mail could not be read to its end");
	if (im->s.err.code != E_NONE || stream_write(&im->s, "\r\n", 2) != 0 || stream_flush(&im->s) != 0)
		return -1;
	r->counts->octets += octets;
	r->session->progress(r->session->context, 0, octets);
	return 0;
}

/* The line broke: the oldest command on it may have done it, if that is a mail. */
static void restore_broken(struct restore *r)
{
	off_t at = r->sent[(r->im->done + 1) % IMAP_RING];

	if (at < 0)
		return;
	if (r->broke == at)
		restore_refuse(r, at, "the line breaks at this mail");
	r->broke = at;
	r->careful = r->im->tag - r->im->done;
}

/*
 * Create the target's mailbox. Whether it is refused because it is there already, not all servers say in a
 * code: so it is opened all the same, and r->err told if that fails too.
 */
static int restore_create(struct restore *r)
{
	const struct imap_result *result = imap_wait(r->im, imap_send(r->im, NULL, "CREATE %s", r->quoted));

	r->created = true;
	if (result == NULL || restore_quota(r, result) != 0)
		return -1;
	if (imap_refused(&r->err, result, "creating the mailbox") != 0)
		return 0;
	log_info("created");
	return imap_wait(r->im, imap_send(r->im, NULL, "SUBSCRIBE %s", r->quoted)) == NULL ? -1 : 0;
}

/* Append a name's parts to the target's, encoded anew, with the target's delimiter behind each. */
static void restore_add_name(struct restore *r, const char *name, char delimiter)
{
	struct name w = { .rest = name, .delimiter = delimiter };
	size_t n = strlen(r->target);

	while (n + 20 < sizeof r->target && name_next(&w)) {
		if (w.n == 0)
			continue;
		n += mutf7_encode(r->target + n, sizeof r->target - n - 2, w.part, w.n, r->delimiter);
		r->target[n++] = r->delimiter;
	}
	r->target[n] = '\0';
}

/* Find out where the archive's mails go: the target's mailbox of the same special use, or name. */
static void restore_name(struct restore *r)
{
	const struct archive *a = r->a;
	const char *name = a->name, *into = r->options->into;
	const struct mailbox *box = r->session->list->boxes, *end = box + r->session->list->n;
	unsigned special = into == NULL ? a->box.special & ~word_bit(special_uses, "\\ALL") : 0;

	while (box < end && !(box->selectable && box->special & special))
		box++;
	name += a->box.prefix > 0 ? a->box.prefix : r->strip && strncmp(a->text, "INBOX/", 6) == 0 ? 6 : 0;
	r->target[0] = '\0';
	if (box < end) {
		strcpy(r->target, box->name);
	} else {
		if (strcasecmp(name, "INBOX") != 0 || into != NULL)
			strcpy(r->target, r->im->prefix);
		if (into != NULL)
			restore_add_name(r, into, '/');
		restore_add_name(r, name, a->box.delimiter);
		if (r->target[0] != '\0')
			r->target[strlen(r->target) - 1] = '\0';
	}
	imap_quote(r->im, r->quoted, sizeof r->quoted, r->target);
}

/* Is every archive but INBOX's of a mailbox below INBOX? */
static int archive_is_below(void *context, struct archive *a)
{
	struct restore *r = context;

	if (strcmp(a->text, "INBOX") != 0 && strncmp(a->text, "INBOX/", 6) != 0)
		r->strip = false;
	return 0;
}

/* Put back an archive, unless r->err or the line's error tells why not. */
static void restore_archive(struct restore *r)
{
	const uint64_t sent = r->counts->stored - r->before.stored;
	const bool dry = r->session->dry, include = r->options->include_gone != 0;
	unsigned long long missing = 0, present = 0, left_out = 0;
	bool listed;
	struct mbox_mail mail;
	char text[NAME_OCTETS], name[RECORD_MAX];
	uint32_t place;
	off_t at = 0;

	restore_name(r);
	name_text(text, r->target, r->delimiter);
	log_info("%s -> %s", r->a->text, text);
	if (strlen(r->target) > MBOX_NAME_MAX)
		err_set(&r->err, E_REFUSED, "there its name would have more than %d octets", MBOX_NAME_MAX);
	place = *mailboxes_find(r->session->list, BY_NAME, r->target);
	listed = place > 0 && r->session->list->boxes[place - 1].selectable; /* or it has only some below it */
	r->created = false;
	r->n = 0;
	if (r->err.code != E_NONE || (!listed && !dry && restore_create(r) != 0) ||
	    ((listed || !dry) && restore_look(r) != 0))
		return;
	/* The gone ones in a second pass: what is there of an ID is first of all the mail that is not gone. */
	for (int pass = 0; pass < 1 + include; pass++, at = 0)
		while (r->err.code == E_NONE && mbox_walk(r->a->m, &at, &mail, &r->err) > 0) {
			bool gone = (mail.state & MBOX_GONE) != 0;

			if (stop_due())
				err_set(&r->err, E_STOPPED, "stopped by a signal");
			else if (gone != (pass > 0))
				left_out += gone && !include;
			else if (restore_has(r, &mail.id))
				present++;
			else if (!restore_is_refused(r, mail.offset) && ++missing > 0 && !dry &&
				 restore_append(r, &mail) != 0 && r->im->s.err.code != E_NONE)
				return;
		}
	present -= sent < present ? sent : present; /* on a connection before this one */
	while (r->im->taken < r->im->tag && r->err.code != E_STOPPED)
		if (restore_answered(r) != 0 && r->im->s.err.code != E_NONE)
			return;
	if (r->err.code != E_NONE)
		return;
	missing = dry ? missing : r->counts->stored - r->before.stored;
	log_info("%llu mails %s, %llu were there, %llu that are marked gone left out%s", missing,
		 dry ? "would be put back" : "put back", present, left_out, listed ? "" : "; the mailbox is new");
	json_escape(name, sizeof name, text);
	report_box(r->a->text, strrchr(r->a->path, '/') + 1,
		   ",\"to\":%s,\"new\":%llu,\"present\":%llu,\"left_out\":%llu,\"octets\":%llu,\"failures\":%llu",
		   name, missing, present, left_out, r->counts->octets - r->before.octets,
		   r->counts->failures - r->before.failures);
}

static int archive_restore(void *context, struct archive *a)
{
	struct restore *r = context;
	struct imap *im = r->im;
	bool local;

	if (r->err.code != E_NONE || im->s.err.code != E_NONE)
		return 1;
	if (r->at++ < r->done)
		return 0;
	r->a = a;
	memset(r->sent, -1, sizeof r->sent);
	restore_archive(r);
	if (im->s.err.code == E_NET && im->done < im->tag)
		restore_broken(r);
	if (r->err.code == E_NONE)
		r->err = im->s.err;
	local = err_is_local(&r->err);
	if (!local && (!restore_is_stuck(r) || r->err.code == E_ACCOUNT || r->err.code == E_STOPPED))
		return 1;
	if (r->err.code != E_NONE) {
		log_error("%s", r->err.text);
		r->counts->failures++;
	}
	if (local)
		r->err = (struct err){ 0 };
	r->counts->mailboxes = ++r->done;
	r->before = *r->counts;
	r->n_refused = r->careful = 0;
	r->broke = -1;
	return 0;
}

/* Restore an account. Returns 0; 3 if an archive is locked; or -1 with *e, and if that is E_NET, it goes on later. */
static int restore_run(struct restore *r, struct err *e)
{
	const struct mailboxes *list = r->session->list;
	uint32_t inbox = *mailboxes_find(list, BY_NAME, "INBOX");
	int status;

	r->err = (struct err){ 0 };
	r->at = r->bads = 0;
	r->began = r->counts->stored;
	if (r->im->flight == IMAP_FLIGHT_MAX - 8) /* or fewer, for Zimbra */
		r->im->flight = IMAP_RING - 8;
	r->delimiter = r->im->delimiter;
	if (r->delimiter == '\0' && inbox > 0)
		r->delimiter = list->boxes[inbox - 1].delimiter;
	if (r->delimiter == '\0')
		r->delimiter = '/';
	r->strip = true;
	/* But where the target has mailboxes below INBOX without a prefix, it may be where they came from. */
	for (uint32_t i = 0; i < list->n && r->im->prefix[0] == '\0'; i++)
		r->strip = r->strip && (strncasecmp(list->boxes[i].name, "INBOX", 5) != 0 ||
					list->boxes[i].name[5] != r->delimiter);
	status = archives_walk(list->config, &(struct options){ .mode = RUN_LIST }, list->account,
			       archive_is_below, r);
	if (status == 0)
		status = archives_walk(list->config, r->options, list->account, archive_restore, r);
	log_context(list->account->email, "");
	r->im->on_fetch = NULL;
	*e = r->err.code != E_NONE ? r->err : r->im->s.err;
	if (e->code != E_NONE)
		return -1;
	r->counts->failures += status == 1 && r->counts->failures == 0;
	return status == 3 ? 3 : 0;
}

/* ======== workers: the processes of a run ======== */

/*
 * The parent forks a process for each account, as many as may be at work at a time. An account's process
 * takes the account's lock, gets the password, lists the mailboxes, and works on them; for what is left
 * it forks helpers, which inherit the list. Each of these is a worker with one connection.
 *
 * Nobody sends messages. What the processes share is memory: a struct board for each account, in which
 * each worker has a slot that only it writes, and a word for each mailbox, by which workers take them.
 * Whoever connects takes one of the places of "total_processes"; whoever ends or pauses for long gives it
 * back; whoever reaps a process that died gives it back for that. A process ends when its parent does.
 */
struct slot {                 /* of a worker */
	struct counts counts; /* of the mailboxes that are over, and of connections */
	pid_t pid;            /* 0: none. Written by the process that forks it */
	unsigned tries;       /* in a row: connections that failed */
	uint32_t hand;        /* hash of the first mailbox in hand, for the case that it dies; or 0 */
	char name[80];        /* of that, for the progress line */
};

struct board { /* of an account, in shared memory */
	struct account *account;
	int64_t began_ms, ended_ms, not_before_ms; /* 0: not yet; at once */
	uint64_t weight;                           /* mails that are probably new */
	volatile bool over;                        /* it is done, or there is no use in going on */
	volatile bool locked;                      /* another run is at work */
	volatile bool one_at_a_time;               /* the server breaks at a second command */
	unsigned blamed;                           /* these: */
	uint32_t blame[BLAME_MAX]; /* the hashes in hand when a process died; 0: an account's, without */
	struct slot slots[CONFIG_PROCESSES_MAX];   /* the account's process has the first */
	/* The parent's: */
	int output;                /* a pipe: the processes' stdout, which ends when all of them have */
	struct pile errors, boxes; /* with --json: what came from there, ... */
	size_t octets;             /* ... and what has not become a record yet */
	char text[2 * RECORD_MAX];
};

struct shared { /* by all processes of a run */
	_Atomic(struct slot *) places[CONFIG_PROCESSES_MAX]; /* who holds each; NULL: it is free */
	atomic_uint full;           /* messages that tell of a full disk: one is enough */
	volatile unsigned starving; /* accounts that wait for their first place */
	struct board boards[];
};

struct run {
	const struct config *config;
	const struct options *options;
	struct trust *trusts; /* owned: each CA bundle that is named */
	unsigned n_trusts;
	struct shared *shared;
	struct board *boards; /* in there */
	unsigned n_boards;
	int64_t began_ms, drawn_ms;
};

/* A word for each mailbox with news: free, over, or in the hand of the worker with this slot. */
enum { BOX_FREE, BOX_OVER, BOX_TAKEN };

struct worker { /* a process's own */
	struct run *run;
	struct board *board;
	struct slot *slot;
	char folder[PATH_MAX_OCTETS];
	int lock; /* descriptor of the account's lock file */
	struct mailboxes list;
	atomic_uint *states; /* shared: of the first list.todo mailboxes; NULL: they are not listed yet */
	uint32_t next;       /* the first of them that may be free */
	struct imap im;
	struct session session;
	unsigned stale;     /* access tokens in a row, without progress, that ran out */
	bool token_refused; /* in this run */
	unsigned cuts;  /* connections in a row that broke at a second command */
	int64_t told_ms;
};

/* Return true if the mode needs neither a server nor a password. */
static bool run_is_offline(const struct options *o)
{
	return (o->mode == RUN_LIST && o->dry) || (o->mode == RUN_VERIFY && !o->online);
}

static void counts_add(struct counts *to, const struct counts *from)
{
	for (size_t i = 0; i < sizeof to->all / sizeof *to->all; i++)
		to->all[i] += from->all[i];
}

enum { OF_ACCOUNT = 1, OF_MAILBOX = 2, OF_COMPARED = 4 /* a mailbox, with --verify --online */ };

/* Write what --json tells of one of these. Returns out. */
static char *counts_json(char out[400], const struct counts *c, unsigned of)
{
	const struct {
		const char *key;
		unsigned long long n;
		unsigned of;
	} rows[] = {
		{ "mailboxes", c->mailboxes, OF_ACCOUNT },
		{ "unchanged", c->unchanged, OF_ACCOUNT },
		{ "new", c->stored, OF_ACCOUNT | OF_MAILBOX },
		{ "gone", c->gone, OF_ACCOUNT | OF_MAILBOX },
		{ "back", c->back, OF_ACCOUNT | OF_MAILBOX },
		{ "compared", c->compared, OF_COMPARED },
		{ "duplicates", c->others, OF_ACCOUNT | OF_MAILBOX },
		{ "octets", of == OF_ACCOUNT ? c->in : c->octets, OF_ACCOUNT | OF_MAILBOX },
		{ "failures", c->failures, OF_ACCOUNT | OF_MAILBOX },
	};
	char *end = out;

	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].of & of)
			end += sprintf(end, ",\"%s\":%llu", rows[i].key, rows[i].n);
	return out;
}

/*
 * Hand a place on; NULL holds those that are free. Returns false if the first has none. One step does it, so
 * that a process that is killed leaves no place in between.
 */
static bool place_pass(struct run *run, struct slot *from, struct slot *to)
{
	for (unsigned i = 0; i < run->config->total_processes; i++) {
		struct slot *holder = from;

		if (atomic_compare_exchange_strong(&run->shared->places[i], &holder, to))
			return true;
	}
	return false;
}

/* Fork the process of a slot that has a place; it ends when this one does. Returns what fork() does. */
static pid_t slot_fork(struct slot *slot)
{
	pid_t self = getpid(), pid;

	fflush(stdout);
	pid = fork();
	if (pid > 0)
		slot->pid = pid;
	else if (pid == 0)
		parent_pid = self;
	return pid;
}

/*
 * See whether the slot's process has ended; without WNOHANG wait for that. If it died, what it had in hand
 * is remembered. Returns true if it has ended.
 */
static bool slot_reap(struct run *run, struct board *b, struct slot *slot, int how)
{
	int status = 0;
	pid_t pid;

	while ((pid = waitpid(slot->pid, &status, how)) < 0 && errno == EINTR)
		;
	if (pid == 0)
		return false;
	if (status != 0) {
		log_warn("a worker died: %s %d", WIFSIGNALED(status) ? "signal" : "exit status",
			 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
		if ((slot->hand != 0 || slot == b->slots) && b->blamed < BLAME_MAX)
			b->blame[b->blamed++] = slot->hand;
	}
	slot->hand = 0;
	slot->name[0] = '\0';
	slot->pid = 0;
	place_pass(run, slot, NULL);
	return true;
}

/* -- mailboxes in hand -- */

/* How many processes died with this mailbox in hand; NULL: an account's, with none. */
static unsigned board_deaths(const struct board *b, const struct mailbox *box)
{
	uint32_t hash = b->blamed > 0 && box != NULL ? name_hash(box->name) : 0;
	unsigned deaths = 0;

	for (unsigned i = 0; i < b->blamed; i++)
		deaths += b->blame[i] == hash;
	return deaths;
}

/* Tell those who look at the slot which mailbox is the first in hand; NULL: none. */
static void worker_show(struct worker *w, const struct mailbox *box)
{
	char name[NAME_OCTETS] = "";

	w->slot->hand = box != NULL ? name_hash(box->name) : 0;
	if (box != NULL)
		name_text(name, box->name, box->delimiter);
	log_visible(w->slot->name, sizeof w->slot->name, name, strlen(name));
}

/* Say what failed, or was in the way; but of a full disk, which many processes may meet, once. */
static void worker_complain(struct worker *w, const struct err *e)
{
	bool full = e->code == E_FULL, locked = e->code == E_LOCKED;

	w->board->locked = w->board->locked || locked;
	w->board->over = w->board->over || full;
	if (locked || e->code == E_STALE) {
		log_info("%s", e->text);
		return;
	}
	w->slot->counts.failures++;
	if (!full || atomic_fetch_add(&w->run->shared->full, 1) == 0)
		log_error("%s%s", e->text, full ? "; without room the backup ends here" : "");
}

/* A mailbox is over, for good or not: say so. */
static void worker_over(void *context, struct sync *y)
{
	struct worker *w = context;
	const struct counts *c = &y->counts;
	char octets[16], text[NAME_OCTETS], file[MBOX_FILE_MAX + 8], json[400];

	if (sync_is_barred(y)) {
		log_warn("%s; \"ignore_mailboxes\" leaves it out without this warning", y->err.text);
	} else if (y->err.code != E_NONE) {
		worker_complain(w, &y->err);
	} else if (w->session.compare) {
		log_info("the server has %llu new mails, %llu have gone; "
			 "%llu compared octet by octet, %llu damaged",
			 c->stored, c->gone, c->compared, c->failures);
	} else if (c->stored > 0 || c->gone > 0 || c->back > 0) {
		log_info("%llu %s, %llu gone, %llu back, %s", c->stored,
			 w->session.dry ? "would be fetched" : "new", c->gone, c->back,
			 log_octets(octets, c->octets));
	} else {
		log_detail("nothing new");
	}
	if (y->err.code == E_NONE) /* that is progress, also where no mail was new */
		w->slot->tries = 0;
	counts_add(&w->slot->counts, c);
	if (c->stored + c->gone + c->back + c->compared + c->failures > 0 || y->err.code != E_NONE) {
		name_text(text, y->box->name, y->box->delimiter);
		mailbox_file(y->box, file);
		report_box(text, file, "%s",
			   counts_json(json, c, w->session.compare ? OF_MAILBOX | OF_COMPARED : OF_MAILBOX));
	}
	w->states[y->box - w->list.boxes] = BOX_OVER;
	worker_show(w, w->session.first != NULL ? w->session.first->box : NULL);
}

/* Give back the mailboxes in hand, whose archives are closed, for another worker or another time. */
static void worker_drop(struct worker *w)
{
	while (w->session.first != NULL) {
		struct sync *y = w->session.first;

		w->session.first = y->next;
		y->counts.others = 0; /* they will be found again; the rest will not */
		if (!w->session.compare)
			counts_add(&w->slot->counts, &y->counts);
		w->states[y->box - w->list.boxes] = BOX_FREE;
		set_free(&y->attempt.poison);
		free(y);
	}
	worker_show(w, NULL);
}

/* -- helpers -- */

/* See which helpers have ended; what they had in hand is free again. Returns how many are left. */
static unsigned account_reap(struct worker *w)
{
	struct board *b = w->board;
	unsigned left = 0;

	for (unsigned k = 1; k < b->account->processes; k++) {
		if (b->slots[k].pid == 0)
			continue;
		if (!slot_reap(w->run, b, &b->slots[k], WNOHANG)) {
			left++;
			continue;
		}
		for (uint32_t i = 0; i < w->list.todo; i++)
			if (w->states[i] == BOX_TAKEN + k)
				w->states[i] = BOX_FREE;
		w->next = 0;
	}
	return left;
}

static void worker_run(struct worker *w);

/* Start helpers as long as there is work and a place for them, and no account waits for its first. */
static void account_start_helpers(struct worker *w)
{
	struct board *b = w->board;
	uint32_t i = w->next;

	if (b->over || stop_due() || w->run->shared->starving > 0 || b->not_before_ms > now_ms())
		return;
	for (unsigned k = 1; k < b->account->processes; k++, i++) { /* a mailbox for each of them */
		struct slot *slot = &b->slots[k];
		pid_t pid;

		while (i < w->list.todo && w->states[i] != BOX_FREE)
			i++;
		if (i >= w->list.todo)
			return;
		if (slot->pid != 0 || slot->tries > w->run->config->retries) /* at work, or it has given up */
			continue;
		if (!place_pass(w->run, NULL, slot))
			return;
		if ((pid = slot_fork(slot)) < 0) {
			log_detail("cannot start a helper: %s", strerror(errno));
			place_pass(w->run, slot, NULL);
			return;
		}
		if (pid > 0)
			continue;
		if (w->im.s.fd >= 0)
			close(w->im.s.fd);
		w->im.s.fd = -1;
		w->slot = slot;
		w->session.first = NULL;
		w->cuts = 0;
		session_speak(&w->session, NULL);
		worker_run(w);
		_exit(0);
	}
}

/*
 * Return true if what nobody has should be left to the account's other workers, which may have just been started:
 * this one has as many new mails in hand as there are left for each of them, or more.
 */
static bool worker_has_its_share(const struct worker *w, uint64_t in_hand)
{
	uint64_t others = 0, left = 0;

	for (unsigned k = 0; k < w->board->account->processes; k++)
		others += w->board->slots[k].pid != 0 && &w->board->slots[k] != w->slot;
	if (in_hand < SHARE_MAILS || others == 0)
		return false;
	for (uint32_t i = w->next; i < w->list.todo && left <= in_hand * others; i++)
		left += w->states[i] == BOX_FREE ? w->list.boxes[i].weight : 0;
	return left <= in_hand * others;
}

/* Take a mailbox that nobody has. 'ahead': only one that does not keep those in hand waiting. */
static struct sync *worker_begin(void *context, bool ahead)
{
	struct worker *w = context;
	struct board *b = w->board;
	const unsigned mine = BOX_TAKEN + (unsigned)(w->slot - b->slots);
	uint64_t mails = 0, weight = 0;
	unsigned in_hand = 0;
	struct sync *y;

	/* A helper leaves its place to an account that has none. */
	if (stop_due() || b->over || (mine != BOX_TAKEN && w->run->shared->starving > 0))
		return NULL;
	for (y = w->session.first; y != NULL; y = y->next) {
		if (++in_hand == SESSION_BOXES_MAX || board_deaths(b, y->box) > 0)
			return NULL;
		mails += y->m != NULL ? mbox_count(y->m) : y->box->held; /* what it has, or a guess */
		weight += y->box->weight;
	}
	if (ahead && worker_has_its_share(w, weight))
		return NULL;
	for (uint32_t i = w->next; i < w->list.todo; i++) {
		const struct mailbox *box = &w->list.boxes[i];
		unsigned expected = BOX_FREE, deaths;

		if (w->states[i] != BOX_FREE) {
			w->next += i == w->next;
			continue;
		}
		deaths = board_deaths(b, box);
		if (ahead && (mails + box->held > AHEAD_MAILS || deaths > 0))
			return NULL;
		if (!atomic_compare_exchange_strong(&w->states[i], &expected, deaths > 1 ? BOX_OVER : mine))
			continue;
		if (deaths > 1) {
			log_error("\"%s\": its worker died twice", box->name);
			w->slot->counts.failures++;
			continue;
		}
		y = allocate(sizeof *y);
		y->session = &w->session;
		y->box = box;
		if (!ahead)
			worker_show(w, box);
		if (mine == BOX_TAKEN)
			account_start_helpers(w);
		return y;
	}
	return NULL;
}

/* Mails have come. Five times a second the account's process has time for its helpers. */
static void worker_progress(void *context, uint64_t mails, uint64_t octets)
{
	struct worker *w = context;
	int64_t now;

	w->slot->counts.mails += mails;
	w->slot->counts.received += octets;
	if (w->slot != w->board->slots || (now = now_ms()) - w->told_ms < 200)
		return;
	w->told_ms = now;
	account_reap(w);
	account_start_helpers(w);
}

/* -- a worker's life -- */

static void worker_hang_up(struct worker *w)
{
	struct counts *c = &w->slot->counts;

	if (w->im.s.fd < 0)
		return;
	if (imap_was_cut_ahead(&w->im) && w->im.s.err.code == E_NET) {
		if (++w->cuts == 2) {
			log_info("the server breaks at a second command: one at a time from here on");
			w->board->one_at_a_time = true;
			w->slot->tries = 0;
		}
	} else if (w->im.pipelines) {
		w->cuts = 0;
	}
	imap_close(&w->im);
	c->in += w->im.s.in;
	c->out += w->im.s.out;
	c->waits += w->im.s.waits;
}

/*
 * Wait before the next try: doubling, at random between half of it and the whole, or as long as the server
 * asks for. Returns false if it is for so long that another should have the place.
 */
static bool worker_pause(struct worker *w, const struct err *e)
{
	unsigned tries = w->slot->tries, most = tries < 7 ? 1000u << (tries - 1) : BACKOFF_SEC * 1000;
	unsigned pause = most / 2 + (unsigned)rand() % (most / 2 + 1);
	int64_t until, left;

	pause = pause > e->wait_sec * 1000 ? pause : e->wait_sec * 1000;
	log_warn("%s; trying again in %u.%u s (%u of %u)", e->text, pause / 1000, pause / 100 % 10, tries,
		 w->run->config->retries);
	until = now_ms() + pause;
	if (pause > PLACE_SEC * 1000 && w->run->options->mode != RUN_RESTORE) {
		w->board->not_before_ms = until;
		return false;
	}
	if (pause > PLACE_SEC * 1000) /* what a restore has done, another process would not know */
		place_pass(w->run, w->slot, NULL);
	while ((left = until - now_ms()) > 0 && !stop_due())
		poll(NULL, 0, left < 500 ? (int)left : 500);
	while (pause > PLACE_SEC * 1000 && !stop_due() && !place_pass(w->run, NULL, w->slot))
		poll(NULL, 0, 500);
	return true;
}

/* The account cannot be backed up any further in this run; of its workers one says so. */
static void account_fail(struct worker *w, const struct err *e)
{
	if (!w->board->over && e->code != E_STOPPED)
		worker_complain(w, e);
	w->board->over = w->board->over || e->code != E_STOPPED;
}

/* Return the CA bundle with this name (NULL: the usual one), loaded when it is first asked for. */
static struct trust *run_trust(struct run *run, const char *named)
{
	struct trust *t = run->trusts;

	for (; t < run->trusts + run->n_trusts; t++)
		if (strcmp(named != NULL ? named : "", t->named != NULL ? t->named : "") == 0)
			return t;
	run->n_trusts++;
	trust_load(t, named);
	return t;
}

static int worker_connect(struct worker *w, struct err *e)
{
	const struct account *account = w->board->account;
	const struct config *config = w->run->config;
	char *token = NULL;
	int result;

	if (account->oauth != NULL &&
	    oauth_token(config, account->oauth, account->trust, w->im.refused, &token, e) != 0)
		return -1;
	w->slot->counts.connections++;
	result = imap_open(&w->im, account, w->board->one_at_a_time ? 1 : IMAP_FLIGHT_MAX - 8,
			   token != NULL ? token : account->password, account->trust, config->timeout_sec);
	free(token);
	*e = w->im.s.err;
	return result;
}

/* -- what --list and --check print -- */

/*
 * Tell what --list says of a mailbox, so that lines fit into 80 columns: a name or a file that is too long
 * for that has a line of its own. 'why' is NULL, or why it is not backed up.
 */
static void list_print(const char *text, const char *why, const struct imap_status *status,
		       const struct mbox_info *info, const char *file)
{
	char visible[NAME_OCTETS], messages[24] = "-", size[16] = "-", when[16] = "never";
	time_t sec = (time_t)info->claim.when_sec;
	unsigned used, width;
	struct tm tm;

	if (why == NULL)
		report_box(text, file, ",\"messages\":%lu,\"size\":%llu,\"archived\":%lu,\"gone\":%lu",
			   (unsigned long)status->messages, (unsigned long long)status->octets,
			   (unsigned long)info->stored, (unsigned long)info->gone);
	if (log_to.records)
		return;
	log_visible(visible, sizeof visible, text, strlen(text));
	log_fit(visible, UINT_MAX, &used);
	printf("  %s%s%*s ", visible, used > 22 ? "\n  " : "", used > 22 ? 22 : 22 - (int)used, "");
	if (why != NULL) {
		printf("%s\n", why);
		return;
	}
	if (status->known)
		snprintf(messages, sizeof messages, "%lu", (unsigned long)status->messages);
	if (status->octets > 0)
		log_octets(size, status->octets);
	if (sec != 0 && localtime_r(&sec, &tm) != NULL)
		strftime(when, sizeof when, "%Y-%m-%d", &tm);
	log_visible(visible, sizeof visible, file, strlen(file));
	log_fit(visible, UINT_MAX, &width);
	printf("%8s %7s %8lu %5lu  %-10s%s%s\n", messages, size, (unsigned long)info->stored,
	       (unsigned long)info->gone, when, width > 11 ? "\n      " : " ", visible);
}

static void account_print_list(const struct worker *w)
{
	for (uint32_t i = 0; i < w->list.n; i++) {
		const struct mailbox *box = &w->list.boxes[i];
		const char *why = box->wanted ? NULL : box->selectable ? "(ignored)" : "(holds no mail)";
		char path[PATH_MAX_OCTETS + 300], file[MBOX_FILE_MAX + 8], text[NAME_OCTETS];
		struct mbox_info info;

		name_text(text, box->name, box->delimiter);
		mailbox_file(box, file);
		mailbox_path(&w->list, file, path);
		mbox_peek(path, box->name, &info);
		list_print(text, why, &box->status, &info, file);
	}
}

/* Print what --list -n says of an archive: what is on disk. */
static int archive_list(void *context, struct archive *a)
{
	struct mbox_info info;

	(void)context;
	mbox_peek(a->path, NULL, &info);
	list_print(a->text, NULL, &a->box.status, &info, strrchr(a->path, '/') + 1);
	return 0;
}

/* Print what --check found: how the line is protected, what the server can do, and what there is. */
static void account_print_check(const struct worker *w, unsigned long long mailboxes)
{
	static const char *const matters[] = { "LIST-STATUS",      "CONDSTORE", "ESEARCH",
					       "COMPRESS=DEFLATE", "LITERAL+",  "SPECIAL-USE" };
	const struct account *account = w->board->account;
	unsigned long long mails = 0;
	char line[600];

	if (log_to.records)
		return;
	tls_describe(&w->im.s, line, sizeof line);
	printf("%s: login works by %s at %s, port %u; %s\n   ", account->email, w->im.mechanism,
	       account->host, account->port, line);
	for (size_t i = 0; i < sizeof matters / sizeof *matters; i++)
		printf(" %s%s", w->im.capabilities & word_bit(capability_words, matters[i]) ? "" : "no ", matters[i]);
	for (uint32_t i = 0; i < w->list.n; i++)
		mails += w->list.boxes[i].wanted ? w->list.boxes[i].status.messages : 0;
	printf("\n    %llu mailboxes, %llu mails\n", mailboxes, mails);
}

/* -- an account's process -- */

static int account_restore(struct worker *w, struct err *e)
{
	static struct restore r; /* it outlives connections; what it begins with is no part of the file */
	unsigned refused = r.n_refused, done = r.done;
	int result;

	if (r.session == NULL) {
		r.broke = -1;
		r.blamed = UINT64_MAX;
		r.before = w->slot->counts; /* a process before this one may have died */
	}
	r.last = w->slot->tries == w->run->config->retries;
	r.session = &w->session;
	r.options = w->run->options;
	r.im = &w->im;
	r.counts = &w->slot->counts;
	result = restore_run(&r, e);
	w->slot->tries = r.n_refused > refused || r.done > done ? 0 : w->slot->tries;
	w->board->locked = w->board->locked || result == 3;
	return result < 0 ? -1 : 0;
}

/* List the mailboxes, and find out what there is to do. */
static int account_list(struct worker *w, struct err *e)
{
	const enum run_mode mode = w->run->options->mode;
	struct mailboxes *l = &w->list;
	bool first = w->slot->counts.mailboxes == 0;
	struct counts counts = { 0 };

	if (mailboxes_list(l, &w->im, mode == RUN_LIST, e) != 0)
		return -1;
	if (mode == RUN_RESTORE ? account_restore(w, e) != 0 : l->n == 0)
		return err_set(e, E_REFUSED, "the server lists no mailbox at all");
	if (first && l->odd.code != E_NONE)
		worker_complain(w, &l->odd);
	if (mailboxes_select(l) == 0 && mode != RUN_RESTORE) {
		log_error("none of %lu mailboxes is selected by \"mailboxes\", \"ignore_mailboxes\" and -m",
			  (unsigned long)l->n);
		counts.failures++;
	}
	l->all = mode == RUN_VERIFY;
	if (mode != RUN_RESTORE)
		mailboxes_plan(l, w->run->options->dry || mode != RUN_BACKUP, &counts);
	if (mode == RUN_CHECK)
		account_print_check(w, counts.mailboxes);
	if (mode == RUN_LIST)
		account_print_list(w);
	if (first)
		counts_add(&w->slot->counts, &counts);
	if (mode != RUN_BACKUP && mode != RUN_VERIFY)
		l->todo = 0;
	w->states = allocate_shared((l->todo + 1) * sizeof *w->states);
	for (uint32_t i = 0; i < l->todo && first; i++)
		w->board->weight += l->boxes[i].weight;
	return 0;
}

/* See what an error means for the worker. Returns true if it goes on, with a new connection. */
static bool worker_recovers(struct worker *w, bool connected, const struct err *e)
{
	struct slot *slot = w->slot;

	worker_hang_up(w);
	if (e->code == E_NONE) /* one mailbox gave the line up */
		return true;
	/* A fresh token goes on, and that is no retry: once a run if it was refused, more often if it ran out. */
	if (w->im.refused && (e->code == E_NET ? w->stale++ < 3 : !w->token_refused)) {
		w->token_refused = w->token_refused || e->code != E_NET;
		return true;
	}
	if (e->code == E_ACCOUNT && !connected && slot != w->board->slots) { /* the first one was let in */
		slot->tries = w->run->config->retries;
	} else if (e->code < E_NET || e->code > E_WAIT) {
		account_fail(w, e);
		return false;
	}
	if (++slot->tries <= w->run->config->retries)
		return worker_pause(w, e);
	if (connected && w->session.first != NULL) {
		w->session.first->err = *e;
		session_finish(&w->session, w->session.first);
		slot->tries = 0;
		return true;
	}
	if (slot != w->board->slots || account_reap(w) > 0)
		log_warn("%s; going on with one connection less", e->text);
	else
		account_fail(w, e);
	return false;
}

/* Connect, list if nobody has, and work until there is nothing left to be taken. */
static void worker_run(struct worker *w)
{
	srand((unsigned)getpid() ^ (unsigned)now_ms());
	while (!stop_due() && !w->board->over) {
		uint64_t before = w->slot->counts.mails;
		struct err e = { 0 };
		bool connected;

		w->session.mails = w->session.octets = w->session.steps = 0;
		connected = worker_connect(w, &e) == 0 && (w->states != NULL || account_list(w, &e) == 0);
		if (connected && session_run(&w->session, &e) == 0)
			break;
		if (w->slot->counts.mails > before || w->session.steps > 0)
			w->slot->tries = w->stale = 0;
		if (!worker_recovers(w, connected, &e))
			break;
	}
	worker_drop(w);
	worker_hang_up(w);
	place_pass(w->run, w->slot, NULL);
}

/*
 * Make a folder unless there is one, with its parents, in a way that outlasts a power cut as its files do; also
 * where an earlier run made it, and died before that was sure.
 */
static int make_folder(const char *path)
{
	char *copy = copy_text(path), *parent = dirname(copy);
	bool there = strcmp(parent, path) == 0 || /* "/" or "." */
		     (make_folder(parent) == 0 && (mkdir(path, 0700) == 0 || errno == EEXIST));

	if (there)
		folder_sync(parent);
	free(copy);
	return there ? 0 : -1;
}

/* Create the account's folder and hold its lock: one run at a time. */
static int account_lock(struct worker *w, struct err *e)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char path[PATH_MAX_OCTETS + 300];
	struct stat st, other;

	mailbox_path(&w->list, ".lock", path);
	if ((access(path, F_OK) != 0 && make_folder(w->folder) != 0) || stat(w->folder, &st) != 0)
		return err_errno(e, E_SYSTEM, "%s: cannot create the folder", w->folder);
	if (st.st_uid != geteuid())
		return err_set(e, E_SYSTEM, "%s: the folder belongs to another user (%lu)", w->folder,
			       (unsigned long)st.st_uid);
	if (st.st_mode & (S_IWGRP | S_IWOTH))
		log_warn("%s: others may write into this folder; try: chmod go-w", w->folder);
	w->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
	if (w->lock < 0 || fstat(w->lock, &st) != 0)
		return err_errno(e, E_SYSTEM, "%s: cannot create", path);
	if (!S_ISREG(st.st_mode))
		return err_set(e, E_SYSTEM, "%s: this is not a file", path);
	if (fcntl(w->lock, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN))
		return err_set(e, E_LOCKED, "another run is at work on this account");
	mailbox_path(&w->list, ".LOCK", path);
	w->list.folds = stat(path, &other) == 0 && st.st_ino == other.st_ino && st.st_dev == other.st_dev;
	return 0;
}

/*
 * Have the first line that the account's password_command prints as its password. Its signals are as usual,
 * and it gets "timeout" seconds; all that it started ends with it.
 */
static int account_ask_command(struct run *run, struct account *account, struct err *e)
{
	int64_t deadline = now_ms() + (int64_t)run->config->timeout_sec * 1000;
	char text[2048];
	bool ended = false;
	int pair[2], status = -1;
	unsigned tries = 0;
	size_t n = 0;
	ssize_t got = 1;
	pid_t pid = -1;

	if (pipe(pair) == 0)
		while ((pid = fork()) < 0 && tries++ < run->config->retries && !stop_due())
			poll(NULL, 0, 1000);
	if (pid < 0)
		return err_errno(e, E_ACCOUNT, "cannot run \"password_command\"");
	if (pid == 0) {
		setpgid(0, 0);
		signal(SIGPIPE, SIG_DFL);
		signal(SIGXFSZ, SIG_DFL);
		dup2(pair[1], STDOUT_FILENO);
		close(pair[0]);
		close(pair[1]);
		execl("/bin/sh", "sh", "-c", account->password_command, (char *)NULL);
		_exit(127);
	}
	setpgid(pid, pid); /* whoever of the two is first */
	close(pair[1]);
	while (!stop_due() && now_ms() < deadline) {
		struct pollfd fd = { .fd = got > 0 ? pair[0] : -1, .events = POLLIN };

		ended = ended || waitpid(pid, &status, WNOHANG) == pid;
		if (poll(&fd, 1, ended ? 0 : 10) > 0) {
			got = read(pair[0], text + n, sizeof text - 1 - n);
			n += got > 0 ? (size_t)got : 0;
			n = n < sizeof text / 2 ? n : sizeof text / 2; /* what is more is overwritten */
		} else if (ended) {
			break; /* what it has left behind may hold the pipe */
		}
	}
	close(pair[0]);
	if (!ended) {
		kill(-pid, SIGKILL);
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
	}
	text[n] = '\0';
	text[strcspn(text, "\r\n")] = '\0';
	if (!ended && stop_due())
		err_set(e, E_STOPPED, "stopped by a signal");
	else if (!ended)
		err_set(e, E_ACCOUNT, "\"password_command\" did not end within %u seconds",
			run->config->timeout_sec);
	else if (status != 0 || text[0] == '\0')
		err_set(e, E_ACCOUNT, "\"password_command\" %s",
			status != 0 ? "failed" : "printed nothing");
	else
		account->password = secret_take(text);
	wipe(text, sizeof text);
	return e->code == E_NONE ? 0 : -1;
}

/* Have what a worker needs before it connects: the lock, the CAs, the password. Returns 0, or -1. */
static int account_prepare(struct worker *w, struct err *e)
{
	const struct options *o = w->run->options;
	struct account *account = w->board->account;

	/* Two restores at once would put all there twice; but what cannot be written to can be restored. */
	if (!o->dry && (o->mode == RUN_BACKUP || (o->mode == RUN_RESTORE && access(w->folder, W_OK) == 0)) &&
	    account_lock(w, e) != 0 && (o->mode == RUN_BACKUP || e->code == E_LOCKED))
		return -1;
	*e = (struct err){ 0 };
	/* It will be refused, and its fingerprint told; elsewhere it may do without. */
	if (account->pins == 0 && account->ssl == SSL_ON && account->trust->err.code != E_NONE)
		log_warn("%s", account->trust->err.text);
	if (account->password != NULL || account->oauth != NULL)
		return 0;
	if (account->password_command != NULL)
		return account_ask_command(w->run, account, e);
	return err_set(e, E_ACCOUNT, "no password: expected %s",
		       w->run->config->quick ? "IMAP_BACKUP_PASSWORD or --password-command"
					     : "one of \"password\", \"password_command\" and \"oauth2\"");
}

/* An account's process, from its lock to its last helper. */
static void account_run(struct run *run, struct board *b)
{
	const struct config *config = run->config;
	const struct options *o = run->options;
	struct worker *w = allocate(sizeof *w);
	struct err e = { 0 };
	uint32_t left = 0;
	int status = 0;

	w->run = run;
	w->board = b;
	w->slot = b->slots;
	w->im.s.fd = -1;
	snprintf(w->folder, sizeof w->folder, "%s/%s", config->destination, b->account->email);
	w->list = (struct mailboxes){ .config = config,
				      .account = b->account,
				      .only = o->mailboxes,
				      .folder = w->folder };
	w->session = (struct session){ .config = config,
				       .list = &w->list,
				       .im = &w->im,
				       .dry = o->dry || o->mode == RUN_VERIFY,
				       .compare = o->mode == RUN_VERIFY,
				       .begin = worker_begin,
				       .progress = worker_progress,
				       .over = worker_over,
				       .context = w };
	/* A core dump is to hold no more than it must. */
	for (const struct account *a = config->accounts; a < config->accounts + config->n_accounts; a++)
		if (a != b->account && a->password != NULL)
			wipe((void *)(uintptr_t)a->password, strlen(a->password));
	if (o->mode == RUN_LIST && !log_to.records)
		printf("%s\n  mailbox                messages    size archived  gone  last       file\n",
		       b->account->email);
	if (o->mode == RUN_VERIFY || run_is_offline(o)) {
		status = archives_walk(config, o, b->account,
				       o->mode == RUN_VERIFY ? archive_verify : archive_list,
				       &w->slot->counts);
		w->slot->counts.failures += status == 1 && w->slot->counts.failures == 0;
		b->locked = status == 3;
	}
	session_speak(&w->session, NULL);
	if (run_is_offline(o)) {
		b->over = true;
	} else if (account_prepare(w, &e) == 0) {
		worker_run(w);
	} else {
		account_fail(w, &e);
	}
	while (account_reap(w) > 0) {
		for (unsigned k = 1; k < b->account->processes && stop_due(); k++)
			if (b->slots[k].pid != 0)
				kill(b->slots[k].pid, SIGTERM);
		poll(NULL, 0, 50);
	}
	/* What helpers left undone, because they died or had to wait, is for another process. */
	while (left < w->list.todo && w->states[left] == BOX_OVER)
		left++;
	b->over = b->over || (w->states != NULL && left == w->list.todo);
	fflush(stdout);
	_exit(0);
}

/* -- the parent -- */

/* Start an account's process; its first slot holds a place. */
static bool board_start(struct run *run, struct board *b)
{
	int pair[2];
	pid_t pid;

	if (pipe(pair) != 0)
		return false;
	pid = slot_fork(b->slots);
	if (pid == 0) {
		dup2(pair[1], STDOUT_FILENO);
		close(pair[0]);
		close(pair[1]);
		log_to.records = log_to.errors != NULL;
		log_to.errors = NULL;
		account_run(run, b);
	}
	close(pair[1]);
	if (pid < 0)
		close(pair[0]);
	if (pid < 0)
		return false;
	fcntl(pair[0], F_SETFD, FD_CLOEXEC);
	b->output = pair[0];
	b->began_ms = b->began_ms == 0 ? now_ms() : b->began_ms;
	return true;
}

/* The processes of an account are gone: as they should, or they died. */
static void board_end(struct run *run, struct board *b)
{
	log_context(b->account->email, "");
	close(b->output);
	slot_reap(run, b, b->slots, 0);
	for (unsigned k = 1; k < b->account->processes; k++) {
		b->slots[k].pid = 0;
		place_pass(run, &b->slots[k], NULL);
	}
	if (!b->over && (board_deaths(b, NULL) > 1 || b->blamed == BLAME_MAX)) {
		log_error("the account's process died again and again");
		b->slots->counts.failures++;
		b->over = true;
	}
	if (b->over) {
		b->ended_ms = now_ms();
	} else if (b->blamed > 0 && run->options->mode == RUN_RESTORE) {
		log_info("the server may still be storing what was sent: going on in %d s", BACKOFF_SEC);
		b->not_before_ms = now_ms() + BACKOFF_SEC * 1000;
	}
	log_context("", "");
}

/* Take in what an account's processes have written: text to be passed on, or records, one a line. */
static void board_read(struct run *run, struct board *b)
{
	ssize_t got = read(b->output, b->text + b->octets, sizeof b->text - b->octets);
	char *end;

	if (got == 0)
		board_end(run, b);
	if (got <= 0)
		return;
	b->octets += (size_t)got;
	if (!run->options->json) {
		fwrite(b->text, 1, b->octets, stdout);
		b->octets = 0;
	}
	while ((end = memchr(b->text, '\n', b->octets)) != NULL) {
		struct pile *pile = b->text[0] == 'E' ? &b->errors : &b->boxes;

		pile_add(pile, b->text + 1, (size_t)(end - b->text) - 1);
		b->octets -= (size_t)(end + 1 - b->text);
		memmove(b->text, end + 1, b->octets);
	}
}

/* What an account's processes have done so far. */
static struct counts board_sum(const struct board *b)
{
	struct counts sum = { 0 };

	for (unsigned k = 0; k < b->account->processes; k++)
		counts_add(&sum, &b->slots[k].counts);
	return sum;
}

/* The one live line of a terminal: what matters most stands first, for it is cut where the screen ends. */
static void run_draw(struct run *run)
{
	unsigned long long mails = 0, octets = 0, weight = 0, left, rate;
	unsigned columns = 80, used;
	char line[500] = "\r\033[K", hand[200] = "", amount[16], *end = line + 4;
	int64_t now = now_ms();
	struct winsize size;
	ssize_t ignored;

	if (!log_to.terminal || log_to.level < LOG_INFO || run->options->mode != RUN_BACKUP ||
	    now - run->drawn_ms < 250)
		return;
	run->drawn_ms = now;
	for (struct board *b = run->boards; b < run->boards + run->n_boards; b++) {
		struct counts sum = board_sum(b);

		mails += sum.mails;
		octets += sum.received;
		weight += b->ended_ms > 0 || b->weight < sum.mails ? sum.mails : b->weight;
		for (unsigned k = 0; k < b->account->processes && hand[0] == '\0'; k++)
			if (b->slots[k].name[0] != '\0')
				snprintf(hand, sizeof hand, "%.80s %s", b->account->email,
					 b->slots[k].name);
	}
	rate = octets * 1000 / (unsigned long long)(now - run->began_ms + 1);
	if (weight > 0)
		end += sprintf(end, "%llu%% ", mails * 100 / weight);
	end += sprintf(end, "%llu mails %s", mails, log_octets(amount, octets));
	if (rate > 0)
		end += sprintf(end, " %s/s", log_octets(amount, rate));
	if (rate > 0 && mails > 0 && weight > mails) {
		left = octets / mails * (weight - mails) / rate;
		end += sprintf(end, " %llu:%02llu left", left / 60, left % 60);
	}
	sprintf(end, " %s", hand);
	if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1)
		columns = size.ws_col;
	ignored = write(STDERR_FILENO, line, 4 + log_fit(line + 4, columns - 1, &used));
	(void)ignored;
}

/* Start the accounts' processes that are due and have a place. */
static void run_start(struct run *run)
{
	unsigned starving = 0;

	for (struct board *b = run->boards; b < run->boards + run->n_boards; b++) {
		if (b->ended_ms != 0 || b->slots->pid != 0 || b->not_before_ms > now_ms())
			continue;
		if (!place_pass(run, NULL, b->slots)) {
			starving++;
		} else if (!board_start(run, b)) {
			log_write(b->slots->tries < run->config->retries ? LOG_WARN : LOG_ERROR,
				  "%s: cannot start a process: %s", b->account->email, strerror(errno));
			place_pass(run, b->slots, NULL);
			b->not_before_ms = now_ms() + 1000;
			if (b->slots->tries++ == run->config->retries) {
				b->slots->counts.failures++;
				b->ended_ms = now_ms();
			}
		}
	}
	run->shared->starving = starving;
}

/* Run until every account is over. What the modes with a result print comes in the order of the config. */
static void run_all(struct run *run)
{
	struct pollfd *fds = allocate(run->n_boards * sizeof *fds);
	bool left = true;

	run->began_ms = now_ms();
	while (left) {
		if (!stop_asked)
			run_start(run);
		left = false;
		for (unsigned i = 0; i < run->n_boards; i++) {
			const struct board *b = &run->boards[i];
			pid_t pid = b->slots->pid;

			if (stop_asked && pid != 0)
				kill(pid, SIGTERM);
			fds[i] = (struct pollfd){ .fd = -1, .events = POLLIN };
			if (pid != 0 && (!left || run->options->mode == RUN_BACKUP))
				fds[i].fd = b->output;
			left = left || pid != 0 || (b->ended_ms == 0 && !stop_asked);
		}
		if (!left || poll(fds, run->n_boards, log_to.terminal ? 250 : 500) < 0)
			continue;
		for (unsigned i = 0; i < run->n_boards; i++)
			if (fds[i].revents != 0)
				board_read(run, &run->boards[i]);
		run_draw(run);
	}
	free(fds);
}

/* ======== command line ======== */

/*
 * Exit status, of every mode: 0 everything was done, or is well; 1 something failed (the rest was still
 * done), or is damaged; 2 the command line or the configuration is wrong, nothing was done; 3 nothing
 * failed, but another run holds an account's archive.
 */
enum { /* modes that an option goes with, as bits; 0: all */
	VERIFY = 1 << RUN_VERIFY,
	RESTORE = 1 << RUN_RESTORE,
	AUTHORIZE = 1 << RUN_AUTHORIZE,
	EXPORT_ALL = 1 << RUN_EXPORT_ALL,
	WITH_ACCOUNTS = AUTHORIZE - 1, /* all but this one */
	WITH_NEWS = (1 << RUN_EXPORT) - 1
};

#define TO(field) offsetof(struct options, field)

/* In the order of the help, which is printed from it. */
static const struct option_row {
	enum { TAKE_MODE, TAKE_FLAG, TAKE_TEXT, TAKE_LIST, TAKE_LEVEL, TAKE_HELP } how;
	char letter; /* '\0': none */
	const char *name, *argument;
	size_t at; /* the mode; or the place of a flag (int), text or list in struct options */
	unsigned modes;
	const char *help;
} option_rows[] = {
	{ TAKE_MODE, 0, "list", NULL, RUN_LIST, 0, "show accounts, mailboxes, messages, and their files" },
	{ TAKE_MODE, 0, "check", NULL, RUN_CHECK, 0, "try configuration, connection, certificate, login" },
	{ TAKE_MODE, 0, "verify", NULL, RUN_VERIFY, 0, "compare the archives with their indexes ..." },
	{ TAKE_FLAG, 0, "online", NULL, TO(online), VERIFY, "... and with the server" },
	{ TAKE_MODE, 0, "restore", NULL, RUN_RESTORE, 0, "put archived mail back on the server ..." },
	{ TAKE_FLAG, 0, "yes", NULL, TO(yes), RESTORE, "... without asking" },
	{ TAKE_FLAG, 0, "include-gone", NULL, TO(include_gone), RESTORE, "... mail that left it, too" },
	{ TAKE_TEXT, 0, "into", "MAILBOX", TO(into), RESTORE, "... all below this mailbox" },
	{ TAKE_MODE, 0, "export", "MESSAGE-ID", RUN_EXPORT, 0, "write one archived mail to stdout" },
	{ TAKE_MODE, 0, "export-all", NULL, RUN_EXPORT_ALL, 0, "write all archived mail as one mbox ..." },
	{ TAKE_FLAG, 0, "gone", NULL, TO(gone), EXPORT_ALL, "... or only what left the server" },
	{ TAKE_MODE, 0, "authorize", "NAME", RUN_AUTHORIZE, 0, "sign in for an entry of \"oauth2\" ..." },
	{ TAKE_FLAG, 0, "paste", NULL, TO(paste), AUTHORIZE, "... with an address that is pasted" },
	{ .help = "" },
	{ TAKE_LIST, 'a', "account", "EMAIL", TO(accounts), WITH_ACCOUNTS, "only this one (repeatable)" },
	{ TAKE_LIST, 'm', "mailbox", "NAME", TO(mailboxes), WITH_ACCOUNTS, "only this one (with * and ?)" },
	{ TAKE_FLAG, 'n', "dry-run", NULL, TO(dry), WITH_NEWS, "say what would be done" },
	{ TAKE_LEVEL, 'q', "quiet", NULL, 0, 0, "warnings and errors only (for cron)" },
	{ TAKE_LEVEL, 'v', "verbose", NULL, 0, 0, "more; -vv shows the protocol, never secrets" },
	{ TAKE_FLAG, 0, "json", NULL, TO(json), WITH_NEWS, "tell what was done as JSON on stdout" },
	{ TAKE_HELP, 'h', "help", NULL, 0, 0, "this" },
	{ TAKE_HELP, 'V', "version", NULL, 0, 0, "version and libraries" },
	{ .help = "\nThe configuration is ./config.json unless named. Without one, for one account:" },
	{ TAKE_TEXT, 0, "host", "HOST", TO(host), WITH_ACCOUNTS, "the server" },
	{ TAKE_TEXT, 0, "user", "EMAIL", TO(user), WITH_ACCOUNTS, "who logs in" },
	{ TAKE_TEXT, 0, "to", "FOLDER", TO(to), WITH_ACCOUNTS, "where the archives go" },
	{ TAKE_TEXT, 0, "port", "PORT", TO(port), WITH_ACCOUNTS, "993; 143 for STARTTLS" },
	{ TAKE_TEXT, 0, "password-command", "CMD", TO(password_command), WITH_ACCOUNTS,
	  "else the environment's IMAP_BACKUP_PASSWORD, else asked" },
};

enum {
	OPTION_ROWS = sizeof option_rows / sizeof *option_rows,
	OPTION_QUICK = OPTION_ROWS - 5 /* from here on they stand for a configuration */
};

#define usage_error(...) (log_error(__VA_ARGS__), fputs("try: imap_backup --help\n", stderr), 2)

static void options_help(void)
{
	puts("usage: imap_backup [options] [config.json]\n\n"
	     "Backs up all mailboxes of IMAP accounts into mbox files. Or:");
	for (const struct option_row *row = option_rows; row < option_rows + OPTION_ROWS; row++) {
		if (row->name == NULL) {
			puts(row->help);
			continue;
		}
		printf(row->letter != 0 ? "  -%c, " : "      ", row->letter);
		printf("--%s %*s%s\n", row->name, (int)strlen(row->name) - 21,
		       row->argument != NULL ? row->argument : "", row->help);
	}
	puts("\nExit status: 0 all is done or well, 1 something failed or is damaged, 2 wrong\n"
	     "options or configuration, 3 another run is at work.");
}

/* Check that the options (bits of rows) fit the mode and each other. Returns -1, or the exit status. */
static int options_check(const struct options *o, const struct option_row *mode, unsigned given)
{
	for (unsigned i = 0; i < OPTION_ROWS; i++)
		if (given & 1u << i && option_rows[i].modes != 0 && !(option_rows[i].modes & 1u << o->mode))
			return usage_error("--%s does not go together with %s%s", option_rows[i].name,
					   mode != NULL ? "--" : "a ",
					   mode != NULL ? mode->name : "backup");
	if (given >> OPTION_QUICK == 0)
		return -1;
	if (o->host == NULL || o->user == NULL || o->to == NULL)
		return usage_error("a run without a configuration file needs --host, --user and --to");
	if (o->config_path != NULL)
		return usage_error("%s: a configuration file does not go together with --host",
				   o->config_path);
	if (o->port != NULL && (o->port[0] == '\0' || o->port[strspn(o->port, "0123456789")] != '\0'))
		return usage_error("--port: found \"%s\", expected a number", o->port);
	return -1;
}

/* Take the options. Returns -1 to go on, else the exit status. */
static int options_parse(struct options *o, int argc, char **argv)
{
	struct option words[OPTION_ROWS + 1] = { { 0 } };
	char letters[2 * OPTION_ROWS + 2] = ":", *end = letters + 1;
	const struct option_row *row, *mode = NULL;
	const struct json **list;
	struct json *more;
	unsigned given = 0, n = 0;
	int status, letter, found = 0;

	for (row = option_rows; row < option_rows + OPTION_ROWS; row++) {
		if (row->name != NULL)
			words[n++] = (struct option){ row->name, row->argument != NULL, &found,
						      (int)(row - option_rows) };
		if (row->letter != 0)
			end += sprintf(end, "%c%s", row->letter, row->argument != NULL ? ":" : "");
	}
	opterr = 0;
	while ((letter = getopt_long(argc, argv, letters, words, NULL)) != -1) {
		if (letter == ':' || letter == '?')
			return usage_error(letter == ':'
						   ? "%s%.1s needs a value"
						   : "unknown option, or one that takes no value: %s%.1s",
					   optopt > OPTION_ROWS ? "-" : argv[optind - 1],
					   optopt > OPTION_ROWS ? (char[]){ (char)optopt, '\0' } : "");
		for (int i = 0; letter != 0 && i < OPTION_ROWS; i++)
			found = option_rows[i].letter == letter ? i : found;
		row = &option_rows[found];
		given |= 1u << found;
		switch (row->how) {
		case TAKE_MODE:
			if (mode != NULL && (mode != row || optarg != NULL))
				return usage_error("only one of --%s and --%s", mode->name, row->name);
			mode = row;
			o->mode = (enum run_mode)row->at;
			o->what = optarg;
			break;
		case TAKE_FLAG:
			*(int *)(void *)((char *)o + row->at) = 1;
			break;
		case TAKE_TEXT:
			*(const char **)(void *)((char *)o + row->at) = optarg;
			break;
		case TAKE_LIST:
			list = (const struct json **)(void *)((char *)o + row->at);
			more = allocate(2 * sizeof *more); /* the list as it was, behind one entry more */
			more[0] = (struct json){ .type = JSON_ARRAY, .child = more + 1 };
			more[1] = (struct json){ .type = JSON_STRING, .text = optarg };
			more[1].next = *list != NULL ? (*list)->child : NULL;
			*list = more;
			break;
		case TAKE_LEVEL:
			log_to.level = row->letter == 'q'          ? LOG_WARN
				       : log_to.level < LOG_DETAIL ? LOG_DETAIL
								   : LOG_TRACE;
			break;
		case TAKE_HELP:
			if (row->letter == 'h')
				options_help();
			else
				printf("imap_backup %s (BearSSL, %s)\n", VERSION, curl_version());
			log_to.errors = NULL;
			return output_end(0);
		}
	}
	if (optind < argc)
		o->config_path = argv[optind++];
	if (optind < argc)
		return usage_error("one configuration file is enough: %s", argv[optind]);
	if ((status = options_check(o, mode, given)) < 0 && o->host == NULL && o->config_path == NULL)
		o->config_path = "config.json";
	return status;
}

/* Return the destination, or the folder above it, which is in 'path', that is there while it has to be made. */
static const char *destination_now(const struct config *c, char path[PATH_MAX_OCTETS])
{
	snprintf(path, PATH_MAX_OCTETS, "%s", c->destination);
	while (access(path, F_OK) != 0 && errno == ENOENT && strcmp(path, ".") != 0 && strcmp(path, "/") != 0)
		path = dirname(path);
	return path;
}

/* Return what keeps the destination from being on the mounted volume that "require_mount" wants, or NULL. */
static const char *destination_unmounted(const struct config *c)
{
	char path[PATH_MAX_OCTETS];
	struct stat root, own;

	if (!c->require_mount)
		return NULL;
	if (stat("/", &root) != 0 || stat(destination_now(c, path), &own) != 0)
		return strerror(errno);
	return root.st_dev == own.st_dev ? "\"require_mount\": no volume is mounted there" : NULL;
}

/* Say whether backups can go to the destination, which may have to be made, and how much is free there. */
static bool destination_describe(const struct config *c, char line[PATH_MAX_OCTETS + 200])
{
	const char *wrong = destination_unmounted(c);
	char path[PATH_MAX_OCTETS], octets[16];
	const char *up = destination_now(c, path);
	struct statvfs fs;

	if (wrong == NULL && (access(up, W_OK | X_OK) != 0 || statvfs(up, &fs) != 0))
		wrong = strerror(errno);
	if (wrong != NULL)
		snprintf(line, PATH_MAX_OCTETS + 200, "%s: %s", c->destination, wrong);
	else
		snprintf(line, PATH_MAX_OCTETS + 200, "%s: can be %s, %s free", c->destination,
			 strcmp(up, c->destination) == 0 ? "written" : "made",
			 log_octets(octets, (uint64_t)fs.f_bavail * fs.f_frsize));
	return wrong == NULL;
}

/* Find the accounts that are wanted. Returns 0, or the exit status if -a names one that is not there. */
static int accounts_choose(const struct config *c, const struct options *o)
{
	const struct json *named = o->accounts != NULL ? o->accounts->child : NULL;
	unsigned i;

	for (i = 0; i < c->n_accounts; i++)
		c->accounts[i].wanted = named == NULL;
	for (; named != NULL; named = named->next) {
		for (i = 0; i < c->n_accounts && strcasecmp(named->text, c->accounts[i].email) != 0;)
			i++;
		if (i == c->n_accounts)
			return usage_error("no such account in the configuration: %s", named->text);
		c->accounts[i].wanted = true;
	}
	return 0;
}

/* Make a board for each account that is wanted, and have the CA bundles and passwords that are needed. */
static void run_prepare(struct run *run)
{
	const struct config *c = run->config;
	const struct options *o = run->options;

	run->shared = allocate_shared(sizeof *run->shared + c->n_accounts * sizeof *run->boards);
	run->boards = run->shared->boards;
	for (struct account *a = c->accounts; a < c->accounts + c->n_accounts; a++) {
		if (!a->wanted)
			continue;
		run->boards[run->n_boards++].account = a;
		if (o->mode != RUN_BACKUP)
			a->processes = 1;
		if (run_is_offline(o))
			continue;
		if (a->pins == 0 || a->oauth != NULL) /* else the fingerprints alone decide */
			a->trust = run_trust(run, a->ca_file);
		if (a->password == NULL && a->password_command == NULL && a->oauth == NULL && !stop_asked)
			a->password = password_prompt(a->email);
	}
}

/*
 * Set the clock that certificates are judged by: the system's, unless it is earlier than the
 * program itself. What is later than that is learned from certificates.
 */
static void run_set_clock(void)
{
	int64_t built = build_sec() - 86400; /* whatever the time zone was */
	int64_t shown = time(NULL);
	char now[16], taken[16];

	clock_wrong = shown < built;
	clock_sec = clock_wrong ? built : shown;
	if (clock_wrong)
		log_warn("this device's clock says %s, which cannot be: certificates are judged as of %s",
			 cert_date(now, shown / 86400), cert_date(taken, clock_sec / 86400));
}

/* How long an account has been, or was, at work. */
static double board_seconds(const struct board *b)
{
	int64_t end_ms = b->ended_ms > 0 ? b->ended_ms : now_ms();

	return b->began_ms > 0 ? (double)(end_ms - b->began_ms) / 1000 : 0;
}

/* Say what a backup, or a restore, has done for an account. */
static void board_summary(const struct run *run, const struct board *b, const struct counts *c)
{
	unsigned long long others = log_to.level > LOG_INFO ? c->others : c->others_new; /* told once */
	char failures[40] = "", octets[16];

	log_octets(octets, c->octets);
	log_context(b->account->email, "");
	if (run->options->mode == RUN_RESTORE)
		log_info("%llu mailboxes: %llu mails put back, %s in %.1f s%s", c->mailboxes, c->stored, octets,
			 board_seconds(b), stop_asked || c->failures > 0 ? ", NOT ALL" : "");
	if (run->options->mode != RUN_BACKUP)
		return;
	if (others > 0)
		log_info("%llu duplicate%s left out", others, others > 1 ? "s" : "");
	if (c->failures > 0)
		snprintf(failures, sizeof failures, ", %llu FAILED", c->failures);
	log_info("%llu mailboxes (%llu without news): %llu %s, %llu gone, %llu back, %s in %.1f s%s%s",
		 c->mailboxes, c->unchanged, c->stored, run->options->dry ? "would be fetched" : "new",
		 c->gone, c->back, octets, board_seconds(b), failures,
		 stop_asked && !b->over ? ", stopped: NOT WHOLE" : "");
	log_detail("%llu connection%s, %llu waits for an answer, %llu octets in, %llu out", c->connections,
		   c->connections == 1 ? "" : "s", c->waits, c->in, c->out);
}

/* Say what a run has done, an account a line. Returns the exit status. */
static int run_summary(const struct run *run)
{
	const struct options *o = run->options;
	bool failed = stop_asked != 0, locked = false;
	char line[PATH_MAX_OCTETS + 200];

	for (const struct board *b = run->boards; b < run->boards + run->n_boards; b++) {
		struct counts sum = board_sum(b);

		failed = failed || sum.failures > 0;
		locked = locked || b->locked;
		if (b->began_ms > 0)
			board_summary(run, b, &sum);
	}
	log_context("", "");
	if (o->mode == RUN_CHECK || (o->mode == RUN_BACKUP && o->dry)) {
		bool well = destination_describe(run->config, line);

		failed = failed || !well;
		if (well && o->mode == RUN_CHECK && log_to.errors == NULL)
			printf("%s\n", line);
		else
			log_write(well ? LOG_INFO : LOG_ERROR, "%s", line);
	}
	if (stop_asked)
		log_warn("stopped by a signal; what is done is kept, the rest is not done");
	return failed ? 1 : locked ? 3 : 0;
}

/*
 * Tell a URL that a whole run begins, or how it ended; of a part of one nothing is told. What comes of it
 * changes no exit status.
 */
static void run_tell(struct run *run, const char *url)
{
	const struct options *o = run->options;
	struct http *h;
	char site[300];

	if (url == NULL || o->mode != RUN_BACKUP || o->dry || o->mailboxes != NULL || o->accounts != NULL ||
	    stop_asked)
		return;
	h = http_ask(url, NULL, run_trust(run, run->config->ca_file));
	if (h->err.code != E_NONE)
		log_warn("%s", h->err.text);
	else
		log_detail("%s: told", http_site(site, url));
	munmap(h, sizeof *h);
}

static int archive_count(void *context, struct archive *a)
{
	uint64_t *sums = context;
	struct mbox_info info;
	char octets[16];

	mbox_tally(a->m, &info);
	log_info("%lu mails, %lu of them gone, %s", (unsigned long)info.stored, (unsigned long)info.gone,
		 log_octets(octets, (uint64_t)info.octets));
	sums[0]++;
	sums[1] += info.stored;
	return 0;
}

/* Say what would go where, and ask on the terminal. */
static bool restore_confirmed(const struct config *c, const struct options *o)
{
	uint64_t sums[2] = { 0, 0 };
	char answer[16] = "";
	int fd = open("/dev/tty", O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (fd < 0) {
		log_error("a restore writes to the server: without a terminal to ask on it needs --yes");
		return false;
	}
	for (unsigned i = 0; i < c->n_accounts; i++)
		if (c->accounts[i].wanted) {
			archives_walk(c, o, &c->accounts[i], archive_count, sums);
			log_context("", "");
			log_info("%s goes to %s at %s", c->accounts[i].email, c->accounts[i].username,
				 c->accounts[i].host);
		}
	dprintf(fd, "Put what is missing of %llu mails in %llu mailboxes back on the server? [y/N] ",
		(unsigned long long)sums[1], (unsigned long long)sums[0]);
	if (line_read(fd, answer, sizeof answer) == 0)
		dprintf(fd, "\n");
	close(fd);
	if (strcasecmp(answer, "y") == 0 || strcasecmp(answer, "yes") == 0)
		return true;
	log_error("not confirmed: nothing was done");
	return false;
}

/* Sign in for an entry of "oauth2"; its provider is judged by the CAs of the account that it is for. */
static int run_authorize(struct run *run)
{
	const struct config *c = run->config;
	const struct oauth *oauth = config_oauth(c, run->options->what);
	const char *ca_file = c->ca_file;
	struct err e = { 0 };

	if (oauth == NULL)
		return usage_error("no such entry of \"oauth2\" in the configuration: %s",
				   run->options->what);
	for (unsigned i = c->n_accounts; i-- > 0;)
		if (c->accounts[i].oauth == oauth)
			ca_file = c->accounts[i].ca_file;
	if (oauth_authorize(c, oauth, run_trust(run, ca_file), run->options->paste != 0, &e) == 0)
		return 0;
	log_error("%s", e.text);
	return 1;
}

#define PILE(pile) (int)(pile).n, (pile).text != NULL ? (pile).text : ""

/* Print what a run has done as one JSON object (README: JSON). */
static void run_print_json(const struct run *run, const struct pile *errors, int status, time_t began)
{
	static const char *const modes[] = { "backup",  "list",   "check",    "verify",
					     "restore", "export", "export",   "authorize" };
	const struct options *o = run->options;
	char when[32] = "", email[1300], counts[400];
	struct tm tm;

	if (gmtime_r(&began, &tm) != NULL)
		strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &tm);
	printf("{\"program\":\"imap_backup\",\"version\":\"" VERSION "\",\"mode\":\"%s\",\"dry_run\":%s,"
	       "\"status\":%d,\"errors\":[%.*s],\"began\":\"%s\",\"seconds\":%.3f,\"accounts\":[",
	       modes[o->mode], o->dry ? "true" : "false", status, PILE(*errors), when,
	       (double)(now_ms() - run->began_ms) / 1000);
	for (const struct board *b = run->boards; b < run->boards + run->n_boards; b++) {
		struct counts sum = board_sum(b);

		if (o->mode == RUN_RESTORE) /* it is what goes out that counts */
			sum.in = sum.out;
		json_escape(email, sizeof email, b->account->email);
		printf("%s{\"email\":%s,\"seconds\":%.3f%s,\"errors\":[%.*s],\"boxes\":[%.*s]}",
		       b > run->boards ? "," : "", email, board_seconds(b),
		       counts_json(counts, &sum, OF_ACCOUNT), PILE(b->errors), PILE(b->boxes));
	}
	printf("]}\n");
}

/* Have signals end the run cleanly; but nohup wants its signal ignored. */
static void run_catch_signals(void)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP };
	struct sigaction stop = { .sa_handler = on_stop_signal }, former;

	sigemptyset(&stop.sa_mask);
	for (int i = 0; i < 3; i++)
		if (sigaction(signals[i], NULL, &former) == 0 && former.sa_handler != SIG_IGN)
			sigaction(signals[i], &stop, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes: EFBIG tells of it */
	signal(SIGCHLD, SIG_DFL); /* ignored, it would leave nobody to be waited for */
}

/* Do what one of the modes that speak to servers does. Returns the exit status. */
static int run_online(struct run *run, struct config *c)
{
	const struct options *o = run->options;
	const char *wrong = destination_unmounted(c);
	int status = 1;

	run_prepare(run);
	run_tell(run, c->start_url);
	if (o->mode == RUN_CHECK)
		c->retries = 0;
	if (wrong != NULL && o->mode != RUN_CHECK) {
		log_error("%s: %s", c->destination, wrong);
	} else {
		run_all(run);
		status = run_summary(run);
		if (c->quick && status == 0 && o->mode == RUN_BACKUP && !o->dry)
			quick_hint(o);
		status = output_end(status);
	}
	run_tell(run, status == 0 ? c->success_url : status == 1 ? c->failure_url : NULL);
	return status;
}

static int run_main(struct run *run, struct options *o, int argc, char **argv)
{
	static struct config config;
	int status;

	/* Descriptors 0 to 2 must be taken, or a socket or an archive would become stderr. */
	for (int fd = 0; fd <= 2; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
			return 2;
	umask(077);
	log_to.terminal = isatty(STDERR_FILENO) != 0;
	log_to.color = log_to.terminal && getenv("NO_COLOR") == NULL;
	if ((status = options_parse(o, argc, argv)) >= 0)
		return status;
	if (o->config_path != NULL ? config_load(&config, o->config_path) != 0 : quick_load(&config, o) != 0)
		return 2;
	if ((status = accounts_choose(&config, o)) != 0)
		return status;
	if (o->mode == RUN_EXPORT || o->mode == RUN_EXPORT_ALL)
		return archives_export(&config, o);
	run_catch_signals();
	if (o->mode == RUN_RESTORE && !o->dry && !o->yes && !restore_confirmed(&config, o))
		return 1;
	run->config = &config;
	run->trusts = allocate((config.n_accounts + 1) * sizeof *run->trusts);
	run_set_clock();
	curl_global_init(CURL_GLOBAL_DEFAULT);
	return o->mode == RUN_AUTHORIZE ? run_authorize(run) : run_online(run, &config);
}

int main(int argc, char **argv)
{
	static struct options options;
	static struct run run = { .options = &options };
	struct pile errors = { 0 };
	time_t began = time(NULL);
	int status;

	run.began_ms = now_ms();
	for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
		if (strncmp(argv[i], "--j", 3) == 0) /* what is wrong with the options is told so, too */
			log_to.errors = &errors;
	status = run_main(&run, &options, argc, argv);
	if (log_to.errors == NULL)
		return status;
	run_print_json(&run, &errors, status, began);
	return output_end(status);
}
