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

/* Returns the octets that came out; *wrong as of inflate_run(). Each piece is memory of its own. */
static size_t decode(const uint8_t *stream, size_t size, size_t piece, uint8_t *to, const char **wrong)
{
	struct inflate *f = calloc(1, sizeof *f);
	size_t total = 0;

	must(f != NULL);
	*wrong = NULL;
	for (size_t at = 0, part; at < size && *wrong == NULL; at += part) {
		const uint8_t *in, *out;
		uint8_t *copy;
		size_t n;

		part = piece < size - at ? piece : size - at;
		in = copy = malloc(part);
		must(copy != NULL);
		memcpy(copy, stream + at, part);
		do {
			*wrong = inflate_run(f, &in, copy + part, &out, &n);
			must(n <= INFLATE_WINDOW && out >= f->window && out + n <= f->window + INFLATE_WINDOW);
			must(total + n <= OUT_MAX);
			memcpy(to + total, out, n);
			total += n;
		} while (*wrong == NULL && n > 0);
		must(*wrong != NULL || in == copy + part);
		must(*wrong == NULL || inflate_run(f, &in, copy + part, &out, &n) == *wrong);
		free(copy);
	}
	free(f);
	return total;
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
