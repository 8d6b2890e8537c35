/*
 * mbox.c - the archive: one mbox file and its index
 *
 * It knows files, locks, RFC 5322 headers and the mboxrd format; nothing of IMAP, accounts or logs.
 *
 * The mbox file is a sequence of messages. One message, octet by octet:
 *
 *     From MAILER-DAEMON Thu Jan  1 00:00:00 1970     INTERNALDATE, UTC, asctime(3) form
 *     X-Mozilla-Status: 0001                          four hex digits, see MBOX_SEEN ...
 *     Message-ID: <SHA-1 in hex@imap_backup.py.local> only if the mail has none of its own
 *     Subject: hello                                  the mail, CRLF as LF; each line that
 *                                                     matches ^>*From  has one more > in front
 *     >From here on it is body.
 *                                                     an empty line
 *
 * Invariants:
 *
 * (1) Octets below 'committed' are whole messages. While the index says "writing", whole messages
 *     with their records may follow, then at most one torn one; mbox_open() verifies the former
 *     and cuts off the rest. While it does not say so, nothing is ever cut.
 * (2) A message never moves and never shrinks: an offset handed out stays good for ever.
 * (3) A change of state overwrites the four digits of X-Mozilla-Status. Nothing else is rewritten.
 *     "Writing" is said before this too: where it stands, the digits count, not the records' states.
 * (4) The mbox is synced before the index that speaks of it, its digits included: in memory a
 *     changed record is only marked dirty, and written behind the mbox's fsync().
 * (5) The index can be rebuilt from the mbox and the server: losing it costs time, not mail.
 * (6) One descriptor for each mbox in a process: closing a second would drop the fcntl() lock.
 *
 * The index, all numbers little-endian:
 *
 *        0  "imap_backup idx1", u32 length of the mailbox's name, u32 its checksum, the name
 *     1536  one copy of the index's state (struct state), and at
 *     2048  the other; they are written in turn, each is a sector, the higher 'turn' counts
 *     2560  a record of 64 octets for each message or other name of one, in the order of storing
 *
 * A record lies within a sector: a power cut leaves it old or new, never mixed.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "imap_backup.h"

enum {
	BUFFER_OCTETS = 64 << 10, /* between us and the mbox file, both ways */
	COMMIT_OCTETS = 32 << 20, /* so much mail at most is unsynced ... */
	COMMIT_SEC = 20,          /* ... or for so long */
	PATH_OCTETS = 4096,       /* of a path, with ".index.new" */
	NAME_AT = 24,             /* places in the index: */
	STATE_AT = 1536,
	STATE_STEP = 512,
	STATE_OCTETS = 80,
	RECORDS_AT = 2560,
	RECORD_OCTETS = 64,
	RECORDS_HELD = 64,            /* records read or written at once */
	FROM_OCTETS = 44,             /* of the From line that we write, with its line end */
	DIGITS_AT = FROM_OCTETS + 18, /* where the state's digits are in a message of ours */
	BODY_AT = DIGITS_AT + 5,      /* and where the mail itself begins */
	DIGITS_MAX = 255,             /* digits further from the From line are not looked for */
	MADE_HINTS = 64               /* keys for which the next free number is remembered */
};

static const char index_magic[] = "imap_backup idx1";
static const char status_field[] = "X-Mozilla-Status: ";
static const char made_domain[] = "@imap_backup.py.local>";

/* ======== octets ======== */

static void put_number(uint8_t *p, unsigned octets, uint64_t number)
{
	for (unsigned i = 0; i < octets; i++)
		p[i] = (uint8_t)(number >> 8 * i);
}

static uint64_t get_number(const uint8_t *p, unsigned octets)
{
	uint64_t number = 0;

	for (unsigned i = octets; i-- > 0;)
		number = number << 8 | p[i];
	return number;
}

/* The same for 8 octets: one load, where the machine has it. */
static inline __attribute__((always_inline)) uint64_t get_word(const uint8_t *p)
{
	return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24 |
	       (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

/* The last n digits of a number, with zeroes in front; no NUL. printf() takes ten times as long. */
static void put_digits(char *p, unsigned n, unsigned base, unsigned number)
{
	for (; n-- > 0; number /= base)
		p[n] = "0123456789abcdef"[number % base];
}

static bool is_space(uint8_t c)
{
	return c == ' ' || (c >= '\t' && c <= '\r');
}

/*
 * The checksum of stored octets and of the index: a chain of multiplications over little-endian
 * words, as fast as memory. It finds what power cuts, bit rot and other programs do; it is no
 * defence against somebody who computes it too.
 */
struct sum {
	uint64_t value;
	uint64_t octets;
	uint8_t rest[8]; /* octets % 8 of them wait for their word to be whole */
};

static uint64_t sum_step(uint64_t value, uint64_t word)
{
	value = (value ^ word) * UINT64_C(0x9E3779B97F4A7C15);
	return value ^ value >> 32;
}

static void sum_feed(struct sum *s, const uint8_t *p, size_t n)
{
	size_t rest = s->octets % 8;

	s->octets += n;
	if (rest > 0) {
		size_t take = n < 8 - rest ? n : 8 - rest;

		memcpy(s->rest + rest, p, take);
		p += take;
		n -= take;
		if (rest + take < 8)
			return;
		s->value = sum_step(s->value, get_word(s->rest));
	}
	for (; n >= 8; p += 8, n -= 8)
		s->value = sum_step(s->value, get_word(p));
	memcpy(s->rest, p, n);
}

static uint64_t sum_end(const struct sum *s)
{
	uint64_t value = sum_step(s->value, get_number(s->rest, s->octets % 8));

	return sum_step(value, s->octets);
}

static uint64_t sum_of(const uint8_t *p, size_t n)
{
	struct sum s = { 0 };

	sum_feed(&s, p, n);
	return sum_end(&s);
}

/* ======== identity ======== */

void mbox_made_init(struct mbox_made *made)
{
	br_sha1_init(&made->ahead);
	made->trimmed = made->ahead;
	made->any = false;
}

void mbox_made_feed(struct mbox_made *made, const void *octets, size_t n)
{
	const uint8_t *p = octets;
	size_t last = n;

	while (!made->any && n > 0 && is_space(*p))
		p++, n--;
	for (last = n; last > 0 && is_space(p[last - 1]);)
		last--;
	if (last > 0) {
		br_sha1_update(&made->ahead, p, last);
		made->trimmed = made->ahead;
		made->any = true;
	}
	br_sha1_update(&made->ahead, p + last, n - last);
}

void mbox_made_end(const struct mbox_made *made, uint8_t key[20])
{
	br_sha1_out(&made->trimmed, key);
}

/* Writes <key.k@...>, or <key@...> for the first, and returns its length. */
static size_t made_text(char out[MBOX_MADE_MAX], const uint8_t key[20], unsigned k)
{
	size_t n = 0;

	out[n++] = '<';
	for (int i = 0; i < 20; i++, n += 2)
		put_digits(out + n, 2, 16, key[i]);
	if (k > 1)
		n += (size_t)snprintf(out + n, 12, ".%u", k);
	memcpy(out + n, made_domain, sizeof made_domain);
	return n + sizeof made_domain - 1;
}

static void id_of(struct mbox_id *id, const char *text, size_t n)
{
	br_sha256_context hash;
	uint8_t out[br_sha256_SIZE];

	br_sha256_init(&hash);
	br_sha256_update(&hash, text, n);
	br_sha256_out(&hash, out);
	memcpy(id->octets, out, sizeof id->octets);
}

static void made_id(struct mbox_id *id, const uint8_t key[20], unsigned k)
{
	char text[MBOX_MADE_MAX];

	id_of(id, text, made_text(text, key, k));
}

/* Is this text what made_text() makes, or the original made? */
static bool is_made(const char *text, size_t n)
{
	const size_t domain = sizeof made_domain - 1, end = n - domain; /* of key and number */

	if (n < 41 + domain || n >= MBOX_MADE_MAX || text[0] != '<' ||
	    memcmp(text + end, made_domain, domain) != 0 || strspn(text + 1, "0123456789abcdef") != 40)
		return false;
	return end == 41 || (end > 42 && text[41] == '.' && strspn(text + 42, "0123456789") == end - 42);
}

void mbox_header_init(struct mbox_header *h, struct mbox_made *made)
{
	memset(h, 0, sizeof *h);
	h->made = made;
	if (made != NULL)
		mbox_made_init(made);
}

/* One octet of a Message-ID in its normal form. */
static void header_id_octet(struct mbox_header *h, char c)
{
	if (h->text_octets == sizeof h->text) {
		br_sha256_update(&h->hash, h->text, h->text_octets);
		h->text_octets = 0;
	}
	h->text[h->text_octets++] = c;
	h->id_octets++;
}

static void header_field_end(struct mbox_header *h)
{
	uint8_t out[br_sha256_SIZE];
	unsigned field = h->fields;

	if (h->at == MBOX_AT_ID && field < 2) {
		br_sha256_update(&h->hash, h->text, h->text_octets);
		br_sha256_out(&h->hash, out);
		memcpy(h->id[field].octets, out, sizeof h->id[field].octets);
		h->kind[field] = MBOX_ID_OWN;
		if (h->id_octets == 0 || (h->id_octets == 2 && memcmp(h->text, "<>", 2) == 0))
			h->kind[field] = MBOX_ID_NONE;
		else if (h->id_octets <= sizeof h->text && is_made(h->text, h->text_octets))
			h->kind[field] = MBOX_ID_MADE;
		h->fields++;
	}
}

/* The field's name is complete: what is it to us? Blanks before the colon are obsolete syntax. */
static void header_name_end(struct mbox_header *h)
{
	static const char wanted[][8] = { "from", "to", "cc", "date", "subject" };
	const char *name = h->name;
	size_t n = h->name_octets;

	if (h->made != NULL && n > 5 && memcmp(name, ">From ", 6) == 0) /* "From :", quoted */
		name++, n--;
	while (n > 0 && is_space((uint8_t)name[n - 1]))
		n--;
	h->at = MBOX_AT_OTHER;
	if (h->made == NULL) {
		if (n == 10 && strncasecmp(name, "message-id", n) == 0) {
			h->at = MBOX_AT_ID;
			h->space = false;
			h->text_octets = h->id_octets = 0;
			br_sha256_init(&h->hash);
		} else if (n == 4 && strncasecmp(name, "date", n) == 0 && h->date_octets == 0) {
			h->at = MBOX_AT_DATE;
		}
		return;
	}
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		if (n == strlen(wanted[i]) && strncasecmp(name, wanted[i], n) == 0) {
			h->at = MBOX_AT_MADE;
			mbox_made_feed(h->made, name, h->name_octets - (size_t)(name - h->name));
			mbox_made_feed(h->made, ":", 1);
		}
}

bool mbox_header_feed(struct mbox_header *h, const void *octets, size_t n)
{
	const uint8_t *p = octets, *end = p + n;

	while (p < end && h->at != MBOX_AT_BODY) {
		const uint8_t *lf = NULL;
		size_t run;

		if (h->at == MBOX_AT_LINE || h->line_start) { /* what does this line begin with? */
			if (*p == '\r' && !h->cr) {
				h->cr = true;
				p++;
				continue;
			}
			if (*p == '\n') {
				header_field_end(h);
				h->at = MBOX_AT_BODY;
				break;
			}
			if (!h->line_start || (*p != ' ' && *p != '\t')) {
				header_field_end(h);
				h->at = MBOX_AT_NAME;
				h->name_octets = 0;
			}
			h->line_start = h->cr = false;
		}
		if (h->at == MBOX_AT_NAME) {
			if (*p == ':') {
				header_name_end(h);
				p++;
			} else if (h->name_octets == sizeof h->name || *p == '\n') {
				h->at = MBOX_AT_OTHER;
			} else {
				h->name[h->name_octets++] = (char)*p++;
			}
			continue;
		}
		lf = memchr(p, '\n', (size_t)(end - p));
		run = (size_t)((lf != NULL ? lf : end) - p);
		if (h->at == MBOX_AT_MADE) { /* line ends count as CRLF, also where the file has LF */
			bool cr = run > 0 && p[run - 1] == '\r';

			mbox_made_feed(h->made, p, run);
			if (lf != NULL)
				mbox_made_feed(h->made, cr ? "\n" : "\r\n", cr ? 1 : 2);
		} else if (h->at == MBOX_AT_DATE) {
			size_t room = sizeof h->date - 1 - h->date_octets, part = run < room ? run : room;

			memcpy(h->date + h->date_octets, p, part);
			h->date_octets += part;
		} else if (h->at == MBOX_AT_ID) {
			for (size_t i = 0; i < run; i++) {
				if (is_space(p[i])) {
					h->space = true;
					continue;
				}
				if (h->space && h->id_octets > 0)
					header_id_octet(h, ' ');
				h->space = false;
				header_id_octet(h, (char)p[i]);
			}
			h->space = h->space || lf != NULL;
		}
		p += run + (lf != NULL ? 1 : 0);
		h->line_start = lf != NULL;
	}
	return h->at == MBOX_AT_BODY;
}

bool mbox_header_end(struct mbox_header *h, struct mbox_id *id)
{
	header_field_end(h);
	h->at = MBOX_AT_BODY;
	*id = h->id[0];
	return h->fields > 0 && h->kind[0] != MBOX_ID_NONE;
}

/* ======== the open archive ======== */

enum entry_bits { /* what is kept of a record in memory, below the 23 bits of its ID's hash */
		  ENTRY_OTHER = 1,   /* another name (UID) of a stored mail */
		  ENTRY_SUSPECT = 2, /* the last mail of a tail that was taken over: may be torn */
		  ENTRY_TORN = 4,    /* it was: known under no ID any more */
		  ENTRY_DIRTY = 8,   /* differs from the record on disk */
		  ENTRY_STATE = 16,  /* five bits: seen, answered, flagged, gone, forwarded */
		  ENTRY_GONE = ENTRY_STATE * 8,
		  ENTRY_KIND = ENTRY_OTHER | ENTRY_SUSPECT | ENTRY_TORN,
		  ENTRY_HASH_SHIFT = 9,
		  ENTRY_HASH_BITS = 23
};

struct entry {        /* one for each record, in their order */
	uint32_t uid; /* 0: none known */
	uint32_t bits;
};

struct record { /* as in the index */
	uint32_t uid;
	unsigned state, kind; /* MBOX_SEEN ...; ENTRY_KIND */
	off_t offset, octets; /* in the mbox: From line up to and with the closing empty line */
	struct mbox_id id;
	uint64_t sum;    /* of these octets, the digits taken as 0000 */
	uint32_t digits; /* where they are, from offset; 0: it has none */
};

struct state { /* what the index's header says */
	uint32_t turn;
	bool writing; /* mails may follow behind 'octets', their records behind 'records' */
	uint32_t records, stored, gone, others;
	off_t octets; /* of the mbox: the committed size */
	uint64_t mix; /* the records' checksums, XORed: do they belong to this header? */
	struct mbox_claim claim;
};

struct mbox {
	char path[PATH_OCTETS];
	char name[MBOX_NAME_MAX + 1];
	unsigned how;
	int fd, index;      /* -1: not open */
	bool index_new;     /* 'index' still is path + ".index.new" */
	bool index_void;    /* it does not fit the mbox: to be removed */
	bool index_rekeyed; /* every UID changed: to be written anew as a whole */
	bool data_dirty, records_dirty;
	bool marked;            /* we have brought "writing" to the disk; what was read may not be there */
	bool stuck;             /* a write or sync failed: what is on disk is not known */
	struct state disk, now; /* the index's header on disk, and as it should be */
	uint32_t came_back;
	char mended[200];

	/* records: in memory 8 octets each, 4 for their order by UID, 6 for the table of IDs */
	struct entry *entries;
	uint32_t entries_room;
	uint32_t *order; /* records with a UID, ascending by it */
	uint32_t known;  /* how many these are */
	uint32_t place;  /* where the last one was looked for */
	uint32_t *table; /* record + 1, or 0; open addressing by the ID's hash */
	uint32_t table_room;
	uint32_t suspect; /* record + 1 */
	uint32_t written; /* records in the index file; the others, up to RECORDS_HELD, are here: */
	uint8_t held[RECORDS_HELD * RECORD_OCTETS];
	struct hint {
		uint8_t key[20];
		unsigned stored, bound;
	} hints[MADE_HINTS];

	/* the mail being stored */
	off_t start;             /* -1: none */
	int64_t when_sec;        /* as its From line says */
	off_t flushed;           /* the mbox file's length; 'buffer' follows it */
	off_t whole;             /* of this, up to the last end of a mail */
	size_t buffered, summed; /* octets in 'buffer'; of these already in 'sum' */
	struct sum sum;
	struct mbox_header header;
	bool header_over, known_already, sum_again;
	bool cr;                /* the last octet was a CR, held back: a LF may follow */
	int prefix;             /* -1: within a line; else so much of "From " stands at its start ... */
	bool quotes;            /* ... behind any number of '>' */
	off_t committed_octets; /* of the mbox, at the last sync or when it was opened */
	time_t committed_sec;
	uint8_t buffer[BUFFER_OCTETS];
};

static uint32_t entry_hash(const struct mbox_id *id)
{
	return (uint32_t)get_number(id->octets, 4) >> (32 - ENTRY_HASH_BITS);
}

/* The state's five bits in memory, and its digits: only "forwarded" lies elsewhere. */
static uint32_t entry_state(unsigned state)
{
	return ((state & 15) | (state & MBOX_FORWARDED) >> 8) * ENTRY_STATE;
}

static unsigned state_of(const struct entry *entry)
{
	uint32_t five = entry->bits / ENTRY_STATE & 31;

	return (five & 15) | (five & 16) << 8;
}

static time_t now_sec(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

/* pread() and pwrite() of everything; *got may be less than n only at the end of the file. */
static int read_all(struct mbox *m, int fd, void *to, size_t n, off_t at, size_t *got, struct err *e)
{
	for (*got = 0; *got < n;) {
		ssize_t r = pread(fd, (char *)to + *got, n - *got, at + (off_t)*got);

		if (r == 0)
			break;
		if (r > 0)
			*got += (size_t)r;
		else if (errno != EINTR)
			return err_errno(e, E_SYSTEM, "%s%s: cannot read", m->path,
					 fd == m->fd ? "" : ".index");
	}
	return 0;
}

static int write_all(struct mbox *m, int fd, const void *from, size_t n, off_t at, struct err *e)
{
	while (n > 0) {
		ssize_t r = pwrite(fd, from, n, at);

		if (r > 0) {
			from = (const char *)from + r;
			n -= (size_t)r;
			at += r;
		} else if (r == 0 || errno != EINTR) {
			m->stuck = true;
			if (errno == EFBIG)
				return err_set(e, E_SYSTEM,
					       "%s: the file system takes no file larger than "
					       "this (FAT: 4 GB)",
					       m->path);
			return err_errno(e, E_SYSTEM, "%s%s: cannot write", m->path,
					 fd == m->fd ? "" : ".index");
		}
	}
	return 0;
}

static int sync_file(struct mbox *m, int fd, struct err *e)
{
	struct stat st;

	if (fsync(fd) == 0)
		return 0;
	m->stuck = true;
	err_errno(e, E_SYSTEM, "%s%s: cannot sync", m->path, fd == m->fd ? "" : ".index");
	/* Read again, these mails may look well, and a second fsync() succeed, though they are not on disk. */
	if (fd == m->fd && m->flushed > m->committed_octets && fstat(fd, &st) == 0 &&
	    st.st_size == m->flushed && ftruncate(m->fd, m->committed_octets) == 0)
		m->flushed = m->whole = m->committed_octets;
	return -1;
}

static int sync_folder(struct mbox *m, struct err *e)
{
	char folder[PATH_OCTETS];
	char *slash;
	int fd, r = 0;

	memcpy(folder, m->path, sizeof folder);
	slash = strrchr(folder, '/');
	memcpy(slash != NULL ? slash + 1 : folder, ".", 2);
	fd = open(folder, O_RDONLY | O_CLOEXEC);
	/* EINVAL: a file system (CIFS, FUSE) that does not sync folders does so by itself or never. */
	if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL))
		r = err_errno(e, E_SYSTEM, "%s: cannot sync the folder", folder);
	if (fd >= 0)
		close(fd);
	return r;
}

static void index_path(const char *path, const char *suffix, char out[PATH_OCTETS + 16])
{
	snprintf(out, PATH_OCTETS + 16, "%s.index%s", path, suffix);
}

/* ======== the index's header ======== */

static void state_pack(const struct state *s, uint8_t p[STATE_OCTETS])
{
	const uint32_t numbers[] = {
		s->turn,   s->writing,           s->records,       s->stored,         s->gone,
		s->others, s->claim.uidvalidity, s->claim.uidnext, s->claim.messages, s->claim.unseen
	};

	for (unsigned i = 0; i < 10; i++)
		put_number(p + 4 * i, 4, numbers[i]);
	put_number(p + 40, 8, s->claim.highestmodseq);
	put_number(p + 48, 8, (uint64_t)s->claim.when_sec);
	put_number(p + 56, 8, (uint64_t)s->octets);
	put_number(p + 64, 8, s->mix);
	put_number(p + 72, 8, sum_of(p, 72));
}

static bool state_unpack(struct state *s, const uint8_t p[STATE_OCTETS])
{
	uint32_t n[10];

	if (get_number(p + 72, 8) != sum_of(p, 72))
		return false;
	for (unsigned i = 0; i < 10; i++)
		n[i] = (uint32_t)get_number(p + 4 * i, 4);
	*s = (struct state){ .turn = n[0],
			     .writing = n[1] != 0,
			     .records = n[2],
			     .stored = n[3],
			     .gone = n[4],
			     .others = n[5],
			     .octets = (off_t)get_number(p + 56, 8),
			     .mix = get_number(p + 64, 8) };
	s->claim = (struct mbox_claim){ .uidvalidity = n[6],
					.uidnext = n[7],
					.messages = n[8],
					.unseen = n[9],
					.highestmodseq = get_number(p + 40, 8),
					.when_sec = (int64_t)get_number(p + 48, 8) };
	return s->records <= MBOX_MAILS_MAX && s->octets >= 0;
}

/*
 * Read the index's header: both copies of the state, the newer one first; a copy that is damaged
 * has turn 0. Returns 1, or 0 if there is no index that could be read, or -1 if it is that of
 * another mailbox, whose name then is in 'other'.
 */
static int index_header(int fd, const char *name, struct state states[2], char other[MBOX_NAME_MAX + 1])
{
	uint8_t head[RECORDS_AT];
	size_t got = 0, length;

	memset(states, 0, 2 * sizeof *states);
	for (ssize_t r; got < sizeof head; got += (size_t)r)
		if ((r = pread(fd, head + got, sizeof head - got, (off_t)got)) <= 0)
			return 0;
	length = (size_t)get_number(head + 16, 4);
	if (memcmp(head, index_magic, 16) != 0 || length > MBOX_NAME_MAX ||
	    get_number(head + 20, 4) != (uint32_t)sum_of(head + NAME_AT, length))
		return 0;
	if (length != strlen(name) || memcmp(head + NAME_AT, name, length) != 0) {
		memcpy(other, head + NAME_AT, length);
		other[length] = '\0';
		return -1;
	}
	for (int i = 0; i < 2; i++)
		if (!state_unpack(&states[i], head + STATE_AT + i * STATE_STEP))
			states[i].turn = 0;
	if (states[1].turn > states[0].turn) {
		struct state newer = states[1];

		states[1] = states[0];
		states[0] = newer;
	}
	return states[0].turn > 0;
}

/* Write m->now as the header's next copy. Not synced. */
static int index_write_state(struct mbox *m, struct err *e)
{
	uint8_t p[STATE_OCTETS];

	m->now.turn = m->disk.turn + 1;
	state_pack(&m->now, p);
	if (write_all(m, m->index, p, sizeof p, STATE_AT + m->now.turn % 2 * STATE_STEP, e) != 0)
		return -1;
	m->disk = m->now;
	return 0;
}

/* Open a new index file beside the old one; the first commit puts it in the old one's place. */
static int index_create(struct mbox *m, struct err *e)
{
	char path[PATH_OCTETS + 16];
	uint8_t head[RECORDS_AT] = { 0 };
	size_t length = strlen(m->name);
	int fd;

	index_path(m->path, ".new", path);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return err_errno(e, E_SYSTEM, "%s: cannot create", path);
	memcpy(head, index_magic, 16);
	put_number(head + 16, 4, length);
	put_number(head + 20, 4, sum_of((const uint8_t *)m->name, length));
	memcpy(head + NAME_AT, m->name, length);
	if (write_all(m, fd, head, sizeof head, 0, e) != 0) {
		close(fd);
		unlink(path);
		return -1;
	}
	if (m->index >= 0)
		close(m->index);
	m->index = fd;
	m->index_new = true;
	m->disk = (struct state){ 0 };
	return 0;
}

void mbox_peek(const char *path, const char *name, struct mbox_info *info)
{
	char index[PATH_OCTETS + 16], other[MBOX_NAME_MAX + 1];
	struct state states[2];
	struct stat st;
	int fd;

	memset(info, 0, sizeof *info);
	info->exists = stat(path, &st) == 0;
	if (info->exists)
		info->octets = st.st_size;
	index_path(path, "", index);
	if ((fd = open(index, O_RDONLY | O_CLOEXEC)) < 0)
		return;
	if (index_header(fd, name, states, other) > 0) {
		info->claim = states->claim;
		info->stored = states->stored;
		info->gone = states->gone;
		info->others = states->others;
		info->fits = info->exists && !states->writing && info->octets == states->octets &&
			     fstat(fd, &st) == 0 &&
			     st.st_size >= RECORDS_AT + (off_t)states->records * RECORD_OCTETS;
	}
	close(fd);
}

/* ======== records ======== */

/* Returns its checksum. */
static uint64_t record_pack(const struct record *r, uint8_t p[RECORD_OCTETS])
{
	uint64_t sum;

	put_number(p, 4, r->uid);
	put_number(p + 4, 2, r->state);
	put_number(p + 6, 2, r->kind);
	put_number(p + 8, 8, (uint64_t)r->offset);
	put_number(p + 16, 8, (uint64_t)r->octets);
	memcpy(p + 24, r->id.octets, 16);
	put_number(p + 40, 8, r->sum);
	put_number(p + 48, 4, r->digits);
	put_number(p + 52, 4, 0);
	sum = sum_of(p, 56);
	put_number(p + 56, 8, sum);
	return sum;
}

static bool record_unpack(struct record *r, const uint8_t p[RECORD_OCTETS])
{
	const uint64_t first = get_word(p);

	*r = (struct record){ .uid = (uint32_t)first,
			      .state = (unsigned)(first >> 32) & 0xFFFF,
			      .kind = (unsigned)(first >> 48),
			      .offset = (off_t)get_word(p + 8),
			      .octets = (off_t)get_word(p + 16),
			      .sum = get_word(p + 40),
			      .digits = (uint32_t)get_number(p + 48, 4) };
	memcpy(r->id.octets, p + 24, 16);
	return get_word(p + 56) == sum_of(p, 56) && r->offset >= 0 && r->octets >= 0 &&
	       r->octets <= INT64_MAX - r->offset && r->digits <= DIGITS_MAX;
}

/* Record i as it is on disk or held back; its UID and state may be newer in entries[i]. */
static int record_get(struct mbox *m, uint32_t i, struct record *r, struct err *e)
{
	uint8_t octets[RECORD_OCTETS];
	const uint8_t *p = octets;
	size_t got = sizeof octets;

	if (i >= m->written)
		p = m->held + (i - m->written) * RECORD_OCTETS;
	else if (read_all(m, m->index, octets, sizeof octets, RECORDS_AT + (off_t)i * RECORD_OCTETS, &got,
			  e) != 0)
		return -1;
	if (got < sizeof octets || !record_unpack(r, p)) {
		m->index_void = true;
		return err_set(e, E_FORMAT, "%s.index: record %lu is damaged", m->path, (unsigned long)i);
	}
	return 0;
}

/* Write out the records that are held back. Not synced. */
static int records_flush(struct mbox *m, struct err *e)
{
	size_t n = m->now.records - m->written;

	if (n == 0)
		return 0;
	if (write_all(m, m->index, m->held, n * RECORD_OCTETS,
		      RECORDS_AT + (off_t)m->written * RECORD_OCTETS, e) != 0)
		return -1;
	m->written = m->now.records;
	return 0;
}

/* Write what differs from the disk into the records there. Not synced. */
static int records_update(struct mbox *m, struct err *e)
{
	if (!m->records_dirty)
		return 0;
	for (uint32_t i = 0; i < m->now.records; i++) {
		struct entry *entry = &m->entries[i];
		struct record r;
		uint8_t p[RECORD_OCTETS];

		if ((entry->bits & ENTRY_DIRTY) == 0)
			continue;
		if (record_get(m, i, &r, e) != 0)
			return -1;
		m->now.mix ^= record_pack(&r, p);
		r.uid = entry->uid;
		r.state = state_of(entry);
		r.kind = entry->bits & ENTRY_KIND;
		m->now.mix ^= record_pack(&r, p);
		if (i >= m->written)
			memcpy(m->held + (i - m->written) * RECORD_OCTETS, p, sizeof p);
		else if (write_all(m, m->index, p, sizeof p, RECORDS_AT + (off_t)i * RECORD_OCTETS, e) != 0)
			return -1;
		entry->bits &= ~(uint32_t)ENTRY_DIRTY;
	}
	m->records_dirty = false;
	return 0;
}

/* Copy all records into a new index file, with what has changed in them. */
static int records_rewrite(struct mbox *m, struct err *e)
{
	uint8_t block[RECORDS_HELD * RECORD_OCTETS];
	uint32_t n = m->written;
	size_t got;
	int old = m->index;

	m->index = -1; /* index_create() must not close it */
	if (index_create(m, e) != 0) {
		m->index = old;
		return -1;
	}
	for (uint32_t i = 0; i < n; i += RECORDS_HELD) {
		size_t octets = (n - i < RECORDS_HELD ? n - i : RECORDS_HELD) * RECORD_OCTETS;
		off_t at = RECORDS_AT + (off_t)i * RECORD_OCTETS;

		if (read_all(m, old, block, octets, at, &got, e) != 0 ||
		    write_all(m, m->index, block, got, at, e) != 0) {
			close(old);
			return -1;
		}
	}
	close(old);
	return 0;
}

/* ======== finding records ======== */

/* The place in 'order' of the first UID that is at least 'uid': mostly the one behind the last answer. */
static uint32_t order_find(struct mbox *m, uint32_t uid)
{
	uint32_t low = 0, high = m->known;

	if (m->place < high && m->entries[m->order[m->place]].uid < uid) {
		low = m->place + 1;
		if (low < high && m->entries[m->order[low]].uid >= uid)
			high = low;
	}
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (m->entries[m->order[middle]].uid < uid)
			low = middle + 1;
		else
			high = middle;
	}
	m->place = low;
	return low;
}

static uint32_t *record_by_uid(struct mbox *m, uint32_t uid)
{
	uint32_t at = order_find(m, uid);

	if (at < m->known && m->entries[m->order[at]].uid == uid)
		return &m->order[at];
	return NULL;
}

uint32_t mbox_next_uid(struct mbox *m, uint32_t uid)
{
	uint32_t at = order_find(m, uid);

	return at < m->known ? m->entries[m->order[at]].uid : 0;
}

uint32_t mbox_last_uid(const struct mbox *m)
{
	return m->known > 0 ? m->entries[m->order[m->known - 1]].uid : 0;
}

/* Give record i, which has none, a UID that no other has. Mostly it is the highest so far. */
static void order_insert(struct mbox *m, uint32_t i, uint32_t uid)
{
	uint32_t at = order_find(m, uid);

	memmove(m->order + at + 1, m->order + at, (m->known - at) * sizeof *m->order);
	m->order[at] = i;
	m->known++;
	m->entries[i].uid = uid;
}

static void set_uid(struct mbox *m, uint32_t i, uint32_t uid)
{
	if (uid == 0)
		m->entries[i].uid = 0;
	else
		order_insert(m, i, uid);
	if (m->entries[i].bits & ENTRY_OTHER)
		m->now.others += uid != 0 ? 1 : UINT32_MAX;
	m->entries[i].bits |= ENTRY_DIRTY;
	m->records_dirty = true;
}

/*
 * Make 'order' from the entries, by Shell's sort: it needs no memory, as qsort() may, and hardly any time
 * where storing nearly went by UID. A UID that two records claim is taken from one of them.
 */
static void order_make(struct mbox *m)
{
	uint32_t n = 0, last = 0, gap = 0;

	for (uint32_t i = 0; i < m->now.records; i++) {
		if (m->entries[i].uid == 0)
			continue;
		m->order[n++] = i;
		gap = m->entries[i].uid <= last ? UINT32_MAX : gap;
		last = m->entries[i].uid;
	}
	for (gap = gap < n ? gap : n; gap > 1;) {
		gap = gap < 5 ? 1 : (uint32_t)((uint64_t)gap * 5 / 11);
		for (uint32_t i = gap; i < n; i++) {
			uint32_t record = m->order[i], uid = m->entries[record].uid, at = i;

			for (; at >= gap && m->entries[m->order[at - gap]].uid > uid; at -= gap)
				m->order[at] = m->order[at - gap];
			m->order[at] = record;
		}
	}
	m->known = n > 0;
	for (uint32_t i = 1; i < n; i++)
		if (m->entries[m->order[i]].uid != m->entries[m->order[m->known - 1]].uid)
			m->order[m->known++] = m->order[i];
		else
			set_uid(m, m->order[i], 0);
}

static void table_insert(struct mbox *m, uint32_t i)
{
	uint32_t at = (uint32_t)((uint64_t)(m->entries[i].bits >> ENTRY_HASH_SHIFT) * m->table_room >>
				 ENTRY_HASH_BITS);

	while (m->table[at] != 0)
		at = at + 1 < m->table_room ? at + 1 : 0;
	m->table[at] = i + 1;
}

/*
 * Walk the records with this ID: *at is 0 to begin with and private; each call returns the next
 * record, MBOX_MAILS_MAX if there is none, or -1 as a read error.
 */
static int64_t record_by_id(struct mbox *m, const struct mbox_id *id, uint32_t *at, struct err *e)
{
	uint32_t hash = entry_hash(id);
	uint32_t home = (uint32_t)((uint64_t)hash * m->table_room >> ENTRY_HASH_BITS);

	for (; *at < m->table_room; (*at)++) {
		uint32_t place = home + *at;
		uint32_t i = m->table[place < m->table_room ? place : place - m->table_room];
		struct record r;

		if (i-- == 0)
			break;
		if (m->entries[i].bits >> ENTRY_HASH_SHIFT != hash || m->entries[i].bits & ENTRY_TORN)
			continue;
		if (record_get(m, i, &r, e) != 0)
			return -1;
		if (memcmp(&r.id, id, sizeof *id) == 0) {
			(*at)++;
			return i;
		}
	}
	return MBOX_MAILS_MAX;
}

/* Make room for so many records, and then some; the table never is fuller than three quarters. */
static int records_room(struct mbox *m, uint32_t n, struct err *e)
{
	if (n > MBOX_MAILS_MAX)
		return err_set(e, E_FORMAT, "%s: more than %d mails, the most that one archive takes",
			       m->path, MBOX_MAILS_MAX);
	if (n > m->entries_room) {
		uint32_t room = n + n / 8 + 256;
		void *entries = realloc(m->entries, room * sizeof *m->entries);
		void *order;

		if (entries != NULL)
			m->entries = entries;
		order = realloc(m->order, room * sizeof *m->order);
		if (order != NULL)
			m->order = order;
		if (entries == NULL || order == NULL)
			return err_set(e, E_SYSTEM, "%s: out of memory for %lu mails", m->path,
				       (unsigned long)room);
		m->entries_room = room;
	}
	if (n > m->table_room / 4 * 3) {
		uint32_t room = n + n / 2 + 512;

		free(m->table);
		m->table_room = 0;
		m->table = calloc(room, sizeof *m->table);
		if (m->table == NULL)
			return err_set(e, E_SYSTEM, "%s: out of memory for %lu mails", m->path,
				       (unsigned long)n);
		m->table_room = room;
		for (uint32_t i = 0; i < m->now.records; i++)
			table_insert(m, i);
	}
	return 0;
}

/* Take a record into memory; the counts follow. Its UID does not enter 'order' yet. */
static int record_add(struct mbox *m, const struct record *r, struct err *e)
{
	uint32_t i = m->now.records;

	if (records_room(m, i + 1, e) != 0)
		return -1;
	m->entries[i].uid = r->uid;
	m->entries[i].bits = entry_hash(&r->id) << ENTRY_HASH_SHIFT | entry_state(r->state) |
			     (r->kind & ENTRY_KIND);
	table_insert(m, i);
	if (r->kind & ENTRY_SUSPECT)
		m->suspect = i + 1;
	if ((r->kind & ENTRY_OTHER) == 0) {
		m->now.stored++;
		m->now.gone += (r->state & MBOX_GONE) != 0;
	} else if (r->uid != 0) {
		m->now.others++;
	}
	m->now.records++;
	return 0;
}

/* Add a record that the index does not have yet. */
static int record_append(struct mbox *m, struct record *r, struct err *e)
{
	uint32_t i = m->now.records, uid = r->uid;

	if (i - m->written == RECORDS_HELD && records_flush(m, e) != 0)
		return -1;
	if (record_add(m, r, e) != 0)
		return -1;
	m->now.mix ^= record_pack(r, m->held + (i - m->written) * RECORD_OCTETS);
	if (uid != 0)
		order_insert(m, i, uid);
	return 0;
}

/*
 * Mails without a Message-ID and with the same key differ by a number, k. For some keys it is
 * remembered below which k all are stored, and all have a UID: else many such mails would cost
 * the square of their number.
 */
static struct hint *made_hint(struct mbox *m, const uint8_t key[20])
{
	struct hint *hint = &m->hints[key[0] % MADE_HINTS];

	if (memcmp(hint->key, key, 20) != 0) {
		memcpy(hint->key, key, 20);
		hint->stored = hint->bound = 1;
	}
	return hint;
}

/* The first number that no stored mail with this key has, and its ID; 0 is an error. */
static unsigned made_next(struct mbox *m, const uint8_t key[20], struct mbox_id *id, struct err *e)
{
	struct hint *hint = made_hint(m, key);

	for (;; hint->stored++) {
		uint32_t at = 0;
		int64_t i;

		made_id(id, key, hint->stored);
		if ((i = record_by_id(m, id, &at, e)) < 0)
			return 0;
		if (i == MBOX_MAILS_MAX)
			return hint->stored;
	}
}

/* The stored mail with this key that has no UID, and its ID: a live one rather than a gone one. */
static int64_t made_unbound(struct mbox *m, const uint8_t key[20], struct mbox_id *id, struct err *e)
{
	struct hint *hint = made_hint(m, key);
	int64_t gone = MBOX_MAILS_MAX;

	for (unsigned k = hint->bound;; k++) {
		struct mbox_id other;
		uint32_t at = 0;
		int64_t i;

		made_id(&other, key, k);
		if ((i = record_by_id(m, &other, &at, e)) < 0)
			return -1;
		if (i == MBOX_MAILS_MAX)
			return gone;
		if (m->entries[i].uid != 0) {
			hint->bound += hint->bound == k;
			continue;
		}
		if (gone == MBOX_MAILS_MAX || (m->entries[i].bits & ENTRY_GONE) == 0)
			*id = other;
		if ((m->entries[i].bits & ENTRY_GONE) == 0)
			return i;
		gone = gone == MBOX_MAILS_MAX ? i : gone;
	}
}

/* ======== reading the mbox: verify, scan ======== */

/*
 * Reads a part of the mbox, line by line; a long line comes in several pieces. It uses the mail
 * buffer, so nothing may be waiting there.
 */
struct reader {
	struct mbox *m;
	off_t next, end;      /* what is still to be read from the file */
	size_t at, n;         /* what of the buffer is still to be given out */
	const uint8_t *piece; /* the piece given out last */
	size_t octets;
	bool line_start; /* it begins a line */
};

static void reader_init(struct reader *r, struct mbox *m, off_t from, off_t end)
{
	*r = (struct reader){ .m = m, .next = from, .end = end, .line_start = true };
	r->piece = (const uint8_t *)"\n";
	r->octets = 1;
}

/* Returns 1 and the next piece, 0 at the end, or -1. A line's first piece has its first 300 octets. */
static int reader_next(struct reader *r, struct err *e)
{
	struct mbox *m = r->m;
	const uint8_t *lf;

	r->line_start = r->piece[r->octets - 1] == '\n';
	if (r->n - r->at < 300 && r->next < r->end) {
		size_t want = BUFFER_OCTETS - (r->n - r->at), got;

		memmove(m->buffer, m->buffer + r->at, r->n - r->at);
		r->n -= r->at;
		r->at = 0;
		if ((off_t)want > r->end - r->next)
			want = (size_t)(r->end - r->next);
		if (read_all(m, m->fd, m->buffer + r->n, want, r->next, &got, e) != 0)
			return -1;
		if (got == 0)
			r->end = r->next;
		r->next += (off_t)got;
		r->n += got;
	}
	if (r->at == r->n)
		return 0;
	r->piece = m->buffer + r->at;
	lf = memchr(r->piece, '\n', r->n - r->at);
	r->octets = lf != NULL ? (size_t)(lf - r->piece) + 1 : r->n - r->at;
	r->at += r->octets;
	return 1;
}

static bool reader_at(const struct reader *r, const char *text)
{
	size_t n = strlen(text);

	return r->line_start && r->octets >= n && memcmp(r->piece, text, n) == 0;
}

static int hex_digit(uint8_t c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Four hex digits, or -1. */
static int parse_state(const uint8_t *p)
{
	int state = 0;

	for (int i = 0; i < 4; i++) {
		if (hex_digit(p[i]) < 0)
			return -1;
		state = state << 4 | hex_digit(p[i]);
	}
	return state;
}

/*
 * Read one message, from the From line that is the reader's piece up to the next one or the end.
 * Fills in *r but for the UID; its kind tells whether it may be torn should it be the last.
 * Returns 1 if another message follows, whose From line is the reader's piece then, else 0, or -1.
 */
static int scan_mail(struct reader *reader, struct record *r, struct err *e)
{
	static const uint8_t unset[] = "0000\n";
	const size_t field = sizeof status_field - 1;
	struct mbox *m = reader->m;
	struct mbox_header id_header, made_header;
	struct mbox_made made;
	struct sum sum = { 0 };
	bool nobody = reader_at(reader, "From nobody "), more = false, header = true;
	unsigned line = 0;
	int got = 1;

	*r = (struct record){ .offset = reader->next - (off_t)(reader->n - reader->at) -
					(off_t)reader->octets };
	mbox_header_init(&id_header, NULL);
	mbox_header_init(&made_header, &made);
	for (; got > 0; got = reader_next(reader, e)) {
		line += reader->line_start;
		if (line > 1 && reader_at(reader, "From ")) {
			more = true;
			break;
		}
		r->octets += (off_t)reader->octets;
		if (line == 2 && r->digits == 0 && reader_at(reader, status_field) &&
		    reader->octets == field + 5 && parse_state(reader->piece + field) >= 0) {
			r->state = (unsigned)parse_state(reader->piece + field);
			r->digits = (uint32_t)((size_t)r->octets - 5);
			if (r->digits > DIGITS_MAX)
				r->digits = 0;
			sum_feed(&sum, reader->piece, field);
			sum_feed(&sum, unset, 5);
			continue;
		}
		sum_feed(&sum, reader->piece, reader->octets);
		if (line == 1 || !header)
			continue;
		mbox_header_feed(&made_header, reader->piece, reader->octets);
		header = !mbox_header_feed(&id_header, reader->piece, reader->octets);
	}
	if (got < 0)
		return -1;
	r->sum = sum_end(&sum);
	r->kind = nobody ? 0 : ENTRY_SUSPECT;
	if (mbox_header_end(&id_header, &r->id)) {
		/* The original gave a made ID to mails whose own it overlooked. */
		if (nobody && id_header.kind[0] == MBOX_ID_MADE && id_header.fields > 1 &&
		    id_header.kind[1] == MBOX_ID_OWN)
			r->id = id_header.id[1];
	} else {
		uint8_t key[20];

		mbox_header_end(&made_header, &(struct mbox_id){ 0 });
		mbox_made_end(&made, key);
		if (made_next(m, key, &r->id, e) == 0)
			return -1;
	}
	return more;
}

/* Append records for the messages between 'from' and 'end'; the first octets there are "From ". */
static int scan(struct mbox *m, off_t from, off_t end, struct err *e)
{
	struct reader reader;
	struct record r;
	int more;

	reader_init(&reader, m, from, end);
	more = reader_next(&reader, e);
	while (more > 0) {
		more = scan_mail(&reader, &r, e);
		if (more < 0)
			return -1;
		if (more > 0)
			r.kind &= ~(unsigned)ENTRY_SUSPECT;
		if (record_append(m, &r, e) != 0)
			return -1;
	}
	return more;
}

/* Does the record's message stand in the mbox, whole? 1 yes, and its state is read; 0 no, -1 cannot say. */
static int verify(struct mbox *m, struct record *r, struct err *e)
{
	struct reader reader;
	struct record found;
	int got;

	reader_init(&reader, m, r->offset, r->offset + r->octets);
	got = reader_next(&reader, e);
	if (got <= 0 || !reader_at(&reader, "From "))
		return got < 0 ? -1 : 0;
	got = scan_mail(&reader, &found, e);
	if (got < 0)
		return -1;
	r->state = found.state;
	return got == 0 && found.octets == r->octets && found.sum == r->sum;
}

/* Read only its state. 1, 0 if there is none where the record says, -1. */
static int reread_state(struct mbox *m, struct record *r, struct err *e)
{
	uint8_t digits[4];
	size_t got;

	if (r->digits == 0)
		return 1;
	if (read_all(m, m->fd, digits, 4, r->offset + r->digits, &got, e) != 0)
		return -1;
	if (got < 4 || parse_state(digits) < 0)
		return 0;
	r->state = (unsigned)parse_state(digits);
	return 1;
}

/* ======== opening ======== */

/* Take a record of the index into memory, with the state that it has in the mbox by now. */
static int record_load(struct mbox *m, const struct record *r, unsigned state_before, struct err *e)
{
	if (record_add(m, r, e) != 0)
		return -1;
	if (entry_state(r->state) != entry_state(state_before)) {
		m->entries[m->now.records - 1].bits |= ENTRY_DIRTY;
		m->records_dirty = true;
	}
	return 0;
}

/*
 * Take in the records that this copy of the header counts. Returns 1; 0 if they are damaged or do
 * not fit the mbox: a record fails its checksum, or with the header at rest all of them fail theirs
 * (only some came to the disk before the power went), the last message does not end where the mbox
 * was committed, or no message begins where the first or the last record says.
 */
static int load(struct mbox *m, const struct state *state, struct err *e)
{
	const uint32_t in_block = BUFFER_OCTETS / RECORD_OCTETS;
	struct record first = { 0 }, last = { 0 }, r;
	size_t got = 0;

	m->now = *state;
	m->now.records = m->now.stored = m->now.gone = m->now.others = m->suspect = 0;
	m->now.mix = 0;
	memset(m->table, 0, m->table_room * sizeof *m->table);
	if (records_room(m, state->records, e) != 0)
		return -1;
	for (uint32_t i = 0; i < state->records; i++) {
		const uint8_t *p = m->buffer + i % in_block * RECORD_OCTETS;
		unsigned before;
		int good = 1;

		if (p == m->buffer && read_all(m, m->index, m->buffer, BUFFER_OCTETS,
					       RECORDS_AT + (off_t)i * RECORD_OCTETS, &got, e) != 0)
			return -1;
		if (got < (size_t)(p - m->buffer) + RECORD_OCTETS || !record_unpack(&r, p))
			return 0;
		m->now.mix ^= get_word(p + 56);
		before = r.state;
		/* A run died, or the index is of an older day: where they differ, the mbox is right. */
		if ((state->writing || m->flushed > state->octets) && (r.kind & ENTRY_OTHER) == 0)
			good = reread_state(m, &r, e);
		if (good <= 0)
			return good;
		if (record_load(m, &r, before, e) != 0)
			return -1;
		if ((r.kind & ENTRY_OTHER) == 0) {
			first = first.octets == 0 ? r : first;
			last = r;
		}
	}
	m->written = m->now.records;
	if (last.offset + last.octets != state->octets || state->octets > m->flushed ||
	    (!state->writing && m->now.mix != state->mix))
		return 0;
	for (int i = 0; i < 2 && last.octets > 0; i++) {
		char from[5];

		if (read_all(m, m->fd, from, 5, i == 0 ? first.offset : last.offset, &got, e) != 0)
			return -1;
		if (got < 5 || memcmp(from, "From ", 5) != 0)
			return 0;
	}
	return 1;
}

/* A run ended before its commit: keep the mails that fit their records, cut off what follows. */
static int recover(struct mbox *m, struct err *e)
{
	uint32_t before = m->now.stored;
	off_t end = m->now.octets;

	for (;;) {
		uint8_t p[RECORD_OCTETS];
		struct record r;
		unsigned state;
		size_t got;
		int good = 1;

		if (read_all(m, m->index, p, sizeof p, RECORDS_AT + (off_t)m->now.records * RECORD_OCTETS,
			     &got, e) != 0)
			return -1;
		if (got < sizeof p || !record_unpack(&r, p))
			break;
		state = r.state;
		if ((r.kind & ENTRY_OTHER) == 0)
			good = r.offset == end && r.octets <= m->flushed - end ? verify(m, &r, e) : 0;
		if (good < 0)
			return -1;
		if (good == 0)
			break;
		if (record_load(m, &r, state, e) != 0)
			return -1;
		m->now.mix ^= get_number(p + 56, 8);
		m->written = m->now.records;
		end += r.octets;
	}
	snprintf(m->mended, sizeof m->mended,
		 "the last run was cut off: %lu of its mails kept, "
		 "%lld octets of an unfinished one removed",
		 (unsigned long)(m->now.stored - before), (long long)(m->flushed - end));
	if (m->how & MBOX_LOOK)
		return 0;
	if ((m->flushed > end && ftruncate(m->fd, end) != 0) ||
	    ftruncate(m->index, RECORDS_AT + (off_t)m->now.records * RECORD_OCTETS) != 0) {
		m->stuck = true;
		return err_errno(e, E_SYSTEM, "%s: cannot cut off an unfinished mail", m->path);
	}
	m->flushed = end;
	m->data_dirty = true;
	return 0;
}

/* Take the messages behind 'from' into the index; the file's end is made that of a message. */
static int take_over(struct mbox *m, off_t from, struct err *e)
{
	char end[2] = "\n";
	size_t got, missing;

	if (m->flushed == from)
		return 0;
	if (read_all(m, m->fd, end, 2, m->flushed - 2, &got, e) != 0)
		return -1;
	missing = end[1] != '\n' ? 2 : end[0] != '\n' ? 1 : 0;
	if (write_all(m, m->fd, "\n\n", missing, m->flushed, e) != 0)
		return -1;
	m->flushed += (off_t)missing;
	m->data_dirty = true;
	if (scan(m, from, m->flushed, e) != 0)
		return -1;
	/* What we store ends with a line end: without one it is not whole, whatever its length. */
	return missing == 2 && m->suspect == m->now.records ? mbox_judge(m, true, e) : 0;
}

/* The index is missing or does not fit: make it from the mbox. UIDs must be bound anew. */
static int rebuild(struct mbox *m, bool had_index, struct err *e)
{
	char from[5];
	size_t got;

	m->now = (struct state){ .claim.unseen = UINT32_MAX };
	m->suspect = m->written = 0;
	memset(m->table, 0, m->table_room * sizeof *m->table);
	if (read_all(m, m->fd, from, 5, 0, &got, e) != 0)
		return -1;
	if (m->flushed > 0 && (got < 5 || memcmp(from, "From ", 5) != 0))
		return err_set(e, E_FORMAT, "%s: this is no mbox file: it does not begin with \"From \"",
			       m->path);
	if (index_create(m, e) != 0 || take_over(m, 0, e) != 0)
		return -1;
	if (m->flushed > 0 || had_index)
		snprintf(m->mended, sizeof m->mended, "index %s: rebuilt, %lu mails",
			 had_index ? "does not fit the mbox" : "missing", (unsigned long)m->now.stored);
	return 0;
}

static int put_in_order(struct mbox *m, struct err *e)
{
	char path[PATH_OCTETS + 16], other[MBOX_NAME_MAX + 1], from[5];
	struct state states[2] = { { 0 } };
	bool look = m->how & MBOX_LOOK, had_index;
	int found = 0, loaded = 0;
	size_t got = 0;

	index_path(m->path, "", path);
	m->index = open(path, (look ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	had_index = m->index >= 0;
	if (!had_index && errno != ENOENT)
		return err_errno(e, E_SYSTEM, "%s: cannot open", path);
	if (had_index && (found = index_header(m->index, m->name, states, other)) < 0)
		return err_set(e, E_FORMAT, "%s: this archive is of the mailbox \"%s\", not of \"%s\"",
			       path, other, m->name);
	m->disk = states[0];
	/* The older copy's mark is void where the newer one says that all is at rest: no cutting then. */
	for (int i = 0; i < 2 && loaded == 0 && found > 0; i++)
		if (states[i].turn > 0 && (i == 0 || states[0].writing))
			loaded = load(m, &states[i], e);
	if (loaded < 0)
		return -1;
	if (loaded > 0 && m->now.writing)
		return recover(m, e);
	if (loaded > 0 && m->flushed > m->now.octets) {
		if (read_all(m, m->fd, from, 5, m->now.octets, &got, e) != 0)
			return -1;
		loaded = got == 5 && memcmp(from, "From ", 5) == 0;
	}
	if (loaded > 0 && m->flushed == m->now.octets)
		return 0;
	if (look && (m->flushed > 0 || had_index))
		return err_set(e, E_FORMAT,
			       "%s: the index is missing or does not fit; the next backup "
			       "makes it anew",
			       m->path);
	if (look)
		return 0;
	if (loaded == 0)
		return rebuild(m, had_index, e);
	found = (int)m->now.stored;
	if (take_over(m, m->now.octets, e) != 0)
		return -1;
	snprintf(m->mended, sizeof m->mended, "%lu mails were behind the index's end: taken over",
		 (unsigned long)m->now.stored - (unsigned long)found);
	return 0;
}

/* Open and lock the mbox, and be sure that it still is the file of that name. */
static int open_locked(struct mbox *m, struct err *e)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct stat st, named;

	if (m->how & MBOX_LOOK) {
		m->fd = open(m->path, O_RDONLY | O_CLOEXEC);
		if (m->fd < 0 && errno == ENOENT)
			return 0;
	} else {
		m->fd = open(m->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	}
	if (m->fd < 0)
		return err_errno(e, E_SYSTEM, "%s: cannot open", m->path);
	/* Any other error than "held": a file system that has no locks. */
	if ((m->how & MBOX_LOOK) == 0 && fcntl(m->fd, F_SETLK, &lock) != 0 &&
	    (errno == EACCES || errno == EAGAIN))
		return err_set(e, E_LOCKED, "%s: another program has locked it", m->path);
	if (fstat(m->fd, &st) != 0 || stat(m->path, &named) != 0)
		return err_errno(e, E_SYSTEM, "%s: cannot look at it", m->path);
	if (st.st_ino != named.st_ino || st.st_dev != named.st_dev)
		return err_set(e, E_LOCKED, "%s: another program is replacing it", m->path);
	if (!S_ISREG(st.st_mode))
		return err_set(e, E_FORMAT, "%s: this is not a file", m->path);
	m->flushed = m->whole = m->committed_octets = st.st_size;
	return 0;
}

int mbox_open(struct mbox **out, const char *path, const char *name, unsigned how, struct err *e)
{
	struct mbox *m = calloc(1, sizeof *m);

	*out = NULL;
	if (m == NULL)
		return err_set(e, E_SYSTEM, "%s: out of memory", path);
	m->fd = m->index = -1;
	m->start = -1;
	m->how = how;
	if (strlen(path) + sizeof ".index.new" > sizeof m->path || strlen(name) > MBOX_NAME_MAX) {
		err_set(e, E_FORMAT, "%s: the path or the mailbox's name is too long", path);
		goto fail;
	}
	strcpy(m->path, path);
	strcpy(m->name, name);
	m->now.claim.unseen = UINT32_MAX;
	if (open_locked(m, e) != 0 || records_room(m, 1, e) != 0 ||
	    ((m->fd >= 0 || (how & MBOX_LOOK) == 0) && put_in_order(m, e) != 0))
		goto fail;
	if (how & MBOX_DUPLICATES) /* they are to be stored now: as if they had never been seen */
		for (uint32_t i = 0; i < m->now.records; i++)
			if (m->entries[i].bits & ENTRY_OTHER && m->entries[i].uid != 0) {
				m->entries[i].uid = 0;
				m->entries[i].bits |= ENTRY_DIRTY;
				m->records_dirty = true;
				m->now.others--;
			}
	order_make(m);
	m->committed_octets = m->flushed;
	m->committed_sec = now_sec();
	*out = m;
	return 0;
fail:
	m->stuck = true; /* leave everything as it was found */
	mbox_close(m, NULL, e);
	return -1;
}

const char *mbox_mended(const struct mbox *m)
{
	return m->mended;
}

const struct mbox_claim *mbox_claimed(const struct mbox *m)
{
	return &m->now.claim;
}

uint32_t mbox_count(const struct mbox *m)
{
	return m->now.records;
}

void mbox_tally(const struct mbox *m, struct mbox_info *info)
{
	*info = (struct mbox_info){ .claim = m->now.claim,
				    .octets = m->flushed + (off_t)m->buffered,
				    .stored = m->now.stored,
				    .gone = m->now.gone,
				    .others = m->now.others,
				    .exists = true,
				    .fits = true,
				    .unbound = m->now.stored - m->now.gone + m->now.others - m->known };
}

uint32_t mbox_came_back(const struct mbox *m)
{
	return m->came_back;
}

/* ======== writing the mbox ======== */

/*
 * Another program has put something behind the part of a mail that we have written, so that cannot be
 * cut off: it must neither pass for the mail nor swallow what follows it.
 */
static void disown_part(struct mbox *m)
{
	static const char from[] = "From MAILER-DAEMON ";
	off_t part = m->flushed - m->whole;
	size_t n = part < BODY_AT ? (size_t)part : BODY_AT, got;
	char text[BODY_AT + 80];
	struct err ignored = { 0 };

	if (read_all(m, m->fd, text, n, m->whole, &got, &ignored) != 0 || got < n ||
	    memcmp(text, from, n < sizeof from ? n : sizeof from - 1) != 0)
		return; /* it is not there any more */
	n = DIGITS_AT + (size_t)snprintf(text + DIGITS_AT, sizeof text - DIGITS_AT,
					 "%04x\nMessage-ID: <part.%lld%s\n", MBOX_GONE, (long long)m->whole,
					 made_domain);
	if (part < (off_t)n + 2) { /* too short to be a mail of its own: empty lines behind the last */
		n = (size_t)part;
		memset(text, '\n', n);
	}
	write_all(m, m->fd, text, n, m->whole, &ignored);
	if (part > (off_t)n)
		write_all(m, m->fd, "\n\n", 2, m->flushed - 2, &ignored);
}

/* The file must be as long as we left it: else somebody else is at it. */
static int untouched(struct mbox *m, struct err *e)
{
	struct stat st;

	if (fstat(m->fd, &st) != 0 || st.st_size == m->flushed)
		return 0;
	m->index_void = true;
	disown_part(m);
	return err_set(e, E_FORMAT, "%s: another program changed it: %lld octets, not %lld", m->path,
		       (long long)st.st_size, (long long)m->flushed);
}

/* Write out the buffer. */
static int flush(struct mbox *m, struct err *e)
{
	if (m->start >= 0)
		sum_feed(&m->sum, m->buffer + m->summed, m->buffered - m->summed);
	m->summed = 0;
	if (m->buffered == 0)
		return 0;
	if (untouched(m, e) != 0)
		return -1;
	if (write_all(m, m->fd, m->buffer, m->buffered, m->flushed, e) != 0) {
		/* Leave no part of a mail. Whole ones are lost too, whose records stand: mbox_open() sees it. */
		if (ftruncate(m->fd, m->whole) == 0)
			m->flushed = m->whole;
		m->buffered = 0;
		return -1;
	}
	m->flushed += (off_t)m->buffered;
	m->whole = m->start >= 0 ? m->start : m->flushed;
	m->buffered = 0;
	m->data_dirty = true;
	return 0;
}

static int put(struct mbox *m, const void *octets, size_t n, struct err *e)
{
	const uint8_t *p = octets;

	while (n > BUFFER_OCTETS - m->buffered) {
		size_t part = BUFFER_OCTETS - m->buffered;

		memcpy(m->buffer + m->buffered, p, part);
		m->buffered += part;
		if (flush(m, e) != 0)
			return -1;
		p += part;
		n -= part;
	}
	memcpy(m->buffer + m->buffered, p, n);
	m->buffered += n;
	return 0;
}

/* Overwrite octets of the mail in hand, wherever they are by now. */
static int patch(struct mbox *m, off_t at, const void *octets, size_t n, struct err *e)
{
	if (at >= m->flushed) {
		memcpy(m->buffer + (at - m->flushed), octets, n);
		return 0;
	}
	if ((at + (off_t)n > m->flushed && flush(m, e) != 0) || untouched(m, e) != 0)
		return -1;
	m->data_dirty = true;
	return write_all(m, m->fd, octets, n, at, e);
}

/* ======== state ======== */

/* Before the first change of this file: the index says that the mbox may be ahead of it. */
static int mark_writing(struct mbox *m, struct err *e)
{
	if (m->marked)
		return 0;
	m->now.writing = true;
	return mbox_commit(m, NULL, e);
}

/*
 * Make record i's state this, in the mbox (unless it has no digits) and in memory. Bits that are
 * not ours stay as they are.
 */
static int set_state(struct mbox *m, uint32_t i, unsigned state, struct err *e)
{
	struct entry *entry = &m->entries[i];
	const size_t field = sizeof status_field - 1;
	uint8_t head[DIGITS_MAX + 4];
	char digits[4];
	struct record r;
	size_t got;
	int old;

	if (state_of(entry) == state || entry->bits & ENTRY_OTHER)
		return 0;
	if (record_get(m, i, &r, e) != 0)
		return -1;
	if (r.digits > 0 && (m->how & MBOX_LOOK) == 0) {
		/* A new index is not in place yet: without one, the digits are read anyway. */
		if (!m->index_new && mark_writing(m, e) != 0)
			return -1;
		if (r.offset + r.digits + 4 > m->flushed && flush(m, e) != 0)
			return -1;
		if (read_all(m, m->fd, head, r.digits + 4, r.offset, &got, e) != 0)
			return -1;
		if (got < r.digits + 4 || memcmp(head, "From ", 5) != 0 || r.digits < field ||
		    memcmp(head + r.digits - field, status_field, field) != 0 ||
		    (old = parse_state(head + r.digits)) < 0) {
			m->index_void = true;
			return err_set(e, E_FORMAT,
				       "%s: no message at octet %lld, where the index says "
				       "that one begins",
				       m->path, (long long)r.offset);
		}
		put_digits(digits, 4, 16, ((unsigned)old & ~(unsigned)(MBOX_FLAGS | MBOX_GONE)) | state);
		if (memcmp(digits, head + r.digits, 4) != 0) {
			if (write_all(m, m->fd, digits, 4, r.offset + r.digits, e) != 0)
				return -1;
			m->data_dirty = true;
		}
	}
	m->now.gone += (state & MBOX_GONE) != 0;
	m->now.gone -= (entry->bits & ENTRY_GONE) != 0;
	entry->bits &= ~(uint32_t)(31 * ENTRY_STATE);
	entry->bits |= entry_state(state) | ENTRY_DIRTY;
	m->records_dirty = true;
	return 0;
}

/* Set the state of record i, and of copies of it that have no UID of their own. */
static int set_state_alike(struct mbox *m, uint32_t i, unsigned state, struct err *e)
{
	struct record r;
	uint32_t at = 0;
	int64_t copy;

	if (record_get(m, i, &r, e) != 0 || set_state(m, i, state, e) != 0)
		return -1;
	while ((copy = record_by_id(m, &r.id, &at, e)) >= 0 && copy < MBOX_MAILS_MAX)
		if (m->entries[copy].uid == 0 && set_state(m, (uint32_t)copy, state, e) != 0)
			return -1;
	return copy < 0 ? -1 : 0;
}

int mbox_set_flags(struct mbox *m, uint32_t uid, unsigned flags, struct err *e)
{
	const uint32_t *i = record_by_uid(m, uid);

	if (i == NULL || m->entries[*i].bits & ENTRY_OTHER || state_of(&m->entries[*i]) == flags)
		return 0;
	return set_state_alike(m, *i, flags & MBOX_FLAGS, e);
}

/* ======== UIDs and identities ======== */

static bool no_uid_lives(void *context, uint32_t uid)
{
	(void)context;
	(void)uid;
	return false;
}

void mbox_forget_uids(struct mbox *m)
{
	mbox_drop_uids(m, no_uid_lives, NULL);
	m->index_rekeyed = true;
	m->now.claim = (struct mbox_claim){ .unseen = UINT32_MAX }; /* should a commit come meanwhile */
}

void mbox_drop_uids(struct mbox *m, bool (*live)(void *context, uint32_t uid), void *context)
{
	uint32_t kept = 0;

	for (uint32_t at = 0; at < m->known; at++) {
		uint32_t i = m->order[at];

		if (live(context, m->entries[i].uid))
			m->order[kept++] = i;
		else
			set_uid(m, i, 0);
	}
	m->known = kept;
	for (int i = 0; i < MADE_HINTS; i++)
		m->hints[i].bound = 1;
}

/* The UID belongs to the stored mail or other name i, which has none: it lives. */
static int give_uid(struct mbox *m, uint32_t i, uint32_t uid, struct err *e)
{
	set_uid(m, i, uid);
	if ((m->entries[i].bits & ENTRY_GONE) == 0)
		return 0;
	m->came_back++;
	return set_state_alike(m, i, state_of(&m->entries[i]) & ~(unsigned)MBOX_GONE, e);
}

int mbox_bind(struct mbox *m, uint32_t uid, const struct mbox_id *id, uint64_t size, struct err *e)
{
(void)size;
	struct record other = { .uid = uid, .kind = ENTRY_OTHER, .id = *id };
	int64_t i, best = -1, gone = -1;
	bool stored = false;
	uint32_t at = 0;

	if (record_by_uid(m, uid) != NULL)
		return 1;
	while ((i = record_by_id(m, id, &at, e)) >= 0 && i < MBOX_MAILS_MAX) {
		uint32_t bits = m->entries[i].bits;

		if (bits & ENTRY_OTHER && m->how & MBOX_DUPLICATES)
			continue;
		stored = stored || (bits & ENTRY_OTHER) == 0;
		if (m->entries[i].uid != 0)
			continue;
		/* A mail rather than another name of it, a live one rather than a gone one. */
		if ((bits & (ENTRY_OTHER | ENTRY_GONE)) == 0)
			best = best < 0 || m->entries[best].bits & ENTRY_OTHER ? i : best;
		else if (bits & ENTRY_GONE)
			gone = i;
		else if (best < 0)
			best = i;
	}
	if (i < 0)
		return -1;
	if (gone >= 0 && (best < 0 || m->entries[best].bits & ENTRY_OTHER))
		best = gone;
	if (best >= 0)
		return give_uid(m, (uint32_t)best, uid, e) != 0 ? -1 : 1;
	if (!stored || m->how & MBOX_DUPLICATES)
		return 0;
	if ((m->how & MBOX_LOOK) == 0 && record_append(m, &other, e) != 0)
		return -1;
	return 1;
}

void mbox_assume(struct mbox *m, const struct mbox_claim *claim) { m->now.claim = *claim; }
int mbox_bind_made(struct mbox *m, uint32_t uid, const uint8_t key[20], uint64_t size, struct err *e)
{
(void)size;
	struct mbox_id id;
	int64_t i;

	if (record_by_uid(m, uid) != NULL)
		return 1;
	if ((i = made_unbound(m, key, &id, e)) < 0)
		return -1;
	if (i == MBOX_MAILS_MAX)
		return 0;
	return give_uid(m, (uint32_t)i, uid, e) != 0 ? -1 : 1;
}

int mbox_mark_gone(struct mbox *m, uint32_t *live_before, uint32_t *gone, uint32_t moved[2], struct err *e)
{
	*live_before = m->now.stored - m->now.gone;
	*gone = moved[0] = moved[1] = 0;
	for (uint32_t n = 0; n < m->now.records; n++) {
		struct entry *entry = &m->entries[n];
		uint32_t at = 0, before = m->now.gone;
		struct record r;
		int64_t i;

		if (entry->uid != 0 || entry->bits & (ENTRY_GONE | ENTRY_OTHER | ENTRY_TORN))
			continue;
		if (record_get(m, n, &r, e) != 0)
			return -1;
		while ((i = record_by_id(m, &r.id, &at, e)) >= 0 && i < MBOX_MAILS_MAX)
			if (m->entries[i].uid != 0)
				break;
		if (i < 0)
			return -1;
		if (i < MBOX_MAILS_MAX) { /* lives under another UID: the mail takes the name's */
			if (m->entries[i].bits & ENTRY_OTHER) {
				uint32_t uid = m->entries[i].uid, *place = record_by_uid(m, uid);

				*place = n;
				entry->uid = uid;
				entry->bits |= ENTRY_DIRTY;
				set_uid(m, (uint32_t)i, 0);
				moved[0] = moved[0] == 0 || uid < moved[0] ? uid : moved[0];
				moved[1] = uid > moved[1] ? uid : moved[1];
			}
			continue;
		}
		if (set_state(m, n, state_of(entry) | MBOX_GONE, e) != 0)
			return -1;
		*gone += m->now.gone - before;
	}
	return 0;
}

/* ======== storing ======== */

/* "From MAILER-DAEMON ", asctime() in UTC, LF; FROM_OCTETS whatever the time (RFC 4155). */
static void from_line(char out[FROM_OCTETS], int64_t when_sec)
{
	static const char days[] = "ThuFriSatSunMonTueWed";
	static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	int64_t day, rest, era, year;
	int of_era, of_year, month, second;

	if (when_sec < INT64_C(-62167219200) || when_sec > INT64_C(253402300799))
		when_sec = 0; /* not in the years 0 to 9999 */
	day = when_sec / 86400 - (when_sec % 86400 < 0);
	second = (int)(when_sec - day * 86400);
	/* The civil calendar, in eras of 400 years that begin on 1 March. */
	rest = day + 719468;
	era = rest / 146097 - (rest % 146097 < 0);
	of_era = (int)(rest - era * 146097);
	year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
	of_year = of_era - (int)(365 * year + year / 4 - year / 100);
	month = (5 * of_year + 2) / 153;
	day = ((day % 7) + 7) % 7;
	year += era * 400 + (month >= 10);
	memcpy(out, "From MAILER-DAEMON Thu Jan  1 00:00:00 1970\n", FROM_OCTETS);
	memcpy(out + 19, days + 3 * day, 3);
	memcpy(out + 23, months + 3 * ((month + 2) % 12), 3);
	put_digits(out + 27, 2, 10, (unsigned)(of_year - (153 * month + 2) / 5 + 1));
	if (out[27] == '0')
		out[27] = ' ';
	put_digits(out + 30, 2, 10, (unsigned)second / 3600);
	put_digits(out + 33, 2, 10, (unsigned)second / 60 % 60);
	put_digits(out + 36, 2, 10, (unsigned)second % 60);
	put_digits(out + 39, 4, 10, (unsigned)year);
}

int mbox_begin(struct mbox *m, int64_t when_sec, struct err *e)
{
	char line[FROM_OCTETS];

	if (m->stuck)
		return err_set(e, E_SYSTEM, "%s: a write failed before", m->path);
	if (mark_writing(m, e) != 0)
		return -1;
	m->start = m->flushed + (off_t)m->buffered;
	if (m->buffered == 0)
		m->whole = m->flushed;
	m->summed = m->buffered;
	m->sum = (struct sum){ 0 };
	mbox_header_init(&m->header, NULL);
	m->header_over = m->known_already = m->sum_again = m->cr = false;
	m->when_sec = when_sec;
	from_line(line, when_sec);
	if (put(m, line, FROM_OCTETS, e) != 0 || put(m, status_field, sizeof status_field - 1, e) != 0 ||
	    put(m, "0000\n", 5, e) != 0) {
		mbox_abort(m);
		return -1;
	}
	m->prefix = 0;
	m->quotes = false;
	return 0;
}

/* The header of the mail in hand names no Message-ID: put one in front of it, in the file, or find it stored. */
static int insert_made_id(struct mbox *m, struct err *e)
{
	static const char field[] = "Message-ID: ";
	char line[sizeof field + MBOX_MADE_MAX + 1];
	struct mbox_header header;
	struct mbox_made made;
	uint8_t key[20];
	off_t body = m->start + BODY_AT, end;
	size_t length = sizeof field - 1, got;
	int64_t stored;
	unsigned k;

	if (flush(m, e) != 0)
		return -1;
	mbox_header_init(&header, &made);
	for (off_t at = body; at < m->flushed; at += (off_t)got) {
		if (read_all(m, m->fd, m->buffer, BUFFER_OCTETS, at, &got, e) != 0)
			return -1;
		if (got == 0 || mbox_header_feed(&header, m->buffer, got))
			break;
	}
	mbox_header_end(&header, &m->header.id[0]);
	mbox_made_end(&made, key);
	m->header.kind[0] = MBOX_ID_MADE;
	m->header.fields = 1;
	if ((stored = made_unbound(m, key, &m->header.id[0], e)) != MBOX_MAILS_MAX) {
		m->known_already = true;
		return stored < 0 ? -1 : 0;
	}
	if ((k = made_next(m, key, &m->header.id[0], e)) == 0)
		return -1;
	memcpy(line, field, length);
	length += made_text(line + length, key, k);
	line[length++] = '\n';
	/* Move what is there up, from its end. */
	for (end = m->flushed; end > body; end -= (off_t)got) {
		size_t n = end - body < BUFFER_OCTETS ? (size_t)(end - body) : BUFFER_OCTETS;

		if (read_all(m, m->fd, m->buffer, n, end - (off_t)n, &got, e) != 0 ||
		    write_all(m, m->fd, m->buffer, got, end - (off_t)n + (off_t)length, e) != 0)
			return -1;
		if (got < n)
			return err_set(e, E_FORMAT, "%s: another program shortened it", m->path);
	}
	m->flushed += (off_t)length;
	m->sum_again = true;
	return write_all(m, m->fd, line, length, body, e);
}

/* The header's end has been seen: have we this mail already, and does it need a Message-ID? */
static int header_over(struct mbox *m, struct err *e)
{
	struct mbox_id id;
	uint32_t at = 0;
	int64_t i;

	m->header_over = true;
	if (!mbox_header_end(&m->header, &id))
		return insert_made_id(m, e);
	while ((i = record_by_id(m, &id, &at, e)) >= 0 && i < MBOX_MAILS_MAX)
		if ((m->entries[i].bits & ENTRY_OTHER) == 0 &&
		    ((m->how & MBOX_DUPLICATES) == 0 || m->entries[i].uid == 0))
			m->known_already = true;
	return i < 0 ? -1 : 0;
}

/* The mail in mboxrd form: CRLF as LF, one > more in front of lines that match ^>*From . */
static int put_quoted(struct mbox *m, const uint8_t *p, size_t n, struct err *e)
{
	static const char from[] = "From ";
	const uint8_t *end = p + n, *lf;

	while (p < end) {
		size_t run;

		if (m->cr) {
			m->cr = false;
			if (*p != '\n' && put(m, "\r", 1, e) != 0)
				return -1;
			m->prefix = *p != '\n' ? -1 : m->prefix;
		}
		if (m->prefix == 0 && *p == '>') { /* the one more can as well come behind these */
			m->quotes = true;
			if (put(m, p++, 1, e) != 0)
				return -1;
			continue;
		}
		if (m->prefix >= 0 && *p == (uint8_t)from[m->prefix]) {
			p++;
			if (++m->prefix < 5)
				continue;
			if (put(m, ">From ", 6, e) != 0)
				return -1;
			m->prefix = -1;
			continue;
		}
		if (m->prefix > 0 && put(m, from, (size_t)m->prefix, e) != 0)
			return -1;
		m->prefix = -1;
		lf = memchr(p, '\n', (size_t)(end - p));
		run = (size_t)((lf != NULL ? lf : end) - p);
		if (run > 0 && p[run - 1] == '\r') {
			run--;
			m->cr = lf == NULL;
		}
		if (put(m, p, run + (lf != NULL), e) != 0)
			return -1;
		if (lf != NULL) { /* what was put last is still in the buffer */
			m->buffer[m->buffered - 1] = '\n';
			m->prefix = 0;
			m->quotes = false;
		}
		p = lf != NULL ? lf + 1 : end;
	}
	return 0;
}

int mbox_write(struct mbox *m, const void *octets, size_t n, struct err *e)
{
	if (m->known_already)
		return 0;
	if (m->header_over)
		return put_quoted(m, octets, n, e);
	if (put_quoted(m, octets, n, e) != 0)
		return -1;
	return mbox_header_feed(&m->header, octets, n) ? header_over(m, e) : 0;
}

const char *mbox_date(const struct mbox *m)
{
	return m->header.date;
}

int mbox_lacks_id(struct mbox *m, struct err *e)
{
	if (!m->header_over && header_over(m, e) != 0) {
		mbox_abort(m);
		return -1;
	}
	return m->header.kind[0] == MBOX_ID_MADE;
}

int mbox_end(struct mbox *m, uint32_t uid, int64_t when_sec, unsigned flags, struct err *e)
{
	struct record r = {
		.uid = uid, .state = flags & MBOX_FLAGS, .offset = m->start, .digits = DIGITS_AT
	};
	char from[FROM_OCTETS], digits[4];

	if (!m->header_over && header_over(m, e) != 0)
		goto fail;
	r.id = m->header.id[0];
	if (m->known_already || record_by_uid(m, uid) != NULL) {
		mbox_abort(m);
		return mbox_bind(m, uid, &r.id, 0, e) < 0 ? -1 : 0;
	}
	/* What was held back; then the line end that may be missing, then the empty line. */
	if ((m->cr && put(m, "\r", 1, e) != 0) ||
	    (m->prefix > 0 && put(m, "From ", (size_t)m->prefix, e) != 0))
		goto fail;
	if (put(m, "\n\n", m->prefix == 0 && !m->quotes && !m->cr ? 1 : 2, e) != 0)
		goto fail;
	if (when_sec != m->when_sec) {
		from_line(from, when_sec);
		m->sum_again = m->sum_again || m->start < m->flushed;
		if (patch(m, m->start, from, FROM_OCTETS, e) != 0)
			goto fail;
	}
	r.octets = m->flushed + (off_t)m->buffered - m->start;
	if (m->sum_again) {
		struct reader reader;
		struct record found;

		if (flush(m, e) != 0)
			goto fail;
		reader_init(&reader, m, m->start, m->flushed);
		if (reader_next(&reader, e) < 0 || scan_mail(&reader, &found, e) < 0)
			goto fail;
		m->sum = (struct sum){ 0 };
		r.sum = found.sum;
	} else {
		sum_feed(&m->sum, m->buffer + m->summed, m->buffered - m->summed);
		m->summed = m->buffered;
		r.sum = sum_end(&m->sum);
	}
	put_digits(digits, 4, 16, r.state);
	if (patch(m, m->start + DIGITS_AT, digits, 4, e) != 0 || record_append(m, &r, e) != 0)
		goto fail;
	m->start = -1;
	m->summed = 0;
	if (m->flushed - m->committed_octets >= COMMIT_OCTETS || now_sec() - m->committed_sec >= COMMIT_SEC)
		return mbox_commit(m, NULL, e) != 0 ? -1 : 1;
	return 1;
fail:
	mbox_abort(m);
	return -1;
}

void mbox_abort(struct mbox *m)
{
	struct stat st;

	if (m->start < 0)
		return;
	if (m->start >= m->flushed) {
		m->buffered = m->stuck ? 0 : (size_t)(m->start - m->flushed);
	} else {
		m->flushed = m->start;
		m->buffered = 0;
	}
	/* Also what a failed write left behind; only if it is ours to cut, as flush() found it. */
	if (!m->index_void && fstat(m->fd, &st) == 0 && st.st_size > m->flushed &&
	    ftruncate(m->fd, m->flushed) != 0)
		m->stuck = true;
	m->start = -1;
	m->summed = 0;
}

/* ======== commit and close ======== */

int mbox_commit(struct mbox *m, const struct mbox_claim *claim, struct err *e)
{
	char new[PATH_OCTETS + 16], path[PATH_OCTETS + 16];
	bool data = m->data_dirty || m->buffered > 0, marking = m->now.writing && !m->marked, records;
	struct stat st, named;

	if (m->stuck || m->index_void)
		return err_set(e, E_SYSTEM, "%s: not committed after an error", m->path);
	if (fstat(m->fd, &st) != 0 || stat(m->path, &named) != 0 || st.st_ino != named.st_ino ||
	    st.st_dev != named.st_dev) {
		m->index_void = true;
		return err_set(e, E_FORMAT, "%s: another program replaced it", m->path);
	}
	if (claim != NULL)
		m->now.claim = *claim;
	if (flush(m, e) != 0 || (m->data_dirty && sync_file(m, m->fd, e) != 0))
		return -1;
	m->data_dirty = false;
	m->now.octets = m->flushed;
	m->committed_octets = m->flushed;
	m->committed_sec = now_sec();
	if (m->index_rekeyed && !m->index_new && records_rewrite(m, e) != 0)
		return -1;
	m->index_rekeyed = false;
	records = data || m->records_dirty || m->now.records > m->written || m->index_new || marking ||
		  m->now.writing != m->disk.writing;
	m->now.turn = m->disk.turn;
	if (!records && memcmp(&m->now, &m->disk, sizeof m->now) == 0)
		return 0;
	if (records_update(m, e) != 0 || records_flush(m, e) != 0 || index_write_state(m, e) != 0)
		return -1;
	/* A mere claim may be lost with the power: the old one only asks again. */
	if (records && sync_file(m, m->index, e) != 0)
		return -1;
	if (m->index_new) {
		index_path(m->path, ".new", new);
		index_path(m->path, "", path);
		if (rename(new, path) != 0)
			return err_errno(e, E_SYSTEM, "%s: cannot rename", new);
		m->index_new = false;
		marking = true;
	}
	/* With the mark also after no renaming: a run may have died between one and this sync. */
	if (marking && sync_folder(m, e) != 0)
		return -1;
	m->marked = m->now.writing;
	return 0;
}

int mbox_close(struct mbox *m, const struct mbox_claim *claim, struct err *e)
{
	char path[PATH_OCTETS + 16];
	int r = 0;

	if (m == NULL)
		return 0;
	mbox_abort(m);
	if (!m->stuck && !m->index_void && (m->how & MBOX_LOOK) == 0) {
		m->now.writing = false;
		r = mbox_commit(m, claim, e);
	}
	if (m->index_void && (m->how & MBOX_LOOK) == 0) {
		index_path(m->path, "", path);
		if (unlink(path) != 0 && errno != ENOENT)
			r = err_errno(e, E_SYSTEM, "%s: cannot remove", path);
	}
	if (m->index_new) {
		index_path(m->path, ".new", path);
		unlink(path);
	}
	if (m->index >= 0)
		close(m->index);
	if (m->fd >= 0)
		close(m->fd);
	free(m->entries);
	free(m->order);
	free(m->table);
	free(m);
	return r;
}

/* ======== a mail that may be torn ======== */

/*
 * The octets that a stored mail has on the wire: LF as CRLF, without our fields, quoting and
 * closing empty line.
 */
static int wire_octets(struct mbox *m, const struct record *r, uint64_t *octets, struct err *e)
{
	struct reader reader;
	bool more;
	int got;

	*octets = 0;
	if (flush(m, e) != 0)
		return -1;
	reader_init(&reader, m, r->offset + r->digits + (r->digits > 0 ? 5 : 0), r->offset + r->octets - 1);
	for (more = false; (got = reader_next(&reader, e)) > 0; more = true) {
		size_t quotes = 0;

		if (!more &&
		    (r->digits == 0 ||
		     (reader.octets > 12 && is_made((const char *)reader.piece + 12, reader.octets - 13))))
			continue; /* the From line of a mail without digits; the Message-ID we made */
		*octets += reader.octets + (reader.piece[reader.octets - 1] == '\n');
		while (quotes < reader.octets && reader.piece[quotes] == '>')
			quotes++;
		if (reader.line_start && quotes > 0 && reader.octets - quotes >= 5 &&
		    memcmp(reader.piece + quotes, "From ", 5) == 0)
			--*octets;
	}
	return got;
}

uint32_t mbox_suspect(struct mbox *m, uint64_t *octets)
{
	struct err ignored = { 0 };
	struct record r;

	if (m->suspect == 0 || m->entries[m->suspect - 1].uid == 0 ||
	    record_get(m, m->suspect - 1, &r, &ignored) != 0 || wire_octets(m, &r, octets, &ignored) != 0)
		return 0;
	return m->entries[m->suspect - 1].uid;
}

int mbox_judge(struct mbox *m, bool torn, struct err *e)
{
	uint32_t i = m->suspect - 1, at;

	m->suspect = 0;
	m->entries[i].bits &= ~(uint32_t)ENTRY_SUSPECT;
	m->entries[i].bits |= ENTRY_DIRTY;
	m->records_dirty = true;
	if (!torn)
		return 0;
	if (m->entries[i].uid != 0) {
		at = order_find(m, m->entries[i].uid);
		m->known--;
		memmove(m->order + at, m->order + at + 1, (m->known - at) * sizeof *m->order);
		set_uid(m, i, 0);
	}
	m->entries[i].bits |= ENTRY_TORN;
	return set_state(m, i, state_of(&m->entries[i]) | MBOX_GONE, e);
}

/* ======== file names ======== */

size_t mbox_escape(char *out, size_t size, const char *part, size_t n, bool keep_dots)
{
	size_t length = 0;

	for (size_t i = 0; i < n;) {
		const uint8_t *p = (const uint8_t *)part + i;
		size_t octets = utf8_char(p, n - i, NULL);
		bool edge = i == 0 || i == n - 1;

		if (length + 4 >= size)
			return 0;
		if (octets == 0 || *p < 0x20 || *p == 0x7F || strchr("/\\:*?\"<>|%", *p) != NULL ||
		    (*p == '.' && (edge || !keep_dots)) || (*p == ' ' && edge) ||
		    (*p == 0xC2 && p[1] < 0xA0)) { /* C1 controls too */
			octets = octets == 0 ? 1 : octets;
			for (size_t k = 0; k < octets; k++) {
				if (length + 4 >= size)
					return 0;
				length += (size_t)snprintf(out + length, 4, "%%%02X", p[k]);
			}
		} else {
			memcpy(out + length, p, octets);
			length += octets;
		}
		i += octets;
	}
	out[length] = '\0';
	return length;
}
