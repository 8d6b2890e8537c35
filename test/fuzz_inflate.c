/*
 * fuzz_inflate - a libFuzzer target for the chapter "inflate" of imap_backup.c
 *
 * The first octet says in what pieces the stream behind it comes: they must not matter. What zlib
 * makes of the stream we must make of it as well, and refuse what it refuses, if -DZLIB says that
 * it is there to be asked.
 */
#define main program_main
#include "../imap_backup.c"
#undef main
#define FUZZ
#include "unit.h"
#ifdef ZLIB
#include <zlib.h>
#endif

enum { OUT_MAX = 1 << 20 }; /* a stream of little more may stand for a thousand times as much */

static uint8_t one[OUT_MAX], other[OUT_MAX];

struct food { /* what is not given yet, and in what pieces; each is memory of its own */
	const uint8_t *stream;
	size_t size, piece, total; /* octets that came out */
	uint8_t *copy;
};

static int feed(struct inflate *f)
{
	struct food *food = f->context;
	size_t part = food->piece < food->size ? food->piece : food->size;

	must(f->in == f->end && f->at % INFLATE_WINDOW == food->total % INFLATE_WINDOW);
	free(food->copy);
	food->copy = NULL;
	if (part == 0)
		return -1;
	food->copy = malloc(part);
	must(food->copy != NULL);
	memcpy(food->copy, food->stream, part);
	food->stream += part;
	food->size -= part;
	f->in = food->copy;
	f->end = food->copy + part;
	return 0;
}

/* Returns the octets that came out; *wrong is f->wrong. */
static size_t decode(const uint8_t *stream, size_t size, size_t piece, uint8_t *to, const char **wrong)
{
	struct inflate *f = calloc(1, sizeof *f);
	struct food food = { stream, size, piece, 0, NULL };
	const uint8_t *out;
	size_t n;

	must(f != NULL);
	f->ask = feed;
	f->context = &food;
	while (inflate_run(f, &out, &n) == 0) {
		must(n > 0 && n <= INFLATE_WINDOW && out >= f->window && out + n <= f->window + INFLATE_WINDOW);
		must(food.total + n <= OUT_MAX);
		memcpy(to + food.total, out, n);
		food.total += n;
	}
	*wrong = f->wrong;
	must(*wrong != NULL || (food.size == 0 && f->in == f->end));
	must(*wrong == NULL || (inflate_run(f, &out, &n) != 0 && f->wrong == *wrong));
	free(food.copy);
	free(f);
	return food.total;
}

#ifdef ZLIB
static void compare(const uint8_t *stream, size_t size, size_t n, const char *wrong)
{
	z_stream z = { .next_in = (Bytef *)(uintptr_t)stream, .avail_in = (uInt)size, .next_out = other,
		       .avail_out = OUT_MAX };
	int r;

	must(inflateInit2(&z, -15) == Z_OK);
	r = inflate(&z, Z_SYNC_FLUSH);
	must(r == Z_OK || r == Z_STREAM_END || r == Z_BUF_ERROR || r == Z_DATA_ERROR);
	/* zlib goes on a little further with a code for lengths that has no symbol */
	if (wrong == NULL || strcmp(wrong, "code lengths without a code") != 0 || r == Z_DATA_ERROR)
		must((wrong != NULL) == (r == Z_DATA_ERROR || (r == Z_STREAM_END && z.avail_in > 0)));
	must(z.total_out == n && memcmp(one, other, n) == 0);
	inflateEnd(&z);
}
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const char *wrong, *wrong_too;
	size_t n;

	if (size < 2 || size > 800) /* 800 octets are at most 800 * 1032 */
		return 0;
	n = decode(data + 1, size - 1, SIZE_MAX, one, &wrong);
	must(decode(data + 1, size - 1, 1 + data[0] % 64, other, &wrong_too) == n && wrong == wrong_too &&
	     memcmp(one, other, n) == 0);
#ifdef ZLIB
	compare(data + 1, size - 1, n, wrong);
#endif
	return 0;
}
