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
 *        0  "imap_backup idx3", u32 length of the mailbox's name, u32 its checksum, the name
 *     1536  the index's state (struct state)
 *     2048  a record of 64 octets for each message or other name of one, in the order of storing
 *
 * The state and each record lie within a sector: a power cut leaves them old or new, never mixed.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
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
	SECTOR_OCTETS = 4096,     /* of a disk, or a page: what cannot be read otherwise than as a whole */
	COMMIT_OCTETS = 32 << 20, /* so much mail at most is unsynced ... */
	COMMIT_MS = 20000,        /* ... or for so long */
	PATH_OCTETS = 4096,       /* of a path, with ".index.damaged" */
	NAME_AT = 24,             /* places in the index: */
	STATE_AT = 1536,
	STATE_OCTETS = 80,
	UIDVALIDITY_AT = 20, /* in the state */
	MIX_AT = 64,
	RECORDS_AT = 2048,
	RECORD_OCTETS = 64,
	RECORDS_READ = 64,                       /* records read at once */
	FROM_OCTETS = 44,                        /* of the From line that we write, with its line end */
	STATUS_OCTETS = 18,                      /* of the status line before its digits */
	DIGITS_AT = FROM_OCTETS + STATUS_OCTETS, /* where the state's digits are in a message of ours */
	BODY_AT = DIGITS_AT + 5,                 /* and where the mail itself begins */
	DIGITS_MAX = 255,                        /* digits further from the From line are not looked for */
	COUNTS = 1 << 12,                        /* places for counts of mails that have one made ID */
	COMPARED_MAX = 64,                       /* stored copies with which a mail is compared, ... */
	SIZES_MAX = 16                           /* ... or of which only the size is */
};

static const char index_magic[] = "imap_backup idx3";
static const char own_lines[] = "From MAILER-DAEMON Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0000\n";
static const char *const status_field = own_lines + FROM_OCTETS;
static const char made_domain[] = "@imap_backup.py.local>";

/* ======== octets ======== */

static void put_number(uint8_t *p, unsigned octets, uint64_t number)
{
	for (unsigned i = 0; i < octets; i++)
		p[i] = (uint8_t)(number >> 8 * i);
}

/* Eight octets: one load, where the machine has it. Of a shorter number it has what follows, too, above it. */
static inline __attribute__((always_inline)) uint64_t get_word(const uint8_t *p)
{
	return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24 |
	       (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

/* The last n digits of a number to this base, with zeroes in front; no NUL. */
static void put_digits(char *p, unsigned n, unsigned base, unsigned number)
{
	for (; n-- > 0; number /= base)
		p[n] = "0123456789abcdef"[number % base];
}

/*
 * The checksum of stored octets and of the index: two chains of multiplications over little-endian
 * words, since a CPU can do two at a time; as fast as memory. It finds what power cuts, bit rot and
 * other programs do; it is no defence against somebody who computes it too.
 */
struct sum {
	uint64_t even, odd; /* of the words */
	uint64_t octets;
	uint8_t rest[16]; /* octets % 16 of them wait for their two words to be whole */
};

static uint64_t sum_step(uint64_t value, uint64_t word)
{
	value = (value ^ word) * UINT64_C(0x9E3779B97F4A7C15);
	return value ^ value >> 32;
}

static void sum_feed(struct sum *s, const uint8_t *p, size_t n)
{
	uint64_t even = s->even, odd = s->odd;
	size_t rest = s->octets % 16, take = n < 16 - rest ? n : 16 - rest;

	s->octets += n;
	if (rest > 0) {
		memcpy(s->rest + rest, p, take);
		p += take;
		n -= take;
		if (rest + take < 16)
			return;
		even = sum_step(even, get_word(s->rest));
		odd = sum_step(odd, get_word(s->rest + 8));
	}
	for (; n >= 16; p += 16, n -= 16) {
		even = sum_step(even, get_word(p));
		odd = sum_step(odd, get_word(p + 8));
	}
	s->even = even;
	s->odd = odd;
	memcpy(s->rest, p, n);
}

static uint64_t sum_end(const struct sum *s)
{
	uint8_t last[16] = { 0 };

	memcpy(last, s->rest, s->octets % 16);
	/* The length stands between the two, for sum_step() does not tell its arguments apart. */
	return sum_step(sum_step(sum_step(s->even, get_word(last)), s->octets),
			sum_step(s->odd, get_word(last + 8)));
}

static uint64_t sum_of(const uint8_t *p, size_t n)
{
	struct sum s = { 0 };

	sum_feed(&s, p, n);
	return sum_end(&s);
}

/* What a record keeps of a From line's checksum. */
static uint32_t sum_of_from(const struct sum *s)
{
	return (uint32_t)(sum_end(s) >> 40) | 1;
}

/* ======== identity ======== */

/* Return true if this is the identity of mails without a Message-ID: there may be several of it. */
static bool id_is_made(const struct mbox_id *id)
{
	return id->octets[0] & 1;
}

static void id_end(struct mbox_id *id, const br_sha256_context *hash, bool made)
{
	uint8_t out[br_sha256_SIZE];

	br_sha256_out(hash, out);
	memcpy(id->octets, out, sizeof id->octets);
	id->octets[0] = (uint8_t)((id->octets[0] & ~1) | made);
}

/* The identity of all mails with this key, by one of their made IDs. */
static void made_id(struct mbox_id *id, const char *text)
{
	br_sha256_context hash;

	br_sha256_init(&hash);
	br_sha256_update(&hash, text, 41);
	id_end(id, &hash, true);
}

/* Return true if header_made() makes such a text, or the original did. */
static bool is_made(const char *text, size_t n)
{
	const size_t domain = sizeof made_domain - 1, end = n - domain; /* of key and number */

	if (n < 41 + domain || n >= MBOX_MADE_MAX || text[0] != '<' ||
	    memcmp(text + end, made_domain, domain) != 0 || strspn(text + 1, "0123456789abcdef") != 40)
		return false;
	return end == 41 || (end > 42 && text[41] == '.' && strspn(text + 42, "0123456789") == end - 42);
}

void mbox_header_init(struct mbox_header *h)
{
	memset(h, 0, sizeof *h);
	br_sha1_init(&h->ahead);
	h->trimmed = h->ahead;
}

/* Hash octets of the fields that make the key: white space counts once something follows it. */
static void header_made_hash(struct mbox_header *h, const uint8_t *p, size_t n)
{
	size_t last = n;

	while (last > 0 && isspace(p[last - 1]))
		last--;
	if (last > 0) {
		br_sha1_update(&h->ahead, p, last);
		h->trimmed = h->ahead;
	}
	br_sha1_update(&h->ahead, p + last, n - last);
}

/* Take such octets; as most mails have a Message-ID, they are hashed only when they must be. */
static void header_made_octets(struct mbox_header *h, const void *octets, size_t n)
{
	if (n > sizeof h->made - h->made_octets) {
		header_made_hash(h, h->made, h->made_octets);
		h->made_octets = 0;
	}
	if (n > sizeof h->made) {
		header_made_hash(h, octets, n);
	} else {
		memcpy(h->made + h->made_octets, octets, n);
		h->made_octets += n;
	}
}

/*
 * The identity and the made ID of a mail with this header, should it have no other: <key@...>, <key.k@...> for the
 * k-th. Returns its length.
 */
static size_t header_made(struct mbox_header *h, struct mbox_id *id, char text[MBOX_MADE_MAX], unsigned k)
{
	uint8_t key[br_sha1_SIZE];
	size_t n = 1;

	header_made_hash(h, h->made, h->made_octets);
	h->made_octets = 0;
	br_sha1_out(&h->trimmed, key);
	text[0] = '<';
	for (int i = 0; i < 20; i++, n += 2)
		put_digits(text + n, 2, 16, key[i]);
	if (k > 1)
		n += (size_t)snprintf(text + n, 12, ".%u", k);
	memcpy(text + n, made_domain, sizeof made_domain);
	made_id(id, text);
	return n + sizeof made_domain - 1;
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
	const unsigned field = h->fields;

	if (h->at != MBOX_AT_ID || field == 2)
		return;
	h->has_id[field] = h->id_octets > 0 && (h->id_octets != 2 || memcmp(h->text, "<>", 2) != 0);
	if (h->id_octets <= sizeof h->text)
		memcpy(h->id_text[field], h->text, h->text_octets);
	if (h->id_octets <= sizeof h->text && is_made(h->text, h->text_octets)) {
		made_id(&h->id[field], h->text);
	} else {
		br_sha256_update(&h->hash, h->text, h->text_octets);
		id_end(&h->id[field], &h->hash, false);
	}
	h->fields++;
}

/* The field's name is complete: what is it to us? Blanks before the colon are obsolete syntax. */
static void header_name_end(struct mbox_header *h)
{
	static const char wanted[][8] = { "from", "to", "cc", "date", "subject" };
	const char *name = h->name;
	size_t n = h->name_octets;

	if (h->quoted && n > 5 && memcmp(name, ">From ", 6) == 0) /* "From :" */
		name++, n--;
	while (n > 0 && isspace((unsigned char)name[n - 1]))
		n--;
	h->at = MBOX_AT_OTHER;
	h->dating = n == 4 && strncasecmp(name, "date", n) == 0 && h->date_octets == 0;
	if (n == 10 && strncasecmp(name, "message-id", n) == 0) {
		h->at = MBOX_AT_ID;
		h->space = false;
		h->text_octets = h->id_octets = 0;
		br_sha256_init(&h->hash);
	}
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		if (n == strlen(wanted[i]) && strncasecmp(name, wanted[i], n) == 0) {
			h->at = MBOX_AT_MADE;
			header_made_octets(h, name, h->name_octets - (size_t)(name - h->name));
			header_made_octets(h, ":", 1);
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
			size_t room = h->dating ? sizeof h->date - 1 - h->date_octets : 0;

			h->cr = run > 0 ? p[run - 1] == '\r' : h->cr;
			header_made_octets(h, p, run);
			if (lf != NULL)
				header_made_octets(h, h->cr ? "\n" : "\r\n", h->cr ? 1 : 2);
			h->cr = h->cr && lf == NULL;
			room = run < room ? run : room;
			memcpy(h->date + h->date_octets, p, room);
			h->date_octets += room;
		} else if (h->at == MBOX_AT_ID) {
			for (size_t i = 0; i < run; i++) {
				if (isspace(p[i])) {
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
	char text[MBOX_MADE_MAX];

	header_field_end(h);
	h->at = MBOX_AT_BODY;
	if (!h->has_id[0])
		header_made(h, &h->id[0], text, 1);
	*id = h->id[0];
	return h->has_id[0];
}

/* ======== the open archive ======== */

enum entry_bits { /* what is kept of a record in memory, below the 22 bits of its ID's hash */
		  ENTRY_OTHER = 1,   /* another name (UID) of a stored mail */
		  ENTRY_SUSPECT = 2, /* the last mail of a tail that was taken over: may be torn */
		  ENTRY_TORN = 4,    /* it was, or another mail replaced it: gone for good */
		  ENTRY_LEFT = 8,    /* its UID left the listing, under this UIDVALIDITY */
		  ENTRY_DIRTY = 16,  /* differs from the record on disk */
		  ENTRY_STATE = 32,  /* five bits: seen, answered, flagged, gone, forwarded */
		  ENTRY_GONE = ENTRY_STATE * 8,
		  ENTRY_DIFFERENT = ENTRY_STATE * 4, /* of another name: its size is that of another mail */
		  ENTRY_KIND = ENTRY_OTHER | ENTRY_SUSPECT | ENTRY_TORN | ENTRY_LEFT,
		  ENTRY_HASH_SHIFT = 10,
		  ENTRY_HASH_BITS = 22,
		  RECORD_SCANNED = 16 /* a record's kind, only on disk: 'wire' may be two too high */
};

struct entry {        /* one for each record, in their order */
	uint32_t uid; /* 0: none known */
	uint32_t bits;
	uint32_t next; /* of the records with its ID, see struct mbox */
};

struct record { /* as in the index */
	uint32_t uid;
	unsigned state, kind; /* MBOX_SEEN ...; ENTRY_KIND and RECORD_SCANNED */
	off_t offset, octets; /* in the mbox: From line up to and with the closing empty line */
	struct mbox_id id;
	uint64_t sum;    /* of the octets behind 'head' */
	uint32_t from;   /* of the From line: 24 bits of its checksum; 0: unknown */
	uint32_t head;   /* octets of the From line and the status line, if there is one */
	uint32_t digits; /* where its digits are, from offset; 0: it has none */
	uint32_t wire;   /* octets of it at the server, also of another name's mail; UINT32_MAX: unknown */
};

struct state {        /* what the index's header says */
	bool writing; /* mails may follow behind 'octets', their records behind 'records' */
	uint32_t records, stored, gone, others;
	off_t octets; /* of the mbox: the committed size */
	uint64_t mix; /* the records' checksums, XORed: do they belong to this header? */
	struct mbox_claim claim;
};

/* Mails without a Message-ID and with the same key differ by a number: how many are there? */
struct count {
	uint64_t hash; /* salted; 0: none */
	uint32_t mails;
};

struct mbox {
	char path[PATH_OCTETS];
	char name[MBOX_NAME_MAX + 1];
	unsigned how;
	int fd, index;      /* -1: not open */
	bool index_void;    /* it does not fit the mbox: to be removed */
	bool index_rekeyed; /* every UID changed, and the index on disk has the old ones */
	bool data_dirty;
	bool marked;      /* we have brought "writing" to the disk; what was read may not be there */
	bool stuck;       /* a write or sync failed: what is on disk is not known */
	struct state now; /* the index's header as it should be, ... */
	uint8_t disk[STATE_OCTETS]; /* ... and as it is on disk */
	uint32_t lost, came_back, different, moved[2];
	uint32_t came, written, synced; /* mails that mbox_end() took; of these in the file, and on disk */
	char mended[200];
	struct err unread; /* of the mbox, and passed over */

	/*
	 * Records: in memory 12 octets each, 4 for their order by UID, 6 for the table.
	 * All records with one ID form a ring, whose last one is in the table. Its order is that of enum
	 * rank when it was sorted; who gets a UID goes from its front to its end. So the first tells
	 * whether a mail has no UID, and the last whether any record has one.
	 */
	struct entry *entries;
	uint32_t room;   /* for how many there is memory */
	uint32_t *order; /* records with a UID, ascending by it */
	uint32_t known;  /* how many these are */
	uint32_t place;  /* where the last one was looked for */
	uint32_t *table; /* a ring's last record + 1, or 0; open addressing by the ID's hash */
	uint32_t table_room;
	uint64_t salt; /* of the hashes: nobody can send mails whose IDs meet */
	struct count counts[COUNTS];

	/* the mail being stored */
	off_t start;     /* -1: none */
	off_t flushed;   /* the mbox file's length; 'buffer' follows it */
	off_t whole;     /* of this, up to the last end of a mail */
	size_t buffered; /* octets in 'buffer'; ... */
	size_t summed;   /* ... of these already in 'sum', or before the mail itself */
	struct sum sum;
	uint64_t wire; /* octets of the mail so far, as they came */
	struct mbox_header header;
	bool header_over;
	bool known_already;     /* it is not kept */
	struct count *counted;  /* it gets the number behind those that this counts; or NULL */
	bool compare;           /* it may replace a stored one, or be the same */
	bool cr;                /* the last octet was a CR, held back: a LF may follow */
	int prefix;             /* -1: within a line; else so much of "From " stands at its start ... */
	bool quotes;            /* ... behind any number of '>' */
	int64_t committed_ms;
	off_t read_at; /* of what the file has here, 'read_octets' are in 'buffer' */
	size_t read_octets;
	uint8_t buffer[BUFFER_OCTETS];
};

static uint64_t salted(const struct mbox *m, const uint8_t *p)
{
	return sum_step(sum_step(m->salt, get_word(p)), get_word(p + 8));
}

static uint32_t entry_hash(const struct mbox *m, const struct mbox_id *id)
{
	return (uint32_t)(salted(m, id->octets) >> (64 - ENTRY_HASH_BITS));
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

/* The order of a ring: who gets the next UID comes first. */
enum rank { RANK_LIVE, RANK_GONE, RANK_NAME, RANK_TORN, RANK_NAME_BOUND, RANK_BOUND, RANKS };

static enum rank rank_of(const struct mbox *m, uint32_t i)
{
	const struct entry *entry = &m->entries[i];

	if (entry->uid != 0)
		return entry->bits & ENTRY_OTHER ? RANK_NAME_BOUND : RANK_BOUND;
	if (entry->bits & (ENTRY_OTHER | ENTRY_TORN))
		return entry->bits & ENTRY_OTHER ? RANK_NAME : RANK_TORN;
	return entry->bits & ENTRY_GONE ? RANK_GONE : RANK_LIVE;
}

/*
 * pread() and pwrite() of everything; *got may be less than n only at the end of the file. Where nothing is written,
 * what a disk cannot read of the mbox is passed over, as NUL: the other mails can still be had.
 */
static int read_all(struct mbox *m, int fd, void *to, size_t n, off_t at, size_t *got, struct err *e)
{
	for (*got = 0; *got < n;) {
		const off_t from = at + (off_t)*got, left = m->flushed - from;
		ssize_t r = pread(fd, (char *)to + *got, n - *got, from);

		if (r < 0 && errno == EIO && fd == m->fd && m->how & MBOX_LOOK && left > 0) {
			err_errno(&m->unread, E_SYSTEM, "%s: cannot read at %lld", m->path, (long long)from);
			r = SECTOR_OCTETS - from % SECTOR_OCTETS;
			r = r < left ? r : (ssize_t)left;
			r = r < (ssize_t)(n - *got) ? r : (ssize_t)(n - *got);
			memset((char *)to + *got, 0, (size_t)r);
		}
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
	m->read_octets = fd == m->fd ? 0 : m->read_octets;
	while (n > 0) {
		ssize_t r = pwrite(fd, from, n, at);

		if (r > 0) {
			from = (const char *)from + r;
			n -= (size_t)r;
			at += r;
		} else if (r == 0 || errno != EINTR) {
			m->stuck = true;
			if (errno == EFBIG)
				return err_set(e, E_SYSTEM, "%s: the file system takes no larger file (FAT: 4 GB)",
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
	if (fd == m->fd && m->flushed > m->now.octets && fstat(fd, &st) == 0 && st.st_size == m->flushed &&
	    ftruncate(m->fd, m->now.octets) == 0)
		m->flushed = m->whole = m->now.octets;
	return -1;
}

static int sync_folder(struct mbox *m, struct err *e)
{
	char path[PATH_OCTETS];
	const char *folder = dirname(strcpy(path, m->path));

	return folder_sync(folder) == 0 ? 0 : err_errno(e, E_SYSTEM, "%s: cannot sync the folder", folder);
}

/* Open a file of ours: a link is not followed, a FIFO not waited for, a device not used. */
static int open_file(const char *path, int flags, struct err *e)
{
	int fd = open(path, flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
	struct stat st;

	if (fd < 0 && errno == ELOOP)
		return err_set(e, E_FORMAT, "%s: this is a link: it is not followed", path);
	if (fd < 0 || (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)))
		return fd;
	close(fd);
	errno = EINVAL;
	return err_set(e, E_FORMAT, "%s: this is not a file", path);
}

static void index_path(const char *path, const char *suffix, char out[PATH_OCTETS + 16])
{
	snprintf(out, PATH_OCTETS + 16, "%s.index%s", path, suffix);
}

/* Return true if --verify has noted damage in the mbox. */
static bool is_noted(const char *path)
{
	char note[PATH_OCTETS + 16];

	index_path(path, ".damaged", note);
	return access(note, F_OK) == 0;
}

/* ======== the index's header ======== */

static void state_pack(const struct state *s, uint8_t p[STATE_OCTETS])
{
	const uint32_t numbers[] = { s->writing,       s->records,        s->stored,
				     s->gone,          s->others,         s->claim.uidvalidity,
				     s->claim.uidnext, s->claim.messages, s->claim.unseen,
				     s->claim.traits };

	for (unsigned i = 0; i < 10; i++)
		put_number(p + 4 * i, 4, numbers[i]);
	put_number(p + 40, 8, s->claim.highestmodseq);
	put_number(p + 48, 8, (uint64_t)s->claim.when_sec);
	put_number(p + 56, 8, (uint64_t)s->octets);
	put_number(p + MIX_AT, 8, s->mix);
	put_number(p + 72, 8, sum_of(p, 72));
}

static bool state_unpack(struct state *s, const uint8_t p[STATE_OCTETS])
{
	uint32_t n[10];

	if (get_word(p + 72) != sum_of(p, 72))
		return false;
	for (unsigned i = 0; i < 10; i++)
		n[i] = (uint32_t)get_word(p + 4 * i);
	*s = (struct state){ .writing = n[0] != 0,
			     .records = n[1],
			     .stored = n[2],
			     .gone = n[3],
			     .others = n[4],
			     .octets = (off_t)get_word(p + 56),
			     .mix = get_word(p + MIX_AT) };
	s->claim = (struct mbox_claim){ .uidvalidity = n[5],
					.uidnext = n[6],
					.messages = n[7],
					.unseen = n[8],
					.traits = n[9],
					.highestmodseq = get_word(p + 40),
					.when_sec = (int64_t)get_word(p + 48) };
	return s->records <= MBOX_MAILS_MAX && s->octets >= 0;
}

/*
 * Is the mailbox of this index the same one, on a server that spells INBOX otherwise or has another delimiter now?
 * The file of both is the same, so what differs can only stand between the parts.
 */
static bool name_is_same(const char *a, const char *b)
{
	size_t i = strncasecmp(a, "INBOX", 5) == 0 && strncasecmp(b, "INBOX", 5) == 0 ? 5 : 0;

	for (; a[i] == b[i] || (ispunct((uint8_t)a[i]) && ispunct((uint8_t)b[i])); i++)
		if (a[i] == '\0')
			return true;
	return false;
}

/* Read the index's header. Return true if it is whole; 'name' receives its mailbox, in any version, or "". */
static bool index_header(int fd, struct state *state, char name[MBOX_NAME_MAX + 1])
{
	uint8_t head[RECORDS_AT];
	size_t got = 0, length;

	name[0] = '\0';
	for (ssize_t r; got < sizeof head; got += (size_t)r)
		if ((r = pread(fd, head + got, sizeof head - got, (off_t)got)) <= 0)
			return false;
	length = (uint32_t)get_word(head + 16);
	if (memcmp(head, index_magic, 15) != 0 || length > MBOX_NAME_MAX ||
	    (uint32_t)get_word(head + 20) != (uint32_t)sum_of(head + NAME_AT, length))
		return false;
	memcpy(name, head + NAME_AT, length);
	name[length] = '\0';
	return head[15] == (uint8_t)index_magic[15] && state_unpack(state, head + STATE_AT);
}

/*
 * Put a new index file in the place of the old one. Its state is no valid one until the first commit, so if
 * the run dies before, the next makes it anew.
 */
static int index_create(struct mbox *m, struct err *e)
{
	char path[PATH_OCTETS + 16];
	uint8_t head[RECORDS_AT] = { 0 };
	size_t length = strlen(m->name);

	if (m->index >= 0)
		close(m->index);
	index_path(m->path, "", path);
	unlink(path);
	if ((m->index = open_file(path, O_RDWR | O_CREAT | O_EXCL, e)) < 0)
		return err_errno(e, E_SYSTEM, "%s: cannot create", path);
	memcpy(head, index_magic, 16);
	put_number(head + 16, 4, length);
	put_number(head + 20, 4, sum_of((const uint8_t *)m->name, length));
	memcpy(head + NAME_AT, m->name, length);
	memset(m->disk, 0, sizeof m->disk);
	return write_all(m, m->index, head, sizeof head, 0, e);
}

void mbox_peek(const char *path, const char *name, struct mbox_info *info)
{
	char index[PATH_OCTETS + 16], other[MBOX_NAME_MAX + 1];
	struct err ignored = { 0 };
	struct state state;
	struct stat st;
	bool exists;
	int fd;

	memset(info, 0, sizeof *info);
	exists = lstat(path, &st) == 0 && S_ISREG(st.st_mode);
	info->octets = exists ? st.st_size : 0;
	index_path(path, "", index);
	if ((fd = open_file(index, O_RDONLY, &ignored)) < 0)
		return;
	if (index_header(fd, &state, other) && (name == NULL || strcmp(name, other) == 0)) {
		info->claim = state.claim;
		info->stored = state.stored;
		info->gone = state.gone;
		info->others = state.others;
		info->fits = exists && !state.writing && info->octets == state.octets &&
			     fstat(fd, &st) == 0 &&
			     st.st_size >= RECORDS_AT + (off_t)state.records * RECORD_OCTETS &&
			     !is_noted(path);
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
	put_number(p + 6, 1, r->kind);
	put_number(p + 7, 1, r->digits);
	put_number(p + 8, 8, (uint64_t)r->offset);
	put_number(p + 16, 8, (uint64_t)r->octets | (uint64_t)r->from << 40);
	memcpy(p + 24, r->id.octets, 16);
	put_number(p + 40, 8, r->sum);
	put_number(p + 48, 4, r->head);
	put_number(p + 52, 4, r->wire);
	sum = sum_of(p, 56);
	put_number(p + 56, 8, sum);
	return sum;
}

/* Return false if it is damaged, or says what no record of ours does. */
static bool record_unpack(struct record *r, const uint8_t p[RECORD_OCTETS])
{
	const uint64_t first = get_word(p), size = get_word(p + 16), lengths = get_word(p + 48);

	*r = (struct record){ .uid = (uint32_t)first,
			      .state = (unsigned)(first >> 32) & 0xFFFF,
			      .kind = (unsigned)(first >> 48) & 0xFF,
			      .digits = (uint32_t)(first >> 56),
			      .offset = (off_t)get_word(p + 8),
			      .octets = (off_t)(size & ((UINT64_C(1) << 40) - 1)),
			      .from = (uint32_t)(size >> 40),
			      .sum = get_word(p + 40),
			      .head = (uint32_t)lengths,
			      .wire = (uint32_t)(lengths >> 32) };
	memcpy(r->id.octets, p + 24, 16);
	if (get_word(p + 56) != sum_of(p, 56) || r->kind > (ENTRY_KIND | RECORD_SCANNED))
		return false;
	if (r->kind & ENTRY_OTHER)
		return (r->kind & ENTRY_KIND) == ENTRY_OTHER && r->offset == 0 && r->octets == 0;
	return r->offset >= 0 && r->octets >= r->head && r->octets <= INT64_MAX - r->offset &&
	       (r->digits == 0 || r->head == r->digits + 5);
}

static off_t record_at(uint32_t i)
{
	return RECORDS_AT + (off_t)i * RECORD_OCTETS;
}

/* Read record i; its UID and state may be newer in entries[i]. */
static int record_get(struct mbox *m, uint32_t i, struct record *r, struct err *e)
{
	uint8_t p[RECORD_OCTETS];
	size_t got;

	if (read_all(m, m->index, p, sizeof p, record_at(i), &got, e) != 0)
		return -1;
	if (got < sizeof p || !record_unpack(r, p)) {
		m->index_void = true;
		return err_set(e, E_FORMAT, "%s.index: record %lu is damaged", m->path, (unsigned long)i);
	}
	return 0;
}

/* Write record i. Not synced. */
static int record_put(struct mbox *m, uint32_t i, const struct record *r, struct err *e)
{
	uint8_t p[RECORD_OCTETS];

	m->now.mix ^= record_pack(r, p);
	return write_all(m, m->index, p, sizeof p, record_at(i), e);
}

/* Write what differs from the disk into the records there. Not synced. */
static int records_update(struct mbox *m, struct err *e)
{
	for (uint32_t i = 0; i < m->now.records; i++) {
		struct entry *entry = &m->entries[i];
		struct record r;
		uint8_t before[RECORD_OCTETS];

		if ((entry->bits & ENTRY_DIRTY) == 0)
			continue;
		if (record_get(m, i, &r, e) != 0)
			return -1;
		m->now.mix ^= record_pack(&r, before);
		r.uid = entry->uid;
		r.state = state_of(entry);
		r.kind = (r.kind & RECORD_SCANNED) | (entry->bits & ENTRY_KIND);
		if (record_put(m, i, &r, e) != 0)
			return -1;
		entry->bits &= ~(uint32_t)ENTRY_DIRTY;
	}
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
}

/*
 * Make 'order' from the entries, by Shell's sort: it needs no memory, as qsort() may. Mostly storing nearly went by
 * UID, and one pass is enough: no record is moved further than its UID is behind the highest before it. A UID that
 * two records claim is taken from one of them.
 */
static void order_make(struct mbox *m)
{
	uint32_t n = 0, highest = 0, gap;
	uint64_t behind = 0;

	for (uint32_t i = 0; i < m->now.records; i++) {
		uint32_t uid = m->entries[i].uid;

		if (uid == 0)
			continue;
		m->order[n++] = i;
		behind += uid < highest ? highest - uid : 0;
		highest = uid < highest ? highest : uid;
	}
	for (gap = behind == 0 ? 0 : behind < UINT64_C(32) * n ? 2 : n; gap > 1;) {
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

/* ---- rings ---- */

static uint32_t first_of(const struct mbox *m, const uint32_t *place)
{
	return m->entries[*place - 1].next;
}

static uint32_t table_home(const struct mbox *m, uint32_t hash)
{
	return (uint32_t)((uint64_t)hash * m->table_room >> ENTRY_HASH_BITS);
}

/*
 * Find the ring of this ID: *place is where the table holds its last record + 1, and *last is that
 * record; or a place that holds 0. It is good until a record is added.
 */
static int ring_find(struct mbox *m, const struct mbox_id *id, uint32_t **place, struct record *last,
		     struct err *e)
{
	uint32_t hash = entry_hash(m, id), at = table_home(m, hash);

	for (; m->table[at] != 0; at = at + 1 < m->table_room ? at + 1 : 0) {
		if (m->entries[m->table[at] - 1].bits >> ENTRY_HASH_SHIFT != hash)
			continue;
		if (record_get(m, m->table[at] - 1, last, e) != 0)
			return -1;
		if (memcmp(&last->id, id, sizeof *id) == 0)
			break;
	}
	*place = &m->table[at];
	return 0;
}

/* Put the ring whose last record + 1 is 'other' behind the one whose last record + 1 is *last, if any. */
static void ring_join(struct mbox *m, uint32_t *last, uint32_t other)
{
	if (*last != 0) {
		uint32_t first = m->entries[*last - 1].next;

		m->entries[*last - 1].next = m->entries[other - 1].next;
		m->entries[other - 1].next = first;
	}
	*last = other;
}

/* Make the record behind 'before' the first of its ring. */
static void ring_prefer(struct mbox *m, uint32_t *place, uint32_t before)
{
	uint32_t i = m->entries[before].next;

	if (i == *place - 1) {
		*place = before + 1;
	} else if (before != *place - 1) {
		m->entries[before].next = m->entries[i].next;
		m->entries[i].next = first_of(m, place);
		m->entries[*place - 1].next = i;
	}
}

/* Put each ring into the order of enum rank, and of storing: so are mails told apart that nothing else does. */
static void rings_sort(struct mbox *m)
{
	for (uint32_t at = 0; at < m->table_room; at++) {
		uint32_t end = m->table[at], i = end, follows;

		if (end == 0 || m->entries[end - 1].next == end - 1)
			continue;
		m->table[at] = 0;
		do { /* 'next' remembers the ring's place meanwhile */
			follows = m->entries[i - 1].next + 1;
			m->entries[i - 1].next = at ^ UINT32_MAX;
			i = follows;
		} while (i != end);
	}
	for (enum rank rank = 0; rank < RANKS; rank++)
		for (uint32_t i = 0; i < m->now.records; i++)
			if (m->entries[i].next > MBOX_MAILS_MAX && rank_of(m, i) == rank) {
				uint32_t *place = m->table + (m->entries[i].next ^ UINT32_MAX);

				m->entries[i].next = i;
				ring_join(m, place, i + 1);
			}
}

/*
 * Make room for so many records, and then some; the table never is fuller than two thirds. It grows in its
 * place, for two tables at once would be the most memory that an archive ever takes.
 */
static int records_room(struct mbox *m, uint32_t n, struct err *e)
{
	const uint32_t room = n + n / 16 + 256, table_room = room + room / 2;
	void *entries, *order, *table;

	if (n > MBOX_MAILS_MAX)
		return err_set(e, E_FORMAT, "%s: more than %d mails, the most that one archive takes",
			       m->path, MBOX_MAILS_MAX);
	if (n <= m->room)
		return 0;
	if ((entries = realloc(m->entries, room * sizeof *m->entries)) != NULL)
		m->entries = entries;
	if ((order = realloc(m->order, room * sizeof *m->order)) != NULL)
		m->order = order;
	if ((table = realloc(m->table, table_room * sizeof *m->table)) != NULL)
		m->table = table;
	if (entries == NULL || order == NULL || table == NULL)
		return err_set(e, E_SYSTEM, "%s: out of memory for %lu mails", m->path,
			       (unsigned long)room);
	for (uint32_t at = 0; at < m->table_room; at++)
		if (m->table[at] != 0) /* 'next' remembers meanwhile that this is the last of its ring */
			m->entries[m->table[at] - 1].next ^= UINT32_MAX;
	m->room = room;
	m->table_room = table_room;
	memset(m->table, 0, table_room * sizeof *m->table);
	for (uint32_t i = 0; i < m->now.records; i++)
		if (m->entries[i].next > MBOX_MAILS_MAX) {
			uint32_t at = table_home(m, m->entries[i].bits >> ENTRY_HASH_SHIFT);

			while (m->table[at] != 0) /* rings whose hashes are alike take the next places */
				at = at + 1 < m->table_room ? at + 1 : 0;
			m->table[at] = i + 1;
			m->entries[i].next ^= UINT32_MAX;
		}
	return 0;
}

/*
 * Take a record into memory, at the end of its ring; the counts follow. Its UID does not enter 'order'
 * yet. Returns 1, or 0 if it is another name of a mail that is not there, or -1.
 */
static int record_add(struct mbox *m, const struct record *r, struct err *e)
{
	uint32_t i = m->now.records, *place;
	struct record last;

	if (records_room(m, i + 1, e) != 0 || ring_find(m, &r->id, &place, &last, e) != 0)
		return -1;
	if (*place == 0 && r->kind & ENTRY_OTHER)
		return 0;
	m->entries[i].uid = r->uid;
	m->entries[i].bits = entry_hash(m, &r->id) << ENTRY_HASH_SHIFT | entry_state(r->state) |
			     (r->kind & ENTRY_KIND);
	m->entries[i].next = i;
	ring_join(m, place, i + 1);
	if ((r->kind & ENTRY_OTHER) == 0) {
		m->now.stored++;
		m->now.gone += (r->state & MBOX_GONE) != 0;
	} else if (r->uid != 0) {
		m->now.others++;
	}
	m->now.records++;
	return 1;
}

/* Add a record that the index does not have yet. */
static int record_append(struct mbox *m, struct record *r, struct err *e)
{
	uint32_t i = m->now.records;

	if (record_put(m, i, r, e) != 0 || record_add(m, r, e) <= 0)
		return -1;
	if (r->uid != 0)
		order_insert(m, i, r->uid);
	return 0;
}

/* Return the count of a ring's mails without a Message-ID; good until the next call. */
static struct count *count_of(struct mbox *m, const struct mbox_id *id, const uint32_t *place)
{
	const uint64_t hash = salted(m, id->octets);
	struct count *count = &m->counts[hash % COUNTS];
	uint32_t i = *place - 1;

	if (count->hash != hash) {
		*count = (struct count){ .hash = hash };
		do {
			i = m->entries[i].next;
			count->mails++;
		} while (i != *place - 1);
	}
	return count;
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
	*r = (struct reader){
		.m = m, .next = from, .end = end, .piece = (const uint8_t *)"\n", .octets = 1
	};
	if (from >= m->read_at && from < m->read_at + (off_t)m->read_octets) { /* it is in the buffer */
		r->at = (size_t)(from - m->read_at);
		r->n = m->read_octets;
		r->next = m->read_at + (off_t)r->n;
	}
}

/*
 * Returns 1 and the next piece, 0 at the end, or -1. A line's first piece has its first 290 octets, and
 * behind each piece that does not end the line the next 8 can be looked at.
 */
static int reader_next(struct reader *r, struct err *e)
{
	struct mbox *m = r->m;
	off_t left;
	const uint8_t *lf;

	r->line_start = r->piece[r->octets - 1] == '\n';
	if (r->n - r->at < 300 && r->next < r->end) {
		size_t got;

		memmove(m->buffer, m->buffer + r->at, r->n - r->at);
		r->n -= r->at;
		r->at = 0;
		if (read_all(m, m->fd, m->buffer + r->n, BUFFER_OCTETS - r->n, r->next, &got, e) != 0)
			return -1;
		r->next += (off_t)got;
		r->n += got;
		m->read_octets = r->n;
		m->read_at = r->next - (off_t)r->n;
		if (r->n < BUFFER_OCTETS)
			r->end = r->next < r->end ? r->next : r->end;
	}
	left = r->end - (r->next - (off_t)(r->n - r->at));
	if (left <= 0)
		return 0;
	r->piece = m->buffer + r->at;
	r->octets = left < (off_t)(r->n - r->at) ? (size_t)left : r->n - r->at;
	lf = memchr(r->piece, '\n', r->octets);
	if (lf != NULL)
		r->octets = (size_t)(lf - r->piece) + 1;
	else if (r->next < r->end)
		r->octets -= 8;
	r->at += r->octets;
	return 1;
}

static bool reader_at(const struct reader *r, const char *text)
{
	size_t n = strlen(text);

	return r->line_start && r->octets >= n && memcmp(r->piece, text, n) == 0;
}

/* Return the state in a status line of ours, or -1. */
static int status_of(const uint8_t *line)
{
	char digits[5] = "";

	memcpy(digits, line + STATUS_OCTETS, 4);
	if (memcmp(line, status_field, STATUS_OCTETS) != 0 || strspn(digits, "0123456789abcdefABCDEF") != 4)
		return -1;
	return (int)strtoul(digits, NULL, 16);
}

/* Return true if the line is a Message-ID field that we have made, or one that looks like it. */
static bool is_made_line(const uint8_t *p, size_t n)
{
	return n > 13 && memcmp(p, "Message-ID: ", 12) == 0 && is_made((const char *)p + 12, n - 13);
}

/* The time in a From line of n octets (RFC 4155), or INT64_MIN; the original's tell none. */
static int64_t from_time(const uint8_t *p, size_t n)
{
	char line[128], month[4];
	int day, hour, min, sec, year;

	if (n >= sizeof line)
		return INT64_MIN;
	memcpy(line, p, n);
	line[n] = '\0';
	if (sscanf(line, "From %*s %*3s %3s %2d %2d:%2d:%2d %4d", month, &day, &hour, &min, &sec, &year) !=
		    6 ||
	    month_of(month) == 0 || strncmp(line, "From nobody ", 12) == 0)
		return INT64_MIN;
	return ((days_of(year, month_of(month), (unsigned)day) * 24 + hour) * 60 + min) * 60 + sec;
}

/* Our two lines in front of a mail; BODY_AT octets whatever the time (RFC 4155). */
static void head_text(char out[BODY_AT], int64_t when_sec, unsigned state)
{
	static const char days[] = "SunMonTueWedThuFriSat";
	time_t t = (time_t)when_sec;
	struct tm tm;

	if (when_sec < INT64_C(-30610224000) || when_sec > INT64_C(253402300799) || t != when_sec)
		t = 0; /* not in the years 1000 to 9999 */
	gmtime_r(&t, &tm);
	memcpy(out, own_lines, BODY_AT);
	memcpy(out + 19, days + 3 * tm.tm_wday, 3); /* asctime_r() takes long */
	memcpy(out + 23, month_names + 3 * tm.tm_mon, 3);
	put_digits(out + 27, 2, 10, (unsigned)tm.tm_mday);
	out[27] = tm.tm_mday < 10 ? ' ' : out[27];
	put_digits(out + 30, 2, 10, (unsigned)tm.tm_hour);
	put_digits(out + 33, 2, 10, (unsigned)tm.tm_min);
	put_digits(out + 36, 2, 10, (unsigned)tm.tm_sec);
	put_digits(out + 39, 4, 10, (unsigned)tm.tm_year + 1900);
	put_digits(out + DIGITS_AT, 4, 16, state);
}

/*
 * Read the mail that begins at 'at', whatever stands there, up to the next From line or 'end'. Fills in *r but
 * for the UID, and *mail (NULL: not wanted); its kind tells whether it may be torn should it be the last.
 * Returns 1 if another mail follows, else 0, or -1.
 */
static int mail_read(struct mbox *m, off_t at, off_t end, struct record *r, struct mbox_mail *mail,
		     struct err *e)
{
	char text[MBOX_MADE_MAX];
	bool nobody = false, header = true, second;
	struct sum sum = { 0 }, from = { 0 };
	struct mbox_header h;
	struct mbox_id made;
	struct reader reader;
	unsigned line = 0;
	uint64_t wire = 0;
	int64_t when_sec = INT64_MIN;
	int got;

	*r = (struct record){ .offset = at };
	mbox_header_init(&h);
	h.quoted = true;
	for (reader_init(&reader, m, at, end); (got = reader_next(&reader, e)) > 0;) {
		const uint8_t *p = reader.piece;
		const size_t n = reader.octets;
		size_t quotes = 0;

		line += reader.line_start;
		if (line > 1 && reader_at(&reader, "From "))
			break;
		if (r->octets == 0) {
			nobody = reader_at(&reader, "From nobody ");
			when_sec = mail != NULL ? from_time(p, n) : 0;
		}
		r->octets += (off_t)n;
		if (line == 2 && r->digits == 0 && n == STATUS_OCTETS + 5 && status_of(p) >= 0 &&
		    r->octets - 5 <= DIGITS_MAX) {
			r->state = (unsigned)status_of(p);
			r->digits = (uint32_t)r->octets - 5;
		}
		if (line == 1)
			sum_feed(&from, p, n);
		if (line == 1 || (r->digits > 0 && line == 2)) {
			r->head = r->octets < UINT32_MAX ? (uint32_t)r->octets : UINT32_MAX;
			continue;
		}
		sum_feed(&sum, p, n);
		/* The mail as it was on the wire: without the Message-ID that we made, and our quoting. */
		if (line > 2u + (r->digits > 0) || !reader.line_start || !is_made_line(p, n)) {
			wire += n + (p[n - 1] == '\n');
			while (quotes < n && p[quotes] == '>')
				quotes++;
			wire -= reader.line_start && quotes > 0 && n - quotes >= 5 &&
				memcmp(p + quotes, "From ", 5) == 0;
		}
		header = header && !mbox_header_feed(&h, p, n);
	}
	if (got < 0)
		return -1;
	r->sum = sum_end(&sum);
	r->from = sum_of_from(&from);
	r->kind = RECORD_SCANNED | (nobody ? 0 : ENTRY_SUSPECT);
	/* Without the empty line; the original has stripped its mails. */
	wire -= wire < 2 ? wire : 2;
	r->wire = nobody || wire > UINT32_MAX ? UINT32_MAX : (uint32_t)wire;
	/* The original gave a made ID to mails whose own it overlooked. */
	second = mbox_header_end(&h, &r->id) && nobody && id_is_made(&h.id[0]) && h.has_id[1];
	r->id = h.id[second];
	if (mail == NULL)
		return got;
	header_made(&h, &made, text, 1);
	*mail = (struct mbox_mail){ .offset = at,
				    .octets = r->octets,
				    .head = r->head,
				    .digits = r->digits,
				    .state = r->state,
				    .when_sec = when_sec,
				    .sum = r->sum,
				    .id = r->id,
				    .made = second || memcmp(&made, &h.id[0], sizeof made) == 0 };
	memcpy(mail->date, h.date, sizeof mail->date);
	snprintf(mail->name, sizeof mail->name, "%s", h.has_id[0] ? h.id_text[second] : text);
	return got;
}

/* Return 1 if a From line begins there, else 0, or -1. */
static int from_at(struct mbox *m, off_t at, struct err *e)
{
	char from[5];
	size_t got;

	if (read_all(m, m->fd, from, sizeof from, at, &got, e) != 0)
		return -1;
	return got == sizeof from && memcmp(from, "From ", sizeof from) == 0;
}

/* Append records for the messages between 'from' and 'end'; the first octets there are "From ". */
static int scan(struct mbox *m, off_t from, off_t end, struct err *e)
{
	struct record r;

	for (int more = 1; more > 0; from += r.octets) {
		if ((more = mail_read(m, from, end, &r, NULL, e)) < 0)
			return -1;
		if (more > 0)
			r.kind &= ~(unsigned)ENTRY_SUSPECT;
		if (record_append(m, &r, e) != 0)
			return -1;
	}
	return 0;
}

/*
 * Read the mail of a record, with its state as it is by now. *wrong receives what is wrong with the mail,
 * or NULL; then *mail (NULL: not wanted) may tell less.
 */
static int verify(struct mbox *m, struct record *r, struct mbox_mail *mail, const char **wrong,
		  struct err *e)
{
	struct record found;
	int more = mail_read(m, r->offset, r->offset + r->octets, &found, mail, e);

	if (more < 0)
		return -1;
	*wrong = NULL;
	if (found.digits != r->digits || found.head != r->head ||
		 (found.from != r->from && r->from != 0))
		*wrong = "its first lines are damaged";
	else if (more == 0 && found.octets < r->octets)
		*wrong = "it is cut off";
	else if (found.octets != r->octets || found.sum != r->sum)
		*wrong = "its octets differ from those that were stored";
	r->state = found.digits > 0 ? found.state : r->state;
	return 0;
}

/* Read only its state, unless it has none. 1, 0 if none stands where the record says, -1. */
static int reread_state(struct mbox *m, struct record *r, struct err *e)
{
	uint8_t head[DIGITS_MAX + 4];
	size_t got;

	if (r->digits == 0)
		return 1;
	if (read_all(m, m->fd, head, r->digits + 4, r->offset, &got, e) != 0)
		return -1;
	if (got < r->digits + 4 || memcmp(head, "From ", 5) != 0 || r->digits < STATUS_OCTETS ||
	    status_of(head + r->digits - STATUS_OCTETS) < 0)
		return 0;
	r->state = (unsigned)status_of(head + r->digits - STATUS_OCTETS);
	return 1;
}

/* ======== writing the mbox ======== */

/*
 * Another program has put something behind the part of a mail that we have written, so that cannot be
 * cut off: it must neither pass for the mail nor swallow what follows it.
 */
static void disown_part(struct mbox *m)
{
	off_t part = m->flushed - m->whole;
	size_t n = part < BODY_AT ? (size_t)part : BODY_AT, got;
	char text[BODY_AT + 80];
	struct err ignored = { 0 };

	if (read_all(m, m->fd, text, n, m->whole, &got, &ignored) != 0 || got < n ||
	    memcmp(text, own_lines, n < 19 ? n : 19) != 0)
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
	const size_t n = m->buffered;

	if (m->start >= 0) {
		sum_feed(&m->sum, m->buffer + m->summed, n - m->summed);
		m->summed = n;
	}
	if (n == 0)
		return 0;
	if ((m->how & MBOX_LOOK) == 0 && untouched(m, e) != 0)
		return -1;
	if ((m->how & MBOX_LOOK) == 0 && write_all(m, m->fd, m->buffer, n, m->flushed, e) != 0) {
		/* Leave no part of a mail. Whole ones are lost too, whose records stand: mbox_open() sees it. */
		if (ftruncate(m->fd, m->whole) == 0)
			m->flushed = m->whole;
		m->buffered = 0;
		return -1;
	}
	m->flushed += (off_t)n;
	m->whole = m->start >= 0 ? m->start : m->flushed;
	m->written = m->came;
	m->buffered = m->summed = 0;
	m->data_dirty = true;
	return 0;
}

static int put(struct mbox *m, const void *octets, size_t n, struct err *e)
{
	const uint8_t *p = octets;

	m->read_octets = 0;
	while (n > BUFFER_OCTETS - m->buffered) {
		size_t part = BUFFER_OCTETS - m->buffered;

		memcpy(m->buffer + m->buffered, p, part);
		m->buffered += part;
		if (flush(m, e) != 0)
			return -1;
		p += part;
		n -= part;
	}
	memmove(m->buffer + m->buffered, p, n); /* memcpy() is inlined with -Os, and slow for a short line */
	m->buffered += n;
	return 0;
}

/* ======== state ======== */

static int commit(struct mbox *m, const struct mbox_claim *claim, struct err *e);

/* Before the first change of this file: the index says that the mbox may be ahead of it. */
static int mark_writing(struct mbox *m, struct err *e)
{
	if (m->marked)
		return 0;
	m->now.writing = true;
	return commit(m, NULL, e);
}

/*
 * Make record i's state this, in the mbox (unless it has no digits) and in memory. Bits that are
 * not ours stay as they are.
 */
static int set_state(struct mbox *m, uint32_t i, unsigned state, struct err *e)
{
	const unsigned ours = MBOX_FLAGS | MBOX_GONE;
	struct entry *entry = &m->entries[i];
	char digits[4];
	struct record r;
	int good;

	if (state_of(entry) == state || entry->bits & ENTRY_OTHER)
		return 0;
	if (record_get(m, i, &r, e) != 0)
		return -1;
	if (r.digits > 0 && (m->how & MBOX_LOOK) == 0) {
		if (mark_writing(m, e) != 0 || (r.offset + r.digits + 4 > m->flushed && flush(m, e) != 0) ||
		    (good = reread_state(m, &r, e)) < 0)
			return -1;
		if (good == 0) {
			m->index_void = true;
			return err_set(e, E_FORMAT, "%s: no message at octet %lld, where the index has one",
				       m->path, (long long)r.offset);
		}
		if ((r.state & ours) != state) {
			put_digits(digits, 4, 16, (r.state & ~ours) | state);
			if (write_all(m, m->fd, digits, 4, r.offset + r.digits, e) != 0)
				return -1;
			m->data_dirty = true;
		}
	}
	m->now.gone += (state & MBOX_GONE) != 0;
	m->now.gone -= (entry->bits & ENTRY_GONE) != 0;
	entry->bits &= ~(uint32_t)(31 * ENTRY_STATE);
	entry->bits |= entry_state(state) | ENTRY_DIRTY;
	return 0;
}

/* Return true if two messages are octet by octet the same, their own lines in front aside. */
static bool is_alike(const struct record *a, const struct record *b)
{
	return a->octets - a->head == b->octets - b->head && a->sum == b->sum;
}

/* A mail is not whole, or another has taken its place: gone for good, and its UID is free. */
static int tear(struct mbox *m, uint32_t i, struct err *e)
{
	m->entries[i].bits &= ~(uint32_t)(ENTRY_SUSPECT | ENTRY_LEFT);
	m->entries[i].bits |= ENTRY_TORN | ENTRY_DIRTY;
	return set_state(m, i, state_of(&m->entries[i]) | MBOX_GONE, e);
}

/*
 * After a scan: of several mails with one ID those that are gone have been torn, or replaced, unless they
 * are alike the last one that is not gone (or the last, if all are). Else they would come back with it.
 */
static int copies_judge(struct mbox *m, struct err *e)
{
	for (uint32_t at = 0; at < m->table_room; at++) {
		uint32_t i, end = m->table[at] - 1, best = 0, last = 0; /* records + 1 */
		struct record r, copy;

		if (m->table[at] == 0 || m->entries[end].next == end)
			continue;
		i = end;
		do {
			i = m->entries[i].next;
			if (m->entries[i].bits & (ENTRY_OTHER | ENTRY_TORN))
				continue;
			last = i + 1 > last ? i + 1 : last;
			if ((m->entries[i].bits & ENTRY_GONE) == 0 && i + 1 > best)
				best = i + 1;
		} while (i != end);
		best = best != 0 ? best : last;
		if (best != 0 && record_get(m, best - 1, &r, e) != 0)
			return -1;
		do {
			i = m->entries[i].next;
			if (i + 1 == best || rank_of(m, i) != RANK_GONE)
				continue;
			if (record_get(m, i, &copy, e) != 0 || (!is_alike(&r, &copy) && tear(m, i, e) != 0))
				return -1;
		} while (i != end);
	}
	return 0;
}

int mbox_set_flags(struct mbox *m, uint32_t uid, unsigned flags, struct err *e)
{
	const uint32_t *i = record_by_uid(m, uid);

	return i == NULL ? 0 : set_state(m, *i, flags & MBOX_FLAGS, e);
}

off_t mbox_place(struct mbox *m, uint32_t uid)
{
	const uint32_t *i = record_by_uid(m, uid);
	struct record r;

	if (i == NULL || m->entries[*i].bits & ENTRY_OTHER ||
	    record_get(m, *i, &r, &(struct err){ 0 }) != 0 || id_is_made(&r.id))
		return -1;
	return r.offset;
}

/* ======== opening ======== */

/*
 * Take the next record of the index into memory, with the state that its mail has in the mbox. One that the
 * index's header, 'state', does not count is of a run that died: its mail is verified. Returns 1, 0 if it
 * does not fit, or -1.
 */
static int record_load(struct mbox *m, struct record *r, const struct state *state, struct err *e)
{
	uint32_t i = m->now.records;
	unsigned before = r->state;
	const char *wrong = NULL;
	int good = 1;

	if ((r->kind & ENTRY_OTHER) == 0) {
		if (r->offset != m->now.octets || r->octets > m->flushed - r->offset)
			return 0;
		/* A run died, or the index is of an older day: where they differ, the mbox is right. */
		if (i >= state->records)
			good = verify(m, r, NULL, &wrong, e) != 0 ? -1 : wrong == NULL;
		else if ((state->writing || m->flushed > state->octets) &&
			 (good = reread_state(m, r, e)) == 0)
			good = is_noted(m->path); /* it will be healed */
	}
	if (good <= 0 || (good = record_add(m, r, e)) <= 0)
		return good;
	m->now.octets += r->octets;
	if (entry_state(r->state) != entry_state(before))
		m->entries[i].bits |= ENTRY_DIRTY;
	/* A run that died had found out that its UID had left. */
	if (rank_of(m, i) == RANK_BOUND && r->state & MBOX_GONE) {
		m->entries[i].uid = 0;
		m->entries[i].bits |= ENTRY_LEFT | ENTRY_DIRTY;
	}
	return 1;
}

/*
 * Take in the records that the header counts and, if a run died, those behind them that fit the mbox.
 * Returns 1; 0 if those that are counted are damaged or do not fit: a record fails its checksum, or with the
 * header at rest all of them fail theirs (only some came to the disk before the power went), a message does
 * not begin where the one before it ends, the last does not end where the mbox was committed, or none begins
 * where the first or the last record says (and no damage is noted that may be the reason); or -1.
 */
static int load(struct mbox *m, const struct state *state, struct err *e)
{
	uint8_t block[RECORDS_READ * RECORD_OCTETS];
	off_t last = 0;
	size_t got = 0;

	m->now = (struct state){ .writing = state->writing, .claim = state->claim };
	if (records_room(m, state->records, e) != 0)
		return -1;
	for (uint32_t i = 0;; i++) {
		const uint8_t *p = block + i % RECORDS_READ * RECORD_OCTETS;
		struct record r;
		int good = 1;

		if (i == state->records) {
			if (m->now.octets != state->octets || m->now.stored != state->stored ||
			    (!state->writing && m->now.mix != state->mix))
				return 0;
			if (m->now.octets > 0 && !is_noted(m->path) && (good = from_at(m, 0, e)) > 0)
				good = from_at(m, last, e);
			if (good <= 0 || !state->writing)
				return good;
		}
		if (p == block &&
		    read_all(m, m->index, block, sizeof block, record_at(i), &got, &(struct err){ 0 }) != 0)
			return 0; /* nor does what cannot be read fit; and nothing is cut off for it */
		good = 0;
		if (got >= (size_t)(p - block) + RECORD_OCTETS && record_unpack(&r, p))
			good = record_load(m, &r, state, e);
		if (good <= 0)
			return good < 0 ? -1 : i >= state->records;
		m->now.mix ^= get_word(p + RECORD_OCTETS - 8);
		last = r.kind & ENTRY_OTHER ? last : r.offset;
	}
}

/* A run ended before its commit: cut off what follows its whole mails. */
static int cut_off(struct mbox *m, uint32_t kept, struct err *e)
{
	off_t end = m->now.octets;

	snprintf(m->mended, sizeof m->mended,
		 "the last run was cut off: %lu of its mails kept, "
		 "%lld octets of an unfinished one removed",
		 (unsigned long)kept, (long long)(m->flushed - end));
	if (m->how & MBOX_LOOK)
		return 0;
	if ((m->flushed > end && ftruncate(m->fd, end) != 0) ||
	    ftruncate(m->index, record_at(m->now.records)) != 0) {
		m->stuck = true;
		return err_errno(e, E_SYSTEM, "%s: cannot cut off an unfinished mail", m->path);
	}
	m->flushed = end;
	m->data_dirty = true;
	return 0;
}

/* Take the messages behind the index's end into the index; the file's end is made that of a message. */
static int take_over(struct mbox *m, struct err *e)
{
	off_t from = m->now.octets;
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
	m->now.octets = m->flushed; /* they stay, whatever cannot be synced */
	m->data_dirty = true;
	if (scan(m, from, m->flushed, e) != 0)
		return -1;
	/* What we store ends with a line end: without one it is not whole, whatever its length. */
	if (missing == 2 && m->entries[m->now.records - 1].bits & ENTRY_SUSPECT &&
	    tear(m, m->now.records - 1, e) != 0)
		return -1;
	return copies_judge(m, e);
}

/* Make the index from the mbox, which had so many mails. UIDs must be bound anew. */
static int rebuild(struct mbox *m, const char *why, uint32_t stored, struct err *e)
{
	int good = 1;

	m->now = (struct state){ .claim.unseen = UINT32_MAX };
	memset(m->table, 0, m->table_room * sizeof *m->table);
	if (m->flushed > 0 && (good = from_at(m, 0, e)) == 0)
		err_set(e, E_FORMAT, "%s: this is no mbox file: it does not begin with \"From \"", m->path);
	if (good <= 0 || index_create(m, e) != 0 || take_over(m, e) != 0)
		return -1;
	if (m->flushed > 0 || strcmp(why, "missing") != 0)
		snprintf(m->mended, sizeof m->mended, "index %s: rebuilt, %lu mails", why,
			 (unsigned long)m->now.stored);
	m->lost = stored > m->now.stored ? stored - m->now.stored : 0;
	return 0;
}

/* Read the index and make it fit the mbox; for MBOX_READ only its header. */
static int put_in_order(struct mbox *m, struct err *e)
{
	char path[PATH_OCTETS + 16], name[MBOX_NAME_MAX + 1] = "";
	const char *why = "missing";
	const bool look = m->how & MBOX_LOOK;
	struct state state = { 0 };
	bool whole = false;
	int loaded = 0;

	index_path(m->path, "", path);
	m->index = open_file(path, look ? O_RDONLY : O_RDWR, e);
	if (m->index < 0 && errno != ENOENT)
		return err_errno(e, E_SYSTEM, "%s: cannot open", path);
	if (m->index >= 0) {
		whole = index_header(m->index, &state, name);
		why = "does not fit the mbox";
	}
	if (m->how & MBOX_READ) {
		if (!whole)
			snprintf(m->mended, sizeof m->mended, "the index %s",
				 m->index < 0 ? "is missing" : why);
		m->now = whole ? state : m->now;
		strcpy(m->name, whole ? name : "");
		return 0;
	}
	if (name[0] != '\0' && !name_is_same(name, m->name))
		return err_set(e, E_FORMAT, "%s: this archive is of the mailbox \"%s\", not of \"%s\"",
			       path, name, m->name);
	if (whole && strcmp(name, m->name) == 0) {
		state_pack(&state, m->disk);
		if ((loaded = load(m, &state, e)) < 0)
			return -1;
	}
	if (loaded > 0 && m->now.writing)
		return cut_off(m, m->now.stored - state.stored, e);
	if (loaded > 0 && m->flushed == m->now.octets)
		return 0;
	if (loaded > 0 && (loaded = from_at(m, m->now.octets, e)) < 0)
		return -1;
	if (look && (m->flushed > 0 || m->index >= 0))
		return err_set(e, E_STALE,
			       "%s: the index is missing or does not fit; the next backup makes it anew",
			       m->path);
	if (look)
		return 0;
	if (loaded == 0)
		return rebuild(m, why, state.stored, e);
	if (take_over(m, e) != 0)
		return -1;
	snprintf(m->mended, sizeof m->mended, "%lu mails were behind the index's end: taken over",
		 (unsigned long)(m->now.stored - state.stored));
	return 0;
}

/* Open and lock the mbox, and be sure that it still is the file of that name. */
static int open_locked(struct mbox *m, struct err *e)
{
	const bool look = m->how & MBOX_LOOK, reads = m->how & MBOX_READ;
	struct flock lock = { .l_type = look ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET };
	struct stat st, named;

	m->fd = open_file(m->path, look ? O_RDONLY : O_RDWR | O_CREAT, e);
	if (m->fd < 0 && look && !reads && errno == ENOENT)
		return 0;
	if (m->fd < 0)
		return err_errno(e, E_SYSTEM, "%s: cannot open", m->path);
	/* Any other error than "held": a file system that has no locks. */
	if ((reads || !look) && fcntl(m->fd, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN))
		return err_set(e, E_LOCKED, "%s: another program has locked it", m->path);
	if (fstat(m->fd, &st) != 0 || lstat(m->path, &named) != 0)
		return err_errno(e, E_SYSTEM, "%s: cannot look at it", m->path);
	if (st.st_ino != named.st_ino || st.st_dev != named.st_dev)
		return err_set(e, E_LOCKED, "%s: another program is replacing it", m->path);
	m->flushed = m->whole = st.st_size;
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
	m->how = how & MBOX_READ ? how | MBOX_LOOK : how;
	if (strlen(path) + sizeof ".index.damaged" > sizeof m->path || strlen(name) > MBOX_NAME_MAX) {
		err_set(e, E_FORMAT, "%s: the path or the mailbox's name is too long", path);
		goto fail;
	}
	strcpy(m->path, path);
	strcpy(m->name, name);
	m->now.claim.unseen = UINT32_MAX;
	if (!random_octets(&m->salt, sizeof m->salt)) /* what hardly anybody can foresee */
		m->salt = (uint64_t)time(NULL) << 20 ^ (uint64_t)getpid();
	if (open_locked(m, e) != 0 || records_room(m, 1, e) != 0 || (m->fd >= 0 && put_in_order(m, e) != 0))
		goto fail;
	if (how & MBOX_READ) {
		*out = m;
		return 0;
	}
	if (how & MBOX_DUPLICATES) /* they are to be stored now: as if they had never been seen */
		for (uint32_t i = 0; i < m->now.records; i++)
			if (rank_of(m, i) == RANK_NAME_BOUND)
				set_uid(m, i, 0);
	order_make(m);
	rings_sort(m);
	m->committed_ms = now_ms();
	*out = m;
	return 0;
fail:
	m->stuck = true; /* leave everything as it was found */
	mbox_close(m, NULL, NULL, e);
	return -1;
}

const char *mbox_mended(const struct mbox *m)
{
	return m->mended;
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
				    .came = m->flushed > m->now.octets ? m->written : m->synced,
				    .came_back = m->came_back,
				    .lost = m->lost,
				    .different = m->different,
				    .name = m->name };
	for (uint32_t i = 0; i < m->now.records && (m->how & MBOX_READ) == 0; i++) {
		info->unbound += rank_of(m, i) == RANK_LIVE && (m->entries[i].bits & ENTRY_LEFT) == 0;
		info->all_different += rank_of(m, i) == RANK_NAME_BOUND &&
				       m->entries[i].bits & ENTRY_DIFFERENT;
	}
}

/* ======== UIDs and identities ======== */

void mbox_forget_uids(struct mbox *m, const struct mbox_claim *claim)
{
	mbox_drop_uids(m, NULL, NULL);
	for (uint32_t i = 0; i < m->now.records; i++)
		if (m->entries[i].bits & ENTRY_LEFT) {
			m->entries[i].bits &= ~(uint32_t)ENTRY_LEFT;
			m->entries[i].bits |= ENTRY_DIRTY;
		}
	m->index_rekeyed = m->now.records > 0;
	m->now.claim = claim != NULL ? *claim : (struct mbox_claim){ .unseen = UINT32_MAX };
}

/* Return true if this is another name of a mail that has left the server, and that it differs from. */
static bool is_orphan(const struct mbox *m, uint32_t name, bool (*live)(void *context, uint32_t uid),
		      void *context)
{
	const unsigned orphan = ENTRY_OTHER | ENTRY_DIFFERENT;
	uint32_t i = name;
	int n = 0;

	if ((m->entries[name].bits & orphan) != orphan)
		return false;
	while ((i = m->entries[i].next) != name && n++ < COMPARED_MAX)
		if (rank_of(m, i) == RANK_BOUND && live(context, m->entries[i].uid))
			return false;
	return i == name;
}

void mbox_drop_uids(struct mbox *m, bool (*live)(void *context, uint32_t uid), void *context)
{
	uint32_t kept = 0;

	for (uint32_t at = 0; at < m->known; at++) {
		uint32_t i = m->order[at];

		if (live != NULL && live(context, m->entries[i].uid) && !is_orphan(m, i, live, context)) {
			m->order[kept++] = i;
		} else {
			set_uid(m, i, 0);
			if (m->entries[i].bits & ENTRY_OTHER)
				m->entries[i].bits &= ~(uint32_t)ENTRY_DIFFERENT;
			else
				m->entries[i].bits |= ENTRY_LEFT;
		}
	}
	if (kept == m->known)
		return;
	m->known = kept;
	rings_sort(m);
}

/* A ring's mail has lost its UID, while another name of it is listed: it takes that one's. */
static void take_name(struct mbox *m, uint32_t *place)
{
	uint32_t i = first_of(m, place), name = *place - 1, uid = m->entries[name].uid;

	if (rank_of(m, i) != RANK_LIVE || rank_of(m, name) != RANK_NAME_BOUND)
		return;
	*record_by_uid(m, uid) = i;
	m->entries[i].uid = uid;
	m->entries[i].bits &= ~(uint32_t)(ENTRY_LEFT | ENTRY_SUSPECT);
	m->entries[i].bits |= ENTRY_DIRTY;
	set_uid(m, name, 0);
	*place = i + 1;
	m->moved[0] = m->moved[0] == 0 || uid < m->moved[0] ? uid : m->moved[0];
	m->moved[1] = uid > m->moved[1] ? uid : m->moved[1];
}

/* A ring's first, which has no UID, gets this one: it lives, and goes to the end. */
static int give_uid(struct mbox *m, uint32_t *place, uint32_t uid, struct err *e)
{
	uint32_t i = first_of(m, place);
	struct entry *entry = &m->entries[i];

	*place = i + 1;
	set_uid(m, i, uid);
	entry->bits &= ~(uint32_t)(ENTRY_LEFT | ENTRY_SUSPECT);
	if (entry->bits & ENTRY_OTHER || (entry->bits & ENTRY_GONE) == 0)
		return 0;
	m->came_back++;
	return set_state(m, i, state_of(entry) & ~(unsigned)MBOX_GONE, e);
}

/* Return true if the mail of a record can have so many octets on the wire; of 0, unknown, nobody can tell. */
static bool is_of_size(const struct record *r, uint64_t size)
{
	return size == r->wire || (size > 0 && r->wire == UINT32_MAX) ||
	       (r->kind & RECORD_SCANNED && size + 2 == r->wire);
}

/*
 * A mail that the server has belongs to this ring, whose last is 'last'. Give its UID to the first mail there that
 * has none and is of its size. Returns 1; 2 if one of another size may be it; 0 if there is none, or it must be
 * fetched and compared; or -1.
 */
static int bind_first(struct mbox *m, uint32_t *place, const struct record *last, uint32_t uid,
		      uint64_t size, struct err *e)
{
	uint32_t before = *place - 1, i = m->entries[before].next;
	struct record r = *last; /* of the only one */
	int perhaps = 0;

	for (int n = 0; n < SIZES_MAX && rank_of(m, i) <= RANK_GONE; n++) {
		const bool surely = (m->entries[i].bits & (ENTRY_LEFT | ENTRY_SUSPECT)) == 0;

		if (i != before && record_get(m, i, &r, e) != 0)
			return -1;
		if ((surely && size == 0) || is_of_size(&r, size)) {
			ring_prefer(m, place, before);
			return give_uid(m, place, uid, e) != 0 ? -1 : 1;
		}
		perhaps = surely ? 2 : perhaps;
		before = i;
		if ((i = m->entries[i].next) == first_of(m, place))
			break;
	}
	return perhaps;
}

/* Note the UID as another name of a mail of this ring; 'last' is the ring's last. */
static int bind_name(struct mbox *m, uint32_t *place, const struct record *last, uint32_t uid,
		     uint64_t size, struct err *e)
{
	const bool different = !is_of_size(last, size);
	struct record name = { .uid = uid,
			       .state = different ? MBOX_FLAGGED : 0, /* as ENTRY_DIFFERENT */
			       .kind = ENTRY_OTHER | (last->kind & RECORD_SCANNED),
			       .id = last->id,
			       .wire = last->wire };
	uint32_t i = first_of(m, place);

	m->different += different && size > 0;
	if (rank_of(m, i) == RANK_NAME) {
		m->entries[i].bits |= different ? ENTRY_DIFFERENT : 0;
		return give_uid(m, place, uid, e);
	}
	if ((m->how & MBOX_LOOK) == 0)
		return record_append(m, &name, e);
	/* It stands in memory only, and in no ring, for the records of these are read. */
	if (records_room(m, m->now.records + 1, e) != 0)
		return -1;
	i = m->now.records++;
	m->entries[i] = (struct entry){ .bits = ENTRY_OTHER | (different ? ENTRY_DIFFERENT : 0), .next = i };
	set_uid(m, i, uid);
	return 0;
}

/* Return true if each mail with this identity that the server lists is stored. */
static bool keeps_copies(const struct mbox *m, const struct mbox_id *id)
{
	return m->how & MBOX_DUPLICATES || id_is_made(id);
}

int mbox_bind(struct mbox *m, uint32_t uid, const struct mbox_id *id, uint64_t size, bool unfit,
	      struct err *e)
{
	struct record last;
	uint32_t *place;
	int r;

	if (record_by_uid(m, uid) != NULL)
		return 1;
	if (ring_find(m, id, &place, &last, e) != 0)
		return -1;
	if (*place == 0)
		return 0;
	take_name(m, place);
	if ((r = bind_first(m, place, &last, uid, size, e)) > 1 && unfit)
		r = bind_first(m, place, &last, uid, 0, e);
	if (r != 0)
		return r;
	if (keeps_copies(m, id) || m->entries[*place - 1].uid == 0 ||
	    rank_of(m, first_of(m, place)) <= RANK_GONE)
		return 0;
	return bind_name(m, place, &last, uid, size, e) != 0 ? -1 : 1;
}

int mbox_mark_gone(struct mbox *m, uint32_t *live_before, uint32_t *gone, uint32_t moved[2], struct err *e)
{
	*live_before = m->now.stored - m->now.gone;
	*gone = 0;
	for (uint32_t n = 0; n < m->now.records; n++) {
		unsigned state = state_of(&m->entries[n]) | MBOX_GONE;
		enum rank rank = rank_of(m, n);
		uint32_t *place;
		struct record r, last;

		if (rank > RANK_GONE || (rank == RANK_GONE && m->entries[n].next == n))
			continue;
		if (m->entries[n].next != n) {
			if (record_get(m, n, &r, e) != 0 || ring_find(m, &r.id, &place, &last, e) != 0)
				return -1;
			take_name(m, place);
			if (rank_of(m, *place - 1) == RANK_BOUND &&
			    !id_is_made(&r.id)) { /* lives under another UID */
				if (m->entries[n].uid != 0)
					continue;
				if (record_get(m, *place - 1, &last, e) != 0)
					return -1;
				if (!is_alike(&r, &last))
					continue;
				state = state_of(&m->entries[*place - 1]);
			}
		}
		*gone += rank == RANK_LIVE && state & MBOX_GONE;
		if (set_state(m, n, state, e) != 0)
			return -1;
	}
	memcpy(moved, m->moved, sizeof m->moved);
	memset(m->moved, 0, sizeof m->moved);
	return 0;
}

/* ======== storing ======== */

int mbox_begin(struct mbox *m, struct err *e)
{
	if (m->stuck)
		return err_set(e, E_SYSTEM, "%s: a write failed before", m->path);
	if ((m->how & MBOX_LOOK) == 0 && mark_writing(m, e) != 0)
		return -1;
	if (BUFFER_OCTETS - m->buffered < BODY_AT && flush(m, e) != 0) /* our lines are in no sum */
		return -1;
	m->start = m->flushed + (off_t)m->buffered;
	if (m->buffered == 0)
		m->whole = m->flushed;
	m->sum = (struct sum){ 0 };
	m->wire = 0;
	mbox_header_init(&m->header);
	m->counted = NULL;
	m->header_over = m->known_already = m->compare = m->cr = m->quotes = false;
	m->prefix = 0;
	m->summed = m->buffered + BODY_AT;
	return put(m, own_lines, BODY_AT, e); /* mbox_end() knows better; disown_part() looks for them */
}

/* The mail in hand belongs to this ring: have we got it? */
static void find_stored(struct mbox *m, uint32_t *place)
{
	uint32_t i;

	take_name(m, place);
	i = first_of(m, place);
	m->compare = rank_of(m, i) <= RANK_GONE && m->entries[i].bits & (ENTRY_LEFT | ENTRY_SUSPECT);
	if (rank_of(m, i) <= RANK_GONE)
		m->known_already = !m->compare;
	else
		m->known_already = !keeps_copies(m, &m->header.id[0]) && m->entries[*place - 1].uid != 0;
}

/* Return the number in the made ID of record i; 0: there is none. */
static uint32_t made_number(struct mbox *m, uint32_t i)
{
	struct err ignored = { 0 };
	char line[100] = "";
	struct record r;
	size_t got, n;

	if (record_get(m, i, &r, &ignored) != 0 ||
	    read_all(m, m->fd, line, sizeof line - 1, r.offset + r.head, &got, &ignored) != 0)
		return 0;
	n = strcspn(line, "\n") + 1;
	if (n > got || !is_made_line((const uint8_t *)line, n))
		return 0;
	return line[53] == '.' ? (uint32_t)strtoul(line + 54, NULL, 10) : 1;
}

/*
 * The header of the mail in hand names no Message-ID: put one in front of it. If the mail may be one of its
 * ring that is stored, it gets the same, so that the two can be compared.
 */
static int insert_made_id(struct mbox *m, const uint32_t *place, struct err *e)
{
	char line[sizeof "Message-ID: " + MBOX_MADE_MAX + 1] = "Message-ID: ";
	struct mbox_id *id = &m->header.id[0];
	size_t length = strlen(line), got;
	uint32_t k = m->compare ? made_number(m, first_of(m, place)) : 0;

	if (k == 0) {
		m->counted = *place != 0 ? count_of(m, id, place) : NULL;
		k = m->counted != NULL ? m->counted->mails + 1 : 1;
	}
	if (flush(m, e) != 0)
		return -1;
	length += header_made(&m->header, id, line + length, k);
	line[length++] = '\n';
	/* It is in the file by now: move all of it, block by block. What is left goes behind it. */
	m->sum = (struct sum){ 0 };
	memcpy(m->buffer, line, length);
	for (off_t at = m->start + BODY_AT; at < m->flushed; at += (off_t)got) {
		if (read_all(m, m->fd, m->buffer + length, BUFFER_OCTETS - length, at, &got, e) != 0 ||
		    write_all(m, m->fd, m->buffer, got, at, e) != 0)
			return -1;
		if (got == 0)
			return err_set(e, E_FORMAT, "%s: another program shortened it", m->path);
		sum_feed(&m->sum, m->buffer, got);
		memmove(m->buffer, m->buffer + got, length);
	}
	m->buffered = length;
	return 0;
}

/* The header's end has been seen: have we this mail already, and does it need a Message-ID? */
static int header_over(struct mbox *m, struct err *e)
{
	struct record last;
	struct mbox_id id;
	uint32_t *place;
	bool own = mbox_header_end(&m->header, &id);

	if ((m->how & MBOX_LOOK) == 0) { /* else it is only compared */
		if (ring_find(m, &id, &place, &last, e) != 0)
			return -1;
		if (*place != 0)
			find_stored(m, place);
		if (!own && !m->known_already && insert_made_id(m, place, e) != 0)
			return -1;
	}
	m->header_over = true;
	return 0;
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
	m->wire += n;
	if (!m->known_already && put_quoted(m, octets, n, e) != 0)
		return -1;
	return !m->header_over && mbox_header_feed(&m->header, octets, n) ? header_over(m, e) : 0;
}

const char *mbox_date(const struct mbox *m)
{
	return m->header.date;
}

/*
 * The mail in hand may take the place of a stored one. If one of those with its ID is the same, octet by
 * octet, that gets the UID. Returns 0 then, or 1 if the mail is to be stored, or -1.
 */
static int compare(struct mbox *m, const struct record *r, struct err *e)
{
	uint32_t *place, before, i;
	struct record first = { 0 }, copy;

	if (ring_find(m, &r->id, &place, &copy, e) != 0)
		return -1;
	before = *place - 1;
	for (int n = 0; n < COMPARED_MAX && (n == 0 || before != *place - 1); n++, before = i) {
		enum rank rank;

		i = m->entries[before].next;
		rank = rank_of(m, i);
		if (rank > RANK_GONE && (rank != RANK_BOUND || keeps_copies(m, &r->id)))
			continue;
		if (record_get(m, i, &copy, e) != 0)
			return -1;
		if (n == 0)
			first = copy;
		if (!is_alike(r, &copy))
			continue;
		mbox_abort(m);
		if (rank <= RANK_GONE) {
			ring_prefer(m, place, before);
			return give_uid(m, place, r->uid, e);
		}
		if (bind_name(m, place, &copy, r->uid, m->wire, e) != 0 ||
		    ring_find(m, &r->id, &place, &copy, e) != 0)
			return -1;
		/* The name must not be the ring's last, for the first would take it. */
		ring_prefer(m, place, before);
		*place = i + 1;
		return 0;
	}
	i = first_of(m, place);
	if (rank_of(m, i) > RANK_GONE)
		return 1;
	/* Torn is what is too short; if it is longer, another program has added lines. */
	if ((m->entries[i].bits & ENTRY_LEFT) == 0 &&
	    r->octets - r->head <= first.octets - first.head) { /* as in bind_first() */
		mbox_abort(m);
		return give_uid(m, place, r->uid, e);
	}
	*place = i + 1;
	return tear(m, i, e) != 0 ? -1 : 1;
}

int mbox_end(struct mbox *m, uint32_t uid, int64_t when_sec, unsigned flags, struct err *e)
{
	struct record r = { .uid = uid,
			    .state = flags & MBOX_FLAGS,
			    .offset = m->start,
			    .head = BODY_AT,
			    .digits = DIGITS_AT },
		      stored;
	const uint32_t *known;
	struct sum from = { 0 };
	char head[BODY_AT];
	int new = 1;

	if (!m->header_over && header_over(m, e) != 0)
		goto fail;
	r.id = m->header.id[0];
	known = record_by_uid(m, uid);
	if (m->known_already || (known != NULL && (m->how & MBOX_LOOK) == 0)) {
		mbox_abort(m);
		return mbox_bind(m, uid, &r.id, m->wire, true, e) < 0 ? -1 : 0;
	}
	/* What was held back; then the line end that may be missing, then the empty line. */
	if ((m->cr && put(m, "\r", 1, e) != 0) ||
	    (m->prefix > 0 && put(m, "From ", (size_t)m->prefix, e) != 0))
		goto fail;
	if (put(m, "\n\n", m->prefix == 0 && !m->quotes && !m->cr ? 1 : 2, e) != 0)
		goto fail;
	sum_feed(&m->sum, m->buffer + m->summed, m->buffered - m->summed);
	m->summed = m->buffered;
	r.octets = m->flushed + (off_t)m->buffered - m->start;
	r.sum = sum_end(&m->sum);
	r.wire = m->wire < UINT32_MAX ? (uint32_t)m->wire : UINT32_MAX;
	if (m->how & MBOX_LOOK) {
		mbox_abort(m);
		if (known == NULL || record_get(m, *known, &stored, e) != 0)
			return -1;
		return !is_alike(&r, &stored);
	}
	if (m->compare && (new = compare(m, &r, e)) <= 0) {
		if (new < 0)
			goto fail;
		return 0;
	}
	head_text(head, when_sec, r.state);
	sum_feed(&from, (const uint8_t *)head, FROM_OCTETS);
	r.from = sum_of_from(&from);
	if (m->start >= m->flushed)
		memcpy(m->buffer + (m->start - m->flushed), head, BODY_AT);
	else if (untouched(m, e) != 0 || write_all(m, m->fd, head, BODY_AT, m->start, e) != 0)
		goto fail;
	if (record_append(m, &r, e) != 0)
		goto fail;
	if (m->counted != NULL)
		m->counted->mails++;
	m->came++;
	m->start = -1;
	if (m->flushed - m->now.octets >= COMMIT_OCTETS || now_ms() - m->committed_ms >= COMMIT_MS)
		return commit(m, NULL, e) != 0 ? -1 : 1;
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
		m->buffered = (size_t)(m->start - m->flushed);
	} else {
		m->flushed = m->start;
		m->buffered = 0;
	}
	/* Also what a failed write left behind; only if it is ours to cut, as flush() found it. */
	if ((m->how & MBOX_LOOK) == 0 && !m->index_void && fstat(m->fd, &st) == 0 &&
	    st.st_size > m->flushed && ftruncate(m->fd, m->flushed) != 0)
		m->stuck = true;
	m->start = -1;
}

/* ======== commit and close ======== */

/* Sync the mbox, then the index, unless nothing has changed. 'claim' (NULL: the old one) is for its header. */
static int commit(struct mbox *m, const struct mbox_claim *claim, struct err *e)
{
	const bool marking = m->now.writing && !m->marked;
	bool lasting;
	uint8_t state[STATE_OCTETS];
	struct stat st, named;

	if (m->stuck || m->index_void)
		return err_set(e, E_SYSTEM, "%s: not committed after an error", m->path);
	if (fstat(m->fd, &st) != 0 || lstat(m->path, &named) != 0 || st.st_ino != named.st_ino ||
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
	m->synced = m->written;
	m->committed_ms = now_ms();
	/*
	 * The UIDs of two UIDVALIDITYs may not be mixed on the disk under one of these: the old one is off it
	 * before the first record changes, and the new one comes when all have.
	 */
	if (m->index_rekeyed) {
		put_number(m->disk + UIDVALIDITY_AT, 4, 0);
		put_number(m->disk + STATE_OCTETS - 8, 8, sum_of(m->disk, STATE_OCTETS - 8));
		if (write_all(m, m->index, m->disk, sizeof m->disk, STATE_AT, e) != 0 ||
		    sync_file(m, m->index, e) != 0)
			return -1;
	}
	if (records_update(m, e) != 0 || (m->index_rekeyed && sync_file(m, m->index, e) != 0))
		return -1;
	m->index_rekeyed = false;
	/* No record of a run that died before it wrote a mail may be taken for one of those that come now. */
	if (marking && ftruncate(m->index, record_at(m->now.records)) != 0)
		return err_errno(e, E_SYSTEM, "%s.index: cannot cut off what it does not count", m->path);
	state_pack(&m->now, state);
	if (!marking && memcmp(state, m->disk, sizeof state) == 0)
		return 0;
	/* A mere claim may be lost with the power: the old one only asks again. */
	lasting = marking || state[0] != m->disk[0] || memcmp(state + MIX_AT, m->disk + MIX_AT, 8) != 0;
	if (write_all(m, m->index, state, sizeof state, STATE_AT, e) != 0)
		return -1;
	memcpy(m->disk, state, sizeof state);
	if ((lasting && sync_file(m, m->index, e) != 0) || (marking && sync_folder(m, e) != 0))
		return -1;
	m->marked = m->now.writing;
	return 0;
}

int mbox_close(struct mbox *m, const struct mbox_claim *claim, struct mbox_info *info, struct err *e)
{
	char path[PATH_OCTETS + 16];
	struct stat st;
	int r = 0;

	if (m == NULL)
		return 0;
	mbox_abort(m);
	if (m->unread.code != E_NONE)
		r = err_set(e, E_SYSTEM, "%s", m->unread.text);
	/* A write failed, and the last mail's end is still here: it is cut off, unless somebody else was at it. */
	if (m->stuck && m->buffered > 0 && m->flushed > m->whole && fstat(m->fd, &st) == 0 &&
	    st.st_size == m->flushed && ftruncate(m->fd, m->whole) != 0)
		r = err_errno(e, E_SYSTEM, "%s: cannot cut off an unfinished mail", m->path);
	if (!m->stuck && !m->index_void && (m->how & MBOX_LOOK) == 0) {
		m->now.writing = false;
		r = commit(m, claim, e);
	}
	if (m->index_void && (m->how & MBOX_LOOK) == 0) {
		index_path(m->path, "", path);
		if (unlink(path) != 0 && errno != ENOENT)
			r = err_errno(e, E_SYSTEM, "%s: cannot remove", path);
	}
	if (info != NULL) {
		mbox_tally(m, info);
		info->name = ""; /* it is m's, and gone now */
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

/* ======== damage ======== */

int mbox_note(struct mbox *m, off_t at, struct err *e)
{
	char path[PATH_OCTETS + 16];
	int fd, written;

	index_path(m->path, ".damaged", path);
	if ((fd = open_file(path, O_WRONLY | O_CREAT | O_APPEND, e)) < 0)
		return err_errno(e, E_SYSTEM, "%s: cannot create", path);
	written = dprintf(fd, "%lld\n", (long long)at);
	close(fd);
	return written > 0 ? 0 : err_errno(e, E_SYSTEM, "%s: cannot write", path);
}

/* Let a damaged mail, record i, be gone for good, and no UID be known of it: it is fetched anew. 1, 0: no, -1. */
static int heal(struct mbox *m, uint32_t i, struct record *r, struct err *e)
{
	uint32_t next = i;
	struct err unread = { 0 };
	char head[BODY_AT];
	size_t got;

	/* Our lines may be what is damaged: nobody would find where it, or the next one, begins. */
	if (r->digits > 0) {
		const size_t known = r->digits == DIGITS_AT ? FROM_OCTETS : 5; /* of its From line */

		if (read_all(m, m->fd, head, 2, r->offset + r->octets - 2, &got, &unread) != 0 ||
		    read_all(m, m->fd, head, FROM_OCTETS, r->offset, &got, &unread) != 0 ||
		    reread_state(m, r, &unread) < 0)
			return 0; /* what cannot be read can hardly be written: --verify will tell it again */
		head_text(head, from_time((const uint8_t *)head, got), r->state);
		if (write_all(m, m->fd, "\n\n", 2, r->offset + r->octets - 2, e) != 0 ||
		    write_all(m, m->fd, head, known, r->offset, e) != 0 ||
		    write_all(m, m->fd, head + FROM_OCTETS - 1, STATUS_OCTETS + 6,
			      r->offset + r->digits - STATUS_OCTETS - 1, e) != 0)
			return -1;
		m->data_dirty = true;
	}
	do {
		if (m->entries[next].uid != 0 && (next == i || m->entries[next].bits & ENTRY_OTHER))
			set_uid(m, next, 0);
	} while ((next = m->entries[next].next) != i);
	return tear(m, i, e) != 0 ? -1 : 1;
}

int mbox_heal(struct mbox *m, struct err *e)
{
	long long noted; /* a mail's offset */
	char path[PATH_OCTETS + 16];
	struct record r = { 0 };
	int fd, good, healed = 0;
	uint32_t i = 0;
	FILE *f;

	index_path(m->path, ".damaged", path);
	if ((fd = open_file(path, O_RDONLY, &(struct err){ 0 })) < 0 || (f = fdopen(fd, "r")) == NULL)
		return 0;
	m->now.claim.uidnext = 0; /* all is asked for once more */
	/* The digits in the mbox are ahead of the index, as it says then. */
	while (fscanf(f, "%lld%*[^\n]", &noted) == 1 && mark_writing(m, e) == 0) {
		i = noted <= r.offset ? 0 : i; /* mostly they ascend, as the records do */
		for (; i < m->now.records && e->code == E_NONE; i++)
			if ((m->entries[i].bits & (ENTRY_OTHER | ENTRY_TORN)) == 0 &&
			    (record_get(m, i, &r, e) != 0 || r.offset >= noted))
				break;
		good = i < m->now.records && r.offset == noted && e->code == E_NONE ? heal(m, i, &r, e) : 0;
		if (good < 0)
			break;
		healed += good;
	}
	fclose(f);
	if (e->code != E_NONE)
		return -1;
	order_make(m);
	rings_sort(m);
	if (commit(m, NULL, e) != 0)
		return -1;
	unlink(path);
	return healed;
}

/* ======== file names ======== */

size_t mbox_escape(char *out, size_t size, const char *part, size_t n, const char *also)
{
	size_t length = 0, octets;

	for (size_t i = 0; i < n; i += octets) {
		const uint8_t *p = (const uint8_t *)part + i;
		bool edge = i == 0 || i == n - 1, unsafe;

		octets = utf8_char(p, n - i, NULL);
		unsafe = octets == 0 || *p < 0x20 || *p == 0x7F || strchr("/\\:*?\"<>|%", *p) != NULL ||
			 strchr(also, *p) != NULL || ((*p == '.' || *p == ' ') && edge) ||
			 (*p == 0xC2 && p[1] < 0xA0); /* C1 controls too */
		octets = octets == 0 ? 1 : octets;
		for (size_t k = 0; k < octets; k++) {
			if (length + 4 >= size)
				return 0;
			if (unsafe)
				length += (size_t)sprintf(out + length, "%%%02X", p[k]);
			else
				out[length++] = (char)p[k];
		}
	}
	out[length] = '\0';
	return length;
}

/* ======== reading mails back ======== */

int mbox_walk(struct mbox *m, off_t *at, struct mbox_mail *mail, struct err *e)
{
	struct record r;
	int good;

	if (*at >= m->flushed)
		return 0;
	/* An mbox that begins otherwise, but has the size that its index says, is damaged. */
	if ((good = from_at(m, *at, e)) == 0 && (*at > 0 || m->now.octets != m->flushed))
		return err_set(e, E_FORMAT, "%s: this is no mbox file: it does not begin with \"From \"", m->path);
	if (good < 0 || mail_read(m, *at, m->flushed, &r, mail, e) < 0)
		return -1;
	*at += r.octets;
	return 1;
}

int mbox_read(struct mbox *m, const struct mbox_mail *mail, enum mbox_form form,
	      int (*take)(void *context, const void *octets, size_t n), void *context, struct err *e)
{
	const bool stands = form == MBOX_AS_STORED;
	const off_t end = mail->offset + mail->octets;
	const char *line_end = form == MBOX_CRLF ? "\r\n" : "\n";
	off_t at = mail->offset + (stands ? 0 : (off_t)mail->head);
	bool first = true, open = form == MBOX_CRLF, empty = false; /* an empty mail is a line end */
	bool held = false; /* a '>', the last of those with which a line begins: "From " may follow */
	struct reader reader;
	int got;

	for (reader_init(&reader, m, at, end); (got = reader_next(&reader, e)) > 0; first = false) {
		const uint8_t *p = reader.piece;
		size_t n = reader.octets, run = 0;
		bool lf = p[n - 1] == '\n';

		at += (off_t)n;
		empty = reader.line_start && n == 1 && lf;
		if (stands && mail->digits > 0 && at == mail->offset + mail->digits + 5) {
			put_digits((char *)m->buffer + (reader.at - 5), 4, 16,
				   mail->state & ~(unsigned)MBOX_GONE);
			m->read_octets = 0; /* the buffer is not what the file has any more */
		}
		if (!stands && ((empty && at == end) || (first && mail->made && is_made_line(p, n))))
			continue;
		open = !lf;
		while (!stands && (reader.line_start || held) && run < n && p[run] == '>')
			run++;
		if (run == n) {
			if (take(context, p, n - !held) != 0)
				return -1;
			held = true;
			continue;
		}
		if (held + run > 0 && reader.n - (size_t)(p - m->buffer) >= run + 5 &&
		    memcmp(p + run, "From ", 5) == 0) {
			p += !held;
			n -= !held;
		} else if (held && take(context, ">", 1) != 0) {
			return -1;
		}
		held = false;
		if (take(context, p, n - lf) != 0 || (lf && take(context, line_end, strlen(line_end)) != 0))
			return -1;
	}
	if (got < 0 || at < end)
		return got < 0 ? -1 : err_set(e, E_FORMAT, "%s: another program shortened it", m->path);
	if ((held && take(context, ">", 1) != 0) ||
	    (open && take(context, line_end, strlen(line_end)) != 0))
		return -1;
	return stands && !empty ? take(context, "\n", 1) : 0;
}

/* Count a mail; is another one to be looked at? */
static int verify_count(struct mbox_verify *v, unsigned state, struct err *e)
{
	v->mails++;
	v->gone += (state & MBOX_GONE) != 0;
	return v->stop() ? err_set(e, E_STOPPED, "stopped by a signal") : 0;
}

static void verify_tell(struct mbox_verify *v, bool damage, off_t at, const char *id, const char *what)
{
	v->damaged += damage;
	v->tell(damage, at, id, what);
}

/* Go through the mails that the index does not know. */
static int verify_rest(struct mbox *m, struct mbox_verify *v, off_t at, struct err *e)
{
	const unsigned long before = v->mails;
	const off_t from = at;
	struct mbox_mail mail = { .offset = at };
	char end[2] = "\n\n", what[80];
	size_t got;
	int more;

	while ((more = mbox_walk(m, &at, &mail, e)) > 0)
		if (verify_count(v, mail.state, e) != 0)
			return -1;
	if (more < 0 && e->code == E_FORMAT) {
		*e = (struct err){ 0 };
		verify_tell(v, true, at, "", "no mail begins here");
		return 0;
	}
	if (more < 0 || (at - from >= 2 && read_all(m, m->fd, end, 2, at - 2, &got, e) != 0))
		return -1;
	if (memcmp(end, "\n\n", 2) != 0)
		verify_tell(v, true, mail.offset, mail.name, "it is cut off");
	snprintf(what, sizeof what, "from here on %lu mails stand in no index", v->mails - before);
	if (m->now.records > 0 && at > from)
		verify_tell(v, false, from, "", what);
	return 0;
}

int mbox_verify(struct mbox *m, struct mbox_verify *v, struct err *e)
{
	const char *unfit = m->mended[0] != '\0' && m->flushed > 0 ? m->mended : NULL;
	off_t at = 0, next = 0;
	uint64_t mix = 0;

	*v = (struct mbox_verify){ .tell = v->tell, .stop = v->stop, .octets = m->flushed };
	for (uint32_t i = 0; i < m->now.records && unfit == NULL; i++) {
		struct mbox_mail mail;
		struct err ignored = { 0 }, unnoted = { 0 };
		struct record r;
		unsigned state;
		const char *wrong;
		uint8_t packed[RECORD_OCTETS];
		int good = 1;

		if (record_get(m, i, &r, &ignored) != 0) {
			unfit = "a record of the index is damaged";
			break;
		}
		mix ^= record_pack(&r, packed);
		if (r.kind & ENTRY_OTHER)
			continue;
		if (r.offset != at) {
			unfit = "the index does not fit";
			break;
		}
		state = r.state;
		if (verify(m, &r, &mail, &wrong, e) != 0)
			return -1;
		if (wrong != NULL && (r.kind & ENTRY_TORN) == 0) { /* of which it is known */
			verify_tell(v, true, at, mail.name, wrong);
			if (mbox_note(m, at, &unnoted) != 0) /* a disk that is read-only, say */
				verify_tell(v, false, at, "", unnoted.text);
		} else if (wrong == NULL && state != r.state && !m->now.writing) {
			verify_tell(v, false, at, mail.name, "its state differs from the index");
		}
		if (verify_count(v, r.state, e) != 0)
			return -1;
		if (r.octets > m->flushed - at)
			return 0;
		next = at;
		at += r.octets;
		/* If no other mail follows where it should, the rest has moved: one damage, not thousands. */
		if (wrong != NULL && at < m->flushed && m->flushed != m->now.octets &&
		    (good = from_at(m, at, e)) < 0)
			return -1;
		if (good == 0) {
			at = mbox_walk(m, &next, &mail, &ignored) > 0 ? next : at;
			unfit = "from here on the index does not fit";
		}
	}
	if (unfit == NULL && at > 0 && !m->now.writing && mix != m->now.mix)
		unfit = "the index does not fit";
	if (unfit == NULL && at < m->flushed && m->now.writing)
		unfit = "the last run was cut off";
	if (unfit != NULL)
		verify_tell(v, false, at, "", unfit);
	return verify_rest(m, v, at, e);
}
