/*
 * imap_backup - the contracts between its three sources
 *
 *   imap_backup.c   the program, from the socket to the command line; uses the other two
 *   json.c          a JSON parser
 *   mbox.c          the archive: one mbox file and its index
 *
 * Conventions. Pointers are never NULL unless said. Functions return 0, or -1 with *e filled in;
 * a function that can say more says so. A returned pointer is borrowed unless "caller frees" is
 * written there. Lengths are octets. Offsets are off_t from the start of the file. Times are UTC
 * seconds since 1970, 64 bits wide; names end in _sec or _ms. UIDs are uint32_t and never 0
 * (RFC 3501 2.3.1.1); where a UID is expected, 0 means "none known". Nothing here prints, and
 * nothing here exits.
 */
#ifndef IMAP_BACKUP_H
#define IMAP_BACKUP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <bearssl.h>

/* ======== for all: errors, wiping, chance, folders, UTF-8, clock, calendar (in json.c) ======== */

/* What is lost (to E_REFUSED one mailbox or mail, to E_WAIT the connection), and whether to come back. */
enum err_code {
	E_NONE = 0,
	E_FORMAT,  /* a file is not what it should be, or another program changed it */
	E_STALE,   /* the index does not fit, and is not to be made anew now: see MBOX_LOOK */
	E_SYSTEM,  /* the file system or the memory failed: read-only, EIO */
	E_FULL,    /* the disk or the quota is full; err_errno() makes it of E_SYSTEM */
	E_LOCKED,  /* another process holds it */
	E_REFUSED, /* the server answered NO or BAD: this mailbox (or mail) cannot be had now */
	E_NET,     /* the connection is lost or never came about; a new one may do better */
	E_PROTO,   /* the server said what no server may say; the connection is given up */
	E_WAIT,    /* the server wants to be left alone for wait_sec */
	E_ACCOUNT, /* login refused, certificate not trusted: no use in trying again in this run */
	E_STOPPED  /* a signal, or the parent process went away */
};

/* The first error wins: err_set() does nothing once code is not E_NONE. */
struct err {
	enum err_code code;
	unsigned wait_sec; /* with E_WAIT: how long */
	char text[400];    /* one line for the person, without the final line end */
};

/* Fill in *e unless it already tells of an error. Returns -1, so that one can return err_set(...). */
int err_set(struct err *e, enum err_code code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

int err_fill(struct err *e, enum err_code code, const char *format, va_list arguments);

/* The same with ": " and strerror(errno) appended. */
int err_errno(struct err *e, enum err_code code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* Overwrite a secret with zeros, in a way that no compiler takes for a dead store. */
void wipe(void *p, size_t n);

/* Have random octets. Returns false if there are none. */
bool random_octets(void *out, size_t n);

/* Have what a folder lists outlast a power cut. Returns 0, or -1 with errno. */
int folder_sync(const char *path);

/*
 * The octets of the UTF-8 character at p, of which n >= 1 can be read, or 0 if there is none
 * (RFC 3629 4). *code (NULL: not wanted) receives its code point if there is one.
 */
size_t utf8_char(const uint8_t *p, size_t n, uint32_t *code);

/* Write a code point, no surrogate, as UTF-8. Returns the octets, 1 to 4; no NUL follows. */
size_t utf8_put(char *out, uint32_t code);

/* Milliseconds of a clock that nobody sets. */
int64_t now_ms(void);

/* The days since 1 January 1970, in the civil calendar. Months from 1. */
int64_t days_of(int64_t year, unsigned month, unsigned day);

extern const char month_names[]; /* "JanFeb...": three letters each */

/* The number of a month by its first three letters, in any case; 0: it is none. */
unsigned month_of(const char *text);

/* ======== json.c: RFC 8259 ======== */

enum {
	JSON_DEPTH_MAX = 32,       /* arrays and objects inside each other */
	JSON_OCTETS_MAX = 4 << 20, /* a text longer than this is refused */
	JSON_MEMBERS_MAX = 1000,   /* of an object, so that finding a name that is there twice takes no time */
};

enum json_type { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

/*
 * One value. The tree is read-only for its users and lives until json_free() of its root.
 * Children are linked in the order of the text.
 */
struct json {
	enum json_type type;
	unsigned line, column;    /* where the value begins, from 1; columns count octets */
	const char *key;          /* the member's name, if the value stands in an object, else NULL */
	const char *text;         /* JSON_STRING: decoded UTF-8; JSON_NUMBER: as written; else NULL */
	int64_t number;           /* JSON_NUMBER without fraction or exponent that fits; JSON_BOOL: 0, 1 */
	bool integral;            /* JSON_NUMBER: 'number' holds its value */
	uint32_t count;           /* children of an array or object */
	const struct json *child; /* the first, NULL if none */
	const struct json *next;  /* the next sibling, NULL if last */
};

/*
 * Parse the whole of a JSON text (RFC 8259; a UTF-8 byte order mark is skipped).
 *
 *   text   'length' octets; borrowed until return
 *
 * Strict: one value, nothing behind it but white space; no comments, no trailing commas; strings
 * are valid UTF-8 without control characters, \u0000 and lone surrogates; a name stands once in an
 * object, which has JSON_MEMBERS_MAX at most. One allocation, in proportion to 'length'.
 *
 * Returns the root (caller frees with json_free()), or NULL with E_FORMAT and a text that begins
 * with "LINE:COLUMN: " and says what was found and what was expected, or E_SYSTEM out of memory.
 */
struct json *json_parse(const char *text, size_t length, struct err *e);

void json_free(struct json *root); /* NULL is allowed; strings are wiped, they may be secrets */

/* The member of an object with this name, or NULL; NULL also for a value that is no object. */
const struct json *json_get(const struct json *object, const char *key);

/* "a string", "an object", ...: what the value is, for messages. */
const char *json_type_name(enum json_type type);

/*
 * Write a text as a JSON string with its quotes and a NUL behind it, in pure valid form: what is not
 * UTF-8 becomes U+FFFD. Returns the octets without the NUL, or 0 if 'size' (3 at least) does not do:
 * then as many whole characters as fit are there. 6 octets for each of the text, and 3, always do.
 */
size_t json_escape(char *out, size_t size, const char *text);

/* ======== mbox.c: the archive ======== */

/*
 * The format of the mbox file and the invariants are at the top of mbox.c. An open struct mbox is
 * the only descriptor of its file in the process (closing another would drop the fcntl lock), holds
 * the lock from mbox_open() to mbox_close(), and keeps 24 octets in memory for each message.
 */
struct mbox;

enum {
	MBOX_SEEN = 0x0001,
	MBOX_ANSWERED = 0x0002,
	MBOX_FLAGGED = 0x0004,
	MBOX_GONE = 0x0008, /* no longer on the server */
	MBOX_FORWARDED = 0x1000,
	MBOX_FLAGS = MBOX_SEEN | MBOX_ANSWERED | MBOX_FLAGGED | MBOX_FORWARDED, /* what a server has */

	MBOX_MAILS_MAX = 1000000, /* messages and other names of messages in one archive */
	MBOX_NAME_MAX = 1024,     /* octets of a mailbox name, as it is on the wire */
	MBOX_FILE_MAX = 140,      /* octets of a file name made of it, before ".mbox" */
	MBOX_MADE_MAX = 80        /* octets of a made Message-ID with its brackets */
};

/* -- identity: which mail is this? -- */

/*
 * Which mail is it? Octets of the SHA-256 of its Message-ID in its normal form. Mails without one are told by
 * the original's key, the SHA-1 over what the server answers to BODY[HEADER.FIELDS (FROM TO CC DATE SUBJECT)],
 * white space at both ends of the whole removed: the lowest bit of the first octet is 1 then, else 0, and the
 * mailbox may have several with one identity.
 */
struct mbox_id {
	uint8_t octets[16];
};

/*
 * Reads a mail's header as it flies by and tells its identity: the first Message-ID field,
 * unfolded, runs of white space as one space, trimmed; absent, empty and "<>" count as none. Memory is fixed
 * whatever the header's size. The fields are private to mbox.c.
 */
struct mbox_header {
	br_sha1_context trimmed; /* of the key, up to the last octet that is no white space; ... */
	br_sha1_context ahead;   /* ... and with what is behind it, should more follow */
	uint8_t made[512];       /* what belongs to the key, and is not hashed yet */
	size_t made_octets;
	br_sha256_context hash;  /* of the field in hand ... */
	char text[128];          /* ... as far as it is not in here */
	size_t text_octets, id_octets;
	unsigned fields; /* Message-ID fields so far, counted up to 2; of these two: */
	struct mbox_id id[2];
	char id_text[2][129]; /* or "" if that is longer */
	bool has_id[2];
	char name[16]; /* of the field in hand, as it stands there */
	size_t name_octets;
	char date[64]; /* the first Date field, unfolded, cut, closed with NUL */
	size_t date_octets;
	enum { MBOX_AT_LINE, MBOX_AT_NAME, MBOX_AT_ID, MBOX_AT_MADE, MBOX_AT_OTHER, MBOX_AT_BODY } at;
	bool quoted, line_start, space, cr, dating; /* quoted: as it stands in the mbox */
};

void mbox_header_init(struct mbox_header *h);

/*
 * Take the next octets of a header, line ends CRLF or LF, cut anywhere. Returns true once the
 * empty line behind the header was among them; the rest is ignored.
 */
bool mbox_header_feed(struct mbox_header *h, const void *octets, size_t n);

/* No more octets follow, or the body does. Returns true if there was a Message-ID. */
bool mbox_header_end(struct mbox_header *h, struct mbox_id *id);

/* -- what stands in the index's header -- */

/* What the server said of the mailbox when the last complete pass began; 0 is "unknown". */
struct mbox_claim {
	uint32_t uidvalidity, uidnext;
	uint32_t messages;      /* counts only where uidvalidity and uidnext do */
	uint32_t unseen;        /* UINT32_MAX: unknown */
	uint64_t highestmodseq; /* RFC 7162 */
	int64_t when_sec;       /* of that pass */
	uint32_t traits; /* what the mailbox is to its account, in imap_backup.c's words; 0: unknown */
};

struct mbox_info {
	struct mbox_claim claim;
	off_t octets;                  /* of the mbox file, 0 if there is none */
	uint32_t stored, gone, others; /* mails; of these gone; UIDs that are other names of them */
	/* By mbox_tally() only: mails that the index knew when it was opened, and the mbox had no more; mails that are
	 * not gone and had no UID yet; since mbox_open(): mails that are in the file, and that lost their mark "gone";
	 * mails left out as duplicates though their size tells that they are other mails: since then, and of all. */
	uint32_t lost, unbound, came, came_back, different, all_different;
	const char *name; /* by mbox_tally(), too: the mailbox's on the wire, or "" if the index does not tell it */
	bool fits;        /* by mbox_peek() only: an index is there, at rest, of this mailbox, without a note of damage */
};

/* Look at an archive by its index's header and a stat() of the mbox; opens no mbox. name NULL: of any mailbox. */
void mbox_peek(const char *path, const char *name, struct mbox_info *info);

/* -- an open archive -- */

enum {                      /* how to open */
       MBOX_LOOK = 1,       /* write nothing, lock nothing: for a dry run */
       MBOX_DUPLICATES = 2, /* store every copy of a Message-ID that the server lists */
       MBOX_READ = 4,       /* read mails back, read-only and locked against a backup; see there */
};

/*
 * Open (or create) the archive, lock it, and put it in order: recover what a crash left, take over
 * what stands behind the index's end, or rebuild the index from the mbox if there is none or if it
 * does not fit (DESIGN: "After a crash"). The folder must exist.
 *
 *   path   of the mbox file; the index is path + ".index"
 *   name   the mailbox's name on the wire; an index of another name is E_FORMAT
 *
 * Also E_LOCKED, E_SYSTEM. With MBOX_LOOK an archive whose index does not fit is E_STALE.
 */
int mbox_open(struct mbox **out, const char *path, const char *name, unsigned how, struct err *e);

/* What mbox_open() had to mend, in words for the person, or "". */
const char *mbox_mended(const struct mbox *m);

/* Mails and other names in the archive; 0: nothing can be known already. */
uint32_t mbox_count(const struct mbox *m);

/* The claim, and the counts of struct mbox_info as they are now. */
void mbox_tally(const struct mbox *m, struct mbox_info *info);

/* The smallest known UID that is at least 'uid', or 0. */
uint32_t mbox_next_uid(struct mbox *m, uint32_t uid);

/* The highest known UID, or 0; it may lie above the claim's UIDNEXT. */
uint32_t mbox_last_uid(const struct mbox *m);

/* -- UIDs and identities: which mail of the server is which of ours -- */

/*
 * UIDVALIDITY changed: the UIDs are void. Bind all anew, then commit with the new UIDVALIDITY; should a commit come
 * before that, the header says this (NULL: nothing).
 */
void mbox_forget_uids(struct mbox *m, const struct mbox_claim *claim);

/*
 * Forget the UIDs that live() denies: they are proved to have left the server; and with them other names of
 * these mails that were known to be of another size. To be called before new UIDs are bound: only then
 * mbox_bind() can tell a mail that replaced one of these.
 */
void mbox_drop_uids(struct mbox *m, bool (*live)(void *context, uint32_t uid), void *context);

/*
 * The server has a mail 'uid' with this identity: is it stored? If so the UID is noted (as another
 * name if the stored mail has one already and copies are not kept) and a mark "gone" taken off.
 * size: its RFC822.SIZE, or 0, unknown. Unless it is that of a mail whose UID was dropped, or that may be torn,
 * the mail must be fetched, and mbox_end() compares.
 * unfit: all whose size fits are bound; a mail that is stored in another size and has no UID yet is taken for it.
 * Returns 1 if it is stored; 2 if there is such a mail, and not unfit; 0 if it must be fetched; -1 with E_FORMAT
 * or E_SYSTEM.
 */
int mbox_bind(struct mbox *m, uint32_t uid, const struct mbox_id *id, uint64_t size, bool unfit,
	      struct err *e);

/*
 * Every listed UID has been bound or stored: mark what has no UID left as gone. Copies of a mail that
 * have no UID of their own, and are octet by octet alike, get its state.
 * *live_before receives how many were not marked before this, *gone how many are marked by it.
 * moved: the lowest and the highest UID that was another name of a mail and now is the mail's own, so
 * that its flags count; or 0.
 */
int mbox_mark_gone(struct mbox *m, uint32_t *live_before, uint32_t *gone, uint32_t moved[2], struct err *e);

/*
 * Set a mail's flags (MBOX_FLAGS) in place. Reads before it writes; the same state writes nothing.
 * E_FORMAT if no mail stands where the index says: then the index is given up when the archive is
 * closed. Unknown UIDs are ignored.
 */
int mbox_set_flags(struct mbox *m, uint32_t uid, unsigned flags, struct err *e);

/* -- storing -- */

/*
 * Begin to append a mail. At the first one the index is marked "writing" and synced. E_FORMAT if another
 * program has changed the mbox since.
 */
int mbox_begin(struct mbox *m, struct err *e);

/* The mail's next octets as they come from the server, cut anywhere. */
int mbox_write(struct mbox *m, const void *octets, size_t n, struct err *e);

/* Return the text of the Date field of the mail in hand, as far as it has come, or "". */
const char *mbox_date(const struct mbox *m);

/*
 * The mail is whole: give it its UID, INTERNALDATE and flags, and note it in the index.
 * Returns 1 if it is stored, 0 if its Message-ID turned out to be known (nothing is kept then but
 * the UID), -1 with E_SYSTEM or E_FORMAT (nothing is kept). May commit. A mail that replaces another
 * under its Message-ID is stored unless it is octet by octet the same; the other is gone for good.
 * With MBOX_LOOK nothing is stored: returns 1 if the mail differs from the one that has this UID, else 0, or -1.
 */
int mbox_end(struct mbox *m, uint32_t uid, int64_t when_sec, unsigned flags, struct err *e);

/* The mail is not wanted or not whole: the archive is as before mbox_begin(). */
void mbox_abort(struct mbox *m);

/*
 * Close and unlock. m may be NULL. With 'claim': commit with it. Without one: commit what there is,
 * the old claim stays. In both cases the index is at rest afterwards. The first error wins; the
 * struct is gone even after one. *info (NULL: not wanted) is as of mbox_tally() at the end, without a name.
 */
int mbox_close(struct mbox *m, const struct mbox_claim *claim, struct mbox_info *info, struct err *e);

/* Fold one part of a mailbox name (UTF-8, or raw octets) into what any file system takes:
 * unsafe octets, and those of 'also', become %XX. Returns the length, or 0 if 'size' is too small. */
size_t mbox_escape(char *out, size_t size, const char *part, size_t n, const char *also);

/*
 * -- reading mails back: for export, verify and restore --
 *
 * An archive opened with MBOX_READ has no name to be checked; mbox_open() mends nothing, and says by
 * mbox_mended() if the index is missing or damaged. Of the functions above only mbox_tally() and
 * mbox_close() are for it.
 */

/* One mail that stands in an mbox. */
struct mbox_mail {
	off_t offset, octets; /* in the mbox */
	uint32_t head;        /* octets of our lines before the mail itself; ... */
	uint32_t digits;      /* ... in these, where the state's digits are; or 0 */
	unsigned state;       /* MBOX_SEEN ... */
	int64_t when_sec;     /* its INTERNALDATE, or INT64_MIN */
	uint64_t sum;         /* a checksum of what stands behind our lines, and of its length */
	struct mbox_id id;
	bool made;      /* it has no Message-ID of its own */
	char name[129]; /* its Message-ID, also a made one; "" if that is longer */
	char date[64];  /* the text of its Date field */
};

/*
 * Return where the mail with this UID stands in the mbox, or -1, also for one without a Message-ID, which may be
 * another of its kind. For an archive of mbox_open(), too.
 */
off_t mbox_place(struct mbox *m, uint32_t uid);

/* Find the mail at *at, and move *at behind it. Returns 1, 0 at the end, or -1. */
int mbox_walk(struct mbox *m, off_t *at, struct mbox_mail *mail, struct err *e);

/* How a mail is given: as it was, with these line ends; as in the mbox, but without the mark "gone". */
enum mbox_form { MBOX_LF, MBOX_CRLF, MBOX_AS_STORED };

/*
 * Give a mail to take(), piece by piece. As it was: unquoted, without our lines, ending with a line end.
 * Returns 0, or -1, with *e unless take() returned another value than 0.
 */
int mbox_read(struct mbox *m, const struct mbox_mail *mail, enum mbox_form form,
	      int (*take)(void *context, const void *octets, size_t n), void *context, struct err *e);

struct mbox_verify {
	/* Told of what is wrong; with 'damage' mail is lost or not as it was stored. */
	void (*tell)(bool damage, off_t at, const char *id, const char *what);
	bool (*stop)(void); /* asked behind each mail */
	unsigned long mails, gone, damaged;
	off_t octets;
};

/*
 * Compare all mails with the index; of those that are damaged a note is left, or it is told that there is none.
 * v has the two functions, and receives the sums. Returns 0, whatever is found, or -1 if the archive cannot be
 * read, or stop() is true.
 */
int mbox_verify(struct mbox *m, struct mbox_verify *v, struct err *e);

/* Note, in path + ".index.damaged", that the mail that stands at 'at' is damaged. */
int mbox_note(struct mbox *m, off_t at, struct err *e);

/*
 * Take in what was noted, in an archive that mbox_open() has opened to write: these mails are gone for good,
 * and mbox_bind() asks for them to be fetched. Returns how many they are, or -1.
 */
int mbox_heal(struct mbox *m, struct err *e);

#endif
