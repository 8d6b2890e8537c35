/*
 * t_inflate - unit tests of the chapter "inflate"
 *
 *   t_inflate             streams made by hand: what is allowed, and what must be refused; slow lines
 *   t_inflate check       streams from standard input, each with what it stands for (test_compress.py):
 *                         in pieces of all sizes, cut after every octet, and with wrong bits
 *   t_inflate speed N     decode standard input N times; say how fast
 *
 * Prints what failed; exits 0 if nothing did.
 */
#define main imap_backup_main
#include "../imap_backup.c"
#undef main

static unsigned failures;

static void complain(const char *what, const char *format, ...)
{
	va_list ap;

	failures++;
	va_start(ap, format);
	printf("%s: ", what);
	vprintf(format, ap);
	putchar('\n');
	va_end(ap);
}

/* -- decoding, as the stream does it -- */

struct text {
	uint8_t *octets;
	size_t n, room;
};

static void text_add(struct text *t, const void *octets, size_t n)
{
	if (t->n + n > t->room) {
		t->room = 2 * (t->n + n);
		t->octets = realloc(t->octets, t->room);
	}
	if (n > 0)
		memcpy(t->octets + t->n, octets, n);
	t->n += n;
}

/* What is fed, in pieces of so many octets; each is in memory of its own. */
struct food {
	const uint8_t *stream;
	size_t n, piece;
	uint8_t *copy;
	size_t fed, given; /* octets that went in; that have come out */
	bool held_back;    /* where k octets hold k - 1 of what they stand for */
};

static int feed(struct inflate *f)
{
	struct food *food = f->context;
	size_t part = food->piece < food->n ? food->piece : food->n;

	free(food->copy);
	food->copy = NULL;
	food->held_back = food->held_back || food->given + 1 < food->fed;
	if (part == 0)
		return -1;
	food->copy = malloc(part);
	memcpy(food->copy, food->stream, part);
	food->stream += part;
	food->n -= part;
	food->fed += part;
	f->in = food->copy;
	f->end = food->copy + part;
	return 0;
}

/* Decode in pieces of so many octets. Returns what was wrong, or NULL. */
static const char *decode(const uint8_t *stream, size_t n, size_t piece, struct text *out)
{
	struct inflate *f = calloc(1, sizeof *f);
	struct food food = { .stream = stream, .n = n, .piece = piece };
	const char *wrong;
	const uint8_t *octets;
	size_t got;

	f->ask = feed;
	f->context = &food;
	for (out->n = 0; inflate_run(f, &octets, &got) == 0;)
		text_add(out, octets, got);
	wrong = f->wrong;
	if (wrong == NULL && (food.n > 0 || f->in < f->end))
		complain("decode", "input is left over");
	free(food.copy);
	free(f);
	return wrong;
}

/* -- streams from outside -- */

static bool same(const struct text *got, const uint8_t *wanted, size_t n)
{
	return got->n == n && (n == 0 || memcmp(got->octets, wanted, n) == 0);
}

static void check(const char *name, const uint8_t *stream, size_t n, const uint8_t *wanted, size_t octets)
{
	static const size_t pieces[] = { 1, 2, 3, 5, 8, 13, 1000, 16384, SIZE_MAX };
	struct text got = { 0 };
	size_t step = n / (octets < 20000 ? 100 : 20) + 1; /* of cuts and bits, for large streams */

	for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
		const char *wrong = decode(stream, n, pieces[i], &got);

		if (wrong != NULL || !same(&got, wanted, octets))
			complain(name, "pieces of %zu: %s, %zu octets instead of %zu", pieces[i],
				 wrong != NULL ? wrong : "well", got.n, octets);
	}
	for (size_t cut = 0; cut < n; cut += step) {
		const char *wrong = decode(stream, cut, SIZE_MAX, &got);

		if (wrong != NULL || got.n > octets || (got.n > 0 && memcmp(got.octets, wanted, got.n) != 0))
			complain(name, "cut after %zu: %s, %zu octets", cut, wrong != NULL ? wrong : "other octets",
				 got.n);
	}
	for (size_t i = 0; i < 8 * n; i += 8 * step - 7) { /* must only end, and within bounds */
		uint8_t *copy = malloc(n);

		memcpy(copy, stream, n);
		copy[i / 8] ^= (uint8_t)(1 << i % 8);
		decode(copy, n, SIZE_MAX, &got);
		free(copy);
	}
	free(got.octets);
}

static bool read_text(struct text *t)
{
	uint32_t n;

	if (fread(&n, sizeof n, 1, stdin) != 1)
		return false;
	t->octets = realloc(t->octets, n + 1);
	t->octets[n] = '\0';
	t->n = n;
	return fread(t->octets, 1, n, stdin) == n;
}

static void check_all(void)
{
	struct text name = { 0 }, stream = { 0 }, wanted = { 0 };
	unsigned n = 0;

	while (read_text(&name) && read_text(&stream) && read_text(&wanted)) {
		check((const char *)name.octets, stream.octets, stream.n, wanted.octets, wanted.n);
		n++;
	}
	printf("%u streams\n", n);
	free(name.octets);
	free(stream.octets);
	free(wanted.octets);
}

static int feed_once(struct inflate *f)
{
	struct text *t = f->context;

	if (f->end != NULL)
		return -1;
	f->in = t->octets;
	f->end = t->octets + t->n;
	return 0;
}

static void speed(unsigned times)
{
	struct text t = { 0 };
	struct inflate *f = malloc(sizeof *f);
	uint8_t octets[1 << 16];
	uint64_t total = 0;
	clock_t began;
	size_t n;

	while ((n = fread(octets, 1, sizeof octets, stdin)) > 0)
		text_add(&t, octets, n);
	began = clock();
	for (unsigned i = 0; i < times; i++) {
		const uint8_t *out;

		memset(f, 0, sizeof *f);
		f->ask = feed_once;
		f->context = &t;
		while (inflate_run(f, &out, &n) == 0)
			total += n;
		if (f->wrong != NULL)
			abort();
	}
	printf("%.1f MB/s\n", (double)total / 1e6 * CLOCKS_PER_SEC / (double)(clock() - began + 1));
	free(t.octets);
	free(f);
}

/* -- streams by hand: bits as they come, lowest first; a code's bits as RFC 1951 writes them -- */

static const struct {
	const char *name, *bits;  /* of 0 and 1; all else is decoration */
	const char *text;         /* what it stands for */
	const char *wrong;        /* how it ends, or NULL */
} by_hand[] = {
	{ "nothing", "", "", NULL },
	{ "stored", "0 00 00000  11000000 00000000 00111111 11111111  10000110 01000110 11000110", "abc", NULL },
	{ "stored, empty", "0 00 00000  00000000 00000000 11111111 11111111", "", NULL },
	{ "stored, wrong length", "0 00 00000  11000000 00000000 00111111 11111110  10000110", "", "in doubt" },
	{ "type 3", "0 11", "", "no known type" },
	{ "fixed", "0 10  10010001 0000000", "a", NULL },
	{ "fixed, a match of itself", "0 10  10010001 0000010 00000 0000000", "aaaaa", NULL },
	{ "fixed, length 258 twice", "0 10  10010001 11000101 00000 0000000",
	  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", NULL },
	{ "fixed, too far", "0 10  10010001 0000001 00001", "a", "before its beginning" },
	{ "fixed, nothing to repeat", "0 10  0000001 00000", "", "before its beginning" },
	{ "fixed, length symbol 286", "0 10  11000110", "", "without a meaning" },
	{ "fixed, length symbol 287", "0 10  11000111", "", "without a meaning" },
	{ "fixed, distance symbol 30", "0 10  10010001 0000001 11110", "a", "without a meaning" },
	{ "the last block, and nothing", "1 10  10010001 0000000", "a", NULL },
	{ "the last block, and an octet", "1 10  10010001 0000000 000000 00000000", "a", "after its end" },
	{ "too many literals", "0 01  01111 00000 0000", "", "more symbols than there are" },
	{ "too many distances", "0 01  00000 01111 0000", "", "more symbols than there are" },
	{ "code lengths of 0", "0 01  00000 00000 0000  000 000 000 000", "", "without a code" },
	{ "code lengths, too few", "0 01  00000 00000 0000  100 000 000 000", "", "without a code" },
	{ "code lengths, too many", "0 01  00000 00000 0000  100 100 100 000", "", "without a code" },
	/* in the code for lengths 0 is 0, and 16 or 18 is 1 */
	{ "a repetition of nothing", "0 01  00000 00000 0000  100 000 000 100  1 00", "", "too early" },
	{ "repetitions over the end", "0 01  00000 00000 0000  000 000 100 100  1 1111111 1 1111111", "",
	  "too often" },
	{ "no end of the block", "0 01  00000 00000 0000  000 000 100 100  1 1111111 1 1011011", "",
	  "without a code" },
};

static void check_by_hand(void)
{
	for (size_t i = 0; i < sizeof by_hand / sizeof *by_hand; i++) {
		uint8_t stream[200] = { 0 };
		struct text got = { 0 };
		const char *wrong;
		size_t n = 0;

		for (const char *p = by_hand[i].bits; *p != '\0'; p++)
			if (*p == '0' || *p == '1') {
				stream[n / 8] |= (uint8_t)((*p == '1') << n % 8);
				n++;
			}
		for (size_t piece = 1; piece < 200; piece += 198) {
			wrong = decode(stream, (n + 7) / 8, piece, &got);
			if ((wrong == NULL) != (by_hand[i].wrong == NULL) ||
			    (wrong != NULL && strstr(wrong, by_hand[i].wrong) == NULL) ||
			    !same(&got, (const uint8_t *)by_hand[i].text, strlen(by_hand[i].text)))
				complain(by_hand[i].name, "%s, \"%.*s\"", wrong != NULL ? wrong : "well",
					 (int)got.n, (const char *)got.octets);
		}
		free(got.octets);
	}
	printf("%zu streams by hand\n", sizeof by_hand / sizeof *by_hand);
}

/* A fixed block of literals, eight bits each, behind its own first three bits. */
static void check_held_back(void)
{
	uint8_t stream[100];
	const uint8_t *octets;
	size_t got;

	for (size_t piece = 1; piece < 40; piece++) {
		struct inflate *f = calloc(1, sizeof *f);
		struct food food = { .stream = stream, .n = sizeof stream, .piece = piece };

		memset(stream, 0xAA, sizeof stream); /* 0 10, 10101010, 10101010 ... */
		f->ask = feed;
		f->context = &food;
		while (inflate_run(f, &octets, &got) == 0)
			food.given += got;
		if (food.held_back || f->wrong != NULL || food.given != sizeof stream - 1)
			complain("held back", "pieces of %zu: %zu octets, %s", piece, food.given,
				 f->wrong != NULL ? f->wrong : "well");
		free(food.copy);
		free(f);
	}
}

/* -- which lines are slow -- */

static void check_lines(void)
{
	static const struct {
		int64_t connect_ms, waited_ms;
		uint64_t in;
		bool slow;
	} lines[] = {
		{ 50, 950, 1 << 20, false },     /* 20 Mbit/s, and slow start */
		{ 50, 1100, 1 << 20, true },     /* the same a little later */
		{ 50, 2400, 4 << 20, true },
		{ 50, 1000, 8 << 20, false },    /* a fast line that is long */
		{ 50, 60000, 1000000, false },   /* many small mailboxes */
		{ 200, 3800, 4 << 20, false },
		{ 0, 9000, 4 << 20, false },     /* a slow server in the LAN */
	};

	for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
		struct stream s = { .connect_ms = lines[i].connect_ms, .waited_ms = lines[i].waited_ms,
				    .in = lines[i].in };

		if (stream_is_slow(&s) != lines[i].slow)
			complain("lines", "number %zu", i);
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "speed") == 0)
		speed((unsigned)strtoul(argv[2], NULL, 10));
	else if (argc == 2 && strcmp(argv[1], "check") == 0)
		check_all();
	else {
		check_by_hand();
		check_held_back();
		check_lines();
	}
	printf("%u failures\n", failures);
	return failures > 0;
}
