/*
 * fuzz_imap - a libFuzzer target for what a server says, read through the stream
 *
 * The first octet chooses what is done, the second in how large pieces the rest arrives: responses
 * alone, with every callback; greeting, login and list; or a whole mailbox into an archive, which
 * may hold mails already. Whatever was said: nothing hangs, the memory stays small, what is handed
 * on keeps the contract of struct imap, and an archive is whole afterwards and has lost nothing.
 */
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static ssize_t served(int fd, void *to, size_t n, int flags);
static ssize_t swallowed(int fd, const void *from, size_t n, int flags);
static ssize_t unheard(int fd, const void *from, size_t n);

#define recv served
#define send swallowed
#define write unheard
#define main program_main
#include "../imap_backup.c"
#undef main
#undef recv
#undef send
#undef write
#define FUZZ
#include "unit.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int fsync(int fd);

static const uint8_t *said, *said_end;
static size_t piece;

/* The server's octets, and then it hangs up. */
static ssize_t served(int fd, void *to, size_t n, int flags)
{
	(void)fd;
	(void)flags;
	n = n < piece ? n : piece;
	n = n < (size_t)(said_end - said) ? n : (size_t)(said_end - said);
	memcpy(to, said, n);
	said += n;
	return (ssize_t)n;
}

static ssize_t swallowed(int fd, const void *from, size_t n, int flags)
{
	(void)fd;
	(void)from;
	(void)flags;
	return (ssize_t)n;
}

static ssize_t unheard(int fd, const void *from, size_t n)
{
	return fd == STDERR_FILENO ? (ssize_t)n : write(fd, from, n);
}

int fsync(int fd)
{
	(void)fd;
	return 0;
}

/* ---- responses alone ---- */

static struct {
	bool wanted;             /* on_literal() said so, and the response has not ended */
	uint64_t announced, got;
	struct set uids;
} seen;

static int saw_list(void *context, const char *name, size_t n, char delimiter, bool selectable,
		    unsigned attributes)
{
	(void)context;
	(void)delimiter;
	(void)selectable;
	must(attributes < 64);
	must(strlen(name) <= n && strlen(name) <= MBOX_NAME_MAX + 1);
	return 0;
}

static int saw_status(void *context, const char *name, const struct imap_status *status)
{
	(void)context;
	must(strlen(name) <= MBOX_NAME_MAX + 1 && status->known);
	return 0;
}

static int saw_uids(void *context, uint32_t low, uint32_t high)
{
	(void)context;
	must(low > 0 && high > 0);
	return set_add(&seen.uids, low < high ? low : high, low < high ? high : low) ? 0 : -1;
}

static int saw_literal(void *context, const struct imap_fetch *fetch)
{
	(void)context;
	must(fetch->section != SECTION_NONE && !seen.wanted);
	seen.wanted = fetch->octets % 3 != 1;
	seen.announced = fetch->octets;
	seen.got = 0;
	return seen.wanted;
}

static int saw_octets(void *context, const struct imap_fetch *fetch, const void *octets, size_t n)
{
	(void)context;
	must(seen.wanted && n > 0 && octets != NULL && fetch->octets == seen.announced);
	seen.got += n;
	must(seen.got <= seen.announced);
	return 0;
}

static int saw_fetch(void *context, const struct imap_fetch *fetch)
{
	(void)context;
	must(!seen.wanted || seen.got == seen.announced);
	must((fetch->flags & ~(unsigned)MBOX_FLAGS) == 0);
	seen.wanted = false;
	return 0;
}

static void responses(struct imap *im)
{
	int got;

	im->tag = 3 + said[0];
	im->on_list = saw_list;
	im->on_status = saw_status;
	im->on_uids = saw_uids;
	im->on_literal = saw_literal;
	im->on_octets = saw_octets;
	im->on_fetch = saw_fetch;
	seen.wanted = false;
	while ((got = imap_response(im)) >= 0)
		must(im->s.err.code == E_NONE);
	must(im->s.err.code == E_NET || im->s.err.code == E_PROTO || im->s.err.code == E_WAIT);
	must(im->s.err.text[0] != '\0' && im->s.err.wait_sec <= WAIT_SEC);
	for (unsigned i = 0; i < IMAP_FLIGHT_MAX; i++)
		must(strlen(im->ring[i].result.text) < sizeof im->ring[i].result.text);
	set_sort(&seen.uids);
	for (size_t i = 1; i < seen.uids.n; i++)
		must(seen.uids.ranges[i].low - 1 > seen.uids.ranges[i - 1].high);
	set_free(&seen.uids);
}

/* ---- greeting, login, list ---- */

static void session(struct imap *im, const struct account *account)
{
	struct trust trust = { .named = NULL };
	struct config config = { .accounts = NULL };
	static struct mailboxes list;
	struct counts counts = { 0 };
	struct err e = { 0 };

	list.config = &config;
	list.account = account;
	list.folder = "/nonexistent";
	list.broken[0] = list.broken[1] = 0;
	list.odd = e;
	if (imap_greet(im, &trust) == 0 && imap_login(im, "u\"ser", "p\\assw\xF6rd", false) == 0) {
		must((mailboxes_list(&list, im, true, &e) == 0) == (e.code == E_NONE));
		mailboxes_plan(&list, true, &counts);
		must(list.todo + counts.unchanged + counts.failures <= list.n);
	}
}

/* ---- mailboxes into archives ---- */

static char folder[200], path[220];
static struct mailbox both[2];
static unsigned begun;
static enum err_code failed;

static void no_progress(void *context, uint64_t mails, uint64_t octets)
{
	(void)context;
	(void)mails;
	(void)octets;
}

/* The next mailbox is of the same kind, and new. */
static struct sync *begin(void *context, bool ahead)
{
	struct sync *y;

	must(ahead == (((struct session *)context)->first != NULL));
	if (begun == 2)
		return NULL;
	y = allocate(sizeof *y);
	y->session = context;
	y->box = &both[begun];
	y->attempt.careful_uid = begun == 0 && both[0].has_news;
	begun++;
	return y;
}

static void over(void *context, struct sync *y)
{
	must(context != NULL && y->m == NULL);
	failed = y->err.code == E_SYSTEM || y->err.code == E_FULL || y->err.code == E_LOCKED ? y->err.code
											     : failed;
}

static void file_write(const char *name, const void *octets, size_t n)
{
	FILE *f = fopen(name, "w");

	must(f != NULL && fwrite(octets, 1, n, f) == n && fclose(f) == 0);
}

static char *file_read(const char *name, size_t *n)
{
	FILE *f = fopen(name, "r");
	struct stat st;
	char *text;

	must(f != NULL && fstat(fileno(f), &st) == 0);
	*n = (size_t)st.st_size;
	text = allocate(*n + 1);
	must(fread(text, 1, *n, f) == *n);
	fclose(f);
	return text;
}

/* Three mails with UIDs 3 to 5 and one without, in UIDVALIDITY 7. */
static void archive_make(char **mbox, size_t *n, char **index, size_t *m)
{
	static const char *const mails[] = {
		"Message-ID: <a@x>\r\n\r\nFrom here\r\n", "Subject: b\r\n\r\n\r\n", "Message-ID: <c@x>\r\n\r\nc",
		"Message-ID: <d@x>\r\n\r\nd\r\n"
	};
	struct mbox_claim claim = { .uidvalidity = 7, .uidnext = 7, .messages = 4, .highestmodseq = 9 };
	char name[220];
	struct err e = { 0 };
	struct mbox *box;

	must(mbox_open(&box, path, "INBOX", 0, &e) == 0);
	for (uint32_t i = 0; i < 4; i++)
		must(mbox_begin(box, &e) == 0 && mbox_write(box, mails[i], strlen(mails[i]), &e) == 0 &&
		     mbox_end(box, 3 + i, i, i, &e) == 1);
	must(mbox_close(box, &claim, NULL, &e) == 0);
	snprintf(name, sizeof name, "%s.index", path);
	*mbox = file_read(path, n);
	*index = file_read(name, m);
}

static void mailbox(struct imap *im, const struct account *account, unsigned how)
{
	static char *mbox, *index;
	static size_t mbox_octets, index_octets;
	struct config config = { .header_batch = 1 + (how >> 6) * 40, .email_batch = 2,
				 .keep_duplicates = how & 4 };
	struct mailboxes list = { .config = &config, .account = account, .folder = folder };
	struct session run = { .config = &config, .list = &list, .im = im, .begin = begin,
			       .progress = no_progress, .over = over, .context = &run };
	struct mbox_info info;
	struct err e = { 0 };
	struct mbox *m;
	char name[240], *text;
	size_t n, mails = 0;
	int result;

	snprintf(name, sizeof name, "%s/next.mbox", folder);
	unlink(name);
	snprintf(name, sizeof name, "%s/next.mbox.index", folder);
	unlink(name);
	snprintf(name, sizeof name, "%s.index", path);
	unlink(path);
	unlink(name);
	if (mbox == NULL) {
		archive_make(&mbox, &mbox_octets, &index, &index_octets);
		unlink(path);
		unlink(name);
	}
	if (how & 16) {
		file_write(path, mbox, mbox_octets);
		file_write(name, index, index_octets);
	}
	for (unsigned i = 0; i < 2; i++)
		both[i] = (struct mailbox){ .name = (char *)(uintptr_t)(i == 0 ? "INBOX" : "next"), .delimiter = '/',
					    .selectable = true, .has_news = how & 8 };
	if (how & 32)
		both[0].status = both[1].status = (struct imap_status){ .known = true, .messages = 5, .uidnext = 9,
						   .uidvalidity = 7, .unseen = 1, .highestmodseq = 11 };
	begun = 0;
	failed = E_NONE;
	result = session_run(&run, &e);
	must(result == 0 ? e.code == E_NONE && run.first == NULL && begun == 2 : im->s.err.code != E_NONE || e.code != E_NONE);
	while (run.first != NULL) {
		struct sync *y = run.first;

		must(y->m == NULL && y->stage == SYNC_CLOSED);
		run.first = y->next;
		free(y);
	}
	must(failed == E_NONE);
	if (access(path, F_OK) != 0) { /* a mailbox that could not be opened leaves none */
		must((how & 16) == 0);
		return;
	}
	e = (struct err){ 0 };
	must(mbox_open(&m, path, "INBOX", 0, &e) == 0);
	must(*mbox_mended(m) == '\0');
	mbox_tally(m, &info);
	must(mbox_close(m, NULL, NULL, &e) == 0);
	text = file_read(path, &n);
	for (const char *p = text, *lf; p < text + n; p = lf + 1) {
		lf = memchr(p, '\n', (size_t)(text + n - p));
		must(lf != NULL);
		if (lf - p < 5 || memcmp(p, "From ", 5) != 0)
			continue;
		must(p == text || (p[-1] == '\n' && p[-2] == '\n'));
		must(text + n - p > 66 && memcmp(p + 44, "X-Mozilla-Status: ", 18) == 0);
		mails++;
	}
	must(mails == info.stored && info.stored >= (how & 16 ? 4 : 0));
	must(n == 0 || memcmp(text + n - 2, "\n\n", 2) == 0);
	for (size_t i = 0; how & 16 && i < mbox_octets; i++)
		must(text[i] == mbox[i] || strchr("0123456789abcdef", mbox[i]) != NULL);
	free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct account account = { .email = "u@x", .host = "example.org", .port = 143, .ssl = SSL_OFF };
	struct imap im = { .flight = IMAP_FLIGHT_MAX - 8, .capabilities = 0 };

	if (*path == '\0') {
		snprintf(folder, sizeof folder, "%s", getenv("TMPDIR"));
		must(snprintf(path, sizeof path, "%s/INBOX.mbox", folder) < (int)sizeof path);
		log_to.level = LOG_TRACE;
	}
	if (size < 4)
		return 0;
	im.s = (struct stream){ .fd = -1, .account = &account, .timeout_sec = 1 };
	piece = data[1] == 0 ? SIZE_MAX : data[1];
	im.capabilities = data[2] * 4u;
	im.trace = data[0] & 128;
	said = data + 3;
	said_end = data + size;
	switch (data[0] & 3) {
	case 0:
		session(&im, &account);
		break;
	case 1:
		responses(&im);
		break;
	default:
		mailbox(&im, &account, data[0]);
	}
	stream_close(&im.s);
	return 0;
}
