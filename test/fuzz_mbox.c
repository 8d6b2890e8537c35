/*
 * fuzz_mbox - a libFuzzer target for the archive
 *
 * The first octet chooses: mails that are stored and read back by a reader of its own; or a file
 * that is scanned as an mbox, without an index or with one, whose checksums may be made right so
 * that what they protect is reached. Whatever the files hold: the counts and the order by UID are
 * true, nothing but state digits changes in the mbox, and what is closed opens again at rest.
 */
#include "../mbox.c"
#define FUZZ
#include "unit.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int fsync(int fd);

static char path[200], index_file[220];

int fsync(int fd)
{
	(void)fd;
	return 0;
}

static void file_write(const char *name, const uint8_t *octets, size_t n)
{
	FILE *f = fopen(name, "w");

	must(f != NULL && fwrite(octets, 1, n, f) == n && fclose(f) == 0);
}

static uint8_t *file_read(const char *name, size_t *n)
{
	FILE *f = fopen(name, "r");
	struct stat st;
	uint8_t *octets;

	must(f != NULL && fstat(fileno(f), &st) == 0);
	*n = (size_t)st.st_size;
	octets = malloc(*n + 1);
	must(octets != NULL && fread(octets, 1, *n, f) == *n);
	fclose(f);
	return octets;
}

/* Are the counts and the orders what the entries say? */
static void check_counts(struct mbox *m)
{
	uint32_t known = 0, stored = 0, gone = 0, others = 0, last = 0;
	struct err e = { 0 };

	for (uint32_t i = 0; i < m->now.records; i++) {
		const struct entry *entry = &m->entries[i];
		struct record r, tail;
		uint32_t *place, k;

		known += entry->uid != 0;
		stored += (entry->bits & ENTRY_OTHER) == 0;
		gone += (entry->bits & ENTRY_OTHER) == 0 && entry->bits & ENTRY_GONE;
		others += entry->bits & ENTRY_OTHER && entry->uid != 0;
		must(entry->uid == 0 || m->entries[*record_by_uid(m, entry->uid)].uid == entry->uid);
		must(record_get(m, i, &r, &e) == 0);
		must(ring_find(m, &r.id, &place, &tail, &e) == 0 && *place != 0);
		for (k = *place - 1; k != i;)
			must((k = m->entries[k].next) != *place - 1 || k == i);
	}
	must(m->known == known && m->now.stored == stored && m->now.others == others);
	must(m->now.gone == gone);
	for (uint32_t at = 0; at < m->known; at++) {
		must(m->entries[m->order[at]].uid > last);
		last = m->entries[m->order[at]].uid;
	}
}

static int hex_digit(uint8_t c)
{
	return strchr("0123456789abcdefABCDEF", c) != NULL && c != '\0' ? 0 : -1;
}

/* Does a file differ from what it was in state digits only, and by what was added? */
static void check_unchanged(const uint8_t *old, size_t n)
{
	size_t now_octets;
	uint8_t *now = file_read(path, &now_octets);

	must(now_octets >= n);
	for (size_t i = 0; i < n; i++) {
		static const char field[] = "X-Mozilla-Status: ";
		size_t at = i;

		if (now[i] == old[i])
			continue;
		for (unsigned k = 0; k < 3 && at > 0 && hex_digit(old[at - 1]) >= 0; k++)
			at--;
		must(hex_digit(old[i]) >= 0 && at >= sizeof field - 1);
		/* One to three digits before it are digits of the state too, or belong to the field. */
		while (at <= i && memcmp(old + at - (sizeof field - 1), field, sizeof field - 1) != 0)
			at++;
		must(at <= i && i - at < 4);
	}
	free(now);
}

static bool odd_lives(void *context, uint32_t uid)
{
	return (uid & 1) != 0 && context == NULL;
}

/* Do to an archive what a run may do, as the octets say. */
static void play(struct mbox *m, const uint8_t *p, size_t n)
{
	struct err e = { 0 };
	uint32_t live, gone, moved[2];
	struct record r;

	for (; n > 1 && e.code == E_NONE; p += 2, n -= 2) {
		uint32_t uid = p[1] % 32 + 1u;

		switch (p[0] % 9) {
		case 0:
			if (m->now.records > 0 && record_get(m, p[1] % m->now.records, &r, &e) == 0)
				mbox_bind(m, uid, &r.id, p[0] / 9, false, &e);
			break;
		case 1:
			mbox_bind(m, uid, &(struct mbox_id){ { 1 } }, p[0] / 9, false, &e);
			break;
		case 2:
			mbox_set_flags(m, uid, p[0] / 9 & 7u, &e);
			break;
		case 3:
			mbox_mark_gone(m, &live, &gone, moved, &e);
			break;
		case 4:
			mbox_drop_uids(m, odd_lives, NULL);
			break;
		case 5:
			m->now.claim = (struct mbox_claim){ .uidvalidity = p[1] };
			break;
		case 6:
			mbox_forget_uids(m, NULL);
			break;
		case 7:
			commit(m, NULL, &e);
			break;
		default:
			if (mbox_begin(m, &e) == 0 && mbox_write(m, p, n, &e) == 0)
				mbox_end(m, mbox_next_uid(m, uid) == uid ? 99 : uid, p[1], p[0], &e);
			else
				mbox_abort(m);
		}
		if (e.code == E_NONE)
			check_counts(m);
	}
}

/* Open what is there, use it, and see that it is in order afterwards. */
static void archive(const uint8_t *mbox, size_t n, bool had_index, const uint8_t *script, size_t steps)
{
	struct err e = { 0 };
	struct mbox *m;

	if (mbox_open(&m, path, "INBOX", steps & 1 ? MBOX_DUPLICATES : 0, &e) != 0) {
		must(e.code == E_FORMAT);
		check_unchanged(mbox, n);
		return;
	}
	if (strstr(mbox_mended(m), "cut off") != NULL) {
		must(had_index);
		n = n < (size_t)m->flushed ? n : (size_t)m->flushed;
	}
	must((size_t)m->flushed >= n);
	check_counts(m);
	play(m, script, steps);
	e = (struct err){ 0 };
	mbox_close(m, NULL, NULL, &e);
	must(e.code == E_NONE || e.code == E_FORMAT || had_index);
	check_unchanged(mbox, n);
	e = (struct err){ 0 };
	if (mbox_open(&m, path, "INBOX", 0, &e) != 0) {
		must(n < 5 || memcmp(mbox, "From ", 5) != 0); /* and the index was given up */
		return;
	}
	must(had_index || *mbox_mended(m) == '\0');
	check_counts(m);
	must(mbox_close(m, NULL, NULL, &e) == 0);
}

/* Make an index of octets: a header that counts, and records; its checksums are made right. */
static void index_make(const uint8_t *p, size_t n, uint8_t right)
{
	static uint8_t octets[RECORDS_AT + 64 * RECORD_OCTETS];
	size_t records = 0;

	memset(octets, 0, sizeof octets);
	memcpy(octets, index_magic, 16);
	put_number(octets + 16, 4, 5);
	put_number(octets + 20, 4, sum_of((const uint8_t *)"INBOX", 5));
	memcpy(octets + NAME_AT, "INBOX", 5);
	memcpy(octets + STATE_AT, p, n < 12 ? n : 12); /* writing, records, stored */
	put_number(octets + STATE_AT + 56, 2, n > 13 ? p[12] + 256u * p[13] : 0);
	if (right & 1)
		put_number(octets + STATE_AT + 72, 8, sum_of(octets + STATE_AT, 72));
	p += n < 16 ? n : 16;
	n -= n < 16 ? n : 16;
	for (; n >= 16 && records < 64; p += 16, n -= 16, records++) {
		uint8_t *record = octets + RECORDS_AT + records * RECORD_OCTETS;

		record[0] = p[0]; /* a small UID */
		put_number(record + 4, 4, get_word(p + 1));
		put_number(record + 8, 2, get_word(p + 5));
		record[15] = right & 4 ? p[7] : 0;
		put_number(record + 16, 2, get_word(p + 8));
		record[24] = p[10] & 3; /* few IDs */
		put_number(record + 48, 1, p[11]); /* the lines in front, as the digits say, or not */
		record[7] = right & 8 ? p[12] : (uint8_t)(p[11] - 5);
		if (right & 2)
			put_number(record + 56, 8, sum_of(record, 56));
	}
	file_write(index_file, octets, RECORDS_AT + records * RECORD_OCTETS);
}

/* The next line, with its line end; 0 at the end. */
static size_t line(const uint8_t *p, const uint8_t *end)
{
	const uint8_t *lf = p < end ? memchr(p, '\n', (size_t)(end - p)) : NULL;

	return (size_t)((lf != NULL ? lf + 1 : end) - p);
}

static size_t quotes(const uint8_t *p, size_t n)
{
	size_t i = 0;

	while (i < n && p[i] == '>')
		i++;
	return n - i >= 5 && memcmp(p + i, "From ", 5) == 0 ? i : 0;
}

/*
 * Store the octets, parted by 0xFF, as mails in small pieces; then read the file line by line: each
 * is the next of them, with LF for CRLF, or it was told to be a copy of one.
 */
static void round_trip(const uint8_t *p, size_t n, size_t piece)
{
	const uint8_t *mails[16];
	size_t octets[16], mbox_octets;
	uint8_t *mbox, *wanted;
	unsigned kept = 0, uid = 0;
	struct err e = { 0 };
	struct mbox *m;
	const uint8_t *at, *end;

	must(mbox_open(&m, path, "INBOX", MBOX_DUPLICATES, &e) == 0);
	while (n > 0 && kept < 16) {
		const uint8_t *next = memchr(p, 0xFF, n);
		size_t length = next != NULL ? (size_t)(next - p) : n;

		must(mbox_begin(m, &e) == 0);
		for (size_t i = 0; i < length; i += piece)
			must(mbox_write(m, p + i, length - i < piece ? length - i : piece, &e) == 0);
		if (length % 7 == 6) {
			mbox_abort(m);
		} else {
			must(mbox_end(m, ++uid, (int64_t)(length & ~(size_t)1), MBOX_SEEN, &e) == 1);
			mails[kept] = p;
			octets[kept++] = length;
		}
		p += length + (next != NULL);
		n -= length + (next != NULL);
	}
	check_counts(m);
	must(mbox_close(m, NULL, NULL, &e) == 0);

	mbox = file_read(path, &mbox_octets);
	wanted = malloc(9000);
	must(wanted != NULL);
	at = mbox;
	end = mbox + mbox_octets;
	for (unsigned i = 0; i < kept; i++) {
		size_t length = 0, k, had;
		bool made;

		for (k = 0; k < octets[i]; k++)
			if (mails[i][k] != '\r' || k + 1 == octets[i] || mails[i][k + 1] != '\n')
				wanted[length++] = mails[i][k];
		if (length > 0 && wanted[length - 1] != '\n')
			wanted[length++] = '\n';
		must((k = line(at, end)) == FROM_OCTETS && memcmp(at, "From MAILER-DAEMON ", 19) == 0);
		at += k;
		must((k = line(at, end)) == 23 && memcmp(at, "X-Mozilla-Status: 0001\n", 23) == 0);
		at += k;
		k = line(at, end);
		made = k > 13 && is_made((const char *)at + 12, k - 13);
		if (made && (length < k || memcmp(at, wanted, k) != 0))
			at += k;
		for (had = 0; had < length; had += k) {
			size_t quoted = quotes(at, k = line(at, end));

			must(quoted > 0 || k < 5 || memcmp(at, "From ", 5) != 0);
			at += quoted > 0;
			k -= quoted > 0;
			must(k <= length - had && memcmp(at, wanted + had, k) == 0);
			at += k;
		}
		must(at < end && *at++ == '\n');
	}
	must(at == end);
	free(wanted);
	unlink(index_file); /* a scan finds the same */
	must(mbox_open(&m, path, "INBOX", 0, &e) == 0);
	must(m->now.stored == kept);
	must(mbox_close(m, NULL, NULL, &e) == 0);
	check_unchanged(mbox, mbox_octets);
	free(mbox);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const uint8_t *mbox, *script;
	size_t n, steps;

	if (*path == '\0') {
		must(snprintf(path, sizeof path, "%s/INBOX.mbox", getenv("TMPDIR")) < (int)sizeof path);
		snprintf(index_file, sizeof index_file, "%s.index", path);
	}
	unlink(path);
	unlink(index_file);
	if (size < 4)
		return 0;
	if ((data[0] & 3) == 0) {
		round_trip(data + 2, size - 2, data[1] + 1u);
		return 0;
	}
	/* mbox, 0xFF, what is done, 0xFF, index */
	mbox = data + 2;
	script = memchr(mbox, 0xFF, size - 2);
	n = script != NULL ? (size_t)(script - mbox) : size - 2;
	steps = script != NULL ? size - 2 - n - 1 : 0;
	script = script != NULL ? script + 1 : mbox;
	file_write(path, mbox, n);
	if (data[0] & 2) {
		const uint8_t *index = steps > 0 ? memchr(script, 0xFF, steps) : NULL;

		if (index != NULL) {
			index_make(index + 1, steps - (size_t)(index - script) - 1, data[1]);
			steps = (size_t)(index - script);
		}
	}
	archive(mbox, n, data[0] & 2, script, steps);
	return 0;
}
