/*
 * t_mbox - unit tests of mbox.c
 *
 * Prints what failed and one summary line; exits 0 if nothing did. Works in the current folder.
 */
#include <errno.h>
#include <unistd.h>
#include <bearssl.h>

/* What grows with the square does so in reads and hashes: these are counted. */
static unsigned long work;

static off_t unreadable = -1; /* records that stand there cannot be read; -1: all can */

static ssize_t counted_pread(int fd, void *to, size_t n, off_t at)
{
	work++;
	if (at == unreadable && n == 4096) {
		errno = EIO;
		return -1;
	}
	return pread(fd, to, n, at);
}

static int writes_left = -1; /* then they fail; -1: they do not */

static ssize_t limited_pwrite(int fd, const void *from, size_t n, off_t at)
{
	if (writes_left == 0) {
		errno = EIO;
		return -1;
	}
	writes_left -= writes_left > 0;
	return pwrite(fd, from, n, at);
}

#define pread counted_pread
#define pwrite limited_pwrite
#define br_sha256_init(hash) (work++, br_sha256_init(hash))
#include "../mbox.c"
#include "unit.h"

#define N(table) (sizeof (table) / sizeof *(table))

static const char path[] = "box.mbox", index_file[] = "box.mbox.index";

/* ---- helpers ---- */

static struct mbox *opened(unsigned how)
{
	struct err e = { 0 };
	struct mbox *m;

	if (!check(mbox_open(&m, path, "box", how, &e) == 0, "open: %s", e.text))
		exit(1);
	return m;
}

static struct mbox *fresh(unsigned how)
{
	unlink(path);
	unlink(index_file);
	return opened(how);
}

static void closed(struct mbox *m)
{
	struct err e = { 0 };

	check(mbox_close(m, NULL, NULL, &e) == 0, "close: %s", e.text);
}

/* Close, and see that it opens again as it was. */
static struct mbox *reopened(struct mbox *m, unsigned how)
{
	struct mbox_info before, after;

	mbox_tally(m, &before);
	closed(m);
	m = opened(how);
	mbox_tally(m, &after);
	check(*mbox_mended(m) == '\0', "mended: %s", mbox_mended(m));
	check(before.octets == after.octets && before.stored == after.stored && before.gone == after.gone &&
	      (before.others == after.others || how & MBOX_DUPLICATES), "reopened: %u %u %u, then %u %u %u",
	      before.stored, before.gone, before.others, after.stored, after.gone, after.others);
	for (uint32_t i = 0; i < m->now.records && m->flushed < 1 << 28; i++) {
		struct err e = { 0 };
		struct record r;

		struct mbox_mail mail;
		const char *wrong = NULL;

		check(record_get(m, i, &r, &e) == 0 &&
		      (r.kind & ENTRY_OTHER || (verify(m, &r, &mail, &wrong, &e) == 0 && wrong == NULL)),
		      "reopened: record %u %s", i, e.text);
	}
	return m;
}

/* Store a mail in pieces. Returns what mbox_end() does. */
static int store(struct mbox *m, uint32_t uid, const char *text, size_t n, size_t piece)
{
	struct err e = { 0 };
	int result;

	check(mbox_begin(m, &e) == 0, "begin: %s", e.text);
	for (size_t i = 0; i < n; i += piece)
		check(mbox_write(m, text + i, n - i < piece ? n - i : piece, &e) == 0, "write: %s", e.text);
	result = mbox_end(m, uid, 0, 0, &e);
	check(result >= 0, "end: %s", e.text);
	return result;
}

static int keep(struct mbox *m, uint32_t uid, const char *text)
{
	return store(m, uid, text, strlen(text), strlen(text) + 1);
}

static char *contents(size_t *n)
{
	FILE *f = fopen(path, "r");
	struct stat st;
	char *text;

	if (f == NULL || fstat(fileno(f), &st) != 0 || (text = malloc((size_t)st.st_size + 1)) == NULL)
		exit(1);
	*n = fread(text, 1, (size_t)st.st_size, f);
	text[*n] = '\0';
	fclose(f);
	return text;
}

static void write_file(const char *name, const void *octets, size_t n)
{
	FILE *f = fopen(name, "w");

	if (f == NULL || fwrite(octets, 1, n, f) != n || fclose(f) != 0)
		exit(1);
}

/* Is this, with %s for our two lines in front of each mail, the whole mbox? */
#define OURS(digits) "From MAILER-DAEMON Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: " digits "\n"

static void holds(const char *wanted, const char *what)
{
	size_t n;
	char *text = contents(&n);

	check(n == strlen(wanted) && memcmp(text, wanted, n) == 0, "%s: the file is\n%s", what, text);
	free(text);
}

static void id_of(struct mbox_id *id, const char *text)
{
	br_sha256_context hash;

	if (is_made(text, strlen(text))) {
		made_id(id, text);
		return;
	}
	br_sha256_init(&hash);
	br_sha256_update(&hash, text, strlen(text));
	id_end(id, &hash, false);
}

/* The identity by a server's answer. */
static struct mbox_id id_of_answer(const char *answer)
{
	struct mbox_header h;
	struct mbox_id id;

	mbox_header_init(&h);
	mbox_header_feed(&h, answer, strlen(answer));
	check(!mbox_header_end(&h, &id) && id_is_made(&id), "an answer without an ID");
	return id;
}

/* Bind a UID to a mail of the size that the last one of this identity has. */
static int bound_id(struct mbox *m, uint32_t uid, const struct mbox_id *id)
{
	struct err e = { 0 };
	struct record last = { 0 };
	uint32_t *place;
	int result;

	check(ring_find(m, id, &place, &last, &e) == 0, "the ring: %s", e.text);
	result = mbox_bind(m, uid, id, *place == 0 ? 0 : last.wire, false, &e);
	check(result >= 0, "bind: %s", e.text);
	return result;
}

static int bound_size(struct mbox *m, uint32_t uid, const char *id, uint64_t size)
{
	struct err e = { 0 };
	struct mbox_id of;
	int result;

	id_of(&of, id);
	result = mbox_bind(m, uid, &of, size, true, &e); /* nothing else fits better */
	check(result >= 0, "bind: %s", e.text);
	return result;
}

static int bound(struct mbox *m, uint32_t uid, const char *id)
{
	struct mbox_id of;

	id_of(&of, id);
	return bound_id(m, uid, &of);
}

static void marked(struct mbox *m, uint32_t wanted)
{
	struct err e = { 0 };
	uint32_t live, gone, moved[2];

	check(mbox_mark_gone(m, &live, &gone, moved, &e) == 0, "marks: %s", e.text);
	check(gone == wanted, "%u marked, not %u", gone, wanted);
}

static bool lives(void *context, uint32_t uid)
{
	return strchr(context, (int)('0' + uid)) != NULL;
}

/* The server lists these UIDs only, each a digit. */
static void listed(struct mbox *m, const char *uids)
{
	mbox_drop_uids(m, lives, (char *)(uintptr_t)uids);
}

/* ---- parts ---- */

static void test_head(void)
{
	static const struct { int64_t sec; const char *date; } rows[] = {
		{ 0, "Thu Jan  1 00:00:00 1970" }, { -1, "Wed Dec 31 23:59:59 1969" },
		{ 951782400, "Tue Feb 29 00:00:00 2000" }, { -2203891201, "Wed Feb 28 23:59:59 1900" },
		{ -30610224000, "Wed Jan  1 00:00:00 1000" }, { -30610224001, "Thu Jan  1 00:00:00 1970" },
		{ 253402300799, "Fri Dec 31 23:59:59 9999" },
		{ 253402300800, "Thu Jan  1 00:00:00 1970" },
		{ INT64_MAX, "Thu Jan  1 00:00:00 1970" }, { INT64_MIN, "Thu Jan  1 00:00:00 1970" },
		{ 2147483648, "Tue Jan 19 03:14:08 2038" }, { 4294967296, "Sun Feb  7 06:28:16 2106" },
	};
	char line[BODY_AT + 1] = "", other[80]; /* closed with a NUL of ours */

	for (size_t i = 0; i < N(rows); i++) {
		head_text(line, rows[i].sec, 0x100F);
		check(strcmp(line + FROM_OCTETS, "X-Mozilla-Status: 100f\n") == 0 && strncmp(line, "From MAILER-DAEMON ", 19) == 0 &&
		      strncmp(line + 19, rows[i].date, 24) == 0 && line[43] == '\n', "%lld: %s",
		      (long long)rows[i].sec, line);
	}
	for (int64_t sec = -30610224000; sec < INT64_C(253402300799); sec += 86400 * 97 + 12345) {
		time_t t = (time_t)sec;
		struct tm tm;

		if (t != sec || gmtime_r(&t, &tm) == NULL || tm.tm_year < -900)
			continue; /* strftime() writes no year with less than four digits alike everywhere */
		strftime(other, sizeof other, "From MAILER-DAEMON %a %b %e %H:%M:%S %Y\n", &tm);
		head_text(line, sec, 0);
		if (!check(strncmp(line, other, FROM_OCTETS) == 0, "%lld: %s not %s", (long long)sec, line, other))
			break;
	}
}

static void test_sum(void)
{
	uint8_t octets[48];
	uint64_t whole[sizeof octets + 1];

	for (size_t i = 0; i < sizeof octets; i++)
		octets[i] = (uint8_t)(i * 37 + 11);
	for (size_t n = 0; n <= sizeof octets; n++) {
		whole[n] = sum_of(octets, n);
		for (size_t i = 0; i < n; i++)
			check(whole[i] != whole[n], "%zu and %zu octets have one checksum", i, n);
		for (size_t i = 0; i <= n; i++)
			for (size_t k = i; k <= n; k++) {
				struct sum s = { 0 };

				sum_feed(&s, octets, i);
				sum_feed(&s, octets + i, k - i);
				sum_feed(&s, octets + k, n - k);
				check(sum_end(&s) == whole[n], "%zu octets cut at %zu and %zu", n, i, k);
			}
		for (size_t bit = 0; bit < 8 * n; bit++) {
			octets[bit / 8] ^= (uint8_t)(1u << bit % 8);
			check(sum_of(octets, n) != whole[n], "bit %zu of %zu octets does not count", bit, n);
			octets[bit / 8] ^= (uint8_t)(1u << bit % 8);
		}
	}
	check(sum_of(octets, 48) == UINT64_C(0x8a2305149977feac), "the checksum is another: %llx",
	      (unsigned long long)sum_of(octets, 48));
	for (size_t i = 0; i < 8; i++) {
		octets[i] ^= 1;
		octets[i + 8] = octets[i];
		octets[i] ^= 1;
	}
	whole[0] = sum_of(octets, 16);
	for (size_t i = 0; i < 8; i++) {
		octets[i] ^= 1;
		octets[i + 8] ^= 1;
	}
	check(sum_of(octets, 16) != whole[0], "two words that change places do not count");
	memset(octets, 0, sizeof octets);
	check(sum_of(octets, 8) != sum_of(octets, 16) && sum_of(octets, 0) != sum_of(octets, 1), "zeros");
}

static void test_utf8(void)
{
	static const struct { const char *text; size_t n, octets; } rows[] = {
		{ "\x00", 1, 1 }, { "\x80", 1, 0 }, { "\xC0\x80", 2, 0 }, { "\xC1\xBF", 2, 0 }, { "\xC2", 1, 0 },
		{ "\xE0\x9F\xBF", 3, 0 }, { "\xED\xA0\x80", 3, 0 }, { "\xED\x9F\xBF", 3, 3 }, { "\xEF\xBF", 2, 0 },
		{ "\xF0\x8F\xBF\xBF", 4, 0 }, { "\xF4\x90\x80\x80", 4, 0 }, { "\xF5\x80\x80\x80", 4, 0 },
		{ "\xF4\x8F\xBF\xBF", 4, 4 }, { "\xF0\x90\x80", 3, 0 }, { "\xE1\x80\xC0", 3, 0 }, { "\xFF", 1, 0 },
	};

	for (size_t i = 0; i < N(rows); i++)
		check(utf8_char((const uint8_t *)rows[i].text, rows[i].n, NULL) == rows[i].octets, "UTF-8 %zu", i);
	for (uint32_t c = 0; c < 0x110000; c++) {
		uint8_t p[4];
		size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;

		for (size_t k = n; k-- > 1;)
			p[k] = (uint8_t)(0x80 | (c >> 6 * (n - 1 - k) & 0x3F));
		p[0] = (uint8_t)(n == 1 ? c : (0xF00u >> n & 0xFF) | c >> 6 * (n - 1));
		check(utf8_char(p, n, NULL) == (c >= 0xD800 && c <= 0xDFFF ? 0 : n), "U+%04X", c);
	}
}

static void test_escape(void)
{
	static const struct { const char *part, *also, *escaped; } rows[] = {
		{ "a", ".", "a" }, { "a.b", ".", "a%2Eb" }, { "a.b", "", "a.b" }, { ".a.", "", "%2Ea%2E" },
		{ " a ", "", "%20a%20" }, { "a b", "", "a b" }, { ".", "", "%2E" }, { "..", "", "%2E%2E" },
		{ "...", "", "%2E.%2E" }, { "/\\:*?\"<>|%", "", "%2F%5C%3A%2A%3F%22%3C%3E%7C%25" },
		{ "\x01\x1F\x7F", "", "%01%1F%7F" }, { "\xC2\x80\xC2\x9F\xC2\xA0", "", "%C2%80%C2%9F\xC2\xA0" },
		{ "\xC3\xA9\xC3", "", "\xC3\xA9%C3" }, { "\xED\xA0\x80", "", "%ED%A0%80" }, { "a&&", "&.", "a%26%26" }, { "", "", "" },
	};
	char out[60];

	for (size_t i = 0; i < N(rows); i++) {
		size_t n = mbox_escape(out, sizeof out, rows[i].part, strlen(rows[i].part), rows[i].also);

		check(n == strlen(rows[i].escaped) && strcmp(out, rows[i].escaped) == 0, "escape %zu: %s", i, out);
		for (size_t size = 1; size < 12; size++)
			check(mbox_escape(out, size, rows[i].part, strlen(rows[i].part), rows[i].also) < size,
			      "escape %zu in %zu octets", i, size);
	}
	check(mbox_escape(out, sizeof out, "a\0b", 3, "") == 5 && strcmp(out, "a%00b") == 0, "NUL: %s", out);
}

/* ---- identity ---- */

static void test_identity(void)
{
	static char longest[5000];
	struct { const char *header, *id; unsigned fields; } rows[] = {
		{ "Message-ID: <a@x>\r\n\r\n", "<a@x>", 1 }, { "message-id:<a@x>\n\n", "<a@x>", 1 },
		{ "MESSAGE-ID \t: <a@x>\r\n\r\n", "<a@x>", 1 }, { "Message-ID:\r\n <a@x>\r\n\r\n", "<a@x>", 1 },
		{ "Message-ID: <a\r\n\t@x>\r\n\r\n", "<a @x>", 1 }, { "Message-ID:  <a \t\r\n  b@x> \r\n\r\n", "<a b@x>", 1 },
		{ "Subject: x\r\nMessage-ID: <a@x>\r\nTo: y\r\n\r\n", "<a@x>", 1 },
		{ "Message-ID: <a@x>\r\nMessage-ID: <b@x>\r\n\r\n", "<a@x>", 2 },
		{ "Message-ID: <a@x>\r\nMessage-ID: <b@x>\r\nMessage-ID: <c@x>\r\n\r\n", "<a@x>", 2 },
		{ "Message-ID: a\rb\r\n\r\n", "a b", 1 }, { "Message-ID: <a@x>", "<a@x>", 1 },
		{ "Message-ID: <a@x>\r\n", "<a@x>", 1 }, { "Message-ID: <>x\r\n\r\n", "<>x", 1 },
		{ "Message-ID:\r\n\r\n", NULL, 1 }, { "Message-ID: \t\r\n \r\n\r\n", NULL, 1 },
		{ "Message-ID: <>\r\n\r\n", NULL, 1 }, { "Message-ID: < >\r\n\r\n", "< >", 1 },
		{ "Message-ID: \r\nMessage-ID: <b@x>\r\n\r\n", NULL, 2 }, { "", NULL, 0 }, { "\r\n", NULL, 0 }, { "\n", NULL, 0 },
		{ "Subject: x\r\n\r\nMessage-ID: <a@x>\r\n\r\n", NULL, 0 }, { "X-Message-ID: <a@x>\r\n\r\n", NULL, 0 },
		{ "Message-IDs: <a@x>\r\n\r\n", NULL, 0 }, { "Message-ID\r\n <a@x>\r\n\r\n", NULL, 0 },
		{ " Message-ID: <a@x>\r\n\r\n", NULL, 0 }, { "Subject: x\r\n Message-ID: <a@x>\r\n\r\n", NULL, 0 },
		{ "In-Reply-To: <b@x>\r\nReferences: <b@x>\r\n <c@x>\r\nMessage-ID: <a@x>\r\n\r\n", "<a@x>", 1 },
		{ "Message-ID:                <a@x>\r\n\r\n", "<a@x>", 1 }, { longest, longest + 12, 1 },
	};

	memcpy(longest, "Message-ID: ", 12);
	memset(longest + 12, 'x', sizeof longest - 13);
	for (size_t i = 0; i < N(rows); i++) {
		size_t n = strlen(rows[i].header);
		struct mbox_id id, wanted;

		for (size_t cut = 0; cut <= n && cut < 300; cut++) {
			struct mbox_header h;
			bool over;

			mbox_header_init(&h);
			over = mbox_header_feed(&h, rows[i].header, cut);
			over = mbox_header_feed(&h, rows[i].header + cut, n - cut);
			check(over == (n > 0 && (strstr(rows[i].header, "\n\n") != NULL || rows[i].header[0] == '\n' ||
				       rows[i].header[0] == '\r' || strstr(rows[i].header, "\n\r\n") != NULL)),
			      "header %zu cut at %zu: over %d", i, cut, over);
			check(mbox_header_end(&h, &id) == (rows[i].id != NULL), "header %zu cut at %zu", i, cut);
			check(h.fields == rows[i].fields, "header %zu has %u fields", i, h.fields);
			if (rows[i].id == NULL)
				continue;
			id_of(&wanted, rows[i].id);
			check(memcmp(&id, &wanted, sizeof id) == 0, "header %zu cut at %zu: another id", i, cut);
		}
	}
}

/* The server's answer, the SHA-1 in hex of it trimmed, and a mail's header that has these fields. */
static void test_made(void)
{
	static const struct { const char *answer, *key, *header; } rows[] = {
		{ "\r\n",
		  "da39a3ee5e6b4b0d3255bfef95601890afd80709",
		  "X: y\n\n" },
		{ "Subject: b\r\n\r\n",
		  "bb7763d6c443cb0086032af396a5cc85fad0ac4a",
		  "Subject: b\n\nbody\n" },
		{ "From: a@x\r\nTo: b@x\r\n\tc@x\r\nSubject:  =?x?=  \r\n\r\n",
		  "9f2662c6936a530639d159b41dfb24a70b1f4a09",
		  "X: y\r\nFrom: a@x\nTo: b@x\n\tc@x\nReceived: a\n b\nSubject:  =?x?=  \n\nSubject: c\n" },
		{ "From: a@x\r\nTo: b@x\r\n\tc@x\r\nSubject:  =?x?=  \r\n\r\n",
		  "9f2662c6936a530639d159b41dfb24a70b1f4a09",
		  "X: y\r\nFrom: a@x\r\nTo: b@x\r\n\tc@x\r\nSubject:  =?x?=  \r\n\r\nSubject: c\n" },
		{ "DATE: x\r\nCc: y\r\n\r\n",
		  "28b706a964fd61b56a67e01958ca63275b4cb6db",
		  "DATE: x\nFromage: no\nCc: y" },
		{ "From : a@x\r\n\r\n",
		  "4124659b614f2e04f84643b852beebb4cff4d184",
		  "From : a@x\r\n\r\n" },
		{ "From : a@x\r\n\r\n",
		  "4124659b614f2e04f84643b852beebb4cff4d184",
		  ">From : a@x\n\n" },
	};

	for (size_t i = 0; i < N(rows); i++) {
		for (int header = 0; header < 2; header++) {
			const char *text = header ? rows[i].header : rows[i].answer;

			for (size_t cut = 0; cut <= strlen(text); cut++) {
				struct mbox_header h;
				struct mbox_id id;
				char made[MBOX_MADE_MAX];

				mbox_header_init(&h);
				h.quoted = text[0] == '>';
				mbox_header_feed(&h, text, cut);
				mbox_header_feed(&h, text + cut, strlen(text) - cut);
				check(!mbox_header_end(&h, &id), "made %zu has an ID", i);
				header_made(&h, &id, made, 1);
				check(memcmp(made + 1, rows[i].key, 40) == 0, "made %zu, %d, cut at %zu: %s", i, header,
				      cut, made);
			}
		}
	}
}

static void test_date_field(void)
{
	static const struct { const char *text, *date; } rows[] = {
		{ "Subject: x\r\nDATE : Wed,\r\n 17 Jul 1996\r\nDate: 2\r\n\r\nDate: 3\r\n", " Wed,\r 17 Jul 1996\r" },
		{ "Dates: 1\nResent-Date: 1\nDate:\n\tx\n\n", "\tx" }, { "Date", "" }, { "Date: a", " a" }, { "\r\nDate: b\r\n", "" },
		{ "Date:123456789012345678901234567890123456789012345678901234567890123456789\r\n\r\n",
		  "123456789012345678901234567890123456789012345678901234567890123" },
	};
	struct mbox *m = fresh(0);
	struct err e = { 0 };

	for (size_t i = 0; i < N(rows); i++)
		for (size_t piece = 1; piece < 99; piece += 49) {
			const char *text = rows[i].text;

			check(mbox_begin(m, &e) == 0, "begin: %s", e.text);
			for (size_t at = 0, n = strlen(text); at < n; at += piece)
				mbox_write(m, text + at, n - at < piece ? n - at : piece, &e);
			check(strcmp(mbox_date(m), rows[i].date) == 0, "date %zu: %s", i, mbox_date(m));
			mbox_abort(m);
		}
	closed(m);
}

static void test_is_made(void)
{
	static const char key[] = "<0123456789abcdef0123456789abcdef01234567";
	static const struct { const char *rest; bool made; } rows[] = {
		{ "@imap_backup.py.local>", true }, { ".2@imap_backup.py.local>", true },
		{ ".4294967295@imap_backup.py.local>", true }, { ".@imap_backup.py.local>", false },
		{ ".x@imap_backup.py.local>", false }, { "8@imap_backup.py.local>", false },
		{ "@imap_backup.py.local", false }, { "@imap_backup.py.local> ", false }, { "", false },
	};
	char text[MBOX_MADE_MAX + 40];

	for (size_t i = 0; i < N(rows); i++) {
		int n = snprintf(text, sizeof text, "%s%s", key, rows[i].rest);

		check(is_made(text, (size_t)n) == rows[i].made, "made: %s", text);
	}
	text[1] = 'A';
	check(!is_made(text, 63), "made: %s", text);
}

/* ---- storing ---- */

static void test_stored(void)
{
	static const struct { const char *mail, *stored; } rows[] = {
		{ "Message-ID: <a@x>\r\n\r\nhi\r\n", "Message-ID: <a@x>\n\nhi\n\n" },
		{ "Message-ID: <a@x>\r\n\r\nhi", "Message-ID: <a@x>\n\nhi\n\n" },
		{ "Message-ID: <a@x>\n\nhi\n\n\n", "Message-ID: <a@x>\n\nhi\n\n\n\n" },
		{ "Message-ID: <a@x>\r\n", "Message-ID: <a@x>\n\n" }, { "Message-ID: <a@x>", "Message-ID: <a@x>\n\n" },
		{ "Message-ID: <a@x>\r\n\r\nFrom a\r\n>From b\r\n>>>From c\r\n From d\r\nFrom\r\nFro\r\n>\r\n>>\r\n",
		  "Message-ID: <a@x>\n\n>From a\n>>From b\n>>>>From c\n From d\nFrom\nFro\n>\n>>\n\n" },
		{ "Message-ID: <a@x>\r\n\r\n> From a\r\n>>Fro m\r\nxFrom \r\n>From:\r\nFFrom \r\n",
		  "Message-ID: <a@x>\n\n> From a\n>>Fro m\nxFrom \n>From:\nFFrom \n\n" },
		{ "Message-ID: <a@x>\r\n\r\n\rFrom \r\n\r\r\nFrom \r", "Message-ID: <a@x>\n\n\rFrom \n\r\n>From \r\n\n" },
		{ "Message-ID: <a@x>\r\n\r\nFrom ", "Message-ID: <a@x>\n\n>From \n\n" },
		{ "Message-ID: <a@x>\r\n\r\nFrom", "Message-ID: <a@x>\n\nFrom\n\n" },
		{ "Message-ID: <a@x>\r\n\r\n>", "Message-ID: <a@x>\n\n>\n\n" },
		{ "Message-ID: <a@x>\r\n\r\n>>From", "Message-ID: <a@x>\n\n>>From\n\n" },
		{ "Message-ID: <a@x>\r\n\r\n>\r", "Message-ID: <a@x>\n\n>\r\n\n" },
		{ "Message-ID: <a@x>\r\n\r\n\r", "Message-ID: <a@x>\n\n\r\n\n" },
		{ "From x\r\nMessage-ID: <a@x>\r\n\r\n", ">From x\nMessage-ID: <a@x>\n\n\n" },
		{ "", "Message-ID: <da39a3ee5e6b4b0d3255bfef95601890afd80709@imap_backup.py.local>\n\n" },
		{ "Subject: b\r\n\r\n", "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>\nSubject: b\n\n\n" },
		{ "X: b\r\nSubject:  b\r\n \r\nMessage-ID: \r\n\r\nFrom \r\n",
		  "Message-ID: <c2efae4138ccdd2c53ae815923e14617a3c4d4bd@imap_backup.py.local>\nX: b\nSubject:  b\n \nMessage-ID: \n\n>From \n\n" },
	};

	for (size_t i = 0; i < N(rows); i++) {
		size_t n = strlen(rows[i].mail), length = 0, count = 0;
		struct mbox *m = fresh(MBOX_DUPLICATES);
		char *text, *p, *wanted = malloc(strlen(rows[i].stored) + 100);
		struct err e = { 0 };

		if (wanted == NULL)
			exit(1);
		/* Every way to cut it into three, then pieces of one size. */
		for (size_t a = 0; a <= n; a++)
			for (size_t b = a; b <= n; b++) {
				mbox_begin(m, &e);
				mbox_write(m, rows[i].mail, a, &e);
				mbox_write(m, rows[i].mail + a, b - a, &e);
				mbox_write(m, rows[i].mail + b, n - b, &e);
				check(mbox_end(m, (uint32_t)++count, 0, 0, &e) == 1, "end: %s", e.text);
			}
		for (size_t piece = 1; piece < 8; piece++)
			check(store(m, (uint32_t)++count, rows[i].mail, n, piece) == 1, "pieces of %zu", piece);
		m = reopened(m, 0);
		check(m->now.stored == count, "mail %zu: %u stored", i, m->now.stored);
		closed(m);
		text = p = contents(&length);
		for (size_t k = 1; k <= count; k++) {
			const char *at = strstr(rows[i].stored, "@imap");
			size_t octets;

			if (at != NULL && k > 1) /* the k-th with this key */
				snprintf(wanted, strlen(rows[i].stored) + 100, OURS("0000") "%.*s.%zu%s",
					 (int)(at - rows[i].stored), rows[i].stored, k, at);
			else
				snprintf(wanted, strlen(rows[i].stored) + 100, OURS("0000") "%s", rows[i].stored);
			octets = strlen(wanted);
			if (!check((size_t)(text + length - p) >= octets && memcmp(p, wanted, octets) == 0,
				   "mail %zu, stored the %zu. time:\n%.*s", i, k, (int)octets, p))
				break;
			p += octets;
		}
		check(p == text + length, "mail %zu: %zu octets too many", i, (size_t)(text + length - p));
		free(wanted);
		free(text);
		/* The same is found without the index. */
		unlink(index_file);
		m = opened(0);
		check(m->now.stored == count, "mail %zu: %u scanned", i, m->now.stored);
		m = reopened(m, 0);
		closed(m);
	}
}

/* A line end, a From line, the end of the header at the border of the buffer. */
static void test_borders(void)
{
	static const char tail[] = "\r\nFrom x\r\n>From y\r\n\r\n.", stored[] = "\n>From x\n>>From y\n\n.\n\n";
	static const char id[] = "Message-ID: <a@x>\r\n";
	size_t room = BUFFER_OCTETS + 200, n;
	char *mail = malloc(room);
	struct mbox *m;

	if (mail == NULL)
		exit(1);
	for (int in_body = 0; in_body < 2; in_body++)
		for (size_t shift = 0; shift < 44; shift++) {
			size_t pad = BUFFER_OCTETS - BODY_AT - 30 - shift, at = 0, octets;
			char *text;

			m = fresh(0);
			at = (size_t)sprintf(mail, "%s%s", id, in_body ? "\r\n" : "");
			memset(mail + at, 'x', pad);
			strcpy(mail + at + pad, tail);
			n = at + pad + sizeof tail - 1;
			check(store(m, 1, mail, n, shift % 3 == 0 ? n : 4096) == 1, "at the border");
			m = reopened(m, 0);
			closed(m);
			unlink(index_file);
			closed(reopened(opened(0), 0));
			text = contents(&octets);
			check(octets > sizeof stored && strcmp(text + octets - sizeof stored + 1, stored) == 0,
			      "border - %zu: %.40s", shift, text + octets - 30);
			free(text);
		}
	free(mail);
}

/* A header of megabytes without Message-ID: one is put in front of what is in the file already. */
static void test_long_header(void)
{
	size_t n = 3 * BUFFER_OCTETS + 777, at = 0, octets;
	char *mail = malloc(n + 100), *text;
	struct mbox *m = fresh(0);

	if (mail == NULL)
		exit(1);
	while (at < n)
		at += (size_t)sprintf(mail + at, "X-%zu: %zu\n", at, at);
	at += (size_t)sprintf(mail + at, "Subject: b\n\nFrom b\n");
	check(store(m, 1, mail, at, 5000) == 1 && store(m, 2, mail, at, 5000) == 1, "a long header");
	mbox_forget_uids(m, NULL);
	check(bound(m, 3, "<bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>") == 1, "the first's id");
	check(bound(m, 4, "<bb7763d6c443cb0086032af396a5cc85fad0ac4a.2@imap_backup.py.local>") == 1, "the second's id");
	check(bound(m, 5, "<bb7763d6c443cb0086032af396a5cc85fad0ac4a.3@imap_backup.py.local>") == 0, "no third");
	closed(reopened(m, 0));
	text = contents(&octets);
	check(strstr(text, "bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>\nX-0: 0\n") != NULL &&
	      strstr(text, "bb7763d6c443cb0086032af396a5cc85fad0ac4a.2@imap_backup.py.local>\nX-0: 0\n") != NULL &&
	      octets == 2 * (BODY_AT + at + 76 + 2) + 2, "a long header: %zu octets", octets);
	free(text);
	free(mail);
}

/* A date that is told late, a mail that is given up, a copy, one that is there under its UID. */
static void test_end(void)
{
	struct mbox *m = fresh(0);
	struct err e = { 0 };

	mbox_begin(m, &e);
	mbox_write(m, "Message-ID: <a@x>\r\n\r\n", 21, &e);
	check(mbox_end(m, 1, 86400, 0x7, &e) == 1, "a late date");
	check(keep(m, 2, "Message-ID: <a@x>\r\n\r\ncopy\r\n") == 0, "a copy");
	check(keep(m, 2, "Message-ID: <b@x>\r\n\r\nuid\r\n") == 0, "a known UID");
	mbox_begin(m, &e);
	mbox_write(m, "Message-ID: <c@x>\r\n\r\n", 21, &e);
	mbox_abort(m);
	m = reopened(m, 0);
	check(m->now.stored == 1 && m->now.others == 1, "%u stored, %u others", m->now.stored, m->now.others);
	closed(m);
	holds("From MAILER-DAEMON Fri Jan  2 00:00:00 1970\nX-Mozilla-Status: 0007\nMessage-ID: <a@x>\n\n\n", "end");
}

/* ---- reading back ---- */

static char taken[3 * BUFFER_OCTETS];
static size_t taken_octets;

static int take(void *context, const void *octets, size_t n)
{
	(void)context;
	memcpy(taken + taken_octets, octets, n);
	taken_octets += n;
	return 0;
}

/* Walk to the only mail, and have it in this form. */
static struct mbox_mail read_back(enum mbox_form form)
{
	struct err e = { 0 };
	struct mbox_mail mail = { .offset = 0 };
	struct mbox *m;
	off_t at = 0;

	taken_octets = 0;
	check(mbox_open(&m, path, "", MBOX_READ, &e) == 0 && mbox_walk(m, &at, &mail, &e) == 1 &&
	      mbox_read(m, &mail, form, take, NULL, &e) == 0 && mbox_walk(m, &at, &mail, &e) == 0, "read: %s", e.text);
	mbox_close(m, NULL, NULL, &e);
	return mail;
}

/* What was stored comes back, wherever the buffer ends within runs of '>' and "From ". */
static void test_read(void)
{
	static const char id[] = "Message-ID: <a@x>\r\n\r\n", original[] =
		"From nobody Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0009\nDate: x\nMessage-ID: <b@x>\n\nb";
	static char text[2 * BUFFER_OCTETS + 1000];
	struct mbox_mail mail;

	for (size_t shift = 0; shift < 40; shift++)
		for (int quotes = 0; quotes < 3; quotes++) {
			size_t n = (size_t)sprintf(text, "%s", id), run = BUFFER_OCTETS - BODY_AT - n - shift;
			struct mbox *m = fresh(0);

			if (quotes == 1)
				n += (size_t)sprintf(text + n, "\r\n");
			memset(text + n, quotes > 0 ? '>' : 'x', run);
			n += run;
			n += (size_t)sprintf(text + n, "%sFrom x\r\n>From y\r\n>Fro\r\n>>\r\nFrom ", quotes == 2 ? "" : "\r\n>>");
			check(store(m, 1, text, n, 5000) == 1, "a mail with quotes");
			closed(m);
			n += (size_t)sprintf(text + n, "\r\n");
			read_back(MBOX_CRLF);
			check(taken_octets == n && memcmp(taken, text, n) == 0, "read back %zu, %d", shift, quotes);
		}
	write_file(path, original, sizeof original - 1);
	mail = read_back(MBOX_LF);
	check(taken_octets == 29 && memcmp(taken, "Date: x\nMessage-ID: <b@x>\n\nb\n", 29) == 0, "read: %.*s",
	      (int)taken_octets, taken);
	check(strcmp(mail.date, " x") == 0 && mail.when_sec == INT64_MIN && strcmp(mail.name, "<b@x>") == 0 && !mail.made,
	      "read: %s, %s", mail.date, mail.name);
	read_back(MBOX_AS_STORED);
	check(taken_octets == sizeof original + 1 && memcmp(taken + taken_octets - 4, "\nb\n\n", 4) == 0 &&
	      memcmp(taken + 55, "0001", 4) == 0, "read: %.*s", (int)taken_octets, taken);
}

/* ---- states ---- */

static void test_states(void)
{
	static const struct { const char *before; unsigned flags; const char *after; } rows[] = {
		{ "0000", MBOX_SEEN, "0001" }, { "0009", 0, "0000" }, { "1007", MBOX_FORWARDED, "1000" },
		{ "0100", MBOX_FLAGGED, "0104" }, { "eFf0", MBOX_SEEN, "eff1" }, { "EFF1", MBOX_SEEN, "EFF1" },
		{ "ffff", 0, "eff0" },
	};
	char text[300];
	struct mbox *m;
	struct err e = { 0 };

	for (size_t i = 0; i < N(rows); i++) {
		int n = snprintf(text, sizeof text, "From x\nX-Mozilla-Status: %s\nMessage-ID: <a@x>\n\na\n\n"
				 "From nobody\nMessage-ID: <b@x>\n\nX-Mozilla-Status: 0000\n\n", rows[i].before);

		write_file(path, text, (size_t)n);
		unlink(index_file);
		m = opened(0);
		check(bound(m, 1, "<a@x>") == 1 && bound(m, 2, "<b@x>") == 1, "bound");
		check(mbox_set_flags(m, 1, rows[i].flags, &e) == 0, "flags %zu: %s", i, e.text);
		check(mbox_set_flags(m, 2, MBOX_SEEN, &e) == 0, "a mail without digits: %s", e.text);
		check(mbox_set_flags(m, 3, MBOX_SEEN, &e) == 0, "an unknown UID");
		m = reopened(m, 0);
		closed(m);
		memcpy(strstr(text, "Status: ") + 8, rows[i].after, 4);
		holds(text, "states");
	}
	/* No mail where the index says: nothing is written, and the index is given up. */
	m = fresh(0);
	keep(m, 1, "Message-ID: <a@x>\r\n\r\na\r\n");
	closed(m);
	snprintf(text, sizeof text, "%s", OURS("0000") "Message-ID: <a@x>\n\na\n\n");
	memcpy(text + 50, "zilla", 5);
	memset(text + DIGITS_AT, '!', 4);
	write_file(path, text, strlen(text));
	m = opened(0);
	check(mbox_set_flags(m, 1, MBOX_SEEN, &e) == -1 && e.code == E_FORMAT, "no digits there");
	e = (struct err){ 0 };
	check(commit(m, NULL, &e) == -1, "commit after that");
	mbox_close(m, NULL, NULL, &e);
	check(access(index_file, F_OK) != 0, "the index is given up");
	holds(text, "nothing is written");
}

/* ---- which mail is which ---- */

static void test_bind(void)
{
	static const char a[] = "Message-ID: <a@x>\r\n\r\n", b[] = "Message-ID: <b@x>\r\n\r\n";
	struct mbox *m = fresh(0);
	struct err e = { 0 };

	check(keep(m, 1, a) == 1 && keep(m, 2, b) == 1, "two mails");
	check(bound(m, 3, "<a@x>") == 1 && m->now.others == 1, "another name");
	check(bound(m, 3, "<b@x>") == 1 && m->now.others == 1, "a UID that is known");
	check(bound(m, 4, "<c@x>") == 0, "an unknown mail");
	listed(m, "23"); /* 1 is gone: 3 takes its place */
	marked(m, 0);
	m = reopened(m, 0);
	check(mbox_next_uid(m, 1) == 2 && mbox_next_uid(m, 3) == 3 && m->now.others == 0 && m->now.gone == 0,
	      "lives under its other name");
	check(mbox_set_flags(m, 3, MBOX_SEEN, &e) == 0, "flags by the new name");
	listed(m, "");
	marked(m, 2);
	marked(m, 0);
	m = reopened(m, 0);
	check(m->now.gone == 2 && m->came_back == 0, "both gone");
	closed(m);
	holds(OURS("0009") "Message-ID: <a@x>\n\n\n" OURS("0008") "Message-ID: <b@x>\n\n\n", "gone");
	m = opened(0);
	check(bound(m, 9, "<b@x>") == 1 && m->came_back == 1 && m->now.gone == 1, "came back");
	marked(m, 0);
	mbox_forget_uids(m, NULL);
	check(mbox_next_uid(m, 1) == 0 && bound(m, 1, "<b@x>") == 1 && bound(m, 5, "<b@x>") == 1, "rekeyed");
	m = reopened(m, 0);
	check(mbox_next_uid(m, 2) == 5 && m->now.others == 1 && m->now.gone == 1, "rekeyed: kept");
	closed(m);
	holds(OURS("0009") "Message-ID: <a@x>\n\n\n" OURS("0000") "Message-ID: <b@x>\n\n\n", "came back");
	/* Copies are wanted now: 5 is to be fetched. */
	m = opened(MBOX_DUPLICATES);
	check(m->now.others == 0 && mbox_next_uid(m, 2) == 0 && bound(m, 5, "<b@x>") == 0, "a copy is wanted");
	check(keep(m, 5, b) == 1 && bound(m, 6, "<b@x>") == 0 && keep(m, 6, b) == 1, "copies");
	listed(m, "56");
	marked(m, 0); /* gone is only what has no UID left with its ID */
	m = reopened(m, MBOX_DUPLICATES);
	check(m->now.stored == 4 && m->now.gone == 1 && mbox_next_uid(m, 1) == 5, "copies: one is unbound");
	check(bound(m, 7, "<b@x>") == 1 && mbox_next_uid(m, 7) == 7, "copies: it is bound again");
	closed(m);
	/* They are not wanted any more. */
	m = opened(0);
	check(bound(m, 8, "<b@x>") == 1 && m->now.others == 1, "copies: only a name");
	listed(m, "8");
	marked(m, 0);
	listed(m, "");
	marked(m, 3);
	closed(reopened(m, 0));
	/* All copies without a UID of their own are marked alike. */
	m = fresh(MBOX_DUPLICATES);
	check(keep(m, 1, a) == 1 && keep(m, 2, a) == 1 && keep(m, 3, a) == 1, "three copies");
	mbox_forget_uids(m, NULL);
	check(bound(m, 1, "<a@x>") == 1 && mbox_set_flags(m, 1, MBOX_FLAGGED, &e) == 0, "one is bound");
	marked(m, 0);
	closed(reopened(m, 0));
	holds(OURS("0004") "Message-ID: <a@x>\n\n\n" OURS("0004") "Message-ID: <a@x>\n\n\n" OURS("0004")
	      "Message-ID: <a@x>\n\n\n", "alike");
}

static void test_bind_made(void)
{
	static const char b[] = "Subject: b\r\n\r\n";
	struct mbox *m = fresh(0);
	struct mbox_id id = id_of_answer(b);

	check(bound_id(m, 1, &id) == 0, "nothing is known");
	check(keep(m, 1, b) == 1 && keep(m, 2, b) == 1 && keep(m, 3, b) == 1, "three alike");
	check(bound_id(m, 4, &id) == 0 && bound_id(m, 2, &id) == 1, "a fourth is not");
	mbox_forget_uids(m, NULL);
	for (uint32_t uid = 11; uid < 14; uid++)
		check(bound_id(m, uid, &id) == 1, "rekeyed: the %u.", uid - 10);
	check(bound_id(m, 14, &id) == 0, "rekeyed: no fourth");
	m = reopened(m, 0);
	check(mbox_next_uid(m, 1) == 11 && m->now.stored == 3 && m->now.others == 0, "rekeyed: kept");
	listed(m, "");
	marked(m, 3);
	check(bound_id(m, 1, &id) == 1 && m->came_back == 1, "the first is back");
	check(bound(m, 2, "<bb7763d6c443cb0086032af396a5cc85fad0ac4a.3@imap_backup.py.local>") == 1, "the third is back, by its own name");
	check(bound_id(m, 3, &id) == 1 && m->now.gone == 0, "the second is back");
	closed(reopened(m, 0));
	/* A From field with a blank behind its name is quoted as a From line. */
	id = id_of_answer("From : a@x\r\n\r\n");
	write_file(path, "From x\n>From : a@x\n\nb\n\n", 23);
	unlink(index_file);
	m = opened(0);
	check(bound_id(m, 1, &id) == 1, "a quoted From field");
	closed(m);
}

/* Mails of the original with an ID that it overlooked are known by either. */
/* An edited draft has a new UID, its old Message-ID, and mostly another size. */
static void test_replaced(void)
{
	static const char id[] = "Message-ID: <a@x>\r\n\r\n", v1[] = "Message-ID: <a@x>\r\n\r\none\r\n",
			  v2[] = "Message-ID: <a@x>\r\n\r\nthe second\r\n";
	const uint64_t size1 = sizeof v1 - 1, size2 = sizeof v2 - 1;

	for (unsigned how = 0; how <= MBOX_DUPLICATES; how += MBOX_DUPLICATES) {
		struct mbox *m = fresh(how);
		struct mbox_info info;

		check(keep(m, 1, v1) == 1, "the first");
		listed(m, "2");
		check(bound_size(m, 2, "<a@x>", size2) == 0 && keep(m, 2, v2) == 1, "the second is stored");
		marked(m, 0);
		mbox_tally(m, &info);
		check(info.gone == 1 && info.unbound == 0 && info.different == 0, "the first is gone");
		m = reopened(m, how);
		listed(m, "");
		marked(m, 1);
		check(bound_size(m, 3, "<a@x>", size1) == 0, "the first is not known any more");
		check(bound_size(m, 3, "<a@x>", size2) == 1 && m->now.gone == 1, "the second is back");
		closed(m);
		holds(OURS("0008") "Message-ID: <a@x>\n\none\n\n" OURS("0000") "Message-ID: <a@x>\n\nthe second\n\n",
		      "replaced");
		unlink(index_file); /* nor does it come back when the index is lost, and the server has more UIDs */
		m = opened(how);
		check(bound_size(m, 4, "<a@x>", size2) == 1 && bound(m, 5, "<a@x>") == (how == 0), "lost index");
		marked(m, 0);
		check(m->now.gone == 1, "lost index: still gone");
		closed(reopened(m, how));

		m = fresh(how); /* the size was wrong: it is the same mail */
		check(keep(m, 1, v1) == 1, "the first");
		listed(m, "2");
		check(bound_size(m, 2, "<a@x>", size1 - 2) == 0 && keep(m, 2, v1) == 0 && mbox_next_uid(m, 1) == 2,
		      "the same mail");
		/* A new index or UIDVALIDITY proves nothing, nor does a mail that is still listed. */
		mbox_forget_uids(m, NULL);
		check(bound_size(m, 3, "<a@x>", size2) == 1, "rekeyed");
		check(bound_size(m, 4, "<a@x>", size2) == (how == 0), "another one besides");
		mbox_tally(m, &info);
		check(info.different == (how == 0), "it is told");
		check(bound_size(m, 5, "<a@x>", size2) == (how == 0) && bound_size(m, 6, "<a@x>", size1) == (how == 0),
		      "two more");
		mbox_tally(m, &info);
		check(info.different == (how == 0 ? 2 : 0), "one is different");
		m = reopened(m, how);
		mbox_tally(m, &info);
		check(info.different == 0 && info.all_different == (how == 0 ? 2 : 0), "but once");
		listed(m, "4");
		mbox_tally(m, &info);
		check(info.all_different == 0 && mbox_next_uid(m, 4) == 0, "what differs is asked about anew");
		check(bound_size(m, 7, "<a@x>", size1) == 1, "and one that is not different");
		mbox_tally(m, &info);
		check(info.all_different == 0, "none is left: %u", info.all_different);
		closed(m);

		/* The fetched mail is the same as one that has a UID: another name, unless copies are kept. */
		m = fresh(MBOX_DUPLICATES);
		check(keep(m, 1, v1) == 1 && keep(m, 2, v2) == 1, "two mails, one ID");
		m = reopened(m, how);
		listed(m, "23");
		check(bound_size(m, 3, "<a@x>", size2) == 0 && keep(m, 3, v2) == (how != 0), "a copy");
		check(mbox_next_uid(m, 3) == 3 && m->now.others == (how == 0), "a copy's UID");
		marked(m, 0);
		check(m->entries[*record_by_uid(m, 2)].bits == m->entries[1].bits && m->entries[0].uid == 0,
		      "the first does not take its place");
		m = reopened(m, how);
		check(mbox_next_uid(m, 3) == 3, "a copy's UID stays");
		closed(m);

		/* Two that left come again: each is found by its size, whatever the order. */
		m = fresh(MBOX_DUPLICATES);
		check(keep(m, 1, v1) == 1 && keep(m, 2, v2) == 1 && keep(m, 3, id) == 1, "three mails, one ID");
		listed(m, "");
		check(bound_size(m, 6, "<a@x>", sizeof id - 1) == 1 && bound_size(m, 4, "<a@x>", size2) == 1 &&
		      bound_size(m, 5, "<a@x>", size1) == 1, "by size");
		check(*record_by_uid(m, 6) == 2 && *record_by_uid(m, 4) == 1 && *record_by_uid(m, 5) == 0, "by size: which");
		closed(reopened(m, MBOX_DUPLICATES));
	}
}

/* A run that dies between the drop of a UID and the mail that replaced its mail. */
static void test_replaced_later(void)
{
	struct mbox *m = fresh(0);

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\none\r\n") == 1, "the first");
	listed(m, "");
	marked(m, 1);
	m = reopened(m, 0);
	check(bound_size(m, 2, "<a@x>", 99) == 0 && keep(m, 2, "Message-ID: <a@x>\r\n\r\ntwo\r\n") == 1, "the second");
	closed(reopened(m, 0));
	holds(OURS("0008") "Message-ID: <a@x>\n\none\n\n" OURS("0000") "Message-ID: <a@x>\n\ntwo\n\n", "later");
}

/* A mail whose UID left, but another name of it is listed, has not been replaced. */
static void test_named(void)
{
	struct mbox *m = fresh(0);
	struct mbox_info info;

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\nno line end") == 1 && bound_size(m, 2, "<a@x>", 32) == 1, "two UIDs");
	listed(m, "23");
	check(bound_size(m, 3, "<a@x>", 99) == 1 && *record_by_uid(m, 2) == 0, "a third");
	mbox_tally(m, &info);
	check(info.different == 1, "it is different");
	closed(m);
	unlink(index_file);
	m = opened(0); /* we added a line end: its size is not known for sure */
	check(bound_size(m, 2, "<a@x>", 32) == 1 && bound_size(m, 3, "<a@x>", 32) == 1 && bound_size(m, 4, "<a@x>", 34) == 1,
	      "three UIDs");
	mbox_tally(m, &info);
	check(info.different == 0, "none is different");
	closed(reopened(m, 0));
}

/* Mails that differ have states of their own, though they have one ID. */
static void test_unlike(void)
{
	struct mbox *m = fresh(MBOX_DUPLICATES);
	struct err e = { 0 };

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\none\r\n") == 1 && keep(m, 2, "Message-ID: <a@x>\r\n\r\ntwo\r\n") == 1,
	      "two mails");
	mbox_forget_uids(m, NULL);
	check(bound(m, 1, "<a@x>") == 1 && mbox_set_flags(m, 1, MBOX_FLAGGED, &e) == 0, "one is bound");
	marked(m, 0);
	closed(reopened(m, 0));
	holds(OURS("0004") "Message-ID: <a@x>\n\none\n\n" OURS("0000") "Message-ID: <a@x>\n\ntwo\n\n", "unlike");
}

/* A run that dies when it has marked a mail as gone: its UID has left all the same. */
static void test_killed(void)
{
	struct mbox *m = fresh(0);

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\none\r\n") == 1, "a mail");
	m = reopened(m, 0);
	check(keep(m, 2, "Message-ID: <b@x>\r\n\r\n") == 1, "another, and so the mark \"writing\"");
	listed(m, "2");
	marked(m, 1);
	m->stuck = true;
	closed(m);
	m = opened(0);
	check(mbox_next_uid(m, 1) == 0 && m->now.gone == 1 && bound_size(m, 3, "<a@x>", 99) == 0, "killed");
	closed(m);
}

/* A run died, and the records of its mails cannot be read: these stay all the same. */
static void test_killed_unread(void)
{
	struct mbox *m = fresh(0);
	struct err e = { 0 };
	char text[60];

	for (uint32_t uid = 1; uid <= RECORDS_READ + 1; uid++) {
		snprintf(text, sizeof text, "Message-ID: <%lu@x>\r\n\r\n", (unsigned long)uid);
		check(keep(m, uid, text) == 1, "mail %lu", (unsigned long)uid);
		m = uid == RECORDS_READ ? reopened(m, 0) : m;
	}
	check(flush(m, &e) == 0, "flush: %s", e.text);
	m->stuck = true;
	closed(m);
	unreadable = record_at(RECORDS_READ);
	m = opened(0);
	unreadable = -1;
	check(m->now.stored == RECORDS_READ + 1, "killed, unread: %lu mails", (unsigned long)m->now.stored);
	closed(m);
}

/* A write fails while the end of a large mail is not written yet: nothing of it stays. */
static void test_no_room(void)
{
	static const char id[] = "Message-ID: <b@x>\r\n\r\n";
	char *text = malloc(2 * BUFFER_OCTETS);

	if (text == NULL)
		exit(1);
	memset(text, 'x', 2 * BUFFER_OCTETS);
	memcpy(text, id, strlen(id));
	for (int begun = 0; begun < 2; begun++) {
		struct mbox *m = fresh(0);
		struct err e = { 0 };

		check(keep(m, 1, "Message-ID: <a@x>\r\n\r\n") == 1, "a mail");
		m = reopened(m, 0);
		check(store(m, 2, text, 2 * BUFFER_OCTETS - 9, 4096) == 1, "a large one");
		check(!begun || (mbox_begin(m, &e) == 0 && mbox_write(m, id, 9, &e) == 0), "begin: %s", e.text);
		writes_left = 0;
		check(mbox_set_flags(m, 1, MBOX_SEEN, &e) == -1, "no room");
		writes_left = -1;
		closed(m);
		holds(OURS("0000") "Message-ID: <a@x>\n\n\n", "no room");
		m = opened(0);
		check(m->now.stored == 1, "no room: %s", mbox_mended(m));
		closed(m);
	}
	free(text);
}

/* Wherever the writing of new UIDs ends: never are they taken for those of the old UIDVALIDITY. */
static void test_rekeyed(void)
{
	for (int writes = 0; writes < 9; writes++) {
		const struct mbox_claim old = { .uidvalidity = 5 }, new = { .uidvalidity = 6 };
		struct mbox *m = fresh(0);
		struct err e = { 0 };

		check(keep(m, 1, "Message-ID: <a@x>\r\n\r\n") == 1 && keep(m, 2, "Message-ID: <b@x>\r\n\r\n") == 1, "two");
		check(mbox_close(m, &old, NULL, &e) == 0, "close: %s", e.text);
		m = opened(0);
		check(keep(m, 3, "Message-ID: <c@x>\r\n\r\n") == 1, "another, and so the mark \"writing\"");
		mbox_forget_uids(m, &new);
		check(bound(m, 1, "<b@x>") == 1 && bound(m, 2, "<a@x>") == 1, "rekeyed");
		writes_left = writes;
		mbox_close(m, NULL, NULL, &e);
		writes_left = -1;
		m = opened(0);
		if (m->now.claim.uidvalidity == old.uidvalidity)
			check(record_by_uid(m, 1) != NULL && *record_by_uid(m, 1) == 0, "%d writes: old UIDs", writes);
		else if (m->now.claim.uidvalidity == new.uidvalidity)
			check(*record_by_uid(m, 1) == 1, "%d writes: new UIDs", writes);
		check(writes < 8 || m->now.claim.uidvalidity == new.uidvalidity, "%d writes suffice", writes);
		closed(m);
	}
}

/* Another program added lines to all mails: nothing is fetched again, nothing is marked. */
static void test_rewritten(void)
{
	static const char box[] = OURS("0000") "Status: RO\nMessage-ID: <a@x>\n\none\n\n"
				  OURS("0000") "Status: RO\nMessage-ID: <b@x>\n\ntwo\n\n";
	struct mbox *m = fresh(0);

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\none\r\n") == 1 && keep(m, 2, "Message-ID: <b@x>\r\n\r\ntwo\r\n") == 1,
	      "two mails");
	closed(m);
	write_file(path, box, sizeof box - 1);
	m = opened(0);
	check(bound_size(m, 1, "<a@x>", 26) == 1 && bound_size(m, 2, "<b@x>", 26) == 0, "rewritten: the last is fetched");
	check(keep(m, 2, "Message-ID: <b@x>\r\n\r\ntwo\r\n") == 0 && mbox_next_uid(m, 2) == 2, "rewritten: not kept");
	marked(m, 0);
	closed(reopened(m, 0));
	holds(box, "rewritten");
}

static void test_original(void)
{
	static const char text[] = "From nobody Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0001\n"
		"Message-ID: <0123456789abcdef0123456789abcdef01234567@imap_backup.py.local>\nMessage-ID:<a@x>\n\na\n\n"
		"From nobody Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0009\nMessage-ID: <b@x>\n\nb";
	struct mbox *m;

	write_file(path, text, sizeof text - 1);
	unlink(index_file);
	m = opened(0);
	check(strstr(mbox_mended(m), "rebuilt, 2 mails") != NULL, "mended: %s", mbox_mended(m));
	check(bound(m, 1, "<a@x>") == 1 && bound(m, 2, "<b@x>") == 1 && m->now.gone == 0, "known");
	/* It had stripped its mails: their size tells nothing. */
	check(bound_size(m, 3, "<a@x>", 999) == 1 && m->different == 0, "no size");
	m = reopened(m, 0);
	listed(m, "9");
	check(bound_size(m, 9, "<b@x>", 999) == 1, "no size");
	closed(m);
}

/* ---- the index ---- */

/* Two mails; the index's header says so many of them. */
static void test_marks(void)
{
	static const struct { uint32_t mails, stored; bool writing; const char *mended; } rows[] = {
		{ 2, 2, false, "" }, { 1, 1, false, "rebuilt, 2" }, { 0, 0, false, "rebuilt, 2" }, { 9, 9, true, "rebuilt, 2" },
		{ 2, 2, true, "cut off: 0 of its mails kept" }, { 1, 1, true, "cut off: 1 of its mails kept" },
		{ 0, 0, true, "cut off: 2 of" }, { 2, 1, false, "rebuilt, 2" },
	};
	const off_t mail = (off_t)strlen(OURS("0000") "Message-ID: <a@x>\n\n\n");

	for (size_t i = 0; i < N(rows); i++) {
		struct mbox *m = fresh(0);
		uint8_t p[STATE_OCTETS];
		struct state s;
		FILE *f;

		keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
		keep(m, 2, "Message-ID: <b@x>\r\n\r\n");
		s = m->now;
		closed(m);
		s.writing = rows[i].writing;
		s.records = rows[i].mails;
		s.stored = rows[i].stored;
		s.octets = rows[i].mails * mail;
		state_pack(&s, p);
		f = fopen(index_file, "r+");
		if (f == NULL || fseek(f, STATE_AT, SEEK_SET) != 0 || fwrite(p, 1, sizeof p, f) != sizeof p ||
		    fclose(f) != 0)
			exit(1);
		m = opened(0);
		check(m->now.stored == 2, "mark %zu: %u mails", i, m->now.stored);
		check(*rows[i].mended != '\0' ? strstr(mbox_mended(m), rows[i].mended) != NULL :
		      *mbox_mended(m) == '\0', "mark %zu: \"%s\"", i, mbox_mended(m));
		closed(reopened(m, 0));
		holds(OURS("0000") "Message-ID: <a@x>\n\n\n" OURS("0000") "Message-ID: <b@x>\n\n\n", "marks");
	}
}

static void test_index(void)
{
	struct mbox_claim claim = { .uidvalidity = 7, .uidnext = 9, .messages = 3, .unseen = 2,
				    .highestmodseq = UINT64_C(1) << 62, .when_sec = -5, .traits = UINT32_MAX - 1 };
	struct record r = { .uid = UINT32_MAX, .state = MBOX_FLAGS, .offset = INT64_MAX - 500, .octets = 500,
			    .digits = DIGITS_MAX, .head = DIGITS_MAX + 5, .sum = UINT64_MAX,
			    .wire = UINT32_MAX, .from = 0xFFFFFF }, again;
	uint8_t p[RECORD_OCTETS];
	struct mbox *m = fresh(0), *second;
	struct mbox_info info;
	struct err e = { 0 };
	size_t n;
	char *text;

	keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
	check(mbox_open(&second, path, "box", MBOX_LOOK, &e) == -1 || second != NULL, "a look");
	mbox_close(second, NULL, NULL, &e);
	check(commit(m, &claim, &e) == 0, "commit: %s", e.text);
	mbox_peek(path, "box", &info);
	check(info.octets > 0 && !info.fits && info.stored == 1, "peek while it is written");
	closed(m);
	mbox_peek(path, "box", &info);
	check(info.fits && memcmp(&info.claim, &claim, offsetof(struct mbox_claim, traits) + 4) == 0 &&
	      info.stored == 1, "peek");
	mbox_peek(path, "xob", &info);
	check(info.octets > 0 && !info.fits && info.stored == 0, "peek by another name");
	check(mbox_open(&m, path, "other", 0, &e) == -1 && e.code == E_FORMAT &&
	      strstr(e.text, "of the mailbox \"box\", not of \"other\"") != NULL, "another's: %s", e.text);

	/* Any octet changed or cut off: rebuilt, or as it was; never wrong. */
	text = contents(&n);
	for (int from = 0; from < RECORDS_AT + RECORD_OCTETS; from++) {
		FILE *f = fopen(index_file, "r+");
		int c;

		if (f == NULL || fseek(f, from, SEEK_SET) != 0 || (c = getc(f)) < 0 ||
		    fseek(f, from, SEEK_SET) != 0 || putc(c ^ 0x10, f) < 0 || fclose(f) != 0)
			exit(1);
		e = (struct err){ 0 };
		if (mbox_open(&m, path, "box", 0, &e) == 0) {
			check(m->now.stored == 1, "octet %d changed: %u mails", from, m->now.stored);
			closed(m);
		} else {
			check(e.code == E_FORMAT && from >= NAME_AT && from < NAME_AT + 3, "octet %d: %s", from, e.text);
			unlink(index_file);
			closed(opened(0));
		}
		holds(text, "a damaged index");
	}
	free(text);

	record_pack(&r, p);
	check(record_unpack(&again, p) && memcmp(&r, &again, sizeof r) == 0, "a record");
	r.octets = 501;
	record_pack(&r, p);
	check(!record_unpack(&again, p), "a record that ends nowhere");
	r.octets = 500;
	r.head = 4;
	record_pack(&r, p);
	check(!record_unpack(&again, p), "a record whose digits are nowhere");
	r.head = 6;
	r.digits = 1;
	r.octets = 5;
	record_pack(&r, p);
	check(!record_unpack(&again, p), "a record with more lines in front than octets");
	r = (struct record){ .kind = ENTRY_OTHER, .octets = 1 };
	record_pack(&r, p);
	check(!record_unpack(&again, p), "another name with octets");
}

/* Two records that claim one UID; the index was made by somebody else, or the power went. */
static void test_twice(void)
{
	struct mbox *m = fresh(0);

	keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
	keep(m, 2, "Message-ID: <b@x>\r\n\r\n");
	bound(m, 3, "<a@x>");
	m->entries[2].uid = 1;
	m->entries[2].bits |= ENTRY_DIRTY;
	closed(m);
	m = opened(0);
	check(m->known == 2 && m->now.others == (m->entries[2].uid != 0) && mbox_next_uid(m, 1) == 1 &&
	      mbox_next_uid(m, 2) == 2, "twice: %u UIDs, %u others", m->known, m->now.others);
	listed(m, "12");
	marked(m, 0);
	closed(reopened(m, 0));
}

/* ---- limits ---- */

static void test_limits(void)
{
	char name[MBOX_NAME_MAX + 2], *long_path = malloc(PATH_OCTETS + 1);
	struct mbox *m = fresh(0);
	struct mbox_id id = { { 1 } };
	struct err e = { 0 };
	uint32_t records;

	if (long_path == NULL)
		exit(1);
	keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
	records = m->now.records;
	m->now.records = MBOX_MAILS_MAX;
	check(records_room(m, m->now.records + 1, &e) == -1 && e.code == E_FORMAT, "a mail too many");
	m->now.records = records;
	e = (struct err){ 0 };
	check(bound_id(m, UINT32_MAX, &id) == 0 && bound(m, UINT32_MAX, "<a@x>") == 1 &&
	      mbox_next_uid(m, 2) == UINT32_MAX, "the last UID");
	closed(m);
	memset(name, 'x', sizeof name);
	name[MBOX_NAME_MAX + 1] = '\0';
	check(mbox_open(&m, path, name, 0, &e) == -1 && e.code == E_FORMAT, "a long name");
	memset(long_path, 'x', PATH_OCTETS);
	long_path[PATH_OCTETS] = '\0';
	e = (struct err){ 0 };
	check(mbox_open(&m, long_path, "box", 0, &e) == -1 && e.code == E_FORMAT, "a long path");
	free(long_path);
	unlink(index_file);
	name[MBOX_NAME_MAX] = '\0';
	e = (struct err){ 0 };
	check(mbox_open(&m, path, name, 0, &e) == 0 && mbox_close(m, NULL, NULL, &e) == 0 &&
	      mbox_open(&m, path, name, 0, &e) == 0, "the longest name: %s", e.text);
	check(*mbox_mended(m) == '\0', "the longest name: %s", mbox_mended(m));
	closed(m);
	write_file(path, "Fro", 3);
	unlink(index_file);
	e = (struct err){ 0 };
	check(mbox_open(&m, path, "box", 0, &e) == -1 && e.code == E_FORMAT &&
	      strstr(e.text, "no mbox file") != NULL, "no mbox: %s", e.text);
	unlink(path);
	e = (struct err){ 0 };
	check(mbox_open(&m, ".", "box", 0, &e) == -1, "a folder");
	e = (struct err){ 0 };
	check(mbox_open(&m, path, "box", MBOX_LOOK, &e) == 0 && mbox_count(m) == 0 &&
	      mbox_close(m, NULL, NULL, &e) == 0 && access(path, F_OK) != 0, "a look at nothing");
}

/* Links, pipes and folders in the place of our files: neither followed nor waited for. */
static void test_files(void)
{
	static const char *const places[] = { "box.mbox", "box.mbox.index" };
	struct mbox *m;
	struct mbox_info info;

	for (size_t i = 0; i < N(places); i++)
		for (int what = 0; what < 4; what++) {
			struct err e = { 0 };
			char *text;
			size_t n;

			closed(fresh(0));
			write_file("victim", "From x\n\n", what == 0 ? 0 : 8);
			unlink(places[i]);
			check((what < 2 ? symlink("victim", places[i]) : what == 2 ? mkfifo(places[i], 0600) :
			       mkdir(places[i], 0700)) == 0, "%s %d", places[i], what);
			mbox_peek(path, "box", &info);
			check(!info.fits, "%s %d: peek", places[i], what);
			check(mbox_open(&m, path, "box", MBOX_LOOK, &e) == -1, "%s %d: look", places[i], what);
			e = (struct err){ 0 };
			check(mbox_open(&m, path, "box", 0, &e) == -1 && strstr(e.text, places[i]) != NULL, "%s %d: %s",
			      places[i], what, e.text);
			unlink(places[i]);
			rmdir(places[i]);
			rename("victim", path);
			text = contents(&n);
			check(n == (what == 0 ? 0 : 8), "%s %d: the victim", places[i], what);
			free(text);
		}
	unlink("victim");
}

/* Indexes whose checksums are right and that say what cannot be: rebuilt, and nothing is lost. */
static void test_absurd(void)
{
	static const char text[] = OURS("0000") "Message-ID: <a@x>\n\n\n" OURS("0001") "Message-ID: <b@x>\n\n\n"
				   OURS("0000") "Message-ID: <c@x>\n\n\n";
	const off_t third = (sizeof text - 1) / 3, top = INT64_MAX;

	for (int what = 0; what < 16; what++) {
		struct record records[3] = { { .uid = 1 }, { .uid = 2, .state = MBOX_SEEN }, { .uid = 3 } };
		struct mbox *m = fresh(0);
		struct err e = { 0 };
		struct state state;
		uint8_t p[STATE_OCTETS];
		FILE *f;

		write_file(path, text, sizeof text - 1);
		unlink(index_file);
		closed(m);
		unlink(index_file);
		m = opened(0);
		check(bound(m, 1, "<a@x>") + bound(m, 2, "<b@x>") + bound(m, 3, "<c@x>") == 3, "absurd: bind");
		check(commit(m, NULL, &e) == 0, "absurd: %s", e.text);
		for (uint32_t i = 0; i < 3; i++)
			check(record_get(m, i, &records[i], &e) == 0, "absurd: %s", e.text);
		state = m->now;
		closed(m);
		switch (what) {
		case 0: records[1].offset = top - 200; break;
		case 1: records[1].offset = 5; break;
		case 2: records[1].octets = top - third; break;
		case 3: records[2].octets = 0; records[2].head = 0; records[2].digits = 0; break;
		case 4: records[0].kind = ENTRY_OTHER; break;
		case 5: records[0] = (struct record){ .kind = ENTRY_OTHER, .uid = 9 }; break;
		case 6: records[2].kind = 0xFF; break;
		case 7: records[1].head = UINT32_MAX; records[1].digits = 0; break;
		case 8: records[1].digits = DIGITS_MAX; break;
		case 9: state.records = MBOX_MAILS_MAX; break;
		case 10: state.records = UINT32_MAX; break;
		case 11: state.octets = top; break;
		case 12: state.octets = -1; break;
		case 13: state.stored = 2; break;
		case 14: state.records = 2; break;
		default: records[1].octets += 9; records[2].offset += 9; records[2].octets -= 9; break;
		}
		f = fopen(index_file, "r+");
		state.mix = 0;
		if (f == NULL || fseek(f, RECORDS_AT, SEEK_SET) != 0)
			exit(1);
		for (int i = 0; i < 3; i++) {
			uint8_t octets[RECORD_OCTETS];

			state.mix ^= record_pack(&records[i], octets);
			fwrite(octets, 1, sizeof octets, f);
		}
		state_pack(&state, p);
		if (fseek(f, STATE_AT, SEEK_SET) != 0 || fwrite(p, 1, sizeof p, f) != sizeof p || fclose(f) != 0)
			exit(1);
		m = opened(0);
		check(strstr(mbox_mended(m), "does not fit the mbox: rebuilt, 3 mails") != NULL, "absurd %d: %s", what,
		      mbox_mended(m));
		check(bound(m, 1, "<a@x>") + bound(m, 2, "<b@x>") + bound(m, 3, "<c@x>") == 3, "absurd %d: bind", what);
		closed(reopened(m, 0));
		holds(text, "absurd");
	}
}

/* An index of an older version is made anew from the mbox. */
static void test_old_index(void)
{
	struct mbox *m = fresh(0);
	struct err e = { 0 };
	FILE *f;

	check(keep(m, 1, "Message-ID: <a@x>\r\n\r\n") == 1, "a mail");
	closed(m);
	f = fopen(index_file, "r+");
	if (f == NULL || fwrite("imap_backup idx1", 1, 16, f) != 16 || fclose(f) != 0)
		exit(1);
	check(mbox_open(&m, path, "other", 0, &e) == -1 && strstr(e.text, "\"box\"") != NULL, "old: %s", e.text);
	m = opened(0);
	check(strstr(mbox_mended(m), "does not fit the mbox: rebuilt, 1 mails") != NULL, "old: %s", mbox_mended(m));
	check(bound(m, 1, "<a@x>") == 1, "old: known");
	closed(reopened(m, 0));
}

/* Behind 5 GB, of which most is a hole. */
static void test_large(void)
{
	const off_t end = (off_t)5 << 30;
	struct record hole = { .uid = 2, .id = { { 9 } } };
	struct mbox *m = fresh(0);
	struct mbox_info info;
	struct err e = { 0 };
	char digits[5] = "";

	keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
	check(commit(m, NULL, &e) == 0, "commit: %s", e.text);
	hole.offset = m->flushed;
	hole.octets = end - hole.offset;
	if (pwrite(m->fd, "From x\n", 7, hole.offset) != 7 || ftruncate(m->fd, end) != 0 ||
	    pwrite(m->fd, "\n\n", 2, end - 2) != 2) {
		printf("no file of 5 GB here\n");
		mbox_close(m, NULL, NULL, &e);
		return;
	}
	m->flushed = end;
	check(record_append(m, &hole, &e) == 0, "the hole: %s", e.text);
	keep(m, 3, "Message-ID: <c@x>\r\n\r\nFrom c\r\n");
	m = reopened(m, 0);
	mbox_tally(m, &info);
	check(info.octets == end + 95 && info.stored == 3, "%lld octets", (long long)info.octets);
	check(mbox_set_flags(m, 3, MBOX_SEEN, &e) == 0, "flags: %s", e.text);
	check(pread(m->fd, digits, 4, end + DIGITS_AT) == 4 && strcmp(digits, "0001") == 0, "digits: %s", digits);
	keep(m, 4, "Subject: b\r\n\r\n");
	m = reopened(m, 0);
	listed(m, "1");
	marked(m, 3);
	closed(reopened(m, 0));
	unlink(path);
}

/* ---- a mail that may be torn ---- */

static void test_suspect(void)
{
	static const struct { const char *tail; uint64_t octets; } rows[] = {
		{ OURS("0000") "Message-ID: <z@x>\n\nz\n\n", 24 }, { OURS("0000") "Message-ID: <z@x>\n\n>From z\n", 29 },
		{ OURS("0000") "Message-ID: <z@x>\n\n>>From z\n>Fro\n", 36 },
		{ OURS("0000") "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>\nSubject: b\n\nb\n\n", 17 },
		{ OURS("0000") "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a.2@imap_backup.py.local>\nSubject: b\n\nb\n\n", 17 },
		{ "From x\nMessage-ID: <z@x>\n\nz\n\n", 24 },
	};
	struct mbox *m;
	struct err e = { 0 };

	for (size_t i = 0; i < N(rows); i++) {
		const char *id = "<z@x>";
		struct record r;
		FILE *f;

		m = fresh(0);
		keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
		closed(m);
		f = fopen(path, "a");
		if (f == NULL || fputs(rows[i].tail, f) < 0 || fclose(f) != 0)
			exit(1);
		m = opened(0);
		check(strstr(mbox_mended(m), "1 mails were behind") != NULL, "suspect %zu: %s", i, mbox_mended(m));
		if (strstr(rows[i].tail, "z@x") == NULL)
			id = strstr(rows[i].tail, ".2@") ? "<bb7763d6c443cb0086032af396a5cc85fad0ac4a.2@imap_backup.py.local>" :
			     "<bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>";
		check(record_get(m, 1, &r, &e) == 0 && r.wire == rows[i].octets, "suspect %zu: %u octets", i, r.wire);
		check(bound_size(m, 2, id, rows[i].octets + 1) == 0, "suspect %zu is torn", i);
		check(bound_size(m, 2, id, rows[i].octets - i % 2 * 2) == 1 && (m->entries[1].bits & ENTRY_SUSPECT) == 0,
		      "suspect %zu is not torn", i);
		closed(reopened(m, 0));
	}
}

/* One that ends within a line is torn beyond doubt. */
static void test_torn(void)
{
	static const char torn[] = OURS("0001") "Message-ID: <z@x>\n\nz";
	struct mbox *m;

	write_file(path, torn, sizeof torn - 1);
	unlink(index_file);
	m = opened(0);
	check(m->now.stored == 1 && m->now.gone == 1 && (m->entries[0].bits & ENTRY_KIND) == ENTRY_TORN, "torn");
	check(bound(m, 1, "<z@x>") == 0, "torn: known under no ID");
	closed(reopened(m, 0));
	holds(OURS("0009") "Message-ID: <z@x>\n\nz\n\n", "torn");
	/* Bare LFs are stored like CRLF: what seems too long can be torn all the same. */
	m = fresh(0);
	check(keep(m, 1, "Message-ID: <z@x>\n\n\n\n\n\n1\n") == 1, "a mail");
	closed(m);
	check(truncate(path, (off_t)strlen(OURS("0000") "Message-ID: <z@x>\n\n\n\n")) == 0, "truncate");
	unlink(index_file);
	m = opened(0);
	check(bound_size(m, 1, "<z@x>", 25) == 0 && keep(m, 1, "Message-ID: <z@x>\n\n\n\n\n\n1\n") == 1, "once more");
	closed(reopened(m, 0));
	holds(OURS("0008") "Message-ID: <z@x>\n\n\n\n" OURS("0000") "Message-ID: <z@x>\n\n\n\n\n\n1\n\n", "torn, bare LFs");
	/* Without an ID of its own it gets the same again; nothing of it is there but what we made. */
	m = fresh(0);
	check(keep(m, 1, "Subject: b\r\n\r\nbody\r\n") == 1, "a mail");
	closed(m);
	check(truncate(path, (off_t)strlen(OURS("0000") "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>\n")) == 0, "truncate");
	unlink(index_file);
	m = opened(0);
	check(bound_size(m, 1, "<bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>", 20) == 0, "nothing is there");
	closed(m);
	m = fresh(0);
	check(keep(m, 1, "Subject: b\r\n\r\nbody\r\n") == 1, "a mail");
	closed(m);
	check(truncate(path, (off_t)(strlen(OURS("0000")) + 90)) == 0, "truncate");
	unlink(index_file);
	m = opened(0);
	check(keep(m, 1, "Subject: b\r\n\r\nbody\r\n") == 1, "once more");
	closed(reopened(m, 0));
	holds(OURS("0008") "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a@imap_backup.py.local>\nSubject: b\n\nbo\n\n"
	      OURS("0000") "Message-ID: <bb7763d6c443cb0086032af396a5cc85fad0ac4a.2@imap_backup.py.local>\nSubject: b\n\nbody\n\n",
	      "torn without an ID");
}

/* ---- cost ---- */

enum kind { KIND_UNIQUE, KIND_NAMES, KIND_COPIES, KIND_MADE, KIND_MADE_TWO, KIND_MADE_MANY, KIND_LEFT, KINDS };

static int bind_kind(struct mbox *m, enum kind kind, uint32_t n, uint32_t uid)
{
	struct mbox_id id;
	char text[80];

	snprintf(text, sizeof text, kind == KIND_UNIQUE ? "<%u@x>" : "<s@x>", n);
	if (kind < KIND_MADE || kind == KIND_LEFT)
		return kind == KIND_LEFT ? bound_size(m, uid, text, 7) : bound(m, uid, text);
	snprintf(text, sizeof text, "Subject: %u\r\n\r\n", kind == KIND_MADE ? 0 : n % (kind == KIND_MADE_TWO ? 2 : 40));
	id = id_of_answer(text);
	return bound_id(m, uid, &id);
}

/* All that can be done with n mails of this kind. */
static unsigned long work_for(enum kind kind, uint32_t n)
{
	unsigned how = kind == KIND_COPIES || kind == KIND_LEFT ? MBOX_DUPLICATES : 0;
	struct mbox *m = fresh(how);
	struct err e = { 0 };

	work = 0;
	for (uint32_t uid = 1; uid <= n; uid++) {
		char text[80];

		if (kind == KIND_UNIQUE)
			snprintf(text, sizeof text, "Message-ID: <%u@x>\r\n\r\n", uid);
		else if (kind < KIND_MADE || kind == KIND_LEFT)
			snprintf(text, sizeof text, "Message-ID: <s@x>\r\n\r\n");
		else
			snprintf(text, sizeof text, "Subject: %u\r\n\r\n", kind == KIND_MADE ? 0 : uid % (kind == KIND_MADE_TWO ? 2 : 40));
		keep(m, uid, text);
	}
	m = reopened(m, how);
	for (uint32_t uid = 1; uid <= n; uid++)
		mbox_set_flags(m, uid, MBOX_SEEN, &e);
	mbox_drop_uids(m, NULL, NULL);
	for (uint32_t uid = 1; uid <= n; uid++)
		bind_kind(m, kind, uid, n + uid);
	marked(m, kind == KIND_LEFT ? n : 0);
	mbox_forget_uids(m, NULL);
	for (uint32_t uid = 1; uid <= n / 2; uid++)
		check(bind_kind(m, kind == KIND_LEFT ? KIND_COPIES : kind, uid, uid) == 1, "kind %d: bind %u", kind, uid);
	marked(m, kind == KIND_UNIQUE || (kind >= KIND_MADE && kind < KIND_LEFT) ? n - n / 2 : 0);
	for (uint32_t uid = 1; uid <= n / 2; uid++)
		mbox_set_flags(m, uid, MBOX_FLAGGED, &e);
	closed(m);
	unlink(index_file);
	m = opened(how);
	for (uint32_t uid = 1; uid <= n; uid++)
		bind_kind(m, kind, uid, uid);
	closed(m);
	return work;
}

/* Four times the mails may not cost much more than four times as much, whatever they are. */
static void test_growth(void)
{
	struct mbox *m;
	struct err e = { 0 };

	for (int kind = 0; kind < KINDS; kind++) {
		unsigned long some = work_for((enum kind)kind, 300), more = work_for((enum kind)kind, 1200);

		check(more < some * 5, "kind %d: %lu, then %lu", kind, some, more);
	}
	/* IDs that would meet in one place of the table, were its salt known to be 0. */
	m = fresh(0);
	work = 0;
	for (uint64_t i = 0, inverse = 1; i < 2000; i++) {
		struct record r = { .octets = 9 };

		for (int k = 0; k < 6; k++)
			inverse *= 2 - UINT64_C(0x9E3779B97F4A7C15) * inverse;
		put_number(r.id.octets, 8, i);
		put_number(r.id.octets + 8, 8, (UINT64_C(7) << 60) * inverse ^ sum_step(0, i));
		check(sum_step(sum_step(0, i), get_word(r.id.octets + 8)) >> 40 == 0x700000, "crafted");
		check(record_append(m, &r, &e) == 0, "append: %s", e.text);
	}
	check(work < 100, "crafted IDs: %lu", work);
	m->stuck = true;
	closed(m);
}

static bool stop_now(void)
{
	return true;
}

static void not_told(bool damage, off_t at, const char *id, const char *what)
{
	check(!damage, "at %ld, %s: %s", (long)at, id, what);
}

/* An archive that is opened to be read has no records in memory. */
static void test_tally_of_what_is_read(void)
{
	struct mbox *m = fresh(0);
	struct mbox_info info;
	struct err e = { 0 };
	char text[60];

	for (unsigned uid = 1; uid <= 2000; uid++) {
		snprintf(text, sizeof text, "Message-ID: <%u@x>\r\n\r\n", uid);
		keep(m, uid, text);
	}
	closed(m);
	check(mbox_open(&m, path, "", MBOX_READ, &e) == 0, "open: %s", e.text);
	mbox_tally(m, &info);
	check(info.stored == 2000 && info.gone == 0, "%u, %u gone", info.stored, info.gone);
	mbox_close(m, NULL, NULL, &e);
}

/* A verification ends behind the mail at which it is to, with an index and without. */
static void test_verify_stops(void)
{
	struct mbox *m = fresh(0);
	struct mbox_verify sum = { .tell = not_told, .stop = stop_now };

	keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
	keep(m, 2, "Message-ID: <b@x>\r\n\r\n");
	closed(m);
	for (int lost = 0; lost < 2; lost++) {
		struct err e = { 0 };

		check(mbox_open(&m, path, "", MBOX_READ, &e) == 0, "open: %s", e.text);
		check(mbox_verify(m, &sum, &e) == -1 && e.code == E_STOPPED && sum.mails == 1,
		      "%lu mails, %s", sum.mails, e.text);
		mbox_close(m, NULL, NULL, &e);
		unlink(index_file);
	}
}

/* A run is killed before it has healed a mail whose beginning is damaged: the next one does. */
static void test_healed_after_a_kill(void)
{
	for (int second = 0; second < 2; second++) {
		struct mbox *m = fresh(0);
		struct err e = { 0 };
		struct record r;

		keep(m, 1, "Message-ID: <a@x>\r\n\r\n");
		keep(m, 2, "Message-ID: <b@x>\r\n\r\n");
		check(commit(m, NULL, &e) == 0 && record_get(m, (uint32_t)second, &r, &e) == 0 &&
		      write_all(m, m->fd, "X", 1, r.offset, &e) == 0 && mbox_note(m, r.offset, &e) == 0, "%s", e.text);
		closed(m);
		m = opened(0);
		check(mark_writing(m, &e) == 0, "mark: %s", e.text);
		m->stuck = true;
		mbox_close(m, NULL, NULL, &e);
		m = opened(0);
		check(mbox_heal(m, &e) == 1 && m->now.stored == 2 && m->now.gone == 1, "healed: %s", e.text);
		closed(reopened(m, 0));
	}
}

/* The beginning of a mail of the original's is damaged: the file stays an mbox. */
static void test_healed_original(void)
{
	static const char text[] = "From nobody Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0001\nMessage-ID: <a@x>\n\na\n\n"
				   "From nobody Thu Jan  1 00:00:00 1970\nX-Mozilla-Status: 0005\nMessage-ID: <b@x>\n\nb\n\n";
	static const unsigned damaged[] = { 0, 4, 36, 37, 54, 58, 59, 81 };

	for (size_t i = 0; i < 2 * N(damaged); i++) {
		off_t mail = i % 2 * (sizeof text / 2);
		struct mbox *m = fresh(0);
		struct err e = { 0 };
		char *now;
		size_t n;

		closed(m);
		unlink(index_file);
		write_file(path, text, sizeof text - 1);
		m = opened(0);
		check(bound(m, 1, "<a@x>") + bound(m, 2, "<b@x>") == 2, "bound");
		closed(m);
		m = opened(0);
		check(write_all(m, m->fd, "?", 1, mail + damaged[i / 2], &e) == 0 && mbox_note(m, mail, &e) == 0, "%s", e.text);
		closed(m);
		m = opened(0);
		check(mbox_heal(m, &e) == 1 && m->now.gone == 1 && m->known == 1, "healed %zu: %s", i, e.text);
		closed(reopened(m, 0));
		unlink(index_file);
		m = opened(0);
		check(m->now.stored == 2 && m->now.gone == 1, "healed %zu: %u mails", i, m->now.stored);
		closed(m);
		now = contents(&n);
		check(n == sizeof text - 1 && memcmp(now + mail, "From ", 5) == 0 &&
		      memcmp(now + mail + 36, "\nX-Mozilla-Status: 000", 21) == 0, "healed %zu: %s", i, now);
		free(now);
	}
}

int main(void)
{
	test_head();
	test_sum();
	test_utf8();
	test_escape();
	test_identity();
	test_made();
	test_is_made();
	test_date_field();
	test_stored();
	test_borders();
	test_long_header();
	test_end();
	test_read();
	test_states();
	test_bind();
	test_bind_made();
	test_replaced();
	test_replaced_later();
	test_named();
	test_unlike();
	test_killed();
	test_killed_unread();
	test_no_room();
	test_rekeyed();
	test_rewritten();
	test_original();
	test_marks();
	test_index();
	test_twice();
	test_limits();
	test_files();
	test_absurd();
	test_old_index();
	test_large();
	test_suspect();
	test_torn();
	test_growth();
	test_verify_stops();
	test_tally_of_what_is_read();
	test_healed_after_a_kill();
	test_healed_original();
	return checked("t_mbox");
}
