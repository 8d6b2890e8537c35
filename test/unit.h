/*
 * unit.h - what units and fuzz targets share
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../imap_backup.h"

#ifdef FUZZ
/* For a fuzz target: what must hold always. */
#define must(ok) ((ok) ? (void)0 : \
	(fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #ok), abort()))
#else
static unsigned long checks, failures;

/* For a unit: count a check; when it failed, say so. Returns ok. */
static bool check(bool ok, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static bool check(bool ok, const char *format, ...)
{
	va_list ap;

	checks++;
	if (ok)
		return true;
	if (++failures > 40)
		return false; /* enough to read */
	printf("failed: ");
	va_start(ap, format);
	vprintf(format, ap);
	va_end(ap);
	printf("\n");
	return false;
}

/* What main() returns. */
static int checked(const char *unit)
{
	printf("%s: %lu checks, %lu failed\n", unit, checks, failures);
	return failures > 0;
}
#endif
